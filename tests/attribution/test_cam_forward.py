"""CAMs that ask the model about changed copies, against the loops that their papers describe."""

import pytest
import torch
import torch.nn.functional as F
from nets import Linear3d, random_net
from torch import nn
from torch.testing import assert_close

from volsal import AblationCAM, ClassLogit, ClassMargin, PredictedClass, ScoreCAM
from volsal.attribution.alignment.alignment import FlipAverage, Measured, Nominal
from volsal.attribution.method import Context
from volsal.attribution.settings import SettingError

BOTH = [ScoreCAM, AblationCAM]


class Skips(nn.Module):
    """A small U-Net: what the layer "down" gives meets what never passed it."""

    def __init__(self, joins="cat"):
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.down = nn.Conv3d(4, 6, 2, stride=2)
        self.up = nn.ConvTranspose3d(6, 4, 2, stride=2)
        self.last = nn.Conv3d(8 if joins == "cat" else 4, 3, 1)
        self.joins = joins
        self.double()

    def forward(self, x):
        first = self.first(x).relu()
        up = self.up(self.down(first).relu())
        both = torch.cat([first, up], 1) if self.joins == "cat" else first + up
        return self.last(both).amax((2, 3, 4))


@pytest.fixture
def even():
    return torch.randn(2, 1, 6, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def ablated_by_hand(net, layer, volume, target):
    """Each channel set to 0 by itself, one volume and one channel at a time."""
    maps = []
    for one in volume:
        seen = []
        handle = net.get_submodule(layer).register_forward_hook(lambda m, i, o: seen.append(o.detach().clone()))  # noqa: B023
        whole = target(net(one[None]))
        handle.remove()
        (activation,) = seen
        total = torch.zeros_like(activation[:, :1])
        for channel in range(activation.shape[1]):
            gone = activation.clone()
            gone[:, channel] = 0
            # In place: whoever else holds the layer's output must see it too.
            handle = net.get_submodule(layer).register_forward_hook(lambda m, i, o: o.data.copy_(gone))  # noqa: B023
            total += (whole - target(net(one[None]))) * activation[:, channel : channel + 1]
            handle.remove()
        maps.append(total.relu())
    return torch.cat(maps).detach()


@pytest.mark.parametrize("target", [ClassLogit(0), ClassMargin(2, 1)])
@pytest.mark.parametrize(
    ("net", "layer"),
    [
        (random_net(inplace=False), "4"),
        (random_net(inplace=True), "0"),
        (random_net(inplace=True), "2"),
        (Skips("cat"), "down"),
        (Skips("add"), "down"),
        (Skips("add"), "first"),
    ],
)
@pytest.mark.parametrize("batch", [1, 4])
def test_ablation_cam_is_the_loop_over_channels(net, layer, target, batch, even):
    volume = even if isinstance(net, Skips) else torch.cat([even, -even], 2)
    expected = ablated_by_hand(net.eval(), layer, volume, target)
    assert float(expected.max()) > 0
    assert_close(AblationCAM(layer, batch=batch)(net, volume, target), expected)
    assert_close(AblationCAM(layer, batch=batch)(net, volume[1:], target), expected[1:])  # a batch of one broadcasts


class Remembered(nn.Module):
    """Its layer writes in place, and what it wrote is read again under the name that it had before."""

    def __init__(self, join):
        super().__init__()
        self.join = join
        torch.manual_seed(1)
        self.conv, self.layer = nn.Conv3d(1, 5, 3, padding=1), nn.ReLU(inplace=True)
        self.more = nn.Conv3d(5, 5, 3, padding=1)
        self.double()

    def forward(self, x):
        y = self.conv(x)
        return self.join(self.more, self.layer(y), y).amax((2, 3, 4))


@pytest.mark.parametrize(
    "join",
    [
        lambda more, z, y: more(z) + 2 * y,
        lambda more, z, y: z.roll(1, 1) * y,  # 0 if all channels are, under either name
    ],
)
def test_what_is_read_under_another_name_is_ablated_too(join, even):
    net = Remembered(join).eval()
    for volume in (even, even[:1]):
        expected = ablated_by_hand(net, "layer", volume, ClassLogit(2))
        assert_close(AblationCAM("layer")(net, volume, ClassLogit(2)), expected)


def test_the_network_before_the_layer_runs_once_for_many_ablated_copies(volume):
    stem = nn.Conv3d(1, 32, 3), nn.BatchNorm3d(32)
    net = nn.Sequential(*stem, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 2)).double().eval()
    before, after = [], []
    net[0].register_forward_hook(lambda m, i, o: before.append(len(o)))
    net[4].register_forward_hook(lambda m, i, o: after.append(len(o)))
    AblationCAM("1", batch=16)(net, volume, ClassLogit(0))
    assert before == [2, 2, 2, 2, 2]  # the scan, the try in both ways, 2 times 16 channels
    assert after == [2, 4, 2, 32, 32]


def test_ablation_cam_of_a_linear_network_is_its_weights_times_channel_means(volume):
    # S - S_c = v_c mean(A_c) = v_c w_c mean(x), so L = ReLU(sum_c v_c w_c^2 mean(x) x).
    net = Linear3d(w=[1.0, -2.0, 0.0], v=[[3.0, -0.5, 7.0]])
    mean = volume.mean((1, 2, 3, 4), keepdim=True)
    assert_close(AblationCAM("features")(net, volume, ClassLogit(0)), ((3.0 - 0.5 * 4) * mean * volume).relu())


def scored_by_hand(net, layer, volume, target, fill=0.0, place=None):
    maps = []
    for one in volume:
        seen = []
        handle = net.get_submodule(layer).register_forward_hook(lambda m, i, o: seen.append(o.detach().clone()))  # noqa: B023
        net(one[None])
        handle.remove()
        (activation,) = seen
        total = torch.zeros_like(activation[:, :1])
        for channel in range(activation.shape[1]):
            mask = activation[:, channel : channel + 1]
            if float(mask.max() - mask.min()) == 0:
                continue
            size = tuple(one.shape[1:])
            mask = place(mask, size) if place else F.interpolate(mask, size, mode="trilinear", align_corners=False)
            mask = (mask - mask.min()) / (mask.max() - mask.min())
            masked = mask * one[None] + (1 - mask) * fill
            weight = target(net(masked)) - target(net(torch.full_like(one, fill)[None]))
            total += weight * activation[:, channel : channel + 1]
        maps.append(total.relu())
    return torch.cat(maps).detach()


@pytest.mark.parametrize("fill", [0.0, -1.5])
@pytest.mark.parametrize(("layer", "target"), [("4", ClassLogit(2)), ("2", ClassMargin(0, 2)), ("0", ClassLogit(0))])
def test_score_cam_is_the_loop_over_channels(layer, target, fill, volume):
    net = random_net(inplace=False).eval()
    expected = scored_by_hand(net, layer, volume, target, fill)
    assert float(expected.max()) > 0
    assert_close(ScoreCAM(layer, fill=fill)(net, volume, target), expected)


def test_score_cam_masks_every_channel_of_the_input(volume):
    net = random_net(channels=2).eval()
    both = torch.cat([volume, volume.flip(2)], 1)
    assert_close(ScoreCAM("4")(net, both, ClassLogit(0)), scored_by_hand(net, "4", both, ClassLogit(0)))


@pytest.mark.parametrize("rule", [Nominal(), Measured()])
def test_score_cam_puts_its_masks_where_the_architecture_says_that_cells_look(rule, volume):
    net = random_net().eval()
    answer = ScoreCAM("4").attribute(net, volume, [ClassLogit(2)], Context(rule))
    (nominal,) = ScoreCAM("4").attribute(net, volume, [ClassLogit(2)], Context(Nominal())).alignments
    assert nominal.offset == (1.0, 1.0, 1.0)  # not the half pixel's
    assert answer.alignments[0].kind == rule.id
    assert_close(answer.maps[0], scored_by_hand(net, "4", volume, ClassLogit(2), place=nominal.place))


def constant_channel(net):
    net[2].weight.data[1] = 0  # channel 1 is one value in every cell, channel 2 is 0
    net[3].bias.data[1] = 3.0
    net[2].weight.data[2] = 0
    net[3].bias.data[2] = -3.0
    return net


@pytest.mark.parametrize("method", BOTH)
def test_a_channel_without_a_place_brings_no_nan(method, volume):
    net = constant_channel(random_net(inplace=False)).eval()
    if method is ScoreCAM:
        expected = scored_by_hand(net, "4", volume, ClassLogit(0))
    else:
        expected = ablated_by_hand(net, "4", volume, ClassLogit(0))
    assert_close(method("4")(net, volume, ClassLogit(0)), expected)
    assert float(method("4")(net, volume * 0, ClassLogit(0)).isnan().sum()) == 0
    dead = nn.Sequential(nn.Conv3d(1, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()).double()
    assert float(method("1")(dead, volume * 0, ClassLogit(0)).abs().max()) == 0


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_map_does_not_depend_on_how_many_copies_run_at_once(method, dtype, volume):
    net, x = random_net().eval().to(dtype), volume.to(dtype)
    maps = [method("2", batch=batch)(net, x, ClassLogit(1)) for batch in (1, 2, 3, 50)]
    for other in maps[1:]:
        assert_close(other, maps[0], rtol=1e-5, atol=1e-6 * float(maps[0].max()))


@pytest.mark.parametrize("method", BOTH)
def test_copies_are_asked_for_the_class_that_was_predicted_for_the_scan(method, volume):
    net = random_net().eval()
    net[-1].bias.data = torch.tensor([0.0, 0.02, 0.0], dtype=torch.float64)  # so that copies would change their minds
    predicted = net(volume).argmax(1)
    maps = method("2")(net, volume, PredictedClass())
    for one, index, values in zip(volume, predicted, maps, strict=True):
        assert_close(values[None], method("2")(net, one[None], ClassLogit(int(index))))


@pytest.mark.parametrize("method", BOTH)
def test_tells_how_far_it_is(method, volume):
    told = []
    context = Context(progress=lambda what, done, of: told.append((what, done, of)))
    method("4", batch=2).attribute(random_net(), volume, [ClassLogit(0)], context)
    assert told == [(method.id, 2, 5), (method.id, 4, 5), (method.id, 5, 5)]


@pytest.mark.parametrize("method", BOTH)
def test_a_mirrored_input_is_asked_too_where_the_rule_wants_it(method, volume):
    net, axes = random_net(), (2, 3, 4)
    answer = method("4").attribute(net, volume, [ClassLogit(2)], Context(FlipAverage()))
    here = method("4")(net, volume, ClassLogit(2))
    there = method("4")(net, volume.flip(axes), ClassLogit(2)).flip(axes)
    assert float(here.max()) > 0
    assert_close(answer.maps[0], (here + there) / 2)


@pytest.mark.parametrize("method", BOTH)
def test_the_parts_sum_to_the_map_before_its_relu(method, volume):
    answer = method("4", features="all").attribute(random_net(), volume, [ClassLogit(2)])
    assert_close(answer.maps[0], answer.parts[0].sum(1, keepdim=True).relu())


@pytest.mark.parametrize("method", BOTH)
def test_refuses_a_batch_of_none(method):
    for batch in (0, -2, 1.5, True):
        with pytest.raises(SettingError, match="batch is a number of copies from 1"):
            method(batch=batch)
