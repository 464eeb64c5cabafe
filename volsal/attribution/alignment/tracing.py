r"""Where the cells of a layer lie on the voxels of the model's input.

Along each spatial axis of the input, the centre of cell i lies at voxel coordinate

.. math:: x(i) = \mathrm{offset} + \mathrm{stride} \cdot i

The output j of a convolution of kernel k, stride s, padding p and dilation d reads inputs around s j + (k-1) d/2 - p;
every other operation has such a line too.  One real forward pass composes them.

The centres are nominal: those of the architecture, as if each kernel weighed its two sides alike.

:mod:`~volsal.attribution.alignment.places` says how the place of one tensor is written down,
:mod:`~volsal.attribution.alignment.operators` what each operator does to it (an operator is added there), and
:mod:`~volsal.attribution.alignment.following` how a pass is watched.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from volsal.attribution.alignment.following import Trace
from volsal.attribution.structure import bare
from volsal.attribution.tap import Calls, forward, plain, trace_key, traces, undisturbed

__all__ = ["Trace", "trace", "traced"]


def trace(model: nn.Module, volume: Tensor, layers: Iterable[str]) -> dict[str, Trace]:
    """The :class:`Trace` of each layer, by its dotted name, for an input like ``volume`` (B, C, *spatial).

    One forward pass without a graph.

    Raises
    ------
    LayerError
        For a layer that is missing, does not run exactly once (``act#2`` is the second call of ``act``), or does not
        return a tensor.
    ModelError
        Where the model cannot be run on this volume.
    """
    found: dict[str, Trace] = {}

    def see(layer: str, output: Tensor, trace: Trace) -> None:
        found[layer] = trace

    with undisturbed(model), torch.no_grad(), Calls(model, list(layers), see) as calls:
        forward(model, plain(volume))
        calls.require()
        return {layer: found[layer] for layer in calls.layers}


def traced(model: nn.Module, volume: Tensor, layer: str) -> Trace:
    """The :class:`Trace` of one layer, from an earlier pass where the model has had one on an input of this shape."""
    found = traces.of(bare(model)).get(trace_key(layer, volume))
    return found or trace(model, volume[:2], [layer])[layer]
