"""Cases of several files, from the folder to the record."""

import json

import nibabel as nib
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from volsal import Explainer
from volsal.batch import Run
from volsal.cli import app
from volsal.config import ConfigError, load_config
from volsal.scans.scan import file_digest

NET = """
import torch, nibabel
from torch import nn

class Second(nn.Module):
    \"\"\"Sees its second channel and nothing else.\"\"\"
    def __init__(self):
        super().__init__()
        self.features = nn.Conv3d(2, 1, 1, bias=False)
        self.features.weight.data = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1, 1)

    def forward(self, x):
        return self.features(x).mean((2, 3, 4))

def load(paths):
    images = [nibabel.load(path) for path in paths]
    return torch.stack([torch.tensor(image.get_fdata()) for image in images]), images[0].affine
"""
SHAPE = (12, 14, 10)
SPOT = (3, 9, 6)


@pytest.fixture
def place(tmp_path, scan_file):
    (tmp_path / "net.py").write_text(NET)
    spot = np.zeros(SHAPE)
    spot[SPOT] = 1000
    for case in ("p1", "p2"):
        scan_file(f"scans/{case}_flair.nii.gz", shape=SHAPE)
        scan_file(f"scans/{case}_t1.nii.gz", array=spot, shape=SHAPE)
    scan_file("scans/p3_flair.nii.gz", shape=SHAPE)
    scan_file("scans/p1_seg.nii.gz", shape=SHAPE)
    write(tmp_path)
    return tmp_path


def write(folder, scans=None, **sections):
    content = {
        "model": {"factory": "net.py:Second"},
        "methods": [{"grad-cam": {"layer": "features"}}],
        "targets": ["regression"],
        "scans": {"folder": "scans", "channels": ["_flair", "_t1"], **(scans or {})},
        "output": "out",
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(content | sections))


def execute(place):
    return {o.case: o for o in Run(load_config(place / "c.yaml")).execute()}


def test_a_folder_of_two_channels_and_one_incomplete_case(place):
    outcomes = execute(place)
    assert {case: o.status for case, o in outcomes.items()} == {"p1": "done", "p2": "done", "p3": "refused"}
    assert "p3_flair.nii.gz: the case's channel _t1 is missing" in outcomes["p3"].error
    record = json.loads((place / "out" / "p1" / "case.json").read_text())
    files = [place / "scans" / f"p1_{name}.nii.gz" for name in ("flair", "t1")]
    assert [(c["path"], c["sha256"]) for c in record["scan"]["channels"]] == [(str(f), file_digest(f)) for f in files]
    assert record["provenance"]["model_input"]["shape"] == [1, 2, *SHAPE]
    image = nib.load(place / "out" / "p1" / record["maps"][0]["file"])
    assert np.unravel_index(image.get_fdata().argmax(), SHAPE) == SPOT
    np.testing.assert_array_equal(image.affine, nib.load(files[0]).affine)


def test_a_result_is_kept_until_one_of_its_files_or_the_reading_changes(place, scan_file):
    execute(place)
    assert {o.status for o in execute(place).values()} == {"kept", "refused"}
    scan_file("scans/p2_t1.nii.gz", shape=SHAPE)
    assert {case: o.status for case, o in execute(place).items()} == {"p1": "kept", "p2": "done", "p3": "refused"}
    write(place, {"nan": -1})
    assert {case: o.status for case, o in execute(place).items()} == {"p1": "done", "p2": "done", "p3": "refused"}
    scan_file("scans/p3_t1.nii.gz", shape=SHAPE)
    assert {case: o.status for case, o in execute(place).items()} == {"p1": "kept", "p2": "kept", "p3": "done"}


def test_channels_on_other_grids_fail_unless_regrid(place, scan_file):
    affine = np.array([[-2.0, 0, 0, 33], [0, 0, 2.5, -20], [0, 1.5, 0, 10], [0, 0, 0, 1]])
    scan_file("scans/p2_t1.nii.gz", shape=SHAPE, affine=affine)
    assert "up to 3 mm from those of" in execute(place)["p2"].error
    write(place, {"regrid": True})
    outcome = execute(place)["p2"]
    assert outcome.status == "done"
    assert outcome.notes[0].startswith("channel 2: brought from")


def test_the_command_takes_the_files_in_the_models_order(place):
    scans = place / "scans"
    out = ["-c", str(place / "c.yaml"), "-o", str(place / "one"), "--case", "p1"]
    result = CliRunner().invoke(app, ["explain", str(scans / "p1_flair.nii.gz"), str(scans / "p1_t1.nii.gz"), *out])
    assert result.exit_code == 0, result.output
    record = json.loads((place / "one" / "p1" / "case.json").read_text())
    assert np.allclose(record["maps"][0]["peak_mm"], (30 - 2 * 3, -20 + 2.5 * 6, 10 + 1.5 * 9))
    result = CliRunner().invoke(app, ["layers", "-c", str(place / "c.yaml")])
    assert "(1, 2, 12, 14, 10)" in result.output
    result = CliRunner().invoke(app, ["run", str(place / "c.yaml")])
    assert "passed over: 1 scan files whose names end in none of _flair, _t1" in result.output
    assert "2 done" in result.output


def explain(place, scan, *options):
    where = ["-c", str(place / "c.yaml"), "-o", str(place / "one")]
    return CliRunner().invoke(app, ["explain", str(scan), *where, *options])


def test_the_volumes_of_one_file_as_channels(place, scan_file):
    stack = np.zeros((*SHAPE, 2))
    stack[(*SPOT, 1)] = 1000
    path = scan_file("stack.nii.gz", array=stack, shape=SHAPE)
    assert "4D with 2 volumes" in explain(place, path).output
    assert "--volume 'some': expected a number from 0, or all" in explain(place, path, "--volume", "some").output
    result = explain(place, path, "--volume", "all")
    assert result.exit_code == 0, result.output
    record = json.loads((place / "one" / "stack" / "case.json").read_text())
    assert [c["volume"] for c in record["scan"]["channels"]] == [0, 1]
    assert np.allclose(record["maps"][0]["peak_mm"], (30 - 2 * 3, -20 + 2.5 * 6, 10 + 1.5 * 9))


def test_options_that_say_how_a_scan_is_read(place, scan_file):
    array = np.ones((*SHAPE, 2), np.float32)
    array[0, 0, 0] = np.nan
    path = scan_file("holes.nii.gz", array=array, shape=SHAPE, dtype=np.float32)
    image = nib.load(path)
    moved = image.affine.copy()
    moved[0, 3] += 0.5
    image.set_sform(moved, 1)
    nib.save(image, path)
    assert "place a corner 0.5 mm apart" in explain(place, path, "--volume", "all", "--strict-geometry").output
    assert "say with what (--nan, or nan: in the config's scans)" in explain(place, path, "--volume", "all").output
    result = explain(place, path, "--volume", "all", "--nan", "-1024")
    assert result.exit_code == 0, result.output
    assert "1 of 1,680 voxels were NaN or infinite and became -1024" in result.output


def test_a_function_of_the_users_gets_the_list_of_paths(place):
    write(place, preprocess={"function": "net.py:load"})
    assert execute(place)["p1"].status == "done"


def test_from_python(place):
    explainer = Explainer.from_config(load_config(place / "c.yaml"))
    explanation = explainer([place / "scans" / "p1_flair.nii.gz", place / "scans" / "p1_t1.nii.gz"], case="x")
    assert np.unravel_index(explanation.maps[0].values.argmax(), SHAPE) == SPOT


def test_a_nan_filled_scan_says_so_in_the_record(place, scan_file):
    array = np.ones(SHAPE, np.float32)
    array[0, 0, 0] = np.nan
    scan_file("scans/p2_t1.nii.gz", array=array, shape=SHAPE, dtype=np.float32)
    assert "1 of 1,680 voxels are NaN" in execute(place)["p2"].error
    write(place, {"nan": -1024})
    assert execute(place)["p2"].status == "done"
    record = json.loads((place / "out" / "p2" / "case.json").read_text())
    assert record["scan"]["nan"] == -1024
    assert record["notes"] == ["channel 2: 1 of 1,680 voxels were NaN or infinite and became -1024"]


@pytest.mark.parametrize("channels", [["_t1", "_t1"], [""]])
def test_channels_are_endings_each_its_own(place, channels):
    write(place, {"channels": channels})
    with pytest.raises(ConfigError, match=r"c\.yaml:\d+: scans: channels are name endings, each its own"):
        load_config(place / "c.yaml")


def test_a_map_left_among_the_scans_is_not_explained(place):
    execute(place)
    stray = next((place / "out" / "p1").glob("*.nii.gz"))
    write(place, {"channels": []}, model={"factory": "net.py:Second"})
    stray.rename(place / "scans" / "stray.nii.gz")
    assert "a map that volsal wrote, not a scan" in execute(place)["stray"].error
