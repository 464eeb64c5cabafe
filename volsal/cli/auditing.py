"""audit, choose: whether a map can be believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from volsal.cli.console import REPEATS, app, cell, duration, err, explained, out, say
from volsal.cli.inputs import loaded, reading_of, trusted
from volsal.cli.options import ConfigArgument, MethodOption, QuietOption, TargetOption, TrustOption
from volsal.cli.progress import progress_bar, steps_of

if TYPE_CHECKING:
    from volsal.audit.choose import Scored


@app.command()
@explained
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

    settings = loaded(load_config(config))
    found = cases_of(settings)
    if output is None and settings.output is None:
        raise ConfigError(f"{config}: output: missing; say where the audit goes, here or with --output")
    folder = output or settings.folder / str(settings.output)
    require_writable(folder)
    section = settings.audit if scans is None else settings.audit.model_copy(update={"scans": scans})
    trust = trusted(settings, trust_bundle)
    with progress_bar(quiet or as_json) as progress:
        explainer = Explainer.from_config(settings, method, target, trust_bundle=trust)
        result = audited(explainer, found.cases.values(), section, folder, steps_of(progress), **reading_of(settings))
    if as_json:
        print(json.dumps(result.describe(), indent=1))
        return
    for asked in (result, *result.further):
        if result.further:
            say(f"of the target {asked.about['target']}:", style="bold")
        for verdict in asked.verdicts:
            say(f"{verdict.name}: {verdict.verdict}", style="bold")
            say(f"  {verdict.words}")
        for one in asked.suspicious[:REPEATS]:
            say(f"look at {one.case}: {one.reason}")
        if len(asked.suspicious) > REPEATS:
            say(f"and at {len(asked.suspicious) - REPEATS} more, see audit.json")
    for case, reason in result.about["skipped"].items():
        say(f"left out: {case}: {reason}", err)
    say(f"{len(result.records)} scans; rules, thresholds and figures: {folder / 'audit.json'}")


@app.command()
@explained
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
    the model is asked again; for answers that this does not tell of, all that a map holds highest. It may be that none
    can be trusted.
    """
    from volsal.audit.choose import choose as chosen
    from volsal.batch.cases import cases_of
    from volsal.config import load_config
    from volsal.explain import Explainer

    settings = loaded(load_config(config))
    cases = list(cases_of(settings).cases.values())
    trust = trusted(settings, trust_bundle)
    with progress_bar(quiet or as_json) as progress:
        found = chosen(
            Explainer.from_config(settings, targets=target, trust_bundle=trust),
            cases,
            settings=settings.audit,
            scans=scans,
            minutes=minutes,
            progress=steps_of(progress),
            **reading_of(settings),
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
        table.add_row(cell(one.method), score, cell(_trusted_for(one)))
    out.print(table)
    for case, reason in found.skipped.items():
        say(f"left out: {case}: {reason}", err)
    say(f"{found.scans} {'scan' if found.scans == 1 else 'scans'}, {duration(found.seconds)}")


def _trusted_for(one: Scored) -> str:
    """The answers, and whether it is all that the map holds highest that is trusted for them."""
    from volsal.audit.trust import HIGHEST, TRUSTED

    trusted = [trust for trust in one.trust if trust.verdict == TRUSTED]
    return ", ".join(f"{of.answer} (its highest part)" if of.way == HIGHEST else of.answer for of in trusted) or "-"
