r"""DeepLIFT's rescale rule: each bent step of a model becomes the straight line through two points of it.

The model runs on the baseline first, and what every bent step was given is kept.  When it runs on the volume, a step
y = f(u) that was u_0 for the baseline passes the signal R back as

.. math:: R_u = \frac{f(u) - f(u_0)}{u - u_0} \, R_y

(Shrikumar et al., ICML 2017, section 3.5.1, eq. for the rescale rule.)  Times the volume less the baseline, what
arrives at the input adds up to the change of the score, exactly.

The paper has one bent step, an activation function of one number.  Here the same is asked of every step, that the
parts of a change add up to the change, which gives:

- a product of two variables (gates, attention): each factor times the other one's mean of the two runs, since
  :math:`ab - a_0 b_0 = \bar b \, (a - a_0) + \bar a \, (b - b_0)`;
- max-pooling: the whole change of a maximum to the cell that held the larger of the two maxima;
- softmax: its parts, of the above;
- normalisation by a scan's own statistics: its parts too, but that the change of the values counts with the smaller of
  the two scales.

To add a step: a line in ``_ONE``, ``_TWO`` or ``_MADE_OF``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from volsal.attribution.gradients.rules import ACTIVATIONS, BackwardRule, Call, CoverageError, Valued
from volsal.attribution.gradients.spellings import spellings
from volsal.attribution.method import detached, spatial
from volsal.attribution.tap import copied_on_write, forward, plain, undisturbed

# A linear function of the call's variables whose derivative is the rule: (call, now, then, value) -> like value.
_Line = Callable[[Call, Sequence[Tensor], Sequence[Tensor], Tensor], Tensor]
_Seen = tuple[str, list[Tensor]]


def recorded(model: nn.Module, baseline: Tensor) -> tuple[Any, RescaleRule]:
    """The output for ``baseline`` (B, C, *spatial), and the rule that measures another volume against it."""
    with undisturbed(model), saved_tensors_hooks(lambda tensor: None, _never):
        # What requires grad tells what depends on the input; the graph that is recorded for it keeps no tensors.
        leaf = plain(baseline).requires_grad_(True)
        with _Recorder() as recorder:
            output = forward(model, copied_on_write(leaf))
    return detached(output), RescaleRule(recorder.seen)


class RescaleRule(BackwardRule):
    """The rule, for one pass of the model on a volume; of :func:`recorded`.

    Caught in the spellings that :class:`BackwardRule` names.  Recurrent layers, and an activation inside what cannot be
    seen into, are refused; a step that is bent and not known here keeps its own gradient, which the map's sum betrays.
    """

    method = "DeepLIFT"

    def __init__(self, seen: deque[_Seen]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        call = Call.of(func, args, kwargs)
        if parts := _parts(call):
            with self:
                return parts()
        if not (step := _step(call)):
            return func(*args, **kwargs)
        name, line = step
        now = call.variables
        then = self._next(name, [variable.shape for variable in now])
        output, node = call.replaced(lambda value: Valued.apply(line(call, now, then, value), value), self.method)
        self.cover(name, node)
        return output

    def _next(self, name: str, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """What the baseline had at this step."""
        seen, then = self._seen.popleft() if self._seen else ("the output", [])
        if seen != name or [tensor.shape for tensor in then] != shapes:
            raise CoverageError(
                f"{self.method}: the model takes another way for the scan ({name}) than for the baseline ({seen}), so "
                "there is nothing to compare step by step; use integrated-gradients"
            )
        return then

    def require_complete(self, scores: list[Tensor]) -> None:
        """Raise :class:`CoverageError` where a step was missed; a model without any is linear and needs no rule."""
        if self._seen:
            self._next("the output", [])
        self.require_none_missed(scores)

    def is_meant(self, node: Any) -> bool:
        """Activations, gates and max-pooling."""
        name = node.name()
        return super().is_meant(node) or name.startswith(_OTHERS)


# What autograd calls the steps that are meant besides activations.
_OTHERS = ("Sigmoid", "Tanh", "MaxPool", "AdaptiveMaxPool", "MkldnnRnn", "CudnnRnn")


class _Recorder(TorchFunctionMode):
    """What every bent step is given, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: deque[_Seen] = deque()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        call = Call.of(func, args, kwargs)
        if parts := _parts(call):
            with self:
                return parts()
        if step := _step(call):
            self.seen.append((step[0], [copied_on_write(variable.detach()) for variable in call.variables]))
        return func(*args, **kwargs)


def _never(packed: Any) -> Tensor:
    raise AssertionError("the baseline's graph is never run backwards")


def _step(call: Call) -> tuple[str, _Line] | None:
    """The bent step that this call is, and its line."""
    table = {1: _ONE, 2: _TWO}.get(len(call.places), {})
    try:
        name, line = table[call.function]
    except (KeyError, TypeError):  # an unhashable callable is none of ours
        return None
    # Divided by a constant, or once the larger of two and once the maximum over an axis.
    if (name == "div" and call.places == (0,)) or (name in ("max", "min") and not isinstance(call.argument(1), Tensor)):
        return None
    return name, line


def _parts(call: Call) -> Callable[[], Tensor] | None:
    """The call put together of simpler ones."""
    try:
        made_of = _MADE_OF.get(call.function) if call.places else None
    except TypeError:
        return None
    return made_of(call) if made_of else None


# --- lines ---


def _slope(rise: Tensor, run: Tensor, size: Tensor, derivative: Callable[[], Tensor]) -> Tensor:
    """rise / run, or the derivative where the run is nothing but rounding."""
    flat = ~(run.abs() > 4 * torch.finfo(run.dtype).eps * size)
    if not flat.any():
        return rise / run
    return torch.where(flat, derivative(), rise / torch.where(flat, 1, run))


def _secant(call: Call, now: Sequence[Tensor], then: Sequence[Tensor], value: Tensor) -> Tensor:
    """A function of one number, cell by cell."""
    u, u0 = now[0].expand_as(value), then[0].expand_as(value)

    def derivative() -> Tensor:
        at = u.detach().requires_grad_(True)
        return torch.autograd.grad(call.on(at.clone()).sum(), at)[0]

    before = call.on(copied_on_write(then[0]))
    with torch.no_grad():
        run = u - u0
    return u * _slope(value - before, run, u.detach().abs() + u0.abs(), derivative)


def _bilinear(function: Callable[..., Tensor]) -> _Line:
    def product(call: Call, now: Sequence[Tensor], then: Sequence[Tensor], value: Tensor) -> Tensor:
        (a, b), (a0, b0) = now, then
        given = [argument for argument in call.args if isinstance(argument, str)]  # the equation of einsum
        return function(*given, a, (b.detach() + b0) / 2) + function(*given, (a.detach() + a0) / 2, b)

    return product


def _by_the_smaller(call: Call, now: Sequence[Tensor], then: Sequence[Tensor], value: Tensor) -> Tensor:
    """Values c times their own scale r: ``min(r, r_0)`` times the change of c, and the rest to the change of r.

    The two means would do too; but a baseline without contrast has a scale of hundreds, and its every layer would
    blow the map up as many times, to parts that cancel.
    """
    (c, r), (c0, r0) = now, then
    with torch.no_grad():
        smaller = r <= r0
        kept, rest = torch.where(smaller, r, r0), torch.where(smaller, c0, c)
    return c * kept + rest * r


def _largest(
    call: Call, now: Sequence[Tensor], then: Sequence[Tensor], value: Tensor, *, axes: int, kind: str
) -> Tensor:
    """Max-pooling: of the two runs' maxima the larger says which cell the change is due to."""
    (u,), (u0,) = now, then
    pool, count = getattr(F, f"{kind}{axes}d"), 6 if kind == "max_pool" else 2  # arguments before return_indices
    with torch.no_grad():
        (y, index), (y0, index0) = (
            pool(x, *call.args[1:count], **{**call.kwargs, "return_indices": True}) for x in (u.detach(), u0)
        )
        index = torch.where(y >= y0, index, index0).flatten(-axes)
        run = (u - u0).flatten(-axes).gather(-1, index).view_as(y)
        share = _slope(y - y0, run, torch.zeros_like(run), lambda: torch.ones_like(run))
    return u.flatten(-axes).gather(-1, index).view_as(value) * share


def _softmax(call: Call, now: Sequence[Tensor], then: Sequence[Tensor], value: Tensor) -> Tensor:
    """exp(u) times one over the sum of exp(u): a secant, a sum, a secant, a product."""
    (u,), (u0,) = now, then
    dim = call.argument(1, "dim")
    with torch.no_grad():
        top = torch.maximum(u, u0).amax(dim, keepdim=True)
        e, e0 = (u - top).exp(), (u0 - top).exp()
        total, total0 = e.sum(dim, keepdim=True), e0.sum(dim, keepdim=True)
        slope = _slope(e - e0, u - u0, u.abs() + u0.abs(), lambda: e)
        own, others = (1 / total + 1 / total0) / 2, (e + e0) / (2 * total * total0)
    lifted = u * slope
    return lifted * own - lifted.sum(dim, keepdim=True) * others


# --- steps made of others ---


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    variance = (centred * centred).mean(dims, keepdim=True)
    return _scaled(centred, torch.rsqrt(variance + eps))


def _scaled(values: Tensor, scale: Tensor) -> Tensor:
    """The product of values and their own scale, for the line :func:`_by_the_smaller`."""
    if has_torch_function((values, scale)):
        return handle_torch_function(_scaled, (values, scale), values, scale)
    return values * scale


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Times weight, plus bias, along the channels."""
    shape = (1, -1, *(1,) * (x.ndim - 2))
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def _instance_norm(call: Call) -> Callable[[], Tensor] | None:
    x, weight, bias = call.argument(0, "input"), call.argument(3, "weight"), call.argument(4, "bias")
    eps = call.argument(7, "eps", default=1e-5)
    if not call.argument(5, "use_input_stats", default=True):
        return None
    return lambda: _affine(_standardised(x, spatial(x), eps), weight, bias)


def _group_norm(call: Call) -> Callable[[], Tensor]:
    x, groups = call.argument(0, "input"), call.argument(1, "num_groups")
    weight, bias, eps = call.argument(2, "weight"), call.argument(3, "bias"), call.argument(4, "eps", default=1e-5)
    return lambda: _affine(_standardised(x.view(len(x), groups, -1), (2,), eps).view_as(x), weight, bias)


def _layer_norm(call: Call) -> Callable[[], Tensor]:
    x, shape = call.argument(0, "input"), call.argument(1, "normalized_shape")
    weight, bias, eps = call.argument(2, "weight"), call.argument(3, "bias"), call.argument(4, "eps", default=1e-5)

    def parts() -> Tensor:
        y = _standardised(x, tuple(range(-len(shape), 0)), eps)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    return parts


def _attention(call: Call) -> Callable[[], Tensor] | None:
    names = ("query", "key", "value", "attn_mask")
    query, key, value, mask = (call.argument(at, name) for at, name in enumerate(names))
    if call.argument(5, "is_causal") or call.kwargs.get("enable_gqa"):
        return None
    scale = call.kwargs.get("scale") or query.shape[-1] ** -0.5

    def parts() -> Tensor:
        weights = (query @ key.transpose(-2, -1)) * scale
        if mask is not None:
            weights = weights.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else weights + mask
        return weights.softmax(-1) @ value

    return parts


def _division(call: Call) -> Callable[[], Tensor] | None:
    """Two variables: the first times one over the second."""
    if len(call.places) != 2 or call.kwargs:
        return None
    above, below = call.variables
    return lambda: above * below.reciprocal()


_POINTWISE = (
    *ACTIVATIONS, "sigmoid", "hardsigmoid", "logsigmoid", "tanh", "hardtanh", "softsign", "tanhshrink", "softshrink",
    "hardshrink", "threshold", "_threshold", "clamp", "clip", "clamp_min", "clamp_max", "exp", "expm1", "log", "log1p",
    "sqrt", "rsqrt", "reciprocal", "square", "pow", "__pow__", "__rpow__", "__rdiv__", "__rtruediv__", "div",
    "abs", "erf", "sin", "cos", "maximum", "minimum", "max", "min",
)  # fmt: skip
_POOLS = {(kind, axes): f"{kind}{axes}d" for kind in ("max_pool", "adaptive_max_pool") for axes in (1, 2, 3)}
_ONE: dict[Any, tuple[str, _Line]] = {
    **{function: (name, _secant) for function, name in spellings(_POINTWISE).items()},
    **{function: (name, _softmax) for function, name in spellings(("softmax",)).items()},
    **{
        function: (name, partial(_largest, axes=axes, kind=kind))
        for (kind, axes), pool in _POOLS.items()
        for function, name in spellings((pool,)).items()
    },
}
_TWO: dict[Any, tuple[str, _Line]] = {
    function: (name, _bilinear(getattr(torch, name)))
    for name in ("mul", "matmul", "bmm", "einsum")
    for function in spellings((name, f"__{name}__"))
}
_TWO[_scaled] = ("scaled", _by_the_smaller)
_MADE_OF: dict[Any, Callable[[Call], Callable[[], Tensor] | None]] = {
    F.instance_norm: _instance_norm,
    **dict.fromkeys(spellings(("group_norm",)), _group_norm),
    **dict.fromkeys(spellings(("layer_norm",)), _layer_norm),
    **dict.fromkeys(spellings(("scaled_dot_product_attention",)), _attention),
    **dict.fromkeys((torch.div, Tensor.div, torch.true_divide, torch.ops.aten.div.Tensor), _division),
}
