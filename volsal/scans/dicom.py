"""DICOM in: a folder of slices, or one enhanced multi-frame file.

``read`` answers for one volume or refuses in a sentence: it never guesses a series, a slice or a place.  The steps are
a module each: headers to frames (:mod:`~volsal.scans.dicom_frames`), frames to a grid
(:mod:`~volsal.scans.dicom_stack`), pixels in a child process (:mod:`~volsal.scans.dicom_decode`).  What no reader can
notice is slices that are missing at an end of the stack.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from volsal.scans.dicom_decode import decode, require_decodable
from volsal.scans.dicom_frames import (
    UNSPOKEN,
    Frame,
    Refused,
    Survey,
    groups,
    is_dicom_file,
    is_regular,
    regular_files,
    survey,
)
from volsal.scans.dicom_stack import Stack, arrange
from volsal.scans.digest import sha256_of
from volsal.scans.limits import LIMIT_VARIABLE, most_voxels
from volsal.scans.scan import Reading, Scan, ScanError, fill

_SHOWN = 6
_SNIFFED = 2000


@dataclass(frozen=True)
class Series:
    """What could be one volume: a DICOM series, or the part of one with a single orientation, echo or time point.

    Attributes
    ----------
    number : in the listing, from 1; a choice
    uid : SeriesInstanceUID; a choice where only one entry has it
    description : SeriesDescription.  Free text, which may name a person: shown where a listing was asked for, only
    part : what tells this part of a series from its others, or ""
    modality, slices, rows, columns : as the headers say
    spacing : (columns, rows, slices) mm; None where it is no volume
    problem : why it cannot be read, or ""
    """

    number: int
    uid: str
    modality: str
    slices: int
    rows: int
    columns: int
    part: str
    description: str = field(repr=False)
    spacing: tuple[float, ...] | None
    problem: str
    frames: tuple[Frame, ...] = field(repr=False)

    def __str__(self) -> str:
        part = f", {self.part}" if self.part else ""
        plural = "s" * (self.slices != 1)
        size = f"{self.slices} slice{plural} of {self.columns} x {self.rows}"
        return f"{self.number}: {self.modality}, {size}{part}, {self.uid}"


def sniff(path: Path) -> bool:
    """Whether ``path`` is a DICOM file, or a folder with one among its first files."""
    if not path.is_dir():
        return is_regular(path) and is_dicom_file(path)
    return any(is_dicom_file(file) for file, _ in zip(regular_files(path), range(_SNIFFED), strict=False))


def read(path: Path, reading: Reading) -> Scan:
    """The scan in a DICOM folder or file; see :func:`volsal.scans.read_scan`.

    ``reading.series`` chooses where there are several: a UID, a number of the listing, or a part of one description.
    ``reading.slices`` = "resample" accepts slices that lie unevenly.
    """
    _require_pydicom(path)
    if reading.volume not in (None, 0):
        raise ScanError(
            f"{path}: volume {reading.volume} asked for; in DICOM choose a series or time point with --series"
        )
    with _refusing(path):
        found, listed = _listing(path)
        chosen = _choose(listed, reading.series)
        _require_no_lost_slice(path, found, chosen)
        frames, notes = _without_duplicates(chosen.frames)
        require_decodable(frames)
        stack = arrange(frames, reading.slices == "resample")
        _require_sensible(stack)
        array = _volume(stack)
        files = {frame.source.path for frame in frames}
        sha256, size = digest(files), sum(file.stat().st_size for file in files)
    notes += [*stack.notes, *_passed_over(path, found), *fill(path, array, reading)]
    return Scan(
        array,
        stack.grid,
        path,
        sha256=sha256,
        notes=tuple(notes),
        filled=reading.nan,
        series=_name_for_good(listed, chosen),
        slices=reading.slices,
        size=size,
    )


def list_series(path: str | Path) -> list[Series]:
    """What could be read from a DICOM folder or file, in the order in which ``series`` counts.

    Raises
    ------
    ScanError
        Where there is no DICOM image, or one of the files is damaged.
    """
    path = Path(path)
    _require_pydicom(path)
    with _refusing(path):
        return _listing(path)[1]


def stack_of(path: Path, series: str | None = None) -> Stack:
    """Where the slices of a series lie, in order; ``at`` is set where they lie unevenly.  No pixels are read.

    Raises
    ------
    ScanError
        As :func:`read` does.
    """
    _require_pydicom(path)
    with _refusing(path):
        frames, _ = _without_duplicates(_choose(_listing(path)[1], series).frames)
        return arrange(frames, resample=True)


def files(path: Path) -> list[Path]:
    """The files that can matter to the scan at ``path``, a DICOM folder or file."""
    if path.is_dir():
        return [file for file in regular_files(path) if is_dicom_file(file)]
    return [path]


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Whatever stops the reading, as one line that begins with the path."""
    try:
        yield
    except Refused as error:
        raise ScanError(f"{path}: {error}") from None
    except OSError as error:
        name = Path(os.fsdecode(error.filename)).name if isinstance(error.filename, (str, bytes)) else ""
        raise ScanError(f"{path}: {name}: {error.strerror or error}") from error
    except MemoryError as error:
        raise ScanError(f"{path}: not enough memory on this machine for its voxels") from error


def _require_pydicom(path: Path) -> None:
    if importlib.util.find_spec("pydicom") is None:
        raise ScanError(f'{path}: reading DICOM needs pydicom: pip install "volsal[dicom]"')


def _listing(path: Path) -> tuple[Survey, list[Series]]:
    found = survey(path, regular_files(path)) if path.is_dir() else _beside(path)
    if not found.frames:
        raise Refused("no DICOM image among its files")
    parts = groups(found.frames)
    uids = Counter(part[0].source.series for part in parts)
    named = _differences(parts)
    return found, [
        _entry(number, part, name if uids[part[0].source.series] > 1 else "")
        for number, (part, name) in enumerate(zip(parts, named, strict=True), 1)
    ]


def _beside(path: Path) -> Survey:
    """The series of one file: itself where it is multi-frame, else the files of its series in its own folder."""
    own = survey(path.parent, [path])
    if not own.frames or own.frames[0].source.frames > 1:
        return own
    found = survey(path.parent, (file for file in regular_files(path.parent) if file.parent == path.parent))
    found.frames = [frame for frame in found.frames if frame.source.series == own.frames[0].source.series]
    return found


def _entry(number: int, frames: Sequence[Frame], part: str) -> Series:
    source = frames[0].source
    spacing, problem = None, ""
    try:
        unique, _ = _without_duplicates(frames)
        require_decodable(unique)
        spacing = tuple(float(mm) for mm in arrange(unique).grid.spacing)
    except Refused as error:
        problem = str(error)
    return Series(
        number, source.series, source.modality, len(frames), source.rows, source.columns, part, source.description,
        spacing, problem, tuple(frames),
    )  # fmt: skip


def _differences(parts: Sequence[Sequence[Frame]]) -> list[str]:
    """For every part what may tell it from others of its series: its plane, and its echo, time point and the like."""
    names = []
    for part in parts:
        same = [other for other in parts if other[0].source.series == part[0].source.series]
        tags = [dict((*other[0].always, *other[0].repeated)) for other in same]
        mine = dict((*part[0].always, *part[0].repeated))
        told = []
        for name, value in mine.items():
            values = list(dict.fromkeys(tag.get(name) for tag in tags))
            if len(values) > 1:
                told.append(f"{name} {values.index(value) + 1 if name in UNSPOKEN else value}")
        names.append(", ".join([_plane(part[0]), *told]))
    return names


def _plane(frame: Frame) -> str:
    if frame.orientation is None:
        return "no orientation"
    normal = np.cross(frame.orientation[:3], frame.orientation[3:])
    return ("sagittal", "coronal", "axial")[int(np.abs(normal).argmax())] + " orientation"


def _choose(listed: Sequence[Series], wanted: str | None) -> Series:
    if wanted is None:
        if len(listed) == 1:
            return listed[0]
        raise Refused(
            f"{_several(listed)}; choose one with --series and its number (series: in the config): {_list(listed)}"
        )
    matching = _matching(listed, wanted)
    if len(matching) == 1:
        return matching[0]
    if not matching:
        raise Refused(f"no series {wanted!r}, as number, UID or part of a description; there are {_list(listed)}")
    raise Refused(f"series {wanted!r} fits {len(matching)}; choose one by its number: {_list(matching)}")


def _name_for_good(listed: Sequence[Series], chosen: Series) -> str | None:
    """What chooses ``chosen`` again: its UID where that is enough, else its number; None where there is no choice."""
    if len(listed) == 1:
        return None
    return chosen.uid if [entry.uid for entry in listed].count(chosen.uid) == 1 else str(chosen.number)


def _matching(listed: Sequence[Series], wanted: str) -> list[Series]:
    if re.fullmatch(r"[0-9]{1,4}", wanted):
        return [entry for entry in listed if entry.number == int(wanted)]
    if re.fullmatch(r"[0-9.]+", wanted):
        return [entry for entry in listed if entry.uid == wanted]
    return [entry for entry in listed if wanted.casefold() in f"{entry.description}, {entry.part}".casefold()]


def _several(listed: Sequence[Series]) -> str:
    uids = {entry.uid for entry in listed}
    if len(uids) > 1:
        return f"{len(uids)} DICOM series where one is needed"
    differing: dict[str, set[object]] = {
        "matrix sizes": {(entry.rows, entry.columns) for entry in listed},
        "orientations": {entry.frames[0].orientation for entry in listed},
        "pixel spacings": {entry.frames[0].spacing for entry in listed},
    }
    kinds = [name for name, values in differing.items() if len(values) > 1] or ["echoes, time points or the like"]
    return f"one DICOM series, but its slices have different {' and '.join(kinds)}"


def _list(listed: Sequence[Series]) -> str:
    more = f"; and {len(listed) - _SHOWN} more (`volsal series` lists them)" if len(listed) > _SHOWN else ""
    return "; ".join(map(str, listed[:_SHOWN])) + more


def _require_no_lost_slice(path: Path, found: Survey, chosen: Series) -> None:
    """Refuse where a file that cannot be read is named like the slices: it may be one of them."""
    folder = path if path.is_dir() else path.parent
    slices = {frame.source.path for frame in chosen.frames}
    endings = {(file.parent, file.suffix.lower()) for file in slices}
    names = {(file.parent, _digitless(file)) for file in slices}
    for file in found.empty:
        if (file.parent, file.suffix.lower()) in endings:
            raise Refused(
                f"{file.relative_to(folder).as_posix()}: the file is empty; was the copy cut short? Fetch it again"
            )
    for file, reason in found.others:
        ending = (file.parent, file.suffix.lower())
        alike = (file.suffix and ending in endings) or (file.parent, _digitless(file)) in names
        if reason == "not DICOM" and alike:
            name = file.relative_to(folder).as_posix()
            raise Refused(f"{name}: named like a slice, but not DICOM; fetch it again, or take it away if it is none")


def _digitless(file: Path) -> str:
    return re.sub(r"[0-9]+", "", file.name.lower())


def _without_duplicates(frames: Iterable[Frame]) -> tuple[list[Frame], list[str]]:
    """Each SOP instance once.  Copies are dropped where they are the same to the byte, and refused where not."""
    kept: dict[tuple[str, int], Frame] = {}
    copies = []
    for frame in sorted(frames, key=lambda frame: (frame.source.sop, frame.index, frame.source.name)):
        first = kept.setdefault((frame.source.sop, frame.index), frame)
        if first is not frame:
            if digest([first.source.path]) != digest([frame.source.path]):
                raise Refused(
                    f"{first.source.name} and {frame.source.name} are duplicates of one SOP instance with different "
                    "content; find out which is right and take the other away"
                )
            copies.append(frame.source.path)
    count = len(set(copies))
    note = f"{count} duplicate file{'s' * (count > 1)} (the same to the byte) {'were' if count > 1 else 'was'} left out"
    return list(kept.values()), [note] if copies else []


def _passed_over(path: Path, found: Survey) -> list[str]:
    folder = path if path.is_dir() else path.parent
    others = [file.relative_to(folder).as_posix() for file, _ in found.others] + [file.name for file in found.empty]
    if not others:
        return []
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return [f"{len(others)} files of the folder are no DICOM images: {', '.join(others[:3])}{more}"]


def _require_sensible(stack: Stack) -> None:
    limit, voxels = most_voxels(), math.prod(stack.grid.shape)
    if voxels > limit:
        raise Refused(
            f"too large: {voxels:,} voxels, where volsal reads up to {limit:,}; set {LIMIT_VARIABLE} if that is what "
            "the scan is"
        )


def _volume(stack: Stack) -> NDArray[np.float32]:
    """(columns, rows, slices), interpolated along the slices where the stack says so."""
    values = decode(stack.frames)
    if stack.at is not None:
        values = np.stack([_between(values, at) for at in stack.at])
    return np.ascontiguousarray(values.transpose(2, 1, 0))


def _between(values: NDArray[np.float32], at: float) -> NDArray[np.float32]:
    below = min(int(at), len(values) - 2)
    share = np.float32(at - below)
    return values[below] * (1 - share) + values[below + 1] * share


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the sorted SHA-256 of every file: names and order do not matter."""
    whole = hashlib.sha256()
    for one in sorted(sha256_of(path) for path in paths):
        whole.update(bytes.fromhex(one))
    return whole.hexdigest()
