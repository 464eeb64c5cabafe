"""One process's share of a run: the model, and the line of reading, computing and writing that cases go along.

The three stages each have a thread of their own, so that one scan is read while another is computed and a third
written; more are never in memory.  What a case gives does not depend on what is beside it.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NoReturn, TypeVar

import torch

from volsal.batch.attempts import Attempts
from volsal.batch.earlier import Earlier, Left, digests_of
from volsal.batch.recipe import recipe_of
from volsal.config import Config
from volsal.errors import VolsalError
from volsal.explain import PARTIAL, Answer, Explainer, Progress, Ready
from volsal.explanation import RESULT_VERSION, TakenError
from volsal.run_folder import Fault, RunFolder, one_line
from volsal.scans import ScanError, read_case
from volsal.scans.find import SUFFIXES, Case, without_uids
from volsal.scans.write import WriteError

# Cases that are in work at once: one in each stage.
IN_WORK = 3
# How long a case that was told to stop is waited for.
_GRACE_S = 10.0
# Of cases that are only looked at, how many are handed to the thread that reads at once, and for how long: to hand each
# of thousands over takes longer than the look.
_HANDFUL = 64
_HANDFUL_S = 0.05

Status = Literal["done", "kept", "refused", "failed"]
T = TypeVar("T")


class OverTimeError(VolsalError, TimeoutError):
    """A case took longer than it may."""


class StuckError(VolsalError, RuntimeError):
    """An earlier case took too long and cannot be stopped: this process is of no more use."""


class WorkerError(VolsalError, RuntimeError):
    """A process that cannot take part in a run."""


class ChangedError(ScanError):
    """A file changed while it was being read."""


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes
    ----------
    case, scan : its id and its file (the first channel's)
    status : ``done``; ``kept``: an earlier run's result that still holds; ``refused``: something is wrong that is told
        and can be mended; ``failed``: it broke.  An earlier run's fault that still holds keeps its status
    code : the kind of fault, in one word
    error : why it is refused or failed, in one line; ``trace`` the traceback
    again : whether the fault is an earlier run's, and nothing was tried now
    seconds : how long it took, 0 for what is kept; ``stages``: each stage's own part of it
    maps : name, target and status of each map
    notes : what is to be told of the result
    worker : where it was done: host and process
    """

    case: str
    scan: Path
    status: Status
    code: str = ""
    error: str | None = None
    trace: str | None = None
    again: bool = False
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    maps: tuple[tuple[str, str, str], ...] = ()
    notes: tuple[str, ...] = ()
    worker: str = ""

    @property
    def bad(self) -> bool:
        """Whether the case has no result."""
        return self.status in ("refused", "failed")


@dataclass(frozen=True)
class Job:
    """What a process needs to know to take part in a run; small, and can be sent to another machine.

    Attributes
    ----------
    config, methods, targets, alignment : as for :meth:`volsal.explain.Explainer.from_config`
    folder : the run's, on storage that all processes see
    threads : CPU threads of each process
    time_limit_s : what one case may take in each stage
    attempts : processes that may die over a case, with no other beside it, before it is set aside
    retry : whether cases that an earlier run refused or failed are tried again as they are
    recipe : what every result depends on (see :func:`volsal.batch.recipe.recipe_of`), as the process that began the
        run saw it; the others must see the same
    trust_bundle : whether the user lets the model's bundle run its own code
    """

    config: Config
    folder: Path
    methods: tuple[str, ...] | None = None
    targets: tuple[str | int, ...] | None = None
    alignment: str | None = None
    threads: int = 1
    time_limit_s: float = 1800.0
    attempts: int = 6
    retry: bool = False
    recipe: Mapping[str, Any] | None = None
    trust_bundle: bool = False

    @property
    def partial(self) -> Path:
        """Where long methods keep what they have of a case."""
        return self.folder / PARTIAL

    def explainer(self, progress: Progress | None = None, keep: Path | None = None) -> Explainer:
        """The config's explainer, with the run's thread count set in this process."""
        torch.set_num_threads(self.threads)
        return Explainer.from_config(
            self.config,
            self.methods,
            self.targets,
            self.alignment,
            progress=progress,
            keep=keep,
            trust_bundle=self.trust_bundle,
        )


class Worker:
    """A process that does cases of a job, up to :data:`IN_WORK` at a time: used from as many threads."""

    def __init__(self, job: Job, explainer: Explainer | None = None) -> None:
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        # What nibabel prints of a header names no case; what comes of it is told by the case's notes or fault.
        logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
        self.job = job
        self.folder = RunFolder(job.folder)
        self.attempts = Attempts(job.folder)
        self.explainer = explainer or job.explainer(keep=job.partial)
        self.recipe = recipe_of(job.config, self.explainer, RESULT_VERSION)
        self._require_same_recipe()
        self.earlier = Earlier(self.folder, self.recipe, self.explainer.files_for)
        # A read that hangs is left alone; what hangs elsewhere holds the model, or the disk.
        self._stages = {name: _Stage(name, holds=name != "read") for name in ("read", "compute", "write")}
        self._looking = threading.Lock()
        self._room = _Room()
        scans = job.config.scans
        self._reading = scans.reading() if scans else {}
        self._salt = self.folder.salt() if scans and scans.identifiers == "hashed" else None

    def next_of(self, waiting: deque[Case]) -> Iterator[Outcome]:
        """Take cases from the front of ``waiting``, which threads may share, and yield what becomes of each.

        Those of which an earlier run's outcome still holds come first, up to a handful; then one that does not, done.

        Raises
        ------
        WriteError
            Where the disk refuses: that is the run's end, for it would refuse the next case alike.
        StuckError
            Where an earlier case took too long and cannot be stopped.
        """
        for stage in self._stages.values():
            stage.require_free()
        clock = time.monotonic()
        begun: list[Case] = []
        kept: list[Outcome] = []
        left: Left | Exception | SystemExit | None
        # One at a time: threads that look together would mostly wait for one another.
        with self._looking:
            looked = tuple(islice(waiting, _HANDFUL))
            if not looked:
                return
            try:
                left = self._in("read", partial(self._look, looked, begun, kept))
                ended = tuple(kept)
            except StuckError:
                raise
            except (Exception, SystemExit) as error:  # noqa: BLE001 - of the case that was looked at; becomes its fault
                # A look that is stopped may yet be through with its case, and with more of them.
                left, ended = error, tuple(kept[: max(0, len(begun) - 1)])
            taken = [waiting.popleft() for _ in range(len(ended) + (left is not None))]
        yield from ended
        if left is None:
            return
        case = taken[-1]
        try:
            outcome = self._guarded(case, left)
        finally:
            self.attempts.end(case.id)
        yield replace(outcome, seconds=time.monotonic() - clock, worker=self.name)

    def close(self) -> None:
        """Let the stages' threads end.  Cases that are in work are waited for."""
        for stage in self._stages.values():
            stage.close()

    def _require_same_recipe(self) -> None:
        for name, expected in (self.job.recipe or {}).items():
            # Where a process computes is its own matter; what it computes is not.
            if name != "device" and self.recipe[name] != expected:
                raise WorkerError(
                    f"{self.name}: this worker's {name} is not that of the process which began the run; do both see "
                    f"the same files below {self.job.config.folder}, and the same volsal?"
                )

    def _look(self, cases: Iterable[Case], begun: list[Case], kept: list[Outcome]) -> Left | None:
        """Add to ``kept`` what holds of earlier runs; give what is left of the first case of which nothing does."""
        until = time.monotonic() + _HANDFUL_S
        for case in cases:
            begun.append(case)
            if case.fault:
                raise ScanError(f"{case.paths[0]}: {case.fault}" if case.paths else case.fault)
            left = self.earlier.of(case)
            if (outcome := self._kept(case, left)) is None:
                return left
            kept.append(outcome)
            if time.monotonic() > until:
                break
        return None

    def _guarded(self, case: Case, left: Left | Exception | SystemExit) -> Outcome:
        """The case's outcome, whatever happens; a fault is written into its folder."""
        try:
            if isinstance(left, (Exception, SystemExit)):
                raise left
            return self._begun(case, left.digests)
        except (WriteError, StuckError) as error:
            if isinstance(error, WriteError) and self._is_of_one_case(error):
                return self._fault(case, error)
            raise
        # The one place that outlives any error, an exit that the user's own code asks for included: the next scan still
        # counts.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            return self._fault(case, error)

    def _is_of_one_case(self, error: WriteError) -> bool:
        """Whether the next case may be written all the same: the disk is there, and someone took this one's folder."""
        taken = isinstance(error, TakenError) or isinstance(error.__cause__, FileNotFoundError)
        return taken and self.folder.path.is_dir()

    def _done(self, case: Case, digests: list[str] | None) -> Outcome:
        try:
            return self._through(case, digests, lean=False)
        except (VolsalError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the except block, which would hold on to what the first try had allocated.
        with self._room.alone_instead():
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return self._through(case, digests, lean=True)

    def _through(self, case: Case, digests: list[str] | None, lean: bool) -> Outcome:
        """The case along the line of stages."""
        clocks: dict[str, float] = {}
        ready, key = self._in("read", partial(self._read, case, digests), clocks)
        answer = self._in("compute", partial(self._answer, case, ready, lean), clocks)
        del ready
        maps, notes = self._in("write", partial(self._write, case, key, answer), clocks)
        return Outcome(case.id, case.paths[0], "done", stages=clocks, maps=maps, notes=notes)

    def _in(self, stage: str, work: Callable[[], T], clocks: dict[str, float] | None = None) -> T:
        value, seconds = self._stages[stage].run(work, self.job.time_limit_s)
        if clocks is not None:
            clocks[stage] = round(seconds, 4)
        return value

    def _kept(self, case: Case, left: Left) -> Outcome | None:
        """What an earlier run made of the same inputs and settings; None where the case is to be done."""
        if record := left.record:
            self.folder.clear(case.id)
            self.attempts.end(case.id)
            maps = tuple((entry["name"], entry["target"], entry["status"]) for entry in record["maps"])
            notes = tuple(record["notes"])
            return Outcome(case.id, case.paths[0], "kept", maps=maps, notes=notes, worker=self.name)
        if (fault := left.fault) and not self.job.retry:
            self.attempts.end(case.id)
            told = fault.code, fault.reason, fault.trace
            return Outcome(case.id, case.paths[0], fault.status, *told, again=True, worker=self.name)
        return None

    def _begun(self, case: Case, digests: list[str] | None) -> Outcome:
        """The case done, noted as in work: should the process die, it did so over it."""
        before = self.attempts.of(case.id)
        if before.alone >= self.job.attempts:
            raise _WorkerLostError(
                f"{before.alone} processes died over this case with no other beside it; it is not tried again "
                "(--retry-failed does)"
            )
        with self._room.alone() if before else self._room.beside_others():
            self.attempts.begin(case.id, before)
            return self._done(case, digests)

    def _read(self, case: Case, before: list[str] | None) -> tuple[Ready, str]:
        """What the model will see, and the result's key, made of the very bytes that were read."""
        scan = read_case(case.paths, **self._reading)
        files = [one for one in (scan, *scan.further) if one.path and one.path.name.lower().endswith(SUFFIXES)]
        read = [one.sha256 for one in files if one.sha256]
        if len(read) != len(case.paths):  # folders of DICOM files, several volumes of one file
            read = before or digests_of(case)
        if before and read != before:
            raise ChangedError(f"{scan}: changed while it was being read; run again when nothing writes to it")
        ready = self.explainer.prepare(scan, case.id, **self._reading)
        # Three scans are in work at a time.
        return ready if self.explainer.draws else ready.without_voxels(), self.earlier.key(case, read)

    def _answer(self, case: Case, ready: Ready, lean: bool) -> Answer:
        return self.explainer.answer(ready, given=case.given or None, lean=lean)

    def _write(self, case: Case, key: str, answer: Answer) -> tuple[Any, tuple[str, ...]]:
        explanation = self.explainer.carry(answer)
        explanation = replace(explanation, provenance={**explanation.provenance, "key": key})
        if self._salt:
            explanation = explanation.pseudonymous(self._salt)
        explanation.save(self.folder.path, self.job.config.maps.stored_as)
        self.folder.clear(case.id)
        self.explainer.forget(case.id)
        maps = tuple((heatmap.method_name, heatmap.target, heatmap.status) for heatmap in explanation.maps)
        return maps, explanation.notes

    def _fault(self, case: Case, error: Exception | SystemExit) -> Outcome:
        status, code = kind_of(error)
        reason = str(error) if isinstance(error, VolsalError) else f"{type(error).__name__}: {error}"
        if code == "memory":
            reason = f"out of memory, also with one method at a time: {reason}"
        trace = "".join(traceback.format_exception(error))
        if self._salt:
            reason, trace = without_uids(reason, self._salt), without_uids(trace, self._salt)
        fault = Fault(status, code, one_line(reason), self._key_of_fault(case), trace)
        self.folder.sweep(case.id)
        self.folder.write_fault(case.id, fault)
        return Outcome(case.id, _scan_of(case), status, code, fault.reason, trace)

    def _key_of_fault(self, case: Case) -> str:
        """What a fault depends on; "" where the files cannot even be read, so that it is tried again the next time."""
        if case.fault:
            return ""
        try:
            # With the stage's time limit: what hung once, as a file server does, would hang again.
            return self.earlier.key(case, self._in("read", partial(digests_of, case)))
        except (VolsalError, OSError):
            return ""


class _WorkerLostError(VolsalError, RuntimeError):
    """A case over which processes died."""


def kind_of(error: BaseException) -> tuple[Literal["refused", "failed"], str]:
    """Whether an error is of those that are told and can be mended, and its kind in one word."""
    if is_out_of_memory(error):
        return "failed", "memory"
    if isinstance(error, OverTimeError):
        return "failed", "time-limit"
    if isinstance(error, _WorkerLostError):
        return "failed", "worker-lost"
    if isinstance(error, VolsalError):
        name = type(error).__name__.removesuffix("Error")
        return "refused", "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")
    return "failed", "error"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or what it came from, is that memory could not be had."""
    seen: BaseException | None = error
    before: set[int] = set()  # errors may name each other as their cause
    while seen is not None and id(seen) not in before:
        before.add(id(seen))
        if isinstance(seen, (MemoryError, torch.OutOfMemoryError)):
            return True
        # The CPU's allocator of torch raises a plain RuntimeError.
        if isinstance(seen, RuntimeError) and "can't allocate memory" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _scan_of(case: Case) -> Path:
    return case.paths[0] if case.paths else Path()


class _StopWorkError(BaseException):
    """Raised in the middle of work that takes too long.  No ``except Exception`` on the way may take it for its own."""


class _Stage:
    """One thread, which does one thing at a time and can be asked to stop.

    ``holds``: whether work that cannot be stopped holds what any further work needs.
    """

    def __init__(self, name: str, holds: bool) -> None:
        self._name, self._holds = name, holds
        self._stuck = False
        self._turn = threading.Lock()
        self._thread, self._asked = self._new()

    def run(self, work: Callable[[], T], limit_s: float) -> tuple[T, float]:
        """What ``work`` gives, and its seconds.  The limit counts from when it begins, not from when it is asked for.

        Raises
        ------
        OverTimeError
            Where it took longer and was stopped, or could not be stopped: it hangs outside of Python.  Then its thread
            is left to itself.
        StuckError
            Where earlier work could not be stopped, and holds what this needs.
        """
        with self._turn:
            self.require_free()
            clock = time.monotonic()
            future: Future[T] = Future()
            self._asked.put((future, work))
            try:
                value = future.result(limit_s)
            except TimeoutError:
                if not future.done():
                    self._stop(future, limit_s)
                value = future.result()  # it was done that very moment, or the error is the work's own
            return value, time.monotonic() - clock

    def require_free(self) -> None:
        """Raise StuckError where no more work can be done here."""
        if self._stuck:
            raise StuckError(
                f"a case that took too long to {self._name} cannot be stopped, so this process cannot go on; that case "
                "is set aside as failed: the same command does the rest (several --workers go on by themselves)"
            )

    def _stop(self, future: Future[T], limit_s: float) -> NoReturn:
        """Raise an exception in the middle of the work, and go on with another thread.

        What the work gives all the same is not used: it may have come about by dealing with that exception.
        """
        said = f"took longer than {limit_s:g} s to {self._name} (time_limit in the config's batch, or --time-limit)"
        thread, asked = self._thread, self._asked
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_StopWorkError))
        asked.put(None)
        # The exception may come too late for the work, and hit its thread.
        self._thread, self._asked = self._new()
        if wait([future], _GRACE_S).not_done:
            self._stuck = self._holds
            raise OverTimeError(f"{said}, and could not be stopped")
        raise OverTimeError(said)

    def _new(self) -> tuple[threading.Thread, SimpleQueue[Any]]:
        asked: SimpleQueue[Any] = SimpleQueue()
        # A daemon: a process must be able to end although something in it hangs for good.
        thread = threading.Thread(target=_serve, args=(asked,), name=f"volsal-{self._name}", daemon=True)
        thread.start()
        return thread, asked

    def close(self) -> None:
        """Let the thread end, after what it is at."""
        self._asked.put(None)
        self._thread.join()


def _serve(asked: SimpleQueue[Any]) -> None:
    """Do what is asked for, until that is None."""
    with suppress(_StopWorkError):  # which came too late for the work it was meant for
        while (one := asked.get()) is not None:
            future, work = one
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - it is for the one who waits, whatever it is
                future.set_exception(error)
            del future, work, one  # a scan that is through is not held until the next one comes


class _Room:
    """Where cases are beside each other, or one is alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._waiting = 0
        self._closed = False

    @contextmanager
    def beside_others(self) -> Iterator[None]:
        with self._changed:
            # One who waits to be alone goes first, or might wait for ever.
            self._changed.wait_for(lambda: not self._closed and not self._waiting)
            self._inside += 1
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._enter_alone()
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()
            self._leave()

    @contextmanager
    def alone_instead(self) -> Iterator[None]:
        """For one who is inside already: alone from here to the end of the block, and beside others again after it."""
        with self._changed:
            if self._closed:  # it is alone as it is
                alone = True
            else:
                alone = False
                self._inside -= 1
                self._changed.notify_all()
                self._enter_alone()
        try:
            yield
        finally:
            if not alone:
                with self._changed:
                    self._closed = False
                    self._changed.notify_all()

    def _enter_alone(self) -> None:
        self._waiting += 1
        self._changed.wait_for(lambda: not self._closed and not self._inside)
        self._waiting -= 1
        self._closed = True
        self._inside += 1

    def _leave(self) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()
