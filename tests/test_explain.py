import json

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

import volsal
from volsal import ClassLogit, Explainer, GradCAM, Heatmap, HiResCAM, read_scan
from volsal.attribution import LayerError, ModelError, TargetError
from volsal.attribution.settings import SettingError
from volsal.choices import UnknownMethodError
from volsal.explanation import CASE_FILE
from volsal.grid import Grid
from volsal.resampling import resample
from volsal.scans.write import WriteError


class BlobNet(nn.Module):
    """Class 1 grows with what lies above 380; its feature map is that, averaged over cells of 2 x 2 x 2 voxels."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Conv3d(1, 1, 1)
        self.gate.weight.data.fill_(1 / 100)
        self.gate.bias.data.fill_(-3.8)
        self.features = nn.Sequential(nn.ReLU(), nn.AvgPool3d(2))
        self.head = nn.Linear(1, 2)
        self.head.weight.data = torch.tensor([[0.0], [40.0]])
        self.head.bias.data.zero_()

    def forward(self, x):
        return self.head(self.features(self.gate(x)).mean((2, 3, 4)))


@pytest.fixture
def model():
    return BlobNet()


def peak(scan):
    return scan.grid.world(np.unravel_index(scan.array.argmax(), scan.array.shape))


def test_the_map_lies_on_the_scan_and_its_peak_on_the_blob(scan_file, model):
    explanation = Explainer(model, None, ["grad-cam", "input-gradient"], ["class-1"])(scan_file())
    scan = explanation.scan
    for heatmap in explanation.maps:
        assert heatmap.values.shape == scan.grid.shape
        assert heatmap.values.dtype == np.float32
        assert heatmap.status == "ok"
    assert np.linalg.norm(np.array(explanation.map("grad-cam").peak_mm) - peak(scan)) <= np.linalg.norm(
        scan.grid.spacing
    )
    assert explanation.prediction.index == 1
    assert explanation.map("grad-cam").layer == "features"


def test_the_values_are_raw_and_those_of_the_method(scan_file, model):
    scan = read_scan(scan_file())
    heatmap = Explainer(model, None, GradCAM("features"), ClassLogit(1), alignment="half-pixel")(scan).maps[0]
    raw = GradCAM("features")(model, torch.from_numpy(scan.array)[None, None], ClassLogit(1))[0, 0]
    np.testing.assert_array_equal(heatmap.raw, raw.numpy())
    np.testing.assert_allclose(heatmap.values, resample(raw, scan.grid.coarse(raw.shape), scan.grid), rtol=1e-6)


@pytest.mark.parametrize(("alignment", "least"), [("half-pixel", 0.98), ("measured", 0.95)])
def test_the_same_anatomy_gets_the_same_map_whatever_its_storage_order(scan_file, model, alignment, least):
    path = scan_file()
    image = nib.load(path)
    turned = nib.as_closest_canonical(image)
    nib.save(turned, path.with_name("turned.nii.gz"))
    transforms = pytest.importorskip("monai.transforms")
    steps = [transforms.Spacing((2.0, 2.0, 2.0)), transforms.SpatialPad((40, 30, 36))]
    explainer = Explainer(model, steps, "grad-cam", 1, alignment=alignment)
    one, other = explainer(path), explainer(path.with_name("turned.nii.gz"))
    carried = resample(one.maps[0].values, one.scan.grid, other.scan.grid)
    # Cells are anchored at opposite corners, so the maps agree to within what half a cell changes.
    assert np.corrcoef(carried.ravel(), other.maps[0].values.ravel())[0, 1] > least


def test_save_writes_overlays_and_a_record_that_agree(scan_file, model, tmp_path):
    explanation = Explainer(model, None, ["grad-cam", "hires-cam"], ["predicted-class", 0], ["healthy", "lesion"])(
        scan_file("Sub 01.nii.gz")
    )
    home = explanation.save(tmp_path / "out")
    assert home == tmp_path / "out" / "sub-01"
    record = json.loads((home / CASE_FILE).read_text())
    assert {p.name for p in home.iterdir()} == {CASE_FILE, *(entry["file"] for entry in record["maps"])}
    assert record["prediction"]["class_name"] == "lesion"
    assert record["maps"][0]["file"] == "sub-01_grad-cam_predicted-class.nii.gz"
    for entry, heatmap in zip(record["maps"], explanation.maps, strict=True):
        image = nib.load(home / entry["file"])
        np.testing.assert_array_equal(np.asanyarray(image.dataobj), heatmap.values)
        np.testing.assert_array_equal(image.affine, nib.load(explanation.scan.path).affine)
        assert float(image.header["cal_max"]) == pytest.approx(entry["window"][1])
        assert entry["unit"] == "logit per layer cell"
    assert record["provenance"]["model"]["weights_sha256"] == volsal.models.weights_digest(model)
    assert record["provenance"]["versions"]["torch"] == torch.__version__


def test_saving_again_leaves_no_map_of_the_earlier_result(scan_file, model, tmp_path):
    path = scan_file()
    Explainer(model, None, ["grad-cam", "hires-cam"])(path).save(tmp_path)
    home = Explainer(model, None, "grad-cam", 1)(path).save(tmp_path)
    assert sorted(p.name for p in home.iterdir()) == ["case.json", "scan_grad-cam_class-1.nii.gz"]


def test_a_write_that_fails_leaves_no_record(scan_file, model, tmp_path, monkeypatch):
    explanation = Explainer(model, None, ["grad-cam", "hires-cam"])(scan_file())
    explanation.save(tmp_path / "out")
    calls = []

    def fail(path, *rest):
        calls.append(path)
        raise WriteError("no space left")

    monkeypatch.setattr("volsal.explanation.write_map", fail)
    with pytest.raises(WriteError):
        explanation.save(tmp_path / "out")
    assert calls
    assert not (tmp_path / "out" / "scan" / CASE_FILE).exists()


def test_no_positive_evidence_is_empty_and_looks_it(scan_file, model, tmp_path):
    model.head.weight.data[1] = -40.0
    explanation = Explainer(model, None, ["grad-cam", "hires-cam"], 1)(scan_file())
    for heatmap in explanation.maps:
        assert heatmap.status == "empty"
        assert heatmap.peak_mm is None
        assert heatmap.window[0] == 0
        assert heatmap.window[1] > 0
        assert heatmap.values.max() <= heatmap.window[0]
    assert explanation.map("hires-cam").values.min() < 0  # stored raw
    explanation.save(tmp_path)


def test_one_value_everywhere_has_no_peak(scan_file):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 1, 1)
            self.conv.weight.data.fill_(0.0)
            self.conv.bias.data.fill_(1.0)

        def forward(self, x):
            return self.conv(x).sum((2, 3, 4)).repeat(1, 2)

    heatmap = Explainer(Flat(), None, "grad-cam", 1)(scan_file()).maps[0]
    assert (heatmap.status, heatmap.peak_mm) == ("constant", None)


def heatmap_of(values, layer=None):
    grid = Grid(values.shape, np.diag([2.0, 3.0, 4.0, 1.0]))
    return Heatmap("m", "t", "t", layer, "u", True, values, values, grid, grid)


def test_a_plateaus_peak_is_its_middle_and_of_two_the_wider_counts():
    values = np.zeros((9, 8, 7), np.float32)
    values[2:5, 3, 1:3] = 5.0
    values[7, 7, 6] = 5.0
    expected = (3 * 2.0, 3 * 3.0, 1.5 * 4.0)
    assert heatmap_of(values).peak_mm == pytest.approx(expected)
    flipped = heatmap_of(values[::-1].copy())
    assert flipped.peak_mm == pytest.approx((5 * 2.0, *expected[1:]))  # 8 - 3


def test_a_plateau_that_is_almost_as_high_is_not_the_peak():
    values = np.zeros((9, 8, 7), np.float32)
    values[2:5, 3, 1:3] = 4.999
    values[7, 7, 6] = 5.0
    assert heatmap_of(values).peak_mm == (14.0, 21.0, 24.0)


def test_the_display_range_ends_at_the_maximum_of_a_layers_map_and_below_a_gradients_outliers():
    values = np.random.default_rng(0).uniform(-1, 1, (20, 20, 20)).astype(np.float32)
    values[1, 2, 3] = 50
    assert heatmap_of(values).window == (0.0, pytest.approx(float(np.percentile(values[values > 0], 99.9))))
    assert heatmap_of(values, layer="conv").window == (0.0, 50.0)


def test_a_single_largest_voxel_is_the_peak():
    values = np.random.default_rng(0).uniform(0, 1, (5, 6, 7)).astype(np.float32)
    values[1, 2, 3] = 2
    assert heatmap_of(values).peak_mm == (2.0, 6.0, 12.0)


def test_outside_the_models_field_of_view_the_map_is_zero(scan_file, model):
    transforms = pytest.importorskip("monai.transforms")
    crop = transforms.SpatialCrop(roi_start=(2, 2, 2), roi_end=(22, 24, 18))
    values = Explainer(model, [crop], HiResCAM("gate"), 0)(scan_file()).maps[0].values
    model.head.weight.data[0] = 1.0
    values = Explainer(model, [crop], HiResCAM("gate"), 0)(scan_file()).maps[0].values
    assert (values[2:22, 2:24, 2:18] != 0).any()
    outside = np.ones(values.shape, bool)
    outside[2:22, 2:24, 2:18] = False
    assert (values[outside] == 0).all()


def test_channels_of_the_input_are_summed_on_the_way_home(scan_file):
    class Two(nn.Module):
        def forward(self, x):
            return torch.relu(x).mean((2, 3, 4)).sum(1, keepdim=True) * torch.tensor([[1.0, 3.0]])

    scan = read_scan(scan_file())
    both = np.stack([scan.array, scan.array])
    explainer = Explainer(Two(), lambda path: (both, scan.grid.affine), "input-gradient", 1)
    values = explainer(scan.path).maps[0].values
    np.testing.assert_allclose(values, np.full(values.shape, 2 * 3 / values.size), rtol=1e-5)


def test_a_model_that_gives_probabilities_is_remarked_on(scan_file, model):
    class Softmax(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x).softmax(1)

    assert "explain the logits" in Explainer(Softmax(model), None, "grad-cam")(scan_file()).notes[0]
    assert Explainer(model, None, "grad-cam")(scan_file()).notes == ()


def test_a_model_that_answers_differently_each_time_is_refused(scan_file):
    class Noisy(BlobNet):
        def forward(self, x):
            return super().forward(x) + self.calls()

        def calls(self, count=[0]):  # noqa: B006 - the point is that it remembers
            count[0] += 1
            return count[0]

    with pytest.raises(ModelError, match="not deterministic: the same input scored"):
        Explainer(Noisy(), None, ["grad-cam", "input-gradient"], 1)(scan_file())


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"methods": "grad-camm"}, UnknownMethodError, "unknown method 'grad-camm'; did you mean 'grad-cam'"),
        ({"methods": []}, ValueError, "methods must be given"),
        ({"methods": ["grad-cam", "grad-cam"]}, ValueError, "each once"),
        ({"targets": "clas-1"}, TargetError, "did you mean 'class-0'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_any_scan(model, settings, error, says):
    with pytest.raises(error, match=says):
        Explainer(model, None, **settings)


def test_dropout_that_evaluation_mode_leaves_on_is_refused(scan_file):
    class Dropping(BlobNet):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5))

    with pytest.raises(ModelError, match="not deterministic"):
        Explainer(Dropping(), None, "grad-cam", 1)(scan_file())


def test_the_result_of_another_scan_is_not_overwritten(scan_file, model, tmp_path):
    explainer = Explainer(model, None, "grad-cam", 1)
    explainer(scan_file("s1/t1.nii.gz")).save(tmp_path / "out")
    other = explainer(scan_file("s2/t1.nii.gz", shape=(20, 22, 24)))
    with pytest.raises(WriteError, match="already holds the result of another scan"):
        other.save(tmp_path / "out")
    assert (tmp_path / "out" / "t1" / CASE_FILE).exists()


def test_a_damaged_record_is_replaced(scan_file, model, tmp_path):
    explanation = Explainer(model, None, "grad-cam", 1)(scan_file())
    home = explanation.save(tmp_path)
    (home / CASE_FILE).write_text("{")
    explanation.save(tmp_path)
    assert json.loads((home / CASE_FILE).read_text())["case"] == "scan"


def test_class_names_that_do_not_fit_the_model_are_refused(scan_file, model):
    with pytest.raises(SettingError, match="3 classes are named"):
        Explainer(model, None, "grad-cam", 1, classes=["a", "b", "c"])(scan_file())
    with pytest.raises(SettingError, match="must differ"):
        Explainer(model, None, "grad-cam", 1, classes=["a", "a"])


def test_a_case_id_is_never_a_path(scan_file, model):
    with pytest.raises(SettingError, match="a case id is"):
        Explainer(model, None, "grad-cam", 1)(scan_file(), case="../../x")


def test_the_digest_follows_the_weights(model):
    explainer = Explainer(model, None, "grad-cam")
    before = explainer.weights_sha256
    with torch.no_grad():
        model.head.bias.add_(1)
    assert explainer.weights_sha256 != before


def test_half_precision_autocast_around_it_changes_nothing(scan_file, model):
    path = scan_file()
    expected = Explainer(model, None, "grad-cam", 1)(path).maps[0].values
    with torch.autocast("cpu", dtype=torch.float16):
        np.testing.assert_array_equal(Explainer(model, None, "grad-cam", 1)(path).maps[0].values, expected)


def test_a_layer_or_class_that_is_not_there_is_refused(scan_file, model):
    with pytest.raises(LayerError, match="no layer 'feature'; did you mean 'features'"):
        Explainer(model, None, GradCAM("feature"))(scan_file())
    with pytest.raises(TargetError, match="class 2 asked for, but the model has 2 classes, 0 to 1"):
        Explainer(model, None, "grad-cam", 2)(scan_file())


def test_a_grid_is_part_of_the_public_api():
    assert volsal.Grid is Grid
    assert volsal.resample is resample
    assert "Explainer" in dir(volsal)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = volsal.nothing


def test_once_it_is_ready_a_scan_may_forget_its_voxels(scan_file, model):
    explainer = Explainer(model, None, ["grad-cam", "input-gradient"], ["class-1"])
    ready = explainer.prepare(scan_file())
    forgetful = ready.without_voxels()
    assert forgetful.scan.array.base.nbytes == 4
    assert ready.scan.array.any()
    assert not explainer.draws
    assert Explainer(model, None, GradCAM(features=2)).draws
    for one, other in zip(
        explainer.carry(explainer.answer(ready)).maps, explainer.carry(explainer.answer(forgetful)).maps, strict=True
    ):
        np.testing.assert_array_equal(one.values, other.values)
        assert one.peak_mm == other.peak_mm
