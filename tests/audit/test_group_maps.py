"""Mean maps of groups whose maps are known, on one grid and in a template's space."""

import nibabel as nib
import numpy as np
import planted
import pytest

from volsal import Explainer, GradientTimesInput
from volsal.audit import group_maps as module
from volsal.audit.cohort import Registration, RegistrationError
from volsal.audit.group_maps import group_maps
from volsal.audit.run import audit
from volsal.config import AuditSection
from volsal.scans import ScanError, read_scan
from volsal.scans.find import Case

SETTINGS = AuditSection(min_scans=3, exchanged=0)
GXI = GradientTimesInput()


def moved_cases(folder, shifts, size=24):
    """One phantom in several places of the world, in files."""
    image, mask = planted.phantom(np.random.default_rng(4), "lesion", True)
    found = []
    for number, shift in enumerate(shifts):
        affine = np.diag([planted.MM] * 3 + [1.0])
        affine[:3, 3] = -planted.MM * size / 2 + np.array(shift)
        path = folder / f"moved-{number}.nii.gz"
        nib.save(nib.Nifti1Image(image.astype(np.float32), affine), path)
        found.append(Case(f"moved-{number}", (path,)))
    return found, mask


def mapped(cases, folder, groups=None, template=None):
    explainer = Explainer(planted.Bright(), None, {"gxi": GXI}, "class-1")
    by_id = {case.id: case for case in cases}
    groups = groups or {"all": dict.fromkeys(by_id, "scans")}
    return group_maps(explainer, by_id, groups, "gxi", GXI, folder, SETTINGS, template and read_scan(template))


def volumes(folder, of):
    return [np.asanyarray(nib.load(folder / file).dataobj) for file in of["files"]]


def test_scans_on_different_grids_are_not_averaged(tmp_path):
    cases, _ = moved_cases(tmp_path, [(0, 0, 0), (6, 0, 0), (0, 12, 0)])
    found = mapped(cases, tmp_path)
    assert "do not share a grid" in found["none"]
    assert set(found["left_out"]) == {"moved-1", "moved-2"}


def test_groups_that_are_large_enough_get_maps_of_their_own_scans(tmp_path):
    cases = planted.cases(tmp_path, "lesion", 6)
    a, empty, b, _, c, _ = (case.id for case in cases)
    groups = {"Site": {a: "A 1", b: "A 1", c: "A 1", empty: "A 1"}, "few": {a: "x", b: "x"}, "sex": {a: "f", b: "m"}}
    found = mapped(cases, tmp_path, groups)
    assert {column: list(values) for column, values in found["groups"].items()} == {"Site": ["A 1"]}
    of = found["groups"]["Site"]["A 1"]
    assert of["files"][0] == "cohort/gxi_site-a-1_mean.nii.gz"
    assert of["scans"] == 3
    assert "empty" in found["left_out"][empty]  # counted, and not averaged as zeroes
    assert mapped(cases, tmp_path, {"few": {a: "x"}}) == {"none": "no group has 3 scans"}


def test_scans_that_were_moved_come_together_in_a_templates_space(tmp_path):
    cases, mask = moved_cases(tmp_path, [(0, 0, 0), (25, -10, 0), (-30, 0, 17)])
    found = mapped(cases, tmp_path, template=cases[0].paths[0])
    mean, _, number = volumes(tmp_path, found["groups"]["all"]["scans"])
    assert number.max() == 3
    assert all(one["correlation"] > 0.9 for one in found["registered"].values())
    assert mask[np.unravel_index(np.where(number == 3, mean, -np.inf).argmax(), mean.shape)]
    assert mean[mask].sum() > 0.6 * mean.clip(0).sum()


def test_a_scan_that_does_not_reach_the_template_is_left_out_and_told(tmp_path, monkeypatch):
    cases, _ = moved_cases(tmp_path, [(0, 0, 0)] * 5)
    answers = iter([0.9, 0.9, 0.2, 0.9, None])

    def registered(*_):
        overlap = next(answers)
        if overlap is None:
            raise RegistrationError("the scan does not reach the template")
        return Registration(np.eye(4), 0.99, overlap)

    monkeypatch.setattr(module, "register_affine", registered)
    found = mapped(cases, tmp_path, template=cases[0].paths[0])
    assert found["groups"]["all"]["scans"]["scans"] == 3
    assert found["left_out"]["moved-2"] == "it reaches 20% of the template, less than 50%"
    assert "does not reach" in found["left_out"]["moved-4"]
    mean, variance, number = volumes(tmp_path, found["groups"]["all"]["scans"])
    own = mapped(cases[:3], tmp_path / "own")
    assert np.allclose(mean, volumes(tmp_path / "own", own["groups"]["all"]["scans"])[0], atol=1e-5)
    assert np.allclose(variance, 0, atol=1e-6)
    assert (number == 3).all()


def test_a_template_that_is_not_there_is_told_before_anything_is_computed(tmp_path):
    cases, _ = moved_cases(tmp_path, [(0, 0, 0)] * 3)
    asked = Explainer(planted.Bright(), None, {"gxi": GXI}, "class-1", folder=tmp_path)
    with pytest.raises(ScanError, match=r"none\.nii"):
        audit(asked, cases, SETTINGS.model_copy(update={"template": "none.nii.gz"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
