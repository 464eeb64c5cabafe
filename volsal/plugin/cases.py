"""The cases of a run as rows of a table: what the run, its audit and a reviewer say of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from volsal.plugin.review import FILE, Review, Reviews
from volsal.run_folder import RunFolder
from volsal.viewer.opening import map_name


@dataclass
class CaseRow:
    """One case.

    Attributes
    ----------
    id, status : which, and what became of it
    prediction, label : what the model said, and what the case is known to be; empty where nothing is known
    answer : ``right`` or ``wrong``; empty where no class was predicted or nothing is known
    groups : column -> value
    suspicion : in spreads of the score, as the audit says; None where it found none
    remark : why it is suspicious, or why it has no result
    windows : by map, its own display range
    review : the reviewer's word
    """

    id: str
    status: str
    prediction: str = ""
    label: str = ""
    answer: str = ""
    groups: Mapping[str, str] = field(default_factory=dict)
    suspicion: float | None = None
    remark: str = ""
    windows: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    review: Review = field(default_factory=Review)


@dataclass(frozen=True)
class CaseTable:
    """All cases of a run.

    Attributes
    ----------
    run, reviews : where they are
    rows : the most suspicious first, then in the run's order
    """

    run: RunFolder
    reviews: Reviews
    rows: list[CaseRow]

    @classmethod
    def of(cls, path: Path) -> CaseTable:
        """The table of the run in ``path``.

        Raises
        ------
        RunFolderError
            Where that is no run folder.
        ReviewError
            Where its review file is none of volsal's.
        """
        run = RunFolder.existing(path)
        reviews = Reviews(run / FILE)
        said = reviews.read()
        inputs, suspicions = run.inputs(), _suspicions(run.audit())
        rows = [_row(run, case, inputs.get(case, {}), suspicions.get(case)) for case in run.cases()]
        for row in rows:
            row.review = said.get(row.id, row.review)
        rows.sort(key=lambda row: -(row.suspicion or 0.0))
        return cls(run, reviews, rows)

    @property
    def groups(self) -> list[str]:
        """The groups' columns."""
        return sorted({name for row in self.rows for name in row.groups})

    @property
    def maps(self) -> list[str]:
        """Names of the run's maps."""
        return list(dict.fromkeys(name for row in self.rows for name in row.windows))

    def window(self, name: str) -> tuple[float, float] | None:
        """One display range for a map in all cases: up to the median of their own; None where no case has the map."""
        tops = [row.windows[name][1] for row in self.rows if name in row.windows]
        return (0.0, median(tops)) if tops else None


def _suspicions(audit: Mapping[str, Any] | None) -> dict[str, tuple[float, str]]:
    """By case the weight and the reason of its heaviest suspicion."""
    found: dict[str, tuple[float, str]] = {}
    for one in (audit or {}).get("suspicious") or ():
        case, told = str(one.get("case")), (float(one.get("weight", 0.0)), str(one.get("reason", "")))
        found[case] = max(found.get(case, told), told)
    return found


def _row(run: RunFolder, case: str, about: Mapping[str, Any], suspicion: tuple[float, str] | None) -> CaseRow:
    state = run.state(case)
    record = run.record(case) if state == "done" else None
    label = "" if about.get("label") is None else str(about["label"])
    groups = {name: str(value) for name, value in (about.get("groups") or {}).items() if value not in (None, "")}
    if record is None:
        fault = run.fault(case)
        unusable = "its record is none of this version's" if state == "done" else "not tried yet"
        return CaseRow(case, state, label=label, groups=groups, remark=fault.reason if fault else unusable)
    said, answer = _said(record["prediction"], label)
    windows = {map_name(entry): (entry["window"][0], entry["window"][1]) for entry in record["maps"]}
    weight, reason = suspicion or (None, "")
    return CaseRow(case, state, said, label, answer, groups, weight, reason, windows)


def _said(predicted: Mapping[str, Any], label: str) -> tuple[str, str]:
    """The prediction in a word or number, and whether it is right."""
    logits = predicted.get("logits") or []
    if predicted.get("class") is None:
        return (f"{logits[0]:.4g}" if len(logits) == 1 else ""), ""
    index, name = str(predicted["class"]), predicted.get("class_name") or ""
    if not label:
        return name or f"class {index}", ""
    return name or f"class {index}", "right" if label in (index, name) else "wrong"
