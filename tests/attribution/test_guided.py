"""Guided backprop and the deconvnet against their definitions, in every spelling."""

import pytest
import torch
import torch.nn.functional as F
from nets import SPELLINGS, Hidden, SpelledNet, random_net
from torch import nn
from torch.testing import assert_close

from volsal import ClassLogit, Deconvnet, GradCAM, GuidedBackprop, GuidedGradCAM, InputGradient
from volsal.attribution import CoverageError


@pytest.mark.parametrize("inplace", [False, True])
def test_passes_back_only_what_is_positive_on_both_ways(inplace):
    # Voxels x = (2, -1, 3); y = relu(x); score = 5 y0 + 7 y1 - 11 y2.
    # gradient: (5, 0, -11).   guided: voxel 1 is stopped by x < 0, voxel 2 by its negative gradient.
    head = nn.Linear(3, 1, bias=False).double()
    head.weight.data = torch.tensor([[5.0, 7.0, -11.0]], dtype=torch.float64)
    net = nn.Sequential(nn.ReLU(inplace=inplace), nn.Flatten(), head)
    x = torch.tensor([2.0, -1.0, 3.0], dtype=torch.float64).view(1, 1, 3, 1, 1)
    guided = GuidedBackprop()(net, x, ClassLogit(0))
    assert_close(guided.flatten(), torch.tensor([5.0, 0.0, 0.0], dtype=torch.float64))
    # deconvnet: whether a voxel was on plays no part.
    assert_close(Deconvnet()(net, x, ClassLogit(0)).flatten(), torch.tensor([5.0, 7.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_is_the_same_in_every_spelling_of_relu_and_never_the_plain_gradient(spelling, volume):
    net = SpelledNet(SPELLINGS[spelling])
    answer = GuidedBackprop().attribute(net, volume, [ClassLogit(1)])
    assert answer.coverage == {"relu": 3}
    reference = by_hand(SpelledNet(F.relu), volume, 1)
    assert_close(answer.maps[0], reference)
    plain = InputGradient()(net, volume, ClassLogit(1))
    assert float((answer.maps[0] - plain).abs().max()) > 0.1 * float(plain.abs().max())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_deconvnet_is_the_same_in_every_spelling_of_relu(spelling, volume):
    answer = Deconvnet().attribute(SpelledNet(SPELLINGS[spelling]), volume, [ClassLogit(1), ClassLogit(2)])
    assert answer.coverage == {"relu": 3}
    for ours, index in zip(answer.maps, (1, 2), strict=True):
        assert_close(ours, by_hand(SpelledNet(F.relu), volume, index, lambda before: 1))


def by_hand(net, volume, index, own=lambda before: before > 0):
    """The rule layer by layer, with each convolution's own adjoint."""
    convs, inputs, x = (net.first, net.second, net.third), [], volume
    for conv in convs:
        before = conv(x)
        inputs.append((x, before))
        x = before.clamp(min=0)
    signal = net.head.weight[index].view(1, -1, 1, 1, 1).expand_as(x) / x[0, 0].numel()
    for conv, (x, before) in zip(reversed(convs), reversed(inputs), strict=True):
        signal = signal.clamp(min=0) * own(before)
        signal = torch.nn.grad.conv3d_input(x.shape, conv.weight, signal, conv.stride, conv.padding)
    return signal.detach()


SMOOTH = {
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), lambda x: torch.where(x > 0, 1.0, 0.1)),
    "prelu": (lambda x: F.prelu(x, torch.tensor([0.25], dtype=x.dtype)), lambda x: torch.where(x > 0, 1.0, 0.25)),
    "elu": (F.elu, lambda x: torch.where(x > 0, 1.0, x.exp())),
    "silu": (F.silu, lambda x: x.sigmoid() * (1 + x * (1 - x.sigmoid()))),
    "gelu": (
        F.gelu,
        lambda x: 0.5 * (1 + torch.erf(x / 2**0.5)) + x * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5,
    ),
    "softplus": (F.softplus, torch.sigmoid),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_other_activations_weigh_a_positive_signal_by_their_own_derivative(name):
    function, derivative = SMOOTH[name]
    x = torch.linspace(-2, 2, 8, dtype=torch.float64)
    weight = torch.tensor([1.0, -1.0, 2.0, -0.5, 3.0, -4.0, 0.5, 1.5], dtype=torch.float64)

    class Net(nn.Module):
        def forward(self, x):
            return (function(x) * weight.view(1, 1, 8, 1, 1)).sum((2, 3, 4))

    answer = GuidedBackprop().attribute(Net(), x.view(1, 1, 8, 1, 1), [ClassLogit(0)])
    assert answer.coverage == {name: 1}
    assert_close(answer.maps[0].flatten(), derivative(x) * weight.clamp(min=0))
    deconv = Deconvnet().attribute(Net(), x.view(1, 1, 8, 1, 1), [ClassLogit(0)])
    assert deconv.coverage == {name: 1}
    assert_close(deconv.maps[0].flatten(), weight.clamp(min=0))


RULES = {"guided backprop": GuidedBackprop, "deconvnet": Deconvnet}


@pytest.mark.parametrize("name", RULES)
def test_refuses_a_model_without_activations(name, volume):
    linear = nn.Sequential(nn.Conv3d(1, 2, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten()).double()
    with pytest.raises(CoverageError, match=f"{name} found no activation function"):
        RULES[name]()(linear, volume, ClassLogit(0))


def test_a_clamp_that_does_not_rectify_is_not_counted(volume):
    class Clip(nn.Module):
        def forward(self, x):
            return F.relu(x.clamp(-1, 1)).mean((2, 3, 4))

    assert GuidedBackprop().attribute(Clip(), volume, [ClassLogit(0)]).coverage == {"relu": 1}


@pytest.mark.parametrize("name", RULES)
def test_refuses_a_model_that_hides_an_activation_in_a_custom_function(name, volume):
    class Net(nn.Module):
        def forward(self, x):
            return Hidden.apply(F.relu(x - 0.1)).mean((2, 3, 4))

    with pytest.raises(CoverageError, match=f"{name} cannot reach every activation of this model: 1 x HiddenBackward"):
        RULES[name]()(Net(), volume, ClassLogit(0))


def test_refuses_a_re_entrant_checkpoint_whose_inside_it_cannot_see(volume):
    class Net(nn.Module):
        def forward(self, x):
            hidden = torch.utils.checkpoint.checkpoint(F.relu, x, use_reentrant=True)
            return F.relu(hidden - 0.1).mean((2, 3, 4))

    with pytest.raises(CoverageError, match="1 x CheckpointFunctionBackward"):
        GuidedBackprop()(Net(), volume, ClassLogit(0))


def test_refuses_an_activation_of_a_part_in_place_that_it_cannot_follow(volume):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 4, 1).double()

        def forward(self, x):
            y = self.conv(x) * 1
            F.relu(y[:, :2], inplace=True)
            return F.relu(y).mean((2, 3, 4))

    with pytest.raises(CoverageError, match="in-place activation of a part"):
        GuidedBackprop()(Net(), volume, ClassLogit(0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("hidden", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU()])
def test_refuses_an_activation_inside_a_scripted_part(hidden, name, volume):
    net = nn.Sequential(nn.ReLU(), torch.jit.script(hidden), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    with pytest.raises(CoverageError, match="cannot reach every activation"):
        RULES[name]()(net, volume, ClassLogit(0))


def test_deconvnet_follows_an_activation_of_a_part_in_place():
    class Net(nn.Module):
        def forward(self, x):
            y = x * 1
            F.relu(y[:, :, :2], inplace=True)
            return (y * torch.tensor([5.0, -7.0, -11.0]).view(1, 1, 3, 1, 1)).sum((2, 3, 4))

    x = torch.tensor([-2.0, 1.0, 3.0]).view(1, 1, 3, 1, 1)
    assert_close(Deconvnet()(Net(), x, ClassLogit(0)).flatten(), torch.tensor([5.0, 0.0, -11.0]))


def test_deconvnet_refuses_a_checkpoint_which_would_run_the_plain_activation_again(volume):
    class Net(nn.Module):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(F.relu, x, use_reentrant=False).mean((2, 3, 4))

    with pytest.raises(CoverageError, match="deconvnet cannot replace what a checkpoint runs again"):
        Deconvnet()(Net(), volume, ClassLogit(0))


@pytest.mark.parametrize("axes", [2, 3])
def test_guided_grad_cam_is_the_product_on_the_input_grid(volume, axes):
    volume = volume if axes == 3 else volume[..., 0]
    net = random_net(axes=axes)
    coarse = GradCAM("4")(net, volume, ClassLogit(1))
    mode = {2: "bilinear", 3: "trilinear"}[axes]
    expected = F.interpolate(coarse, size=volume.shape[2:], mode=mode) * GuidedBackprop()(net, volume, ClassLogit(1))
    assert_close(GuidedGradCAM("4")(net, volume, ClassLogit(1)), expected)
    assert expected.abs().max() > 0
