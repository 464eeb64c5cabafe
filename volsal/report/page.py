"""A run as web pages that open from a disk, without a network, a server or Python: the first page and one per case.

Everything is made from the run folder, and from the scans where these still lie where the run found them, byte for
byte; what has gone or changed is not shown, and the page says so.
"""

from __future__ import annotations

import re
import shutil
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, cast

import nibabel as nib
import numpy as np
from isal import igzip
from markupsafe import Markup
from numpy.typing import NDArray

from volsal.display import colours, limits, scan_window, verdict
from volsal.errors import VolsalError
from volsal.grid import Grid
from volsal.report.markup import render, whole_page
from volsal.report.sections import SECTIONS, Case, Overview, Page, Scale, cases_of, map_name, scales_of
from volsal.report.volumes import MOST_VOXELS, Coded, Shown, coded, thumbnail
from volsal.run_folder import RunFolder
from volsal.scans.labels import read_labels
from volsal.scans.scan import ScanError, read_scan
from volsal.scans.write import replacing

# Browsers refuse texts of half a gigabyte and more, and are slow long before that.
_MOST_IN_ONE_FILE = 300_000_000
# Of a map's record: what its table row does not show.
_DETAILS = ("file", "settings", "coverage", "facts", "alignment", "cell_affine", "window")
_MARK = '<meta name="generator" content="volsal'


class ReportError(VolsalError, ValueError):
    """A report cannot be made as it was asked for."""


def write_report(
    run: Path,
    output: Path | None = None,
    *,
    single: bool = False,
    scans: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write the report of a run; return the page to open.

    Parameters
    ----------
    run : the run folder
    output : a folder for the pages; with ``single``, a file.  Without it, ``report`` or ``report.html`` in the run
    single : everything in one file, to be sent or archived; for some dozens of cases
    scans : where the scans lie now, if not where the run found them
    progress : called with the case, how many are done, and how many there are

    Raises
    ------
    RunFolderError
        Where ``run`` is no run folder.
    ReportError
        Where the run has no case yet, ``output`` holds something else than a report, or one file would be too large
        for a browser.
    WriteError
        Where the disk refuses.
    """
    folder = RunFolder.existing(run)
    cases = cases_of(folder)
    if not cases:
        raise ReportError(f"{run}: no case in it yet; let the run find its scans first")
    if output is None:
        output = folder / ("report.html" if single else "report")
    home: Home = OneFile(output) if single else Folder(output)
    home.prepare()
    pages = {}
    done = [case for case in cases if case.record is not None]
    places = [home.place(number, case.id) for number, case in enumerate(done, 1)]
    scales = scales_of(cases)
    for number, case in enumerate(done):
        before, after = (places[n] if 0 <= n < len(done) else None for n in (number - 1, number + 1))
        drawn = _drawn(folder, case, scans, scales)
        body = _case_page(case, drawn, places[number], before, after, home.first)
        pages[case.id] = home.add(places[number], body, drawn.pictures, case.id)
        if progress:
            progress(case.id, number + 1, len(done))
    overview = Overview(folder, folder.asked(), cases, pages)
    return home.finish(_first_page(overview), _title(overview))


def _title(overview: Overview) -> str:
    name = overview.run.path.resolve().name
    return f"Saliency report: {name}"


def _first_page(overview: Overview) -> Markup:
    parts = []
    for section in SECTIONS:
        data = section.data(overview)
        if data is not None:
            body = render(f"{section.id}.html", **data)
            parts.append({"id": section.id, "title": section.title, "body": body})
    return render("first.html", parts=parts, title=_title(overview))


# Where pages go


class Place(NamedTuple):
    """Of a case's page: its name, and its address as seen from the first page and from another case's."""

    name: str
    link: str
    from_case: str


class Folder:
    """A report of many files: ``index.html``, ``cases/`` and ``pictures/``."""

    first = "../index.html"

    def __init__(self, path: Path) -> None:
        self.path = path

    def prepare(self) -> None:
        """Make room: an earlier report goes, anything else stays and is an error."""
        index = self.path / "index.html"
        if self.path.exists() and not self.path.is_dir():
            raise ReportError(f"{self.path}: a file; a report is a folder, or one file with --single")
        if self.path.is_dir() and any(self.path.iterdir()) and not _ours(index):
            raise ReportError(f"{self.path}: holds something else than a report; name another place (--output)")
        title = "This report is being written, or its writing was cut short"
        _write(index, whole_page("page.html", title=title, body=title, kind="first-page").encode())
        for name in ("cases", "pictures"):
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name)

    def place(self, number: int, case: str) -> Place:
        """A name that every file system takes, whatever the case is called."""
        plain = re.sub(r"[^a-z0-9_-]+", "-", case.lower())[:60].strip("-")
        name = f"{number:04d}-{plain}" if plain else f"{number:04d}"
        return Place(name, f"cases/{name}.html", f"{name}.html")

    def add(self, place: Place, body: Markup, pictures: Pictures, title: str) -> Page:
        """Write a case's page and pictures."""
        text = whole_page("page.html", title=title, body=body, kind="case-page")
        _write(self.path / "cases" / f"{place.name}.html", text.encode())
        links: dict[str, dict[Scale, str]] = {}
        for number, (name, each) in enumerate(pictures.items(), 1):
            links[name] = {scale: f"pictures/{place.name}-{number}-{scale}.png" for scale in each}
            for scale, picture in each.items():
                _write(self.path / links[name][scale], picture)
        return Page(place.link, links)

    def finish(self, first: Markup, title: str) -> Path:
        """Write the first page, last of all: where it lists cases, the report is whole."""
        index = self.path / "index.html"
        _write(index, whole_page("page.html", title=title, body=first, kind="first-page").encode())
        return index


class OneFile:
    """A report in one file."""

    first = "#first"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bodies: list[Markup] = []
        self.size = 0

    def prepare(self) -> None:
        """See that the file may be written."""
        if self.path.is_dir() or (self.path.exists() and not _ours(self.path)):
            raise ReportError(f"{self.path}: holds something else than a report; name another file (--output)")

    def place(self, number: int, case: str) -> Place:
        """A target within the file."""
        name = f"case-{number:04d}"
        return Place(name, f"#{name}", f"#{name}")

    def add(self, place: Place, body: Markup, pictures: Pictures, title: str) -> Page:
        """Keep a case's part for later."""
        self.size += len(body)
        if self.size > _MOST_IN_ONE_FILE:
            raise ReportError(
                f"{self.path}: {len(self.bodies) + 1} cases already make {self.size / 1e6:.0f} MB, more than a browser "
                "opens in one file; leave --single out"
            )
        self.bodies.append(body)
        links = {
            name: {scale: f"data:image/png;base64,{b64encode(one).decode()}" for scale, one in each.items()}
            for name, each in pictures.items()
        }
        return Page(place.link, links)

    def finish(self, first: Markup, title: str) -> Path:
        """Write the file."""
        whole = Markup("").join([*self.bodies, first])
        _write(self.path, whole_page("page.html", title=title, body=whole, kind="one-file").encode())
        return self.path


Home = Folder | OneFile
Pictures = Mapping[str, Mapping[Scale, bytes]]
Scales = Mapping[str, tuple[float, float]]


def _ours(page: Path) -> bool:
    """Whether volsal wrote that page."""
    if not page.is_file():
        return False
    with page.open("rb") as file:
        return _MARK.encode() in file.read(4096)


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


# A case


def _drawn(run: RunFolder, case: Case, scans: Path | None, scales: Scales) -> Drawn:
    """The case's scan, maps and masks."""
    record = cast(Mapping[str, Any], case.record)
    drawn = Drawn(record, scales)
    drawn.add_scan(_find(record["scan"]["path"], scans), _series(run))
    for entry in record["maps"]:
        drawn.add_map(entry, run / case.id / Path(entry["file"]).name)
    for name, path in (case.about.get("masks") or {}).items():
        drawn.add_mask(name, Path(path))
    return drawn


def _case_page(case: Case, drawn: Drawn, place: Place, before: Place | None, after: Place | None, first: str) -> Markup:
    """The part of the page that tells of one case."""
    record = drawn.record
    return render(
        "case.html",
        case=case,
        record=record,
        entries=[(map_name(entry), entry) for entry in record["maps"]],
        details={map_name(entry): {key: entry.get(key) for key in _DETAILS} for entry in record["maps"]},
        notes=[*drawn.missing, *record["notes"]],
        viewer=drawn.viewer(),
        volumes=[Markup(volume.packed()) for volume in drawn.volumes],
        shown=drawn.shown,
        most=MOST_VOXELS,
        has_scan=drawn.scan is not None,
        masks=drawn.names("mask"),
        place=place,
        before=before,
        after=after,
        first=first,
    )


class Drawn:
    """What of a case is drawn: its scan, maps and masks, one after the other, since all at once may be too large.

    Attributes
    ----------
    shown : which of the scan's voxels
    scan : (I, J, K); None where it is not to be had
    abouts, volumes : of each layer of the viewer, its description and its voxels
    pictures : by name of map and scale of colours, three planes through its peak, as PNG
    missing : what is not drawn and why, in words
    """

    def __init__(self, record: Mapping[str, Any], scales: Scales) -> None:
        self.record = record
        self._scales = scales
        self.grid = Grid(record["scan"]["shape"], record["scan"]["affine"])
        self.shown = Shown(self.grid)
        self.scan: NDArray | None = None
        self.grey = (0.0, 1.0)
        self.abouts: list[dict[str, Any]] = []
        self.volumes: list[Coded] = []
        self.missing: list[str] = []
        self._start_mm: Any = None
        self.pictures: dict[str, dict[Scale, bytes]] = {}

    def add_scan(self, path: Path | None, series: str | None) -> None:
        """The scan as the run read it, from its file."""
        about = self.record["scan"]
        if path is None:
            self.missing.append("the scan is not shown: it no longer lies where the run found it")
            return
        form = about["form"] if about["form"] in ("sform", "qform") else None
        try:
            scan = read_scan(
                path, about["volume"], form=form, nan=about.get("nan"), series=series, slices=about.get("slices")
            )
            if scan.sha256 != about["sha256"]:
                self.missing.append("the scan is not shown: its file has changed since the run")
                return
            self.grid.require_same(scan.grid)
        except VolsalError as error:
            self.missing.append(f"the scan is not shown: {error}")
            return
        self.scan, self.grey = scan.array, scan_window(scan.array)
        self._add(self.scan, {"kind": "scan", "name": "scan", "window": list(self.grey)})

    def add_map(self, entry: Mapping[str, Any], path: Path) -> None:
        """A map by its record, from its file."""
        values = _map(path, entry["sha256"], self.grid)
        if values is None:
            self.missing.append(
                f"{map_name(entry)}: not shown, since its file is gone or is not the one that was written"
            )
            return
        about = {
            "kind": "map",
            "name": map_name(entry),
            "unit": entry["unit"],
            "signed": entry["signed"],
            "window": list(limits(entry["window"], entry["signed"])),
            "verdict": verdict(values),
            "peak": self.shown.nearest(entry["peak_mm"]) if entry["peak_mm"] else None,
        }
        self._add(values, about)
        if self._start_mm is None:
            self._start_mm = entry["peak_mm"]
        upright = self.shown.upright
        at = entry["peak_mm"] or upright.centre
        ends: dict[Scale, Sequence[float]] = {"same": self._scales[map_name(entry)], "own": entry["window"]}
        self.pictures[map_name(entry)] = {
            scale: thumbnail(upright, self.scan, self.grey, values, window, entry["signed"], at)
            for scale, window in ends.items()
        }

    def add_mask(self, name: str, path: Path) -> None:
        """A mask, from a label map's file: what is not 0."""
        try:
            mask = read_labels(path, self.grid) > 0
        except ScanError as error:
            self.missing.append(f"mask {name} is not shown: {error}")
            return
        self._add(mask, {"kind": "mask", "name": name})

    def _add(self, values: NDArray, about: dict[str, Any]) -> None:
        volume = coded(self.shown.array(values))
        self.abouts.append(about | {"levels": volume.table(), "exact": volume.exact})
        self.volumes.append(volume)

    def names(self, kind: str) -> list[str]:
        """Of the layers of one kind."""
        return [about["name"] for about in self.abouts if about["kind"] == kind]

    def viewer(self) -> dict[str, Any]:
        """What the viewer is told, but the voxels.  It opens at the peak of the first map that has one."""
        start = self.shown.upright.centre if self._start_mm is None else self._start_mm
        return self.shown.geometry() | {
            "tilt": self.shown.upright.note,
            "colours": {"plain": colours().tolist(), "signed": colours(signed=True).tolist()},
            "start": self.shown.nearest(start),
            "layers": self.abouts,
        }


def _series(run: RunFolder) -> str | None:
    """The DICOM series that the run asked for; the record's own may be a pseudonym."""
    return run.asked().get("config", {}).get("scans", {}).get("series")


def _find(recorded: str | None, scans: Path | None) -> Path | None:
    """The file that was read, below ``scans`` if that is given: the one there with most of the recorded path."""
    if recorded is None:
        return None
    if scans is None:
        return Path(recorded) if Path(recorded).exists() else None
    parts = Path(recorded).parts[1:]
    candidates = (scans.joinpath(*parts[start:]) for start in range(len(parts)))
    return next((path for path in candidates if path.exists()), None)


def _map(path: Path, digest: str, grid: Grid) -> NDArray | None:
    """A map's values (I, J, K); None where the file is not the one that the record tells of."""
    content = path.read_bytes() if path.is_file() else b""
    if sha256(content).hexdigest() != digest:
        return None
    plain = igzip.decompress(content)
    version = nib.Nifti1Image if plain[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c") else nib.Nifti2Image
    values = np.asarray(cast(Any, version).from_bytes(plain).dataobj, dtype=np.float32)
    return values if values.shape == grid.shape else None
