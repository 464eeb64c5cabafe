"""Which maps can be believed, by what the score did where they point; over scans, and for each answer on its own.

The rule, which every verdict states with its figures: a map is trusted for an answer of the model (its predicted class)
where, over scans of at least ``min_scans`` patients with that answer,

1. in at least ``min_share`` of them the score falls more without a ball at the map's peak than without any of the balls
   elsewhere, and this is no chance: a binomial test over one scan of each patient, the first in which the map has a
   place, with Holm's correction over all methods and answers and both ways of asking;
2. the median fall is at least ``min_effect`` of the score's spread over all scans and, in log odds, at least
   ``min_change``; of outputs that are no log odds, at least ``min_effect_other`` of the spread;
3. random weights do not draw the same map (median top Dice in the body at most ``max_alike``), and the peak stays under
   at least ``min_stable`` of harmless changes: judged where they were asked for.

Evidence may be spread so widely that no ball holds enough of it.  So where the peak does not pass, all that the map
holds highest is asked about at once (``highest`` of the field), beside what is highest in the map moved elsewhere, as
deep in the body, by the same rules, but that the fall is at least ``min_times_highest`` of the largest elsewhere, for
these places are few and alike, and in the median at least ``min_change_highest`` in log odds; and that the map's
highest hundredth overlaps with that under harmless changes by a Dice of at least ``min_stable``.  Only of log odds: the
highest part of a true gradient moves any score by much of its spread, that of random weights too.

A model that answers all scans nearly alike has no map that can be trusted.  The second rule is the one that tells a
trained model from one with random weights: a gradient is true of either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volsal.attribution import Target
from volsal.audit.examine import figure
from volsal.audit.metric import Figure, Undefined, numbers
from volsal.audit.patients import one_of_each, owners_of
from volsal.audit.statistics import Summary, holm, summarise
from volsal.config import AuditSection

TRUSTED, UNTRUSTED, UNDECIDED = "can be trusted", "cannot be trusted", "cannot be told"
#: The two ways of asking, by what the records call them.
PEAK, HIGHEST = "trial", "highest"


@dataclass(frozen=True)
class Trust:
    """A method's case for one answer of the model.

    Attributes
    ----------
    method, answer : of what
    way : what the verdict rests on, :data:`PEAK` or :data:`HIGHEST`
    part : of the field, about, that is taken out, where it is the highest
    also : what stands against it in the other way, where that was asked and does not pass either
    verdict : :data:`TRUSTED`, :data:`UNTRUSTED`, or :data:`UNDECIDED`, where there are too few patients
    why : what stands against it; empty where nothing does
    scans, undefined : with that answer, and of these those on which the map has no place
    moved : in how many the score moved more than at every place elsewhere
    patients, moved_patients : the same, of one scan of each patient
    p_value : of so many ``moved_patients`` by chance, corrected
    effect : median fall of the score, in its spreads, with its interval over patients
    change : the same in the score's own unit
    alike, stable : see the module's rule, stable of the peak or of what is highest; undefined where not asked for
    """

    method: str
    answer: str
    way: str
    part: float
    verdict: str
    why: tuple[str, ...]
    scans: int
    undefined: int
    moved: int
    patients: int
    moved_patients: int
    p_value: float
    effect: Summary
    change: Figure
    alike: Figure
    stable: Figure
    also: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The verdict with what it rests on, in a sentence."""
        if isinstance(self.change, Undefined):
            return f"{self.method}, {self.answer}: {self.verdict}: {'; '.join(self.why)}{self._also}"
        what = (
            "a ball at the map's peak the score moves more than at every place elsewhere"
            if self.way == PEAK
            else f"all that is highest in the map, about {self.part:.2g} of the field, the score moves far more than "
            "without what is highest when the map is moved elsewhere"
        )
        found = (
            f"without {what} in {self.moved} of {self.scans} scans, by {self.change:.3g} in the median "
            f"({_told(self.effect.estimate)} of its spread)"
        )
        against = f"; but {'; '.join(self.why)}" if self.why else ""
        return f"{self.method}, {self.answer}: {self.verdict}: {found}{against}{self._also}"

    @property
    def _also(self) -> str:
        return f". Nor by all that is highest in it: {'; '.join(self.also)}" if self.also else ""


def judge(
    records: Sequence[Mapping[str, Any]],
    settings: AuditSection,
    target: Target | None = None,
    patients: Mapping[str, str] | None = None,
) -> list[Trust]:
    """Each method's case for each answer.

    Parameters
    ----------
    records : of :func:`volsal.audit.examine.examine`
    target : what was explained, by which the score's spread is found; None: from the scans' own scores
    patients : case -> whose scan it is
    """
    spread = spreads(records, target)
    alike = answers_alike(records, settings)
    answers = sorted({record["answer"] for record in records})
    methods = list(dict.fromkeys(name for record in records for name in record["methods"]))
    ways = (PEAK, HIGHEST) if settings.highest and records[0]["log_odds"] else (PEAK,)
    mine = {answer: [r for r in records if r["answer"] == answer] for answer in answers}
    # Both ways count, whether or not the second was asked for: it is where the first finds nothing.
    sets = [(way, name, answer) for way in ways for name in methods for answer in answers]
    apart = [_apart(way, name, mine[answer], patients or {}) for way, name, answer in sets]
    chances = [_chance(way, each, settings) for (way, *_), each in zip(sets, apart, strict=True)]
    large = [len(each) >= settings.min_scans for each in apart[: len(sets) // len(ways)]] * len(ways)
    corrected = holm([chance if counts else np.nan for chance, counts in zip(chances, large, strict=True)])
    found = {
        (way, name, answer): _case(
            way, name, answer, _asked(way, name, mine[answer]), each, float(p), spread, alike, settings, patients or {}
        )
        for (way, name, answer), each, p in zip(sets, apart, corrected, strict=True)
        if _asked(way, name, mine[answer])
    }
    return [
        _better([found[way, *of] for way in ways if (way, *of) in found]) for _, *of in sets[: len(sets) // len(ways)]
    ]


def _better(ways: Sequence[Trust]) -> Trust:
    """The first that is trusted, or else the first, with what stands against the other, which may not be known."""
    first, *others = ways
    for one in ways:
        if one.verdict == TRUSTED:
            return one
    for other in others:
        first = replace(first, also=other.why, verdict=UNDECIDED if other.verdict == UNDECIDED else first.verdict)
    return first


def _asked(way: str, name: str, records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The scans in which that was asked of the method, whether or not it had an answer."""
    return [record for record in records if way == PEAK or HIGHEST in record["methods"].get(name, {})]


def _has(found: Mapping[str, Any], way: str) -> bool:
    """Whether something could be taken out in that way."""
    return "effect" in found.get(way, {})


def _apart(
    way: str, name: str, records: Sequence[Mapping[str, Any]], patients: Mapping[str, str]
) -> list[Mapping[str, Any]]:
    """What the method found in one scan of each patient."""
    records = _asked(way, name, records)
    one_each = one_of_each(records, patients, lambda record: _has(record["methods"].get(name, {}), way))
    return [record["methods"].get(name, {}) for record in one_each]


def spreads(records: Sequence[Mapping[str, Any]], target: Target | None = None) -> dict[str, float]:
    """By case: the standard deviation over all scans of the score that was explained of it.

    Of the predicted class's logit: of the logit of that class, whatever the other scans' class is.
    """
    import torch

    from volsal.attribution.targets.target import fixed

    sizes = {len(record["outputs"]) for record in records}
    if target is None or sizes == {1} or len(sizes) > 1:
        own = float(np.std([record["score"] for record in records]))
        return {record["case"]: own for record in records}
    outputs = torch.tensor([record["outputs"] for record in records], dtype=torch.float64)
    found = {}
    for record, output in zip(records, outputs, strict=True):
        asked = fixed(target, output[None])
        found[record["case"]] = float(np.std([float(asked(other[None])[0]) for other in outputs]))
    return found


def answers_alike(records: Sequence[Mapping[str, Any]], settings: AuditSection) -> str | None:
    """Why the model's answers are nearly one for all scans, in words; None where they differ, or are no logits."""
    outputs = [record["outputs"] for record in records]
    if len({len(one) for one in outputs}) > 1 or not records[0]["log_odds"] or len(outputs) < 2:
        return None
    logits = np.array(outputs)
    if logits.shape[1] == 1:
        logits = np.hstack([logits / 2, -logits / 2])
    margins = logits - logits.mean(axis=1, keepdims=True)
    varies = float(2 * margins.std(axis=0).max())  # of two classes: of their margin
    if varies >= 2 * settings.min_change:
        return None
    return f"the model answers all of these scans nearly alike: its log odds spread by {varies:.2g}"


def scaled(record: Mapping[str, Any], name: str, spread: Mapping[str, float], way: str = PEAK) -> Figure:
    """A method's effect in one scan, in spreads of the score."""
    found = record["methods"].get(name, {})
    if not _has(found, way):
        return figure(found.get(way, found))
    size = spread[record["case"]]
    return found[way]["effect"] / size if size > 0 else Undefined("the score does not vary over scans")


def _chance(way: str, found: Sequence[Mapping[str, Any]], settings: AuditSection) -> float:
    """Of at least so many scans whose score moves most there, were it a place like all others."""
    fewest = min([one[way]["controls"] for one in found if _has(one, way)] or [1])
    return binomial_tail(_moved(way, found, settings), len(found), 1 / (1 + fewest))


def _moved(way: str, found: Sequence[Mapping[str, Any]], settings: AuditSection) -> int:
    """In how many scans the score moves more there than anywhere else."""
    times = 1.0 if way == PEAK else settings.min_times_highest
    trials = [one[way] for one in found if _has(one, way)]
    return sum(trial["effect"] > max(0.0, times * trial["control_largest"]) for trial in trials)


def binomial_tail(least: int, of: int, chance: float) -> float:
    """P(X >= least) of X ~ Binomial(of, chance).

    >>> round(binomial_tail(1, 2, 0.5), 3)
    0.75
    """
    return float(min(1.0, sum(comb(of, k) * chance**k * (1 - chance) ** (of - k) for k in range(least, of + 1))))


def _case(
    way: str,
    name: str,
    answer: str,
    mine: Sequence[Mapping[str, Any]],
    apart: Sequence[Mapping[str, Any]],
    p_value: float,
    spread: Mapping[str, float],
    alike: str | None,
    settings: AuditSection,
    patients: Mapping[str, str],
) -> Trust:
    found = [record["methods"].get(name, {"undefined": "it was not asked for"}) for record in mine]
    trials = [one[way] for one in found if _has(one, way)]
    owners = owners_of(mine, patients)
    enough = len(apart) >= settings.min_scans
    effect = summarise([scaled(record, name, spread, way) for record in mine], owners, "median")
    change: Figure = (
        float(np.median([trial["effect"] for trial in trials])) if trials else Undefined("the map has no place")
    )
    drawn = _median([figure(one.get("sanity", {}).get("top_dice")) for one in found])
    stays = "kept" if way == PEAK else "overlap"
    stable = _median([figure(one.get("stability", {}).get(stays)) for one in found])
    moved, moved_apart = _moved(way, found, settings), _moved(way, apart, settings)
    why = [] if alike is None else [alike]
    if enough:
        least = settings.min_change if way == PEAK else settings.min_change_highest
        told = (moved_apart, len(apart), p_value)
        why += _weak(moved, len(mine), told, effect.estimate, change, least if mine[0]["log_odds"] else None, settings)
    why += _vetoes(way, drawn, stable, settings)
    if not enough and not why:
        of = "scans" if len(apart) == len(mine) else "patients"
        there = "there are" if way == PEAK else "it was asked in"
        why, verdict = [f"{there} {len(apart)} {of} with this answer, fewer than {settings.min_scans}"], UNDECIDED
    else:
        verdict = UNTRUSTED if why else TRUSTED
    return Trust(
        name, answer, way, settings.highest, verdict, tuple(why), len(mine), len(found) - len(trials), moved,
        len(apart), moved_apart, p_value, effect, change, drawn, stable,
    )  # fmt: skip


def _weak(
    moved: int,
    scans: int,
    told: tuple[int, int, float],
    effect: Figure,
    change: Figure,
    least: float | None,
    settings: AuditSection,
) -> list[str]:
    """What is missing for the first two rules; ``least`` change in log odds, None where outputs are none."""
    if isinstance(effect, Undefined) or isinstance(change, Undefined):
        return ["the map has no place, or the score does not vary"]
    why = []
    if moved < settings.min_share * scans:
        why.append(f"that is less than {settings.min_share:.0%} of the scans")
    elif told[-1] > settings.alpha:
        of = "so many are" if told[1] == scans else "in one scan of each patient it does so in {} of {}, which is"
        why.append(f"{of.format(*told)} no rarity by chance (corrected p = {told[-1]:.2g})")
    share = settings.min_effect_other if least is None else settings.min_effect
    if effect < share:
        why.append(f"the score moves by {effect:.2g} of its spread, less than {share:g}")
    if least is not None and change < least:
        why.append(f"the score moves by {change:.2g}, less than {least:g} in log odds")
    return why


def _vetoes(way: str, alike: Figure, stable: Figure, settings: AuditSection) -> list[str]:
    why = []
    if not isinstance(alike, Undefined) and alike > settings.max_alike:
        why.append(f"random weights draw nearly the same map (top Dice {alike:.2f}, above {settings.max_alike:g})")
    if isinstance(stable, Undefined) or stable >= settings.min_stable:
        return why
    if way == PEAK:
        return [*why, f"the peak stays under {stable:.0%} of harmless changes, less than {settings.min_stable:.0%}"]
    overlap = f"by a Dice of {stable:.2g}, less than {settings.min_stable:g}"
    return [*why, f"under harmless changes its highest hundredth overlaps with what it was {overlap}"]


def _median(figures: Sequence[Figure]) -> Figure:
    known: NDArray[np.float64] = numbers([one for one in figures if not isinstance(one, Undefined)])
    return float(np.median(known)) if len(known) else Undefined("it was not asked for")


def _told(value: Figure) -> str:
    return "an unknown part" if isinstance(value, Undefined) else f"{value:.2g}"
