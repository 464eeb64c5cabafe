"""How far a run is, told by its folder alone: from another terminal, another machine, or long afterwards."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from volsal.batch.lock import Holder, holder
from volsal.run_folder import RunFolder


@dataclass(frozen=True)
class Status:
    """What there is of a run.

    Attributes
    ----------
    cases : how many inputs there are
    states : how many of them are done, refused, failed, missing; these add up to ``cases``.  A result that is just
        being written anew is missing: the old one is no more, the new one not yet whole
    codes : the kinds of faults
    holder : who is at work; None where nobody is
    through : how many cases the last run, or the one at work, has been through, those that it kept included
    per_minute : cases that ended per minute, since the run was last begun and over at most the last hour; None where
        that cannot be told
    left_s : seconds until the rest is done, at that rate
    ended : how the last run ended: ``end``, ``fault``, a signal's name; None while it goes on, or where it was killed
    faults : the first few cases without result: id, code, reason
    """

    cases: int
    states: dict[str, int]
    codes: dict[str, int]
    holder: Holder | None
    through: int
    per_minute: float | None
    left_s: float | None
    ended: str | None
    faults: tuple[tuple[str, str, str], ...]

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "holder": vars(self.holder) if self.holder else None}


# Faults that are told one by one.
_TOLD = 10
_WINDOW_S = 3600.0


def status_of(folder: RunFolder) -> Status:
    """How far the run in ``folder`` is.  Nothing is written."""
    cases = folder.cases()
    states, codes = Counter(done=0, refused=0, failed=0, missing=0), Counter[str]()
    faults: list[tuple[str, str, str]] = []
    for case in cases:
        state = folder.state(case)
        states[state] += 1
        if state in ("refused", "failed") and (fault := folder.fault(case)):
            codes[fault.code] += 1
            if len(faults) < _TOLD:
                faults.append((case, fault.code, fault.reason))
    through, rate, ended = _rate(folder)
    at_work = holder(folder.path)
    left = 60 * max(0, len(cases) - through) / rate if rate and at_work else None
    return Status(len(cases), dict(states), dict(codes), at_work, through, rate, left, ended, tuple(faults))


def _rate(folder: RunFolder) -> tuple[int, float | None, str | None]:
    """Cases that the last run has been through, those that it worked on per minute, and how it ended."""
    times: list[float] = []
    began, ended, through = None, None, 0
    for event in folder.events():
        if event.get("event") == "began":
            began, ended, times, through = _seconds(event), None, [], 0
        elif event.get("event") == "ended":
            ended = str(event.get("by"))
        elif event.get("event") == "case":
            through += 1
            times += [_seconds(event)] if "seconds" in event else []
    if began is None or not times:
        return through, None, ended
    since = max(began, times[-1] - _WINDOW_S)
    recent = [time for time in times if time >= since]
    return through, 60 * len(recent) / max(times[-1] - since, 1e-3), ended


def _seconds(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(str(event["time"])).astimezone(UTC).timestamp()
