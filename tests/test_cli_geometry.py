"""`volsal align`, `volsal check-geometry` and `--alignment`, as a user calls them."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from volsal.alignments import beside
from volsal.batch import Run
from volsal.cli import app
from volsal.config import load_config

NET = """
import torch
from torch import nn

def build(scale=1.0):
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv3d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv3d(4, 6, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 2),
    )
    for module in (net[0], net[2], net[6]):      # positive weights: bright is evidence, and its cells lie where it is
        module.weight.data = scale * module.weight.data.abs()
        module.bias.data.zero_()
    return net

def shifted(path):
    import nibabel as nib
    image = nib.load(path)
    affine = image.affine.copy()
    affine[:3, 3] += affine[:3, 0] * 4          # says that the tensor lies four voxels further than it does
    return torch.from_numpy(image.get_fdata(dtype="float32") / 500)[None], affine
"""


@pytest.fixture
def place(tmp_path, scan_file):
    (tmp_path / "net.py").write_text(NET)
    for name in ("one", "two", "three"):
        scan_file(f"scans/{name}.nii.gz")
    settle(tmp_path)
    return tmp_path


def settle(folder, **sections):
    content = {
        "model": {"factory": "net.py:build"},
        "preprocess": ["ScaleIntensity"],
        "methods": ["grad-cam"],
        "targets": ["class-1"],
        "scans": {"folder": "scans"},
        "output": "out",
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(content | sections))


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def alignment_of(folder, case):
    return json.loads((folder / case / "case.json").read_text())["maps"][0]["alignment"]


def test_align_measures_writes_beside_the_config_and_is_used_from_then_on(place):
    result = call("align", place / "c.yaml")
    assert result.exit_code == 0, result.output
    assert "3 scans" in result.output
    assert "used from now on" in result.output
    (entry,) = json.loads(beside(place / "c.yaml").read_text())["entries"]
    assert (entry["of"]["method"], entry["of"]["target"]) == ("grad-cam", "class-1")
    assert entry["alignment"]["scans"] == 3
    assert call("explain", place / "scans/one.nii.gz", "-c", place / "c.yaml", "-o", place / "o").exit_code == 0
    assert alignment_of(place / "o", "one")["near"] == 3


def test_align_skips_a_scan_it_cannot_read_and_says_where_its_file_would_not_be_used(place):
    (place / "scans" / "bad.nii.gz").write_text("nothing " * 100)
    settle(place, alignment="half-pixel")
    result = call("align", place / "c.yaml")
    assert result.exit_code == 0, result.output
    assert "skipped: " in result.stderr
    assert "not a NIfTI file" in result.stderr
    assert "not used while the config says alignment: half-pixel" in result.output


def test_align_without_a_layer_to_align_or_scans_to_measure_on_says_so(place):
    nothing = call("align", place / "c.yaml", "-m", "input-gradient")
    assert (nothing.exit_code, "nothing to align" in nothing.stderr) == (2, True)
    settle(place, scans=None)
    missing = call("align", place / "c.yaml")
    assert (missing.exit_code, "name some scans" in missing.stderr) == (2, True)


@pytest.mark.parametrize("rule", ["half-pixel", "nominal", "measured", "flip-average"])
def test_explain_places_maps_by_the_rule_asked_for(place, rule):
    result = call("explain", place / "scans/one.nii.gz", "-c", place / "c.yaml", "-o", place / "o", "--alignment", rule)
    assert result.exit_code == 0, result.output
    assert alignment_of(place / "o", "one")["kind"] == rule


def test_an_unknown_rule_is_refused_with_the_nearest_one(place):
    result = call("explain", place / "scans/one.nii.gz", "-c", place / "c.yaml", "--alignment", "nominall")
    assert result.exit_code == 2
    assert "nominal" in result.stderr


def test_a_run_keeps_results_until_the_rule_or_what_was_measured_changes(place):
    def outcomes():
        return {outcome.case: outcome.status for outcome in Run(load_config(place / "c.yaml")).execute()}

    assert set(outcomes().values()) == {"done"}
    assert set(outcomes().values()) == {"kept"}
    assert call("align", place / "c.yaml").exit_code == 0
    assert set(outcomes().values()) == {"done"}
    settle(place, alignment="nominal")
    assert set(outcomes().values()) == {"done"}
    assert {alignment_of(place / "out", case)["kind"] for case in ("one", "two", "three")} == {"nominal"}


def test_check_geometry_prints_each_stage_and_ends_with_0_where_maps_land_right(place):
    result = call("check-geometry", place / "c.yaml", place / "scans/one.nii.gz", "-o", place / "geometry.json")
    assert result.exit_code == 0, result.output
    for stage in ("preprocessing", "map on the scan", "half-pixel", "nominal"):
        assert stage in result.output
    report = json.loads((place / "geometry.json").read_text())
    (way_in,) = [stage for stage in report["stages"] if stage["stage"] == "preprocessing"]
    assert max(map(abs, way_in["mean_voxels"])) < 0.1


def test_check_geometry_finds_preprocessing_that_says_a_wrong_place(place):
    settle(place, preprocess={"function": "net.py:shifted"})
    result = call("check-geometry", place / "c.yaml", place / "scans/one.nii.gz")
    assert result.exit_code == 1, result.output
    assert "the preprocessing moves the image and not its affine" in result.stderr
