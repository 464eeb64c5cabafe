import json
import os
from pathlib import Path

import pytest

from volsal.scans import ScanError
from volsal.scans.find import Case, case_id, gather, in_order, look, pseudonym, without_uids


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


def names(folder, **options):
    return [path.relative_to(folder).as_posix() for path in look(folder, **options).scans]


def ids_of(paths, folder):
    return {case.paths[0]: name for name, case in gather(paths, folder).cases.items()}


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
    ids = ids_of(paths, tmp_path)
    assert len(set(ids.values())) == 5
    assert ids[tmp_path / "c.nii"] == "c"
    assert ids == ids_of(paths[::-1], tmp_path)


def test_channels_are_put_in_the_model_s_order():
    given = [Path("s1_ce_t1.nii.gz"), Path("s1_flair.nii"), Path("s1_t1.nii.gz")]
    assert in_order(given, ["_flair", "_t1", "_ce_t1"]) == [given[1], given[2], given[0]]
    for wrong in (given[:2], [given[0], given[1], given[1]], [given[0], given[1], Path("s1_t2.nii")]):
        with pytest.raises(ScanError, match="_flair, _t1, _ce_t1"):
            in_order(wrong, ["_flair", "_t1", "_ce_t1"])


@pytest.mark.parametrize("name", ["run.json", "inputs.json", "cases.csv", "cases.parquet", "run.log.jsonl", "CON"])
def test_no_case_is_called_like_what_a_run_folder_holds(name):
    reserved = name.lower()
    assert case_id(Path(f"{name}.nii.gz")).startswith(f"{reserved}-")
    assert not case_id(Path(f".{name}.nii")).startswith(".")
    assert case_id(Path(f"{name}2.nii")) == f"{reserved}2"


def test_an_id_with_its_hash_is_no_other_case_s_id(tmp_path):
    twins = [tmp_path / "a.nii", tmp_path / "a.nii.gz"]
    hashed = ids_of(twins, tmp_path)[twins[0]]
    paths = [*twins, tmp_path / f"{hashed}.nii"]
    assert len(set(ids_of(paths, tmp_path).values())) == 3


def test_what_is_passed_over_is_counted_by_what_it_is(tmp_path):
    make(tmp_path, "a.nii", "b.seg.nrrd", "r/case.json", "r/x.nii", "s/t.nii")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = look(tmp_path, "a*")
    assert [path.name for path in found.scans] == ["a.nii"]
    assert sorted(found.passed_over.values()) == [1, 1, 1, 1]


def test_a_folder_that_cannot_be_read_is_counted(tmp_path, monkeypatch):
    make(tmp_path, "a.nii", "b/c.nii")
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "b":
            raise PermissionError(13, "no", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = look(tmp_path)
    assert [path.name for path in found.scans] == ["a.nii"]
    assert found.passed_over == {"folders that cannot be read": 1}


def test_a_pseudonym_is_that_of_hmac():
    # RFC 4231, test case 2: key "Jefe".
    assert pseudonym("what do ya want for nothing?", b"Jefe") == "5bdcc146bf60"
    assert pseudonym("1.2.840", b"a" * 16) != pseudonym("1.2.840", b"b" * 16)
    assert len(pseudonym("M\udcfcller", b"a")) == 12


def test_uids_in_a_text_give_way_to_their_pseudonyms():
    uid, salt = "1.2.840.113619.2.55.3.604688", b"salt"
    text = f"torch 2.10.0 at 10.0.0.1: {uid}.dcm of series 2: {uid}, {uid}0; 1.2.3"
    name, longer = pseudonym(uid, salt), pseudonym(f"{uid}0", salt)
    assert without_uids(text, salt) == f"torch 2.10.0 at 10.0.0.1: {name}.dcm of series 2: {name}, {longer}; 1.2.3"


def test_a_link_to_itself_can_be_told(tmp_path):
    (tmp_path / "a.nii").symlink_to(tmp_path / "a.nii")
    (path,) = look(tmp_path).scans
    assert Case("a", (path,)).describe()["paths"] == [f"{tmp_path}/a.nii"]


def test_a_case_as_plain_data(tmp_path):
    case = Case("p", (tmp_path / "x\udcff.nii",), label="a", masks={"m": tmp_path / "m"}, given={"a": (1.0,)})
    assert json.loads(json.dumps(case.describe())) == {
        "paths": [f"{tmp_path}/x\\xff.nii"],
        "fault": None,
        "label": "a",
        "masks": {"m": f"{tmp_path}/m"},
        "groups": {},
        "given": {"a": [1.0]},
    }
