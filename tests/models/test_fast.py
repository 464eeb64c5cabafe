"""The fast copy: what it folds, what it leaves alone, and that it says the same."""

import copy

import pytest
import torch
from nets import CONV, NORM, assert_same_state, random_net, state
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from volsal import ClassLogit, Explainer, GradCAM, GuidedBackprop, HiResCAM, InputGradient
from volsal.attribution import LayerError, ModelError, default_layer
from volsal.config import load_config
from volsal.models.fast import fast, fast_copy


def lived_in(net, seed=1):
    """Batch norms as training leaves them, not as they are born: each statistic and weight matters."""
    random = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(generator=random)
            module.running_var.uniform_(0.3, 3, generator=random)
            if module.affine:
                module.weight.data.uniform_(-2, 2, generator=random)
                module.bias.data.normal_(generator=random)
    return net


class Net(nn.Module):
    """conv -> norm -> ReLU -> conv -> norm -> ReLU -> mean -> head, with what happens in between left to a test."""

    def __init__(self, between=lambda net, made, normed: normed, axes=3, **conv):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = CONV[axes](1, 4, 3, padding=1, **conv)
        self.bn1 = NORM[axes](4)
        self.conv2 = CONV[axes](4, 4, 3, stride=2, **conv)
        self.bn2 = NORM[axes](4)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)
        self.between = between
        lived_in(self.double())

    def forward(self, x):
        made = self.conv1(x)
        x = self.act(self.between(self, made, self.bn1(made)))
        x = self.act(self.bn2(self.conv2(x)))
        return self.head(x.flatten(2).mean(2))


def of(net):
    return fast_copy(net).folded


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("conv", [{}, {"bias": False}, {"groups": 1, "padding_mode": "replicate"}])
def test_folds_what_it_can_and_says_the_same(axes, conv, volume):
    net = Net(axes=axes, **conv)
    x = volume if axes == 3 else volume[..., 0]
    quick = fast(net, x[:1])
    assert of(quick) == (("conv1", "bn1"), ("conv2", "bn2"))
    assert_close(quick(x), net.eval()(x))
    for method in (GradCAM("bn2"), HiResCAM("bn1"), GuidedBackprop(), InputGradient()):
        assert_close(method(quick, x, ClassLogit(1)), method(net, x, ClassLogit(1)))
    assert default_layer(quick, x) == default_layer(net, x)


@pytest.mark.parametrize("transposed", [{}, {"groups": 2}])
def test_transposed_convolutions(volume, transposed):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv3d(1, 4, 3, 2), nn.ConvTranspose3d(4, 6, 2, 2, **transposed), nn.BatchNorm3d(6), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 2),
    ).double()  # fmt: skip
    quick = fast(lived_in(net), volume)
    assert of(quick) == (() if transposed else (("1", "2"),))
    assert_close(quick(volume), net.eval()(volume))


@pytest.mark.parametrize(
    "between",
    [
        lambda net, made, normed: normed + made,  # a skip around the norm
        lambda net, made, normed: normed * (made.detach() > 0),  # a use that no gradient tells of
        lambda net, made, normed: net.bn1(normed),  # runs twice
        lambda net, made, normed: normed + net.conv1(normed[:, :1]),  # its convolution runs twice
        lambda net, made, normed: normed * net.conv1.weight.mean(),  # its weights are read elsewhere
        lambda net, made, normed: normed - net.bn1.running_var.mean(),
    ],
    ids=["skip", "detached", "norm-twice", "convolution-twice", "weight-read", "statistic-read"],
)
def test_leaves_alone_what_is_used_elsewhere(between, volume):
    net = Net(between)
    quick = fast(net, volume)
    assert of(quick) == (("conv2", "bn2"),)
    assert fast_copy(quick).norms == 2
    assert_close(quick(volume), net.eval()(volume))


def test_leaves_alone_what_the_model_returns_too(volume):
    class Both(Net):
        def forward(self, x):
            made = self.conv1(x)
            return self.head(self.bn1(made).flatten(2).mean(2)), made

    net = Both()
    quick = fast(net, volume)
    assert of(quick) == ()
    assert_close(quick(volume), net.eval()(volume))


def test_leaves_alone_norms_that_mix_the_batch_and_layers_with_listeners(volume):
    net = Net()
    net.bn1 = nn.BatchNorm3d(4, track_running_stats=False).double()
    heard = []
    net.bn2.register_forward_hook(lambda *_: heard.append(1))
    quick = fast(net, volume)
    assert of(quick) == ()
    assert_close(quick(volume), net.eval()(volume))
    assert heard


def test_a_folded_convolution_is_no_layer_unless_kept(volume):
    net = Net()
    with pytest.raises(LayerError, match="'conv1' returns a FoldedConvolution, not a tensor"):
        GradCAM("conv1")(fast(net, volume), volume, ClassLogit(0))
    quick = fast(net, volume, keep=["conv1"])
    assert of(quick) == (("conv2", "bn2"),)
    assert_close(GradCAM("conv1")(quick, volume, ClassLogit(0)), GradCAM("conv1")(net, volume, ClassLogit(0)))
    with pytest.raises(LayerError, match="no layer 'conv3'"):
        fast(net, volume, keep=["conv3"])


def test_the_model_stays_as_it_was(volume):
    net = Net().train()
    net.bn1.eval()
    net.conv1.weight.requires_grad_(False)
    before, weights = state(net), copy.deepcopy(net.state_dict())
    quick = fast(net, volume)
    assert_same_state(before, state(net))
    for name, value in net.state_dict().items():
        assert torch.equal(value, weights[name])
    assert not {t.data_ptr() for t in quick.parameters()} & {t.data_ptr() for t in net.parameters()}
    assert not quick.training
    assert fast_copy(net) is None


def test_a_module_under_two_names_is_folded_under_both(volume):
    net = Net()
    net.again, net.norm_again = net.conv1, net.bn1
    quick = fast(net, volume)
    assert quick.bn1 is quick.norm_again
    assert quick.conv1 is quick.again
    assert_close(quick(volume), net.eval()(volume))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("axes", [2, 3])
def test_a_stem_is_computed_by_rows_to_the_same_result(volume, channels, axes):
    torch.manual_seed(0)
    geometry = {"kernel_size": (2, 3, 5), "stride": (1, 2, 3), "padding": (1, 0, 2)}
    cut = {name: value[-axes:] for name, value in geometry.items()}
    stem = CONV[axes](channels, 12, **cut)
    net = lived_in(nn.Sequential(stem, NORM[axes](12), nn.ReLU(), nn.Flatten(2)).double())
    x = torch.cat([volume, 2 * volume.flip(-1)], 1)[:, :channels]
    x = x if axes == 3 else x[..., 0]
    quick = fast(net, x)
    assert [layer.in_channels for layer in quick[1]] == [channels, 5 * channels]
    assert not any(parameter.requires_grad for parameter in quick.parameters())
    assert_close(quick(x), net.eval()(x))


def test_convolutions_are_laid_out_channels_last(volume):
    quick = fast(Net().float(), volume.float())
    seen = []
    quick.act.register_forward_hook(lambda module, args, output: seen.append(output))
    quick(volume.float())
    assert all(activation.is_contiguous(memory_format=torch.channels_last_3d) for activation in seen)


class Operations(TorchDispatchMode):
    """The names of the convolutions that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "conv" in func.name():
            self.seen.append(func.name().split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize(
    "conv", [{"kernel_size": 1}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 3, "dilation": 2},
             {"kernel_size": 1, "groups": 2, "bias": False}]
)  # fmt: skip
def test_convolutions_are_onednns_but_where_gradients_are_followed(axes, conv):
    torch.manual_seed(0)
    net = nn.Sequential(CONV[axes](4, 8, **conv), nn.Flatten(2)).eval()
    x = torch.randn(2, 4, *(7, 9, 11)[:axes])
    quick = fast(net, x)
    with torch.no_grad(), Operations() as plain:
        out = quick(x)
    assert plain.seen == ["mkldnn_convolution"]
    assert_close(out, net(x))
    asked = x.clone().requires_grad_()
    with Operations() as followed:
        quick(asked).square().sum().backward()
    assert followed.seen == ["convolution", "convolution_backward"]
    wanted = x.clone().requires_grad_()
    net(wanted).square().sum().backward()
    assert_close(asked.grad, wanted.grad)


@pytest.mark.parametrize("padding", [{"padding": "same"}, {"padding": 1, "padding_mode": "circular"}])
def test_what_onednn_has_no_words_for_runs_as_it_did(padding):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv3d(1, 2, 3, **padding), nn.Flatten(2)).eval(), torch.randn(2, 1, 5, 6, 7)
    quick = fast(net, x)
    with torch.no_grad():
        assert_close(quick(x), net(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert quick(x).dtype == torch.bfloat16


def test_half_precision_takes_the_models_own_inputs_and_says_how_far_it_is_off(volume):
    x = volume.float()
    net = random_net().float()
    quick = fast(lived_in(net), x, torch.bfloat16)
    assert quick[0].weight.dtype == torch.bfloat16
    ours, theirs = GradCAM("4")(quick, x, ClassLogit(1)), GradCAM("4")(net, x, ClassLogit(1))
    assert float(torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1]) > 0.98
    assert 1e-5 < fast_copy(quick).error < 0.1
    assert "bfloat16: an approximation" in str(fast_copy(quick))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_refuses_a_copy_that_says_something_else(volume, dtype):
    class Counting(Net):
        """Knows how often it has run."""

        def forward(self, x):
            self.runs = getattr(self, "runs", 0) + 1
            return super().forward(x) * self.runs

    with pytest.raises(ModelError, match=r"differs from the model's by 1.0e\+00 .* explain the model itself"):
        fast(Counting().float(), volume.float(), dtype)


def test_refuses_a_model_that_looks_at_what_is_folded_away(volume):
    net = Net(lambda net, made, normed: normed * made.shape[1])
    with pytest.raises(ModelError, match=r"has no fast copy: .*FoldedConvolution.* keep="):
        fast(net, volume)
    assert of(fast(net, volume, keep=["conv1"])) == (("conv2", "bn2"),)


def test_refuses_a_model_that_cannot_be_copied(volume):
    net = Net()
    net.left_over = net.conv1.weight * 2
    with pytest.raises(ModelError, match="cannot be copied"):
        fast(net, volume)


def test_looks_inside_wrappers(volume):
    net = Net()
    for wrapped in (nn.DataParallel(net), torch.compile(net, backend="eager")):
        quick = fast(wrapped, volume)
        assert len(of(quick)) == 2
        assert_close(GradCAM("bn2")(quick, volume, ClassLogit(1)), GradCAM("bn2")(net, volume, ClassLogit(1)))


def test_autocast_around_it_is_not_part_of_the_comparison():
    random = torch.Generator().manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):  # of outputs of a few bits, some would happen to be equal
            assert fast_copy(fast(Net().float(), torch.randn(1, 1, 7, 9, 11, generator=random))).error < 1e-5


@pytest.mark.parametrize(
    ("make", "folded", "norms"),
    [
        (lambda nets: nets.ResNet("basic", (1, 1, 1, 1), (4, 8, 8, 8), n_input_channels=1, num_classes=3), 12, 12),
        (lambda nets: nets.DenseNet(3, 1, 3, init_features=8, growth_rate=4, block_config=(2, 2)), 5, 11),
        (lambda nets: nets.UNet(3, 1, 3, (4, 8, 16), (2, 2), norm="batch"), 4, 4),
    ],
    ids=["resnet", "densenet", "unet"],
)
def test_monais_networks(make, folded, norms):
    from monai.networks import nets

    torch.manual_seed(0)
    net = lived_in(make(nets)).eval()
    x = torch.randn(1, 1, 32, 32, 32)
    quick = fast(net, x)
    assert (len(of(quick)), fast_copy(quick).norms) == (folded, norms)
    assert fast_copy(quick).error < 1e-5


def explained(net, path, **settings):
    return Explainer(net, None, ["grad-cam", "guided-grad-cam"], "class-1", **settings)(path)


def test_an_explainer_with_a_fast_copy_gives_the_same_maps_and_the_models_own_digest(scan_file):
    net, path = random_net().float(), scan_file()
    net[2].weight.data /= 400  # the scan's intensities
    plain, quick = explained(net, path), explained(net, path, fast=True)
    for ours, theirs in zip(plain.maps, quick.maps, strict=True):
        assert ours.values.max() > 0
        assert_close(theirs.values, ours.values, rtol=0, atol=1e-4 * float(ours.values.max()))
        assert theirs.layer == ours.layer
    made = quick.provenance["model"]
    assert made["weights_sha256"] == plain.provenance["model"]["weights_sha256"]
    assert made["fast"]["folded"] == 1
    assert plain.provenance["model"]["fast"] is None
    assert quick.notes == plain.notes


def test_an_explainer_says_that_half_precision_is_an_approximation(scan_file):
    quick = explained(random_net().float(), scan_file(), fast=torch.bfloat16, alignment="half-pixel")
    assert any("in bfloat16: an approximation" in note for note in quick.notes)
    assert quick.provenance["model"]["fast"]["dtype"] == "bfloat16"


def test_an_explainer_copies_the_model_anew_when_its_weights_change(scan_file):
    net, path = random_net().float(), scan_file()
    explainer = Explainer(net, None, "hires-cam", "class-1", fast=True, alignment="half-pixel")
    first = explainer(path)
    with torch.no_grad():
        net[-1].weight.mul_(2)
    assert_close(explainer(path).maps[0].values, 2 * first.maps[0].values)


def test_an_explainer_keeps_the_layers_that_its_methods_name(scan_file):
    net, path = random_net().float(), scan_file()
    found = [
        Explainer(net, None, HiResCAM("2"), 1, fast=fast_, alignment="half-pixel")(path) for fast_ in (False, True)
    ]
    assert found[1].maps[0].layer == "2"
    assert_close(found[1].maps[0].values, found[0].maps[0].values, rtol=1e-3, atol=1e-5)


def test_a_config_asks_for_it(tmp_path):
    for text, fast_ in (("", False), ("fast: true", True), ("precision: bf16", torch.bfloat16)):
        path = tmp_path / "c.yaml"
        path.write_text(f"model:\n  factory: volsal.demo.net:load\n  {text}\n")
        assert Explainer.from_config(load_config(path)).fast == fast_
