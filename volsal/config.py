"""The config file: YAML, checked to the last key before anything is computed."""

from __future__ import annotations

import os
import re
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from volsal.errors import VolsalError, nearest


class ConfigError(VolsalError, ValueError):
    """A config file that cannot be read or does not say what it must."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """The model: a factory with weights, an exported program, or a MONAI bundle."""

    factory: str | None = Field(None, description="package.module:factory, or path/to/file.py:factory")
    file: str | None = Field(None, description="a .pt2 file made by torch.export.save, instead of a factory")
    bundle: str | None = Field(
        None, description="a MONAI bundle's folder; 'preprocess', 'windows', 'classes' and 'weights' go before its own"
    )
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the factory")
    weights: str | None = Field(None, description=".safetensors, or a .pt that holds a plain state dict")
    classes: list[str] = Field(default_factory=list, description="names of the model's classes, in output order")
    device: str = Field("cpu", description="cpu, cuda, or cuda:0")
    fast: bool = Field(
        False, description="explain a copy with batch norms folded and channels last: the same, in less time and memory"
    )
    precision: Literal["bf16"] | None = Field(
        None, description="bf16: that copy in bfloat16, an approximation for hardware that computes in it"
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if [self.factory, self.file, self.bundle].count(None) != 2:
            raise ValueError("give one of 'factory', 'file' (a .pt2) and 'bundle'")
        if self.bundle and self.arguments:
            raise ValueError("a bundle states its network's arguments itself; drop 'arguments'")
        return self

    def source(self) -> dict[str, Any]:
        """Where the model comes from, for a record."""
        return self.model_dump(include={"factory", "file", "bundle", "arguments", "weights"}, exclude_defaults=True)


class FunctionSection(_Section):
    """Preprocessing by the user's own function."""

    function: str = Field(description="package.module:function or path/to/file.py:function; path -> (tensor, affine)")


class WindowsSection(_Section):
    """How the model is applied window by window, as by MONAI's sliding_window_inference; see volsal.Windows."""

    size: list[int] = Field(min_length=1, description="voxels along each axis; 0: as long as the volume's")
    overlap: float | list[float] = Field(0.25, description="share of a window that the next one covers, in [0, 1)")
    importance: Literal["gaussian", "constant"] = Field("gaussian", description="how windows are blended")
    sigma: float = Field(0.125, gt=0, description="of the Gaussian, in window sizes")
    batch: int = Field(1, ge=1, description="windows that go through the model at once")
    padding: Literal["constant", "reflect", "replicate", "circular"] = Field(
        "constant", description="what lies around a volume that is smaller than a window"
    )
    fill: float = Field(0.0, allow_inf_nan=False, description="the value of constant padding")

    @field_validator("overlap", mode="plain")
    @classmethod
    def _share(cls, value: Any) -> Any:
        shares = value if isinstance(value, list) else [value]
        if not all(type(share) in (int, float) and 0 <= share < 1 for share in shares):
            raise ValueError("expected a share of the window in [0, 1), or one for each axis")
        return [float(share) for share in shares] if isinstance(value, list) else float(value)

    @model_validator(mode="after")
    def _one_per_axis(self) -> WindowsSection:
        if isinstance(self.overlap, list) and len(self.overlap) != len(self.size):
            raise ValueError(f"overlap is one number, or one for each of the {len(self.size)} axes of size")
        return self


class ColumnsSection(_Section):
    """Which columns of a table hold what; those that have a usual name are found without."""

    id: str | None = Field(None, description="the case's id; left out: case, subject, participant_id, ...")
    scan: list[str] = Field(
        default_factory=list,
        description="the scan's file or DICOM folder; several, in the model's channel order; left out: scan, path, ...",
    )
    label: str | None = Field(None, description="what the case is known to be; left out: label, diagnosis or class")
    masks: dict[str, str] = Field(
        default_factory=dict, description="name: column of lesion masks or label maps; left out: mask, *_mask"
    )
    patient: str | None = Field(
        None,
        description="whose scan it is: several scans of one patient count as one in the audit's tests.  It is written "
        "nowhere; left out: patient, subject, participant_id, ...",
    )
    groups: list[str] = Field(
        default_factory=list, description="columns to tell cases apart by; left out: site, sex, scanner, ..."
    )
    given: dict[str, list[str]] = Field(
        default_factory=dict,
        description="the model's other inputs: argument: column of numbers or of files, or several columns of numbers",
    )

    @field_validator("scan", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("given", mode="before")
    @classmethod
    def _each_one_or_several(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: [column] if isinstance(column, str) else column for name, column in value.items()}


_USUAL = ColumnsSection.model_validate({})


class ScansSection(_Section):
    """Which scans a run explains, what is known of each, and how they are read."""

    folder: str | None = Field(
        None, description="every scan below it is a case; with a table: where its relative paths start"
    )
    files: list[str] = Field(default_factory=list, description="files and DICOM folders like this, e.g. '../**/*.mha'")
    bids: str | None = Field(None, description="a BIDS dataset, raw or derivative; 'channels' says which suffixes")
    table: str | None = Field(None, description="a CSV or TSV file with a row for every case, which names its scan")
    labels: str | None = Field(
        None,
        description="a CSV or TSV file that says, by id, what is known of the cases of folder, files or bids; in bids, "
        "in place of participants.tsv",
    )
    columns: ColumnsSection = Field(_USUAL, description="what the columns of the tables mean")
    pattern: str | None = Field(
        None, description="of folder or bids, only paths or names like this, e.g. '*_T1w.nii.gz'"
    )
    channels: list[str] = Field(
        default_factory=list,
        description="several files per case: how their names end before the suffix, in the model's channel order, "
        "e.g. ['_flair', '_t1']; what is left of the name is the case.  In bids, suffixes: ['T1w']",
    )
    masks: dict[str, str] = Field(
        default_factory=dict,
        description="masks that lie beside the scans: how their names end, e.g. {lesion: _seg}",
    )
    identifiers: Literal["hashed", "plain"] = Field(
        "hashed", description="whether records hold DICOM's own UIDs, or a pseudonym for each"
    )
    regrid: bool = Field(False, description="bring channels to the first one's voxels where they lie elsewhere")
    volume: int | Literal["all"] | None = Field(
        None, description="which volume of 4D files, from 0; all: the volumes are the model's channels"
    )
    form: Literal["sform", "qform"] | None = Field(None, description="which affine, where a file's two disagree")
    strict: bool = Field(False, description="refuse files whose two affines lie more than 0.1 mm apart")
    nan: float | None = Field(
        None, allow_inf_nan=False, description="what NaN and infinite voxels become; such files are refused without"
    )
    series: str | int | None = Field(
        None, description="which series of DICOM folders: a part of its description, its UID, or its number"
    )
    slices: Literal["resample"] | None = Field(
        None, description="resample: accept DICOM slices at uneven distances, and interpolate between them"
    )

    @field_validator("volume", mode="plain")
    @classmethod
    def _volume(cls, value: Any) -> Any:
        if value not in (None, "all") and (type(value) is not int or value < 0):
            raise ValueError("expected a number from 0, or all")
        return value

    @field_validator("files", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _distinct_endings(self) -> ScansSection:
        endings = [*self.channels, *self.masks.values()]
        if len(set(endings)) < len(endings) or "" in endings:
            raise ValueError(f"channels {'and masks ' if self.masks else ''}are name endings, each its own")
        return self

    @model_validator(mode="after")
    def _one_source(self) -> ScansSection:
        sources = self._given("folder", "files", "bids", "table")
        if len(sources) != 1 and sources != ["folder", "table"]:
            raise ValueError(
                f"say where the scans are: one of folder, files, bids and table; got {', '.join(sources) or 'none'} "
                "(a table may have a folder, where its relative paths start; one that only adds to scans is 'labels')"
            )
        misplaced = self._given("labels", "pattern", "channels", "masks")
        if self.table and misplaced:
            raise ValueError(f"the table's 'columns' say all of a case; {' and '.join(misplaced)} cannot go with them")
        if self.files and self.pattern:
            raise ValueError("'files' are patterns themselves; 'pattern' chooses below a folder")
        return self

    @model_validator(mode="after")
    def _columns_of_a_table(self) -> ScansSection:
        if self.columns.scan and not self.table:
            raise ValueError("columns.scan names the scans of a 'table'")
        if self.columns != _USUAL and not self._given("table", "labels", "bids"):
            raise ValueError("'columns' are those of a table: 'table' names the scans, 'labels' adds to those found")
        return self

    def _given(self, *names: str) -> list[str]:
        return [name for name in names if getattr(self, name)]

    def channel_names(self) -> list[str]:
        """What the model's input channels are called, where the config says it; else empty."""
        return [name.strip("_-. ") for name in self.channels] or self.columns.scan

    def reading(self) -> dict[str, Any]:
        """How the files are read: the keyword arguments of :func:`volsal.scans.read_case`."""
        return {name: getattr(self, name) for name in ("volume", "regrid", "form", "strict", "nan", "series", "slices")}


class BatchSection(_Section):
    """How a run is carried out; none of it changes a result."""

    workers: int = Field(1, ge=1, description="processes on this machine; more than one need volsal[cluster]")
    attempts: int = Field(
        6, ge=1, description="processes that may die over a case, with no other beside it, before it is set aside"
    )
    time_limit: float = Field(30.0, gt=0, allow_inf_nan=False, description="minutes for each stage of one case")


class MapsSection(_Section):
    """How maps are written."""

    stored_as: Literal["float32", "uint16", "uint8", "int16"] = Field(
        "float32",
        description="integers are times a slope, smaller, and rounded: the record states the largest error; a map with "
        "negative values then takes the signed integers of that width",
    )


class AuditSection(_Section):
    """What the audit asks, and from where on it speaks of trust or of a shortcut; every threshold of its rules."""

    scans: int = Field(60, ge=1, description="at most so many of the run's cases, evenly spread")
    candidates: bool = Field(True, description="beside the config's methods also try those that `volsal choose` tries")
    radius_mm: float = Field(10.0, gt=0, description="of the balls that are taken out of a scan")
    blur_mm: float = Field(12.0, gt=0, description="balls are filled with the scan blurred by this standard deviation")
    controls: int = Field(19, ge=9, description="balls elsewhere that each is compared with")
    highest: float = Field(
        0.02,
        ge=0,
        le=0.2,
        description="of evidence that no ball holds: share of the field that is taken out; 0: not asked",
    )
    tolerance_mm: float = Field(6.0, ge=0, description="a peak so near a mask hits it")
    checked: int = Field(
        6, ge=0, description="scans on which sanity, stability, deletion, agreement and other outputs are computed"
    )
    mirror: bool = Field(False, description="left and right do not matter to this model: its maps must follow a flip")
    random_labels: str | None = Field(
        None, description="weights of the same model trained on shuffled labels, whose maps should be others"
    )
    template: str | None = Field(
        None, description="a scan to which all are brought by an affine for the cohort's maps; left out: one grid"
    )
    min_overlap: float = Field(
        0.5, ge=0, le=1, description="a scan that reaches less of the template is left out of the cohort's maps"
    )
    label_names: dict[str, dict[int, str]] = Field(
        default_factory=dict, description="by mask, what a label map's labels are called, as in {organs: {1: liver}}"
    )
    alpha: float = Field(
        0.01, gt=0, lt=1, description="chance of any false trust, over all methods, answers and ways of asking"
    )
    min_scans: int = Field(5, ge=3, description="scans of fewer patients with one answer say nothing")
    min_share: float = Field(0.5, gt=0, le=1, description="trust: of the scans whose score moves where the map says")
    min_effect: float = Field(0.1, ge=0, description="trust: median effect, in spreads of the score over scans")
    min_change: float = Field(0.05, ge=0, description="trust: median effect, in log odds")
    min_change_highest: float = Field(
        0.5, ge=0, description="trust: median effect of a map's highest part, in log odds"
    )
    min_times_highest: float = Field(
        1.5, ge=1, description="trust: effect of a map's highest part, over the largest of the map moved elsewhere"
    )
    min_effect_other: float = Field(
        0.25, ge=0, description="trust: median effect of outputs that are no log odds, in spreads"
    )
    max_alike: float = Field(
        0.5, gt=0, description="trust: top Dice with the map of random weights, at most; also with other outputs' maps"
    )
    max_excess: float = Field(
        0.0, description="sanity: SSIM with the map of random weights or labels above that of two scans' maps, at most"
    )
    min_agreement: float = Field(
        0.1, ge=0, description="agreement: top Dice of two methods' maps above that of displaced ones, at least"
    )
    min_stable: float = Field(
        0.5,
        ge=0,
        description="trust: share of harmless changes under which the peak stays; or what is highest, by its Dice",
    )
    body_margin_mm: float = Field(6.0, ge=0, description="so near the body is not outside of it")
    border_mm: float = Field(10.0, ge=0, description="so near the field's faces is its border")
    shortcut_effect: float = Field(0.2, gt=0, description="shortcut: effect in one scan, in spreads of the score")
    shortcut_share: float = Field(0.25, gt=0, le=1, description="shortcut: share of the scans of one answer")
    exchanged: int = Field(32, ge=0, description="shortcut: scans between which properties are exchanged; 0: none")
    carried: float = Field(0.33, gt=0, lt=1, description="shortcut: share of the answers' difference that goes along")
    still: float = Field(
        0.85, ge=0.5, le=1, description="shortcut: share of pairs of scans that single voxels order as their answers"
    )


class Config(_Section):
    """A whole config file."""

    model: ModelSection
    preprocess: FunctionSection | list[str | dict[str, dict[str, Any] | None]] = Field(
        default_factory=list, description="MONAI transforms by name with their arguments, or {function: ...}"
    )
    methods: list[str | dict[str, dict[str, Any] | None]] = Field(
        default_factory=lambda: cast("list[str | dict[str, dict[str, Any] | None]]", ["grad-cam"]),
        min_length=1,
        description="ids, or an id with settings, as in 'grad-cam: {layer: layer3}'",
    )
    targets: list[str | int] = Field(default_factory=lambda: cast("list[str | int]", ["predicted-class"]), min_length=1)
    alignment: Literal["auto", "half-pixel", "nominal", "measured", "flip-average"] = Field(
        "auto", description="where a layer's cells lie on the model's input; auto: measured, or half-pixel with a note"
    )
    windows: WindowsSection | None = Field(None, description="apply the model window by window")
    scans: ScansSection | None = None
    output: str | None = Field(None, description="the run folder")
    maps: MapsSection = MapsSection.model_validate({})
    audit: AuditSection = Field(AuditSection.model_validate({}), description="what `volsal audit` asks, and its rules")
    batch: BatchSection = Field(BatchSection.model_validate({}), description="how a run is carried out")
    per_channel: bool = Field(
        False,
        description="keep what each input channel gives to maps made on the model's input, as a 4D file",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; part of a result's last bits")

    _path: Path = Path("config.yaml")

    @property
    def path(self) -> Path:
        """The file this was read from."""
        return self._path

    @property
    def folder(self) -> Path:
        """What relative paths in the file start from: the file's own folder."""
        return self._path.parent

    def path_of(self, name: str | Path) -> Path:
        """What a path in the file means: it starts from :attr:`folder`, and ``~`` is the user's own."""
        return self.folder / Path(name).expanduser()


# Settings that name a file or a folder, and what is to be there.
_FILES = {
    "model.factory": "Python file",
    "model.file": "exported program",
    "model.bundle": "bundle",
    "model.weights": "weights file",
    "preprocess.function": "Python file",
    "scans.folder": "folder",
    "scans.bids": "folder",
    "scans.table": "table",
    "scans.labels": "table",
    "audit.random_labels": "weights file",
    "audit.template": "scan",
}


def require_files(config: Config, *sections: str) -> None:
    """Raise ConfigError, by its key, where a file or folder that one of these sections names is not there.

    Asked before it is needed, and not when the config is read: that may be looked at where its model is not.
    """
    for key, what in _FILES.items():
        section, _, setting = key.partition(".")
        name = getattr(getattr(config, section), setting, None) if section in sections else None
        if name and setting in ("factory", "function"):
            name = _file_in(name)
        if name:
            require_file(config, key, name, what)


def require_file(config: Config, key: str, name: str | Path, what: str) -> None:
    """Raise ConfigError where nothing is at the path that stands in the config under ``key``.

    Of a path with ``{case}`` in it, as of a pattern with ``*``, the folders before that must be there; of a pattern
    also something that is like it.
    """
    parts = Path(name).expanduser().parts
    fixed = list(takewhile(lambda part: "{case}" not in part and "*" not in part, parts))
    rest = str(Path(*parts[len(fixed) :])) if len(fixed) < len(parts) else ""
    path = config.path_of(Path(*fixed))
    if exists(path):
        if not rest or "{case}" in rest or any(path.glob(rest)):
            return
        path /= rest
    elif rest:
        what = "folder"
    start = "" if Path(name).expanduser().is_absolute() else ", which starts from the config's own folder"
    alike = nearest(path.name, [other for other in _beside(path) if Path(other).suffix == path.suffix])
    raise ConfigError(
        f"{config.path}: {key}: no {what} {path.absolute()}{alike}; put it there, or mend the path {str(name)!r}{start}"
    )


def exists(path: Path) -> bool:
    """Whether there is something at ``path``; a name that cannot be is one that is not there."""
    return os.path.exists(path)  # noqa: PTH110 - pathlib's raises on names that are too long


def _beside(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path.parent))  # noqa: PTH208 - names alone
    except (OSError, ValueError):
        return []


def _file_in(reference: str) -> str | None:
    """The file of ``path/to/file.py:name``; None for what is imported by its module's name."""
    file = reference.rpartition(":")[0]
    return file if file.endswith(".py") else None


def load_config(path: str | Path) -> Config:
    """Read and check a config file.

    Raises
    ------
    ConfigError
        One line per mistake: ``file:line: key: what is wrong``, with the nearest valid key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from error
    try:
        tree = yaml.compose(text, Loader=_Loader)
        lines = _lines(tree, path) if tree is not None else {}
        content = yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a config is a mapping with the keys {', '.join(Config.model_fields)}")
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_mistake(path, lines, mistake) for mistake in _sorted(error))) from None
    config._path = path
    return config


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-3 is a number, and yes, no, on, off are words."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:int")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _lines(node: yaml.Node, path: Path, above: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """The line of every key, by its path; a key that stands twice is an error, since YAML would drop the first."""
    found: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            where = (*above, str(key.value))
            line = key.start_mark.line + 1
            if where in found:
                raise ConfigError(f"{path}:{line}: {'.'.join(where)}: given twice (first in line {found[where]})")
            found[where] = line
            found |= _lines(value, path, where)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            found[(*above, str(number))] = value.start_mark.line + 1
            found |= _lines(value, path, (*above, str(number)))
    return found


def _sorted(error: ValidationError) -> list[Any]:
    """Pydantic's mistakes without those of union branches that the user did not mean."""
    mistakes = error.errors()
    # `preprocess` is a mapping or a list; only the branch that fits what stands there is worth telling.
    return [m for m in mistakes if not _other_branch(m)] or mistakes[:1]


def _other_branch(mistake: Any) -> bool:
    location = mistake["loc"]
    if len(location) > 1 and location[0] == "preprocess":
        mapping = location[1] == "FunctionSection"
        return mistake["type"] in ("model_type", "list_type") or (
            mapping and mistake["type"] == "model_attributes_type"
        )
    return len(location) > 2 and location[2] in ("str", "int") and location[0] in ("methods",)


def _mistake(path: Path, lines: dict[tuple[str, ...], int], mistake: Any) -> str:
    location = tuple(str(part) for part in mistake["loc"] if not _is_branch(str(part)))
    line = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), None)
    where = f"{path}:{line}" if line else str(path)
    key = ".".join(location) or "the file"
    if mistake["type"] == "extra_forbidden":
        return f"{where}: {key}: unknown key{nearest(location[-1], _keys(location[:-1]), count=1)}"
    if mistake["type"] == "missing":
        return f"{where}: {key}: missing"
    message = mistake["msg"].removeprefix("Value error, ")
    given = "" if isinstance(mistake["input"], (dict, BaseModel)) else f" (got {mistake['input']!r})"
    return f"{where}: {key}: {message[0].lower()}{message[1:]}{given}"


def _is_branch(part: str) -> bool:
    return part in ("FunctionSection", "str", "int") or part.startswith(("list[", "dict["))


_SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelSection,
    "preprocess": FunctionSection,
    "windows": WindowsSection,
    "scans": ScansSection,
    "maps": MapsSection,
    "audit": AuditSection,
    "scans.columns": ColumnsSection,
}


def _keys(location: tuple[str, ...]) -> list[str]:
    section = _SECTIONS.get(".".join(location)) or (_SECTIONS.get(location[0], Config) if location else Config)
    return list(section.model_fields)
