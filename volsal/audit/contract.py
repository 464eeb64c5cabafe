"""Does what volsal promises hold on the user's own model?  Each promise is put to the test, and the figures are shown.

Nothing here is taken on trust from how methods are written: maps are made twice, alone and in a batch, from a folded
copy of the model and from an exported one, and are compared with PyTorch's own gradients and with what the model says
when parts of its input or of a layer are taken away.  Where maps are put is another question, that of
:mod:`volsal.audit.geometry`; here the cells of layers lie by the half-pixel rule.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from volsal.attribution.method import bases, scores_of
from volsal.attribution.structure import bare
from volsal.attribution.tap import Calls, forward, plain, undisturbed
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
# A sum over a map may miss what it should add up to by this share.
_COMPLETE = 0.01
# A head whose scores miss those of a linear one by less is linear.
_LINEAR = 1e-3
# Boxes that are taken away: as many along each axis, half their part of the axis wide.
_BOXES = 2
# What is less than this share of a box's effect is no attribution but rounding.
_GIVEN = 0.01


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


def check_model(explainer: Explainer, scan: Scan | Tensor) -> ContractReport:
    """Put ``explainer``'s model, methods and targets to the test on a scan, or on a model input (1, C, *spatial).

    Each method runs four or five times; the model as often again.

    Raises
    ------
    VolsalError
        Where the scan cannot be preprocessed, or the model cannot be run on one volume.
    """
    clock = time.monotonic()
    bench = _Bench.of(explainer, scan)
    checks = [*_of_model(bench)]
    for name, method in zip(explainer.names, explainer.methods, strict=True):
        checks += _of_method(bench, name, method)
    for layer in bench.layers():
        checks += _of_layer(bench, layer)
    checks += _of_gradient(bench)
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
    def same(self) -> list[Target]:
        """The targets, with their choices made on the scan."""
        return [fixed(target, self.output) for target in self.targets]

    @cached_property
    def fast(self) -> nn.Module:
        return fast(self.model, self.volume, keep=self.layers())

    def layers(self) -> list[str]:
        """The layers of the class activation maps, each once."""
        cams = [base for method in self.methods for base in bases(method) if isinstance(base, CAM)]
        return list(dict.fromkeys(cam.layer or default_layer(self.model, self.volume) for cam in cams))

    def run(self, volume: Tensor, seed: int = 0) -> Any:
        """The model's output, with random numbers of that seed for whatever draws some."""
        with undisturbed(self.model), torch.no_grad():
            torch.manual_seed(seed)
            return forward(self.model, plain(volume))

    def scores(self, volume: Tensor) -> Tensor:
        """The targets' scores, (T,), asked about the same things as on the scan."""
        return torch.stack([one[0] for one in scores_of(self.same, self.run(volume), 1)]).double()

    def maps(self, method: Method, volume: Tensor, model: nn.Module | None = None, seed: int = 0) -> Attribution:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
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
    questions: dict[str, Callable[[_Bench], _Found]] = {
        "finite weights": _finite_weights,
        "finite output": _finite_output,
        "same output again": _same_output,
        "output the same alone and in a batch": _apart,
        "unchanged by an inference": _unchanged_by_inference,
    }
    for name, question in questions.items():
        yield _checked(name, "model", partial(question, bench))


def _finite_weights(bench: _Bench) -> _Found:
    tensors = {**dict(bench.model.named_parameters()), **dict(bench.model.named_buffers())}
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    return _Found(len(bad), 0, _listed("tensors hold NaN or infinity", bad))


def _finite_output(bench: _Bench) -> _Found:
    bad = sum(int((~torch.isfinite(tensor)).sum()) for tensor in _tensors(bench.output))
    return _Found(bad, 0, "numbers that are NaN or infinite")


def _same_output(bench: _Bench) -> _Found:
    off = difference(_tensors(bench.run(bench.volume, seed=1)), _tensors(bench.output))
    return _Found(off, _AGAIN * bench.rounding, "difference, with other random numbers: dropout or sampling shows here")


def _apart(bench: _Bench) -> _Found:
    together = bench.run(torch.cat([bench.volume, bench.other()]))
    first = [tensor[:1] for tensor in _tensors(together)]
    alone = _tensors(bench.output)
    if any(one.shape != both.shape for one, both in zip(alone, first, strict=True)):
        raise _DoesNotApplyError("the output's first axis is not the batch")
    return _Found(difference(first, alone), _OTHERWISE * bench.rounding, "difference, beside another volume")


def _unchanged_by_inference(bench: _Bench) -> _Found:
    return _unchanged(bench, lambda: bench.run(bench.volume))


def _unchanged(bench: _Bench, act: Callable[[], Any]) -> _Found:
    before = _state(bench)
    act()
    after = _state(bench)
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    return _Found(len(changed), 0, _listed("things that changed", changed))


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


def _of_method(bench: _Bench, name: str, method: Method) -> Iterator[Check]:
    try:
        first = bench.maps(method, bench.volume)
    except VolsalError as error:
        asked = "every activation reached" if isinstance(error, CoverageError) else "gives a map"
        yield Check(asked, name, "fails", None, None, str(error))
        return
    if first.coverage:
        counts = ", ".join(f"{count} x {kind}" for kind, count in sorted(first.coverage.items()))
        yield Check("every activation reached", name, "ok", 0, 0, f"missed; reached: {counts}")
    questions: dict[str, Callable[[_Bench, Method, Attribution], _Found]] = {
        "finite values": _finite_map,
        "same map again": _same_map,
        "same map alone and in a batch": _same_in_batch,
        "model unchanged": _unchanged_by_method,
        "same map from a folded copy": _same_folded,
        "adds up to the score's change": _adds_up,
        "sensitivity(a)": _sensitive,
    }
    for question, ask in questions.items():
        yield _checked(question, name, partial(ask, bench, method, first))


def _finite_map(bench: _Bench, method: Method, first: Attribution) -> _Found:
    bad = sum(int((~torch.isfinite(values)).sum()) for values in first.maps)
    return _Found(bad, 0, "values that are NaN or infinite")


def _same_map(bench: _Bench, method: Method, first: Attribution) -> _Found:
    again = bench.maps(method, bench.volume, seed=1)
    return _Found(difference(again.maps, first.maps), _AGAIN * bench.rounding, "difference, with other random numbers")


def _same_in_batch(bench: _Bench, method: Method, first: Attribution) -> _Found:
    try:
        both = bench.maps(method, torch.cat([bench.volume, bench.other()]))
    except TargetError as error:
        raise _DoesNotApplyError(f"the target is for one volume: {error}") from error
    alone = [values[:1] for values in both.maps]
    return _Found(difference(alone, first.maps), _allowed(bench, first), "difference, beside another volume")


def _unchanged_by_method(bench: _Bench, method: Method, first: Attribution) -> _Found:
    return _unchanged(bench, lambda: bench.maps(method, bench.volume))


def _same_folded(bench: _Bench, method: Method, first: Attribution) -> _Found:
    copy = _fast(bench)
    made = bench.maps(method, bench.volume, copy)
    about = fast_copy(copy)
    assert about is not None
    said = f"difference; {len(about.folded)} of {about.norms} batch norms folded, channels last"
    return _Found(difference(made.maps, first.maps), _allowed(bench, first), said)


def _allowed(bench: _Bench, answer: Attribution) -> float:
    return (_OTHERWISE if answer.layer else _KINKED) * bench.rounding


def _fast(bench: _Bench) -> nn.Module:
    try:
        return bench.fast
    except ModelError as error:
        raise _DoesNotApplyError(str(error)) from error


def _adds_up(bench: _Bench, method: Method, first: Attribution) -> _Found:
    if not isinstance(method, (IntegratedGradients, DeepLIFT)):
        raise _DoesNotApplyError(f"{method.id} makes no such promise")
    worst = max(float(facts["relative_delta"]) for facts in first.facts)
    allowed = getattr(method, "tolerance", None) or _COMPLETE
    return _Found(worst, allowed, "share of the score's change from the baseline that the map's sum misses")


def _sensitive(bench: _Bench, method: Method, first: Attribution) -> _Found:
    """Sundararajan et al., section 2: what alone makes the score differ from the baseline's gets an attribution.

    The baseline is the scan itself but for a box that holds its mean.
    """
    if not isinstance(method, (IntegratedGradients, DeepLIFT)):
        raise _DoesNotApplyError(f"{method.id} makes no such promise")
    without, effects = _strongest_box(bench)
    largest = int(effects.abs().argmax())
    if not float(effects[largest].abs()):
        raise _DoesNotApplyError("no box that was taken away changes the score")
    values = bench.maps(replace(method, baseline=without), bench.volume).maps[largest]
    given = float(values.double().abs().sum() / effects[largest].abs())
    said = f"boxes get nothing, of 1 that alone changes the score by {float(effects[largest]):.3g}"
    return _Found(int(not given > _GIVEN), 0, said)


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


# ---- each layer of a class activation map


def _of_layer(bench: _Bench, layer: str) -> Iterator[Check]:
    yield _checked("hires-cam equals PyTorch's own gradient", f"layer {layer}", partial(_uncut, bench, layer))
    yield _checked("hires-cam adds up to the score", f"layer {layer}", partial(_linear_head, bench, layer))


def _uncut(bench: _Bench, layer: str) -> _Found:
    """The graph that is cut at the layer against the whole one, recorded from the input on."""
    kept: list[Tensor] = []

    def keep(name: str, output: Tensor, trace: Trace) -> Tensor:
        _require_cells(bench, layer, output)
        kept.append(output.clone())
        return kept[0].clone()

    with undisturbed(bench.model), Calls(bench.model, [layer], keep):
        output = forward(bench.model, plain(bench.volume).requires_grad_(True).clone())
        scores = scores_of(bench.same, output, 1)
        owed = [torch.autograd.grad(score.sum(), kept[0], retain_graph=True)[0] for score in scores]
    expected = [(gradient * kept[0].detach()).sum(1, keepdim=True) for gradient in owed]
    made = bench.maps(HiResCAM(layer), bench.volume)
    return _Found(difference(made.maps, expected), _OTHERWISE * bench.rounding, "difference")


def _linear_head(bench: _Bench, layer: str) -> _Found:
    """Where the score is linear in the layer's output, the map's sum is what the score is more than without it."""
    at = {share: _scores_with(bench, layer, lambda a, s=share: s * a) for share in (0.0, 0.5, 1.0)}  # type: ignore[misc]
    moved = _scores_with(bench, layer, lambda a: a.flip(-1))
    both = _scores_with(bench, layer, lambda a: a + a.flip(-1))
    size = torch.maximum(at[1.0].abs(), at[0.0].abs()).clamp_min(1e-30)
    bent = torch.maximum((at[0.5] - (at[0.0] + at[1.0]) / 2).abs(), (both - moved - at[1.0] + at[0.0]).abs()) / size
    if float(bent.max()) > _LINEAR * bench.rounding:
        raise _DoesNotApplyError(f"what follows the layer is not linear (the score bends by {float(bent.max()):.1e})")
    maps = bench.maps(HiResCAM(layer), bench.volume).maps
    worst = max(
        float(completeness(values, score[None], before[None])["relative_delta"].max())
        for values, score, before in zip(maps, at[1.0].float(), at[0.0].float(), strict=True)
    )
    return _Found(worst, _COMPLETE, "share of the score less its bias that the map's sum misses")


def _scores_with(bench: _Bench, layer: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The scores, (T,), with the layer's output changed."""
    own = {t.untyped_storage().data_ptr() for t in (*bench.model.parameters(), *bench.model.buffers())}

    def see(name: str, output: Tensor, trace: Trace) -> Tensor:
        _require_cells(bench, layer, output)
        changed = change(output)
        # In place, so that every other name that the model has for this memory sees it too.
        return changed if output.untyped_storage().data_ptr() in own else output.copy_(changed)

    with Calls(bench.model, [layer], see):
        return bench.scores(bench.volume)


def _require_cells(bench: _Bench, layer: str, output: Tensor) -> None:
    if output.ndim != bench.volume.ndim or len(output) != 1:
        raise _DoesNotApplyError(f"layer {layer!r} returns {tuple(output.shape)}, not one value per channel and cell")


# ---- the gradient by the input


def _of_gradient(bench: _Bench) -> Iterator[Check]:
    questions: dict[str, Callable[[_Bench, list[Tensor]], _Found]] = {
        "input gradient equals PyTorch's own": _stock,
        "same input gradient from a folded copy": _folded,
        "same input gradient from an exported program": _exported,
    }
    try:
        ours = bench.maps(InputGradient(), bench.volume).maps
    except VolsalError as error:
        yield Check(next(iter(questions)), "model", "fails", None, None, str(error))
        return
    for name, question in questions.items():
        yield _checked(name, "model", partial(question, bench, ours))


def _stock(bench: _Bench, ours: list[Tensor]) -> _Found:
    found = _gradients(bench, bench.model)
    return _Found(difference(ours, found), _KINKED * bench.rounding, "difference from stock autograd")


def _folded(bench: _Bench, ours: list[Tensor]) -> _Found:
    found = bench.maps(InputGradient(), bench.volume, _fast(bench)).maps
    return _Found(difference(found, ours), _KINKED * bench.rounding, "difference")


def _exported(bench: _Bench, ours: list[Tensor]) -> _Found:
    try:
        with undisturbed(bench.model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own internals here
            program = torch.export.export(bench.model, (plain(bench.volume),)).module()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise _DoesNotApplyError(f"torch.export does not take this model: {type(error).__name__}: {reason}") from error
    return _Found(difference(_gradients(bench, program), ours), _KINKED * bench.rounding, "difference")


def _gradients(bench: _Bench, model: nn.Module) -> list[Tensor]:
    """Each score's gradient by the input, by stock autograd."""
    with undisturbed(model):
        leaf = plain(bench.volume).requires_grad_(True)
        scores = scores_of(bench.same, forward(model, leaf.clone()), 1)
        return [torch.autograd.grad(score.sum(), leaf, retain_graph=True)[0] for score in scores]
