import hashlib
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from volsal.grid import Grid
from volsal.preprocess import MonaiSteps, PathFunction, PreprocessError, as_preprocess
from volsal.scans import Scan, read_scan

pytestmark = pytest.mark.filterwarnings("ignore:.*labels:FutureWarning")  # Orientation, of itself
monai_transforms = pytest.importorskip("monai.transforms")


@pytest.fixture
def scan(scan_file):
    return read_scan(scan_file())


def blob_position(tensor, grid):
    """World position of the centre of mass of the brightest part."""
    volume = tensor[0, 0].numpy()
    weight = np.clip(volume - volume.min() - 0.75 * np.ptp(volume), 0, None)
    index = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), -1)
    return grid.world((index * weight[..., None]).reshape(-1, 3).sum(0) / weight.sum())


def test_nothing_is_the_scan_as_it_is(scan):
    result = as_preprocess(None)(scan)
    assert result.grid.same_as(scan.grid)
    np.testing.assert_array_equal(result.tensor[0, 0].numpy(), scan.array)


CHAINS = {
    "orientation": ["Orientation"],
    "spacing": [{"Spacing": {"pixdim": [1.5, 2.0, 3.0]}}],
    "crop": [{"SpatialCrop": {"roi_start": [3, 4, 2], "roi_end": [22, 26, 18]}}],
    "pad": [{"SpatialPad": {"spatial_size": [40, 40, 40]}}],
    "resize": [{"Resize": {"spatial_size": [31, 20, 33]}}],
    "flip": [{"Flip": {"spatial_axis": 1}}],
    "turn": [{"Rotate90": {"k": 1, "spatial_axes": [0, 2]}}],
    "zoom": [{"Zoom": {"zoom": 1.3, "keep_size": False}}],
    "all": [
        {"Orientation": {"axcodes": "RAS"}},
        {"Spacing": {"pixdim": [2, 2, 2]}},
        {"ScaleIntensityRange": {"a_min": 0, "a_max": 500, "b_min": 0, "b_max": 1, "clip": True}},
        {"CropForeground": {"margin": 1}},
        {"ResizeWithPadOrCrop": {"spatial_size": [24, 30, 26]}},
        "NormalizeIntensity",
    ],
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_grid_says_where_every_chain_put_the_scan(scan, name):
    steps = CHAINS[name] if name != "orientation" else [{"Orientation": {"axcodes": "PIR"}}]
    before = blob_position(torch.from_numpy(scan.array)[None, None], scan.grid)
    result = MonaiSteps.from_config(steps)(scan)
    assert result.tensor.ndim == 5
    assert tuple(result.tensor.shape[2:]) == result.grid.shape
    np.testing.assert_allclose(blob_position(result.tensor, result.grid), before, atol=0.6)


def test_each_step_is_told_with_what_it_did_to_the_voxels(scan):
    steps = [
        {"Flip": {"spatial_axis": 1}},
        {"ScaleIntensityRange": {"a_min": 0, "a_max": 500, "b_min": 0, "b_max": 1}},
        {"ResizeWithPadOrCrop": {"spatial_size": [20, 34, 20]}},  # of 24, 28, 20: crops by 2 and pads by 3
    ]
    made = MonaiSteps.from_config(steps)(scan).steps
    flip, crop = np.diag([1.0, -1, 1, 1]), np.eye(4)
    flip[1, 3], crop[:2, 3] = 27, (2, -3)
    assert [step.name for step in made] == ["Flip", "ScaleIntensityRange", "ResizeWithPadOrCrop"]
    for step, expected in zip(made, (flip, np.eye(4), crop), strict=True):
        np.testing.assert_array_equal(step.matrix, expected)
    assert made[1].settings.items() >= {"a_max": 500, "b_min": 0, "dtype": "float32", "clip": False}.items()
    assert made[2].settings["cropper"] == {"kind": "CenterSpatialCrop", "settings": {"roi_size": [20, 34, 20]}}
    assert json.loads(json.dumps([step.describe() for step in made], allow_nan=False))[0]["matrix"][1] == [0, -1, 0, 27]


class Odd:
    """A step with settings of every kind."""

    def __init__(self):
        self.few, self.many, self.bound = np.arange(3), np.ones((5, 5, 5), np.float32), float("inf")
        self.function, self.thing, self._own = as_preprocess, object(), 1
        self.learnt, self.things = torch.ones(2, requires_grad=True).half(), np.array([object()])

    def __call__(self, image):
        return image + 1


def test_settings_are_told_alike_in_every_process(scan):
    (step,) = MonaiSteps([Odd()])(scan).steps
    digest = hashlib.sha256(b"\x00\x00\x80\x3f" * 125).hexdigest()
    assert (step.name, step.settings) == (
        "Odd",
        {
            "few": [0, 1, 2],
            "many": {"shape": [5, 5, 5], "sha256": digest},
            "bound": "inf",
            "function": "as_preprocess",
            "thing": "object",
            "learnt": [1.0, 1.0],
            "things": "ndarray",
        },
    )
    assert repr(PathFunction(Odd())) == "Odd"


def test_a_step_that_flattens_space_is_named(scan):
    def flat(image):
        image.affine[:, 1] = 0
        return image.clone()

    with pytest.raises(PreprocessError, match=r"step 2, function, gives no usable place .*flattens space"):
        MonaiSteps([monai_transforms.Flip(1), flat, monai_transforms.Flip(1)])(scan)


def test_a_step_that_changes_its_image_in_place_is_told_with_what_it_did(scan):
    def shifted(image):
        image.affine[:3, 3] += image.affine[:3, 0]
        return image

    (step,) = MonaiSteps([shifted])(scan).steps
    expected = np.eye(4)
    expected[0, 3] = 1
    np.testing.assert_allclose(step.matrix, expected, atol=1e-12)


def test_a_function_is_one_step(scan):
    def halved(path):
        image = nib.load(path)
        return image.get_fdata()[None, ::2], image.affine @ np.diag([2, 1, 1, 1])

    (step,) = PathFunction(halved)(scan).steps
    assert (step.name.rpartition(".")[2], step.settings) == ("halved", {})
    np.testing.assert_allclose(step.matrix, np.diag([2, 1, 1, 1]), atol=1e-12)


def test_the_scan_itself_is_never_written_to(scan):
    kept = scan.array.copy()
    for steps in ([], ["NormalizeIntensity"], [{"Flip": {"spatial_axis": 0}}]):
        result = MonaiSteps.from_config(steps)(scan)
        result.tensor.fill_(7)
    np.testing.assert_array_equal(scan.array, kept)


class Bare:
    def __call__(self, image):
        return image.numpy() * 2


class Restarting:
    """What a step written for arrays does when it wraps its result again."""

    def __call__(self, image):
        from monai.data import MetaTensor

        return MetaTensor(image.as_tensor() * 2)


class Turning:
    def __init__(self, *axes):
        self.axes = axes

    def __call__(self, image):
        return torch.flip(image, self.axes)


class Swapping:
    def __call__(self, image):
        from monai.data import MetaTensor

        return MetaTensor(image.as_tensor().transpose(1, 2), affine=image.affine)


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (Bare(), "step 2, Bare, returned a bare ndarray, so where its voxels lie is lost"),
        (Restarting(), "step 2, Restarting, set the affine back to identity"),
        (Turning(1), "fits the scan better mirrored along axis 0"),
        (Turning(1, 3), "fits the scan better mirrored along axis 0 and mirrored along axis 2"),
    ],
)
def test_a_step_that_loses_or_falsifies_the_affine_is_caught(scan, step, says):
    with pytest.raises(PreprocessError, match=says):
        as_preprocess([monai_transforms.Orientation("RAS"), step])(scan)


def test_swapped_axes_of_a_cube_are_caught(scan_file):
    scan = read_scan(scan_file(shape=(22, 22, 22)))
    with pytest.raises(PreprocessError, match="with its axes in the order 1 0 2"):
        as_preprocess([monai_transforms.ScaleIntensity(), Swapping()])(scan)


@pytest.mark.parametrize("change", [lambda x: -x, lambda x: x.clip(100, 300), np.sqrt, lambda x: x * 0 + 1])
def test_intensity_changes_are_not_taken_for_turns(scan, change):
    function = PathFunction(lambda path: (change(np.abs(scan.array))[None], scan.grid.affine))
    assert function(scan).grid.same_as(scan.grid)


@pytest.mark.parametrize("flip", [0, 1, 2])
def test_a_mirrored_head_is_caught_though_it_looks_much_the_same(shared, flip):
    scan = read_scan(shared("scans/MNI152_T1_2mm.nii.gz"))
    with pytest.raises(PreprocessError, match=f"mirrored along axis {flip}"):
        as_preprocess(lambda path: (np.flip(scan.array, flip).copy()[None], scan.grid.affine))(scan)


@pytest.mark.parametrize(
    "steps", [[{"SpatialPad": {"spatial_size": [90, 90, 90]}}], ["SobelGradients"], ["HistogramNormalize"]]
)
def test_wide_padding_and_strong_filters_are_let_through(scan, steps):
    assert MonaiSteps.from_config(steps)(scan).tensor.shape[0] == 1


def test_the_identity_for_a_scan_that_has_another_affine_is_refused(scan):
    with pytest.raises(PreprocessError, match="returned the identity as affine"):
        as_preprocess(lambda path: (scan.array[None], np.eye(4)))(scan)


def test_a_function_that_reads_the_file_itself_cannot_be_given_a_volume(scan_file):
    stack = scan_file(array=np.stack([np.ones((6, 7, 8)), np.ones((6, 7, 8))], -1), shape=(6, 7, 8))
    with pytest.raises(PreprocessError, match="volume 1 cannot be chosen"):
        as_preprocess(lambda path: None)(read_scan(stack, volume=1))


def test_an_affine_of_another_place_is_caught(scan):
    moved = scan.grid.affine.copy()
    moved[:3, 3] += 500
    with pytest.raises(PreprocessError, match="only 0% of the model's input lies inside the scan"):
        as_preprocess(lambda path: (scan.array[None], moved))(scan)


@pytest.mark.parametrize("shape", [(1, 24, 28, 20), (1, 1, 24, 28, 20)])
def test_a_function_gets_the_path_and_gives_tensor_and_affine(scan, shape):
    seen = []
    result = as_preprocess(lambda path: (seen.append(path), (scan.array.reshape(shape), scan.grid.affine))[1])(scan)
    assert seen == [scan.path]
    assert result.tensor.shape == (1, 1, 24, 28, 20)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda s: s.array, "must return .tensor, affine."),
        (lambda s: (s.array, s.grid.affine), r"gives shape \(24, 28, 20\); expected \(C, D, H, W\)"),
        (lambda s: (s.array[None], np.eye(3)), "gives no usable place"),
        (lambda s: (s.array[None] * np.nan, s.grid.affine), "13,440 NaN or infinite voxels"),
        (lambda s: 1 / 0, "fails: ZeroDivisionError"),
    ],
)
def test_a_functions_wrong_answers_are_told(scan, answer, says):
    with pytest.raises(PreprocessError, match=says):
        as_preprocess(lambda path: answer(scan))(scan)


def test_a_function_needs_a_file(oblique):
    with pytest.raises(PreprocessError, match="made in memory"):
        as_preprocess(lambda path: None)(Scan(np.zeros(oblique.shape, np.float32), oblique))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("Orientatoin", "MONAI has no transform 'Orientatoin'; did you mean 'Orientation'"),
        ({"Orientation": {"axcode": "RAS"}}, "Orientation has no argument 'axcode'; did you mean 'axcodes'"),
        ({"Resize": {}}, "Resize refuses {}"),
        ("LoadImage", "volsal reads the scan itself"),
        ("EnsureChannelFirst", "comes channel-first already"),
        ("Orientationd", "works on dictionaries; use Orientation"),
        ({"RandFlip": {"prob": 0.5}}, "RandFlip is random"),
        ({"Flip": {}, "Zoom": {}}, "must be one name"),
    ],
)
def test_a_wrong_step_in_a_config_is_told_before_any_scan(entry, says):
    with pytest.raises(PreprocessError, match=says):
        MonaiSteps.from_config([entry])


def test_a_step_that_fails_names_itself_and_the_scan(scan):
    with pytest.raises(PreprocessError, match=r"scan\.nii\.gz: preprocessing step 2, Resize, fails"):
        MonaiSteps.from_config(
            [
                {"SpatialCrop": {"roi_start": [0, 0, 0], "roi_end": [2, 2, 2]}},
                {"Resize": {"spatial_size": [4, 4, 4], "mode": "nonsense"}},
            ]
        )(scan)


def test_padding_beside_a_bright_background_is_not_taken_for_a_turn(oblique):
    """The rim between 100 and the pad's 0 outweighs a small blob, and is symmetric where the blob is not."""
    grid = Grid((41, 54, 24), oblique.affine)
    middle = grid.world((27, 34, 14))
    xyz = grid.world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1))
    array = 100 + 400 * np.exp(-((xyz - middle) ** 2).sum(-1) / 50)
    steps = [{"Spacing": {"pixdim": [2.4, 2.2, 1.3]}}, {"ResizeWithPadOrCrop": {"spatial_size": [48, 56, 64]}}]
    result = MonaiSteps.from_config(steps)(Scan(array.astype(np.float32), grid))
    np.testing.assert_allclose(blob_position(result.tensor, result.grid), middle, atol=0.3)


@pytest.mark.parametrize("name", ["Transpose", "GridDistortion"])
def test_steps_that_leave_a_wrong_affine_are_refused_by_name(name):
    arguments = {"Transpose": ([0, 2, 1, 3],), "GridDistortion": (3, [(0.1,) * 4] * 3)}[name]
    with pytest.raises(PreprocessError, match=f"^{name} (moves|bends)"):
        as_preprocess([getattr(monai_transforms, name)(*arguments)])


# What MONAI's spatial transforms do, over sizes that divide and sizes that do not.
PLACING = {
    "Orientation": st.permutations(["RL", "AP", "SI"]).flatmap(
        lambda ends: st.tuples(*map(st.sampled_from, ends)).map(lambda codes: {"axcodes": "".join(codes)})
    ),
    "Spacing": st.builds(
        lambda pixdim, diagonal: {"pixdim": pixdim, "diagonal": diagonal},
        st.tuples(*[st.sampled_from([1.5, 2.0, 2.7])] * 3),
        st.booleans(),
    ),
    "CenterSpatialCrop": st.tuples(*[st.integers(24, 60)] * 3).map(lambda size: {"roi_size": size}),
    "SpatialPad": st.builds(
        lambda size, method: {"spatial_size": size, "method": method},
        st.tuples(*[st.integers(20, 50)] * 3),
        st.sampled_from(["symmetric", "end"]),
    ),
    "ResizeWithPadOrCrop": st.tuples(*[st.integers(26, 50)] * 3).map(lambda size: {"spatial_size": size}),
    "Resize": st.builds(
        lambda size, mode, corners: (
            {"spatial_size": size, "mode": mode, "align_corners": corners and mode[0] == "t"}
            if mode == "trilinear"
            else {"spatial_size": size, "mode": mode}
        ),
        st.tuples(*[st.integers(24, 50)] * 3),
        st.sampled_from(["trilinear", "area", "nearest", "nearest-exact"]),
        st.booleans(),
    ),
    "CropForeground": st.integers(0, 3).map(lambda margin: {"margin": margin}),
    "Flip": st.sampled_from([0, 1, 2, [0, 2], None]).map(lambda axes: {"spatial_axis": axes}),
    "Rotate90": st.builds(
        lambda k, axes: {"k": k, "spatial_axes": axes}, st.integers(1, 3), st.sampled_from([(0, 1), (1, 2), (2, 0)])
    ),
    "Zoom": st.builds(
        lambda zoom, mode, keep: {"zoom": zoom, "mode": mode, "keep_size": keep},
        st.tuples(*[st.sampled_from([0.9, 1.0, 1.15, 1.3])] * 3),
        st.sampled_from(["trilinear", "area", "nearest"]),
        st.booleans(),
    ),
}
steps = st.sampled_from(sorted(PLACING)).flatmap(lambda name: PLACING[name].map(lambda arguments: {name: arguments}))
BLOB_MM = np.array([5.0, -12.0, 33.0])


@pytest.fixture(scope="module")
def phantom():
    """Anisotropic, oblique, mirrored; one bright blob at a known place, and three dim ones that break all symmetry."""
    c, s = np.cos(0.3), np.sin(0.3)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    affine[:3, :3] *= (-1.6, 1.9, 2.6)
    shape = np.array([40, 36, 26])
    affine[:3, 3] = BLOB_MM + np.array([2.3, -1.7, 1.1]) - affine[:3, :3] @ ((shape - 1) / 2)
    xyz = Grid(shape, affine).world(np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1))
    array = np.zeros(shape)
    for offset, width, height in [
        ((0, 0, 0), 6, 1000),
        ((18, 7, -4), 6, 300),
        ((-3, -17, 9), 5, 400),
        ((4, 9, 17), 5, 250),
    ]:
        array += height * np.exp(-((xyz - BLOB_MM - offset) ** 2).sum(-1) / 2 / width**2)
    return Scan(array.astype(np.float32), Grid(shape, affine))


def blob_fits(grid):
    """Whether all that is brighter than half the blob, with 2 mm to spare, lies between the outermost voxel centres."""
    at, reach = grid.voxel(BLOB_MM), 9 / grid.spacing
    return bool(((at - reach >= 0) & (at + reach <= np.array(grid.shape) - 1)).all())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.lists(steps, min_size=1, max_size=4))
def test_after_any_steps_the_blob_is_where_the_affine_says(phantom, chain):
    for length in range(1, len(chain) + 1):
        result = MonaiSteps.from_config(chain[:length])(phantom)
        assume(blob_fits(result.grid))
    values = result.tensor[0, 0].numpy()
    xyz = result.grid.world(np.stack(np.meshgrid(*map(np.arange, values.shape), indexing="ij"), -1))
    weight = np.clip(values - 500, 0, None) * (((xyz - BLOB_MM) ** 2).sum(-1) < 15**2)
    found = (weight[..., None] * xyz).sum((0, 1, 2)) / weight.sum()
    # Picking and averaging voxels is exact on average only: each such step may add its own rounding.
    rough = sum(next(iter(step.values())).get("mode") in ("area", "nearest", "nearest-exact") for step in chain)
    assert np.linalg.norm(found - BLOB_MM) < 0.1 + (0.1 + 0.25 * rough) * result.grid.spacing.max()


def test_an_lps_affine_is_refused(scan_file):
    """The classic: the affine is SimpleITK's, and nobody turned it."""
    import nibabel as nib

    def prepared(path, turn=None):
        image = nib.load(path)
        return np.asarray(image.dataobj, dtype=np.float32)[None], image.affine if turn is None else turn @ image.affine

    scan = read_scan(scan_file())
    as_preprocess(prepared)(scan)
    with pytest.raises(PreprocessError, match=r"LPS.*wrong side.*diag"):
        as_preprocess(lambda path: prepared(path, np.diag([-1, -1, 1, 1])))(scan)
