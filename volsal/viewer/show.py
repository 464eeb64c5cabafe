"""A napari window on a scan and its maps."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from volsal.display import PLANES, PlaneName, Upright, in_words, letters, limits, mirrored, peak_mm, verdict
from volsal.scans import Scan
from volsal.viewer.layers import map_layer, napari_world, scan_layer, true_world, value_at
from volsal.viewer.opening import ViewerError, open_path

_INSTALL = 'pip install "volsal[napari]" "napari[pyqt6]"'
_EDGES = {"left": "middle_left", "right": "middle_right", "top": "top_center", "bottom": "bottom_center"}


class MapLike(Protocol):
    """What :func:`show` needs to know of a map; see :class:`ShownMap`."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def values(self) -> NDArray: ...  # noqa: D102
    @property
    def window(self) -> tuple[float, float]: ...  # noqa: D102
    @property
    def unit(self) -> str: ...  # noqa: D102
    @property
    def signed(self) -> bool: ...  # noqa: D102


def show(
    scan: Scan,
    maps: Sequence[MapLike] = (),
    *,
    convention: str = "radiological",
    at_mm: ArrayLike | None = None,
    plane: PlaneName = "axial",
    block: bool = True,
) -> Any:
    """Open a napari window on ``scan`` with ``maps`` over it: visible is the first that has evidence to show.

    Parameters
    ----------
    at_mm : scanner RAS+ position to open at; without it the first map's peak, else the middle of the scan
    plane : the plane to open with; napari's roll-dimensions button turns to the others
    block : return only when the window is closed

    Returns
    -------
    The napari viewer.

    Raises
    ------
    ViewerError
        Where napari, a Qt binding or a display is missing, or a map does not have the scan's shape.
    DisplayError
        For an unknown convention.
    """
    for shown in maps:
        if shown.values.shape != scan.grid.shape:
            raise ViewerError(
                f"{shown.name}: the map has shape {shown.values.shape}, the scan {scan.grid.shape}; "
                "bring both to one grid with resample"
            )
    mirrored(convention)  # before any window opens
    maps = sorted(maps, key=lambda shown: bool(verdict(shown.values)))
    napari = napari_module()
    viewer = napari.Viewer(title=f"volsal: {scan}")
    _fill(viewer, scan, maps)
    _aim(viewer, scan, maps, convention, at_mm, plane)
    _annotate(viewer, scan, maps, convention)
    settle(viewer)
    viewer.status = _status(viewer, viewer.dims.point)
    if block:
        napari.run()
    return viewer


def screenshot(
    scan: Scan,
    maps: Sequence[MapLike] = (),
    *,
    convention: str = "radiological",
    at_mm: ArrayLike | None = None,
    plane: PlaneName = "axial",
    window: bool = False,
) -> NDArray[np.uint8]:
    """What :func:`show` shows, as an (height, width, 3) RGB array: the canvas, or with ``window`` the whole window."""
    viewer = show(scan, maps, convention=convention, at_mm=at_mm, plane=plane, block=False)
    try:
        return np.ascontiguousarray(viewer.screenshot(canvas_only=not window, flash=False)[..., :3])
    finally:
        viewer.close()


def open_case(
    path: Path,
    maps: Sequence[Path] = (),
    *,
    convention: str = "radiological",
    at_mm: ArrayLike | None = None,
    block: bool = True,
) -> Any:
    """Show a case that volsal wrote, or a scan file with map files over it.

    Parameters
    ----------
    path : a case folder (the one with ``case.json``), or a scan file
    maps : map files to lay over it; with a case folder, instead of all of its maps

    Returns
    -------
    The napari viewer.

    Raises
    ------
    ViewerError
        Where the case cannot be understood or a map does not lie on the scan's voxels.
    ScanError
        Where a file cannot be read.
    """
    opened = open_path(Path(path), maps)
    if opened.faults:
        raise opened.faults[0]
    return show(
        opened.scan,
        opened.maps,
        convention=convention,
        at_mm=opened.peak_mm if at_mm is None else at_mm,
        block=block,
    )


def napari_module() -> Any:
    """The napari module, once it is certain that opening a window will not abort the process."""
    if importlib.util.find_spec("napari") is None:
        raise ViewerError(f"the viewer needs napari and a Qt binding: {_INSTALL}")
    _require_display()
    try:
        import qtpy.QtWidgets
        from qtpy.QtCore import Qt
    except ImportError as error:
        bindings = [name for name in ("PyQt6", "PySide6", "PyQt5") if importlib.util.find_spec(name)]
        if bindings:
            raise ViewerError(
                f"{bindings[0]} is installed but does not load, most likely for want of system libraries "
                "(on Debian: libegl1 libgl1 libxkbcommon0 libdbus-1-3)"
            ) from error
        raise ViewerError(f"the viewer needs a Qt binding: {_INSTALL}") from error
    if qtpy.QtWidgets.QApplication.instance() is None:
        _require_qt_starts()
        # Else a panel with canvases of its own loses what it has drawn when it is moved out of the window.
        qtpy.QtWidgets.QApplication.setAttribute(Qt.ApplicationAttribute.AA_ShareOpenGLContexts)
    import napari

    return napari


def _require_display() -> None:
    platform = os.environ.get("QT_QPA_PLATFORM", "")
    if platform.split(":")[0] in ("offscreen", "minimal"):
        raise ViewerError(
            f"QT_QPA_PLATFORM={platform} draws no pictures; unset it, and without a screen use xvfb-run -a"
        )
    if sys.platform.startswith("linux") and not platform and not _names_a_display():
        raise ViewerError(
            "there is no display (neither DISPLAY nor WAYLAND_DISPLAY is set); run volsal where there is a screen, "
            "or under xvfb-run -a"
        )


def _names_a_display() -> bool:
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def _require_qt_starts() -> None:
    """Start Qt once in another process, because where it cannot reach the display it aborts the process it is in."""
    if not sys.platform.startswith("linux"):
        return
    code = "from qtpy.QtWidgets import QApplication; QApplication([])"
    try:
        tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired as error:
        raise ViewerError("Qt did not start within a minute; is the display reachable?") from error
    if tried.returncode:
        said = [line.strip() for line in tried.stderr.splitlines() if line.strip()]
        raise ViewerError(
            f"Qt cannot open a window here ({said[0] if said else f'exit status {tried.returncode}'}); is the display "
            "reachable, and are its libraries there (on Debian: libxcb-cursor0 libxcb-icccm4 libxcb-keysyms1)?"
        )


def _fill(viewer: Any, scan: Scan, maps: Sequence[MapLike]) -> None:
    """One layer for the scan and one for each map, the first map on top and alone visible."""
    data, arguments, _ = scan_layer(scan)
    viewer.add_image(data, **arguments)
    for shown in reversed(maps):
        data, arguments, _ = map_layer(
            shown.values, scan.grid, shown.name, shown.window, shown.unit, shown.signed, scan
        )
        layer = viewer.add_image(data, **arguments, visible=shown is maps[0])
        layer.colorbar.position = "top_right"
        layer.colorbar.visible = bool(np.ptp(shown.values) > 0)


def _aim(
    viewer: Any,
    scan: Scan,
    maps: Sequence[MapLike],
    convention: str,
    at_mm: ArrayLike | None,
    plane: PlaneName,
) -> None:
    view = PLANES[plane]
    viewer.dims.ndisplay = 2
    viewer.dims.order = tuple(2 - axis for axis in (view.through, view.up, view.across))
    face(viewer, convention)
    point = at_mm if at_mm is not None else _first_peak(scan, maps)
    viewer.dims.point = tuple(napari_world(scan.grid, np.asarray(point, dtype=np.float64)))


def face(viewer: Any, convention: str) -> None:
    """Turn the camera so that up is up, and the patient's right where the convention has it."""
    # Depth follows from the other two: both triples are right-handed for (S, A, R), so 3D is no mirror image.
    viewer.scene.camera.orientation = ("away", "up", "left") if mirrored(convention) else ("towards", "up", "right")


def faced(viewer: Any) -> str | None:
    """The convention that the camera follows; None where it is turned otherwise, as napari's own is at first."""
    _, up, side = map(str, viewer.scene.camera.orientation)
    return {"left": "radiological", "right": "neurological"}.get(side) if up == "up" else None


def _first_peak(scan: Scan, maps: Sequence[MapLike]) -> NDArray[np.float64]:
    peaks = (peak_mm(shown.values, scan.grid) for shown in maps)
    return next((peak for peak in peaks if peak is not None), Upright(scan.grid).centre)


def _annotate(viewer: Any, scan: Scan, maps: Sequence[MapLike], convention: str) -> None:
    """What the picture alone does not tell: sides, tilt, scale, unit, true position."""
    orient(viewer)
    overlays = viewer.canvas.overlays
    overlays.text.text = "\n".join(_caption(scan, maps, convention))
    overlays.text.position = "top_left"
    overlays.text.font_size = 9
    overlays.text.visible = True


def orient(viewer: Any) -> None:
    """A scale bar, letters at the edges, and a status line that says the true position; once for each viewer."""
    overlays = viewer.canvas.overlays
    if f"volsal_{next(iter(_EDGES))}" in overlays:
        return
    overlays.scale_bar.visible = True
    overlays.scale_bar.position = "bottom_right"
    letter_edges(viewer)
    _report_position(viewer)


def _caption(scan: Scan, maps: Sequence[MapLike], convention: str) -> list[str]:
    lines = [in_words(convention), Upright(scan.grid).note]
    if maps:
        first = maps[0]
        low, high = limits(first.window, first.signed)
        said = verdict(first.values) or f"{low:.3g} to {high:.3g} {first.unit}".rstrip()
        lines.append(f"{first.name}: {said}")
    # Narrow enough to stay clear of the letter in the middle of the upper edge.
    return [part for line in lines for part in wrap(line, 38)]


def letter_edges(viewer: Any, font_size: int = 14) -> None:
    """R, L, A, P, S, I at the edges of the canvas, and right again when the plane or the camera is turned."""
    from napari.components.overlays import TextOverlay

    overlays = viewer.canvas.overlays
    for edge, position in _EDGES.items():
        overlays[f"volsal_{edge}"] = TextOverlay(position=position, font_size=font_size, visible=True)

    def update(event: Any = None) -> None:
        cut = 2 - viewer.dims.order[0]
        plane: PlaneName = next(name for name, view in PLANES.items() if view.through == cut)
        # Another order of the two displayed axes, another camera, or 3D: then these letters would be wrong.
        view, seen = PLANES[plane], faced(viewer)
        usual = tuple(viewer.dims.order[1:]) == (2 - view.up, 2 - view.across) and viewer.dims.ndisplay == 2
        for edge, letter in letters(plane, seen or "radiological").items():
            overlays[f"volsal_{edge}"].text = letter
            overlays[f"volsal_{edge}"].visible = usual and seen is not None

    viewer.dims.events.order.connect(update)
    viewer.dims.events.ndisplay.connect(update)
    viewer.scene.camera.events.orientation.connect(update)
    update()


def _report_position(viewer: Any) -> None:
    """Make the status bar say the true scanner position in mm and the visible map's value there."""

    def rewrite(event: Any) -> None:
        if isinstance(event.value, Mapping):  # napari's own report; ours is a string
            viewer.status = _status(viewer, viewer.cursor.position)

    # Last, or napari's own handler would have the last word.
    viewer.events.status.connect(rewrite, position="last")


def _status(viewer: Any, point: Sequence[float]) -> str:
    return "   ".join(words_at(viewer, point))


def words_at(viewer: Any, point: Sequence[float]) -> list[str]:
    """What is at a position (S, A, R) of napari's world: where that is in the scanner, and each visible layer's value.

    Empty where no layer of volsal's is visible.
    """
    visible = [layer for layer in viewer.layers if layer.visible and "display_to_scanner" in layer.metadata]
    if not visible:
        return []
    x, y, z = true_world(visible[-1].metadata, point)
    parts = [f"x {x:.1f}  y {y:.1f}  z {z:.1f} mm (scanner, RAS+)"]
    for layer in visible:
        value = value_at(layer.data, {"scale": layer.scale, "translate": layer.translate}, point)
        if value is not None:
            parts.append(f"{layer.name} {value:.4g} {layer.metadata.get('unit', '')}".rstrip())
    return parts


def settle(viewer: Any) -> None:
    """Let the window reach its size before the picture is fitted to it."""
    from qtpy.QtWidgets import QApplication

    for _ in range(10):
        QApplication.processEvents()
    viewer.reset_view()
    for _ in range(3):
        QApplication.processEvents()
