import json

import numpy as np
import pytest
import torch

from volsal.demo import cohort
from volsal.errors import VolsalError
from volsal.grid import Grid
from volsal.scans import Scan, read_scan


@pytest.fixture(scope="module")
def healthy():
    return cohort.anatomy(cohort.head())


def middle_of(subject):
    return subject.grid.world((np.array(subject.grid.shape) - 1) / 2)


def test_the_head_is_where_nibabel_s_own_example_says_it_is():
    scan = cohort.head()
    assert scan.grid.shape == (128, 96, 24)
    assert scan.grid.orientation == "LAS"
    np.testing.assert_allclose(scan.grid.spacing, (2, 2, 2.2), atol=1e-3)
    np.testing.assert_allclose(scan.grid.affine[:3, 3], (117.855103, -35.7229424, -7.24879837), atol=1e-4)


def test_a_nibabel_without_its_test_data_is_named_in_the_error(monkeypatch, tmp_path):
    monkeypatch.setattr("volsal.demo.cohort.files", lambda package: tmp_path)
    with pytest.raises(VolsalError, match=r"example4d.*reinstall nibabel"):
        cohort.head()


def test_there_are_48_orientations_and_a_grid_of_each_says_its_own_name():
    assert len(set(cohort.ORIENTATIONS)) == 48
    for codes in cohort.ORIENTATIONS:
        turn = cohort.rotation((1, 2, 3), 25)
        grid = cohort.scan_grid(codes, (2, 3, 4), (40, 60, 80), (5, -6, 7), turn)
        assert grid.orientation == codes
        np.testing.assert_allclose(grid.spacing, (2, 3, 4))
        np.testing.assert_allclose(grid.world((np.array(grid.shape) - 1) / 2), (5, -6, 7))


def test_a_turn_of_90_degrees_about_z_takes_x_to_y():
    np.testing.assert_allclose(cohort.rotation((0, 0, 2), 90) @ (1, 0, 0), (0, 1, 0), atol=1e-12)


def test_a_planted_lesion_is_full_in_the_middle_half_at_its_radii_and_nothing_beyond():
    grid = Grid((41, 41, 41), np.diag([0.5, 0.5, 0.5, 1]))
    lesion = cohort.Lesion((10, 10, 10), (4, 6, 5), 0.8)
    planted = cohort.plant(np.zeros(grid.shape, np.float32), grid, lesion)
    assert planted[20, 20, 20] == pytest.approx(0.8)
    for at in [(14, 10, 10), (10, 16, 10), (10, 10, 5)]:
        assert planted[tuple(int(2 * x) for x in at)] == pytest.approx(0.4, abs=1e-6)
    assert planted[int(2 * (10 + 4 * 1.3)) + 1, 20, 20] == 0


@pytest.mark.parametrize("center", [(-50.0, 0.0, 0.0), (500.0, 0.0, 0.0)])
def test_a_lesion_outside_the_field_of_view_leaves_the_values_alone(center):
    values = np.ones((5, 6, 7), np.float32)
    planted = cohort.plant(values, Grid(values.shape, np.eye(4)), cohort.Lesion(center, (8, 8, 8), 1.0))
    np.testing.assert_array_equal(planted, values)


@pytest.mark.parametrize(
    ("orientation", "spacing", "degrees"),
    [
        ("RAS", (2, 2, 2), 0),
        ("LPS", (1.5, 1.5, 4), 10),
        ("PIR", (3, 2, 2.5), 25),
        ("SAL", (6, 1.5, 1.5), 5),
        ("IRP", (1.7, 3.3, 2.1), 18),
    ],
)
def test_what_a_lesion_adds_to_a_scan_is_centred_at_the_stated_millimetres(healthy, orientation, spacing, degrees):
    turn = cohort.rotation((1, -2, 0.5), degrees)
    grid = cohort.scan_grid(orientation, spacing, (160, 200, 70), middle_of(healthy), turn)
    sick = cohort.case("sick", healthy, grid, np.random.default_rng(3), lesion=True)
    well = cohort.case("well", healthy, grid, np.random.default_rng(3), lesion=False)
    assert well.lesion is None
    assert (sick.label, well.label) == (1, 0)
    added = sick.scan.array - well.scan.array
    where = np.argwhere(added != 0)
    centroid = np.average(grid.world(where), axis=0, weights=added[tuple(where.T)])
    # Shading and noise bear on it a little; a slip of half a voxel, 0.75 mm or more, would be a wrong geometry.
    assert np.linalg.norm(centroid - sick.lesion.center_mm) < 0.35
    # The dark spot, the shading and the noise are the same: nothing changed beyond the lesion's reach.
    beyond = np.abs(grid.world(where) - sick.lesion.center_mm) / sick.lesion.radii_mm
    assert np.linalg.norm(beyond, axis=1).max() <= 1.3 + 1e-6


def test_lesions_sit_in_tissue_well_inside_the_field_of_view(healthy):
    rng = np.random.default_rng(11)
    for _ in range(10):
        grid = cohort.random_grid(rng, middle_of(healthy))
        lesion = cohort.case("scan", healthy, grid, rng, lesion=True).lesion
        at = grid.voxel(lesion.center_mm)
        assert (np.minimum(at, np.array(grid.shape) - 1 - at) * grid.spacing >= 15 - 1e-6).all()
        nearest = healthy.grid.voxel(lesion.center_mm).round().astype(int)
        around = healthy.array[tuple(slice(n - 2, n + 3) for n in nearest)]
        assert around.shape == (5, 5, 5)
        assert around.mean() > 0.5


def test_a_grid_that_misses_the_head_has_no_place_for_a_lesion(healthy):
    grid = cohort.scan_grid("RAS", (3, 3, 3), (90, 90, 90), (900, 0, 0))
    with pytest.raises(VolsalError, match="a lesion has no place"):
        cohort.case("nowhere", healthy, grid, np.random.default_rng(0), lesion=True)


def test_a_posed_head_keeps_its_spots_on_the_same_voxels(healthy):
    moved = cohort.posed(healthy, np.random.default_rng(5))
    np.testing.assert_allclose(moved.grid.voxel(moved.spots), healthy.grid.voxel(healthy.spots), atol=1e-6)
    assert not np.allclose(moved.spots, healthy.spots, atol=1)


def test_a_bent_head_is_displaced_along_the_axis_that_was_asked_for(monkeypatch):
    # A constant shift of 4 mm along the third axis (2 voxels of 2 mm) must read what lies 2 voxels further on.
    class Constant:
        def normal(self, mean, deviation, size):
            shift = np.zeros(size)
            shift[:, 2] = deviation
            return shift

    values = torch.zeros(12, 14, 16)
    values[6, 7, 9] = 1
    bent = cohort._bent(values, np.array([1.0, 1.5, 2.0]), Constant())
    assert np.unravel_index(int(bent.argmax()), bent.shape) == (6, 7, 7)
    assert float(bent.max()) == pytest.approx(1, abs=1e-4)


def test_the_cohort_is_six_scans_with_and_two_without_a_lesion_no_two_stored_alike():
    cases = cohort.demo_cases()
    assert [case.label for case in cases].count(1) == 6
    assert [case.label for case in cases].count(0) == 2
    assert len({case.scan.grid.orientation for case in cases}) == 8
    assert max(case.scan.grid.spacing.max() / case.scan.grid.spacing.min() for case in cases) > 3.9
    assert max(case.scan.grid.obliquity for case in cases) > 20
    with_lesion = [case for case in cases if case.lesion]
    sides = {case.lesion.center_mm[0] > case.scan.grid.corners[:, 0].mean() for case in with_lesion}
    assert sides == {True, False}


def test_the_cohort_is_the_same_to_the_byte_each_time_it_is_written(tmp_path):
    once, again = cohort.write_cohort(tmp_path / "a"), cohort.write_cohort(tmp_path / "b")
    assert [path.name for path in once] == [f"case-{n:02d}.nii.gz" for n in range(1, 9)]
    for one, other in zip(once, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert (tmp_path / "a/truth.json").read_bytes() == (tmp_path / "b/truth.json").read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [*(path.name for path in once), "truth.json"]


def test_another_seed_gives_other_lesions_on_like_grids():
    first, second = cohort.demo_cases(3)[0], cohort.demo_cases(4)[0]
    assert first.lesion.center_mm != second.lesion.center_mm
    assert first.scan.grid.orientation == second.scan.grid.orientation


def test_written_scans_read_back_on_the_same_grid_with_the_same_values_and_their_truth(tmp_path):
    paths = cohort.write_cohort(tmp_path)
    truth = json.loads((tmp_path / "truth.json").read_text())
    for path, case in zip(paths, cohort.demo_cases(), strict=True):
        back = read_scan(path)
        back.grid.require_same(case.scan.grid)
        np.testing.assert_array_equal(back.array, case.scan.array)
        assert back.notes == ()
        assert (int(back.header["sform_code"]), int(back.header["qform_code"])) == (1, 1)
        assert back.header.get_data_dtype() == np.int16
        said = truth[path.name]
        assert said["label"] == case.label
        assert said["orientation"] == case.scan.grid.orientation
        np.testing.assert_allclose(said["spacing_mm"], case.scan.grid.spacing, atol=1e-3)
        if case.lesion:
            np.testing.assert_allclose(said["center_mm"], case.lesion.center_mm, atol=1e-3)
            np.testing.assert_allclose(said["radii_mm"], case.lesion.radii_mm, atol=1e-3)
        else:
            assert said["center_mm"] is said["radii_mm"] is None


def test_bright_scans_still_fit_the_int16_they_are_written_as():
    for case in cohort.demo_cases():
        assert isinstance(case.scan, Scan)
        assert case.scan.array.min() >= 0
        assert case.scan.array.max() < np.iinfo(np.int16).max
