"""Label maps onto other voxels: exact numbers, any orientation, refused where they cannot be placed."""

import nibabel as nib
import numpy as np
import pytest

from volsal.grid import Grid
from volsal.resampling import nearest
from volsal.scans import ScanError, read_scan
from volsal.scans.labels import read_labels


def blocks(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2000, shape, dtype=np.int32)


def by_hand(values, source, target):
    """Voxel by voxel through the world."""
    out = np.zeros(target.shape, values.dtype)
    for index in np.ndindex(target.shape):
        at = np.floor(source.voxel(target.world(index)) + 0.5 + 1e-6).astype(int)
        if ((at >= 0) & (at < source.shape)).all():
            out[index] = values[tuple(at)]
    return out


@pytest.fixture
def elsewhere():
    """A grid that reaches over the oblique one, turned against it, finer and flipped."""
    c, s = np.cos(0.4), np.sin(0.4)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, -1.1, 0], [c, 0, -0.7 * s], [s, 0, 0.7 * c]]) * 0.9
    affine[:3, 3] = (95.0, -121.0, 42.0)
    return Grid((15, 9, 13), affine)


def test_nearest_is_the_voxel_that_the_centre_lies_in(oblique, elsewhere):
    values = blocks(oblique.shape)
    result = nearest(values, oblique, elsewhere)
    assert result.dtype == np.int32
    assert np.array_equal(result, by_hand(values, oblique, elsewhere))
    assert 0 < (result == 0).mean() < 1  # partly outside
    assert (result > 0).sum() > 100


@pytest.mark.parametrize("rows", [1, 10**9])
def test_nearest_in_slabs_is_nearest(rows, oblique, elsewhere, monkeypatch):
    expected = nearest(blocks(oblique.shape), oblique, elsewhere)
    monkeypatch.setattr("volsal.resampling._SLAB_BYTES", rows)
    assert np.array_equal(nearest(blocks(oblique.shape), oblique, elsewhere), expected)


def test_nearest_along_axes_is_a_copy_up_to_their_order(oblique):
    values = blocks(oblique.shape)
    turned = np.zeros((4, 4))
    turned[[2, 0, 1, 3], [0, 1, 2, 3]] = (-1, 1, -1, 1)  # axes rolled, two of them flipped
    turned[:3, 3] = (0, oblique.shape[1] - 1, oblique.shape[2] - 1)
    source_to_target = np.linalg.inv(turned)
    target = Grid((oblique.shape[2], oblique.shape[0], oblique.shape[1]), oblique.affine @ turned)
    result = nearest(values, oblique, target)
    assert np.array_equal(result, values[:, ::-1, ::-1].transpose(2, 0, 1))
    assert np.array_equal(nearest(result, target, oblique), values)
    assert source_to_target.shape == (4, 4)


def test_reads_a_file_in_any_orientation_onto_the_grid(oblique, tmp_path):
    values = blocks(oblique.shape)
    image = nib.Nifti1Image(values, oblique.affine)
    for codes in ("RAS", "LPI", "SAR"):
        turned = image.as_reoriented(
            nib.orientations.ornt_transform(nib.io_orientation(oblique.affine), nib.orientations.axcodes2ornt(codes))
        )
        nib.save(turned, tmp_path / f"{codes}.nii.gz")
        result = read_labels(tmp_path / f"{codes}.nii.gz", oblique)
        assert result.dtype == np.int32
        assert np.array_equal(result, values)


def save(path, array, affine, **header):
    image = nib.Nifti1Image(array, affine)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def test_a_label_map_cut_to_what_it_labels_is_placed(oblique, tmp_path):
    values = blocks(oblique.shape)
    affine = oblique.affine.copy()
    affine[:3, 3] = oblique.world((2, 3, 4))
    path = save(tmp_path / "part.nii", values[2:5, 3:7, 4:9], affine)
    expected = np.zeros_like(values)
    expected[2:5, 3:7, 4:9] = values[2:5, 3:7, 4:9]
    assert np.array_equal(read_labels(path, oblique), expected)


def test_refuses_what_is_no_label_map(oblique, tmp_path):
    values = blocks(oblique.shape)
    half = values.astype(np.float32)
    half[1, 2, 3] = 0.5
    with pytest.raises(ScanError, match=r"a label map holds whole numbers; voxel \(1, 2, 3\) is 0.5"):
        read_labels(save(tmp_path / "half.nii", half, oblique.affine), oblique)
    large = values.astype(np.float64)
    large[0, 0, 0] = 3e8
    with pytest.raises(ScanError, match="label 300000000; labels beyond 16,777,216 cannot be told apart"):
        read_labels(save(tmp_path / "large.nii", large, oblique.affine), oblique)
    far = oblique.affine.copy()
    far[:3, 3] += 500
    with pytest.raises(ScanError, match=r"does not lie over the scan: .* another patient's"):
        read_labels(save(tmp_path / "far.nii", values, far), oblique)


def test_without_an_orientation_it_lies_on_no_scan_but_one_that_has_none_either(oblique, tmp_path):
    values = blocks(oblique.shape)
    none = {"sform_code": 0, "qform_code": 0}
    path = save(tmp_path / "none.nii", values, None, **none)
    with pytest.raises(ScanError, match="states no orientation, so its labels cannot be placed"):
        read_labels(path, oblique)
    scan = read_scan(save(tmp_path / "scan.nii", values.astype(np.float32), None, **none))
    assert np.array_equal(read_labels(path, scan.grid, scan), values)
