"""Occlusion against a linear model's closed form and a naive loop."""

import numpy as np
import pytest
import torch
from conftest import SHAPE
from nets import random_net
from torch import nn
from torch.testing import assert_close

from volsal import ClassLogit, ClassMargin, Occlusion
from volsal.attribution import Context
from volsal.grid import Grid


def linear(channels=1, shape=SHAPE, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * int(np.prod(shape)), 3)).double()


def boxes(size, edge, step):
    """Every box over an axis, found by looking: as few as cover it, the same overhang at both ends."""
    count = next(n for n in range(1, size + 1) if (n - 1) * step + edge >= size)
    over = (count - 1) * step + edge - size
    return [range(max(0, i * step - over // 2), min(size, i * step - over // 2 + edge)) for i in range(count)]


def by_hand(shape, edge, step, drop):
    """The mean over covering boxes of ``drop(mask)``, (*shape), voxel by voxel."""
    total, covering = np.zeros(shape), np.zeros(shape)
    axes = [boxes(*axis) for axis in zip(shape, edge, step, strict=True)]
    for a in axes[0]:
        for b in axes[1]:
            for c in axes[2]:
                mask = np.zeros(shape, dtype=bool)
                mask[np.ix_(a, b, c)] = True
                total[mask] += drop(torch.from_numpy(mask))
                covering[mask] += 1
    assert covering.min() >= 1
    return total / covering


LATTICES = [((3, 3, 3), None), ((2, 4, 5), (1, 2, 5)), ((7, 3, 20), (2, 3, 1)), ((1, 1, 4), (1, 1, 3))]


@pytest.mark.parametrize(("edge", "step"), LATTICES)
@pytest.mark.parametrize("fill", ["blur", "noise", -2.0])
def test_on_a_linear_model_a_box_is_worth_its_weights_times_what_was_there(edge, step, fill, volume):
    net = linear()
    method = Occlusion(box=edge, stride=step, fill=fill)
    worth = net[1].weight[2].detach().view(SHAPE) * (volume - method.filling(volume, edge, Context()))[:, 0]
    expected = np.stack(
        [by_hand(SHAPE, edge, step or _half(edge), lambda mask, w=w: float(w[mask].sum())) for w in worth]
    )
    assert_close(method(net, volume, ClassLogit(2))[:, 0].numpy(), expected)


def _half(edge):
    return tuple(max(1, n // 2) for n in edge)


@pytest.mark.parametrize("batch", [1, 5])
def test_is_the_naive_loop_on_a_network(batch, volume):
    net = random_net().eval()
    target = ClassMargin(0, 2)

    def drop(mask):
        with torch.no_grad():
            return float(target(net(x)) - target(net(torch.where(mask, 0.25, x))))

    result = Occlusion(box=(3, 4, 5), fill=0.25, batch=batch)(net, volume, target)
    for number, ours in enumerate(result):
        x = volume[number : number + 1]
        assert_close(ours[0].numpy(), by_hand(SHAPE, (3, 4, 5), (1, 2, 2), drop))


def test_each_channel_on_its_own(volume):
    x = torch.cat([volume, volume.flip(2), 3 * volume], 1)
    net = linear(3)
    apart = Occlusion(box=4, channels="each", fill="mean")(net, x, ClassLogit(0))
    assert apart.shape == x.shape
    # A linear model's channels add up.
    assert_close(apart.sum(1, keepdim=True), Occlusion(box=4, fill="mean")(net, x, ClassLogit(0)))
    net[1].weight.data.view(3, 3, *SHAPE)[:, 1] = 0
    blind = Occlusion(box=4, channels="each")(net, x, ClassLogit(0))
    assert_close(blind[:, 1], torch.zeros_like(blind[:, 1]))
    assert float(blind[:, [0, 2]].abs().min()) > 0


def test_in_two_dimensions(volume):
    x = volume[..., 0]
    net = linear(1, SHAPE[:2])
    flat = Occlusion(box=(3, 4), fill="zero")(net, x, ClassLogit(1))
    deep = Occlusion(box=(3, 4, 1), fill="zero")(net, x[..., None], ClassLogit(1))
    assert_close(flat, deep[..., 0])


def test_mirrored_when_the_boxes_fit_symmetrically():
    # 12 voxels: boxes of 5 every 3 reach over by 2, one voxel at either end.
    assert boxes(12, 5, 3)[0] == range(4)
    assert boxes(12, 5, 3)[-1] == range(8, 12)
    x = torch.randn(1, 1, 12, 12, 12, dtype=torch.float64)
    net = linear(1, (12, 12, 12))
    mirrored = linear(1, (12, 12, 12))
    mirrored[1].weight.data = net[1].weight.data.view(3, 12, 12, 12).flip(1, 2, 3).reshape(3, -1)
    method = Occlusion(box=5, stride=3)
    assert_close(
        method(mirrored, x.flip(2, 3, 4), ClassLogit(0)).flip(2, 3, 4),
        method(net, x, ClassLogit(0)),
        rtol=1e-6,
        atol=1e-9,
    )


def test_the_figures_say_what_the_boxes_became():
    grid = Grid((30, 40, 50), np.diag([1.0, -2.0, 3.5, 1.0]))
    x = torch.randn(1, 1, 30, 40, 50)
    net = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten())
    answer = Occlusion(box_mm=20, fill="zero").attribute(net, x, [ClassLogit(0)], Context(grid=grid))
    assert answer.facts[0]["box_voxels"] == [20, 10, 6]
    assert answer.facts[0]["box_mm"] == pytest.approx([20, 20, 21])
    assert answer.facts[0]["boxes"] == 2 * 7 * 16


def test_finds_the_place_that_the_score_depends_on():
    x = torch.zeros(1, 1, 24, 24, 24)
    x[..., 5:9, 12:16, 17:21] = 1
    net = nn.Sequential(nn.MaxPool3d(4, 1), nn.AdaptiveMaxPool3d(1), nn.Flatten())
    drops = Occlusion(box=6, stride=3, fill="zero")(net, x, ClassLogit(0))[0, 0]
    peak = (drops == drops.max()).nonzero().double().mean(0)
    assert_close(peak, torch.tensor([6.5, 13.5, 18.5]).double(), atol=2.5, rtol=0)
    assert float(drops[15:].abs().max()) == 0
