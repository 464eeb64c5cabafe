"""Who does a run's cases: this process, or the workers of a Dask cluster.  Both hand out the same work to `Worker`."""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

import torch

from volsal.batch.worker import IN_WORK, Job, Outcome, StuckError, Worker, WorkerError
from volsal.config import ConfigError
from volsal.errors import VolsalError
from volsal.explain import Explainer
from volsal.run_folder import OWN, Fault, RunFolder
from volsal.scans.find import Case

T = TypeVar("T")

# How often the process that watches looks up, s: for signals, and for the line that says how far it is.
_LOOK_S = 0.5
# For each worker as it starts.  Ctrl-C reaches all processes of a terminal, and what becomes of the workers is for this
# one to say; so is what a person should know of their deaths.
_AT_START = """
import logging, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
logging.getLogger("distributed").setLevel(logging.CRITICAL)
"""
# Times that a case which a cluster gives up on is handed to it again, before the notes of attempts set it aside.
_AGAIN = 16


class Engine(Protocol):
    """How cases are done, in whatever order and place."""

    def outcomes(self, cases: Sequence[Case], stopping: threading.Event) -> Iterator[Outcome | None]:
        """Each case's outcome as it ends, and None now and then in between.

        Once ``stopping`` is set no case is begun; those in work are finished, and the iterator ends.
        """


@dataclass(frozen=True)
class Here:
    """This process."""

    job: Job
    explainer: Explainer

    def outcomes(self, cases: Sequence[Case], stopping: threading.Event) -> Iterator[Outcome | None]:
        """See :class:`Engine`.

        Raises
        ------
        StuckError
            Where a case took too long and could not be stopped.
        """
        worker = Worker(self.job, self.explainer)
        waiting = deque(cases)
        ended: SimpleQueue[Outcome | Future[None]] = SimpleQueue()

        def work() -> None:
            # Each thread takes its own next cases: a resumed run has thousands that are only looked at, and to hand
            # each of them over from here would take longer than the look.
            while waiting and not stopping.is_set():
                for outcome in worker.next_of(waiting):
                    ended.put(outcome)

        def through(thread: Future[None]) -> None:
            if thread.exception():  # it is the run's end: the others finish what they are at
                stopping.set()
            ended.put(thread)

        with ThreadPoolExecutor(IN_WORK, thread_name_prefix="volsal-case") as pool:
            threads = [pool.submit(work) for _ in range(IN_WORK)]
            for thread in threads:
                thread.add_done_callback(through)
            try:
                yield from _until_through(ended, IN_WORK)
            finally:
                stopping.set()
            for thread in threads:
                thread.result()
        worker.close()


@dataclass(frozen=True)
class Dask:
    """A Dask cluster: ``workers`` processes of this machine, or the cluster whose scheduler is at ``address``."""

    job: Job
    workers: int = 0
    address: str | None = None
    dashboard: bool = False
    told: Callable[[str], None] = field(default=lambda _: None)

    def outcomes(self, cases: Sequence[Case], stopping: threading.Event) -> Iterator[Outcome | None]:
        """See :class:`Engine`.  A worker that dies loses no case: it is done again, by another one.

        Raises
        ------
        ConfigError
            Where no scheduler answers.
        WorkerError
            Where it does no longer, or a worker cannot take part.
        """
        with self._client() as client:
            try:
                yield from self._spread(client, cases, stopping)
            except OSError as error:
                if isinstance(error, VolsalError):
                    raise
                raise WorkerError(
                    f"the cluster's scheduler no longer answers ({error}); what is done is kept: the same command "
                    "takes the run up when it is back"
                ) from error

    @contextmanager
    def _client(self) -> Iterator[Any]:
        try:
            import dask
            from distributed import Client, LocalCluster
            from distributed.comm import get_address_host_port
        except ImportError as error:
            raise ConfigError("several workers need Dask: pip install 'volsal[cluster]'") from error
        # A worker that dies is told by its cases, and a scheduler that is gone by the run's end.
        for name in ("distributed", "distributed.client"):  # only now: importing Dask sets them
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if self.address:
            try:
                get_address_host_port(self.address, strict=True)  # a Client of no address does not end in peace
            except ValueError as error:
                raise ConfigError(
                    f"--scheduler {self.address}: not an address; a scheduler prints its own, as tcp://node1:8786"
                ) from error
            try:
                client = Client(self.address, timeout="30s", set_as_default=False)
            except (OSError, TimeoutError) as error:
                raise ConfigError(f"--scheduler {self.address}: no Dask scheduler answers there: {error}") from error
            with client:
                self.told(f"cluster at {self.address}; dashboard: {client.dashboard_link}")
                yield client
            return
        # A case that kills its workers is found by the notes of attempts, which know what else was in work.
        with (
            dask.config.set({"distributed.scheduler.allowed-failures": _AGAIN}),
            LocalCluster(
                n_workers=self.workers,
                threads_per_worker=IN_WORK,
                processes=True,
                memory_limit=0,  # what fits is the machine's to say; Dask would kill at a share of its own choice
                dashboard_address=None,
                # For this machine alone: what it shows names cases.  Without a dashboard the scheduler still listens:
                # on 8787, with a warning where another one does, unless it is given a port.
                scheduler_kwargs={
                    "dashboard": self.dashboard,
                    "dashboard_address": f"127.0.0.1:{8787 if self.dashboard else 0}",
                },
                preload=[_AT_START],
            ) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            if self.dashboard:
                self.told(f"dashboard: {client.dashboard_link}")
            yield client

    def _spread(self, client: Any, cases: Sequence[Case], stopping: threading.Event) -> Iterator[Outcome | None]:
        waiting = iter(cases)
        pending: dict[Any, tuple[Case, int]] = {}
        ended: SimpleQueue[Any] = SimpleQueue()
        run = secrets.token_hex(8)
        # Workers look for it before they begin a case.  One of its own for every run: on shared storage a file that was
        # removed may be seen for a while.
        stop = self.job.folder / OWN / f"stop-{run}"
        for old in stop.parent.glob("stop-*"):
            old.unlink(missing_ok=True)

        def hand_out(case: Case, times: int) -> None:
            # The key names the case and the run: two runs on one cluster are apart.
            key = f"volsal-{case.id}-{times}-{run}"
            future = client.submit(do, self.job, case, stop, key=key, pure=False)
            pending[future] = case, times
            future.add_done_callback(ended.put)

        if not client.nthreads():
            self.told("the cluster has no workers yet; the run begins when it has")
        while True:
            threads = sum(client.nthreads().values())  # also finds out whether the scheduler is there
            if stopping.is_set():
                with suppress(OSError):  # else what was handed out is done as well
                    stop.touch()
            else:
                # A few more than are in work, so that no worker waits for this process.
                for case in islice(waiting, max(0, 2 * max(1, threads) - len(pending))):
                    hand_out(case, 0)
            if not pending or (stopping.is_set() and not threads):  # the workers were told to stop as well
                stop.unlink(missing_ok=True)
                return
            for future in _some_of(ended):
                case, times = pending.pop(future)
                again = None if stopping.is_set() else hand_out
                yield from self._outcome(future, case, times, again)
            yield None

    def _outcome(
        self, future: Any, case: Case, times: int, again: Callable[[Case, int], None] | None
    ) -> Iterator[Outcome]:
        """What a future that ended says; a case whose worker died is handed out ``again``, or given up."""
        error = _death(future)
        if error is None:
            if future.status == "error" and not isinstance(fault := future.exception(), VolsalError):
                # Of making the worker: what becomes of a case is no error.
                raise WorkerError(f"a worker cannot take part in the run: {type(fault).__name__}: {fault}") from fault
            if (outcome := future.result()) is not None:
                yield outcome
            return
        if again is None:
            return
        if times < _AGAIN:
            again(case, times + 1)
            return
        reason = f"every worker that was given this case died ({error}); is there memory enough for one case?"
        lost = Fault("failed", "worker-lost", reason)
        RunFolder(self.job.folder).write_fault(case.id, lost)
        yield Outcome(case.id, case.paths[0] if case.paths else Path(), "failed", lost.code, lost.reason)


def _until_through(ended: SimpleQueue[Outcome | Future[None]], threads: int) -> Iterator[Outcome | None]:
    """What so many threads put into the queue, and None now and then, until each has put itself there."""
    while threads:
        for one in _some_of(ended):
            if isinstance(one, Outcome):
                yield one
            else:
                threads -= 1
        yield None


def _some_of(queue: SimpleQueue[T]) -> Iterator[T]:
    """What is in the queue, waited for a little if there is nothing."""
    try:
        yield queue.get(timeout=_LOOK_S)
        while True:
            yield queue.get_nowait()
    except Empty:
        return


def _death(future: Any) -> BaseException | None:
    """Why a case has no outcome, where that is the workers' fault; any other error is the run's end."""
    error = future.exception() if future.status == "error" else None
    if type(error).__name__ == "KilledWorker":
        return error
    # An outcome that was lost with its worker: what it says is on the disk, and found there the next time.
    return None if future.status in ("finished", "error") else RuntimeError("it was lost with its worker")


_WORKERS: dict[str, Worker] = {}
_MAKING = threading.Lock()


def do(job: Job, case: Case, stop: Path) -> Outcome | None:
    """Do one case in a process of a cluster, whose worker is made with the run's first case and kept.

    None where there is a file ``stop``: the run is to end, and the case is not begun.
    """
    if stop.exists():
        return None
    name = repr(job)
    with _MAKING:
        if name not in _WORKERS:
            for other in list(_WORKERS):
                _WORKERS.pop(other).close()  # of an earlier run: its model need not stay in memory
            _WORKERS[name] = Worker(_on_device(job))
    try:
        return next(_WORKERS[name].next_of(deque([case])))
    except StuckError:
        # Something hangs in this process for good; the cluster starts another one and hands it the case.
        os._exit(70)


def _on_device(job: Job) -> Job:
    """Each worker process its own device, by its number, where the machine shows several."""
    from distributed import get_worker

    section = job.config.model
    if section.device != "cuda" or torch.cuda.device_count() < 2:
        return job
    number = str(get_worker().name)
    device = f"cuda:{(int(number) if number.isdigit() else os.getpid()) % torch.cuda.device_count()}"
    config = job.config.model_copy(update={"model": section.model_copy(update={"device": device})})
    return replace(job, config=config)


def without_devices(job: Job) -> Job:
    """``job`` for the process that hands out the work: it checks the model and need not have a GPU."""
    section = job.config.model.model_copy(update={"device": "cpu"})
    return replace(job, config=job.config.model_copy(update={"model": section}))
