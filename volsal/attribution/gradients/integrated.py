"""The gradient integrated on the way from a baseline to the volume: a map that adds up to the score's change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from volsal.attribution.gradients.baselines import (
    NAMES,
    Baseline,
    BaselineError,
    baseline_of,
    baseline_text,
    listed_baselines,
    named_files,
)
from volsal.attribution.gradients.gradient import by_input, scored
from volsal.attribution.method import Attribution, Context, Method, detached
from volsal.attribution.perturbation.perturbation import accurate, per_volume
from volsal.attribution.settings import SettingError, require_positive, require_whole
from volsal.attribution.targets.target import Target, fixed, target_id

_UNSETTLED = "as closely as was asked; raise max_steps, or tolerance"


@dataclass(frozen=True, eq=False)
class IntegratedGradients(Method):
    r"""Integrated gradients, Sundararajan et al., ICML 2017, section 3.

    .. math:: L_v = (x_v - b_v) \int_0^1 \frac{\partial S(b + a (x - b))}{\partial x_v} \, da

    The integral is taken by Gauss-Legendre quadrature.  A map that is right adds up to S(x) - S(b); by how much it does
    not is the convergence delta.  ``steps`` is doubled until the delta is small enough; the points of one rule are not
    among those of the next, so that all passes together are at most twice the last rule's.

    Maps (B, C, *spatial) of the input's shape, signed.  Memory does not depend on the number of steps.

    Parameters
    ----------
    baseline : what the volume is compared with: ``zero``, ``blur``, ``mean``, a number, a scan's file, a tensor; see
        :func:`volsal.attribution.gradients.baselines.baseline_of`
    blur : standard deviation of the baseline ``blur``, in mm; in voxels where the input's grid is not known
    steps : points of the first quadrature
    tolerance : relative delta that is good enough, as a share of S(x) - S(b) (see :func:`completeness`); None: the
        first quadrature is taken as it is
    max_steps : points of the last quadrature; where it is not enough either, a note says so
    batch : points in one pass; more is faster on a GPU and needs as many times the memory
    """

    baseline: Baseline = "zero"
    blur: float = 10.0
    steps: int = 32
    tolerance: float | None = 0.01
    max_steps: int = 256
    batch: int = 1

    id: ClassVar[str] = "integrated-gradients"
    unit: ClassVar[str] = "logit"
    signed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_whole(self.id, steps=self.steps, max_steps=self.max_steps, batch=self.batch)
        require_positive(self.id, blur=self.blur, **({} if self.tolerance is None else {"tolerance": self.tolerance}))
        if self.tolerance is not None and self.max_steps < self.steps:
            raise SettingError(f"{self.id}: max_steps is {self.max_steps}, less than the first {self.steps} steps")

    @property
    def files(self) -> dict[str, list[str | Path]]:
        """The baseline's, where it is one."""
        return {"baseline": named_files(self.baseline)}

    def run(self, model: nn.Module, volume: Tensor, targets: Sequence[Target], context: Context) -> Attribution:
        """The map of each target.

        ``facts`` of each target: ``baseline`` in words, and for each volume ``baseline_score``, ``delta``,
        ``relative_delta`` and ``steps``.

        Raises
        ------
        BaselineError
            Where the baseline does not fit the volume.
        VolsalError
            Other errors as for :meth:`volsal.GradCAM.attribute`.
        """
        output, scores = scored(model, volume, targets)
        same = [fixed(target, output) for target in targets]
        base = baseline_of(volume, self.baseline, self.blur, context)
        _, at_base = scored(model, base, same)
        sums = [_Sum(volume, *both) for both in zip(scores, at_base, strict=True)]
        tolerance = math.inf if self.tolerance is None else self.tolerance
        for steps in self._rules():
            unsettled = [number for number, one in enumerate(sums) if one.open.any()]
            if not unsettled:
                break
            asked = [same[number] for number in unsettled]
            maps = self._quadrature(model, volume, base, asked, steps, context)
            for number, values in zip(unsettled, maps, strict=True):
                sums[number].take(values, steps, tolerance)
        text = baseline_text(self.baseline, self.blur, context)
        return Attribution(
            [one.values for one in sums],
            scores,
            detached(output),
            facts=[
                {"baseline": text, "baseline_score": per_volume(without), **one.facts}
                for one, without in zip(sums, at_base, strict=True)
            ],
            notes=[
                f"{target_id(targets[number])}: "
                + why_missed(model, volume, same[number], one.values, scores[number], at_base[number], _UNSETTLED)
                for number, one in enumerate(sums)
                if one.open.any()
            ],
        )

    def _rules(self) -> list[int]:
        """The number of points of every quadrature, should the ones before it not do."""
        counts = [self.steps]
        while self.tolerance is not None and counts[-1] < self.max_steps:
            counts.append(min(2 * counts[-1], self.max_steps))
        return counts

    def _quadrature(
        self, model: nn.Module, volume: Tensor, base: Tensor, targets: Sequence[Target], steps: int, context: Context
    ) -> list[Tensor]:
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        difference = volume.detach().as_subclass(Tensor) - base
        sums = [torch.zeros_like(base, dtype=accurate(volume)) for _ in targets]
        for start in range(0, steps, self.batch):
            part = slice(start, start + self.batch)
            copies = [base + share * difference for share in ((nodes[part] + 1) / 2).tolist()]
            answer = by_input(model, torch.cat(copies), targets)
            for total, gradients in zip(sums, answer.maps, strict=True):
                for weight, gradient in zip((weights[part] / 2).tolist(), gradients.split(len(volume)), strict=True):
                    total += weight * gradient
            context.progress(f"{self.id}, {steps} steps", start + len(copies), steps)
        return [total * difference for total in sums]


@dataclass(frozen=True, eq=False)
class ExpectedGradients(Method):
    r"""Expected gradients, Erion et al., Nature Machine Intelligence 2021, eq. for "expected gradients".

    .. math:: L_v = E_{b, a} \left[ (x_v - b_v) \frac{\partial S(b + a (x - b))}{\partial x_v} \right]

    with b one of the baselines and a uniform in [0, 1]: integrated gradients, averaged over normal scans instead of
    taken from one artificial one.  The draws are balanced, which leaves the mean as it is and lowers its variance:
    every baseline is drawn as often as any other, within one, and each a from its own n-th of [0, 1].

    Maps (B, C, *spatial) of the input's shape, signed, which add up to S(x) less the baselines' mean score, within what
    the sampling leaves.

    Parameters
    ----------
    baselines : a folder of scans, a pattern such as ``controls/*.nii.gz`` (relative ones start from the context's
        folder), a list of scans' files, numbers, words (see :class:`volsal.IntegratedGradients`) or tensors
        (1, C, *spatial), or a tensor (N, C, *spatial)
    samples : draws, a forward and a backward pass each
    seed : of the draws, which are the same for every volume
    batch : draws in one pass; more is faster on a GPU and needs as many times the memory
    blur : as in :class:`volsal.IntegratedGradients`
    """

    baselines: Any = None
    samples: int = 100
    seed: int = 0
    batch: int = 1
    blur: float = 10.0

    id: ClassVar[str] = "expected-gradients"
    unit: ClassVar[str] = "logit"
    signed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_whole(self.id, samples=self.samples, batch=self.batch)
        require_whole(self.id, 0, seed=self.seed)
        require_positive(self.id, blur=self.blur)

    @property
    def files(self) -> dict[str, list[str | Path]]:
        """The baselines': each of a list; else the scan, the folder or the pattern."""
        if isinstance(self.baselines, (list, tuple)):
            return {"baselines": [file for one in self.baselines for file in named_files(one)]}
        named = isinstance(self.baselines, (str, Path)) and self.baselines not in NAMES
        return {"baselines": [self.baselines] if named else []}

    def run(self, model: nn.Module, volume: Tensor, targets: Sequence[Target], context: Context) -> Attribution:
        """The map of each target.

        ``facts`` of each target: ``baselines`` (how many were drawn), ``samples``, and for each volume
        ``baseline_score`` (the mean of those drawn), ``delta`` and ``relative_delta``.

        Raises
        ------
        BaselineError
            Where no baselines are given, or one does not fit the volume.
        VolsalError
            Other errors as for :meth:`volsal.GradCAM.attribute`.
        """
        if self.baselines is None:
            raise BaselineError(
                f"{self.id} needs baselines: a folder of scans to compare with, a pattern such as 'controls/*.nii.gz', "
                "or a list"
            )
        output, scores = scored(model, volume, targets)
        same = [fixed(target, output) for target in targets]
        volume = volume.detach().as_subclass(Tensor)
        choices = listed_baselines(self.baselines, context.folder)
        draws = self._draws(len(choices))
        expected = [torch.zeros_like(score) for score in scores]
        sums = [torch.zeros_like(volume, dtype=accurate(volume)) for _ in targets]
        loaded = None
        for start in range(0, self.samples, self.batch):
            part = draws[start : start + self.batch]
            bases = []
            for chosen, _ in part:
                if chosen != loaded:  # the draws are in the order of the baselines, so each is read once
                    base = baseline_of(volume, choices[chosen], self.blur, context)
                    _, at_base = scored(model, base, same)
                    loaded = chosen
                bases.append(base)
                for mean, score in zip(expected, at_base, strict=True):
                    mean += score / self.samples
            copies = [base + share * (volume - base) for base, (_, share) in zip(bases, part, strict=True)]
            answer = by_input(model, torch.cat(copies), same)
            for total, gradients in zip(sums, answer.maps, strict=True):
                for base, gradient in zip(bases, gradients.split(len(volume)), strict=True):
                    total += gradient * (volume - base) / self.samples
            context.progress(self.id, start + len(part), self.samples)
        facts = [
            {
                "baselines": len({chosen for chosen, _ in draws}),
                "samples": self.samples,
                **{
                    name: per_volume(figures)
                    for name, figures in {"baseline_score": mean, **completeness(total, score, mean)}.items()
                },
            }
            for total, score, mean in zip(sums, scores, expected, strict=True)
        ]
        return Attribution(sums, scores, detached(output), facts=facts)

    def _draws(self, count: int) -> list[tuple[int, float]]:
        """The number of a baseline, and the share of the way from it, of every draw."""
        generator = torch.Generator().manual_seed(self.seed)
        rounds = [torch.randperm(count, generator=generator) for _ in range(-(-self.samples // count))]
        strata = torch.randperm(self.samples, generator=generator) + torch.rand(self.samples, generator=generator)
        return sorted(zip(torch.cat(rounds).tolist(), (strata / self.samples).tolist(), strict=False))


def completeness(values: Tensor, score: Tensor, before: Tensor) -> dict[str, Tensor]:
    """By how much a map (B, C, *spatial) misses adding up to the score's change from ``before``, volume by volume.

    ``delta`` (B,) is the map's sum less the change.  ``relative_delta`` (B,) is its size as a share of the change's; or
    of a thousandth of the sum of the map's absolute values, or of a thousand roundings of the scores, where those are
    more: where evidence for and against cancels, no sum can be as exact as what is left of it.
    """
    flat = values.flatten(1).double()
    change = score.double() - before.double()
    delta = flat.sum(1) - change
    rounding = torch.finfo(score.dtype).eps * torch.maximum(score.abs(), before.abs()).double()
    scale = torch.stack([change.abs(), flat.abs().sum(1) / 1000, 1000 * rounding]).amax(0)
    return {"delta": delta, "relative_delta": torch.where(delta == 0, 0.0, delta.abs() / scale)}


def why_missed(
    model: nn.Module, volume: Tensor, target: Target, values: Tensor, score: Tensor, before: Tensor, cause: str
) -> str:
    """In words that a map does not add up to the score's change, and the ``cause``, or else that it is rounding.

    It is rounding where no volume's map misses more than a thousand roundings of the scores or of all that it adds up,
    or more than a few times what the score moves by when the volume itself is changed by a rounding: where evidence for
    and against cancels to next to nothing, in the map or inside the model, those are much beside what is left of it.
    """
    step = torch.finfo(volume.dtype).eps
    moved = [scored(model, volume.detach() * (1 + n * step), [target])[1][0] - score for n in (-2, -1, 1, 2)]
    sizes = [score.abs(), before.abs(), values.flatten(1).abs().sum(1)]
    limits = [1000 * torch.finfo(score.dtype).eps * size for size in sizes] + [4 * by.abs() for by in moved]
    allowed = torch.stack([limit.double() for limit in limits]).amax(0)
    if bool((completeness(values, score, before)["delta"].abs() <= allowed).all()):
        return (
            "the map misses the score's change from the baseline by rounding alone, which is much beside so small a "
            "change; a baseline that changes the score more would tell more"
        )
    return f"the map does not add up to the score's change {cause}"


class _Sum:
    """One target's map, with each volume's part taken from the first quadrature that is good enough for it."""

    def __init__(self, volume: Tensor, score: Tensor, before: Tensor) -> None:
        self.values = torch.zeros_like(volume, dtype=accurate(volume))
        self.open = torch.ones(len(volume), dtype=torch.bool, device=volume.device)
        self._scores = score, before
        self._figures = {"steps": torch.zeros(len(volume), dtype=torch.int64, device=volume.device)}

    def take(self, values: Tensor, steps: int, tolerance: float) -> None:
        """Take what was open, and close what is within the tolerance."""
        self.values[self.open] = values[self.open]
        found = completeness(values, *self._scores) | {"steps": torch.full_like(self._figures["steps"], steps)}
        self._figures = {name: torch.where(self.open, new, self._figures.get(name, new)) for name, new in found.items()}
        self.open &= found["relative_delta"] > tolerance

    @property
    def facts(self) -> dict[str, Any]:
        """The figures of each volume's part, as plain data."""
        steps = self._figures["steps"].tolist()
        figures = {name: per_volume(self._figures[name]) for name in ("delta", "relative_delta")}
        return {**figures, "steps": steps if len(steps) > 1 else steps[0]}
