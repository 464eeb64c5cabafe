"""NIfTI files in: NIfTI-1 and NIfTI-2, .nii, .nii.gz and .hdr/.img pairs."""

from __future__ import annotations

import io
import math
import os
import warnings
import zlib
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, cast

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.arrayproxy import ArrayProxy
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from volsal.grid import Grid, GridError
from volsal.scans.limits import millimetres, require_room, require_spacing, rest_of
from volsal.scans.scan import Reading, Scan, ScanError, files_of, fill

# Corner voxels of sform and qform may differ by this much before a person is told.
_FORMS_AGREE_MM = 0.1
_UNITS = {0: "unknown", 1: "metre", 2: "mm", 3: "micron"}
_HEADER_BYTES = 560  # the longer of the two versions, and its magic
# What stands before the voxels, and after those that the header describes, is read up to these many bytes.
_MOST_EXTENSIONS, _MOST_LEFT = 1 << 26, 1 << 28
_GZIP = b"\x1f\x8b"
_PIECE = 1 << 20  # bytes of voxels that are read and converted at a time
_DAMAGED: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, cast(type[Exception], isal_zlib.IsalError))


def sniff(path: Path) -> bool:
    """Whether the bytes, not the name, say NIfTI.  A gzip stream that is damaged from the start counts as one."""
    if path.suffix.lower() == ".img" and path.with_suffix(".hdr").is_file():
        path = path.with_suffix(".hdr")
    with path.open("rb") as file:
        head = file.read(2)
        file.seek(0)
        if head == _GZIP:
            try:
                with igzip.IGzipFile(fileobj=file) as unzipped:
                    start = unzipped.read(_HEADER_BYTES)
            except _DAMAGED as error:
                raise ScanError(f"{path}: the gzip stream is damaged ({error}); fetch the file again") from error
        else:
            start = file.read(_HEADER_BYTES)
    return _image_class(start) is not None


def _image_class(start: bytes) -> Any | None:
    for image_class in (nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair, nib.Nifti2Pair):
        if image_class.header_class.may_contain_header(start) and _magic(start) in _MAGICS[image_class]:
            return image_class
    return None


_MAGICS = {
    nib.Nifti1Image: (b"n+1\0",),
    nib.Nifti2Image: (b"n+2\0",),
    nib.Nifti1Pair: (b"ni1\0",),
    nib.Nifti2Pair: (b"ni2\0",),
}


def _magic(start: bytes) -> bytes:
    return start[344:348] if start[344:348] in (b"n+1\0", b"ni1\0") else start[4:8]


def read(path: Path, reading: Reading) -> Scan:
    """The scan in a NIfTI file; see :func:`volsal.scans.read_scan`.

    A ``.nii.gz`` is read to its end, so that its checksum is verified: a flipped bit is an error, not a voxel.
    """
    try:
        with warnings.catch_warnings(), LoggingOutputSuppressor():
            warnings.simplefilter("ignore", UserWarning)  # on the form of extensions, which nothing here reads
            warnings.simplefilter("error", RuntimeWarning)  # overflow while scaling is damage, not a remark
            header, array, digest, size, left = _load(path, reading.volume)
    except ScanError:
        raise
    except MemoryError as error:
        raise ScanError(f"{path}: not enough memory on this machine for its voxels") from error
    except _DAMAGED as error:
        raise ScanError(f"{path}: the file is cut short or damaged ({_first_line(error)}); fetch it again") from error
    except (HeaderDataError, WrapStructError, nib.filebasedimages.ImageFileError, ValueError, RuntimeWarning) as error:
        raise ScanError(f"{path}: the NIfTI header makes no sense ({_first_line(error)})") from error
    grid, used, notes = _place(path, header, array.shape, reading)
    notes += fill(path, array, reading)
    if left:
        notes.append(f"the file holds {left:,} bytes more than its header describes: is its size in the header right?")
    return Scan(array, grid, path, header, used, reading.volume, digest, tuple(notes), reading.nan, size=size)


def _first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return "its quaternion is longer than 1, so it is no rotation" if line.startswith("w2 should be") else line


def _load(path: Path, volume: int | None) -> tuple[Any, NDArray[np.float32], str, int, int]:
    """Header as it stands in the file, voxels, digest, bytes in all, and how many of them follow the voxels.

    nibabel mends what it finds odd in the header it hands out; what counts here is what the file says.  Extensions
    are not read: they may be of any size, and nothing here needs them.  The digest is of the very bytes that the
    voxels were made of: the file is read once, to its end.
    """
    parts = files_of(path)
    digest = sha256()
    start = b""
    if len(parts) == 2:
        with parts[0].open("rb") as file:
            start = file.read(_HEADER_BYTES)
            digest.update(start)
            while rest := file.read(_PIECE):
                digest.update(rest)
    with parts[-1].open("rb") as file:
        stream = _Stream(file, digest)
        start = start or stream.start
        kind = cast(Any, _image_class(start)).header_class
        block = start[: kind.template_dtype.itemsize]
        header = kind(block)  # checked, and mended where that is possible
        held = os.fstat(file.fileno()).st_size
        _require_near(path, header, held)
        proxy = ArrayProxy(str(path), kind(block, check=False), mmap=False)
        array = _voxels(path, header, proxy, volume, held, stream)
        described = math.prod(proxy.shape) * proxy.dtype.itemsize
        stream.skip_to(proxy.offset + described)
        left = rest_of(path, cast(IO[bytes], stream), max(described, _MOST_LEFT))
    size = sum(part.stat().st_size for part in parts)
    return kind(block, check=False), array, digest.hexdigest(), size, left


class _Hashed(io.RawIOBase):
    """A file that is read from its start to its end, and hashed on the way."""

    def __init__(self, file: io.BufferedReader, digest: Any) -> None:
        self._file = file
        self._digest = digest

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        count = self._file.readinto(room)
        self._digest.update(memoryview(room)[:count])
        return count


class _Stream:
    """The bytes of a file from the first to the last, unfolded where it is gzipped.

    ``zipped`` says whether it is, and ``start`` holds what a header may take of it, not counted as read; ``digest``
    takes in the file's own bytes as they are read.
    """

    def __init__(self, file: io.BufferedReader, digest: Any) -> None:
        self.zipped = file.peek(2)[:2] == _GZIP
        raw = _Hashed(file, digest)
        self._bytes = cast(IO[bytes], igzip.IGzipFile(fileobj=raw) if self.zipped else io.BufferedReader(raw, _PIECE))
        self._at = 0
        self.start = self._ahead = self._bytes.read(_HEADER_BYTES)

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes; fewer at the end."""
        content, self._ahead = self._ahead[:count], self._ahead[count:]
        content += self._bytes.read(count - len(content))
        self._at += len(content)
        return content

    def skip_to(self, at: int) -> None:
        """Leave out what comes before byte ``at``, as far as there is any."""
        while self._at < at and self.read(min(at - self._at, _PIECE)):
            pass


def _require_near(path: Path, header: Any, held: int) -> None:
    """Refuse voxels that begin past the end of the file, or far into what it unfolds to."""
    offset = float(header["vox_offset"])
    if offset > max(held, _MOST_EXTENSIONS):
        raise ScanError(f"{path}: vox_offset {offset:g} points past the file's end, so the voxels cannot be found")


def _voxels(
    path: Path, header: Any, proxy: ArrayProxy, volume: int | None, held: int, stream: _Stream
) -> NDArray[np.float32]:
    shape, dtype = proxy.shape, proxy.dtype
    if dtype.fields or dtype.kind not in "iuf" or dtype.itemsize > 8:
        name = header._data_type_codes.label.get(int(header["datatype"]), dtype)
        raise ScanError(f"{path}: voxels of type {name}; volsal explains one real number per voxel")
    if any(n < 1 for n in shape):
        raise ScanError(f"{path}: an axis without voxels: shape {shape}")
    require_room(path, shape, dtype.itemsize, held, stream.zipped)
    offset, slope, inter = proxy.offset, proxy.slope, proxy.inter
    if header.is_single and offset < header.single_vox_offset:
        raise ScanError(f"{path}: vox_offset {offset:g} points into the header, so the voxels cannot be found")
    if not (math.isfinite(slope) and math.isfinite(inter)):
        raise ScanError(f"{path}: scaling by slope {slope:g} and intercept {inter:g} leaves no value")
    if len(shape) == 4:
        which = _which(path, shape[3], volume)
    elif len(shape) == 3:
        if volume not in (None, 0):
            raise ScanError(f"{path}: volume {volume} asked for, but the file holds one 3D volume")
        which = 0
    else:
        raise ScanError(f"{path}: {len(shape)}D, shape {shape}; volsal explains 3D scans")
    array = _scaled(stream, proxy, which)
    if min(array.shape) < 2:
        raise ScanError(f"{path}: shape {array.shape} is a single slice (2D); volsal explains volumes")
    return array


def _scaled(stream: _Stream, proxy: Any, which: int) -> NDArray[np.float32]:
    """One volume's stored values times slope plus intercept, (I, J, K), the first axis fastest, as in the file.

    A few MB are read at a time and go straight to their place, scaled in float64: neither the stored values nor those
    in float64 are ever there as a whole.

    Raises
    ------
    EOFError
        Where the stream ends before the voxels do.
    """
    dtype = proxy.dtype
    array = np.empty(proxy.shape[2::-1], np.float32)
    values = array.reshape(-1)
    stream.skip_to(proxy.offset + which * values.size * dtype.itemsize)
    at, plain = 0, (proxy.slope, proxy.inter) == (1, 0)
    while at < values.size:
        wanted = min(_PIECE, (values.size - at) * dtype.itemsize)
        piece = stream.read(wanted)
        if len(piece) < wanted:
            raise EOFError(f"{values.size:,} voxels expected, {at + len(piece) // dtype.itemsize:,} found")
        stored = np.frombuffer(piece, dtype)
        scaled = stored if plain else stored * np.float64(proxy.slope) + np.float64(proxy.inter)
        values[at : at + len(stored)] = scaled
        at += len(stored)
    return array.transpose()


def _which(path: Path, count: int, volume: int | None) -> int:
    if volume is None and count > 1:
        raise ScanError(
            f"{path}: 4D with {count} volumes; say which one to explain with --volume 0 ... --volume {count - 1} "
            "(volume: in the config, volume= in Python)"
        )
    if volume is not None and not 0 <= volume < count:
        raise ScanError(f"{path}: volume {volume} asked for, but there are {count}, counted from 0")
    return volume or 0


def _place(path: Path, header: Any, shape: tuple[int, ...], reading: Reading) -> tuple[Grid, str, list[str]]:
    """The grid, which form it came from, and what to tell the reader.

    sform where its code is above 0, else qform, else the NIfTI fallback of pixdim about the volume's middle.
    """
    notes: list[str] = []
    if (units := int(header["xyzt_units"]) & 7) not in (0, 2):
        raise ScanError(
            f"{path}: its unit of length is {_UNITS.get(units, units)}, and volsal works in mm; convert the header"
        )
    grids = _stated_grids(path, header, shape, reading.form, notes)
    used = next(iter(grids), "none")
    if used == "none":
        try:
            grids["none"] = Grid(shape, header.get_base_affine())
        except GridError as error:
            raise ScanError(f"{path}: it states no orientation, and its pixdim is unusable: {error}") from error
        notes.append("the file states no orientation (sform and qform code 0): left and right are a guess")
    if len(grids) == 2:
        notes += _compare(path, grids["sform"], grids["qform"], reading.strict)
    spacing = require_spacing(path, grids[used])
    pixdim = np.asarray(header["pixdim"][1:4], dtype=float)
    if used != "qform" and not np.allclose(pixdim, spacing, rtol=0.01):
        notes.append(f"pixdim says {millimetres(pixdim)}, the {used} in use {millimetres(spacing)}: the {used} counts")
    return grids[used], used, notes


def _stated_grids(
    path: Path, header: Any, shape: tuple[int, ...], form: str | None, notes: list[str]
) -> dict[str, Grid]:
    """The grids of the forms that the file states, the one that counts first; only ``form`` where it is given."""
    coded = [name for name in ("sform", "qform") if int(header[f"{name}_code"]) > 0]
    if form and form not in coded:
        raise ScanError(f"{path}: {form} asked for, but its code is 0, so the file does not state one")
    wanted = [form] if form else coded
    grids: dict[str, Grid] = {}
    for name in wanted:
        try:
            grids[name] = Grid(shape, header.get_sform() if name == "sform" else _qform(header))
        except (GridError, HeaderDataError, ValueError) as error:
            if name == wanted[0]:
                raise ScanError(f"{path}: its {name} is unusable: {_first_line(error)}") from error
            notes.append(f"the qform is unusable and was not used ({_first_line(error)})")
    return grids


def _qform(header: Any) -> NDArray[np.float64]:
    pixdim = np.asarray(header["pixdim"][1:4], dtype=float)
    if not (pixdim > 0).all():
        raise ValueError(f"pixdim says voxels of {millimetres(pixdim)}")
    if header["pixdim"][0] == 0:  # the standard's qfac: 0 counts as 1
        header = header.copy()
        header["pixdim"][0] = 1
    return header.get_qform()


def _compare(path: Path, sform: Grid, qform: Grid, strict: bool) -> list[str]:
    if sform.orientation != qform.orientation:
        raise ScanError(
            f"{path}: sform says {sform.orientation}, qform says {qform.orientation}: the two disagree on the "
            "orientation; find out which is right and pass --form sform or --form qform"
        )
    apart = sform.distance_mm(qform)
    if apart <= _FORMS_AGREE_MM:
        return []
    if strict:
        raise ScanError(
            f"{path}: sform and qform place a corner {apart:.3g} mm apart (allowed: {_FORMS_AGREE_MM:g}); find out "
            "which is right and pass --form sform or --form qform"
        )
    return [f"sform and qform place a corner {apart:.3g} mm apart; the sform was used (--form qform for the other)"]
