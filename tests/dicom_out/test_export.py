"""DICOM out: the maps of a case, read back by four readers, lie on the source's slices with the values of the NIfTI."""

import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from made_runs import add_case, maps_of
from typer.testing import CliRunner

from volsal.cli import app
from volsal.dicom_out import DicomOutError, Settings, Threshold, case_folders, export_case
from volsal.dicom_out.export import _WRITERS, _verify
from volsal.dicom_out.objects import line
from volsal.dicom_out.source import Source
from volsal.grid import Grid
from volsal.run_folder import RunFolder
from volsal.scans import ScanError, read_scan
from volsal.scans.write import WriteError

pydicom = pytest.importorskip("pydicom")
hd = pytest.importorskip("highdicom")
from made_series import SECRETS, Series, oblique  # noqa: E402

SERIES = {
    "axial": Series(),
    "descending": Series(step=(0, 0, -3.0)),
    "sagittal": Series(axes=((0, 1, 0), (0, 0, -1))),
    "oblique": Series(axes=oblique(24)),
    "thick": Series(spacing=(0.9, 1.3), thickness=6.5),
    "tilted gantry": Series(step=(0, 0.8, 3.0)),
}
MAP, REGION = Settings(("map",), methods=("grad-cam",)), Settings(("region",), methods=("grad-cam",))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function: the case of a series and its files by what they are, each made once; of ``axial`` every map's."""
    made = {}

    def exported(name, how="write", identifiers="source"):
        if (name, how) not in made:
            made[name, how] = case_of(tmp_path_factory.mktemp("case"), SERIES[name], how)
        case = made[name, how]
        if (name, how, identifiers) not in made:
            methods = () if name == "axial" else ("grad-cam",)
            settings = Settings(("map", "region"), identifiers=identifiers, methods=methods)
            made[name, how, identifiers] = export_case(case, case.parents[1] / identifiers, settings)
        files = made[name, how, identifiers].files
        return case, {file.name.removeprefix("case_").removesuffix(".dcm"): file for file in files}

    return exported


def case_of(tmp_path, series, how="write", name="case"):
    """A run with one case of ``series``, written by its method ``how``."""
    add_case(tmp_path / "run", name, getattr(series, how)(tmp_path / "scans" / name))
    return tmp_path / "run" / name


def overlay(case, method="grad-cam"):
    return read_scan(case / f"{case.name}_{method}_class-1.nii.gz")


def with_identifiers(settings):
    return replace(settings, identifiers="source")


def at_world(affine, array, points):
    """Values of ``array`` at world positions (n, 3), which must be its voxels' centres to 0.1 mm."""
    ijk = (points - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    nearest = np.rint(ijk).astype(int)
    assert np.abs((nearest - ijk) @ affine[:3, :3].T).max() < 0.1
    inside = ((nearest >= 0) & (nearest < array.shape)).all(axis=1)
    values = np.zeros(len(points), array.dtype)
    values[inside] = array[tuple(nearest[inside].T)]
    return values


def every_voxel(scan):
    ijk = np.stack(np.meshgrid(*map(np.arange, scan.grid.shape), indexing="ij"), axis=-1).reshape(-1, 3)
    return scan.grid.world(ijk), scan.array.reshape(-1)


@pytest.mark.parametrize("name", SERIES)
def test_a_map_opens_again_in_the_same_place_with_the_same_values(exported, name):
    case, files = exported(name)
    file = files["grad-cam_class-1_map"]
    expected = overlay(case)
    assert expected.array.max() > 0.9
    own = read_scan(file)
    assert own.grid.distance_mm(expected.grid) < 0.001
    assert np.array_equal(own.array, expected.array)
    points, values = every_voxel(expected)
    if name == "tilted gantry":  # of which the other readers make no volume
        assert own.grid.obliquity > 10
        return
    volume = hd.imread(file).get_volume(apply_real_world_transform=True)
    affine = np.diag([-1, -1, 1, 1]) @ volume.affine
    assert np.array_equal(at_world(affine, volume.array.astype(np.float32), points), values)


@pytest.mark.parametrize("name", SERIES)
def test_a_region_is_where_the_map_exceeds_the_threshold(exported, name):
    case, files = exported(name)
    file = files["grad-cam_class-1_region"]
    points, values = every_voxel(overlay(case))
    expected = values >= np.float32(0.5) * values.max()
    assert 100 < expected.sum() < 2000
    # Frame by frame, without anybody's idea of a volume.
    read = pydicom.dcmread(file)
    found = np.zeros(len(points), bool)
    for group, frame in zip(read.PerFrameFunctionalGroupsSequence, read.pixel_array, strict=True):
        place = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        row, column = np.array(
            read.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient, float
        ).reshape(2, 3)
        between = np.array(read.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing, float)
        rows, columns = np.nonzero(frame)
        lps = place + columns[:, None] * row * between[1] + rows[:, None] * column * between[0]
        far = np.linalg.norm(points[:, None] - (lps * (-1, -1, 1))[None], axis=-1) if len(rows) else None
        if far is not None:
            assert far.min(axis=0).max() < 0.1
            found[far.argmin(axis=0)] = True
    assert np.array_equal(found, expected)
    if name == "tilted gantry":  # SimpleITK straightens it, unsaid
        return
    image = sitk.ReadImage(str(file))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    array = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    assert np.array_equal(at_world(np.diag([-1, -1, 1, 1]) @ affine, array, points) > 0, expected)
    volume = hd.seg.segread(file).get_volume(combine_segments=True)
    assert np.array_equal(at_world(np.diag([-1, -1, 1, 1]) @ volume.affine, volume.array, points) > 0, expected)


# References


def references(read):
    """For every frame the position, and class, instance and frame number of the one source it names."""
    for group in read.PerFrameFunctionalGroupsSequence:
        (source,) = group.DerivationImageSequence[0].SourceImageSequence
        yield (
            np.array(group.PlanePositionSequence[0].ImagePositionPatient, float),
            source.ReferencedSOPClassUID,
            source.ReferencedSOPInstanceUID,
            source.get("ReferencedFrameNumber"),
        )


def test_every_frame_names_the_slice_that_it_lies_on(exported):
    series, (_, files) = SERIES["oblique"], exported("oblique")
    for kind in ("map", "region"):
        read = pydicom.dcmread(files[f"grad-cam_class-1_{kind}"])
        assert read.StudyInstanceUID == series.study
        assert read.ReferencedSeriesSequence[0].SeriesInstanceUID == series.uid
        assert {one.ReferencedSOPInstanceUID for one in read.SourceImageSequence} == set(series.sops)
        assert read.SeriesInstanceUID != series.uid
        assert read.FrameOfReferenceUID == series.frame
        found = list(references(read))
        assert len(found) == 12 if kind == "map" else 3 < len(found) < 12
        for position, sop_class, sop, number in found:
            k = series.sops.index(sop)
            assert np.linalg.norm(position - series.positions[k]) < 0.01
            assert (sop_class, number) == ("1.2.840.10008.5.1.4.1.1.2", None)


def test_frames_of_a_multi_frame_source_are_named_by_their_numbers(exported):
    series, (case, files) = SERIES["descending"], exported("descending", "write_enhanced")
    read = pydicom.dcmread(files["grad-cam_class-1_map"])
    (only,) = read.SourceImageSequence
    assert only.ReferencedSOPInstanceUID == series.sops[0]
    assert "ReferencedFrameNumber" not in only
    order = series.frame_order()
    numbers = set()
    for position, kind, sop, number in references(read):
        assert np.linalg.norm(position - series.positions[order[number - 1]]) < 0.01
        assert (kind, sop) == ("1.2.840.10008.5.1.4.1.1.4.1", series.sops[0])
        numbers.add(number)
    assert numbers == set(range(1, 13))
    assert np.array_equal(read_scan(files["grad-cam_class-1_map"]).array, overlay(case).array)


# Identifiers


def texts(dataset):
    """Every value of every element, those of sequences and of the file's own header too."""
    for element in (*dataset.file_meta, *dataset.iterall()):
        if element.VR != "SQ" and not isinstance(element.value, bytes):
            values = (
                element.value if isinstance(element.value, (list, pydicom.multival.MultiValue)) else [element.value]
            )
            yield from map(str, values)


def test_by_default_nothing_of_the_patient_and_no_uid_of_the_source_goes_out(tmp_path):
    series = Series()
    case = case_of(tmp_path, series, name="zzphi-alice")
    exported = export_case(case, tmp_path / "out", Settings(methods=("grad-cam",)))
    hidden = [*SECRETS.values(), "Zzphi", "zzphi", "Älice", "alice", str(tmp_path)]
    hidden = [value for value in hidden if value != "F"] + [series.uid, series.study, series.frame, *series.sops]
    studies = set()
    for file in exported.files:
        read = pydicom.dcmread(file)
        found = list(texts(read))
        assert len(found) > 60
        assert not [text for text in found for secret in hidden if secret in text]
        content = file.read_bytes()
        assert not [secret for secret in hidden if secret.encode("latin-1") in content]
        assert (read.PatientName, read.PatientBirthDate, read.PatientSex) == ("", "", "")
        assert (read.PatientIdentityRemoved, len(read.PatientID)) == ("YES", 12)
        assert read.get("SeriesDescription") == f"grad-cam class-1 {file.stem.rsplit('_', 1)[1]} (research use)"
        studies.add((read.StudyInstanceUID, read.PatientID, read.ReferencedSeriesSequence[0].SeriesInstanceUID))
    assert len(studies) == 1
    record = (tmp_path / "out" / case.name / "dicom.json").read_text()
    assert json.loads(record)["identifiers"] == "none"
    assert not [secret for secret in (series.uid, series.study, "Zzphi-4711", "19510203") if secret in record]


def test_that_walk_would_find_an_identifier(exported):
    series, (_, files) = SERIES["axial"], exported("axial")
    found = list(texts(pydicom.dcmread(files["grad-cam_class-1_map"])))
    assert {series.uid, series.study, series.frame, *series.sops, SECRETS["PatientID"]} <= set(found)


def test_with_identifiers_a_pacs_files_it_with_the_patients_study(tmp_path):
    case = case_of(tmp_path, Series(PatientAge="068Y"))
    exported = export_case(case, tmp_path / "out", Settings(identifiers="source", methods=("grad-cam",)))
    for file in exported.files:
        read = pydicom.dcmread(file)
        for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
                        "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyDescription"):  # fmt: skip
            assert str(read[keyword].value) == SECRETS[keyword], keyword
        assert read.PatientAge == "068Y"
        assert "PatientIdentityRemoved" not in read
        # What is neither the patient nor the study stays behind.
        assert not {"InstitutionName", "OperatorsName"} & set(read.dir())
        assert "Zzseries" not in " ".join(texts(read))
    assert json.loads((tmp_path / "out/case/dicom.json").read_text())["identifiers"] == "source"


def test_one_patient_keeps_one_made_up_name_within_a_run_and_not_beyond(tmp_path):
    first, second = Series(), Series(step=(0, 0, -3.0))
    second.study, second.frame = first.study, first.frame
    names = []
    for folder, series, name in (("a", first, "one"), ("a", second, "two"), ("b", first, "one")):
        case = case_of(tmp_path / folder, series, name=name)
        (file,) = export_case(case, tmp_path / folder / "out", MAP).files
        read = pydicom.dcmread(file)
        names.append((read.PatientID, read.StudyInstanceUID, read.FrameOfReferenceUID))
    assert names[0] == names[1]
    assert not set(names[0]) & set(names[2])


# What is written


def test_the_same_result_is_the_same_instance_to_the_byte(tmp_path):
    case = case_of(tmp_path, Series())
    everything = Settings(methods=("grad-cam",))
    once, again = (export_case(case, tmp_path / name, everything).files for name in ("a", "b"))
    assert [file.read_bytes() for file in once] == [file.read_bytes() for file in again]
    other = export_case(case, tmp_path / "c", replace(REGION, threshold=Threshold(40.0, "share"))).files[0]
    uids = [pydicom.dcmread(file).SOPInstanceUID for file in (*once, other)]
    assert len(set(uids)) == 4
    assert pydicom.dcmread(other).SeriesInstanceUID == pydicom.dcmread(once[1]).SeriesInstanceUID
    for file in once:
        read = pydicom.dcmread(file)
        assert read.file_meta.MediaStorageSOPInstanceUID == read.SOPInstanceUID


def test_a_second_export_leaves_nothing_of_the_first(tmp_path):
    case = case_of(tmp_path, Series())
    first = export_case(case, tmp_path / "out", replace(MAP, methods=()))
    second = export_case(case, tmp_path / "out", REGION)
    left = sorted(path.name for path in (tmp_path / "out/case").iterdir())
    assert left == sorted(["dicom.json", *(file.name for file in second.files)])
    assert len(first.files) == 3


@pytest.mark.parametrize("left", [".volsal-0123456789abcdefcase_grad-cam_class-1_map.dcm", None])
def test_an_export_that_was_cut_short_leaves_no_patient_to_a_later_one(left, tmp_path, monkeypatch):
    case = case_of(tmp_path, Series())
    home = tmp_path / "out/case"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setitem(_WRITERS, "region", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_case(case, tmp_path / "out", Settings(identifiers="source"))
    (half,) = home.iterdir()
    assert pydicom.dcmread(half).PatientID == SECRETS["PatientID"]
    if left:  # or while it was being written, by a killed process
        half.rename(home / left)
    (home / "notes_map.dcm").touch()  # somebody else's
    second = export_case(case, tmp_path / "out", REGION)
    names = sorted(path.name for path in home.iterdir())
    assert names == sorted(["dicom.json", "notes_map.dcm", *(file.name for file in second.files)])


def test_another_models_maps_are_another_series(tmp_path):
    case = case_of(tmp_path, Series())
    record = case / "case.json"
    series = []
    for weights in ("ab", "cd"):
        content = json.loads(record.read_text())
        content["provenance"]["model"]["weights_sha256"] = weights * 32
        record.write_text(json.dumps(content))
        (file,) = export_case(case, tmp_path / weights, MAP).files
        read = pydicom.dcmread(file)
        series.append((read.SeriesInstanceUID, read.DeviceSerialNumber))
    assert series[0][0] != series[1][0]
    assert series[0][1] != series[1][1]


def test_maps_of_two_echoes_of_one_series_are_two_series(tmp_path):
    first, second = Series(EchoTime="10"), Series(EchoTime="30")
    second.uid, second.study, second.frame = first.uid, first.study, first.frame
    cases = [case_of(tmp_path, series, name=name) for series, name in ((first, "one"), (second, "two"))]
    read = [pydicom.dcmread(export_case(case, tmp_path / "out", MAP).files[0]) for case in cases]
    assert len({one.ReferencedSeriesSequence[0].SeriesInstanceUID for one in read}) == 1
    assert len({one.SeriesInstanceUID for one in read}) == 2


def test_what_is_burnt_into_the_scan_is_burnt_into_its_picture(tmp_path):
    picture = Settings(("picture",), methods=("grad-cam",))
    said = []
    for name in ("YES", "NO"):
        case = case_of(tmp_path, Series(BurnedInAnnotation=name), name=name.lower())
        (file,) = export_case(case, tmp_path / "out", picture).files
        said.append(pydicom.dcmread(file).BurnedInAnnotation)
    assert said == ["YES", "NO"]


def test_a_map_says_what_it_is(exported):
    case, files = exported("axial")
    grad_cam = pydicom.dcmread(files["grad-cam_class-1_map"])
    assert grad_cam.Modality == "OT"
    assert grad_cam.ContentDescription == "logit of class 1; layer block3"
    assert grad_cam.ContentQualification == "RESEARCH"
    assert grad_cam.DeviceSerialNumber == "ab" * 32
    shared = grad_cam.SharedFunctionalGroupsSequence[0]
    mapping = shared.RealWorldValueMappingSequence[0]
    unit = mapping.MeasurementUnitsCodeSequence[0]
    assert (unit.get("CodeValue"), unit.CodeMeaning) == ("{logit_per_cell}", "logit per cell")
    assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1, 0)
    values = overlay(case).array
    assert mapping.DoubleFloatRealWorldValueLastValueMapped == values.max()
    quantity = mapping.QuantityDefinitionSequence[0].ConceptCodeSequence[0]
    assert (quantity.CodeValue, quantity.CodeMeaning) == ("130403", "Gradient-weighted class activation")
    window = shared.FrameVOILUTSequence[0]
    assert window.WindowWidth == pytest.approx(float(values.max()))
    assert grad_cam.RecognizableVisualFeatures == "NO"
    # Made on the input's voxels it may trace a face; and a signed map's window is centred on zero.
    signed = pydicom.dcmread(files["input-gradient_class-1_map"])
    assert signed.RecognizableVisualFeatures == "YES"
    assert signed.SharedFunctionalGroupsSequence[0].FrameVOILUTSequence[0].WindowCenter == 0
    assert signed.pixel_array.min() < 0
    # An empty map has no region.
    assert "layer-cam_class-1_map" in files
    assert "layer-cam_class-1_region" not in files


def test_a_region_says_by_what_threshold_and_algorithm(tmp_path):
    case = case_of(tmp_path, Series())
    settings = replace(REGION, threshold=Threshold(3.0, "volume"))
    (file,) = export_case(case, tmp_path / "out", settings).files
    read = pydicom.dcmread(file)
    (segment,) = read.SegmentSequence
    algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
    assert (segment.SegmentAlgorithmType, algorithm.AlgorithmName) == ("AUTOMATIC", "volsal grad-cam")
    voxel_ml = 2.0 * 1.5 * 3.0 / 1000
    ml = read.pixel_array.sum() * voxel_ml
    assert ml == pytest.approx(3.0, abs=0.2)
    assert f"{ml:.3g} ml" in segment.SegmentDescription
    values = overlay(case).array
    least = np.sort(values.ravel())[-round(3.0 / voxel_ml)]
    assert f"{least:.4g} logit per cell (the highest 3 ml)" in segment.SegmentDescription
    assert f"threshold={least:.4g} logit per cell (the highest 3 ml)" in algorithm.AlgorithmParameters
    assert segment.SegmentLabel == f"grad-cam class-1 >= {least:.4g} logit per cell"
    record = json.loads((tmp_path / "out/case/dicom.json").read_text())["files"][0]
    assert (record["from"], record["ml"]) == (pytest.approx(float(least)), pytest.approx(ml))


def test_a_picture_shows_the_patients_right_on_the_left(exported, tmp_path):
    case, _ = exported("axial")
    (file,) = export_case(case, tmp_path, Settings(("picture",), methods=("grad-cam",))).files
    read = pydicom.dcmread(file)
    assert (read.SOPClassUID.name, read.ConversionType) == ("Secondary Capture Image Storage", "SYN")
    assert (read.BurnedInAnnotation, read.RecognizableVisualFeatures) == ("NO", "YES")
    assert not read.PatientOrientation
    picture = read.pixel_array.astype(int)
    assert picture.shape[2] == 3
    # The ball lies on the patient's right: in the axial panel, the first of the three, left of its middle.
    dark = (picture.max(axis=2) < 250).sum(axis=0) > picture.shape[0] // 2
    first = np.flatnonzero(dark)[0]
    width = np.flatnonzero(~dark[first:])[0]
    axial = picture[:, first : first + width]
    coloured = np.ptp(axial, axis=2) > 80
    assert coloured.sum() > 500
    assert np.nonzero(coloured)[1].mean() < 0.45 * width


@pytest.fixture
def dciodvfy():
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed (scripts/system-packages names dicom3tools)")


@pytest.mark.parametrize(
    ("name", "how", "identifiers"),
    [("oblique", "write", "none"), ("axial", "write", "source"), ("descending", "write_enhanced", "source")],
)
@pytest.mark.usefixtures("dciodvfy")
def test_dciodvfy_finds_no_error(exported, tmp_path, name, how, identifiers):
    case, files = exported(name, how, identifiers)
    picture = Settings(("picture",), identifiers=identifiers, methods=("grad-cam",))
    assert len(files) == (5 if name == "axial" else 2)
    for file in (*files.values(), *export_case(case, tmp_path, picture).files):
        assert errors_of(file) == []


def errors_of(file):
    done = subprocess.run(["dciodvfy", "-new", str(file)], capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).splitlines()
    assert any(one in "".join(said) for one in ("ParametricMap", "Segmentation", "SCImage"))
    return [text for text in said if text.startswith("Error")]


@pytest.mark.usefixtures("dciodvfy")
def test_dciodvfy_would_find_an_error(exported, tmp_path):
    read = pydicom.dcmread(exported("axial")[1]["grad-cam_class-1_map"])
    del read.ContentLabel
    read.save_as(tmp_path / "faulty.dcm")
    assert any("ContentLabel" in text for text in errors_of(tmp_path / "faulty.dcm"))


# Scans that were converted before they were explained


def converted(tmp_path, series, codes="LAS", change=lambda array: array):
    """A run of one NIfTI that holds the series' voxels, stored the other way round, and the series' folder."""
    folder = series.write(tmp_path / "dicom")
    scan = read_scan(folder)
    image = nib.Nifti1Image(change(scan.array), scan.grid.affine)
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(scan.grid.affine), nib.orientations.axcodes2ornt(codes)
    )
    image = image.as_reoriented(turn)
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    image.header.set_xyzt_units("mm")
    nib.save(image, tmp_path / "scan.nii.gz")
    add_case(tmp_path / "run", "case", tmp_path / "scan.nii.gz")
    return tmp_path / "run" / "case", folder


def test_a_converted_scans_maps_go_back_onto_its_series(tmp_path):
    case, folder = converted(tmp_path, Series(axes=oblique(24)), codes="PSR")
    assert overlay(case).grid.orientation == "PSR"
    (file,) = export_case(case, tmp_path / "out", with_identifiers(MAP), source=folder).files
    points, values = every_voxel(overlay(case))
    own = read_scan(file)
    assert own.grid.distance_mm(read_scan(folder).grid) < 0.001
    assert np.array_equal(at_world(own.grid.affine, own.array, points), values)
    assert pydicom.dcmread(file).PatientID == SECRETS["PatientID"]


def test_another_patients_series_with_the_same_geometry_is_refused(tmp_path):
    def of_another(array):
        return array + 80 * np.random.default_rng(0).standard_normal(array.shape).astype(np.float32)

    case, folder = converted(tmp_path, Series(), change=of_another)
    with pytest.raises(DicomOutError, match=r"its voxels are not those of .*scan.nii.gz.* another scan"):
        export_case(case, tmp_path / "out", MAP, source=folder)
    assert not (tmp_path / "out").exists()


def test_a_series_with_other_voxels_is_refused(tmp_path):
    case, _ = converted(tmp_path, Series())
    moved = Series()
    moved.positions = [at + np.array((0.4, 0, 0)) for at in moved.positions]
    for number, other in enumerate((moved, Series(slices=11))):
        with pytest.raises(DicomOutError, match="not the same voxels; name the series"):
            export_case(case, tmp_path / "out", MAP, source=other.write(tmp_path / f"other{number}"))


# Refusals


def test_refuses_what_has_no_series(tmp_path):
    case, folder = converted(tmp_path, Series())
    with pytest.raises(DicomOutError, match=r"scan.nii.gz, is not DICOM.*--source"):
        export_case(case, tmp_path / "out", MAP)
    (tmp_path / "scan.nii.gz").unlink()
    with pytest.raises(DicomOutError, match=r"scan.nii.gz, is not there; say where with --source"):
        export_case(case, tmp_path / "out", MAP)
    # Without it nobody can tell whether the series is the scan's.
    with pytest.raises(DicomOutError, match="not the files that were explained"):
        export_case(case, tmp_path / "out", MAP, source=folder)
    assert not (tmp_path / "out").exists()


def test_a_series_that_has_moved_is_found_again_and_one_that_has_changed_is_refused(tmp_path):
    case = case_of(tmp_path, Series())
    (tmp_path / "scans/case").rename(tmp_path / "moved")
    with pytest.raises(DicomOutError, match="is not there; say where"):
        export_case(case, tmp_path / "out", MAP)
    (file,) = export_case(case, tmp_path / "out", MAP, source=tmp_path / "moved").files
    assert np.array_equal(read_scan(file).array, overlay(case).array)
    changed = next((tmp_path / "moved").iterdir())
    read = pydicom.dcmread(changed)
    read.PixelData = bytes(len(read.PixelData))
    read.save_as(changed)
    with pytest.raises(DicomOutError, match="not the files that were explained"):
        export_case(case, tmp_path / "out2", MAP, source=tmp_path / "moved")


def test_slices_that_lie_unevenly_are_refused(tmp_path):
    series = Series()
    series.positions[-1] = series.positions[-1] + np.array((0, 0, 1.5))
    folder = series.write(tmp_path / "uneven")
    scan = read_scan(folder, slices="resample")
    nib.save(nib.Nifti1Image(scan.array, scan.grid.affine), tmp_path / "scan.nii")
    add_case(tmp_path / "run", "case", tmp_path / "scan.nii")
    with pytest.raises(DicomOutError, match="its slices lie unevenly"):
        export_case(tmp_path / "run/case", tmp_path / "out", MAP, source=folder)


def test_a_map_that_is_not_the_one_written_is_refused(tmp_path):
    case = case_of(tmp_path, Series())
    file = case / "case_grad-cam_class-1.nii.gz"
    shutil.copy(case / "case_layer-cam_class-1.nii.gz", file)
    with pytest.raises(DicomOutError, match="not the map that the record tells of"):
        export_case(case, tmp_path / "out", MAP)


def test_refuses_settings_that_mean_nothing(exported, tmp_path):
    case, _ = exported("axial")
    with pytest.raises(DicomOutError, match="what to write is map, region, picture, or some of these; not mesh"):
        Settings(("map", "mesh"))
    with pytest.raises(DicomOutError, match="identifiers is 'none' or 'source', not 'all'"):
        Settings(identifiers="all")
    with pytest.raises(DicomOutError, match="no map of score-cam; there are grad-cam, input-gradient, layer-cam"):
        export_case(case, tmp_path / "out", Settings(methods=("score-cam",)))
    with pytest.raises(DicomOutError, match=r"no case\.json that volsal wrote"):
        export_case(tmp_path, tmp_path / "out")
    with pytest.raises(ScanError, match="no series '9'"):
        export_case(case, tmp_path / "out", series="9")


def test_a_header_that_cannot_be_taken_over_is_refused_without_quoting_it(tmp_path):
    case = case_of(tmp_path, Series(PatientSex="ZZ"))
    with pytest.raises(DicomOutError, match="leave it out with --identifiers none") as refused:
        export_case(case, tmp_path / "out", with_identifiers(MAP))
    assert "ZZ" not in str(refused.value)
    assert len(export_case(case, tmp_path / "out", MAP).files) == 1


def test_a_source_without_uids_is_refused_where_they_are_to_be_kept(tmp_path):
    series = Series()
    series.study = ""
    case = case_of(tmp_path, series)
    with pytest.raises(DicomOutError, match=r"has no UID.*--identifiers none"):
        export_case(case, tmp_path / "out", with_identifiers(MAP))
    (file,) = export_case(case, tmp_path / "out", MAP).files
    made_up = pydicom.dcmread(file).StudyInstanceUID
    assert made_up.startswith("2.25.")
    other = Series()
    other.study = ""
    add_case(tmp_path / "run", "other", other.write(tmp_path / "scans/other"))
    (file,) = export_case(tmp_path / "run/other", tmp_path / "out", MAP).files
    assert pydicom.dcmread(file).StudyInstanceUID != made_up


@pytest.mark.parametrize("kind", ["map", "region"])
def test_a_file_that_holds_other_values_or_lies_elsewhere_is_noticed(exported, tmp_path, kind):
    case, files = exported("axial")
    file = files[f"grad-cam_class-1_{kind}"]
    source = Source.read(case.parents[1] / "scans/case", None, "none", b"salt")
    values = source.onto(overlay(case).array, overlay(case).grid)
    frames = values if kind == "map" else values >= np.float32(0.5) * values.max()
    _verify(file, file, source, frames)
    with pytest.raises(WriteError, match="not the ones written"):
        _verify(file, file, source, frames[::-1])
    read = pydicom.dcmread(file)
    read.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence[0].ImagePositionPatient[2] += 0.5
    read.save_as(tmp_path / "moved.dcm")
    with pytest.raises(DicomOutError, match="do not lie on the source's slices"):
        _verify(file, tmp_path / "moved.dcm", source, frames)


def test_says_in_one_line_what_to_install(tmp_path, monkeypatch):
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "highdicom" else real(name))
    answer = CliRunner().invoke(app, ["dicom", str(tmp_path)])
    assert answer.exit_code == 2
    assert answer.output.strip() == 'volsal: writing DICOM needs highdicom: pip install "volsal[dicom]"'


def test_asking_loads_no_highdicom():
    code = "import sys, volsal.dicom_out; assert not {'highdicom', 'matplotlib', 'napari'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Thresholds, and small things


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("50%", 4.0),
        ("100%", 8.0),
        ("3.5", 3.5),
        ("8", 8.0),
        ("9", None),
        ("0.004ml", 7.0),
        ("4ml", 1.0),
        ("1e-3", 0.001),
    ],
)
def test_thresholds_mean_what_they_say(text, value):
    values = np.arange(-4, 9, dtype=np.float32)[:, None, None] * np.ones((1, 1, 1), np.float32)
    grid = Grid(values.shape, np.diag([2.0, 1.0, 1.0, 1.0]))  # 0.002 ml a voxel
    assert Threshold.parse(text).value(values, grid) == (None if value is None else pytest.approx(value))
    assert Threshold.parse(text).value(-abs(values), grid) is None


@pytest.mark.parametrize("text", ["", "half", "0%", "120%", "-1", "nan", "3mm", "1.2.3", "0"])
def test_refuses_other_thresholds(text):
    with pytest.raises(ValueError, match=f"threshold {text!r}: expected a share of the largest value"):
        Threshold.parse(text)


@pytest.mark.parametrize(("number", "kind"), [(0, "value"), (-1, "value"), (120, "share"), (float("nan"), "volume")])
def test_a_threshold_made_in_python_is_one_too(number, kind):
    with pytest.raises(ValueError, match="expected a share of the largest value"):
        Threshold(number, kind)


def test_lines_fit_into_dicom():
    assert line("a\\b\n c") == "a/b c"
    assert line("x" * 70) == "x" * 61 + "..."
    assert len(line("y " * 40)) <= 64


# The command


def test_the_command_writes_a_run_and_names_what_failed(tmp_path):
    case_of(tmp_path, Series(), name="one")
    case_of(tmp_path, Series(axes=oblique(24)), name="two")
    case_of(tmp_path, Series(), name="gone")
    shutil.rmtree(tmp_path / "scans/gone")
    run = str(tmp_path / "run")
    answer = CliRunner().invoke(
        app, ["dicom", run, "--what", "map,region", "--method", "grad-cam", "--threshold", "30%"]
    )
    assert answer.exit_code == 1
    assert "4 files of 2 cases written to" in answer.output
    assert "1 of 3 cases have no DICOM" in answer.output
    assert "gone" in answer.output
    assert "--identifiers source" in answer.output
    written = sorted(path.relative_to(tmp_path / "run/dicom").as_posix() for path in tmp_path.glob("run/dicom/*/*.dcm"))
    assert written == [
        f"{case}/{case}_grad-cam_class-1_{kind}.dcm" for case in ("one", "two") for kind in ("map", "region")
    ]
    alone = CliRunner().invoke(app, ["dicom", f"{run}/gone", "-o", str(tmp_path / "x")])
    assert (alone.exit_code, len(alone.output.strip().splitlines())) == (2, 1)
    back = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "scans/one", back / "one")
    settings = ["--identifiers", "source", "--what", "map", "-m", "grad-cam", "-o", str(tmp_path / "y")]
    again = CliRunner().invoke(app, ["dicom", f"{run}/one", "--source", str(back / "one"), *settings])
    assert again.exit_code == 0
    assert "--identifiers" not in again.output
    (file,) = (tmp_path / "y/one").glob("*.dcm")
    assert pydicom.dcmread(file).PatientID == SECRETS["PatientID"]


def test_the_command_refuses_a_folder_that_is_no_run(tmp_path):
    answer = CliRunner().invoke(app, ["dicom", str(tmp_path)])
    assert answer.exit_code == 2
    assert "neither a case folder nor a run" in answer.output
    with pytest.raises(DicomOutError):
        case_folders(tmp_path / "nothing")


def test_a_series_under_a_pseudonym_is_found_among_others(tmp_path):
    series = Series()
    folder = series.write(tmp_path / "scans")
    for path in Series(rows=18).write(tmp_path / "other").iterdir():
        path.rename(folder / f"other_{path.name}")
    run = RunFolder(tmp_path / "run")
    from volsal.explanation import Explanation, Prediction

    scan = read_scan(folder, series=series.uid)
    said = Explanation("case", scan, Prediction((1.0,), 0, None), tuple(maps_of(scan.grid)), (), {"started": None})
    said.pseudonymous(run.salt()).save(run.path)
    (file,) = export_case(run / "case", tmp_path / "out", with_identifiers(MAP)).files
    assert pydicom.dcmread(file).ReferencedSeriesSequence[0].SeriesInstanceUID == series.uid


@pytest.mark.usefixtures("dciodvfy")
def test_a_real_series_takes_its_map(shared, tmp_path):
    with tarfile.open(shared("scans/mr_series.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    add_case(tmp_path / "run", "case", tmp_path / "mr_series")
    case = tmp_path / "run/case"
    settings = Settings(("map", "region"), identifiers="source", methods=("grad-cam",))
    files = export_case(case, tmp_path / "out", settings).files
    assert [errors_of(file) for file in files] == [[], []]
    own = read_scan(files[0])
    assert own.grid.distance_mm(overlay(case).grid) < 0.001
    assert np.array_equal(own.array, overlay(case).array)
    header = pydicom.dcmread(next((tmp_path / "mr_series").iterdir()), stop_before_pixels=True)
    for file in files:
        read = pydicom.dcmread(file)
        assert (read.PatientID, read.StudyInstanceUID) == (header.PatientID, header.StudyInstanceUID)
        assert read.FrameOfReferenceUID == header.FrameOfReferenceUID
