"""Removals under models whose scores are known on paper."""

import numpy as np
import pytest
import torch

from volsal.audit.faithfulness import (
    Curve,
    Scorer,
    ball_at,
    boxes,
    deletion,
    delta_areas,
    delta_aupc,
    displaced,
    faithfulness_correlation,
    infidelity,
    insertion,
    intervene,
    order_of,
    remove_region,
    removed,
    top_peaks,
)
from volsal.audit.metric import MetricError, Undefined
from volsal.grid import Grid

SHAPE = (8, 6, 10)
GRID = Grid(SHAPE, np.diag([2.0, 3.0, 1.5, 1]))


@pytest.fixture
def linear():
    """(score, volume, weights): f(x) = sum of w x, so that w x is what each voxel adds."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    volume = torch.randn(1, 1, *SHAPE, generator=generator, dtype=torch.float64)
    return (lambda volumes: (volumes[:, 0] * weights).sum((1, 2, 3))), volume, weights.numpy()


def test_deletion_of_a_linear_model_takes_away_the_largest_shares_first(linear):
    score, volume, weights = linear
    shares = weights * volume[0, 0].numpy()
    scorer = Scorer(score, batch=3)
    curve = deletion(scorer, volume, order_of(shares), torch.zeros_like(volume), steps=10)
    ranked = np.sort(shares, axis=None)[::-1]
    expected = shares.sum() - np.concatenate([[0], np.cumsum(ranked)])[::48]
    assert curve.scores == pytest.approx(expected)
    assert curve.shares == pytest.approx(np.linspace(0, 1, 11))
    assert scorer.calls == 11
    assert curve.area == pytest.approx(((expected[1:] + expected[:-1]) / 2).mean())
    assert curve.aopc == pytest.approx((expected[0] - expected).mean())
    back = insertion(scorer, volume, order_of(shares), torch.zeros_like(volume), steps=10)
    assert back.scores == pytest.approx(shares.sum() - expected)


def test_regions_go_whole_by_their_mean_and_shares_count_their_voxels():
    regions = np.zeros((1, 1, 10), int)
    regions[0, 0, 4:] = 7
    values = np.zeros((1, 1, 10))
    values[0, 0, 0], values[0, 0, 4:] = 5, 2  # means 1.25 and 2
    order = order_of(values, regions)
    assert np.array_equal(order[0, 0], [0.6] * 4 + [0.0] * 6)
    volume = torch.ones(1, 1, 1, 1, 10)
    curve = deletion(Scorer(lambda v: v.sum((1, 2, 3, 4))), volume, order, torch.zeros_like(volume), steps=5)
    assert curve.shares == pytest.approx([0, 0.6, 0.6, 0.6, 1, 1])
    assert curve.scores == pytest.approx([10, 4, 4, 4, 0, 0])


def test_what_does_not_count_is_never_removed(linear):
    score, volume, weights = linear
    within = np.zeros(SHAPE, bool)
    within[:4] = True
    order = order_of(weights, within=within)
    assert np.isinf(order[4:]).all()
    assert np.array_equal(np.sort(order[:4], axis=None), np.arange(240) / 240)
    zero = torch.zeros_like(volume)
    rest = float((volume[0, 0].numpy() * weights)[4:].sum())
    assert deletion(Scorer(score), volume, order, zero).scores[-1] == pytest.approx(rest)
    assert insertion(Scorer(score), volume, order, zero).scores[0] == pytest.approx(rest)


def test_equal_values_do_not_sweep_the_volume():
    order = order_of(np.zeros((10, 10, 10)))
    first = np.argwhere(order < 0.1)
    assert (np.ptp(first, axis=0) > 7).all()
    assert np.array_equal(order, order_of(np.zeros((10, 10, 10))))
    assert not np.array_equal(order, order_of(np.zeros((10, 10, 10)), seed=1))


def test_boxes_tile_the_grid_in_mm():
    labels = boxes(GRID, 6)
    counts = np.bincount(labels.ravel())
    assert counts.max() == 3 * 2 * 4
    assert len(counts) == 3 * 3 * 3
    assert labels[0, 0, 0] == labels[2, 1, 3] != labels[3, 1, 3]


def blob_model(at, radius=2):
    """Scores the mean about a voxel: all the evidence there is."""
    i, j, k = np.ix_(*(np.arange(16) - c for c in at))
    ball = i**2 + j**2 + k**2 <= radius**2
    weight = torch.from_numpy(ball / ball.sum())
    return (lambda volumes: (volumes[:, 0] * weight).sum((1, 2, 3))), ball


CUBE = Grid((16, 16, 16), np.diag([3.0, 3, 3, 1]))


@pytest.mark.parametrize("control", ["permuted", "displaced"])
def test_a_true_map_beats_chance_and_a_false_one_does_not(control):
    score, _ = blob_model((4, 5, 11))
    volume = 1 + 0.1 * torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    zero = torch.zeros_like(volume)
    near = np.stack(np.indices(CUBE.shape), -1)
    maps = {name: np.exp(-((near - at) ** 2).sum(-1) / 12) for name, at in
            (("true", (4, 5, 11)), ("false", (11, 10, 3)))}  # fmt: skip
    scorer = Scorer(score)
    true = delta_aupc(scorer, volume, maps["true"], zero, control, draws=19, steps=10)
    assert true.calls == scorer.calls == 21 * 11
    assert true.delta == pytest.approx(np.mean([curve.area for curve in true.controls]) - true.most_first.area)
    assert true.delta > 0.2
    assert true.p_value == 1 / 20
    assert true.least_first.area > true.most_first.area
    assert delta_aupc(scorer, volume, maps["false"], zero, control, draws=19, steps=10).p_value > 0.2


@pytest.mark.parametrize("sign", [1, -1])
def test_areas_of_a_score_that_hangs_on_one_voxel(sign):
    """The score falls in the step in which the voxel goes: the area is that of the steps before, and half of it."""
    shape, voxel = (10, 10, 10), (4, 5, 6)
    values = np.random.default_rng(0).random(shape)
    values[voxel] = 2
    values *= sign
    volume = torch.ones(1, 1, *shape, dtype=torch.float64)

    def score(volumes):
        return volumes[(slice(None), 0, *voxel)]

    found = delta_areas(Scorer(score), volume, values, torch.zeros_like(volume), draws=4, steps=10)
    own = 0.05 if sign == 1 else 0.95  # first of all, or last of all

    def area(control):
        rank = np.searchsorted(np.sort(-control.ravel()), -control[voxel])
        return 0.1 * (rank * 10 // control.size) + 0.05

    draws = [np.random.default_rng((0, draw)) for draw in range(4)]
    permuted = np.mean([area(random.random(shape)) for random in draws])
    draws = [np.random.default_rng((0, draw)) for draw in range(4)]
    moved = np.mean([area(displaced(values, random)) for random in draws])
    for kind in ("deletion", "insertion"):
        assert found[kind]["permuted"] == pytest.approx(permuted - own)
        assert found[kind]["displaced"] == pytest.approx(moved - own)
    empty = delta_areas(Scorer(score), volume, np.zeros(shape), torch.zeros_like(volume))
    assert isinstance(empty, Undefined)


def test_a_displaced_map_has_the_same_values_elsewhere():
    values = np.zeros(SHAPE)
    values[3, 2, 5] = 1
    places = {tuple(np.argwhere(displaced(values, np.random.default_rng(seed)))[0]) for seed in range(60)}
    assert (3, 2, 5) not in places or len(places) > 30
    mixed = displaced(np.random.default_rng(0).random(SHAPE), np.random.default_rng(1))
    assert np.array_equal(np.sort(mixed, axis=None), np.sort(np.random.default_rng(0).random(SHAPE), axis=None))


def test_a_ball_is_one_in_mm(oblique):
    for voxel in ((3, 4, 5), (0, 8, 10)):
        box, ball = ball_at(oblique, np.array(voxel), 3.0)
        inside = np.zeros(oblique.shape, bool)
        inside[box] = ball
        away = np.linalg.norm(oblique.world(np.stack(np.indices(oblique.shape), -1)) - oblique.world(voxel), axis=-1)
        assert np.array_equal(inside, away <= 3.0 + 1e-9)


def test_a_ball_is_one_on_a_sheared_grid():
    affine = np.diag([1.0, 2, 3, 1])
    affine[0, 2] = 2.5
    grid = Grid((15, 9, 9), affine)
    box, ball = ball_at(grid, np.array((7, 4, 4)), 4.0)
    inside = np.zeros(grid.shape, bool)
    inside[box] = ball
    away = np.linalg.norm(grid.world(np.stack(np.indices(grid.shape), -1)) - grid.world((7, 4, 4)), axis=-1)
    assert np.array_equal(inside, away <= 4.0)


def test_peaks_are_apart():
    values = np.zeros(SHAPE)
    values[1, 1, 1], values[2, 1, 1], values[6, 4, 8], values[0, 5, 0] = 9, 8, 7, -5
    assert top_peaks(values, GRID, 3, 2.5).tolist() == [[1, 1, 1], [6, 4, 8]]
    assert top_peaks(values, GRID, 3, 1.5).tolist() == [[1, 1, 1], [2, 1, 1], [6, 4, 8]]
    assert top_peaks(values, GRID, 1, 1.5).tolist() == [[1, 1, 1]]


def test_an_intervention_at_the_evidence_is_unlike_any_elsewhere():
    score, ball = blob_model((4, 5, 11))
    volume = torch.ones(1, 1, 16, 16, 16, dtype=torch.float64)
    values = np.zeros(CUBE.shape)
    values[4, 5, 11] = 1
    scorer = Scorer(score, batch=4)
    found = intervene(scorer, volume, values, CUBE, torch.zeros_like(volume), radius_mm=6, controls=19)
    assert found.effect == pytest.approx(1)  # the ball of two voxels is the model's own
    assert found.change == pytest.approx(np.sqrt(ball.sum()))
    assert found.p_value == 1 / 20
    assert found.peaks.tolist() == [[4, 5, 11]]
    assert found.calls == scorer.calls == 21
    assert len(found.control_effects) == 19
    assert (found.control_effects == 0).all()  # no control touches what lies two radii from the peak
    assert isinstance(found.ratio, Undefined)
    away = np.where(values.any(), 0, 0) + np.zeros(CUBE.shape)
    away[12, 12, 2] = 1
    assert intervene(scorer, volume, away, CUBE, torch.zeros_like(volume), 6).p_value > 0.2


def test_the_ratio_is_of_the_effect_to_the_controls():
    """Every voxel counts 1, those of the peak's ball 3: the effect is three times any other whole ball's."""
    weight = torch.ones(CUBE.shape, dtype=torch.float64)
    box, ball = ball_at(CUBE, np.array((8, 8, 8)), 6)
    weight[box][torch.from_numpy(ball)] = 3
    values, inner = np.zeros(CUBE.shape), np.zeros(CUBE.shape, bool)
    values[8, 8, 8], inner[2:-2, 2:-2, 2:-2] = 1, True
    volume = torch.ones(1, 1, 16, 16, 16, dtype=torch.float64)
    found = intervene(
        Scorer(lambda v: (v[:, 0] * weight).sum((1, 2, 3))), volume, values, CUBE, torch.zeros_like(volume), 6, 1, 9,
        within=inner,
    )  # fmt: skip
    assert found.ratio == pytest.approx(3)
    assert found.effect == pytest.approx(3 * ball.sum())


def test_controls_may_be_matched_by_what_they_change():
    """Bright tissue in one half, air in the other: candidates let controls be of tissue, as the peak is."""
    volume = torch.full((1, 1, 16, 16, 16), 0.01, dtype=torch.float64)
    volume[:, :, :8] = 1
    values = np.zeros(CUBE.shape)
    values[4, 8, 8] = 1
    zero = torch.zeros_like(volume)
    scorer = Scorer(lambda v: v.sum((1, 2, 3, 4)))
    blind = intervene(scorer, volume, values, CUBE, zero, 6, controls=15)
    matched = intervene(scorer, volume, values, CUBE, zero, 6, controls=15, candidates=8)
    assert np.median(np.abs(matched.control_changes - matched.change)) < 0.1 * matched.change
    assert np.median(np.abs(blind.control_changes - blind.change)) > 0.2 * blind.change
    assert matched.p_value > blind.p_value


def test_several_balls_go_at_once_and_controls_keep_apart():
    values = np.zeros(CUBE.shape)
    values[2, 2, 2], values[13, 13, 13] = 2, 1
    volume = torch.ones(1, 1, 16, 16, 16, dtype=torch.float64)
    seen = []

    def score(volumes):
        seen.extend(volumes)
        return volumes.sum((1, 2, 3, 4))

    inner = np.zeros(CUBE.shape, bool)
    inner[2:-2, 2:-2, 2:-2] = True
    found = intervene(Scorer(score), volume, values, CUBE, torch.zeros_like(volume), 6, peaks=4, controls=12,
                      within=inner)  # fmt: skip
    assert len(found.peaks) == 2
    assert found.effect == pytest.approx(2 * 33)
    assert (found.control_effects == 66).all()  # two whole balls that do not touch
    for control in seen[2:]:
        assert not ((control == 0) & (seen[1] == 0)).any()


def test_where_nothing_can_be_compared_there_is_no_figure():
    volume = torch.ones(1, 1, 16, 16, 16)
    scorer = Scorer(lambda v: v.sum((1, 2, 3, 4)))
    zero = torch.zeros_like(volume)
    negative = -np.random.default_rng(0).random(CUBE.shape)
    assert "no positive part" in intervene(scorer, volume, negative, CUBE, zero).reason
    assert "empty" in intervene(scorer, volume, np.zeros(CUBE.shape), CUBE, zero).reason
    assert "find room" in intervene(scorer, volume, -negative, CUBE, zero, radius_mm=40).reason
    assert "constant" in delta_aupc(scorer, volume, np.ones(CUBE.shape), zero).reason
    assert scorer.calls == 0


def test_a_region_is_removed():
    score, ball = blob_model((4, 5, 11))
    volume = torch.full((1, 1, 16, 16, 16), 2.0, dtype=torch.float64)
    assert remove_region(Scorer(score), volume, torch.zeros_like(volume), ball) == pytest.approx(2)
    assert remove_region(Scorer(score), volume, torch.zeros_like(volume), ~ball) == pytest.approx(0)


def test_sums_of_a_linear_models_shares_are_what_the_score_loses(linear):
    score, volume, weights = linear
    zero = torch.zeros_like(volume)
    shares = weights * volume[0, 0].numpy()
    regions = boxes(GRID, 6)
    scorer = Scorer(score)
    assert faithfulness_correlation(scorer, volume, shares, zero, regions) == pytest.approx(1)
    assert scorer.calls == 51
    assert faithfulness_correlation(scorer, volume, -shares, zero, regions) == pytest.approx(-1)
    still = faithfulness_correlation(Scorer(lambda v: torch.zeros(len(v))), volume, shares, zero, regions)
    assert isinstance(still, Undefined)


def test_the_gradient_of_a_linear_model_is_not_infidel_and_an_empty_map_is(linear):
    score, volume, weights = linear
    assert infidelity(Scorer(score), volume, weights, 0.1) == pytest.approx(0, abs=1e-12)
    assert infidelity(Scorer(score), volume, np.zeros(SHAPE), 0.1) == pytest.approx(1)
    assert infidelity(Scorer(score), volume, 3 * weights, 0.1) == pytest.approx(4)
    assert isinstance(infidelity(Scorer(lambda v: torch.zeros(len(v))), volume, weights, 0.1), Undefined)


def test_baselines_are_what_they_are_called():
    volume = torch.zeros(1, 1, *SHAPE)
    volume[0, 0, 4, 3, 5] = 480
    assert (removed(volume, "zero", GRID) == 0).all()
    assert removed(volume, "mean", GRID) == pytest.approx(torch.ones(1, 1, *SHAPE))
    blurred = removed(volume, "blur", GRID, 3.0)[0, 0]
    assert float(blurred[4, 3, 5]) > float(blurred[5, 3, 5])
    # the same 6 mm along two axes: three voxels of 2 mm and two of 3 mm
    assert float(blurred[7, 3, 5] / blurred[4, 3, 5]) == pytest.approx(float(blurred[4, 5, 5] / blurred[4, 3, 5]), 0.25)


def test_scores_that_are_none_are_refused():
    volume = torch.ones(1, 1, 2, 2, 2)
    with pytest.raises(MetricError, match="one number each"):
        Scorer(lambda v: v.sum((2, 3, 4)))([volume, volume])
    with pytest.raises(MetricError, match="NaN"):
        Scorer(lambda v: v.sum((1, 2, 3, 4)) * float("nan"))([volume])
    with pytest.raises(MetricError, match="permuted, displaced"):
        delta_aupc(Scorer(lambda v: v.sum((1, 2, 3, 4))), volume, np.arange(8.0).reshape(2, 2, 2), volume, "else")
    with pytest.raises(MetricError, match="0 steps"):
        deletion(Scorer(lambda v: v), volume, np.zeros((2, 2, 2)), volume, 0)
    assert Curve(np.array([0, 0.5, 1]), np.array([2.0, 1, 0])).area == 1
