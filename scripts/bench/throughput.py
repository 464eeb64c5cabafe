#!/usr/bin/env python3
"""Scans per minute of `volsal run`, beside the script that a user would write (naive.py), in the same run.

    scripts/bench/throughput.py [--nets small:96 resnet18:128] [--shape 512 512 300] [--scans 8] [--naive-scans 3]
                                [--rounds 3] [--threads 1] [--stored-as uint8] [--quick]

The scans are CT-like: a body of smooth contrast with noise, int16, about 80 MiB each as .nii.gz.  Each way explains all
of them in a fresh process; the ways take turns in a random order, and of ratios, taken round by round, the median is
told.  Five ways:

naive            one scan after the other, of which there need not be as many
one by one       volsal.Explainer and Explanation.save, one scan after the other
run              volsal run: reading, computing and writing overlap
run, fast        the same with model: {fast: true}: batch norms folded, channels last; the same map to 1e-4
run, float32     the same with maps as large as the naive ones

Wall and CPU: seconds for each scan; of a run with all that it does once (the model is asked twice about the first scan,
and a fast copy compared with its model), of the first two ways after a scan that is not counted.  Next: of each scan
after the first, which is what thousands cost; it leaves out what was begun of others by the first one's end, so that
eight scans or more are to be taken.
Peak: the resident set's most (VmHWM) over what it was before the first scan.  Map: size of a map's file.  Equal: the
largest and the mean difference between the naive map and volsal's, both from 0 to 1, inside the model's field of view
and at least one of its voxels from its faces; MONAI interpolates twice, and maps of 8 bits are rounded by 1/510.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
import torch
from measure import status_bytes
from naive import LAYERS, SPACING_MM, explain, network
from numpy.typing import NDArray

WAYS = ("naive", "one by one", "run", "run, fast", "run, float32")
GOAL_TIME = {"small": 12.0, "resnet18": 5.0}
GOAL_MEMORY = 1 / 3


@dataclass(frozen=True)
class Job:
    """One way over all scans; ``target`` is the class that is explained."""

    way: str
    net: str
    size: int
    scans: tuple[Path, ...]
    out: Path
    threads: int
    stored_as: str
    target: int = 1


@dataclass(frozen=True)
class Cost:
    """Seconds for one scan, ``next_wall`` and ``next_cpu`` for each after the first; ``peak`` in bytes."""

    wall: float
    cpu: float
    next_wall: float
    next_cpu: float
    peak: int
    stages: dict[str, float]


def make_scans(folder: Path, shape: tuple[int, int, int], count: int) -> tuple[Path, ...]:
    """CT-like volumes on an LPS grid, each with noise of its own."""
    random_numbers = np.random.default_rng(0)
    i, j, k = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    body = (i[:, None] / 0.85) ** 2 + (j / 0.65) ** 2 < 1
    spacing = np.array((360, 360, 300)) / shape
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    paths = []
    for number in range(count):
        voxels = np.empty(shape, np.int16, order="F")
        for slice_number, z in enumerate(k):
            organs = 60 * np.sin(5 * i + number)[:, None] * np.cos(4 * j + 3 * z) + 80 * (j > 0.3) * (abs(z) < 0.5)
            noise = random_numbers.normal(scale=45, size=shape[:2]).astype(np.float32)
            voxels[..., slice_number] = np.rint(np.where(body, 40 + organs + noise, 0.25 * noise - 1000))
        image = nib.Nifti1Image(voxels, affine)
        image.set_sform(affine, 1)
        image.set_qform(affine, 1)
        image.header.set_xyzt_units("mm")
        paths.append(folder / f"ct{number}.nii.gz")
        nib.save(image, paths[-1])
    return tuple(paths)


def naive_way(job: Job) -> Cost:
    model = network(job.net)
    begin = _begin()
    costs = []
    for scan in job.scans:
        begun = _now()
        stages = explain(model, job.net, scan, job.out / f"{scan.name[:3]}_naive.nii.gz", job.size, job.target)
        costs.append((_now() - begun, stages))
    return _mean(costs[1:], status_bytes("VmHWM") - begin)


def one_by_one(job: Job) -> Cost:
    from volsal.config import load_config
    from volsal.explain import Explainer

    explainer = Explainer.from_config(load_config(_config(job)))
    begin = _begin()
    costs = []
    for scan in job.scans:
        begun, laps = _now(), [time.perf_counter()]
        ready = explainer.prepare(scan)
        laps.append(time.perf_counter())
        answer = explainer.answer(ready)
        laps.append(time.perf_counter())
        explanation = explainer.carry(answer)
        laps.append(time.perf_counter())
        explanation.save(job.out, job.stored_as)
        laps.append(time.perf_counter())
        stages = dict(zip(("prepare", "answer", "carry", "save"), np.diff(laps).tolist(), strict=True))
        costs.append((_now() - begun, stages))
    return _mean(costs[1:], status_bytes("VmHWM") - begin)


def run_way(job: Job) -> Cost:
    from volsal.batch import Run
    from volsal.config import load_config
    from volsal.explain import Explainer

    config = load_config(_config(job))
    explainer = Explainer.from_config(config)
    begin = _begin()
    explainer.prepare(job.scans[0])  # what takes long to import is there, as in the other ways after their first scan
    del explainer
    times, outcomes = [_now()], []
    for outcome in Run(config).execute():
        outcomes.append(outcome)
        times.append(_now())
    each = (times[-1] - times[0]) / len(outcomes)
    further = (times[-1] - times[1]) / (len(outcomes) - 1)
    bad = [outcome for outcome in outcomes if outcome.status != "done"]
    if bad:
        raise SystemExit(f"{bad[0].case}: {bad[0].error}")
    stages = {name: sum(o.stages.get(name, 0.0) for o in outcomes) / len(outcomes) for name in outcomes[0].stages}
    return Cost(*each, *further, status_bytes("VmHWM") - begin, stages)


def _begin() -> int:
    """The resident set as it is now, from which its peak counts anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def _now() -> NDArray:
    """Seconds on the wall and of CPU."""
    return np.array([time.perf_counter(), time.process_time()])


def _mean(costs: list[tuple[NDArray, dict[str, float]]], peak: int) -> Cost:
    seconds = np.mean([taken for taken, _ in costs], axis=0)
    stages = {name: statistics.mean(stages[name] for _, stages in costs) for name in costs[0][1]}
    return Cost(*seconds, *seconds, peak, stages)


def _config(job: Job) -> Path:
    path = job.out / "config.yaml"
    factory = f"{Path(__file__).with_name('naive.py')}:network"
    path.write_text(
        f"""\
model: {{factory: "{factory}", arguments: {{net: {job.net}}}, fast: {"true" if "fast" in job.way else "false"}}}
preprocess:
  - Orientation: {{axcodes: RAS}}
  - Spacing: {{pixdim: [{SPACING_MM}, {SPACING_MM}, {SPACING_MM}], mode: bilinear}}
  - ScaleIntensityRange: {{a_min: -1000, a_max: 1000, b_min: 0, b_max: 1, clip: true}}
  - ResizeWithPadOrCrop: {{spatial_size: [{job.size}, {job.size}, {job.size}]}}
methods: [{{grad-cam: {{layer: {LAYERS[job.net]}}}}}]
targets: [class-{job.target}]
alignment: half-pixel
scans: {{folder: "{job.scans[0].parent}"}}
output: "{job.out}"
maps: {{stored_as: {job.stored_as}}}
threads: {job.threads}
"""
    )
    return path


def in_this_process(job: Job) -> Cost:
    warnings.simplefilter("ignore")
    torch.set_num_threads(job.threads)
    return {"naive": naive_way, "one by one": one_by_one}.get(job.way, run_way)(job)


def measured(job: Job) -> Cost:
    """What ``job`` costs in a process of its own."""
    shutil.rmtree(job.out, ignore_errors=True)
    job.out.mkdir(parents=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(in_this_process, (job,))


def difference(naive: Path, ours: Path, size: int) -> tuple[float, float]:
    """(largest, mean) absolute difference of two maps, each brought to [0, 1], well inside the field of view."""
    one, other = nib.load(naive), nib.load(ours)
    inside = tuple(_inner(n, abs(step), size) for n, step in zip(one.shape, one.affine.diagonal(), strict=False))
    a, b = (_stretched(np.asarray(image.dataobj[inside], dtype=np.float32)) for image in (one, other))
    apart = np.abs(a - b)
    return float(apart.max()), float(apart.mean())


def _inner(count: int, step: float, size: int) -> slice:
    half = min((size / 2 - 1.5) * SPACING_MM / step, count / 2 - 2)
    middle = (count - 1) / 2
    return slice(int(np.ceil(middle - half)), int(middle + half) + 1)


def _stretched(values: NDArray) -> NDArray:
    return (values - values.min()) / (np.ptp(values) or 1)


def rows(net: str, size: int, args: argparse.Namespace, folder: Path, scans: tuple[Path, ...]) -> dict[str, Any]:
    """Print the table of one network; return the ratios."""
    jobs = {
        way: Job(
            way, net, size, scans[: args.naive_scans if way == "naive" else None],
            folder / way.replace(", ", "-").replace(" ", "-"), args.threads,
            "float32" if way == "run, float32" else args.stored_as,
        )
        for way in args.ways
    }  # fmt: skip
    costs: dict[str, list[Cost]] = {way: [] for way in jobs}
    for _ in range(args.rounds):
        for way in random.sample(list(jobs), len(jobs)):
            costs[way].append(measured(jobs[way]))
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(f"\n{net} at {size}^3, {args.threads} thread(s), {len(scans)} scans of {' x '.join(map(str, args.shape))}")
    print(
        f"{'':14}{'wall s':>8}{'CPU s':>8}{'next: wall':>12}{'CPU':>7}{'peak MiB':>10}{'map MiB':>9}"
        f"{'wall x':>8}{'CPU x':>7}{'next: wall x':>14}{'CPU x':>7}{'peak':>7}  stages"
    )
    ratios = {}
    for way, found in costs.items():
        times, cpu, next_times, next_cpu = (
            statistics.median(getattr(n, name) / getattr(c, name) for n, c in zip(costs["naive"], found, strict=True))
            for name in ("wall", "cpu", "next_wall", "next_cpu")
        )
        memory = statistics.median(c.peak / n.peak for n, c in zip(costs["naive"], found, strict=True))
        middle = {name: statistics.median(c.stages[name] for c in found) for name in found[0].stages}
        (written, *_) = sorted(jobs[way].out.rglob("ct*.nii.gz"))
        print(
            f"{way:14}{statistics.median(c.wall for c in found):8.2f}{statistics.median(c.cpu for c in found):8.2f}"
            f"{statistics.median(c.next_wall for c in found):12.2f}{statistics.median(c.next_cpu for c in found):7.2f}"
            f"{statistics.median(c.peak for c in found) / 2**20:10.0f}{written.stat().st_size / 2**20:9.1f}"
            f"{times:8.1f}{cpu:7.1f}{next_times:14.1f}{next_cpu:7.1f}{memory:7.2f}  "
            + ", ".join(f"{name} {s:.2f}" for name, s in middle.items())
        )
        if way != "naive":
            (first, *_) = sorted(jobs["naive"].out.glob("ct*.nii.gz"))
            largest, mean = difference(first, written, size)
            print(f"{'':14}maps differ by at most {largest:.1e}, on average {mean:.1e}")
        ratios[way] = {"all": times, "each further scan": next_times, "memory": memory}
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["small:96", "resnet18:128"], metavar="NET:SIZE")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--shape", nargs=3, type=int, default=[512, 512, 300])
    parser.add_argument("--scans", type=int, default=8)
    parser.add_argument("--naive-scans", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stored-as", default="uint8", choices=("float32", "uint16", "uint8", "int16"))
    parser.add_argument("--quick", action="store_true", help="256 x 256 x 150, two scans, one round")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.scans, args.rounds = [256, 256, 150], 2, 1
    if "naive" not in args.ways or min(args.scans, args.naive_scans) < 2:
        parser.error("ratios need the naive way, and at least two scans")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "scans").mkdir()
        scans = make_scans(folder / "scans", tuple(args.shape), args.scans)
        print(f"scans of {scans[0].stat().st_size / 2**20:.0f} MiB")
        for entry in args.nets:
            net, _, size = entry.partition(":")
            for way, ratio in rows(net, int(size), args, folder, scans).items():
                if way in ("run", "run, fast"):
                    for name in ("all", "each further scan"):
                        verdict = ratio[name] >= GOAL_TIME[net] and ratio["memory"] <= GOAL_MEMORY
                        said = "reached" if verdict else "missed"
                        print(f"{way}, {name}: goal {GOAL_TIME[net]:g} x, a third of the memory: {said}")


if __name__ == "__main__":
    main()
