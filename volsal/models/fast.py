"""A private copy of a model that says the same for less: batch norms folded into convolutions, channels last.

An opt-in.  The copy is checked against the model on an input before anything is made with it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from volsal.attribution.structure import bare
from volsal.attribution.tap import ModelError, find_layer, forward, plain, undisturbed
from volsal.models import winograd

# Largest difference of an output, over the output's largest magnitude: in the model's own precision, and in a coarser.
_SAME = 1e-4
_NEAR = 0.1
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# At most so many input channels make a convolution a stem.
_STEM = 4
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class FastCopy:
    """What was done to a copy.

    Attributes
    ----------
    folded : (convolution, batch norm) by name, in the order in which they run
    norms : how many batch norms run at all
    dtype : of the copy's weights, where it is not the model's
    error : largest difference of the copy's output from the model's, over the largest magnitude of the model's
    """

    folded: tuple[tuple[str, str], ...]
    norms: int
    dtype: torch.dtype | None
    error: float

    @property
    def allowed(self) -> float:
        """What :attr:`error` was at most allowed to be."""
        return _SAME if self.dtype is None else _NEAR

    def describe(self) -> dict[str, Any]:
        """As plain data, for records: without :attr:`error`, which differs with the input that the copy was made on."""
        return {
            "folded": len(self.folded),
            "norms": self.norms,
            "dtype": str(self.dtype).removeprefix("torch.") if self.dtype else None,
            "within": self.allowed,
        }

    def __str__(self) -> str:
        done = f"{len(self.folded)} of {self.norms} batch norms folded into convolutions, channels last"
        if self.dtype is None:
            return f"{done}; outputs within {self.error:.1e} of the model's"
        return (
            f"{done}, in {str(self.dtype).removeprefix('torch.')}: an approximation, whose outputs were within "
            f"{self.allowed:g} of the model's"
        )


def fast(model: nn.Module, example: Tensor, dtype: torch.dtype | None = None, keep: Sequence[str] = ()) -> nn.Module:
    """A copy of ``model`` for inference and explaining that needs less time and memory; ``model`` stays as it is.

    A batch norm in evaluation mode is an affine map per channel, so behind a convolution it goes into the convolution's
    weights, wherever ``example`` shows that nothing else takes the convolution's output.  Convolution weights are laid
    out channels last, which spares the reordering of every activation.  On a CPU a stem is computed by rows, and every
    convolution by oneDNN, the large ones of three taps with two thirds of the multiplications
    (:mod:`volsal.models.winograd`).
    Layers keep their names and outputs, but for folded convolutions, whose own output no longer comes to be: asking for
    one as a layer is an error.

    Maps agree with the model's within rounding: 1e-4 of their maximum is a safe bound in float32, but where the model
    itself is computed in less (TF32).  The copy holds weights of its own, as they are now.

    Parameters
    ----------
    model : any module; what is inside ``DataParallel`` and ``torch.compile`` is deep-copied
    example : an input (B, C, *spatial), of the kind the copy is for
    dtype : of the copy's weights and activations, e.g. ``torch.bfloat16``, which is an approximation (about 0.06 of a
        map's maximum on ResNets) and fast only on hardware that computes in it; None: the model's own.  Inputs are
        cast by the copy
    keep : layers whose own output is wanted, though they might be folded

    Raises
    ------
    ModelError
        Where the model cannot be copied or run, or the copy does not say on ``example`` what the model says: within
        1e-4 of the output's largest magnitude, 0.1 where ``dtype`` is given.
    LayerError
        For a layer to keep that the model does not have.
    """
    model, example = bare(model), plain(example)[:1]
    with torch.autocast(example.device.type, enabled=False), undisturbed(model), torch.no_grad(), _ieee():
        pairs, norms, expected = _observe(model, example, keep)
        made = _copied(model)  # frozen, and in evaluation mode, as the model is in here
        for conv, norm in pairs:
            _fold(made, conv, norm)
        for module in made.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.ndim in _LAYOUTS:
                weight.data = weight.data.clone(memory_format=_LAYOUTS[weight.ndim])
            module.__class__ = _STRAIGHT.get(type(module), type(module))
        if dtype is not None:
            made.to(dtype)
            made.register_forward_pre_hook(partial(_cast, dtype), with_kwargs=True)
        error = _require_same(made, example, expected, dtype)
    _MADE[made] = FastCopy(tuple(pairs), norms, dtype, error)
    return made


def fast_copy(model: nn.Module) -> FastCopy | None:
    """What was done to a copy that :func:`fast` made; None for any other model."""
    return _MADE.get(model)


_MADE: WeakKeyDictionary[nn.Module, FastCopy] = WeakKeyDictionary()


class _Uses(TorchDispatchMode):
    """Counts how many operations take each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def of(self, tensor: Tensor) -> list[int]:
        """The count, which goes on and outlives the tensor."""
        if tensor not in self._counts:
            self._counts[tensor] = [0]
        return self._counts[tensor]

    def take(self, tree: Any) -> None:
        """Count one more use of each tensor in ``tree``."""
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self.of(leaf)[0] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.take((args, kwargs))
        return func(*args, **(kwargs or {}))


def _observe(model: nn.Module, example: Tensor, keep: Sequence[str]) -> tuple[list[tuple[str, str]], int, Any]:
    """(convolution, norm) pairs that can be folded, the number of norms that ran, and the model's output."""
    uses = _Uses()
    ran: set[str] = set()
    makers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # convolution outputs -> names
    found: list[tuple[str, str, list[int]]] = []
    modules = {name: module for name, module in model.named_modules() if not _hooked(module)}
    convolutions = {name: m for name, m in modules.items() if type(m) in _CONVOLUTIONS and _plain_groups(m)}
    norms = {name: m for name, m in modules.items() if type(m) in _NORMS}

    def made(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        makers[output] = name

    def reached(name: str, module: nn.Module, args: tuple) -> None:
        ran.add(name)
        before = makers.get(args[0]) if args else None
        if before is not None and not module.training and module.running_mean is not None:
            found.append((before, name, uses.of(args[0])))

    with ExitStack() as stack:
        for name in keep:
            handle = find_layer(model, name).register_forward_hook(lambda module, args, output: uses.take(output))
            stack.callback(handle.remove)
        for name, conv in convolutions.items():
            stack.callback(conv.register_forward_hook(partial(made, name)).remove)
        for name, norm in norms.items():
            stack.callback(norm.register_forward_pre_hook(partial(reached, name)).remove)
        with uses:
            output = forward(model, plain(example))
        uses.take(output)
    pairs = []
    for conv, norm, count in found:
        # Used once, too, are the weights and statistics of what runs once.
        own = [t for part in (convolutions[conv], norms[norm]) for t in (*part.parameters(), *part.buffers()) if t.ndim]
        if count == [1] and all(uses.of(t) == [1] for t in own):
            pairs.append((conv, norm))
    return pairs, len(ran), output


def _hooked(module: nn.Module) -> bool:
    """Whether someone listens to this very layer."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _plain_groups(module: Any) -> bool:
    """Whether output channels are one axis of the weight, as they are not in a grouped transposed convolution."""
    return not module.transposed or module.groups == 1


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the model cannot be copied ({reason}), so it has no fast copy; explain the model itself"
        ) from error


def _fold(model: nn.Module, conv_name: str, norm_name: str) -> None:
    """Put the convolution with the norm in it where the norm was, so that this name's output stays what it was."""
    conv: Any = model.get_submodule(conv_name)
    norm: Any = model.get_submodule(norm_name)
    dtype = conv.weight.dtype
    folded: nn.Module = fuse_conv_bn_eval(conv.double(), norm.double(), conv.transposed).to(dtype)
    if _is_stem(conv):
        folded = _by_rows(folded)
    folded.register_forward_pre_hook(_what_was_kept)
    instead = {conv: _Folded(), norm: folded}  # under every name that they have
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in instead:
                parent._modules[key] = instead[child]


def _is_stem(conv: Any) -> bool:
    """Whether a convolution takes few channels in, and fewer than go out even when its last axis is among them."""
    channels = conv.in_channels * conv.kernel_size[-1]
    plain = conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"
    return (
        type(conv) in (nn.Conv2d, nn.Conv3d)
        and conv.weight.device.type == "cpu"
        and conv.in_channels <= _STEM < channels <= conv.out_channels
        and plain
        and not isinstance(conv.padding, str)
    )


def _by_rows(conv: Any) -> nn.Module:
    """The same convolution with its kernel's last axis among the channels, exactly.

    A processor works along channels, of which a scan has one: a first convolution, of ones and zeros, makes channels of
    a voxel's neighbours along the last axis, and the second weighs them.
    """
    *kernel, taps = conv.kernel_size
    *strides, stride = conv.stride
    *paddings, padding = conv.padding
    made = {"dtype": conv.weight.dtype, "device": conv.weight.device}
    channels, ones, zeros = conv.in_channels, [1] * len(kernel), [0] * len(kernel)
    gather = type(conv)(
        channels, channels * taps, (*ones, taps), (*ones, stride), (*zeros, padding), bias=False, **made
    )
    weigh = type(conv)(channels * taps, conv.out_channels, (*kernel, 1), (*strides, 1), (*paddings, 0), **made)
    # Output (c, t) is input c, t taps further.
    gather.weight.data = torch.eye(channels * taps, **made).reshape(channels * taps, channels, *ones, taps)
    weigh.weight.data = conv.weight.data.movedim(-1, 2).flatten(1, 2)[..., None]
    weigh.bias = conv.bias
    return nn.Sequential(gather, weigh).eval().requires_grad_(False)


class _Straight:
    """Convolves by oneDNN, where that can be, and after Winograd, where that spares time.

    On one thread torch takes a plain way of its own where a kernel has one tap or the map is small, which unrolls the
    map with its channels first: a fifth of a ResNet50's time went into reordering.
    """

    def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Then the rules of gradients look at the call, and not every operator has gradients.
        follows = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        if follows or not _is_onednn(self, input, weight):
            return super()._conv_forward(input, weight, bias)  # type: ignore[misc]
        if winograd.is_worthwhile(self, input):
            return winograd.convolve(input, weight, bias, self.padding)
        return torch.mkldnn_convolution(input, weight, bias, self.padding, self.stride, self.dilation, self.groups)


class _StraightConv2d(_Straight, nn.Conv2d):
    pass


class _StraightConv3d(_Straight, nn.Conv3d):
    pass


_STRAIGHT: dict[type, type] = {nn.Conv2d: _StraightConv2d, nn.Conv3d: _StraightConv3d}


def _is_onednn(conv: Any, volume: Tensor, weight: Tensor) -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and {volume.dtype, weight.dtype} == {torch.float32}
        and {volume.device.type, weight.device.type} == {"cpu"}
        and volume.ndim == weight.ndim
        and volume.numel() > 0
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and not torch.is_autocast_enabled("cpu")
    )


class _Folded(nn.Module):
    """Stands where a convolution was that now runs where its batch norm was, and hands that its input."""

    def forward(self, volume: Tensor) -> FoldedConvolution:
        return FoldedConvolution(volume)


@dataclass(frozen=True, eq=False)
class FoldedConvolution:
    """A convolution that is yet to run.  Whatever expects its output, a tap for instance, finds no tensor here."""

    volume: Tensor


def _what_was_kept(module: nn.Module, args: tuple[FoldedConvolution]) -> Tensor:
    return args[0].volume


def _cast(dtype: torch.dtype, module: nn.Module, args: tuple, kwargs: dict) -> tuple[Any, Any]:
    cast = lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
    return tree_map(cast, args), tree_map(cast, kwargs)


@contextmanager
def _ieee() -> Iterator[None]:
    """Convolutions in full float32, where CUDA would take TF32, in which equal networks differ by a thousandth."""
    backend: Any = torch.backends.cudnn
    setting = backend.conv
    before = setting.fp32_precision
    setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


def _require_same(made: nn.Module, example: Tensor, expected: Any, dtype: torch.dtype | None) -> float:
    """The copy's largest error on ``example``; ModelError where it is more than can be allowed."""
    try:
        found = forward(made, plain(example))
    except ModelError as refusal:
        raise ModelError(
            f"the model has no fast copy: {refusal}; explain the model itself, or keep= the layer that it reads"
        ) from refusal
    error = max((_error(a, b) for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True)), default=0.0)
    allowed = _SAME if dtype is None else _NEAR
    if not error <= allowed:
        raise ModelError(
            f"the fast copy's output differs from the model's by {error:.1e} of its largest magnitude, more than "
            f"{allowed:g}, so it is not used; explain the model itself"
        )
    return error


def _error(found: Any, expected: Any) -> float:
    if not isinstance(expected, Tensor) or not expected.numel():
        return 0.0
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny))
