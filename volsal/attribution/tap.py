"""Look inside a model for the length of a ``with`` block, and leave it exactly as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from volsal.attribution.alignment.following import Following, Trace, trace_of
from volsal.attribution.structure import Memory, address, bare, unwrapped
from volsal.errors import VolsalError, nearest


class LayerError(VolsalError, LookupError):
    """A layer is not there, or its output cannot carry a map."""


class ModelError(VolsalError, RuntimeError):
    """The model cannot be loaded, or cannot be run on this input."""


_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_NEW_LOCK = Lock()


def _lock_of(model: nn.Module) -> RLock:
    with _NEW_LOCK:
        return _LOCKS.setdefault(model, RLock())


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, frozen parameters, gradients possible; all of it undone afterwards, whatever happens.

    Frozen parameters have two effects.  No weight gradient is ever computed or stored; and, since nothing before the
    point of interest requires grad, nothing there is recorded: the prefix costs what it costs under ``no_grad``.

    Threads that explain one model take turns, for its modes and hooks are the model's.  What the model has compiled
    with ``torch.compile`` runs as the Python it was, so that layers can be looked into.
    """
    model = bare(model)
    with ExitStack() as stack:
        stack.enter_context(_lock_of(model))
        devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
        stack.enter_context(torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it need not be loaded
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(precise())
        stack.enter_context(_evaluating(model))
        yield


#: The kinds of devices whose autocast to bfloat16 the caller had turned on.
_AUTOCAST: ContextVar[frozenset[str]] = ContextVar("_AUTOCAST", default=frozenset())


@contextmanager
def precise() -> Iterator[None]:
    """No autocast but inside :func:`forward`, and there the caller's, if it is to bfloat16.

    That has float32's range, and a model that was trained in it is run in it.  In float16 gradients underflow, so that
    autocast to it is turned off.  Scores, weights and maps are computed in float32 in any case.
    """
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu", *([accelerator.type] if accelerator else [])}
    with ExitStack() as stack:
        on = {kind for kind in kinds if torch.is_autocast_enabled(kind)}
        kept = {kind for kind in on if torch.get_autocast_dtype(kind) == torch.bfloat16}
        for kind in on:
            stack.enter_context(torch.autocast(kind, enabled=False))
        token = _AUTOCAST.set(_AUTOCAST.get() | kept)
        try:
            yield
        finally:
            _AUTOCAST.reset(token)


def run(model: nn.Module, volume: Tensor) -> Any:
    """``model(volume)`` in the caller's precision; see :func:`precise`."""
    with ExitStack() as stack:
        for kind in _AUTOCAST.get():
            stack.enter_context(torch.autocast(kind, torch.bfloat16))
        return bare(model)(volume)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The modules' modes are set one by one: ``eval()`` may do more, or be missing, as in an exported graph."""
    flags = [(module, module.training) for module in model.modules()]
    dropout = [(module, module.dropout) for module, _ in flags if isinstance(module, nn.RNNBase)]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module, flag in flags:
            if flag:  # setting an attribute of a module takes its time, and networks have hundreds
                module.training = False
        for recurrent, _ in dropout:  # cuDNN has its backward pass in training mode only, which differs by the dropout
            recurrent.training, recurrent.dropout = True, 0.0
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, flag in flags:
            if module.training is not flag:
                module.training = flag
        for recurrent, share in dropout:
            recurrent.dropout = share
        for parameter in trainable:
            parameter.requires_grad_(True)


def require_volumes(volume: Any) -> None:
    """Raise :class:`ModelError` unless ``volume`` is a tensor (B, C, *spatial) that holds something."""
    if not isinstance(volume, Tensor) or volume.ndim < 3 or not volume.numel():
        found = tuple(volume.shape) if isinstance(volume, Tensor) else type(volume).__name__
        raise ModelError(
            "a model input is a tensor (B, C, *spatial) of at least one volume, with at least one spatial axis; got "
            f"{found}"
        )


def plain(volume: Tensor) -> Tensor:
    """A private copy of ``volume`` as a bare tensor.

    A subclass such as MONAI's MetaTensor would carry its affine through the model onto grids where it is wrong, and a
    model that writes into its input must not write into the caller's.
    """
    require_volumes(volume)
    return copied_on_write(volume.detach().as_subclass(Tensor))


def copied_on_write(tensor: Tensor) -> Tensor:
    """A differentiable clone whose bytes are copied only if the model writes into it, which few models do."""
    if 0 in tensor.stride():  # one voxel in several places, as after expand, cannot be written to
        return tensor.clone(memory_format=torch.contiguous_format)
    try:
        return torch._lazy_clone(tensor)
    except RuntimeError:  # memory that torch does not own, such as an array's, cannot be shared so
        return tensor.clone()


def forward(model: nn.Module, volume: Tensor) -> Any:
    """``model(volume)``, with half precision widened to float32, and a failure inside the model told in one line.

    Raises
    ------
    ModelError
        Where the model fails, or would let the volumes of a batch change one another's scores.
    """
    if len(volume) > 1:
        _require_apart(model)
    try:
        return tree_map(_widened, run(model, volume))
    except (VolsalError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        raise ModelError(
            f"the model fails on an input of shape {tuple(volume.shape)}, {str(volume.dtype).removeprefix('torch.')}"
            f"{_first_layer(model, volume)}: {reason}"
        ) from error


def _widened(output: Any) -> Any:
    """Scores are taken in float32: sums over a volume, and differences of logits, need its digits."""
    half = isinstance(output, Tensor) and output.dtype in (torch.float16, torch.bfloat16)
    return output.float() if half else output


def _require_apart(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ModelError(
                f"layer {name!r} has no running statistics, so it normalises each volume by the whole batch, and maps "
                "would depend on what else is in it; run the model on one volume at a time, or give the layer "
                "track_running_stats=True"
            )


def _first_layer(model: nn.Module, volume: Tensor) -> str:
    """What the model's first convolution wants, where the input does not give it."""
    for name, module in model.named_modules():
        weight, kernel = getattr(module, "weight", None), getattr(module, "kernel_size", None)
        if isinstance(weight, Tensor) and isinstance(kernel, tuple):
            wants = []
            if len(kernel) != volume.ndim - 2:
                wants.append(f"{len(kernel)} spatial axes")
            if getattr(module, "in_channels", volume.shape[1]) != volume.shape[1]:
                wants.append(f"{module.in_channels} channel{'s' if module.in_channels != 1 else ''}")
            if weight.dtype != volume.dtype:
                wants.append(str(weight.dtype).removeprefix("torch."))
            return f" (its first convolution, {name!r}, expects {' and '.join(wants)})" if wants else ""
    return ""


#: Where layers' cells lie, and how they are read, by :func:`trace_key`.
traces: Memory[Trace] = Memory()


def trace_key(layer: str, volume: Tensor) -> tuple[str, tuple[int, ...], bool]:
    """What a layer's trace depends on besides the model."""
    return layer, tuple(volume.shape[1:]), len(volume) > 1


# Given a layer, its output and where that lies; what it returns takes the output's place in the network.
See = Callable[[str, Tensor, Trace], Tensor | None]


class Calls:
    """Shows the outputs of chosen layers, each in one chosen call, while the model runs.

    The first pass on an input of some shape is followed operator by operator, to find out where the cells lie.

    Parameters
    ----------
    layers : dotted names, with or without what ``DataParallel`` and ``torch.compile`` put before them; ``act#2`` is the
        second call of ``act``
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], see: See) -> None:
        self.layers = tuple(layers)
        #: Whether a checkpoint runs a part of the network again, during the backward pass.
        self.again = False
        #: The input.
        self.volume = torch.empty(0)
        self._model = bare(model)
        self._see = see
        self._wanted: dict[nn.Module, list[tuple[str, int | None]]] = {}
        for layer in self.layers:
            self._wanted.setdefault(find_layer(model, layer), []).append((layer, address(layer)[1]))
        self._counts: dict[nn.Module, int] = {}
        self._known: dict[Any, Trace] = {}
        self._following: Following | None = None

    def __enter__(self) -> Calls:
        self._hooks = [
            self._model.register_forward_pre_hook(self._begin, prepend=True),
            *(module.register_forward_hook(self._hook) for module in self._wanted),
            self._model.register_forward_hook(self._end, always_call=True),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        for hook in self._hooks:
            hook.remove()
        # Who looks often holds this object; the circle would keep activations until the garbage collector comes by.
        del self._see

    def _begin(self, model: nn.Module, args: tuple) -> None:
        self._counts = dict.fromkeys(self._wanted, 0)
        volume = next(arg for arg in args if isinstance(arg, Tensor))
        self.volume = volume.detach()
        self._known = traces.of(model)
        if any(trace_key(layer, volume) not in self._known for layer in self.layers):
            self._following = Following(volume)
            self._following.__enter__()

    def _end(self, *_: object) -> None:
        if self._following is not None:
            following, self._following = self._following, None
            following.__exit__(None, None, None)

    def _hook(self, module: nn.Module, args: tuple, output: Any) -> Any:
        self.again = torch._C._current_graph_task_id() != -1
        if not self.again:
            self._counts[module] += 1
        for layer, call in self._wanted[module]:
            if self.again and self._counts[module] > 1:
                raise LayerError(
                    f"layer {layer!r} lies in a checkpointed part of the network and is one of {self._counts[module]} "
                    "calls, which cannot be told apart when they are run again; turn checkpointing off"
                )
            if self.again or self._counts[module] == (call or 1):
                if not isinstance(output, Tensor):
                    raise LayerError(
                        f"layer {layer!r} returns a {type(output).__name__}, not a tensor; name a layer inside"
                    )
                replaced = self._see(layer, output, self._trace(layer, output))
                output = output if replaced is None else replaced
        return output

    def _trace(self, layer: str, output: Tensor) -> Trace:
        key = trace_key(layer, self.volume)
        if self._following is not None:
            self._known[key] = trace_of(self._following.fates.get(output), tuple(output.shape), len(self.volume))
        return self._known[key]

    def require(self) -> None:
        """Raise :class:`LayerError` where a layer did not run, or not in the way that was named."""
        for module, wanted in self._wanted.items():
            count = self._counts.get(module, 0)
            for layer, call in wanted:
                name = address(layer)[0]
                if count == 0:
                    raise LayerError(f"layer {layer!r} did not run in the forward pass; name one that does")
                if call is None and count > 1:
                    raise LayerError(
                        f"layer {layer!r} runs more than once in one forward pass; name one of its {count} calls, "
                        f"'{name}#1' to '{name}#{count}', or the layer around it"
                    )
                if call is not None and not 1 <= call <= count:
                    raise LayerError(
                        f"there is no {layer!r}: layer {name!r} runs {count} time{'s' if count > 1 else ''} in one "
                        f"forward pass; name {name}#1{f' to {name}#{count}' if count > 1 else ''}"
                    )


class Tap:
    """The outputs of some layers as points to differentiate by: the graph cut.

    Inside the block, the output of the first of the layers to run is detached and re-enters the network as a leaf that
    requires grad.  What came before was not recorded, what comes after is: differentiating by :attr:`activations` costs
    a backward pass through the suffix alone.  This is exact for any architecture, skip connections included, because
    the derivative by the layer counts only paths that leave the layer.  Layers that run later, in what was recorded,
    stay in the graph.

    Every point is (B, C, *cells): tokens, channels that come last and slices folded into the batch are read so, and
    what is no cell, such as a class token, belongs to the rest of the network.

    Use inside :func:`undisturbed`.
    """

    def __init__(self, model: nn.Module, *layers: str) -> None:
        self.layers = layers
        self._calls = Calls(model, layers, self._cut)
        self._seen: dict[str, Tensor] = {}
        # A layer may return a parameter or buffer, which must not be written to.
        self._own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def __enter__(self) -> Tap:
        self._seen.clear()
        self._calls.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._calls.__exit__(*error)

    def _cut(self, layer: str, output: Tensor, trace: Trace) -> Tensor:
        cells = reader(layer, output, trace, self._calls.volume)
        read = cells(output)
        first = not output.requires_grad  # else a point in the graph, of which in-place steps get a copy
        point = read.detach().clone().requires_grad_(True) if first else read.clone()
        if not self._calls.again:
            self._seen[layer] = point
        if first and output.untyped_storage().data_ptr() not in self._own:
            try:
                # Written back in place, so that every other name the model has for this memory (an in-place
                # activation's input, an identity's) continues from the leaf too.
                read.copy_(point)
                return output
            except RuntimeError:  # an expanded view cannot be written to, and nothing can alias it by writing
                pass
        if read is output:
            return point.clone()
        whole = output.clone()
        cells(whole).copy_(point)
        return whole

    @property
    def activations(self) -> list[Tensor]:
        """Each layer's output, (B, C, *cells)."""
        self._calls.require()
        return [self._seen[layer] for layer in self.layers]


def reader(layer: str, output: Tensor, trace: Trace, volume: Tensor) -> Callable[[Tensor], Tensor]:
    """What reads outputs like this one of a layer as (B, C, *cells).

    Raises
    ------
    LayerError
        Where the output's elements are known to be no grid of cells, or nothing is known of an output whose shape is
        none either.
    """
    if trace.reading is not None and tuple(output.shape) == trace.reading.shape(len(volume)):
        return partial(trace.reading, batch=len(volume))
    if trace.lost and not trace.no_grid and output.ndim == volume.ndim and len(output) == len(volume):
        return _as_it_is
    found = trace.lost or f"it was {trace.reading} before: has the model been changed?"
    raise LayerError(
        f"layer {layer!r} returns {tuple(output.shape)}; a CAM needs cells along each of the input's {volume.ndim - 2} "
        f"spatial axes, and these cannot be told from it ({found}); name a layer that has them (`volsal layers`)"
    )


def _as_it_is(output: Tensor) -> Tensor:
    return output


def find_layer(model: nn.Module, layer: str) -> nn.Module:
    """The submodule of that dotted name, of which ``#n`` may name a call; LayerError with the nearest names otherwise.

    Wrappers' prefixes may be left out or put before the name.
    """
    model = bare(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    name, _ = address(layer)
    name = name if name in modules else unwrapped(name)
    if not name or name not in modules:
        raise LayerError(f"the model has no layer {layer!r}{nearest(layer, modules)}")
    for outer in ("", *(name[:at] for at, sign in enumerate(name) if sign == ".")):
        require_open(modules[outer], f"layer {layer!r}")
    return modules[name]


def require_open(module: nn.Module, what: str) -> None:
    """Raise :class:`LayerError` where what lies in ``module`` cannot be watched."""
    if isinstance(module, torch.jit.ScriptModule):
        raise LayerError(
            f"the model is a TorchScript program, so {what} cannot be looked into; load the Python model, or export it "
            "with torch.export (.pt2)"
        )


def gradients(scores: list[Tensor], leaf: Tensor, where: str) -> list[Tensor]:
    """The gradient of each score by ``leaf``, of the leaf's shape; errors as for :func:`gradients_by`."""
    return [found for (found,) in gradients_by(scores, [leaf], [where])]


def gradients_by(scores: list[Tensor], points: Sequence[Tensor], where: Sequence[str]) -> list[list[Tensor]]:
    """The gradient of each score by each of ``points``, from one backward pass a score; the graph goes with the last.

    A volume's score depends on that volume alone (evaluation mode), so the gradient of the sum holds each volume's own.

    Raises
    ------
    LayerError
        Where no differentiable path leads from a point (``where`` names them) to a score, or a gradient is NaN.
    """
    half, reentrant = _nature(scores)
    backward = _accumulated if reentrant else torch.autograd.grad
    found = []
    for number, score in enumerate(scores):
        keep = half or number < len(scores) - 1
        by, scale = _backward(backward, score, points, where[0], _SCALES if half else (1.0,), keep)
        found.append([_checked(gradient, scale, name) for gradient, name in zip(by, where, strict=True)])
    return found


def _backward(
    through: Callable[..., Sequence[Tensor | None]],
    score: Tensor,
    points: Sequence[Tensor],
    where: str,
    scales: Sequence[float],
    keep: bool,
) -> tuple[Sequence[Tensor | None], float]:
    """The gradients multiplied by the first of ``scales`` with which none overflows, or the last, and that scale."""
    by: Sequence[Tensor | None] = [None] * len(points)
    for scale in scales if score.requires_grad else ():
        try:
            by = through(scale * score.sum(), points, retain_graph=keep, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"the model has no backward pass to {where}: {reason}") from error
        if len(scales) == 1 or all(gradient is None or bool(gradient.isfinite().all()) for gradient in by):
            return by, scale
    return by, scales[-1]


# What float16 can hold is a matter of scale, so the gradient travels multiplied, as far up as nothing overflows.
_SCALES = tuple(2.0**power for power in range(15, -18, -4))


def _nature(scores: Sequence[Tensor]) -> tuple[bool, bool]:
    """Whether float16 occurs on the way back from ``scores``, and whether a re-entrant checkpoint does."""
    waiting = [score.grad_fn for score in scores if score.grad_fn is not None]
    seen, half, reentrant = set(waiting), False, False
    while waiting:
        node = waiting.pop()
        half |= any(getattr(made, "dtype", None) == torch.float16 for made in getattr(node, "_input_metadata", ()))
        reentrant |= "CheckpointFunction" in node.name()
        following = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= following
        waiting += following
    return half, reentrant


def _accumulated(
    score: Tensor, points: Sequence[Tensor], retain_graph: bool, allow_unused: bool
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` by way of ``.grad``, the one way that re-entrant checkpoints know."""
    for point in points:
        point.retain_grad()
        point.grad = None
    score.backward(retain_graph=retain_graph)
    return tuple(point.grad for point in points)


def _checked(gradient: Tensor | None, scale: float, where: str) -> Tensor:
    if gradient is None:
        raise LayerError(
            f"no gradient reaches {where}: the score does not depend on it through differentiable steps (is there a "
            "detach, an argmax, a no_grad or a re-entrant checkpoint in the model, after it or around it?)"
        )
    if not torch.isfinite(gradient).all():
        raise LayerError(f"the gradient at {where} is NaN or infinite; check the weights and the input")
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return gradient if scale == 1 else gradient / scale
