"""A forward pass followed operator by operator, to see where each tensor's elements lie on the model's input.

It is watched where torch dispatches operators, below modules, functions and methods, so that the spelling does not
matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from volsal.attribution.alignment.operators import Call, Rule, copying, cut, outcome, rule_of, slicing
from volsal.attribution.alignment.places import Fate, Lost, Place, UntraceableError, agree, spatial, whole
from volsal.attribution.tokens import Reading


@dataclass(frozen=True)
class Trace:
    """Where a layer's cells lie; tuples run over the input's spatial axes and are empty where the trace is lost.

    Attributes
    ----------
    cells : number of cells
    stride : voxels from a cell to the next; negative where the layer sees the input flipped
    offset : voxel coordinate of the centre of cell 0
    spread : voxels by which branches that were joined lie off their mean, which offset and stride describe
    axes : for each dimension of the output, the spatial axes that run along it: ((), (), (0,), (1,), (2,)) for
        (B, C, D, H, W), ((), (0, 1, 2), ()) for tokens (B, D * H * W, C)
    lost : the operation that could not be followed, or the reason why the cells are no grid; None where all is known
    notes : what was left out of account
    reading : how the output is read as (B, C, *cells); None where the trace is lost
    no_grid : whether the trace is lost because the cells, though followed, are no grid
    """

    cells: tuple[int, ...] = ()
    stride: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()
    axes: tuple[tuple[int, ...], ...] = ()
    lost: str | None = None
    notes: tuple[str, ...] = ()
    reading: Reading | None = field(default=None, compare=False, repr=False)
    no_grid: bool = False

    @property
    def regular(self) -> bool:
        """Whether the output is (B, C, *cells) with its axes in the input's order."""
        return not self.lost and self.axes == ((), (), *((axis,) for axis in range(len(self.cells))))


def trace_of(fate: Fate, shape: tuple[int, ...], batch: int) -> Trace:
    """The trace of a tensor of that fate and shape, for so many volumes."""
    if fate is None:
        return Trace(lost="the layer's output does not descend from the input's voxels")
    if isinstance(fate, Lost):
        return Trace(lost=fate.reason)
    try:
        return _on_grid(fate, shape, batch)
    except UntraceableError as error:
        return Trace(lost=str(error), no_grid=True)


def _on_grid(place: Place, shape: tuple[int, ...], batch: int) -> Trace:
    for dim, runs in enumerate(place.dims):
        if spatial(runs) and runs[-1].axis is None and not runs[-1].spatial:
            try:
                place, _ = place.sole(dim)
            except UntraceableError as error:
                raise UntraceableError(f"cells and channels share dimension {dim} of {shape} ({error})") from error
        if spatial(place.dims[dim]) and any(run.axis is None for run in place.dims[dim] if not run.spatial):
            raise UntraceableError(f"cells and channels share dimension {dim} of {shape}")
    inner = [tuple(part for run in runs for part in run.inner) for runs in place.dims]
    grid = sorted((run for runs in inner for run in runs if run.spatial), key=lambda run: run.axis or 0)
    if any(run.rolled for run in grid):
        raise UntraceableError("its cells are shifted cyclically, as for the shifted windows of a Swin transformer")
    for axis in range(len(place.offset)):
        if (number := sum(run.axis == axis for run in grid)) != 1:
            raise UntraceableError(f"spatial axis {axis} runs along {number or 'none'} of the dimensions {shape}")
    return Trace(
        tuple(run.count for run in grid),
        tuple(run.step for run in grid),
        place.offset,
        place.spread,
        tuple(tuple(run.axis for run in runs if run.spatial) for runs in inner),  # type: ignore[misc]
        notes=place.notes,
        reading=Reading.of(place, batch),
    )


class Following(TorchDispatchMode):
    """Follows places through every operator that runs.

    Attributes
    ----------
    fates : the place, or the loss, of each living tensor that descends from the input
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """To be shielded from the compiler would load it, which takes seconds, and nothing is compiled here."""
        return False

    def __init__(self, volume: Tensor) -> None:
        super().__init__()
        self.fates = WeakTensorKeyDictionary()
        self.fates[volume] = whole(volume)
        self._parts = WeakTensorKeyDictionary()  # slice -> (of what, along which dimension, from where)
        self._canvases = WeakTensorKeyDictionary()  # those that have their place from a part

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [(t, self.fates.get(t)) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        size = tuple(inputs[0][0].shape) if inputs else ()
        result = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        name, rule = rule_of(func)
        if outputs and inputs and (rule is slicing or any(fate for _, fate in inputs)):
            schema = func._schema.arguments
            given = {a.name: a.default_value for a in schema if a.has_default_value()}
            given |= dict(zip([a.name for a in schema], args, strict=False)) | kwargs
            call = Call(name, given, inputs, outputs, size)
            self._follow(call, rule, str(func))
        return result

    def _follow(self, call: Call, rule: Rule | None, operator: str) -> None:
        if any(fate for _, fate in call.inputs):
            fates = outcome(call, rule, operator)
            for output, fate in zip(call.outputs, fates, strict=True):
                self._set(output, fate)
            for tensor, before in call.inputs:
                if any(tensor is output for output in call.outputs):
                    self._overwritten(tensor, before, operator)
        if rule is slicing and call.given["step"] == 1:
            self._parts[call.outputs[0]] = (call.inputs[0][0], *cut(call))
        if rule is copying:
            self._write_back(call.outputs[0])

    def _set(self, tensor: Tensor, fate: Fate) -> None:
        if fate is None:
            self.fates.pop(tensor, None)
        else:
            self.fates[tensor] = fate

    def _overwritten(self, part: Tensor, before: Fate, operator: str) -> None:
        """What shares memory with ``part`` is lost where the part was written to and no longer lies where it did.

        A single row (``x[:, :, 0] = x[:, :, 1]``) goes unnoticed, and so do the parts of a canvas (see below).
        """
        after = self.fates.get(part)
        if after is None or agree(part, before, after):
            return
        memory = part.untyped_storage().data_ptr()
        known = [t for t, fate in self.fates.items() if t is not part and isinstance(fate, Place)]
        sharing = [t for t in known if t.untyped_storage().data_ptr() == memory]
        if any(t in self._canvases for t in sharing):
            return
        reason = f"{operator} writes in place into a part of a tensor what lies elsewhere than that part"
        for tensor in sharing:
            self.fates[tensor] = after if isinstance(after, Lost) else Lost(reason)

    def _write_back(self, part: Tensor) -> None:
        """An empty canvas has the place of the first thing that is copied into a part of it, as circular padding does.

        What is copied into another part later, such as the far end of the volume, has no say.
        """
        while part in self._parts and isinstance(fate := self.fates.get(part), (Place, Lost)):
            canvas, dim, start = self._parts[part]
            if canvas in self.fates:
                return
            try:
                self.fates[canvas] = fate.moved(dim, 1, -start, canvas.shape[dim]) if isinstance(fate, Place) else fate
            except UntraceableError as error:
                self.fates[canvas] = Lost(f"copying into a slice {error}")
            self._canvases[canvas] = True
            part = canvas
