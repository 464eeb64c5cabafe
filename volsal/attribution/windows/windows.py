r"""Where the windows lie over which a model is applied to a large volume, how they count, and how they are read.

All is as in MONAI's ``sliding_window_inference``, so that what is explained is what was predicted; see
:mod:`volsal.attribution.windows.stitching` for what becomes of their outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volsal.errors import VolsalError

Start = tuple[int, ...]
Slices = tuple[slice, ...]


class WindowsError(VolsalError, ValueError):
    """Windows that do not fit the volume, or something that cannot be done window by window."""


class Sliceable(Protocol):
    """What a volume must offer where it is larger than memory: a NumPy memmap, nibabel's ``dataobj``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its size."""
        ...

    def __getitem__(self, at: tuple[Any, ...]) -> Any:
        """The part at those slices, as an array."""
        ...


@dataclass(frozen=True)
class Windows:
    """How a model is applied window by window; the names' meaning is that of MONAI's ``sliding_window_inference``.

    Parameters
    ----------
    size : voxels of a window along each axis; an axis of 0 or less is as long as the volume's
    overlap : share of a window that the next one covers, in [0, 1); one number, or one per axis
    importance : how a window's voxels count where windows overlap: ``gaussian``, falling off towards its rim, as
        nnU-Net does, or ``constant``
    sigma : of the Gaussian, in window sizes
    batch : windows that go through the model at once; says nothing of the result
    padding : what lies beyond a volume that is smaller than a window: ``constant``, ``reflect``, ``replicate`` or
        ``circular``
    fill : the value of constant padding

    Raises
    ------
    WindowsError
        For numbers out of range.
    """

    size: tuple[int, ...]
    overlap: float | tuple[float, ...] = 0.25
    importance: Literal["gaussian", "constant"] = "gaussian"
    sigma: float = 0.125
    batch: int = 1
    padding: Literal["constant", "reflect", "replicate", "circular"] = "constant"
    fill: float = 0.0

    def __post_init__(self) -> None:
        for name in ("size", "overlap"):  # a config's lists
            if isinstance(value := getattr(self, name), Sequence):
                object.__setattr__(self, name, tuple(value))
        if not isinstance(self.size, tuple) or not self.size:
            raise WindowsError(f"windows.size is one number per axis, as in (96, 96, 96); got {self.size!r}")
        if len(self.overlaps) != len(self.size) or not all(0 <= share < 1 for share in self.overlaps):
            raise WindowsError(
                f"windows.overlap is a share of the window in [0, 1), one or {len(self.size)}; got {self.overlap!r}"
            )
        for name, known in (
            ("importance", ("gaussian", "constant")),
            ("padding", ("constant", "reflect", "replicate", "circular")),
        ):
            if getattr(self, name) not in known:
                raise WindowsError(f"windows.{name} is one of {', '.join(known)}; got {getattr(self, name)!r}")
        if self.batch < 1 or not self.sigma > 0:
            raise WindowsError(f"windows.batch is at least 1 and sigma above 0; got {self.batch} and {self.sigma}")

    @property
    def overlaps(self) -> tuple[float, ...]:
        """The overlap along each axis."""
        return self.overlap if isinstance(self.overlap, tuple) else (self.overlap,) * len(self.size)

    def over(self, shape: Sequence[int]) -> Layout:
        """The windows over a volume of ``shape``; :class:`WindowsError` where the axes do not fit."""
        if len(shape) != len(self.size):
            raise WindowsError(
                f"windows of {len(self.size)} axes, {self.size}, do not fit a volume of {tuple(shape)}; give one size "
                "per spatial axis"
            )
        return Layout(self, tuple(shape))


@dataclass(frozen=True)
class Layout:
    """The windows over one volume of ``shape`` (*spatial)."""

    windows: Windows
    shape: tuple[int, ...]

    @cached_property
    def size(self) -> tuple[int, ...]:
        """Voxels of a window along each axis."""
        return tuple(s if s > 0 else n for s, n in zip(self.windows.size, self.shape, strict=True))

    @cached_property
    def starts(self) -> list[Start]:
        """Each window's first voxel in the volume, the first axis slowest; negative where the volume is padded.

        One step is ``int(size * (1 - overlap))`` voxels, and the last window ends where the volume does.
        """
        along = []
        for size, voxels, overlap in zip(self.size, self.shape, self.windows.overlaps, strict=True):
            step = max(int(size * (1 - overlap)), 1)
            count = 1 + math.ceil(max(voxels - size, 0) / step)
            spare = voxels - size
            along.append([min(i * step, spare) if spare >= 0 else -(-spare // 2) for i in range(count)])
        return list(product(*along))

    @cached_property
    def importance(self) -> Tensor:
        """How each of a window's voxels counts, (*size) float32, above 0 everywhere."""
        weight = torch.ones(())
        for size in self.size:
            along = torch.ones(size)
            if self.windows.importance == "gaussian":
                along = torch.exp(-0.5 * ((torch.arange(size) - (size - 1) / 2) / (size * self.windows.sigma)) ** 2)
            weight = weight.unsqueeze(-1) * along
        return weight.clamp(min=max(float(weight.min()), 1e-3))

    def covered(self, start: Start) -> Slices:
        """The part of the volume that a window covers."""
        spans = zip(start, self.size, self.shape, strict=True)
        return tuple(slice(max(a, 0), min(a + size, voxels)) for a, size, voxels in spans)

    def valid(self, start: Start) -> Slices:
        """The part of the window that lies in the volume: what is left is padding."""
        covered = self.covered(start)
        return tuple(slice(part.start - a, part.stop - a) for a, part in zip(start, covered, strict=True))

    def padded(self, values: Tensor, start: Start) -> Tensor:
        """Values (C, *part of the volume) as the window that the model sees, (C, *size)."""
        sides = [(part.start, size - part.stop) for part, size in zip(self.valid(start), self.size, strict=True)]
        if not any(map(any, sides)):
            return values
        flat = [side for pair in reversed(sides) for side in pair]
        fill = self.windows.fill if self.windows.padding == "constant" else None
        try:
            return F.pad(values[None], flat, self.windows.padding, fill)[0]
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise WindowsError(
                f"a volume of {self.shape} cannot be padded to a window of {self.size} by {self.windows.padding!r}: "
                f"{reason}; use padding: constant"
            ) from error

    def unpadded(self, values: Tensor, start: Start) -> Tensor:
        """What a derivative by the window, (C, *size), is by the volume: the transpose of :meth:`padded`."""
        covered = self.covered(start)
        leaf = values.new_zeros(len(values), *(part.stop - part.start for part in covered), requires_grad=True)
        with torch.enable_grad():
            window = self.padded(leaf, start)
        return values if window is leaf else torch.autograd.grad(window, leaf, values)[0]

    def tiles(self) -> Iterator[Slices]:
        """Parts of the volume, none larger than a window, that cover every voxel once."""
        along = [
            [slice(a, min(a + size, voxels)) for a in range(0, voxels, size)]
            for size, voxels in zip(self.size, self.shape, strict=True)
        ]
        return product(*along)


@dataclass(frozen=True, eq=False)
class Volume:
    """One volume, read window by window for a model.

    Attributes
    ----------
    source : anything that gives an array where it is sliced
    lead : the indices before the spatial axes: which volume of a batch, all its channels
    channels : how many those are
    layout : the windows over it
    device, dtype : the model's
    """

    source: Sliceable
    lead: tuple[int | slice, ...]
    channels: int
    layout: Layout
    device: torch.device
    dtype: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        """What sums over windows are kept in: float32 or wider."""
        return torch.promote_types(self.dtype, torch.float32)

    def window(self, start: Start) -> Tensor:
        """What the model sees, (C, *size)."""
        return self.layout.padded(self._part(self.layout.covered(start)), start)

    def tensor(self) -> Tensor:
        """All of it, (1, C, *shape)."""
        return self._part(tuple(slice(0, voxels) for voxels in self.layout.shape))[None]

    def _part(self, at: Slices) -> Tensor:
        """(C, *part) in the model's dtype, on its device."""
        part = self.source[(*self.lead, *at)]
        if not isinstance(part, Tensor):
            # A copy in the machine's byte order: files need not be in it.
            part = torch.from_numpy(np.array(part, dtype=torch.empty((), dtype=self.wide).numpy().dtype, order="C"))
        size = [one.stop - one.start for one in at]
        return part.detach().as_subclass(Tensor).to(self.device, self.dtype).reshape(self.channels, *size)

    def batches(self) -> Iterator[tuple[list[Start], Tensor]]:
        """All windows in order: where a batch of them starts, and what the model sees, (n, C, *size)."""
        starts = self.layout.starts
        for first in range(0, len(starts), self.layout.windows.batch):
            some = starts[first : first + self.layout.windows.batch]
            yield some, torch.stack([self.window(start) for start in some])


def volumes_of(source: Sliceable, windows: Windows, model: nn.Module) -> list[Volume]:
    """Each volume of ``source``: (*spatial), (C, *spatial) or (B, C, *spatial)."""
    axes = len(windows.size)
    leading = len(source.shape) - axes
    if leading not in (0, 1, 2):
        raise WindowsError(
            f"windows {windows.size} are for volumes of {axes} axes, with their channels and a batch before them; "
            f"this one is {tuple(source.shape)}"
        )
    layout = windows.over(source.shape[leading:])
    parameter = next(model.parameters(), torch.empty(()))
    every = slice(None)
    leads = [(number, every) for number in range(source.shape[0])] if leading == 2 else [(every,) * leading]
    channels = source.shape[leading - 1] if leading else 1
    return [Volume(source, lead, channels, layout, parameter.device, parameter.dtype) for lead in leads]
