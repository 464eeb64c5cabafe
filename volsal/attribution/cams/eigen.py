"""Class activation maps that are the principal component of a layer's channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from volsal.attribution.cams.cam import GradientCAM


@dataclass(frozen=True)
class EigenCAM(GradientCAM):
    r"""Eigen-CAM, Muhammad and Yeasin, IJCNN 2020: what a layer's channels have most in common.

    .. math:: L = \max(0, A^T v), \qquad A A^T v = \lambda_1 v, \quad \|v\| = 1

    with A as (C, V), not centred, as in the paper.  **Not class-specific**: the map is the same whatever the score, and
    says where the layer is active, not what speaks for anything.  An eigenvector's sign is arbitrary; the one is taken
    whose components sum to more than 0, for which the map agrees with the sum of the channels.  In a rectified layer
    the map is then nowhere negative, and its ReLU cuts nothing.
    """

    id: ClassVar[str] = "eigen-cam"
    unit: ClassVar[str] = "activation"
    signed: ClassVar[bool] = False

    def weights(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """The first eigenvector over the channels."""
        return _first_component(activation)

    def remarks(self, activation: Tensor) -> list[str]:
        """That the map is no evidence for any class."""
        return [
            *super().remarks(activation),
            "the same map for every target; it says where the layer is active, not what speaks for a class",
        ]


@dataclass(frozen=True)
class EigenGradCAM(GradientCAM):
    r"""Eigen-CAM of gradient times activation, which makes it class-specific.

    .. math:: L = E^T v, \qquad E = G \odot A, \quad E E^T v = \lambda_1 v, \quad \|v\| = 1

    with E as (C, V), not centred.  Known from J. Gildenblat's software; no paper defines it.  Signed; of the two signs
    of v the one is taken whose components sum to more than 0, for which the map's inner product with
    :class:`~volsal.HiResCAM`, the sum of E over its channels, is positive.
    """

    id: ClassVar[str] = "eigen-grad-cam"
    signed: ClassVar[bool] = True

    def weights(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """The gradient, each channel by its part in the first eigenvector."""
        return _first_component(gradient * activation) * gradient


def _first_component(values: Tensor) -> Tensor:
    """The unit vector over the channels along which ``values`` (B, C, *cells) lie most: (B, C, 1, ...)."""
    found = [_first_eigenvector(one) for one in values.detach().flatten(2).double()]
    return torch.stack(found).reshape(*values.shape[:2], *[1] * (values.ndim - 2)).to(values)


def _first_eigenvector(rows: Tensor) -> Tensor:
    """Of ``rows`` @ ``rows``.T, for (C, V) -> (C,), by whichever of the two Gram matrices is the smaller."""
    rows = rows / rows.abs().amax().clamp(min=torch.finfo(rows.dtype).tiny)
    channels, cells = rows.shape
    if channels <= cells:
        vector = torch.linalg.eigh(rows @ rows.T).eigenvectors[:, -1]
    else:
        vector = rows @ torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]
        vector = vector / vector.norm().clamp(min=torch.finfo(rows.dtype).tiny)
    return -vector if vector.sum() < 0 else vector
