"""The config of a MONAI bundle, read as data: what it describes, and what of it would have to be run.

MONAI's own parser evaluates ``$`` expressions and calls whatever a ``_target_`` names.  Nothing is evaluated here:
references are followed, names are looked up in lists of what may be built, and all else is told in words.
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from volsal.attribution.tap import ModelError

# Of monai.networks.nets: what makes a network of numbers and words alone.
_NETWORKS = (
    "AHNet", "AttentionUnet", "AutoEncoder", "BasicUNet", "BasicUNetPlusPlus", "Classifier", "DAF3D", "DenseNet",
    "DenseNet121", "DenseNet169", "DenseNet201", "DenseNet264", "DynUNet", "EfficientNet", "EfficientNetBN",
    "FlexibleUNet", "HighResNet", "MedNeXt", "MedNeXtB", "MedNeXtL", "MedNeXtM", "MedNeXtS", "Quicknat", "Regressor",
    "ResNet", "SegResNet", "SegResNetDS", "SegResNetDS2", "SegResNetVAE", "SENet", "SENet154", "SEResNet50",
    "SEResNet101", "SEResNet152", "SEResNext50", "SEResNext101", "SwinUNETR", "UNet", "UNETR", "ViT", "ViTAutoEnc",
    "VNet", "VarAutoEncoder", "resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200",
)  # fmt: skip
# Of monai.networks.blocks: what such networks are given as parts.
_BLOCKS = ("ADN", "Convolution", "ResidualUnit", "SimpleASPP", "UnetBasicBlock", "UnetResBlock", "UnetUpBlock")
# Arguments by which some of them fetch weights, or read them in an unsafe way.
_FETCHES = re.compile(r"pretrained|url")
_REFERENCE = re.compile(r"\$?@(\w+(?:(?:::|#)\w+)*)")
# The one expression of nearly every bundle: its network, put on its device.  That is for volsal to do.
_PLACED = re.compile(r"\$(@\w+(?:(?:::|#)\w+)*)\.to\(\s*@\w+\s*\)")
_IMPORT = re.compile(r"\$(?:\s|\\\n|#.*\n)*(?:import|from)\b")
_CHANGES_ANOTHER = re.compile(r"^\+|::|#")
_SHOWN = 80
# A config of more values than that refers to itself in a way that multiplies.
_MOST_VALUES = 20_000

Kind = Callable[..., Any]


class BundleError(ModelError):
    """A bundle that is damaged, or that would have to be trusted."""


@dataclass(frozen=True)
class Call:
    """Something that may be built: what makes it, its arguments (other calls among them), and its place."""

    make: Kind
    arguments: Mapping[str, Any]
    place: str

    def __call__(self) -> Any:
        """Build it.

        Raises
        ------
        BundleError
            Where it refuses the arguments.
        """
        arguments = {name: _built(value) for name, value in self.arguments.items()}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # MONAI announces its defaults
                return self.make(**arguments)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise BundleError(
                f"{self.place}: {self.make.__name__} refuses its arguments: {type(error).__name__}: {reason}"
            ) from error


def _built(value: Any) -> Any:
    if isinstance(value, Call):
        return value()
    if isinstance(value, Mapping):
        return {key: _built(part) for key, part in value.items()}
    return [_built(part) for part in value] if isinstance(value, list) else value


@dataclass
class BundleConfig:
    """A bundle's config.

    Attributes
    ----------
    file : where it stands
    content : what stands there
    would_run : of all that was asked for so far, what is more than data, in words, each with its place
    """

    file: Path
    content: Mapping[str, Any]
    would_run: list[str] = field(default_factory=list)
    _left: int = _MOST_VALUES

    @classmethod
    def read(cls, file: Path) -> BundleConfig:
        """The config in a ``.json`` or YAML file.

        Raises
        ------
        BundleError
            Where it cannot be read, or changes its own parts from elsewhere in it.
        """
        content = read_mapping(file)
        # As MONAI reads it, such a key merges into another part, or replaces a piece of one.
        if changes := [str(key) for key in content if _CHANGES_ANOTHER.search(str(key))]:
            raise BundleError(
                f"{file}: its key {_short(changes[0])!r} changes another part of it, which volsal does not follow; "
                "write that part as it is to be"
            )
        return cls(file, content)

    def imports(self) -> list[str]:
        """Import statements, wherever in the config: MONAI runs them all before it builds anything."""
        nodes = list(islice(_nodes(self.content, ""), _MOST_VALUES + 1))
        found = [f"{place}: {_short(node)}" for place, node in nodes if isinstance(node, str) and _IMPORT.match(node)]
        if len(nodes) > _MOST_VALUES:
            found.append(f"import statements, if any, beyond the first {_MOST_VALUES:,} values of {self.file.name}")
        return found

    def network(self) -> Any:
        """The network as a :class:`Call`; what it is does not matter where something :attr:`would_run`."""
        name = next((key for key in ("network", "network_def") if key in self.content), None)
        if name is None:
            raise BundleError(f"{self.file}: describes no 'network' or 'network_def'")
        node = self.content[name]
        placed = _PLACED.fullmatch(node) if isinstance(node, str) else None
        return self.value(placed[1] if placed else node, name)

    def node(self, place: str) -> Any:
        """What stands at ``a::b::0``, as it stands there.

        Raises
        ------
        BundleError
            Where nothing does.
        """
        found: Any = self.content
        for part in place.split("::"):
            if isinstance(found, Mapping) and part in found:
                found = found[part]
            elif isinstance(found, list) and part in map(str, range(len(found))):
                found = found[int(part)]
            else:
                raise BundleError(f"{self.file}: refers to @{_short(place)}, which is not in it")
        return found

    def value(self, node: Any, place: str, above: tuple[str, ...] = ()) -> Any:
        """``node`` with its references followed, and what it builds as :class:`Call`; plain data otherwise."""
        self.count()
        if isinstance(node, str):
            return self._word(node, place, above)
        if isinstance(node, list):
            return [self.value(part, f"{place}::{number}", above) for number, part in enumerate(node)]
        if not isinstance(node, Mapping):
            return node
        if "_target_" in node:
            return self._call(node, place, above)
        return {key: self.value(part, f"{place}::{key}", above) for key, part in node.items()}

    def count(self) -> None:
        """One more value is looked at; BundleError where they are too many."""
        self._left -= 1
        if self._left < 0:
            raise BundleError(f"{self.file}: describes more than {_MOST_VALUES:,} values")

    def followed(self, node: Any, place: str) -> tuple[Any, str]:
        """``node``, or what it refers to, as it stands there, and where that is."""
        seen: list[str] = []
        while isinstance(node, str) and (reference := _REFERENCE.fullmatch(node)):
            place = self._once(reference[1], tuple(seen))
            seen.append(place)
            node = self.node(place)
        return node, place

    def component(self, node: Mapping[str, Any], place: str) -> tuple[str, dict[str, Any]]:
        """The name of what ``node`` builds, and its arguments as they stand there."""
        for key in node:
            if str(key).startswith("_") and not _is_plain(str(key), node[key]):
                self.tell(f"{place}::{key}", node[key])
        return _short(node["_target_"]), {str(key): part for key, part in node.items() if not str(key).startswith("_")}

    def tell(self, place: str, what: Any) -> None:
        """Note that ``what`` stands at ``place`` and is more than data."""
        self.would_run.append(f"{place}: {_short(what)}")

    def _word(self, text: str, place: str, above: tuple[str, ...]) -> Any:
        if reference := _REFERENCE.fullmatch(text):
            at = self._once(reference[1], above)
            return self.value(self.node(at), at, (*above, at))
        if text.startswith(("$", "%", "@")):
            self.tell(place, text)
        return text

    def _once(self, reference: str, above: Sequence[str]) -> str:
        at = reference.replace("#", "::")
        if at in above:
            raise BundleError(f"{self.file}: @{at} refers to itself")
        return at

    def _call(self, node: Mapping[str, Any], place: str, above: tuple[str, ...]) -> Call | None:
        target, arguments = self.component(node, place)
        values = {name: self.value(part, f"{place}::{name}", above) for name, part in arguments.items()}
        make = known(target)
        if make is None:
            self.tell(place, target)
            return None
        for name in fetching(make, values):
            self.tell(f"{place}::{name}", f"{target} fetches weights")
        return Call(make, values, place)


def known(target: str) -> Kind | None:
    """The network, block or layer of that name; None for anything else."""
    import monai.networks.blocks as blocks
    from monai.networks import nets

    for package, names in ((nets, _NETWORKS), (blocks, _BLOCKS)):
        kind = named(target, package)
        # Under whatever of its names: several networks have more than one.
        if kind is not None and any(kind is vars(package).get(name) for name in names):
            return kind
    layer = named(target, nn, bare=False)
    return layer if _is_layer(layer) else None


def named(target: str, package: Any, bare: bool = True) -> Kind | None:
    """What ``package`` itself calls so, under its name there or that of its module; no attribute of an attribute."""
    home, _, name = target.rpartition(".")
    kind = vars(package).get(name)
    if not callable(kind):
        return None
    homes = (package.__name__, getattr(kind, "__module__", ""), *([""] if bare else []))
    return kind if home in homes else None


def _is_layer(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, nn.Module) and kind.__module__.startswith("torch.nn.modules.")


def fetching(make: Kind, arguments: Mapping[str, Any]) -> list[str]:
    """The arguments, given or by default, that make a network fetch weights."""
    parameters = inspect.signature(make).parameters
    defaults = {name: one.default for name, one in parameters.items() if one.default is not inspect.Parameter.empty}
    return [name for name, value in {**defaults, **arguments}.items() if _FETCHES.search(name) and value]


def _is_plain(key: str, value: Any) -> bool:
    """Whether one of MONAI's keys beside the arguments changes nothing."""
    if key in ("_target_", "_desc_"):
        return True
    usual = {"_disabled_": (False, "false"), "_mode_": ("default",)}
    return key in usual and any(type(value) is type(one) and value == one for one in usual[key])


def _nodes(node: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Everything in a config with its place."""
    yield place, node
    if isinstance(node, (Mapping, list)):
        for key, part in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _nodes(part, f"{place}::{key}" if place else str(key))


def _short(what: Any) -> str:
    if isinstance(what, (Mapping, list)):  # which aliases may make endlessly long
        return f"a {type(what).__name__}"
    text = " ".join(str(what).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def read_mapping(file: Path) -> dict[str, Any]:
    """The mapping in a ``.json`` or YAML file, read as plain data.

    Raises
    ------
    BundleError
        Where there is none.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, LookupError, AttributeError, ArithmeticError) as error:
        # The last three are PyYAML's own for a tag that does not fit, as of `!!int ''`.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BundleError(f"{file}: cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{file}: holds a {type(content).__name__}, not a mapping of names")
    return content
