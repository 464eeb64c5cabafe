"""Nuisances whose effect is known: movements that can be undone, noise of a stated size, maps that follow or do not."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from volsal.audit.metric import MetricError, Undefined
from volsal.audit.similarity import similarity
from volsal.audit.stability import NUISANCES, Gain, Mirror, Movement, Noise, agreement, stability
from volsal.grid import Grid


@pytest.fixture
def grid():
    """Oblique, anisotropic, mirrored."""
    c, s = np.cos(0.3), np.sin(0.3)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag([-2.0, 1.5, 3.0])
    affine[:3, 3] = (40, -30, 12)
    return Grid((20, 24, 14), affine)


@pytest.fixture
def volume(grid):
    """Two smooth spots, none in the middle."""
    world = grid.world(np.stack(np.indices(grid.shape), -1))
    spots = [np.exp(-((world - grid.world(at)) ** 2).sum(-1) / 60) for at in ((7, 14, 6), (12, 9, 8))]
    return torch.from_numpy(spots[0] + 0.5 * spots[1])[None, None]


def centre(values, grid):
    at = np.stack(np.indices(grid.shape), -1).reshape(-1, 3)
    return grid.world(np.average(at, axis=0, weights=values.ravel()))


def test_a_movement_turns_the_patient_about_the_fields_centre(grid, volume):
    movement = Movement((10.0, -20.0, 30.0), (1.0, 2.0, -3.0))
    middle = grid.world((np.array(grid.shape) - 1) / 2)
    turn = Rotation.from_euler("xyz", (10, -20, 30), degrees=True)
    point = np.array([11.0, -7, 5])
    expected = turn.apply(point - middle) + middle + (1, 2, -3)
    assert (movement.motion(grid) @ [*point, 1])[:3] == pytest.approx(expected)
    small = Movement((5, 0, 10), (2, -1, 3))
    before, after = volume[0, 0].numpy(), small.apply(volume, grid, None)[0, 0].numpy()
    moved = (small.motion(grid) @ [*centre(before, grid), 1])[:3]
    assert centre(after, grid) == pytest.approx(moved, abs=0.15)


def test_a_map_that_follows_the_scan_comes_back_to_its_place(grid, volume):
    for nuisance in (Movement((3, 2, 8), (2, 1, -2)), Mirror(0), Mirror(2)):
        changed = nuisance.apply(volume, grid, None)
        assert not torch.allclose(changed, volume, atol=0.05)
        back = nuisance.back(changed[0, 0].numpy(), grid)
        assert similarity(volume[0, 0].numpy(), back, grid, back > 1e-3).spearman > 0.98


def test_what_comes_in_from_outside_repeats_the_edge(grid):
    bright = torch.full((1, 1, *grid.shape), 7.0)
    assert Movement((0, 0, 20), (10, 0, 0)).apply(bright, grid, None) == pytest.approx(bright)


def test_noise_has_the_size_that_is_stated(volume):
    two = torch.cat([volume, 100 * volume], 1)
    grid = Grid(volume.shape[2:], np.eye(4))
    noise = Noise(10).apply(two, grid, np.random.default_rng(0)) - two
    for channel in range(2):
        assert float(noise[0, channel].std()) == pytest.approx(float(two[0, channel].std()) / 10, rel=0.03)
    assert not torch.equal(noise, Noise(10).apply(two, grid, np.random.default_rng(1)) - two)


def test_a_gain_is_a_scale_and_a_shift_in_standard_deviations(volume):
    changed = Gain(1.1, 0.2).apply(volume, Grid(volume.shape[2:], np.eye(4)), None)
    assert torch.allclose(changed, 1.1 * volume + 0.2 * volume.std())


def follows(volume):
    return volume[0, 0].numpy()


def test_a_map_that_follows_is_stable_and_one_fixed_in_the_field_is_not(grid, volume):
    nuisances = [Noise(50), Gain(), Movement((0, 0, 8), (4, 3, 0)), Mirror(1)]
    fixed = np.random.default_rng(0).random(grid.shape)
    steady = stability(follows, lambda _: 0, volume, grid, nuisances)
    stuck = stability(lambda _: fixed, lambda _: 0, volume, grid, nuisances)
    assert [one.nuisance for one in steady] == [nuisance.name for nuisance in nuisances]
    for one in steady:
        assert len(one.similarities) == 1
        assert one.similarities[0].ssim > 0.9, one.nuisance
    assert [one.similarities[0].spearman for one in stuck[:2]] == pytest.approx([1, 1])
    assert stuck[2].similarities[0].spearman < 0.5
    assert stuck[3].similarities[0].spearman < 0.5


def test_a_map_twice_the_scan_changes_by_twice_what_the_scan_does(grid, volume):
    found = stability(lambda v: 2 * follows(v), lambda _: 0, volume, grid, [Noise(20), Movement()], draws=3)
    assert found[0].lipschitz == pytest.approx(2)
    size = float(volume.norm() / volume.std()) / 20
    assert found[0].max_sensitivity == pytest.approx(np.sqrt(volume.numel()) / 20 / size / 20, rel=0.05)
    assert len(found[0].similarities) == 3
    assert "moved" in found[1].lipschitz.reason
    assert "moved" in found[1].max_sensitivity.reason
    ignores = stability(lambda _: follows(volume), lambda _: 0, volume, grid, [Noise(20)])[0]
    assert (ignores.lipschitz, ignores.max_sensitivity) == (0, 0)


def test_maps_of_other_answers_are_dropped_and_counted(grid, volume):
    limit = float(volume.mean())
    found = stability(follows, lambda v: bool(v.mean() > limit + 1e-4), volume, grid, [Gain(1.5, 0), Gain(0.9, 0)])
    assert [(one.dropped, len(one.similarities)) for one in found] == [(1, 0), (0, 1)]
    assert "answer changed" in found[0].lipschitz.reason
    draws = iter([0, 0, 1, 0])
    found = stability(follows, lambda _: next(draws), volume, grid, [Noise()], draws=3)[0]
    assert (found.dropped, len(found.similarities)) == (1, 2)


def test_an_empty_map_has_no_stability(grid, volume):
    found = stability(lambda v: np.zeros(grid.shape), lambda _: 0, volume, grid, NUISANCES)
    assert all(isinstance(one.max_sensitivity, Undefined) for one in found)
    assert "empty" in found[0].similarities[0].ssim.reason
    with pytest.raises(MetricError, match=r"grid\.shape"):
        stability(follows, lambda _: 0, volume, Grid((3, 3, 3), np.eye(4)))


def test_methods_are_compared_in_pairs(grid):
    generator = np.random.default_rng(0)
    maps = {name: generator.random(grid.shape) for name in "abc"}
    found = agreement(maps, grid)
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found["a", "c"] == similarity(maps["a"], maps["c"], grid)
