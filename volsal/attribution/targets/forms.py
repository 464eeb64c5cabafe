"""Targets by the names that configs and the command line use."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from volsal.attribution.targets.parts import Within
from volsal.attribution.targets.segmentation import (
    Component,
    ComponentAt,
    Labels,
    Position,
    Predicted,
    Region,
    Segment,
    Voxel,
    Where,
)
from volsal.attribution.targets.similarity import CosineSimilarity
from volsal.attribution.targets.target import (
    ClassLogit,
    ClassMargin,
    OneOutput,
    PredictedClass,
    SingleOutput,
    Target,
    TargetError,
)
from volsal.errors import nearest


def parse_target(text: str | int, classes: Sequence[str] = (), folder: Path | None = None) -> Target:
    """The target that a config or the command line names.

    ============================================  =====================================================================
    ``predicted-class``                           the logit of the class with the largest
    ``class-1``, ``1``, or a class's name         that class's logit; a label's, of a multi-label model
    ``margin-1-0``                                logit of class 1 less that of class 0
    ``regression``, ``output-2``                  the model's single number; one of several
    ``similar:scans/reference.nii.gz``            cosine similarity of the model's embeddings of scan and reference
    ``segment-1``                                 a segmentation's logit of class 1, summed over what is predicted as it
    ``region-0``                                  the same of a channel that speaks for itself, as after a sigmoid
    ``segment-1-largest``,                        ... over one connected component of that, by size,
    ``segment-1-component-2``
    ``segment-1-component-at-voxel-10-20-30``,    ... or the one that holds a voxel
    ``segment-1-component-at-mm-12.5,-30,7``
    ``segment-1-voxel-10-20-30``                  ... over one voxel of the output
    ``segment-1-mm-12.5,-30,7``                   ... over the one at a position in the scan's world, mm, RAS+
    ``segment-1-in:masks/{case}.nii.gz``,         ... over a label map's voxels that are not 0, or that have label 3;
    ``segment-1-in:organs.nii.gz#3``              ``{case}`` is the case's id
    ``logits/class-1``, ``0/segment-1``,          any of these, of a part of a dict, tuple or list (or of heads stacked
    ``seg.main/segment-1``                        along the second axis)
    ============================================  =====================================================================

    Parameters
    ----------
    text : one of these forms; a class's name may stand for its number
    classes : the names of the model's classes
    folder : what relative paths start from; they stay as they are where None

    Raises
    ------
    TargetError
        For any other text, with the nearest form.

    >>> parse_target("class-1") == parse_target(1) == parse_target("lesion", classes=["healthy", "lesion"])
    True
    """
    name = str(text).strip()
    if name in classes and not isinstance(text, int):
        return ClassLogit(_index_of(name, classes))
    if part := re.fullmatch(r"([^/:]+)/(.+)", name):
        return Within(part[1], parse_target(part[2], classes, folder))
    form, colon, path = _numbered(name, classes).partition(":")
    if colon:
        path = str((folder or Path()) / Path(path).expanduser())
    for pattern, make in _FORMS:
        if match := re.fullmatch(pattern, f"{form}{colon}{path}"):
            return make(*match.groups())
    known = ["predicted-class", "class-0", "margin-1-0", "regression", "output-0", "segment-1", "region-0", *classes]
    raise TargetError(f"unknown target {name!r}{nearest(name, known)} (e.g. class-1, margin-1-0, segment-1-largest)")


def _where(text: str | None) -> Where:
    for pattern, make in _WHERES:
        if match := re.fullmatch(pattern, text or ""):
            return make(*match.groups())
    known = [
        "largest",
        "component-2",
        "component-at-voxel-10-20-30",
        "voxel-10-20-30",
        "mm-12.5,-30,7",
        "in:mask.nii.gz",
    ]
    raise TargetError(f"which voxels are {text!r}{nearest(str(text), known)}? (e.g. {', '.join(known)})")


def _holding(make: Callable[..., Voxel | Position]) -> Callable[..., Where]:
    return lambda *groups: ComponentAt(make(*groups))


def _mm(text: str) -> float:
    """``p30`` -> -30: 30 mm to the back."""
    return float(text[1:]) * (-1 if text[0] in "lpi" else 1)


def _index_of(name: str, classes: Sequence[str]) -> int:
    index = list(classes).index(name)
    if name.isdigit() and int(name) != index:
        raise TargetError(
            f"{name!r} is both an index and the name of class {index}; write class-{index} or class-{name}"
        )
    return index


def _numbered(text: str, classes: Sequence[str]) -> str:
    """``segment-liver-largest`` -> ``segment-2-largest``, where liver is the name of class 2."""
    kind, dash, rest = text.partition("-")
    if kind in ("segment", "region") and dash:
        for name in sorted(classes, key=len, reverse=True):
            if re.match(rf"{re.escape(name)}(-|$)", rest):
                return f"{kind}-{_index_of(name, classes)}{rest[len(name) :]}"
    return text


_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"

_FORMS: list[tuple[str, Callable[..., Target]]] = [
    (r"predicted-class|predicted", lambda: PredictedClass()),
    (r"(?:class-)?(\d+)", lambda index: ClassLogit(int(index))),
    (r"margin-(\d+)-(\d+)", lambda of, against: ClassMargin(int(of), int(against))),
    (r"regression", lambda: SingleOutput()),
    (r"output-(\d+)", lambda index: OneOutput(int(index))),
    (r"similar:(.+)", lambda path: CosineSimilarity(path)),
    (r"segment-(\d+)(?:-(.+))?", lambda index, where: Segment(int(index), _where(where))),
    (r"region-(\d+)(?:-(.+))?", lambda index, where: Region(int(index), _where(where))),
]

_VOXELS: list[tuple[str, Callable[..., Voxel | Position]]] = [
    (r"voxel-(\d+(?:-\d+)*)", lambda index: Voxel(tuple(int(n) for n in index.split("-")))),
    (rf"mm-({_NUMBER}),({_NUMBER}),({_NUMBER})", lambda x, y, z: Position((float(x), float(y), float(z)))),
    # As a position's id has it.
    (rf"mm-([lr]{_NUMBER})-([pa]{_NUMBER})-([is]{_NUMBER})", lambda x, y, z: Position((_mm(x), _mm(y), _mm(z)))),
]

_WHERES: list[tuple[str, Callable[..., Where]]] = [
    (r"", lambda: Predicted()),
    (r"largest", lambda: Component()),
    (r"component-(\d+)", lambda number: Component(int(number))),
    (r"in:(.+?)(?:#(\d+))?", lambda path, label: Labels(path, None if label is None else int(label))),
    *_VOXELS,
    *((f"component-at-{pattern}", _holding(make)) for pattern, make in _VOXELS),
]
