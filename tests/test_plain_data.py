"""What a record says of settings."""

import json
import os
import subprocess
import sys
from enum import Enum
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.transforms import CenterSpatialCrop, Spacing
from torch import nn

from volsal.attribution import GradCAM
from volsal.plain_data import plain_data


class Fill(Enum):
    BLUR = "blur"


class Own:
    pass


class Broken:
    def __str__(self):
        raise RuntimeError("no words")


def kept(value, most_numbers=0):
    """As a record gives it back."""
    return json.loads(json.dumps(plain_data(value, most_numbers), allow_nan=False))


def test_collections_and_numbers():
    given = {1: (2.5, None, "x"), "n": np.float32(3), "i": float("inf"), "s": {"b", "a"}, "e": Fill.BLUR, "z": True}
    assert kept(given) == {"1": [2.5, None, "x"], "n": 3.0, "i": "inf", "s": ["a", "b"], "e": "blur", "z": True}
    assert kept({"p": GradCAM("a")})["p"] == {"kind": "GradCAM", "layer": "a", "features": None}


@pytest.mark.parametrize("kind", [np.ones, torch.ones, lambda n: torch.ones(n, requires_grad=True)])
def test_an_array_is_told_by_its_digest_unless_its_numbers_are_few(kind):
    assert kept(kind(2)).keys() == {"shape", "sha256"}
    assert kept(kind(2)) == kept(kind(2)) != kept(2 * kind(2))
    assert kept(kind(2), 2) == [1.0, 1.0]
    assert kept(kind(3), 2)["shape"] == [3]
    assert kept(kind(()), 0) == 1.0
    assert kept({"a": [kind(2)]}, 2) == {"a": [[1.0, 1.0]]}


def test_a_transform_is_told_with_what_it_was_made_with():
    assert kept(CenterSpatialCrop([2, 3, 4]), 64) == {"kind": "CenterSpatialCrop", "settings": {"roi_size": [2, 3, 4]}}
    assert kept(Spacing(1.5, mode="nearest"))["settings"]["sp_resample"]["settings"]["mode"] == "nearest"


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (np.mean, "mean"), (nn.ReLU, "ReLU"), (Own(), "Own"), (partial(np.mean, axis=0), "partial"),
        (torch.float16, "torch.float16"), (slice(1, 2), "slice(1, 2, None)"), (torch.device("cpu"), "cpu"),
        (np.array([Own()] * 100), "ndarray"), (range(10**9), "range(0, 1000000000)"), (Path("a/b"), "a/b"),
        (SimpleNamespace(x={"a", "b"}), "SimpleNamespace"), (nn.ReLU(), "ReLU"), (Broken(), "Broken"),
        (np.clongdouble(1), "(1+0j)"), (b"ab", {"bytes": 2, "sha256": sha256(b"ab").hexdigest()}),
    ],
)  # fmt: skip
def test_nothing_is_told_by_its_address(value, word):
    assert kept(value) == word


def test_words_in_a_set_stand_in_one_order_in_every_process():
    code = "from volsal.plain_data import plain_data; print(plain_data({'a', 'b', 'c', 'd', 'e'}))"
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert told == {"['a', 'b', 'c', 'd', 'e']\n"}
