"""check-geometry, check-model: whether maps lie where they should and say what they should."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from volsal.cli.console import SOME_FAILED, app, cell, err, explained, out, say
from volsal.cli.inputs import a_scan, loaded, shape_of, trusted
from volsal.cli.options import ConfigArgument, MethodOption, SeriesOption, SlicesOption, TargetOption, TrustOption
from volsal.cli.progress import progress_bar, steps_of

if TYPE_CHECKING:
    from volsal.audit.contract import ContractReport
    from volsal.audit.geometry import GeometryReport


@app.command("check-geometry")
@explained
def check_geometry(
    config: ConfigArgument,
    scan: Annotated[
        list[Path] | None, typer.Argument(help="A scan (or its channels' files) to plant impulses in.")
    ] = None,
    method: MethodOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the figures here, as JSON.")] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="What preprocessing and the way home may be off by, in model voxels.")
    ] = 0.5,
    series: SeriesOption = None,
    slices: SlicesOption = None,
    trust_bundle: TrustOption = False,
) -> None:
    """Plant impulses at known places in a scan, and say how far they land from there, stage by stage.

    Through the config's own preprocessing, on the way back to the scan, and in the cells of each layer a map is taken
    at, placed by the half-pixel and the nominal rule; and where the scan's own maps are put. Exit status 1 where the
    first two are off by more than the tolerance.
    """
    from volsal.audit.geometry import check_geometry as check
    from volsal.config import load_config
    from volsal.explain import Explainer

    settings = loaded(load_config(config))
    explainer = Explainer.from_config(settings, method, trust_bundle=trusted(settings, trust_bundle))
    chosen = a_scan(settings, scan, series, slices)
    report = check(explainer, chosen)
    table = Table(box=None, pad_edge=False)
    for column in (
        "stage",
        "mean R, A, S (mm)",
        "mean D, H, W (voxels)",
        "distance (mm): mean",
        "largest",
        "cell (mm)",
    ):
        table.add_column(column, overflow="fold")
    for stage in report.stages:
        figures = stage.describe()
        table.add_row(
            cell(stage.name),
            ", ".join(f"{mm:+.2f}" for mm in figures["mean_mm"]),
            ", ".join(f"{voxels:+.2f}" for voxels in figures["mean_voxels"]),
            f"{figures['mean_distance_mm']:.2f}",
            f"{figures['largest_distance_mm']:.2f}",
            " x ".join(f"{mm:.3g}" for mm in figures["cell_mm"]),
        )
    say(
        f"{chosen}: {report.planted} impulses planted, {report.planted - report.unseen} seen whole by the model; "
        "how far from where they were planted they land:"
    )
    out.print(table)
    if report.placements:
        _placed(report)
    for note in report.notes:
        say(f"note: {note}", style="yellow")
    if output:
        report.write(output)
        say(f"written to {output}")
    sound = report.sound(tolerance)
    if sound is None:
        say(
            "volsal: cannot tell: the impulses seen do not differ in place along each axis, so that a mirrored image "
            "would look right; use a scan of which the model sees more",
            err,
        )
    elif not sound:
        say(
            f"volsal: an impulse comes back more than {tolerance:g} model voxels from where it was planted: the "
            "preprocessing moves the image and not its affine, not by as much, or blurs or clips it to one side; see "
            "the table",
            err,
        )
    if not sound:
        raise typer.Exit(SOME_FAILED)
    say(f"preprocessing and the way back to the scan are right within {tolerance:g} model voxels")


def _placed(report: GeometryReport) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("map of this scan", "alignment", "moved from half-pixel (voxels)", "uncertainty", "moved (mm)"):
        table.add_column(column, overflow="fold")
    for placement in report.placements:
        figures, used = placement.describe(), placement.alignment
        table.add_row(
            cell(placement.name),
            used.kind,
            ", ".join(f"{voxels:+.2f}" for voxels in placement.from_half_pixel),
            ", ".join(f"{voxels:.2f}" for voxels in used.uncertainty) if used.uncertainty else "-",
            ", ".join(f"{mm:+.2f}" for mm in figures["from_half_pixel_mm"]),
        )
    out.print(table)
    say(
        "impulses show where a layer answers to anything bright; maps are put where the evidence for their own class "
        "is seen, which trained kernels may place elsewhere"
    )


@app.command("check-model")
@explained
def check_model(
    config: ConfigArgument,
    scan: Annotated[
        list[Path] | None,
        typer.Argument(help="A scan (or its channels' files). Without one, the config's first, or --shape."),
    ] = None,
    method: MethodOption = None,
    target: TargetOption = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Instead of a scan: random numbers of the model input's size, as 1,96,96,96."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="File for all figures, as JSON.")] = None,
    series: SeriesOption = None,
    slices: SlicesOption = None,
    trust_bundle: TrustOption = False,
) -> None:
    """Does what volsal promises hold on your model? Every promise put to the test, in a table. 1 where one fails."""
    from volsal.audit.contract import check_model as check
    from volsal.audit.contract import random_volume
    from volsal.config import load_config
    from volsal.explain import Explainer

    settings = loaded(load_config(config))
    case = random_volume(shape_of(shape)) if shape else a_scan(settings, scan, series, slices)
    trust = trusted(settings, trust_bundle)
    with progress_bar() as progress:
        explainer = Explainer.from_config(settings, method, target, progress=steps_of(progress), trust_bundle=trust)
        report = check(explainer, case, steps_of(progress))
    seen = tuple(report.provenance["model_input"]["shape"])
    say(cell(f"{type(explainer.model).__name__} on {'random numbers' if shape else case}, input {seen}"))
    _checks(report)
    if output:
        report.write(output)
        say(f"written to {output}")
    failed = sum(check.verdict == "fails" for check in report.checks)
    if failed:
        say(f"volsal: {failed} of {len(report.checks)} checks fail; see the table", err)
        raise typer.Exit(SOME_FAILED)
    kept = sum(check.verdict == "ok" for check in report.checks)
    say(f"{kept} checks passed, {len(report.checks) - kept} do not apply, none failed")


def _checks(report: ContractReport) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("check", "of", "verdict", "figure", "at most", ""):
        table.add_column(column, overflow="fold")
    for one in report.checks:
        table.add_row(
            cell(one.name),
            cell(one.of),
            one.verdict,
            "-" if one.figure is None else f"{one.figure:.2g}",
            "-" if one.tolerance is None else f"{one.tolerance:.2g}",
            cell(one.said),
            style={"ok": None, "fails": "bold red", "does not apply": "dim"}[one.verdict],
        )
    out.print(table)
