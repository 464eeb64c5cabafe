"""The command line: words to calls, results to exit codes.  No computation lives here.

Exit status: 0 all done; 1 some scans failed, each named on stderr; 2 the command itself made no sense.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shlex
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from volsal.audit.contract import ContractReport
    from volsal.audit.geometry import GeometryReport
    from volsal.batch import Outcome, Run, Tally
    from volsal.config import Config
    from volsal.explanation import Explanation

# A mistake in the config fails every scan alike: it is told this often, and then counted.
_REPEATS = 3
# Notes on results that a run's summary tells; with numbers in them, no two cases' may be alike.
_NOTES = 10
SOME_FAILED, NO_SENSE, INTERRUPTED = 1, 2, 130
# Where no one watches a bar, a run says this often how far it is.
_SAY_EVERY_S = 60.0

app = typer.Typer(
    name="volsal",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=(
        "See where in a scan a 3D model found its evidence.\n\n"
        "volsal takes a trained 3D network and scans (NIfTI, DICOM, NRRD, MetaImage), asks the network what made it "
        "say what it says, and writes the answer as overlay volumes on each scan's own voxels: open them over the scan "
        "in napari, 3D Slicer, ITK-SNAP or FSLeyes.\n\n"
        "New here? Run [bold]volsal demo[/bold]: it needs no data of yours."
    ),
)
# Where no one watches, a line may be as long as it needs to be: names and numbers are not cut.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, highlight=False, soft_wrap=True)

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="YAML file that names the model and its preprocessing; see configs/.")
]
ConfigArgument = Annotated[
    Path, typer.Argument(help="YAML file that names the model and its preprocessing; see configs/.")
]
MethodOption = Annotated[
    list[str] | None,
    typer.Option("--method", "-m", help="A method, e.g. grad-cam; repeat for several. Replaces the config's."),
]
TargetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "-t",
        help="What to explain: predicted-class, class-1, margin-1-0, regression, output-2, or a class name from the "
        "config; of a segmentation segment-1, segment-1-largest, segment-1-mm-12,-30,7, segment-1-in:MASK.nii.gz; of a "
        "part of the output logits/class-1. Repeat for several. Replaces the config's.",
    ),
]
VolumeOption = Annotated[
    str | None,
    typer.Option(help="Which volume of a 4D file, counted from 0; all: its volumes are the model's channels."),
]
StrictOption = Annotated[
    bool, typer.Option("--strict-geometry", help="Refuse a file whose two geometries lie more than 0.1 mm apart.")
]
NanOption = Annotated[
    float | None, typer.Option("--nan", help="What NaN voxels become, e.g. -1024; files that hold some are refused.")
]
SeriesOption = Annotated[
    str | None,
    typer.Option(
        help="Which series of a DICOM folder: its number or UID in `volsal series`, or a part of its description."
    ),
]
SlicesOption = Annotated[
    Literal["resample"] | None,
    typer.Option(help="resample: accept DICOM slices at uneven distances, and interpolate between them."),
]
RegridOption = Annotated[
    bool, typer.Option("--regrid", help="Bring channels to the first one's voxels where they lie elsewhere.")
]
AlignmentOption = Annotated[
    Literal["auto", "half-pixel", "nominal", "measured", "flip-average"] | None,
    typer.Option(
        help="Where a layer's cells lie on the model's input: by custom, by the architecture, or as measured. "
        "auto is measured, or half-pixel with a note where that fails. Replaces the config's."
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-bundle",
        help="Let the config's MONAI bundle run its own code. Without it, a bundle that would is refused with what "
        "that is; with it, that is printed and recorded.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
FormOption = Annotated[
    Literal["sform", "qform"] | None,
    typer.Option(help="sform or qform: which of a file's two geometries, where they disagree."),
]


def printable(text: object) -> str:
    """Text that cannot write anything but itself to a terminal: names of files may hold control characters."""
    safe = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in safe)


def cell(text: object) -> Text:
    """A table cell that shows ``text`` and reads no markup in it."""
    return Text(printable(text).replace("\n", "\\n"))


def say(text: object, console: Console = out, style: str | None = None) -> None:
    """Print without reading markup into what came from files."""
    console.print(printable(text), markup=False, style=style)


def _explained(command: Callable[..., None]) -> Callable[..., None]:
    """Errors in one line, the traceback behind --debug, and the right exit status."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            say("interrupted; what is done is kept", err)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:  # noqa: BLE001 - the outermost border: a person is on the other side
            _fail(error)

    return wrapped


def _fail(error: Exception) -> NoReturn:
    from volsal.config import ConfigError
    from volsal.errors import VolsalError
    from volsal.preprocess import PreprocessError
    from volsal.scans import MissingScanError, ScanError

    if _debug():
        say(traceback.format_exc(), err)
    if isinstance(error, VolsalError):
        # Only a config can be wrong in several lines; a line break elsewhere comes from a file's name.
        say(f"volsal: {error if isinstance(error, ConfigError) else cell(error)}", err)
        of_scan = isinstance(error, (ScanError, PreprocessError)) and not isinstance(error, MissingScanError)
        raise typer.Exit(SOME_FAILED if of_scan else NO_SENSE)
    say(f"volsal: unexpected {type(error).__name__}: {error} (run again with --debug and report what it prints)", err)
    raise typer.Exit(SOME_FAILED)


def _debug() -> bool:
    return bool(os.environ.get("VOLSAL_DEBUG"))


def _version(wanted: bool) -> None:
    if wanted:
        from volsal import __version__

        say(f"volsal {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from (allowed anywhere).")] = False,
) -> None:
    pass


@app.command()
@_explained
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

    settings = _load(load_config(config))
    given = {"volume": _volume(volume), "form": form, "strict": strict or None, "nan": nan, "regrid": regrid or None}
    if len(scan) > 1 and settings.scans and settings.scans.channels:
        scan = in_order(scan, settings.scans.channels)
    reading = _reading(settings, **given, series=series, slices=slices)
    read = read_case(scan, **reading)
    trust = _trusted(settings, trust_bundle)
    with _progress(quiet) as progress, _costs(progress):
        explainer = Explainer.from_config(
            settings,
            method,
            target,
            alignment,
            progress=_steps(progress),
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


def _volume(text: str | None) -> int | Literal["all"] | None:
    if text is None or text == "all":
        return text  # type: ignore[return-value]
    if not text.isdecimal():
        raise typer.BadParameter(f"--volume {text!r}: expected a number from 0, or all")
    return int(text)


def _reading(config: Config, **given: Any) -> dict[str, Any]:
    """How scans are read: as the config says, but for what was given on the command line."""
    configured = config.scans.reading() if config.scans else {}
    return {**configured, **{name: value for name, value in given.items() if value is not None}}


def _load(config: Config) -> Config:
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    return config


def _trusted(config: Config, trust: bool) -> bool:
    """The user's consent, told before anything runs what it is that runs."""
    from volsal.explain import trusted_to_run

    if not trust:
        return False
    if config.model.bundle is None:
        raise typer.BadParameter(f"--trust-bundle: {config.path} names no bundle")
    lines = trusted_to_run(config)
    say(f"{config.model.bundle} is trusted; of its own it runs:" if lines else "nothing in the bundle needs trust", err)
    for line in lines:
        say(cell(f"  {line}"), err, style="yellow")
    return True


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
@_explained
def run(
    config: Annotated[Path, typer.Argument(help="YAML file with model, preprocess, scans and output; see configs/.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder. Replaces the config's.")] = None,
    method: MethodOption = None,
    target: TargetOption = None,
    alignment: AlignmentOption = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine; more than one need volsal[cluster].")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="A running Dask cluster's address, e.g. tcp://node1:8786; see configs/slurm.yaml."),
    ] = None,
    dashboard: Annotated[bool, typer.Option("--dashboard", help="Serve Dask's dashboard, with --workers.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try cases again that were refused or failed and are as they were.")
    ] = False,
    time_limit: Annotated[
        float | None, typer.Option(min=0.001, help="Minutes that a case may take to read, to compute, or to write.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what would be done: cases, what is missing, space, and time.")
    ] = False,
    trust_bundle: TrustOption = False,
    quiet: QuietOption = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary, or the plan, as JSON and nothing else.")
    ] = False,
) -> None:
    """Explain every scan of a folder, table or dataset. Run it again to do what is missing.

    A bad scan does not stop the others: it is refused or fails with its reason. A case is done again when its scan, the
    model or a setting has changed, and its earlier maps are then replaced.
    """
    from volsal.batch import Run, Tally
    from volsal.config import load_config
    from volsal.scans.write import WriteError

    settings = _load(load_config(config))
    work = Run(
        settings,
        output,
        method,
        target,
        alignment,
        workers=workers,
        scheduler=scheduler,
        dashboard=dashboard,
        time_limit=time_limit,
        retry_failed=retry_failed,
        trust_bundle=_trusted(settings, trust_bundle),
    )
    silent = quiet or as_json
    if plan:
        _plan(work, as_json)
        return
    if not silent:
        say(f"{len(work.cases)} cases {work.found.source}; results go to {work.folder.path}")
        for note in work.found.notes:
            say(f"note: {note}", style="yellow")
    tally = Tally()
    try:
        for outcome in _watched(work, silent):
            tally.add(outcome)
    except WriteError:
        if tally.ended:
            say(f"stopped: {tally.ended} of {len(work.cases)} cases are through and safe; mend this and go on:", err)
        raise
    table = work.collect()
    if as_json:
        print(json.dumps({**tally.describe(), "cases": len(work.cases), "table": str(table)}, indent=1))
    else:
        _summary(work, tally, table)
    if work.stopped_by:
        raise typer.Exit(128 + signal.Signals[work.stopped_by])
    if tally.bad:
        raise typer.Exit(SOME_FAILED)


def _plan(work: Run, as_json: bool) -> None:
    plan = work.plan()
    if as_json:
        print(json.dumps(plan.describe(), indent=1))
        return
    for line in plan.lines():
        say(line)


def _watched(work: Run, quiet: bool = False) -> Iterator[Outcome]:
    """The run's outcomes as they come, with a progress bar on a terminal and a line for each scan without result."""
    reasons: Counter[str] = Counter()
    with _run_progress(quiet) as progress:
        shown = _Pace(progress, len(work.cases), quiet)
        for outcome in work.watch(_steps(progress), _tell):
            shown.tick(outcome)
            if outcome is None:
                continue
            if outcome.error:
                reason = outcome.error.replace(str(outcome.scan), "the scan")
                reasons[reason] += 1
                if reasons[reason] <= _REPEATS:
                    before = " (as before; --retry-failed tries again)" if outcome.again else ""
                    say(f"{outcome.status} [{outcome.code}]: {outcome.case}: {outcome.error}{before}", progress.console)
                if _debug() and outcome.trace:
                    say(outcome.trace, progress.console)
            yield outcome
    for reason, times in reasons.items():
        if times > _REPEATS:
            say(f"and {times - _REPEATS} more for the same reason: {reason}", err)


def _tell(text: str) -> None:
    say(text, err)
    if err.is_terminal:  # where that a run is abandoned was its last word, a bar would leave the cursor hidden
        err.show_cursor()


class _Pace:
    """How a run goes: a bar on a terminal, and elsewhere a line a minute."""

    def __init__(self, progress: Progress, cases: int, quiet: bool) -> None:
        from volsal.batch.machine import Busy

        self._progress, self._cases, self._quiet = progress, cases, quiet
        self._bar = progress.add_task("explaining", total=cases, told="")
        self._busy = Busy()
        self._began = self._said = time.monotonic()
        self._ended = self._worked = self._bad = 0

    def tick(self, outcome: Outcome | None) -> None:
        if outcome is not None:
            self._ended += 1
            self._worked += outcome.status != "kept" and not outcome.again
            self._bad += outcome.bad
        now = time.monotonic()
        rate = 60 * self._worked / max(now - self._began, 1e-3)
        told = f"{self._bad} without result, {rate:.0f}/min, {self._busy}"
        self._progress.update(self._bar, completed=self._ended, told=told)
        if self._progress.disable and not self._quiet and now - self._said >= _SAY_EVERY_S:
            self._said = now
            left = f", {duration(60 * (self._cases - self._ended) / rate)} left" if rate else ""
            say(f"{self._ended} of {self._cases} cases, {told}{left}", err)


def duration(seconds: float) -> str:
    """Seconds in words that a person plans by."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _steps(progress: Progress) -> Callable[[str, int, int], None]:
    """Shows what a long method is doing as a bar of ``progress``, until it is done."""
    bars: dict[str, TaskID] = {}

    def show(what: str, done: int, of: int) -> None:
        if what not in bars:  # with what was done before, which says nothing of the speed
            bars[what] = progress.add_task(what, total=of, completed=done)
        progress.update(bars[what], completed=done, total=of)
        if done >= of:
            progress.remove_task(bars.pop(what))

    return show


@contextmanager
def _costs(progress: Progress) -> Iterator[None]:
    """On a terminal, what is told on the way, such as how long a method will take, as lines above the bars."""

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage(), progress.console, style="dim")

    logger = logging.getLogger("volsal")
    handler, level = Told(), logger.level
    try:
        if not progress.disable:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _progress(quiet: bool = False) -> Progress:
    return Progress(*_columns(), console=err, transient=True, disable=quiet or not err.is_terminal)


def _run_progress(quiet: bool) -> Progress:
    told = TextColumn("{task.fields[told]}")
    shown = *_columns(None), _Told(told)  # the bar takes what the rest leaves of the line
    return Progress(*shown, console=err, transient=True, expand=True, disable=quiet or not err.is_terminal)


def _columns(width: int | None = 40) -> list[ProgressColumn]:
    left = TextColumn("left:"), TimeRemainingColumn()
    return [TextColumn("{task.description}"), BarColumn(width), MofNCompleteColumn(), TimeElapsedColumn(), *left]


class _Told(ProgressColumn):
    """What is told beside a bar, for those that have something to tell."""

    def __init__(self, shown: TextColumn) -> None:
        super().__init__()
        self._shown = shown

    def render(self, task: Task) -> Text:
        return self._shown.render(task) if task.fields.get("told") else Text("")


def _summary(work: Run, tally: Tally, csv: Path) -> None:
    table = Table("method", "target", "maps", "with evidence", "empty", "constant", box=None, pad_edge=False)
    for pair in sorted({(name, target) for name, target, _ in tally.maps}):
        counts = [tally.maps[(*pair, state)] for state in ("ok", "empty", "constant")]
        table.add_row(*map(cell, pair), *map(str, (sum(counts), *counts)))
    if tally.maps:
        out.print(table)
    for note, times in tally.notes.most_common(_NOTES):
        say(f"note, {times} x: {note}", style="yellow")
    if len(tally.notes) > _NOTES:
        say(f"and {len(tally.notes) - _NOTES} other notes, each in its case's case.json", style="yellow")
    count = tally.states
    each = f" ({tally.seconds / count['done']:.1f} s each)" if count["done"] else ""
    kept = f", {count['kept']} kept from before" if count["kept"] else ""
    left = f", {work.left(tally)} not begun" if work.left(tally) else ""
    without = f"{count['refused']} refused, {count['failed']} failed"
    say(f"{count['done']} done{each}{kept}, {without}{left}, of {len(work.cases)} cases; table: {csv}")
    if work.left(tally):
        say("stopped before the end; the same command takes the run up where it was")


@app.command()
@_explained
def status(
    folder: Annotated[Path, typer.Argument(help="A run folder, of a run that goes on or has ended.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """How far a run is: done, refused, failed, missing, per minute, and time left."""
    from volsal.batch.status import status_of
    from volsal.run_folder import RunFolder

    found = status_of(RunFolder.existing(folder))
    if as_json:
        print(json.dumps(found.describe(), indent=1))
        return
    states = ", ".join(f"{number} {state}" for state, number in found.states.items())
    say(f"{found.cases} cases: {states}")
    if found.holder:
        rate = f", {found.per_minute:.1f} cases/min" if found.per_minute else ""
        left = f", {duration(found.left_s)} left" if found.left_s else ""
        say(f"at work: {found.holder}; it has been through {found.through} of {found.cases} cases{rate}{left}")
    else:
        how = {
            None: "the last run was killed, or the machine went down",
            "end": "the last run came to its end",
            "fault": "the last run broke off",
        }
        say(f"nobody is at work; {how.get(found.ended, f'the last run was stopped ({found.ended})')}")
    for case, code, reason in found.faults:
        say(f"  [{code}] {case}: {reason}")
    more = sum(found.codes.values()) - len(found.faults)
    if more > 0:
        kinds = ", ".join(f"{code} {number}" for code, number in sorted(found.codes.items()))
        say(f"  and {more} more without result; by kind: {kinds}")


@app.command()
@_explained
def collect(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    parquet: Annotated[bool, typer.Option("--parquet", help="Write cases.parquet too; needs pyarrow.")] = False,
) -> None:
    """Make the table of a run anew from its case folders."""
    from volsal.run_folder import RunFolder

    found = RunFolder.existing(folder)
    say(found.collect())
    if parquet:
        say(found.collect_parquet())


@app.command()
@_explained
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

    with _progress(quiet) as progress:
        show = _steps(progress)
        page = write_report(
            folder, output, single=single, scans=scans, progress=lambda _, done, of: show("cases", done, of)
        )
    say(f"{page}  (open it in a browser)")


@app.command()
@_explained
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
    with _progress(quiet) as progress:
        for folder in progress.track(folders, description="cases"):
            own = source if alone or source is None else source / folder.name
            try:
                exported = export_case(folder, home, settings, source=own, series=series)
            except VolsalError as error:
                if alone or isinstance(error, WriteError):
                    raise
                bad += 1
                if bad <= _REPEATS:
                    say(cell(error), err)
                continue
            files += len(exported.files)
            for note in exported.notes:
                say(f"note: {folder.name}: {note}", style="yellow")
    say(f"{files} files of {len(folders) - bad} cases written to {home}")
    if files and identifiers == "none":
        say("without the source's patient, study and UIDs; for a PACS to file them beside it: --identifiers source")
    if bad:
        say(f"volsal: {bad} of {len(folders)} cases have no DICOM; name one's folder to be told why", err)
        raise typer.Exit(SOME_FAILED)


@app.command()
@_explained
def audit(
    config: Annotated[Path, typer.Argument(help="YAML file with model, preprocess, scans and output; see configs/.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder. Replaces the config's.")] = None,
    method: MethodOption = None,
    target: TargetOption = None,
    scans: Annotated[int | None, typer.Option(min=1, help="At most so many scans. Replaces audit.scans.")] = None,
    trust_bundle: TrustOption = False,
    quiet: QuietOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print audit.json and nothing else.")] = False,
) -> None:
    """Can these maps be believed, and does the model answer by what it should?

    Small balls are taken out of each scan where the maps point, and elsewhere; masks are not needed, and used where the
    cases have some. Writes audit.json and audit.csv into the run folder. An interrupted audit is taken up.
    """
    from volsal.audit.run import audit as audited
    from volsal.batch.cases import cases_of
    from volsal.config import ConfigError, load_config
    from volsal.explain import Explainer
    from volsal.scans.write import require_writable

    settings = _load(load_config(config))
    found = cases_of(settings)
    if output is None and settings.output is None:
        raise ConfigError(f"{config}: output: missing; say where the audit goes, here or with --output")
    folder = output or settings.folder / str(settings.output)
    require_writable(folder)
    section = settings.audit if scans is None else settings.audit.model_copy(update={"scans": scans})
    trust = _trusted(settings, trust_bundle)
    with _progress(quiet or as_json) as progress:
        explainer = Explainer.from_config(settings, method, target, trust_bundle=trust)
        result = audited(explainer, found.cases.values(), section, folder, _steps(progress), **_reading(settings))
    if as_json:
        print(json.dumps(result.describe(), indent=1))
        return
    for asked in (result, *result.further):
        if result.further:
            say(f"of the target {asked.about['target']}:", style="bold")
        for verdict in asked.verdicts:
            say(f"{verdict.name}: {verdict.verdict}", style="bold")
            say(f"  {verdict.words}")
        for one in asked.suspicious[:_REPEATS]:
            say(f"look at {one.case}: {one.reason}")
        if len(asked.suspicious) > _REPEATS:
            say(f"and at {len(asked.suspicious) - _REPEATS} more, see audit.json")
    for case, reason in result.about["skipped"].items():
        say(f"left out: {case}: {reason}", err)
    say(f"{len(result.records)} scans; rules, thresholds and figures: {folder / 'audit.json'}")


@app.command()
@_explained
def choose(
    config: ConfigArgument,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Begin no further scan after so many minutes.")
    ] = None,
    scans: Annotated[int, typer.Option(min=1, help="At most so many scans, evenly spread.")] = 24,
    target: TargetOption = None,
    trust_bundle: TrustOption = False,
    quiet: QuietOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON and nothing else.")] = False,
) -> None:
    """Which map to believe for your model, measured on your scans, without masks.

    Methods and layers are tried, beside the config's own: a small ball is taken out of each scan where a map peaks, and
    the model is asked again. It may be that none can be trusted.
    """
    from volsal.audit.choose import choose as chosen
    from volsal.batch.cases import cases_of
    from volsal.config import load_config
    from volsal.explain import Explainer

    settings = _load(load_config(config))
    cases = list(cases_of(settings).cases.values())
    trust = _trusted(settings, trust_bundle)
    with _progress(quiet or as_json) as progress:
        found = chosen(
            Explainer.from_config(settings, targets=target, trust_bundle=trust),
            cases,
            settings=settings.audit,
            scans=scans,
            minutes=minutes,
            progress=_steps(progress),
            **_reading(settings),
        )
    if as_json:
        print(json.dumps(found.describe(), indent=1))
        return
    for line in found.words:
        say(line)
    table = Table(box=None, pad_edge=False)
    for column in ("candidate", "moves the score, of the best", "trusted for"):
        table.add_column(column, overflow="fold")
    for one in found.candidates:
        score = f"{one.score:.2f}" if isinstance(one.score, float) else "-"
        table.add_row(cell(one.method), score, cell(", ".join(one.answers) or "-"))
    out.print(table)
    for case, reason in found.skipped.items():
        say(f"left out: {case}: {reason}", err)
    say(f"{found.scans} scans, {duration(found.seconds)}")


@app.command()
@_explained
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

    settings = _load(load_config(config))
    explainer = Explainer.from_config(settings, trust_bundle=_trusted(settings, trust_bundle))
    if shape is None:
        tensor = explainer.model_input(_a_scan(settings, scan, series, slices))
    else:
        tensor = explainer.blank_input(_shape(shape))
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


def _a_scan(config: Config, scans: list[Path] | None, series: str | None, slices: str | None) -> Any:
    from volsal.batch.cases import cases_of
    from volsal.config import ConfigError
    from volsal.scans import read_case

    if not scans and config.scans is not None:
        cases = cases_of(config).cases
        scans = next((list(case.paths) for case in cases.values() if not case.fault), None)
    if not scans:
        raise ConfigError(f"{config.path}: name a scan, so that the model can be run once (or give --shape)")
    return read_case(scans, **_reading(config, series=series, slices=slices))


def _shape(text: str) -> tuple[int, ...]:
    parts = text.replace("x", ",").split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r}: expected channels and three sizes, as in 1,96,96,96")
    return tuple(int(part) for part in parts)


@app.command()
@_explained
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
@_explained
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

    settings = _load(load_config(config))
    # What an earlier file says is of no use here, and a damaged one no hindrance.
    trust = _trusted(settings, trust_bundle)
    explainer = Explainer.from_config(settings, method, target, alignment="half-pixel", trust_bundle=trust)
    chosen = _some_cases(settings, scans, number)
    measured = explainer.measure(chosen, lambda error: say(f"skipped: {error}", err), **_reading(settings))
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


def _some_cases(config: Config, scans: list[Path] | None, number: int) -> list[Sequence[Path]]:
    """The files of each scan named, or of up to ``number`` of the config's cases, evenly spread."""
    if scans:
        return [[scan] for scan in scans]
    from volsal.batch.cases import cases_of
    from volsal.config import ConfigError

    if config.scans is None:
        raise ConfigError(f"{config.path}: name some scans, here or under 'scans', to measure on")
    whole: list[Sequence[Path]] = [case.paths for case in cases_of(config).cases.values() if not case.fault]
    step = max(1, len(whole) // number)
    return whole[::step][:number]


@app.command("check-geometry")
@_explained
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

    settings = _load(load_config(config))
    explainer = Explainer.from_config(settings, method, trust_bundle=_trusted(settings, trust_bundle))
    chosen = _a_scan(settings, scan, series, slices)
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
@_explained
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

    settings = _load(load_config(config))
    case = random_volume(_shape(shape)) if shape else _a_scan(settings, scan, series, slices)
    trust = _trusted(settings, trust_bundle)
    with _progress() as progress:
        explainer = Explainer.from_config(settings, method, target, progress=_steps(progress), trust_bundle=trust)
        report = check(explainer, case, _steps(progress))
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


@app.command()
@_explained
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
@_explained
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
@_explained
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for scans, overlays and picture.")] = Path(
        "volsal-demo"
    ),
    train: Annotated[bool, typer.Option("--train", help="Train the demo's network anew first (minutes).")] = False,
) -> None:
    """See volsal work: lesions planted in a real head MRI at known places, found again by each method."""
    from volsal.demo.run import run_demo

    run_demo(output, train, say, _watched)


def main() -> None:
    """The ``volsal`` command."""
    if "--debug" in sys.argv:  # allowed before and after the command's name
        sys.argv.remove("--debug")
        os.environ["VOLSAL_DEBUG"] = "1"
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
