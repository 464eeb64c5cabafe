"""The run folder: what lies where on the disk, for those who write it and for those who read it afterwards.

=====================  ================================================================================================
``run.json``           what was asked for: the resolved config, weights' digest, versions, machine
``inputs.json``        every input that was found, by its case id: files, label, masks, groups
``<case>/case.json``   a result, written last: where it is, the case's maps are whole
``<case>/fault.json``  why the case has no result of its inputs and settings as they are; it outweighs a ``case.json``
``cases.csv``          derived from these; ``volsal collect`` makes it anew
``run.log.jsonl``      what happened when, one JSON object a line; case ids only
``.volsal/``           the lock, the cases in work, the salt of pseudonyms: nothing that a reader needs
=====================  ================================================================================================
"""

from __future__ import annotations

import csv
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeGuard

from volsal.errors import VolsalError
from volsal.scans.digest import sha256_of
from volsal.scans.find import pseudonym
from volsal.scans.write import WriteError, replacing

CASE_FILE, FAULT_FILE, RUN_FILE, INPUTS_FILE = "case.json", "fault.json", "run.json", "inputs.json"
TABLE, LOG, OWN = "cases.csv", "run.log.jsonl", ".volsal"

# Writes an event, and what is to be told about it, as a line.
Log = Callable[..., None]
State = Literal["done", "refused", "failed", "missing"]


class RunFolderError(VolsalError, ValueError):
    """A folder that is no run, or not one that can be used now."""


@dataclass(frozen=True)
class Fault:
    """Why a case has no result.

    Attributes
    ----------
    status : ``refused``: what was found is told and can be mended; ``failed``: it broke
    code : the kind of fault in one word: ``scan``, ``preprocess``, ``memory``, ``time-limit``, ``worker-lost``, ...
    reason : one line
    key : what it depends on (see :func:`volsal.batch.recipe.key_of`): while that stays, it would only happen again
    trace : the traceback, where there is one
    """

    status: Literal["refused", "failed"]
    code: str
    reason: str
    key: str = ""
    trace: str | None = None


@dataclass(frozen=True)
class RunFolder:
    """A run on the disk.

    ``path`` need not exist until something is written.
    """

    path: Path

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """The run in ``path``.

        Raises
        ------
        RunFolderError
            Where no run was ever started there.
        """
        folder = cls(Path(path))
        if not (folder.path / RUN_FILE).is_file():
            raise RunFolderError(f"{path}: not a run folder: it has no {RUN_FILE}; name the folder that a run wrote")
        return folder

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    # Reading

    def asked(self) -> dict[str, Any]:
        """``run.json``; empty where there is none, or not one of ours."""
        return _read(self.path / RUN_FILE) or {}

    def inputs(self) -> dict[str, dict[str, Any]]:
        """Every input that the last run found, by case id."""
        cases = (_read(self.path / INPUTS_FILE) or {}).get("cases")
        return {case: about for case, about in cases.items() if isinstance(about, dict)} if _is_dict(cases) else {}

    def audit(self) -> dict[str, Any] | None:
        """``audit.json``; None where no audit was made."""
        return _read(self.path / "audit.json")

    def record(self, case: str) -> dict[str, Any] | None:
        """The case's ``case.json``; None where there is none or it is not one of ours."""
        content = _read(self.path.joinpath(case, CASE_FILE))
        return content if content and _is_record(content) else None

    def fault(self, case: str) -> Fault | None:
        """Why the case has no result; None where it has one, or was not tried."""
        content = _read(self.path.joinpath(case, FAULT_FILE))
        names = Fault.__dataclass_fields__
        if content is None or content.get("status") not in ("refused", "failed"):
            return None
        return Fault(**{"code": "", "reason": "", **{k: v for k, v in content.items() if k in names}})

    def is_whole(self, case: str, record: Mapping[str, Any]) -> bool:
        """Whether every file that the record names is there, to the byte."""
        home = self.path / case
        try:
            return all(sha256_of(home / name) == digest for name, digest in files_of(record).items())
        except (FileNotFoundError, IsADirectoryError):
            return False

    def state(self, case: str) -> State:
        """What became of a case, told by which files are there."""
        fault = self.fault(case)
        if fault:
            return fault.status
        return "done" if (self.path / case / CASE_FILE).is_file() else "missing"

    def cases(self) -> list[str]:
        """Ids of the cases that the last run found; without ``inputs.json``, of those that have a folder."""
        known = self.inputs()
        if known:
            return list(known)
        found = (entry for entry in os.scandir(self.path) if entry.is_dir() and not entry.name.startswith("."))
        return sorted(e.name for e in found if any((Path(e.path) / f).is_file() for f in (CASE_FILE, FAULT_FILE)))

    # Writing

    def write_run(self, content: Mapping[str, Any]) -> None:
        """Write ``run.json``."""
        _write(self.path / RUN_FILE, content)

    def write_inputs(self, cases: Mapping[str, Mapping[str, Any]]) -> None:
        """Write ``inputs.json``."""
        _write(self.path / INPUTS_FILE, {"cases": cases})

    def write_fault(self, case: str, fault: Fault) -> None:
        """Say why a case has no result.  An earlier one stays where it is: its inputs may come back."""
        _write(self.path / case / FAULT_FILE, {"case": case, **vars(fault)})

    def clear(self, case: str) -> None:
        """Forget a case's fault, and what a process that was killed left half written in its folder."""
        self._remove(case, lambda name: name == FAULT_FILE or _is_half_written(name))

    def sweep(self, case: str) -> None:
        """Remove what a process that was killed left half written in a case's folder."""
        self._remove(case, _is_half_written)

    def _remove(self, case: str, unwanted: Callable[[str], bool]) -> None:
        # One look at the folder: most have nothing to remove, and there may be thousands.
        with suppress(FileNotFoundError), os.scandir(self.path / case) as entries:
            for path in [Path(entry.path) for entry in entries if unwanted(entry.name)]:
                path.unlink(missing_ok=True)

    def log(self, event: str, **about: Any) -> None:
        """Append a line to the log.

        Raises
        ------
        WriteError
            Where the disk refuses.
        """
        with self.logging() as log:
            log(event, **about)

    @contextmanager
    def logging(self) -> Iterator[Log]:
        """What appends lines to the log, which is open for as long: one write each, so that no line is half there.

        Raises
        ------
        WriteError
            Where the disk refuses, now or at a line.
        """
        path = self.path / LOG
        try:
            file = path.open("ab", buffering=0)
        except OSError as error:
            raise _not_written(path, error) from error

        def log(event: str, **about: Any) -> None:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = json.dumps({"time": now, "event": event, **about}, ensure_ascii=True, default=str) + "\n"
            try:
                written = file.write(line.encode("ascii"))
            except OSError as error:
                raise _not_written(path, error) from error
            if written < len(line):  # as on a disk that is nearly full
                raise WriteError(f"{path}: could not be written to the end; is the disk full?")

        with file:
            yield log

    def events(self) -> Iterator[dict[str, Any]]:
        """The log's lines; one that was cut off by a crash is passed over."""
        try:
            file = (self.path / LOG).open(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        with file:
            for line in file:
                try:
                    content = json.loads(line)
                except ValueError:
                    continue
                if isinstance(content, dict):
                    yield content

    def salt(self) -> bytes:
        """The run's own random bytes, of which pseudonyms are made; without them nothing leads back."""
        path = self.path / OWN / "salt"
        if not path.is_file():
            with replacing(path) as temporary:
                temporary.write_text(secrets.token_hex(16) + "\n")
        return bytes.fromhex(path.read_text().strip())

    def series_of(self, path: Path, recorded: str | None) -> str | None:
        """The UID of the DICOM series in ``path`` that a record means, which may say a pseudonym for it."""
        if recorded is None or not path.is_dir() or not (self.path / OWN / "salt").is_file():
            return recorded
        from volsal.scans.dicom import list_series

        salt = self.salt()
        return next((one.uid for one in list_series(path) if pseudonym(one.uid, salt) == recorded), recorded)

    def collect(self) -> Path:
        """Make ``cases.csv`` of what the case folders say: one row per case and map, one for a case without result."""
        path = self.path / TABLE
        inputs = self.inputs()
        groups = sorted({name for entry in inputs.values() for name in entry.get("groups", {})})
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*_COLUMNS, *groups])
            for case in self.cases():
                about = inputs.get(case, {})
                own = [about.get("groups", {}).get(name, "") for name in groups]
                for row in self._rows(case, about.get("label")):
                    writer.writerow([safe_cell(cell) for cell in (*row, *own)])
        return path

    def collect_parquet(self) -> Path:
        """The table of :meth:`collect` as ``cases.parquet``.

        Raises
        ------
        RunFolderError
            Where pyarrow is not installed.
        """
        try:
            from pyarrow import csv as arrow
            from pyarrow import parquet
        except ImportError as error:
            raise RunFolderError("cases.parquet needs pyarrow: pip install 'volsal[parquet]'") from error
        path = self.path / "cases.parquet"
        columns = arrow.read_csv(self.collect())
        with replacing(path) as temporary:
            parquet.write_table(columns, temporary)
        return path

    def _rows(self, case: str, label: str | None) -> Iterator[list[Any]]:
        fault, record = self.fault(case), self.record(case)
        label = "" if label is None else label
        if fault or record is None:
            state, reason = (fault.status, f"[{fault.code}] {fault.reason}") if fault else ("missing", "")
            yield [case, state, reason, label, *[""] * (len(_COLUMNS) - 4)]
            return
        predicted = record["prediction"]
        said = predicted["class_name"] or ("" if predicted["class"] is None else predicted["class"])
        for entry in record["maps"]:
            yield [
                case, "done", "", label, said, entry["name"], entry["target"], entry["layer"] or "input",
                entry["status"], f"{entry['maximum']:.6g}", entry["unit"],
                *([f"{mm:.2f}" for mm in entry["peak_mm"]] if entry["peak_mm"] else [""] * 3),
                f"{case}/{entry['file']}",
            ]  # fmt: skip


_COLUMNS = (
    "case", "status", "error", "label", "prediction", "method", "target", "layer", "map_status", "maximum", "unit",
    "peak_x_mm", "peak_y_mm", "peak_z_mm", "file",
)  # fmt: skip


# What a record says of every map.
_MAP = frozenset(("name", "file", "sha256", "target", "layer", "status", "maximum", "unit", "peak_mm"))


def files_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The files that a case's record names beside itself, with the SHA-256 of each."""
    files = {}
    for entry in record["maps"]:
        files[entry["file"]] = entry["sha256"]
        if parts := entry.get("parts"):
            files[parts["file"]] = parts["sha256"]
            if "picture" in parts:
                files[parts["picture"]] = parts["picture_sha256"]
    return files


def safe_cell(cell: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets a leading apostrophe; numbers stay numbers."""
    text = one_line(str(cell))
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def one_line(text: str) -> str:
    """``text`` on one line, with nothing in it that UTF-8 cannot hold."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def _is_half_written(name: str) -> bool:
    return name.startswith(".volsal-")


def _not_written(path: Path, error: OSError) -> WriteError:
    return WriteError(f"{path}: could not be written: {error.strerror or error}")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb", buffering=0) as file:
            content = json.loads(file.read())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return None
    return content if _is_dict(content) else None


def _is_record(content: Mapping[str, Any]) -> bool:
    """Whether a ``case.json`` is one that volsal wrote, so that all that is asked of it is there."""
    maps = content.get("maps")
    return (
        _is_dict(content.get("provenance"))
        and _is_dict(content.get("prediction"))
        and isinstance(content.get("notes"), list)
        and isinstance(maps, list)
        and all(_is_dict(entry) and entry.keys() >= _MAP for entry in maps)
    )


def _is_dict(content: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(content, dict)


def _write(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=True) + "\n")
