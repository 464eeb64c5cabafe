"""RISE against what a linear model's map must converge to, and its standard error against repeated runs."""

import pytest
import torch
from conftest import SHAPE
from nets import random_net
from torch import nn
from torch.testing import assert_close

from volsal import RISE, ClassLogit
from volsal.attribution import Context
from volsal.attribution.perturbation.rise import _Masks, reached_by_noise


def linear(weight):
    net = nn.Sequential(nn.Flatten(), nn.Linear(weight.numel(), 1)).double()
    net[1].weight.data = weight.reshape(1, -1)
    return net


def masks(method, volume, count):
    cell = method.in_voxels("cell", volume.shape, Context())
    made = _Masks(volume, torch.zeros_like(volume), cell, method)
    return torch.stack([made.mask(number) for number in range(count)])


def tent(distance, cell):
    """Covariance, in parts of p (1 - p), of two voxels of a randomly shifted lattice with linear interpolation.

    It is the tent function convolved with itself, a cubic B-spline of integral 1.
    """
    d = (distance / cell).abs()
    near = 2 / 3 - d**2 + d**3 / 2
    far = (2 - d).clamp(min=0) ** 3 / 6
    return torch.where(d < 1, near, far)


def covariance(size, cell, p):
    return p * (1 - p) * tent(torch.arange(size).double()[:, None] - torch.arange(size), cell)


@pytest.mark.parametrize("p", [0.3])
def test_masks_have_the_mean_and_the_covariance_of_the_paper(p):
    line = torch.zeros(1, 1, 13, 1, dtype=torch.float64)
    made = masks(RISE(cell=(4.5, 3), masks=2, probability=p), line, 6000)[..., 0]
    assert float(made.min()) >= 0
    assert float(made.max()) <= 1
    assert_close(made.mean(0), torch.full((13,), p).double(), atol=0.025, rtol=0)
    # Along the second axis, one voxel wide, the mask is that axis' own blend of two knots: a factor of 2/3.
    assert_close(torch.cov(made.T), covariance(13, 4.5, p) * 2 / 3, atol=0.01, rtol=0)


@pytest.mark.parametrize("fill", ["zero", "blur"])
def test_on_a_linear_model_it_converges_to_the_masks_covariance_with_the_evidence(fill):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 1, 8, 6, 5, dtype=torch.float64, generator=generator)
    weight = torch.randn(8, 6, 5, dtype=torch.float64, generator=generator)
    method = RISE(cell=(3, 2, 2.5), masks=2000, probability=0.4, fill=fill, batch=200)
    answer = method.attribute(linear(weight), x, [ClassLogit(0)])
    worth = weight * (x - method.filling(x, (3, 2, 2.5), Context()))[0, 0]
    one, two, three = (
        tent(torch.arange(n).double()[:, None] - torch.arange(n), c) for n, c in ((8, 3), (6, 2), (5, 2.5))
    )
    expected = 0.4 * 0.6 / 0.4 * torch.einsum("ai,bj,ck,ijk->abc", one, two, three, worth)
    error = answer.maps[0][0, 0] - expected
    # The standard error that is reported, in the map's own unit, must be the size of the true error.
    reported = answer.facts[0]["standard_error"] * float(answer.maps[0].abs().max())
    assert 0.5 * reported < float(error.abs().median()) / 0.6745 < 1.6 * reported
    assert torch.corrcoef(torch.stack([answer.maps[0].flatten(), expected.flatten()]))[0, 1] > 0.95


def test_the_map_is_the_sample_covariance_of_score_and_mask(volume):
    net, method = random_net().eval(), RISE(cell=3, masks=25, fill="mean", probability=0.35)
    made = masks(method, volume, 25)
    fill = volume.mean((2, 3, 4), keepdim=True)
    with torch.no_grad():
        scores = torch.stack([net(fill + m * (volume - fill))[:, 1] for m in made])  # (25, 2)
    both = torch.cat([scores.T, made.flatten(1).T])
    expected = torch.cov(both)[:2, 2:].reshape(2, 1, *SHAPE) / 0.35
    answer = method.attribute(net, volume, [ClassLogit(1)])
    assert_close(answer.maps[0], expected)


def test_the_standard_error_is_the_spread_of_repeated_runs(volume):
    net = random_net()
    runs = [
        RISE(cell=3, masks=60, seed=seed, batch=60).attribute(net, volume[:1], [ClassLogit(0)]) for seed in range(40)
    ]
    spread = torch.stack([run.maps[0] for run in runs]).std(0).median()
    told = [run.facts[0]["standard_error"] * float(run.maps[0].abs().max()) for run in runs]
    assert sum(told) / len(told) == pytest.approx(float(spread), rel=0.15)


@pytest.mark.parametrize(("size", "cell"), [((12, 14, 16), 4), ((30, 30), 3), ((9, 11, 13), (20, 4, 3))])
def test_noise_stays_below_the_level_that_it_should(size, cell):
    # A score that follows from no place: 400 of them on one set of masks.
    volume = torch.zeros(1, 1, *size)
    method = RISE(cell=cell, masks=300)
    made = _Masks(volume, volume, method.in_voxels("cell", volume.shape, Context()), method)
    noise = torch.randn(300, 400, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reading = made.read(noise[0], noise)
    strongest = torch.tensor([figures["strongest"] for figures in reading.facts])
    cells = [(n - 1) / c for n, c in zip(size, method.in_voxels("cell", volume.shape, Context()), strict=True)]
    assert reading.facts[0]["noise_below"] == max(3, reached_by_noise(cells, 0.01))
    assert float((strongest > reading.facts[0]["noise_below"]).double().mean()) <= 0.02
    assert 0.05 <= float((strongest > reached_by_noise(cells, 0.2)).double().mean()) <= 0.27
    assert float((strongest > 3).double().mean()) > 0.1  # what 3 standard errors would call evidence
    (note,) = reading.notes
    assert note.startswith("nothing in map ")


def test_a_map_of_evidence_says_so():
    x = torch.ones(1, 1, 12, 12, 12, dtype=torch.float64)
    weight = torch.zeros(12, 12, 12, dtype=torch.float64)
    weight[2:5, 3:6, 7:10] = 1
    sure = RISE(cell=4, masks=300, fill="zero", batch=100).attribute(linear(weight), x, [ClassLogit(0)])
    assert not sure.notes
    assert sure.facts[0]["strongest"] > 2 * sure.facts[0]["noise_below"]
    peak = (sure.maps[0][0, 0] == sure.maps[0].max()).nonzero()[0]
    assert float((peak - torch.tensor([3, 4, 8])).abs().max()) <= 2


def test_a_score_that_never_moves_gives_an_empty_map_with_its_note(volume):
    net = random_net()
    net[-1].weight.data.zero_()
    answer = RISE(cell=3, masks=10).attribute(net, volume, [ClassLogit(0)])
    assert not answer.maps[0].any()
    assert answer.facts[0]["strongest"] == [0, 0]
    assert answer.notes


def test_a_constant_added_to_the_score_changes_no_map(volume):
    net, raised = random_net(), random_net()
    raised[-1].bias.data += 1000
    assert_close(
        RISE(cell=3, masks=30)(raised, volume, ClassLogit(0)), RISE(cell=3, masks=30)(net, volume, ClassLogit(0))
    )


def test_a_mask_does_not_depend_on_how_many_are_made(volume):
    few, many = masks(RISE(cell=3, masks=2), volume, 5), masks(RISE(cell=3, masks=500), volume, 9)
    assert torch.equal(few, many[:5])
    assert len({tuple(m.flatten().tolist()) for m in many}) == 9
