"""Do maps land where they should?  Impulses at known places, sent through the user's own preprocessing and model.

A small bright spot is added to the user's scan at a known position, and everything that volsal does to a map is done to
the difference that the spot makes: in the model's input, on the way home from there, and in a layer's cells under the
half-pixel and the nominal rule.  How far each lands from where the spot was planted needs neither masks nor trust in
volsal.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from volsal.attribution import Alignment, AlignmentError, AlignmentRule, default_layer, target_id
from volsal.attribution.alignment.alignment import HalfPixel, LayerMap, Nominal, centroid
from volsal.attribution.tap import Tap, forward, plain, undisturbed
from volsal.errors import VolsalError
from volsal.explain import Explainer, cams_of, case_of, environment
from volsal.grid import Grid
from volsal.preprocess import ModelInput, PathFunction
from volsal.resampling import resample
from volsal.scans import Scan
from volsal.scans.write import map_header, replacing, write_map

# A spot's standard deviation, in the larger of the scan's and the model's voxels along each world axis.
_SIGMA = 1.2
# The rules that do not ask what the map is of: an impulse is no evidence for any class.
_RULES: tuple[AlignmentRule, ...] = (HalfPixel(), Nominal())
# Where spots go, as shares of a field of view; none lies on a voxel's centre by construction.
_SHARES = (0.31, 0.69)
# A spot's height, as a share of the scan's range: little enough to stay inside an intensity window nearly everywhere.
_HEIGHT = 0.05
# An impulse that changes the input by less than this share of the strongest is cut by an intensity window.
_WHOLE = 0.8


class GeometryError(VolsalError, ValueError):
    """No impulse could be followed through the preprocessing."""


@dataclass(frozen=True, eq=False)
class Stage:
    """How far impulses land from where they were planted, after one stage of the way.

    Attributes
    ----------
    name : ``preprocessing``, ``map on the scan``, or ``LAYER, RULE``
    errors_mm : (N, 3) landed minus planted, mm to the patient's right, front and head
    errors_voxels : (N, 3) the same along the axes of the model's input, in its voxels
    cell_mm : length of a cell's edges (of a voxel's, where no layer is concerned) along the input's axes, (3,)
    """

    name: str
    errors_mm: NDArray[np.float64]
    errors_voxels: NDArray[np.float64]
    cell_mm: NDArray[np.float64]

    @property
    def distances_mm(self) -> NDArray[np.float64]:
        """(N,) how far each landed."""
        return np.linalg.norm(self.errors_mm, axis=1)

    def describe(self) -> dict[str, Any]:
        """As plain data, for records."""
        return {
            "stage": self.name,
            "impulses": len(self.errors_mm),
            "mean_mm": _axes(self.errors_mm.mean(0)),
            "mean_voxels": _axes(self.errors_voxels.mean(0)),
            "largest_voxels": _axes(np.abs(self.errors_voxels).max(0)),
            "mean_distance_mm": round(float(self.distances_mm.mean()), 4),
            "largest_distance_mm": round(float(self.distances_mm.max()), 4),
            "cell_mm": _axes(self.cell_mm),
        }


@dataclass(frozen=True)
class Placement:
    """Where the explainer's alignment puts the cells of one of the scan's maps.

    Attributes
    ----------
    name : method, layer and target
    alignment : what is used
    from_half_pixel : how far that puts the map from where the half-pixel rule would, along the input's axes, voxels
    spacing_mm : edge lengths of the input's voxels
    """

    name: str
    alignment: Alignment
    from_half_pixel: tuple[float, ...]
    spacing_mm: tuple[float, ...]

    def describe(self) -> dict[str, Any]:
        """As plain data, for records."""
        return {
            "map": self.name,
            "alignment": self.alignment.describe(),
            "from_half_pixel_voxels": list(self.from_half_pixel),
            "from_half_pixel_mm": _axes(np.multiply(self.from_half_pixel, self.spacing_mm)),
        }


@dataclass(frozen=True, eq=False)
class GeometryReport:
    """What :func:`check_geometry` found.

    Attributes
    ----------
    planted, unseen : how many impulses were planted, and how many of them left no whole trace in the model's input
    places_voxels : (N, 3) where those seen were planted, in voxels of the model's input
    stages : in the order of the way
    placements : where this scan's own maps are put, by the explainer's alignment
    notes : rules that had no answer, and why; layers in which no rule puts an impulse near its place
    provenance : the scan and the model this holds for, and what made it
    """

    planted: int
    unseen: int
    places_voxels: NDArray[np.float64]
    stages: tuple[Stage, ...]
    placements: tuple[Placement, ...]
    notes: tuple[str, ...]
    provenance: dict[str, Any]

    def sound(self, within_voxels: float = 0.5) -> bool | None:
        """Whether preprocessing and the way home put each impulse within that many of the model's voxels.

        None where it cannot be told: the impulses that were seen do not differ in place along each axis, so that a
        mirrored image would look right.
        """
        if any(float(np.abs(stage.errors_voxels).max()) > within_voxels for stage in self.stages[:2]):
            return False
        return True if (np.ptp(self.places_voxels, axis=0) >= 2).all() else None

    def write(self, path: Path) -> None:
        """Write all figures as JSON; WriteError where the disk refuses."""
        content = {
            "planted": self.planted,
            "unseen": self.unseen,
            "stages": [stage.describe() for stage in self.stages],
            "placements": [placement.describe() for placement in self.placements],
            "notes": list(self.notes),
            **self.provenance,
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")


def check_geometry(explainer: Explainer, scan: Scan) -> GeometryReport:
    """Plant impulses in ``scan`` and follow them through ``explainer``'s preprocessing and layers.

    Raises
    ------
    GeometryError
        Where no impulse can be planted, or none leaves a trace in the model's input; for preprocessing that reads
        DICOM by itself.
    VolsalError
        Where the scan cannot be preprocessed or the model not be run.
    """
    if isinstance(explainer.preprocess, PathFunction) and scan.path is not None and scan.header is None:
        raise GeometryError(
            f"{scan}: {explainer.preprocess!r} reads files itself, and impulses reach it as NIfTI files only; "
            "check it on a scan that was converted to NIfTI"
        )
    before = explainer.preprocess(scan)
    seen: list[_Impulse] = []
    places = list(_places(before.grid, scan.grid))
    heights = [_height(channel.array) for channel in (scan, *scan.further)]
    for place in places:
        after = _preprocessed(explainer, scan, heights, place, before)
        if after is not None:
            seen.append(_Impulse(place, after))
    if not places:
        raise GeometryError(
            f"{scan}: no place lies well inside both the scan ({scan.grid}) and the model's input ({before.grid}), so "
            "no impulse can be planted; use a larger scan"
        )
    if not seen:
        raise GeometryError(
            f"{scan}: none of {len(places)} spots, {_HEIGHT:.0%} of the scan's range high, changes the model's input; "
            "does the preprocessing crop, clip or mask everything away?"
        )
    seen = _unclipped(seen, before)
    stages = [_input_stage(seen, before), _home_stage(seen, before, scan)]
    notes: list[str] = []
    for layer in _layers(explainer, before):
        stages += _layer_stages(explainer, layer, seen, before, notes)
    placements = tuple(_placements(explainer, before, scan))
    provenance = {
        "scan": {"sha256": scan.sha256, "grid": repr(scan.grid)},
        "model_input": {"grid": repr(before.grid), "preprocess": repr(explainer.preprocess)},
        "weights_sha256": explainer.weights_sha256,
        **environment(),
    }
    return GeometryReport(
        len(places),
        len(places) - len(seen),
        before.grid.voxel([impulse.place for impulse in seen]),
        tuple(stages),
        placements,
        tuple(dict.fromkeys(notes)),
        provenance,
    )


@dataclass(frozen=True, eq=False)
class _Impulse:
    place: NDArray[np.float64]  # (3,) mm
    tensor: Tensor  # (1, C, D, H, W), with the spot

    def trace(self, before: ModelInput) -> Tensor:
        """What the spot changed, (D, H, W), from 0 up."""
        return (self.tensor - before.tensor).abs().sum(1)[0]


def _unclipped(seen: list[_Impulse], before: ModelInput) -> list[_Impulse]:
    """Those that an intensity window leaves whole: one cut on one side has its centre elsewhere, and nothing moved.

    A whole one changes the input by as much as any other does.  Where that leaves few, intensities are not merely
    scaled and clipped, and all count.
    """
    changes = [float(impulse.trace(before).sum()) for impulse in seen]
    whole = [impulse for impulse, change in zip(seen, changes, strict=True) if change >= _WHOLE * max(changes)]
    return whole if len(whole) >= 4 else seen


def _places(inputs: Grid, scan: Grid) -> Iterator[NDArray[np.float64]]:
    """World positions inside both fields of view: about the middle of the model's, or else of the scan's."""
    spot = _spot_mm(inputs, scan)
    found = 0
    for lattice in (inputs, scan):
        for share in [(0.5, 0.5, 0.5), *product(_SHARES, repeat=3)]:
            place = lattice.world((np.array(lattice.shape) - 1) * share + (0.13, -0.21, 0.29))
            if all(_inside(grid, place, spot) for grid in (inputs, scan)):
                found += 1
                yield place
        if found > 4:  # else the model's field is much larger than the scan
            return


def _inside(grid: Grid, place: NDArray[np.float64], spot_mm: NDArray[np.float64]) -> bool:
    """Whether two standard deviations of a spot fit, or, along an axis of few voxels, a quarter of it."""
    last = np.array(grid.shape) - 1
    margin = np.minimum(2 * spot_mm @ np.abs(np.linalg.inv(grid.affine[:3, :3])).T, last / 4)
    at = grid.voxel(place)
    return bool((at >= margin).all() and (at <= last - margin).all())


def _spot_mm(inputs: Grid, scan: Grid) -> NDArray[np.float64]:
    """(3,) the spot's standard deviation along x, y and z, mm: each grid must be able to show it."""
    return _SIGMA * np.maximum(*(np.abs(grid.affine[:3, :3]).max(axis=1) for grid in (inputs, scan)))


def _height(array: NDArray[np.float32]) -> np.float32:
    """How high a spot stands in a channel, in its units."""
    low, high = np.percentile(array, (1, 99))
    return np.float32(_HEIGHT * max(float(high - low), 1e-6))


def _preprocessed(
    explainer: Explainer, scan: Scan, heights: Sequence[np.float32], place: NDArray[np.float64], before: ModelInput
) -> Tensor | None:
    """The model's input with a spot at ``place``, bright or else dark; None where neither shows."""
    spot = _spot(scan.grid, place, _spot_mm(before.grid, scan.grid))
    reads_files = isinstance(explainer.preprocess, PathFunction)
    for sign in (1, -1):
        with tempfile.TemporaryDirectory(prefix="volsal-") as folder:
            after = explainer.preprocess(_with_spot(scan, sign * spot, heights, Path(folder) if reads_files else None))
        # A crop that follows the intensities may have moved; the two inputs are then no pair.
        paired = after.grid.same_as(before.grid)
        if paired and float((after.tensor - before.tensor).abs().max()) > 1e-4 * float(before.tensor.abs().max()):
            return after.tensor
    return None


def _spot(grid: Grid, place: NDArray[np.float64], sigma_mm: NDArray[np.float64]) -> NDArray[np.float32]:
    """(I, J, K) a Gaussian of height 1 about ``place``, computed where it is more than nothing."""
    spot = np.zeros(grid.shape, dtype=np.float32)
    reach = 4 * sigma_mm @ np.abs(np.linalg.inv(grid.affine[:3, :3])).T
    at = grid.voxel(place)
    low = np.maximum(np.floor(at - reach), 0).astype(int)
    high = np.minimum(np.ceil(at + reach) + 1, grid.shape).astype(int)
    axes = [np.arange(a, b) for a, b in zip(low, high, strict=True)]
    away = (grid.world(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)) - place) / sigma_mm
    spot[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = np.exp(-0.5 * (away**2).sum(-1))
    return spot


def _with_spot(scan: Scan, spot: NDArray[np.float32], heights: Sequence[np.float32], folder: Path | None) -> Scan:
    """The scan with ``spot`` added to each channel; in files of ``folder`` for preprocessing that reads files."""
    channels = []
    for number, (channel, height) in enumerate(zip((scan, *scan.further), heights, strict=True)):
        array = channel.array + height * spot
        path = channel.path
        if folder is not None:
            path = folder / f"channel-{number}.nii.gz"
            write_map(path, array, map_header(channel, "none", "volsal check-geometry", (0.0, 0.0)))
        channels.append(replace(channel, array=array, path=path, further=()))
    return replace(channels[0], further=tuple(channels[1:]))


def _layers(explainer: Explainer, before: ModelInput) -> list[str]:
    """The layers at which the explainer's methods take their maps, each once."""
    cams = cams_of(explainer.methods)
    volume = explainer.to_model(before.tensor)
    return list(dict.fromkeys(cam.layer or default_layer(explainer.model, volume) for cam in cams))


def _placements(explainer: Explainer, before: ModelInput, scan: Scan) -> Iterator[Placement]:
    volume = explainer.to_model(before.tensor)
    context = explainer.context(before.grid, case_of(scan), scan)
    targets = explainer.targets_for(context)
    for cam in cams_of(explainer.methods):
        answer = cam.attribute(explainer.model, volume, targets, context)
        for target, alignment, cells in zip(explainer.targets, answer.alignments, answer.maps, strict=True):
            # At the middle of the cells: strides may differ, as where the input is no multiple of them.
            middle = (np.array(cells.shape[2:]) - 1) / 2
            apart = np.array(alignment.offset) + middle * alignment.stride - (np.array(volume.shape[2:]) - 1) / 2
            name = f"{cam.id} at {answer.layer}, {target_id(target)}"
            spacing = tuple(float(mm) for mm in before.grid.spacing)
            yield Placement(name, alignment, tuple(_axes(apart)), spacing)


def _input_stage(seen: Sequence[_Impulse], before: ModelInput) -> Stage:
    landed = [before.grid.world(centroid(impulse.trace(before).numpy())) for impulse in seen]
    return _stage("preprocessing", landed, seen, before.grid, before.grid.spacing)


def _home_stage(seen: Sequence[_Impulse], before: ModelInput, scan: Scan) -> Stage:
    landed = [
        scan.grid.world(centroid(resample(impulse.trace(before), before.grid, scan.grid).numpy())) for impulse in seen
    ]
    return _stage("map on the scan", landed, seen, before.grid, before.grid.spacing)


def _layer_stages(
    explainer: Explainer, layer: str, seen: Sequence[_Impulse], before: ModelInput, notes: list[str]
) -> Iterator[Stage]:
    """What an impulse changes in a layer's cells, placed by each of the rules that do not ask what the map is of."""
    volume = explainer.to_model(before.tensor)
    still = _activation(explainer, layer, before.tensor)

    def change(activation: Tensor, gradient: Tensor) -> Tensor:
        return (activation - still).abs().sum(1, keepdim=True)

    changes = [change(_activation(explainer, layer, impulse.tensor), still) for impulse in seen]
    for rule in _RULES:
        landed, kept, cell = [], [], before.grid.spacing
        for impulse, changed in zip(seen, changes, strict=True):
            if not float(changed.max()) > 0:
                continue
            of = LayerMap("impulse", layer, "any", changed, still, still, change)
            try:
                alignment = rule(explainer.model, volume, of)
            except AlignmentError as error:
                notes.append(f"{rule.id}: {error}")
                break
            placed = alignment.place(of.values.cpu(), before.grid.shape)[0, 0]
            landed.append(before.grid.world(centroid(placed.numpy())))
            kept.append(impulse)
            cell = np.abs(alignment.stride) * before.grid.spacing
        if landed:
            stage = _stage(f"{layer}, {rule.id}", landed, kept, before.grid, cell)
            if stage.distances_mm.mean() > np.linalg.norm(cell):
                notes.append(
                    f"{stage.name}: impulses land {stage.distances_mm.mean():.3g} mm away on average, more than a cell "
                    "is wide from corner to corner; does the model turn or shift its input before this layer?"
                )
            yield stage


def _activation(explainer: Explainer, layer: str, tensor: Tensor) -> Tensor:
    with undisturbed(explainer.model), Tap(explainer.model, layer) as tap, torch.no_grad():
        forward(explainer.model, plain(explainer.to_model(tensor)))
        return tap.activations[0].detach().float()


def _stage(
    name: str,
    landed: Sequence[NDArray[np.float64]],
    impulses: Sequence[_Impulse],
    inputs: Grid,
    cell_mm: NDArray[np.float64],
) -> Stage:
    errors = np.array([where - impulse.place for where, impulse in zip(landed, impulses, strict=True)])
    return Stage(name, errors, errors @ np.linalg.inv(inputs.affine[:3, :3]).T, np.asarray(cell_mm))


def _axes(values: NDArray[np.float64]) -> list[float]:
    return [round(float(value), 4) for value in values]
