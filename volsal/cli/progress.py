"""Bars and lines that tell how far the work is."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

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
from rich.text import Text

from volsal.cli.console import REPEATS, duration, err, is_debug, say

if TYPE_CHECKING:
    from volsal.batch import Outcome, Run

# Where no one watches a bar, a run says this often how far it is.
_SAY_EVERY_S = 60.0


def watched(work: Run, quiet: bool = False) -> Iterator[Outcome]:
    """The run's outcomes as they come, with a progress bar on a terminal and a line for each scan without result."""
    reasons: Counter[str] = Counter()
    with _run_progress(quiet) as progress:
        shown = _Pace(progress, len(work.cases), quiet)
        for outcome in work.watch(steps_of(progress), _tell):
            shown.tick(outcome)
            if outcome is None:
                continue
            if outcome.error:
                reason = outcome.error.replace(str(outcome.scan), "the scan")
                reasons[reason] += 1
                if reasons[reason] <= REPEATS:
                    before = " (as before; --retry-failed tries again)" if outcome.again else ""
                    say(f"{outcome.status} [{outcome.code}]: {outcome.case}: {outcome.error}{before}", progress.console)
                if is_debug() and outcome.trace:
                    say(outcome.trace, progress.console)
            yield outcome
    for reason, times in reasons.items():
        if times > REPEATS:
            say(f"and {times - REPEATS} more for the same reason: {reason}", err)


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


def steps_of(progress: Progress) -> Callable[[str, int, int], None]:
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
def costs_told(progress: Progress) -> Iterator[None]:
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


def progress_bar(quiet: bool = False) -> Progress:
    """A bar of steps, where someone watches."""
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
