import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml
from nets import random_net
from safetensors.torch import save_file
from typer.testing import CliRunner

from volsal.cli import app, main

NET = """
from nets import random_net

def build(channels=1):
    return random_net(channels=channels).float()

class Nan:
    pass

def build_nan():
    net = build()
    net.register_forward_hook(lambda m, i, o: o * float("nan"))
    return net
"""


@pytest.fixture
def place(tmp_path, scan_file):
    """A folder with a scan, a model and a config that work."""
    (tmp_path / "net.py").write_text(NET)
    save_file(random_net().float().state_dict(), tmp_path / "weights.safetensors")
    scan_file("scans/good.nii.gz")
    config(tmp_path)
    return tmp_path


def config(folder, **sections):
    content = {
        "model": {"factory": "net.py:build", "weights": "weights.safetensors", "classes": ["no", "maybe", "yes"]},
        "preprocess": ["ScaleIntensity"],
        "methods": ["grad-cam", "guided-backprop"],
        "targets": ["predicted-class"],
        "scans": {"folder": "scans"},
        "output": "out",
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(content | sections))


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def explain(place, scan="scans/good.nii.gz", *more):
    return call("explain", place / scan, "-c", place / "c.yaml", "-o", place / "one", *more)


def test_explain_writes_overlays_and_says_what_it_found(place):
    result = explain(place)
    assert result.exit_code == 0, result.output
    home = place / "one" / "good"
    assert sorted(p.name for p in home.iterdir()) == [
        "case.json",
        "good_grad-cam_predicted-class.nii.gz",
        "good_guided-backprop_predicted-class.nii.gz",
    ]
    for word in ("class ", "grad-cam", "peak (R, A, S mm)", "volsal view", "fsleyes", "itksnap"):
        assert word in result.output


def test_method_and_target_replace_the_configs(place):
    result = explain(place, "scans/good.nii.gz", "-m", "hires-cam", "-t", "yes", "-t", "margin-2-0")
    assert result.exit_code == 0, result.output
    names = sorted(p.name for p in (place / "one" / "good").glob("*.nii.gz"))
    assert names == ["good_hires-cam_class-2.nii.gz", "good_hires-cam_margin-2-0.nii.gz"]


def test_run_ends_with_0_and_a_table_and_1_where_a_scan_failed(place):
    result = call("run", place / "c.yaml")
    assert result.exit_code == 0, result.output
    assert "1 done" in result.output
    assert (place / "out" / "cases.csv").is_file()
    (place / "scans" / "bad.nii.gz").write_text("nothing " * 100)
    result = call("run", place / "c.yaml")
    assert result.exit_code == 1
    assert "1 kept from before, 1 refused, 0 failed, of 2 cases" in result.output
    failed = [line for line in result.stderr.splitlines() if line.startswith("refused [scan]: bad:")]
    assert len(failed) == 1
    assert "not a NIfTI file" in failed[0]


def test_one_reason_for_many_scans_is_told_three_times_and_then_counted(place, scan_file):
    for number in range(5):
        scan_file(f"scans/{number}.nii.gz")
    config(place, targets=["class-7"])
    result = call("run", place / "c.yaml")
    assert result.exit_code == 1
    told = [line for line in result.stderr.splitlines() if line.startswith(("refused [target]:", "and "))]
    assert len(told) == 4
    assert told[-1].startswith("and 3 more for the same reason: class 7 asked for")


def test_layers_lists_candidates_and_marks_the_default(place):
    result = call("layers", "-c", place / "c.yaml")
    assert result.exit_code == 0, result.output
    marked = [line.split() for line in result.output.splitlines() if line.startswith("*")]
    assert [line[1:4] for line in marked] == [["4", "ReLU", "11x13x9"]]
    by_shape = call("layers", "-c", place / "c.yaml", "--shape", "1,24,28,20")
    assert by_shape.output == result.output
    assert call("layers", "-c", place / "c.yaml", "--shape", "3,4").exit_code == 2


def damage_nan(place, scan_file):
    array = np.ones((24, 28, 20), np.float32)
    array[3, 4, 5] = np.nan
    scan_file("scans/nan.nii.gz", array=array, dtype=np.float32)
    return explain(place, "scans/nan.nii.gz")


def damage_flat(place, scan_file):
    scan_file("scans/flat.nii.gz", array=np.ones((24, 28)), shape=(24, 28))
    return explain(place, "scans/flat.nii.gz")


def damage_text(place, scan_file):
    (place / "scans" / "text.nii.gz").write_text("not an image " * 50)
    return explain(place, "scans/text.nii.gz")


def with_config(**sections):
    def act(place, scan_file):
        config(place, **sections)
        return explain(place)

    return act


def unwritable(place, scan_file):
    return call("explain", place / "scans/good.nii.gz", "-c", place / "c.yaml", "-o", place / "net.py" / "out")


def typo(place, scan_file):
    text = (place / "c.yaml").read_text().replace("methods:", "metods:")
    (place / "c.yaml").write_text(text)
    return explain(place)


def mismatch(place, scan_file):
    save_file(random_net(channels=2).float().state_dict(), place / "weights.safetensors")
    return explain(place)


BAD = {
    "missing file": (lambda p, s: explain(p, "scans/none.nii.gz"), 2, "none.nii.gz: no such file"),
    "not a NIfTI": (damage_text, 1, "not a NIfTI file"),
    "2D image": (damage_flat, 1, "2D"),
    "channel count": (
        with_config(model={"factory": "net.py:build", "arguments": {"channels": 2}}),
        2,
        "its first convolution, '0', expects 2 channels",
    ),
    "misspelt layer": (with_config(methods=[{"grad-cam": {"layer": "44"}}]), 2, "no layer '44'; did you mean '4'"),
    "class out of range": (
        with_config(targets=["class-7"]),
        2,
        "class 7 asked for, but the model has 3 classes, 0 to 2",
    ),
    "NaN in scan": (damage_nan, 1, "1 of 13,440 voxels are NaN or infinite, the first at (3, 4, 5)"),
    "NaN logits": (with_config(model={"factory": "net.py:build_nan"}), 2, "is nan: NaN or infinity has no gradient"),
    "output not writable": (unwritable, 2, "cannot write there"),
    "config typo": (typo, 2, "metods: unknown key; did you mean 'methods'?"),
    "weights that do not match": (mismatch, 2, "its weights do not match the model: 1 of another shape (0.weight"),
    "method": (lambda p, s: explain(p, "scans/good.nii.gz", "-m", "gradcam"), 2, "did you mean 'grad-cam'"),
    "no config": (lambda p, s: call("explain", p / "scans/good.nii.gz", "-c", p / "n.yaml"), 2, "no such config file"),
    "class name": (lambda p, s: explain(p, "scans/good.nii.gz", "-t", "mayb"), 2, "did you mean 'maybe'"),
    "view of nothing": (lambda p, s: call("view", p / "nothing"), 2, "nothing"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing_half_written(name, place, scan_file):
    act, status, says = BAD[name]
    result = act(place, scan_file)
    assert says in result.stderr, result.output
    assert result.exit_code == status
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("volsal: ")
    assert "Traceback" not in result.output
    assert not list((place / "one").rglob("*")) if (place / "one").exists() else True


def test_what_names_a_file_cannot_write_to_the_terminal(place):
    result = explain(place, "evil\x1b[31m\n[bold].nii")
    assert "\x1b[31m" not in result.stderr
    assert "\\x1b[31m" in result.stderr
    assert "[bold]" in result.stderr


@pytest.mark.parametrize("where", [0, 1, -1])
def test_debug_shows_the_traceback_wherever_it_stands(place, where, monkeypatch, capsys):
    words = ["explain", str(place / "scans" / "none.nii.gz"), "-c", str(place / "c.yaml"), "-m", "nonsense"]
    words[1] = str(place / "scans" / "good.nii.gz")
    words.insert(where if where >= 0 else len(words), "--debug")
    monkeypatch.setattr(sys, "argv", ["volsal", *words])
    monkeypatch.setenv("VOLSAL_DEBUG", "")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "Traceback" in capsys.readouterr().err


def test_version_and_help_need_no_torch(tmp_path):
    code = (
        "import sys; sys.argv = ['volsal', '--help']\nfrom volsal.cli import main\n"
        "try: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")
    for command in ("explain", "run", "layers", "view", "demo"):
        assert command in done.stdout
    version = subprocess.run([sys.executable, "-m", "volsal", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("volsal 0.")


def test_a_command_that_does_not_exist_ends_with_2():
    done = subprocess.run([sys.executable, "-m", "volsal", "explian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "explain" in done.stderr


def test_the_demo_finds_the_lesions_it_planted(tmp_path):
    result = call("demo", "-o", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    mean = next(line.split() for line in result.output.splitlines() if line.startswith("mean"))
    grad_cam, hires, guided, product, _ = map(float, mean[1:])
    assert max(grad_cam, hires, guided, product) < 12  # a cell; the lesions measure 18 mm across
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 100_000
    assert len(list((tmp_path / "demo" / "results").rglob("*.nii.gz"))) == 8 * 5
    again = call("run", tmp_path / "demo" / "demo.yaml")
    assert again.exit_code == 0
    assert "8 kept from before" in again.output
    assert os.access(tmp_path / "demo", os.W_OK)


def test_a_run_is_planned_watched_and_collected(place):
    plan = call("run", place / "c.yaml", "--plan")
    assert plan.exit_code == 0, plan.output
    assert "1 cases below" in plan.output
    assert "time: about" in plan.output
    assert not (place / "out").exists()
    assert json.loads(call("run", place / "c.yaml", "--plan", "--json").stdout)["cases"] == 1

    summary = json.loads(call("run", place / "c.yaml", "--json").stdout)
    assert summary["states"] == {"done": 1, "kept": 0, "refused": 0, "failed": 0}
    assert call("status", place / "out").output.startswith("1 cases: 1 done, 0 refused, 0 failed, 0 missing")
    assert json.loads(call("status", place / "out", "--json").stdout)["ended"] == "end"
    table = place / "out" / "cases.csv"
    before = table.read_bytes()
    table.unlink()
    assert call("collect", place / "out").exit_code == 0
    assert table.read_bytes() == before
    refused = call("status", place / "scans")
    assert refused.exit_code == 2
    assert "not a run folder" in refused.output


def test_the_table_as_parquet(place):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    call("run", place / "c.yaml")
    assert call("collect", place / "out", "--parquet").exit_code == 0
    assert parquet.read_table(place / "out" / "cases.parquet").column("case").to_pylist() == ["good"] * 2
