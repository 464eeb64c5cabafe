"""Work in a background thread: progress while it lasts, and at the end a result, a fault in one line, or neither."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from napari.qt.threading import create_worker
from qtpy.QtCore import QObject, Signal

from volsal.errors import VolsalError

Progress = Callable[[str, int, int], None]

_log = logging.getLogger(__name__)


class _Cancelled(Exception):
    """Raised where progress is reported, once the work is not wanted any more."""


class Job(QObject):
    """One piece of work at a time.

    Parameters
    ----------
    parent : the widget it is for; with it the work ends
    work : given a function to report progress with, which also ends the work early once :meth:`cancel` was called
    """

    progressed = Signal(str, int, int)
    succeeded = Signal(object)
    #: Of a fault: one line.
    failed = Signal(str)
    cancelled = Signal()

    def __init__(self, parent: QObject, work: Callable[[Progress], Any]) -> None:
        super().__init__(parent)
        self._unwanted = False
        self._worker = create_worker(work, self._report, _start_thread=False, _ignore_errors=True)
        self._worker.returned.connect(self._returned)
        self._worker.errored.connect(self._errored)
        parent.destroyed.connect(self.cancel)

    def start(self) -> Job:
        """Begin; return at once."""
        self._worker.start()
        return self

    def cancel(self) -> None:
        """End the work at its next report of progress; a result that comes all the same is dropped."""
        self._unwanted = True

    def _report(self, what: str, done: int, of: int) -> None:
        if self._unwanted:
            raise _Cancelled
        self.progressed.emit(what, done, of)

    def _returned(self, result: Any) -> None:
        if self._unwanted:
            self.cancelled.emit()
        else:
            self.succeeded.emit(result)

    def _errored(self, error: Exception) -> None:
        if self._unwanted or isinstance(error, _Cancelled):
            self.cancelled.emit()
            return
        if not isinstance(error, VolsalError):
            _log.error("unexpected %s", type(error).__name__, exc_info=error)
        self.failed.emit(in_one_line(error))


def in_one_line(error: Exception) -> str:
    """What to tell of an error; of one that is not volsal's own also its kind, since its words alone may say little."""
    words = " ".join(str(error).split())
    return words if isinstance(error, VolsalError) else f"unexpected {type(error).__name__}: {words} (see the log)"
