import itertools

import numpy as np
import pytest
from grid_strategies import grids
from hypothesis import given
from hypothesis import strategies as st

from volsal.errors import VolsalError
from volsal.grid import Grid, GridError


@given(grids())
def test_voxel_undoes_world(grid):
    points = np.random.default_rng(0).uniform(-5, 20, (6, 3))
    np.testing.assert_allclose(grid.voxel(grid.world(points)), points, atol=1e-8)


@given(grids(), st.tuples(*[st.integers(1, 5)] * 3))
def test_a_coarse_grid_covers_the_same_field_of_view(grid, shape):
    coarse = grid.coarse(shape)
    for corner in np.ndindex(2, 2, 2):
        edges = [g.world(np.array(corner) * np.array(g.shape) - 0.5) for g in (grid, coarse)]
        np.testing.assert_allclose(*edges, atol=1e-6)


def test_a_coarse_cell_lies_at_the_half_pixel_place():
    # 12 voxels in 3 cells: cell m at 4 m + 1.5.
    np.testing.assert_allclose(Grid((12, 12, 12), np.eye(4)).coarse((3, 3, 3)).world((2, 0, 1)), (9.5, 1.5, 5.5))


def test_spacing_is_in_millimetres_along_array_axes(oblique):
    np.testing.assert_allclose(oblique.spacing, (0.8, 0.9, 2.5))


def test_orientation_and_obliquity_are_read_off_the_affine(oblique):
    assert oblique.orientation == "LAS"
    assert oblique.obliquity == pytest.approx(20)
    assert "20.0 degrees oblique" in repr(oblique)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
def test_every_orientation_has_its_name(order, signs):
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, order] * signs
    expected = "".join(("RAS" if sign > 0 else "LPI")[world] for world, sign in zip(order, signs, strict=True))
    assert Grid((2, 3, 4), affine).orientation == expected


def test_a_tie_of_45_degrees_still_gives_each_axis_a_direction_of_its_own():
    c = np.sqrt(0.5)
    affine = np.eye(4)
    affine[:2, :2] = [[c, -c], [c, c]]
    assert sorted(Grid((2, 3, 4), affine).orientation) in (["A", "L", "S"], ["A", "R", "S"], ["P", "R", "S"])


def test_a_mirrored_grid_is_not_the_same_grid(oblique):
    mirrored = oblique.affine.copy()
    mirrored[:3, 0] *= -1
    mirrored[:3, 3] = oblique.world((oblique.shape[0] - 1, 0, 0))
    other = Grid(oblique.shape, mirrored)
    assert not oblique.same_as(other)
    with pytest.raises(GridError, match=r"corner voxels lie up to 4\.8 mm apart"):
        oblique.require_same(other)
    with pytest.raises(GridError, match="shapes differ"):
        oblique.require_same(oblique.coarse((2, 2, 2)))
    oblique.require_same(Grid(oblique.shape, oblique.affine))


def test_overlap_is_the_share_of_the_field_of_view():
    here = Grid((10, 10, 10), np.eye(4))
    shifted = np.eye(4)
    shifted[0, 3] = 5
    assert here.overlap(Grid((10, 10, 10), shifted)) == 0.5
    assert here.overlap(Grid((10, 20, 20), shifted)) == 0.5
    assert here.overlap(here) == 1
    shifted[0, 3] = 50
    assert here.overlap(Grid((10, 10, 10), shifted)) == 0


def test_a_grid_cannot_be_changed(oblique):
    with pytest.raises(ValueError, match="read-only"):
        oblique.affine[0, 0] = 1
    with pytest.raises(AttributeError):
        oblique.shape = (1, 1, 1)


@pytest.mark.parametrize(
    ("shape", "matrix", "says"),
    [
        ((2, 3, 4), np.eye(3), "4 x 4"),
        ((2, 3, 4), np.diag([1, 1, 0, 1]), "flattens space"),
        ((2, 3, 4), np.diag([1, 1, 1, 2]), "last row"),
        ((2, 3, 4), np.diag([1, np.nan, 1, 1]), "NaN"),
        ((2, 3), np.eye(4), "three axes"),
        ((2, 3, 0), np.eye(4), "at least one voxel"),
    ],
)
def test_refuses_what_is_no_grid(shape, matrix, says):
    with pytest.raises(GridError, match=says) as raised:
        Grid(shape, matrix)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, VolsalError)


def test_tiny_and_huge_voxels_are_no_flat_ones():
    for mm in (1e-4, 1e4):
        assert Grid((2, 2, 2), np.diag([mm, mm, mm, 1])).spacing[0] == mm
