"""The linear layer at a model's end: found while the model runs, and what its bias adds to the score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from volsal.attribution.alignment.alignment import LayerMap
from volsal.attribution.method import spatial
from volsal.attribution.tap import LayerError


class Heads:
    """Inside the block, the linear layers of ``model`` that read one vector per volume, as they run.

    ``nn.Linear``, and convolutions that read a single cell.  None: nothing is watched.
    """

    def __init__(self, model: nn.Module | None) -> None:
        linear = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        self._modules = [module for module in model.modules() if isinstance(module, linear)] if model else []
        self._seen: list[tuple[Any, Tensor, Tensor]] = []

    def __enter__(self) -> Heads:
        self._hooks = [module.register_forward_hook(self._look) for module in self._modules]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        # Only what comes after the layer in question has a graph.
        if output.requires_grad and args and args[0].ndim > 1 and args[0][0].numel() == args[0].shape[1]:
            self._seen.append((module, args[0].detach().flatten(1), output))

    def bias(self, activation: Tensor, score: Tensor) -> Tensor | None:
        """What the layers that read the mean, or the sum, of ``activation`` (B, C, *cells) add to ``score`` (B,).

        (B,): their biases, each by the score's derivative by its output; None where no such layer leads to the score.
        """
        pooled = [activation.mean(spatial(activation)), activation.sum(spatial(activation))]
        found: list[Tensor] = []
        for module, read, output in self._seen:
            if any(read.shape == form.shape and self._equal(read, form, form.abs().amax()) for form in pooled):
                (by,) = torch.autograd.grad(score.sum(), output, retain_graph=True, allow_unused=True)
                if by is not None:
                    bias = by.new_zeros(by.shape[1]) if module.bias is None else module.bias.detach()
                    found.append(by.flatten(1).to(activation) @ bias.to(activation))
        return torch.stack(found).sum(0) if found else None

    def require_linear(self, of: LayerMap, score: Tensor, bias: Tensor | None) -> None:
        """LayerError unless the mean of the map (B, 1, *cells) and the head's ``bias`` (B,) are the ``score`` (B,)."""
        needs = (
            f"{of.method} needs a layer whose channels' means go through one linear layer to the score, as by global "
            f"average pooling and nn.Linear, and layer {of.layer!r} is none:"
        )
        instead = "name another layer, or use grad-cam or hires-cam, which need no such head"
        if bias is None:
            raise LayerError(f"{needs} no linear layer reads its means; {instead}")
        made = of.values.flatten(1).mean(1) + bias
        size = (of.gradient * of.activation).abs().sum(1).flatten(1).mean(1) + bias.abs()
        if not self._equal(score, made, size):
            raise LayerError(f"{needs} they make {float(made[0]):.6g} of a score of {float(score[0]):.6g}; {instead}")

    def _equal(self, theirs: Tensor, ours: Tensor, size: Tensor) -> bool:
        """To the rounding of what the model computed, in whatever precision, at the size of what was summed."""
        tolerance = max(1e-4, *(4 * torch.finfo(output.dtype).eps for _, _, output in self._seen))
        return bool(((theirs - ours).abs() <= tolerance * size).all())
