"""Does the map depend on what the model learned?  Maps after the weights are randomised, beside maps of other things.

A map that stays as it was when the network's weights are replaced by random ones shows the image, not the model
(Adebayo et al., NeurIPS 2018).  How unlike is unlike enough is judged by pairs of maps that have nothing to do with one
another (Arun et al., Radiology: AI 2021).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from volsal.attribution.tap import undisturbed
from volsal.audit.metric import Figure, MetricError, Undefined, numbers
from volsal.audit.similarity import Compared, Similarity, similarity
from volsal.errors import nearest
from volsal.grid import Grid

#: What becomes of the running statistics of batch normalisation once weights before it are random.
Statistics = Literal["estimated", "kept", "reset"]

Mode = Literal["cascading", "independent"]

# Models are made from seeds such as 0 and 42; drawn from the same, "random" weights would be those they began with.
_SEEDS = 730_241_167


def parameterised(model: nn.Module, volume: Tensor) -> list[str]:
    """The modules that hold weights of their own, by name, in the order in which ``model(volume)`` first uses them.

    Those it does not use, or uses without calling them, come last, as registered.
    """
    names = {module: name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    called: dict[str, None] = {}
    hooks = [module.register_forward_pre_hook(lambda module, _: called.setdefault(names[module])) for module in names]
    try:
        with undisturbed(model), torch.no_grad():
            model(volume)
    finally:
        for hook in hooks:
            hook.remove()
    return list(called) + [name for name in names.values() if name not in called]


def randomised(
    model: nn.Module,
    layers: Sequence[str],
    seed: int = 0,
    statistics: Statistics = "estimated",
    inputs: Tensor | None = None,
) -> nn.Module:
    """A copy of the model with the weights of ``layers`` drawn anew; the model itself stays as it is.

    A layer draws by its own ``reset_parameters``; where it has none, or that does not reach a weight (a parametrised
    one, say), the weight's values are permuted, which keeps their distribution.

    Batch normalisation divides by statistics of the trained layers before it, so that in evaluation mode a randomised
    network may be silent, or blow up, for a reason that is no one's weights.  ``statistics`` says what becomes of them:
    ``estimated`` anew from ``inputs`` in those layers whose input is not what it was, which keeps activations in their
    range; ``kept``; or ``reset`` to mean 0 and variance 1 in all layers, as ``reset_parameters`` does in one.

    Parameters
    ----------
    layers : of :func:`parameterised`
    inputs : (N, C, *spatial) volumes such as the model sees; needed by ``estimated`` where the model normalises so

    Raises
    ------
    MetricError
        For an unknown layer or choice, or where inputs are needed and not given.
    """
    if statistics not in ("estimated", "kept", "reset"):
        raise MetricError(f"unknown choice of statistics {statistics!r}; known: estimated, kept, reset")
    other = copy.deepcopy(model)
    modules = dict(other.named_modules())
    norms = [module for module in modules.values() if isinstance(module, _BatchNorm) and module.track_running_stats]
    kept = [copy.deepcopy(dict(norm.named_buffers())) for norm in norms]
    estimating = statistics == "estimated" and bool(norms)
    if estimating and inputs is None:
        raise MetricError("statistics of batch normalisation are to be estimated, but no inputs are given")
    before = _estimates(other, norms, inputs) if estimating and inputs is not None else []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(_SEEDS + seed)
        for name in layers:
            if name not in modules:
                raise MetricError(f"the model has no layer {name!r}{nearest(name, modules)}")
            _draw(modules[name])
    after = _estimates(other, norms, inputs) if estimating and inputs is not None else before
    for at, norm in enumerate(norms):
        if statistics == "reset":
            norm.reset_running_stats()
        elif statistics == "kept" or _close(before[at], after[at]):
            _set(norm, kept[at])
        else:
            _set(norm, after[at])
    return other


def _draw(module: nn.Module) -> None:
    """New weights for one module; the random numbers are the caller's."""
    old = [(parameter, parameter.detach().clone()) for parameter in module.parameters(recurse=False)]
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
    for parameter, values in old:
        if torch.equal(parameter, values):
            order = torch.randperm(values.numel()).to(values.device)
            parameter.copy_(values.flatten()[order].reshape(values.shape))


_Buffers = dict[str, Tensor]


def _estimates(model: nn.Module, norms: Sequence[_BatchNorm], inputs: Tensor) -> list[_Buffers]:
    """Mean and variance of what reaches each layer of normalisation, by one pass in training mode of these alone."""
    momenta = [norm.momentum for norm in norms]
    with undisturbed(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.training, norm.momentum = True, None  # the plain average over all passes, here one
        model(inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.training, norm.momentum = False, momentum
    return [copy.deepcopy(dict(norm.named_buffers())) for norm in norms]


def _close(one: _Buffers, other: _Buffers) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=1e-4) for name in ("running_mean", "running_var"))


def _set(norm: _BatchNorm, buffers: _Buffers) -> None:
    for name, values in buffers.items():
        norm.get_buffer(name).copy_(values)


@dataclass(frozen=True)
class Randomisation:
    """How alike the map still is once a layer, in a cascade with all layers after it, is random.

    Attributes
    ----------
    layer : the last one that was randomised
    randomised : how many layers are random
    similarity : of the map to the trained model's
    """

    layer: str
    randomised: int
    similarity: Similarity


def randomisation(
    model: nn.Module,
    explain: Callable[[nn.Module], NDArray],
    grid: Grid,
    layers: Sequence[str],
    mode: Mode = "cascading",
    seed: int = 0,
    statistics: Statistics = "estimated",
    inputs: Tensor | None = None,
    within: NDArray[np.bool_] | None = None,
    depths: Sequence[int] = (),
) -> Iterator[Randomisation]:
    """Model parameter randomisation test; Adebayo et al., NeurIPS 2018, sections 3.1 and 3.2.

    Maps of models with the last layer random, the last two, ..., all (``cascading``), or each layer alone
    (``independent``), each beside the trained model's map.  No similarity at the end of a cascade is good; where it
    stays, the map does not depend on what was learned.  What counts as none: :func:`unrelated`.

    Parameters
    ----------
    explain : a model to the map (I, J, K), on ``grid``, of one and the same volume and target
    layers : in the order of use, as of :func:`parameterised`; a sample of them is fine, the others stay trained
    statistics, inputs : as for :func:`randomised`
    within : the voxels that count
    depths : counted from the last layer, from 1, the places of the cascade that are looked at; empty: each
    """
    trained = Compared(explain(model), grid, within)
    backwards = list(reversed(layers))
    for number, layer in enumerate(backwards, start=1):
        if depths and number not in depths:
            continue
        chosen = backwards[:number] if mode == "cascading" else [layer]
        other = randomised(model, chosen, seed, statistics, inputs)
        yield Randomisation(layer, len(chosen), trained.with_(Compared(explain(other), grid, within)))


def unrelated(
    maps: Sequence[NDArray],
    grid: Grid,
    pairs: int = 50,
    seed: int = 0,
    within: NDArray[np.bool_] | None = None,
) -> list[Similarity]:
    """How alike maps are that have nothing to do with one another; the baseline of Arun et al., Radiology: AI 2021.

    Parameters
    ----------
    maps : of one model for different patients, as in the paper, or of independently randomised models for one; (I, J,
        K) each, on ``grid``
    pairs : drawn without replacement from all pairs
    """
    if len(maps) < 2:
        raise MetricError(f"unrelated maps are compared in pairs; expected 2 maps or more, found {len(maps)}")
    every = list(combinations(range(len(maps)), 2))
    chosen = np.random.default_rng(seed).permutation(len(every))[:pairs]
    return [similarity(maps[every[at][0]], maps[every[at][1]], grid, within) for at in chosen]


def excess(randomised: Sequence[Figure], baseline: Sequence[Figure]) -> Figure:
    """Mean similarity after randomisation minus that of unrelated maps; the test is passed below 0.

    The rule of Arun et al., Radiology: AI 2021, figure 3, there with SSIM.  Undefined figures are left out of both
    means; undefined where either has none.
    """
    means = []
    for figures in (randomised, baseline):
        known = [figure for figure in figures if not isinstance(figure, Undefined)]
        if not known:
            return Undefined("no similarity is defined")
        means.append(float(numbers(known).mean()))
    return means[0] - means[1]


def random_logit(
    explain: Callable[[int], NDArray],
    target: int,
    others: Sequence[int],
    grid: Grid,
    within: NDArray[np.bool_] | None = None,
) -> dict[int, Similarity]:
    """How alike the map for ``target`` is to the maps for other outputs, by output; low is good.

    Sixt, Granz and Landgraf, ICML 2020.  A map that is the same for whatever is asked does not answer the question.
    Where two outputs are one another's negative, as of a softmax over two classes, signed maps are too, and only
    measures of absolute values apply.

    ``explain`` takes an output's number to its map (I, J, K).  A model with one output has no other: an empty answer.
    """
    asked = explain(target)
    return {other: similarity(asked, explain(other), grid, within) for other in others if other != target}


def label_randomisation(
    trained: NDArray, on_random_labels: NDArray, grid: Grid, within: NDArray[np.bool_] | None = None
) -> Similarity:
    """Data randomisation test: a model's map beside that of the same architecture trained on shuffled labels.

    Adebayo et al., NeurIPS 2018, section 4; low is good, judged by :func:`unrelated`.
    """
    return similarity(trained, on_random_labels, grid, within)
