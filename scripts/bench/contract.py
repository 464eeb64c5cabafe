#!/usr/bin/env python3
"""The contract: every method on every architecture family, in float32 and bfloat16 autocast, alone and in a batch.

    scripts/bench/contract.py [--methods grad-cam hires-cam] [--families ViT] [--batches 1 3]

A cell is "ok" where the maps are finite and of the right shape, the same alone and in a batch, the same when asked for
twice, and the model, the volume and the random state are as before; a letter where volsal refuses, in words that stand
below the table, or where the map is 0 but for rounding; and "RED" where a promise is broken or anything but a refusal
is raised, which makes the exit status 1.
The networks are those of `tests/zoo.py`.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from zoo import EVERY, PRECISIONS, ROUNDING, contract, method_of

from volsal import METHODS


def cell(method: str, family: str, precision: str, batch: int) -> str:
    """ "" where the contract holds, a refusal, or "RED" and what happened."""
    of = EVERY[family]
    try:
        return contract(method_of(method, of.shape), of, precision, batch)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the table is to show
        lines = str(error).strip().splitlines() or [""]
        return f"RED {type(error).__name__}: {lines[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--families", nargs="+", default=list(EVERY), choices=EVERY)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")

    start, counts, refusals, red = time.perf_counter(), Counter(), {}, []
    width = max(map(len, options.families))
    for number, method in enumerate(options.methods, 1):
        print(f"{number:3}  {method}")
    print(f"\n{'':{width}}  " + " ".join(f"{number:>4}" for number in range(1, len(options.methods) + 1)))
    for family in options.families:
        row = []
        for method in options.methods:
            marks = []
            for precision in options.precisions:
                for batch in options.batches:
                    found = cell(method, family, precision, batch)
                    kind = "RED" if found.startswith("RED") else "refused" if found else "ok"
                    kind = "rounding alone" if found == ROUNDING else kind
                    counts[kind] += 1
                    if kind == "RED":
                        red.append(f"{family}, {method}, {precision}, batch {batch}: {found[4:]}")
                    if kind in ("refused", "rounding alone"):
                        # One sentence, whatever layers and operations it names.
                        said = re.sub(r"layer '[^']*'|\d+|of this model: [^(]*", "...", found)
                        letter = chr(97 + len(refusals) % 26) * (1 + len(refusals) // 26)
                        kind, _ = refusals.setdefault(said, (letter, found))
                    marks.append(kind)
            row.append("RED" if "RED" in marks else "/".join(dict.fromkeys(marks)))
        print(f"{family:{width}}  " + " ".join(f"{mark:>4}" for mark in row), flush=True)
    print()
    for letter, said in refusals.values():
        print(f"{letter:>3}  {said}")
    for line in red:
        print(f"RED  {line}")
    cells = ", ".join(f"{counts[kind]} {kind}" for kind in ("ok", "refused", "rounding alone", "RED"))
    print(
        f"\n{sum(counts.values())} cells ({len(options.precisions)} precisions x batches of "
        f"{' and '.join(map(str, options.batches))}): {cells}; {time.perf_counter() - start:.0f} s"
    )
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
