"""Run folders with maps that are known, made without a model."""

import json

import nibabel as nib
import numpy as np

from volsal.explanation import Explanation, Heatmap, Prediction
from volsal.grid import Grid
from volsal.run_folder import Fault, RunFolder
from volsal.scans import read_scan

BLOB_MM = np.array([14.0, 6.0, -5.0])  # to the patient's right


def grid_of(codes="RAS", degrees=0.0, shape=(20, 24, 14), spacing=(2.0, 1.5, 3.0)):
    """A grid about the world's origin; ``codes`` names its axes, ``degrees`` turns it about the patient's x."""
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    axes = np.zeros((3, 3))
    sizes, steps = [0, 0, 0], [0.0, 0.0, 0.0]
    for axis, code in enumerate(codes):
        world = next(n for n, pair in enumerate(("RL", "AP", "SI")) if code in pair)
        axes[world, axis] = 1 if code in "RAS" else -1
        sizes[axis], steps[axis] = shape[world], spacing[world]
    affine = np.eye(4)
    affine[:3, :3] = turn @ axes @ np.diag(steps)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(sizes) - 1) / 2)
    return Grid(sizes, affine)


def distance(grid):
    at = grid.world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1))
    return at, np.linalg.norm(at - BLOB_MM, axis=-1)


def write_scan(path, grid, seed=0):
    at, far = distance(grid)
    values = 300 + 4 * at[..., 1] + 200 * (far > 20) + np.random.default_rng(seed).integers(0, 50, grid.shape)
    image = nib.Nifti1Image(values.astype(np.int16), grid.affine, dtype=np.int16)
    image.header.set_xyzt_units("mm")
    image.set_sform(grid.affine, 1)
    image.set_qform(grid.affine, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def maps_of(grid, scale=1.0, target_text="logit of class 1"):
    """An unsigned, a signed and an empty map."""
    at, far = distance(grid)
    blob = (scale * np.exp(-((far / 9) ** 2))).astype(np.float32)
    blob[far > 22] = 0
    signed = (scale * np.sin(at[..., 1] / 9) * np.exp(-((far / 25) ** 2))).astype(np.float32)
    unlike = {"grad-cam": blob, "input-gradient": signed, "layer-cam": np.zeros_like(blob)}
    return [
        Heatmap(
            method=method,
            target="class-1",
            target_text=target_text,
            layer=None if method == "input-gradient" else "block3",
            unit="logit per cell",
            signed=method == "input-gradient",
            values=values,
            raw=values,
            raw_grid=grid,
            grid=grid,
            score=1.25,
        )
        for method, values in unlike.items()
    ]


def add_case(run, case, scan_path, scale=1.0, class_name="lesion", notes=(), **maps):
    scan = read_scan(scan_path)
    provenance = {"model": {"class": "Net", "weights_sha256": "ab" * 32}, "alignment": "measured", "device": "cpu"}
    said = Prediction((0.5, 1.25), 1, class_name)
    Explanation(case, scan, said, tuple(maps_of(scan.grid, scale, **maps)), tuple(notes), provenance).save(run)


def begin(path, inputs=None):
    """A run folder with its ``run.json``, and ``inputs.json`` where ``inputs`` are given."""
    run = RunFolder(path)
    path.mkdir(parents=True, exist_ok=True)
    run.write_run(
        {
            "config": {"model": {"factory": "/secret/place/net.py:build", "weights": "/secret/place/w.safetensors"}},
            "methods": ["grad-cam", "input-gradient", "layer-cam"],
            "weights_sha256": "ab" * 32,
            "volsal": "0.1.0",
            "versions": {"torch": "2.13"},
            "machine": "a machine",
        }
    )
    if inputs is not None:
        run.write_inputs(inputs)
    return run


def fault(run, case, status="refused", reason="/data/Jane Roe/x.nii: the file is empty", code="scan"):
    run.write_fault(case, Fault(status, code, reason))


def geometry_of(page):
    """What a case's page tells its viewer: the description, and the volumes' bytes unpacked; by the page's own text."""
    import base64
    import gzip
    import re

    text = page.read_text(encoding="utf-8")
    about = json.loads(re.search(r'class="geometry">(.*?)</script>', text, re.S)[1])
    packed = re.findall(r'class="volume">(.*?)</script>', text, re.S)
    shape = about["shape"]
    volumes = [
        np.frombuffer(gzip.decompress(base64.b64decode(one)), np.uint8).reshape(shape, order="F") for one in packed
    ]
    return about, volumes
