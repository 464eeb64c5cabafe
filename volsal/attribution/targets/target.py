"""The scalar that is explained: one score per volume, taken from the model's output before any softmax.

A target is any callable from the model's output to a tensor (B,), whatever that output is: of a detector's list of
boxes, ``lambda output: torch.stack([one["scores"].max() for one in output])``.  The classes below are the usual ones,
those for segmentations are in :mod:`volsal.attribution.targets.segmentation`.  A target may have, besides, any of

- ``id``, for file names, and ``__str__``, a sentence that says what it is;
- ``fixed(output)``: the target with the choices it makes from the output made once, see :func:`fixed`;
- ``placed(context, output_of)``: the target for one scan, see :func:`placed`;
- ``facts(output)``: for each volume what a reader of its map should know, as plain data;
- ``files``: the files it reads, ``{case}`` standing for the case's id;
- ``within(slices)``: its share in a part of a segmentation's output.

To add one: a frozen dataclass, and its text form in :mod:`volsal.attribution.targets.forms`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from volsal.errors import VolsalError

if TYPE_CHECKING:
    from volsal.attribution.method import Context

Target = Callable[[Any], Tensor]
#: What the model returns for a scan's file.
OutputOf = Callable[[str | Path], Any]


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
    """The logit of the class with the largest logit, scan by scan.  Output (B, K), K > 1 -> scores (B,).

    For classes that exclude each other.  Of a multi-label model it is the strongest label alone, and others may be
    predicted too: name each label as a :class:`ClassLogit`.
    """

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
                f"{described(output)}{advice(output)}"
            )
        return output.reshape(-1)


@dataclass(frozen=True)
class OneOutput:
    """One number of a regression model with several.  Output (B,) or (B, N) -> scores (B,)."""

    index: int

    @property
    def id(self) -> str:
        """``output-2``."""
        return f"output-{self.index}"

    def __str__(self) -> str:
        return f"output {self.index}"

    def __call__(self, output: Any) -> Tensor:
        """That number of each volume."""
        if not isinstance(output, Tensor) or output.ndim not in (1, 2):
            raise TargetError(
                f"the target {self.id!r} needs an output (B, numbers); this model returns {described(output)}"
                f"{advice(output)}"
            )
        numbers = output.reshape(len(output), -1)
        if not 0 <= self.index < numbers.shape[1]:
            raise TargetError(f"output {self.index} asked for, but the model has {numbers.shape[1]}, counted from 0")
        return numbers[:, self.index]


@dataclass(frozen=True)
class Named:
    """A target under a name of one's own, as of a function: ``Named("widest box", lambda output: ...)``."""

    id: str
    target: Target

    def __str__(self) -> str:
        return str(self.target) if hasattr(self.target, "id") else self.id

    @property
    def files(self) -> tuple[str, ...]:
        """The files it reads."""
        return getattr(self.target, "files", ())

    @property
    def within(self) -> Any:
        """The target's own."""
        return getattr(self.target, "within", None)

    def __call__(self, output: Any) -> Tensor:
        """The target's score."""
        return self.target(output)

    def fixed(self, output: Any) -> Target:
        """See :func:`fixed`."""
        return replace(self, target=fixed(self.target, output))

    def placed(self, context: Context, output_of: OutputOf) -> Target:
        """See :func:`placed`."""
        return replace(self, target=placed(self.target, context, output_of))

    def facts(self, output: Any) -> list[dict[str, Any]]:
        """See :func:`facts`."""
        return facts(self.target, output)


def _logits(output: Any, *classes: int) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise TargetError(
            f"a class target needs an output (B, classes); this model returns {described(output)}{advice(output)}"
        )
    for index in classes:
        if not 0 <= index < output.shape[1]:
            raise TargetError(
                f"class {index} asked for, but the model has {output.shape[1]} "
                f"{'class, 0' if output.shape[1] == 1 else f'classes, 0 to {output.shape[1] - 1}'}"
            )
    return output


def described(output: Any) -> str:
    """What a model returned, in a few words."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a dict with keys {', '.join(map(repr, output))}"
    if isinstance(output, (tuple, list)):
        listed = ", ".join(map(described, output[:8])) + (", ..." if len(output) > 8 else "")
        return f"a {type(output).__name__} of {len(output)}: {listed}"
    return f"a {type(output).__name__}"


def advice(output: Any) -> str:
    """Which targets there are for such an output."""
    if isinstance(output, Tensor) and output.ndim == 2:
        return "; choose one of them, as in output-0 or class-0"
    if isinstance(output, Tensor) and output.ndim > 2:
        return "; for a segmentation write segment-1, or pass a callable that returns one score per volume, (B,)"
    if isinstance(output, (Mapping, tuple, list)) and len(output):
        first = next(iter(output)) if isinstance(output, Mapping) else 0
        return (
            f"; choose a part of it, as in {first}/class-1, or pass a callable that returns one score per volume, (B,)"
        )
    return "; pass a callable that takes this output and returns one score per volume, (B,)"


def target_id(target: Target) -> str:
    """The target's id for file names: its ``id``, else its function's name, reduced to a-z, 0-9, dots and hyphens."""
    name = getattr(target, "id", None) or getattr(target, "__name__", type(target).__name__)
    return _reduced(str(name)) or "custom"


def told(target: Target) -> str:
    """The target in words, as far as it says."""
    return str(target) if hasattr(target, "id") else target_id(target)


# Room for the case, the method and the suffix in a file name of 255 bytes.
_LONGEST_ID = 72


def _reduced(name: str) -> str:
    plain = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")
    if len(plain) <= _LONGEST_ID:
        return plain
    return f"{plain[: _LONGEST_ID - 9].strip('-.')}-{sha256(name.encode()).hexdigest()[:8]}"


def path_id(path: str) -> str:
    """A file's name for ids: without folder, suffixes and ``{case}``."""
    name = Path(path).name.replace("{case}", "")
    return _reduced(re.sub(r"(\.[A-Za-z]+)+$", "", name)) or "file"


def case_file(path: str, context: Context) -> str:
    """``path`` with the case's id where it says ``{case}``."""
    return path.replace("{case}", context.case)


def distinct(targets: Sequence[Target]) -> list[Target]:
    """The same targets, numbered where two have one id, so that their files differ.

    Raises
    ------
    TargetError
        Where one stands there twice.
    """
    found: list[Target] = []
    taken: set[str] = set()
    for target in targets:
        own = target_id(target)
        if target in targets[: len(found)]:
            raise TargetError(f"targets must be given each once; got {own} twice")
        name, number = own, 1
        while name in taken:
            number += 1
            name = f"{own}-{number}"
        taken.add(name)
        found.append(target if name == own else Named(name, target))
    return found


def placed(target: Target, context: Context, output_of: OutputOf) -> Target:
    """``target`` for one scan: what it says in millimetres, or by files, found there.

    ``output_of`` gives what the model returns for another scan's file.  A target that needs any of it has a method
    ``placed``.
    """
    place = getattr(target, "placed", None)
    return place(context, output_of) if place else target


def facts(target: Target, output: Any) -> list[dict[str, Any]]:
    """For each volume of ``output`` what the target has to say of it; empty where it has nothing to say."""
    say = getattr(target, "facts", None)
    return say(output) if say else []


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
        For a wrong class, a wrong shape, or a score that is NaN or infinite; for a function that fails.
    """
    if not callable(target):
        raise TargetError(
            f"a target is a callable, such as volsal.ClassLogit(1), not {target!r}; volsal.parse_target reads its text"
        )
    try:
        value = target(output)
    except (VolsalError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise TargetError(
            f"target {target_id(target)!r} fails on what the model returns, {described(output)}: "
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        ) from error
    if isinstance(value, Tensor) and batch == 1 and value.ndim == 0:
        value = value.reshape(1)
    if not isinstance(value, Tensor) or tuple(value.shape) != (batch,):
        raise TargetError(
            f"target {target_id(target)!r} must return one score per volume, ({batch},); it returned {described(value)}"
        )
    if not torch.isfinite(value).all():
        shown = ", ".join(f"{number:g}" for number in value.detach().flatten()[:4].tolist())
        raise TargetError(
            f"the model's score ({target}) is {shown}: NaN or infinity has no gradient to explain; check the weights "
            "and the input's intensity range"
        )
    return value
