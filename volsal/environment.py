"""What a result was computed with, for its record: volsal's own state, versions, machine, and what moves last bits."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "numpy", "nibabel", "SimpleITK", "monai")
_ROOT = Path(__file__).parents[1]  # of the checkout, where volsal runs from one
_PATIENCE_S = 10.0


def environment() -> dict[str, Any]:
    """Versions, machine and settings; plain data.

    ``commit`` is that of the checkout that volsal runs from, with ``-dirty`` where its files differ from it; None where
    it is installed otherwise.
    """
    return {**_fixed(), "numerics": _numerics()}


@cache
def _fixed() -> dict[str, Any]:
    """What stays as it is while the process lasts; asked for once, for the commit takes a process of its own."""
    versions: dict[str, Any] = {name: metadata.version(name) for name in _PACKAGES}
    if torch.cuda.is_available():
        versions |= {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name(), **_driver()}
    system = platform.uname()
    return {
        "volsal": sys.modules[__package__].__version__,
        "commit": _commit(_ROOT),
        "versions": {"python": platform.python_version(), **versions},
        "machine": f"{system.system} {system.release} {system.machine}, {_processor()}{os.cpu_count()} CPUs",
    }


def _numerics() -> dict[str, Any]:
    """The settings of torch that may change a result's last bits, beside the number of threads."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "matmul": torch.get_float32_matmul_precision(),
    }


def _commit(root: Path) -> str | None:
    """The commit that is checked out in ``root``; None where that is no checkout, or there is no git to ask."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        # Git refreshes its index on the way, which must not get into the way of the user's own git.
        done = subprocess.run(
            command, capture_output=True, timeout=_PATIENCE_S, check=True, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("ascii", "replace").strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name}, " if name else ""


def _driver() -> dict[str, str]:
    """The version of NVIDIA's driver, where Linux tells it."""
    try:
        text = Path("/sys/module/nvidia/version").read_text(encoding="ascii")
    except OSError:
        return {}
    return {"driver": text.strip()}
