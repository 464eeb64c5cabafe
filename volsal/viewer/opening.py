"""What is to be looked at, read from the disk: a case folder that volsal wrote, or a scan with maps over it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volsal.display import verdict
from volsal.errors import VolsalError
from volsal.grid import Grid, GridError
from volsal.run_folder import CASE_FILE, RunFolder
from volsal.scans import Scan, read_scan
from volsal.scans.dicom import sniff as sniff_dicom
from volsal.scans.labels import read_labels
from volsal.viewer.layers import LayerData, map_layer, mask_layer, scan_layer

# Maps are written with the scan's geometry to the bit; a hundredth of a millimetre is room for other tools' rounding.
_SAME_GRID_MM = 0.01


class ViewerError(VolsalError, RuntimeError):
    """The viewer cannot be opened, or what it was given cannot be shown together."""


@dataclass(frozen=True, eq=False)
class ShownMap:
    """A map to lay over a scan.

    Attributes
    ----------
    name : what the layer list calls it
    values : (I, J, K) on the scan's voxels
    window : the values at the two ends of the colour map
    unit : of the values
    signed : whether values below zero mean evidence against
    """

    name: str
    values: NDArray
    window: tuple[float, float]
    unit: str = ""
    signed: bool = False


@dataclass(frozen=True, eq=False)
class Opened:
    """What there is to see of a case.

    Attributes
    ----------
    scan : the scan; one without voxels where it could not be read
    has_scan : whether it has them
    maps : on the scan's voxels, in the order of the record
    masks : by name, labels (I, J, K) on the scan's voxels
    peak_mm : scanner position of the first map's peak; None where no map has one
    faults : why something is not there to be seen
    notes : what else to know, in words
    """

    scan: Scan
    has_scan: bool = True
    maps: tuple[ShownMap, ...] = ()
    masks: Mapping[str, NDArray[np.int32]] = field(default_factory=dict)
    peak_mm: tuple[float, float, float] | None = None
    faults: tuple[VolsalError, ...] = ()
    notes: tuple[str, ...] = ()

    def layers(self) -> list[LayerData]:
        """The scan, masks and maps as layers, from the bottom to the top.

        Of the maps the first that has evidence to show is visible, and no other.
        """
        found = [scan_layer(self.scan)] if self.has_scan else []
        maps = sorted(self.maps, key=lambda shown: bool(verdict(shown.values)))
        for shown in reversed(maps):
            data, arguments, kind = map_layer(
                shown.values, self.scan.grid, shown.name, shown.window, shown.unit, shown.signed, self.scan
            )
            found.append((data, arguments | {"visible": shown is maps[0]}, kind))
        return found + [mask_layer(labels, self.scan.grid, name) for name, labels in self.masks.items()]


def open_files(path: Path, maps: Sequence[Path] = ()) -> Opened:
    """A scan file, or a DICOM folder, with map files over it; or a map of volsal's alone.

    Raises
    ------
    ScanError
        Where a file cannot be read.
    ViewerError
        Where a map does not lie on the scan's voxels.
    """
    scan = read_scan(path)
    if not maps and _own_words(scan):
        return Opened(scan, has_scan=False, maps=(_by_header(scan, path),))
    return Opened(scan, maps=tuple(_bare_map(scan, Path(file)) for file in maps))


def open_folder(folder: Path, names: Sequence[str] | None = None, maps: Sequence[Path] = ()) -> Opened:
    """A case folder: the scan where it still lies where the record says, its maps, and its masks if the run has some.

    Parameters
    ----------
    names : of the record's maps, by :func:`map_name`; None: all
    maps : map files to take instead of the record's

    Raises
    ------
    ViewerError
        Where there is no record, or not one of volsal's.
    """
    record = _load_json(folder / CASE_FILE)
    try:
        return _of_record(folder, record, names, maps)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # Errors of volsal's own are addressed to the reader already, and some of them are ValueErrors.
        if isinstance(error, VolsalError):
            raise
        raise ViewerError(
            f"{folder / CASE_FILE}: not as volsal writes it ({type(error).__name__}: {error}); "
            "run the case again, or name the scan and the map files"
        ) from error


def map_name(entry: Mapping[str, Any]) -> str:
    """What a recorded map is called in lists: its method's name and its target."""
    return " · ".join(part for part in (entry.get("name", entry["method"]), entry["target"]) if part)


def _of_record(folder: Path, record: Mapping[str, Any], names: Sequence[str] | None, maps: Sequence[Path]) -> Opened:
    faults: list[VolsalError] = []

    def attempt(read: Callable[..., Any], *args: Any) -> list[Any]:
        try:
            return [read(*args)]
        except VolsalError as error:
            faults.append(error)
            return []

    said = record["scan"]
    found = attempt(_recorded_scan, folder, said)
    if not found and not {"shape", "affine"} <= said.keys():
        raise faults[0]
    grid = Grid(said["shape"], said["affine"]) if not found else found[0].grid
    scan = found[0] if found else Scan(np.broadcast_to(np.float32(0), grid.shape), grid)
    notes = []
    if found and said.get("sha256") not in (None, scan.sha256):
        notes.append("the scan's file has changed since the maps were made")
    entries = [entry for entry in record["maps"] if names is None or map_name(entry) in names]
    if maps:
        shown = [one for file in maps for one in attempt(_bare_map, scan, Path(file))]
    else:
        shown = [one for entry in entries for one in attempt(_recorded_map, scan, folder, entry)]
    peak = None if maps else next((entry["peak_mm"] for entry in entries if entry["peak_mm"] is not None), None)
    known = RunFolder(folder.parent).inputs().get(folder.name, {}).get("masks") or {}
    masks = {name: one for name, path in known.items() for one in attempt(read_labels, path, grid, scan)}
    return Opened(scan, bool(found), tuple(shown), masks, peak, tuple(faults), tuple(notes))


def _load_json(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ViewerError(
            f"{path.parent}: no {CASE_FILE} in this folder; give a case folder that volsal wrote, or a scan file"
        ) from None
    except (OSError, ValueError) as error:
        raise ViewerError(f"{path}: cannot be read as JSON ({error})") from error


def _recorded_scan(folder: Path, said: Mapping[str, Any]) -> Scan:
    if said["path"] is None:
        raise ViewerError(f"{folder}: its scan was never in a file; name the scan and the map files")
    places = [Path(said["path"])] if Path(said["path"]).is_absolute() else [folder / said["path"], Path(said["path"])]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise ViewerError(f"{folder}: its scan {said['path']} is not there any more; name the scan and the map files")
    form = said["form"] if said["form"] in ("sform", "qform") else None
    choices: dict[str, Any] = {name: said.get(name) for name in ("nan", "slices")}
    choices["series"] = RunFolder(folder.parent).series_of(path, said.get("series"))
    return read_scan(path, volume=said["volume"], form=form, **choices)


def _recorded_map(scan: Scan, folder: Path, entry: Mapping[str, Any]) -> ShownMap:
    low, high = entry["window"]
    values = _on_grid(scan, folder / entry["file"]).array
    return ShownMap(map_name(entry), values, (float(low), float(high)), entry["unit"], bool(entry["signed"]))


def _bare_map(scan: Scan, file: Path) -> ShownMap:
    return _by_header(_on_grid(scan, file), file)


def _by_header(overlay: Scan, file: Path) -> ShownMap:
    """A map of which only the file is known: its header says how to show it."""
    low, high = 0.0, 0.0
    if overlay.header is not None and "cal_max" in overlay.header:
        low, high = (float(overlay.header[name]) for name in ("cal_min", "cal_max"))
    if not low < high:
        low, high = 0.0, float(overlay.array.max())
    own = _own_words(overlay)
    signed = low < 0 or (bool(own) and float(overlay.array.min()) < 0)
    return ShownMap(_stem(file), overlay.array, (low, high), own.rpartition(": ")[2], signed)


def _own_words(scan: Scan) -> str:
    """The description of a map that volsal wrote, which ends with its unit; empty for any other file."""
    if scan.header is None or "descrip" not in scan.header:
        return ""
    words = scan.header["descrip"].item().decode("latin-1").rstrip("\0")
    return words if words.startswith("volsal ") else ""


def _on_grid(scan: Scan, file: Path) -> Scan:
    """The map in ``file``, which must lie on the scan's voxels."""
    overlay = read_scan(file)
    try:
        scan.grid.require_same(overlay.grid, within_mm=_SAME_GRID_MM)
    except GridError as error:
        raise ViewerError(f"{file}: does not lie on the voxels of {scan}: {error}") from error
    return overlay


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".nii")


def open_path(path: Path, maps: Sequence[Path] = ()) -> Opened:
    """A case folder or its ``case.json``, a scan file, or a DICOM folder; ``maps`` to lay over it.

    Errors are those of :func:`open_folder` and :func:`open_files`.
    """
    if path.name == CASE_FILE and path.is_file():
        path = path.parent
    is_case = path.is_dir() and ((path / CASE_FILE).exists() or not sniff_dicom(path))
    return open_folder(path, maps=maps) if is_case else open_files(path, maps)
