import pytest
import torch
from nets import assert_same_state, random_net, state
from torch import nn

from volsal import ClassLogit, Explainer
from volsal.attribution import Context, GradCAM, GuidedGradCAM, HiResCAM, InputGradient, ModelError, default_layer
from volsal.attribution.alignment.alignment import Measured, Nominal
from volsal.attribution.inputs import Given, InputsError
from volsal.attribution.tap import undisturbed


class Clinical(nn.Module):
    """An image branch whose features meet a table of numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(4 + 3, 2)
        self.double()
        self.calls = []

    def forward(self, x, table, scale=1.0):
        self.calls.append((len(x), len(table), self.training))
        return scale * self.head(torch.cat([self.image(x).mean((2, 3, 4)), table], 1))


class Pair(nn.Module):
    """score = 2 mean(a) + 3 mean(b) + mean(a b), each voxel of its own."""

    def forward(self, a, b):
        return (2 * a + 3 * b + a * b).mean((2, 3, 4)).repeat(1, 2)


TABLE = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)


def test_layers_parameters_and_mode_are_the_models_own():
    model = Clinical()
    given = Given(model, TABLE)
    assert [name for name, _ in given.named_modules()] == [name for name, _ in model.named_modules()]
    assert list(given.state_dict()) == list(model.state_dict())
    assert [id(p) for p in given.parameters()] == [id(p) for p in model.parameters()]
    assert model.training
    given.eval()
    assert not any(module.training for module in model.modules())
    given.train()
    assert all(module.training for module in model.modules())
    given.float()
    assert model.head.weight.dtype == torch.float32
    given.load_state_dict({name: torch.zeros_like(value) for name, value in given.state_dict().items()})
    assert not model.head.weight.any()


def test_a_model_that_asks_for_its_own_mode_is_in_evaluation_mode(volume):
    model = Clinical()
    given = Given(model, TABLE)
    with undisturbed(given):
        given(volume)
    assert model.calls[-1][2] is False
    assert model.training


@pytest.mark.parametrize("method", [GradCAM("image.1"), HiResCAM(), GuidedGradCAM("image.2"), InputGradient()])
def test_every_method_gives_what_it_gives_on_a_model_with_the_inputs_built_in(method, volume):
    class Built(Clinical):
        def forward(self, x):
            return super().forward(x, TABLE.expand(len(x), 3), scale=2.0)

    model = Clinical()
    given = Given(model, TABLE, scale=2.0)
    before = state(model)
    found = method.attribute(given, volume, [ClassLogit(0), ClassLogit(1)])
    expected = method.attribute(Built(), volume, [ClassLogit(0), ClassLogit(1)])
    assert found.layer == expected.layer
    for ours, theirs in zip(found.maps, expected.maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert_same_state(before, state(model))


def test_cells_are_traced_and_measured_through_it():
    net = random_net()

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, a, b):
            return self.net(a) + b.mean((2, 3, 4))

    volume = torch.randn(1, 1, 11, 13, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    given = Given(Two(), -volume)
    assert default_layer(given, volume).startswith("net.")
    for rule in (Nominal(), Measured()):
        ours = GradCAM("net.4").attribute(given, volume, [ClassLogit(0)], Context(rule)).alignments[0]
        assert ours == GradCAM("4").attribute(net, volume, [ClassLogit(0)], Context(rule)).alignments[0]


def test_each_of_several_images_is_explained_in_turn(volume):
    other = volume.flip(2)
    size = volume[0, 0].numel()
    for given, expected in [
        (Given(Pair(), other), 2 + other),
        (Given(Pair(), volume, explained=1), 3 + volume),
        (Given(Pair(), explained="b", a=volume), 3 + volume),
    ]:
        (found,) = InputGradient().attribute(given, other if given.explained else volume, [ClassLogit(0)]).maps
        torch.testing.assert_close(found, expected / size)


def test_the_others_are_repeated_for_copies_of_the_batch_as_a_whole(volume):
    copies = torch.cat([volume, 2 * volume, 3 * volume])
    given = Given(Pair(), volume.flip(0))
    torch.testing.assert_close(given(copies), Pair()(copies, volume.flip(0).repeat(3, 1, 1, 1, 1)))
    nested = Given(Nested(), {"table": [TABLE]}, "text")
    assert nested(copies).shape == (6, 3)


class Nested(nn.Module):
    def forward(self, x, others, word):
        assert word == "text"
        return others["table"][0] + x.mean((1, 2, 3, 4))[:, None]


def test_a_batch_that_does_not_match_is_refused(volume):
    with pytest.raises(ModelError, match="input 1 has a batch of 3, and the model is run on a batch of 2"):
        GradCAM("image.0").attribute(Given(Clinical(), TABLE.expand(3, 3)), volume, [ClassLogit(0)])
    with pytest.raises(InputsError, match="input 2 is to be explained, but only 1 others"):
        Given(Clinical(), TABLE, explained=2)
    with pytest.raises(InputsError, match="'table' is explained, so it is not given"):
        Given(Clinical(), explained="table", table=TABLE)


def test_what_a_model_writes_into_the_others_is_not_kept(volume):
    class Greedy(nn.Module):
        def forward(self, a, b):
            return (a * b.add_(1)).mean((2, 3, 4)).repeat(1, 2)

    other = volume.clone()
    InputGradient().attribute(Given(Greedy(), other), volume, [ClassLogit(0)])
    assert torch.equal(other, volume)


def test_the_tables_share_is_gradient_times_input(volume):
    model = Clinical().eval()
    given = Given(model, table=TABLE, scale=2.0)
    shares = given.tables(volume, [ClassLogit(0), ClassLogit(1)])
    for target, share in enumerate(shares):
        expected = 2.0 * model.head.weight[target, 4:].detach() * TABLE[0]
        torch.testing.assert_close(share["table"], expected.expand(2, 3))
    assert list(Given(model, TABLE).tables(volume, [ClassLogit(0)])[0]) == ["input 1"]
    assert Given(Pair(), volume).tables(volume, [ClassLogit(0)]) == [{}]
    assert given.named["table"] is TABLE


def test_a_scan_is_explained_with_a_table_and_with_a_second_scan(scan_file, tmp_path):
    model = Clinical().float()
    explainer = Explainer(model, None, ["grad-cam", "input-gradient"], [0, 1])
    explanation = explainer(scan_file(), given={"table": [1.0, -2.0, 0.5]})
    for heatmap in explanation.maps:
        weight = model.head.weight[int(heatmap.target[-1]), 4:].detach()
        assert heatmap.facts["given"]["table"] == pytest.approx((weight * TABLE[0].float()).tolist())
    record = explanation.provenance["model_input"]
    assert record["given"]["table"]["shape"] == [1, 3]
    explanation.save(tmp_path / "out")

    pair = Explainer(Pair(), None, "input-gradient", 0)
    other = scan_file("other.nii.gz")
    first = pair(scan_file(), given={"b": other})
    second = pair(other, given={"a": scan_file()}, explained="b")
    size = first.scan.array.size
    torch.testing.assert_close(torch.from_numpy(first.maps[0].raw) * size, 2 + torch.from_numpy(first.scan.array))
    torch.testing.assert_close(torch.from_numpy(second.maps[0].raw) * size, 3 + torch.from_numpy(first.scan.array))
    with pytest.raises(ValueError, match="flip-average alignment mirrors the scan and not the other inputs"):
        Explainer(Pair(), None, "input-gradient", 0, alignment="flip-average")(scan_file(), given={"b": other})
