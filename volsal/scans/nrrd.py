"""NRRD in: .nrrd, and .nhdr with its data file.  After http://teem.sourceforge.net/nrrd/format.html."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from volsal.scans.raw import FROM_END, MOST_HEADER, Described, beside, numbers, placed, read_described, short, sizes
from volsal.scans.scan import Reading, Scan, ScanError

_MAGIC = re.compile(rb"NRRD000[1-5]\r?\n")
_TYPES = {
    "i1": "signed char|int8|int8_t",
    "u1": "uchar|unsigned char|uint8|uint8_t",
    "i2": "short|short int|signed short|signed short int|int16|int16_t",
    "u2": "ushort|unsigned short|unsigned short int|uint16|uint16_t",
    "i4": "int|signed int|int32|int32_t",
    "u4": "uint|unsigned int|uint32|uint32_t",
    "i8": "longlong|long long|long long int|signed long long|signed long long int|int64|int64_t",
    "u8": "ulonglong|unsigned long long|unsigned long long int|uint64|uint64_t",
    "f4": "float",
    "f8": "double",
}
_DTYPES = {name: dtype for dtype, names in _TYPES.items() for name in names.split("|")}
# The world's axes, as the signs that turn them into RAS+.
_SPACES = {
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
}
_PACKINGS: dict[str, Literal["", "deflate", "bzip2"]] = {
    "raw": "", "gzip": "deflate", "gz": "deflate", "bzip2": "bzip2", "bz2": "bzip2",
}  # fmt: skip
_ALIASES = {"datafile": "data file", "byteskip": "byte skip", "lineskip": "line skip"}
_VECTOR = re.compile(r"\(\s*([^(),]+),([^(),]+),([^(),]+)\)")


def sniff(path: Path) -> bool:
    """Whether the bytes say NRRD."""
    with path.open("rb") as file:
        return _MAGIC.match(file.read(16)) is not None


def read(path: Path, reading: Reading) -> Scan:
    """The scan in an NRRD file; see :func:`volsal.scans.read_scan`."""
    return read_described(path, describe(path), reading)


def files(path: Path) -> list[Path]:
    """The header, and its data file where that is another one."""
    fields, _ = _fields(path)
    return [path, beside(path, fields["data file"])] if "data file" in fields else [path]


def describe(path: Path) -> Described:
    """What the header says, or :class:`ScanError` where it leaves a volume's place or bytes open."""
    fields, end = _fields(path)
    if fields.get("dimension") != "3":
        raise ScanError(
            f"{path}: dimension {short(fields.get('dimension', ''))}; volsal explains 3D scans of one number per voxel "
            "(no RGB, vectors or time series)"
        )
    kinds = set(fields.get("kinds", "domain").lower().split()) - {"domain", "space", "???", "none"}
    if kinds:
        raise ScanError(
            f"{path}: an axis of kind {short(' '.join(sorted(kinds)))}; volsal explains three axes of space"
        )
    affine, notes = _affine(path, fields)
    data, skip = (beside(path, fields["data file"]), 0) if "data file" in fields else (path, end)
    packing = _packing(path, fields)
    skip += _skipped(path, fields, data, skip, packing)
    return Described(
        sizes(path, "sizes", fields.get("sizes", "")), _dtype(path, fields), affine, data,
        FROM_END if fields.get("byte skip") == "-1" else skip, packing, ras=True, notes=notes,
    )  # fmt: skip


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """The header's fields by lower-case name, and where it ends.  Comments and key:=value pairs are free text."""
    with path.open("rb") as file:
        start = file.read(MOST_HEADER)
    end = re.search(rb"\r?\n\r?\n", start)
    if end is None and len(start) == MOST_HEADER:
        raise ScanError(f"{path}: no blank line ends the NRRD header within {MOST_HEADER:,} bytes")
    text = (start[: end.start()] if end else start).decode("utf-8", "surrogateescape")
    found: dict[str, str] = {}
    for line in text.splitlines()[1:]:
        name, colon, value = line.partition(":")
        if line.startswith("#") or not colon or value.startswith("="):
            continue
        name = _ALIASES.get(name.strip().lower(), name.strip().lower())
        if name in found:
            raise ScanError(f"{path}: the header says {short(name)} twice")
        found[name] = value.strip()
    return found, end.end() if end else len(start)


def _affine(path: Path, fields: dict[str, str]) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """RAS+ mm."""
    space = fields.get("space", "").lower()
    if space not in _SPACES or "space directions" not in fields:
        said = "no space directions" if space in _SPACES else f"space {short(space)}" if space else "no space"
        raise ScanError(
            f"{path}: its header states {said}, so left and right are unknown; volsal reads space RAS, LAS and LPS "
            "with space directions (save it again from the software that knows the patient's position)"
        )
    units = set(re.findall(r'"([^"]*)"', fields.get("space units", ""))) - {"mm", "millimeter", "millimetre"}
    if units:
        raise ScanError(f"{path}: its unit of length is {short(' '.join(sorted(units)))}, and volsal works in mm")
    columns = [_vector(path, "space directions", part) for part in _split(fields["space directions"])]
    if len(columns) != 3:
        raise ScanError(f"{path}: space directions: three vectors expected, found {short(fields['space directions'])}")
    notes: tuple[str, ...] = ()
    if "space origin" not in fields:
        notes = ("the header states no origin; 0, 0, 0 was taken, so positions in mm are relative",)
    origin = _vector(path, "space origin", fields.get("space origin", "(0,0,0)"))
    signs = np.array([*_SPACES[space], 1.0])
    return signs[:, None] * placed(columns, origin), notes


def _split(text: str) -> list[str]:
    return re.findall(r"\([^()]*\)|[^\s()]+", text)


def _vector(path: Path, field: str, text: str) -> list[float]:
    parts = _VECTOR.fullmatch(text.strip())
    return numbers(path, field, " ".join(parts.groups()) if parts else text, 3)


def _dtype(path: Path, fields: dict[str, str]) -> np.dtype:
    name = " ".join(fields.get("type", "").lower().split())
    if name not in _DTYPES:
        raise ScanError(f"{path}: voxels of type {short(name)}; volsal explains one real number per voxel")
    dtype = np.dtype(_DTYPES[name])
    endian = fields.get("endian", "").lower()
    if dtype.itemsize > 1 and endian not in ("little", "big"):
        raise ScanError(f"{path}: endian {short(endian)}; expected little or big, or the voxels cannot be read")
    return dtype.newbyteorder(">" if endian == "big" else "<")


def _packing(path: Path, fields: dict[str, str]) -> Literal["", "deflate", "bzip2"]:
    encoding = fields.get("encoding", "").lower()
    if encoding not in _PACKINGS:
        raise ScanError(
            f"{path}: encoding {short(encoding)}; volsal reads raw, gzip and bzip2: save it as one of these"
        )
    return _PACKINGS[encoding]


def _skipped(path: Path, fields: dict[str, str], data: Path, start: int, packing: str) -> int:
    """Bytes to pass over after ``start`` in ``data``."""
    lines, count = fields.get("line skip", "0"), fields.get("byte skip", "0")
    if (lines, count) == ("0", "0") or (count == "-1" and not packing):
        return 0
    if packing or not re.fullmatch(r"\d{1,9}", lines) or not re.fullmatch(r"\d{1,15}", count):
        raise ScanError(f"{path}: line skip {short(lines)} and byte skip {short(count)}: save it without them")
    with data.open("rb") as file:
        file.seek(start)
        for _ in range(int(lines)):
            if not file.readline(MOST_HEADER):
                raise ScanError(f"{path}: line skip {lines}, but the data file has fewer lines")
        return file.tell() - start + int(count)
