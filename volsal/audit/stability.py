"""Does the map stay when the scan changes in a way that does not matter?

Each nuisance changes a volume as another acquisition might: noise, gain and offset, a small movement, a mirror.  The
map of the changed volume is carried back through the known movement and compared with the original.  Where the model's
answer changes, the map has reason to: those are dropped, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from volsal.audit.metric import Figure, MetricError, Undefined, flaw_of
from volsal.audit.similarity import Compared, Similarity, similarity
from volsal.grid import Grid
from volsal.resampling import resample


class Nuisance(Protocol):
    """A change of a volume (1, C, I, J, K) on a grid that should not matter."""

    #: Whether voxels change their place.
    moves: ClassVar[bool]

    @property
    def name(self) -> str:
        """What it is, with its size."""

    def apply(self, volume: Tensor, grid: Grid, random: np.random.Generator) -> Tensor:
        """The changed volume, on the same voxels."""

    def back(self, values: NDArray, grid: Grid) -> NDArray:
        """A map (I, J, K) of the changed volume, put where it belongs in the original; 0 where it is not known."""


@dataclass(frozen=True)
class Noise:
    """Gaussian noise; ``snr`` is the standard deviation of each channel over that of its noise."""

    snr: float = 20.0

    moves: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """As in tables."""
        return f"noise, SNR {self.snr:g}"

    def apply(self, volume: Tensor, grid: Grid, random: np.random.Generator) -> Tensor:
        """``volume`` with noise drawn anew."""
        sigma = volume.std((0, 2, 3, 4), keepdim=True) / self.snr
        return volume + sigma * torch.from_numpy(random.standard_normal(tuple(volume.shape))).to(volume)

    def back(self, values: NDArray, grid: Grid) -> NDArray:
        """Nothing has moved."""
        return values


@dataclass(frozen=True)
class Gain:
    """Each channel times ``scale``, plus ``shift`` of its standard deviations."""

    scale: float = 1.05
    shift: float = 0.05

    moves: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """As in tables."""
        return f"intensity x {self.scale:g}, {self.shift:+g} SD"

    def apply(self, volume: Tensor, grid: Grid, random: np.random.Generator) -> Tensor:
        """The same at every draw."""
        return self.scale * volume + self.shift * volume.std((0, 2, 3, 4), keepdim=True)

    def back(self, values: NDArray, grid: Grid) -> NDArray:
        """Nothing has moved."""
        return values


@dataclass(frozen=True)
class Movement:
    """The patient turned about the field's centre by ``degrees`` about x, y and z, in this order, and moved by ``mm``.

    What comes in from beyond the field is its outermost voxels repeated.
    """

    degrees: tuple[float, float, float] = (0.0, 0.0, 5.0)
    mm: tuple[float, float, float] = (0.0, 0.0, 0.0)

    moves: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """As in tables."""
        return f"moved by {_triple(self.degrees)} degrees, {_triple(self.mm)} mm"

    def motion(self, grid: Grid) -> NDArray[np.float64]:
        """(4, 4): where a point of the patient lies afterwards, mm."""
        turn = np.eye(3)
        for axis, angle in enumerate(np.radians(self.degrees)):
            about = np.eye(3)
            first, second = [other for other in range(3) if other != axis]
            sign = -1 if axis == 1 else 1  # y turns z towards x
            about[first, first] = about[second, second] = np.cos(angle)
            about[first, second], about[second, first] = -sign * np.sin(angle), sign * np.sin(angle)
            turn = about @ turn
        centre = grid.world((np.array(grid.shape) - 1) / 2)
        motion = np.eye(4)
        motion[:3, :3], motion[:3, 3] = turn, centre - turn @ centre + self.mm
        return motion

    def apply(self, volume: Tensor, grid: Grid, random: np.random.Generator) -> Tensor:
        """The same at every draw."""
        moved = self.motion(grid) @ grid.affine
        return resample(volume, Grid(grid.shape, moved), grid, field=_widened(Grid(grid.shape, moved)))

    def back(self, values: NDArray, grid: Grid) -> NDArray:
        """The map turned and moved back; 0 where it lay outside the field."""
        return resample(values, Grid(grid.shape, np.linalg.inv(self.motion(grid)) @ grid.affine), grid)


@dataclass(frozen=True)
class Mirror:
    """The volume mirrored along an array axis, 0 to 2: for models that should not care for sides, and only for them."""

    axis: int = 0

    moves: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """As in tables."""
        return f"mirrored along axis {self.axis}"

    def apply(self, volume: Tensor, grid: Grid, random: np.random.Generator) -> Tensor:
        """The same at every draw."""
        return volume.flip(2 + self.axis)

    def back(self, values: NDArray, grid: Grid) -> NDArray:
        """Mirrored back."""
        return np.flip(values, self.axis)


#: Small changes of each kind; no mirror, since which axis should not matter is for a person to say.
NUISANCES: tuple[Nuisance, ...] = (Noise(), Gain(), Movement(), Movement((0, 0, 0), (3.0, 2.0, 4.0)))


@dataclass(frozen=True)
class Stability:
    """How alike maps are under one nuisance, over its draws.

    Attributes
    ----------
    nuisance : its name
    similarities : of those draws in which the model's answer stayed
    dropped : draws in which it changed
    max_sensitivity : see :func:`stability`
    lipschitz : see :func:`stability`
    """

    nuisance: str
    similarities: tuple[Similarity, ...]
    dropped: int
    max_sensitivity: Figure
    lipschitz: Figure


def stability(
    explain: Callable[[Tensor], NDArray],
    decide: Callable[[Tensor], Hashable],
    volume: Tensor,
    grid: Grid,
    nuisances: Sequence[Nuisance] = NUISANCES,
    draws: int = 1,
    seed: int = 0,
) -> list[Stability]:
    r"""The map of a volume beside the maps of changed copies of it.

    Maps are compared where both are known: after a movement not where they came in from outside.  Beside similarities,
    for nuisances that leave voxels in place,

    .. math:: \max_d \frac{\lVert R(x + d) - R(x) \rVert}{\lVert R(x) \rVert}, \qquad
              \max_d \frac{\lVert R(x + d) - R(x) \rVert}{\lVert d \rVert}

    the relative max-sensitivity (Yeh et al., NeurIPS 2019, definition 3.1) and the local Lipschitz estimate (Alvarez-
    Melis and Jaakkola, NeurIPS 2018, section 4), over the draws: lower bounds of what a search would find.  From 0 up,
    low is good; a map that ignores the scan has 0, so that neither speaks for a map alone.

    Parameters
    ----------
    explain : volume (1, C, I, J, K) to its map (I, J, K), for a target that stays
    decide : volume to the model's answer, such as its class
    draws : of each nuisance; only noise differs between them

    Raises
    ------
    MetricError
        Where a map does not have the volume's voxels.
    """
    if tuple(volume.shape[2:]) != grid.shape:
        raise MetricError(f"the volume is {tuple(volume.shape)}, its grid {grid.shape}; expected (1, C, *grid.shape)")
    values, answer = explain(volume), decide(volume)
    return [
        _under(nuisance, explain, lambda changed: decide(changed) == answer, volume, values, grid, draws, seed)
        for nuisance in nuisances
    ]


def _under(
    nuisance: Nuisance,
    explain: Callable[[Tensor], NDArray],
    stays: Callable[[Tensor], bool],
    volume: Tensor,
    values: NDArray,
    grid: Grid,
    draws: int,
    seed: int,
) -> Stability:
    known = nuisance.back(np.ones(grid.shape, np.float32), grid) > 0.999
    found: list[Similarity] = []
    steps: list[tuple[float, float]] = []
    for draw in range(draws):
        changed = nuisance.apply(volume, grid, np.random.default_rng((seed, draw)))
        if not stays(changed):
            continue
        after = nuisance.back(explain(changed), grid)
        found.append(similarity(values, after, grid, None if known.all() else known))
        steps.append((float(np.linalg.norm(after - values)), float((changed - volume).norm())))
    return Stability(nuisance.name, tuple(found), draws - len(found), *_bounds(nuisance, values, steps))


def _bounds(nuisance: Nuisance, values: NDArray, steps: Sequence[tuple[float, float]]) -> tuple[Figure, Figure]:
    """Max-sensitivity and the Lipschitz estimate from (change of the map, change of the input)."""
    reason = flaw_of(values)
    if nuisance.moves:
        reason = Undefined("voxels have moved")
    elif not steps:
        reason = Undefined("the model's answer changed at every draw")
    elif not all(step > 0 for _, step in steps):
        reason = Undefined("the input did not change")
    if reason:
        return reason, reason
    size = float(np.linalg.norm(values))
    return max(moved for moved, _ in steps) / size, max(moved / step for moved, step in steps)


def agreement(
    maps: Mapping[str, NDArray], grid: Grid, within: NDArray[np.bool_] | None = None
) -> dict[tuple[str, str], Similarity]:
    """How alike the maps (I, J, K) of several methods are, by pair of names.

    Agreement is no proof: methods that share a fault agree.  Disagreement says that at most one of them is right.
    """
    prepared = {name: Compared(values, grid, within) for name, values in maps.items()}
    return {(one, other): prepared[one].with_(prepared[other]) for one, other in combinations(maps, 2)}


def _widened(grid: Grid) -> Grid:
    """The same voxels, with as many again on every side."""
    affine = grid.affine.copy()
    affine[:3, 3] = grid.world(-np.array(grid.shape))
    return Grid(tuple(3 * n for n in grid.shape), affine)


def _triple(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
