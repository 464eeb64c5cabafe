"""SmoothGrad and its kin, on scores whose gradients are known."""

import pytest
import torch
from nets import random_net
from torch import nn
from torch.testing import assert_close

from volsal import ClassLogit, InputGradient, PredictedClass, SmoothGrad, SmoothGradSquared, VarGrad
from volsal.attribution import SettingError, attribute


class Quadratic(nn.Module):
    """score_k = sum over voxels of w_k x^2 / 2, so that its gradient is w_k x."""

    def forward(self, x):
        half = x.flatten(1).square().sum(1, keepdim=True) / 2
        return half * torch.tensor([[1.0, -3.0]], dtype=x.dtype)


def noise(volume, samples, sigma, seed):
    """(samples, 1, C, *spatial): the same for every volume, each channel's share of its own range still to come."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(1, *volume.shape[1:], generator=generator) for _ in range(samples)]).to(volume)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_a_quadratic_are_the_moments_of_the_noise(volume, batch, dtype):
    x = torch.cat([volume, 10 * volume + 3], dim=1).to(dtype)  # two channels of very different range
    axes = (2, 3, 4)
    span = x.amax(axes, keepdim=True) - x.amin(axes, keepdim=True)
    noisy = x + 0.2 * span * noise(x, 5, 0.2, 7)
    settings = {"samples": 5, "sigma": 0.2, "seed": 7, "batch": batch}
    targets = [ClassLogit(0), ClassLogit(1)]
    for method, expected, power in (
        (SmoothGrad, noisy.mean(0), 1),
        (SmoothGradSquared, noisy.square().mean(0), 2),
        (VarGrad, noisy.var(0, correction=0), 2),
    ):
        answer = method(**settings).attribute(Quadratic(), x, targets)
        for weight, ours in zip((1.0, -3.0), answer.maps, strict=True):
            assert_close(ours, weight**power * expected)
        assert answer.facts[1]["samples"] == 5
        assert_close(torch.tensor(answer.facts[0]["noise"], dtype=dtype), 0.2 * span.flatten(1))
        assert_close(answer.scores, list(Quadratic()(x).T))  # of the scan itself, not of its copies


def test_the_variance_survives_a_mean_far_larger(volume):
    x = volume.float() / 1000 + 1000  # E[g^2] - E[g]^2 would be rounding only
    settings = {"samples": 8, "sigma": 0.1}
    expected = VarGrad(**settings)(Quadratic(), x.double(), ClassLogit(0)).float()
    ours = VarGrad(**settings)(Quadratic(), x, ClassLogit(0))
    assert float((ours - expected).abs().max()) < 0.3 * float(expected.max())


def test_equal_settings_share_passes_and_others_do_not(volume):
    net, runs = random_net(), []
    net[0].register_forward_hook(lambda *_: runs.append(1))
    methods = [SmoothGrad(samples=4), VarGrad(samples=4), SmoothGradSquared(samples=4)]
    mean, variance, second = (answer.maps[0] for answer in attribute(net, volume, methods, [ClassLogit(0)]))
    assert len(runs) == 1 + 4
    assert_close(second, variance + mean**2)
    assert float(variance.max()) > 0
    attribute(net, volume, [SmoothGrad(samples=4), VarGrad(samples=4, seed=1)], [ClassLogit(0)])
    assert len(runs) == 5 + 2 * 5


def test_the_seed_decides_the_noise(volume):
    net = random_net()
    first, again, other = (SmoothGrad(4, seed=seed)(net, volume, ClassLogit(0)) for seed in (3, 3, 4))
    assert_close(first, again, rtol=0, atol=0)
    assert float((first - other).abs().max()) > 0.01 * float(first.abs().max())


def test_goes_over_into_the_gradient_as_the_noise_vanishes(volume):
    net = random_net()
    plain = InputGradient()(net, volume, ClassLogit(0))
    assert_close(SmoothGrad(3, sigma=1e-9)(net, volume, ClassLogit(0)), plain)
    assert float((SmoothGrad(3, sigma=0.3)(net, volume, ClassLogit(0)) - plain).abs().max()) > 1e-3 * plain.abs().max()


def test_a_constant_channel_gets_no_noise(volume):
    x = torch.cat([volume, torch.full_like(volume, 4.0)], dim=1)
    maps = VarGrad(3)(Quadratic(), x, ClassLogit(0))
    assert float(maps[:, 0].min()) > 0
    assert_close(maps[:, 1], torch.zeros_like(maps[:, 1]))


def test_copies_are_asked_of_the_class_that_was_predicted_for_the_scan():
    class Sides(nn.Module):
        def forward(self, x):  # which logit is larger changes with the sign of the noise
            mean = x.mean((2, 3, 4))
            return torch.cat([2 * mean, -mean], dim=1)

    x = torch.linspace(-1, 1.01, 8, dtype=torch.float64).view(1, 1, 2, 2, 2)
    assert_close(SmoothGrad(16, sigma=1.0)(Sides(), x, PredictedClass()), torch.full_like(x, 2 / 8))


@pytest.mark.parametrize(
    ("method", "settings", "told"),
    [
        (SmoothGrad, {"samples": 0}, "smooth-grad: samples is a whole number of at least 1, not 0"),
        (VarGrad, {"samples": 1}, "var-grad: samples is a whole number of at least 2, not 1"),
        (SmoothGrad, {"sigma": 0}, "smooth-grad: sigma is a number above 0, not 0"),
        (SmoothGrad, {"sigma": "high"}, "sigma is a number above 0, not 'high'"),
        (SmoothGrad, {"batch": 2.5}, "batch is a whole number of at least 1, not 2.5"),
        (SmoothGrad, {"seed": -1}, "seed is a whole number of at least 0, not -1"),
    ],
)
def test_settings_without_a_meaning_are_refused(method, settings, told):
    with pytest.raises(SettingError, match=told):
        method(**settings)
