"""What a run would do, from files whose sizes are known by construction."""

import json
import os

import nibabel as nib
import numpy as np
import pytest

from volsal.batch.cases import Cases
from volsal.batch.plan import header_voxels, plan
from volsal.errors import VolsalError
from volsal.scans.find import Case


@pytest.fixture
def cases(tmp_path):
    """A function that makes cases of files of the sizes given, in bytes, named in order of their letters."""

    def make(sizes, **changes):
        found = {}
        for name, size in sizes.items():
            path = tmp_path / f"{name}.nii"
            path.write_bytes(bytes(size))
            found[name] = Case(name, (path,), **changes.get(name, {}))
        return Cases(found, "below data", tmp_path, ("a note",))

    return make


def made(found, tmp_path, **options):
    return plan(found, tmp_path / "out", **{"maps": 2} | options)


def test_everything_is_counted_and_named(cases, tmp_path):
    gone = tmp_path / "gone.nii"
    found = cases(
        {"a": 100, "b": 200, "c": 300},
        a={"label": "x", "groups": {"site": "Ulm"}, "masks": {"lesion": gone}},
        b={"label": "x", "fault": "it is broken"},
        c={"groups": {"site": "Ulm"}, "given": {"pet": gone, "age": (1.0,)}},
    )
    result = made(found, tmp_path)
    assert (result.cases, result.bytes, result.notes) == (3, 600, ("a note",))
    assert result.faults == {"b": "it is broken"}
    assert result.missing == {"a": (str(gone),), "c": (str(gone),)}
    assert result.labels == {"": 1, "x": 2}
    assert result.groups == {"site": {"": 1, "Ulm": 2}}
    assert result.voxels is result.result_bytes is result.seconds is None
    text = "\n".join(result.lines())
    for words in (
        "3 cases below data",
        "1 cannot be explained\n  b: it is broken",
        "2 more name files that are not there: a: ",
        "label: (none) 1, x 2",
        "site: (none) 1, Ulm 2",
        "scans: 600 bytes",
        "2 maps per case; their size is not known",
    ):
        assert words in text
    assert json.loads(json.dumps(result.describe()))["faults"] == {"b": "it is broken"}


def test_a_plan_writes_nothing(cases, tmp_path):
    found = cases({"a": 1})
    before = sorted(tmp_path.rglob("*"))
    made(found, tmp_path).lines()
    assert sorted(tmp_path.rglob("*")) == before


def test_the_same_file_by_any_name(cases, tmp_path):
    found = cases(dict.fromkeys("abcde", 10))
    for link, name, how in ((tmp_path / "b.nii", "a", os.symlink), (tmp_path / "d.nii", "c", os.link)):
        link.unlink()
        how(tmp_path / f"{name}.nii", link)
    assert made(found, tmp_path).twice == (("a", "b"), ("c", "d"))
    assert "the same scan in several cases: a = b, c = d" in made(found, tmp_path).lines()


def image(path, shape, kind=nib.Nifti1Image):
    nib.save(kind(np.zeros(shape, np.uint8), np.eye(4)), path)
    return path


@pytest.mark.parametrize(
    ("name", "shape", "kind", "voxels"),
    [
        ("a.nii", (3, 4, 5), nib.Nifti1Image, 60),
        ("a.nii.gz", (3, 4, 5), nib.Nifti1Image, 60),
        ("a.nii.gz", (3, 4, 5), nib.Nifti2Image, 60),
        ("a.nii", (3, 4, 5, 6), nib.Nifti2Image, 60),
        ("a.hdr", (3, 4, 5), nib.Nifti1Pair, 60),
        ("a.nii", (3, 4), nib.Nifti1Image, 12),
    ],
)
def test_voxels_by_the_header(tmp_path, name, shape, kind, voxels):
    assert header_voxels(image(tmp_path / name, shape, kind)) == voxels


def test_voxels_of_the_other_byte_order(tmp_path):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_shape((3, 4, 5))
    nib.Nifti1Image(np.zeros((3, 4, 5)), np.eye(4), header).to_filename(tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes()[:4] == b"\0\0\1\x5c"
    assert header_voxels(tmp_path / "a.nii") == 60


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b", b"\x1f\x8bxxxxxxxxx", b"hello" * 100, bytes(400)])
def test_what_is_no_header(tmp_path, content):
    (tmp_path / "a.nii").write_bytes(content)
    assert header_voxels(tmp_path / "a.nii") is None
    assert header_voxels(tmp_path) is None
    assert header_voxels(tmp_path / "gone.nii") is None


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    paths = [tmp_path / "pipe.nii", tmp_path / "loop.nii", tmp_path / ("x" * 300)]
    result = made(Cases({path.name: Case(path.name, (path,)) for path in paths}, "", tmp_path), tmp_path)
    assert (result.voxels, result.bytes, len(result.missing)) == (None, 0, 2)


def test_the_space_of_the_results(tmp_path):
    paths = [image(tmp_path / f"{n}.nii.gz", (10, 10, n)) for n in (1, 2, 3)]
    paths.append(tmp_path / "dicom")  # as large as the others on average: 200 voxels
    paths[-1].mkdir()
    (paths[-1] / "slice").write_bytes(bytes(50))
    found = Cases({path.name: Case(path.name, (path,)) for path in paths}, "", tmp_path)
    result = made(found, tmp_path, maps=3, bytes_per_voxel=2)
    assert (result.voxels, result.headers_read) == (800, 3)
    assert result.result_bytes == 800 * 3 * 2
    assert result.bytes == sum(path.stat().st_size for path in paths[:3]) + 50
    free = os.statvfs(tmp_path)
    assert result.free_bytes == pytest.approx(free.f_bavail * free.f_frsize, rel=0.05)
    assert "at most 4.8 kB in all" in "\n".join(result.lines())
    assert "NOT ENOUGH" not in "\n".join(result.lines())
    assert "NOT ENOUGH" in "\n".join(made(found, tmp_path, bytes_per_voxel=1e15).lines())


def test_a_sample_stands_for_many(cases, tmp_path, monkeypatch):
    monkeypatch.setattr("volsal.batch.plan._HEADERS", 2)
    monkeypatch.setattr("volsal.batch.plan._FOLDERS", 2)
    paths = [image(tmp_path / f"{n}.nii", (10, 10, n)) for n in (1, 2, 3, 4)]
    folders = [tmp_path / f"dicom{n}" for n in range(4)]
    for n, folder in enumerate(folders):
        folder.mkdir()
        (folder / "slice").write_bytes(bytes(100 * n))
    found = Cases({path.name: Case(path.name, (path,)) for path in [*paths, *folders]}, "", tmp_path)
    result = made(found, tmp_path)
    assert (result.headers_read, result.voxels) == (2, 8 * 200)  # of the first and third: 100 and 300 voxels
    files = sum(path.stat().st_size for path in paths)
    assert (result.folders_measured, result.bytes) == (2, files + 0 + 100 + 200 + 100)  # mean of the first and third
    assert "(from 2 DICOM folders), 1,600 voxels (from 2 headers)" in result.lines()[1]


def test_time_grows_with_size_between_the_median_and_the_largest(cases, tmp_path):
    found = cases({"a": 10, "b": 20, "c": 30, "d": 100, "x": 1000}, x={"fault": "broken"})
    asked = []

    def time_case(case):
        asked.append(case.id)
        return 2 + case.paths[0].stat().st_size / 10

    result = made(found, tmp_path, time_case=time_case)
    assert asked == ["b", "d"]
    assert result.timed == {"b": 4.0, "d": 12.0}
    assert result.seconds == pytest.approx(3 + 4 + 5 + 12)
    assert result.lines()[-1] == "time: about 24 s with 1 worker; timed: b 4 s and d 12 s"
    assert made(found, tmp_path, time_case=time_case, workers=2).seconds == pytest.approx(12)
    # However many workers there are, the largest case takes its time.
    assert made(found, tmp_path, time_case=time_case, workers=8).seconds == pytest.approx(12)


@pytest.mark.parametrize(
    ("sizes", "seconds", "expected"),
    [
        ({"a": 10}, {"a": 4}, 4),
        ({"a": 10, "b": 10, "c": 10}, {"b": 4, "c": 4}, 12),
        ({"a": 10, "b": 20, "c": 30}, {"b": 6, "c": 4}, 18),  # the larger one was faster: all as the slower
        ({"a": 10, "b": 20, "c": 30}, {"b": 1, "c": 4}, 5),  # the line is below nothing at the smallest
    ],
)
def test_odd_times(cases, tmp_path, sizes, seconds, expected):
    result = made(cases(sizes), tmp_path, time_case=lambda case: seconds[case.id])
    assert result.seconds == pytest.approx(expected)


def test_a_case_that_cannot_be_timed_is_told(cases, tmp_path):
    def time_case(case):
        if case.id == "c":
            raise VolsalError("too large")
        return 3.0

    result = made(cases({"a": 10, "b": 20, "c": 30}), tmp_path, time_case=time_case)
    assert result.untimed == {"c": "too large"}
    assert result.seconds == 9.0
    assert "c could not be timed: too large" in result.lines()
    nothing = made(cases({"a": 1}, a={"fault": "x"}), tmp_path, time_case=time_case)
    assert nothing.seconds is None


def test_long_lists_are_cut_for_people_and_whole_as_data(cases, tmp_path):
    names = [f"p{n:02}" for n in range(30)]
    result = made(cases(dict.fromkeys(names, 1), **{name: {"fault": "gone"} for name in names}), tmp_path)
    assert "  and 20 more" in result.lines()
    assert len(result.describe()["faults"]) == 30
