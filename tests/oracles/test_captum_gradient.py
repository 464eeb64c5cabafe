"""captum, an independent implementation, as the oracle of the gradient family where it is right.

Its DeepLIFT is not, by its own convergence delta, where there is max-pooling (the change is taken at the scan's maximum
alone), products of two variables, or activations that are not modules each used once.  There closed forms and the sum
are the oracle, in test_deep_lift.py.
"""

import pytest
import torch
from nets import SPELLINGS, ModuleNet, SpelledNet
from torch import nn
from torch.testing import assert_close

from volsal import (
    ClassLogit,
    Deconvnet,
    DeepLIFT,
    ExpectedGradients,
    GradientTimesInput,
    InputGradient,
    IntegratedGradients,
    SmoothGrad,
    SmoothGradSquared,
    VarGrad,
)

attr = pytest.importorskip("captum.attr", reason="captum is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting (forward|backward):UserWarning"),
    pytest.mark.filterwarnings("ignore:Input Tensor .* did not already require gradients:UserWarning"),
]


class Plain(nn.Module):
    """Modules, each used once."""

    def __init__(self, axes, activation):
        super().__init__()
        torch.manual_seed(4)
        conv, pool = {2: (nn.Conv2d, nn.AvgPool2d), 3: (nn.Conv3d, nn.AvgPool3d)}[axes]
        self.body = nn.Sequential(
            conv(2, 4, 3, padding=1), activation(), pool(2), conv(4, 5, 3), activation(), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.LazyLinear(3)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture(params=[2, 3], ids=["2D", "3D"])
def axes(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture
def x(axes, dtype):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(3, 2, *(8, 10, 6)[:axes], dtype=torch.float64, generator=generator).to(dtype)


def build(axes, x, activation=nn.ReLU):
    net = Plain(axes, activation).to(x.dtype)
    net(x)
    return net.eval()


def assert_same(ours, theirs, dtype):
    top = float(theirs.detach().abs().max())
    assert top > 0
    assert_close(ours, theirs.detach().to(ours.dtype), rtol=0, atol=top * (1e-4 if dtype == torch.float32 else 1e-8))


@pytest.mark.parametrize("baseline", ["zero", 0.4, "tensor"])
@pytest.mark.parametrize("steps", [1, 12])
def test_integrated_gradients(axes, dtype, x, baseline, steps):
    net = build(axes, x)
    setting = x.flip(0) if baseline == "tensor" else baseline
    theirs = {"zero": 0, 0.4: 0.4, "tensor": x.flip(0)}[baseline]
    ours = IntegratedGradients(setting, steps=steps, tolerance=None, batch=5).attribute(net, x, [ClassLogit(1)])
    expected, delta = attr.IntegratedGradients(net).attribute(
        x, theirs, target=1, n_steps=steps, method="gausslegendre", return_convergence_delta=True
    )
    assert_same(ours.maps[0], expected, torch.float32)  # captum's points are in single precision
    assert_close(torch.tensor(ours.facts[0]["delta"]), delta.float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Tanh, nn.Sigmoid])
@pytest.mark.parametrize("baseline", [0.0, 0.4])
def test_deep_lift(axes, dtype, x, activation, baseline):
    net = build(axes, x, activation)
    against = torch.full_like(x, baseline)
    expected, delta = attr.DeepLift(net).attribute(x, against, target=1, return_convergence_delta=True)
    assert float(delta.detach().abs().max()) < 1e-5  # else it is no oracle
    answer = DeepLIFT(baseline).attribute(net, x, [ClassLogit(1)])
    assert_same(answer.maps[0], expected, dtype)
    assert sum(answer.coverage.values()) == 2


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_deep_lift_and_deconvnet_are_captums_of_the_module_net_in_every_spelling(spelling, volume):
    net = SpelledNet(SPELLINGS[spelling])
    expected = attr.DeepLift(ModuleNet()).attribute(volume, target=2).detach()
    assert_close(DeepLIFT()(net, volume, ClassLogit(2)), expected)
    expected = attr.Deconvolution(ModuleNet()).attribute(volume, target=2)
    assert_close(Deconvnet()(net, volume, ClassLogit(2)), expected)


def test_gradient_times_input_and_deconvnet(axes, dtype, x):
    net = build(axes, x)
    assert_same(GradientTimesInput()(net, x, ClassLogit(2)), attr.InputXGradient(net).attribute(x, target=2), dtype)
    assert_same(Deconvnet()(net, x, ClassLogit(2)), attr.Deconvolution(net).attribute(x, target=2), dtype)


@pytest.mark.parametrize(
    ("method", "kind"), [(SmoothGrad, "smoothgrad"), (SmoothGradSquared, "smoothgrad_sq"), (VarGrad, "vargrad")]
)
def test_smooth_grad_and_its_kin_with_equal_noise(axes, dtype, x, method, kind, monkeypatch):
    net, generator = build(axes, x), torch.Generator().manual_seed(9)
    one = x[:1]  # captum's noise is of one size for every channel
    one[:, 1] *= float((one[:, 0].max() - one[:, 0].min()) / (one[:, 1].max() - one[:, 1].min()))
    span = float(one[:, 0].max() - one[:, 0].min())
    drawn = torch.cat([torch.randn(one.shape, generator=generator) for _ in range(6)]).to(dtype)
    monkeypatch.setattr(torch, "normal", lambda mean, deviation: deviation.to(dtype) * drawn)
    expected = attr.NoiseTunnel(attr.Saliency(net)).attribute(
        one, nt_type=kind, nt_samples=6, stdevs=0.1 * span, target=1, abs=False
    )
    assert_same(method(samples=6, sigma=0.1, seed=9, batch=4)(net, one, ClassLogit(1)), expected, torch.float32)


def test_expected_gradients_agree_with_captums_gradient_shap_without_its_noise(x):
    net, baselines = build(x.ndim - 2, x), torch.stack([torch.full_like(x[0], value) for value in (-0.5, 0.0, 0.6)])
    torch.manual_seed(0)
    expected = attr.GradientShap(net).attribute(x, baselines, n_samples=500, stdevs=0.0, target=1).detach()
    result = ExpectedGradients(baselines, samples=300, batch=100)(net, x, ClassLogit(1))
    assert float((result - expected).abs().mean()) < 0.1 * float(expected.abs().mean())
    plain = InputGradient()(net, x, ClassLogit(1)) * (x - baselines.mean(0))
    assert float((plain - expected).abs().mean()) > 0.2 * float(expected.abs().mean())  # which tells it from less
