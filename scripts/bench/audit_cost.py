#!/usr/bin/env python3
"""What a full audit costs, and where its time goes: 60 phantoms of 64 x 64 x 64 voxels, a small net, masks and groups.

    scripts/bench/audit_cost.py [--scans 60] [--size 64] [--steps 120]

A small net is trained first, which does not count.  Then `volsal audit` with its defaults: one method of the config and
all the candidates of `volsal choose`.  Times are the processor's, of all threads, so that other work on the machine
does not show; parts overlap where one is made of others.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import tempfile
import time
from pathlib import Path

from volsal import Explainer
from volsal.audit.run import audit
from volsal.config import AuditSection

ROOT = Path(__file__).parents[2]
# What a part of the audit is called, and the functions that it is: (file, function).
PARTS = {
    "all of it": ("run.py", "audit"),
    "choosing the map": ("choose.py", "choose"),
    "reading scans, body and padding": ("subject.py", "subject_of"),
    "the methods' maps": ("subject.py", "maps"),
    "balls: running the model": ("probe.py", "effects"),
    "darker and brighter copies": ("shortcuts.py", "brightness_of"),
    "maps beside masks, with nulls": ("examine.py", "_on_mask"),
    "regions and anatomy": ("anatomy.py", "budget"),
    "exchanges between scans": ("exchange.py", "exchange"),
    "checks: stability": ("checks.py", "_stability"),
    "checks: randomised layers": ("checks.py", "_randomisation"),
    "checks: deletion and insertion": ("faithfulness.py", "delta_areas"),
    "checks: agreement": ("checks.py", "agreement_of"),
    "checks: other outputs": ("checks.py", "_random_logit"),
    "similarity of two maps": ("similarity.py", "with_"),
    "cohort maps": ("group_maps.py", "group_maps"),
    "intervals": ("statistics.py", "summarise"),
    "group differences": ("verdicts.py", "group_differences"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=60)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--top", type=int, default=0, help="also the so many functions that take most time themselves")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    import planted

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        net, accuracy = planted.trained(planted.small_net(1), "lesion", arguments.steps, size=arguments.size)
        cases = planted.cases(folder, "lesion", arguments.scans, seed=5, size=arguments.size, masks=True)
        print(f"{len(cases)} scans of {arguments.size}^3, net with accuracy {accuracy:.2f}", flush=True)
        profile = cProfile.Profile(time.process_time)
        clock, wall = time.process_time(), time.monotonic()
        profile.enable()
        found = audit(Explainer(net, None, "grad-cam"), cases, AuditSection(scans=arguments.scans), folder / "run")
        profile.disable()
        seconds, wall = time.process_time() - clock, time.monotonic() - wall
        print(f"{seconds:.0f} s of processor, {wall:.0f} s on the clock; {seconds / len(cases):.1f} s a scan")
        print(f"recommended: {found.choice.recommended if found.choice else None}")
        table(profile, seconds)
        if arguments.top:
            pstats.Stats(profile).sort_stats("tottime").print_stats(arguments.top)


def table(profile: cProfile.Profile, seconds: float) -> None:
    spent = {(Path(file).name, name): row[3] for (file, _, name), row in pstats.Stats(profile).stats.items()}
    for part, function in PARTS.items():
        if function in spent:
            print(f"   {spent[function]:7.1f} s {spent[function] / seconds:5.0%}  {part}")


if __name__ == "__main__":
    main()
