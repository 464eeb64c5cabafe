#!/usr/bin/env python3
"""Kill a run again and again at random moments, resume it each time, and compare what is left with an undisturbed run.

    scripts/bench/kill.py                         60 cases, 3 workers, 60 kills of a worker or of the whole run
    scripts/bench/kill.py --kills 8 --workers 1   a short form, by the run's own process alone

Every case must be there once, with the same bytes: maps to the byte, and case.json but for when it began and how long
it took.  No half-written file may stand under a final name at any time, and nothing of it be left at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

import nibabel as nib
import numpy as np
import yaml

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2), *head)
"""


def cohort(folder: Path, cases: int, size: int) -> Path:
    """Random scans and a config over them."""
    (folder / "scans").mkdir(parents=True)
    random_values = np.random.default_rng(0)
    for number in range(cases):
        array = random_values.normal(size=(size,) * 3).astype(np.float32)
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 2, 2, 1])), folder / "scans" / f"case{number:05d}.nii.gz")
    (folder / "net.py").write_text(NET)
    content = {
        "model": {"factory": "net.py:build"},
        "methods": ["grad-cam", "input-gradient"],
        "targets": ["class-1"],
        "alignment": "half-pixel",
        "scans": {"folder": "scans"},
        "output": "out",
        "threads": 1,
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(content))
    return folder / "c.yaml"


def start(config: Path, output: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "volsal", "run", str(config), "-o", str(output), "--workers", str(workers), "-q"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def children(pid: int) -> list[int]:
    """Processes below one, as Linux lists them."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [child for child, parent in parents.items() if parent == pid]
    for child in found:
        found += [other for other, parent in parents.items() if parent == child]
    return found


def workers_of(pid: int) -> list[int]:
    """Those of them that do cases: the rest are Python's own helpers."""
    found = []
    for child in children(pid):
        try:
            found += [child] if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes() else []
        except OSError:
            continue
    return found


def done(output: Path) -> int:
    return sum(1 for _ in output.glob("*/case.json"))


def tree(output: Path) -> dict[str, str]:
    """Every file of every case by its content, but for the times in case.json."""
    found = {}
    for path in sorted(output.glob("[!.]*/*")):
        content = path.read_bytes()
        if path.name == "case.json":
            record = json.loads(content)
            for name in ("started", "seconds"):
                del record["provenance"][name]
            content = json.dumps(record, sort_keys=True).encode()
        found[f"{path.parent.name}/{path.name}"] = sha256(content).hexdigest()
    return found


def torn(output: Path) -> list[str]:
    """Files under final names that are not whole."""
    bad = []
    for path in output.glob("[!.]*/[!.]*"):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            else:
                np.asarray(nib.load(path).dataobj)
        except FileNotFoundError:
            continue  # replaced while this was looking
        except Exception as error:  # noqa: BLE001 - whatever a reader says of a torn file
            bad.append(f"{path.name}: {error}")
    return bad


def disturb(config: Path, output: Path, workers: int, kills: int, chance: random.Random, wait_s: float) -> dict:
    killed = {"main": 0, "worker": 0}
    bad: list[str] = []
    resumed = 0
    while sum(killed.values()) < kills:
        since = time.time()
        process = start(config, output, workers)
        resumed += 1
        while process.poll() is None and sum(killed.values()) < kills:
            # Counted from when work has begun: a kill during the start is a kill of nothing.
            begun = time.monotonic()
            while process.poll() is None and not _at_work(output, since) and time.monotonic() - begun < 120:
                time.sleep(0.02)
            time.sleep(chance.uniform(0, wait_s))
            victims = workers_of(process.pid) if workers > 1 and chance.random() < 0.6 else []
            if victims:
                os.kill(chance.choice(victims), signal.SIGKILL)
                killed["worker"] += 1
            elif process.poll() is None:
                process.kill()
                process.wait()
                killed["main"] += 1
            bad += torn(output)
        process.wait()
        if done(output) == len(list((config.parent / "scans").iterdir())) and sum(killed.values()) < kills:
            # Done before the last kill: begin anew, so that each kill hits a run at work.
            for record in output.glob("*/case.json"):
                record.unlink()
    last = start(config, output, workers)
    code = last.wait()
    return {"killed": killed, "started": resumed + 1, "torn": bad, "exit": code}


def _at_work(output: Path, since: float) -> bool:
    """Whether a case was begun; what an earlier run left does not count."""
    for note in (output / ".volsal" / "doing").glob("*"):
        try:
            if note.stat().st_mtime > since:
                return True
        except FileNotFoundError:
            continue
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wait", type=float, default=1.5, help="a kill comes up to this many seconds after work began")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = cohort(folder, options.cases, options.size)
        start(config, folder / "undisturbed", options.workers).wait()
        expected = tree(folder / "undisturbed")
        told = disturb(
            config, folder / "out", options.workers, options.kills, random.Random(options.seed), options.wait
        )
        found = tree(folder / "out")
        cases = {name.split("/")[0] for name in found if name.endswith("/case.json")}
        same = found == expected
        print(f"{options.cases} cases, {options.workers} workers, started {told['started']} times")
        print(f"killed: {told['killed']['main']} x the run, {told['killed']['worker']} x a worker, by SIGKILL")
        print(f"at the end: {len(cases)} cases done, exit status {told['exit']}; half-written: {len(told['torn'])}")
        print(f"identical to the undisturbed run, to the byte: {'yes' if same else 'NO'}")
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                print(f"  differs: {name}")
        for line in told["torn"][:10]:
            print(f"  torn: {line}")
        if not same or told["torn"] or len(cases) != options.cases:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
