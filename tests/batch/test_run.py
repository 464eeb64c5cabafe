import csv
import hashlib
import importlib
import json
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from typer.testing import CliRunner

from volsal import references
from volsal.attribution import IntegratedGradients, Method
from volsal.batch import Run, recipe
from volsal.cli import app
from volsal.config import ConfigError, load_config
from volsal.errors import VolsalError
from volsal.explain import Explainer, _require_named
from volsal.run_folder import Fault
from volsal.scans.write import WriteError

NET = """
import torch
from torch import nn

def build(scale=1.0):
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)
    net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2), *head)
    net[0].weight.data *= scale
    return net
"""


@pytest.fixture
def config(tmp_path, scan_file):
    """A function that writes a config over three sound scans and returns its path; keywords replace sections."""
    (tmp_path / "net.py").write_text(NET)
    for name in ("a.nii.gz", "sub/b.nii.gz", "sub/c.nii.gz"):
        scan_file(f"scans/{name}", shape=(12, 14, 10))

    def write(**sections):
        content = {
            "model": {"factory": "net.py:build"},
            "preprocess": ["ScaleIntensity"],
            "methods": ["grad-cam", "guided-backprop"],
            "targets": ["class-1"],
            "scans": {"folder": "scans"},
            "output": "out",
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content | sections))
        return path

    return write


def execute(path):
    run = Run(load_config(path))
    return run, sorted(run.execute(), key=lambda outcome: outcome.case)


def test_every_scan_gets_a_case_folder(config, tmp_path):
    _, outcomes = execute(config())
    assert [(o.case, o.status) for o in outcomes] == [("a", "done"), ("sub-b", "done"), ("sub-c", "done")]
    for outcome in outcomes:
        names = sorted(p.name for p in (tmp_path / "out" / outcome.case).iterdir())
        stem = outcome.case
        assert names == sorted(
            ["case.json", f"{stem}_grad-cam_class-1.nii.gz", f"{stem}_guided-backprop_class-1.nii.gz"]
        )
    content = json.loads((tmp_path / "out" / "run.json").read_text())
    assert content["cases"] == 3
    assert content["config"]["model"]["factory"] == "net.py:build"


def test_a_bad_scan_costs_no_other_and_its_reason_is_kept(config, tmp_path):
    (tmp_path / "scans" / "bad.nii.gz").write_text("hello " * 200)
    (tmp_path / "scans" / "sub" / "empty.nii").write_bytes(b"")
    run, outcomes = execute(config())
    status = {o.case: o.status for o in outcomes}
    assert status == {"a": "done", "bad": "refused", "sub-b": "done", "sub-c": "done", "sub-empty": "refused"}
    bad = next(o for o in outcomes if o.case == "bad")
    assert "not a NIfTI file" in bad.error
    assert "Traceback" in bad.trace
    assert [p.name for p in (tmp_path / "out" / "bad").iterdir()] == ["fault.json"]
    assert run.folder.fault("bad").code == "scan"
    rows = list(csv.DictReader(run.collect().read_text().splitlines()))
    assert len(rows) == 3 * 2 + 2
    assert {row["case"] for row in rows if row["status"] == "refused"} == {"bad", "sub-empty"}
    assert [row["peak_x_mm"] != "" for row in rows if row["case"] == "a"] == [True, True]


def test_a_second_run_keeps_what_still_holds(config, tmp_path):
    execute(config())
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.nii.gz")}
    _, outcomes = execute(config())
    assert [o.status for o in outcomes] == ["kept"] * 3
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.nii.gz")}


CHANGES = {
    "weights": {"model": {"factory": "net.py:build", "arguments": {"scale": 2.0}}},
    "target": {"targets": ["class-0"]},
    "method": {"methods": ["grad-cam"]},
    "layer": {"methods": [{"grad-cam": {"layer": "1"}}, "guided-backprop"]},
    "preprocess": {"preprocess": ["NormalizeIntensity"]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_case_is_done_again_when_what_made_it_changes(config, tmp_path, change):
    execute(config())
    _, outcomes = execute(config(**CHANGES[change]))
    assert [o.status for o in outcomes] == ["done"] * 3


def test_only_the_case_whose_scan_or_result_changed_is_done_again(config, tmp_path, scan_file):
    execute(config())
    scan_file("scans/a.nii.gz", shape=(12, 14, 11))
    next((tmp_path / "out" / "sub-c").glob("*guided*")).unlink()
    _, outcomes = execute(config())
    assert [o.status for o in outcomes] == ["done", "kept", "done"]


@pytest.mark.parametrize("damage", ["{", '{"provenance": []}'])
def test_a_damaged_record_or_map_is_made_anew(config, tmp_path, damage):
    execute(config())
    (tmp_path / "out" / "a" / "case.json").write_text(damage)
    next((tmp_path / "out" / "sub-b").glob("*grad-cam*")).write_bytes(b"")
    _, outcomes = execute(config())
    assert [o.status for o in outcomes] == ["done", "done", "kept"]
    assert [o.status for o in execute(config())[1]] == ["kept"] * 3


def test_changed_preprocessing_code_counts(config, tmp_path, monkeypatch):
    code = (
        "import nibabel\n"
        "def prepare(path):\n"
        "    image = nibabel.load(path)\n"
        "    return image.get_fdata()[None] * {}, image.affine\n"
    )
    (tmp_path / "prepare.py").write_text(code.format(1.0))
    path = config(preprocess={"function": "prepare.py:prepare"})
    execute(path)
    (tmp_path / "prepare.py").write_text(code.format(2.0))
    with pytest.raises(ConfigError, match=r"prepare\.py: changed since this process loaded it"):
        execute(path)  # Python would run the code as it was, and the results would be recorded as of the new one
    _as_a_new_process(monkeypatch)
    _, outcomes = execute(path)
    assert [o.status for o in outcomes] == ["done"] * 3


def _as_a_new_process(monkeypatch):
    monkeypatch.setattr("volsal.batch.recipe._LOADED", {})
    for name in [name for name in sys.modules if name.startswith("volsal_user_")]:
        monkeypatch.delitem(sys.modules, name)


def test_code_that_is_imported_from_a_package_beside_the_config_counts(config, tmp_path, monkeypatch):
    package = tmp_path / "ownpkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "deep.py").write_text("FACTOR = 2\n")
    (package / "steps.py").write_text("from ownpkg.deep import FACTOR\nfrom . import rest\n")
    (package / "rest.py").write_text("")
    (package / "broken.py").write_text("def (")
    (package / "unused.py").write_text("")
    (tmp_path / "net.py").write_text(
        "try:\n    import ownpkg.broken\nexcept SyntaxError:\n    import ownpkg.steps\n" + NET
    )
    content = load_config(config())
    names = {file.name for file in recipe._modules(content)}
    assert names == {"net.py", "__init__.py", "steps.py", "deep.py", "rest.py", "broken.py"}
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("ownpkg.steps")
    named = content.model_copy(update={"model": content.model.model_copy(update={"factory": "ownpkg.steps:build"})})
    assert {file.name for file in recipe._modules(named)} == {"__init__.py", "steps.py", "deep.py", "rest.py"}
    for name in [name for name in sys.modules if name.partition(".")[0] == "ownpkg"]:
        monkeypatch.delitem(sys.modules, name)
    installed = content.model_copy(update={"model": content.model.model_copy(update={"factory": "yaml:safe_load"})})
    assert recipe._modules(installed) == set()


COUNTING = """
import torch
from torch import nn

PASSES = []

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU())
        self.features[1].running_mean.normal_()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        PASSES.append(tuple(x.shape))
        return self.head(self.features(x).mean((2, 3, 4)))
"""


@pytest.mark.parametrize(
    ("fast", "once"),
    [(False, 1), (True, 2)],  # the first scan again; the model and its copy, which are compared
)
def test_what_is_checked_once_is_checked_once_and_no_record_tells_on_which_scan(config, tmp_path, fast, once):
    (tmp_path / "counting.py").write_text(COUNTING)
    sections = {"model": {"factory": "counting.py:Net", "fast": fast}, "methods": [{"grad-cam": {"layer": "features"}}]}
    path = config(**sections, alignment="half-pixel")
    run, outcomes = execute(path)
    counting = references.resolve("counting.py:PASSES", tmp_path)
    assert ([o.status for o in outcomes], len(counting)) == (["done"] * 3, 3 + once)
    first = Run(load_config(config(**sections, alignment="half-pixel", scans={"folder": "scans/sub"})), tmp_path / "b")
    list(first.execute())
    records = [run.folder.record("sub-b"), first.folder.record("b")]
    for record in records:
        assert record["provenance"]["model"]["fast"] == (
            {"dtype": None, "folded": 1, "norms": 1, "within": 1e-4} if fast else None
        )
    assert records[0]["notes"] == records[1]["notes"]


def test_a_plan_goes_by_the_keys_that_the_run_goes_by(config, tmp_path, scan_file):
    (tmp_path / "scans" / "bad.nii.gz").write_text("hello " * 200)
    path = config()
    execute(path)
    scan_file("scans/a.nii.gz", shape=(12, 14, 11))
    next((tmp_path / "out" / "sub-c").glob("*guided*")).unlink()
    scan_file("scans/z.nii.gz", shape=(12, 14, 10))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    plan = Run(load_config(path)).plan()
    assert plan.standing == {"done": 1, "changed": 2, "faulty": 1, "new": 1}
    assert (plan.left, len(plan.timed), plan.timed.keys() <= {"a", "sub-c", "z"}) == (3, 2, True)
    assert plan.voxels_left == 12 * 14 * (10 + 11 + 10)
    said = "\n".join(plan.lines())
    assert "1 done and kept; 2 done again, since what they depend on has changed; 1 refused or failed before" in said
    assert "left so: --retry-failed tries them again); 1 new" in said
    assert said.count("for the 3 cases that are left") == 2
    retried = Run(load_config(path), retry_failed=True).plan()
    assert (retried.left, "and as they were (tried again)" in "\n".join(retried.lines())) == (4, True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    _, outcomes = execute(path)
    assert [o.case for o in outcomes if o.status == "done"] == ["a", "sub-c", "z"]
    finished = Run(load_config(path)).plan()
    assert (finished.left, finished.timed, finished.seconds) == (0, {}, None)
    assert "nothing is left to do" in finished.lines()
    (tmp_path / "scans" / "a.nii.gz").write_bytes(b"")  # a file that cannot be read: the run will say so
    assert Run(load_config(path)).plan().standing["changed"] == 1


def test_a_disk_that_fails_stops_the_run_and_loses_nothing(config, tmp_path, monkeypatch):
    import volsal.explanation

    real, calls = volsal.explanation.write_map, []

    def full(path, *rest):
        calls.append(path)
        if len(calls) > 3:
            raise WriteError(f"{path}: could not be written: No space left on device")
        return real(path, *rest)

    monkeypatch.setattr("volsal.explanation.write_map", full)
    with pytest.raises(WriteError, match="No space left"):
        execute(config())
    (first,) = (record.parent.name for record in (tmp_path / "out").glob("*/case.json"))  # for the threads to say
    monkeypatch.setattr("volsal.explanation.write_map", real)
    _, outcomes = execute(config())
    assert {o.case: o.status for o in outcomes} == {"a": "done", "sub-b": "done", "sub-c": "done", first: "kept"}


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"scans": None}, "scans: missing"),
        ({"output": None}, "output: missing"),
        ({"scans": {"folder": "nowhere"}}, r"scans\.folder: no folder .*/nowhere"),
        ({"scans": {"folder": "scans", "pattern": "*T1*"}}, r"no \*T1\* below"),
    ],
)
def test_a_config_that_names_nothing_to_do_is_an_error(config, sections, says):
    with pytest.raises(ConfigError, match=says):
        Run(load_config(config(**sections)))


@pytest.mark.parametrize(
    "sections",
    [
        {"methods": ["grad-camm"]},
        {"targets": ["nonsense"]},
        {"model": {"factory": "net.py:biuld"}},
        {"preprocess": ["Orientatoin"]},
        {"methods": [{"grad-cam": {"layr": "1"}}]},
        {"model": {"factory": "net.py:build", "weights": "gone.pt"}},
        {"output": "net.py/out"},
    ],
)
def test_what_is_wrong_for_every_scan_is_said_before_the_first(config, sections):
    with pytest.raises(VolsalError):
        next(Run(load_config(config(**sections))).execute())


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"model": {"factory": "net.py:build", "weights": "gone.pt"}},
            r"model\.weights: no weights file .*gone\.pt; put it",
        ),
        (
            {"model": {"factory": "nett.py:build"}},
            r"model\.factory: no Python file .*nett\.py; did you mean 'net\.py'\?",
        ),
        ({"model": {"file": "deep/gone.pt2"}}, r"model\.file: no exported program .*deep/gone\.pt2; put it there"),
        ({"model": {"bundle": "gone"}}, r"model\.bundle: no bundle .*gone; known: .*put it there"),
        ({"preprocess": {"function": "steps.py:prepare"}}, r"preprocess\.function: no Python file .*steps\.py"),
        (
            {"methods": ["grad-cam", {"deep-lift": {"baseline": "healthy/{case}.nii.gz"}}]},
            r"methods\.1\.deep-lift\.baseline: no folder .*healthy; .*mend the path 'healthy/\{case\}\.nii",
        ),
        (
            {"methods": [{"integrated-gradients": {"baseline": "scans/d.nii.gz"}}]},
            r"methods\.0\.integrated-gradients\.baseline: no scan .*scans/d\.nii\.gz; did you mean 'a\.nii\.gz'",
        ),
        (
            {"methods": [{"expected-gradients": {"baselines": "controls"}}]},
            r"methods\.0\.expected-gradients\.baselines: no scan or folder of scans .*controls",
        ),
        (
            {"methods": [{"expected-gradients": {"baselines": "scans/*.mha"}}]},
            r"methods\.0\.expected-gradients\.baselines: no scan or folder of scans .*scans/\*\.mha; put it there",
        ),
        (
            {"methods": [{"expected-gradients": {"baselines": ["scans/a.nii.gz", "zero", "/gone/b.nii.gz"]}}]},
            r"methods\.0\.expected-gradients\.baselines: no .* /gone/b\.nii\.gz; .*mend the path '/gone/.*'$",
        ),
        (
            {"methods": [{"region-ablation": {"labels": "organs.nii.gz"}}]},
            r"methods\.0\.region-ablation\.labels: no label map .*organs\.nii\.gz",
        ),
        (
            {"targets": [0, "segment-1-in:masks/gone.nii.gz#3"]},
            r"targets\.1: no scan or label map .*/masks/gone\.nii\.gz; put it there, or mend the path 'masks/gone",
        ),
        ({"targets": ["similar:gone.nii.gz"]}, r"targets\.0: no scan or label map .*gone\.nii\.gz"),
        ({"scans": {"folder": "scans", "labels": "gone.csv"}}, r"scans\.labels: no table .*gone\.csv"),
        ({"scans": {"table": "config.yaml", "folder": "gone"}}, r"scans\.folder: no folder .*gone"),
        ({"audit": {"random_labels": "gone.pt"}}, r"audit\.random_labels: no weights file .*gone\.pt"),
        ({"audit": {"template": "gone.nii.gz"}}, r"audit\.template: no scan .*gone\.nii\.gz"),
    ],
)
def test_a_file_that_is_not_there_is_told_by_its_key(config, sections, says):
    with pytest.raises(ConfigError, match=f"config\\.yaml: {says}"):
        next(Run(load_config(config(**sections))).execute())


def test_a_file_that_a_methods_ingredient_names_is_looked_for(config):
    class Squared(Method):
        id = "squared"

        def ingredients(self):
            return (IntegratedGradients(baseline="gone.nii"),)

        def compose(self, volume, answers, context):
            return answers[0]

    explainer = SimpleNamespace(methods=[Squared()], targets=[])
    with pytest.raises(ConfigError, match=r"methods\.0\.squared\.baseline: no scan .*gone\.nii"):
        _require_named(explainer, load_config(config()), given=False)


def test_files_that_are_there_and_words_that_name_none_are_taken(config, tmp_path):
    scans = {"baselines": ["scans/a.nii.gz", "scans/sub", "scans/*.nii.gz", "zero"]}
    methods = [
        *({"expected-gradients": {"baselines": one, "name": f"of-{n}"}} for n, one in enumerate(scans["baselines"])),
        {"expected-gradients": {"baselines": ["zero", 0.5, str(tmp_path / "scans" / "a.nii.gz")], "name": "listed"}},
        {"integrated-gradients": {"baseline": "blur"}},
        {"deep-lift": {"baseline": "scans/{case}.nii.gz"}},
    ]
    explainer = Explainer.from_config(load_config(config(methods=methods, targets=["segment-1-in:scans/{case}.nii"])))
    assert len(explainer.methods) == 7


def test_a_path_may_start_from_the_users_own_folder(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = config(model={"factory": "~/net.py:build", "weights": "~/gone.pt"})
    with pytest.raises(ConfigError, match=rf"weights: no weights file {tmp_path}/gone\.pt; .*the path '~/gone\.pt'$"):
        Explainer.from_config(load_config(path))
    torch.save(Explainer.from_config(load_config(config())).model.state_dict(), tmp_path / "gone.pt")
    run, _ = execute(config(model={"factory": "~/net.py:build", "weights": "~/gone.pt"}))
    assert run.folder.record("a")


def test_a_target_given_in_place_of_the_configs_is_not_told_as_the_configs(config, tmp_path):
    said = r"config\.yaml: a target given in place of the config's: no scan or label map .*gone\.nii"
    with pytest.raises(ConfigError, match=said):
        Explainer.from_config(load_config(config()), targets=["similar:gone.nii"])


@pytest.mark.parametrize(
    "words", [["run"], ["run", "--plan"], ["audit"], ["choose"], ["check-model"]], ids=lambda words: " ".join(words)
)
@pytest.mark.parametrize(
    ("sections", "key"),
    [({"audit": {"template": "gone.nii"}}, "audit.template"), ({"targets": ["similar:gone.nii"]}, "targets.0")],
)
def test_every_command_tells_what_is_missing_before_it_works_on_a_scan(config, words, sections, key, monkeypatch):
    monkeypatch.setattr("volsal.explain.Explainer.prepare", None)
    path = config(**sections)
    result = CliRunner().invoke(app, [words[0], str(path), *words[1:]])
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"volsal: {path}: {key}: no "), result.output
    assert line.endswith("mend the path 'gone.nii', which starts from the config's own folder")


def test_the_record_says_what_it_was_computed_with(config, tmp_path):
    run, _ = execute(config())
    for about in (run.folder.asked(), run.folder.record("a")["provenance"]):
        assert about["numerics"]["deterministic"] is False
        assert {"volsal", "commit", "versions", "machine", "threads"} <= about.keys()
    assert run.folder.asked()["code"] == {"0 net.py": hashlib.sha256(NET.encode()).hexdigest()}
    assert run.folder.asked()["machine"].startswith(" ".join(os.uname()[n] for n in (0, 2, 4)))
    assert run.folder.record("a")["provenance"]["model"]["outputs"] == [[1, 2]]
    assert run.folder.record("a")["provenance"]["model"]["source"] == {"factory": "net.py:build"}


def test_cells_that_a_spreadsheet_would_run_are_quoted(config, tmp_path):
    run, _ = execute(config())
    run.folder.write_fault("a", Fault("failed", "error", "=HYPERLINK(1)\nsecond line"))
    run.folder.write_fault("sub-b", Fault("failed", "=cmd", "-1e-5"))
    (tmp_path / "out" / "inputs.json").write_text(
        json.dumps({"cases": {"a": {"label": "@SUM(1)", "groups": {"site": "+1 2"}}, "sub-b": {"label": "-1e-5"}}})
    )
    first, second = csv.DictReader(run.collect().read_text().splitlines())
    assert first["error"] == "[error] =HYPERLINK(1) second line"
    assert (first["label"], first["site"]) == ("'@SUM(1)", "'+1 2")
    assert second["label"] == "-1e-5"


def test_results_among_the_inputs_are_not_explained_again(config, tmp_path):
    path = config(output="scans/out")
    execute(path)
    _, outcomes = execute(path)
    assert [o.case for o in outcomes] == ["a", "sub-b", "sub-c"]


def test_time_is_counted(config):
    start = time.monotonic()
    _, outcomes = execute(config())
    for outcome in outcomes:
        assert set(outcome.stages) == {"read", "compute", "write"}
        assert 0 < sum(outcome.stages.values()) <= outcome.seconds + 1e-3 <= time.monotonic() - start + 1e-3
