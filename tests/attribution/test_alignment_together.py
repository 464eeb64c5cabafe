"""Maps that are placed together are placed as one by one, from a single forward pass."""

import math

import pytest
import torch
from nets import random_net
from torch import nn
from torch.testing import assert_close

from volsal import ClassLogit, GradCAM, HiResCAM
from volsal.attribution import Context, attribute
from volsal.attribution.alignment.alignment import ALIGNMENTS, AlignmentError, Collector, Measured, _smoothed


def net_and_volume(batch=1):
    net = random_net()
    generator = torch.Generator().manual_seed(5)
    return net, torch.randn(batch, 1, 13, 12, 14, generator=generator, dtype=torch.float64)


def maps_of(net, volume, layers=("1", "4"), classes=(0, 1)):
    """What a rule is given, of two methods at each layer."""
    seen = []

    class Seen(Measured):
        def together(self, model, volume, maps):
            seen.extend(maps)
            return super().together(model, volume, maps)

    methods = [kind(layer) for layer in layers for kind in (GradCAM, HiResCAM)]
    attribute(net, volume, methods, [ClassLogit(number) for number in classes], Context(Seen()))
    return seen


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_each_map_is_placed_as_alone(kind, batch):
    net, volume = net_and_volume(batch)
    maps, rule = maps_of(net, volume), ALIGNMENTS[kind]()
    assert len(maps) == 8
    assert rule.together(net, volume, maps) == [rule(net, volume, one) for one in maps]


def test_the_maps_of_all_methods_layers_and_targets_are_followed_back_through_one_forward_pass():
    net, volume = net_and_volume()
    targets = [ClassLogit(0), ClassLogit(1)]
    methods = [GradCAM("1"), GradCAM("4"), HiResCAM("4")]
    attribute(net, volume, methods, targets, Context(Measured()))  # the layers are traced once
    runs = []
    handle = net[0].register_forward_hook(lambda *_: runs.append(1))
    found = attribute(net, volume, methods, targets, Context(Measured()))
    handle.remove()
    assert len(runs) == 2  # one for the maps, one for their places
    for method, answer in zip(methods, found, strict=True):
        for number, target in enumerate(targets):
            alone = method.attribute(net, volume, [target], Context(Measured()))
            assert answer.alignments[number] == alone.alignments[0]
            assert_close(answer.maps[number], alone.maps[0], rtol=0, atol=0)


def test_a_step_in_place_behind_a_layer_does_not_move_the_point_that_is_followed():
    """Layer "0" is followed by an in-place ReLU, and a later layer keeps the model running through it."""
    net, volume = net_and_volume()
    maps = maps_of(net, volume, ("0", "4"), (0,))
    rule = Measured(strict=True)
    assert rule.together(net, volume, maps) == [rule(net, volume, one) for one in maps]


class Halfway(nn.Module):
    """Its second layer cannot be followed back; what is before it can."""

    def __init__(self):
        super().__init__()
        self.net, self.broken = random_net(), False
        self.cut = nn.Identity()

    def forward(self, x):
        hidden = self.net[:2](x)
        hidden = self.cut(hidden.detach() if self.broken else hidden)
        return self.net[2:](hidden)


def test_what_cannot_be_followed_leaves_the_others_alone():
    net, volume = Halfway(), net_and_volume()[1]
    maps = maps_of(net, volume, ("net.1", "cut", "net.4"), (0,))
    net.broken = True
    placed = Measured().together(net, volume, maps)
    assert [one.kind for one in placed] == 2 * ["measured"] + 4 * ["half-pixel"]
    with pytest.raises(AlignmentError, match=r"layer 'cut' cannot be followed back to the input: no differentiable"):
        Measured(strict=True).together(net, volume, maps)


def test_a_model_that_fails_on_its_way_is_told_of_the_layers_that_it_did_not_reach():
    net, volume = net_and_volume()
    maps = maps_of(net, volume, classes=(0,))
    net[2].register_forward_hook(lambda *_: (_ for _ in ()).throw(ValueError("no further")))
    placed = Measured().together(net, volume, maps)
    assert [one.kind for one in placed] == 2 * ["measured"] + 2 * ["half-pixel"]
    with pytest.raises(AlignmentError, match=r"layer '4' cannot be followed back to the input: no further"):
        Measured(strict=True).together(net, volume, maps)


def test_what_is_collected_of_many_maps_is_what_single_ones_give():
    net, volume = net_and_volume(3)
    maps = maps_of(net, volume)
    together, apart = Collector(), Collector()
    together.together(net, volume, maps)
    for one in maps:
        apart(net, volume, one)
    assert together.pooled() == apart.pooled()
    assert len(together.pooled()) == len(maps)


@pytest.mark.parametrize("sigmas", [(0.1, 1.0, 2.5), (4.0, 0.5, 30.0)])
def test_evidence_is_smoothed_by_a_gaussian_cut_at_three_widths_with_nothing_beyond_the_edges(sigmas):
    generator = torch.Generator().manual_seed(6)
    values = torch.randn(5, 8, 13, generator=generator, dtype=torch.float64)
    expected = values
    for axis, sigma in enumerate(sigmas):
        reach = int(3 * sigma + 0.5)
        weights = {step: math.exp(-0.5 * (step / sigma) ** 2) for step in range(-reach, reach + 1)}
        lines = expected.movedim(axis, 0)
        total = sum(weights.values())
        expected = torch.stack(
            [
                sum(w / total * lines[i + step] for step, w in weights.items() if 0 <= i + step < len(lines))
                for i in range(len(lines))
            ]
        ).movedim(0, axis)
    assert_close(_smoothed(values, sigmas), expected, rtol=1e-6, atol=1e-9)
