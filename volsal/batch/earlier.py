"""What earlier runs left of a case, and whether it still holds: a run asks before it does a case, a plan for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from volsal.batch.recipe import key_of
from volsal.run_folder import Fault, RunFolder
from volsal.scans.find import Case
from volsal.scans.scan import file_digest

# A result that holds; one, or a fault, that does not, since what it depends on has changed; a fault that would only
# happen again; nothing.
Standing = Literal["done", "changed", "faulty", "new"]


@dataclass(frozen=True)
class Left:
    """What earlier runs left of a case.

    Attributes
    ----------
    digests : of the case's files as they are now; None where nothing is left, so that they need not be read for it
    record : its ``case.json``, where that and every file that it names still hold
    fault : why it has no result, where that would only happen again
    """

    digests: list[str] | None = None
    record: dict[str, Any] | None = None
    fault: Fault | None = None

    @property
    def standing(self) -> Standing:
        """In a word."""
        if self.record is not None:
            return "done"
        if self.fault is not None:
            return "faulty"
        return "new" if self.digests is None else "changed"


@dataclass(frozen=True)
class Earlier:
    """Judges what there is in a run folder.  Nothing is written.

    Attributes
    ----------
    folder : the run's
    recipe : all that results depend on but the scans, as :func:`volsal.batch.recipe.recipe_of` makes it
    files_for : the files that targets and methods read for a case of that id
    """

    folder: RunFolder
    recipe: Mapping[str, Any]
    files_for: Callable[[str], list[Path]]

    def of(self, case: Case) -> Left:
        """What is left of ``case``.

        Raises
        ------
        ScanError
            Where one of its files cannot be read.
        """
        record, fault = self.folder.record(case.id), self.folder.fault(case.id)
        if not (record or fault):
            return Left()
        digests = digests_of(case)
        key = self.key(case, digests)
        if record and record["provenance"].get("key") == key and self.folder.is_whole(case.id, record):
            return Left(digests, record)
        return Left(digests, fault=fault if fault and fault.key == key else None)

    def key(self, case: Case, digests: list[str]) -> str:
        """What a result of ``case``, whose files have these ``digests``, depends on."""
        others = [*self.files_for(case.id), *(value for value in case.given.values() if isinstance(value, Path))]
        return key_of(self.recipe, digests, others, case.given)


def digests_of(case: Case) -> list[str]:
    """SHA-256 of each of the case's scans, hexadecimal."""
    return [file_digest(path) for path in case.paths]
