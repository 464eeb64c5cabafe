"""Convolutions of three taps with two thirds of the multiplications: Winograd's F(2, 3) along the depth.

Lavin & Gray 2016, "Fast algorithms for convolutional neural networks", section 4.1, along one axis of a volume: of four
input planes d0..d3 and a kernel's planes g0..g2 the two output planes are

    y0 = m0 + m1 + m2        y1 = m1 - m2 - m3

with m0 = (d0 - d2) * g0,  m1 = (d1 + d2) * (g0 + g1 + g2) / 2,  m2 = (d2 - d1) * (g0 - g1 + g2) / 2 and
m3 = (d1 - d3) * g2, where * is the convolution over the other two axes.  Four of these instead of six, computed by
oneDNN, which has no such algorithm for volumes.  Exact but for rounding, a few times a direct convolution's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# So many bytes of planes are worked on at a time, for them and their sums to stay in a processor's cache.
_SLAB = 4 << 20
# Of fewer channels or taps the planes' sums, and of fewer cells or planes the weights', cost what is spared.
_CHANNELS, _MULTIPLICATIONS, _CELLS, _PLANES = 32, 1 << 30, 512, 6
_LAYOUT = torch.channels_last_3d


def is_worthwhile(conv: nn.Module, volume: Tensor) -> bool:
    """Whether :func:`convolve` can do what a convolution does, with zeros beside the volume, and in less time."""
    if not isinstance(conv, nn.Conv3d):
        return False
    return (
        conv.kernel_size[0] == 3
        and min(conv.kernel_size) >= 3
        and set(conv.stride) == set(conv.dilation) == {1}
        and conv.groups == 1
        and int(conv.padding[0]) < 3
        and min(conv.in_channels, conv.out_channels) >= _CHANNELS
        and volume.shape[2] >= _PLANES
        and volume.shape[2:].numel() >= _CELLS
        and conv.weight.numel() * volume.shape[2:].numel() >= _MULTIPLICATIONS
    )


# One operator, so that who follows the operators of a model sees a convolution and not its planes' sums.
@torch.library.custom_op("volsal::convolution", mutates_args=())
def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    """What ``conv3d`` gives with stride 1 and zeros beside the volume, on a CPU; it has no gradients.

    Parameters
    ----------
    input : (B, C, D, H, W) float32
    weight : (K, C, 3, h, w)
    padding : of the three axes, of the first at most 2

    Returns
    -------
    (B, K, D', H', W'), channels last.
    """
    volume = input.contiguous(memory_format=_LAYOUT)
    first, middle, last = weight.split(1, dim=2)
    half = (first + last) / 2
    kernels = [k.contiguous(memory_format=_LAYOUT) for k in (first, half + middle / 2, half - middle / 2, last)]
    found = torch.empty(_shape(volume, weight, padding), dtype=volume.dtype, memory_format=_LAYOUT)
    plane = volume.element_size() * max(volume[:, :, 0].numel(), found[:, :, 0].numel())
    depth, planes = found.shape[2], 2 * max(1, _SLAB // plane)

    def over_planes(sums: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.mkldnn_convolution(sums, kernel, bias, [0, *padding[1:]], [1] * 3, [1] * 3, 1)

    for start in range(0, depth, planes):
        stop = min(start + planes, depth)
        d0, d1, d2, d3 = _planes(volume, start - padding[0], (stop - start + 1) // 2)
        sums = (d0 - d2).contiguous(memory_format=_LAYOUT)
        m0 = over_planes(sums, kernels[0])
        m1 = over_planes(torch.add(d1, d2, out=sums), kernels[1], bias)
        m2 = over_planes(torch.sub(d2, d1, out=sums), kernels[2])
        m3 = over_planes(torch.sub(d1, d3, out=sums), kernels[3])
        even, odd = found[:, :, start:stop:2], found[:, :, start + 1 : stop : 2]
        torch.add(m0.add_(m2), m1, out=even)
        pairs = odd.shape[2]  # the last plane of an odd number has no second
        torch.sub(m1[:, :, :pairs], m3.add_(m2)[:, :, :pairs], out=odd)
    return found


@convolve.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    return torch.empty(_shape(input, weight, padding), dtype=input.dtype, device=input.device, memory_format=_LAYOUT)


def _shape(volume: Tensor, weight: Tensor, padding: list[int]) -> tuple[int, ...]:
    spatial = [n + 2 * p - k + 1 for n, p, k in zip(volume.shape[2:], padding, weight.shape[2:], strict=True)]
    return (volume.shape[0], weight.shape[0], *spatial)


def _planes(volume: Tensor, start: int, pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d0 to d3 of so many pairs of output planes, (B, C, pairs, H, W) each; zeros where there is no input."""
    depth, stop = volume.shape[2], start + 2 * pairs + 2
    slab = volume[:, :, max(start, 0) : min(stop, depth)]
    if start < 0 or stop > depth:
        slab = functional.pad(slab, (0, 0, 0, 0, max(-start, 0), max(stop - depth, 0)))
    return slab[:, :, 0:-2:2], slab[:, :, 1:-1:2], slab[:, :, 2::2], slab[:, :, 3::2]
