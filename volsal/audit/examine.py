"""One scan under the audit: what each map claims of it, and what the score does where the map points.

:func:`examine` gives plain data, so that a case's figures are kept beside its maps and an audit that was interrupted is
taken up.  A figure is a number, or ``{"undefined": why}``; all places are mm in the scan's world, RAS+.

``case, answer, outputs, score``  the scan, what the model says of it, and the score that is explained; ``log_odds``:
                                  whether outputs are logits of classes
``body``                          ``sure``, ``said``, ``share`` of the field
``grid``                          of the model's input
``methods``                       by name: ``trial`` (see :func:`trial_of`) at the map's peak, or why there is none,
                                  ``where`` that is in words, ``in_body``; ``highest``: where it was asked for, the
                                  trial of all that the map holds highest; ``suspects``: by region the trial at the
                                  map's highest place there; the claims of :func:`claims_of`; of some scans
                                  ``random weights``: the claims of the map of random weights, and what
                                  :mod:`volsal.audit.checks` adds; or ``undefined``: why the method has no map here
``references``                    the claims of maps that know no model, by name: see
                                  :func:`volsal.audit.nulls.references`
``masks``                         by name: ``effect`` of removing it on the score, ``voxels``
``agreement``                     of some scans: see :func:`volsal.audit.checks.agreement_of`
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from volsal.attribution import Context, Method
from volsal.attribution.alignment.alignment import HalfPixel
from volsal.audit.anatomy import Body, Share, beside_body, budget, budget_of_labels
from volsal.audit.faithfulness import Scorer, remove_region, removed
from volsal.audit.localization import localization
from volsal.audit.metric import Figure, Undefined
from volsal.audit.nulls import Null, null_tests, references
from volsal.audit.probe import Probe, Trial, peak_of
from volsal.audit.shortcuts import OUTSIDE, regions_of, where_of
from volsal.audit.subject import Subject
from volsal.config import AuditSection
from volsal.resampling import resample

#: Localisation figures that are reported; all of them are in :mod:`volsal.audit.localization`.
REPORTED = (
    "pointing game", "lesion hit rate", "relevance mass", "relevance rank", "enrichment", "AUPRC", "peak to mask, mm",
    "peak to centroid, mm", "centroid to centroid, mm", "peak to surface, mm",
)  # fmt: skip
#: Random nulls of localisation that are reported beside them.
RANDOM: tuple[Null, ...] = ("permuted", "smooth", "moved mask")
# They are drawn so often for each scan; the p-values are of the cohort's figures, not of one scan.
_NULL_DRAWS = 5
_FEW_LABELS = 4


@dataclass(frozen=True, eq=False)
class Places:
    """What a scan's map may lie on.

    Attributes
    ----------
    regions : (I, J, K) bool each, by name
    masks : the same of lesions
    labels : (I, J, K) label maps by name, and of some what their labels are called
    """

    regions: Mapping[str, NDArray[np.bool_]]
    masks: Mapping[str, NDArray[np.bool_]]
    labels: Mapping[str, NDArray[np.integer]]
    names: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


def examine(
    subject: Subject,
    methods: Mapping[str, Method],
    settings: AuditSection,
    labels: Mapping[str, NDArray[np.integer]] | None = None,
    *,
    seed: int = 0,
    regions: bool = True,
    highest: Collection[str] = (),
    twin: nn.Module | None = None,
) -> dict[str, Any]:
    """The figures of one scan as plain data; see the module's own words.

    Parameters
    ----------
    methods : by the names they go by
    labels : (I, J, K) masks or label maps on the subject's grid, by name
    seed : of the places that balls are compared with
    regions : whether balls are also tried where no evidence should be, and reference maps put beside the methods'
    highest : methods of which all that the map holds highest is also taken out at once, of answers in log odds
    twin : the model with random weights, for the claims of its maps
    """
    clock = time.monotonic()
    probe = Probe(subject, settings.radius_mm, settings.controls, settings.blur_mm, seed)
    tried = regions_of(subject, settings) if regions else {}
    things = _things(subject, tried) if regions else {}
    places = Places({**tried, **things}, masks_of(labels or {}), labels or {}, settings.label_names)
    maps = subject.maps(methods)
    found = {name: _of_map(values, probe, tried, places, settings) for name, values in maps.items()}
    _widen(found, {name: values for name, values in maps.items() if name in highest}, probe, settings)
    if twin is not None:
        for name, values in subject.maps(methods, model=twin, context=unmeasured(subject)).items():
            if "undefined" not in found[name]:
                found[name]["random weights"] = claims_of(values, subject, places, settings)
    image = subject.volume[0, 0].float().cpu().numpy()
    beside = references(subject.grid, image) if regions else {}
    return {
        "case": subject.case,
        "answer": subject.answer,
        "log_odds": subject.log_odds,
        "outputs": subject.says(subject.volume),
        "score": float(subject.score(subject.volume)[0]),
        "body": {
            "sure": subject.body.sure,
            "said": subject.body.said,
            "share": float(subject.body.mask.mean()),
            "centre_mm": _middle(subject.body.mask, subject) if subject.body.sure else None,
        },
        "grid": {"shape": list(subject.grid.shape), "affine": subject.grid.affine.tolist()},
        "field_centre_mm": _listed(subject.grid.world((np.array(subject.grid.shape) - 1) / 2)),
        "masks": _without_masks(subject, places.masks, settings),
        "methods": found,
        "references": {name: claims_of(values, subject, places, settings) for name, values in beside.items()},
        "seconds": round(time.monotonic() - clock, 3),
    }


def widen(
    found: dict[str, dict[str, Any]],
    subject: Subject,
    methods: Mapping[str, Method],
    settings: AuditSection,
    seed: int = 0,
) -> None:
    """Add ``highest`` of some methods; nothing where outputs are no log odds, whose unit is not known."""
    probe = Probe(subject, settings.radius_mm, settings.controls, settings.blur_mm, seed)
    _widen(found, subject.maps(methods), probe, settings)


def _widen(
    found: dict[str, dict[str, Any]],
    maps: Mapping[str, NDArray | Undefined],
    probe: Probe,
    settings: AuditSection,
) -> None:
    for name, values in maps.items():
        if settings.highest and probe.subject.log_odds and not isinstance(values, Undefined):
            trial = probe.of_highest(values, settings.highest)
            found[name]["highest"] = plain(trial) if isinstance(trial, Undefined) else trial_of(trial)


def _things(subject: Subject, tried: Mapping[str, NDArray[np.bool_]]) -> dict[str, NDArray[np.bool_]]:
    """What lies beside the body, on the subject's grid; the margin about the body is taken off, as of all regions."""
    if OUTSIDE not in tried:
        return {}
    scan = subject.ready.scan
    body = resample(subject.body.mask.astype(np.float32), subject.grid, scan.grid) >= 0.5
    found = beside_body(scan.array, scan.grid, Body(body, True, subject.body.said))
    return {
        name: (resample(of.astype(np.float32), scan.grid, subject.grid) >= 0.5) & tried[OUTSIDE]
        for name, of in found.items()
    }


def unmeasured(subject: Subject) -> Context:
    """In which maps of different weights are compared: where cells lie is measured from trained ones."""
    return Context(HalfPixel(), subject.grid, subject.case, folder=subject.context.folder)


def masks_of(labels: Mapping[str, NDArray[np.integer]]) -> dict[str, NDArray[np.bool_]]:
    """A mask for each label of each label map, 0 left out: ``lesion`` of label 1, and ``lesion 3`` of label 3.

    A map of more than a few labels, such as one of organs, gives no masks: what evidence they hold is in ``anatomy``.
    """
    masks: dict[str, NDArray[np.bool_]] = {}
    for name, of in labels.items():
        found = [int(label) for label in np.unique(of) if label]
        if len(found) <= _FEW_LABELS:
            masks |= {name if label == 1 else f"{name} {label}": of == label for label in found}
    return masks


def trial_of(trial: Trial) -> dict[str, Any]:
    """As plain data: ``mm``, ``effect``, ``beyond`` (above the controls' median), ``controls``, ``p_value``."""
    return {
        "mm": _listed(trial.mm),
        "effect": trial.effect,
        "beyond": trial.beyond,
        "controls": len(trial.controls),
        "control_median": float(np.median(trial.controls)),
        "control_largest": float(trial.controls.max()),
        "p_value": trial.p_value,
    }


def plain(figure: Figure) -> Any:
    """A figure as plain data."""
    return {"undefined": figure.reason} if isinstance(figure, Undefined) else float(figure)


def figure(data: Any) -> Figure:
    """A figure back from plain data; one that was not asked for is undefined."""
    if isinstance(data, Mapping):
        return Undefined(str(data.get("undefined", "it was not asked for")))
    return Undefined("it was not asked for") if data is None else float(data)


def _of_map(
    values: NDArray | Undefined,
    probe: Probe,
    tried: Mapping[str, NDArray[np.bool_]],
    places: Places,
    settings: AuditSection,
) -> dict[str, Any]:
    if isinstance(values, Undefined):
        return {"undefined": values.reason}
    peak, subject = peak_of(values), probe.subject
    if isinstance(peak, Undefined):
        return {"undefined": peak.reason}
    trial = probe.at(peak)
    # Where no ball has others beside it, nothing was tried in regions either: they are not told to be clear.
    told = (
        {"trial": plain(trial)}
        if isinstance(trial, Undefined)
        else {"trial": trial_of(trial), "suspects": _suspects(values, probe, tried, places.regions)}
    )
    return {
        **told,
        "in_body": bool(subject.body.mask[tuple(peak)]),
        "where": where_of(subject, peak, places.regions),
        **claims_of(values, subject, places, settings, RANDOM),
    }


def claims_of(
    values: NDArray | Undefined, subject: Subject, places: Places, settings: AuditSection, nulls: Sequence[Null] = ()
) -> dict[str, Any]:
    """Where a map says that the evidence lies.

    Returns
    -------
    ``regions``: by region its share of the ``volume`` and of the ``evidence``, and ``density``, the second over the
    first; ``anatomy``: the same by label map and label; ``masks``: by mask and metric the ``value`` and the mean of
    each of ``nulls``.  Or ``undefined``: why the map has no place.
    """
    if isinstance(values, Undefined):
        return {"undefined": values.reason}
    return {
        "regions": {share.region: _share(share) for share in budget(values, places.regions)},
        "masks": {name: _on_mask(values, mask, subject, settings, nulls) for name, mask in places.masks.items()},
        "anatomy": {
            name: {share.region: _share(share) for share in budget_of_labels(values, of, places.names.get(name))}
            for name, of in places.labels.items()
            if of.max() > 1
        },
    }


def _share(share: Share) -> dict[str, Any]:
    return {"volume": share.volume, "evidence": plain(share.evidence), "density": plain(share.density)}


def _suspects(
    values: NDArray,
    probe: Probe,
    tried: Mapping[str, NDArray[np.bool_]],
    regions: Mapping[str, NDArray[np.bool_]],
) -> dict[str, Any]:
    """The trial at the map's highest place in each region where no evidence should be."""
    found = {}
    for name, region in tried.items():
        at = peak_of(values, region) if region.any() else Undefined("the scan has no such region")
        trial = at if isinstance(at, Undefined) else probe.at(at)
        if not isinstance(trial, Undefined):
            found[name] = {**trial_of(trial), "where": where_of(probe.subject, trial.voxel, regions)}
    return found


def _on_mask(
    values: NDArray, mask: NDArray[np.bool_], subject: Subject, settings: AuditSection, nulls: Sequence[Null]
) -> dict[str, dict[str, Any]]:
    near = settings.tolerance_mm
    observed = localization(values, mask, subject.grid, REPORTED, tolerance_mm=near)
    tests = null_tests(values, mask, subject.grid, nulls, REPORTED, _NULL_DRAWS, tolerance_mm=near)
    return {
        name: {"value": plain(value), **{test.null: plain(test.mean) for test in tests if test.metric == name}}
        for name, value in observed.items()
    }


def _without_masks(
    subject: Subject, masks: Mapping[str, NDArray[np.bool_]], settings: AuditSection
) -> dict[str, dict[str, Any]]:
    """What the score loses when a mask's voxels are blurred away: whether the model uses them, whatever a map says."""
    if not any(mask.any() for mask in masks.values()):
        return {}
    baseline = removed(subject.volume, "blur", subject.grid, settings.blur_mm)
    return {
        name: {
            "voxels": int(np.count_nonzero(mask)),
            "effect": remove_region(Scorer(subject.score), subject.volume, baseline, mask),
        }
        for name, mask in masks.items()
        if mask.any()
    }


def _middle(mask: NDArray[np.bool_], subject: Subject) -> list[float]:
    return _listed(subject.grid.world(np.argwhere(mask).mean(axis=0)))


def _listed(mm: NDArray[np.float64]) -> list[float]:
    return [round(float(x), 2) for x in mm]
