"""Measures of two maps against SciPy, scikit-image where it is installed, and figures worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from volsal.audit.metric import MetricError, Undefined
from volsal.audit.similarity import MEASURES, Compared, peak_distance_mm, pearson, similarity, spearman, ssim, top_dice
from volsal.grid import Grid


@pytest.fixture
def maps():
    generator = np.random.default_rng(0)
    first = np.round(generator.normal(size=(9, 8, 11)), 1)
    return first, np.round(0.5 * first + generator.normal(size=first.shape), 1)


def test_rank_correlation_is_scipys_with_ties(maps):
    expected = stats.spearmanr(maps[0].ravel(), maps[1].ravel()).statistic
    assert spearman(*maps) == pytest.approx(expected)
    assert spearman(maps[0], np.exp(maps[0])) == pytest.approx(1)
    assert spearman(maps[0], -maps[0]) == pytest.approx(-1)
    expected = np.corrcoef(maps[0].ravel(), maps[1].ravel())[0, 1]
    assert pearson(maps[0].ravel(), maps[1].ravel()) == pytest.approx(expected)


def test_ssim_is_that_of_scikit_image(maps):
    metrics = pytest.importorskip("skimage.metrics")
    for window in (3, 7):
        expected = metrics.structural_similarity(maps[0], maps[1], data_range=4.0, win_size=window)
        assert ssim(maps[0], maps[1], 4.0, window) == pytest.approx(expected)


def test_ssim_in_closed_form():
    """One window, two maps that are a and b everywhere but for one voxel: all moments are known."""
    a, b = np.zeros((3, 3, 3)), np.zeros((3, 3, 3))
    a[1, 1, 1] = b[1, 1, 1] = 1
    assert ssim(a, b, 1.0, 3) == pytest.approx(1)
    c = -a
    mean, variance = 1 / 27, 1 / 27 - 1 / 27**2
    unbiased, c1, c2 = variance * 27 / 26, 1e-4, 9e-4
    expected = (-2 * mean**2 + c1) * (-2 * unbiased + c2) / ((2 * mean**2 + c1) * (2 * unbiased + c2))
    assert ssim(a, c, 1.0, 3) == pytest.approx(expected)
    assert ssim(np.ones((5, 2, 9)), np.ones((5, 2, 9))) == pytest.approx(1)  # windows shrink along short axes


def test_the_overlap_of_tops_and_the_distance_of_peaks(oblique):
    first, second = np.zeros(oblique.shape), np.zeros(oblique.shape)
    first[0, 0, :4] = 1, 2, 3, 4
    second[0, 0, 2:6] = 1, 2, 3, 9
    share = 2 / first.size
    assert top_dice(first, second, share) == 0
    assert top_dice(first, second, 4 / first.size) == 0.5
    assert top_dice(first, second, 1.0) == 0.5  # only what is above 0
    assert peak_distance_mm(first, second, oblique) == pytest.approx(2 * 2.5)
    found = similarity(first, second, oblique, top_share=4 / first.size)
    assert found.top_dice == 0.5
    assert found.peak_mm == pytest.approx(5)


def test_a_map_is_like_itself_and_unlike_its_negative(maps):
    grid = Grid(maps[0].shape, np.eye(4))
    same, negative = similarity(maps[0], maps[0], grid), similarity(maps[0], -maps[0], grid)
    assert [getattr(same, name) for name in MEASURES] == pytest.approx([1, 1, 1, 1, 0])
    assert negative.spearman == pytest.approx(-1)
    assert negative.spearman_abs == negative.ssim == pytest.approx(1)
    assert negative.top_dice == 0


def test_what_does_not_count_has_no_say(maps, oblique):
    grid, within = Grid(maps[0].shape, np.eye(4)), np.zeros(maps[0].shape, bool)
    within[2:7, 1:6, 3:9] = True
    changed = np.where(within, maps[1], 1000.0)
    assert similarity(maps[0], changed, grid, within) == similarity(maps[0], maps[1], grid, within)


def test_a_map_that_is_prepared_once_is_like_each_other_as_one_by_one(maps):
    grid, within = Grid(maps[0].shape, np.eye(4)), maps[0] > -1
    third = np.abs(maps[1])
    once = Compared(maps[0], grid, within)
    for other in (maps[1], third, maps[0]):
        assert once.with_(Compared(other, grid, within)) == similarity(maps[0], other, grid, within)


def test_there_is_no_similarity_to_nothing(maps):
    grid = Grid(maps[0].shape, np.eye(4))
    for other, reason in ((np.zeros_like(maps[0]), "empty"), (np.ones_like(maps[0]), "constant"),
                          (np.where(maps[0] > 2, np.nan, maps[0]), "NaN")):  # fmt: skip
        found = similarity(maps[0], other, grid)
        assert all(reason in getattr(found, name).reason for name in MEASURES)
    negative = similarity(maps[0], -np.abs(maps[0]) - 1, grid)
    assert isinstance(negative.top_dice, Undefined)
    assert isinstance(negative.peak_mm, Undefined)
    assert not isinstance(negative.ssim, Undefined)
    with pytest.raises(MetricError, match="one grid first"):
        similarity(maps[0], maps[0][1:], grid)
    with pytest.raises(MetricError, match="odd window"):
        ssim(maps[0], maps[1], window=4)
