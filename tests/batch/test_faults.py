"""What goes wrong with one case, and what becomes of the others."""

import json
import os
import threading

import pytest

from volsal.batch import Run
from volsal.batch.attempts import Attempts, Deaths
from volsal.batch.lock import LockedError, holder, locked
from volsal.batch.status import status_of
from volsal.batch.worker import Job, OverTimeError, StuckError, Worker, _Room, _Stage, is_out_of_memory
from volsal.config import load_config
from volsal.run_folder import Fault, RunFolder, RunFolderError, without_names


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


def test_a_stage_that_hangs_outside_of_python_is_given_up(monkeypatch):
    monkeypatch.setattr("volsal.batch.worker._GRACE_S", 0.2)
    stage, release = _Stage("read"), threading.Event()
    try:
        with pytest.raises(StuckError, match=r"longer than 0\.1 s to read.*cannot be stopped"):
            stage.run(release.wait, 0.1)  # a wait without an end is not interrupted by an exception
        assert stage.run(lambda: 5, 10)[0] == 5
    finally:
        release.set()


def test_a_stage_passes_on_what_its_work_raises():
    stage = _Stage("read")
    with pytest.raises(TimeoutError, match="the file server"):
        stage.run(lambda: (_ for _ in ()).throw(TimeoutError("the file server")), 10)
    with pytest.raises(OverTimeError):
        stage.run(lambda: [threading.Event().wait(0.01) for _ in range(10**6)], 0.1)
    assert stage.run(lambda: 5, 10)[0] == 5


def test_one_who_is_alone_has_nobody_beside(tmp_path):
    room, inside, most, lonely = _Room(), [], [], []

    def visit(alone):
        with room.alone() if alone else room.beside_others():
            inside.append(alone)
            most.append(len(inside))
            lonely.append(not alone or len(inside) == 1)
            threading.Event().wait(0.005)
            if not alone and len(most) % 3 == 0:
                with room.alone_instead():
                    lonely.append(True)
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
    path = config()
    run = Run(load_config(path))
    attempts = Attempts(run.folder.path)
    attempts.begin("a", Deaths())
    assert attempts.of("a") == Deaths(beside=1)
    _, outcomes = execute(path)
    assert list(outcomes)[-1] == "a"
    assert outcomes["a"].status == "done"
    assert attempts.suspects() == {}
    for _ in range(4):
        attempts.begin("sub-b", attempts.of("sub-b"))
    assert attempts.of("sub-b") == Deaths(beside=1, alone=3)
    path = config(methods=["hires-cam"])
    _, outcomes = execute(path)
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


def test_leftovers_of_a_killed_process_are_swept(config, tmp_path):
    path = config()
    execute(path)
    torn = tmp_path / "out" / "a" / ".volsal-abc_map.nii.gz"
    torn.write_bytes(b"half")
    execute(path)
    assert not torn.exists()


def test_the_log_names_cases_and_no_files(config, accident, tmp_path):
    accident("Doe^Jane_19700101", 700)
    run, _ = execute(config({"700": "error"}))
    log = (tmp_path / "out" / "run.log.jsonl").read_text()
    assert "Doe^Jane" not in log
    assert str(tmp_path) not in log
    events = list(run.folder.events())
    assert [e["event"] for e in events] == ["began", *["case"] * 4, "ended"]
    assert without_names("/x/y/Doe.nii: broken", [tmp_path / "Doe.nii"]) == "/x/y/the scan: broken"


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
