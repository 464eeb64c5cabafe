"""What a run's records hold and keep back: DICOM's identifiers, and how maps are stored."""

import hashlib
import json
import struct

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from volsal.batch import Run
from volsal.config import load_config
from volsal.scans import read_scan
from volsal.scans.find import pseudonym


@pytest.fixture
def two_series(tmp_path):
    """A function that writes a folder with two small series, thin and thick; it returns the UID of each."""
    pytest.importorskip("pydicom")
    from made_series import Series

    def write(name):
        folder = tmp_path / "dicom" / name
        folder.mkdir(parents=True)
        thin, thick = (Series(SeriesDescription=one, thickness=mm) for one, mm in (("thin", 1.5), ("thick", 3.0)))
        thick.study, thick.frame = thin.study, thin.frame
        for series, description in ((thin, "thin"), (thick, "thick")):
            for number, path in enumerate(series.write(tmp_path / description).iterdir()):
                path.rename(folder / f"{description}{number}.dcm")
        return folder, {"thin": str(thin.uid), "thick": str(thick.uid)}

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


def test_a_record_tells_each_file_by_its_size_and_the_grid_by_a_digest(config, two_series, tmp_path):
    folder, _ = two_series("p1")
    run, _ = execute(config(scans={"folder": "dicom", "series": "thick"}))
    scan = run.folder.record("p1")["scan"]
    assert scan["bytes"] == sum(path.stat().st_size for path in folder.glob("thick*"))
    content = struct.pack("<3q16d", *scan["shape"], *(entry + 0.0 for row in scan["affine"] for entry in row))
    assert scan["grid_sha256"] == hashlib.sha256(content).hexdigest()
    assert scan["nan"] is None


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.hdr", "a.nrrd", "a.mha", "a.mhd"])
def test_the_size_of_a_scan_is_that_of_all_its_files(tmp_path, name):
    image = nib.Nifti1Image(np.random.default_rng(0).integers(0, 99, (5, 6, 7), dtype=np.int16), np.diag([2, 2, 2, 1]))
    if name == "a.hdr":
        nib.save(nib.Nifti1Pair.from_image(image), tmp_path / name)
    else:
        nib.save(image, tmp_path.parent / "of.nii")
        sitk.WriteImage(sitk.ReadImage(tmp_path.parent / "of.nii"), tmp_path / name)
    scan = read_scan(tmp_path / name)
    assert scan.size == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_the_steps_of_a_record_lead_from_the_models_input_to_the_scan(config):
    steps = [{"Orientation": {"axcodes": "RAS"}}, {"Spacing": {"pixdim": [3, 3, 3]}}, "ScaleIntensity"]
    steps.append({"ResizeWithPadOrCrop": {"spatial_size": [8, 14, 6]}})
    run, _ = execute(config(preprocess=steps))
    record = run.folder.record("a")
    seen = record["provenance"]["model_input"]
    assert [step["name"] for step in seen["steps"]] == [
        "Orientation",
        "Spacing",
        "ScaleIntensity",
        "ResizeWithPadOrCrop",
    ]
    product = np.linalg.multi_dot([step["matrix"] for step in seen["steps"]])
    np.testing.assert_allclose(seen["to_scan"], product, atol=1e-9)
    np.testing.assert_allclose(np.array(record["scan"]["affine"]) @ product, seen["affine"], atol=1e-9)
    others = [run.folder.record(case)["provenance"]["model_input"] for case in ("sub-b", "sub-c")]
    assert others == [seen, seen], "scans of one shape are told alike"


def test_a_result_from_before_a_record_told_all_this_is_kept(config, tmp_path):
    execute(config())
    place = tmp_path / "out" / "a" / "case.json"
    record = json.loads(place.read_text())
    for name in ("grid_sha256", "bytes", "nan"):
        del record["scan"][name]
    del record["provenance"]["model_input"]["steps"], record["provenance"]["model"]["source"]
    place.write_text(json.dumps(record))
    _, outcomes = execute(config())
    assert {outcome.status for outcome in outcomes.values()} == {"kept"}
    assert json.loads(place.read_text()) == record
