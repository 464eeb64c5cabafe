#!/usr/bin/env python3
"""How far from the truth volsal's maps lie, over every way a NIfTI file can store one phantom.

    scripts/bench/orientations.py [ORIENT_DIR] [--every 1] [--chains none orientation ...] [--nets conv avg max]
                                  [--alignment measured] [--threads 2] [--worst 3]

ORIENT_DIR holds orient.py, which makes the phantom in 48 orientations x spacings x rotations (624 scans) and grades a
map in mm, and blobmodel.py, whose nets see one blob of it and nothing else.

The gradient of blobmodel.Net by its input is a mask, 0 or one value, and on voxels of 6 mm a mask's centroid is not
that of the blob; so for input maps its gate is squared, and the gradient grows with the blob.

Input maps: `input-gradient` behind each chain of preprocessing.  "spread": how far the located centroids of one
physical phantom lie apart over the orientations it is stored in, largest over all such groups, mm (from
their mean).  "moved": largest distance from the centroid of the method's own map, on the model's voxels, to that of the
overlay; what is left of the error is the net's and the model grid's own.
CAMs: `grad-cam` at the layer "features", without preprocessing, graded in cells of that layer.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from volsal import Explainer, GradCAM
from volsal.errors import VolsalError
from volsal.preprocess import MonaiSteps

HERE = Path(__file__).resolve()
TOOLS = HERE.parents[3] / "shared" / "tools"
RAS = {"Orientation": {"axcodes": "RAS"}}
TWO_MM = {"Spacing": {"pixdim": [2, 2, 2]}}
CHAINS: dict[str, list[Any]] = {
    "none": [],
    "orientation": [RAS],
    "spacing": [RAS, TWO_MM],
    "foreground": [RAS, TWO_MM, {"CropForeground": {"margin": 3}}],
    "pad-or-crop": [RAS, TWO_MM, {"ResizeWithPadOrCrop": {"spatial_size": [57, 48, 64]}}],
    "resize": [RAS, {"Resize": {"spatial_size": [51, 60, 56], "mode": "trilinear"}}],
    "resize-aligned": [RAS, {"Resize": {"spatial_size": [51, 60, 56], "mode": "trilinear", "align_corners": True}}],
    "flip-turn": [RAS, {"Flip": {"spatial_axis": [0, 2]}}, {"Rotate90": {"k": 1, "spatial_axes": [0, 1]}}],
    "zoom": [RAS, TWO_MM, {"Zoom": {"zoom": [1.3, 0.9, 1.1], "mode": "trilinear", "keep_size": False}}],
    "zoom-keep": [RAS, TWO_MM, {"Zoom": {"zoom": 1.2, "mode": "trilinear"}}],
    "oblique": [{"Spacing": {"pixdim": [2, 2.5, 1.5], "diagonal": True}}],
}


@dataclass(frozen=True)
class Row:
    """One graded map."""

    case: dict[str, Any]
    mm: float
    voxels: float  # largest over the axes
    found: np.ndarray
    moved: float  # mm, from where the method's own map has it to where the overlay has it


def grade(
    explainer: Explainer, cases: list[dict], home: Path, check: Callable, locate: Callable
) -> tuple[list[Row], list[str]]:
    """A row per case, and what was refused or could not be graded."""
    rows, failures = [], []
    for case in cases:
        try:
            answer = explainer(home / case["scan"], case="one")
        except VolsalError as error:
            failures.append(f"{case['id']}: {error}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = answer.save(folder) / answer.maps[0].file_name("one")
            result = check(path, home / case["scan"], case["target_mm"])
        broken = [why for why in result["why"] if not why.startswith("bright region is")]
        if broken or result["err_mm"] is None:
            failures.append(f"{case['id']}: {'; '.join(broken)}")
            continue
        voxels = float(np.abs(result["err_vox"]).max())
        found = np.array(result["found_mm"])
        own, _ = locate(answer.maps[0].raw, answer.maps[0].raw_grid.affine)
        rows.append(Row(case, result["err_mm"], voxels, found, float(np.linalg.norm(found - own))))
    return rows, failures


def physical(case: dict) -> tuple:
    """What is equal for scans that hold the same voxels in another order: rotation, and voxel size by world axis."""
    by_world = sorted(zip([next(n for n in range(3) if c in ("LR", "PA", "IS")[n]) for c in case["axcodes"]],
                          case["shape"], strict=True))  # fmt: skip
    return case["spacing"], case["rotation"], case["form"], tuple(by_world)


def spread(rows: list[Row]) -> float:
    groups = defaultdict(list)
    for row in rows:
        groups[physical(row.case)].append(row.found)
    return max(float(np.linalg.norm(np.array(g) - np.mean(g, axis=0), axis=1).max()) for g in groups.values())


def report(name: str, rows: list[Row], failures: list[str], size: float, worst: int) -> None:
    """``size``: voxels to one unit of the last two columns."""
    errors = [(row.mm, row.voxels / size) for row in rows] or [(np.nan, np.nan)]
    (mm, units), (most_mm, most_units) = np.median(errors, axis=0), np.max(errors, axis=0)
    apart = spread(rows) if rows else np.nan
    print(
        f"{name:<26}{len(rows):>6}{len(failures):>6}{mm:>10.3f}{most_mm:>10.3f}{units:>12.3f}{most_units:>10.3f}"
        f"{apart:>10.3f}{max((row.moved for row in rows), default=np.nan):>10.3f}",
        flush=True,
    )
    for row in sorted(rows, key=lambda row: -row.voxels)[:worst]:
        print(f"    {row.case['id']:<24} {row.mm:.3f} mm, {row.voxels:.3f} voxels")
    for failure in failures[:worst]:
        print(f"    {failure}")


def tools(folder: Path) -> tuple[ModuleType, ModuleType]:
    sys.path.insert(0, str(folder))
    return importlib.import_module("orient"), importlib.import_module("blobmodel")


def judges(orient: ModuleType, radius_mm: float) -> tuple[Callable, Callable]:
    """How a file is graded, and where an array has its centre; the window of the centroid in mm."""
    return partial(orient.check_heatmap, explain=False, radius_mm=radius_mm), partial(
        orient.locate, radius_mm=radius_mm
    )


def graded(net: type) -> type:
    """``net`` with its gate squared."""

    class Graded(net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.gate(x)) ** 2
            return self.fc(torch.relu(self.features(self.stages(x))).mean((2, 3, 4)))

    return Graded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="?", type=Path, default=TOOLS, metavar="ORIENT_DIR")
    parser.add_argument("--every", type=int, default=1, help="take each Nth case only")
    parser.add_argument("--chains", nargs="*", choices=CHAINS, default=list(CHAINS))
    parser.add_argument("--nets", nargs="*", choices=["conv", "avg", "max"], default=["conv", "avg", "max"])
    parser.add_argument("--levels", nargs="*", type=int, default=[2, 3])
    parser.add_argument("--alignment", default="auto", help="passed to volsal.Explainer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worst", type=int, default=0, help="name that many of the worst cases of each row")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    keywords = {"alignment": options.alignment}
    orient, blobmodel = tools(options.tools)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        cases = orient.make(folder, "full")[:: options.every]
        head = f"{'cases':>6}{'none':>6}{'median mm':>10}{'max mm':>10}"
        print(f"{'input-gradient':<26}{head}{'median vox':>12}{'max vox':>10}{'spread mm':>10}{'moved mm':>10}")
        for name in options.chains:
            explainer = Explainer(
                graded(blobmodel.Net)("conv", 2),
                MonaiSteps.from_config(CHAINS[name]),
                "input-gradient",
                "class-1",
                **keywords,
            )
            rows, failures = grade(explainer, cases, home, *judges(orient, 14.0))
            report(name, rows, failures, 1, options.worst)
        print(f"{'grad-cam':<26}{head}{'median cell':>12}{'max cell':>10}{'spread mm':>10}{'moved mm':>10}")
        for kind in options.nets:
            for levels in options.levels:
                method = GradCAM(layer="features")
                explainer = Explainer(blobmodel.Net(kind, levels), None, method, "class-1", **keywords)
                rows, failures = grade(explainer, cases, home, *judges(orient, 60.0))
                report(f"{kind}, {levels} levels", rows, failures, 2**levels, options.worst)


if __name__ == "__main__":
    main()
