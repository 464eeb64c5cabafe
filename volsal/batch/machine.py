"""How busy the machine is, for who watches a run."""

from __future__ import annotations

import time
from pathlib import Path

import torch

_STAT = Path("/proc/stat")
_EVERY_S = 2.0


class Busy:
    """The share of time that the processors, and the GPU where one can be asked, were at work lately; as text."""

    def __init__(self) -> None:
        self._before = _times()
        self._asked = time.monotonic()
        self._text = _text(0.0)

    def __str__(self) -> str:
        if time.monotonic() - self._asked >= _EVERY_S:
            now = _times()
            total = sum(now) - sum(self._before)
            idle = sum(now[3:5]) - sum(self._before[3:5])
            self._text = _text(1 - idle / total if total else 0.0)
            self._before, self._asked = now, time.monotonic()
        return self._text


def _text(share: float) -> str:
    processors = f"CPU {share:.0%}" if _STAT.is_file() else ""
    try:
        return f"{processors}, GPU {torch.cuda.utilization()}%" if torch.cuda.is_available() else processors
    except (ImportError, RuntimeError):  # what would ask it is not installed
        return processors


def _times() -> list[int]:
    """What all processors did since the machine started: user, nice, system, idle, waiting, ..."""
    if not _STAT.is_file():
        return [0] * 5
    return [int(word) for word in _STAT.read_text().split("\n", 1)[0].split()[1:]]
