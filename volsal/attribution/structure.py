"""What a model is made of: the network inside its wrappers, the names of its layers, and what was learnt about them."""

from __future__ import annotations

import re
import sys
from threading import Lock
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, ref

from torch import nn

T = TypeVar("T")


def bare(model: nn.Module) -> nn.Module:
    """The network inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``, which share its weights.

    It runs on one device, as Python: what is explained is the network, and neither its splitting nor its compilation
    is part of it.
    """
    compiler = sys.modules.get("torch._dynamo")  # not loaded where nothing is compiled, and slow to load
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif compiler is not None and isinstance(model, compiler.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def address(layer: str) -> tuple[str, int | None]:
    """The dotted name and the number of the call: ``act#2`` is what ``act`` returns the second time that it runs.

    >>> address("act#2"), address("encoder.layer4")
    (('act', 2), ('encoder.layer4', None))
    """
    found = re.fullmatch(r"(.*)#(\d+)", layer)
    return (found[1], int(found[2])) if found else (layer, None)


def unwrapped(name: str) -> str:
    """A layer's name without what wrappers put before it."""
    return re.sub(r"^((module|_orig_mod)(\.|$))+", "", name)


class Memory(Generic[T]):
    """What was found out about each model, forgotten with the model, and when it is built otherwise.

    That is when a module is replaced, or a module's plain settings are, such as the stride of a convolution.  What
    hides deeper, in a list or an object of the user's, goes unnoticed.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, tuple[list[ref[nn.Module]], list[Any], dict[Any, T]]] = (
            WeakKeyDictionary()
        )
        self._lock = Lock()

    def of(self, model: nn.Module) -> dict[Any, T]:
        """What is known of this model, to be read and added to."""
        modules = list(model.modules())
        built = [_settings(module) for module in modules]
        with self._lock:
            before, so, known = self._known.get(model, ([], None, {}))
            # Compared by identity: a module's id may be used again once it is gone.
            if built != so or any(old() is not new for old, new in zip(before, modules, strict=True)):
                known = {}
                self._known[model] = [ref(module) for module in modules], built, known
            return known


# What every module has, its mode among it; and the dropout, which changes while a model is explained.  None says where
# cells lie.
_PASSING = frozenset([*vars(nn.Module()), "dropout"])


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    """The module's numbers, words and tuples of them."""
    return [(name, value) for name, value in vars(module).items() if name not in _PASSING and _is_plain(value)]


_SIMPLE = (int, float, str, type(None))


def _is_plain(value: Any) -> bool:
    return isinstance(value, _SIMPLE) or (isinstance(value, tuple) and all(isinstance(part, _SIMPLE) for part in value))
