"""Targeted ablation against a linear model's closed form."""

import numpy as np
import pytest
import torch
from conftest import SHAPE
from nets import random_net
from torch import nn
from torch.testing import assert_close

from volsal import ClassLogit, RegionAblation
from volsal.attribution import Context, SettingError
from volsal.attribution.perturbation.perturbation import blurred
from volsal.grid import Grid


@pytest.fixture
def labels():
    labels = torch.zeros(SHAPE, dtype=torch.int16)
    labels[1:3, 2:5, 3:6], labels[5:, 6:, :4], labels[0, 0, 10] = 1, 7, -2
    return labels


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(SHAPE)), 3)).double()


def test_on_a_linear_model_a_region_is_worth_its_weights_times_what_was_there(labels, volume):
    net = linear()
    method = RegionAblation(labels=labels, fill="mean", names={1: "liver", 7: "spleen"}, controls=3)
    answer = method.attribute(net, volume, [ClassLogit(0), ClassLogit(2)])
    fill = volume.mean((2, 3, 4), keepdim=True)
    for index, ours, facts in zip((0, 2), answer.maps, answer.facts, strict=True):
        worth = (net[1].weight[index].detach().view(SHAPE) * (volume - fill))[:, 0]
        expected = torch.zeros_like(worth)
        for label in (-2, 1, 7):
            region = labels == label
            expected[:, region] = worth[:, region].sum(1, keepdim=True)
        assert_close(ours[:, 0], expected)
        told = {one["name"]: one for one in facts["regions"]}
        assert list(told) == ["-2", "liver", "spleen"]
        assert told["liver"]["drop"] == pytest.approx(worth[:, labels == 1].sum(1).tolist())
        assert [one["voxels"] for one in told.values()] == [1, 18, 24]
        assert told["spleen"]["changed"] == pytest.approx((volume - fill).abs()[:, 0, labels == 7].mean(1).tolist())


def test_controls_have_the_regions_shape_elsewhere_and_their_drops_are_the_facts(labels, volume):
    seen = []
    net = linear()
    handle = net.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    method = RegionAblation(labels=(labels == 7).int(), fill=100.0, controls=6, seed=3)
    answer = method.attribute(net, volume[:1], [ClassLogit(1)])
    handle.remove()
    original, removed, *controls = seen
    assert torch.equal(removed == 100, (labels == 7)[None, None])
    assert len(controls) == 6
    shape = torch.ones(2, 3, 4, dtype=torch.bool)
    for control in controls:
        changed = (control == 100)[0, 0]
        voxels = changed.nonzero()
        low, high = voxels.amin(0), voxels.amax(0) + 1
        assert torch.equal(changed[low[0] : high[0], low[1] : high[1], low[2] : high[2]], shape)
        assert int((changed & (labels == 7)).sum()) <= 24 / 4
    drops = [float((net(original) - net(control))[0, 1].detach()) for control in controls]
    (told,) = answer.facts[0]["regions"]
    assert told["control_mean"] == pytest.approx(np.mean(drops))
    assert told["control_sd"] == pytest.approx(np.std(drops, ddof=1))
    assert told["controls"] == 6
    assert told["control_changed"] == pytest.approx(
        np.mean([float((100 - original)[control == 100].abs().mean()) for control in controls])
    )
    assert len({tuple((control == 100).flatten().tolist()) for control in controls}) > 3


def test_no_control_lies_mostly_in_its_region(volume):
    labels = torch.zeros(SHAPE)
    labels[:3] = 1  # slices 0 to 2 of 7: places from slice 3 and 4 on share nothing, those before a third or more
    first = []
    net = linear()
    net.register_forward_pre_hook(lambda _, args: first.append(int((args[0][0, 0] == 9).any(2).any(1).nonzero().min())))
    method = RegionAblation(labels=labels, fill=9, controls=20)
    x = volume[:1].clone()
    x[:, :, 6, 0, 0] = 9  # so that the scan itself has a slice that holds the fill
    method(net, x, ClassLogit(0))
    assert first[1] == 0
    assert set(first[2:]) == {3, 4}
    assert len(first) == 22


def test_each_regions_blur_is_its_own(labels, volume):
    net = linear()
    result = RegionAblation(labels=labels, controls=1)(net, volume, ClassLogit(0))[:, 0]
    for label, voxels in ((-2, 1), (1, 18), (7, 24)):
        lost = volume - blurred(volume, [voxels ** (1 / 3) / 2] * 3)
        drop = (net[1].weight[0].detach().view(SHAPE) * lost[:, 0])[:, labels == label].sum(1)
        assert_close(result[:, labels == label], drop[:, None].expand(2, voxels))


def test_a_region_that_fills_the_volume_has_no_controls_and_says_so(volume):
    labels = torch.ones(SHAPE)
    answer = RegionAblation(labels=labels, names={1: "body"}, fill="zero").attribute(linear(), volume, [ClassLogit(0)])
    (told,) = answer.facts[0]["regions"]
    assert told["controls"] == 0
    assert not {"control_mean", "control_sd", "control_changed"} & told.keys()
    assert answer.notes == ("fewer control places than asked, for want of room: body",)


def test_a_named_label_that_is_not_there_is_told(labels, volume):
    method = RegionAblation(labels=labels, names={1: "liver", 3: "left kidney"}, controls=0)
    assert method.attribute(linear(), volume, [ClassLogit(0)]).notes == (
        "not in the label map, or too thin for the model's voxels: left kidney",
    )


def test_volumes_in_ml(labels, volume, oblique):
    answer = RegionAblation(labels=labels, controls=0).attribute(
        linear(), volume, [ClassLogit(0)], Context(grid=oblique)
    )
    assert [told["ml"] for told in answer.facts[0]["regions"]] == pytest.approx(
        [n * 0.8 * 0.9 * 2.5 / 1000 for n in (1, 18, 24)]
    )


def test_the_blur_follows_the_regions_size_and_the_voxels_shape(labels, volume):
    grid = Grid(SHAPE, np.diag([1.0, 1.0, 4.0, 1.0]))
    edge = (24 * 4) ** (1 / 3)  # mm
    own = RegionAblation(labels=labels == 7, controls=0)
    told = RegionAblation(labels=labels == 7, controls=0, sigma_mm=edge / 2)
    for method in (own, told):
        assert method.copies(volume.shape, Context(grid=grid)) == 1
    a, b = (m.attribute(random_net(), volume, [ClassLogit(0)], Context(grid=grid)).maps[0] for m in (own, told))
    assert_close(a, b)


def test_the_file_is_the_cases_own(labels, volume):
    asked = []

    def labels_of(path):
        asked.append(path)
        return labels

    context = Context(case="case-7", labels_of=labels_of)
    method = RegionAblation(labels="seg/{case}_labels.nii.gz", controls=0)
    answer = method.attribute(linear(), volume, [ClassLogit(0)], context)
    assert set(asked) == {"seg/case-7_labels.nii.gz"}
    assert_close(answer.maps[0], RegionAblation(labels=labels, controls=0)(linear(), volume, ClassLogit(0)))


def test_thousands_of_labels_are_refused(volume):
    labels = torch.arange(volume[0].numel()).reshape(SHAPE) + 1
    many = torch.cat([labels, labels + 10000])  # 1,386 labels
    x = torch.cat([volume, volume], 2)
    with pytest.raises(SettingError, match="the label map holds 1,386 labels other than 0 on the model's input"):
        RegionAblation(labels=many)(random_net(), x, ClassLogit(0))
