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

from volsal.attribution.alignment import AlignmentRule, LayerMap
from volsal.attribution.layers import default_layer
from volsal.attribution.method import HALF_PIXEL, Attribution, Method, detached, scores_of, spatial
from volsal.attribution.tap import LayerError, Tap, forward, gradients, plain, undisturbed
from volsal.attribution.targets import PredictedClass, Target, target_id


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

    def attribute(
        self, model: nn.Module, volume: Tensor, targets: Sequence[Target], align: AlignmentRule = HALF_PIXEL
    ) -> Attribution:
        """Maps (B, 1, *cells) at the layer's own resolution, float32 or wider.

        Raises
        ------
        LayerError
            For a layer that is missing, does not run exactly once, has no spatial axes, or does not reach the score.
        TargetError
            For a target that does not fit the model's output, or a score that is not finite.
        ModelError
            Where the model cannot be run on this volume.
        AlignmentError
            Where ``align`` cannot tell where the cells lie.
        """
        layer = self.layer or default_layer(model, volume)
        output, scores, maps = self._at(model, layer, volume, targets)
        if align.mirrors:
            axes = spatial(volume)
            same = [_as_judged(target, output) for target in targets]
            _, _, mirrored = self._at(model, layer, volume.flip(axes), same)
            maps = [
                replace(one, values=(one.values + other.values.flip(axes)) / 2)
                for one, other in zip(maps, mirrored, strict=True)
            ]
        alignments = [align(model, volume, one) for one in maps]
        return Attribution([one.values for one in maps], scores, output, layer, alignments)

    def _at(
        self, model: nn.Module, layer: str, volume: Tensor, targets: Sequence[Target]
    ) -> tuple[Any, list[Tensor], list[LayerMap]]:
        """The output, the scores and the maps, from one forward pass cut at ``layer``."""
        with undisturbed(model), Tap(model, layer) as tap:
            output = forward(model, plain(volume))
            activation = tap.activation
            if activation.ndim < 3 or activation.ndim != volume.ndim:
                raise LayerError(
                    f"layer {layer!r} returns {tuple(activation.shape)}; a CAM needs cells along each of the input's "
                    f"{volume.ndim - 2} spatial axes"
                )
            scores = scores_of(targets, output, len(volume))
            # Half precision cannot hold the products and means over a large layer.
            wide = torch.promote_types(activation.dtype, torch.float32)
            found = gradients(scores, activation, f"layer {layer!r}")
            activation = activation.detach().to(wide)
            maps = [
                LayerMap(
                    self.id,
                    layer,
                    _judged(target, output),
                    self.combine(activation, gradient.to(wide)),
                    activation,
                    gradient.to(wide),
                    self.combine,
                )
                for target, gradient in zip(targets, found, strict=True)
            ]
        return detached(output), [s.detach() for s in scores], maps

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


def _as_judged(target: Target, output: Any) -> Target:
    """``target``, with the predicted class being the one predicted in ``output``, whatever is judged next."""
    if not isinstance(target, PredictedClass):
        return target
    predicted = output.argmax(1, keepdim=True)
    return lambda other: other.gather(1, predicted)[:, 0]


def _judged(target: Target, output: Any) -> str:
    """The target's id, with a single volume's predicted class by its number: other classes are other evidence."""
    if isinstance(target, PredictedClass) and len(output) == 1:
        return f"class-{int(output.argmax())}"
    return target_id(target)
