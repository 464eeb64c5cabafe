"""What every attribution method has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn

from volsal.attribution.alignment import Alignment, AlignmentRule, HalfPixel
from volsal.attribution.targets import Target
from volsal.attribution.targets import score as score_of

HALF_PIXEL = HalfPixel()


@dataclass(frozen=True)
class Attribution:
    """What one pass of a method over a batch gives.

    Attributes
    ----------
    maps : one raw map per target, (B, C or 1, *cells), signed, in :attr:`Method.unit`
    scores : one tensor (B,) per target: the numbers that were explained
    output : what the model returned, detached
    layer : the layer whose cells the maps lie on; None where they lie on the input's own voxels
    alignments : for each target, where the cells of the layer's map lie on the input; empty where no layer is asked
    coverage : activations that a backward rule was put on, by kind
    """

    maps: list[Tensor]
    scores: list[Tensor]
    output: Any
    layer: str | None = None
    alignments: Sequence[Alignment] = ()
    coverage: Mapping[str, int] = field(default_factory=dict)


class Method(ABC):
    """An attribution method: (model, volume, target) -> raw map, neither upsampled nor normalised.

    Subclasses are frozen dataclasses whose fields are the method's settings; they implement :meth:`attribute` and are
    registered in ``volsal.METHODS`` under :attr:`id`.
    """

    id: ClassVar[str]
    #: The unit of the map's values.
    unit: ClassVar[str]
    #: Whether negative values are evidence against the score (True), or do not occur (False).
    signed: ClassVar[bool]

    @abstractmethod
    def attribute(
        self, model: nn.Module, volume: Tensor, targets: Sequence[Target], align: AlignmentRule = HALF_PIXEL
    ) -> Attribution:
        """Maps of ``volume`` (B, C, *spatial) for each target, from one forward pass.

        ``align`` finds where a layer's cells lie on the input; methods that work on the input's own voxels pass it by.
        """

    @overload
    def __call__(self, model: nn.Module, volume: Tensor, target: Target) -> Tensor: ...
    @overload
    def __call__(self, model: nn.Module, volume: Tensor, target: Sequence[Target]) -> list[Tensor]: ...
    def __call__(self, model: nn.Module, volume: Tensor, target: Target | Sequence[Target]) -> Tensor | list[Tensor]:
        """The raw map of ``target``; for a sequence of targets a list of maps, from one forward pass.

        ``volume`` is (B, C, D, H, W), or (B, C, H, W) for a 2D model: the number of axes comes from the tensor.
        Neither model nor volume is changed, whatever happens.
        """
        if isinstance(target, Sequence):
            return self.attribute(model, volume, target).maps
        return self.attribute(model, volume, [target]).maps[0]


def scores_of(targets: Sequence[Target], output: Any, batch: int) -> list[Tensor]:
    """Every target's checked score of one output; ValueError where there is no target."""
    if not targets:
        raise ValueError("no target given; pass at least one, as in volsal.ClassLogit(1)")
    return [score_of(target, output, batch) for target in targets]


def spatial(tensor: Tensor) -> tuple[int, ...]:
    """The spatial axes of (B, C, *spatial)."""
    return tuple(range(2, tensor.ndim))


def detached(output: Any) -> Any:
    """The model's output without its graph."""
    return torch.utils._pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, output)
