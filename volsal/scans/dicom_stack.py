"""From the placed frames of a DICOM series to one grid, or to the sentence that says why there is none.

Geometry comes from ImagePositionPatient, ImageOrientationPatient and PixelSpacing alone: slice numbers, slice thickness
and SpacingBetweenSlices are never believed.  Slices that are missing at an *end* of the stack leave no trace in the
rest, so no reader can notice them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from volsal.grid import Grid, lps_to_ras
from volsal.scans.dicom_frames import Frame, Refused

# How far a slice may lie from its place: rounding in headers.  Never more than a fifth of a slice.
_TOLERANCE_MM, _TOLERANCE_SHARE, _TOLERANCE_MOST = 0.05, 0.01, 0.2
_SPACING_MM = (1e-3, 100.0)
_RESAMPLE = 'or accept interpolated slices with --slices resample (slices: resample in the config, slices="resample")'


@dataclass(frozen=True)
class Stack:
    """Frames in order along their normal, and where they lie.

    Attributes
    ----------
    frames : from the first to the last slice
    grid : (columns, rows, slices) voxels, RAS+ mm
    at : each output slice as a position among the frames (0, 1, 1.5, ...); None where slices are taken as they are
    notes : what a reader of the result should know
    """

    frames: tuple[Frame, ...]
    grid: Grid
    at: NDArray[np.float64] | None
    notes: tuple[str, ...]


def arrange(frames: Sequence[Frame], resample: bool = False) -> Stack:
    """Put frames in order and on a grid.

    Parameters
    ----------
    resample : let slices lie unevenly, and interpolate between them onto even ones

    Raises
    ------
    Refused
        Where the headers place the slices nowhere, twice, or not on an even stack.
    """
    _require_placed(frames)
    row, column = _axes(frames)
    normal = np.cross(row, column)
    positions = np.array([frame.position for frame in frames], dtype=float)
    order = np.argsort(positions @ normal, kind="stable")
    ordered, positions = tuple(frames[i] for i in order), positions[order]
    along = positions @ normal
    _require_distinct(ordered, along, positions, normal)
    step, most = float(np.median(np.diff(along))), float(along[-1] - along[0])
    within = min(max(_TOLERANCE_MM, _TOLERANCE_SHARE * step), _TOLERANCE_MOST * step)
    line, beside = _line(ordered, along, positions, normal, within)
    notes: list[str] = []
    if np.linalg.norm(line - normal) * most <= within:
        line = normal  # rounding, not a tilt
    else:
        notes.append(_tilt(line))
    first, step, count = _even(along)
    at = None
    if np.abs(first + step * np.arange(len(along)) - along).max() > within:
        if not resample:
            raise Refused(_uneven(along, positions, normal, within))
        first, step, count = float(along[0]), most / max(1, round(most / _lower_median(along))), 0
        count = round(most / step) + 1
        at = np.interp(first + step * np.arange(count), along, np.arange(len(along)))
        notes.append(_resampled(along, step, count))
    return Stack(ordered, _grid(ordered[0], row, column, beside + line * first, line * step, count), at, tuple(notes))


def _require_placed(frames: Sequence[Frame]) -> None:
    for name, what in (
        ("position", "ImagePositionPatient"),
        ("orientation", "ImageOrientationPatient"),
        ("spacing", "PixelSpacing"),
    ):
        without = [frame for frame in frames if getattr(frame, name) is None]
        if without:
            raise Refused(_missing_tag(without, len(frames), what))
    if len(frames) < 2:
        raise Refused("a single slice is no volume; give the folder that holds the whole series")
    low, high = _SPACING_MM
    if not all(low <= mm <= high for mm in frames[0].spacing or ()):
        raise Refused(f"PixelSpacing {frames[0].spacing} is not between {low:g} and {high:g} mm")


def _missing_tag(without: Sequence[Frame], total: int, what: str) -> str:
    who = "every slice" if len(without) == total else f"{len(without)} of {total} slices, the first {without[0].label},"
    verb = "lacks" if len(without) == 1 or len(without) == total else "lack"
    return f"{who} {verb} {what}, so its place is unknown; export the series again with its geometry"


def _axes(frames: Sequence[Frame]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit vectors along a row (to the next column) and along a column (to the next row), LPS."""
    mean = np.array([frame.orientation for frame in frames], dtype=float).mean(axis=0)
    row, column = mean[:3], mean[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if max(abs(length - 1) for length in lengths) > 5e-3 or abs(row @ column) > 5e-3:
        raise Refused("ImageOrientationPatient does not hold two perpendicular unit vectors")
    row = row / lengths[0]
    column = column - (column @ row) * row
    return row, column / np.linalg.norm(column)


def _require_distinct(
    frames: Sequence[Frame], along: NDArray[np.float64], positions: NDArray[np.float64], normal: NDArray[np.float64]
) -> None:
    steps = np.diff(along)
    apart = steps[steps > 1e-3]
    least = min(0.01, 0.05 * float(np.median(apart))) if len(apart) else 0.01
    same = np.flatnonzero(steps < least)
    if not len(same):
        return
    k = int(same[0])
    places = 1 + int((steps >= least).sum())
    raise Refused(
        f"{len(frames)} slices at {places} positions: {len(same)} lie at the same position as another, the first at "
        f"{_where(positions[k], normal)} ({frames[k].label} and {frames[k + 1].label}), and no tag tells two volumes "
        "apart; take out the duplicate or second time point"
    )


def _line(
    frames: Sequence[Frame],
    along: NDArray[np.float64],
    positions: NDArray[np.float64],
    normal: NDArray[np.float64],
    within: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The line on which the slices' corners lie: its direction per mm along the normal, and its foot at 0 mm."""
    beside = positions - along[:, None] * normal
    centred = along - along.mean()
    lean = centred @ (beside - beside.mean(axis=0)) / (centred @ centred)
    foot = beside.mean(axis=0) - along.mean() * lean
    off = np.linalg.norm(beside - foot - along[:, None] * lean, axis=1)
    if off.max() > within:
        k = int(off.argmax())
        raise Refused(
            f"slice {k + 1} of {len(along)} ({frames[k].label}, at {_where(positions[k], normal)}) lies "
            f"{off[k]:.3g} mm beside the line through the others (allowed: {within:.3g}): the slices are no straight "
            "stack; is one of another series among them?"
        )
    if np.linalg.norm(lean) * (along[-1] - along[0]) <= within:
        foot = beside.mean(axis=0)
    return normal + lean, foot


def _tilt(line: NDArray[np.float64]) -> str:
    degrees = np.degrees(np.arccos(np.clip(1 / np.linalg.norm(line), -1, 1)))
    return (
        f"gantry tilt of {degrees:.1f} degrees: the scan's voxel grid is sheared, and so are the maps, whose place "
        "stands in the sform alone; SimpleITK refuses such a file, nibabel and napari place it right"
    )


def _even(along: NDArray[np.float64]) -> tuple[float, float, int]:
    """(first, step, count) of the even positions nearest to ``along``, least squares."""
    number = np.arange(len(along)) - (len(along) - 1) / 2
    step = float(number @ along / (number @ number))
    return float(along.mean() + step * number[0]), step, len(along)


def _lower_median(along: NDArray[np.float64]) -> float:
    """A distance that does occur, and of two middle ones the smaller."""
    steps = np.sort(np.diff(along))
    return float(steps[(len(steps) - 1) // 2])


def _uneven(
    along: NDArray[np.float64], positions: NDArray[np.float64], normal: NDArray[np.float64], within: float
) -> str:
    steps = np.diff(along)
    step = _lower_median(along)
    times = np.maximum(1, np.rint(steps / step)).astype(int)
    if (times > 1).any() and (np.abs(steps - times * step) <= within * times).all():
        return _missing(times, positions, normal)
    low, high = int(steps.argmin()), int(steps.argmax())
    return (
        f"the distance between slices is not uniform: {steps[low]:.4g} mm at {_where(positions[low], normal)}, "
        f"{steps[high]:.4g} mm at {_where(positions[high], normal)} (allowed to differ: {within:.2g} mm); fetch the "
        f"whole series, {_RESAMPLE}"
    )


def _missing(times: NDArray, positions: NDArray[np.float64], normal: NDArray[np.float64]) -> str:
    gap = int(np.flatnonzero(times > 1)[0])
    total, lost = int(times.sum()) + 1, int((times - 1).sum())
    number = int(times[:gap].sum()) + 2
    which = f"slice {number}" if times[gap] == 2 else f"slices {number} to {number + int(times[gap]) - 2}"
    more = f", and {lost - int(times[gap]) + 1} further on" if lost > times[gap] - 1 else ""
    axis, (low, high) = _axis(normal), sorted(_coordinate(positions[k], normal) for k in (gap, gap + 1))
    return (
        f"{which} of {total} missing between {axis} = {low:.2f} and {high:.2f} mm{more}; fetch the whole series, "
        f"{_RESAMPLE}"
    )


def _resampled(along: NDArray[np.float64], step: float, count: int) -> str:
    steps = np.diff(along)
    return (
        f"the {len(along)} slices lie unevenly, {steps.min():.4g} to {steps.max():.4g} mm apart: interpolated, as "
        f"asked, onto {count} slices {step:.4g} mm apart; between distant slices the values are invented"
    )


def _axis(normal: NDArray[np.float64]) -> str:
    return "xyz"[int(np.abs(normal).argmax())]


def _coordinate(position: NDArray[np.float64], normal: NDArray[np.float64]) -> float:
    return float((lps_to_ras(np.eye(4))[:3, :3] @ position)[int(np.abs(normal).argmax())])


def _where(position: NDArray[np.float64], normal: NDArray[np.float64]) -> str:
    return f"{_axis(normal)} = {_coordinate(position, normal):.2f} mm"


def _grid(
    frame: Frame,
    row: NDArray[np.float64],
    column: NDArray[np.float64],
    origin: NDArray[np.float64],
    step: NDArray[np.float64],
    count: int,
) -> Grid:
    between_rows, between_columns = frame.spacing or (0.0, 0.0)
    affine = np.eye(4)
    # i counts columns, so it runs along a row, by the distance between columns; j the other way round.
    for axis, vector in enumerate((row * between_columns, column * between_rows, step, origin)):
        affine[:3, axis] = vector
    return Grid((frame.source.columns, frame.source.rows, count), lps_to_ras(affine))
