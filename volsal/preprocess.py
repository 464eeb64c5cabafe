"""From a scan to what the model sees, with the place of every voxel kept.

The map goes home by geometry alone: preprocessing states where its result lies, as a 4 x 4 affine, and no transform is
ever undone.  So the one thing that matters here is that this affine is true; what can be checked about it is checked.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from volsal.errors import VolsalError, nearest
from volsal.grid import Grid, GridError, lps_to_ras
from volsal.plain_data import name_of, plain_data, public_settings
from volsal.resampling import resample
from volsal.sampling import composed
from volsal.scans import Scan


class PreprocessError(VolsalError, ValueError):
    """Preprocessing failed, or its result cannot be placed in the scan's world."""


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a preprocessing, for the record.

    Attributes
    ----------
    name : the transform's, or the function's
    settings : its own, plain data
    matrix : (4, 4), voxels that it makes to voxels that it is given; those of all steps, multiplied in their order,
        lead from the model's input to the scan
    """

    name: str
    settings: Mapping[str, Any]
    matrix: NDArray[np.float64]

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        return {"name": self.name, "settings": self.settings, "matrix": rounded(self.matrix)}


@dataclass(frozen=True, eq=False)
class ModelInput:
    """What the model sees: (1, C, D, H, W) float, where its voxels lie, and how it was made, in words and by steps."""

    tensor: Tensor
    grid: Grid
    how: str = ""
    steps: tuple[Step, ...] = ()


Preprocess = Callable[[Scan], ModelInput]
# Of a setting that is an array, more numbers than these are told by their digest.
_MOST_NUMBERS = 64
# Less of the model's input than this inside the scan means that the affine is not the scan's.
_LEAST_OVERLAP = 0.05
# By how much a turned input must fit better than the stated one.  A mirrored head correlates by 0.97 with itself.
_TURNED = 0.01


def as_preprocess(steps: Any) -> Preprocess:
    """Whatever a user gives, as a function from scan to model input.

    None: the scan as it is, one channel.  A MONAI transform, ``Compose`` or sequence of them: applied to a
    channel-first MetaTensor.  Any other callable: called with the scan's path, returns a tensor and its (4, 4) affine.
    """
    if isinstance(steps, (MonaiSteps, PathFunction)):
        return steps
    if steps is None:
        return MonaiSteps([])
    if isinstance(steps, Sequence) and not isinstance(steps, str):
        return MonaiSteps(list(steps))
    if type(steps).__module__.startswith("monai."):
        return MonaiSteps([steps])
    if callable(steps):
        return PathFunction(steps)
    raise PreprocessError(
        f"preprocess is a list of MONAI transforms or a function from a path to (tensor, affine), not {steps!r}"
    )


class PathFunction:
    """The user's own preprocessing: a function from a scan's path to a tensor and its affine.

    Parameters
    ----------
    function : the path, or the list of paths of a case of several files ->
        ((C, D, H, W) or (1, C, D, H, W) tensor or array, (4, 4) affine: voxel centre to RAS+ mm)
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __repr__(self) -> str:
        return name_of(self._function)

    def __call__(self, scan: Scan) -> ModelInput:
        """The function's answer, checked against the scan."""
        if scan.volume:
            raise PreprocessError(
                f"{scan}: {self!r} reads the file itself, so volume {scan.volume} cannot be chosen for it; save that "
                "volume as a file of its own"
            )
        chosen = {"series": scan.series, "slices": scan.slices, "nan": scan.filled}
        for name, value in chosen.items():
            if value is not None:
                raise PreprocessError(
                    f"{scan}: {self!r} reads the file itself, so {name} {value!r} does not reach it; leave it out and "
                    "do the same in that function, or preprocess with MONAI transforms"
                )
        paths = list(dict.fromkeys(path for path in scan.paths if path))
        if scan.path is None:
            raise PreprocessError(f"{self!r} reads a file, and this scan was made in memory; pass its path instead")
        try:
            answer = self._function(paths[0] if len(paths) == 1 else paths)
        except Exception as error:
            raise PreprocessError(f"{scan}: {self!r} fails: {type(error).__name__}: {error}") from error
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            raise PreprocessError(f"{self!r} must return (tensor, affine); it returned a {type(answer).__name__}")
        try:
            tensor = torch.as_tensor(answer[0]).detach().as_subclass(Tensor)
            affine = np.asarray(answer[1], dtype=float)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PreprocessError(f"{self!r} must return (tensor, affine) of numbers: {error}") from error
        if tensor.ndim == 5 and len(tensor) == 1:
            tensor = tensor[0]
        if np.array_equal(affine, np.eye(4)) and not np.array_equal(scan.grid.affine, np.eye(4)):
            raise PreprocessError(
                f"{scan}: {self!r} returned the identity as affine, but the scan's own is another; return the affine "
                "of the tensor's voxels in RAS+ mm (for an untouched scan nibabel's image.affine)"
            )
        made = _placed(tensor, affine, scan, repr(self))
        return replace(made, steps=(Step(repr(self), {}, made.grid.to(scan.grid)),))


class MonaiSteps:
    """MONAI array transforms, applied one after the other to a channel-first MetaTensor of the scan.

    The first spatial ones are done as one sampling of the scan where that gives the same (:mod:`volsal.sampling`); the
    result's ``how`` says which.  Each other step is watched: one that returns a bare array, or sets the affine back to
    identity, has lost the place of its voxels and is refused by name.
    """

    def __init__(self, steps: Sequence[Callable]) -> None:
        self._steps = list(_flattened(steps))
        self._told = [(name_of(step), plain_data(public_settings(step), _MOST_NUMBERS)) for step in self._steps]

    def __repr__(self) -> str:
        return " > ".join(type(step).__name__ for step in self._steps) or "the scan as it is"

    @classmethod
    def from_config(cls, entries: Sequence[str | Mapping[str, Mapping[str, Any] | None]]) -> MonaiSteps:
        """Steps by MONAI's names: ``- Orientation: {axcodes: RAS}``, or ``- NormalizeIntensity`` without arguments."""
        return cls([_named_step(number, entry) for number, entry in enumerate(entries, 1)])

    def __call__(self, scan: Scan) -> ModelInput:
        """The scan after every step."""
        sampling = composed(
            self._steps,
            scan,
            lambda number, step, image: _run(partial(step, lazy=True), self._name(number), image, scan),
        )
        if not self._steps:
            return _placed(sampling.of(scan), scan.grid.affine, scan, repr(self))
        current = _meta_tensor(sampling.of(scan), sampling.grid, scan)
        matrices = sampling.matrices(scan.grid)
        for number, step in enumerate(self._steps):
            if number not in sampling.steps:
                before = _place(current)
                current = _apply(step, self._name(number), current, scan)
                # What the sampling has already cropped for a step that has voxels to add comes first.
                own = _moved(before, _place(current), self._name(number), scan)
                matrices[number] = matrices.get(number, np.eye(4)) @ own
        how = repr(self)
        if sampling.interpolates:
            how += f" ({', '.join(type(self._steps[n]).__name__ for n in sampling.steps)} as one sampling of the scan)"
        made = _placed(current.as_tensor(), current.affine.numpy(), scan, how)
        return replace(made, steps=self._done(matrices))

    def _done(self, matrices: Mapping[int, NDArray[np.float64]]) -> tuple[Step, ...]:
        return tuple(Step(*told, matrices.get(number, np.eye(4))) for number, told in enumerate(self._told))

    def _name(self, number: int) -> str:
        return f"preprocessing step {number + 1}, {type(self._steps[number]).__name__},"


_Place = tuple[Sequence[int], NDArray[np.float64]]


def _place(image: Any) -> _Place:
    """Shape and affine of a MetaTensor; a copy, since a step may change its image in place."""
    return tuple(image.shape[1:]), image.affine.cpu().double().numpy().copy()


def _moved(before: _Place, after: _Place, name: str, scan: Scan) -> NDArray[np.float64]:
    """(4, 4): voxels after a step to voxels before it."""
    if np.array_equal(before[1], after[1]):
        return np.eye(4)
    try:
        return Grid(*after).to(Grid(*before))
    except GridError as error:
        raise PreprocessError(f"{scan}: {name} gives no usable place for its result: {error}") from error


def rounded(matrix: NDArray[np.float64]) -> list[list[float]]:
    """For a record, without what rounding leaves in the last digits."""
    return (np.round(matrix, 12) + 0.0).tolist()  # + 0.0: no -0.0


def _meta_tensor(voxels: Tensor, grid: Grid, scan: Scan) -> Any:
    from monai.data import MetaTensor

    original = torch.from_numpy(scan.grid.affine.copy())
    meta = {"original_affine": original, "space": "RAS", "spatial_shape": np.array(scan.grid.shape)}
    return MetaTensor(voxels, affine=torch.from_numpy(grid.affine.copy()), meta=meta)


def _run(step: Callable, name: str, before: Any, scan: Scan) -> Any:
    try:
        return step(before)
    except Exception as error:
        raise PreprocessError(f"{scan}: {name} fails: {type(error).__name__}: {error}") from error


def _apply(step: Callable, name: str, before: Any, scan: Scan) -> Any:
    from monai.data import MetaTensor

    after = _run(step, name, before, scan)
    if not isinstance(after, MetaTensor):
        raise PreprocessError(
            f"{name} returned a bare {type(after).__name__}, so where its voxels lie is lost; use a transform that "
            "keeps MONAI's MetaTensor, or a function that returns (tensor, affine)"
        )
    identity = torch.eye(4, dtype=after.affine.dtype)
    if torch.equal(after.affine.cpu(), identity) and not torch.equal(before.affine.cpu().to(identity), identity):
        raise PreprocessError(
            f"{name} set the affine back to identity, so where its voxels lie is lost (a step written for bare arrays "
            "does that); use a MONAI transform for it, or a function that returns (tensor, affine)"
        )
    return _nearest_put_right(step, before, after)


def _nearest_put_right(step: Callable, before: Any, after: Any) -> Any:
    """The place of what ``Resize`` and ``Zoom`` made by picking voxels.

    MONAI states the same affine for every mode.  Yet ``nearest`` takes voxel floor(m * o / n) of o for voxel m of n,
    on average up to half a voxel off, and ``nearest-exact`` misses the middle where o / n is even.
    """
    mode = str(getattr(step, "mode", "")).rpartition(".")[2].lower().replace("_", "-")
    if type(step).__name__ not in ("Resize", "Zoom") or mode not in ("nearest", "nearest-exact"):
        return after
    sizes = before.shape[1:]
    made = [int(o * z) for o, z in zip(sizes, _zooms(step), strict=True)] if hasattr(step, "zoom") else after.shape[1:]
    shift = np.zeros(4)
    for axis, (o, n) in enumerate(zip(sizes, made, strict=True)):
        m = np.arange(n)
        picked = np.floor((m + (0.5 if mode == "nearest-exact" else 0)) * o / n)
        shift[axis] = ((picked + 0.5) * n / o - 0.5 - m).mean()  # in voxels of the result
    after.affine[:3, 3] += (after.affine @ torch.from_numpy(shift).to(after.affine))[:3]
    return after


def _zooms(step: Any) -> list[float]:
    return [float(zoom) for zoom in np.broadcast_to(step.zoom, 3)]


def _flattened(steps: Sequence[Callable]) -> Iterator[Callable]:
    for step in steps:
        if type(step).__module__.startswith("monai.") and hasattr(step, "transforms"):
            yield from _flattened(step.transforms)
        else:
            _require_not_random(step)
            if type(step).__name__ in _UNTRUE and type(step).__module__.startswith("monai."):
                raise PreprocessError(f"{type(step).__name__} {_UNTRUE[type(step).__name__]}")
            yield step


def _require_not_random(step: Callable) -> None:
    if not callable(step):
        raise PreprocessError(f"a preprocessing step is callable; this one is {step!r}")
    if hasattr(step, "set_random_state") or hasattr(step, "randomize"):
        raise PreprocessError(
            f"{type(step).__name__} is random, so the map would explain an input that nobody sees again; leave "
            "augmentation out"
        )


_UNTRUE = {
    "Transpose": "moves the voxels and leaves the affine as it was; use Orientation or Rotate90 and Flip for it",
    "GridDistortion": "bends the scan, and no affine can say where its voxels lie; leave augmentation out",
}
_OURS = {
    "LoadImage": "volsal reads the scan itself",
    "EnsureChannelFirst": "the scan comes channel-first already, (C, I, J, K)",
    "AddChannel": "the scan comes channel-first already, (C, I, J, K)",
}


def _named_step(number: int, entry: str | Mapping[str, Mapping[str, Any] | None]) -> Callable:
    import monai.transforms as transforms

    if isinstance(entry, str):
        entry = {entry: {}}
    if len(entry) != 1:
        raise PreprocessError(f"preprocessing step {number} must be one name with its arguments, not {dict(entry)}")
    ((name, arguments),) = entry.items()
    if name in _OURS:
        raise PreprocessError(f"preprocessing step {number}, {name}: {_OURS[name]}; leave the step out")
    kind = getattr(transforms, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, transforms.Transform)):
        known = [n for n, k in vars(transforms).items() if inspect.isclass(k) and issubclass(k, transforms.Transform)]
        raise PreprocessError(f"preprocessing step {number}: MONAI has no transform {name!r}{nearest(name, known)}")
    if issubclass(kind, transforms.MapTransform):
        raise PreprocessError(
            f"preprocessing step {number}: {name} works on dictionaries; use {name.rstrip('dD').removesuffix('ict')}"
        )
    accepted = inspect.signature(kind).parameters
    for argument in arguments or {}:
        if argument not in accepted:
            raise PreprocessError(
                f"preprocessing step {number}: {name} has no argument {argument!r}{nearest(argument, accepted)}"
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MONAI announces its defaults; the scan's space is stated
            return kind(**dict(arguments or {}))
    except Exception as error:
        raise PreprocessError(
            f"preprocessing step {number}: {name} refuses {dict(arguments or {})}: {type(error).__name__}: {error}"
        ) from error


def _placed(tensor: Tensor, affine: NDArray[np.float64], scan: Scan, how: str) -> ModelInput:
    """The model input on its grid, after every check that can be made of it."""
    if tensor.ndim != 4:
        raise PreprocessError(f"{scan}: {how} gives shape {tuple(tensor.shape)}; expected (C, D, H, W)")
    tensor = tensor.float().contiguous()
    if not torch.isfinite(tensor).all():
        raise PreprocessError(f"{scan}: {how} gives {int((~torch.isfinite(tensor)).sum()):,} NaN or infinite voxels")
    try:
        grid = Grid(tensor.shape[1:], affine)
    except GridError as error:
        raise PreprocessError(f"{scan}: {how} gives no usable place for its result: {error}") from error
    # Padding makes the first small and cropping the second; only a wrong place makes both.
    overlap = grid.overlap(scan.grid)
    if max(overlap, scan.grid.overlap(grid)) < _LEAST_OVERLAP:
        raise PreprocessError(
            f"{scan}: after {how}, only {overlap:.0%} of the model's input lies inside the scan, so its affine is not "
            f"the scan's ({grid}, centred at {_centre(grid)} mm; the scan at {_centre(scan.grid)} mm); a step lost or "
            "falsified it"
        )
    _require_same_anatomy(tensor, grid, scan, how)
    return ModelInput(tensor[None], grid, how)


def _centre(grid: Grid) -> str:
    return ", ".join(f"{mm:.0f}" for mm in grid.world((np.array(grid.shape) - 1) / 2))


def _require_same_anatomy(tensor: Tensor, grid: Grid, scan: Scan, how: str) -> None:
    """Refuse an input that shows the scan turned over: its affine would send the map to the wrong side.

    The input is compared, on a lattice, with the scan sampled where the affine says; then the same for the input
    mirrored and permuted in each possible way.  If the preprocessing is sound the stated placement fits best, whatever
    was done to the intensities.
    """
    # Channels may differ in contrast, so that their mean is like none of them: the first one stands for all.
    seen = (tensor[0] if scan.further and len(tensor) == len(scan.paths) else tensor.mean(0)).numpy()
    stride = [max(1, n // 24) for n in grid.shape]
    lattice = tuple(slice(None, None, s) for s in stride)
    shape = seen[lattice].shape
    coarse = Grid(shape, grid.affine @ np.diag([*stride, 1.0]))
    inner = _within(coarse, scan.grid)
    if not inner.any():
        _require_ras(seen, coarse, lattice, 0.0, scan, how)
        return
    there = _standard(resample(scan.array, scan.grid, coarse)[inner])

    def fit(order: tuple[int, ...], flips: tuple[int, ...]) -> float:
        turned = np.flip(seen.transpose(order), flips)
        return abs(float(_standard(turned[lattice][inner]) @ there))

    stated = fit((0, 1, 2), ())
    _require_ras(seen, coarse, lattice, stated, scan, how)
    if stated >= 1 - _TURNED:  # which nothing can exceed by more than that
        return
    turns = [
        (order, flips)
        for order in itertools.permutations(range(3))
        if seen.transpose(order).shape == seen.shape
        for count in range(4)
        for flips in itertools.combinations(range(3), count)
    ]
    best, (order, flips) = max((fit(*turn), turn) for turn in turns)
    if best >= 0.5 and best - stated > _TURNED:
        change = [f"mirrored along axis {axis}" for axis in flips]
        change += ["with its axes in the order " + " ".join(map(str, order))] if order != (0, 1, 2) else []
        raise PreprocessError(
            f"{scan}: after {how}, the model's input fits the scan better {' and '.join(change)} (r = {best:.2f}) "
            f"than where its affine places it ({stated:.2f}): a step turned the voxels and not the affine, and the map "
            "would land on the wrong side; use MONAI's Flip, Rotate90 or Orientation for it"
        )


def _require_ras(seen: NDArray, coarse: Grid, lattice: tuple[slice, ...], stated: float, scan: Scan, how: str) -> None:
    """Refuse an affine that fits the scan better once turned from LPS, the world of DICOM and ITK, into RAS."""
    turned = Grid(coarse.shape, lps_to_ras(coarse.affine))
    inner = _within(turned, scan.grid)
    if inner.mean() < _LEAST_OVERLAP:
        return
    fits = abs(_correlation(seen[lattice][inner], resample(scan.array, scan.grid, turned)[inner]))
    # Half turns keep much of a head's shape, and filters may keep little of its contrast: only a clear fit tells.
    if fits >= 0.7 and fits - stated > 0.05:
        raise PreprocessError(
            f"{scan}: after {how}, the model's input fits the scan better (r = {fits:.2f}) if its affine is LPS, "
            f"as DICOM and SimpleITK have it, than as RAS ({stated:.2f}); the map would land on the wrong side: "
            "return numpy.diag([-1, -1, 1, 1]) @ affine"
        )


def _within(grid: Grid, scan: Grid) -> NDArray[np.bool_]:
    """Voxels of ``grid`` between the outermost voxel centres of ``scan``.

    What preprocessing makes up beyond them, be it 0 or the nearest value, has a shape of its own to correlate with.
    """
    last = np.array(scan.shape) - 1
    reach = np.where(last > 0, 1e-6, 0.5)  # of one voxel, the whole
    ijk = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
    at = scan.voxel(grid.world(ijk))
    return np.asarray(((at >= -reach) & (at <= last + reach)).all(axis=-1))


def _correlation(a: NDArray, b: NDArray) -> float:
    """Pearson's r of two equally long arrays, outliers clipped; 0 where one of them is constant."""
    return float(_standard(a) @ _standard(b))


def _standard(values: NDArray) -> NDArray:
    """``values`` with outliers clipped, of mean 0 and norm 1; zeros where they are constant."""
    clipped = np.clip(values, *np.percentile(values, (1, 99)))
    centred = (clipped - clipped.mean()).astype(np.float64)
    norm = float(np.sqrt(centred @ centred))
    return centred / norm if norm > 0 else centred
