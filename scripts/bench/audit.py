#!/usr/bin/env python3
"""Does the audit find the true cause?  On models whose evidence was planted, in TRUTH and in phantoms trained here.

    scripts/bench/audit.py [--truth TRUTH] [--scans 12] [--only NAME ...] [--random SEEDS]

A row per model: what the audit flags, which map `choose` recommends without masks, how often that map's peak lies on
the evidence (within 0 mm) and how far off it is in the median, over the scans that hold evidence and are predicted
right; and the seconds it took, per scan.  With --random also: how often maps of random weights are trusted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from volsal import Explainer
from volsal.audit.choose import choose
from volsal.audit.localization import nearest_mm
from volsal.audit.metric import Undefined
from volsal.audit.probe import peak_of
from volsal.audit.run import audit
from volsal.audit.subject import subject_of
from volsal.config import AuditSection
from volsal.preprocess import as_preprocess
from volsal.scans.find import Case
from volsal.scans.labels import read_labels

ROOT = Path(__file__).parents[2]
KINDS = {"lesion": 1, "side": 1, "corner": 3}


def module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def of_truth(truth: Path) -> Iterator[tuple[str, Callable]]:
    code = module(truth / "models.py")
    for weights in sorted((truth / "models").glob("*.safetensors")):
        task = weights.stem.split("_")[1]

        def load(weights=weights, task=task):
            model = code.load(weights)[0]
            entries = json.loads((truth / task / "truth.json").read_text())["scans"]
            cases = [Case(e["id"], (truth / task / e["scan"],), label=str(e["label"])) for e in entries]
            masks = {e["id"]: truth / task / e["mask"] for e in entries}
            return Explainer(model, as_preprocess(code.preprocess), "grad-cam"), cases, masks, KINDS[task]

        yield weights.stem, load


def of_phantoms(folder: Path) -> Iterator[tuple[str, Callable]]:
    sys.path.insert(0, str(ROOT / "tests"))
    import planted

    for cue in planted.CUES:
        for kind, net in (("strided", planted.small_net), ("pooled", planted.pooled_net)):

            def load(cue=cue, net=net):
                clock = time.monotonic()
                model, accuracy = planted.trained(net(1), cue)
                print(f"   trained in {time.monotonic() - clock:.0f} s, accuracy {accuracy:.2f}", flush=True)
                found = planted.cases(folder, cue, 40, seed=5)
                masks = {case.id: Path(str(case.paths[0]).replace(".nii", "_mask.nii")) for case in found}
                return Explainer(model, None, "grad-cam"), found, masks, 1

            yield f"{kind}_{cue}", load


def judged(explainer: Explainer, method, cases: list[Case], masks: dict[str, Path], value: int) -> tuple[float, float]:
    """Of the map: share of peaks on the evidence, and median distance in mm; NaN where no scan holds any."""
    hits, far = [], []
    for case in cases:
        subject = subject_of(explainer, case)
        mask = read_labels(masks[case.id], subject.grid, subject.ready.scan) == value
        if not mask.any() or not subject.answer.startswith(f"class {case.label}"):
            continue
        values = subject.maps({"map": method})["map"]
        peak = values if isinstance(values, Undefined) else peak_of(values)
        if isinstance(peak, Undefined):
            hits.append(False)
            continue
        away = nearest_mm(subject.grid.world(peak[None]), subject.grid.world(np.argwhere(mask)))[0]
        hits.append(bool(mask[tuple(peak)]))
        far.append(float(away))
    return (float(np.mean(hits)), float(np.median(far))) if far else (np.nan, np.nan)


def row(name: str, load: Callable, scans: int) -> None:
    explainer, cases, masks, value = load()
    clock = time.monotonic()
    found = audit(explainer, cases, AuditSection(scans=scans))
    seconds = time.monotonic() - clock
    flags = [one for one in found.verdicts if one.verdict == "flagged"]
    choice = found.choice
    line = f"{name:<18}flagged: {', '.join(one.name for one in flags) or 'nothing'}; recommended: "
    line += f"{choice.recommended or 'none'}"
    if choice.recommended:
        hit, mm = judged(explainer, choice.method, cases[: 2 * scans], masks, value)
        line += f" ({', '.join(choice.candidates[0].answers)}; on the evidence {hit:.2f}, {mm:.1f} mm)"
    own = next(one for one in found.verdicts if one.name == "trust: grad-cam")
    print(f"{line}; grad-cam {own.verdict}; {seconds:.0f} s, {seconds / len(found.records):.1f} a scan", flush=True)
    for one in flags:
        print(f"   {one.name}: {one.words}", flush=True)


def random_weights(seeds: int, scans: int, truth: Path) -> None:
    code = module(truth / "models.py")
    trusted = 0
    for seed in range(seeds):
        arch, task = (("plain", "corner"), ("resnet", "lesion"))[seed % 2]
        torch.manual_seed(seed)
        explainer = Explainer(code.build(arch).eval(), as_preprocess(code.preprocess), "grad-cam")
        entries = json.loads((truth / task / "truth.json").read_text())["scans"]
        cases = [Case(e["id"], (truth / task / e["scan"],), label=str(e["label"])) for e in entries]
        trusted += choose(explainer, cases, scans=scans).recommended is not None
        print(f"random weights: {trusted} of {seed + 1} trusted", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", type=Path, default=ROOT.parent / "shared" / "truth")
    parser.add_argument("--scans", type=int, default=12)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--random", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        models = [*(of_truth(arguments.truth) if arguments.truth.is_dir() else ()), *of_phantoms(Path(place))]
        for name, load in models:
            if arguments.only is None or name in arguments.only:
                row(name, load, arguments.scans)
    if arguments.random:
        random_weights(arguments.random, arguments.scans, arguments.truth)


if __name__ == "__main__":
    main()
