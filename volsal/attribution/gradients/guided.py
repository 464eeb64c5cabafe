"""Guided backpropagation, its product with Grad-CAM, and the deconvnet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from volsal.attribution.cams.cam import GradCAM
from volsal.attribution.gradients.gradient import by_input
from volsal.attribution.gradients.rules import DeconvRule, GuidedRule
from volsal.attribution.method import Attribution, Context, Method
from volsal.attribution.settings import require_layer
from volsal.attribution.targets.target import Target


@dataclass(frozen=True)
class GuidedBackprop(Method):
    """The gradient by the input, with every activation passing back only positive signals.

    Springenberg et al., ICLR workshop 2015; the rule and what it means for activations other than ReLU are in
    :class:`~volsal.attribution.gradients.rules.GuidedRule`.  Maps (B, C, *spatial) of the input's shape, signed.  They
    are sharp and little class-specific: read them as *what the network uses*, not as *what speaks for this class*.

    Raises
    ------
    CoverageError
        Where the model has no activation to guide, or one that cannot be reached: no plain gradient goes by this name.
    """

    id: ClassVar[str] = "guided-backprop"
    unit: ClassVar[str] = "guided logit per unit of model input"
    signed: ClassVar[bool] = True

    def run(self, model: nn.Module, volume: Tensor, targets: Sequence[Target], context: Context) -> Attribution:
        """The guided gradient of each target's score; other errors as for :meth:`volsal.GradCAM.attribute`."""
        return by_input(model, volume, targets, GuidedRule())


@dataclass(frozen=True)
class GuidedGradCAM(Method):
    """Guided Grad-CAM, Selvaraju et al., ICCV 2017, section 3.1: guided backprop times Grad-CAM, voxel by voxel.

    The class activation map is brought to the input's voxels by linear interpolation first, its cells where the
    alignment rule puts them.
    Maps (B, C, *spatial) of the input's shape, signed.

    Parameters
    ----------
    layer : Grad-CAM's layer; None as in :class:`volsal.GradCAM`
    """

    layer: str | None = None

    id: ClassVar[str] = "guided-grad-cam"
    unit: ClassVar[str] = "logit x guided logit per unit of model input"
    signed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_layer(self.id, self.layer)

    def ingredients(self) -> tuple[Method, ...]:
        """Grad-CAM at the layer, and guided backprop."""
        return GradCAM(self.layer), GuidedBackprop()

    def compose(self, volume: Tensor, answers: Sequence[Attribution], context: Context) -> Attribution:
        """The product of the two maps of each target; errors of either."""
        coarse, guided = answers
        shape = tuple(volume.shape[2:])
        maps = [
            alignment.place(cam, shape).to(fine.dtype) * fine
            for cam, alignment, fine in zip(coarse.maps, coarse.alignments, guided.maps, strict=True)
        ]
        return Attribution(maps, coarse.scores, coarse.output, alignments=coarse.alignments, coverage=guided.coverage)


@dataclass(frozen=True)
class Deconvnet(Method):
    """The deconvnet, Zeiler and Fergus, ECCV 2014, section 2.1: the score's signal, rectified at every activation.

    The rule and what it means for activations other than ReLU are in
    :class:`~volsal.attribution.gradients.rules.DeconvRule`.
    Maps (B, C, *spatial) of the input's shape, signed.  Without max-pooling the map does not depend on which
    activations were on, so it hardly depends on the scan: read it as *what such a score looks for in general*.

    Raises
    ------
    CoverageError
        Where the model has no activation for the rule, one that cannot be reached, or checkpoints.
    """

    id: ClassVar[str] = "deconvnet"
    unit: ClassVar[str] = "rectified logit per unit of model input"
    signed: ClassVar[bool] = True

    def run(self, model: nn.Module, volume: Tensor, targets: Sequence[Target], context: Context) -> Attribution:
        """The deconvnet's map of each target's score; other errors as for :meth:`volsal.GradCAM.attribute`."""
        return by_input(model, volume, targets, DeconvRule())
