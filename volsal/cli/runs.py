"""run, status, collect: many scans."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from volsal.cli.console import SOME_FAILED, app, cell, duration, err, explained, out, say
from volsal.cli.inputs import loaded, trusted
from volsal.cli.options import AlignmentOption, MethodOption, QuietOption, TargetOption, TrustOption
from volsal.cli.progress import watched

if TYPE_CHECKING:
    from volsal.batch import Run, Tally

# Notes on results that a run's summary tells; with numbers in them, no two cases' may be alike.
_NOTES = 10


@app.command()
@explained
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

    settings = loaded(load_config(config))
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
        trust_bundle=trusted(settings, trust_bundle),
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
        for outcome in watched(work, silent):
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
@explained
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
@explained
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
