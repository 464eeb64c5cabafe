"""Scans with a known answer: a real head, lesions planted at known millimetre positions, any storage orientation.

The head is the MRI that nibabel carries for its own tests, so nothing is downloaded.  Every scan shows it deformed,
scaled and perhaps mirrored, with a shading, a contrast and noise of its own; lesions are added after the head has been
resampled, from a formula in world millimetres, so their position owes nothing to interpolation.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import permutations, product
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray

from volsal.errors import VolsalError
from volsal.grid import Grid
from volsal.resampling import resample
from volsal.scans import Scan, read_scan
from volsal.scans.write import replacing

ORIENTATIONS = tuple(
    "".join(letters)
    for axes in permutations(("LR", "PA", "IS"))
    for letters in product(*axes)
)  # fmt: skip

# A lesion fades from full to nothing between these multiples of its radii.
_EDGE = (0.7, 1.3)
# Lesions keep this far from the edge of the brain, and their centres this far from the edge of the field of view.
_FROM_BRAIN_EDGE_MM = 10.0
_FROM_SCAN_EDGE_MM = 15.0


@dataclass(frozen=True)
class Lesion:
    """A soft-edged ellipsoid with axes along the world's.

    Attributes
    ----------
    center_mm : (3,) its middle, mm RAS+
    radii_mm : (3,) where it has faded to half, along x, y and z, mm
    contrast : what it adds in the middle; negative for a dark one.  1 is the brightness of healthy tissue
    """

    center_mm: tuple[float, float, float]
    radii_mm: tuple[float, float, float]
    contrast: float


@dataclass(frozen=True)
class Anatomy:
    """A head to be scanned.

    Attributes
    ----------
    array : (I, J, K) float32, healthy tissue near 1, air near 0
    grid : where its voxels lie
    spots : (N, 3) positions deep in the tissue, where a lesion may sit, mm
    """

    array: NDArray[np.float32]
    grid: Grid
    spots: NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """One scan and the truth about it; ``lesion`` is None where there is none."""

    name: str
    scan: Scan
    lesion: Lesion | None

    @property
    def label(self) -> int:
        """Index into :data:`volsal.demo.net.CLASSES`."""
        return int(self.lesion is not None)


def head() -> Scan:
    """The head MRI inside nibabel: 128 x 96 x 24 voxels of 2 x 2 x 2.2 mm.

    Raises
    ------
    VolsalError
        Where this installation of nibabel came without its test data.
    """
    # Not nibabel.testing.data_path: importing that needs pytest.
    path = Path(str(files("nibabel"))) / "tests" / "data" / "example4d.nii.gz"
    if not path.is_file():
        raise VolsalError(
            f"{path}: not there, so this nibabel came without its test data; pip install --force-reinstall nibabel"
        )
    return read_scan(path, volume=0)


def anatomy(scan: Scan, rng: np.random.Generator | None = None) -> Anatomy:
    """The head in ``scan`` as it is, or bent at random by a few mm."""
    tissue = float(np.median(scan.array[scan.array > 0.25 * np.percentile(scan.array, 99)]))
    values = torch.from_numpy(scan.array / tissue)
    if rng is not None:
        values = _bent(values, scan.grid.spacing, rng)
    return Anatomy(values.numpy(), scan.grid, _deep_in_tissue(values, scan.grid))


def _bent(values: torch.Tensor, spacing: NDArray[np.float64], rng: np.random.Generator) -> torch.Tensor:
    """``values`` (I, J, K) sampled through a smooth random displacement with a standard deviation of 4 mm."""
    half_extent = spacing * values.shape / 2
    shift = rng.normal(0, 4.0, (1, 3, 4, 4, 3)) / half_extent[:, None, None, None]
    shape = tuple(values.shape)
    smooth = F.interpolate(torch.from_numpy(shift).float(), shape, mode="trilinear", align_corners=True)
    at = F.affine_grid(torch.eye(3, 4)[None], [1, 1, *shape], align_corners=False)
    at = at + smooth[0].permute(1, 2, 3, 0).flip(-1)  # grid_sample names axes from the last
    return F.grid_sample(values[None, None], at, padding_mode="border", align_corners=False)[0, 0]


def _deep_in_tissue(values: torch.Tensor, grid: Grid) -> NDArray[np.float64]:
    """(N, 3) mm: voxel centres with nothing but tissue around them, ventricles and sulci overlooked."""
    smooth = F.avg_pool3d(values[None], 5, stride=1, padding=2)
    outside = F.pad((smooth < 0.5).float(), (1,) * 6, value=1.0)  # what lies beyond the scan is no tissue
    for axis, spacing in enumerate(grid.spacing):
        reach = [0, 0, 0]
        reach[axis] = round(_FROM_BRAIN_EDGE_MM / spacing)
        outside = F.max_pool3d(outside, [2 * n + 1 for n in reach], stride=1, padding=reach)
    return grid.world(np.argwhere(outside[0, 1:-1, 1:-1, 1:-1].numpy() == 0))


def posed(subject: Anatomy, rng: np.random.Generator) -> Anatomy:
    """``subject`` scaled by up to a tenth, turned by up to 10 degrees and, half the time, mirrored."""
    middle = subject.grid.world((np.array(subject.grid.shape) - 1) / 2)
    move = np.eye(4)
    move[:3, :3] = rotation(rng.normal(size=3), rng.uniform(0, 10)) @ np.diag(rng.uniform(0.9, 1.1, 3))
    move[:3, :3] = move[:3, :3] @ np.diag([rng.choice([-1.0, 1.0]), 1, 1])
    move[:3, 3] = middle - move[:3, :3] @ middle
    spots = subject.spots @ move[:3, :3].T + move[:3, 3]
    return Anatomy(subject.array, Grid(subject.grid.shape, move @ subject.grid.affine), spots)


def rotation(axis: ArrayLike, degrees: float) -> NDArray[np.float64]:
    """(3, 3): turn by ``degrees`` about ``axis`` (3,)."""
    x, y, z = np.asarray(axis, dtype=float) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def scan_grid(
    orientation: str,
    spacing: Sequence[float],
    extent_mm: ArrayLike,
    center_mm: ArrayLike,
    turn: ArrayLike | None = None,
) -> Grid:
    """A field of view around ``center_mm``.

    Parameters
    ----------
    orientation : axis codes, one of :data:`ORIENTATIONS`
    spacing : (3,) mm along the array axes
    extent_mm : (3,) at least this much along the world's x, y and z, before the turn
    center_mm : (3,) the middle of the field of view
    turn : (3, 3) rotation of the field of view about its middle
    """
    worlds = [next(i for i, pair in enumerate(("LR", "PA", "IS")) if code in pair) for code in orientation]
    directions = np.zeros((3, 3))
    for axis, (world, code) in enumerate(zip(worlds, orientation, strict=True)):
        directions[world, axis] = 1.0 if code in "RAS" else -1.0
    shape = np.ceil(np.asarray(extent_mm)[worlds] / spacing).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if turn is None else np.asarray(turn)) @ directions @ np.diag(spacing)
    affine[:3, 3] = np.asarray(center_mm) - affine[:3, :3] @ (shape - 1) / 2
    return Grid(shape.tolist(), affine)


def random_grid(rng: np.random.Generator, center_mm: ArrayLike, orientation: str | None = None) -> Grid:
    """A field of view such as scanners choose: 1.5 to 4 mm, along one axis up to 6.5, at most 25 degrees oblique.

    Its extent never exceeds what the network takes in.  Without ``orientation``, one of all 48.
    """
    codes = ORIENTATIONS[rng.integers(len(ORIENTATIONS))]
    turn = rotation(rng.normal(size=3), rng.uniform(0, 25))
    extent = rng.uniform((150, 190, 60), (164, 212, 80))
    center = np.asarray(center_mm) + rng.uniform(-6, 6, 3)
    spacing = rng.uniform(1.5, 4, 3)
    spacing[rng.integers(3)] = rng.uniform(1.5, 6.5)
    return scan_grid(orientation or codes, spacing.tolist(), extent, center, turn)


def plant(values: NDArray[np.float32], grid: Grid, lesion: Lesion) -> NDArray[np.float32]:
    """``values`` (I, J, K) on ``grid`` with ``lesion`` added; the argument is not changed."""
    # Only the box of voxels that the lesion can reach: a sphere about it, in voxels along each axis.
    reach = max(lesion.radii_mm) * _EDGE[1] * np.linalg.norm(np.linalg.inv(grid.affine[:3, :3]), axis=1)
    middle = grid.voxel(lesion.center_mm)
    low = np.maximum(np.ceil(middle - reach), 0).astype(int)
    high = np.minimum(np.floor(middle + reach) + 1, grid.shape).astype(int)
    planted = values.copy()
    if (low >= high).any():
        return planted
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    ijk = np.stack(np.meshgrid(*(np.arange(s.start, s.stop) for s in box), indexing="ij"), axis=-1)
    radius = np.linalg.norm((grid.world(ijk) - lesion.center_mm) / lesion.radii_mm, axis=-1)
    fade = np.clip((radius - _EDGE[0]) / (_EDGE[1] - _EDGE[0]), 0, 1)
    planted[box] += (lesion.contrast * (1 + np.cos(np.pi * fade)) / 2).astype(np.float32)
    return planted


def case(name: str, subject: Anatomy, grid: Grid, rng: np.random.Generator, lesion: bool, ease: float = 0.0) -> Case:
    """A scan of ``subject`` on ``grid``, with or without a lesion, which is larger and brighter by ``ease``.

    The same state of ``rng`` gives, with and without, the same scan but for the lesion: the same shading, noise and
    dark spot, so that only the lesion tells the classes apart.

    Raises
    ------
    VolsalError
        Where no deep tissue lies well inside ``grid``.
    """
    at = grid.voxel(subject.spots)
    edge = _FROM_SCAN_EDGE_MM / grid.spacing
    spots = subject.spots[((at >= edge) & (at <= np.array(grid.shape) - 1 - edge)).all(axis=1)]
    if not len(spots):
        raise VolsalError(f"no tissue lies {_FROM_SCAN_EDGE_MM:g} mm or more inside {grid}, so a lesion has no place")
    bright = _blob(spots, rng, rng.uniform(0.9, 1.5) * (1 + ease), 1 + ease)
    # A dark spot, far from the lesion, in both classes alike: that something is odd must not be enough.
    far = spots[np.linalg.norm(spots - bright.center_mm, axis=1) > 35]
    dark = [_blob(far, rng, -rng.uniform(0.3, 0.6))] if rng.random() < 0.5 and len(far) else []
    scan = _acquire(subject, grid, [*dark, bright] if lesion else dark, rng)
    return Case(name, scan, bright if lesion else None)


def _blob(spots: NDArray[np.float64], rng: np.random.Generator, contrast: float, scale: float = 1.0) -> Lesion:
    x, y, z = spots[rng.integers(len(spots))].tolist()
    a, b, c = (scale * rng.uniform(7, 11, 3)).tolist()
    return Lesion((x, y, z), (a, b, c), contrast)


def _acquire(subject: Anatomy, grid: Grid, lesions: Sequence[Lesion], rng: np.random.Generator) -> Scan:
    """What the scanner makes of the subject: whole numbers from 0, air filled with noise as in magnitude images."""
    values = resample(subject.array, subject.grid, grid).clip(0)
    values = values ** np.float32(rng.uniform(0.75, 1.25))
    for lesion in lesions:
        values = plant(values, grid, lesion)
    values = values.clip(0) * _shading(grid, rng)
    noise = rng.standard_normal((2, *grid.shape), dtype=np.float32) * np.float32(rng.uniform(0.02, 0.07))
    values = np.hypot(values + noise[0], noise[1]) * np.float32(rng.uniform(200, 1200))
    return Scan(np.rint(values), grid)


def _shading(grid: Grid, rng: np.random.Generator) -> NDArray[np.float32]:
    """A smooth field around 1 such as a receive coil leaves, (I, J, K)."""
    knots = torch.from_numpy(rng.normal(0, 0.12, (1, 1, 3, 3, 3)).astype(np.float32))
    return F.interpolate(knots, grid.shape, mode="trilinear", align_corners=True)[0, 0].exp().numpy()


# Chosen for lesions on both sides, at the front and the back; no network was asked.
DEMO_SEED = 2
# Storage orientation, spacing (mm) along the array axes, obliquity (degrees), lesion.
_COHORT: tuple[tuple[str, tuple[float, float, float], float, bool], ...] = (
    ("RAS", (2.0, 2.0, 2.0), 0.0, True),
    ("LPS", (1.5, 1.5, 4.0), 8.0, True),
    ("PIR", (2.5, 2.0, 3.0), 12.0, True),
    ("SAL", (6.0, 1.5, 1.5), 5.0, True),
    ("ASL", (1.8, 1.8, 3.5), 20.0, True),
    ("IRP", (3.0, 2.2, 1.6), 25.0, True),
    ("LAS", (2.0, 2.0, 2.2), 10.0, False),
    ("RPI", (1.6, 3.2, 2.4), 15.0, False),
)


def demo_cases(seed: int = DEMO_SEED) -> list[Case]:
    """The demonstration's eight scans: six with a lesion, two without, no two stored alike."""
    scan = head()
    middle = scan.grid.world((np.array(scan.grid.shape) - 1) / 2)
    cases = []
    for number, (orientation, spacing, degrees, lesion) in enumerate(_COHORT, start=1):
        # One stream per case: to change one leaves the others as they were.
        rng = np.random.default_rng((seed, number))
        turn = rotation(rng.normal(size=3), degrees)
        grid = scan_grid(orientation, spacing, (160, 204, 72), middle + rng.uniform(-6, 6, 3), turn)
        subject = posed(anatomy(scan, rng), rng)
        cases.append(case(f"case-{number:02d}", subject, grid, rng, lesion))
    return cases


def write_cohort(folder: Path, seed: int = DEMO_SEED) -> list[Path]:
    """Write :func:`demo_cases` as ``case-01.nii.gz`` ... and what is true of them as ``truth.json``.

    Returns the scans' paths, in order.  Each file appears whole or not at all, and is the same to the byte each time.

    Raises
    ------
    WriteError
        Where the folder cannot be written.
    """
    cases = demo_cases(seed)
    paths = [folder / f"{each.name}.nii.gz" for each in cases]
    for each, path in zip(cases, paths, strict=True):
        write_scan(path, each.scan)
    truth = {path.name: _truth(each) for each, path in zip(cases, paths, strict=True)}
    with replacing(folder / "truth.json") as temporary:
        temporary.write_text(json.dumps(truth, indent=2) + "\n", encoding="utf-8")
    return paths


def write_scan(path: Path, scan: Scan) -> None:
    """Write ``scan`` as gzipped NIfTI-1 of int16 with both forms coded, in mm."""
    image = cast(Any, nib.Nifti1Image)(scan.array.astype(np.int16), scan.grid.affine)
    image.set_qform(scan.grid.affine, code=1)
    image.set_sform(scan.grid.affine, code=1)
    image.header.set_xyzt_units("mm")
    with (
        replacing(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as file,
    ):
        image.to_stream(file)


def _truth(each: Case) -> dict[str, object]:
    lesion = each.lesion
    return {
        "label": each.label,
        "center_mm": None if lesion is None else [round(x, 3) for x in lesion.center_mm],
        "radii_mm": None if lesion is None else [round(x, 3) for x in lesion.radii_mm],
        "orientation": each.scan.grid.orientation,
        "spacing_mm": [round(float(x), 3) for x in each.scan.grid.spacing],
        "obliquity_degrees": round(each.scan.grid.obliquity, 2),
    }
