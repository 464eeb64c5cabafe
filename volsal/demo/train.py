"""Training the demonstration's network from nothing, on scans made as it goes; a few minutes on two cores."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from volsal.demo import cohort, net
from volsal.resampling import resample
from volsal.scans import read_scan
from volsal.scans.write import replacing

_BATCH = 16
_RATE = 5e-3
# Bent heads to draw from; each is then posed, shaded and scanned afresh.
_ANATOMIES = 48
# Batches over which the running statistics of batch normalisation are taken once the weights stand still.
_SETTLING = 16
# Share of the training over which lesions shrink to their true size.
_EASY = 0.4
# Streams of randomness that never meet: the anatomies, the training scans, the held-out scans.
_SUBJECTS, _TRAINING, _HELD_OUT = range(3)


def train(
    out: Path,
    seed: int = 0,
    steps: int = 400,
    held_out: int = 100,
    anatomies: int = _ANATOMIES,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Train the network and write ``weights.safetensors`` and ``weights.train.json`` into the folder ``out``.

    Parameters
    ----------
    seed : decides every scan and the initial weights; with one version of torch, the result is the same each time
    steps : batches of 16 scans
    held_out : scans, written to disk in random orientations and read back, to measure accuracy on; half with a lesion
    anatomies : bent heads to draw the training scans from
    say : takes a line of progress now and then

    Returns
    -------
    What ``weights.train.json`` says.
    """
    started = time.monotonic()
    scan = cohort.head()
    subjects = [cohort.anatomy(scan, np.random.default_rng((seed, _SUBJECTS, i))) for i in range(anatomies)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = net.build()
        _fit(network, _batches(subjects, seed, steps), steps, say)
    minutes = (time.monotonic() - started) / 60
    logits, labels = held_out_logits(network, held_out, seed)
    record = {
        "seed": seed,
        "steps": steps,
        "batch": _BATCH,
        "anatomies": anatomies,
        "held_out_scans": held_out,
        "held_out_accuracy": _accuracy(logits, labels),
        "demo_accuracy": _accuracy(*_logits(network, cohort.demo_cases())),
        "training_minutes": round(minutes, 2),
        "torch": torch.__version__,
    }
    with replacing(out / "weights.safetensors") as temporary:
        temporary.write_bytes(save(network.state_dict()))
    with replacing(out / "weights.train.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _fit(
    network: net.DemoNet, batches: Iterator[tuple[Tensor, Tensor]], steps: int, say: Callable[[str], object]
) -> None:
    """Train, let batch normalisation settle, and leave the network in eval mode."""
    # Averaged over 1,764 cells, one small lesion moves the logits so little that training hardly starts.  A second head
    # on the largest cell of each channel finds lesions within fifty steps, from the same labels, and pulls the
    # features along.  It is thrown away afterwards.
    scout = nn.Linear(network.head.in_features, network.head.out_features)
    network.train()
    optimizer = torch.optim.AdamW([*network.parameters(), *scout.parameters()], lr=_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_RATE, total_steps=max(steps, 2), pct_start=0.2)
    losses: list[float] = []
    for step in range(1, steps + 1):
        scans, labels = next(batches)
        features = network.features(scans)
        loss = F.cross_entropy(network.judge(features), labels)
        found = F.cross_entropy(scout(features.amax(dim=(2, 3, 4))), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss + found)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps:
            say(f"step {step} of {steps}: loss {np.mean(losses[-50:]):.4f}")
    _settle(network, batches)
    network.eval()


def _settle(network: net.DemoNet, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    # The running statistics trail behind weights that moved; a plain average over fresh scans does not.
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm3d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for _ in range(_SETTLING):
            network(next(batches)[0])


def _batches(subjects: list[cohort.Anatomy], seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (16, 1, *INPUT_SHAPE) with labels (16,), half of them with a lesion."""
    number = 0
    # Each scan has its own stream, so the order in which threads finish changes nothing.
    with ThreadPoolExecutor(2) as pool:
        while True:
            wanted = range(number, number + _BATCH)
            # Averaged over the whole volume a small lesion is all but lost; one that starts large is found, and
            # then followed as it shrinks.
            ease = max(0.0, 1 - number / (_EASY * steps * _BATCH))
            scans = list(pool.map(partial(_training_scan, subjects, seed, ease), wanted))
            yield torch.from_numpy(np.stack(scans)[:, None]), torch.tensor([i % 2 for i in wanted])
            number += _BATCH


def _training_scan(subjects: list[cohort.Anatomy], seed: int, ease: float, number: int) -> NDArray[np.float32]:
    """A scan as the network sees it, (*INPUT_SHAPE): odd numbers have a lesion.

    What the transforms of :data:`net.PREPROCESS` do to a scan file, in one step and without the file.
    """
    rng = np.random.default_rng((seed, _TRAINING, number))
    scan = _random_case(subjects[rng.integers(len(subjects))], rng, bool(number % 2), ease, "RAS").scan
    turn = scan.grid.affine[:3, :3] / scan.grid.spacing
    middle = scan.grid.world((np.array(scan.grid.shape) - 1) / 2)
    target = cohort.scan_grid("RAS", (net.SPACING_MM,) * 3, np.array(net.INPUT_SHAPE) * net.SPACING_MM, middle, turn)
    values = resample(scan.array, scan.grid, target)
    low, high = np.percentile(values, net.PERCENTILES)
    return (values - np.float32(low)) / np.float32(high - low)


def _random_case(
    subject: cohort.Anatomy, rng: np.random.Generator, lesion: bool, ease: float = 0.0, orientation: str | None = None
) -> cohort.Case:
    posed = cohort.posed(subject, rng)
    middle = posed.grid.world((np.array(posed.grid.shape) - 1) / 2)
    return cohort.case("scan", posed, cohort.random_grid(rng, middle, orientation), rng, lesion, ease)


def held_out_logits(network: nn.Module, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (count, 2) and labels (count,) of scans that no training saw, each of a newly bent head.

    They take a user's way in: written as NIfTI in one of the 48 orientations, read back, preprocessed by MONAI.
    """
    scan = cohort.head()

    def cases() -> Iterator[cohort.Case]:
        for number in range(count):
            rng = np.random.default_rng((seed, _HELD_OUT, number))
            yield _random_case(cohort.anatomy(scan, rng), rng, bool(number % 2))

    return _logits(network, cases())


def _logits(network: nn.Module, cases: Iterable[cohort.Case]) -> tuple[Tensor, Tensor]:
    logits, labels = [], []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "scan.nii.gz"
        for case in cases:
            cohort.write_scan(path, case.scan)
            logits.append(network(net.prepared(read_scan(path)))[0])
            labels.append(case.label)
    return torch.stack(logits), torch.tensor(labels)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).float().mean())
