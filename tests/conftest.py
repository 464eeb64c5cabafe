import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from volsal.grid import Grid

SHAPE = (7, 9, 11)  # no two sides equal, none equal to a batch or channel count: a swapped axis cannot hide

# Material for judging that lies beside the project's own checkout; a user's clone does not have it.
SHARED = Path(os.environ.get("VOLSAL_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(autouse=True, scope="session")
def few_threads():
    torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", 2))))


@pytest.fixture
def volume():
    return torch.randn(2, 1, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def oblique():
    """Thick slices, tilted 20 degrees, first axis mirrored, off centre: no property of the affine is trivial."""
    c, s = np.cos(np.radians(20)), np.sin(np.radians(20))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.diag([-0.8, 0.9, 2.5])
    affine[:3, 3] = (90.0, -120.0, 40.0)
    return Grid(SHAPE, affine)


@pytest.fixture
def shared():
    def look_up(name):
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"needs {name}, which lies beside the project's own checkout and is not part of it")
        return path

    return look_up


@pytest.fixture
def scan_file(tmp_path):
    """A function that writes a NIfTI file of smooth, asymmetric content; keyword arguments change the header."""

    def write(name="scan.nii.gz", shape=(24, 28, 20), affine=None, array=None, dtype=np.int16, **header):
        if array is None:
            i, j, k = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape[:3]], indexing="ij")
            array = 400 * np.exp(-4 * ((i - 0.3) ** 2 + (j + 0.2) ** 2 + (k - 0.1) ** 2)) + 60 * i + 30 * j + 100
        if affine is None:
            affine = np.array([[-2.0, 0, 0, 30], [0, 0, 2.5, -20], [0, 1.5, 0, 10], [0, 0, 0, 1]])  # LSA
        image = nib.Nifti1Image(np.asarray(array).astype(dtype), affine, dtype=np.dtype(dtype))
        image.header.set_xyzt_units("mm")
        image.set_qform(affine, code=1)
        image.set_sform(affine, code=1)
        for key, value in header.items():
            image.header[key] = value
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, path)
        return path

    return write
