"""What a volume is compared with: the scan without what is to be explained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from volsal.attribution.method import Context, spatial
from volsal.attribution.perturbation.perturbation import blurred
from volsal.errors import VolsalError, nearest

Baseline = str | Path | float | Tensor

_NAMES = ("zero", "blur", "mean")


class BaselineError(VolsalError, ValueError):
    """What the volume is to be compared with is missing, or does not fit it."""


def baseline_of(volume: Tensor, baseline: Baseline, blur: float, context: Context) -> Tensor:
    """The baseline for ``volume``, of its shape (B, C, *spatial).

    Parameters
    ----------
    volume : (B, C, *spatial)
    baseline : ``zero``; ``blur``, the volume itself without its fine detail; ``mean``, each channel's own mean; a
        number, for every voxel; the file of a scan, read and preprocessed as the volume was; or a tensor of the
        volume's shape, or (1, C, *spatial)
    blur : standard deviation of the Gaussian for ``blur``, in mm where the context knows the grid, else in voxels
    context : knows the grid, and reads scans

    Raises
    ------
    BaselineError
        For a word that is none of these, a scan of another shape, or a scan where there is nothing to read it with.
    """
    volume = volume.detach().as_subclass(Tensor)
    if isinstance(baseline, Tensor):
        return _fitting(baseline, volume, "the baseline given as a tensor")
    if isinstance(baseline, (int, float)):
        return torch.full_like(volume, baseline)
    if baseline == "zero":
        return torch.zeros_like(volume)
    if baseline == "mean":
        return volume.mean(spatial(volume), keepdim=True).expand_as(volume)
    if baseline == "blur":
        return blurred(volume, _in_voxels(blur, volume.ndim - 2, context))
    return _fitting(_read(baseline, context), volume, f"the baseline scan {baseline}")


def baseline_text(baseline: Baseline, blur: float, context: Context) -> str:
    """The baseline in words, for a record."""
    if isinstance(baseline, Tensor):
        return "a given tensor"
    if baseline == "blur":
        return f"blur, {blur:g} {'voxels' if context.grid is None else 'mm'}"
    return str(baseline)


def listed_baselines(baselines: Any) -> list[Baseline]:
    """The single baselines of a folder, a pattern such as ``controls/*.nii.gz``, a tensor (N, C, *spatial) or a list.

    Raises
    ------
    BaselineError
        Where there are none.
    """
    if isinstance(baselines, Tensor):
        return list(baselines.split(1))
    found: list[Baseline]
    if isinstance(baselines, (str, Path)):
        path = Path(baselines)
        found = [path]
        if path.is_dir():
            found = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        elif "*" in path.name:
            found = sorted(path.parent.glob(path.name))
    else:
        found = list(baselines) if isinstance(baselines, Sequence) else []
    if not found:
        raise BaselineError(
            f"no baseline scans in {baselines!r}; give 'baselines' a folder of scans, a pattern such as "
            "'controls/*.nii.gz', or a list"
        )
    return found


def _in_voxels(blur: float, axes: int, context: Context) -> list[float]:
    return [blur] * axes if context.grid is None else [blur / float(mm) for mm in context.grid.spacing]


def _read(baseline: str | Path, context: Context) -> Tensor:
    text = str(baseline)
    if not any(mark in text for mark in "./\\"):
        raise BaselineError(
            f"unknown baseline {text!r}{nearest(text, _NAMES)}; or a number, or the file of a scan (with its suffix, "
            "or its folder's name and a slash)"
        )
    if context.input_of is None:
        raise BaselineError(
            f"the baseline scan {text} cannot be read here, where no scans are preprocessed; pass it as a tensor"
        )
    return context.input_of(baseline)


def _fitting(baseline: Tensor, volume: Tensor, what: str) -> Tensor:
    if baseline.shape[1:] != volume.shape[1:] or baseline.shape[0] not in (1, volume.shape[0]):
        raise BaselineError(
            f"{what} is {tuple(baseline.shape)}, the model's input {tuple(volume.shape)}; a baseline lies on the "
            "input's own voxels: crop or resample both alike in preprocessing"
        )
    return baseline.detach().as_subclass(Tensor).to(volume).expand_as(volume)
