import numpy as np
import pytest
import yaml
from made_runs import grid_of, write_scan
from napari.layers import Layer

from volsal.demo.net import PREPROCESS
from volsal.plugin.explain_panel import ExplainPanel
from volsal.plugin.files import read
from volsal.plugin.map_look import MapLook
from volsal.scans import Scan, read_scan
from volsal.viewer.layers import as_stored
from volsal.viewer.opening import Opened, ShownMap

pytestmark = pytest.mark.filterwarnings("ignore")  # napari's own deprecations, and those of the libraries under it


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "model.yaml"
    model = {"factory": "volsal.demo.net:load", "classes": ["no lesion", "lesion"]}
    methods = ["grad-cam", {"occlusion": {"box_mm": 12, "stride_mm": 6}}]
    path.write_text(yaml.safe_dump({"model": model, "preprocess": PREPROCESS, "methods": methods}))
    return path


@pytest.fixture
def panel(viewer, qtbot):
    made = ExplainPanel(viewer)
    viewer.window.add_dock_widget(made, name="Explain")
    return made


@pytest.fixture
def loaded(panel, config, qtbot, tmp_path, viewer):
    """The panel with the model and a scan."""
    for layer in read(str(write_scan(tmp_path / "scan.nii.gz", grid_of("PSR", 9.0, (40, 48, 20))))):
        viewer.add_layer(Layer.create(*layer))
    panel.config.setText(str(config))
    panel.config.editingFinished.emit()
    idle(panel, qtbot)
    return panel


def idle(panel, qtbot):
    qtbot.waitUntil(lambda: panel.job is None, timeout=240000)


def test_a_scan_is_explained_by_the_method_target_and_layers_that_were_chosen(loaded, qtbot, viewer, config, tmp_path):
    from volsal import Explainer
    from volsal.config import load_config

    assert [loaded.method.itemText(n) for n in range(2)] == ["grad-cam", "occlusion"]
    assert loaded.scan.currentText() == "scan.nii.gz"
    loaded.find_layers.click()
    idle(loaded, qtbot)
    for name in ("block2", "block3"):
        (item,) = [loaded.layers.item(n) for n in range(loaded.layers.count()) if loaded.layers.item(n).text() == name]
        item.setSelected(True)
    loaded.method.setCurrentText("layer-cam")
    loaded.target.setCurrentText("no lesion")
    loaded.explain.click()
    assert loaded.cancel.isEnabled()
    assert not loaded.explain.isEnabled()
    idle(loaded, qtbot)
    assert "logits" in loaded.message.text()
    maps = {layer.name: layer for layer in viewer.layers if layer.metadata["kind"] == "map"}
    assert set(maps) == {"layer-cam-block2 class-0", "layer-cam-block3 class-0"}
    once = Explainer.from_config(load_config(config), ["layer-cam"], ["class-0"])(tmp_path / "scan.nii.gz")
    grid = read_scan(tmp_path / "scan.nii.gz").grid
    shown = as_stored(maps["layer-cam-block3 class-0"].data, grid)
    np.testing.assert_array_equal(shown, once.map("layer-cam").values)
    assert maps["layer-cam-block3 class-0"].metadata["unit"] in loaded.look.name.text()
    loaded.save_to(tmp_path / "out")
    assert (tmp_path / "out" / "scan" / "case.json").is_file()


def test_the_map_lies_over_its_own_scan_and_no_other(loaded, qtbot, viewer, tmp_path):
    own = viewer.layers[0]
    for layer in read(str(write_scan(tmp_path / "other.nii.gz", grid_of("PSR", 30.0, (40, 48, 20))))):
        viewer.add_layer(Layer.create(*layer))
    loaded.scan.setCurrentIndex(loaded.scan.findText("scan.nii.gz"))
    loaded.explain.click()
    idle(loaded, qtbot)
    seen = [layer for layer in viewer.layers if layer.visible]
    assert [layer.metadata["kind"] for layer in seen] == ["scan", "map"]
    assert seen[0] is own


def test_a_long_method_shows_progress_and_can_be_cancelled(loaded, qtbot, viewer):
    loaded.method.setCurrentText("occlusion")
    loaded.explain.click()
    qtbot.waitUntil(lambda: loaded.bar.maximum() > 1 and loaded.bar.value() > 0, timeout=240000)
    assert " of " in loaded.message.text()
    loaded.cancel.click()
    idle(loaded, qtbot)
    assert loaded.message.text() == "cancelled"
    assert [layer.name for layer in viewer.layers] == ["scan.nii.gz"]
    loaded.method.setCurrentText("grad-cam")  # the model is as it was
    loaded.explain.click()
    idle(loaded, qtbot)
    assert [layer.name for layer in viewer.layers] == ["scan.nii.gz", "grad-cam predicted-class"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda panel: panel.target.setCurrentText("tumor"), "unknown target 'tumor'"),
        (lambda panel: panel.use_files([panel.desk.config.path]), "not a NIfTI file"),
    ],
)
def test_what_goes_wrong_is_told_in_one_line(loaded, qtbot, viewer, change, says):
    change(loaded)
    loaded.explain.click()
    idle(loaded, qtbot)
    assert says in loaded.message.text()
    assert "\n" not in loaded.message.text()
    assert loaded.explain.isEnabled()
    assert len(viewer.layers) == 1


def test_what_nobody_thought_of_is_told_in_one_line_too_and_logged(loaded, qtbot, monkeypatch, caplog):
    monkeypatch.setattr("volsal.plugin.explanations.parse_target", lambda *_: 1 / 0)
    loaded.explain.click()
    idle(loaded, qtbot)
    assert loaded.message.text() == "unexpected ZeroDivisionError: division by zero (see the log)"
    assert "parse_target" in caplog.text


def test_a_config_that_is_none_is_told_and_nothing_can_be_asked(panel, qtbot, tmp_path):
    panel.config.setText(str(tmp_path / "none.yaml"))
    panel.config.editingFinished.emit()
    idle(panel, qtbot)
    assert "no such config file" in panel.message.text()
    assert not panel.explain.isEnabled()


def test_without_a_scan_it_says_so(panel, qtbot, config):
    panel.config.setText(str(config))
    panel.load()
    idle(panel, qtbot)
    panel.explain.click()
    assert "no scan" in panel.message.text()


# ---- threshold and opacity, by the pixels


@pytest.fixture
def ramp(viewer, qtbot):
    """A function that shows a black scan under a map that rises from left to right of the patient."""

    def show(low, high, signed):
        grid = grid_of("RAS", shape=(40, 30, 8), spacing=(2.0, 2.0, 2.0))
        values = np.broadcast_to(np.linspace(low, high, 40, dtype=np.float32)[:, None, None], grid.shape)
        opened = Opened(
            Scan(np.zeros(grid.shape, np.float32), grid), maps=(ShownMap("m", values, (low, high), "u", signed),)
        )
        for layer in opened.layers():
            viewer.add_layer(Layer.create(*layer))
        look = MapLook(viewer)
        viewer.window.add_dock_widget(look, name="look")
        viewer.scene.camera.orientation = ("towards", "up", "right")
        qtbot.wait(200)
        viewer.reset_view()
        return look, values[:, 0, 0]

    return show


def coloured(viewer, qtbot, count):
    """Of each of the map's columns, from left to right, how bright its middle is."""
    qtbot.wait(100)
    pixels = viewer.screenshot(flash=False)[..., :3].max(axis=-1).astype(int)
    zoom = viewer.scene.camera.zoom
    middle = (pixels.shape[1] - 1) / 2
    columns = np.round(middle + (np.arange(count) - (count - 1) / 2) * 2.0 * zoom).astype(int)
    return pixels[pixels.shape[0] // 3, columns]  # clear of the letters


def test_the_threshold_hides_what_is_below_and_nothing_else(viewer, qtbot, ramp):
    look, values = ramp(0.0, 4.0, False)
    faint = coloured(viewer, qtbot, 40)
    assert (faint[12:] > 30).all()
    look.threshold.setValue(600)
    assert "values below 2.4 are clear" in look.value.text()
    seen = coloured(viewer, qtbot, 40)
    np.testing.assert_array_equal(seen > 30, values >= 2.4)
    np.testing.assert_allclose(seen[values >= 2.4], faint[values >= 2.4], atol=3)
    look.opacity.setValue(500)
    np.testing.assert_allclose(coloured(viewer, qtbot, 40)[30:], seen[30:] / 2, atol=4)
    viewer.layers["m"].contrast_limits = (0.0, 2.0)  # the threshold goes with the window
    np.testing.assert_array_equal(coloured(viewer, qtbot, 40) > 20, values >= 1.2)


def test_of_a_signed_map_small_magnitudes_are_hidden_on_both_sides(viewer, qtbot, ramp):
    look, values = ramp(-4.0, 4.0, True)
    look.threshold.setValue(500)
    assert "magnitudes below 2 are clear" in look.value.text()
    np.testing.assert_array_equal(coloured(viewer, qtbot, 40) > 30, np.abs(values) >= 2)


def test_at_either_end_of_the_slider_all_or_the_maximum_is_left(viewer, qtbot, ramp):
    look, _ = ramp(0.0, 4.0, False)
    look.threshold.setValue(1000)
    assert (coloured(viewer, qtbot, 40)[:-1] <= 30).all()
    look.threshold.setValue(0)
    assert look.value.text() == "nothing is hidden"
    viewer.layers.remove("m")
    assert not look.isEnabled()
