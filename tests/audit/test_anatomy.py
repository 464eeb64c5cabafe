"""Regions of phantoms that are known, and budgets worked out by hand."""

import re

import numpy as np
import pytest
from scipy import ndimage

from volsal.audit.anatomy import (
    MARKS,
    THINGS,
    Body,
    beside_body,
    body_mask,
    border,
    budget,
    budget_of_labels,
    corners,
    outside_of,
    padding_of,
)
from volsal.audit.metric import MetricError, Undefined
from volsal.grid import Grid


def test_a_budget_worked_out_by_hand():
    values = np.array([[[4.0, 2, -7, 0, 0, 2, 0, 0]]])
    labels = np.array([[[1, 1, 1, 0, 0, 2, 0, 0]]])
    shares = {share.region: share for share in budget_of_labels(values, labels, {1: "liver"})}
    assert list(shares) == ["unlabelled", "liver", "2"]
    assert (shares["liver"].voxels, shares["liver"].volume, shares["liver"].evidence) == (3, 3 / 8, 0.75)
    assert shares["liver"].density == 2
    assert shares["2"].density == pytest.approx(2)
    assert shares["unlabelled"].evidence == 0
    regions = {"liver": labels == 1, "2": labels == 2, "unlabelled": labels == 0}
    for share in budget(values, regions):
        assert share == shares[share.region]
    against = budget(values, regions, "negative")
    assert [share.evidence for share in against] == [1, 0, 0]
    within = np.array([[[0, 1, 1, 1, 0, 1, 0, 0]]], bool)
    seen = budget_of_labels(values, labels, within=within)
    assert [(share.voxels, share.evidence) for share in seen] == [(1, 0), (2, 0.5), (1, 0.5)]
    assert next(iter(budget(values, regions, within=within))).density == 1


def test_budgets_that_do_not_exist_say_why():
    values = np.array([[[1.0, 2]]])
    nothing = budget(values, {"spleen": np.zeros((1, 1, 2), bool)})[0]
    assert nothing.evidence == 0
    assert "no voxel" in nothing.density.reason
    for empty in (np.zeros((1, 1, 2)), np.array([[[np.nan, 1]]])):
        for share in (budget(empty, {"all": np.ones((1, 1, 2), bool)})[0],
                      budget_of_labels(empty, np.ones((1, 1, 2), int))[0]):  # fmt: skip
            assert isinstance(share.evidence, Undefined)
            assert isinstance(share.density, Undefined)
    with pytest.raises(MetricError, match="'spleen'"):
        budget(values, {"spleen": np.zeros((1, 2, 2), bool)})
    with pytest.raises(MetricError, match="whole numbers"):
        budget_of_labels(values, values)


def test_the_border_is_as_deep_in_mm_along_each_axis(oblique):
    shell = border(oblique, 2.1)  # voxels of 0.8, 0.9, 2.5 mm: three, two and one lie within
    inner = np.zeros(oblique.shape, bool)
    inner[3:-3, 2:-2, 1:-1] = True
    assert np.array_equal(shell, ~inner)


def test_the_border_of_a_sheared_field_is_measured_across_its_faces():
    affine = np.eye(4)
    affine[0, 1] = 1.0  # the second axis runs at 45 degrees; its planes are 1 mm apart, the first axis' 0.71 mm
    shell = border(Grid((20, 20, 20), affine), 1.8)
    assert shell[:, 10, 10].sum() == 2 * 3
    assert shell[10, :, 10].sum() == 2 * 2


def test_corners_are_called_by_where_they_lie_in_the_patient(field):
    boxes = corners(field, 0.3)
    assert len(boxes) == 8
    middle = field.world((np.array(field.shape) - 1) / 2)
    for name, box in boxes.items():
        away = field.world(np.argwhere(box)).mean(0) - middle
        words = [("left", "right")[int(away[0] > 0)], ("posterior", "anterior")[int(away[1] > 0)],
                 ("inferior", "superior")[int(away[2] > 0)]]  # fmt: skip
        assert name == " ".join(words)
        assert box.sum() == 15 * 30 * 24
    assert sum(box.astype(int) for box in boxes.values()).max() == 1


def test_what_the_model_does_not_see_lies_outside_its_field(oblique):
    field = Grid((5, 4, 6), oblique.affine @ [[1, 0, 0, 1], [0, 1, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]])
    outside = outside_of(oblique, field)
    inside = np.zeros(oblique.shape, bool)
    inside[1:6, 2:6, 3:9] = True
    assert np.array_equal(outside, ~inside)
    turned = Grid((9, 9, 9), np.diag([2.0, 2, 2, 1]))
    at = turned.voxel(oblique.world(np.stack(np.indices(oblique.shape), -1)))
    expected = ~((at >= -0.5) & (at <= 8.5)).all(-1)
    assert np.array_equal(outside_of(oblique, turned), expected)


def test_padding_is_one_value_connected_to_the_faces():
    generator = np.random.default_rng(0)
    array = generator.normal(size=(12, 13, 14)).astype(np.float32)
    expected = np.zeros(array.shape, bool)
    expected[:2] = expected[:, 10:] = True
    array[expected] = -5
    array[6, 6, 6] = -5  # the same value inside is no padding
    assert np.array_equal(padding_of(array), expected)
    assert not padding_of(generator.normal(size=(12, 13, 14))).any()


def ball(grid, centre, radius):
    return np.linalg.norm(grid.world(np.stack(np.indices(grid.shape), -1)) - centre, axis=-1) <= radius


@pytest.fixture
def field():
    """About 20 cm wide, anisotropic, in an order of axes of its own; the world's origin in the middle."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = 4.0, -2.0, 2.5, 1  # S, L, A
    affine[:3, 3] = (98, -100, -100)
    return Grid((51, 99, 81), affine)


def test_the_body_in_a_ct_has_its_lungs_and_not_the_table(field):
    noise = 15 * np.random.default_rng(0).normal(size=field.shape)
    world = field.world(np.stack(np.indices(field.shape), -1))
    body = np.hypot(world[..., 0] / 80, world[..., 1] / 60) <= 1  # runs out of the field above and below
    lungs = np.hypot((np.abs(world[..., 0]) - 35) / 20, world[..., 1] / 30) <= 1  # so do these
    table = (np.abs(world[..., 1] + 80) <= 3) & (np.abs(world[..., 0]) < 90)
    hu = np.select([lungs, body, table], [-800.0, 40, 100], -1000) + noise
    found = body_mask(hu, field)
    assert found.sure
    assert "-400 HU" in found.said
    assert found.mask[lungs].all()
    assert not found.mask[table].any()
    assert (found.mask != body).mean() < 0.03
    assert found.mask.shape == field.shape


def test_the_body_in_an_mr_has_dark_bone_and_is_found_in_noise(field):
    generator = np.random.default_rng(0)
    head, skull, brain = (ball(field, (5, -8, 3), radius) for radius in (80, 74, 69))
    signal = np.select([brain, skull, head], [100.0, 0, 160], 0) * (1 + 0.2 * np.sin(np.arange(99) / 20)[:, None])
    scan = np.hypot(signal + 6 * generator.normal(size=field.shape), 6 * generator.normal(size=field.shape))
    found = body_mask(scan, field)
    assert found.sure
    assert (found.mask != head).mean() < 0.02
    for other in (scan * 1000, scan + 50, scan.astype(np.int16)):
        assert (body_mask(other, field).mask != head).mean() < 0.02


def test_fine_voxels_are_looked_at_coarsely_and_lie_where_they_should():
    grid = Grid((101, 100, 99), np.diag([0.9, 0.7, 1, 1]))
    centre = grid.world((np.array(grid.shape) - 1) / 2)
    head = ball(grid, centre, 25)
    found = body_mask(ndimage.gaussian_filter(head.astype(float), 1), grid, "MR")
    assert found.sure
    # Within a coarse voxel of the surface: of 1.8 x 1.4 x 2 mm.
    assert not (found.mask & ~ball(grid, centre, 28)).any()
    assert not (ball(grid, centre, 22) & ~found.mask).any()


@pytest.mark.parametrize(
    ("scan", "reason"),
    [
        (lambda noise: noise, "differ little"),
        (lambda noise: np.where(noise > 2.5, 100, 0.1 * noise), "thick|nothing|takes|holds"),
        (lambda noise: np.full(noise.shape, 3.0), "nothing"),
        (lambda noise: np.where(noise > 3, np.nan, noise), "NaN"),
    ],
)
def test_where_no_body_is_found_the_whole_field_counts_and_that_is_said(scan, reason, field):
    found = body_mask(scan(np.random.default_rng(0).normal(size=field.shape)), field)
    assert not found.sure
    assert found.mask.all()
    assert re.search(reason, found.said), found.said


def test_a_table_and_burned_in_text_are_told_from_air_and_text_from_the_table():
    grid = Grid((60, 60, 40), np.diag([4.0, 4, 4, 1]))
    random = np.random.default_rng(0)
    i, j, k = np.indices(grid.shape)
    patient = ((i - 30) / 20) ** 2 + ((j - 28) / 14) ** 2 < 1
    table = (j >= 48) & (j < 51) & (i > 8) & (i < 52)
    text = (j >= 4) & (j < 6) & (i > 4) & (i < 20) & (k == 20)
    speck = (j == 4) & (i == 50) & (k == 3)  # one voxel of one value says nothing
    scan = np.where(patient, 40, -1000) + random.normal(0, 15, grid.shape)
    scan = np.where(table, 150 + random.normal(0, 15, grid.shape), scan)
    scan = np.where(text | speck, 2000, scan).round()
    found = body_mask(scan, grid)
    assert found.sure
    beside = beside_body(scan, grid, found)
    assert np.array_equal(beside[THINGS], (table | text | speck) & ~found.mask)
    assert np.array_equal(beside[MARKS], text)
    noisy = np.where(text, 2000 + random.normal(0, 5, grid.shape).round(), scan)  # measured, not drawn
    assert not beside_body(noisy, grid, found)[MARKS].any()
    unknown = beside_body(scan, grid, Body(np.ones(grid.shape, bool), False, "why"))
    assert not unknown[THINGS].any()
    assert not unknown[MARKS].any()


def test_the_air_of_a_magnet_holds_a_headrest_and_no_noise():
    grid = Grid((50, 50, 50), np.diag([4.0, 4, 4, 1]))
    random = np.random.default_rng(1)
    i, j, k = np.indices(grid.shape)
    head = ((i - 25) / 15) ** 2 + ((j - 22) / 15) ** 2 + ((k - 25) / 15) ** 2 < 1
    rest = (j > 42) & (j < 47) & (abs(i - 25) < 10)
    scan = np.abs(np.where(head, 100, 0) + np.where(rest, 60, 0) + random.normal(0, 4, grid.shape))
    beside = beside_body(scan, grid, body_mask(scan, grid))
    assert np.array_equal(beside[THINGS], rest)
    assert not beside[MARKS].any()
