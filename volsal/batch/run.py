"""A run: one config over many scans, one folder per case.  A bad scan costs no other scan's result.

The run folder is the record.  ``run.json`` says what was asked for, each case's ``case.json`` (written last) that the
case is whole, and ``cases.csv`` is derived from them.
"""

from __future__ import annotations

import csv
import json
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from volsal.config import Config, ConfigError, FunctionSection
from volsal.errors import VolsalError
from volsal.explain import PARTIAL, Explainer, Progress, environment
from volsal.explanation import CASE_FILE, RESULT_VERSION, files_of
from volsal.scans import ScanError, read_case
from volsal.scans.find import FoundCase, find_cases
from volsal.scans.scan import file_digest
from volsal.scans.write import WriteError, replacing, require_writable


@dataclass(frozen=True)
class Outcome:
    """What became of one scan.

    Attributes
    ----------
    case, scan : its id and its file (the first channel's)
    status : ``done``, ``kept`` (an earlier run's result that still holds) or ``failed``
    error : why it failed, in one line; ``trace`` the traceback
    record : the case's ``case.json``, unless it failed
    seconds : how long it took
    """

    case: str
    scan: Path
    status: str
    error: str | None = None
    trace: str | None = None
    record: dict[str, Any] | None = None
    seconds: float = 0.0


class Run:
    """The scans that a config names, and the folder that their results go to.

    Raises
    ------
    ConfigError
        Where the config names no scans or no output, or no scan is found.
    WriteError
        Where the output folder cannot be written.
    """

    def __init__(
        self,
        config: Config,
        output: Path | None = None,
        methods: Sequence[str] | None = None,
        targets: Sequence[str] | None = None,
        alignment: str | None = None,
    ) -> None:
        if config.scans is None:
            raise ConfigError(f"{config.path}: scans: missing; a run needs 'scans: {{folder: ...}}'")
        if output is None and config.output is None:
            raise ConfigError(f"{config.path}: output: missing; say where the results go, here or with --output")
        self.config = config
        self.scans = config.scans
        self.methods = methods
        self.targets = targets
        self.alignment = alignment
        self.folder = output or config.folder / str(config.output)
        source = config.folder / config.scans.folder
        if not source.is_dir():
            raise ConfigError(f"{config.path}: scans.folder: {source} is not a folder")
        self.cases, self.passed_over = find_cases(source, config.scans.pattern, config.scans.channels)
        if not self.cases:
            wanted = config.scans.pattern or "scan"
            ending = f" with a name that ends in {' or '.join(config.scans.channels)}" if config.scans.channels else ""
            raise ConfigError(f"{config.path}: scans.folder: no {wanted}{ending} below {source}")

    def execute(self, progress: Progress | None = None) -> Iterator[Outcome]:
        """Explain every case; yield what became of each as it ends.

        The model and every setting are checked before the first scan is touched.  ``progress`` is told of the steps of
        long methods; what these have of a case outlives a fault, until the case's result is saved.
        """
        keep = self.folder / PARTIAL
        explainer = Explainer.from_config(
            self.config, self.methods, self.targets, self.alignment, progress=progress, keep=keep
        )
        require_writable(self.folder)
        recipe = self._recipe(explainer)
        self._write_run(explainer)
        for case, found in self.cases.items():
            yield self._one(explainer, case, found, recipe)

    def _one(self, explainer: Explainer, case: str, found: FoundCase, recipe: dict[str, Any]) -> Outcome:
        clock = time.monotonic()
        path = found.paths[0]
        try:
            if found.fault:
                raise ScanError(f"{path}: {found.fault}")
            others = [file_digest(file) for file in explainer.files_for(case)]
            key = _digest({**recipe, "scan": [file_digest(file) for file in found.paths], "others": others})
            record = self.record(case)
            if record and record["provenance"].get("key") == key and self._whole(case, record):
                return Outcome(case, path, "kept", record=record)
            scan = read_case(found.paths, **self.scans.reading())
            explanation = explainer(scan, case, **self.scans.reading())
            explanation = replace(explanation, provenance={**explanation.provenance, "key": key})
            explanation.save(self.folder)
            explainer.forget(case)
        except WriteError:
            raise  # a disk that is full or gone fails every case alike: stop, and lose nothing that is done
        except Exception as error:  # noqa: BLE001 - the one place that outlives any error: the next scan still counts
            reason = str(error) if isinstance(error, VolsalError) else f"{type(error).__name__}: {error}"
            seconds = time.monotonic() - clock
            return Outcome(case, path, "failed", _one_line(reason), traceback.format_exc(), None, seconds)
        return Outcome(case, path, "done", record=self.record(case), seconds=time.monotonic() - clock)

    def record(self, case: str) -> dict[str, Any] | None:
        """The case's ``case.json``; None where there is none or it is not one of ours."""
        try:
            content = json.loads((self.folder / case / CASE_FILE).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        whole = isinstance(content, dict) and {"provenance", "prediction", "maps"} <= content.keys()
        return content if whole else None

    def _whole(self, case: str, record: dict[str, Any]) -> bool:
        """Whether every map of the record is there, to the byte."""
        files = {self.folder / case / name: sum_ for name, sum_ in files_of(record).items()}
        return all(path.is_file() and sha256(path.read_bytes()).hexdigest() == sum_ for path, sum_ in files.items())

    def _recipe(self, explainer: Explainer) -> dict[str, Any]:
        """All that a case's result depends on, but the scan: a result is kept exactly while this stays the same."""
        config = self.config
        function = config.preprocess.function if isinstance(config.preprocess, FunctionSection) else ""
        # Files of code that the config names; what they import in turn is not seen.
        codes = [ref.rpartition(":")[0] for ref in (config.model.factory or "", function)] + [config.model.file or ""]
        return {
            "result_version": RESULT_VERSION,
            "weights": explainer.weights_sha256,
            "model": config.model.model_dump(exclude={"weights", "device"}),
            "preprocess": repr(config.preprocess),
            "methods": [explainer.names, [repr(method) for method in explainer.methods]],
            "per_channel": config.per_channel,
            "windows": config.windows.model_dump() if config.windows else None,
            "targets": [repr(target) for target in explainer.targets],
            "alignment": [self.alignment or config.alignment, repr(sorted(explainer.alignments.items(), key=repr))],
            "scans": self.scans.reading(),
            "code": [
                sha256((config.folder / c).read_bytes()).hexdigest() for c in codes if c.endswith((".py", ".pt2"))
            ],
            # Both change a result's last bits.
            "threads": torch.get_num_threads(),
            "device": config.model.device,
        }

    def _write_run(self, explainer: Explainer) -> None:
        content = {
            "config": self.config.model_dump(mode="json"),
            "methods": explainer.names,
            "weights_sha256": explainer.weights_sha256,
            "cases": len(self.cases),
            **environment(),
        }
        with replacing(self.folder / "run.json") as temporary:
            temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")

    def write_table(self, outcomes: Sequence[Outcome]) -> Path:
        """``cases.csv``: one row per case and map; a case that failed has one row with its reason."""
        path = self.folder / "cases.csv"
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            for outcome in outcomes:
                writer.writerows([_safe_cell(cell) for cell in row] for row in _rows(outcome))
        return path


_COLUMNS = (
    "case", "status", "error", "prediction", "method", "target", "layer", "map_status", "maximum", "unit",
    "peak_x_mm", "peak_y_mm", "peak_z_mm", "file",
)  # fmt: skip


def _rows(outcome: Outcome) -> Iterator[list[Any]]:
    if outcome.record is None:
        yield [outcome.case, outcome.status, outcome.error, *[""] * (len(_COLUMNS) - 3)]
        return
    predicted = outcome.record["prediction"]
    label = predicted["class_name"] or ("" if predicted["class"] is None else predicted["class"])
    for entry in outcome.record["maps"]:
        yield [
            outcome.case, outcome.status, "", label, entry["name"], entry["target"], entry["layer"] or "input",
            entry["status"], f"{entry['maximum']:.6g}", entry["unit"],
            *([f"{mm:.2f}" for mm in entry["peak_mm"]] if entry["peak_mm"] else [""] * 3),
            f"{outcome.case}/{entry['file']}",
        ]  # fmt: skip


def _safe_cell(cell: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets a leading apostrophe; numbers stay numbers."""
    text = _one_line(str(cell))
    is_number = text.lstrip("-").replace(".", "", 1).replace("e-", "", 1).replace("e+", "", 1).isdigit()
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) and not is_number else text


def _one_line(text: str) -> str:
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def _digest(content: dict[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()
