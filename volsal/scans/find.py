"""Which scans a folder holds, which of them make one case, and what to call it."""

from __future__ import annotations

import hmac
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from volsal.scans.dicom_frames import is_dicom_file, is_regular
from volsal.scans.scan import ScanError

SUFFIXES = (".nii.gz", ".nii", ".hdr", ".nrrd", ".nhdr", ".mha", ".mhd")
# What a run folder holds beside the cases' own folders; ids do not begin with a dot, so hidden files are safe.
RUN_FILES = (
    "run.json", "inputs.json", "run.log.jsonl", "cases.csv", "cases.parquet", "audit.json", "audit.csv", "report",
    "report.html",
)  # fmt: skip
_RUN = frozenset(("run.json", "inputs.json"))  # what tells a run folder
_SEGMENTATION = ".seg.nrrd"  # 3D Slicer's
# No folder of Windows can have such a name.
_RESERVED = re.compile("con|prn|aux|nul|com[0-9]|lpt[0-9]")
# Room for the method, the target and the suffix in a file name of 255 bytes.
_LONGEST_ID = 96
# Files of a folder that are looked into for DICOM.
_SNIFFED = 8
_MAGIC = re.compile(r"[*?\[]")
# Six numbers or more, which no version and no network address has; roots of UIDs are 0, 1 and 2.
_UID = re.compile(r"(?<![0-9.])[0-2](?:\.(?:0|[1-9][0-9]*)){5,}(?![0-9])")

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Case:
    """What is to be explained as one, and what is known of it.

    Attributes
    ----------
    id : its name among the run's cases and in file names: lower-case ASCII, never a path
    paths : one per channel, in the model's order; what there is of them where something is wrong
    fault : why the case cannot be explained, such as a channel that is missing.  It is counted, never dropped
    label : what the case is known to be
    masks : name -> file, lesion masks or label maps to judge the maps by
    groups : column -> value, such as site, sex or scanner
    given : the model's other inputs, argument -> numbers, or a file
    patient : whose scan it is, where that is known; only to tell patients apart, and never written anywhere
    """

    id: str
    paths: tuple[Path, ...]
    fault: str | None = None
    label: str | None = None
    masks: Mapping[str, Path] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    given: Mapping[str, tuple[float, ...] | Path] = field(default_factory=dict)
    patient: str | None = None

    def describe(self) -> dict[str, Any]:
        """As plain data, without the id and the patient."""
        return {
            "paths": [_text(path) for path in self.paths],
            "fault": self.fault,
            "label": self.label,
            "masks": {name: _text(path) for name, path in self.masks.items()},
            "groups": dict(self.groups),
            "given": {name: _text(x) if isinstance(x, Path) else list(x) for name, x in self.given.items()},
        }


def _text(path: Path) -> str:
    # Not resolved: a link that leads to itself can be told, and not followed.
    return os.fsencode(path.absolute()).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Found:
    """What a look at the disk found.

    Attributes
    ----------
    scans : scan files, and folders that directly hold DICOM files, in name order
    folder : what their ids are relative to
    passed_over : what else was there -> how many
    """

    scans: tuple[Path, ...]
    folder: Path
    passed_over: Mapping[str, int]


@dataclass(frozen=True)
class Gathered:
    """The cases that scan files make.

    Attributes
    ----------
    cases : by id
    passed_over : what files belong to none -> how many
    alike : ids that would have been the same, and got a hash
    """

    cases: dict[str, Case]
    passed_over: Mapping[str, int]
    alike: tuple[str, ...]


def look(folder: Path, pattern: str | None = None) -> Found:
    """Scan files below ``folder``; a folder that directly holds DICOM files is one scan.

    ``pattern`` is matched against the path relative to ``folder`` and against the file's name.  Hidden files and
    macOS's ``._`` twins are passed over, links to folders are not followed, and run folders and folders that hold a
    ``case.json`` are volsal's own results.
    """
    scans: list[Path] = []
    over: Counter[str] = Counter()

    def unreadable(error: OSError) -> None:
        over["folders that cannot be read"] += 1

    for where, folders, files in os.walk(folder, onerror=unreadable):
        here = Path(where)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if _RUN.issubset(files) and here != Path(folder):
            over["run folders, with volsal's own results"] += 1
            folders.clear()  # also what a run that was killed left unfinished
            continue
        if "case.json" in files:
            over["folders of volsal's own results"] += 1
            continue
        over["links to folders, which are not followed"] += sum((here / name).is_symlink() for name in folders)
        names = [name for name in sorted(files) if _is_scan_name(name)]
        over["segmentations (.seg.nrrd)"] += sum(name.lower().endswith(_SEGMENTATION) for name in files)
        candidates = [here] * _holds_dicom(here, files) + [here / name for name in names]
        below = here.relative_to(folder).as_posix()
        wanted = [path for path in candidates if _wanted(path, here, below, pattern)]
        over[f"scans not like {pattern}"] += len(candidates) - len(wanted)
        scans += wanted
    return Found(tuple(scans), folder, +over)


def _wanted(path: Path, here: Path, below: str, pattern: str | None) -> bool:
    if pattern is None or fnmatch(path.name, pattern):
        return True
    return fnmatch(below if path == here else f"{below}/{path.name}".removeprefix("./"), pattern)


def _is_scan_name(name: str) -> bool:
    lower = name.lower()
    return lower.endswith(SUFFIXES) and not name.startswith(".") and not lower.endswith(_SEGMENTATION)


def match(patterns: Sequence[str], folder: Path) -> Found:
    """Scan files and DICOM folders that are like one of ``patterns``: globs relative to ``folder``, with ``**``.

    Ids are relative to the folder below which all patterns look.

    Raises
    ------
    ScanError
        Where a pattern makes no sense.
    """
    starts = [_start(pattern, folder) for pattern in patterns]
    top = Path(os.path.commonpath([start for start, _ in starts]))
    results = cache(lambda where: (where / "case.json").exists() or all((where.parent / f).exists() for f in _RUN))
    over: Counter[str] = Counter()
    matched: set[Path] = set()
    for pattern, (start, rest) in zip(patterns, starts, strict=True):
        try:
            those = {path for path in start.glob(rest) if not _is_hidden(path.relative_to(start))}
        except (ValueError, NotImplementedError) as error:
            raise ScanError(f"{pattern!r} is no pattern of paths: {error}") from error
        over[f"patterns that nothing is like ({pattern})"] += not those
        matched |= those
    folders = {
        path for path in matched if path.is_dir() and _holds_dicom(path, (below.name for below in path.iterdir()))
    }
    scans = set(folders)
    for path in matched - folders:
        if results(path.parent):
            over["files of volsal's own results"] += 1
        elif _is_scan_name(path.name) and not path.is_dir():
            scans.add(path)
        elif path.is_file() and path.parent not in folders:
            over["files whose names are not those of scans (name the folder of a DICOM series)"] += 1
    return Found(tuple(sorted(scans)), top, +over)


def _start(pattern: str, folder: Path) -> tuple[Path, str]:
    """The folder below which a pattern looks, and the rest of the pattern."""
    parts = Path(pattern).expanduser().parts
    fixed = next((n for n, part in enumerate(parts) if _MAGIC.search(part)), len(parts) - 1)
    rest = [*parts[fixed:], "*"] if parts[-1:] == ("**",) else parts[fixed:]
    return folder.joinpath(*parts[:fixed]).resolve(), "/".join(rest)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _holds_dicom(where: Path, names: Iterable[str]) -> bool:
    """Whether one of the first few files of a folder is DICOM, by its first bytes; a DICOMDIR alone is no scan."""
    slices = (n for n in sorted(names) if not n.startswith(".") and not suffix_of(n) and n.upper() != "DICOMDIR")
    paths = (where / name for name in islice(slices, _SNIFFED))
    return any(is_regular(path) and is_dicom_file(path) for path in paths)


def gather(
    paths: Sequence[Path], folder: Path, channels: Sequence[str] = (), masks: Mapping[str, str] | None = None
) -> Gathered:
    """The cases that scan files make.

    Without ``channels`` every scan is a case.  With them, ``channels`` are the ways in which names end before the
    suffix; files whose names are alike but for that are one case.  ``masks``, name -> ending, belong to the case whose
    name is alike but for that.

    >>> gather([Path("a/p1_flair.nii"), Path("a/p1_t1.nii")], Path("a"), ["_flair", "_t1"]).cases["p1"].paths[1].name
    'p1_t1.nii'
    """
    masks = masks or {}
    if not channels and not masks:
        return named({path: {"": [path]} for path in paths}, _below(paths, folder), [""], {}, {})
    endings = [*(channels or [""]), *masks.values()]
    groups: dict[Path, dict[str, list[Path]]] = {}
    others = 0
    for path in paths:
        ending = ending_of(path, endings)
        if ending is None:
            others += 1
        else:
            stem = stem_of(path)
            case = path.with_name(stem.removesuffix(ending) or stem)
            groups.setdefault(case, {}).setdefault(ending, []).append(path)
    over = {f"scan files whose names end in none of {', '.join(endings)}": others} if others else {}
    return named(groups, _below(groups, folder), channels or [""], masks, over)


def named(
    groups: Mapping[Key, Mapping[str, list[Path]]],
    sources: Mapping[Key, Path],
    channels: Sequence[str],
    masks: Mapping[str, str],
    passed_over: Mapping[str, int],
) -> Gathered:
    """Cases of groups of files, which are given by the endings of their names; ids are made from ``sources``."""
    scans = {key: found for key, found in groups.items() if found.keys() & set(channels)}
    over = dict(passed_over)
    if len(scans) < len(groups):
        over["masks without a scan"] = len(groups) - len(scans)
    ids, alike = apart({key: sources[key].as_posix() for key in scans})
    cases = {ids[key]: _case(ids[key], found, channels, masks) for key, found in scans.items()}
    return Gathered(cases, over, alike)


def in_order(paths: Sequence[Path], channels: Sequence[str]) -> list[Path]:
    """One case's files in the model's order, told by how their names end.

    Raises
    ------
    ScanError
        Where the files are not one of each channel.
    """
    ordered = {ending_of(path, channels): path for path in paths}
    if len(paths) != len(channels) or set(ordered) != set(channels):
        raise ScanError(
            f"{', '.join(path.name for path in paths)}: the config's channels are {', '.join(channels)}, and a case "
            "has one file whose name ends in each"
        )
    return [ordered[ending] for ending in channels]


def ending_of(path: Path, channels: Sequence[str]) -> str | None:
    """How the name ends before its suffix; the longest ending counts: "_t1" must not take what "_ce_t1" means."""
    stem = stem_of(path)
    return max((ending for ending in channels if stem.endswith(ending)), key=len, default=None)


def _case(case: str, found: Mapping[str, list[Path]], channels: Sequence[str], masks: Mapping[str, str]) -> Case:
    """The case that the files of each ending make: with a fault where they are not one of each channel."""
    paths = tuple(path for channel in channels for path in found.get(channel, []))
    beside = {name: found[ending][0] for name, ending in masks.items() if ending in found}
    return Case(case, paths, _fault(found, channels), masks=beside)


def _fault(found: Mapping[str, list[Path]], channels: Sequence[str]) -> str | None:
    missing = [channel for channel in channels if channel not in found]
    if missing:
        return f"the case's channel {' and '.join(missing)} is missing; the model needs all of them"
    for ending, files in found.items():
        if len(files) > 1:
            names = " and ".join(path.name for path in files)
            return (
                f"{names} are both the same {'channel' if ending in channels else 'mask'} of one case; keep one of them"
            )
    return None


def stem_of(path: Path) -> str:
    """The file's name without its scan suffix."""
    return path.name[: len(path.name) - len(suffix_of(path.name))]


def suffix_of(name: str) -> str:
    """The scan suffix at the end of ``name``, as it stands there; "" where there is none."""
    lower = name.lower()
    known = next((suffix for suffix in (*SUFFIXES, ".img") if lower.endswith(suffix)), "")
    return name[len(name) - len(known) :]


def case_id(path: Path) -> str:
    """A case's id from a (relative) path: lower-case ASCII letters, digits, ``.``, ``_`` and ``-``; never a path.

    >>> case_id(Path("site A/Müller.nii.gz"))
    'site-a-muller'
    """
    name = path.name if path.is_absolute() else path.as_posix()
    name = name[: len(name) - len(suffix_of(name))]
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    reduced = re.sub(r"[^a-z0-9._]+", "-", plain).strip("-._")
    taken = _RESERVED.fullmatch(reduced.split(".")[0]) or reduced in RUN_FILES
    if not reduced or len(reduced) > _LONGEST_ID or taken:
        reduced = f"{reduced[: _LONGEST_ID - 9].strip('-._')}-{_hash(path.as_posix(), 8)}".strip("-")
    return reduced


def _below(paths: Iterable[Path], folder: Path) -> dict[Path, Path]:
    # A folder that is itself a DICOM scan is called by its own name.
    return {path: path.relative_to(folder) if path != folder else Path(path.resolve().name) for path in paths}


def apart(sources: Mapping[Key, str]) -> tuple[dict[Key, str], tuple[str, ...]]:
    """An id made from every source, each its own, and those that would have been the same and so got a hash."""
    plain = {key: case_id(Path(source)) for key, source in sources.items()}
    ids = plain
    for digits in (8, 16):  # twice: an id with its hash may be what another case is called
        times = Counter(ids.values())
        ids = {
            key: name if times[name] == 1 else f"{plain[key]}-{_hash(sources[key], digits)}"
            for key, name in ids.items()
        }
    return ids, tuple(ids[key] for key in ids if ids[key] != plain[key])


def _hash(text: str, digits: int) -> str:
    return sha256(os.fsencode(text)).hexdigest()[:digits]


def pseudonym(text: str, salt: bytes) -> str:
    """What stands for an identifier in records: the same for the same ``text`` and ``salt``, and not to be undone.

    12 hexadecimal digits of HMAC-SHA256 (RFC 2104) keyed with ``salt``, random bytes that stay in the run folder.
    Among a million identifiers, two share one with a chance of 0.002.
    """
    return hmac.digest(salt, os.fsencode(text), "sha256").hex()[:12]


def without_uids(text: str, salt: bytes) -> str:
    """``text``, such as an error's, with the :func:`pseudonym` of every DICOM UID in place of it."""
    return _UID.sub(lambda found: pseudonym(found[0], salt), text)
