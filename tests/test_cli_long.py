"""Long methods on the command line: what is shown on the way, and a run that is taken up again."""

import io
import json

import nibabel as nib
import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from volsal import Explainer, Occlusion, cli

# A network that counts its runs in a file, and stops the command at a run whose number stands in another.
NET = """
from pathlib import Path
from nets import random_net

HERE = Path(__file__).parent

def build():
    net = random_net().float()

    def count(*_):
        runs = int((HERE / "runs").read_text()) + 1
        if (HERE / "stop").exists() and runs > int((HERE / "stop").read_text()):
            raise KeyboardInterrupt
        (HERE / "runs").write_text(str(runs))

    net.register_forward_pre_hook(count)
    return net
"""
METHODS = [
    {"occlusion": {"box_mm": 20, "batch": 4}},
    {"rise": {"cell_mm": 20, "masks": 20}},
    {"region-ablation": {"labels": "labels/{case}_seg.nii.gz", "names": {1: "liver", 2: "spleen"}, "controls": 2}},
]


@pytest.fixture
def place(tmp_path, scan_file):
    """Two cases with label maps, each in another orientation than its scan, and a model that counts its runs."""
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "labels").mkdir()
    for number in (1, 2):
        image = nib.load(scan_file(f"scans/case{number}.nii.gz"))
        labels = np.zeros(image.shape, np.int16)
        labels[4:9, 5:12, 3:9], labels[14:20, 15:22, 10 + number : 16] = 1, 2
        nib.save(
            nib.as_closest_canonical(nib.Nifti1Image(labels, image.affine)),
            tmp_path / f"labels/case{number}_seg.nii.gz",
        )
    content = {
        "model": {"factory": "net.py:build"},
        "preprocess": ["ScaleIntensity"],
        "methods": METHODS,
        "targets": ["class-1"],
        "scans": {"folder": "scans"},
        "output": "out",
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "runs").write_text("0")
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def runs(place):
    count = int((place / "runs").read_text())
    (place / "runs").write_text("0")
    return count


def maps(home):
    return {path.name: nib.load(path).get_fdata() for path in sorted(home.glob("*.nii.gz"))}


def test_an_interrupted_explanation_is_taken_up_again_to_the_bit(place):
    asked = ("explain", place / "scans/case1.nii.gz", "-c", place / "c.yaml", "-o")
    assert call(*asked, place / "whole").exit_code == 0
    whole = runs(place)
    (place / "stop").write_text(str(whole // 2))
    result = call(*asked, place / "one")
    assert result.exit_code == 130
    assert "what is done is kept" in result.stderr
    assert list((place / "one/.partial/case1").iterdir())
    assert not (place / "one/case1").exists()
    first = runs(place)
    (place / "stop").unlink()
    assert call(*asked, place / "one").exit_code == 0
    # Every copy once; the scan itself for each method again, of which the first two had asked it already.
    assert first == whole // 2
    assert runs(place) <= whole - first + len(METHODS)
    expected = maps(place / "whole/case1")
    assert len(expected) == 3
    for name, values in maps(place / "one/case1").items():
        assert np.array_equal(values, expected[name])
    assert [path.name for path in (place / "one").iterdir()] == ["case1"]


def test_an_interrupted_run_is_taken_up_again(place):
    assert call("run", place / "c.yaml", "-o", place / "whole").exit_code == 0
    whole = runs(place)
    (place / "stop").write_text(str(3 * whole // 4))
    assert call("run", place / "c.yaml").exit_code == 130
    # Which of the two goes first is for the threads to say.
    (unfinished,) = (case for case in ("case1", "case2") if not (place / "out" / case / "case.json").exists())
    assert [path.name for path in (place / "out/.partial").iterdir()] == [unfinished]
    runs(place)
    (place / "stop").unlink()
    result = call("run", place / "c.yaml")
    assert "1 done" in result.output
    assert "1 kept from before" in result.output
    assert runs(place) < 0.3 * whole
    assert not (place / "out/.partial").exists()
    for case in ("case1", "case2"):
        for name, values in maps(place / "out" / case).items():
            assert np.array_equal(values, maps(place / "whole" / case)[name])


def test_regions_are_told_by_name_with_their_controls_and_lie_on_the_scan(place):
    assert call("run", place / "c.yaml").exit_code == 0
    for number in (1, 2):
        home = place / f"out/case{number}"
        record = json.loads((home / "case.json").read_text())
        (entry,) = [entry for entry in record["maps"] if entry["method"] == "region-ablation"]
        liver, spleen = entry["facts"]["regions"]
        assert (liver["name"], spleen["name"]) == ("liver", "spleen")
        assert liver["voxels"] == 5 * 7 * 6
        assert spleen["voxels"] == 6 * 7 * (6 - number)
        assert liver["ml"] == pytest.approx(5 * 7 * 6 * 2 * 2.5 * 1.5 / 1000)
        assert liver["controls"] == 2
        values = nib.load(home / entry["file"]).get_fdata()
        assert values[6, 8, 5] == pytest.approx(liver["drop"], rel=1e-5)
        assert values[15, 16, 14] == pytest.approx(spleen["drop"], rel=1e-5)
        assert values[0, 0, 0] == 0


def test_a_changed_label_map_is_explained_anew(place):
    assert call("run", place / "c.yaml").exit_code == 0
    path = place / "labels/case1_seg.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) * 2, image.affine), path)
    result = call("run", place / "c.yaml")
    assert "1 done" in result.output
    assert "1 kept from before" in result.output


def test_without_its_label_map_a_case_fails_by_name(place):
    (place / "labels/case2_seg.nii.gz").unlink()
    result = call("run", place / "c.yaml")
    assert result.exit_code == 1
    assert "case2_seg.nii.gz: no such file" in result.stderr


@pytest.mark.parametrize("more", [(), ("--quiet",)])
def test_progress_and_cost_are_shown_on_a_terminal_unless_quiet(place, more, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        "volsal.cli.progress.err", Console(file=screen, force_terminal=True, width=150, highlight=False)
    )
    asked = ("explain", place / "scans/case1.nii.gz", "-c", place / "c.yaml", "-o", place / "one", *more)
    assert call(*asked).exit_code == 0
    shown = screen.getvalue()
    if more:
        assert "occlusion" not in shown
    else:
        assert "rise: 20 forward passes, about" in shown


def test_nothing_of_it_is_shown_elsewhere(place):
    result = call("explain", place / "scans/case1.nii.gz", "-c", place / "c.yaml", "-o", place / "one")
    assert result.exit_code == 0
    assert "forward passes" not in result.output + result.stderr


def test_forgetting_leaves_what_is_not_its_own(tmp_path, scan_file):
    from nets import random_net

    explainer = Explainer(random_net().float(), methods=Occlusion(box_mm=20), keep=tmp_path / "keep")
    explanation = explainer(scan_file())
    (tmp_path / "keep/scan/mine.txt").write_text("mine")
    assert len(list((tmp_path / "keep/scan").iterdir())) == 2
    explainer.forget(explanation.case)
    assert [path.name for path in (tmp_path / "keep/scan").iterdir()] == ["mine.txt"]
