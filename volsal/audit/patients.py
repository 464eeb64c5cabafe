"""Whose scans they are: several scans of one patient are not several patients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from volsal.scans.find import Case

Record = Mapping[str, Any]


def patients_of(cases: Sequence[Case]) -> dict[str, str]:
    """By case whose scan it is; where that is not known each is another's."""
    return {case.id: f"case {case.id}" if case.patient is None else f"patient {case.patient}" for case in cases}


def owners_of(records: Sequence[Record], patients: Mapping[str, str]) -> list[str]:
    """Whose scan each record's is; its own where that is not known."""
    return [patients.get(record["case"], record["case"]) for record in records]


def one_of_each(
    records: Sequence[Record], patients: Mapping[str, str], tried: Callable[[Record], bool]
) -> list[Record]:
    """A scan of each patient, for tests that count: the first that was ``tried``, or else the first.

    To count all of a patient's scans would take them for so many patients.
    """
    found: dict[str, Record] = {}
    for owner, record in zip(owners_of(records, patients), records, strict=True):
        if owner not in found or (tried(record) and not tried(found[owner])):
            found[owner] = record
    return list(found.values())
