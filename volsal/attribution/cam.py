"""Class activation maps: a layer's channels, weighed by what the score owes them and summed.

To add a variant: a class with its equation in :meth:`~CAM.combine`, its line in ``METHODS``, its oracle test.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from volsal.attribution.alignment import LayerMap
from volsal.attribution.layers import default_layer
from volsal.attribution.method import Attribution, Context, Method, detached, scores_of, spatial
from volsal.attribution.tap import LayerError, Tap, forward, gradients_by, plain, undisturbed
from volsal.attribution.targets import PredictedClass, Target, fixed, target_id


@dataclass(frozen=True)
class CAM(Method):
    """Explain a score by one layer's activation A and the score's gradient G by it, both (B, C, *cells).

    Parameters
    ----------
    layer : dotted name; None takes the last layer on every path to the output with at least 2 cells in every axis

    Costs one inference: the network before the layer runs without a graph, and the backward pass ends at the layer.
    What an alignment rule costs comes on top: nothing under the half-pixel rule, a guided backward pass for each target
    under the measured one.
    """

    layer: str | None = None

    unit: ClassVar[str] = "logit per layer cell"

    @classmethod
    def family(cls) -> type[Method]:
        """All class activation maps, at whatever layers, come out of one pass."""
        return CAM

    @classmethod
    def run_together(
        cls, model: nn.Module, volume: Tensor, methods: Sequence[CAM], targets: Sequence[Target], context: Context
    ) -> list[Attribution]:
        """Maps (B, 1, *cells) at each layer's own resolution, float32 or wider.

        Raises
        ------
        LayerError
            For a layer that is missing, does not run exactly once, has no spatial axes, or does not reach the score.
        TargetError
            For a target that does not fit the model's output, or a score that is not finite.
        ModelError
            Where the model cannot be run on this volume.
        AlignmentError
            Where the context's rule cannot tell where the cells lie.
        """
        layers = [method.layer or default_layer(model, volume) for method in methods]
        output, scores, found = _maps(model, layers, volume, methods, targets)
        if context.align.mirrors:
            axes = spatial(volume)
            same = [fixed(target, output) for target in targets]
            _, _, mirrored = _maps(model, layers, volume.flip(axes), methods, same)
            found = [
                [replace(a, values=(a.values + b.values.flip(axes)) / 2) for a, b in zip(ours, theirs, strict=True)]
                for ours, theirs in zip(found, mirrored, strict=True)
            ]
        return [
            Attribution(
                [one.values for one in maps],
                scores,
                output,
                layer,
                [context.align(model, volume, one) for one in maps],
            )
            for layer, maps in zip(layers, found, strict=True)
        ]

    @abstractmethod
    def combine(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """The method itself: (B, C, *cells) twice -> (B, 1, *cells)."""


@dataclass(frozen=True)
class GradCAM(CAM):
    r"""Grad-CAM, Selvaraju et al., ICCV 2017, eqs. 1 and 2; the mean runs over depth, height and width.

    .. math:: L_v = \max(0, \sum_c \alpha_c A_{cv}), \qquad \alpha_c = \tfrac{1}{V} \sum_v G_{cv}

    Range [0, inf).  All 0 means that the layer holds no evidence for the score, on this method's terms.
    """

    id: ClassVar[str] = "grad-cam"
    signed: ClassVar[bool] = False

    def combine(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """Eqs. 1 and 2."""
        weight = gradient.mean(spatial(gradient), keepdim=True)
        return (weight * activation).sum(1, keepdim=True).relu()


@dataclass(frozen=True)
class HiResCAM(CAM):
    r"""HiResCAM, Draelos and Carin, arXiv:2011.08891, eq. 3: the gradient is not averaged, and no ReLU follows.

    .. math:: L_v = \sum_c G_{cv} A_{cv}

    Signed.  Where only a linear head follows the layer, the map's sum is the logit less its bias.
    """

    id: ClassVar[str] = "hires-cam"
    signed: ClassVar[bool] = True

    def combine(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """Eq. 3."""
        return (gradient * activation).sum(1, keepdim=True)


def _maps(
    model: nn.Module, layers: Sequence[str], volume: Tensor, methods: Sequence[CAM], targets: Sequence[Target]
) -> tuple[Any, list[Tensor], list[list[LayerMap]]]:
    """The output, the scores, and each method's map of each target, from one forward pass cut at ``layers``."""
    points = list(dict.fromkeys(layers))
    with undisturbed(model), Tap(model, *points) as tap:
        output = forward(model, plain(volume))
        for layer, activation in zip(points, tap.activations, strict=True):
            if activation.ndim < 3 or activation.ndim != volume.ndim:
                raise LayerError(
                    f"layer {layer!r} returns {tuple(activation.shape)}; a CAM needs cells along each of the input's "
                    f"{volume.ndim - 2} spatial axes"
                )
        scores = scores_of(targets, output, len(volume))
        by_target = gradients_by(scores, tap.activations, [f"layer {layer!r}" for layer in points])
        # Half precision cannot hold the products and means over a large layer.
        at = {layer: _wide(activation.detach()) for layer, activation in zip(points, tap.activations, strict=True)}
        found: list[list[LayerMap]] = [[] for _ in methods]
        for target, by in zip(targets, by_target, strict=True):
            owed = {layer: _wide(gradient) for layer, gradient in zip(points, by, strict=True)}
            for maps, method, layer in zip(found, methods, layers, strict=True):
                values = method.combine(at[layer], owed[layer])
                judged = _judged(target, output)
                maps.append(LayerMap(method.id, layer, judged, values, at[layer], owed[layer], method.combine))
    return detached(output), [s.detach() for s in scores], found


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _judged(target: Target, output: Any) -> str:
    """The target's id, with a single volume's predicted class by its number: other classes are other evidence."""
    if isinstance(target, PredictedClass) and len(output) == 1:
        return f"class-{int(output.argmax())}"
    return target_id(target)
