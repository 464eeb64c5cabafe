"""Intervals and tests against SciPy's, closed forms, and how often they are right when the truth is known."""

import numpy as np
import pytest
from scipy import stats

from volsal.audit.metric import MetricError, Undefined
from volsal.audit.statistics import benjamini_hochberg, difference, holm, summarise

SAMPLE = np.random.default_rng(4).exponential(size=25)


@pytest.mark.parametrize(("statistic", "of"), [("mean", np.mean), ("median", np.median)])
@pytest.mark.parametrize(("interval", "theirs"), [("percentile", "percentile"), ("bca", "BCa")])
def test_intervals_agree_with_scipy(statistic, of, interval, theirs):
    found = summarise(SAMPLE, statistic=statistic, interval=interval, draws=20000)
    expected = stats.bootstrap((SAMPLE,), of, n_resamples=20000, method=theirs, rng=1).confidence_interval
    assert found.estimate == pytest.approx(of(SAMPLE))
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.04 * width)


def test_the_median_of_repeated_values_is_that_of_the_list_written_out():
    from volsal.audit.statistics import _median

    generator = np.random.default_rng(0)
    values = generator.normal(size=7)
    weights = generator.integers(0, 3, (50, 7)).astype(float)
    weights[0] = 0
    expected = [np.median(np.repeat(values, row.astype(int))) if row.any() else np.nan for row in weights]
    assert _median(values, weights) == pytest.approx(np.array(expected), nan_ok=True)


def test_scans_of_one_patient_do_not_count_as_many():
    """Ten copies of each patient's figure hold no more than one."""
    once = summarise(SAMPLE)
    copied = summarise(np.repeat(SAMPLE, 10), np.repeat(np.arange(25), 10))
    assert (copied.n, copied.patients) == (250, 25)
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    blind = summarise(np.repeat(SAMPLE, 10))
    assert blind.high - blind.low < 0.5 * (once.high - once.low)


def test_undefined_figures_are_counted_with_their_reasons_and_never_as_zero():
    found = summarise([1.0, Undefined("a"), 3.0, Undefined("a"), Undefined("b"), float("nan")], list("ppqqrr"))
    assert found.estimate == 2
    assert (found.n, found.patients, found.undefined) == (2, 2, 4)
    assert found.reasons == {"a": 2, "b": 1, "not a number": 1}
    nothing = summarise([Undefined("a")])
    assert isinstance(nothing.estimate, Undefined)
    assert (nothing.n, nothing.undefined) == (0, 1)
    alone = summarise([1.0, 2.0], ["p", "p"])
    assert alone.estimate == 1.5
    assert isinstance(alone.low, Undefined)


@pytest.mark.parametrize("interval", ["percentile", "bca"])
def test_an_interval_of_a_figure_that_never_varies_is_that_figure(interval):
    found = summarise([0.25] * 8, interval=interval)
    assert (found.low, found.high) == (0.25, 0.25)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(8)
    holds = []
    for repeat in range(200):
        means = generator.normal(size=20)  # of patients, with four scans each
        values = (means[:, None] + 0.3 * generator.normal(size=(20, 4))).ravel()
        found = summarise(values, np.repeat(np.arange(20), 4), level=0.9, draws=400, seed=repeat)
        holds.append(found.low <= 0 <= found.high)
    assert 0.8 < np.mean(holds) < 0.96


def test_a_difference_has_scipys_interval_and_permutation_p():
    first, second = SAMPLE[:12] + 0.6, SAMPLE[12:]
    found = difference(first, second, draws=20000)
    assert found.estimate == pytest.approx(first.mean() - second.mean())
    theirs = stats.permutation_test(
        (first, second), lambda a, b, axis: a.mean(axis) - b.mean(axis), n_resamples=20000, vectorized=True, rng=2
    )
    assert found.p_value == pytest.approx(theirs.pvalue, abs=0.015)
    expected = stats.bootstrap(
        (first, second), lambda a, b, axis: a.mean(axis) - b.mean(axis), n_resamples=20000, method="percentile",
        vectorized=True, rng=2,
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.05)
    assert (found.first.n, found.second.n) == (12, 13)


def test_permutations_keep_patients_whole():
    """Two patients against two, many scans each: six ways to share them out, so that p cannot be less than a third."""
    values = np.concatenate([np.full(20, 5.0), np.full(20, 6.0), np.full(20, 1.0), np.full(20, 2.0)])
    owners = np.repeat(["a", "b", "c", "d"], 20)
    found = difference(values[:40], values[40:], owners[:40], owners[40:], draws=3000)
    assert found.p_value == pytest.approx(1 / 3, abs=0.04)
    assert difference(values[:40], values[40:], draws=3000).p_value == pytest.approx(1 / 3001)


def test_scans_of_one_patient_in_both_groups_are_compared_within_the_patient():
    """Patients differ much, their right and wrong predictions by 1: only within patients can that be seen."""
    generator = np.random.default_rng(0)
    patients = 100 * generator.normal(size=12)
    right, wrong = patients + 1 + 0.1 * generator.normal(size=12), patients
    owners = list(range(12))
    found = difference(right, wrong, owners, owners, draws=4000)
    assert found.p_value < 0.01
    assert found.low > 0.5
    assert found.high < 1.5
    assert difference(right, wrong).p_value > 0.5


def test_p_is_uniform_where_groups_do_not_differ():
    generator = np.random.default_rng(3)
    found = [difference(generator.normal(size=9), generator.normal(size=7), draws=199, seed=at).p_value
             for at in range(200)]  # fmt: skip
    assert 0.01 < np.mean(np.array(found) <= 0.05) < 0.11


def test_a_group_without_figures_has_no_difference():
    found = difference([1.0, 2.0], [Undefined("a")])
    assert isinstance(found.estimate, Undefined)
    assert isinstance(found.p_value, Undefined)
    assert found.second.undefined == 1
    alone = difference([1.0, 2.0], [3.0])
    assert alone.estimate == -1.5
    assert isinstance(alone.low, Undefined)


def test_many_tests_are_adjusted_as_scipy_does():
    p = np.random.default_rng(1).random(30) ** 3
    assert benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p))
    order = np.argsort(p)
    expected = np.minimum(np.maximum.accumulate(p[order] * np.arange(30, 0, -1)), 1)
    assert holm(p)[order] == pytest.approx(expected)
    with_gap = np.insert(p, 4, np.nan)
    for adjust in (benjamini_hochberg, holm):
        assert np.delete(adjust(with_gap), 4) == pytest.approx(adjust(p))
        assert np.isnan(adjust(with_gap)[4])
    assert len(holm([])) == 0
    with pytest.raises(MetricError, match="between 0 and 1"):
        holm([0.5, 1.5])


def test_what_does_not_fit_is_refused():
    with pytest.raises(MetricError, match="2 figures, but 1 patients"):
        summarise([1.0, 2.0], ["p"])
    with pytest.raises(MetricError, match="mean, median"):
        summarise([1.0], statistic="mode")
    with pytest.raises(MetricError, match="percentile, bca"):
        summarise([1.0], interval="normal")
    with pytest.raises(MetricError, match="one group only"):
        difference([1.0], [2.0], ["p"])
