"""Maps out: an overlay on the scan's own voxels, with the scan's own geometry bytes and nothing else of its header."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, cast

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from numpy.typing import NDArray

from volsal.errors import VolsalError
from volsal.grid import Grid
from volsal.scans.scan import Scan, ScanError

# What places a volume, and nothing else: descriptions, names and extensions may hold personal data.
GEOMETRY_FIELDS = (
    "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "srow_x", "srow_y", "srow_z", "xyzt_units",
)  # fmt: skip


_ESTIMATE = 1001  # NIfTI's intent code of a map
# What a map's file may hold: its values, or integers of that many bits times a slope.
STORED_AS = ("float32", "uint16", "uint8", "int16")
# Bytes that are coded, compressed and read back at a time, in the caches all the while.
_PIECE = 1 << 19
_LEVEL = 1  # of igzip; part of a file's bytes
_DAMAGED: tuple[type[Exception], ...] = (EOFError, cast(type[Exception], isal_zlib.IsalError))


class WriteError(VolsalError, OSError):
    """A result cannot be written, or was not written as it should be."""


class MapError(VolsalError, ValueError):
    """A map would not lie on its scan.  The scan's header is at fault and not the disk, so other scans may go on."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that becomes ``path`` when the block ends well, and vanishes otherwise.

    A file under its final name is therefore always whole, whatever happens in between, loss of power included.
    """
    temporary = path.with_name(f".volsal-{secrets.token_hex(8)}{path.name[-40:]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise WriteError(f"{path.parent}: cannot write there: {error.strerror or error}") from error
    try:
        yield temporary
        _to_disk(temporary)
        temporary.replace(path)
        _to_disk(path.parent)
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"{path}: could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Raise :class:`WriteError` unless files can be made in ``folder``; asked before the work, not after it."""
    with replacing(folder / ".volsal-write-test"):
        pass
    (folder / ".volsal-write-test").unlink()


def _to_disk(path: Path) -> None:
    """Wait until a file's bytes, or a folder's list of names, are on the disk itself."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems know no such thing for folders; they are no reason to lose a result.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def map_header(scan: Scan, intent: str, description: str, window: tuple[float, float]) -> Any:
    """The NIfTI header of a map over ``scan``: its geometry, what the map is, and how to show it (in its own unit).

    ``intent`` (15 characters) and ``description`` (79) are cut to what the format holds.
    """
    version = nib.Nifti2Header if isinstance(scan.header, nib.Nifti2Header) else nib.Nifti1Header
    header = cast(Any, version)()
    header.set_data_dtype(np.float32)
    header.set_data_shape(scan.grid.shape)
    if scan.header is None:
        header.set_sform(scan.grid.affine, code=1)
        header.set_zooms(scan.grid.spacing)
        if _is_orthogonal(scan.grid):  # a quaternion cannot hold a shear: better no qform than one that is elsewhere
            header.set_qform(scan.grid.affine, code=1, strip_shears=True)
        header.set_xyzt_units("mm")
    else:
        header["pixdim"][:4] = scan.header["pixdim"][:4]
        header["pixdim"][0] = header["pixdim"][0] or 1  # the sign of the third axis: 0 counts as 1 by the standard
        for name in GEOMETRY_FIELDS:
            header[name] = scan.header[name]
        header["xyzt_units"] = int(scan.header["xyzt_units"]) & 7  # the unit of length; a map has no time axis
    header.set_intent("estimate", name=intent[:15], allow_unknown=True)
    header["descrip"] = description[:79].encode("ascii", "replace")
    header["cal_min"], header["cal_max"] = window
    return header


def refuse_own_map(scan: Scan) -> None:
    """Raise :class:`ScanError` for a map that volsal wrote: one left among the inputs would be taken for a scan."""
    header = scan.header
    if header is None or "descrip" not in header or int(header["intent_code"]) != _ESTIMATE:
        return
    if bytes(header["descrip"].tobytes()).startswith(b"volsal "):
        raise ScanError(f"{scan}: a map that volsal wrote, not a scan; move it out of the scans' folder")


def _is_orthogonal(grid: Grid) -> bool:
    """Whether a quaternion places every corner where the affine does, to a hundredth of a millimetre."""
    header = nib.Nifti1Header()
    header.set_data_shape(grid.shape)
    header.set_qform(grid.affine, code=1, strip_shears=True)
    return grid.distance_mm(Grid(grid.shape, header.get_qform())) < 0.01


@dataclass(frozen=True)
class Coding:
    """How a map's values stand in its file: ``round(value / slope)``, from which every reader makes the value again.

    Attributes
    ----------
    dtype : ``float32``, whose values stand as they are, or one of NumPy's names for integers
    slope : of a unit of the integer; NIfTI's scl_slope, exact in float32.  1 for float32
    """

    dtype: str = "float32"
    slope: float = 1.0

    @classmethod
    def of(cls, values: NDArray[np.float32], stored_as: str) -> Coding:
        """The coding of ``values`` as ``stored_as``, one of :data:`STORED_AS`.

        Zero stays zero, and the value of the largest magnitude is kept exactly.  A map with negative values that was
        to be unsigned becomes signed integers of the same width.
        """
        if stored_as == "float32":
            return cls()
        low, high = float(values.min()), float(values.max())
        dtype = stored_as.removeprefix("u") if low < 0 else stored_as
        peak = np.float32(max(-low, high))
        # Nearly always the very first: slopes are rounded to float32, and the peak is to come out all the same.
        for top in range(np.iinfo(dtype).max, 0, -1):
            slope = float(np.float32(float(peak) / top))
            if np.float32(top * slope) == peak:
                break
        return cls(dtype, slope or 1.0)

    def code(self, values: NDArray[np.float32]) -> tuple[NDArray, float]:
        """``values`` as they are stored, and the largest difference between them and what a reader will get."""
        if self.dtype == "float32":
            return values, 0.0
        if not values.any():
            return np.zeros_like(values, dtype=self.dtype), 0.0
        units = np.divide(values, self.slope, dtype=np.float64)
        whole = np.rint(units)
        units -= whole
        return whole.astype(self.dtype), float(np.abs(units, out=units).max()) * self.slope


@dataclass(frozen=True)
class Written:
    """A map's file: the SHA-256 of its bytes, and how its values stand in it."""

    sha256: str
    coding: Coding
    largest_error: float

    @property
    def stored(self) -> dict[str, Any]:
        """For the map's record; ``largest_error`` is in the map's unit."""
        return {"dtype": self.coding.dtype, "slope": self.coding.slope, "largest_error": self.largest_error}


def write_map(path: Path, values: NDArray[np.float32], header: Any, stored_as: str = "float32") -> Written:
    """Write ``values`` (I, J, K) as gzipped NIfTI under ``path``, then read it back and compare.

    ``stored_as`` is one of :data:`STORED_AS`; see :class:`Coding`.  The file's bytes are the same every time, on
    processors of one kind.

    Raises
    ------
    WriteError
        Where the disk refuses, or does not keep what it was given.
    MapError
        Where the geometry read back is not the scan's.
    """
    coding = Coding.of(values, stored_as)
    header = header.copy()
    header.set_data_dtype(np.dtype(coding.dtype))
    header["scl_slope"], header["scl_inter"] = coding.slope, 0
    errors = [0.0]

    def pieces() -> Iterator[NDArray]:
        for piece in _pieces(values):
            coded, error = coding.code(piece)
            errors.append(error)
            yield coded

    return Written(_write(path, header, pieces()), coding, max(errors))


def write_parts(path: Path, parts: Iterable[NDArray[np.float32]], count: int, header: Any) -> str:
    """Write ``count`` volumes (I, J, K) as one gzipped 4D NIfTI of float32; one at a time is in memory.

    ``header`` is that of a map of the same scan, as :func:`map_header` makes it.  What was written is read back and
    compared; errors as for :func:`write_map`.  Returns the SHA-256 of the file.
    """
    header = header.copy()
    header.set_data_shape((*header.get_data_shape()[:3], count))
    return _write(path, header, (piece for part in parts for piece in _pieces(part)))


def _pieces(values: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """``values`` (I, J, K), a few slices of its last axis at a time: the file's order, whatever the memory's is."""
    slices = max(1, _PIECE // (values[..., 0].size * values.itemsize))
    return (values[..., start : start + slices] for start in range(0, values.shape[2], slices))


def _write(path: Path, header: Any, pieces: Iterable[NDArray]) -> str:
    """Write header and voxels, the first axis fastest, read them back and compare; the file's SHA-256."""
    header["magic"], header["vox_offset"] = header.single_magic, header.single_vox_offset
    stored_type = header.get_data_dtype()
    digest = sha256()
    written = []
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            # 31: a gzip stream, without a name and without a time.
            packer = isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, 31)

            def put(packed: bytes) -> None:
                digest.update(packed)
                file.write(packed)

            put(packer.compress(header.binaryblock.ljust(header.single_vox_offset, b"\0")))  # no extensions
            for piece in pieces:
                voxels = np.asarray(piece, dtype=stored_type, order="F").reshape(-1, order="F").view(np.uint8)
                written.append((voxels.size, isal_zlib.crc32(voxels)))
                put(packer.compress(voxels))
            put(packer.flush())
        try:
            with igzip.open(temporary, "rb") as back:
                _verify(path, back, header, written)
        except _DAMAGED as error:
            raise _not_kept(path) from error
    return digest.hexdigest()


def _verify(path: Path, file: IO[bytes], header: Any, written: Iterable[tuple[int, int]]) -> None:
    """Compare the file, read to its end, with the header and with the size and checksum of every piece of voxels."""
    start = file.read(header.single_vox_offset)
    # As it stands: where the scan's header is odd (a pixdim of 0 beside a sound sform) nibabel would mend it.
    stored = type(header)(start[: len(header.binaryblock)], check=False)
    for name in (*GEOMETRY_FIELDS, "pixdim", "dim", "datatype", "scl_slope", "cal_min", "cal_max"):
        if not np.array_equal(stored[name], header[name], equal_nan=name not in ("dim", "datatype")):
            raise MapError(
                f"{path}: the map would not lie on the scan: {name} reads back as {stored[name]}, not {header[name]}; "
                "nothing was written. Please report it with the scan's header"
            )
    for size, checksum in written:
        if isal_zlib.crc32(file.read(size)) != checksum:
            raise _not_kept(path)
    if file.read(1):  # also has the stream's own checksum looked at
        raise _not_kept(path)


def _not_kept(path: Path) -> WriteError:
    return WriteError(f"{path}: the voxels read back are not the ones written; is the disk sound?")
