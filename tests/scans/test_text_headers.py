"""NRRD and MetaImage against SimpleITK, which wrote the files, and nibabel, which knows neither."""

import bz2
import gzip
import itertools
import os
import zlib
from hashlib import sha256

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from volsal.scans import ScanError, read_scan
from volsal.scans.scan import file_digest, files_of
from volsal.scans.write import map_header, write_map

SHAPE = (5, 6, 7)
SUFFIXES = ("nrrd", "nhdr", "mha", "mhd")


def turned(degrees):
    """A rotation that is no rotation about an axis, so that no row equals its column."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.radians([degrees, degrees / 2, degrees / 3])):
        a, b = (i for i in range(3) if i != axis)
        step = np.eye(3)
        step[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        turn = turn @ step
    return turn


GRIDS = [
    (order, signs, degrees)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
    for degrees in (0, 28)
]


def image(order=(0, 1, 2), signs=(1, 1, 1), degrees=0, shape=SHAPE, dtype=np.int16, spacing=(0.8, 1.5, 3.25)):
    array = (np.random.default_rng(0).normal(size=shape[::-1]) * 100).astype(dtype)
    made = sitk.GetImageFromArray(array)
    direction = turned(degrees) @ np.eye(3)[:, list(order)] * np.array(signs)
    made.SetDirection(direction.ravel().tolist())
    made.SetSpacing(spacing)
    made.SetOrigin((-81.5, 120.25, 13.0))
    return made


def require_same(scan, truth):
    np.testing.assert_array_equal(scan.array, sitk.GetArrayFromImage(truth).T.astype(np.float32))
    for corner in itertools.product(*[(0, n - 1) for n in truth.GetSize()]):
        x, y, z = truth.TransformIndexToPhysicalPoint(corner)
        np.testing.assert_allclose(scan.grid.world(corner), (-x, -y, z), atol=1e-4)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_48_orientations_straight_and_oblique_lie_where_simpleitk_put_them(suffix, tmp_path):
    path = tmp_path / f"scan.{suffix}"
    for number, (order, signs, degrees) in enumerate(GRIDS):
        truth = image(order, signs, degrees)
        sitk.WriteImage(truth, str(path), useCompression=bool(number % 2))
        require_same(read_scan(path), truth)
        sitk.WriteImage(truth, str(tmp_path / "same.nii"))
        affine = nib.load(tmp_path / "same.nii").affine
        np.testing.assert_allclose(read_scan(path).grid.affine, affine, atol=1e-4)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_every_real_type_plain_and_packed(suffix, dtype, tmp_path):
    truth = image(dtype=np.dtype(dtype)) if dtype[0] != "u" else sitk.Abs(image(dtype=np.dtype("f4"))) + 1
    truth = sitk.Cast(truth, image(dtype=np.dtype(dtype)).GetPixelID())
    for packed in (False, True):
        sitk.WriteImage(truth, str(tmp_path / f"scan.{suffix}"), useCompression=packed)
        require_same(read_scan(tmp_path / f"scan.{suffix}"), truth)


NRRD = """NRRD0004
# Complete NRRD file format specification at:
type: short
dimension: 3
space: left-posterior-superior
sizes: 4 5 6
space directions: (2,0,0) (0,2.5,0) (0,0,3)
kinds: domain domain domain
endian: little
encoding: raw
space origin: (10,20,30)
patient name:=Jane Doe

"""
META = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = False
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 10 20 30
CenterOfRotation = 0 0 0
AnatomicalOrientation = RAI
ElementSpacing = 2 2.5 3
DimSize = 4 5 6
ElementType = MET_SHORT
ElementDataFile = LOCAL
"""
VOXELS = np.arange(120, dtype="<i2")
RAW = VOXELS.tobytes()
VALUES = VOXELS.reshape(4, 5, 6, order="F").astype(np.float32)
PLACE = np.array([[-2.0, 0, 0, -10], [0, -2.5, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]])


def write(tmp_path, name, header, content=RAW, *changes):
    for old, new in changes:
        assert old in header
        header = header.replace(old, new)
    path = tmp_path / name
    path.write_bytes(header.encode("utf-8", "surrogateescape") + content)
    return path


@pytest.mark.parametrize(
    ("name", "header", "content", "changes"),
    [
        ("a.nrrd", NRRD, RAW, ()),
        ("crlf.nrrd", NRRD.replace("\n", "\r\n"), RAW, ()),
        ("initials.nrrd", NRRD, RAW, [("left-posterior-superior", "LPS")]),
        ("ras.nrrd", NRRD, RAW, [("left-posterior-superior", "RAS"), ("(2,", "(-2,"), ("2.5", "-2.5"),
                                 ("(10,20", "(-10,-20")]),
        ("las.nrrd", NRRD, RAW, [("left-posterior-superior", "LAS"), ("2.5", "-2.5"), ("(10,20", "(10,-20")]),
        ("big.nrrd", NRRD, VOXELS.astype(">i2").tobytes(), [("little", "big")]),
        ("gz.nrrd", NRRD, gzip.compress(RAW), [("raw", "gzip")]),
        ("bz.nrrd", NRRD, bz2.compress(RAW), [("raw", "bzip2")]),
        ("skip.nrrd", NRRD, b"line\nab" + RAW, [("endian", "line skip: 1\nbyte skip: 2\nendian")]),
        ("end.nrrd", NRRD, b"anything" + RAW, [("endian", "byte skip: -1\nendian")]),
        ("units.nrrd", NRRD, RAW, [("endian", 'space units: "mm" "mm" "mm"\nendian')]),
        ("a.mha", META, RAW, ()),
        ("crlf.mha", META.replace("\n", "\r\n"), RAW, ()),
        ("names.mha", META, RAW, [("TransformMatrix", "Rotation"), ("Offset", "Position"),
                                  ("ElementSpacing", "ElementSize")]),
        ("big.mha", META, VOXELS.astype(">i2").tobytes(), [("MSB = False", "MSB = True")]),
        ("zlib.mha", META, zlib.compress(RAW), [("CompressedData = False", "CompressedData = True")]),
        ("end.mha", META, b"anything" + RAW, [("ElementType", "HeaderSize = -1\nElementType")]),
    ],
)  # fmt: skip
def test_reads_what_the_format_allows(name, header, content, changes, tmp_path):
    scan = read_scan(write(tmp_path, name, header, content, *changes))
    np.testing.assert_array_equal(scan.array, VALUES)
    np.testing.assert_allclose(scan.grid.affine, PLACE)
    assert scan.notes == ()
    assert scan.header is None
    assert "Doe" not in repr(scan)


def test_a_sheared_nrrd_is_kept_as_it_stands(tmp_path):
    scan = read_scan(write(tmp_path, "a.nrrd", NRRD, RAW, ("(0,0,3)", "(0,1,3)")))
    np.testing.assert_allclose(scan.grid.affine[:3, 2], (0, -1, 3))


@pytest.mark.parametrize(("header", "name"), [(NRRD, "a.nrrd"), (META, "a.mha")])
def test_a_map_over_it_is_a_nifti_on_the_same_voxels(header, name, tmp_path):
    scan = read_scan(write(tmp_path, name, header))
    write_map(tmp_path / "map.nii.gz", scan.array, map_header(scan, "x", "y", (0.0, 1.0)))
    back = nib.load(tmp_path / "map.nii.gz")
    np.testing.assert_allclose(back.affine, PLACE)
    assert back.header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_scan_knows_the_size_and_the_digest_of_its_files(suffix, tmp_path):
    path = tmp_path / f"scan.{suffix}"
    sitk.WriteImage(image(), str(path))
    scan, parts = read_scan(path), files_of(path)
    assert len(parts) == (2 if suffix in ("nhdr", "mhd") else 1)
    assert scan.size == sum(part.stat().st_size for part in parts)
    assert scan.sha256 == file_digest(path) == sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()


@pytest.mark.parametrize(
    ("header", "name", "change"),
    [
        (NRRD, "a.nhdr", ("encoding: raw", "encoding: raw\ndata file: sub/v.raw")),
        (META, "a.mhd", ("= LOCAL", "= sub/v.raw")),
    ],
)
def test_a_data_file_beside_or_below_is_part_of_the_scan(header, name, change, tmp_path):
    path = write(tmp_path, name, header, b"", change)
    with pytest.raises(ScanError, match=r"its data file, sub/v.raw, is missing"):
        read_scan(path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "v.raw").write_bytes(RAW)
    np.testing.assert_array_equal(read_scan(path).array, VALUES)
    assert files_of(path) == [path, tmp_path / "sub" / "v.raw"]
    before = file_digest(path)
    assert read_scan(path).sha256 == before
    (tmp_path / "sub" / "v.raw").write_bytes(RAW[::-1])
    assert file_digest(path) != before


@pytest.mark.parametrize(
    "where", ["../v.raw", "/etc/passwd", "sub/../../v.raw", "C:\\v.raw", "..\\v.raw", "~/v.raw", "v\0.raw"]
)
def test_a_header_cannot_lead_out_of_its_folder(where, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "v.raw").write_bytes(RAW)
    for name, header, change in (
        ("a.nhdr", NRRD, ("encoding: raw", f"encoding: raw\ndata file: {where}")),
        ("a.mhd", META, ("= LOCAL", f"= {where}")),
    ):
        with pytest.raises(ScanError, match="volsal follows names beside the header or below it"):
            read_scan(write(tmp_path / "in", name, header, b"", change))


def test_a_data_file_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "v.raw")
    with pytest.raises(ScanError, match="is missing"):
        read_scan(write(tmp_path, "a.mhd", META, b"", ("= LOCAL", "= v.raw")))


FAULTS = {
    "cut.nrrd": (NRRD, RAW[:-1], (), "promises 240 bytes of voxels, more than"),
    "cut.mha": (META, RAW[:-1], (), "promises 240 bytes of voxels, more than"),
    "cutgz.nrrd": (NRRD, gzip.compress(RAW)[:-9], [("raw", "gzip")], "240 bytes of voxels expected"),
    "crc.nrrd": (NRRD, gzip.compress(RAW)[:-8] + bytes(8), [("raw", "gzip")], "damaged.*incorrect data check"),
    "short.nrrd": (NRRD, gzip.compress(RAW[:-2]), [("raw", "gzip")], "only 238"),
    "long.nrrd": (NRRD, gzip.compress(RAW + RAW), [("raw", "gzip")], "other than that"),
    "short.mha": (META, zlib.compress(RAW[:-2]), [("CompressedData = False", "CompressedData = True")], "only 238"),
    "stored.mha": (META, zlib.compress(RAW),
                   [("CompressedData = False", "CompressedData = True\nCompressedDataSize = 9")],
                   "240 bytes of voxels expected"),
    "bomb.nrrd": (NRRD, RAW, [("4 5 6", "99999 99999 99999")], "more than the file can hold"),
    "bomb.mha": (META, RAW, [("4 5 6", "99999 99999 99999")], "more than the file can hold"),
    "spacing.nrrd": (NRRD, RAW, [("space directions: (2,0,0) (0,2.5,0) (0,0,3)", "spacings: 2 2.5 3")],
                     "no space directions.*left and right are unknown"),
    "nospace.nrrd": (NRRD, RAW, [("space: left-posterior-superior\n", "")], "no space, so left and right"),
    "handed.nrrd": (NRRD, RAW, [("left-posterior-superior", "3D-right-handed")],
                    "space '3d-right-handed', so left and"),
    "nan.nrrd": (NRRD, RAW, [("(2,0,0)", "(nan,0,0)")], "directions are unusable.*NaN"),
    "none.nrrd": (NRRD, RAW, [("(2,0,0)", "none")], "3 numbers expected, found 'none'"),
    "flat.nrrd": (NRRD, RAW, [("(0,0,3)", "(2,0,0)")], "flattens space"),
    "metres.nrrd": (NRRD, RAW, [("endian", 'space units: "m" "m" "m"\nendian')], "unit of length is 'm'"),
    "absurd.nrrd": (NRRD, RAW, [("(2,0,0)", "(2000,0,0)")], "expected between 0.001 and 100 mm"),
    "rgb.nrrd": (NRRD, RAW, [("kinds: domain", "kinds: RGB-color")], "axis of kind 'rgb-color'"),
    "four.nrrd": (NRRD, RAW, [("dimension: 3", "dimension: 4")], "dimension '4'; volsal explains 3D"),
    "block.nrrd": (NRRD, RAW, [("type: short", "type: block")], "voxels of type 'block'"),
    "ascii.nrrd": (NRRD, RAW, [("raw", "ascii")], "encoding 'ascii'"),
    "endian.nrrd": (NRRD, RAW, [("endian: little\n", "")], "endian ''; expected little or big"),
    "twice.nrrd": (NRRD, RAW, [("endian", "type: float\nendian")], "says 'type' twice"),
    "list.nhdr": (NRRD, RAW, [("endian", "data file: LIST\nendian")], "its data file, LIST, is missing"),
    "version.nrrd": (NRRD, RAW, [("NRRD0004", "NRRD0009")], "an NRRD file of a version"),
    "matrix.mha": (META, RAW, [("TransformMatrix = 1 0 0 0 1 0 0 0 1\n", "")], "no TransformMatrix.*left and right"),
    "nan.mha": (META, RAW, [("= 1 0 0 0 1", "= nan 0 0 0 1")], "no rotation or reflection"),
    "skew.mha": (META, RAW, [("= 1 0 0 0 1 0", "= 1 0 0 0.1 1 0")], "no rotation or reflection"),
    "size.mha": (META, RAW, [("ElementSpacing = 2 2.5 3\n", "")], "no ElementSpacing"),
    "zero.mha": (META, RAW, [("2 2.5 3", "0 2.5 3")], "three lengths above 0"),
    "channels.mha": (META, RAW, [("DimSize", "ElementNumberOfChannels = 3\nDimSize")], "'3' numbers per voxel"),
    "text.mha": (META, RAW, [("BinaryData = True", "BinaryData = False")], "written as text"),
    "list.mhd": (META, RAW, [("LOCAL", "LIST")], "spread over several files"),
    "pattern.mhd": (META, RAW, [("LOCAL", "v%03d.raw 1 6 1")], "spread over several files"),
    "scaled.mha": (META, RAW, [("DimSize", "ElementToIntensityFunctionSlope = 2\nDimSize")], "values are to be scaled"),
    "unit.mha": (META, RAW, [("DimSize", "DistanceUnits = um\nDimSize")], "unit of length is 'um'"),
    "object.mha": (META, RAW, [("= Image", "= Tube")], "a MetaIO 'Tube', not an image"),
    "plane.mha": (META, RAW, [("4 5 6", "4 5 1")], "a single slice"),
    "where.mha": (META, b"", [("ElementDataFile = LOCAL\n", "")], "does not say where its voxels are"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_refuses_in_one_line(name, tmp_path):
    header, content, changes, says = FAULTS[name]
    path = write(tmp_path, name, header, content, *changes)
    with pytest.raises(ScanError, match=says) as raised:
        read_scan(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("header", "line"), [(NRRD, "space origin: (10,20,30)\n"), (META, "Offset = 10 20 30\n")])
def test_a_missing_origin_and_bytes_to_spare_are_told(header, line, tmp_path):
    scan = read_scan(write(tmp_path, "a.mha", header, RAW + b"12345", (line, "")))
    assert "states no origin" in scan.notes[0]
    assert "5 bytes more than its header describes" in scan.notes[1]


def test_a_name_that_is_no_utf_8_is_read(tmp_path):
    """SimpleITK aborts the process on such a path."""
    for suffix, header in (("nrrd", NRRD), ("mha", META)):
        path = tmp_path / os.fsdecode(b"\xff\xfe." + suffix.encode())
        path.write_bytes(header.encode() + RAW)
        np.testing.assert_array_equal(read_scan(path).array, VALUES)


def test_nan_voxels_can_be_filled(tmp_path):
    voxels = np.ones(120, "<f4")
    voxels[7] = np.nan
    path = write(tmp_path, "a.mha", META, voxels.tobytes(), ("MET_SHORT", "MET_FLOAT"))
    with pytest.raises(ScanError, match="1 of 120 voxels are NaN"):
        read_scan(path)
    scan = read_scan(path, nan=-5)
    assert scan.array.min() == -5
    assert scan.notes == ("1 of 120 voxels were NaN or infinite and became -5",)
