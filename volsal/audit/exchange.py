"""Does the answer go along with what no answer should hang on?  It is exchanged between scans.

Of two scans that the model answers differently, one is given a property of the other: what the air holds, how bright
the patient is, what lies at one place of the field.  How much of the difference of the two answers goes along is the
share of it that hangs on the property; less what goes along where the other scan is answered alike, since any exchange
leaves seams.  No map decides here: maps only tell at which places of the field to try.

A place is sought twice by one procedure, as a place of the field and as a place of the patient, on the half of the
patients that it is not tried on; neither half gives anything to the other.  Evidence that belongs to the patient goes
along with the second at least as much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from volsal.attribution import GradientTimesInput, GuidedBackprop, Method
from volsal.attribution.perturbation.perturbation import blurred
from volsal.attribution.targets.target import score as score_of
from volsal.audit.examine import figure
from volsal.audit.faithfulness import Scorer
from volsal.audit.metric import Figure, Undefined
from volsal.audit.shortcuts import grown, side_of
from volsal.audit.statistics import holm, summarise
from volsal.audit.subject import Subject, subject_of
from volsal.audit.trust import UNDECIDED
from volsal.audit.verdicts import CLEAR, FLAGGED, Verdict
from volsal.config import AuditSection
from volsal.errors import VolsalError
from volsal.explain import Explainer
from volsal.scans.find import Case

# Each scan is given the property of so many others that are answered otherwise, and of as many answered alike.
_DONORS = 3
# Otherwise: a score farther away than this, in standard deviations over the scans; alike: nearer than half of it.
_APART = 1.0
# The largest memory that the scans may take together.
_BYTES = 2**31
# Places are sought that take so much of the field; the smallest is taken that carries nearly as much as the best.
_SIZES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064)
_NEARLY = 0.75
# Places are compared on so many scans, and with fewer donors each.
_SOUGHT_ON, _SOUGHT_DONORS = 6, 2
_VOXELS = 4
# Brightness and detail are medians over so many blocks along each edge of the body: what is small counts little.
_BLOCKS = 5
_FEWEST_IN_BLOCK = 8


@dataclass(frozen=True, eq=False)
class Seen:
    """A scan, and what of it is exchanged.

    Attributes
    ----------
    subject : the scan under the model; its volume is (1, C, I, J, K)
    beyond : (I, J, K) what is surely no patient
    """

    subject: Subject
    beyond: NDArray[np.bool_]

    @classmethod
    def of(cls, subject: Subject, margin_mm: float) -> Seen:
        """With everything within ``margin_mm`` of the body counted as body."""
        return cls(subject, ~grown(subject.body.mask, subject, margin_mm))

    @property
    def volume(self) -> Tensor:
        """(1, C, I, J, K)."""
        return self.subject.volume

    @property
    def body(self) -> NDArray[np.bool_]:
        """(I, J, K)."""
        return self.subject.body.mask

    @cached_property
    def tone(self) -> tuple[Tensor, Tensor]:
        """Brightness of the body above each channel's least value, and its contrast: (1, C, 1, 1, 1) each.

        Neither is less than a hundredth of the channel's range, so that what has none of it is not made of noise.
        """
        above = (self.volume - _least(self.volume))[0].cpu().numpy()
        floors = [max(0.01 * float(one.max()), 1e-12) for one in above]
        quarters = [np.percentile(self._by_block(one), [25, 50, 75]) for one in above]
        levels = [max(half, floor) for (_, half, _), floor in zip(quarters, floors, strict=True)]
        ranges = [max(high - low, floor) for (low, _, high), floor in zip(quarters, floors, strict=True)]
        return self._each(levels), self._each(ranges)

    @cached_property
    def smooth(self) -> Tensor:
        """The volume without its fine detail."""
        return blurred(self.volume, [1.0] * 3)

    @cached_property
    def fine(self) -> tuple[Tensor, Tensor]:
        """Strength of the fine detail in the body and in the air, relative to the body's brightness."""
        detail = (self.volume - self.smooth).abs()[0].cpu().numpy()
        inside = self._each([float(np.median(self._by_block(one))) for one in detail])
        outside = self._each([float(np.median(one[self.beyond])) if self.beyond.any() else 0.0 for one in detail])
        return inside / self.tone[0], outside / self.tone[0]

    @cached_property
    def floor(self) -> Tensor:
        """(1, C, 1, 1, 1) whether the air's level is noise as well, as in the magnitude images of MR.

        The median of such noise lies 0.8 (one component) to 1.3 (Rayleigh's) of its interquartile range above the least
        value; that of noise to both sides, as in a CT's air, some 3; air that was set to one value has no range.
        """
        above = (self.volume - _least(self.volume))[0].cpu().numpy()
        quarters = [np.percentile(one[self.beyond], [25, 50, 75]) if self.beyond.any() else [0.0] * 3 for one in above]
        return self._each([0.5 * (high - low) < half < 2 * (high - low) for low, half, high in quarters]) > 0

    def on(self, mask: NDArray[np.bool_]) -> Tensor:
        """A mask where the volume is."""
        return torch.from_numpy(mask).to(self.volume.device)

    def _each(self, channels: Sequence[float]) -> Tensor:
        return torch.tensor(channels, dtype=self.volume.dtype, device=self.volume.device).reshape(1, -1, 1, 1, 1)

    @cached_property
    def _blocks(self) -> NDArray[np.int64]:
        """(V,) the block that each voxel of the body lies in."""
        inside = np.argwhere(self.body)
        edges = np.maximum(2, (np.ptp(inside, axis=0) + 1) / _BLOCKS)
        blocks = ((inside - inside.min(axis=0)) / edges).astype(int)
        return np.ravel_multi_index(tuple(blocks.T), (_BLOCKS,) * 3)

    def _by_block(self, values: NDArray) -> NDArray[np.float64]:
        """Medians of (I, J, K) over the blocks of the body."""
        order = np.argsort(self._blocks, kind="stable")
        parts = np.split(values[self.body][order], np.cumsum(np.bincount(self._blocks))[:-1])
        large = [part for part in parts if len(part) >= _FEWEST_IN_BLOCK]
        return np.array([np.median(part) for part in large or [values[self.body]]])


def _least(volume: Tensor) -> Tensor:
    return volume.amin((2, 3, 4), keepdim=True)


# ---- what is exchanged

Exchange = Callable[[Seen, Seen], Tensor]


def air(of: Seen, donor: Seen) -> Tensor:
    """With what the donor has where neither scan has the patient."""
    return torch.where(of.on(of.beyond & donor.beyond), donor.volume, of.volume)


def tone(of: Seen, donor: Seen) -> Tensor:
    """As bright as the donor's patient and with as much contrast; around the patient only as bright."""
    (level, contrast), (wanted, range_) = of.tone, donor.tone
    above = of.volume - _least(of.volume)
    inside = wanted + (above - level) * (range_ / contrast)
    return _least(of.volume) + torch.where(of.on(of.body), inside, above * (wanted / level))


def detail(of: Seen, donor: Seen) -> Tensor:
    """With fine detail, which is noise and sharpness, as strong as the donor's, in the body and around it.

    Where the air's level is noise in both scans (:attr:`Seen.floor`), it becomes as much stronger.
    """
    inside, around = (torch.where(own > 0, other / own, 1.0) for own, other in zip(of.fine, donor.fine, strict=True))
    level = torch.where(of.floor & donor.floor, _least(of.volume), of.smooth)
    air, tissue = level + (of.volume - level) * around, of.smooth + (of.volume - of.smooth) * inside
    return torch.where(of.on(of.beyond), air, tissue)


def size(of: Seen, donor: Seen) -> Tensor:
    """Scaled about the patient's middle so that the patient is as large as the donor's."""
    factor = (np.count_nonzero(of.body) / np.count_nonzero(donor.body)) ** (1 / 3)
    middle = (2 * np.argwhere(of.body).mean(axis=0) / (np.array(of.body.shape) - 1) - 1)[::-1]
    theta = np.column_stack([np.eye(3) * factor, (1 - factor) * middle])
    grid = affine_grid(torch.from_numpy(theta[None]).to(of.volume), list(of.volume.shape), align_corners=True)
    return grid_sample(of.volume, grid, padding_mode="border", align_corners=True)


def shifted(volume: Tensor, steps: NDArray[np.int64]) -> Tensor:
    """(..., I, J, K) moved by whole voxels, the outermost ones repeated."""
    for axis, step in enumerate(steps, start=volume.ndim - 3):
        n = volume.shape[axis]
        index = (torch.arange(n, device=volume.device) - int(step)).clamp(0, n - 1)
        volume = volume.index_select(axis, index)
    return volume


def offsets(bodies: Sequence[NDArray[np.bool_]]) -> NDArray[np.int64]:
    """(N, 3) by how many voxels each body lies off the common place, where it overlaps most with all of them."""
    spectra = [np.fft.rfftn(body.astype(np.float32)) for body in bodies]
    shape = np.array(bodies[0].shape)
    found = np.zeros((len(bodies), 3), int)
    for _ in range(3):
        placed = [np.roll(body, -at, axis=(0, 1, 2)) for body, at in zip(bodies, found, strict=True)]
        common = np.conj(np.fft.rfftn(np.mean(placed, axis=0, dtype=np.float32)))
        overlaps = [np.fft.irfftn(spectrum * common, s=bodies[0].shape, axes=(0, 1, 2)) for spectrum in spectra]
        peaks = np.array([np.unravel_index(int(one.argmax()), one.shape) for one in overlaps])
        found = (peaks + shape // 2) % shape - shape // 2
    return found


@dataclass(frozen=True, eq=False)
class Place:
    """A place whose content is exchanged.

    Attributes
    ----------
    mask : (I, J, K) in the field; in the patient as it lies where the body is at the common place
    offsets : of each scan's body, see :func:`offsets`; empty for a place of the field
    """

    mask: NDArray[np.bool_]
    offsets: Mapping[Seen, NDArray[np.int64]]

    def __call__(self, of: Seen, donor: Seen) -> Tensor:
        """With what the donor has there."""
        if not self.offsets:
            return torch.where(of.on(self.mask), donor.volume, of.volume)
        where = shifted(of.on(self.mask), self.offsets[of])
        return torch.where(where, shifted(donor.volume, self.offsets[of] - self.offsets[donor]), of.volume)


@dataclass(frozen=True, eq=False)
class Placed:
    """What goes along with a place.

    Attributes
    ----------
    place : of the field
    field, patient : by scan, the share that goes along with such a place, and with one of the patient as large
    still : how well single voxels of the place tell the answers apart, in [0, 1]; 0.5 is chance
    """

    place: Place
    field: list[Figure]
    patient: list[Figure]
    still: float


# ---- between scans


class Exchanges:
    """Scans of one shape, between which something is exchanged.

    Parameters
    ----------
    seen : the scans
    patients : case -> whose scan it is
    seed : of which of them are given to which
    """

    def __init__(self, seen: Sequence[Seen], patients: Mapping[str, str] | None = None, seed: int = 0) -> None:
        self.seen = list(seen)
        self._owners = [(patients or {}).get(one.subject.case, one.subject.case) for one in seen]
        self.offsets = dict(zip(seen, offsets([one.body for one in seen]), strict=True))
        outputs = [one.subject.output for one in seen]
        #: (N, N) what the question asked of each scan is answered for every other.
        self.scores = np.array([[float(score_of(one.subject.target, o, 1)[0]) for o in outputs] for one in seen])
        self._seed = seed

    def donors(self, at: int, among: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
        """Some scans answered otherwise, all to one side, and some answered alike; there may be none.

        Of ``among``; None: of all.
        """
        away = self.scores[at, at] - self.scores[at]
        spread = float(self.scores[at].std())
        order = [int(n) for n in np.random.default_rng((self._seed, at)).permutation(len(away)) if n != at]
        order = [n for n in order if among is None or n in among]
        below, above = ([n for n in order if sign * away[n] >= max(_APART * spread, 1e-12)] for sign in (1, -1))
        alike = [n for n in order if abs(away[n]) <= 0.5 * _APART * spread]
        return max(below, above, key=len)[:_DONORS], alike[:_DONORS]

    def share(self, at: int, exchange: Exchange, donors: int = _DONORS, among: Sequence[int] | None = None) -> Figure:
        """How much of the difference of answers goes along with what is exchanged, in [-2, 2]; 0 is none, 1 all."""
        other, alike = (some[:donors] for some in self.donors(at, among))
        if not other or not alike:
            return Undefined("no other scan is answered otherwise, or none alike")
        of = self.seen[at]
        scores = Scorer(of.subject.score)(exchange(of, self.seen[n]) for n in (*other, *alike))
        lost = self.scores[at, at] - scores
        gaps = self.scores[at, at] - self.scores[at, other]
        found = (lost[: len(other)] / gaps).mean() - lost[len(other) :].mean() / gaps.mean()
        return float(np.clip(found, -2, 2))  # about 0, as the test by signs takes it

    def shares(self, exchange: Exchange) -> list[Figure]:
        """Of every scan."""
        return [self.share(at, exchange) for at in range(len(self.seen))]

    def moved(self, of: Seen, donor: Seen) -> Tensor:
        """Moved in the field to where the donor's patient lies."""
        return shifted(of.volume, self.offsets[donor] - self.offsets[of])

    # ---- places

    def placed(self, maps: Sequence[Mapping[str, NDArray]]) -> Placed:
        """What goes along with a small place of the field and with one of the patient, both sought on other scans."""
        order = [int(at) for at in np.argsort(self.scores[0], kind="stable")]
        owners = list(dict.fromkeys(self._owners[at] for at in order))
        halves = [[at for at in order if self._owners[at] in owners[first::2]] for first in (0, 1)]
        nothing = Undefined("in the other half of the scans, where a place would be sought, none is answered otherwise")
        found: dict[int, tuple[Figure, Figure]] = {}
        still: list[float] = []
        for mine, others in (halves, halves[::-1]):
            place = self._sought(maps, others, False, _SIZES)
            # What is larger carries more, so that both are as large.
            in_patient = self._sought(maps, others, True, [float(place.mask.mean())])
            if not any(all(self.donors(at, others)) for at in others):
                found |= dict.fromkeys(mine, (nothing, nothing))
                continue
            found |= {at: (self.share(at, place, among=mine), self.share(at, in_patient, among=mine)) for at in mine}
            still.append(self._still(place, others, mine))
        field, patient = zip(*(found[at] for at in range(len(self.seen))), strict=True)
        return Placed(place, list(field), list(patient), float(np.mean(still or [0.5])))

    def _still(self, place: Place, known: Sequence[int], asked: Sequence[int]) -> float:
        """How well single voxels of the field tell answers apart: those that do best among ``known`` scans, in others.

        Of pairs answered otherwise, the share that such a voxel orders as the answers do, mean over a few voxels; 0.5
        is chance.  Evidence that moves leaves most voxels of its place as they are; what keeps still never does.
        """
        inside = np.array([one.volume[0].sum(0).cpu().numpy()[place.mask] for one in self.seen])
        answers = self.scores[known[0]]
        centred = inside[known] - inside[known].mean(axis=0)
        slope = (answers[known] - answers[known].mean()) @ centred
        clear = np.abs(slope) / (centred.std(axis=0) + 1e-12)
        best = np.argsort(-clear, kind="stable")[:_VOXELS]
        higher = np.sign(inside[asked][:, None, best] - inside[asked][None, :, best]) * np.sign(slope[best])
        apart = answers[asked][:, None] - answers[asked][None] >= max(_APART * float(answers.std()), 1e-12)
        return float((higher[apart] / 2 + 0.5).mean()) if apart.any() else 0.5

    def _sought(
        self, maps: Sequence[Mapping[str, NDArray]], among: Sequence[int], in_body: bool, sizes: Sequence[float]
    ) -> Place:
        """The smallest place that carries nearly as much between these scans as any that was tried."""
        asked = [among[int(n)] for n in np.linspace(0, len(among) - 1, min(len(among), _SOUGHT_ON))]
        tried: list[tuple[float, Place]] = []
        for promise in self._promises(maps, among, in_body):
            soft = blurred(torch.from_numpy(promise.astype(np.float32))[None, None], [0.7] * 3)[0, 0].numpy()
            ranked = np.sort(soft, axis=None)[::-1]
            for part in sizes:
                mask = soft >= ranked[max(8, round(part * ranked.size)) - 1]
                place = Place(mask, self.offsets if in_body else {})
                shares = [self.share(at, place, _SOUGHT_DONORS, among) for at in asked]
                tried.append((float(np.mean([x for x in shares if not isinstance(x, Undefined)] or [0.0])), place))
        most = max(share for share, _ in tried)
        least = min(int(place.mask.sum()) for share, place in tried if share >= min(most, _NEARLY * most))
        return max(((share, place) for share, place in tried if place.mask.sum() <= least), key=lambda one: one[0])[1]

    def _promises(
        self, maps: Sequence[Mapping[str, NDArray]], among: Sequence[int], in_body: bool
    ) -> list[NDArray[np.float64]]:
        """(I, J, K) each, larger where a place is likelier: where maps agree, and where images follow the answers."""

        def laid(array: NDArray, at: int) -> NDArray:
            steps = -self.offsets[self.seen[at]] if in_body else np.zeros(3, int)
            return shifted(torch.from_numpy(array), steps).numpy()

        names = dict.fromkeys(name for at in among for name in maps[at])
        found = [np.mean([laid(maps[at][name], at) for at in among if name in maps[at]], axis=0) for name in names]
        images = np.array([laid(self.seen[at].volume[0].sum(0).cpu().numpy(), at) for at in among])
        answers = self.scores[among[0], among]
        answers = (answers - answers.mean()) / (answers.std() + 1e-12)
        images -= images.mean(axis=0)
        slope = np.tensordot(answers, images, (0, 0)) / len(among)
        # The correlation, of what varies at all.
        return [*found, np.abs(slope) / (images.std(axis=0) + 0.05 * images.std() + 1e-12)]


def maps_of(subject: Subject, methods: Mapping[str, Method]) -> dict[str, NDArray[np.float32]]:
    """The maps that have a positive part, drawn towards their middle values and with sum 1."""
    found = {}
    for name, values in subject.maps(methods).items():
        if not isinstance(values, Undefined) and (values > 0).any():
            root = np.sqrt(np.maximum(values, 0))
            found[name] = (root / root.sum()).astype(np.float32)
    return found


# ---- what is found

AIR, TONE, DETAIL = "everything outside the body", "overall brightness", "noise and sharpness"
SIZE, POSITION, FIELD = "size of the patient", "position in the field", "fixed in the field"
#: What is exchanged, and whether that asks for a body that is sure.
EXCHANGES: dict[str, tuple[Exchange | None, bool]] = {
    AIR: (air, True), TONE: (tone, False), DETAIL: (detail, False), SIZE: (size, True), POSITION: (None, True),
}  # fmt: skip
_PLACES = FIELD, "fixed in the patient"


def exchange(
    explainer: Explainer,
    cases: Sequence[Case],
    settings: AuditSection,
    progress: Callable[[str, int, int], None] | None = None,
    patients: Mapping[str, str] | None = None,
    **reading: Any,
) -> dict[str, Any]:
    """Exchange each property between up to ``settings.exchanged`` scans of one shape.

    ``patients``: case -> whose scan it is; None: each is another's.

    Returns
    -------
    plain data: ``shares``, by property and then by case, the share of the difference of answers that goes along, or
    ``{"undefined": why}``; ``place`` of the field in words and figures; ``bodies_mm``, how far bodies lie apart, root
    mean square; or ``undefined``: why nothing could be exchanged.
    """
    try:
        return _exchanged(explainer, cases, settings, progress, patients, reading)
    except VolsalError as error:
        return {"undefined": str(error)}


def _exchanged(
    explainer: Explainer,
    cases: Sequence[Case],
    settings: AuditSection,
    progress: Callable[[str, int, int], None] | None,
    patients: Mapping[str, str] | None,
    reading: Mapping[str, Any],
) -> dict[str, Any]:
    if not settings.exchanged:
        return {"undefined": "no exchange was asked for"}
    seen = _seen(explainer, cases, settings, reading)
    sure = [one for one in seen if one.subject.body.sure]
    known = Exchanges(seen, patients) if len(seen) >= settings.min_scans else None
    with_body = Exchanges(sure, patients) if len(sure) >= 2 * settings.min_scans else None
    if known is None:
        few = f"{len(seen)} scans of one shape, fewer than {settings.min_scans}"
        return {"undefined": f"there are {few}, or no more of them fit into {_BYTES >> 30} GiB together"}
    shares: dict[str, dict[str, Any]] = {}

    def keep(name: str, of: Exchanges, found: Sequence[Figure]) -> None:
        shares[name] = {
            one.subject.case: {"undefined": x.reason} if isinstance(x, Undefined) else x
            for one, x in zip(of.seen, found, strict=True)
        }
        if progress:
            progress("exchanges", len(shares), len(EXCHANGES) + len(_PLACES))

    for name, (act, needs_body) in EXCHANGES.items():
        among = with_body if needs_body else known
        if among:
            keep(name, among, among.shares(act or among.moved))
    if with_body is None:
        return {"shares": shares, "place": None, "bodies_mm": None}
    methods = {"guided": GuidedBackprop(), "product": GradientTimesInput()}
    maps = [maps_of(one.subject, methods) for one in with_body.seen]
    placed = with_body.placed(maps)
    for name, of in zip(_PLACES, (placed.field, placed.patient), strict=True):
        keep(name, with_body, of)
    apart = np.array(list(with_body.offsets.values())) * sure[0].subject.grid.spacing
    apart_mm = float(np.sqrt(apart.var(axis=0).sum()))
    place = {**described_place(placed.place, with_body.seen), "still": placed.still}
    return {"shares": shares, "place": place, "bodies_mm": apart_mm}


def _seen(
    explainer: Explainer, cases: Sequence[Case], settings: AuditSection, reading: Mapping[str, Any]
) -> list[Seen]:
    """Scans of the commonest shape, as many as are asked for and memory holds."""
    found: list[Seen] = []
    held = 0
    for case in cases:
        if len(found) >= settings.exchanged or held > _BYTES:
            break
        try:
            subject = subject_of(explainer, case, **reading)
        except VolsalError:
            continue  # which the audit of the scan itself tells
        # The scan as it was read, which may be large, is not kept.
        subject = replace(subject, ready=None)  # type: ignore[arg-type]
        found.append(Seen.of(subject, settings.body_margin_mm))
        held += 3 * found[-1].volume.nbytes + _bytes_of(subject.output)
    shapes = Counter(tuple(one.volume.shape) for one in found)
    return [one for one in found if tuple(one.volume.shape) == shapes.most_common(1)[0][0]]


def _bytes_of(output: Any) -> int:
    """What a model's output takes: of a segmentation more than the scan."""
    if isinstance(output, Tensor):
        return output.nbytes
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return sum(map(_bytes_of, parts))


def described_place(place: Place, seen: Sequence[Seen]) -> dict[str, Any]:
    """A place of the field: ``middle_mm`` from the field's middle, RAS+; ``extent_mm`` along each array axis; how much
    of it is ``in_body``, mean over scans; and all of that in ``words``.
    """
    grid = seen[0].subject.grid
    voxels = np.argwhere(place.mask)
    middle = grid.world(voxels.mean(axis=0)) - grid.world((np.array(grid.shape) - 1) / 2)
    low, high = np.percentile(voxels, [5, 95], axis=0)
    extent = (high - low + 1) * grid.spacing
    in_body = float(np.mean([one.body[place.mask].mean() for one in seen]))
    pairs = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))
    sides = [f"{abs(mm):.0f} mm {pair[int(mm > 0)]}" for pair, mm in zip(pairs, middle, strict=True)]
    wide = extent >= 0.6 * np.array(grid.shape) * grid.spacing
    shape = {2: "a layer", 1: "a column"}.get(int(wide.sum()), "a place")
    size_ = " x ".join(f"{mm:.0f}" for mm in extent)
    where = side_of(seen[0].subject, np.round(voxels.mean(axis=0)).astype(int))
    words = (
        f"{shape} of {size_} mm about {', '.join(sides)} of the field's middle ({where}), "
        f"{in_body:.0%} of it inside the patient"
    )
    return {
        "middle_mm": middle.round(1).tolist(),
        "extent_mm": extent.round(1).tolist(),
        "in_body": in_body,
        "words": words,
    }


# ---- verdicts

_TOLD = {
    AIR: "all that lies outside the patient",
    TONE: "brightness and contrast",
    DETAIL: "the strength of fine detail",
    SIZE: "the patient's size",
    POSITION: "where in the field the patient lies",
}
_MORE = "field more than patient"
_UNSURE = "the patients are too few, or too unlike, to tell"
_FLIPS = 1999


@dataclass(frozen=True)
class Carried:
    """The share that goes along over scans, with its interval over patients, and its p-value against none."""

    mean: float
    low: float
    high: float
    p_value: float
    scans: int
    patients: int

    @property
    def words(self) -> str:
        """``31 % [20, 42] of the answer``."""
        return f"{self.mean:.0%} [{self.low:.0%}, {self.high:.0%}] of the difference of answers"


def carried(shares: Sequence[Figure], owners: Sequence[str]) -> Carried | Undefined:
    """The mean share; its p-value flips the signs of whole patients: (1 + as large) / (1 + flips)."""
    summary = summarise(shares, owners)
    ends = summary.estimate, summary.low, summary.high
    if any(isinstance(end, Undefined) for end in ends):
        return Undefined(next(end.reason for end in ends if isinstance(end, Undefined)))
    known = [(x, owner) for x, owner in zip(shares, owners, strict=True) if not isinstance(x, Undefined)]
    sums = np.array([sum(x for x, owner in known if owner == one) for one in dict.fromkeys(o for _, o in known)])
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (_FLIPS, len(sums)))
    as_large = np.count_nonzero(signs @ sums >= sums.sum() - 1e-12)
    mean, low, high = (float(end) for end in ends)  # type: ignore[arg-type]
    return Carried(mean, low, high, (1 + as_large) / (1 + _FLIPS), summary.n, summary.patients)


def of_exchange(
    found: Mapping[str, Any], settings: AuditSection, patients: Mapping[str, str], alike: str | None
) -> list[Verdict]:
    """A verdict on each property.

    Parameters
    ----------
    found : of :func:`exchange`
    patients : case -> whose scan it is
    alike : why the model's answers do not differ, if so
    """
    shares = {name: {case: figure(x) for case, x in of.items()} for name, of in found.get("shares", {}).items()}
    field, body = (shares.get(name, {}) for name in _PLACES)
    more = {case: _less(share, body[case]) for case, share in field.items()}
    told = {
        name: carried(list(of.values()), [patients.get(case, case) for case in of])
        for name, of in {**shares, _MORE: more}.items()
    }
    why = alike or found.get("undefined")
    asked = [one for name in (*EXCHANGES, FIELD) if isinstance(one := told.get(name), Carried)]
    corrected = dict(zip(map(id, asked), holm([one.p_value for one in asked]).tolist(), strict=True))
    verdicts = [_of_property(name, told.get(name), why, corrected, settings) for name in EXCHANGES]
    return [*verdicts, _of_field(told, found, why, corrected, settings)]


def _less(first: Figure, second: Figure) -> Figure:
    return next((x for x in (first, second) if isinstance(x, Undefined)), None) or float(first) - float(second)  # type: ignore[arg-type]


def _rule(what: str, settings: AuditSection) -> str:
    return (
        f"flagged where, of the difference between the answers of scans that are answered otherwise, "
        f"{settings.carried:.0%} or more (low end of the 95 % interval over patients) goes along with {what}, beyond "
        f"what does between scans answered alike; p by flipping signs, after Holm, at most {settings.alpha:g}; "
        f"scans of {settings.min_scans} patients or more; not found where the interval lies below "
        f"{settings.carried:.0%}, and else it cannot be told"
    )


def _of_property(
    name: str,
    share: Carried | Undefined | None,
    why: str | None,
    corrected: Mapping[int, float],
    settings: AuditSection,
) -> Verdict:
    rule = _rule(f"what is exchanged between them: {_TOLD[name]}", settings)
    if why or not isinstance(share, Carried) or share.patients < settings.min_scans:
        return Verdict(name, UNDECIDED, rule, why or _too_few(share, settings), {})
    figures = {**asdict(share), "corrected": corrected[id(share)]}
    words = f"{share.words} goes along with {_TOLD[name]} ({share.scans} scans, corrected p {corrected[id(share)]:.2g})"
    if share.low >= settings.carried and corrected[id(share)] <= settings.alpha:
        return Verdict(name, FLAGGED, rule, f"the answer hangs on {_TOLD[name]}: {words}", figures)
    if share.high < settings.carried:
        return Verdict(name, CLEAR, rule, words, figures)
    return Verdict(name, UNDECIDED, rule, f"{_UNSURE}: {words}", figures)


def _of_field(
    told: Mapping[str, Carried | Undefined],
    found: Mapping[str, Any],
    why: str | None,
    corrected: Mapping[int, float],
    settings: AuditSection,
) -> Verdict:
    rule = (
        _rule("what lies at one place of the field, the place sought on the other half of the scans", settings)
        + "; and more than with a place as large sought alike in the patient, who lies elsewhere in each scan (low end "
        f"above 0); and where single voxels of the place order {settings.still:.0%} or more of pairs of scans as their "
        "answers do, the voxels taken on other scans"
    )
    share, body, more = told.get(FIELD), told.get(_PLACES[1]), told.get(_MORE)
    if why or not (isinstance(share, Carried) and isinstance(body, Carried) and isinstance(more, Carried)):
        return Verdict(FIELD, UNDECIDED, rule, why or _too_few(share, settings), {})
    if share.patients < settings.min_scans:
        return Verdict(FIELD, UNDECIDED, rule, _too_few(share, settings), {})
    figures = {
        "field": asdict(share), "patient": asdict(body), "more": asdict(more), "place": found["place"],
        "bodies_mm": found["bodies_mm"], "corrected": corrected[id(share)],
    }  # fmt: skip
    place = found["place"]["words"]
    words = f"{share.words} goes along with what lies in {place}; {body.words} with a place in the patient"
    large = share.low >= settings.carried and corrected[id(share)] <= settings.alpha
    still = found["place"]["still"]
    words += f"; single voxels there order {still:.0%} of pairs of scans as their answers do"
    if large and more.low > 0 and still >= settings.still:
        said = f"the answer hangs on something fixed in the scanner's field and not in the patient: {words}"
        return Verdict(FIELD, FLAGGED, rule, said, figures)
    if large and found["bodies_mm"] < settings.radius_mm / 2:
        lie = f"patients lie alike (within {found['bodies_mm']:.1f} mm), so that field and patient are not told apart"
        return Verdict(FIELD, UNDECIDED, rule, f"{lie}: {words}", figures)
    if share.high < settings.carried or more.mean <= 0 or still < settings.still:
        return Verdict(FIELD, CLEAR, rule, words, figures)
    return Verdict(FIELD, UNDECIDED, rule, f"{_UNSURE}: {words}", figures)


def _too_few(share: Carried | Undefined | None, settings: AuditSection) -> str:
    if isinstance(share, Undefined):
        return share.reason
    if share is None:
        return f"the body is known in fewer than {2 * settings.min_scans} scans of one shape"
    return f"only scans of {share.patients} patients could be told, fewer than {settings.min_scans}"
