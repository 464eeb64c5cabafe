"""The audit of a model on its scans: every verdict with its rule, and the figures it rests on.

``audit.json``, written whole or not at all:

=================  ===================================================================================================
``version``        of this layout
``verdicts``       a list of ``{name, verdict, rule, words, figures, part}``, the most important first; ``verdict`` is
                   one of the words of :mod:`volsal.audit.trust`, :mod:`volsal.audit.verdicts` and
                   :mod:`volsal.audit.check_verdicts`
``metrics``        by method and then by name ``{value, low, high, n, patients, undefined, reasons, nulls}``: the
                   statistic over scans with its 95 % bootstrap interval over patients, over how many scans, how many
                   have no figure, and why; ``nulls``: by name the same of maps that know nothing
``suspicious``     a list of ``{case, reason, weight}``, the heaviest first; weight in spreads of the score over scans
``choice``         what `volsal choose` would say (:meth:`volsal.audit.choose.Choice.describe`); null where not asked
``map``            the method whose map says where to look for shortcuts
``cases``          the scans that the figures are of; ``skipped``: why others could not be used, by case
``answers``        how many scans the model gave each answer
``cohort``         mean maps of groups of scans: see :func:`volsal.audit.group_maps.group_maps`
``settings``       of the audit, with every threshold; ``environment``, ``weights_sha256``, ``target``, ``seconds``
``parts``          the parts of the audit with their headings in CLAIM, TRIPOD+AI and FUTURE-AI; ``limits``: what no
                   audit tells (:mod:`volsal.audit.standards`)
``further``        of each further target of the explainer the same again; the first is the audit's own
=================  ===================================================================================================

``<case>/audit.json`` holds one scan's figures (:mod:`volsal.audit.examine`) with the ``key`` of all that they depend
on: while that stays, they are not computed again; ``<case>/audit-TARGET.json`` those of a further target.
``audit.csv`` has a row for each scan, method and target.
"""

from __future__ import annotations

import copy
import csv
import inspect
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from volsal.attribution import Method, target_id
from volsal.attribution.settings import SettingError
from volsal.audit.check_verdicts import of_agreement, of_checks, remarks_of
from volsal.audit.checks import agreement_of, check, deepen
from volsal.audit.choose import Choice, choose, sampled, twin_of
from volsal.audit.examine import examine
from volsal.audit.exchange import exchange, of_exchange
from volsal.audit.figures import metrics_of
from volsal.audit.group_maps import group_maps
from volsal.audit.metric import Figure, Undefined
from volsal.audit.patients import patients_of
from volsal.audit.standards import GROUPS, LIMITS, PLACE, SHORTCUTS, TRUST
from volsal.audit.standards import described as parts_described
from volsal.audit.subject import Subject, subject_of
from volsal.audit.trust import PEAK, TRUSTED, Trust, answers_alike, judge
from volsal.audit.verdicts import (
    Evidence,
    Suspicion,
    Verdict,
    group_differences,
    of_masks,
    of_regions,
    of_trust,
    trust_rule,
)
from volsal.config import AuditSection
from volsal.environment import environment
from volsal.errors import VolsalError
from volsal.explain import Explainer
from volsal.models import weights_digest
from volsal.models.load import with_weights
from volsal.run_folder import safe_cell
from volsal.scans.find import Case
from volsal.scans.labels import read_labels
from volsal.scans.scan import Scan, file_digest, read_scan
from volsal.scans.write import replacing

VERSION = 3
FILE, TABLE = "audit.json", "audit.csv"
_CHOICE_SCANS = 24
_LIBRARIES = ("torch", "monai", "volsal")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` found of one target; see the module's words on ``audit.json``.

    ``further`` is what it found of the explainer's further targets.
    """

    verdicts: tuple[Verdict, ...]
    metrics: dict[str, dict[str, Any]]
    suspicious: tuple[Suspicion, ...]
    records: tuple[dict[str, Any], ...]
    choice: Choice | None = None
    about: dict[str, Any] = field(default_factory=dict)
    further: tuple[Audit, ...] = ()

    def verdict(self, name: str) -> Verdict:
        """The verdict of that name; KeyError where there is none."""
        return {one.name: one for one in self.verdicts}[name]

    def describe(self) -> dict[str, Any]:
        """As ``audit.json`` holds it."""
        return {
            "version": VERSION,
            **self._own(),
            "parts": parts_described(),
            "limits": list(LIMITS),
            "further": [one._own() for one in self.further],
        }

    def _own(self) -> dict[str, Any]:
        return {
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
            for one in (self, *self.further):
                for row in _rows(one.records, str(one.about.get("target", ""))):
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
    explainer : its methods are judged, for each of its targets; relative paths in ``settings`` start from its folder
    cases : with masks, label, groups and the model's further inputs where they are known
    folder : the run folder, in which each case's figures are kept as they come; None: nothing is written
    reading : as for :func:`volsal.scans.read_case`

    Raises
    ------
    SettingError
        Where no scan can be used.
    ModelError, ScanError
        Where the weights of random labels, or the template, cannot be read.
    """
    settings = settings or AuditSection.model_validate({})
    chosen = sampled(list(cases), settings.scans)
    shuffled = None
    if settings.random_labels:
        shuffled = with_weights(explainer.model, Path(settings.random_labels).expanduser(), explainer.folder)
    template = read_scan(explainer.folder / Path(settings.template).expanduser()) if settings.template else None
    found = []
    for number, target in enumerate(explainer.targets):
        asked = copy.copy(explainer)
        asked.targets = [target]
        place = _Place(folder, f"-{target_id(target)}" if number else "")
        found.append(_Asked(asked, chosen, settings, place, progress, reading, shuffled, template).audit())
    whole = replace(found[0], further=tuple(found[1:]))
    if folder is not None:
        whole.write(folder)
    return whole


# By method the answers for which its peaks are trusted.
ByPeak = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class _Place:
    """Where the figures of one target go, if anywhere; ``mark`` tells a further target's files."""

    folder: Path | None
    mark: str

    def of(self, case: str) -> Path | None:
        return self.folder / case / FILE.replace(".", f"{self.mark}.") if self.folder else None


@dataclass(frozen=True)
class _Asked:
    """An audit of one target: its explainer has that alone."""

    explainer: Explainer
    cases: Sequence[Case]
    settings: AuditSection
    place: _Place
    progress: Progress | None
    reading: Mapping[str, Any]
    shuffled: nn.Module | None
    template: Scan | None

    def audit(self) -> Audit:
        clock = time.monotonic()
        explainer, settings = self.explainer, self.settings
        choice, best, methods = self._chosen()
        candidates = choice.tried if choice else methods
        records, skipped = self._examined(methods, candidates, choice.by_peak if choice else {})
        if not records:
            raise SettingError(
                f"no scan can be audited: {'; '.join(dict.fromkeys(skipped.values())) or 'there is none'}"
            )
        by_case = {case.id: case for case in self.cases}
        patients = patients_of(self.cases)
        target = explainer.targets[0]
        trust = judge(records, settings, target, patients)
        best = best or _strongest(trust, list(methods))
        evidence = Evidence.of(records, best, settings, target, patients)
        checks = of_checks(evidence, list(methods))
        regions, suspicious = of_regions(evidence)
        groups = _groups(records, by_case)
        parts = {
            TRUST: [
                *_of_model(records, settings),
                *([_of_choice(choice, settings)] if choice else []),
                *of_trust(trust, settings, remarks_of(checks)),
                *checks,
                *of_agreement(evidence),
            ],
            SHORTCUTS: [
                *regions,
                *of_exchange(self._exchanges(), settings, patients, answers_alike(records, settings)),
            ],
            PLACE: of_masks(evidence),
            GROUPS: [group_differences(evidence, groups)],
        }
        verdicts = [replace(one, part=part) for part, of in parts.items() for one in of]
        about = {
            "map": best,
            "choice": choice.describe() if choice else None,
            "cases": [record["case"] for record in records],
            "skipped": skipped,
            "answers": dict(Counter(record["answer"] for record in records)),
            "cohort": self._cohort(records, by_case, groups, best, methods[best]),
            "settings": settings.model_dump(),
            "target": target_id(target),
            "weights_sha256": explainer.weights_sha256,
            "environment": environment(),
            "seconds": round(time.monotonic() - clock, 1),
        }
        metrics = metrics_of(evidence, list(methods))
        return Audit(tuple(verdicts), metrics, tuple(suspicious), tuple(records), choice, about)

    def _chosen(self) -> tuple[Choice | None, str | None, dict[str, Method]]:
        """What was chosen among the candidates, and the methods that are audited: the explainer's own and that."""
        explainer, settings = self.explainer, self.settings
        own = dict(zip(explainer.names, explainer.methods, strict=True))
        if not settings.candidates:
            return None, None, own
        choice = choose(
            explainer, self.cases, settings=settings, scans=_CHOICE_SCANS, progress=self.progress, **self.reading
        )
        best = choice.recommended or choice.candidates[0].method
        return choice, best, own if best in own else {**own, best: choice.tried[best]}

    def _cohort(
        self,
        records: Sequence[Mapping[str, Any]],
        cases: Mapping[str, Case],
        groups: Mapping[str, Mapping[str, str]],
        name: str,
        method: Method,
    ) -> dict[str, Any]:
        if self.place.folder is None:
            return {"none": "nothing is written"}
        answers = {str(record["case"]): str(record["answer"]) for record in records}
        return group_maps(
            self.explainer, cases, {"the model says": answers, **groups}, f"{name}{self.place.mark}", method,
            self.place.folder, self.settings, self.template, **self.reading,
        )  # fmt: skip

    # ---- the scans

    def _examined(
        self, methods: Mapping[str, Method], candidates: Mapping[str, Method], by_peak: ByPeak
    ) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Each case's figures, from the run folder where it has them, and why others have none."""
        records: list[dict[str, Any]] = []
        skipped: dict[str, str] = {}
        for number, case in enumerate(self.cases):
            try:
                records.append(self._record(number, methods, candidates, by_peak))
            except VolsalError as error:
                skipped[case.id] = str(error)
            if self.progress:
                self.progress("audit", number + 1, len(self.cases))
        return records, skipped

    def _record(
        self, number: int, methods: Mapping[str, Method], candidates: Mapping[str, Method], by_peak: ByPeak
    ) -> dict[str, Any]:
        """One case's figures; they depend on no other case, but for where two scans' maps are compared.

        What is highest in a map is taken out at once too, unless the choice found its peak trusted for this answer.
        """
        case, settings = self.cases[number], self.settings
        deep = number < settings.checked
        key = self._key(number, methods, candidates if deep else {}, by_peak)
        record = _kept(self.place.of(case.id), key)
        if record is not None:
            return record
        subject = subject_of(self.explainer, case, **self.reading)
        asked = deep or bool(case.masks)
        twin = twin_of(subject.model, self.explainer.at_once(subject.volume)) if asked else None
        highest = [name for name in methods if subject.answer not in by_peak.get(name, ())]
        record = examine(subject, methods, settings, _labels(case, subject), seed=number, highest=highest, twin=twin)
        if deep and twin is not None:
            found = record["methods"]
            deepen(found, subject, methods, twin, settings)
            check(found, subject, methods, settings, self._other(number, subject.answer), self.shuffled)
            record["agreement"] = agreement_of(subject, candidates, number)
        place = self.place.of(case.id)
        if place:
            _write(place, {"key": key, **record})
        return record

    def _exchanges(self) -> dict[str, Any]:
        """What goes along when it is exchanged between scans, from the run folder where it has that."""
        keys = [self._key(number, {}, {}, {}) for number in range(len(self.cases))]
        patients = patients_of(self.cases)
        asked = [*keys, self.settings.exchanged, self.settings.min_scans, list(patients.items())]
        key = sha256(json.dumps(asked).encode()).hexdigest()
        place = self.place.folder / f"exchanges{self.place.mark}.json" if self.place.folder else None
        found = _kept(place, key)
        if found is None:
            found = exchange(self.explainer, self.cases, self.settings, self.progress, patients, **self.reading)
            if place:
                _write(place, {"key": key, **found})
        return found

    def _others(self, number: int) -> list[Case]:
        """The other scans that are checked, beginning with the one after that number."""
        checked = self.cases[: self.settings.checked]
        return [*checked[number + 1 :], *checked[:number]]

    def _other(self, number: int, answer: str) -> Subject | Undefined:
        """Another scan with that answer, or else any other; why there is none."""
        found: list[Subject] = []
        for case in self._others(number):
            with suppress(VolsalError):  # it is told where its own turn comes
                found.append(subject_of(self.explainer, case, **self.reading))
                if found[-1].answer == answer:
                    return found[-1]
        return found[0] if found else Undefined("no other scan is checked")

    @cached_property
    def _model(self) -> list[str]:
        """What the model is beside its weights: its parts with their settings, and the code of those that are a user's.

        What that code calls elsewhere is not seen.
        """
        kinds = {type(part) for part in self.explainer.model.modules()}
        own = sorted((kind for kind in kinds if kind.__module__.partition(".")[0] not in _LIBRARIES), key=repr)
        return [repr(self.explainer.model), *map(_source_of, own)]

    def _key(
        self, number: int, methods: Mapping[str, Method], candidates: Mapping[str, Method], by_peak: ByPeak
    ) -> str:
        """Of all that a case's figures depend on; thresholds of the verdicts are no part of it."""
        explainer, settings, deep = self.explainer, self.settings, number < self.settings.checked
        asked = (
            "radius_mm", "blur_mm", "controls", "highest", "tolerance_mm", "body_margin_mm", "border_mm", "mirror",
            "label_names",
        )  # fmt: skip
        content = {
            "version": VERSION,
            "weights": explainer.weights_sha256,
            "model": self._model,
            "preprocess": repr(explainer.preprocess),
            "target": repr(explainer.targets[0]),
            "methods": {name: repr(method) for name, method in methods.items()},
            "alignment": explainer.align.id,
            "classes": explainer.classes,
            "windows": repr(explainer.windows),
            "settings": {name: getattr(settings, name) for name in asked},
            "by_peak": {name: sorted(by_peak.get(name, ())) for name in methods},
            "candidates": {name: repr(method) for name, method in candidates.items()},
            "random_labels": weights_digest(self.shuffled) if self.shuffled is not None and deep else None,
            "seed": number,
            "reading": repr(sorted(self.reading.items())),
            "files": _digests(self.cases[number]),
            "others": [_digests(case) for case in self._others(number)] if deep else None,
        }
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _source_of(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # it was made without a file
        return repr(kind)


def _digests(case: Case) -> list[Any]:
    """Of all that a case is made of; None for a file that cannot be read."""
    given = [[name, _digest(x) if isinstance(x, Path) else list(x)] for name, x in case.given.items()]
    return [*(_digest(path) for path in (*case.paths, *case.masks.values())), given]


def _digest(path: Path) -> str | None:
    try:
        return file_digest(path)
    except VolsalError:
        return None


def _of_model(records: Sequence[Mapping[str, Any]], settings: AuditSection) -> list[Verdict]:
    """That no map of this model can be trusted, where its answers do not differ; nothing else."""
    alike = answers_alike(records, settings)
    rule = f"given where the log odds spread by less than {2 * settings.min_change:g} over scans"
    return [Verdict("the model", "answers all scans alike", rule, alike, {})] if alike else []


def _of_choice(choice: Choice, settings: AuditSection) -> Verdict:
    rule = (
        "of the maps that are trusted by the rule below the one at whose peaks (or, of answers for which no map's peak "
        "is trusted, without whose highest part) the score most often moves by at least half of what it moves by the "
        f"best map (of equals: moves more), chosen without masks on {choice.scans} scans, the best few on others too; "
        f"{trust_rule(settings)}"
    )
    scores = {one.method: figure_or_none(one.score) for one in choice.candidates}
    return Verdict("recommended map", choice.recommended or "none", rule, ". ".join(choice.words), {"scores": scores})


def figure_or_none(value: Figure) -> float | None:
    """A figure as plain data; None where undefined."""
    return value if isinstance(value, float) else None


def _strongest(trust: Sequence[Trust], names: Sequence[str]) -> str:
    """The method that says where to look, where none was chosen: a trusted one, by the scans whose score moves."""

    def sure(one: Trust) -> tuple[bool, bool, int]:
        return one.verdict == TRUSTED, one.way == PEAK, one.moved

    return max(names, key=lambda name: max(sure(one) for one in trust if one.method == name))


def _labels(case: Case, subject: Subject) -> dict[str, Any]:
    return {name: read_labels(path, subject.grid, subject.ready.scan) for name, path in case.masks.items()}


def _kept(place: Path | None, key: str) -> dict[str, Any] | None:
    try:
        content = json.loads(place.read_text(encoding="utf-8")) if place else None
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(content, dict) or content.pop("key", None) != key:
        return None
    return content


def _groups(records: Sequence[Mapping[str, Any]], cases: Mapping[str, Case]) -> dict[str, dict[str, str]]:
    """By column, the cases' values: their groups, their label, and whether the model is right, where that is known."""
    columns = dict.fromkeys(column for record in records for column in cases[record["case"]].groups)
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


# ---- files

_COLUMNS = (
    "case", "target", "answer", "score", "method", "peak_x_mm", "peak_y_mm", "peak_z_mm", "where", "effect",
    "largest_control", "p_value", "density_outside_body", "body_sure", "undefined",
)  # fmt: skip


def _rows(records: Sequence[Mapping[str, Any]], target: str) -> Iterator[list[Any]]:
    for record in records:
        for name, one in record["methods"].items():
            start = [record["case"], target, record["answer"], f"{record['score']:.6g}", name]
            trial = one.get("trial", one)
            if "undefined" in trial:
                yield [*start, *[""] * 8, record["body"]["sure"], trial["undefined"]]
                continue
            density = one["regions"].get("outside the body", {}).get("density")
            yield [
                *start, *trial["mm"], one["where"], f"{trial['effect']:.6g}", f"{trial['control_largest']:.6g}",
                f"{trial['p_value']:.4g}", f"{density:.4g}" if isinstance(density, float) else "",
                record["body"]["sure"], "",
            ]  # fmt: skip


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=True, allow_nan=False) + "\n")
