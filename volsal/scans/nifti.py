"""NIfTI files in: NIfTI-1 and NIfTI-2, .nii, .nii.gz and .hdr/.img pairs."""

from __future__ import annotations

import gzip
import math
import os
import warnings
import zlib
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import nibabel as nib
import numpy as np
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from numpy.typing import NDArray

from volsal.grid import Grid, GridError
from volsal.scans.scan import Scan, ScanError, file_digest, files_of

# Corner voxels of sform and qform may differ by this much before a person is told.
_FORMS_AGREE_MM = 0.1
_SPACING_MM = (1e-3, 100.0)
_UNITS = {0: "unknown", 1: "metre", 2: "mm", 3: "micron"}
_HEADER_BYTES = 560  # the longer of the two versions, and its magic
_GZIP = b"\x1f\x8b"


def sniff(path: Path) -> bool:
    """Whether the bytes, not the name, say NIfTI.  A gzip stream that is damaged from the start counts as one."""
    if path.suffix.lower() == ".img" and path.with_suffix(".hdr").is_file():
        path = path.with_suffix(".hdr")
    with path.open("rb") as file:
        head = file.read(2)
        file.seek(0)
        if head == _GZIP:
            try:
                with gzip.GzipFile(fileobj=file) as unzipped:
                    start = unzipped.read(_HEADER_BYTES)
            except (OSError, EOFError, zlib.error) as error:
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


def read(path: Path, volume: int | None = None, form: str | None = None) -> Scan:
    """The scan in a NIfTI file; see :func:`volsal.scans.read_scan`.

    A ``.nii.gz`` is read to its end, so that its checksum is verified: a flipped bit is an error, not a voxel.
    """
    if form not in (None, "sform", "qform"):
        raise ScanError(f"{path}: form is 'sform' or 'qform', not {form!r}")
    try:
        with warnings.catch_warnings(), LoggingOutputSuppressor():
            warnings.simplefilter("error", RuntimeWarning)  # overflow while scaling is damage, not a remark
            header, array, digest, left = _load(path, volume)
    except ScanError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise ScanError(f"{path}: the file is cut short or damaged ({_first_line(error)}); fetch it again") from error
    except (HeaderDataError, WrapStructError, nib.filebasedimages.ImageFileError, ValueError, RuntimeWarning) as error:
        reason = _first_line(error)
        if reason.startswith("w2 should be positive"):
            reason = "the qform's quaternion is longer than 1, so it is no rotation"
        raise ScanError(f"{path}: the NIfTI header makes no sense ({reason})") from error
    grid, used, notes = _place(path, header, array.shape, form)
    if left:
        notes.append(f"the file holds {left:,} bytes more than its header describes: is its size in the header right?")
    return Scan(array, grid, path, header, used, volume, digest, tuple(notes))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _load(path: Path, volume: int | None) -> tuple[Any, NDArray[np.float32], str, int]:
    """Header as it stands in the file, voxels, digest, and how many bytes follow the voxels.

    nibabel mends what it finds odd in the header it hands out; what counts here is what the file says.
    """
    parts = files_of(path)
    digest = file_digest(path)
    if len(parts) == 2:
        start = parts[0].read_bytes()[:_HEADER_BYTES]
        image = cast(Any, nib.load(parts[0]))
        return _as_it_stands(image, start), _voxels(path, image, volume, parts[1].stat().st_size), digest, 0
    with path.open("rb") as raw:
        zipped = raw.read(2) == _GZIP
        raw.seek(0)
        stream: IO[bytes] = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if zipped else raw
        start = stream.read(_HEADER_BYTES)
        stream.seek(0)
        image = cast(Any, _image_class(start)).from_stream(stream)
        # Deflate never shrinks below about 1 : 1032, so this bounds what the file can hold before anything is
        # allocated for it.
        most = os.fstat(raw.fileno()).st_size * (1100 if zipped else 1)
        array = _voxels(path, image, volume, most)
        stream.seek(image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize)
        left = 0
        while chunk := stream.read(1 << 20):  # to the end: a gzip stream's checksum stands there
            left += len(chunk)
    return _as_it_stands(image, start), array, digest, left


def _as_it_stands(image: Any, start: bytes) -> Any:
    kind = type(image.header)
    return kind(start[: kind.template_dtype.itemsize], check=False)


def _voxels(path: Path, image: Any, volume: int | None, most_bytes: int) -> NDArray[np.float32]:
    header, shape = image.header, image.shape
    dtype = header.get_data_dtype()
    if dtype.fields or dtype.kind not in "iuf" or dtype.itemsize > 8:
        name = header._data_type_codes.label.get(int(header["datatype"]), dtype)
        raise ScanError(f"{path}: voxels of type {name}; volsal explains one real number per voxel")
    if any(n < 1 for n in shape):
        raise ScanError(f"{path}: an axis without voxels: shape {shape}")
    needed = math.prod(shape) * dtype.itemsize
    if needed > most_bytes:
        raise ScanError(f"{path}: the header promises {needed:,} bytes of voxels, more than the file can hold")
    # nibabel clears these in the header it hands out; the proxy knows what the file says.
    offset, slope, inter = image.dataobj.offset, image.dataobj.slope, image.dataobj.inter
    if isinstance(image, nib.Nifti1Image) and offset < header.single_vox_offset:
        raise ScanError(f"{path}: vox_offset {offset:g} points into the header, so the voxels cannot be found")
    if not (math.isfinite(slope) and math.isfinite(inter)):
        raise ScanError(f"{path}: scaling by slope {slope:g} and intercept {inter:g} leaves no value")
    if len(shape) == 4:
        proxy = image.dataobj[..., _which(path, shape[3], volume)]
    elif len(shape) == 3:
        if volume not in (None, 0):
            raise ScanError(f"{path}: volume {volume} asked for, but the file holds one 3D volume")
        proxy = image.dataobj[...]
    else:
        raise ScanError(f"{path}: {len(shape)}D, shape {shape}; volsal explains 3D scans")
    array = np.ascontiguousarray(proxy, dtype=np.float32)
    if min(array.shape) < 2:
        raise ScanError(f"{path}: shape {array.shape} is a single slice (2D); volsal explains volumes")
    return array


def _which(path: Path, count: int, volume: int | None) -> int:
    if volume is None and count > 1:
        raise ScanError(
            f"{path}: 4D with {count} volumes; say which one to explain with --volume 0 ... --volume {count - 1} "
            "(volume: in the config, volume= in Python)"
        )
    if volume is not None and not 0 <= volume < count:
        raise ScanError(f"{path}: volume {volume} asked for, but there are {count}, counted from 0")
    return volume or 0


def _place(path: Path, header: Any, shape: tuple[int, ...], form: str | None) -> tuple[Grid, str, list[str]]:
    """The grid, which form it came from, and what to tell the reader.

    sform where its code is above 0, else qform, else the NIfTI fallback of pixdim about the volume's middle.
    """
    notes: list[str] = []
    if (units := int(header["xyzt_units"]) & 7) not in (0, 2):
        raise ScanError(
            f"{path}: its unit of length is {_UNITS.get(units, units)}, and volsal works in mm; convert the header"
        )
    grids = _stated_grids(path, header, shape, form, notes)
    used = next(iter(grids), "none")
    if used == "none":
        grids["none"] = Grid(shape, header.get_base_affine())
        notes.append("the file states no orientation (sform and qform code 0): left and right are a guess")
    if len(grids) == 2:
        notes += _compare(path, grids["sform"], grids["qform"])
    spacing = grids[used].spacing
    if spacing.min() < _SPACING_MM[0] or spacing.max() > _SPACING_MM[1]:
        _absurd(path, spacing)
    pixdim = np.asarray(header["pixdim"][1:4], dtype=float)
    if used != "qform" and not np.allclose(pixdim, spacing, rtol=0.01):
        notes.append(f"pixdim says {_mm(pixdim)}, the {used} in use {_mm(spacing)}: the {used} counts")
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
        raise ValueError(f"pixdim says voxels of {_mm(pixdim)}")
    return header.get_qform()


def _compare(path: Path, sform: Grid, qform: Grid) -> list[str]:
    if sform.orientation != qform.orientation:
        raise ScanError(
            f"{path}: sform says {sform.orientation}, qform says {qform.orientation}: the two disagree on the "
            "orientation; find out which is right and pass --form sform or --form qform"
        )
    apart = sform.distance_mm(qform)
    if apart <= _FORMS_AGREE_MM:
        return []
    return [f"sform and qform place a corner {apart:.3g} mm apart; the sform was used (--form qform for the other)"]


def _absurd(path: Path, spacing: NDArray[np.float64]) -> NoReturn:
    low, high = _SPACING_MM
    raise ScanError(f"{path}: voxels of {_mm(spacing)}; expected between {low:g} and {high:g} mm: check the unit")


def _mm(lengths: NDArray[np.float64]) -> str:
    return " x ".join(f"{mm:.4g}" for mm in lengths) + " mm"
