"""One run at a time in a run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
# One who asks who is at work holds the lock for a moment: that is no run.
_ASKED, _PAUSE_S = 5, 0.02


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
    system it may not reach other machines, or not be known at all: there the holder touches the file every half minute,
    and one that was silent for two and a half minutes counts as gone.

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
        free = _flock(file, fcntl.LOCK_EX)
        if free is False:
            raise LockedError(f"{folder}: another run is at work in it ({before or 'it does not say who'})")
        if before and (free is None or before.host != socket.gethostname()) and _age_s(path) < _SILENT_S:
            raise LockedError(
                f"{folder}: another run may be at work in it ({before}, heard of less than {_SILENT_S:.0f} s ago); "
                "if it is gone, wait that long and try again"
            )
        own = Holder(socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, (json.dumps(asdict(own)) + "\n").encode(), 0)
        except OSError as error:
            raise WriteError(f"{path}: could not be written: {error.strerror or error}") from error
        ended = Event()
        Thread(target=_beat, args=(path, ended), name="volsal-lock", daemon=True).start()
        try:
            yield before
        finally:
            ended.set()
            # Nobody's; the file stays, since removing it would race with the next one's open.  Where its disk is gone,
            # that is told by what ended the run.
            with suppress(OSError):
                os.ftruncate(file, 0)
    finally:
        os.close(file)


def holder(folder: Path) -> Holder | None:
    """Who is at work in the run folder; None where nobody is, or where it was left behind by a process that died."""
    path = folder / OWN / "lock"
    found = _holder(path)
    if found is None:
        return None
    free = None
    if found.host == socket.gethostname():
        with path.open("rb") as file:
            free = _flock(file.fileno(), fcntl.LOCK_SH)
    if free is None:
        free = _age_s(path) >= _SILENT_S
    return None if free else found


def _flock(file: int, kind: int) -> bool | None:
    """Take the system's lock if it is free, and say whether it was; None where the file system knows no locks."""
    for _ in range(_ASKED):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            time.sleep(_PAUSE_S)
        else:
            return True
    return False


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
        with suppress(OSError):  # a file server that is away for a while must hear of it again
            os.utime(path)
