"""MONAI's spatial steps, composed: the scan is sampled once, and only where the model looks.

Done one after the other, Orientation copies the whole scan, Spacing resamples the whole copy in float64, and a crop
then throws most of it away.  Here the steps are asked only *where* their voxels lie (MONAI's own lazy mode says so,
without touching a voxel), and those voxels are made directly.  What is composed is what gives the same input up to
rounding:

- turns, flips and crops, which only choose voxels;
- one trilinear Spacing before crops, since a crop keeps samples as they are;
- crops after steps that change each voxel by itself, such as ScaleIntensityRange.

All else runs as MONAI does it: a second interpolation is not one interpolation, a padding has a value of its own, and
a step that looks at all voxels (a normalisation by their mean) must see all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from volsal.grid import Grid
from volsal.resampling import parallel, resample
from volsal.scans import Scan

# Steps whose result is some of the voxels before, in another order.
_CHOOSE = frozenset({"Orientation", "Flip", "Rotate90", "CenterSpatialCrop", "SpatialCrop", "CenterScaleCrop"})
# The same, unless the volume is too small: what is then put around it is left to the step itself.
_CHOOSE_OR_PAD = frozenset({"ResizeWithPadOrCrop"})
_EACH_VOXEL = frozenset({"ScaleIntensityRange", "ThresholdIntensity", "CastToType", "EnsureType", "ToTensor"})
# MONAI leaves a scan as it is where Spacing would move no voxel by more than this part of one.
_UNMOVED = 1e-3


@dataclass(frozen=True)
class Sampling:
    """Which voxels the first steps of a preprocessing make of a scan.

    Attributes
    ----------
    box : the scan's voxels that are looked at, by first and one past the last along each axis, (3, 2)
    grid : where the voxels lie that are made
    interpolates : whether they lie between the scan's voxels; else each is one of them
    steps : the numbers, from 0, of the steps that are in it
    places : by number, where the voxels of each spatial step lie; of a last one that is not in it, those that it keeps
    """

    box: NDArray[np.int64]
    grid: Grid
    interpolates: bool = False
    steps: tuple[int, ...] = ()
    places: Mapping[int, Grid] = field(default_factory=dict)

    def matrices(self, grid: Grid) -> dict[int, NDArray[np.float64]]:
        """By number, what each spatial step did to voxels, which were those of ``grid`` before the first.

        (4, 4) each, from voxels that it makes to voxels that it is given.
        """
        places = [grid, *self.places.values()]
        return {number: place.to(before) for (number, place), before in zip(self.places.items(), places, strict=False)}

    def of(self, scan: Scan) -> Tensor:
        """(C, *grid.shape) float32, contiguous."""
        part = tuple(slice(low, high) for low, high in self.box)
        source = _shifted(scan.grid, self.box[:, 0], self.box[:, 1] - self.box[:, 0])
        made = torch.empty(1 + len(scan.further), *self.grid.shape)
        for channel, place in zip((scan, *scan.further), made, strict=True):
            voxels = channel.array[part]
            if self.interpolates:  # beyond the outermost voxels their values hold, as with MONAI's border padding
                field = _reaching(source, self.grid)
                place.copy_(torch.from_numpy(resample(voxels, source, self.grid, field=field)))
            else:
                place.copy_(torch.from_numpy(_chosen(voxels, self.grid.to(source)).copy()))
        return made


Run = Callable[[int, Callable, Any], Any]


def composed(steps: Sequence[Callable], scan: Scan, lazily: Run) -> Sampling:
    """As many of ``steps`` as can be done in one sampling of ``scan``, crops behind steps on single voxels included.

    ``lazily(number, step, image)`` applies a step in MONAI's lazy mode.
    """
    now = Sampling(np.array([(0, n) for n in scan.grid.shape]), scan.grid)
    changed = False  # whether voxels' values have been changed
    for number, step in enumerate(steps):
        name = type(step).__name__ if type(step).__module__.startswith("monai.transforms.") else ""
        if _each_voxel(name, step):
            changed = True
            continue
        spacing = name == "Spacing" and not changed and not now.interpolates and _is_trilinear(step)
        if not (spacing or name in _CHOOSE or name in _CHOOSE_OR_PAD):
            break
        target = _where(lazily(number, step, _ghost(now.grid, 1 + len(scan.further))))
        if not spacing:
            kept = _kept(now.grid, target)
            if kept is None:
                break
            now = replace(_narrowed(now, scan, kept), places={**now.places, number: kept})
            if kept is not target:  # the step has voxels to add; on what is left it crops nothing
                break
        elif not _unmoved(now.grid, target):
            if not parallel(scan.grid, target):
                break
            now = replace(now, grid=target, interpolates=True, places={**now.places, number: target})
        now = replace(now, steps=(*now.steps, number))
    return now


def _each_voxel(name: str, step: Any) -> bool:
    """Whether the step makes of each voxel something that no other voxel has a part in."""
    if name == "NormalizeIntensity":
        return step.subtrahend is not None and step.divisor is not None and not step.nonzero
    return name in _EACH_VOXEL


def _is_trilinear(step: Any) -> bool:
    how = step.sp_resample
    mode, padding = (str(getattr(word, "value", word)) for word in (how.mode, how.padding_mode))
    plain = not (how.align_corners or step.recompute_affine)
    return plain and mode in ("bilinear", "trilinear") and padding == "border" and _is_real(how.dtype)


def _is_real(dtype: Any) -> bool:
    return dtype in (None, np.float32, np.float64, torch.float32, torch.float64)


def _ghost(grid: Grid, channels: int) -> Any:
    """An image of that grid that takes no memory: asked where its voxels go, never what they hold."""
    from monai.data import MetaTensor

    return MetaTensor(torch.zeros(()).expand(channels, *grid.shape), affine=torch.from_numpy(grid.affine.copy()))


def _where(image: Any) -> Grid:
    return Grid([int(n) for n in image.peek_pending_shape()], np.asarray(image.peek_pending_affine(), dtype=float))


def _unmoved(before: Grid, after: Grid) -> bool:
    return before.shape == after.shape and np.allclose(after.to(before), np.eye(4), rtol=0, atol=_UNMOVED)


def _kept(before: Grid, after: Grid) -> Grid | None:
    """The part of ``after`` whose voxels are there in ``before``: ``after`` itself, if all are; None if it has none."""
    moves = after.to(before)
    last = np.array(after.shape) - 1
    ends = np.sort(np.round(np.stack([moves[:3, 3], moves[:3, :3] @ last + moves[:3, 3]])), axis=0)
    if (ends[0] >= 0).all() and (ends[1] < before.shape).all():
        return after
    if not np.allclose(moves[:3, :3], np.eye(3), rtol=0, atol=1e-6):
        return None
    low = np.maximum(ends[0], 0).astype(int)
    size = np.minimum(ends[1] + 1, before.shape).astype(int) - low
    return _shifted(before, low, size) if (size > 0).all() else None


def _narrowed(now: Sampling, scan: Scan, grid: Grid) -> Sampling:
    """``now`` on a part of its voxels, or on them in another order."""
    if now.interpolates:
        return replace(now, grid=grid)
    ends = np.round(scan.grid.voxel(grid.corners)).astype(int)
    return replace(now, grid=grid, box=np.stack([ends.min(axis=0), ends.max(axis=0) + 1], axis=1))


def _shifted(grid: Grid, low: Sequence[int] | NDArray, size: Sequence[int] | NDArray) -> Grid:
    """The ``size`` voxels of ``grid``, or of its continuation, from voxel ``low`` on."""
    affine = grid.affine.copy()
    affine[:3, 3] = grid.world(low)
    return Grid([int(n) for n in size], affine)


def _reaching(source: Grid, target: Grid) -> Grid:
    """``source``, continued by as many voxels as it takes to hold all of ``target``."""
    corners = source.voxel(target.corners)
    low = np.minimum(np.floor(corners.min(axis=0)), 0).astype(int)
    high = np.maximum(np.ceil(corners.max(axis=0)) + 1, source.shape).astype(int)
    return _shifted(source, low, high - low)


def _chosen(voxels: NDArray[np.float32], moves: NDArray[np.float64]) -> NDArray[np.float32]:
    """``voxels`` with their axes in the order, and in the direction, that ``moves`` (4, 4) gives them; a view."""
    order = np.abs(moves[:3, :3]).argmax(axis=0)
    turned = [int(axis) for axis, source in enumerate(order) if moves[source, axis] < 0]
    return np.flip(voxels.transpose(order), tuple(turned))
