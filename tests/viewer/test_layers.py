import subprocess
import sys

import numpy as np
import pytest
from turned_phantom import BLOB_MM, ORIENTATIONS, SPACING, phantom, stored_as, tilted

from volsal.scans import Scan
from volsal.viewer.layers import map_layer, napari_world, scan_layer, true_world


def world_of(arguments, index):
    return np.array(arguments["translate"]) + np.array(arguments["scale"]) * index


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_the_blob_sits_at_its_millimetres_on_napari_axes_however_the_scan_is_stored(codes):
    values, grid = stored_as(*phantom(), codes)
    data, arguments, kind = map_layer(values, grid, "map", (0, 1))
    assert kind == "image"
    assert arguments["axis_labels"] == ("S", "A", "R")
    assert arguments["units"] == ("mm", "mm", "mm")
    assert "affine" not in arguments  # napari aborts on permuted ones
    assert min(arguments["scale"]) > 0
    peak = np.array(np.unravel_index(data.argmax(), data.shape))
    assert (np.abs(world_of(arguments, peak) - BLOB_MM[::-1]) <= SPACING[::-1] / 2 + 1e-9).all()
    np.testing.assert_array_equal(data, phantom()[0].transpose(2, 1, 0))
    np.testing.assert_allclose(world_of(arguments, 0), phantom()[1].affine[:3, 3][::-1], atol=1e-9)
    assert np.shares_memory(data, values)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR", "ILA"])
@pytest.mark.parametrize("degrees", [0.0, 6.3, -16.5])
def test_metadata_leads_from_napari_world_back_to_the_scanner(codes, degrees):
    values, grid = phantom()
    values, grid = stored_as(values, tilted(grid, degrees), codes)
    data, arguments, _ = map_layer(values, grid, "map", (0, 1))
    metadata = arguments["metadata"]
    stored_peak = grid.world(np.unravel_index(values.argmax(), values.shape))
    shown_peak = world_of(arguments, np.array(np.unravel_index(data.argmax(), data.shape)))
    np.testing.assert_allclose(true_world(metadata, shown_peak), stored_peak, atol=1e-8)
    np.testing.assert_allclose(napari_world(grid, stored_peak), shown_peak, atol=1e-8)
    np.testing.assert_array_equal(metadata["affine"], grid.affine)
    assert metadata["axis_codes"] == grid.orientation == codes
    assert metadata["obliquity_degrees"] == pytest.approx(abs(degrees), abs=1e-5)
    assert metadata["planes"] == ("native" if degrees else "anatomical")


def test_an_oblique_scan_keeps_its_spacing_and_its_middle():
    values, grid = phantom()
    grid = tilted(grid, 16.5)
    data, arguments, _ = map_layer(values, grid, "map", (0, 1))
    np.testing.assert_allclose(arguments["scale"], SPACING[::-1])
    middle = (np.array(data.shape) - 1) / 2
    np.testing.assert_allclose(world_of(arguments, middle), grid.world((np.array(grid.shape) - 1) / 2)[::-1], atol=1e-8)


def test_a_map_is_coloured_over_its_window_and_fades_to_nothing():
    values, grid = phantom()
    _, arguments, _ = map_layer(values, grid, "lrp", (0.0, 0.8), unit="probability")
    assert arguments["name"] == "lrp"
    assert arguments["contrast_limits"] == (0.0, 0.8)
    assert arguments["blending"] == "translucent_no_depth"
    assert arguments["colormap"]["colors"][0][3] == 0
    assert arguments["metadata"]["unit"] == "probability"


def test_a_signed_map_is_centred_on_zero():
    values, grid = phantom()
    _, arguments, _ = map_layer(values, grid, "ig", (-0.2, 0.8), signed=True)
    assert arguments["contrast_limits"] == (-0.8, 0.8)
    colours = arguments["colormap"]["colors"]
    assert colours[len(colours) // 2][3] == 0


def test_an_empty_map_still_has_a_window_that_napari_accepts():
    values, grid = phantom()
    _, arguments, _ = map_layer(values * 0, grid, "empty", (0.0, 0.0))
    low, high = arguments["contrast_limits"]
    assert low == 0 < high


def test_the_scan_is_grey_and_windowed():
    scan = Scan(*phantom())
    data, arguments, _ = scan_layer(scan, "T1")
    assert (arguments["name"], arguments["colormap"]) == ("T1", "gray")
    low, high = arguments["contrast_limits"]
    assert data.min() <= low < high <= data.max()


def test_layers_are_made_without_napari_or_qt():
    code = (
        "import sys, volsal.viewer.layers, volsal.display;"
        "loaded = {'napari', 'qtpy', 'PyQt6', 'vispy', 'matplotlib'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.filterwarnings("ignore")  # napari's own, on import
@pytest.mark.parametrize("signed", [False, True])
def test_napari_takes_the_layers_as_they_are(signed):
    layers = pytest.importorskip("napari.layers")
    values, grid = stored_as(*phantom(), "PSR")
    for layer_data in (scan_layer(Scan(values, grid)), map_layer(values, grid, "map", (-1, 1), "unit", signed)):
        layer = layers.Layer.create(*layer_data)
        peak = np.unravel_index(layer.data.argmax(), layer.data.shape)
        assert (np.abs(np.array(layer.data_to_world(peak)) - BLOB_MM[::-1]) <= SPACING[::-1] / 2 + 1e-9).all()
        assert [str(unit) for unit in layer.units] == ["millimeter"] * 3
