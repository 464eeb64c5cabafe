"""Which map to believe, measured on the user's own model and scans, without masks.

Every candidate, a method at a layer, is asked where the evidence lies in each of a sample of scans.  There a small
ball is taken out of the scan: the better a map, the more the score moves.  For answers of the model for which no map's
peak is trusted, all that a map holds highest is taken out at once, of the maps that are trusted for another answer, or
of all where none is.  What is trusted at all is in :mod:`volsal.audit.trust`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
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
from volsal.audit.examine import examine, widen
from volsal.audit.metric import Undefined
from volsal.audit.patients import patients_of
from volsal.audit.probe import Probe, highest_of, peak_of
from volsal.audit.sanity import parameterised, randomised
from volsal.audit.subject import Subject, subject_of
from volsal.audit.trust import HIGHEST, PEAK, TRUSTED, UNDECIDED, Trust, answers_alike, judge, scaled, spreads
from volsal.choices import method_names
from volsal.config import AuditSection
from volsal.errors import VolsalError
from volsal.explain import Explainer
from volsal.scans.find import Case

# What the two ways of asking are called in plain data.
_BY = {PEAK: "its peak", HIGHEST: "its highest part"}
NONE = "none of these can be trusted for this model"
TOO_FEW = "the patients are too few to say which of these can be trusted"
# So many earlier layers are tried, the deepest of each resolution.
_EARLIER = 3
# Of the best candidates, so many are put to the sanity and stability checks, and to a run-off on so many more scans.
_FINALISTS = 4
_RUN_OFF = 36
_PATH_STEPS = 16
# Of the minutes so much goes to the scans that all candidates are asked about, and so much has gone when the second
# question ends, for the checks that what is recommended must have passed.
_FIRST_LOOK, _SECOND_LOOK = 0.7, 0.85
# A peak is as good as the best where the score moves by this share of what it moves there.
_DECISIVE = 0.5


@dataclass(frozen=True)
class Scored:
    """A candidate.

    Attributes
    ----------
    method : its name
    score : in which share of the scans with a trusted answer the score moves, at its peak or without what it holds
        highest, by at least half of what it moves at the best candidate's; undefined where no candidate moves it
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
    def by_peak(self) -> dict[str, tuple[str, ...]]:
        """By candidate the answers for which its peaks are trusted."""
        return {
            each.method: tuple(one.answer for one in each.trust if (one.verdict, one.way) == (TRUSTED, PEAK))
            for each in self.candidates
        }

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
                    "trusted for": {trust.answer: _BY[trust.way] for trust in one.trust if trust.verdict == TRUSTED},
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
        Where no scan can be used, or there is no candidate.
    """
    if candidates is not None and not candidates:
        raise SettingError("there is no candidate to choose from; name methods, or leave them out for the usual ones")
    settings = settings or AuditSection.model_validate({})
    chosen = sampled(cases, scans)
    trial = _Trial(explainer, settings, minutes, reading, patients_of(cases))
    skipped = trial.examine(chosen, candidates, progress)
    if not trial.records:
        reasons = "; ".join(dict.fromkeys(skipped.values())) or "there are none"
        raise SettingError(f"none of {len(chosen)} scans can be used: {reasons}")
    ranked = trial.ranked()
    if trial.widen(ranked, progress):
        ranked = trial.ranked()
    if any(one.answers for one in ranked):
        others = sampled(cases, scans + _RUN_OFF)[len(chosen) :] if len(chosen) == scans else []
        ranked = trial.run_off(others, ranked)
    best = ranked[0].method if ranked[0].answers else None
    method = trial.candidates[best] if best else None
    seconds = time.monotonic() - trial.clock
    return Choice(
        best, method, tuple(ranked), len(trial.records), skipped, seconds, trial.candidates, tuple(trial.records)
    )


@dataclass(eq=False)
class _Trial:
    """Candidates on scans, one question after another, until the minutes are over.

    Attributes
    ----------
    used, records : the scans, and what was found of each; checks are added to it
    candidates : by name
    checked : those of them that were put to the sanity and stability checks
    """

    explainer: Explainer
    settings: AuditSection
    minutes: float | None
    reading: Mapping[str, Any]
    patients: Mapping[str, str]
    used: list[Case] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    candidates: dict[str, Method] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set)
    clock: float = field(default_factory=time.monotonic)

    def is_over(self, share: float = 1.0) -> bool:
        """Whether that share of the minutes has gone."""
        return self.minutes is not None and time.monotonic() - self.clock > 60 * self.minutes * share

    def subject(self, case: Case) -> Subject:
        return subject_of(self.explainer, case, **self.reading)

    def examine(
        self,
        cases: Sequence[Case],
        candidates: Mapping[str, Method] | None,
        progress: Callable[[str, int, int], None] | None,
    ) -> dict[str, str]:
        """Ask all candidates, None: the usual ones, about each scan; why others cannot be used, by case."""
        skipped: dict[str, str] = {}
        self.candidates = dict(candidates or {})
        for number, case in enumerate(cases):
            if self.records and self.is_over(_FIRST_LOOK):
                break
            try:
                subject = self.subject(case)
            except VolsalError as error:
                skipped[case.id] = str(error)
                continue
            if candidates is None and not self.records:
                own = dict(zip(self.explainer.names, self.explainer.methods, strict=True))
                self.candidates = candidates_of(subject.model, self.explainer.at_once(subject.volume), own)
            self.records.append(examine(subject, self.candidates, self.settings, seed=number, regions=False))
            self.used.append(case)
            if progress:
                progress("scans", number + 1, len(cases))
        return skipped

    def ranked(self) -> list[Scored]:
        """By what was found; where all of the best fail their checks the next best are checked.

        So are those on which alone the trust for some answer rests.
        """
        while True:
            ranked = self._rank()
            sure = {answer for one in ranked if one.method in self.checked for answer in one.answers}
            best = ranked[0].method in self.checked
            new = [one.method for one in ranked if one.method not in self.checked and set(one.answers) - sure]
            if (best and not new) or not any(one.answers for one in ranked):
                return self._checked_first(ranked)
            self._check({name: self.candidates[name] for name in (new or [ranked[0].method])[:_FINALISTS]})

    def _rank(self, further: Sequence[dict[str, Any]] = ()) -> list[Scored]:
        return rank(self.records, self.settings, self.explainer.targets[0], further, self.patients)

    def _checked_first(self, ranked: list[Scored]) -> list[Scored]:
        """Nothing unchecked is recommended."""
        return sorted(ranked, key=lambda one: (not one.answers, one.method not in self.checked))

    def _check(self, finalists: Mapping[str, Method]) -> None:
        """Sanity and stability of some candidates, on some of the scans, and on one at least where each has a map."""
        twin = None
        for number, (case, record) in enumerate(zip(self.used, self.records, strict=True)):
            known = all(any("sanity" in one["methods"][name] for one in self.records) for name in finalists)
            if not self.settings.checked or (known and (number >= self.settings.checked or self.is_over())):
                break
            subject = self.subject(case)
            twin = twin or twin_of(subject.model, self.explainer.at_once(subject.volume))
            deepen(record["methods"], subject, finalists, twin, self.settings)
        self.checked.update(finalists)

    def widen(self, ranked: Sequence[Scored], progress: Callable[[str, int, int], None] | None = None) -> bool:
        """Whether anything was asked: what the score loses without all that a map holds highest.

        In the scans with an answer for which no map is trusted, of the candidates that are trusted for another one; of
        all of them where none is.
        """
        if not self.settings.highest or not self.records[0]["log_odds"] or answers_alike(self.records, self.settings):
            return False
        judged = [trust for one in ranked for trust in one.trust if trust.verdict != UNDECIDED]
        silent = {trust.answer for trust in judged} - {answer for one in ranked for answer in one.answers}
        trusted = [one.method for one in ranked if one.answers] or list(self.candidates)
        methods = {name: self.candidates[name] for name in trusted}
        pairs = zip(self.used, self.records, strict=True)
        asked = [(at, *pair) for at, pair in enumerate(pairs) if pair[1]["answer"] in silent]
        for done, (number, case, record) in enumerate(asked):
            if self.is_over(_SECOND_LOOK):
                break
            widen(record["methods"], self.subject(case), methods, self.settings, seed=number)
            if progress:
                progress("highest", done + 1, len(asked))
        return bool(asked)

    def run_off(self, cases: Sequence[Case], ranked: Sequence[Scored]) -> list[Scored]:
        """Rank by what the score loses where the finalists point in further scans too.

        Without the same elsewhere, which costs the most.
        """
        ways = _believed(chain.from_iterable(one.trust for one in ranked))
        names = [one.method for one in ranked if one.answers and one.method in self.checked]
        finalists = {name: self.candidates[name] for name in names}
        further: list[dict[str, Any]] = []
        for case in cases:
            if self.is_over() or not finalists:
                break
            try:
                subject = self.subject(case)
            except VolsalError:
                continue  # it is not needed
            if subject.answer in ways:
                further.append(self._without(subject, finalists, ways[subject.answer]))
        return self._checked_first(self._rank(further))

    def _without(self, subject: Subject, finalists: Mapping[str, Method], way: str) -> dict[str, Any]:
        """The record of a scan, of which what each map points at is taken out in that way."""
        settings = self.settings
        probe = Probe(subject, settings.radius_mm, settings.controls, settings.blur_mm)
        methods: dict[str, Any] = {}
        for name, values in subject.maps(finalists).items():
            lost = values if isinstance(values, Undefined) else _lost(probe, values, way, settings)
            methods[name] = {"undefined": lost.reason} if isinstance(lost, Undefined) else {way: {"effect": lost}}
        outputs, score = subject.says(subject.volume), float(subject.score(subject.volume)[0])
        return {"case": subject.case, "answer": subject.answer, "outputs": outputs, "score": score, "methods": methods}


def _lost(probe: Probe, values: NDArray, way: str, settings: AuditSection) -> float | Undefined:
    """What the score loses without a ball at a map's peak, or all that is highest in it."""
    if way == HIGHEST:
        voxels = highest_of(values, settings.highest)
        return voxels if isinstance(voxels, Undefined) else float(probe.without([voxels])[0])
    peak = peak_of(values)
    return peak if isinstance(peak, Undefined) else float(probe.effects(peak[None])[0])


def _believed(trust: Iterable[Trust]) -> dict[str, str]:
    """The answers for which some map is trusted, and in which way: for its peaks, if any is."""
    trusted = [one for one in trust if one.verdict == TRUSTED]
    return {one.answer: one.way for one in sorted(trusted, key=lambda one: one.way == PEAK)}


def twin_of(model: nn.Module, volume: Tensor) -> nn.Module:
    """The model with random weights, whose batch normalisation is fitted to ``volume`` and its mirror image."""
    layers = parameterised(model, volume)
    # One volume alone cannot be normalised where nothing but its channels is left of it.
    return randomised(model, layers, inputs=torch.cat([volume, volume.flip(2)]))


def rank(
    records: Sequence[dict[str, Any]],
    settings: AuditSection,
    target: Any = None,
    further: Sequence[dict[str, Any]] = (),
    patients: Mapping[str, str] | None = None,
) -> list[Scored]:
    """The methods of the records: first those that are trusted, by how often the score moves at their peaks.

    In scans with an answer for which none is trusted for its peak, by how often it moves without what they hold
    highest, if some are trusted for that.

    ``further`` records, of some methods, count for that and not for trust.  How often, since within the evidence the
    ball's place decides how much.  ``patients``: case -> whose scan it is.
    """
    trust: dict[str, list[Trust]] = {}
    for one in judge(records, settings, target, patients):
        trust.setdefault(one.method, []).append(one)
    everything = [*records, *further]
    spread = spreads(everything, target)
    ways = _believed(chain.from_iterable(trust.values()))
    counted = [r for r in everything if r["answer"] in ways] or everything
    table = np.array([[_moved_by(r, name, spread, ways.get(r["answer"], PEAK)) for r in counted] for name in trust])
    best = np.nanmax(table, axis=0)
    shares = table[:, best > 0] / best[best > 0]
    found = [_scored(name, share, trust[name]) for name, share in zip(trust, shares, strict=True)]
    return sorted(found, key=lambda one: (not one.answers, _below(one), -one.strength))


def _moved_by(record: Mapping[str, Any], name: str, spread: Mapping[str, float], way: str) -> float:
    """By how much the score falls where a method says; NaN where the method was not asked."""
    mine = record["methods"].get(name)
    if mine is None or (way not in mine and "undefined" not in mine):
        return float("nan")
    found = scaled(record, name, spread, way)
    return 0.0 if isinstance(found, Undefined) else max(found, 0.0)


def _scored(name: str, shares: NDArray[np.float64], trust: Sequence[Trust]) -> Scored:
    shares = shares[~np.isnan(shares)]
    if not shares.size:
        return Scored(name, Undefined("nothing moves the score"), 0.0, tuple(trust))
    return Scored(name, float((shares >= _DECISIVE).mean()), float(shares.mean()), tuple(trust))


def _below(one: Scored) -> float:
    return 0.0 if isinstance(one.score, Undefined) else -one.score
