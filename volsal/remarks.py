"""What a reader of a result should be told in words.

Words without figures, so that a run can count the scans that they are true of; figures stand in the maps' records.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from volsal.attribution import AlignmentRule
from volsal.explanation import Heatmap


def on_output(output: Any) -> list[str]:
    """Outputs that look like probabilities."""
    if not isinstance(output, Tensor) or output.ndim < 2 or float(output.min()) < 0 or float(output.max()) > 1.0001:
        return []
    if output.ndim > 2:
        return [
            "the output lies between 0 and 1 everywhere: probabilities, it seems; what is predicted is told by logits "
            "above 0, and gradients fade where the model is sure, so explain the logits"
        ]
    if output.shape[1] < 2 or not torch.allclose(output.sum(1), torch.ones_like(output[:, 0]), atol=1e-4):
        return []
    return [
        "the outputs sum to 1: probabilities, it seems; their gradients fade where the model is sure, so explain the "
        "logits if you can"
    ]


def on_maps(maps: Sequence[Heatmap], rule: AlignmentRule) -> list[str]:
    """Maps whose evidence or whose place is doubtful; ``rule`` is how places were to be found."""
    return [*_beyond(maps), *_misplaced(maps, rule)]


def _beyond(maps: Sequence[Heatmap]) -> list[str]:
    return [
        f"{heatmap.name}: positive evidence only outside the scan, in what preprocessing added around it"
        for heatmap in maps
        if heatmap.status == "empty" and float(heatmap.raw.max()) > 0
    ]


def _misplaced(maps: Sequence[Heatmap], rule: AlignmentRule) -> list[str]:
    notes = []
    for heatmap in maps:
        used = heatmap.alignment
        if used is None or heatmap.status == "empty":
            continue
        if used.kind != rule.id:
            notes.append(
                f"{heatmap.name}: where the layer's cells look could not be measured, so they were placed by the "
                f"{used.kind} rule, which may be half a cell off"
            )
        elif used.held or (used.uncertainty and (np.array(used.uncertainty) > np.abs(used.stride) / 2).any()):
            notes.append(
                f"{heatmap.name}: its place is uncertain by more than half a cell"
                + (", or further from where cells look than is believed" if used.held else "")
                + ": what made the map is spread out, or lies in several places"
            )
    return notes
