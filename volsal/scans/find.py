"""Which scans a folder holds, and what to call them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from itertools import islice
from pathlib import Path

from volsal.scans.dicom_frames import is_dicom_file, is_regular
from volsal.scans.scan import ScanError

SUFFIXES = (".nii.gz", ".nii", ".hdr", ".nrrd", ".nhdr", ".mha", ".mhd")
_SEGMENTATION = ".seg.nrrd"  # 3D Slicer's
# No folder of Windows can have such a name.
_RESERVED = re.compile("con|prn|aux|nul|com[0-9]|lpt[0-9]")
# Room for the method, the target and the suffix in a file name of 255 bytes.
_LONGEST_ID = 96
# Files of a folder that are looked into for DICOM.
_SNIFFED = 8


def find_scans(folder: Path, pattern: str | None = None) -> Iterator[Path]:
    """Scan files below ``folder``, in name order; a folder that directly holds DICOM files is one scan.

    ``pattern`` is matched against the path relative to ``folder`` and against the file's name.  Hidden files and
    macOS's ``._`` twins are passed over, links to folders are not followed, and folders that hold a ``case.json`` are
    volsal's own results.
    """
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "case.json" in files:
            continue
        if _holds_dicom(Path(where), files) and _wanted(Path(where), folder, pattern):
            yield Path(where)
        for name in sorted(files):
            path = Path(where) / name
            if name.startswith(".") or not name.lower().endswith(SUFFIXES) or name.lower().endswith(_SEGMENTATION):
                continue
            if _wanted(path, folder, pattern):
                yield path


def _wanted(path: Path, folder: Path, pattern: str | None) -> bool:
    relative = path.relative_to(folder).as_posix()
    return pattern is None or fnmatch(relative, pattern) or fnmatch(path.name, pattern)


def _holds_dicom(where: Path, names: Iterable[str]) -> bool:
    """Whether one of the first few files of a folder is DICOM, by its first bytes; a DICOMDIR alone is no scan."""
    slices = (n for n in sorted(names) if not n.startswith(".") and not _suffix(n) and n.upper() != "DICOMDIR")
    paths = (where / name for name in islice(slices, _SNIFFED))
    return any(is_regular(path) and is_dicom_file(path) for path in paths)


@dataclass(frozen=True)
class FoundCase:
    """One case's files.

    Attributes
    ----------
    paths : one per channel, in the model's order; what there is of them where something is wrong
    fault : why the case cannot be explained: a channel is missing, or there twice.  It is counted, never dropped
    """

    paths: tuple[Path, ...]
    fault: str | None = None


def find_cases(
    folder: Path, pattern: str | None = None, channels: Sequence[str] = ()
) -> tuple[dict[str, FoundCase], int]:
    """The cases below ``folder`` by id, and how many scan files belong to none.

    Without ``channels`` every scan is a case.  With them, ``channels`` are the ways in which names end before the
    suffix; files whose names are alike but for that are one case.

    >>> find_cases(Path("data"), channels=["_flair", "_t1"])                       # doctest: +SKIP
    """
    paths = list(find_scans(folder, pattern))
    if not channels:
        return {case: FoundCase((path,)) for path, case in case_ids(paths, folder).items()}, 0
    groups: dict[Path, dict[str, list[Path]]] = {}
    for path in paths:
        ending = _ending(path, channels)
        if ending is not None:
            stem = path.name[: len(path.name) - len(_suffix(path.name))]
            case = path.with_name(stem.removesuffix(ending) or stem)
            groups.setdefault(case, {}).setdefault(ending, []).append(path)
    ids = case_ids(groups, folder)
    cases = {ids[case]: _gathered(found, channels) for case, found in groups.items()}
    return cases, len(paths) - sum(len(files) for found in groups.values() for files in found.values())


def in_order(paths: Sequence[Path], channels: Sequence[str]) -> list[Path]:
    """One case's files in the model's order, told by how their names end.

    Raises
    ------
    ScanError
        Where the files are not one of each channel.
    """
    ordered = {_ending(path, channels): path for path in paths}
    if len(paths) != len(channels) or set(ordered) != set(channels):
        raise ScanError(
            f"{', '.join(path.name for path in paths)}: the config's channels are {', '.join(channels)}, and a case "
            "has one file whose name ends in each"
        )
    return [ordered[ending] for ending in channels]


def _ending(path: Path, channels: Sequence[str]) -> str | None:
    """How the name ends before its suffix; the longest ending counts: "_t1" must not take what "_ce_t1" means."""
    stem = path.name[: len(path.name) - len(_suffix(path.name))]
    return max((ending for ending in channels if stem.endswith(ending)), key=len, default=None)


def _gathered(found: dict[str, list[Path]], channels: Sequence[str]) -> FoundCase:
    paths = tuple(path for channel in channels for path in found.get(channel, []))
    missing = [channel for channel in channels if channel not in found]
    if missing:
        return FoundCase(paths, f"the case's channel {' and '.join(missing)} is missing; the model needs all of them")
    twice = next((files for files in found.values() if len(files) > 1), None)
    if twice:
        names = " and ".join(path.name for path in twice)
        return FoundCase(paths, f"{names} are both the same channel of one case; keep one of them")
    return FoundCase(paths)


def _suffix(name: str) -> str:
    """The scan suffix at the end of ``name``, as it stands there; "" where there is none."""
    known = next((suffix for suffix in (*SUFFIXES, ".img") if name.lower().endswith(suffix)), "")
    return name[len(name) - len(known) :]


def case_id(path: Path) -> str:
    """A case's id from a (relative) path: lower-case ASCII letters, digits, ``.``, ``_`` and ``-``; never a path.

    >>> case_id(Path("site A/Müller.nii.gz"))
    'site-a-muller'
    """
    name = Path(path).as_posix() if not Path(path).is_absolute() else Path(path).name
    name = name[: len(name) - len(_suffix(name))]
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    reduced = re.sub(r"[^a-z0-9._]+", "-", plain).strip("-._")
    if not reduced or len(reduced) > _LONGEST_ID or _RESERVED.fullmatch(reduced.split(".")[0]):
        reduced = f"{reduced[: _LONGEST_ID - 9].strip('-._')}-{_short_hash(path)}".strip("-")
    return reduced


def case_ids(paths: Iterable[Path], folder: Path) -> dict[Path, str]:
    """An id of its own for every path: where two would be the same, both get a hash of their relative path."""
    # A folder that is itself a DICOM scan is called by its own name.
    relative = {path: path.relative_to(folder) if path != folder else Path(path.resolve().name) for path in paths}
    plain = {path: case_id(below) for path, below in relative.items()}
    shared = Counter(plain.values())
    return {
        path: name if shared[name] == 1 else f"{name}-{_short_hash(relative[path])}" for path, name in plain.items()
    }


def _short_hash(path: Path) -> str:
    return sha256(os.fsencode(path.as_posix())).hexdigest()[:8]
