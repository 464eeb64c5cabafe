import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from grid_strategies import grids
from hypothesis import given, settings
from hypothesis import strategies as st

from volsal.grid import Grid, GridError
from volsal.resampling import _aligned, _along_axes, _box, _through_affine, resample

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
    # Grids turned by less than a thousandth of a voxel over the whole volume count as parallel.
    within = 1e-6 + 1e-3 * np.abs(RAMP @ source.affine[:3, :3]).sum()
    np.testing.assert_allclose(got[inner], linear_field(target)[inner], atol=within)
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


def reference(values, source, target, field):
    """The definition, voxel by voxel: clamp to the outermost centres, interpolate, 0 outside the field."""
    at = source.voxel(target.world(positions(target))).clip(0, np.array(source.shape) - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, np.array(source.shape) - 1)
    total = np.zeros(target.shape)
    for corner in itertools.product((False, True), repeat=3):
        weight = np.where(corner, at - low, 1 - (at - low)).prod(-1)
        total += weight * values[tuple(np.moveaxis(np.where(corner, high, low), -1, 0))]
    seen = field.voxel(target.world(positions(target)))
    return total * ((seen >= -0.5 - 1e-6) & (seen <= np.array(field.shape) - 0.5 + 1e-6)).all(-1)


def turned(axes, flips, scale, shift, shape, within):
    """A grid of ``shape`` with the axes of ``within`` in another order, direction and step, about its middle."""
    change = np.zeros((4, 4))
    change[axes, range(3)] = np.where(flips, -1, 1) * np.array(scale)
    change[:3, 3] = (np.array(within.shape) - 1) / 2 + shift - change[:3, :3] @ ((np.array(shape) - 1) / 2)
    change[3, 3] = 1
    return Grid(shape, within.affine @ change)


thin_grids = st.builds(lambda grid, shape: Grid(shape, grid.affine), grids(), st.tuples(*[st.integers(1, 12)] * 3))


@st.composite
def cells(draw, field, steps):
    """Cells of ``field``, in any axis order, direction and place: some beyond its faces, some far inside them."""
    triple = st.tuples
    return turned(
        draw(st.permutations(range(3))),
        draw(triple(*[st.booleans()] * 3)),
        draw(triple(*[st.sampled_from(steps)] * 3)),
        draw(triple(*[st.floats(-2.2, 2.2)] * 3)),
        draw(triple(*[st.integers(1, 9)] * 3)),
        field,
    )


def assert_is_the_reference(data, source, target, field):
    values = np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=source.shape)
    expected, got = reference(values, source, target, field), resample(values, source, target, field)
    half = np.array(field.shape) / 2
    from_middle = np.abs(field.voxel(target.world(positions(target))) - (half - 0.5))
    on_a_face = np.abs(from_middle - half).min(-1) < 0.01  # rounding decides there
    # Grids turned by less than a thousandth of a voxel over the whole volume count as parallel.
    within = 1e-9 if not _aligned(target.to(source), target.shape) else 3e-3 * np.ptp(values)
    np.testing.assert_allclose(got[~on_a_face], expected[~on_a_face], atol=within)


@settings(max_examples=100, deadline=None)
@given(thin_grids, st.data())
def test_with_a_field_it_is_the_definition_in_every_orientation(field, data):
    source = data.draw(cells(field, [0.7, 1, 2, 5.5]))
    assert_is_the_reference(data, source, data.draw(cells(field, [0.4, 1, 2.5])), field)


@settings(max_examples=100, deadline=None)
@given(thin_grids, thin_grids, st.data())
def test_with_a_field_it_is_the_definition_at_every_angle(field, target, data):
    source = data.draw(cells(field, [0.7, 1, 2, 5.5]))
    moved = target.affine.copy()
    moved[:3, 3] += field.world((np.array(field.shape) - 1) / 2) - target.world((np.array(target.shape) - 1) / 2)
    assert_is_the_reference(data, source, Grid(target.shape, moved), field)


@pytest.mark.parametrize("angle", [0, 1e-5, 0.3])  # the second is just beyond what counts as parallel
def test_cells_off_centre_hold_their_value_as_far_as_the_fields_face(angle):
    """Cells at 0, 16, 32, 48 of 64 voxels: 16 voxels beyond the last centre there is still evidence."""
    field = Grid((64, 64, 64), np.eye(4))
    source = Grid((4, 4, 4), np.diag([16, 16, 16, 1.0]))
    values = np.arange(64, dtype=np.float32).reshape(source.shape)
    c, s = np.cos(angle), np.sin(angle)
    target = Grid((1, 200, 200), [[1, 0, 0, 48], [0, c, -s, -30], [0, s, c, -20], [0, 0, 0, 1]])
    got, expected = (f(values, source, target, field) for f in (resample, reference))
    at = field.voxel(target.world(positions(target)))
    inner = ((at > -0.45) & (at < 63.45)).all(-1)
    assert inner.sum() > 2000
    np.testing.assert_allclose(got[inner], expected[inner], atol=0.05 if angle == 1e-5 else 1e-4)
    assert (got[((at < -0.55) | (at > 63.55)).any(-1)] == 0).all()
    # Without a field the map ends half a cell beyond its last centre, at voxel 56.
    beyond = ((at[..., 1:] > 56.1) & (at[..., 1:] < 63)).all(-1)
    assert (resample(values, source, target)[beyond] == 0).all()
    assert (got[beyond] == 63).all()


def test_cells_beyond_the_field_show_nothing_there():
    field, source = Grid((10, 10, 10), np.eye(4)), Grid((5, 5, 5), np.diag([4, 4, 4, 1.0]))
    target = Grid((20, 20, 20), np.eye(4))
    got = resample(np.ones(source.shape, np.float32), source, target, field)
    assert (got[:10, :10, :10] == 1).all()
    assert got.sum() == 1000


def test_a_field_turned_against_the_values_is_refused(oblique):
    with pytest.raises(GridError, match="are turned against each other"):
        resample(np.ones(oblique.shape), oblique, oblique, Grid((4, 5, 6), np.eye(4)))


def test_both_ways_of_computing_give_the_same(oblique):
    values = torch.randn(oblique.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shifted = oblique.affine.copy()
    shifted[:3, 3] = oblique.world((-2.2, -1.3, -3.1))  # reaches beyond the source on one side
    target = Grid((23, 17, 19), shifted @ np.diag([0.4, 0.6, 0.7, 1]))
    for field in (oblique, oblique.coarse((3, 4, 5)), Grid((4, 4, 4), oblique.affine)):
        composed, box = target.to(oblique), _box(oblique, field)
        one, other = torch.zeros((2, *target.shape), dtype=values.dtype)
        _along_axes(values, composed, box, one)
        _through_affine(values, composed, box, other)
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


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


@pytest.mark.parametrize("angle", [0, 30])
def test_the_result_lies_in_memory_as_a_file_holds_it_and_arrays_of_any_order_are_taken(oblique, angle):
    """A map is written without being turned over, and a scan as read needs no copy."""
    values = np.random.default_rng(0).normal(size=oblique.shape).astype(np.float32)
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    turn = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 0.7, 0], [0, 0, 0, 1]])
    target = Grid((13, 12, 10), oblique.affine @ turn)
    found = resample(values, oblique, target)
    assert found.flags.f_contiguous
    assert found.any()
    for other in (np.asfortranarray(values), np.flip(np.flip(values, 1).copy(), 1)):
        np.testing.assert_array_equal(resample(other, oblique, target), found)
