#!/usr/bin/env python3
"""Memory of explaining a model that is applied by windows, for a volume on disk and for one of twice the depth.

    scripts/bench/windows.py [--shape 512 512 300] [--window 96] [--overlap 0.125] [--folder /tmp] [--quick]

The volume is a .npy file of int16 that is read window by window; maps and the stitched output go to files.  The target
is the foreground's logit summed over its predicted mask.  "allocated": PyTorch's own bytes at their peak, by its
allocator's events.  "process": what a fresh process holds at its peak, by the kernel's count, mapped parts of files
included; "of it, more": over what it held before.  All are of the input gradient and Grad-CAM together; "map" is what
one of their maps takes.  Linux only.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import re
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from measure import Call, allocated_peak
from torch import Tensor, nn

from volsal.attribution import GradCAM, InputGradient, Segment, Windows, explain_windows


class SmallUNet(nn.Module):
    """Three levels, one class; small, so that what is kept of the volume would show."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Conv3d(1, 4, 4, stride=4)
        self.middle = nn.Conv3d(4, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose3d(8, 4, 2, stride=2)
        self.head = nn.ConvTranspose3d(8, 1, 4, stride=4)
        self.requires_grad_(False)

    def forward(self, volume: Tensor) -> Tensor:
        fine = self.down(volume).relu()
        return self.head(torch.cat([fine, self.up(self.middle(fine).relu())], 1))


class OnDisk:
    """A .npy file that is mapped anew for each part, so that nothing stays mapped."""

    def __init__(self, path: Path) -> None:
        self.path, self.shape = path, np.load(path, mmap_mode="r").shape

    def __getitem__(self, at: tuple[slice, ...]) -> np.ndarray:
        return np.array(np.load(self.path, mmap_mode="r")[at])


def build(path: Path, shape: Sequence[int]) -> None:
    # The first axis runs fastest, as in a NIfTI file, so that the volume grows at its end.
    volume = np.lib.format.open_memmap(path, "w+", np.int16, tuple(shape), fortran_order=True)
    rng = np.random.default_rng(0)
    for k in range(shape[2]):
        volume[..., k] = rng.integers(-100, 100, shape[:2])


def explain(path: Path, windows: Windows) -> Call:
    """The call; what a first call loads for good is loaded here, on an empty volume of a window's size."""
    methods = [InputGradient(), GradCAM("middle")]

    def call() -> None:
        with TemporaryDirectory(dir=path.parent) as folder:
            explain_windows(SmallUNet(), OnDisk(path), methods, Segment(1), windows, folder=folder)

    explain_windows(SmallUNet(), np.zeros(windows.size, np.int16), methods, foreground, windows)
    return call


def foreground(logits: Tensor) -> Tensor:
    return logits.sum((1, 2, 3, 4))


def process_peak(path: Path, windows: Windows) -> tuple[int, int]:
    """Most bytes that this process holds during a call, and how many it held before."""
    call = explain(path, windows)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    call()
    return status("VmHWM"), before


def status(field: str) -> int:
    return 1024 * int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 300])
    parser.add_argument("--window", type=int, default=96)
    parser.add_argument("--overlap", type=float, default=0.125)
    parser.add_argument("--folder", type=Path, help="where the volume and the maps go")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="128 x 128 x 96 with windows of 48")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    (i, j, k), size = ([128, 128, 96], 48) if options.quick else (options.shape, options.window)
    windows = Windows((size,) * 3, options.overlap)
    print(f"torch {torch.__version__}, windows of {size}^3, overlap {options.overlap:g}, gaussian")
    names = ("windows", "seconds", "allocated MiB", "process MiB", "of it, more", "map MiB")
    print(f"{'volume':<17}" + "".join(f"{name:>15}" for name in names))
    rows = []
    with TemporaryDirectory(dir=options.folder) as folder:
        for shape in ((i, j, k), (i, j, 2 * k)):
            path = Path(folder) / "volume.npy"
            build(path, shape)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                process, before = pool.apply(process_peak, (path, windows))
            start = time.perf_counter()
            allocated = allocated_peak(explain(path, windows))
            seconds = time.perf_counter() - start
            rows.append((allocated, process, process - before))
            shown = [b / 2**20 for b in (*rows[-1], 4 * np.prod(shape))]
            print(
                f"{' x '.join(map(str, shape)):<17}{len(windows.over(shape).starts):>15}{seconds:>15.0f}"
                + "".join(f"{mib:>15.1f}" for mib in shown)
            )
    ratios = [double / single for single, double in zip(*rows, strict=True)]
    print("twice the depth: allocated x {:.3f}, process x {:.3f}, of it more x {:.3f}".format(*ratios))


if __name__ == "__main__":
    main()
