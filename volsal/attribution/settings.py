"""What a method's settings may be."""

from __future__ import annotations

from typing import Any

from volsal.errors import VolsalError


class SettingError(VolsalError, ValueError):
    """A setting of a method that has no meaning, or none for this model and volume."""


def require_whole(method: str, least: int = 1, **settings: Any) -> None:
    """Raise :class:`SettingError` for a setting that is not a whole number of at least ``least``."""
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise SettingError(f"{method}: {name} is a whole number of at least {least}, not {value!r}")


def require_positive(method: str, **settings: Any) -> None:
    """Raise :class:`SettingError` for a setting that is not a finite number above 0."""
    for name, value in settings.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise SettingError(f"{method}: {name} is a number above 0, not {value!r}")
