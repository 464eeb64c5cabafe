"""A scan in memory, and the one door through which scan files come in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from volsal.errors import VolsalError
from volsal.grid import Grid


class ScanError(VolsalError, ValueError):
    """A scan cannot be read, or what it holds cannot be explained without guessing."""


class MissingScanError(ScanError):
    """There is no file of that name."""


@dataclass(frozen=True, eq=False)
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
    """

    array: NDArray[np.float32]
    grid: Grid
    path: Path | None = None
    header: Any = None
    form: str = "sform"
    volume: int | None = None
    sha256: str | None = None
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.array.shape != self.grid.shape:
            raise ScanError(f"{self}: the array is {self.array.shape}, its grid {self.grid.shape}")
        finite = np.isfinite(self.array)
        if not finite.all():
            bad = np.argwhere(~finite)
            raise ScanError(
                f"{self}: {len(bad):,} of {self.array.size:,} voxels are NaN or infinite, the first at "
                f"{tuple(int(i) for i in bad[0])}; a model's answer to them means nothing, so fill them first"
            )

    def __str__(self) -> str:
        return str(self.path) if self.path else "scan in memory"

    @classmethod
    def from_array(cls, array: ArrayLike, affine: ArrayLike) -> Scan:
        """A scan from an (I, J, K) array and its (4, 4) affine, voxel centre to RAS+ mm."""
        values = np.asarray(array, dtype=np.float32)
        if values.ndim != 3:
            raise ScanError(f"a scan is a three-dimensional array; this one has shape {values.shape}")
        return cls(values, Grid(values.shape, affine))


def read_scan(path: str | Path, volume: int | None = None, form: str | None = None) -> Scan:
    """Read a scan file.

    Parameters
    ----------
    path : a NIfTI-1 or NIfTI-2 file: .nii, .nii.gz, or .hdr/.img
    volume : which volume of a 4D file, from 0.  A 4D file without it is refused rather than guessed at
    form : "sform" or "qform", to choose where a file's two affines disagree

    Raises
    ------
    ScanError
        Naming the file, what was found, and what to do.
    """
    from volsal.scans import nifti

    readers: list[tuple[Callable[[Path], bool], Callable[..., Scan]]] = [(nifti.sniff, nifti.read)]
    path = Path(path)
    _require_regular_file(path)
    for sniff, read in readers:
        if sniff(path):
            return read(path, volume=volume, form=form)
    raise ScanError(f"{path}: not a NIfTI file{_what_it_looks_like(path)}; volsal reads .nii, .nii.gz and .hdr/.img")


def files_of(path: Path) -> list[Path]:
    """The files that make up the scan at ``path``: header and voxels of a .hdr/.img pair, else the one file."""
    if path.suffix.lower() not in (".hdr", ".img"):
        return [path]
    parts = [path.with_suffix(".hdr"), path.with_suffix(".img")]
    for part in parts:
        if not part.is_file():
            raise ScanError(f"{path}: its other half, {part.name}, is missing; a .hdr and its .img belong together")
    return parts


def file_digest(path: Path) -> str:
    """SHA-256 of the bytes of the scan's file or files, hexadecimal."""
    _require_regular_file(path)
    digest = sha256()
    for part in files_of(path):
        with part.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _require_regular_file(path: Path) -> None:
    # Before any open(): a named pipe would block for ever, /dev/zero would never end.
    try:
        if path.is_dir():
            raise ScanError(f"{path}: a folder, not a scan; give one file, or use `volsal run` for many")
        if not path.exists():
            dangling = " (a link whose target is gone)" if path.is_symlink() else ""
            raise MissingScanError(f"{path}: no such file{dangling}")
        if not path.is_file():
            raise ScanError(f"{path}: not a regular file (a device, a pipe or a socket)")
        if path.stat().st_size == 0:
            raise ScanError(f"{path}: the file is empty; was the copy or download cut short?")
    except OSError as error:
        raise ScanError(f"{path}: {error.strerror or error}") from error


_SIGNATURES = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"PK\x03\x04": "a zip archive",
    b"NRRD": "an NRRD file",
    b"ObjectType": "a MetaImage header",
    b"version https://git-lfs": "a git-LFS pointer, not the file itself (run `git lfs pull`)",
    b"<!DOCTYPE": "an HTML page (a failed download?)",
    b"<!doctype": "an HTML page (a failed download?)",
    b"<html": "an HTML page (a failed download?)",
}


def _what_it_looks_like(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(132)
    if head[128:132] == b"DICM":
        return "; it is a DICOM file (convert the series with dcm2niix first)"
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature):
            return f"; it looks like {name}"
    return ""
