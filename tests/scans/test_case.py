import nibabel as nib
import numpy as np
import pytest

from volsal.resampling import resample
from volsal.scans import Scan, ScanError, read_case, read_scan
from volsal.scans.find import gather, look

AFFINE = np.array([[-2.0, 0, 0, 30], [0, 0, 2.5, -20], [0, 1.5, 0, 10], [0, 0, 0, 1]])


def moved(mm):
    affine = AFFINE.copy()
    affine[0, 3] += mm
    return affine


def test_several_files_are_the_channels_of_one_scan_in_their_order(scan_file):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(5, 6, 7)).astype(np.float32) for _ in range(3)]
    paths = [scan_file(f"{n}.nii.gz", array=a, affine=AFFINE, dtype=np.float32) for n, a in enumerate(arrays)]
    scan = read_case(paths)
    np.testing.assert_array_equal(scan.array, arrays[0])
    np.testing.assert_array_equal(scan.channels, np.stack(arrays))
    assert list(scan.paths) == paths
    assert [s.sha256 for s in (scan, *scan.further)] == [read_scan(p).sha256 for p in paths]
    assert scan.notes == ()


def test_one_file_is_one_channel_and_no_copy(scan_file):
    scan = read_case(scan_file())
    assert scan.further == ()
    assert scan.channels.shape == (1, *scan.array.shape)
    assert np.shares_memory(scan.channels, scan.array)


def test_a_small_difference_is_accepted_and_told_a_smaller_one_is_not_worth_a_word(scan_file):
    first = scan_file("a.nii", affine=AFFINE)
    assert read_case([first, scan_file("b.nii", affine=moved(5e-4))]).notes == ()
    scan = read_case([first, scan_file("b.nii", affine=moved(0.05))])
    assert scan.notes == ("channel 2: its corner voxels lie up to 0.05 mm from the first's, and count as the same",)
    assert scan.further[0].grid is scan.grid


def test_a_channel_that_lies_elsewhere_is_refused_with_the_distance_and_the_way_out(scan_file):
    first = scan_file("a.nii", affine=AFFINE)
    with pytest.raises(ScanError, match=r"channel 2 .*up to 3 mm from those of .*allowed: 0\.1.*pass --regrid"):
        read_case([first, scan_file("b.nii", affine=moved(3))])
    with pytest.raises(ScanError, match=r"channel 2 .*12 x 28 x 20 voxels .*24 x 28 x 20 voxels .*pass --regrid"):
        read_case([first, scan_file("b.nii", shape=(12, 28, 20), affine=AFFINE)])


def test_regrid_brings_it_there_in_one_step_and_says_so(scan_file, oblique):
    first = scan_file("a.nii", affine=AFFINE)
    other = scan_file("b.nii", shape=(30, 30, 12), affine=AFFINE @ np.diag([1.1, 0.9, 2, 1]))
    scan = read_case([first, other], regrid=True)
    alone = read_scan(other)
    np.testing.assert_array_equal(scan.channels[1], resample(alone.array, alone.grid, scan.grid))
    assert scan.further[0].sha256 == alone.sha256
    assert scan.notes[0].startswith("channel 2: brought from Grid(30 x 30 x 12 voxels")
    assert "field of view; the rest became 0" in scan.notes[1]


def test_regrid_does_not_join_what_does_not_overlap_or_has_no_place(scan_file):
    first = scan_file("a.nii", affine=AFFINE)
    with pytest.raises(ScanError, match=r"channel 2 covers 0% of the field of view .* another patient"):
        read_case([first, scan_file("b.nii", affine=moved(500))], regrid=True)
    image = nib.load(scan_file("b.nii", shape=(20, 28, 20)))
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, first.with_name("c.nii"))
    with pytest.raises(ScanError, match=r"c\.nii: states no orientation"):
        read_case([first, first.with_name("c.nii")], regrid=True)


def test_the_volumes_of_one_file_can_be_the_channels(scan_file):
    stack = np.stack([np.full((4, 5, 6), v) for v in (10, 20, 30)], axis=-1)
    path = scan_file(array=stack, shape=(4, 5, 6))
    scan = read_case(path, volume="all")
    assert scan.channels.mean(axis=(1, 2, 3)).tolist() == [10, 20, 30]
    assert [s.volume for s in (scan, *scan.further)] == [0, 1, 2]
    assert read_case(scan_file("three.nii"), volume="all").further == ()
    with pytest.raises(ScanError, match="2 files were given"):
        read_case([path, path], volume="all")
    with pytest.raises(ScanError, match="65 volumes as channels"):
        read_case(scan_file("t.nii", array=np.zeros((2, 2, 2, 65)), shape=(2, 2, 2)), volume="all")


def test_notes_say_whose_they_are(scan_file):
    first = scan_file("a.nii", affine=AFFINE)
    second = scan_file("b.nii", affine=AFFINE)
    second.write_bytes(second.read_bytes() + bytes(9))
    assert read_case([first, second]).notes[0].startswith("channel 2: the file holds 9 bytes more")


def test_a_scan_does_not_take_channels_that_lie_elsewhere():
    zeros = np.zeros((2, 3, 4), np.float32)
    other = Scan.from_array(zeros, np.diag([2.0, 1, 1, 1]))
    with pytest.raises(ScanError, match="not on the voxels of"):
        Scan(zeros, Scan.from_array(zeros, np.eye(4)).grid, further=(other,))


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


def gathered(folder, channels, pattern=None):
    return gather(look(folder, pattern).scans, folder, channels)


def test_names_that_are_alike_but_for_their_ending_are_one_case(tmp_path):
    make(tmp_path, "p1_t1.nii.gz", "p1_flair.nii", "x/p2_t1.nii", "x/p2_flair.nii.gz", "p1_seg.nii.gz")
    found = gathered(tmp_path, ["_flair", "_t1"])
    assert {name: [p.name for p in case.paths] for name, case in found.cases.items()} == {
        "p1": ["p1_flair.nii", "p1_t1.nii.gz"],
        "x-p2": ["p2_flair.nii.gz", "p2_t1.nii"],
    }
    assert sum(found.passed_over.values()) == 1
    assert not any(case.fault for case in found.cases.values())


def test_nnunets_numbers_and_endings_within_endings(tmp_path):
    make(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_t1.nii", "b_ce_t1.nii")
    assert list(gathered(tmp_path, ["_0000", "_0001"]).cases) == ["a"]
    cases = gathered(tmp_path, ["_t1", "_ce_t1"], "b*").cases
    assert [p.name for p in cases["b"].paths] == ["b_t1.nii", "b_ce_t1.nii"]


def test_a_case_that_lacks_a_channel_or_has_one_twice_is_kept_with_its_fault(tmp_path):
    make(tmp_path, "a_t1.nii", "b_t1.nii", "b_t1.nii.gz", "b_t2.nii")
    cases = gathered(tmp_path, ["_t1", "_t2"]).cases
    assert cases["a"].fault == "the case's channel _t2 is missing; the model needs all of them"
    assert cases["b"].fault == "b_t1.nii and b_t1.nii.gz are both the same channel of one case; keep one of them"
