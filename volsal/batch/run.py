"""A run: one config over many scans, one folder per case.  A bad scan costs no other scan's result.

The run folder is the record (see :mod:`volsal.run_folder`): what is done is told by the files that are there, so a run
that was stopped in any way is taken up by running it again.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import numpy as np

from volsal.batch.attempts import Attempts
from volsal.batch.cases import cases_of
from volsal.batch.earlier import Earlier, Standing
from volsal.batch.engine import Dask, Engine, Here, without_devices
from volsal.batch.lock import locked
from volsal.batch.plan import Plan
from volsal.batch.plan import plan as plan_of
from volsal.batch.recipe import recipe_of
from volsal.batch.worker import IN_WORK, Job, Outcome
from volsal.config import Config, ConfigError
from volsal.environment import environment
from volsal.errors import VolsalError
from volsal.explain import Explainer, Progress
from volsal.explanation import RESULT_VERSION
from volsal.run_folder import RunFolder
from volsal.scans.find import Case
from volsal.scans.scan import ScanError
from volsal.scans.write import WriteError, require_writable

Told = Callable[[str], None]
# Those that ask a run to end: by the keyboard, by a scheduler, by a terminal that is closed.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Tally:
    """What a run's outcomes add up to; it grows with the number of different notes alone."""

    states: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    maps: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        self.states[outcome.status] += 1
        if outcome.bad:
            self.codes[outcome.code] += 1
        if outcome.status == "done":
            self.seconds += outcome.seconds
            self.stages.update(outcome.stages)
        self.maps.update(outcome.maps)
        self.notes.update(outcome.notes)

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        maps = [
            {"method": name, "target": target, "status": state, "maps": number}
            for (name, target, state), number in sorted(self.maps.items())
        ]
        states = {state: self.states[state] for state in ("done", "kept", "refused", "failed")}
        notes = [{"note": note, "cases": number} for note, number in self.notes.most_common()]
        return {"states": states, "codes": dict(self.codes), "maps": maps, "notes": notes}

    @property
    def ended(self) -> int:
        """Cases of which it is known what became of them."""
        return self.states.total()

    @property
    def bad(self) -> int:
        """Cases without a result."""
        return self.states["refused"] + self.states["failed"]


class Run:
    """The scans that a config names, and the folder that their results go to.

    Parameters
    ----------
    config : with ``scans``, and ``output`` unless that is given here
    output : the run folder
    methods, targets, alignment : in place of the config's; as for :meth:`volsal.explain.Explainer.from_config`
    workers : processes on this machine; 1: this one.  In place of the config's
    scheduler : address of a Dask cluster's scheduler, whose workers do the cases instead
    time_limit : minutes that one case may take in each stage; in place of the config's
    retry_failed : try cases again that an earlier run refused or failed, and that are as they were
    dashboard : serve Dask's dashboard, for ``workers``
    trust_bundle : let the model's bundle run its own code (see :func:`volsal.load_bundle`), in every process

    Raises
    ------
    ConfigError
        Where the config names no scans or no output, or no scan is found.
    """

    def __init__(
        self,
        config: Config,
        output: Path | None = None,
        methods: Sequence[str] | None = None,
        targets: Sequence[str | int] | None = None,
        alignment: str | None = None,
        *,
        workers: int | None = None,
        scheduler: str | None = None,
        time_limit: float | None = None,
        retry_failed: bool = False,
        dashboard: bool = False,
        trust_bundle: bool = False,
    ) -> None:
        if config.scans is None:
            raise ConfigError(f"{config.path}: scans: missing; a run needs 'scans: {{folder: ...}}'")
        if output is None and config.output is None:
            raise ConfigError(f"{config.path}: output: missing; say where the results go, here or with --output")
        self.config = config
        self.scans = config.scans
        self.folder = RunFolder(output or config.folder / str(config.output))
        found = cases_of(config)
        self.found = found
        self.cases = found.cases
        self._require_apart()
        self.workers = workers or config.batch.workers
        self.scheduler = scheduler
        self.dashboard = dashboard
        minutes = time_limit or config.batch.time_limit
        self.job = Job(
            config,
            self.folder.path.absolute(),
            tuple(methods) if methods else None,
            tuple(targets) if targets else None,
            alignment,
            self._threads(),
            60 * minutes,
            config.batch.attempts,
            retry_failed,
            trust_bundle=trust_bundle,
        )
        self.stopped_by: str | None = None
        self._stopping = threading.Event()

    def plan(self) -> Plan:
        """What the run would do, by the keys that it would go by itself.

        Two cases are explained for their time, into a folder that is then removed.

        Raises
        ------
        VolsalError
            Where the model or a setting makes no sense.
        """
        explainer = self.job.explainer()
        warm = True
        reading = self.scans.reading()

        def timed(case: Case) -> float:
            nonlocal warm
            if warm:  # what is done once for all cases is not counted
                warm = False
                timed(case)
            clock = time.monotonic()
            try:
                explanation = explainer(case.paths, case.id, given=case.given or None, **reading)
            except VolsalError:
                raise
            except Exception as error:  # as in the run itself, it is this case's
                raise VolsalError(f"{type(error).__name__}: {error}") from error
            with TemporaryDirectory() as place:
                explanation.save(place, self.config.maps.stored_as)
            return time.monotonic() - clock

        width = np.dtype(self.config.maps.stored_as).itemsize
        count = len(explainer.methods) * len(explainer.targets)
        earlier = Earlier(self.folder, recipe_of(self.config, explainer, RESULT_VERSION), explainer.files_for)
        standing = {case.id: _standing(earlier, case) for case in self.cases.values() if not case.fault}
        return plan_of(self.found, self.folder.path, count, width, self.workers, timed, standing, retry=self.job.retry)

    def _require_apart(self) -> None:
        """Raise ConfigError where a case's results would go into a folder that its scan lies in, or is."""
        top = Path(os.path.abspath(self.folder.path))  # noqa: PTH100 - resolving follows links, of which some lead nowhere
        for case in self.cases.values():
            home = top / case.id
            if any(home in (path := Path(os.path.abspath(scan)), *path.parents) for scan in case.paths):  # noqa: PTH100
                raise ConfigError(
                    f"{self.folder.path}: the results of {case.id} would lie among its scan's own files in {home}; "
                    "choose another output folder"
                )

    def _threads(self) -> int:
        """CPU threads of each process: the config's, else what the run was begun with, else a share of the cores.

        The number changes the last bits of a result; a run that is taken up with other workers must not change it.
        """
        begun = self.folder.asked().get("threads")
        each = max(1, len(os.sched_getaffinity(0)) // self.workers)
        return self.config.threads or (begun if isinstance(begun, int) and begun > 0 else each)

    def execute(self, progress: Progress | None = None, told: Told | None = None) -> Iterator[Outcome]:
        """Explain every case; yield what became of each as it ends, in whatever order.

        The model and every setting are checked before the first scan is touched.  ``progress`` is told of the steps of
        long methods, where the cases are done by this process; ``told`` of what a person should know on the way.

        Raises
        ------
        LockedError
            Where another run is at work in the folder.
        WriteError
            Where the output folder cannot be written, before or in the middle; what is done is kept.
        StuckError
            Where a case hangs and cannot be stopped.
        """
        for outcome in self.watch(progress, told):
            if outcome is not None:
                yield outcome

    def watch(self, progress: Progress | None = None, told: Told | None = None) -> Iterator[Outcome | None]:
        """As :meth:`execute`, with None now and then while nothing ends, for who shows what time it is."""
        told = told or (lambda _: None)
        self._stopping.clear()
        self.stopped_by = None
        require_writable(self.folder.path)
        with locked(self.folder.path) as left_behind, self._signals(told):
            if left_behind:
                told(f"the last run in this folder did not end by itself ({left_behind}); taking it up")
            for case, deaths in Attempts(self.folder.path).suspects().items():
                if deaths.alone:
                    told(f"{case}: processes died over this case, {deaths.alone} with no other beside it; it goes last")
            self.folder.salt()  # made before several processes ask for it
            engine = self._engine(progress, told)
            self.folder.write_inputs({case: found.describe() for case, found in self.cases.items()})
            clock, tally = time.monotonic(), Tally()
            with self.folder.logging() as log:
                log("began", cases=len(self.cases), workers=self.workers, scheduler=self.scheduler)
                try:
                    for outcome in engine.outcomes(self._in_order(), self._stopping):
                        if outcome is not None:
                            tally.add(outcome)
                            log("case", **_told(outcome))
                        yield outcome
                finally:
                    ended = self.stopped_by or ("end" if tally.ended == len(self.cases) else "fault")
                    seconds = round(time.monotonic() - clock, 3)
                    with suppress(WriteError):  # of a full disk it is told by what ended the run
                        log("ended", by=ended, seconds=seconds, states=dict(tally.states), codes=dict(tally.codes))

    def _engine(self, progress: Progress | None, told: Told) -> Engine:
        spread = self.workers > 1 or self.scheduler is not None
        job = without_devices(self.job) if spread else self.job
        explainer = job.explainer(progress, job.partial)
        recipe = recipe_of(job.config, explainer, RESULT_VERSION)
        self._write_run(explainer, recipe)
        if not spread:
            return Here(self.job, explainer)
        return Dask(replace(self.job, recipe=recipe), self.workers, self.scheduler, self.dashboard, told)

    def _in_order(self) -> list[Case]:
        """The cases; last those over which a process died, the most suspect at the end."""
        deaths = Attempts(self.folder.path).suspects()
        suspects = [self.cases[case] for case in deaths if case in self.cases]
        suspects.sort(key=lambda case: (deaths[case.id].alone, case.id))
        return [case for case in self.cases.values() if case.id not in deaths] + suspects

    @contextmanager
    def _signals(self, told: Told) -> Iterator[None]:
        """The first SIGINT, SIGTERM or SIGHUP lets cases that are in work end; the second abandons them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def heard(number: int, _: FrameType | None) -> None:
            name = signal.Signals(number).name
            if self._stopping.is_set():
                self._abandon(name, told)
            self.stopped_by = name
            self._stopping.set()
            with suppress(OSError):  # a terminal that was closed
                told(f"{name}: finishing what is in work, at most {IN_WORK} cases a worker; once more abandons them")

        # What is ignored is so by someone's will: nohup, or a shell's for what it runs in the background.
        heeded = [one for one in _SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
        before = {one: signal.signal(one, heard) for one in heeded}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def _abandon(self, name: str, told: Told) -> None:
        """End at once.  The cases in work are not suspected of anything: it was the user's will."""
        try:
            for case in Attempts(self.folder.path).suspects():
                Attempts(self.folder.path).end(case)
            self.folder.log("ended", by=f"{name} twice")
            told(f"{name} again: abandoned; the same command takes the run up where it was")
        finally:  # whatever the disk or the terminal says to that
            os._exit(128 + signal.Signals[name].value)

    def _write_run(self, explainer: Explainer, recipe: Mapping[str, Any]) -> None:
        before = self.folder.asked()
        self.folder.write_run(
            {
                "config": self.config.model_dump(mode="json"),
                "config_file": str(self.config.path),
                "methods": explainer.names,
                "weights_sha256": explainer.weights_sha256,
                "code": recipe["code"],
                "bundle": explainer.bundle.describe() if explainer.bundle else None,
                "result_version": RESULT_VERSION,
                "cases": len(self.cases),
                "notes": list(self.found.notes),
                "threads": self.job.threads,
                "workers": self.workers,
                "first_began": before.get("first_began") or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                **environment(),
            }
        )

    def left(self, tally: Tally) -> int:
        """Cases that no outcome is known of."""
        return len(self.cases) - tally.ended

    def collect(self) -> Path:
        """``cases.csv``, made of what the case folders say."""
        return self.folder.collect()


def _standing(earlier: Earlier, case: Case) -> Standing:
    try:
        return earlier.of(case).standing
    except ScanError:  # of a file that cannot be read: the run would say so, and no longer hold what there is
        return "changed"


def _told(outcome: Outcome) -> dict[str, Any]:
    """What the log says of a case."""
    about: dict[str, Any] = {"case": outcome.case, "status": outcome.status, "worker": outcome.worker}
    if outcome.bad:  # the reason is in the case's folder: it may name files, and these a patient
        about |= {"code": outcome.code, "again": outcome.again}
    if outcome.status != "kept" and not outcome.again:
        about |= {"seconds": round(outcome.seconds, 3), "stages": outcome.stages}
    return about
