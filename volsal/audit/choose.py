"""Which map to believe, measured on the user's own model and scans, without masks.

Every candidate, a method at a layer, is asked where the evidence lies in each of a sample of scans.  There a small
ball is taken out of the scan: the better a map, the more the score moves.  What is trusted at all is in
:mod:`volsal.audit.trust`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from volsal.attribution import (
    DeepLIFT,
    GradCAM,
    GradientTimesInput,
    GuidedBackprop,
    GuidedGradCAM,
    HiResCAM,
    InputGradient,
    IntegratedGradients,
    LayerError,
    Method,
    default_layer,
    list_layers,
)
from volsal.attribution.settings import SettingError
from volsal.audit.checks import deepen
from volsal.audit.examine import examine
from volsal.audit.metric import Undefined
from volsal.audit.patients import patients_of
from volsal.audit.probe import Probe, peak_of
from volsal.audit.sanity import parameterised, randomised
from volsal.audit.subject import subject_of
from volsal.audit.trust import TRUSTED, UNDECIDED, Trust, answers_alike, judge, scaled, spreads
from volsal.choices import method_names
from volsal.config import AuditSection
from volsal.errors import VolsalError
from volsal.explain import Explainer
from volsal.scans.find import Case

NONE = "none of these can be trusted for this model"
TOO_FEW = "the patients are too few to say which of these can be trusted"
# So many earlier layers are tried, the deepest of each resolution.
_EARLIER = 3
# Of the best candidates, so many are put to the sanity and stability checks, and to a run-off on so many more scans.
_FINALISTS = 4
_RUN_OFF = 36
_PATH_STEPS = 16
# A peak is as good as the best where the score moves by this share of what it moves there.
_DECISIVE = 0.5


@dataclass(frozen=True)
class Scored:
    """A candidate.

    Attributes
    ----------
    method : its name
    score : in which share of the scans with a trusted answer the score moves at its peak by at least half of what it
        moves at the best candidate's; undefined where no candidate moves it
    strength : how much it moves there, as a share of what it moves at the best candidate's, mean over these scans; of
        equal scores the stronger is the better
    trust : its case for each answer of the model
    """

    method: str
    score: float | Undefined
    strength: float
    trust: tuple[Trust, ...]

    @property
    def answers(self) -> tuple[str, ...]:
        """Those for which it is trusted."""
        return tuple(one.answer for one in self.trust if one.verdict == TRUSTED)


@dataclass(frozen=True)
class Choice:
    """What :func:`choose` found.

    Attributes
    ----------
    recommended : the method's name; None where none can be trusted
    method : itself
    candidates : all of them, the best first
    scans, skipped : how many were used, and why others could not be, by case
    seconds : how long it took
    tried : the candidates' methods, by name
    records : the scans' figures, see :mod:`volsal.audit.examine`
    """

    recommended: str | None
    method: Method | None
    candidates: tuple[Scored, ...]
    scans: int
    skipped: dict[str, str]
    seconds: float
    tried: dict[str, Method]
    records: tuple[dict[str, Any], ...]

    @property
    def words(self) -> list[str]:
        """The recommendation and what it rests on, a line each."""
        if self.recommended is None:
            few = any(one.verdict == UNDECIDED for each in self.candidates for one in each.trust)
            told = [f"the best of them: {one.words}" for best in self.candidates[:1] for one in best.trust]
            return [TOO_FEW if few else NONE, *told]
        best = self.candidates[0]
        return [
            f"recommended: {self.recommended}, for {' and '.join(best.answers)}",
            *(one.words for one in best.trust),
        ]

    def describe(self) -> dict[str, Any]:
        """As plain data, without the scans' figures."""
        return {
            "recommended": self.recommended,
            "settings": repr(self.method) if self.method else None,
            "words": self.words,
            "scans": self.scans,
            "skipped": self.skipped,
            "seconds": round(self.seconds, 1),
            "candidates": [
                {
                    "method": one.method,
                    "score": None if isinstance(one.score, Undefined) else one.score,
                    "strength": one.strength,
                    "trusted for": list(one.answers),
                    "words": [trust.words for trust in one.trust],
                }
                for one in self.candidates
            ],
        }


def candidates_of(model: nn.Module, volume: Tensor, methods: Mapping[str, Method] | None = None) -> dict[str, Method]:
    """The methods that are tried, by name: those given, and the usual ones at the layers of the model.

    Class activation maps at the default layer and, of each resolution before it, at the last layer that every path
    passes; gradients by the input; guided ones.
    """
    given = dict(methods or {})
    usual: list[Method] = [
        GuidedBackprop(), GradientTimesInput(), InputGradient(), IntegratedGradients(steps=_PATH_STEPS, tolerance=None),
        DeepLIFT(),
    ]  # fmt: skip
    last: str | None
    try:
        last = default_layer(model, volume)
        layers = [last, *_earlier(model, volume, last)]
        usual += [GuidedGradCAM(last), *(kind(layer) for layer in layers for kind in (GradCAM, HiResCAM))]
    except LayerError:
        last = None  # a model without cells has no class activation maps
    known = {_located(method, last) for method in given.values()}
    new = [method for method in usual if method not in known]
    names = method_names([*given.values(), *new], [*given, *("" for _ in new)])
    return dict(zip(names, [*given.values(), *new], strict=True))


def _located(method: Method, layer: str | None) -> Method:
    """``method`` with the default layer named, so that it is told to be the same as one that names it."""
    if layer and getattr(method, "layer", "") is None:
        return replace(method, layer=layer)  # type: ignore[type-var]
    return method


def _earlier(model: nn.Module, volume: Tensor, last: str) -> list[str]:
    """Before ``last`` the deepest suitable layer of each finer resolution, the deepest first; not the input's own.

    Of a block and its last member, which end in one place, the block is taken.
    """
    layers = [layer for layer in list_layers(model, volume) if layer.suitable]
    until = [layer.name for layer in layers].index(last) + 1
    deepest = {layer.extent: layer for layer in layers[:until]}
    own = layers[until - 1].extent
    finer = [at.name for at in reversed(deepest.values()) if at.extent != own and min(at.stride) > 1]
    return finer[:_EARLIER]


def sampled(cases: Sequence[Case], number: int) -> list[Case]:
    """Up to ``number`` of the cases that can be read, evenly spread and alternating between labels."""
    groups: dict[str | None, list[Case]] = {}
    for case in cases:
        if case.fault is None:
            groups.setdefault(case.label, []).append(case)
    ranked = [(at / len(group), case) for group in groups.values() for at, case in enumerate(_spread(group))]
    return [case for _, case in sorted(ranked, key=lambda pair: pair[0])][:number]


def _spread(group: list[Case]) -> list[Case]:
    """The same cases in an order of which every beginning is spread over the whole."""
    order = np.random.default_rng(0).permutation(len(group))
    return [group[at] for at in order]


def choose(
    explainer: Explainer,
    cases: Sequence[Case],
    candidates: Mapping[str, Method] | None = None,
    settings: AuditSection | None = None,
    *,
    scans: int = 24,
    minutes: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **reading: Any,
) -> Choice:
    """Try maps on a sample of scans, and say which of them to believe, if any.

    Parameters
    ----------
    explainer : of the model; its methods are candidates too
    cases : of which up to ``scans`` are taken, and some more to tell the best apart; masks are not looked at
    candidates : by name, in place of the explainer's methods and the usual ones
    minutes : no further scan is begun after so many, and at least one is
    reading : as for :func:`volsal.scans.read_case`

    Raises
    ------
    SettingError
        Where no scan can be used.
    """
    settings = settings or AuditSection.model_validate({})
    clock = time.monotonic()
    records: list[dict[str, Any]] = []
    used: list[Case] = []
    skipped: dict[str, str] = {}
    chosen = sampled(cases, scans)
    for number, case in enumerate(chosen):
        if minutes is not None and records and time.monotonic() - clock > 60 * minutes * 0.7:
            break
        try:
            subject = subject_of(explainer, case, **reading)
        except VolsalError as error:
            skipped[case.id] = str(error)
            continue
        if candidates is None:
            own = dict(zip(explainer.names, explainer.methods, strict=True))
            candidates = candidates_of(subject.model, explainer.at_once(subject.volume), own)
        records.append(examine(subject, candidates, settings, seed=number, regions=False))
        used.append(case)
        if progress:
            progress("scans", number + 1, len(chosen))
    if not records or candidates is None:
        reasons = "; ".join(dict.fromkeys(skipped.values())) or "there are none"
        raise SettingError(f"none of {len(chosen)} scans can be used: {reasons}")
    target = explainer.targets[0]
    # Of the records as they are by then: checks are added to them.
    by_rank = partial(rank, records, settings, target, patients=patients_of(cases))
    ranked = by_rank()
    checked: dict[str, Method] = {}
    # Where all of the best fail, the next best are checked: nothing unchecked is recommended.
    while not (ranked and ranked[0].method in checked):
        new = [one.method for one in ranked if one.answers and one.method not in checked][:_FINALISTS]
        if not new:
            break
        left = {name: candidates[name] for name in new}
        _check(explainer, used, records, left, settings, clock, minutes, reading)
        checked |= left
        ranked = by_rank()
    finalists = {one.method: checked[one.method] for one in ranked if one.answers and one.method in checked}
    if finalists:
        others = sampled(cases, scans + _RUN_OFF)[len(chosen) :] if len(chosen) == scans else []
        further = _run_off(explainer, others, finalists, settings, clock, minutes, reading)
        ranked = by_rank(further)
        ranked.sort(key=lambda one: (not one.answers, one.method not in checked))
    best = ranked[0].method if ranked and ranked[0].answers else None
    method = candidates[best] if best else None
    seconds = time.monotonic() - clock
    return Choice(best, method, tuple(ranked), len(records), skipped, seconds, dict(candidates), tuple(records))


def twin_of(model: nn.Module, volume: Tensor) -> nn.Module:
    """The model with random weights, whose batch normalisation is fitted to ``volume`` and its mirror image."""
    layers = parameterised(model, volume)
    # One volume alone cannot be normalised where nothing but its channels is left of it.
    return randomised(model, layers, inputs=torch.cat([volume, volume.flip(2)]))


def _check(
    explainer: Explainer,
    used: Sequence[Case],
    records: list[dict[str, Any]],
    finalists: Mapping[str, Method],
    settings: AuditSection,
    clock: float,
    minutes: float | None,
    reading: Mapping[str, Any],
) -> None:
    """Sanity and stability of the finalists, on some of the scans."""
    twin = None
    for case, record in list(zip(used, records, strict=True))[: settings.checked]:
        if minutes is not None and time.monotonic() - clock > 60 * minutes:
            break
        subject = subject_of(explainer, case, **reading)
        twin = twin or twin_of(subject.model, explainer.at_once(subject.volume))
        deepen(record["methods"], subject, finalists, twin, settings)


def _run_off(
    explainer: Explainer,
    cases: Sequence[Case],
    finalists: Mapping[str, Method],
    settings: AuditSection,
    clock: float,
    minutes: float | None,
    reading: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """What the score loses at the finalists' peaks in further scans, without balls elsewhere, which cost the most."""
    found: list[dict[str, Any]] = []
    for case in cases:
        if minutes is not None and time.monotonic() - clock > 60 * minutes:
            break
        try:
            subject = subject_of(explainer, case, **reading)
        except VolsalError:
            continue  # it is not needed
        probe = Probe(subject, settings.radius_mm, settings.controls, settings.blur_mm)
        methods: dict[str, Any] = {}
        for name, values in subject.maps(finalists).items():
            peak = values if isinstance(values, Undefined) else peak_of(values)
            if isinstance(peak, Undefined):
                methods[name] = {"undefined": peak.reason}
            else:
                methods[name] = {"trial": {"effect": float(probe.effects(peak[None])[0])}}
        outputs, score = subject.says(subject.volume), float(subject.score(subject.volume)[0])
        found.append(
            {"case": subject.case, "answer": subject.answer, "outputs": outputs, "score": score, "methods": methods}
        )
    return found


def rank(
    records: Sequence[dict[str, Any]],
    settings: AuditSection,
    target: Any = None,
    further: Sequence[dict[str, Any]] = (),
    patients: Mapping[str, str] | None = None,
) -> list[Scored]:
    """The methods of the records: first those that are trusted, by how often the score moves at their peaks.

    ``further`` records, of some methods, count for that and not for trust.  How often, since within the evidence the
    ball's place decides how much.  ``patients``: case -> whose scan it is.
    """
    trust: dict[str, list[Trust]] = {}
    for one in judge(records, settings, target, patients):
        trust.setdefault(one.method, []).append(one)
    everything = [*records, *further]
    spread = spreads(everything, target)
    believed = {one.answer for each in trust.values() for one in each if one.verdict == TRUSTED}
    counted = [r for r in everything if r["answer"] in believed] or everything
    if answers_alike(records, settings):
        counted = everything
    table = np.array([[_moved_by(record, name, spread) for record in counted] for name in trust])
    best = np.nanmax(table, axis=0)
    shares = table[:, best > 0] / best[best > 0]
    found = [_scored(name, share, trust[name]) for name, share in zip(trust, shares, strict=True)]
    return sorted(found, key=lambda one: (not one.answers, _below(one), -one.strength))


def _moved_by(record: Mapping[str, Any], name: str, spread: Mapping[str, float]) -> float:
    """By how much the score falls at a method's peak; NaN where the method was not asked."""
    if name not in record["methods"]:
        return float("nan")
    found = scaled(record, name, spread)
    return 0.0 if isinstance(found, Undefined) else max(found, 0.0)


def _scored(name: str, shares: NDArray[np.float64], trust: Sequence[Trust]) -> Scored:
    shares = shares[~np.isnan(shares)]
    if not shares.size:
        return Scored(name, Undefined("nothing moves the score"), 0.0, tuple(trust))
    return Scored(name, float((shares >= _DECISIVE).mean()), float(shares.mean()), tuple(trust))


def _below(one: Scored) -> float:
    return 0.0 if isinstance(one.score, Undefined) else -one.score
