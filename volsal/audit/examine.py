"""One scan under the audit: what each map claims of it, and what the score does where the map points.

:func:`examine` gives plain data, so that a case's figures are kept beside its maps and an audit that was interrupted is
taken up.  A figure is a number, or ``{"undefined": why}``; all places are mm in the scan's world, RAS+.

``case, answer, outputs, score``  the scan, what the model says of it, and the score that is explained; ``log_odds``:
                                  whether outputs are logits of classes
``body``                          ``sure``, ``said``, ``share`` of the field
``grid``                          of the model's input
``brightness``                    see :func:`volsal.audit.shortcuts.brightness_of`
``methods``                       by name: ``trial`` (see :func:`trial_of`) at the map's peak, ``where`` that is in
                                  words, ``in_body``; by region ``regions``: its share of the volume and of the
                                  evidence, and density, and ``suspects``: the trial at the map's highest place there;
                                  ``masks``: by mask and metric the value and that of each null; ``anatomy``: as
                                  ``regions``, by label map and label; of some scans ``sanity``, ``stability``,
                                  ``deletion``; or ``undefined``: why the method has no map here
``masks``                         by name: ``effect`` of removing it on the score, ``voxels``
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from volsal.attribution import Context, Method
from volsal.attribution.alignment.alignment import HalfPixel
from volsal.audit.anatomy import Share, budget, budget_of_labels
from volsal.audit.faithfulness import Scorer, delta_aupc, remove_region, removed
from volsal.audit.localization import localization
from volsal.audit.metric import Figure, Undefined
from volsal.audit.nulls import null_tests
from volsal.audit.probe import Probe, Trial, peak_of
from volsal.audit.shortcuts import brightness_of, regions_of, where_of
from volsal.audit.similarity import similarity
from volsal.audit.stability import Gain, Movement, Noise, Nuisance, stability
from volsal.audit.subject import Subject
from volsal.config import AuditSection

#: Localisation figures that are reported; all of them are in :mod:`volsal.audit.localization`.
REPORTED = ("pointing game", "relevance mass", "enrichment", "AUPRC", "peak to mask, mm")
# Nulls are drawn so often for each scan; the p-values are of the cohort's figures, not of one scan.
_NULL_DRAWS = 5
_NUISANCES: tuple[Nuisance, ...] = (Noise(), Gain(), Movement((0, 0, 0), (3.0, 2.0, 4.0)))
_FEW_LABELS = 4
_DELETION_STEPS, _DELETION_CONTROLS = 10, 3


@dataclass(frozen=True, eq=False)
class Deep:
    """What is asked of some scans only, for it costs more.

    Attributes
    ----------
    twin : the model with random weights
    deletion : the methods in whose order voxels are deleted, for those that are asked about
    """

    twin: nn.Module
    deletion: tuple[str, ...] = ()


def examine(
    subject: Subject,
    methods: Mapping[str, Method],
    settings: AuditSection,
    labels: Mapping[str, NDArray[np.integer]] | None = None,
    *,
    seed: int = 0,
    regions: bool = True,
) -> dict[str, Any]:
    """The figures of one scan as plain data; see the module's own words.

    Parameters
    ----------
    methods : by the names they go by
    labels : (I, J, K) masks or label maps on the subject's grid, by name
    seed : of the places that balls are compared with
    regions : whether balls are also tried where no evidence should be, and the whole input made darker and brighter
    """
    clock = time.monotonic()
    probe = Probe(subject, settings.radius_mm, settings.controls, settings.blur_mm, seed)
    masks = masks_of(labels or {})
    places = regions_of(subject, settings) if regions else {}
    found = {
        name: _of_map(values, probe, places, settings, masks, labels or {})
        for name, values in subject.maps(methods).items()
    }
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
        "brightness": brightness_of(subject) if regions else None,
        "masks": _without_masks(subject, masks, settings),
        "methods": found,
        "seconds": round(time.monotonic() - clock, 3),
    }


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
    regions: Mapping[str, NDArray[np.bool_]],
    settings: AuditSection,
    masks: Mapping[str, NDArray[np.bool_]],
    labels: Mapping[str, NDArray[np.integer]],
) -> dict[str, Any]:
    if isinstance(values, Undefined):
        return {"undefined": values.reason}
    peak = peak_of(values)
    trial = peak if isinstance(peak, Undefined) else probe.at(peak)
    if isinstance(trial, Undefined):
        return {"undefined": trial.reason}
    subject = probe.subject
    return {
        "trial": trial_of(trial),
        "in_body": bool(subject.body.mask[tuple(trial.voxel)]),
        "where": where_of(subject, trial.voxel, regions),
        "regions": {share.region: _share(share) for share in budget(values, regions)},
        "suspects": _suspects(values, probe, regions),
        "masks": {name: _on_mask(values, mask, subject, settings) for name, mask in masks.items()},
        "anatomy": {
            name: {share.region: _share(share) for share in budget_of_labels(values, of)}
            for name, of in labels.items()
            if of.max() > 1
        },
    }


def _share(share: Share) -> dict[str, Any]:
    return {"volume": share.volume, "evidence": plain(share.evidence), "density": plain(share.density)}


def _suspects(values: NDArray, probe: Probe, regions: Mapping[str, NDArray[np.bool_]]) -> dict[str, Any]:
    """The trial at the map's highest place in each region where no evidence should be."""
    found = {}
    for name, region in regions.items():
        at = peak_of(values, region) if region.any() else Undefined("the scan has no such region")
        trial = at if isinstance(at, Undefined) else probe.at(at)
        if not isinstance(trial, Undefined):
            found[name] = {**trial_of(trial), "where": where_of(probe.subject, trial.voxel, regions)}
    return found


def _on_mask(
    values: NDArray, mask: NDArray[np.bool_], subject: Subject, settings: AuditSection
) -> dict[str, dict[str, Any]]:
    near = settings.tolerance_mm
    observed = localization(values, mask, subject.grid, REPORTED, tolerance_mm=near)
    tests = null_tests(values, mask, subject.grid, ("smooth", "moved mask"), REPORTED, _NULL_DRAWS, tolerance_mm=near)
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


def deepen(
    found: dict[str, dict[str, Any]],
    subject: Subject,
    methods: Mapping[str, Method],
    deep: Deep,
    settings: AuditSection,
) -> None:
    """Add ``sanity``, ``stability`` and ``deletion`` of some methods to what :func:`examine` found of each."""
    # Where cells lie is measured from trained weights; maps that are compared are placed by one rule.
    half = Context(HalfPixel(), subject.grid, subject.case, folder=subject.context.folder)
    for name, method in methods.items():
        if "undefined" in found[name]:
            continue
        asked = {name: method}
        found[name]["sanity"] = _sanity(subject, asked, name, deep.twin, half)
        found[name]["stability"] = _stability(subject, asked, name, half, settings)
        if name in deep.deletion:
            found[name]["deletion"] = plain(_deleted(subject, subject.maps(asked)[name], settings))


def _deleted(subject: Subject, values: NDArray | Undefined, settings: AuditSection) -> Figure:
    """Delta AUPC against the map's own order displaced, in the score's unit."""
    if isinstance(values, Undefined):
        return values
    baseline = removed(subject.volume, "blur", subject.grid, settings.blur_mm)
    found = delta_aupc(
        Scorer(subject.score), subject.volume, values, baseline, draws=_DELETION_CONTROLS, steps=_DELETION_STEPS
    )
    return found if isinstance(found, Undefined) else found.delta


def _sanity(
    subject: Subject, asked: Mapping[str, Method], name: str, twin: nn.Module, context: Context
) -> dict[str, Any]:
    """How alike the map is to that of random weights, in the body."""
    trained = subject.maps(asked, context=context)[name]
    random = subject.maps(asked, model=twin, context=context)[name]
    if isinstance(trained, Undefined) or isinstance(random, Undefined):
        return {"top_dice": {"undefined": "a map of the model or of random weights has no place"}}
    alike = similarity(trained, random, subject.grid, subject.body.mask)
    return {key: plain(getattr(alike, key)) for key in ("top_dice", "spearman", "spearman_abs")}


def _stability(
    subject: Subject, asked: Mapping[str, Method], name: str, context: Context, settings: AuditSection
) -> dict[str, Any]:
    """In which share of harmlessly changed copies the map peaks where it did."""

    def explain(volume: Any) -> NDArray:
        values = subject.maps(asked, volume, context=context)[name]
        return np.zeros(subject.grid.shape, np.float32) if isinstance(values, Undefined) else values

    found = stability(explain, subject.answer_to, subject.volume, subject.grid, _NUISANCES)
    moved = [one.peak_mm for each in found for one in each.similarities]
    if not moved:
        return {"kept": {"undefined": "the model's answer changed under every change"}, "copies": 0}
    stays = [not isinstance(mm, Undefined) and mm <= settings.radius_mm for mm in moved]
    return {"kept": float(np.mean(stays)), "copies": len(moved)}


def _middle(mask: NDArray[np.bool_], subject: Subject) -> list[float]:
    return _listed(subject.grid.world(np.argwhere(mask).mean(axis=0)))


def _listed(mm: NDArray[np.float64]) -> list[float]:
    return [round(float(x), 2) for x in mm]
