"""Measured alignments on file: what was measured once on a handful of scans serves every later scan.

One entry per (weights, method, layer, target, input size): change one of them and the cells may look elsewhere.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volsal.attribution.alignment.alignment import Alignment, AlignmentError
from volsal.scans.write import replacing

FORMAT = 1


@dataclass(frozen=True)
class Key:
    """What a measured alignment holds for.

    Attributes
    ----------
    weights : SHA-256 of the model's weights, hexadecimal
    method, layer, target : the class activation map, where it is taken, and what it explains
    size : the model input's size along its spatial axes
    """

    weights: str
    method: str
    layer: str
    target: str
    size: tuple[int, ...]


class Alignments(dict[Key, Alignment]):
    """Alignments by what they hold for, with a file to keep them in."""

    @classmethod
    def read(cls, path: Path) -> Alignments:
        """The alignments in a file that :meth:`write` made; none where there is no such file.

        Raises
        ------
        AlignmentError
            Where the file is not one of ours.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, expected {FORMAT}")
            return cls(_entry(entry) for entry in content["entries"])
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise AlignmentError(
                f"{path}: not a file of measured alignments ({type(error).__name__}: {error}); measure anew with "
                "`volsal align` or remove it"
            ) from error

    def write(self, path: Path) -> None:
        """Write all entries to ``path``, replacing it as a whole; WriteError where that cannot be done."""
        entries = [
            {"of": {**vars(key), "size": list(key.size)}, "alignment": alignment.describe()}
            for key, alignment in sorted(self.items(), key=lambda item: repr(item[0]))
        ]
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, "entries": entries}, indent=1, sort_keys=True) + "\n")


def _entry(record: dict[str, Any]) -> tuple[Key, Alignment]:
    key, alignment = _key(record["of"]), Alignment.from_record(record["alignment"])
    if len(key.size) != len(alignment.stride):
        raise ValueError(f"{len(alignment.stride)} axes for an input of {len(key.size)}")
    return key, alignment


def _key(record: dict[str, Any]) -> Key:
    weights, method, layer, target = (str(record[name]) for name in ("weights", "method", "layer", "target"))
    return Key(weights, method, layer, target, tuple(int(n) for n in record["size"]))


def beside(config: Path) -> Path:
    """Where the alignments of a config are kept: ``monai.yaml`` -> ``monai.alignment.json``."""
    return config.with_suffix(".alignment.json")
