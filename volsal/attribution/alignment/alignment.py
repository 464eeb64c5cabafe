r"""Where the cells of a layer lie on the model's input.

A layer's map has fewer cells than the input has voxels, and to lay it over the scan each cell must be put where the
network looked.  Along each axis the centre of cell i lies at input voxel coordinate

.. math:: x(i) = \text{offset} + \text{stride} \cdot i

The stride follows from the architecture.  The offset does not: with even sizes, zero padding is consumed on one side
only, and training moves the kernels' weight off their centres (Alsallakh et al., "Mind the Pad", ICLR 2021), by up to
a cell.  So it can be measured.  To add a rule: a class here and its line in :data:`ALIGNMENTS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from volsal.attribution.alignment.tracing import Trace, traced
from volsal.attribution.gradients.lean import Lean
from volsal.attribution.gradients.rules import GuidedRule
from volsal.attribution.tap import Calls, copied_on_write, plain, reader, run, undisturbed
from volsal.errors import VolsalError
from volsal.grid import Grid


class AlignmentError(VolsalError, ValueError):
    """It cannot be told where a layer's cells lie."""


@dataclass(frozen=True)
class Alignment:
    """Where a layer's cells lie on the model's input.

    Attributes
    ----------
    kind : one of :data:`ALIGNMENTS`: how it was found
    stride : voxels from one cell to the next along each spatial axis; negative where the layer runs against the input
    offset : voxel coordinate of the centre of cell 0 along each axis
    uncertainty : of a measured offset, voxels: its standard error where several scans were measured; on a single one,
        how far the offset moves with the share of the maximum above which evidence counts
    scans : how many scans it was measured on
    near : how many other scans' measurement it was kept near
    held : whether it was drawn back to a limit, so that map and evidence do not coincide
    """

    kind: str
    stride: tuple[float, ...]
    offset: tuple[float, ...]
    uncertainty: tuple[float, ...] | None = None
    scans: int = 0
    near: int = 0
    held: bool = False

    def grid(self, inputs: Grid, cells: Sequence[int]) -> Grid:
        """The grid of a map of ``cells`` (3,) on a model input that lies on ``inputs``."""
        cell_to_voxel = np.diag([*self.stride, 1.0])
        cell_to_voxel[:3, 3] = self.offset
        return Grid(cells, inputs.affine @ cell_to_voxel)

    def place(self, values: Tensor, size: Sequence[int]) -> Tensor:
        """Values (B, C, *cells) at each voxel of the input: (B, C, *size), linear between the cells' centres.

        Beyond the outermost centres the nearest cell holds.
        """
        for axis, (stride, offset, voxels) in enumerate(zip(self.stride, self.offset, size, strict=True), 2):
            last = values.shape[axis] - 1
            at = ((torch.arange(voxels, dtype=torch.float64) - offset) / stride).clamp(0, last)
            low = at.floor().clamp(max=max(last - 1, 0))
            share = (at - low).to(values).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
            low = low.long().to(values.device)
            values = values.index_select(axis, low).lerp(values.index_select(axis, (low + 1).clamp(max=last)), share)
        return values

    def describe(self) -> dict[str, Any]:
        """As plain data, for records; :meth:`from_record` reads it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Alignment:
        """The inverse of :meth:`describe`; ValueError, KeyError or TypeError where it is none."""
        stride, offset, uncertainty = (record[name] for name in ("stride", "offset", "uncertainty"))
        rows = [stride, offset] if uncertainty is None else [stride, offset, uncertainty]
        if not all(isinstance(row, list) and len(row) == len(stride) for row in rows):
            raise ValueError("stride, offset and uncertainty are lists of one number per axis")
        numbers = [tuple(float(x) for x in row) for row in rows]
        if not np.isfinite(numbers).all() or 0 in numbers[0]:
            raise ValueError("stride, offset and uncertainty are finite, and no stride is 0")
        scans = int(record["scans"])
        if scans < 1:
            raise ValueError(f"measured on {scans} scans")
        return cls(str(record["kind"]), numbers[0], numbers[1], None if uncertainty is None else numbers[2], scans)


@dataclass(frozen=True, eq=False)
class LayerMap:
    """A class activation map and what it was made of.

    Attributes
    ----------
    method, layer, target : ids of the method and the target, and where the map was taken
    values : (B, 1, *cells)
    activation, gradient : (B, C, *cells) of the layer
    combine : the method's equation: (activation, gradient) -> values
    """

    method: str
    layer: str
    target: str
    values: Tensor
    activation: Tensor
    gradient: Tensor
    combine: Callable[[Tensor, Tensor], Tensor]

    @property
    def cells(self) -> tuple[int, ...]:
        """How many cells along each spatial axis."""
        return tuple(self.values.shape[2:])


class AlignmentRule(ABC):
    """How to find where the cells of a layer's map lie on the model's input."""

    id: ClassVar[str]
    #: Whether the map is to be averaged with the map of the input mirrored along every axis, mirrored back.
    mirrors: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, model: nn.Module, volume: Tensor, of: LayerMap) -> Alignment:
        """The alignment of a map that the model's input ``volume`` (B, C, *spatial) gave.

        Raises
        ------
        AlignmentError
            Where this rule has no answer.
        """

    def together(self, model: nn.Module, volume: Tensor, maps: Sequence[LayerMap]) -> list[Alignment]:
        """The alignment of each of several maps of one volume, from as few passes as the rule allows."""
        return [self(model, volume, of) for of in maps]


@dataclass(frozen=True)
class HalfPixel(AlignmentRule):
    """The customary rule: the cells tile the input, so cell 0 is centred half a cell in.

    It is what ``interpolate(align_corners=False)`` does, and right for layers reached by pooling without padding.
    """

    id: ClassVar[str] = "half-pixel"

    def __call__(self, model: nn.Module, volume: Tensor, of: LayerMap) -> Alignment:
        """Stride N / n and offset (stride - 1) / 2, for N voxels and n cells."""
        stride = tuple(whole / part for whole, part in zip(volume.shape[2:], of.cells, strict=True))
        return Alignment(self.id, stride, tuple((step - 1) / 2 for step in stride))


@dataclass(frozen=True)
class Nominal(AlignmentRule):
    """Stride and offset as the architecture states them, for kernels that weigh their two sides alike.

    Traced through one forward pass per layer and input size; see :mod:`volsal.attribution.alignment.tracing`.
    """

    id: ClassVar[str] = "nominal"

    def __call__(self, model: nn.Module, volume: Tensor, of: LayerMap) -> Alignment:
        """The traced lines, one per axis."""
        found = traced(model, volume, of.layer)
        if found.lost:
            raise AlignmentError(
                f"layer {of.layer!r}: where its cells lie cannot be traced ({found.lost}); use half-pixel alignment"
            )
        return Alignment(self.id, found.stride, found.offset)


@dataclass(frozen=True)
class FlipAverage(AlignmentRule):
    """The half-pixel rule for the mean of two maps: of the input, and of its mirror image, mirrored back.

    What pulls the cells to one side in one of them pulls to the other side in the other.  It takes a network that
    judges mirrored inputs as it judges others, which one trained on heads does not.
    """

    id: ClassVar[str] = "flip-average"
    mirrors: ClassVar[bool] = True

    def __call__(self, model: nn.Module, volume: Tensor, of: LayerMap) -> Alignment:
        """As for :class:`HalfPixel`."""
        return replace(HalfPixel()(model, volume, of), kind=self.id)


def nothing_known(of: LayerMap, size: tuple[int, ...]) -> Alignment | None:
    """No layer was measured before."""
    return None


@dataclass(frozen=True)
class Measured(AlignmentRule):
    r"""The offset at which this network's cells truly look, found on the volume itself, without any mask.

    The cells are followed back through the network.  With the score's gradient by the layer held fixed, the guided
    gradient :math:`p = \sum_i L_i^+ \, \partial L_i / \partial x`, each cell counting by its own value, says which
    voxels made them what they are, at the input's own resolution, where no placement is in doubt.  The map is put so
    that the centroid of its top half falls on the centroid of that evidence's top half:

    .. math:: \mathrm{centroid}(\mathrm{place}(L, \text{offset})) = \mathrm{centroid}(p^+)

    This asks nothing of the data, such as symmetry, and stays with inputs that the network knows.  Since it is done for
    each volume it also tells where within a large cell the evidence lay.  An offset further than ``reach`` strides from
    what was measured on other volumes, or, where nothing was, from the middle that the half-pixel rule assumes, is
    drawn back to that distance, and what is cut off counts as uncertainty: the two centroids then belong to different
    things.

    Parameters
    ----------
    known : what was measured before, for a layer map and the input's size; see :func:`pooled`
    strict : raise where a map with evidence cannot be followed back, instead of falling back on what is known
    """

    known: Callable[[LayerMap, tuple[int, ...]], Alignment | None] = nothing_known
    strict: bool = False

    id: ClassVar[str] = "measured"
    reach: ClassVar[tuple[float, float]] = (0.75, 1.0)  # with and without an earlier measurement, strides

    def __call__(self, model: nn.Module, volume: Tensor, of: LayerMap) -> Alignment:
        """The volume's own alignment, within reach of what is known; of a batch, the median over its volumes."""
        return self.together(model, volume, [of])[0]

    def together(self, model: nn.Module, volume: Tensor, maps: Sequence[LayerMap]) -> list[Alignment]:
        """As one by one, from one forward pass; each map has its own way back."""
        starts = [_centred(model, volume, of) for of in maps]
        with followed_back(model, volume, maps) as evidence:
            return [self._own(model, volume, of, start, evidence) for of, start in zip(maps, starts, strict=True)]

    def _own(
        self, model: nn.Module, volume: Tensor, of: LayerMap, start: Alignment, evidence: Callable[[LayerMap], Tensor]
    ) -> Alignment:
        known = self._fitting(start, of, tuple(volume.shape[2:]))
        begin = known or start
        try:
            own, doubt = offsets(of, evidence(of), begin)
        except (AlignmentError, torch.OutOfMemoryError):
            if self.strict:
                raise
            own = doubt = np.empty((0, volume.ndim - 2))
        if not len(own):
            return known or HalfPixel()(model, volume, of)
        reach = self.reach[0 if known else 1] * np.abs(begin.stride)
        middle = np.median(own, axis=0)
        offset = np.array(begin.offset) + np.clip(middle - begin.offset, -reach, reach)
        uncertainty = np.maximum(np.median(doubt, axis=0), np.abs(middle - offset))
        held = bool((np.abs(middle - offset) > 0.05 * np.abs(begin.stride)).any())
        near = known.scans if known else 0
        return Alignment(self.id, begin.stride, _rounded(offset), _rounded(uncertainty), len(own), near, held)

    def _fitting(self, start: Alignment, of: LayerMap, size: tuple[int, ...]) -> Alignment | None:
        """What is known, if it can be of this layer: the same weights may stand in another architecture."""
        known = self.known(of, size)
        if known is None or len(known.stride) != len(start.stride) or not np.allclose(known.stride, start.stride):
            return None
        near = np.abs(np.subtract(known.offset, start.offset)) <= 2 * np.abs(start.stride)
        return known if near.all() else None


ALIGNMENTS: dict[str, type[AlignmentRule]] = {rule.id: rule for rule in (HalfPixel, Nominal, Measured, FlipAverage)}


# Method, layer and target ids, and the input's size.
_Group = tuple[str, str, str, tuple[int, ...]]


class Collector(AlignmentRule):
    """Gathers what each volume says of its own, for :meth:`pooled`, and places nothing itself."""

    id: ClassVar[str] = "collector"

    def __init__(self) -> None:
        self._found: dict[_Group, list[NDArray[np.float64]]] = {}
        self._strides: dict[_Group, tuple[float, ...]] = {}

    def __call__(self, model: nn.Module, volume: Tensor, of: LayerMap) -> Alignment:
        """The start of the search; what was found is kept."""
        return self.together(model, volume, [of])[0]

    def together(self, model: nn.Module, volume: Tensor, maps: Sequence[LayerMap]) -> list[Alignment]:
        """As one by one, from one forward pass."""
        starts = [_centred(model, volume, of) for of in maps]
        with followed_back(model, volume, maps) as evidence:
            for of, start in zip(maps, starts, strict=True):
                key = (of.method, of.layer, of.target, tuple(volume.shape[2:]))
                self._found.setdefault(key, []).extend(offsets(of, evidence(of), start)[0])
                self._strides[key] = start.stride
        return starts

    def pooled(self) -> dict[_Group, Alignment]:
        """The alignment of each group that held evidence; :class:`AlignmentError` where none did."""
        if not any(self._found.values()):
            raise AlignmentError(
                "none of these scans gives a map with evidence that leads back to the input, so there is nothing to "
                "measure alignment by; use scans in which the model finds something"
            )
        return {key: pooled(found, self._strides[key]) for key, found in self._found.items() if found}


def pooled(own: ArrayLike, stride: Sequence[float]) -> Alignment:
    """What the offsets (N, axes) that single volumes gave say together: their median, and its standard error."""
    offset = np.asarray(own, dtype=float)
    middle = np.median(offset, axis=0)
    # 1.4826 makes the median absolute deviation a standard deviation; a median errs by 1.2533 times what a mean does.
    spread = 1.4826 * np.median(np.abs(offset - middle), axis=0)
    error = _rounded(1.2533 * spread / np.sqrt(len(offset))) if len(offset) > 1 else None
    return Alignment("measured", tuple(stride), _rounded(middle), error, len(offset))


def offsets(of: LayerMap, evidence: Tensor, start: Alignment) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each volume's own offset, and its uncertainty, for volumes whose map holds evidence that leads back to the input.

    Both (N, axes), voxels.  ``evidence`` (B, C, *spatial) is what :func:`followed_back` gives for the map; ``start``
    gives the stride, and the offset from which the search begins.
    """
    evidence = evidence.clamp(min=0).sum(1)
    found, doubts = [], []
    for cells, voxels in zip(of.values[:, 0].detach().clamp(min=0).cpu().double(), evidence, strict=True):
        # As wide as a quarter of a cell: single voxels of a gradient are noise.
        smooth = _smoothed(voxels.cpu().double(), [abs(step) / 4 for step in start.stride]).numpy()
        # A constant map has no place to compare.
        if float(cells.max() - cells.min()) > 1e-3 * float(cells.max()) and smooth.max() > 0:
            at = [centroid(smooth, share) for share in (0.25, 0.5, 0.75)]
            found.append(_fitted(cells, at[1], start, smooth.shape))
            doubts.append(np.ptp(at, axis=0) / 2)
    axes = evidence.ndim - 1
    return np.array(found).reshape(-1, axes), np.array(doubts).reshape(-1, axes)


def _seeds(of: LayerMap) -> Tensor:
    """The gradient of the map's positive values, squared and summed, by the activation; to its own scale.

    Scale says nothing of place, and half precision or a saturated score could lose it.
    """
    activation = of.activation.detach().requires_grad_(True)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            values = of.combine(activation, _scaled(of.gradient)).clamp(min=0)
            (seeds,) = torch.autograd.grad(_scaled(values).square().sum() / 2, activation)
    except (RuntimeError, TypeError) as error:
        raise AlignmentError(
            f"{of.method} at layer {of.layer!r} cannot be differentiated by the activation: {_line(error)}"
        ) from error
    return _scaled(seeds)


def _scaled(values: Tensor) -> Tensor:
    """``values`` over their largest magnitude."""
    top = values.detach().abs().amax()
    return values / top if float(top) > 0 else values


def _fitted(cells: Tensor, at: NDArray[np.float64], start: Alignment, size: tuple[int, ...]) -> NDArray[np.float64]:
    """The offset that puts the centroid of the placed map at ``at``."""
    offset = np.array(start.offset)
    for _ in range(3):  # to shift a map shifts its centroid as much, but at the input's edges, where it is cut off
        placed = replace(start, offset=tuple(offset)).place(cells[None, None], size)[0, 0]
        if not float(placed.max()) > 0:
            break  # so far off that all of it lies beyond the input
        offset = offset + at - centroid(placed)
    return offset


class _Reached(Exception):
    """The layers have run; nothing after them is needed."""


@contextmanager
def followed_back(model: nn.Module, volume: Tensor, maps: Sequence[LayerMap]) -> Iterator[Callable[[LayerMap], Tensor]]:
    """A function that follows each of ``maps``, in their order, back to the input; one forward pass serves them all.

    What it returns is the guided gradient of <seeds, activation of the layer> by the input, of the input's shape; the
    seeds are those of the map.  It raises :class:`AlignmentError` where the network before the layer, or the map by the
    layer, cannot be differentiated.
    """
    layers = {of.layer for of in maps}
    reached: dict[str, tuple[GradientEdge | None, torch.dtype]] = {}
    failure: Exception | None = None

    def see(layer: str, output: Tensor, trace: Trace) -> None:
        # The point in the graph, not the tensor: steps in place that follow a layer would move the tensor on.
        point = reader(layer, output, trace, volume)(output)
        reached[layer] = get_gradient_edge(point) if point.requires_grad else None, output.dtype
        if reached.keys() == layers:
            raise _Reached

    with undisturbed(model):
        leaf = plain(volume).requires_grad_(True)
        try:
            with Lean(), Calls(model, sorted(layers), see), GuidedRule():
                run(model, copied_on_write(leaf))
        except Exception as error:  # noqa: BLE001 - told of the layers that it keeps from running, if there are any
            failure = error

        def follow(of: LayerMap) -> Tensor:
            if of.layer not in reached:
                if isinstance(failure, torch.OutOfMemoryError):
                    raise failure
                raise _astray(of.layer, failure or "it does not run") from failure
            edge, dtype = reached[of.layer]
            if edge is None:
                raise _astray(of.layer, "no differentiable step leads from the input to it")
            seeds = _seeds(of).to(dtype)
            try:
                return torch.autograd.grad(edge, leaf, seeds, retain_graph=of is not maps[-1])[0].detach().float()
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, IndexError) as error:
                raise _astray(of.layer, error) from error

        yield follow


def _astray(layer: str, why: BaseException | str) -> AlignmentError:
    reason = why if isinstance(why, str) else _line(why)
    return AlignmentError(f"layer {layer!r} cannot be followed back to the input: {reason}")


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _centred(model: nn.Module, volume: Tensor, of: LayerMap) -> Alignment:
    """The traced stride where there is one, with the cells' middle on the input's middle: a start, and no claim."""
    customary = HalfPixel()(model, volume, of)
    found = traced(model, volume, of.layer)
    if found.lost:
        return customary
    spans = zip(volume.shape[2:], of.cells, found.stride, strict=True)
    return Alignment(customary.kind, found.stride, tuple((n - 1 - step * (m - 1)) / 2 for n, m, step in spans))


def _smoothed(values: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Gaussian smoothing along each axis; nothing lies beyond the edges."""
    for axis, sigma in enumerate(sigmas):
        reach = int(3 * sigma + 0.5)
        if reach:
            at = torch.arange(max(values.shape[axis], reach + 1)).to(values)
            kernel = torch.exp(-0.5 * (at / sigma) ** 2) * (at <= reach)
            apart = (at[:, None] - at).abs().long()[: values.shape[axis], : values.shape[axis]]
            # A product of matrices: a convolution in double precision would lay out a copy of the scan for each tap.
            across = kernel[apart] / (2 * kernel.sum() - kernel[0])
            values = (values.movedim(axis, -1) @ across).movedim(-1, axis)
    return values


def centroid(values: ArrayLike, share: float = 0.5) -> NDArray[np.float64]:
    """The centre, in array coordinates, of what reaches ``share`` of the maximum, which is above 0, by its values."""
    array = np.asarray(values)
    where = np.nonzero(array >= share * array.max())  # of a whole CT this is little; no copy of it is made
    return np.average(np.array(where), axis=1, weights=array[where].astype(float))


def _rounded(values: NDArray[np.float64]) -> tuple[float, ...]:
    """To a ten-thousandth of a voxel: records are for reading."""
    return tuple(np.round(values, 4).tolist())
