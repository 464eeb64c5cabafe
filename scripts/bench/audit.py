#!/usr/bin/env python3
"""Does the audit find the true cause?  On models whose evidence was planted, in TRUTH and in phantoms trained here.

    scripts/bench/audit.py [--truth FOLDER] [--scans 32] [--seeds 1] [--only NAME ...] [--weights FOLDER] [--random 20]

A row per model: whether the audit names the true cause (or, of an honest model, none), what it flags, which map
`choose` recommends without masks, how often that map's peak lies on the evidence or within 6 mm of it and how far off
it is in the median, over the scans that hold small evidence and are predicted right, beside the best of all candidates;
and the seconds it took.  With --random also: how often maps of random weights are trusted.

Phantoms: three architectures, every cue of tests/planted.py, and as many seeds as asked; weights are kept in --weights.
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
CAUSES = {"lesion": None, "side": None, "corner": "outside the body"}
NEAR_MM = 6.0
# Only these lie in one small place, so that a peak can be on them or off.
SMALL = ("lesion", "side", "corner", "marker", "edge", "dot", "line")


def module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def of_truth(truth: Path) -> Iterator[tuple[str, str, str | None, Callable]]:
    code = module(truth / "models.py")
    for weights in sorted((truth / "models").glob("*.safetensors")):
        task = weights.stem.split("_")[1]

        def load(weights=weights, task=task):
            model = code.load(weights)[0]
            entries = json.loads((truth / task / "truth.json").read_text())["scans"]
            cases = [Case(e["id"], (truth / task / e["scan"],), label=str(e["label"])) for e in entries]
            masks = {e["id"]: truth / task / e["mask"] for e in entries}
            return Explainer(model, as_preprocess(code.preprocess), "grad-cam"), cases, masks, KINDS[task]

        yield weights.stem, task, CAUSES[task], load


def of_phantoms(folder: Path, weights: Path, seeds: int) -> Iterator[tuple[str, str, str | None, Callable]]:
    sys.path.insert(0, str(ROOT / "tests"))
    import planted

    for cue, cause in planted.CUES.items():
        for kind in planted.NETS:
            for seed in range(1, seeds + 1):

                def load(cue=cue, kind=kind, seed=seed):
                    model, accuracy = planted.kept(weights, kind, cue, seed)
                    found = planted.cases(folder, cue, 64, seed=5)
                    masks = {case.id: Path(str(case.paths[0]).replace(".nii", "_mask.nii")) for case in found}
                    print(f"   accuracy {accuracy:.2f}", flush=True)
                    return Explainer(model, None, "grad-cam"), found, masks, 1

                yield f"{kind}_{cue}_{seed}", cue, cause, load


def judged(explainer: Explainer, methods, cases: list[Case], masks: dict[str, Path], value: int, answers=()) -> dict:
    """By method: shares of peaks on the evidence and within 6 mm, and the median distance; nothing without evidence.

    Of scans that are answered rightly, and by one of ``answers``, if there are any.
    """
    far = {name: [] for name in methods}
    for case in cases:
        subject = subject_of(explainer, case)
        mask = read_labels(masks[case.id], subject.grid, subject.ready.scan) == value
        right = subject.answer.startswith(f"class {case.label}")
        if not mask.any() or not right or (answers and subject.answer not in answers):
            continue
        evidence = subject.grid.world(np.argwhere(mask))
        for name, values in subject.maps(methods).items():
            peak = values if isinstance(values, Undefined) else peak_of(values)
            lost = isinstance(peak, Undefined)
            far[name].append(np.inf if lost else nearest_mm(subject.grid.world(peak[None]), evidence))
    return {
        name: (float(np.mean(np.array(mm) == 0)), float(np.mean(np.array(mm) <= NEAR_MM)), float(np.median(mm)))
        for name, mm in far.items()
        if mm
    }


def row(name: str, task: str, cause: str | None, load: Callable, scans: int) -> tuple[bool, bool | None]:
    """Print it; whether the cause is named, and whether the recommended map is as good as asked (None: none can be)."""
    explainer, cases, masks, value = load()
    clock = time.monotonic()
    found = audit(explainer, cases, AuditSection(scans=scans))
    seconds = time.monotonic() - clock
    flags = [one for one in found.verdicts if one.verdict == "flagged"]
    named = not flags if cause is None else any(cause in one.name for one in flags)
    line = f"{name:<22}{'right' if named else 'WRONG'}: flagged: {', '.join(one.name for one in flags) or 'nothing'}"
    choice, good = found.choice, None
    line += f"; recommended: {choice.recommended or 'none'}"
    if task in SMALL:
        hits = judged(explainer, choice.tried, cases, masks, value)
        enough = [one for one, (_, near, mm) in hits.items() if near >= 0.9 and mm <= NEAR_MM]
        if choice.recommended in hits:
            hit, near, mm = hits[choice.recommended]
            line += f" (on the evidence {hit:.2f}, within 6 mm {near:.2f}, median {mm:.1f} mm"
            trusted, only = choice.candidates[0].answers, {choice.recommended: choice.tried[choice.recommended]}
            own = judged(explainer, only, cases, masks, value, trusted).get(choice.recommended)
            line += f"; of {', '.join(trusted)}, for which it is: {own[1]:.2f})" if own else ")"
        if enough:
            good = choice.recommended in enough
        if hits:  # else the model is right about none of those that hold evidence
            best = max(hits, key=lambda one: hits[one][1])
            line += f"; best of the candidates: {best} {hits[best][0]:.2f}, {hits[best][1]:.2f}"
    print(f"{line}; {seconds:.0f} s for {len(found.records)} scans", flush=True)
    for one in flags:
        print(f"   {one.name}: {one.words}", flush=True)
    return named, good


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
    parser.add_argument("--scans", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--weights", type=Path, default=Path(tempfile.gettempdir()) / "volsal-planted")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--random", type=int, default=0)
    arguments = parser.parse_args()
    if not (arguments.truth / "models.py").is_file():
        parser.error(
            f"--truth {arguments.truth}: no models.py there; name the folder of models whose evidence is known"
        )
    arguments.weights.mkdir(parents=True, exist_ok=True)
    found = []
    with tempfile.TemporaryDirectory() as place:
        models = [
            *of_truth(arguments.truth),
            *of_phantoms(Path(place), arguments.weights, arguments.seeds),
        ]
        for name, task, cause, load in models:
            if arguments.only is None or name in arguments.only or task in arguments.only:
                found.append((cause, *row(name, task, cause, load, arguments.scans)))
    if not found:
        parser.error(f"--only {' '.join(arguments.only)}: no model or task is called that")
    honest, false = [named for cause, named, _ in found if cause is None], [n for c, n, _ in found if c is not None]
    asked = [good for *_, good in found if good is not None]
    print(
        f"honest models without a flag: {sum(honest)} of {len(honest)}; causes named: {sum(false)} of {len(false)}; "
        f"recommended map within 6 mm in 90 % wherever a candidate is: {sum(asked)} of {len(asked)}"
    )
    if arguments.random:
        random_weights(arguments.random, arguments.scans, arguments.truth)


if __name__ == "__main__":
    main()
