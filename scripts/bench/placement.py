"""How far a map's centroid lies from the truth, by alignment rule, on networks that are trained here or given.

    python scripts/bench/placement.py                        trains small networks, once, and grades them
    python scripts/bench/placement.py --truth TRUTH_FOLDER   networks trained on real heads, with masks

Each row is one layer: the mean distance, in voxels of the model's input, from the centroid of the map's top half to the
truth, with its ratio to MONAI's own GradCAM and upsampling in the same run (turned the right way up: its default
normaliser maps the maximum to 0) and a bootstrap interval of that ratio.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from volsal.attribution import ClassLogit, Context, GradCAM, HiResCAM, Method
from volsal.attribution.alignment.alignment import AlignmentRule, FlipAverage, HalfPixel, Measured, Nominal, centroid
from volsal.attribution.cams.cam import CAM

warnings.filterwarnings("ignore", category=FutureWarning)
SIZE = 64
RULES: tuple[AlignmentRule, ...] = (HalfPixel(), Nominal(), FlipAverage(), Measured())


# --- networks and what they learn: is there a bright ball among plates and dark balls, in textured noise? ---


def block(channels_in: int, channels_out: int, stride: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(channels_in, channels_out, kernel, stride, kernel // 2 - (kernel + 1) % 2, bias=False),
        nn.BatchNorm3d(channels_out),
        nn.ReLU(),
    )


class Head(nn.Module):
    """A small ball hardly moves an average over the volume: the norm gives it weight."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(channels), nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x.mean((2, 3, 4)) if x.ndim == 5 else x.flatten(1)))


class Plain(nn.Module):
    """Convolutions of kernel 3, stride 2, padding 1."""

    def __init__(self) -> None:
        super().__init__()
        self.l0, self.l1, self.l2, self.l3 = block(1, 8, 2), block(8, 16, 2), block(16, 32, 2), block(32, 48, 2)
        self.head = Head(48)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.l3(self.l2(self.l1(self.l0(x)))))


class Symmetric(nn.Module):
    """Every halving treats both sides alike, so the half-pixel rule is right: kernel 4 with padding 1, max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.l0 = block(1, 8, 2, kernel=4)
        self.l1, self.l2, self.l3 = (
            nn.Sequential(block(a, b, 1), nn.MaxPool3d(2)) for a, b in ((8, 16), (16, 32), (32, 48))
        )
        self.head = Head(48)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.l3(self.l2(self.l1(self.l0(x)))))


def resnet() -> nn.Module:
    from monai.networks.nets import ResNet

    net = ResNet(
        "basic", [1, 1, 1, 1], [8, 16, 32, 48], spatial_dims=3, n_input_channels=1, conv1_t_size=5, conv1_t_stride=2,
        no_max_pool=True, num_classes=2, shortcut_type="B", bias_downsample=False,
    )  # fmt: skip
    net.fc = Head(48)
    return net


def densenet() -> nn.Module:
    from monai.networks.nets import DenseNet

    net = DenseNet(
        spatial_dims=3, in_channels=1, out_channels=2, init_features=16, growth_rate=8, block_config=(2, 2, 2)
    )
    net.class_layers.out = Head(net.class_layers.out.in_features)
    return net


# Layers of stride 16 and 8.
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[str, str]]] = {
    "plain": (Plain, ("l3", "l2")),
    "resnet": (resnet, ("layer4", "layer3")),
    "densenet": (densenet, ("features.denseblock3", "features.denseblock2")),
    "symmetric": (Symmetric, ("l3", "l2")),
}


def sample(rng: torch.Generator, label: int | None = None, margin: int = 12) -> tuple[Tensor, int, np.ndarray]:
    """A volume (1, 1, 64, 64, 64), its label, and where the ball is or would be, voxels."""
    knots = torch.randn(1, 1, 8, 8, 8, generator=rng)
    x = 0.35 * F.interpolate(knots, (SIZE,) * 3, mode="trilinear", align_corners=True)
    x += 0.25 * torch.randn(1, 1, SIZE, SIZE, SIZE, generator=rng)
    present = int(torch.randint(2, (), generator=rng)) if label is None else label
    ball, dark, plate = (margin + (SIZE - 2 * margin) * torch.rand(3, 3, generator=rng)).unbind()
    sigma, height = 2.5 + 1.5 * torch.rand(2, generator=rng)
    height = 1.5 + height / 4
    if present:
        x += height * _bump(ball, sigma.expand(3))
    if torch.rand((), generator=rng) < 0.5 and (dark - ball).norm() > 16:
        x -= height * _bump(dark, sigma.expand(3))
    flat = torch.full((3,), 4.0).index_fill(0, torch.randint(3, (1,), generator=rng), 0.7)
    if (plate - ball).norm() > 16:
        x += height * _bump(plate, flat)
    return x, present, ball.numpy()


def _bump(center: Tensor, sigma: Tensor) -> Tensor:
    axes = [torch.exp(-0.5 * ((torch.arange(SIZE) - c) / s) ** 2) for c, s in zip(center, sigma, strict=True)]
    return axes[0][:, None, None] * axes[1][:, None] * axes[2]


def trained(name: str, seed: int, folder: Path, steps: int) -> tuple[nn.Module, float]:
    """The network, trained or as kept in ``folder``, and its accuracy on 80 volumes it never saw."""
    torch.manual_seed(seed)
    net = NETS[name][0]()
    path = folder / f"{name}-{seed}-{steps}.pt"
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
    else:
        _train(net, seed, steps)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path)
    net.eval()
    rng = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        right = [int(net(x).argmax()) == label for x, label, _ in (sample(rng) for _ in range(80))]
    return net, float(np.mean(right))


def _train(net: nn.Module, seed: int, steps: int) -> None:
    rng = torch.Generator().manual_seed(seed + 100)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    clock = time.monotonic()
    for step in range(steps):
        batch = [sample(rng, margin=10) for _ in range(8)]
        x, y = torch.cat([b[0] for b in batch]), torch.tensor([b[1] for b in batch])
        loss = F.cross_entropy(net.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"  step {step + 1}: loss {float(loss):.3f}, {time.monotonic() - clock:.0f} s", file=sys.stderr)


# --- grading ---


@dataclass
class Case:
    """A model input, the class to explain, and the true place of its evidence, in voxels."""

    volume: Tensor
    target: int
    truth: np.ndarray


def blobs(count: int, seed: int) -> Iterator[Case]:
    rng = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x, _, at = sample(rng, label=1)
        yield Case(x, 1, at)


def distances(model: nn.Module, method: CAM, cases: list[Case]) -> dict[str, np.ndarray]:
    """Rule -> (N,) voxels, over the cases that give MONAI's map and volsal's some evidence."""
    found: dict[str, list[float]] = {"monai": [], **{rule.id: [] for rule in RULES}}
    for case in cases:
        row = {"monai": _monai(model, method, case)}
        for rule in RULES:
            answer = method.attribute(model, case.volume, [ClassLogit(case.target)], Context(rule))
            placed = answer.alignments[0].place(answer.maps[0].clamp(min=0), case.volume.shape[2:])
            row[rule.id] = _distance(placed[0, 0].numpy(), case.truth)
        if all(value is not None for value in row.values()):
            for name, value in row.items():
                found[name].append(value)
    return {name: np.array(values) for name, values in found.items()}


def _monai(model: nn.Module, method: Method, case: Case) -> float | None:
    """MONAI's GradCAM, upsampled by MONAI and turned the right way up; for HiResCAM the same upsampling of that map."""
    from monai.visualize import GradCAM as MonaiGradCAM
    from monai.visualize import default_upsampler

    if isinstance(method, GradCAM):
        made = 1 - MonaiGradCAM(nn_module=model, target_layers=method.layer)(case.volume.clone(), case.target)
        return _distance(torch.as_tensor(made)[0, 0].detach().numpy(), case.truth)
    raw = method.attribute(model, case.volume, [ClassLogit(case.target)]).maps[0].clamp(min=0)
    return _distance(default_upsampler(case.volume.shape[2:])(raw)[0, 0].numpy(), case.truth)


def _distance(values: np.ndarray, truth: np.ndarray) -> float | None:
    return float(np.linalg.norm(centroid(values) - truth)) if values.max() > 0 else None


def ratio(peer: np.ndarray, ours: np.ndarray) -> tuple[float, float, float]:
    """mean(peer) / mean(ours) over the same cases, and its 95 % bootstrap interval."""
    pick = np.random.default_rng(0).integers(len(ours), size=(4000, len(ours)))
    spread = peer[pick].mean(1) / ours[pick].mean(1)
    return float(peer.mean() / ours.mean()), *(float(x) for x in np.percentile(spread, (2.5, 97.5)))


def report(name: str, layer: str, method: CAM, found: dict[str, np.ndarray]) -> str:
    cells = [
        f"{name:<22}",
        f"{layer:<22}",
        f"{method.id:<10}",
        f"{len(found['monai']):>4}",
        f"{found['monai'].mean():7.2f}",
    ]
    for rule in RULES:
        value, low, high = ratio(found["monai"], found[rule.id])
        cells.append(f"{found[rule.id].mean():7.2f} {value:5.2f}x [{low:.2f}, {high:.2f}]")
    return " ".join(cells)


def truth_cases(folder: Path, models: object, task: str, net: nn.Module) -> Iterator[Case]:
    """Scans with planted evidence that the network judges right."""
    kind = {"lesion": "bright", "side": "bright", "corner": "marker"}[task]
    for scan in json.loads((folder / task / "truth.json").read_text())["scans"]:
        items = [item for item in scan["items"] if kind in item["kind"]]
        if not items or (task != "side" and scan["label"] != 1):
            continue
        volume, affine = models.preprocess(folder / task / scan["scan"])
        with torch.no_grad():
            if int(net(volume).argmax()) != scan["label"]:
                continue
        at = np.linalg.inv(affine[:3, :3]) @ (np.array(items[0]["mask_centroid_mm"]) - affine[:3, 3])
        yield Case(volume, scan["label"], at)


def grade_truth(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("truth_models", folder / "models.py")
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    # HiResCAM where many cells lie between layer and head: there the mean gradient of Grad-CAM means nothing.
    for arch, task, method in (
        ("plain", "corner", GradCAM("block5")),
        ("plain", "corner", HiResCAM("block3")),
        ("resnet", "lesion", HiResCAM("layer3")),
        ("resnet", "lesion", HiResCAM("layer2")),
        ("resnet", "side", HiResCAM("layer3")),
        ("resnet", "side", HiResCAM("layer2")),
    ):
        net = models.load(folder / "models" / f"{arch}_{task}.safetensors")[0]
        found = distances(net, method, list(truth_cases(folder, models, task, net)))
        print(report(f"{arch} {task}", method.layer, method, found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NETS), help=f"of {', '.join(NETS)}")
    parser.add_argument("--nets", type=Path, default=Path(".placement-nets"), help="where trained weights are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400, help="of training, eight volumes each")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--truth", type=Path, help="a folder with models.py, models/ and TASK/truth.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    heads = " ".join(f"{rule.id + ', ratio [95 %]':<28}" for rule in RULES)
    print(f"{'network':<22} {'layer':<22} {'method':<10} {'n':>4} {'MONAI':>7} {heads}")
    if options.truth:
        grade_truth(options.truth)
        return
    for name in options.names:
        net, accuracy = trained(name, options.seed, options.nets, options.steps)
        for layer in NETS[name][1]:
            found = distances(net, GradCAM(layer), list(blobs(options.cases, options.seed + 1000)))
            print(report(f"{name} ({accuracy:.0%} right)", layer, GradCAM(layer), found), flush=True)


if __name__ == "__main__":
    main()
