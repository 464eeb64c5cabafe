"""The model and the preprocessing that configs/own_code.yaml names.  Put yours in their place."""

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn


def build(width: int) -> nn.Module:
    """A toy network.  Load your trained weights with `weights:` in the config."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(1, width, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv3d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 2),
    )


def prepare(path: Path) -> tuple[Tensor, np.ndarray]:
    """Every second voxel, zero mean, unit variance.

    The affine belongs to the returned tensor, not to the file: here a step along an axis is two voxels of the scan.
    """
    image = nib.load(path)
    voxels = np.asarray(image.dataobj, dtype=np.float32)[::2, ::2, ::2]
    affine = image.affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    scaled = (voxels - voxels.mean()) / (voxels.std() + 1e-6)
    return torch.from_numpy(scaled)[None], affine
