"""MetaImage in: .mha, and .mhd with its data file.  The format of ITK and elastix, in ITK's reading of it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from volsal.scans.raw import FROM_END, MOST_HEADER, Described, beside, numbers, placed, read_described, short, sizes
from volsal.scans.scan import Reading, Scan, ScanError

_START = re.compile(rb"(?:ObjectType|ObjectSubType|Comment|NDims|TransformType|Name|ID)[ \t]*=", re.IGNORECASE)
_DTYPES = {
    "met_char": "i1",
    "met_uchar": "u1",
    "met_short": "i2",
    "met_ushort": "u2",
    "met_int": "i4",
    "met_uint": "u4",
    "met_long_long": "i8",
    "met_ulong_long": "u8",
    "met_float": "f4",
    "met_double": "f8",
}
# MetaIO knows each of these under several names.
_ALIASES = {
    "rotation": "transformmatrix",
    "orientation": "transformmatrix",
    "position": "offset",
    "origin": "offset",
    "elementbyteordermsb": "binarydatabyteordermsb",
}
_UNSCALED = {"slope": "1", "offset": "0"}
# How far the direction matrix may be from a rotation or reflection.
_ORTHONORMAL = 1e-3


def sniff(path: Path) -> bool:
    """Whether the bytes are those of a MetaImage header."""
    with path.open("rb") as file:
        start = file.read(2048)
    return _START.match(start.lstrip()) is not None and re.search(rb"(?im)^\s*NDims\s*=", start) is not None


def read(path: Path, reading: Reading) -> Scan:
    """The scan in a MetaImage file; see :func:`volsal.scans.read_scan`."""
    return read_described(path, describe(path), reading)


def files(path: Path) -> list[Path]:
    """The header, and its data file where that is another one."""
    fields, _ = _fields(path)
    name = fields["elementdatafile"]
    return [path] if name.upper() == "LOCAL" else [path, beside(path, name)]


def describe(path: Path) -> Described:
    """What the header says, or :class:`ScanError` where it leaves a volume's place or bytes open."""
    fields, end = _fields(path)
    _require_plain(path, fields)
    notes: list[str] = []
    shape, dtype = sizes(path, "DimSize", fields.get("dimsize", "")), _dtype(path, fields, notes)
    name = fields["elementdatafile"]
    if name.upper().startswith("LIST") or "%" in name:
        raise ScanError(f"{path}: its voxels are spread over several files ({short(name)}); save it as one")
    data, skip = (path, end) if name.upper() == "LOCAL" else (beside(path, name), 0)
    packed, stored = _flag(path, fields, "compresseddata"), fields.get("compresseddatasize", "")
    header_size = fields.get("headersize", "0")
    if not re.fullmatch(r"-1|\d{1,15}", header_size) or (packed and header_size not in ("0", "-1")):
        raise ScanError(f"{path}: HeaderSize {short(header_size)}; expected -1 or the bytes before the voxels")
    from_end = header_size == "-1" and not packed
    return Described(
        shape, dtype, _affine(path, fields, notes), data,
        FROM_END if from_end else skip + max(int(header_size), 0), "deflate" if packed else "",
        int(stored) if re.fullmatch(r"\d{1,15}", stored) and int(stored) else None, notes=tuple(notes),
    )  # fmt: skip


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """The header's fields by lower-case name, and where it ends: with ElementDataFile, which is the last by rule."""
    with path.open("rb") as file:
        start = file.read(MOST_HEADER)
    found: dict[str, str] = {}
    at = 0
    while at < len(start):
        end = start.find(b"\n", at) + 1 or len(start)
        line, at = start[at:end], end
        key, equals, value = line.decode("utf-8", "surrogateescape").partition("=")
        name = _ALIASES.get(key.strip().lower(), key.strip().lower())
        if not equals or name == "comment":
            continue
        if name in found:
            raise ScanError(f"{path}: the header says {short(key.strip())} twice")
        found[name] = value.strip()
        if name == "elementdatafile":
            return found, at
    raise ScanError(f"{path}: the MetaImage header does not say where its voxels are (ElementDataFile)")


def _require_plain(path: Path, fields: dict[str, str]) -> None:
    """Refuse what is not one volume of real numbers in mm."""
    if fields.get("ndims") != "3":
        raise ScanError(f"{path}: NDims {short(fields.get('ndims', ''))}; volsal explains 3D scans")
    if fields.get("objecttype", "Image").lower() != "image":
        raise ScanError(f"{path}: a MetaIO {short(fields['objecttype'])}, not an image")
    if fields.get("elementnumberofchannels", "1") != "1":
        number = fields["elementnumberofchannels"]
        raise ScanError(f"{path}: {short(number)} numbers per voxel (RGB or vectors); volsal explains one real number")
    if not _flag(path, fields, "binarydata", "True"):
        raise ScanError(f"{path}: its voxels are written as text; save it with BinaryData = True")
    if fields.get("distanceunits", "mm").lower() not in ("mm", "?"):
        raise ScanError(f"{path}: its unit of length is {short(fields['distanceunits'])}, and volsal works in mm")
    scaling = " ".join(fields.get(f"elementtointensityfunction{part}", at) for part, at in _UNSCALED.items())
    if numbers(path, "ElementToIntensityFunction", scaling, 2) != [1, 0]:
        raise ScanError(f"{path}: its values are to be scaled, which readers of MetaImage do not do; save it without")


def _affine(path: Path, fields: dict[str, str], notes: list[str]) -> NDArray[np.float64]:
    """LPS+ mm.  A row of TransformMatrix is the direction of one voxel axis."""
    if "transformmatrix" not in fields:
        raise ScanError(
            f"{path}: no TransformMatrix, so left and right are unknown; save it again from the software that knows "
            "the patient's position"
        )
    spacing = fields.get("elementspacing", fields.get("elementsize"))
    if spacing is None:
        raise ScanError(f"{path}: no ElementSpacing, so the size of a voxel is unknown")
    rows = np.array(numbers(path, "TransformMatrix", fields["transformmatrix"], 9)).reshape(3, 3)
    steps = np.array(numbers(path, "ElementSpacing", spacing, 3))
    if not (steps > 0).all():
        raise ScanError(f"{path}: ElementSpacing {short(spacing)}; expected three lengths above 0")
    if not np.abs(rows @ rows.T - np.eye(3)).max() <= _ORTHONORMAL:
        raise ScanError(f"{path}: its TransformMatrix is no rotation or reflection: {short(fields['transformmatrix'])}")
    if "offset" not in fields:
        notes.append("the header states no origin; 0, 0, 0 was taken, so positions in mm are relative")
    return placed(list(rows * steps[:, None]), numbers(path, "Offset", fields.get("offset", "0 0 0"), 3))


def _dtype(path: Path, fields: dict[str, str], notes: list[str]) -> np.dtype:
    name = fields.get("elementtype", "")
    if name.lower() not in _DTYPES:
        raise ScanError(f"{path}: voxels of type {short(name)}; volsal explains one real number per voxel")
    dtype = np.dtype(_DTYPES[name.lower()])
    if dtype.itemsize > 1 and "binarydatabyteordermsb" not in fields:
        notes.append("the header states no byte order; the common one, little-endian, was taken")
    return dtype.newbyteorder(">" if _flag(path, fields, "binarydatabyteordermsb") else "<")


def _flag(path: Path, fields: dict[str, str], name: str, default: str = "False") -> bool:
    said = fields.get(name, default)
    if said.lower() not in ("true", "false", "t", "f", "1", "0"):
        raise ScanError(f"{path}: {name} {short(said)}; expected True or False")
    return said.lower() in ("true", "t", "1")
