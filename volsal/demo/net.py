"""The network of the demonstration: small enough to ship, written as networks are written in the wild."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from volsal.errors import VolsalError
from volsal.preprocess import MonaiSteps
from volsal.scans import Scan

CLASSES = ("no lesion", "lesion")
SPACING_MM = 3.0
# 168 x 216 x 84 mm: a head and its tilt.  Multiples of 4, the network's stride.
INPUT_SHAPE = (56, 72, 28)
# Percentiles that become 0 and 1.  A lesion fills far less than the last hundredth, so it hardly moves the scale.
PERCENTILES = (1.0, 99.0)

# MONAI array transforms by name with their arguments, for a (1, I, J, K) MetaTensor: from a scan file's voxels to what
# `build()` takes.  Plain data, so that it can stand in a YAML file as it is.
PREPROCESS: list[dict[str, dict[str, Any]]] = [
    {"Orientation": {"axcodes": "RAS"}},
    {"Spacing": {"pixdim": [SPACING_MM] * 3}},
    {"ResizeWithPadOrCrop": {"spatial_size": list(INPUT_SHAPE)}},
    {"ScaleIntensityRangePercentiles": {"lower": PERCENTILES[0], "upper": PERCENTILES[1], "b_min": 0.0, "b_max": 1.0}},
]


class DemoNet(nn.Module):
    """Is there a bright lesion?  (B, 1, D, H, W) on a 3 mm RAS grid -> logits (B, 2) for :data:`CLASSES`.

    Both halvings are convolutions of kernel 4, stride 2, padding 1: their cells are centred where
    :meth:`volsal.grid.Grid.coarse` puts them.  The commoner kernel 3 would shift them by half a voxel at each halving.
    The last block mixes channels within a cell, so a cell of its output sees 14 voxels, 42 mm, and not its neighbours.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 8, 4, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm3d(8)
        self.block1 = _block(8, 16, kernel=3, stride=1)
        self.block2 = _block(16, 32, kernel=4, stride=2)
        self.block3 = _block(32, 32, kernel=1, stride=1)
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.pool_norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, 2)."""
        return self.judge(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """What is averaged over the volume, (B, 32, D/4, H/4, W/4)."""
        x = F.relu(self.stem_norm(self.stem(x)))
        return self.block3(self.block2(self.block1(x)))

    def judge(self, features: Tensor) -> Tensor:
        """Features to logits, (B, 2)."""
        # The norm: a small lesion hardly moves an average over the volume, and the head must not overlook it.
        return self.head(self.pool_norm(self.pool(features).flatten(1)))


def _block(channels_in: int, channels_out: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(channels_in, channels_out, kernel, stride=stride, padding=(kernel - 1) // 2, bias=False),
        nn.BatchNorm3d(channels_out),
        nn.ReLU(inplace=True),
    )


def build() -> DemoNet:
    """The network with fresh random weights, in training mode."""
    return DemoNet()


def prepared(scan: Scan) -> Tensor:
    """``scan`` taken through :data:`PREPROCESS`: what :func:`build` takes, (1, 1, *INPUT_SHAPE)."""
    return MonaiSteps.from_config(PREPROCESS)(scan).tensor


def load() -> DemoNet:
    """The network with the weights that volsal ships, in eval mode.

    Raises
    ------
    VolsalError
        Where the installation lacks the weights.
    """
    from safetensors.torch import load as from_bytes

    shipped = files("volsal.demo").joinpath("weights.safetensors")
    try:
        data = shipped.read_bytes()
    except OSError as error:
        raise VolsalError(f"{shipped}: the demo's weights are missing; reinstall volsal") from error
    net = build()
    net.load_state_dict(from_bytes(data))
    return net.eval()
