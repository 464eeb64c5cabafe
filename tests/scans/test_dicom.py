"""DICOM in: right within 0.1 mm, or refused in words.

Every synthetic series holds one closed form: a field linear in RAS mm.  A voxel that is misplaced by d mm along the
field's gradient is wrong by d times the gradient, so values and geometry are judged by one figure.
"""

import math
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from volsal.cli import app
from volsal.grid import Grid
from volsal.scans import ScanError, dicom_decode, dicom_pixels, read_case, read_scan
from volsal.scans.dicom import list_series
from volsal.scans.dicom_frames import groups, survey
from volsal.scans.dicom_stack import arrange
from volsal.scans.find import case_id, gather, look
from volsal.scans.scan import file_digest
from volsal.scans.write import map_header, write_map

pydicom = pytest.importorskip("pydicom")
from made_series import AXIAL, LPS, oblique  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.sequence import Sequence as Items  # noqa: E402
from pydicom.uid import (  # noqa: E402
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

GRADIENT = np.array([1.0, 2.0, 3.0])  # per mm along R, A, S
PER_MM = float(np.linalg.norm(GRADIENT))
SLOPE = 0.05  # stored in steps of this: a hundredth of a millimetre
ROWS, COLUMNS, SLICES = 6, 5, 7  # no two alike
SPACING = (1.4, 2.6)  # between rows, between columns
FIRST = np.array([-10.0, 15.0, -12.0])  # LPS mm
STEP = 2.5
SECRET = "Zzphi"


def field(ras):
    return ras @ GRADIENT


class Series:
    """A series in memory: geometry in LPS mm as asked for, pixels by the closed form; files are written by `write`."""

    def __init__(self, axes=AXIAL, n=SLICES, step=None, rows=ROWS, columns=COLUMNS, spacing=SPACING, uid=None, **tags):
        self.row, self.column = (np.array(axis, float) for axis in axes)
        self.normal = np.cross(self.row, self.column)
        self.step = self.normal * STEP if step is None else np.array(step, float)
        self.rows, self.columns, self.spacing = rows, columns, spacing
        self.positions = [FIRST + k * self.step for k in range(n)]
        self.uid = uid or generate_uid()
        self.tags = tags

    @property
    def grid(self):
        affine = np.eye(4)
        affine[:3] = np.stack(
            [self.row * self.spacing[1], self.column * self.spacing[0], self.step, self.positions[0]], axis=1
        )
        affine[:3] *= LPS[:, None]
        return Grid((self.columns, self.rows, len(self.positions)), affine)

    def values(self, position):
        """(rows, columns) of the closed form."""
        r, c = np.meshgrid(np.arange(self.rows), np.arange(self.columns), indexing="ij")
        lps = position + r[..., None] * self.column * self.spacing[0] + c[..., None] * self.row * self.spacing[1]
        return field(lps * LPS)

    def slice(self, k, position=None, slope=SLOPE, intercept=0.0, **tags):
        position = self.positions[k] if position is None else np.array(position, float)
        dataset = base(self.uid, CTImageStorage)
        dataset.PatientName, dataset.PatientID = f"{SECRET}^Alice", f"{SECRET}-1"
        dataset.InstanceNumber = 100 - k  # against the positions: it must not be believed
        dataset.SliceThickness, dataset.SpacingBetweenSlices = 9, -20  # lies
        dataset.ImagePositionPatient = [f"{mm:.8g}" for mm in position]
        dataset.ImageOrientationPatient = [f"{x:.8g}" for x in (*self.row, *self.column)]
        dataset.PixelSpacing = list(self.spacing)
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{slope:.8g}", f"{intercept:.8g}"
        pixels(dataset, np.rint((self.values(position) - intercept) / slope).astype(np.int16))
        for keyword, value in {**self.tags, **tags}.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)
        return dataset

    def slices(self, **tags):
        return [self.slice(k, **tags) for k in range(len(self.positions))]


def base(uid, kind):
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = kind, generate_uid()
    dataset.file_meta.MediaStorageSOPClassUID = kind
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = uid, generate_uid()
    dataset.Modality, dataset.SeriesNumber = "CT", 3
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.SeriesDescription = f"thin {SECRET} slices"
    return dataset


def pixels(dataset, stored):
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    dataset.BitsAllocated = dataset.BitsStored = 8 * stored.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW"


def save(dataset, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def write(tmp_path):
    """A function that writes datasets to a folder; the files' order is none of the slices'."""

    def write(datasets, folder="series", name="IM{:04d}.dcm"):
        for k, dataset in enumerate(datasets):
            save(dataset, tmp_path / folder / name.format((k * 5 + 3) % 1000))
        return tmp_path / folder

    return write


def assert_placed(scan, grid, within_mm=0.1):
    assert scan.array.dtype == np.float32
    assert scan.grid.distance_mm(grid) < within_mm
    every = np.stack(np.meshgrid(*map(np.arange, scan.grid.shape), indexing="ij"), axis=-1)
    assert np.abs(scan.array - field(scan.grid.world(every))).max() < within_mm * PER_MM


# Geometry


@pytest.mark.parametrize(
    "series",
    [
        pytest.param(Series(), id="axial"),
        pytest.param(Series(axes=((0, 1, 0), (0, 0, -1))), id="sagittal"),
        pytest.param(Series(axes=((1, 0, 0), (0, 0, -1))), id="coronal"),
        pytest.param(Series(axes=oblique(24)), id="oblique"),
        pytest.param(Series(axes=((-1, 0, 0), (0, -1, 0))), id="negated"),
        pytest.param(Series(axes=((1, 0, 0), (0, -1, 0))), id="normal-points-down"),
        pytest.param(Series(n=2), id="two-slices"),
        pytest.param(Series(spacing=(0.3, 0.2), step=(0, 0, 0.5)), id="small-voxels"),
    ],
)
def test_a_sound_series_lies_where_its_headers_say(write, series):
    scan = read_scan(write(series.slices()))
    assert_placed(scan, series.grid, within_mm=0.02)
    assert scan.notes == ()
    assert scan.header is None
    assert scan.path.name == "series"


@settings(max_examples=60, deadline=None)
@given(order=st.permutations(range(SLICES)), degrees=st.floats(-80, 80))
def test_the_order_of_the_files_never_matters(frames_of, order, degrees):
    series = Series(axes=oblique(degrees))
    frames = frames_of(series)
    (first,), (second,) = groups(frames), groups([frames[k] for k in order])
    assert arrange(first).frames == arrange(second).frames
    assert arrange(second).grid.distance_mm(series.grid) < 0.01


@pytest.fixture(scope="module")
def frames_of(tmp_path_factory):
    """A function that gives the frames of a series as its files would."""
    folder = tmp_path_factory.mktemp("frames")
    path = save(Series().slice(0), folder / "one.dcm")
    (pattern,) = survey(folder, [path]).frames

    def frames(series):
        orientation = (*map(float, series.row), *map(float, series.column))
        return [
            replace(
                pattern, source=replace(pattern.source, sop=str(k)), position=tuple(position), orientation=orientation
            )
            for k, position in enumerate(series.positions)
        ]

    return frames


def test_renamed_files_give_the_same_scan_to_the_bit(write):
    slices = Series(axes=oblique(10)).slices()
    one, two = read_scan(write(slices, "a")), read_scan(write(slices[::-1], "b", name="{:03d}"))
    np.testing.assert_array_equal(one.array, two.array)
    np.testing.assert_array_equal(one.grid.affine, two.grid.affine)
    assert one.sha256 == two.sha256


def test_slices_in_sub_folders_are_one_series(write):
    series = Series()
    slices = series.slices()
    write(slices[::2], "series/a")
    assert_placed(read_scan(write(slices[1::2], "series/b").parent), series.grid)


def test_positions_rounded_in_the_header_are_sound(write):
    series = Series()
    jitter = [0, 0.004, -0.003, 0.002, -0.004, 0.003, -0.001]
    slices = [
        series.slice(k, position=series.positions[k] + (series.normal + series.row) * jitter[k]) for k in range(SLICES)
    ]
    scan = read_scan(write(slices))
    assert scan.grid.distance_mm(series.grid) < 0.01
    assert abs(scan.grid.affine[:3, 2] @ scan.grid.affine[:3, 0]) < 1e-6  # rounding is no tilt


@pytest.mark.parametrize("degrees", [-15, 18])
def test_a_gantry_tilt_stays_as_shear(write, tmp_path, degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    series = Series(axes=((1, 0, 0), (0, c, s)), step=(0, 0, 2.5))
    scan = read_scan(write(series.slices()))
    assert_placed(scan, series.grid)
    (note,) = scan.notes
    assert f"gantry tilt of {abs(degrees):.1f} degrees" in note
    # What is written over it lies there too, and says so in the one form that can hold a shear.
    path = tmp_path / "map.nii.gz"
    write_map(path, scan.array, map_header(scan, "test", "volsal", (0, 1)))
    written = nib.load(path)
    assert int(written.header["qform_code"]) == 0
    assert Grid(written.shape, written.affine).distance_mm(series.grid) < 0.1
    assert_placed(read_scan(path), series.grid)


def test_simpleitk_refuses_a_sheared_overlay_as_the_note_says(write, tmp_path):
    import SimpleITK as sitk

    c, s = np.cos(np.radians(18)), np.sin(np.radians(18))
    scan = read_scan(write(Series(axes=((1, 0, 0), (0, c, s)), step=(0, 0, 2.5)).slices()))
    write_map(tmp_path / "map.nii.gz", scan.array, map_header(scan, "test", "volsal", (0, 1)))
    with pytest.raises(RuntimeError, match="orthonormal"):
        sitk.ReadImage(str(tmp_path / "map.nii.gz"))


def test_monai_steps_keep_the_place_of_a_sheared_scan(write):
    from volsal.preprocess import MonaiSteps

    c, s = np.cos(np.radians(18)), np.sin(np.radians(18))
    series = Series(axes=((1, 0, 0), (0, c, s)), step=(0, 0, 2.5), n=12, rows=24, columns=22, spacing=(1.7, 1.9))
    scan = read_scan(write(series.slices()))
    steps = MonaiSteps.from_config([{"Orientation": {"axcodes": "RAS"}}, {"Spacing": {"pixdim": [1.5, 1.5, 1.5]}}])
    result = steps(scan)
    values = result.tensor[0, 0].numpy()
    every = np.stack(np.meshgrid(*map(np.arange, result.grid.shape), indexing="ij"), axis=-1)
    at = scan.grid.voxel(result.grid.world(every))
    inside = ((at > 0.01) & (at < np.array(scan.grid.shape) - 1.01)).all(axis=-1)
    assert inside.mean() > 0.2
    assert np.abs(values - field(result.grid.world(every)))[inside].max() < 0.1 * PER_MM


def test_a_straight_series_gets_both_forms(write, tmp_path):
    scan = read_scan(write(Series(axes=oblique(24)).slices()))
    write_map(tmp_path / "map.nii.gz", scan.array, map_header(scan, "test", "volsal", (0, 1)))
    written = nib.load(tmp_path / "map.nii.gz")
    for form in (written.get_sform(), written.get_qform()):
        assert Grid(written.shape, form).distance_mm(scan.grid) < 0.01
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (1, 1)


# What must be refused, and how it says so


def without(k):
    return lambda series: [slice_ for n, slice_ in enumerate(series.slices()) if n not in np.atleast_1d(k)]


def one_with(k=3, **changes):
    return lambda series: [series.slice(n, **(changes if n == k else {})) for n in range(SLICES)]


def all_with(**changes):
    return lambda series: series.slices(**changes)


def at_steps(*steps):
    along = np.concatenate([[0], np.cumsum(steps)])
    return lambda series: [series.slice(0, position=FIRST + mm * series.normal) for mm in along]


def beside(k=3, mm=2.0):
    return lambda series: [
        series.slice(n, position=series.positions[n] + (n == k) * mm * series.row) for n in range(SLICES)
    ]


def twice(series):
    return series.slices() + series.slices(RescaleIntercept=7)


def other_content(series):
    first, second = series.slice(2), series.slice(2, RescaleIntercept=7)
    second.SOPInstanceUID = second.file_meta.MediaStorageSOPInstanceUID = first.SOPInstanceUID
    return [*without(2)(series), first, second]


def with_lut(series):
    slices = series.slices()
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [2, 0, 16], b"\0\0\1\0"
    slices[0].ModalityLUTSequence = Items([table])
    return slices


def colour(series):
    dataset = series.slice(0)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    dataset.PixelData = dataset.PixelData * 3
    return [dataset]


def many_frames(series):
    dataset = series.slice(0)
    dataset.NumberOfFrames, dataset.PixelData = 4, dataset.PixelData * 4
    return [dataset]


FAULTS = {
    "missing slice": (without(3), r"slice 4 of 7 missing between z = -7\.00 and -2\.00 mm; .*--slices resample"),
    "two missing slices": (without([2, 3]), r"slices 3 to 4 of 7 missing between"),
    "two gaps": (without([1, 4]), r"slice 2 of 7 missing between .*, and 1 further on"),
    "uneven": (at_steps(2.5, 2.5, 2.5, 4, 4), r"not uniform: 2\.5 mm at z = .*, 4 mm at z = .*--slices resample"),
    "slow drift": (at_steps(*np.linspace(2.5, 2.6, 20)), "not uniform"),
    "each position twice": (twice, "14 slices at 7 positions: 7 lie at the same position"),
    "beside the line": (beside(), r"slice 4 of 7 \(.*\) lies .* mm beside the line"),
    "one without position": (one_with(ImagePositionPatient=None), "1 of 7 slices.* lacks ImagePositionPatient"),
    "no position": (all_with(ImagePositionPatient=None), "every slice lacks ImagePositionPatient"),
    "no orientation": (all_with(ImageOrientationPatient=None), "every slice lacks ImageOrientationPatient"),
    "no spacing": (all_with(PixelSpacing=None), "every slice lacks PixelSpacing"),
    "no unit vectors": (all_with(ImageOrientationPatient=[1, 0, 0, 0.3, 1, 0]), "two perpendicular unit vectors"),
    "absurd spacing": (all_with(PixelSpacing=[0, 0]), "PixelSpacing .* is not between"),
    "NaN position": (one_with(ImagePositionPatient=["nan", "0", "0"]), "ImagePositionPatient does not hold 3 finite"),
    "a single slice": (lambda series: [series.slice(0)], "a single slice is no volume"),
    "another matrix": (
        lambda series: [*without(3)(series), Series(rows=4, uid=series.uid).slice(3)],
        "different matrix sizes",
    ),
    "another spacing": (one_with(PixelSpacing=[1.4, 2.5]), "different pixel spacings"),
    "same instance, other content": (other_content, "duplicates of one SOP instance with different content"),
    "colour": (colour, r"colour pixels \(RGB, 3 samples"),
    "look-up table": (with_lut, "look-up table"),
    "slope of zero": (one_with(RescaleSlope=0), "slope 0 leaves no value"),
    "bits": (all_with(BitsStored=12, HighBit=13), "BitsStored 12 and HighBit 13"),
    "frames without place": (many_frames, "multi-frame file of 4 frames without functional groups"),
    "mosaic": (all_with(ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), "Siemens mosaic"),
    "part of a concatenation": (all_with(InConcatenationTotalNumber=2), "concatenation"),
    "too few pixels": (one_with(Rows=60), "different matrix sizes"),
    "promise beyond the file": (all_with(Rows=6000), "its header promises 60,000 bytes of pixels, and 60 are left"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom, of the faults that are written here
@pytest.mark.parametrize(("make", "says"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_refused_in_one_line_that_names_it(write, make, says):
    folder = write(make(Series()))
    with pytest.raises(ScanError, match=says) as caught:
        read_scan(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: ")
    assert "\n" not in message
    assert SECRET not in message


def spoilt(path):
    return {
        "cut short": lambda: path.write_bytes(path.read_bytes()[:-20]),
        "empty": lambda: path.write_bytes(b""),
        "not DICOM": lambda: path.write_bytes(b"<html>404</html>"),
        "private syntax": lambda: retagged(path, "1.2.840.113619.5.2"),
        "unknown syntax": lambda: retagged(path, "1.2.3.4.5"),
    }


def retagged(path, syntax):
    path.write_bytes(
        path.read_bytes().replace(
            b"UI\x14\x001.2.840.10008.1.2.1\0", b"UI\x14\x00" + syntax.encode().ljust(20, b"\0"), 1
        )
    )


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut short", r"IM0\d+.dcm: its header promises 60 bytes of pixels, and 40 are left"),
        ("empty", r"IM0\d+.dcm: the file is empty"),
        ("not DICOM", r"IM0\d+.dcm: named like a slice, but not DICOM"),
        ("private syntax", r"transfer syntax 1.2.840.113619.5.2 \(private or unknown\)"),
        ("unknown syntax", r"transfer syntax 1.2.3.4.5 \(private or unknown\)"),
    ],
)
@pytest.mark.parametrize("which", [0, 3, -1])
def test_one_spoilt_file_is_named_wherever_in_the_stack_it_lies(write, how, says, which):
    folder = write(Series().slices())
    spoilt(sorted(folder.iterdir())[which])[how]()
    with pytest.raises(ScanError, match=says):
        read_scan(folder)


def test_junk_is_counted_and_named_and_nothing_that_blocks_is_opened(write):
    series = Series()
    folder = write(series.slices())
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(64))
    (folder / "readme.txt").write_text("hello")
    os.mkfifo(folder / "pipe.dcm")
    (folder / "zero.dcm").symlink_to("/dev/zero")
    (folder / "loop").symlink_to(folder)
    (folder / "knot").symlink_to(folder / "knot")
    scan = read_scan(folder)
    assert_placed(scan, series.grid)
    assert scan.notes == ("2 files of the folder are no DICOM images: DICOMDIR, readme.txt",)
    assert look(folder).scans == (folder,)
    assert len(file_digest(folder)) == 64


def test_a_copied_file_is_left_out_with_a_note(write):
    series = Series()
    folder = write(series.slices())
    shutil.copy(folder / "IM0003.dcm", folder / "IM0003 copy.dcm")
    scan = read_scan(folder)
    assert_placed(scan, series.grid)
    assert scan.notes == ("1 duplicate file (the same to the byte) was left out",)


def test_a_folder_without_dicom_is_no_scan(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ScanError, match="a folder, not a scan"):
        read_scan(tmp_path)
    with pytest.raises(ScanError, match="no DICOM image"):
        list_series(tmp_path)


# Several series


@pytest.fixture
def two(write):
    """Two series in one folder: 1 is seven slices, 2 is five."""
    first, second = (
        Series(SeriesNumber=2, SeriesDescription="T1 mprage"),
        Series(n=5, SeriesNumber=11, SeriesDescription="T2 tse"),
    )
    write(first.slices(), name="A{:04d}")
    return write(second.slices(), name="B{:04d}"), first, second


def test_two_series_are_refused_with_a_list_that_holds_no_free_text(two):
    folder, first, second = two
    with pytest.raises(ScanError, match="2 DICOM series where one is needed") as caught:
        read_scan(folder)
    message = str(caught.value)
    assert f"1: CT, 7 slices of 5 x 6, {first.uid}; 2: CT, 5 slices of 5 x 6, {second.uid}" in message
    assert "mprage" not in message


@pytest.mark.parametrize("by", [lambda s: "2", lambda s: 2, lambda s: s.uid, lambda s: "t2", lambda s: "T2 TSE"])
def test_a_series_is_chosen_by_number_uid_or_description(two, by):
    folder, _, second = two
    scan = read_scan(folder, series=by(second))
    assert_placed(scan, second.grid)
    assert scan.series == second.uid


@pytest.mark.parametrize(("wanted", "says"), [("t", "fits 2"), ("flair", "no series 'flair'"), ("3", "no series '3'")])
def test_a_choice_that_fits_none_or_several_is_refused(two, wanted, says):
    with pytest.raises(ScanError, match=says):
        read_scan(two[0], series=wanted)


def test_one_file_stands_for_its_series(two):
    folder, first, second = two
    assert_placed(read_scan(folder / "A0003"), first.grid)
    assert_placed(read_scan(folder / "B0003"), second.grid)


def test_a_file_alone_is_no_volume(write):
    with pytest.raises(ScanError, match="a single slice is no volume"):
        read_scan(write([Series().slice(0)]) / "IM0003.dcm")


def test_a_localizer_within_the_series_is_named_and_can_be_left_out(write):
    series = Series()
    scout = Series(axes=((0, 1, 0), (0, 0, -1)), n=1, uid=series.uid, ImageType=["DERIVED", "SECONDARY", "LOCALIZER"])
    folder = write([*series.slices(), *scout.slices()])
    with pytest.raises(ScanError, match=r"different orientations.*localizer"):
        read_scan(folder)
    number = next(entry.number for entry in list_series(folder) if entry.slices == SLICES)
    assert_placed(read_scan(folder, series=number), series.grid)


@pytest.mark.parametrize(
    ("tag", "values", "said"),
    [
        ("EchoTime", (2.5, 5), "echo time 5"),
        ("TemporalPositionIdentifier", (1, 2), "time point 2"),
        ("DiffusionBValue", (0.0, 1000.0), "b-value 1000"),
        ("AcquisitionNumber", (1, 2), "acquisition number 2"),
        ("ImageType", (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]), "image type ORIGINAL/PRIMARY/P"),
    ],
)
def test_two_volumes_at_one_place_are_told_apart_and_never_mixed(write, tag, values, said):
    series = Series()
    folder = write([*series.slices(**{tag: values[0]}), *series.slices(**{tag: values[1], "RescaleIntercept": 1000})])
    with pytest.raises(ScanError, match=f"one DICOM series.*{said}"):
        read_scan(folder)
    assert_placed(read_scan(folder, series="1"), series.grid)
    other = read_scan(folder, series=said)
    assert other.array.min() > 500
    np.testing.assert_array_equal(read_scan(folder, series=other.series).array, other.array)


def test_an_acquisition_number_that_changes_along_one_volume_splits_nothing(write):
    series = Series()
    assert_placed(read_scan(write([series.slice(k, AcquisitionNumber=1 + k // 3) for k in range(SLICES)])), series.grid)


# Uneven slices, accepted on purpose


@pytest.mark.parametrize("make", [without(3), at_steps(2.5, 2.5, 2.5, 4, 4), at_steps(3, 1, 2.2, 2)])
def test_uneven_slices_are_interpolated_where_that_is_asked_for(write, make):
    scan = read_scan(write(make(Series())), slices="resample")
    assert_placed(scan, scan.grid)  # a linear field survives linear interpolation
    (note,) = scan.notes
    assert "lie unevenly" in note
    assert "interpolated, as asked" in note
    assert scan.slices == "resample"


def test_a_missing_slice_is_filled_onto_the_full_grid(write):
    series = Series()
    assert_placed(read_scan(write(without(3)(series)), slices="resample"), series.grid)


def test_even_slices_are_left_alone_when_resampling_is_allowed(write):
    folder = write(Series().slices())
    asked, plain = read_scan(folder, slices="resample"), read_scan(folder)
    np.testing.assert_array_equal(asked.array, plain.array)
    assert asked.notes == ()


# Pixels


def test_every_slice_has_its_own_rescale(write):
    series = Series()
    slices = [series.slice(k, slope=0.05 + 0.013 * k, intercept=10.0 * k) for k in range(SLICES)]
    assert_placed(read_scan(write(slices)), series.grid)


def test_monochrome1_is_not_turned_round(write):
    series = Series()
    assert_placed(read_scan(write(series.slices(PhotometricInterpretation="MONOCHROME1"))), series.grid)


@pytest.mark.parametrize("signed", [True, False])
def test_unused_high_bits_are_off_and_the_sign_is_on(write, signed):
    low, high = (-2048, 2048) if signed else (0, 4096)
    truth = np.random.default_rng(0).integers(low, high, (3, ROWS, COLUMNS))
    slices = [Series().slice(0, position=FIRST + k * np.array([0, 0, 1.0]), slope=1) for k in range(3)]
    for stored, dataset in zip(truth, slices, strict=True):
        dirty = ((stored & 0xFFF) | 0x5000).astype(np.uint16)  # an overlay in the bits above
        pixels(dataset, dirty)
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, int(signed)
        dataset.RescaleSlope = 1
        dataset.SeriesInstanceUID = "1.2.3"
    np.testing.assert_array_equal(read_scan(write(slices)).array, truth.transpose(2, 1, 0))


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian], ids=lambda u: u.name
)
def test_uncompressed_transfer_syntaxes(write, syntax):
    series = Series()
    slices = series.slices()
    for dataset in slices:
        dataset.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
    assert_placed(read_scan(write(slices)), series.grid)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless], ids=lambda u: u.name)
def test_compressed_transfer_syntaxes(write, syntax):
    series = Series(rows=64, columns=48)
    slices = series.slices()
    for dataset in slices:
        dataset.compress(syntax, generate_instance_uid=False)
    assert_placed(read_scan(write(slices)), series.grid)


def test_a_series_without_preamble_is_read(write):
    series = Series()
    folder = write(series.slices())
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[132:])
    assert_placed(read_scan(folder), series.grid)


def enhanced(series, order, per_frame_slope=False):
    dataset = base(series.uid, EnhancedMRImageStorage)
    stored, each = [], []
    for k in order:
        slope = SLOPE * (1 + 0.3 * k if per_frame_slope else 1)
        stored.append(np.rint(series.values(series.positions[k]) / slope))
        frame, place, scale, measures = Dataset(), Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = [f"{mm:.8g}" for mm in series.positions[k]]
        scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = f"{slope:.8g}", 0, "US"
        measures.PixelSpacing = list(series.spacing)
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = Items([place]), Items([scale])
        frame.PixelMeasuresSequence = Items([measures])
        each.append(frame)
    shared, axes = Dataset(), Dataset()
    axes.ImageOrientationPatient = [f"{x:.8g}" for x in (*series.row, *series.column)]
    shared.PlaneOrientationSequence = Items([axes])
    dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence = Items([shared]), Items(each)
    pixels(dataset, np.stack(stored).astype(np.int16))
    dataset.NumberOfFrames = len(order)
    return dataset


@pytest.mark.parametrize("order", [range(SLICES), [3, 0, 6, 2, 5, 1, 4]])
@pytest.mark.parametrize("scaled", [False, True])
def test_enhanced_multi_frame_goes_by_its_functional_groups(write, order, scaled):
    series = Series(axes=oblique(15))
    folder = write([enhanced(series, order, scaled)])
    for path in (folder, folder / "IM0003.dcm"):
        assert_placed(read_scan(path), series.grid)


def test_a_missing_frame_of_a_multi_frame_file_is_seen(write):
    with pytest.raises(ScanError, match="slice 3 of 7 missing"):
        read_scan(write([enhanced(Series(), [0, 1, 3, 4, 5, 6])]))


def test_frames_and_functional_groups_must_agree_in_number(write):
    dataset = enhanced(Series(), range(SLICES))
    dataset.NumberOfFrames = SLICES - 1
    with pytest.raises(ScanError, match="6 frames, but 7 per-frame functional groups"):
        read_scan(write([dataset]))


# The child that decodes


def spoil_codestream(folder):
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        data = bytearray(dataset.PixelData)
        data[40:-20] = bytes(len(data) - 60)
        dataset.PixelData = bytes(data)
        dataset.save_as(path)


def test_a_broken_jpeg_2000_stream_is_an_error_and_no_crash(write):
    slices = Series(rows=64, columns=48).slices()
    for dataset in slices:
        dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    folder = write(slices)
    spoil_codestream(folder)
    with pytest.raises(ScanError, match=r"IM\d+.dcm: its pixels cannot be decoded"):
        read_scan(folder)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os; os.abort()", "the decoder died of SIGABRT"),
        ("import sys; sys.stdin.buffer.read(); sys.exit(3)", "the decoder stopped with status 3"),
        ("import time; time.sleep(60)", "took more than 2 s"),
        ("import sys; sys.stdout.buffer.write(b'\\0abc')", "the decoder stopped with status 0"),
    ],
)
def test_a_child_that_dies_or_hangs_costs_one_line(write, tmp_path, monkeypatch, code, says):
    folder = write(Series().slices())
    (tmp_path / "child.py").write_text(code)
    monkeypatch.setattr(dicom_pixels, "__file__", str(tmp_path / "child.py"))
    monkeypatch.setattr(dicom_decode, "_BASE_SECONDS", 2.0)
    monkeypatch.setattr(dicom_decode, "_SECONDS_PER_FRAME", 0.0)
    with pytest.raises(ScanError, match=says):
        read_scan(folder)


def test_the_child_has_a_limit_on_memory(write, monkeypatch):
    folder = write(Series().slices())
    monkeypatch.setattr(dicom_decode, "_BASE_MEMORY", 1 << 20)
    with pytest.raises(ScanError, match="its pixels cannot be decoded"):
        read_scan(folder)


def test_nothing_of_the_working_folder_runs_in_the_child(write, tmp_path, monkeypatch):
    series = Series()
    folder = write(series.slices())
    (tmp_path / "numpy.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert_placed(read_scan(folder), series.grid)


def test_a_deflate_bomb_is_not_unfolded(tmp_path):
    import zlib

    dataset = Series().slice(0)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = save(dataset, tmp_path / "a.dcm")
    start = path.read_bytes()
    head = 132 + 12 + int.from_bytes(start[140:144], "little")
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(200)) + squeeze.flush()
    path.write_bytes(start[:head] + body)
    with pytest.raises(ScanError, match="unfolds to a size beyond"):
        read_scan(path)


def test_a_compressed_file_cannot_promise_without_bound(write, monkeypatch):
    slices = Series(rows=32, columns=24).slices()
    for dataset in slices:
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.Rows = dataset.Columns = 65535
    with pytest.raises(ScanError, match="beyond belief"):
        read_scan(write(slices))


# What surrounds it


def test_no_patient_data_in_names_listings_or_representations(write, two):
    (entry,) = list_series(write(Series().slices(), "other"))
    assert SECRET in entry.description  # shown by the list command alone
    assert SECRET not in f"{entry} {entry!r} {entry.frames[0]!r}"


def test_a_folder_that_holds_dicom_is_one_case_by_its_name(write, tmp_path, scan_file):
    a = write(Series().slices(), "all/p1/T1 axial")
    b = write([enhanced(Series(), range(SLICES))], "all/p2")
    nifti = scan_file("all/p3/t1.nii.gz")
    (tmp_path / "all/p2/DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "all/DICOMDIR").write_bytes(bytes(128) + b"DICM")
    assert look(tmp_path / "all").scans == (a, b, nifti)
    assert look(tmp_path / "all", "p1/*").scans == (a,)
    assert list(gather([a, b, nifti], tmp_path / "all").cases) == ["p1-t1-axial", "p2", "p3-t1"]
    assert list(gather([b], b).cases) == ["p2"]
    assert case_id(Path("x/series")) == "x-series"


def test_dicom_folders_can_be_the_channels_of_a_case(write, tmp_path):
    flair, t1 = (write(Series().slices(), f"all/p1_{name}") for name in ("flair", "t1"))
    found = gather(look(tmp_path / "all").scans, tmp_path / "all", ["_t1", "_flair"])
    assert {name: case.paths for name, case in found.cases.items()} == {"p1": (t1, flair)}
    assert not found.passed_over


def test_a_folders_digest_follows_its_content_and_not_its_names(write):
    folder = write(Series().slices())
    before = file_digest(folder)
    assert before == read_scan(folder).sha256
    (folder / "IM0003.dcm").rename(folder / "z.dcm")
    (folder / "notes.txt").write_text("seen")
    assert file_digest(folder) == before
    (folder / "z.dcm").unlink()
    assert file_digest(folder) != before


def test_a_volume_is_not_for_dicom(write):
    folder = write(Series().slices())
    with pytest.raises(ScanError, match="choose a series or time point with --series"):
        read_scan(folder, volume=1)
    with pytest.raises(ScanError, match="slices is 'resample'"):
        read_scan(folder, slices="yes")


def test_without_pydicom_a_line_says_what_to_install(write):
    folder = write(Series().slices())
    code = (
        "import sys, importlib.util as u\n"
        "found = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'pydicom' else found(name, *rest)\n"
        "sys.modules['pydicom'] = None\n"
        "from volsal.scans import read_scan\n"
        f"read_scan({str(folder)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'pip install "volsal[dicom]"' in done.stderr.splitlines()[-1]


def test_the_command_line_lists_and_explains(two, tmp_path):
    folder, _, second = two
    listed = CliRunner().invoke(app, ["series", str(folder)])
    assert listed.exit_code == 0
    assert "T1 mprage" in listed.output
    assert second.uid in listed.output
    (tmp_path / "net.py").write_text("from nets import random_net\n\ndef build():\n    return random_net().float()\n")
    (tmp_path / "c.yaml").write_text("model: {factory: net.py:build}\nmethods: [input-gradient]\n")
    command = ["explain", str(folder), "-c", str(tmp_path / "c.yaml"), "-o", str(tmp_path / "out"), "--case", "a"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1
    done = CliRunner().invoke(app, [*command, "--series", "t2"])
    assert done.exit_code == 0, done.output
    (overlay,) = (tmp_path / "out" / "a").glob("*.nii.gz")
    image = nib.load(overlay)
    assert Grid(image.shape, image.affine).distance_mm(second.grid) < 0.1
    for path in (tmp_path / "out").rglob("*.json"):
        assert SECRET not in path.read_text()


def test_a_run_takes_dicom_folders_and_knows_what_is_done(write, tmp_path):
    for name in ("p1", "p2"):
        write(Series(rows=12, columns=14, n=10).slices(), f"all/{name}")
    broken = write(without(3)(Series(rows=12, columns=14, n=10)), "all/p3")
    (tmp_path / "net.py").write_text("from nets import random_net\n\ndef build():\n    return random_net().float()\n")
    (tmp_path / "c.yaml").write_text(
        "model: {factory: net.py:build}\nmethods: [input-gradient]\nscans: {folder: all}\noutput: out\n"
    )
    first = CliRunner().invoke(app, ["run", str(tmp_path / "c.yaml")])
    assert "2 done" in first.output
    assert "slice 4 of 10 missing" in first.output
    second = CliRunner().invoke(app, ["run", str(tmp_path / "c.yaml")])
    assert "0 done, 2 kept from before, 1 refused" in second.output
    (tmp_path / "c.yaml").write_text((tmp_path / "c.yaml").read_text().replace("all}", "all, slices: resample}"))
    third = CliRunner().invoke(app, ["run", str(tmp_path / "c.yaml")])
    assert third.exit_code == 0
    assert (tmp_path / "out" / broken.name / "case.json").is_file()


# A real series: head MR, 24 slices, T1 MPRAGE


@pytest.fixture
def real(shared, tmp_path):
    """A copy of the real series, and its slices' datasets by position."""
    with tarfile.open(shared("scans/mr_series.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "mr_series"
    slices = sorted(map(pydicom.dcmread, folder.glob("*.dcm")), key=lambda d: float(d.ImagePositionPatient[2]))
    return folder, slices


def by_simpleitk(folder, into):
    """The series as SimpleITK converts it to NIfTI."""
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    sitk.WriteImage(reader.Execute(), str(into))
    return read_scan(into)


def test_the_real_series_is_what_simpleitk_and_highdicom_make_of_it(real, tmp_path):
    folder, slices = real
    scan, other = read_scan(folder), by_simpleitk(folder, tmp_path / "itk.nii.gz")
    assert scan.grid.distance_mm(other.grid) < 0.1
    np.testing.assert_array_equal(scan.array, other.array)
    highdicom = pytest.importorskip("highdicom")
    volume = highdicom.image.get_volume_from_series(slices)
    at = volume.affine @ [5, 7, 11, 1]  # slice, row, column of its own; LPS
    i, j, k = np.rint(scan.grid.voxel(at[:3] * LPS)).astype(int)
    np.testing.assert_allclose(scan.grid.world((i, j, k)), at[:3] * LPS, atol=0.1)
    assert scan.array[i, j, k] == volume.array[5, 7, 11]


def rewrite(folder, slices):
    shutil.rmtree(folder)
    for k, dataset in enumerate(slices):
        save(dataset, folder / f"{k:03d}.dcm")
    return folder


def test_the_real_series_tilted(real):
    folder, slices = real
    tilt = np.radians(15)
    first = np.array(slices[0].ImagePositionPatient, float)
    for k, dataset in enumerate(slices):
        dataset.ImageOrientationPatient = [1, 0, 0, 0, f"{np.cos(tilt):.10g}", f"{np.sin(tilt):.10g}"]
        dataset.ImagePositionPatient = [f"{mm:.10g}" for mm in first + 3.0 * k * np.array([0, 0, 1])]
    scan = read_scan(rewrite(folder, slices))
    last = first + 3.0 * 23 * np.array([0, 0, 1])
    far = last + 511 * 0.41015625 * np.array([1, np.cos(tilt), np.sin(tilt)])
    np.testing.assert_allclose(scan.grid.world((0, 0, 23)), last * LPS, atol=0.1)
    np.testing.assert_allclose(scan.grid.world((511, 511, 23)), far * LPS, atol=0.1)
    np.testing.assert_array_equal(scan.array[:, :, 23], slices[23].pixel_array.T)
    assert "gantry tilt of 15.0 degrees" in scan.notes[0]


@pytest.mark.parametrize(("k", "says"), [(1, "slice 2 of 24"), (10, "slice 11 of 24")])
def test_the_real_series_with_a_slice_missing(real, k, says):
    folder, slices = real
    with pytest.raises(ScanError, match=f"{says} missing between z = "):
        read_scan(rewrite(folder, slices[:k] + slices[k + 1 :]))


def test_the_real_series_among_others(real):
    folder, _ = real
    truth = read_scan(folder)
    uid = generate_uid()
    for dataset in map(pydicom.dcmread, sorted(folder.glob("*.dcm"))[:3]):
        dataset.SeriesInstanceUID, dataset.SeriesDescription = uid, "scout"
        dataset.SOPInstanceUID = generate_uid()
        save(dataset, folder / f"scout-{dataset.InstanceNumber}.dcm")
    with pytest.raises(ScanError, match="2 DICOM series"):
        read_scan(folder)
    scan = read_scan(folder, series="t1_mpr")
    np.testing.assert_array_equal(scan.array, truth.array)
    assert scan.grid.same_as(truth.grid)


def test_the_real_series_with_two_echoes(real):
    folder, _ = real
    truth = read_scan(folder)
    for k, dataset in enumerate(map(pydicom.dcmread, sorted(folder.glob("*.dcm")))):
        dataset.EchoTime, dataset.SOPInstanceUID = 99.0, generate_uid()
        dataset.PixelData = (dataset.pixel_array // 2).astype(np.uint16).tobytes()
        save(dataset, folder / f"echo-{k}.dcm")
    with pytest.raises(ScanError, match=r"one DICOM series.*echo time 99"):
        read_scan(folder)
    second = read_scan(folder, series="echo time 99")
    np.testing.assert_array_equal(second.array, truth.array // 2)


def test_the_real_series_with_a_rescale_of_its_own_per_slice(real):
    folder, slices = real
    for k, dataset in enumerate(slices):
        dataset.RescaleSlope, dataset.RescaleIntercept = (1 if k == 0 else f"{0.37 + 0.01 * k:.4g}"), 0
    scan = read_scan(rewrite(folder, slices))
    for k in (0, 5, 23):
        truth = slices[k].pixel_array.T * np.float64(float(slices[k].RescaleSlope))
        np.testing.assert_allclose(scan.array[:, :, k], truth, rtol=1e-6)


def test_the_real_series_explained_lies_where_its_nifti_lies(real, tmp_path):
    import SimpleITK as sitk

    folder, _ = real
    (tmp_path / "net.py").write_text("from nets import random_net\n\ndef build():\n    return random_net().float()\n")
    (tmp_path / "c.yaml").write_text(
        "model: {factory: net.py:build}\nmethods: [grad-cam]\ntargets: [class-0]\n"
        "preprocess: [Orientation: {axcodes: RAS}, Spacing: {pixdim: [4, 4, 3]}, NormalizeIntensity]\n"
    )
    command = ["explain", str(folder), "-c", str(tmp_path / "c.yaml"), "-o", str(tmp_path / "out"), "--case", "a"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    (overlay,) = map(str, (tmp_path / "out" / "a").glob("*.nii.gz"))
    converted = by_simpleitk(folder, tmp_path / "itk.nii.gz")
    ours = nib.load(overlay)
    assert Grid(ours.shape, ours.affine).distance_mm(converted.grid) < 0.1
    one, other = sitk.ReadImage(overlay), sitk.ReadImage(str(tmp_path / "itk.nii.gz"))
    for corner in ((0, 0, 0), (511, 0, 23), (0, 511, 23), (511, 511, 0)):
        assert math.dist(one.TransformIndexToPhysicalPoint(corner), other.TransformIndexToPhysicalPoint(corner)) < 0.1


@pytest.mark.parametrize(("tag", "name"), [("PatientID", "patient"), ("FrameOfReferenceUID", "frame of reference")])
def test_the_real_series_of_two_patients(real, tag, name):
    folder, slices = real
    other = {"PatientID": "SECRET-12345", "FrameOfReferenceUID": generate_uid()}[tag]
    for dataset in slices[12:]:
        setattr(dataset, tag, other)
    with pytest.raises(ScanError, match=rf"{name} 1.*{name} 2") as refused:
        read_scan(rewrite(folder, slices))
    assert "SECRET" not in str(refused.value)
    assert other not in str(refused.value)


def test_slices_named_one_by_one_are_no_channels(write):
    folder = write(Series(rows=12, columns=14, n=10).slices(), "one")
    with pytest.raises(ScanError, match="folder instead"):
        read_case(sorted(folder.iterdir()))
