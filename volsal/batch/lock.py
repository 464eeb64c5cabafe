"""One run at a time in a run folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread

from volsal.errors import VolsalError
from volsal.run_folder import OWN
from volsal.scans.write import WriteError

# A holder on another machine whose lock file was not touched for this long, by the file server's clock, is gone.
_SILENT_S = 150.0
_BEAT_S = 30.0


class LockedError(VolsalError, RuntimeError):
    """Another run is at work in the folder."""


@dataclass(frozen=True)
class Holder:
    """Who works in a run folder."""

    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def locked(folder: Path) -> Iterator[Holder | None]:
    """Hold the run folder for the block; yields the holder of a lock that was found stale and taken over, or None.

    The lock is the operating system's (``flock``), which ends with the process however that ends.  On a shared file
    system it may not reach other machines: there the holder touches the file every half minute, and one that was
    silent for two and a half minutes counts as gone.

    Raises
    ------
    LockedError
        Where another run holds the folder; it says who.
    WriteError
        Where the folder cannot be written.
    """
    path = folder / OWN / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise WriteError(f"{folder}: cannot write there: {error.strerror or error}") from error
    try:
        before = _holder(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LockedError(f"{folder}: another run is at work in it ({before or 'it does not say who'})") from error
        if before and before.host != socket.gethostname() and _age_s(path) < _SILENT_S:
            raise LockedError(
                f"{folder}: another run may be at work in it ({before}, heard of less than {_SILENT_S:.0f} s ago); "
                "if it is gone, wait that long and try again"
            )
        own = Holder(socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))
        os.ftruncate(file, 0)
        os.pwrite(file, (json.dumps(asdict(own)) + "\n").encode(), 0)
        ended = Event()
        Thread(target=_beat, args=(path, ended), name="volsal-lock", daemon=True).start()
        try:
            yield before
        finally:
            ended.set()
            os.ftruncate(file, 0)  # nobody's; the file stays, since removing it would race with the next one's open
    finally:
        os.close(file)


def holder(folder: Path) -> Holder | None:
    """Who is at work in the run folder; None where nobody is, or where it was left behind by a process that died."""
    path = folder / OWN / "lock"
    found = _holder(path)
    if found is None:
        return None
    if found.host != socket.gethostname():
        return found if _age_s(path) < _SILENT_S else None
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return found
    return None


def _holder(path: Path) -> Holder | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Holder(str(content["host"]), int(content["pid"]), str(content["since"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _age_s(path: Path) -> float:
    """Seconds since the file was touched, by the clock of where it lies; this machine's may be another time."""
    clock = path.with_name("clock")
    try:
        clock.touch()
        now = clock.stat().st_mtime
    except OSError:  # one who may only look
        now = time.time()
    return now - path.stat().st_mtime


def _beat(path: Path, ended: Event) -> None:
    while not ended.wait(_BEAT_S):
        try:
            os.utime(path)
        except OSError:
            return  # the folder is gone, and with it what the lock was for
