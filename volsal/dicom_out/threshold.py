"""Where the region of a map ends."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from volsal.errors import VolsalError
from volsal.grid import Grid

_KINDS: dict[str, Literal["share", "volume", "value"]] = {"%": "share", "ml": "volume", "": "value"}
_EXPECTED = "expected a share of the largest value (50%), a volume (12ml) or a value in the map's unit (0.3), above 0"


class ThresholdError(VolsalError, ValueError):
    """A threshold that is none."""


@dataclass(frozen=True)
class Threshold:
    """What belongs to a region: the voxels of a map from a value on, where they are evidence for the target (> 0).

    Attributes
    ----------
    number : more than 0
    kind : ``share``: of the map's largest value, in per cent; ``volume``: the value above which so many ml lie;
        ``value``: in the map's own unit
    """

    number: float
    kind: Literal["share", "volume", "value"] = "share"

    def __post_init__(self) -> None:
        if not 0 < self.number < np.inf or (self.kind == "share" and self.number > 100):
            raise ThresholdError(f"threshold {self.number:g}{'%' * (self.kind == 'share')}: {_EXPECTED}")

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """The threshold of ``50%`` (of the largest value), ``12ml`` (the highest so many) or ``0.3`` (in the unit).

        Raises
        ------
        ThresholdError
            For anything else.
        """
        found = re.fullmatch(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*(%|ml|)\s*", text.lower())
        with suppress(ValueError):
            if found:
                return cls(float(found[1]), _KINDS[found[2]])
        raise ThresholdError(f"threshold {text!r}: {_EXPECTED}")

    def __str__(self) -> str:
        return {
            "share": f"{self.number:g}% of the map's largest value",
            "volume": f"the highest {self.number:g} ml",
            "value": "as given",
        }[self.kind]

    def value(self, values: NDArray[np.float32], grid: Grid) -> float | None:
        """The least value in the region of a map (I, J, K), in its unit; None where no voxel belongs to it."""
        top = float(values.max())
        if top <= 0:
            return None
        if self.kind == "value":
            return self.number if self.number <= top else None
        if self.kind == "share":
            return top * self.number / 100
        positive = values[values > 0]
        voxel_ml = abs(float(np.linalg.det(grid.affine[:3, :3]))) / 1000
        count = min(max(1, round(self.number / voxel_ml)), positive.size)
        return float(np.partition(positive, positive.size - count)[positive.size - count])
