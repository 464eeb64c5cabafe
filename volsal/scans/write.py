"""Maps out: an overlay on the scan's own voxels, with the scan's own geometry bytes and nothing else of its header."""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from nibabel.imageglobals import LoggingOutputSuppressor
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


class WriteError(VolsalError, OSError):
    """A result cannot be written, or was not written as it should be."""


class MapError(VolsalError, ValueError):
    """A map would not lie on its scan.  The scan's header is at fault and not the disk, so other scans may go on."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that becomes ``path`` when the block ends well, and vanishes otherwise.

    A file under its final name is therefore always whole, whatever happens in between.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".volsal-", suffix=path.name[-40:], dir=path.parent)
    except OSError as error:
        raise WriteError(f"{path.parent}: cannot write there: {error.strerror or error}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
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


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def map_header(scan: Scan, intent: str, description: str, window: tuple[float, float]) -> Any:
    """The NIfTI header of a float32 map over ``scan``: its geometry, what the map is, and how to show it.

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


def write_map(path: Path, values: NDArray[np.float32], header: Any) -> None:
    """Write ``values`` (I, J, K) as gzipped NIfTI under ``path``, then read it back and compare.

    Raises
    ------
    WriteError
        Where the disk refuses, or does not keep what it was given.
    MapError
        Where the geometry read back is not the scan's.
    """
    version = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    # affine=None keeps both forms and their codes to the bit; passing the affine would rewrite them.
    image = cast(Any, version)(np.asarray(values, dtype=np.float32), None, header)
    for name in (*GEOMETRY_FIELDS, "pixdim"):  # nibabel mends what is odd in a scan's header; the map has it as it is
        image.header[name] = header[name]
    with replacing(path) as temporary:
        with temporary.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as file:
            image.to_stream(file)
        _verify(path, temporary, values, header)


def write_parts(path: Path, parts: Iterable[NDArray[np.float32]], count: int, header: Any) -> None:
    """Write ``count`` volumes (I, J, K) as one gzipped 4D NIfTI; one at a time is in memory.

    ``header`` is that of a map of the same scan, as :func:`map_header` makes it.  What was written is read back and
    compared; errors as for :func:`write_map`.
    """
    header = header.copy()
    header.set_data_shape((*header.get_data_shape()[:3], count))
    header["magic"], header["vox_offset"] = header.single_magic, header.single_vox_offset
    written = sha256()
    with replacing(path) as temporary:
        with temporary.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as file:
            file.write(header.binaryblock.ljust(header.single_vox_offset, b"\0"))  # no extensions
            for part in parts:
                voxels = np.asarray(part, dtype=np.float32).tobytes(order="F")
                written.update(voxels)
                file.write(voxels)
        read = sha256()
        with gzip.open(temporary, "rb") as file:
            _verify_header(path, type(header)(file.read(len(header.binaryblock)), check=False), header)
            file.seek(header.single_vox_offset)
            while chunk := file.read(1 << 24):
                read.update(chunk)
        if read.digest() != written.digest():
            raise WriteError(f"{path}: the voxels read back are not the ones written; is the disk sound?")


def _verify(path: Path, written: Path, values: NDArray[np.float32], header: Any) -> None:
    with gzip.open(written, "rb") as file:
        # As it stands: where the scan's header is odd (a pixdim of 0 beside a sound sform) nibabel would mend it.
        stored = type(header)(file.read(header.template_dtype.itemsize), check=False)
        file.seek(0)
        with LoggingOutputSuppressor():
            image = cast(Any, nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image)
            back = np.asanyarray(image.from_stream(file).dataobj)
    _verify_header(path, stored, header)
    if not np.array_equal(back, values):
        raise WriteError(f"{path}: the voxels read back are not the ones written; is the disk sound?")


def _verify_header(path: Path, stored: Any, header: Any) -> None:
    for name in (*GEOMETRY_FIELDS, "pixdim", "dim", "cal_min", "cal_max"):
        if not np.array_equal(stored[name], header[name], equal_nan=name not in ("dim",)):
            raise MapError(
                f"{path}: the map would not lie on the scan: {name} reads back as {stored[name]}, not {header[name]}; "
                "nothing was written. Please report it with the scan's header"
            )
