import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import volsal
from volsal.audit.geometry import GeometryError, check_geometry
from volsal.scans import Scan

AFFINE = np.array([[-1.4, 0.2, 0, 40], [0.15, 1.9, 0, -30], [0, 0, 2.4, 10], [0, 0, 0, 1]])


class Strided(nn.Module):
    """Two convolutions of stride 2 with kernels that weigh both sides alike: cell i looks at voxel 4 i."""

    def __init__(self):
        super().__init__()
        kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = torch.einsum("i,j,k->ijk", kernel, kernel, kernel)[None, None]
        layers = []
        for _ in range(2):
            layer = nn.Conv3d(1, 1, 3, stride=2, padding=1, bias=False)
            layer.weight.data = kernel.clone()
            layers += [layer, nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(1, 2)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3, 4)))


@pytest.fixture
def scan():
    rng = np.random.default_rng(5)
    i, j, k = np.meshgrid(*[np.linspace(-1, 1, n) for n in (40, 36, 32)], indexing="ij")
    content = (
        200 + 300 * np.exp(-3 * ((i - 0.2) ** 2 + (j + 0.1) ** 2 + k**2)) + 40 * i + 20 * j + rng.normal(0, 2, i.shape)
    )
    return Scan.from_array(content, AFFINE)


def steps():
    import monai.transforms as transforms

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a default that MONAI changed
        turn = transforms.Orientation("RAS")
    return [turn, transforms.Spacing((2.0, 2.0, 2.0)), transforms.SpatialPad((48, 48, 48))]


def stages(report):
    return {stage.name: stage for stage in report.stages}


def test_sound_preprocessing_and_way_home(scan, tmp_path):
    report = check_geometry(volsal.Explainer(Strided(), steps(), "grad-cam", 1), scan)
    found = stages(report)
    assert report.sound()
    assert report.planted == 9
    assert found["preprocessing"].distances_mm.max() < 0.5
    assert found["map on the scan"].distances_mm.max() < 0.5
    # A closed form: cells at 4 i, where half-pixel says 4 i + 1.5.
    np.testing.assert_allclose(found["features, half-pixel"].errors_voxels.mean(0), 1.5, atol=0.35)
    np.testing.assert_allclose(found["features, nominal"].errors_voxels.mean(0), 0, atol=0.35)
    report.write(tmp_path / "g.json")
    assert [entry["stage"] for entry in json.loads((tmp_path / "g.json").read_text())["stages"]] == list(found)


def test_a_shifted_tensor_under_a_kept_affine_is_seen(scan):
    """What comparing contents cannot see: the image moved by three voxels, its affine did not."""

    class Roll:
        def __call__(self, x):
            moved = x.clone()
            moved[:] = torch.roll(x.as_tensor(), 3, dims=2)
            return moved

    report = check_geometry(volsal.Explainer(Strided(), [*steps(), Roll()], "grad-cam", 1), scan)
    assert not report.sound()
    np.testing.assert_allclose(stages(report)["preprocessing"].errors_voxels.mean(0), (0, 3, 0), atol=0.2)


def test_the_user_s_own_function_gets_files(scan, tmp_path):
    import nibabel as nib

    nib.save(nib.Nifti1Image(scan.array, scan.grid.affine), tmp_path / "scan.nii.gz")
    seen = []

    def function(path):
        seen.append(path)
        image = nib.load(path)
        return np.asarray(image.dataobj, dtype=np.float32)[None], image.affine

    report = check_geometry(
        volsal.Explainer(Strided(), function, "input-gradient", 1), volsal.read_scan(tmp_path / "scan.nii.gz")
    )
    assert report.sound()
    assert len({path.parent for path in seen}) > 1
    assert not any(path.exists() for path in seen if path.parent != tmp_path)
    assert [stage.name for stage in report.stages] == ["preprocessing", "map on the scan"]


def test_preprocessing_that_hides_everything_is_an_error(scan):
    class Blank:
        def __call__(self, x):
            return x * 0

    with pytest.raises(GeometryError, match="crop, clip or mask"):
        check_geometry(volsal.Explainer(Strided(), [Blank()], "grad-cam", 1), scan)


def test_mirrored_voxels_are_seen_though_the_phantom_is_symmetric():
    i, j, k = np.meshgrid(*[np.linspace(-1, 1, n) for n in (40, 36, 12)], indexing="ij")
    symmetric = Scan.from_array(300 * np.exp(-3 * (i**2 + j**2 + k**2)), np.diag([2.0, 2.0, 3.0, 1.0]))

    class Mirrored:
        def __call__(self, x):
            turned = x.clone()
            turned[:] = x.as_tensor().flip(1)
            return turned

    assert check_geometry(volsal.Explainer(Strided(), [], "grad-cam", 1), symmetric).sound()
    assert check_geometry(volsal.Explainer(Strided(), [Mirrored()], "grad-cam", 1), symmetric).sound() is False


def test_an_intensity_window_does_not_count_as_a_shift(scan):
    import monai.transforms as transforms

    window = transforms.ScaleIntensityRange(150, 330, 0, 1, clip=True)
    report = check_geometry(volsal.Explainer(Strided(), [*steps(), window], "grad-cam", 1), scan)
    assert report.sound()


@pytest.mark.parametrize(
    ("turn", "noted"),
    [(lambda x: x.roll(16, 2), True), (lambda x: x.permute(0, 1, 4, 3, 2), False)],  # the second can be followed
)
def test_a_model_that_shifts_its_input_unseen_is_noted(scan, turn, noted):
    class Turned(Strided):
        def forward(self, x):
            return super().forward(turn(x))

    explainer = volsal.Explainer(Turned(), steps(), "grad-cam", 1, alignment="half-pixel")
    assert any("turn or shift" in note for note in check_geometry(explainer, scan).notes) == noted
