"""Whose scans they are: several scans of one patient are not several patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from volsal.config import AuditSection
from volsal.scans.find import Case

# Group columns that say whose scan it is, where the config names none.
PATIENT_COLUMNS = ("patient", "patient_id", "subject", "subject_id", "participant_id")
Record = Mapping[str, Any]


def patients_of(cases: Sequence[Case], settings: AuditSection) -> dict[str, str]:
    """By case whose scan it is: by the config's group column, or one that is called so; else the case itself."""
    columns = [settings.patient] if settings.patient else PATIENT_COLUMNS
    return {case.id: next((case.groups[c] for c in columns if case.groups.get(c)), case.id) for case in cases}


def owners_of(records: Sequence[Record], patients: Mapping[str, str]) -> list[str]:
    """Whose scan each record's is; its own where that is not known."""
    return [patients.get(record["case"], record["case"]) for record in records]


def one_of_each(records: Sequence[Record], patients: Mapping[str, str]) -> list[Record]:
    """The first scan of each patient: for tests that count, to which a patient's scans would be so many patients."""
    first: dict[str, Record] = {}
    for owner, record in zip(owners_of(records, patients), records, strict=True):
        first.setdefault(owner, record)
    return list(first.values())
