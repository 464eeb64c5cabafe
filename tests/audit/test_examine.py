"""What a scan's record says of maps whose place is known."""

import numpy as np
import planted
import pytest

from volsal import Explainer, GradientTimesInput
from volsal.audit.anatomy import MARKS, THINGS
from volsal.audit.choose import twin_of
from volsal.audit.examine import RANDOM, REPORTED, Places, claims_of, examine
from volsal.audit.localization import localization
from volsal.audit.metric import Undefined
from volsal.audit.nulls import references
from volsal.audit.standards import PARTS, described
from volsal.audit.subject import subject_of
from volsal.config import AuditSection

GXI = {"gxi": GradientTimesInput()}
SETTINGS = AuditSection(controls=9, label_names={"organs": {1: "left half", 2: "right half"}})


@pytest.fixture
def subject(tmp_path):
    (case,) = planted.cases(tmp_path, "marker", 1, masks=True)
    return subject_of(Explainer(planted.Bright(planted.MARKER), None, GXI, "class-1"), case)


def test_a_record_tells_where_the_evidence_lies_beside_maps_that_know_nothing(subject):
    marker = np.zeros(subject.grid.shape, np.int32)
    marker[planted.MARKER] = 1
    organs = np.arange(24)[:, None, None] // 12 + np.ones(subject.grid.shape, np.int32)
    twin = twin_of(subject.model, subject.volume)
    record = examine(subject, GXI, SETTINGS, {"marker": marker, "organs": organs}, twin=twin)
    one = record["methods"]["gxi"]
    assert set(one["anatomy"]["organs"]) == {"left half", "right half"}
    values = subject.maps(GXI)["gxi"].clip(0)
    assert one["anatomy"]["organs"]["left half"]["evidence"] == pytest.approx(values[:12].sum() / values.sum())
    assert one["anatomy"]["organs"]["left half"]["volume"] == 0.5
    assert one["regions"][THINGS]["evidence"] > 0.9  # the marker is a thing in the air
    assert one["regions"][THINGS]["volume"] == pytest.approx(27 / 24**3, rel=0.2)
    assert one["regions"][MARKS]["volume"] == 0  # with noise on it
    assert THINGS in one["where"]
    by_hand = localization(subject.maps(GXI)["gxi"], marker == 1, subject.grid, REPORTED, tolerance_mm=6)
    for name in REPORTED:
        assert one["masks"]["marker"][name]["value"] == pytest.approx(by_hand[name])
        assert set(one["masks"]["marker"][name]) == {"value", *RANDOM}
    maps = references(subject.grid, subject.volume[0, 0].numpy())
    assert set(record["references"]) == set(maps) == {"centre blob", "intensity", "edges"}
    for name, values in maps.items():
        found = localization(values, marker == 1, subject.grid, ("AUPRC",))["AUPRC"]
        assert record["references"][name]["masks"]["marker"]["AUPRC"] == {"value": pytest.approx(found)}
    random = subject.maps(GXI, model=twin)["gxi"]
    if isinstance(random, Undefined):
        assert one["random weights"] == {"undefined": random.reason}
    else:
        found = localization(random, marker == 1, subject.grid, ("relevance mass",))["relevance mass"]
        assert one["random weights"]["masks"]["marker"]["relevance mass"]["value"] == pytest.approx(found)


def test_without_a_twin_no_map_of_random_weights_is_made(subject):
    record = examine(subject, GXI, SETTINGS)
    assert "random weights" not in record["methods"]["gxi"]
    assert record["methods"]["gxi"]["masks"] == {}


def test_a_map_without_a_place_claims_nothing(subject):
    assert claims_of(Undefined("no"), subject, Places({}, {}, {}), SETTINGS) == {"undefined": "no"}


def test_each_part_of_an_audit_has_its_headings():
    assert [part["id"] for part in described()] == ["trust", "place", "shortcuts", "groups"]
    assert all(list(part.headings) == ["CLAIM", "TRIPOD+AI", "FUTURE-AI"] for part in PARTS)
