"""Every family of networks, and what may be wrapped around one: the right numbers, or words that say why not."""

import re
import threading
import time

import pytest
import torch
import zoo
from nets import assert_same_state, random_net, state
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from zoo import EVERY, FAMILIES, Checkpointed, Functional, Slices, Twice

from volsal import ClassLogit, GradCAM, GuidedBackprop, GuidedGradCAM, HiResCAM, InputGradient, list_layers
from volsal.attribution import Context, LayerError, ModelError, default_layer
from volsal.attribution.alignment.alignment import Measured, Nominal
from volsal.attribution.tap import Tap, find_layer, forward, gradients, plain, undisturbed

SLOW = {"UNETR", "Swin UNETR", "SegResNet"}


def families(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


def tapped(model, volume, layer, target):
    """A layer's cells, and the gradient of the target by them, as the methods see them."""
    with undisturbed(model), Tap(model, layer) as tap:
        score = target(forward(model, plain(volume)))
        (cells,) = tap.activations
        (gradient,) = gradients([score], cells, layer)
    return cells.detach(), gradient


def by_autograd(model, volume, module, target, call=1):
    """The same by stock autograd at the module's output, as it stands."""
    seen = []

    def keep(module, args, output):
        seen.append(output)
        output.retain_grad()

    handle = module.register_forward_hook(keep)
    target(model(volume)).sum().backward()
    handle.remove()
    model.zero_grad()
    return seen[call - 1].detach(), seen[call - 1].grad


# --- The layer that is taken ---


@pytest.mark.parametrize("name", families(n for n in EVERY if n != "TorchScript"))
def test_the_default_layer_is_sensible(name):
    family = EVERY[name]
    model, volume = family.model(), family.volume(1)
    volume = volume.to(next(model.parameters()).dtype)
    assert default_layer(model, volume) == family.default
    chosen = next(layer for layer in list_layers(model, volume) if layer.name == family.default)
    assert len(chosen.extent) == volume.ndim - 2
    assert float(HiResCAM()(model, volume, family.target).abs().max()) > 0


def test_hidden_states_that_are_returned_are_no_outputs():
    family = FAMILIES["ViT"]
    model, volume = family.model(), family.volume(1)
    layers = {layer.name: layer for layer in list_layers(model, volume)}
    assert layers["blocks.2"].on_every_path
    assert not layers["blocks.2"].is_output
    # After the last block only the class token is read on.
    assert not tapped(model, volume, "blocks.2", family.target)[1].any()
    assert tapped(model, volume, "blocks.1", family.target)[1].any()


def test_a_segmentation_is_not_explained_by_itself():
    family = FAMILIES["U-Net"]
    layers = {layer.name: layer for layer in list_layers(family.model(), family.volume(1))}
    assert layers["model.2"].is_output
    assert not layers["model.2"].suitable
    assert layers["model.1"].suitable


# --- Tokens ---


LAYOUTS = {
    # name: (family, layer, what turns the output into (B, C, *cells), layout)
    "class token": ("ViT, class token", "blocks.0",
                    lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (3, 4, 3)), "(B, 1 + 3*4*3, 16)"),
    "MONAI's ViT": ("ViT", "blocks.1",
                    lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (3, 2, 4)), "(B, 1 + 3*2*4, 24)"),
    "channels last": ("Swin classifier", "swin.layers2.0.blocks.0",
                      lambda t: t.permute(0, 4, 1, 2, 3), "(B, 8, 8, 12, 12)"),
    "shifted windows": ("Swin classifier", "swin.layers2.0.blocks.1.drop_path#1",
                        lambda t: t.permute(0, 4, 1, 2, 3), "(B, 8, 8, 12, 12)"),
    "slices in the batch": ("GRU over slices", "slice",
                            lambda t: t.unflatten(0, (-1, 6)).permute(0, 2, 3, 4, 1), "(B*6, 6, 5, 6)"),
    "as it stands": ("DenseNet", "features.transition1.pool", lambda t: t, ""),
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", LAYOUTS)
def test_cells_are_read_out_of_any_layout(case, batch):
    name, layer, read, layout = LAYOUTS[case]
    family = FAMILIES[name]
    model, volume = family.model().double(), family.volume(batch).double()
    cells, gradient = tapped(model, volume, layer, family.target)
    output, slope = by_autograd(model, volume, find_layer(model, layer), family.target)
    assert cells.ndim == 5
    assert_close(cells, read(output), rtol=1e-9, atol=1e-12)
    assert_close(gradient, read(slope), rtol=1e-9, atol=1e-12)
    if batch == 3:
        listed = {one.name: one for one in list_layers(model, volume)}
        assert listed[layer].layout == layout
        assert listed[layer].shape == tuple(cells.shape)


class Sequence(nn.Module):
    """Tokens first, the batch second, as PyTorch's transformers have it of old; two volumes, two channels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv3d(1, 2, 4, 4)
        self.layer = nn.TransformerEncoderLayer(2, 1, 4)
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.layer(self.patches(x).flatten(2).permute(2, 0, 1)).square().mean(0))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_batch_is_known_from_the_channels(batch):
    model = Sequence().eval().double()
    volume = torch.rand(batch, 1, 8, 12, 16, dtype=torch.float64)
    cells, gradient = tapped(model, volume, "layer", ClassLogit(1))
    output, slope = by_autograd(model, volume, model.layer, ClassLogit(1))
    assert_close(cells, output.permute(1, 2, 0).unflatten(2, (2, 3, 4)))
    assert_close(gradient, slope.permute(1, 2, 0).unflatten(2, (2, 3, 4)))


def test_a_batch_that_was_taken_apart_is_still_one():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv3d(1, 2, 3), nn.ReLU()

        def forward(self, x):
            return self.act(torch.stack([self.conv(one[None])[0] for one in x])).mean((2, 3, 4))

    model, volume = Apart(), torch.rand(3, 1, 8, 9, 10)
    alone = torch.cat([GradCAM("act")(model, one[None], ClassLogit(1)) for one in volume])
    assert_close(GradCAM("act")(model, volume, ClassLogit(1)), alone)


def test_what_continues_beside_the_cells_keeps_its_value_and_its_paths():
    # Two layers at once: the second lies behind the first one's cells, whose class token is not cut off from it.
    family = FAMILIES["ViT, class token"]
    model, volume = family.model().double(), family.volume(2).double()
    with undisturbed(model), Tap(model, "patches", "blocks.0") as tap:
        score = family.target(forward(model, plain(volume)))
        first, second = torch.autograd.grad(score.sum(), tap.activations)
    assert_close(score.detach(), family.target(model(volume)).detach())
    assert_close(first, by_autograd(model, volume, model.patches, family.target)[1])
    expected = by_autograd(model, volume, model.blocks[0], family.target)[1]
    assert_close(second, LAYOUTS["class token"][2](expected))


def test_patches_lie_where_they_were_cut_out():
    family = FAMILIES["ViT, class token"]
    answer = GradCAM("blocks.0").attribute(family.model(), family.volume(2), [family.target], Context(Nominal()))
    assert answer.alignments[0].stride == (8, 8, 8)
    assert answer.alignments[0].offset == (3.5, 3.5, 3.5)
    measured = GradCAM("blocks.0").attribute(family.model(), family.volume(2), [family.target], Context(Measured()))
    assert measured.alignments[0].stride == (8, 8, 8)


@pytest.mark.parametrize(
    ("name", "layer", "says"),
    [
        ("Swin classifier", "swin.layers1.0.blocks.0.attn", "spatial axis 0 runs along 2 of the dimensions"),
        ("ViT", "classification_head.0", r"returns \(1, 3\).*along a row of cells that others stand beside"),
        ("ViT", "blocks.0.attn.drop_weights", "cuts a row of cells that others stand beside, 1 of them before it"),
        ("GRU over slices", "over", "returns a tuple, not a tensor"),
        ("VGG", "1", "cells and channels share dimension 1"),
    ],
)
def test_what_has_no_cells_is_refused_by_name(name, layer, says):
    family = FAMILIES[name]
    with pytest.raises(LayerError, match=f"layer '{layer}'.*{says}"):
        GradCAM(layer)(family.model(), family.volume(1), family.target)


def test_cells_that_are_shifted_are_refused_until_they_are_shifted_back():
    class Rolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.away, self.back = nn.Conv3d(1, 2, 1), nn.Identity(), nn.Identity()

        def forward(self, x):
            x = self.away(self.conv(x).roll((1, 2), (2, 4)))
            return self.back(x.roll((-1, -2), (2, 4))).mean((2, 3, 4))

    net, x = Rolled(), torch.rand(1, 1, 4, 5, 6)
    with pytest.raises(LayerError, match=r"layer 'away'.*shifted cyclically"):
        HiResCAM("away")(net, x, ClassLogit(1))
    assert_close(HiResCAM("back")(net, x, ClassLogit(1)), HiResCAM("conv")(net, x, ClassLogit(1)))


# --- Layers that run more than once ---


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("name", ["act", "block"])
def test_a_call_is_chosen_by_its_number(name, call):
    torch.manual_seed(0)
    model, volume = Twice().eval().double(), torch.randn(2, 1, 8, 9, 10, dtype=torch.float64)
    model.act.inplace = False  # stock autograd would see what was written over it
    cells, gradient = tapped(model, volume, f"{name}#{call}", ClassLogit(0))
    output, slope = by_autograd(model, volume, getattr(model, name), ClassLogit(0), call)
    assert_close(cells, output)
    assert_close(gradient, slope)


def test_every_call_is_listed_and_named_where_none_was():
    model, volume = Twice().eval(), torch.randn(1, 1, 8, 8, 8)
    listed = {layer.name: layer.calls for layer in list_layers(model, volume)}
    assert listed == {"stem": 1, "act#1": 2, "block#1": 2, "act#2": 2, "block#2": 2}
    for layer, says in {
        "act": "layer 'act' runs more than once .* one of its 2 calls, 'act#1' to 'act#2'",
        "act#3": "no 'act#3': layer 'act' runs 2 times in one forward pass; name act#1 to act#2",
        "act#0": "no 'act#0'",
        "stem#2": "layer 'stem' runs 1 time in one forward pass; name stem#1",
        "act#two": "no layer 'act#two'",
    }.items():
        with pytest.raises(LayerError, match=says):
            GradCAM(layer)(model, volume, ClassLogit(0))
    assert_close(GradCAM("stem#1")(model, volume, ClassLogit(0)), GradCAM("stem")(model, volume, ClassLogit(0)))


# --- Wrappers ---


def net():
    torch.manual_seed(0)
    return Functional().eval()


VOLUME = torch.randn(2, 1, 24, 20, 28, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("method", [GradCAM, InputGradient, GuidedBackprop, GuidedGradCAM])
@pytest.mark.parametrize("wrap", [nn.DataParallel, zoo.compiled, lambda net: nn.DataParallel(zoo.compiled(net))])
def test_a_wrapped_model_has_the_maps_of_the_bare_one(wrap, method):
    wrapped = wrap(net())
    before = state(wrapped)
    assert_close(method()(wrapped, VOLUME, ClassLogit(1)), method()(net(), VOLUME, ClassLogit(1)))
    assert_same_state(before, state(wrapped))


def test_layers_of_a_wrapped_model_have_their_names_with_or_without_its_prefix():
    expected = GradCAM("conv")(net(), VOLUME, ClassLogit(1))
    for wrapped, prefix in ((nn.DataParallel(net()), "module."), (zoo.compiled(net()), "_orig_mod.")):
        assert default_layer(wrapped, VOLUME) == "conv"
        for layer in ("conv", f"{prefix}conv", f"{prefix}conv#1"):
            assert_close(GradCAM(layer)(wrapped, VOLUME, ClassLogit(1)), expected)
    assert_close(GradCAM("module.conv")(net(), VOLUME, ClassLogit(1)), expected)


@pytest.mark.parametrize("compile_it", [zoo.compiled, lambda part: part.compile(backend="eager") or part])
def test_a_part_that_is_compiled_runs_as_python(compile_it):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Sequential(nn.Conv3d(1, 3, 3), nn.ReLU()), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.body(x).mean((2, 3, 4)))

    plainly, partly = Parts(), Parts()
    partly.body = compile_it(partly.body)
    partly(VOLUME)  # compiled now
    assert_close(GradCAM("body")(partly, VOLUME, ClassLogit(1)), GradCAM("body")(plainly, VOLUME, ClassLogit(1)))
    assert_close(GuidedBackprop()(partly, VOLUME, ClassLogit(1)), GuidedBackprop()(plainly, VOLUME, ClassLogit(1)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused_where_it_must_be_looked_into():
    script = zoo.scripted(net())
    for explain in (lambda: GradCAM("conv")(script, VOLUME, ClassLogit(1)), lambda: list_layers(script, VOLUME)):
        with pytest.raises(LayerError, match=r"TorchScript.*load the Python model"):
            explain()
    assert_close(InputGradient()(script, VOLUME, ClassLogit(1)), InputGradient()(net(), VOLUME, ClassLogit(1)))


@pytest.mark.filterwarnings("ignore")  # torch.export warns about itself
def test_an_exported_graph_that_has_no_eval_can_be_explained():
    graph = torch.export.export(net(), (VOLUME,)).module()
    assert_close(InputGradient()(graph, VOLUME, ClassLogit(1)), InputGradient()(net(), VOLUME, ClassLogit(1)))


# --- Checkpoints ---


class Unchecked(Checkpointed):
    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3, 4)))


def checkpointed(kind, **settings):
    torch.manual_seed(0)
    return kind(**settings).eval()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", [GradCAM("stem"), HiResCAM("stem.0"), GradCAM("body"), InputGradient()])
def test_checkpoints_change_no_map(method, reentrant):
    model, same = checkpointed(Checkpointed, reentrant=reentrant), checkpointed(Unchecked, reentrant=False)
    if reentrant and method == GradCAM("body"):
        with pytest.raises(LayerError, match=r"no gradient reaches layer 'body'.*re-entrant checkpoint"):
            method(model, VOLUME, ClassLogit(1))
    else:
        targets = [ClassLogit(1), ClassLogit(2)]
        for ours, expected in zip(method(model, VOLUME, targets), method(same, VOLUME, targets), strict=True):
            assert_close(ours, expected)


def test_what_a_checkpoint_runs_again_is_not_another_activation():
    model = checkpointed(Checkpointed, reentrant=False)
    with undisturbed(model), Tap(model, "body.1") as tap:
        score = forward(model, VOLUME)[:, 1]
        (before,) = tap.activations
        gradients([score], before, "body.1")
        assert tap.activations[0] is before


def test_calls_that_a_checkpoint_mixes_up_are_refused():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv3d(1, 1, 3, padding=1), nn.ReLU()

        def forward(self, x):
            for _ in range(2):
                x = checkpoint(lambda x: self.act(self.conv(x)).sigmoid(), x, use_reentrant=False)
            return x.mean((2, 3, 4))

    model = Mixed()
    with pytest.raises(LayerError, match=r"layer 'act#1' lies in a checkpointed part .* turn checkpointing off"):
        GradCAM("act#1")(model, VOLUME, ClassLogit(0))
    assert not model.act._forward_hooks


# --- Precision ---


class Watched(nn.Module):
    """Tells in which precision it was run."""

    def __init__(self):
        super().__init__()
        self.inner, self.seen = net(), set()

    def forward(self, x):
        kind = x.device.type
        self.seen.add(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype)
        return self.inner(x)


@pytest.mark.parametrize("method", [GradCAM(), InputGradient(), GuidedGradCAM()])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16])
def test_the_callers_autocast_holds_for_the_model_alone_and_not_in_float16(method, given):
    model = Watched()
    exact = method.attribute(model, VOLUME, [ClassLogit(1)], Context(Measured())).maps[0]
    model.seen.clear()
    with torch.autocast("cpu", given):
        answer = method.attribute(model, VOLUME, [ClassLogit(1)], Context(Measured()))
        assert torch.is_autocast_enabled("cpu")
    assert model.seen == {torch.bfloat16 if given == torch.bfloat16 else torch.float32}
    assert answer.scores[0].dtype == answer.maps[0].dtype == torch.float32
    # Half precision may send a maximum's gradient to its neighbour.
    assert float((answer.maps[0] - exact).norm() / exact.norm()) < (0.3 if given == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("power", [-14, 0, 8])
@pytest.mark.parametrize("method", [GradCAM("inner.conv"), InputGradient()])
def test_what_float16_inside_the_model_can_hold_is_found_out(method, power):
    # At 2 ** -14 no gradient is above what float16 holds; at 2 ** 8 the usual scale of 2 ** 15 overflows.
    class Scaled(nn.Module):
        def __init__(self, cast):
            super().__init__()
            self.inner, self.cast = net(), cast

        def forward(self, x):
            with torch.autocast("cpu", torch.float16, enabled=self.cast):
                y = self.inner(x)
                return y * 2.0**power

    expected = method(Scaled(cast=False), VOLUME, ClassLogit(1))
    found = method(Scaled(cast=True), VOLUME, ClassLogit(1))
    assert float((found - expected).norm() / expected.norm()) < 0.1  # a maximum's gradient may go to its neighbour


# --- Manners ---


def test_threads_that_explain_one_model_take_turns():
    running, most, found = [0], [0], []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x):
            running[0] += 1
            most[0] = max(most[0], running[0])
            time.sleep(0.02)
            running[0] -= 1
            return self.inner(x)

    model = Counting().train()
    before = state(model)
    explain = lambda: found.append(GradCAM("inner.conv")(model, VOLUME, ClassLogit(1)))  # noqa: E731
    threads = [threading.Thread(target=explain) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert len(found) == 4
    assert all(torch.equal(one, found[0]) for one in found)
    assert_same_state(before, state(model))


def test_a_replaced_layer_is_noticed():
    model, volume = random_net().float(), torch.randn(1, 1, 16, 16, 16)
    place = lambda: GradCAM().attribute(model, volume, [ClassLogit(0)], Context(Nominal()))  # noqa: E731
    assert default_layer(model, volume) == "4"
    assert place().alignments[0].stride == (2, 2, 2)
    model[2] = nn.Conv3d(4, 5, 3, stride=3)
    assert place().alignments[0].stride == (3, 3, 3)
    model[2].stride = (4, 4, 4)
    assert place().alignments[0].stride == (4, 4, 4)
    model[2] = nn.Conv3d(4, 5, 9, stride=16, padding=4)  # a single cell
    assert default_layer(model, volume) == "1"


def test_recurrent_dropout_is_off_and_comes_back():
    torch.manual_seed(0)
    model, volume = Slices().train(), torch.randn(2, 1, 20, 24, 6)
    answer = GradCAM("slice").attribute(model, volume, [ClassLogit(1)])
    assert model.over.dropout == 0.3
    assert model.over.training
    assert_close(answer.scores[0], model.eval()(volume)[:, 1].detach())


def test_statistics_of_the_batch_are_refused_and_of_one_volume_are_not():
    family = EVERY["BatchNorm without statistics"]
    model, volume = family.model(), family.volume(2)
    with pytest.raises(ModelError, match=r"layer '1' has no running statistics.*track_running_stats=True"):
        GradCAM("2")(model, volume, ClassLogit(1))
    assert GradCAM("2")(model, volume[:1], ClassLogit(1)).isfinite().all()


def test_a_volume_whose_voxels_share_memory_can_be_given_to_a_model_that_writes_into_it():
    family = FAMILIES["in place"]
    model, volume = family.model(), family.volume(1)
    together = InputGradient()(model, volume.expand(3, *volume.shape[1:]), ClassLogit(1))
    assert_close(together, InputGradient()(model, volume, ClassLogit(1)).expand_as(together))


def test_one_tap_serves_many_passes():
    model = net()
    with undisturbed(model), Tap(model, "conv") as tap:
        first = (forward(model, VOLUME), tap.activations[0])[1].detach().clone()
        forward(model, VOLUME + 1)
        assert not torch.equal(tap.activations[0], first)
        forward(model, VOLUME)
        assert torch.equal(tap.activations[0], first)


# --- The matrix: `scripts/bench/contract.py` prints all of it ---


METHODS = ["grad-cam", "guided-grad-cam", "input-gradient", "rise"]
QUICK = ["DenseNet", "SE-ResNet", "DynUNet, deep supervision", "ViT", "Swin classifier", "LSTM over slices", "in place",
         "2D", "checkpoint", "float16 weights", "bfloat16 weights", "channels_last_3d", "frozen"]  # fmt: skip
REFUSED = {  # (method, family): what it says; everything else holds
    ("grad-cam", "TorchScript"): "TorchScript program",
    ("guided-grad-cam", "TorchScript"): "TorchScript program",
    ("guided-grad-cam", "re-entrant checkpoint"): "re-entrant checkpoints",
    **{(method, "BatchNorm without statistics"): "no running statistics" for method in METHODS},
}


def cells_of_the_matrix():
    for family in EVERY:
        for precision in zoo.PRECISIONS:
            # A processor without bfloat16 takes minutes for the largest ones; the whole matrix is the script's.
            if family not in SLOW or precision == "fp32":
                yield pytest.param(family, precision, marks=() if family in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("family", "precision"), list(cells_of_the_matrix()))
@pytest.mark.parametrize("method", METHODS)
def test_the_contract_holds_or_is_refused(method, family, precision):
    of = EVERY[family]
    # What mixes volumes shows between two; a third of the largest ones costs seconds, and is the script's.
    refusal = zoo.contract(zoo.method_of(method, of.shape), of, precision, 2 if family in SLOW else 3)
    assert re.search(REFUSED.get((method, family), "^$"), refusal), refusal
