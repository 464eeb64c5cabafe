"""Each metric of a map and a mask against figures worked out by hand, or by scikit-learn-like loops over voxels."""

import tracemalloc

import numpy as np
import pytest
from scipy import ndimage

from volsal.audit.localization import (
    LOCALIZATION,
    Comparison,
    components,
    local_peaks,
    localization,
    nearest_mm,
    surface_of,
)
from volsal.audit.metric import MetricError, Undefined, part_of
from volsal.grid import Grid

LINE = Grid((1, 1, 6), np.diag([1.0, 1.0, 2.0, 1.0]))


def line(*values):
    return np.array(values, float).reshape(1, 1, -1)


def mask(*values):
    return line(*values).astype(bool)


@pytest.fixture
def random(oblique):
    generator = np.random.default_rng(3)
    values = np.round(generator.normal(size=oblique.shape), 1)  # with many ties
    truth = generator.random(oblique.shape) < 0.1
    return values, truth, oblique


def test_a_map_worked_out_by_hand():
    found = localization(line(6, 2, 2, 0, -9, 2), mask(0, 1, 0, 0, 0, 1), LINE, top_share=0.5)
    assert found["relevance mass"] == pytest.approx(4 / 12)
    assert found["enrichment"] == pytest.approx(4 / 12 / (2 / 6))
    assert found["relevance rank"] == pytest.approx((0 + 2 / 3) / 2)  # one place left for three equal voxels, two ours
    assert found["top intersection"] == pytest.approx((2 * 2 / 3) / 3)
    assert found["AUPRC"] == pytest.approx(2 / 4)  # both enter together, with one voxel before and one beside them
    assert found["ROC AUC"] == pytest.approx((0 + 0.5 + 1 + 1) / 4)
    assert found["pointing game"] == 0
    assert found["peak to mask, mm"] == 2
    assert found["peak to centroid, mm"] == 6
    assert found["centroid to centroid, mm"] == pytest.approx(2 * (3 - (2 + 4 + 10) / 12))
    assert found["peak to surface, mm"] == 2
    assert found["lesion hit rate"] == 0  # neither local maximum reaches half of the largest
    assert localization(line(6, 2, 2, 0, -9, 3), mask(0, 1, 0, 0, 0, 1), LINE)["lesion hit rate"] == 0.5


@pytest.mark.parametrize(("tolerance", "hit"), [(1.99, 0), (2, 1)])
def test_the_pointing_game_allows_a_distance_in_mm_and_any_of_equal_maxima(tolerance, hit):
    found = localization(line(5, 1, 1, 5, 0, 0), mask(0, 0, 0, 0, 1, 0), LINE, tolerance_mm=tolerance)
    assert found["pointing game"] == hit
    assert found["peak to mask, mm"] == 2


def test_ranks_agree_with_loops_over_every_threshold(random):
    values, truth, grid = random
    relevance, inside = part_of(values).ravel(), truth.ravel()
    thresholds = np.unique(relevance)[::-1]
    recall = [0.0, *(inside[relevance >= t].sum() / inside.sum() for t in thresholds)]
    precision = [inside[relevance >= t].mean() for t in thresholds]
    found = localization(values, truth, grid)
    assert found["AUPRC"] == pytest.approx(np.diff(recall) @ precision)
    wins = [np.mean((v > relevance[~inside]) + 0.5 * (v == relevance[~inside])) for v in relevance[inside]]
    assert found["ROC AUC"] == pytest.approx(np.mean(wins))


def test_equal_voxels_count_as_the_mean_over_their_orders(random):
    values, truth, grid = random
    generator = np.random.default_rng(0)
    relevance, count = part_of(values).ravel(), int(truth.sum())
    drawn = []
    for _ in range(4000):
        order = np.lexsort((generator.random(relevance.size), -relevance))
        drawn.append(truth.ravel()[order[:count]].mean())
    found = localization(values, truth, grid)["relevance rank"]
    assert found == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / np.sqrt(len(drawn)) + 1e-9)


def test_distances_are_mm_on_an_oblique_anisotropic_grid(random):
    values, truth, grid = random
    at = np.unravel_index(values.argmax(), values.shape)
    values[at] += 1
    truth[at] = False
    voxels = grid.world(np.argwhere(truth))
    peak = grid.world(at)
    found = localization(values, truth, grid)
    assert found["peak to mask, mm"] == pytest.approx(np.linalg.norm(voxels - peak, axis=1).min())
    assert found["peak to centroid, mm"] == pytest.approx(np.linalg.norm(voxels.mean(0) - peak))
    weights = part_of(values)
    own = np.tensordot(weights, grid.world(np.stack(np.indices(grid.shape), -1)), 3) / weights.sum()
    assert found["centroid to centroid, mm"] == pytest.approx(np.linalg.norm(own - voxels.mean(0)))


def test_a_tolerance_is_a_ball_in_mm_whatever_the_axes(oblique):
    """Voxels of 0.8 x 0.9 x 2.5 mm: three steps along the first axis are nearer than one along the last."""
    truth = np.zeros(oblique.shape, bool)
    truth[3, 4, 5] = True
    for step, apart in (((3, 0, 0), 2.4), ((0, 0, 1), 2.5), ((2, 2, 0), np.hypot(1.6, 1.8))):
        values = np.zeros(oblique.shape)
        values[tuple(np.add((3, 4, 5), step))] = 1
        assert localization(values, truth, oblique)["peak to mask, mm"] == pytest.approx(apart)
        assert localization(values, truth, oblique, tolerance_mm=2.45)["pointing game"] == (apart <= 2.45)


def test_distances_hold_on_a_sheared_grid():
    affine = np.eye(4)
    affine[0, 2] = 0.9
    points = Grid((4, 4, 4), affine).world(np.stack(np.indices((4, 4, 4)), -1).reshape(-1, 3))
    away = np.linalg.norm(points[:, None] - points[None, 10:20], axis=-1)
    for at in range(64):
        assert nearest_mm(points[at : at + 1], points[10:20]) == pytest.approx(away[at].min())


def test_distances_of_many_points_are_exact_and_take_neither_their_product_in_memory_nor_in_time():
    random = np.random.default_rng(0)
    for rows in (900, 3000):
        one, other = random.normal(size=(rows, 3)), random.normal((1.5, 0, 0), size=(700, 3))
        away = min(np.linalg.norm(other - point, axis=1).min() for point in one)
        assert nearest_mm(one, other) == pytest.approx(away, abs=1e-12)
    grid = Grid((70, 70, 70), np.diag([1.5, 1.0, 2.0, 1.0]))
    low, high = np.zeros(grid.shape, bool), np.zeros(grid.shape, bool)
    low[:40, :40, :40] = high[45:, 45:, 45:] = True  # 64 000 and 15 625 voxels: 8 GB of distances
    tracemalloc.start()
    assert nearest_mm(*(grid.world(np.argwhere(part)) for part in (low, high))) == pytest.approx(6 * np.sqrt(7.25))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6


def test_lesions_are_hit_one_by_one():
    grid = Grid((12, 12, 12), np.diag([2.0, 2, 2, 1]))
    truth, values = np.zeros(grid.shape, bool), np.zeros(grid.shape)
    truth[1:4, 1:4, 1:4] = truth[8:11, 8:11, 8:11] = truth[1:3, 8:10, 8:10] = True
    values[2, 2, 2], values[9, 9, 9], values[5, 8, 8] = 10, 6, 5.5
    values[8, 9, 9] = 5.9  # inside too, but no maximum
    assert localization(values, truth, grid)["lesion hit rate"] == pytest.approx(2 / 3)
    assert localization(values, truth, grid, peak_fraction=0.7)["lesion hit rate"] == pytest.approx(1 / 3)
    assert localization(values, truth, grid, tolerance_mm=5.9)["lesion hit rate"] == pytest.approx(2 / 3)
    assert localization(values, truth, grid, tolerance_mm=6)["lesion hit rate"] == 1


def test_local_peaks_and_surfaces_are_those_of_scipy(random):
    values, truth, _ = random
    relevance = part_of(values)
    cube = np.ones((3, 3, 3))
    expected = (relevance == ndimage.maximum_filter(relevance, footprint=cube, mode="nearest")) & (
        relevance >= 0.4 * relevance.max()
    )
    assert np.array_equal(local_peaks(relevance, 0.4), np.argwhere(expected))
    solid = ndimage.binary_dilation(truth)
    assert np.array_equal(surface_of(solid), solid & ~ndimage.binary_erosion(solid))
    parts = components(truth)
    assert parts.max() == ndimage.label(truth, cube)[1]
    assert np.array_equal(parts > 0, truth)


def test_only_voxels_that_count_count():
    """What lies outside the model's field neither gets relevance nor makes the volume larger."""
    values, truth = line(1, 3, 0, 0, 100, 0), mask(0, 1, 0, 0, 0, 1)
    found = localization(values, truth, LINE, within=mask(1, 1, 1, 1, 0, 0))
    assert found["relevance mass"] == 0.75
    assert found["enrichment"] == 3
    assert found["pointing game"] == found["AUPRC"] == found["ROC AUC"] == 1


def test_the_part_of_the_map_is_a_choice():
    values, truth = line(1, -3, 0, 0, 0, 0), mask(0, 1, 0, 0, 0, 0)
    masses = {part: localization(values, truth, LINE, part=part)["relevance mass"] for part in
              ("positive", "negative", "absolute")}  # fmt: skip
    assert masses == {"positive": 0, "negative": 1, "absolute": 0.75}
    with pytest.raises(MetricError, match="positive, negative, absolute"):
        localization(values, truth, LINE, part="signed")


def test_a_map_of_whole_numbers_is_one_of_numbers():
    values = line(1, 3, 0, 0, 0, 0).astype(np.uint8)
    found = localization(values, mask(0, 1, 0, 0, 0, 0), LINE)
    assert found["relevance mass"] == 0.75
    against = localization(values, mask(0, 1, 0, 0, 0, 0), LINE, part="negative")
    assert "map is empty" in against["relevance mass"].reason


@pytest.mark.parametrize(
    ("values", "truth", "reason"),
    [
        (line(1, 2, 3, 4, 5, 6), mask(0, 0, 0, 0, 0, 0), "mask is empty"),
        (line(1, 2, 3, 4, 5, 6), mask(1, 1, 1, 1, 1, 1), "covers everything"),
        (line(0, 0, 0, 0, 0, -1), mask(1, 0, 0, 0, 0, 0), "map is empty"),
        (line(2, 2, 2, 2, 2, 2), mask(1, 0, 0, 0, 0, 0), "map is constant"),
        (line(2, 2, np.nan, 2, 2, 3), mask(1, 0, 0, 0, 0, 0), "NaN"),
        (line(2, 2, np.inf, 2, 2, 3), mask(1, 0, 0, 0, 0, 0), "infinity"),
    ],
)
def test_where_there_is_no_figure_the_reason_stands(values, truth, reason):
    found = localization(values, truth, LINE)
    assert list(found) == list(LOCALIZATION)
    assert all(isinstance(figure, Undefined) and reason in figure.reason for figure in found.values())


def test_things_that_do_not_belong_together_are_refused():
    with pytest.raises(MetricError, match="one grid first"):
        Comparison(line(1, 2), mask(0, 1), LINE)
    with pytest.raises(MetricError, match="labels == 2"):
        Comparison(line(1, 2, 3, 4, 5, 6), line(0, 1, 0, 0, 0, 2), LINE)
    with pytest.raises(MetricError, match="did you mean 'enrichment'"):
        localization(line(1, 2, 3, 4, 5, 6), mask(0, 1, 0, 0, 0, 0), LINE, ["enrichmnt"])
    for setting in ({"tolerance_mm": -1}, {"top_share": 0}, {"peak_fraction": 2}):
        with pytest.raises(MetricError, match=next(iter(setting))):
            Comparison(line(1, 2, 3, 4, 5, 6), mask(0, 1, 0, 0, 0, 0), LINE, **setting)


def test_figures_stay_in_the_range_and_beside_the_chance_that_the_table_states(oblique):
    generator = np.random.default_rng(1)
    truth = np.zeros(oblique.shape, bool)
    truth[2:5, 3:6, 4:7] = True
    drawn = [localization(generator.random(oblique.shape), truth, oblique) for _ in range(300)]
    for name, metric in LOCALIZATION.items():
        figures = np.array([draw[name] for draw in drawn])
        assert metric.low <= figures.min(), name
        assert figures.max() <= metric.high, name
    prevalence = truth.mean()
    for name, chance in {"relevance mass": prevalence, "relevance rank": prevalence, "top intersection": prevalence,
                         "enrichment": 1, "ROC AUC": 0.5, "pointing game": prevalence}.items():  # fmt: skip
        figures = np.array([draw[name] for draw in drawn])
        assert figures.mean() == pytest.approx(chance, abs=4 * figures.std() / np.sqrt(len(figures)) + 1e-9), name
