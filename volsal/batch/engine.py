"""Who does a run's cases: this process, or the workers of a Dask cluster.  Both hand out the same work to `Worker`."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import torch

from volsal.batch.attempts import Attempts
from volsal.batch.worker import IN_WORK, Job, Outcome, StuckError, Worker
from volsal.config import ConfigError
from volsal.explain import Explainer
from volsal.run_folder import Fault, RunFolder
from volsal.scans.find import Case

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
_AGAIN = 8


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
        waiting = iter(cases)
        with ThreadPoolExecutor(IN_WORK, thread_name_prefix="volsal-case") as pool:
            pending: set[Future[Outcome]] = set()
            try:
                while True:
                    if not stopping.is_set():
                        pending |= {pool.submit(worker, case) for case in islice(waiting, IN_WORK - len(pending))}
                    if not pending:
                        break
                    ended, pending = wait(pending, _LOOK_S, FIRST_COMPLETED)
                    for future in ended:
                        yield future.result()
                    yield None
            finally:
                stopping.set()
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
        """See :class:`Engine`.  A worker that dies loses no case: it is done again, by another one."""
        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # a worker that dies is told by its cases
        with self._client() as client:
            yield from self._spread(client, cases, stopping)

    @contextmanager
    def _client(self) -> Iterator[Any]:
        try:
            import dask
            from distributed import Client, LocalCluster
        except ImportError as error:
            raise ConfigError("several workers need Dask: pip install 'volsal[cluster]'") from error
        if self.address:
            try:
                client = Client(self.address, timeout="30s", set_as_default=False)
            except (OSError, TimeoutError, ValueError) as error:
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
                dashboard_address=":8787" if self.dashboard else None,
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

        def hand_out(case: Case, times: int) -> None:
            # The key names the case and the run: two runs on one cluster are apart.
            key = f"volsal-{case.id}-{times}-{os.getpid()}-{id(pending)}"
            future = client.submit(do, self.job, case, key=key, pure=False)
            pending[future] = case, times
            future.add_done_callback(ended.put)

        while True:
            if stopping.is_set():
                self._call_back(pending)
            else:
                # A few more than are in work, so that no worker waits for this process.
                room = 2 * max(1, sum(client.nthreads().values())) - len(pending)
                for case in islice(waiting, max(0, room)):
                    hand_out(case, 0)
            if not pending:
                return
            for future in _some_of(ended):
                if future in pending:  # it was not called back
                    case, times = pending.pop(future)
                    again = None if stopping.is_set() else hand_out
                    yield from self._outcome(future, case, times, again)
            if stopping.is_set() and not client.nthreads():
                return  # the workers were told to stop as well
            yield None

    def _call_back(self, pending: dict[Any, tuple[Case, int]]) -> None:
        """Take back what no worker has begun: it leaves no note of having been begun."""
        begun = Attempts(self.job.folder).suspects()
        for future in [one for one, (case, _) in pending.items() if not one.done() and case.id not in begun]:
            del pending[future]
            future.cancel()

    def _outcome(
        self, future: Any, case: Case, times: int, again: Callable[[Case, int], None] | None
    ) -> Iterator[Outcome]:
        """What a future that ended says; a case whose worker died is handed out ``again``, or given up."""
        error = _death(future)
        if error is None:
            yield future.result()
            return
        if again is None:
            return
        if times < _AGAIN:
            again(case, times + 1)
            return
        reason = f"every worker that was given this case died ({error}); is there memory enough for one case?"
        fault = Fault("failed", "worker-lost", reason)
        RunFolder(self.job.folder).write_fault(case.id, fault)
        yield Outcome(case.id, case.paths[0] if case.paths else Path(), "failed", fault.code, fault.reason)


def _some_of(queue: SimpleQueue[Any]) -> Iterator[Any]:
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


def do(job: Job, case: Case) -> Outcome:
    """Do one case in a process of a cluster, whose worker is made with the run's first case and kept."""
    name = repr(job)
    with _MAKING:
        if name not in _WORKERS:
            for other in list(_WORKERS):
                _WORKERS.pop(other).close()  # of an earlier run: its model need not stay in memory
            _WORKERS[name] = Worker(_on_device(job))
    try:
        return _WORKERS[name](case)
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
