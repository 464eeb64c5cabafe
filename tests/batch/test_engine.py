"""Processes: Dask's workers, signals, and kills at random moments.  Each test starts some, which takes seconds."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from volsal.batch import Run
from volsal.batch.engine import Dask, without_devices
from volsal.batch.status import status_of
from volsal.batch.worker import WorkerError
from volsal.config import ConfigError, load_config

pytest.importorskip("distributed", reason="workers need the extra 'cluster'")
_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "kill.py"
# Dask's own threads and sockets end when they end.
pytestmark = [pytest.mark.filterwarnings("ignore::ResourceWarning"), pytest.mark.slow]


@pytest.fixture(scope="module")
def kill():
    spec = importlib.util.spec_from_file_location("kill", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def heeding_signals():
    """What a terminal's processes do.  Those that a script starts in the background, as tests may be, ignore some."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def volsal(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "volsal", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeding_signals, **options,
    )  # fmt: skip


def test_workers_give_what_one_process_gives_and_a_case_that_kills_them_is_set_aside(config, accident, kill, tmp_path):
    path = config({"700": "die"}, batch={"attempts": 2})
    assert {o.status for o in Run(load_config(path)).execute()} == {"done"}
    accident("poison", 700)
    run = Run(load_config(path), tmp_path / "spread", workers=2)
    outcomes = {o.case: o for o in run.execute()}
    # "kept": it was done, and the word of it was lost with its worker.
    assert {o.status for case, o in outcomes.items() if case != "poison"} <= {"done", "kept"}
    assert sorted(outcomes) == ["a", "poison", "sub-b", "sub-c"]
    assert (outcomes["poison"].status, outcomes["poison"].code) == ("failed", "worker-lost")
    assert "2 processes died over this case" in outcomes["poison"].error
    assert len({o.worker for o in outcomes.values()} - {""}) >= 1
    spread = {name: digest for name, digest in kill.tree(tmp_path / "spread").items() if "poison" not in name}
    assert spread == kill.tree(tmp_path / "out")


def test_a_cluster_is_attached_to_by_address_and_a_worker_that_dies_loses_nothing(config, scan_file, tmp_path):
    from distributed import LocalCluster

    for number in range(12):
        scan_file(f"scans/more{number:02}.nii.gz", shape=(24, 24, 24))
    path = config()
    with LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address="127.0.0.1:0", memory_limit=0) as cluster:
        pids = [worker.process.pid for worker in cluster.workers.values()]
        told, ended = [], []
        for outcome in Run(load_config(path), scheduler=cluster.scheduler_address).watch(told=told.append):
            if outcome is not None:
                ended.append(outcome)
                if len(ended) == 2:
                    os.kill(pids[0], signal.SIGKILL)
    assert f"cluster at {cluster.scheduler_address}" in told[0]
    assert sorted(o.case for o in ended) == sorted(["a", "sub-b", "sub-c", *(f"more{n:02}" for n in range(12))])
    assert {o.status for o in ended} <= {"done", "kept"}


def test_no_scheduler_at_the_address_is_said(config, monkeypatch):
    import distributed

    real = distributed.Client
    monkeypatch.setattr(distributed, "Client", lambda address, **rest: real(address, **{**rest, "timeout": "1s"}))
    with pytest.raises(ConfigError, match="no Dask scheduler answers there"):
        list(Run(load_config(config()), scheduler="tcp://127.0.0.1:9").execute())


@pytest.mark.parametrize("address", ["nonsense", "node1:8786", "http://node1:8786", "tcp://node1"])
def test_what_is_no_address_is_said_at_once(config, address):
    with pytest.raises(ConfigError, match="not an address; a scheduler prints its own"):
        list(Run(load_config(config()), scheduler=address).execute())


def test_a_scheduler_that_goes_away_ends_the_run_and_blames_no_case(config, scan_file, tmp_path):
    for number in range(150):
        scan_file(f"scans/more{number:03}.nii.gz", shape=(24, 24, 24))
    path, where = config(), tmp_path / "scheduler.json"
    arguments = {
        "scheduler": ["--port", "0", "--dashboard-address", "127.0.0.1:0", "--host", "127.0.0.1"],
        "worker": ["--nthreads", "3"],
    }
    beside = ["--scheduler-file", str(where)]
    cluster = {
        role: subprocess.Popen(
            [sys.executable, "-c", f"from distributed.cli.dask_{role} import main; main()", *more, *beside],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for role, more in arguments.items()
    }
    try:
        _await(where.exists)
        run = Run(load_config(path), scheduler=json.loads(where.read_text())["address"])
        outcomes = run.execute()
        first = [next(outcomes), next(outcomes)]
        cluster["scheduler"].kill()
        with pytest.raises(WorkerError, match=r"scheduler no longer answers .* what is done is kept"):
            list(outcomes)
    finally:
        for process in cluster.values():
            process.kill()
            process.wait()
    found = status_of(run.folder)
    assert (found.ended, found.states["failed"], found.states["refused"]) == ("fault", 0, 0)
    assert len(first) <= found.states["done"] < 153


def test_a_run_that_is_ignorant_of_hangups_stays_so(config, tmp_path):
    script = "import signal, sys\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\nfrom volsal.cli import main\nmain()"
    command = [sys.executable, "-c", script, "run", str(config())]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _await(lambda: (tmp_path / "out" / "run.log.jsonl").exists())
    run.send_signal(signal.SIGHUP)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    assert "3 done" in out


def test_without_dask_the_extra_is_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"pip install 'volsal\[cluster\]'"):
        list(Run(load_config(config()), workers=2).execute())


def test_the_process_that_hands_out_needs_no_gpu(config):
    content = load_config(config(model={"factory": "net.py:build", "device": "cuda"}))
    run = Run(content, workers=2)
    assert without_devices(run.job).config.model.device == "cpu"
    assert run.job.config.model.device == "cuda"


def test_a_worker_that_sees_another_model_is_refused(config):
    run = Run(load_config(config()))
    engine = Dask(run.job, workers=1)
    wrong = {"weights": "0" * 64}
    with pytest.raises(Exception, match="this worker's weights is not that of the process which began the run"):
        list(replace(engine, job=replace(run.job, recipe=wrong)).outcomes(list(run.cases.values()), threading.Event()))


@pytest.mark.parametrize(
    ("number", "status", "workers"), [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 1), (signal.SIGHUP, 129, 1)]
)
def test_a_signal_finishes_what_is_in_work_and_says_how_to_go_on(config, scan_file, tmp_path, number, status, workers):
    for more in range(150):
        scan_file(f"scans/more{more:03}.nii.gz", shape=(24, 24, 24))
    run = volsal("run", config(), "--workers", workers, start_new_session=True)
    _await(lambda: len(list((tmp_path / "out").glob("*/case.json"))) >= 2)
    os.killpg(run.pid, number)  # as a terminal does it: to all processes
    out, err = run.communicate(timeout=60)
    assert run.returncode == status, err
    assert "finishing what is in work" in err
    assert "the same command takes the run up where it was" in out
    done = len(list((tmp_path / "out").glob("*/case.json")))
    assert 2 <= done < 153
    assert not list((tmp_path / "out").glob("*/.volsal-*"))
    events = [json.loads(line) for line in (tmp_path / "out" / "run.log.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "ended"
    assert events[-1]["by"] == signal.Signals(number).name
    assert events[-1]["states"] == {"done": done}


def test_a_second_signal_abandons(config, accident, tmp_path):
    accident("0hang", 700)
    run = volsal("run", config({"700": "hang"}))
    _await(lambda: (tmp_path / "out" / ".volsal" / "doing" / "0hang").exists())
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    time.sleep(0.7)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=20)
    assert run.returncode == 130
    assert not list((tmp_path / "out" / ".volsal" / "doing").iterdir()), "the user's will is no suspicion"


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments_and_resumed_every_case_is_there_once_and_the_same(kill, tmp_path, workers):
    """The short form of scripts/bench/kill.py."""
    config = kill.cohort(tmp_path, cases=12, size=16)
    assert kill.start(config, tmp_path / "undisturbed", 1).wait() == 0
    told = kill.disturb(config, tmp_path / "out", workers, kills=2, chance=random.Random(1), wait_s=0.4)
    assert told["exit"] == 0
    assert sum(told["killed"].values()) == 2
    assert told["killed"]["worker"] >= (workers > 1), "the seed is chosen so that a worker is hit"
    assert told["torn"] == []
    assert kill.tree(tmp_path / "out") == kill.tree(tmp_path / "undisturbed")
    assert len(kill.tree(tmp_path / "out")) == 12 * 3


def _await(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
