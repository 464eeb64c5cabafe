"""The audit of a model on its scans: every verdict with its rule, and the figures it rests on.

``audit.json``, written whole or not at all:

=================  ===================================================================================================
``version``        of this layout
``verdicts``       a list of ``{name, verdict, rule, words, figures}``, the most important first; ``verdict`` is one of
                   the words of :mod:`volsal.audit.trust` and :mod:`volsal.audit.verdicts`
``metrics``        by method and then by name ``{value, low, high, n, patients, undefined, reasons}``: the statistic
                   over scans with its 95 % bootstrap interval over patients, over how many scans, how many have no
                   figure, and why.  ``null: NAME`` stands beside a figure that has nulls
``suspicious``     a list of ``{case, reason, weight}``, the heaviest first; weight in spreads of the score over scans
``choice``         what `volsal choose` would say (:meth:`volsal.audit.choose.Choice.describe`); null where not asked
``map``            the method whose map says where to look for shortcuts
``cases``          the scans that the figures are of; ``skipped``: why others could not be used, by case
``answers``        how many scans the model gave each answer
``cohort``         files with mean, variance and number of scans of the map, by answer; or ``none``: why
``settings``       of the audit, with every threshold; ``environment``, ``weights_sha256``, ``target``, ``seconds``
=================  ===================================================================================================

``<case>/audit.json`` holds one scan's figures (:mod:`volsal.audit.examine`) with the ``key`` of all that they depend
on: while that stays, they are not computed again.  ``audit.csv`` has a row for each scan and method.
"""

from __future__ import annotations

import csv
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from volsal.attribution import Method, target_id
from volsal.audit.choose import Choice, choose, sampled, twin_of
from volsal.audit.examine import REPORTED, Deep, deepen, examine, figure
from volsal.audit.group_maps import group_maps
from volsal.audit.metric import Figure
from volsal.audit.statistics import summarise
from volsal.audit.subject import Subject, subject_of
from volsal.audit.trust import TRUSTED, answers_alike, judge, scaled
from volsal.audit.verdicts import (
    Evidence,
    Suspicion,
    Verdict,
    described,
    group_differences,
    of_brightness,
    of_fixed,
    of_masks,
    of_regions,
    of_trust,
    trust_rule,
)
from volsal.choices import SettingsError
from volsal.config import AuditSection
from volsal.errors import VolsalError
from volsal.explain import Explainer, environment
from volsal.run_folder import safe_cell
from volsal.scans.find import Case
from volsal.scans.labels import read_labels
from volsal.scans.scan import file_digest
from volsal.scans.write import replacing

VERSION = 1
FILE, TABLE = "audit.json", "audit.csv"
# Group columns that usually say whose scan it is.
_PATIENT = ("patient", "patient_id", "subject", "subject_id", "participant_id")
_CHOICE_SCANS = 12

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` found; see the module's words on ``audit.json``."""

    verdicts: tuple[Verdict, ...]
    metrics: dict[str, dict[str, Any]]
    suspicious: tuple[Suspicion, ...]
    records: tuple[dict[str, Any], ...]
    choice: Choice | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def verdict(self, name: str) -> Verdict:
        """The verdict of that name; KeyError where there is none."""
        return {one.name: one for one in self.verdicts}[name]

    def describe(self) -> dict[str, Any]:
        """As ``audit.json`` holds it."""
        return {
            "version": VERSION,
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "metrics": self.metrics,
            "suspicious": [asdict(one) for one in self.suspicious],
            **self.about,
        }

    def write(self, folder: Path) -> Path:
        """Write ``audit.json`` and ``audit.csv``; return the former's path."""
        _write(folder / FILE, self.describe())
        with replacing(folder / TABLE) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            for row in _rows(self.records):
                writer.writerow([safe_cell(cell) for cell in row])
        return folder / FILE


def audit(
    explainer: Explainer,
    cases: Iterable[Case],
    settings: AuditSection | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
    **reading: Any,
) -> Audit:
    """Put the explainer's maps, and its model, to the audit.

    Parameters
    ----------
    explainer : its methods are judged; its first target is what is explained
    cases : with masks, label and groups where they are known
    folder : the run folder, in which each case's figures are kept as they come; None: nothing is written
    reading : as for :func:`volsal.scans.read_case`

    Raises
    ------
    SettingsError
        Where no scan can be used.
    """
    clock = time.monotonic()
    settings = settings or AuditSection.model_validate({})
    chosen = sampled(list(cases), settings.scans)
    own = dict(zip(explainer.names, explainer.methods, strict=True))
    choice, best = None, None
    if settings.candidates:
        choice = choose(explainer, chosen, settings=settings, scans=_CHOICE_SCANS, progress=progress, **reading)
        best = choice.recommended or choice.candidates[0].method
    methods = own if choice is None or best in own else {**own, str(best): choice.tried[str(best)]}
    records, skipped = _examined(explainer, chosen, methods, settings, folder, progress, reading)
    if not records:
        raise SettingsError(f"no scan can be audited: {'; '.join(dict.fromkeys(skipped.values())) or 'there is none'}")
    by_case = {case.id: case for case in chosen}
    patients = _patients(chosen, settings)
    target = explainer.targets[0]
    trust = judge(records, settings, target, patients)
    best = best or _strongest(trust, list(methods))
    evidence = Evidence.of(records, best, settings, target, patients)
    regions, suspicious = of_regions(evidence)
    about = {
        "map": best,
        "choice": choice.describe() if choice else None,
        "cases": [record["case"] for record in records],
        "skipped": skipped,
        "answers": dict(Counter(record["answer"] for record in records)),
        "cohort": group_maps(explainer, by_case, records, best, methods[best], folder, settings.min_scans, **reading)
        if folder
        else {"none": "nothing is written"},
        "settings": settings.model_dump(),
        "target": target_id(target),
        "weights_sha256": explainer.weights_sha256,
        "environment": environment(),
        "seconds": round(time.monotonic() - clock, 1),
    }
    verdicts = [
        *_of_model(records, settings),
        *([_of_choice(choice, settings)] if choice else []),
        *of_trust(trust, settings),
        *regions,
        of_fixed(evidence),
        of_brightness(evidence),
        *of_masks(evidence),
        group_differences(evidence, _groups(records, by_case, settings)),
    ]
    metrics = _metrics(evidence, list(methods))
    found = Audit(tuple(verdicts), metrics, tuple(suspicious), tuple(records), choice, about)
    if folder is not None:
        found.write(folder)
    return found


def _of_model(records: Sequence[Mapping[str, Any]], settings: AuditSection) -> list[Verdict]:
    """That no map of this model can be trusted, where its answers do not differ; nothing else."""
    alike = answers_alike(records, settings)
    rule = f"given where the log odds spread by less than {2 * settings.min_change:g} over scans"
    return [Verdict("the model", "answers all scans alike", rule, alike, {})] if alike else []


def _of_choice(choice: Choice, settings: AuditSection) -> Verdict:
    rule = (
        "of the maps that are trusted by the rule below the one at whose peaks the score moves most, chosen on "
        f"{choice.scans} scans without masks; {trust_rule(settings)}"
    )
    scores = {one.method: figure_or_none(one.score) for one in choice.candidates}
    return Verdict("recommended map", choice.recommended or "none", rule, ". ".join(choice.words), {"scores": scores})


def figure_or_none(value: Figure) -> float | None:
    """A figure as plain data; None where undefined."""
    return value if isinstance(value, float) else None


def _strongest(trust: Sequence[Any], names: Sequence[str]) -> str:
    """The method that says where to look, where none was chosen: a trusted one, by the scans whose score moves."""
    return max(names, key=lambda name: max((o.verdict == TRUSTED, o.moved) for o in trust if o.method == name))


# ---- the scans


def _examined(
    explainer: Explainer,
    cases: Sequence[Case],
    methods: Mapping[str, Method],
    settings: AuditSection,
    folder: Path | None,
    progress: Progress | None,
    reading: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Each case's figures, from the run folder where it has them, and why others have none."""
    records: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    twin: list[nn.Module] = []
    for number, case in enumerate(cases):
        deep = number < settings.checked
        try:
            key = _key(explainer, case, methods, settings, deep, number, reading)
            place = folder / case.id / FILE if folder else None
            record = _kept(place, key)
            if record is None:
                subject = subject_of(explainer, case, **reading)
                record = examine(subject, methods, settings, _labels(case, subject), seed=number)
                if deep:
                    twin = twin or [twin_of(explainer.model, explainer.at_once(subject.volume))]
                    deepen(record["methods"], subject, methods, Deep(twin[0], tuple(methods)), settings)
                if place:
                    _write(place, {"key": key, **record})
            records.append(record)
        except VolsalError as error:
            skipped[case.id] = str(error)
        if progress:
            progress("audit", number + 1, len(cases))
    return records, skipped


def _labels(case: Case, subject: Subject) -> dict[str, Any]:
    return {name: read_labels(path, subject.grid, subject.ready.scan) for name, path in case.masks.items()}


def _key(
    explainer: Explainer,
    case: Case,
    methods: Mapping[str, Method],
    settings: AuditSection,
    deep: bool,
    number: int,
    reading: Mapping[str, Any],
) -> str:
    """Of all that a case's figures depend on; thresholds of the verdicts are no part of it."""
    asked = ("radius_mm", "blur_mm", "controls", "tolerance_mm", "body_margin_mm", "border_mm")
    content = {
        "version": VERSION,
        "weights": explainer.weights_sha256,
        "preprocess": repr(explainer.preprocess),
        "target": repr(explainer.targets[0]),
        "methods": {name: repr(method) for name, method in methods.items()},
        "alignment": explainer.align.id,
        "classes": explainer.classes,
        "windows": repr(explainer.windows),
        "settings": {name: getattr(settings, name) for name in asked},
        "deep": deep,
        "seed": number,
        "reading": repr(sorted(reading.items())),
        "files": [file_digest(path) for path in (*case.paths, *case.masks.values())],
    }
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _kept(place: Path | None, key: str) -> dict[str, Any] | None:
    try:
        content = json.loads(place.read_text(encoding="utf-8")) if place else None
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(content, dict) or content.pop("key", None) != key:
        return None
    return content


def _patients(cases: Sequence[Case], settings: AuditSection) -> dict[str, str]:
    columns = [settings.patient] if settings.patient else _PATIENT
    return {case.id: next((case.groups[c] for c in columns if case.groups.get(c)), case.id) for case in cases}


def _groups(
    records: Sequence[Mapping[str, Any]], cases: Mapping[str, Case], settings: AuditSection
) -> dict[str, dict[str, str]]:
    """By column, the cases' values: their groups, their label, and whether the model is right, where that is known."""
    own = {settings.patient, *_PATIENT}
    columns = dict.fromkeys(c for record in records for c in cases[record["case"]].groups if c not in own)
    found: dict[str, dict[str, str]] = {
        column: {r["case"]: value for r in records if (value := cases[r["case"]].groups.get(column))}
        for column in columns
    }
    labels = {r["case"]: str(label) for r in records if (label := cases[r["case"]].label) is not None}
    if labels:
        found["label"] = labels
        right = {r["case"]: _right(r["answer"], labels[r["case"]]) for r in records if r["case"] in labels}
        found["answer"] = {case: value for case, value in right.items() if value}
    return found


def _right(answer: str, label: str) -> str:
    """``right`` or ``wrong``; nothing where the answer is no class."""
    if not answer.startswith("class "):
        return ""
    index, _, name = answer.removeprefix("class ").partition(" ")
    return "right" if label in (index, name.strip("()")) else "wrong"


# ---- the figures


def _metrics(evidence: Evidence, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    records, owners = evidence.records, evidence.owners(evidence.records)
    found: dict[str, dict[str, Any]] = {}
    for name in methods:
        each = [record["methods"].get(name, {}) for record in records]
        figures: dict[str, list[Figure]] = {
            "effect at the peak, spreads": [scaled(record, name, evidence.spread) for record in records],
            "top Dice with random weights": [figure(one.get("sanity", {}).get("top_dice")) for one in each],
            "peak stays, share": [figure(one.get("stability", {}).get("kept")) for one in each],
            "delta AUPC": [figure(one.get("deletion")) for one in each],
        }
        for region in dict.fromkeys(region for one in each for region in one.get("regions", {})):
            shares = [one.get("regions", {}).get(region, {}) for one in each]
            figures[f"density {region}"] = [figure(share.get("density")) for share in shares]
        found[name] = {key: described(summarise(values, owners)) for key, values in figures.items()}
        found[name] |= _on_masks(records, each, owners)
        found[name] |= _anatomy(each, owners)
    return found


def _on_masks(
    records: Sequence[Mapping[str, Any]], each: Sequence[Mapping[str, Any]], owners: Sequence[str]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for mask in dict.fromkeys(mask for record in records for mask in record["masks"]):
        for metric in REPORTED:
            cells = [
                one.get("masks", {}).get(mask, {}).get(metric, {"value": {"undefined": "the scan has no such mask"}})
                for one in each
            ]
            found[f"{mask}: {metric}"] = described(summarise([figure(cell.get("value")) for cell in cells], owners))
            for null in ("smooth", "moved mask"):
                drawn = [figure(cell.get(null)) for cell in cells]
                found[f"{mask}: {metric}, null: {null}"] = described(summarise(drawn, owners))
    return found


def _anatomy(each: Sequence[Mapping[str, Any]], owners: Sequence[str]) -> dict[str, Any]:
    names = dict.fromkeys(
        (of, label) for one in each for of, labels in one.get("anatomy", {}).items() for label in labels
    )
    return {
        f"{of}: density in {label}": described(
            summarise(
                [figure(one.get("anatomy", {}).get(of, {}).get(label, {}).get("density")) for one in each], owners
            )
        )
        for of, label in names
    }


# ---- files

_COLUMNS = (
    "case", "answer", "score", "method", "peak_x_mm", "peak_y_mm", "peak_z_mm", "where", "effect", "largest_control",
    "p_value", "density_outside_body", "body_sure", "undefined",
)  # fmt: skip


def _rows(records: Sequence[Mapping[str, Any]]) -> Iterable[list[Any]]:
    for record in records:
        for name, one in record["methods"].items():
            start = [record["case"], record["answer"], f"{record['score']:.6g}", name]
            if "trial" not in one:
                yield [*start, *[""] * 8, record["body"]["sure"], one.get("undefined", "")]
                continue
            trial = one["trial"]
            density = one["regions"].get("outside the body", {}).get("density")
            yield [
                *start, *trial["mm"], one["where"], f"{trial['effect']:.6g}", f"{trial['control_largest']:.6g}",
                f"{trial['p_value']:.4g}", f"{density:.4g}" if isinstance(density, float) else "",
                record["body"]["sure"], "",
            ]  # fmt: skip


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=True, allow_nan=False) + "\n")
