#!/usr/bin/env python3
"""What carrying a layer's map onto a scan's voxels costs, beside the usual ways, in the same run.

    scripts/bench/resample.py [--rounds 5] [--cells 6 8 12 96] [--slices 300] [--threads 2] [--quick]

The scan is 512 x 512 x SLICES voxels of 0.7 x 0.7 x 300/SLICES mm, the model's input 128^3 of 1.5 mm in its middle, the
map CELLS^3 over that.  "aligned" keeps the scan's axes, "oblique" turns them 10 degrees about two axes.

Time: medians of interleaved rounds, each round timing every way once in a random order; the ratio to MONAI's way is
taken round by round.  CPU: user + system seconds of the process, which other load on the machine disturbs less.
Memory: growth of the resident set's peak (VmHWM) over one call in a fresh process, less the float32 result itself.
Difference: largest, to the first way, over voxels at least one from a face of the model's input; MONAI interpolates
twice.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from volsal.grid import Grid
from volsal.resampling import resample

REFERENCE = "MONAI, two steps"


def case(angle: float, cells: int, slices: int) -> tuple[torch.Tensor, Grid, Grid, Grid]:
    """(map, its grid, the scan's grid, the model input's grid)."""
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    shape = (512, 512, slices)
    affine = np.eye(4)
    affine[:3, :3] = turn * (-0.7, -0.7, 300 / slices)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    field = np.diag([1.5, 1.5, 1.5, 1])
    field[:3, 3] = -1.5 * 63.5
    seen = Grid((128,) * 3, field)
    values = torch.rand((cells,) * 3, generator=torch.Generator().manual_seed(0))
    return values, seen.coarse(values.shape), Grid(shape, affine), seen


def volsal_way(values: torch.Tensor, source: Grid, target: Grid, field: Grid) -> NDArray:
    return resample(values, source, target, field).numpy()


def monai_way(values: torch.Tensor, source: Grid, target: Grid, field: Grid) -> NDArray:
    from monai.data import MetaTensor
    from monai.transforms import SpatialResample

    upsampled = F.interpolate(values[None, None], size=field.shape, mode="trilinear", align_corners=False)[0]
    image = MetaTensor(upsampled, affine=torch.from_numpy(field.affine.copy()))
    step = SpatialResample(mode="bilinear", padding_mode="zeros")
    return step(image, dst_affine=torch.from_numpy(target.affine.copy()), spatial_size=target.shape)[0].numpy()


def itk_way(values: torch.Tensor, source: Grid, target: Grid, field: Grid) -> NDArray:
    import SimpleITK as sitk

    def placed(image: sitk.Image, grid: Grid) -> sitk.Image:
        turned = np.diag([-1, -1, 1]) @ grid.affine[:3]
        image.SetSpacing(grid.spacing.tolist())
        image.SetDirection((turned[:, :3] / grid.spacing).ravel().tolist())
        image.SetOrigin(turned[:, 3].tolist())
        return image

    image = placed(sitk.GetImageFromArray(np.ascontiguousarray(values.numpy().transpose(2, 1, 0))), source)
    resampler = sitk.ResampleImageFilter()
    reference = placed(sitk.Image(1, 1, 1, sitk.sitkUInt8), target)
    resampler.SetReferenceImage(reference)
    resampler.SetSize(target.shape)
    resampler.SetInterpolator(sitk.sitkLinear)
    return sitk.GetArrayFromImage(resampler.Execute(image)).transpose(2, 1, 0)


def scipy_way(values: torch.Tensor, source: Grid, target: Grid, field: Grid) -> NDArray:
    from scipy.ndimage import affine_transform

    composed = target.to(source)
    if np.allclose(composed[:3, :3], np.diag(np.diag(composed[:3, :3]))):
        composed[:3, :3] = np.diag(np.diag(composed[:3, :3]))
    options = {"output_shape": target.shape, "order": 1, "mode": "nearest"}
    return affine_transform(values.numpy(), composed[:3, :3], composed[:3, 3], **options)


def grid_sample_way(values: torch.Tensor, source: Grid, target: Grid, field: Grid) -> NDArray:
    composed = torch.from_numpy(target.to(source)).float()
    i, j, k = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in target.shape), indexing="ij")
    axes = [row[0] * i + row[1] * j + row[2] * k + row[3] for row in composed[:3]]
    del i, j, k
    at = torch.stack([(2 * axes[a] + 1) / values.shape[a] - 1 for a in (2, 1, 0)], dim=-1)
    return F.grid_sample(values[None, None], at[None], padding_mode="border", align_corners=False)[0, 0].numpy()


Way = Callable[[torch.Tensor, Grid, Grid, Grid], NDArray]
WAYS: dict[str, Way] = {
    "volsal": volsal_way,
    REFERENCE: monai_way,
    "SimpleITK, one step": itk_way,
    "scipy, one step": scipy_way,
    "grid_sample, whole": grid_sample_way,
}


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    call()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.perf_counter() - wall, cpu


def status_bytes(key: str) -> int:
    with open("/proc/self/status") as file:  # noqa: PTH123
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024


def child(way: str, angle: float, cells: int, slices: int) -> None:
    """Print the growth of the peak over one call, less the result, bytes."""
    # The libraries' own first-call allocations are no part of it.
    WAYS[way](*case(angle, 4, 4))
    values = case(angle, cells, slices)
    # Where the system does not let the peak be set back, the resident set as it is now is the floor all the same.
    before = status_bytes("VmRSS")
    result = WAYS[way](*values)
    print(json.dumps(status_bytes("VmHWM") - before - result.size * 4))


def peak_mib(way: str, angle: float, cells: int, slices: int, threads: int) -> float:
    arguments = [way, angle, cells, slices]
    command = [sys.executable, "-W", "ignore", __file__, "--threads", str(threads), "--child", json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 2**20


def inner(target: Grid, field: Grid, rows: range) -> NDArray[np.bool_]:
    """Voxels of some rows of the target at least one voxel from the field's faces."""
    ijk = np.stack(np.meshgrid(rows, *(np.arange(n) for n in target.shape[1:]), indexing="ij"), -1)
    at = field.voxel(target.world(ijk))
    return ((at > 0.5) & (at < np.array(field.shape) - 1.5)).all(-1)


def difference(result: NDArray, first: NDArray, target: Grid, field: Grid) -> float:
    worst = 0.0
    for row in range(0, target.shape[0], 16):
        chosen = inner(target, field, range(row, row + 1))
        worst = max(worst, float(np.abs(result[row : row + 1] - first[row : row + 1])[chosen].max(initial=0)))
    return worst


def compare(ways: list[str], angle: float, cells: int, slices: int, rounds: int, threads: int) -> None:
    values = case(angle, cells, slices)
    first = WAYS[ways[0]](*values)
    apart = {way: difference(WAYS[way](*values), first, *values[2:]) for way in ways}  # also the warm-up
    del first
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in random.sample(ways, len(ways)):
            times[way].append(timed(lambda way=way: WAYS[way](*values)))
    for way in ways:
        wall, cpu = (statistics.median(column) for column in zip(*times[way], strict=True))
        ratio = "-"
        if REFERENCE in ways:
            shares = [a[0] / b[0] for a, b in zip(times[way], times[REFERENCE], strict=True)]
            ratio = f"{statistics.median(shares):.3f}"
        label = f"{cells}^3 {'oblique' if angle else 'aligned'} {slices}"
        peak = peak_mib(way, angle, cells, slices, threads)
        print(f"{label:<20}{way:<21}{wall:>8.2f}{cpu:>8.2f}{ratio:>10}{peak:>12.0f}{apart[way]:>12.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", type=int, nargs="+", default=[6, 8, 12, 96])
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="volsal alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.child:
        child(*json.loads(options.child))
        return
    print(
        f"{'map, angle, slices':<20}{'way':<21}{'wall s':>8}{'CPU s':>8}{'/ MONAI':>10}{'above MiB':>12}{'apart':>12}"
    )
    for cells in options.cells:
        for angle in (0, 10):
            # The others are timed once: what they cost depends little on the number of cells.
            ways = list(WAYS) if cells == 8 and not options.quick else ["volsal"]
            compare(ways, angle, cells, options.slices, options.rounds, options.threads)
            if not options.quick:
                compare(["volsal"], angle, cells, 2 * options.slices, options.rounds, options.threads)


if __name__ == "__main__":
    main()
