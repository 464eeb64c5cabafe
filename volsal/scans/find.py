"""Which scans a folder holds, and what to call them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path

SUFFIXES = (".nii.gz", ".nii", ".hdr")
# Room for the method, the target and the suffix in a file name of 255 bytes.
_LONGEST_ID = 96


def find_scans(folder: Path, pattern: str | None = None) -> Iterator[Path]:
    """Scan files below ``folder``, in name order.

    ``pattern`` is matched against the path relative to ``folder`` and against the file's name.  Hidden files and
    macOS's ``._`` twins are passed over, links to folders are not followed, and folders that hold a ``case.json`` are
    volsal's own results.
    """
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "case.json" in files:
            continue
        for name in sorted(files):
            path = Path(where) / name
            relative = path.relative_to(folder).as_posix()
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            if pattern is None or fnmatch(relative, pattern) or fnmatch(name, pattern):
                yield path


def case_id(path: Path) -> str:
    """A case's id from a (relative) path: lower-case ASCII letters, digits, ``.``, ``_`` and ``-``; never a path.

    >>> case_id(Path("site A/Müller.nii.gz"))
    'site-a-muller'
    """
    name = Path(path).as_posix() if not Path(path).is_absolute() else Path(path).name
    for suffix in (*SUFFIXES, ".img"):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
            break
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    reduced = re.sub(r"[^a-z0-9._]+", "-", plain).strip("-._")
    if not reduced or len(reduced) > _LONGEST_ID:
        reduced = f"{reduced[: _LONGEST_ID - 9].strip('-._')}-{_short_hash(path)}".strip("-")
    return reduced


def case_ids(paths: Iterable[Path], folder: Path) -> dict[Path, str]:
    """An id of its own for every path: where two would be the same, both get a hash of their relative path."""
    relative = {path: path.relative_to(folder) for path in paths}
    plain = {path: case_id(below) for path, below in relative.items()}
    shared = Counter(plain.values())
    return {
        path: name if shared[name] == 1 else f"{name}-{_short_hash(relative[path])}" for path, name in plain.items()
    }


def _short_hash(path: Path) -> str:
    return sha256(os.fsencode(path.as_posix())).hexdigest()[:8]
