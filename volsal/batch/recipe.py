"""What a case's result depends on: a result is kept exactly while this stays the same."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from volsal.config import Config, ConfigError, FunctionSection
from volsal.explain import Explainer
from volsal.scans.digest import sha256_of
from volsal.scans.scan import file_digest

# The user's own code as this process has loaded it: a change of it is not seen by Python.
_LOADED: dict[Path, str] = {}


def recipe_of(config: Config, explainer: Explainer, result_version: int) -> dict[str, Any]:
    """All that the results of a run depend on, but the scans; plain data.

    Versions of torch and of the machine are recorded with each result and are no part of this: an upgrade must not
    throw away a finished run.
    """
    return {
        "result_version": result_version,
        "weights": explainer.weights_sha256,
        # Of a bundle the weights and its files tell, wherever it lies.
        "model": config.model.model_dump(exclude={"weights", "device", "bundle"}),
        "preprocess": repr(config.preprocess),
        "methods": [explainer.names, [repr(method) for method in explainer.methods]],
        "per_channel": config.per_channel,
        "windows": config.windows.model_dump() if config.windows else None,
        "targets": [repr(target) for target in explainer.targets],
        "alignment": [explainer.align.id, repr(sorted(explainer.alignments.items(), key=repr))],
        "scans": config.scans.reading() if config.scans else None,
        "maps": config.maps.model_dump(),
        "code": _code(config, explainer),
        # Both change a result's last bits.
        "threads": torch.get_num_threads(),
        "device": torch.device(config.model.device).type,
    }


def _code(config: Config, explainer: Explainer) -> dict[str, str]:
    """Digests of what is not volsal's: the files that the config names, what these import, and a bundle's own."""
    bundle = explainer.bundle.files if explainer.bundle else ()
    found = _modules(config) | {file for file in bundle if file.suffix == ".py"}
    digests = {file: sha256_of(file) for file in found}
    for file, digest in digests.items():
        if _LOADED.setdefault(file, digest) != digest:
            raise ConfigError(
                f"{file}: changed since this process loaded it, and Python does not load it again; restart Python (the "
                "cluster's workers, where it is they who say so)"
            )
    if config.model.file:  # an exported program, which is read each time
        file = config.path_of(config.model.file)
        digests[file.resolve()] = file_digest(file)
    digests |= {file: sha256_of(file) for file in bundle}
    return {f"{number} {file.name}": digests[file] for number, file in enumerate(sorted(digests))}


def _modules(config: Config) -> set[Path]:
    function = config.preprocess.function if isinstance(config.preprocess, FunctionSection) else ""
    named = [ref.rpartition(":")[0] for ref in (config.model.factory or "", function)]
    waiting = [config.path_of(name).resolve() for name in named if name.endswith(".py")]
    tops = {file.parent for file in waiting}
    for name in named:
        if (file := _own(name)) is not None:
            waiting.append(file)
            tops.add(file.parents[name.count(".") + (file.name == "__init__.py")])
    found: set[Path] = set()
    while waiting:
        file = waiting.pop().resolve()
        if file not in found:
            found.add(file)
            waiting += _imported(file, tops)
    return found


def _own(module: str) -> Path | None:
    """The file of a module that was imported by its name and is not installed but lies in a folder of the user's."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or module.partition(".")[0] == "volsal" or {"site-packages", "dist-packages"} & {*Path(file).parts}:
        return None
    return Path(file).resolve()


def _imported(file: Path, tops: Iterable[Path]) -> Iterator[Path]:
    """The files that ``file`` imports by name: from beside it, or from one of the folders ``tops``."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # only lies beside what is imported; it could not be run
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names, starts = [alias.name for alias in node.names], [file.parent, *tops]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module or ''}.{alias.name}".lstrip(".") for alias in node.names)]
            starts = [*file.parents[node.level - 1 : node.level]] if node.level else [file.parent, *tops]
        else:
            continue
        for stem in (
            start.joinpath(*parts) for name in filter(None, names) for parts in _heads(name) for start in starts
        ):
            yield from (path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file())


def _heads(name: str) -> list[list[str]]:
    """``a.b.c`` as a, a.b and a.b.c: importing the last runs them all."""
    parts = name.split(".")
    return [parts[: depth + 1] for depth in range(len(parts))]


def key_of(recipe: Mapping[str, Any], digests: Sequence[str], others: Sequence[Path], given: Mapping[str, Any]) -> str:
    """The key of a case's result, hexadecimal.

    Parameters
    ----------
    recipe : as :func:`recipe_of` makes it
    digests : of the scan's files
    others : further files that its targets and methods read
    given : the model's other inputs
    """
    content = {**recipe, "scan": list(digests), "others": [file_digest(path) for path in others]}
    if given:
        content["given"] = {
            name: file_digest(value) if isinstance(value, Path) else repr(value) for name, value in given.items()
        }
    return sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()
