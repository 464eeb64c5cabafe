"""What one scan gave: its maps, the record of what made them, and how both are saved."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from volsal.attribution import Alignment
from volsal.grid import Grid
from volsal.plain_data import plain_data
from volsal.resampling import resample
from volsal.run_folder import CASE_FILE, files_of
from volsal.scans import Scan
from volsal.scans.digest import sha256_of
from volsal.scans.find import pseudonym, without_uids
from volsal.scans.write import WriteError, map_header, replacing, write_map, write_parts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = 1
# Raised by whoever changes what a scan's result holds, so that a run makes anew what an earlier code made.
RESULT_VERSION = 4
# Maps that a notebook shows as pictures; of further ones it tells in words.
_PICTURES = 6


class TakenError(WriteError):
    """A case folder that holds another scan's result."""


@dataclass(frozen=True, eq=False, repr=False)
class Parts:
    """What a map is the sum of: its input channels' shares, or its feature maps' own.

    A sequence of maps (I, J, K) on the scan's voxels.  Each is carried there when it is asked for, since all of them
    at once may be more than fits in memory.

    Attributes
    ----------
    names : one for each
    raw : (P, d, h, w) float32 as the method made them
    raw_grid : where ``raw`` lies
    grid : the scan's
    field : the model's input, outside of which a map is 0
    """

    names: tuple[str, ...]
    raw: NDArray[np.float32]
    raw_grid: Grid
    grid: Grid
    field: Grid

    def __repr__(self) -> str:
        return f"Parts({', '.join(self.names)})"

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> NDArray[np.float32]:
        return resample(self.raw[number], self.raw_grid, self.grid, field=self.field)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        return (self[number] for number in range(len(self)))

    @property
    def shares(self) -> tuple[float, ...]:
        """How much of all parts' positive values, summed over the cells, each has; they add up to 1, or all are 0."""
        mass = self.raw.clip(min=0).sum((1, 2, 3), dtype=np.float64)
        return tuple((mass / (mass.sum() or 1.0)).tolist())


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
    method_name : the method's own name in this result, for files and lists; its id where no other one has it
    score : the number that is explained: what the target took from the model's output
    parts : what the map is the sum of, where that was asked for
    facts : what a reader of the map should know in figures, such as a convergence delta; plain data
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
    method_name: str = ""
    score: float | None = None
    parts: Parts | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.method_name:
            object.__setattr__(self, "method_name", self.method)

    def __repr__(self) -> str:
        return f"Heatmap({self.name}, {self.status}, layer {self.layer or 'none'}, {self.grid!r})"

    @property
    def name(self) -> str:
        """What a viewer's list calls it: ``grad-cam class-1``."""
        return f"{self.method_name} {self.target}"

    @cached_property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest of :attr:`values`."""
        return float(self.values.min()), float(self.values.max())

    @cached_property
    def status(self) -> str:
        """``ok``; ``empty``: no positive evidence anywhere; ``constant``: one value everywhere, so no place at all."""
        if self.extremes[1] <= 0:
            return "empty"
        return "constant" if float(np.ptp(self.raw)) == 0 else "ok"

    @cached_property
    def window(self) -> tuple[float, float]:
        """The display range, from 0 to the maximum; for maps made on the input's voxels to the 99.9th percentile.

        The percentile, of what is positive, keeps a few outlying voxels of a gradient from dimming all others; a
        layer's map is smooth and has none.  An empty map gets the range of its magnitude (or 1), so that everything in
        it lies at the invisible end.
        """
        least, top = self.extremes
        if top <= 0:
            top = -least
        elif not self.layer:
            top = float(np.percentile(self.values[self.values > 0], 99.9))
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
        return f"{case}_{self.method_name}_{self.target}.nii.gz"


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
        """The map of that method, by its name or its id (and target, where there are several)."""
        asked = [m for m in self.maps if target in (None, m.target)]
        found = [m for m in asked if m.method_name == method] or [m for m in asked if m.method == method]
        if len(found) != 1:
            have = ", ".join(f"{m.method_name}/{m.target}" for m in self.maps)
            raise KeyError(f"{len(found)} maps are {method}/{target or '*'}; there are {have}")
        return found[0]

    def pseudonymous(self, salt: bytes) -> Explanation:
        """The same, with a pseudonym for every DICOM UID in its record (see :func:`volsal.scans.find.pseudonym`)."""
        series = self.scan.series
        scan = replace(self.scan, series=pseudonym(series, salt)) if series else self.scan
        return replace(self, scan=scan, notes=tuple(without_uids(note, salt) for note in self.notes))

    def save(self, folder: str | Path, stored_as: str = "float32") -> Path:
        """Write the maps and ``case.json`` into ``folder/<case>``; return that folder.

        ``case.json`` is written last: where it is, the case is whole.  ``stored_as`` is how a map's file holds its
        values: as they are, or as ``uint16``, ``uint8`` or ``int16`` times a slope (see
        :class:`volsal.scans.write.Coding`).  Then the record states the largest error, and all else in it is of the
        values before.  A map's parts stay float32.

        Raises
        ------
        WriteError
            Where the disk refuses or does not keep what it was given.
        """
        home = Path(folder) / self.case
        record = home / CASE_FILE
        _forget(home, self.scan)
        files = [self._save_map(home, heatmap, stored_as) for heatmap in self.maps]
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

    def _save_map(self, home: Path, heatmap: Heatmap, stored_as: str) -> dict[str, Any]:
        """Write one map, with its parts; return its record."""
        name = heatmap.file_name(self.case)
        text = f"volsal {heatmap.method} {heatmap.layer or 'input'}: {heatmap.unit}"
        header = map_header(self.scan, heatmap.method, text, heatmap.window)
        written = write_map(home / name, heatmap.values, header, stored_as)
        record = {"file": name, "sha256": written.sha256, "stored": written.stored, **_describe_map(heatmap)}
        if heatmap.parts is not None:
            stem = name.removesuffix(".nii.gz")
            record["parts"] = self._save_parts(home, f"{stem}_parts", heatmap, heatmap.parts, header)
        return record

    def _save_parts(self, home: Path, stem: str, heatmap: Heatmap, parts: Parts, header: Any) -> dict[str, Any]:
        name = f"{stem}.nii.gz"
        digest = write_parts(home / name, parts, len(parts), header)
        record: dict[str, Any] = {
            "file": name,
            "sha256": digest,
            "names": list(parts.names),
            "shares": [round(share, 6) for share in parts.shares],
        }
        if heatmap.layer is not None:
            from volsal.report.animation import save_gif

            picture = f"{stem}.gif"
            at = heatmap.grid.voxel(heatmap.peak_mm) if heatmap.peak_mm else (np.array(heatmap.grid.shape) - 1) / 2
            voxel = np.round(at).astype(int)
            save_gif(home / picture, self.scan.array, parts, parts.names, heatmap.unit, voxel, grid=self.scan.grid)
            record |= {"picture": picture, "picture_sha256": sha256_of(home / picture)}
        return record

    def show(self, **options: Any) -> None:
        """Open the scan and its maps in napari (see :func:`volsal.viewer.show.show`)."""
        from volsal.viewer.show import show

        show(self.scan, self.maps, **options)

    def _repr_html_(self) -> str:
        """What a notebook shows: the prediction, and three planes with each of the first maps."""
        from volsal.report.notebook import Shown, piece

        shown = [
            Shown(heatmap.name, _in_words(heatmap), self._figure(heatmap) if number < _PICTURES else None)
            for number, heatmap in enumerate(self.maps)
        ]
        return str(piece(self.case, str(self.prediction), shown, self.notes))

    def figure(self, method: str | None = None, target: str | None = None) -> Figure:
        """Three planes through the peak of a map (the first one unless named) as a matplotlib figure."""
        return self._figure(self.map(method, target) if method else self.maps[0])

    def _figure(self, chosen: Heatmap) -> Figure:
        from volsal.report.figures import three_planes

        return three_planes(
            self.scan,
            chosen.values,
            window=chosen.window,
            unit=chosen.unit,
            at_mm=chosen.peak_mm,
            signed=chosen.signed,
            title=f"{self.case}: {chosen.method_name}, {chosen.target_text}",
        )


def _in_words(heatmap: Heatmap) -> str:
    """What a map shows, for who cannot see it."""
    layer = f"layer {heatmap.layer}" if heatmap.layer else "the model's input"
    if heatmap.peak_mm is None:
        shows = {"empty": "no positive evidence", "constant": "the same everywhere"}[heatmap.status]
    else:
        at = ", ".join(f"{mm:.1f}" for mm in heatmap.peak_mm)
        shows = f"peak {heatmap.extremes[1]:.3g} {heatmap.unit} at ({at}) mm"
    return f"{heatmap.target_text}, {layer}: {shows}"


def _summit(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The centre, in voxels, of the connected group of near-maximal voxels that reaches the maximum."""
    highest = values.max(axis=(0, 1))
    top = highest.max()
    # Only in the slices that reach so high, in the order of memory; which voxel comes first makes no difference.
    slices = np.flatnonzero(highest >= 0.999 * top)
    marks = values[..., slices[0] : slices[-1] + 1] >= 0.999 * top
    voxels = np.argwhere(marks.T)[:, ::-1] + (0, 0, slices[0])
    if len(voxels) == 1:
        return voxels[0].astype(float)
    import SimpleITK as sitk

    corner = voxels.min(axis=0)
    box = values[tuple(slice(low, high + 1) for low, high in zip(corner, voxels.max(axis=0), strict=True))]
    near = sitk.GetImageFromArray((box >= 0.999 * top).astype(np.uint8))
    groups = sitk.GetArrayFromImage(sitk.RelabelComponent(sitk.ConnectedComponent(near, True)))
    widest = groups[box == top].min()  # relabelled by size, the largest is 1
    return np.argwhere(groups == widest).mean(axis=0) + corner


def _forget(home: Path, scan: Scan) -> None:
    """Remove an earlier result of this scan, its record first, so that no record ever stands over other maps."""
    record = home / CASE_FILE
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        before, names = content["scan"], list(files_of(content))
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):  # damaged: nothing in it can be relied on
        before, names = _describe_scan(scan), []
    now = _describe_scan(scan)
    other_file = before["path"] != now["path"] or before.get("series") != now.get("series")
    if before["sha256"] != now["sha256"] and other_file:
        raise TakenError(
            f"{home}: already holds the result of another scan, {before['path']}; give this one another case id "
            "(--case) or another output folder"
        )
    record.unlink()
    for name in names:
        (home / Path(name).name).unlink(missing_ok=True)


def _describe_map(heatmap: Heatmap) -> dict[str, Any]:
    step = heatmap.raw_grid.spacing
    return {
        "method": heatmap.method,
        "name": heatmap.method_name,
        "settings": plain_data(heatmap.settings),
        "target": heatmap.target,
        "target_text": heatmap.target_text,
        "layer": heatmap.layer,
        "unit": heatmap.unit,
        "signed": heatmap.signed,
        "status": heatmap.status,
        "window": list(heatmap.window),
        "minimum": heatmap.extremes[0],
        "maximum": heatmap.extremes[1],
        "peak_mm": heatmap.peak_mm,
        "cells": list(heatmap.raw.shape),
        "cell_mm": [round(float(mm), 4) for mm in step],
        "cell_affine": heatmap.raw_grid.affine.tolist(),
        "alignment": heatmap.alignment.describe() if heatmap.alignment else None,
        "coverage": heatmap.coverage,
        "score": heatmap.score,
        "facts": plain_data(heatmap.facts),
    }


def _describe_scan(scan: Scan) -> dict[str, Any]:
    content = {
        **_describe_file(scan),
        "shape": list(scan.grid.shape),
        "affine": scan.grid.affine.tolist(),
        "grid_sha256": scan.grid.sha256,
        "spacing_mm": [round(float(mm), 6) for mm in scan.grid.spacing],
        "orientation": scan.grid.orientation,
        "oblique_degrees": round(scan.grid.obliquity, 3),
        "form": scan.form if scan.header is not None else "header",
        "nan": scan.filled,
    }
    content |= {name: getattr(scan, name) for name in ("series", "slices") if getattr(scan, name) is not None}
    if scan.further:
        content["channels"] = [_describe_file(channel) for channel in (scan, *scan.further)]
    return content


def _describe_file(scan: Scan) -> dict[str, Any]:
    return {
        "path": os.fsencode(scan.path.resolve()).decode("utf-8", "backslashreplace") if scan.path else None,
        "sha256": scan.sha256,
        "bytes": scan.size,
        "volume": scan.volume,
    }
