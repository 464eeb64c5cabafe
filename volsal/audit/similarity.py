"""How alike two maps on one grid are: by rank, by structure, by their top voxels, by where they peak.

One set of measures serves sanity checks (alike after the weights were randomised is bad), stability (unlike after a
harmless change is bad) and agreement between methods.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from volsal.audit.localization import nearest_mm
from volsal.audit.metric import Figure, MetricError, Undefined, flaw_of, part_of, require_on
from volsal.grid import Grid


@dataclass(frozen=True)
class Similarity:
    """How alike two maps are; each undefined where either map is empty, constant or holds NaN.

    Attributes
    ----------
    spearman : rank correlation of the signed maps, in [-1, 1]; see :func:`spearman`
    spearman_abs : of their absolute values
    ssim : structural similarity of their absolute values, each divided by its maximum; see :func:`ssim`
    top_dice : see :func:`top_dice`; of the positive parts
    peak_mm : see :func:`peak_distance_mm`; of the positive parts
    """

    spearman: Figure
    spearman_abs: Figure
    ssim: Figure
    top_dice: Figure
    peak_mm: Figure


#: The names of the measures of similarity.
MEASURES: tuple[str, ...] = tuple(field.name for field in fields(Similarity))


def similarity(
    first: NDArray,
    second: NDArray,
    grid: Grid,
    within: NDArray[np.bool_] | None = None,
    top_share: float = 0.01,
) -> Similarity:
    """All measures of how alike two maps (I, J, K) on ``grid`` are, over the voxels of ``within`` (None: all).

    SSIM is computed on the whole grid, with both maps set to 0 outside ``within``: its windows need neighbours.

    Raises
    ------
    MetricError
        Where a map or ``within`` does not lie on the grid.
    """
    return Compared(first, grid, within, top_share).with_(Compared(second, grid, within, top_share))


class Compared:
    """A map that is compared with several others: what each comparison needs of it is found once.

    Parameters
    ----------
    values, grid, within, top_share : as of :func:`similarity`

    Raises
    ------
    MetricError
        As :func:`similarity`.
    """

    def __init__(
        self, values: NDArray, grid: Grid, within: NDArray[np.bool_] | None = None, top_share: float = 0.01
    ) -> None:
        require_on(grid, map=values, within=within)
        self.values, self.grid, self.within, self.top_share = values, grid, within, top_share
        self.flaw = flaw_of(values if within is None else values[within])

    def with_(self, other: Compared) -> Similarity:
        """All measures of how alike this map and another of the same grid and ``within`` are."""
        flaw = self.flaw or other.flaw
        if flaw is not None:
            return Similarity(flaw, flaw, flaw, flaw, flaw)
        none = None if self._positive.any() and other._positive.any() else Undefined("a map has no positive part")
        return Similarity(
            pearson(self._ranks, other._ranks),
            pearson(self._ranks_abs, other._ranks_abs),
            _ssim(self._boxes, other._boxes),
            none or _dice(self._top, other._top),
            none or peak_distance_mm(self._positive, other._positive, self.grid),
        )

    @cached_property
    def _kept(self) -> NDArray:
        return self.values.ravel() if self.within is None else self.values[self.within]

    @cached_property
    def _ranks(self) -> NDArray[np.float64]:
        return ranks(self._kept)

    @cached_property
    def _ranks_abs(self) -> NDArray[np.float64]:
        return ranks(np.abs(self._kept))

    @cached_property
    def _whole(self) -> NDArray:
        return self.values if self.within is None else np.where(self.within, self.values, 0)

    @cached_property
    def _positive(self) -> NDArray:
        return part_of(self._whole)

    @cached_property
    def _top(self) -> NDArray[np.bool_]:
        return _top(self._positive if self.within is None else self._positive[self.within], self.top_share)

    @cached_property
    def _boxes(self) -> _Boxes:
        size = np.abs(self._whole)
        return _Boxes.of(size / size.max())


def spearman(first: NDArray, second: NDArray) -> Figure:
    """Spearman's rank correlation of two arrays of one shape, equal values sharing their mean rank.

    In [-1, 1]; 0 is chance.  Undefined where either is constant or holds NaN.
    """
    flaw = flaw_of(first) or flaw_of(second)
    return flaw or pearson(ranks(first.ravel()), ranks(second.ravel()))


def pearson(first: NDArray, second: NDArray) -> Figure:
    """Pearson's correlation of two arrays (n,); in [-1, 1], undefined where either does not vary."""
    flaw = flaw_of(first) or flaw_of(second)
    if flaw:
        return flaw
    a, b = first - first.mean(dtype=np.float64), second - second.mean(dtype=np.float64)
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(np.clip(a @ b / size, -1, 1)) if size > 0 else Undefined("what varies does so less than it is rounded")


def ranks(values: NDArray) -> NDArray[np.float64]:
    """(n,) ranks from 0, equal values sharing the mean of theirs.

    >>> ranks(np.array([5, 1, 1, 7]))
    array([2. , 0.5, 0.5, 3. ])
    """
    order = np.argsort(values)
    ascending = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))
    ends = np.append(starts[1:], len(values))
    out = np.empty(len(values))
    out[order] = np.repeat((starts + ends - 1) / 2, ends - starts)
    return out


def ssim(first: NDArray, second: NDArray, data_range: float = 1.0, window: int = 7) -> Figure:
    r"""Mean structural similarity of two volumes; Wang et al., IEEE TIP 2004, eq. 13, in three dimensions.

    .. math:: \frac{(2\mu_a\mu_b + C_1)(2\sigma_{ab} + C_2)}{(\mu_a^2 + \mu_b^2 + C_1)(\sigma_a^2 + \sigma_b^2 + C_2)}

    over cubes of ``window`` voxels an edge that lie wholly inside (fewer along a short axis), unweighted, with unbiased
    (co)variances, C1 = (0.01 range)^2, C2 = (0.03 range)^2.  In [-1, 1]; 1 where both are equal.  Large empty parts
    are alike and raise it: compare it with that of unrelated maps, never with 0.  Undefined where NaN is met.

    Raises
    ------
    MetricError
        For volumes of different shapes, or an even window.
    """
    if first.shape != second.shape or window % 2 == 0:
        raise MetricError(f"SSIM needs one shape and an odd window: {first.shape}, {second.shape}, window {window}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return Undefined("a map holds NaN or infinity")
    return _ssim(_Boxes.of(first, window), _Boxes.of(second, window), data_range)


@dataclass(frozen=True, eq=False)
class _Boxes:
    """A volume with its means and those of its squares over cubes."""

    values: NDArray[np.float64]
    edges: list[int]
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    @classmethod
    def of(cls, volume: NDArray, window: int = 7) -> _Boxes:
        edges = [min(window, n - 1 + n % 2) for n in volume.shape]
        values = volume.astype(np.float64)
        return cls(values, edges, _box_means(values, edges), _box_means(values**2, edges))


def _ssim(a: _Boxes, b: _Boxes, data_range: float = 1.0) -> float:
    count = int(np.prod(a.edges))
    unbiased = count / max(1, count - 1)
    varied = a.squares - a.mean**2 + b.squares - b.mean**2
    shared = _box_means(a.values * b.values, a.edges) - a.mean * b.mean
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    alike = (2 * a.mean * b.mean + c1) * (2 * unbiased * shared + c2)
    return float((alike / ((a.mean**2 + b.mean**2 + c1) * (unbiased * varied + c2))).mean())


def _box_means(values: NDArray[np.float64], edges: list[int]) -> NDArray[np.float64]:
    for axis, edge in enumerate(edges):
        lines = np.moveaxis(values, axis, -1)
        sums = np.zeros((*lines.shape[:-1], lines.shape[-1] + 1))
        np.cumsum(lines, axis=-1, out=sums[..., 1:])
        values = np.moveaxis((sums[..., edge:] - sums[..., :-edge]) / edge, -1, axis)
    return values


def top_dice(first: NDArray, second: NDArray, share: float = 0.01) -> Figure:
    r"""Dice overlap of the most relevant voxels of two maps: 2 abs(A and B) / (abs(A) + abs(B)).

    A map's top are its ``share`` of all voxels that are largest, or fewer where fewer are above 0; voxels equal to the
    least of them all count.  In [0, 1]; chance is about ``share``.  Undefined where a map has nothing above 0.
    """
    return _dice(_top(first, share), _top(second, share))


def _top(values: NDArray, share: float) -> NDArray[np.bool_]:
    count = max(1, round(share * values.size))
    least = np.partition(values, values.size - count, axis=None)[values.size - count]
    return (values >= least) & (values > 0)


def _dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> Figure:
    if not (a.any() and b.any()):
        return Undefined("a map has no positive part")
    return float(2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b)))


def peak_distance_mm(first: NDArray, second: NDArray, grid: Grid) -> Figure:
    """Between the maxima of two maps (I, J, K), the nearest pair of equal ones, mm; undefined for a constant map."""
    flaw = flaw_of(first) or flaw_of(second)
    if flaw:
        return flaw
    places = [grid.world(np.argwhere(values == values.max())) for values in (first, second)]
    return nearest_mm(places[0], places[1])
