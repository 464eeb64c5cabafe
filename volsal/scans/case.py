"""A case of several channels: other sequences of one patient in files of their own, or the volumes of one 4D file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from volsal.scans.dicom_frames import is_dicom_file
from volsal.scans.scan import ON_ONE_GRID_MM, Scan, ScanError, read_scan

# Corners apart by less than this, mm, are the same place written with other digits: not worth a word.
_SAME_MM = 1e-3
_MOST_CHANNELS = 64
# A channel that covers less than this of the first one's field of view shows another part of the patient.
_LEAST_OVERLAP = 0.05


def read_case(
    paths: str | Path | Sequence[str | Path],
    volume: int | Literal["all"] | None = None,
    regrid: bool = False,
    **reading: Any,
) -> Scan:
    """Read a case's channels, in the model's order, as one scan.

    Parameters
    ----------
    paths : one file, or one per channel.  The first one's voxels count: maps are written on them
    volume : as in :func:`read_scan`; or "all", for one 4D file whose volumes are the channels
    regrid : bring channels that lie elsewhere to the first one's voxels, in one trilinear step.  Without it they are
        refused; corner voxels up to 0.1 mm apart count as the same
    reading : as in :func:`read_scan`

    Returns
    -------
    The first channel's scan, with the others in ``further`` and what was done to them in ``notes``.

    Raises
    ------
    ScanError
        Where a file cannot be read, or a channel does not lie on the first one's voxels.
    """
    files = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not files:
        raise ScanError("a case has at least one file")
    if len(files) > 1 and all(path.is_file() and is_dicom_file(path) for path in map(Path, files)):
        raise ScanError(
            f"{Path(files[0]).parent}: {len(files)} DICOM files were named, which would make each a channel; name "
            "their folder instead, and --series where it holds several"
        )
    if volume == "all":
        first, *others = _every_volume(files, reading)
    else:
        first, *others = [read_scan(path, volume, **reading) for path in files]
    if not others:
        return first
    placed = [_placed(first, scan, number, regrid) for number, scan in enumerate(others, 2)]
    notes = [*first.notes, *(note for scan in placed for note in scan.notes)]
    return replace(first, further=tuple(placed), notes=tuple(dict.fromkeys(notes)))


def _every_volume(files: Sequence[str | Path], reading: dict[str, Any]) -> list[Scan]:
    if len(files) != 1:
        raise ScanError(f"volume 'all' takes the channels out of one 4D file; {len(files)} files were given")
    first = read_scan(files[0], 0, **reading)
    count = int(first.header["dim"][4]) if first.header is not None and first.header["dim"][0] == 4 else 1
    if count > _MOST_CHANNELS:
        raise ScanError(
            f"{first}: {count} volumes as channels, where volsal takes up to {_MOST_CHANNELS}: a time series?"
        )
    return [first, *(read_scan(files[0], v, **reading) for v in range(1, count))]


def _placed(first: Scan, scan: Scan, number: int, regrid: bool) -> Scan:
    """``scan``, channel ``number`` from 1, on the voxels of ``first``; its notes say whose they are."""
    notes = [f"channel {number}: {note}" for note in scan.notes if note not in first.notes]
    same_shape = scan.grid.shape == first.grid.shape
    apart = scan.grid.distance_mm(first.grid) if same_shape else float("inf")
    if apart > ON_ONE_GRID_MM:
        if not regrid:
            _refuse(first, scan, number, apart)
        return _regridded(first, scan, number, notes)
    if apart > _SAME_MM:
        notes.append(
            f"channel {number}: its corner voxels lie up to {apart:.2g} mm from the first's, and count as the same"
        )
    return replace(scan, grid=first.grid, notes=tuple(notes))


def _refuse(first: Scan, scan: Scan, number: int, apart: float) -> None:
    if apart < float("inf"):
        how = f"its corner voxels lie up to {apart:.3g} mm from those of {first} (allowed: {ON_ONE_GRID_MM:g})"
    else:
        how = f"it is {scan.grid}, and {first} is {first.grid}"
    raise ScanError(
        f"{scan}: channel {number} does not lie on the first channel's voxels: {how}; pass --regrid (regrid: in the "
        "config's scans, regrid= in Python) to bring it there, if both are registered to each other"
    )


def _regridded(first: Scan, scan: Scan, number: int, notes: list[str]) -> Scan:
    if "none" in (first.form, scan.form):
        lost = first if first.form == "none" else scan
        raise ScanError(f"{lost}: states no orientation, so channels cannot be brought to one grid by their headers")
    covered = first.grid.overlap(scan.grid)
    if covered < _LEAST_OVERLAP:
        raise ScanError(
            f"{scan}: channel {number} covers {covered:.0%} of the field of view of {first}: another patient?"
        )
    notes.append(f"channel {number}: brought from {scan.grid} to the first channel's voxels, trilinearly")
    if covered < 0.999:
        notes.append(f"channel {number}: covers {covered:.0%} of the first channel's field of view; the rest became 0")
    from volsal.resampling import resample  # brings torch, which reading alone does not need

    array = resample(scan.array, scan.grid, first.grid)
    return replace(scan, array=array, grid=first.grid, notes=tuple(notes))
