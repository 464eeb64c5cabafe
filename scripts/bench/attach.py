#!/usr/bin/env python3
"""A run on a Dask cluster that it is attached to by address; one of the two workers is killed in the middle.

    scripts/bench/attach.py [--cases 200] [--size 32] [--shot dashboard.png]

The cluster is a scheduler and two worker processes, started as on two machines: each by its own command, without a
nanny that would start a dead one anew.  What the scheduler says of itself (its dashboard's /json/counts.json) is
printed while the run goes on.  ``--shot`` takes pictures of the dashboard's status page, a few seconds before the kill
and after it, in Qt's Chromium; the dashboard needs bokeh, the pictures PyQt6-WebEngine.

In the end every case must be there once, identical to what a run in one process gives, to the byte.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from kill import cohort, done, start, tree

LOOK_S = 1.0
# What of the scheduler's own count is told.
COUNTS = ("workers", "cores", "processing", "saturated", "memory", "erred")


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[str, str, list[subprocess.Popen[bytes]]]]:
    """A scheduler's address, that of its dashboard, and two workers."""
    where, port = folder / "scheduler.json", _free_port()
    commands = {"scheduler": ["--port", "0", "--host", "127.0.0.1", "--dashboard-address", f"127.0.0.1:{port}"]}
    commands |= {name: ["--no-nanny", "--nthreads", "3", "--no-dashboard"] for name in ("worker 1", "worker 2")}
    started = []
    try:
        for name, options in commands.items():
            kind = name.split()[0]
            code = f"from distributed.cli.dask_{kind} import main; main()"
            command = [sys.executable, "-c", code, *options, "--scheduler-file", str(where)]
            with (folder / f"{name}.log").open("wb") as log:
                started.append(subprocess.Popen(command, stdout=log, stderr=log))
            while not where.exists():
                time.sleep(0.1)
        yield json.loads(where.read_text())["address"], f"http://127.0.0.1:{port}", started[1:]
    finally:
        for process in started:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def pictures(page: str, before: Path, after: Path) -> subprocess.Popen[str]:
    """A browser that is taking two pictures of the page, ten seconds apart."""
    steps = [{"settle": 4000}, {"shot": str(before)}, {"settle": 10_000}, {"shot": str(after)}]
    browser = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("browser.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert browser.stdin
    browser.stdin.write(json.dumps({"page": page, "size": [1400, 900], "steps": steps}))
    browser.stdin.close()
    return browser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--shot", type=Path, help="also takes one with -before in its name")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config, output = cohort(folder, options.cases, options.size), folder / "attached"
        start(config, folder / "alone", 1).wait()
        with cluster(folder) as (address, dashboard, workers):
            command = [sys.executable, "-m", "volsal", "run", str(config), "-o", str(output), "--scheduler", address]
            run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            begun, browser, killed = time.monotonic(), None, False
            before = options.shot.with_stem(f"{options.shot.stem}-before") if options.shot else None

            def say(text: str) -> None:
                print(f"{time.monotonic() - begun:6.1f} s  {text}", flush=True)

            while run.poll() is None:
                time.sleep(LOOK_S)
                counts = json.loads(urlopen(f"{dashboard}/json/counts.json", timeout=30).read())
                ended = done(output)
                say(f"{ended} cases done; scheduler: {', '.join(f'{counts[name]} {name}' for name in COUNTS)}")
                if before and ended and browser is None:
                    before.unlink(missing_ok=True)
                    browser = pictures(f"{dashboard}/status", before, options.shot)
                if not killed and ended > options.cases // 5 and (before is None or before.exists()):
                    killed = True
                    workers[0].kill()
                    say(f"SIGKILL of worker 1, process {workers[0].pid}")
            if browser is not None:
                browser.wait()
            assert run.stdout
            print(run.stdout.read())
        same = tree(output) == tree(folder / "alone")
        print(f"exit status {run.returncode}; {done(output)} of {options.cases} cases done; worker killed: {killed}")
        print(f"identical to a run in one process, to the byte: {'yes' if same else 'NO'}")
        if run.returncode or not killed or not same:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
