"""How alike two maps on one grid are: by rank, by structure, by their top voxels, by where they peak.

One set of measures serves sanity checks (alike after the weights were randomised is bad), stability (unlike after a
harmless change is bad) and agreement between methods.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

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
    require_on(grid, first=first, second=second, within=within)
    kept = (first, second) if within is None else (first[within], second[within])
    flaw = flaw_of(kept[0]) or flaw_of(kept[1])
    if flaw is not None:
        return Similarity(flaw, flaw, flaw, flaw, flaw)
    whole = [one if within is None else np.where(within, one, 0) for one in (first, second)]
    sizes = [np.abs(one) / np.abs(one).max() for one in whole]
    positive = [part_of(one) for one in whole]
    tops = [one if within is None else one[within] for one in positive]
    none = None if all(one.any() for one in positive) else Undefined("a map has no positive part")
    return Similarity(
        spearman(*kept),
        spearman(*(np.abs(one) for one in kept)),
        ssim(sizes[0], sizes[1]),
        none or top_dice(tops[0], tops[1], top_share),
        none or peak_distance_mm(positive[0], positive[1], grid),
    )


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
    edges = [min(window, n - 1 + n % 2) for n in first.shape]
    a, b = first.astype(np.float64), second.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Undefined("a map holds NaN or infinity")
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = (_box_means(x, edges) for x in (a, b, a * a, b * b, a * b))
    count = int(np.prod(edges))
    unbiased = count / max(1, count - 1)
    varied, shared = mean_aa - mean_a**2 + mean_bb - mean_b**2, mean_ab - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    alike = (2 * mean_a * mean_b + c1) * (2 * unbiased * shared + c2)
    return float((alike / ((mean_a**2 + mean_b**2 + c1) * (unbiased * varied + c2))).mean())


def _box_means(values: NDArray[np.float64], edges: list[int]) -> NDArray[np.float64]:
    for axis, edge in enumerate(edges):
        sums = np.cumsum(np.insert(values, 0, 0, axis=axis), axis=axis)
        n = sums.shape[axis]
        values = (sums.take(range(edge, n), axis) - sums.take(range(n - edge), axis)) / edge
    return values


def top_dice(first: NDArray, second: NDArray, share: float = 0.01) -> Figure:
    r"""Dice overlap of the most relevant voxels of two maps: 2 abs(A and B) / (abs(A) + abs(B)).

    A map's top are its ``share`` of all voxels that are largest, or fewer where fewer are above 0; voxels equal to the
    least of them all count.  In [0, 1]; chance is about ``share``.  Undefined where a map has nothing above 0.
    """
    tops = []
    for values in (first, second):
        count = max(1, round(share * values.size))
        least = np.partition(values, values.size - count, axis=None)[values.size - count]
        top = (values >= least) & (values > 0)
        if not top.any():
            return Undefined("a map has no positive part")
        tops.append(top)
    a, b = tops
    return float(2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b)))


def peak_distance_mm(first: NDArray, second: NDArray, grid: Grid) -> Figure:
    """Between the maxima of two maps (I, J, K), the nearest pair of equal ones, mm; undefined for a constant map."""
    flaw = flaw_of(first) or flaw_of(second)
    if flaw:
        return flaw
    places = [grid.world(np.argwhere(values == values.max())) for values in (first, second)]
    return float(nearest_mm(places[0], places[1]).min())
