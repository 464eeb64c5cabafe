import shutil
import subprocess

import pytest

from volsal.environment import _commit, environment


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A function that asks git something, in a checkout with one file."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "none"))

    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        done = subprocess.run(["git", "-C", str(tmp_path), *who, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "code.py").write_text("1\n")
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    git("tag", "v1")
    return git


def test_the_commit_of_a_checkout_and_whether_its_files_are_still_that(checkout, tmp_path):
    commit = checkout("rev-parse", "HEAD")
    assert _commit(tmp_path) == commit
    (tmp_path / "new.py").write_text("")  # nothing that the commit knows
    assert _commit(tmp_path) == commit
    (tmp_path / "code.py").write_text("2\n")
    assert _commit(tmp_path) == f"{commit}-dirty"


def test_no_checkout_no_commit_yet_and_no_git_are_no_errors(checkout, tmp_path, monkeypatch):
    (tmp_path / "plain").mkdir()
    assert _commit(tmp_path / "plain") is None, "a folder in somebody's checkout is not volsal's own"
    checkout("update-ref", "-d", "HEAD")
    assert _commit(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert _commit(tmp_path) is None


def test_settings_are_told_as_they_are_now(monkeypatch):
    import torch

    before = environment()
    assert before["numerics"]["cudnn_benchmark"] is torch.backends.cudnn.benchmark
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    assert environment()["numerics"]["cudnn_benchmark"] is not before["numerics"]["cudnn_benchmark"]
