"""The main job: a model and a scan in, evidence on the scan's own voxels out."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from volsal.alignments import Alignments, Key, beside
from volsal.attribution import (
    ALIGNMENTS,
    Alignment,
    AlignmentRule,
    Attribution,
    Context,
    LayerError,
    Method,
    ModelError,
    Target,
    Windows,
    Within,
    attribute,
    default_layer,
    explain_windows,
    parse_target,
    target_id,
)
from volsal.attribution.alignment.alignment import Collector, LayerMap, Measured
from volsal.attribution.cams.cam import CAM
from volsal.attribution.gradients.baselines import files_of as baselines_of
from volsal.attribution.inputs import Given
from volsal.attribution.method import PLAIN, bases, scores_of
from volsal.attribution.perturbation.perturbation import forget
from volsal.attribution.settings import SettingError
from volsal.attribution.tap import forward, plain, undisturbed
from volsal.attribution.targets.target import distinct, facts, placed, told
from volsal.attribution.windows.windowed import Windowed
from volsal.attribution.windows.windows import volumes_of
from volsal.choices import as_method, configured_methods, method_names
from volsal.config import Config, ConfigError, FunctionSection, require_file, require_files
from volsal.environment import environment
from volsal.errors import VolsalError, nearest
from volsal.explanation import Explanation, Heatmap, Parts, Prediction
from volsal.grid import Grid
from volsal.models import Bundle, load_bundle, load_model, weights_digest
from volsal.models.bundle import Part, would_run
from volsal.models.fast import FastCopy, fast_copy
from volsal.models.fast import fast as copy_of
from volsal.plain_data import plain_data
from volsal.preprocess import ModelInput, MonaiSteps, PathFunction, Preprocess, PreprocessError, as_preprocess, rounded
from volsal.references import resolve
from volsal.remarks import on_maps, on_output
from volsal.resampling import resample
from volsal.scans import Scan, read_case
from volsal.scans.find import case_id
from volsal.scans.labels import read_labels
from volsal.scans.scan import files_of
from volsal.scans.write import refuse_own_map

Progress = Callable[[str, int, int], None]
# Below the folder of results: what long methods keep until a case's result is saved.
PARTIAL = ".partial"


@dataclass(frozen=True)
class Ready:
    """A scan that was read and preprocessed, for the model to be asked about.

    Attributes
    ----------
    case, scan : its id, and what was read
    model_input : what the model will see, and where that lies
    reading : how the scan's files were read
    started, seconds : when, and how long it took
    """

    case: str
    scan: Scan
    model_input: ModelInput
    reading: dict[str, Any]
    started: datetime
    seconds: float

    def without_voxels(self) -> Ready:
        """The same, the scan's own voxels forgotten: from here on they are for pictures alone, and a CT's are large."""
        return replace(self, scan=self.scan.without_voxels())


@dataclass(frozen=True)
class Answer:
    """What the model and the methods gave for a scan, before it is carried onto the scan's voxels.

    Attributes
    ----------
    ready : what was asked about
    found : each method's raw maps
    facts : what is to be told of each target
    prediction, notes, provenance : parts of the :class:`Explanation`
    seconds : how long it took
    """

    ready: Ready
    found: tuple[Attribution, ...]
    facts: tuple[dict[str, Any], ...]
    prediction: Prediction
    notes: tuple[str, ...]
    provenance: dict[str, Any]
    seconds: float


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
    per_channel : whether maps made on the model's input keep what each of its channels gives, as the map's parts
    channels : names of the input's channels; else made from a case's file names, or numbered
    folder : what relative paths in targets and settings start from; the working directory where None
    progress : told what long methods are doing, how many steps of it are done, and of how many
    keep : folder in which long methods keep what they have, a folder for each case, to take it up again after a fault;
        :meth:`forget` empties it
    fast : explain a private copy of the model that says the same for less (see :func:`volsal.models.fast.fast`); a
        type, such as ``torch.bfloat16``: a copy in that, which is an approximation and is noted as such
    windows : apply the model window by window, as inference on large scans does, and explain it as one function of the
        whole (see :func:`volsal.explain_windows`)
    bundle, source : where the model comes from, and what a config says of that, for the record

    ``methods`` may also be a dict of them by names of one's own.  Otherwise a method's name, in files and records, is
    its id, followed, where several have that id, by the settings in which they differ: ``grad-cam-layer3``.

    >>> explainer = Explainer(model, preprocess, "grad-cam", targets="class-1")    # doctest: +SKIP
    >>> explainer("scan.nii.gz").save("out")                                      # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Any = None,
        methods: str | Method | Sequence[str | Method] | Mapping[str, str | Method] = "grad-cam",
        targets: str | int | Target | Sequence[str | int | Target] = "predicted-class",
        classes: Sequence[str] = (),
        alignment: str | AlignmentRule = "auto",
        alignments: Alignments | None = None,
        *,
        per_channel: bool = False,
        channels: Sequence[str] = (),
        folder: Path | None = None,
        progress: Progress | None = None,
        keep: Path | None = None,
        fast: bool | torch.dtype = False,
        windows: Windows | None = None,
        bundle: Bundle | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.bundle = bundle
        self.source = source
        self.preprocess: Preprocess = as_preprocess(preprocess)
        self.classes = tuple(classes)
        named = methods if isinstance(methods, Mapping) else {}
        self.methods = [as_method(method) for method in (named.values() or _listed(methods))]
        self.names = method_names(self.methods, list(named))
        self.targets = distinct([t if callable(t) else parse_target(t, self.classes) for t in _listed(targets)])
        if not self.targets:
            raise SettingError("targets must be given, each once; got none")
        self.per_channel = per_channel
        self.channels = tuple(channels)
        self.folder = folder or Path()
        self.progress = progress or PLAIN.progress
        self.keep = keep
        self.fast = fast
        self.windows = windows
        if len(set(self.classes)) < len(self.classes):
            raise SettingError(f"class names must differ; got {', '.join(self.classes)}")
        self.alignments = Alignments() if alignments is None else alignments
        self.align = self._rule(alignment)
        self._known_to_repeat = False
        self._given: Given | None = None
        self._fast: tuple[str, nn.Module] | None = None
        self._digested: tuple[tuple, str] = ((), "")

    def _rule(self, alignment: str | AlignmentRule) -> AlignmentRule:
        if isinstance(alignment, AlignmentRule):
            return alignment
        if alignment in ("auto", Measured.id):
            return Measured(self._known, strict=alignment == Measured.id)
        if alignment not in ALIGNMENTS:
            raise SettingError(f"unknown alignment {alignment!r}{nearest(str(alignment), ['auto', *ALIGNMENTS])}")
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
        progress: Progress | None = None,
        keep: Path | None = None,
        trust_bundle: bool = False,
    ) -> Explainer:
        """The explainer that a config describes.

        ``methods``, ``targets`` and ``alignment`` replace the config's own; relative paths in them start from the
        working directory, those in the config from its folder.  What `volsal align` measured for the config is used.
        ``trust_bundle``: let a bundle run its own code (see :func:`volsal.load_bundle`); a config cannot say so.
        """
        require_files(config, "model", "preprocess")
        section = config.model
        bundle = _bundle(config, trust_bundle)
        model = bundle.model if bundle else _model(config)
        try:
            model.to(section.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"{config.path}: model.device {section.device!r}: {reason}; 'cpu' always works") from error
        try:
            preprocess = _configured_preprocess(config, bundle)
        except PreprocessError as error:
            raise ConfigError(f"{config.path}: preprocess: {error}") from error
        here = Path.cwd() if targets else None
        classes = section.classes or (bundle.classes if bundle else ())
        windows = Windows(**config.windows.model_dump()) if config.windows else None
        explainer = cls(
            model,
            preprocess,
            configured_methods(methods or config.methods),
            [parse_target(target, classes, here) for target in (targets or config.targets)],
            classes,
            alignment or config.alignment,
            Alignments.read(beside(config.path)) if (alignment or config.alignment) in ("auto", Measured.id) else None,
            per_channel=config.per_channel,
            channels=(config.scans.channel_names() if config.scans else ()) or (bundle.channels if bundle else ()),
            folder=config.folder,
            progress=progress,
            keep=keep,
            fast=torch.bfloat16 if section.precision == "bf16" else section.fast,
            windows=windows or (bundle.windows if bundle else None),
            bundle=bundle,
            source=section.source(),
        )
        _require_named(explainer, config, given=bool(targets))
        return explainer

    @property
    def weights_sha256(self) -> str:
        """Digest of the model's weights as they are now, part of every result's provenance."""
        state = tuple((t.data_ptr(), t._version) for t in self.model.state_dict().values())
        if state != self._digested[0]:
            self._digested = state, weights_digest(self.model)
        return self._digested[1]

    def __call__(
        self,
        scan: str | Path | Scan | Sequence[str | Path],
        case: str | None = None,
        *,
        given: Mapping[str, Any] | None = None,
        explained: int | str = 0,
        **reading: Any,
    ) -> Explanation:
        """Explain one scan.

        Parameters
        ----------
        scan : a file, a case's files (its channels, in the model's order), or a scan in memory
        case : id for file names; made from the file's name where None
        given : the model's other inputs, by the names of its arguments: tensors with a batch of 1, lists of numbers, or
            scans' files, which are read and preprocessed as ``scan`` is
        explained : the model's argument that ``scan`` goes to, by position or name
        reading : ``volume``, ``form``, ... as in :func:`volsal.scans.read_case`

        Raises
        ------
        VolsalError
            One of its kinds, in one line: the scan cannot be read, preprocessed or placed; the model cannot be run on
            it; the target or layer does not fit; a method does not cover the model; a map is not finite.
        """
        return self.carry(self.answer(self.prepare(scan, case, **reading), given=given, explained=explained))

    def prepare(self, scan: str | Path | Scan | Sequence[str | Path], case: str | None = None, **reading: Any) -> Ready:
        """The first third of a call: read the scan, and make what the model sees of it.  The model is not touched."""
        if case is not None and not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", case):
            raise SettingError(f"a case id is lower-case letters, digits, '.', '_' and '-', not {case!r}")
        started, clock = datetime.now(UTC), time.monotonic()
        if not isinstance(scan, Scan):
            scan = read_case(scan, **reading)
        refuse_own_map(scan)
        model_input = self.preprocess(scan)
        return Ready(case or case_of(scan), scan, model_input, reading, started, time.monotonic() - clock)

    def answer(
        self,
        ready: Ready,
        *,
        given: Mapping[str, Any] | None = None,
        explained: int | str = 0,
        lean: bool = False,
    ) -> Answer:
        """The second third, and the only one that runs the model: every method's raw maps.

        ``lean`` is for a scan that did not fit in memory: methods run one by one, a single changed copy of the scan at
        a time.  Passes that are shared otherwise are made again; values may differ in their last bits.
        """
        clock = time.monotonic()
        scan = ready.scan
        tensor = self.to_model(ready.model_input.tensor)
        context = self.context(ready.model_input.grid, ready.case, scan, **ready.reading)
        model = self._model_with(given, explained, context)
        if isinstance(model, Given) and self.align.mirrors:
            raise SettingError(f"{self.align.id} alignment mirrors the scan and not the other inputs; use another one")
        model, copied = self._fast_of(model, self.at_once(tensor))
        targets = self.targets_for(context, model)
        if lean:
            found = [self._attribute(model, tensor, [m], targets, context)[0] for m in map(one_by_one, self.methods)]
        else:
            found = self._attribute(model, tensor, self.methods, targets, context)
        _require_repeatable(self.names, found)
        if not self._known_to_repeat:
            self._require_deterministic(self._whole(model), tensor, targets, found[0])
        output = found[0].output
        told_of = [_facts(target, output) for target in targets]
        if isinstance(model, Given):
            for own, tables in zip(told_of, model.tables(tensor, targets), strict=True):
                own |= {"given": {name: table[0].tolist() for name, table in tables.items()}} if tables else {}
        seen = self._judged(output)
        return Answer(
            ready,
            tuple(found),
            tuple(told_of),
            self._prediction(seen),
            (*on_output(seen), *_on_copy(copied)),
            {
                "model": {
                    "class": type(self.model).__name__,
                    "source": plain_data(self.source),
                    "weights_sha256": self.weights_sha256,
                    "fast": copied.describe() if copied else None,
                    "windows": plain_data(self.windows),
                    "bundle": self.bundle.describe() if self.bundle else None,
                    "outputs": [list(part.shape) for part in tree_leaves(output) if isinstance(part, Tensor)],
                },
                "model_input": {
                    "shape": list(tensor.shape),
                    "affine": ready.model_input.grid.affine.tolist(),
                    "to_scan": rounded(ready.model_input.grid.to(scan.grid)),
                    "preprocess": ready.model_input.how or repr(self.preprocess),
                    "steps": [step.describe() for step in ready.model_input.steps],
                    "given": plain_data(model.held) if isinstance(model, Given) else {},
                },
                "alignment": self.align.id,
                "lean": lean,
                "device": str(tensor.device),
                "threads": torch.get_num_threads(),
            },
            time.monotonic() - clock,
        )

    def carry(self, answer: Answer) -> Explanation:
        """The last third: every raw map onto the scan's own voxels, in one step, with the record of what made it."""
        clock = time.monotonic()
        ready, scan = answer.ready, answer.ready.scan
        maps = tuple(
            self._carry(place, found, number, ready.model_input, scan, answer.facts[number])
            for place, found in enumerate(answer.found)
            for number in range(len(self.targets))
        )
        said = [f"{name}: {note}" for name, one in zip(self.names, answer.found, strict=True) for note in one.notes]
        seconds = ready.seconds + answer.seconds + time.monotonic() - clock
        return Explanation(
            ready.case,
            scan,
            answer.prediction,
            maps,
            (*scan.notes, *answer.notes, *dict.fromkeys(said), *on_maps(maps, self.align)),
            {
                **environment(),
                **answer.provenance,
                "started": ready.started.isoformat(timespec="seconds"),
                "seconds": round(seconds, 3),
            },
        )

    @property
    def draws(self) -> bool:
        """Whether saving a result makes pictures of the scan: those of a layer's feature maps."""
        return any(getattr(base, "features", None) for method in self.methods for base in bases(method))

    def context(self, grid: Grid, case: str, scan: Scan, align: AlignmentRule | None = None, **reading: Any) -> Context:
        """What methods and targets may know of a scan whose model input lies on ``grid``.

        ``reading`` is how other scans' files are read, as in :func:`volsal.scans.read_case`.
        """

        def input_of(path: str | Path) -> Tensor:
            return self.model_input(read_case(self.folder / Path(path).expanduser(), **reading))

        def labels_of(path: str | Path) -> Tensor:
            return torch.from_numpy(read_labels(self.folder / Path(path).expanduser(), grid, scan))

        keep = self.keep / case if self.keep else None
        return Context(align or self.align, grid, case, input_of, labels_of, self.progress, keep, self.folder)

    def forget(self, case: str) -> None:
        """Remove what long methods kept of a case.  For when its result is safe on the disk."""
        if self.keep:
            forget(self.keep / case)
            with suppress(OSError):  # not there, or another case's is in it
                self.keep.rmdir()

    def targets_for(self, context: Context, model: nn.Module | None = None) -> list[Target]:
        """The targets for one scan: what they say in millimetres, or by files, found there.

        Raises
        ------
        VolsalError
            Where a file cannot be read.
        """
        asked = self._whole(model or self.model)

        def output_of(path: str | Path) -> Any:
            assert context.input_of is not None
            volume = context.input_of(path)
            with undisturbed(asked), torch.no_grad():
                return forward(asked, plain(volume))

        return [placed(target, context, output_of) for target in self.targets]

    def files_for(self, case: str) -> list[Path]:
        """The files, besides the scan's own, that targets and methods name; ``{case}`` stands for the case's id."""
        named = [name for target in self.targets for name in getattr(target, "files", ())]
        for method in self.methods:
            for base in bases(method):
                for value in vars(base).values():
                    named += [word for word in _listed(value) if isinstance(word, (str, Path))]
        asked = [str(name).replace("{case}", case) for name in dict.fromkeys(named)]
        found = (Path(str(one)).expanduser() for name in asked for one in baselines_of(name, self.folder))
        paths = [self.folder / path for path in found]
        return [path for path in paths if path.is_file() or (path.is_dir() and files_of(path))]

    def _model_with(self, given: Mapping[str, Any] | None, explained: int | str, context: Context) -> nn.Module:
        """The model with its other inputs held; one and the same module, so that what is known of it is kept."""
        if not given:
            return self.model
        held = {name: self._other_input(value, context) for name, value in given.items()}
        if self.windows and any(isinstance(value, Tensor) and value.ndim > 2 for value in held.values()):
            raise SettingError("windows cut the scan, and not the other images that are given; leave windows out")
        if self._given is None or self._given.explained != explained:
            self._given = Given(self.model, explained=explained, **held)
        self._given.hold(**held)
        return self._given

    def _fast_of(self, model: nn.Module, tensor: Tensor) -> tuple[nn.Module, FastCopy | None]:
        """The copy that is explained in the model's place, of the weights as they are now, and what it is."""
        if not self.fast:
            return model, None
        if isinstance(model, Given):
            raise SettingError("a fast copy is for models of one input; leave model.fast and model.precision out")
        weights = self.weights_sha256
        if self._fast is None or self._fast[0] != weights:
            made_of = [base for method in self.methods for base in bases(method)]
            named = [layer for base in made_of if (layer := getattr(base, "layer", None))]
            self._fast = weights, copy_of(model, tensor, None if self.fast is True else self.fast, named)
            # It was made only since two passes of one input, the model's and its own, gave the same.
            self._known_to_repeat |= self.fast is True
        return self._fast[1], fast_copy(self._fast[1])

    def _other_input(self, value: Any, context: Context) -> Any:
        if isinstance(value, (str, Path)):
            assert context.input_of is not None
            return context.input_of(value)
        if isinstance(value, (Sequence, np.ndarray)):
            value = torch.as_tensor(np.asarray(value))
            value = value[None] if value.ndim == 1 else value
        if not isinstance(value, Tensor):
            return value
        example = next(self.model.parameters(), value)
        return value.to(example.device, example.dtype if value.is_floating_point() else None)

    def _judged(self, output: Any) -> Any:
        """The part of the output that the targets look at, where they agree; the output otherwise."""
        parts = {target.path: target for target in self.targets if isinstance(target, Within)}
        if len(parts) != 1 or isinstance(output, Tensor):
            return output
        return next(iter(parts.values())).part(output)

    def _attribute(
        self,
        model: nn.Module,
        tensor: Tensor,
        methods: Sequence[Method],
        targets: Sequence[Target],
        context: Context,
    ) -> list[Attribution]:
        if self.windows is None:
            return attribute(model, tensor, methods, targets, context)
        return explain_windows(model, tensor, methods, targets, self.windows, context)

    def _whole(self, model: nn.Module) -> nn.Module:
        """The model as it is applied to a whole input."""
        return model if self.windows is None else Windowed(model, self.windows)

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
        SettingError
            Where none of the methods takes its map at a layer.
        """
        cams = cams_of(self.methods)
        if not cams:
            raise SettingError("none of the methods takes its map at a layer, so there is nothing to align")
        collector = Collector()
        for scan in scans:
            try:
                scan = scan if isinstance(scan, Scan) else read_case(scan, **reading)
                model_input = self.preprocess(scan)
                tensor = self.to_model(model_input.tensor)
                context = self.context(model_input.grid, case_of(scan), scan, collector, **reading)
                targets = self.targets_for(context)
                # Two methods may share a map: it counts once.
                once = self.at_once(tensor)
                for cam in {replace(cam, layer=cam.layer or default_layer(self.model, once)) for cam in cams}:
                    self._attribute(self.model, tensor, [cam], targets, context)
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

    def at_once(self, tensor: Tensor) -> Tensor:
        """What of an input goes through the model at once: all of it, or a window from its middle."""
        if self.windows is None:
            return tensor
        (volume,) = volumes_of(tensor, self.windows, self.model)
        return volume.window(volume.layout.starts[len(volume.layout.starts) // 2])[None]

    def to_model(self, tensor: Tensor) -> Tensor:
        """``tensor`` in the model's dtype, on its device."""
        for parameter in self.model.parameters():
            return tensor.to(parameter.device, parameter.dtype)
        return tensor

    def _carry(
        self,
        place: int,
        answer: Attribution,
        number: int,
        model_input: ModelInput,
        scan: Scan,
        facts: Mapping[str, Any],
    ) -> Heatmap:
        """The raw map of one method and target, carried onto the scan's voxels in one step."""
        method, name, target = self.methods[place], self.names[place], self.targets[number]
        made = answer.maps[number][0].float().cpu()
        raw = made.sum(0)
        where = f"{name} at {f'layer {answer.layer!r}' if answer.layer else 'the input'}"
        if not torch.isfinite(raw).all():
            raise LayerError(f"{scan}: the map of {where} holds NaN or infinity")
        if raw.ndim != 3:
            raise LayerError(f"{scan}: the map of {where} has shape {tuple(raw.shape)}, not one value per 3D cell")
        alignment = answer.alignments[number] if answer.alignments else None
        grid = alignment.grid(model_input.grid, raw.shape) if alignment and answer.layer else model_input.grid
        parts = None
        if answer.parts:
            pieces = answer.parts[number][0].float().cpu().numpy()
            parts = Parts(tuple(answer.part_names), pieces, grid, scan.grid, model_input.grid)
        elif self.per_channel and answer.layer is None and len(made) > 1:
            parts = Parts(self._channel_names(len(made), scan), made.numpy(), grid, scan.grid, model_input.grid)
        return Heatmap(
            method.id,
            target_id(target),
            told(target),
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
            name,
            float(answer.scores[number][0]),
            parts,
            {**facts, **(answer.facts[number] if answer.facts else {})},
        )

    def _channel_names(self, count: int, scan: Scan) -> tuple[str, ...]:
        """What the channels of the model's input are called; numbers where nothing tells."""
        if len(self.channels) == count:
            return self.channels
        stems = [path.name.split(".")[0] for path in scan.paths if path]
        if len(stems) == count and len(set(stems)) == count:
            alike = next(n for n in range(min(map(len, stems)) + 1) if len({stem[: n + 1] for stem in stems}) > 1)
            start = max(stems[0].rfind(separator, 0, alike) for separator in "_- ") + 1
            own = [stem[start:] for stem in stems]
            if all(own):
                return tuple(own)
        return tuple(f"channel {number}" for number in range(count))

    def _require_deterministic(
        self, model: nn.Module, tensor: Tensor, targets: Sequence[Target], answer: Attribution
    ) -> None:
        """Run the model once more, with other random numbers: dropout left on would make each map one of many."""
        with undisturbed(model), torch.no_grad():
            torch.manual_seed(1 + torch.initial_seed() % 2**31)
            again = scores_of(targets, forward(model, plain(tensor)), len(tensor))
        _require_equal(answer.scores, again, "run again")
        self._known_to_repeat = True

    def _prediction(self, output: Any) -> Prediction:
        if not isinstance(output, Tensor) or output.ndim > 2:
            return Prediction((), None, None)
        logits = tuple(float(logit) for logit in output.flatten())
        if self.classes and len(self.classes) != max(2, len(logits)):
            raise SettingError(
                f"{len(self.classes)} classes are named ({', '.join(self.classes)}), but the model has {len(logits)} "
                "outputs; name each output once, in order"
            )
        if len(logits) < 2:
            return Prediction(logits, None, None)
        index = int(np.argmax(logits))
        return Prediction(logits, index, self.classes[index] if self.classes else None)


def one_by_one(method: Method) -> Method:
    """``method`` with one changed copy of the scan in memory at a time, where it makes several at once."""
    return cast(Method, replace(cast(Any, method), batch=1)) if hasattr(method, "batch") else method


def cams_of(methods: Iterable[Method]) -> list[CAM]:
    """The class activation maps that ``methods`` are, or are made of, each once: those whose cells must be placed."""
    found = (base for method in methods for base in bases(method))
    return list(dict.fromkeys(base for base in found if isinstance(base, CAM)))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _model(config: Config) -> nn.Module:
    section = config.model
    source = section.factory or str(config.path_of(cast(str, section.file)))
    weights = config.path_of(section.weights) if section.weights else None
    return load_model(source, section.arguments, weights, config.folder)


def _bundle(config: Config, trust: bool) -> Bundle | None:
    section = config.model
    if section.bundle is None:
        return None
    weights = config.path_of(section.weights) if section.weights else None
    return load_bundle(config.path_of(section.bundle), weights, trust=trust, without=_own_parts(config))


# What a method's setting may name.
_NAMED_BY = {"labels": "label map", "baselines": "scan or folder of scans"}


def _require_named(explainer: Explainer, config: Config, given: bool) -> None:
    """Raise ConfigError, by its key, where a file that a method or a target names is not there.

    ``given``: the targets are not the config's.
    """
    for number, method in enumerate(explainer.methods):
        named = [
            (setting, name)
            for one in dict.fromkeys((method, *bases(method)))
            for setting, names in one.files.items()
            for name in names
        ]
        for setting, name in named:
            key = f"methods.{number}.{method.id}.{setting}"
            require_file(config, key, name, _NAMED_BY.get(setting, "scan"))
    for number, target in enumerate(explainer.targets):
        for name in getattr(target, "files", ()):
            key = "a target given in place of the config's" if given else f"targets.{number}"
            require_file(config, key, name, "scan or label map")


def _own_parts(config: Config) -> list[Part]:
    """What the config says itself, be it that there is none, and is not taken from a bundle."""
    parts: tuple[Part, ...] = ("preprocess", "windows")
    return [part for part in parts if part in config.model_fields_set]


def trusted_to_run(config: Config) -> tuple[str, ...]:
    """What of a config's bundle would run if it were trusted, in words; see :func:`volsal.models.bundle.would_run`."""
    section = config.model
    return would_run(config.path_of(section.bundle), _own_parts(config)) if section.bundle else ()


def _configured_preprocess(config: Config, bundle: Bundle | None) -> Preprocess:
    if isinstance(config.preprocess, FunctionSection):
        return PathFunction(resolve(config.preprocess.function, config.folder))
    if bundle and "preprocess" not in config.model_fields_set:
        return MonaiSteps(bundle.preprocess)
    return MonaiSteps.from_config(config.preprocess)


def case_of(scan: Scan) -> str:
    """The id of a scan's case where none was given: after its file's name."""
    return case_id(Path(scan.path.name)) if scan.path else "scan"


def _facts(target: Target, output: Any) -> dict[str, Any]:
    told_of = facts(target, output)
    return dict(told_of[0]) if told_of else {}


def _on_copy(copied: FastCopy | None) -> list[str]:
    return [f"computed by a copy of the model: {copied}"] if copied and copied.dtype else []


def _require_repeatable(names: Sequence[str], answers: Sequence[Attribution]) -> None:
    """Each method ran the model once; the same scan must have got the same scores."""
    for name, answer in zip(names[1:], answers[1:], strict=True):
        _require_equal(answers[0].scores, answer.scores, f"for {name}")


def _require_equal(first: list[Tensor], again: list[Tensor], when: str) -> None:
    for ours, theirs in zip(first, again, strict=True):
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4):
            raise ModelError(
                f"the model is not deterministic: the same input scored {float(ours[0]):.6g} and then, {when}, "
                f"{float(theirs[0]):.6g}; is there dropout or sampling that evaluation mode leaves on?"
            )
