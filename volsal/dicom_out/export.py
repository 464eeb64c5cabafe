"""From a case folder to DICOM files: written whole, read back and compared before they have their names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volsal.dicom_out.objects import Map, Region, capture, encoded, parametric_map, segmentation
from volsal.dicom_out.source import ON_SLICE_MM, DicomOutError, Identifiers, Source, require_highdicom
from volsal.dicom_out.threshold import Threshold
from volsal.run_folder import CASE_FILE, RunFolder
from volsal.scans import Scan, read_scan
from volsal.scans.dicom import digest, sniff
from volsal.scans.write import WriteError, replacing

KINDS = ("map", "region", "picture")
RECORD = "dicom.json"
HALF = Threshold(50.0, "share")
# A converter may round and rescale; another patient's scan comes nowhere near.
_SAME_VOXELS = 0.9999
_TILTED_FROM = 0.1  # degrees


@dataclass(frozen=True)
class Settings:
    """What is written of each map, and what it tells of its source.

    Attributes
    ----------
    what : of :data:`KINDS`: Parametric Map, Segmentation, Secondary Capture
    threshold : where the region ends
    identifiers : ``none``, or ``source``: patient, study and UIDs as in the series, which a PACS needs to file the
        objects beside it
    methods : only maps of these names; none: all
    """

    what: Sequence[str] = KINDS
    threshold: Threshold = HALF
    identifiers: Identifiers = "none"
    methods: Sequence[str] = ()

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.what if kind not in KINDS]
        if unknown or not self.what:
            raise DicomOutError(f"what to write is {', '.join(KINDS)}, or some of these; not {', '.join(unknown)}")
        if self.identifiers not in ("none", "source"):
            raise DicomOutError(f"identifiers is 'none' or 'source', not {self.identifiers!r}")


@dataclass(frozen=True)
class Exported:
    """What became of a case: its files, and what was not written and why, in words."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def export_case(
    folder: str | Path,
    output: str | Path,
    settings: Settings | None = None,
    *,
    source: str | Path | None = None,
    series: str | None = None,
) -> Exported:
    """Write a case's maps as DICOM into ``output/<case>``, with a record, ``dicom.json``, written last.

    The same case, settings and versions give the same files to the byte, with the same UIDs.

    Parameters
    ----------
    folder : the case folder, with ``case.json``
    source : the DICOM folder of the series: where it lies now, or what the explained file was converted from.  Without
        it, the scan as recorded
    series : which series of that folder, as for :func:`volsal.scans.read_scan`

    Raises
    ------
    DicomOutError
        Where the case or its source is not what DICOM can be made from.
    ScanError
        Where the source cannot be read.
    WriteError
        Where the disk refuses, or does not keep what it was given.
    """
    require_highdicom()
    settings = settings or Settings()
    case = _Case.read(Path(folder))
    origin = case.origin(source, series, settings.identifiers)
    home = Path(output) / case.name
    chosen = case.chosen(settings.methods)
    _forget(home)
    files: list[dict[str, Any]] = []
    notes = _notes(origin.source)
    for number, entry in chosen:
        values = case.values(entry)
        shown = case.map(entry, number, origin.source.onto(values.array, values.grid))
        for kind in settings.what:
            file = home / f"{_stem(entry)}_{kind}.dcm"
            about = _WRITERS[kind](file, origin, shown, values, settings)
            if about is None:
                notes.append(f"{shown.name}: no region, since nothing in the map reaches {settings.threshold}")
            else:
                files.append({"kind": kind, "map": shown.name, "file": file.name, **about})
    content = {
        "format": 1,
        "case": case.name,
        "identifiers": settings.identifiers,
        "source_sha256": origin.sha256,
        "files": files,
        "notes": notes,
    }
    with replacing(home / RECORD) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return Exported(tuple(home / about["file"] for about in files), tuple(notes))


def case_folders(path: str | Path) -> list[Path]:
    """The case folder ``path``, or those of the run in ``path`` that have a result.

    Raises
    ------
    DicomOutError
        Where it is neither.
    """
    path = Path(path)
    if (path / CASE_FILE).is_file():
        return [path]
    run = RunFolder(path)
    done = [path / case for case in run.cases() if run.state(case) == "done"] if path.is_dir() else []
    if not done:
        raise DicomOutError(f"{path}: neither a case folder nor a run with a case that has maps; name one of these")
    return done


@dataclass(frozen=True, eq=False)
class _Origin:
    """The series, the digest of its files, and how to read the scan that was explained, for pictures."""

    source: Source
    sha256: str
    read: Callable[[], Scan]

    @cached_property
    def scan(self) -> Scan:
        return self.read()


@dataclass(frozen=True, eq=False)
class _Case:
    folder: Path
    run: RunFolder
    record: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> _Case:
        folder = folder.resolve()
        run = RunFolder(folder.parent)
        record = run.record(folder.name)
        if record is None:
            raise DicomOutError(f"{folder}: no {CASE_FILE} that volsal wrote; name a case folder of a run")
        return cls(folder, run, record)

    @property
    def name(self) -> str:
        return self.folder.name

    def chosen(self, methods: Sequence[str]) -> list[tuple[int, Mapping[str, Any]]]:
        """The maps of those names, each with its number in the case."""
        maps = list(enumerate(self.record["maps"], 1))
        missing = set(methods) - {entry["name"] for _, entry in maps}
        if missing:
            have = ", ".join(dict.fromkeys(entry["name"] for _, entry in maps))
            raise DicomOutError(f"{self.folder}: no map of {', '.join(sorted(missing))}; there are {have}")
        return [(number, entry) for number, entry in maps if not methods or entry["name"] in methods]

    def origin(self, source: str | Path | None, series: str | None, identifiers: Identifiers) -> _Origin:
        """The series, which must be the one that was explained, or hold the same voxels."""
        recorded = self.record["scan"]["path"]
        path = Path(source or recorded or "")
        if not (source or recorded) or not path.exists():
            raise DicomOutError(f"{self.folder}: its scan, {path}, is not there; say where with --source")
        if not sniff(path):
            raise DicomOutError(
                f"{self.folder}: the explained scan, {path}, is not DICOM, so there is no series that its maps belong "
                "to; name the DICOM folder it was converted from with --source"
            )
        series = series or self.run.series_of(path, self.record["scan"].get("series"))
        origin = Source.read(path, series, identifiers, self.run.salt())
        found = digest({frame.source.path for frame in origin.stack.frames})
        if found == self.record["scan"]["sha256"]:
            return _Origin(origin, found, partial(read_scan, path, series=series))
        scan = self._explained(path)
        _require_same_voxels(path, origin, scan, read_scan(path, series=series))
        return _Origin(origin, found, lambda: scan)

    def _explained(self, source: Path) -> Scan:
        """The scan of a converted file, as it was explained."""
        said = self.record["scan"]
        path = Path(said["path"] or "")
        if not path.is_file() or path.resolve() == source.resolve() or sniff(path):
            raise DicomOutError(
                f"{source}: not the files that were explained (another SHA-256); name the series as it was, or explain "
                "it again"
            )
        form = said["form"] if said["form"] in ("sform", "qform") else None
        scan = read_scan(path, volume=said["volume"], form=form, nan=said.get("nan"))
        if scan.sha256 != said["sha256"]:
            raise DicomOutError(f"{path}: has changed since it was explained; explain it again")
        return scan

    def values(self, entry: Mapping[str, Any]) -> Scan:
        """A map from its file, which must be the one that was written."""
        path = self.folder / Path(entry["file"]).name
        found = read_scan(path)
        if found.sha256 != entry["sha256"]:
            raise DicomOutError(f"{path}: not the map that the record tells of; explain the case again")
        return found

    def map(self, entry: Mapping[str, Any], number: int, values: NDArray[np.float32]) -> Map:
        provenance = self.record["provenance"]
        return Map(
            entry,
            number,
            values,
            weights_sha256=str((provenance.get("model") or {}).get("weights_sha256") or ""),
            version=str(provenance.get("volsal") or "unknown"),
            made=_when(provenance.get("started"), self.folder / CASE_FILE),
        )


def _when(started: Any, record: Path) -> datetime:
    """When a map was made, in local time as DICOM has it: as recorded, else as old as its record is."""
    try:
        return datetime.fromisoformat(started).astimezone()
    except (TypeError, ValueError):
        return datetime.fromtimestamp(int(record.stat().st_mtime))


def _require_same_voxels(path: Path, source: Source, explained: Scan, series: Scan) -> None:
    """Of two scans with one geometry, the wrong patient's must not get the map."""
    ours = source.onto(explained.array, explained.grid).astype(np.float64)
    theirs = series.array.transpose(2, 1, 0).astype(np.float64)
    ours -= ours.mean()
    theirs -= theirs.mean()
    scale = float(np.sqrt((ours**2).sum() * (theirs**2).sum()))
    alike = float((ours * theirs).sum()) / scale if scale else 0.0
    if alike < _SAME_VOXELS:
        raise DicomOutError(
            f"{path}: its voxels are not those of {explained}, which was explained (correlation {alike:.4f}, expected "
            f"{_SAME_VOXELS} or more): another scan with the same geometry? Name the series it was converted from"
        )


def _notes(source: Source) -> list[str]:
    if source.tilt < _TILTED_FROM:
        return []
    return [
        f"gantry tilt of {source.tilt:.1f} degrees: every frame says its own place, as the source's slices do; who "
        "straightens those must straighten these"
    ]


def _stem(entry: Mapping[str, Any]) -> str:
    return Path(entry["file"]).name.removesuffix(".nii.gz")


def _forget(home: Path) -> None:
    """Remove an earlier export of the case, its record first; one that was cut short has none, and goes too."""
    (home / RECORD).unlink(missing_ok=True)
    for file in home.glob("*.dcm"):
        ours = file.name.startswith(f"{home.name}_") and file.stem.rpartition("_")[2] in KINDS
        if ours or file.name.startswith(".volsal-"):
            file.unlink(missing_ok=True)


# The three kinds


def _write_map(file: Path, origin: _Origin, shown: Map, values: Scan, settings: Settings) -> dict[str, Any]:
    made = parametric_map(origin.source, shown)
    return _write(file, made, origin.source, shown.values)


def _write_region(file: Path, origin: _Origin, shown: Map, values: Scan, settings: Settings) -> dict[str, Any] | None:
    region = Region.of(origin.source, shown, settings.threshold)
    if region is None:
        return None
    made = segmentation(origin.source, shown, region, settings.threshold)
    about = {"threshold": str(settings.threshold), "from": region.value, "unit": shown.entry["unit"], "ml": region.ml}
    return _write(file, made, origin.source, region.mask) | about


def _write_picture(file: Path, origin: _Origin, shown: Map, values: Scan, settings: Settings) -> dict[str, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from volsal.report.figures import three_planes

    entry = shown.entry
    figure = three_planes(
        origin.scan,
        values.array,
        window=entry["window"],
        unit=entry["unit"],
        at_mm=entry["peak_mm"],
        signed=entry["signed"],
        # No case: its id may be a name.
        title=f"{entry['name']}: {entry['target_text']}, {shown.layer}   (research use)",
    )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
    return _write(file, capture(origin.source, shown, picture), None, picture[None])


_WRITERS = {"map": _write_map, "region": _write_region, "picture": _write_picture}


def _write(file: Path, made: Any, source: Source | None, frames: NDArray) -> dict[str, Any]:
    """Write an object, read it back, and see that each frame is where it should be and holds what it should."""
    content = encoded(made)
    with replacing(file) as temporary:
        temporary.write_bytes(content)
        _verify(file, temporary, source, frames)
    return {"sha256": sha256(content).hexdigest(), "sop_instance_uid": str(made.SOPInstanceUID)}


def _verify(file: Path, written: Path, source: Source | None, frames: NDArray) -> None:
    """Compare a file with ``frames``: those of the source's slices, or, without one, all that there are."""
    import pydicom

    back = pydicom.dcmread(written)
    pixels = back.pixel_array.reshape(-1, *frames.shape[1:])
    if source is None:
        places = list(range(len(frames)))
    else:
        groups = back.PerFrameFunctionalGroupsSequence
        at = np.array([group.PlanePositionSequence[0].ImagePositionPatient for group in groups], dtype=np.float64)
        far = np.linalg.norm(at[:, None] - source.positions(), axis=2)
        shared = back.SharedFunctionalGroupsSequence[0]
        turned = np.abs(np.subtract(shared.PlaneOrientationSequence[0].ImageOrientationPatient, source.orientation()))
        if far.min(axis=1).max() > ON_SLICE_MM or turned.max() > 1e-6:
            raise DicomOutError(f"{file}: the frames read back do not lie on the source's slices; please report it")
        places = far.argmin(axis=1).tolist()
    empty = np.ones(len(frames), dtype=bool)
    empty[places] = False
    if not np.array_equal(pixels, frames[places]) or frames[empty].any():
        raise WriteError(f"{file}: the pixels read back are not the ones written; is the disk sound?")
