"""Pictures of maps over scans, to scale, with sides, units and window on them.

matplotlib's object interface only: no pyplot, no global state, no backend to choose, so it works in worker processes
and without a screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from volsal.display import (
    PLANES,
    PlaneName,
    Upright,
    colours,
    in_words,
    letters,
    limits,
    mirrored,
    peak_mm,
    scan_window,
    verdict,
)
from volsal.scans import Scan
from volsal.scans.write import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 150
_INK, _QUIET, _CROSSHAIR, _MARK, _WARNING = "#111111", "#5c5c5c", "#7fd4ff", "#35f2a0", "#ffd166"
# A mark further from a plane than this is drawn dashed: it lies in front of the picture or behind it.
_ON_PLANE_MM = 5.0
_RING_MM = 6.0
# Names come from files and users, and a pair of dollar signs in one is no formula.
_AS_IT_STANDS: dict[str, Any] = {"parse_math": False}


class Row(NamedTuple):
    """One scan of a :func:`montage`.

    Attributes
    ----------
    label : of the row
    scan : shown under every map
    maps : (name, values (I, J, K), window) each; the name is the column.  A window from below zero is signed
    mark_mm : a scanner position to ring, such as the truth; it also chooses the plane
    note : small print under the label
    """

    label: str
    scan: Scan
    maps: Sequence[tuple[str, NDArray, tuple[float, float]]]
    mark_mm: ArrayLike | None = None
    note: str = ""


class _View(NamedTuple):
    """How a scan is cut and which way round it is shown."""

    upright: Upright
    point: NDArray[np.float64]  # (3,) scanner mm, on every plane that is drawn
    convention: str

    def cut(self, plane: PlaneName) -> float:
        """Displayed mm, along the axis that ``plane`` cuts, of the slice that is drawn."""
        axis = PLANES[plane].through
        return float(self.upright.origin[axis] + self.upright.spacing[axis] * self.upright.index(plane, self.point))


def three_planes(
    scan: Scan,
    values: NDArray | None = None,
    *,
    window: tuple[float, float] = (0.0, 1.0),
    unit: str = "",
    at_mm: ArrayLike | None = None,
    title: str = "",
    marks_mm: Sequence[ArrayLike] = (),
    marks_name: str = "marked",
    signed: bool = False,
    convention: str = "radiological",
) -> Figure:
    """Axial, coronal and sagittal plane through one point, at one scale.

    Parameters
    ----------
    values : a map (I, J, K) on the scan's voxels; None shows the scan alone
    window : the values at the two ends of the colour bar
    unit : of the values
    at_mm : scanner RAS+ position to cut at; without it the map's peak, else the middle of the scan
    marks_mm : scanner positions to ring, dashed where they lie more than 5 mm off the plane
    marks_name : what the rings are, for the legend
    signed : colours centred on zero
    """
    upright = Upright(scan.grid)
    said = "" if values is None else verdict(values)
    peak = None if values is None or at_mm is not None else peak_mm(values, scan.grid)
    point = next(np.asarray(at, dtype=np.float64) for at in (at_mm, peak, upright.centre) if at is not None)

    view = _View(upright, point, convention)
    figure, panels, bar = _three_panels(view)
    grey = scan_window(scan.array)
    for plane, axes in panels.items():
        _draw_scan(axes, view, plane, scan.array, grey)
        if values is not None:
            _draw_map(axes, view, plane, values, window, signed)
        _letter(axes, plane, convention)
        _crosshair(axes, view, plane)
        _marks(axes, view, plane, marks_mm)
        axes.set_title(_plane_caption(view, plane), fontsize=9, color=_QUIET, pad=4)
    _scale_bar(panels["axial"])
    if said:
        _on_picture(panels["axial"], said, below=0.92)
    if values is not None and window[1] > window[0]:
        _colour_bar(bar, limits(window, signed), signed, unit)
    else:
        bar.remove()
    _words(figure, view, title, f"ring: {marks_name}" if len(marks_mm) else "")
    return figure


def _words(figure: Figure, view: _View, title: str, legend: str) -> None:
    """The title above the panels, and below them what the pictures alone do not tell."""
    inch = 1 / figure.get_figheight()
    left = 0.12 / figure.get_figwidth()
    if title:
        figure.text(left, 1 - 0.1 * inch, title, fontsize=11, weight="bold", color=_INK, va="top", **_AS_IT_STANDS)
    x, y, z = view.point
    cut = f"cut at ({x:.1f}, {y:.1f}, {z:.1f}) mm, scanner RAS+"
    notes = [note for note in (in_words(view.convention), view.upright.note, cut, legend) if note]
    text = "\n".join(_flow(notes, figure.get_figwidth() - 0.24))
    figure.text(left, 0.1 * inch, text, fontsize=8, color=_QUIET, va="bottom", **_AS_IT_STANDS)


def _flow(notes: Sequence[str], inches: float) -> list[str]:
    """Lines of notes in 8 points, at most ``inches`` long, broken between notes only."""
    lines = [""]
    for note in notes:
        longer = f"{lines[-1]}   ·   {note}" if lines[-1] else note
        if lines[-1] and len(longer) > 15 * inches:  # about fifteen characters to the inch
            lines.append(note)
        else:
            lines[-1] = longer
    return lines


def montage(rows: Sequence[Row], path: Path | None = None, *, convention: str = "radiological") -> Figure:
    """Many scans and methods in one picture: a row for each scan, a column for each map name, one axial plane each.

    The plane goes through the row's mark, else through the peak of its first map that has one, else through the
    middle.  The first column is the scan alone.  Where windows differ, each cell carries its own.

    Parameters
    ----------
    path : where to write the figure as PNG; None writes nothing
    """
    names = list(dict.fromkeys(name for row in rows for name, _, _ in row.maps))
    figure, grid, foot = _sheet(len(rows), len(names) + 1)
    windows = {limits(window, window[0] < 0) for row in rows for _, _, window in row.maps}
    shared = windows.pop() if len(windows) == 1 else None
    for axes, name in zip(grid[0], ["scan", *names], strict=True):
        axes.set_title(name, fontsize=10, weight="bold", color=_INK, pad=6, **_AS_IT_STANDS)
    for cells, row in zip(grid, rows, strict=True):
        _montage_row(cells, names, row, convention, numbers=shared is None)
        _row_label(cells[0], row)
    _foot(figure, foot, rows, convention, shared)
    if path is not None:
        save(figure, path)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` as PNG under ``path``, whole or not at all."""
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI, facecolor=figure.get_facecolor())


def _montage_row(cells: Sequence[Axes], names: Sequence[str], row: Row, convention: str, numbers: bool) -> None:
    upright = Upright(row.scan.grid)
    view = _View(upright, _montage_point(row, upright), convention)
    grey = scan_window(row.scan.array)
    maps = {name: (values, window) for name, values, window in row.maps}
    _montage_cell(cells[0], view, row, grey)
    _letter(cells[0], "axial", convention, edges=("left", "right"), size=9)
    _scale_bar(cells[0], size=7)
    for axes, name in zip(cells[1:], names, strict=True):
        if name not in maps:
            axes.set_facecolor("#eeeeee")
            axes.text(0.5, 0.5, "no map", transform=axes.transAxes, fontsize=8, color=_QUIET, ha="center", va="center")
            continue
        values, window = maps[name]
        signed = window[0] < 0
        _montage_cell(axes, view, row, grey, values, window)
        if said := verdict(values):
            _on_picture(axes, said, size=7)
        elif numbers:
            _on_picture(axes, "{:.2g} … {:.2g}".format(*limits(window, signed)), size=7, colour="white")


def _montage_cell(
    axes: Axes,
    view: _View,
    row: Row,
    grey: tuple[float, float],
    values: NDArray | None = None,
    window: tuple[float, float] = (0.0, 1.0),
) -> None:
    left, right, bottom, top = view.upright.extent("axial")
    side = max(right - left, top - bottom)
    _frame(axes, view, "axial", side, side)
    _draw_scan(axes, view, "axial", row.scan.array, grey)
    if values is not None:
        _draw_map(axes, view, "axial", values, window, window[0] < 0)
    if row.mark_mm is not None:
        _marks(axes, view, "axial", [row.mark_mm])


def _montage_point(row: Row, upright: Upright) -> NDArray[np.float64]:
    if row.mark_mm is not None:
        return np.asarray(row.mark_mm, dtype=np.float64)
    peaks = (peak_mm(values, row.scan.grid) for _, values, _ in row.maps)
    return next((peak for peak in peaks if peak is not None), upright.centre)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, facecolor="white")


def _three_panels(view: _View) -> tuple[Figure, dict[PlaneName, Axes], Axes]:
    """A figure with three black panels of one scale and one height, side by side, and axes for a colour bar."""
    spans: dict[PlaneName, tuple[float, float]] = {}
    for plane in PLANES:
        left, right, bottom, top = view.upright.extent(plane)
        spans[plane] = right - left, top - bottom
    # At least a third of the width, or a flat volume leaves no room for its letters.
    wide = sum(width for width, _ in spans.values())
    tall = max(wide / 6, *(height for _, height in spans.values()))
    gap, top_margin, bottom_margin, bar_room, edge = 0.08, 0.62, 0.46, 0.95, 0.12  # inches
    scale = min(9.4 / wide, 4.4 / tall)  # inches for a mm
    width = 2 * edge + 2 * gap + bar_room + scale * wide
    height = top_margin + bottom_margin + scale * tall
    figure = _figure(width, height)
    panels: dict[PlaneName, Axes] = {}
    left = edge
    for plane, (across, _) in spans.items():
        box = (left / width, bottom_margin / height, scale * across / width, scale * tall / height)
        panels[plane] = _panel(figure, box)
        _frame(panels[plane], view, plane, across, tall)
        left += scale * across + gap
    box = ((left + 0.06) / width, (bottom_margin + 0.1) / height, 0.15 / width, 0.75 * scale * tall / height)
    bar = _panel(figure, box)
    return figure, panels, bar


def _sheet(rows: int, columns: int) -> tuple[Figure, list[list[Axes]], tuple[float, float]]:
    """A figure with a grid of square black panels, and where its foot begins: (left, top) in inches."""
    cell, gap, label, head, foot, edge = 1.55, 0.05, 1.5, 0.42, 0.62, 0.1
    width = label + columns * (cell + gap) + edge
    height = head + rows * (cell + gap) + foot
    figure = _figure(width, height)

    def box(row: int, column: int) -> tuple[float, float, float, float]:
        left, bottom = label + column * (cell + gap), height - head - (row + 1) * cell - row * gap
        return left / width, bottom / height, cell / width, cell / height

    grid = [[_panel(figure, box(row, column)) for column in range(columns)] for row in range(rows)]
    return figure, grid, (label, foot)


def _panel(figure: Figure, box: tuple[float, float, float, float]) -> Axes:
    axes = figure.add_axes(box, facecolor="black")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _frame(axes: Axes, view: _View, plane: PlaneName, width: float, height: float) -> None:
    """Show ``width`` by ``height`` mm around the middle of a plane, the right way round."""
    left, right, bottom, top = view.upright.extent(plane)
    low, high = (left + right - width) / 2, (left + right + width) / 2
    axes.set_xlim((high, low) if mirrored(view.convention) else (low, high))
    axes.set_ylim((bottom + top - height) / 2, (bottom + top + height) / 2)


def _draw_scan(axes: Axes, view: _View, plane: PlaneName, array: NDArray, window: tuple[float, float]) -> None:
    """The scan's slice in grey.  The data coordinates of ``axes`` are displayed mm."""
    picture = view.upright.picture(array, plane, view.upright.index(plane, view.point))
    place: dict[str, Any] = {"extent": view.upright.extent(plane), "origin": "lower", "aspect": "auto"}
    axes.imshow(picture, cmap="gray", vmin=window[0], vmax=window[1], **place)


def _draw_map(
    axes: Axes, view: _View, plane: PlaneName, values: NDArray, window: tuple[float, float], signed: bool
) -> None:
    """The map's slice in colours, over a scan already drawn."""
    picture = view.upright.picture(values, plane, view.upright.index(plane, view.point))
    low, high = limits(window, signed)
    place: dict[str, Any] = {"extent": view.upright.extent(plane), "origin": "lower", "aspect": "auto"}
    # Interpolated as colours, a faint value beside an empty one would come out darker instead of fainter.
    axes.imshow(picture, cmap=_colormap(signed), vmin=low, vmax=high, interpolation_stage="data", **place)


def _colormap(signed: bool) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    points = [tuple(point) for point in colours(signed)]
    return LinearSegmentedColormap.from_list("volsal signed" if signed else "volsal", points, N=512)


def _outlined(axes: Axes, x: float, y: float, text: str, size: float, colour: str, **place: Any) -> None:
    """Text in axes coordinates that can be read on light and dark tissue alike."""
    from matplotlib.patheffects import withStroke

    stroke = [withStroke(linewidth=2, foreground="black")]
    axes.text(x, y, text, transform=axes.transAxes, fontsize=size, color=colour, path_effects=stroke, zorder=6, **place)


def _letter(
    axes: Axes,
    plane: PlaneName,
    convention: str,
    edges: Sequence[str] = ("left", "right", "top", "bottom"),
    size: float = 11,
) -> None:
    places = {
        "left": (0.02, 0.5, "left", "center"),
        "right": (0.98, 0.5, "right", "center"),
        "top": (0.5, 0.985, "center", "top"),
        "bottom": (0.5, 0.015, "center", "bottom"),
    }
    for edge, letter in letters(plane, convention).items():
        if edge in edges:
            x, y, across, up = places[edge]
            _outlined(axes, x, y, letter, size, "white", ha=across, va=up, weight="bold")


def _on_picture(axes: Axes, text: str, size: float = 9, colour: str = _WARNING, below: float = 0.985) -> None:
    _outlined(axes, 0.02, below, text, size, colour, ha="left", va="top")


def _crosshair(axes: Axes, view: _View, plane: PlaneName) -> None:
    """Two lines through the point of the cut that leave it free, so that they do not hide what they point at."""
    x, y = view.upright.shown(view.point)[[PLANES[plane].across, PLANES[plane].up]]
    left, right, bottom, top = view.upright.extent(plane)
    free = 0.05 * max(right - left, top - bottom)
    lines = [
        ((left, x - free), (y, y)),
        ((x + free, right), (y, y)),
        ((x, x), (bottom, y - free)),
        ((x, x), (y + free, top)),
    ]
    for across, up in lines:
        if across[1] >= across[0] and up[1] >= up[0]:
            axes.plot(across, up, color=_CROSSHAIR, linewidth=0.6, alpha=0.75, scalex=False, scaley=False)


def _marks(axes: Axes, view: _View, plane: PlaneName, marks_mm: Sequence[ArrayLike]) -> None:
    """A ring around each position, dashed where that lies off the plane."""
    from matplotlib.patches import Circle

    shown = PLANES[plane]
    for mark in marks_mm:
        at = view.upright.shown(mark)
        style: Any = "solid" if abs(at[shown.through] - view.cut(plane)) <= _ON_PLANE_MM else (0, (2, 2))
        place = float(at[shown.across]), float(at[shown.up])
        axes.add_patch(Circle(place, _RING_MM, fill=False, edgecolor=_MARK, linewidth=1.3, linestyle=style, zorder=4))


def _plane_caption(view: _View, plane: PlaneName) -> str:
    if view.upright.oblique:  # then no coordinate is constant over the plane
        return f"{plane}, scan's own"
    return f"{plane}, {'xyz'[PLANES[plane].through]} = {view.cut(plane):.1f} mm"


def _scale_bar(axes: Axes, size: float = 8) -> None:
    """A bar of a round number of mm near the lower left corner."""
    left, right = axes.get_xlim()
    width = abs(right - left)
    length = max((mm for mm in (1, 2, 5, 10, 20, 50, 100, 200) if mm <= 0.36 * width), default=0.36 * width)
    start = 0.04
    end, up = start + length / width, 0.04
    axes.plot((start, end), (up, up), transform=axes.transAxes, color="black", linewidth=4, zorder=5)
    axes.plot((start, end), (up, up), transform=axes.transAxes, color="white", linewidth=2, zorder=6)
    _outlined(axes, (start + end) / 2, up + 0.015, f"{length:g} mm", size, "white", ha="center", va="bottom")


def _colour_bar(axes: Axes, window: tuple[float, float], signed: bool, unit: str) -> None:
    """The colours over black, as they look over the scan's background, with the numbers of the window."""
    low, high = window
    ramp = np.linspace(low, high, 256)[:, None]
    extent = (0.0, 1.0, low, high)
    axes.imshow(ramp, cmap=_colormap(signed), extent=extent, origin="lower", aspect="auto", interpolation="bilinear")
    ticks = [low, (low + high) / 2, high]
    axes.yaxis.tick_right()
    axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks], fontsize=9, color=_INK)
    axes.tick_params(length=3, color=_INK)
    if unit:
        axes.set_title("\n".join(wrap(unit, 12)), fontsize=9, color=_INK, loc="left", pad=10, **_AS_IT_STANDS)


def _row_label(axes: Axes, row: Row) -> None:
    label = wrap(row.label, 18)[:4]
    note = wrap(row.note, 24)[:5]
    upright = Upright(row.scan.grid)
    if upright.oblique:
        note = [*note, f"{upright.degrees:.1f}° oblique"]
    place: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "va": "top", **_AS_IT_STANDS}
    axes.text(-0.06, 0.98, "\n".join(label), fontsize=9, weight="bold", color=_INK, **place)
    axes.text(-0.06, 0.96 - 0.1 * len(label), "\n".join(note), fontsize=7, color=_QUIET, **place)


def _foot(
    figure: Figure,
    foot: tuple[float, float],
    rows: Sequence[Row],
    convention: str,
    shared: tuple[float, float] | None,
) -> None:
    """A colour bar for each kind of map in the montage, and what the pictures alone do not tell."""
    left, height = foot
    wide, tall = figure.get_figwidth(), figure.get_figheight()
    for signed in sorted({window[0] < 0 for row in rows for _, _, window in row.maps}):
        bar = _panel(figure, (left / wide, (height - 0.26) / tall, 1.55 / wide, 0.13 / tall))
        bar.imshow(np.linspace(0, 1, 256)[None], cmap=_colormap(signed), aspect="auto", extent=(0, 1, 0, 1))
        ends = [f"{end:.3g}" for end in shared] if shared else ["lowest", "0", "highest"] if signed else ["low", "high"]
        for place, end in zip(np.linspace(0, 1, len(ends)), ends, strict=True):
            side = "left" if place == 0 else "right" if place == 1 else "center"
            bar.text(place, -0.3, end, fontsize=7, color=_INK, ha=side, va="top")
        left += 1.75
    marked = any(row.mark_mm is not None for row in rows)
    notes = (in_words(convention), "ring: the marked place" * marked, "numbers in a cell: its window" * (not shared))
    text = "\n".join(_flow([note for note in notes if note], wide - left - 0.1))
    figure.text(left / wide, (height - 0.11) / tall, text, fontsize=8, color=_QUIET, va="top")
