"""The memory-lean backward pass against stock autograd, step by step and on whole networks, and what it keeps."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import SPELLINGS, ModuleNet, SpelledNet, random_net
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from volsal import ClassLogit, GuidedBackprop, InputGradient
from volsal.attribution import CoverageError
from volsal.attribution.gradients import gradient as gradient_module
from volsal.attribution.gradients import lean
from volsal.attribution.gradients.lean import Lean
from volsal.attribution.tap import ModelError, undisturbed

WIDE = torch.float64


def frozen(module):
    torch.manual_seed(4)
    return module.to(WIDE).eval().requires_grad_(False)


def weight(*shape, dtype=WIDE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def values(*shape, dtype=WIDE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=dtype)


def back(function, inputs, mode):
    """The output, and the gradient of a fixed weighted sum of it by the inputs; through a copy, as a model gets it."""
    leaf = inputs.detach().clone(memory_format=torch.preserve_format).requires_grad_(True)
    with mode:
        output = function(leaf.clone(memory_format=torch.preserve_format))
    signal = weight(*output.shape).to(output.dtype)
    return output.detach(), torch.autograd.grad(output, leaf, signal)[0]


def assert_as_stock(function, inputs, rtol=1e-12):
    output, found = back(function, inputs, Lean())
    expected_output, expected = back(function, inputs, nullcontext())
    assert_close(output, expected_output, rtol=0, atol=0)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= rtol * float(expected.abs().max())
    assert float(expected.abs().max()) > 0


def stock(monkeypatch):
    monkeypatch.setattr(gradient_module, "Lean", nullcontext)


class Nodes:
    """The autograd functions that a run of a function under :class:`Lean` left behind its output."""

    def __init__(self, function, inputs):
        with Lean():
            output = function(inputs.requires_grad_(True).clone())
        waiting, self.names = [output.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is not None:
                self.names.add(node.name())
                waiting += [following for following, _ in node.next_functions]


# ---------------------------------------------------------------------------------------------------------- the steps

RUNS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
BACK = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
SIZES = {1: (23,), 2: (11, 14), 3: (7, 9, 10)}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_convolution_of_any_geometry_has_the_stock_gradient(data):
    axes = data.draw(st.integers(1, 3))
    each = lambda low, high: [data.draw(st.integers(low, high)) for _ in range(axes)]  # noqa: E731
    groups = data.draw(st.sampled_from([1, 1, 1, 2]))
    channels = groups * data.draw(st.integers(1, 5 // groups))
    kernel, dilation = each(1, 4), each(1, 2) if data.draw(st.booleans()) else [1] * axes
    padding = data.draw(st.sampled_from([each(0, 3), "valid"]))
    stride, more = each(1, 3), data.draw(st.integers(1, 3))
    inputs = values(data.draw(st.integers(1, 2)), channels, *(size + 3 for size in SIZES[axes]))
    kernels = weight(groups * more, channels // groups, *kernel)
    assert_as_stock(lambda x: RUNS[axes](x, kernels, None, stride, padding, dilation, groups), inputs)


CONVOLUTIONS = {
    "a small map": (lambda x: F.conv3d(x, weight(4, 6, 3, 3, 3), weight(4), 1, 1), values(1, 6, 6, 7, 8)),
    "a large map": (lambda x: F.conv3d(x, weight(8, 5, 3, 3, 3), None, 2, 1), values(1, 5, 96, 97, 60)),
    "same, symmetrical": (lambda x: F.conv3d(x, weight(4, 1, 3, 5, 1), padding="same"), values(2, 1, 7, 9, 6)),
    "same, one more behind": (lambda x: F.conv2d(x, weight(4, 2, 2, 4), padding="same"), values(2, 2, 7, 9)),
    "same, one more behind, of many channels": (
        lambda x: F.conv2d(x, weight(4, 6, 2, 4), padding="same"),
        values(2, 6, 7, 9),
    ),
    "named arguments": (lambda x: F.conv2d(x, weight=weight(4, 2, 3, 3), stride=(2, 1)), values(2, 2, 7, 9)),
    "without a batch": (lambda x: F.conv3d(x, weight(4, 1, 3, 3, 3), padding=1), values(1, 6, 7, 8)),
    "circular": (frozen(nn.Conv3d(1, 3, 3, padding=1, padding_mode="circular")), values(1, 1, 5, 6, 7)),
    "replicated": (frozen(nn.Conv2d(1, 3, 3, padding=1, padding_mode="replicate")), values(1, 1, 6, 7)),
    "its own operator": (lambda x: torch.ops.aten.conv3d.default(x, weight(4, 1, 3, 3, 3)), values(1, 1, 5, 6, 7)),
    "any operator": (
        lambda x: torch.convolution(x, weight(1, 4, 3, 3), None, [2, 1], [1, 0], [1, 1], True, [1, 0], 1),
        values(1, 1, 5, 6),
    ),
    "of itself": (lambda x: F.conv2d(x, x.detach()), values(2, 2, 3, 4)),
    "turned round, of itself": (lambda x: F.conv_transpose2d(x, x.detach()), values(2, 2, 3, 4)),
    "with a weight made of the input": (lambda x: F.conv2d(x, 2 * x[:, :, :2, :2]), values(2, 2, 5, 4)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_in_any_form_has_the_stock_gradient(name):
    assert_as_stock(*CONVOLUTIONS[name])


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(("stride", "more"), [(1, 0), (2, 1), (3, 2)])
def test_a_transposed_convolution_has_the_stock_gradient(axes, stride, more):
    inputs, kernels = values(2, 4, *SIZES[axes]), weight(4, 3, *(3,) * axes)
    assert_as_stock(lambda x: BACK[axes](x, kernels, None, stride, 1, more), inputs)
    assert_as_stock(lambda x: BACK[axes](x, weight(4, 1, *(2,) * axes), groups=2), inputs)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_max_pooling_over_any_window_has_the_stock_gradient(data):
    axes = data.draw(st.integers(1, 3))
    kernel = [data.draw(st.integers(1, 4)) for _ in range(axes)]
    padding = [data.draw(st.integers(0, size // 2)) for size in kernel]
    stride = data.draw(st.sampled_from([None, 1, 2, 3]))
    size = [data.draw(st.integers(8, 11)) if axis else data.draw(st.sampled_from([1, 8])) for axis in range(axes)]
    kernel[0], padding[0] = (kernel[0], padding[0]) if size[0] > 1 else (3, 1)
    dilation = data.draw(st.integers(1, 2)) if size[0] > 1 else 1
    ceil = data.draw(st.booleans())
    inputs = values(2, 3, *size)
    assert_as_stock(lambda x: POOLS[axes](x, kernel, stride, padding, dilation, ceil), inputs)


@pytest.mark.parametrize("size", [(8, 1, 1), (1, 8, 1), (5, 1, 6)])
def test_max_pooling_of_axes_of_one_voxel_has_the_stock_gradient(size):
    assert_as_stock(lambda x: F.max_pool3d(x, 3, 1, 1), values(2, 3, *size))


def test_max_pooling_of_channels_last_warns_of_nothing():
    torch.set_warn_always(True)  # else it warns once in a process, perhaps long ago
    try:
        inputs = values(2, 3, 6, 5, 7).contiguous(memory_format=torch.channels_last_3d)
        assert_as_stock(lambda x: F.max_pool3d(x, 3, 2, 1), inputs)
    finally:
        torch.set_warn_always(False)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=3))
def test_the_cells_of_any_window_are_found_again_by_their_number(axes):
    kernel, dilation, size = zip(*axes, strict=True)
    taps = lean._Window(kernel, kernel, kernel, dilation, size).taps(torch.device("cpu"))
    steps = [int(torch.tensor(size[axis + 1 :]).prod()) for axis in range(len(size))]
    cells = torch.cartesian_prod(*[torch.arange(k) * d for k, d in zip(kernel, dilation, strict=True)])
    flat = (cells.reshape(-1, len(size)) * torch.tensor(steps)).sum(1)
    assert torch.equal(taps[torch.searchsorted(taps, flat)], flat)


def test_max_pooling_with_indices_or_a_huge_window_is_stock():
    assert_as_stock(lambda x: F.max_pool3d(x, 7, 1), values(1, 2, 8, 9, 10))
    pooled = lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)  # noqa: E731
    assert_as_stock(pooled, values(1, 2, 8, 10))


RECTIFIERS = {
    **SPELLINGS,
    "relu6": lambda x: F.relu6(3 * x),
    "nn.ReLU6(inplace)": nn.ReLU6(inplace=True),
    "leaky_relu": F.leaky_relu,
    "leaky_relu(slope)": lambda x: F.leaky_relu(x, negative_slope=-0.3),
    "nn.LeakyReLU(inplace)": nn.LeakyReLU(0.2, inplace=True),
    "leaky_relu_": lambda x: F.leaky_relu_(x, 0.1),
    "prelu": frozen(nn.PReLU()),
    "prelu of each channel": frozen(nn.PReLU(3)),
    "elu": F.elu,
    "silu(inplace)": nn.SiLU(inplace=True),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "axes exchanged": lambda x: x.permute(0, 1, 4, 2, 3),
    "every second": lambda x: x[..., ::2],
}


@pytest.mark.parametrize("function", [F.relu_, lambda y: F.leaky_relu(y, 0.1, inplace=True)])
@pytest.mark.parametrize("part", [slice(None), slice(1, 2)])
def test_an_activation_in_place_holds_for_every_name_of_what_it_wrote_to(function, part):
    def run(x):
        y = x * 1
        function(y[:, part] if part != slice(None) else y)
        return y * y.detach().cos() + x

    assert_as_stock(run, values(2, 3, 5, 6))


def test_values_are_taken_in_the_order_in_which_they_lie_in_memory():
    x = values(2, 3, 5, 6, 7)
    for one in (x, x.contiguous(memory_format=torch.channels_last_3d), x.permute(4, 0, 3, 1, 2)):
        assert one.permute(lean._order(one)).is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RECTIFIERS)
def test_an_activation_has_the_stock_gradient_in_any_layout(name, layout):
    function = RECTIFIERS[name]
    assert_as_stock(lambda x: 2 * function(LAYOUTS[layout](x) * 1), values(2, 3, 5, 6, 7))


def test_what_is_kept_of_an_activation_is_right_beyond_one_piece(monkeypatch):
    monkeypatch.setattr(lean, "_PIECE", 16)
    assert_as_stock(F.leaky_relu, values(2, 3, 5, 7))
    assert_as_stock(lambda x: F.max_pool2d(x, 2), values(2, 3, 6, 8))
    assert_as_stock(lambda x: F.conv3d(x, weight(4, 1, 3, 3, 3), stride=2), values(2, 1, 9, 8, 7))


def test_bits_are_packed_alike_on_every_device(monkeypatch):
    flags = values(77) > 0
    bits = lean._bits(flags)

    class Elsewhere(torch.Tensor):
        """On a device that numpy cannot see into."""

        device = property(lambda self: type("device", (), {"type": "cuda"})())

    monkeypatch.setattr(lean, "_places", lambda device: torch.arange(7, -1, -1, dtype=torch.uint8))
    assert torch.equal(lean._bits(flags.as_subclass(Elsewhere)).as_subclass(torch.Tensor), bits)
    assert torch.equal(lean._flags(bits.as_subclass(Elsewhere), 77).as_subclass(torch.Tensor), flags)
    assert torch.equal(lean._flags(bits, 77), flags)


def batch_norm(axes, affine=True, dtype=WIDE, statistics=True):
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[axes]
    norm = kind(4, affine=affine, track_running_stats=statistics, eps=1e-3).to(dtype)
    if affine:
        norm.weight.data, norm.bias.data = weight(4, dtype=dtype), weight(4, dtype=dtype)
    if statistics:
        norm.running_mean, norm.running_var = weight(4, dtype=dtype), weight(4, dtype=dtype).square()
    return norm.eval().requires_grad_(False)


OTHERS = {
    "batch norm": (batch_norm(3), values(2, 4, 5, 6, 7)),
    "batch norm of vectors": (batch_norm(1), values(2, 4)),
    "batch norm without weights": (batch_norm(2, affine=False), values(2, 4, 5, 6)),
    "batch norm by the batch": (batch_norm(2, statistics=False), values(2, 4, 5, 6)),
    "instance norm": (nn.InstanceNorm3d(4).to(WIDE), values(2, 4, 5, 6, 7)),
    "group norm": (frozen(nn.GroupNorm(2, 4)), values(2, 4, 5, 6, 7)),
    "average pooling": (lambda x: F.avg_pool3d(x, 2, ceil_mode=True), values(2, 4, 5, 6, 7)),
    "average pooling of lines": (lambda x: F.avg_pool1d(x, 3, 2, 1), values(2, 4, 11)),
    "adaptive pooling": (lambda x: F.adaptive_avg_pool3d(x, (2, 3, 1)), values(2, 4, 5, 6, 7)),
    "reflected edges": (lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"), values(2, 4, 5, 6)),
    "replicated edges": (lambda x: F.pad(x, (1, 2, 0, 1, 2, 0), mode="replicate"), values(2, 4, 5, 6, 7)),
    "interpolation": (lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), values(1, 2, 4, 5, 3)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_steps_have_the_stock_gradient(name):
    assert_as_stock(*OTHERS[name])


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.bfloat16, 0), (torch.float16, 0)])
def test_single_and_half_precision_agree_to_rounding(dtype, rtol):
    """In half precision there is one rounding, the stock one."""
    kernels, first = weight(4, 4, 3, 3, 3, dtype=dtype), weight(4, 1, 3, 3, 3, dtype=dtype)
    steps = {
        "convolution": (lambda x: F.conv3d(x, kernels, None, 1, 1), 4),
        "small map": (lambda x: F.conv3d(x, weight(6, 5, 3, 3, 3, dtype=dtype), None, 1, 1), 5),
        "stem": (lambda x: F.conv3d(x, first, None, 2, 1), 1),
        "rectifier": (lambda x: F.leaky_relu(x, 0.25), 4),
        "pooling": (lambda x: F.max_pool3d(x, 2), 4),
    }
    for function, channels in steps.values():
        assert_as_stock(function, values(1, channels, 6, 7, 8, dtype=dtype), rtol)
    digits = torch.finfo(dtype).eps
    assert_as_stock(batch_norm(3, dtype=dtype), values(1, 4, 6, 7, 8, dtype=dtype), 2 * digits)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast_keeps_its_precision_and_the_gradient_the_inputs(inside, outside):
    kernels = weight(4, 1, 3, 3, 3, dtype=torch.float32)

    def function(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return F.relu(F.conv3d(x, kernels, None, 2, 1))

    inputs = values(2, 1, 8, 8, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        assert_as_stock(function, inputs, 0 if inside else 1e-6)


# ------------------------------------------------------------------------------------------------- what models are like


class Awkward(nn.Module):
    """Writes into its input and into parts, uses what it made twice, and joins by every way."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 4, 1)
        self.norm, self.act = nn.BatchNorm3d(4), nn.ReLU(inplace=True)
        self.norm.running_var.uniform_(0.5, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x.mul_(2)
        a = self.one(x)
        b = self.act(self.norm(a))
        c = self.two(b)
        c += a
        parts = (c * 1).chunk(2, 1)
        d = torch.cat([self.act(c[:, :1]), F.leaky_relu(parts[1], 0.1), b, c], 1)
        e = F.max_pool3d(self.act(self.norm(d[:, :4]) + d[:, 4:8]), 2)
        e = torch.cat([e * e.sigmoid(), F.avg_pool3d(d, 2), e[:, :1]], 1)
        return self.head(torch.cat([e[:, :8], e[:, -8:]], 1).mean((2, 3, 4)))


NETS = {"awkward": Awkward, "random": random_net, "2D": lambda: random_net(axes=2), "modules": ModuleNet}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NETS)
def test_a_networks_map_is_that_of_stock_autograd(name, batch, monkeypatch):
    net, axes = NETS[name]().double(), 2 if name == "2D" else 3
    inputs = values(batch, 1, *SIZES[3][:axes])
    targets = [ClassLogit(0), ClassLogit(2)]
    found = InputGradient()(net, inputs, targets)
    stock(monkeypatch)
    for ours, expected in zip(found, InputGradient()(net, inputs, targets), strict=True):
        assert_close(ours, expected, rtol=1e-10, atol=1e-13 * float(expected.abs().max()))


def monai_nets():
    nets = pytest.importorskip("monai.networks.nets")
    resnet = {"block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [4, 4, 8, 8], "n_input_channels": 1}
    blocks = {"blocks_down": (1, 1), "blocks_up": (1,), "init_filters": 8}
    return {
        "resnet": lambda: nets.ResNet(**resnet, spatial_dims=3, num_classes=3),
        "densenet": lambda: nets.DenseNet(3, 1, 3, init_features=8, growth_rate=4, block_config=(2, 2)),
        "unet": lambda: nets.UNet(3, 1, 3, channels=(4, 8, 8), strides=(2, 2), num_res_units=1, norm="batch"),
        "segresnet": lambda: nets.SegResNet(3, **blocks, in_channels=1, out_channels=3),
        "dynunet": lambda: nets.DynUNet(3, 1, 3, [3] * 3, [1, 2, 2], [2, 2], filters=[4, 8, 8]),
        "vit": lambda: nets.ViT(1, (16, 16, 16), (8, 8, 8), 24, 32, 2, 4, classification=True, num_classes=3),
    }


def mean_logit(output):
    output = output[0] if isinstance(output, tuple) else output
    return output[:, 1].reshape(len(output), -1).mean(1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["resnet", "densenet", "unet", "segresnet", "dynunet", "vit"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_the_networks_of_the_trade_have_the_stock_map_guided_or_not(name, dtype, rtol, monkeypatch):
    torch.manual_seed(3)
    net = monai_nets()[name]()
    with torch.no_grad():
        net.train()(torch.randn(2, 1, 16, 16, 16))  # running statistics that are not 0 and 1
    net = net.to(dtype)
    inputs = values(2, 1, 16, 16, 16, dtype=dtype)
    methods = [InputGradient(), GuidedBackprop()]
    found = [method(net, inputs, mean_logit) for method in methods]
    stock(monkeypatch)
    for ours, method in zip(found, methods, strict=True):
        expected = method(net, inputs, mean_logit)
        assert float((ours - expected).abs().max()) <= rtol * float(expected.abs().max())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_guided_maps_agree_with_captums_in_every_spelling(spelling):
    captum = pytest.importorskip("captum.attr")
    inputs = values(2, 1, 7, 8, 9)
    with pytest.warns(UserWarning, match="backward hooks"):
        expected = captum.GuidedBackprop(ModuleNet()).attribute(inputs.clone().requires_grad_(), target=1)
    assert_close(GuidedBackprop()(SpelledNet(SPELLINGS[spelling]), inputs, ClassLogit(1)), expected.detach())


def test_the_rules_proof_does_not_take_the_lean_steps_word_for_it():
    class Blind(nn.Module):
        """An activation that is hidden from the rule, and not from the lean pass."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 2, 3).double()

        def forward(self, x):
            y = F.relu(F.max_pool3d(self.conv(x), 2))
            return lean.Cornered.apply(y - 0.1, lean._relu(), F.relu, ()).mean((2, 3, 4))

    with pytest.raises(CoverageError, match="1 x CorneredBackward"):
        GuidedBackprop()(Blind(), values(1, 1, 7, 8, 9), ClassLogit(0))


def test_hooks_of_modules_run_and_see_what_they_did():
    net, seen = random_net(inplace=False), []
    net[1].register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    net[3].register_forward_hook(lambda module, args, output: 2 * output)
    net[0].register_full_backward_hook(lambda module, into, out: seen.append(out[0].clone()))
    inputs = values(2, 1, 7, 8, 9)
    found = InputGradient()(net, inputs, ClassLogit(0))
    assert len(seen) == 2
    bare = random_net()
    assert_close(seen[0], bare[1](bare[0](inputs)).detach())
    bare[4] = nn.Sequential(Twice(), bare[4])
    assert_close(found, InputGradient()(bare, inputs, ClassLogit(0)))


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts_are_left_to_the_checkpoint(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = random_net()

        def forward(self, x):
            hidden = torch.utils.checkpoint.checkpoint(self.net[:5], x, use_reentrant=reentrant)
            return self.net[5:](hidden)

    inputs = values(2, 1, 7, 8, 9)
    assert_close(InputGradient()(Net(), inputs, ClassLogit(1)), InputGradient()(random_net(), inputs, ClassLogit(1)))


def test_a_model_that_differentiates_inside_is_served_once_and_refused_twice():
    class Inner(nn.Module):
        def __init__(self, again, function):
            super().__init__()
            self.again, self.function = again, function

        def forward(self, x):
            with torch.enable_grad():
                at = x.expand(-1, 8, -1, -1, -1).contiguous()
                at = at if at.requires_grad else at.requires_grad_()
                (slope,) = torch.autograd.grad(self.function(at).square().sum(), at, create_graph=self.again)
            return (slope * at).mean((2, 3, 4))

    inputs = values(1, 1, 4, 5, 6)
    InputGradient()(Inner(False, F.relu), inputs, ClassLogit(0))
    for function in (
        F.relu,
        lambda x: F.avg_pool3d(x, 2, ceil_mode=True),
        nn.Conv3d(8, 8, 1).to(WIDE).requires_grad_(False),
    ):
        with pytest.raises(ModelError, match="differentiates its own gradient"):
            InputGradient()(Inner(True, function), inputs, ClassLogit(0))


def test_a_vectorised_map_inside_a_model_is_stock():
    class Net(nn.Module):
        def forward(self, x):
            kernels = torch.ones(1, 1, 3, 3, dtype=x.dtype)
            slices = torch.func.vmap(lambda image: F.relu(F.conv2d(image, kernels)))(x.transpose(1, 2))
            slope = torch.func.grad(lambda y: F.relu(F.conv2d(y[:, :, 0], kernels)).sum())(x)
            return slices.mean((1, 3, 4)) + (slope * x).mean((2, 3, 4))

    assert InputGradient()(Net(), values(2, 1, 4, 5, 6), ClassLogit(0)).abs().sum() > 0


def test_a_weight_that_requires_grad_keeps_its_gradient():
    conv, norm = nn.Conv2d(2, 4, 3).double(), batch_norm(2).requires_grad_(True)
    gradients = []
    for mode in (Lean(), nullcontext()):
        with mode:
            score = norm(conv(values(1, 2, 5, 6).requires_grad_(True))).square().sum()
        gradients.append(torch.autograd.grad(score, [*conv.parameters(), *norm.parameters()]))
    for ours, expected in zip(*gradients, strict=True):
        assert_close(ours, expected, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------ the gain


def held(run):
    """Bytes that are alive when ``run`` is over, with what it returns, and the most that were at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del kept
    return live, peak


def deep(inplace, dtype=torch.float32):
    block = lambda width: [nn.Conv3d(8, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(inplace)]  # noqa: E731
    layers = [nn.Conv3d(1, 8, 3, padding=1), *block(8), nn.MaxPool3d(2), *block(8), *block(8), nn.AvgPool3d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 2)).to(dtype).eval()


@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_kept_for_the_way_back_is_a_bit_or_a_byte_where_stock_autograd_keeps_values(inplace):
    net, inputs = deep(inplace), values(1, 1, 32, 32, 32, dtype=torch.float32)
    leaf = inputs.requires_grad_(True)

    def recorded(mode):
        with undisturbed(net), mode:
            return net(leaf.clone())

    ours, _ = held(lambda: recorded(Lean()))
    theirs, _ = held(lambda: recorded(nullcontext()))
    values_of_map, bits, pooled = 8 * 32**3, 8 * 32**3 // 8 + 2 * 8 * 16**3 // 8, 8 * 16**3
    assert theirs > 4 * 2 * values_of_map
    assert ours <= bits + pooled + 4 * 8**4  # a few numbers a channel, and the head, besides


def test_the_peak_is_little_more_than_that_of_inference():
    net, inputs = deep(True), values(1, 1, 48, 48, 48, dtype=torch.float32)
    _, inference = held(torch.no_grad()(lambda: net(inputs)))
    _, ours = held(lambda: GuidedBackprop()(net, inputs, ClassLogit(0)))
    assert ours <= 1.25 * inference


def test_what_is_not_covered_is_as_ever_and_what_is_covered_is_covered():
    names = Nodes(nn.Sequential(nn.Conv2d(1, 2, 3), nn.PReLU(2)).requires_grad_(False), torch.ones(1, 1, 4, 4)).names
    assert names >= {"ConvolutionBackward", "PreluKernelBackward0"}
    half = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)).requires_grad_(False)
    names = Nodes(half.eval(), torch.ones(1, 1, 6, 6)).names
    assert names >= {"ConvolutionBackward", "ScaledBackward", "CorneredBackward", "MaxPoolBackward"}
