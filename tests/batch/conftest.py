import pytest
import yaml

NET = """
import os, time, torch
from torch import nn

class Net(nn.Module):
    \"\"\"A small network with accidents: what the first voxel of a scan says, happens.\"\"\"
    def __init__(self, accidents):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2))
        self.head = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2))
        self.accidents = accidents

    def forward(self, x):
        what = self.accidents.get(str(round(float(x.detach()[0, 0, 0, 0, 0]))))
        if what == "hang":
            while True:
                time.sleep(0.01)
        if what == "die":
            os._exit(9)
        if what == "memory":
            raise torch.OutOfMemoryError("no room")
        if what == "error":
            raise RuntimeError("boom")
        return self.head(self.features(x))

def build(accidents={}):
    return Net(accidents)
"""


@pytest.fixture
def config(tmp_path, scan_file):
    """A function that writes a config over three sound scans and returns its path; keywords replace sections.

    ``accidents``: first voxel of a scan -> what happens to the network that sees it.
    """
    (tmp_path / "net.py").write_text(NET)
    for name in ("a.nii.gz", "sub/b.nii.gz", "sub/c.nii.gz"):
        scan_file(f"scans/{name}", shape=(12, 14, 10))

    def write(accidents=None, **sections):
        content = {
            "model": {"factory": "net.py:build", "arguments": {"accidents": accidents or {}}},
            "methods": ["grad-cam"],
            "targets": ["class-1"],
            "alignment": "half-pixel",
            "scans": {"folder": "scans"},
            "output": "out",
            "threads": 1,
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content | sections))
        return path

    return write


@pytest.fixture
def accident(scan_file):
    """A function that adds a scan whose first voxel is ``number``."""
    import numpy as np

    def add(name, number):
        array = np.random.default_rng(number).normal(size=(12, 14, 10)).astype(np.float32)
        array[0, 0, 0] = number
        return scan_file(f"scans/{name}.nii.gz", array=array, shape=array.shape, dtype=np.float32)

    return add
