"""Nulls know nothing of the model, keep what they say they keep, and their p-values hold what p-values promise."""

import numpy as np
import pytest
from scipy import ndimage

from volsal.audit.localization import centroid_mm, localization
from volsal.audit.metric import MetricError, Undefined
from volsal.audit.nulls import (
    NULLS,
    centre_blob,
    gradient_per_mm,
    moved_mask,
    null_pairs,
    null_tests,
    p_value,
    permuted,
    references,
    smooth_random,
)
from volsal.grid import Grid

GRID = Grid((12, 14, 10), np.diag([1.0, 2, 3, 1]))


@pytest.fixture
def pair():
    values = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=GRID.shape), 1)
    mask = np.zeros(GRID.shape, bool)
    mask[2:5, 3:6, 2:4] = True
    mask[4, 5, 3] = False
    return values, mask


def test_p_values_count_the_observed_map_among_the_draws():
    assert p_value(0.5, [0.1, 0.5, 0.9, 0.2]) == 3 / 5
    assert p_value(0.5, [0.1, 0.5, 0.9, 0.2], "lower") == 4 / 5
    assert p_value(2, [0.1] * 99) == 0.01
    assert p_value(2, [0.1, Undefined("so")]) == 1 / 2
    assert isinstance(p_value(2, [Undefined("so")]), Undefined)
    assert isinstance(p_value(Undefined("so"), [1.0]), Undefined)


def test_a_permuted_map_keeps_its_values_and_what_does_not_count_in_place(pair):
    values, mask = pair
    mixed = permuted(values, np.random.default_rng(1), mask)
    assert np.array_equal(np.sort(mixed[mask]), np.sort(values[mask]))
    assert np.array_equal(mixed[~mask], values[~mask])
    assert not np.array_equal(mixed, values)


def test_a_smooth_null_keeps_the_values_and_nearly_the_spectrum(pair):
    values, mask = pair
    drawn = smooth_random(values, np.random.default_rng(1))
    assert np.array_equal(np.sort(drawn, axis=None), np.sort(values, axis=None))
    spectra = [np.abs(np.fft.rfftn(x)).ravel() for x in (values, drawn, permuted(values, np.random.default_rng(1)))]
    assert np.corrcoef(spectra[0], spectra[1])[0, 1] > 0.97
    assert np.corrcoef(spectra[0], spectra[2])[0, 1] < 0.7
    assert abs(np.corrcoef(values.ravel(), drawn.ravel())[0, 1]) < 0.3
    inside = smooth_random(values, np.random.default_rng(1), mask)
    assert np.array_equal(np.sort(inside[mask]), np.sort(values[mask]))


def test_a_moved_mask_is_the_same_mask_elsewhere(pair):
    _, mask = pair
    body = np.zeros(GRID.shape, bool)
    body[1:9, 2:12, 1:8] = True
    generator, places = np.random.default_rng(2), set()
    for _ in range(40):
        moved = moved_mask(mask, generator, body)
        assert moved.sum() == mask.sum()
        assert not (moved & ~body).any()
        assert tuple(np.ptp(np.argwhere(moved), axis=0)) == (2, 2, 1)
        places.add(tuple(np.argwhere(moved)[0]))
    assert len(places) > 20
    assert moved_mask(np.zeros(GRID.shape, bool), generator) is None


def test_a_mask_without_another_place_is_counted_as_undefined(pair):
    values, _ = pair
    mask = np.zeros(GRID.shape, bool)
    mask[2, 3, 4] = True
    two = mask.copy()
    two[3, 3, 5] = True
    around = two.copy()
    around[7, 8, 9] = True
    turned = moved_mask(two, np.random.default_rng(0), two)
    assert turned is None or np.array_equal(turned, two)
    tests = null_tests(values, np.ones(GRID.shape, bool), GRID, ["moved mask"], ["AUPRC"], draws=3)
    assert tests[0].undefined == 3
    assert isinstance(tests[0].p_value, Undefined)


def test_a_map_on_the_mask_beats_every_null(pair):
    _, mask = pair
    values = ndimage.gaussian_filter(mask.astype(float), 0.7)
    for test in null_tests(values, mask, GRID, metrics=["AUPRC", "peak to mask, mm", "enrichment"], draws=19):
        if test.metric == "AUPRC":
            assert test.p_value == 1 / 20, test
            assert test.low <= test.mean <= test.high < test.observed
        if test.metric == "peak to mask, mm":
            assert test.p_value <= 4 / 20, test  # smaller is better; a null may hit by chance
            assert test.mean > test.observed == 0
        assert (test.draws, test.undefined) == (19, 0)


@pytest.mark.parametrize("null", NULLS)
def test_under_the_null_p_is_at_most_a_level_as_often_as_the_level(null):
    """Maps drawn as the null draws them: the rank of the observed one is uniform."""
    generator, small = np.random.default_rng(5), []
    mask = np.zeros(GRID.shape, bool)
    mask[4:7, 5:8, 3:5] = True
    for repeat in range(60):
        values = ndimage.gaussian_filter(generator.normal(size=GRID.shape), 1, mode="wrap")
        if null == "permuted":
            values = permuted(values, generator)
        drawn = null_tests(values, mask, GRID, [null], ["ROC AUC"], draws=9, seed=repeat)
        small.append(drawn[0].p_value <= 0.3)
    assert abs(np.mean(small) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 60)


def test_the_same_seed_draws_the_same(pair):
    values, mask = pair
    for null in NULLS:
        first, again, other = (list(null_pairs(null, values, mask, GRID, 2, seed)) for seed in (0, 0, 1))
        for (a, b), (c, d) in zip(first, again, strict=True):
            assert np.array_equal(a, c)
            assert np.array_equal(b, d)
        assert not all(np.array_equal(a, c) and np.array_equal(b, d)
                       for (a, b), (c, d) in zip(first, other, strict=True))  # fmt: skip
    with pytest.raises(MetricError, match="permuted, smooth, moved mask"):
        next(null_pairs("shuffled", values, mask, GRID, 1))


def test_the_centre_blob_is_round_in_mm_about_the_centre(oblique):
    blob = centre_blob(oblique)
    centre = oblique.world((np.array(oblique.shape) - 1) / 2)
    away = np.linalg.norm(oblique.world(np.stack(np.indices(oblique.shape), -1)) - centre, axis=-1)
    sigma = min(oblique.spacing * oblique.shape) / 4
    assert blob == pytest.approx(np.exp(-0.5 * (away / sigma) ** 2))
    assert centroid_mm(blob, oblique) == pytest.approx(centre)


def test_edges_are_changes_per_mm_whatever_the_axes(oblique):
    world = oblique.world(np.stack(np.indices(oblique.shape), -1))
    ramp = world @ np.array([3.0, -4.0, 12.0])
    assert gradient_per_mm(ramp, oblique) == pytest.approx(np.full(oblique.shape, 13.0))


def test_references_are_maps_to_be_scored_as_any(pair):
    _, mask = pair
    found = references(GRID, np.where(mask, 200.0, 100.0))
    assert list(found) == ["centre blob", "intensity", "edges"]
    assert localization(found["intensity"], mask, GRID)["AUPRC"] == 1
    assert list(references(GRID)) == ["centre blob"]
