"""What a figure of the audit is: a number with a definition, a range and a chance level, or why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from volsal.errors import VolsalError
from volsal.grid import Grid


class MetricError(VolsalError, ValueError):
    """A metric was asked about things that do not belong together, or with a setting that has no meaning."""


@dataclass(frozen=True)
class Undefined:
    """A figure that does not exist for this scan, and why.  It is counted, and never stands as 0."""

    reason: str


Figure = float | Undefined

Better = Literal["higher", "lower", "neither"]

#: Which part of a signed map counts as relevance: evidence for the target, evidence against it, or both.
Part = Literal["positive", "negative", "absolute"]
PARTS: tuple[Part, ...] = ("positive", "negative", "absolute")


@dataclass(frozen=True)
class Metric:
    """A metric as a report explains it.

    Attributes
    ----------
    name : as in tables
    family : ``localization``, ``faithfulness``, ``sanity``, ``stability``, ``similarity``, ``anatomy``
    function : what computes it
    definition : one sentence
    source : the paper, or ``volsal``
    low, high : its range; infinite where it has no bound
    better : which direction speaks for the map; ``neither`` where it depends on what is asked
    chance : what a map that knows nothing scores
    undefined : when there is no figure
    """

    name: str
    family: str
    function: Callable[..., Any]
    definition: str
    source: str
    low: float
    high: float
    better: Better
    chance: str
    undefined: str


def numbers(figures: Any) -> NDArray[np.float64]:
    """Figures as an array, NaN where undefined."""
    return np.array([np.nan if isinstance(figure, Undefined) else float(figure) for figure in figures])


def part_of(values: NDArray, part: Part = "positive") -> NDArray:
    """A map's relevance, >= 0: its positive part, its negative part as positive numbers, or its absolute value.

    Raises
    ------
    MetricError
        For another word.
    """
    if part not in PARTS:
        raise MetricError(f"unknown part {part!r} of a map; known: {', '.join(PARTS)}")
    if not np.issubdtype(values.dtype, np.floating):  # unsigned numbers have no negative, and mean another one
        values = values.astype(np.float32)
    if part == "absolute":
        return np.abs(values)
    return np.maximum(values if part == "positive" else -values, 0)


def flaw_of(values: NDArray) -> Undefined | None:
    """Why a map has no place that it points to: NaN, no relevance, or the same everywhere; None where it has."""
    if not values.size:
        return Undefined("no voxel of the map is left to be looked at")
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low) or not np.isfinite(high):
        return Undefined("the map holds NaN or infinity")
    if low == high:
        return Undefined("the map is empty" if high == 0 else "the map is constant")
    return None


def require_on(grid: Grid, **arrays: NDArray | None) -> None:
    """Raise :class:`MetricError` unless each array that is given has the grid's shape; a mask must be boolean."""
    for name, array in arrays.items():
        if array is None:
            continue
        if array.shape != grid.shape:
            raise MetricError(f"the {name} is {array.shape}, its grid {grid.shape}; bring both to one grid first")
        if name in ("mask", "within") and array.dtype != bool:
            raise MetricError(f"the {name} is {array.dtype}, expected bool; say which labels are meant: labels == 2")
