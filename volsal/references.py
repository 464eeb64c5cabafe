"""Names of Python objects in configs: ``package.module:name`` and ``path/to/file.py:name``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from volsal.errors import VolsalError, nearest


class UnknownReferenceError(VolsalError, ImportError):
    """A name in a config leads to no Python object."""


def resolve(reference: str, folder: Path | None = None) -> Any:
    """The object that ``reference`` names.  Importing its module runs that module: it is code the user names.

    Parameters
    ----------
    reference : ``package.module:name`` (importable), or ``path/to/file.py:name`` (a file of the user's own)
    folder : what a relative file path starts from; the working directory where None
    """
    where, colon, name = reference.rpartition(":")
    if not colon or not where or not name:
        raise UnknownReferenceError(
            f"{reference!r} is not the name of a Python object; write package.module:name or path/to/file.py:name"
        )
    file = Path(folder or ".") / Path(where).expanduser()
    module = _from_file(file) if where.endswith(".py") else _by_name(where, reference)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise UnknownReferenceError(f"{where} has no {name!r}{nearest(name, _public(module))}")
        found = getattr(found, part)
    return found


def _public(module: ModuleType) -> list[str]:
    return [name for name in vars(module) if not name.startswith("_")]


def _by_name(where: str, reference: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except ImportError as error:
        raise UnknownReferenceError(
            f"{reference}: {error}; is the package installed in this environment? (a file of your own is named "
            "path/to/file.py:name)"
        ) from error


def _from_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise UnknownReferenceError(f"{path}: no such file")
    # Two files of one name are two modules; one file is loaded once.
    name = f"volsal_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UnknownReferenceError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # so that the file finds its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is anybody's code
        del sys.modules[name]
        raise UnknownReferenceError(f"{path}: cannot be imported: {type(error).__name__}: {error}") from error
    return module
