"""What each of torch's operators does to places.

A rule is a function from a :class:`Call` to the :class:`~volsal.attribution.alignment.places.Place` of its result; to
a list of them where the results differ; to None where they do not descend from the input.  It raises
``UntraceableError`` for a case that it does not cover.

To add an operator, write such a function, or take one that is here, and give it a line in ``_RULES`` below: a pattern
for the operator's name in aten, without overload.  Pointwise operators and reductions need none; an operator that has
neither makes its result lost, with its name as the reason.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from volsal.attribution.alignment.places import (
    Fate,
    Lost,
    Place,
    Row,
    Run,
    Runs,
    UntraceableError,
    joined,
    noted,
    placeless,
    spatial,
)


@dataclass(frozen=True)
class Call:
    """One operator call: its arguments by the schema's names, and the fates of its tensors before it ran."""

    name: str
    given: dict[str, Any]
    inputs: list[tuple[Tensor, Fate]]
    outputs: list[Tensor]
    size: tuple[int, ...]  # of the first input, which the call may change

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first output."""
        return tuple(self.outputs[0].shape)

    @property
    def place(self) -> Place:
        """The first input's."""
        fate = self.inputs[0][1]
        if isinstance(fate, Place):
            return fate
        raise UntraceableError(fate.reason if isinstance(fate, Lost) else "on a tensor without a place")

    def dims(self, value: Any) -> list[int]:
        """Dimensions as the call names them, counted from the front; none named means all."""
        named = [value] if isinstance(value, int) else value if value else range(len(self.size))
        return [dim % len(self.size) for dim in named]


Rule = Callable[[Call], Place | list[Place] | None]


def _same(call: Call) -> Place:
    return call.place


def _nowhere(call: Call) -> None:
    """A new tensor of an old one's shape."""


def _per_axis(value: Any, axes: int) -> list:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * axes if len(values) == 1 else values


def _window(call: Call, place: Place, lines: Sequence[tuple[float, float]]) -> Place:
    """Move the last dimensions, each by its (scale, start)."""
    for dim, (scale, start) in zip(range(-len(lines), 0), lines, strict=True):
        place = place.moved(dim, scale, start, call.shape[dim])
    return place


def _convolution(call: Call) -> Place:
    weight = call.given["weight"]
    axes = weight.ndim - 2
    stride, padding, dilation = (
        _per_axis(call.given.get(name, usual), axes) for name, usual in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    centre = [(k - 1) * d / 2 - p for k, d, p in zip(weight.shape[2:], dilation, padding, strict=True)]
    lines = [(1 / s, -c / s) if call.given.get("transposed") else (s, c) for s, c in zip(stride, centre, strict=True)]
    return _window(call, call.place.mixed(-axes - 1, call.shape[-axes - 1]), lines)


def _pool(call: Call) -> Place:
    axes = int(call.name.split("pool")[1][0])
    kernel = _per_axis(call.given["kernel_size"], axes)
    lines = zip(
        kernel,
        _per_axis(call.given["stride"] or kernel, axes),
        _per_axis(call.given["padding"], axes),
        _per_axis(call.given.get("dilation", 1), axes),
        strict=True,
    )
    return _window(call, call.place, [(s, (k - 1) * d / 2 - p) for k, s, p, d in lines])


def _fitted(scale: float, sources: Sequence[float]) -> tuple[float, float]:
    """The line of slope ``scale`` through the mean of the old indices that the new ones read."""
    return scale, sum(source - scale * j for j, source in enumerate(sources)) / len(sources)


def _adaptive_pool(call: Call) -> Place:
    axes, lines = len(call.given["output_size"]), []
    for n, m in zip(call.size[-axes:], call.shape[-axes:], strict=True):  # cell j reads floor(jn/m)..ceil((j+1)n/m)-1
        lines.append(_fitted(n / m, [(j * n // m - (-(j + 1) * n // m) - 1) / 2 for j in range(m)]))
    return _window(call, call.place, lines)


def _resample(call: Call) -> Place:
    axes, place = len(call.given["output_size"]), call.place
    scales = [value for name, value in call.given.items() if name.startswith("scales")]
    for dim, factor in zip(range(-axes, 0), scales, strict=True):
        n, m = call.size[dim], call.shape[dim]
        scale = 1 / factor if factor else n / m
        if n == 1 and m > 1:  # one value everywhere has no place
            place = place.mixed(dim, m)
            continue
        if call.given.get("align_corners"):
            line = ((n - 1) / max(m - 1, 1), 0.0)
        elif "nearest" in call.name:
            half = 0.5 if "exact" in call.name else 0.0
            line = _fitted(scale, [min(math.floor((j + half) * scale), n - 1) for j in range(m)])
        else:
            line = (scale, (scale - 1) / 2)
        place = place.moved(dim, *line, m)
    return place


def _pad(call: Call) -> Place:
    pad = call.given["pad" if call.name == "constant_pad_nd" else "padding"]
    return _window(call, call.place, [(1, -low) for low in pad[-2::-2]])


def cut(call: Call) -> tuple[int, int]:
    """The dimension that a slice is taken along, and the index where it starts."""
    (dim,) = call.dims(call.given["dim"])
    return dim, slice(call.given["start"], None).indices(call.size[dim])[0]


def slicing(call: Call) -> Place:
    """Every so many elements of a dimension."""
    dim, start = cut(call)
    return call.place.moved(dim, call.given["step"], start, call.shape[dim])


def _select(call: Call) -> Place:
    (dim,) = call.dims(call.given["dim"])
    return call.place.moved(dim, 1, call.given["index"] % call.size[dim], 1).put(dim)


def _gather(call: Call) -> Place:
    """Indices in a row, evenly spaced, are a slice."""
    given = call.given.get("indices") or [None] * call.given["dim"] + [call.given["index"]]
    named = [(dim, index) for dim, index in enumerate(given) if index is not None]
    dim, index = named[0]
    if len(named) != 1 or index.ndim != 1 or index.dtype == torch.bool:
        raise UntraceableError("with several indices or a mask")
    rows = index.tolist()
    if not rows:
        raise UntraceableError("with no index at all")
    scale = rows[1] - rows[0] if len(rows) > 1 else 1
    if spatial(call.place.dims[dim]) and rows != [rows[0] + scale * j for j in range(len(rows))]:
        raise UntraceableError("with indices that are not evenly spaced")
    return call.place.moved(dim, scale, rows[0] % call.size[dim], len(rows))


def _split(call: Call) -> list[Place]:
    (dim,) = call.dims(call.given["dim"])
    places, start = [], 0
    for part in call.outputs:
        places.append(call.place.moved(dim, 1, start, part.shape[dim]))
        start += part.shape[dim]
    return places


def _unbind(call: Call) -> list[Place]:
    (dim,) = call.dims(call.given["dim"])
    return [call.place.moved(dim, 1, j, 1).put(dim) for j in range(call.size[dim])]


def _flip(call: Call) -> Place:
    place = call.place
    for dim in call.dims(call.given["dims"]):
        place = place.moved(dim, -1, call.size[dim] - 1, call.size[dim])
    return place


def _roll(call: Call) -> Place:
    """A cyclic shift, which a later one may undo."""
    place, shifts = call.place, call.given["shifts"]
    if not call.given["dims"]:
        raise UntraceableError("over the flattened tensor")
    for dim, shift in zip(call.dims(call.given["dims"]), _per_axis(shifts, 1), strict=True):
        if spatial(place.dims[dim]):
            if len(place.dims[dim]) != 1:
                raise UntraceableError("along a dimension into which several are folded")
            (run,) = place.dims[dim]
            place = place.put(dim, (replace(run, rolled=(run.rolled + shift) % run.count),))
    return place


def _permute(call: Call) -> Place:
    order = list(range(len(call.size)))
    if call.name == "permute":
        order = call.dims(call.given["dims"])
    elif len(order) > 1:
        a, b = call.dims([call.given.get("dim0", 0), call.given.get("dim1", 1)])
        order[a], order[b] = order[b], order[a]
    return replace(call.place, dims=tuple(call.place.dims[dim] for dim in order))


def _unsqueeze(call: Call) -> Place:
    dims = list(call.place.dims)
    dims.insert(call.given["dim"] % (len(dims) + 1), ())
    return replace(call.place, dims=tuple(dims))


def _squeeze(call: Call) -> Place:
    gone = {dim for dim in call.dims(call.given.get("dim")) if call.size[dim] == 1}
    return replace(call.place, dims=tuple(runs for dim, runs in enumerate(call.place.dims) if dim not in gone))


def _expand(call: Call) -> Place:
    """Copies of one cell have no place; a repeated row of cells is no row."""
    place, new = call.place, len(call.shape) - len(call.size)
    place = replace(place, dims=((),) * new + place.dims)
    for dim, (old, size) in enumerate(zip((1,) * new + call.size, call.shape, strict=True)):
        if old not in (1, size) and spatial(place.dims[dim]):
            raise UntraceableError("along a spatial axis")
        if old != size:
            place = place.mixed(dim, size)
    return place


def _view(call: Call) -> Place:
    """The runs of all dimensions in memory's order, folded anew."""
    waiting = deque(_coalesced(run for runs in call.place.dims for run in runs))
    dims: list[Runs] = []
    for size, following in zip(call.shape, (*call.shape[1:], 1), strict=True):
        taken: list[Run] = []
        left = size
        while left > 1 or (size == 1 and not taken and waiting and waiting[0].count == 1):
            run = waiting.popleft()
            if run.count > left and run.count % left == 0:
                run, inner = run.split(left)
                waiting.appendleft(inner)
            if left % run.count:
                raise UntraceableError(f"from {call.size} to {call.shape} cuts a row of cells unevenly")
            taken.append(run)
            left //= run.count
        while waiting and waiting[0].count == 1 != following and spatial(tuple(taken[-1:])):
            taken.append(waiting.popleft())  # an axis of one cell stays with its neighbour, not with the channels
        dims.append(_coalesced(taken))
    if waiting and dims:  # single cells
        dims[-1] += tuple(waiting)
    return replace(call.place, dims=tuple(dims))


def _coalesced(runs: Iterable[Run]) -> Runs:
    done: list[Run] = []
    for run in runs:
        if done and (both := done[-1].merged(run)):
            done[-1] = both
        else:
            done.append(run)
    return tuple(done)


def _unfold(call: Call) -> Place:
    """Windows along a dimension, whose elements go to a new last one."""
    (dim,) = call.dims(call.given["dimension"])
    place, run = call.place.sole(dim)
    place = place.moved(dim, call.given["step"], 0, call.shape[dim])
    return replace(place, dims=(*place.dims, (replace(run, count=call.given["size"]),)))


def _pixel_shuffle(call: Call) -> Place:
    """(C r r, H, W) -> (C, H r, W r)."""
    r, place = call.given["upscale_factor"], call.place
    if spatial(place.dims[-3]):
        raise UntraceableError("of cells")
    rows, columns = ((*place.dims[dim], Run(None, r)) for dim in (-2, -1))
    return place.put(-3, placeless(call.shape[-3])).put(-2, rows).put(-1, columns)


def _reduce(call: Call) -> Place:
    place = call.place
    gone = call.dims(call.given.get("dim"))
    for dim in gone:
        place = place.reduced(dim)
    if not call.given.get("keepdim"):
        place = replace(place, dims=tuple(runs for dim, runs in enumerate(place.dims) if dim not in gone))
    return place


def _join(call: Call) -> Place | None:
    return joined(call.inputs, call.shape)


def copying(call: Call) -> Place | None:
    """Into the first input: what was there before is gone."""
    return joined(call.inputs[1:2], call.shape)


def _stack(call: Call) -> Place | None:
    dim = call.given["dim"] % len(call.shape)
    place = joined(call.inputs, call.shape[:dim] + call.shape[dim + 1 :])
    return place and replace(place, dims=(*place.dims[:dim], placeless(call.shape[dim]), *place.dims[dim:]))


def _cat(call: Call) -> Place | None:
    inputs = [(tensor, fate) for tensor, fate in call.inputs if tensor.numel()]
    dim = call.given["dim"] % len(call.shape)
    known = {number: fate for number, (_, fate) in enumerate(inputs) if isinstance(fate, Place)}
    if len(inputs) > 1 and any(spatial(place.dims[dim]) for place in known.values()):
        if len(known) > 1 or any(isinstance(fate, Lost) for _, fate in inputs):
            raise UntraceableError("along a spatial axis")
        ((number, place),) = known.items()
        return _row(place, dim, [tensor.shape[dim] for tensor, _ in inputs], number)
    return joined(inputs, call.shape, along=dim)


def _row(place: Place, dim: int, sizes: Sequence[int], own: int) -> Place:
    """Cells with others beside them that do not descend from the input, such as a class token."""
    before, cells = sum(sizes[:own]), place.dims[dim]
    if isinstance(cells[0], Row):
        before, cells = before + cells[0].before, cells[0].cells
    return place.put(dim, (Row(None, sum(sizes), before=before, cells=cells),))


def _matmul(call: Call) -> Place | None:
    """Rows of the first factor, as a query's, or else columns of the second, as where a weight stands first."""
    a, b = (fate for _, fate in call.inputs[-2:])
    if isinstance(a, Place) and any(map(spatial, a.dims[:-1])):
        return noted(a.mixed(-1, call.shape[-1]), [b])
    if isinstance(a, Lost):
        raise UntraceableError(a.reason)
    if isinstance(b, Lost):
        raise UntraceableError(b.reason)
    return b.mixed(-2, call.shape[-2]) if b else a.mixed(-1, call.shape[-1]) if a else None


def _attention(call: Call) -> Place:
    return noted(call.place.mixed(-1, call.shape[-1]), [fate for _, fate in call.inputs[1:]])


# --- The table and its lookup ---

# By the operator's name without the underscore of its in-place form; the first match counts.
_RULES: tuple[tuple[str, Rule], ...] = (
    (r"(_|mkldnn_)?convolution(_overrideable)?", _convolution),
    (r"(max|avg)_pool\dd(_with_indices)?", _pool),
    (r"_?adaptive_(max|avg)_pool\dd", _adaptive_pool),
    (r"_?upsample_.*", _resample),
    (r"constant_pad_nd|(reflection|replication)_pad\dd", _pad),
    (r"slice(_copy)?", slicing),
    (r"select(_copy)?", _select),
    (r"index|index_select", _gather),
    (r"(unsafe_)?split(_with_sizes)?(_copy)?", _split),
    (r"unbind(_copy)?", _unbind),
    (r"flip", _flip),
    (r"roll", _roll),
    (r"permute|transpose|t|swapaxes", _permute),
    (r"unsqueeze", _unsqueeze),
    (r"squeeze", _squeeze),
    (r"expand|repeat", _expand),
    (r"_unsafe_view|view|reshape|_reshape_alias|flatten|unflatten", _view),
    (r"unfold", _unfold),
    (r"pixel_shuffle", _pixel_shuffle),
    (r"cat|concat", _cat),
    (r"stack", _stack),
    (r"masked_fill", _join),
    (r"copy", copying),
    (r"mm|bmm|addmm|baddbmm|matmul", _matmul),
    (r"linear|_scaled_dot_product_.*", _attention),
    (r"new_.*|.*_like", _nowhere),
    (r".*(batch|instance|group|layer|rms)_norm.*|_?(log_|safe_)*softmax|native_dropout|rrelu.*|_prelu_kernel", _same),
    (r"_to_copy|detach|alias|lift_fresh|fill|zero|hardswish|log_sigmoid_forward", _same),
    (r"_native_multi_head_attention|_transformer_encoder_layer_fwd", _same),
)


@cache
def rule_of(func: Any) -> tuple[str, Rule | None]:
    """The operator's name, and what it does to places; None where that is not known."""
    space, name = func._schema.name.split("::")
    name = name if name.startswith("__") else name.rstrip("_")
    if space not in ("aten", "volsal"):
        return name, None
    for pattern, rule in _RULES:
        if re.fullmatch(pattern, name):
            return name, rule
    if torch.Tag.pointwise in func.tags:
        return name, _join
    return name, _reduce if torch.Tag.reduction in func.tags else None


def outcome(call: Call, rule: Rule | None, operator: str) -> list[Fate]:
    """The fate of each output."""
    try:
        if rule is None:
            raise UntraceableError("")
        found = rule(call)
    except (UntraceableError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        # A rule that does not know a case must not stop a model that runs: what it gives has no known place.
        earlier = [fate for _, fate in call.inputs if isinstance(fate, Lost)]
        return [earlier[0] if earlier else Lost(f"{operator} {error}".strip())] * len(call.outputs)
    if isinstance(found, list):
        return list(found)
    # Statistics and the like beside the result have shapes of their own.
    return [
        found if found is None or output.shape == call.outputs[0].shape else Lost(f"{operator} beside its result")
        for output in call.outputs
    ]
