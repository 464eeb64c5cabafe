"""Every example in configs/ runs as it stands."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from monai.networks.nets import DenseNet
from typer.testing import CliRunner

from volsal.cli import app
from volsal.demo import net
from volsal.demo.cohort import write_cohort

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """configs/ beside the scans that scripts/demo would have made, two of them."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(CONFIGS, folder / "configs")
    for path in sorted(write_cohort(folder / "volsal-demo" / "scans"))[2:]:
        if path.name.endswith(".nii.gz"):
            path.unlink()
    return folder


@pytest.mark.filterwarnings("ignore")  # torch.export warns about itself
def export(path):
    program = torch.export.export(net.load(), (torch.zeros(1, 1, *net.INPUT_SHAPE),))
    torch.export.save(program, path)


def write_bundle(folder):
    """A bundle as `monai.bundle` knows it, untrained."""
    network = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "init_features": 8, "block_config": [2, 2]}
    steps = [
        {"_target_": "LoadImaged", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
        {"_target_": "Spacingd", "keys": "image", "pixdim": [6.0, 6.0, 6.0]},
        {"_target_": "ScaleIntensityd", "keys": "image"},
    ]
    inference = {
        "device": "$torch.device('cpu')",
        "network_def": {"_target_": "DenseNet", **network},
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": steps},
    }
    channels = {"outputs": {"pred": {"channel_def": {"0": "no finding", "1": "finding"}}}}
    for name, content in {"inference": inference, "metadata": {"network_data_format": channels}}.items():
        (folder / "configs").mkdir(parents=True, exist_ok=True)
        (folder / "configs" / f"{name}.json").write_text(json.dumps(content))
    (folder / "models").mkdir()
    torch.save(DenseNet(**network).state_dict(), folder / "models" / "model.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_an_example_runs(repository, name):
    if name == "exported.yaml":
        export(repository / "configs" / "model.pt2")
    if name == "bundle.yaml":
        write_bundle(repository / "configs" / "bundle")
    result = CliRunner().invoke(app, ["run", str(repository / "configs" / name)])
    assert result.exit_code == 0, result.output
    assert "2 done" in result.output
