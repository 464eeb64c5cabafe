"""What the perturbation methods share: what a removed place is filled with, and the scores of many changed copies.

A perturbation method asks the model itself: what does it say of a copy of the scan in which this place holds nothing?
It needs no gradient and no layer, and pays with a forward pass for every few copies.  To add one: a class with
:meth:`~Perturbation.prepare`, whose :class:`Copies` say how each copy is changed and what map the scores make.
"""

from __future__ import annotations

import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from volsal.attribution.method import PLAIN, Attribution, Context, Method, detached, scores_of
from volsal.attribution.settings import SettingError, require_number, require_whole
from volsal.attribution.tap import copied_on_write, forward, plain, undisturbed
from volsal.attribution.targets.target import Target, fixed, score, target_id
from volsal.errors import nearest

_log = logging.getLogger("volsal")

FILLS = ("blur", "mean", "zero", "noise")
#: A length for all spatial axes, or one for each.
Lengths = float | Sequence[float]
# Raised when the scores that a partial file holds come to mean something else.
_FORMAT = 1
# How the names of kept files end, and before they are whole.
_PARTIAL, _UNFINISHED = ".partial", ".partial-new"
# What a fault may cost at most, in seconds of work.
_SAVE_EVERY = 10.0


class Copies(ABC):
    """The changed copies of one batch: how each is made, and what map their scores make.

    Attributes
    ----------
    count : how many copies of the whole batch there are
    settled : what the copies depend on besides the method's settings and the volume, as plain data
    """

    count: int
    settled: Any = None

    @abstractmethod
    def change(self, number: int, copy: Tensor) -> None:
        """Turn ``copy`` (B, C, *spatial), which holds the volume, into copy ``number`` of it, in place."""

    @abstractmethod
    def read(self, original: Tensor, scores: Tensor) -> Reading:
        """The map of each target, from its scores on the volume (T, B) and on the copies (copies, T, B), float64."""


@dataclass(frozen=True, eq=False)
class Reading:
    """One map (B, 1 or C, *spatial) and one set of figures for each target, and what else a reader must know."""

    maps: list[Tensor]
    facts: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Perturbation(Method):
    """Remove places of the input, and see what the score loses.

    Parameters
    ----------
    fill : what stands in a removed place.  ``blur``: the volume itself, blurred by a Gaussian; ``mean``: each
        channel's mean over the volume; ``zero``; ``noise``: normal, with each channel's mean and standard deviation;
        or a number, in units of the model's input
    sigma_mm : standard deviation of the blur's Gaussian, mm, one number or one per axis; None: half the edge of the
        places that are removed
    sigma : the same in voxels; replaces ``sigma_mm``
    seed : of whatever is drawn at random.  Every volume of a batch gets the same draws, which it also gets alone
    batch : copies in one forward pass.  It costs memory and changes no map beyond the model's own rounding
    """

    fill: str | float = "blur"
    sigma_mm: Lengths | None = None
    sigma: Lengths | None = None
    seed: int = 0
    batch: int = 1

    unit: ClassVar[str] = "logit"
    signed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in fields(self):  # a config's lists
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        if isinstance(self.fill, str) and self.fill not in FILLS:
            raise SettingError(f"{self.id}: unknown fill {self.fill!r}{nearest(self.fill, FILLS)}, or a number")
        if not isinstance(self.fill, str):
            require_number(self.id, fill=self.fill)
        require_whole(self.id, batch=self.batch)
        require_whole(self.id, 0, seed=self.seed)

    @abstractmethod
    def copies(self, shape: Sequence[int], context: Context) -> int:
        """How many changed copies a volume (B, C, *spatial) of this shape asks for."""

    @abstractmethod
    def prepare(self, volume: Tensor, context: Context) -> Copies:
        """The changed copies of ``volume`` (B, C, *spatial)."""

    def passes(self, shape: Sequence[int], context: Context = PLAIN) -> int:
        """Forward passes for a volume (B, C, *spatial) of this shape; nothing is run.

        One for the volume itself, the rest for its changed copies.  Errors as for :meth:`attribute`, as far as they
        concern the settings.
        """
        return 1 + -(-self.copies(shape, context) // self.batch)

    def run(self, model: nn.Module, volume: Tensor, targets: Sequence[Target], context: Context) -> Attribution:
        """The map of each target, (B, 1 or C, *spatial), float32 or wider.

        With ``context.keep`` the scores that are done outlive a fault, and are taken up again by the next call that
        asks the same of the same model and volume.  The file stays when all is done, so that a fault in what comes
        after costs nothing either: whoever named the folder removes it.

        Raises
        ------
        SettingError
            For settings that do not fit the volume, or are in millimetres where no grid is known.
        TargetError
            For a target that does not fit the model's output, or a score that is not finite.
        ModelError
            Where the model cannot be run on this volume.
        """
        with undisturbed(model), torch.no_grad():
            volume = plain(volume)
            copies = self.prepare(volume, context)
            output = forward(model, copied_on_write(volume))
            scores = [s.detach() for s in scores_of(targets, output, len(volume))]
            kept = _Kept.none(self.id)
            if context.keep is not None:
                settled = (copies.settled, context.grid.spacing.tolist() if context.grid else None)
                kept = _Kept.below(context.keep, self.id, self._key(volume, targets, scores, output, settled))
            same = [fixed(target, output) for target in targets]
            table = self._table(model, volume, same, copies, kept, context)
            reading = copies.read(torch.stack(scores).double().cpu(), torch.from_numpy(table))
        return Attribution(
            reading.maps,
            scores,
            detached(output),
            facts=reading.facts,
            notes=(*kept.notes, *reading.notes),
        )

    def _table(
        self, model: nn.Module, volume: Tensor, targets: Sequence[Target], copies: Copies, kept: _Kept, context: Context
    ) -> np.ndarray:
        """The score of every copy, (copies, T, B) float64; those that ``kept`` holds are not computed again."""
        table = kept.load((copies.count, len(targets), len(volume)))
        missing = np.flatnonzero(np.isnan(table).any(axis=(1, 2))).tolist()
        chunks = [missing[start : start + self.batch] for start in range(0, len(missing), self.batch)]
        done, saved = copies.count - len(missing), time.monotonic()
        context.progress(self.id, done, copies.count)
        try:
            for at, chunk in enumerate(chunks):
                started = time.monotonic()
                table[chunk] = _scores(model, volume, targets, copies, chunk)
                done += len(chunk)
                if at == min(1, len(chunks) - 1):  # the second pass, since the first one warms up
                    _announce(self.id, len(chunks), time.monotonic() - started)
                if time.monotonic() - saved > _SAVE_EVERY:
                    kept.save(table)
                    saved = time.monotonic()
                context.progress(self.id, done, copies.count)
        finally:
            if chunks:
                kept.save(table)
        return table

    def _key(self, volume: Tensor, targets: Sequence[Target], scores: list[Tensor], output: Any, settled: Any) -> str:
        """Digest of all that the copies' scores depend on; the model is known by what it says of the volume.

        Not the batch: a run that ran out of memory is taken up again with a smaller one.
        """
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "batch"}
        # A function's repr holds its address; a target with an id is told by its repr to the last setting.
        named = [repr(target) if hasattr(target, "id") else target_id(target) for target in targets]
        digest = sha256(repr((_FORMAT, self.id, settings, settled, named, tuple(volume.shape))).encode())
        for tensor in (volume, *scores, *(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))):
            digest.update(digest_bytes(tensor))
        return digest.hexdigest()

    def in_voxels(self, name: str, shape: Sequence[int], context: Context) -> tuple[float, ...] | None:
        """The setting ``name``, or else ``name_mm``, in voxels along each spatial axis; None where both are None."""
        spatial = tuple(shape[2:])
        voxels, mm = getattr(self, name), getattr(self, f"{name}_mm")
        if voxels is not None:
            return self._each(name, voxels, len(spatial))
        if mm is None:
            return None
        if context.grid is None:
            raise SettingError(
                f"{self.id}: {name}_mm needs to know how large a voxel is, and no grid says so; give {name}, in voxels"
            )
        if context.grid.shape != spatial:
            raise SettingError(f"{self.id}: the volume is {spatial}, but its grid has shape {context.grid.shape}")
        lengths = self._each(f"{name}_mm", mm, len(spatial))
        return tuple(length / float(step) for length, step in zip(lengths, context.grid.spacing, strict=True))

    def _each(self, name: str, value: Lengths, axes: int) -> tuple[float, ...]:
        lengths = tuple(value) if isinstance(value, Sequence) else (value,) * axes
        if len(lengths) != axes or not all(isinstance(n, (int, float)) and 0 < n < math.inf for n in lengths):
            raise SettingError(f"{self.id}: {name} is a positive number, or {axes} of them, not {value!r}")
        return lengths

    def filling(self, volume: Tensor, edge: Sequence[float], context: Context) -> Tensor:
        """What stands in removed places, (B, C, *spatial) or of the same axes with a length of 1.

        ``edge`` is the size of those places in voxels along each axis.
        """
        axes = tuple(range(2, volume.ndim))
        mean = volume.mean(axes, keepdim=True)
        if self.fill == "blur":
            return blurred(volume, self.in_voxels("sigma", volume.shape, context) or [n / 2 for n in edge])
        if self.fill == "mean":
            return mean
        if self.fill == "noise":
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.randn(volume.shape[1:], dtype=torch.float64, generator=generator).to(volume)
            return mean + volume.std(axes, keepdim=True, correction=0) * drawn
        return torch.full_like(mean, 0.0 if self.fill == "zero" else float(self.fill))


def forget(folder: Path) -> None:
    """Remove what methods kept in ``folder``, and the folder itself if nothing else is in it."""
    if not folder.is_dir():
        return
    for file in [*folder.glob(f"*{_PARTIAL}"), *folder.glob(f"*{_UNFINISHED}")]:
        file.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def blurred(volume: Tensor, sigma: Sequence[float]) -> Tensor:
    """``volume`` (B, C, *spatial) by a Gaussian of ``sigma`` voxels along each axis; at the edge, of what is there."""
    wide = volume.to(torch.promote_types(volume.dtype, torch.float32))
    for axis, width in enumerate(sigma, 2):
        at = torch.arange(volume.shape[axis], dtype=torch.float64)
        weights = torch.exp(-0.5 * ((at[:, None] - at) / width) ** 2)
        along = (weights / weights.sum(1, keepdim=True)).to(wide)
        wide = torch.matmul(wide.movedim(axis, -1), along.T).movedim(-1, axis)
    return wide.to(volume.dtype)


def accurate(volume: Tensor) -> torch.dtype:
    """The dtype of a map of ``volume``."""
    return torch.promote_types(volume.dtype, torch.float32)


def per_volume(values: Tensor) -> Any:
    """A figure of each volume (B,) as plain data: a number where there is one volume, else a list."""
    numbers = [float(value) for value in values]
    return numbers[0] if len(numbers) == 1 else numbers


def digest_bytes(tensor: Tensor) -> bytes:
    """The tensor's own bytes, for a digest."""
    # A clone, since a single number counts as contiguous whatever its stride, and is no bytes then.
    own = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return own.reshape(-1).view(torch.uint8).numpy().tobytes()


def _scores(
    model: nn.Module, volume: Tensor, targets: Sequence[Target], copies: Copies, chunk: Sequence[int]
) -> np.ndarray:
    """(chunk, T, B) scores of the copies whose numbers are given, from one forward pass."""
    changed = volume.repeat(len(chunk), *(1,) * (volume.ndim - 1))
    for number, copy in zip(chunk, changed.split(len(volume)), strict=True):
        copies.change(number, copy)
    output = forward(model, changed)
    scores = torch.stack([score(target, output, len(changed)) for target in targets])
    return scores.double().cpu().reshape(len(targets), len(chunk), len(volume)).transpose(0, 1).numpy()


def _announce(what: str, passes: int, seconds_each: float) -> None:
    seconds = passes * seconds_each
    scale, name = next(((s, n) for s, n in ((3600, "h"), (60, "min")) if seconds >= 2 * s), (1, "s"))
    _log.info("%s: %s forward passes, about %.0f %s", what, f"{passes:,}", max(1, seconds / scale), name)


class _Kept:
    """The scores that are done, in a file that outlives the process.  Whole under its name, or not there."""

    def __init__(self, what: str, path: Path | None, key: str) -> None:
        self._what, self._path, self._key = what, path, key
        self.notes: list[str] = []

    @classmethod
    def none(cls, what: str) -> _Kept:
        """Nothing is kept."""
        return cls(what, None, "")

    @classmethod
    def below(cls, folder: Path, what: str, key: str) -> _Kept:
        """A file of this method and key in ``folder``."""
        return cls(what, Path(folder) / f"{what}-{key[:16]}{_PARTIAL}", key)

    def load(self, shape: tuple[int, ...]) -> np.ndarray:
        """The table of that shape, NaN where a score is missing."""
        empty = np.full(shape, np.nan)
        if self._path is None or not self._path.exists():
            return empty
        content = self._path.read_bytes()
        body = content[len(self._head(b"")) :]
        if len(body) == empty.nbytes and content.startswith(self._head(body)):
            return np.frombuffer(body).reshape(shape).copy()
        self.notes.append("partial results were ignored: their file is damaged, or belongs to something else")
        return empty

    def _head(self, body: bytes) -> bytes:
        return self._key.encode() + sha256(body).digest()

    def save(self, table: np.ndarray) -> None:
        """Keep ``table``.  A disk that refuses does not end the work, which may still come to its end."""
        if self._path is None:
            return
        temporary = self._path.with_suffix(_UNFINISHED)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(self._head(table.tobytes()) + table.tobytes())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except OSError as error:
            _log.warning("%s: partial results cannot be kept in %s: %s", self._what, self._path.parent, error.strerror)
