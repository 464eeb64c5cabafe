"""Mean and variance of a method's maps over groups of scans, written as volumes, with how many scans reach each voxel.

Scans share a space where their model inputs lie on one grid, or where each is brought to a template by an affine
(:func:`volsal.audit.cohort.register_affine`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volsal.attribution import Method
from volsal.audit.cohort import CohortMap, Registration, register_affine
from volsal.audit.metric import Undefined
from volsal.audit.subject import Subject, subject_of
from volsal.config import AuditSection
from volsal.errors import VolsalError
from volsal.explain import Explainer
from volsal.grid import Grid
from volsal.scans import Scan
from volsal.scans.find import Case
from volsal.scans.write import map_header, write_map

FOLDER = "cohort"
# Grids are one where their corners differ by less.
_ONE_GRID_MM = 0.01
# Each group takes the memory of three volumes; those with the most scans are mapped.
_MOST_GROUPS = 12


def group_maps(
    explainer: Explainer,
    cases: Mapping[str, Case],
    groups: Mapping[str, Mapping[str, str]],
    name: str,
    method: Method,
    folder: Path,
    settings: AuditSection,
    template: Scan | None = None,
    **reading: Any,
) -> dict[str, Any]:
    """Write ``cohort/<name>_<column>-<value>_{mean,variance,scans}.nii.gz`` for groups of ``min_scans`` scans or more.

    Maps are signed and raw.  Without a template they lie on the model's input, and all scans must share its grid; else
    on the template's grid, on which each map counts where the model's input reaches.  Voxels that no scan reaches (for
    the variance, fewer than two) are 0; the number of scans tells them.

    Parameters
    ----------
    groups : by column, such as the model's answer, label or site: case -> its value
    name : of the method, for file names
    template : a scan to whose space all are brought by an affine

    Returns
    -------
    ``groups``: by column and value the ``files``, relative to ``folder``, and how many ``scans`` they are of;
    ``left_out``: by case why a scan is in none; ``registered``: by case ``correlation`` and ``overlap`` with the
    template.  Or ``{"none": why}``.
    """
    members = _members(groups, settings.min_scans)
    if not members:
        return {"none": f"no group has {settings.min_scans} scans"}
    space: _Space = _OneGrid() if template is None else _Template(template.array, template.grid, {})
    maps: dict[tuple[str, str], CohortMap] = {}
    used: Counter[tuple[str, str]] = Counter()
    left_out: dict[str, str] = {}
    for case in dict.fromkeys(case for of in members.values() for case in of):
        try:
            subject = subject_of(explainer, cases[case], **reading)
            placed = space.place(subject, settings)
        except VolsalError as error:
            left_out[case] = str(error)
            continue
        values = subject.maps({name: method})[name] if isinstance(placed, Grid) else placed
        if isinstance(values, Undefined) or isinstance(placed, Undefined):
            left_out[case] = values.reason if isinstance(values, Undefined) else "it has no place"
            continue
        for group in (group for group, of in members.items() if case in of):
            assert space.grid is not None
            maps.setdefault(group, CohortMap(space.grid)).add(values, placed)
            used[group] += 1
    found: dict[str, dict[str, Any]] = {}
    for (column, value), cohort in maps.items():
        if used[column, value] >= settings.min_scans:
            files = _written(cohort, folder, name, f"{column}: {value}")
            found.setdefault(column, {})[value] = {"scans": used[column, value], "files": files}
    if not found:
        reasons = "; ".join(dict.fromkeys(left_out.values()))
        return {"none": f"no group has {settings.min_scans} maps in one space: {reasons}", "left_out": left_out}
    return {"groups": found, "left_out": left_out, "registered": space.registered}


def _members(groups: Mapping[str, Mapping[str, str]], least: int) -> dict[tuple[str, str], list[str]]:
    """The cases of each group that is large enough, the largest groups first."""
    members: dict[tuple[str, str], list[str]] = {}
    for column, values in groups.items():
        for case, value in values.items():
            members.setdefault((column, value), []).append(case)
    large = [(group, of) for group, of in members.items() if len(of) >= least]
    return dict(sorted(large, key=lambda pair: -len(pair[1]))[:_MOST_GROUPS])


class _OneGrid:
    """The grid that the scans share: the first one's."""

    def __init__(self) -> None:
        self.grid: Grid | None = None
        self.registered: dict[str, dict[str, float]] = {}

    def place(self, subject: Subject, settings: AuditSection) -> Grid | Undefined:
        """Where a scan's map lies; why not where its grid is another."""
        self.grid = self.grid or subject.grid
        if subject.grid.same_as(self.grid, _ONE_GRID_MM):
            return subject.grid
        return Undefined("the scans do not share a grid, and no template is given (audit.template)")


@dataclass(frozen=True, eq=False)
class _Template:
    """A scan to which the others are brought."""

    array: NDArray[np.float32]
    grid: Grid
    registered: dict[str, dict[str, float]]

    def place(self, subject: Subject, settings: AuditSection) -> Grid | Undefined:
        """Where a scan's map lies in the template's space; why not where little of the template is reached."""
        scan = subject.ready.scan
        found: Registration = register_affine(scan.array, scan.grid, self.array, self.grid)
        self.registered[subject.case] = {
            "correlation": round(found.correlation, 4),
            "overlap": round(found.overlap, 4),
        }
        if found.overlap < settings.min_overlap:
            return Undefined(f"it reaches {found.overlap:.0%} of the template, less than {settings.min_overlap:.0%}")
        return found.place(subject.grid)


_Space = _OneGrid | _Template


def _written(cohort: CohortMap, folder: Path, name: str, group: str) -> list[str]:
    scan = Scan(np.zeros(cohort.grid.shape, np.float32), cohort.grid)
    files = []
    for kind, values in (("mean", cohort.mean), ("variance", cohort.variance), ("scans", cohort.count)):
        file = f"{FOLDER}/{name}_{re.sub('[^a-z0-9]+', '-', group.lower()).strip('-')}_{kind}.nii.gz"
        known = np.nan_to_num(values)
        top = float(np.max(known))
        header = map_header(scan, "volsal audit", f"{kind} of {name}, {group}", (0.0, top if top > 0 else 1.0))
        write_map(folder / file, np.asfortranarray(known, dtype=np.float32), header)
        files.append(file)
    return files
