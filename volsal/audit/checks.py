"""What is asked of a few scans only, for it costs more: does the map hang on what was learned, and on what was asked?

:func:`deepen` adds to what was found of a method in a scan (:mod:`volsal.audit.examine`)

``sanity``     how alike the map is, in the body, to that of random weights, by measure
               (:class:`volsal.audit.similarity.Similarity`)
``stability``  ``kept``: the share of harmlessly changed copies in which the peak stays; ``overlap``: top Dice with
               their maps, mean; ``copies``; ``by``: by change how alike the maps are

and :func:`check`, over the whole field, since evidence may lie anywhere,

``cascading``, ``independent``  how alike the map is to those of models with the last so many layers random, or that one
                                alone: a list of ``layer``, ``randomised`` (how many), ``of`` (all there are), measures
``unrelated``     the same to the map of another scan: what nothing in common looks like
``random labels`` to the map of a model trained on shuffled labels, where there is one
``other outputs`` to the maps for other outputs of the model, by output
``areas``         :func:`volsal.audit.faithfulness.delta_areas`

:func:`agreement_of` says how alike the maps of several methods are, each pair beside a pair of which one was displaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from volsal.attribution import ClassLogit, Method, OneOutput, PredictedClass, Target
from volsal.attribution.inputs import Given
from volsal.audit.examine import plain, unmeasured
from volsal.audit.faithfulness import Scorer, delta_areas, displaced, removed
from volsal.audit.metric import Undefined
from volsal.audit.sanity import parameterised, randomisation
from volsal.audit.similarity import MEASURES, Compared, Similarity, similarity
from volsal.audit.stability import Gain, Mirror, Movement, Noise, Nuisance, Stability, stability
from volsal.audit.subject import Subject
from volsal.config import AuditSection

_STILL: tuple[Nuisance, ...] = (Noise(), Gain())
_MOVED: tuple[Nuisance, ...] = (Movement(), Movement((0.0, 0.0, 0.0), (3.0, 2.0, 4.0)))
# The cascade is looked at in so many places, evenly spaced, of which the last is the whole model.
_DEPTHS = 4
# The map is compared with those of so many other outputs, those that the model speaks for most.
_OTHERS = 3
# What comparing a map with others needs of it is kept for as many maps as fit, and found again for the rest.
_BYTES, _BYTES_PER_VOXEL = 2**31, 50

Methods = Mapping[str, Method]


def deepen(
    found: dict[str, dict[str, Any]], subject: Subject, methods: Methods, twin: nn.Module, settings: AuditSection
) -> None:
    """Add ``sanity`` and ``stability`` of some methods; ``twin`` is the model with random weights."""
    for name, method in _having_maps(found, methods).items():
        trained, random = (_map(subject, method, model=model) for model in (None, twin))
        found[name]["sanity"] = alike(_beside(trained, random, subject, subject.body.mask))
        found[name]["stability"] = _stability(subject, method, settings)


def check(
    found: dict[str, dict[str, Any]],
    subject: Subject,
    methods: Methods,
    settings: AuditSection,
    other: Subject | Undefined,
    shuffled: nn.Module | None = None,
) -> None:
    """Add all the rest of some methods.

    Parameters
    ----------
    other : another scan, whose maps have nothing to do with this one's; or why there is none
    shuffled : the model, trained on shuffled labels
    """
    for name, method in _having_maps(found, methods).items():
        trained = _map(subject, method)
        found[name] |= {
            **_randomisation(subject, method),
            "unrelated": _unrelated(trained, subject, method, other),
            "other outputs": _random_logit(trained, subject, method),
            "areas": _areas(subject, method, settings),
        }
        if shuffled is not None:
            found[name]["random labels"] = alike(_beside(trained, _map(subject, method, model=shuffled), subject))


def alike(found: Similarity | Undefined) -> dict[str, Any]:
    """How alike two maps are, as plain data."""
    if isinstance(found, Undefined):
        return {name: plain(found) for name in MEASURES}
    return {name: plain(getattr(found, name)) for name in MEASURES}


def _having_maps(found: Mapping[str, Mapping[str, Any]], methods: Methods) -> dict[str, Method]:
    return {name: method for name, method in methods.items() if "undefined" not in found[name]}


def _map(subject: Subject, method: Method, volume: Tensor | None = None, model: nn.Module | None = None) -> Any:
    """The map (I, J, K), or why it has no place, by a rule that is the same for whatever weights."""
    return subject.maps({"": method}, volume, model, unmeasured(subject))[""]


def _filled(values: NDArray | Undefined, subject: Subject) -> NDArray:
    """A map that has no place as one of zeros, of which no similarity is defined."""
    return np.zeros(subject.grid.shape, np.float32) if isinstance(values, Undefined) else values


def _beside(
    one: NDArray | Undefined, other: NDArray | Undefined, subject: Subject, within: NDArray[np.bool_] | None = None
) -> Similarity | Undefined:
    for values in (one, other):
        if isinstance(values, Undefined):
            return values
    assert not isinstance(one, Undefined)
    assert not isinstance(other, Undefined)
    return similarity(one, other, subject.grid, within)


def _stability(subject: Subject, method: Method, settings: AuditSection) -> dict[str, Any]:
    def explain(volume: Tensor) -> NDArray:
        return _filled(_map(subject, method, volume), subject)

    changes = _nuisances(subject, settings)
    found = stability(explain, subject.answer_to, subject.volume, subject.grid, changes)
    copies = [one for each in found for one in each.similarities]
    stays = [not isinstance(one.peak_mm, Undefined) and one.peak_mm <= settings.radius_mm for one in copies]
    overlaps = [0.0 if isinstance(one.top_dice, Undefined) else one.top_dice for one in copies]
    none = plain(Undefined("the model's answer changed under every change"))
    return {
        "kept": float(np.mean(stays)) if copies else none,
        "overlap": float(np.mean(overlaps)) if copies else none,
        "copies": len(copies),
        "by": {one.nuisance: alike(_first(one)) for one in found},
    }


def _first(one: Stability) -> Similarity | Undefined:
    return one.similarities[0] if one.similarities else Undefined("the model's answer changed")


def _nuisances(subject: Subject, settings: AuditSection) -> list[Nuisance]:
    """Movements are left out where the model is given other images, which would stay behind."""
    held = subject.model.held.values() if isinstance(subject.model, Given) else ()
    if any(isinstance(value, Tensor) and value.ndim > 2 for value in held):
        return list(_STILL)
    sides = next(axis for axis, code in enumerate(subject.grid.orientation) if code in "LR")
    return [*_STILL, *_MOVED, *([Mirror(sides)] if settings.mirror else [])]


def _randomisation(subject: Subject, method: Method) -> dict[str, list[dict[str, Any]]]:
    volume = subject.explainer.at_once(subject.volume)
    layers = parameterised(subject.model, volume)
    depths = sorted({round(depth) for depth in np.linspace(1, len(layers), min(_DEPTHS, len(layers)))})

    def explain(model: nn.Module) -> NDArray:
        return _filled(_map(subject, method, model=model), subject)

    # One volume alone cannot be normalised where nothing but its channels is left of it.
    inputs = torch.cat([volume, volume.flip(2)])
    return {
        mode: [
            {"layer": one.layer, "randomised": one.randomised, "of": len(layers), **alike(one.similarity)}
            for one in randomisation(
                subject.model, explain, subject.grid, layers, mode, inputs=inputs, depths=depths
            )
        ]
        for mode in ("cascading", "independent")
    }  # fmt: skip


def _unrelated(
    trained: NDArray | Undefined, subject: Subject, method: Method, other: Subject | Undefined
) -> dict[str, Any]:
    if isinstance(other, Undefined):
        return alike(other)
    if other.grid.shape != subject.grid.shape:
        return alike(Undefined(f"the other scan's model input is {other.grid.shape}, this one's {subject.grid.shape}"))
    return alike(_beside(trained, _map(other, method), subject))


def output_of(target: Target, output: Any) -> int | None:
    """Which of a model's outputs (1, K) a target asks about; None where it is not one of several."""
    target = getattr(target, "target", target)  # under a name of its own
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < 2:
        return None
    if isinstance(target, PredictedClass):
        return int(output[0].argmax())
    return target.index if isinstance(target, (ClassLogit, OneOutput)) else None


def _random_logit(trained: NDArray | Undefined, subject: Subject, method: Method) -> dict[str, Any]:
    """By output how alike the maps are; ``undefined`` where no other output is there."""
    asked = output_of(subject.explainer.targets[0], subject.output)
    if asked is None:
        return plain(Undefined("what is explained is not one of several outputs of the model"))
    ranked = [int(index) for index in subject.output[0].argsort(descending=True) if int(index) != asked]
    maps = {index: _map(replace(subject, target=ClassLogit(index)), method) for index in ranked[:_OTHERS]}
    found = {str(index): alike(_beside(trained, values, subject)) for index, values in maps.items()}
    if not isinstance(trained, Undefined) and trained.max() > 0:
        for index, values in maps.items():
            if not isinstance(values, Undefined) and values.max() <= 0:  # nothing speaks for it, so nothing is shared
                found[str(index)]["top_dice"] = 0.0
    return found


def _areas(subject: Subject, method: Method, settings: AuditSection) -> Any:
    values = subject.maps({"": method})[""]
    if isinstance(values, Undefined):
        return plain(values)
    baseline = removed(subject.volume, "blur", subject.grid, settings.blur_mm)
    found = delta_areas(Scorer(subject.score), subject.volume, values, baseline)
    return plain(found) if isinstance(found, Undefined) else found


def agreement_of(subject: Subject, methods: Methods, seed: int = 0) -> list[dict[str, Any]]:
    """By pair of methods how alike their maps are, and, as ``chance``, how alike with one of them displaced.

    Displaced as in :func:`volsal.audit.faithfulness.displaced`: blobs stay blobs, elsewhere.  Methods whose map has no
    place are left out.
    """
    maps = {name: one for name, one in subject.maps(methods).items() if not isinstance(one, Undefined)}
    room = _BYTES // (_BYTES_PER_VOXEL * int(np.prod(subject.grid.shape)))
    kept: dict[tuple[str, bool], Compared] = {}

    def compared(name: str, moved: bool) -> Compared:
        if (name, moved) in kept:
            return kept[name, moved]
        values = maps[name]
        if moved:
            values = displaced(values, np.random.default_rng((seed, list(maps).index(name))))
        made = Compared(values, subject.grid)
        if len(kept) < room:
            kept[name, moved] = made
        return made

    found = []
    for at, a in enumerate(maps):
        own = compared(a, False)
        for b in list(maps)[at + 1 :]:
            beside, chance = (alike(own.with_(compared(b, moved))) for moved in (False, True))
            found.append({"methods": [a, b], **beside, "chance": chance})
    return found


def mean_over(found: Sequence[Any]) -> Any:
    """The mean of plain figures that are numbers; the first of the others where none is."""
    known = [one for one in found if isinstance(one, (int, float))]
    return float(np.mean(known)) if known else next(iter(found), {"undefined": "there is none"})
