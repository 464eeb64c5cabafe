r"""Where the cells of a layer lie on the voxels of the model's input.

Along each spatial axis of the input, the centre of cell i lies at voxel coordinate

.. math:: x(i) = \mathrm{offset} + \mathrm{stride} \cdot i

The output j of a convolution of kernel k, stride s, padding p and dilation d reads inputs around s j + (k-1) d/2 - p;
every other operation has such a line too.  One real forward pass composes them.  It is watched where torch dispatches
operators, below modules, functions and methods, so that the spelling does not matter.

The centres are nominal: those of the architecture, as if each kernel weighed its two sides alike.
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
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from volsal.attribution.tap import LayerError, find_layer, forward, plain, undisturbed


@dataclass(frozen=True)
class Trace:
    """Where a layer's cells lie; tuples run over the input's spatial axes and are empty where the trace is lost.

    Attributes
    ----------
    cells : number of cells
    stride : voxels from a cell to the next; negative where the layer sees the input flipped
    offset : voxel coordinate of the centre of cell 0
    spread : voxels by which branches that were joined lie off their mean, which offset and stride describe
    axes : for each dimension of the output, the spatial axes that run along it: ((), (), (0,), (1,), (2,)) for
        (B, C, D, H, W), ((), (0, 1, 2), ()) for tokens (B, D * H * W, C)
    lost : the operation that could not be followed, or the reason why the cells are no grid; None where all is known
    notes : what was left out of account
    """

    cells: tuple[int, ...] = ()
    stride: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()
    axes: tuple[tuple[int, ...], ...] = ()
    lost: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def regular(self) -> bool:
        """Whether the output is (B, C, *cells) with its axes in the input's order."""
        return not self.lost and self.axes == ((), (), *((axis,) for axis in range(len(self.cells))))


def trace(model: nn.Module, volume: Tensor, layers: Iterable[str]) -> dict[str, Trace]:
    """The :class:`Trace` of each layer, by its dotted name, for an input like ``volume`` (B, C, *spatial).

    One forward pass without a graph.

    Raises
    ------
    LayerError
        For a layer that is missing, does not run exactly once, or does not return a tensor.
    ModelError
        Where the model cannot be run on this volume.
    """
    modules = {layer: find_layer(model, layer) for layer in layers}
    found: dict[str, Trace] = {}
    mode = _Tracing()

    def watch(layer: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if layer in found:
                raise LayerError(
                    f"layer {layer!r} runs more than once in one forward pass, so its cells have no single place"
                )
            if not isinstance(output, Tensor):
                raise LayerError(
                    f"layer {layer!r} returns a {type(output).__name__}, not a tensor; name a layer inside"
                )
            found[layer] = _trace_of(mode.fates.get(output), tuple(output.shape))

        return hook

    hooks: list[Any] = []
    with undisturbed(model), torch.no_grad():
        leaf = plain(volume)
        mode.fates[leaf] = _whole(leaf)
        try:
            for layer, module in modules.items():
                hooks.append(module.register_forward_hook(watch(layer)))
            with mode:
                forward(model, leaf)
        finally:
            for handle in hooks:
                handle.remove()
    if missing := [layer for layer in modules if layer not in found]:
        raise LayerError(f"layer {missing[0]!r} did not run in the forward pass; name one that does")
    return {layer: found[layer] for layer in modules}


# --- Where the elements of one tensor lie ---


class _UntraceableError(Exception):
    """A rule does not cover this case; the text says why."""


@dataclass(frozen=True)
class _Lost:
    """The fate of a tensor that descends from the input in a way that could not be followed."""

    reason: str


@dataclass(frozen=True)
class _Run:
    """``count`` neighbours that lie ``step`` voxels apart along ``axis``; None for channels and the like."""

    axis: int | None
    count: int
    step: float = 0.0

    def split(self, outer: int) -> tuple[_Run, _Run]:
        """Index i as (i // inner, i % inner)."""
        inner = self.count // outer
        return _Run(self.axis, outer, self.step * inner), _Run(self.axis, inner, self.step)

    def merged(self, inner: _Run) -> _Run | None:
        """What :meth:`split` split, or None where the two are no single run."""
        in_step = self.count == 1 or math.isclose(self.step, inner.step * inner.count)
        return _Run(self.axis, self.count * inner.count, inner.step) if self.axis == inner.axis and in_step else None


_Runs = tuple[_Run, ...]


@dataclass(frozen=True)
class _Place:
    """Element (i_1, i_2, ...) lies at offset + sum of step * index over the runs of an axis, for each axis.

    A dimension holds several runs, slowest first, where a view folded dimensions: tokens (B, D * H * W, C).
    """

    dims: tuple[_Runs, ...]
    offset: tuple[float, ...]
    spread: tuple[float, ...]
    notes: tuple[str, ...] = ()

    def put(self, dim: int, *dims: _Runs) -> _Place:
        """Replace one dimension by others, or by none."""
        before = list(self.dims)
        at = dim % len(before)
        return replace(self, dims=(*before[:at], *dims, *before[at + 1 :]))

    def shifted(self, axis: int | None, voxels: float) -> _Place:
        return replace(self, offset=tuple(x + voxels * (k == axis) for k, x in enumerate(self.offset)))

    def moved(self, dim: int, scale: float, start: float, size: int) -> _Place:
        """The new index j of a dimension is the old index ``scale * j + start``."""
        runs = self.dims[dim]
        if (scale, start, size) == (1, 0, math.prod(run.count for run in runs)):
            return self
        if not _spatial(runs):
            return self.put(dim, _plain(size))
        place, run = self.sole(dim)
        return place.shifted(run.axis, start * run.step).put(dim, (replace(run, count=size, step=scale * run.step),))

    def sole(self, dim: int) -> tuple[_Place, _Run]:
        """A spatial dimension as one run.

        Channels that a view interleaved with cells (pixel shuffle), and copies of a cell side by side, divide the cell.
        """
        runs = [run for run in self.dims[dim] if run.count > 1] or list(self.dims[dim])
        if len(runs) == 2 and runs[0].axis is not None and runs[1].axis is None:
            outer, parts = runs[0], runs[1].count
            run = _Run(outer.axis, outer.count * parts, outer.step / parts)
            return self.shifted(outer.axis, (1 / parts - 1) / 2 * outer.step).put(dim, (run,)), run
        if len(runs) != 1:
            raise _UntraceableError("along a dimension into which several are folded")
        return self, runs[0]

    def reduced(self, dim: int) -> _Place:
        """One cell in the middle of those of a dimension."""
        place = self
        for run in self.dims[dim]:
            place = place.shifted(run.axis, run.step * (run.count - 1) / 2)
        return place.put(dim, tuple(_Run(r.axis, 1, r.step * r.count) for r in self.dims[dim] if r.axis is not None))

    def mixed(self, dim: int, size: int) -> _Place:
        """Channels that each read a whole dimension."""
        return self.reduced(dim).put(dim, _plain(size))


def _plain(count: int) -> _Runs:
    return (_Run(None, count),) if count != 1 else ()


def _spatial(runs: _Runs) -> bool:
    return any(run.axis is not None for run in runs)


def _whole(volume: Tensor) -> _Place:
    """The input's own voxels."""
    zeros = (0.0,) * (volume.ndim - 2)
    voxels = [(_Run(axis, size, 1.0),) for axis, size in enumerate(volume.shape[2:])]
    return _Place((_plain(volume.shape[0]), _plain(volume.shape[1]), *voxels), zeros, zeros)


def _trace_of(fate: _Place | _Lost | None, shape: tuple[int, ...]) -> Trace:
    if fate is None:
        return Trace(lost="the layer's output does not descend from the input's voxels")
    if isinstance(fate, _Lost):
        return Trace(lost=fate.reason)
    place = fate
    for dim, runs in enumerate(place.dims):
        if _spatial(runs) and not _spatial(runs[-1:]):
            try:
                place, _ = place.sole(dim)
            except _UntraceableError as error:
                return Trace(lost=f"cells and channels share dimension {dim} of {shape} ({error})")
    grid = sorted((run for runs in place.dims for run in runs if run.axis is not None), key=lambda run: run.axis or 0)
    for axis in range(len(place.offset)):
        if (number := sum(run.axis == axis for run in grid)) != 1:
            return Trace(lost=f"spatial axis {axis} runs along {number or 'none'} of the dimensions {shape}")
    return Trace(
        tuple(run.count for run in grid),
        tuple(run.step for run in grid),
        place.offset,
        place.spread,
        tuple(tuple(run.axis for run in runs if run.axis is not None) for runs in place.dims),
        notes=place.notes,
    )


# --- Rules: what an operator does to places ---


@dataclass(frozen=True)
class _Call:
    """One operator call: its arguments by the schema's names, and the fates of its tensors before it ran."""

    name: str
    given: dict[str, Any]
    inputs: list[tuple[Tensor, _Place | _Lost | None]]
    outputs: list[Tensor]
    size: tuple[int, ...]  # of the first input, which the call may change

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.outputs[0].shape)

    @property
    def place(self) -> _Place:
        """The first input's."""
        fate = self.inputs[0][1]
        if isinstance(fate, _Place):
            return fate
        raise _UntraceableError(fate.reason if isinstance(fate, _Lost) else "on a tensor without a place")

    def dims(self, value: Any) -> list[int]:
        """Dimensions as the call names them, counted from the front; none named means all."""
        named = [value] if isinstance(value, int) else value if value else range(len(self.size))
        return [dim % len(self.size) for dim in named]


_Rule = Callable[[_Call], _Place | list[_Place] | None]


def _same(call: _Call) -> _Place:
    return call.place


def _nowhere(call: _Call) -> None:
    """A new tensor of an old one's shape."""


def _per_axis(value: Any, axes: int) -> list:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * axes if len(values) == 1 else values


def _window(call: _Call, place: _Place, lines: Sequence[tuple[float, float]]) -> _Place:
    """Move the last dimensions, each by its (scale, start)."""
    for dim, (scale, start) in zip(range(-len(lines), 0), lines, strict=True):
        place = place.moved(dim, scale, start, call.shape[dim])
    return place


def _convolution(call: _Call) -> _Place:
    weight = call.given["weight"]
    axes = weight.ndim - 2
    stride, padding, dilation = (_per_axis(call.given[name], axes) for name in ("stride", "padding", "dilation"))
    centre = [(k - 1) * d / 2 - p for k, d, p in zip(weight.shape[2:], dilation, padding, strict=True)]
    lines = [(1 / s, -c / s) if call.given["transposed"] else (s, c) for s, c in zip(stride, centre, strict=True)]
    return _window(call, call.place.mixed(-axes - 1, call.shape[-axes - 1]), lines)


def _pool(call: _Call) -> _Place:
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


def _adaptive_pool(call: _Call) -> _Place:
    axes, lines = len(call.given["output_size"]), []
    for n, m in zip(call.size[-axes:], call.shape[-axes:], strict=True):  # cell j reads floor(jn/m)..ceil((j+1)n/m)-1
        lines.append(_fitted(n / m, [(j * n // m - (-(j + 1) * n // m) - 1) / 2 for j in range(m)]))
    return _window(call, call.place, lines)


def _resample(call: _Call) -> _Place:
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


def _pad(call: _Call) -> _Place:
    pad = call.given["pad" if call.name == "constant_pad_nd" else "padding"]
    return _window(call, call.place, [(1, -low) for low in pad[-2::-2]])


def _slice(call: _Call) -> _Place:
    (dim,) = call.dims(call.given["dim"])
    start = slice(call.given["start"], None).indices(call.size[dim])[0]
    return call.place.moved(dim, call.given["step"], start, call.shape[dim])


def _select(call: _Call) -> _Place:
    (dim,) = call.dims(call.given["dim"])
    return call.place.moved(dim, 1, call.given["index"] % call.size[dim], 1).put(dim)


def _gather(call: _Call) -> _Place:
    """Indices in a row, evenly spaced, are a slice."""
    given = call.given.get("indices") or [None] * call.given["dim"] + [call.given["index"]]
    named = [(dim, index) for dim, index in enumerate(given) if index is not None]
    dim, index = named[0]
    if len(named) != 1 or index.ndim != 1 or index.dtype == torch.bool:
        raise _UntraceableError("with several indices or a mask")
    rows = index.tolist()
    scale = rows[1] - rows[0] if len(rows) > 1 else 1
    if _spatial(call.place.dims[dim]) and rows != [rows[0] + scale * j for j in range(len(rows))]:
        raise _UntraceableError("with indices that are not evenly spaced")
    return call.place.moved(dim, scale, rows[0] % call.size[dim], len(rows))


def _split(call: _Call) -> list[_Place]:
    (dim,) = call.dims(call.given["dim"])
    places, start = [], 0
    for part in call.outputs:
        places.append(call.place.moved(dim, 1, start, part.shape[dim]))
        start += part.shape[dim]
    return places


def _unbind(call: _Call) -> list[_Place]:
    (dim,) = call.dims(call.given["dim"])
    return [call.place.moved(dim, 1, j, 1).put(dim) for j in range(call.size[dim])]


def _flip(call: _Call) -> _Place:
    place = call.place
    for dim in call.dims(call.given["dims"]):
        place = place.moved(dim, -1, call.size[dim] - 1, call.size[dim])
    return place


def _permute(call: _Call) -> _Place:
    order = list(range(len(call.size)))
    if call.name == "permute":
        order = call.dims(call.given["dims"])
    elif len(order) > 1:
        a, b = call.dims([call.given.get("dim0", 0), call.given.get("dim1", 1)])
        order[a], order[b] = order[b], order[a]
    return replace(call.place, dims=tuple(call.place.dims[dim] for dim in order))


def _unsqueeze(call: _Call) -> _Place:
    dims = list(call.place.dims)
    dims.insert(call.given["dim"] % (len(dims) + 1), ())
    return replace(call.place, dims=tuple(dims))


def _squeeze(call: _Call) -> _Place:
    gone = {dim for dim in call.dims(call.given.get("dim")) if call.size[dim] == 1}
    return replace(call.place, dims=tuple(runs for dim, runs in enumerate(call.place.dims) if dim not in gone))


def _expand(call: _Call) -> _Place:
    """Copies of one cell have no place; a repeated row of cells is no row."""
    place, new = call.place, len(call.shape) - len(call.size)
    place = replace(place, dims=((),) * new + place.dims)
    for dim, (old, size) in enumerate(zip((1,) * new + call.size, call.shape, strict=True)):
        if old not in (1, size) and _spatial(place.dims[dim]):
            raise _UntraceableError("along a spatial axis")
        if old != size:
            place = place.mixed(dim, size)
    return place


def _view(call: _Call) -> _Place:
    """The runs of all dimensions in memory's order, folded anew."""
    waiting = deque(_coalesced(run for runs in call.place.dims for run in runs))
    dims: list[_Runs] = []
    for size, following in zip(call.shape, (*call.shape[1:], 1), strict=True):
        taken: list[_Run] = []
        left = size
        while left > 1 or (size == 1 and not taken and waiting and waiting[0].count == 1):
            run = waiting.popleft()
            if run.count > left and run.count % left == 0:
                run, inner = run.split(left)
                waiting.appendleft(inner)
            if left % run.count:
                raise _UntraceableError(f"from {call.size} to {call.shape} cuts a row of cells unevenly")
            taken.append(run)
            left //= run.count
        while waiting and waiting[0].count == 1 != following and _spatial(tuple(taken[-1:])):
            taken.append(waiting.popleft())  # an axis of one cell stays with its neighbour, not with the channels
        dims.append(_coalesced(taken))
    if waiting and dims:  # single cells
        dims[-1] += tuple(waiting)
    return replace(call.place, dims=tuple(dims))


def _coalesced(runs: Iterable[_Run]) -> _Runs:
    done: list[_Run] = []
    for run in runs:
        if done and (both := done[-1].merged(run)):
            done[-1] = both
        else:
            done.append(run)
    return tuple(done)


def _unfold(call: _Call) -> _Place:
    """Windows along a dimension, whose elements go to a new last one."""
    (dim,) = call.dims(call.given["dimension"])
    place, run = call.place.sole(dim)
    place = place.moved(dim, call.given["step"], 0, call.shape[dim])
    return replace(place, dims=(*place.dims, (replace(run, count=call.given["size"]),)))


def _pixel_shuffle(call: _Call) -> _Place:
    """(C r r, H, W) -> (C, H r, W r)."""
    r, place = call.given["upscale_factor"], call.place
    if _spatial(place.dims[-3]):
        raise _UntraceableError("of cells")
    rows, columns = ((*place.dims[dim], _Run(None, r)) for dim in (-2, -1))
    return place.put(-3, _plain(call.shape[-3])).put(-2, rows).put(-1, columns)


def _reduce(call: _Call) -> _Place:
    place = call.place
    gone = call.dims(call.given.get("dim"))
    for dim in gone:
        place = place.reduced(dim)
    if not call.given.get("keepdim"):
        place = replace(place, dims=tuple(runs for dim, runs in enumerate(place.dims) if dim not in gone))
    return place


def _join(call: _Call) -> _Place | None:
    return _joined(call.inputs, call.shape)


def _copy(call: _Call) -> _Place | None:
    return _joined(call.inputs[1:2], call.shape)


def _stack(call: _Call) -> _Place | None:
    dim = call.given["dim"] % len(call.shape)
    place = _joined(call.inputs, call.shape[:dim] + call.shape[dim + 1 :])
    return place and replace(place, dims=(*place.dims[:dim], _plain(call.shape[dim]), *place.dims[dim:]))


def _cat(call: _Call) -> _Place | None:
    inputs = [(tensor, fate) for tensor, fate in call.inputs if tensor.numel()]
    dim = call.given["dim"] % len(call.shape)
    known = [fate for _, fate in inputs if isinstance(fate, _Place)]
    if len(inputs) > 1 and any(_spatial(place.dims[dim]) for place in known):
        raise _UntraceableError("along a spatial axis")
    return _joined(inputs, call.shape, joined=dim)


def _matmul(call: _Call) -> _Place | None:
    """Rows of the first factor, as a query's, or else columns of the second, as where a weight stands first."""
    a, b = (fate for _, fate in call.inputs[-2:])
    if isinstance(a, _Place) and any(map(_spatial, a.dims[:-1])):
        return _noted(a.mixed(-1, call.shape[-1]), [b])
    if isinstance(a, _Lost):
        raise _UntraceableError(a.reason)
    if isinstance(b, _Lost):
        raise _UntraceableError(b.reason)
    return b.mixed(-2, call.shape[-2]) if b else a.mixed(-1, call.shape[-1]) if a else None


def _attention(call: _Call) -> _Place:
    return _noted(call.place.mixed(-1, call.shape[-1]), [fate for _, fate in call.inputs[1:]])


# --- Joining branches ---


def _joined(
    inputs: list[tuple[Tensor, _Place | _Lost | None]], shape: tuple[int, ...], joined: int = -1
) -> _Place | None:
    """The mean place of tensors that broadcast to ``shape``, but for the dimension ``joined``.

    What is repeated along an axis, such as the gate of a squeeze-and-excitation block, has no say about that axis; nor
    has what does not descend from the input.
    """
    known = [(tuple(tensor.shape), fate) for tensor, fate in inputs if isinstance(fate, _Place)]
    lost = [fate for tensor, fate in inputs if isinstance(fate, _Lost) and math.prod(tensor.shape[2:]) > 1]
    if not known and any(isinstance(fate, _Lost) for _, fate in inputs):
        raise _UntraceableError("of nothing known")
    if not known:
        return None
    if lost and joined < 0 and all(size != shape for size, _ in known):
        raise _UntraceableError("of nothing known of this shape")
    votes = [replace(place, dims=_aligned(size, place, shape)) for size, place in known]
    dims = [_mean_runs([v.dims[d] for v in votes if _spatial(v.dims[d])], shape[d]) for d in range(len(shape))]
    places = [_mean_place(axis, votes) for axis in range(len(votes[0].offset))]
    notes = tuple(dict.fromkeys(note for vote in votes for note in vote.notes))
    place = _Place(tuple(dims), tuple(o for o, _ in places), tuple(s for _, s in places), notes)
    return _noted(place, lost)


def _aligned(size: tuple[int, ...], place: _Place, shape: tuple[int, ...]) -> tuple[_Runs, ...]:
    """A place's dimensions under those of ``shape``, from the last; none where it is repeated."""
    missing = len(shape) - len(size)
    kept = [runs if old == new else () for runs, old, new in zip(place.dims, size, shape[missing:], strict=True)]
    return ((),) * missing + tuple(kept)


def _mean_runs(candidates: list[_Runs], size: int) -> _Runs:
    if not candidates:
        return _plain(size)
    if len({tuple((run.axis, run.count) for run in runs) for runs in candidates}) > 1:
        raise _UntraceableError("of tensors whose dimensions run along different axes")
    return tuple(replace(same[0], step=_mean([run.step for run in same])) for same in zip(*candidates, strict=True))


def _mean_place(axis: int, votes: list[_Place]) -> tuple[float, float]:
    """(offset, spread): the mean over the branches, and how far one is from it at the first or last cell."""
    ends = []
    for vote in votes:
        runs = [run for runs in vote.dims for run in runs if run.axis == axis]
        if runs:
            last = vote.offset[axis] + sum(run.step * (run.count - 1) for run in runs)
            ends.append((vote.offset[axis], last, vote.spread[axis]))
    if not ends:
        return _mean([vote.offset[axis] for vote in votes]), max(vote.spread[axis] for vote in votes)
    first, last = _mean([low for low, _, _ in ends]), _mean([high for _, high, _ in ends])
    return first, max(max(abs(low - first), abs(high - last)) + spread for low, high, spread in ends)


def _mean(values: list[float]) -> float:
    """Equal values have themselves as their mean, without rounding."""
    return values[0] if len(set(values)) == 1 else math.fsum(values) / len(values)


def _noted(place: _Place, others: Sequence[_Place | _Lost | None]) -> _Place:
    """``place``, with a note of each lost branch that it was joined with."""
    lost = [f"joined with a branch that was lost: {fate.reason}" for fate in others if isinstance(fate, _Lost)]
    return replace(place, notes=tuple(dict.fromkeys((*place.notes, *lost))))


# By the operator's name without the underscore of its in-place form; the first match counts.
_RULES: tuple[tuple[str, _Rule], ...] = (
    (r"_?convolution(_overrideable)?", _convolution),
    (r"(max|avg)_pool\dd(_with_indices)?", _pool),
    (r"_?adaptive_(max|avg)_pool\dd", _adaptive_pool),
    (r"_?upsample_.*", _resample),
    (r"constant_pad_nd|(reflection|replication)_pad\dd", _pad),
    (r"slice(_copy)?", _slice),
    (r"select(_copy)?", _select),
    (r"index|index_select", _gather),
    (r"(unsafe_)?split(_with_sizes)?(_copy)?", _split),
    (r"unbind(_copy)?", _unbind),
    (r"flip", _flip),
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
    (r"copy", _copy),
    (r"mm|bmm|addmm|baddbmm|matmul", _matmul),
    (r"linear|_scaled_dot_product_.*", _attention),
    (r"new_.*|.*_like", _nowhere),
    (r".*(batch|instance|group|layer|rms)_norm.*|_?(log_|safe_)*softmax|native_dropout|rrelu.*|_prelu_kernel", _same),
    (r"_to_copy|detach|alias|lift_fresh|fill|zero|hardswish|log_sigmoid_forward", _same),
    (r"_native_multi_head_attention|_transformer_encoder_layer_fwd", _same),
)


@cache
def _rule(func: Any) -> tuple[str, _Rule | None]:
    """The operator's name, and what it does to places; None where that is not known."""
    space, name = func._schema.name.split("::")
    name = name if name.startswith("__") else name.rstrip("_")
    if space != "aten":
        return name, None
    for pattern, rule in _RULES:
        if re.fullmatch(pattern, name):
            return name, rule
    if torch.Tag.pointwise in func.tags:
        return name, _join
    return name, _reduce if torch.Tag.reduction in func.tags else None


class _Tracing(TorchDispatchMode):
    """Follows places through every operator that runs.

    Attributes
    ----------
    fates : the place, or the loss, of each living tensor that descends from the input
    """

    def __init__(self) -> None:
        super().__init__()
        self.fates = WeakTensorKeyDictionary()
        self._parts = WeakTensorKeyDictionary()  # slice -> (of what, along which dimension, from where)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [(t, self.fates.get(t)) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        size = tuple(inputs[0][0].shape) if inputs else ()
        result = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        name, rule = _rule(func)
        if outputs and inputs and (rule is _slice or any(fate for _, fate in inputs)):
            schema = func._schema.arguments
            given = {a.name: a.default_value for a in schema if a.has_default_value()}
            given |= dict(zip([a.name for a in schema], args, strict=False)) | kwargs
            call = _Call(name, given, inputs, outputs, size)
            self._follow(call, rule, str(func))
        return result

    def _follow(self, call: _Call, rule: _Rule | None, operator: str) -> None:
        if any(fate for _, fate in call.inputs):
            fates = _outcome(call, rule, operator)
            for output, fate in zip(call.outputs, fates, strict=True):
                self._set(output, fate)
        if rule is _slice and call.given["step"] == 1:
            (dim,) = call.dims(call.given["dim"])
            start = slice(call.given["start"], None).indices(call.size[dim])[0]
            self._parts[call.outputs[0]] = (call.inputs[0][0], dim, start)
        if rule is _copy:
            self._write_back(call.outputs[0])

    def _set(self, tensor: Tensor, fate: _Place | _Lost | None) -> None:
        if fate is None:
            self.fates.pop(tensor, None)
        else:
            self.fates[tensor] = fate

    def _write_back(self, part: Tensor) -> None:
        """An empty canvas has the place of the first thing that is copied into a part of it, as circular padding does.

        What is copied into another part later, such as the far end of the volume, has no say.
        """
        while part in self._parts and isinstance(fate := self.fates.get(part), (_Place, _Lost)):
            canvas, dim, start = self._parts[part]
            if canvas in self.fates:
                return
            self.fates[canvas] = fate.moved(dim, 1, -start, canvas.shape[dim]) if isinstance(fate, _Place) else fate
            part = canvas


def _outcome(call: _Call, rule: _Rule | None, operator: str) -> list[_Place | _Lost | None]:
    """The fate of each output."""
    try:
        if rule is None:
            raise _UntraceableError("")
        found = rule(call)
    except _UntraceableError as error:
        earlier = [fate for _, fate in call.inputs if isinstance(fate, _Lost)]
        return [earlier[0] if earlier else _Lost(f"{operator} {error}".strip())] * len(call.outputs)
    if isinstance(found, list):
        return list(found)
    # Statistics and the like beside the result have shapes of their own.
    return [
        found if found is None or output.shape == call.outputs[0].shape else _Lost(f"{operator} beside its result")
        for output in call.outputs
    ]
