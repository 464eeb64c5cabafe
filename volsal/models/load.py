"""A trained model from what is on disk: a factory and its weights, or an exported program.

Loading never unpickles and never runs code that the user did not name.  A safe load that fails is an error; it is not
tried again in an unsafe way.
"""

from __future__ import annotations

import copy
import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from volsal.attribution.tap import ModelError
from volsal.references import resolve

# Keys under which training frameworks nest the state dict (Lightning, MONAI, nnU-Net, timm and plain habit).
_NESTED = ("state_dict", "model_state_dict", "model", "network", "network_weights", "net")
_WAY = (
    "name a factory (package.module:factory or path/to/file.py:factory) with weights in .safetensors or a state_dict "
    ".pt, or export the model once with torch.export.save(torch.export.export(model, (example,)), 'model.pt2')"
)
_TORCHSCRIPT = "a TorchScript archive, which is a program and has no usable hooks"
_PREFIX = "module."  # left by DataParallel


def load_model(
    source: str | Path,
    arguments: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    folder: Path | None = None,
) -> nn.Module:
    """A model in evaluation mode, on the CPU.

    Parameters
    ----------
    source : ``package.module:factory`` or ``path/to/file.py:factory``, called with ``arguments``; or a ``.pt2`` file
        made by ``torch.export.save``
    arguments : keyword arguments of the factory
    weights : ``.safetensors``, or a ``.pt``/``.pth``/``.ckpt`` that holds plain tensors (read with
        ``weights_only=True``); None keeps what the factory made
    folder : what relative paths start from

    Raises
    ------
    ModelError
        For files that are missing, damaged, would have to be unpickled or run, or weights that do not fit the model
        exactly, or hold NaN.
    """
    base = folder or Path()
    if str(source).endswith(".pt2"):
        from volsal.models.exported import load_exported

        if arguments or weights:
            raise ModelError(f"{source}: an exported program brings its own weights and takes no arguments; drop them")
        model = load_exported(_existing(base / source))
    elif ":" in str(source):
        model = _build(str(source), dict(arguments or {}), folder)
        if weights is not None:
            return filled(model, base / weights).eval()
    else:
        raise ModelError(_refusal(str(source), base / source))
    _require_finite(model, source)
    return model.eval()


def filled(model: nn.Module, weights: Path) -> nn.Module:
    """``model`` with the weights of that file in it; see :func:`load_model`."""
    path = _existing(weights)
    _fill(model, read_weights(path), path)
    _require_finite(model, path)
    return model


def with_weights(model: nn.Module, weights: str | Path, folder: Path | None = None) -> nn.Module:
    """A copy of a model with other weights, such as those of another training; ModelError as for :func:`load_model`."""
    return filled(copy.deepcopy(model), (folder or Path()) / weights)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    return path


def _refusal(source: str, path: Path) -> str:
    if path.is_dir() or source.endswith(".zip"):
        return (
            f"{source}: a folder or archive; where it is a MONAI bundle, unpack it and name its folder in the config, "
            f"model: {{bundle: FOLDER}} (Python: volsal.load_bundle); otherwise {_WAY}"
        )
    if path.is_file() and not path.stat().st_size:
        return f"{source}: the file is empty; fetch it again"
    if source.endswith(".safetensors"):
        return f"{source}: weights, whose architecture is missing; {_WAY}"
    if path.is_file() and _is_torchscript(path):
        return f"{source}: {_TORCHSCRIPT}; {_WAY}"
    if source.endswith((".pt", ".pth", ".ckpt", ".pkl")):
        return f"{source}: weights without an architecture, or a pickled model, which is a program; {_WAY}"
    if source.endswith(".onnx"):
        return f"{source}: an ONNX graph has no gradients in PyTorch; {_WAY}"
    return f"{source}: not a model volsal can load; {_WAY}"


def _build(source: str, arguments: dict[str, Any], folder: Path | None) -> nn.Module:
    factory = resolve(source, folder)
    if not callable(factory):
        raise ModelError(f"{source}: a {type(factory).__name__}, not a factory that returns a model")
    try:
        model = factory(**arguments)
    except Exception as error:
        raise ModelError(f"{source}: calling it with {arguments} fails: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{source}: returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a weights file, without unpickling anything but tensors and plain containers."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ModelError(f"{path}: not a sound safetensors file ({error}); fetch it again") from error
    if _is_torchscript(path):
        raise ModelError(f"{path}: {_TORCHSCRIPT}; {_WAY}")
    if not _is_checkpoint(path):
        raise ModelError(f"{path}: not a sound weights file (neither a zip archive nor a pickle); fetch it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a remark on pickle protocols, before the refusal
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: holds more than tensors ({_unsafe_part(error)}), and unpickling it would run its code; save only "
            "the weights, safetensors.torch.save_file(model.state_dict(), 'weights.safetensors'), where you trust it"
        ) from error
    except Exception as error:  # there is nothing that damaged bytes could not make of it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path}: not a sound weights file ({reason}); fetch or save it again") from error
    return _state_dict(content, path)


def _unsafe_part(error: BaseException) -> str:
    """The part of torch's message that names what is not a tensor."""
    for line in str(error).splitlines():
        if "GLOBAL" in line:
            return line[line.index("GLOBAL") :].split(" was not")[0].strip()
    return "its pickle is not a plain state dict"


def _is_checkpoint(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):  # none, or damaged; torch refuses programs too
        return False


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not _are_tensors(content):
        keys = f" with keys {', '.join(map(str, list(content)[:6]))}" if isinstance(content, Mapping) else ""
        raise ModelError(
            f"{path}: holds a {type(content).__name__}{keys}, not a state dict of tensors (looked under "
            f"{', '.join(_NESTED)} too)"
        )
    state = dict(content)
    if all(name.startswith(_PREFIX) for name in state):
        state = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
    return state


def _are_tensors(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())


def _fill(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load ``state``, every tensor of it and nothing left out; else say what does not match."""
    wanted = model.state_dict()
    unmade = [name for name, tensor in wanted.items() if is_lazy(tensor) or tensor.is_meta]
    if unmade:
        raise ModelError(
            f"{path}: {unmade[0]!r} of the model has no place for values (a lazy layer, or the meta device); build the "
            "model with its sizes, on the CPU"
        )
    # Checkpoints from before PyTorch 0.4.1 lack this counter; evaluation mode never reads it.
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    extra = [name for name in state if name not in wanted]
    reshaped = [
        f"{name} (file {tuple(state[name].shape)}, model {tuple(wanted[name].shape)})"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    # Copied all the same, whole numbers would lose their scale and complex ones a half.
    retyped = [
        f"{name} (file {_type(state[name])}, model {_type(wanted[name])})"
        for name in wanted
        if name in state and not _holds(state[name], wanted[name])
    ]
    if missing or extra or reshaped or retyped:
        found = [
            f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
            for names, what in (
                (missing, "missing"),
                (extra, "not in the model"),
                (reshaped, "of another shape"),
                (retyped, "of another type"),
            )
            if names
        ]
        raise ModelError(
            f"{path}: its weights do not match the model: {'; '.join(found)}; is this the right architecture, with the "
            "right arguments?"
        )
    model.load_state_dict(state, strict=False)


def _holds(found: Tensor, wanted: Tensor) -> bool:
    """Whether the values of ``found`` can stand where those of ``wanted`` do."""
    if found.is_meta or found.is_quantized or found.layout != wanted.layout:
        return False
    return found.is_complex() == wanted.is_complex() and found.is_floating_point() >= wanted.is_floating_point()


def _type(tensor: Tensor) -> str:
    words = [str(one).removeprefix("torch.") for one in (tensor.dtype, tensor.layout)]
    return " ".join([*(word for word in words if word != "strided"), *(["without values"] if tensor.is_meta else [])])


def _require_finite(model: nn.Module, source: str | Path) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise ModelError(f"{source}: {count} of {tensor.numel()} values of {name!r} are NaN or infinite")


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of all parameters and buffers, hexadecimal.

    The same for the same weights whatever file they came from.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
