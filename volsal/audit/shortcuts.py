"""Does the model answer by what is no patient: the air, padding, a corner of the field, the scan's brightness?

A map is asked where to look, and an intervention whether it matters: a ball is taken out at the map's highest place in
a region where no evidence should be.  How much of a map lies there says little: a marker of a few voxels may be all
that the model looks at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from volsal.audit.anatomy import border, corners
from volsal.audit.nulls import p_value
from volsal.audit.subject import Subject
from volsal.config import AuditSection

OUTSIDE, PADDING, BORDER, CORNER = "outside the body", "in padding", "at the field's border", "in a corner of the field"
REGIONS = (OUTSIDE, PADDING, CORNER, BORDER)
# The whole input is made darker and brighter by these, about as far as scanners and sequences differ.
_GAINS = (0.5, 0.7, 0.85, 1.0, 1.2, 1.45, 2.0)
_PERMUTATIONS = 199


def regions_of(subject: Subject, settings: AuditSection) -> dict[str, NDArray[np.bool_]]:
    """(I, J, K) bool each: the regions in which a ball is tried, by name; none of them holds any of the body.

    Where the body is not sure, only padding is known to be none of it.
    """
    grid = subject.grid
    if not subject.body.sure:
        return {PADDING: subject.padding}
    beyond = ~grown(subject.body.mask, subject, settings.body_margin_mm)
    return {
        OUTSIDE: beyond,
        PADDING: subject.padding & beyond,
        CORNER: np.any(list(corners(grid).values()), axis=0) & beyond,
        BORDER: border(grid, settings.border_mm) & beyond,
    }


def grown(mask: NDArray[np.bool_], subject: Subject, mm: float) -> NDArray[np.bool_]:
    """A mask with everything within ``mm`` of it."""
    import SimpleITK as sitk

    radius = [int(mm / along) for along in subject.grid.spacing[::-1]]
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    return sitk.GetArrayFromImage(sitk.BinaryDilate(image, radius)).astype(bool)


def where_of(subject: Subject, voxel: NDArray[np.int64], regions: Mapping[str, NDArray[np.bool_]]) -> str:
    """A place in words: what of ``regions`` it lies in, and on which side of the field."""
    told = [name for name, region in regions.items() if region[tuple(voxel)]]
    return ", ".join([*told, side_of(subject, voxel)])


def side_of(subject: Subject, voxel: NDArray[np.int64]) -> str:
    """``right anterior superior``: on which side of the field's middle, leaving out axes along which it is near."""
    grid = subject.grid
    away = grid.world(voxel) - grid.world((np.array(grid.shape) - 1) / 2)
    half = np.ptp(grid.corners, axis=0) / 2
    pairs = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))
    words = [pair[int(mm > 0)] for pair, mm, size in zip(pairs, away, half, strict=True) if abs(mm) > 0.2 * size]
    return " ".join(words) or "central"


# ---- brightness


def brightness_of(subject: Subject) -> dict[str, Any]:
    """How bright the model's input is, and what the model says of it when it is darker or brighter as a whole.

    Returns
    -------
    ``level``: mean of the first channel in the body, above its least value; ``gains``: what the whole input above its
    least value was multiplied by; ``answers``: for each the model's outputs, or the score where it has no plain ones.
    """
    image = subject.volume[0, 0]
    inside = torch.from_numpy(subject.body.mask).to(image.device)
    least = subject.volume.amin()
    return {
        "level": float((image[inside].mean() - least).double()),
        "gains": list(_GAINS),
        "answers": [subject.says(least + gain * (subject.volume - least)) for gain in _GAINS],
    }


def brightness(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What becomes of the spread of the model's answers over scans when all inputs are made equally bright.

    Each input is brought to the median level; what the model would say is interpolated between the gains that were
    tried, beyond which the nearest holds.

    Parameters
    ----------
    records : of :func:`volsal.audit.examine.examine`

    Returns
    -------
    ``spread_left``: variance of the answers afterwards over that before, ``p_value``: how often levels that were
    permuted among the scans leave as little, and ``scans``.  Undefined where answers do not vary.
    """
    found = [record["brightness"] for record in records]
    levels = np.array([one["level"] for one in found])
    usable = len(levels) > 2 and bool((levels > 0).all()) and len({len(one["answers"][0]) for one in found}) == 1
    if not usable:
        return {"scans": len(levels), "spread_left": {"undefined": "too few scans, or nothing in them is bright"}}
    gains = np.log(np.array(found[0]["gains"]))
    answers = np.array([one["answers"] for one in found])  # (N, G, K)
    if answers.shape[2] > 1:
        answers = answers - answers.mean(axis=2, keepdims=True)  # what a softmax does not see
    wanted = np.log(np.median(levels) / levels)
    before = _spread(answers, gains, np.zeros(len(levels)))
    if before <= 0:
        return {"scans": len(levels), "spread_left": {"undefined": "the answers do not vary"}}
    left = _spread(answers, gains, wanted) / before
    random = np.random.default_rng(0)
    shuffled = [_spread(answers, gains, random.permutation(wanted)) / before for _ in range(_PERMUTATIONS)]
    chance = p_value(left, shuffled, "lower")
    return {"scans": len(levels), "spread_left": left, "p_value": chance}


def _spread(answers: NDArray[np.float64], gains: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    """Variance over scans of the answers (N, G, K) at one log gain for each scan, summed over outputs."""
    at = np.array(
        [[np.interp(gain, gains, answers[i, :, k]) for k in range(answers.shape[2])] for i, gain in enumerate(wanted)]
    )
    return float(at.var(axis=0).sum())


# ---- fixed in the scanner


def fixed_in_field(records: Sequence[Mapping[str, Any]], places: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Whether places, one for each record, keep still in the field of view rather than in the patient.

    Returns
    -------
    ``in_field_mm`` and ``in_body_mm``: root mean square distance of the places from their mean, measured from the
    field's middle and from the body's; ``ratio`` of the second to the first with ``low``, the 5th percentile of its
    bootstrap.  Undefined where the body is not sure, or there are fewer than five scans.
    """
    kept = [at for at, record in enumerate(records) if record["body"]["centre_mm"] is not None]
    if len(kept) < 5:
        return {"ratio": {"undefined": "fewer than five scans of which the body is known"}}
    mm = np.array([places[at] for at in kept])
    field = mm - np.array([records[at]["field_centre_mm"] for at in kept])
    body = mm - np.array([records[at]["body"]["centre_mm"] for at in kept])
    random = np.random.default_rng(0)
    draws = [random.integers(len(kept), size=len(kept)) for _ in range(_PERMUTATIONS)]
    ratios = [_scatter(body[draw]) / max(_scatter(field[draw]), 1e-6) for draw in draws]
    return {
        "in_field_mm": _scatter(field),
        "in_body_mm": _scatter(body),
        "ratio": _scatter(body) / max(_scatter(field), 1e-6),
        "low": float(np.percentile(ratios, 5)),
    }


def _scatter(mm: NDArray[np.float64]) -> float:
    return float(np.sqrt(((mm - mm.mean(axis=0)) ** 2).sum(axis=1).mean()))
