import numpy as np
import pytest
import torch
from torch import nn

from volsal import ClassLogit
from volsal.attribution import (
    Component,
    ComponentAt,
    Context,
    GradCAM,
    HiResCAM,
    InputGradient,
    Labels,
    Mask,
    Position,
    Region,
    Segment,
    TargetError,
    Voxel,
    Within,
    parse_target,
    target_id,
)
from volsal.attribution.targets.segmentation import components
from volsal.attribution.targets.target import facts, fixed, placed, score
from volsal.grid import Grid

SIZE = (6, 7, 8)
NONE = torch.tensor([9.0, 0.0]).view(1, 2, 1, 1, 1)  # added to logits: class 1 wins nowhere


def logits(seed=0, classes=3, batch=2, size=SIZE):
    return torch.randn(batch, classes, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blobs():
    """Class 1 wins in a block of 12, one of 2 and a single voxel that touches the block by a corner; (1, 2, *SIZE)."""
    output = torch.zeros(1, 2, *SIZE)
    output[0, 0] = 0.5
    for block in (np.s_[0:2, 0:2, 0:3], np.s_[5, 5, 5:7], np.s_[2, 2, 3]):
        output[(0, 1, *block)] = 2.0
    return output


@pytest.mark.parametrize("size", [SIZE, (6, 7), (6,)])
def test_the_predicted_voxels_are_summed_as_counted_by_hand(size):
    output = logits(size=size)
    expected = [
        sum(float(one[1, at]) for at in range(one[0].numel()) if int(one[:, at].argmax()) == 1)
        for one in output.flatten(2)
    ]
    assert score(Segment(1), output, 2).tolist() == pytest.approx(expected)


def test_one_channel_is_the_foreground_above_0_and_overlapping_regions_each_count_alone():
    output = logits(classes=1)
    positive = [float(one[one > 0].sum()) for one in output]
    assert score(Segment(1), output, 2).tolist() == pytest.approx(positive)
    assert score(Region(0), output, 2).tolist() == pytest.approx(positive)
    three = logits()
    for index in range(3):
        expected = [float(one[index][one[index] > 0].sum()) for one in three]
        assert score(Region(index), three, 2).tolist() == pytest.approx(expected)


def test_components_are_counted_by_size_and_hang_together_by_corners():
    output = blobs()
    for where, voxels in [
        (Component(), 13), (Component(2), 2), (ComponentAt(Voxel((2, 2, 3))), 13), (ComponentAt(Voxel((5, 5, 6))), 2),
    ]:  # fmt: skip
        assert float(Segment(1, where)(output)) == 2.0 * voxels
        assert facts(Segment(1, where), output) == [{"voxels": voxels}]


def test_components_of_a_random_mask_agree_with_a_flood_fill():
    mask = torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(3)) < 0.12
    left = {tuple(at) for at in mask.nonzero().tolist()}
    sizes = []
    while left:
        group, edge = set(), [left.pop()]
        while edge:
            at = edge.pop()
            group.add(at)
            near = {tuple(np.add(at, step)) for step in np.ndindex(3, 3, 3) for step in [np.subtract(step, 1)]} & left
            left -= near
            edge += near
        sizes.append(len(group))
    found = components(mask)
    assert sorted(sizes, reverse=True) == [int((found == n).sum()) for n in range(1, int(found.max()) + 1)]
    assert len(sizes) > 3


@pytest.mark.parametrize("shape", [SIZE, (2, *SIZE), (2, 1, *SIZE)])
def test_a_given_mask_is_summed_over_whatever_is_predicted(shape):
    output = logits()
    mask = torch.zeros(shape)
    mask[..., 1:3, 2, 4:6] = 7
    expected = [float(one[2, 1:3, 2, 4:6].sum()) for one in output]
    assert score(Segment(2, Mask(mask)), output, 2).tolist() == pytest.approx(expected)


def test_a_voxel_is_its_own_logit_by_index_and_by_place():
    output = logits(batch=1)
    affine = np.array([[0, -2.0, 0, 40], [1.5, 0, 0, -10], [0, 0, 3.0, 5], [0, 0, 0, 1]])
    grid = Grid(SIZE, affine)
    at = (4, 1, 6)
    assert float(Segment(0, Voxel(at))(output)) == float(output[0, 0, 4, 1, 6])
    mm = grid.world(np.add(at, (0.4, -0.4, 0.3)))
    target = placed(Segment(0, Position(tuple(mm))), Context(grid=grid), lambda path: None)
    assert float(target(output)) == float(output[0, 0, 4, 1, 6])
    coarse = logits(batch=1, size=(3, 7, 4))  # an output of half the resolution: voxel (4, 1, 6) lies in cell (2, 1, 3)
    assert float(target(coarse)) == float(coarse[0, 0, 2, 1, 3])


def test_what_was_chosen_for_a_scan_stays_chosen_for_its_changed_copies():
    output = blobs().double()
    changed = torch.cat([output + 3 * logits(seed, classes=2, batch=1) for seed in (1, 2, 3)])
    for target in (
        Segment(1),
        Segment(1, Component(2)),
        Region(1),
        Within("0", Segment(1, ComponentAt(Voxel((0, 0, 0))))),
    ):
        own = (output,) if isinstance(target, Within) else output
        others = (changed,) if isinstance(target, Within) else changed
        same = fixed(target, own)
        inner = target.target if isinstance(target, Within) else target
        mask = inner.where.mask(inner, output)[0]
        assert same(others).tolist() == pytest.approx([float(one[1][mask].sum()) for one in changed])
        assert target_id(same) == target_id(target)


def test_a_batch_keeps_a_mask_for_each_volume_copy_after_copy():
    output = logits(batch=2)
    same = fixed(Segment(1), output)
    copies = torch.cat([output, 2 * output, output.flip(1)])
    masks = output.argmax(1) == 1
    expected = [float(copies[n, 1][masks[n % 2]].sum()) for n in range(6)]
    assert same(copies).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "target", [Segment(1), Region(2), Segment(0, Voxel((4, 1, 6))), Segment(2, Mask(torch.ones(SIZE)))]
)
def test_parts_of_an_output_add_up_to_the_whole(target):
    output = logits(batch=1)
    tiles = [
        (slice(i, min(i + 4, 6)), slice(j, min(j + 5, 7)), slice(0, 8)) for i in range(0, 6, 4) for j in range(0, 7, 5)
    ]
    shares = [target.within(tile)(output[(..., *tile)]) for tile in tiles]
    torch.testing.assert_close(sum(shares), target(output))


def test_a_component_is_not_told_by_a_part():
    assert Segment(1, Component()).within is None
    assert Segment(1, ComponentAt(Voxel((0, 0, 0)))).within is None


@pytest.mark.parametrize(
    ("target", "output", "says"),
    [
        (Segment(1), blobs() + NONE,
         "nothing is predicted as class 1: of 336 voxels 336 are class 0; name the voxels"),
        (Segment(1), torch.full((1, 1, *SIZE), -2.5), r"none of 336 voxels has a logit above 0 \(.* -2.5\)"),
        (Region(1), blobs() * 0 - 1, "nothing is predicted as region 1: none of 336"),
        (Segment(1), torch.cat([blobs(), blobs() + NONE]), "volume 1 of the batch: nothing is predicted as class 1"),
        (Segment(1, Component(3)), blobs(), "has 2 components, 15 voxels in all"),
        (Segment(1, Component()), blobs() + NONE, "nothing is predicted as class 1"),
        (Segment(1, ComponentAt(Voxel((3, 3, 3)))), blobs(), r"voxel \(3, 3, 3\) of the output is not predicted as"),
        (Segment(1, Voxel((3, 7, 3))), blobs(), r"the output has \(6, 7, 8\) voxels, counted from 0"),
        (Segment(1, Voxel((3, 7))), blobs(), "voxels, counted from 0"),
        (Segment(1, Mask(torch.zeros(SIZE))), blobs(), "a given mask holds none of the 336 voxels"),
        (Segment(1, Mask(torch.ones(3, 3, 3))), blobs(), "has one value per voxel of the output"),
        (Segment(2), blobs(), "the output has 2 classes, 0 to 1"),
        (Segment(0), blobs()[:, :1], "one channel, the foreground's logit; that is class 1"),
        (Region(2), blobs(), "region 2 asked for, but the output has channels 0 to 1"),
        (Segment(1), torch.zeros(1, 2), r"needs a segmentation's output, \(B, classes, \*spatial\); this"),
        (Segment(1, Position((0.0, 0.0, 0.0))), blobs(), "known for scans only; explain through volsal.Explainer"),
        (Segment(1, Position((0.0, 0.0, 99.0), Grid(SIZE, np.eye(4)))), blobs(), "outside what the model sees, 0 to 5"),
        (Segment(1, Labels("mask.nii.gz")), blobs(), "read for scans only"),
        (ClassLogit(1), blobs(), "for a segmentation write segment-1"),
    ],
)  # fmt: skip
def test_refuses_in_words(target, output, says):
    with pytest.raises(TargetError, match=says):
        score(target, output, len(output))


def test_a_label_map_is_asked_for_by_the_cases_name():
    asked = []

    def labels_of(path):
        asked.append(path)
        labels = torch.zeros(SIZE, dtype=torch.int32)
        labels[0], labels[1] = 3, 4
        return labels

    output = logits(batch=1)
    context = Context(case="sub-01", labels_of=labels_of)
    for text, planes in [
        ("segment-1-in:masks/{case}_m.nii.gz", (0, 1)),
        ("segment-1-in:masks/{case}_m.nii.gz#4", (1,)),
    ]:
        target = parse_target(text)
        ready = placed(target, context, lambda path: None)
        assert target_id(ready) == target_id(target)
        assert float(ready(output)) == pytest.approx(sum(float(output[0, 1, plane].sum()) for plane in planes))
    assert asked == ["masks/sub-01_m.nii.gz"] * 2


class Painter(nn.Module):
    """z_k = w_k * x at every voxel: a linear segmentation, whose gradient is w_k in the mask."""

    def __init__(self, weights=(1.0, -2.0, 0.5), channels=1):
        super().__init__()
        self.paint = nn.Conv3d(channels, len(weights), 1, bias=False).double()
        self.paint.weight.data = (
            torch.tensor(weights).double().view(-1, 1, 1, 1, 1).expand(-1, channels, 1, 1, 1).clone()
        )

    def forward(self, x):
        return self.paint(x)


def test_the_gradient_of_a_linear_segmentation_is_its_weight_in_the_mask(volume):
    mask = volume[:, 0] < 0  # where -2 x is the largest
    (map_,) = InputGradient().attribute(Painter(), volume, [Segment(1)]).maps
    torch.testing.assert_close(map_[:, 0], torch.where(mask, -2.0, 0.0).double())


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_sums_a_whole_volume(half):
    output = torch.full((1, 1, 40, 40, 40), 3.0, dtype=half)
    assert float(Segment(1)(output)) == 3.0 * 64000


def nets():
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    yield "unet", nets.UNet(3, 1, 3, (4, 8), (2,)), "model.1.submodule"
    kernel, strides = [[3, 3, 3]] * 3, [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
    dynunet = nets.DynUNet(3, 1, 3, kernel, strides, strides[1:], filters=(4, 8, 8), deep_supervision=False)
    yield "dynunet", dynunet, "bottleneck"
    yield (
        "segresnet",
        nets.SegResNet(3, init_filters=8, in_channels=1, out_channels=3, blocks_down=(1, 1), blocks_up=(1,)),
        "down_layers.1",
    )


@pytest.mark.parametrize("number", range(3))
def test_of_real_segmentation_networks_the_maps_follow_finite_differences(number):
    name, net, layer = list(nets())[number]
    net = net.double().eval()
    volume = torch.randn(1, 1, 16, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = Segment(1, Component())
    answer = InputGradient().attribute(net, volume, [target])
    same = fixed(target, net(volume))
    step = 1e-7 * torch.randn(volume.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        slope = same(net(volume + step)) - same(net(volume - step))
    assert float((answer.maps[0] * step).sum() * 2) == pytest.approx(float(slope), rel=1e-3), name
    cam = GradCAM(layer).attribute(net, volume, [target, Segment(1, Voxel((3, 4, 5)))])
    assert len(cam.maps) == 2
    assert cam.scores[0].tolist() == answer.scores[0].tolist()
    assert torch.isfinite(HiResCAM(layer).attribute(net, volume, [target]).maps[0]).all()


def test_heads_of_deep_supervision_are_taken_by_their_place():
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    kernel, strides = [[3, 3, 3]] * 4, [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    net = nets.DynUNet(
        3, 1, 3, kernel, strides, strides[1:], filters=(4, 8, 8, 8), deep_supervision=True, deep_supr_num=1
    )
    volume = torch.randn(1, 1, 16, 16, 16)
    stacked = net.train()(volume).detach()
    assert stacked.shape == (1, 2, 3, 16, 16, 16)
    for head in range(2):
        assert float(parse_target(f"{head}/segment-2")(stacked)) == float(Segment(2)(stacked[:, head]))
    tuples = (stacked[:, 0], stacked[:, 1, :, ::2, ::2, ::2])
    assert float(parse_target("-1/segment-2")(tuples)) == float(Segment(2)(tuples[1]))


@pytest.mark.parametrize(
    ("text", "target", "id"),
    [
        ("segment-1", Segment(1), "segment-1"),
        ("region-0", Region(0), "region-0"),
        ("segment-1-largest", Segment(1, Component(1)), "segment-1-largest"),
        ("segment-1-component-1", Segment(1, Component(1)), "segment-1-largest"),
        ("segment-1-component-2", Segment(1, Component(2)), "segment-1-component-2"),
        ("region-2-voxel-10-20-30", Region(2, Voxel((10, 20, 30))), "region-2-voxel-10-20-30"),
        ("segment-1-mm-12.5,-30,7", Segment(1, Position((12.5, -30, 7))), "segment-1-mm-r12.5-p30-s7"),
        ("segment-1-mm-l12.5-a.5-i0", Segment(1, Position((-12.5, 0.5, 0))), "segment-1-mm-l12.5-a0.5-s0"),
        ("segment-1-component-at-voxel-1-2-3", Segment(1, ComponentAt(Voxel((1, 2, 3)))), None),
        ("segment-1-component-at-mm--1,2,3", Segment(1, ComponentAt(Position((-1, 2, 3)))), None),
        ("segment-liver-largest", Segment(2, Component()), "segment-2-largest"),
        ("segment-left-lung", Segment(1), "segment-1"),
        ("segment-1-in:a/b_mask.nii.gz", Segment(1, Labels("a/b_mask.nii.gz")), "segment-1-in-b-mask"),
        ("segment-1-in:{case}/m-1.5mm.nrrd#12", Segment(1, Labels("{case}/m-1.5mm.nrrd", 12)), None),
        ("logits/class-1", Within("logits", ClassLogit(1)), "logits-class-1"),
        ("seg.main/segment-1-in:a/b.nii", Within("seg.main", Segment(1, Labels("a/b.nii"))), "seg.main-segment-1-in-b"),
        ("0/liver", Within("0", ClassLogit(2)), "0-class-2"),
    ],
)
def test_text_forms(text, target, id):
    classes = ["background", "left-lung", "liver"]
    found = parse_target(text, classes)
    assert found == target
    if id:
        assert target_id(found) == id
    if ":" not in text and "/" not in text:
        assert parse_target(target_id(found)) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("segment-1-larges", "which voxels are 'larges'; did you mean 'largest'"),
        ("segment-1-component-0", "components are counted from 1"),
        ("segmnt-1", "unknown target 'segmnt-1'; did you mean 'segment-1'"),
        ("segment-", "unknown target"),
        ("segment-2", "both an index and the name of class 0"),
    ],
)
def test_texts_that_mean_nothing(text, says):
    with pytest.raises(TargetError, match=says):
        parse_target(text, ["2", "organ"] if text == "segment-2" else [])


def test_relative_paths_start_from_the_folder_that_is_given(tmp_path):
    assert parse_target("segment-1-in:m.nii", folder=tmp_path).files == (str(tmp_path / "m.nii"),)
    assert parse_target(f"segment-1-in:{tmp_path}/m.nii", folder=tmp_path / "x").files == (f"{tmp_path}/m.nii",)
    assert parse_target("0/segment-1-in:m.nii").files == ("m.nii",)


def test_it_says_what_is_summed():
    assert str(parse_target("segment-1")) == "logit of class 1 summed over the voxels predicted as it"
    assert str(parse_target("0/region-1-voxel-1-2-3")) == (
        "logit of region 1 summed over voxel (1, 2, 3) of the output, of the output's 0"
    )
