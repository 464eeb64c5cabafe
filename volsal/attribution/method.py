"""What every attribution method has in common, and how several of them share passes through the model."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn

from volsal.attribution.alignment.alignment import Alignment, AlignmentRule, HalfPixel
from volsal.attribution.structure import bare
from volsal.attribution.tap import ModelError, precise, require_volumes
from volsal.attribution.targets.target import Target
from volsal.attribution.targets.target import score as score_of
from volsal.grid import Grid


def _silent(what: str, done: int, of: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True, eq=False)
class Context:
    """What a method may know besides the model, the volume and the targets.

    Attributes
    ----------
    align : finds where a layer's cells lie on the input; methods on the input's own voxels pass it by
    grid : where the model's input lies; needed by methods whose settings are in millimetres
    case : id of the case, for settings that name a file per case
    input_of : reads a scan's file as the model would see it, (1, C, *spatial); None where there is no preprocessing
    labels_of : reads a label map's file onto the model's input voxels, (*spatial), nearest label
    progress : told what is being done, how many steps of it are done, and of how many
    keep : folder in which a long method keeps what it has, to take it up again after a fault; None: nothing is kept
    folder : what relative paths in settings start from, as they do for ``input_of`` and ``labels_of``
    """

    align: AlignmentRule = field(default_factory=HalfPixel)
    grid: Grid | None = None
    case: str = ""
    input_of: Callable[[str | Path], Tensor] | None = None
    labels_of: Callable[[str | Path], Tensor] | None = None
    progress: Callable[[str, int, int], None] = _silent
    keep: Path | None = None
    folder: Path = Path()


PLAIN = Context()


@dataclass(frozen=True, eq=False)
class Attribution:
    """What a method gives for a batch.

    Attributes
    ----------
    maps : one raw map per target, (B, C or 1, *cells), signed, in :attr:`Method.unit`
    scores : one tensor (B,) per target: the numbers that were explained
    output : what the model returned, detached
    layer : the layer whose cells the maps lie on; None where they lie on the input's own voxels
    alignments : for each target, where the cells of the layer's map lie on the input; empty where no layer is asked
    coverage : activations that a backward rule was put on, by kind
    parts : for each target the map's parts, (B, P, *cells), where a method was asked for them; empty otherwise
    part_names : what the P parts are
    facts : for each target, what a reader of the map should know in figures, such as a convergence delta; plain data
    notes : the same in words, where something deserves a warning
    """

    maps: list[Tensor]
    scores: list[Tensor]
    output: Any
    layer: str | None = None
    alignments: Sequence[Alignment] = ()
    coverage: Mapping[str, int] = field(default_factory=dict)
    parts: Sequence[Tensor] = ()
    part_names: Sequence[str] = ()
    facts: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


class Method(ABC):
    """An attribution method: (model, volume, target) -> raw map, neither upsampled nor normalised.

    Subclasses are frozen dataclasses whose fields are the method's settings, and hashable: settings that hold tensors
    ask for ``eq=False``.  They are registered in ``volsal.METHODS`` under :attr:`id`.  A method either computes, in
    :meth:`run` (or for many at once, in :meth:`run_together`), or is made of others: then it names them in
    :meth:`ingredients` and puts them together in :meth:`compose`.  Whoever asks for several methods at once pays for
    each pass through the model only once.
    """

    id: ClassVar[str]
    #: The unit of the map's values.
    unit: ClassVar[str]
    #: Whether negative values are evidence against the score (True), or do not occur (False).
    signed: ClassVar[bool]

    def attribute(
        self, model: nn.Module, volume: Tensor, targets: Sequence[Target], context: Context = PLAIN
    ) -> Attribution:
        """Maps of ``volume`` (B, C, *spatial) for each target, from as few passes as the method allows."""
        return attribute(model, volume, [self], targets, context)[0]

    def run(self, model: nn.Module, volume: Tensor, targets: Sequence[Target], context: Context) -> Attribution:
        """What :meth:`attribute` gives, of a method that is not made of others."""
        raise NotImplementedError(f"{type(self).__name__} neither runs nor has ingredients")

    @classmethod
    def family(cls) -> type[Method] | None:
        """The class whose :meth:`run_together` takes this method and its kin at once; None where each runs alone."""
        return None

    @classmethod
    def run_together(
        cls, model: nn.Module, volume: Tensor, methods: Sequence[Any], targets: Sequence[Target], context: Context
    ) -> list[Attribution]:
        """One answer for each of ``methods``, all of this family."""
        return [method.run(model, volume, targets, context) for method in methods]

    @property
    def files(self) -> dict[str, list[str | Path]]:
        """By setting, the files, folders and patterns that it names; ``{case}`` stands for the case's id."""
        return {}

    def ingredients(self) -> tuple[Method, ...]:
        """The methods that this one is made of; empty for one that computes by itself."""
        return ()

    def compose(self, volume: Tensor, answers: Sequence[Attribution], context: Context) -> Attribution:
        """This method's answer, of its ingredients' answers on ``volume``."""
        raise NotImplementedError(f"{type(self).__name__} has ingredients and must put them together")

    @overload
    def __call__(self, model: nn.Module, volume: Tensor, target: Target) -> Tensor: ...
    @overload
    def __call__(self, model: nn.Module, volume: Tensor, target: Sequence[Target]) -> list[Tensor]: ...
    def __call__(self, model: nn.Module, volume: Tensor, target: Target | Sequence[Target]) -> Tensor | list[Tensor]:
        """The raw map of ``target``; for a sequence of targets a list of maps, from one forward pass.

        ``volume`` is (B, C, D, H, W), or (B, C, H, W) for a 2D model: the number of axes comes from the tensor.
        Neither model nor volume is changed, whatever happens.
        """
        if isinstance(target, Sequence):
            return self.attribute(model, volume, target).maps
        return self.attribute(model, volume, [target]).maps[0]


def attribute(
    model: nn.Module, volume: Tensor, methods: Sequence[Method], targets: Sequence[Target], context: Context = PLAIN
) -> list[Attribution]:
    """The answer of each method, from as few passes through the model as they allow together.

    Class activation maps of any kinds and layers come out of one pass, and what several methods are made of is
    computed once.  A model inside ``DataParallel`` or ``torch.compile`` runs without them.

    Raises
    ------
    ModelError
        Where the model is no module, or the volume no batch of volumes; other errors as the methods say.
    """
    model = bare(model)
    if not isinstance(model, nn.Module):
        raise ModelError(f"a model is a torch.nn.Module; got {type(model).__name__}: wrap what it does in one")
    require_volumes(volume)
    families: dict[Any, list[Method]] = {}
    for base in dict.fromkeys(base for method in methods for base in bases(method)):
        families.setdefault(base.family() or base, []).append(base)
    answers: dict[Method, Attribution] = {}
    # What is made between the passes must be of use in them, which inference mode's tensors are not.
    with torch.inference_mode(False), precise():
        for members in families.values():
            together = (members[0].family() or type(members[0])).run_together
            answers |= zip(members, together(model, volume, members, targets, context), strict=True)
        return [composed(method, volume, answers, context) for method in methods]


def bases(method: Method) -> list[Method]:
    """The methods that compute by themselves, of which ``method`` is made; itself, if it is one of them."""
    made_of = method.ingredients()
    return [base for part in made_of for base in bases(part)] if made_of else [method]


def composed(method: Method, volume: Tensor, answers: Mapping[Method, Attribution], context: Context) -> Attribution:
    """The method's answer, of the ``answers`` of its :func:`bases`."""
    made_of = method.ingredients()
    if not made_of:
        return answers[method]
    return method.compose(volume, [composed(part, volume, answers, context) for part in made_of], context)


def scores_of(targets: Sequence[Target], output: Any, batch: int) -> list[Tensor]:
    """Every target's checked score of one output; ValueError where there is no target."""
    if not targets:
        raise ValueError("no target given; pass at least one, as in volsal.ClassLogit(1)")
    return [score_of(target, output, batch) for target in targets]


def spatial(tensor: Tensor) -> tuple[int, ...]:
    """The spatial axes of (B, C, *spatial)."""
    return tuple(range(2, tensor.ndim))


def detached(output: Any) -> Any:
    """The model's output without its graph."""
    return torch.utils._pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, output)
