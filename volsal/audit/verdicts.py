"""The audit's verdicts: what was found in words, by rules that are stated beside them, with thresholds of the config.

A verdict claims no more than was measured: that a ball taken out there moved the score, in so many scans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from volsal.attribution import Target
from volsal.audit.examine import figure
from volsal.audit.metric import Figure, Undefined, numbers
from volsal.audit.patients import one_of_each, owners_of
from volsal.audit.shortcuts import OUTSIDE, PADDING, REGIONS
from volsal.audit.statistics import Summary, benjamini_hochberg, difference, summarise
from volsal.audit.trust import TRUSTED, UNDECIDED, UNTRUSTED, Trust, binomial_tail, scaled, spreads
from volsal.config import AuditSection

FLAGGED, CLEAR = "flagged", "not found"
ON, OFF = "on the masks", "off the masks"

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Verdict:
    """One verdict.

    Attributes
    ----------
    name : what it is about
    verdict : in a word or two
    rule : when it is given, with the thresholds used
    words : what was found, in a sentence
    figures : the numbers it rests on, as plain data
    part : of the audit, one of :data:`volsal.audit.standards.PARTS`
    """

    name: str
    verdict: str
    rule: str
    words: str
    figures: dict[str, Any] = field(default_factory=dict)
    part: str = ""


@dataclass(frozen=True)
class Suspicion:
    """A scan that deserves a look, and why; ``weight`` in spreads of the score, the largest first."""

    case: str
    reason: str
    weight: float


def trust_rule(settings: AuditSection) -> str:
    """The rule of :mod:`volsal.audit.trust` with its thresholds."""
    return (
        f"trusted for an answer where, in scans of {settings.min_scans} patients or more, the score moves more without "
        f"a {settings.radius_mm:g} mm ball at the map's peak than without any of {settings.controls} balls elsewhere "
        f"in {settings.min_share:.0%} of the scans or more (binomial p over patients, corrected after Holm, at most "
        f"{settings.alpha:g}), "
        f"by {settings.min_effect:g} of its spread or more (and {settings.min_change:g} in log odds; other outputs: "
        f"{settings.min_effect_other:g} of the spread), where "
        f"random weights do not draw the same map (top Dice at most {settings.max_alike:g}) and the peak stays under "
        f"{settings.min_stable:.0%} of harmless changes or more"
        + (
            "; or where, of log odds, the same is true without all that is highest in the map, about "
            f"{settings.highest:.2g} of the field, beside what is highest in the map moved elsewhere, by "
            f"{settings.min_times_highest:g} times the largest of these and {settings.min_change_highest:g} or more, "
            "and its highest hundredth overlaps with what it is under harmless changes (top Dice "
            f"{settings.min_stable:g} or more)"
            if settings.highest
            else ""
        )
    )


def of_trust(
    trust: Sequence[Trust], settings: AuditSection, remarks: Mapping[str, Sequence[str]] | None = None
) -> list[Verdict]:
    """A verdict for each method: trusted where it is for some answer, with each answer in the words.

    ``remarks`` on methods, which are said after the verdict and do not change it.
    """
    found = []
    for name in dict.fromkeys(one.method for one in trust):
        mine = [one for one in trust if one.method == name]
        kinds = [one.verdict for one in mine]
        verdict = next((kind for kind in (TRUSTED, UNTRUSTED, UNDECIDED) if kind in kinds), UNDECIDED)
        figures = {
            one.answer: {
                "verdict": one.verdict, "way": one.way, "scans": one.scans, "moved": one.moved,
                "patients": one.patients, "moved_patients": one.moved_patients, "p_value": _plain(one.p_value),
                "effect": described(one.effect), "change": _plain(one.change), "alike": _plain(one.alike),
                "stable": _plain(one.stable), "also": list(one.also),
            }
            for one in mine
        }  # fmt: skip
        told = [one.words.removeprefix(f"{name}, ") for one in mine]
        words = ". ".join([*told, *(remarks or {}).get(name, ())])
        found.append(Verdict(f"trust: {name}", verdict, trust_rule(settings), words, figures))
    return found


@dataclass(frozen=True, eq=False)
class Evidence:
    """The scans' figures, and what the verdicts on shortcuts need of them besides.

    Attributes
    ----------
    records : of :func:`volsal.audit.examine.examine`
    name : the method whose map says where to look
    settings : thresholds
    spread : by case, of the score
    patients : case -> whose scan it is
    """

    records: Records
    name: str
    settings: AuditSection
    spread: Mapping[str, float]
    patients: Mapping[str, str]

    @classmethod
    def of(
        cls, records: Records, name: str, settings: AuditSection, target: Target | None, patients: Mapping[str, str]
    ) -> Evidence:
        """With the spread of the scans' scores, found by the target that was explained."""
        return cls(records, name, settings, spreads(records, target), patients)

    @property
    def answers(self) -> list[str]:
        """What the model says of the scans."""
        return sorted({record["answer"] for record in self.records})

    def told(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the method found of a scan."""
        return record["methods"].get(self.name, {})

    def owners(self, records: Records) -> list[str]:
        """Whose scans these are."""
        return owners_of(records, self.patients)

    def matters(self, record: Mapping[str, Any], trial: Mapping[str, Any]) -> bool:
        """Whether a trial of a scan moved its score more than every control, and by enough to be told."""
        size, enough = self.spread[record["case"]], self.settings.shortcut_effect
        least = self.settings.min_change if record["log_odds"] else 0.0
        largest = max(0.0, trial["control_largest"])
        return bool(size > 0 and trial["effect"] > largest and trial["effect"] >= max(enough * size, least))

    def tried(self, record: Mapping[str, Any]) -> bool:
        """Whether balls could be tried where the method's map is highest in a region, and the score told apart."""
        return "suspects" in self.told(record) and self.spread[record["case"]] > 0

    def suspects(self, region: str) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """The scans, with the trial, in which something in a region moves the score."""
        found = [(record, self.told(record).get("suspects", {}).get(region)) for record in self.records]
        return [(record, trial) for record, trial in found if trial and self.matters(record, trial)]


def of_regions(evidence: Evidence) -> tuple[list[Verdict], list[Suspicion]]:
    """Whether the model answers by what lies outside the body, in padding, at the border or in a corner."""
    tests = len(REGIONS) * len(evidence.answers)
    verdicts: list[Verdict] = []
    suspicions: dict[str, Suspicion] = {}
    for region in REGIONS:
        found = evidence.suspects(region)
        verdicts.append(_of_region(evidence, region, found, tests))
        for record, trial in found:
            suspicions.setdefault(record["case"], _suspicion(evidence, record, trial))
    return verdicts, sorted(suspicions.values(), key=lambda one: -one.weight)


def _of_region(
    evidence: Evidence, region: str, found: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], tests: int
) -> Verdict:
    settings = evidence.settings
    rule = (
        f"flagged where, of the scans of {settings.min_scans} patients or more with one answer, "
        f"{settings.shortcut_share:.0%} or more move the score by {settings.shortcut_effect:g} of its spread or more, "
        f"and more than every ball elsewhere, without a {settings.radius_mm:g} mm ball at the highest place of "
        f"{evidence.name} {region}"
        + (f" (more than {settings.body_margin_mm:g} mm away)" if region == OUTSIDE else "")
        + f"; binomial p over patients, corrected after Bonferroni, at most {settings.alpha:g}; of fewer patients, "
        "or where the map has no place, it cannot be told"
    )
    figures: dict[str, dict[str, Any]] = {}
    flagged, few = [], {}
    for answer in evidence.answers:
        mine = [r for r in evidence.records if r["answer"] == answer and (region == PADDING or r["body"]["sure"])]
        there = [(record, trial) for record, trial in found if record["answer"] == answer]
        apart, cases = one_of_each(mine, evidence.patients, evidence.tried), {record["case"] for record, _ in there}
        moved = sum(record["case"] in cases for record in apart)
        chance = min(1.0, tests * binomial_tail(moved, len(apart), 1 / (1 + settings.controls)))
        densities = [figure(evidence.told(r).get("regions", {}).get(region, {}).get("density")) for r in mine]
        tried = sum(map(evidence.tried, mine))
        if (enough := sum(map(evidence.tried, apart))) < settings.min_scans:
            few[answer] = enough
        figures[answer] = {
            "scans": len(mine), "tried": tried, "suspicious": len(there),
            "patients": len(apart), "suspicious_patients": moved, "p_value": chance,
            "density": described(summarise(densities, evidence.owners(mine), "median")),
        }  # fmt: skip
        large = len(apart) >= settings.min_scans and len(there) >= settings.shortcut_share * len(mine)
        if large and chance <= settings.alpha:
            flagged.append((answer, there, len(mine)))
    if not any(one["scans"] for one in figures.values()):
        said = next(record["body"]["said"] for record in evidence.records)
        return Verdict(region, UNDECIDED, rule, f"the body is not known in any scan; it is {said}", figures)
    if not flagged:
        of = sum(one["tried"] for one in figures.values())
        some = f"in {len(found)} of {of} scans something there moves the score"
        if found:
            some += ", too few to speak of a shortcut"
        if few:
            answers = ", ".join(f"{answer} ({tried})" for answer, tried in few.items())
            some += f"; tried in scans of too few patients to tell of: {answers}"
        return Verdict(region, UNDECIDED if len(few) == len(figures) else CLEAR, rule, some, figures)
    words = "; ".join(_shortcut(evidence, answer, there, of) for answer, there, of in flagged)
    return Verdict(region, FLAGGED, rule, words, figures)


def _shortcut(
    evidence: Evidence, answer: str, there: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], of: int
) -> str:
    where, often = Counter(trial["where"] for _, trial in there).most_common(1)[0]
    sizes = sorted(trial["effect"] / evidence.spread[record["case"]] for record, trial in there)
    return (
        f"{answer}: the score hangs on something {where} (so in {often} of {len(there)}): without a "
        f"{evidence.settings.radius_mm:g} mm ball there it falls by {sizes[len(sizes) // 2]:.2g} of its spread "
        f"in the median, and more than without any ball elsewhere, in {len(there)} of {of} scans"
    )


def _suspicion(evidence: Evidence, record: Mapping[str, Any], trial: Mapping[str, Any]) -> Suspicion:
    weight = trial["effect"] / evidence.spread[record["case"]]
    at = ", ".join(f"{mm:.0f}" for mm in trial["mm"])
    reason = (
        f"{record['answer']}: without a {evidence.settings.radius_mm:g} mm ball at ({at}) mm, {trial['where']}, the "
        f"score falls by {trial['effect']:.3g} ({weight:.2g} of its spread); without any of {trial['controls']} balls "
        f"elsewhere by {trial['control_largest']:.2g} at most"
    )
    return Suspicion(record["case"], reason, weight)


def of_masks(evidence: Evidence) -> list[Verdict]:
    """Whether the peaks that matter lie on the masks of the cases that have some."""
    names = dict.fromkeys(name for record in evidence.records for name in record["masks"])
    return [_of_mask(evidence, name) for name in names]


def _of_mask(evidence: Evidence, mask: str) -> Verdict:
    settings = evidence.settings
    rule = (
        f"of the scans with that mask whose score moves at the peak of {evidence.name}, the share whose peak lies on "
        f"it or within {settings.tolerance_mm:g} mm: on the masks where the interval's low end is above half, off "
        f"where its high end is below; of fewer than {settings.min_scans} patients it cannot be told"
    )
    having = [r for r in evidence.records if mask in r["masks"] and "effect" in evidence.told(r).get("trial", {})]
    mine = [r for r in having if evidence.matters(r, evidence.told(r)["trial"])]
    hits = [figure(evidence.told(r)["masks"][mask]["pointing game"]["value"]) for r in mine]
    hit = summarise(hits, evidence.owners(mine))
    sizes = [evidence.spread[r["case"]] for r in having]
    used: list[Figure] = [
        r["masks"][mask]["effect"] / size if size > 0 else Undefined("the score does not vary")
        for r, size in zip(having, sizes, strict=True)
    ]
    removed = summarise(used, evidence.owners(having), "median")
    figures = {"hit": described(hit), "removal": described(removed), "scans": len(having), "moved": len(mine)}
    name = f"mask: {mask}"
    ends = hit.estimate, hit.low, hit.high
    owners = len(set(evidence.owners(mine)))
    if owners < settings.min_scans or any(isinstance(end, Undefined) for end in ends):
        few = (
            f"the score moves at the peak in {len(mine)} of {len(having)} scans, of {owners} patients, and these are "
            f"fewer than {settings.min_scans}"
            if owners < settings.min_scans
            else f"over the {owners} patients whose score moves at the peak there is no interval"
        )
        return Verdict(name, UNDECIDED, rule, few, figures)
    share, low, high = numbers(ends)
    verdict = ON if low > 0.5 else OFF if high < 0.5 else UNDECIDED
    words = f"{share:.0%} of {hit.n} peaks that move the score lie on it"
    if not isinstance(removed.estimate, Undefined):
        words += f"; without the mask the score falls by {removed.estimate:.2g} of its spread in the median"
    return Verdict(name, verdict, rule, words, figures)


Of = Callable[[Mapping[str, Any]], Figure]


def group_differences(evidence: Evidence, groups: Mapping[str, Mapping[str, str]], level: float = 0.05) -> Verdict:
    """Figures that differ between groups of patients, with the false discovery rate controlled.

    Parameters
    ----------
    groups : by column, such as site, sex, scanner, label: case -> its value
    """
    of: dict[str, Of] = {
        "effect at the peak": lambda record: scaled(record, evidence.name, evidence.spread),
        "density outside the body": lambda record: figure(
            evidence.told(record).get("regions", {}).get(OUTSIDE, {}).get("density")
        ),
    }
    rows = []
    for column, values in groups.items():
        for value in sorted(set(values.values())):
            first = [r for r in evidence.records if values.get(r["case"]) == value]
            second = [r for r in evidence.records if values.get(r["case"]) not in (None, value)]
            if min(len(set(evidence.owners(group))) for group in (first, second)) < evidence.settings.min_scans:
                continue
            for name, compute in of.items():
                found = difference(
                    [compute(r) for r in first], [compute(r) for r in second],
                    evidence.owners(first), evidence.owners(second),
                )  # fmt: skip
                rows.append((column, value, name, found))
    known = [row for row in rows if not isinstance(row[3].p_value, Undefined)]
    adjusted = benjamini_hochberg(numbers([row[3].p_value for row in known]))
    figures: list[dict[str, Any]] = [
        {
            "group": column, "value": value, "figure": name, "difference": _plain(found.estimate),
            "low": _plain(found.low), "high": _plain(found.high), "p_value": _plain(found.p_value),
            "adjusted": float(q), "scans": [found.first.n, found.second.n],
        }
        for (column, value, name, found), q in zip(known, adjusted, strict=True)
    ]  # fmt: skip
    told = [row for row in figures if row["adjusted"] <= level]
    rule = (
        f"a difference in means between a group and all other scans, of {evidence.settings.min_scans} patients or more "
        f"each; permutation tests over patients, adjusted after Benjamini and Hochberg, at most {level:g}"
    )
    words = "; ".join(
        f"{row['figure']} of {row['group']} {row['value']}: {row['difference']:+.2g} (adjusted p {row['adjusted']:.2g})"
        for row in told
    )
    missing = "no figure is defined in groups of enough patients" if rows else "no groups of enough patients are given"
    none = "no difference is told" if figures else missing
    verdict = "differ" if told else CLEAR if figures else UNDECIDED
    return Verdict("groups", verdict, rule, words or none, {"differences": figures})


def described(summary: Summary) -> dict[str, Any]:
    """``{value, low, high, n, undefined}`` of a figure over scans; ``undefined``: how many have none, with reasons."""
    return {
        "value": _plain(summary.estimate),
        "low": _plain(summary.low),
        "high": _plain(summary.high),
        "n": summary.n,
        "patients": summary.patients,
        "undefined": summary.undefined,
        "reasons": summary.reasons,
    }


def _plain(value: Figure) -> float | None:
    return None if isinstance(value, Undefined) or value != value else float(value)
