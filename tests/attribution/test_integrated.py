"""Integrated and expected gradients against closed forms, and their baselines."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nets import Linear3d, Scored, random_net, voxels
from torch import nn
from torch.testing import assert_close

from volsal import ClassLogit, ExpectedGradients, Grid, InputGradient, IntegratedGradients, PredictedClass
from volsal.attribution import BaselineError, Context, SettingError
from volsal.attribution.gradients.baselines import baseline_of


@pytest.fixture
def other(volume):
    return torch.randn(volume.shape, dtype=volume.dtype, generator=torch.Generator().manual_seed(11))


# --- integrated gradients ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("baseline", ["zero", "mean", "blur", -1.5, "tensor"])
def test_of_a_linear_model_is_the_weight_times_the_difference_for_every_baseline(volume, other, dtype, baseline):
    net = Linear3d([1.0, -2.0], [[3.0, 0.5], [1.0, 1.0]]).to(dtype)  # class 0: 3 - 1 = 2 on each voxel's share
    x = volume.to(dtype)
    setting = other.to(dtype) if baseline == "tensor" else baseline
    answer = IntegratedGradients(setting, steps=2).attribute(net, x, [ClassLogit(0)])
    against = baseline_of(x, setting, 10.0, Context())
    assert_close(answer.maps[0], 2 * (x - against) / x[0, 0].numel())
    assert_close(torch.tensor(answer.facts[0]["baseline_score"], dtype=dtype), net(against)[:, 0])
    assert max(answer.facts[0]["relative_delta"]) < (1e-3 if dtype == torch.float32 else 1e-10)
    assert answer.facts[0]["steps"] == [2, 2]
    assert not answer.notes


def test_of_a_product_is_its_closed_form():
    # d/dx1 of x1 x2 on the way from b: the mean of x2 and b2.
    answer = IntegratedGradients(voxels(1.0, -1.0), steps=1).attribute(
        Scored(lambda v: v[:, 0] * v[:, 1]), voxels(4.0, 5.0), [ClassLogit(0)]
    )
    assert_close(answer.maps[0].flatten(), torch.tensor([3.0 * 2.0, 6.0 * 2.5], dtype=torch.float64))


@pytest.mark.parametrize(("steps", "degree", "exact"), [(3, 6, True), (3, 7, False), (5, 10, True), (5, 11, False)])
def test_the_quadrature_is_exact_to_the_degree_that_gauss_gives_it(steps, degree, exact):
    # The gradient of x^k has degree k - 1; n points are exact up to degree 2n - 1.
    answer = IntegratedGradients(steps=steps, tolerance=None).attribute(
        Scored(lambda v: v[:, 0] ** degree), voxels(2.0), [ClassLogit(0)]
    )
    assert (abs(answer.facts[0]["relative_delta"]) < 1e-12) == exact


def test_steps_are_doubled_until_the_map_adds_up_and_no_further():
    # ReLU(x - 1) from 0 to 4: the gradient is 1 on the last three quarters of the way.
    net, x = Scored(lambda v: (v[:, 0] - 1).relu()), voxels(4.0)
    runs = []
    net.register_forward_hook(lambda *_: runs.append(1))
    answer = IntegratedGradients(steps=2, tolerance=0.02, max_steps=512).attribute(net, x, [ClassLogit(0)])
    facts = answer.facts[0]
    assert facts["relative_delta"] <= 0.02
    assert facts["delta"] == pytest.approx(float(answer.maps[0].sum()) - 3.0)
    assert facts["relative_delta"] == pytest.approx(abs(facts["delta"]) / 3.0)
    steps = facts["steps"]
    assert steps > 2
    assert len(runs) == 2 + 2 * steps - 2  # the scan, the baseline, and 2 + 4 + ... + steps
    before = IntegratedGradients(steps=steps // 2, tolerance=None).attribute(net, x, [ClassLogit(0)])
    assert before.facts[0]["relative_delta"] > 0.02
    assert not answer.notes


def test_says_so_where_the_last_quadrature_is_not_enough_either():
    net, x = Scored(lambda v: (v[:, 0] - 1).relu()), voxels(4.0)
    answer = IntegratedGradients(steps=2, tolerance=1e-9, max_steps=5).attribute(net, x, [ClassLogit(0)])
    assert answer.facts[0]["steps"] == 5
    assert answer.notes == [
        "class-0: the map does not add up to the score's change as closely as was asked; raise max_steps, or tolerance"
    ]
    assert not IntegratedGradients(steps=2, tolerance=None).attribute(net, x, [ClassLogit(0)]).notes


def test_blames_rounding_where_nothing_else_is_left():
    # In single precision the scores, of a million, differ by a rounding of theirs; more steps change nothing.
    net = Scored(lambda v: 1e6 + (0.01 * (v[:, 0] - 1).relu() + v[:, 1]) - v[:, 1]).float()
    method = IntegratedGradients(steps=2, tolerance=1e-6, max_steps=4)
    (note,) = method.attribute(net, voxels(4.0, 3.0).float(), [ClassLogit(0)]).notes
    assert note.startswith("class-0: the map misses the score's change from the baseline by rounding alone")


def test_a_volume_keeps_its_steps_whatever_its_batch_mates_need():
    kinks = Scored(lambda v: (v[:, 0] - 1).relu() + 0.1 * (v[:, 1] - 0.3).relu())
    both = torch.cat([voxels(4.0, 0.1), voxels(0.5, 0.2), voxels(1.3, 2.0)])
    method = IntegratedGradients(steps=2, tolerance=0.01, batch=3)
    together = method.attribute(kinks, both, [ClassLogit(0)])
    for number, x in enumerate(both.split(1)):
        alone = method.attribute(kinks, x, [ClassLogit(0)])
        assert_close(together.maps[0][number], alone.maps[0][0])
        assert together.facts[0]["steps"][number] == alone.facts[0]["steps"]
    assert len(set(together.facts[0]["steps"])) > 1


@pytest.mark.parametrize("axes", [2, 3])
def test_batches_of_points_change_nothing(volume, axes):
    net, x = random_net(axes=axes), volume if axes == 3 else volume[..., 0]
    maps = [IntegratedGradients("mean", steps=7, tolerance=None, batch=b)(net, x, PredictedClass()) for b in (1, 3, 99)]
    assert_close(maps[1], maps[0])
    assert_close(maps[2], maps[0])


def test_the_baseline_is_asked_of_the_class_that_was_predicted_for_the_scan():
    class Sides(nn.Module):
        def forward(self, x):
            mean = x.mean((2, 3, 4))
            return torch.cat([2 * mean, -mean], dim=1)

    x = torch.ones(1, 1, 2, 2, 2, dtype=torch.float64)
    answer = IntegratedGradients(-1.0).attribute(Sides(), x, [PredictedClass()])
    assert answer.facts[0]["baseline_score"] == -2.0
    assert_close(answer.maps[0], torch.full_like(x, 4 / 8))


def test_a_volume_that_is_its_own_baseline_gets_zeros(volume):
    answer = IntegratedGradients(volume, steps=2).attribute(random_net(), volume, [ClassLogit(0)])
    assert_close(answer.maps[0], torch.zeros_like(volume))
    assert answer.facts[0]["relative_delta"] == [0.0, 0.0]


def test_what_is_small_beside_what_cancels_is_not_asked_more_closely_than_it_can_be():
    net = Scored(lambda v: 1e4 * v[:, 0].sin() - 1e4 * v[:, 1].sin() + 1e-3 * v[:, 0])
    answer = IntegratedGradients(steps=8, max_steps=8).attribute(net, voxels(2.0, 2.0).float(), [ClassLogit(0)])
    assert not answer.notes


# --- baselines ---


def test_blur_is_in_millimetres_of_the_inputs_grid(volume):
    x = torch.zeros(1, 1, 31, 31, 31, dtype=torch.float64)
    x[..., 15, 15, 15] = 1
    grid = Grid((31, 31, 31), np.diag([2.0, 1.0, 0.5, 1.0]))
    for context, sigmas in ((Context(grid=grid), (0.75, 1.5, 3.0)), (Context(), (1.5, 1.5, 1.5))):
        blurred = baseline_of(x, "blur", 1.5, context)[0, 0]
        assert_close(float(blurred.sum()), 1.0, rtol=1e-3, atol=0)
        at = torch.arange(31, dtype=torch.float64) - 15
        for axis, sigma in enumerate(sigmas):
            along = blurred.sum([a for a in range(3) if a != axis])
            assert float((along * at**2).sum()) ** 0.5 == pytest.approx(sigma, rel=0.01)
    text = IntegratedGradients("blur", blur=1.5, steps=1).attribute(
        random_net(), volume, [ClassLogit(0)], Context(grid=Grid(volume.shape[2:], np.eye(4)))
    )
    assert text.facts[0]["baseline"] == "blur, 1.5 mm"


def test_blur_leaves_a_constant_as_it_is():
    x = torch.full((1, 2, 5, 6), 3.0)
    assert_close(baseline_of(x, "blur", 40.0, Context()), x)


def test_mean_is_each_channels_own(volume):
    x = torch.cat([volume, volume + 5], dim=1)
    assert_close(baseline_of(x, "mean", 1.0, Context()), x.mean((2, 3, 4), keepdim=True).expand_as(x))


def test_a_scan_is_read_as_the_model_would_see_it(volume):
    asked = []

    def read(path):
        asked.append(path)
        return torch.full((1, 1, *volume.shape[2:]), 2.0)

    net = Linear3d([1.0], [[1.0]])
    context = Context(input_of=read)
    answer = IntegratedGradients("normal/mean.nii.gz").attribute(net, volume, [ClassLogit(0)], context)
    assert asked == ["normal/mean.nii.gz"]
    assert_close(answer.maps[0], (volume - 2) / volume[0, 0].numel())
    assert answer.facts[0]["baseline"] == "normal/mean.nii.gz"


@pytest.mark.parametrize(
    ("baseline", "context", "told"),
    [
        ("blurr", Context(), "unknown baseline 'blurr'; did you mean 'blur'"),
        ("scan.nii.gz", Context(), "the baseline scan scan.nii.gz cannot be read here"),
        (
            "scan.nii.gz",
            Context(input_of=lambda path: torch.zeros(1, 1, 7, 9, 12)),
            r"the baseline scan scan.nii.gz is \(1, 1, 7, 9, 12\), the model's input \(2, 1, 7, 9, 11\)",
        ),
        (torch.zeros(3, 1, 7, 9, 11), Context(), r"given as a tensor is \(3, 1, 7, 9, 11\)"),
    ],
)
def test_a_baseline_that_does_not_fit_is_told(volume, baseline, context, told):
    with pytest.raises(BaselineError, match=told):
        IntegratedGradients(baseline).attribute(random_net(), volume, [ClassLogit(0)], context)


# --- expected gradients ---


@pytest.mark.parametrize("samples", [4, 6, 3])
def test_of_a_linear_model_is_the_weight_times_the_difference_from_the_mean_baseline(volume, samples):
    net, baselines = Linear3d([1.0], [[2.0]]), [0.0, 1.0, 5.0]
    answer = ExpectedGradients(baselines, samples=samples, batch=2).attribute(net, volume, [ClassLogit(0)])
    facts = answer.facts[0]
    drawn = facts["baseline_score"][0] / 2  # the mean of those drawn, of which there may be one more than of others
    assert drawn == pytest.approx(2.0) or samples == 4
    assert facts["baselines"] == 3
    assert_close(answer.maps[0], 2 * (volume - drawn) / volume[0, 0].numel())
    assert max(map(abs, facts["delta"])) < 1e-12


def test_of_a_quadratic_tends_to_its_expectation():
    # x^2 from b: (x - b)(x + b) = x^2 - b^2 for every b; the mean over b of 0 and 2 at x = 3 is 7.
    answer = ExpectedGradients([0.0, 2.0], samples=400).attribute(
        Scored(lambda v: v[:, 0] ** 2), voxels(3.0), [ClassLogit(0)]
    )
    assert float(answer.maps[0]) == pytest.approx(7.0, rel=0.03)
    assert answer.facts[0]["baseline_score"] == pytest.approx(2.0)
    assert answer.facts[0]["delta"] == pytest.approx(float(answer.maps[0]) - 7.0)


def test_of_one_baseline_tends_to_integrated_gradients(volume, other):
    net = random_net()
    expected = IntegratedGradients(other, steps=200, tolerance=None)(net, volume, ClassLogit(1))
    result = ExpectedGradients([other], samples=200, batch=20)(net, volume, ClassLogit(1))
    assert float((result - expected).abs().max()) < 0.02 * float(expected.abs().max())


def test_a_tensor_holds_a_baseline_in_each_row_and_batches_change_nothing(volume):
    rows = torch.randn(5, *volume.shape[1:], dtype=volume.dtype, generator=torch.Generator().manual_seed(2))
    net = random_net()
    whole = ExpectedGradients(rows, samples=7)(net, volume, PredictedClass())
    for same in (ExpectedGradients(list(rows.split(1)), samples=7), ExpectedGradients(rows, samples=7, batch=4)):
        assert_close(same(net, volume, PredictedClass()), whole)
    other = ExpectedGradients(rows, samples=7, seed=1)(net, volume, PredictedClass())
    assert float((other - whole).abs().max()) > 1e-3 * float(whole.abs().max())


def test_each_baseline_of_a_folder_is_read_once(tmp_path, volume):
    for number in range(3):
        nib.save(nib.Nifti1Image(np.full(volume.shape[2:], number, np.float32), np.eye(4)), tmp_path / f"{number}.nii")
    (tmp_path / ".hidden").write_text("no scan")
    asked = []

    def read(path):
        asked.append(path.name)
        return torch.from_numpy(nib.load(path).get_fdata())[None, None]

    net, context = Linear3d([1.0], [[1.0]]), Context(input_of=read)
    for given in (str(tmp_path), str(tmp_path / "*.nii")):
        asked.clear()
        answer = ExpectedGradients(given, samples=9, batch=4).attribute(net, volume, [ClassLogit(0)], context)
        assert asked == ["0.nii", "1.nii", "2.nii"]
        assert_close(answer.maps[0], (volume - 1) / volume[0, 0].numel())


def test_a_folder_of_baselines_starts_where_scans_do(tmp_path, volume, monkeypatch):
    (tmp_path / "study" / "controls").mkdir(parents=True)
    for number in range(2):
        (tmp_path / "study" / "controls" / f"{number}.nii").touch()
    monkeypatch.chdir(tmp_path)
    asked = []
    # A relative folder, as a config's is: whoever reads starts from it too.
    for folder in (Path("study"), tmp_path / "study"):

        def read(path, folder=folder):
            asked.append((folder / path).resolve(strict=True))
            return torch.zeros_like(volume[:1])

        for given in (
            "controls",
            "controls/*.nii",
            str(tmp_path / "study/controls"),
            ["controls/0.nii", "controls/1.nii"],
        ):
            asked.clear()
            method, context = ExpectedGradients(given, samples=4), Context(input_of=read, folder=folder)
            method.attribute(random_net(), volume[:1], [ClassLogit(0)], context)
            assert asked == [tmp_path / "study" / "controls" / f"{number}.nii" for number in range(2)]
    with pytest.raises(BaselineError, match=f"no baseline scans in 'nowhere/.*' below {tmp_path}/study; give"):
        ExpectedGradients("nowhere/*.nii").attribute(random_net(), volume, [ClassLogit(0)], context)


def test_baselines_may_be_one_word_a_number_or_arrays(volume):
    net, target = random_net(), ClassLogit(0)
    rows = np.stack([np.zeros(volume.shape[1:]), np.ones(volume.shape[1:])])
    for given, same in (
        ("zero", [0.0]),
        (1, [1.0]),
        (np.float32(0.5), [0.5]),
        (rows, [0.0, 1.0]),
        (list(rows[:, None]), [0, 1]),
    ):
        assert_close(
            ExpectedGradients(given, samples=4)(net, volume, target),
            ExpectedGradients(same, samples=4)(net, volume, target),
        )
    assert_close(
        IntegratedGradients(rows[1:], steps=4, tolerance=None)(net, volume, target),
        IntegratedGradients(np.int16(1), steps=4, tolerance=None)(net, volume, target),
    )


@pytest.mark.parametrize("given", [None, [], "nowhere/*.nii"])
def test_asks_for_its_baselines(volume, given):
    with pytest.raises(BaselineError, match=r"baselines.*a pattern such as"):
        ExpectedGradients(given)(random_net(), volume, ClassLogit(0))


# --- both ---


@pytest.mark.parametrize(
    ("method", "settings", "told"),
    [
        (IntegratedGradients, {"steps": 0}, "integrated-gradients: steps is a whole number of at least 1, not 0"),
        (IntegratedGradients, {"tolerance": 0}, "tolerance is a number above 0, not 0"),
        (IntegratedGradients, {"steps": 64, "max_steps": 32}, "max_steps is 32, less than the first 64 steps"),
        (IntegratedGradients, {"blur": "much"}, "blur is a number above 0, not 'much'"),
        (ExpectedGradients, {"samples": 2.5}, "expected-gradients: samples is a whole number"),
    ],
)
def test_settings_without_a_meaning_are_refused(method, settings, told):
    with pytest.raises(SettingError, match=told):
        method(**settings)


@pytest.mark.parametrize("method", [IntegratedGradients("mean", steps=9), ExpectedGradients([0.0, 1.0], samples=9)])
def test_tells_its_progress(volume, method):
    told = []
    context = Context(progress=lambda what, done, of: told.append((done, of)))
    method.attribute(Linear3d([1.0], [[1.0]]), volume, [ClassLogit(0)], context)
    assert told == [(done, 9) for done in range(1, 10)]


def test_the_gradient_does_not_saturate_where_the_score_does(volume):
    # The reason for all this: of a saturated score the gradient is 0 everywhere, the change is not.
    net = Scored(lambda v: v.sum(1).clamp(max=1.0))
    x = volume.abs() + 1
    assert float(InputGradient()(net, x, ClassLogit(0)).abs().max()) == 0
    answer = IntegratedGradients(steps=64, tolerance=None).attribute(net, x / x.numel() * 4, [ClassLogit(0)])
    assert min(values.sum().item() for values in answer.maps[0]) > 0.9
