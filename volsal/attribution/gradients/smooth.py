"""Gradients of noisy copies of the volume: their mean, their variance, the mean of their squares."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from volsal.attribution.gradients.gradient import by_input, scored
from volsal.attribution.method import Attribution, Context, Method, detached, spatial
from volsal.attribution.perturbation.perturbation import accurate
from volsal.attribution.settings import require_positive, require_whole
from volsal.attribution.targets.target import Target, fixed


@dataclass(frozen=True)
class NoisyGradient(Method):
    """Gradients of copies of the volume with Gaussian noise added; maps (B, C, *spatial) of the input's shape.

    The same noise is used for every volume, so that a volume has the same map alone and in a batch; each copy is asked
    what the volume itself was asked (its predicted class, not the copy's).  Methods with equal settings share passes.

    Parameters
    ----------
    samples : noisy copies, a forward and a backward pass each
    sigma : the noise's standard deviation, as a share of the range (maximum - minimum) of each of the volume's channels
    seed : of the noise, which is drawn on the CPU, so that every device gets the same
    batch : copies in one pass; more is faster on a GPU and needs as many times the memory
    """

    samples: int = 50
    sigma: float = 0.15
    seed: int = 0
    batch: int = 1

    least: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require_whole(self.id, self.least, samples=self.samples)
        require_whole(self.id, 0, seed=self.seed)
        require_whole(self.id, batch=self.batch)
        require_positive(self.id, sigma=self.sigma)

    @classmethod
    def family(cls) -> type[Method]:
        """Methods with equal settings come out of the same passes."""
        return NoisyGradient

    @classmethod
    def run_together(
        cls,
        model: nn.Module,
        volume: Tensor,
        methods: Sequence[NoisyGradient],
        targets: Sequence[Target],
        context: Context,
    ) -> list[Attribution]:
        """The maps of each method; errors as for :meth:`volsal.GradCAM.attribute`.

        ``facts`` of each target: ``samples``, and ``noise``, the standard deviation in each volume's channels.
        """
        shared = {astuple(method): method for method in methods}
        moments = {settings: _moments(model, volume, method, targets, context) for settings, method in shared.items()}
        return [moments[astuple(method)].answer(method) for method in methods]

    @abstractmethod
    def combine(self, mean: Tensor, variance: Tensor) -> Tensor:
        """The method itself, of the gradients' mean and variance, (B, C, *spatial) each."""


@dataclass(frozen=True)
class SmoothGrad(NoisyGradient):
    r"""SmoothGrad, Smilkov et al., arXiv:1706.03825, section 3: :math:`\frac1n \sum_i \nabla S(x + \epsilon_i)`.

    Signed.  The defaults are the paper's: noise of 10 to 20 % of the range, 50 samples.
    """

    id: ClassVar[str] = "smooth-grad"
    unit: ClassVar[str] = "logit per unit of model input"
    signed: ClassVar[bool] = True

    def combine(self, mean: Tensor, variance: Tensor) -> Tensor:
        """The mean."""
        return mean


@dataclass(frozen=True)
class SmoothGradSquared(NoisyGradient):
    r"""SmoothGrad-squared, Hooker et al., NeurIPS 2019, section 3: :math:`\frac1n \sum_i (\nabla S(x + \epsilon_i))^2`.

    Range [0, inf): how strongly a voxel moves the score, in either direction.
    """

    id: ClassVar[str] = "smooth-grad-squared"
    unit: ClassVar[str] = "(logit per unit of model input) squared"
    signed: ClassVar[bool] = False

    def combine(self, mean: Tensor, variance: Tensor) -> Tensor:
        """The second moment."""
        return variance + mean.square()


@dataclass(frozen=True)
class VarGrad(NoisyGradient):
    r"""VarGrad, Adebayo et al., ICLR workshop 2018, section 2: the variance of :math:`\nabla S(x + \epsilon_i)` over i.

    Range [0, inf), 0 wherever the score is linear.  The variance of these n samples themselves: divided by n.
    """

    id: ClassVar[str] = "var-grad"
    unit: ClassVar[str] = "(logit per unit of model input) squared"
    signed: ClassVar[bool] = False
    least: ClassVar[int] = 2

    def combine(self, mean: Tensor, variance: Tensor) -> Tensor:
        """The variance."""
        return variance


@dataclass(frozen=True, eq=False)
class _Moments:
    means: list[Tensor]
    variances: list[Tensor]
    scores: list[Tensor]
    output: Any
    noise: list[list[float]]

    def answer(self, method: NoisyGradient) -> Attribution:
        maps = [method.combine(mean, variance) for mean, variance in zip(self.means, self.variances, strict=True)]
        facts = {"samples": method.samples, "noise": self.noise}
        return Attribution(maps, self.scores, self.output, facts=[facts] * len(maps))


def _moments(
    model: nn.Module, volume: Tensor, method: NoisyGradient, targets: Sequence[Target], context: Context
) -> _Moments:
    output, scores = scored(model, volume, targets)
    same = [fixed(target, output) for target in targets]
    volume = volume.detach().as_subclass(Tensor)
    axes = spatial(volume)
    noise = method.sigma * (volume.amax(axes, keepdim=True) - volume.amin(axes, keepdim=True))
    generator = torch.Generator().manual_seed(method.seed)
    wide = accurate(volume)
    means = [torch.zeros_like(volume, dtype=wide) for _ in targets]
    squares = [torch.zeros_like(mean) for mean in means]
    for start in range(0, method.samples, method.batch):
        count = min(method.batch, method.samples - start)
        drawn = [torch.randn((1, *volume.shape[1:]), generator=generator) for _ in range(count)]
        answer = by_input(model, torch.cat([volume + noise * one.to(volume) for one in drawn]), same)
        for gradients, mean, square in zip(answer.maps, means, squares, strict=True):
            for number, gradient in enumerate(gradients.to(wide).split(len(volume)), start + 1):
                # Welford's recurrence: E[g^2] - E[g]^2 would cancel in single precision.
                step = gradient - mean
                mean += step / number
                square += step * (gradient - mean)
        context.progress("noisy copies", start + count, method.samples)
    variances = [square / method.samples for square in squares]
    return _Moments(means, variances, scores, detached(output), noise.flatten(1).tolist())
