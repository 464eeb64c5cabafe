"""Look inside a model for the length of a ``with`` block, and leave it exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from volsal.errors import VolsalError, nearest


class LayerError(VolsalError, LookupError):
    """A layer is not there, or its output cannot carry a map."""


class ModelError(VolsalError, RuntimeError):
    """The model cannot be loaded, or cannot be run on this input."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, frozen parameters, gradients possible; all of it undone afterwards, whatever happens.

    Frozen parameters have two effects.  No weight gradient is ever computed or stored; and, since nothing before the
    point of interest requires grad, nothing there is recorded: the prefix costs what it costs under ``no_grad``.
    """
    flags = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", *(p.device.type for p in model.parameters())}:
            stack.enter_context(torch.autocast(kind, enabled=False))  # gradients underflow in half precision
        try:
            model.eval()
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, flag in flags:
                module.training = flag
            for parameter in trainable:
                parameter.requires_grad_(True)


def plain(volume: Tensor) -> Tensor:
    """A private copy of ``volume`` as a bare tensor.

    A subclass such as MONAI's MetaTensor would carry its affine through the model onto grids where it is wrong, and a
    model that writes into its input must not write into the caller's.
    """
    if not isinstance(volume, Tensor) or volume.ndim < 3:
        found = tuple(volume.shape) if isinstance(volume, Tensor) else type(volume).__name__
        raise ModelError(f"a model input is a tensor (B, C, *spatial), with at least one spatial axis; got {found}")
    return copied_on_write(volume.detach().as_subclass(Tensor))


def copied_on_write(tensor: Tensor) -> Tensor:
    """A differentiable clone whose bytes are copied only if the model writes into it, which few models do."""
    try:
        return torch._lazy_clone(tensor)
    except RuntimeError:  # memory that torch does not own, such as an array's, cannot be shared so
        return tensor.clone()


def forward(model: nn.Module, volume: Tensor) -> Any:
    """``model(volume)``, with a failure inside the model told in one line."""
    try:
        return model(volume)
    except (VolsalError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        raise ModelError(
            f"the model fails on an input of shape {tuple(volume.shape)}, {str(volume.dtype).removeprefix('torch.')}"
            f"{_first_layer(model, volume)}: {reason}"
        ) from error


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


class Tap:
    """The outputs of some layers as points to differentiate by: the graph cut.

    Inside the block, the output of the first of the layers to run is detached and re-enters the network as a leaf that
    requires grad.  What came before was not recorded, what comes after is: differentiating by :attr:`activations` costs
    a backward pass through the suffix alone.  This is exact for any architecture, skip connections included, because
    the derivative by the layer counts only paths that leave the layer.  Layers that run later, in what was recorded,
    stay in the graph.

    Use inside :func:`undisturbed`.
    """

    def __init__(self, model: nn.Module, *layers: str) -> None:
        self.layers = layers
        self._modules = [find_layer(model, layer) for layer in layers]
        self._seen: dict[str, Tensor] = {}
        # A layer may return a parameter or buffer, which must not be written to.
        self._own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def __enter__(self) -> Tap:
        self._seen.clear()
        self._hooks = [
            module.register_forward_hook(partial(self._cut, layer))
            for layer, module in zip(self.layers, self._modules, strict=True)
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _cut(self, layer: str, module: nn.Module, args: tuple, output: Any) -> Tensor:
        if layer in self._seen:
            raise LayerError(
                f"layer {layer!r} runs more than once in one forward pass, so it has no single activation; "
                "name the layer around it, or one that runs once (`volsal layers` lists them)"
            )
        if not isinstance(output, Tensor):
            raise LayerError(f"layer {layer!r} returns a {type(output).__name__}, not a tensor; name a layer inside")
        if output.requires_grad:  # after another layer's cut: a point in the graph, of which in-place steps get a copy
            self._seen[layer] = output.clone()
            return self._seen[layer].clone()
        leaf = self._seen[layer] = output.detach().clone().requires_grad_(True)
        if output.untyped_storage().data_ptr() in self._own:
            return leaf.clone()
        try:
            # Written back in place, so that every other name the model has for this memory (an in-place activation's
            # input, an identity's) continues from the leaf too.
            return output.copy_(leaf)
        except RuntimeError:  # an expanded view cannot be written to, and nothing can alias it by writing
            return leaf.clone()

    @property
    def activations(self) -> list[Tensor]:
        """Each layer's output, (B, C, *cells)."""
        for layer in self.layers:
            if layer not in self._seen:
                raise LayerError(f"layer {layer!r} did not run in the forward pass; name one that does")
        return [self._seen[layer] for layer in self.layers]


def find_layer(model: nn.Module, layer: str) -> nn.Module:
    """The submodule of that dotted name; :class:`LayerError` with the nearest names otherwise."""
    modules = dict(model.named_modules())
    if not layer or layer not in modules:
        raise LayerError(f"the model has no layer {layer!r}{nearest(layer, modules)}")
    return modules[layer]


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
    found = []
    # A float16 model's gradients by a large layer are below what float16 holds, so they travel multiplied.
    scale = 1024.0 if any(point.dtype == torch.float16 for point in points) else 1.0
    for number, score in enumerate(scores):
        by: Sequence[Tensor | None] = [None] * len(points)
        if score.requires_grad:
            last = number == len(scores) - 1
            try:
                by = torch.autograd.grad(scale * score.sum(), points, retain_graph=not last, allow_unused=True)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise ModelError(f"the model has no backward pass to {where[0]}: {reason}") from error
        found.append([_checked(gradient, scale, name) for gradient, name in zip(by, where, strict=True)])
    return found


def _checked(gradient: Tensor | None, scale: float, where: str) -> Tensor:
    if gradient is None:
        raise LayerError(
            f"no gradient reaches {where}: the score does not depend on it through differentiable steps "
            "(is there a detach, an argmax or a no_grad in the model after it?)"
        )
    if not torch.isfinite(gradient).all():
        raise LayerError(f"the gradient at {where} is NaN or infinite; check the weights and the input")
    return gradient if scale == 1 else gradient.float() / scale
