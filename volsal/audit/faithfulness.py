"""Does the score move where the map says?  Voxels are removed in the map's order, and beside it in orders of chance.

Removing by blurring or by a constant makes inputs that no scanner makes, and the score may fall for that alone.  No
figure here stands without its controls: the same removal, of the same size, elsewhere.

Volumes are (1, C, *spatial) tensors, maps (I, J, K) arrays on the same voxels.  ``score`` takes volumes (N, C,
*spatial) and returns their scores (N,); all figures are in its unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from volsal.attribution.gradients.baselines import baseline_of
from volsal.attribution.method import Context
from volsal.audit.metric import Figure, MetricError, Undefined, flaw_of, require_on
from volsal.audit.nulls import p_value
from volsal.audit.similarity import pearson
from volsal.grid import Grid

Score = Callable[[Tensor], Tensor]
Baseline = Literal["blur", "mean", "zero"] | Tensor

Control = Literal["permuted", "displaced"]
CONTROLS: tuple[Control, ...] = ("permuted", "displaced")
Kind = Literal["deletion", "insertion"]
KINDS: tuple[Kind, ...] = ("deletion", "insertion")

# So many sets of random places that lie too near one another are passed over before it is said that there is no room.
_TRIES = 500


class Scorer:
    """Runs ``score`` on a few volumes at a time, and counts them.

    Parameters
    ----------
    score : volumes (N, C, *spatial) to their scores (N,)
    batch : how many volumes at a time
    """

    def __init__(self, score: Score, batch: int = 8) -> None:
        self._score, self._batch = score, batch
        #: How many volumes were scored.
        self.calls = 0

    def __call__(self, volumes: Iterable[Tensor]) -> NDArray[np.float64]:
        """(N,) scores of volumes (1, C, *spatial), made as they are needed.

        Raises
        ------
        MetricError
            Where there is not one finite score for each volume.
        """
        found: list[NDArray[np.float64]] = []
        waiting: list[Tensor] = []
        for volume in volumes:
            waiting.append(volume)
            if len(waiting) == self._batch:
                found.append(self._run(waiting))
                waiting = []
        if waiting:
            found.append(self._run(waiting))
        return np.concatenate(found) if found else np.empty(0)

    def _run(self, volumes: Sequence[Tensor]) -> NDArray[np.float64]:
        with torch.no_grad():
            scores = self._score(torch.cat(list(volumes)))
        self.calls += len(volumes)
        if tuple(scores.shape) != (len(volumes),):
            raise MetricError(f"score gave {tuple(scores.shape)} for {len(volumes)} volumes; expected one number each")
        numbers = scores.detach().cpu().double().numpy()
        if not np.isfinite(numbers).all():
            raise MetricError("score gave NaN or infinity for a volume with voxels removed; is it a logit?")
        return numbers


def removed(volume: Tensor, baseline: Baseline, grid: Grid, blur_mm: float = 12.0) -> Tensor:
    """What stands where voxels are removed, (1, C, *spatial).

    ``blur`` is the volume itself through a Gaussian of ``blur_mm`` standard deviation; ``mean`` each channel's mean;
    ``zero`` 0, which is air only if preprocessing makes it so; or a tensor of the volume's shape.
    """
    return baseline_of(volume, baseline, blur_mm, Context(grid=grid))


# ---- curves


@dataclass(frozen=True, eq=False)
class Curve:
    """The score while voxels are removed, or put back.

    Attributes
    ----------
    shares : (L + 1,) of the voxels that count, removed or put back, from 0 to 1
    scores : (L + 1,)
    """

    shares: NDArray[np.float64]
    scores: NDArray[np.float64]

    @property
    def area(self) -> float:
        """Area under the score against the share, by trapezoids; Petsiuk et al., RISE, BMVC 2018, section 4.2.

        Without bounds, in the score's unit.  Of a deletion low is good, of an insertion high; a score that does not
        move has its own value.
        """
        return float(np.trapezoid(self.scores, self.shares))

    @property
    def aopc(self) -> float:
        r"""Area over the perturbation curve; Samek et al., IEEE TNNLS 2017, eq. 12, of one volume.

        .. math:: \frac{1}{L + 1} \sum_{k=0}^{L} \big(f(x_0) - f(x_k)\big)

        Without bounds, in the score's unit; 0 where the score does not move.  Of most relevant first high is good, of
        least relevant first low.  All steps count alike, so that steps of equal shares are expected.
        """
        return float((self.scores[0] - self.scores).mean())


def order_of(
    values: NDArray,
    regions: NDArray[np.integer] | None = None,
    within: NDArray[np.bool_] | None = None,
    seed: int = 0,
) -> NDArray[np.float64]:
    """When each voxel is removed, most relevant first: (I, J, K), the share of voxels removed before it, in [0, 1).

    Parameters
    ----------
    values : (I, J, K) signed: evidence against the score goes last
    regions : (I, J, K) labels; a region goes as one, by its mean value, and the shares count its voxels.  None: each
        voxel is its own
    within : the voxels that are removed at all; those outside are infinite
    seed : equal values go in random order; in the array's order they would sweep the volume
    """
    counts = np.ones(values.shape, bool) if within is None else within
    chosen = values[counts].astype(np.float64)
    labels = np.arange(len(chosen)) if regions is None else np.unique(regions[counts], return_inverse=True)[1].ravel()
    sizes = np.bincount(labels)
    means = np.bincount(labels, chosen) / sizes
    mixed = np.random.default_rng(seed).permutation(len(means))
    order = mixed[np.argsort(-means[mixed], kind="stable")]
    before = np.empty(len(means))
    before[order] = np.cumsum(sizes[order]) - sizes[order]
    out = np.full(values.shape, np.inf)
    out[counts] = before[labels] / len(chosen)
    return out


def boxes(grid: Grid, edge_mm: float) -> NDArray[np.int64]:
    """(I, J, K) labels of boxes that tile the grid, their edges the whole number of voxels nearest to ``edge_mm``."""
    edges = np.maximum(1, np.round(edge_mm / grid.spacing)).astype(int)
    counts = -(-np.array(grid.shape) // edges)
    i, j, k = np.ix_(*(np.arange(n) // edge for n, edge in zip(grid.shape, edges, strict=True)))
    return (i * counts[1] + j) * counts[2] + k


def deletion(score: Scorer, volume: Tensor, order: NDArray[np.float64], baseline: Tensor, steps: int = 20) -> Curve:
    """The score while the voxels go, in ``order`` (see :func:`order_of`), ``steps`` equal shares of them at a time.

    RISE's deletion with a baseline of zeros.  A region goes whole, at the step in which its first voxel would; the
    curve's shares are what has gone.
    """
    return _curve(score, volume, baseline, order, steps)


def insertion(score: Scorer, volume: Tensor, order: NDArray[np.float64], baseline: Tensor, steps: int = 20) -> Curve:
    """The score while the voxels come back, from the baseline to the volume; RISE's insertion with a blurred one.

    Voxels outside ``within`` of the order stay as in the volume.
    """
    inside = torch.from_numpy(np.isfinite(order)).to(volume.device)
    return _curve(score, torch.where(inside, baseline, volume), volume, order, steps)


def _curve(score: Scorer, start: Tensor, end: Tensor, order: NDArray[np.float64], steps: int) -> Curve:
    if steps < 1 or order.shape != tuple(start.shape[2:]):
        raise MetricError(f"{steps} steps over an order {order.shape} of a volume {tuple(start.shape)}")
    when = torch.from_numpy(order).to(start.device)
    # A share of k / n voxels and its step are the same number up to rounding.
    limits = np.linspace(0, 1, steps + 1) - 1e-9
    volumes = (torch.where(when < float(limit), end, start) for limit in limits)
    moving = np.sort(order[np.isfinite(order)])
    return Curve(np.searchsorted(moving, limits) / len(moving), score(volumes))


@dataclass(frozen=True, eq=False)
class Deletion:
    """A map's deletion beside orders of chance.

    Attributes
    ----------
    most_first, least_first : the curves in the map's order and in the reverse
    controls : the curves of the controls
    delta : mean area of the controls minus the map's, Delta AUPC; above 0 is better than chance
    p_value : how often a control's area is as small: (1 + as small) / (1 + n)
    calls : volumes that were scored
    """

    most_first: Curve
    least_first: Curve
    controls: tuple[Curve, ...]
    delta: float
    p_value: Figure
    calls: int


def delta_aupc(
    score: Scorer,
    volume: Tensor,
    values: NDArray,
    baseline: Tensor,
    control: Control = "displaced",
    draws: int = 9,
    steps: int = 20,
    regions: NDArray[np.integer] | None = None,
    within: NDArray[np.bool_] | None = None,
    seed: int = 0,
) -> Deletion | Undefined:
    r"""How much faster the score falls in the map's order than in orders of chance.

    .. math:: \Delta AUPC = \overline{AUPC(\text{control})} - AUPC(R)

    Jin et al., AAAI 2022 and Medical Image Analysis 2023, with the area under the score itself.  Without bounds, in the
    score's unit; 0 is chance.  Undefined for a map that is empty, constant, or holds NaN.

    Parameters
    ----------
    control : ``permuted``, voxels (or regions) in random order, as in the papers, which any smooth map may beat, since
        scattered holes do other harm than compact ones; ``displaced``, the map's own order mirrored along random axes
        and shifted around, so that what goes at each step has the size and shape of what goes by the map
    """
    flaw = flaw_of(values if within is None else values[within])
    if flaw:
        return flaw
    if control not in CONTROLS:
        raise MetricError(f"unknown control {control!r}; known: {', '.join(CONTROLS)}")
    before = score.calls
    least, most = (
        deletion(score, volume, order_of(ordered, regions, within, seed), baseline, steps)
        for ordered in (-values, values)
    )
    controls = []
    for draw in range(draws):
        order = order_of(_shuffled(values, control, seed, draw), regions, within, seed)
        controls.append(deletion(score, volume, order, baseline, steps))
    areas = [curve.area for curve in controls]
    delta = float(np.mean(areas)) - most.area
    chance = p_value(most.area, areas, "lower")
    return Deletion(most, least, tuple(controls), delta, chance, score.calls - before)


def delta_areas(
    score: Scorer,
    volume: Tensor,
    values: NDArray,
    baseline: Tensor,
    draws: int = 3,
    steps: int = 10,
    seed: int = 0,
) -> dict[Kind, dict[Control, float]] | Undefined:
    """How much better than by chance the score falls as voxels go in the map's order, and rises as they come back.

    As :func:`delta_aupc`, for :func:`deletion` and :func:`insertion` beside both controls: for a deletion the mean area
    of the controls minus the map's, for an insertion the reverse, so that above 0 is better than chance in each.
    Without bounds, in the score's unit.  Undefined for a map that is empty, constant, or holds NaN.
    """
    flaw = flaw_of(values)
    if flaw:
        return flaw

    def area(kind: Kind, order: NDArray[np.float64]) -> float:
        run = deletion if kind == "deletion" else insertion
        return (-1 if kind == "deletion" else 1) * run(score, volume, order, baseline, steps).area

    own = order_of(values, seed=seed)
    orders = {
        control: [order_of(_shuffled(values, control, seed, draw), seed=seed) for draw in range(draws)]
        for control in CONTROLS
    }
    found: dict[Kind, dict[Control, float]] = {}
    for kind in KINDS:
        reached = area(kind, own)
        found[kind] = {name: reached - float(np.mean([area(kind, o) for o in of])) for name, of in orders.items()}
    return found


def _shuffled(values: NDArray, control: Control, seed: int, draw: int) -> NDArray:
    """A map that is a control of ``values``."""
    random = np.random.default_rng((seed, draw))
    return random.random(values.shape) if control == "permuted" else displaced(values, random)


def displaced(values: NDArray, random: np.random.Generator) -> NDArray:
    """The map mirrored along random axes and shifted, by a quarter to three quarters of some axis, around its ends."""
    mirrored = values[tuple(slice(None, None, int(step)) for step in random.choice([-1, 1], 3))]
    shifts = [int(random.integers(n)) for n in values.shape]
    far = int(random.integers(3))
    n = values.shape[far]
    shifts[far] = int(random.integers(n // 4, n - n // 4 + 1))
    return np.roll(mirrored, shifts, axis=(0, 1, 2))


# ---- a small intervention where the map peaks


@dataclass(frozen=True, eq=False)
class Intervention:
    """What the score loses when small balls under the map's peaks go, beside as many balls elsewhere.

    Attributes
    ----------
    effect : score of the volume minus score without the balls at the peaks
    control_effects : (n,) the same for balls at random places
    change, control_changes : by how much the input changed: Euclidean norm of the difference, (n,) for the controls
    p_value : how often a control's effect is as large: (1 + as large) / (1 + n)
    ratio : the effect over the median size of the controls' effects; about 1 is chance, undefined where that is 0
    peaks : (P, 3) voxels at which the balls lie
    calls : volumes that were scored
    """

    effect: float
    control_effects: NDArray[np.float64]
    change: float
    control_changes: NDArray[np.float64]
    p_value: Figure
    ratio: Figure
    peaks: NDArray[np.int64]
    calls: int


def intervene(
    score: Scorer,
    volume: Tensor,
    values: NDArray,
    grid: Grid,
    baseline: Tensor,
    radius_mm: float = 9.0,
    peaks: int = 1,
    controls: int = 19,
    candidates: int = 1,
    within: NDArray[np.bool_] | None = None,
    seed: int = 0,
) -> Intervention | Undefined:
    """Put the baseline in balls of ``radius_mm`` about the map's highest places, and about random ones.

    Parameters
    ----------
    values : (I, J, K); peaks are its maxima above 0, each more than two radii from those before it
    baseline : (1, C, *spatial), see :func:`removed`
    peaks : at most so many balls, all at once; controls have as many as the map has peaks
    controls : how many random sets of balls; their centres lie in ``within``, more than two radii from every peak and
        from one another
    candidates : random sets that are drawn for each control; those whose change of the input is nearest to that at the
        peaks are taken, so that a control removes about as much of the image, and not air
    within : (I, J, K) where centres of controls may lie, such as the body; None: anywhere

    Undefined where the map has no place (empty, constant, NaN, nothing positive) or the controls no room.
    """
    require_on(grid, map=values, within=within)
    flaw = flaw_of(values)
    if flaw:
        return flaw
    if values.max() <= 0:
        return Undefined("the map has no positive part")
    centres = top_peaks(values, grid, peaks, 2 * radius_mm)
    drawn = _elsewhere(grid, within, centres, 2 * radius_mm, controls * candidates, np.random.default_rng(seed))
    if len(drawn) < controls:
        return Undefined(f"only {len(drawn)} of {controls} controls find room beside the peaks")
    difference = (baseline - volume).abs().square().sum((0, 1)).double().cpu().numpy()
    change = _change(difference, grid, centres, radius_mm)
    changes = np.array([_change(difference, grid, at, radius_mm) for at in drawn])
    nearest = np.argsort(np.abs(changes - change), kind="stable")[:controls] if candidates > 1 else np.arange(controls)
    before = score.calls
    sets = [centres, *(drawn[one] for one in nearest)]
    scores = score([volume, *(_without(volume, baseline, grid, at, radius_mm) for at in sets)])
    effects = scores[0] - scores[1:]
    effect, others = float(effects[0]), effects[1:]
    usual = float(np.median(np.abs(others)))
    ratio: Figure = effect / usual if usual > 0 else Undefined("the controls do not move the score")
    chance = p_value(effect, list(others))
    return Intervention(effect, others, change, changes[nearest], chance, ratio, centres, score.calls - before)


def top_peaks(values: NDArray, grid: Grid, count: int, apart_mm: float) -> NDArray[np.int64]:
    """(P, 3) voxels of the largest values above 0, each farther than ``apart_mm`` from those before it; P <= count."""
    left = values.copy()
    found: list[NDArray[np.int64]] = []
    while len(found) < count:
        at = np.array(np.unravel_index(int(left.argmax()), left.shape))
        if left[tuple(at)] <= 0:
            break
        found.append(at)
        box, ball = ball_at(grid, at, apart_mm)
        left[box][ball] = 0
    return np.array(found).reshape(-1, 3)


def ball_at(grid: Grid, voxel: NDArray, radius_mm: float) -> tuple[tuple[slice, ...], NDArray[np.bool_]]:
    """The box around a ball about a voxel, cut at the field's edge, and which of its voxels' centres lie inside."""
    # The half-width of an ellipsoid's bounding box: rows of the inverse affine, scaled by the radius.
    reach = radius_mm * np.linalg.norm(np.linalg.inv(grid.affine[:3, :3]), axis=1)
    low = np.maximum(np.ceil(voxel - reach - 1e-9), 0).astype(int)
    high = np.minimum(np.floor(voxel + reach + 1e-9) + 1, grid.shape).astype(int)
    ijk = np.stack(np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij"), axis=-1)
    away = np.linalg.norm((ijk - voxel) @ grid.affine[:3, :3].T, axis=-1)
    return tuple(slice(a, b) for a, b in zip(low, high, strict=True)), away <= radius_mm + 1e-9


def _elsewhere(
    grid: Grid,
    within: NDArray[np.bool_] | None,
    peaks: NDArray[np.int64],
    apart_mm: float,
    sets: int,
    random: np.random.Generator,
) -> list[NDArray[np.int64]]:
    """Up to ``sets`` sets of as many centres as there are peaks, (P, 3) each, apart from these and one another."""
    free = np.ones(grid.shape, bool) if within is None else within.copy()
    for peak in peaks:
        box, ball = ball_at(grid, peak, apart_mm)
        free[box] &= ~ball
    voxels = np.argwhere(free)
    pairs = np.triu_indices(len(peaks), 1)
    found: list[NDArray[np.int64]] = []
    for _ in range(sets + _TRIES if len(voxels) else 0):
        if len(found) == sets:
            break
        centres = voxels[random.integers(len(voxels), size=len(peaks))]
        world = grid.world(centres)
        if (np.linalg.norm(world[pairs[0]] - world[pairs[1]], axis=1) > apart_mm).all():
            found.append(centres)
    return found


def _balls(grid: Grid, centres: NDArray[np.int64], radius_mm: float) -> NDArray[np.bool_]:
    inside = np.zeros(grid.shape, bool)
    for centre in centres:
        box, ball = ball_at(grid, centre, radius_mm)
        inside[box] |= ball
    return inside


def _change(squares: NDArray[np.float64], grid: Grid, centres: NDArray[np.int64], radius_mm: float) -> float:
    """Norm of the change of the input that removing balls makes; squares (I, J, K) of the whole change."""
    total = 0.0
    for centre in centres:  # they do not overlap
        box, ball = ball_at(grid, centre, radius_mm)
        total += float(squares[box][ball].sum())
    return float(np.sqrt(total))


def _without(volume: Tensor, baseline: Tensor, grid: Grid, centres: NDArray[np.int64], radius_mm: float) -> Tensor:
    inside = torch.from_numpy(_balls(grid, centres, radius_mm)).to(volume.device)
    return torch.where(inside, baseline, volume)


def remove_region(score: Scorer, volume: Tensor, baseline: Tensor, region: NDArray[np.bool_]) -> float:
    """What the score loses when a region (I, J, K) goes: f(x) - f(x without it); in the score's unit, signed."""
    inside = torch.from_numpy(region).to(volume.device)
    whole, without = score([volume, torch.where(inside, baseline, volume)])
    return float(whole - without)


# ---- sums of the map against changes of the score


def faithfulness_correlation(
    score: Scorer,
    volume: Tensor,
    values: NDArray,
    baseline: Tensor,
    regions: NDArray[np.integer],
    share: float = 0.2,
    draws: int = 50,
    seed: int = 0,
) -> Figure:
    r"""Whether sums of the map over random sets of regions go with what the score loses without them.

    .. math:: \mathrm{corr}_S \Big( \sum_{i \in S} R_i, \; f(x) - f(x_{S \to baseline}) \Big)

    Bhatt et al., IJCAI 2020, eq. 1, for maps in units of the score's change (gradient times input, occlusion), signed.
    In [-1, 1]; 0 is chance.  Undefined where either side does not vary.

    Parameters
    ----------
    regions : (I, J, K) labels, such as :func:`boxes`
    share : of the regions in a set
    """
    labels = np.unique(regions, return_inverse=True)[1].reshape(regions.shape)
    mass = np.bincount(labels.ravel(), values.ravel().astype(np.float64))
    chosen = max(1, round(share * len(mass)))
    random = np.random.default_rng(seed)
    sets = np.zeros((draws, len(mass)), bool)
    for one in sets:
        one[random.choice(len(mass), chosen, replace=False)] = True
    where = torch.from_numpy(labels).to(volume.device)
    volumes = (torch.where(torch.from_numpy(one).to(volume.device)[where], baseline, volume) for one in sets)
    return pearson(sets @ mass, float(score([volume])[0]) - score(volumes))


def infidelity(
    score: Scorer, volume: Tensor, gradient: NDArray, noise: float, draws: int = 50, seed: int = 0
) -> Figure:
    r"""How badly a gradient-like map predicts what noise does to the score, as a share of what it does.

    .. math:: \frac{E_I \big[ (I^T R - (f(x) - f(x - I)))^2 \big]}{E_I \big[ (f(x) - f(x - I))^2 \big]}

    Yeh et al., NeurIPS 2019, definition 2.1 with Gaussian I, over its value for a map of zeros.  From 0 up; 1 for an
    empty map.  Only for maps in units of score per input: gradients, not their products with the input.  Undefined
    where the score does not move, or the map holds NaN.

    Parameters
    ----------
    gradient : (C, I, J, K), or (I, J, K) for one channel
    noise : standard deviation of I, in the input's unit
    """
    if not np.isfinite(gradient).all():
        return Undefined("the map holds NaN or infinity")
    map_ = torch.from_numpy(np.ascontiguousarray(gradient)).double().reshape(tuple(volume.shape))
    generator = torch.Generator().manual_seed(seed)
    expected: list[float] = []

    def moved() -> Iterable[Tensor]:
        for _ in range(draws):
            step = noise * torch.randn(volume.shape, generator=generator, dtype=torch.float64)
            expected.append(float((step * map_).sum()))
            yield volume - step.to(volume)

    changes = float(score([volume])[0]) - score(moved())
    size = float((changes**2).mean())
    return float(((np.array(expected) - changes) ** 2).mean()) / size if size > 0 else Undefined("noise moves nothing")
