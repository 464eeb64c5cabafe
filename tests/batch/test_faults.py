"""What goes wrong with one case, and what becomes of the others."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import pytest

from volsal.batch import Run, worker
from volsal.batch.attempts import Attempts, Deaths
from volsal.batch.lock import LockedError, holder, locked
from volsal.batch.status import status_of
from volsal.batch.worker import Job, OverTimeError, StuckError, Worker, _Room, _Stage, is_out_of_memory
from volsal.config import ConfigError, load_config
from volsal.run_folder import Fault, RunFolder, RunFolderError
from volsal.scans.write import WriteError, replacing

mkdir = Path.mkdir


def execute(path, **options):
    run = Run(load_config(path), **options)
    return run, {outcome.case: outcome for outcome in run.execute()}


def statuses(outcomes):
    return {case: (o.status, o.code) for case, o in outcomes.items()}


SOUND = {"a": ("done", ""), "sub-b": ("done", ""), "sub-c": ("done", "")}


def test_done_refused_and_failed_add_up_to_the_inputs(config, accident, tmp_path, monkeypatch):
    accident("boom", 700)
    (tmp_path / "scans" / "bad.nii.gz").write_bytes(b"\x1f\x8b nonsense")
    real = Worker._read

    def broken(self, case, digests):
        return 1 / 0 if case.id == "sub-c" else real(self, case, digests)

    monkeypatch.setattr(Worker, "_read", broken)
    run, outcomes = execute(config({"700": "error"}))
    bad = {"boom": ("refused", "model"), "bad": ("refused", "scan"), "sub-c": ("failed", "error")}
    assert statuses(outcomes) == {**SOUND, **bad}
    assert "boom" in outcomes["boom"].error
    assert outcomes["sub-c"].error == "ZeroDivisionError: division by zero"
    found = status_of(run.folder)
    assert found.states == {"done": 2, "refused": 2, "failed": 1, "missing": 0}
    assert sum(found.states.values()) == found.cases == len(run.cases)
    assert found.codes == {"error": 1, "scan": 1, "model": 1}
    assert found.ended == "end"


def test_a_fault_is_kept_until_the_scan_changes_or_a_retry_is_asked_for(config, accident):
    accident("boom", 700)
    path = config({"700": "error"})
    execute(path)
    _, again = execute(path)
    assert (again["boom"].status, again["boom"].again) == ("refused", True)
    assert again["a"].status == "kept"
    _, retried = execute(path, retry_failed=True)
    assert (retried["boom"].status, retried["boom"].again) == ("refused", False)
    accident("boom", 1)
    run, mended = execute(path)
    assert mended["boom"].status == "done"
    assert run.folder.fault("boom") is None


def test_a_result_whose_scan_is_gone_for_a_while_comes_back_with_it(config, tmp_path):
    path = config(scans={"table": "t.csv"})
    (tmp_path / "t.csv").write_text("id,scan\na,scans/a.nii.gz\nb,scans/sub/b.nii.gz\n")
    execute(path)
    (tmp_path / "scans" / "a.nii.gz").rename(tmp_path / "away")
    run, outcomes = execute(path)
    assert statuses(outcomes) == {"a": ("refused", "scan"), "b": ("kept", "")}
    assert run.folder.state("a") == "refused"
    (tmp_path / "away").rename(tmp_path / "scans" / "a.nii.gz")
    run, outcomes = execute(path)
    assert statuses(outcomes) == {"a": ("kept", ""), "b": ("kept", "")}
    assert run.folder.state("a") == "done"


def test_out_of_memory_is_tried_once_more_one_method_at_a_time(config, accident, monkeypatch):
    accident("big", 700)
    run, outcomes = execute(config({"700": "memory"}))
    assert outcomes["big"].status, outcomes["big"].code == ("failed", "memory")
    assert "also with one method at a time" in outcomes["big"].error
    assert statuses({k: v for k, v in outcomes.items() if k != "big"}) == SOUND

    from volsal.explain import Explainer

    real, asked = Explainer.answer, []

    def short_of_memory(self, ready, *, lean=False, **rest):
        asked.append((ready.case, lean))
        if ready.case == "big" and not lean:
            raise MemoryError
        return real(self, ready, lean=lean, **rest)

    monkeypatch.setattr(Explainer, "answer", short_of_memory)
    run, outcomes = execute(config(), output=run.folder.path.with_name("second"))
    assert outcomes["big"].status == "done"
    assert run.folder.record("big")["provenance"]["lean"] is True
    assert run.folder.record("a")["provenance"]["lean"] is False
    assert [lean for case, lean in asked if case == "big"] == [False, True]


def test_lean_and_usual_maps_agree(config):
    import numpy as np

    path = config(methods=["grad-cam", "guided-grad-cam", {"occlusion": {"box_mm": 12, "batch": 4}}])
    explainer = Job(load_config(path), path.parent).explainer()
    ready = explainer.prepare(path.parent / "scans" / "a.nii.gz")
    usual, lean = (explainer.carry(explainer.answer(ready, lean=lean)) for lean in (False, True))
    for one, other in zip(usual.maps, lean.maps, strict=True):
        assert one.name == other.name
        np.testing.assert_allclose(one.values, other.values, rtol=1e-4, atol=1e-6 * abs(one.values).max())


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory of things past"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_one):
    assert is_out_of_memory(error) is is_one
    wrapped = ValueError("while reading")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped) is is_one


def test_a_case_that_hangs_is_stopped_and_the_others_go_on(config, accident):
    accident("slow", 700)
    _, outcomes = execute(config({"700": "hang"}), time_limit=1 / 60)
    assert statuses(outcomes) == {**SOUND, "slow": ("failed", "time-limit")}
    assert "took longer than 1 s to compute" in outcomes["slow"].error


@pytest.mark.parametrize("holds", [False, True])
def test_a_stage_that_hangs_outside_of_python_is_given_up(monkeypatch, holds):
    monkeypatch.setattr("volsal.batch.worker._GRACE_S", 0.2)
    stage, release = _Stage("read", holds), threading.Event()
    waiting, begun = [], []

    def next_one():
        try:
            waiting.append(stage.run(lambda: begun.append(1) or 5, 10)[0])
        except StuckError as error:
            waiting.append(error)

    other = threading.Thread(target=next_one)
    try:
        threading.Timer(0.05, other.start).start()  # waits for its turn while the first one hangs
        with pytest.raises(OverTimeError, match=r"longer than 0\.1 s to read.*could not be stopped"):
            stage.run(release.wait, 0.1)  # a wait without an end is not interrupted by an exception
        other.join(10)
        if holds:
            assert begun == [], "it would hang as well, and be blamed for it"
            assert "a case that took too long to read cannot be stopped" in str(waiting[0])
        else:
            assert waiting == [5]
    finally:
        release.set()


def test_a_stage_passes_on_what_its_work_raises():
    stage = _Stage("read", holds=True)
    with pytest.raises(TimeoutError, match="the file server"):
        stage.run(lambda: (_ for _ in ()).throw(TimeoutError("the file server")), 10)
    with pytest.raises(OverTimeError):
        stage.run(lambda: [threading.Event().wait(0.01) for _ in range(10**6)], 0.1)
    assert stage.run(lambda: 5, 10)[0] == 5
    stage.close()


def test_work_that_deals_with_being_stopped_gives_no_result_and_no_other_error():
    stage = _Stage("write", holds=True)

    def takes_it_for_its_own():
        try:
            while True:
                threading.Event().wait(0.01)
        except Exception:  # noqa: BLE001 - as code does that has a second way
            return "by the second way"

    def as_files_are_written(folder):
        with replacing(folder / "map"):
            while True:
                threading.Event().wait(0.01)

    for work in (takes_it_for_its_own, partial(as_files_are_written, Path(mkdtemp()))):
        with pytest.raises(OverTimeError, match=r"longer than 0\.1 s to write"):
            stage.run(work, 0.1)
    stage.close()


def test_a_process_can_end_although_something_in_it_hangs_for_good(tmp_path):
    code = (
        "import threading\nfrom volsal.batch import worker\nworker._GRACE_S = 0.1\n"
        "lock = threading.Lock()\nlock.acquire()\n"
        "try:\n    worker._Stage('compute', True).run(lock.acquire, 0.1)\nexcept worker.OverTimeError:\n    print('on')"
    )
    ended = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "on\n"), ended.stderr


def test_what_hangs_while_it_is_read_is_not_read_without_a_limit_to_record_it(config, monkeypatch):
    path, real = config(), worker.digests_of

    def hangs(case):
        while case.id == "a":
            threading.Event().wait(0.01)
        return real(case)

    def hanging_read(self, case, digests):
        return hangs(case) and real_read(self, case, digests)

    real_read = Worker._read
    monkeypatch.setattr("volsal.batch.earlier.digests_of", hangs)
    monkeypatch.setattr(worker, "digests_of", hangs)
    monkeypatch.setattr(Worker, "_read", hanging_read)
    run, outcomes = execute(path, time_limit=0.5 / 60)
    assert statuses(outcomes) == {**SOUND, "a": ("failed", "time-limit")}
    assert run.folder.fault("a").key == "", "it is tried again the next time"


def test_a_look_that_hangs_costs_its_own_case_alone_and_what_it_finds_later_does_not_count(config, monkeypatch):
    run, _ = execute(config())
    release, through = threading.Event(), threading.Event()
    real, look = worker.digests_of, Worker._look

    def hangs(case):
        if case.id == "sub-b":
            with suppress(BaseException):  # as code does that takes being stopped for its own affair
                release.wait()
        return real(case)

    def looked(*given):
        try:
            return look(*given)
        finally:
            through.set()

    monkeypatch.setattr("volsal.batch.earlier.digests_of", hangs)
    monkeypatch.setattr(worker, "_GRACE_S", 0.2)
    monkeypatch.setattr(worker, "_HANDFUL_S", 60.0)
    monkeypatch.setattr(Worker, "_look", looked)
    doer, waiting = Worker(replace(run.job, time_limit_s=0.5)), deque(run.cases.values())
    outcomes = doer.next_of(waiting)
    assert next(outcomes).case == "a"
    release.set()
    assert through.wait(10), "by now the look that was given up has found the other two"
    ended = [*outcomes, *doer.next_of(waiting)]
    assert [(o.case, o.status, o.code) for o in ended] == [("sub-b", "failed", "time-limit"), ("sub-c", "kept", "")]
    assert not waiting


# One ends where a case is to be done, when it is full, and when its time is up.
@pytest.mark.parametrize("number", [2, 3])
def test_a_look_that_ends_just_after_its_time_is_its_own_cases_fault_and_no_others(config, monkeypatch, number):
    run, _ = execute(config())
    real = worker.digests_of

    def lasts(case):
        with suppress(BaseException):  # it is stopped, goes on all the same, and is through within the grace
            while case.id == "sub-b":
                threading.Event().wait(0.01)
        return real(case)

    monkeypatch.setattr("volsal.batch.earlier.digests_of", lasts)
    monkeypatch.setattr(worker, "_HANDFUL_S", 0.3)
    doer, waiting = Worker(replace(run.job, time_limit_s=0.6)), deque(list(run.cases.values())[:number])
    ended = []
    while waiting:
        ended += doer.next_of(waiting)
    rest = [("sub-c", "kept", "")][: number - 2]
    assert [(o.case, o.status, o.code) for o in ended] == [
        ("a", "kept", ""), ("sub-b", "failed", "time-limit"), *rest
    ]  # fmt: skip
    assert RunFolder(run.folder.path).fault("sub-c") is None


def test_what_ends_the_run_keeps_the_other_threads_from_further_cases(config, scan_file, monkeypatch):
    for number in range(12):
        scan_file(f"scans/more{number:02}.nii.gz", shape=(12, 14, 10))
    begun, real = [], Worker._begun

    def full(self, case, digests):
        begun.append(case.id)
        if case.id == "a":
            raise WriteError("the disk is full")
        threading.Event().wait(0.3)
        return real(self, case, digests)

    monkeypatch.setattr(Worker, "_begun", full)
    with pytest.raises(WriteError, match="the disk is full"):
        execute(config())
    assert len(begun) <= 4


def test_an_exit_in_a_look_is_of_one_case(config, monkeypatch):
    execute(config())
    real = worker.digests_of
    monkeypatch.setattr("volsal.batch.earlier.digests_of", lambda c: sys.exit(3) if c.id == "sub-b" else real(c))
    assert statuses(execute(config())[1]) == {
        "a": ("kept", ""), "sub-b": ("failed", "error"), "sub-c": ("kept", "")
    }  # fmt: skip


@pytest.mark.parametrize(("handful", "seconds", "number_of_looks"), [(64, 60.0, 2), (4, 60.0, 4), (64, 0.0, 10)])
def test_kept_cases_are_looked_at_by_the_handful_and_each_is_told_once(
    config, scan_file, monkeypatch, handful, seconds, number_of_looks
):
    for number in range(7):
        scan_file(f"scans/more{number}.nii.gz", shape=(12, 14, 10))
    _, done = execute(config())
    monkeypatch.setattr(worker, "_HANDFUL", handful)
    monkeypatch.setattr(worker, "_HANDFUL_S", seconds)
    looks, look = [], Worker._look
    monkeypatch.setattr(
        Worker, "_look", lambda self, cases, *made: looks.append(len(cases)) or look(self, cases, *made)
    )
    scan_file("scans/more3.nii.gz", shape=(12, 14, 11))
    outcomes = list(Run(load_config(config())).execute())
    assert sorted(outcome.case for outcome in outcomes) == sorted(done)
    assert {o.case for o in outcomes if o.status == "done"} == {"more3"}
    assert len([size for size in looks if size]) == number_of_looks


def test_an_exit_that_the_users_own_code_asks_for_is_of_one_case(config, monkeypatch):
    real = Worker._read

    def leaves(self, case, digests):
        return sys.exit("no such case in my list") if case.id == "a" else real(self, case, digests)

    monkeypatch.setattr(Worker, "_read", leaves)
    _, outcomes = execute(config())
    assert statuses(outcomes) == {**SOUND, "a": ("failed", "error")}
    assert outcomes["a"].error == "SystemExit: no such case in my list"


def test_a_case_folder_that_is_taken_away_while_it_is_written_costs_that_case_alone(config, monkeypatch):
    import volsal.explanation

    real = volsal.explanation.write_map

    def taken_away(path, *rest):
        if path.parent.name == "a":
            with replacing(path):
                shutil.rmtree(path.parent)
        return real(path, *rest)

    monkeypatch.setattr("volsal.explanation.write_map", taken_away)
    path = config()
    _, outcomes = execute(path)
    assert statuses(outcomes) == {**SOUND, "a": ("refused", "write")}
    monkeypatch.setattr("volsal.explanation.write_map", real)
    assert execute(path, retry_failed=True)[1]["a"].status == "done"


def test_errors_that_name_each_other_as_their_cause_are_looked_at_once():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)


@pytest.mark.parametrize("place", ["doing", "lock"])
def test_a_disk_that_refuses_a_note_or_the_lock_is_named(config, tmp_path, monkeypatch, place):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if place == "doing":
        monkeypatch.setattr(
            Path, "mkdir", lambda self, *a, **k: full() if self.name == "doing" else mkdir(self, *a, **k)
        )
    else:
        monkeypatch.setattr("volsal.batch.lock.os.pwrite", full)
    with pytest.raises(WriteError, match=f"{place}.*: could not be written: No space left on device"):
        execute(config())
    monkeypatch.undo()
    assert statuses(execute(config())[1]) == SOUND


def test_where_the_file_system_knows_no_locks_a_beat_counts(config, tmp_path, monkeypatch):
    import socket

    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("volsal.batch.lock.fcntl.flock", unknown)
    path = config()
    assert statuses(execute(path)[1]) == SOUND, "no lock at all is no other run"
    left = tmp_path / "out" / ".volsal" / "lock"
    left.write_text(json.dumps({"host": socket.gethostname(), "pid": 4194304, "since": "2026-01-01"}))
    assert holder(tmp_path / "out").pid == 4194304
    with pytest.raises(LockedError, match="may be at work in it"):
        execute(path)
    os.utime(left, (1, 1))
    assert holder(tmp_path / "out") is None
    assert {o.status for o in execute(path)[1].values()} == {"kept"}


def test_who_asks_whether_a_run_is_at_work_does_not_keep_it_from_beginning(config, tmp_path):
    import fcntl

    path = config()
    execute(path)
    with (tmp_path / "out" / ".volsal" / "lock").open("rb") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.03, fcntl.flock, (asking, fcntl.LOCK_UN)).start()
        with locked(tmp_path / "out"):
            pass


RECORD = {"provenance": {}, "prediction": {}, "notes": [], "maps": []}


@pytest.mark.parametrize(
    "damage", [{"provenance": []}, {"maps": [None]}, {"maps": [{"file": "a.nii.gz"}]}, {"notes": None}, {"maps": {}}]
)
def test_a_record_that_is_none_of_ours_is_made_anew_and_costs_no_command(config, tmp_path, damage):
    path = config()
    execute(path)
    folder = RunFolder(tmp_path / "out")
    (tmp_path / "out" / "a" / "case.json").write_text(json.dumps(RECORD))
    assert folder.record("a"), "or the damage below would not be what counts"
    (tmp_path / "out" / "a" / "case.json").write_text(json.dumps(RECORD | damage))
    assert folder.record("a") is None
    assert "a,missing" in folder.collect().read_text()
    assert statuses(execute(path)[1]) == {"a": ("done", ""), "sub-b": ("kept", ""), "sub-c": ("kept", "")}


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"cases": [1]}', '{"cases": {"a": 3}}', '{"cases": null}'])
def test_damaged_inputs_cost_no_result(config, tmp_path, damage):
    path = config()
    execute(path)
    (tmp_path / "out" / "inputs.json").write_text(damage)
    (tmp_path / "out" / "run.json").write_text(damage)
    found = status_of(RunFolder.existing(tmp_path / "out"))
    assert found.states["done"] == found.cases == 3
    assert len(RunFolder(tmp_path / "out").collect().read_text().splitlines()) == 4
    assert {o.status for o in execute(path)[1].values()} == {"kept"}
    assert set(RunFolder(tmp_path / "out").inputs()) == set(SOUND)


def test_status_tells_how_far_a_run_is_that_makes_everything_anew(config, monkeypatch):
    import volsal.explanation

    execute(config())
    run = Run(load_config(config(methods=["hires-cam"])))
    may_write, seen, amid = threading.Semaphore(1), [], []
    write, write_map = Worker._write, volsal.explanation.write_map

    def in_turn(*arguments):
        # Or the next case would be half written, or not, while the one before is looked at.
        may_write.acquire(timeout=30)
        return write(*arguments)

    def looked_at(*arguments):
        amid.append(status_of(run.folder).states)
        return write_map(*arguments)

    monkeypatch.setattr(Worker, "_write", in_turn)
    monkeypatch.setattr("volsal.explanation.write_map", looked_at)
    for _ in run.execute():
        seen.append(status_of(run.folder))
        may_write.release()
    assert [found.through for found in seen] == [1, 2, 3]
    assert {found.states["done"] for found in seen} == {3}, "results that are there, of which settings ever"
    assert seen[0].left_s > 0
    # What is being written anew is neither the old result any more nor the new one yet.
    assert amid == [{"done": 2, "refused": 0, "failed": 0, "missing": 1}] * 3


def test_results_do_not_go_into_the_scans_own_folder(config, scan_file, tmp_path):
    scan_file("scans/p1/p1.nii.gz", shape=(12, 14, 10))
    path = config(scans={"table": "t.csv"}, output="scans")
    (tmp_path / "t.csv").write_text("id,scan\np1,scans/p1/p1.nii.gz\n")
    with pytest.raises(ConfigError, match=r"the results of p1 would lie among its scan's own files in .*scans/p1"):
        Run(load_config(path))
    assert Run(load_config(path), tmp_path / "out").cases.keys() == {"p1"}


@pytest.mark.parametrize("scans", [{"folder": "."}, {"files": ["**/*.nii.gz"]}])
def test_what_a_killed_run_left_unfinished_is_no_scan(config, tmp_path, scans):
    path = config(scans=scans, output="out")
    found = set(execute(path)[1])
    assert len(found) == 3
    for record in (tmp_path / "out").glob("*/case.json"):
        record.unlink()  # the maps are left
    assert set(execute(path)[1]) == found


def test_notes_that_differ_from_case_to_case_do_not_fill_the_screen(config, capsys):
    from volsal.batch import Tally
    from volsal.cli.runs import _summary

    tally = Tally()
    tally.notes.update(f"corner {n} mm off" for n in range(30))
    _summary(Run(load_config(config())), tally, Path("cases.csv"))
    told = capsys.readouterr().out
    assert told.count("mm off") == 10
    assert "and 20 other notes" in told


def test_one_who_is_alone_has_nobody_beside(tmp_path):
    room, inside, most, lonely = _Room(), [], [], []

    def visit(alone):
        with room.alone() if alone else room.beside_others():
            inside.append(alone)
            most.append(len(inside))
            lonely.append(not alone or len(inside) == 1)
            threading.Event().wait(0.005)
            if not alone and len(most) % 3 == 0:
                inside.remove(alone)  # it gives its place up until it is alone
                with room.alone_instead():
                    inside.append(alone)
                    lonely.append(len(inside) == 1)
            inside.remove(alone)

    threads = [threading.Thread(target=visit, args=(n % 4 == 0,)) for n in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert all(lonely)
    assert max(most) > 1


def test_a_case_over_which_processes_died_goes_last_and_alone_and_is_set_aside_after_three(config):
    path = config(batch={"attempts": 3})
    run = Run(load_config(path))
    attempts = Attempts(run.folder.path)
    attempts.begin("a", Deaths())
    assert attempts.of("a") == Deaths(beside=1)
    # It is handed out last; which of the last few is through first is for the threads that do them.
    assert [case.id for case in run._in_order()] == ["sub-b", "sub-c", "a"]
    _, outcomes = execute(path)
    assert statuses(outcomes) == SOUND
    assert outcomes["a"].status == "done"
    assert attempts.suspects() == {}
    for _ in range(4):
        attempts.begin("sub-b", attempts.of("sub-b"))
    assert attempts.of("sub-b") == Deaths(beside=1, alone=3)
    path = config(methods=["hires-cam"], batch={"attempts": 3})
    told = []
    run = Run(load_config(path))
    outcomes = {o.case: o for o in run.watch(told=told.append) if o}
    assert told == ["sub-b: processes died over this case, 3 with no other beside it; it goes last"]
    assert statuses(outcomes) == {**SOUND, "sub-b": ("failed", "worker-lost")}
    assert "3 processes died over this case" in outcomes["sub-b"].error
    _, outcomes = execute(path)
    assert outcomes["sub-b"].again
    _, outcomes = execute(path, retry_failed=True)
    assert outcomes["sub-b"].status == "done"


def test_two_runs_on_one_folder_are_refused(config, tmp_path):
    path = config()
    with locked(tmp_path / "out"):
        assert holder(tmp_path / "out").pid == os.getpid()
        with pytest.raises(LockedError, match=f"another run is at work in it \\(process {os.getpid()} on"):
            execute(path)
    assert holder(tmp_path / "out") is None
    assert statuses(execute(path)[1]) == SOUND


def test_a_lock_left_by_a_process_that_died_is_taken_over_with_a_word(config, tmp_path):
    import socket

    left = tmp_path / "out" / ".volsal" / "lock"
    left.parent.mkdir(parents=True)
    left.write_text(json.dumps({"host": socket.gethostname(), "pid": 4194304, "since": "2026-01-01"}))
    told = []
    run = Run(load_config(config()))
    assert len([o for o in run.watch(told=told.append) if o]) == 3
    assert "did not end by itself (process 4194304" in told[0]


def test_a_lock_of_another_machine_counts_while_it_was_heard_of_lately(config, tmp_path):
    left = tmp_path / "out" / ".volsal" / "lock"
    left.parent.mkdir(parents=True)
    left.write_text(json.dumps({"host": "node7", "pid": 1, "since": "2026-01-01"}))
    with pytest.raises(LockedError, match=r"another run may be at work in it \(process 1 on node7"):
        execute(config())
    os.utime(left, (1, 1))
    assert statuses(execute(config())[1]) == SOUND


def test_stopping_ends_what_is_in_work_and_the_next_run_does_the_rest(config, scan_file):
    for number in range(12):
        scan_file(f"scans/more{number:02}.nii.gz", shape=(12, 14, 10))
    run = Run(load_config(config()))
    ended = []
    for outcome in run.execute():
        ended.append(outcome)
        run._stopping.set()
    assert 1 <= len(ended) <= 4
    assert all(outcome.status == "done" for outcome in ended)
    assert status_of(run.folder).states["missing"] == 15 - len(ended)
    assert {o.status for o in Run(load_config(config())).execute()} == {"kept", "done"}


def test_a_file_that_changes_while_it_is_read_is_refused(config, scan_file, monkeypatch):
    execute(config(methods=["hires-cam"]))  # so that the files are digested before they are read
    real = Worker._read

    def rewritten(self, case, digests):
        if case.id == "a":
            scan_file("scans/a.nii.gz", shape=(12, 14, 11))
        return real(self, case, digests)

    monkeypatch.setattr(Worker, "_read", rewritten)
    _, outcomes = execute(config())
    assert statuses(outcomes) == {**SOUND, "a": ("refused", "changed")}
    assert "changed while it was being read" in outcomes["a"].error


def test_a_process_that_died_after_a_case_was_done_leaves_it_unsuspected(config):
    path = config()
    run, _ = execute(path)
    attempts = Attempts(run.folder.path)
    attempts.begin("a", Deaths())  # what is left where the note was not yet removed
    assert execute(path)[1]["a"].status == "kept"
    assert attempts.suspects() == {}


def test_leftovers_of_a_killed_process_are_swept(config, tmp_path):
    path = config()
    execute(path)
    torn = tmp_path / "out" / "a" / ".volsal-abc_map.nii.gz"
    torn.write_bytes(b"half")
    execute(path)
    assert not torn.exists()


def test_the_log_names_cases_and_no_files(config, accident, tmp_path):
    accident("Doe^Jane_19700101", 700)
    path = config({"700": "error"}, scans={"table": "t.csv"})
    (tmp_path / "t.csv").write_text("id,scan\na,scans/Doe^Jane_19700101.nii.gz\nb,Roe^Jim/gone.nii.gz\n")
    run, outcomes = execute(path)
    assert statuses(outcomes) == {"a": ("refused", "model"), "b": ("refused", "scan")}
    assert "Roe^Jim" in outcomes["b"].error, "or there would be nothing to keep out of the log"
    log = (tmp_path / "out" / "run.log.jsonl").read_text()
    assert not any(name in log for name in ("Doe", "Roe", str(tmp_path)))
    events = list(run.folder.events())
    assert [e["event"] for e in events] == ["began", "case", "case", "ended"]
    assert [e["code"] for e in events[1:3]] == [outcomes[e["case"]].code for e in events[1:3]]


def test_a_log_line_that_finds_no_room_to_its_end_is_told(tmp_path):
    log = RunFolder(tmp_path).log
    log("began", cases=3)
    size = (tmp_path / "run.log.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, before[1]))
    try:
        with pytest.raises(WriteError, match=r"run\.log\.jsonl: could not be written to the end; is the disk full"):
            log("case", case="a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [event["event"] for event in RunFolder(tmp_path).events()] == ["began"]


def test_a_log_line_that_was_cut_off_is_passed_over(config, tmp_path):
    run, _ = execute(config())
    before = len(list(run.folder.events()))
    with (tmp_path / "out" / "run.log.jsonl").open("a") as log:
        log.write('{"time": "2026-')
    assert len(list(run.folder.events())) == before
    assert status_of(run.folder).states["done"] == 3


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(RunFolderError, match="not a run folder"):
        RunFolder.existing(tmp_path)


def test_the_thread_count_of_a_run_stays_when_workers_change(config, tmp_path):
    content = load_config(config(threads=None))
    first = Run(content, workers=1)
    list(first.execute())
    assert Run(content, workers=64).job.threads == first.job.threads
    assert Run(content, output=tmp_path / "other", workers=64).job.threads == 1


def test_a_fault_outweighs_an_earlier_result(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "case.json").write_text('{"provenance": {}, "prediction": {}, "maps": []}')
    assert folder.state("a") == "done"
    folder.write_fault("a", Fault("failed", "error", "broke"))
    assert folder.state("a") == "failed"
    folder.clear("a")
    assert folder.state("a") == "done"
    assert folder.state("b") == "missing"
