"""Explain a model that is applied window by window: one question to the whole volume, one scale, memory of a window.

Three ways lead there, and each gives the map of the whole function, never a mixture of the windows' own maps:

*   Methods that follow the gradient to the input (:data:`SUMS`) explain each window for its linear share of the score,
    and the windows' maps add up.  For the input gradient this is the chain rule, exact.
*   Class activation maps see the layer's cells in all windows as one layer; see :class:`_Cams`.
*   All others run on :class:`Windowed`, the whole as a module.  They need the volume in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from volsal.attribution.alignment.alignment import Alignment, LayerMap
from volsal.attribution.cams.cam import GradCAM, GradientCAM, HiResCAM, LayerCAM, layer_map, wide
from volsal.attribution.gradients.deep_lift import DeepLIFT
from volsal.attribution.gradients.gradient import InputGradient
from volsal.attribution.gradients.guided import Deconvnet, GuidedBackprop
from volsal.attribution.layers import default_layer
from volsal.attribution.method import PLAIN, Attribution, Context, Method, attribute, bases, composed, spatial
from volsal.attribution.tap import Tap, forward, gradients_by, undisturbed
from volsal.attribution.targets.target import Target, target_id
from volsal.attribution.windows.stitching import Array, Store, divide, share, stitched, total_importance
from volsal.attribution.windows.windows import Sliceable, Start, Volume, Windows, WindowsError, volumes_of

#: Methods whose map of a sum of scores, one of each window, is the sum of their maps.
SUMS: tuple[type[Method], ...] = (InputGradient, GuidedBackprop, Deconvnet)
#: Class activation maps whose every cell counts by its own gradient, of which each window has its share.
BY_CELL: tuple[type[GradientCAM], ...] = (HiResCAM, LayerCAM)
#: Class activation maps that weigh channels by the mean of their gradient over all cells.
BY_CHANNEL: tuple[type[GradientCAM], ...] = (GradCAM,)


def explain_windows(
    model: nn.Module,
    volume: Sliceable,
    methods: Method | Sequence[Method],
    targets: Target | Sequence[Target],
    windows: Windows,
    context: Context = PLAIN,
    folder: str | Path | None = None,
) -> list[Attribution]:
    """The answer of each method for a model that is applied to ``volume`` by ``windows``.

    Parameters
    ----------
    model : takes (n, C, *size) and returns logits (n, K, *size), which are blended by importance, or (n, K), of which
        the mean over all windows is taken
    volume : (*spatial), (C, *spatial) or (B, C, *spatial): a tensor, or anything that gives an array where it is
        sliced, such as a NumPy memmap or nibabel's ``dataobj``; it is read window by window
    methods, targets : one or several; the targets judge the stitched output, (1, K, *spatial) or (1, K)
    windows : size, overlap and importance of the windows
    context : ``align`` places a layer's cells in a window, ``progress`` is told of windows
    folder : where the maps and the stitched output go as ``.npy`` files, from which the tensors given back are mapped.
        Memory is then that of a window, however large the volume, for targets with a method ``within`` (see
        :meth:`volsal.attribution.windows.stitching.Dense.ask`); others look at the whole output.  None: all in memory

    All maps lie on the volume's voxels, (B, C or 1, *spatial): the cells of a class activation map are placed in each
    window by one alignment, which is found on the window with the most evidence and stands in the answer's ``facts``.

    Raises
    ------
    WindowsError
        Where windows do not fit the volume, or a method cannot be had by windows.
    LayerError, TargetError, ModelError
        As for :meth:`volsal.GradCAM.attribute`.
    ValueError
        Where there is no target.
    """
    methods = [methods] if isinstance(methods, Method) else list(methods)
    asked = [targets] if callable(targets) else list(targets)
    if not asked:
        raise ValueError("no target given; pass at least one, as in volsal.Segment(1)")
    volumes = volumes_of(volume, windows, model)
    _require_possible(methods, isinstance(volume, Tensor), context)
    if folder is None:
        each = [_explain(model, one, methods, asked, context, Store()) for one in volumes]
        return [_batched(answers) for answers in zip(*each, strict=True)]
    if len(volumes) > 1:
        raise WindowsError(f"one volume at a time can be explained into a folder; this batch holds {len(volumes)}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix="windows-") as scratch:
        return _explain(model, volumes[0], methods, asked, context, Store(Path(scratch)))


class Windowed(nn.Module):
    """The model applied by windows, as a model of the whole volume: (B, C, *spatial) -> (B, K, *spatial) or (B, K).

    Differentiable by the volume.  The way back runs each window's forward pass again, so that no more than a batch of
    windows is ever recorded.
    """

    def __init__(self, model: nn.Module, windows: Windows) -> None:
        super().__init__()
        self.model, self.windows = model, windows

    def forward(self, volume: Tensor) -> Tensor:
        """As ``sliding_window_inference``; errors as for :func:`volsal.attribution.windows.stitching.stitched`."""
        return _Whole.apply(volume, self.model, self.windows)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, volume: Tensor, model: nn.Module, windows: Windows) -> Tensor:
        ctx.save_for_backward(volume)
        ctx.model, ctx.windows = model, windows
        outputs = [stitched(model, one, Store(), _ignore).output() for one in volumes_of(volume, windows, model)]
        return torch.cat(outputs).to(volume)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        (volume,) = ctx.saved_tensors
        found = []
        for one, by_output in zip(volumes_of(volume, ctx.windows, ctx.model), slope.cpu(), strict=True):
            weight = total_importance(one.layout, Store(), one.wide)
            ask = _Ask("", slope.new_zeros(1), partial(share, by_output.to(one.wide), one.layout, weight))
            found.append(_summed(ctx.model, one, [ask], [InputGradient()], PLAIN, Store(), _ignore)[0].maps[0])
        return torch.cat(found).to(volume), None, None


@dataclass(frozen=True, eq=False)
class _Ask:
    """A target's id, its score (1,), and each window's upstream gradient, of the shape of the window's output."""

    name: str
    score: Tensor
    upstream: Callable[[Start], Tensor]


def _ignore(done: int) -> None:
    """Nobody is told."""


def _require_possible(methods: Sequence[Method], in_memory: bool, context: Context) -> None:
    for method in methods:
        for part in bases(method):
            _require_defined(part, context)
            if type(part) not in (*SUMS, *BY_CELL, *BY_CHANNEL) and not in_memory:
                raise WindowsError(f"{method.id} needs the whole volume in memory; pass it as a tensor")
        if method.ingredients() and not in_memory:
            raise WindowsError(f"{method.id} puts whole maps together in memory; pass the volume as a tensor")


def _require_defined(method: Method, context: Context) -> None:
    """What looks inside the model sees it once in each window; that must mean something over all windows together."""
    if isinstance(method, DeepLIFT):
        raise WindowsError(
            f"{method.id} cannot be had of a model applied by windows: its rules would have to hold across them; use "
            "integrated-gradients"
        )
    if not hasattr(method, "layer"):
        return
    if type(method) not in (*BY_CELL, *BY_CHANNEL):
        known = ", ".join(kind.id for kind in (*BY_CHANNEL, *BY_CELL))
        raise WindowsError(
            f"{method.id} cannot be had of a model applied by windows: how it weighs a layer's cells in different "
            f"windows against each other is not defined; use one of {known}"
        )
    if getattr(method, "features", None):
        raise WindowsError(f"{method.id} with features cannot be had of a model applied by windows; leave features out")
    if context.align.mirrors:
        raise WindowsError(
            f"{context.align.id} alignment explains the mirrored volume too, which windows do not cover alike; use "
            "half-pixel, nominal or measured"
        )


def _explain(
    model: nn.Module,
    volume: Volume,
    methods: Sequence[Method],
    targets: Sequence[Target],
    context: Context,
    store: Store,
) -> list[Attribution]:
    """All methods' answers for one volume."""
    parts = list(dict.fromkeys(base for method in methods for base in bases(method)))
    sums = [part for part in parts if type(part) in SUMS]
    cams = [part for part in parts if isinstance(part, GradientCAM)]
    others = [part for part in parts if part not in sums and part not in cams]
    total = len(volume.layout.starts) * (1 + bool(sums) + 2 * bool(cams))
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        context.progress("windows", done, total)

    answers: dict[Method, Attribution] = {}
    with undisturbed(model):
        whole = stitched(model, volume, store, tell)
        output = whole.output()
        asks = [_Ask(target_id(target), *whole.ask(target)) for target in targets]
        if sums:
            answers |= zip(sums, _summed(model, volume, asks, sums, context, store, tell), strict=True)
        if cams:
            together = _Cams(model, volume, whole.weight, output, targets, asks, cams, context)
            answers |= zip(cams, together.answers(store, tell), strict=True)
    scores = [ask.score for ask in asks]
    answers = {part: replace(answer, scores=scores, output=output) for part, answer in answers.items()}
    if others:
        module = Windowed(model, volume.layout.windows)
        answers |= zip(others, attribute(module, volume.tensor(), others, targets, context), strict=True)
    if not any(method.ingredients() for method in methods):
        return [answers[method] for method in methods]
    return [composed(method, volume.tensor(), answers, context) for method in methods]


def _batched(answers: Sequence[Attribution]) -> Attribution:
    """One answer of those of several volumes."""
    first, *rest = answers
    if not rest:
        return first
    several = range(len(first.maps))
    return replace(
        first,
        maps=[torch.cat([answer.maps[t] for answer in answers]) for t in several],
        scores=[torch.cat([answer.scores[t] for answer in answers]) for t in several],
        output=torch.cat([answer.output for answer in answers]),
        parts=[torch.cat([answer.parts[t] for answer in answers]) for t in range(len(first.parts))],
    )


def _linear(upstream: Tensor) -> Target:
    """The windows' linear shares of the score: outputs (n, K, ...) -> (n,)."""
    return lambda output: (upstream * output).flatten(1).sum(1)


def _upstreams(asks: Sequence[_Ask], starts: Sequence[Start], device: torch.device) -> list[Tensor]:
    """Each target's upstream gradients for a batch of windows, (n, K, *size) or (n, K)."""
    return [torch.stack([ask.upstream(start) for start in starts]).to(device) for ask in asks]


def _any(upstreams: Sequence[Tensor]) -> bool:
    return any(bool(upstream.any()) for upstream in upstreams)


def _summed(
    model: nn.Module,
    volume: Volume,
    asks: Sequence[_Ask],
    methods: Sequence[Method],
    context: Context,
    store: Store,
    tell: Callable[[int], None],
) -> list[Attribution]:
    """Each window explained for its share of the scores, and the windows' maps added up."""
    layout = volume.layout
    maps = _zeros(store, methods, asks, volume.channels, volume)
    coverage: list[Mapping[str, int]] = [{} for _ in methods]
    for starts, windows in volume.batches():
        upstreams = _upstreams(asks, starts, volume.device)
        if _any(upstreams):  # the map of 0 is 0
            answers = attribute(model, windows, methods, list(map(_linear, upstreams)), context)
            for answer, arrays in zip(answers, maps, strict=True):
                for values, array in zip(answer.maps, arrays, strict=True):
                    for start, one in zip(starts, values, strict=True):
                        array.add(layout.covered(start), layout.unpadded(one, start))
            coverage = [answer.coverage for answer in answers]
        tell(len(starts))
    return [
        Attribution([array.kept().tensor() for array in arrays], [], None, coverage=covered)
        for arrays, covered in zip(maps, coverage, strict=True)
    ]


def _zeros(
    store: Store, methods: Sequence[Method], asks: Sequence[_Ask], channels: int, volume: Volume
) -> list[list[Array]]:
    """A map for each method and target."""
    shape, dtype = volume.layout.shape, volume.wide
    return [[store.zeros(f"{method.id}_{ask.name}", channels, shape, dtype) for ask in asks] for method in methods]


@dataclass(frozen=True, eq=False)
class _Cams:
    r"""Class activation maps of a layer whose cells are spread over all windows.

    With A and G the layer's activation in a window and the gradient of the *volume's* score by it, a map like HiResCAM
    is taken in each window.  G there is the window's share, so the maps of overlapping windows add up.  Grad-CAM weighs
    channels by the mean gradient over all cells of the volume:

    .. math:: \alpha_c = \tfrac{1}{V} \sum_w \sum_v G_{wcv}, \qquad
              L = \sum_w I \cdot \max\bigl(0, \sum_c \alpha_c A_{wc}\bigr) \Big/ \sum_w I

    where V counts the cells that tile the volume, overlap not counted twice.  With weights of its own each window would
    be drawn on a scale of its own, and the map would step at the windows' rims.  With common weights a window sees what
    the whole sees: a network whose cells do not look beyond their window has the same map by windows and at once,
    whatever the overlap.

    Two passes over the windows: one gathers the weights, and where the evidence is; one makes the maps.
    """

    model: nn.Module
    volume: Volume
    weight: Array
    output: Tensor
    targets: Sequence[Target]
    asks: Sequence[_Ask]
    methods: Sequence[GradientCAM]
    context: Context

    def answers(self, store: Store, tell: Callable[[int], None]) -> list[Attribution]:
        """One for each method; maps (1, 1, *spatial)."""
        first = self.volume.window(self.volume.layout.starts[0])[None]
        layers = [method.layer or default_layer(self.model, first) for method in self.methods]
        evidence = self._survey(layers, tell)
        placed = [
            [self._alignment(method, layer, number, by[layer]) for number, by in enumerate(evidence)]
            for method, layer in zip(self.methods, layers, strict=True)
        ]
        maps = self._maps(layers, evidence, placed, store, tell)
        return [
            Attribution(
                [array.kept().tensor() for array in arrays],
                [],
                None,
                layer,
                [_by_voxel(alignment) for alignment in alignments],
                facts=[{"cells_in_windows": alignment.describe()} for alignment in alignments],
            )
            for layer, arrays, alignments in zip(layers, maps, placed, strict=True)
        ]

    def _survey(self, layers: Sequence[str], tell: Callable[[int], None]) -> list[dict[str, _Evidence]]:
        """For each target and layer what all windows together say."""
        found = [{layer: _Evidence() for layer in layers} for _ in self.asks]
        for starts, windows in self.volume.batches():
            seen = self._seen(layers, windows, _upstreams(self.asks, starts, windows.device))
            for by_layer, at in zip(found, seen, strict=True):
                for layer, evidence in by_layer.items():
                    evidence.add(starts, *at[layer])
            tell(len(starts))
        return found

    def _maps(
        self,
        layers: Sequence[str],
        evidence: Sequence[Mapping[str, _Evidence]],
        placed: Sequence[Sequence[Alignment]],
        store: Store,
        tell: Callable[[int], None],
    ) -> list[list[Array]]:
        layout = self.volume.layout
        importance = layout.importance.to(self.volume.device)
        maps = _zeros(store, self.methods, self.asks, 1, self.volume)
        by_cell = any(type(method) in BY_CELL for method in self.methods)
        for starts, windows in self.volume.batches():
            upstreams = _upstreams(self.asks, starts, windows.device) if by_cell else None
            seen = self._seen(layers, windows, upstreams)
            for method, layer, arrays, alignments in zip(self.methods, layers, maps, placed, strict=True):
                for number, (array, alignment) in enumerate(zip(arrays, alignments, strict=True)):
                    values = self._map(method, layer, number, seen[number][layer], evidence[number][layer]).values
                    fine = alignment.place(values, layout.size)
                    if type(method) in BY_CHANNEL:
                        fine = fine * importance
                    for start, one in zip(starts, fine, strict=True):
                        array.add(layout.covered(start), one[:, *layout.valid(start)])
            tell(len(starts))
        for method, arrays in zip(self.methods, maps, strict=True):
            for array in arrays if type(method) in BY_CHANNEL else ():
                divide(array, self.weight, layout)
        return maps

    def _seen(
        self, layers: Sequence[str], windows: Tensor, upstreams: Sequence[Tensor] | None
    ) -> list[dict[str, tuple[Tensor, Tensor]]]:
        """For each target every layer's activation in some windows, and its gradient; 0 where none is asked for."""
        points = list(dict.fromkeys(layers))
        owed = upstreams is not None and _any(upstreams)
        with torch.set_grad_enabled(owed), Tap(self.model, *points) as tap:
            output = forward(self.model, windows)
            at = [wide(activation.detach()) for activation in tap.activations]
            by_target = [[activation.new_zeros(()).expand_as(activation) for activation in at]] * len(self.asks)
            if owed:
                scores = [_linear(upstream)(output) for upstream in upstreams or ()]
                found = gradients_by(scores, tap.activations, [f"layer {layer!r}" for layer in points])
                by_target = [list(map(wide, by)) for by in found]
        return [dict(zip(points, zip(at, by, strict=True), strict=True)) for by in by_target]

    def _map(
        self, method: GradientCAM, layer: str, number: int, seen: tuple[Tensor, Tensor], evidence: _Evidence
    ) -> LayerMap:
        """The map of some windows, on the layer's cells."""
        activation, gradient = seen
        if type(method) in BY_CHANNEL:
            layout = self.volume.layout
            sizes = zip(activation.shape[2:], layout.size, layout.shape, strict=True)
            cells = math.prod(count * max(1.0, voxels / size) for count, size, voxels in sizes)
            weights = evidence.total / cells
        else:
            weights = method.weights(activation, gradient)
        return layer_map(method, layer, self.targets[number], self.output, activation, weights)

    def _alignment(self, method: GradientCAM, layer: str, number: int, evidence: _Evidence) -> Alignment:
        """Where the layer's cells lie in a window, found on the one with the most evidence."""
        window = self.volume.window(evidence.start)[None]
        seen = self._seen([layer], window, _upstreams(self.asks, [evidence.start], window.device))
        return self.context.align(self.model, window, self._map(method, layer, number, seen[number][layer], evidence))


class _Evidence:
    """What the windows say of one target at one layer.

    Attributes
    ----------
    total : the gradient summed over all cells of all windows, (1, C, 1, ...)
    start : of the window with the most positive gradient times activation
    """

    def __init__(self) -> None:
        self.total: Tensor = torch.zeros(())
        self.start: Start = ()
        self._most = -1.0

    def add(self, starts: Sequence[Start], activation: Tensor, gradient: Tensor) -> None:
        """Some windows' cells, (n, C, *cells)."""
        self.total = self.total.to(gradient.device) + gradient.sum((0, *spatial(gradient)), keepdim=True)
        evidence = (gradient * activation).sum(1).relu().flatten(1).sum(1)
        if float(evidence.max()) > self._most:
            self._most, self.start = float(evidence.max()), starts[int(evidence.argmax())]


def _by_voxel(alignment: Alignment) -> Alignment:
    """The same rule, for a map that it has put on the input's voxels."""
    axes = len(alignment.stride)
    return replace(alignment, stride=(1.0,) * axes, offset=(0.0,) * axes, uncertainty=None)
