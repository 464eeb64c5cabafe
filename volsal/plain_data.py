"""Values as a record holds them: JSON, alike in every process and on every machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from datetime import date
from enum import Enum
from hashlib import sha256
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What is told by its own words, which are the same everywhere; anything else by its kind.
_IN_WORDS = (PurePath, range, slice, complex, date, np.dtype, torch.dtype, torch.device)


def plain_data(value: Any, most_numbers: int = 0) -> Any:
    """``value`` as JSON can hold it; what is no finite number, no word and no collection of these is put in words.

    An array of more than ``most_numbers`` is told by its shape and its digest.  Of a setting's object, a transform's
    own included, its kind is told with what it was made with, and nothing by its address.
    """

    def inner(part: Any) -> Any:
        return plain_data(part, most_numbers)

    if isinstance(value, Enum):
        return inner(value.value)
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return _array(value.detach().cpu().double().numpy() if isinstance(value, Tensor) else value, most_numbers)
    if isinstance(value, Mapping):
        return {str(key): inner(entry) for key, entry in value.items()}
    if isinstance(value, Set):
        return sorted(map(inner, value), key=str)  # its own order differs from process to process
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview, range)):
        return [inner(entry) for entry in value]
    return _object(value, inner)


def name_of(value: Any) -> str:
    """The name of a function or a class; of anything else, of what class it is."""
    return getattr(value, "__qualname__", type(value).__name__)


def public_settings(value: Any) -> dict[str, Any]:
    """What an object was made with, defaults included: its public attributes."""
    return {name: part for name, part in getattr(value, "__dict__", {}).items() if not name.startswith("_")}


def _array(array: Any, most_numbers: int) -> Any:
    if array.ndim == 0:
        return str(array) if isinstance(array.item(), np.generic) else plain_data(array.item(), most_numbers)
    if array.dtype.hasobject:
        return name_of(array)
    if array.size <= most_numbers:
        return plain_data(array.tolist(), most_numbers)
    return {"shape": list(array.shape), "sha256": sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}


def _object(value: Any, inner: Callable[[Any], Any]) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": name_of(value)} | {f.name: inner(getattr(value, f.name)) for f in fields(value)}
    if type(value).__module__.startswith("monai.") and (settings := public_settings(value)):
        return {"kind": name_of(value), "settings": inner(settings)}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": len(value), "sha256": sha256(value).hexdigest()}
    return str(value) if isinstance(value, _IN_WORDS) else name_of(value)
