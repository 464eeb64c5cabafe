"""Randomisation: which weights change, what becomes of normalisation, and what known maps do under it."""

import numpy as np
import pytest
import torch
from torch import nn

from volsal.audit.metric import MetricError, Undefined
from volsal.audit.sanity import (
    excess,
    label_randomisation,
    parameterised,
    random_logit,
    randomisation,
    randomised,
    unrelated,
)
from volsal.audit.similarity import similarity
from volsal.grid import Grid

GRID = Grid((8, 8, 8), np.eye(4))


class Net(nn.Module):
    """Registered in another order than used; ``spare`` is not called."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.spare = nn.Conv3d(1, 1, 1)
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm3d(4)
        self.second = nn.utils.parametrizations.weight_norm(nn.Conv3d(4, 4, 3, padding=1))
        self.later = nn.BatchNorm3d(4)
        self.bare = nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.later(self.second(x)))
        return self.head(x.mean((2, 3, 4)) * self.bare)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    net.train()
    for _ in range(20):
        net(3 + 2 * torch.randn(4, 1, 8, 8, 8))
    return net.eval()


@pytest.fixture
def inputs():
    return 3 + 2 * torch.randn(6, 1, 8, 8, 8, generator=torch.Generator().manual_seed(2))


def changed(net, other):
    return {name for name, value in net.state_dict().items() if not torch.equal(value, other.state_dict()[name])}


def test_layers_come_in_the_order_of_use(net, inputs):
    layers = parameterised(net, inputs[:1])
    assert layers[0] == ""  # the model's own weight
    assert layers[1:3] == ["first", "norm"]
    assert [layer for layer in layers if "weight_norm" not in layer and "parametrizations" not in layer][3:] == [
        "second", "later", "head", "spare",
    ]  # fmt: skip
    assert not any(module._forward_pre_hooks for module in net.modules() if "Parametr" not in type(module).__name__)


def test_only_the_layers_named_are_drawn_anew_and_the_model_stays(net, inputs):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    other = randomised(net, ["head"], statistics="kept")
    assert changed(net, other) == {"head.weight", "head.bias"}
    assert not [name for name, value in before.items() if not torch.equal(value, net.state_dict()[name])]
    again, else_ = randomised(net, ["head"], statistics="kept"), randomised(net, ["head"], 1, statistics="kept")
    assert not changed(other, again)
    assert changed(other, else_)


@pytest.mark.parametrize("mode", ["cascading", "independent"])
def test_some_depths_of_a_cascade_are_those_of_the_whole_one(net, inputs, mode):
    def explain(model):
        volume = inputs[:1].clone().requires_grad_(True)
        return torch.autograd.grad(model(volume)[0, 0], volume)[0][0, 0].detach().numpy()

    layers = parameterised(net, inputs[:1])
    whole = list(randomisation(net, explain, GRID, layers, mode, inputs=inputs))
    some = list(randomisation(net, explain, GRID, layers, mode, inputs=inputs, depths=(2, len(layers))))
    assert some == [whole[1], whole[-1]]


def test_a_network_is_not_drawn_again_as_it_was_made():
    torch.manual_seed(0)
    layer = nn.Conv3d(2, 3, 3)
    assert abs(np.corrcoef(layer.weight.detach().ravel(), randomised(layer, [""]).weight.detach().ravel())[0, 1]) < 0.3
    permuted = randomised(layer, [""]).weight.sort().values
    assert not torch.equal(permuted, layer.weight.sort().values)


def test_weights_without_a_reset_are_permuted(net):
    other = randomised(net, [""], statistics="kept")
    assert changed(net, other) == {"bare"}
    assert torch.equal(net.bare.sort().values, other.bare.sort().values)
    layers = [name for name, module in net.named_modules() if name.startswith("second") and
              list(module.parameters(recurse=False))]  # fmt: skip
    other = randomised(net, layers, statistics="kept")
    assert {"second.bias", "second.parametrizations.weight.original1"} <= changed(net, other)
    x = torch.randn(1, 4, 8, 8, 8)
    assert not torch.allclose(other.second(x), net.second(x))


def test_statistics_are_kept_or_reset_as_asked(net):
    other = randomised(net, ["norm", "first"], statistics="kept")
    assert torch.equal(other.norm.running_mean, net.norm.running_mean)
    other = randomised(net, ["head"], statistics="reset")
    assert (other.norm.running_mean == 0).all()
    assert (other.later.running_var == 1).all()


def test_statistics_are_estimated_after_what_was_randomised_and_only_there(net, inputs):
    other = randomised(net, ["second.parametrizations.weight", "second"], inputs=inputs)
    assert torch.equal(other.norm.running_mean, net.norm.running_mean)
    assert torch.equal(other.norm.running_var, net.norm.running_var)
    assert not torch.allclose(other.later.running_mean, net.later.running_mean)
    other = randomised(net, ["first"], inputs=inputs)
    values = other.first(inputs).detach()
    assert other.norm.running_mean == pytest.approx(values.mean((0, 2, 3, 4)), abs=1e-5)
    assert other.norm.running_var == pytest.approx(values.var((0, 2, 3, 4)), rel=1e-3)
    assert (other.norm.momentum, other.norm.training) == (net.norm.momentum, False)
    kept = randomised(net, ["first"], statistics="kept")
    with torch.no_grad():
        off = [abs(float(model.norm(model.first(inputs)).mean())) for model in (other, kept)]
    assert off[0] < 0.1 < off[1]  # activations in a range that the trained layers never saw


def test_what_cannot_be_randomised_is_refused(net):
    with pytest.raises(MetricError, match="did you mean 'head'"):
        randomised(net, ["heads"], statistics="kept")
    with pytest.raises(MetricError, match="no inputs are given"):
        randomised(net, ["head"])
    with pytest.raises(MetricError, match="estimated, kept, reset"):
        randomised(net, ["head"], statistics="none")


def gradient_map(volume):
    def explain(model):
        x = volume.clone().requires_grad_()
        return torch.autograd.grad(model(x)[:, 1].sum(), x)[0][0, 0].numpy()

    return explain


def test_the_gradient_of_a_product_of_layers_loses_all_likeness_and_an_edge_map_none():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    volume = torch.randn(1, 1, 8, 8, 8)
    layers = parameterised(net, volume)
    assert layers == ["1", "3"]
    steps = list(randomisation(net, gradient_map(volume), GRID, layers))
    assert [(step.layer, step.randomised) for step in steps] == [("3", 1), ("1", 2)]
    assert abs(steps[-1].similarity.spearman) < 0.2
    alone = list(randomisation(net, gradient_map(volume), GRID, layers, "independent"))
    assert [(step.layer, step.randomised) for step in alone] == [("3", 1), ("1", 1)]
    assert alone[0].similarity == steps[0].similarity
    assert alone[1].similarity != steps[1].similarity
    blind = list(randomisation(net, lambda _: np.abs(volume[0, 0].numpy()), GRID, layers))
    assert [step.similarity.spearman for step in blind] == pytest.approx([1, 1])
    baseline = [one.spearman_abs for one in unrelated([gradient_map(volume)(randomised(net, layers, seed))
                                                       for seed in range(6)], GRID)]  # fmt: skip
    assert len(baseline) == 15
    assert excess([steps[-1].similarity.spearman_abs], baseline) < 0.2
    assert excess([blind[-1].similarity.spearman_abs], baseline) > 0.8


def test_guided_backprop_is_less_sensitive_than_the_gradient_as_the_literature_says():
    """Nie et al., ICML 2018: guided backprop of a random convolutional network nearly restores the image.

    With the upper layers randomised, its map stays closer to the trained one than the gradient's.
    """
    from volsal.attribution import ClassLogit, GuidedBackprop, InputGradient, attribute

    torch.manual_seed(0)
    layers = [nn.Conv3d(1, 12, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv3d(12, 12, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(96, 2)).eval()
    volume = torch.zeros(1, 1, 12, 12, 12)
    volume[:, :, 3:8, 4:9, 2:7] = 1
    volume += 0.1 * torch.randn(volume.shape)
    grid = Grid((12, 12, 12), np.eye(4))
    upper = parameterised(net, volume)[2:]
    likeness = {}
    for method in (GuidedBackprop(), InputGradient()):
        trained, random = (
            attribute(model, volume, [method], [ClassLogit(1)])[0].maps[0][0, 0].detach().numpy()
            for model in (net, randomised(net, upper))
        )
        likeness[method.id] = similarity(trained, random, grid).spearman_abs
    assert likeness["guided-backprop"] > likeness["input-gradient"] + 0.2


def test_unrelated_maps_are_compared_in_different_pairs():
    generator = np.random.default_rng(0)
    maps = [generator.random(GRID.shape) for _ in range(5)]
    found = unrelated(maps, GRID, pairs=4)
    assert len(found) == 4
    assert len({one.spearman for one in found}) == 4
    assert len(unrelated(maps, GRID)) == 10
    assert abs(np.mean([one.spearman for one in unrelated(maps, GRID)])) < 0.1
    with pytest.raises(MetricError, match="2 maps or more"):
        unrelated(maps[:1], GRID)


def test_the_excess_leaves_undefined_figures_out():
    assert excess([0.5, Undefined("a")], [0.1, 0.3]) == pytest.approx(0.3)
    assert isinstance(excess([Undefined("a")], [0.1]), Undefined)
    assert isinstance(excess([0.1], []), Undefined)


def test_maps_for_other_outputs_and_of_random_labels_are_compared():
    generator = np.random.default_rng(0)
    maps = [generator.random(GRID.shape) for _ in range(3)]
    found = random_logit(maps.__getitem__, 1, [0, 1, 2], GRID)
    assert found == {0: similarity(maps[1], maps[0], GRID), 2: similarity(maps[1], maps[2], GRID)}
    assert random_logit(maps.__getitem__, 0, [0], GRID) == {}
    assert label_randomisation(maps[0], maps[0], GRID).ssim == pytest.approx(1)
