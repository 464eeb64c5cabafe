"""Which scans a BIDS dataset holds: the Brain Imaging Data Structure, raw or derivative.

Gorgolewski et al., Scientific Data 2016, doi 10.1038/sdata.2016.44; the names of files by its specification, 1.10.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from volsal.scans.find import Gathered, ending_of, look, named, stem_of
from volsal.scans.scan import ScanError

_SCAN = re.compile(r"sub-[^_]+(_[A-Za-z0-9]+-[^_]+)*_[A-Za-z0-9]+\.nii(\.gz)?")
_LABELS = ("mask", "dseg", "probseg")  # suffixes of what is drawn on scans


def find_bids(
    root: Path, suffixes: Sequence[str] = (), pattern: str | None = None, masks: Mapping[str, str] | None = None
) -> Gathered:
    """The cases of a BIDS dataset.

    Parameters
    ----------
    root : the folder that holds those of the subjects
    suffixes : one per channel, in the model's order, as ``T1w``; entities may precede it, as in ``desc-preproc_T1w``.
        May be left out where the dataset has a single one
    pattern : only files whose path below ``root``, or whose name, is like this
    masks : name -> the end of the mask files' names, as ``label-lesion_mask``

    A session that has one file of each suffix is a case, called by the entities that these share
    (``sub-01_ses-02_run-1``).  Else, files are one case whose names are alike but for the suffix.

    Raises
    ------
    ScanError
        Where there are no subjects, or the suffix has to be chosen.
    """
    paths, over = _named(root, pattern)
    endings = {name: _ending(end) for name, end in (masks or {}).items()}
    channels = [_ending(suffix) for suffix in suffixes] or [_only_suffix(root, paths, list(endings.values()))]
    sessions: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        if (ending := ending_of(path, [*channels, *endings.values()])) is None:
            over[f"scans of other suffixes than {', '.join(end[1:] for end in channels)}"] += 1
        else:
            sessions["_".join(session_of(path))][ending].append(path)
    groups = {name: files for session in sessions.values() for name, files in _groups(session, channels).items()}
    return named(groups, {name: Path(name) for name in groups}, channels, endings, over)


def _named(root: Path, pattern: str | None) -> tuple[list[Path], Counter[str]]:
    """Scans below the subjects' folders that are named as BIDS says and like ``pattern``; what else there is."""
    subjects = sorted(path for path in root.iterdir() if path.name.startswith("sub-") and path.is_dir())
    if not subjects:
        raise ScanError(f"{root} has no folders called sub-...; name the one that has, of the dataset or a derivative")
    over: Counter[str] = Counter()
    paths = []
    for found in map(look, subjects):
        over.update(found.passed_over)
        for path in found.scans:
            if not _SCAN.fullmatch(path.name):
                over["scans that are not named as BIDS says"] += 1
            elif not _wanted(path, root, pattern):
                over[f"scans not like {pattern}"] += 1
            else:
                paths.append(path)
    return paths, over


def session_of(path: Path) -> list[str]:
    """The subject and, if there are any, the session in a file's name: ``["sub-01", "ses-02"]``."""
    return [entity for entity in path.name.split("_")[:2] if entity.startswith(("sub-", "ses-"))]


def _groups(files: Mapping[str, list[Path]], channels: Sequence[str]) -> dict[str, dict[str, list[Path]]]:
    """The files of one session, by ending, as cases: all in one where there is one of each, else by other entities."""
    entities = {path: stem_of(path).removesuffix(end).split("_") for end, paths in files.items() for path in paths}
    if all(len(paths) == 1 for paths in files.values()):
        # Masks, which are not in every session, have no say in what a case is called.
        first, *others = [entities[files[end][0]] for end in channels if end in files] or entities.values()
        shared = [entity for entity in first if all(entity in other for other in others)]
        return {"_".join(shared): dict(files)}
    groups: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for ending, paths in files.items():
        for path in paths:
            groups["_".join(entities[path])][ending].append(path)
    return dict(groups)


def _ending(suffix: str) -> str:
    return "_" + suffix.lstrip("_")


def _wanted(path: Path, root: Path, pattern: str | None) -> bool:
    return pattern is None or fnmatch(path.name, pattern) or fnmatch(path.relative_to(root).as_posix(), pattern)


def _only_suffix(root: Path, paths: Sequence[Path], others: Sequence[str]) -> str:
    found = [stem_of(path).rpartition("_")[2] for path in paths if ending_of(path, others) is None]
    suffixes = Counter(suffix for suffix in found if suffix not in _LABELS)
    if len(suffixes) != 1:
        held = ", ".join(f"{suffix} ({count})" for suffix, count in sorted(suffixes.items())) or "no scans"
        raise ScanError(
            f"{root} holds {held}; say which: 'channels: [T1w]', or several for a model of several channels"
        )
    return _ending(next(iter(suffixes)))
