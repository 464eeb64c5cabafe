import json
import os
import sys
import warnings
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from turned_phantom import BLOB_MM, phantom, stored_as, tilted

from volsal.display import PLANES, Upright
from volsal.scans import Scan, ScanError, read_scan
from volsal.scans.write import map_header, write_map
from volsal.viewer import ShownMap, ViewerError, open_case, screenshot

viewer_show = sys.modules["volsal.viewer.show"]

needs_display = pytest.mark.skipif(
    sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")),
    reason="no display; run under: xvfb-run -a -s '-screen 0 1400x1000x24'",
)
# napari's own deprecations, and those of the libraries under it.
napari_warns = pytest.mark.filterwarnings("ignore")


def case_of(codes="RAS", degrees=0.0):
    """A dark scan, so that all colour is the map's, and a map of one blob."""
    values, grid = phantom()
    values, grid = stored_as(values, tilted(grid, degrees), codes)
    at = grid.world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1))
    blob = np.exp(-((at - BLOB_MM) ** 2).sum(-1) / (2 * 6.0**2)).astype(np.float32)
    return Scan(np.ones_like(values), grid), ShownMap("blob", blob, (0.0, 1.0), "probability")


def coloured_at(picture):
    """(across, up) pixels from the middle of the picture to the middle of what is coloured."""
    inner = picture.astype(float)
    weight = inner.max(axis=-1) - inner.min(axis=-1)
    # The colour bar is in the upper right corner.
    weight[: picture.shape[0] // 3, -picture.shape[1] // 6 :] = 0
    weight[weight < 60] = 0
    rows, columns = np.indices(weight.shape)
    across = (weight * columns).sum() / weight.sum() - (picture.shape[1] - 1) / 2
    up = (picture.shape[0] - 1) / 2 - (weight * rows).sum() / weight.sum()
    return np.array([across, up])


def expected_direction(grid, plane):
    """Unit vector, radiological, from the middle of the volume to the blob."""
    upright, view = Upright(grid), PLANES[plane]
    from_middle = upright.shown(BLOB_MM) - upright.shown(upright.centre)
    vector = np.array([-from_middle[view.across], from_middle[view.up]])
    return vector / np.linalg.norm(vector)


@pytest.fixture
def displayed(monkeypatch):
    """What would have been shown: opens no window."""
    seen = SimpleNamespace()

    def show(scan, maps=(), **how):
        seen.scan, seen.maps, seen.how = scan, list(maps), how

    monkeypatch.setattr(viewer_show, "show", show)
    return seen


@pytest.fixture(scope="module")
def pictures():
    """The scan stored RAS in all three planes, radiological.  A window takes seconds, so they are shared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scan, blob = case_of("RAS")
        return {plane: screenshot(scan, [blob], plane=plane) for plane in PLANES}


@needs_display
@pytest.mark.parametrize("plane", PLANES)
def test_the_blob_is_drawn_on_the_side_and_at_the_distance_where_it_is(pictures, plane):
    at = coloured_at(pictures[plane])
    np.testing.assert_allclose(at / np.linalg.norm(at), expected_direction(case_of()[0].grid, plane), atol=0.06)
    assert at[0] < 0 < at[1]  # patient right or anterior on the left, anterior or superior up


@needs_display
@napari_warns
def test_neurological_swaps_the_sides_and_nothing_else(pictures):
    scan, blob = case_of("LPS")
    neurological = coloured_at(screenshot(scan, [blob], convention="neurological"))
    np.testing.assert_allclose(neurological, coloured_at(pictures["axial"]) * [-1, 1], atol=2)


@needs_display
@napari_warns
@pytest.mark.parametrize(("codes", "plane"), [("LPS", "sagittal"), ("PSR", "axial"), ("SPL", "coronal")])
def test_the_window_shows_the_same_picture_however_the_scan_is_stored(pictures, codes, plane):
    scan, blob = case_of(codes)
    np.testing.assert_allclose(screenshot(scan, [blob], plane=plane).astype(int), pictures[plane], atol=1)


@needs_display
@napari_warns
def test_an_oblique_scan_says_so_on_screen_and_shows_the_blob_in_its_own_plane():
    scan, blob = case_of("LAS", degrees=16.5)
    viewer = viewer_show.show(scan, [blob], block=False)
    try:
        assert "own, tilted 16.5" in " ".join(viewer.canvas.overlays.text.text.split())
        picture = viewer.screenshot(flash=False)[..., :3]
    finally:
        viewer.close()
    at = coloured_at(picture)
    np.testing.assert_allclose(at / np.linalg.norm(at), expected_direction(scan.grid, "axial"), atol=0.06)


@needs_display
@napari_warns
def test_the_window_shows_the_first_map_with_evidence_and_tells_side_scale_unit_and_true_position():
    scan, blob = case_of("PSR", degrees=6.0)
    empty = ShownMap("empty", blob.values * 0, (0.0, 0.0))
    viewer = viewer_show.show(scan, [empty, blob], block=False)
    try:
        overlays = viewer.canvas.overlays
        caption = " ".join(overlays.text.text.split())
        assert "patient's right is on the left of the screen" in caption
        assert "blob: 0 to 1 probability" in caption
        assert overlays.scale_bar.visible
        assert [layer.name for layer in viewer.layers if layer.visible] == ["scan", "blob"]
        peak = scan.grid.world(np.unravel_index(blob.values.argmax(), blob.values.shape))
        viewer.cursor.position = viewer.dims.point
        viewer.status = {"coordinates": "napari's own", "layer_base": "", "source_type": "", "plugin": ""}
        assert "x {:.1f}  y {:.1f}  z {:.1f} mm (scanner, RAS+)".format(*peak) in viewer.status
        assert f"blob {blob.values.max():.4g} probability" in viewer.status
    finally:
        viewer.close()


@needs_display
@napari_warns
def test_letters_follow_the_plane_and_hide_where_they_would_be_wrong():
    scan, blob = case_of()
    viewer = viewer_show.show(scan, [blob], block=False)
    try:
        overlays = viewer.canvas.overlays
        assert [overlays[f"volsal_{edge}"].text for edge in ("left", "right", "top", "bottom")] == list("RLAP")
        viewer.dims.order = (2, 0, 1)
        assert [overlays[f"volsal_{edge}"].text for edge in ("left", "right", "top", "bottom")] == list("APSI")
        viewer.scene.camera.orientation = ("towards", "up", "right")
        assert overlays["volsal_left"].text == "P"
        viewer.dims.order = (0, 2, 1)  # transposed: anterior is sideways
        assert not overlays["volsal_left"].visible
    finally:
        viewer.close()


@needs_display
@napari_warns
def test_an_empty_map_leaves_the_scan_untouched_and_is_named():
    scan, blob = case_of()
    viewer = viewer_show.show(scan, [ShownMap("lrp", blob.values * 0, (0.0, 0.0))], block=False)
    try:
        assert "lrp: no positive evidence" in viewer.canvas.overlays.text.text
        picture = viewer.screenshot(flash=False)[..., :3].astype(int)
    finally:
        viewer.close()
    assert (picture.max(axis=-1) - picture.min(axis=-1)).max() <= 2  # no colour anywhere


def test_a_map_of_another_shape_is_refused_before_a_window_opens():
    scan, blob = case_of()
    with pytest.raises(ViewerError, match=r"blob: the map has shape \(3, 3, 3\)"):
        viewer_show.show(scan, [ShownMap("blob", blob.values[:3, :3, :3], (0, 1))])


def test_without_napari_the_error_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "napari", None)
    with pytest.raises(ViewerError, match=r'pip install "volsal\[napari\]" "napari\[pyqt6\]"'):
        viewer_show.show(*case_of()[:1])


@pytest.mark.parametrize(("binding", "says"), [("PyQt6", "does not load"), (None, "pip install")])
def test_without_a_working_qt_binding_the_error_says_which_of_the_two_it_is(monkeypatch, binding, says):
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.delenv("QT_QPA_PLATFORM", raising=False)
    monkeypatch.setitem(sys.modules, "qtpy.QtWidgets", None)
    monkeypatch.setattr(viewer_show.importlib.util, "find_spec", lambda name: name in ("napari", binding) or None)
    with pytest.raises(ViewerError, match=says):
        viewer_show.show(*case_of()[:1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has screens that may be missing")
def test_without_a_display_the_error_says_so_and_the_process_lives(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(viewer_show.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ViewerError, match="no display"):
        viewer_show.show(*case_of()[:1])
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    with pytest.raises(ViewerError, match="offscreen draws no pictures"):
        viewer_show.show(*case_of()[:1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the check is for X11 and Wayland")
def test_a_display_that_cannot_be_reached_is_an_error_and_not_an_abort(monkeypatch):
    if viewer_show.importlib.util.find_spec("PyQt6") is None:
        pytest.skip("no Qt binding is installed")
    for name in ("WAYLAND_DISPLAY", "QT_QPA_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DISPLAY", ":4095")
    with pytest.raises(ViewerError, match="Qt cannot open a window here"):
        viewer_show._require_qt_starts()


def write_case(folder, **changes):
    """A case folder as volsal writes it, with one found map and an empty one."""
    scan, blob = case_of("LPS")
    nib.save(nib.Nifti1Image(scan.array, scan.grid.affine), folder / "scan.nii.gz")
    scan = read_scan(folder / "scan.nii.gz")
    case = folder / "case"
    entries = []
    for name, values, window, status in [
        ("empty", blob.values * 0, (0, 0), "empty"),
        ("lrp", blob.values, (0, 1), "ok"),
    ]:
        write_map(case / f"{name}.nii.gz", values, map_header(scan, name, "a test", window))
        peak = None if status == "empty" else BLOB_MM.tolist()
        entries.append(
            {"file": f"{name}.nii.gz", "method": name, "target": "tumour", "unit": "p", "signed": False}
            | {"window": list(window), "status": status, "peak_mm": peak}
        )
    said = {"scan": {"path": str(folder / "scan.nii.gz"), "volume": None, "form": "sform"}, "maps": entries} | changes
    (case / "case.json").write_text(json.dumps(said))
    return case


def test_a_case_folder_opens_with_its_maps_at_the_peak(tmp_path, displayed):
    open_case(write_case(tmp_path), block=False)
    assert [shown.name for shown in displayed.maps] == ["empty · tumour", "lrp · tumour"]
    assert displayed.maps[1].window == (0, 1)
    assert displayed.maps[1].unit == "p"
    np.testing.assert_allclose(displayed.how["at_mm"], BLOB_MM)
    assert displayed.scan.grid.orientation == "LPS"


def test_a_given_position_wins_over_the_peak(tmp_path, displayed):
    open_case(write_case(tmp_path), at_mm=(1, 2, 3), convention="neurological")
    assert displayed.how["at_mm"] == (1, 2, 3)
    assert displayed.how["convention"] == "neurological"


def test_bare_files_take_their_window_from_the_header(tmp_path, displayed):
    case = write_case(tmp_path)
    open_case(tmp_path / "scan.nii.gz", [case / "lrp.nii.gz", case / "empty.nii.gz"])
    assert [(shown.name, shown.window) for shown in displayed.maps] == [("lrp", (0, 1)), ("empty", (0, 0))]


def test_a_bare_map_without_a_window_is_shown_from_zero_to_its_maximum(tmp_path, displayed):
    scan, blob = case_of()
    for name, values in (("scan", scan.array), ("cam", blob.values)):
        nib.save(nib.Nifti1Image(values, scan.grid.affine), tmp_path / f"{name}.nii")
    open_case(tmp_path / "scan.nii", [tmp_path / "cam.nii"])
    assert displayed.maps[0].window == (0, blob.values.max())


def test_a_map_that_does_not_lie_on_the_scan_is_refused_by_name(tmp_path, displayed):
    case = write_case(tmp_path)
    moved = nib.load(case / "lrp.nii.gz")
    affine = moved.affine.copy()
    affine[0, 3] += 0.5
    nib.save(nib.Nifti1Image(np.asarray(moved.dataobj), affine), case / "lrp.nii.gz")
    with pytest.raises(ViewerError, match=r"lrp\.nii\.gz: does not lie on the voxels of .*0\.5 mm apart"):
        open_case(case)


def test_a_folder_that_is_no_case_says_what_to_give(tmp_path, displayed):
    with pytest.raises(ViewerError, match=r"no case\.json in this folder"):
        open_case(tmp_path)


def test_a_case_whose_scan_has_gone_says_so(tmp_path, displayed):
    case = write_case(tmp_path)
    (tmp_path / "scan.nii.gz").unlink()
    with pytest.raises(ViewerError, match="is not there any more"):
        open_case(case)


@pytest.mark.parametrize("changes", [{"maps": [{"file": "lrp.nii.gz"}]}, {"scan": {}}, {"maps": 3}])
def test_a_case_file_that_volsal_did_not_write_is_refused_in_one_line(tmp_path, displayed, changes):
    with pytest.raises(ViewerError, match="not as volsal writes it") as caught:
        open_case(write_case(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_case_file_that_is_no_json_is_refused(tmp_path, displayed):
    case = write_case(tmp_path)
    (case / "case.json").write_text("{")
    with pytest.raises(ViewerError, match="cannot be read as JSON"):
        open_case(case)


def test_a_missing_scan_file_is_a_scan_error(tmp_path, displayed):
    with pytest.raises(ScanError, match="no such file"):
        open_case(tmp_path / "nothing.nii")
