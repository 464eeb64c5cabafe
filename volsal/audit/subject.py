"""A scan as the model sees it, ready to be asked: its score, its maps, and which of its voxels are the patient.

All of the audit's figures are taken on the voxels of the model's input: there the score is computed, and there anything
that is removed from a scan is removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from volsal.attribution import Attribution, Context, Method, Target, attribute, explain_windows
from volsal.attribution.inputs import Given
from volsal.attribution.settings import SettingError
from volsal.attribution.tap import forward, plain, undisturbed
from volsal.attribution.targets.target import fixed
from volsal.attribution.targets.target import score as score_of
from volsal.attribution.windows.windowed import Windowed
from volsal.audit.anatomy import Body, body_mask, outside_of, padding_of
from volsal.audit.metric import Undefined, flaw_of
from volsal.errors import VolsalError
from volsal.explain import Explainer, Ready
from volsal.grid import Grid
from volsal.resampling import resample
from volsal.scans.find import Case


@dataclass(frozen=True, eq=False)
class Subject:
    """One scan under one model, and the score that is explained.

    Attributes
    ----------
    case : its id
    ready : the scan, and what the model sees of it
    volume : (1, C, I, J, K) the model's input
    grid : where that lies
    body : where the patient is, on ``grid``
    padding : (I, J, K) what no scanner saw: the scan's own padding, and what lies outside its field
    output : what the model says of the volume
    target : the score, with the choices it makes made once, on ``output``
    answer : what the model says in words: ``class 1``, by its name where it has one, or ``the output``
    model : the explainer's; where it has further inputs, as a model of the volume alone, this scan's others held
    """

    case: str
    ready: Ready
    volume: Tensor
    grid: Grid
    body: Body
    padding: NDArray[np.bool_]
    output: Any
    target: Target
    answer: str
    explainer: Explainer
    context: Context
    model: nn.Module

    def score(self, volumes: Tensor) -> Tensor:
        """(N,) scores of volumes (N, C, I, J, K), of the question that was asked of the scan."""
        return score_of(self.target, self._said(volumes), len(volumes))

    def answer_to(self, volumes: Tensor) -> str:
        """What the model says of another volume, as :attr:`answer`."""
        return answer_of(self._said(volumes), self.explainer.classes)

    def _said(self, volumes: Tensor) -> Any:
        model, windows = self.model, self.explainer.windows
        asked = model if windows is None else Windowed(model, windows)
        with undisturbed(asked), torch.no_grad():
            return forward(asked, plain(volumes))

    def maps(
        self,
        methods: Mapping[str, Method],
        volume: Tensor | None = None,
        model: nn.Module | None = None,
        context: Context | None = None,
    ) -> dict[str, NDArray | Undefined]:
        """The methods' signed maps (I, J, K) on :attr:`grid`, by name; why not where a method does not cover the model.

        ``volume`` in place of the scan's own; ``model`` in place of the explainer's; ``context`` in place of
        :attr:`context`.
        """
        volume = self.volume if volume is None else volume
        context = context or self.context
        try:
            found = self._attribute(list(methods.values()), volume, model, context)
            return dict(zip(methods, (self._placed(one) for one in found), strict=True))
        except VolsalError as error:
            if len(methods) == 1:
                return dict.fromkeys(methods, Undefined(str(error)))
        alone = [self.maps({name: method}, volume, model, context) for name, method in methods.items()]
        return {name: one for each in alone for name, one in each.items()}

    def _attribute(
        self, methods: Sequence[Method], volume: Tensor, model: nn.Module | None, context: Context
    ) -> list[Attribution]:
        model = self.model if model is None else self._held_by(model)
        if self.explainer.windows is None:
            return attribute(model, volume, methods, [self.target], context)
        return explain_windows(model, volume, methods, [self.target], self.explainer.windows, context)

    def _held_by(self, model: nn.Module) -> nn.Module:
        """Another model with this scan's further inputs, where there are any."""
        if not isinstance(self.model, Given):
            return model
        if not isinstance(model, Given):
            return Given(model, *self.model.inputs, explained=self.model.explained, **self.model.named)
        model.hold(*self.model.inputs, **self.model.named)
        return model

    def _placed(self, found: Attribution) -> NDArray | Undefined:
        raw = found.maps[0][0].float().cpu().sum(0)
        grid = found.alignments[0].grid(self.grid, raw.shape) if found.layer and found.alignments else self.grid
        values = resample(raw, grid, self.grid, field=self.grid).numpy() if found.layer else raw.numpy()
        return flaw_of(values) or values

    @property
    def log_odds(self) -> bool:
        """Whether the model's outputs are logits of classes, whose unit is known."""
        return in_log_odds(self.output, self.explainer.classes)

    def says(self, volume: Tensor) -> list[float]:
        """The model's outputs for another volume; the score alone where they are no plain numbers."""
        output = self._said(volume)
        if isinstance(output, Tensor) and output.ndim <= 2:
            return [float(x) for x in output.flatten()]
        return [float(score_of(self.target, output, 1)[0])]


def subject_of(explainer: Explainer, case: Case, target: int = 0, **reading: Any) -> Subject:
    """Read a case, and ask the model about it.

    Parameters
    ----------
    explainer : its methods are not asked; of its targets the one of that number is explained
    reading : as for :func:`volsal.scans.read_case`

    Raises
    ------
    VolsalError
        As for an :class:`volsal.explain.Explainer`.
    """
    ready = explainer.prepare(case.paths, case.id, **reading)
    volume, grid = explainer.to_model(ready.model_input.tensor), ready.model_input.grid
    context = explainer.context(grid, case.id, ready.scan, **reading)
    model = _model_of(explainer, case, context)
    asked = explainer.targets_for(context, model)[target]
    whole = model if explainer.windows is None else Windowed(model, explainer.windows)
    with undisturbed(whole), torch.no_grad():
        output = forward(whole, plain(volume))
        score_of(asked, output, 1)
    said = answer_of(output, explainer.classes)
    body, padding = body_on(grid, ready), padding_on(grid, ready)
    settled = fixed(asked, output)
    return Subject(case.id, ready, volume, grid, body, padding, output, settled, said, explainer, context, model)


def _model_of(explainer: Explainer, case: Case, context: Context) -> nn.Module:
    """The model of a scan, in a module of its own where it holds the case's further inputs: subjects live together."""
    shared = explainer._model_with(case.given or None, 0, context)
    if not isinstance(shared, Given):
        return shared
    if explainer.align.mirrors:
        raise SettingError(f"{explainer.align.id} alignment mirrors the scan and not the other inputs; use another")
    return Given(explainer.model, explained=0, **shared.named)


def answer_of(output: Any, classes: Sequence[str] = ()) -> str:
    """What a model says of one volume, in words; the same for whatever it says where that is no class.

    A single output of a model with two classes is the log odds of the second.
    """
    if not in_log_odds(output, classes):
        return "the output"
    index = int(output.flatten()[0] > 0) if output.numel() == 1 else int(output[0].argmax())
    return f"class {index} ({classes[index]})" if index < len(classes) else f"class {index}"


def in_log_odds(output: Any, classes: Sequence[str] = ()) -> bool:
    """Whether the outputs of one volume are logits of classes."""
    if not isinstance(output, Tensor) or output.ndim > 2:
        return False
    return output.numel() > 1 or len(classes) == 2


def body_on(grid: Grid, ready: Ready) -> Body:
    """The body of a scan on other voxels; where it is not sure all of them."""
    scan = ready.scan
    found = body_mask(scan.array, scan.grid)
    if not found.sure:
        return Body(np.ones(grid.shape, bool), False, found.said)
    mask = resample(found.mask.astype(np.float32), scan.grid, grid) >= 0.5
    if not mask.any():
        return Body(np.ones(grid.shape, bool), False, "the whole field, since the model sees nothing of the body")
    return Body(mask, True, found.said)


def padding_on(grid: Grid, ready: Ready) -> NDArray[np.bool_]:
    """(I, J, K) the voxels of ``grid`` that show no measurement: the scan's padding, and what lies outside of it."""
    scan = ready.scan
    inside = resample(padding_of(scan.array).astype(np.float32), scan.grid, grid) >= 0.5
    return inside | outside_of(grid, scan.grid)
