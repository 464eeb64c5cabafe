"""What a run's records hold and keep back: DICOM's identifiers, and how maps are stored."""

import json

import nibabel as nib
import numpy as np
import pytest

from volsal.batch import Run
from volsal.config import load_config
from volsal.scans import read_scan
from volsal.scans.find import pseudonym


@pytest.fixture
def two_series(tmp_path):
    """A function that writes a folder with two small CT series, thin and thick; it returns the UID of each."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    def write(name):
        folder = tmp_path / "dicom" / name
        folder.mkdir(parents=True)
        uids = {"thin": str(generate_uid()), "thick": str(generate_uid())}
        study, frame = generate_uid(), generate_uid()
        for series, (description, uid) in enumerate(uids.items()):
            values = np.random.default_rng(series).integers(0, 1000, size=(10, 12, 14), dtype=np.int16)
            for number, pixels in enumerate(values):
                image = pydicom.Dataset()
                image.SOPClassUID, image.SOPInstanceUID, image.Modality = CTImageStorage, generate_uid(), "CT"
                image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, uid, frame
                image.SeriesDescription, image.InstanceNumber = description, number + 1
                image.ImagePositionPatient, image.ImageOrientationPatient = [0, 0, 3 * number], [1, 0, 0, 0, 1, 0]
                image.PixelSpacing, image.SliceThickness = [2, 2], 3
                image.Rows, image.Columns = pixels.shape
                image.BitsAllocated = image.BitsStored = 16
                image.HighBit, image.PixelRepresentation, image.SamplesPerPixel = 15, 1, 1
                image.PhotometricInterpretation, image.RescaleSlope, image.RescaleIntercept = "MONOCHROME2", 1, 0
                image.PixelData = pixels.tobytes()
                image.file_meta = pydicom.dataset.FileMetaDataset()
                image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
                image.save_as(folder / f"{description}{number}.dcm", enforce_file_format=True)
        return folder, uids

    return write


def execute(path):
    run = Run(load_config(path))
    return run, {outcome.case: outcome for outcome in run.execute()}


def test_a_series_is_recorded_by_a_pseudonym_from_which_the_run_folder_finds_it_again(config, two_series, tmp_path):
    folder, uids = two_series("p1")
    run, outcomes = execute(config(scans={"folder": "dicom", "series": "thick"}))
    assert {case: o.status for case, o in outcomes.items()} == {"p1": "done"}
    recorded = run.folder.record("p1")["scan"]["series"]
    assert recorded not in uids.values()
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [uid for uid in uids.values() for content in written if uid.encode() in content]
    assert run.folder.series_of(folder, recorded) == uids["thick"]
    again = read_scan(folder, series=run.folder.series_of(folder, recorded))
    assert again.sha256 == read_scan(folder, series="thick").sha256
    np.testing.assert_array_equal(again.array, read_scan(folder, series="thick").array)
    assert not np.array_equal(again.array, read_scan(folder, series="thin").array)
    assert run.folder.series_of(folder, "0123456789ab") == "0123456789ab", "what is no series of this folder stays"
    assert run.folder.series_of(folder / "thick0.dcm", recorded) == recorded
    assert run.folder.series_of(folder, None) is None


def test_a_fault_names_a_series_by_the_same_pseudonym(config, two_series, tmp_path):
    _, uids = two_series("p1")
    run, outcomes = execute(config(scans={"folder": "dicom", "series": "coronal"}))
    assert outcomes["p1"].status == "refused"
    written = "".join(path.read_text() for path in (tmp_path / "out" / "p1").iterdir())
    assert all(pseudonym(uid, run.folder.salt()) in written for uid in uids.values())
    assert not [uid for uid in uids.values() if uid in written]


def test_plain_identifiers_are_recorded_where_that_is_asked_for(config, two_series):
    folder, uids = two_series("p1")
    run, _ = execute(config(scans={"folder": "dicom", "series": "thick", "identifiers": "plain"}))
    recorded = run.folder.record("p1")["scan"]["series"]
    assert recorded == uids["thick"]
    assert run.folder.series_of(folder, recorded) == recorded


def test_maps_are_stored_as_the_config_says_and_made_anew_when_it_says_otherwise(config, tmp_path):
    run, _ = execute(config())
    (entry,) = run.folder.record("a")["maps"]
    exact = nib.load(tmp_path / "out" / "a" / entry["file"])
    assert (exact.get_data_dtype(), entry["stored"]["dtype"]) == (np.float32, "float32")
    values = exact.get_fdata()
    _, outcomes = execute(config(maps={"stored_as": "uint8"}))
    assert {o.status for o in outcomes.values()} == {"done"}
    (entry,) = run.folder.record("a")["maps"]
    stored = nib.load(tmp_path / "out" / "a" / entry["file"])
    assert (stored.get_data_dtype(), entry["stored"]["dtype"]) == (np.uint8, "uint8")
    apart = np.abs(stored.get_fdata() - values).max()
    assert 0 < apart <= entry["stored"]["largest_error"] * (1 + 1e-6) <= values.max() / 509
    assert entry["maximum"] == pytest.approx(values.max()), "the record is of the values before"
    assert json.loads((tmp_path / "out" / "run.json").read_text())["config"]["maps"] == {"stored_as": "uint8"}
