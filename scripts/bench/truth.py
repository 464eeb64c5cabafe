#!/usr/bin/env python3
"""How near each map's peak lies to evidence that is known: models and scans whose truth was planted.

    volsal run resnet_lesion.yaml                 # a config over TRUTH/lesion/scans
    scripts/bench/truth.py TRUTH/lesion RUN       # a row per method and target

TRUTH/<task> holds masks/<case>_truth.nii.gz and truth.json.  Counted are the scans that hold the evidence of the label
and were predicted right.  "hit": the peak voxel lies in the mask.  Distances in mm, peak to the nearest voxel of the
mask (0 inside) and peak to the mask's centroid.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import nibabel as nib
import numpy as np

KINDS = {"lesion": 1, "side": 1, "corner": 3}


def evidence(task: Path, case: str, value: int) -> np.ndarray:
    """World positions (N, 3) mm of the mask voxels of one kind."""
    image = nib.load(task / "masks" / f"{case}_truth.nii.gz")
    return nib.affines.apply_affine(image.affine, np.argwhere(np.asanyarray(image.dataobj) == value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path)
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args()
    truth = json.loads((arguments.task / "truth.json").read_text())
    entries = {entry["id"]: entry for entry in truth["scans"]}
    found: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    used = 0
    for record in sorted(arguments.run.glob("*/case.json")):
        content = json.loads(record.read_text())
        entry = entries[content["case"]]
        points = evidence(arguments.task, content["case"], KINDS[arguments.task.name])
        wants_evidence = entry["label"] == 1 or arguments.task.name == "side"
        if not wants_evidence or not len(points) or content["prediction"]["class"] != entry["label"]:
            continue
        used += 1
        for one in content["maps"]:
            if one["peak_mm"] is not None:
                peak = np.array(one["peak_mm"])
                near = float(np.linalg.norm(points - peak, axis=1).min())
                centre = float(np.linalg.norm(points.mean(0) - peak))
                found[one["method"], one["target"], one["layer"] or "input"].append((near, centre))
    print(f"{used} scans with evidence, predicted right\n")
    print(f"{'method':<17}{'target':<17}{'layer':<10}{'hit':>6}  {'mm to mask: mean, median':<26}mm to centroid")
    for (method, target, layer), pairs in sorted(found.items()):
        near, centre = np.array(pairs).T
        hit = float((near < 0.5).mean())
        print(
            f"{method:<17}{target:<17}{layer:<10}{hit:>6.2f}  {near.mean():>8.1f}{np.median(near):>8.1f}"
            f"{'':<10}{centre.mean():>8.1f}{np.median(centre):>8.1f}"
        )


if __name__ == "__main__":
    main()
