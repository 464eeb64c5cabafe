"""Carry values from one voxel grid to another, in one trilinear step."""

from __future__ import annotations

from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from volsal.grid import Grid, GridError

# Bytes of output computed at a time: large enough to amortise a call, small enough to stay near the caches.
_SLAB_BYTES = 32 << 20
# Two voxel axes count as parallel where a step along one moves less than this many voxels across the other,
# summed over the whole volume.
_ALIGNED_VOXELS = 1e-3


@overload
def resample(values: Tensor, source: Grid, target: Grid) -> Tensor: ...
@overload
def resample(values: NDArray, source: Grid, target: Grid) -> NDArray: ...
def resample(values: Tensor | NDArray, source: Grid, target: Grid) -> Tensor | NDArray:
    """Trilinear interpolation of ``values`` at the voxel centres of ``target``.

    Parameters
    ----------
    values : (..., *source.shape), a float tensor or array; leading axes (batch, channels) are kept
    source, target : the grid that ``values`` lie on, and the one that is asked for

    Returns
    -------
    (..., *target.shape), of the kind, dtype and device of ``values``.  Half-precision values are computed in float32.

    Between the outermost voxel centres of ``source`` and its outer faces, half a voxel further out, the nearest value
    holds; outside its field of view the result is 0.  Where the axes of the two grids are parallel up to permutation
    and flip the result is a product of three small matrices; elsewhere it is sampled slab by slab through the composed
    affine.  No coordinate array of the target's size is ever made.

    Raises
    ------
    GridError
        Where ``values`` do not have the shape of ``source``.
    """
    if tuple(values.shape[-3:]) != source.shape:
        raise GridError(f"the values are {tuple(values.shape)}, but their grid has shape {source.shape}")
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
    if not tensor.is_floating_point():
        raise TypeError(f"resample interpolates floating point values, not {tensor.dtype}; convert them first")
    working = tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    composed = target.to(source)
    carry = _along_axes if _aligned(composed, target.shape) else _through_affine
    with torch.autocast(tensor.device.type, enabled=False):
        volumes = [carry(volume, composed, target.shape) for volume in working.reshape(-1, *source.shape)]
    carried = torch.stack(volumes) if len(volumes) != 1 else volumes[0][None]
    carried = carried.reshape(*tensor.shape[:-3], *target.shape).to(tensor.dtype)
    return carried if isinstance(values, Tensor) else carried.numpy()


def _aligned(composed: NDArray[np.float64], shape: tuple[int, int, int]) -> bool:
    """Whether each target axis runs along one source axis, to within a small part of a voxel over the volume."""
    travel = np.abs(composed[:3, :3]) * (np.array(shape) - 1)
    # An axis of one voxel does not travel; its matrix column decides instead.
    travel = np.where(np.array(shape) > 1, travel, np.abs(composed[:3, :3]))
    main = travel.argmax(axis=0)
    across = travel.copy()
    across[main, range(3)] = 0
    return len(set(main)) == 3 and bool(across.sum(axis=1).max() <= _ALIGNED_VOXELS)


def _along_axes(volume: Tensor, composed: NDArray[np.float64], shape: tuple[int, int, int]) -> Tensor:
    """Three one-dimensional interpolations.  volume (source shape) -> (target shape)."""
    order = [int(axis) for axis in np.abs(composed[:3, :3]).argmax(axis=0)]  # target axis -> source axis
    volume = volume.permute(order)
    weights = [
        _weights(composed[order[axis], axis], composed[order[axis], 3], shape[axis], volume.shape[axis]).to(volume)
        for axis in range(3)
    ]
    out = volume.new_empty(shape)
    rows = max(1, _SLAB_BYTES // max(1, volume.element_size() * shape[1] * shape[2]))
    for start in range(0, shape[0], rows):
        slab = torch.tensordot(weights[0][start : start + rows], volume, dims=([1], [0]))
        slab = torch.matmul(weights[1], slab)
        torch.matmul(slab, weights[2].T, out=out[start : start + rows])
    return out


def _weights(step: float, first: float, size: int, cells: int) -> Tensor:
    """(size, cells) linear interpolation weights at source coordinates ``first + step * i``; a row of 0 outside."""
    at = first + step * np.arange(size)
    inside = (at >= -0.5 - 1e-6) & (at <= cells - 0.5 + 1e-6)
    at = at.clip(0, cells - 1)
    low = np.minimum(np.floor(at).astype(int), max(cells - 2, 0))
    share = at - low
    weights = np.zeros((size, cells))
    rows = np.arange(size)
    weights[rows, low] += 1 - share
    weights[rows, np.minimum(low + 1, cells - 1)] += share
    return torch.from_numpy(weights * inside[:, None])


def _through_affine(volume: Tensor, composed: NDArray[np.float64], shape: tuple[int, int, int]) -> Tensor:
    """Sampling at any angle.  volume (source shape) -> (target shape).

    SimpleITK evaluates an affine along each image line and has volsal's rule for the edges.  Both images are given to
    it in voxel coordinates, so that it never sees a world convention and shear is no obstacle.
    """
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(volume.cpu().numpy())  # SimpleITK counts axes from the last: (k, j, i)
    # ITK's inside test is half open.  Drawn in by 1e-8 about the middle, voxels on the outer face count as inside, as
    # they do in _weights, and nothing moves by more than a millionth of a voxel.
    middle = (np.array(volume.shape) - 1) / 2
    composed = composed.copy()
    composed[:3] *= 1 - 1e-8
    composed[:3, 3] += 1e-8 * middle
    backwards = composed[2::-1, 2::-1]
    out = volume.new_empty(shape)
    rows = max(1, _SLAB_BYTES // max(1, volume.element_size() * shape[1] * shape[2]))
    for start in range(0, shape[0], rows):
        count = min(rows, shape[0] - start)
        offset = composed[:3, 3] + composed[:3, 0] * start
        transform = sitk.AffineTransform(3)
        transform.SetMatrix(backwards.ravel().tolist())
        transform.SetTranslation(offset[::-1].tolist())
        slab = sitk.Resample(
            image,
            [shape[2], shape[1], count],
            transform,
            sitk.sitkLinear,
            (0.0,) * 3,
            (1.0,) * 3,
            np.eye(3).ravel().tolist(),
            0.0,
        )
        out[start : start + count] = torch.from_numpy(sitk.GetArrayFromImage(slab)).to(out.device)
    return out
