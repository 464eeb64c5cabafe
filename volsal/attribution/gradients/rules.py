"""How an activation function passes gradient back, and the proof that none was missed.

To add a rule: a :class:`BackwardRule` whose ``__torch_function__`` changes the calls that it is about and adds the
autograd nodes that stand for them to those that it covers.
"""

from __future__ import annotations

from abc import ABC
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from volsal.attribution.gradients.lean import NO_ACTIVATIONS
from volsal.attribution.gradients.spellings import spellings
from volsal.attribution.tap import copied_on_write
from volsal.errors import VolsalError


class CoverageError(VolsalError, RuntimeError):
    """A rule did not reach the model's activation functions, so its map would be another method's map."""


# Activation functions by what torch calls them; a trailing underscore (in place) is understood.
ACTIVATIONS = (
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus",
    "hardswish",
)  # fmt: skip
# These rectify for some arguments only.
_CLAMPS = ("clamp", "clip", "clamp_min", "hardtanh", "threshold", "_threshold", "maximum", "max")

_ALWAYS = spellings(ACTIVATIONS)
_SOMETIMES = spellings(_CLAMPS)

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


class BackwardRule(TorchFunctionMode, ABC):
    """A rule for the backward pass, on every activation that the model calls inside the ``with`` block.

    Caught in every spelling that calls a torch function: modules, functions, tensor methods, in-place forms, ``clamp``
    or ``threshold`` or ``maximum`` at 0, exported operators.  Written out by hand (``x * (x > 0)``) an activation is
    arithmetic and is not caught.

    Attributes
    ----------
    coverage : how many activations of each kind the rule was put on
    """

    #: What the errors call the method.
    method: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.coverage: Counter[str] = Counter()
        self._covered: set[Any] = set()

    def cover(self, name: str, node: Any) -> None:
        """Count an activation, and remember the autograd node that stands for it."""
        self._covered.add(node)
        self.coverage[name] += 1

    def require_complete(self, scores: list[Tensor]) -> None:
        """Raise :class:`CoverageError` where the rule missed an activation in the recorded graph, or found none."""
        self.require_none_missed(scores)
        if not self.coverage:
            raise CoverageError(
                f"{self.method} found no activation function to put its rule on in this model, so its map would be the "
                "plain gradient under another name; use input-gradient"
            )

    def require_none_missed(self, scores: list[Tensor]) -> None:
        """Raise :class:`CoverageError` where the recorded graph holds an activation that the rule did not reach."""
        graph = set(_nodes(scores))
        missed = Counter(
            node.name() for node in graph if node not in self._covered and (self.is_meant(node) or _is_custom(node))
        )
        # An activation that writes into a part of a tensor may leave its node outside the path that is taken.
        writes = [node for node in graph if node.name().endswith("CopySlices")]
        if writes and not self._covered <= graph:
            missed["in-place activation of a part of a tensor"] += len(writes)
        if missed:
            listed = ", ".join(f"{count} x {name}" for name, count in missed.items())
            raise CoverageError(
                f"{self.method} cannot reach every activation of this model: {listed} (custom autograd functions and "
                "re-entrant checkpoints hide what they do); turn them off for explaining, or use input-gradient"
            )

    def is_meant(self, node: Any) -> bool:
        """Whether an autograd node is an activation that should have had this rule."""
        return _is_activation(node)


class GuidedRule(BackwardRule):
    r"""Guided backpropagation's rule, Springenberg et al., ICLR workshop 2015, section 3, eq. for "guided".

    For y = f(x) with an activation function f and R the signal on its way back,

    .. math:: R_x = f'(x) \, \max(0, R_y)

    For ReLU, f' is 1 where x > 0 and 0 elsewhere: this is the paper's rule to the letter, what was negative forward or
    backward is stopped.  The paper knows ReLU only; for the others the same formula is the stated generalisation, with
    f' their own derivative: LeakyReLU, PReLU and RReLU let the slope's share through where x < 0; ELU, SELU, CELU,
    GELU, SiLU, Mish, Softplus and Hardswish weigh by their smooth derivative.  Gates (sigmoid, tanh) are not
    rectifiers and keep their own gradient.
    """

    method = "guided backprop"

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        # The question is asked before the call: an in-place function changes what it was asked about.
        name = _name(func, args, kwargs)
        output = func(*args, **kwargs)
        if name and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(_positive)
            self.cover(name, output.grad_fn)
        return output


class DeconvRule(BackwardRule):
    r"""The deconvnet's rule, Zeiler and Fergus, ECCV 2014, section 2.1: :math:`R_x = \max(0, R_y)`.

    The signal is rectified on its way back as the activation was on its way forward; where the activation was silent
    plays no part.  The paper knows ReLU only; for every other activation function the same formula is the stated
    generalisation: its derivative is left out.  Gates (sigmoid, tanh) keep their own gradient, and max-pooling passes
    the signal back to the maximum, which are the paper's switches.
    """

    method = "deconvnet"

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        call = Call.of(func, args, kwargs)
        name = _name(func, args, kwargs)
        if not name or len(call.places) != 1:
            return func(*args, **kwargs)
        output, node = call.replaced(lambda value: _Rectified.apply(call.variables[0], value), self.method)
        self.cover(name, node)
        return output


class Valued(torch.autograd.Function):
    """The numbers of ``value``, with the gradient of ``carrier``."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, value: Tensor) -> Tensor:
        """``value`` itself."""
        ctx.mark_dirty(value)  # it becomes the output itself, rather than a view of it
        return value

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> Any:
        """The signal, to the carrier alone."""
        return signals[0], None


class _Rectified(Valued):
    """The numbers of ``value``, and a signal to ``carrier`` that is rectified."""

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> Any:
        return Valued.backward(ctx, _positive(signals[0]))


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a torch function, and where among its arguments tensors stand that require grad."""

    function: Any
    args: tuple
    kwargs: dict[str, Any]
    places: tuple[int | str, ...]

    @classmethod
    def of(cls, function: Any, args: tuple, kwargs: dict[str, Any]) -> Call:
        """The call, with its places found."""
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        return cls(function, args, kwargs, tuple(k for k, v in given if isinstance(v, Tensor) and v.requires_grad))

    @property
    def variables(self) -> list[Tensor]:
        """The tensors that require grad."""
        return [self.args[place] if isinstance(place, int) else self.kwargs[place] for place in self.places]

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """The argument at a position or by one of its names."""
        found = _argument(self.args, self.kwargs, position, *names)
        return default if found is None else found

    def on(self, *tensors: Tensor) -> Any:
        """The same call with ``tensors`` in place of the variables."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for place, tensor in zip(self.places, tensors, strict=True):
            if isinstance(place, int):
                args[place] = tensor
            else:
                kwargs[place] = tensor
        return self.function(*args, **kwargs)

    def replaced(self, make: Callable[[Tensor], Tensor], method: str) -> tuple[Tensor, Any]:
        """What the call returns, its graph replaced by the one that ``make`` gives its value; and that graph's node.

        A call in place has the result written where it writes.

        Raises
        ------
        CoverageError
            Inside a checkpoint, which would run the original function again on the way back.
        """
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if hooks and hooks[0].__module__ == "torch.utils.checkpoint":
            raise CoverageError(
                f"{method} cannot replace what a checkpoint runs again on the way back; turn the model's checkpointing "
                "off for explaining"
            )
        private = [copied_on_write(variable.detach()) for variable in self.variables]
        value = self.on(*private)
        if value._is_view():  # such as a product that was computed in another order of axes
            value = value.clone()
        result = make(value)
        node = result.grad_fn
        return (self.variables[0].copy_(result) if value is private[0] else result), node


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
    """Whether a node may hide an activation."""
    made_of = getattr(node, "_forward_cls", None)
    return isinstance(node, torch.autograd.function.BackwardCFunction) and made_of not in NO_ACTIVATIONS
