"""Scores of a model that embeds scans: how near an embedding lies to a reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from volsal.attribution.targets.target import (
    OutputOf,
    Target,
    TargetError,
    advice,
    case_file,
    described,
    path_id,
    tiled,
)

if TYPE_CHECKING:
    from volsal.attribution.method import Context


@dataclass(frozen=True, eq=False)
class CosineSimilarity:
    r"""How alike the model's embedding of the scan is to a reference.  Output (B, E) -> scores (B,) in [-1, 1].

    .. math:: S = \frac{\langle e, r \rangle}{\lVert e \rVert \, \lVert r \rVert}

    Its gradient is 0 where scan and reference are one and the same.

    Parameters
    ----------
    reference : the embedding (E,) or (1, E), or one (B, E) per volume; or a scan's file (``{case}`` stands for the
        case's id), whose embedding the same model makes
    """

    reference: Tensor | str
    id: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            named = isinstance(self.reference, str)
            object.__setattr__(self, "id", f"similar-{path_id(str(self.reference))}" if named else "similarity")

    def __str__(self) -> str:
        return f"cosine similarity to {self.reference if isinstance(self.reference, str) else self.id}"

    @property
    def files(self) -> tuple[str, ...]:
        """The reference's file."""
        return (self.reference,) if isinstance(self.reference, str) else ()

    def placed(self, context: Context, output_of: OutputOf) -> Target:
        """The same with the embedding of the reference's scan."""
        if not isinstance(self.reference, str):
            return self
        return replace(self, reference=_embeddings(output_of(case_file(self.reference, context))).detach())

    def __call__(self, output: Any) -> Tensor:
        """The cosine for each volume."""
        if isinstance(self.reference, str):
            raise TargetError(
                f"{self}: a file is read for scans only; explain through volsal.Explainer, or give the embedding"
            )
        own = _embeddings(output)
        given = self.reference.to(own).reshape(1, -1) if self.reference.ndim == 1 else self.reference.to(own).flatten(1)
        if given.shape[1] != own.shape[1] or len(own) % len(given):
            raise TargetError(
                f"the reference has shape {tuple(self.reference.shape)}, the model's embedding {tuple(own.shape)}"
            )
        given = tiled(given, len(own))
        lengths = own.norm(dim=1) * given.norm(dim=1)
        if not lengths.all():
            raise TargetError("an embedding is all 0, so that no angle to it is defined; choose another reference")
        return (own * given).sum(1) / lengths


def _embeddings(output: Any) -> Tensor:
    """(B, E), float32 or wider."""
    if not isinstance(output, Tensor) or output.ndim < 2:
        raise TargetError(
            f"a similarity needs an embedding (B, E); this model returns {described(output)}{advice(output)}"
        )
    return output.flatten(1).to(torch.promote_types(output.dtype, torch.float32))
