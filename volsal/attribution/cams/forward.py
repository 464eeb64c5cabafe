"""Class activation maps whose weights come from running the model on changed copies, without any gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from volsal.attribution.alignment.alignment import (
    Alignment,
    AlignmentError,
    AlignmentRule,
    HalfPixel,
    LayerMap,
    Nominal,
)
from volsal.attribution.alignment.following import Trace
from volsal.attribution.cams.cam import CAM, Seen, answers, layer_map, wide
from volsal.attribution.layers import default_layer
from volsal.attribution.method import Attribution, Context, detached, scores_of, spatial
from volsal.attribution.settings import SettingError, require_number
from volsal.attribution.tap import Calls, ModelError, Tap, forward, plain, reader, undisturbed
from volsal.attribution.targets.target import Target, TargetError, fixed


@dataclass(frozen=True, eq=False)
class Original:
    """What is copied and changed: a batch, what the model makes of it, and what is asked of its copies.

    Attributes
    ----------
    volume : (B, C, *spatial)
    activation : of ``layer``, (B, C, *cells), float32 or wider
    scores : (B,) for each target
    targets : with their choices made on the model's output for ``volume``
    align : finds where the layer's cells lie
    """

    model: nn.Module
    layer: str
    volume: Tensor
    activation: Tensor
    scores: list[Tensor]
    targets: list[Target]
    align: AlignmentRule

    def ask(self, copies: Tensor, count: int) -> list[Tensor]:
        """The scores, (count, B) for each target, of ``count`` copies of the whole batch, one after the other."""
        scores = scores_of(self.targets, forward(self.model, copies), count * len(self.volume))
        return [wide(score).reshape(count, -1) for score in scores]


# Weights of some channels, (channels, B) for each target.
Question = Callable[[Sequence[int]], list[Tensor]]


@dataclass(frozen=True)
class ForwardCAM(CAM):
    """Each channel is weighed by what the model says of a copy of the scan that this channel changes.

    Parameters
    ----------
    layer, features : as in :class:`volsal.GradCAM`
    batch : how many changed copies go through the model at once; memory depends on it, the map does not
    """

    batch: int = 8

    unit: ClassVar[str] = "logit x activation"
    signed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.batch) is not int or self.batch < 1:
            raise SettingError(f"{self.id}: batch is a number of copies from 1; got {self.batch!r}")

    def run(self, model: nn.Module, volume: Tensor, targets: Sequence[Target], context: Context) -> Attribution:
        """Maps (B, 1, *cells) for all targets from the same copies; errors as for :meth:`volsal.GradCAM.attribute`."""
        layer = self.layer or default_layer(model, volume)
        (answer,) = answers([self], model, volume, targets, context, partial(self._see, model, layer, context))
        return answer

    @abstractmethod
    def varied(self, activation: Tensor) -> Tensor:
        """Which channels of which volumes, (B, C) bool, make a copy that differs; the others weigh 0 unasked."""

    @abstractmethod
    def question(self, original: Original) -> Question:
        """The method itself: what tells the weights of a few channels."""

    def _see(self, model: nn.Module, layer: str, context: Context, volume: Tensor, targets: Sequence[Target]) -> Seen:
        with undisturbed(model), torch.no_grad():
            volume = plain(volume)
            with Tap(model, layer) as tap:
                output = detached(forward(model, plain(volume)))
                (activation,) = tap.activations
            scores = scores_of(targets, output, len(volume))
            asked = [fixed(target, output) for target in targets]
            at = wide(activation.detach())
            weights = self._weights(Original(model, layer, volume, at, scores, asked, context.align), context)
            shape = (*at.shape[:2], *[1] * (at.ndim - 2))
            maps = [
                layer_map(self, layer, target, output, at, found.reshape(shape))
                for target, found in zip(targets, weights, strict=True)
            ]
        return output, scores, [maps]

    def _weights(self, original: Original, context: Context) -> list[Tensor]:
        """Every channel's weight in each volume, (B, C), for each target."""
        varied = self.varied(original.activation)
        asked = varied.any(0).nonzero().flatten().tolist()
        found = [torch.zeros(varied.shape, dtype=wide(s).dtype, device=varied.device) for s in original.scores]
        if not asked:
            return found
        question = self.question(original)
        for start in range(0, len(asked), self.batch):
            channels = asked[start : start + self.batch]
            for weights, told in zip(found, question(channels), strict=True):
                weights[:, channels] = told.T
            context.progress(self.id, start + len(channels), len(asked))
        return found


@dataclass(frozen=True)
class ScoreCAM(ForwardCAM):
    r"""Score-CAM, Wang et al., CVPR workshops 2020, in any number of axes.

    .. math::
        L_v = \max(0, \sum_c w_c A_{cv}), \qquad w_c = S(x_b + H_c \odot (x - x_b)) - S(x_b), \qquad
        H_c = \frac{U(A_c) - \min U(A_c)}{\max U(A_c) - \min U(A_c)}

    U places a channel on the input's voxels: where the architecture says that its cells look, or by the half-pixel rule
    where that is asked for or nothing else can be told.  x_b is ``fill`` everywhere; with the paper's 0 the copy is the
    product of mask and scan.  A channel of one value everywhere masks nothing and weighs 0.

    Scores are taken as they are, before any softmax over classes, as everywhere here.  The softmax over channels of the
    paper's Algorithm 1 is left out: it cancels S(x_b), gives weight to channels that speak against the score, and
    depends on the logit's scale.

    Parameters
    ----------
    layer, features, batch : as in :class:`ForwardCAM`
    fill : what hides a voxel, in the model's input units: 0, or air after your preprocessing

    Costs an inference for each channel that is not constant, and two more.
    """

    fill: float = 0.0

    id: ClassVar[str] = "score-cam"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self.id, fill=self.fill)

    def varied(self, activation: Tensor) -> Tensor:
        """Channels of more than one value."""
        cells = activation.flatten(2)
        return cells.amax(2) != cells.amin(2)

    def question(self, original: Original) -> Question:
        """How much the score rises where a channel's mask lets the scan through."""
        volume = original.volume
        alignment = _of_masks(original)
        hidden = original.ask(torch.full_like(volume, self.fill), 1)

        def ask(channels: Sequence[int]) -> list[Tensor]:
            masks = alignment.place(original.activation[:, channels], volume.shape[2:])
            low, high = (edge(masks, spatial(masks), keepdim=True) for edge in (torch.amin, torch.amax))
            masks = (masks - low) / (high - low).masked_fill(high == low, 1)
            copies = self.fill + masks.transpose(0, 1).unsqueeze(2).to(volume.dtype) * (volume - self.fill)
            told = original.ask(copies.flatten(0, 1), len(channels))
            return [seen - nothing for seen, nothing in zip(told, hidden, strict=True)]

        return ask


@dataclass(frozen=True)
class AblationCAM(ForwardCAM):
    r"""Ablation-CAM, Desai and Ramaswamy, WACV 2020: how much of the score goes when a channel is 0.

    .. math:: L_v = \max(0, \sum_c w_c A_{cv}), \qquad w_c = S - S_c

    with S_c the score with channel c of the layer set to 0.  The paper divides by S, the same for all channels: without
    the division the map has a unit, and is right too where S is near 0, where the quotient has no bound, and below 0,
    where it would turn evidence for the score into evidence against it.  For S > 0 the paper's map is this one / S.

    Costs an inference for each channel that is not 0 everywhere, of the network after the layer.  The network before it
    runs once for ``batch`` of them where the one after it takes more volumes than came in, which is tried out first,
    and for each of them where it does not, as with skip connections past the layer.
    """

    id: ClassVar[str] = "ablation-cam"

    def varied(self, activation: Tensor) -> Tensor:
        """Channels that are not 0 already."""
        return (activation != 0).flatten(2).any(2)

    def question(self, original: Original) -> Question:
        """How much the score falls."""
        ask = partial(_ablated, original, _may_part(original))

        def lost(channels: Sequence[int]) -> list[Tensor]:
            return [wide(whole) - rest for whole, rest in zip(original.scores, ask(channels), strict=True)]

        return lost


def _may_part(original: Original) -> bool:
    """Whether copies may be made of the layer's output: then they score as copies of the input do.

    Tried on a copy without a change, whose scores are known, and one without any of the channels.
    """
    everything = slice(None)
    try:
        parted = _ablated(original, True, [[], everything])
    except (ModelError, TargetError):
        return False
    return all(
        torch.allclose(ours, torch.stack([wide(score), *none]), rtol=0, atol=_rounding(score))
        for ours, none, score in zip(parted, _ablated(original, False, [everything]), original.scores, strict=True)
    )


def _rounding(score: Tensor) -> float:
    """How far a score may move when more volumes run at once."""
    return 100 * torch.finfo(score.dtype).eps * float(score.abs().amax())


def _ablated(original: Original, at_layer: bool, without: Sequence[Any]) -> list[Tensor]:
    """The scores, (copies, B) for each target, of a copy for each index into channels, which are 0 in it.

    The copies are made of the layer's output, or of the input.
    """
    model, count, batch = original.model, len(without), len(original.volume)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def part(layer: str, output: Tensor, trace: Trace) -> Tensor:
        cells = reader(layer, output, trace, original.volume)
        copies = [output.clone() for _ in without]
        for copy, channels in zip(copies, without, strict=True):
            cells(copy)[:, channels] = 0
        if output.untyped_storage().data_ptr() not in own:
            output.fill_(torch.nan)  # whoever reads it under another name, unchanged, is to be found out
        return torch.cat(copies)

    def ablate(layer: str, output: Tensor, trace: Trace) -> Tensor:
        cells = reader(layer, output, trace, volume)
        changed = output.clone()
        for copy, channels in enumerate(without):
            cells(changed)[copy * batch : (copy + 1) * batch, channels] = 0
        if output.untyped_storage().data_ptr() in own:
            return changed
        try:
            # In place, as in the graph cut: whoever has another name for this memory must see the change too.
            return output.copy_(changed)
        except RuntimeError:  # an expanded view cannot be written to
            return changed

    volume = plain(original.volume if at_layer else _copies(original.volume, count))
    with Calls(model, [original.layer], part if at_layer else ablate):
        return original.ask(volume, count)


def _copies(batch: Tensor, count: int) -> Tensor:
    """The whole batch ``count`` times, one after the other."""
    return batch.repeat(count, *[1] * (batch.ndim - 1))


def _of_masks(original: Original) -> Alignment:
    """Where masks made of the layer's channels lie: the same for every volume and target, whatever the map's rule."""
    same = original.activation  # only its size and its layer are looked at
    of = LayerMap("", original.layer, "", same, same, same, torch.mul)
    customary = HalfPixel()(original.model, original.volume, of)
    if original.align.id == HalfPixel.id or original.align.mirrors:
        return customary
    try:
        return Nominal()(original.model, original.volume, of)
    except AlignmentError:
        return customary
