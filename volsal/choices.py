"""Which methods are asked for, with which settings, and what each is called in a result."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any

from volsal.attribution import METHODS, Method, SettingError
from volsal.errors import VolsalError, nearest

# What a config may say of a method besides its settings.
_NAME = "name"
# Of a setting, in a name; file names hold 255 bytes.
_LONGEST = 24


class UnknownMethodError(VolsalError, LookupError):
    """No attribution method has that id."""


def as_method(method: str | Method) -> Method:
    """The method of that id, with its default settings; a method as it is.

    Raises
    ------
    UnknownMethodError
        Where no method has that id, with the nearest one.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise UnknownMethodError(f"unknown method {method!r}{nearest(str(method), METHODS)}")
    return METHODS[method]()


def configured_methods(entries: Sequence[str | Mapping[str, Mapping[str, Any] | None]]) -> dict[str, Method]:
    """A config's methods by their names.

    An entry is ``grad-cam``, or ``grad-cam: {layer: layer3}``, or ``grad-cam: {layer: layer3, name: deep}``, which is
    then called that.

    Raises
    ------
    UnknownMethodError
        For an unknown method or setting.
    SettingError
        Where two methods are the same, or are called the same.
    """
    chosen = [_configured(entry) for entry in entries]
    methods = [method for method, _ in chosen]
    return dict(zip(method_names(methods, [name for _, name in chosen]), methods, strict=True))


def _configured(entry: str | Mapping[str, Mapping[str, Any] | None]) -> tuple[Method, str]:
    if isinstance(entry, str):
        return as_method(entry), ""
    if len(entry) != 1:
        raise UnknownMethodError(f"a method is one id with its settings, not {dict(entry)}")
    ((id, given),) = entry.items()
    settings = dict(given or {})
    name = str(settings.pop(_NAME, ""))
    kind = type(as_method(id))
    known: list[str] = [f.name for f in fields(kind)] if is_dataclass(kind) else []
    for setting in settings:
        if setting not in known:
            raise UnknownMethodError(f"method {id} has no setting {setting!r}{nearest(setting, [*known, _NAME])}")
    return kind(**settings), name


def method_names(methods: Sequence[Method], given: Sequence[str] = ()) -> list[str]:
    """What each method is called in files and records.

    The name that was ``given`` for it; else its id, followed, where several have that id, by the settings in which they
    differ.

    Raises
    ------
    SettingError
        Where there is no method, where two are the same, or where two would be called the same.
    """
    given = given or [""] * len(methods)
    if not methods or len(set(methods)) < len(methods):
        raise SettingError(f"methods must be given, each once; got {', '.join(m.id for m in methods) or 'none'}")
    for name in given:
        if name and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
            raise SettingError(f"a method's name is lower-case letters, digits, '.' and '-', not {name!r}")
    names = [name or _name(method, methods) for name, method in zip(given, methods, strict=True)]
    for name in names:
        if names.count(name) > 1:
            raise SettingError(f"two methods would be called {name!r}; name them, as in grad-cam: {{name: deep}}")
    return names


def _name(method: Method, methods: Sequence[Method]) -> str:
    own = vars(method)
    kin = [vars(other) for other in methods if other.id == method.id]
    differing = [key for key in own if len({_told(key, settings) for settings in kin}) > 1]
    told = [_told(key, own) for key in differing if own[key] is not None]
    return "-".join([method.id, *filter(None, told)])


def _told(key: str, settings: Mapping[str, Any]) -> str:
    """A setting in a name: a word or a file's name as it is, anything else after the setting's own name."""
    value = settings.get(key)
    plain = PurePath(value).name if isinstance(value, (str, PurePath)) else f"{key} {value}"
    return re.sub(r"[^a-z0-9.]+", "-", plain.lower())[:_LONGEST].strip("-.")
