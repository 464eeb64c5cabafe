"""From figures per scan to a statement about patients: intervals, differences, and many tests at once.

Scans of one patient are not independent, so that patients are drawn, each with all of its scans.  Undefined figures
are left out of the estimate, counted, and their reasons kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from volsal.audit.metric import Figure, MetricError, Undefined

Statistic = Literal["mean", "median"]
Interval = Literal["percentile", "bca"]


@dataclass(frozen=True)
class Summary:
    """A figure over scans.

    Attributes
    ----------
    estimate : the statistic over all scans that have a figure
    low, high : its confidence interval; undefined for fewer than two patients
    level : the interval's coverage, such as 0.95
    n, patients : scans that have a figure, and patients they belong to
    undefined : scans that have none
    reasons : why, with how many scans each
    """

    estimate: Figure
    low: Figure
    high: Figure
    level: float
    n: int
    patients: int
    undefined: int
    reasons: dict[str, int]


@dataclass(frozen=True)
class Difference:
    """How much larger a figure is in one group than in another.

    Attributes
    ----------
    estimate, low, high : of the difference of the statistics, with its percentile bootstrap interval over patients
    p_value : two-sided, of a permutation test; see :func:`difference`
    first, second : the groups on their own
    """

    estimate: Figure
    low: Figure
    high: Figure
    p_value: Figure
    first: Summary
    second: Summary


def summarise(
    figures: Sequence[Figure],
    patients: Sequence[Hashable] | None = None,
    statistic: Statistic = "mean",
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    interval: Interval = "percentile",
) -> Summary:
    """The mean or median over scans, with a bootstrap interval over patients; NaN counts as undefined.

    Parameters
    ----------
    figures : one for each scan
    patients : whose scan each is; None: each is another patient's
    interval : ``percentile``, or ``bca``, bias-corrected and accelerated (Efron, JASA 1987, section 3), with the
        acceleration by leaving out a patient at a time

    Raises
    ------
    MetricError
        Where there is not a patient for each figure, or for an unknown statistic, interval or level.
    """
    known = _Known.of(figures, patients)
    compute = _statistic(statistic)
    if interval not in ("percentile", "bca") or not 0 < level < 1:
        raise MetricError(f"no such interval: {interval!r} at level {level}; known: percentile, bca; 0 < level < 1")
    if not len(known.values):
        nothing = Undefined("no scan has a figure")
        return known.summary(nothing, nothing, nothing, level)
    estimate = float(compute(known.values, np.ones((1, len(known.values))))[0])
    if known.patients < 2:
        alone = Undefined("one patient alone has no interval")
        return known.summary(estimate, alone, alone, level)
    drawn = compute(known.values, known.resampled(np.random.default_rng(seed), draws))
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if interval == "bca":
        left_out = compute(known.values, (~np.eye(known.patients, dtype=bool))[:, known.owner].astype(float))
        tails = _bca(tails, estimate, drawn, left_out)
    low, high = np.quantile(drawn, tails)
    return known.summary(estimate, float(low), float(high), level)


def difference(
    first: Sequence[Figure],
    second: Sequence[Figure],
    first_patients: Sequence[Hashable] | None = None,
    second_patients: Sequence[Hashable] | None = None,
    statistic: Statistic = "mean",
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Difference:
    """The statistic in the first group minus that in the second.

    Patients are drawn with all their scans: within each group where no patient has scans in both, else together.  The
    p-value permutes the groups' labels, between patients where no patient has scans in both, else within patients:
    then those with scans in one group alone say nothing.  (1 + as large) / (1 + draws), two-sided.

    Raises
    ------
    MetricError
        As :func:`summarise`; where only one of the groups comes with patients.
    """
    if (first_patients is None) != (second_patients is None):
        raise MetricError("patients are given for one group only; give them for both, or for none")
    groups = [
        summarise(figures, patients, statistic, level, draws, seed)
        for figures, patients in ((first, first_patients), (second, second_patients))
    ]
    if not all(group.n for group in groups):
        nothing = Undefined("one of the groups has no figure")
        return Difference(nothing, nothing, nothing, nothing, *groups)
    if first_patients is None or second_patients is None:  # each scan is another patient's
        first_patients, second_patients = range(len(first)), range(len(first), len(first) + len(second))
    both = _Groups.of(_Known.of(first, first_patients), _Known.of(second, second_patients))
    compute = _statistic(statistic)
    random = np.random.default_rng(seed)
    estimate = float(both.apart(compute, np.ones((1, len(both.values))), both.is_first[None])[0])
    drawn = both.apart(compute, both.resampled(random, draws), both.is_first[None])
    drawn = drawn[np.isfinite(drawn)]  # a draw may miss a group whole
    low, high = np.quantile(drawn, ((1 - level) / 2, (1 + level) / 2))
    shuffled = both.apart(compute, np.ones((1, len(both.values))), both.relabelled(random, draws))
    shuffled = shuffled[np.isfinite(shuffled)]
    # Sums of the same numbers in another order differ by rounding.
    as_large = np.abs(shuffled) >= abs(estimate) * (1 - 1e-12)
    p_value = float((1 + np.count_nonzero(as_large)) / (1 + len(shuffled)))
    alone = [group for group in groups if group.patients < 2]
    ends: tuple[Figure, Figure] = (float(low), float(high))
    if alone:
        ends = (Undefined("a group of one patient has no interval"),) * 2
    return Difference(estimate, *ends, p_value, *groups)


def benjamini_hochberg(p_values: ArrayLike) -> NDArray[np.float64]:
    r"""Adjusted p-values that control the false discovery rate; Benjamini and Hochberg, JRSS B 1995.

    .. math:: \tilde p_{(i)} = \min_{j \ge i} \min(1, m \, p_{(j)} / j)

    NaN, an undefined test, stays NaN and counts for nothing.

    >>> benjamini_hochberg([0.01, 0.04, 0.03, 0.5])
    array([0.04      , 0.05333333, 0.05333333, 0.5       ])
    """
    return _adjusted(p_values, lambda p: np.minimum.accumulate((p * len(p) / np.arange(1, len(p) + 1))[::-1])[::-1])


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    r"""Adjusted p-values that control the chance of any false finding; Holm, Scandinavian Journal of Statistics 1979.

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1) \, p_{(j)})

    NaN, an undefined test, stays NaN and counts for nothing.

    >>> holm([0.01, 0.04, 0.03, 0.5])
    array([0.04, 0.09, 0.09, 0.5 ])
    """
    return _adjusted(p_values, lambda p: np.maximum.accumulate(p * np.arange(len(p), 0, -1)))


def _adjusted(p_values: ArrayLike, adjust: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> NDArray[np.float64]:
    given = np.asarray(p_values, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(given))
    if ((given[known] < 0) | (given[known] > 1)).any():
        raise MetricError(f"a p-value lies between 0 and 1; these do not: {given}")
    order = known[np.argsort(given[known])]
    out = np.full(given.shape, np.nan)
    if len(order):
        out[order] = np.minimum(adjust(given[order]), 1)
    return out


_Compute = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


def _statistic(name: Statistic) -> _Compute:
    known: dict[str, _Compute] = {"mean": _mean, "median": _median}
    if name not in known:
        raise MetricError(f"unknown statistic {name!r}; known: {', '.join(known)}")
    return known[name]


def _mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(D,) mean of values (n,), each as often as weights (D, n) say; NaN where no value counts."""
    sums, counts = weights @ values, weights.sum(axis=1)
    return np.divide(sums, counts, out=np.full(len(weights), np.nan), where=counts > 0)


def _median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(D,) median of values (n,), each as often as weights (D, n) say; NaN where no value counts."""
    order = np.argsort(values)
    reached = np.cumsum(weights[:, order], axis=1)
    half = reached[:, -1:] / 2
    # With half the weight exactly at a value, the median lies midway to the next one that counts.
    low, high = (reached < half).sum(axis=1), (reached <= half).sum(axis=1)
    last = len(values) - 1
    middle = (values[order][np.minimum(low, last)] + values[order][np.minimum(high, last)]) / 2
    return np.where(half[:, 0] > 0, middle, np.nan)


@dataclass(frozen=True, eq=False)
class _Known:
    """The figures that are there, and to which patient, by number, each belongs."""

    values: NDArray[np.float64]
    owner: NDArray[np.int64]
    names: list[Hashable]
    reasons: dict[str, int]

    @classmethod
    def of(cls, figures: Sequence[Figure], patients: Sequence[Hashable] | None) -> _Known:
        owners = list(range(len(figures))) if patients is None else list(patients)
        if len(owners) != len(figures):
            raise MetricError(f"{len(figures)} figures, but {len(owners)} patients; expected one for each figure")
        reasons: Counter[str] = Counter()
        values, kept = [], []
        for figure, owner in zip(figures, owners, strict=True):
            if isinstance(figure, Undefined):
                reasons[figure.reason] += 1
            elif np.isnan(figure):
                reasons["not a number"] += 1
            else:
                values.append(float(figure))
                kept.append(owner)
        names = list(dict.fromkeys(kept))
        number = {name: at for at, name in enumerate(names)}
        return cls(np.array(values), np.array([number[owner] for owner in kept], np.int64), names, dict(reasons))

    @property
    def patients(self) -> int:
        return len(self.names)

    def resampled(self, random: np.random.Generator, draws: int) -> NDArray[np.float64]:
        """(draws, n) how often each value is drawn, patient by patient."""
        return _drawn(random, self.patients, draws)[:, self.owner]

    def summary(self, estimate: Figure, low: Figure, high: Figure, level: float) -> Summary:
        missing = sum(self.reasons.values())
        return Summary(estimate, low, high, level, len(self.values), self.patients, missing, self.reasons)


def _drawn(random: np.random.Generator, patients: int, draws: int) -> NDArray[np.float64]:
    """(draws, patients) how often each patient is drawn, with replacement."""
    return random.multinomial(patients, np.full(patients, 1 / patients), size=draws).astype(np.float64)


def _bca(
    tails: NDArray[np.float64], estimate: float, drawn: NDArray[np.float64], left_out: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The quantiles of the draws at which a bias-corrected and accelerated interval ends."""
    normal = NormalDist()
    below = float((drawn < estimate).mean() + (drawn == estimate).mean() / 2)
    away = left_out.mean() - left_out
    spread = float((away**2).sum())
    if not 0 < below < 1 or spread == 0:  # nothing varies, or everything on one side: nothing to correct by
        return tails
    bias, acceleration = normal.inv_cdf(below), float((away**3).sum()) / (6 * spread**1.5)
    shifted = [bias + normal.inv_cdf(float(tail)) for tail in tails]
    return np.array([normal.cdf(bias + at / (1 - acceleration * at)) for at in shifted])


@dataclass(frozen=True, eq=False)
class _Groups:
    """Two groups of figures; patients are numbered over both."""

    values: NDArray[np.float64]
    owner: NDArray[np.int64]
    is_first: NDArray[np.bool_]
    #: Whether some patient has scans in both groups.
    mixed: bool

    @classmethod
    def of(cls, first: _Known, second: _Known) -> _Groups:
        names = list(dict.fromkeys(first.names + second.names))
        number = {name: at for at, name in enumerate(names)}
        owner = [number[group.names[one]] for group in (first, second) for one in group.owner]
        is_first = np.arange(len(owner)) < len(first.values)
        mixed = len(names) < first.patients + second.patients
        return cls(np.concatenate([first.values, second.values]), np.array(owner), is_first, mixed)

    def apart(self, compute: _Compute, weights: NDArray, is_first: NDArray) -> NDArray[np.float64]:
        """(D,) the statistic of the first group minus that of the second; weights and labels (D or 1, n)."""
        return compute(self.values, weights * is_first) - compute(self.values, weights * ~is_first)

    def resampled(self, random: np.random.Generator, draws: int) -> NDArray[np.float64]:
        """(draws, n) how often each value is drawn, patient by patient, within each group where they do not mix."""
        patients = int(self.owner.max()) + 1
        if self.mixed:
            return _drawn(random, patients, draws)[:, self.owner]
        in_first = len(np.unique(self.owner[self.is_first]))
        return np.hstack([_drawn(random, in_first, draws), _drawn(random, patients - in_first, draws)])[:, self.owner]

    def relabelled(self, random: np.random.Generator, draws: int) -> NDArray[np.bool_]:
        """(draws, n) which values count for the first group, labels permuted; see :func:`difference`."""
        if not self.mixed:
            patients = int(self.owner.max()) + 1
            labels = np.zeros(patients, bool)
            labels[self.owner[self.is_first]] = True
            return random.permuted(np.tile(labels, (draws, 1)), axis=1)[:, self.owner]
        by_patient = np.argsort(self.owner, kind="stable")
        mixed = np.argsort(self.owner + random.random((draws, len(self.owner))), axis=1)
        labels = np.empty((draws, len(self.owner)), bool)
        labels[:, by_patient] = self.is_first[mixed]
        return labels
