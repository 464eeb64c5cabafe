r"""A model that is applied window by window, as one function of the whole volume.

Large volumes go through a segmentation network in overlapping windows, whose outputs are blended:

.. math:: s = \sum_w I \cdot o_w \Big/ \sum_w I, \qquad o_w = f(x_w)

with the importance I of a window's voxels, and both sums over the windows w that hold the voxel.  A score of the
stitched output s is one score of the whole volume.  By the chain rule its share in a window is linear in the window's
output,

.. math:: T_w(o) = \langle u_w, o \rangle, \qquad u_w = \frac{I}{\sum_{w'} I} \cdot \frac{\partial S}{\partial s}

and that is what each window is explained for, in :mod:`volsal.attribution.windows.windowed`: one question, one scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from volsal.attribution.tap import ModelError, forward, gradients
from volsal.attribution.targets.target import Target, score
from volsal.attribution.windows.windows import Layout, Slices, Start, Volume


class Store:
    """Makes arrays of the volume's size: in memory, or in files of a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def zeros(self, name: str, channels: int, shape: Sequence[int], dtype: torch.dtype) -> Array:
        """An array (channels, *shape) of zeros; on disk it is ``<name>.npy``, (*shape, channels), Fortran order."""
        kind = torch.empty((), dtype=dtype).numpy().dtype
        if self.folder is None:
            return Array(np.zeros((channels, *shape), kind))
        path = self.folder / f"{name}.npy"
        while path.exists():
            path = path.with_stem(f"{path.stem}-again")
        # The first axis runs fastest, as in a NIfTI file.
        np.lib.format.open_memmap(path, "w+", kind, (*shape, channels), fortran_order=True)
        return Array(path)


class Array:
    """An array (C, *shape) in memory, or in a file of which nothing stays mapped between two accesses."""

    def __init__(self, where: NDArray | Path) -> None:
        self.where = where

    def whole(self) -> NDArray:
        """All of it; from a file, mapped."""
        if isinstance(self.where, Path):
            return np.moveaxis(np.load(self.where, mmap_mode="r+"), -1, 0)
        return self.where

    def __getitem__(self, at: Slices) -> Tensor:
        """A copy of the part (C, *part)."""
        return torch.from_numpy(np.array(self.whole()[:, *at], order="C"))

    def __setitem__(self, at: Slices, values: Tensor) -> None:
        self.whole()[:, *at] = values.cpu().numpy()

    def add(self, at: Slices, values: Tensor) -> None:
        """Add ``values`` (C, *part), or one channel of them for all."""
        self.whole()[:, *at] += values.cpu().numpy()

    def tensor(self) -> Tensor:
        """All of it as a tensor (1, C, *shape)."""
        return torch.from_numpy(self.whole())[None]

    def kept(self) -> Array:
        """The same in the folder above, where scratch files that are kept belong."""
        if isinstance(self.where, Path):
            return Array(self.where.replace(self.where.parent.parent / self.where.name))
        return self


class Stitched(Protocol):
    """What the windows' outputs make together."""

    weight: Array

    def output(self) -> Tensor:
        """The model's answer for the whole volume, (1, K, *spatial) or (1, K)."""
        ...

    def ask(self, target: Target) -> tuple[Tensor, Callable[[Start], Tensor]]:
        """The target's score (1,), and each window's upstream gradient, of the shape of one window's output."""
        ...


class Dense:
    """Outputs of the window's size, (n, K, *size), blended by importance."""

    def __init__(self, layout: Layout, weight: Array, total: Array) -> None:
        self.layout, self.weight, self.total = layout, weight, total

    def add(self, start: Start, output: Tensor) -> None:
        """One window's output (K, *size)."""
        blended = output * self.layout.importance.to(output)
        self.total.add(self.layout.covered(start), blended[:, *self.layout.valid(start)])

    def finish(self) -> None:
        """Divide by the sum of importance."""
        divide(self.total, self.weight, self.layout)
        self.total = self.total.kept()

    def output(self) -> Tensor:
        """(1, K, *spatial)."""
        return self.total.tensor()

    def ask(self, target: Target) -> tuple[Tensor, Callable[[Start], Tensor]]:
        """See :class:`Stitched`.

        A target that is a sum over voxels says so by a method ``within``, from slices of the output's spatial axes to
        the target of what lies there; the stitched output is then never held whole.
        """
        within = getattr(target, "within", None)
        if within is None:
            leaf = self.total.tensor().requires_grad_()
            value = score(target, leaf, 1)
            (slope,) = gradients([value], leaf, "the stitched output")
            return value.detach(), lambda start: share(slope[0], self.layout, self.weight, start)

        total, any_slope = 0.0, False
        for tile in self.layout.tiles():
            value, slope = self._part(within(tile), tile)
            total += float(value)  # a tensor kept from each tile would keep the heap from being used again
            any_slope |= bool(slope.any())
        if not any_slope:
            score(target, self.output(), 1)  # says why, where it is for lack of voxels

        def upstream(start: Start) -> Tensor:
            covered = self.layout.covered(start)
            return _blended(self._part(within(covered), covered)[1], self.layout, self.weight, start)

        return slope.new_tensor([total]), upstream

    def _part(self, target: Target, at: Slices) -> tuple[Tensor, Tensor]:
        """The score (1,) of a part of the output, and its derivative by that part, (K, *part)."""
        leaf = self.total[at][None].requires_grad_()
        value = score(target, leaf, 1)
        # A part may hold nothing of what the target sums over.
        slope = torch.autograd.grad(value.sum(), leaf)[0] if value.requires_grad else torch.zeros_like(leaf)
        return value.detach(), slope[0]


def share(slope: Tensor, layout: Layout, weight: Array, start: Start) -> Tensor:
    """The derivative by a window's output, (K, *size) or (K,), of that by the stitched output, (K, *shape) or (K,)."""
    if slope.ndim == 1:
        return slope / len(layout.starts)
    return _blended(slope[:, *layout.covered(start)], layout, weight, start)


def _blended(slope: Tensor, layout: Layout, weight: Array, start: Start) -> Tensor:
    """The same, of what the window covers; 0 in the padding."""
    valid = layout.valid(start)
    whole = slope.new_zeros(len(slope), *layout.size)
    whole[:, *valid] = slope * layout.importance.to(slope)[valid] / weight[layout.covered(start)]
    return whole


class Pooled:
    """A classifier's logits (n, K): the volume's are their mean over the windows, each counting alike."""

    def __init__(self, layout: Layout, weight: Array) -> None:
        self.layout, self.weight = layout, weight
        self._sum: Tensor | None = None

    def add(self, start: Start, output: Tensor) -> None:
        """One window's logits (K,)."""
        self._sum = output if self._sum is None else self._sum + output

    def finish(self) -> None:
        """Divide by the number of windows."""
        assert self._sum is not None
        self._mean = (self._sum / len(self.layout.starts))[None].cpu()

    def output(self) -> Tensor:
        """(1, K)."""
        return self._mean

    def ask(self, target: Target) -> tuple[Tensor, Callable[[Start], Tensor]]:
        """See :class:`Stitched`."""
        leaf = self._mean.clone().requires_grad_()
        value = score(target, leaf, 1)
        (slope,) = gradients([value], leaf, "the mean of the windows' outputs")
        return value.detach(), lambda start: share(slope[0], self.layout, self.weight, start)


def divide(total: Array, weight: Array, layout: Layout) -> None:
    """``total`` / ``weight`` in place, without ever holding more than a window of it."""
    for tile in layout.tiles():
        total[tile] = total[tile] / weight[tile]


def total_importance(layout: Layout, store: Store, dtype: torch.dtype) -> Array:
    """The sum over windows of their importance at each voxel, (1, *shape)."""
    weight = store.zeros("weight", 1, layout.shape, dtype)
    for start in layout.starts:
        weight.add(layout.covered(start), layout.importance[layout.valid(start)].to(dtype)[None])
    return weight


def stitched(model: nn.Module, volume: Volume, store: Store, tell: Callable[[int], None]) -> Stitched:
    """The model applied to every window, and its outputs put together; ``tell`` hears how many windows were done.

    Use inside :func:`volsal.attribution.tap.undisturbed`.

    Raises
    ------
    ModelError
        Where the model fails on a window, or returns neither (n, K, *size) nor (n, K).
    """
    layout = volume.layout
    weight = total_importance(layout, store, volume.wide)
    answer: Dense | Pooled | None = None
    for starts, windows in volume.batches():
        with torch.no_grad():
            outputs = forward(model, windows)
        if answer is None:
            _require_stitchable(outputs, windows)
            dense = outputs.ndim > 2
            answer = (
                Dense(layout, weight, store.zeros("output", outputs.shape[1], layout.shape, volume.wide))
                if dense
                else Pooled(layout, weight)
            )
        for start, output in zip(starts, outputs.to(volume.wide), strict=True):
            answer.add(start, output)
        tell(len(starts))
    assert answer is not None  # there is no volume without a window
    answer.finish()
    return answer


def _require_stitchable(outputs: Any, windows: Tensor) -> None:
    if isinstance(outputs, Tensor) and len(outputs) == len(windows):
        if outputs.ndim == 2 or outputs.shape[2:] == windows.shape[2:]:
            return
        found = f"a tensor of shape {tuple(outputs.shape)}"
    else:
        found = f"a {type(outputs).__name__}"
    raise ModelError(
        f"windows are put together from logits of their own size, (n, classes, *{tuple(windows.shape[2:])}), or from a "
        f"classifier's (n, classes); for windows {tuple(windows.shape)} this model returns {found}; wrap it so that it "
        "returns that tensor"
    )
