"""What a volume is compared with: the scan without what is to be explained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from volsal.attribution.method import Context, spatial
from volsal.attribution.perturbation.perturbation import blurred
from volsal.errors import VolsalError, nearest

Baseline = str | Path | float | Tensor | NDArray

# Baselines that need no file.
NAMES = ("zero", "blur", "mean")


class BaselineError(VolsalError, ValueError):
    """What the volume is to be compared with is missing, or does not fit it."""


def baseline_of(volume: Tensor, baseline: Baseline, blur: float, context: Context) -> Tensor:
    """The baseline for ``volume``, of its shape (B, C, *spatial).

    Parameters
    ----------
    volume : (B, C, *spatial)
    baseline : ``zero``; ``blur``, the volume itself without its fine detail; ``mean``, each channel's own mean; a
        number, for every voxel; the file of a scan, read and preprocessed as the volume was; or a tensor or array of
        the volume's shape, or (1, C, *spatial)
    blur : standard deviation of the Gaussian for ``blur``, in mm where the context knows the grid, else in voxels
    context : knows the grid, and reads scans

    Raises
    ------
    BaselineError
        For a word that is none of these, a scan of another shape, or a scan where there is nothing to read it with.
    """
    volume = volume.detach().as_subclass(Tensor)
    if isinstance(baseline, (Tensor, np.ndarray)):
        return _fitting(torch.as_tensor(baseline), volume, "the baseline given as a tensor")
    if isinstance(baseline, (int, float, np.number)):
        return torch.full_like(volume, float(baseline))
    if baseline == "zero":
        return torch.zeros_like(volume)
    if baseline == "mean":
        return volume.mean(spatial(volume), keepdim=True).expand_as(volume)
    if baseline == "blur":
        return blurred(volume, _in_voxels(blur, volume.ndim - 2, context))
    return _fitting(_read(baseline, context), volume, f"the baseline scan {baseline}")


def baseline_text(baseline: Baseline, blur: float, context: Context) -> str:
    """The baseline in words, for a record."""
    if isinstance(baseline, (Tensor, np.ndarray)):
        return "a given tensor"
    if baseline == "blur":
        return f"blur, {blur:g} {'voxels' if context.grid is None else 'mm'}"
    return str(baseline)


def listed_baselines(baselines: Any, folder: Path) -> list[Baseline]:
    """The single baselines of whatever :class:`volsal.ExpectedGradients` takes.

    A folder of scans, or a pattern such as ``controls/*.nii.gz``, starts from ``folder``; a tensor or array
    (N, C, *spatial) holds N; a list holds one in each place; anything else is one.

    Raises
    ------
    BaselineError
        Where there are none.
    """
    if isinstance(baselines, (Tensor, np.ndarray)):
        return list(torch.as_tensor(baselines).split(1))
    if isinstance(baselines, Sequence) and not isinstance(baselines, str):
        found = list(baselines)
    elif isinstance(baselines, (str, Path)) and baselines not in NAMES:
        found = files_of(baselines, folder)
    else:
        found = [baselines]
    if not found:
        raise BaselineError(
            f"no baseline scans in {str(baselines)!r}{_below(baselines, folder)}; give 'baselines' a folder of scans, "
            "a pattern such as 'controls/*.nii.gz', or a list"
        )
    return found


def files_of(named: str | Path, folder: Path) -> list[Baseline]:
    """The scans of a folder, or of a pattern in one; what is neither, as it is."""
    path = (folder / Path(named).expanduser()).absolute()  # absolute, lest whoever reads them starts from folder again
    if path.is_dir():
        return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    return sorted(path.parent.glob(path.name)) if "*" in path.name else [named]


def named_files(baseline: Any) -> list[str | Path]:
    """The file that a baseline names, if it names one."""
    return [baseline] if isinstance(baseline, Path) or (isinstance(baseline, str) and _is_path(baseline)) else []


def _is_path(text: str) -> bool:
    return any(mark in text for mark in "./\\")


def _below(named: Any, folder: Path) -> str:
    """Where a relative path was looked for."""
    relative = isinstance(named, (str, Path)) and not Path(named).expanduser().is_absolute()
    return f" below {folder.absolute()}" if relative else ""


def _in_voxels(blur: float, axes: int, context: Context) -> list[float]:
    return [blur] * axes if context.grid is None else [blur / float(mm) for mm in context.grid.spacing]


def _read(baseline: str | Path, context: Context) -> Tensor:
    text = str(baseline)
    if not _is_path(text):
        raise BaselineError(
            f"unknown baseline {text!r}{nearest(text, NAMES)}; or a number, or the file of a scan (with its suffix, "
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
