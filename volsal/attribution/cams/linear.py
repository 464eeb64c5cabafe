"""The first class activation map: its weights are those of the model's linear head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from volsal.attribution.cams.cam import GradientCAM
from volsal.attribution.method import spatial


@dataclass(frozen=True)
class LinearCAM(GradientCAM):
    r"""CAM, Zhou et al., CVPR 2016, eq. 2, for networks that end in global average pooling and a linear layer.

    .. math:: L_v = \sum_c w_c A_{cv}, \qquad \tfrac{1}{V} \sum_v L_v + b = S

    with w and b the head's weights and bias for the class, or whatever combination of classes S is.  Signed; the map's
    mean and the bias are the logit, which is checked on every volume.  The weights are read off the gradient, which
    such a head hands out evenly: :math:`w_c = \sum_v G_{cv}`.

    Saliency Tubes, Stergiou et al., ICIP 2019, are this map in 3D, stretched to [0, 1].

    Raises
    ------
    LayerError
        Where the network after the layer is anything else: the equation would still give a picture, of nothing.
    """

    id: ClassVar[str] = "cam"
    unit: ClassVar[str] = "logit, as mean over layer cells"
    signed: ClassVar[bool] = True
    pooled: ClassVar[bool] = True

    def weights(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """The head's weights."""
        return gradient.sum(spatial(gradient), keepdim=True)
