"""The whole audit: true causes are named, honest models are not flagged, and what was done is not done again."""

import csv
import json
from dataclasses import dataclass, replace
from functools import partial

import nibabel as nib
import numpy as np
import planted
import pytest
import torch
from planted import explainer
from typer.testing import CliRunner

from volsal import GradientTimesInput
from volsal.attribution import Method
from volsal.audit import run
from volsal.audit.metric import Undefined
from volsal.audit.run import audit
from volsal.audit.shortcuts import side_of
from volsal.audit.subject import subject_of
from volsal.audit.trust import TRUSTED, UNDECIDED, UNTRUSTED
from volsal.audit.verdicts import FLAGGED, ON, Evidence, group_differences, of_masks
from volsal.cli import app
from volsal.config import AuditSection

SETTINGS = AuditSection(candidates=False, min_scans=4, checked=1, controls=9, exchanged=0)
REGIONS = ("outside the body", "in padding", "at the field's border", "in a corner of the field")


@pytest.fixture(scope="module")
def scans(scans):
    return partial(scans, masks=True)


@pytest.fixture(scope="module")
def honest(scans, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return audit(explainer(planted.Bright()), scans("lesion"), SETTINGS, folder), folder


def test_an_honest_model_is_trusted_and_not_flagged(honest):
    found, _ = honest
    assert found.verdict("trust: gradient-x-input").verdict == TRUSTED
    assert [one.name for one in found.verdicts if one.verdict == FLAGGED] == []
    assert found.verdict("mask: evidence").verdict == ON
    assert found.suspicious == ()
    metrics = found.metrics["gradient-x-input"]
    assert metrics["evidence: pointing game"]["value"] == 1
    assert metrics["evidence: pointing game"]["n"] == 6
    assert metrics["evidence: pointing game"]["undefined"] == 6  # counted, and no zeroes
    nulls = metrics["evidence: pointing game"]["nulls"]
    assert set(nulls) == {
        "permuted", "smooth", "moved mask", "random weights", "centre blob", "intensity", "edges"
    }  # fmt: skip
    assert nulls["moved mask"]["value"] < 0.5
    assert nulls["intensity"]["value"] == 1  # the lesion is what is brightest
    assert nulls["permuted"]["n"] == 6
    assert metrics["effect at the peak, spreads"]["low"] > 0


def test_a_marker_in_the_air_is_named_with_its_place(scans):
    found = audit(explainer(planted.Bright(planted.MARKER)), scans("marker"), SETTINGS)
    for name in ("outside the body", "in a corner of the field"):
        verdict = found.verdict(name)
        assert verdict.verdict == FLAGGED
        assert "class 1" in verdict.words
        assert "left posterior inferior" in verdict.words
        assert verdict.figures["class 1"]["suspicious"] == 6
        assert verdict.figures["class 0"]["suspicious"] == 0
    assert {one.case for one in found.suspicious} == {f"marker-{n:02d}" for n in range(0, 12, 2)}
    assert "outside the body" in found.suspicious[0].reason
    weights = [one.weight for one in found.suspicious]
    assert weights == sorted(weights, reverse=True)


def test_without_a_body_nothing_counts_as_outside(scans, tmp_path):
    cases = []
    for case in scans("marker"):
        image = nib.load(case.paths[0])
        noise = np.random.default_rng(len(cases)).normal(1, 0.05, image.shape)  # fills the field as tissue does
        path = tmp_path / case.paths[0].name
        nib.save(nib.Nifti1Image((noise + (np.asanyarray(image.dataobj) > 1.6)).astype(np.float32), image.affine), path)
        cases.append(replace(case, paths=(path,), masks={}))
    found = audit(explainer(planted.Bright(planted.MARKER)), cases, SETTINGS)
    assert found.verdict("outside the body").verdict == UNDECIDED
    assert "the body is not known" in found.verdict("outside the body").words
    assert found.verdict("at the field's border").verdict == UNDECIDED


def test_many_scans_of_few_patients_say_nothing_of_regions(scans):
    model, cases = explainer(planted.Bright(planted.MARKER)), scans("marker")
    assert audit(model, cases, SETTINGS).verdict("outside the body").verdict == FLAGGED
    few = [replace(case, patient=f"p{number % 4}") for number, case in enumerate(cases)]
    found = audit(model, few, SETTINGS).verdict("outside the body")
    assert found.verdict == UNDECIDED
    assert {answer: told["patients"] for answer, told in found.figures.items()} == {"class 0": 2, "class 1": 2}
    assert "tried in scans of too few patients to tell of" in found.words


def test_where_too_few_scans_or_maps_are_there_nothing_is_said_of_regions(scans, honest):
    few = audit(explainer(planted.Bright(planted.MARKER)), scans("marker")[:3], SETTINGS)
    for name in REGIONS:
        assert few.verdict(name).verdict == UNDECIDED
    assert few.verdict("outside the body").words.endswith("of too few patients to tell of: class 0 (0), class 1 (2)")
    found, _ = honest
    assert found.verdict("outside the body").verdict == "not found"
    assert "in 0 of 6 scans" in found.verdict("outside the body").words  # the others' maps have no place
    assert "class 0 (0)" in found.verdict("outside the body").words


def test_a_model_of_random_weights_is_told_to_answer_alike(scans):
    found = audit(explainer(planted.small_net(1)), scans("lesion"), SETTINGS)
    assert found.verdicts[0].verdict == "answers all scans alike"
    assert found.verdict("trust: gradient-x-input").verdict == UNTRUSTED
    assert [one.name for one in found.verdicts if one.verdict == FLAGGED] == []


def test_audit_json_holds_every_verdict_with_its_rule_and_thresholds(honest):
    found, folder = honest
    content = json.loads((folder / "audit.json").read_text())
    assert content["version"] == run.VERSION
    assert all(set(one) == {"name", "verdict", "rule", "words", "figures", "part"} for one in content["verdicts"])
    parts = [part["id"] for part in content["parts"]]
    assert {one["part"] for one in content["verdicts"]} == set(parts)
    assert all(set(part["headings"]) == {"CLAIM", "TRIPOD+AI", "FUTURE-AI"} for part in content["parts"])
    rule = next(one["rule"] for one in content["verdicts"] if one["name"] == "trust: gradient-x-input")
    assert "10 mm ball" in rule
    assert "9 balls elsewhere" in rule
    assert content["settings"]["controls"] == 9
    area = content["metrics"]["gradient-x-input"]["delta AUPC of deletion, displaced"]
    assert set(area) >= {"value", "low", "high", "n", "undefined"}
    assert (area["n"], area["undefined"]) == (1, 0)  # of the one that was checked
    assert content["answers"] == {"class 1": 6, "class 0": 6}
    with (folder / "audit.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    by_case = {record["case"]: record for record in found.records}
    for row in rows:
        trial = by_case[row["case"]]["methods"]["gradient-x-input"].get("trial")
        assert float(row["peak_x_mm"]) == trial["mm"][0] if trial else row["undefined"]


def test_mean_maps_of_each_answer_are_written_where_scans_share_a_grid(honest, scans):
    found, folder = honest
    told = found.about["cohort"]["groups"]["the model says"]["class 1"]
    assert told["scans"] == 6
    mean, variance, number = (np.asanyarray(nib.load(folder / file).dataobj) for file in told["files"])
    net = explainer(planted.Bright())
    maps = [
        subject_of(net, case).maps({"gxi": GradientTimesInput()})["gxi"]
        for case in scans("lesion")
        if case.label == "1"
    ]
    assert np.allclose(mean, np.mean(maps, axis=0), atol=1e-5)
    assert np.allclose(variance, np.var(maps, axis=0, ddof=1), atol=1e-4)
    assert (number == 6).all()


def test_an_interrupted_audit_is_taken_up(honest, scans, monkeypatch):
    found, folder = honest
    asked = []
    real = run.subject_of
    monkeypatch.setattr(
        run, "subject_of", lambda explainer, case, **how: asked.append(case.id) or real(explainer, case)
    )
    cases = scans("lesion")
    again = audit(explainer(planted.Bright()), cases, SETTINGS, folder)
    assert asked == []
    assert json.dumps(again.metrics) == json.dumps(found.metrics)
    (folder / cases[3].id / "audit.json").write_text("{ half")
    audit(explainer(planted.Bright()), cases, SETTINGS, folder)
    assert asked == [cases[3].id]
    # Thresholds of verdicts are read anew; what figures depend on makes them anew.
    strict = audit(explainer(planted.Bright()), cases, SETTINGS.model_copy(update={"min_effect": 50}), folder)
    assert strict.verdict("trust: gradient-x-input").verdict == UNTRUSTED
    assert len(asked) == 1
    audit(explainer(planted.Bright()), cases[:1], SETTINGS.model_copy(update={"radius_mm": 12}), folder)
    assert len(asked) == 2


def test_a_case_is_examined_anew_where_other_answers_have_maps_with_trusted_peaks(scans, tmp_path, monkeypatch):
    cases, settings = scans("line")[:1], SETTINGS.model_copy(update={"candidates": True, "checked": 0})
    chosen = run._Asked._chosen
    found = []
    for by_peak in ({}, *[{"gradient-x-input": ("class 1",)}] * 2):

        def by(self, by_peak=by_peak):
            choice, *others = chosen(self)
            monkeypatch.setattr(type(choice), "by_peak", by_peak)
            return choice, *others

        monkeypatch.setattr(run._Asked, "_chosen", by)
        found.append(audit(explainer(planted.Plane()), cases, settings, tmp_path).records[0]["methods"])
    assert ["highest" in one["gradient-x-input"] for one in found] == [True, False, False]


def test_another_model_of_the_same_weights_is_audited_anew(scans, tmp_path):
    cases, settings = scans("lesion")[:4], SETTINGS.model_copy(update={"checked": 0})
    net = planted.small_net(1)
    audit(explainer(net), cases, settings, tmp_path)
    other = planted.small_net(1)
    other[2] = torch.nn.LeakyReLU(0.5)
    kept, new = (
        audit(explainer(model), cases, settings, folder) for model, folder in ((other, tmp_path), (other, None))
    )
    assert [one["score"] for one in kept.records] == [one["score"] for one in new.records]


def test_scans_that_cannot_be_read_are_told(scans, tmp_path):
    cases = scans("lesion")[:5]
    broken = replace(cases[0], id="broken", paths=(tmp_path / "none.nii.gz",))
    found = audit(explainer(planted.Bright()), [*cases, broken], SETTINGS)
    assert list(found.about["skipped"]) == ["broken"]
    assert len(found.records) == 5


def test_groups_that_differ_are_told_and_others_are_not():
    random = np.random.default_rng(3)
    records = [
        {"case": f"c{at}", "answer": "class 1", "methods": {"map": {"trial": {"effect": 10 * (at % 2) + noise}}}}
        for at, noise in enumerate(random.normal(0, 1, 24))
    ]
    names = [record["case"] for record in records]
    evidence = Evidence(records, "map", SETTINGS, dict.fromkeys(names, 5.0), {})
    groups = {
        "site": {name: "ab"[at % 2] for at, name in enumerate(names)},
        "sex": {name: "fm"[at // 2 % 2] for at, name in enumerate(names)},
        "scanner": dict.fromkeys(names, "only one"),
    }
    told = group_differences(evidence, groups)
    assert told.verdict == "differ"
    rows = {(row["group"], row["value"]): row for row in told.figures["differences"]}
    assert set(rows) == {("site", "a"), ("site", "b"), ("sex", "f"), ("sex", "m")}
    assert rows["site", "b"]["difference"] == pytest.approx(2, abs=0.3)  # 10 of a spread of 5
    assert "site b" in told.words
    assert "sex" not in told.words
    assert all(row["adjusted"] >= row["p_value"] for row in rows.values())
    assert group_differences(evidence, {}).verdict == UNDECIDED


def test_groups_and_masks_of_few_patients_are_not_judged():
    hit = {"mask": {"effect": 5.0}}
    found = {"trial": {"effect": 5.0, "control_largest": 0.1}, "masks": {"mask": {"pointing game": {"value": 1.0}}}}
    records = [
        {"case": f"c{at}", "answer": "class 1", "log_odds": True, "masks": hit, "methods": {"map": found}}
        for at in range(24)
    ]
    names = [record["case"] for record in records]
    groups = {"site": {name: "ab"[at % 2] for at, name in enumerate(names)}}

    def of(number):
        patients = {name: f"p{at % number}" for at, name in enumerate(names)}
        evidence = Evidence(records, "map", SETTINGS, dict.fromkeys(names, 5.0), patients)
        return of_masks(evidence)[0], group_differences(evidence, groups)

    few, many = of(2), of(12)
    assert [one.verdict for one in many] == [ON, "not found"]
    assert [one.verdict for one in few] == [UNDECIDED, UNDECIDED]
    assert f"in 24 of 24 scans, of 2 patients, and these are fewer than {SETTINGS.min_scans}" in few[0].words


def test_patients_with_several_scans_count_once(scans):
    cases = [replace(case, patient=f"p{at // 6}") for at, case in enumerate(scans("lesion"))]
    found = audit(explainer(planted.Bright()), cases, SETTINGS)
    assert found.metrics["gradient-x-input"]["effect at the peak, spreads"]["patients"] == 2


def test_sides_are_the_patients_own(scans):
    subject = subject_of(explainer(planted.Bright()), scans("lesion", 1)[0])
    assert side_of(subject, np.array([2, 2, 2])) == "left posterior inferior"
    assert side_of(subject, np.array([22, 12, 11])) == "right"
    assert side_of(subject, np.array([12, 12, 12])) == "central"


def test_the_command_prints_verdicts_first_and_writes_the_files(scans, tmp_path):
    cases = scans("marker")
    net = tmp_path / "net.py"
    net.write_text(
        f"import sys\nsys.path.insert(0, {str(planted.__file__.rsplit('/', 1)[0])!r})\nimport planted\n"
        "def build():\n    return planted.Bright(planted.MARKER)\n"
    )
    table = "case,scan,label\n" + "".join(f"{case.id},{case.paths[0]},{case.label}\n" for case in cases)
    (tmp_path / "cases.csv").write_text(table)
    config = tmp_path / "config.yaml"
    config.write_text(
        "model: {factory: 'net.py:build'}\nmethods: [gradient-x-input]\nscans: {table: cases.csv}\noutput: out\n"
        "audit: {candidates: false, min_scans: 4, checked: 0, controls: 9}\n"
    )
    result = CliRunner().invoke(app, ["audit", str(config), "--quiet"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("trust: gradient-x-input: can be trusted")
    assert "outside the body: flagged" in result.output
    assert (tmp_path / "out" / "audit.json").is_file()
    assert (tmp_path / "out" / "audit.csv").is_file()
    told = CliRunner().invoke(app, ["choose", str(config), "--scans", "8", "--quiet", "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["recommended"]


def test_a_misspelt_threshold_is_told(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model: {factory: 'a:b'}\naudit: {radius: 5}\n")
    result = CliRunner().invoke(app, ["audit", str(config)])
    assert result.exit_code == 2
    assert "audit.radius: unknown key" in result.output


def test_figures_that_were_not_asked_for_are_undefined():
    from volsal.audit.examine import figure, plain

    assert isinstance(figure(None), Undefined)
    assert figure(plain(Undefined("no room"))) == Undefined("no room")
    assert figure(plain(0.25)) == 0.25


@dataclass(frozen=True)
class Lowest(Method):
    """A map with its peak where it has nothing to say, in the air; whatever else is high in it counts."""

    id = "lowest"
    unit = "none"
    signed = True

    def ingredients(self):
        return (GradientTimesInput(),)

    def compose(self, volume, answers, context):
        values = answers[0].maps[0].clone()
        values[..., :2, :2, :2] = 2 * values.max()
        return replace(answers[0], maps=[values])


def test_what_is_highest_is_asked_where_no_peak_is_trusted(scans):
    settings = SETTINGS.model_copy(update={"candidates": True, "controls": 19})
    spread = audit(explainer(planted.Plane(), methods="gradient-x-input"), scans("line"), settings)
    best = spread.choice.recommended
    assert spread.choice.by_peak[best] == ()
    found = spread.verdict(f"trust: {best}")
    assert found.verdict == TRUSTED
    assert found.figures["class 1"]["way"] == "highest"
    assert found.figures["class 1"]["change"] >= settings.min_change_highest
    assert "all that is highest in the map" in found.words
    assert "about 0.02 of the field" in found.rule
    assert spread.metrics[best]["effect of the highest part, spreads"]["value"] > 0
    # Where a peak is, it costs nothing.
    cases = [*scans("lesion")[::2], *scans("line")[::2]]
    pointed = audit(explainer(planted.Either(), methods=["gradient-x-input", Lowest()]), cases, settings)
    by_peak = {name: pointed.choice.by_peak[name] for name in pointed.records[0]["methods"]}
    assert by_peak == {"gradient-x-input": ("class 1",), "lowest": ()}
    assert {record["answer"] for record in pointed.records} == {"class 0", "class 1"}
    for record in pointed.records:
        asked = {name for name, one in record["methods"].items() if "highest" in one}
        assert asked == {"lowest"} | ({"gradient-x-input"} if record["answer"] == "class 0" else set())
