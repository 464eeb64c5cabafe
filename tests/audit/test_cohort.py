"""Streaming moments against NumPy's over all maps at once, and affines that are known."""

import numpy as np
import pytest

from volsal.audit.cohort import CohortMap, RegistrationError, register_affine
from volsal.audit.metric import MetricError
from volsal.grid import Grid


def test_mean_and_variance_are_those_of_all_maps_at_once(oblique):
    generator = np.random.default_rng(0)
    maps = 1e4 + generator.normal(size=(7, *oblique.shape))  # large beside what varies
    cohort = CohortMap(oblique)
    assert np.isnan(cohort.mean).all()
    for values in maps:
        cohort.add(values, oblique)
    assert (cohort.count == 7).all()
    assert cohort.mean == pytest.approx(maps.mean(0), rel=1e-9)
    assert cohort.variance == pytest.approx(maps.var(0, ddof=1), rel=1e-6)


def test_each_voxel_counts_the_scans_that_reach_it():
    grid = Grid((8, 5, 4), np.diag([2.0, 2, 2, 1]))
    half = Grid((8, 5, 4), grid.affine @ [[1, 0, 0, 4], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    cohort = CohortMap(grid)
    cohort.add(np.full(grid.shape, 2.0), grid)
    cohort.add(np.full(grid.shape, 6.0), half)
    known = np.zeros(grid.shape, bool)
    known[:, 0] = True
    cohort.add(np.full(grid.shape, 4.0), grid, known)
    assert cohort.count[:, 0, 0].tolist() == [2] * 4 + [3] * 4
    assert cohort.count[:, 3, 0].tolist() == [1] * 4 + [2] * 4
    assert cohort.mean[:, 3, 0] == pytest.approx([2] * 4 + [4] * 4)
    assert np.isnan(cohort.variance[:4, 3]).all()
    assert cohort.variance[4:, 3] == pytest.approx(8)
    assert cohort.variance[4:, 0] == pytest.approx(4)


def test_a_map_that_is_no_number_would_spoil_the_cohort(oblique):
    values = np.zeros(oblique.shape)
    values[0, 0, 0] = np.nan
    with pytest.raises(MetricError, match="leave the scan out"):
        CohortMap(oblique).add(values, oblique)


def head(world):
    """Something with no symmetry, at points (..., 3) mm."""
    shell = np.linalg.norm(world / (60, 75, 55), axis=-1)
    values = 100.0 * (shell < 1) - 60 * ((shell < 0.93) & (shell > 0.86))
    for at, size, height in (((20, 30, 10), 18, 90), ((-25, -10, 20), 14, -50), ((5, -40, -20), 20, 60)):
        values = values + height * np.exp(-((world - at) ** 2).sum(-1) / (2 * size**2))
    return np.clip(values, 0, None)


def test_a_known_affine_is_found_again_on_grids_of_any_axes():
    fixed_grid = Grid((48, 54, 46), [[-3.5, 0, 0, 82], [0, 3.5, 0, -93], [0, 0, 3.5, -79], [0, 0, 0, 1]])
    c, s = np.cos(0.15), np.sin(0.15)
    motion = np.eye(4)
    motion[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag([1.06, 0.95, 1.03])
    motion[:3, 3] = (9, -12, 6)
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = 4.0, -3.0, 3.2, 1  # S, L, A; 100 mm off
    affine[:3, 3] = (100 + 80, -90, -80)
    moving_grid = Grid((42, 56, 60), affine)
    offset = np.eye(4)
    offset[0, 3] = -100
    truth = motion @ offset  # where a point of the scan lies in the template
    points = moving_grid.world(np.stack(np.indices(moving_grid.shape), -1))
    moving = 3 * head(points @ truth[:3, :3].T + truth[:3, 3]) + 7
    fixed = head(fixed_grid.world(np.stack(np.indices(fixed_grid.shape), -1)))
    found = register_affine(moving, moving_grid, fixed, fixed_grid)
    probe = np.array([[100, 0, 0], [140, 30, 20], [70, -40, -30], [110, 50, -20.0]])
    landed = probe @ found.motion[:3, :3].T + found.motion[:3, 3]
    expected = probe @ truth[:3, :3].T + truth[:3, 3]
    assert np.linalg.norm(landed - expected, axis=1).max() < 2
    assert found.correlation > 0.97
    assert 0.5 < found.overlap <= 1
    assert np.allclose(found.place(moving_grid).world((1, 2, 3)), found.motion[:3] @ [*moving_grid.world((1, 2, 3)), 1])


def test_images_without_content_are_refused(oblique):
    grid = Grid((20, 20, 20), np.diag([4.0, 4, 4, 1]))
    with pytest.raises(RegistrationError, match="the same"):
        register_affine(np.zeros(grid.shape), grid, np.zeros(grid.shape), grid)
