import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from volsal.demo import cohort, net, train
from volsal.grid import Grid
from volsal.scans import read_scan


@pytest.fixture(scope="module")
def shipped():
    return net.load()


def test_importing_the_network_does_not_import_monai():
    check = "import sys, volsal.demo.net; sys.exit('monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_preprocess_is_plain_data_such_as_yaml_holds():
    assert json.loads(json.dumps(net.PREPROCESS)) == net.PREPROCESS


def test_the_network_answers_with_two_logits_and_halves_the_grid_twice():
    network = net.build().eval()
    with torch.no_grad():
        assert network(torch.zeros(2, 1, *net.INPUT_SHAPE)).shape == (2, 2)
        cells = network.block3(network.block2(network.block1(network.stem(torch.zeros(1, 1, *net.INPUT_SHAPE)))))
    assert tuple(cells.shape[2:]) == tuple(n // 4 for n in net.INPUT_SHAPE)


def test_each_cell_of_the_last_layer_looks_at_voxels_centred_where_the_half_pixel_rule_puts_it():
    network = net.build().double().eval()
    # With positive weights and no norm in the way every voxel in reach leaves a trace, the same on either side.
    for module in network.modules():
        if isinstance(module, torch.nn.Conv3d):
            torch.nn.init.constant_(module.weight, 1.0)
    image = torch.ones(1, 1, 32, 32, 32, dtype=torch.float64, requires_grad=True)
    cells = network.block3(network.block2(network.block1(network.stem(image))))
    cell = (4, 4, 3)
    (reach,) = torch.autograd.grad(cells[(0, 0, *cell)], image)
    weight = reach[0, 0].abs().numpy()
    centroid = [np.average(np.arange(32), weights=weight.sum(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    expected = Grid((32, 32, 32), np.eye(4)).coarse((8, 8, 8)).world(cell)
    np.testing.assert_allclose(centroid, expected, atol=1e-9)


def test_the_shipped_weights_are_small_and_are_all_that_the_network_has(shipped):
    from importlib.resources import as_file, files

    with as_file(files("volsal.demo").joinpath("weights.safetensors")) as path:
        assert path.stat().st_size < 300_000
        weights = load_file(path)
    assert weights.keys() == shipped.state_dict().keys()
    assert not shipped.training
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_the_record_of_the_training_says_how_the_weights_came_to_be():
    from importlib.resources import files

    record = json.loads(files("volsal.demo").joinpath("weights.train.json").read_text())
    assert record["held_out_scans"] >= 100
    assert record["held_out_accuracy"] >= 0.97
    assert record["demo_accuracy"] == 1.0


def test_the_shipped_network_tells_all_eight_demo_scans_right_by_a_clear_margin(shipped, tmp_path):
    paths = cohort.write_cohort(tmp_path)
    for path, case in zip(paths, cohort.demo_cases(), strict=True):
        with torch.no_grad():
            logits = shipped(net.prepared(read_scan(path)))[0]
        margin = float(logits[case.label] - logits[1 - case.label])
        assert margin > 1, f"{case.name}: {margin:.2f}"


def test_training_sees_what_the_transforms_make_of_a_scan():
    subject = cohort.anatomy(cohort.head())
    rng = np.random.default_rng((0, train._TRAINING, 7))
    rng.integers(1)  # the draw of a subject
    case = train._random_case(subject, rng, lesion=True, orientation="RAS")
    shown = train._training_scan([subject], 0, 0.0, 7)
    real = net.prepared(case.scan)[0, 0].numpy()
    # The two grids differ by up to half a voxel of 3 mm.
    assert np.corrcoef(shown.ravel(), real.ravel())[0, 1] > 0.98
    assert shown.mean() == pytest.approx(real.mean(), rel=0.02)


def test_a_training_of_two_steps_writes_weights_and_a_record_that_fit_the_network(tmp_path):
    said = []
    record = train.train(tmp_path, seed=4, steps=2, held_out=2, anatomies=2, say=said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.safetensors", "weights.train.json"]
    assert json.loads((tmp_path / "weights.train.json").read_text()) == record
    assert record["steps"] == 2
    assert record["seed"] == 4
    assert record["torch"] == torch.__version__
    assert said
    network = net.build()
    network.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert all(
        float(norm.running_var.min()) > 0 for norm in network.modules() if isinstance(norm, torch.nn.BatchNorm3d)
    )


@pytest.mark.slow
def test_the_same_seed_trains_the_same_weights(tmp_path):
    for name in ("a", "b"):
        train.train(tmp_path / name, seed=1, steps=1, held_out=2, anatomies=1, say=lambda line: None)
    first, second = (load_file(tmp_path / name / "weights.safetensors") for name in ("a", "b"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)
