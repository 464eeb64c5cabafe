"""Where a volume's voxels lie in the patient.

One convention holds everywhere in volsal: array axes are the NIfTI file's own (i, j, k), which torch code names
(D, H, W); world coordinates are millimetres in RAS+ (x to the patient's right, y to anterior, z to superior); an
affine maps the *centre* of voxel (i, j, k) to world.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from volsal.errors import VolsalError

_NEGATIVE, _POSITIVE = "LPI", "RAS"
_FARTHEST_MM = 1e15  # far beyond any patient, and near enough for its square to be a number


class GridError(VolsalError, ValueError):
    """Two volumes do not lie on the same voxels, or a matrix is no affine."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The shape of a volume and the affine that places it.  Immutable; compare with :meth:`same_as`.

    Parameters
    ----------
    shape : (I, J, K) voxels, each at least 1
    affine : (4, 4) float64, voxel centre to world, mm, RAS+.  Shear is allowed, a flattened axis is not.

    Raises
    ------
    GridError
        For a matrix that is not a finite, invertible affine or a shape that is not three positive integers.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    def __init__(self, shape: Sequence[int], affine: ArrayLike) -> None:
        matrix = np.array(affine, dtype=np.float64)
        if matrix.shape != (4, 4) or not np.array_equal(matrix[3], (0, 0, 0, 1)):
            raise GridError(f"an affine is a 4 x 4 matrix with last row 0 0 0 1; this one is {_flat(matrix)}")
        if not np.isfinite(matrix).all():
            raise GridError(f"the affine holds NaN or infinity: {_flat(matrix)}")
        if np.abs(matrix).max() > _FARTHEST_MM:
            raise GridError(f"the affine holds a number that is no distance in mm: {_flat(matrix)}")
        lengths = np.linalg.norm(matrix[:3, :3], axis=0)
        # A ratio, not a determinant: it does not depend on the unit or the spacing.
        if not lengths.all() or abs(np.linalg.det(matrix[:3, :3] / lengths)) < 1e-6:
            raise GridError(f"the affine flattens space, so voxels have no place of their own: {_flat(matrix)}")
        if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
            raise GridError(f"a grid has three axes of at least one voxel; this shape is {tuple(shape)}")
        matrix.flags.writeable = False
        object.__setattr__(self, "affine", matrix)
        object.__setattr__(self, "shape", tuple(int(n) for n in shape))

    def __repr__(self) -> str:
        spacing = " x ".join(f"{mm:.4g}" for mm in self.spacing)
        tilt = f", {self.obliquity:.1f} degrees oblique" if self.obliquity > 0.05 else ""
        return f"Grid({' x '.join(map(str, self.shape))} voxels of {spacing} mm, {self.orientation}{tilt})"

    @property
    def spacing(self) -> NDArray[np.float64]:
        """Voxel edge lengths along the array axes, (3,) mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def orientation(self) -> str:
        """Axis codes: the world direction to which each array axis points most nearly, e.g. ``"LPS"``.

        Every axis gets a world axis of its own, also where two array axes lie closest to the same one.
        """
        return "".join((_POSITIVE if sign > 0 else _NEGATIVE)[world] for world, sign in self._nearest_axes())

    def _nearest_axes(self) -> list[tuple[int, float]]:
        """(world axis, sign) of each array axis: the permutation with the largest sum of cosines."""
        cosines = self.affine[:3, :3] / self.spacing
        orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
        best = max(orders, key=lambda order: sum(abs(cosines[world, axis]) for axis, world in enumerate(order)))
        return [(world, float(np.sign(cosines[world, axis])) or 1.0) for axis, world in enumerate(best)]

    @property
    def obliquity(self) -> float:
        """Largest angle between an array axis and its nearest world axis, degrees."""
        cosines = self.affine[:3, :3] / self.spacing
        nearest = [abs(cosines[world, axis]) for axis, (world, _) in enumerate(self._nearest_axes())]
        return float(np.degrees(np.arccos(np.clip(min(nearest), -1, 1))))

    @property
    def corners(self) -> NDArray[np.float64]:
        """World positions of the eight outermost voxel centres, (8, 3) mm."""
        return self.world(np.array(list(product(*[(0, n - 1) for n in self.shape]))))

    def world(self, ijk: ArrayLike) -> NDArray[np.float64]:
        """World positions, mm, of voxel coordinates ``ijk`` (..., 3)."""
        return np.asarray(ijk) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def voxel(self, xyz: ArrayLike) -> NDArray[np.float64]:
        """Voxel coordinates, not rounded, of world positions ``xyz`` (..., 3) in mm."""
        return (np.asarray(xyz) - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T

    def to(self, other: Grid) -> NDArray[np.float64]:
        """(4, 4): voxel coordinates of this grid to voxel coordinates of ``other``."""
        return np.linalg.inv(other.affine) @ self.affine

    @property
    def sha256(self) -> str:
        """Digest of shape and affine, hexadecimal: of three int64 and sixteen float64, row by row, little-endian."""
        content = np.array(self.shape, "<i8").tobytes() + (self.affine + 0.0).astype("<f8").tobytes()  # no -0.0
        return sha256(content).hexdigest()

    def coarse(self, shape: Sequence[int]) -> Grid:
        """The grid of a feature map that covers the same field of view with ``shape`` cells: the half-pixel rule.

        Outer cell *edges* agree, not centres, as in ``interpolate(align_corners=False)``: with s = N / n, the centre
        of cell m lies at voxel coordinate ``s * m + (s - 1) / 2``.
        """
        step = np.array(self.shape) / np.array(shape)
        cell_to_voxel = np.diag([*step, 1.0])
        cell_to_voxel[:3, 3] = (step - 1) / 2
        return Grid(shape, self.affine @ cell_to_voxel)

    def same_as(self, other: Grid, within_mm: float = 1e-3) -> bool:
        """Whether both grids have one shape and put every voxel at the same place."""
        return self.shape == other.shape and self.distance_mm(other) <= within_mm

    def distance_mm(self, other: Grid) -> float:
        """How far apart the corner voxels of two grids of one shape lie at most, mm."""
        return float(np.linalg.norm(self.corners - other.corners, axis=-1).max())

    def require_same(self, other: Grid, within_mm: float = 1e-3) -> None:
        """Raise :class:`GridError`, saying what differs, unless :meth:`same_as` holds."""
        if self.shape != other.shape:
            raise GridError(f"shapes differ: {self.shape} and {other.shape}; bring both to one grid with resample")
        apart = self.distance_mm(other)
        if apart > within_mm:
            raise GridError(
                f"same shape {self.shape}, but corner voxels lie up to {apart:.3g} mm apart (allowed: {within_mm:g}); "
                "bring both to one grid with resample"
            )

    def overlap(self, other: Grid) -> float:
        """Share of this grid's field of view, in [0, 1], that lies inside the field of view of ``other``.

        Measured on a lattice of 16 points per axis.
        """
        points = [(np.arange(16) + 0.5) / 16 * n - 0.5 for n in self.shape]
        lattice = np.stack(np.meshgrid(*points, indexing="ij"), axis=-1).reshape(-1, 3)
        at = other.voxel(self.world(lattice))
        inside = (at >= -0.5 - 1e-6) & (at <= np.array(other.shape) - 0.5 + 1e-6)
        return float(inside.all(axis=-1).mean())


def lps_to_ras(affine: ArrayLike) -> NDArray[np.float64]:
    """An affine into DICOM's and ITK's world (x to the patient's left, y to posterior) as one into RAS+; (4, 4) mm.

    >>> lps_to_ras(np.eye(4)).diagonal()
    array([-1., -1.,  1.,  1.])
    """
    return np.array([[-1.0], [-1.0], [1.0], [1.0]]) * np.asarray(affine, dtype=np.float64)


def _flat(matrix: NDArray[np.float64]) -> str:
    """A matrix on one line, since an error is one line."""
    return " / ".join(" ".join(f"{x:.6g}" for x in np.atleast_1d(row)) for row in np.atleast_1d(matrix))
