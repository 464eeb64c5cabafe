#!/usr/bin/env python3
"""Sizes and times of the HTML report: writing it, and opening its first page and a case in a browser from the disk.

    python scripts/bench/report.py RUN                  a run's own cases
    python scripts/bench/report.py RUN --cases 2000     as many, made by repeating the run's
    python scripts/bench/report.py RUN --single         as one file

Opening needs Qt's Chromium (pip install PyQt6-WebEngine); it is left out where that is missing.  The first page counts
as open when its table and first pictures stand, a case when its planes are drawn.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from volsal.report.page import write_report
from volsal.run_folder import RunFolder

BROWSER = Path(__file__).with_name("browser.py")


def repeated(run: Path, count: int, into: Path) -> Path:
    """A run folder of ``count`` cases that are the ones of ``run`` again and again."""
    source, made = RunFolder.existing(run), RunFolder(into)
    made.path.mkdir(parents=True, exist_ok=True)
    made.write_run(source.asked())
    done = [case for case in source.cases() if source.state(case) == "done"]
    for number, case in enumerate(islice(cycle(done), count)):
        shutil.copytree(source / case, made / f"{number:05d}-{case}")
    return into


def browse(url: str, *steps: dict[str, Any]) -> list[Any]:
    script = json.dumps({"page": url, "steps": steps})
    done = subprocess.run([sys.executable, str(BROWSER)], input=script, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    away = [address for address in told["requests"] if not address.startswith(("file:", "data:"))]
    if away or told["console"]:
        raise SystemExit(f"the page asked for {away}; the console says {told['console']}")
    return told["answers"]


def seconds_to_open(page: Path) -> list[float]:
    """Until the first page is loaded, with its table and first pictures; and until it is ordered anew and searched.

    The browser itself runs already.
    """
    loaded = "performance.getEntriesByType('navigation')[0].loadEventEnd / 1000"
    ready = f"document.querySelector('.listing')?.dataset.ready && {loaded}"
    order = "document.querySelector('.cases th:last-child button').click()"
    search = "const f = document.querySelector('[name=text]'); f.value = '7'; f.dispatchEvent(new Event('input'))"
    timed = "const t = performance.now(); {}; document.body.offsetHeight; return (performance.now() - t) / 1000"
    steps = [{"do": timed.format(act)} for act in (order, search)]
    return browse("about:blank", {"open": page.as_uri()}, {"until": ready}, {"do": f"return {loaded}"}, *steps)[2:]


def seconds_to_draw(page: Path) -> float:
    """Until a case's planes are drawn, once its page is loaded."""
    return browse("about:blank", {"open": page.as_uri()}, {"until": "document.querySelector('.viewer').dataset.ready"})[
        -1
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("run", type=Path)
    options.add_argument("--cases", type=int, help="repeat the run's cases up to this many")
    options.add_argument("--single", action="store_true")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="volsal-bench-") as folder:
        run = repeated(chosen.run, chosen.cases, Path(folder) / "run") if chosen.cases else chosen.run
        output = Path(folder) / ("report.html" if chosen.single else "report")
        clock = time.monotonic()
        page = write_report(run, output, single=chosen.single)
        seconds = time.monotonic() - clock
        count = sum(RunFolder(run).state(case) == "done" for case in RunFolder(run).cases())
        files = [page] if chosen.single else [file for file in output.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        print(f"{count} cases: written in {seconds:.1f} s, {seconds / count:.2f} s a case")
        print(f"{size / 1e6:.1f} MB in {len(files)} files, {size / count / 1e6:.2f} MB a case")
        print(f"first page: {page.stat().st_size / 1e6:.2f} MB")
        if importlib.util.find_spec("PyQt6.QtWebEngineCore"):
            print(
                "first page open after {:.2f} s, ordered in {:.2f} s, searched in {:.2f} s".format(
                    *seconds_to_open(page)
                )
            )
            for case in sorted(output.glob("cases/*.html"))[:1]:
                megabytes = case.stat().st_size / 1e6
                print(f"a case ({megabytes:.2f} MB) drawn {seconds_to_draw(case):.2f} s after it was loaded")


if __name__ == "__main__":
    main()
