"""Every figure of every method over the scans, each beside its nulls: what ``audit.json`` holds as ``metrics``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from volsal.audit.checks import mean_over
from volsal.audit.examine import RANDOM, REPORTED, figure
from volsal.audit.faithfulness import CONTROLS, KINDS
from volsal.audit.metric import Figure, Undefined
from volsal.audit.statistics import summarise
from volsal.audit.trust import HIGHEST, PEAK, scaled
from volsal.audit.verdicts import Evidence, described

Found = Mapping[str, Any]
#: A figure's place in what was found of a method in a scan, or in a reference's claims.
Path = Sequence[str]


def metrics_of(evidence: Evidence, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By method and figure ``{value, low, high, n, patients, undefined, reasons, nulls}``, each null likewise."""
    checked = replace(evidence, records=[record for record in evidence.records if "agreement" in record])
    found = {}
    for name in methods:
        whole, few = _Table(evidence, name), _Table(checked, name)
        found[name] = {**whole.of_effects(), **few.of_checks(), **whole.of_places()}
    return found


class _Table:
    """The figures of one method over some scans."""

    def __init__(self, evidence: Evidence, name: str) -> None:
        self.evidence, self.name = evidence, name
        self.owners = evidence.owners(evidence.records)
        self.each: list[Found] = [record["methods"].get(name, {}) for record in evidence.records]
        known = dict.fromkeys(name for record in evidence.records for name in record.get("references", {}))
        #: By reference its claims in each scan.
        self.references: dict[str, list[Found]] = {
            "random weights": [one.get("random weights", {}) for one in self.each],
            **{name: [record.get("references", {}).get(name, {}) for record in evidence.records] for name in known},
        }

    def of_effects(self) -> dict[str, Any]:
        """What the score does where the map points."""
        ways = {"effect at the peak, spreads": PEAK}
        if any(HIGHEST in one for one in self.each):
            ways["effect of the highest part, spreads"] = HIGHEST
        records, spread = self.evidence.records, self.evidence.spread
        return {
            words: self._row([scaled(one, self.name, spread, way) for one in records]) for words, way in ways.items()
        }

    def of_places(self) -> dict[str, Any]:
        """Where the evidence lies."""
        return {**self._of_regions(), **self._of_masks(), **self._of_anatomy()}

    def _row(self, values: Sequence[Figure], nulls: Mapping[str, Sequence[Figure]] | None = None) -> dict[str, Any]:
        known = {name: of for name, of in (nulls or {}).items() if any(not isinstance(x, Undefined) for x in of)}
        return {
            **described(summarise(values, self.owners)),
            "nulls": {name: described(summarise(of, self.owners)) for name, of in known.items()},
        }

    def _at(self, *path: str, of: Sequence[Found] | None = None) -> list[Figure]:
        return [_reached(one, path) for one in (self.each if of is None else of)]

    def _beside(self, *path: str) -> dict[str, list[Figure]]:
        """The same figure of the reference maps."""
        return {name: self._at(*path, of=claims) for name, claims in self.references.items()}

    def of_checks(self) -> dict[str, Any]:
        """Of :mod:`volsal.audit.checks`; nothing where no scan was checked."""
        if not self.each:
            return {}
        unrelated = {"maps of two scans": self._at("unrelated", "ssim")}
        found = {
            "top Dice with random weights": self._row(self._at("sanity", "top_dice")),
            "SSIM with random weights": self._row([_of_last(one) for one in self.each], unrelated),
            "top Dice with other outputs' maps": self._row([_of_outputs(one) for one in self.each]),
            "peak stays, share": self._row(self._at("stability", "kept")),
            "highest hundredth stays, top Dice": self._row(self._at("stability", "overlap")),
        }
        if any("random labels" in one for one in self.each):
            found["SSIM with random labels"] = self._row(self._at("random labels", "ssim"), unrelated)
        for change in _keys(one.get("stability", {}).get("by", {}) for one in self.each):
            for words, measure in (("rank correlation", "spearman"), ("peak moves, mm", "peak_mm")):
                found[f"{words}, {change}"] = self._row(self._at("stability", "by", change, measure))
        for kind in KINDS:
            for control in CONTROLS:
                found[f"delta AUPC of {kind}, {control}"] = self._row(self._at("areas", kind, control))
        return found

    def _of_regions(self) -> dict[str, Any]:
        names = _keys(one.get("regions", {}) for one in self.each)
        return {row: of for name in names for row, of in self._share_of("regions", name, words=name)}

    def _of_anatomy(self) -> dict[str, Any]:
        maps = _keys(one.get("anatomy", {}) for one in self.each)
        return {
            row: of
            for name in maps
            for label in _keys(one.get("anatomy", {}).get(name, {}) for one in self.each)
            for row, of in self._share_of("anatomy", name, label, words=f"in {name}: {label}")
        }

    def _share_of(self, *path: str, words: str) -> Iterable[tuple[str, Any]]:
        volume = {"share of volume": self._at(*path, "volume")}
        yield (
            f"share of evidence {words}",
            self._row(self._at(*path, "evidence"), volume | self._beside(*path, "evidence")),
        )
        yield f"density {words}", self._row(self._at(*path, "density"), self._beside(*path, "density"))

    def _of_masks(self) -> dict[str, Any]:
        found = {}
        for mask in _keys(record["masks"] for record in self.evidence.records):
            for metric in REPORTED:
                nulls: dict[str, list[Figure]] = {null: self._at("masks", mask, metric, null) for null in RANDOM}
                nulls |= self._beside("masks", mask, metric, "value")
                found[f"{mask}: {metric}"] = self._row(self._at("masks", mask, metric, "value"), nulls)
        return found


def _keys(dicts: Iterable[Found]) -> list[str]:
    return list(dict.fromkeys(key for one in dicts for key in one))


def _reached(found: Any, path: Path) -> Figure:
    for key in path:
        if "undefined" in found:
            return figure(found)
        if key not in found:
            return Undefined(
                "the scan has none" if path[0] in ("masks", "regions", "anatomy") else "it was not asked for"
            )
        found = found[key]
    return figure(found)


def _of_last(found: Found) -> Figure:
    """With all layers random."""
    return figure(found["cascading"][-1]["ssim"]) if "cascading" in found else figure(found)


def _of_outputs(found: Found) -> Figure:
    """The mean over the other outputs."""
    by = found.get("other outputs", found)
    return figure(by if "undefined" in by else mean_over([one["top_dice"] for one in by.values()]))
