"""Where the elements of one tensor lie on the voxels of the model's input.

A :class:`Place` says it for each dimension of a tensor, in :class:`Run` objects; a tensor that descends from the input
in a way that could not be followed is :class:`Lost`.  The methods of a place are what the rules in
:mod:`volsal.attribution.alignment.operators` are made of, and :func:`joined` is where branches of a network meet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


class UntraceableError(Exception):
    """A rule does not cover this case; the text says why."""


@dataclass(frozen=True)
class Lost:
    """The fate of a tensor that descends from the input in a way that could not be followed."""

    reason: str


#: The axis of a :class:`Run` over the volumes of a batch, which lie nowhere on one another.
BATCH = -1


@dataclass(frozen=True)
class Run:
    """``count`` neighbours that lie ``step`` voxels apart along ``axis``; None for channels and the like.

    ``rolled`` says by how many cells they, or the whole row that they are a part of, were shifted cyclically, as before
    the shifted windows of a Swin transformer: they lie where they would without only once they are shifted back.
    """

    axis: int | None
    count: int
    step: float = 0.0
    rolled: int = 0

    @property
    def spatial(self) -> bool:
        """Whether it runs along an axis of the input."""
        return self.axis is not None and self.axis != BATCH

    @property
    def inner(self) -> Runs:
        """The runs that it consists of."""
        return (self,)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What two branches must have in common to be joined: all but the step."""
        return self.axis, self.count, self.rolled

    def split(self, outer: int) -> tuple[Run, Run]:
        """Index i as (i // inner, i % inner)."""
        inner = self.count // outer
        return replace(self, count=outer, step=self.step * inner), replace(self, count=inner)

    def merged(self, inner: Run) -> Run | None:
        """What :meth:`split` split, or None where the two are no single run."""
        in_step = self.count == 1 or math.isclose(self.step, inner.step * inner.count)
        same = (self.axis, self.rolled) == (inner.axis, inner.rolled)
        return replace(inner, count=self.count * inner.count) if same and in_step else None


Runs = tuple[Run, ...]


@dataclass(frozen=True)
class Row(Run):
    """A dimension in which other elements stand before or after the cells: a class token, a margin of zeros.

    Attributes
    ----------
    before : how many elements that do not descend from the input come first
    cells : the runs of those that do
    """

    before: int = 0
    cells: Runs = ()

    @property
    def spatial(self) -> bool:
        """It holds cells."""
        return True

    @property
    def inner(self) -> Runs:
        """The runs of the cells."""
        return self.cells

    @property
    def size(self) -> int:
        """The number of cells."""
        return math.prod(run.count for run in self.cells)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Where the cells stand, and how."""
        return self.count, self.before, *(run.kind for run in self.cells)

    def split(self, outer: int) -> tuple[Run, Run]:
        """It has no regular parts."""
        raise UntraceableError(f"cuts a row of cells that others stand beside, {self.before} of them before it")

    def merged(self, inner: Run) -> Run | None:
        """It is no part of a regular row."""
        return None


@dataclass(frozen=True)
class Place:
    """Element (i_1, i_2, ...) lies at offset + sum of step * index over the runs of an axis, for each axis.

    A dimension holds several runs, slowest first, where a view folded dimensions: tokens (B, D * H * W, C).
    """

    dims: tuple[Runs, ...]
    offset: tuple[float, ...]
    spread: tuple[float, ...]
    notes: tuple[str, ...] = ()

    def put(self, dim: int, *dims: Runs) -> Place:
        """Replace one dimension by others, or by none."""
        before = list(self.dims)
        at = dim % len(before)
        return replace(self, dims=(*before[:at], *dims, *before[at + 1 :]))

    def shifted(self, axis: int | None, voxels: float) -> Place:
        """All of it, along one axis of the input."""
        return replace(self, offset=tuple(x + voxels * (k == axis) for k, x in enumerate(self.offset)))

    def moved(self, dim: int, scale: float, start: float, size: int) -> Place:
        """The new index j of a dimension is the old index ``scale * j + start``."""
        runs = self.dims[dim]
        if (scale, start, size) == (1, 0, math.prod(run.count for run in runs)):
            return self
        if not spatial(runs):
            return self.put(dim, placeless(size))
        for row in runs:
            if isinstance(row, Row) and (scale, start, size) == (1, row.before, row.size) and len(runs) == 1:
                return self.put(dim, row.cells)
        place, run = self.sole(dim)
        return place.shifted(run.axis, start * run.step).put(dim, (replace(run, count=size, step=scale * run.step),))

    def sole(self, dim: int) -> tuple[Place, Run]:
        """A spatial dimension as one run.

        Channels that a view interleaved with cells (pixel shuffle), and copies of a cell side by side, divide the cell.
        """
        runs = [run for run in self.dims[dim] if run.count > 1] or list(self.dims[dim])
        if any(isinstance(run, Row) for run in runs):
            raise UntraceableError("along a row of cells that others stand beside")
        if any(run.rolled for run in runs):
            raise UntraceableError("along cells that are shifted cyclically")
        if len(runs) == 2 and runs[0].spatial and runs[1].axis is None:
            outer, parts = runs[0], runs[1].count
            run = Run(outer.axis, outer.count * parts, outer.step / parts)
            return self.shifted(outer.axis, (1 / parts - 1) / 2 * outer.step).put(dim, (run,)), run
        if len(runs) != 1:
            raise UntraceableError("along a dimension into which several are folded")
        return self, runs[0]

    def reduced(self, dim: int) -> Place:
        """One cell in the middle of those of a dimension."""
        place, runs = self, [inner for run in self.dims[dim] for inner in run.inner]
        for run in runs:
            place = place.shifted(run.axis, run.step * (run.count - 1) / 2)
        return place.put(dim, tuple(replace(run, count=1, step=run.step * run.count) for run in runs if run.spatial))

    def mixed(self, dim: int, size: int) -> Place:
        """Channels that each read a whole dimension."""
        return self.reduced(dim).put(dim, placeless(size))


def placeless(count: int) -> Runs:
    """A dimension of channels and the like."""
    return (Run(None, count),) if count != 1 else ()


def spatial(runs: Runs) -> bool:
    """Whether a dimension runs along an axis of the input."""
    return any(run.spatial for run in runs)


def whole(volume: Tensor) -> Place:
    """The input's own voxels."""
    zeros = (0.0,) * (volume.ndim - 2)
    voxels = [(Run(axis, size, 1.0),) for axis, size in enumerate(volume.shape[2:])]
    batch = (Run(BATCH, volume.shape[0]),) if volume.shape[0] != 1 else ()
    return Place((batch, placeless(volume.shape[1]), *voxels), zeros, zeros)


Fate = Place | Lost | None  # None: does not descend from the input


# --- Joining branches ---


def joined(inputs: list[tuple[Tensor, Fate]], shape: tuple[int, ...], along: int = -1) -> Place | None:
    """The mean place of tensors that broadcast to ``shape``, but for the dimension ``along``.

    What is repeated along an axis, such as the gate of a squeeze-and-excitation block, has no say about that axis; nor
    has what does not descend from the input.
    """
    known = [(tuple(tensor.shape), fate) for tensor, fate in inputs if isinstance(fate, Place)]
    lost = [fate for tensor, fate in inputs if isinstance(fate, Lost) and math.prod(tensor.shape[2:]) > 1]
    if not known and any(isinstance(fate, Lost) for _, fate in inputs):
        raise UntraceableError("of nothing known")
    if not known:
        return None
    if lost and along < 0 and all(size != shape for size, _ in known):
        raise UntraceableError("of nothing known of this shape")
    votes = [replace(place, dims=_aligned(size, place, shape)) for size, place in known]
    dims = [_mean_runs([v.dims[d] for v in votes if _marked(v.dims[d])], shape[d]) for d in range(len(shape))]
    places = [_mean_place(axis, votes) for axis in range(len(votes[0].offset))]
    notes = tuple(dict.fromkeys(note for vote in votes for note in vote.notes))
    place = Place(tuple(dims), tuple(o for o, _ in places), tuple(s for _, s in places), notes)
    return noted(place, lost)


def agree(tensor: Tensor, one: Fate, other: Fate) -> bool:
    """Whether two fates of one tensor tell the same place; what is repeated along an axis agrees with any."""
    if one == other:
        return True
    if not (isinstance(one, Place) and isinstance(other, Place)):
        return False
    try:
        both = joined([(tensor, one), (tensor, other)], tuple(tensor.shape))
    except UntraceableError:
        return False
    return all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(both.spread, one.spread, strict=True)) if both else True


def _aligned(size: tuple[int, ...], place: Place, shape: tuple[int, ...]) -> tuple[Runs, ...]:
    """A place's dimensions under those of ``shape``, from the last; none where it is repeated."""
    missing = len(shape) - len(size)
    kept = [runs if old == new else () for runs, old, new in zip(place.dims, size, shape[missing:], strict=True)]
    return ((),) * missing + tuple(kept)


def _marked(runs: Runs) -> bool:
    """Whether a dimension holds more than channels and the like."""
    return any(run.spatial or run.axis == BATCH for run in runs)


def _mean_runs(candidates: list[Runs], size: int) -> Runs:
    if not candidates:
        return placeless(size)
    if len({tuple(run.kind for run in runs) for runs in candidates}) > 1:
        raise UntraceableError("of tensors whose dimensions run along different axes")
    return tuple(replace(same[0], step=_mean([run.step for run in same])) for same in zip(*candidates, strict=True))


def _mean_place(axis: int, votes: list[Place]) -> tuple[float, float]:
    """(offset, spread): the mean over the branches, and how far one is from it at the first or last cell."""
    ends = []
    for vote in votes:
        runs = [inner for runs in vote.dims for run in runs for inner in run.inner if inner.axis == axis]
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


def noted(place: Place, others: Sequence[Fate]) -> Place:
    """``place``, with a note of each lost branch that it was joined with."""
    lost = [f"joined with a branch that was lost: {fate.reason}" for fate in others if isinstance(fate, Lost)]
    return replace(place, notes=tuple(dict.fromkeys((*place.notes, *lost))))
