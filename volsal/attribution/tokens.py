"""How a layer's output is read as (B, C, *cells), whatever the order and the folding in which the model holds it.

Transformers hold their cells as tokens (B, N, C), some with a class token before them, or with the channels last;
networks that go through a volume slice by slice fold the slices into the batch.  Where the trace of the output says
what runs along each of its dimensions, all of these are views of one thing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from volsal.attribution.alignment.places import BATCH, Place, Row, Run, Runs, UntraceableError


@dataclass(frozen=True)
class Reading:
    """What runs along each dimension of an output, from which (B, C, *cells) is read.

    Attributes
    ----------
    dims : for each dimension its runs, slowest first; each spatial axis of the input occurs in exactly one
    batch : volumes in the batch that it was found with
    """

    dims: tuple[Runs, ...]
    batch: int

    @classmethod
    def of(cls, place: Place, batch: int) -> Reading:
        """The reading of a tensor whose elements lie on a grid; UntraceableError where it is no view of one."""
        dims = place.dims
        if dims[0] == (Run(None, batch),) and not any(run.axis == BATCH for runs in dims for run in runs):
            dims = (Run(BATCH, batch),), *dims[1:]  # volumes that were taken apart and put together again
        reading = cls(dims, batch)
        channels = [run.count for run in reading._runs() if run.axis is None]
        if len(channels) > 1:
            raise UntraceableError(f"its channels run along {len(channels)} dimensions, of {channels}")
        batches = [run.count for run in reading._runs() if run.axis == BATCH]
        if batches != [batch] * (batch > 1):
            raise UntraceableError(f"the batch of {batch} runs along it as {batches}")
        return reading

    def _runs(self) -> Iterator[Run]:
        """The runs of all dimensions; those of size 1 that say nothing are left out."""
        return (inner for runs in self.dims for run in runs for inner in run.inner if run.spatial or inner.count != 1)

    @property
    def regular(self) -> bool:
        """Whether the output is (B, C, *cells) as it stands; single cells have no order."""
        wide = [[run for run in runs if run.count > 1] for runs in self.dims]
        expected = [BATCH, None, *range(len(wide) - 2)]
        return all(
            not runs or (len(runs) == 1 and runs[0].axis == axis and not isinstance(runs[0], Row))
            for runs, axis in zip(wide, expected, strict=True)
        )

    def shape(self, batch: int) -> tuple[int, ...]:
        """Of the output that is read, for so many volumes."""
        return tuple(math.prod(batch if run.axis == BATCH else run.count for run in runs) for runs in self.dims)

    def __call__(self, output: Tensor, batch: int) -> Tensor:
        """(B, C, *cells), sharing memory with ``output``, whose cells' axes come in the input's order."""
        if self.regular:
            return output
        for dim, runs in enumerate(self.dims):
            if runs and isinstance(runs[0], Row):
                output = output.narrow(dim, runs[0].before, runs[0].size)
        found = list(self._runs())
        view = output.view([batch if run.axis == BATCH else run.count for run in found])
        order = sorted(range(len(found)), key=lambda number: _rank(found[number]))
        view = view.permute(order)
        if all(run.axis != BATCH for run in found):
            view = view.unsqueeze(0)
        return view if any(run.axis is None for run in found) else view.unsqueeze(1)

    def __str__(self) -> str:
        """What is folded: ``(B, 1 + 4*3*5, 48)`` for a class token and 4 x 3 x 5 tokens of 48 channels."""
        return f"({', '.join(map(_told, self.dims))})"


def _rank(run: Run) -> int:
    """The batch comes first, then the channels, then the axes in their order."""
    return -2 if run.axis == BATCH else -1 if run.axis is None else run.axis


def _told(runs: Runs) -> str:
    if runs and isinstance(row := runs[0], Row):
        after = row.count - row.before - row.size
        parts = [str(row.before)] * (row.before > 0) + [_told(row.cells)] + [str(after)] * (after > 0)
        return " + ".join(parts)
    return "*".join("B" if run.axis == BATCH else str(run.count) for run in runs) or "1"
