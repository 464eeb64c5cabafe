"""What a result holds besides its maps: parts, names, facts; and targets that need the scan."""

import gzip
import json
from dataclasses import dataclass
from typing import ClassVar

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from volsal import Explainer, GradCAM, HiResCAM, InputGradient, read_scan
from volsal.attribution import Attribution, Method, TargetError
from volsal.attribution.settings import SettingError
from volsal.batch import Run
from volsal.config import load_config
from volsal.explanation import CASE_FILE, files_of
from volsal.resampling import resample
from volsal.scans.find import look
from volsal.scans.scan import ScanError
from volsal.scans.write import refuse_own_map, write_parts
from volsal.viewer.show import ViewerError


class Sequences(nn.Module):
    """score = mean of 1 x_0^2 / 2 - 3 x_1 + 2 x_2: three channels, three gradients."""

    def forward(self, x):
        return (x[:, :1] ** 2 / 2 - 3 * x[:, 1:2] + 2 * x[:, 2:3]).mean((2, 3, 4))


@pytest.fixture
def channels(scan_file):
    names = ("sub-01_t1", "sub-01_t2", "sub-01_flair")
    return [scan_file(f"{name}.nii.gz") for name in names]


def test_each_channels_share_of_a_gradient_is_saved_where_the_scan_lies(channels, tmp_path):
    explanation = Explainer(Sequences(), None, "input-gradient", "regression", per_channel=True)(channels)
    (heatmap,) = explanation.maps
    assert heatmap.parts.names == ("t1", "t2", "flair")
    scan = explanation.scan
    size = scan.array.size
    expected = [scan.array / size, np.full(scan.array.shape, -3 / size), np.full(scan.array.shape, 2 / size)]
    for part, values in zip(heatmap.parts, expected, strict=True):
        np.testing.assert_allclose(part, values, rtol=1e-4)
    np.testing.assert_allclose(sum(heatmap.parts), heatmap.values, rtol=1e-4, atol=1e-7)

    home = explanation.save(tmp_path / "out")
    record = json.loads((home / CASE_FILE).read_text())["maps"][0]["parts"]
    assert record["file"] == "sub-01_t1_input-gradient_regression_parts.nii.gz"
    assert "picture" not in record
    positive = scan.array.clip(0).sum() / size
    assert record["shares"] == pytest.approx([positive / (positive + 2), 0, 2 / (positive + 2)], abs=1e-5)
    image, source = nib.load(home / record["file"]), nib.load(channels[0])
    assert image.shape == (*source.shape, 3)
    np.testing.assert_array_equal(image.affine, source.affine)
    np.testing.assert_allclose(np.asanyarray(image.dataobj), np.stack(expected, -1), rtol=1e-4)


def test_a_file_of_parts_is_no_scan(channels, tmp_path):
    home = Explainer(Sequences(), None, "input-gradient", "regression", per_channel=True)(channels).save(tmp_path / "o")
    path = home / "sub-01_t1_input-gradient_regression_parts.nii.gz"
    assert not look(tmp_path / "o").scans
    with pytest.raises(ScanError, match="a map that volsal wrote"):
        refuse_own_map(read_scan(path, 1))
    from volsal.viewer.show import open_case

    with pytest.raises((ViewerError, ScanError)):
        open_case(path, block=False)


def test_channels_are_called_by_the_config_by_their_files_or_by_number(channels, scan_file):
    def names(**settings):
        explainer = Explainer(Sequences(), None, "input-gradient", "regression", per_channel=True, **settings)
        return explainer(settings.pop("of", channels)).maps[0].parts.names

    assert names(channels=["a", "b", "c"]) == ("a", "b", "c")
    assert names(channels=["a", "b"]) == ("t1", "t2", "flair")
    alike = [scan_file(f"{folder}/t1.nii.gz") for folder in "abc"]
    explainer = Explainer(Sequences(), None, "input-gradient", "regression", per_channel=True)
    assert explainer(alike).maps[0].parts.names == ("channel 0", "channel 1", "channel 2")
    assert Explainer(Sequences(), None, "input-gradient", "regression")(channels).maps[0].parts is None


class Featured(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.features = nn.Sequential(nn.Conv3d(1, 5, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2))
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.features(x / 400).mean((2, 3, 4)))


def test_a_cams_feature_maps_are_carried_from_the_layers_cells_and_shown_in_turn(scan_file, tmp_path):
    explainer = Explainer(Featured(), None, HiResCAM("features", features="all"), 1, alignment="half-pixel")
    explanation = explainer(scan_file())
    (heatmap,) = explanation.maps
    assert len(heatmap.parts) == 5
    grid = explanation.scan.grid
    for part, raw in zip(heatmap.parts, heatmap.parts.raw, strict=True):
        np.testing.assert_allclose(part, resample(raw, grid.coarse(raw.shape), grid), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(sum(heatmap.parts), heatmap.values, rtol=1e-3, atol=1e-6)
    home = explanation.save(tmp_path / "out")
    record = json.loads((home / CASE_FILE).read_text())
    parts = record["maps"][0]["parts"]
    assert parts["names"] == list(heatmap.parts.names)
    with Image.open(home / parts["picture"]) as picture:
        assert picture.n_frames == 5
    assert set(files_of(record)) == {path.name for path in home.iterdir()} - {CASE_FILE}
    assert sum(parts["shares"]) == pytest.approx(1, abs=1e-5)


def test_saving_again_leaves_no_parts_behind(scan_file, tmp_path):
    path = scan_file()
    Explainer(Featured(), None, GradCAM("features", features=2), 1)(path).save(tmp_path)
    home = Explainer(Featured(), None, GradCAM("features"), 1)(path).save(tmp_path)
    assert sorted(p.name for p in home.iterdir()) == ["case.json", "scan_grad-cam_class-1.nii.gz"]


def test_parts_are_written_as_nibabel_would(tmp_path, oblique):
    from volsal.scans import Scan
    from volsal.scans.write import map_header

    scan = Scan(np.zeros(oblique.shape, np.float32), oblique)
    parts = np.random.default_rng(0).normal(size=(3, *oblique.shape)).astype(np.float32)
    header = map_header(scan, "x", "volsal x", (0.0, 1.0))
    write_parts(tmp_path / "p.nii.gz", iter(parts), 3, header)
    image = nib.load(tmp_path / "p.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), parts.transpose(1, 2, 3, 0))
    np.testing.assert_allclose(image.affine, oblique.affine, atol=1e-5)
    nib.save(nib.Nifti1Image(parts.transpose(1, 2, 3, 0), None, image.header), tmp_path / "same.nii.gz")
    same, ours = (gzip.decompress((tmp_path / name).read_bytes()) for name in ("same.nii.gz", "p.nii.gz"))
    assert same == ours


def test_two_configurations_of_one_method_have_files_of_their_own(scan_file, tmp_path):
    explainer = Explainer(Featured(), None, [GradCAM("features.1"), GradCAM("features")], 1)
    explanation = explainer(scan_file())
    home = explanation.save(tmp_path)
    assert sorted(path.name for path in home.iterdir()) == [
        "case.json", "scan_grad-cam-features.1_class-1.nii.gz", "scan_grad-cam-features_class-1.nii.gz",
    ]  # fmt: skip
    assert explanation.map("grad-cam-features").layer == "features"
    with pytest.raises(KeyError, match="2 maps are grad-cam/"):
        explanation.map("grad-cam")
    own = Explainer(Featured(), None, {"shallow": GradCAM("features.1"), "deep": "grad-cam"}, 1)(scan_file())
    assert [heatmap.name for heatmap in own.maps] == ["shallow class-1", "deep class-1"]
    assert own.map("deep").method == "grad-cam"
    with pytest.raises(SettingError, match="each once"):
        Explainer(Featured(), None, ["grad-cam", GradCAM()])


def test_two_functions_as_targets_have_files_of_their_own(scan_file):
    explainer = Explainer(Featured(), None, "grad-cam", [lambda z: z[:, 0], lambda z: z[:, 1]])
    assert [heatmap.target for heatmap in explainer(scan_file()).maps] == ["lambda", "lambda-2"]


def test_what_a_method_says_goes_into_the_record(scan_file, tmp_path):
    @dataclass(frozen=True, eq=False)
    class Telling(Method):
        baseline: object = None
        id: ClassVar[str] = "telling"
        unit: ClassVar[str] = "logit"
        signed: ClassVar[bool] = True

        def run(self, model, volume, targets, context):
            context.progress("telling", 1, 1)
            facts = [{"delta": 0.5, "gap": float("nan"), "case": context.case} for _ in targets]
            answer = InputGradient().run(model, volume, targets, context)
            return Attribution(answer.maps, answer.scores, answer.output, facts=facts, notes=["steps were raised"])

    steps = []
    explainer = Explainer(
        Featured(), None, Telling(baseline=np.zeros(3)), [0, 1], progress=lambda *step: steps.append(step)
    )
    explanation = explainer(scan_file())
    assert steps == [("telling", 1, 1)]
    assert explanation.notes == ("telling: steps were raised",)
    record = json.loads((explanation.save(tmp_path) / CASE_FILE).read_text())
    for entry, logit in zip(record["maps"], explanation.prediction.logits, strict=True):
        assert entry["facts"] == {"delta": 0.5, "gap": "nan", "case": "scan"}
        assert entry["score"] == pytest.approx(logit)
        assert entry["settings"]["baseline"]["shape"] == [3]
        assert entry["name"] == "telling"


class Lesions(nn.Module):
    """Logits of background 0 and of lesion x - 300."""

    def __init__(self):
        super().__init__()
        self.net = nn.Conv3d(1, 2, 1)
        self.net.weight.data = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1)
        self.net.bias.data = torch.tensor([0.0, -300.0])

    def forward(self, x):
        return {"seg": (self.net(x),)}


def test_a_segmentation_is_explained_by_mask_file_place_and_component(scan_file, tmp_path):
    path = scan_file()
    scan = read_scan(path)
    labels = np.zeros(scan.grid.shape, np.int16)
    labels[3:6, 4, 5:7] = 2
    labels[10, 10, 10] = 1
    flipped = nib.Nifti1Image(labels[::-1].copy(), scan.grid.affine @ np.array(
        [[-1, 0, 0, 23], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    ))  # fmt: skip
    (tmp_path / "masks").mkdir()
    nib.save(flipped, tmp_path / "masks" / "scan_mask.nii.gz")
    at = (12, 13, 9)
    mm = ",".join(f"{x:.3f}" for x in scan.grid.world(at))
    texts = ["segment-1", "segment-1-largest", f"segment-1-mm-{mm}", "segment-1-in:masks/{case}_mask.nii.gz#2"]
    explainer = Explainer(
        Lesions(), None, "input-gradient", [f"seg.0/{text}" for text in texts], folder=tmp_path, alignment="half-pixel"
    )
    explanation = explainer(path)
    lesion = scan.array > 300
    alone = np.zeros_like(lesion)
    alone[at] = True
    for heatmap, mask in zip(explanation.maps, [lesion, lesion, alone, labels == 2], strict=True):
        np.testing.assert_array_equal(heatmap.values, mask.astype(np.float32))
        assert heatmap.facts == {"voxels": int(mask.sum())}
        assert heatmap.score == pytest.approx(float((scan.array - 300)[mask].sum()), rel=1e-5)
    home = explanation.save(tmp_path / "out")
    assert len({entry["file"] for entry in json.loads((home / CASE_FILE).read_text())["maps"]}) == 4
    assert explainer.files_for("scan") == [tmp_path / "masks" / "scan_mask.nii.gz"]
    with pytest.raises(TargetError, match="outside what the model sees"):
        Explainer(Lesions(), None, "input-gradient", "seg.0/segment-1-mm-900,0,0")(path)
    with pytest.raises(ScanError, match="no such file"):
        Explainer(Lesions(), None, "input-gradient", "seg.0/segment-1-in:nothing.nii", folder=tmp_path)(path)


def test_the_prediction_is_that_of_the_part_which_the_targets_look_at(scan_file):
    class Heads(Featured):
        def forward(self, x):
            return {"logits": super().forward(x), "age": torch.ones(1, 1)}

    assert Explainer(Heads(), None, "input-gradient", "logits/class-1")(scan_file()).prediction.index in (0, 1)
    both = Explainer(Heads(), None, "input-gradient", ["logits/class-1", "age/regression"])
    with pytest.raises(Exception, match="no gradient reaches the input"):
        both(scan_file())


def test_a_reference_scan_is_preprocessed_as_the_scan_is(scan_file, tmp_path):
    class Embedding(Featured):
        def forward(self, x):
            return self.features(x / 400).mean((2, 3, 4))

    reference = scan_file("reference.nii.gz", array=np.random.default_rng(0).uniform(0, 400, (24, 28, 20)))
    explainer = Explainer(Embedding(), None, "input-gradient", "similar:reference.nii.gz", folder=reference.parent)
    (heatmap,) = explainer(scan_file()).maps
    one, other = (Embedding()(torch.from_numpy(read_scan(p).array)[None, None])[0] for p in (reference, scan_file()))
    assert heatmap.score == pytest.approx(torch.cosine_similarity(one, other, 0).item(), rel=1e-4)
    assert heatmap.target == "similar-reference"


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv3d(1, 2, 1)
        self.net.weight.data = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1)
        self.net.bias.data = torch.tensor([0.0, -300.0])

    def forward(self, x):
        return self.net(x)
"""


def test_a_run_makes_a_case_anew_when_its_mask_has_changed(scan_file, tmp_path):
    path = scan_file("scans/p1.nii.gz")
    scan = nib.load(path)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "config.yaml").write_text(
        "model: {factory: net.py:Net}\nmethods: [input-gradient]\n"
        'targets: ["segment-1-in:{case}_mask.nii"]\nscans: {folder: scans}\noutput: out\n'
    )

    def run(voxel):
        labels = np.zeros(scan.shape, np.int16)
        labels[voxel] = 1
        nib.save(nib.Nifti1Image(labels, scan.affine), tmp_path / "p1_mask.nii")
        work = Run(load_config(tmp_path / "config.yaml"))
        (outcome,) = work.execute()
        assert outcome.error is None
        name = work.folder.record("p1")["maps"][0]["file"]
        return outcome.status, np.argwhere(np.asanyarray(nib.load(tmp_path / "out" / "p1" / name).dataobj)).tolist()

    assert run((3, 4, 5)) == ("done", [[3, 4, 5]])
    assert run((3, 4, 5)) == ("kept", [[3, 4, 5]])
    assert run((6, 7, 8)) == ("done", [[6, 7, 8]])


def test_a_segmentation_that_gives_probabilities_is_remarked_on(scan_file):
    class Sigmoid(Lesions):
        def forward(self, x):
            return (super().forward(x)["seg"][0] / 100).sigmoid()

    explanation = Explainer(Sigmoid(), None, "input-gradient", "segment-1")(scan_file())
    assert "between 0 and 1 everywhere: probabilities" in explanation.notes[0]
    assert Explainer(Lesions(), None, "input-gradient", "seg.0/segment-1")(scan_file()).notes == ()
