"""The ways in which torch lets one and the same function be called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_NAMESPACES: tuple[Any, ...] = (F, torch, Tensor, torch._C._nn)


def spellings(names: Iterable[str]) -> dict[Any, str]:
    """Every callable by which torch offers the functions of these names, or their in-place forms, and its name.

    >>> found = spellings(["relu"])
    >>> found[torch.relu_] == found[Tensor.relu] == found[torch.ops.aten.relu.default] == "relu"
    True
    """
    found: dict[Any, str] = {}
    for name in names:
        for spelling in (name, f"{name}_"):
            for space in _NAMESPACES:
                if (function := getattr(space, spelling, None)) is not None:
                    found[function] = name.strip("_")
            # Exported programs call the operators themselves.
            if (packet := getattr(torch.ops.aten, spelling, None)) is not None:
                found |= {getattr(packet, overload): name.strip("_") for overload in packet.overloads()}
    return found
