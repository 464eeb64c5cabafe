import numpy as np
import pytest
from turned_phantom import BLOB_MM, ORIENTATIONS, SHAPE, SPACING, phantom, stored_as, tilted

from volsal.display import (
    PLANES,
    DisplayError,
    Upright,
    colours,
    in_words,
    letters,
    limits,
    mirrored,
    peak_mm,
    scan_window,
    verdict,
)


def test_there_are_48_different_orientations_and_each_is_what_it_says():
    values, grid = phantom()
    assert len(set(ORIENTATIONS)) == 48
    for codes in ORIENTATIONS:
        assert stored_as(values, grid, codes)[1].orientation == codes


@pytest.mark.parametrize("degrees", [0.0, 11.0])
@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_way_to_store_a_volume_is_displayed_alike(codes, degrees):
    values, grid = phantom()
    grid = tilted(grid, degrees)
    reference = Upright(grid)
    turned, turned_grid = stored_as(values, grid, codes)
    upright = Upright(turned_grid)
    assert upright.canonical.orientation == "RAS"
    np.testing.assert_array_equal(upright.array(turned), values)
    np.testing.assert_allclose(upright.origin, reference.origin, atol=1e-9)
    for plane in PLANES:
        index = upright.index(plane, BLOB_MM)
        assert index == reference.index(plane, BLOB_MM)
        np.testing.assert_array_equal(upright.picture(turned, plane, index), reference.picture(values, plane, index))
        np.testing.assert_allclose(upright.extent(plane), reference.extent(plane), atol=1e-9)


def test_upright_axes_are_views_and_nothing_is_copied():
    values, grid = phantom()
    turned, turned_grid = stored_as(values, grid, "PSL")
    assert np.shares_memory(Upright(turned_grid).array(turned), turned)


def test_the_displayed_frame_is_the_scanner_unless_the_scan_is_oblique():
    _, grid = phantom()
    upright = Upright(grid)
    np.testing.assert_allclose(upright.matrix, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(upright.shown(BLOB_MM), BLOB_MM, atol=1e-9)
    assert not upright.oblique
    assert upright.note == ""


@pytest.mark.parametrize("degrees", [0.0, 6.3, -16.5, 40.0])
def test_displayed_positions_and_scanner_positions_convert_both_ways(degrees):
    _, grid = phantom()
    upright = Upright(tilted(grid, degrees))
    points = np.array([BLOB_MM, [0, 0, 0], [-12.5, 3.25, 8.0]])
    np.testing.assert_allclose(upright.true(upright.shown(points)), points, atol=1e-9)
    np.testing.assert_allclose(upright.shown(upright.centre), upright.centre, atol=1e-8)
    homogeneous = np.append(upright.shown(BLOB_MM), 1)
    np.testing.assert_allclose((upright.matrix @ homogeneous)[:3], BLOB_MM, atol=1e-9)


def test_an_oblique_scan_says_by_how_much():
    _, grid = phantom()
    assert "tilted 16.5°" in Upright(tilted(grid, 16.5)).note
    assert Upright(tilted(grid, 0.05)).note == ""


def test_a_picture_lies_where_its_extent_says():
    values, grid = phantom()
    upright = Upright(grid)
    for plane, view in PLANES.items():
        picture = upright.picture(values, plane, upright.index(plane, BLOB_MM))
        row, column = np.unravel_index(picture.argmax(), picture.shape)
        left, right, bottom, top = upright.extent(plane)
        across = left + (column + 0.5) * (right - left) / picture.shape[1]
        up = bottom + (row + 0.5) * (top - bottom) / picture.shape[0]
        assert abs(across - BLOB_MM[view.across]) <= SPACING[view.across] / 2
        assert abs(up - BLOB_MM[view.up]) <= SPACING[view.up] / 2


def test_a_point_outside_the_volume_shows_the_outermost_slice():
    _, grid = phantom()
    upright = Upright(grid)
    assert upright.index("axial", (0, 0, 999)) == SHAPE[2] - 1
    assert upright.index("axial", (0, 0, -999)) == 0


def test_letters_name_the_side_that_each_convention_puts_there():
    assert letters("axial", "radiological") == {"left": "R", "right": "L", "bottom": "P", "top": "A"}
    assert letters("axial", "neurological") == {"left": "L", "right": "R", "bottom": "P", "top": "A"}
    assert letters("coronal", "radiological") == {"left": "R", "right": "L", "bottom": "I", "top": "S"}
    assert letters("sagittal", "radiological") == {"left": "A", "right": "P", "bottom": "I", "top": "S"}
    assert letters("sagittal", "neurological") == {"left": "P", "right": "A", "bottom": "I", "top": "S"}
    assert in_words("radiological") == "radiological: patient's right is on the left of the screen"
    assert in_words("neurological") == "neurological: patient's right is on the right of the screen"


def test_an_unknown_convention_is_refused():
    with pytest.raises(DisplayError, match="not 'radiologic'"):
        mirrored("radiologic")


def test_colours_fade_out_where_a_map_says_nothing_and_grow_lighter_with_strength():
    def lightness(points):
        return points[:, :3] @ [0.2126, 0.7152, 0.0722]

    plain, signed = colours(), colours(signed=True)
    assert plain[0, 3] == 0
    assert plain[-1, 3] > 0.8
    assert (np.diff(plain[:, 3]) >= 0).all()
    assert (np.diff(lightness(plain)) > 0).all()
    middle = len(signed) // 2
    assert signed[middle, 3] == 0
    np.testing.assert_allclose(signed[:, 3], signed[::-1, 3])
    assert (np.diff(lightness(signed[middle:])) > 0).all()
    assert (np.diff(lightness(signed[: middle + 1])) < 0).all()
    assert signed[0, 2] > signed[0, 0]  # blue for negative
    assert signed[-1, 0] > signed[-1, 2]


def test_a_signed_window_is_centred_on_zero_and_no_window_has_zero_width():
    assert limits((0.2, 0.8)) == (0.2, 0.8)
    assert limits((-0.2, 0.8), signed=True) == (-0.8, 0.8)
    assert limits((0, 0)) == (0, 1)
    assert limits((3, 3)) == (3, 4)
    assert limits((0, 0), signed=True) == (-1, 1)


@pytest.mark.parametrize("air", [0.0, -1000.0])
def test_the_scan_window_ignores_air(air):
    random = np.random.default_rng(0)
    scan = np.full((40, 40, 40), air, dtype=np.float32)
    scan[10:30, 10:30, 10:30] = random.normal(100, 10, (20, 20, 20))
    low, high = scan_window(scan)
    assert 70 < low < 90
    assert 110 < high < 130


def test_a_scan_without_contrast_still_has_a_window():
    low, high = scan_window(np.full((4, 4, 4), 7.0, dtype=np.float32))
    assert low < high


def test_empty_and_constant_maps_are_named_in_words():
    zero = np.zeros((3, 3, 3), dtype=np.float32)
    assert verdict(zero) == "no positive evidence"
    assert verdict(zero - np.eye(3, dtype=np.float32)) == "no positive evidence"
    assert verdict(zero + 0.25) == "the map is 0.25 everywhere"
    assert verdict(np.eye(3, dtype=np.float32)[None]) == ""


def test_the_peak_is_the_strongest_voxel_and_an_empty_map_has_none():
    values, grid = phantom()
    assert np.abs(peak_mm(values, grid) - BLOB_MM).max() <= SPACING.max() / 2
    assert peak_mm(np.zeros_like(values), grid) is None
