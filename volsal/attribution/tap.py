"""Look inside a model for the length of a ``with`` block, and leave it exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
    """The output of one layer as a leaf, so that what follows can be differentiated by it: the graph cut.

    Inside the block, the layer's output is detached and re-enters the network as a leaf that requires grad.  What came
    before was not recorded, what comes after is: differentiating by :attr:`activation` costs a backward pass through
    the suffix alone.  This is exact for any architecture, skip connections included, because the derivative by the
    layer counts only paths that leave the layer.

    Use inside :func:`undisturbed`.
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        self.layer = layer
        self._module = find_layer(model, layer)
        self._leaf: Tensor | None = None
        # A layer may return a parameter or buffer, which must not be written to.
        self._own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def __enter__(self) -> Tap:
        self._leaf = None
        self._hook = self._module.register_forward_hook(self._cut)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _cut(self, module: nn.Module, args: tuple, output: Any) -> Tensor:
        if self._leaf is not None:
            raise LayerError(
                f"layer {self.layer!r} runs more than once in one forward pass, so it has no single activation; "
                "name the layer around it, or one that runs once (`volsal layers` lists them)"
            )
        if not isinstance(output, Tensor):
            raise LayerError(
                f"layer {self.layer!r} returns a {type(output).__name__}, not a tensor; name a layer inside"
            )
        self._leaf = output.detach().clone().requires_grad_(True)
        if output.untyped_storage().data_ptr() in self._own:
            return self._leaf.clone()
        try:
            # Written back in place, so that every other name the model has for this memory (an in-place activation's
            # input, an identity's) continues from the leaf too.
            return output.copy_(self._leaf)
        except RuntimeError:  # an expanded view cannot be written to, and nothing can alias it by writing
            return self._leaf.clone()

    @property
    def activation(self) -> Tensor:
        """The layer's output, (B, C, *cells): the leaf."""
        if self._leaf is None:
            raise LayerError(f"layer {self.layer!r} did not run in the forward pass; name one that does")
        return self._leaf


def find_layer(model: nn.Module, layer: str) -> nn.Module:
    """The submodule of that dotted name; :class:`LayerError` with the nearest names otherwise."""
    modules = dict(model.named_modules())
    if not layer or layer not in modules:
        raise LayerError(f"the model has no layer {layer!r}{nearest(layer, modules)}")
    return modules[layer]


def gradients(scores: list[Tensor], leaf: Tensor, where: str) -> list[Tensor]:
    """The gradient of each score by ``leaf``, of the leaf's shape; the graph is kept until the last one.

    A volume's score depends on that volume alone (evaluation mode), so the gradient of the sum holds each volume's own.

    Raises
    ------
    LayerError
        Where no differentiable path leads from ``where`` to a score, or a gradient is NaN.
    """
    found = []
    # A float16 model's gradients by a large layer are below what float16 holds, so they travel multiplied.
    scale = 1024.0 if leaf.dtype == torch.float16 else 1.0
    for number, score in enumerate(scores):
        gradient = None
        if score.requires_grad:
            last = number == len(scores) - 1
            try:
                (gradient,) = torch.autograd.grad(scale * score.sum(), leaf, retain_graph=not last, allow_unused=True)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise ModelError(f"the model has no backward pass to {where}: {reason}") from error
            gradient = gradient if gradient is None or scale == 1 else gradient.float() / scale
        if gradient is None:
            raise LayerError(
                f"no gradient reaches {where}: the score does not depend on it through differentiable steps "
                "(is there a detach, an argmax or a no_grad in the model after it?)"
            )
        if not torch.isfinite(gradient).all():
            raise LayerError(f"the gradient at {where} is NaN or infinite; check the weights and the input")
        found.append(gradient)
    return found
