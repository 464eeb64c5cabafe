"""Targets of a part of what a model returns: of a dict, a tuple, an object, or heads stacked in a tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from volsal.attribution.targets.target import (
    OutputOf,
    Target,
    TargetError,
    described,
    facts,
    fixed,
    placed,
    target_id,
    told,
)

if TYPE_CHECKING:
    from volsal.attribution.method import Context


@dataclass(frozen=True)
class Within:
    """A target of a part of what the model returns.

    Parameters
    ----------
    path : steps into the output, separated by dots: the keys of dicts, the names of attributes, the places in tuples
        and lists; a number takes a tensor's slice along its second axis, as of heads stacked (B, heads, K, *spatial)
    target : what is taken of that part

    >>> import torch
    >>> Within("seg.main", lambda logits: logits[:, 1])({"seg": {"main": torch.tensor([[3.0, 5.0]])}})
    tensor([5.])
    """

    path: str
    target: Target

    @property
    def id(self) -> str:
        """``seg.main-class-1``."""
        return f"{self.path}-{target_id(self.target)}"

    def __str__(self) -> str:
        return f"{told(self.target)}, of the output's {self.path}"

    @property
    def files(self) -> tuple[str, ...]:
        """The files it reads."""
        return getattr(self.target, "files", ())

    def __call__(self, output: Any) -> Tensor:
        """The target's score of that part; TargetError where there is no such part."""
        return self.target(self.part(output))

    def fixed(self, output: Any) -> Target:
        """See :func:`fixed`."""
        return replace(self, target=fixed(self.target, self.part(output)))

    def placed(self, context: Context, output_of: OutputOf) -> Target:
        """See :func:`placed`."""
        return replace(self, target=placed(self.target, context, lambda path: self.part(output_of(path))))

    def facts(self, output: Any) -> list[dict[str, Any]]:
        """See :func:`facts`."""
        return facts(self.target, self.part(output))

    def part(self, output: Any) -> Any:
        """What of ``output`` the path leads to."""
        found = output
        for step in self.path.split("."):
            found = _stepped(found, step, self.path)
        return found


def _stepped(found: Any, step: str, path: str) -> Any:
    number = int(step) if re.fullmatch(r"-?\d+", step) else None
    if isinstance(found, Mapping):
        for key in (step, number):
            if key in found:
                return found[key]
    elif isinstance(found, Tensor):
        if number is not None and found.ndim > 2 and -found.shape[1] <= number < found.shape[1]:
            return found.select(1, number)
    elif isinstance(found, Sequence) and number is not None:
        if -len(found) <= number < len(found):
            return found[number]
    elif not step.startswith("_") and hasattr(found, step):
        return getattr(found, step)
    raise TargetError(f"the model's output has no {path!r}: there is no {step!r} in {described(found)}")
