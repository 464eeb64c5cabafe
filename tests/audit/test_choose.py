"""Which map to believe: on networks whose evidence is known by construction, and on such as know nothing."""

import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import planted
import pytest
import torch
from scipy import ndimage

from volsal import GradCAM, GradientTimesInput, InputGradient
from volsal.attribution import Context, HiResCAM, Method
from volsal.attribution.settings import SettingError
from volsal.audit.choose import NONE, TOO_FEW, Scored, candidates_of, choose, rank, sampled, twin_of
from volsal.audit.examine import examine
from volsal.audit.metric import Undefined
from volsal.audit.probe import Probe, peak_of
from volsal.audit.subject import answer_of, subject_of
from volsal.audit.trust import HIGHEST, PEAK, TRUSTED, UNDECIDED, UNTRUSTED, binomial_tail, judge
from volsal.config import AuditSection
from volsal.grid import Grid
from volsal.scans.find import Case
from volsal.scans.labels import read_labels

SETTINGS = AuditSection(min_scans=4, checked=2)
# For those that are asked of many seeds.
FEW = AuditSection(min_scans=4, checked=2, controls=9)


@dataclass(frozen=True)
class Remade(Method):
    """Maps that are no method's: made of the scan and of gradient x input."""

    seed: int = 0

    id = "remade"
    unit = "none"
    signed = True

    def ingredients(self):
        return (GradientTimesInput(),)

    def compose(self, volume, answers, context):
        return replace(answers[0], maps=[self.remade(volume, answers[0].maps[0])])


class Shuffled(Remade):
    """A true map with its voxels in random order."""

    def remade(self, volume, values):
        random = torch.Generator().manual_seed(self.seed + int(1e3 * float(volume.abs().sum())) % 100_000)
        return values.flatten()[torch.randperm(values.numel(), generator=random)].reshape(values.shape)


class Intensity(Remade):
    """The scan itself."""

    def remade(self, volume, values):
        return volume.clone()


class InTheHead(Remade):
    """A smooth random field in the head, which has nothing to do with what the model looks at."""

    def remade(self, volume, values):
        # Other weights and other scans give another field; a harmlessly changed scan gives the same.
        random = np.random.default_rng((self.seed, 100 + round(float(values.abs().max().log()))))
        field = ndimage.gaussian_filter(random.normal(size=volume.shape[2:]), 3) + 1
        head = torch.nn.functional.avg_pool3d(volume, 3, 1, 1)[0, 0].numpy() > 0.5
        return torch.from_numpy(np.where(head, field, 0)).to(volume)[None, None]


@pytest.fixture
def lesions(scans):
    return scans("lesion")


explainer = partial(planted.explainer, methods="grad-cam")


def test_a_map_that_points_at_the_evidence_is_recommended(lesions):
    net = explainer(planted.Bright())
    found = choose(net, lesions, settings=SETTINGS, scans=10)
    best = found.candidates[0]
    assert best.method == found.recommended
    assert best.answers == ("class 1",)
    assert best.score == 1
    assert found.words[0] == f"recommended: {found.recommended}, for class 1"
    assert found.describe()["candidates"][0]["method"] == found.recommended
    # Without a lesion nothing is there to be taken away.
    assert {one.verdict for one in best.trust if one.answer == "class 0"} == {UNTRUSTED}
    for case in lesions[::2]:
        mask = read_labels(str(case.paths[0]).replace(".nii", "_mask.nii"), subject_of(net, case).grid)
        peak = peak_of(subject_of(net, case).maps({"best": found.method})["best"])
        assert mask[tuple(peak)] == 1


def test_shuffled_maps_are_not_trusted_whatever_the_seed(lesions):
    """Of 20 seeds; were each trusted with the 5 % that are allowed, more than 3 would be as rare as 1.6 %."""
    net = explainer(planted.Bright())
    wrong = 0
    for seed in range(20):
        found = choose(net, lesions, {"shuffled": Shuffled(seed)}, FEW, scans=8)
        wrong += found.recommended is not None
        assert found.recommended or found.words[0] == NONE, "they are judged, and not too few to be"
    assert wrong <= 3


@pytest.mark.slow
def test_no_map_of_random_weights_is_trusted_whatever_the_seed(lesions):
    """As above; the networks answer something, and their gradients are true of it."""
    wrong = 0
    methods = {"gxi": GradientTimesInput(), "gradient": InputGradient(), "cam": HiResCAM("3")}
    for seed in range(20):
        found = choose(explainer(planted.small_net(seed, seed % 2 == 0)), lesions, methods, FEW, scans=6)
        wrong += found.recommended is not None
    assert wrong <= 3


def test_a_map_that_random_weights_draw_too_is_vetoed(lesions):
    found = choose(explainer(planted.Bright()), lesions, {"intensity": Intensity()}, SETTINGS, scans=10)
    case = next(one for one in found.candidates[0].trust if one.answer == "class 1")
    assert case.moved == case.scans  # the lesion is what is brightest
    assert case.alike == 1
    assert case.verdict == UNTRUSTED
    assert "random weights draw nearly the same map" in case.words
    assert found.recommended is None


def test_candidates_are_the_given_methods_and_the_usual_ones_at_each_resolution():
    net, volume = planted.small_net(), torch.zeros(1, 1, 24, 24, 24)
    names = list(candidates_of(net, volume, {"mine": HiResCAM("5")}))
    assert names[0] == "mine"
    assert {"guided-backprop", "gradient-x-input", "input-gradient", "integrated-gradients", "deep-lift"} <= set(names)
    methods = candidates_of(net, volume, {"mine": HiResCAM("5")}).values()
    layers = [method.layer for method in methods if method.id == "hires-cam"]
    assert layers == ["5", "8", "2"]  # the given one, the default, and the finer one that was not given
    default = candidates_of(net, volume, {"grad-cam": GradCAM()})
    assert sum(m.id == "grad-cam" for m in default.values()) == 3  # not the default layer twice


def test_a_sample_is_spread_over_labels_and_leaves_out_faults():
    cases = [Case(f"c{i}", (), label="ab"[i >= 8]) for i in range(10)] + [Case("bad", (), fault="no file", label="b")]
    chosen = sampled(cases, 4)
    assert [case.label for case in chosen].count("b") >= 1
    assert len({case.id for case in chosen}) == 4
    assert sampled(cases, 100) == sampled(cases, 100)
    assert len(sampled(cases, 100)) == 10


def test_what_is_recommended_was_checked_also_where_the_best_few_fail(lesions, monkeypatch):
    module = sys.modules["volsal.audit.choose"]
    asked = []

    def deepen(found, subject, finalists, *rest):
        if list(finalists) not in asked:
            asked.append(list(finalists))
        for name in finalists:
            found[name]["sanity"] = {"top_dice": 1.0 if len(asked) == 1 else 0.1}

    monkeypatch.setattr(module, "deepen", deepen)
    monkeypatch.setattr(module, "_RUN_OFF", 0)
    found = choose(explainer(planted.Bright()), lesions, {name: GradientTimesInput() for name in "abcdef"}, FEW)
    assert asked == [["a", "b", "c", "d"], ["e", "f"]]
    assert found.recommended == "e"


def test_those_on_which_alone_an_answers_trust_rests_are_checked_too(monkeypatch):
    module = sys.modules["volsal.audit.choose"]
    trust = judge(records(10, 10), AuditSection())
    answers = {"a": "class 1", "b": "class 1", "c": "class 1", "d": "class 1", "e": "class 1", "f": "class 0"}
    ranked = [Scored(name, 1.0, 1.0, (replace(trust[0], method=name, answer=of),)) for name, of in answers.items()]
    trial = module._Trial(None, AuditSection(), None, {}, {}, candidates=dict.fromkeys(answers))
    asked = []
    monkeypatch.setattr(module._Trial, "_rank", lambda self: ranked)
    monkeypatch.setattr(
        module._Trial, "_check", lambda self, finalists: asked.append([*finalists]) or self.checked.update(finalists)
    )
    assert [one.method for one in trial.ranked()] == ["a", "b", "c", "d", "f", "e"]
    assert asked == [["a", "b", "c", "d"], ["f"]]


def test_what_is_recommended_was_checked_though_the_minutes_are_over(lesions, monkeypatch):
    module = sys.modules["volsal.audit.choose"]
    monkeypatch.setattr(module._Trial, "is_over", lambda self, share=1.0: share == 1.0)
    found = choose(explainer(planted.Bright()), lesions, {"gxi": GradientTimesInput()}, SETTINGS, scans=10)
    assert found.recommended == "gxi"
    assert ["sanity" in one["methods"]["gxi"] for one in found.records].count(True) >= 1
    found = choose(explainer(planted.Bright()), lesions, {"intensity": Intensity()}, SETTINGS, scans=10)
    assert found.recommended is None
    assert any("random weights draw nearly the same map" in one.words for one in found.candidates[0].trust)


def test_a_map_whose_peak_has_no_other_places_beside_it_is_checked_all_the_same(scans):
    settings = SETTINGS.model_copy(update={"radius_mm": 60.0})  # of a field of 144 mm
    found = choose(explainer(planted.Plane()), scans("line"), {"gxi": GradientTimesInput()}, settings, scans=12)
    assert found.candidates[0].answers == ("class 1",)
    mine = [one["methods"]["gxi"] for one in found.records if one["answer"] == "class 1"]
    assert all("undefined" in one["trial"] and "effect" in one["highest"] for one in mine)
    assert sum("sanity" in one for one in mine) >= 1
    subject = subject_of(explainer(planted.Plane()), scans("line")[0])
    record = examine(subject, {"gxi": GradientTimesInput()}, settings)
    assert "suspects" not in record["methods"]["gxi"], "no region was tried, and none is clear"
    with pytest.raises(SettingError, match="no candidate"):
        choose(explainer(planted.Plane()), scans("line"), {}, settings)


def test_a_budget_of_no_time_still_uses_a_scan(lesions):
    found = choose(explainer(planted.Bright()), lesions, {"gxi": GradientTimesInput()}, SETTINGS, minutes=1e-9)
    assert found.scans == 1
    assert found.candidates[0].trust[0].verdict == UNDECIDED
    assert found.words[0] == TOO_FEW


def test_scans_that_cannot_be_read_are_told_and_none_at_all_is_an_error(lesions, tmp_path):
    missing = Case("gone", (tmp_path / "gone.nii.gz",))
    found = choose(explainer(planted.Bright()), [missing, *lesions[:2]], {"gxi": GradientTimesInput()}, SETTINGS)
    assert list(found.skipped) == ["gone"]
    assert found.scans == 2
    with pytest.raises(SettingError, match="none of 1 scans"):
        choose(explainer(planted.Bright()), [missing], settings=SETTINGS)


def test_a_ball_at_the_lesion_moves_the_score_and_elsewhere_it_does_not(lesions):
    subject = subject_of(explainer(planted.Bright()), lesions[0])
    assert subject.answer == "class 1"
    assert subject.body.sure
    peak = peak_of(subject.volume[0, 0].numpy())
    probe = Probe(subject, 10.0, 19)
    trial = probe.at(peak)
    assert trial.p_value == 1 / 20
    assert trial.effect > 1
    assert np.median(np.abs(trial.controls)) < 0.1
    calls = probe.scorer.calls
    assert probe.at(peak).effect == trial.effect
    assert probe.scorer.calls == calls  # known already
    assert isinstance(peak_of(-np.ones((3, 3, 3))), Undefined)


def test_probes_agree_with_taking_the_ball_out_by_hand(lesions):
    from volsal.audit.faithfulness import removed

    subject = subject_of(explainer(planted.Bright()), lesions[0])
    voxel = np.array([10, 12, 9])
    index = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"), -1)
    ball = torch.from_numpy((np.linalg.norm(6.0 * (index - voxel), axis=-1) <= 10)[None, None])
    changed = torch.where(ball, removed(subject.volume, "blur", subject.grid, 12.0), subject.volume)
    by_hand = float(subject.score(subject.volume)[0] - subject.score(changed)[0])
    assert Probe(subject, 10.0, 9).effects(voxel[None])[0] == pytest.approx(by_hand, abs=1e-5)


def test_a_method_that_does_not_cover_the_model_does_not_stop_the_others(lesions):
    subject = subject_of(explainer(planted.Bright()), lesions[0])
    found = subject.maps({"gxi": GradientTimesInput(), "cam": HiResCAM("nowhere")})
    assert isinstance(found["cam"], Undefined)
    assert "nowhere" in found["cam"].reason
    assert found["gxi"].shape == (24, 24, 24)


def test_evidence_that_no_ball_holds_is_found_by_all_that_is_highest(scans):
    lines, net = scans("line"), explainer(planted.Plane())
    found = choose(net, lines, settings=SETTINGS, scans=12)
    best = found.candidates[0]
    assert best.method == found.recommended
    (case,) = (one for one in best.trust if one.answer == "class 1")
    assert (case.way, case.verdict, case.moved, case.scans) == (HIGHEST, TRUSTED, 6, 6)
    assert "without all that is highest in the map, about 0.02 of the field, the score moves far more" in case.words
    for case in lines[::2]:
        peak = peak_of(subject_of(net, case).maps({"best": found.method})["best"])
        assert peak[2] == 9
    without = choose(net, lines, settings=SETTINGS.model_copy(update={"highest": 0.0}), scans=12)
    assert without.recommended is None
    assert not any_highest(without)


class LesionsAlone(Remade):
    """A true map where a lesion is, and a random one of other scans."""

    def remade(self, volume, values):
        return values if volume.max() > 2.5 and values.max() > 5 else Shuffled.remade(self, volume, values)


def test_a_map_that_is_right_for_one_answer_alone_does_not_pass_for_one_that_is_right_for_both(scans, monkeypatch):
    net = explainer(planted.Either())
    cases = [*scans("lesion")[::2], *(replace(case, label="0") for case in scans("line")[::2])]
    methods = {"lesions": LesionsAlone(), "both": GradientTimesInput(), "none": Shuffled()}
    found = choose(net, cases, methods, SETTINGS, scans=len(cases))
    assert [one.method for one in found.candidates] == ["both", "lesions", "none"]
    both, lesions, none = found.candidates
    assert [(one.answer, one.way) for one in both.trust] == [("class 0", HIGHEST), ("class 1", PEAK)]
    assert (both.answers, lesions.answers, none.answers) == (("class 0", "class 1"), ("class 1",), ())
    assert (both.score, lesions.score) == (1, 0.5)
    assert found.by_peak == {"both": ("class 1",), "lesions": ("class 1",), "none": ()}
    assert found.describe()["candidates"][0]["trusted for"] == {"class 0": "its highest part", "class 1": "its peak"}
    for one in found.records:  # of the scans that no peak speaks of, what was found true of others
        asked = [name for name, of in one["methods"].items() if "highest" in of]
        assert asked == (["lesions", "both"] if one["answer"] == "class 0" else [])
    # The run-off goes on in the same way: its scans count for both answers.
    module = sys.modules["volsal.audit.choose"]
    ranks = []
    monkeypatch.setattr(module, "rank", lambda *given: ranks.append(given[3]) or rank(*given))
    found = choose(net, cases, methods, SETTINGS, scans=len(cases) - 4)
    assert [one.score for one in found.candidates[:2]] == [1, 0.5]
    *_, further = ranks
    assert len(further) == 4
    assert all(set(one["methods"]["both"]) == {HIGHEST if one["answer"] == "class 0" else PEAK} for one in further)
    assert all(one["methods"]["both"].popitem()[1]["effect"] > 1 for one in further)


def any_highest(choice):
    return any("highest" in one for record in choice.records for one in record["methods"].values())


class Part(torch.nn.Module):
    """What `Plane` says, but for the second output alone, or as faintly as a model that has learned nothing."""

    def __init__(self, columns=slice(None), times=1.0):
        super().__init__()
        self.plane, self.columns, self.times = planted.Plane(), columns, times

    def forward(self, x):
        return self.times * self.plane(x)[:, self.columns]


def test_nothing_is_taken_out_at_once_where_nothing_could_come_of_it(scans, monkeypatch):
    lines, method = scans("line"), {"gxi": GradientTimesInput()}
    assert any_highest(choose(explainer(Part()), lines, method, FEW))
    read = []
    monkeypatch.setattr(
        sys.modules["volsal.audit.choose"], "subject_of", lambda *given: read.append(given) or subject_of(*given)
    )
    alike, no_log_odds = explainer(Part(times=1e-3)), explainer(Part(slice(1, 2)), "regression")
    for asked in (alike, no_log_odds):
        read.clear()
        found = choose(asked, lines, method, FEW)
        assert not any_highest(found)
        assert found.recommended is None
        assert len(read) == len(lines)
    record = examine(subject_of(no_log_odds, lines[0]), method, FEW, regions=False, highest=["gxi"])
    assert "highest" not in record["methods"]["gxi"]


@pytest.mark.parametrize(("share", "number"), [(0.01, 138), (0.02, 200)])  # no more than 200 are above 0
def test_what_is_highest_is_taken_out_by_hand_too(scans, share, number):
    from volsal.audit.faithfulness import removed

    subject = subject_of(explainer(planted.Level()), scans("line")[0])  # to which every voxel counts
    values = np.random.default_rng(0).permutation(24**3).reshape(24, 24, 24) - 24.0**3 + 201
    chosen = values > 200 - number
    assert chosen.sum() == number
    changed = subject.volume.clone()
    changed[0, 0][chosen] = removed(subject.volume, "blur", subject.grid, 12.0)[0, 0][chosen]
    by_hand = float(subject.score(subject.volume)[0] - subject.score(changed)[0])
    trial = Probe(subject, 10.0, 9).of_highest(values, share)
    assert trial.effect == pytest.approx(by_hand, rel=1e-4)
    assert tuple(trial.voxel) == np.unravel_index(values.argmax(), values.shape)
    assert len(trial.controls) == 9
    assert np.array_equal(Probe(subject, 10.0, 9).of_highest(values, share).controls, trial.controls)


def test_a_map_that_is_equally_high_everywhere_or_has_no_room_elsewhere_has_no_highest_part(scans):
    probe = Probe(subject_of(explainer(planted.Plane()), scans("line")[0]), 10.0, 9)
    assert isinstance(probe.of_highest(-np.ones((24, 24, 24)), 0.02), Undefined)
    assert "equally high" in probe.of_highest(np.ones((24, 24, 24)), 0.02).reason
    body = np.where(probe.subject.body.mask, np.random.default_rng(0).random((24, 24, 24)), 0)
    assert "no room" in probe.of_highest(body, probe.subject.body.mask.mean() * 0.9).reason


def test_what_is_highest_elsewhere_lies_as_much_in_the_body_and_leaves_its_place(scans, monkeypatch):
    subject = subject_of(explainer(planted.Plane()), scans("line")[0])
    body = subject.body.mask
    values = np.random.default_rng(0).random((24, 24, 24)) + body
    parts, depth = Probe(subject, 10.0, 9)._parts, ndimage.distance_transform_edt(body)
    assert np.array_equal(sum(part.astype(int) for part in parts), np.ones(body.shape))
    assert np.array_equal(parts[0], ~body)
    for outer, inner in pairwise(parts):
        assert depth[outer].max() <= depth[inner].min() + 1
        assert depth[outer].mean() + 0.5 < depth[inner].mean()
    taken = []
    whole = Probe._without_all
    monkeypatch.setattr(Probe, "_without_all", lambda self, voxels: taken.append(voxels) or whole(self, voxels))
    trial = Probe(subject, 10.0, 9).of_highest(values, 0.02)
    own, *others = taken
    assert own.sum() == 276
    assert len(others) == len(trial.controls) == 9
    for other in others:
        for part in parts:
            assert (other & part).sum() == (own & part).sum()
        assert other.sum() == own.sum()
        assert (other & own).sum() <= 0.25 * own.sum()


def test_shells_of_the_body_are_as_deep_in_millimetres():
    mask = np.zeros((20, 16, 12), bool)
    mask[3:17, 3:13, 2:10] = True
    probe = object.__new__(Probe)
    grid = Grid(mask.shape, np.diag([1.0, 2.0, 6.0, 1.0]))
    probe.subject = SimpleNamespace(body=SimpleNamespace(mask=mask), grid=grid)
    surface = mask & ~ndimage.binary_erosion(mask)
    depth = ndimage.distance_transform_edt(~surface, sampling=grid.spacing)
    outside, *shells = probe._parts
    assert np.array_equal(outside, ~mask)
    for outer, inner in pairwise(shells):
        assert depth[outer].max() <= depth[inner].min() + 1e-3


def ball_of(*centre):
    """A map that is above 0 in a ball, and the higher the nearer to its middle."""
    index = np.stack(np.meshgrid(*[np.arange(24.0)] * 3, indexing="ij"), -1)
    return np.maximum(6 - np.linalg.norm(index - centre, axis=-1), 0)


def plates(heights):
    """A map of plates, as high as said in each plane."""
    found = np.zeros((24, 24, 24))
    for plane, height in heights.items():
        found[6:18, 6:18, plane] = height
    return found


HIGH = {
    "ball": ball_of(7.5, 11.5, 13.5),
    "ball in the middle": ball_of(11.5, 11.5, 11.5),  # elsewhere it reaches out of the body
    "plates": plates({10: 2, 13: 2, 20: 1, 21: 1}),  # one comes to lie where the other was
    "steps": plates({10: 2, 11: 2, 12: 1, 13: 1}),  # the higher ones come to lie where the lower ones were
}


@pytest.mark.parametrize("values", HIGH.values(), ids=list(HIGH))
def test_what_is_highest_elsewhere_is_as_much_apart_and_changes_the_input_as_much(scans, monkeypatch, values):
    probe = Probe(subject_of(explainer(planted.Plane()), scans("line")[0]), 10.0, 9)
    values = values * (1 + 1e-6 * np.random.default_rng(0).random(values.shape))  # no two are equal
    taken, drawn = [], []

    def by_change(self, sets):
        """Of a score that falls by as much as the input is changed: by the very same, then, without any of them."""
        return np.array([taken.append(one) or self._change_of(one) for one in sets])

    monkeypatch.setattr(Probe, "without", by_change)
    ways = Probe._ways
    monkeypatch.setattr(Probe, "_ways", lambda *given: (drawn.append(one[1]) or one for one in ways(*given)))
    trial = probe.of_highest(values, 0.02)
    own, *others = taken
    assert trial.controls == pytest.approx(trial.effect)
    off = sorted(abs(change - trial.effect) for change in drawn)
    assert sorted(abs(probe._change_of(one) - trial.effect) for one in others) == pytest.approx(off[:9])
    assert len(drawn) == 9 or off[-1] > off[8], "others would have changed it otherwise"
    nearly = values >= np.sort(values, axis=None)[-2 * own.sum()]
    for one in others:
        assert own.sum() / 3 <= one.sum() <= 1.5 * own.sum()
        assert (one & own).sum() <= 0.25 * one.sum()
        assert (one & nearly).sum() <= 0.5 * one.sum()


class Texture(torch.nn.Module):
    """Class 1 by how strong fine texture is anywhere: whatever is blurred in the head lowers its logit."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Conv3d(1, 1, 1)
        self.gain.weight.data.fill_(1.0)
        self.gain.bias.data.fill_(0.0)
        self.head = torch.nn.Linear(1, 2)
        self.head.weight.data = torch.tensor([[-400.0], [400.0]])
        self.head.bias.data.fill_(0.0)

    def forward(self, x):
        x = self.gain(x)
        return self.head((x - torch.nn.functional.avg_pool3d(x, 3, 1, 1)).abs().mean((2, 3, 4)))


def test_random_maps_in_the_head_are_not_trusted_where_all_of_the_head_counts(scans):
    """What is highest in them is compared with as much of the head: beside the air all of it moves the score."""
    net, cases = explainer(Texture()), scans("noise", 12)
    for seed in range(6):
        found = choose(net, cases, {"field": InTheHead(seed)}, FEW, scans=12)
        assert found.recommended is None, seed
        asked = [record["methods"]["field"].get("highest", {}) for record in found.records]
        assert sum("effect" in one for one in asked) >= 6, "it was asked and had an answer"


def record(case, answer, effect, largest, outputs=(0.0, 0.0), **further):
    trial = {"effect": effect, "control_largest": largest, "controls": 19, "beyond": effect}
    one = {"trial": trial, **further}
    said = {"case": case, "answer": answer, "outputs": list(outputs), "log_odds": True, "score": effect}
    return said | {"methods": {"map": one}}


def records(count, moved, effect=1.0):
    found = [record(f"c{i}", "class 1", effect if i < moved else 0.0, 0.1, (i % 2, -(i % 2))) for i in range(count)]
    return [one | {"score": 2.0 * (at % 2)} for at, one in enumerate(found)]  # spread by 1


@pytest.mark.parametrize(
    ("count", "moved", "effect", "verdict", "why"),
    [
        (10, 10, 1.0, TRUSTED, ""),
        (10, 5, 1.0, TRUSTED, ""),  # median 0.5, p = 252 / 20^5 or so
        (10, 4, 1.0, UNTRUSTED, "less than 50%"),
        (10, 10, 0.11, TRUSTED, ""),
        (10, 10, 0.04, UNTRUSTED, "less than 50%"),  # does not reach the controls
        (4, 4, 1.0, UNDECIDED, "fewer than 5"),
    ],
)
def test_the_rule_of_trust(count, moved, effect, verdict, why):
    (found,) = judge(records(count, moved, effect), AuditSection())
    assert found.verdict == verdict
    assert found.moved == (moved if effect > 0.1 else 0)
    assert why in found.words


def spread(count, moved, change=1.0, largest=0.1, **stability):
    """Records of a map whose peak does not move the score, and whose highest part does."""
    found = records(count, 0)
    for at, one in enumerate(found):
        trial = {"effect": change if at < moved else 0.0, "control_largest": largest, "controls": 19}
        one["methods"]["map"] |= {"highest": trial, "stability": stability}
    return found


@pytest.mark.parametrize(
    ("given", "way", "verdict", "why"),
    [
        ((10, 10), HIGHEST, TRUSTED, ""),
        ((10, 5), HIGHEST, TRUSTED, ""),
        ((10, 4), PEAK, UNTRUSTED, "less than 50%"),
        ((10, 10, 0.51), HIGHEST, TRUSTED, ""),
        ((10, 10, 0.51, 0.33), HIGHEST, TRUSTED, ""),
        ((10, 10, 0.51, 0.35), PEAK, UNTRUSTED, "Nor by all that is highest in it: that is less than 50%"),
        (
            (10, 10, 0.49),
            PEAK,
            UNTRUSTED,
            "Nor by all that is highest in it: the score moves by 0.49, less than 0.5 in",
        ),
        ((4, 4), PEAK, UNDECIDED, "fewer than 5"),
    ],
)
def test_the_rule_of_trust_in_what_is_highest(given, way, verdict, why):
    (found,) = judge(spread(*given), AuditSection())
    assert (found.way, found.verdict) == (way, verdict)
    assert why in found.words
    (without,) = judge(spread(*given), AuditSection(highest=0))
    assert (without.way, without.verdict == TRUSTED) == (PEAK, False)


def test_what_is_highest_is_asked_of_log_odds_only_and_where_the_peak_says_nothing():
    (found,) = judge([one | {"log_odds": False} for one in spread(10, 10, 100.0)], AuditSection())
    assert (found.way, found.verdict) == (PEAK, UNTRUSTED)
    both = spread(10, 10)
    for one in both:
        one["methods"]["map"]["trial"]["effect"] = 1.0
    (found,) = judge(both, AuditSection())
    assert (found.way, found.verdict) == (PEAK, TRUSTED)


def test_what_is_highest_must_stay_under_harmless_changes_where_the_peak_need_not():
    (found,) = judge(spread(10, 10, kept=0.0, overlap=0.5), AuditSection())
    assert (found.way, found.verdict, found.stable) == (HIGHEST, TRUSTED, 0.5)
    (found,) = judge(spread(10, 10, kept=1.0, overlap=0.49), AuditSection())
    assert found.verdict == UNTRUSTED


def test_what_is_highest_may_not_be_known_and_is_told_where_the_peak_has_no_place():
    some = spread(12, 12)
    for one in some[4:]:  # the minutes were over
        del one["methods"]["map"]["highest"]
    (found,) = judge(some, AuditSection())
    assert (found.way, found.verdict) == (PEAK, UNDECIDED)
    assert "Nor by all that is highest in it: it was asked in 4 scans with this answer, fewer than 5" in found.words
    nowhere = spread(10, 4)
    for one in nowhere:
        one["methods"]["map"]["trial"] = {"undefined": "the scan has no room for a ball elsewhere"}
    (found,) = judge(nowhere, AuditSection())
    assert (found.way, found.verdict, found.undefined) == (PEAK, UNTRUSTED, 10)
    assert "no place" in found.words
    assert "Nor by all that is highest in it: that is less than 50% of the scans" in found.words


def test_an_answer_with_a_trusted_peak_is_ranked_by_peaks_whatever_else_is_trusted_for_it():
    def both(names):
        found = records(10, 10)
        for one in found:
            trial = one["methods"].pop("map")["trial"]
            elsewhere = {"trial": {**trial, "effect": 0.0}, "highest": {**trial, "effect": 9.0}}
            one["methods"] = {name: {"trial": trial} if name == "peak" else elsewhere for name in names}
        return rank(found, AuditSection())

    for names in (["peak", "highest"], ["highest", "peak"]):
        ranked = both(names)
        assert [(one.method, one.answers, one.score) for one in ranked] == [
            ("peak", ("class 1",), 1.0),
            ("highest", ("class 1",), 0.0),
        ]


def test_scans_in_which_what_is_highest_was_not_asked_about_do_not_count_against_it():
    some = spread(12, 6)
    for one in some[6:]:
        del one["methods"]["map"]["highest"]
    (found,) = judge(some, AuditSection())
    assert (found.way, found.verdict, found.moved, found.scans, found.undefined) == (HIGHEST, TRUSTED, 6, 6, 0)
    for one in some[6:]:
        one["methods"]["map"]["highest"] = {"undefined": "what is highest has no room elsewhere"}
    (found,) = judge(some, AuditSection())
    assert (found.way, found.verdict, found.moved, found.scans, found.undefined) == (HIGHEST, TRUSTED, 6, 12, 6)


def test_both_ways_of_asking_count_as_tests():
    (one,) = judge(records(10, 10), AuditSection(highest=0))
    (two,) = judge(records(10, 10), AuditSection())
    assert (one.p_value, two.p_value) == pytest.approx((20.0**-10, 2 * 20.0**-10))


def test_several_scans_of_a_patient_are_no_more_patients():
    def of(number):
        return {f"c{i}": f"p{i % number}" for i in range(10)}

    (alone,), (six,) = (judge(records(10, 10), AuditSection(), patients=one) for one in (None, of(6)))
    assert (alone.verdict, six.verdict) == (TRUSTED, TRUSTED)
    assert (alone.p_value, six.p_value) == pytest.approx((2 * 20.0**-10, 2 * 20.0**-6))  # two ways of asking
    assert (alone.scans, six.scans) == (10, 10)
    (few,) = judge(records(10, 10), AuditSection(), patients=of(4))
    assert (few.verdict, few.why) == (UNDECIDED, ("there are 4 patients with this answer, fewer than 5",))
    # The first five, of as many patients, did not move the score: what a patient's further scans do is no further test.
    later = list(reversed(records(10, 5)))
    (found,) = judge(later, AuditSection(), patients=of(5))
    assert (found.patients, found.moved_patients, found.p_value) == (5, 0, pytest.approx(1))
    assert "in one scan of each patient it does so in 0 of 5, which is no rarity" in found.words
    # But a scan without a trial is none.
    for one in later[:5]:
        one["methods"]["map"] = {"undefined": "empty"}
    (found,) = judge(later, AuditSection(min_share=0.5), patients=of(5))
    assert (found.moved_patients, found.verdict) == (5, TRUSTED)


def test_the_choice_goes_by_patients_too(lesions):
    cases = [replace(case, patient=f"p{at % 3}") for at, case in enumerate(lesions)]
    found = choose(explainer(planted.Bright()), cases, {"gxi": GradientTimesInput()}, SETTINGS, scans=9)
    assert found.recommended is None
    assert {one.verdict for each in found.candidates for one in each.trust} == {UNDECIDED}
    assert not any_highest(found)  # nothing could come of it


def test_the_best_map_is_the_one_at_whose_peaks_the_score_moves_most_often():
    many = records(10, 10)
    for at, one in enumerate(many):
        trial = one["methods"].pop("map")["trial"]
        effects = {"often": 0.6, "strong": 1.0 if at < 8 else 0.2, "weak": 0.55}
        one["methods"] = {name: {"trial": {**trial, "effect": effect}} for name, effect in effects.items()}
    ranked = rank(many, AuditSection())
    assert [one.method for one in ranked] == ["often", "weak", "strong"]
    assert [one.score for one in ranked] == [1.0, 1.0, 0.8]
    assert ranked[0].strength == pytest.approx((8 * 0.6 + 2) / 10)


def test_further_scans_decide_between_the_best_and_not_about_trust():
    many = records(10, 10)
    for one in many:
        trial = one["methods"].pop("map")["trial"]
        effects = {"first": 1.0, "second": 0.9, "third": 0.45}
        one["methods"] = {name: {"trial": {**trial, "effect": effect}} for name, effect in effects.items()}
    further = [
        {
            **one,
            "case": f"d{at}",
            "methods": {"first": {"trial": {"effect": 0.1}}, "second": {"trial": {"effect": 1.0}}},
        }
        for at, one in enumerate(many)
    ]
    assert rank(many, AuditSection())[0].method == "first"
    ranked = rank(many, AuditSection(), None, further)
    assert [one.method for one in ranked] == ["second", "first", "third"]
    assert [one.score for one in ranked] == [1.0, 0.5, 0.0]  # the third was not asked again
    assert [one.trust for one in ranked if one.method == "first"] == [
        one.trust for one in rank(many, AuditSection()) if one.method == "first"
    ]


def test_a_run_off_takes_the_scans_that_are_left(lesions, monkeypatch):
    module, asked = sys.modules["volsal.audit.choose"], []
    monkeypatch.setattr(module, "subject_of", lambda explainer, case: asked.append(case) or subject_of(explainer, case))
    peaks = SETTINGS.model_copy(update={"highest": 0.0})
    found = choose(explainer(planted.Bright()), lesions, {"gxi": GradientTimesInput()}, peaks, scans=9)
    first, checked, left = asked[:9], asked[9:-3], asked[-3:]
    assert (first, checked) == (sampled(lesions, 9), first[: SETTINGS.checked])
    assert first + left == sampled(lesions, 12)
    assert found.scans == 9
    assert found.recommended == "gxi"
    assert len(found.records) == 9


def test_effects_are_told_in_spreads_of_the_score_and_small_ones_are_not_trusted():
    many = [record(f"c{i}", "class 1", 1.0, 0.1, (20 * (i % 2), -20 * (i % 2))) for i in range(10)]
    for at, one in enumerate(many):
        one["score"] = 20.0 * (at % 2)
    (found,) = judge(many, AuditSection())
    assert found.effect.estimate == pytest.approx(0.1)  # 1 of a spread of 10
    assert found.verdict == TRUSTED
    (strict,) = judge(many, AuditSection(min_effect=0.2))
    assert strict.verdict == UNTRUSTED
    assert "of its spread, less than 0.2" in strict.words


def test_a_model_that_answers_all_scans_alike_is_not_trusted():
    same = [record(f"c{i}", "class 1", 1.0, 0.1, (0.01 * (i % 2), 0.0)) for i in range(10)]
    (found,) = judge(same, AuditSection(min_effect=0))
    assert found.verdict == UNTRUSTED
    assert "nearly alike" in found.words


def test_outputs_that_are_no_log_odds_need_a_larger_effect():
    found = [one | {"log_odds": False, "outputs": [0.0]} for one in records(10, 10, 0.2)]
    (case,) = judge(found, AuditSection())
    assert case.verdict == UNTRUSTED
    assert "0.2 of its spread, less than 0.25" in case.words
    assert judge(records(10, 10, 0.2), AuditSection())[0].verdict == TRUSTED


def test_a_single_output_of_two_classes_is_their_log_odds():
    output = torch.tensor([[-0.3]])
    assert answer_of(output) == "the output"
    assert answer_of(output, ("no", "yes")) == "class 0 (no)"
    assert answer_of(-output, ("no", "yes")) == "class 1 (yes)"
    assert answer_of(torch.tensor([[1.0, 3.0, 2.0]])) == "class 1"
    assert answer_of([output]) == "the output"


def test_an_unstable_peak_is_a_veto():
    shaky = records(10, 10)
    for one in shaky:
        one["methods"]["map"]["stability"] = {"kept": 0.25, "copies": 4}
    (found,) = judge(shaky, AuditSection())
    assert found.verdict == UNTRUSTED
    assert "stays under 25% of harmless changes" in found.words


def test_the_binomial_tail_against_counting():
    from itertools import product

    chance = 0.3
    counted = sum(
        np.prod([chance if one else 1 - chance for one in draw]) for draw in product([0, 1], repeat=5) if sum(draw) >= 2
    )
    assert binomial_tail(2, 5, chance) == pytest.approx(counted)
    assert binomial_tail(0, 5, chance) == pytest.approx(1)


def test_the_twin_has_other_weights_and_the_model_its_own():
    net, volume = planted.small_net(3), torch.randn(1, 1, 24, 24, 24)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    twin = twin_of(net, volume)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not torch.allclose(twin(volume), net(volume))


def test_the_context_of_a_subject_places_maps_as_the_explainer_does(lesions):
    asked = explainer(planted.Bright())
    subject = subject_of(asked, lesions[0])
    assert isinstance(subject.context, Context)
    ours = subject.maps({"gxi": GradientTimesInput()})["gxi"]
    theirs = planted.explainer(planted.Bright())(lesions[0].paths[0]).maps[0]
    assert np.allclose(ours, theirs.values, atol=1e-6)
