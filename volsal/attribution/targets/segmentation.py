"""Scores of a segmentation model: a class's logit, summed over some of the output's voxels.

The output is (B, K, *spatial), before any softmax or sigmoid.  Which channel is summed, and where it counts as
predicted, is :class:`Segment` (classes exclude each other) or :class:`Region` (each channel speaks for itself); over
which voxels, is a :class:`Where`.  To add a way of choosing voxels: a :class:`Where` here, and its text form in
:mod:`volsal.attribution.targets.forms`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from volsal.attribution.targets.target import OutputOf, Target, TargetError, case_file, described, path_id, tiled
from volsal.grid import Grid

if TYPE_CHECKING:
    from volsal.attribution.method import Context

Slices = tuple[slice, ...]


class Where(ABC):
    """Which of the output's voxels a segmentation target sums over."""

    #: Whether a part of the output tells which of its voxels are meant.
    local: ClassVar[bool] = False

    @property
    @abstractmethod
    def id(self) -> str:
        """What the target's id ends in; empty for the plain case."""

    @property
    def files(self) -> tuple[str, ...]:
        """The files it reads, ``{case}`` standing for the case's id."""
        return ()

    @abstractmethod
    def mask(self, of: Segment, logits: Tensor) -> Tensor:
        """The voxels, (B, *spatial) bool, in the output ``logits`` (B, K, *spatial) of the target ``of``.

        Raises
        ------
        TargetError
            Where it does not fit the output.
        """

    @abstractmethod
    def nothing(self, of: Segment, logits: Tensor) -> str:
        """Why the mask of one volume's ``logits`` (1, K, *spatial) is empty, and what to do, in words."""

    def placed(self, context: Context) -> Where:
        """The same, knowing the case and where the model's input lies."""
        return self

    def within(self, at: Slices) -> Where:
        """The same for a part of the output alone; asked only where :attr:`local`."""
        return self


@dataclass(frozen=True)
class Predicted(Where):
    """All voxels that are predicted as the class."""

    id = ""
    local: ClassVar[bool] = True

    def __str__(self) -> str:
        return "the voxels predicted as it"

    def mask(self, of: Segment, logits: Tensor) -> Tensor:
        """The predicted mask."""
        return of.predicted(logits)

    def nothing(self, of: Segment, logits: Tensor) -> str:
        """What is predicted instead."""
        return (
            f"nothing is predicted as {of.noun}: {of.census(logits[0])}; name the voxels to explain, as in "
            f"{of.stem}-voxel-10-20-30 or {of.stem}-in:mask.nii.gz"
        )


@dataclass(frozen=True)
class Component(Where):
    """One connected component of the predicted mask: the largest, or the ``number``-th by size.

    Voxels that touch by a face, an edge or a corner are connected.
    """

    number: int = 1

    def __post_init__(self) -> None:
        if self.number < 1:
            raise TargetError(f"components are counted from 1, the largest; there is no component {self.number}")

    @property
    def id(self) -> str:
        """``largest``, ``component-2``."""
        return "largest" if self.number == 1 else f"component-{self.number}"

    def __str__(self) -> str:
        which = "the largest component" if self.number == 1 else f"component {self.number}, by size,"
        return f"{which} of the voxels predicted as it"

    def mask(self, of: Segment, logits: Tensor) -> Tensor:
        """The component in each volume."""
        return torch.stack([components(mask) == self.number for mask in of.predicted(logits)])

    def nothing(self, of: Segment, logits: Tensor) -> str:
        """How many components there are."""
        mask = of.predicted(logits)[0]
        if not mask.any():
            return Predicted().nothing(of, logits)
        count = int(components(mask).max())
        return (
            f"component {self.number} of {of.noun} asked for, but what is predicted as it has {count} "
            f"component{'s' if count > 1 else ''}, {int(mask.sum()):,} voxels in all"
        )


@dataclass(frozen=True)
class Voxel(Where):
    """A single voxel, by its index in the output."""

    index: tuple[int, ...]

    local: ClassVar[bool] = True

    @property
    def id(self) -> str:
        """``voxel-10-20-30``."""
        return "voxel-" + "-".join(map(str, self.index))

    def __str__(self) -> str:
        return f"voxel {self.index} of the output"

    def mask(self, of: Segment, logits: Tensor) -> Tensor:
        """That voxel in every volume; TargetError where the output has none."""
        size = tuple(logits.shape[2:])
        if len(self.index) != len(size) or not all(0 <= at < n for at, n in zip(self.index, size, strict=True)):
            raise TargetError(f"{self} asked for, but the output has {size} voxels, counted from 0")
        mask = torch.zeros(size, dtype=torch.bool, device=logits.device)
        mask[self.index] = True
        return mask.expand(len(logits), *size)

    def nothing(self, of: Segment, logits: Tensor) -> str:
        """It is not there."""
        return f"{self} is none"

    def within(self, at: Slices) -> Where:
        """The voxel counted from the part's own corner, or nowhere."""
        inside = all(part.start <= n < part.stop for n, part in zip(self.index, at, strict=True))
        return Voxel(tuple(n - part.start for n, part in zip(self.index, at, strict=True))) if inside else _Nowhere()


@dataclass(frozen=True)
class _Nowhere(Where):
    """What a single voxel is in a part of the output that does not hold it."""

    id = "nowhere"

    def mask(self, of: Segment, logits: Tensor) -> Tensor:
        return torch.zeros_like(logits[:, 0], dtype=torch.bool)

    def nothing(self, of: Segment, logits: Tensor) -> str:
        return "no voxel is meant"


@dataclass(frozen=True)
class Position(Where):
    """The single voxel at a position in the patient.

    Parameters
    ----------
    mm : RAS+, in the scan's world
    grid : where the model's input lies; filled in for each scan
    """

    mm: tuple[float, float, float]
    grid: Grid | None = field(default=None, compare=False)

    @property
    def id(self) -> str:
        """``mm-r12.5-p30-s7``: 12.5 mm to the right, 30 to the back, 7 towards the head."""
        sides = zip(("lr", "pa", "is"), self.mm, strict=True)
        return "mm-" + "-".join(f"{pair[mm >= 0]}{abs(mm):.10g}" for pair, mm in sides)

    def __str__(self) -> str:
        return f"the voxel at {', '.join(f'{mm:g}' for mm in self.mm)} mm (R, A, S)"

    def placed(self, context: Context) -> Position:
        """The same, knowing the grid."""
        return replace(self, grid=context.grid)

    def mask(self, of: Segment, logits: Tensor) -> Tensor:
        """That voxel in every volume; TargetError where it lies outside the output."""
        if self.grid is None or logits.ndim != 5:
            raise TargetError(f"{self}: a place in mm is known for scans only; explain through volsal.Explainer")
        size = tuple(logits.shape[2:])
        at = self.grid.coarse(size).voxel(self.mm)  # an output coarser than the input covers the same field of view
        nearest = tuple(int(n) for n in np.round(at))
        if not all(0 <= n < limit for n, limit in zip(nearest, size, strict=True)):
            low, high = self.grid.corners.min(0), self.grid.corners.max(0)
            box = ", ".join(f"{a:.4g} to {b:.4g}" for a, b in zip(low, high, strict=True))
            raise TargetError(f"{self} lies outside what the model sees, {box} mm (R, A, S)")
        return Voxel(nearest).mask(of, logits)

    def nothing(self, of: Segment, logits: Tensor) -> str:
        """It is not there."""
        return f"{self} is none"


@dataclass(frozen=True)
class ComponentAt(Where):
    """The connected component of the predicted mask that holds a voxel: a :class:`Voxel` or a :class:`Position`."""

    at: Voxel | Position

    @property
    def id(self) -> str:
        """``component-at-voxel-10-20-30``."""
        return f"component-at-{self.at.id}"

    def __str__(self) -> str:
        return f"the component, of the voxels predicted as it, that holds {self.at}"

    def placed(self, context: Context) -> Where:
        """The same, knowing the grid."""
        return ComponentAt(self.at.placed(context)) if isinstance(self.at, Position) else self

    def mask(self, of: Segment, logits: Tensor) -> Tensor:
        """The component in each volume."""
        found = []
        for mask, seed in zip(of.predicted(logits), self.at.mask(of, logits), strict=True):
            numbers = components(mask)
            found.append((numbers == numbers[seed]) & mask)
        return torch.stack(found)

    def nothing(self, of: Segment, logits: Tensor) -> str:
        """What is predicted there instead."""
        return f"{self.at} is not predicted as {of.noun}, so no component of it holds that voxel"


@dataclass(frozen=True, eq=False)
class Mask(Where):
    """The voxels of a given mask.

    Parameters
    ----------
    values : (*spatial) for every volume alike, (B, *spatial) or (B, 1, *spatial); not 0 (or True) where summed
    id : what the target's id ends in
    words : what it is called
    """

    values: Tensor
    id: str = "in-mask"
    words: str = "a given mask"

    local: ClassVar[bool] = True

    def __str__(self) -> str:
        return self.words

    def mask(self, of: Segment, logits: Tensor) -> Tensor:
        """The mask for each volume; TargetError where it does not fit the output."""
        values = self.values.to(logits.device) != 0
        if values.ndim == logits.ndim and values.shape[1] == 1:
            values = values[:, 0]
        if values.ndim == logits.ndim - 2:
            values = values[None]
        if values.ndim != logits.ndim - 1 or values.shape[1:] != logits.shape[2:] or len(logits) % len(values):
            raise TargetError(
                f"{self.words} has shape {tuple(self.values.shape)}, the model's output {tuple(logits.shape)}; a mask "
                "has one value per voxel of the output"
            )
        return tiled(values, len(logits))

    def nothing(self, of: Segment, logits: Tensor) -> str:
        """It holds nothing."""
        return f"{self.words} holds none of the {logits[0, 0].numel():,} voxels that the model sees"

    def within(self, at: Slices) -> Where:
        """The mask's part."""
        index: Any = (..., *at)
        return replace(self, values=self.values[index])


@dataclass(frozen=True)
class Labels(Where):
    """The voxels of a label map on file, brought to the model's input by nearest neighbour.

    Parameters
    ----------
    path : a label map; ``{case}`` stands for the case's id
    label : the label meant; None: everything but 0
    """

    path: str
    label: int | None = None

    @property
    def id(self) -> str:
        """``in-mask``, after the file's name; ``in-organs-3`` with a label."""
        return f"in-{path_id(self.path)}" + ("" if self.label is None else f"-{self.label}")

    @property
    def files(self) -> tuple[str, ...]:
        """The label map."""
        return (self.path,)

    def __str__(self) -> str:
        return f"{'the labels' if self.label is None else f'label {self.label}'} of {self.path}"

    def placed(self, context: Context) -> Where:
        """The mask of the context's case."""
        if context.labels_of is None:
            raise TargetError(self._unread())
        labels = context.labels_of(case_file(self.path, context))
        return Mask(labels != 0 if self.label is None else labels == self.label, self.id, str(self))

    def mask(self, of: Segment, logits: Tensor) -> Tensor:
        """TargetError: the file must have been read, which takes a scan."""
        raise TargetError(self._unread())

    def nothing(self, of: Segment, logits: Tensor) -> str:
        """It was not read."""
        return self._unread()

    def _unread(self) -> str:
        return f"{self}: a label map is read for scans only; explain through volsal.Explainer, or give a volsal.Mask"


@dataclass(frozen=True)
class Segment:
    r"""The logit of a class, summed over voxels.  Output (B, K, *spatial) -> scores (B,).

    .. math:: S_b = \sum_{v \in M_b} z_{bkv}

    The classes exclude each other: what is predicted as class k is where it has the largest logit.  An output of one
    channel is the foreground's logit: that is class 1, predicted where the logit is above 0.  A sum, not a mean: twice
    the lesion is twice the score.

    Parameters
    ----------
    index : the class
    where : which voxels M are summed: :class:`Predicted`, :class:`Component`, :class:`ComponentAt`, :class:`Voxel`,
        :class:`Position`, :class:`Mask` or :class:`Labels`
    """

    index: int
    where: Where = Predicted()

    _prefix: ClassVar[str] = "segment"

    @property
    def noun(self) -> str:
        """What is segmented, in words."""
        return f"class {self.index}"

    @property
    def stem(self) -> str:
        """``segment-1``."""
        return f"{self._prefix}-{self.index}"

    @property
    def id(self) -> str:
        """``segment-1``, ``segment-1-largest``, ``segment-1-voxel-10-20-30``, ..."""
        return f"{self.stem}-{self.where.id}" if self.where.id else self.stem

    def __str__(self) -> str:
        return f"logit of {self.noun} summed over {self.where}"

    @property
    def files(self) -> tuple[str, ...]:
        """The files it reads, ``{case}`` standing for the case's id."""
        return self.where.files

    def __call__(self, output: Any) -> Tensor:
        """The sum in each volume; TargetError where there is nothing to sum over."""
        logits = self._checked(output)
        return self._sum(logits, self._mask(logits))

    def fixed(self, output: Any) -> Target:
        """The sum over the voxels that were chosen in ``output``."""
        return replace(self, where=Mask(self._mask(self._checked(output)), self.where.id, str(self.where)))

    def placed(self, context: Context, output_of: OutputOf) -> Target:
        """The target for the context's case."""
        return replace(self, where=self.where.placed(context))

    @property
    def within(self) -> Callable[[Slices], Target] | None:
        """For outputs too large to be held: from slices of the spatial axes to the target of what lies there.

        That part's share of the sum is 0 where nothing of it lies there, so that no part can tell that there is nothing
        to sum over anywhere: who finds all shares without a gradient asks the target about the whole output, which
        raises :class:`TargetError` then.  None where a part does not tell which voxels are meant.
        """
        return (lambda at: partial(self._share, self.where.within(at))) if self.where.local else None

    def facts(self, output: Any) -> list[dict[str, Any]]:
        """How many voxels are summed in each volume."""
        return [{"voxels": int(mask.sum())} for mask in self._mask(self._checked(output))]

    def channel(self, logits: Tensor) -> Tensor:
        """The class's own logits, (B, *spatial)."""
        return logits[:, 0 if logits.shape[1] == 1 else self.index]

    def predicted(self, logits: Tensor) -> Tensor:
        """Where the class is predicted, (B, *spatial) bool."""
        values = logits.detach()
        return values[:, 0] > 0 if values.shape[1] == 1 else values.argmax(1) == self.index

    def census(self, logits: Tensor) -> str:
        """What is predicted, of one volume's (K, *spatial)."""
        if len(logits) == 1:
            return f"none of {logits.numel():,} voxels has a logit above 0 (the largest is {float(logits.max()):.3g})"
        counts = torch.bincount(logits.argmax(0).flatten(), minlength=len(logits))
        most = [f"{int(counts[k]):,} are class {k}" for k in counts.argsort(descending=True)[:3].tolist() if counts[k]]
        return f"of {int(counts.sum()):,} voxels {' and '.join(most)}"

    def _mask(self, logits: Tensor) -> Tensor:
        masks = self.where.mask(self, logits)
        for number, mask in enumerate(masks):
            if not mask.any():
                volume = f"volume {number} of the batch: " if len(masks) > 1 else ""
                raise TargetError(volume + self.where.nothing(self, logits[number : number + 1].detach()))
        return masks

    def _share(self, where: Where, output: Any) -> Tensor:
        logits = self._checked(output)
        return self._sum(logits, where.mask(self, logits))

    def _sum(self, logits: Tensor, mask: Tensor) -> Tensor:
        kept = self.channel(logits).masked_fill(~mask, 0).flatten(1)
        # Half precision holds neither the sum over a volume nor its digits.
        return kept.sum(1, dtype=torch.promote_types(kept.dtype, torch.float32))

    def _checked(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim < 3:
            raise TargetError(
                f"{self.stem!r} needs a segmentation's output, (B, classes, *spatial); this model returns "
                f"{described(output)}"
            )
        self._require_class(output.shape[1])
        return output

    def _require_class(self, channels: int) -> None:
        if channels == 1 and self.index != 1:
            raise TargetError(
                f"class {self.index} asked for, but the output has one channel, the foreground's logit; that is class "
                "1, as in segment-1"
            )
        if channels > 1 and not 0 <= self.index < channels:
            raise TargetError(
                f"class {self.index} asked for, but the output has {channels} classes, 0 to {channels - 1}"
            )


@dataclass(frozen=True)
class Region(Segment):
    """The logit of a channel that speaks for itself, summed over voxels.  Output (B, K, *spatial) -> scores (B,).

    For sigmoid outputs, whose regions may overlap (the whole tumour and its core): predicted is where the channel's own
    logit is above 0.  ``index`` counts channels from 0; all else is as for :class:`Segment`.
    """

    _prefix: ClassVar[str] = "region"

    @property
    def noun(self) -> str:
        """What is segmented, in words."""
        return f"region {self.index}"

    def channel(self, logits: Tensor) -> Tensor:
        """The channel, (B, *spatial)."""
        return logits[:, self.index]

    def predicted(self, logits: Tensor) -> Tensor:
        """Where the channel is above 0, (B, *spatial) bool."""
        return logits[:, self.index].detach() > 0

    def census(self, logits: Tensor) -> str:
        """How far the channel is from it, of one volume's (K, *spatial)."""
        return super().census(logits[self.index : self.index + 1])

    def _require_class(self, channels: int) -> None:
        if not 0 <= self.index < channels:
            raise TargetError(f"region {self.index} asked for, but the output has channels 0 to {channels - 1}")


def components(mask: Tensor) -> Tensor:
    """The connected components of ``mask`` (*spatial), numbered from 1 by falling size; 0 elsewhere.  int64."""
    import SimpleITK as sitk

    array = mask.cpu().numpy().astype(np.uint8)
    image = sitk.GetImageFromArray(array[None] if array.ndim == 1 else array)  # ITK has no images of one axis
    found = sitk.GetArrayFromImage(sitk.RelabelComponent(sitk.ConnectedComponent(image, True)))
    return torch.from_numpy(found.reshape(array.shape).astype(np.int64)).to(mask.device)
