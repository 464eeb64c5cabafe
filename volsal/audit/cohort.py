"""Maps of many scans in one space: mean and variance per group, with how many scans reach each voxel.

Scans are added one by one, so that a cohort of any size takes the memory of three volumes.  Scans that do not share a
space are first brought to a template by an affine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from volsal.audit.metric import MetricError
from volsal.errors import VolsalError
from volsal.grid import Grid
from volsal.resampling import resample

if TYPE_CHECKING:
    import SimpleITK as sitk

# A voxel of the cohort's grid that a scan's voxels make up by less is not reached by it.
_REACHED = 0.999


class RegistrationError(VolsalError, RuntimeError):
    """Two scans could not be brought to one space."""


class CohortMap:
    """Mean and variance over the scans of a group, on one grid; Welford, Technometrics 1962.

    Parameters
    ----------
    grid : the common space, such as a template's
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        #: (I, J, K) how many scans reach each voxel.
        self.count = np.zeros(grid.shape, np.int64)
        self._mean = np.zeros(grid.shape)
        self._squares = np.zeros(grid.shape)

    def add(self, values: NDArray, grid: Grid, within: NDArray[np.bool_] | None = None) -> None:
        """Add the map of one scan.

        Parameters
        ----------
        values : (I', J', K') finite
        grid : where it lies, in the cohort's world (see :meth:`Registration.place`)
        within : the voxels of the scan at which the map is known, such as the model's field; None: all

        Raises
        ------
        MetricError
            For a map with NaN or infinity, which one voxel would spread to the cohort.
        """
        if not np.isfinite(values).all():
            raise MetricError("the map holds NaN or infinity; leave the scan out and count it")
        known = np.ones(values.shape, np.float32) if within is None else within.astype(np.float32)
        carried = resample(values.astype(np.float64), grid, self.grid)
        reached = resample(known, grid, self.grid) >= _REACHED
        self.count += reached
        away = np.where(reached, carried - self._mean, 0)
        self._mean += np.divide(away, self.count, out=np.zeros_like(away), where=reached)
        self._squares += away * np.where(reached, carried - self._mean, 0)

    @property
    def mean(self) -> NDArray[np.float64]:
        """(I, J, K); NaN where no scan reaches."""
        return np.where(self.count > 0, self._mean, np.nan)

    @property
    def variance(self) -> NDArray[np.float64]:
        """(I, J, K) unbiased, n - 1; NaN where fewer than two scans reach."""
        out = np.full(self.grid.shape, np.nan)
        return np.divide(self._squares, self.count - 1, out=out, where=self.count > 1)


@dataclass(frozen=True, eq=False)
class Registration:
    """How a scan is brought to a template.

    Attributes
    ----------
    motion : (4, 4) where a point of the scan lies in the template's space, mm, RAS+
    correlation : in [-1, 1], of the two images afterwards, at the voxels of the template that the scan reaches; a low
        one says that the affine failed, though across modalities it may be low, or negative, after a good one
    overlap : share of the template's field that the scan reaches
    """

    motion: NDArray[np.float64]
    correlation: float
    overlap: float

    def place(self, grid: Grid) -> Grid:
        """The scan's voxels, or those of any map on it, in the template's space."""
        return Grid(grid.shape, self.motion @ grid.affine)


def register_affine(
    moving: NDArray, moving_grid: Grid, fixed: NDArray, fixed_grid: Grid, voxel_mm: float = 4.0
) -> Registration:
    """The affine that brings ``moving`` to ``fixed``: Mattes mutual information, first rigid and then affine.

    It starts from the two centres of intensity, and is found on voxels of ``voxel_mm``; it sees no difference between a
    patient and one mirrored that mutual information does not see, and does not turn a patient who lies otherwise by
    more than some 40 degrees.

    Raises
    ------
    RegistrationError
        Where the optimiser fails, as for images without content.
    """
    import SimpleITK as sitk

    images = [_image(array, grid, voxel_mm) for array, grid in ((fixed, fixed_grid), (moving, moving_grid))]
    try:
        rigid = sitk.Euler3DTransform(
            sitk.CenteredTransformInitializer(
                *images, sitk.Euler3DTransform(), sitk.CenteredTransformInitializerFilter.MOMENTS
            )
        )
        _optimise(images, rigid)
        affine = sitk.AffineTransform(3)
        affine.SetCenter(rigid.GetCenter())
        affine.SetMatrix(rigid.GetMatrix())
        affine.SetTranslation(rigid.GetTranslation())
        _optimise(images, affine)
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        raise RegistrationError(f"the scan does not reach the template: {last}; do both show the same?") from error
    # ITK's transform takes points of the fixed image to the moving one, in LPS.
    back = np.eye(4)
    back[:3, :3] = np.reshape(affine.GetMatrix(), (3, 3))
    centre = np.array(affine.GetCenter())
    back[:3, 3] = np.array(affine.GetTranslation()) + centre - back[:3, :3] @ centre
    mirror = np.diag([-1.0, -1.0, 1.0, 1.0])
    motion = np.linalg.inv(mirror @ back @ mirror).astype(np.float64)
    placed = Grid(moving_grid.shape, motion @ moving_grid.affine)
    return Registration(motion, *_agreement(moving, placed, fixed, fixed_grid))


def _image(array: NDArray, grid: Grid, voxel_mm: float) -> sitk.Image:
    """On an upright grid about the same field, since SimpleITK knows no shear."""
    import SimpleITK as sitk

    low, high = grid.corners.min(axis=0), grid.corners.max(axis=0)
    shape = np.maximum(np.ceil((high - low) / voxel_mm) + 1, 4).astype(int)
    affine = np.diag([voxel_mm, voxel_mm, voxel_mm, 1.0])
    affine[:3, 3] = (low + high) / 2 - voxel_mm * (shape - 1) / 2
    least = float(array.min())
    # 0 is what resampling puts outside the field, and there is least to see there.
    values = resample(array.astype(np.float32) - least, grid, Grid(tuple(shape), affine))
    image = sitk.GetImageFromArray(values[::-1, ::-1].transpose(2, 1, 0))  # its axes run to L, P and S
    image.SetSpacing((voxel_mm,) * 3)
    last = affine[:3, 3] + voxel_mm * (shape - 1)
    image.SetOrigin((-float(last[0]), -float(last[1]), float(affine[2, 3])))
    return image


def _optimise(images: list[sitk.Image], transform: sitk.Transform) -> None:
    """Change ``transform`` in place."""
    import SimpleITK as sitk

    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-4, 200)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([1, 0])
    method.SetInitialTransform(transform, inPlace=True)
    method.SetNumberOfThreads(1)  # sums in another order end elsewhere
    method.Execute(*images)


def _agreement(moving: NDArray, placed: Grid, fixed: NDArray, fixed_grid: Grid) -> tuple[float, float]:
    there = resample(moving.astype(np.float32), placed, fixed_grid)
    reached = resample(np.ones(moving.shape, np.float32), placed, fixed_grid) >= _REACHED
    if np.count_nonzero(reached) < 2 or np.ptp(there[reached]) == 0 or np.ptp(fixed[reached]) == 0:
        return 0.0, float(reached.mean())
    return float(np.corrcoef(there[reached], fixed[reached])[0, 1]), float(reached.mean())
