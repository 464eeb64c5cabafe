"""Models of several inputs: one of them is explained, the others are held.

Every method explains a model of a single volume.  A model of an image and a table of numbers, or of several images,
becomes one when all inputs but the explained one are given beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from volsal.attribution.method import scores_of
from volsal.attribution.tap import ModelError, copied_on_write, forward, plain, undisturbed
from volsal.attribution.targets.target import Target, tiled
from volsal.errors import VolsalError


class InputsError(VolsalError, ValueError):
    """Inputs that do not go together."""


class Given(nn.Module):
    """A model of several inputs as a model of one, the others being held.

    Its layers, parameters and buffers are the wrapped model's own, under the wrapped model's names, and so is its
    mode: what is set here is set there.

    Parameters
    ----------
    model : takes the explained input and the others
    inputs, named : all the others, as the model takes them: positional ones in order without the explained one, and by
        name.  Tensors have a batch of 1, which serves every volume, or one entry per volume; lists, tuples and dicts of
        tensors will do, and what is no tensor is passed on as it is
    explained : the argument that is explained, by its position among the positional ones, or by its name

    Where a method runs the model on n changed copies of the volumes, the others are repeated to match.  One that goes
    through the volumes one at a time needs others with a batch of 1.

    >>> model = nn.Bilinear(2, 3, 1)
    >>> given = Given(model, torch.ones(1, 3))
    >>> torch.equal(given(torch.ones(5, 2)), model(torch.ones(5, 2), torch.ones(5, 3)))
    True

    Raises
    ------
    InputsError
        Where the explained argument has no place among the others.
    """

    wrapped: nn.Module

    def __init__(self, model: nn.Module, *inputs: Any, explained: int | str = 0, **named: Any) -> None:
        mode = model.training
        object.__setattr__(self, "wrapped", model)  # not as a submodule: that would change every layer's name
        super().__init__()
        # One and the same dictionaries: whatever is found or replaced through one of the two is so in the other.
        for own in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            object.__setattr__(self, own, getattr(model, own))
        self.training = mode
        self.explained = explained
        self.hold(*inputs, **named)

    @property
    def training(self) -> bool:
        """The wrapped model's mode."""
        return self.wrapped.training

    @training.setter
    def training(self, mode: bool) -> None:
        self.wrapped.training = mode

    def hold(self, *inputs: Any, **named: Any) -> None:
        """Hold other inputs from now on; errors as for the class."""
        if isinstance(self.explained, str) and self.explained in named:
            raise InputsError(f"the input {self.explained!r} is explained, so it is not given beforehand")
        if isinstance(self.explained, int) and not 0 <= self.explained <= len(inputs):
            raise InputsError(
                f"the positional input {self.explained} is to be explained, but only {len(inputs)} others are given "
                "before it; counting starts at 0"
            )
        self.inputs, self.named = inputs, named

    @property
    def held(self) -> dict[str, Any]:
        """What is held, by its names in the call; positional ones are ``input 1``, by position."""
        return {f"input {n}": value for n, value in self._numbered()} | self.named

    def forward(self, volume: Tensor) -> Any:
        """What the wrapped model returns for ``volume`` and the others."""
        inputs = [_matched(value, len(volume), f"input {n}") for n, value in self._numbered()]
        named = {name: _matched(value, len(volume), f"input {name!r}") for name, value in self.named.items()}
        if isinstance(self.explained, str):
            return self.wrapped(*inputs, **named, **{self.explained: volume})
        return self.wrapped(*inputs[: self.explained], volume, *inputs[self.explained :], **named)

    def tables(self, volume: Tensor, targets: Sequence[Target]) -> list[dict[str, Tensor]]:
        """What the numbers that are held speak for each target's score: gradient times input.

        For each target the tables, (B, n) each, named as in :attr:`held`; ``{}`` where there are none.  Held tensors of
        other shapes, or of whole numbers, are no tables.

        Raises
        ------
        TargetError, ModelError
            As for every method.
        """
        tables = {name: value for name, value in self.held.items() if _is_table(value)}
        leaves = {name: _own(table, len(volume)).requires_grad_(True) for name, table in tables.items()}
        if not leaves:
            return [{} for _ in targets]
        inputs, named = self.inputs, self.named
        with undisturbed(self):
            try:
                self.inputs = tuple(leaves.get(f"input {n}", value) for n, value in self._numbered())
                self.named = named | {name: leaf for name, leaf in leaves.items() if name in named}
                scores = scores_of(targets, forward(self, plain(volume)), len(volume))
            finally:
                self.inputs, self.named = inputs, named
            return [_shares(score, leaves) for score in scores]

    def _numbered(self) -> list[tuple[int, Any]]:
        """The positional ones with their positions in the call."""
        skipped = self.explained if isinstance(self.explained, int) else len(self.inputs)
        return [(n + (n >= skipped), value) for n, value in enumerate(self.inputs)]


def _is_table(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()


def _own(table: Tensor, batch: int) -> Tensor:
    """A private copy, one row per volume."""
    return _matched(table.detach().as_subclass(Tensor), batch, "a table").clone()


def _shares(score: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if score.requires_grad:
        found = torch.autograd.grad(score.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else (gradient * leaf).detach()
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def _matched(value: Any, batch: int, what: str) -> Any:
    """Every tensor in ``value`` repeated for ``batch`` volumes, protected from what the model writes."""

    def match(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0:
            return tensor
        if not len(tensor) or batch % len(tensor):
            raise ModelError(
                f"{what} has a batch of {len(tensor)}, and the model is run on a batch of {batch}; give it with a "
                "batch of 1, and explain the volumes one at a time"
            )
        return copied_on_write(tiled(tensor, batch))

    return tree_map_only(Tensor, match, value)
