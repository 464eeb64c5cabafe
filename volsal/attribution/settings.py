"""What a method's settings may be."""

from __future__ import annotations

import math
from typing import Any

from volsal.errors import VolsalError


class SettingError(VolsalError, ValueError):
    """A setting that has no meaning, or none for this model and volume, or settings that do not fit each other."""


def require_layer(method: str, layer: Any) -> None:
    """Raise :class:`SettingError` for what is neither a layer's name nor None."""
    if layer is not None and not isinstance(layer, str):
        raise SettingError(f"{method}: layer is a name, as in 'layer4' (a number in quotes, as in '4'), not {layer!r}")


def require_whole(method: str, least: int = 1, **settings: Any) -> None:
    """Raise :class:`SettingError` for a setting that is not a whole number of at least ``least``."""
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise SettingError(f"{method}: {name} is a whole number of at least {least}, not {value!r}")


def require_number(method: str, **settings: Any) -> None:
    """Raise :class:`SettingError` for a setting that is not a finite number."""
    for name, value in settings.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise SettingError(f"{method}: {name} is a finite number, not {value!r}")


def require_positive(method: str, **settings: Any) -> None:
    """Raise :class:`SettingError` for a setting that is not a finite number above 0."""
    for name, value in settings.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise SettingError(f"{method}: {name} is a number above 0, not {value!r}")
