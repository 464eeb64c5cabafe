#!/usr/bin/env python3
"""The script that a user would write: nibabel, MONAI's transforms and Grad-CAM, resampled back, saved.

    scripts/bench/naive.py SCAN OUT.nii.gz [--net small|resnet18] [--size 96]

What ``throughput.py`` measures volsal against.  It holds the whole scan in memory several times over, and its map is
stretched to [0, 1] for each scan of its own.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn

CLASSES = 5
LAYERS = {"small": "features", "resnet18": "layer4"}
SPACING_MM = 1.5


class Small(nn.Module):
    """Three strided convolutions: the reading and writing of a scan costs more than the network."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv3d(1, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv3d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv3d(16, 32, 3, stride=2, padding=1),
        )
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).relu().mean((2, 3, 4)))


def network(net: str) -> nn.Module:
    torch.manual_seed(3)
    if net == "small":
        return Small().eval()
    from monai.networks.nets import resnet18

    return resnet18(spatial_dims=3, n_input_channels=1, num_classes=CLASSES).eval()


def explain(model: nn.Module, net: str, scan: Path, out: Path, size: int, target: int) -> dict[str, float]:
    """Write the map of one scan; return the seconds of each step."""
    from monai.data import MetaTensor
    from monai.transforms import (
        EnsureChannelFirst,
        LoadImage,
        Orientation,
        ResizeWithPadOrCrop,
        ScaleIntensityRange,
        Spacing,
        SpatialResample,
    )
    from monai.visualize import GradCAM

    seconds, began = {}, time.perf_counter()

    def lap(step: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[step], began = now - began, now

    image = EnsureChannelFirst()(LoadImage(image_only=True, reader="NibabelReader")(scan))
    affine, shape = image.affine.clone(), image.shape[1:]
    lap("load")
    image = Orientation("RAS", labels=None)(image)
    image = Spacing((SPACING_MM,) * 3, mode="bilinear")(image)
    image = ScaleIntensityRange(-1000, 1000, 0, 1, clip=True)(image)
    image = ResizeWithPadOrCrop((size,) * 3)(image)
    lap("transforms")
    heat = 1 - GradCAM(nn_module=model, target_layers=LAYERS[net])(x=image[None].as_tensor(), class_idx=target)
    lap("Grad-CAM")
    heat = SpatialResample(mode="bilinear", padding_mode="zeros")(
        MetaTensor(heat[0].float(), affine=image.affine), dst_affine=affine, spatial_size=shape
    )
    lap("resample back")
    nib.save(nib.Nifti1Image(heat[0].numpy().astype(np.float32), affine.numpy()), out)
    lap("save")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--net", choices=LAYERS, default="small")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--target", type=int, default=1)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    print(explain(network(given.net), given.net, given.scan, given.out, given.size, given.target))


if __name__ == "__main__":
    main()
