"""The image frames in DICOM files: what the headers say of each, and which frames belong together.

Only technical tags are read.  Names, dates and free text of a header never enter the program, but for the series
description, which is kept for :func:`volsal.scans.dicom.list_series` alone.
"""

from __future__ import annotations

import math
import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from volsal.scans.dicom_pixels import (
    DEFLATED,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    Unreadable,
    looks_like_dicom,
    open_dicom,
)

Numbers = tuple[float, ...]
MOST_FILES = 50_000
# Uncompressed syntaxes: the pixels stand in the file byte for byte (deflated: in what it unfolds to).
NATIVE = (IMPLICIT_LITTLE, EXPLICIT_LITTLE, DEFLATED, "1.2.840.10008.1.2.2")

_FILE_TAGS = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "Modality",
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored",
    "HighBit", "ModalityLUTSequence", "InConcatenationTotalNumber",
)  # fmt: skip
_PLACE_TAGS = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept")
# What tells volumes of one series apart.  The first kind always does; the second only where positions repeat, since
# it may also change along one volume (an acquisition number per table stop).
_ALWAYS = {
    "PatientID": "patient",
    "FrameOfReferenceUID": "frame of reference",
    "EchoTime": "echo time",
    "EffectiveEchoTime": "echo time",
    "TemporalPositionIdentifier": "time point",
    "TemporalPositionIndex": "time point",
    "DiffusionBValue": "b-value",
}
_WHERE_REPEATED = {
    "EchoNumbers": "echo number",
    "ImageType": "image type",
    "FrameType": "frame type",
    "ComplexImageComponent": "component",
    "StackID": "stack",
    "AcquisitionNumber": "acquisition number",
    "TriggerTime": "trigger time",
    "NominalCardiacTriggerDelayTime": "trigger delay",
    "InversionTime": "inversion time",
    "DiffusionGradientOrientation": "diffusion gradient",
}
# Of these only a digest is kept: what they say is nobody's business.
UNSPOKEN = ("patient", "frame of reference")
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_TAGS = [*_FILE_TAGS, *_PLACE_TAGS, *_ALWAYS, *_WHERE_REPEATED, *_GROUPS]


class Refused(Exception):
    """Why DICOM files make no volume: a sentence without the path, which the caller puts before it."""


@dataclass(frozen=True)
class Source:
    """One DICOM image file: what holds for all of its frames."""

    path: Path
    name: str
    """Relative to the folder that was named."""
    sop: str
    series: str
    number: int
    description: str = field(repr=False)
    modality: str
    syntax: str
    rows: int
    columns: int
    samples: int
    photometric: str
    bits: int
    frames: int
    held: int
    """Bytes from the pixels on: the most that uncompressed pixels can be."""
    oddity: str = ""
    """Why its pixels cannot be taken for values, or ""."""


@dataclass(frozen=True)
class Frame:
    """One slice, placed as its header says; LPS mm, None where the header does not say it."""

    source: Source
    index: int
    position: Numbers | None
    orientation: Numbers | None
    spacing: Numbers | None
    """(between rows, between columns)."""
    slope: float
    intercept: float
    always: tuple[tuple[str, str], ...]
    repeated: tuple[tuple[str, str], ...]

    @property
    def label(self) -> str:
        """The file's name, and the frame's number from 1 where there are several."""
        return self.source.name + (f" frame {self.index + 1}" if self.source.frames > 1 else "")


@dataclass
class Survey:
    """What a folder holds: image frames, and the files that are none, by name and reason."""

    frames: list[Frame] = field(default_factory=list)
    others: list[tuple[Path, str]] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)


def regular_files(folder: Path) -> Iterator[Path]:
    """Files below ``folder`` that are safe to open, in name order; hidden ones are passed over.

    Pipes and devices, also behind a link, are not files: opening them could block for ever.
    """
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(where) / name
            if not name.startswith(".") and is_regular(path):
                yield path


def is_regular(path: Path) -> bool:
    """Whether ``path`` leads to a regular file; False for a dangling or circular link."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def is_dicom_file(path: Path) -> bool:
    """Whether a regular file's first bytes are DICOM's; False where it cannot be opened."""
    try:
        return _begins_like_dicom(path)
    except OSError:
        return False


def _begins_like_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return looks_like_dicom(file.read(132))


def survey(folder: Path, files: Iterable[Path]) -> Survey:
    """The headers of ``files``, none of their pixels.

    Raises
    ------
    Refused
        Where a DICOM file is damaged, since what it holds may be a slice; or there are more files than are sensible.
    """
    found = Survey()
    for count, path in enumerate(files, 1):
        if count > MOST_FILES:
            raise Refused(f"more than {MOST_FILES:,} files; name the folder of one series")
        if path.stat().st_size == 0:
            found.empty.append(path)
        elif path.name.upper() == "DICOMDIR" or not _begins_like_dicom(path):
            found.others.append((path, "not DICOM"))
        elif frames := _frames(path, path.relative_to(folder).as_posix()):
            found.frames += frames
        else:
            found.others.append((path, "DICOM without an image"))
    return found


def _frames(path: Path, name: str) -> list[Frame]:
    try:
        dataset, held = open_dicom(str(path), _TAGS)
        if "Rows" not in dataset or "Columns" not in dataset:
            return []
        source = _source(path, name, dataset, held)
        if all(group in dataset for group in _GROUPS) and len(dataset[_GROUPS[0]].value):
            return _functional(source, dataset)
        return [_frame(source if source.frames == 1 else _unplaced(source), 0, [dataset])]
    except Unreadable as error:
        raise Refused(f"{name}: {error}; fetch the file again, or take it away if it is no slice") from error
    except Refused as error:
        raise Refused(f"{name}: {error}") from error
    except Exception as error:  # pydicom turns bytes to values when asked, and damage raises anything
        kind = type(error).__name__
        raise Refused(f"{name}: a technical tag of its header cannot be read ({kind}); fetch the file again") from error


def _unplaced(source: Source) -> Source:
    return replace(
        source,
        oddity=f"a multi-frame file of {source.frames} frames without functional groups, so nothing says where each "
        "frame lies; export the series as single slices or as enhanced multi-frame",
    )


def _source(path: Path, name: str, dataset: Any, held: int) -> Source:
    bits, stored = int(dataset.get("BitsAllocated") or 0), int(dataset.get("BitsStored") or 0)
    return Source(
        path=path,
        name=name,
        sop=str(dataset.get("SOPInstanceUID") or name),
        series=str(dataset.get("SeriesInstanceUID") or "")[:64],
        number=int(dataset.get("SeriesNumber") or 0),
        description=str(dataset.get("SeriesDescription", "") or ""),
        modality=str(dataset.get("Modality", "") or "?")[:16],
        syntax=str(dataset.file_meta.get("TransferSyntaxUID", "")),
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        samples=int(dataset.get("SamplesPerPixel") or 1),
        photometric=str(dataset.get("PhotometricInterpretation", "") or "")[:16],
        bits=bits,
        frames=int(dataset.get("NumberOfFrames") or 1),
        held=held,
        oddity=_oddity(dataset, bits, stored),
    )


def _oddity(dataset: Any, bits: int, stored: int) -> str:
    if bits not in (8, 16, 32, 64):
        return f"its pixels have {bits} bits (BitsAllocated); expected 8, 16, 32 or 64"
    if stored > bits or (stored and int(dataset.get("HighBit", stored - 1)) != stored - 1):
        return f"BitsStored {stored} and HighBit {dataset.get('HighBit')} do not fit {bits} bits"
    if dataset.get("ModalityLUTSequence"):
        return "its values go through a modality look-up table, which volsal does not apply"
    if "MOSAIC" in [str(kind).upper() for kind in dataset.get("ImageType") or ()]:
        return "a Siemens mosaic, which holds many slices in one picture; convert the series with dcm2niix"
    if int(dataset.get("InConcatenationTotalNumber") or 1) > 1:
        return "it is one part of a volume that was cut into several files (a concatenation); volsal reads whole files"
    return ""


def _functional(source: Source, dataset: Any) -> list[Frame]:
    """Frames of an enhanced multi-frame file, each placed by its own functional groups and the shared ones."""
    shared, each = dataset[_GROUPS[0]].value[0], dataset[_GROUPS[1]].value
    if len(each) != source.frames:
        raise Refused(f"{source.frames} frames, but {len(each)} per-frame functional groups: is the file whole?")
    return [_frame(source, index, [*_items(own), *_items(shared), dataset]) for index, own in enumerate(each)]


def _items(group: Any) -> list[Any]:
    """The first item of every macro of a functional group."""
    return [element.value[0] for element in group if element.VR == "SQ" and len(element.value)]


def _frame(source: Source, index: int, places: Sequence[Any]) -> Frame:
    """A frame from the datasets that may hold its tags, the nearest first."""
    slope, intercept = (_numbers(places, name, 1) for name in ("RescaleSlope", "RescaleIntercept"))
    return Frame(
        source,
        index,
        _numbers(places, "ImagePositionPatient", 3),
        _numbers(places, "ImageOrientationPatient", 6),
        _numbers(places, "PixelSpacing", 2),
        slope[0] if slope else 1.0,
        intercept[0] if intercept else 0.0,
        _told(places, _ALWAYS) + _localizer(places),
        _told(places, _WHERE_REPEATED),
    )


def _value(places: Sequence[Any], name: str) -> Any:
    return next((place.get(name) for place in places if place.get(name) not in (None, "")), None)


def _numbers(places: Sequence[Any], name: str, count: int) -> Numbers | None:
    value = _value(places, name)
    if value is None:
        return None
    listed = [value] if count == 1 else list(value)
    numbers = tuple(float(number) for number in listed)
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise Refused(f"{name} does not hold {count} finite number{'s' * (count > 1)}")
    return numbers


def _told(places: Sequence[Any], names: dict[str, str]) -> tuple[tuple[str, str], ...]:
    told = {}
    for keyword, name in names.items():
        value = _value(places, keyword)
        if value is not None:
            if name in UNSPOKEN:
                told[name] = sha256(str(value).strip().encode("utf-8", "replace")).hexdigest()
                continue
            parts = [value] if isinstance(value, (str, float, int)) else list(value)
            told[name] = "/".join(f"{float(p):.5g}" if isinstance(p, (float, int)) else str(p)[:24] for p in parts)
    return tuple(sorted(told.items()))


def _localizer(places: Sequence[Any]) -> tuple[tuple[str, str], ...]:
    kinds = _value(places, "ImageType") or ()
    return (("kind", "localizer"),) if "LOCALIZER" in [str(kind).upper() for kind in kinds] else ()


def groups(frames: Iterable[Frame]) -> list[list[Frame]]:
    """Frames that could form one volume, together: one series, orientation, matrix, spacing, echo, time point.

    The order of the frames does not matter.
    """
    by_key: dict[Any, list[Frame]] = defaultdict(list)
    known: list[Numbers] = []
    for frame in sorted(frames, key=_order):
        source = frame.source
        own_file = source.sop if source.frames > 1 else ""
        key = (
            source.number, source.series, own_file, source.rows, source.columns, source.photometric,
            _same_orientation(frame.orientation, known), tuple(round(mm, 4) for mm in frame.spacing or ()),
            frame.always,
        )  # fmt: skip
        by_key[key].append(frame)
    ordered = sorted(by_key.items(), key=lambda item: (item[0][0], repr(item[0])))
    return [part for _, members in ordered for part in _told_apart(members)]


def _order(frame: Frame) -> tuple[Any, ...]:
    source = frame.source
    return (source.series, frame.orientation or (), frame.position or (), source.sop, frame.index, source.name)


def _same_orientation(orientation: Numbers | None, known: list[Numbers]) -> Numbers | None:
    """The first orientation already met that is this one up to rounding in the header."""
    if orientation is None:
        return None
    for other in known:
        if all(abs(a - b) < 1e-3 for a, b in zip(orientation, other, strict=True)):
            return other
    known.append(orientation)
    return orientation


def _told_apart(frames: list[Frame]) -> list[list[Frame]]:
    """``frames``, or, where positions repeat, its parts by the first tag that leaves no position twice in any part."""
    distinct = {(frame.source.sop, frame.index): frame for frame in frames}
    unique = list(distinct.values())
    if not _repeats(unique):
        return [frames]
    for name in _WHERE_REPEATED.values():
        parts: dict[str, list[Frame]] = defaultdict(list)
        for frame in frames:
            parts[dict(frame.repeated).get(name, "")].append(frame)
        if len(parts) > 1 and all(len(part) > 1 and not _repeats(part) for part in parts.values()):
            return [part for _, part in sorted(parts.items())]
    return [frames]


def _repeats(frames: Iterable[Frame]) -> bool:
    counts = Counter(tuple(round(mm, 2) for mm in frame.position) for frame in frames if frame.position)
    return max(counts.values(), default=0) > 1
