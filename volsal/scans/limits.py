"""How large a scan may be: judged by its header, before anything is allocated for it."""

from __future__ import annotations

import bz2
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from volsal.grid import Grid
from volsal.scans.scan import ScanError

LIMIT_VARIABLE = "VOLSAL_MAX_VOXELS"
_SPACING_MM = (1e-3, 100.0)
_MOST_VOXELS = 1_500_000_000
# Deflate never shrinks below about 1 : 1032.
_DEFLATE = 1100
# Scans shrink 2 to 20 times.  What shrinks more than this, and is large, holds nothing, or was made to fill a memory.
_EMPTY_RATIO, _EMPTY_FROM = 300, 1 << 28


def most_voxels() -> int:
    """The largest scan that is read, in voxels: the environment's ``VOLSAL_MAX_VOXELS``, or 1.5e9."""
    said = os.environ.get(LIMIT_VARIABLE, "")
    if not said:
        return _MOST_VOXELS
    try:
        return int(float(said))
    except (ValueError, OverflowError) as error:
        raise ScanError(f"{LIMIT_VARIABLE}={said!r} is not a number of voxels") from error


def require_room(path: Path, shape: Sequence[int], itemsize: int, held: int, packed: bool) -> None:
    """Refuse a header that promises more than volsal reads, or than the file can hold.

    Parameters
    ----------
    shape : all axes, in the file's order; the first three are one volume
    itemsize : bytes of one stored voxel
    held : bytes in the file
    packed : whether they are a deflate stream (gzip, zlib)
    """
    needed = math.prod(shape) * itemsize
    if needed > held * (_DEFLATE if packed else 1):
        raise ScanError(f"{path}: the header promises {needed:,} bytes of voxels, more than the file can hold")
    limit, voxels = most_voxels(), math.prod(shape[:3])
    if voxels > limit:
        raise ScanError(
            f"{path}: too large: {voxels:,} voxels, where volsal reads up to {limit:,}; set {LIMIT_VARIABLE} if that "
            "is what the scan is"
        )
    if packed and needed > _EMPTY_FROM and needed > held * _EMPTY_RATIO and LIMIT_VARIABLE not in os.environ:
        raise ScanError(
            f"{path}: too large for what it holds: {held:,} bytes unfold to {needed:,}, {needed // held} times as many "
            f"(the limit is {_EMPTY_RATIO}; scans reach 20); set {LIMIT_VARIABLE} to have it read all the same"
        )


def rest_of(path: Path, stream: IO[bytes], most: int) -> int:
    """How many bytes are left in ``stream``, read to its end, where a gzip stream's checksum stands.

    Raises
    ------
    ScanError
        Where more than ``most`` bytes come; nobody waits for the end of a stream that was made not to have one.
    """
    left = 0
    while chunk := stream.read(1 << 20):
        left += len(chunk)
        if left > most:
            raise ScanError(f"{path}: at least {left:,} bytes more than its header describes; its size there is wrong")
    return left


def require_spacing(path: Path, grid: Grid) -> NDArray[np.float64]:
    """The grid's voxel edges, (3,) mm, unless they are none that a scan has: then the unit is wrong."""
    low, high = _SPACING_MM
    if grid.spacing.min() < low or grid.spacing.max() > high:
        raise ScanError(
            f"{path}: voxels of {millimetres(grid.spacing)}; expected between {low:g} and {high:g} mm: check the unit"
        )
    return grid.spacing


def millimetres(lengths: NDArray[np.float64]) -> str:
    """``2 x 2 x 2.5 mm``."""
    return " x ".join(f"{mm:.4g}" for mm in lengths) + " mm"


def unpacked(path: Path, packed: bytes, size: int, packing: str) -> bytes:
    """Exactly ``size`` bytes out of a "deflate" (zlib or gzip) or "bzip2" stream, to its checksum.

    Raises
    ------
    ScanError
        Where the stream is damaged, or holds fewer bytes, or more.
    """
    # 32: either kind of deflate stream.
    unpack: Any = bz2.BZ2Decompressor() if packing == "bzip2" else zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        content = unpack.decompress(packed, size + 1)
        # The checksum may stand after the last voxel, unread as yet.
        rest = b"" if packing == "bzip2" else unpack.unconsumed_tail
        if len(content) == size and not unpack.eof:
            content += unpack.decompress(rest, 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ScanError(f"{path}: its compressed voxels are damaged ({error}); fetch the file again") from error
    if len(content) != size or not unpack.eof:
        told = f"only {len(content):,}" if len(content) < size else "other than that"
        raise ScanError(f"{path}: {size:,} bytes of voxels expected, {told} found; fetch the file again")
    return content
