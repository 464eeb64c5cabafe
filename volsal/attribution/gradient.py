"""The gradient of the score by the input, voxel by voxel."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from volsal.attribution.method import Attribution, Context, Method, detached, scores_of
from volsal.attribution.rules import GuidedRule
from volsal.attribution.tap import copied_on_write, forward, gradients, plain, undisturbed
from volsal.attribution.targets import Target


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


def by_input(
    model: nn.Module, volume: Tensor, targets: Sequence[Target], rule: GuidedRule | None = None
) -> Attribution:
    """The gradient of each score by the input, (B, C, *spatial), with ``rule`` on every activation if one is given."""
    with undisturbed(model):
        leaf = plain(volume).requires_grad_(True)
        with rule or nullcontext():
            output = forward(model, copied_on_write(leaf))
        scores = scores_of(targets, output, len(volume))
        if rule:
            rule.require_complete(scores)
        maps = gradients(scores, leaf, "the input")
    coverage = dict(rule.coverage) if rule else {}
    return Attribution(maps, [s.detach() for s in scores], detached(output), coverage=coverage)
