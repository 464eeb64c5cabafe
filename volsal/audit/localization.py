"""Does a map lie on the lesion?  Metrics of a map and a mask on one grid.

Relevance is a chosen part of the map, >= 0 (see :func:`volsal.audit.metric.part_of`).  Where several voxels are equal,
nothing depends on the order in which they are stored: rank metrics take the expectation over all orders, and peaks are
all of the tied maxima.

Every metric is undefined for an empty mask, one that covers all, and a map that holds NaN, is empty or is constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volsal.audit.metric import Better, Figure, Metric, MetricError, Part, Undefined, flaw_of, part_of, require_on
from volsal.errors import nearest
from volsal.grid import Grid

# Distances computed at a time.
_PAIRS = 1 << 16


@dataclass(frozen=True, eq=False)
class Comparison:
    """A map beside a mask; what several metrics need of them is computed once.

    Parameters
    ----------
    values : (I, J, K) the map
    mask : (I, J, K) bool, where the truth lies
    grid : where both lie
    within : (I, J, K) bool, the voxels that count, such as the body, or what the model saw; None: all
    part : which part of the map is relevance
    tolerance_mm : a peak so near the mask still hits
    top_share : the share of all voxels that are the "top" ones
    peak_fraction : a local maximum counts as a peak from this share of the map's maximum on

    Raises
    ------
    MetricError
        For arrays of other shapes, a mask that is not boolean, or a setting outside its range.
    """

    values: NDArray
    mask: NDArray[np.bool_]
    grid: Grid
    within: NDArray[np.bool_] | None = None
    part: Part = "positive"
    tolerance_mm: float = 0.0
    top_share: float = 0.01
    peak_fraction: float = 0.5

    def __post_init__(self) -> None:
        require_on(self.grid, map=self.values, mask=self.mask, within=self.within)
        if not self.tolerance_mm >= 0:
            raise MetricError(f"tolerance_mm is {self.tolerance_mm}; expected 0 or more")
        for name in ("top_share", "peak_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise MetricError(f"{name} is {getattr(self, name)}; expected more than 0 and at most 1")

    @cached_property
    def relevance(self) -> NDArray:
        """(I, J, K), >= 0; 0 where voxels do not count."""
        chosen = part_of(self.values, self.part)
        return chosen if self.within is None else np.where(self.within, chosen, 0)

    @cached_property
    def truth(self) -> NDArray[np.bool_]:
        """(I, J, K) the mask, where voxels count."""
        return self.mask if self.within is None else self.mask & self.within

    @cached_property
    def size(self) -> int:
        """How many voxels count."""
        return self.mask.size if self.within is None else int(np.count_nonzero(self.within))

    @cached_property
    def undefined(self) -> Undefined | None:
        """Why no metric has a value here; None where each has."""
        inside = int(np.count_nonzero(self.truth))
        if not inside:
            return Undefined("the mask is empty" if not self.mask.any() else "the mask lies outside what counts")
        if inside == self.size:
            return Undefined("the mask covers everything")
        return flaw_of(self.relevance if self.within is None else self.relevance[self.within])

    @cached_property
    def inside(self) -> NDArray:
        """(n,) relevance in the mask, ascending."""
        return np.sort(self.relevance[self.truth])

    @cached_property
    def everywhere(self) -> NDArray:
        """(N,) relevance of all voxels that count, ascending."""
        return np.sort(self.relevance.ravel() if self.within is None else self.relevance[self.within])

    @cached_property
    def total(self) -> float:
        """Sum of all relevance."""
        return float(self.relevance.sum(dtype=np.float64))

    @property
    def prevalence(self) -> float:
        """The mask's share of the voxels that count."""
        return len(self.inside) / self.size

    def top(self, count: int) -> float:
        """How many of the ``count`` most relevant voxels lie in the mask; the expectation over orders of equal ones."""
        least = self.everywhere[-count]
        above, reaching = (self.size - np.searchsorted(self.everywhere, least, side) for side in ("right", "left"))
        ours_above, ours = (len(self.inside) - np.searchsorted(self.inside, least, side) for side in ("right", "left"))
        return float(ours_above + (ours - ours_above) * (count - above) / (reaching - above))

    @cached_property
    def peaks(self) -> NDArray[np.int64]:
        """(P, 3) the voxels of the maximum."""
        return np.argwhere(self.relevance == self.relevance.max())

    @cached_property
    def centroid_mm(self) -> NDArray[np.float64]:
        """(3,) the mask's centre, mm."""
        return centroid_mm(self.truth, self.grid)


def localization(
    values: NDArray, mask: NDArray[np.bool_], grid: Grid, metrics: Sequence[str] | None = None, **choices: Any
) -> dict[str, Figure]:
    """The figures of a map and a mask, by the metric's name; all of :data:`LOCALIZATION` unless named.

    ``choices`` are the further parameters of :class:`Comparison`.

    Raises
    ------
    MetricError
        As :class:`Comparison`, and for an unknown metric.

    >>> grid = Grid((1, 1, 4), np.eye(4))
    >>> found = localization(np.array([[[6.0, 1, -5, 1]]]), np.array([[[True, False, False, False]]]), grid)
    >>> found["relevance mass"], found["enrichment"], found["AUPRC"]
    (0.75, 3.0, 1.0)
    """
    for name in metrics or ():
        if name not in LOCALIZATION:
            raise MetricError(f"unknown metric {name!r}{nearest(name, LOCALIZATION)}")
    comparison = Comparison(values, mask, grid, **choices)
    if comparison.undefined is not None:
        return dict.fromkeys(metrics or LOCALIZATION, comparison.undefined)
    return {name: LOCALIZATION[name].function(comparison) for name in metrics or LOCALIZATION}


def pointing_game(of: Comparison) -> float:
    r"""1 where a maximum of the map lies in the mask, or within ``tolerance_mm`` of it; 0 for a miss.

    .. math:: \min_{v \in \arg\max R} \; \min_{m \in M} \lVert v - m \rVert_{mm} \le \tau

    Zhang et al., IJCV 2018, section 4, where the tolerance is 15 pixels.  Any of several equal maxima may hit, so that
    a map which is clipped at its top hits easily; its permutations hit as easily, see :mod:`volsal.audit.nulls`.
    0 or 1; chance is the share of the volume within the tolerance of the mask.
    """
    return float(peak_to_mask_mm(of) <= of.tolerance_mm)


def relevance_mass(of: Comparison) -> float:
    r"""Share of the relevance that lies in the mask.

    .. math:: \sum_{v \in M} R_v \Big/ \sum_v R_v

    Arras et al., Information Fusion 2022, relevance mass accuracy.  In [0, 1]; chance is the mask's share of volume.
    """
    return float(of.inside.sum(dtype=np.float64)) / of.total


def relevance_rank(of: Comparison) -> float:
    r"""Share of the mask among as many of the most relevant voxels as the mask has.

    .. math:: |P_{top\,K} \cap M| / |M|, \qquad K = |M|

    Arras et al., Information Fusion 2022, relevance rank accuracy.  In [0, 1]; chance is the mask's share of volume.
    """
    return of.top(len(of.inside)) / len(of.inside)


def enrichment(of: Comparison) -> float:
    r"""How much denser relevance is in the mask than in the whole: share of the relevance over share of the volume.

    .. math:: \frac{\sum_{v \in M} R_v / \sum_v R_v}{|M| / N}

    From 0 to N / abs(M); 1 is chance.
    """
    return relevance_mass(of) / of.prevalence


def top_intersection(of: Comparison) -> float:
    r"""Share of the most relevant voxels that lie in the mask.

    .. math:: |P_{top\,k} \cap M| / k, \qquad k = \text{top\_share} \cdot N

    Theiner et al., WACV 2022, top-k intersection.  In [0, 1], and at most abs(M) / k; chance is the mask's share of
    volume.
    """
    count = max(1, round(of.top_share * of.size))
    return of.top(count) / count


def auprc(of: Comparison) -> float:
    r"""Area under the precision-recall curve of the voxels, as average precision.

    .. math:: \sum_t (r_t - r_{t-1}) \, p_t

    over all values t of the map, equal voxels entering together.  Arun et al., Radiology: AI 2021.  In (0, 1]; chance
    is the mask's share of volume.
    """
    values, counts = np.unique(of.inside, return_counts=True)
    hits = len(of.inside) - np.searchsorted(of.inside, values, "left")
    called = of.size - np.searchsorted(of.everywhere, values, "left")
    return float((counts / len(of.inside) * hits / called).sum())


def roc_auc(of: Comparison) -> float:
    r"""Probability that a voxel of the mask is more relevant than one outside; equal ones count half.

    .. math:: P(R_m > R_o) + P(R_m = R_o) / 2

    Voxelwise, one scan: a large easy background raises it.  In [0, 1]; 0.5 is chance.
    """
    below, reaching = (
        np.searchsorted(of.everywhere, of.inside, side) - np.searchsorted(of.inside, of.inside, side)
        for side in ("left", "right")
    )
    return float((below + reaching).mean() / 2 / (of.size - len(of.inside)))


def peak_to_mask_mm(of: Comparison) -> float:
    """From the map's maximum, the nearest of equal ones, to the nearest voxel centre of the mask; 0 inside, mm."""
    if of.truth[tuple(of.peaks.T)].any():
        return 0.0
    return nearest_mm(of.grid.world(of.peaks), of.grid.world(np.argwhere(of.truth)))


def peak_to_centroid_mm(of: Comparison) -> float:
    """From the map's maximum, the nearest of equal ones, to the mask's centre, mm."""
    return float(np.linalg.norm(of.grid.world(of.peaks) - of.centroid_mm, axis=1).min())


def centroid_to_centroid_mm(of: Comparison) -> float:
    """From the map's centre of relevance to the mask's centre, mm; one far speck draws the map's centre along."""
    return float(np.linalg.norm(centroid_mm(of.relevance, of.grid) - of.centroid_mm))


def peak_to_surface_mm(of: Comparison) -> float:
    """From the map's maximum, the nearest of equal ones, to the nearest voxel of the mask's surface, mm.

    Surface voxels have a face neighbour outside the mask, or lie at the field's edge.  Inside the mask the distance is
    positive too: it says how deep the peak lies.
    """
    surface = of.grid.world(np.argwhere(surface_of(of.truth)))
    return nearest_mm(of.grid.world(of.peaks), surface)


def lesion_hit_rate(of: Comparison) -> float:
    """Share of the mask's connected parts that hold a peak of the map, or have one within ``tolerance_mm``.

    Parts are connected by faces, edges or corners.  A peak is a voxel not below any of its 26 neighbours, with at
    least ``peak_fraction`` of the map's maximum.  In [0, 1]; chance from permuted maps.
    """
    peaks = local_peaks(of.relevance, of.peak_fraction)
    parts = components(of.truth)
    hit = set(parts[tuple(peaks.T)].tolist()) - {0}
    numbers = range(1, int(parts.max()) + 1)
    if of.tolerance_mm > 0:
        places = of.grid.world(peaks)
        hit |= {part for part in numbers if part not in hit and _reached(of, places, parts == part)}
    return len(hit) / len(numbers)


def _reached(of: Comparison, places: NDArray[np.float64], part: NDArray[np.bool_]) -> bool:
    """Whether one of the places, (P, 3) mm, lies within the tolerance of a part of the mask."""
    voxels = of.grid.world(np.argwhere(part))
    low, high = voxels.min(axis=0) - of.tolerance_mm, voxels.max(axis=0) + of.tolerance_mm
    near = places[((places >= low) & (places <= high)).all(axis=1)]
    return bool(len(near)) and nearest_mm(near, voxels) <= of.tolerance_mm


def nearest_mm(points: NDArray[np.float64], others: NDArray[np.float64], below: float = np.inf) -> float:
    """Distance of the nearest two of ``points`` (P, 3) and ``others`` (M, 3), mm; ``below`` where none are so near.

    Exact on any grid.  Plateaus of many equal maxima have more pairs than fit into memory or time: the larger set is
    halved, and halves whose boxes lie no nearer than a pair that is known are passed over.
    """
    if len(points) * len(others) <= _PAIRS:
        # Not by a product of matrices, which loses digits far from the origin.
        return min(below, float(np.linalg.norm(points[:, None] - others[None], axis=2).min()))
    large, small = (points, others) if len(points) >= len(others) else (others, points)
    along = int(np.ptp(large, axis=0).argmax())
    halves = np.split(large[np.argpartition(large[:, along], len(large) // 2)], [len(large) // 2])
    for apart, half in sorted(((_between_boxes(half, small), half) for half in halves), key=lambda pair: pair[0]):
        if apart < below:
            below = nearest_mm(half, small, below)
    return below


def _between_boxes(points: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """The least distance that points in the boxes around two sets can have."""
    gaps = np.maximum(points.min(axis=0) - others.max(axis=0), others.min(axis=0) - points.max(axis=0))
    return float(np.linalg.norm(np.maximum(gaps, 0)))


def centroid_mm(weights: NDArray, grid: Grid) -> NDArray[np.float64]:
    """(3,) the centre of non-negative weights (I, J, K), mm."""
    planes = [weights.sum(axis=other, dtype=np.float64) for other in ((1, 2), (0, 2), (0, 1))]
    return grid.world([float(plane @ np.arange(len(plane)) / plane.sum()) for plane in planes])


def surface_of(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The voxels of a mask (I, J, K) that have a face neighbour outside it, or lie at the field's edge."""
    padded = np.pad(mask, 1)
    inner = mask.copy()
    for axis in range(3):
        for start in (0, 2):
            beside = [slice(1, -1)] * 3
            beside[axis] = slice(start, start + mask.shape[axis])
            inner &= padded[tuple(beside)]
    return mask & ~inner


def components(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """(I, J, K) the connected parts of a mask, numbered from 1, largest first; faces, edges and corners connect."""
    import SimpleITK as sitk

    parts = np.zeros(mask.shape, np.int32)
    box = box_of(mask)
    image = sitk.GetImageFromArray(mask[box].astype(np.uint8))
    parts[box] = sitk.GetArrayFromImage(sitk.RelabelComponent(sitk.ConnectedComponent(image, True)))
    return parts


def local_peaks(relevance: NDArray, fraction: float = 0.5) -> NDArray[np.int64]:
    """(P, 3) voxels not below any of their 26 neighbours, with at least ``fraction`` of the maximum; plateaus whole."""
    high = relevance >= fraction * relevance.max()
    box = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box_of(high))
    largest = relevance[box]
    for axis in range(3):
        lower, upper = [slice(None)] * 3, [slice(None)] * 3
        lower[axis], upper[axis] = slice(None, -1), slice(1, None)
        along = largest.copy()
        np.maximum(along[tuple(upper)], largest[tuple(lower)], out=along[tuple(upper)])
        np.maximum(along[tuple(lower)], largest[tuple(upper)], out=along[tuple(lower)])
        largest = along
    found = np.argwhere(high[box] & (relevance[box] == largest))
    return found + [side.start for side in box]


def box_of(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """The smallest box around a mask (I, J, K); an empty one has none, and raises IndexError."""
    sides = [np.flatnonzero(mask.any(axis=other)) for other in ((1, 2), (0, 2), (0, 1))]
    i, j, k = (slice(int(side[0]), int(side[-1]) + 1) for side in sides)
    return i, j, k


_UNDEFINED = "the mask is empty or covers all; the map holds NaN, is empty or is constant"


def _entry(
    name: str, function: Callable[[Comparison], float], definition: str, source: str, high: float,
    better: Better, chance: str,
) -> tuple[str, Metric]:  # fmt: skip
    return name, Metric(
        name, "localization", function, definition, source, 0.0, high, better, chance, _UNDEFINED
    )  # fmt: skip


_SHARE, _PERMUTED = "the mask's share of the volume", "from permuted maps"
_FAR = "distance of a random voxel"

#: The localisation metrics, by name; each function takes a :class:`Comparison` that is not undefined.
LOCALIZATION: dict[str, Metric] = dict(
    [
        _entry("pointing game", pointing_game, "whether the map's maximum lies in the mask or within the tolerance",
               "Zhang et al. 2018", 1, "higher", "share of the volume within the tolerance of the mask"),
        _entry("relevance mass", relevance_mass, "share of the relevance that lies in the mask", "Arras et al. 2022",
               1, "higher", _SHARE),
        _entry("relevance rank", relevance_rank, "share of the mask's K voxels among the K most relevant",
               "Arras et al. 2022", 1, "higher", _SHARE),
        _entry("enrichment", enrichment, "relevance mass over the mask's share of the volume", "volsal", np.inf,
               "higher", "1"),
        _entry("top intersection", top_intersection, "share of the most relevant voxels that lie in the mask",
               "Theiner et al. 2022", 1, "higher", _SHARE),
        _entry("AUPRC", auprc, "average precision of the voxels ranked by relevance", "Arun et al. 2021", 1, "higher",
               _SHARE),
        _entry("ROC AUC", roc_auc, "probability that a voxel of the mask is more relevant than one outside",
               "Fawcett 2006", 1, "higher", "0.5"),
        _entry("peak to mask, mm", peak_to_mask_mm, "from the map's maximum to the nearest voxel of the mask",
               "volsal", np.inf, "lower", _FAR),
        _entry("peak to centroid, mm", peak_to_centroid_mm, "from the map's maximum to the mask's centre", "volsal",
               np.inf, "lower", _FAR),
        _entry("centroid to centroid, mm", centroid_to_centroid_mm,
               "from the map's centre of relevance to the mask's centre", "volsal", np.inf, "lower",
               "from the field's centre to the mask's"),
        _entry("peak to surface, mm", peak_to_surface_mm, "from the map's maximum to the mask's surface, inside too",
               "volsal", np.inf, "neither", _FAR),
        _entry("lesion hit rate", lesion_hit_rate, "share of the lesions that hold a peak of the map", "volsal", 1,
               "higher", _PERMUTED),
    ]
)  # fmt: skip
