"""Which layers of a model could carry a map, and which one to take where none was named."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from volsal.attribution.alignment.following import Following, Trace, trace_of
from volsal.attribution.structure import Memory, bare
from volsal.attribution.tap import (
    LayerError,
    Tap,
    copied_on_write,
    forward,
    plain,
    reader,
    require_open,
    trace_key,
    traces,
    undisturbed,
)

_log = logging.getLogger("volsal")


@dataclass(frozen=True)
class Layer:
    """One layer's output in a forward pass.

    Attributes
    ----------
    name : dotted name, as ``named_modules`` has it; ``act#2`` for the second call of a layer that runs more than once
    kind : class of the module
    shape : (B, C, *cells) of its output
    stride : input voxels per cell along each spatial axis, by the ratio of the sizes
    bytes : size of its output
    calls : how often it runs in one forward pass
    on_every_path : whether everything the model says of the input passes through it
    layout : how the output holds its cells where it is not (B, C, *cells): ``(B, 1 + 4*3*5, 48)`` for 48 channels of
        4 x 3 x 5 tokens after a class token; empty otherwise
    is_output : whether it is what the model returns, which explains nothing
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    stride: tuple[float, ...]
    bytes: int
    calls: int
    on_every_path: bool
    layout: str = ""
    is_output: bool = False

    @property
    def extent(self) -> tuple[int, ...]:
        """Cells along each spatial axis."""
        return self.shape[2:]

    @property
    def suitable(self) -> bool:
        """Whether a map at this layer is complete, more than a single cell wide in every axis, and not the output."""
        return self.on_every_path and not self.is_output and min(self.extent) >= 2


def list_layers(model: nn.Module, volume: Tensor) -> list[Layer]:
    """The layers whose output has cells along the axes of ``volume`` (B, C, *spatial), in the order of finishing.

    Tokens count, and slices that are folded into the batch, where it can be traced what they are of the input.  A layer
    that runs several times is listed once for each.

    One forward pass.  The graph that it records keeps no tensors, so it needs little more memory than inference.
    """
    return [layer for layer, _ in _observe(model, volume)]


def default_layer(model: nn.Module, volume: Tensor) -> str:
    """The last layer that lies on every path to the output and is at least 2 cells wide in every axis.

    Where several names mean one and the same output (a block and its last member) the outermost is taken.  What the
    model returns is passed by, and so are tokens that it reads no more: a transformer's last, where a class token
    answers.  Returned tensors from which others are computed, such as hidden states, are no outputs in this.  The
    choice depends on the model and the input's shape only, and is remembered until a module is replaced.

    Raises
    ------
    LayerError
        Where no layer qualifies, naming those that come near.
    """
    remembered, shape = _CHOSEN.of(bare(model)), tuple(volume.shape[1:])
    if shape not in remembered:
        remembered[shape] = _chosen(model, volume)
        _log.info("no layer was named: taking %r, the last one on every path to the output", remembered[shape])
    return remembered[shape]


_CHOSEN: Memory[str] = Memory()


def _chosen(model: nn.Module, volume: Tensor) -> str:
    observed = _observe(model, volume)
    if not any(layer.on_every_path for layer, _ in observed):
        raise LayerError(
            "no layer lies on every path from the input to the output; either several paths run side by side all "
            "the way (name a layer with layer=), or the output does not depend on the input through "
            "differentiable steps (is there a detach, an argmax or a no_grad in the model?)"
        )
    names: dict[Any, str] = {}  # by the place in the graph, in order
    for layer, node in observed:
        if layer.suitable:
            names[node] = min([names.get(node, layer.name), layer.name], key=lambda name: name.count("."))
    layouts = {layer.name: layer.layout for layer, _ in observed}
    candidates = list(names.values())
    if candidates and "+" in layouts[candidates[-1]]:
        candidates = _read_on(model, volume, candidates)
    if not candidates:
        widest = ", ".join(f"{layer.name} {layer.extent}" for layer, _ in observed[-5:])
        raise LayerError(
            "no layer lies on every path to the output with at least 2 cells in every axis for an input of shape "
            f"{tuple(volume.shape)}; name one with layer= (the last ones are {widest or 'without spatial axes'})"
        )
    return candidates[-1]


def _read_on(model: nn.Module, volume: Tensor, layers: Sequence[str]) -> list[str]:
    """Those of ``layers`` whose cells, and not only the class token beside them, have an effect on the output."""
    with undisturbed(model), Tap(model, *layers) as tap:
        outputs = _answers(forward(model, plain(volume)))
        # Weights that differ, lest effects cancel: probabilities have a constant sum.
        seeds = [torch.linspace(1, 2, t.numel()).to(t).reshape(t.shape) for t in outputs]
        found = torch.autograd.grad(outputs, tap.activations, seeds, allow_unused=True)
    return [layer for layer, by in zip(layers, found, strict=True) if by is not None and bool(by.any())]


@dataclass(frozen=True)
class _Sight:
    """What was seen of one call of a layer."""

    name: str
    call: int
    module: nn.Module
    trace: Trace
    shape: tuple[int, ...]
    layout: str
    bytes: int
    place: Any  # the autograd node, and the number of its output, that made it


def _observe(model: nn.Module, volume: Tensor) -> list[tuple[Layer, Any]]:
    """Each layer with the autograd node, and the number of that node's output, that made its output."""
    model = bare(model)
    require_open(model, "its layers")
    sights: list[_Sight] = []
    calls: Counter[str] = Counter()

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            calls[name] += 1
            if isinstance(output, Tensor) and output.grad_fn is not None and output.numel():
                trace = trace_of(following.fates.get(output), tuple(output.shape), len(volume))
                try:
                    shape = tuple(reader(name, output, trace, volume)(output).shape)
                except LayerError:
                    return  # it has no cells
                reading = trace.reading
                layout = str(reading) if reading and not reading.regular else ""
                size, place = output.numel() * output.element_size(), (output.grad_fn, output.output_nr)
                sights.append(_Sight(name, calls[name], module, trace, shape, layout, size, place))

        return hook

    hooks = []
    with undisturbed(model), saved_tensors_hooks(lambda tensor: None, _never):
        entering = copied_on_write(plain(volume).requires_grad_(True))
        following = Following(entering)
        try:
            for name, module in model.named_modules():
                if name:
                    hooks.append(module.register_forward_hook(watch(name)))
            with following:
                output = forward(model, entering)
        finally:
            for handle in hooks:
                handle.remove()
        ends = [(t.grad_fn, t.output_nr) for t in _answers(output)]
        dominating = _on_every_path(ends)
    known = traces.of(model)
    for sight in sights:
        known[trace_key(_named(sight, calls), volume)] = sight.trace
    return [(_layer(sight, volume, calls, dominating, ends), sight.place) for sight in sights]


def _named(sight: _Sight, calls: Counter[str]) -> str:
    return sight.name if calls[sight.name] == 1 else f"{sight.name}#{sight.call}"


def _layer(sight: _Sight, volume: Tensor, calls: Counter[str], dominating: set[Any], ends: Sequence[Any]) -> Layer:
    return Layer(
        _named(sight, calls),
        type(sight.module).__name__,
        sight.shape,
        tuple(whole / cells for whole, cells in zip(volume.shape[2:], sight.shape[2:], strict=True)),
        sight.bytes,
        calls[sight.name],
        sight.place in dominating,
        sight.layout,
        sight.place in ends,
    )


def _answers(output: Any) -> list[Tensor]:
    """Those of the returned tensors from which no other is computed; hidden states are none."""
    tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]
    earlier = {place for node in _topological([t.grad_fn for t in tensors]) for place in node.next_functions}
    return [t for t in tensors if (t.grad_fn, t.output_nr) not in earlier]


def _never(packed: Any) -> Tensor:
    raise AssertionError("the graph of a survey is never run backwards")


def _on_every_path(ends: list[tuple[Any, int]]) -> set[tuple[Any, int]]:
    """The (node, output number) through which every path from an output back to the input runs.

    A place lies on every path exactly where (paths above it) x (paths below it) is the number of all paths.  Python's
    integers hold the counts of a DenseNet, which exceed any machine word.  A node with several outputs, such as a
    split, is several places.
    """
    order = _topological([node for node, _ in ends])
    below: dict[Any, int] = {}  # paths from a node down to the input, of which AccumulateGrad is the only end
    for node in reversed(order):
        following = [n for n, _ in node.next_functions if n is not None]
        below[node] = sum(below[n] for n in following) if following else int(node.name().endswith("AccumulateGrad"))
    above: dict[Any, int] = dict.fromkeys(order, 0)
    places: Counter[tuple[Any, int]] = Counter()
    for end in ends:
        above[end[0]] += 1
        places[end] += 1
    for node in order:
        for following, number in node.next_functions:
            if following is not None:
                above[following] += above[node]
                places[following, number] += above[node]
    total = sum(below[node] for node, _ in ends)
    return {place for place, paths in places.items() if total and paths * below[place[0]] == total}


def _topological(ends: list[Any]) -> list[Any]:
    """The graph's nodes, each before those it depends on; without recursion, since networks are deep."""
    order: list[Any] = []
    state: dict[Any, bool] = {}  # False: entered, True: left
    waiting = list(ends)
    while waiting:
        node = waiting[-1]
        if node in state:
            waiting.pop()
            if not state[node]:
                state[node] = True
                order.append(node)
            continue
        state[node] = False
        waiting += [n for n, _ in node.next_functions if n is not None and n not in state]
    return order[::-1]
