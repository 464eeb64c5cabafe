import pytest
import torch
from nets import assert_same_state, random_net, state
from torch import nn

from volsal import GradCAM, list_layers
from volsal.attribution import ClassLogit, LayerError, default_layer


class Branching(nn.Module):
    """stem -> (left, right) -> join -> head; `side` feeds a second path around `join`."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(1, 4, 3, stride=2, padding=1)
        self.left, self.right = nn.Conv3d(4, 4, 1), nn.Conv3d(4, 4, 3, padding=1)
        self.join = nn.Sequential(nn.Conv3d(8, 4, 1), nn.ReLU())
        self.act = nn.ReLU(inplace=True)
        self.tail = nn.Conv3d(4, 4, 3, stride=16, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.act(self.stem(x))
        x = self.join(torch.cat([self.act(self.left(x)), self.right(x)], 1))
        return self.head(self.tail(x).mean((2, 3, 4)))


VOLUME = torch.randn(1, 1, 12, 16, 20)


def test_knows_what_lies_on_every_path_and_what_runs_how_often():
    layers = {layer.name: layer for layer in list_layers(Branching(), VOLUME)}
    on_every = {name for name, layer in layers.items() if layer.on_every_path}
    assert on_every == {"stem", "act#1", "join.0", "join.1", "join", "tail"}
    assert layers["act#1"].calls == layers["act#2"].calls == 2
    assert layers["stem"].stride == (2, 2, 2)
    assert layers["join"].shape == (1, 4, 6, 8, 10)
    assert layers["join"].bytes == 4 * 6 * 8 * 10 * 4
    assert "head" not in layers  # no cells


def test_the_default_is_the_outermost_name_of_the_last_suitable_output():
    # tail is later, but only one cell wide; join and join.1 are one output.
    assert default_layer(Branching(), VOLUME) == "join"


@pytest.mark.parametrize("axes", [2, 3])
def test_a_plain_net_ends_at_its_last_activation(axes):
    volume = torch.randn(1, 1, *(9, 8, 10)[:axes], dtype=torch.float64)
    assert default_layer(random_net(axes=axes), volume) == "4"


def test_the_choice_is_the_methods_and_is_reported():
    net, volume = Branching(), VOLUME
    answer = GradCAM().attribute(net, volume, [ClassLogit(0)])
    assert answer.layer == "join"
    torch.testing.assert_close(answer.maps[0], GradCAM("join")(net, volume, ClassLogit(0)), rtol=0, atol=0)


def test_a_survey_changes_nothing():
    net = Branching().train()
    before = state(net)
    list_layers(net, VOLUME)
    assert_same_state(before, state(net))


def test_one_half_of_a_split_does_not_lie_on_every_path():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.drop, self.head = nn.Conv3d(1, 4, 1), nn.Dropout(0.1), nn.Conv3d(2, 2, 1)

        def forward(self, x):
            value, gate = self.conv(x).chunk(2, 1)
            return (self.head(self.drop(value) * gate.sigmoid())).mean((2, 3, 4))

    layers = {layer.name: layer for layer in list_layers(Gated(), VOLUME)}
    assert not layers["drop"].on_every_path
    assert layers["conv"].on_every_path


def test_a_model_that_cuts_its_gradient_is_told_so():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 2, 1)

        def forward(self, x):
            return self.conv(x).detach().mean((2, 3, 4))

    with pytest.raises(LayerError, match="is there a detach"):
        default_layer(Cut(), VOLUME)


def test_where_nothing_qualifies_the_nearest_are_named():
    with pytest.raises(LayerError, match=r"no layer lies on every path .*the last ones are"):
        default_layer(nn.Sequential(nn.Conv3d(1, 2, 3, stride=8, padding=1), nn.Flatten()), torch.randn(1, 1, 8, 8, 8))


def test_a_very_deep_net_is_counted_without_recursion_and_without_overflow():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Conv3d(1, 1, 1) for _ in range(700))

        def forward(self, x):
            for block in self.blocks:  # 2 ** 700 paths
                x = x + block(x)
            return x.mean((2, 3, 4))

    assert not any(layer.on_every_path for layer in list_layers(Deep(), torch.randn(1, 1, 2, 2, 2)))
