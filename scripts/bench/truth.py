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


def measure(image: nib.Nifti1Image, value: int, peak: np.ndarray) -> tuple[bool, float, float]:
    """Whether the peak (mm) lies in the mask, its distance to the nearest mask voxel and to the mask's centroid."""
    mask = np.asanyarray(image.dataobj) == value
    points = nib.affines.apply_affine(image.affine, np.argwhere(mask))
    voxel = np.rint(nib.affines.apply_affine(np.linalg.inv(image.affine), peak)).astype(int)
    hit = bool(mask[tuple(voxel)])
    near = 0.0 if hit else float(np.linalg.norm(points - peak, axis=1).min())
    return hit, near, float(np.linalg.norm(points.mean(0) - peak))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path)
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args()
    truth = json.loads((arguments.task / "truth.json").read_text())
    entries = {entry["id"]: entry for entry in truth["scans"]}
    found: dict[tuple[str, str, str], list[tuple[bool, float, float]]] = defaultdict(list)
    used = 0
    for record in sorted(arguments.run.glob("*/case.json")):
        content = json.loads(record.read_text())
        entry = entries[content["case"]]
        value = KINDS[arguments.task.name]
        image = nib.load(arguments.task / "masks" / f"{content['case']}_truth.nii.gz")
        wants_evidence = entry["label"] == 1 or arguments.task.name == "side"
        holds_evidence = bool((np.asanyarray(image.dataobj) == value).any())
        if not (wants_evidence and holds_evidence) or content["prediction"]["class"] != entry["label"]:
            continue
        used += 1
        for one in content["maps"]:
            if one["peak_mm"] is not None:
                key = one["method"], one["target"], one["layer"] or "input"
                found[key].append(measure(image, value, np.array(one["peak_mm"])))
    print(f"{used} scans with evidence, predicted right\n")
    print(f"{'method':<17}{'target':<17}{'layer':<10}{'hit':>6}  {'mm to mask: mean, median':<26}mm to centroid")
    for (method, target, layer), pairs in sorted(found.items()):
        hits, near, centre = np.array(pairs, dtype=float).T
        print(
            f"{method:<17}{target:<17}{layer:<10}{hits.mean():>6.2f}  {near.mean():>8.1f}{np.median(near):>8.1f}"
            f"{'':<10}{centre.mean():>8.1f}{np.median(centre):>8.1f}"
        )


if __name__ == "__main__":
    main()
