"""Label maps: whole numbers on voxels, brought onto other voxels by the nearest label."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from volsal.grid import Grid
from volsal.scans.scan import Scan, ScanError, read_scan

# float32, in which scans are read, holds every whole number up to here; labels beyond would run together.
_LARGEST = 2**24
# Label maps are often cut to what they label, so little need be covered; none of it means another patient.
_LEAST_OVERLAP = 0.01


def read_labels(path: str | Path, onto: Grid, of: Scan | None = None) -> NDArray[np.int32]:
    """Read a label map's file, in any orientation and on any grid, onto the voxels of ``onto``.

    Parameters
    ----------
    path : a file that :func:`volsal.scans.read_scan` reads
    onto : where the labels are wanted, such as the model's input
    of : the scan that is labelled, which a message then names; where neither states an orientation, their voxels are
        taken for the same

    Returns
    -------
    (*onto.shape) int32: at each voxel's centre the label of the nearest voxel of the file, 0 outside of it.  A label
    thinner than the voxels of ``onto`` may vanish.

    Raises
    ------
    ScanError
        Where the file cannot be read, holds other than whole numbers, states no orientation while the scan does, or
        does not lie over ``onto``.
    """
    from volsal.resampling import nearest  # brings torch, which reading alone does not need

    labels = read_scan(path)
    whole = np.rint(labels.array)
    if not np.array_equal(whole, labels.array):
        where = tuple(int(i) for i in np.argwhere(whole != labels.array)[0])
        raise ScanError(
            f"{labels}: a label map holds whole numbers; voxel {where} is {labels.array[where]:g} (a map of "
            "probabilities, or one that was interpolated?)"
        )
    if np.abs(whole).max() > _LARGEST:
        raise ScanError(f"{labels}: label {np.abs(whole).max():.0f}; labels beyond {_LARGEST:,} cannot be told apart")
    if labels.form == "none" and not (of is not None and of.form == "none" and of.grid.shape == labels.grid.shape):
        raise ScanError(
            f"{labels}: states no orientation, so its labels cannot be placed; save it with the scan's affine"
        )
    if onto.overlap(labels.grid) < _LEAST_OVERLAP:
        raise ScanError(
            f"{labels}: does not lie over {of or 'the scan'}: it is {labels.grid}, centred at {_middle(labels.grid)}, "
            f"and the model's input is {onto}, centred at {_middle(onto)}; another patient's?"
        )
    return nearest(whole.astype(np.int32), labels.grid, onto)


def _middle(grid: Grid) -> str:
    return "({:.0f}, {:.0f}, {:.0f}) mm".format(*grid.corners.mean(axis=0))
