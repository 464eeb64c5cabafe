"""report, dicom, movie, view, demo: results for the eye."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from volsal.cli.console import REPEATS, SOME_FAILED, app, cell, err, explained, say
from volsal.cli.options import QuietOption, SeriesOption
from volsal.cli.progress import progress_bar, steps_of, watched


@app.command()
@explained
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the report goes; RUN/report if not given.")
    ] = None,
    single: Annotated[bool, typer.Option("--single", help="One file instead of a folder: for few cases.")] = False,
    scans: Annotated[
        Path | None, typer.Option(help="Where the scans lie now, if not where the run found them.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Write a report of a run that opens in any browser, without a network and without volsal."""
    from volsal.report.page import write_report

    with progress_bar(quiet) as progress:
        show = steps_of(progress)
        page = write_report(
            folder, output, single=single, scans=scans, progress=lambda _, done, of: show("cases", done, of)
        )
    say(f"{page}  (open it in a browser)")


@app.command()
@explained
def dicom(
    path: Annotated[Path, typer.Argument(help="A run folder, or one of its case folders.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the files go; PATH/dicom if not given.")
    ] = None,
    what: Annotated[
        str, typer.Option(help="Of map (Parametric Map), region (Segmentation), picture (Secondary Capture).")
    ] = "map,region,picture",
    threshold: Annotated[
        str,
        typer.Option(help="Where the region ends: 50% of the largest value, 12ml (the highest), or 0.3 (a value)."),
    ] = "50%",
    identifiers: Annotated[
        Literal["none", "source"],
        typer.Option(
            help="source: patient, study and UIDs as in the series, so that a PACS files the objects beside it; none: "
            "other UIDs, and nothing of the patient."
        ),
    ] = "none",
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="Only maps of this name; repeat for several.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            help="The series' DICOM folder: where it lies now, or what a NIfTI scan was converted from. For a run, the "
            "folder that holds one by each case's id."
        ),
    ] = None,
    series: SeriesOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write maps as DICOM on the slices of the series they were made from: for a PACS, or any DICOM viewer."""
    from volsal.dicom_out import Settings, Threshold, case_folders, export_case, require_highdicom
    from volsal.errors import VolsalError
    from volsal.scans.write import WriteError

    require_highdicom()
    settings = Settings(what.split(","), Threshold.parse(threshold), identifiers, method or ())
    folders, home = case_folders(path), output or path / "dicom"
    alone = folders == [path]
    files, bad = 0, 0
    with progress_bar(quiet) as progress:
        for folder in progress.track(folders, description="cases"):
            own = source if alone or source is None else source / folder.name
            try:
                exported = export_case(folder, home, settings, source=own, series=series)
            except VolsalError as error:
                if alone or isinstance(error, WriteError):
                    raise
                bad += 1
                if bad <= REPEATS:
                    say(cell(error), err)
                continue
            files += len(exported.files)
            for note in exported.notes:
                say(f"note: {folder.name}: {note}", style="yellow")
    say(f"{files} files of {len(folders) - bad} cases written to {home}")
    if files and identifiers == "none":
        say(
            "without the source's patient, study and UIDs, but under the case's name; for a PACS to file them beside "
            "it: --identifiers source"
        )
    if bad:
        say(f"volsal: {bad} of {len(folders)} cases have no DICOM; name one's folder to be told why", err)
        raise typer.Exit(SOME_FAILED)


@app.command()
@explained
def view(
    path: Annotated[Path, typer.Argument(help="A run folder, a case folder in it, or a scan.")],
    maps: Annotated[list[Path] | None, typer.Argument(help="Map files to lay over the scan.")] = None,
    convention: Annotated[
        str, typer.Option(help="radiological (patient's right on the left) or neurological.")
    ] = "radiological",
) -> None:
    """Look at a run, a case or a scan in napari: the scan with maps laid over it, in three linked planes."""
    from volsal.plugin.window import open_window

    open_window(path, maps or [], convention=convention)


@app.command()
@explained
def movie(
    path: Annotated[Path, typer.Argument(help="A case folder that volsal wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file, .gif or .mp4; CASE/movie.gif if not given.")
    ] = None,
    name: Annotated[
        str, typer.Option("--map", help="A part of the map's name, as grad-cam; the first map if not given.")
    ] = "",
    plane: Annotated[Literal["axial", "coronal", "sagittal"], typer.Option(help="Whose slices.")] = "axial",
    convention: Annotated[
        str, typer.Option(help="radiological (patient's right on the left) or neurological.")
    ] = "radiological",
) -> None:
    """Fly through a case's scan with a map over it, slice by slice: a moving picture for talks and pages."""
    from volsal.report.animation import fly_through
    from volsal.viewer.opening import ViewerError, open_folder

    opened = open_folder(path)
    if not opened.has_scan:
        raise opened.faults[0]
    shown = next((one for one in opened.maps if name in one.name), None)
    if shown is None:
        raise ViewerError(f"{path}: no map {name!r}; there are {', '.join(one.name for one in opened.maps) or 'none'}")
    file = output or path / "movie.gif"
    fly_through(
        file,
        opened.scan.array,
        shown.values,
        opened.scan.grid,
        shown.window,
        shown.unit,
        plane=plane,
        title=shown.name,
        signed=shown.signed,
        convention=convention,
    )
    say(f"written to {file}")


@app.command()
@explained
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for scans, overlays and picture.")] = Path(
        "volsal-demo"
    ),
    train: Annotated[bool, typer.Option("--train", help="Train the demo's network anew first (minutes).")] = False,
) -> None:
    """See volsal work: lesions planted in a real head MRI at known places, found again by each method."""
    from volsal.demo.run import run_demo

    run_demo(output, train, say, watched)
