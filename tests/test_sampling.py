"""The model's input is the one that MONAI's own steps make, whatever was composed on the way to it."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    CenterSpatialCrop,
    Compose,
    Flip,
    NormalizeIntensity,
    Orientation,
    Resize,
    ResizeWithPadOrCrop,
    Rotate90,
    ScaleIntensityRange,
    Spacing,
    SpatialCrop,
    SpatialPad,
)

from volsal.grid import Grid
from volsal.preprocess import MonaiSteps
from volsal.sampling import composed
from volsal.scans import Scan

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # MONAI announces a default of Orientation's
    LPS, RAS, PIR = (Orientation(codes) for codes in ("LPS", "RAS", "PIR"))
ORDERS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))


def scan_of(order=(0, 1, 2), signs=(1, 1, 1), turn=0.0, shape=(21, 18, 15), channels=1):
    """A scan of noise on a smooth, asymmetric field, with axes in any order and direction, turned about two axes."""
    c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    turned = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turned @ np.eye(3)[:, order] * signs * (0.8, 1.1, 2.5)
    affine[:3, 3] = (12.0, -30.0, 7.0)
    i, j, k = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    field = 800 * np.exp(-3 * ((i - 0.3) ** 2 + (j + 0.2) ** 2 + (k - 0.1) ** 2)) + 150 * i + 90 * j - 60 * k - 300
    scans = [
        Scan((field + np.random.default_rng(n).normal(scale=20, size=shape)).astype(np.float32), Grid(shape, affine))
        for n in range(channels)
    ]
    return Scan(scans[0].array, scans[0].grid, further=tuple(scans[1:]))


def monai(scan, steps):
    return Compose(steps)(MetaTensor(torch.from_numpy(scan.channels).clone(), affine=torch.tensor(scan.grid.affine)))


def assert_as_monai(scan, steps, atol, in_one):
    """``in_one``: how many of the steps are done in the sampling."""
    assert len(composed(steps, scan, lambda number, step, image: step(image, lazy=True)).steps) == in_one
    made, expected = MonaiSteps(steps)(scan), monai(scan, steps)
    affines = [scan.grid.affine, *(monai(scan, steps[: n + 1]).affine.numpy() for n in range(len(steps)))]
    for step, before, after in zip(made.steps, affines[:-1], affines[1:], strict=True):
        np.testing.assert_allclose(before @ step.matrix, after, atol=1e-8)
    np.testing.assert_allclose(made.grid.affine, expected.affine.numpy(), atol=1e-9)
    assert made.tensor.shape[1:] == expected.shape
    assert made.tensor.dtype == torch.float32
    assert made.tensor.is_contiguous()
    assert type(made.tensor) is torch.Tensor
    torch.testing.assert_close(made.tensor[0], expected.as_tensor(), atol=atol, rtol=0)
    return made


@pytest.mark.parametrize(("order", "signs"), ORDERS)
def test_turns_and_crops_of_any_orientation_choose_the_very_voxels(order, signs):
    steps = [RAS, CenterSpatialCrop((11, 9, 10)), Flip(1), SpatialCrop(roi_start=(2, 1, 3), roi_end=(9, 8, 8))]
    assert_as_monai(scan_of(order, signs), steps, 0, in_one=4)


@pytest.mark.parametrize(("order", "signs"), ORDERS[::5])
@pytest.mark.parametrize("turn", [0, 25])
def test_spacing_and_crop_are_one_sampling(order, signs, turn):
    steps = [
        PIR,
        Spacing((1.5, 1.3, 1.9), mode="bilinear"),
        ScaleIntensityRange(-400, 500, 0, 1, clip=True),
        ResizeWithPadOrCrop((7, 8, 9)),
    ]
    made = assert_as_monai(scan_of(order, signs, turn), steps, 2e-6, in_one=3)
    assert made.how.endswith("(Orientation, Spacing, ResizeWithPadOrCrop as one sampling of the scan)")


@pytest.mark.parametrize("pixdim", [(0.4, 0.5, 0.9), (3.1, 2.7, 6.0), (0.8, 1.1, 2.5), (0.8004, 1.1, 2.5)])
def test_every_spacing_finer_coarser_and_none_keeps_the_outermost_values(pixdim):
    """Uncropped, so that what lies beyond the outermost voxel centres counts as well."""
    assert_as_monai(scan_of(), [Spacing(pixdim, mode="bilinear")], 2e-3, in_one=1)  # of values from -500 to 500


@pytest.mark.parametrize("size", [(40, 7, 8), (40, 41, 42), (7, 40, 3)])
def test_padding_where_the_volume_is_too_small_is_monais(size):
    steps = [RAS, Spacing((1.5, 1.3, 1.9)), ResizeWithPadOrCrop(size, value=-1000), Flip(0)]
    assert_as_monai(scan_of((2, 0, 1), (1, -1, -1)), steps, 2e-3, in_one=2)
    exact = [RAS, ResizeWithPadOrCrop(size, mode="edge"), CenterSpatialCrop((6, 6, 2))]
    assert_as_monai(scan_of((2, 0, 1), (1, -1, -1)), exact, 0, in_one=1)


def test_a_crop_before_spacing_ends_what_spacing_sees():
    steps = [SpatialCrop(roi_start=(3, 2, 4), roi_end=(14, 13, 11)), LPS, Spacing((0.5, 0.6, 1.1))]
    assert_as_monai(scan_of((1, 0, 2), (1, -1, 1), turn=10), steps, 2e-3, in_one=3)


def test_every_channel_is_sampled():
    steps = [RAS, Spacing((1.5, 1.3, 1.9)), CenterSpatialCrop((6, 7, 8))]
    made = assert_as_monai(scan_of((1, 2, 0), channels=3), steps, 2e-3, in_one=3)
    assert made.tensor.shape[1] == 3
    assert_as_monai(scan_of((1, 2, 0), channels=3), [Rotate90(1)], 0, in_one=1)
    assert_as_monai(scan_of(channels=3), [], 0, in_one=0)


CROP = CenterSpatialCrop((6, 7, 5))
KEPT_APART = {
    "two interpolations": ([Spacing((1.5, 1.3, 1.9)), Resize((10, 10, 10), mode="trilinear"), CROP], 1),
    "two spacings": ([Spacing((2, 2, 2.5)), Spacing((1.5, 1.3, 1.9)), CROP], 1),
    "a clip before interpolation": (
        [ScaleIntensityRange(-100, 100, 0, 1, clip=True), Spacing((1.5, 1.3, 1.9)), CROP],
        0,
    ),
    "what looks at every voxel": ([LPS, Spacing((2, 2, 2)), NormalizeIntensity(), CROP], 2),
    "a padding that later steps change": (
        [SpatialPad((30, 30, 30)), ScaleIntensityRange(-500, 500, 0, 1), CROP],
        0,
    ),
    "nearest voxels": ([Spacing((1.5, 1.3, 1.9), mode="nearest"), CROP], 0),
    "splines": ([Spacing((1.5, 1.3, 1.9), mode=3, padding_mode="nearest"), CROP], 0),
    "zeros around": ([Spacing((1.5, 1.3, 1.9), padding_mode="zeros"), CROP], 0),
    "corners aligned": ([Spacing((1.5, 1.3, 1.9), align_corners=True), CROP], 0),
    "spacing that turns": ([Spacing((1.5, 1.3, 1.9), diagonal=True), CROP], 0),
}


@pytest.mark.parametrize("name", KEPT_APART)
def test_what_would_not_be_the_same_is_not_composed(name):
    steps, in_one = KEPT_APART[name]
    assert_as_monai(scan_of(turn=15, shape=(24, 25, 23)), steps, 2e-3, in_one)


def test_numbers_that_are_given_normalise_each_voxel_by_itself():
    steps = [NormalizeIntensity(subtrahend=100.0, divisor=50.0), CROP]
    assert_as_monai(scan_of(), steps, 0, in_one=1)


def test_a_step_of_the_users_own_is_not_taken_for_one_of_monais():
    class Doubled(Orientation):
        def __call__(self, image, lazy=None):
            return super().__call__(image, lazy=lazy) * 2

    assert_as_monai(scan_of(), [Doubled("LPS", labels=None), CROP], 0, in_one=0)


def test_only_what_is_looked_at_is_read():
    """The box is what a crop leaves, so that a scan's far corner costs nothing."""
    scan = scan_of()
    steps = [LPS, SpatialCrop(roi_start=(2, 1, 3), roi_end=(9, 8, 8))]
    sampling = composed(steps, scan, lambda number, step, image: step(image, lazy=True))
    assert sampling.box.tolist() == [[12, 19], [10, 17], [3, 8]]  # the first two axes are mirrored
