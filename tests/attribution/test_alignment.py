import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import volsal
from volsal import ClassLogit, GradCAM, GuidedGradCAM, HiResCAM, PredictedClass
from volsal.alignments import Alignments, Key, beside
from volsal.attribution import (
    ALIGNMENTS,
    AlignmentError,
    Component,
    Context,
    Mask,
    Region,
    Segment,
    Voxel,
    Within,
)
from volsal.attribution.alignment.alignment import (
    Alignment,
    Collector,
    FlipAverage,
    HalfPixel,
    Measured,
    Nominal,
    centroid,
    pooled,
)
from volsal.grid import Grid


class Shifted(nn.Module):
    """Sees bright spots through one strided convolution whose only weight sits at ``tap`` of its 5 x 5 x 5 kernel.

    Cell i therefore looks at voxel 4 i - 2 + tap, whatever the architecture says (4 i).
    """

    def __init__(self, tap=(2, 2, 2), size=5):
        super().__init__()
        self.features = nn.Sequential(nn.Conv3d(1, 2, size, stride=4, padding=2), nn.ReLU())
        weight = torch.zeros(2, 1, size, size, size)
        weight[(0, 0, *tap)] = 1.0
        weight[(1, 0, 2, 2, 2)] = -1.0
        self.features[0].weight.data = weight
        self.features[0].bias.data = torch.tensor([-0.1, 0.0])
        self.head = nn.Linear(2, 2, bias=False)
        self.head.weight.data = torch.tensor([[0.0, 1.0], [1.0, 0.0]])

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3, 4)))


def spot(at, size=(32, 36, 40), sigma=3.0, channels=1):
    axes = torch.meshgrid(*[torch.arange(n).float() for n in size], indexing="ij")
    away = sum((axis - x) ** 2 for axis, x in zip(axes, at, strict=True))
    return torch.exp(-0.5 * away / sigma**2).expand(1, channels, *size).clone()


def found(model, x, rule, target=1, method=GradCAM):
    answer = method("features").attribute(model, x, [ClassLogit(target)], Context(rule))
    placed = answer.alignments[0].place(answer.maps[0].clamp(min=0), x.shape[2:])[0, 0]
    return answer.alignments[0], centroid(placed) if placed.max() > 0 else None


def test_half_pixel_is_what_interpolation_does():
    maps = torch.randn(2, 3, 4, 5, 6)
    rule = HalfPixel()(nn.Identity(), torch.zeros(1, 1, 16, 15, 33), _map(maps))
    ours = rule.place(maps, (16, 15, 33))
    theirs = torch.nn.functional.interpolate(maps, (16, 15, 33), mode="trilinear", align_corners=False)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def _map(values):
    from volsal.attribution.alignment.alignment import LayerMap

    return LayerMap("any", "features", "class-0", values, values, values, lambda a, g: a)


@pytest.mark.parametrize("tap", [(2, 2, 2), (0, 2, 4), (4, 1, 3), (0, 0, 0)])
@pytest.mark.parametrize("method", [GradCAM, HiResCAM])
def test_measured_finds_where_a_lopsided_kernel_looks(tap, method):
    model, at = Shifted(tap), (15.2, 17.9, 21.4)
    alignment, where = found(model, spot(at), Measured(), method=method)
    np.testing.assert_allclose(alignment.stride, 4)
    # Cell i looks at 4 i - 2 + tap: a closed form.
    np.testing.assert_allclose(alignment.offset, np.array(tap) - 2, atol=1.0)
    np.testing.assert_allclose(where, at, atol=1.0)  # a quarter of a cell
    assert alignment.scans == 1
    assert all(doubt >= 0 for doubt in alignment.uncertainty)


@pytest.mark.parametrize("tap", [(0, 2, 4), (0, 0, 0)])
def test_measured_beats_the_rules_that_do_not_look(tap):
    model, at = Shifted(tap), np.array((15.2, 17.9, 21.4))
    off = {
        rule.id: np.linalg.norm(found(model, spot(at), rule)[1] - at) for rule in (HalfPixel(), Nominal(), Measured())
    }
    assert off["measured"] < 0.4 * min(off["half-pixel"], off["nominal"])


def test_nominal_is_the_architecture_s():
    alignment, _ = found(Shifted((0, 2, 4)), spot((15, 17, 21)), Nominal())
    assert (alignment.kind, alignment.stride, alignment.offset) == ("nominal", (4, 4, 4), (0, 0, 0))


def test_nominal_says_what_it_cannot_follow():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Conv3d(1, 1, 3, stride=2)

        def forward(self, x):
            return self.features(x.sort(-1).values).mean((2, 3, 4))

    with pytest.raises(AlignmentError, match=r"features.*sort.*half-pixel"):
        GradCAM("features").attribute(Sorted(), spot((8, 8, 8)), [lambda y: y[:, 0]], Context(Nominal()))


def test_flip_average_cancels_a_lopsided_kernel():
    model, at = Shifted((0, 2, 4)), np.array((15.2, 17.9, 21.4))
    _, where = found(model, spot(at), FlipAverage())
    assert np.linalg.norm(where - at) < 0.5 * np.linalg.norm(found(model, spot(at), Nominal())[1] - at)


def test_flip_average_explains_the_class_that_was_predicted_unflipped():
    class Sided(Shifted):
        """Predicts by the side on which the spot lies."""

        def forward(self, x):
            low, high = self.features(x)[:, :1].tensor_split(2, dim=2)
            return torch.cat([low.mean((2, 3, 4)), high.mean((2, 3, 4))], 1)

    model, x = Sided(), spot((8, 17, 21))
    assert model(x).argmax() == 0
    predicted = GradCAM("features").attribute(model, x, [PredictedClass()], Context(FlipAverage())).maps[0]
    first = GradCAM("features").attribute(model, x, [ClassLogit(0)], Context(FlipAverage())).maps[0]
    torch.testing.assert_close(predicted, first)


class Mirrorable(nn.Module):
    """Segments a mirrored volume as the mirror image of the volume."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.head = nn.Conv3d(1, 4, 3, padding=1).double(), nn.Conv3d(4, 3, 3, padding=1).double()
        for layer in (self.conv, self.head):
            layer.weight.data = (layer.weight + layer.weight.flip(2, 3, 4)).data / 2

    def forward(self, x):
        return self.head(self.conv(x).relu())


@pytest.mark.parametrize(
    "target",
    [
        Segment(1),
        Segment(1, Component()),
        Segment(2, Voxel((1, 5, 2))),
        Segment(0, Mask(torch.arange(6 * 7 * 8).reshape(6, 7, 8) < 100)),
        lambda logits: logits[:, 1, 1, 5, 2] ** 2,
        Within("seg", Region(1)),
    ],
)
def test_flip_average_asks_the_mirrored_volume_about_the_same_voxels(target):
    class Named(Mirrorable):
        def forward(self, x):
            return {"seg": super().forward(x)} if isinstance(target, Within) else super().forward(x)

    volume = torch.randn(2, 1, 6, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for method in (GradCAM("conv"), HiResCAM("conv")):
        once = method.attribute(Named(), volume, [target], Context(HalfPixel())).maps[0]
        assert float(once.abs().max()) > 0
        torch.testing.assert_close(method.attribute(Named(), volume, [target], Context(FlipAverage())).maps[0], once)


def test_an_empty_map_keeps_the_start():
    alignment, _ = found(Shifted(), torch.zeros(1, 1, 32, 36, 40), Measured())
    assert (alignment.kind, alignment.scans) == ("half-pixel", 0)


def test_what_cannot_be_followed_back_falls_back_or_is_an_error():
    class Cut(Shifted):
        def forward(self, x):
            return super().forward(x.detach() * 1.0)

    x = spot((15, 17, 21))
    assert found(Cut(), x, Measured())[0].kind == "half-pixel"
    with pytest.raises(AlignmentError, match="followed back"):
        found(Cut(), x, Measured(strict=True))


def test_an_offset_out_of_reach_is_drawn_back():
    known = Alignment("measured", (4.0, 4.0, 4.0), (8.0, 0.0, -6.0), (0.1, 0.1, 0.1), 9)
    alignment, _ = found(Shifted(), spot((15.2, 17.9, 21.4)), Measured(lambda of, size: known))
    np.testing.assert_allclose((alignment.offset[0], alignment.offset[2]), (8 - 3, -6 + 3))
    assert abs(alignment.offset[1]) < 1


def test_the_model_is_left_as_it_was():
    model = Shifted().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        found(model, spot((15, 17, 21)), Measured())
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_gives_the_median_of_its_volumes(dtype):
    model = Shifted((0, 2, 4)).to(dtype)
    x = torch.cat([spot(at) for at in ((15.2, 17.9, 21.4), (12.0, 14.0, 16.0), (18.0, 20.0, 22.0))]).to(dtype)
    each = [found(model, one[None], Measured())[0].offset for one in x]
    together = GradCAM("features").attribute(model, x, [ClassLogit(1)], Context(Measured())).alignments[0]
    # Evidence at exactly half the maximum may fall on either side of it.
    np.testing.assert_allclose(together.offset, np.median(each, axis=0), atol=0.15)
    assert together.scans == 3


def test_pooling_gives_median_and_standard_error():
    rng = np.random.default_rng(3)
    own = rng.normal((1.0, 2.0, 3.0), 0.5, (400, 3))
    together = pooled(own, (8, 8, 8))
    np.testing.assert_allclose(together.offset, (1, 2, 3), atol=0.15)
    # The standard error of a median of n normal values is 1.2533 sigma / sqrt(n).
    np.testing.assert_allclose(together.uncertainty, 1.2533 * 0.5 / 20, rtol=0.25)
    assert (together.scans, pooled(own[:1], (8, 8, 8)).uncertainty) == (400, None)


def test_a_collector_without_evidence_has_nothing_to_pool():
    collector = Collector()
    found(Shifted(), torch.zeros(1, 1, 32, 36, 40), collector)
    with pytest.raises(AlignmentError, match="evidence"):
        collector.pooled()


def test_guided_grad_cam_uses_the_alignment():
    model, x = Shifted((0, 2, 4)), spot((15.2, 17.9, 21.4))
    method = GuidedGradCAM("features")
    one, other = (method.attribute(model, x, [ClassLogit(1)], Context(rule)) for rule in (HalfPixel(), Measured()))
    assert other.alignments[0].kind == "measured"
    assert not torch.allclose(one.maps[0], other.maps[0])


def test_the_grid_of_cells_puts_each_at_its_voxel():
    inputs = Grid((32, 36, 40), [[0, 0, 2.0, 5], [-1.5, 0, 0, 7], [0, 3.0, 0, -9], [0, 0, 0, 1]])
    grid = Alignment("measured", (4.0, 8.0, 2.0), (1.5, -2.0, 0.25)).grid(inputs, (8, 4, 20))
    np.testing.assert_allclose(grid.world((3, 2, 7)), inputs.world((1.5 + 12, -2 + 16, 0.25 + 14)))


def test_alignments_survive_their_file(tmp_path):
    key = Key("abc", "grad-cam", "features", "class-1", (32, 36, 40))
    kept = Alignments({key: Alignment("measured", (4.0, 4.0, 4.0), (0.1, 0.2, 0.3), (0.01, 0.02, 0.03), 8)})
    kept.write(tmp_path / "a.json")
    assert Alignments.read(tmp_path / "a.json") == kept
    assert Alignments.read(tmp_path / "missing.json") == {}
    assert beside(tmp_path / "monai.yaml").name == "monai.alignment.json"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", json.dumps({"format": 99, "entries": []}), '{"format":1,"entries":[1]}']
)
def test_a_foreign_file_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(AlignmentError, match=r"a\.json.*volsal align"):
        Alignments.read(tmp_path / "a.json")


def test_an_explainer_measures_and_then_uses_what_it_measured():
    model = Shifted((0, 2, 4))
    scans = [volsal.Scan.from_array(spot(at)[0, 0], np.diag([2, 2, 2, 1])) for at in ((15, 18, 21), (12, 20, 17))]
    explainer = volsal.Explainer(model, None, "grad-cam", 1)
    measured = explainer.measure(scans)
    ((key, alignment),) = measured.items()
    assert (key.layer, key.target, key.size, alignment.scans) == ("features", "class-1", (32, 36, 40), 2)
    # Far from it, so that a use of it shows: the scan's own offset is drawn back towards it.
    explainer.alignments[key] = Alignment("measured", (4.0, 4.0, 4.0), (8.0, 8.0, 8.0), None, 2)
    assert min(explainer(scans[0]).maps[0].alignment.offset) == pytest.approx(5.0)
    with torch.no_grad():
        model.head.weight.mul_(2)  # other weights: what was measured no longer holds
    assert max(explainer(scans[0]).maps[0].alignment.offset) < 4


def test_methods_without_a_layer_have_nothing_to_align():
    explainer = volsal.Explainer(Shifted(), None, "input-gradient", 1)
    with pytest.raises(volsal.VolsalError, match="nothing to align"):
        explainer.measure([])


def test_every_rule_is_registered_by_its_id():
    assert {name: rule.id for name, rule in ALIGNMENTS.items()} == {name: name for name in ALIGNMENTS}
    with pytest.raises(volsal.VolsalError, match=r"half-pixle.*half-pixel"):
        volsal.Explainer(Shifted(), None, "grad-cam", 1, alignment="half-pixle")


@pytest.mark.parametrize("rule", [HalfPixel(), Nominal(), Measured()])
def test_exchanged_axes_are_read_in_the_inputs_order(rule):
    class Turned(Shifted):
        def forward(self, x):
            return super().forward(x.permute(0, 1, 4, 3, 2))

    x = spot((6, 15, 25), (32, 28, 36))
    alignment, centre = found(Turned(), x, rule)
    expected, straight = found(Shifted(), x.permute(0, 1, 4, 3, 2), rule)
    assert alignment.offset == pytest.approx(expected.offset[::-1], abs=1e-3)
    assert centre == pytest.approx(straight[::-1], abs=1e-3)


@pytest.mark.parametrize(
    "change", [{"stride": (2.0, 2.0, 2.0)}, {"stride": (-4.0,) * 3}, {"offset": (500.0, 0.0, 0.0)}]
)
def test_what_cannot_be_of_this_layer_is_not_used(change):
    known = replace(Alignment("measured", (4.0,) * 3, (0.0,) * 3, (0.1,) * 3, 9), **change)
    x = spot((15.2, 17.9, 21.4))
    assert found(Shifted(), x, Measured(lambda of, size: known))[0] == found(Shifted(), x, Measured())[0]


def test_what_is_drawn_back_is_uncertain():
    known = Alignment("measured", (4.0, 4.0, 4.0), (8.0, 0.0, 0.0), (0.1, 0.1, 0.1), 9)
    alignment, _ = found(Shifted(), spot((15.2, 17.9, 21.4)), Measured(lambda of, size: known))
    assert alignment.uncertainty[0] > 3 > 2 > alignment.uncertainty[1]


def test_a_constant_map_measures_nothing():
    alignment, _ = found(Shifted(), torch.ones(1, 1, 32, 36, 40), Measured())
    assert alignment.kind == "half-pixel"


@pytest.mark.parametrize("scale", [1e-22, 1e22])
def test_the_score_s_scale_does_not_matter(scale):
    model, x = Shifted((0, 2, 4)), spot((15.2, 17.9, 21.4))
    expected = found(model, x, Measured())[0].offset
    with torch.no_grad():
        model.head.weight.mul_(scale)
    np.testing.assert_allclose(found(model, x, Measured())[0].offset, expected, atol=1e-2)


def test_a_model_that_wraps_what_is_raised_inside_it_is_still_measured():
    class Wrapping(Shifted):
        def forward(self, x):
            try:
                return super().forward(x)
            except Exception as error:
                raise RuntimeError("layer failed") from error

    assert found(Wrapping(), spot((15.2, 17.9, 21.4)), Measured(strict=True))[0].kind == "measured"


@pytest.mark.parametrize(
    "change",
    [
        {"stride": [4, 4]},
        {"offset": [float("nan")] * 3},
        {"stride": [0, 4, 4]},
        {"stride": "444"},
        {"scans": 0},
        {"scans": float("inf")},
        {"uncertainty": [1]},
    ],
)
def test_an_edited_file_is_refused_when_read(tmp_path, change):
    key = Key("abc", "grad-cam", "features", "class-1", (32, 36, 40))
    Alignments({key: Alignment("measured", (4.0,) * 3, (0.0,) * 3, None, 8)}).write(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    content["entries"][0]["alignment"].update(change)
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(AlignmentError, match=r"a\.json"):
        Alignments.read(tmp_path / "a.json")


def test_a_scan_that_cannot_be_used_is_told_and_left_out(tmp_path):
    scans = [tmp_path / "missing.nii.gz", volsal.Scan.from_array(spot((15, 18, 21))[0, 0], np.diag([2, 2, 2, 1]))]
    told = []
    explainer = volsal.Explainer(Shifted(), None, ["grad-cam", GuidedGradCAM("features")], 1)
    measured = explainer.measure([[scans[0]], scans[1]], told.append)
    assert "missing.nii.gz" in str(told[0])
    # Two methods that share a map count it once.
    assert [alignment.scans for alignment in measured.values()] == [1]
