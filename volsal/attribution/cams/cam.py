r"""Class activation maps: a layer's channels, each multiplied by its weight, and summed.

.. math:: L_v = \sum_c w_{cv} A_{cv}

The methods differ in nothing but the weights w, and in whether a ReLU follows.  Here are the pass that they share and
those whose weights come from the score's gradient by the layer.  Beside this file: ``linear`` reads the weights off the
model's head, ``eigen`` takes principal components, ``forward`` asks the model about changed copies, and ``fused`` joins
several layers.  To add a variant: a class with its equation in ``weights``, its line in ``METHODS``, its oracle test.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from volsal.attribution.alignment.alignment import LayerMap
from volsal.attribution.cams.heads import Heads
from volsal.attribution.layers import default_layer
from volsal.attribution.method import Attribution, Context, Method, detached, scores_of, spatial
from volsal.attribution.settings import SettingError, require_layer
from volsal.attribution.tap import Tap, forward, gradients_by, plain, undisturbed
from volsal.attribution.targets.target import PredictedClass, Target, fixed, target_id


@dataclass(frozen=True)
class CAM(Method):
    """What all class activation maps share.

    Parameters
    ----------
    layer : dotted name; None takes the last layer on every path to the output with at least 2 cells in every axis
    features : how many channels' own weighted maps to give beside the map, as :attr:`Attribution.parts`: those that
        contribute most, by their magnitude summed over cells (and over the volumes and targets of one call), the
        largest first; "all": every channel, in the layer's order.  Parts are taken before any ReLU, so that all of
        them together sum to the map, or to what its ReLU cuts
    """

    layer: str | None = None
    features: int | Literal["all"] | None = None

    unit: ClassVar[str] = "logit per layer cell"
    #: Whether the equation was derived for layers that are nowhere negative.
    rectified: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_layer(self.id, self.layer)
        if self.features not in (None, "all") and not (type(self.features) is int and self.features > 0):
            raise SettingError(f"{self.id}: features is a number of channels from 1, or all; got {self.features!r}")

    def weighted(self, activation: Tensor, weights: Tensor) -> Tensor:
        """The map (B, 1, *cells) of an activation (B, C, *cells) under weights (B, C, *cells) or (B, C, 1, ...)."""
        total = (weights * activation).sum(1, keepdim=True)
        return total if self.signed else total.relu()

    def remarks(self, activation: Tensor) -> list[str]:
        """What a reader of a map of this activation must be told."""
        if self.rectified and bool((activation < 0).any()):
            return [
                "its weights are derived for a layer that is nowhere negative, as after a ReLU, and this one has "
                "negative values; prefer grad-cam or hires-cam here, or name the activation after it"
            ]
        return []


@dataclass(frozen=True)
class GradientCAM(CAM):
    """Weights from one layer's activation A and the score's gradient G by it, both (B, C, *cells).

    Costs one inference: the network before the layer runs without a graph, and the backward pass ends at the layer.
    What an alignment rule costs comes on top: nothing under the half-pixel rule, a guided backward pass for each target
    under the measured one.
    """

    #: Whether the equation holds only where the channels' means go through one linear layer to the score.
    pooled: ClassVar[bool] = False

    @classmethod
    def family(cls) -> type[Method]:
        """All class activation maps made of gradients, at whatever layers, come out of one pass."""
        return GradientCAM

    @classmethod
    def run_together(
        cls,
        model: nn.Module,
        volume: Tensor,
        methods: Sequence[GradientCAM],
        targets: Sequence[Target],
        context: Context,
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
        return answers(methods, model, volume, targets, context, partial(_by_gradients, model, layers, methods))

    @abstractmethod
    def weights(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """The method itself: A and G -> the weights, (B, C, *cells) or (B, C, 1, ...)."""

    def combine(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """The map, (B, 1, *cells), of A and G."""
        return self.weighted(activation, self.weights(activation, gradient))


@dataclass(frozen=True)
class GradCAM(GradientCAM):
    r"""Grad-CAM, Selvaraju et al., ICCV 2017, eqs. 1 and 2; the mean runs over depth, height and width.

    .. math:: L_v = \max(0, \sum_c \alpha_c A_{cv}), \qquad \alpha_c = \tfrac{1}{V} \sum_v G_{cv}

    Range [0, inf).  All 0 means that the layer holds no evidence for the score, on this method's terms.
    """

    id: ClassVar[str] = "grad-cam"
    signed: ClassVar[bool] = False

    def weights(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """Eq. 1."""
        return gradient.mean(spatial(gradient), keepdim=True)


@dataclass(frozen=True)
class HiResCAM(GradientCAM):
    r"""HiResCAM, Draelos and Carin, arXiv:2011.08891, eq. 3: the gradient is not averaged, and no ReLU follows.

    .. math:: L_v = \sum_c G_{cv} A_{cv}

    Signed.  Where only a linear head follows the layer, the map's sum is the logit less its bias.
    """

    id: ClassVar[str] = "hires-cam"
    signed: ClassVar[bool] = True

    def weights(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """Eq. 3."""
        return gradient


@dataclass(frozen=True)
class GradCAMPlusPlus(GradientCAM):
    r"""Grad-CAM++, Chattopadhyay et al., WACV 2018, with eq. 19 in a form without a stabiliser.

    .. math::
        L_v = \max(0, \sum_c w_c A_{cv}), \qquad w_c = \sum_{v:\,G_{cv} > 0} \alpha_{cv} G_{cv}, \qquad
        \alpha_{cv} = \frac{G_{cv}^2}{2 G_{cv}^2 + G_{cv}^3 \sum_u A_{cu}} = \frac{1}{2 + G_{cv} \sum_u A_{cu}}

    The customary form adds a small number to the first denominator, which swamps it where the gradient is small: over
    the many cells of a 3D layer every gradient is.  The second needs none, for with the channel's sum counted from 0
    (the derivation is for rectified layers) it is 2 or more wherever G > 0.  The factor exp(S), which all cells share,
    is left out.  The weights do not grow in proportion to the logit as those of Grad-CAM do.
    """

    id: ClassVar[str] = "grad-cam-plus-plus"
    signed: ClassVar[bool] = False
    rectified: ClassVar[bool] = True

    def weights(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """The gradient's positive part, each cell by its alpha."""
        positive = gradient.relu()
        total = activation.sum(spatial(activation), keepdim=True).relu()
        return (positive / (2 + positive * total)).sum(spatial(gradient), keepdim=True)


@dataclass(frozen=True)
class RespondCAM(GradientCAM):
    r"""Respond-CAM, Zhao et al., MICCAI 2018, made for 3D images: each cell's gradient counts by its activation.

    .. math:: L_v = \sum_c w_c A_{cv}, \qquad w_c = \frac{\sum_u A_{cu} G_{cu}}{\sum_u A_{cu}}

    Signed.  It sums to what :class:`HiResCAM` sums to: to the logit less its bias where the network after the layer is
    linear, or piecewise linear without biases.  A channel that is 0 everywhere has weight 0; where a channel's
    activations cancel, which they cannot in a rectified layer, its weight has no meaning.
    """

    id: ClassVar[str] = "respond-cam"
    signed: ClassVar[bool] = True
    rectified: ClassVar[bool] = True

    def weights(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """The mean of the gradient, weighted by the activation."""
        axes = spatial(activation)
        total = activation.sum(axes, keepdim=True)
        owed = (activation * gradient).sum(axes, keepdim=True)
        return owed / total.masked_fill(total == 0, 1)


@dataclass(frozen=True)
class XGradCAM(RespondCAM):
    r"""XGrad-CAM, Fu et al., BMVC 2020: the weights of :class:`RespondCAM`, found again from axioms, and a ReLU.

    .. math:: L_v = \max(0, \sum_c w_c A_{cv}), \qquad w_c = \sum_u \frac{A_{cu}}{\sum_t A_{ct}} G_{cu}

    Range [0, inf).
    """

    id: ClassVar[str] = "xgrad-cam"
    signed: ClassVar[bool] = False


@dataclass(frozen=True)
class LayerCAM(GradientCAM):
    r"""LayerCAM, Jiang et al., IEEE TIP 2021: cell by cell, only where the gradient is positive.

    .. math:: L_v = \max(0, \sum_c \max(0, G_{cv}) A_{cv})

    Made for shallow layers, where a channel's mean gradient says little of any one place.  Range [0, inf).
    """

    id: ClassVar[str] = "layer-cam"
    signed: ClassVar[bool] = False

    def weights(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """The gradient's positive part."""
        return gradient.relu()


# The output, the scores, and each method's map of each target.
Seen = tuple[Any, list[Tensor], list[list[LayerMap]]]


def answers(
    methods: Sequence[CAM],
    model: nn.Module,
    volume: Tensor,
    targets: Sequence[Target],
    context: Context,
    see: Callable[[Tensor, Sequence[Target]], Seen],
) -> list[Attribution]:
    """What each of ``methods`` gives, of what ``see`` makes of an input and targets: placed, with its parts."""
    output, scores, found = see(volume, targets)
    axes, mirrored = spatial(volume), None
    if context.align.mirrors:
        _, _, mirrored = see(volume.flip(axes), [_of_mirrored(fixed(target, output), len(axes)) for target in targets])
    taken = []
    for number, (method, maps) in enumerate(zip(methods, found, strict=True)):
        channels = _channels(method.features, maps)
        parts = _parts(maps, channels)
        if mirrored is not None:
            back = [replace(one, values=one.values.flip(axes)) for one in mirrored[number]]
            maps = [replace(a, values=(a.values + b.values) / 2) for a, b in zip(maps, back, strict=True)]
            parts = [(a + b.flip(axes)) / 2 for a, b in zip(parts, _parts(back, channels), strict=True)]
        taken.append((method, maps, channels, parts))
    placed = iter(context.align.together(model, volume, [one for _, maps, _, _ in taken for one in maps]))
    return [
        Attribution(
            [one.values for one in maps],
            scores,
            output,
            maps[0].layer,
            [next(placed) for _ in maps],
            parts=parts,
            part_names=[f"channel {channel}" for channel in channels],
            notes=method.remarks(maps[0].activation),
        )
        for method, maps, channels, parts in taken
    ]


def _of_mirrored(target: Target, axes: int) -> Target:
    """``target`` for what the model makes of the mirrored volume: a segmentation is mirrored back before it is asked.

    Whatever has ``axes`` dimensions besides a batch and channels lies on voxels.
    """

    def back(part: Any) -> Any:
        return part.flip(tuple(range(-axes, 0))) if isinstance(part, Tensor) and part.ndim > axes + 1 else part

    return lambda output: target(tree_map(back, output))


def layer_map(method: CAM, layer: str, target: Target, output: Any, activation: Tensor, weights: Tensor) -> LayerMap:
    """The map of a layer's activation (B, C, *cells) under weights (B, C, *cells) or (B, C, 1, ...).

    What is kept as its gradient are the weights, which whoever follows the map back to the input is to hold fixed.
    """
    return LayerMap(
        method.id,
        layer,
        _judged(target, output),
        method.weighted(activation, weights),
        activation,
        weights.expand_as(activation),
        method.weighted,
    )


def wide(values: Tensor) -> Tensor:
    """In float32 or wider: half precision cannot hold the products and means over a large layer."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _by_gradients(
    model: nn.Module, layers: Sequence[str], methods: Sequence[GradientCAM], volume: Tensor, targets: Sequence[Target]
) -> Seen:
    """From one forward pass cut at ``layers``, and a backward pass to them for each target."""
    points = list(dict.fromkeys(layers))
    pooled = {layer for layer, method in zip(layers, methods, strict=True) if method.pooled}
    with undisturbed(model), Tap(model, *points) as tap, Heads(model if pooled else None) as heads:
        output = forward(model, plain(volume))
        scores = scores_of(targets, output, len(volume))
        at = {layer: wide(activation.detach()) for layer, activation in zip(points, tap.activations, strict=True)}
        biases = {layer: [heads.bias(at[layer], score) for score in scores] for layer in pooled}
        by_target = gradients_by(scores, tap.activations, [f"layer {layer!r}" for layer in points])
        found: list[list[LayerMap]] = [[] for _ in methods]
        for number, (target, by) in enumerate(zip(targets, by_target, strict=True)):
            owed = {layer: wide(gradient) for layer, gradient in zip(points, by, strict=True)}
            for maps, method, layer in zip(found, methods, layers, strict=True):
                weights = method.weights(at[layer], owed[layer])
                maps.append(layer_map(method, layer, target, output, at[layer], weights))
                if method.pooled:
                    heads.require_linear(maps[-1], scores[number].detach(), biases[layer][number])
    return detached(output), [s.detach() for s in scores], found


def _channels(features: int | str | None, maps: Sequence[LayerMap]) -> list[int]:
    """The channels whose own maps are asked for."""
    if features is None:
        return []
    everything = range(maps[0].activation.shape[1])
    if features == "all":
        return list(everything)
    owed = [(one.gradient * one.activation).abs().transpose(0, 1).flatten(1).sum(1) for one in maps]
    return torch.stack(owed).sum(0).argsort(descending=True, stable=True)[: int(features)].tolist()


def _parts(maps: Sequence[LayerMap], channels: Sequence[int]) -> list[Tensor]:
    """Of each map, these channels times their weights: (B, len(channels), *cells)."""
    return [of.gradient[:, channels] * of.activation[:, channels] for of in maps] if channels else []


def _judged(target: Target, output: Any) -> str:
    """The target's id, with a single volume's predicted class by its number: other classes are other evidence."""
    if isinstance(target, PredictedClass) and len(output) == 1:
        return f"class-{int(output.argmax())}"
    return target_id(target)
