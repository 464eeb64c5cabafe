import nibabel as nib
import numpy as np
import pytest
from made_runs import BLOB_MM, distance, grid_of
from napari._qt.utils import QImg2array
from napari.layers import Layer

from volsal.display import PLANES, Upright
from volsal.plugin.planes import LinkedPlanes
from volsal.scans import Scan
from volsal.viewer.layers import napari_world
from volsal.viewer.opening import Opened, ShownMap
from volsal.viewer.show import face

pytestmark = pytest.mark.filterwarnings("ignore")  # napari's own deprecations, and those of the libraries under it


def head(codes, degrees=0.0):
    """A dark scan, so that all colour is the map's or the crosshair's, and a map of one blob."""
    grid = grid_of(codes, degrees)
    far = distance(grid)[1]
    blob = np.where(far < 8, 1.0, 0.0).astype(np.float32)
    return Opened(Scan(np.ones(grid.shape, np.float32), grid), maps=(ShownMap("blob", blob, (0.0, 1.0), "logit"),))


@pytest.fixture(scope="module")
def planes(window):
    """The same for all tests: each canvas takes its time to open."""
    made = LinkedPlanes(window)
    dock = window.window.add_dock_widget(made, name="planes")
    yield made
    window.window.remove_dock_widget(dock)
    made.close()


@pytest.fixture
def shown(viewer, planes, qtbot):
    """A function that shows a head in the linked planes, as radiologists do."""

    def show(opened):
        face(viewer, "radiological")
        viewer.layers.clear()
        qtbot.wait(10)
        for layer in opened.layers():
            viewer.add_layer(Layer.create(*layer))
        qtbot.waitUntil(lambda: all(len(pane.model.layers) == 4 for pane in planes.panes.values()))
        qtbot.wait(100)
        return planes

    return show


def picture(pane):
    """What is on the screen.  Not napari's screenshot, which draws into whichever canvas was the last to be drawn."""
    image = pane.canvas.canvas.native.grabFramebuffer()
    return QImg2array(image)[..., :3].astype(int)


def warm(pixels):
    """Where the map's top colour is, a yellow that neither scan nor crosshair has."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    return (red > 150) & (green > 120) & (blue < 120)


def place_of(pixels):
    rows, columns = np.nonzero(warm(pixels))
    return np.array([columns.mean() - (pixels.shape[1] - 1) / 2, (pixels.shape[0] - 1) / 2 - rows.mean()])


def go(planes, qtbot, grid, xyz):
    planes.viewer.dims.point = tuple(napari_world(grid, xyz))
    qtbot.wait(60)


@pytest.mark.parametrize(("codes", "degrees"), [("RAS", 0.0), ("LPS", 0.0), ("SAL", 17.0)])
def test_a_head_is_the_same_way_up_in_every_plane_however_it_is_stored(shown, qtbot, codes, degrees):
    opened = head(codes, degrees)
    planes = shown(opened)
    grid, upright = opened.scan.grid, Upright(opened.scan.grid)
    go(planes, qtbot, grid, BLOB_MM)
    away = upright.shown(BLOB_MM) - upright.shown(upright.centre)
    for name, pane in planes.panes.items():
        expected = np.array([-away[PLANES[name].across], away[PLANES[name].up]])
        seen = place_of(picture(pane)) / pane.model.scene.camera.zoom
        np.testing.assert_allclose(seen, expected, atol=2.5)  # mm: less than a voxel
    assert ("tilted 17.0" in planes.readout.text()) == (degrees > 0)


def test_the_crosshair_says_where_it_is_in_the_scanner_and_what_is_there(shown, qtbot):
    opened = head("SPL", 11.0)
    planes = shown(opened)
    grid, values = opened.scan.grid, opened.maps[0].values
    for voxel in ([3, 4, 5], np.round(grid.voxel(BLOB_MM)).astype(int)):
        xyz = nib.affines.apply_affine(grid.affine, voxel)
        go(planes, qtbot, grid, xyz)
        lines = planes.readout.text().splitlines()
        assert lines[0] == "x {:.1f}  y {:.1f}  z {:.1f} mm (scanner, RAS+)".format(*xyz)
        assert f"blob {values[tuple(voxel)]:.4g} logit" in lines


def test_a_click_in_a_plane_moves_the_crosshair_of_all(shown, qtbot):
    opened = head("RAS")
    planes = shown(opened)
    go(planes, qtbot, opened.scan.grid, BLOB_MM)
    pane = planes.panes["coronal"]
    before = np.array(planes.viewer.dims.point)
    native = pane.canvas.canvas.native
    from qtpy.QtCore import QPoint, Qt

    right, up = 20, 10
    middle = native.rect().center()
    qtbot.mouseClick(native, Qt.MouseButton.LeftButton, pos=QPoint(middle.x() + right, middle.y() - up))
    at = np.array(planes.viewer.dims.point)
    zoom = pane.model.scene.camera.zoom
    assert at[1] == pytest.approx(before[1])  # the plane itself stays
    np.testing.assert_allclose(at[[0, 2]], [up / zoom, -right / zoom], atol=2.0)  # radiological: to the patient's left
    for other in planes.panes.values():
        np.testing.assert_allclose(other.model.dims.point, at)
    green = picture(pane)[..., 1] - picture(pane).max(axis=-1, initial=0, where=[True, False, True]) > 60
    assert abs(np.median(np.nonzero(green)[1]) - (middle.x() + right)) < 4


def test_the_wheel_goes_through_slices_and_stops_at_the_last(shown, qtbot):
    opened = head("RAS")
    planes = shown(opened)
    go(planes, qtbot, opened.scan.grid, opened.scan.grid.world((10, 12, 7)))
    axial = planes.panes["axial"]

    class Event:
        modifiers, delta = (), (0, 1)

    start = planes.viewer.dims.point[0]
    axial._wheel(axial.model, Event)
    assert planes.viewer.dims.point[0] == pytest.approx(start + 3.0)
    for _ in range(40):
        axial._wheel(axial.model, Event)
    assert planes.viewer.dims.point[0] == pytest.approx(opened.scan.grid.world((0, 0, 13))[2])


def test_planes_follow_the_layers_and_the_camera(shown, qtbot, viewer):
    planes = shown(head("RAS"))
    pane = planes.panes["axial"]
    viewer.layers["blob"].visible = False
    viewer.layers["scan"].contrast_limits = (0.0, 5.0)
    assert not pane.model.layers["blob"].visible
    assert tuple(pane.model.layers["scan"].contrast_limits) == (0.0, 5.0)
    assert np.shares_memory(pane.model.layers["scan"].data, viewer.layers["scan"].data)
    planes.swap_sides()
    assert pane.model.canvas.overlays["volsal_left"].text == "L"
    viewer.layers.remove("blob")
    qtbot.waitUntil(lambda: "blob" not in pane.model.layers)
    planes.solid.click()
    assert viewer.dims.ndisplay == 3
    assert viewer.scene.camera.view_direction == pytest.approx((0, -1, 0), abs=1e-6)
    planes.solid.click()
    assert viewer.dims.ndisplay == 2
