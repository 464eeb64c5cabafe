"""Occlusion: a box of the input at a time is removed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from volsal.attribution.method import Context
from volsal.attribution.perturbation.perturbation import Copies, Lengths, Perturbation, Reading, accurate
from volsal.attribution.settings import SettingError

# Along each axis, the first voxel of each box and the one after its last.
_Lattice = list[list[tuple[int, int]]]


@dataclass(frozen=True, kw_only=True)
class Occlusion(Perturbation):
    r"""What the score loses when a box is removed; after Zeiler and Fergus, ECCV 2014, section 4.2.

    .. math:: L_v = \frac{1}{|\{b : v \in b\}|} \sum_{b \ni v} S(x) - S(x \text{ without } b)

    Boxes stand in a lattice over the whole volume; those at its edges are cut, the same on either side, and every
    voxel lies in at least one.  Maps (B, 1, *spatial), signed: negative where the score rises without the box.

    Parameters
    ----------
    box_mm : edge of the box, mm: one number, or one for each axis of the model's input
    stride_mm : from box to box, mm; None: half a box
    box, stride : the same in voxels; each replaces its counterpart.  Needed where no grid is known
    channels : ``together``: a box is removed from all channels at once; ``each``: from one channel at a time, and
        the map (B, C, *spatial) says of which

    Others as in :class:`volsal.attribution.perturbation.perturbation.Perturbation`.
    """

    box_mm: Lengths = 20.0
    stride_mm: Lengths | None = None
    box: Lengths | None = None
    stride: Lengths | None = None
    channels: str = "together"

    id: ClassVar[str] = "occlusion"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels not in ("together", "each"):
            raise SettingError(f"{self.id}: channels is 'together' or 'each', not {self.channels!r}")

    def copies(self, shape: Sequence[int], context: Context) -> int:
        """One for each box (of each channel)."""
        boxes = math.prod(map(len, self._lattice(shape, context)[1]))
        return boxes * (shape[1] if self.channels == "each" else 1)

    def prepare(self, volume: Tensor, context: Context) -> Copies:
        """The copies, box by box, the last axis fastest."""
        edge, lattice = self._lattice(volume.shape, context)
        return _Boxes(volume, self.filling(volume, edge, context), edge, lattice, self.channels == "each", context)

    def _lattice(self, shape: Sequence[int], context: Context) -> tuple[list[int], _Lattice]:
        """The box's edges in voxels, and where boxes lie along each axis."""
        edge = [_whole(length) for length in self.in_voxels("box", shape, context) or ()]
        wanted = self.in_voxels("stride", shape, context)
        step = [_whole(length) for length in wanted] if wanted else [max(1, length // 2) for length in edge]
        if any(far > long for far, long in zip(step, edge, strict=True)):
            raise SettingError(
                f"{self.id}: boxes of {tuple(edge)} voxels at a stride of {tuple(step)} leave voxels out; the stride "
                "is at most the box"
            )
        return edge, [_along(*axis) for axis in zip(shape[2:], edge, step, strict=True)]


def _whole(length: float) -> int:
    return max(1, round(length))


def _along(size: int, edge: int, step: int) -> list[tuple[int, int]]:
    """Boxes over an axis of ``size`` voxels.  What they reach over is shared by both ends and cut off."""
    count = 1 + max(0, -(-(size - edge) // step))
    before = ((count - 1) * step + edge - size) // 2
    starts = [number * step - before for number in range(count)]
    return [(max(0, start), min(size, start + edge)) for start in starts]


class _Boxes(Copies):
    def __init__(
        self, volume: Tensor, fill: Tensor, edge: list[int], lattice: _Lattice, apart: bool, context: Context
    ) -> None:
        self._volume, self._fill, self._edge, self._lattice = volume, fill.expand_as(volume), edge, lattice
        self._channels = [slice(c, c + 1) for c in range(volume.shape[1])] if apart else [slice(None)]
        self._boxes = [tuple(slice(*ends) for ends in box) for box in product(*lattice)]
        self._context = context
        self.count = len(self._channels) * len(self._boxes)
        self.settled = (edge, lattice)

    def change(self, number: int, copy: Tensor) -> None:
        channel, box = divmod(number, len(self._boxes))
        where = (slice(None), self._channels[channel], *self._boxes[box])
        copy[where] = self._fill[where]

    def read(self, original: Tensor, scores: Tensor) -> Reading:
        """The mean over boxes is a mean along each axis in turn, since the boxes stand in a lattice."""
        targets, batch = original.shape
        drops = (original - scores).movedim(0, -1)  # (T, B, copies)
        values = drops.reshape(targets * batch * len(self._channels), *map(len, self._lattice))
        for size, ends in zip(self._volume.shape[2:], self._lattice, strict=True):
            # The first axis of boxes becomes the last axis of voxels, so that all have taken turns at the end.
            values = torch.tensordot(values, _cover(size, ends), dims=([1], [1]))
        shape = (targets, batch, len(self._channels), *self._volume.shape[2:])
        maps = values.reshape(shape).to(self._volume.device, accurate(self._volume))
        figures = {"boxes": len(self._boxes), "box_voxels": list(self._edge)}
        if self._context.grid:
            figures["box_mm"] = [n * float(mm) for n, mm in zip(self._edge, self._context.grid.spacing, strict=True)]
        return Reading(list(maps), [figures] * targets)


def _cover(size: int, ends: list[tuple[int, int]]) -> Tensor:
    """(size, boxes): at each voxel the same share for each box that covers it, summing to 1."""
    cover = torch.zeros(size, len(ends), dtype=torch.float64)
    for box, (start, stop) in enumerate(ends):
        cover[start:stop, box] = 1
    return cover / cover.sum(1, keepdim=True)
