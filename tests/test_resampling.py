import numpy as np
import pytest
import torch
import torch.nn.functional as F
from grid_strategies import grids
from hypothesis import given, settings
from hypothesis import strategies as st

from volsal.grid import Grid, GridError
from volsal.resampling import _along_axes, _through_affine, resample

RAMP = np.array([0.3, -0.2, 0.05])  # a field linear in world millimetres: trilinear interpolation is exact on it


def positions(grid):
    return np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)


def linear_field(grid):
    return grid.world(positions(grid)) @ RAMP + 4.0


def inside(source, target):
    at = source.voxel(target.world(positions(target)))
    inner = ((at >= 0) & (at <= np.array(source.shape) - 1)).all(-1)
    outer = ((at < -0.51) | (at > np.array(source.shape) - 0.49)).any(-1)
    return inner, outer


@settings(max_examples=40, deadline=None)
@given(grids(), grids())
def test_a_field_linear_in_millimetres_survives_between_any_two_grids(source, target):
    got = resample(linear_field(source), source, target)
    inner, outer = inside(source, target)
    np.testing.assert_allclose(got[inner], linear_field(target)[inner], atol=1e-6)
    assert (got[outer] == 0).all()


@settings(max_examples=40, deadline=None)
@given(grids(), st.permutations(range(3)), st.tuples(*[st.booleans()] * 3), st.floats(0.3, 3), st.floats(-4, 4))
def test_it_survives_between_parallel_grids_of_any_axis_order(source, order, flips, scale, shift):
    affine = source.affine[:, [*order, 3]].copy()
    affine[:3, :3] *= np.where(flips, -scale, scale)
    affine[:3, 3] = source.world((np.array(source.shape) - 1) / 2 + shift)
    target = Grid((9, 8, 7), affine)
    got = resample(linear_field(source), source, target)
    inner, outer = inside(source, target)
    np.testing.assert_allclose(got[inner], linear_field(target)[inner], atol=1e-6)
    assert (got[outer] == 0).all()


def test_both_ways_of_computing_give_the_same(oblique):
    values = torch.randn(oblique.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shifted = oblique.affine.copy()
    shifted[:3, 3] = oblique.world((-2.2, -1.3, -3.1))  # reaches beyond the source on one side
    target = Grid((23, 17, 19), shifted @ np.diag([0.4, 0.6, 0.7, 1]))
    composed = target.to(oblique)
    torch.testing.assert_close(
        _along_axes(values, composed, target.shape),
        _through_affine(values, composed, target.shape),
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize("shear", [0.0, 0.3])
def test_a_voxel_on_the_outer_face_is_inside_on_every_path(shear):
    source = Grid((4, 5, 6), np.eye(4))
    affine = np.eye(4)
    affine[0, 1] = shear
    affine[2, 3] = 5.5  # the upper face of the last axis
    values = resample(np.ones(source.shape), source, Grid((2, 3, 1), affine))
    assert values.min() == pytest.approx(1.0)


def test_autocast_around_it_changes_nothing(oblique):
    values, target = torch.randn(oblique.shape), oblique.coarse((3, 4, 5))
    expected = resample(values, oblique, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(resample(values, oblique, target), expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(7, 9, 11), (21, 18, 44), (13, 20, 30)])
def test_between_layer_and_input_it_is_torchs_half_pixel_interpolation(oblique, size):
    grid = Grid(size, oblique.affine)
    values = torch.randn(2, 3, 7, 9, 11, generator=torch.Generator().manual_seed(2))
    expected = F.interpolate(values, size=size, mode="trilinear", align_corners=False)
    torch.testing.assert_close(resample(values, grid.coarse((7, 9, 11)), grid), expected, atol=1e-5, rtol=1e-5)


def test_onto_its_own_grid_nothing_changes(oblique):
    values = torch.randn(1, 1, *oblique.shape)
    torch.testing.assert_close(resample(values, oblique, oblique), values, rtol=0, atol=0)


def test_shear_is_carried_exactly(oblique):
    sheared = oblique.affine.copy()
    sheared[:3, 2] += 0.4 * sheared[:3, 1]  # a gantry tilt
    target = Grid((5, 6, 7), sheared)
    got = resample(linear_field(oblique), oblique, target)
    inner, _ = inside(oblique, target)
    assert inner.sum() > 20
    np.testing.assert_allclose(got[inner], linear_field(target)[inner], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keeps_kind_dtype_and_leading_axes(oblique, dtype):
    values = torch.ones(2, 3, *oblique.shape, dtype=dtype)
    target = oblique.coarse((2, 3, 4))
    result = resample(values, oblique, target)
    assert result.dtype == dtype
    assert result.shape == (2, 3, 2, 3, 4)
    assert isinstance(resample(np.ones(oblique.shape, np.float32), oblique, target), np.ndarray)


def test_the_result_does_not_depend_on_the_slabs_it_is_made_in(oblique, monkeypatch):
    fine = oblique.coarse((40, 30, 50))
    turned = Grid(fine.shape, fine.affine @ np.array([[1, 0.1, 0, 0], [-0.1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    values = torch.randn(oblique.shape)
    whole = [resample(values, oblique, target) for target in (fine, turned)]
    monkeypatch.setattr("volsal.resampling._SLAB_BYTES", 30 * 50 * 4 * 3)
    for target, expected in zip((fine, turned), whole, strict=True):
        torch.testing.assert_close(resample(values, oblique, target), expected, rtol=1e-6, atol=1e-6)


def test_refuses_values_of_another_shape_or_of_integers(oblique):
    with pytest.raises(GridError, match="their grid has shape"):
        resample(torch.zeros(3, 3, 3), oblique, oblique)
    with pytest.raises(TypeError, match="convert them first"):
        resample(torch.zeros(oblique.shape, dtype=torch.int16), oblique, oblique)
