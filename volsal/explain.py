"""The main job: a model and a scan in, evidence on the scan's own voxels out."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from volsal.alignments import Alignments, Key, beside
from volsal.attribution import (
    ALIGNMENTS,
    METHODS,
    Alignment,
    AlignmentRule,
    Attribution,
    Context,
    GradCAM,
    GuidedGradCAM,
    LayerError,
    Method,
    ModelError,
    Target,
    attribute,
    default_layer,
    parse_target,
    target_id,
)
from volsal.attribution.alignment import Collector, LayerMap, Measured
from volsal.attribution.cam import CAM
from volsal.attribution.method import scores_of
from volsal.attribution.tap import forward, plain, undisturbed
from volsal.config import Config, ConfigError, FunctionSection
from volsal.errors import VolsalError, nearest
from volsal.grid import Grid
from volsal.models import load_model, weights_digest
from volsal.preprocess import ModelInput, MonaiSteps, PathFunction, Preprocess, PreprocessError, as_preprocess
from volsal.references import resolve
from volsal.resampling import resample
from volsal.scans import Scan, read_case
from volsal.scans.find import case_id
from volsal.scans.write import WriteError, map_header, refuse_own_map, replacing, write_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CASE_FILE = "case.json"
FORMAT = 1
# Raised by whoever changes what a scan's result holds, so that a run makes anew what an earlier code made.
RESULT_VERSION = 2


@dataclass(frozen=True, eq=False, repr=False)
class Heatmap:
    """One method's answer for one target, on the scan's own voxels.

    Attributes
    ----------
    method, target : their ids, as in ``METHODS`` and file names
    target_text : the target in words
    layer : where a CAM was taken; None for maps made on the model's input
    unit : of :attr:`values`
    signed : whether negative values (evidence against) occur by definition
    values : (I, J, K) float32 on the scan's grid; raw, never normalised; 0 outside the model's field of view
    raw : (d, h, w) float32 as the method made it, summed over the input's channels
    raw_grid : where ``raw`` lies
    grid : the scan's, where ``values`` lie
    alignment : where the layer's cells were put on the model's input; None where no layer was asked
    settings : the method's own
    coverage : activations that a backward rule was put on
    """

    method: str
    target: str
    target_text: str
    layer: str | None
    unit: str
    signed: bool
    values: NDArray[np.float32]
    raw: NDArray[np.float32]
    raw_grid: Grid
    grid: Grid
    alignment: Alignment | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    coverage: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Heatmap({self.name}, {self.status}, layer {self.layer or 'none'}, {self.grid!r})"

    @property
    def name(self) -> str:
        """What a viewer's list calls it: ``grad-cam class-1``."""
        return f"{self.method} {self.target}"

    @cached_property
    def status(self) -> str:
        """``ok``; ``empty``: no positive evidence anywhere; ``constant``: one value everywhere, so no place at all."""
        if float(self.values.max()) <= 0:
            return "empty"
        return "constant" if float(np.ptp(self.raw)) == 0 else "ok"

    @cached_property
    def window(self) -> tuple[float, float]:
        """The display range, from 0 to the maximum; for maps made on the input's voxels to the 99.9th percentile.

        The percentile, of what is positive, keeps a few outlying voxels of a gradient from dimming all others; a
        layer's map is smooth and has none.  An empty map gets the range of its magnitude (or 1), so that everything in
        it lies at the invisible end.
        """
        positive = self.values[self.values > 0]
        if not positive.size:
            top = float(np.abs(self.values).max())
        else:
            top = float(positive.max() if self.layer else np.percentile(positive, 99.9))
        return 0.0, float(np.float32(top)) or 1.0

    @cached_property
    def peak_mm(self) -> tuple[float, float, float] | None:
        """World position, RAS+ mm, of the largest value; None unless :attr:`status` is ``ok``.

        A map may have a plateau on top (clamped at the rim of a coarse layer, or truly flat).  Its first voxel would
        depend on the file's storage order, so the middle of the plateau, within 0.1 % of the maximum, is taken; where
        several plateaus reach the maximum itself, that of the widest.
        """
        if self.status != "ok":
            return None
        x, y, z = (float(mm) for mm in self.grid.world(_summit(self.values)))
        return x, y, z

    def file_name(self, case: str) -> str:
        """``<case>_<method>_<target>.nii.gz``."""
        return f"{case}_{self.method}_{self.target}.nii.gz"


@dataclass(frozen=True)
class Prediction:
    """What the model said.  ``index`` and ``name`` are None for a model with a single output or no class names."""

    logits: tuple[float, ...]
    index: int | None
    name: str | None

    def __str__(self) -> str:
        numbers = ", ".join(f"{logit:.3g}" for logit in self.logits[:8]) + (", ..." if len(self.logits) > 8 else "")
        if self.index is None:
            return f"output {numbers}" if self.logits else "no plain output"
        return f"class {self.index}{f' ({self.name})' if self.name else ''}, logits {numbers}"


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """What one scan gave: the prediction, the maps on the scan's grid, and what made them."""

    case: str
    scan: Scan
    prediction: Prediction
    maps: tuple[Heatmap, ...]
    notes: tuple[str, ...]
    provenance: dict[str, Any]

    def __repr__(self) -> str:
        return f"Explanation({self.case}: {self.prediction}; {', '.join(heatmap.name for heatmap in self.maps)})"

    def map(self, method: str, target: str | None = None) -> Heatmap:
        """The map of that method (and target, where there are several)."""
        found = [m for m in self.maps if m.method == method and target in (None, m.target)]
        if len(found) != 1:
            have = ", ".join(f"{m.method}/{m.target}" for m in self.maps)
            raise KeyError(f"{len(found)} maps are {method}/{target or '*'}; there are {have}")
        return found[0]

    def save(self, folder: str | Path) -> Path:
        """Write the maps and ``case.json`` into ``folder/<case>``; return that folder.

        ``case.json`` is written last: where it is, the case is whole.

        Raises
        ------
        WriteError
            Where the disk refuses or does not keep what it was given.
        """
        home = Path(folder) / self.case
        record = home / CASE_FILE
        _forget(home, self.scan)
        files = []
        for heatmap in self.maps:
            name = heatmap.file_name(self.case)
            text = f"volsal {heatmap.method} {heatmap.layer or 'input'}: {heatmap.unit}"
            write_map(home / name, heatmap.values, map_header(self.scan, heatmap.method, text, heatmap.window))
            files.append({"file": name, "sha256": _file_digest(home / name), **_describe_map(heatmap)})
        content = {
            "format": FORMAT,
            "case": self.case,
            "scan": _describe_scan(self.scan),
            "prediction": {
                "logits": list(self.prediction.logits),
                "class": self.prediction.index,
                "class_name": self.prediction.name,
            },
            "maps": files,
            "notes": list(self.notes),
            "provenance": self.provenance,
        }
        with replacing(record) as temporary:
            temporary.write_text(json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")
        return home

    def show(self, **options: Any) -> None:
        """Open the scan and its maps in napari (see :func:`volsal.viewer.show.show`)."""
        from volsal.viewer.show import show

        show(self.scan, self.maps, **options)

    def figure(self, method: str | None = None, target: str | None = None) -> Figure:
        """Three planes through the peak of a map (the first one unless named) as a matplotlib figure."""
        from volsal.report.figures import three_planes

        chosen = self.map(method, target) if method else self.maps[0]
        return three_planes(
            self.scan,
            chosen.values,
            window=chosen.window,
            unit=chosen.unit,
            at_mm=chosen.peak_mm,
            signed=chosen.signed,
            title=f"{self.case}: {chosen.method}, {chosen.target_text}",
        )


class Explainer:
    """A model with its preprocessing, methods and targets, to be applied to scans.

    Parameters
    ----------
    model : any ``nn.Module``; it stays as it is and where it is (device, mode, flags)
    preprocess : MONAI transforms, or a function from a path to (tensor, affine); see
        :func:`volsal.preprocess.as_preprocess`
    methods : one or several of ``volsal.METHODS``, by id or as objects with their settings
    targets : one or several targets, as objects, callables, or text (see :func:`volsal.attribution.parse_target`)
    classes : names of the model's classes, for reading
    alignment : where a layer's cells lie on the model's input: one of ``volsal.attribution.ALIGNMENTS``, by id or as
        an object.  ``auto`` is ``measured``, but for maps whose evidence cannot be followed back to the input: those
        are placed by the half-pixel rule, and the result says so
    alignments : what was measured before, by :meth:`measure`

    >>> explainer = Explainer(model, preprocess, "grad-cam", targets="class-1")    # doctest: +SKIP
    >>> explainer("scan.nii.gz").save("out")                                      # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Any = None,
        methods: str | Method | Sequence[str | Method] = "grad-cam",
        targets: str | int | Target | Sequence[str | int | Target] = "predicted-class",
        classes: Sequence[str] = (),
        alignment: str | AlignmentRule = "auto",
        alignments: Alignments | None = None,
    ) -> None:
        self.model = model
        self.preprocess: Preprocess = as_preprocess(preprocess)
        self.classes = tuple(classes)
        self.methods = [_as_method(method) for method in _listed(methods)]
        self.targets = [t if callable(t) else parse_target(t, self.classes) for t in _listed(targets)]
        for what, ids in (("methods", [m.id for m in self.methods]), ("targets", [target_id(t) for t in self.targets])):
            if not ids or len(set(ids)) < len(ids):
                raise SettingsError(f"{what} must be given, each once; got {', '.join(ids) or 'none'}")

        if len(set(self.classes)) < len(self.classes):
            raise SettingsError(f"class names must differ; got {', '.join(self.classes)}")
        self.alignments = Alignments() if alignments is None else alignments
        self.align = self._rule(alignment)
        self._known_to_repeat = False
        self._digested: tuple[tuple, str] = ((), "")

    def _rule(self, alignment: str | AlignmentRule) -> AlignmentRule:
        if isinstance(alignment, AlignmentRule):
            return alignment
        if alignment in ("auto", Measured.id):
            return Measured(self._known, strict=alignment == Measured.id)
        if alignment not in ALIGNMENTS:
            raise SettingsError(f"unknown alignment {alignment!r}{nearest(str(alignment), ['auto', *ALIGNMENTS])}")
        return ALIGNMENTS[alignment]()

    def _known(self, of: LayerMap, size: tuple[int, ...]) -> Alignment | None:
        if not self.alignments:
            return None
        return self.alignments.get(Key(self.weights_sha256, of.method, of.layer, of.target, size))

    @classmethod
    def from_config(
        cls,
        config: Config,
        methods: Sequence[str] | None = None,
        targets: Sequence[str | int] | None = None,
        alignment: str | None = None,
    ) -> Explainer:
        """The explainer that a config describes.

        ``methods``, ``targets`` and ``alignment`` replace the config's own.  What `volsal align` measured for the
        config is used.
        """
        section = config.model
        model = load_model(
            cast(str, section.factory or section.file), section.arguments, section.weights, config.folder
        )
        try:
            model.to(section.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"{config.path}: model.device {section.device!r}: {reason}; 'cpu' always works") from error
        try:
            preprocess = _configured_preprocess(config)
        except PreprocessError as error:
            raise ConfigError(f"{config.path}: preprocess: {error}") from error
        chosen = [_configured_method(entry) for entry in (methods or config.methods)]
        return cls(
            model,
            preprocess,
            chosen,
            list(targets or config.targets),
            section.classes,
            alignment or config.alignment,
            Alignments.read(beside(config.path)) if (alignment or config.alignment) in ("auto", Measured.id) else None,
        )

    @property
    def weights_sha256(self) -> str:
        """Digest of the model's weights as they are now, part of every result's provenance."""
        state = tuple((t.data_ptr(), t._version) for t in self.model.state_dict().values())
        if state != self._digested[0]:
            self._digested = state, weights_digest(self.model)
        return self._digested[1]

    def __call__(
        self, scan: str | Path | Scan | Sequence[str | Path], case: str | None = None, **reading: Any
    ) -> Explanation:
        """Explain one scan.

        Parameters
        ----------
        scan : a file, a case's files (its channels, in the model's order), or a scan in memory
        case : id for file names; made from the file's name where None
        reading : ``volume``, ``form``, ... as in :func:`volsal.scans.read_case`

        Raises
        ------
        VolsalError
            One of its kinds, in one line: the scan cannot be read, preprocessed or placed; the model cannot be run on
            it; the target or layer does not fit; a method does not cover the model; a map is not finite.
        """
        started, clock = datetime.now(UTC), time.monotonic()
        if case is not None and not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", case):
            raise SettingsError(f"a case id is lower-case letters, digits, '.', '_' and '-', not {case!r}")
        if not isinstance(scan, Scan):
            scan = read_case(scan, **reading)
        refuse_own_map(scan)
        model_input = self.preprocess(scan)
        tensor = self.to_model(model_input.tensor)
        context = Context(self.align, model_input.grid, case or "")
        found = attribute(self.model, tensor, self.methods, self.targets, context)
        answers = list(zip(self.methods, found, strict=True))
        _require_repeatable(answers)
        if not self._known_to_repeat:
            self._require_deterministic(tensor, answers[0][1])
        maps = tuple(
            self._carry(method, answer, number, model_input, scan)
            for method, answer in answers
            for number in range(len(self.targets))
        )
        output = answers[0][1].output
        return Explanation(
            case or (case_id(Path(scan.path.name)) if scan.path else "scan"),
            scan,
            self._prediction(output),
            maps,
            (*scan.notes, *_remarks(output), *_beyond(maps), *_misplaced(maps, self.align)),
            {
                **environment(),
                "model": {"class": type(self.model).__name__, "weights_sha256": self.weights_sha256},
                "model_input": {
                    "shape": list(tensor.shape),
                    "affine": model_input.grid.affine.tolist(),
                    "preprocess": repr(self.preprocess),
                },
                "alignment": self.align.id,
                "device": str(tensor.device),
                "threads": torch.get_num_threads(),
                "started": started.isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - clock, 3),
            },
        )

    def measure(
        self,
        scans: Iterable[Scan | Sequence[str | Path]],
        skip: Callable[[VolsalError], None] | None = None,
        **reading: Any,
    ) -> Alignments:
        """Measure where the cells of each CAM's layer lie, on a handful of scans, and use it from now on.

        Eight to sixteen scans in which the model finds something are plenty; no masks are asked.

        Parameters
        ----------
        scans : scans in memory, or the files of each
        skip : told of a scan that cannot be used, which is then left out; None: the error is raised
        reading : as for a call

        Returns
        -------
        What was measured, which :attr:`alignments` holds from now on.

        Raises
        ------
        AlignmentError
            Where no map of these scans holds evidence that leads back to the input.
        SettingsError
            Where none of the methods takes its map at a layer.
        """
        cams = [cam for method in self.methods if (cam := cam_of(method))]
        if not cams:
            raise SettingsError("none of the methods takes its map at a layer, so there is nothing to align")
        collector = Collector()
        for scan in scans:
            try:
                tensor = self.model_input(scan if isinstance(scan, Scan) else read_case(scan, **reading))
                # Two methods may share a map: it counts once.
                for cam in {replace(cam, layer=cam.layer or default_layer(self.model, tensor)) for cam in cams}:
                    cam.attribute(self.model, tensor, self.targets, Context(collector))
            except VolsalError as error:
                if skip is None:
                    raise
                skip(error)
        found = Alignments((Key(self.weights_sha256, *of), alignment) for of, alignment in collector.pooled().items())
        self.alignments.update(found)
        return found

    def model_input(self, scan: Scan) -> Tensor:
        """What the model would see of ``scan``: (1, C, D, H, W), in its dtype, on its device."""
        return self.to_model(self.preprocess(scan).tensor)

    def blank_input(self, shape: Sequence[int]) -> Tensor:
        """An input (1, *shape) of zeros, for asking about shapes alone."""
        return self.to_model(torch.zeros(1, *shape))

    def to_model(self, tensor: Tensor) -> Tensor:
        """``tensor`` in the model's dtype, on its device."""
        for parameter in self.model.parameters():
            return tensor.to(parameter.device, parameter.dtype)
        return tensor

    def _carry(self, method: Method, answer: Attribution, number: int, model_input: ModelInput, scan: Scan) -> Heatmap:
        """The raw map of one target, carried onto the scan's voxels in one step."""
        raw = answer.maps[number][0].sum(0).float().cpu()
        where = f"{method.id} at {f'layer {answer.layer!r}' if answer.layer else 'the input'}"
        if not torch.isfinite(raw).all():
            raise LayerError(f"{scan}: the map of {where} holds NaN or infinity")
        if raw.ndim != 3:
            raise LayerError(f"{scan}: the map of {where} has shape {tuple(raw.shape)}, not one value per 3D cell")
        alignment = answer.alignments[number] if answer.alignments else None
        grid = alignment.grid(model_input.grid, raw.shape) if alignment and answer.layer else model_input.grid
        target = self.targets[number]
        return Heatmap(
            method.id,
            target_id(target),
            str(target) if hasattr(target, "id") else target_id(target),
            answer.layer,
            method.unit,
            method.signed,
            resample(raw, grid, scan.grid, field=model_input.grid).numpy(),
            raw.numpy(),
            grid,
            scan.grid,
            alignment,
            {key: value for key, value in vars(method).items() if value is not None},
            dict(answer.coverage),
        )

    def _require_deterministic(self, tensor: Tensor, answer: Attribution) -> None:
        """Run the model once more, with other random numbers: dropout left on would make each map one of many."""
        with undisturbed(self.model), torch.no_grad():
            torch.manual_seed(1 + torch.initial_seed() % 2**31)
            again = scores_of(self.targets, forward(self.model, plain(tensor)), len(tensor))
        _require_equal(answer.scores, again, "run again")
        self._known_to_repeat = True

    def _prediction(self, output: Any) -> Prediction:
        if not isinstance(output, Tensor) or output.ndim > 2:
            return Prediction((), None, None)
        logits = tuple(float(logit) for logit in output.flatten())
        if self.classes and len(self.classes) != max(2, len(logits)):
            raise SettingsError(
                f"{len(self.classes)} classes are named ({', '.join(self.classes)}), but the model has {len(logits)} "
                "outputs; name each output once, in order"
            )
        if len(logits) < 2:
            return Prediction(logits, None, None)
        index = int(np.argmax(logits))
        return Prediction(logits, index, self.classes[index] if self.classes else None)


def cam_of(method: Method) -> CAM | None:
    """The class activation map whose cells a method must place."""
    if isinstance(method, GuidedGradCAM):
        return GradCAM(method.layer)
    return method if isinstance(method, CAM) else None


def _summit(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The centre, in voxels, of the connected group of near-maximal voxels that reaches the maximum."""
    top = values.max()
    voxels = np.argwhere(values >= 0.999 * top)
    if len(voxels) == 1:
        return voxels[0].astype(float)
    import SimpleITK as sitk

    corner = voxels.min(axis=0)
    box = values[tuple(slice(low, high + 1) for low, high in zip(corner, voxels.max(axis=0), strict=True))]
    near = sitk.GetImageFromArray((box >= 0.999 * top).astype(np.uint8))
    groups = sitk.GetArrayFromImage(sitk.RelabelComponent(sitk.ConnectedComponent(near, True)))
    widest = groups[box == top].min()  # relabelled by size, the largest is 1
    return np.argwhere(groups == widest).mean(axis=0) + corner


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _as_method(method: str | Method) -> Method:
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise UnknownMethodError(f"unknown method {method!r}{nearest(str(method), METHODS)}")
    return METHODS[method]()


def _configured_method(entry: str | Mapping[str, Mapping[str, Any] | None]) -> Method:
    """``grad-cam``, or ``grad-cam: {layer: layer3}``."""
    if isinstance(entry, str):
        return _as_method(entry)
    if len(entry) != 1:
        raise UnknownMethodError(f"a method is one id with its settings, not {dict(entry)}")
    ((name, settings),) = entry.items()
    kind = type(_as_method(name))
    known: list[str] = [f.name for f in fields(kind)] if is_dataclass(kind) else []
    for setting in settings or {}:
        if setting not in known:
            raise UnknownMethodError(f"method {name} has no setting {setting!r}{nearest(setting, known)}")
    return kind(**dict(settings or {}))


def _configured_preprocess(config: Config) -> Preprocess:
    if isinstance(config.preprocess, FunctionSection):
        return PathFunction(resolve(config.preprocess.function, config.folder))
    return MonaiSteps.from_config(config.preprocess)


class SettingsError(VolsalError, ValueError):
    """Settings that do not fit each other or the model."""


class UnknownMethodError(VolsalError, LookupError):
    """No attribution method has that id."""


def _require_repeatable(answers: list[tuple[Method, Attribution]]) -> None:
    """Each method ran the model once; the same scan must have got the same scores."""
    for method, answer in answers[1:]:
        _require_equal(answers[0][1].scores, answer.scores, f"for {method.id}")


def _require_equal(first: list[Tensor], again: list[Tensor], when: str) -> None:
    for ours, theirs in zip(first, again, strict=True):
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4):
            raise ModelError(
                f"the model is not deterministic: the same input scored {float(ours[0]):.6g} and then, {when}, "
                f"{float(theirs[0]):.6g}; is there dropout or sampling that evaluation mode leaves on?"
            )


def _remarks(output: Any) -> list[str]:
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < 2 or float(output.min()) < 0:
        return []
    if not torch.allclose(output.sum(1), torch.ones_like(output[:, 0]), atol=1e-4):
        return []
    return [
        "the outputs sum to 1: probabilities, it seems; their gradients fade where the model is sure, so explain the "
        "logits if you can"
    ]


def _beyond(maps: Sequence[Heatmap]) -> list[str]:
    return [
        f"{heatmap.name}: positive evidence only outside the scan, in what preprocessing added around it"
        for heatmap in maps
        if heatmap.status == "empty" and float(heatmap.raw.max()) > 0
    ]


def _misplaced(maps: Sequence[Heatmap], rule: AlignmentRule) -> list[str]:
    notes = []
    for heatmap in maps:
        used = heatmap.alignment
        if used is None or heatmap.status == "empty":
            continue
        if used.kind != rule.id:
            notes.append(
                f"{heatmap.name}: where the layer's cells look could not be measured, so they were placed by the "
                f"{used.kind} rule, which may be half a cell off"
            )
        elif used.held or (used.uncertainty and (np.array(used.uncertainty) > np.abs(used.stride) / 2).any()):
            # Without figures, so that a run can count the scans it is true of; they stand in the map's record.
            notes.append(
                f"{heatmap.name}: its place is uncertain by more than half a cell"
                + (", or further from where cells look than is believed" if used.held else "")
                + ": what made the map is spread out, or lies in several places"
            )
    return notes


def environment() -> dict[str, Any]:
    """Versions and machine, for provenance."""
    packages = {name: metadata.version(name) for name in ("torch", "numpy", "nibabel", "SimpleITK", "monai")}
    from volsal import __version__

    return {
        "volsal": __version__,
        "versions": {"python": platform.python_version(), **packages},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
    }


def _forget(home: Path, scan: Scan) -> None:
    """Remove an earlier result of this scan, its record first, so that no record ever stands over other maps."""
    record = home / CASE_FILE
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        before, names = content["scan"], [entry["file"] for entry in content["maps"]]
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):  # damaged: nothing in it can be relied on
        before, names = _describe_scan(scan), []
    now = _describe_scan(scan)
    other_file = before["path"] != now["path"] or before.get("series") != now.get("series")
    if before["sha256"] != now["sha256"] and other_file:
        raise WriteError(
            f"{home}: already holds the result of another scan, {before['path']}; give this one another case id "
            "(--case) or another output folder"
        )
    record.unlink()
    for name in names:
        (home / Path(name).name).unlink(missing_ok=True)


def _file_digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def _describe_map(heatmap: Heatmap) -> dict[str, Any]:
    step = heatmap.raw_grid.spacing
    return {
        "method": heatmap.method,
        "settings": heatmap.settings,
        "target": heatmap.target,
        "target_text": heatmap.target_text,
        "layer": heatmap.layer,
        "unit": heatmap.unit,
        "signed": heatmap.signed,
        "status": heatmap.status,
        "window": list(heatmap.window),
        "minimum": float(heatmap.values.min()),
        "maximum": float(heatmap.values.max()),
        "peak_mm": heatmap.peak_mm,
        "cells": list(heatmap.raw.shape),
        "cell_mm": [round(float(mm), 4) for mm in step],
        "cell_affine": heatmap.raw_grid.affine.tolist(),
        "alignment": heatmap.alignment.describe() if heatmap.alignment else None,
        "coverage": heatmap.coverage,
    }


def _describe_scan(scan: Scan) -> dict[str, Any]:
    content = {
        **_describe_file(scan),
        "shape": list(scan.grid.shape),
        "affine": scan.grid.affine.tolist(),
        "spacing_mm": [round(float(mm), 6) for mm in scan.grid.spacing],
        "orientation": scan.grid.orientation,
        "oblique_degrees": round(scan.grid.obliquity, 3),
        "form": scan.form if scan.header is not None else "header",
    }
    if scan.filled is not None:
        content["nan"] = scan.filled
    content |= {name: getattr(scan, name) for name in ("series", "slices") if getattr(scan, name) is not None}
    if scan.further:
        content["channels"] = [_describe_file(channel) for channel in (scan, *scan.further)]
    return content


def _describe_file(scan: Scan) -> dict[str, Any]:
    return {
        "path": os.fsencode(scan.path.resolve()).decode("utf-8", "backslashreplace") if scan.path else None,
        "sha256": scan.sha256,
        "volume": scan.volume,
    }
