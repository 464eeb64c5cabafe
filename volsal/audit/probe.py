"""Does the score move where a map says?  Small balls are taken out of a scan, at a place asked about and elsewhere.

As :func:`volsal.audit.faithfulness.intervene`, for many maps of one scan: the balls elsewhere are scored once, and each
place is compared with those of them that change the input about as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from volsal.audit.faithfulness import Scorer, ball_at, removed
from volsal.audit.metric import Undefined
from volsal.audit.nulls import p_value
from volsal.audit.subject import Subject

# Balls elsewhere are drawn so many times as often as they are needed, so that some change the input as much.
_POOL = 3


@dataclass(frozen=True, eq=False)
class Trial:
    """What the score loses without a ball at one place, beside balls elsewhere.

    Attributes
    ----------
    voxel, mm : (3,) the ball's centre, and where that lies
    effect : score of the scan minus score without the ball
    controls : (n,) the same of the balls elsewhere
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
        effect, others = float(self.effects(voxel[None])[0]), effects[away][order]
        chance = p_value(effect, list(others))
        assert not isinstance(chance, Undefined)
        return Trial(voxel, grid.world(voxel), effect, others, chance)

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
