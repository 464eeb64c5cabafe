from pathlib import Path

import pytest

from volsal.scans import ScanError
from volsal.scans.find import case_id, case_ids, find_scans, in_order


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


def names(folder, **options):
    return [path.relative_to(folder).as_posix() for path in find_scans(folder, **options)]


def test_finds_scans_in_name_order_and_leaves_the_rest(tmp_path):
    make(tmp_path, "b.nii.gz", "a/x.NII", "a/y.hdr", "a/y.img", "._b.nii.gz", ".cache/z.nii", "notes.txt")
    make(tmp_path, "out/case-1/case.json", "out/case-1/case-1_grad-cam_class-1.nii.gz")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert names(tmp_path) == ["b.nii.gz", "a/x.NII", "a/y.hdr"]


def test_a_pattern_is_matched_against_name_and_path(tmp_path):
    make(tmp_path, "s1/t1.nii.gz", "s1/t2.nii.gz", "s2/t1.nii.gz")
    assert names(tmp_path, pattern="t1*") == ["s1/t1.nii.gz", "s2/t1.nii.gz"]
    assert names(tmp_path, pattern="s1/*") == ["s1/t1.nii.gz", "s1/t2.nii.gz"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Case 01.nii.gz", "case-01"),
        ("sub-01/anat/sub-01_T1w.nii.gz", "sub-01-anat-sub-01_t1w"),
        ("/data/secret/Scan.nii", "scan"),
        ("Müller.nii", "muller"),
        ("a.b.nii.gz", "a.b"),
        ("-rf; $(ls).nii", "rf-ls"),
        ("../../etc/x.nii", "etc-x"),
        ('<b>"\n.nii', "b"),
    ],
)
def test_an_id_is_plain_text_and_never_a_path(path, expected):
    assert case_id(Path(path)) == expected


def test_a_name_of_which_nothing_is_left_or_too_much_gets_a_hash():
    assert len(case_id(Path("日本.nii"))) == 8
    assert len(case_id(Path("x" * 250 + ".nii"))) <= 96


def test_ids_are_unique_whatever_the_order(tmp_path):
    paths = [tmp_path / name for name in ("a.nii", "a.nii.gz", "A.nii", "b/a.nii", "c.nii")]
    ids = case_ids(paths, tmp_path)
    assert len(set(ids.values())) == 5
    assert ids[tmp_path / "c.nii"] == "c"
    assert ids == case_ids(paths[::-1], tmp_path)


def test_channels_are_put_in_the_model_s_order():
    given = [Path("s1_ce_t1.nii.gz"), Path("s1_flair.nii"), Path("s1_t1.nii.gz")]
    assert in_order(given, ["_flair", "_t1", "_ce_t1"]) == [given[1], given[2], given[0]]
    for wrong in (given[:2], [given[0], given[1], given[1]], [given[0], given[1], Path("s1_t2.nii")]):
        with pytest.raises(ScanError, match="_flair, _t1, _ce_t1"):
            in_order(wrong, ["_flair", "_t1", "_ce_t1"])
