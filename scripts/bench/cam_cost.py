#!/usr/bin/env python3
"""What Grad-CAM costs, over the plain forward pass under no_grad, beside MONAI and captum in the same run.

    scripts/bench/cam_cost.py [--size 96] [--rounds 7] [--models resnet18 densenet121] [--threads 2] [--device cpu]

Time: medians of interleaved rounds, each round timing every contender once in a random order; the ratio is taken round
by round.  "measured": volsal's, with its cells placed by measured alignment.  Peak: allocated bytes, counted from
PyTorch's allocator events (CPU) or `max_memory_allocated` (CUDA), over what is allocated before the call.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from volsal import ClassLogit, GradCAM
from volsal.attribution import Context
from volsal.attribution.alignment import Measured

LAYERS = {"resnet18": "layer4", "resnet50": "layer4", "densenet121": "class_layers.relu"}


def build(name: str) -> nn.Module:
    from monai.networks import nets

    torch.manual_seed(0)
    if name == "densenet121":
        model = nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=14)
    else:
        model = getattr(nets, name)(spatial_dims=3, n_input_channels=1, num_classes=14)
    return model.eval()


def contenders(model: nn.Module, layer: str, volume: Tensor) -> dict[str, Callable[[], object]]:
    from captum.attr import LayerGradCam
    from monai.visualize import GradCAM as MonaiGradCAM

    module = dict(model.named_modules())[layer]
    # MONAI's object leaves its hooks on the model for good, so it gets one of its own.
    monai = MonaiGradCAM(nn_module=copy.deepcopy(model), target_layers=layer)
    return {
        "forward": torch.no_grad()(lambda: model(volume)),
        "volsal": lambda: GradCAM(layer)(model, volume, ClassLogit(3)),
        "measured": lambda: GradCAM(layer).attribute(model, volume, [ClassLogit(3)], Context(Measured())),
        "captum": lambda: LayerGradCam(model, module).attribute(volume, target=3, relu_attributions=True),
        "MONAI": lambda: monai.compute_map(volume, class_idx=3),
    }


def seconds(call: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(call: Callable[[], object], device: str) -> int:
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=LAYERS, default=["resnet18", "densenet121"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, {options.size}^3, batch 1")
    print(f"{'model':<13}{'way':<9}{'time / forward':>16}{'(quartiles)':>16}{'peak / forward':>16}{'peak MiB':>10}")
    for name in options.models:
        model = build(name).to(options.device)
        volume = torch.randn(1, 1, *[options.size] * 3, device=options.device)
        ways = contenders(model, LAYERS[name], volume)
        order = list(ways)
        peaks = {way: peak_bytes(call, options.device) for way, call in ways.items()}  # also the warm-up
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            random.shuffle(order)
            for way in order:
                times[way].append(seconds(ways[way], options.device))
        for way in ways:
            ratios = [ours / floor for ours, floor in zip(times[way], times["forward"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            print(
                f"{name:<13}{way:<9}{middle:>16.2f}{f'{low:.2f}-{high:.2f}':>16}"
                f"{peaks[way] / peaks['forward']:>16.3f}{peaks[way] / 2**20:>10.0f}"
            )


if __name__ == "__main__":
    main()
