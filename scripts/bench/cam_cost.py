#!/usr/bin/env python3
"""What Grad-CAM costs over the plain forward pass under no_grad, beside the peers that are installed.

    scripts/bench/cam_cost.py                the whole table on a CPU: four networks at 96^3 and 128^3
    scripts/bench/cam_cost.py --quick        64^3, two rounds
    scripts/bench/cam_cost.py --cuda         on a CUDA device, 192^3 and 256^3

Each way of making the same map runs once a round, in a random order, on a copy of the network of its own; the ratio to
the forward pass is taken round by round, and its median is shown.  Time is CPU seconds of one thread; in CUDA seconds
on the wall with the device awaited.  Peak: bytes that PyTorch allocated over what it held before.  Process: the same of
a fresh process, by the operating system.  "volsal" is half-pixel alignment, which adds nothing to the method itself;
"fast" its opt-in copy of the network with batch norms folded and channels last, in float32, and in bfloat16 where the
machine computes in it.

Peers: pip install monai captum grad-cam torchcam medcam scikit-image pandas.  One that is missing is listed as absent.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import sys
import warnings
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import pairwise
from unittest.mock import MagicMock

import torch
from measure import Call, allocated_peak, interleaved_times, rss_peak
from torch import Tensor, nn

from volsal import ClassLogit, GradCAM
from volsal.models.fast import fast

CLASSES = 14
EXPLAINED = 3
LAYERS = {"resnet18": "layer4", "resnet50": "layer4", "densenet121": "class_layers.relu", "plain": "11"}
FOLDING = ("resnet18", "resnet50")
# Largest time and peak over the forward pass; time of 14 classes over that of one.
GOAL, GOAL_FAST, GOAL_BF16, GOAL_CLASSES = (1.05, 1.02), (0.70, 0.75), (0.45, 0.45), 1.15


def build(name: str) -> nn.Module:
    from monai.networks import nets

    torch.manual_seed(0)
    if name == "plain":
        widths = (1, 16, 32, 64, 64)
        blocks = [
            [nn.Conv3d(before, after, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool3d(2)]
            for before, after in pairwise(widths)
        ]
        model: nn.Module = nn.Sequential(
            *[layer for block in blocks for layer in block],
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(widths[-1], CLASSES),
        )
    elif name == "densenet121":
        model = nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=CLASSES)
    else:
        model = getattr(nets, name)(spatial_dims=3, n_input_channels=1, num_classes=CLASSES)
    for module in model.modules():  # as training leaves them
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.1)
    return model.eval()


# Each way: (model, layer, volume, classes) -> a call that makes their maps.
Way = Callable[[nn.Module, str, Tensor, list[int]], Call]


def by_forward(model: nn.Module, layer: str, volume: Tensor, classes: list[int]) -> Call:
    return torch.no_grad()(lambda: model(volume))


def by_volsal(model: nn.Module, layer: str, volume: Tensor, classes: list[int]) -> Call:
    return lambda: GradCAM(layer)(model, volume, [ClassLogit(number) for number in classes])


def by_fast(model: nn.Module, layer: str, volume: Tensor, classes: list[int], dtype: torch.dtype | None = None) -> Call:
    return by_volsal(fast(model, volume, dtype), layer, volume, classes)


def by_monai(model: nn.Module, layer: str, volume: Tensor, classes: list[int]) -> Call:
    from monai.visualize import GradCAM as Theirs

    cam = Theirs(nn_module=model, target_layers=layer)
    return lambda: [cam.compute_map(volume, class_idx=number) for number in classes]


def by_captum(model: nn.Module, layer: str, volume: Tensor, classes: list[int]) -> Call:
    from captum.attr import LayerGradCam

    cam = LayerGradCam(model, model.get_submodule(layer))
    return lambda: [cam.attribute(volume, target=number, relu_attributions=True) for number in classes]


def by_pytorch_grad_cam(model: nn.Module, layer: str, volume: Tensor, classes: list[int]) -> Call:
    # It imports torchvision for what is not used here, and torchvision's wheels load only beside their own torch.
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
            sys.modules[name] = MagicMock()
    from pytorch_grad_cam import GradCAM as Theirs
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    cam = Theirs(model=model, target_layers=[model.get_submodule(layer)])
    return lambda: [cam(volume, targets=[ClassifierOutputTarget(number)]) for number in classes]


def by_torchcam(model: nn.Module, layer: str, volume: Tensor, classes: list[int]) -> Call:
    from torchcam.methods import GradCAM as Theirs

    cam = Theirs(model, layer, input_shape=tuple(volume.shape[1:]))

    def maps() -> list:
        scores = model(volume)
        return [cam(number, scores, retain_graph=number != classes[-1]) for number in classes]

    return maps


def by_medcam(model: nn.Module, layer: str, volume: Tensor, classes: list[int]) -> Call:
    from medcam import medcam

    injected = [
        medcam.inject(model, backend="gcam", layer=layer, label=number, return_attention=True) for number in classes
    ]
    return lambda: [one(volume) for one in injected]


WAYS: dict[str, Way] = {
    "forward": by_forward,
    "volsal": by_volsal,
    "fast": by_fast,
    "fast bf16": partial(by_fast, dtype=torch.bfloat16),
    "MONAI": by_monai,
    "captum": by_captum,
    "pytorch-grad-cam": by_pytorch_grad_cam,
    "torchcam": by_torchcam,
    "medcam": by_medcam,
}
NEEDS = {
    "MONAI": "monai",
    "captum": "captum",
    "pytorch-grad-cam": "pytorch_grad_cam",
    "torchcam": "torchcam",
    "medcam": "medcam",
}
# Peers fail in their own ways; in bfloat16 PyTorch has not every layer on a CPU, average pooling among them.
MAY_FAIL = {*NEEDS, "fast bf16"}


def absent(device: str) -> dict[str, str]:
    """The ways that this machine has not, and why."""
    reasons = {way: "not installed" for way, package in NEEDS.items() if importlib.util.find_spec(package) is None}
    if device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        reasons["fast bf16"] = "this processor does not compute in bfloat16"
    return reasons


def prepare(way: str, name: str, size: int, device: str, classes: list[int]) -> Call:
    """A call that makes the maps, on a network of its own: some peers leave hooks and gradients behind."""
    warnings.simplefilter("ignore")
    model = build(name).to(device)
    volume = torch.randn(1, 1, size, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    return WAYS[way](model, LAYERS[name], volume, classes)


def try_out(way: str, name: str, size: int, device: str, classes: list[int]) -> Call | str:
    """A call that has run once, or why there is none.  What fails here is not volsal's, so anything may be raised."""
    try:
        call = prepare(way, name, size, device, classes)
        call()
    except Exception as error:
        if way in MAY_FAIL:
            return f"fails: {type(error).__name__}: {str(error).splitlines()[0][-150:] if str(error) else ''}"
        raise
    return call


def of_process(way: str, name: str, size: int, device: str, classes: list[int]) -> str:
    """MiB that a process of its own held at most, or that it fails."""
    try:
        return f"{rss_peak(partial(prepare, way, name, size, device, classes)) / 2**20:.0f}"
    except BrokenProcessPool:
        return "fails: its process was killed, as by want of memory"
    except Exception:
        if way in MAY_FAIL:
            return "-"  # it is tried once more, and then told
        raise


def table(name: str, size: int, device: str, rounds: int, ways: list[str], process: bool) -> None:
    asked = {way: (way, [EXPLAINED]) for way in ways}
    asked |= {f"{way}, {CLASSES} classes": (way, list(range(CLASSES))) for way in ("volsal", "fast") if way in ways}
    print(
        f"\n{name}, {size}^3, {device}, torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds"
    )
    print(f"{'way':<20}{'time':>8}{'quartiles':>14}{'peak':>8}{'MiB':>7}{'process MiB':>13}  goal")
    calls: dict[str, Call] = {}
    own: dict[str, str] = {}
    for title, (way, classes) in asked.items():
        # In a process of its own first: one that needs more memory than there is takes nothing along.
        own[title] = of_process(way, name, size, device, classes) if process else "-"
        call = own[title] if own[title].startswith("fails") else try_out(way, name, size, device, classes)
        if isinstance(call, str):
            print(f"{title:<20}{call}", flush=True)
        else:
            calls[title] = call
    peaks = {title: allocated_peak(call, device) for title, call in calls.items()}
    seconds = interleaved_times(calls, rounds, device)
    for title in calls:
        way, classes = asked[title]
        ratios = [ours / floor for ours, floor in zip(seconds[title], seconds["forward"], strict=True)]
        low, time, high = statistics.quantiles(ratios, n=4)
        peak = peaks[title] / peaks["forward"]
        single = [many / one for many, one in zip(seconds[title], seconds.get(way, seconds[title]), strict=True)]
        print(
            f"{title:<20}{time:>8.3f}{f'{low:.2f}-{high:.2f}':>14}{peak:>8.3f}{peaks[title] / 2**20:>7.0f}"
            f"{own[title]:>13}  "
            f"{verdict(name, title, time, peak, statistics.median(single))}",
            flush=True,
        )
    for way in ("fast", "fast bf16"):
        if way in calls:
            print(f"{way}: {agreement(name, size, device, way)}", flush=True)


def verdict(name: str, title: str, time: float, peak: float, over_single: float) -> str:
    if title.endswith("classes"):
        return f"{over_single:.3f} x one class (<= {GOAL_CLASSES}: {_met(over_single <= GOAL_CLASSES)})"
    goals = {"volsal": GOAL}
    if name in FOLDING:
        goals |= {"fast": GOAL_FAST, "fast bf16": GOAL_BF16}
    if title not in goals:
        return ""
    most_time, most_peak = goals[title]
    return f"time <= {most_time}: {_met(time <= most_time)}, peak <= {most_peak}: {_met(peak <= most_peak)}"


def _met(is_met: bool) -> str:
    return "met" if is_met else "NOT MET"


def agreement(name: str, size: int, device: str, way: str) -> str:
    """How far the copy's maps of all classes are off; random networks leave many of them empty."""
    ours, theirs = (
        torch.cat([found.flatten() for found in prepare(by, name, size, device, list(range(CLASSES)))()]).double().cpu()
        for by in ("volsal", way)
    )
    off = float((ours - theirs).abs().max() / ours.abs().max())
    together = float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1])
    return f"maps within {off:.1e} of their maximum, correlation {together:.5f}"


def all_classes(name: str, size: int, device: str, ways: list[str]) -> None:
    """What one round of 14 classes costs over one class, peers included."""
    print(f"\n{CLASSES} classes over one, {name}, {size}^3, one round after a first")
    for way in ways:
        if way.startswith("forward"):
            continue
        one, many = (try_out(way, name, size, device, c) for c in ([EXPLAINED], list(range(CLASSES))))
        if isinstance(one, str) or isinstance(many, str):
            print(f"{way:<20}{one if isinstance(one, str) else many}")
            continue
        seconds = interleaved_times({"one": one, "many": many}, 1, device)
        print(f"{way:<20}{seconds['many'][0] / seconds['one'][0]:>8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", help="96 128; with --quick 64; with --cuda 192 256")
    parser.add_argument("--rounds", type=int, help="5; with --quick 2")
    parser.add_argument("--models", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="forward is always among them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cuda", action="store_true")
    options = parser.parse_args()
    if options.cuda and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here")
    device = "cuda" if options.cuda else "cpu"
    sizes = options.sizes or ([64] if options.quick else [192, 256] if options.cuda else [96, 128])
    rounds = options.rounds or (2 if options.quick else 5)
    warnings.simplefilter("ignore")
    random.seed(0)
    torch.set_num_threads(options.threads)
    missing = absent(device)
    for way, reason in missing.items():
        print(f"{way}: absent ({reason})")
    ways = [way for way in WAYS if (way in options.ways or way == "forward") and way not in missing]
    for name in options.models:
        for size in sizes:
            table(name, size, device, rounds, ways, process=device == "cpu" and not options.quick)
    all_classes("resnet18", 64, device, ways)


if __name__ == "__main__":
    main()
