"""Does what volsal promises hold on the user's own model?  Each promise is put to the test, and the figures are shown.

Nothing here is taken on trust from how methods are written: maps are made twice, alone and in a batch, from a folded
copy of the model and from an exported one, and are compared with PyTorch's own gradients and with what the model says
when parts of its input or of a layer are taken away.  Where maps are put is another question, that of
:mod:`volsal.audit.geometry`; here the cells of layers lie by the half-pixel rule.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from volsal.attribution import (
    Attribution,
    Context,
    CoverageError,
    DeepLIFT,
    HiResCAM,
    InputGradient,
    IntegratedGradients,
    LayerError,
    Method,
    ModelError,
    Target,
    TargetError,
    attribute,
    default_layer,
)
from volsal.attribution.alignment.alignment import HalfPixel
from volsal.attribution.alignment.following import Trace
from volsal.attribution.cams.cam import CAM
from volsal.attribution.gradients.integrated import completeness
from volsal.attribution.method import PLAIN, bases, scores_of
from volsal.attribution.structure import address, bare
from volsal.attribution.tap import Calls, forward, plain, reader, undisturbed
from volsal.attribution.targets.target import fixed
from volsal.errors import VolsalError
from volsal.explain import Explainer, case_of, environment
from volsal.models.fast import fast, fast_copy
from volsal.scans import Scan
from volsal.scans.write import replacing

Verdict = Literal["ok", "fails", "does not apply"]

# Differences are norms of differences over norms: of the same computation done again, and of another one.  In half
# precision each is as many times larger as its roundings are.
_AGAIN = 1e-5
_OTHERWISE = 1e-3
# Of gradients by the input, computed otherwise: a rounding that turns a ReLU or moves a maximum lets a whole path's
# gradient through, or none of it.
_KINKED = 1e-2
# Maps that are further apart than this share no more than part of what they show, in whatever precision.
_ALIKE = 0.5
# A sum over a map may miss what it should add up to by this share.
_COMPLETE = 0.01
# A head whose scores miss those of a linear one by less is linear.
_LINEAR = 1e-3
# Boxes that are taken away: as many along each axis, half their part of the axis wide.
_BOXES = 2
# What is less than this share of a box's effect is no attribution but rounding.
_GIVEN = 0.01
# How many steps, samples and the like a method is given where not their number is put to the test.
_FEW: dict[str, Any] = {"steps": 4, "max_steps": 4, "tolerance": None, "samples": 3, "masks": 8, "controls": 1}
# What the progress is called.
_CHECKS = "checks"


@dataclass(frozen=True)
class Check:
    """One promise, put to the test.

    Attributes
    ----------
    name : what was checked
    of : of which method, or layer; ``model`` where none is concerned
    verdict : ``ok``, ``fails``, or ``does not apply``
    figure : what was measured; None where there is no number to it
    tolerance : the most that it may be; None where there is no such limit
    said : what the figure is, or why the check fails or does not apply
    """

    name: str
    of: str
    verdict: Verdict
    figure: float | None
    tolerance: float | None
    said: str

    def describe(self) -> dict[str, Any]:
        """As plain data, for records; a figure that is not finite, in words."""
        known = self.figure is None or math.isfinite(self.figure)
        return {**vars(self), "figure": self.figure if known else str(self.figure)}


@dataclass(frozen=True, eq=False)
class ContractReport:
    """What :func:`check_model` found."""

    checks: tuple[Check, ...]
    provenance: dict[str, Any]

    @property
    def sound(self) -> bool:
        """Whether no check fails."""
        return all(check.verdict != "fails" for check in self.checks)

    def write(self, path: Path) -> None:
        """Write all figures as JSON; WriteError where the disk refuses."""
        content = {"checks": [check.describe() for check in self.checks], **self.provenance}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")


def check_model(
    explainer: Explainer, scan: Scan | Tensor, progress: Callable[[str, int, int], None] = PLAIN.progress
) -> ContractReport:
    """Put ``explainer``'s model, methods and targets to the test on a scan, or on a model input (1, C, *spatial).

    Each method runs four or five times; the model as often again.  Methods that take many steps or samples take a few
    here, but where it is asked whether their number is enough.  ``progress`` is told how many checks are done, and of
    how many; the explainer's own is told what long methods are doing.

    Raises
    ------
    VolsalError
        Where the scan cannot be preprocessed, or the model cannot be run on one volume.
    """
    clock = time.monotonic()
    bench = _Bench.of(explainer, scan)
    layers = bench.layers
    stages: list[tuple[int, Iterator[Check]]] = [
        (len(_OF_MODEL), _of_model(bench)),
        *(
            (len(_OF_METHOD), _of_method(_Subject(bench, name, method)))
            for name, method in zip(explainer.names, explainer.methods, strict=True)
        ),
        *((len(_OF_LAYER), _of_layer(bench, layer)) for layer in layers),
        (len(_OF_GRADIENT), _of_gradient(bench)),
    ]
    total, before = sum(count for count, _ in stages), 0
    checks: list[Check] = []
    progress(_CHECKS, 0, total)
    for count, stage in stages:
        for done, check in enumerate(stage, 1):
            checks.append(check)
            progress(_CHECKS, before + min(done, count), total)
        before += count
    progress(_CHECKS, total, total)  # a method that gives no map is asked nothing more
    provenance = {
        "model": {"class": type(explainer.model).__name__, "weights_sha256": explainer.weights_sha256},
        "model_input": {"shape": list(bench.volume.shape), "scan_sha256": getattr(scan, "sha256", None)},
        "seconds": round(time.monotonic() - clock, 1),
        **environment(),
    }
    return ContractReport(tuple(checks), provenance)


def random_volume(shape: Sequence[int], seed: int = 0) -> Tensor:
    """A model input (1, *shape) of normal random numbers, where no scan is at hand."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


class _DoesNotApplyError(Exception):
    """A check has no meaning here."""


@dataclass(frozen=True, eq=False)
class _Bench:
    """What is put to the test, and on what."""

    model: nn.Module
    volume: Tensor
    methods: Sequence[Method]
    targets: Sequence[Target]
    context: Context

    @classmethod
    def of(cls, explainer: Explainer, scan: Scan | Tensor) -> _Bench:
        model = bare(explainer.model)
        if isinstance(scan, Scan):
            given = explainer.preprocess(scan)
            context = explainer.context(given.grid, case_of(scan), scan)
            volume = explainer.to_model(given.tensor)
        else:
            context = Context(progress=explainer.progress)
            volume = explainer.to_model(scan)
        # Steps taken up again from a file would answer in place of the method; and a measured place belongs to the
        # batch it was measured on.
        context = replace(context, keep=None, align=HalfPixel())
        return cls(model, plain(volume), explainer.methods, explainer.targets_for(context), context)

    @property
    def rounding(self) -> float:
        """How much coarser the model's numbers are than float32's; 1 where they are not."""
        return max(1.0, torch.finfo(self.volume.dtype).eps / torch.finfo(torch.float32).eps)

    @cached_property
    def output(self) -> Any:
        return self.run(self.volume)

    @cached_property
    def again(self) -> tuple[Any, list[str]]:
        """The output with other random numbers, and what has changed on the way to it."""
        return _watched(self, lambda: self.run(self.volume, seed=1))

    @cached_property
    def same(self) -> list[Target]:
        """The targets, with their choices made on the scan."""
        return [fixed(target, self.output) for target in self.targets]

    @cached_property
    def fast(self) -> nn.Module:
        known = dict(self.model.named_modules())
        return fast(self.model, self.volume, keep=[layer for layer in self.layers if address(layer)[0] in known])

    @cached_property
    def finer(self) -> tuple[nn.Module, Tensor]:
        """The model and the scan in the next finer precision."""
        if self.volume.dtype == torch.float64:
            raise _DoesNotApplyError("there is no finer precision to compare with")
        precision = torch.float64 if self.volume.dtype == torch.float32 else torch.float32
        try:
            return copy.deepcopy(self.model).to(precision), self.volume.to(precision)
        except Exception as error:  # as the model's own parts see fit
            reason = " ".join(str(error).split())
            raise _DoesNotApplyError(f"the model cannot be copied in another precision: {reason}") from error

    @cached_property
    def layers(self) -> list[str]:
        """The layers of the class activation maps, each once; none of a map that finds no layer to take."""
        cams = [base for method in self.methods for base in bases(method) if isinstance(base, CAM)]
        found = [cam.layer for cam in cams if cam.layer]
        if len(found) < len(cams):
            with suppress(LayerError):  # which the map's own checks tell
                found.append(default_layer(self.model, self.volume))
        return list(dict.fromkeys(found))

    @cached_property
    def stock(self) -> _Stock:
        return _Stock.of(self)

    @cached_property
    def strongest_box(self) -> tuple[Tensor, Tensor]:
        return _strongest_box(self)

    @cached_property
    def _first(self) -> dict[Method, Attribution]:
        return {}

    def first(self, method: Method) -> Attribution:
        """The method's answer on the scan, computed once."""
        if method not in self._first:
            self._first[method] = self.maps(method, self.volume)
        return self._first[method]

    def run(self, volume: Tensor, seed: int = 0) -> Any:
        """The model's output, with random numbers of that seed for whatever draws some."""
        with undisturbed(self.model), torch.no_grad():
            torch.manual_seed(seed)
            return forward(self.model, plain(volume))

    def scores(self, volume: Tensor) -> Tensor:
        """The targets' scores, (T,), asked about the same things as on the scan."""
        return torch.stack([one[0] for one in scores_of(self.same, self.run(volume), 1)]).double()

    def maps(self, method: Method, volume: Tensor, model: nn.Module | None = None) -> Attribution:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return attribute(model or self.model, volume, [method], self.targets, self.context)[0]

    def other(self) -> Tensor:
        """Another volume, to share a batch with: the scan mirrored, and twice as bright."""
        return 2 * self.volume.flip(tuple(range(2, self.volume.ndim)))


@dataclass(frozen=True)
class _Found:
    """A figure, its limit, and what it is."""

    figure: float
    tolerance: float
    said: str


def _checked(name: str, of: str, ask: Callable[[], _Found]) -> Check:
    try:
        found = ask()
    except _DoesNotApplyError as reason:
        return Check(name, of, "does not apply", None, None, str(reason))
    except VolsalError as error:
        return Check(name, of, "fails", None, None, str(error))
    met = found.figure <= found.tolerance  # False for NaN
    return Check(name, of, "ok" if met else "fails", found.figure, found.tolerance, found.said)


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest, over pairs, of the norm of the difference over the norm of ``theirs``; NaN where one is not finite.

    A pair of zeros is equal; 0 against anything else is infinitely far off.
    """
    apart = [torch.linalg.vector_norm(a.double() - b.double()) for a, b in zip(ours, theirs, strict=True)]
    sizes = [torch.linalg.vector_norm(b.double()) for b in theirs]
    shares = [float(off / size) if float(off) else 0.0 for off, size in zip(apart, sizes, strict=True)]
    return math.nan if any(math.isnan(share) for share in shares) else max(shares, default=0.0)


def _tensors(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


# ---- the model


def _of_model(bench: _Bench) -> Iterator[Check]:
    return (_checked(name, "model", partial(question, bench)) for name, question in _OF_MODEL.items())


def _finite_weights(bench: _Bench) -> _Found:
    tensors = {**dict(bench.model.named_parameters()), **dict(bench.model.named_buffers())}
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    return _Found(len(bad), 0, _listed("tensors hold NaN or infinity", bad))


def _finite_output(bench: _Bench) -> _Found:
    bad = sum(int((~torch.isfinite(tensor)).sum()) for tensor in _tensors(bench.output))
    return _Found(bad, 0, "numbers that are NaN or infinite")


def _same_output(bench: _Bench) -> _Found:
    off = difference(_tensors(bench.again[0]), _tensors(bench.output))
    return _Found(off, _AGAIN * bench.rounding, "difference, with other random numbers: dropout or sampling shows here")


def _apart(bench: _Bench) -> _Found:
    together = bench.run(torch.cat([bench.volume, bench.other()]))
    first = [tensor[:1] for tensor in _tensors(together)]
    alone = _tensors(bench.output)
    if any(one.shape != both.shape for one, both in zip(alone, first, strict=True)):
        raise _DoesNotApplyError("the output's first axis is not the batch")
    return _Found(difference(first, alone), _OTHERWISE * bench.rounding, "difference, beside another volume")


def _unchanged_by_inference(bench: _Bench) -> _Found:
    return _unchanged(bench.again[1])


_OF_MODEL: dict[str, Callable[[_Bench], _Found]] = {
    "finite weights": _finite_weights,
    "finite output": _finite_output,
    "same output again": _same_output,
    "output the same alone and in a batch": _apart,
    "unchanged by an inference": _unchanged_by_inference,
}


def _unchanged(changed: Sequence[str]) -> _Found:
    return _Found(len(changed), 0, _listed("things that changed", changed))


def _watched(bench: _Bench, act: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What ``act`` returns, and what has changed on the way."""
    before = _state(bench)
    result = act()
    after = _state(bench)
    return result, [name for name in before | after if before.get(name) != after.get(name)]


def _state(bench: _Bench) -> dict[str, Any]:
    """Everything that must stay as it is, by what a person calls it."""
    found: dict[str, Any] = {"random numbers": _digest(torch.get_rng_state()), "the volume": _digest(bench.volume)}
    for name, module in bench.model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        found[f"mode or hooks of {name or 'the model'}"] = module.training, [len(kind) for kind in hooks]
    for name, parameter in bench.model.named_parameters():
        gradient = None if parameter.grad is None else _digest(parameter.grad)
        found[f"weight {name}"] = _digest(parameter), parameter.requires_grad, gradient
    for name, buffer in bench.model.named_buffers():
        found[f"buffer {name}"] = _digest(buffer)
    return found


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()


def _listed(what: str, names: Sequence[str]) -> str:
    return what + (f": {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" if names else "")


# ---- each method


@dataclass(frozen=True, eq=False)
class _Subject:
    """A method that is put to the test; what is run for it is run once."""

    bench: _Bench
    name: str
    asked: Method

    @cached_property
    def method(self) -> Method:
        """The method with few steps."""
        return replace(self.asked, **self.fewer) if self.fewer else self.asked  # type: ignore[type-var]

    @cached_property
    def fewer(self) -> dict[str, Any]:
        """What is less of it than was asked."""
        own = {name: value for name, value in vars(self.asked).items() if value is not None}
        return {name: few for name, few in _FEW.items() if name in own and (few is None or few < own[name])}

    @property
    def first(self) -> Attribution:
        return self.bench.first(self.method)

    @cached_property
    def again(self) -> tuple[Attribution, list[str]]:
        """The answer with other random numbers, and what has changed on the way to it."""
        bench = self.bench
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            ask = partial(attribute, bench.model, bench.volume, [self.method], bench.targets, bench.context)
            (answer,), changed = _watched(bench, ask)
        return answer, changed

    @property
    def limit(self) -> float:
        """The most that its maps, computed otherwise, may differ."""
        return (_OTHERWISE if self.first.layer else _KINKED) * self.bench.rounding


def _of_method(subject: _Subject) -> Iterator[Check]:
    try:
        first = subject.first
    except VolsalError as error:
        asked = "every activation reached" if isinstance(error, CoverageError) else "gives a map"
        yield Check(asked, subject.name, "fails", None, None, str(error))
        return
    if first.coverage:
        counts = ", ".join(f"{count} x {kind}" for kind, count in sorted(first.coverage.items()))
        yield Check("every activation reached", subject.name, "ok", 0, 0, f"missed; reached: {counts}")
    for name, question in _OF_METHOD.items():
        yield _checked(name, subject.name, partial(question, subject))


def _finite_map(subject: _Subject) -> _Found:
    bad = sum(int((~torch.isfinite(values)).sum()) for values in subject.first.maps)
    few = ", ".join(f"{name} {value}" for name, value in subject.fewer.items() if value is not None)
    return _Found(bad, 0, "values that are NaN or infinite" + (f" (for speed, here and below: {few})" if few else ""))


def _same_map(subject: _Subject) -> _Found:
    off = difference(subject.again[0].maps, subject.first.maps)
    return _Found(off, _AGAIN * subject.bench.rounding, "difference, with other random numbers")


def _same_in_batch(subject: _Subject) -> _Found:
    bench = subject.bench
    try:
        both = bench.maps(subject.method, torch.cat([bench.volume, bench.other()]))
    except TargetError as error:
        raise _DoesNotApplyError(f"the target is for one volume: {error}") from error
    alone = [values[:1] for values in both.maps]
    return _Found(difference(alone, subject.first.maps), subject.limit, "difference, beside another volume")


def _beyond_rounding(subject: _Subject) -> _Found:
    """A gradient that is 0 by construction, as of a mean of what is normalised, is a picture of the roundings alone."""
    bench = subject.bench
    model, volume = bench.finer
    precision = str(volume.dtype).removeprefix("torch.")
    try:
        made = bench.maps(subject.method, volume, model)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise _DoesNotApplyError(f"the model does not compute in {precision}: {reason}") from error
    told = f"difference from the map in {precision}"
    return _Found(difference(made.maps, subject.first.maps), min(subject.limit, _ALIKE), told)


def _unchanged_by_method(subject: _Subject) -> _Found:
    return _unchanged(subject.again[1])


def _same_folded(subject: _Subject) -> _Found:
    copy = _fast(subject.bench)
    made = subject.bench.maps(subject.method, subject.bench.volume, copy)
    about = fast_copy(copy)
    assert about is not None
    said = f"difference; {len(about.folded)} of {about.norms} batch norms folded, channels last"
    return _Found(difference(made.maps, subject.first.maps), subject.limit, said)


def _fast(bench: _Bench) -> nn.Module:
    try:
        return bench.fast
    except ModelError as error:
        raise _DoesNotApplyError(str(error)) from error


def _adds_up(subject: _Subject) -> _Found:
    method = subject.asked
    if not isinstance(method, (IntegratedGradients, DeepLIFT)):
        raise _DoesNotApplyError(f"{method.id} makes no such promise")
    worst = max(float(facts["relative_delta"]) for facts in subject.bench.first(method).facts)
    allowed = getattr(method, "tolerance", None) or _COMPLETE
    return _Found(worst, allowed, "share of the score's change from the baseline that the map's sum misses")


def _sensitive(subject: _Subject) -> _Found:
    """Sundararajan et al., section 2: what alone makes the score differ from the baseline's gets an attribution.

    The baseline is the scan itself but for a box that holds its mean.
    """
    method, bench = subject.method, subject.bench
    if not isinstance(method, (IntegratedGradients, DeepLIFT)):
        raise _DoesNotApplyError(f"{method.id} makes no such promise")
    without, effects = bench.strongest_box
    largest = int(effects.abs().argmax())
    if not float(effects[largest].abs()):
        raise _DoesNotApplyError("no box that was taken away changes the score")
    values = bench.maps(replace(method, baseline=without), bench.volume).maps[largest]
    given = float(values.double().abs().sum() / effects[largest].abs())
    said = f"boxes get nothing, of 1 that alone changes the score by {float(effects[largest]):.3g}"
    return _Found(int(not given > _GIVEN), 0, said)


_OF_METHOD: dict[str, Callable[[_Subject], _Found]] = {
    "finite values": _finite_map,
    "same map again": _same_map,
    "same map alone and in a batch": _same_in_batch,
    "more than rounding": _beyond_rounding,
    "model unchanged": _unchanged_by_method,
    "same map from a folded copy": _same_folded,
    "adds up to the score's change": _adds_up,
    "sensitivity(a)": _sensitive,
}


def _strongest_box(bench: _Bench) -> tuple[Tensor, Tensor]:
    """The scan without the box that changes the scores most, and the change of each, (T,)."""
    whole = bench.scores(bench.volume)
    best = bench.volume, torch.zeros_like(whole)
    sizes = bench.volume.shape[2:]
    for number in product(range(_BOXES), repeat=len(sizes)):
        middles = [(2 * n + 1) * size // (2 * _BOXES) for n, size in zip(number, sizes, strict=True)]
        reaches = [size // (4 * _BOXES) for size in sizes]
        box = [slice(m - reach, m + reach + 1) for m, reach in zip(middles, reaches, strict=True)]
        without = bench.volume.clone()
        without[:, :, *box] = bench.volume.mean()
        effects = whole - bench.scores(without)
        if float(effects.abs().max()) > float(best[1].abs().max()):
            best = without, effects
    return best


# ---- PyTorch's own backward pass


@dataclass(frozen=True, eq=False)
class _Stock:
    """What PyTorch itself says in one pass that is recorded as a whole, from the input on.

    Attributes
    ----------
    by_input : each score's gradient by the input; None where there is none
    by_layer : for each layer that has cells, what hires-cam is by each score's gradient
    """

    by_input: list[Tensor | None]
    by_layer: dict[str, list[Tensor | None]]

    @classmethod
    def of(cls, bench: _Bench) -> _Stock:
        at: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {}

        def keep(layer: str, output: Tensor, trace: Trace) -> Tensor | None:
            with suppress(LayerError):  # which the layer's own checks tell
                at[layer] = output.clone(), reader(layer, output, trace, bench.volume)
                return at[layer][0].clone()
            return None

        with undisturbed(bench.model), ExitStack() as stack:
            for layer in bench.layers:
                with suppress(LayerError):
                    stack.enter_context(Calls(bench.model, [layer], keep))
            leaf = plain(bench.volume).requires_grad_(True)
            scores = scores_of(bench.same, forward(bench.model, leaf.clone()), 1)
            found = [_gradients(score, [leaf, *(output for output, _ in at.values())]) for score in scores]
            by_layer = {
                layer: [
                    None if by[n] is None else (cells(by[n]) * cells(output.detach())).sum(1, keepdim=True)
                    for by in found
                ]
                for n, (layer, (output, cells)) in enumerate(at.items(), 1)
            }
        return cls([by[0] for by in found], by_layer)


def _gradients(score: Tensor, points: Sequence[Tensor]) -> Sequence[Any]:
    """The score's gradient by each of ``points``, by stock autograd; None where there is none."""
    if not score.requires_grad:
        return [None] * len(points)
    try:
        return torch.autograd.grad(score.sum(), points, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise _DoesNotApplyError(f"PyTorch has no backward pass of this model: {str(error).splitlines()[0]}") from error


def _all(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    found = [gradient for gradient in gradients if gradient is not None]
    if len(found) < len(gradients):
        raise _DoesNotApplyError("a score does not depend on it through differentiable steps")
    return found


# ---- each layer of a class activation map


def _of_layer(bench: _Bench, layer: str) -> Iterator[Check]:
    return (_checked(name, f"layer {layer}", partial(ask, bench, layer)) for name, ask in _OF_LAYER.items())


def _uncut(bench: _Bench, layer: str) -> _Found:
    """The graph that is cut at the layer against the whole one, recorded from the input on."""
    made = bench.first(HiResCAM(layer))  # which finds the layer, and cells in it
    expected = _all(bench.stock.by_layer[layer])
    return _Found(difference(made.maps, expected), _OTHERWISE * bench.rounding, "difference")


def _linear_head(bench: _Bench, layer: str) -> _Found:
    """Where the score is linear in the layer's output, the map's sum is what the score is more than without it."""
    there = torch.stack([one[0] for one in scores_of(bench.same, bench.output, 1)]).double()
    nothing = _scores_with(bench, layer, lambda a: 0 * a)
    moved = _scores_with(bench, layer, lambda a: a.flip(-1))
    mixed = _scores_with(bench, layer, lambda a: a / 2 + a.flip(-1) / 4)
    size = torch.maximum(there.abs(), nothing.abs()).clamp_min(1e-30)
    bent = (mixed - nothing - (there - nothing) / 2 - (moved - nothing) / 4).abs() / size
    if float(bent.max()) > _LINEAR * bench.rounding:
        raise _DoesNotApplyError(f"what follows the layer is not linear (the score bends by {float(bent.max()):.1e})")
    worst = max(
        float(completeness(values, score[None], before[None])["relative_delta"].max())
        for values, score, before in zip(bench.first(HiResCAM(layer)).maps, there.float(), nothing.float(), strict=True)
    )
    return _Found(worst, _COMPLETE, "share of the score less its bias that the map's sum misses")


_OF_LAYER: dict[str, Callable[[_Bench, str], _Found]] = {
    "hires-cam equals PyTorch's own gradient": _uncut,
    "hires-cam adds up to the score": _linear_head,
}


def _scores_with(bench: _Bench, layer: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The scores, (T,), with the layer's output changed."""
    own = {t.untyped_storage().data_ptr() for t in (*bench.model.parameters(), *bench.model.buffers())}

    def see(name: str, output: Tensor, trace: Trace) -> Tensor:
        cells = reader(layer, output, trace, bench.volume)
        changed = output.clone()
        cells(changed).copy_(change(cells(output)))
        # In place, so that every other name that the model has for this memory sees it too.
        return changed if output.untyped_storage().data_ptr() in own else output.copy_(changed)

    with Calls(bench.model, [layer], see):
        return bench.scores(bench.volume)


# ---- the gradient by the input


def _of_gradient(bench: _Bench) -> Iterator[Check]:
    try:
        bench.first(InputGradient())
    except VolsalError as error:
        yield Check(next(iter(_OF_GRADIENT)), "model", "fails", None, None, str(error))
        return
    for name, question in _OF_GRADIENT.items():
        yield _checked(name, "model", partial(question, bench))


def _stock(bench: _Bench) -> _Found:
    expected = _all(bench.stock.by_input)
    found = difference(bench.first(InputGradient()).maps, expected)
    return _Found(found, _KINKED * bench.rounding, "difference from stock autograd")


def _folded(bench: _Bench) -> _Found:
    found = bench.maps(InputGradient(), bench.volume, _fast(bench)).maps
    return _Found(difference(found, bench.first(InputGradient()).maps), _KINKED * bench.rounding, "difference")


def _exported(bench: _Bench) -> _Found:
    try:
        with undisturbed(bench.model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own internals here
            program = torch.export.export(bench.model, (plain(bench.volume),)).module()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise _DoesNotApplyError(f"torch.export does not take this model: {type(error).__name__}: {reason}") from error
    with undisturbed(program):
        leaf = plain(bench.volume).requires_grad_(True)
        scores = scores_of(bench.same, forward(program, leaf.clone()), 1)
        found = _all([_gradients(score, [leaf])[0] for score in scores])
    return _Found(difference(found, bench.first(InputGradient()).maps), _KINKED * bench.rounding, "difference")


_OF_GRADIENT: dict[str, Callable[[_Bench], _Found]] = {
    "input gradient equals PyTorch's own": _stock,
    "same input gradient from a folded copy": _folded,
    "same input gradient from an exported program": _exported,
}
