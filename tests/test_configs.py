"""Every example in configs/ runs as it stands."""

import shutil
from pathlib import Path

import pytest
import torch
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_an_example_runs(repository, name):
    if name == "exported.yaml":
        export(repository / "configs" / "model.pt2")
    result = CliRunner().invoke(app, ["run", str(repository / "configs" / name)])
    assert result.exit_code == 0, result.output
    assert "2 done" in result.output
