"""What a case's result depends on: a result is kept exactly while this stays the same."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from volsal.config import Config, FunctionSection
from volsal.explain import Explainer
from volsal.scans.scan import file_digest


def recipe_of(config: Config, explainer: Explainer, result_version: int) -> dict[str, Any]:
    """All that the results of a run depend on, but the scans; plain data.

    Versions of torch and of the machine are recorded with each result and are no part of this: an upgrade must not
    throw away a finished run.
    """
    return {
        "result_version": result_version,
        "weights": explainer.weights_sha256,
        "model": config.model.model_dump(exclude={"weights", "device"}),
        "preprocess": repr(config.preprocess),
        "methods": [explainer.names, [repr(method) for method in explainer.methods]],
        "per_channel": config.per_channel,
        "windows": config.windows.model_dump() if config.windows else None,
        "targets": [repr(target) for target in explainer.targets],
        "alignment": [explainer.align.id, repr(sorted(explainer.alignments.items(), key=repr))],
        "scans": config.scans.reading() if config.scans else None,
        "maps": config.maps.model_dump(),
        "code": _code(config),
        # Both change a result's last bits.
        "threads": torch.get_num_threads(),
        "device": torch.device(config.model.device).type,
    }


def _code(config: Config) -> dict[str, str]:
    """Digests of the user's own code: the files that the config names, and what these import from beside them."""
    function = config.preprocess.function if isinstance(config.preprocess, FunctionSection) else ""
    named = [ref.rpartition(":")[0] for ref in (config.model.factory or "", function)]
    waiting = [config.folder / name for name in named if name.endswith(".py")]
    found = {config.folder / config.model.file} if config.model.file else set()
    while waiting:
        file = waiting.pop().resolve()
        if file not in found:
            found.add(file)
            waiting += _imported(file)
    return {f"{number} {file.name}": file_digest(file) for number, file in enumerate(sorted(found))}


def _imported(file: Path) -> Iterator[Path]:
    """The files beside ``file``, or in folders beside it, that it imports by name."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module or ''}.{alias.name}".lstrip(".") for alias in node.names)]
        else:
            continue
        for name in filter(None, names):
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):
                stem = file.parent.joinpath(*parts[:depth])
                yield from (path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file())


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
