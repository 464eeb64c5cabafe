"""RISE: many random masks at once, and the standard error of what they say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from volsal.attribution.method import Context
from volsal.attribution.perturbation.perturbation import (
    Copies,
    Lengths,
    Perturbation,
    Reading,
    accurate,
    per_volume,
)
from volsal.attribution.settings import SettingError, require_positive, require_whole

# Masks made at a time when the map is put together, bytes.
_SLAB_BYTES = 64 << 20
# A map of pure noise passes for one that holds something in less than this share of cases.
_FALSE_ALARM = 0.01


@dataclass(frozen=True, kw_only=True)
class RISE(Perturbation):
    r"""Randomized input sampling, Petsiuk et al., BMVC 2018, section 3, in any number of axes.

    Masks are low-resolution lattices of cells that are kept with ``probability`` p, shifted at random by less than a
    cell and interpolated linearly, so that the mean of a mask is p at every voxel.  What a mask hides is filled.
    The map is eq. 6 less the mean score, with the sample covariance's N - 1:

    .. math:: L_v = \frac{1}{p} \frac{1}{N - 1} \sum_i (S_i - \bar S) \, M_{iv}

    an unbiased estimate of cov(S, M_v) / p: how much higher the score is on average where the voxel is kept than
    overall.  Eq. 6 alone adds the mean score to every voxel, and with it the mask's own noise.  Maps
    (B, 1, *spatial), signed, as wide as a cell: a voxel shares what its neighbours within a cell are worth.

    ``facts`` hold ``standard_error``, the median over voxels of the map's standard error in parts of its largest
    magnitude; ``strongest``, the largest magnitude in standard errors of a map of noise; and ``noise_below``, what
    ``strongest`` must reach for the map to be more than that (at least 3; more where many cells have a chance of
    their own, so that 1 map of noise in 100 passes).  A map that does not reach it gets a note.

    Parameters
    ----------
    cell_mm : edge of a mask's cell, mm: one number, or one for each axis of the model's input
    cell : the same in voxels; replaces ``cell_mm``.  Needed where no grid is known
    masks : how many; the standard error falls with its square root
    probability : of keeping a cell

    Others as in :class:`volsal.attribution.perturbation.perturbation.Perturbation`.
    """

    cell_mm: Lengths = 30.0
    cell: Lengths | None = None
    masks: int = 1000
    probability: float = 0.5

    id: ClassVar[str] = "rise"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole(self.id, 2, masks=self.masks)
        require_positive(self.id, probability=self.probability)
        if not self.probability < 1:
            raise SettingError(f"{self.id}: probability lies between 0 and 1, not {self.probability!r}")

    def copies(self, shape: Sequence[int], context: Context) -> int:
        """One for each mask."""
        self.in_voxels("cell", shape, context)
        return self.masks

    def prepare(self, volume: Tensor, context: Context) -> Copies:
        """The copies, mask by mask."""
        cell = self.in_voxels("cell", volume.shape, context) or ()
        return _Masks(volume, self.filling(volume, cell, context), cell, self)


class _Masks(Copies):
    def __init__(self, volume: Tensor, fill: Tensor, cell: Sequence[float], settings: RISE) -> None:
        self._volume, self._cell, self._settings = volume, cell, settings
        self._dtype = accurate(volume)
        self._fill = fill.to(self._dtype)
        self.count = settings.masks
        self.settled = cell

    def mask(self, number: int) -> Tensor:
        """Mask ``number``, (*spatial), in [0, 1]: its draws are its own, whichever masks were made before."""
        random = np.random.default_rng((self._settings.seed, number))
        size = self._volume.shape[2:]
        # One knot for the random shift by less than a cell, and one more than there are cells.
        knots = [2 + math.ceil((n - 1) / cell) for n, cell in zip(size, self._cell, strict=True)]
        mask = torch.from_numpy(random.random(knots) < self._settings.probability).to(self._volume.device, self._dtype)
        for n, cell, count, shift in zip(size, self._cell, knots, random.random(len(size)), strict=True):
            # The first axis of knots becomes the last axis of voxels.
            mask = torch.tensordot(mask, _between(n, cell, count, shift).to(mask), dims=([0], [1]))
        return mask

    def change(self, number: int, copy: Tensor) -> None:
        fill = self._fill.expand(copy.shape)
        copy.copy_(torch.lerp(fill, copy.to(self._dtype), self.mask(number).expand(copy.shape)))

    def read(self, original: Tensor, scores: Tensor) -> Reading:
        """The map and its standard error, from sums over the masks, which are made a second time."""
        targets, batch = original.shape
        size, p, n = self._volume.shape[2:], self._settings.probability, self.count
        voxels = math.prod(size)
        centred = (scores - scores.mean(0)).reshape(n, -1).T.to(self._volume.device, self._dtype)
        first = torch.zeros(targets * batch, voxels, dtype=self._dtype, device=self._volume.device)
        second, spread = torch.zeros_like(first), torch.zeros_like(first[0])
        chunk = max(1, _SLAB_BYTES // (voxels * first.element_size()))
        for start in range(0, n, chunk):
            numbers = range(start, min(n, start + chunk))
            masks = torch.stack([self.mask(number).flatten() for number in numbers]) - p
            squares = masks.square()
            spread += squares.sum(0)
            # One by one, so that a map has the same bits alone and beside others.
            for row, by, by_square in zip(centred[:, start : start + chunk], first, second, strict=True):
                by += row @ masks
                by_square += row.square() @ squares
        maps = first / ((n - 1) * p)
        error = ((second / n - (first / n).square()).clamp(min=0) / (n - 1)).sqrt() / p
        # What the standard error is where score and mask have nothing to do with each other; it varies less.
        idle = (centred.square().sum(1, keepdim=True) * spread / (n - 1)).sqrt() / ((n - 1) * p)
        top = maps.abs().amax(1)
        share = torch.where(top > 0, error.median(1).values / top, 0).reshape(targets, batch)
        strongest = torch.where(idle > 0, maps.abs() / idle, 0).amax(1).reshape(targets, batch)
        needed = max(3.0, reached_by_noise([(m - 1) / c for m, c in zip(size, self._cell, strict=True)], _FALSE_ALARM))
        facts = [
            {"masks": n, "standard_error": per_volume(a), "strongest": per_volume(b), "noise_below": needed}
            for a, b in zip(share, strongest, strict=True)
        ]
        return Reading(
            list(maps.reshape(targets, batch, 1, *size)), facts, _notes((strongest < needed).any(1).tolist())
        )


def _notes(noise: Sequence[bool]) -> list[str]:
    """What to tell of targets of which some volume's map is noise."""
    if not any(noise):
        return []
    where = "the map" if all(noise) else f"map {', '.join(str(i) for i, is_noise in enumerate(noise, 1) if is_noise)}"
    return [f"nothing in {where} stands out of the noise of the random masks: it shows no evidence; try more masks"]


def reached_by_noise(cells: Sequence[float], share: float) -> float:
    """How many standard errors the largest magnitude of a map of pure noise exceeds in that ``share`` of maps.

    ``cells`` is the map's extent along each axis in cells.  The map of noise is a smooth Gaussian random field, so this
    is the level at which its expected Euler characteristic, Worsley et al., Human Brain Mapping 1996, eq. 2, is half
    the share (half, since either sign counts).
    """
    # The correlation at a distance of d cells is 1 - 1.5 d^2 near 0: the variance of the slope per cell is 3.
    roughness = 3.0
    sizes = [1.0]  # intrinsic volumes of the box: elementary symmetric polynomials of its edges
    for edge in cells:
        sizes = [a + edge * b for a, b in zip([*sizes, 0], [0, *sizes], strict=True)]

    def expected(level: float) -> float:
        total, hermite = 1 - NormalDist().cdf(level), [1.0, level]
        for axes, size in enumerate(sizes[1:], 1):
            density = (roughness / (2 * math.pi)) ** (axes / 2) / math.sqrt(2 * math.pi) * math.exp(-(level**2) / 2)
            total += size * density * hermite[axes - 1]
            hermite.append(level * hermite[axes] - axes * hermite[axes - 1])
        return total

    low, high = 2.0, 20.0  # above 2 it falls
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if expected(middle) > share / 2 else (low, middle)
    return high


def _between(size: int, cell: float, knots: int, shift: float) -> Tensor:
    """(size, knots) linear interpolation weights of voxels between knots a ``cell`` apart, from ``shift`` cells on."""
    at = np.arange(size) / cell + shift
    low = np.floor(at).astype(int)
    weights = np.zeros((size, knots))
    weights[np.arange(size), low] = 1 - (at - low)
    weights[np.arange(size), low + 1] = at - low
    return torch.from_numpy(weights)
