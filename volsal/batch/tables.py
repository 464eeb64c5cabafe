"""Tables of cases: CSV and TSV as spreadsheets, pandas and BIDS write them, and what their columns mean."""

from __future__ import annotations

import codecs
import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volsal.config import ColumnsSection, ConfigError, exists
from volsal.errors import nearest

# What columns are usually called, the likeliest first; compared without regard to case, spaces and underscores.
_ID = ("case", "case_id", "id", "participant_id", "subject", "subject_id", "patient", "patient_id")
_SCAN = ("scan", "image", "path", "file", "scan_path", "image_path", "file_path", "file_name")
_PATIENT = ("patient", "patient_id", "subject", "subject_id", "participant_id")
_LABEL = ("label", "diagnosis", "class")
_GROUPS = (
    "site", "center", "centre", "sex", "gender", "scanner", "manufacturer", "vendor", "field_strength", "group",
)  # fmt: skip
_MASK = "mask"
_SHOWN = 10


@dataclass(frozen=True)
class Row:
    """A row of a table: the line of the file at which it begins, and a text per column, "" where there is none."""

    path: Path
    line: int
    cells: Sequence[str]

    @property
    def at(self) -> str:
        """Where it stands, to begin a sentence with."""
        return f"{self.path.name}:{self.line}"


@dataclass(frozen=True)
class Table:
    """A table as it stands in its file."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def index(self, name: str) -> int:
        """The place of a column that the config names.

        Raises
        ------
        ConfigError
            Where there is none or several.
        """
        places = [n for n, column in enumerate(self.columns) if column == name]
        if len(places) > 1:
            raise ConfigError(f"{self.path}:1: {len(places)} columns are called {name!r}; give each its own name")
        if not places:
            raise ConfigError(f"{self.path}:1: no column {name!r}{nearest(name, self.columns)}")
        return places[0]

    def usual(self, names: Sequence[str]) -> str | None:
        """The column that is called like the first possible of ``names``."""
        called = {_plain(column): column for column in reversed(self.columns)}
        return next((called[_plain(name)] for name in names if _plain(name) in called), None)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.casefold())


def read_table(path: Path) -> Table:
    """Read a CSV or TSV file: UTF-8, with or without a byte-order mark, or the UTF-16 of spreadsheets.

    Columns are parted by tabs in a ``.tsv``, else by what the first line has most of: comma, semicolon or tab.  "n/a"
    is an empty cell, as in BIDS; empty lines are passed over.

    Raises
    ------
    ConfigError
        With the line's number, where the file is not such a table.
    """
    text = _text(path)
    first = text.partition("\n")[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    rows = [Row(path, line, cells) for line, cells in _lines(path, text, delimiter) if any(cells)]
    if not rows:
        raise ConfigError(f"{path}: the table is empty; its first line names the columns")
    header, *body = rows
    width = len(header.cells)
    for row in body:
        if len(row.cells) > width and any(row.cells[width:]):
            raise ConfigError(
                f"{path}:{row.line}: {len(row.cells)} cells, and {width} columns; put quotes around a cell that holds "
                f"{delimiter!r}"
            )
    filled = (Row(path, row.line, (*row.cells, *[""] * (width - len(row.cells)))) for row in body)
    return Table(path, tuple(header.cells), tuple(filled))


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: the table cannot be read: {error.strerror}") from error
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text; save the table as 'CSV UTF-8'") from error
    if "\0" in text:
        raise ConfigError(f"{path}:{text.partition(chr(0))[0].count(chr(10)) + 1}: a NUL character; is this a table?")
    return text


def _lines(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    line = 1
    try:
        for cells in reader:
            stripped = (cell.strip() for cell in cells)
            yield line, tuple("" if cell.casefold() == "n/a" else cell for cell in stripped)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"{path}:{line}: not a table: {error}") from error


@dataclass(frozen=True)
class Roles:
    """Where in a table's rows stands what is known of a case: places of columns; ``id`` None where there is none."""

    id: int | None
    scan: tuple[int, ...]
    label: int | None
    masks: dict[str, int]
    groups: dict[str, int]
    given: dict[str, tuple[int, ...]]
    patient: int | None

    @classmethod
    def of(cls, table: Table, columns: ColumnsSection) -> Roles:
        """The columns that a config names, or else those of usual names.

        Raises
        ------
        ConfigError
            Where a column that the config names is not there.
        """

        def place(name: str | None, usual: Sequence[str]) -> int | None:
            name = name or table.usual(usual)
            return None if name is None else table.index(name)

        scans = columns.scan or [column for column in (table.usual(_SCAN),) if column]
        masks = columns.masks or {
            column[: -len(_MASK)].strip("_- ") or _MASK: column
            for column in table.columns
            if column.casefold() == _MASK or column.casefold().endswith(f"_{_MASK}")
        }
        usual = set(map(_plain, _GROUPS))
        groups = columns.groups or [column for column in table.columns if _plain(column) in usual]
        own, patient = place(columns.id, _ID), place(columns.patient, _PATIENT)
        return cls(
            own,
            tuple(map(table.index, scans)),
            place(columns.label, _LABEL),
            {name: table.index(column) for name, column in masks.items()},
            {column: table.index(column) for column in groups},
            {argument: tuple(map(table.index, names)) for argument, names in columns.given.items()},
            None if patient == own else patient,  # each row's own id is no word on which are of one patient
        )


@dataclass(frozen=True)
class Known:
    """What a row says of a case: fields of :class:`Case`, why it cannot be explained, and the masks not there."""

    fields: dict[str, Any]
    fault: str | None
    absent: tuple[str, ...]


def known(roles: Roles, row: Row, base: Path) -> Known:
    """What ``row`` says of its case; relative paths start from ``base``."""
    masks = {name: base / row.cells[place] for name, place in roles.masks.items() if row.cells[place]}
    faults = []
    given: dict[str, tuple[float, ...] | Path] = {}
    for argument, places in roles.given.items():
        try:
            given[argument] = _given([row.cells[place] for place in places], base)
        except ValueError as error:
            faults.append(f"the model's input {argument!r}: {error} ({row.at})")
    fields = {
        "label": (row.cells[roles.label] or None) if roles.label is not None else None,
        "masks": masks,
        "groups": {column: row.cells[place] for column, place in roles.groups.items() if row.cells[place]},
        "given": given,
        "patient": (row.cells[roles.patient] or None) if roles.patient is not None else None,
    }
    absent = tuple(name for name, path in masks.items() if not exists(path))
    return Known(fields, "; ".join(faults) or None, absent)


def _given(cells: Sequence[str], base: Path) -> tuple[float, ...] | Path:
    """The numbers or the one file that cells hold; ValueError says what they hold instead."""
    if "" in cells:
        raise ValueError("its cell is empty")
    try:
        numbers = tuple(float(cell) for cell in cells)
    except ValueError:
        numbers = (math.nan,)
    if all(map(math.isfinite, numbers)):
        return numbers
    if len(cells) > 1 or not exists(base / cells[0]):
        raise ValueError(f"{', '.join(map(repr, cells))}: no number, with a point for decimals, and no file")
    return base / cells[0]


def several(names: Sequence[str], shown: int = _SHOWN) -> str:
    """Names in a sentence, the first few and how many more."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{more}"
