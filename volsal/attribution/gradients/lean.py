"""A backward pass to the input that keeps of the forward pass only what it needs, and no values besides.

With frozen weights the gradient by the input asks little of most steps: of a convolution the weight, of a ReLU one bit
a value, of a max-pool which cell of its window was the largest, of batch normalisation in evaluation mode one number a
channel.  Stock autograd keeps the inputs of all of them, since weights might want a gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from volsal.attribution.gradients.spellings import spellings
from volsal.attribution.tap import ModelError

# Values that are worked on at a time, so that what is needed in passing stays small.
_PIECE = 2**20


class Lean(TorchFunctionMode):
    """Within the block, what the model records for the backward pass is what the gradient by its input needs.

    For use inside :func:`volsal.attribution.tap.undisturbed`, around the forward pass.  The gradient is that of stock
    autograd to rounding.  Covered are, in every spelling that calls a torch function:

    - convolutions, transposed ones too: nothing but the weight; to few channels, as those of a scan, they lead back
      several times faster than stock kernels do (on a CPU)
    - ReLU, ReLU6, LeakyReLU, PReLU of one slope: a bit for each value
    - max-pooling: a byte for each cell of its output
    - batch normalisation in evaluation mode: a number for each channel
    - average pooling and padding: nothing

    Additions, concatenations, linear layers, interpolation and means keep nothing in stock autograd.  What needs its
    values, as a smooth activation or another normalisation does, and what is not known here, is recorded as ever; so is
    a weight that requires grad, a tensor of a subclass, and everything where the model itself says how tensors are to
    be kept, as a checkpoint does.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        step = _step(func)
        if step is None or not args or not _is_recorded(args[0]):
            return func(*args, **kwargs)
        return step(func, *args, **kwargs)


def _step(func: Any) -> Callable[..., Any] | None:
    try:
        return _STEPS.get(func)
    except TypeError:  # an unhashable callable is none of ours
        return None


def _is_recorded(value: Any) -> bool:
    """Whether autograd records a step on this, in the ordinary way."""
    return (
        type(value) is Tensor
        and value.requires_grad
        and torch.is_grad_enabled()
        and value.layout == torch.strided
        and not torch._C._are_functorch_transforms_active()
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )


def _require_once() -> None:
    if torch.is_grad_enabled():
        raise ModelError(
            "the model differentiates its own gradient (create_graph=True), which volsal's backward pass does not "
            "offer; use a class activation map"
        )


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass of which no graph is recorded; one that is asked for is refused.

    ``torch.autograd.function.once_differentiable`` leaves that to the second backward pass, which does not come to see
    the refusal where it is asked for the gradient by the input alone.
    """

    @wraps(backward)
    def run(ctx: Any, *signals: Tensor) -> Any:
        _require_once()
        return backward(ctx, *signals)

    return run


def _wants_grad(*values: Any) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


# --------------------------------------------------------------------------------------------- shapes instead of values


class _Shape(NamedTuple):
    """All that is kept of a tensor whose values play no part."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _by_shape(func: Any, value: Tensor, /, *rest: Any, **named: Any) -> Any:
    """The call, with nothing kept of ``value`` but its shape.

    For functions whose gradient by ``value`` does not depend on its values.
    """
    with saved_tensors_hooks(partial(_packed_of, _memory(value)), _unpacked):
        return func(value, *rest, **named)


def _memory(tensor: Tensor) -> int:
    # A pointer to the bytes would call for the private copy of memory that is copied when written to.
    return tensor.untyped_storage()._cdata


def _packed_of(memory: int, tensor: Tensor) -> Tensor | _Shape:
    if _memory(tensor) != memory:
        return tensor.detach()
    return _Shape(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def _unpacked(kept: Tensor | _Shape) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    _require_once()
    # Its pages are never touched, and so never come into being.
    return torch.empty_strided(kept.size, kept.stride, dtype=kept.dtype, device=kept.device)


# -------------------------------------------------------------------------------------------------------- convolutions


def _convolution(func: Any, value: Tensor, /, *rest: Any, **named: Any) -> Any:
    weight = rest[0] if rest else named.get("weight")
    if not isinstance(weight, Tensor) or weight.requires_grad or _memory(weight) == _memory(value):
        return func(value, *rest, **named)
    geometry = _geometry(value, *rest, **named) if func in _PLAIN_CONVOLUTIONS else None
    if geometry is None:
        return _by_shape(func, value, *rest, **named)
    return Convolution.apply(value, weight, geometry, partial(func, **named), rest)


class _Geometry(NamedTuple):
    """How a convolution runs over its input."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def _geometry(
    value: Tensor,
    /,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Geometry | None:
    """Of a convolution that pads both ends alike; None of any other."""
    axes = weight.ndim - 2
    if value.ndim != weight.ndim or _wants_grad(bias):
        return None
    dilations = _each(dilation, axes)
    if isinstance(padding, str):
        reach = [d * (taps - 1) for d, taps in zip(dilations, weight.shape[2:], strict=True)]
        if padding == "same" and any(r % 2 for r in reach):
            return None
        padding = [r // 2 for r in reach] if padding == "same" else 0
    return _Geometry(_each(stride, axes), _each(padding, axes), dilations, groups)


def _each(setting: Any, axes: int) -> tuple[int, ...]:
    """A setting for each axis, of one that may hold for all."""
    values = tuple(setting) if isinstance(setting, Sequence) else (setting,)
    return values * axes if len(values) == 1 else values


class Convolution(Function):
    """A convolution of which nothing is kept but the weight."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, weight: Tensor, geometry: _Geometry, convolve: Callable[..., Tensor], rest: tuple
    ) -> Tensor:
        """The stock output."""
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = value.shape, geometry
        return convolve(value, *rest)

    @staticmethod
    @_once
    def backward(ctx: Any, *signals: Tensor) -> Any:
        """By torch's own kernels, or by one of those below where it is faster."""
        (weight,), (signal,), shape, geometry = ctx.saved_tensors, signals, ctx.shape, ctx.geometry
        to_input = _way_back(signal, weight, shape, geometry)
        # Autocast has chosen the output's precision, which the stock backward pass keeps to.
        with torch.autocast(signal.device.type, enabled=False):
            found = to_input(signal, weight.to(signal.dtype), shape, geometry)
        return found, None, None, None, None


def _way_back(signal: Tensor, weight: Tensor, shape: torch.Size, geometry: _Geometry) -> Callable[..., Tensor]:
    """Which of the functions below takes the least time and memory; all give the gradient by the input."""
    stride, padding, dilation, groups = geometry
    if groups > 1 or set(dilation) != {1}:
        return _to_input
    if set(weight.shape[2:]) == set(stride) == {1} and set(padding) == {0}:
        return _to_each_voxel
    on_cpu = signal.device.type == "cpu"
    if on_cpu and shape[1] <= 4 and signal.dtype in (torch.float32, torch.float64):
        return _to_few_channels
    small = on_cpu and signal.dtype == torch.float32 and signal.numel() < _PIECE and len(weight) <= 128
    inside = all(pad < taps for pad, taps in zip(padding, weight.shape[2:], strict=True))
    if small and inside and weight.ndim == 5 and set(stride) == {1} and torch.backends.mkldnn.is_available():
        return _to_small_map
    return _to_input


def _to_input(signal: Tensor, weight: Tensor, shape: torch.Size, geometry: _Geometry) -> Tensor:
    """The gradient of a convolution by its input of that shape, by torch's own kernels."""
    stride, padding, dilation, groups = geometry
    none = (0,) * len(stride)
    if signal.device.type == "cpu" and signal.numel() < _PIECE:
        # Small maps go another, slow way as transposed convolutions.  The stand-in for the input is never touched.
        ways = stride, padding, dilation, False, none, groups, (True, False, False)
        return torch.ops.aten.convolution_backward(signal, signal.new_empty(shape), weight, None, *ways)[0]
    whole = zip(shape[2:], signal.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    beyond = [size - ((cells - 1) * s - 2 * p + d * (taps - 1) + 1) for size, cells, taps, s, p, d in whole]
    return torch.ops.aten.convolution(signal, weight, None, stride, padding, dilation, True, beyond, groups)


def _to_each_voxel(signal: Tensor, weight: Tensor, shape: torch.Size, geometry: _Geometry) -> Tensor:
    """The gradient of a convolution of one tap by its input: one product of matrices."""
    return torch.matmul(weight.flatten(1).T, signal.flatten(2)).view(shape)


def _to_small_map(signal: Tensor, weight: Tensor, shape: torch.Size, geometry: _Geometry) -> Tensor:
    """The gradient of a convolution at stride 1 by its input: a convolution with the mirrored kernel.

    By oneDNN, which torch does not use for small maps; its own way takes up to eight times as long.
    """
    mirrored = weight.flip(*range(2, weight.ndim)).transpose(0, 1).contiguous()
    padding = [taps - 1 - pad for pad, taps in zip(geometry.padding, weight.shape[2:], strict=True)]
    ways = geometry.stride, geometry.dilation, geometry.groups
    return torch.mkldnn_convolution(signal, mirrored, None, padding, *ways)


def _to_few_channels(signal: Tensor, weight: Tensor, shape: torch.Size, geometry: _Geometry) -> Tensor:
    r"""The gradient of a convolution by its input (B, few, *spatial).

    Along the last axis, input voxel x = s q + r - p, of phase r, collects from outputs o = q - m the taps s m + r: a
    forward convolution at stride 1, in which the phases, and all taps of the other axes, are output channels.  These
    are then added up where each lies.
    """
    (*strides, stride), pads = geometry.stride, geometry.padding
    channels, (*sizes, taps) = weight.shape[1], weight.shape[2:]
    batch, (*cells, last) = len(signal), signal.shape[2:]
    turns = -(-taps // stride)
    width = last + turns - 1
    kernel = F.pad(weight, (0, turns * stride - taps)).unflatten(-1, (turns, stride))
    kernel = kernel.movedim((0, -2), (-2, -1)).flip(-1)  # (channels, *sizes, phase, output, turn)
    kernel = kernel.reshape(-1, kernel.shape[-2], 1, turns)
    reach = [(n - 1) * step + size for n, step, size in zip(cells, strides, sizes, strict=True)]
    found = signal.new_zeros(batch, channels, stride, *reach, width)
    rows = max(1, _PIECE // (batch * len(kernel) * math.prod(cells[1:]) * width))
    for start in range(0, cells[0] if cells else 1, rows):
        part = signal[:, :, start : start + rows] if cells else signal
        held = part.shape[2:-1]
        owed = F.conv2d(part.reshape(batch, -1, math.prod(held), last), kernel, padding=(0, turns - 1))
        owed = owed.view(batch, channels, -1, stride, *held, width)
        firsts = (start, *(0,) * len(cells))
        for number, tap in enumerate(itertools.product(*map(range, sizes))):
            begins = [at + step * first for at, step, first in zip(tap, strides, firsts, strict=False)]
            lines = zip(begins, strides, held, strict=True)
            at: tuple[Any, ...] = (..., *(slice(b, b + n * step, step) for b, step, n in lines), slice(None))
            found[at] += owed[:, :, number]
    found = found.movedim(2, -1).flatten(-2)
    # Without the padding, and with the voxels that no window reaches.
    edges = [(-pad, pad + size - have) for pad, size, have in zip(pads, shape[2:], found.shape[2:], strict=True)]
    return F.pad(found, [edge for pair in reversed(edges) for edge in pair])


# --------------------------------------------------------------------------------------------------------- activations


class _Corner(NamedTuple):
    """An activation that is linear on either side of its corner, or between two."""

    passing: Callable[[Tensor], Tensor]  # where the slope is 1
    slope: float = 0.0  # elsewhere


def _positive(values: Tensor) -> Tensor:
    return values > 0


def _below_six(values: Tensor) -> Tensor:
    return (values > 0) & (values < 6)


def _relu(*rest: Any, **named: Any) -> _Corner:
    return _Corner(_positive)


def _relu6(*rest: Any, **named: Any) -> _Corner:
    return _Corner(_below_six)


def _leaky_relu(negative_slope: float = 0.01, *rest: Any, **named: Any) -> _Corner:
    return _Corner(_positive, negative_slope)


def _prelu(weight: Tensor) -> _Corner | None:
    return _Corner(_positive, float(weight)) if weight.numel() == 1 else None


_RECTIFIERS: dict[str, Callable[..., _Corner | None]] = {
    "relu": _relu,
    "relu6": _relu6,
    "leaky_relu": _leaky_relu,
    "prelu": _prelu,
}


def _activation(corner_of: Callable[..., _Corner | None], func: Any, value: Tensor, /, *rest: Any, **named: Any) -> Any:
    corner = corner_of(*rest, **named)
    if corner is None or _wants_grad(*rest, *named.values()):
        return func(value, *rest, **named)
    return Cornered.apply(value, corner, partial(func, **named), rest)


class Cornered(Function):
    """An activation of two slopes; of its input a bit a value is kept."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, corner: _Corner, call: Callable[..., Tensor], rest: tuple) -> Tensor:
        """The stock output; written into the input where the call does."""
        ctx.order, ctx.slope = _order(value), corner.slope
        flat = value.permute(ctx.order).reshape(-1)
        bits = torch.empty(-(-len(flat) // 8), dtype=torch.uint8, device=value.device)
        for piece, eighth in _pieces(len(flat)):
            bits[eighth] = _bits(corner.passing(flat[piece]))
        ctx.save_for_backward(bits)
        output = call(value, *rest)
        if output is value:
            ctx.mark_dirty(value)
        return output

    @staticmethod
    @_once
    def backward(ctx: Any, *signals: Tensor) -> Any:
        """The signal, times the slopes."""
        (bits,) = ctx.saved_tensors
        signal = signals[0].permute(ctx.order)
        flat, shape = signal.reshape(-1), signal.shape
        found = torch.empty_like(flat)
        for piece, eighth in _pieces(len(flat)):
            passing = _flags(bits[eighth], len(flat[piece])).to(flat.dtype)
            if ctx.slope:
                torch.ops.aten.leaky_relu_backward(flat[piece], passing, ctx.slope, False, grad_input=found[piece])
            else:
                torch.ops.aten.threshold_backward(flat[piece], passing, 0, grad_input=found[piece])
        back = sorted(range(len(ctx.order)), key=ctx.order.__getitem__)
        return found.view(shape).permute(back), None, None, None


def _order(value: Tensor) -> list[int]:
    """The axes as they lie in memory, so that the flattened values need no copy."""
    return sorted(range(value.ndim), key=lambda axis: -value.stride()[axis])


def _pieces(length: int) -> Iterator[tuple[slice, slice]]:
    """Runs of values, and of the bytes that hold their bits."""
    for start in range(0, length, _PIECE):
        stop = min(start + _PIECE, length)
        yield slice(start, stop), slice(start // 8, -(-stop // 8))


def _bits(flags: Tensor) -> Tensor:
    """Booleans (N,) as bits, eight to a byte, the first the highest."""
    if flags.device.type == "cpu":
        return torch.from_numpy(np.packbits(flags.numpy()))
    columns = F.pad(flags.byte(), (0, -len(flags) % 8)).view(-1, 8)
    return (columns << _places(flags.device)).sum(1, dtype=torch.uint8)


def _flags(bits: Tensor, length: int) -> Tensor:
    """The inverse of :func:`_bits`."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits.numpy(), count=length)).view(torch.bool)
    return ((bits[:, None] >> _places(bits.device)) & 1).view(-1)[:length].bool()


def _places(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)


# -------------------------------------------------------------------------------------------------------- normalisation


def _batch_norm(
    func: Any,
    value: Tensor,
    /,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    settings = (running_mean, running_var, weight, bias, training, momentum, eps)
    if training or running_var is None or _wants_grad(*settings):
        return func(value, *settings)
    scale = (running_var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    # As wide as the stock kernels compute, for half precision too.
    scale = scale.to(torch.promote_types(value.dtype, torch.float32)).view(-1, *(1,) * (value.ndim - 2))
    return Scaled.apply(value, scale, func, settings)


class Scaled(Function):
    """A function of the input that is a multiple of it, channel by channel, and a constant."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor, func: Callable[..., Tensor], settings: tuple) -> Tensor:
        """The stock output."""
        ctx.save_for_backward(scale)
        return func(value, *settings)

    @staticmethod
    @_once
    def backward(ctx: Any, *signals: Tensor) -> Any:
        """The signal, times the scale."""
        (scale,) = ctx.saved_tensors
        return torch.mul(signals[0], scale, out=torch.empty_like(signals[0])), None, None, None


# --------------------------------------------------------------------------------------------------------- max-pooling

_INDEXED = {
    "max_pool1d": F.max_pool1d_with_indices,
    "max_pool2d": F.max_pool2d_with_indices,
    "max_pool3d": F.max_pool3d_with_indices,
}


def _max_pool(
    indexed: Callable[..., tuple[Tensor, Tensor]], axes: int, func: Any, value: Tensor, /, *rest: Any, **named: Any
) -> Any:
    window, ceil_mode = _window(axes, value, *rest, **named)
    if window is None:
        return func(value, *rest, **named)
    return MaxPool.apply(value, window, partial(indexed, ceil_mode=ceil_mode))


def _window(
    axes: int,
    value: Tensor,
    /,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[_Window | None, bool]:
    """The window of a pooling whose choices fit into a byte, and None of any other; whether sizes are rounded up."""
    kernel = _each(kernel_size, axes)
    if return_indices or value.ndim != axes + 2 or math.prod(kernel) > 256:
        return None, ceil_mode
    steps = kernel if stride in (None, [], ()) else _each(stride, axes)
    return _Window(kernel, steps, _each(padding, axes), _each(dilation, axes), tuple(value.shape[2:])), ceil_mode


class _Window(NamedTuple):
    """A pooling window on an input of a size."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    size: tuple[int, ...]

    def taps(self, device: torch.device) -> Tensor:
        """How far each of the window's cells lies behind its first, in voxels of the flattened input, ascending."""
        lines = zip(self.kernel, self.dilation, strict=True)
        return self._flat([torch.arange(k) * d for k, d in lines]).unique().to(device)

    def first(self, cells: Sequence[int], device: torch.device) -> Tensor:
        """Where in the flattened input the window of each of the output's cells begins."""
        lines = zip(cells, self.stride, self.padding, strict=True)
        return self._flat([torch.arange(n) * s - p for n, s, p in lines]).to(device)

    def _flat(self, at: Sequence[Tensor]) -> Tensor:
        flat = torch.zeros((), dtype=torch.long)
        for along, size in zip(at, self.size, strict=True):
            flat = flat[..., None] * size + along
        return flat.flatten()


class MaxPool(Function):
    """Max-pooling; which cell of its window was the largest is kept as one byte."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, window: _Window, indexed: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        """The stock output."""
        output, index = indexed(value, *window[:4])
        taps, first = window.taps(value.device), window.first(output.shape[2:], value.device)
        flat = index.flatten(0, 1).flatten(1)
        chosen = torch.empty(flat.shape, dtype=torch.uint8, device=value.device)
        for maps in _several(flat):
            chosen[maps] = torch.searchsorted(taps, (flat[maps] - first).contiguous())
        ctx.save_for_backward(chosen)
        ctx.shape, ctx.window = value.shape, window
        return output

    @staticmethod
    @_once
    def backward(ctx: Any, *signals: Tensor) -> Any:
        """Each cell's signal, to the voxel that it was taken from."""
        (chosen,) = ctx.saved_tensors
        signal, window = signals[0], ctx.window
        taps, first = window.taps(signal.device), window.first(signal.shape[2:], signal.device)
        found = signal.new_zeros(ctx.shape)
        flat, owed = found.view(len(chosen), -1), signal.reshape(chosen.shape)
        for maps in _several(chosen):
            flat[maps].scatter_add_(1, first + taps[chosen[maps].long()], owed[maps])
        return found, None, None


def _several(rows: Tensor) -> Iterator[slice]:
    """Runs of the rows of (N, values) that are worked on at a time."""
    step = max(1, _PIECE // max(1, rows.shape[1]))
    return (slice(start, start + step) for start in range(0, len(rows), step))


# ------------------------------------------------------------------------------------------------------------ the table

_PLAIN_CONVOLUTIONS = frozenset(getattr(F, f"conv{axes}d") for axes in (1, 2, 3))
_CONVOLUTIONS = ("convolution", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)))
_SHAPED = ("pad", *(f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)))

_STEPS: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    **dict.fromkeys(spellings(_CONVOLUTIONS), _convolution),
    **dict.fromkeys(spellings(_SHAPED), _by_shape),
    **{call: partial(_activation, _RECTIFIERS[name]) for call, name in spellings(_RECTIFIERS).items()},
    **{call: partial(_max_pool, _INDEXED[name], int(name[-2])) for call, name in spellings(_INDEXED).items()},
}

#: The autograd functions of this module that stand for no activation.
NO_ACTIVATIONS: tuple[type[Function], ...] = (Convolution, Scaled, MaxPool)
