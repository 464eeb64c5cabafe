import gzip
import os
import shutil

import nibabel as nib
import numpy as np
import pytest

from volsal.scans import Scan, ScanError, read_scan
from volsal.scans.write import map_header, write_map


def rewrite(path, change):
    """Apply ``change(header)`` to a written single-file image, at the level of bytes where nibabel would object."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        content = bytearray(file.read())
    change(content)
    with opener(path, "wb") as file:
        file.write(content)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.hdr", "a.img"])
def test_reads_values_and_place_of_every_form(scan_file, name):
    reference = read_scan(scan_file("reference.nii"))
    path = scan_file(name) if not name.endswith((".hdr", ".img")) else pair(scan_file("x.nii")).with_suffix(name[-4:])
    scan = read_scan(path)
    assert scan.array.dtype == np.float32
    np.testing.assert_array_equal(scan.array, reference.array)
    assert scan.grid.same_as(reference.grid)
    assert scan.grid.orientation == "LSA"
    assert len(scan.sha256) == 64


def pair(path):
    image = nib.load(path)
    nib.save(nib.Nifti1Pair(np.asanyarray(image.dataobj), None, image.header), path.with_suffix(".hdr"))
    return path.with_suffix(".hdr")


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "f4", "f8"])
def test_reads_every_real_type(scan_file, dtype):
    array = np.arange(24 * 28 * 20).reshape(24, 28, 20) % 100
    np.testing.assert_array_equal(read_scan(scan_file(array=array, dtype=dtype)).array, array)


def test_reads_nifti_2_and_big_endian(scan_file, tmp_path):
    image = nib.load(scan_file())
    expected = np.asanyarray(image.dataobj)
    second = nib.Nifti2Image(expected, image.affine)
    second.header.set_xyzt_units("mm")
    nib.save(second, tmp_path / "second.nii.gz")
    swapped = nib.Nifti1Image(expected, None, nib.Nifti1Header(endianness=">"))
    swapped.set_sform(image.affine, 1)
    nib.save(swapped, tmp_path / "swapped.nii")
    for name in ("second.nii.gz", "swapped.nii"):
        scan = read_scan(tmp_path / name)
        np.testing.assert_array_equal(scan.array, expected)
        np.testing.assert_allclose(scan.grid.affine, image.affine)


def test_applies_slope_and_intercept(scan_file):
    path = scan_file(array=np.full((4, 5, 6), 7), shape=(4, 5, 6))
    rewrite(path, lambda c: c.__setitem__(slice(112, 120), np.array([2.0, -1000.0], "<f4").tobytes()))
    assert (read_scan(path).array == -986).all()


def test_the_sform_counts_before_the_qform_and_the_qform_alone_is_enough(scan_file):
    affine = np.diag([2.0, 2, 2, 1])
    shifted = affine.copy()
    shifted[0, 3] = 5
    path = scan_file(affine=affine)
    image = nib.load(path)
    image.set_sform(shifted, code=2)
    nib.save(image, path)
    scan = read_scan(path)
    assert (scan.form, scan.grid.affine[0, 3]) == ("sform", 5)
    assert scan.notes == ("sform and qform place a corner 5 mm apart; the sform was used (--form qform for the other)",)
    assert read_scan(path, form="qform").grid.affine[0, 3] == 0
    image.set_sform(None, code=0)
    nib.save(image, path)
    assert read_scan(path).form == "qform"
    with pytest.raises(ScanError, match="sform asked for, but its code is 0"):
        read_scan(path, form="sform")


def test_forms_that_disagree_on_left_and_right_are_refused_until_one_is_chosen(scan_file):
    path = scan_file(affine=np.diag([2.0, 2, 2, 1]))
    image = nib.load(path)
    image.set_sform(np.diag([-2.0, 2, 2, 1]), code=1)
    nib.save(image, path)
    with pytest.raises(ScanError, match=r"sform says LAS, qform says RAS.*--form sform or --form qform"):
        read_scan(path)
    assert read_scan(path, form="sform").grid.orientation == "LAS"
    assert read_scan(path, form="qform").grid.orientation == "RAS"


def test_strict_makes_a_note_an_error(scan_file):
    path = scan_file(affine=np.diag([2.0, 2, 2, 1]))
    image = nib.load(path)
    for mm, agrees in ((0.09, True), (0.11, False)):
        shifted = np.diag([2.0, 2, 2, 1])
        shifted[0, 3] = mm
        image.set_sform(shifted, code=2)
        nib.save(image, path)
        if agrees:
            assert read_scan(path, strict=True).notes == ()
        else:
            with pytest.raises(ScanError, match=r"place a corner 0\.11 mm apart \(allowed: 0\.1\).*pass --form"):
                read_scan(path, strict=True)
    assert read_scan(path, strict=True, form="qform").grid.affine[0, 3] == 0


def test_a_qfac_of_0_counts_as_1(scan_file):
    path = scan_file(affine=np.diag([2.0, 2, 2, 1]))
    rewrite(path, lambda c: (poke(c, 254, "<i2", 0), poke(c, 76, "<f4", 0)))
    scan = read_scan(path)
    np.testing.assert_allclose(scan.grid.affine, np.diag([2.0, 2, 2, 1]))
    out = path.with_name("map.nii.gz")
    write_map(out, scan.array, map_header(scan, "x", "y", (0.0, 1.0)))
    np.testing.assert_allclose(nib.load(out).affine, scan.grid.affine)


@pytest.mark.parametrize("nan", [np.nan, np.inf, 1e300])
def test_what_fills_nan_is_a_number(nan, scan_file):
    with pytest.raises(ScanError, match="nan is the number that NaN voxels become"):
        read_scan(scan_file(), nan=nan)


def test_the_map_of_a_4d_file_of_one_volume_lies_on_its_grid(scan_file):
    path = scan_file("one.nii", array=np.zeros((4, 5, 6, 1)), shape=(4, 5, 6))
    scan = read_scan(path)
    out = path.with_name("map.nii.gz")
    write_map(out, scan.array, map_header(scan, "x", "y", (0.0, 1.0)))
    back = nib.load(out)
    assert back.shape == (4, 5, 6)
    np.testing.assert_array_equal(back.affine, nib.load(path).affine)
    np.testing.assert_array_equal(back.header["pixdim"][:4], nib.load(path).header["pixdim"][:4])


def test_no_stated_orientation_is_told(scan_file):
    path = scan_file()
    image = nib.load(path)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, path)
    scan = read_scan(path)
    assert scan.form == "none"
    assert "left and right are a guess" in scan.notes[0]


def test_a_4d_file_needs_a_choice(scan_file):
    stack = np.stack([np.full((4, 5, 6), v) for v in (10, 20, 30)], axis=-1)
    path = scan_file(array=stack, shape=(4, 5, 6))
    with pytest.raises(ScanError, match=r"4D with 3 volumes; say which one .* --volume 0 \.\.\. --volume 2"):
        read_scan(path)
    assert (read_scan(path, volume=1).array == 20).all()
    assert read_scan(path, volume=1).volume == 1
    with pytest.raises(ScanError, match="volume 3 asked for, but there are 3"):
        read_scan(path, volume=3)
    single = scan_file("one.nii", array=stack[..., :1], shape=(4, 5, 6))
    assert read_scan(single).grid.shape == (4, 5, 6)


def test_a_scan_of_nibabels_own_is_read(nibabel_data):
    scan = read_scan(nibabel_data / "anatomical.nii")
    assert scan.grid.orientation == "LAS"
    assert scan.grid.shape == (33, 41, 25)


@pytest.fixture
def nibabel_data():
    from nibabel.testing import data_path

    return data_path


DAMAGE = {
    "nothing.nii": (lambda p: p.unlink(), "no such file"),
    "folder.nii": (lambda p: (p.unlink(), p.mkdir()), "a folder, not a scan"),
    "dangling.nii": (lambda p: (p.unlink(), p.symlink_to("gone")), "a link whose target is gone"),
    "zero.nii": (lambda p: p.write_bytes(b""), "the file is empty"),
    "text.nii.gz": (lambda p: p.write_text("hello " * 100), "not a NIfTI file; volsal reads"),
    "page.nii.gz": (lambda p: p.write_text("<html>404" + " " * 600), "looks like an HTML page"),
    "lfs.nii.gz": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git-LFS pointer"),
    "png.nii": (lambda p: p.write_bytes(b"\x89PNG\r\n" + bytes(600)), "a PNG picture"),
    "dicom.nii": (lambda p: p.write_bytes(bytes(128) + b"DICM" + bytes(600)), "DICOM"),
    "cut.nii": (lambda p: p.write_bytes(p.read_bytes()[:5000]), "promises 26,880 bytes of voxels, more than"),
    "cut.nii.gz": (lambda p: p.write_bytes(p.read_bytes()[:-400]), "cut short or damaged"),
    "crc.nii.gz": (lambda p: p.write_bytes(p.read_bytes()[:-8] + bytes(4) + p.read_bytes()[-4:]), "CRC check failed"),
    "offset.nii": (lambda p: rewrite(p, lambda c: poke(c, 108, "<f4", 0)), "vox_offset 0 points into the header"),
    "metres.nii": (lambda p: rewrite(p, lambda c: poke(c, 123, "u1", 1)), "its unit of length is metre"),
    "bomb.nii": (
        lambda p: rewrite(p, lambda c: poke(c, 42, "<i2", 32767, 32767, 32767)),
        "more than the file can hold",
    ),
    "rgb.nii": (lambda p: rewrite(p, lambda c: poke(c, 70, "<i2", 128, 24)), "voxels of type RGB"),
    "complex.nii": (lambda p: rewrite(p, lambda c: poke(c, 70, "<i2", 32, 64)), "voxels of type complex64"),
    "unknown.nii": (lambda p: rewrite(p, lambda c: poke(c, 70, "<i2", 9999)), "the NIfTI header makes no sense"),
    "fivedim.nii": (lambda p: rewrite(p, lambda c: poke(c, 40, "<i2", 5, 24, 28, 4, 1, 5)), "5D"),
    "flat.nii": (lambda p: rewrite(p, lambda c: poke(c, 40, "<i2", 2, 24, 28)), "2D"),
    "slice.nii": (lambda p: rewrite(p, lambda c: poke(c, 40, "<i2", 3, 24, 28, 1)), "a single slice"),
    "nan-form.nii": (lambda p: rewrite(p, lambda c: poke(c, 280, "<f4", np.nan)), "its sform is unusable.*NaN"),
    "singular.nii": (lambda p: rewrite(p, lambda c: poke(c, 280, "<f4", *[0] * 12)), "sform is unusable.*flattens"),
    "pixdim.nii": (
        lambda p: rewrite(p, lambda c: (poke(c, 254, "<i2", 0), poke(c, 84, "<f4", 0))),
        "pixdim says voxels",
    ),
    "quaternion.nii": (
        lambda p: rewrite(p, lambda c: (poke(c, 254, "<i2", 0), poke(c, 256, "<f4", 0.9, 0.9, 0.9))),
        "quaternion is longer than 1",
    ),
    "far.nii": (lambda p: rewrite(p, lambda c: poke(c, 280, "<f4", -1e3)), "expected between 0.001 and 100 mm"),
}


def poke(content, at, dtype, *values):
    raw = np.array(values, dtype).tobytes()
    content[at : at + len(raw)] = raw


@pytest.mark.parametrize("name", DAMAGE)
def test_refuses_in_one_line_that_names_the_file(name, scan_file):
    path = scan_file(name)
    damage, says = DAMAGE[name]
    damage(path)
    with pytest.raises(ScanError, match=says) as raised:
        read_scan(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_bytes_that_the_header_does_not_describe_are_told(scan_file, name):
    path = scan_file(name)
    rewrite(path, lambda c: c.extend(bytes(500)))
    assert "500 bytes more than its header describes" in read_scan(path).notes[0]


def test_half_a_pair_names_the_other_half(scan_file, tmp_path):
    path = pair(scan_file("x.nii"))
    lone = tmp_path / "lone" / "x.hdr"
    lone.parent.mkdir()
    shutil.copy(path, lone)
    with pytest.raises(ScanError, match=r"its other half, x\.img, is missing"):
        read_scan(lone)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.nii")
    with pytest.raises(ScanError, match="not a regular file"):
        read_scan(tmp_path / "pipe.nii")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_no_numbers_are_counted_and_placed(scan_file, value):
    array = np.ones((4, 5, 6), np.float32)
    array[1, 2, 3] = array[3, 4, 5] = value
    path = scan_file(array=array, shape=array.shape, dtype=np.float32)
    with pytest.raises(ScanError, match=r"2 of 120 voxels are NaN or infinite, the first at \(1, 2, 3\)"):
        read_scan(path)
    scan = read_scan(path, nan=-1024)
    assert (scan.array[1, 2, 3], scan.array[0, 0, 0], scan.filled) == (-1024, 1, -1024)
    assert scan.notes == ("2 of 120 voxels were NaN or infinite and became -1024",)
    assert read_scan(scan_file("sound.nii"), nan=-1024).notes == ()
    path = scan_file("all.nii", array=np.full(array.shape, value), shape=array.shape, dtype=np.float32)
    with pytest.raises(ScanError, match="every voxel is NaN or infinite"):
        read_scan(path, nan=0)


def test_a_scan_in_memory_has_three_axes():
    assert Scan.from_array(np.zeros((2, 3, 4)), np.eye(4)).grid.shape == (2, 3, 4)
    with pytest.raises(ScanError, match="three-dimensional"):
        Scan.from_array(np.zeros((2, 3)), np.eye(4))
