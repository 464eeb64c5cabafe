"""CAM methods against their definitions."""

import numpy as np
import pytest
import torch
from nets import Linear3d, random_net
from torch import nn
from torch.testing import assert_close

from volsal import (
    ClassLogit,
    ClassMargin,
    EigenCAM,
    EigenGradCAM,
    GradCAM,
    GradCAMPlusPlus,
    GuidedGradCAM,
    HiResCAM,
    LayerCAM,
    LinearCAM,
    PredictedClass,
    RespondCAM,
    ScoreCAM,
    XGradCAM,
)
from volsal.attribution import LayerError, ModelError, attribute
from volsal.attribution.alignment.alignment import FlipAverage, Measured
from volsal.attribution.method import Context
from volsal.attribution.settings import SettingError

GRADIENT_CAMS = [
    GradCAM, HiResCAM, GradCAMPlusPlus, RespondCAM, XGradCAM, LayerCAM, LinearCAM, EigenCAM, EigenGradCAM,
]  # fmt: skip


def of_the_linear_net(method, x):
    """The map for w = (1, -2), v = (3, 0.5): A_c = w_c x, and dS/dA_c = v_c / V in every cell."""
    cells = x[0, 0].numel()
    total = x.sum((1, 2, 3, 4), keepdim=True)
    if method is LinearCAM:
        return 2.0 * x  # (v . w) x
    if method is LayerCAM:  # both gradients are positive
        return (2.0 * x / cells).relu()
    if method is GradCAMPlusPlus:
        by = [g / (2 + g * (a * total).relu()) for g, a in ((3.0 / cells, 1.0), (0.5 / cells, -2.0))]
        return (cells * (by[0] - 2 * by[1]) * x).relu()
    if method is EigenCAM:  # one component, along w, of which the sign is taken that sums to more than 0
        return (-(5.0**0.5) * x).relu()
    if method is EigenGradCAM:  # v_c w_c = (3, -1), which sums to more than 0
        return 10.0**0.5 * x / cells
    signed = 2.0 * x / cells
    return signed if method in (HiResCAM, RespondCAM) else signed.relu()


@pytest.mark.parametrize("method", GRADIENT_CAMS)
def test_of_a_linear_network_is_the_input_times_its_weight(method, volume):
    net = Linear3d(w=[1.0, -2.0], v=[[3.0, 0.5], [1.0, 1.0]])  # class 0: v . w = 3 - 1 = 2
    assert_close(method("features")(net, volume, ClassLogit(0)), of_the_linear_net(method, volume))


def tapped(net, volume, layer, index):
    """The activation of a layer of a Sequential and the score's gradient by it, by plain autograd."""
    leaf = net[: layer + 1](volume).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(net[layer + 1 :](leaf)[:, index].sum(), leaf)
    return leaf.detach(), gradient


def test_grad_cam_plus_plus_follows_equations_10_and_19_of_the_paper(volume):
    net = random_net(inplace=False).eval()
    activation, gradient = tapped(net, volume, 4, 1)
    expected = torch.zeros(2, 1, *activation.shape[2:], dtype=torch.float64)
    for b in range(2):
        for c in range(5):
            a, g = activation[b, c], gradient[b, c]
            alpha = g**2 / (2 * g**2 + a.sum() * g**3)
            expected[b, 0] += (alpha * g.relu()).nansum() * a
    assert float(expected.max()) > 0
    assert_close(GradCAMPlusPlus("4")(net, volume, ClassLogit(1)), expected.relu())


def test_grad_cam_plus_plus_of_many_cells_is_as_exact_in_float32_as_of_few():
    net = random_net().float().eval()
    x = torch.randn(1, 1, 61, 61, 61, generator=torch.Generator().manual_seed(0))
    exact = GradCAMPlusPlus("4")(random_net(), x.double(), ClassLogit(1))
    ours = GradCAMPlusPlus("4")(net, x, ClassLogit(1)).double()
    assert float((ours - exact).abs().max()) < 1e-5 * float(exact.max())
    activation, gradient = tapped(random_net(inplace=False).eval(), x.double(), 4, 1)
    stabilised = gradient**2 / (2 * gradient**2 + activation.sum((2, 3, 4), keepdim=True) * gradient**3 + 1e-7)
    weights = (stabilised * gradient.relu()).sum((2, 3, 4), keepdim=True)
    customary = (weights * activation).sum(1, keepdim=True).relu()
    assert float((customary - exact).abs().max()) > 0.1 * float(exact.max())  # what the form without one is for


@pytest.mark.parametrize("method", [XGradCAM, RespondCAM])
def test_respond_cam_and_xgrad_cam_weigh_gradients_by_activations(method, volume):
    net = random_net(inplace=False).eval()
    net[2].weight.data[3], net[2].bias.data[3], net[3].bias.data[3] = 0, 0, -1  # a channel that is 0 everywhere
    activation, gradient = tapped(net, volume, 4, 2)
    expected = torch.zeros(2, 1, *activation.shape[2:], dtype=torch.float64)
    for b in range(2):
        for c in (0, 1, 2, 4):
            expected[b, 0] += (gradient[b, c] * activation[b, c] / activation[b, c].sum()).sum() * activation[b, c]
    expected = expected if method is RespondCAM else expected.relu()
    assert_close(method("4")(net, volume, ClassLogit(2)), expected)


def test_respond_cam_sums_to_the_logit_less_its_bias(volume):
    net = random_net().eval()
    total = RespondCAM("4")(net, volume, ClassLogit(2)).sum((1, 2, 3, 4))
    assert_close(total, (net(volume)[:, 2] - net[-1].bias[2]).detach())


def test_layer_cam_takes_each_positive_gradient_by_itself(volume):
    net = random_net(inplace=False).eval()
    activation, gradient = tapped(net, volume, 1, 0)  # a layer in which gradients differ from cell to cell
    expected = torch.zeros(2, 1, *activation.shape[2:], dtype=torch.float64)
    for c in range(4):
        expected[:, 0] += torch.where(gradient[:, c] > 0, gradient[:, c], 0) * activation[:, c]
    assert_close(LayerCAM("1")(net, volume, ClassLogit(0)), expected)


@pytest.mark.parametrize("layer", [0, 4])  # signed, of fewer channels than cells; rectified
@pytest.mark.parametrize("size", [(9, 8, 10), (3, 4, 3)])  # of more cells than channels, and of fewer
def test_eigen_cams_are_the_first_component_of_numpys_svd(layer, size):
    net = random_net(inplace=False).eval()
    x = torch.randn(2, 1, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    activation, gradient = tapped(net, x, layer, 1)
    for method, values in ((EigenCAM, activation), (EigenGradCAM, activation * gradient)):
        expected = []
        for one in values:
            rows = one.flatten(1).numpy()
            u, s, vt = np.linalg.svd(rows, full_matrices=False)
            sign = 1 if u[:, 0].sum() > 0 else -1
            expected.append(torch.from_numpy(sign * s[0] * vt[0]).reshape(1, 1, *one.shape[1:]))
        expected = torch.cat(expected)
        found = method(str(layer))(net, x, ClassLogit(1))
        assert_close(found, expected.relu() if method is EigenCAM else expected)


def test_eigen_cam_of_a_rectified_layer_is_nowhere_cut_and_says_that_it_knows_no_class(volume):
    net = random_net().eval()
    answer = EigenCAM("4").attribute(net, volume, [ClassLogit(0), ClassLogit(1)])
    assert_close(answer.maps[0], answer.maps[1], rtol=0, atol=0)
    assert float(answer.maps[0].min()) >= 0
    assert "same map for every target" in answer.notes[0]
    blank = nn.Sequential(nn.Conv3d(1, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()).double()
    assert float(EigenCAM("1")(blank, volume * 0, ClassLogit(0)).abs().max()) == 0


def test_eigen_grad_cam_agrees_with_hires_cam_in_sign(volume):
    net = random_net().eval()
    for layer in ("0", "2", "4"):
        ours, hires = (kind(layer)(net, volume, ClassLogit(1)).flatten(1) for kind in (EigenGradCAM, HiResCAM))
        assert ((ours * hires).sum(1) > 0).all()


def test_a_layer_with_negative_values_is_named_where_the_equation_is_not_made_for_it(volume):
    answers = attribute(
        random_net(), volume, [GradCAMPlusPlus("2"), XGradCAM("2"), GradCAM("2"), XGradCAM("4")], [ClassLogit(0)]
    )
    assert ["nowhere negative" in " ".join(answer.notes) for answer in answers] == [True, True, False, False]


class Heads(nn.Module):
    """A convolution, pooled in some way, and a linear layer written in some way."""

    def __init__(self, pool, head):
        super().__init__()
        torch.manual_seed(2)
        self.conv, self.head, self.pool = nn.Conv3d(1, 4, 3, padding=1), head, pool
        # The head was made when the tests were collected: neither its numbers nor an earlier test's rounding may stay.
        for module in head.double().modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.double()

    def forward(self, x):
        return self.head(self.pool(self.conv(x))).flatten(1)


def mean_of(x):
    return x.mean((2, 3, 4))


def test_cam_is_the_heads_weights_and_its_mean_the_logit_less_the_bias(volume):
    net = random_net().eval()
    activation = net[:5](volume).detach()
    weight, bias = net[-1].weight.detach(), net[-1].bias.detach()
    targets = [ClassLogit(1), ClassMargin(2, 0), PredictedClass()]
    predicted = net(volume).argmax(1)
    rows = [weight[[1, 1]], (weight[2] - weight[0]).expand(2, -1), weight[predicted]]
    shifts = [bias[[1, 1]], (bias[2] - bias[0]).expand(2), bias[predicted]]
    answer = LinearCAM("4").attribute(net, volume, targets)
    for found, row, shift, score in zip(answer.maps, rows, shifts, answer.scores, strict=True):
        assert_close(found, torch.einsum("bc,bcijk->bijk", row, activation)[:, None])
        assert_close(found.mean((1, 2, 3, 4)) + shift, score)


@pytest.mark.parametrize(
    ("pool", "head"),
    [
        (mean_of, nn.Linear(4, 3)),
        (mean_of, nn.Linear(4, 3, bias=False)),
        (lambda x: x.sum((2, 3, 4)), nn.Linear(4, 3)),
        (nn.AdaptiveAvgPool3d(1), nn.Conv3d(4, 3, 1)),
        (nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Dropout(0.5)), nn.Linear(4, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cam_finds_the_head_however_it_is_written(pool, head, dtype, volume):
    net = Heads(pool, head).to(dtype)
    answer = LinearCAM("conv").attribute(net, volume.to(dtype), [ClassLogit(1)])
    bias = 0 if head.bias is None else head.bias[1].detach().float()
    made, scores = answer.maps[0].mean((1, 2, 3, 4)).float() + bias, answer.scores[0].float()
    assert_close(made, scores, rtol=0.03 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("net", "layer", "says"),
    [
        (random_net(), "2", "no linear layer reads its means"),  # normalisation and ReLU come between
        (Heads(mean_of, nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))), "conv", "they make"),
        (Heads(nn.AdaptiveMaxPool3d(1), nn.Conv3d(4, 3, 1)), "conv", "no linear layer reads"),
    ],
)
def test_cam_refuses_a_network_without_a_linear_head(net, layer, says, volume):
    with pytest.raises(LayerError, match=f"cam needs a layer whose channels' means .* {says}"):
        LinearCAM(layer)(net, volume, ClassLogit(0))


@pytest.mark.parametrize("after", [nn.Softmax(1), nn.Sequential(nn.Sigmoid()), nn.Linear(3, 3)])
def test_cam_refuses_what_comes_after_the_linear_layer(after, volume):
    net = random_net().eval()
    net.append(after.double())
    with pytest.raises(LayerError, match=r"they make -?[\d.e-]+ of a score of"):
        LinearCAM("4")(net, volume, ClassLogit(0))


@pytest.mark.parametrize("method", [GradCAM, HiResCAM, XGradCAM, RespondCAM, LayerCAM, EigenGradCAM, LinearCAM])
@pytest.mark.parametrize("align", [None, FlipAverage()])
def test_the_parts_sum_to_the_map(method, align, volume):
    context = Context(align) if align else Context()
    answer = method("4", features="all").attribute(random_net(), volume, [ClassLogit(0), ClassLogit(1)], context)
    assert answer.part_names == [f"channel {c}" for c in range(5)]
    for values, parts in zip(answer.maps, answer.parts, strict=True):
        assert parts.shape == (2, 5, *values.shape[2:])
        total = parts.sum(1, keepdim=True)
        if align and not method.signed:  # the mean of two ReLUs is no ReLU of a mean
            assert (values >= total.relu() - 1e-12).all()
        else:
            assert_close(values, total if method.signed else total.relu())


def test_the_parts_are_those_channels_that_contribute_most_the_largest_first(volume):
    net = random_net()
    every = GradCAM("4", features="all").attribute(net, volume[:1], [ClassLogit(0)])
    some = GradCAM("4", features=3).attribute(net, volume[:1], [ClassLogit(0)])
    by_size = every.parts[0][0].abs().sum((1, 2, 3)).argsort(descending=True)[:3].tolist()
    assert some.part_names == [f"channel {c}" for c in by_size]
    assert_close(some.parts[0], every.parts[0][:, by_size])
    assert_close(some.maps[0], every.maps[0])
    assert len(GradCAM("4", features=99).attribute(net, volume, [ClassLogit(0)]).part_names) == 5
    assert not GradCAM("4").attribute(net, volume, [ClassLogit(0)]).parts


@pytest.mark.parametrize("features", [0, -1, "most", 2.0, True])
def test_refuses_a_number_of_features_that_is_none(features):
    with pytest.raises(SettingError, match="features is a number of channels from 1, or all"):
        GradCAM(features=features)


@pytest.mark.parametrize("method", [GradCAM, GuidedGradCAM, ScoreCAM])
@pytest.mark.parametrize("layer", [4, ["4"], nn.ReLU()])
def test_refuses_a_layer_that_is_no_name(method, layer):
    with pytest.raises(SettingError, match=r"layer is a name, as in 'layer4' \(a number in quotes, as in '4'\), not "):
        method(layer)


def test_all_of_them_come_out_of_one_pass_and_are_measured_by_where_their_layer_looks(volume):
    net = random_net().eval()
    methods = [method("4") for method in GRADIENT_CAMS]
    apart = [method.attribute(net, volume, [ClassLogit(1)]) for method in methods]
    runs = []
    handle = net[0].register_forward_hook(lambda *_: runs.append(1))
    together = attribute(net, volume, methods, [ClassLogit(1)])
    handle.remove()
    assert len(runs) == 1
    for ours, alone in zip(together, apart, strict=True):
        assert_close(ours.maps, alone.maps, rtol=0, atol=1e-12)
    bright = torch.zeros(1, 1, 21, 21, 21, dtype=torch.float64)
    bright[..., 4:9, 10:15, 6:12] = 5.0
    for answer in attribute(net, bright, methods, [ClassLogit(1)], Context(Measured(strict=True))):
        values = answer.maps[0]
        assert answer.alignments[0].kind == ("measured" if float(values.max()) > 0 else "half-pixel")


@pytest.mark.parametrize("axes", [2, 3])
def test_grad_cam_follows_equations_1_and_2_of_the_paper(volume, axes):
    volume = volume if axes == 3 else volume[..., 0]
    net = random_net(inplace=False, axes=axes).eval()
    activation = net[:5](volume).detach().requires_grad_()
    score = net[5:](activation)[:, 1]
    (gradient,) = torch.autograd.grad(score.sum(), activation)
    expected = torch.zeros(2, 1, *activation.shape[2:], dtype=torch.float64)
    for b in range(2):
        for c in range(5):
            alpha = gradient[b, c].sum() / gradient[b, c].numel()  # eq. 1
            expected[b, 0] += alpha * activation[b, c].detach()  # eq. 2
    assert_close(GradCAM("4")(net, volume, ClassLogit(1)), expected.clamp(min=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3])
def test_hires_cam_sums_to_the_logit_less_its_bias(dtype, batch):
    net = random_net().eval().to(dtype)
    volume = torch.randn(batch, 1, 9, 8, 10, dtype=dtype)
    logit = net(volume)[:, 2] - net[-1].bias[2]
    total = HiResCAM("4")(net, volume, ClassLogit(2)).sum((1, 2, 3, 4))
    assert_close(total, logit.detach())


def test_the_map_of_a_layer_followed_by_an_in_place_operation_is_that_of_its_twin(volume):
    quiet, writing = random_net(inplace=False), random_net(inplace=True)
    for layer in ("0", "2", "3"):
        expected = HiResCAM(layer)(quiet, volume, ClassLogit(0))
        assert_close(HiResCAM(layer)(writing, volume, ClassLogit(0)), expected)


def test_bfloat16_keeps_the_small_gradients_of_a_large_layer(volume):
    net = random_net().float()
    exact = GradCAM("4")(net, volume.float(), ClassLogit(0))
    coarse = GradCAM("4")(net.bfloat16(), volume.bfloat16(), ClassLogit(0))
    assert coarse.dtype == torch.float32
    assert float((coarse - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_a_skip_connection_around_the_layer_does_not_enter_its_map(volume):
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv3d(1, 1, 1, bias=False).double()
            self.inner.weight.data.fill_(2.0)

        def forward(self, x):
            return (self.inner(x) + 5 * x).mean((2, 3, 4))

    # Only the path through the layer counts: dS/dA = 1 / V, A = 2 x.
    assert_close(HiResCAM("inner")(Skip(), volume, ClassLogit(0)), 2 * volume / volume[0, 0].numel())


class Aliased(nn.Module):
    """What a layer wrote in place is read again under its other name."""

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.more = nn.Conv3d(1, 3, 3, padding=1).double(), nn.Conv3d(3, 3, 3, padding=1).double()
        self.layer = layer

    def forward(self, x):
        y = self.conv(x)
        z = self.more(self.layer(y))
        return (z + 2 * y).mean((2, 3, 4))


@pytest.mark.parametrize("layer", [nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Identity()])
def test_a_layer_that_hands_its_input_on_keeps_all_its_paths(layer, volume):
    net = Aliased(layer).eval()
    hidden = net.conv(volume).detach()
    leaf = (hidden.relu() if isinstance(layer, nn.ReLU) else hidden).clone().requires_grad_()
    score = (net.more(leaf) + 2 * leaf).mean((2, 3, 4))[:, 1]
    (gradient,) = torch.autograd.grad(score.sum(), leaf)
    answer = HiResCAM("layer").attribute(net, volume, [ClassLogit(1)])
    assert_close(answer.scores[0], net(volume)[:, 1].detach())
    assert_close(answer.maps[0], (gradient * leaf).sum(1, keepdim=True).detach())


def test_a_float16_model_keeps_gradients_that_float16_could_not_hold():
    net = nn.Sequential(nn.Conv3d(1, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(2, 2))
    x = torch.rand(1, 1, 40, 40, 40)
    exact = GradCAM("1")(net, x, ClassLogit(0))
    half = GradCAM("1")(net.half(), x.half(), ClassLogit(0))
    assert float((half - exact).abs().max()) <= 0.02 * float(exact.abs().max()) + 1e-12


def refusals():
    recurrent = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Flatten(), nn.Linear(2, 2))
    act = nn.ReLU()
    twice = nn.Sequential(nn.Conv3d(1, 2, 1), act, nn.Conv3d(2, 2, 1), act, nn.AdaptiveAvgPool3d(1), nn.Flatten())
    detached = nn.Sequential(nn.Conv3d(1, 2, 1), Detach(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    return [
        (random_net(), "conv9", LayerError, "no layer 'conv9'"),
        (random_net(), "", LayerError, "no layer"),
        (random_net(), "8", LayerError, "returns \\(2, 3\\); a CAM needs cells"),
        (twice.double(), "1", LayerError, "runs more than once"),
        (detached.double(), "0", LayerError, "no gradient reaches layer '0'"),
        (recurrent.double(), "0", ModelError, "fails on an input of shape"),
        (random_net(channels=2), "0", ModelError, "its first convolution, '0', expects 2 channels"),
        (random_net(axes=2), "0", ModelError, "expects 2 spatial axes"),
        (random_net().float(), "0", ModelError, "expects float32"),
    ]


class Detach(nn.Module):
    def forward(self, x):
        return x.detach()


@pytest.mark.parametrize(("net", "layer", "error", "says"), refusals())
def test_refuses_in_words(net, layer, error, says, volume):
    with pytest.raises(error, match=says):
        GradCAM(layer or "nothing")(net, volume, ClassLogit(0))


def test_offers_the_nearest_names_for_a_misspelt_layer(volume):
    net = nn.Sequential()
    net.add_module("layer4", random_net())
    with pytest.raises(LayerError, match=r"no layer 'laye4'; did you mean 'layer4"):
        GradCAM("laye4")(net, volume, ClassLogit(0))
