"""How an activation function passes gradient back, and the proof that none was missed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from volsal.errors import VolsalError


class CoverageError(VolsalError, RuntimeError):
    """A rule did not reach the model's activation functions, so its map would be another method's map."""


# Activation functions by what torch calls them; a trailing underscore (in place) is understood.
_ACTIVATIONS = (
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus",
    "hardswish",
)  # fmt: skip
# These rectify for some arguments only.
_CLAMPS = ("clamp", "clip", "clamp_min", "hardtanh", "threshold", "_threshold", "maximum", "max")
_NAMESPACES: tuple[Any, ...] = (F, torch, Tensor, torch._C._nn)


def _spellings(names: tuple[str, ...]) -> dict[Any, str]:
    found: dict[Any, str] = {}
    for name in names:
        for spelling in (name, f"{name}_"):
            for space in _NAMESPACES:
                if (function := getattr(space, spelling, None)) is not None:
                    found[function] = name.strip("_")
            # Exported programs call the operators themselves.
            if (packet := getattr(torch.ops.aten, spelling, None)) is not None:
                found |= {getattr(packet, overload): name.strip("_") for overload in packet.overloads()}
    return found


_ALWAYS = _spellings(_ACTIVATIONS)
_SOMETIMES = _spellings(_CLAMPS)

# What autograd calls their backward nodes: an independent count of what there was to cover.
_NODES = (
    "Relu", "LeakyRelu", "PreluKernel", "RreluWithNoise", "Elu", "Celu", "Gelu", "Silu", "Mish", "Softplus",
    "Hardswish",
)  # fmt: skip


# Nodes that rectify where the bound they saved is 0.
_BOUNDS = {
    "Threshold": "_saved_threshold",
    "Hardtanh": "_saved_min_val",
    "ClampMin": "_saved_min",
    "Clamp": "_saved_min",
}


class GuidedRule(TorchFunctionMode):
    r"""Guided backpropagation's rule, Springenberg et al., ICLR workshop 2015, section 3, eq. for "guided".

    For y = f(x) with an activation function f and R the signal on its way back,

    .. math:: R_x = f'(x) \, \max(0, R_y)

    For ReLU, f' is 1 where x > 0 and 0 elsewhere: this is the paper's rule to the letter, what was negative forward or
    backward is stopped.  The paper knows ReLU only; for the others the same formula is the stated generalisation, with
    f' their own derivative: LeakyReLU, PReLU and RReLU let the slope's share through where x < 0; ELU, SELU, CELU,
    GELU, SiLU, Mish, Softplus and Hardswish weigh by their smooth derivative.  Gates (sigmoid, tanh) are not
    rectifiers and keep their own gradient.

    Caught in every spelling that calls a torch function: modules, functions, tensor methods, in-place forms, ``clamp``
    or ``threshold`` or ``maximum`` at 0, exported operators.  Written out by hand (``x * (x > 0)``) it is arithmetic
    and is not caught.

    Attributes
    ----------
    coverage : how many activations of each kind the rule was put on
    """

    def __init__(self) -> None:
        super().__init__()
        self.coverage: Counter[str] = Counter()
        self._covered: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        # The question is asked before the call: an in-place function changes what it was asked about.
        name = _name(func, args, kwargs)
        output = func(*args, **kwargs)
        if name and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(_positive)
            self._covered.add(output.grad_fn)
            self.coverage[name] += 1
        return output

    def require_complete(self, scores: list[Tensor]) -> None:
        """Raise :class:`CoverageError` where the recorded graph holds an activation that the rule did not reach."""
        graph = set(_nodes(scores))
        missed = Counter(
            node.name() for node in graph if node not in self._covered and (_is_activation(node) or _is_custom(node))
        )
        # An activation that writes into a part of a tensor leaves its guided node outside the path that is taken.
        writes = [node for node in graph if node.name().endswith("CopySlices")]
        if writes and not self._covered <= graph:
            missed["in-place activation of a part of a tensor"] += len(writes)
        if missed:
            listed = ", ".join(f"{count} x {name}" for name, count in missed.items())
            raise CoverageError(
                f"guided backprop cannot reach every activation of this model: {listed} (custom autograd functions and "
                "re-entrant checkpoints hide what they do); turn them off for explaining, or use input-gradient"
            )
        if not self.coverage:
            raise CoverageError(
                "guided backprop found no activation function to guide in this model, so its map would be the plain "
                "gradient under another name; use input-gradient"
            )


def _positive(gradient: Tensor) -> Tensor:
    return gradient.clamp(min=0)


def _name(func: Any, args: tuple, kwargs: dict) -> str | None:
    """The activation that this call is, or None."""
    try:
        if func in _ALWAYS:
            return _ALWAYS[func]
        name = _SOMETIMES.get(func)
    except TypeError:  # an unhashable callable is none of ours
        return None
    return "relu" if name and _RECTIFIES[name](args, kwargs) else None


def _argument(args: tuple, kwargs: dict, position: int, *names: str) -> Any:
    if len(args) > position:
        return args[position]
    return next((kwargs[name] for name in names if name in kwargs), None)


def _is_zero(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.requires_grad and not value.any()
    return isinstance(value, (int, float)) and value == 0


def _clamp_at_zero(args: tuple, kwargs: dict) -> bool:
    return _is_zero(_argument(args, kwargs, 1, "min", "min_val"))


def _threshold_at_zero(args: tuple, kwargs: dict) -> bool:
    return _is_zero(_argument(args, kwargs, 1, "threshold")) and _is_zero(_argument(args, kwargs, 2, "value"))


def _larger_than_zero(args: tuple, kwargs: dict) -> bool:
    operands = (_argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "other"))
    return all(isinstance(operand, Tensor) for operand in operands) and any(map(_is_zero, operands))


_RECTIFIES: dict[str, Callable[[tuple, dict], bool]] = {
    "clamp": _clamp_at_zero,
    "clip": _clamp_at_zero,
    "clamp_min": _clamp_at_zero,
    "hardtanh": _clamp_at_zero,
    "threshold": _threshold_at_zero,
    "maximum": _larger_than_zero,
    "max": _larger_than_zero,
}


def _nodes(scores: list[Tensor]) -> Iterator[Any]:
    """Every node of the autograd graph behind ``scores``, once."""
    waiting = [score.grad_fn for score in scores if score.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def _is_activation(node: Any) -> bool:
    name = node.name().split("Backward")[0]
    if name in _BOUNDS:
        return bool(getattr(node, _BOUNDS[name], None) == 0)
    return name in _NODES


def _is_custom(node: Any) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction)
