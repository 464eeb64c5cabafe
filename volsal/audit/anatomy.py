"""In what does a map's evidence lie: an organ, the air around the patient, padding, the field's border, a corner?

A region is a mask on the map's grid.  Its share of the evidence says little by itself, for large regions hold much of
any map and a marker of a few voxels little of the truest one; the density, share of evidence over share of volume, is
what compares.

A table, a headrest and burned-in text are told from air by their intensity, and text from things by its one exact
value, which nothing has that was measured; all of this outside the body only, where no implant is taken for text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from volsal.audit.localization import components
from volsal.audit.metric import Figure, MetricError, Part, Undefined, flaw_of, part_of, require_on
from volsal.grid import Grid

if TYPE_CHECKING:
    import SimpleITK as sitk

Modality = Literal["CT", "MR"]

# Tissue from air, HU: fat is at -100, lung fills as a hole.
_AIR_HU = -400.0
# Voxels of a CT below this are air, of which every CT holds some; nothing else is so far below 0.
_SURE_AIR_HU = -700.0
# The body is looked for at about this spacing: finer costs time and finds noise.
_BODY_MM = 2.0
# What is thinner than this, a table's top or a blanket, is no part of the body.
_THIN_MM = 5.0
# Bone that is bridged between scalp and brain.
_BONE_MM = 8.0
# A body outside these shares of the field, or with less than this of all tissue found, or told from the air by less
# than this share of the variance, is not sure; of noise without a body Otsu's threshold explains 2 / pi.
_FIELD_SHARES = (0.02, 0.98)
_LARGEST_SHARE = 0.7
_SEPARATED = 0.7
# A part outside the body of at least so many voxels, of which this share has one exact value, was not measured.
_MARK_VOXELS, _MARK_SHARE = 8, 0.9
# Evidence ends at the field's edge exactly, so rounding must not decide.
_ROUNDING = 1e-9


#: What :func:`beside_body` finds, as regions of an evidence budget.
THINGS, MARKS = "on things outside the body", "on marks of one value outside the body"


@dataclass(frozen=True, eq=False)
class Body:
    """Where the patient is.

    Attributes
    ----------
    mask : (I, J, K) bool; where it is not sure the whole field, so that nothing counts as outside
    sure : whether what was found looks as a body does
    said : how it was found, or why it is not sure
    """

    mask: NDArray[np.bool_]
    sure: bool
    said: str


@dataclass(frozen=True)
class Share:
    """What a region holds of a map.

    Attributes
    ----------
    region : its name
    voxels : how many
    volume : its share of the volume that counts
    evidence : its share of the map's relevance, in [0, 1]; undefined for a map that is empty, constant, or holds NaN
    density : evidence / volume, from 0 up; 1 is chance; undefined also for a region without voxels
    """

    region: str
    voxels: int
    volume: float
    evidence: Figure
    density: Figure


def budget(
    values: NDArray,
    regions: Mapping[str, NDArray[np.bool_]],
    part: Part = "positive",
    within: NDArray[np.bool_] | None = None,
) -> list[Share]:
    """What each region holds of the map's relevance, of which ``part`` says what that is; regions may overlap.

    Parameters
    ----------
    values : (I, J, K)
    regions : (I, J, K) bool each, by name
    within : the voxels that count, such as the model's field; None: all

    Raises
    ------
    MetricError
        For a region of another shape.
    """
    for name, region in regions.items():
        if region.shape != values.shape or region.dtype != bool:
            raise MetricError(f"region {name!r} is {region.dtype} {region.shape}; expected bool {values.shape}")
    relevance, kept = _counted(values, part, within)
    flaw = flaw_of(relevance[kept])
    total, size = float(relevance[kept].sum(dtype=np.float64)), int(np.count_nonzero(kept))
    return [
        _share(name, int(np.count_nonzero(region & kept)), size, flaw or relevance[region & kept].sum() / total)
        for name, region in regions.items()
    ]


def budget_of_labels(
    values: NDArray,
    labels: NDArray[np.integer],
    names: Mapping[int, str] | None = None,
    part: Part = "positive",
    within: NDArray[np.bool_] | None = None,
) -> list[Share]:
    """As :func:`budget` for a label map (I, J, K), one share for each label that is there, 0 included.

    ``names`` of the labels; without one a label is called by its number, and 0 "unlabelled".
    """
    if labels.shape != values.shape or not np.issubdtype(labels.dtype, np.integer):
        raise MetricError(f"the labels are {labels.dtype} {labels.shape}; expected whole numbers {values.shape}")
    relevance, kept = _counted(values, part, within)
    chosen = relevance[kept]
    flaw = flaw_of(chosen)
    found, of = np.unique(labels[kept], return_inverse=True)
    sums, counts = np.bincount(of.ravel(), chosen), np.bincount(of.ravel())
    known = {0: "unlabelled", **(names or {})}
    return [
        _share(known.get(int(label), str(label)), int(count), len(chosen), flaw or float(mass) / float(sums.sum()))
        for label, mass, count in zip(found, sums, counts, strict=True)
    ]


def _counted(values: NDArray, part: Part, within: NDArray[np.bool_] | None) -> tuple[NDArray, NDArray[np.bool_]]:
    return part_of(values, part), np.ones(values.shape, bool) if within is None else within


def _share(name: str, voxels: int, size: int, evidence: Figure) -> Share:
    volume = voxels / size if size else 0.0
    if isinstance(evidence, Undefined):
        return Share(name, voxels, volume, evidence, evidence)
    density: Figure = float(evidence) / volume if voxels else Undefined("the region has no voxel here")
    return Share(name, voxels, volume, float(evidence), density)


# ---- regions of any field of view


def border(grid: Grid, depth_mm: float) -> NDArray[np.bool_]:
    """(I, J, K) voxels whose centre lies within ``depth_mm`` of a face of the field of view."""
    # From one plane of voxels to the next, which is less than the spacing where axes are sheared.
    apart = 1 / np.linalg.norm(np.linalg.inv(grid.affine[:3, :3]), axis=1)
    near = [
        (np.minimum(np.arange(n), np.arange(n)[::-1]) + 0.5) * mm <= depth_mm + _ROUNDING
        for n, mm in zip(grid.shape, apart, strict=True)
    ]
    i, j, k = near
    return i[:, None, None] | j[:, None] | k


def corners(grid: Grid, share: float = 0.2) -> dict[str, NDArray[np.bool_]]:
    """The field's eight corners, boxes of ``share`` of each edge, by what lies there: ``right anterior superior``."""
    words = {"R": "right", "L": "left", "A": "anterior", "P": "posterior", "S": "superior", "I": "inferior"}
    opposite = dict(zip("RLAPSI", "LRPAIS", strict=True))
    codes = grid.orientation
    lengths = [max(1, round(share * n)) for n in grid.shape]
    found = {}
    for ends in product((False, True), repeat=3):
        box = np.zeros(grid.shape, bool)
        box[tuple(slice(-n, None) if end else slice(n) for end, n in zip(ends, lengths, strict=True))] = True
        at = [code if end else opposite[code] for end, code in zip(ends, codes, strict=True)]
        found[" ".join(words[code] for pair in ("RL", "AP", "SI") for code in at if code in pair)] = box
    return found


def outside_of(grid: Grid, field: Grid) -> NDArray[np.bool_]:
    """(I, J, K) voxels of ``grid`` whose centre lies outside the field of view of ``field``, such as the model's."""
    composed = grid.to(field)
    lines = np.ix_(*(np.arange(n) for n in grid.shape))
    outside = np.zeros(grid.shape, bool)
    for row, n in zip(composed, field.shape, strict=False):
        at = sum(step * line for step, line in zip(row, lines, strict=False)) + row[3]
        outside |= (at < -0.5 - _ROUNDING) | (at > n - 0.5 + _ROUNDING)
    return outside


def padding_of(array: NDArray) -> NDArray[np.bool_]:
    """(I, J, K) voxels of the one value that is commonest on the field's faces, connected to these by faces.

    Padding, what a scanner does not reconstruct, and backgrounds that were set to one value.  None where that value
    makes up less than 1 % of the faces: noise then happens to agree.
    """
    import SimpleITK as sitk

    shell = np.zeros(array.shape, bool)
    for axis in range(3):
        for end in (0, -1):
            shell[tuple(end if other == axis else slice(None) for other in range(3))] = True
    found, counts = np.unique(array[shell], return_counts=True)
    same = array == found[counts.argmax()]
    if counts.max() < max(2, 0.01 * counts.sum()):
        return np.zeros(array.shape, bool)
    parts = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray(same.astype(np.uint8)), False))
    outer = np.unique(parts[shell & same])
    return np.isin(parts, outer[outer > 0])


# ---- the body


def body_mask(array: NDArray, grid: Grid, modality: Modality | None = None) -> Body:
    """Where the patient is in a scan (I, J, K), from its intensities alone.

    CT: above -400 HU.  MR, and anything else: above Otsu's threshold (IEEE SMC 1979) of the square root of intensity,
    which noise spreads alike everywhere.  Of that the largest connected part without what is thinner than 5 mm, its
    holes filled; lungs that the field cuts off below or above count as holes.  Computed at about 2 mm.

    Parameters
    ----------
    modality : None: CT where more than 1 % of voxels lie below -700, and else MR
    """
    require_on(grid, scan=array)
    if not np.isfinite(array).all():
        return _unsure(array, "the scan holds NaN or infinity")
    coarse = array[_steps(grid)].astype(np.float32)
    steps = [of.step for of in _steps(grid)]
    spacing = grid.spacing * steps
    modality = modality or _modality(coarse)
    level, separated, how = _level(coarse, modality)
    tissue = coarse > level
    if not tissue.any() or tissue.all():
        return _unsure(array, f"{how} there is {'everything' if tissue.any() else 'nothing'}")
    # In MR bone is dark, and would part the scalp, which is thin, from the brain.
    solid = _without_thin(_closed(tissue, spacing) if modality == "MR" else tissue, spacing)
    if not solid.any():
        return _unsure(array, f"{how} there is nothing thicker than {_THIN_MM:g} mm")
    found = components(solid) == 1
    body = _filled(found, _head_axis(grid))
    at = np.ix_(
        *(np.minimum((np.arange(n) + step // 2) // step, m - 1)
          for n, step, m in zip(array.shape, steps, body.shape, strict=True))
    )  # fmt: skip
    doubts = _doubts(separated, float(body.mean()), np.count_nonzero(tissue & body) / np.count_nonzero(tissue))
    if doubts:
        return _unsure(array, f"the largest part {how} does not look like a body: {', '.join(doubts)}")
    return Body(body[at], True, f"the largest part {how}")


def _unsure(array: NDArray, reason: str) -> Body:
    return Body(np.ones(array.shape, bool), False, f"the whole field, since {reason}")


def beside_body(array: NDArray, grid: Grid, body: Body, modality: Modality | None = None) -> dict[str, NDArray]:
    """What is no air outside the body of a scan (I, J, K), and which of it was drawn: regions by name, (I, J, K) bool.

    :data:`THINGS`: above the level that tells tissue from air (see :func:`body_mask`): a table, a headrest, tubes,
    text, ghosts.  Skin that the body's mask leaves out counts too, so that a margin about the body is to be taken off.
    :data:`MARKS`: those connected parts of them, of 8 voxels or more, of which nine tenths have one exact value: text
    and marks that were drawn into the image, or something so bright that all of it is cut off at one value.

    Nothing where the body is not sure.
    """
    require_on(grid, scan=array, body=body.mask)
    nothing = np.zeros(array.shape, bool)
    if not body.sure:
        return {THINGS: nothing, MARKS: nothing}
    coarse = array[_steps(grid)].astype(np.float32)
    things = (array > _level(coarse, modality or _modality(coarse))[0]) & ~body.mask
    return {THINGS: things, MARKS: _of_one_value(array, things)}


def _of_one_value(array: NDArray, things: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The connected parts that have nearly one value."""
    if not things.any():
        return things
    parts = components(things)
    part, value = parts[things], array[things]
    order = np.lexsort((value, part))
    part, value = part[order], value[order]
    starts = np.flatnonzero(np.concatenate([[True], (part[1:] != part[:-1]) | (value[1:] != value[:-1])]))
    runs = np.diff(np.append(starts, len(part)))
    longest = np.zeros(int(parts.max()) + 1, np.int64)
    np.maximum.at(longest, part[starts], runs)
    sizes = np.bincount(part, minlength=len(longest))
    marks = (sizes >= _MARK_VOXELS) & (longest >= _MARK_SHARE * sizes)
    return np.asarray(marks[parts])


def _steps(grid: Grid) -> tuple[slice, ...]:
    """Every so many voxels along each axis, for about 2 mm."""
    return tuple(slice(None, None, max(1, int(_BODY_MM / mm + _ROUNDING))) for mm in grid.spacing)


def _modality(coarse: NDArray[np.float32]) -> Modality:
    return "CT" if float((coarse < _SURE_AIR_HU).mean()) > 0.01 else "MR"


def _level(array: NDArray[np.float32], modality: Modality) -> tuple[float, float, str]:
    """Above what is no air, how well that is told from air (a share of the variance), and how."""
    if modality == "CT":
        return _AIR_HU, 1.0, f"above {_AIR_HU:g} HU"
    level, separated = _otsu(array)
    return level, separated, f"above {level:.4g}, Otsu's threshold"


def _doubts(separated: float, share: float, kept: float) -> list[str]:
    doubts = []
    if separated < _SEPARATED:
        doubts.append("tissue and air differ little in intensity")
    if not _FIELD_SHARES[0] < share < _FIELD_SHARES[1]:
        doubts.append(f"it takes {share:.1%} of the field")
    if kept < _LARGEST_SHARE:
        doubts.append(f"it holds {kept:.0%} of all that is")
    return doubts


def _otsu(array: NDArray[np.float32]) -> tuple[float, float]:
    """Otsu's threshold of the square root, in the array's unit, and the share of the variance it explains.

    Intensities count from the least, and above their 99.5th percentile are one.
    """
    low, high = float(array.min()), float(np.percentile(array, 99.5))
    if not high > low:
        return low, 0.0
    counts, edges = np.histogram(np.sqrt((array.clip(low, high) - low) / (high - low)), bins=256, range=(0, 1))
    share = counts / counts.sum()
    middle = (edges[1:] + edges[:-1]) / 2
    below, mean = np.cumsum(share), np.cumsum(share * middle)
    between = np.divide(
        (mean[-1] * below - mean) ** 2, below * (1 - below), out=np.zeros(256), where=(below > 0) & (below < 1 - 1e-12)
    )
    best = int(between.argmax())
    variance = float((share * (middle - mean[-1]) ** 2).sum())
    return low + float(edges[best + 1]) ** 2 * (high - low), float(between[best]) / variance


def _head_axis(grid: Grid) -> int:
    """The array axis that runs along the patient's length most nearly."""
    return next(axis for axis, code in enumerate(grid.orientation) if code in "SI")


def _without_thin(mask: NDArray[np.bool_], spacing: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Opening; the field's edge counts as tissue."""
    import SimpleITK as sitk

    radius = _radius(_THIN_MM / 2, spacing)
    return _array(sitk.BinaryDilate(sitk.BinaryErode(_image(mask), radius), radius)) & mask


def _closed(mask: NDArray[np.bool_], spacing: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Closing; beyond the field's edge there is nothing."""
    import SimpleITK as sitk

    radius = _radius(_BONE_MM / 2, spacing)
    return _array(sitk.BinaryMorphologicalClosing(_image(mask), radius)) | mask


def _filled(mask: NDArray[np.bool_], axis: int) -> NDArray[np.bool_]:
    """Without holes, also those that are open only at the two ends of ``axis``."""
    import SimpleITK as sitk

    ends = [(1, 1) if one == axis else (0, 0) for one in range(3)]
    closed = _array(sitk.BinaryFillhole(_image(np.pad(mask, ends, constant_values=True))))
    return closed[tuple(slice(1, -1) if one == axis else slice(None) for one in range(3))]


def _radius(mm: float, spacing: NDArray[np.float64]) -> list[int]:
    """In voxels, in SimpleITK's order of axes."""
    return [int(mm / along + _ROUNDING) for along in spacing[::-1]]


def _image(mask: NDArray[np.bool_]) -> sitk.Image:
    import SimpleITK as sitk

    return sitk.GetImageFromArray(mask.astype(np.uint8))


def _array(image: sitk.Image) -> NDArray[np.bool_]:
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(image).astype(bool)
