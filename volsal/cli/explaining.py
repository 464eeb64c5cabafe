"""explain, layers, series, align: one scan, and what to ask of it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from volsal.cli.console import app, cell, err, explained, out, say
from volsal.cli.inputs import a_scan, loaded, reading_of, shape_of, some_cases, trusted, volume_of
from volsal.cli.options import (
    AlignmentOption,
    ConfigArgument,
    ConfigOption,
    FormOption,
    MethodOption,
    NanOption,
    QuietOption,
    RegridOption,
    SeriesOption,
    SlicesOption,
    StrictOption,
    TargetOption,
    TrustOption,
    VolumeOption,
)
from volsal.cli.progress import costs_told, progress_bar, steps_of

if TYPE_CHECKING:
    from volsal.explanation import Explanation


@app.command()
@explained
def explain(
    scan: Annotated[
        list[Path],
        typer.Argument(
            help="The scan: .nii, .nii.gz, .hdr/.img, .nrrd, .nhdr, .mha, .mhd, or a DICOM folder. Several are the "
            "channels of ONE case, in the model's order; for many cases see `volsal run`."
        ),
    ],
    config: ConfigOption,
    method: MethodOption = None,
    target: TargetOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("volsal-out"),
    alignment: AlignmentOption = None,
    volume: VolumeOption = None,
    form: FormOption = None,
    strict: StrictOption = False,
    nan: NanOption = None,
    regrid: RegridOption = False,
    series: SeriesOption = None,
    slices: SlicesOption = None,
    case: Annotated[
        str | None, typer.Option(help="Name of the result; made from the file's name if not given.")
    ] = None,
    trust_bundle: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Explain one scan: overlay volumes on its own voxels, and a JSON record beside them.

    Interrupt a long one, and the same command takes it up again.
    """
    from volsal.config import load_config
    from volsal.explain import PARTIAL, Explainer
    from volsal.run_folder import RunFolder
    from volsal.scans import read_case
    from volsal.scans.find import case_id, in_order
    from volsal.scans.write import require_writable

    settings = loaded(load_config(config))
    given = {"volume": volume_of(volume), "form": form, "strict": strict or None, "nan": nan, "regrid": regrid or None}
    if len(scan) > 1 and settings.scans and settings.scans.channels:
        scan = in_order(scan, settings.scans.channels)
    reading = reading_of(settings, **given, series=series, slices=slices)
    read = read_case(scan, **reading)
    trust = trusted(settings, trust_bundle)
    with progress_bar(quiet) as progress, costs_told(progress):
        explainer = Explainer.from_config(
            settings,
            method,
            target,
            alignment,
            progress=steps_of(progress),
            keep=output / PARTIAL,
            trust_bundle=trust,
        )
        require_writable(output)
        explanation = explainer(read, case_id(Path(case)) if case else None, **reading)
    if explanation.scan.series and not (settings.scans and settings.scans.identifiers == "plain"):
        explanation = explanation.pseudonymous(RunFolder(output).salt())
    home = explanation.save(output, settings.maps.stored_as)
    explainer.forget(explanation.case)
    _report(explanation, home)


def _report(explanation: Explanation, home: Path) -> None:
    say(cell(f"{explanation.scan}: {explanation.prediction}"))
    for note in explanation.notes:
        say(f"note: {note}", style="yellow")
    table = Table(
        "method", "target", "layer", "cells", "evidence", "peak (R, A, S mm)", "display range", box=None, pad_edge=False
    )
    for heatmap in explanation.maps:
        peak = heatmap.peak_mm
        table.add_row(
            cell(heatmap.method_name),
            cell(heatmap.target),
            cell(heatmap.layer or "input"),
            heatmap.alignment.kind if heatmap.alignment else "-",
            {"ok": "found", "empty": "none (empty map)", "constant": "no place (constant map)"}[heatmap.status],
            ", ".join(f"{mm:.1f}" for mm in peak) if peak else "-",
            f"0 to {heatmap.window[1]:.3g} {heatmap.unit}",
        )
    out.print(table)
    say(f"written to {home}")
    first = explanation.maps[0]
    scan, shown = (shlex.quote(str(path)) for path in (explanation.scan, home / first.file_name(explanation.case)))
    say("look at it:")
    say(f"  volsal view {shlex.quote(str(home))}")
    if explanation.scan.header is not None:  # they open NIfTI; a DICOM folder is no argument for them
        say(f"  fsleyes {scan} {shown} -cm red-yellow -dr {first.window[1] / 5:.3g} {first.window[1]:.3g} -a 70")
        say(f"  itksnap -g {scan} -o {shown}")


@app.command()
@explained
def layers(
    config: ConfigOption,
    scan: Annotated[
        list[Path] | None, typer.Argument(help="A scan (or its channels' files) to run through the model.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Instead of a scan: the model input's size, as 1,96,96,96 (channels first).")
    ] = None,
    series: SeriesOption = None,
    slices: SlicesOption = None,
    trust_bundle: TrustOption = False,
) -> None:
    """List the layers that could carry a map, with shape, stride and memory, and the one taken by default."""
    from volsal.attribution import LayerError, default_layer, list_layers
    from volsal.config import load_config
    from volsal.explain import Explainer

    settings = loaded(load_config(config))
    explainer = Explainer.from_config(settings, trust_bundle=trusted(settings, trust_bundle))
    if shape is None:
        tensor = explainer.model_input(a_scan(settings, scan, series, slices))
    else:
        tensor = explainer.blank_input(shape_of(shape))
    tensor = explainer.at_once(tensor)
    try:
        chosen = default_layer(explainer.model, tensor)
    except LayerError as error:
        chosen = ""
        say(f"no default: {error}", err)
    table = Table(box=None, pad_edge=False)
    for column in ("", "layer", "kind", "cells", "channels", "stride", "MiB", ""):
        table.add_column(column, overflow="fold", no_wrap=column != "layer")
    for layer in list_layers(explainer.model, tensor):
        remark = "the output itself" if layer.is_output else "" if layer.on_every_path else "beside other paths"
        remark = f"runs {layer.calls} times" if layer.calls > 1 else remark
        remark = ", ".join(filter(None, [remark, f"read from {layer.layout}" if layer.layout else ""]))
        table.add_row(
            "*" if layer.name == chosen else "",
            cell(layer.name),
            cell(layer.kind),
            "x".join(map(str, layer.extent)),
            str(layer.shape[1]),
            "x".join(f"{step:.3g}" for step in layer.stride),
            f"{layer.bytes / 2**20:.2f}",
            remark,
            style="bold" if layer.name == chosen else None if layer.suitable else "dim",
        )
    say(f"input {tuple(tensor.shape)}; layers in the order in which they finish; * is taken where none is named")
    out.print(table)


@app.command()
@explained
def series(
    folder: Annotated[Path, typer.Argument(help="A DICOM folder, or one of a series' files.")],
) -> None:
    """List the DICOM series of a folder, with what `--series` calls them, and whether each can be read.

    Descriptions are shown as they stand in the files and may name a person; volsal writes them nowhere else.
    """
    from volsal.scans.dicom import list_series

    table = Table(box=None, pad_edge=False)
    for column in ("", "modality", "slices", "columns x rows", "spacing (mm)", "description", "UID", "can be read"):
        table.add_column(column, overflow="fold")
    for entry in list_series(folder):
        spacing = " x ".join(f"{mm:.3g}" for mm in entry.spacing) if entry.spacing else "-"
        table.add_row(
            str(entry.number),
            cell(entry.modality),
            str(entry.slices),
            f"{entry.columns} x {entry.rows}",
            spacing,
            cell(f"{entry.description} ({entry.part})" if entry.part else entry.description),
            cell(entry.uid),
            cell(f"no: {entry.problem}" if entry.problem else "yes"),
        )
    out.print(table)


@app.command()
@explained
def align(
    config: ConfigArgument,
    scans: Annotated[list[Path] | None, typer.Argument(help="Scans to measure on; else some of the config's.")] = None,
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="How many of the config's scans.")] = 12,
    method: MethodOption = None,
    target: TargetOption = None,
    trust_bundle: TrustOption = False,
) -> None:
    """Measure where the cells of a layer look, on a handful of scans, and keep it beside the config.

    No masks are needed. Later commands with this config use what was measured, as long as weights, method, layer,
    target and input size stay the same.
    """
    from volsal.alignments import Alignments, beside
    from volsal.attribution import AlignmentError
    from volsal.config import load_config
    from volsal.explain import Explainer

    settings = loaded(load_config(config))
    # What an earlier file says is of no use here, and a damaged one no hindrance.
    trust = trusted(settings, trust_bundle)
    explainer = Explainer.from_config(settings, method, target, alignment="half-pixel", trust_bundle=trust)
    chosen = some_cases(settings, scans, number)
    measured = explainer.measure(chosen, lambda error: say(f"skipped: {error}", err), **reading_of(settings))
    try:
        kept = Alignments.read(beside(config))
    except AlignmentError:
        kept = Alignments()
    kept.update(measured)
    kept.write(beside(config))
    table = Table(box=None, pad_edge=False)
    for column in ("method", "layer", "target", "input", "stride", "offset (voxels)", "maps with evidence"):
        table.add_column(column, overflow="fold")
    for key, found in measured.items():
        error = found.uncertainty or (float("nan"),) * len(found.offset)
        table.add_row(
            key.method,
            cell(key.layer),
            cell(key.target),
            " x ".join(map(str, key.size)),
            " ".join(f"{step:.3g}" for step in found.stride),
            "  ".join(f"{x:.2f} \u00b1 {se:.2f}" for x, se in zip(found.offset, error, strict=True)),
            str(found.scans),
        )
    say(f"{len(chosen)} scans; where the layer's first cell looks on the model's input, \u00b1 standard error:")
    out.print(table)
    use = (
        "used from now on"
        if settings.alignment in ("auto", "measured")
        else (f"not used while the config says alignment: {settings.alignment}")
    )
    say(f"written to {beside(config)}; {use}")
