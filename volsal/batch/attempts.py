"""Which cases were being worked on when a process died, so that one that kills processes is found and set aside.

A case that is begun leaves a note in ``.volsal/doing``, which its end removes.  A note that is found at the start is of
a process that died over the case or beside it: several cases are in work at a time.  Such a case is tried again with
nothing beside it, after all others, so that when the process dies once more it is known by which case.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from volsal.run_folder import OWN
from volsal.scans.write import WriteError


@dataclass(frozen=True)
class Deaths:
    """How often a process died while a case was in work: with others beside it, and ``alone``."""

    beside: int = 0
    alone: int = 0

    def __bool__(self) -> bool:
        return bool(self.beside or self.alone)


@dataclass(frozen=True)
class Attempts:
    """The notes of the run in ``folder``."""

    folder: Path

    def of(self, case: str) -> Deaths:
        """What is known of a case that is not in work now."""
        try:
            content = json.loads(self._note(case).read_text(encoding="ascii"))
            return Deaths(int(content["beside"]), int(content["alone"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return Deaths()

    def suspects(self) -> dict[str, Deaths]:
        """Every case that has a note, by its id."""
        home = self.folder / OWN / "doing"
        return {note.name: self.of(note.name) for note in home.iterdir()} if home.is_dir() else {}

    def begin(self, case: str, before: Deaths) -> None:
        """Note that a case is begun: should the process die, it did so over it.

        Raises
        ------
        WriteError
            Where the disk refuses, as :meth:`end` does.
        """
        now = Deaths(before.beside, before.alone + 1) if before else Deaths(beside=1)
        note = self._note(case)
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            # Not synced to the disk: this is about processes that die, not about power.
            note.write_text(json.dumps(asdict(now)), encoding="ascii")
        except OSError as error:
            raise WriteError(f"{note}: could not be written: {error.strerror or error}") from error

    def end(self, case: str) -> None:
        """Note that a case is through, whatever became of it."""
        try:
            self._note(case).unlink(missing_ok=True)
        except OSError as error:
            raise WriteError(f"{self._note(case)}: could not be removed: {error.strerror or error}") from error

    def _note(self, case: str) -> Path:
        return self.folder.joinpath(OWN, "doing", case)
