"""What would a map score that knows nothing?  Every localisation figure stands beside such nulls.

Random nulls are drawn many times and give a p-value: the voxels of the map permuted, which keeps its values; a random
smooth map with its spectrum and values, which keeps its blobs too; and the mask moved elsewhere, which keeps the map.
References are single maps that need no model: a blob in the middle, the image, and its edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from volsal.audit.localization import LOCALIZATION, box_of, localization
from volsal.audit.metric import Figure, MetricError, Undefined, numbers, require_on
from volsal.grid import Grid

Null = Literal["permuted", "smooth", "moved mask"]
NULLS: tuple[Null, ...] = ("permuted", "smooth", "moved mask")

# Places tried for a mask before it is said to have no other place.
_TRIES = 200


@dataclass(frozen=True)
class NullTest:
    """A localisation figure beside what a null scores.

    Attributes
    ----------
    metric, null : their names
    observed : the map's own figure
    draws, undefined : how many draws there were, and in how many of them the metric was undefined
    mean, low, high : of the draws' figures, with their 2.5 and 97.5 percentiles
    p_value : see :func:`p_value`
    """

    metric: str
    null: str
    observed: Figure
    draws: int
    undefined: int
    mean: Figure
    low: Figure
    high: Figure
    p_value: Figure


def null_tests(
    values: NDArray,
    mask: NDArray[np.bool_],
    grid: Grid,
    nulls: Sequence[Null] = NULLS,
    metrics: Sequence[str] | None = None,
    draws: int = 99,
    seed: int = 0,
    within: NDArray[np.bool_] | None = None,
    **choices: Any,
) -> list[NullTest]:
    """Each metric of :data:`volsal.audit.localization.LOCALIZATION`, or those named, against each null.

    Parameters
    ----------
    values, mask, grid, within, choices : as for :class:`volsal.audit.localization.Comparison`
    draws : of each null; the least p-value is 1 / (1 + draws)
    seed : the same seed draws the same

    Raises
    ------
    MetricError
        As :class:`volsal.audit.localization.Comparison`, and for an unknown null.
    """
    observed = localization(values, mask, grid, metrics, within=within, **choices)
    return [
        test
        for null in nulls
        for test in _tests(
            null,
            observed,
            [
                localization(*pair, grid, metrics, within=within, **choices)
                for pair in null_pairs(null, values, mask, grid, draws, seed, within)
            ],
            draws,
        )
    ]


def null_pairs(
    null: Null,
    values: NDArray,
    mask: NDArray[np.bool_],
    grid: Grid,
    draws: int,
    seed: int = 0,
    within: NDArray[np.bool_] | None = None,
) -> Iterator[tuple[NDArray, NDArray[np.bool_]]]:
    """(map, mask) as often as asked, of which one is drawn; fewer where a mask finds no other place.

    Raises
    ------
    MetricError
        For an unknown null, or arrays that do not lie on the grid.
    """
    require_on(grid, map=values, mask=mask, within=within)
    if null not in NULLS:
        raise MetricError(f"unknown null {null!r}; known: {', '.join(NULLS)}")
    for draw in range(draws):
        random = np.random.default_rng((seed, NULLS.index(null), draw))
        if null == "permuted":
            yield permuted(values, random, within), mask
        elif null == "smooth":
            yield smooth_random(values, random, within), mask
        else:
            moved = moved_mask(mask, random, within)
            if moved is None:
                return
            yield values, moved


def permuted(values: NDArray, random: np.random.Generator, within: NDArray[np.bool_] | None = None) -> NDArray:
    """The map with its voxels in random order; those outside ``within`` stay where they are."""
    if within is None:
        return random.permutation(values.ravel()).reshape(values.shape)
    mixed = values.copy()
    mixed[within] = random.permutation(values[within])
    return mixed


def smooth_random(values: NDArray, random: np.random.Generator, within: NDArray[np.bool_] | None = None) -> NDArray:
    """A random map with the amplitude spectrum of ``values`` and exactly its values.

    The phases are those of white noise; then the r-th largest of the map's values goes where the r-th largest of the
    result lies, within ``within`` and outside of it, so that the spectrum is kept nearly, and the values exactly.
    """
    noise = np.fft.rfftn(random.standard_normal(values.shape))
    amplitude = np.abs(np.fft.rfftn(np.nan_to_num(values)))
    drawn = np.fft.irfftn(amplitude * noise / np.abs(noise), s=values.shape, axes=(0, 1, 2))
    placed = values.copy()
    for part in [np.ones(values.shape, bool)] if within is None else [within, ~within]:
        inside = np.sort(values[part])
        inside[np.argsort(drawn[part])] = inside.copy()
        placed[part] = inside
    return placed


def moved_mask(
    mask: NDArray[np.bool_], random: np.random.Generator, within: NDArray[np.bool_] | None = None
) -> NDArray[np.bool_] | None:
    """The mask mirrored along random array axes and shifted by whole voxels to a random place inside the field.

    With ``within`` as much of it must lie there as of the mask itself.  None where no such place is found, or the mask
    is empty.
    """
    if not mask.any():
        return None
    box = box_of(mask)
    shape = mask[box]
    room = [n - side for n, side in zip(mask.shape, shape.shape, strict=True)]
    needed = 0 if within is None else int(np.count_nonzero(mask & within))
    for _ in range(_TRIES):
        turned = shape[tuple(slice(None, None, int(step)) for step in random.choice([-1, 1], 3))]
        corner = [int(random.integers(free + 1)) for free in room]
        place = tuple(slice(at, at + n) for at, n in zip(corner, shape.shape, strict=True))
        if within is not None and np.count_nonzero(turned & within[place]) < needed:
            continue
        moved = np.zeros_like(mask)
        moved[place] = turned
        return moved
    return None


def references(grid: Grid, image: NDArray | None = None) -> dict[str, NDArray]:
    """Maps that need no model, by name: ``centre blob``, and with an image (I, J, K) ``intensity`` and ``edges``.

    The blob is a Gaussian at the field's centre, its standard deviation a quarter of the field's shortest side.
    Intensity counts from the image's least value.  Edges are the length of the gradient, per mm.
    """
    maps = {"centre blob": centre_blob(grid)}
    if image is not None:
        require_on(grid, image=image)
        maps["intensity"] = image - image.min()
        maps["edges"] = gradient_per_mm(image, grid)
    return maps


def centre_blob(grid: Grid) -> NDArray[np.float64]:
    """A Gaussian of height 1 in the middle of the field of view; see :func:`references`."""
    sigma = float((grid.spacing * grid.shape).min()) / 4
    away = [np.arange(n) - (n - 1) / 2 for n in grid.shape]
    metric = grid.affine[:3, :3].T @ grid.affine[:3, :3]  # so that the blob is round in mm, whatever the axes
    i, j, k = np.ix_(*away)
    squared = metric[0, 0] * i**2 + metric[1, 1] * j**2 + metric[2, 2] * k**2
    squared = squared + 2 * (metric[0, 1] * i * j + metric[0, 2] * i * k + metric[1, 2] * j * k)
    return np.exp(-0.5 * squared / sigma**2)


def gradient_per_mm(image: NDArray, grid: Grid) -> NDArray[np.float64]:
    """(I, J, K) length of the image's gradient, per mm; central differences, one-sided at the field's edge."""
    axes = [
        np.gradient(image.astype(np.float64), axis=axis) if n > 1 else np.zeros(image.shape)
        for axis, n in enumerate(image.shape)
    ]
    into = np.linalg.inv(grid.affine[:3, :3])  # d/dx = sum over axes of d/di * di/dx
    return np.sqrt(sum(sum(along * into[axis, w] for axis, along in enumerate(axes)) ** 2 for w in range(3)))


def p_value(observed: Figure, drawn: Sequence[Figure], better: str = "higher") -> Figure:
    r"""How often a null does as well: one-sided, never 0.

    .. math:: p = \frac{1 + \#\{null \ge observed\}}{1 + n}

    with the smaller or equal ones where lower is better.  Phipson and Smyth, SAGMB 2010.  Draws in which the metric is
    undefined are left out of both.
    """
    if isinstance(observed, Undefined):
        return observed
    known = numbers([figure for figure in drawn if not isinstance(figure, Undefined)])
    if not len(known):
        return Undefined("no draw of the null has a figure")
    as_good = known <= observed if better == "lower" else known >= observed
    return float((1 + np.count_nonzero(as_good)) / (1 + len(known)))


def _tests(
    null: str, observed: dict[str, Figure], drawn: Sequence[dict[str, Figure]], draws: int
) -> Iterator[NullTest]:
    for metric, figure in observed.items():
        figures = [draw[metric] for draw in drawn]
        known = numbers([one for one in figures if not isinstance(one, Undefined)])
        spread: tuple[Figure, Figure, Figure] = (Undefined("no draw of the null has a figure"),) * 3
        if len(known):
            low, high = np.percentile(known, (2.5, 97.5))
            spread = float(known.mean()), float(low), float(high)
        chance = p_value(figure, figures, LOCALIZATION[metric].better)
        yield NullTest(metric, null, figure, draws, draws - len(known), *spread, chance)
