"""A scan in memory, and the one door through which scan files come in."""

from __future__ import annotations

import stat
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from volsal.errors import VolsalError
from volsal.grid import Grid
from volsal.scans.digest import sha256_after, sha256_of

# How a gzipped file begins.
_GZIP = b"\x1f\x8b"
# Channels whose corner voxels lie this near to each other, mm, count as lying on one grid.
ON_ONE_GRID_MM = 0.1


class ScanError(VolsalError, ValueError):
    """A scan cannot be read, or what it holds cannot be explained without guessing."""


class MissingScanError(ScanError):
    """There is no file of that name."""


@dataclass(frozen=True, eq=False, repr=False)
class Scan:
    """One patient volume as acquired, with its place in the world.

    Attributes
    ----------
    array : (I, J, K) float32, scaled to the file's real-world values, axes in the file's own order
    grid : where its voxels lie
    path : the file it came from; None for a scan made in memory
    header : what a map written over this scan copies from the file: its geometry bytes.  Never free text
    form : "sform", "qform" or "none": where the affine came from
    volume : index along the fourth axis of the file; None for a 3D file
    sha256 : digest of the file's bytes, hexadecimal
    notes : what a reader of the result should know about the file, in words
    filled : what NaN and infinite voxels of the file became; None where the file was not asked to hold any
    series, slices : the choices by which a DICOM folder was read again the same way, as in :class:`Reading`
    further : the case's further channels (other sequences of one patient), scans on the same grid, in the model's order
    size : bytes of the file, or of the files that it is in; None where ``sha256`` is
    """

    array: NDArray[np.float32]
    grid: Grid
    path: Path | None = None
    header: Any = None
    form: str = "sform"
    volume: int | None = None
    sha256: str | None = None
    notes: tuple[str, ...] = field(default=())
    filled: float | None = None
    series: str | None = None
    slices: str | None = None
    further: tuple[Scan, ...] = field(default=())
    size: int | None = None

    def __post_init__(self) -> None:
        if self.array.shape != self.grid.shape:
            raise ScanError(f"{self}: the array is {self.array.shape}, its grid {self.grid.shape}")
        for scan in self.further:
            if scan.grid is not self.grid and not scan.grid.same_as(self.grid, ON_ONE_GRID_MM):
                raise ScanError(f"{scan}: not on the voxels of {self}, the case's first channel; see read_case")
        # NaN goes through to both extremes, which take no memory to find.
        if not np.isfinite([self.array.min(), self.array.max()]).all():
            bad = np.argwhere(~np.isfinite(self.array))
            raise ScanError(
                f"{self}: {len(bad):,} of {self.array.size:,} voxels are NaN or infinite, the first at "
                f"{tuple(int(i) for i in bad[0])}; a model's answer to them means nothing: fill them, or say with "
                "what (--nan, or nan: in the config's scans)"
            )

    def __str__(self) -> str:
        return str(self.path) if self.path else "scan in memory"

    def __repr__(self) -> str:
        return f"Scan({self}, {self.grid!r})"

    @property
    def channels(self) -> NDArray[np.float32]:
        """(C, I, J, K): this scan's voxels and those of its further channels; a copy, unless there is one channel."""
        if not self.further:
            return self.array[None]
        return np.stack([self.array, *(scan.array for scan in self.further)])

    @property
    def paths(self) -> tuple[Path | None, ...]:
        """The path of every channel."""
        return (self.path, *(scan.path for scan in self.further))

    def without_voxels(self) -> Scan:
        """The same, with zeros that take no memory in place of its voxels: where it lies and what it is called stay."""
        emptied = copy(self)
        # Past the checks, which would go through all the zeros.
        object.__setattr__(emptied, "array", np.broadcast_to(np.float32(0), self.grid.shape))
        object.__setattr__(emptied, "further", tuple(scan.without_voxels() for scan in self.further))
        return emptied

    @classmethod
    def from_array(cls, array: ArrayLike, affine: ArrayLike) -> Scan:
        """A scan from an (I, J, K) array and its (4, 4) affine, voxel centre to RAS+ mm."""
        values = np.asarray(array, dtype=np.float32)
        if values.ndim != 3:
            raise ScanError(f"a scan is a three-dimensional array; this one has shape {values.shape}")
        return cls(values, Grid(values.shape, affine))


@dataclass(frozen=True)
class Reading:
    """How scan files are read, where a file leaves a choice.

    Attributes
    ----------
    volume : which volume of a 4D file, from 0.  A 4D file without it is refused rather than guessed at
    form : "sform" or "qform", to choose where a NIfTI file's two affines disagree
    strict : refuse a file whose two affines lie more than 0.1 mm apart, instead of noting it
    nan : what NaN and infinite voxels become.  A file that holds some is refused where this is None
    series : which series of a DICOM folder: a SeriesInstanceUID, its number in ``volsal series FOLDER``, or a part of
        its description.  A folder with several is refused without it
    slices : "resample" accepts DICOM slices at uneven distances and interpolates between them; None refuses them
    """

    volume: int | None = None
    form: str | None = None
    strict: bool = False
    nan: float | None = None
    series: str | None = None
    slices: str | None = None

    def __post_init__(self) -> None:
        if self.slices not in (None, "resample"):
            raise ScanError(f"slices is 'resample' or left out, not {self.slices!r}")
        if self.form not in (None, "sform", "qform"):
            raise ScanError(f"form is 'sform' or 'qform', not {self.form!r}")
        if self.nan is not None and not abs(self.nan) <= float(np.finfo(np.float32).max):
            raise ScanError(f"nan is the number that NaN voxels become, not {self.nan!r}")


def read_scan(
    path: str | Path,
    volume: int | None = None,
    form: str | None = None,
    strict: bool = False,
    nan: float | None = None,
    series: str | int | None = None,
    slices: str | None = None,
) -> Scan:
    """Read a scan file, or a DICOM series.

    Parameters
    ----------
    path : a NIfTI-1 or NIfTI-2 file (.nii, .nii.gz, .hdr/.img), NRRD (.nrrd, .nhdr) or MetaImage (.mha, .mhd); or a
        DICOM folder, or one of a series' files
    volume, form, strict, nan, series, slices : as in :class:`Reading`

    Raises
    ------
    ScanError
        Naming the file, what was found, and what to do.
    """
    from volsal.scans import dicom, metaimage, nifti, nrrd

    reading = Reading(volume, form, strict, nan, None if series is None else str(series), slices)
    readers: list[tuple[Callable[[Path], bool], Callable[[Path, Reading], Scan]]] = [
        (nifti.sniff, nifti.read),
        (nrrd.sniff, nrrd.read),
        (metaimage.sniff, metaimage.read),
        (dicom.sniff, dicom.read),
    ]
    path = Path(path)
    if path.is_dir() and dicom.sniff(path):
        return dicom.read(path, reading)
    require_regular_file(path)
    for sniff, read in readers:
        if sniff(path):
            return read(path, reading)
    raise ScanError(
        f"{path}: not a NIfTI file{_what_it_looks_like(path)}; volsal reads .nii, .nii.gz, .hdr/.img, .nrrd, .nhdr, "
        ".mha, .mhd and DICOM"
    )


def fill(path: Path, array: NDArray[np.float32], reading: Reading) -> list[str]:
    """Put ``reading.nan`` where ``array`` is NaN or infinite, in place; return what to tell the reader of a result."""
    if reading.nan is None:
        return []
    bad = ~np.isfinite(array)
    count = int(bad.sum())
    if count == array.size:
        raise ScanError(f"{path}: every voxel is NaN or infinite, so there is nothing left to explain")
    array[bad] = reading.nan
    return [f"{count:,} of {array.size:,} voxels were NaN or infinite and became {reading.nan:g}"] if count else []


def files_of(path: Path) -> list[Path]:
    """The files that make up the scan at ``path``.

    Header and voxels of a .hdr/.img pair or of an .nhdr or .mhd, every DICOM file of a folder, else the one file.
    """
    if path.is_dir():
        from volsal.scans import dicom

        return dicom.files(path)
    if path.suffix.lower() not in (".hdr", ".img"):
        return _header_and_data(path)
    parts = [path.with_suffix(".hdr"), path.with_suffix(".img")]
    for part in parts:
        if not part.is_file():
            raise ScanError(f"{path}: its other half, {part.name}, is missing; a .hdr and its .img belong together")
    return parts


def _header_and_data(path: Path) -> list[Path]:
    from volsal.scans import metaimage, nrrd

    for kind in (nrrd, metaimage):
        if path.is_file() and kind.sniff(path):
            return kind.files(path)
    return [path]


def file_digest(path: Path) -> str:
    """SHA-256 of the bytes of the scan's file or files, hexadecimal; of a folder, over its DICOM files' digests."""
    if path.is_dir() and (parts := files_of(path)):
        from volsal.scans import dicom

        return dicom.digest(parts)
    require_regular_file(path)
    if path.suffix.lower() == ".gz":
        # What is gzipped as a whole has no second file, and need not be looked into for one.
        with path.open("rb", buffering=0) as file:
            if (head := file.read(len(_GZIP))) == _GZIP:
                return sha256_after(head, file)
    return sha256_of(*files_of(path))


def require_regular_file(path: Path) -> None:
    """Raise :class:`ScanError` unless ``path`` is a file with bytes in it; without opening it."""
    # Before any open(): a named pipe would block for ever, /dev/zero would never end.
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # the last: of a name that no file can have
        dangling = " (a link whose target is gone)" if path.is_symlink() else ""
        raise MissingScanError(f"{path}: no such file{dangling}") from error
    except OSError as error:
        raise ScanError(f"{path}: {error.strerror or error}") from error
    if stat.S_ISDIR(found.st_mode):
        raise ScanError(f"{path}: a folder, not a scan; give one file, or use `volsal run` for many")
    if not stat.S_ISREG(found.st_mode):
        raise ScanError(f"{path}: not a regular file (a device, a pipe or a socket)")
    if found.st_size == 0:
        raise ScanError(f"{path}: the file is empty; was the copy or download cut short?")


_SIGNATURES = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"PK\x03\x04": "a zip archive",
    b"NRRD": "an NRRD file of a version volsal does not know",
    b"ObjectType": "a damaged MetaImage header",
    b"version https://git-lfs": "a git-LFS pointer, not the file itself (run `git lfs pull`)",
    b"<!DOCTYPE": "an HTML page (a failed download?)",
    b"<!doctype": "an HTML page (a failed download?)",
    b"<html": "an HTML page (a failed download?)",
}


def _what_it_looks_like(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(32)
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature):
            return f"; it looks like {name}"
    return ""
