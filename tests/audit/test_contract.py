"""The contract holds on sound models, and each planted fault is found by the check that is meant to find it."""

import json

import pytest
import torch
import torch.nn.functional as F
from nets import Hidden, assert_same_state, random_net, state
from torch import nn
from typer.testing import CliRunner

from volsal import RISE, Explainer, GradCAM, IntegratedGradients
from volsal.audit.contract import Check, check_model, difference
from volsal.cli import app

METHODS = ["grad-cam", "hires-cam", "guided-backprop", "guided-grad-cam", "integrated-gradients", "deep-lift"]


@pytest.fixture
def scan():
    return torch.randn(1, 1, 9, 11, 10, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """conv -> norm -> ReLU -> conv -> [a place for faults] -> mean -> head."""

    def __init__(self, middle=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv3d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm3d(4)
        self.conv2 = nn.Conv3d(4, 4, 3, stride=2)
        self.middle = middle or nn.Identity()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)), inplace=True)
        return self.head(self.middle(self.conv2(x)).flatten(2).mean(2))


def verdicts(report, verdict):
    return {(check.name, check.of) for check in report.checks if check.verdict == verdict}


def failing(report):
    return verdicts(report, "fails")


def test_a_sound_model_keeps_every_promise_and_stays_as_it_was(scan):
    net = random_net().train().float()
    net[3].running_mean.normal_()
    before, random = state(net), torch.get_rng_state()
    report = check_model(Explainer(net, methods=METHODS, targets=["predicted-class", "class-2"]), scan)
    assert failing(report) == set()
    assert report.sound
    assert_same_state(before, state(net))
    assert torch.equal(random, torch.get_rng_state())
    kept = verdicts(report, "ok")
    assert {name for name, of in kept if of == "model"} == {
        "finite weights",
        "finite output",
        "same output again",
        "output the same alone and in a batch",
        "unchanged by an inference",
        "input gradient equals PyTorch's own",
        "same input gradient from a folded copy",
        "same input gradient from an exported program",
    }
    for method in METHODS:
        assert ("same map alone and in a batch", method) in kept
        assert ("more than rounding", method) in kept
        assert ("same map from a folded copy", method) in kept
    for method in ("integrated-gradients", "deep-lift"):
        assert {("adds up to the score's change", method), ("sensitivity(a)", method)} <= kept
    assert ("every activation reached", "guided-backprop") in kept
    assert ("hires-cam adds up to the score", "layer 4") in kept


@pytest.mark.parametrize("axes", [2, 3])
def test_each_way_of_being_sound(axes, scan):
    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = {2: nn.Conv2d, 3: nn.Conv3d}[axes](2, 3, 3).double()
            self.head = nn.Linear(3, 1).double()

        def forward(self, x):
            return self.head(F.silu(self.conv(x)).flatten(2).mean(2)).tanh()

    volume = torch.cat([scan, 2 * scan], 1)
    report = check_model(
        Explainer(Regression(), methods=["grad-cam", "input-gradient"], targets="regression"),
        volume if axes == 3 else volume[..., 0],
    )
    assert report.sound, failing(report)
    (bent,) = [check for check in report.checks if check.name == "hires-cam adds up to the score"]
    assert bent.verdict == "does not apply"
    assert "not linear" in bent.said


def test_dropout_that_evaluation_mode_leaves_on(scan):
    class Dropout(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, training=True)

    report = check_model(Explainer(Net(Dropout()), methods="grad-cam", targets=1), scan)
    assert {("same output again", "model"), ("same map again", "grad-cam")} <= failing(report)


@pytest.mark.parametrize("kind", ["norm", "by hand"])
def test_a_layer_that_mixes_the_batch(kind, scan):
    class Mixing(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    middle = nn.BatchNorm3d(4, track_running_stats=False) if kind == "norm" else Mixing()
    net = Net(middle)
    # The other volume of the batch moves the mean, which a head without a bias would show as well.
    report = check_model(Explainer(net, methods="grad-cam", targets=1), scan)
    assert {("output the same alone and in a batch", "model")} <= failing(report)
    assert ("same output again", "model") in verdicts(report, "ok")


@pytest.mark.parametrize("size", [9, 24])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_map_that_is_rounding_alone(size, precision):
    """A normalised channel's mean is what its bias says, whatever the scan: no voxel moves it."""
    volume = torch.randn(1, 1, size, size, size, generator=torch.Generator().manual_seed(3)).to(precision)
    net = Net(nn.InstanceNorm3d(4, affine=True)).to(precision)
    explainer = Explainer(net, methods=["input-gradient", "guided-backprop"], targets=1)
    asked = {check.of: check for check in check_model(explainer, volume).checks if check.name == "more than rounding"}
    assert {of: check.verdict for of, check in asked.items()} == dict.fromkeys(explainer.names, "fails"), asked
    assert float(explainer.methods[0](net, volume, explainer.targets[0]).abs().max()) > 0  # a picture it would be
    whole = Explainer(Net().to(precision), methods=["input-gradient", "guided-backprop"], targets=1)
    (one, two) = (check for check in check_model(whole, volume).checks if check.name == "more than rounding")
    assert (one.verdict, two.verdict) == ("ok", "ok"), (one, two)


def test_whether_a_map_is_more_than_rounding_cannot_be_told_where_there_is_nothing_finer(scan):
    class Single(nn.Module):
        def forward(self, x):
            assert x.dtype == torch.float32
            return x

    for net, volume, why in (
        (Net().double(), scan.double(), "no finer precision"),
        (Net(Single()), scan, "does not compute in float64"),
    ):
        report = check_model(Explainer(net, methods="grad-cam", targets=1), volume)
        (check,) = [check for check in report.checks if check.name == "more than rounding"]
        assert (check.verdict, why in check.said) == ("does not apply", True), check


def test_weights_that_are_not_finite(scan):
    net = Net()
    net.head.weight.data[0, 0] = torch.nan
    report = check_model(Explainer(net, methods="grad-cam", targets=0), scan)
    (check,) = [check for check in report.checks if check.name == "finite weights"]
    assert (check.verdict, check.figure) == ("fails", 1)
    assert check.said.endswith("head.weight")
    assert {("finite output", "model"), ("gives a map", "grad-cam")} <= failing(report)
    assert ("same output again", "model") in failing(report)  # NaN is equal to nothing


class Custom(nn.Module):
    def forward(self, x):
        return Hidden.apply(x)


def test_an_activation_that_hides_from_the_rule(scan):
    report = check_model(Explainer(Net(Custom()), methods=["guided-backprop", "grad-cam"], targets=1), scan)
    assert failing(report) == {("every activation reached", "guided-backprop")}
    (check,) = [check for check in report.checks if check.verdict == "fails"]
    assert "HiddenBackward" in check.said


def test_a_backward_pass_that_is_not_the_forward_passs(scan):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Layer(nn.Module):
        def forward(self, x):
            return Wrong.apply(x)

    method = IntegratedGradients(steps=4, max_steps=4)
    report = check_model(Explainer(Net(Layer()), methods=method, targets=1), scan)
    assert ("adds up to the score's change", "integrated-gradients") in failing(report)


def test_a_head_whose_gradient_is_not_its_own(scan):
    class Detached(Net):
        def forward(self, x):
            x = self.middle(self.conv2(F.relu(self.norm(self.conv1(x))))).flatten(2).mean(2)
            return self.head(x) + x.detach().sum(1, keepdim=True)

    report = check_model(Explainer(Detached(), methods="hires-cam", targets=1), scan)
    assert failing(report) == {("hires-cam adds up to the score", "layer conv2")}


def test_a_model_that_writes_into_its_buffers(scan):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("runs", torch.zeros(()))

        def forward(self, x):
            self.runs += 1
            return x

    report = check_model(Explainer(Net(Counting()), methods="grad-cam", targets=1), scan)
    assert failing(report) == {("unchanged by an inference", "model"), ("model unchanged", "grad-cam")}
    (check,) = [check for check in report.checks if check.name == "model unchanged"]
    assert check.said == "things that changed: buffer middle.runs"


def test_a_model_that_cannot_be_copied_or_exported_is_told_so_and_passes(scan):
    class Awkward(nn.Module):
        def forward(self, x):
            self.last = x  # a tensor that is no leaf: what deepcopy refuses
            return x * float(x.detach().abs().max() > 0)

    report = check_model(Explainer(Net(Awkward()), methods="input-gradient", targets=1), scan)
    assert report.sound, failing(report)
    left = verdicts(report, "does not apply")
    assert ("same input gradient from an exported program", "model") in left


@pytest.mark.parametrize("hidden", [False, True])
def test_progress_goes_from_nothing_to_all_whatever_fails(hidden, scan):
    told = []
    net = Net(Custom() if hidden else None)
    explainer = Explainer(net, methods=["guided-backprop", "grad-cam"], targets=1)
    report = check_model(explainer, scan, lambda *step: told.append(step))
    assert {(what, of) for what, _, of in told} == {("checks", 5 + 2 * 8 + 2 + 3)}
    done = [number for _, number, _ in told]
    assert (done[0], done[-1]) == (0, 26)
    assert done == sorted(done)
    assert len(done) == len(report.checks) + 2


def test_passes_are_shared_and_long_methods_take_few_steps(scan):
    net = Net()
    rows = []
    net.conv1.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    explainer = Explainer(net, methods=["grad-cam", "smooth-grad", "rise"], targets=1)
    explainer.methods[2] = RISE(cell=4)
    report = check_model(explainer, scan)
    assert report.sound, failing(report)
    model, layer, copy, survey = 3, 5, 2, 1
    cam, noisy, masked = 5 * 1 + 1, 5 * (1 + 3), 5 * (1 + 8)
    gradient, export = 2, 2
    assert len(rows) <= model + layer + copy + survey + cam + noisy + masked + gradient + export
    said = {check.of: check.said for check in report.checks if check.name == "finite values"}
    assert said["rise"].endswith("(for speed, here and below: masks 8)")
    assert said["smooth-grad"].endswith("samples 3)")
    assert said["grad-cam"] == "values that are NaN or infinite"


def test_whether_the_steps_are_enough_is_asked_of_all_of_them(scan):
    class Bent(nn.Module):
        def forward(self, x):
            return (3 * x).sigmoid()

    check = {}
    for steps in (1, 32):
        method = IntegratedGradients(steps=steps, tolerance=None)
        report = check_model(Explainer(Net(Bent()), methods=method, targets=1), 5 * scan)
        (check[steps],) = [one for one in report.checks if one.name == "adds up to the score's change"]
    assert check[1].verdict == "fails"
    assert check[32].verdict == "ok"


class Tokens(nn.Module):
    """Patches as tokens behind a class token, their mean to a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.mix, self.head = nn.Conv3d(1, 4, 3, 3), nn.Linear(4, 4), nn.Linear(4, 3)
        self.first = nn.Parameter(torch.ones(1, 1, 4))

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.mix(torch.cat([self.first.expand(len(x), -1, -1), tokens], 1)).mean(1))


def test_a_layer_of_tokens_is_put_to_the_test_too(scan):
    report = check_model(Explainer(Tokens(), methods=[GradCAM("mix")], targets=1), scan)
    assert report.sound, failing(report)
    assert {
        ("hires-cam equals PyTorch's own gradient", "layer mix"),
        ("hires-cam adds up to the score", "layer mix"),
    } <= verdicts(report, "ok")


def test_layers_that_cannot_carry_a_map_fail_in_words_and_the_rest_is_checked(scan):
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.unused, self.beside = nn.Conv3d(1, 1, 1), nn.Conv3d(1, 2, 3)

        def forward(self, x):
            return {"one": super().forward(x), "other": self.beside(x).flatten(2).mean(2)}

    names = ["unused", "beside", "missing", "conv2"]
    methods = {name: GradCAM(name) for name in names}
    report = check_model(Explainer(Two(), methods=methods, targets="one/class-1"), scan)
    says = {check.of: check.said for check in report.checks if check.name == "gives a map"}
    assert says.keys() == {"unused", "beside", "missing"}
    assert "layer 'unused' did not run" in says["unused"]
    assert "no gradient reaches layer 'beside'" in says["beside"]
    assert "the model has no layer 'missing'" in says["missing"]
    assert ("hires-cam equals PyTorch's own gradient", "layer conv2") in verdicts(report, "ok")
    assert {of for _, of in failing(report)} == {*says, *(f"layer {name}" for name in says)}


def test_a_model_without_a_layer_to_take_is_checked_all_the_same(scan):
    net = nn.Sequential(nn.Conv3d(1, 2, scan.shape[2:]), nn.Flatten())  # its one layer has a single cell
    report = check_model(Explainer(net, methods=["grad-cam", "input-gradient"], targets=1), scan)
    assert failing(report) == {("gives a map", "grad-cam")}
    assert ("input gradient equals PyTorch's own", "model") in verdicts(report, "ok")


def test_what_pytorch_cannot_differentiate_itself_is_no_fault(scan):
    class Overwritten(nn.Module):
        def forward(self, x):
            y = x.relu()
            y.add_(1)  # what stock autograd keeps of a ReLU is its output
            return y

    report = check_model(Explainer(Net(Overwritten()), methods="grad-cam", targets=1), scan)
    assert report.sound, failing(report)
    (check,) = [one for one in report.checks if one.name == "input gradient equals PyTorch's own"]
    assert check.verdict == "does not apply"
    assert "PyTorch has no backward pass of this model: one of the variables needed" in check.said


def test_the_report_as_a_file(scan, tmp_path):
    net = Net()
    net.head.bias.data[:] = torch.inf
    report = check_model(Explainer(net, methods="grad-cam", targets=0), scan)
    report.write(tmp_path / "contract.json")
    content = json.loads((tmp_path / "contract.json").read_text())
    assert content["model_input"]["shape"] == [1, 1, 9, 11, 10]
    assert {"name", "of", "verdict", "figure", "tolerance", "said"} == set(content["checks"][0])
    assert Check("a", "b", "fails", float("nan"), 0, "").describe()["figure"] == "nan"


def test_difference():
    one, two = torch.ones(2, 2), torch.full((2, 2), 1.1)
    assert difference([two], [one]) == pytest.approx(0.1)
    assert difference([one, two], [one, one]) == pytest.approx(0.1)
    assert difference([0 * one], [0 * one]) == 0
    assert difference([one], [0 * one]) == float("inf")
    assert difference([one * torch.nan], [one]) != difference([one * torch.nan], [one])


@pytest.fixture
def config(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Drop(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return nn.functional.dropout(x, 0.5, training=True)\n"
        "def build(extra=None):\n"
        "    torch.manual_seed(0)\n"
        "    layers = [nn.Conv3d(1, 3, 3), nn.ReLU(), *([Drop()] if extra else [])]\n"
        "    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 2))\n"
    )

    def write(**arguments):
        path = tmp_path / "c.yaml"
        path.write_text(f"model: {{factory: 'net.py:build', arguments: {json.dumps(arguments)}}}\ntargets: [class-1]\n")
        return str(path)

    return write


def test_the_command_prints_a_table_and_ends_with_0_where_all_holds(config, tmp_path):
    result = CliRunner().invoke(
        app, ["check-model", config(), "--shape", "1,8,9,10", "-m", "hires-cam", "--json", str(tmp_path / "o.json")]
    )
    assert result.exit_code == 0, result.output
    assert "Sequential on random numbers, input (1, 1, 8, 9, 10)" in result.output
    assert "hires-cam adds up to the score" in result.output
    assert "none failed" in result.output
    assert len(json.loads((tmp_path / "o.json").read_text())["checks"]) > 10


def test_the_command_on_a_scan(config, scan_file):
    result = CliRunner().invoke(app, ["check-model", config(), str(scan_file(shape=(10, 9, 8)))])
    assert result.exit_code == 0, result.output
    assert "scan.nii.gz" in result.output


def test_the_command_ends_with_1_where_something_fails_and_with_2_where_it_has_nothing_to_run_on(config):
    broken = CliRunner().invoke(app, ["check-model", config(extra=True), "--shape", "1,8,9,10"])
    assert broken.exit_code == 1
    assert "checks fail; see the table" in broken.stderr
    nothing = CliRunner().invoke(app, ["check-model", config()])
    assert (nothing.exit_code, "or give --shape" in nothing.stderr) == (2, True)
