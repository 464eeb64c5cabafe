"""A model from a MONAI bundle: its network, weights, preprocessing, windows and the names of its channels.

A bundle's config can run anything.  What of it is plain data and names of MONAI's own networks and transforms is built
here without MONAI's parser; what is more is only built by that parser, and only where the user trusts the bundle.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal

from torch import nn

from volsal.attribution import Windows
from volsal.attribution.windows.windows import WindowsError
from volsal.models.bundle_config import BundleConfig, BundleError, Call, named, read_mapping
from volsal.models.load import filled

Part = Literal["preprocess", "windows"]
_CONFIGS = ("inference.json", "inference.yaml", "inference.yml")
_WEIGHTS = ("model.safetensors", "model.pt")
# Of monai.transforms: what only computes, and keeps the affine true.
_STEPS = frozenset({
    "AdjustContrast", "BorderPad", "CenterScaleCrop", "CenterSpatialCrop", "ClipIntensityPercentiles", "CropForeground",
    "DivisiblePad", "Flip", "GaussianSharpen", "GaussianSmooth", "HistogramNormalize", "MedianSmooth",
    "NormalizeIntensity", "Orientation", "Resize", "ResizeWithPadOrCrop", "Rotate90", "ScaleIntensity",
    "ScaleIntensityFixedMean", "ScaleIntensityRange", "ScaleIntensityRangePercentiles", "ShiftIntensity", "Spacing",
    "SpatialCrop", "SpatialPad", "StdShiftIntensity", "ThresholdIntensity", "Zoom",
})  # fmt: skip
# What volsal does itself, and the arguments that then say nothing of the voxels.
_FILE = {"image_only", "meta_keys", "meta_key_postfix", "overwriting", "ensure_channel_first", "simple_keys"}
_OURS = {
    "LoadImage": _FILE,
    "EnsureChannelFirst": {"strict_check", "channel_dim", "meta_keys", "meta_key_postfix"},
    "EnsureType": {"device", "track_meta", "data_type", "wrap_sequence"},
    "ToTensor": {"device", "track_meta", "wrap_sequence"},
    "ToDevice": {"device", "non_blocking"},
    "Identity": set[str](),
}
# The readers of LoadImage that give what volsal's does, and the types of EnsureType and its like.
_USUAL = {"reader": ("NibabelReader", "ITKReader", "PydicomReader"), "dtype": ("float32", "torch.float32", "float")}
# Arguments of dictionary transforms that are none of the transform they apply.
_OF_DICTIONARIES = {"keys", "allow_missing_keys", "meta_keys", "meta_key_postfix", "start_coord_key", "end_coord_key"}
_OF_PADDING = ("value", "constant_values")
_FOR_EACH_KEY = {"mode", "padding_mode", "align_corners", "dtype", "anti_aliasing", "anti_aliasing_sigma"}
# Arguments of inferers that say where and how fast, and nothing of the result.
_HOW = {"device", "sw_device", "progress", "cpu_thresh", "buffer_steps", "buffer_dim", "cache_roi_weight_map"}
_INFERERS = ("SimpleInferer", "SlidingWindowInferer", "SlidingWindowInfererAdapt")


@dataclass(frozen=True, eq=False)
class Bundle:
    """What a bundle holds, as :class:`volsal.Explainer` takes it.

    Attributes
    ----------
    name, version : of the bundle; its folder's name, and what its metadata say
    model : the network with its weights, in evaluation mode, on the CPU
    preprocess : MONAI transforms for a channel-first scan; empty where it was not asked for
    windows : how the network is applied to a scan; None: to all of it at once
    classes : names of the output's channels, where the metadata name each of them, and each otherwise
    channels : the same of the input's
    files : what was read, but the weights; and of a bundle that ran, all configs and code
    sha256 : of the names and bytes of :attr:`files`, hexadecimal
    ran : what of it ran because it was trusted, in words, each with its place
    """

    name: str
    version: str
    model: nn.Module
    preprocess: Sequence[Callable]
    windows: Windows | None
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    files: tuple[Path, ...]
    sha256: str
    ran: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """As plain data, for records."""
        return {
            "name": self.name,
            "version": self.version,
            "sha256": self.sha256,
            "classes": list(self.classes),
            "ran": list(self.ran),
        }


def load_bundle(
    folder: str | Path,
    weights: str | Path | None = None,
    *,
    trust: bool = False,
    without: Collection[Part] = (),
) -> Bundle:
    """The model that a bundle describes.

    Without ``trust`` nothing of the bundle is run: of its config only plain data, references, and MONAI's and torch's
    own networks, layers and transforms are used.  Weights are never unpickled.

    Parameters
    ----------
    folder : with ``configs/inference.json`` (or ``.yaml``), ``configs/metadata.json`` and ``models/model.pt``
    weights : a file in place of the bundle's own
    trust : let MONAI's parser run what the bundle's config and scripts say.  Consent to running somebody's code
    without : parts that are not taken from the bundle, and need no trust: ``preprocess``, ``windows``

    Raises
    ------
    BundleError
        Where it is damaged, or would have to be trusted: then with what would run.
    ModelError
        For weights that cannot be read without running them, or do not fit.
    """
    with _not_endless(folder):
        return _Reader(Path(folder), trust, without).bundle(weights)


def would_run(folder: str | Path, without: Collection[Part] = ()) -> tuple[str, ...]:
    """What of a bundle would run if it were trusted, in words; nothing is run to find out."""
    with _not_endless(folder):
        return tuple(_Reader(Path(folder), False, without).told())


@contextmanager
def _not_endless(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise BundleError(f"{folder}: its config is nested too deeply") from error


class _Reader:
    """Reads one bundle."""

    def __init__(self, folder: Path, trust: bool, without: Collection[Part]) -> None:
        if not folder.is_dir():
            raise BundleError(
                f"{folder}: {'a file; unpack it, and name the folder' if folder.exists() else 'no such folder'}"
            )
        self.folder, self.trust = folder.resolve(), trust
        self.config = BundleConfig.read(self._first("configs", _CONFIGS))
        self.metadata = self._first("configs", ("metadata.json",))
        self.about = read_mapping(self.metadata)
        # What the bundle calls the image: the first that its preprocessing names.
        self.key = ""
        self.parts: dict[str, Any] = {}
        self.to_run: dict[str, list[str]] = {}
        self._take("network", self.config.network)
        if "preprocess" not in without:
            self._take("preprocess", self._steps)
        if "windows" not in without:
            self._take("windows", self._inferer)

    def bundle(self, weights: str | Path | None) -> Bundle:
        """What was read, built."""
        if self.to_run and not self.trust:
            raise BundleError(self._refusal())
        model = self._network()
        source = Path(weights) if weights is not None else self._first("models", _WEIGHTS)
        filled(model, source)
        outputs, inputs = (_channels(self.about, side) for side in ("outputs", "inputs"))
        files = self._files()
        return Bundle(
            self.folder.name,
            str(self.about.get("version", "")),
            model.eval(),
            self._preprocess(),
            self._windows(),
            outputs,
            inputs,
            files,
            _digest(files, self.folder),
            tuple(self.told()),
        )

    def told(self) -> list[str]:
        """What would run, each with its place."""
        lines = [line for part in self.to_run.values() for line in part]
        return list(dict.fromkeys([*lines, *self.config.imports()])) if lines else []

    def _refusal(self) -> str:
        lines = self.told()
        shown = "; ".join(lines[:12]) + (f"; and {len(lines) - 12} more" if len(lines) > 12 else "")
        own = " and ".join(f"'{part}:'" for part in self.to_run)
        other = "" if "network" in self.to_run else f"; or give {own} in the config, in place of the bundle's"
        return (
            f"{self.folder}: would run what is not plainly MONAI's: {shown}.  Look at it, and where you trust it, "
            f"say --trust-bundle (in Python trust=True, or trust_bundle=True of an Explainer){other}"
        )

    def _take(self, part: str, read: Callable[[], Any]) -> None:
        before = len(self.config.would_run)
        self.parts[part] = read()
        if lines := self.config.would_run[before:]:
            self.to_run[part] = lines

    def _first(self, home: str, names: Sequence[str]) -> Path:
        """The first of these files in a folder of the bundle."""
        place = self.folder / home
        found = next((place / name for name in names if (place / name).is_file()), None)
        if found is None:
            there = sorted(file.name for file in place.glob("*")) if place.is_dir() else []
            held = f"holds {', '.join(there[:6])}{', …' if len(there) > 6 else ''}" if there else "is not there"
            fetch = "; large files of the model zoo come with `python -m monai.bundle download`" * (home == "models")
            raise BundleError(f"{self.folder}: has no {home}/{' or '.join(names)} ({home} {held}){fetch}")
        if not found.resolve().is_relative_to(self.folder):
            raise BundleError(f"{found}: a link that leads out of the bundle; copy the bundle with `cp -rL`")
        return found

    def _files(self) -> tuple[Path, ...]:
        files = {self.config.file, self.metadata}
        if self.to_run:
            files |= {file for file in (self.folder / "configs").rglob("*") if file.is_file()}
            files |= set(self.folder.rglob("*.py"))
        return tuple(sorted(files))

    # Of which a trusted bundle's is made by MONAI's parser

    def _parsed(self, name: str) -> Any:
        from monai.bundle import ConfigParser

        parser = ConfigParser()
        parser.read_config(str(self.config.file))
        parser.read_meta(str(self.metadata))
        parser["bundle_root"] = str(self.folder)
        parser["device"] = "$torch.device('cpu')"
        if str(self.folder) not in sys.path:
            sys.path.append(str(self.folder))  # so that it finds its scripts
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of file readers that are not used, for instance
                return parser.get_parsed_content(name)
        except Exception as error:  # it is anybody's code
            reason = (str(error).splitlines() or [""])[0]
            raise BundleError(
                f"{self.config.file}: {name} cannot be built: {type(error).__name__}: {reason}{self._made_for()}"
            ) from error

    def _made_for(self) -> str:
        import monai

        return f" (it was made for MONAI {self.about.get('monai_version', '?')}, this is {monai.__version__})"

    def _network(self) -> nn.Module:
        if "network" in self.to_run:
            model = self._parsed(next(key for key in ("network", "network_def") if key in self.config.content))
        else:
            made = self.parts["network"]
            try:
                model = made() if isinstance(made, Call) else made
            except BundleError as error:
                raise BundleError(f"{self.config.file}: {error}{self._made_for()}") from error
        if not isinstance(model, nn.Module):
            raise BundleError(f"{self.config.file}: its network is a {type(model).__name__}, not a torch.nn.Module")
        return model

    def _preprocess(self) -> Sequence[Callable]:
        if "preprocess" in self.to_run:
            key = self.key or next(iter(_format(self.about, "inputs")), "image")
            return [BundleSteps(self._parsed("preprocessing"), key, self.config.file)]
        return [call() for call in self.parts.get("preprocess", ())]

    def _windows(self) -> Windows | None:
        if "windows" in self.to_run:
            return _windows_of(self._parsed("inferer"), self.config.file)
        call = self.parts.get("windows")
        return _windows_of(call(), self.config.file) if call else None

    # The preprocessing, step by step

    def _steps(self) -> list[Call]:
        if "preprocessing" not in self.config.content:
            raise BundleError(
                f"{self.config.file}: describes no 'preprocessing'; write 'preprocess:' in the config ([] for none)"
            )
        return self._calls(self.config.content["preprocessing"], "preprocessing")

    def _calls(self, node: Any, place: str) -> list[Call]:
        self.config.count()
        node, place = self.config.followed(node, place)
        if isinstance(node, list):
            return [call for n, part in enumerate(node) for call in self._calls(part, f"{place}::{n}")]
        if not isinstance(node, Mapping) or "_target_" not in node:
            self.config.tell(place, node)
            return []
        target, arguments = self.config.component(node, place)
        name = _transform(target)
        keys = self._keys(arguments, place)
        self.key = self.key or (keys[0] if keys else "")
        if name == "Compose":
            self._refuse_others(arguments, {"transforms", "map_items", "unpack_items", "log_stats"}, target, place)
            return self._calls(arguments.get("transforms", []), f"{place}::transforms")
        if name in _OURS:
            self._ours(name, arguments, target, place)
            return []
        if name not in _STEPS:
            self.config.tell(place, target)
            return []
        return [] if keys and self.key not in keys else [self._step(name, arguments, target, place, keys)]

    def _keys(self, arguments: Mapping[str, Any], place: str) -> list[str]:
        """What a transform of dictionaries is applied to; nothing for one of images."""
        keys = self.config.value(arguments.get("keys", []), f"{place}::keys")
        return [str(key) for key in keys] if isinstance(keys, list) else [str(keys)]

    def _ours(self, name: str, arguments: Mapping[str, Any], target: str, place: str) -> None:
        """See that a step which volsal does itself asks for nothing else."""
        left = {key: value for key, value in arguments.items() if key not in _OURS[name] | _OF_DICTIONARIES}
        for key, usual in _USUAL.items():
            if key in left and self.config.value(left[key], f"{place}::{key}") in (*usual, None):
                del left[key]
        self._refuse_others(left, set(), target, place)

    def _step(self, name: str, arguments: Mapping[str, Any], target: str, place: str, keys: list[str]) -> Call:
        import monai.transforms as transforms

        number = keys.index(self.key) if keys else 0
        given = {key: value for key, value in arguments.items() if key not in _OF_DICTIONARIES}
        if self.config.value(given.get("source_key"), place) == self.key:
            given.pop("source_key", None)
        make = getattr(transforms, name)
        self._refuse_others(given, _parameters(make), target, place)
        values = {key: self.config.value(value, f"{place}::{key}") for key, value in given.items()}
        for key in _FOR_EACH_KEY & values.keys():
            if isinstance(values[key], list):
                values[key] = values[key][number if number < len(values[key]) else 0]
        return Call(make, values, f"{self.config.file}: {place}")

    def _refuse_others(self, given: Mapping[str, Any], known: set[str], target: str, place: str) -> None:
        """Tell of arguments whose meaning volsal does not carry."""
        for key, value in given.items():
            if key not in known and value is not None and value is not False:
                self.config.tell(place, f"{target} with {key}")

    # The inferer

    def _inferer(self) -> Call | None:
        import monai.inferers as inferers

        if "inferer" not in self.config.content:
            return None
        node, place = self.config.followed(self.config.content["inferer"], "inferer")
        if not isinstance(node, Mapping) or "_target_" not in node:
            if node is not None:
                self.config.tell(place, node)
            return None
        target, arguments = self.config.component(node, place)
        make = named(target, inferers)
        if make is None or make.__name__ not in _INFERERS:
            self.config.tell(place, target)
            return None
        given = {key: value for key, value in arguments.items() if key not in _HOW}
        values = {key: self.config.value(value, f"{place}::{key}") for key, value in given.items()}
        return Call(make, values, f"{self.config.file}: {place}")


class BundleSteps:
    """A trusted bundle's own preprocessing, as it stands in its config, but for reading the file.

    Parameters
    ----------
    steps : a transform of dictionaries (or of images), or a sequence of them
    key : of the image
    file : the config, for messages
    """

    def __init__(self, steps: Any, key: str, file: Path) -> None:
        from monai.transforms import Compose, Randomizable

        composed = steps if isinstance(steps, Compose) else Compose(steps)
        self._steps = [step for step in composed.flatten().transforms if _transform(type(step).__name__) not in _OURS]
        self._key = key
        for step in self._steps:
            if isinstance(step, Randomizable):
                raise BundleError(f"{file}: preprocessing: {type(step).__name__} is random; leave augmentation out")

    def __call__(self, image: Any) -> Any:
        """The image, (C, I, J, K) as a MetaTensor, after every step."""
        from monai.transforms import MapTransform

        data = {self._key: image}
        for step in self._steps:
            if isinstance(step, MapTransform):
                data = dict(step(data))
            else:
                data[self._key] = step(data[self._key])
        return data[self._key]


def _digest(files: Sequence[Path], folder: Path) -> str:
    digest = sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _transform(target: str) -> str:
    """The array transform that ``target`` is, or applies to a dictionary's image; "" for what is none of MONAI's."""
    import monai.transforms as transforms

    if named(target, transforms) is None:
        return ""
    name = target.rpartition(".")[2]
    known = {*_STEPS, *_OURS, "Compose"}
    return next((stem for end in ("", "d", "D", "Dict") if (stem := name.removesuffix(end)) in known), name)


def _parameters(make: Callable) -> set[str]:
    """The arguments that a transform takes."""
    parameters = signature(make).parameters
    pads = any(one.kind is Parameter.VAR_KEYWORD for one in parameters.values())
    # A lazy step leaves its resampling to MONAI's Compose, which is not used.
    return {*parameters, *(_OF_PADDING if pads else ())} - {"lazy"}


def _windows_of(inferer: Any, file: Path) -> Windows | None:
    """How a MONAI inferer applies a network."""
    from monai.inferers import SimpleInferer, SlidingWindowInferer

    if isinstance(inferer, SimpleInferer):
        return None
    if not isinstance(inferer, SlidingWindowInferer) or getattr(inferer, "with_coord", False):
        raise BundleError(
            f"{file}: its inferer is a {type(inferer).__name__}, which volsal does not follow; write 'windows:' in the "
            "config (null: the network sees the whole input)"
        )
    size: Any = inferer.roi_size
    settings: dict[str, Any] = {
        "size": size if isinstance(size, (list, tuple)) else (size,) * 3,
        "overlap": inferer.overlap,
        "importance": str(inferer.mode.value),
        "sigma": inferer.sigma_scale,
        "batch": inferer.sw_batch_size,
        "padding": str(getattr(inferer.padding_mode, "value", inferer.padding_mode)),
        "fill": inferer.cval,
    }
    try:
        return Windows(**settings)
    except (WindowsError, TypeError, ValueError) as error:
        raise BundleError(f"{file}: inferer: {error}; write 'windows:' in the config") from error


def _format(about: Mapping[str, Any], side: str) -> Mapping[str, Any]:
    """What the metadata say of inputs or outputs, by their names."""
    said = about.get("network_data_format")
    found = said.get(side) if isinstance(said, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _channels(about: Mapping[str, Any], side: str) -> tuple[str, ...]:
    """The names of the channels of the first input or output, where each has one of its own."""
    first = next(iter(_format(about, side).values()), None)
    names = first.get("channel_def") if isinstance(first, Mapping) else None
    if not isinstance(names, Mapping):
        return ()
    found = tuple(str(names.get(str(number), "")).strip() for number in range(len(names)))
    return found if all(found) and len(set(found)) == len(found) else ()
