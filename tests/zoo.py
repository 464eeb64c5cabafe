"""The architecture families of medical imaging, each as small as it gets, and what may be wrapped around a network.

A family's network is made from a fixed seed; its input is (C, *spatial).  Segmentation networks are asked for the
second class's logit, summed over the volume.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from nets import assert_same_state, state
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from volsal import METHODS, ClassLogit
from volsal.attribution import Method, Target
from volsal.errors import VolsalError


def summed(output: Tensor) -> Tensor:
    """The second class's logit over the whole volume."""
    return output[:, 1].flatten(1).sum(1)


def first_of(output: tuple[Tensor, Any]) -> Tensor:
    """Class 1 of a network that returns its hidden states beside the logits."""
    return output[0][:, 1]


@dataclass(frozen=True)
class Family:
    """A network to be made, the shape (C, *spatial) of its input, what is asked of it, and where its map is taken.

    ``default`` is the layer that is taken where none is named.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    target: Target
    default: str

    def model(self, seed: int = 0) -> nn.Module:
        """In evaluation mode, always the same; statistics and weights are none that a rule could hide behind."""
        generator = torch.random.fork_rng()
        with generator:
            torch.manual_seed(seed)
            net = self.make()
            for module in net.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 1.5)
            for name, parameter in net.named_parameters():
                if name.endswith(("pos_embed", "position_embeddings", "cls_token")):
                    nn.init.normal_(parameter, 0, 0.5)
        return net.eval()

    def volume(self, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Smooth noise, (batch, *shape)."""
        noise = torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(5))
        pool = F.avg_pool3d if noise.ndim == 5 else F.avg_pool2d
        return (noise + 4 * pool(noise, 3, 1, 1)).to(dtype)


# --- Networks that MONAI has no small version of, and awkward ones ---


class SqueezeExcitation(nn.Module):
    """MONAI's blocks of SE-ResNets."""

    def __init__(self):
        super().__init__()
        from monai.networks.blocks.squeeze_and_excitation import SEResNetBottleneck

        down = nn.Conv3d(6, 16, 1, 2)
        self.stem = nn.Sequential(nn.Conv3d(1, 6, 3, 2, 1), nn.BatchNorm3d(6), nn.ReLU(inplace=True))
        self.layer1 = SEResNetBottleneck(3, 6, 4, 1, 2, 2, down)
        self.layer2 = SEResNetBottleneck(3, 16, 4, 1, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3, 4)))


def vgg(act: Callable[[], nn.Module] = lambda: nn.ReLU(inplace=True)) -> nn.Module:
    """Convolutions, poolings, and a head that knows every cell by its place."""
    layers: list[nn.Module] = []
    for before, after in ((1, 4), (4, 6), (6, 8)):
        layers += [nn.Conv3d(before, after, 3, padding=1), act(), nn.MaxPool3d(2)]
    return nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(8 * 27, 12), act(), nn.Linear(12, 3))


class Slices(nn.Module):
    """A 2D network on every axial slice, and an RNN over the slices; ``fold`` says how the slices join the batch."""

    def __init__(self, recurrent: type[nn.Module] = nn.GRU):
        super().__init__()
        self.slice = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU()
        )
        self.over = recurrent(6, 5, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        batch, slices = x.shape[0], x.shape[-1]
        cells = self.slice(x.permute(0, 4, 1, 2, 3).flatten(0, 1))
        features = cells.mean((2, 3)).unflatten(0, (batch, slices))
        return self.head(self.over(features)[0][:, -1])


class Twice(nn.Module):
    """One activation in two places, and one block whose weights are used twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.act = nn.Conv3d(1, 4, 3, 2, 1), nn.Conv3d(4, 4, 3, 1, 1), nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.act(self.stem(x))
        x = self.act(self.block(x))
        return self.head(self.block(x).mean((2, 3, 4)))


class InPlace(nn.Module):
    """Writes wherever it can."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv3d(1, 4, 3, 2, 1), nn.Conv3d(4, 4, 3, 1, 1)
        self.norm, self.act, self.drop = nn.BatchNorm3d(4), nn.LeakyReLU(0.1, inplace=True), nn.Dropout3d(0.3, True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x.mul_(0.5)).relu_()
        y = self.drop(self.norm(self.conv(x)).mul_(2))
        y += x
        return self.head(self.act(y).mean((2, 3, 4)).add_(1))


class Functional(nn.Module):
    """No activation is a module."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv3d(1, 4, 3, 2, 1), nn.Conv3d(4, 5, 3, 2, 1), nn.Linear(5, 3)

    def forward(self, x):
        x = F.max_pool3d(F.relu(self.stem(x)), 2)
        return self.head(torch.flatten(F.adaptive_avg_pool3d(self.conv(x).relu(), 1), 1))


class Checkpointed(nn.Module):
    """Its second half is run again in the backward pass."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(1, 4, 3, 2, 1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv3d(4, 5, 3, 1, 1), nn.ReLU(), nn.Conv3d(5, 5, 3, 1, 1), nn.ReLU())
        self.head = nn.Linear(5, 3)
        self.reentrant = reentrant

    def forward(self, x):
        x = self.stem(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a re-entrant one, where nothing before it needs a gradient
            x = checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3, 4)))


class Autocasting(nn.Module):
    """Turns autocast on for itself."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype = torch.float16):
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, x):
        with torch.autocast(x.device.type, self.dtype):
            return self.inner(x)


class ClassToken(nn.Module):
    """A transformer that answers from a class token, with the tokens first or second."""

    def __init__(self, answer: str = "token"):
        super().__init__()
        self.patches = nn.Conv3d(1, 16, 8, 8)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 37, 16))
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True) for _ in range(2))
        )
        self.norm, self.head, self.answer = nn.LayerNorm(16), nn.Linear(16, 3), answer

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        x = self.norm(self.blocks(x))
        return self.head(x[:, 0] if self.answer == "token" else x[:, 1:].mean(1))


def monai(name: str, *args: Any, **settings: Any) -> Callable[[], nn.Module]:
    """A network of MONAI's."""

    def make() -> nn.Module:
        from monai.networks import nets

        return getattr(nets, name)(*args, **settings)

    return make


class Only(nn.Module):
    """The first thing that a network returns."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


def swin_classifier() -> nn.Module:
    """The encoder of a Swin UNETR with a linear head on its second stage."""
    from monai.networks.nets.swin_unetr import SwinTransformer

    class Swin(nn.Module):
        def __init__(self):
            super().__init__()
            self.swin = SwinTransformer(1, 6, (2, 2, 2), (2, 2, 2), (2, 2, 1, 1), (2,) * 4, spatial_dims=3)
            self.head = nn.Linear(24, 3)

        def forward(self, x):
            return self.head(self.swin(x)[2].mean((2, 3, 4)))

    return Swin()


DYN = {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 6, 8]}
EFFICIENT = ["r1_k3_s11_e1_i32_o8_se0.25", "r2_k3_s22_e2_i8_o16_se0.25"]
THREE = (1, 24, 20, 28)

FAMILIES: dict[str, Family] = {
    "ResNet": Family(
        monai("ResNet", "basic", [1] * 4, [4, 6, 8, 10], spatial_dims=3, n_input_channels=1, num_classes=3),
        THREE, ClassLogit(1), "layer4",
    ),
    "SE-ResNet": Family(SqueezeExcitation, THREE, ClassLogit(1), "layer2"),
    "DenseNet": Family(
        monai("DenseNet", 3, 1, 3, init_features=8, growth_rate=4, block_config=(2, 2)),
        THREE, ClassLogit(1), "class_layers.relu",
    ),
    "EfficientNet": Family(
        monai("EfficientNet", EFFICIENT, 3, 1, 3, width_coefficient=0.05, depth_coefficient=1.0, image_size=24),
        THREE, ClassLogit(1), "_swish#2",
    ),
    "VGG": Family(vgg, (1, 24, 24, 24), ClassLogit(1), "0"),
    "U-Net": Family(monai("UNet", 3, 1, 3, (4, 6, 8), (2, 2), norm="batch"), (1, 16, 20, 24), summed, "model.1"),
    "DynUNet": Family(monai("DynUNet", 3, 1, 3, **DYN), (1, 16, 20, 24), summed, "skip_layers"),
    "DynUNet, deep supervision": Family(
        monai("DynUNet", 3, 1, 3, **DYN, deep_supervision=True, deep_supr_num=1), (1, 16, 20, 24), summed, "skip_layers"
    ),
    "SegResNet": Family(
        monai("SegResNet", 3, 8, 1, 3, blocks_down=(1, 1, 1), blocks_up=(1, 1)), (1, 12, 16, 20), summed, "act_mod"
    ),
    "ViT": Family(
        monai("ViT", 1, (24, 16, 32), 8, 24, 48, 3, 4, classification=True, num_classes=3),
        (1, 24, 16, 32), first_of, "blocks.1",
    ),
    "ViT, class token": Family(ClassToken, (1, 24, 32, 24), ClassLogit(1), "blocks.0"),
    "ViT, mean of tokens": Family(lambda: ClassToken("mean"), (1, 24, 32, 24), ClassLogit(1), "norm"),
    "UNETR": Family(
        monai("UNETR", 1, 3, (32, 32, 32), feature_size=4, hidden_size=24, mlp_dim=32, num_heads=2),
        (1, 32, 32, 32), summed, "decoder2",
    ),
    "Swin UNETR": Family(
        # With instance norms it would need two cells at the bottleneck, and so a larger input.
        monai("SwinUNETR", 1, 3, feature_size=12, depths=(2, 1, 1, 1), norm_name="batch"),
        (1, 32, 32, 32), summed, "decoder1",
    ),
    "Swin classifier": Family(swin_classifier, (1, 32, 32, 48), ClassLogit(1), "swin.layers2.0"),
    "GRU over slices": Family(Slices, (1, 20, 24, 6), ClassLogit(1), "slice"),
    "LSTM over slices": Family(lambda: Slices(nn.LSTM), (1, 20, 24, 6), ClassLogit(1), "slice"),
    "layers twice": Family(Twice, THREE, ClassLogit(1), "block#2"),
    "in place": Family(InPlace, THREE, ClassLogit(1), "act"),
    "functional": Family(Functional, THREE, ClassLogit(1), "conv"),
    "2D": Family(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
        ),
        (1, 24, 20), ClassLogit(1), "4",
    ),
}  # fmt: skip


# --- What may be wrapped around a network, or done to it ---


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def half(model: nn.Module) -> nn.Module:
    return model.half()


def scripted(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(model, torch.randn(2, *THREE))


def _on(make: Callable[[], nn.Module], change: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: change(make())


VARIANTS: dict[str, Family] = {
    "re-entrant checkpoint": Family(lambda: Checkpointed(True), THREE, ClassLogit(1), "stem"),
    "checkpoint": Family(lambda: Checkpointed(False), THREE, ClassLogit(1), "body"),
    "DataParallel": Family(_on(Functional, nn.DataParallel), THREE, ClassLogit(1), "conv"),
    "torch.compile": Family(_on(Functional, compiled), THREE, ClassLogit(1), "conv"),
    "TorchScript": Family(_on(Functional, scripted), THREE, ClassLogit(1), ""),
    "frozen": Family(_on(Functional, lambda net: net.requires_grad_(False)), THREE, ClassLogit(1), "conv"),
    "float16 weights": Family(_on(Functional, half), THREE, ClassLogit(1), "conv"),
    "bfloat16 weights": Family(_on(Functional, nn.Module.bfloat16), THREE, ClassLogit(1), "conv"),
    "float16 autocast inside": Family(_on(Functional, Autocasting), THREE, ClassLogit(1), "inner.conv"),
    "channels_last_3d": Family(
        _on(Functional, lambda net: net.to(memory_format=torch.channels_last_3d)), THREE, ClassLogit(1), "conv"
    ),
    "BatchNorm without statistics": Family(
        lambda: nn.Sequential(
            nn.Conv3d(1, 4, 3, 2, 1), nn.BatchNorm3d(4, track_running_stats=False), nn.ReLU(),
            nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3),
        ),
        THREE, ClassLogit(1), "2",
    ),
}  # fmt: skip

EVERY = FAMILIES | VARIANTS


# --- The contract ---

PRECISIONS = {"fp32": torch.float32, "bf16 autocast": torch.bfloat16}


def method_of(name: str, shape: tuple[int, ...]) -> Method:
    """A method by its name, at its cheapest: few samples, steps, boxes and masks."""
    half = tuple(slice(size // 4, size // 2) for size in shape[1:])
    labels = torch.zeros(shape[1:], dtype=torch.long)
    labels[half] = 1
    settings: dict[str, dict[str, Any]] = {
        "smooth-grad": {"samples": 2},
        "smooth-grad-squared": {"samples": 2},
        "var-grad": {"samples": 2},
        "integrated-gradients": {"steps": 4, "max_steps": 8, "tolerance": 1.0},
        "expected-gradients": {"samples": 2, "baselines": torch.zeros(2, *shape)},
        "occlusion": {"box": tuple(shape[1:]), "stride": tuple(-(-size // 2) for size in shape[1:]), "sigma": 2.0},
        "rise": {"cell": 8.0, "masks": 2, "sigma": 2.0},
        "region-ablation": {"labels": labels, "controls": 1, "sigma": 2.0},
    }
    return METHODS[name](**settings.get(name, {}))


ROUNDING = "the map is 0 but for rounding: in double precision it is a millionth of what it is in single"


def contract(method: Method, family: Family, precision: str, batch: int) -> str:
    """Hold one method to what every method promises, on one family: "" where it does, or the words of its refusal.

    Or :data:`ROUNDING`, where the map is 0 but for rounding, which cannot be the same twice.

    Raises
    ------
    AssertionError
        Where a promise is broken.
    """
    model = family.model()
    volume = family.volume(batch, next((p.dtype for p in model.parameters()), torch.float32))
    kept, before, random = volume.clone(), state(model), torch.get_rng_state()

    def explained(x: Tensor, of: nn.Module = model, low: bool = precision != "fp32") -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            answer = method.attribute(of, x, [family.target])
        (values,) = answer.maps
        assert bool(values.isfinite().all()), "the map is not finite"
        assert values.dtype in (torch.float32, torch.float64), f"the map is {values.dtype}"
        assert len(values) == len(x), f"{len(values)} maps for {len(x)} volumes"
        assert values.ndim == x.ndim, f"the map's shape is {tuple(values.shape)}"
        assert answer.layer is not None or values.shape[2:] == x.shape[2:], f"the map's shape is {tuple(values.shape)}"
        return values

    try:
        together = explained(volume)
        again = explained(volume)
        alone = torch.cat([explained(one[None]) for one in volume]) if batch > 1 else together
    except VolsalError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        assert_same_state(before, state(model))
        assert torch.equal(volume, kept), "the volume was changed"
        assert torch.equal(random, torch.get_rng_state()), "the random state was changed"
    assert torch.equal(together, again), "a second call gives another map"
    if (off := _apart(together, alone)) > 1e-3:
        # Rounding may be all that is left of a map: it is settled one precision further.
        fine = torch.float64 if precision == "fp32" and volume.dtype == torch.float32 else torch.float32
        finer, x = family.model().to(fine), volume.to(fine)
        exact = torch.cat([explained(one[None], finer, False) for one in x])
        if fine == torch.float64 and float(exact.abs().max()) < 1e-6 * float(alone.abs().max()):
            return ROUNDING
        if fine == torch.float64:
            off, allowed = _apart(explained(x, finer, False), exact), 1e-3
        else:
            allowed = max(0.05, 2 * _apart(alone, exact))  # no more than what the precision itself makes of it
        assert off <= allowed, f"the map in a batch differs from that alone by {off:.1g} of its maximum"
    return ""


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the maximum."""
    return float((one - other).abs().max()) / max(float(other.abs().max()), 1e-30)
