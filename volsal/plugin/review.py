"""What a reviewer said of each case: ``review.csv`` in the run folder, one row per case.

Columns ``case, verdict, comment, time`` (UTC); others, and rows of cases that the run no longer has, stay as they are.
The file is read again before each change and replaced whole, so neither a crash nor a second window loses a row.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from volsal.errors import VolsalError
from volsal.run_folder import safe_cell
from volsal.scans.write import replacing

FILE = "review.csv"
_COLUMNS = ("case", "verdict", "comment", "time")


class ReviewError(VolsalError, ValueError):
    """A review file that is none of volsal's, and is therefore left alone."""


@dataclass(frozen=True)
class Review:
    """What was said of one case."""

    verdict: str = ""
    comment: str = ""


@dataclass(frozen=True)
class Reviews:
    """The review file of a run; ``path`` need not exist."""

    path: Path

    def read(self) -> dict[str, Review]:
        """What was said, by case; of a case with several rows the last.

        Raises
        ------
        ReviewError
            Where the file has other columns, or cannot be read as text.
        """
        return {row["case"]: Review(row.get("verdict", ""), row.get("comment", "")) for row in self._rows()}

    def write(self, case: str, review: Review, before: Review | None = None) -> None:
        """Put one case's review into the file; what it has in common with ``before`` stays as the file has it.

        Raises
        ------
        ReviewError
            As for :meth:`read`; the file then stays as it is.
        WriteError
            Where the disk refuses.
        """
        rows = self._rows()
        own = next((row for row in reversed(rows) if row["case"] == case), None)
        if own is None:
            own = {"case": case}
            rows.append(own)
        for name in ("verdict", "comment"):
            if before is None or getattr(review, name) != getattr(before, name):
                own[name] = getattr(review, name)
        own["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        columns = list(dict.fromkeys([*_COLUMNS, *(name for row in rows for name in row)]))
        with replacing(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([_cell(name) for name in columns])
            writer.writerows([_cell(row.get(name, "")) for name in columns] for row in rows)

    def _rows(self) -> list[dict[str, str]]:
        try:
            # As spreadsheets save it: with a mark at the start.
            with self.path.open(newline="", encoding="utf-8-sig") as file:
                header, *lines = [[_text(cell) for cell in line] for line in csv.reader(file) if line] or [[*_COLUMNS]]
        except FileNotFoundError:
            return []
        except (UnicodeDecodeError, csv.Error) as error:
            raise ReviewError(f"{self.path}: cannot be read as CSV ({error}); move it away to begin anew") from error
        if "case" not in header or "verdict" not in header:
            raise ReviewError(
                f"{self.path}: its columns are {', '.join(header)}, where case and verdict are expected, separated by "
                "commas; save it so, or move it away to begin anew"
            )
        return [_row(header, line) for line in lines]


def _row(header: list[str], line: list[str]) -> dict[str, str]:
    # A cell beyond the header's last belongs to no column, and is kept in one of its own.
    names = [*header, *(f"column {number + 1}" for number in range(len(header), len(line)))]
    return dict.fromkeys(header, "") | dict(zip(names, line, strict=False))


def _cell(text: str) -> str:
    """As :func:`volsal.run_folder.safe_cell`, and so that :func:`_text` leads back."""
    return f"'{text}" if _is_marked(text) else str(safe_cell(text))


def _text(cell: str) -> str:
    return cell[1:] if _is_marked(cell) else cell


def _is_marked(cell: str) -> bool:
    """Whether an apostrophe stands before what a spreadsheet would take for a formula, or before another one."""
    return cell[:1] == "'" and cell[1:2] in ("=", "+", "-", "@", "'")
