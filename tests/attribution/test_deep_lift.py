"""DeepLIFT's rescale rule: by hand, step by step, and as a sum on networks of every kind of step."""

import pytest
import torch
import torch.nn.functional as F
from nets import SPELLINGS, Scored, SpelledNet, random_net, voxels
from torch import nn
from torch.testing import assert_close

from volsal import ClassLogit, Deconvnet, DeepLIFT, GradientTimesInput, IntegratedGradients, PredictedClass
from volsal.attribution import BaselineError, Context, CoverageError


def lifted(function, x, base):
    answer = DeepLIFT(voxels(*base)).attribute(Scored(function), voxels(*x), [ClassLogit(0)])
    assert answer.facts[0]["relative_delta"] < 1e-12
    assert not answer.notes
    return answer.maps[0].flatten().tolist()


def test_of_a_relu_is_the_rise_over_the_run():
    # u = x1 + 2 x2 goes from 2 to -1: relu falls by 2 over a run of 3.
    assert lifted(lambda v: 5 * (v[:, 0] + 2 * v[:, 1]).relu(), (3, -2), (2, 0)) == pytest.approx(
        [5 * 2 / 3 * 1, 5 * 2 / 3 * -4]
    )


def test_sees_what_the_gradient_does_not():
    # 1 - relu(1 - x) has gradient 0 at x = 2; from 0 to 2 it has risen by 1.  (The paper's section 3.1.)
    saturated = lambda v: 1 - (1 - v[:, 0]).relu()  # noqa: E731
    assert lifted(saturated, (2,), (0,)) == pytest.approx([1])
    assert float(GradientTimesInput()(Scored(saturated), voxels(2), ClassLogit(0))) == 0


def test_of_a_product_is_each_factor_times_the_others_mean():
    assert lifted(lambda v: v[:, 0] * v[:, 1], (4, 5), (1, -1)) == pytest.approx([3 * 2, 6 * 2.5])
    assert lifted(lambda v: v[:, 0] * v[:, 0], (4,), (1,)) == pytest.approx([15])
    assert lifted(lambda v: v[:, 0] / v[:, 1], (6, 2), (1, 1)) == pytest.approx([5 * 0.75, -0.5 * 3.5])


def test_of_a_maximum_goes_to_the_cell_that_held_the_larger():
    pooled = lambda v: F.max_pool1d(v[:, None], v.shape[1]).flatten()  # noqa: E731
    assert lifted(pooled, (1, 5, 2), (3, 0, 0)) == pytest.approx([0, 2, 0])  # 5 - 3, to the one that is 5
    assert lifted(pooled, (1, 2, 0), (1, 0, 9)) == pytest.approx([0, 0, -7])  # 2 - 9, to the one that was 9


def test_of_overlapping_maxima_is_the_sum():
    # windows (1, 4), (4, 2) of (1, 4, 2): both maxima are the middle one
    twice = lambda v: F.max_pool1d(v[:, None], 2, stride=1).sum((1, 2))  # noqa: E731
    assert lifted(twice, (1, 4, 2), (0, 0, 0)) == pytest.approx([0, 8, 0])


def test_where_nothing_changed_the_slope_is_the_derivative():
    # gelu's input is the same in both; what its derivative passes on is shared out all the same.
    function = lambda v: F.gelu(v[:, 0] + v[:, 1])  # noqa: E731
    at = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.gelu(at), at)
    assert lifted(function, (3, -2), (0, 1)) == pytest.approx([3 * float(slope), -3 * float(slope)])


def test_a_baseline_without_contrast_does_not_blow_up_what_is_normalised():
    # From a constant the normalised values grow from 0: all of it is their own, as of a linear step.
    norm = lambda v: F.instance_norm(v[:, None])[:, 0, 1]  # noqa: E731
    x = (1.0, 4.0, 7.0, -2.0)
    values = torch.tensor(x, dtype=torch.float64)
    scale = float(torch.rsqrt(values.var(correction=0) + 1e-5))
    expected = [scale * value * (0.75 if at == 1 else -0.25) for at, value in enumerate(x)]
    assert lifted(norm, x, (0, 0, 0, 0)) == pytest.approx(expected)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_adds_up_in_every_spelling_of_relu_and_is_the_same(spelling, volume):
    targets = [ClassLogit(0), ClassLogit(2)]
    answer = DeepLIFT(0.3).attribute(SpelledNet(SPELLINGS[spelling]), volume, targets)
    assert sum(answer.coverage.values()) == 3
    assert_close(answer.maps, DeepLIFT(0.3).attribute(SpelledNet(F.relu), volume, targets).maps)
    for facts in answer.facts:
        assert max(facts["relative_delta"]) < 1e-10


class Attending(nn.Module):
    """Tokens, attention in two spellings, layer norm, GELU."""

    def __init__(self):
        super().__init__()
        self.cut = nn.Conv2d(1, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        tokens = self.cut(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(tokens)).chunk(3, -1)
        tokens = tokens + self.out((torch.einsum("bqc,bkc->bqk", q, k) * 8**-0.5).softmax(-1) @ v)
        q, k, v = self.qkv(self.norm(tokens)).chunk(3, -1)
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
        tokens = tokens + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.head(F.gelu(tokens)).mean(1)


class Gated(nn.Module):
    """Instance and group norm, smooth activations in place, a squeezing gate, max-pooling of several kinds."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.group = nn.InstanceNorm2d(6, affine=True), nn.GroupNorm(3, 6)
        self.gate, self.head = nn.Conv2d(6, 6, 1), nn.Linear(12, 3)

    def forward(self, x):
        x = nn.MaxPool2d(3, 2, padding=1)(F.leaky_relu_(self.norm(self.first(x)), 0.1))
        y = F.silu(self.group(self.second(x)), inplace=True)
        y = y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1)))
        y = (y + x).relu_()
        y *= F.hardsigmoid(self.gate(y))
        return self.head(torch.cat([F.adaptive_max_pool2d(y, 1), F.softplus(y).mean((2, 3), True)], 1).flatten(1))


@pytest.mark.parametrize("net", [Attending, Gated, lambda: random_net(axes=2)])
@pytest.mark.parametrize("baseline", ["zero", "mean", "blur", 0.7])
@pytest.mark.parametrize(("dtype", "closeness"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_adds_up_on_networks_of_every_step(net, baseline, dtype, closeness):
    torch.manual_seed(1)
    model = net().to(dtype)
    for parameter in model.parameters():  # normalisation starts with weights of 1 and biases of 0, which hide much
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(2, 1, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(dtype)
    answer = DeepLIFT(baseline, blur=2.0).attribute(model, x, [ClassLogit(0), PredictedClass()])
    assert_close(answer.output, model.eval()(x).detach())  # steps made of others have the model's own values
    for values, score, facts in zip(answer.maps, answer.scores, answer.facts, strict=True):
        change = score - torch.tensor(facts["baseline_score"], dtype=dtype)
        assert_close(values.flatten(1).sum(1), change, rtol=closeness, atol=closeness * 1e-2)
        assert float(change.abs().max()) > 1e-3
        assert float(values.abs().sum()) < 1e4 * float(change.abs().max())
        assert max(facts["relative_delta"]) < closeness
    assert not answer.notes


@pytest.mark.parametrize("method", [DeepLIFT, Deconvnet])
def test_a_model_may_write_into_what_an_activation_returned(method, volume):
    class Net(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            torch.manual_seed(2)
            self.conv, self.inplace = nn.Conv3d(1, 3, 3, padding=1).double(), inplace

        def forward(self, x):
            y = F.relu(self.conv(x))
            if self.inplace:
                y += x
            else:
                y = y + x
            return F.relu(y).mean((2, 3, 4))

    assert_close(method()(Net(True), volume, ClassLogit(1)), method()(Net(False), volume, ClassLogit(1)))


def test_a_division_by_a_constant_is_no_bent_step():
    answer = DeepLIFT(voxels(1)).attribute(Scored(lambda v: v[:, 0] / 4), voxels(3), [ClassLogit(0)])
    assert answer.coverage == {}
    assert_close(answer.maps[0], voxels(0.5))


def test_costs_one_inference_and_one_gradient_for_all_targets(volume):
    net, runs = random_net(), []
    net[0].register_forward_hook(lambda *_: runs.append(1))
    DeepLIFT().attribute(net, volume, [ClassLogit(0), ClassLogit(1), PredictedClass()])
    assert len(runs) == 2


def test_of_a_linear_model_is_the_weight_times_the_difference(volume):
    net = nn.Sequential(nn.Flatten(), nn.Linear(volume[0].numel(), 2)).double()
    expected = net[1].weight[1].detach().view_as(volume[:1]) * (volume - 1.5)
    assert_close(DeepLIFT(1.5)(net, volume, ClassLogit(1)), expected)


def test_a_scan_is_compared_with_a_scan(volume):
    context = Context(input_of=lambda path: torch.full((1, 1, *volume.shape[2:]), 2.0))
    net = random_net()
    answer = DeepLIFT("mean.nii.gz").attribute(net, volume, [ClassLogit(0)], context)
    assert_close(answer.maps[0], DeepLIFT(2.0)(net, volume, ClassLogit(0)))
    with pytest.raises(BaselineError, match="cannot be read here"):
        DeepLIFT("mean.nii.gz")(net, volume, ClassLogit(0))


def test_a_step_that_it_does_not_know_shows_in_the_sum_and_in_a_note():
    net = Scored(lambda v: torch.where(v > 0, v, 0.1 * v).cumprod(1)[:, -1])
    answer = DeepLIFT(voxels(-1, 2)).attribute(net, voxels(3, -2), [ClassLogit(0)])
    assert answer.facts[0]["relative_delta"] > 0.1
    assert answer.notes == [
        "class-0: the map does not add up to the score's change to within a hundredth, since the model or the target "
        "holds a step that the rescale rule does not know; integrated-gradients needs no rule"
    ]
    exact = IntegratedGradients(voxels(-1, 2), max_steps=2048).attribute(net, voxels(3, -2), [ClassLogit(0)])
    assert exact.facts[0]["relative_delta"] <= 0.01


def test_a_change_that_is_all_rounding_is_not_laid_on_the_rule():
    # Parts of some hundred thousand cancel inside the model: its scores are rounding, and so is the sum's miss.
    generator = torch.Generator().manual_seed(0)
    volume, weights = torch.randn(2, 1, 10, 10, 10, generator=generator), torch.randn(1000, generator=generator)
    parts = lambda v: (v * weights).relu().sum(1) - (v * weights).sum(1) / 2 - (v * weights).abs().sum(1) / 2  # noqa: E731
    net = Scored(lambda v: 1e3 * parts(v) + 1e-3 * v[:, 0]).float()
    answer = DeepLIFT(volume * (1 + 1e-6)).attribute(net, volume, [ClassLogit(0)])
    assert max(answer.facts[0]["relative_delta"]) > 0.1
    (note,) = answer.notes
    assert note.startswith("class-0: the map misses the score's change from the baseline by rounding alone")


def test_refuses_a_model_that_takes_another_way_for_the_baseline():
    def either(v):
        return v[:, 0].relu() if v.sum() > 0 else v[:, 0].tanh()

    with pytest.raises(CoverageError, match=r"another way for the scan \(tanh\) than for the baseline \(relu\)"):
        DeepLIFT(voxels(1))(Scored(either), voxels(-1), ClassLogit(0))

    def longer(v):
        return v[:, 0].relu() if v.sum() > 0 else v[:, 0]

    for x, base, told in ((1, -1, r"\(relu\).*\(the output\)"), (-1, 1, r"\(the output\).*\(relu\)")):
        with pytest.raises(CoverageError, match=told):
            DeepLIFT(voxels(base))(Scored(longer), voxels(x), ClassLogit(0))


@pytest.mark.parametrize("recurrent", [nn.GRU, nn.LSTM])
def test_refuses_a_recurrent_layer_whose_gates_it_cannot_reach(recurrent):
    torch.manual_seed(0)
    layer = recurrent(3, 2, batch_first=True)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x[:, 0, :, :, 0])[0].mean(1)

    with pytest.raises(CoverageError, match="DeepLIFT cannot reach every activation"):
        DeepLIFT()(Net(), torch.randn(1, 1, 4, 3, 1), ClassLogit(0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_refuses_an_activation_inside_a_scripted_part(volume):
    net = nn.Sequential(torch.jit.script(nn.ReLU()), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    with pytest.raises(CoverageError, match="DeepLIFT cannot reach every activation"):
        DeepLIFT()(net, volume, ClassLogit(0))


def test_refuses_a_checkpoint(volume):
    class Net(nn.Module):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(F.relu, x, use_reentrant=False).mean((2, 3, 4))

    with pytest.raises(CoverageError, match="DeepLIFT cannot replace what a checkpoint runs again"):
        DeepLIFT()(Net(), volume, ClassLogit(0))
