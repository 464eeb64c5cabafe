"""Does the score move where a map says?  Small balls are taken out of a scan, at a place asked about and elsewhere.

As :func:`volsal.audit.faithfulness.intervene`, for many maps of one scan: the balls elsewhere are scored once, and each
place is compared with those of them that change the input about as much.  Evidence that is spread too widely for a ball
is taken out with all that a map holds highest, and compared with what is highest in the same map moved elsewhere, as
deep in the body.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from torch import Tensor

from volsal.audit.faithfulness import Scorer, ball_at, removed
from volsal.audit.metric import Undefined
from volsal.audit.nulls import p_value
from volsal.audit.subject import Subject

# Balls elsewhere are drawn so many times as often as they are needed, so that some change the input as much.
_POOL = 3
# A map, or a map that was moved, is as high in at most so many times the voxels asked about, where several are equal.
_EQUALS = 1.5
# What is highest in a map that was moved has at most this share of its voxels where they were, at most that share in
# twice as many of the highest, and is at least this share of them; so many ways are tried for each that is needed.
_OVERLAP, _NEARLY, _ENOUGH, _TRIES = 0.25, 0.5, 1 / 3, 15
# The body's shells, in each of which as many voxels are chosen.
_SHELLS = 3
# The axes along which a map is mirrored, and by how far it is then moved.
_Way = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Trial:
    """What the score loses without some voxels, a ball at one place or others, beside as many elsewhere.

    Attributes
    ----------
    voxel, mm : (3,) the ball's centre, or the map's peak, and where that lies
    effect : score of the scan minus score without them
    controls : (n,) the same of those elsewhere
    p_value : how often one of these has as large an effect: (1 + as large) / (1 + n)
    """

    voxel: NDArray[np.int64]
    mm: NDArray[np.float64]
    effect: float
    controls: NDArray[np.float64]
    p_value: float

    @property
    def beyond(self) -> float:
        """The effect above the median of the controls', in the score's unit."""
        return self.effect - float(np.median(self.controls))


class Probe:
    """A scan, of which balls are taken away.

    Parameters
    ----------
    subject : the scan
    radius_mm : of the balls
    controls : how many balls elsewhere each place is compared with
    blur_mm : a ball is filled with the scan through a Gaussian of this standard deviation
    seed : of the places elsewhere
    """

    def __init__(
        self, subject: Subject, radius_mm: float, controls: int = 19, blur_mm: float = 12.0, seed: int = 0
    ) -> None:
        self.subject, self.radius_mm, self.controls, self.seed = subject, radius_mm, controls, seed
        self.scorer = Scorer(subject.score)
        self._baseline = removed(subject.volume, "blur", subject.grid, blur_mm)
        difference = (self._baseline - subject.volume).square().sum((0, 1)).double().cpu().numpy()
        self._difference: NDArray[np.float64] = difference
        self._known: dict[tuple[int, ...], float] = {}

    @cached_property
    def _pool(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """(P, 3) centres, half of them in the body; (P,) how much they change the input, and their effects."""
        random = np.random.default_rng(self.seed)
        number = _POOL * self.controls
        body = np.argwhere(self.subject.body.mask)
        anywhere = random.integers(self.subject.grid.shape, size=(number - number // 2, 3))
        centres = np.concatenate([body[random.integers(len(body), size=number // 2)], anywhere])
        changes = np.array([self._change(at) for at in centres])
        return centres, changes, self.effects(centres)

    def effects(self, centres: NDArray[np.int64]) -> NDArray[np.float64]:
        """(P,) what the score loses without a ball at each of (P, 3) voxels."""
        new = [tuple(int(i) for i in at) for at in centres]
        new = [at for at in dict.fromkeys(new) if at not in self._known]
        if new:
            volumes = [self.subject.volume, *(self._without(np.array(at)) for at in new)]
            scores = self.scorer(volumes)
            self._known |= dict(zip(new, (float(loss) for loss in scores[0] - scores[1:]), strict=True))
        return np.array([self._known[tuple(int(i) for i in at)] for at in centres])

    def at(self, voxel: NDArray[np.int64]) -> Trial | Undefined:
        """Take the ball about a voxel away; undefined where no other places are left to compare it with."""
        centres, changes, effects = self._pool
        grid = self.subject.grid
        away = np.linalg.norm(grid.world(centres) - grid.world(voxel), axis=1) > 2 * self.radius_mm
        if np.count_nonzero(away) < self.controls:
            return Undefined("the scan has no room for a ball elsewhere")
        order = np.argsort(np.abs(changes[away] - self._change(voxel)), kind="stable")[: self.controls]
        return self._trial(voxel, float(self.effects(voxel[None])[0]), effects[away][order])

    def of_highest(self, values: NDArray, share: float) -> Trial | Undefined:
        """Take away all voxels at which a map is highest, a ``share`` of the field, or fewer where fewer are above 0.

        They are compared with as many voxels in each shell of the body, and as many outside of it, where the map is
        highest once it is mirrored and moved so that few stay where they were.  Of many such sets those count that
        change the input about as much, and what the score loses by these is scaled to the very same change, for what
        stands out is changed more.  Undefined where there are too few such places, or as for :func:`highest_of`.
        """
        chosen = highest_of(values, share)
        if isinstance(chosen, Undefined):
            return chosen
        peak = np.array(np.unravel_index(int(values.argmax()), values.shape))
        ways = list(self._ways(values, chosen))
        if len(ways) < self.controls:
            return Undefined("what is highest has no room elsewhere")
        change = self._change_of(chosen)
        ways.sort(key=lambda way: abs(way[1] - change))
        sets = (self._moved(values, chosen, *how) for how, _ in ways[: self.controls])
        own, *others = self.without(chain([chosen], sets))
        scale = [change / by if by > 0 else 0.0 for _, by in ways[: self.controls]]
        return self._trial(peak, float(own), np.array(others) * scale)

    def without(self, sets: Iterable[NDArray[np.bool_]]) -> NDArray[np.float64]:
        """What the score loses without the voxels of each of some masks."""
        return self._score - self.scorer(self._without_all(voxels) for voxels in sets)

    def _ways(self, values: NDArray, chosen: NDArray[np.bool_]) -> Iterator[tuple[_Way, float]]:
        """How to mirror and move a map so that what is highest lies elsewhere, and by how much that changes the input.

        Mirrored in place, and moved by about as far as the body's voxels lie from its middle.
        """
        random, number = np.random.default_rng((self.seed, 1)), int(np.count_nonzero(chosen))
        (middle, _), (_, far) = _extent(chosen), _extent(self.subject.body.mask)
        nearly = _highest(values, 2 * number)
        found = 0
        for _ in range(_TRIES * self.controls):
            mirrored = tuple(axis for axis in range(3) if random.random() < 0.5)
            back = [2 * middle[axis] - values.shape[axis] + 1 if axis in mirrored else 0.0 for axis in range(3)]
            shift = tuple(int(step) for step in np.rint(back + random.normal(0, far)))
            other = self._moved(values, chosen, mirrored, shift)
            there, still, near = (np.count_nonzero(each) for each in (other, other & chosen, other & nearly))
            if _ENOUGH * number <= there <= _EQUALS * number and still <= _OVERLAP * there and near <= _NEARLY * there:
                found += 1
                yield (mirrored, shift), self._change_of(other)
            if found == _POOL * self.controls:
                return

    def _moved(
        self, values: NDArray, chosen: NDArray[np.bool_], mirrored: tuple[int, ...], shift: tuple[int, ...]
    ) -> NDArray[np.bool_]:
        """Where a map that was mirrored and moved is highest, in as many voxels of each part of the field."""
        moved = np.roll(np.flip(values, mirrored), shift, (0, 1, 2))
        found = np.zeros_like(chosen)
        for part in self._parts:
            found[part] = _highest(moved[part], int(np.count_nonzero(chosen & part)))
        return found

    @cached_property
    def _parts(self) -> list[NDArray[np.bool_]]:
        """What lies outside of the body, and shells of it of about one size, from its surface to its middle.

        Evidence is the likelier the deeper, and a map that does not know where may still keep to the middle.
        """
        body, grid = self.subject.body.mask, self.subject.grid
        if body.all():
            return [body]
        image = sitk.GetImageFromArray(body.astype(np.uint8))
        image.SetSpacing([float(mm) for mm in grid.spacing[::-1]])
        found = sitk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=True)
        depth = -sitk.GetArrayViewFromImage(found)
        ends = np.quantile(depth[body], np.linspace(0, 1, _SHELLS + 1)[1:-1])
        shell = np.where(body, 1 + np.searchsorted(ends, depth), 0)
        return [shell == number for number in range(_SHELLS + 1)]

    def _change_of(self, voxels: NDArray[np.bool_]) -> float:
        return float(np.sqrt(self._difference[voxels].sum()))

    def _without_all(self, voxels: NDArray[np.bool_]) -> Tensor:
        """The scan with the blurred one in these voxels."""
        inside = torch.from_numpy(voxels).to(self.subject.volume.device)
        return torch.where(inside, self._baseline, self.subject.volume)

    @cached_property
    def _score(self) -> float:
        return float(self.scorer([self.subject.volume])[0])

    def _trial(self, voxel: NDArray[np.int64], effect: float, controls: NDArray[np.float64]) -> Trial:
        chance = p_value(effect, list(controls))
        assert not isinstance(chance, Undefined)
        return Trial(voxel, self.subject.grid.world(voxel), effect, controls, chance)

    def _change(self, centre: NDArray[np.int64]) -> float:
        box, ball = ball_at(self.subject.grid, centre, self.radius_mm)
        return float(np.sqrt(self._difference[box][ball].sum()))

    def _without(self, centre: NDArray[np.int64]) -> Tensor:
        box, ball = ball_at(self.subject.grid, centre, self.radius_mm)
        volume = self.subject.volume.clone()
        where = (slice(None), slice(None), *box)
        inside = torch.from_numpy(ball).to(volume.device)
        volume[where] = torch.where(inside, self._baseline[where], volume[where])
        return volume


def peak_of(values: NDArray, within: NDArray[np.bool_] | None = None) -> NDArray[np.int64] | Undefined:
    """(3,) the voxel of a map's largest value, in ``within``; undefined where nothing there is above 0."""
    chosen = values if within is None else np.where(within, values, -np.inf)
    if chosen.max() <= 0:
        return Undefined("the map has no positive part" if within is None else "the map has none of it there")
    return np.array(np.unravel_index(int(chosen.argmax()), values.shape))


def highest_of(values: NDArray, share: float) -> NDArray[np.bool_] | Undefined:
    """The mask of a map's highest voxels, a ``share`` of the field, or fewer where fewer are above 0.

    Undefined where none is, or where many more voxels are equally high.
    """
    number = max(1, round(share * values.size))
    chosen = _highest(values, number)
    if not chosen.any():
        return Undefined("the map has no positive part")
    if np.count_nonzero(chosen) > _EQUALS * number:
        return Undefined(f"the map is equally high at far more than {share:.2g} of the field")
    return chosen


def _highest(values: NDArray, number: int) -> NDArray[np.bool_]:
    """Where so many values, with those equal to the least of them, are highest; only where they are above 0."""
    if not number:
        return np.zeros(values.shape, bool)
    least = np.partition(values, -number, axis=None)[-number]
    return values >= least if least > 0 else values > 0


def _extent(mask: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(3,) the mean and the standard deviation of a mask's voxels along each axis."""
    found = []
    for axis, size in enumerate(mask.shape):
        weights = mask.sum(axis=tuple(other for other in range(3) if other != axis))
        mean = np.average(np.arange(size), weights=weights)
        found.append((mean, np.average((np.arange(size) - mean) ** 2, weights=weights) ** 0.5))
    means, spreads = zip(*found, strict=True)
    return np.array(means), np.array(spreads)
