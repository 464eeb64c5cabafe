"""Maps as small integers: what every reader sees, and what is said about it."""

import os
import tracemalloc
from hashlib import sha256

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from volsal.grid import Grid
from volsal.scans import Scan, read_scan, write
from volsal.scans.write import STORED_AS, Coding, WriteError, map_header, write_map

INTEGERS = STORED_AS[1:]


@pytest.fixture
def scan(oblique):
    return Scan(np.zeros(oblique.shape, np.float32), oblique)


def evidence(shape, scale=1.0, signed=False):
    """Positive here and there, 0 elsewhere; with ``signed`` negative as well."""
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values[:, ::3] = 0
    return (values if signed else values.clip(0)) * np.float32(scale)


def file_of(scan, tmp_path, values, stored_as, window=(0.0, 1.0)):
    path = tmp_path / "map.nii.gz"
    return path, write_map(path, values, map_header(scan, "x", "y", window), stored_as)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.7e-9, 8.1e12])
@pytest.mark.parametrize("stored_as", INTEGERS)
def test_every_reader_gets_the_values_to_the_stated_error(stored_as, scale, signed, scan, tmp_path):
    values = evidence(scan.grid.shape, scale, signed)
    path, written = file_of(scan, tmp_path, values, stored_as)
    stored = written.stored
    image = nib.load(path)
    assert image.get_data_dtype() == stored["dtype"] == (stored_as.lstrip("u") if signed else stored_as)
    assert (float(image.dataobj.slope), float(image.dataobj.inter)) == (stored["slope"], 0)
    seen = {
        "nibabel": image.get_fdata(),
        "nibabel, float32": image.get_fdata(dtype=np.float32),
        "volsal": read_scan(path).array,
        "SimpleITK": sitk.GetArrayFromImage(sitk.ReadImage(str(path))).transpose(2, 1, 0),
    }
    largest = np.unravel_index(np.abs(values).argmax(), values.shape)
    for reader, found in seen.items():
        apart = np.abs(found.astype(np.float64) - values)
        assert apart.max() == pytest.approx(stored["largest_error"], rel=1e-2), reader
        assert apart[values == 0].max() == 0, reader
        assert np.float32(found[largest]) == values[largest], reader
    assert 0.3 * stored["slope"] < stored["largest_error"] <= stored["slope"] / 2 * (1 + 1e-9)


@pytest.mark.parametrize("stored_as", INTEGERS)
def test_the_largest_value_survives_whatever_it_is(stored_as):
    """A slope is rounded to float32, so the largest integer times it is not always the value again."""
    peaks = np.random.default_rng(1).uniform(1, 2, 3000).astype(np.float32)
    near_two = np.nextafter(np.float32(2), np.float32(0), dtype=np.float32)
    tops = set()
    for peak in (*peaks, near_two, np.float32(1), np.finfo(np.float32).max / 2, np.finfo(np.float32).tiny):
        coding = Coding.of(np.array([0, peak], np.float32), stored_as)
        coded, _ = coding.code(np.array([0, peak], np.float32))
        assert np.float32(coded[1] * coding.slope) == peak
        assert np.float32(coded[1]) * np.float32(coding.slope) == peak  # what readers in single precision make
        tops.add(int(coded[1]))
    assert max(tops) == np.iinfo(stored_as).max
    assert len(tops) > 1  # else this needs no search


@pytest.mark.parametrize("stored_as", STORED_AS)
def test_a_map_of_nothing_stays_nothing(stored_as, scan, tmp_path):
    path, written = file_of(scan, tmp_path, scan.array, stored_as)
    assert not nib.load(path).get_fdata().any()
    assert written.stored["largest_error"] == 0
    assert float(nib.load(path).dataobj.slope) == 1


def test_float32_is_exact_and_the_display_range_is_in_the_maps_own_unit(scan, tmp_path):
    values = evidence(scan.grid.shape, 40.0)
    for stored_as in STORED_AS:
        path, written = file_of(scan, tmp_path, values, stored_as, window=(0.0, 17.5))
        header = nib.load(path).header
        assert (float(header["cal_min"]), float(header["cal_max"])) == (0, 17.5)
        if stored_as == "float32":
            np.testing.assert_array_equal(np.asanyarray(nib.load(path).dataobj), values)
            assert written.stored == {"dtype": "float32", "slope": 1.0, "largest_error": 0.0}


@pytest.mark.parametrize("stored_as", STORED_AS)
def test_pieces_and_the_order_in_memory_make_no_difference(stored_as, scan, tmp_path, monkeypatch):
    values = evidence(scan.grid.shape, signed=True)
    path, written = file_of(scan, tmp_path, values, stored_as)
    assert written.sha256 == sha256(path.read_bytes()).hexdigest()
    at_once = np.asanyarray(nib.load(path).dataobj)
    assert file_of(scan, tmp_path, np.asfortranarray(values), stored_as)[1] == written
    monkeypatch.setattr(write, "_PIECE", 4 * 7 * 9 * 2)  # two slices
    path, in_pieces = file_of(scan, tmp_path, values, stored_as)
    assert in_pieces.sha256 == sha256(path.read_bytes()).hexdigest()
    assert in_pieces.stored == written.stored
    np.testing.assert_array_equal(np.asanyarray(nib.load(path).dataobj), at_once)


def test_a_disk_that_takes_no_more_is_told_and_nothing_is_left(scan, tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    values = np.random.default_rng(0).normal(size=scan.grid.shape).astype(np.float32)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(WriteError, match="could not be written: File too large"):
            file_of(scan, tmp_path, values, "float32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows opens no folders")
def test_the_file_is_on_the_disk_before_its_name_and_then_the_name(scan, tmp_path, monkeypatch):
    path = tmp_path / "map.nii.gz"
    seen = []

    def watched(handle, sound=os.fsync):
        same = "folder" if os.path.samestat(os.fstat(handle), tmp_path.stat()) else "file"
        seen.append((same, path.exists()))
        sound(handle)

    monkeypatch.setattr(os, "fsync", watched)
    file_of(scan, tmp_path, scan.array, "float32")
    assert seen == [("file", False), ("folder", True)]


def test_writing_changes_nothing_that_other_threads_share(scan, tmp_path, monkeypatch):
    def refused(*_):
        raise AssertionError("the umask is the whole process's")

    monkeypatch.setattr(os, "umask", refused)
    file_of(scan, tmp_path, scan.array, "float32")


@pytest.mark.parametrize("stored_as", STORED_AS)
def test_writing_and_reading_back_make_no_second_copy(stored_as, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_PIECE", 1 << 16)
    scan = Scan(np.zeros((120, 110, 100), np.float32), Grid((120, 110, 100), np.eye(4)))
    values = evidence(scan.grid.shape)
    file_of(scan, tmp_path, values, stored_as)
    tracemalloc.start()
    file_of(scan, tmp_path, values, stored_as)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < values.size  # bytes: less than a copy in the smallest of the integers
