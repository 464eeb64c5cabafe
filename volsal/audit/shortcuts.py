"""Does the model answer by what is no patient: the air, padding, a corner of the field, its border?

A map is asked where to look, and an intervention whether it matters: a ball is taken out at the map's highest place in
a region where no evidence should be.  How much of a map lies there says little: a marker of a few voxels may be all
that the model looks at.  What is no such place is exchanged between scans: :mod:`volsal.audit.exchange`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from volsal.audit.anatomy import border, corners
from volsal.audit.subject import Subject
from volsal.config import AuditSection

OUTSIDE, PADDING, BORDER, CORNER = "outside the body", "in padding", "at the field's border", "in a corner of the field"
REGIONS = (OUTSIDE, PADDING, CORNER, BORDER)


def regions_of(subject: Subject, settings: AuditSection) -> dict[str, NDArray[np.bool_]]:
    """(I, J, K) bool each: the regions in which a ball is tried, by name; none of them holds any of the body.

    Where the body is not sure, only padding is known to be none of it.
    """
    grid = subject.grid
    if not subject.body.sure:
        return {PADDING: subject.padding}
    beyond = ~grown(subject.body.mask, subject, settings.body_margin_mm)
    return {
        OUTSIDE: beyond,
        PADDING: subject.padding & beyond,
        CORNER: np.any(list(corners(grid).values()), axis=0) & beyond,
        BORDER: border(grid, settings.border_mm) & beyond,
    }


def grown(mask: NDArray[np.bool_], subject: Subject, mm: float) -> NDArray[np.bool_]:
    """A mask with everything within ``mm`` of it."""
    import SimpleITK as sitk

    radius = [int(mm / along) for along in subject.grid.spacing[::-1]]
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    return sitk.GetArrayFromImage(sitk.BinaryDilate(image, radius)).astype(bool)


def where_of(subject: Subject, voxel: NDArray[np.int64], regions: Mapping[str, NDArray[np.bool_]]) -> str:
    """A place in words: what of ``regions`` it lies in, and on which side of the field."""
    told = [name for name, region in regions.items() if region[tuple(voxel)]]
    return ", ".join([*told, side_of(subject, voxel)])


def side_of(subject: Subject, voxel: NDArray[np.int64]) -> str:
    """``right anterior superior``: on which side of the field's middle, leaving out axes along which it is near."""
    grid = subject.grid
    away = grid.world(voxel) - grid.world((np.array(grid.shape) - 1) / 2)
    half = np.ptp(grid.corners, axis=0) / 2
    pairs = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))
    words = [pair[int(mm > 0)] for pair, mm, size in zip(pairs, away, half, strict=True) if abs(mm) > 0.2 * size]
    return " ".join(words) or "central"
