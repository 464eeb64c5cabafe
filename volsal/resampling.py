"""Carry values from one voxel grid to another in one step, trilinear, or by the nearest value for labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from volsal.grid import Grid, GridError

# Bytes of output computed at a time: large enough to amortise a call, small enough to stay near the caches.
_SLAB_BYTES = 1 << 22
# Two voxel axes count as parallel where a step along one moves less than this many voxels across the other,
# summed over the whole volume.
_ALIGNED_VOXELS = 1e-3
_BACKWARDS = [2, 1, 0, 3]
# A point this part of a voxel outside a face is still inside: rounding must not decide.
_FACE = 1e-6


@overload
def resample(values: Tensor, source: Grid, target: Grid, field: Grid | None = None) -> Tensor: ...
@overload
def resample(values: NDArray, source: Grid, target: Grid, field: Grid | None = None) -> NDArray: ...
def resample(values: Tensor | NDArray, source: Grid, target: Grid, field: Grid | None = None) -> Tensor | NDArray:
    """Trilinear interpolation of ``values`` at the voxel centres of ``target``.

    Parameters
    ----------
    values : (..., *source.shape), a float tensor or array; leading axes (batch, channels) are kept
    source, target : the grid that ``values`` lie on, and the one that is asked for
    field : the grid of what ``values`` were made from, such as the model's input for a layer's cells; its axes are
        those of ``source`` up to permutation and flip.  None: ``source`` itself

    Returns
    -------
    (..., *target.shape), of the kind, dtype and device of ``values``.  Half-precision values are computed in float32.

    Beyond the outermost voxel centres of ``source`` the nearest value holds, as far as the outer faces of ``field``,
    which are half a voxel outside its own outermost centres; outside ``field`` the result is 0, also where ``source``
    reaches further.  Where the axes of source and target are parallel up to permutation and flip the result is a
    product of three small matrices; elsewhere it is sampled slab by slab through the composed affine.  No coordinate
    array of the target's size is ever made.  In memory the first of the three axes is the fastest, as in a NIfTI file.

    Raises
    ------
    GridError
        Where ``values`` do not have the shape of ``source``, or the axes of ``field`` are not those of ``source``.
    """
    if tuple(values.shape[-3:]) != source.shape:
        raise GridError(f"the values are {tuple(values.shape)}, but their grid has shape {source.shape}")
    tensor = values if isinstance(values, Tensor) else _tensor(values)
    if not tensor.is_floating_point():
        raise TypeError(f"resample interpolates floating point values, not {tensor.dtype}; convert them first")
    working = tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    # From here on all axes are counted from the last.
    composed, box = target.to(source)[_BACKWARDS][:, _BACKWARDS], _box(source, field or source)[::-1]
    carry = _along_axes if _aligned(composed, target.shape[::-1]) else _through_affine
    volumes = working.reshape(-1, *source.shape).transpose(1, 3)
    out = _zeros(working, (len(volumes), *reversed(target.shape)))
    with torch.autocast(tensor.device.type, enabled=False):
        for volume, place in zip(volumes, out, strict=True):
            carry(volume, composed, box, place)
    carried = out.view(*tensor.shape[:-3], *out.shape[1:]).transpose(-3, -1).to(tensor.dtype)
    return carried if isinstance(values, Tensor) else carried.numpy()


def nearest(values: NDArray, source: Grid, target: Grid) -> NDArray:
    """The value of the voxel of ``source`` in which each voxel centre of ``target`` lies; 0 outside of all.

    ``values`` (*source.shape) -> (*target.shape) of the same dtype, which may be any: labels stay what they are.  A
    centre on the face between two voxels takes the one with the higher index.  Computed slab by slab; no coordinate
    array of the target's size is made.

    Raises
    ------
    GridError
        Where ``values`` do not have the shape of ``source``.
    """
    if values.shape != source.shape:
        raise GridError(f"the values are {values.shape}, but their grid has shape {source.shape}")
    composed = target.to(source)
    steps = composed[:3, :3]
    if _aligned(composed, target.shape):  # what does not matter over the volume, rounding above all, costs nothing
        steps = np.where(np.abs(steps) == np.abs(steps).max(axis=0), steps, 0)
    out = np.zeros(target.shape, values.dtype)
    rows = max(1, _SLAB_BYTES // (8 * math.prod(target.shape[1:])))
    for start in range(0, target.shape[0], rows):
        slab = out[start : start + rows]
        lines = np.ogrid[start : start + len(slab), : slab.shape[1], : slab.shape[2]]
        at, inside = [], np.ones((1, 1, 1), dtype=bool)
        for step, first, size in zip(steps, composed[:3, 3], source.shape, strict=True):
            along = sum(by * line for by, line in zip(step, lines, strict=True) if by) + (first + 0.5 + _FACE)
            voxel = np.floor(along).astype(np.int64)
            inside = inside & (voxel >= 0) & (voxel < size)
            at.append(voxel.clip(0, size - 1))
        slab[:] = np.where(inside, values[tuple(at)], 0)
    return out


def parallel(source: Grid, target: Grid) -> bool:
    """Whether the axes of two grids are parallel up to permutation and flip, to a small part of a voxel of source."""
    return _aligned(target.to(source), target.shape)


def _tensor(values: NDArray) -> Tensor:
    """The array as a tensor, of the same memory unless an axis runs backwards, which tensors cannot."""
    return torch.from_numpy(values if min(values.strides) >= 0 else values.copy())


def _zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of zeros of the dtype and device of ``like``.

    On a CPU it is NumPy's memory, which the system hands out in huge pages, and as zeros that take no room until they
    are written: touching a whole scan for the first time in pages of 4 KiB takes longer than computing what goes there.
    """
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    return torch.from_numpy(np.zeros(shape, like.numpy().dtype))


def _box(source: Grid, field: Grid) -> NDArray[np.float64]:
    """(3, 2): the lower and upper face of ``field`` along each axis of ``source``, in voxels of ``source``.

    A millionth of a field's voxel is added on each side, so that a point on the face is inside whatever rounding does.
    """
    composed = field.to(source)
    if not _aligned(composed, field.shape):
        raise GridError(f"the field {field} and the values' grid {source} are turned against each other")
    middle = composed[:3, :3] @ ((np.array(field.shape) - 1) / 2) + composed[:3, 3]
    half = np.abs(composed[:3, :3]) @ (np.array(field.shape) / 2 + _FACE)
    return np.stack([middle - half, middle + half], axis=1)


def _aligned(composed: NDArray[np.float64], shape: tuple[int, int, int]) -> bool:
    """Whether each target axis runs along one source axis, to within a small part of a voxel over the volume."""
    travel = np.abs(composed[:3, :3]) * (np.array(shape) - 1)
    # An axis of one voxel does not travel; its matrix column decides instead.
    travel = np.where(np.array(shape) > 1, travel, np.abs(composed[:3, :3]))
    main = travel.argmax(axis=0)
    across = travel.copy()
    across[main, range(3)] = 0
    return len(set(main)) == 3 and bool(across.sum(axis=1).max() <= _ALIGNED_VOXELS)


def _slabs(out: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows of it) of ``out`` (K, J, I), a few at a time."""
    rows = max(1, _SLAB_BYTES // max(1, out[:1].nbytes))
    return ((start, out[start : start + rows]) for start in range(0, len(out), rows))


def _along_axes(volume: Tensor, composed: NDArray[np.float64], box: NDArray[np.float64], out: Tensor) -> None:
    """Three one-dimensional interpolations.  volume (source shape) -> out (target shape), zeros before."""
    order = [int(axis) for axis in np.abs(composed[:3, :3]).argmax(axis=0)]  # target axis -> source axis
    volume = volume.permute(order)
    weights = [
        _weights(composed[source, axis], composed[source, 3], out.shape[axis], volume.shape[axis], box[source])
        for axis, source in enumerate(order)
    ]
    inside = [_span(matrix.any(dim=1)) for matrix in weights]
    first, second, third = (matrix[rows].to(volume) for matrix, rows in zip(weights, inside, strict=True))
    made = out[tuple(inside)]
    near = [_span(matrix.any(dim=0)) for matrix in (second, third)]
    second, third, volume = second[:, near[0]], third[:, near[1]], volume[:, near[0], near[1]]
    room = torch.empty(0)
    for start, slab in _slabs(made):
        rows = first[start : start + len(slab)]
        cells = _span(rows.any(dim=0))
        planes = torch.matmul(torch.matmul(second, volume[cells]), third.T)
        room = room if len(room) == len(slab) else slab.new_empty(len(slab), slab[0].numel())
        slab.copy_(torch.mm(rows[:, cells], planes.flatten(1), out=room).view(slab.shape))


def _span(marks: Tensor) -> slice:
    """From the first True of ``marks`` (n,) to the last; nothing where there is none."""
    at = marks.nonzero().flatten().tolist()
    return slice(at[0], at[-1] + 1) if at else slice(0, 0)


def _weights(step: float, first: float, size: int, cells: int, faces: NDArray[np.float64]) -> Tensor:
    """(size, cells) linear interpolation weights at source coordinates ``first + step * i``; 0 beyond the ``faces``."""
    at = first + step * np.arange(size)
    inside = (at >= faces[0]) & (at <= faces[1])
    at = at.clip(0, cells - 1)
    low = np.minimum(np.floor(at).astype(int), max(cells - 2, 0))
    share = at - low
    weights = np.zeros((size, cells))
    rows = np.arange(size)
    weights[rows, low] += 1 - share
    weights[rows, np.minimum(low + 1, cells - 1)] += share
    return torch.from_numpy(weights * inside[:, None])


def _through_affine(volume: Tensor, composed: NDArray[np.float64], box: NDArray[np.float64], out: Tensor) -> None:
    """Sampling at any angle.  volume (source shape) -> out (target shape), zeros before.

    A line of target voxels crosses the box once, so its first and last voxel inside say all about it.  Only the part
    of a slab that holds any such voxel is computed.
    """
    sample = _sampler(volume, composed, box)
    for start, slab in _slabs(out):
        first, last = _crossings(composed, box, range(start, start + len(slab)), slab.shape[1], slab.shape[2])
        lines = np.flatnonzero((first <= last).any(axis=0))
        if not len(lines):
            continue
        across = slice(lines[0], lines[-1] + 1)
        along = slice(first[first <= last].min(), last[first <= last].max() + 1)
        part = sample((start, across.start, along.start), slab[:, across, along].shape)
        at = np.arange(along.start, along.stop, dtype=np.int32)
        outside = (at < first[:, across, None]) | (at > last[:, across, None])
        slab[:, across, along] = part.masked_fill_(torch.from_numpy(outside), 0).to(slab.device)


def _sampler(
    volume: Tensor, composed: NDArray[np.float64], box: NDArray[np.float64]
) -> Callable[[Sequence[int], Sequence[int]], Tensor]:
    """A function from the first voxel and the shape of a part of the target to the values there, on the CPU.

    SimpleITK evaluates an affine along each image line.  Both images are given to it in voxel coordinates, so that it
    never sees a world convention and shear is no obstacle.
    """
    import SimpleITK as sitk

    # The outermost values repeated to beyond the box, so that ITK's own rule for an image's edge never applies.
    beyond = [
        (1 + max(0, int(-low)), 1 + max(0, int(high - n + 1))) for (low, high), n in zip(box, volume.shape, strict=True)
    ]
    image = sitk.GetImageFromArray(np.pad(volume.cpu().numpy(), beyond, mode="edge"))
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(composed[2::-1, 2::-1].ravel().tolist())  # SimpleITK counts axes from the last: (k, j, i)
    origin = composed[:3, 3] + [before for before, _ in beyond]
    upright = np.eye(3).ravel().tolist()

    def sample(start: Sequence[int], shape: Sequence[int]) -> Tensor:
        transform.SetTranslation((origin + composed[:3, :3] @ start)[::-1].tolist())
        size = [int(n) for n in reversed(shape)]
        part = sitk.Resample(image, size, transform, sitk.sitkLinear, (0.0,) * 3, (1.0,) * 3, upright, 0.0)
        return torch.from_numpy(sitk.GetArrayFromImage(part))

    return sample


def _crossings(
    composed: NDArray[np.float64], box: NDArray[np.float64], rows: range, lines: int, length: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """First and last voxel inside the box, (rows, lines) each, of lines of voxels; first > last where there is none."""
    first = np.zeros((len(rows), lines))
    last = np.full_like(first, length - 1)
    i, j = np.arange(rows.start, rows.stop)[:, None], np.arange(lines)
    for (low, high), (per_i, per_j, per_k, offset) in zip(box, composed[:3], strict=True):
        at = per_i * i + per_j * j + offset
        if per_k == 0:
            last[(at < low) | (at > high)] = -1
            continue
        ends = np.stack([(low - at) / per_k, (high - at) / per_k])
        np.maximum(first, np.ceil(ends.min(axis=0)), out=first)
        np.minimum(last, np.floor(ends.max(axis=0)), out=last)
    # Clipped, since a line nearly parallel to a face meets it far outside any integer.
    return first.clip(0, length).astype(np.int32), last.clip(-1, length - 1).astype(np.int32)
