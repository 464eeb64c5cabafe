"""DeepLIFT: the change of the score from a baseline to the volume, shared out among the voxels in one pass each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from volsal.attribution.gradients.baselines import Baseline, baseline_of, baseline_text, named_files
from volsal.attribution.gradients.gradient import by_input
from volsal.attribution.gradients.integrated import completeness, why_missed
from volsal.attribution.gradients.rescale import recorded
from volsal.attribution.method import Attribution, Context, Method, scores_of
from volsal.attribution.perturbation.perturbation import per_volume
from volsal.attribution.settings import require_positive
from volsal.attribution.targets.target import Target, fixed, target_id

# A map that misses more of the score's change than this is not rounding: the model has a step without a rule.
_ROUNDING = 0.01
_UNKNOWN = (
    "to within a hundredth, since the model or the target holds a step that the rescale rule does not know; "
    "integrated-gradients needs no rule"
)


@dataclass(frozen=True, eq=False)
class DeepLIFT(Method):
    r"""DeepLIFT with the rescale rule, Shrikumar et al., ICML 2017, section 3.5.1.

    .. math:: L_v = (x_v - b_v) \, m_v, \qquad m = \text{the gradient with secants in place of derivatives}

    The rule, and what it is for gates, attention, pooling and normalisation, is in
    :mod:`volsal.attribution.gradients.rescale`.  Maps (B, C, *spatial) of the input's shape, signed, which add
    up to S(x) - S(b):
    what integrated gradients reach with many passes, from one inference on the baseline and one gradient.  Unlike
    theirs, the map depends on how a function is written: ``silu(x)`` is one step, ``x * sigmoid(x)`` two.

    Parameters
    ----------
    baseline, blur : as in :class:`volsal.IntegratedGradients`

    Raises
    ------
    CoverageError
        Where an activation cannot be reached, the model checkpoints, or it takes another way for the baseline.
    """

    baseline: Baseline = "zero"
    blur: float = 10.0

    id: ClassVar[str] = "deep-lift"
    unit: ClassVar[str] = "logit"
    signed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive(self.id, blur=self.blur)

    @property
    def files(self) -> dict[str, list[str | Path]]:
        """The baseline's, where it is one."""
        return {"baseline": named_files(self.baseline)}

    def run(self, model: nn.Module, volume: Tensor, targets: Sequence[Target], context: Context) -> Attribution:
        """The map of each target; other errors as for :meth:`volsal.IntegratedGradients.run`.

        ``facts`` of each target: ``baseline`` in words, and for each volume ``baseline_score``, ``delta`` and
        ``relative_delta``; a note where the map does not add up.
        """
        base = baseline_of(volume, self.baseline, self.blur, context)
        without, rule = recorded(model, base)
        answer = by_input(model, volume, targets, rule)
        same = [fixed(target, answer.output) for target in targets]
        at_base = scores_of(same, without, len(volume))
        difference = volume.detach().as_subclass(Tensor) - base
        maps = [multipliers * difference for multipliers in answer.maps]
        sums = [
            {"baseline_score": before, **completeness(values, score, before)}
            for values, score, before in zip(maps, answer.scores, at_base, strict=True)
        ]
        text = baseline_text(self.baseline, self.blur, context)
        return replace(
            answer,
            maps=maps,
            facts=[{"baseline": text, **{name: per_volume(figures) for name, figures in one.items()}} for one in sums],
            notes=[
                f"{target_id(target)}: "
                + why_missed(model, volume, asked, values, score, one["baseline_score"], _UNKNOWN)
                for target, asked, values, score, one in zip(targets, same, maps, answer.scores, sums, strict=True)
                if bool((one["relative_delta"] > _ROUNDING).any())
            ],
        )
