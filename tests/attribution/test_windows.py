"""A model applied by windows is one function of the volume: MONAI's inference, and autograd through it, are oracles."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from nets import CONV, SpelledNet, assert_same_state, state
from torch import nn
from torch.testing import assert_close

from volsal import Explainer
from volsal.attribution import (
    ClassLogit,
    Context,
    GradCAM,
    GradCAMPlusPlus,
    GuidedBackprop,
    GuidedGradCAM,
    HiResCAM,
    InputGradient,
    LayerCAM,
    ModelError,
    PredictedClass,
    Segment,
    TargetError,
    Voxel,
    Windows,
    explain_windows,
)
from volsal.attribution.alignment.alignment import FlipAverage, HalfPixel, Measured, Nominal
from volsal.attribution.gradients.deep_lift import DeepLIFT
from volsal.attribution.gradients.gradient import GradientTimesInput
from volsal.attribution.gradients.guided import Deconvnet
from volsal.attribution.gradients.integrated import IntegratedGradients
from volsal.attribution.gradients.smooth import SmoothGrad
from volsal.attribution.perturbation.occlusion import Occlusion
from volsal.attribution.windows.windowed import Windowed
from volsal.attribution.windows.windows import WindowsError
from volsal.config import ConfigError, load_config


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Windows of a few voxels: several threads would do little but wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def segmenter(axes=3, channels=1, stride=1, kernel=3, seed=0):
    """Logits of 3 classes for every voxel.  Layer "2" has cells ``stride`` voxels apart."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        CONV[axes](channels, 4, kernel, padding=kernel // 2),
        nn.ReLU(inplace=True),
        CONV[axes](4, 5, stride, stride=stride),
        nn.ReLU(),
        nn.Upsample(scale_factor=stride),
        CONV[axes](5, 3, kernel, padding=kernel // 2),
    ).double()
    with torch.no_grad():  # every class is to be predicted somewhere
        net[5].bias -= net(scan(1, channels, *[8] * axes)).flatten(2).mean(2)[0]
    return net


def scan(*shape, seed=3):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def as_monai(net, windows):
    """The same inference by MONAI, as a function of the volume."""

    def run(volume):
        return sliding_window_inference(
            volume, windows.size, windows.batch, net, windows.overlap, windows.importance, windows.sigma,
            padding_mode=windows.padding, cval=windows.fill,
        )  # fmt: skip

    return run


CASES = {
    "gaussian": ((11, 9, 13), Windows((6, 5, 8), 0.5)),
    "constant": ((13, 11, 17), Windows((6, 5, 8), 0.25, "constant", batch=4)),
    "one overlap per axis": ((13, 11, 12), Windows((6, 5, 8), (0.0, 0.7, 0.3), sigma=0.3, batch=3)),
    "padded": ((13, 5, 7), Windows((6, 8, 8), 0.5, fill=0.7)),
    "reflected": ((5, 11, 6), Windows((8, 6, 9), 0.25, padding="reflect", batch=2)),
    "replicated": ((5, 5, 5), Windows((8, 8, 8), padding="replicate")),
    "whole axis": ((13, 6, 5), Windows((6, 6, -1), 0.5)),
    "2D": ((13, 11), Windows((6, 4), 0.5)),
}


@pytest.fixture(params=CASES)
def case(request):
    shape, windows = CASES[request.param]
    return segmenter(len(shape), channels=2), scan(2, 2, *shape), windows


def mean_square(output):
    return output[:, 1].square().flatten(1).mean(1)


def test_the_prediction_is_monais(case):
    net, volume, windows = case
    with torch.no_grad():
        assert_close(Windowed(net, windows)(volume), as_monai(net, windows)(volume), rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", [mean_square, Segment(1)], ids=["nonlinear", "predicted mask"])
def test_the_input_gradient_is_that_of_the_whole_inference(case, target):
    net, volume, windows = case
    leaf = volume.clone().requires_grad_()
    score = target(as_monai(net, windows)(leaf))
    (expected,) = torch.autograd.grad(score.sum(), leaf)
    (answer,) = explain_windows(net, volume, InputGradient(), target, windows)
    assert_close(answer.maps[0], expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert_close(answer.scores[0], score.detach(), rtol=1e-6, atol=1e-6)
    module = InputGradient()(Windowed(net, windows), volume, target)  # the way of all other methods
    assert_close(module, answer.maps[0], rtol=1e-9, atol=1e-12)


class ByMonai(nn.Module):
    def __init__(self, net, windows):
        super().__init__()
        self.net, self.windows = net, windows

    def forward(self, volume):
        return as_monai(self.net, self.windows)(volume)


@pytest.mark.parametrize(
    "method",
    [
        GuidedBackprop(),
        Deconvnet(),
        GradientTimesInput(),
        IntegratedGradients(steps=4, tolerance=None),
        SmoothGrad(samples=3),
        Occlusion(box=(6, 5, 4), stride=(6, 5, 4)),
    ],
    ids=lambda method: method.id,
)
def test_other_methods_on_the_inputs_voxels_are_those_of_the_whole_inference(method):
    net, volume, windows = segmenter(), scan(1, 1, 10, 9, 7), Windows((6, 5, 4), 0.5, batch=2)
    (answer,) = explain_windows(net, volume, method, mean_square, windows)
    assert_close(answer.maps[0], method(ByMonai(net, windows), volume, mean_square), rtol=1e-6, atol=1e-9)


# A network that looks at one voxel, or one cell, at a time is the same by windows and at once.
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("method", [GradCAM("2"), HiResCAM("2"), LayerCAM("2"), GradCAM("0")])
def test_a_class_activation_map_is_that_of_the_volume_at_once(method, overlap):
    net, volume = segmenter(kernel=1), scan(2, 1, 12, 8, 16)
    windows = Windows((4, 4, 8), overlap, batch=3)
    for target in (Segment(1), mean_square):
        (answer,) = explain_windows(net, volume, method, target, windows)
        assert_close(answer.maps[0], method(net, volume, target), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", [GradCAM("2"), HiResCAM("2")])
def test_so_are_its_cells_but_at_the_windows_rims_where_interpolation_ends(method):
    net, volume = segmenter(kernel=1, stride=2), scan(1, 1, 12, 8, 16)
    (answer,) = explain_windows(net, volume, method, Segment(1), Windows((4, 4, 8), 0.0))
    whole = method.attribute(net, volume, [Segment(1)])
    expected = whole.alignments[0].place(whole.maps[0], volume.shape[2:])
    inner = [torch.arange(n) % size % (size - 1) > 0 for n, size in zip(volume.shape[2:], (4, 4, 8), strict=True)]
    inside = inner[0][:, None, None] & inner[1][:, None] & inner[2]
    assert inside.any()
    assert_close(answer.maps[0][0, 0][inside], expected[0, 0][inside], rtol=1e-6, atol=1e-9)
    assert not torch.allclose(answer.maps[0], expected)


def test_windows_share_one_scale():
    # The target lies in the first window alone; what looks like it elsewhere is drawn as strongly there.
    net, volume = segmenter(), scan(1, 1, 6, 6, 6).repeat(1, 1, 1, 1, 3)
    (answer,) = explain_windows(net, volume, GradCAM("2"), Segment(1, Voxel((3, 3, 3))), Windows((6, 6, 6), 0.0))
    first, *others = answer.maps[0].split(6, dim=-1)
    assert first.max() > 0
    for other in others:
        assert_close(other, first)


@pytest.mark.parametrize("kind", ["auto", "nominal", "measured"])
def test_the_map_peaks_where_the_finding_is(kind):
    # One bright voxel, and a layer that sums 2 x 2 x 2 voxels.
    net = segmenter(kernel=1, stride=2)
    for conv in (net[0], net[2], net[5]):
        conv.weight.data.abs_()
        conv.bias.data.zero_()
    volume = torch.zeros(1, 1, 16, 12, 20, dtype=torch.float64)
    volume[0, 0, 11, 4, 13] = 1
    align = {"auto": HalfPixel(), "nominal": Nominal(), "measured": Measured()}[kind]
    (answer,) = explain_windows(net, volume, GradCAM("2"), mean_square, Windows((8, 8, 8), 0.5), Context(align))
    assert answer.layer == "2"
    assert answer.alignments[0].stride == (1, 1, 1)
    assert answer.alignments[0].offset == (0, 0, 0)
    assert answer.facts[0]["cells_in_windows"]["stride"] == [2, 2, 2]
    peak = (answer.maps[0][0, 0] >= 0.99 * answer.maps[0].max()).nonzero().double().mean(0)
    assert float((peak - torch.tensor([11.0, 4, 13])).abs().max()) <= 1


def test_a_classifiers_logits_are_the_mean_over_windows():
    net, volume, windows = SpelledNet(torch.relu), scan(2, 1, 9, 8, 7), Windows((6, 8, 4), 0.5)
    starts = [(i, 0, k) for i in (0, 3) for k in (0, 2, 3)]
    leaf = volume.clone().requires_grad_()
    logits = torch.stack([net(leaf[:, :, i : i + 6, :, k : k + 4]) for i, _, k in starts]).mean(0)
    (expected,) = torch.autograd.grad(logits[:, 1].sum(), leaf)
    gradient, cam = explain_windows(net, volume, [InputGradient(), HiResCAM("third")], ClassLogit(1), windows)
    assert_close(gradient.output, logits.detach())
    assert_close(gradient.maps[0], expected)
    assert_close(cam.scores[0], logits[:, 1].detach())
    assert cam.maps[0].shape == volume.shape
    predicted = explain_windows(net, volume, InputGradient(), PredictedClass(), windows)[0]
    assert_close(predicted.scores[0], logits.amax(1).detach())


METHODS = [InputGradient(), GuidedBackprop(), GradCAM("2"), HiResCAM("2"), GradCAM("0")]


def test_several_methods_and_targets_share_passes_and_change_nothing():
    net, volume, windows = segmenter(), scan(2, 1, 10, 9, 7), Windows((6, 5, 4), 0.5, batch=4)
    runs, told = [], []
    handle = net[0].register_forward_hook(lambda *_: runs.append(1))
    context = Context(progress=lambda *what: told.append(what))
    together = explain_windows(net, volume, METHODS, [mean_square, Segment(2)], windows, context)
    handle.remove()
    count = len(windows.over((10, 9, 7)).starts)
    assert told[-1] == ("windows", 4 * count, 4 * count)
    assert told[0] == ("windows", 4, 4 * count)
    # Inference, a gradient, a guided gradient, two for maps; the finding of an alignment looks once more for each map.
    assert len(runs) == 2 * (5 * -(-count // 4) + 2 * 3)
    for method, ours in zip(METHODS, together, strict=True):
        for number, target in enumerate((mean_square, Segment(2))):
            alone = explain_windows(net, volume[1:], method, target, Windows((6, 5, 4), 0.5))[0]
            assert_close(ours.maps[number][1:], alone.maps[0])
            assert_close(ours.scores[number][1:], alone.scores[0])


class OnlyWindows:
    """An array that is never read beyond a window."""

    def __init__(self, array, size):
        self.array, self.shape, self.size, self.reads = array, array.shape, size, 0

    def __getitem__(self, at):
        part = self.array[at]
        assert all(n <= size for n, size in zip(part.shape[-3:], self.size, strict=True))
        self.reads += 1
        return part


def test_a_volume_on_disk_is_read_by_windows_and_its_maps_are_on_disk(tmp_path):
    net, windows = segmenter(), Windows((6, 5, 8), 0.5)
    array = (100 * scan(9, 8, 12).numpy()).astype(">i2")
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "scan.nii")
    stored = OnlyWindows(nib.load(tmp_path / "scan.nii").dataobj, windows.size)
    targets = [Segment(1), Segment(2, Voxel((3, 4, 5)))]
    whole = [torch.from_numpy(array.astype(float))[None, None], METHODS, targets, windows]
    expected = explain_windows(net, *whole)
    folder = tmp_path / "maps"
    found = explain_windows(net, stored, METHODS, targets, windows, folder=folder)
    assert stored.reads > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours.maps, theirs.maps)
        assert_close(ours.scores, theirs.scores)
        assert_close(ours.output, theirs.output)
    names = {"output", *(f"{m.id}_segment-{t}" for m in METHODS for t in ("1", "2-voxel-3-4-5"))}
    assert {path.stem for path in folder.iterdir()} >= names
    assert not [path for path in folder.iterdir() if path.is_dir()]
    on_disk = np.load(folder / "input-gradient_segment-1.npy", mmap_mode="r")
    assert on_disk.shape == (9, 8, 12, 1)
    assert_close(torch.from_numpy(np.array(on_disk))[..., 0], expected[0].maps[0][0, 0])


def test_channels_and_a_target_that_looks_at_the_whole_output_on_disk(tmp_path):
    net, windows = segmenter(channels=2), Windows((6, 5, 4))
    array = scan(2, 13, 11, 12).numpy()
    np.save(tmp_path / "scan.npy", array)
    source = np.load(tmp_path / "scan.npy", mmap_mode="r")
    (found,) = explain_windows(net, source, InputGradient(), mean_square, windows, folder=tmp_path / "maps")
    (expected,) = explain_windows(net, torch.from_numpy(array)[None], InputGradient(), mean_square, windows)
    assert_close(found.maps[0], expected.maps[0])


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_model_volume_and_folder_as_they_were(tmp_path, fails):
    net, volume = segmenter().train(), scan(1, 1, 10, 9, 7)
    net[0].weight.requires_grad_(False)
    before, kept, random = state(net), volume.clone(), torch.get_rng_state()
    asked = [net, volume, METHODS, Segment(9 if fails else 1), Windows((6, 5, 4)), Context(), tmp_path]
    if fails:
        with pytest.raises(TargetError, match="class 9"):
            explain_windows(*asked)
        assert {path.name for path in tmp_path.iterdir()} == {"output.npy"}
    else:
        explain_windows(*asked)
    assert_same_state(before, state(net))
    assert torch.equal(volume, kept)
    assert torch.equal(random, torch.get_rng_state())


def test_refusals_name_what_was_found_and_what_to_do():
    net, volume, windows = segmenter(), scan(1, 1, 10, 9, 7), Windows((6, 5, 4))
    whole = volume[0, 0].numpy()
    for method, source, words in (
        (GradCAMPlusPlus("2"), volume, "grad-cam-plus-plus cannot be had .* use one of grad-cam, hires-cam"),
        (GradCAM("2", features=2), volume, "grad-cam with features"),
        (DeepLIFT(), volume, "deep-lift cannot be had of a model applied by windows: .* use integrated-gradients"),
        (IntegratedGradients(), whole, "integrated-gradients needs the whole volume in memory; pass it as a tensor"),
        (GuidedGradCAM("2"), whole, "guided-grad-cam puts whole maps together"),
        (InputGradient(), volume[None], "windows .* are for volumes of 3 axes"),
    ):
        with pytest.raises(WindowsError, match=words):
            explain_windows(net, source, method, Segment(1), windows)
    with pytest.raises(WindowsError, match="flip-average alignment explains the mirrored volume too"):
        explain_windows(net, volume, GradCAM("2"), Segment(1), windows, Context(FlipAverage()))
    with pytest.raises(WindowsError, match="this batch holds 2"):
        explain_windows(net, volume.repeat(2, 1, 1, 1, 1), InputGradient(), Segment(1), windows, folder="unused")
    with pytest.raises(ModelError, match=r"for windows \(1, 1, 6, 5, 4\) this model returns .*\(1, 4, 3, 2, 2\)"):
        explain_windows(CONV[3](1, 4, 2, stride=2).double(), volume, InputGradient(), mean_square, windows)
    net[5].bias.data[2] = -1e6
    with pytest.raises(TargetError, match="nothing is predicted as class 2"):
        explain_windows(net, volume, InputGradient(), Segment(2), windows)
    with pytest.raises(ValueError, match="no target given"):
        explain_windows(net, volume, InputGradient(), [], windows)
    for settings in ({"overlap": 1.0}, {"importance": "flat"}, {"batch": 0}, {"overlap": (0.5, 0.5)}, {"padding": "x"}):
        with pytest.raises(WindowsError, match=next(iter(settings))):
            Windows((6, 5, 4), **settings)
    with pytest.raises(WindowsError, match=r"one number per axis, as in \(96, 96, 96\); got 96"):
        Windows(96)
    with pytest.raises(WindowsError, match=r"cannot be padded .* 'reflect'"):
        explain_windows(net, volume, InputGradient(), mean_square, Windows((30, 30, 30), padding="reflect"))


def test_an_explainer_applies_its_model_by_windows(scan_file, tmp_path):
    net = segmenter().float()
    settings = {"size": (12, 12, 12), "overlap": 0.5}
    explainer = Explainer(net, None, ["grad-cam", "input-gradient"], ["segment-1"], windows=Windows(**settings))
    explanation = explainer(scan_file())
    tensor = torch.from_numpy(explanation.scan.array)[None, None].float()
    cam, gradient = explain_windows(
        net, tensor, [GradCAM(), InputGradient()], Segment(1), Windows(**settings), Context(Measured())
    )
    assert explanation.map("grad-cam").layer == cam.layer
    assert_close(torch.from_numpy(explanation.map("grad-cam").values), cam.maps[0][0, 0])
    assert_close(torch.from_numpy(explanation.map("input-gradient").values), gradient.maps[0][0, 0])
    record = json.loads((explanation.save(tmp_path) / "case.json").read_text())
    assert record["provenance"]["model"]["windows"]["size"] == [12, 12, 12]
    assert "cells_in_windows" in record["maps"][0]["facts"]
    explainer.measure([explanation.scan])
    ((key, _),) = explainer.alignments.items()
    assert key.size == (12, 12, 12)


def test_a_config_names_the_windows(tmp_path):
    path = tmp_path / "config.yaml"
    (tmp_path / "net.py").write_text("import torch\n\ndef make():\n    return torch.nn.Conv3d(1, 2, 1)\n")
    text = "model: {factory: net.py:make}\ntargets: [segment-1]\nwindows:\n  size: [8, 8, 8]\n  overlap: {overlap}\n"
    path.write_text(text.replace("{overlap}", "[0.5, 0.5, 0]"))
    config = load_config(path)
    assert Explainer.from_config(config).windows == Windows((8, 8, 8), (0.5, 0.5, 0))
    path.write_text(text.replace("{overlap}", "1"))
    with pytest.raises(ConfigError, match=r"config.yaml:5: windows.overlap: expected a share .* \(got 1\)"):
        load_config(path)
    path.write_text(text.replace("{overlap}", "[0.5, 0]"))
    with pytest.raises(ConfigError, match="overlap is one number, or one for each of the 3 axes"):
        load_config(path)
    path.write_text(text.replace("overlap: {overlap}", "overlp: 1"))
    with pytest.raises(ConfigError, match=r"windows.overlp: unknown key; did you mean 'overlap'\?"):
        load_config(path)
