"""The checks of a few scans: on maps whose likeness is known, by rules whose outcome can be told by hand."""

import json
import tracemalloc
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import planted
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from volsal import Explainer, GradientTimesInput
from volsal.attribution import ClassLogit, HiResCAM, InputGradient, OneOutput, PredictedClass
from volsal.attribution.targets.target import Named
from volsal.audit import checks
from volsal.audit.check_verdicts import FAILED, PASSED, judged, of_agreement, of_checks, remarks_of
from volsal.audit.checks import agreement_of, check, deepen, mean_over, output_of
from volsal.audit.choose import twin_of
from volsal.audit.metric import Undefined
from volsal.audit.run import audit
from volsal.audit.similarity import similarity
from volsal.audit.stability import Mirror
from volsal.audit.statistics import summarise
from volsal.audit.subject import subject_of
from volsal.audit.trust import UNDECIDED
from volsal.audit.verdicts import Evidence
from volsal.cli import app
from volsal.config import AuditSection
from volsal.grid import Grid

SETTINGS = AuditSection(candidates=False, min_scans=3, checked=2, controls=9, exchanged=0)
GXI = {"gxi": GradientTimesInput()}


explainer = partial(planted.explainer, methods=GXI)


@pytest.fixture
def lesions(scans):
    return scans("lesion", 6)


def two_maps(one, other):
    """A subject that knows nothing but two maps."""
    grid = Grid(one.shape, np.diag([2.0, 2, 2, 1]))
    return SimpleNamespace(maps=lambda _: {"a": one, "b": other}, grid=grid)


def test_maps_that_are_one_but_for_scale_agree_wholly_and_displaced_ones_do_not():
    random = np.random.default_rng(0)
    one = random.normal(size=(16, 16, 16)).astype(np.float32)
    (pair,) = agreement_of(two_maps(one, 3 * one), {})
    assert pair["methods"] == ["a", "b"]
    assert (pair["top_dice"], pair["spearman"], pair["peak_mm"]) == pytest.approx((1, 1, 0))
    assert pair["chance"]["top_dice"] < 0.1
    assert abs(pair["chance"]["spearman"]) < 0.1
    (pair,) = agreement_of(two_maps(one, -one), {})
    assert pair["spearman"] == pytest.approx(-1)
    assert pair["top_dice"] == 0


def test_agreement_of_many_large_maps_takes_the_memory_of_a_few(monkeypatch):
    random = np.random.default_rng(0)
    grid = Grid((40, 40, 40), np.eye(4))
    maps = {str(at): random.normal(size=grid.shape).astype(np.float32) for at in range(10)}
    subject = SimpleNamespace(maps=lambda _: maps, grid=grid)

    def measured():
        tracemalloc.start()
        found = agreement_of(subject, {})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, peak / 40**3

    whole, much = measured()
    monkeypatch.setattr(checks, "_BYTES", 2 * 50 * 40**3)
    few, little = measured()
    assert few == whole
    assert much > 800
    assert little < 350  # bytes for each voxel


def test_a_map_without_a_place_is_left_out_of_the_agreement():
    subject = two_maps(np.ones((4, 4, 4)), Undefined("the map is empty"))
    assert agreement_of(subject, {}) == []


def test_which_output_a_target_asks_about():
    output = torch.tensor([[0.1, 2.0, -1.0]])
    assert output_of(PredictedClass(), output) == 1
    assert output_of(ClassLogit(2), output) == 2
    assert output_of(Named("mine", OneOutput(0)), output) == 0
    assert output_of(lambda out: out[:, 0], output) is None
    assert output_of(OneOutput(0), torch.tensor([[0.5]])) is None


def test_what_is_found_of_a_map_is_what_comparing_it_by_hand_finds(lesions):
    net = planted.small_net(3)
    subject, other = (subject_of(explainer(net), case) for case in lesions[:2])
    found = {"gxi": {}}
    twin = twin_of(net, subject.volume)
    deepen(found, subject, GXI, twin, SETTINGS)
    check(found, subject, GXI, SETTINGS, other, planted.small_net(9))
    one = found["gxi"]

    def by_hand(values, within=None):
        return similarity(own, values["gxi"], subject.grid, within)

    own = subject.maps(GXI)["gxi"]
    assert one["sanity"]["ssim"] == pytest.approx(by_hand(subject.maps(GXI, model=twin), subject.body.mask).ssim)
    assert one["unrelated"]["spearman"] == pytest.approx(by_hand(other.maps(GXI)).spearman)
    assert one["random labels"]["ssim"] == pytest.approx(by_hand(subject.maps(GXI, model=planted.small_net(9))).ssim)
    asked = int(subject.output.argmax())
    against = replace(subject, target=ClassLogit(1 - asked)).maps(GXI)
    assert one["other outputs"][str(1 - asked)]["spearman"] == pytest.approx(by_hand(against).spearman)
    layers = [name for name, module in net.named_modules() if list(module.parameters(recurse=False))]
    assert [step["randomised"] for step in one["cascading"]] == [1, 3, 5, 7]
    assert [step["randomised"] for step in one["independent"]] == [1, 1, 1, 1]
    assert [step["layer"] for step in one["cascading"]] == [layers[-1], layers[-3], layers[-5], layers[-7]]
    assert one["cascading"][0]["of"] == len(layers) == 7
    assert set(one["stability"]["by"]) == {change.name for change in checks._nuisances(subject, SETTINGS)}
    assert one["stability"]["copies"] <= 4


def test_a_flip_is_asked_for_only_where_sides_do_not_matter(lesions):
    subject = subject_of(explainer(planted.small_net(3)), lesions[0])
    assert not any(isinstance(one, Mirror) for one in checks._nuisances(subject, SETTINGS))
    flips = checks._nuisances(subject, SETTINGS.model_copy(update={"mirror": True}))
    assert flips[-1] == Mirror(0)


class Sides(nn.Module):
    """Two outputs, each of which reads another half of the field."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * torch.stack([(x[:, 0, :12] ** 2).mean((1, 2, 3)), (x[:, 0, 12:] ** 2).mean((1, 2, 3))], 1)


class Twice(nn.Module):
    """Two outputs that read the same."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x):
        return (x**2).mean((1, 2, 3, 4))[:, None] * self.scale


@pytest.mark.parametrize(("net", "shared", "verdict"), [(Sides, 0, PASSED), (Twice, 1, FAILED)])
def test_a_map_that_is_the_same_for_every_output_is_told(lesions, net, shared, verdict):
    found = audit(explainer(net()), lesions[:3], SETTINGS)
    told = found.verdict("other outputs: gxi")
    assert told.figures["top_dice"]["value"] == pytest.approx(shared)
    assert told.verdict == verdict
    assert ("not class-discriminative" in told.words) == (verdict == FAILED)
    assert ("not class-discriminative" in found.verdict("trust: gxi").words) == (verdict == FAILED)


def test_nothing_is_shared_with_an_output_that_nothing_speaks_for(lesions):
    subject = subject_of(explainer(planted.Bright()), lesions[0])
    found = checks._random_logit(subject.maps(GXI)["gxi"], subject, GradientTimesInput())
    assert found["0"]["top_dice"] == 0  # class 0 has no evidence where the lesion is


def test_a_model_of_shuffled_labels_that_draws_the_same_map_fails(lesions, tmp_path):
    net = planted.Bright()
    torch.save(net.state_dict(), tmp_path / "same.pt")
    asked = Explainer(net, None, GXI, "class-1", folder=tmp_path)
    found = audit(asked, lesions, SETTINGS.model_copy(update={"random_labels": "same.pt", "checked": 3}))
    told = found.verdict("random labels: gxi")
    assert told.figures["random labels"]["value"] == pytest.approx(1)
    assert told.figures["excess"]["n"] == told.figures["random labels"]["n"]
    assert told.verdict == FAILED
    assert "shuffled labels" in found.verdict("trust: gxi").words
    assert "SSIM with random labels" in found.metrics["gxi"]
    assert not any(one.name.startswith("random labels") for one in audit(asked, lesions[:3], SETTINGS).verdicts)


def test_an_interval_says_what_can_be_told():
    for values, verdict in (([0.0, 0.1, 0.2], PASSED), ([0.6, 0.7, 0.8], FAILED), ([0.1, 0.9, 0.2, 0.8], UNDECIDED)):
        assert judged(summarise(values), 0.5) == verdict
        turned = {PASSED: FAILED, FAILED: PASSED}.get(verdict, verdict)
        assert judged(summarise(values), 0.5, "higher") == turned
    assert judged(summarise([0.1]), 0.5) == UNDECIDED  # one patient has no interval
    assert judged(summarise([Undefined("none")]), 0.5) == UNDECIDED


def a_record(number, last=0.2, usual=0.5, shared=0.1, area=1.0, dice=0.6):
    alike = dict.fromkeys(("ssim", "spearman", "spearman_abs", "top_dice", "peak_mm"), last)
    steps = [{"layer": "head", "randomised": 1, "of": 2, **alike}, {"layer": "body", "randomised": 2, "of": 2, **alike}]
    areas = {kind: {"displaced": area, "permuted": area} for kind in ("deletion", "insertion")}
    jitter = 0.01 * number
    one = {
        "cascading": steps, "independent": steps, "unrelated": alike | {"ssim": usual + jitter}, "areas": areas,
        "other outputs": {"1": alike | {"top_dice": shared + jitter}, "2": {"top_dice": {"undefined": "no place"}}},
    }  # fmt: skip
    pair = {"methods": ["map", "other"], **(alike | {"top_dice": dice + jitter}), "chance": alike | {"top_dice": 0.02}}
    return {"case": f"c{number}", "methods": {"map": one}, "agreement": [pair]}


def evidence_of(*records):
    settings = AuditSection.model_validate({})
    return Evidence(records, "map", settings, {}, {record["case"]: record["case"] for record in records})


def test_the_rules_of_the_checks():
    good = of_checks(evidence_of(*(a_record(n) for n in range(5))), ["map"])
    assert [(one.name, one.verdict) for one in good] == [
        ("random weights: map", PASSED),
        ("other outputs: map", PASSED),
        ("deletion and insertion: map", PASSED),
    ]
    assert good[0].figures["excess"]["value"] == pytest.approx(0.2 - 0.52)
    assert good[1].figures["top_dice"]["value"] == pytest.approx(0.12)  # what is undefined does not count as 0
    assert remarks_of(good) == {}
    bad = of_checks(evidence_of(*(a_record(n, last=0.9, shared=0.8, area=-1.0) for n in range(5))), ["map"])
    assert [one.verdict for one in bad] == [FAILED] * 3
    assert len(remarks_of(bad)["map"]) == 3
    assert of_checks(evidence_of({"case": "c", "methods": {"map": {}}}), ["map"]) == []


def test_the_rule_of_agreement():
    (agree,) = of_agreement(evidence_of(*(a_record(n) for n in range(5))))
    assert agree.verdict == "agree"
    assert agree.figures["beyond chance"]["value"] == pytest.approx(0.62 - 0.02)
    assert agree.figures["pairs"][0]["top_dice"]["value"] == pytest.approx(0.62)
    assert "agreement is no proof" in agree.words
    (apart,) = of_agreement(evidence_of(*(a_record(n, dice=0.03) for n in range(5))))
    assert apart.verdict == "do not agree"
    assert of_agreement(evidence_of({"case": "c", "methods": {}})) == []


def test_the_mean_of_figures_leaves_undefined_ones_out():
    assert mean_over([1.0, {"undefined": "no"}, 3.0]) == 2
    assert mean_over([{"undefined": "no"}]) == {"undefined": "no"}


# ---- models with further inputs, and several targets


class Aged(nn.Module):
    """Bright lesions, the more so at an age; and a second image whose brightness speaks against."""

    def __init__(self):
        super().__init__()
        self.image = planted.Bright()
        self.age = nn.Linear(1, 2)

    def forward(self, x, age, other=None):
        logits = self.image(x) + self.age(age)
        return logits if other is None else logits - other.mean((1, 2, 3, 4))[:, None]


@pytest.fixture
def aged():
    torch.manual_seed(0)
    return Aged().eval()


def test_a_scan_keeps_its_own_further_inputs_while_others_live(lesions, aged):
    asked = explainer(aged)
    cases = [replace(case, given={"age": (float(at),)}) for at, case in enumerate(lesions[:3:2])]
    subjects = [subject_of(asked, case) for case in cases]
    for at, subject in enumerate(subjects):
        by_hand = aged(subject.volume, torch.tensor([[float(at)]])).detach()
        assert subject.says(subject.volume) == pytest.approx(by_hand.flatten().tolist(), abs=1e-5)
        assert subject.score(subject.volume.repeat(3, 1, 1, 1, 1)) == pytest.approx(by_hand.max().expand(3))
    theirs = asked(cases[1].paths[0], given={"age": [1.0]}).maps[0]
    assert np.allclose(subjects[1].maps(GXI)["gxi"], theirs.values, atol=1e-6)
    twin = twin_of(subjects[0].model, subjects[0].volume)
    subjects[1].maps(GXI, model=twin)
    assert twin.held["age"].tolist() == [[1.0]]


def test_a_model_of_an_image_and_a_table_is_audited(lesions, aged):
    cases = [replace(case, given={"age": (0.1 * at,)}) for at, case in enumerate(lesions)]
    found = audit(explainer(aged), cases, SETTINGS)
    assert found.about["skipped"] == {}
    assert len(found.records) == 6
    assert found.verdict("random weights: gxi").figures["all layers random"]["n"] >= 1
    moved = [record["methods"]["gxi"]["trial"]["effect"] for record in found.records if record["answer"] == "class 1"]
    assert np.median(moved) > 1


def test_a_second_image_is_held_and_the_scan_is_not_moved_beside_it(lesions, aged):
    case = replace(lesions[0], given={"age": (1.0,), "other": lesions[1].paths[0]})
    subject = subject_of(explainer(aged), case)
    other = torch.from_numpy(np.asanyarray(nib.load(lesions[1].paths[0]).dataobj))[None, None]
    by_hand = aged(subject.volume, torch.tensor([[1.0]]), other)
    assert subject.says(subject.volume) == pytest.approx(by_hand.flatten().tolist(), abs=1e-4)
    assert not any(change.moves for change in checks._nuisances(subject, SETTINGS))


def test_each_target_is_audited_as_if_it_were_alone(lesions, tmp_path):
    settings = SETTINGS.model_copy(update={"checked": 0})
    found = audit(explainer(planted.Bright(), ["class-0", "class-1"]), lesions, settings, tmp_path)
    alone = audit(explainer(planted.Bright(), "class-1"), lesions, settings)
    (further,) = found.further
    assert (found.about["target"], further.about["target"]) == ("class-0", "class-1")
    assert [(one.name, one.verdict, one.words) for one in further.verdicts] == [
        (one.name, one.verdict, one.words) for one in alone.verdicts
    ]
    assert further.metrics == alone.metrics
    assert found.metrics != alone.metrics
    assert found.describe()["further"][0]["target"] == "class-1"
    assert (tmp_path / lesions[0].id / "audit-class-1.json").is_file()
    rows = (tmp_path / "audit.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 6
    assert sum(",class-1," in row for row in rows) == 6


def test_a_method_without_a_map_is_not_checked_and_does_not_stop_the_others(lesions):
    methods = {"gxi": GradientTimesInput(), "gradient": InputGradient(), "cam": HiResCAM("nowhere")}
    found = audit(explainer(planted.Bright(), methods=methods), lesions[:3], SETTINGS)
    names = {one.name for one in found.verdicts}
    assert {"random weights: gxi", "random weights: gradient", "trust: cam"} <= names
    assert "random weights: cam" not in names
    assert found.verdict("agreement of methods").figures["pairs"][0]["methods"] == ["gxi", "gradient"]


def test_the_command_audits_each_target_of_a_model_with_a_table(lesions, aged, tmp_path):
    folder = planted.__file__.rsplit("/", 1)[0]
    (tmp_path / "net.py").write_text(
        f"import sys\nsys.path[:0] = [{folder!r}, {folder + '/audit'!r}]\nimport test_checks\n"
        "def build():\n    return test_checks.Aged().eval()\n"
    )
    torch.save(aged.state_dict(), tmp_path / "trained.pt")
    rows = [f"{case.id},{case.paths[0]},{case.label},{at / 10}" for at, case in enumerate(lesions[:4])]
    (tmp_path / "cases.csv").write_text("\n".join(["case,scan,label,years", *rows]) + "\n")
    (tmp_path / "config.yaml").write_text(
        "model: {factory: 'net.py:build', weights: trained.pt}\nmethods: [gradient-x-input]\noutput: out\n"
        "targets: [class-0, class-1]\nscans: {table: cases.csv, columns: {given: {age: years}}}\n"
        "audit: {candidates: false, min_scans: 3, checked: 3, controls: 9, exchanged: 0, random_labels: trained.pt,\n"
        "  label_names: {organs: {1: liver}}}\n"
    )
    result = CliRunner().invoke(app, ["audit", str(tmp_path / "config.yaml"), "--quiet"])
    assert result.exit_code == 0, result.output
    assert "of the target class-0:" in result.output
    second = result.output.split("of the target class-1:")[1]
    assert "random labels: gradient-x-input: " in second
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert len(found["cases"]) == 4
    told = {one["name"]: one for one in found["further"][0]["verdicts"]}["random labels: gradient-x-input"]
    assert told["figures"]["random labels"]["value"] == pytest.approx(1)  # they are the same weights
