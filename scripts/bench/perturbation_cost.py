"""What occlusion, RISE and region ablation cost over the forward passes that they cannot do without.

    python scripts/bench/perturbation_cost.py [--size 64] [--rounds 3] [--device cpu] [--nets resnet18]

Time is that of the method in parts of a bare forward pass for the scan and for each changed copy of it (captum's
occlusion: for the same boxes); memory is the peak that the allocator counted, in parts of the peak of one bare pass.
"""

from __future__ import annotations

import argparse
from functools import partial
from statistics import median

import torch
from captum.attr import Occlusion as CaptumOcclusion
from measure import allocated_peak, interleaved_times
from monai.networks import nets
from torch import nn

from volsal import RISE, ClassLogit, Occlusion, RegionAblation
from volsal.attribution.method import PLAIN

NETS = {
    "resnet18": lambda: nets.resnet18(spatial_dims=3, n_input_channels=1, num_classes=3),
    "densenet121": lambda: nets.DenseNet121(spatial_dims=3, in_channels=1, out_channels=3),
    "plain": lambda: nn.Sequential(
        nn.Conv3d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(16, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 3),
    ),
}  # fmt: skip


def main() -> None:
    """Print one table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--size", type=int, default=64)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    given = arguments.parse_args()
    torch.manual_seed(0)
    size, half = given.size, given.size // 2
    volume = torch.randn(1, 1, size, size, size, device=given.device)
    labels = torch.zeros(size, size, size, dtype=torch.int64)
    labels[:half, :half, :half], labels[half:, half:, half:] = 1, 2
    methods = {
        "occlusion": Occlusion(box=half, stride=half),
        "occlusion, batch 4": Occlusion(box=half, stride=half, batch=4),
        "rise": RISE(cell=size / 6, masks=8),
        "region-ablation": RegionAblation(labels=labels, controls=3),
    }
    print(f"{size}^3, {given.device}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    print(f"{'':14}{'':22}{'copies':>8}{'time / copies':>15}{'peak / pass':>13}")
    for name in given.nets:
        model = NETS[name]().eval().to(given.device)

        def bare(model=model):
            with torch.no_grad():
                return model(volume)

        def captum(model=model):
            with torch.no_grad():
                windows = {"sliding_window_shapes": (1, half, half, half), "strides": (1, half, half, half)}
                return CaptumOcclusion(model).attribute(volume, target=1, **windows)

        calls = {what: partial(method, model, volume, ClassLogit(1)) for what, method in methods.items()}
        calls |= {"captum occlusion": captum}
        seconds = interleaved_times({"bare": bare, **calls}, given.rounds, given.device)
        lowest = allocated_peak(bare, given.device)
        for what, call in calls.items():
            method = methods.get(what, methods["occlusion"])
            copies = 1 + method.copies(volume.shape, PLAIN)
            ratio = median(t / (b * copies) for t, b in zip(seconds[what], seconds["bare"], strict=True))
            peak = allocated_peak(call, given.device) / lowest
            print(f"{name:14}{what:22}{copies:>8}{ratio:>15.3f}{peak:>13.3f}", flush=True)


if __name__ == "__main__":
    main()
