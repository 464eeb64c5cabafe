from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from volsal import ClassLogit, ClassMargin, PredictedClass, SingleOutput
from volsal.attribution import (
    Context,
    CosineSimilarity,
    InputGradient,
    Named,
    OneOutput,
    TargetError,
    Within,
    parse_target,
    target_id,
)
from volsal.attribution.targets.target import distinct, fixed, placed, score

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
        (OneOutput(1), LOGITS, [5.0, 0.0]),
        (OneOutput(0), LOGITS[:, 0], [1.0, 7.0]),
        (Within("scores", ClassLogit(1)), {"scores": LOGITS}, [5.0, 0.0]),
        (Within("1", PredictedClass()), (None, LOGITS), [5.0, 7.0]),
        (Within("-1", ClassLogit(0)), [None, LOGITS], [1.0, 7.0]),
        (Within("head.main.0", ClassLogit(2)), {"head": SimpleNamespace(main=(LOGITS,))}, [2.0, 3.0]),
        (Within("logits", ClassLogit(2)), namedtuple("Output", "loss logits")(0, LOGITS), [2.0, 3.0]),
        (Within("3", ClassLogit(2)), {3: LOGITS}, [2.0, 3.0]),
        (Within("1", ClassLogit(2)), torch.stack([-LOGITS, LOGITS], 1), [2.0, 3.0]),
        (Named("mine", ClassLogit(2)), LOGITS, [2.0, 3.0]),
        (
            lambda output: torch.stack([one["scores"].max() for one in output]),
            [{"scores": z} for z in LOGITS],
            [5.0, 7],
        ),
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
        (SingleOutput(), LOGITS, "explains a model with one output.*as in output-0 or class-0"),
        (ClassLogit(0), {"out": LOGITS}, "choose a part of it, as in out/class-1"),
        (OneOutput(3), LOGITS, "output 3 asked for, but the model has 3, counted from 0"),
        (OneOutput(0), {"out": LOGITS}, "as in out/class-1"),
        (Within("outt", ClassLogit(0)), {"out": LOGITS}, "has no 'outt': there is no 'outt' in a dict with keys 'out'"),
        (Within("a.2", ClassLogit(0)), {"a": (LOGITS,)}, r"no 'a.2': there is no '2' in a tuple of 1: a tensor"),
        (Within("2", ClassLogit(0)), torch.zeros(2, 2, 3), r"there is no '2' in a tensor of shape \(2, 2, 3\)"),
        (Within("_private", ClassLogit(0)), SimpleNamespace(_private=LOGITS), "there is no '_private'"),
        (
            lambda output: output["boxes"][0],
            {"out": LOGITS},
            "fails on what the model returns, a dict .* KeyError: 'boxes'",
        ),
        (CosineSimilarity("reference.nii.gz"), LOGITS, "read for scans only; explain through volsal.Explainer"),
        (CosineSimilarity(torch.ones(4)), LOGITS, r"the reference has shape \(4,\), the model's embedding \(2, 3\)"),
        (CosineSimilarity(torch.zeros(3)), LOGITS, "an embedding is all 0"),
        (CosineSimilarity(torch.ones(3)), (LOGITS, 1), r"needs an embedding \(B, E\)"),
        (lambda output: output, LOGITS, r"must return one score per volume, \(2,\)"),
        (lambda output: 3.0, LOGITS, "it returned a float"),
        (ClassLogit(0), LOGITS * float("nan"), "NaN or infinity has no gradient"),
    ],
)
def test_refuses_in_words(target, output, says):
    with pytest.raises(TargetError, match=says):
        score(target, output, 2)


@pytest.mark.parametrize("target", [ClassLogit(1), PredictedClass(), ClassMargin(2, 0), SingleOutput(), OneOutput(2)])
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


def test_of_two_functions_the_second_gets_a_number_and_of_one_twice_none():
    first, second = (lambda output: output[:, 0]), (lambda output: output[:, 1])
    found = distinct([first, second, ClassLogit(1), Within("a", ClassLogit(1)), Within("A", ClassLogit(1))])
    assert [target_id(target) for target in found] == ["lambda", "lambda-2", "class-1", "a-class-1", "a-class-1-2"]
    assert [score(target, LOGITS, 2).tolist() for target in found[:3]] == [[1, 7], [5, 0], [5, 0]]
    with pytest.raises(TargetError, match="each once; got class-1 twice"):
        distinct([ClassLogit(1), parse_target("1")])


def test_a_prediction_inside_a_dict_stays_what_it_was_for_changed_copies():
    same = fixed(Named("x", Within("out", PredictedClass())), {"out": LOGITS})
    assert same({"out": torch.cat([-LOGITS, LOGITS.flip(1)])}).tolist() == [-5.0, -7.0, 5.0, 3.0]


def test_ids_fit_a_file_name_and_stay_apart():
    one, other = (target_id(parse_target(f"segment-1-in:{'very-' * 40}{end}.nii.gz")) for end in "ab")
    assert one != other
    assert max(len(one), len(other)) <= 96
    assert target_id(parse_target("similar:refs/Sub 01_T1w.nii.gz")) == "similar-sub-01-t1w"


def test_a_similarity_is_the_cosine_of_the_angle_and_has_its_gradient():
    embeddings = torch.tensor([[3.0, 4.0, 0.0], [0.0, 1.0, 0.0]])
    assert score(CosineSimilarity(torch.tensor([0.0, 2.0, 0.0])), embeddings, 2).tolist() == pytest.approx([0.8, 1.0])
    each = CosineSimilarity(torch.tensor([[3.0, 4.0, 0.0], [1.0, 0.0, 0.0]]))
    assert score(each, embeddings, 2).tolist() == pytest.approx([1.0, 0.0])
    assert score(each, embeddings.repeat(2, 1), 4).tolist() == pytest.approx([1.0, 0.0, 1.0, 0.0])

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 3, bias=False)).double()
    volume = torch.randn(1, 1, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reference = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (found,) = InputGradient().attribute(model, volume, [CosineSimilarity(reference)]).maps
    weight, e = model[1].weight.detach(), model(volume)[0].detach()
    by_e = reference / (reference.norm() * e.norm()) - (reference @ e) * e / (reference.norm() * e.norm() ** 3)
    torch.testing.assert_close(found.flatten(), by_e @ weight)
    (same,) = InputGradient().attribute(model, volume, [CosineSimilarity(e)]).maps
    assert float(same.abs().max()) < 1e-12


def test_a_references_embedding_is_the_models_own_for_its_file():
    asked = []

    def output_of(path):
        asked.append(path)
        return {"embedding": torch.tensor([[0.0, 2.0]])}

    target = parse_target("embedding/similar:refs/{case}.nii")
    ready = placed(target, Context(case="p7"), output_of)
    assert asked == ["refs/p7.nii"]
    assert float(ready({"embedding": torch.tensor([[3.0, 4.0]])})) == pytest.approx(0.8)
    assert target_id(ready) == target_id(target)
    assert target.files == ("refs/{case}.nii",)
