"""``volsal demo``: the whole trip, from scans to overlays, on lesions whose places are known."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import yaml

from volsal.batch import Outcome, Run
from volsal.config import load_config
from volsal.demo.cohort import write_cohort
from volsal.demo.net import CLASSES, PREPROCESS
from volsal.errors import VolsalError
from volsal.scans import read_scan
from volsal.scans.write import replacing, require_writable

Say = Callable[[str], None]
# One gradient or activation map for each question; what needs a pass for every place would take minutes.
METHODS = ("grad-cam", "hires-cam", "guided-backprop", "guided-grad-cam", "input-gradient")


class DemoError(VolsalError, RuntimeError):
    """A scan of the demo could not be explained: the installation is at fault, not the user."""


def run_demo(folder: Path, train: bool, say: Say, watch: Callable[[Run], Iterable[Outcome]] = Run.execute) -> None:
    """Make the cohort, explain it, measure each map against the truth, and leave everything in ``folder``.

    Parameters
    ----------
    folder : gets ``scans/``, ``truth.json``, ``demo.yaml``, ``results/`` and ``demo.png``
    train : train the network anew instead of taking the weights that volsal ships
    say : prints a line
    watch : drives the run, e.g. with a progress bar around ``run.execute()``
    """
    clock = time.monotonic()
    require_writable(folder)
    say("A real head MRI (shipped with nibabel) with lesions planted at known places, stored in eight different ways.")
    scans = write_cohort(folder / "scans")
    weights = _trained(folder, say) if train else Path(str(files("volsal.demo") / "weights.safetensors"))
    config = folder / "demo.yaml"
    with replacing(config) as temporary:
        temporary.write_text(_config(weights), encoding="utf-8")
    run = Run(load_config(config))
    outcomes = list(watch(run))
    for outcome in outcomes:
        if outcome.error:
            raise DemoError(f"{outcome.scan}: {outcome.error}")
    run.collect()
    truth = json.loads((folder / "scans" / "truth.json").read_text())
    outcomes.sort(key=lambda outcome: outcome.case)
    cases = [_Case(run, outcome, truth[outcome.scan.name]) for outcome in outcomes]
    for line in _report(cases):
        say(line)
    picture = folder / "demo.png"
    _montage(cases, picture)
    say(f"\n{len(scans)} scans explained by {len(METHODS)} methods in {time.monotonic() - clock:.0f} s.  Open next:")
    case = cases[0]
    overlay = case.folder / case.entry("grad-cam")["file"]
    say(f"  {picture}  (all of them at a glance)")
    say(f"  volsal view {case.folder}  (napari, if installed)")
    say(f"  any viewer: {case.outcome.scan} with {overlay} over it")
    say(f"  volsal run {config}  (the same again, from its config: change it and see)")


def _trained(folder: Path, say: Say) -> Path:
    from volsal.demo.train import train

    say("Training the demo's network anew; on two cores this takes about five minutes.")
    train(folder / "network", say=say)
    return folder / "network" / "weights.safetensors"


def _config(weights: Path) -> str:
    content = {
        "model": {
            "factory": "volsal.demo.net:build",
            "weights": str(weights.resolve()),
            "classes": list(CLASSES),
        },
        "preprocess": PREPROCESS,
        "methods": list(METHODS),
        "targets": ["lesion"],
        "scans": {"folder": "scans"},
        "output": "results",
    }
    head = "# Made by `volsal demo`.  Run it again with: volsal run demo.yaml\n"
    return head + yaml.safe_dump(content, sort_keys=False)


class _Case:
    """One explained scan of the cohort beside its truth."""

    def __init__(self, run: Run, outcome: Outcome, truth: dict[str, Any]) -> None:
        self.outcome = outcome
        self.truth = truth
        self.folder = run.folder / outcome.case
        self.record = cast("dict[str, Any]", run.folder.record(outcome.case))

    @property
    def has_lesion(self) -> bool:
        return bool(self.truth["label"])

    @property
    def right(self) -> bool:
        return self.record["prediction"]["class"] == self.truth["label"]

    def entry(self, method: str) -> dict[str, Any]:
        """What ``case.json`` says of a method's map."""
        return next(entry for entry in self.record["maps"] if entry["method"] == method)

    def miss_mm(self, method: str) -> float:
        """Distance from the written map's largest voxel to the lesion's centre; read back from disk by nibabel."""
        image = cast(Any, nib.load(self.folder / self.entry(method)["file"]))
        values = np.asanyarray(image.dataobj)
        peak = nib.affines.apply_affine(image.affine, np.unravel_index(values.argmax(), values.shape))
        return float(np.linalg.norm(peak - np.array(self.truth["center_mm"])))


def _report(cases: list[_Case]) -> Iterable[str]:
    """The table that the demo is for."""
    shown = [case for case in cases if case.has_lesion]
    yield "\nHow far each method's peak lies from the middle of the planted lesion, mm:\n"
    yield f"{'case':<9}{'stored as':<34}{'prediction':<12}" + "".join(f"{method:>17}" for method in METHODS)
    for case in cases:
        spacing = " x ".join(f"{mm:.2g}" for mm in case.truth["spacing_mm"])
        stored = f"{case.truth['orientation']} {spacing} mm"
        tilt = case.truth["obliquity_degrees"]
        stored += f", {tilt:.0f} deg" if tilt > 0.5 else ""
        said = case.record["prediction"]["class_name"] + ("" if case.right else " (!)")
        misses = [f"{case.miss_mm(method):>17.1f}" if case.has_lesion else f"{'-':>17}" for method in METHODS]
        yield f"{case.outcome.case:<9}{stored:<34}{said:<12}" + "".join(misses)
    means = [np.mean([case.miss_mm(method) for case in shown]) for method in METHODS]
    yield f"{'mean':<55}" + "".join(f"{mean:>17.1f}" for mean in means)
    size = 2 * np.mean([case.truth["radii_mm"] for case in shown])
    cell = max(cases[0].entry("grad-cam")["cell_mm"])
    yield (
        f"\nThe lesions measure about {size:.0f} mm across, the cells of the layer behind Grad-CAM and HiResCAM "
        f"({cases[0].entry('grad-cam')['layer']}) {cell:.0f} mm."
    )
    yield (
        "Scans without a lesion have no truth to miss.  Their maps are faint on the scale that the picture gives all "
        "scans of a column; each stretched to its own maximum, they would look just as sure."
    )


def _montage(cases: list[_Case], path: Path) -> None:
    from volsal.report.figures import Row, montage

    # One scale for a method's whole column: a scan without evidence must not be stretched to look like one with it.
    top = {method: float(np.median([case.entry(method)["window"][1] for case in cases])) for method in METHODS}
    rows = []
    for case in cases:
        maps = [
            (method, read_scan(case.folder / case.entry(method)["file"]).array, (0.0, top[method]))
            for method in METHODS
        ]
        stored = f"{case.truth['orientation']}, {case.record['prediction']['class_name']}"
        rows.append(Row(case.outcome.case, read_scan(case.outcome.scan), maps, case.truth["center_mm"], stored))
    montage(rows, path)
