"""napari's reader and writer: scans, maps, cases and runs in; maps out, on the scan's own voxels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volsal.display import Upright
from volsal.run_folder import CASE_FILE, RUN_FILE, RunFolder
from volsal.scans.dicom import sniff as sniff_dicom
from volsal.scans.write import map_header, write_map
from volsal.viewer.layers import LayerData, as_stored
from volsal.viewer.opening import Opened, ViewerError, open_path
from volsal.viewer.show import face, faced, orient

Reader = Callable[[str | Sequence[str]], list[LayerData]]


def get_reader(path: str | Sequence[str]) -> Reader | None:
    """The reader, for what volsal reads; None for a folder that is neither a run, nor a case, nor a DICOM series."""
    first = Path(path if isinstance(path, str) else path[0])
    if first.is_dir() and not any((first / name).is_file() for name in (RUN_FILE, CASE_FILE)):
        return read if sniff_dicom(first) else None
    return read


def read(path: str | Sequence[str]) -> list[LayerData]:
    """The layers of a scan or map file, a DICOM folder, a case, or the first whole case of a run.

    A viewer in which nothing was turned yet is turned so that the scan is upright, as radiologists expect it.

    Raises
    ------
    VolsalError
        Where there is nothing to show; napari tells it.
    """
    paths = [Path(path)] if isinstance(path, str) else [Path(one) for one in path]
    layers = []
    for one in paths:
        opened = _open(one)
        for said in (*map(str, opened.faults), *opened.notes, Upright(opened.scan.grid).note):
            if said:
                _tell(said)
        layers += [_named(layer, one) for layer in opened.layers()]
    turn_upright()
    return layers


def _open(path: Path) -> Opened:
    if not (path / RUN_FILE).is_file():
        opened = open_path(path)
    else:
        run = RunFolder(path)
        whole = [case for case in run.cases() if run.state(case) == "done"]
        if not whole:
            raise ViewerError(f"{path}: no case of this run has a result yet")
        opened = open_path(path / whole[0])
        _tell(f"{whole[0]} of {len(whole)} cases; the Audit browser (Plugins > volsal) goes through all of them")
    if opened.faults and not opened.has_scan and not opened.maps:
        raise opened.faults[0]
    return opened


def _named(layer: LayerData, path: Path) -> LayerData:
    """A scan's layer goes by its file's name, since several may be open."""
    data, arguments, kind = layer
    if arguments["metadata"]["kind"] != "scan":
        return layer
    return data, arguments | {"name": (arguments["metadata"]["scan"].path or path).name}, kind


def turn_upright() -> None:
    """Turn the current viewer, where there is one and nobody has turned it, so that a scan is upright."""
    import napari

    viewer = napari.current_viewer()
    if viewer is not None:
        orient(viewer)
        if faced(viewer) is None:
            face(viewer, "radiological")


def _tell(words: str) -> None:
    from napari.utils.notifications import show_info

    show_info(words)


def write_layer(path: str, data: Any, meta: Mapping[str, Any]) -> list[str]:
    """Write a map's layer as NIfTI on its scan's voxels, in the file's own order and with its geometry.

    Raises
    ------
    ViewerError
        For a layer that is no map of volsal's, or is no longer on its scan's voxels.
    WriteError
        Where the disk refuses.
    """
    about = meta.get("metadata", {})
    name, scan = meta.get("name", "layer"), about.get("scan")
    if about.get("kind") != "map" or scan is None:
        raise ViewerError(
            f"{name}: only a map that volsal made or read knows its scan's voxels; save other layers with napari's own "
            "writers"
        )
    try:
        values = as_stored(np.asarray(data), scan.grid)
    except ValueError as error:
        raise ViewerError(f"{name}: {error}; it can no longer be laid on the scan's voxels") from error
    plain = name.replace(" · ", " ").encode("ascii", "replace").decode()  # all that NIfTI's header can hold
    header = map_header(scan, plain, f"volsal {plain}: {about['unit']}", about["window"])
    write_map(Path(path), _plain(values), header)
    return [path]


def _plain(values: NDArray) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise ViewerError("the map holds NaN or infinity, which no map's file may")
    return values.astype(np.float32, copy=False)
