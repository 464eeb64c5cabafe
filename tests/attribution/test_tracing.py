"""Three oracles, none of which knows the tracer's rules.

A ramp, whose value is its coordinate, stays one under averaging and linear interpolation: the output's values are the
cells' centres.  The gradient of a middle cell in a network of equal positive weights has its centroid at that cell's
centre.  The published arithmetic of plain chains is closed.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nets import assert_same_state, random_net, state
from torch import nn

from volsal.attribution import LayerError, ModelError
from volsal.attribution.alignment.tracing import Trace, trace

VOLUME = torch.rand(2, 1, 32, 24, 40)


class Net(nn.Module):
    """A function as a network; `end` is the layer to ask for.  Parts are modules that the function is given."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function, self.end = function, nn.Identity()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        parts = {name: part for name, part in self.named_children() if name != "end"}
        return self.end(self.function(x, **parts))


def traced(function, volume=VOLUME, **parts):
    return trace(Net(function, **parts), volume, ["end"])["end"]


def conv(k=3, s=1, p=1, channels=(1, 1)):
    return nn.Conv3d(*channels, k, s, p)


def assert_trace(found, stride, offset, spread=0.0):
    axes = len(found.cells)
    assert found.lost is None
    for values, expected in ((found.stride, stride), (found.offset, offset), (found.spread, spread)):
        expected = expected if isinstance(expected, tuple) else (expected,) * axes
        assert values == pytest.approx(expected, abs=1e-9)


# --- Chains whose arithmetic is closed ---


@pytest.mark.parametrize(
    ("unit", "stride", "offset"),
    [
        (lambda: [conv(3, 2, 1)], 16, 0),
        (lambda: [conv(), nn.MaxPool3d(2)], 16, 7.5),
        (lambda: [conv(), nn.AvgPool3d(2)], 16, 7.5),
        (lambda: [conv(3, 2, 0)], 16, 15),
        (lambda: [conv(4, 2, 1)], 16, 7.5),
        (lambda: [nn.Conv3d(1, 1, 3, 2, 2, dilation=2)], 16, 0),
        (lambda: [nn.LPPool3d(2, 2)], 16, 7.5),
    ],
    ids=["k3s2p1", "k3-max2", "k3-avg2", "k3s2p0", "k4s2p1", "k3s2p2d2", "lp2"],
)
def test_four_times_a_unit(unit, stride, offset):
    net = nn.Sequential(*(module for _ in range(4) for module in unit()))
    found = trace(net, torch.rand(1, 1, 48, 33, 64), [str(len(net) - 1)])[str(len(net) - 1)]
    assert_trace(found, stride, offset)
    assert found.regular


DOWN = [conv(3, 2, 1) for _ in range(3)]  # 8 i + 0


@pytest.mark.parametrize(
    ("up", "stride", "offset"),
    [
        (nn.Upsample(scale_factor=2), 4, -2),
        (nn.Upsample(scale_factor=2, mode="trilinear"), 4, -2),
        (nn.ConvTranspose3d(1, 1, 3, 2, 1, output_padding=1), 4, 0),
        (nn.ConvTranspose3d(1, 1, 2, 2), 4, -2),
        (nn.ConvTranspose3d(1, 1, 4, 2, 1), 4, -2),
    ],
    ids=["nearest", "trilinear", "k3s2p1op1", "k2s2", "k4s2p1"],
)
def test_upsampling_after_an_encoder(up, stride, offset):
    assert_trace(trace(nn.Sequential(*DOWN, up), VOLUME, ["3"])["3"], stride, offset)


def test_axes_are_told_apart():
    net = nn.Conv3d(1, 2, (1, 3, 5), (1, 2, 3), (0, 1, 0))
    assert_trace(traced(lambda x, conv: conv(x), conv=net), (1, 2, 3), (0, 0, 2))
    assert traced(lambda x, conv: conv(x), conv=net).cells == (32, 12, 12)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_any_number_of_axes(axes):
    volume = torch.rand(1, 1, *(20, 24, 28)[:axes])
    conv, pool = (getattr(nn, f"{name}{axes}d") for name in ("Conv", "MaxPool"))
    found = traced(lambda x, body: body(x), volume, body=nn.Sequential(conv(1, 2, 3, 2, 1), pool(3, 2), pool(2, 1)))
    assert_trace(found, 4, 2 + 2)  # 2i, then 4i + 2, then half a step of 4 further


# --- Every spelling of one operation ---


def by_modules(x):
    x = nn.ZeroPad3d((1, 0, 2, 1, 0, 1))(x)
    x = nn.MaxPool3d(3, 2, 1)(nn.ReLU()(nn.InstanceNorm3d(1)(x)))
    return nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True)(x)


def by_functions(x):
    x = F.pad(x, (1, 0, 2, 1, 0, 1))
    x = F.max_pool3d(F.relu_(F.instance_norm(x)), 3, 2, 1)
    return F.interpolate(x, [2 * size for size in x.shape[2:]], mode="trilinear", align_corners=True)


def by_operators(x):
    x = torch.ops.aten.constant_pad_nd(x, [1, 0, 2, 1, 0, 1])
    x = torch.ops.aten.max_pool3d_with_indices(x.relu(), [3], [2], [1])[0]
    return torch.ops.aten.upsample_trilinear3d(x, [2 * size for size in x.shape[2:]], True)


@pytest.mark.parametrize("spelling", [by_modules, by_functions, by_operators])
def test_every_spelling_is_followed(spelling):
    found = traced(spelling)
    cells = [(size + 1) // 2 for size in (33, 27, 41)]
    stride = tuple(2 * (n - 1) / (2 * n - 1) for n in cells)
    assert_trace(found, stride, (0, -2, -1))


SAME = {
    "batch": lambda x: F.batch_norm(x, torch.zeros(1), torch.ones(1)),
    "group": lambda x: F.group_norm(x, 1),
    "layer": lambda x: F.layer_norm(x, x.shape[2:]),
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout3d": lambda x: F.dropout3d(x, 0.3, training=True),
    "softmax": lambda x: x.softmax(1),
    "prelu": lambda x: F.prelu(x, torch.ones(1)),
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "rrelu": F.rrelu,
    "in place": lambda x: x.clone().mul_(2).add_(1).relu_().clamp_(0, 3),
    "convert": lambda x: x.double().half().float().contiguous(memory_format=torch.channels_last_3d),
    "parameter": lambda x: x * torch.ones(1, 1, 1, 1, 40) + torch.ones(32, 24, 40),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "lerp": lambda x: torch.lerp(x, x, 0.5),
    "masked": lambda x: x.clone().masked_fill_(x > 0.5, 0),
    "normalize": lambda x: F.normalize(x, dim=1),
    "gate": lambda x: x * x.mean((2, 3, 4), keepdim=True).sigmoid(),
    "expanded gate": lambda x: x * x.mean((2, 3, 4)).view(2, 1, 1, 1, 1).expand_as(x),
    "lost gate": lambda x: x * x.flatten(1).sort(1)[0].mean(1).view(2, 1, 1, 1, 1),
    "global context": lambda x: torch.cat([x, F.interpolate(F.adaptive_avg_pool3d(x, 1), x.shape[2:])], 1),
    "aligned context": lambda x: x + F.interpolate(x[:, :, 3:4, 4:5, 5:6], x.shape[2:], None, "trilinear", True),
    "cat of one": lambda x: torch.cat([x], 2),
    "channel attention": lambda x: ((a := x.flatten(2)) @ a.transpose(1, 2)).softmax(-1).matmul(a).view_as(x) + x,
    "chunks": lambda x: torch.cat(torch.cat([x, x], 1).chunk(2, 1)[::-1], 1),
    "stack": lambda x: torch.stack([x, x], 1).unbind(1)[0] + torch.stack([x, x]).mean(0),
    "choice": lambda x: torch.cat([x, x], 1)[:, [0]] + torch.cat([x, x], 1)[:, 1:],
    "permute": lambda x: x.permute(4, 0, 3, 1, 2).transpose(0, 2).permute(1, 3, 4, 0, 2),
    "flatten": lambda x: x.flatten(2).unflatten(2, x.shape[2:]),
    "squeeze": lambda x: x[:, 0].unsqueeze(1).squeeze(1)[:, None],
    "linear": lambda x: F.linear(x.movedim(1, -1), torch.ones(3, 1), torch.ones(3)).movedim(-1, 1),
    "einsum": lambda x: torch.einsum("bcdhw,ce->bedhw", x, torch.ones(1, 2)),
    "flip twice": lambda x: x.flip(2, 4).flip(4, 2),
    "slice back": lambda x: F.pad(x, (3, 3, 0, 0, 1, 2))[:, :, 1:-2, :, 3:-3],
    "shuffle": lambda x: F.max_pool3d(x.repeat_interleave(2, 2).repeat_interleave(3, 4), (2, 1, 3)),
    "windows": lambda x: (
        x.view(2, 1, 4, 8, 3, 8, 40).permute(0, 2, 4, 3, 5, 6, 1).reshape(24, 64 * 40, 1)
        .relu().view(2, 4, 3, 8, 8, 40, 1).permute(0, 6, 1, 3, 2, 4, 5).reshape(2, 1, 32, 24, 40)
    ),
}  # fmt: skip


@pytest.mark.parametrize("operation", SAME)
def test_what_moves_no_cell(operation):
    found = traced(SAME[operation])
    assert_trace(found, 1, 0)
    assert found.regular
    assert found.cells == (32, 24, 40)
    assert found.notes == ()


MOVES = {
    "slice": (lambda x: x[..., 3::2, :-1], (1, 2, 1), (0, 3, 0)),
    "narrow": (lambda x: x.narrow(2, 4, 9).narrow(-1, -6, 4), (1, 1, 1), (4, 0, 34)),
    "index_select": (lambda x: x.index_select(3, torch.arange(5, 20, 3)), (1, 3, 1), (0, 5, 0)),
    "indices": (lambda x: x[:, :, torch.arange(10, 0, -2)], (-2, 1, 1), (10, 0, 0)),
    "flip": (lambda x: x.flip(-1), (1, 1, -1), (0, 0, 39)),
    "crop by pad": (lambda x: F.pad(x, (-2, 0, 1, -1)), (1, 1, 1), (0, -1, 2)),
    "reflect": (lambda x: F.pad(x, (2, 0, 1, 1, 0, 3), "reflect"), (1, 1, 1), (0, -1, -2)),
    "replicate": (lambda x: F.pad(x, (2, 0, 1, 1, 0, 3), "replicate"), (1, 1, 1), (0, -1, -2)),
    "circular": (lambda x: F.pad(x, (2, 0, 1, 1, 0, 3), "circular"), (1, 1, 1), (0, -1, -2)),
    "same": (lambda x: F.conv3d(x, torch.ones(1, 1, 4, 3, 2), padding="same"), (1, 1, 1), (0.5, 0, 0.5)),
    "nearest down": (lambda x: F.interpolate(x, (16, 12, 20)), 2, 0),
    "nearest-exact down": (lambda x: F.interpolate(x, (16, 12, 20), mode="nearest-exact"), 2, 1),
    "nearest 3/2": (lambda x: F.interpolate(x, (48, 36, 60)), 2 / 3, -1 / 3),
    "stated scale": (lambda x: F.interpolate(x, scale_factor=0.3, mode="trilinear"), 1 / 0.3, (1 / 0.3 - 1) / 2),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 3), (1, 0.5, 1), (0, -0.25, 0)),
    "adaptive 1": (lambda x: F.adaptive_avg_pool3d(x, 1), (32, 24, 40), (15.5, 11.5, 19.5)),
    "adaptive max": (lambda x: F.adaptive_max_pool3d(x, (8, 1, 10)), (4, 24, 4), (1.5, 11.5, 1.5)),
    "mean": (lambda x: x.mean(3, keepdim=True), (1, 24, 1), (0, 11.5, 0)),
    "space to depth": (
        lambda x: F.conv3d(x.view(2, 1, 8, 4, 24, 40).movedim(3, 1).flatten(1, 2), torch.ones(1, 4, 1, 1, 1)),
        (4, 1, 1),
        (1.5, 0, 0),
    ),
    "dilated pool": (lambda x: F.max_pool3d(x, 3, 2, 1, dilation=(1, 2, 3)), 2, (0, 1, 2)),
    "windows of unfold": (lambda x: x.unfold(2, 5, 3).mean(-1), (3, 1, 1), (2, 0, 0)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("operation", MOVES)
def test_what_moves_cells(operation):
    function, stride, offset = MOVES[operation]
    assert_trace(traced(function), stride, offset)


def test_pixel_shuffle_divides_a_cell():
    volume = torch.rand(1, 4, 6, 10)
    assert_trace(traced(lambda x: F.avg_pool2d(F.pixel_shuffle(x, 2), 1), volume), 0.5, -0.25)
    assert_trace(traced(lambda x: F.pixel_shuffle(x, 2), volume), 0.5, -0.25)


@pytest.mark.parametrize("cells", [1, 3, 5, 7, 16])
def test_uneven_adaptive_pooling_has_the_mean_centre(cells):
    found = traced(lambda x: F.adaptive_avg_pool3d(x, cells))
    for axis, size in enumerate(VOLUME.shape[2:]):
        centres = F.adaptive_avg_pool1d(torch.arange(size, dtype=torch.float64)[None], cells)
        assert found.offset[axis] + found.stride[axis] * (cells - 1) / 2 == pytest.approx(float(centres.mean()))


# --- Random chains against the ramp ---

SIZE = (121, 90)


def uniform(kernel):
    return torch.full((1, 1, *kernel), 1 / math.prod(kernel), dtype=torch.float64)


def triangle(stride, even):
    """The transposed convolution's kernel that interpolates linearly: a ramp stays one."""
    size = 2 * stride - (0 if even else 1)
    row = 1 - (torch.arange(size, dtype=torch.float64) - (size - 1) / 2).abs() / stride
    return torch.outer(row, row)[None, None]


def blind(x):
    """Edge cells as unknown: what interpolation makes of them is clamped."""
    x = x.clone()
    for axis in (2, 3):
        x.narrow(axis, 0, 1).fill_(math.nan)
        x.narrow(axis, -1, 1).fill_(math.nan)
    return x


pair = st.tuples(st.integers(1, 4), st.integers(1, 3))


@st.composite
def convolutions(draw):
    kernel, stride = (draw(pair), draw(pair))
    padding, dilation = draw(st.tuples(st.integers(0, 2), st.integers(0, 2))), draw(st.sampled_from([1, 1, 2]))
    weight = uniform(kernel)
    op = lambda x: F.conv2d(x, weight, None, stride, padding, dilation)  # noqa: E731
    return op, op


@st.composite
def pools(draw):
    kernel = draw(st.tuples(st.integers(2, 4), st.integers(2, 3)))
    stride, ceil, kind = draw(pair), draw(st.booleans()), draw(st.sampled_from([F.max_pool2d, F.avg_pool2d]))
    area = math.prod(kernel)  # a window that hangs over the edge no longer averages to 1, and so shows
    return (
        lambda x: kind(x, kernel, stride, 1, ceil_mode=ceil),
        lambda x: F.avg_pool2d(x, kernel, stride, 1, ceil, divisor_override=area),
    )


@st.composite
def pads(draw):
    pad = draw(st.lists(st.integers(-2, 2), min_size=4, max_size=4))
    mode = draw(st.sampled_from(["constant", "reflect", "replicate", "circular"]))
    if mode != "constant":
        pad = [abs(width) for width in pad]
    return lambda x: F.pad(x, pad, mode), lambda x: F.pad(x, pad, value=math.nan)


@st.composite
def slices(draw):
    start, step = draw(st.integers(0, 3)), draw(st.integers(1, 2))
    flip = draw(st.booleans())
    op = lambda x: (x.flip(2) if flip else x)[:, :, start:, ::step]  # noqa: E731
    return op, op


@st.composite
def resizes(draw):
    mode, corners = "bilinear", draw(st.booleans())
    if draw(st.booleans()):
        size = draw(st.tuples(st.integers(40, 120), st.integers(40, 120)))
        op = lambda x: F.interpolate(x, size, mode=mode, align_corners=corners)  # noqa: E731
    else:
        scale = draw(st.sampled_from([1.5, 2.0, 1.3]))
        op = lambda x: F.interpolate(x, scale_factor=scale, mode=mode, align_corners=corners)  # noqa: E731
    return op, lambda x: op(blind(x))


@st.composite
def transposed(draw):
    stride, even = draw(st.integers(2, 3)), draw(st.booleans())
    weight, padding, extra = triangle(stride, even), draw(st.integers(0, 2)), draw(st.integers(0, 1))
    op = lambda x: F.conv_transpose2d(x, weight, None, stride, padding, extra)  # noqa: E731
    return op, op


operations = st.one_of(convolutions(), pools(), pads(), slices(), resizes(), transposed())


@settings(max_examples=50, deadline=None)
@given(st.lists(operations, min_size=1, max_size=6))
def test_any_chain_takes_a_ramp_to_its_cells_centres(chain):
    def run(x, which):
        for operation in chain:
            x = operation[which](x)
            assume(min(x.shape[2:]) >= 6 and max(x.shape[2:]) <= 300)
        return x

    volume = torch.rand(1, 1, *SIZE, dtype=torch.float64)
    run(volume, 0)
    found = traced(lambda x: run(x, 0), volume)
    # Zero padding shows where ones do not stay ones, every other border as NaN.
    clean = (run(torch.ones(1, 1, *SIZE, dtype=torch.float64), 1) - 1).abs() < 1e-9
    checked = 0
    for axis, size in enumerate(SIZE):
        shape = [1, 1, 1, 1]
        shape[2 + axis] = size
        ramp = torch.arange(size, dtype=torch.float64).view(shape).expand(1, 1, *SIZE)
        values = run(ramp, 1)
        index = torch.arange(values.shape[2 + axis], dtype=torch.float64).view(
            [-1 if d == 2 + axis else 1 for d in range(4)]
        )
        expected = (found.offset[axis] + found.stride[axis] * index).expand_as(values)
        good = clean & values.isfinite()
        checked += int(good.sum())
        torch.testing.assert_close(values[good], expected[good], rtol=0, atol=1e-6)
    assume(checked)
    assert found.spread == (0, 0)


# --- Real networks against the gradient of one cell ---


def positive(model):
    """Make all kernels even and all gates open, so that only the architecture decides."""
    model.eval().requires_grad_(False)
    for module in list(model.modules()):
        if hasattr(module, "has_se"):  # EfficientNet's gates, which are functions
            module.has_se = False
        for name, child in module.named_children():
            if isinstance(child, nn.MaxPool3d):  # of a flat input it would pick the first of equals
                pool = nn.AvgPool3d(child.kernel_size, child.stride, child.padding, child.ceil_mode)
                setattr(module, name, pool)
            elif isinstance(child, nn.Sigmoid):
                setattr(module, name, nn.Hardtanh(1.0, 1.0 + 1e-6))
    for name, parameter in model.named_parameters():
        even = 1 / parameter[0].numel() if parameter.ndim > 1 else float(name.endswith("weight"))
        parameter.data.fill_(even)


def centroids(model, layers, shape):
    """{layer: (cell, where the middle cell of the first axis reads)} for an input that is long there."""
    kept = {}
    positive(model)
    for layer in layers:
        hook = lambda module, args, output, layer=layer: kept.update({layer: output})  # noqa: E731
        model.get_submodule(layer).register_forward_hook(hook)
    volume = torch.ones(shape, requires_grad=True)
    model(volume)
    found = {}
    for layer, output in kept.items():
        cell, *others = (size // 2 for size in output.shape[2:])
        seen = output[(0, slice(None), cell, *others)].sum()
        weight = torch.autograd.grad(seen, volume, retain_graph=True)[0].abs().double().sum((0, 1, 3, 4))
        found[layer] = cell, float((weight * torch.arange(len(weight))).sum() / weight.sum())
    return found


# Fewer channels than these have by default, which changes no place.
NARROW = {"spatial_dims": 3, "n_input_channels": 1, "widen_factor": 0.25}
NETS = {
    "resnet18": (lambda n: n.resnet18(**NARROW), 8, {"layer3": (8, 0), "layer4": (16, 0)}),
    "resnet18 s2": (lambda n: n.resnet18(**NARROW, conv1_t_stride=2), 8, {"layer4": (32, 0)}),
    "resnet50": (lambda n: n.resnet50(**NARROW), 8, {"layer3": (8, 0), "layer4": (16, 0)}),
    "DenseNet121": (lambda n: n.DenseNet121(3, 1, 2, init_features=8, growth_rate=4), 32, {"features.norm5": (32, 14)}),
    "SEResNet50": (lambda n: n.SEResNet50(spatial_dims=3, in_channels=1), 16, {"layer4": (32, 2)}),
    "EfficientNet": (
        lambda n: n.EfficientNetBN("efficientnet-b0", spatial_dims=3, in_channels=1),
        32,
        {"_bn1": (32, 31)},
    ),
    "UNet": (
        lambda n: n.UNet(3, 1, 2, (4, 8, 16), (2, 2), norm="batch"),
        16,
        {"model.1.submodule.1.submodule": (4, 0), "model": (1, 0)},
    ),
    "BasicUNet": (lambda n: n.BasicUNet(3, 1, 2, (4,) * 6, norm="batch"), 16, {"down_4": (16, 7.5)}),
    "SegResNet": (lambda n: n.SegResNet(3, 8, 1, 2, norm="batch"), 16, {"down_layers.3": (8, 0)}),
}


SLOW = {"SEResNet50"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NETS])
def test_monai_networks_by_table_and_by_gradient(name):
    nets = pytest.importorskip("monai.networks.nets")
    make, thin, layers = NETS[name]
    torch.manual_seed(0)
    model = make(nets)
    found = trace(model, torch.rand(1, 1, 64, 32, 32), layers)
    seen = centroids(model, layers, (1, 1, 512, thin, thin))
    for layer, (stride, offset) in layers.items():
        assert_trace(found[layer], stride, offset)
        assert found[layer].regular
        cell, centre = seen[layer]
        assert centre == pytest.approx(offset + stride * cell, abs=0.01)


def test_attention_follows_the_query():
    tokens = nn.MultiheadAttention(4, 2, batch_first=True)
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    patches = nn.Conv3d(1, 4, 8, 8)

    def run(x, patches, tokens, encoder):
        x = patches(x).flatten(2).transpose(1, 2) + torch.zeros(1, 60, 4)
        x = encoder(x + tokens(x, x, x)[0])
        return x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]

    found = traced(run, patches=patches, tokens=tokens, encoder=encoder)
    assert_trace(found, 8, 3.5)
    assert found.axes == ((), (0, 1, 2), ())
    assert found.cells == (4, 3, 5)
    assert not found.regular


@pytest.mark.parametrize("projection", ["conv", "perceptron"])
def test_monai_vision_transformer(projection):
    pytest.importorskip("einops")
    nets = pytest.importorskip("monai.networks.nets")
    model = nets.ViT(1, (32, 24, 40), 8, 24, 48, 2, 4, proj_type=projection)
    found = trace(model, VOLUME, ["patch_embedding", "blocks.0.attn", "blocks.1", "norm"])
    for layer in found.values():
        assert_trace(layer, 8, 3.5)
        assert layer.axes == ((), (0, 1, 2), ())


@pytest.mark.slow
def test_monai_swin_transformer():
    pytest.importorskip("einops")
    nets = pytest.importorskip("monai.networks.nets")
    model = nets.SwinUNETR(1, 2, feature_size=12)
    names = ["patch_embed", "layers1.0.blocks.0", "layers1.0.blocks.0.attn", "layers1.0.blocks.1", "layers4.0"]
    found = trace(model, torch.rand(1, 1, 64, 64, 32), [f"swinViT.{name}" for name in names])
    embedded, block, attention, rolled, last = found.values()
    assert_trace(embedded, 2, 0.5)
    assert_trace(block, 2, 0.5)
    assert block.axes == ((), (0,), (1,), (2,), ())
    assert "runs along 2 of the dimensions" in attention.lost  # which window, and where in it
    assert_trace(rolled, 2, 0.5)
    assert rolled.notes == ()  # shifted for its windows, and shifted back
    assert last.stride == (32, 32, 32)
    assert last.offset == (15.5, 15.5, 15.5)


# --- What cannot be followed is said ---


def shifted_in_place(x, write):
    moved = x.clone()
    write(moved[:, :, 1:], x[:, :, :-1])
    return moved


LOST = {
    "shift by copying": (lambda x: shifted_in_place(x, torch.Tensor.copy_), "in place into a part"),
    "shift by adding": (lambda x: shifted_in_place(x, torch.Tensor.add_), "in place into a part"),
    "sort": (lambda x: x.sort(2)[0], "aten.sort"),
    "roll": (lambda x: x.roll(1, 2), "shifted cyclically"),
    "filter rolled": (lambda x: F.avg_pool3d(x.roll(1, 2), 2), "along cells that are shifted cyclically"),
    "flattened roll": (lambda x: x.roll(1), "over the flattened tensor"),
    "grid_sample": (lambda x: F.grid_sample(x, torch.zeros(2, 4, 4, 4, 3), align_corners=False), "grid_sampler_3d"),
    "after": (lambda x: F.max_pool3d(x.cumsum(2).relu(), 2) * x.mean(), "aten.cumsum"),
    "cat": (lambda x: torch.cat([x, x], 2), "aten.cat.default along a spatial axis"),
    "uneven indices": (lambda x: x[:, :, torch.tensor([0, 1, 5])], "not evenly spaced"),
    "mask": (lambda x: x[:, :, torch.arange(32) > 3], "several indices or a mask"),
    "uneven view": (lambda x: x.reshape(2, 1, 24, 32, 40), "cuts a row of cells unevenly"),
    "transposed join": (lambda x: x[..., :24] + x[..., :24].transpose(3, 4), "along different axes"),
    "no axis": (lambda x: x.mean(3), "spatial axis 1 runs along none of the dimensions"),
    "attention matrix": (lambda x: (q := x.flatten(3)) @ q.transpose(2, 3), "runs along none"),
    "pool of tokens": (lambda x: F.max_pool1d(x.flatten(2), 2), "into which several are folded"),
    "of nothing": (lambda x: torch.ones(1, 1, 4, 4, 4), "does not descend from the input"),
    "zeros like": (torch.zeros_like, "does not descend from the input"),
    "statistics": (lambda x: torch.native_layer_norm(x, (40,), None, None, 1e-5)[1], "beside its result"),
    "repeat": (lambda x: x.repeat(1, 1, 2, 1, 1), "aten.repeat.default along a spatial axis"),
}  # fmt: skip


@pytest.mark.parametrize("operation", LOST)
def test_what_cannot_be_followed_says_where(operation):
    function, reason = LOST[operation]
    found = traced(function)
    assert reason in found.lost
    assert (found.cells, found.stride, found.offset, found.regular) == ((), (), (), False)


def test_a_custom_operator_is_not_guessed():
    @torch.library.custom_op("volsal_test::mirror", mutates_args=())
    def mirror(x: torch.Tensor) -> torch.Tensor:
        return x.flip(2)

    assert "volsal_test.mirror" in traced(lambda x: mirror(x)).lost


@pytest.mark.parametrize("join", [torch.add, torch.mul, lambda a, b: torch.cat([a, b], 1)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_lost_branch_leaves_the_known_one_with_a_note(join, turned):
    def run(x):
        branches = [x[..., 1:], x.sort(2)[0][..., 1:]]
        return join(*reversed(branches) if turned else branches)

    found = traced(run)
    assert_trace(found, 1, (0, 0, 1))
    assert found.notes == ("joined with a branch that was lost: aten.sort.default",)


@pytest.mark.parametrize("join", [torch.add, torch.mul, torch.maximum, lambda a, b: torch.cat([a, b], 1)])
def test_branches_that_differ_have_their_mean_and_say_by_how_much(join):
    assert_trace(traced(lambda x: join(x[:, :, 3:], x[:, :, :-3])), 1, (1.5, 0, 0), (1.5, 0, 0))


def test_branches_of_different_stride_spread_to_the_far_end():
    # 40 cells that lie 0.8 voxels apart from -0.1, and 40 voxels from 0: the last ones are 31.1 and 39.
    found = traced(lambda x: F.interpolate(x[:, :, :, :, :32], (32, 24, 40), mode="trilinear") + x)
    assert_trace(found, (1, 1, 0.9), (0, 0, -0.05), (0, 0, (39 - 31.1) / 2))


def test_permuted_axes_are_named():
    found = traced(lambda x: x.permute(0, 1, 4, 2, 3)[:, :, ::2])
    assert found.axes == ((), (), (2,), (0,), (1,))
    assert found.cells == (32, 24, 20)
    assert_trace(found, (1, 1, 2), 0)
    assert not found.regular
    assert traced(lambda x: x.movedim(1, -1)).axes == ((), (0,), (1,), (2,), ())


# --- Programs ---


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(3, 2, 1), nn.ReLU(inplace=True), nn.MaxPool3d(2))
        self.last = nn.Conv3d(1, 1, (3, 1, 2))

    def forward(self, x):
        return self.last(F.pad(self.body(x), (1, 0)) + 1)


EXPECTED = Trace((6, 6, 10), (4.0,) * 3, (5.0, 1.0, -1.0), (0.0,) * 3, ((), (), (0,), (1,), (2,)))


@pytest.mark.filterwarnings("ignore")  # torch.export warns about itself
def test_an_exported_program_is_followed(tmp_path):
    torch.export.save(torch.export.export(Small(), (VOLUME,)), tmp_path / "net.pt2")
    model = torch.export.unflatten(torch.export.load(tmp_path / "net.pt2"))
    assert trace(model, VOLUME, ["last"]) == trace(Small(), VOLUME, ["last"]) == {"last": EXPECTED}


@pytest.mark.filterwarnings("ignore")
def test_an_exported_graph_is_followed():
    graph = torch.export.export(Small(), (VOLUME,)).module()
    assert traced(lambda x: graph(x)) == EXPECTED  # not a part: it has no eval()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, VOLUME)])
def test_a_scripted_module_is_followed(make):
    assert traced(lambda x, script: script(x), script=make(Small())) == EXPECTED


# --- The contract ---


def test_one_pass_serves_many_layers_and_changes_nothing():
    net = random_net().train()
    before, calls = state(net), []
    handle = net[0].register_forward_hook(lambda *_: calls.append(1))
    found = trace(net, torch.randn(2, 1, 7, 9, 11, dtype=torch.float64), ["0", "2", "4"])
    handle.remove()
    assert_same_state(before, state(net))
    assert list(found) == ["0", "2", "4"]
    assert len(calls) == 1
    assert_trace(found["0"], 1, 0)
    assert_trace(found["4"], 2, 1)


def test_the_volume_is_left_alone_and_may_be_a_metatensor():
    MetaTensor = pytest.importorskip("monai.data").MetaTensor
    volume = MetaTensor(VOLUME.clone())
    assert_trace(traced(lambda x: x.mul_(0)[:, :, 1:], volume), 1, (1, 0, 0))
    assert torch.equal(volume.as_tensor(), VOLUME)


def test_places_do_not_outlive_tensors_whose_memory_is_used_again():
    def run(x):
        for _ in range(200):  # freed and made again, often with the same id
            x = F.pad(x, (1, 0))[..., 1:] + 0
            torch.ones_like(x)
        return x

    assert_trace(traced(run, torch.rand(1, 1, 3, 4, 5)), 1, 0)


@pytest.mark.parametrize(
    ("function", "layer", "message"),
    [
        (lambda x, end: end(end(x)), "end", "runs more than once"),
        (lambda x, end: x, "end", "did not run"),
        (lambda x, end: end((x, x)), "end", "returns a tuple"),
        (lambda x, end: x, "and", "no layer 'and'; did you mean 'end'"),
    ],
)
def test_layers_that_have_no_single_output(function, layer, message):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.end = nn.Identity()

        def forward(self, x):
            return function(x, self.end)

    net = Odd()
    with pytest.raises(LayerError, match=message):
        trace(net, VOLUME, [layer])
    assert not net.end._forward_hooks


def test_a_model_that_fails_is_left_as_it_was():
    net = nn.Sequential(conv(), nn.Conv3d(2, 1, 1)).train()
    before = state(net)
    with pytest.raises(ModelError, match="expected input"):
        trace(net, VOLUME, ["0"])
    assert_same_state(before, state(net))
