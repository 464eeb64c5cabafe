"""Targeted ablation: a labelled region at a time is removed, beside control places of its shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from volsal.attribution.method import Context
from volsal.attribution.perturbation.perturbation import (
    Copies,
    Perturbation,
    Reading,
    accurate,
    digest_bytes,
    per_volume,
)
from volsal.attribution.settings import SettingError, require_whole

# A control place shares at most this part of itself with the region; nearer ones would be the region again.
_MOST_SHARED = 0.25
_TRIES = 50
# A region of more labels than this is a map of something else, such as superpixels counted to the thousands.
_MOST_LABELS = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class RegionAblation(Perturbation):
    r"""What the score loses when a labelled region is removed: which organ, taken out, moves it most.

    .. math:: L_v = S(x) - S(x \text{ without region } R) \quad \text{for all } v \in R, \qquad 0 \text{ outside}

    The whole loss stands in every voxel of the region; it is not shared out among them, so that regions compare
    whatever their size.  Maps (B, 1, *spatial), signed.

    A large region costs much whatever it is.  So the same shape is removed at control places too, shifted at random
    inside the volume with at most a quarter of it inside the region, and ``facts["regions"]`` tells for each label its
    ``name``, ``voxels``, ``ml`` (where a grid is known) and ``drop``; of its controls ``controls`` (how many found
    room), ``control_mean`` and ``control_sd`` of their drops; and ``changed`` and ``control_changed``, by how much the
    fill changed the volume in the region and at the controls, on average, in units of the model's input: controls that
    change little lie in the air, and say little.

    Parameters
    ----------
    labels : the label map on the volume's own voxels, (*spatial), whole numbers, 0 for no label; or the path of a file,
        in which ``{case}`` stands for the case's id, to be read onto the model's input with nearest labels
    names : of the labels, by number
    controls : control places for each region
    sigma_mm, sigma : as for other perturbations; None: half the edge of a cube of the region's volume

    Others as in :class:`volsal.attribution.perturbation.perturbation.Perturbation`.
    One label map serves every volume of a batch.
    """

    labels: str | Path | ArrayLike | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    controls: int = 10

    id: ClassVar[str] = "region-ablation"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole(self.id, 0, controls=self.controls)
        if not isinstance(self.names, Mapping) or not all(type(label) is int for label in self.names):
            raise SettingError(f"{self.id}: names are given by label, as in {{1: liver}}, not {self.names!r}")

    @property
    def files(self) -> dict[str, list[str | Path]]:
        """The label map's, where it is one."""
        return {"labels": [self.labels]} if isinstance(self.labels, (str, Path)) else {}

    def copies(self, shape: Sequence[int], context: Context) -> int:
        """One for each region and each of its controls, as far as these find room.  A file of labels is read."""
        return len(self._places(self._read(shape, context)))

    def prepare(self, volume: Tensor, context: Context) -> Copies:
        """The copies, region by region, each followed by its controls."""
        labels = self._read(volume.shape, context)
        return _Regions(volume, labels, self._places(labels), self, context)

    def _read(self, shape: Sequence[int], context: Context) -> Tensor:
        """The labels, (*spatial) int64 on the CPU."""
        given, spatial = self.labels, tuple(shape[2:])
        if given is None:
            raise SettingError(f"{self.id}: needs labels, a label map or the path of its file")
        if isinstance(given, (str, Path)):
            if context.labels_of is None:
                raise SettingError(
                    f"{self.id}: labels {str(given)!r} is a file, which only an Explainer can place; pass the "
                    "label map itself, on the volume's voxels"
                )
            given = context.labels_of(str(given).replace("{case}", context.case))
        try:
            labels = torch.as_tensor(given).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            kind = getattr(given, "dtype", type(given).__name__)
            raise SettingError(f"{self.id}: a label map holds whole numbers, and not {kind}") from error
        if tuple(labels.shape) != spatial:
            raise SettingError(f"{self.id}: the label map is {tuple(labels.shape)}, the volume {spatial}")
        whole = labels.to(torch.int64)
        if not torch.equal(whole.to(labels.dtype), labels):
            raise SettingError(f"{self.id}: a label map holds whole numbers; this one holds others")
        return whole

    def _places(self, labels: Tensor) -> list[_Place]:
        """Every place that is removed in turn."""
        present = labels.unique()
        present = present[present != 0]
        if not 0 < len(present) <= _MOST_LABELS:
            raise SettingError(
                f"{self.id}: the label map holds {len(present):,} labels other than 0 on the model's input; expected 1 "
                f"to {_MOST_LABELS:,}"
            )
        return [place for label in present.tolist() for place in self._of(label, labels == label)]

    def _of(self, label: int, region: Tensor) -> list[_Place]:
        """The region itself, then its controls; their draws are the label's own."""
        voxels = region.nonzero()
        low, high = voxels.amin(0), voxels.amax(0) + 1
        shape = region[_box(low, high)]
        places = [_Place(label, tuple(low.tolist()), shape)]
        room = [n - int(h - a) for n, a, h in zip(region.shape, low, high, strict=True)]
        random = np.random.default_rng((self.seed, label & 0xFFFFFFFF))
        for _ in range(self.controls * _TRIES if any(room) else 0):
            if len(places) > self.controls:
                break
            corner = tuple(int(random.integers(free + 1)) for free in room)
            there = _Place(label, corner, shape)
            if int((region[there.box] & shape).sum()) <= _MOST_SHARED * len(voxels):
                places.append(there)
        return places


@dataclass(frozen=True, eq=False)
class _Place:
    """The shape of a label's region, (*extent) bool, with its first corner at some voxel."""

    label: int
    corner: tuple[int, ...]
    shape: Tensor

    @property
    def box(self) -> tuple[slice, ...]:
        """The smallest box around it."""
        return tuple(slice(at, at + n) for at, n in zip(self.corner, self.shape.shape, strict=True))


def _box(low: Tensor, high: Tensor) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))


class _Regions(Copies):
    def __init__(
        self, volume: Tensor, labels: Tensor, places: list[_Place], settings: RegionAblation, context: Context
    ) -> None:
        self._volume, self._labels, self._places = volume, labels, places
        self._settings, self._context = settings, context
        self._filled: tuple[int | None, Tensor] = None, volume
        self.count = len(places)
        self.settled = sha256(digest_bytes(labels)).hexdigest()

    def _fill(self, place: _Place) -> Tensor:
        """What stands in this label's places, (B, C, *spatial); remembered, since they come one after the other."""
        if self._filled[0] != place.label:
            edge = int(place.shape.sum()) ** (1 / len(place.corner))
            mm = self._context.grid.spacing if self._context.grid else np.ones(len(place.corner))
            edges = (edge * np.prod(mm) ** (1 / len(mm)) / mm).tolist()  # a cube in mm
            fill = self._settings.filling(self._volume, edges, self._context)
            self._filled = place.label, fill.expand_as(self._volume)
        return self._filled[1]

    def change(self, number: int, copy: Tensor) -> None:
        place = self._places[number]
        where: tuple[Any, ...] = (..., *place.box)
        copy[where] = torch.where(place.shape.to(copy.device), self._fill(place)[where], copy[where])

    def read(self, original: Tensor, scores: Tensor) -> Reading:
        drops = original - scores  # (places, T, B)
        targets, batch = original.shape
        maps = torch.zeros(targets, batch, 1, *self._labels.shape, dtype=accurate(self._volume))
        regions: list[list[dict[str, Any]]] = [[] for _ in range(targets)]
        crowded = []
        for label in dict.fromkeys(place.label for place in self._places):
            first, *controls = [number for number, place in enumerate(self._places) if place.label == label]
            inside = self._labels == label
            maps[..., inside] = drops[first, :, :, None, None].to(maps.dtype)
            described = self._described(label, self._places[first], [self._places[number] for number in controls])
            for target, told in enumerate(regions):
                told.append({**described, **_drops(drops[first, target], drops[controls, target])})
            if len(controls) < self._settings.controls:
                crowded.append(described["name"])
        return Reading(
            list(maps.to(self._volume.device)), [{"regions": told} for told in regions], self._notes(crowded)
        )

    def _described(self, label: int, region: _Place, controls: list[_Place]) -> dict[str, Any]:
        voxels = int(region.shape.sum())
        told: dict[str, Any] = {"label": label, "name": self._settings.names.get(label, str(label)), "voxels": voxels}
        if self._context.grid:
            told["ml"] = voxels * abs(float(np.linalg.det(self._context.grid.affine[:3, :3]))) / 1000
        told["controls"] = len(controls)
        told["changed"] = per_volume(self._changed(region))
        if controls:
            told["control_changed"] = per_volume(torch.stack([self._changed(place) for place in controls]).mean(0))
        return told

    def _changed(self, place: _Place) -> Tensor:
        """The mean over a place's voxels and channels of how much the fill changes each, (B,)."""
        where: tuple[Any, ...] = (..., *place.box)
        by = (self._volume[where] - self._fill(place)[where]).abs().to(accurate(self._volume))
        return by[..., place.shape.to(by.device)].mean((1, 2)).cpu()

    def _notes(self, crowded: Sequence[str]) -> list[str]:
        present = {place.label for place in self._places}
        absent = [name for label, name in self._settings.names.items() if label not in present]
        notes = []
        if absent:
            notes.append(f"not in the label map, or too thin for the model's voxels: {', '.join(absent)}")
        if crowded:
            notes.append(f"fewer control places than asked, for want of room: {', '.join(crowded)}")
        return notes


def _drops(region: Tensor, controls: Tensor) -> dict[str, Any]:
    """A region's drop (B,) and those of its controls (controls, B), as figures."""
    told = {"drop": per_volume(region)}
    if len(controls):
        told["control_mean"] = per_volume(controls.mean(0))
    if len(controls) > 1:
        told["control_sd"] = per_volume(controls.std(0))
    return told
