"""Voxels that a text header describes: NRRD and MetaImage say in words where the bytes are and what they mean.

Everything is judged before anything is allocated, and exactly the bytes promised must be there: libraries that fill up
a short file with zeros report success.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from volsal.grid import Grid, GridError, lps_to_ras
from volsal.scans.digest import sha256_of
from volsal.scans.limits import require_room, require_spacing, unpacked
from volsal.scans.scan import Reading, Scan, ScanError, fill, require_regular_file

# Gradient tables of diffusion scans and the segment names of 3D Slicer make long headers; voxels begin before this.
MOST_HEADER = 1 << 22
FROM_END = -1
_LARGEST = 1e30  # of what a header says; its square is still a number


@dataclass(frozen=True)
class Described:
    """What a text header says of one volume.

    Attributes
    ----------
    shape : (I, J, K), the fastest axis first
    dtype : with its byte order
    affine : (4, 4) voxel centre to world, mm, in the frame of the header: LPS+, unless ``ras``
    data : the file that holds the voxels
    skip : bytes before them; ``FROM_END`` where they are the file's last
    packing : how they are compressed
    stored : bytes of the compressed voxels where the header says it
    notes : what to tell the reader of a result
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    affine: NDArray[np.float64]
    data: Path
    skip: int = 0
    packing: Literal["", "deflate", "bzip2"] = ""
    stored: int | None = None
    ras: bool = False
    notes: tuple[str, ...] = ()


def read_described(path: Path, header: Described, reading: Reading) -> Scan:
    """The scan that the text header in ``path`` describes.

    Raises
    ------
    ScanError
        Where the place makes no sense, bytes are missing or damaged, or more is promised than volsal reads.
    """
    if reading.volume not in (None, 0):
        raise ScanError(f"{path}: volume {reading.volume} asked for, but the file holds one 3D volume")
    if min(header.shape) < 2:
        raise ScanError(f"{path}: shape {header.shape} is a single slice (2D) or empty; volsal explains volumes")
    try:
        grid = Grid(header.shape, header.affine if header.ras else lps_to_ras(header.affine))
    except GridError as error:
        raise ScanError(f"{path}: its directions are unusable: {error}") from error
    require_spacing(path, grid)
    try:
        array, notes = _voxels(path, header)
    except MemoryError as error:
        raise ScanError(f"{path}: not enough memory on this machine for its voxels") from error
    notes = [*header.notes, *notes, *fill(path, array, reading)]
    parts = dict.fromkeys((path, header.data))
    size = sum(part.stat().st_size for part in parts)
    return Scan(array, grid, path, sha256=sha256_of(*parts), notes=tuple(notes), filled=reading.nan, size=size)


def _voxels(path: Path, header: Described) -> tuple[NDArray[np.float32], list[str]]:
    require_regular_file(header.data)
    size = math.prod(header.shape) * header.dtype.itemsize
    held = header.data.stat().st_size - max(header.skip, 0)
    require_room(path, header.shape, header.dtype.itemsize, max(held, 0), bool(header.packing))
    # Not more than the file has: a header's number may be anything.
    wanted = min(held, header.stored or held) if header.packing else size
    with header.data.open("rb") as file:
        file.seek(header.skip if header.skip >= 0 else held - size)
        content = file.read(wanted)
    if header.packing:
        content = unpacked(path, content, size, header.packing)
    elif len(content) < size:
        raise ScanError(f"{path}: {size:,} bytes of voxels expected, {len(content):,} found; fetch the file again")
    more = held - size if not header.packing and header.skip >= 0 else 0
    notes = [f"the file holds {more:,} bytes more than its header describes: is its size there right?"] if more else []
    stored = np.frombuffer(content, header.dtype, math.prod(header.shape)).reshape(header.shape, order="F")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return np.ascontiguousarray(stored, dtype=np.float32), notes
        except RuntimeWarning as error:
            raise ScanError(f"{path}: values beyond the range of float32") from error


def beside(path: Path, name: str) -> Path:
    """The data file that the header in ``path`` names: next to it or below its folder, nowhere else."""
    parts = re.split(r"[/\\]", name)
    if not name or "\0" in name or name.startswith(("/", "\\", "~")) or ".." in parts or ":" in parts[0]:
        raise ScanError(f"{path}: names {name!r} as its data file; volsal follows names beside the header or below it")
    data = path.parent / name
    try:
        found = data.is_file()
    except (OSError, ValueError):
        found = False
    if not found:
        raise ScanError(f"{path}: its data file, {name}, is missing; header and data belong together")
    return data


def numbers(path: Path, field: str, text: str, count: int) -> list[float]:
    """``count`` numbers in ``text``; one may be NaN, which the grid refuses."""
    try:
        found = [float(word) for word in text.split()]
    except ValueError:
        found = []
    if len(found) != count or max(map(abs, found)) > _LARGEST:
        raise ScanError(f"{path}: {field}: {count} numbers expected, found {short(text)}")
    return found


def sizes(path: Path, field: str, text: str) -> tuple[int, int, int]:
    """The three axes' lengths."""
    found = [int(word) for word in text.split()] if re.fullmatch(r"[0-9\s]{1,90}", text) else []
    if len(found) != 3 or min(found) < 1:
        raise ScanError(f"{path}: {field}: three sizes expected, found {short(text)}")
    return found[0], found[1], found[2]


def placed(columns: Sequence[ArrayLike], origin: Sequence[float]) -> NDArray[np.float64]:
    """(4, 4) from the three axis steps, mm, and the centre of the first voxel."""
    affine = np.eye(4)
    affine[:3, :3] = np.array(columns, dtype=float).T
    affine[:3, 3] = origin
    return affine


def short(text: str) -> str:
    """A header's words, for a message: quoted, on one line, cut."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
