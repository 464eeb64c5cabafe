"""Values as a record holds them: JSON, alike in every process and on every machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from enum import Enum
from hashlib import sha256
from typing import Any

import numpy as np
from torch import Tensor


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
    if isinstance(value, Sequence):
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
        return plain_data(array.item(), most_numbers)
    if array.size <= most_numbers or array.dtype.hasobject:
        return plain_data(array.tolist(), most_numbers)
    return {"shape": list(array.shape), "sha256": sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}


def _object(value: Any, inner: Callable[[Any], Any]) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": name_of(value)} | {f.name: inner(getattr(value, f.name)) for f in fields(value)}
    if type(value).__module__.startswith("monai.") and (settings := public_settings(value)):
        return {"kind": name_of(value), "settings": inner(settings)}
    return name_of(value) if hasattr(value, "__qualname__") or " at 0x" in str(value) else str(value)
