"""Programs made by ``torch.export.save`` (``.pt2``), let in only where nothing in them can act outside the tensors.

``torch.export.load`` by itself unpickles what an archive asks it to and resolves operator names by attribute look-up,
so an archive could name ``torch.load`` or a pickled object.  Here everything in it is read as data first, and refused
unless it consists of tensors, known operators and arithmetic on sizes.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from volsal.attribution.tap import ModelError

_AGAIN = "export the model again with torch.export.save in a current PyTorch"
# Operators that compute.  aten.from_file and friends open files, so they are not among them.
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file|_from_file|save|load)\w+\.\w+"
    r"|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast|scan|cond)"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|torch\.sym_(max|min|float|int|not|ite|sqrt)|math\.(ceil|floor|trunc|sqrt)"
)
_SIZE_FUNCTIONS = {
    "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CeilDiv", "CleanDiv", "IntTrueDiv", "FloatTrueDiv",
    "Add", "Mul", "Pow", "Integer", "Rational", "Float", "PowByNatural", "ToFloat", "TruncToInt", "CeilToInt",
    "FloorToInt", "Ne", "Eq", "And", "Or", "Not",
}  # fmt: skip
_SYMBOL = re.compile(r"Symbol\('\w+'(, \w+=(True|False))*\)")
_GUARD_NAMES = {"L", "max", "min"}
_GUARD_ATTRIBUTES = {"size", "shape", "stride", "ndim"}
_EXPRESSION = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Constant, ast.Name, ast.Call, ast.Load,
    ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip


def load_exported(path: Path) -> nn.Module:
    """The program as a module tree whose layers keep the names they had when the model was exported.

    Raises
    ------
    ModelError
        For a file that is no such archive, or holds anything that would be unpickled or run.
    """
    content = path.read_bytes()
    try:
        checked = _inert(content, path)
        with _only_tensors(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own internals here
            program = torch.export.load(io.BytesIO(checked))
            return cast(nn.Module, torch.export.unflatten(program))
    except ModelError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path}: cannot be read as an exported program ({reason}); {_AGAIN}") from error


@contextmanager
def _only_tensors() -> Iterator[None]:
    """Make every ``torch.load`` inside refuse anything but tensors, also where its caller asks otherwise."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _inert(content: bytes, path: Path) -> bytes:
    """The archive rebuilt from the members that were checked, so that what is loaded is what was looked at.

    Zip readers differ in how they look up names, so nothing but known names, under one root, each once, is let in.
    """
    if not zipfile.is_zipfile(io.BytesIO(content)):
        raise ModelError(f"{path}: not an exported program; {_AGAIN}")
    rebuilt = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(rebuilt, "w") as clean:
        names = archive.namelist()
        if not any(name.endswith("/archive_format") for name in names):
            kind = "a TorchScript archive or checkpoint" if any("data.pkl" in n for n in names) else "an older format"
            raise ModelError(f"{path}: {kind}, not a current exported program; {_AGAIN}")
        if len({name.partition("/")[0] for name in names}) != 1 or len(set(names)) != len(names):
            raise ModelError(f"{path}: holds more than one program, or a part twice; {_AGAIN}")
        for name in names:
            member = archive.read(name)
            _require_known(name.partition("/")[2], member, path)
            clean.writestr(name, member)
    return rebuilt.getvalue()


_MEMBER = re.compile(
    r"models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
)


def _require_known(name: str, member: bytes, path: Path) -> None:
    if "aotinductor" in name.lower() or name.lower().endswith((".so", ".pyd", ".dll")):
        raise ModelError(f"{path}: holds compiled machine code ({name}), which would run; {_AGAIN}")
    if re.match(r"data/constants/(custom_obj|opaque_obj)", name, re.IGNORECASE):
        raise ModelError(f"{path}: holds a pickled object ({name}), which would run code; {_AGAIN}")
    if not _MEMBER.fullmatch(name):
        raise ModelError(f"{path}: holds an unknown part, {name!r}; {_AGAIN} (one program, without extra files)")
    if name.endswith(".json"):
        _require_plain(json.loads(member), path)
    elif name.endswith(".pt"):
        torch.load(io.BytesIO(member), weights_only=True)


def _require_plain(node: Any, path: Path) -> None:
    """Walk a JSON document; refuse operators that do more than compute and expressions that are not arithmetic."""
    if isinstance(node, list):
        for part in node:
            _require_plain(part, path)
    elif isinstance(node, str) and '"type"' in node:
        _require_plain_tree(json.loads(node), path)
    elif isinstance(node, dict):
        _require_plain_entry(node, path)
        for part in node.values():
            _require_plain(part, path)


def _require_plain_entry(node: dict[str, Any], path: Path) -> None:
    if {"target", "inputs", "outputs"} <= node.keys() and not _OPERATOR.fullmatch(str(node["target"])):
        raise ModelError(f"{path}: calls {node['target']}, which volsal does not let an archive run; {_AGAIN}")
    if "as_operator" in node and not _OPERATOR.fullmatch(str(node["as_operator"])):
        raise ModelError(f"{path}: passes on {node['as_operator']}, which volsal does not let an archive run")
    if "path_name" in node and not re.fullmatch(r"(weight|tensor)_\d+", str(node["path_name"])):
        raise ModelError(f"{path}: holds a pickled object ({node['path_name']}), which would run code; {_AGAIN}")
    if "expr_str" in node:
        _require_arithmetic(str(node["expr_str"]), _SIZE_FUNCTIONS, path)
    for guard in node.get("guards_code") or ():
        _require_arithmetic(str(guard), _GUARD_NAMES, path)


_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


def _require_plain_tree(node: Any, path: Path) -> None:
    """The shape of inputs and outputs, a JSON text inside the JSON: only Python's own containers.

    Any other name in it would be imported.
    """
    if isinstance(node, list):
        for part in node:
            _require_plain_tree(part, path)
    elif isinstance(node, dict):
        if "type" in node and node["type"] not in _CONTAINERS:
            raise ModelError(f"{path}: takes or returns a {node['type']}, which volsal does not import for an archive")
        if any(str(key).startswith("__") for key in node):
            raise ModelError(f"{path}: names a Python object where containers belong; {_AGAIN}")
        for part in node.values():
            _require_plain_tree(part, path)
    elif isinstance(node, str) and node[:1] in "[{" and node:
        _require_plain_tree(json.loads(node), path)


def _require_arithmetic(expression: str, functions: set[str], path: Path) -> None:
    """Refuse an expression that is more than arithmetic and comparison of sizes."""
    try:
        tree = ast.parse(_SYMBOL.sub("size", expression), mode="eval")
    except SyntaxError as error:
        raise ModelError(f"{path}: holds an expression that makes no sense: {expression[:60]!r}") from error
    guards = functions is _GUARD_NAMES
    for node in ast.walk(tree):
        allowed = isinstance(node, _EXPRESSION) or (guards and isinstance(node, (ast.Subscript, ast.Attribute)))
        if isinstance(node, ast.Name):
            allowed = not node.id.startswith("_") and (node.id in functions or not guards)
        if isinstance(node, ast.Attribute):
            allowed = guards and node.attr in _GUARD_ATTRIBUTES
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            allowed = called in functions | (_GUARD_ATTRIBUTES if guards else set())
        if isinstance(node, ast.Constant) and not guards:
            allowed = isinstance(node.value, (int, float))
        if not allowed:
            raise ModelError(f"{path}: holds code where sizes belong: {expression[:60]!r}; {_AGAIN}")
