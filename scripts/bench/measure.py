"""How the benches measure: time in interleaved rounds, peak memory by the allocator's own count and by the process.

On a machine that is doing other things, ratios of CPU seconds of one thread hold where seconds on the wall do not.
"""

from __future__ import annotations

import gc
import multiprocessing
import random
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

Call = Callable[[], object]


def allocated_peak(call: Call, device: str = "cpu") -> int:
    """Most bytes that PyTorch held at once during ``call``, over what it held before.

    On a CPU counted from the allocator's events, in CUDA by its own peak counter.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def rss_peak(prepare: Callable[[], Call]) -> int:
    """Most bytes that a fresh process held at once during a call, over what it held before.  Linux only.

    ``prepare`` runs in that process first and returns the call; it is pickled, so it is a function of a module, or a
    ``functools.partial`` of one.  Unlike :func:`allocated_peak` this counts the libraries' own buffers, and what the C
    library keeps for later.

    Raises
    ------
    BrokenProcessPool
        Where the process is killed, as one is that needs more memory than there is.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_rss_peak, prepare).result()


def _rss_peak(prepare: Callable[[], Call]) -> int:
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory ends, it is this process that goes
    torch.set_num_threads(1)
    call = prepare()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_bytes("VmRSS")
    call()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    """A line of this process's status, such as ``VmRSS``, in bytes.  Linux only."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"no {field} in /proc/self/status"
    return 1024 * int(found[1])


def interleaved_times(calls: Mapping[str, Call], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each call, once a round, each round in a random order; a first round is not counted.

    CPU seconds of this process on a CPU, seconds on the wall, with the device awaited, in CUDA.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for number in range(rounds + 1):
        random.shuffle(order)
        for name in order:
            taken = _seconds(calls[name], device)
            if number:
                seconds[name].append(taken)
    return seconds


def _seconds(call: Call, device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start
