"""Which cases a run has: from folders, patterns, BIDS datasets and tables, with what is known of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from volsal.batch.tables import Known, Roles, Row, Table, known, read_table, several
from volsal.config import ColumnsSection, Config, ConfigError, ScansSection, exists, require_files
from volsal.scans.bids import find_bids, session_of
from volsal.scans.find import Case, Found, apart, case_id, gather, look, match, stem_of
from volsal.scans.scan import ScanError


@dataclass(frozen=True)
class Cases:
    """The cases of a run.

    Attributes
    ----------
    cases : by id, in the order in which they are done
    source : where they come from, to stand behind "12 cases": "below FOLDER", "in TABLE"
    folder : what the ids of scans found are relative to
    notes : what was passed over, and what of a table has no case; a sentence each
    """

    cases: dict[str, Case]
    source: str
    folder: Path
    notes: tuple[str, ...] = ()


def cases_of(config: Config) -> Cases:
    """The cases that a config names.  Scans themselves are not opened, so thousands take a second.

    Raises
    ------
    ConfigError
        Where the config names no scans, or what it names is not there or makes no sense; with the table's line.
    """
    section = config.scans
    if section is None:
        raise ConfigError(f"{config.path}: scans: missing; a run needs 'scans: {{folder: ...}}'")
    # What only the audit reads is told too, and not when the run is over.
    require_files(config, "scans", "audit")
    try:
        if section.table:
            found = _of_table(section, config.folder)
        elif section.bids:
            found = _of_bids(section, config.folder)
        elif section.files:
            found = _of_files(section, config.folder)
        else:
            found = _of_folder(section, config.folder)
    except (ScanError, ConfigError) as error:
        raise ConfigError(f"{config.path}: scans.{_source(section)}: {error}") from error
    if section.labels:
        try:
            table = read_table(_path(config.folder, section.labels))
            found = _with_known(found, table, section.columns, _entities if section.bids else _places)
        except ConfigError as error:
            raise ConfigError(f"{config.path}: scans.labels: {error}") from error
    return found


def _source(section: ScansSection) -> str:
    return next(name for name in ("table", "bids", "files", "folder") if getattr(section, name))


def _path(folder: Path, name: str) -> Path:
    return folder / Path(name).expanduser()


def _folder(folder: Path, name: str) -> Path:
    path = _path(folder, name)
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder")
    return path


def _of_folder(section: ScansSection, folder: Path) -> Cases:
    source = _folder(folder, str(section.folder))
    return _gathered(look(source, section.pattern), section, section.pattern or "scan", f"below {source}")


def _of_files(section: ScansSection, folder: Path) -> Cases:
    patterns = " or ".join(section.files)
    return _gathered(match(section.files, folder), section, "scan", f"like {patterns} from {folder}")


def _gathered(found: Found, section: ScansSection, wanted: str, source: str) -> Cases:
    gathered = gather(found.scans, found.folder, section.channels, section.masks)
    over = {**found.passed_over, **gathered.passed_over}
    if not gathered.cases:
        ending = f" with a name that ends in {' or '.join(section.channels)}" if section.channels else ""
        raise ConfigError("; ".join([f"no {wanted}{ending} {source}", *_passed_over(over)]))
    return Cases(gathered.cases, source, found.folder, _notes(over, gathered.alike))


def _of_bids(section: ScansSection, folder: Path) -> Cases:
    root = _folder(folder, str(section.bids))
    found = find_bids(root, section.channels, section.pattern, section.masks)
    source = f"in the BIDS dataset {root}"
    if not found.cases:
        wanted = f"no {' or '.join(section.channels) or 'scan'} {source}"
        raise ConfigError("; ".join([wanted, *_passed_over(found.passed_over)]))
    cases = Cases(found.cases, source, root, _notes(found.passed_over, found.alike))
    table = _participants(root)
    if table is not None and not section.labels:
        columns = section.columns.model_copy(update={"id": "participant_id"})
        cases = _with_known(cases, table, columns, _entities)
    # A row of a session is called by it as well; the file's name says the subject alone.
    of_subjects = {name: replace(case, patient=session_of(case.paths[0])[0]) for name, case in cases.cases.items()}
    return cases if section.columns.patient else replace(cases, cases=of_subjects)


def _passed_over(over: Mapping[str, int]) -> list[str]:
    return [f"passed over: {count} {what}" for what, count in over.items()]


def _notes(over: Mapping[str, int], alike: Sequence[str]) -> tuple[str, ...]:
    alike_note = [f"{len(alike)} cases have ids alike, and got a hash each: {several(alike)}"] if alike else []
    return (*_passed_over(over), *alike_note)


def _of_table(section: ScansSection, folder: Path) -> Cases:
    table = read_table(_path(folder, str(section.table)))
    base = _folder(folder, section.folder) if section.folder else table.path.parent
    roles = Roles.of(table, section.columns)
    if not roles.scan:
        raise ConfigError(
            f"{table.path}:1: which column names the scans? say 'columns: {{scan: ...}}'; there are "
            f"{several(table.columns)}.  A table that only adds to scans is 'labels'"
        )
    rows = _by_id(table, roles)
    ids, alike = apart({name: name for name in rows})
    cases, facts = {}, {}
    for name, row in rows.items():
        fact = facts[ids[name]] = known(roles, row, base)
        cells = [row.cells[place] for place in roles.scan]
        paths = tuple(base / cell for cell in cells if cell)
        missing = [cell or "an empty cell" for cell in cells if not cell or not exists(base / cell)]
        fault = f"no such file: {several(missing)} ({row.at})" if missing else fact.fault
        cases[ids[name]] = Case(ids[name], paths, fault, **fact.fields)
    if not cases:
        raise ConfigError(f"{table.path}: the table has no rows but the one that names the columns")
    return Cases(cases, f"in {table.path}", base, (*_notes({}, alike), *_absent_masks(facts)))


def _by_id(table: Table, roles: Roles) -> dict[str, Row]:
    """Every row by the id it gives its case: what stands in its column, or the scan's path where there is none."""
    rows: dict[str, Row] = {}
    mistakes = []
    place = roles.scan[0] if roles.id is None else roles.id
    for row in table.rows:
        name = row.cells[place]
        if not name:
            mistakes.append(f"{row.at}: the id is empty (column {table.columns[place]!r})")
        elif name in rows:
            mistakes.append(
                f"{row.at}: the id {name!r} is that of line {rows[name].line} too (column {table.columns[place]!r})"
            )
        else:
            rows[name] = row
    if mistakes:
        raise ConfigError(
            f"{several(mistakes)}; every case needs an id of its own: mend the table, or say 'columns: {{id: ...}}'; "
            "the scan's column will do"
        )
    return rows


def _absent_masks(facts: Mapping[str, Known]) -> tuple[str, ...]:
    absent = [f"{case} ({name})" for case, fact in facts.items() for name in fact.absent]
    return (f"{len(absent)} masks are not there: {several(absent)}",) if absent else ()


def _with_known(found: Cases, table: Table, columns: ColumnsSection, keys: Callable[[Case, Path], list[str]]) -> Cases:
    """``found`` with what the rows of ``table`` say.  A case's row is the one that has the first of its ``keys``."""
    roles = Roles.of(table, columns)
    if roles.id is None:
        raise ConfigError(
            f"{table.path}:1: which column names the cases? say 'columns: {{id: ...}}'; there are "
            f"{several(table.columns)}"
        )
    rows: dict[str, Row] = {}
    for name, row in _by_id(table, roles).items():
        if (other := rows.setdefault(case_id(Path(name)), row)) is not row:
            raise ConfigError(f"{row.at}: the id {name!r} is that of line {other.line} too, but for its spelling")
    cases, facts, used = {}, {}, set()
    for case in found.cases.values():
        own = [key for key in keys(case, found.folder) if key in rows]
        used.update(own)
        if own:
            fact = facts[case.id] = known(roles, rows[own[0]], table.path.parent)
            masks, patient = {**case.masks, **fact.fields["masks"]}, fact.fields["patient"] or case.patient
            fields = {**fact.fields, "masks": masks, "patient": patient}
            cases[case.id] = replace(case, fault=case.fault or fact.fault, **fields)
        else:
            fault = f"no row of {table.path.name} has its inputs for the model" if roles.given else None
            cases[case.id] = replace(case, fault=case.fault or fault)
    notes = [*found.notes, *_absent_masks(facts)]
    if without := [case for case in cases if case not in facts]:
        notes.append(f"{len(without)} cases have no row in {table.path.name}: {several(without)}")
    if spare := [f"{key} (line {row.line})" for key, row in rows.items() if key not in used]:
        notes.append(f"{len(spare)} rows of {table.path.name} belong to no case: {several(spare)}")
    return replace(found, cases=cases, notes=tuple(notes))


def _places(case: Case, folder: Path) -> list[str]:
    """What a row may call a case: by its id, its file's name, or one of the folders that it lies in."""
    path = case.paths[0]
    parts = path.relative_to(folder).parts[:-1] if path != folder else ()
    return [case.id, *(case_id(Path(name)) for name in (stem_of(path), *reversed(parts)))]


def _entities(case: Case, folder: Path) -> list[str]:
    """What a row may call a case of a BIDS dataset: by its id, its session or its subject."""
    subject = session_of(case.paths[0])
    names = ["_".join(subject), subject[0], subject[0].removeprefix("sub-")]
    return [case.id, *(case_id(Path(name)) for name in names)]


def _participants(root: Path) -> Table | None:
    """``participants.tsv`` of a dataset, or of the one it is a derivative of, with a row for every session known.

    A session's row says what its ``sub-*_sessions.tsv`` says, and else what the subject's row says.
    """
    above = root.resolve().parents
    tops = [root, above[1]] if above[0].name == "derivatives" else [root]
    top = next((top for top in tops if (top / "participants.tsv").is_file()), None)
    if top is None:
        return None
    table = read_table(top / "participants.tsv")
    table.index("participant_id")
    sessions = [(path.parent.name, read_table(path)) for path in sorted(top.glob("sub-*/sub-*_sessions.tsv"))]
    columns = dict.fromkeys([*table.columns, *(column for _, session in sessions for column in session.columns)])
    rows = [(row, dict(zip(table.columns, row.cells, strict=True))) for row in table.rows]
    subjects = {cells["participant_id"]: cells for _, cells in rows}
    for subject, session in sessions:
        session.index("session_id")
        for row in session.rows:
            own = dict(zip(session.columns, row.cells, strict=True))
            cells = subjects.get(subject, {}) | {column: cell for column, cell in own.items() if cell}
            rows.append((row, cells | {"participant_id": f"{subject}_{own['session_id']}"}))
    filled = (Row(row.path, row.line, [cells.get(column, "") for column in columns]) for row, cells in rows)
    return Table(table.path, tuple(columns), tuple(filled))
