#!/usr/bin/env python3
"""What a run costs beside the work: many tiny cases, time for each, memory of the process, and a resume of it all.

    scripts/bench/many.py                    10,000 cases of 16^3
    scripts/bench/many.py --cases 1000       a shorter one
    scripts/bench/many.py --again c.yaml     only run a finished run again, three times

Overhead is the run's time for each case less what the same explainer takes for reading, computing and carrying the same
scans in a plain loop, which writes nothing.  Memory is the process's resident set, looked at as cases end.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from kill import cohort

from volsal.batch import Run
from volsal.config import load_config


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def plain_ms(config: Path, cases: int) -> float:
    """Milliseconds for each scan by the explainer alone."""
    run = Run(load_config(config))
    explainer = run.job.explainer()
    paths = [case.paths for case in list(run.cases.values())[:cases]]
    explainer(paths[0])
    clock = time.perf_counter()
    for path in paths:
        explainer(path)
    return 1e3 * (time.perf_counter() - clock) / len(paths)


def resumed(config: Path) -> tuple[int, float, float]:
    """Cases that are kept when a finished run is run again, seconds on the clock, and seconds of CPU."""
    run = Run(load_config(config))
    clock, cpu = time.perf_counter(), time.process_time()
    kept = sum(outcome.status == "kept" for outcome in run.execute())
    return kept, time.perf_counter() - clock, time.process_time() - cpu


def show(again: list[tuple[int, float, float]]) -> None:
    for kept, seconds, cpu in again:
        print(f"run again: {kept} kept in {seconds:.1f} s (goal < 10), {cpu:.1f} s of CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--again", type=Path, metavar="CONFIG", help="of a finished run")
    options = parser.parse_args()
    if options.again:
        show([resumed(options.again) for _ in range(3)])
        return
    with tempfile.TemporaryDirectory() as place:
        config = cohort(Path(place), options.cases, options.size)
        alone = plain_ms(config, min(500, options.cases))
        memory: dict[int, float] = {}
        clock = time.perf_counter()
        stages: dict[str, list[float]] = {}
        for number, outcome in enumerate(Run(load_config(config)).execute(), 1):
            assert outcome.status == "done", outcome.error
            for stage, seconds in outcome.stages.items():
                stages.setdefault(stage, []).append(1e3 * seconds)
            if number % max(1, options.cases // 10) == 0:
                memory[number] = resident_mib()
        each = 1e3 * (time.perf_counter() - clock) / options.cases
        again = [resumed(config) for _ in range(3)]
        run = Run(load_config(config))
        clock = time.perf_counter()
        run.collect()
        collected = time.perf_counter() - clock
    print(f"{options.cases} cases of {options.size}^3, two maps each")
    print(f"a case in the run: {each:.1f} ms; by the explainer alone, nothing written: {alone:.1f} ms")
    print(f"overhead per case: {each - alone:.1f} ms (goal < 20)")
    print("stages, median ms: " + ", ".join(f"{name} {statistics.median(ms):.1f}" for name, ms in stages.items()))
    print("memory, MiB, after cases: " + ", ".join(f"{n}: {mib:.0f}" for n, mib in memory.items()))
    begun, first, last = next(iter(memory)), next(iter(memory.values())), list(memory.values())[-1]
    print(f"growth from case {begun} to {options.cases}: {last / first - 1:+.1%} (goal within 10 %)")
    show(again)
    print(f"their table: {collected:.1f} s")


if __name__ == "__main__":
    main()
