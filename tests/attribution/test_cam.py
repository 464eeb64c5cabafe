"""CAM methods against their definitions."""

import pytest
import torch
from nets import Linear3d, random_net
from torch import nn
from torch.testing import assert_close

from volsal import ClassLogit, GradCAM, HiResCAM
from volsal.attribution import LayerError, ModelError


@pytest.mark.parametrize("method", [GradCAM, HiResCAM])
def test_of_a_linear_network_is_the_input_times_its_weight(method, volume):
    # A_c = w_c x and dS/dA_c = v_c / V everywhere, so L = (v . w) x / V, and Grad-CAM drops the negative part.
    net = Linear3d(w=[1.0, -2.0], v=[[3.0, 0.5], [1.0, 1.0]])  # class 0: v . w = 3 - 1 = 2
    expected = 2.0 * volume / volume[0, 0].numel()
    if method is GradCAM:
        expected = expected.clamp(min=0)
    assert_close(method("features")(net, volume, ClassLogit(0)), expected)


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
