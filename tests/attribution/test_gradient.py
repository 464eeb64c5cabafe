"""Gradient times input."""

import torch
from nets import random_net
from torch import nn
from torch.testing import assert_close

from volsal import ClassLogit, GradientTimesInput, InputGradient
from volsal.attribution import attribute


def test_of_a_linear_model_is_each_channels_own_share():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2 * 3, 1, bias=False)).double()
    net[1].weight.data = torch.tensor([[5.0, 7.0, -11.0, 2.0, 0.0, 1.0]], dtype=torch.float64)
    x = torch.tensor([[2.0, -1.0, 3.0], [0.0, 4.0, 0.5]], dtype=torch.float64).view(1, 2, 3, 1, 1)
    result = GradientTimesInput()(net, x, ClassLogit(0))
    assert_close(result.view(2, 3), torch.tensor([[10.0, -7.0, -33.0], [0.0, 0.0, 0.5]], dtype=torch.float64))


def test_adds_up_to_the_logit_of_a_network_of_relus_without_biases(volume):
    net = random_net()
    for module in net:
        if getattr(module, "bias", None) is not None:
            module.bias.data.zero_()
    net[3] = nn.Identity()  # normalisation has a bias of its own
    answer = GradientTimesInput().attribute(net, volume, [ClassLogit(1)])
    assert_close(answer.maps[0].flatten(1).sum(1), answer.scores[0])
    assert float(answer.scores[0].abs().min()) > 0


def test_shares_the_gradients_pass(volume):
    net, runs = random_net(), []
    net[0].register_forward_hook(lambda *_: runs.append(1))
    gradient, product = attribute(net, volume, [InputGradient(), GradientTimesInput()], [ClassLogit(1)])
    assert len(runs) == 1
    assert_close(product.maps[0], gradient.maps[0] * volume)
