#!/usr/bin/env python3
"""What the gradient by the input and guided backprop cost, beside stock autograd and captum, and how well they agree.

    scripts/bench/guided_cost.py                     the whole table on a CPU: four networks at 96^3
    scripts/bench/guided_cost.py --quick             48^3, two rounds
    scripts/bench/guided_cost.py --cuda              on a CUDA device, 192^3 and 256^3
    scripts/bench/guided_cost.py --largest 8         only: the largest cube that each way can do in 8 GiB (a CPU)
    scripts/bench/guided_cost.py --largest 8 --try   the same, each then tried under a limit: it fits, and 1.26 x its
                                                     edge, twice its voxels, does not

"stock": torch.autograd.grad by the input, the weights frozen.  Time: each way runs once a round, in a random order; the
ratio to stock is taken round by round, and its median is shown; CPU seconds of one thread, in CUDA the wall's.  Peak:
bytes that PyTorch allocated over what it held before.  Process: the same of a fresh process, by the operating system,
with MALLOC_MMAP_THRESHOLD_=262144: as it is, the C library keeps much of what was given back, and how much is chance.
"apart": largest difference from the plain gradient, or from one whose ReLUs are replaced by the rule's definition, over
the largest magnitude.

The largest cube: what a fresh process needs at two sizes, as a line in the number of voxels.  captum is left out where
it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import random
import resource
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cam_cost import EXPLAINED, LAYERS, build
from measure import Call, allocated_peak, interleaved_times, rss_peak
from torch import Tensor, nn

from volsal import ClassLogit, GuidedBackprop, InputGradient
from volsal.attribution.method import Method

# Largest peak of guided backprop over captum's and over the inference, and time of the gradient over stock; from 96^3.
OVER_CAPTUM = {"resnet18": 0.42, "densenet121": 0.27}
OVER_INFERENCE = {"resnet18": 1.25, "resnet50": 1.25}
OVER_STOCK = {"resnet18": 0.80, "resnet50": 0.80, "densenet121": 0.80, "plain": 1.10}  # the last has no wide stem
OVER_CAPTUM_CUBE = 2.0


def by_inference(model: nn.Module, volume: Tensor) -> Call:
    return torch.no_grad()(lambda: model(volume))


def by_stock(model: nn.Module, volume: Tensor) -> Call:
    model.requires_grad_(False)

    def call() -> Tensor:
        leaf = volume.clone().requires_grad_(True)
        return torch.autograd.grad(model(leaf)[:, EXPLAINED].sum(), leaf)[0]

    return call


def by_captum(model: nn.Module, volume: Tensor) -> Call:
    from captum.attr import GuidedBackprop as Theirs

    model.requires_grad_(False)
    theirs = Theirs(model)
    return lambda: theirs.attribute(volume.clone().requires_grad_(True), target=EXPLAINED).detach()


def by_definition(model: nn.Module, volume: Tensor) -> Call:
    """Guided backprop, each nn.ReLU replaced."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, Guided())
    return by_stock(model, volume)


class Guided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return GuidedReLU.apply(x)


class GuidedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> Tensor:
        return signals[0] * (signals[0] > 0) * ctx.saved_tensors[0]


def by_volsal(method: Method, model: nn.Module, volume: Tensor) -> Call:
    return lambda: method(model, volume, ClassLogit(EXPLAINED))


WAYS: dict[str, Callable[[nn.Module, Tensor], Call]] = {
    "inference": by_inference,
    "stock gradient": by_stock,
    "captum guided": by_captum,
    "volsal gradient": partial(by_volsal, InputGradient()),
    "volsal guided": partial(by_volsal, GuidedBackprop()),
}
REFERENCES = {"volsal gradient": by_stock, "captum guided": by_definition, "volsal guided": by_definition}


def prepare(way: Callable[[nn.Module, Tensor], Call], name: str, size: int, device: str) -> Call:
    warnings.simplefilter("ignore")
    volume = torch.randn(1, 1, *[size] * 3, generator=torch.Generator().manual_seed(1)).to(device)
    return way(build(name).to(device), volume)


def table(name: str, size: int, device: str, rounds: int, ways: list[str], process: bool) -> None:
    calls = {way: prepare(WAYS[way], name, size, device) for way in ways}
    peaks = {way: allocated_peak(call, device) for way, call in calls.items()}
    seconds = interleaved_times(calls, rounds, device)
    print(f"\n{name}, {size}^3, {device}, {rounds} rounds")
    print(
        f"{'way':<17}{'MiB':>7}{'/ inference':>12}{'/ captum':>10}{'process MiB':>13}{'time / stock':>14}{'apart':>10}"
    )
    for way in ways:
        ratios = [ours / floor for ours, floor in zip(seconds[way], seconds["stock gradient"], strict=True)]
        time, over = statistics.median(ratios), peaks[way] / peaks["inference"]
        over_captum = peaks[way] / peaks["captum guided"] if "captum guided" in peaks else float("nan")
        own = f"{rss_peak(partial(prepare, WAYS[way], name, size, device)) / 2**20:.0f}" if process else "-"
        apart = f"{difference(way, calls[way], name, size, device):.1e}" if way in REFERENCES else ""
        print(
            f"{way:<17}{peaks[way] / 2**20:>7.0f}{over:>12.2f}{over_captum:>10.2f}{own:>13}{time:>14.2f}{apart:>10}  "
            f"{verdict(way, name, over, over_captum, time) if size >= 96 else ''}",
            flush=True,
        )


def difference(way: str, call: Call, name: str, size: int, device: str) -> float:
    expected, found = prepare(REFERENCES[way], name, size, device)(), call()
    return float((found - expected).abs().max() / expected.abs().max())


def verdict(way: str, name: str, over_inference: float, over_captum: float, time: float) -> str:
    goals = []
    if way == "volsal guided":
        goals += [("of captum", over_captum, OVER_CAPTUM[name])] if name in OVER_CAPTUM else []
        goals += [("of inference", over_inference, OVER_INFERENCE[name])] if name in OVER_INFERENCE else []
    if way == "volsal gradient":
        goals.append(("time", time, OVER_STOCK[name]))
    return ", ".join(f"{what} <= {most}: {'met' if value <= most else 'NOT MET'}" for what, value, most in goals)


def largest(name: str, gib: float, sizes: list[int], ways: list[str], tried: bool) -> None:
    """The largest cube in a process of ``gib``, by what the call needs and what the process holds before it."""
    print(f"\n{name}: largest cube in {gib:g} GiB, from peaks at {' and '.join(f'{size}^3' for size in sizes)}")
    edges = {}
    for way in ways:
        peaks = [rss_peak(partial(prepare, WAYS[way], name, size, "cpu")) for size in sizes]
        slope = (peaks[1] - peaks[0]) / (sizes[1] ** 3 - sizes[0] ** 3)
        least = peaks[0] - slope * sizes[0] ** 3
        edges[way] = int(((gib * 2**30 - BEFORE - least) / slope) ** (1 / 3))
        outcome = ""
        if tried:
            shown = {
                size: fits(way, name, size, gib) for size in (edges[way] * 15 // 16, int(edges[way] * 2 ** (1 / 3)))
            }
            outcome = ", ".join(f"{size}^3 {'fits' if done else 'does not fit'}" for size, done in shown.items())
        print(f"{way:<17}{slope:>8.0f} bytes a voxel{edges[way]:>6}^3  {outcome}", flush=True)
    if "captum guided" in edges:
        more = (edges["volsal guided"] / edges["captum guided"]) ** 3
        print(
            f"{more:.2f} x captum's voxels (>= {OVER_CAPTUM_CUBE}: {'met' if more >= OVER_CAPTUM_CUBE else 'NOT MET'})"
        )


# What Python, torch and MONAI hold before anything is computed, bytes, rounded up.
BEFORE = 600 * 2**20


def fits(way: str, name: str, size: int, gib: float) -> bool:
    """Whether a fresh process whose data may take ``gib`` does it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_fits, (way, name, size, gib))


def _fits(way: str, name: str, size: int, gib: float) -> bool:
    torch.set_num_threads(1)
    limit = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        prepare(WAYS[way], name, size, "cpu")()
    except (MemoryError, RuntimeError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", help="96; with --quick 48; with --cuda 192 256")
    parser.add_argument("--rounds", type=int, help="5; with --quick 2")
    parser.add_argument("--models", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--largest", type=float, metavar="GIB")
    parser.add_argument("--try", action="store_true", dest="tried")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cuda", action="store_true")
    options = parser.parse_args()
    if options.cuda and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here")
    device = "cuda" if options.cuda else "cpu"
    warnings.simplefilter("ignore")
    random.seed(0)
    torch.set_num_threads(options.threads)
    ways = [way for way in WAYS if way != "captum guided" or importlib.util.find_spec("captum")]
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "262144")  # of the processes that are started
    print(f"torch {torch.__version__}, {options.threads} threads, batch 1")
    for name in options.models:
        if options.largest:
            asked = [way for way in ways if way.endswith("guided")]
            largest(name, options.largest, options.sizes or [64, 96], asked, options.tried)
            continue
        for size in options.sizes or ([48] if options.quick else [192, 256] if options.cuda else [96]):
            rounds = options.rounds or (2 if options.quick else 5)
            table(name, size, device, rounds, ways, process=device == "cpu" and not options.quick)


if __name__ == "__main__":
    main()
