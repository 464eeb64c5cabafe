"""Mean and variance of a method's maps over the scans of one answer, written as volumes; where scans share a grid."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from volsal.attribution import Method
from volsal.audit.cohort import CohortMap
from volsal.audit.metric import Undefined
from volsal.audit.subject import subject_of
from volsal.explain import Explainer
from volsal.grid import Grid
from volsal.scans import Scan
from volsal.scans.find import Case
from volsal.scans.write import map_header, write_map

FOLDER = "cohort"
# Grids are one where their corners differ by less.
_ONE_GRID_MM = 0.01


def group_maps(
    explainer: Explainer,
    cases: Mapping[str, Case],
    records: Sequence[Mapping[str, Any]],
    name: str,
    method: Method,
    folder: Path,
    least: int,
    **reading: Any,
) -> dict[str, Any]:
    """Write ``cohort/<method>_<answer>_{mean,variance,scans}.nii.gz`` for each answer of ``least`` scans or more.

    Maps are signed and raw, on the model's input; scans whose map has no place are left out, and so counted.

    Returns
    -------
    By answer the files, relative to ``folder``, and how many scans they are of; or ``{"none": why}``.
    """
    grids = [Grid(tuple(record["grid"]["shape"]), np.array(record["grid"]["affine"])) for record in records]
    if not all(grid.same_as(grids[0], _ONE_GRID_MM) for grid in grids):
        return {"none": "the scans do not share a grid"}
    found: dict[str, Any] = {}
    for answer in sorted({record["answer"] for record in records}):
        mine = [record["case"] for record in records if record["answer"] == answer]
        if len(mine) < least:
            continue
        cohort, used = CohortMap(grids[0]), 0
        for case in mine:
            values = subject_of(explainer, cases[case], **reading).maps({name: method})[name]
            if not isinstance(values, Undefined):
                cohort.add(values, grids[0])
                used += 1
        if used >= least:
            found[answer] = {"scans": used, "files": _written(cohort, folder, name, answer)}
    return found or {"none": f"no answer has {least} maps"}


def _written(cohort: CohortMap, folder: Path, name: str, answer: str) -> list[str]:
    scan = Scan(np.zeros(cohort.grid.shape, np.float32), cohort.grid)
    files = []
    for kind, values in (("mean", cohort.mean), ("variance", cohort.variance), ("scans", cohort.count)):
        file = f"{FOLDER}/{name}_{re.sub('[^a-z0-9]+', '-', answer.lower()).strip('-')}_{kind}.nii.gz"
        top = float(np.max(values))
        header = map_header(scan, "volsal audit", f"{kind} of {name}, {answer}", (0.0, top if top > 0 else 1.0))
        write_map(folder / file, np.asfortranarray(values, dtype=np.float32), header)
        files.append(file)
    return files
