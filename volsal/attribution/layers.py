"""Which layers of a model could carry a map, and which one to take where none was named."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from volsal.attribution.tap import LayerError, copied_on_write, forward, plain, undisturbed

_log = logging.getLogger("volsal")


@dataclass(frozen=True)
class Layer:
    """One layer's output in a forward pass.

    Attributes
    ----------
    name : dotted name, as ``named_modules`` has it
    kind : class of the module
    shape : (B, C, *cells) of its output
    stride : input voxels per cell along each spatial axis, by the ratio of the sizes
    bytes : size of its output
    calls : how often it runs in one forward pass; a map needs a layer that runs once
    on_every_path : whether everything the model says of the input passes through it
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    stride: tuple[float, ...]
    bytes: int
    calls: int
    on_every_path: bool

    @property
    def extent(self) -> tuple[int, ...]:
        """Cells along each spatial axis."""
        return self.shape[2:]

    @property
    def suitable(self) -> bool:
        """Whether a map at this layer is unambiguous, complete, and more than a single cell wide in every axis."""
        return self.calls == 1 and self.on_every_path and min(self.extent) >= 2


def list_layers(model: nn.Module, volume: Tensor) -> list[Layer]:
    """The layers whose output has the axes of ``volume`` (B, C, *spatial), in the order in which they finish.

    One forward pass.  The graph that it records keeps no tensors, so it needs little more memory than inference.
    """
    return [layer for layer, _ in _observe(model, volume)]


def default_layer(model: nn.Module, volume: Tensor) -> str:
    """The last layer that lies on every path to the output and is at least 2 cells wide in every axis.

    Where several names mean one and the same output (a block and its last member) the outermost is taken.  The choice
    depends on the model and the input's shape only, and is remembered.

    Raises
    ------
    LayerError
        Where no layer qualifies, naming those that come near.
    """
    remembered = _CHOSEN.setdefault(model, {})
    shape = tuple(volume.shape[1:])
    if shape not in remembered:
        observed = _observe(model, volume)
        suitable = [(layer, node) for layer, node in observed if layer.suitable]
        if not any(layer.on_every_path for layer, _ in observed):
            raise LayerError(
                "no layer lies on every path from the input to the output; either several paths run side by side all "
                "the way (name a layer with layer=), or the output does not depend on the input through "
                "differentiable steps (is there a detach, an argmax or a no_grad in the model?)"
            )
        if not suitable:
            widest = ", ".join(f"{layer.name} {layer.extent}" for layer, _ in observed[-5:])
            raise LayerError(
                "no layer lies on every path to the output with at least 2 cells in every axis for an input of shape "
                f"{tuple(volume.shape)}; name one with layer= (the last ones are {widest or 'without spatial axes'})"
            )
        last = suitable[-1][1]
        names = [layer.name for layer, node in suitable if node == last]
        remembered[shape] = min(names, key=lambda name: name.count("."))
        _log.info("no layer was named: taking %r, the last one on every path to the output", remembered[shape])
    return remembered[shape]


_CHOSEN: WeakKeyDictionary[nn.Module, dict[tuple[int, ...], str]] = WeakKeyDictionary()


def _observe(model: nn.Module, volume: Tensor) -> list[tuple[Layer, Any]]:
    """Each layer with the autograd node, and the number of that node's output, that made its output."""
    seen: dict[str, tuple[nn.Module, tuple[int, ...], int, Any]] = {}
    calls: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(output, Tensor) and output.ndim == volume.ndim and output.grad_fn is not None:
                seen.pop(name, None)  # a later call goes to the end of the order
                size = output.numel() * output.element_size()
                seen[name] = (module, tuple(output.shape), size, (output.grad_fn, output.output_nr))

        return hook

    hooks = []
    with undisturbed(model), saved_tensors_hooks(lambda tensor: None, _never):
        leaf = plain(volume).requires_grad_(True)
        try:
            for name, module in model.named_modules():
                if name:
                    hooks.append(module.register_forward_hook(watch(name)))
            output = forward(model, copied_on_write(leaf))
        finally:
            for handle in hooks:
                handle.remove()
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]
        ends = [(t.grad_fn, t.output_nr) for t in tensors]
        dominating = _on_every_path(ends)
    return [
        (
            Layer(
                name,
                type(module).__name__,
                shape,
                tuple(whole / cells for whole, cells in zip(volume.shape[2:], shape[2:], strict=True)),
                size,
                calls[name],
                node in dominating,
            ),
            node,
        )
        for name, (module, shape, size, node) in seen.items()
        if math.prod(shape)
    ]


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
