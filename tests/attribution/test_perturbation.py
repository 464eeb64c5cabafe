"""What the perturbation methods share: fills, passes, lengths in mm, and being taken up again after a fault."""

import logging

import numpy as np
import pytest
import torch
from conftest import SHAPE
from nets import random_net
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.testing import assert_close

from volsal import RISE, ClassLogit, Occlusion, PredictedClass, RegionAblation, ScoreCAM
from volsal.attribution import Context, SettingError
from volsal.attribution.perturbation.perturbation import blurred, digest_bytes
from volsal.grid import Grid

LABELS = torch.zeros(SHAPE, dtype=torch.int64)
LABELS[1:4, 2:5, 3:6], LABELS[5:, 6:, :4] = 1, 7

# One of each, small, with random draws where the method makes any.
METHODS = {
    "occlusion": lambda **more: Occlusion(**{"box": 4, "fill": "noise", **more}),
    "rise": lambda **more: RISE(cell=3, masks=40, **more),
    "region-ablation": lambda **more: RegionAblation(labels=LABELS, controls=5, **more),
}


@pytest.fixture(params=METHODS)
def make(request):
    return METHODS[request.param]


class Counting(nn.Module):
    """A net that counts the volumes it sees, and can be made to fail at one."""

    def __init__(self, net, fail_after=None):
        super().__init__()
        self.net, self.calls, self.fail_after = net, [], fail_after

    def forward(self, x):
        if self.fail_after is not None and len(self.calls) >= self.fail_after:
            raise KeyboardInterrupt
        self.calls.append(len(x))
        return self.net(x)


@pytest.mark.parametrize("batch", [3, 1000])
def test_the_batch_changes_nothing_but_rounding(make, batch, volume):
    net = random_net()
    one, many = (make(batch=n).attribute(net, volume, [ClassLogit(0), PredictedClass()]) for n in (1, batch))
    assert_close(many.maps, one.maps)


@pytest.mark.parametrize("batch", [1, 4])
def test_the_number_of_passes_is_told_beforehand(make, batch, volume):
    net = Counting(random_net())
    method = make(batch=batch)
    method(net, volume, ClassLogit(0))
    assert len(net.calls) == method.passes(volume.shape)
    assert max(net.calls) == 2 * batch  # copies of a batch of two


class Close(nn.Module):
    """Class 0 by a network, and class 1 at a constant just below: what lowers the one makes the other the predicted."""

    def __init__(self, net, volume):
        super().__init__()
        self.net, self.seen = net, []
        self.below = float(net.eval()(volume)[:, 0].detach()) - 1e-9

    def forward(self, x):
        z = self.net(x)[:, :1]
        self.seen += (z[:, 0] < self.below).tolist()
        return torch.cat([z, torch.full_like(z, self.below)], 1)


def test_a_copy_is_asked_for_the_class_that_was_predicted_for_the_scan(make, volume):
    net = Close(random_net(), volume[:1])
    predicted, named = make().attribute(net, volume[:1], [PredictedClass(), ClassLogit(0)]).maps
    assert any(net.seen[1:])  # the other class was predicted for some copy
    assert torch.equal(predicted, named)


def test_a_volume_has_the_same_map_alone_and_in_a_batch(make, volume):
    for fill in ("noise", "blur", "mean"):
        method = make(fill=fill)
        alone = torch.cat([method(random_net(), one, ClassLogit(0)) for one in volume.split(1)])
        assert_close(method(random_net(), volume, ClassLogit(0)), alone)


def test_the_seed_decides_what_is_drawn(make, volume):
    net = random_net()
    first, again, other = (make(seed=seed).attribute(net, volume, [ClassLogit(0)]) for seed in (1, 1, 2))
    assert torch.equal(first.maps[0], again.maps[0])
    assert first.facts == again.facts
    assert not torch.equal(first.maps[0], other.maps[0]) or first.facts != other.facts


@pytest.mark.parametrize("sigma", [(0.5, 1.0, 3.0), (2.0, 2.0, 2.0)])
def test_blur_is_a_gaussian_of_what_is_there(sigma, volume):
    # scipy pads with zeros and knows nothing of an edge, so a volume of ones, blurred so too, says what is there.
    options = {"sigma": sigma, "mode": "constant", "truncate": 30}
    weight = gaussian_filter(np.ones(SHAPE), **options)
    expected = np.stack([gaussian_filter(one[0].numpy(), **options) / weight for one in volume])[:, None]
    assert_close(blurred(volume, sigma).numpy(), expected)


@pytest.mark.parametrize(
    ("fill", "expected"),
    [
        ("zero", lambda x: torch.zeros_like(x)),
        (-3, lambda x: torch.full_like(x, -3)),
        ("mean", lambda x: x.mean((2, 3, 4), keepdim=True).expand_as(x)),
        ("blur", lambda x: blurred(x, (2.0, 1.0, 0.5))),
    ],
)
def test_fills(fill, expected, oblique):
    x = torch.randn(2, 3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sigma_mm = tuple(oblique.spacing * (2.0, 1.0, 0.5))
    method = Occlusion(box=3, fill=fill, sigma_mm=sigma_mm)
    assert_close(method.filling(x, (3, 3, 3), Context(grid=oblique)).expand_as(x), expected(x))


def test_noise_has_each_channels_mean_and_deviation():
    x = torch.randn(2, 3, 20, 21, 22, dtype=torch.float64) * torch.tensor([1.0, 10, 100]).view(3, 1, 1, 1) + 5
    noise = Occlusion(box=3, fill="noise").filling(x, (3, 3, 3), Context())
    axes = (2, 3, 4)
    assert_close(noise.std(axes), x.std(axes), rtol=0.03, atol=0)
    assert float((noise.mean(axes) - x.mean(axes)).div(x.std(axes)).abs().max()) < 0.05


def test_the_blur_is_half_the_edge_of_what_is_removed_unless_told(volume):
    default = Occlusion(box=(2, 4, 6)).filling(volume, (2, 4, 6), Context())
    assert_close(default, Occlusion(box=3, sigma=(1.0, 2.0, 3.0)).filling(volume, (2, 4, 6), Context()))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: Occlusion(fill="blurr"), "unknown fill 'blurr'; did you mean 'blur'"),
        (lambda: Occlusion(fill=float("nan")), "fill is a finite number"),
        (lambda: Occlusion(fill=None), "fill is a finite number, not None"),
        (lambda: Occlusion(fill=[1]), r"fill is a finite number, not \(1,\)"),
        (lambda: ScoreCAM(fill="blur"), "score-cam: fill is a finite number, not 'blur'"),
        (lambda: RISE(probability="half"), "probability is a number above 0, not 'half'"),
        (lambda: RISE(batch=0), "batch is a whole number of at least 1, not 0"),
        (lambda: RISE(masks=1), "masks is a whole number of at least 2"),
        (lambda: RISE(probability=1), "probability lies between 0 and 1"),
        (lambda: RegionAblation(controls=-1), "controls is a whole number of at least 0"),
        (lambda: RegionAblation(names={"liver": 1}), "names are given by label"),
        (lambda: Occlusion(channels="all"), "channels is 'together' or 'each'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(method, message):
    with pytest.raises(SettingError, match=message):
        method()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Occlusion(), "box_mm needs to know how large a voxel is, and no grid says so; give box, in voxels"),
        (RISE(), "cell_mm needs to know how large a voxel is, and no grid says so; give cell, in voxels"),
        (Occlusion(box=(2, 3)), r"box is a positive number, or 3 of them, not \(2, 3\)"),
        (Occlusion(box=0), "box is a positive number"),
        (Occlusion(box=4, stride=5), r"boxes of \(4, 4, 4\) voxels at a stride of \(5, 5, 5\) leave voxels out"),
        (Occlusion(box=4, sigma_mm=3), "sigma_mm needs to know how large a voxel is"),
        (RegionAblation(), "needs labels"),
        (RegionAblation(labels="x.nii"), "labels 'x.nii' is a file, which only an Explainer can place"),
        (RegionAblation(labels=LABELS[1:]), r"the label map is \(6, 9, 11\), the volume \(7, 9, 11\)"),
        (RegionAblation(labels=LABELS + 0.5), "a label map holds whole numbers"),
        (RegionAblation(labels=np.array(["liver"])), "a label map holds whole numbers, and not <U5"),
        (RegionAblation(labels=0 * LABELS), "the label map holds 0 labels other than 0"),
    ],
)
def test_settings_that_do_not_fit_the_volume_are_refused(method, message, volume):
    with pytest.raises(SettingError, match=message):
        method(random_net(), volume, ClassLogit(0))


def test_a_config_may_give_lists(volume):
    assert Occlusion(box=[4, 4, 6]) == Occlusion(box=(4, 4, 6))
    assert hash(Occlusion(box=[4, 4, 6])) == hash(Occlusion(box=(4, 4, 6)))


def test_millimetres_become_voxels_along_each_axis():
    grid = Grid((30, 40, 50), np.diag([1.0, -2.0, 3.5, 1.0]))
    method = Occlusion(box_mm=(5, 6, 7), stride_mm=(5, 3, 3.5))
    assert method.in_voxels("box", (1, 1, 30, 40, 50), Context(grid=grid)) == (5, 3, 2)
    # 6 boxes of 5 in 30; of 3 every 1.5 -> 2, over 40: 20; of 2 every 1 over 50: 49
    assert method.copies((1, 1, 30, 40, 50), Context(grid=grid)) == 6 * 20 * 49
    with pytest.raises(SettingError, match=r"the volume is \(30, 40, 51\), but its grid has shape \(30, 40, 50\)"):
        method.copies((1, 1, 30, 40, 51), Context(grid=grid))


def test_progress_is_told_to_the_last_pass(make, volume):
    told = []
    method = make(batch=7)
    count = method.copies(volume.shape, Context())
    method.attribute(random_net(), volume, [ClassLogit(0)], Context(progress=lambda *step: told.append(step)))
    assert (
        told
        == [(method.id, min(done, count), count) for done in range(0, count + 7, 7) if done < count + 7][: len(told)]
    )
    assert told[0] == (method.id, 0, count)
    assert told[-1] == (method.id, count, count)


def test_the_cost_is_told_after_two_passes(make, volume, caplog):
    at = []
    net = Counting(random_net())

    class Watch(logging.Handler):
        def emit(self, record):
            at.append(len(net.calls))

    logger, watch = logging.getLogger("volsal"), Watch()
    logger.addHandler(watch)
    try:
        with caplog.at_level(logging.INFO, "volsal"):
            method = make()
            method(net, volume, ClassLogit(0))
    finally:
        logger.removeHandler(watch)
    assert at == [3]  # the volume itself and two of its copies
    assert f"{method.id}: {method.copies(volume.shape, Context()):,} forward passes, about" in caplog.text


@pytest.mark.parametrize("batch", [1, 3])
def test_an_interrupted_run_is_taken_up_again_to_the_bit(make, batch, volume, tmp_path):
    targets = [ClassLogit(0), PredictedClass()]
    method, net = make(batch=batch), random_net()
    undisturbed = method.attribute(net, volume, targets)
    passes = method.passes(volume.shape)
    half = Counting(net, fail_after=passes // 2)
    with pytest.raises(KeyboardInterrupt):
        method.attribute(half, volume, targets, Context(keep=tmp_path))
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    rest = Counting(net)
    told = []
    resumed = method.attribute(rest, volume, targets, Context(keep=tmp_path, progress=lambda *s: told.append(s[1])))
    assert len(rest.calls) == 1 + passes - len(half.calls)  # the volume itself is asked twice
    assert told[0] == (len(half.calls) - 1) * batch
    for a, b in zip(resumed.maps, undisturbed.maps, strict=True):
        assert torch.equal(a, b)
    assert resumed.facts == undisturbed.facts
    assert resumed.notes == undisturbed.notes


def test_what_is_kept_is_not_taken_for_the_answer_to_another_question(make, volume, tmp_path):
    net, targets = random_net(), [ClassLogit(0)]
    method = make()
    method.attribute(net, volume, targets, Context(keep=tmp_path))
    count = method.passes(volume.shape)
    grown = random_net()
    grown[-1].weight.data *= 2
    for what, other, x, asked, context in [
        ("settings", make(fill=-1), volume, targets, Context(keep=tmp_path)),
        ("weights", method, volume, targets, Context(keep=tmp_path)),
        ("volume", method, volume + 1e-9, targets, Context(keep=tmp_path)),
        ("target", method, volume, [ClassLogit(1)], Context(keep=tmp_path)),
    ]:
        seen = Counting(grown if what == "weights" else net)
        other.attribute(seen, x, asked, context)
        assert len(seen.calls) == count, what
    seen = Counting(net)
    make(batch=2).attribute(seen, volume, targets, Context(keep=tmp_path))  # less memory, the same question
    assert len(seen.calls) == 1


class Cropped(nn.Module):
    """Sees only the first slices."""

    def __init__(self):
        super().__init__()
        self.net = random_net()

    def forward(self, x):
        return self.net(x[:, :, :5])


def test_another_volume_is_another_question_even_where_the_model_says_the_same(make, volume, tmp_path):
    net, targets = Cropped(), [ClassLogit(0)]
    make().attribute(net, volume, targets, Context(keep=tmp_path))
    seen = Counting(net)
    other = volume.clone()
    other[:, :, 6] += 10  # which the model does not see, but which reaches into the fill
    make().attribute(seen, other, targets, Context(keep=tmp_path))
    assert len(seen.calls) == make().passes(volume.shape)


def test_another_spacing_is_another_question(volume, tmp_path):
    net, method = random_net(), Occlusion(box=4, sigma_mm=2)  # the same boxes, another blur
    for mm in (1.0, 2.0):
        seen = Counting(net)
        grid = Grid(SHAPE, np.diag([mm, mm, mm, 1]))
        method.attribute(seen, volume, [ClassLogit(0)], Context(grid=grid, keep=tmp_path))
        assert len(seen.calls) == method.passes(volume.shape)


def test_other_labels_are_another_question(volume, tmp_path):
    net = random_net()
    RegionAblation(labels=LABELS, controls=0).attribute(net, volume, [ClassLogit(0)], Context(keep=tmp_path))
    seen = Counting(net)
    other = LABELS.clone()
    other[0, 0, 0] = 1  # which an abbreviated repr of the labels may not show
    RegionAblation(labels=other, controls=0).attribute(seen, volume, [ClassLogit(0)], Context(keep=tmp_path))
    assert len(seen.calls) == 3


DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + b"x",
    "one bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "empty": lambda content: b"",
    "foreign": lambda content: b"0" * 64 + content[64:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_is_ignored_with_a_note(make, damage, volume, tmp_path):
    net, method, targets = random_net(), make(), [ClassLogit(0)]
    expected = method.attribute(net, volume, targets, Context(keep=tmp_path))
    assert not any("partial" in note for note in expected.notes)
    (file,) = tmp_path.iterdir()
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    seen = Counting(net)
    answer = method.attribute(seen, volume, targets, Context(keep=tmp_path))
    assert len(seen.calls) == method.passes(volume.shape)
    assert torch.equal(answer.maps[0], expected.maps[0])
    assert [note for note in answer.notes if "partial results were ignored" in note]


def test_a_disk_that_refuses_does_not_end_the_work(make, volume, tmp_path, caplog):
    (tmp_path / "taken").write_text("a file where a folder is wanted")
    answer = make().attribute(random_net(), volume, [ClassLogit(0)], Context(keep=tmp_path / "taken"))
    assert torch.equal(answer.maps[0], make()(random_net(), volume, ClassLogit(0)))
    assert "partial results cannot be kept" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
def test_a_tensors_bytes_are_those_of_its_numbers_in_order(dtype):
    whole = torch.arange(12).reshape(3, 4).to(dtype)
    for tensor in (whole.T, whole[:, 1], whole[:1, 1], whole[1, 1]):
        copy = torch.tensor(tensor.tolist(), dtype=dtype)
        assert digest_bytes(tensor) == digest_bytes(copy)
        assert len(digest_bytes(tensor)) == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_give_float32_maps_near_the_double_ones(make, dtype, volume):
    exact = make()(random_net(), volume, ClassLogit(0))
    result = make()(random_net().to(dtype), volume.to(dtype), ClassLogit(0))
    assert result.dtype == torch.float32
    within = {torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype]
    assert float((result - exact).abs().max()) <= within * float(exact.abs().max())
