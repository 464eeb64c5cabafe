"""Maps against places that are known: phantoms in every storage orientation, and models with planted evidence."""

import importlib.util
import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from volsal import ClassLogit, ClassMargin, Explainer, load_model
from volsal.preprocess import as_preprocess


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    from conftest import SHARED

    if not (SHARED / "tools" / "orient.py").exists():
        pytest.skip("needs tools/orient.py, which lies beside the project's own checkout and is not part of it")
    folder = tmp_path_factory.mktemp("orient")
    command = [sys.executable, SHARED / "tools" / "orient.py", "make", folder, "--set", "smoke"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return folder, json.loads((folder / "cases.json").read_text()), module(SHARED / "tools" / "blobmodel.py")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["conv", "avg", "max"])
@pytest.mark.parametrize("steps", ["scan", "RAS"])
def test_the_peak_lies_within_a_voxel_of_the_blob_in_every_orientation(phantoms, kind, steps):
    folder, content, blobmodel = phantoms
    model = blobmodel.Net(kind)
    transforms = pytest.importorskip("monai.transforms")
    labels = (("L", "R"), ("P", "A"), ("I", "S"))
    preprocess = None if steps == "scan" else [transforms.Orientation("RAS", labels=labels)]
    explainer = Explainer(model, preprocess, ["input-gradient", "guided-backprop"], ClassLogit(1))
    for case in content["cases"]:
        explanation = explainer(folder / case["scan"])
        for heatmap in explanation.maps:
            truth = explanation.scan.grid.voxel(case["target_mm"])
            # A maximum takes its gradient from one voxel of each pool, so the map's own middle is coarser there.
            assert np.abs(centre(heatmap) - truth).max() <= (1.0 if kind == "max" else 0.15), (
                case["id"],
                heatmap.method,
            )
            if kind != "max":
                assert np.abs(explanation.scan.grid.voxel(heatmap.peak_mm) - truth).max() <= 1.0, case["id"]


def centre(heatmap):
    """Centre of mass, in voxels, of what exceeds half of the map's maximum."""
    weight = np.where(heatmap.values > heatmap.values.max() / 2, heatmap.values, 0).astype(float)
    index = np.stack(np.meshgrid(*map(np.arange, weight.shape), indexing="ij"), -1)
    return (index * weight[..., None]).reshape(-1, 3).sum(0) / weight.sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "task", "value", "hits", "mean_mm"), [("resnet", "lesion", 1, 0.95, 8.0), ("plain", "corner", 3, 0.8, 6.5)]
)
def test_guided_backprop_hits_the_evidence_of_trained_models(shared, arch, task, value, hits, mean_mm):
    truth, code = shared("truth"), shared("truth/models.py")
    model = load_model(f"{code}:build", {"arch": arch}, truth / "models" / f"{arch}_{task}.safetensors")
    explainer = Explainer(model, as_preprocess(module(code).preprocess), "guided-backprop", ClassMargin(1, 0))
    found = []
    for entry in json.loads((truth / task / "truth.json").read_text())["scans"][:32]:
        if entry["label"] != 1:
            continue
        explanation = explainer(truth / task / entry["scan"])
        if explanation.prediction.index == 1:
            mask = nib.load(truth / task / entry["mask"])
            inside = nib.affines.apply_affine(mask.affine, np.argwhere(np.asanyarray(mask.dataobj) == value))
            peak = np.array(explanation.maps[0].peak_mm)
            voxel = tuple(np.rint(explanation.scan.grid.voxel(peak)).astype(int))
            hit = np.asanyarray(mask.dataobj)[voxel] == value
            found.append((hit, np.linalg.norm(inside.mean(0) - peak)))
    assert len(found) >= 10
    hit, distance = np.array(found).T
    assert hit.mean() >= hits
    assert distance.mean() <= mean_mm
