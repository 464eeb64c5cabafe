"""What a run would do, found out without doing it: nothing is written.

Of scans no more than headers are read, but for those of which an earlier run left something: whether that still holds
is told by all their bytes.
"""

from __future__ import annotations

import gzip
import math
import os
import shutil
import struct
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from volsal.batch.cases import Cases
from volsal.batch.earlier import Standing
from volsal.batch.tables import several
from volsal.config import exists
from volsal.errors import VolsalError
from volsal.scans.dicom_frames import is_regular, regular_files
from volsal.scans.find import Case

# Headers that are read, and DICOM folders whose files are counted; with more, evenly spread ones stand for all.
_HEADERS, _FOLDERS = 500, 100
_SHOWN = 10
_UNITS = ("bytes", "kB", "MB", "GB", "TB")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes
    ----------
    cases : how many there are, and ``source`` where they come from
    faults : id -> why the case cannot be explained
    standing : how many of the others have a result that holds (``done``), one or a fault that does not, since what it
        depends on has changed (``changed``), a fault that would only happen again (``faulty``), or nothing (``new``)
    left : how many of them the run would do: those new and changed, and with ``retry`` those faulty
    missing : id -> files of the case that are not there: scans, masks, other inputs
    twice : sets of ids whose cases have a scan file in common, by whatever name
    notes : what was passed over, and what of a table has no case
    bytes : of all scan files; an estimate where ``folders_measured`` says that only so many DICOM folders were measured
    voxels : of the first channel of all cases, on which maps are written; from the ``headers_read`` of NIfTI files, the
        other cases being taken for as large on average.  None where none could be read; ``voxels_left`` of those left
    labels, groups : how many cases have which label, and which value in each column; "" where none is given
    maps : per case; ``result_bytes`` for those of the cases left, at ``bytes_per_voxel``, before compression
    free_bytes : where the results would go
    timed : id -> seconds that the case took, for the case of median size and the largest; and ``untimed``, id -> why
        that case could not be timed
    seconds : for all cases that are left, on ``workers``; None without times
    """

    cases: int
    source: str
    faults: Mapping[str, str]
    standing: Mapping[Standing, int]
    left: int
    retry: bool
    missing: Mapping[str, tuple[str, ...]]
    twice: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    bytes: int
    folders_measured: int | None
    voxels: int | None
    headers_read: int
    voxels_left: int | None
    labels: Mapping[str, int]
    groups: Mapping[str, Mapping[str, int]]
    maps: int
    bytes_per_voxel: float
    free_bytes: int
    workers: int
    timed: Mapping[str, float]
    untimed: Mapping[str, str]
    seconds: float | None

    @property
    def result_bytes(self) -> int | None:
        """What the maps would take without compression; files are gzipped and end up smaller."""
        return None if self.voxels_left is None else math.ceil(self.voxels_left * self.maps * self.bytes_per_voxel)

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"result_bytes": self.result_bytes}

    def lines(self) -> list[str]:
        """As lines for a person."""
        return [line for line in chain(self._inputs(), self._size(), self._space(), self._time()) if line]

    def _inputs(self) -> list[str]:
        lost = [f"{case}: {', '.join(files)}" for case, files in self.missing.items() if case not in self.faults]
        return [
            f"{self.cases} cases {self.source}",
            f"{len(self.faults)} cannot be explained" if self.faults else "",
            *(f"  {case}: {why}" for case, why in islice(self.faults.items(), _SHOWN)),
            f"  and {len(self.faults) - _SHOWN} more" if len(self.faults) > _SHOWN else "",
            f"{len(lost)} more name files that are not there: {several(lost)}" if lost else "",
            f"the same scan in several cases: {several([' = '.join(ids) for ids in self.twice])}" if self.twice else "",
            self._there(),
            *self.notes,
            _counts("label", self.labels),
            *(_counts(column, values) for column, values in self.groups.items()),
        ]

    def _there(self) -> str:
        """What of an earlier run is there, and what becomes of it."""
        if not self.standing.keys() - {"new"}:
            return ""
        faulty = "tried again" if self.retry else "left so: --retry-failed tries them again"
        told: dict[Standing, str] = {
            "done": "done and kept",
            "changed": "done again, since what they depend on has changed",
            "faulty": f"refused or failed before, and as they were ({faulty})",
            "new": "new",
        }
        return "; ".join(f"{self.standing[one]} {words}" for one, words in told.items() if one in self.standing)

    def _size(self) -> list[str]:
        how = f" (from {self.folders_measured} DICOM folders)" if self.folders_measured else ""
        voxels = "" if self.voxels is None else f", {self.voxels:,} voxels (from {self.headers_read} headers)"
        return [f"scans: {_bytes(self.bytes)}{how}{voxels}"]

    def _space(self) -> list[str]:
        if not self.left:
            return ["nothing is left to do"]
        if self.result_bytes is None:
            return [
                f"results: {self.maps} maps per case; their size is not known, and {_bytes(self.free_bytes)} are free"
            ]
        short = " - NOT ENOUGH unless they compress well" if self.result_bytes > self.free_bytes else ""
        return [
            f"results: {self.maps} maps per case, at most {_bytes(self.result_bytes)} in all{self._of_left()}; "
            f"{_bytes(self.free_bytes)} are free{short}"
        ]

    def _time(self) -> list[str]:
        lines = [f"{case} could not be timed: {why}" for case, why in self.untimed.items()]
        if self.seconds is None:
            return lines
        timed = " and ".join(f"{case} {seconds:.3g} s" for case, seconds in self.timed.items())
        workers = f"{self.workers} workers" if self.workers > 1 else "1 worker"
        return [*lines, f"time: about {_duration(self.seconds)} with {workers}{self._of_left()}; timed: {timed}"]

    def _of_left(self) -> str:
        return "" if self.left == self.cases - len(self.faults) else f" for the {self.left} cases that are left"


def plan(
    found: Cases,
    output: Path,
    maps: int,
    bytes_per_voxel: float = 4.0,
    workers: int = 1,
    time_case: Callable[[Case], float] | None = None,
    standing: Mapping[str, Standing] | None = None,
    retry: bool = False,
) -> Plan:
    """What a run over the cases ``found`` would do.

    Parameters
    ----------
    output : the run folder, which need not exist
    maps : per case, each of the scan's own voxels
    bytes_per_voxel : of a map
    workers : cases that are done at a time
    time_case : does a case and returns the seconds it took.  Of what is left two are timed: that of median size in
        bytes and the largest.  Time is taken to grow linearly with size between them; a VolsalError is noted
    standing : id -> what earlier runs left of the case; nothing where it is not named
    retry : whether cases with a fault that would only happen again are tried again
    """
    sizes, measured = _sizes(found.cases)
    voxels, read = _voxels_of(found.cases)
    sound = [case for case in found.cases.values() if not case.fault]
    stands = {case.id: (standing or {}).get(case.id, "new") for case in sound}
    kept = {"done"} if retry else {"done", "faulty"}
    left = {case.id: case for case in sound if stands[case.id] not in kept}
    timed, untimed = _timed(sorted(left.values(), key=lambda case: sizes[case.id]), time_case)
    columns = dict.fromkeys(column for case in found.cases.values() for column in case.groups)
    labelled = any(case.label for case in found.cases.values())
    missing = {case.id: tuple(str(path) for path in _files(case) if not exists(path)) for case in found.cases.values()}
    return Plan(
        len(found.cases),
        found.source,
        {case.id: case.fault for case in found.cases.values() if case.fault},
        dict(Counter(stands.values())),
        len(left),
        retry,
        {case: paths for case, paths in missing.items() if paths},
        _twice(found.cases.values()),
        found.notes,
        sum(sizes.values()),
        measured,
        voxels,
        read,
        voxels if len(left) == len(found.cases) else _voxels_of(left)[0],
        _count(case.label or "" for case in found.cases.values()) if labelled else {},
        {column: _count(case.groups.get(column, "") for case in found.cases.values()) for column in columns},
        maps,
        bytes_per_voxel,
        _free(output),
        workers,
        timed,
        untimed,
        _seconds(timed, sizes, list(left), workers),
    )


def _files(case: Case) -> list[Path]:
    """All files that a case names."""
    return [*case.paths, *case.masks.values(), *(value for value in case.given.values() if isinstance(value, Path))]


def _twice(cases: Iterable[Case]) -> tuple[tuple[str, ...], ...]:
    """Sets of cases that share a scan file, told by the file itself, so that links to it count."""
    owners: dict[tuple[int, int], list[str]] = defaultdict(list)
    for case in cases:
        for path in filter(exists, case.paths):
            file = path.stat()
            owners[file.st_dev, file.st_ino].append(case.id)
    shared = (tuple(dict.fromkeys(ids)) for ids in owners.values())
    return tuple(dict.fromkeys(ids for ids in shared if len(ids) > 1))


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _spread(items: Sequence[Item], most: int) -> list[Item]:
    """Up to ``most`` of ``items``, evenly spread."""
    return [items[n * len(items) // most] for n in range(most)] if len(items) > most else list(items)


def _sizes(cases: Mapping[str, Case]) -> tuple[dict[str, int], int | None]:
    """Bytes of every case's scan files; and how many DICOM folders were measured, where that is not all of them."""
    folders = [path for case in cases.values() for path in case.paths if os.path.isdir(path)]  # noqa: PTH112
    measured = {path: sum(file.stat().st_size for file in regular_files(path)) for path in _spread(folders, _FOLDERS)}
    usual = round(fmean(measured.values())) if measured else 0
    held = {path: measured.get(path, usual) for path in folders}
    sizes = {case.id: sum(held[p] if p in held else _file_size(p) for p in case.paths) for case in cases.values()}
    return sizes, len(measured) if len(measured) < len(folders) else None


def _file_size(path: Path) -> int:
    parts = (path, path.with_suffix(".img")) if path.suffix.lower() == ".hdr" else (path,)
    return sum(part.stat().st_size for part in parts if exists(part))


def _voxels_of(cases: Mapping[str, Case]) -> tuple[int | None, int]:
    """Voxels of all cases' first channels, and from how many headers that is known."""
    paths = [case.paths[0] for case in cases.values() if case.paths]
    known = [path for path in paths if path.name.lower().endswith((".nii", ".nii.gz", ".hdr"))]
    read = [voxels for path in _spread(known, _HEADERS) if (voxels := header_voxels(path))]
    return (round(fmean(read) * len(paths)), len(read)) if read else (None, 0)


def header_voxels(path: Path) -> int | None:
    """Voxels of one volume by a NIfTI header (Cox et al. 2004; NIfTI-2, 2011); None where there is none to read."""
    if not is_regular(path):
        return None
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            start = gzip.GzipFile(fileobj=raw).read(80) if zipped else raw.read(80)
    except (OSError, EOFError, zlib.error):
        return None
    for order in "<>":
        for size, place, form in ((348, 40, "8h"), (540, 16, "8q")):
            if len(start) == 80 and struct.unpack_from(f"{order}i", start)[0] == size:
                axes, *shape = struct.unpack_from(order + form, start, place)
                return math.prod(shape[: min(axes, 3)]) if axes > 0 and min(shape[: min(axes, 3)]) > 0 else None
    return None


def _free(output: Path) -> int:
    there = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(there).free


def _timed(
    by_size: Sequence[Case], time_case: Callable[[Case], float] | None
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of the case of median size and of the largest; and why one has none."""
    times: dict[str, float] = {}
    faults: dict[str, str] = {}
    if time_case is None or not by_size:
        return times, faults
    for case in dict.fromkeys(((len(by_size) - 1) // 2, len(by_size) - 1)):
        try:
            times[by_size[case].id] = time_case(by_size[case])
        except VolsalError as error:
            faults[by_size[case].id] = str(error)
    return times, faults


def _seconds(timed: Mapping[str, float], sizes: Mapping[str, int], cases: Sequence[str], workers: int) -> float | None:
    """For all ``cases``: each takes what lies on the line through the two that were timed."""
    if not timed:
        return None
    pairs = [(sizes[case], seconds) for case, seconds in timed.items()]
    (small, least), (large, most) = pairs[0], pairs[-1]
    slope = max(0.0, (most - least) / (large - small)) if large > small else 0.0
    total = sum(max(0.0, least + slope * (sizes[case] - small)) for case in cases)
    return max(total / workers, most)


def _counts(name: str, values: Mapping[str, int]) -> str:
    shown = [f"{value or '(none)'} {count}" for value, count in values.items()]
    return f"{name}: {several(shown)}" if shown else ""


def _bytes(count: int) -> str:
    """As 3.4 GB, in steps of 1000."""
    step = min((len(str(count)) - 1) // 3, len(_UNITS) - 1)
    return f"{count / 1000**step:.1f} {_UNITS[step]}" if step else f"{count} bytes"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
