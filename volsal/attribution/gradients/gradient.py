"""The gradient of the score by the input, voxel by voxel."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from volsal.attribution.gradients.lean import Lean
from volsal.attribution.gradients.rules import BackwardRule
from volsal.attribution.method import Attribution, Context, Method, detached, scores_of
from volsal.attribution.tap import copied_on_write, forward, gradients, plain, undisturbed
from volsal.attribution.targets.target import Target


@dataclass(frozen=True)
class InputGradient(Method):
    r"""The plain gradient, Simonyan et al., ICLR workshop 2014, section 3: :math:`\partial S / \partial x`.

    Maps (B, C, *spatial) of the input's shape, signed.  One forward pass and one backward pass to the input; weight
    gradients are never computed.
    """

    id: ClassVar[str] = "input-gradient"
    unit: ClassVar[str] = "logit per unit of model input"
    signed: ClassVar[bool] = True

    def run(self, model: nn.Module, volume: Tensor, targets: Sequence[Target], context: Context) -> Attribution:
        """The gradient of each target's score; errors as for :meth:`volsal.GradCAM.attribute`."""
        return by_input(model, volume, targets)


@dataclass(frozen=True)
class GradientTimesInput(Method):
    r"""Gradient times input, Shrikumar et al., arXiv:1605.01713, section 2: :math:`x \, \partial S / \partial x`.

    Maps (B, C, *spatial) of the input's shape, signed, each channel its own product.  Of a network of ReLUs and linear
    steps without biases the map adds up to the score; a voxel of value 0 gets 0, whatever the gradient there.  So the
    map depends on what preprocessing makes 0; :class:`volsal.IntegratedGradients` lets the baseline be chosen.
    """

    id: ClassVar[str] = "gradient-x-input"
    unit: ClassVar[str] = "logit"
    signed: ClassVar[bool] = True

    def ingredients(self) -> tuple[Method, ...]:
        """The plain gradient."""
        return (InputGradient(),)

    def compose(self, volume: Tensor, answers: Sequence[Attribution], context: Context) -> Attribution:
        """The product with the input."""
        (answer,) = answers
        return replace(answer, maps=[gradient * plain(volume) for gradient in answer.maps])


def by_input(
    model: nn.Module, volume: Tensor, targets: Sequence[Target], rule: BackwardRule | None = None
) -> Attribution:
    """The gradient of each score by the input, (B, C, *spatial), with ``rule`` on every activation if one is given."""
    with undisturbed(model):
        leaf = plain(volume).requires_grad_(True)
        with Lean(), rule or nullcontext():
            output = forward(model, copied_on_write(leaf))
        scores = scores_of(targets, output, len(volume))
        if rule:
            rule.require_complete(scores)
        maps = gradients(scores, leaf, "the input")
    coverage = dict(rule.coverage) if rule else {}
    return Attribution(maps, [s.detach() for s in scores], detached(output), coverage=coverage)


def scored(model: nn.Module, volume: Tensor, targets: Sequence[Target]) -> tuple[Any, list[Tensor]]:
    """The output and each target's scores (B,), from an inference alone; errors as for :func:`by_input`."""
    with undisturbed(model), torch.no_grad():
        output = forward(model, plain(volume))
        return output, scores_of(targets, output, len(volume))
