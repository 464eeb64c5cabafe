import json

import nibabel as nib
import numpy as np
import pytest
from made_runs import BLOB_MM, add_case, begin, grid_of, maps_of, write_scan

from volsal.plugin import files
from volsal.plugin.files import get_reader, read, write_layer
from volsal.scans.labels import read_labels
from volsal.viewer import ViewerError
from volsal.viewer.layers import as_stored, true_world

STORED = [("RAS", 0.0), ("LPS", 0.0), ("PSR", 0.0), ("ILA", 0.0), ("LAS", 16.5), ("SPL", -9.0)]
pytestmark = pytest.mark.filterwarnings("ignore")  # napari's own, on import


@pytest.fixture
def told(monkeypatch):
    said = []
    monkeypatch.setattr(files, "_tell", said.append)
    return said


@pytest.mark.parametrize(("codes", "degrees"), STORED)
def test_every_voxel_is_shown_with_its_value_at_its_place(tmp_path, told, codes, degrees):
    path = write_scan(tmp_path / "scan.nii.gz", grid_of(codes, degrees))
    ((data, arguments, kind),) = get_reader(str(path))(str(path))
    image = nib.load(path)
    assert (kind, arguments["name"], arguments["units"]) == ("image", "scan.nii.gz", ("mm",) * 3)
    index = np.stack(np.meshgrid(*map(np.arange, data.shape), indexing="ij"), axis=-1)
    at = true_world(arguments["metadata"], index * arguments["scale"] + np.array(arguments["translate"]))
    voxel = nib.affines.apply_affine(np.linalg.inv(image.affine), at)
    np.testing.assert_allclose(voxel, np.round(voxel), atol=1e-4)
    np.testing.assert_array_equal(data, np.asarray(image.dataobj)[tuple(np.round(voxel).astype(int).T)].T)
    assert bool(told) == bool(degrees)  # that planes are tilted is said, and nothing else
    assert all("tilted" in words for words in told)


@pytest.mark.parametrize(("codes", "degrees"), STORED)
def test_a_map_goes_back_into_the_file_it_came_from(tmp_path, told, codes, degrees):
    scan = write_scan(tmp_path / "scan.nii.gz", grid_of(codes, degrees))
    add_case(tmp_path / "run", "aa", scan)
    home = tmp_path / "run" / "aa"
    maps = {layer[1]["name"]: layer for layer in read(str(home)) if layer[1]["metadata"]["kind"] == "map"}
    data, arguments, _ = maps["input-gradient · class-1"]
    out = str(tmp_path / "out.nii.gz")
    assert write_layer(out, data, arguments) == [out]
    before, after = nib.load(home / "aa_input-gradient_class-1.nii.gz"), nib.load(out)
    np.testing.assert_array_equal(np.asarray(after.dataobj), np.asarray(before.dataobj))
    for name in (
        "srow_x",
        "srow_y",
        "srow_z",
        "qoffset_x",
        "quatern_b",
        "pixdim",
        "sform_code",
        "xyzt_units",
        "cal_max",
    ):
        np.testing.assert_array_equal(after.header[name], before.header[name])
    ((again, shown, _),) = read(out)  # alone, it is known for a map with its unit
    np.testing.assert_array_equal(again, data)
    assert (shown["metadata"]["unit"], shown["metadata"]["signed"]) == ("logit per cell", True)


def test_a_layer_that_is_no_map_or_was_cut_is_not_written(tmp_path, told):
    add_case(tmp_path / "run", "aa", write_scan(tmp_path / "scan.nii.gz", grid_of()))
    scan, *_, (data, arguments, _) = read(str(tmp_path / "run" / "aa"))
    out = tmp_path / "out.nii.gz"
    with pytest.raises(ViewerError, match="only a map"):
        write_layer(str(out), *scan[:2])
    with pytest.raises(ViewerError, match="has shape"):
        write_layer(str(out), data[1:], arguments)
    with pytest.raises(ViewerError, match="NaN"):
        write_layer(str(out), np.full_like(data, np.nan), arguments)
    assert not out.exists()


def test_a_case_comes_with_masks_and_a_run_with_its_first_whole_case(tmp_path, told):
    grid = grid_of("PSR", 8.0)
    scan = write_scan(tmp_path / "scan.nii.gz", grid)
    mask = np.zeros(grid.shape, np.uint8)
    mask[tuple(np.round(grid.voxel(BLOB_MM)).astype(int))] = 7
    nib.save(nib.Nifti1Image(mask, grid.affine), tmp_path / "mask.nii.gz")
    run = begin(tmp_path / "run", {"none": {}, "aa": {"masks": {"lesion": str(tmp_path / "mask.nii.gz")}}})
    add_case(run.path, "aa", scan)
    for path in (run.path, run / "aa", run / "aa" / "case.json"):
        layers = get_reader(str(path))(str(path))
        assert [(kind, arguments["metadata"]["kind"]) for _, arguments, kind in layers] == [
            ("image", "scan"), *[("image", "map")] * 3, ("labels", "mask"),
        ]  # fmt: skip
        assert [arguments["name"] for _, arguments, _ in layers if arguments.get("visible")] == ["grad-cam · class-1"]
        np.testing.assert_array_equal(as_stored(layers[-1][0], grid), read_labels(tmp_path / "mask.nii.gz", grid))
    assert any("Audit browser" in words for words in told)


def test_maps_whose_scan_has_been_moved_away_are_shown_and_it_is_said(run, told):
    layers = read(str(run / "dd"))
    assert [arguments["metadata"]["kind"] for _, arguments, _ in layers] == ["map"] * 3
    assert any("moved.nii.gz is not there any more" in words for words in told)
    blob = maps_of(grid_of("RAS", 12.0), 5.0)[0].values
    np.testing.assert_allclose(as_stored(layers[-1][0], grid_of("RAS", 12.0)), blob, atol=1e-5)


def test_a_scan_that_has_changed_since_is_said(run, told, tmp_path):
    write_scan(tmp_path / "scan.nii.gz", grid_of("LPS"), seed=1)
    read(str(run / "aa"))
    assert any("has changed" in words for words in told)


def test_a_folder_that_is_nothing_is_left_to_other_readers(tmp_path):
    (tmp_path / "notes.txt").write_text("words")
    assert get_reader(str(tmp_path)) is None


def test_a_run_without_results_and_a_damaged_record_are_told_in_one_line(tmp_path, told):
    run = begin(tmp_path / "run", {"aa": {}})
    with pytest.raises(ViewerError, match="no case of this run has a result yet"):
        read(str(run.path))
    (run / "aa").mkdir()
    (run / "aa" / "case.json").write_text(json.dumps({"scan": {"path": 3}, "maps": []}))
    with pytest.raises(ViewerError, match="not as volsal writes it") as caught:
        read(str(run / "aa"))
    assert "\n" not in str(caught.value)
