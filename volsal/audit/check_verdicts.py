"""What the checks of a few scans (:mod:`volsal.audit.checks`) say of each map, by rules with the config's thresholds.

A check is passed or failed where the 95 % bootstrap interval over patients lies on one side of the threshold, and it
cannot be told where it holds it.  None of them makes a map trusted: that it points to what the model uses is shown by
intervention alone (:mod:`volsal.audit.trust`).  What fails is said as a remark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from volsal.audit.checks import mean_over
from volsal.audit.examine import figure
from volsal.audit.faithfulness import CONTROLS, KINDS
from volsal.audit.metric import Figure, Undefined
from volsal.audit.statistics import Summary, summarise
from volsal.audit.trust import UNDECIDED
from volsal.audit.verdicts import Evidence, Verdict, described

PASSED, FAILED = "passed", "failed"

_INTERVAL = "; where the 95 % interval over patients holds that, it cannot be told"
_SHARED = "agreement is no proof, for methods that share a fault agree"


def of_checks(evidence: Evidence, names: Sequence[str]) -> list[Verdict]:
    """The verdicts on each method's map; none where no scan was checked."""
    found = []
    for name in names:
        mine = _Checked.of(evidence, name)
        if mine.found:
            found += [_of_weights(mine), _of_outputs(mine), _of_areas(mine), *_of_labels(mine)]
    return found


def remarks_of(verdicts: Sequence[Verdict]) -> dict[str, list[str]]:
    """By method what it failed, in a sentence each."""
    said: dict[str, list[str]] = {}
    for one in verdicts:
        check, _, name = one.name.partition(": ")
        if one.verdict == FAILED and check in _REMARKS:
            said.setdefault(name, []).append(f"Remark: {_REMARKS[check]}")
    return said


_WEIGHTS, _OUTPUTS, _AREAS, _LABELS = "random weights", "other outputs", "deletion and insertion", "random labels"
_REMARKS = {
    _WEIGHTS: "random weights draw it more alike than two scans' maps are, so that it shows the image as well",
    _OUTPUTS: "it is not class-discriminative: for other outputs of the model it shows much the same places",
    _AREAS: "voxels taken in its order do no more than voxels in orders of chance",
    _LABELS: "a model that learned shuffled labels has it more alike than two scans' maps are",
}


class _Checked:
    """The scans in which a method was checked."""

    def __init__(self, evidence: Evidence, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        self.name, self.settings = name, evidence.settings
        self.found = [record["methods"][name] for record in records]
        self.owners = evidence.owners(records)

    @classmethod
    def of(cls, evidence: Evidence, name: str) -> _Checked:
        return cls(evidence, name, [r for r in evidence.records if "cascading" in r["methods"].get(name, {})])

    def over(self, figure_of: Callable[[Mapping[str, Any]], Figure]) -> Summary:
        """A figure over the scans."""
        return summarise([figure_of(one) for one in self.found], self.owners)


def judged(found: Summary, limit: float, better: str = "lower") -> str:
    """On which side of a limit an interval lies; it cannot be told where it holds the limit, or there is none."""
    if isinstance(found.low, Undefined) or isinstance(found.high, Undefined):
        return UNDECIDED
    if found.high <= limit:
        return PASSED if better == "lower" else FAILED
    if found.low > limit:
        return FAILED if better == "lower" else PASSED
    return UNDECIDED


def told(found: Summary, sign: str = "") -> str:
    """An estimate with its interval, in words."""
    if isinstance(found.estimate, Undefined):
        return f"undefined ({'; '.join(found.reasons) or found.estimate.reason})"
    if isinstance(found.low, Undefined) or isinstance(found.high, Undefined):
        return f"{found.estimate:{sign}.2g}"
    return f"{found.estimate:{sign}.2g} ({found.low:{sign}.2g} to {found.high:{sign}.2g})"


def _minus(one: Figure, other: Figure) -> Figure:
    if isinstance(one, Undefined):
        return one
    return other if isinstance(other, Undefined) else one - other


def _of_weights(mine: _Checked) -> Verdict:
    layers = mine.found[0]["cascading"][-1]["of"]
    return _drawn_otherwise(
        mine,
        _WEIGHTS,
        lambda one: figure(one["cascading"][-1]["ssim"]),
        which="with that of a model whose layers are all random",
        measured=f"with all {layers} layers random the map's SSIM with the trained model's",
        source="Adebayo et al. 2018; the rule of Arun et al. 2021",
        called="all layers random",
        further={mode: _steps(mine, mode) for mode in ("cascading", "independent")},
    )


def _of_labels(mine: _Checked) -> list[Verdict]:
    """None where there is no model of random labels."""
    if not all("random labels" in one for one in mine.found):
        return []
    return [
        _drawn_otherwise(
            mine,
            _LABELS,
            lambda one: figure(one["random labels"]["ssim"]),
            which="with that of the model trained on shuffled labels",
            measured="the map's SSIM with that of the model of shuffled labels",
            source="Adebayo et al. 2018",
            called="random labels",
        )
    ]


def _drawn_otherwise(
    mine: _Checked,
    check: str,
    drawn: Callable[[Mapping[str, Any]], Figure],
    *,
    which: str,
    measured: str,
    source: str,
    called: str,
    further: Mapping[str, Any] | None = None,
) -> Verdict:
    """Whether a model that knows nothing draws the map more alike than the maps of two scans are."""

    def unrelated(one: Mapping[str, Any]) -> Figure:
        return figure(one["unrelated"]["ssim"])

    limit = mine.settings.max_excess
    apart, own, usual = (mine.over(f) for f in (lambda one: _minus(drawn(one), unrelated(one)), drawn, unrelated))
    rule = (
        f"passed where the SSIM of the map {which}, less the SSIM of the maps of two scans, is at most "
        f"{limit:g}{_INTERVAL} ({source})"
    )
    words = (
        f"{measured} is {told(own)} over {own.n} scans, that of the maps of two scans {told(usual)}; the difference is "
        f"{told(apart, '+')}"
    )
    figures = {"excess": described(apart), called: described(own), "two scans": described(usual), **(further or {})}
    return Verdict(f"{check}: {mine.name}", judged(apart, limit), rule, words, figures)


def _steps(mine: _Checked, mode: str) -> list[dict[str, Any]]:
    """Along the cascade, or layer by layer, how alike the maps are over the scans."""
    return [
        {
            "layer": step["layer"],
            "randomised": step["randomised"],
            **{
                measure: described(mine.over(_step(mode, at, measure)))
                for measure in ("ssim", "spearman_abs", "top_dice")
            },
        }
        for at, step in enumerate(mine.found[0][mode])
    ]


def _step(mode: str, at: int, measure: str) -> Callable[[Mapping[str, Any]], Figure]:
    return lambda one: figure(one[mode][at][measure])


def _of_outputs(mine: _Checked) -> Verdict:
    def shared(one: Mapping[str, Any]) -> Figure:
        others = one["other outputs"]
        if "undefined" in others:
            return figure(others)
        return figure(mean_over([by["top_dice"] for by in others.values()]))

    found, limit = mine.over(shared), mine.settings.max_alike
    rule = (
        "passed where the hundredth of the field that is highest in the map shares at most "
        f"{limit:g} (Dice) with those of the maps for other outputs of the model{_INTERVAL} (Sixt et al. 2020)"
    )
    words = f"with the maps for other outputs it shares {told(found)} of its highest places over {found.n} scans"
    verdict = judged(found, limit)
    if verdict == FAILED:
        words += ": it is not class-discriminative"
    return Verdict(f"{_OUTPUTS}: {mine.name}", verdict, rule, words, {"top_dice": described(found)})


def _of_areas(mine: _Checked) -> Verdict:
    def area(kind: str, control: str) -> Callable[[Mapping[str, Any]], Figure]:
        return lambda one: figure(one["areas"] if "undefined" in one["areas"] else one["areas"][kind][control])

    found = {(kind, control): mine.over(area(kind, control)) for kind in KINDS for control in CONTROLS}
    rule = (
        "passed where, beside its own places displaced, voxels taken out in the map's order lower the score sooner, "
        "and voxels put back raise it sooner: both areas between the curves above 0; failed where both are below"
        f"{_INTERVAL} (Petsiuk et al. 2018; beside orders of chance, Jin et al. 2022)"
    )
    kinds = {judged(found[kind, "displaced"], 0.0, "higher") for kind in KINDS}
    verdict = kinds.pop() if len(kinds) == 1 else UNDECIDED
    words = "; ".join(
        f"{kind}: {told(found[kind, 'displaced'], '+')} beside displaced places of its size, "
        f"{told(found[kind, 'permuted'], '+')} beside permuted voxels"
        for kind in KINDS
    )
    figures = {f"{kind}, {control}": described(of) for (kind, control), of in found.items()}
    said = f"areas between the curves, in the score's unit: {words}"
    return Verdict(f"{_AREAS}: {mine.name}", verdict, rule, said, figures)


def of_agreement(evidence: Evidence) -> list[Verdict]:
    """Whether the methods' maps agree with one another; nothing where no two were compared."""
    records = [record for record in evidence.records if record.get("agreement")]
    if not records:
        return []
    owners, least = evidence.owners(records), evidence.settings.min_agreement

    def over(values: Sequence[Figure]) -> Summary:
        return summarise(values, owners)

    def mean(measure: str, chance: bool = False) -> list[Figure]:
        return [
            figure(mean_over([(pair["chance"] if chance else pair)[measure] for pair in record["agreement"]]))
            for record in records
        ]

    own, moved = mean("top_dice"), mean("top_dice", chance=True)
    apart = over([_minus(one, other) for one, other in zip(own, moved, strict=True)])
    names = list(dict.fromkeys(name for r in records for pair in r["agreement"] for name in pair["methods"]))
    rule = (
        "the maps agree where the highest hundredths of the field in two methods' maps share more, by "
        f"{least:g} (Dice) or more in the mean over pairs, than where one of the two is displaced{_INTERVAL}"
    )
    words = (
        f"two of {len(names)} methods share {told(over(own))} of their highest places in the mean over {len(records)} "
        f"scans, displaced maps {told(over(moved))}; rank correlation {told(over(mean('spearman')))}, displaced "
        f"{told(over(mean('spearman', chance=True)))}; {_SHARED}"
    )
    verdict = {PASSED: "agree", FAILED: "do not agree"}.get(judged(apart, least, "higher"), UNDECIDED)
    measures = ("top_dice", "spearman", "ssim", "peak_mm")
    figures: dict[str, Any] = {
        "beyond chance": described(apart),
        **{measure: described(over(mean(measure))) for measure in measures},
        "chance": {measure: described(over(mean(measure, chance=True))) for measure in measures},
        "pairs": _pairs(records, owners, measures),
    }
    return [Verdict("agreement of methods", verdict, rule, words, figures)]


def _pairs(records: Sequence[Mapping[str, Any]], owners: Sequence[str], measures: Sequence[str]) -> list[Any]:
    by_pair: dict[tuple[str, ...], dict[int, Mapping[str, Any]]] = {}
    for at, record in enumerate(records):
        for pair in record["agreement"]:
            by_pair.setdefault(tuple(pair["methods"]), {})[at] = pair
    nothing = Undefined("a map has no place")
    return [
        {
            "methods": list(names),
            **{
                measure: described(
                    summarise([figure(of[at][measure]) if at in of else nothing for at in range(len(records))], owners)
                )
                for measure in measures
            },
        }
        for names, of in by_pair.items()
    ]
