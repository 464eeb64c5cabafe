"""A NIfTI file is read once, piece by piece: the pieces, the digest, and what stands before and after the voxels."""

import gzip
import tracemalloc
from hashlib import sha256

import nibabel as nib
import numpy as np
import pytest

from volsal.scans import ScanError, nifti, read_scan
from volsal.scans.scan import file_digest


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(nifti, "_PIECE", 1000)  # neither a slice nor a row of voxels


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.hdr"])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<u1", "<f8", ">f4"])
@pytest.mark.parametrize("scaling", [(1, 0), (0.37, -1024)])
def test_pieces_add_up_to_what_nibabel_reads(name, dtype, scaling, tmp_path, small_pieces):
    voxels = np.random.default_rng(0).integers(0, 250, (24, 28, 20))
    kind = nib.Nifti1Pair if name.endswith("hdr") else nib.Nifti1Image
    header = kind.header_class(endianness=dtype[0])
    header.set_data_dtype(np.dtype(dtype))
    image = kind(voxels.astype(dtype), np.diag([2.0, 2, 3, 1]), header)
    image.header.set_slope_inter(*scaling)
    image.header.set_xyzt_units("mm")
    nib.save(image, tmp_path / name)
    scan = read_scan(tmp_path / name)
    np.testing.assert_array_equal(scan.array, nib.load(tmp_path / name).get_fdata().astype(np.float32))
    assert scan.array.dtype == np.float32
    assert scan.array.flags.f_contiguous  # as in the file: nothing was turned over on the way
    assert scan.sha256 == file_digest(tmp_path / name)
    parts = [tmp_path / "a.hdr", tmp_path / "a.img"] if name == "a.hdr" else [tmp_path / name]
    assert scan.sha256 == sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_later_volume_behind_an_extension(name, scan_file, small_pieces):
    voxels = np.random.default_rng(0).integers(0, 250, (9, 8, 7, 3))
    path = scan_file(name, array=voxels)
    image = nib.load(path)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 3000))
    content = np.asanyarray(image.dataobj).copy()
    nib.save(nib.Nifti1Image(content, None, image.header), path)
    for volume in range(3):
        scan = read_scan(path, volume=volume)
        np.testing.assert_array_equal(scan.array, voxels[..., volume])
        assert scan.sha256 == sha256(path.read_bytes()).hexdigest()


def test_a_stream_of_several_gzip_members_is_one_file(scan_file, small_pieces):
    """As pigz and dcm2niix write them."""
    path = scan_file("a.nii")
    expected, content = read_scan(path).array, path.read_bytes()
    packed = path.with_suffix(".nii.gz")
    packed.write_bytes(b"".join(gzip.compress(content[at : at + 5000]) for at in range(0, len(content), 5000)))
    scan = read_scan(packed)
    np.testing.assert_array_equal(scan.array, expected)
    assert scan.sha256 == sha256(packed.read_bytes()).hexdigest()
    packed.write_bytes(packed.read_bytes() + bytes(512))  # padding to a block, which gzip allows
    assert read_scan(packed).sha256 == sha256(packed.read_bytes()).hexdigest()
    packed.write_bytes(packed.read_bytes() + b"more")
    with pytest.raises(ScanError, match="cut short or damaged"):
        read_scan(packed)


@pytest.mark.parametrize("at", [0.02, 0.3, 0.6, 0.98])
def test_a_stream_that_is_cut_or_changed_anywhere_is_refused(at, scan_file, small_pieces):
    path = scan_file("a.nii.gz", array=np.random.default_rng(0).integers(0, 3000, (24, 28, 20)))
    content = path.read_bytes()
    place = int(at * len(content))
    path.write_bytes(content[:place])
    with pytest.raises(ScanError, match=r"damaged|makes no sense"):
        read_scan(path)
    path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
    with pytest.raises(ScanError, match=r"damaged|makes no sense"):
        read_scan(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_the_voxels_are_in_memory_once(name, scan_file, monkeypatch):
    monkeypatch.setattr(nifti, "_PIECE", 1 << 16)
    voxels = np.random.default_rng(0).integers(0, 3000, (120, 110, 100))
    path = scan_file(name, array=voxels, scl_slope=0.5, scl_inter=3)
    read_scan(path)
    tracemalloc.start()
    scan = read_scan(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < scan.array.nbytes + (2 << 20)  # the stored integers alone are 2.5 MiB


@pytest.mark.parametrize("length", [1e-308, 1e303])
def test_a_voxel_length_that_is_none_is_refused_where_nothing_else_places_the_scan(length, scan_file, tmp_path):
    image = nib.Nifti2Image(np.asanyarray(nib.load(scan_file()).dataobj), np.eye(4))
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    content = bytearray(image.to_bytes())
    content[128:136] = np.array(length, "<f8").tobytes()  # pixdim[3]
    (tmp_path / "two.nii.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ScanError, match="states no orientation, and its pixdim is unusable: the affine"):
        read_scan(tmp_path / "two.nii.gz")
