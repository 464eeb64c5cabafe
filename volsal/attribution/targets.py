"""The scalar that is explained: one score per volume, taken from the model's output before any softmax.

A target is any callable from the model's output to a tensor (B,).  The classes below are the usual ones; each has an
``id`` for file names and a sentence that says what it is.  To add one: a frozen dataclass here and its line in
:func:`parse_target`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from volsal.errors import VolsalError, nearest

Target = Callable[[Any], Tensor]


class TargetError(VolsalError, ValueError):
    """The score that was asked for cannot be taken from what the model returns."""


@dataclass(frozen=True)
class ClassLogit:
    """The logit of one class.  Output (B, K) -> scores (B,)."""

    index: int

    @property
    def id(self) -> str:
        """``class-1``."""
        return f"class-{self.index}"

    def __str__(self) -> str:
        return f"logit of class {self.index}"

    def __call__(self, output: Any) -> Tensor:
        """z_index of each volume."""
        return _logits(output, self.index)[:, self.index]


@dataclass(frozen=True)
class PredictedClass:
    """The logit of the class with the largest logit, scan by scan.  Output (B, K), K > 1 -> scores (B,)."""

    id = "predicted-class"

    def __str__(self) -> str:
        return "logit of the predicted class"

    def __call__(self, output: Any) -> Tensor:
        """The largest logit of each volume."""
        logits = _logits(output)
        if logits.shape[1] == 1:
            raise TargetError(
                "the model has a single output, so there is no predicted class; explain the output itself with the "
                "target 'regression' (volsal.SingleOutput())"
            )
        return logits.gather(1, logits.argmax(1, keepdim=True))[:, 0]

    def fixed(self, output: Any) -> Target:
        """The logits of the classes that were predicted in ``output``."""
        predicted = output.detach().argmax(1, keepdim=True)
        return lambda other: other.gather(1, tiled(predicted, len(other)))[:, 0]


@dataclass(frozen=True)
class ClassMargin:
    """How much more the model speaks for one class than for another: z_of - z_against.  (B, K) -> (B,)."""

    of: int
    against: int

    def __post_init__(self) -> None:
        if self.of == self.against:
            raise TargetError(f"the margin of class {self.of} over itself is 0 for every scan; name two classes")

    @property
    def id(self) -> str:
        """``margin-1-0``."""
        return f"margin-{self.of}-{self.against}"

    def __str__(self) -> str:
        return f"logit of class {self.of} minus logit of class {self.against}"

    def __call__(self, output: Any) -> Tensor:
        """z_of - z_against of each volume."""
        logits = _logits(output, self.of, self.against)
        return logits[:, self.of] - logits[:, self.against]


@dataclass(frozen=True)
class SingleOutput:
    """The one number of a regression model, or the one logit of a sigmoid classifier.  (B,) or (B, 1) -> (B,)."""

    id = "regression"

    def __str__(self) -> str:
        return "the model's single output"

    def __call__(self, output: Any) -> Tensor:
        """The output itself."""
        if not isinstance(output, Tensor) or output.ndim > 2 or (output.ndim == 2 and output.shape[1] != 1):
            raise TargetError(
                f"the target 'regression' explains a model with one output, (B, 1); this one returns "
                f"{_describe(output)}; choose a class instead, as in class-0"
            )
        return output.reshape(-1)


def _logits(output: Any, *classes: int) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise TargetError(
            f"a class target needs an output (B, classes); this model returns {_describe(output)}; pass a callable "
            "that takes this output and returns one score per volume, (B,)"
        )
    for index in classes:
        if not 0 <= index < output.shape[1]:
            raise TargetError(
                f"class {index} asked for, but the model has {output.shape[1]} "
                f"{'class, 0' if output.shape[1] == 1 else f'classes, 0 to {output.shape[1] - 1}'}"
            )
    return output


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, dict):
        return f"a dict with keys {', '.join(map(repr, output))}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)}: {', '.join(map(_describe, output))}"
    return f"a {type(output).__name__}"


_FORMS: list[tuple[str, Callable[..., Target]]] = [
    (r"predicted-class|predicted", lambda: PredictedClass()),
    (r"(?:class-)?(\d+)", lambda index: ClassLogit(int(index))),
    (r"margin-(\d+)-(\d+)", lambda of, against: ClassMargin(int(of), int(against))),
    (r"regression", lambda: SingleOutput()),
]


def parse_target(text: str | int, classes: Sequence[str] = ()) -> Target:
    """The target that a config or the command line names.

    ``predicted-class``, ``class-1`` (or just ``1``, or the class's name where ``classes`` gives names), ``margin-1-0``
    and ``regression``.

    >>> parse_target("class-1") == parse_target(1) == parse_target("lesion", classes=["healthy", "lesion"])
    True
    """
    name = str(text).strip()
    if name in classes and not isinstance(text, int):
        index = list(classes).index(name)
        if name.isdigit() and int(name) != index:
            raise TargetError(
                f"{name!r} is both an index and the name of class {index}; write class-{index} or class-{name}"
            )
        return ClassLogit(index)
    for pattern, make in _FORMS:
        if match := re.fullmatch(pattern, name):
            return make(*match.groups())
    known = ["predicted-class", "class-0", "margin-1-0", "regression", *classes]
    raise TargetError(f"unknown target {name!r}{nearest(name, known)} (e.g. class-1, margin-1-0)")


def target_id(target: Target) -> str:
    """The target's id for file names: its ``id``, else its function's name reduced to a-z, 0-9 and hyphens."""
    name = getattr(target, "id", None) or getattr(target, "__name__", type(target).__name__)
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-") or "custom"


def fixed(target: Target, output: Any) -> Target:
    """``target`` with every choice that it makes by looking at the output made once and for all, on ``output``.

    A changed copy of a scan must be asked the same question as the scan: the logit of the class that was predicted for
    the scan, the mask that was predicted for it.  What comes back takes outputs of any whole number of copies of the
    batch, the copies of the whole batch one after the other.  A target that makes such choices has a method ``fixed``.
    """
    choose = getattr(target, "fixed", None)
    return choose(output) if choose else target


def tiled(values: Tensor, batch: int) -> Tensor:
    """``values`` (B, ...) repeated along the first axis for ``batch`` = n * B volumes: copies of the whole batch."""
    return values.repeat(batch // len(values), *(1,) * (values.ndim - 1)) if batch != len(values) else values


def score(target: Target, output: Any, batch: int) -> Tensor:
    """``target(output)``, checked: one finite number per volume.  -> (B,)

    Raises
    ------
    TargetError
        For a wrong class, a wrong shape, or a score that is NaN or infinite.
    """
    value = target(output)
    if isinstance(value, Tensor) and batch == 1 and value.ndim == 0:
        value = value.reshape(1)
    if not isinstance(value, Tensor) or tuple(value.shape) != (batch,):
        raise TargetError(
            f"target {target_id(target)!r} must return one score per volume, ({batch},); it returned {_describe(value)}"
        )
    if not torch.isfinite(value).all():
        shown = ", ".join(f"{number:g}" for number in value.detach().flatten()[:4].tolist())
        raise TargetError(
            f"the model's score ({target}) is {shown}: NaN or infinity has no gradient to explain; check the weights "
            "and the input's intensity range"
        )
    return value
