"""What the first page of a report says, section by section, each made from the run folder alone.

A section is a template of its own name and one function that makes the template's data, or None where the run has
nothing to say there.  To add one, write both and put the section into :data:`SECTIONS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from volsal.display import limits
from volsal.grid import Grid, GridError
from volsal.run_folder import CASE_FILE, Fault, RunFolder, State

Kind = Literal["text", "number", "choice"]
# Of a case's small pictures: one colour scale for all cases, by which they can be compared, or each its own.
Scale = Literal["same", "own"]
# So many of a map's cases, in percent, reach no further than the scale for all of them; an outlier must not dim it.
_WITHIN = 90
# Column of choices with more of them than this are searched by text instead.
_MOST_CHOICES = 40
# Suspicious scans that are told with their reasons; the table of cases can be sorted by the weight of all of them.
_SUSPICIOUS = 20


@dataclass(frozen=True)
class Case:
    """One case of the run, as the first page lists it.

    Attributes
    ----------
    id, state : which, and what became of it
    about : its entry in ``inputs.json``: label, groups
    record : its ``case.json``; None where it has no result that holds
    fault : why it has none
    """

    id: str
    state: State
    about: Mapping[str, Any]
    record: Mapping[str, Any] | None = None
    fault: Fault | None = None

    @property
    def said(self) -> str:
        """What the model said, in a word or number: the class, or a single output."""
        return "" if self.record is None else _said(self.record["prediction"])


@dataclass(frozen=True)
class Page:
    """The page of a case that has a result.

    Attributes
    ----------
    link : to it, from the first page
    pictures : by the name of a map and the scale of its colours, where its small picture is, or the picture itself as a
        data address
    """

    link: str
    pictures: Mapping[str, Mapping[Scale, str]]


@dataclass(frozen=True)
class Column:
    """One fact of every case, to sort and filter by.

    Attributes
    ----------
    label : its heading
    values : one for each case of the run, in order; None where a case has none
    kind : how it is compared: as words, as numbers, or as one of a few choices
    map : the name of the map it is about; None for what is about the case
    """

    label: str
    values: Sequence[str | float | None]
    kind: Kind = "text"
    map: str | None = None


@dataclass(frozen=True)
class Overview:
    """All that the first page is made of.

    Attributes
    ----------
    run, asked : the folder, and its ``run.json``
    cases : every input of the run, in order
    pages : of the cases that have a result, by id
    """

    run: RunFolder
    asked: Mapping[str, Any]
    cases: Sequence[Case]
    pages: Mapping[str, Page]

    @property
    def audit(self) -> Mapping[str, Any] | None:
        """``audit.json``; None where there is none, or not one of this version's."""
        found = self.run.audit()
        return found if found and {"verdicts", "metrics", "suspicious"} <= found.keys() else None

    @property
    def records(self) -> list[Mapping[str, Any]]:
        """Of the cases that have a result."""
        return [case.record for case in self.cases if case.record is not None]

    @property
    def map_names(self) -> list[str]:
        """Names of the run's maps, in the order of its methods and targets."""
        return list(dict.fromkeys(map_name(entry) for record in self.records for entry in record["maps"]))

    @property
    def scales(self) -> Mapping[str, tuple[float, float]]:
        """Of each map's pictures, the limits of the colour scale for all cases."""
        return scales_of(self.cases)


@dataclass(frozen=True)
class Section:
    """A part of the first page.

    Attributes
    ----------
    id, title : of the part; its template is ``<id>.html``
    data : what the template is given; None leaves the section out
    """

    id: str
    title: str
    data: Callable[[Overview], dict[str, Any] | None]


def cases_of(run: RunFolder) -> list[Case]:
    """Every case of the run with what is known of it."""
    inputs = run.inputs()
    return [_case(run, case, inputs.get(case, {})) for case in run.cases()]


def scales_of(cases: Sequence[Case]) -> dict[str, tuple[float, float]]:
    """By the name of a map, limits of one colour scale for all cases; maps that point nowhere do not count."""
    entries = [entry for case in cases if case.record for entry in case.record["maps"]]
    found: dict[str, list[tuple[float, float]]] = {map_name(entry): [] for entry in entries}
    for entry in entries:
        if entry["status"] == "ok":
            found[map_name(entry)].append(limits(entry["window"], entry["signed"]))
    return {name: _shared(ends) for name, ends in found.items()}


def _shared(ends: Sequence[tuple[float, float]]) -> tuple[float, float]:
    if not ends:
        return 0.0, 1.0
    top = float(np.percentile([high for _, high in ends], _WITHIN, method="higher"))
    return (-top if ends[0][0] < 0 else 0.0), top


def _case(run: RunFolder, case: str, about: Mapping[str, Any]) -> Case:
    state = run.state(case)
    record = run.record(case) if state == "done" else None
    if state == "done" and (record is None or not _usable(record)):
        return Case(
            case, "failed", about, fault=Fault("failed", "record", f"its {CASE_FILE} is none of this version's")
        )
    return Case(case, state, about, record, run.fault(case))


_NEEDED = {
    "name", "target", "target_text", "layer", "unit", "signed", "status", "window", "minimum", "maximum", "peak_mm",
    "cells", "cell_mm", "alignment", "score", "file", "sha256",
}  # fmt: skip


def _usable(record: Mapping[str, Any]) -> bool:
    """Whether a record holds what the pages show; it may be another version's, or edited."""
    try:
        Grid(record["scan"]["shape"], record["scan"]["affine"])
        return all(entry.keys() >= _NEEDED for entry in record["maps"])
    except (KeyError, TypeError, AttributeError, GridError):
        return False


def _said(predicted: Mapping[str, Any]) -> str:
    if predicted["class"] is None:
        return f"{predicted['logits'][0]:.4g}" if len(predicted["logits"]) == 1 else ""
    return predicted["class_name"] or f"class {predicted['class']}"


def map_name(entry: Mapping[str, Any]) -> str:
    """What a map is called in lists: its method's name and its target."""
    return f"{entry['name']} {entry['target']}"


def summary(overview: Overview) -> dict[str, Any]:
    """The run in words: what became of the cases, and how many maps say nothing."""
    states = Counter(case.state for case in overview.cases)
    predictions = [record["prediction"] for record in overview.records]
    classes = [predicted for predicted in predictions if predicted["class"] is not None]
    return {
        "total": len(overview.cases),
        "states": {state: states.get(state, 0) for state in ("done", "refused", "failed", "missing")},
        "predictions": Counter(map(_said, classes)).most_common(8),
        "maps": _map_states(overview),
        "notes": _common_notes(overview),
        "audited": overview.audit is not None,
        "answers": _answers(overview.audit) if overview.audit else [],
    }


# The column by which the cases stand where there is an audit.
_SUSPICION = "suspicion"
# Verdicts that say of a rule that it found nothing amiss, or nothing at all: of these, how many is enough at a glance.
_QUIET = frozenset(("passed", "not found", "cannot be told"))


def _answers(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The audit at a glance: to each of its questions, the verdicts given, with what they are about."""
    found = []
    for asked in (audit, *audit.get("further", ())):
        for part in audit.get("parts", ()):
            about: dict[str, list[str]] = {}
            for one in asked["verdicts"]:
                if one.get("part") == part["id"]:
                    about.setdefault(one["verdict"], []).append(one["name"].removeprefix("trust: "))
            said = [(word, len(names) if word in _QUIET else ", ".join(names)) for word, names in about.items()]
            if said:
                said.sort(key=lambda one: one[0] in _QUIET)
                target = asked.get("target") if audit.get("further") else None
                found.append({"question": part["title"], "target": target, "said": said})
    return found


def _map_states(overview: Overview) -> list[dict[str, Any]]:
    found: dict[str, Counter[str]] = {}
    about: dict[str, Mapping[str, Any]] = {}
    for record in overview.records:
        for entry in record["maps"]:
            name = map_name(entry)
            found.setdefault(name, Counter())[entry["status"]] += 1
            about.setdefault(name, entry)
    return [{"name": name, "entry": about[name], "count": count} for name, count in found.items()]


def _common_notes(overview: Overview) -> list[tuple[str, int]]:
    """Notes with how many cases have them, the most common first; those of single cases stand on their pages."""
    notes = Counter(note for record in overview.records for note in dict.fromkeys(record["notes"]))
    return [(note, count) for note, count in notes.most_common(12) if count > 1 or len(overview.records) == 1]


def audit(overview: Overview) -> dict[str, Any] | None:
    """What an audit of the model found: verdicts with their rules, figures with their intervals, suspicious scans."""
    found = overview.audit
    if not found:
        return None
    links = {case: page.link for case, page in overview.pages.items()}
    questions = [found, *found.get("further", ())]
    return {
        "questions": [_question(one, found.get("parts", ()), links) for one in questions],
        "limits": found.get("limits", ()),
    }


def _question(found: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], links: Mapping[str, str]) -> dict[str, Any]:
    """What the audit found of one target, its verdicts under the parts of the audit that they belong to."""
    known = {part["id"] for part in parts}
    rest = [one for one in found["verdicts"] if one.get("part") not in known]
    told = [{**part, "verdicts": [one for one in found["verdicts"] if one.get("part") == part["id"]]} for part in parts]
    return {
        "target": found.get("target"),
        "parts": [*told, *([{"title": "Verdicts", "headings": {}, "verdicts": rest}] if rest else [])],
        "metrics": [
            (method, [(name, {"nulls": {}, **one}) for name, one in figures.items()])
            for method, figures in found["metrics"].items()
            if figures
        ],
        "agreement": [one["figures"]["pairs"] for one in found["verdicts"] if "pairs" in one["figures"]],
        "suspicious": [{**one, "link": links.get(one["case"])} for one in found["suspicious"][:_SUSPICIOUS]],
        "cases": len(found.get("cases", ())),
        "skipped": found.get("skipped", {}),
        "map": found.get("map"),
        "groups": found.get("cohort", {}).get("groups", {}),
        "left_out": Counter(found.get("cohort", {}).get("left_out", {}).values()).most_common(),
    }


def reading(overview: Overview) -> dict[str, Any]:
    """What the maps are and are not."""
    entries = [one["entry"] for one in _map_states(overview)]
    layers = {entry["layer"]: entry["cell_mm"] for entry in entries if entry["layer"]}
    return {
        "layers": layers,
        "fine": [map_name(entry) for entry in entries if not entry["layer"]],
        "signed": any(entry["signed"] for entry in entries),
        "audited": overview.audit is not None,
    }


def listing(overview: Overview) -> dict[str, Any]:
    """The table of cases and their pictures."""
    pages = [overview.pages.get(case.id) for case in overview.cases]
    shown = columns(overview)
    return {
        "names": overview.map_names,
        "content": {
            "columns": [_described(column) for column in shown],
            "order": next((at for at, column in enumerate(shown) if column.label == _SUSPICION), 0),
            "links": [page and page.link for page in pages],
            "pictures": {name: _pictures(overview, pages, name) for name in overview.map_names},
        },
    }


def _pictures(overview: Overview, pages: Sequence[Page | None], name: str) -> dict[str, Any]:
    """The small pictures of one map, case by case, and the limits of their colours."""
    entries = _entries(overview.cases, name)
    about = next(entry for entry in entries if entry)
    return {
        "unit": about["unit"],
        "signed": about["signed"],
        "windows": [entry and limits(entry["window"], entry["signed"]) for entry in entries],
        "shared": overview.scales[name],
        "links": {
            scale: [page and page.pictures.get(name, {}).get(scale) for page in pages] for scale in get_args(Scale)
        },
    }


def _described(column: Column) -> dict[str, Any]:
    choices = {value for value in column.values if value not in (None, "")}
    kind = "text" if column.kind == "choice" and len(choices) > _MOST_CHOICES else column.kind
    return {"label": column.label, "kind": kind, "map": column.map, "values": list(column.values)}


def columns(overview: Overview) -> list[Column]:
    """The columns of the table of cases."""
    cases = overview.cases
    about_cases = [
        Column("case", [case.id for case in cases]),
        Column("status", [case.state for case in cases], "choice"),
        Column("prediction", [case.said for case in cases], "choice"),
        Column("label", [_words(case.about.get("label")) for case in cases], "choice"),
        *(
            Column(group, [_words((case.about.get("groups") or {}).get(group)) for case in cases], "choice")
            for group in sorted({group for case in cases for group in case.about.get("groups") or {}})
        ),
    ]
    if overview.audit:
        weights = Counter[str]()
        for one in overview.audit["suspicious"]:
            weights[one["case"]] = max(weights[one["case"]], one["weight"])
        about_cases.append(Column(_SUSPICION, [weights.get(case.id) for case in cases], "number"))
    told = [column for column in about_cases if any(value not in (None, "") for value in column.values)]
    return [*told, *(column for name in overview.map_names for column in _map_columns(cases, name))]


def _entries(cases: Sequence[Case], name: str) -> list[Mapping[str, Any] | None]:
    """The record of the map of that name, case by case."""
    found = [{map_name(entry): entry for entry in case.record["maps"]} if case.record else {} for case in cases]
    return [entries.get(name) for entries in found]


def _words(value: Any) -> str | None:
    return None if value is None else str(value)


def _map_columns(cases: Sequence[Case], name: str) -> list[Column]:
    entries = _entries(cases, name)
    units = {entry["unit"] for entry in entries if entry}

    def of(key: str) -> list[Any]:
        return [entry and entry.get(key) for entry in entries]

    peaks: list[Any] = [entry and entry["peak_mm"] for entry in entries]
    return [
        Column("map", of("status"), "choice", name),
        Column("score explained", of("score"), "number", name),
        Column(f"maximum, {' or '.join(sorted(units))}", of("maximum"), "number", name),
        *(
            Column(f"peak {axis}, mm", [peak and round(peak[i], 1) for peak in peaks], "number", name)
            for i, axis in enumerate("xyz")
        ),
    ]


def faults(overview: Overview) -> dict[str, Any] | None:
    """The cases without a result, and why."""
    without = [case for case in overview.cases if case.record is None]
    if not without:
        return None
    told = [(case, case.fault.reason if case.fault else "not tried yet") for case in without]
    return {"faults": told, "kinds": Counter(case.fault.code for case in without if case.fault).most_common()}


def making(overview: Overview) -> dict[str, Any]:
    """The model, the settings and the versions that made the maps."""
    config = overview.asked.get("config", {})
    model = config.get("model", {})
    bundle = overview.asked.get("bundle") or {}
    provenance = overview.records[0]["provenance"] if overview.records else {}
    return {
        "model": {
            "class": provenance.get("model", {}).get("class"),
            "made by": model.get("factory") or model.get("file") or model.get("bundle"),
            "weights": model.get("weights"),
            "weights, SHA-256": overview.asked.get("weights_sha256"),
            "model input": provenance.get("model_input", {}).get("preprocess"),
            "classes": ", ".join(map(str, model.get("classes") or bundle.get("classes") or [])) or None,
            "bundle": " ".join(filter(None, [bundle.get("name"), bundle.get("version")])) or None,
            "bundle's own code, trusted to run": "; ".join(bundle.get("ran", [])) or None,
        },
        "settings": {
            "methods": ", ".join(overview.asked.get("methods", [])) or None,
            "targets": ", ".join(map(str, config.get("targets") or [])) or None,
            "alignment of layers' cells": provenance.get("alignment"),
            "device": provenance.get("device"),
            "volsal": overview.asked.get("volsal"),
            "machine": overview.asked.get("machine"),
            **overview.asked.get("versions", {}),
        },
    }


SECTIONS = (
    Section("summary", "In short", summary),
    Section("audit", "Whether the maps can be believed", audit),
    Section("reading", "What the maps are, and are not", reading),
    Section("listing", "Cases", listing),
    Section("faults", "Cases without a result", faults),
    Section("making", "What made the maps", making),
)
