import pytest
import torch

from volsal import ClassLogit, ClassMargin, PredictedClass, SingleOutput
from volsal.attribution import TargetError, parse_target, target_id
from volsal.attribution.targets import score

LOGITS = torch.tensor([[1.0, 5.0, 2.0], [7.0, 0.0, 3.0]])


@pytest.mark.parametrize(
    ("target", "output", "expected"),
    [
        (ClassLogit(2), LOGITS, [2.0, 3.0]),
        (PredictedClass(), LOGITS, [5.0, 7.0]),
        (ClassMargin(2, 0), LOGITS, [1.0, -4.0]),
        (SingleOutput(), LOGITS[:, :1], [1.0, 7.0]),
        (SingleOutput(), LOGITS[:, 0], [1.0, 7.0]),
        (lambda output: output["scores"][:, 1], {"scores": LOGITS}, [5.0, 0.0]),
    ],
)
def test_takes_one_number_per_volume(target, output, expected):
    assert score(target, output, 2).tolist() == expected


@pytest.mark.parametrize(
    ("target", "output", "says"),
    [
        (ClassLogit(3), LOGITS, "class 3 asked for, but the model has 3 classes, 0 to 2"),
        (ClassLogit(-1), LOGITS, "class -1 asked for"),
        (ClassMargin(0, 9), LOGITS, "class 9 asked for"),
        (ClassLogit(0), LOGITS[..., None, None], r"returns a tensor of shape \(2, 3, 1, 1\)"),
        (ClassLogit(0), (LOGITS, LOGITS), "returns a tuple of 2"),
        (ClassLogit(0), {"out": LOGITS}, "returns a dict with keys 'out'"),
        (PredictedClass(), LOGITS[:, :1], "no predicted class; explain the output itself"),
        (SingleOutput(), LOGITS, "explains a model with one output"),
        (lambda output: output, LOGITS, r"must return one score per volume, \(2,\)"),
        (lambda output: 3.0, LOGITS, "it returned a float"),
        (ClassLogit(0), LOGITS * float("nan"), "NaN or infinity has no gradient"),
    ],
)
def test_refuses_in_words(target, output, says):
    with pytest.raises(TargetError, match=says):
        score(target, output, 2)


@pytest.mark.parametrize("target", [ClassLogit(1), PredictedClass(), ClassMargin(2, 0), SingleOutput()])
def test_an_id_reads_back_as_the_target(target):
    assert parse_target(target_id(target)) == target


def test_an_index_is_an_index_also_where_classes_are_named_by_digits():
    assert parse_target(1, ["1", "2", "3"]) == ClassLogit(1)
    with pytest.raises(TargetError, match="both an index and the name of class 0"):
        parse_target("1", ["1", "2", "3"])


def test_a_margin_over_itself_is_refused():
    with pytest.raises(TargetError, match="name two classes"):
        ClassMargin(1, 1)


def test_a_callable_is_named_after_its_function():
    def Left_Lung(output):
        return output[:, 0]

    assert target_id(Left_Lung) == "left-lung"


def test_a_misspelt_target_gets_the_nearest():
    with pytest.raises(TargetError, match="unknown target 'predictd'; did you mean 'predicted-class'"):
        parse_target("predictd")
    with pytest.raises(TargetError, match="did you mean 'lesion'"):
        parse_target("lesoin", classes=["healthy", "lesion"])
