"""Which cases a config names: every source, and what is known of the cases."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from volsal.audit.patients import patients_of
from volsal.batch.cases import cases_of
from volsal.config import ConfigError, load_config
from volsal.scans.find import Case


@pytest.fixture
def place(tmp_path):
    """A folder ``project`` with the config, beside the data."""
    (tmp_path / "project").mkdir()
    return tmp_path


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)


def found(place, **scans):
    path = place / "project" / "c.yaml"
    path.write_text(yaml.safe_dump({"model": {"factory": "x:y"}, "scans": scans}))
    return cases_of(load_config(path))


def files(cases, place):
    return {
        case.id: [path.resolve().relative_to(place.resolve()).as_posix() for path in case.paths]
        for case in cases.cases.values()
    }


class TestFolders:
    def test_every_scan_below_a_folder(self, place):
        make(place, "data/a/x.nii.gz", "data/b.mha", "data/notes.txt")
        assert files(found(place, folder="../data"), place) == {"b": ["data/b.mha"], "a-x": ["data/a/x.nii.gz"]}

    def test_what_is_passed_over_is_counted(self, place):
        make(place, "data/a.nii", "data/b_t1.nii", "data/out/c/case.json", "data/out/c/map.nii", "data/s.seg.nrrd")
        (place / "data" / "linked").symlink_to(place / "project")
        notes = found(place, folder="../data", pattern="a*").notes
        assert set(notes) == {
            "passed over: 1 scans not like a*",
            "passed over: 1 folders of volsal's own results",
            "passed over: 1 segmentations (.seg.nrrd)",
            "passed over: 1 links to folders, which are not followed",
        }

    def test_masks_that_lie_beside_the_scans(self, place):
        make(place, "data/p1.nii.gz", "data/p1_seg.nii.gz", "data/p2.nii.gz", "data/p3_seg.nii.gz")
        cases = found(place, folder="../data", masks={"lesion": "_seg"})
        assert files(cases, place) == {"p1": ["data/p1.nii.gz"], "p2": ["data/p2.nii.gz"]}
        assert [{n: m.name for n, m in c.masks.items()} for c in cases.cases.values()] == [
            {"lesion": "p1_seg.nii.gz"},
            {},
        ]
        assert cases.notes == ("passed over: 1 masks without a scan",)

    def test_masks_and_channels_together(self, place):
        make(place, *(f"data/p1_{end}.nii" for end in ("t1", "flair", "seg")), "data/p2_t1.nii", "data/p2_seg.nii")
        cases = found(place, folder="../data", channels=["_flair", "_t1"], masks={"lesion": "_seg"}).cases
        assert [path.name for path in cases["p1"].paths] == ["p1_flair.nii", "p1_t1.nii"]
        assert cases["p1"].masks["lesion"].name == "p1_seg.nii"
        assert "channel _flair is missing" in cases["p2"].fault

    def test_ten_thousand_files_are_as_many_cases(self, place):
        make(place, *(f"data/scan{n:05}.nii.gz" for n in range(10_000)))
        assert len(found(place, folder="../data").cases) == 10_000


class TestPatterns:
    def test_several_globs_from_the_configs_folder(self, place):
        make(
            place, "d/s1/t1.nii.gz", "d/s1/deep/t1.nii.gz", "d/s2/t1.nii", "d/s2/t1.txt", "d/.hidden/t1.nii", "e/x.mha"
        )
        cases = found(place, files=["../d/**/t1.*", "../e/*"])
        assert files(cases, place) == {
            "d-s1-deep-t1": ["d/s1/deep/t1.nii.gz"],
            "d-s1-t1": ["d/s1/t1.nii.gz"],
            "d-s2-t1": ["d/s2/t1.nii"],
            "e-x": ["e/x.mha"],
        }
        assert "passed over: 1 files whose names are not those of scans" in cases.notes[0]

    def test_a_pattern_alone_and_a_file_by_its_name(self, place):
        make(place, "d/a.nii", "d/b.nii")
        assert list(found(place, files="../d/*.nii").cases) == ["a", "b"]
        assert list(found(place, files=str(place / "d" / "b.nii")).cases) == ["b"]
        assert list(found(place, files="../d/**").cases) == ["a", "b"]

    def test_dicom_folders(self, place):
        make(place, "d/p1/ct/1.dcm", "d/p1/ct/2.dcm", "d/p2/notes.txt", "d/p3.nii")
        for name in "12":
            (place / "d" / "p1" / "ct" / f"{name}.dcm").write_bytes(bytes(128) + b"DICM")
        assert list(found(place, files="../d/**").cases) == ["p1-ct", "p3"]
        cases = found(place, files="../d/*/ct")
        assert files(cases, place) == {"p1-ct": ["d/p1/ct"]}
        with pytest.raises(
            ConfigError, match=r"2 files whose names are not those of scans .name the folder of a DICOM"
        ):
            found(place, files="../d/p1/ct/*.dcm")
        write(place / "t.csv", "id,scan\np,d/p1/ct\n")
        assert found(place, table="../t.csv").cases["p"].fault is None
        assert found(place, folder="../d").cases.keys() == {"p1-ct", "p3"}

    def test_a_file_that_two_patterns_name_is_one_case(self, place):
        make(place, "d/a.nii")
        assert len(found(place, files=["../d/*", "../d/a.nii"]).cases) == 1

    def test_links_are_not_followed_by_two_stars_nor_results_taken_for_scans(self, place):
        make(place, "d/a.nii", "d/out/p/case.json", "d/out/p/map.nii")
        (place / "d" / "loop").symlink_to(place / "d")
        assert list(found(place, files="../d/**/*.nii").cases) == ["a"]

    def test_channels(self, place):
        make(place, "d/p_t1.nii", "d/p_t2.nii")
        cases = found(place, files="../d/*", channels=["_t2", "_t1"])
        assert files(cases, place) == {"p": ["d/p_t2.nii", "d/p_t1.nii"]}

    def test_a_pattern_that_nothing_is_like_is_told(self, place):
        make(place, "d/a.nii")
        assert found(place, files=["../d/*.nii", "../d/*.mha"]).notes == (
            "passed over: 1 patterns that nothing is like (../d/*.mha)",
        )
        with pytest.raises(ConfigError, match=r"scans\.files: no scan like \.\./d/\*\.mha"):
            found(place, files="../d/*.mha")
        with pytest.raises(ConfigError, match="is no pattern of paths"):
            found(place, files="../d/**x/*.mha")


COHORT = """case,image,site,sex,label,lesion_mask,age
p1,scans/a.nii.gz,Bern,F,tumour,masks/a.nii.gz,61.5
P 2,scans/b.nii.gz,Ulm,,healthy,,48
"""


class TestTables:
    @pytest.fixture
    def cohort(self, place):
        make(place, "cohort/scans/a.nii.gz", "cohort/scans/b.nii.gz", "cohort/masks/a.nii.gz")
        write(place / "cohort" / "cases.csv", COHORT)
        return place

    def test_columns_of_usual_names_need_not_be_named(self, cohort):
        cases = found(cohort, table="../cohort/cases.csv").cases
        folder = cohort / "project" / ".." / "cohort"
        assert list(cases.values()) == [
            Case(
                "p1",
                (folder / "scans/a.nii.gz",),
                label="tumour",
                masks={"lesion": folder / "masks/a.nii.gz"},
                groups={"site": "Bern", "sex": "F"},
            ),
            Case("p-2", (folder / "scans/b.nii.gz",), label="healthy", groups={"site": "Ulm"}),
        ]

    def test_columns_that_the_config_names(self, cohort):
        columns = {
            "id": "image",
            "scan": "image",
            "label": "site",
            "groups": ["age"],
            "masks": {},
            "given": {"x": "age"},
        }
        cases = found(cohort, table="../cohort/cases.csv", columns=columns).cases
        assert list(cases) == ["scans-a", "scans-b"]
        assert [c.label for c in cases.values()] == ["Bern", "Ulm"]
        assert [dict(c.groups) for c in cases.values()] == [{"age": "61.5"}, {"age": "48"}]
        assert [c.given for c in cases.values()] == [{"x": (61.5,)}, {"x": (48.0,)}]

    @pytest.mark.parametrize(("column", "named"), [("Patient_ID", None), ("patient", None), ("mrn", "mrn")])
    def test_whose_scan_it_is_stays_with_the_case_alone(self, cohort, column, named):
        text = f"scan,{column},case\nscans/a.nii.gz,4711,one\nscans/b.nii.gz,4711,two\n"
        write(cohort / "cohort" / "cases.csv", text)
        cases = found(cohort, table="../cohort/cases.csv", columns={"patient": named} if named else {}).cases
        assert [(case.id, case.patient) for case in cases.values()] == [("one", "4711"), ("two", "4711")]
        assert "4711" not in str([case.describe() for case in cases.values()])
        assert len(set(patients_of(list(cases.values())).values())) == 1
        with pytest.raises(ConfigError, match=r"no column 'whose'"):
            found(cohort, table="../cohort/cases.csv", columns={"patient": "whose"})

    def test_paths_start_from_a_folder_where_one_is_given(self, cohort):
        text = COHORT.replace("scans/", "").replace("masks/", "../masks/")
        write(cohort / "cohort" / "cases.csv", text)
        cases = found(cohort, table="../cohort/cases.csv", folder="../cohort/scans")
        assert not any(case.fault for case in cases.cases.values())
        assert cases.notes == ()

    @pytest.mark.parametrize("how", ["bom", "semicolons", "tabs", "utf-16", "quoted"])
    def test_as_spreadsheets_write_them(self, cohort, how):
        text, encoding, name = {
            "bom": (COHORT, "utf-8-sig", "t.csv"),
            "semicolons": (COHORT.replace(",", ";").replace("Bern", "Bern, Inselspital"), "utf-8-sig", "t.csv"),
            "tabs": (COHORT.replace(",", "\t"), "utf-8", "t.tsv"),
            "utf-16": (COHORT.replace(",", "\t"), "utf-16", "t.txt"),
            "quoted": (COHORT.replace("Bern", '"Bern,\nInselspital"').replace("\n", "\r\n"), "utf-8", "t.csv"),
        }[how]
        write(cohort / "cohort" / name, text, encoding)
        cases = found(cohort, table=f"../cohort/{name}").cases
        assert list(cases) == ["p1", "p-2"]
        assert cases["p1"].groups["site"].startswith("Bern")
        assert cases["p1"].label == "tumour"

    def test_several_scan_columns_are_the_channels(self, cohort):
        write(cohort / "cohort" / "t.csv", "id,t2,t1\np1,scans/b.nii.gz,scans/a.nii.gz\np2,scans/b.nii.gz,\n")
        cases = found(cohort, table="../cohort/t.csv", columns={"scan": ["t1", "t2"]}).cases
        assert [path.name for path in cases["p1"].paths] == ["a.nii.gz", "b.nii.gz"]
        assert cases["p2"].fault == "no such file: an empty cell (t.csv:3)"

    def test_a_case_whose_file_is_not_there_is_kept_with_the_line(self, cohort):
        (cohort / "cohort" / "scans" / "b.nii.gz").unlink()
        case = found(cohort, table="../cohort/cases.csv").cases["p-2"]
        assert case.fault == "no such file: scans/b.nii.gz (cases.csv:3)"
        assert case.paths[0].name == "b.nii.gz"

    def test_lines_are_those_of_the_file(self, cohort):
        write(cohort / "cohort" / "t.csv", 'id,scan,site\n\n1,scans/a.nii.gz,"two\nlines"\n\n2,gone.nii,\n')
        assert found(cohort, table="../cohort/t.csv").cases["2"].fault == "no such file: gone.nii (t.csv:6)"

    def test_a_mask_that_is_not_there_is_told_and_costs_no_explanation(self, cohort):
        (cohort / "cohort" / "masks" / "a.nii.gz").unlink()
        cases = found(cohort, table="../cohort/cases.csv")
        assert cases.notes == ("1 masks are not there: p1 (lesion)",)
        assert cases.cases["p1"].fault is None

    def test_other_inputs_of_the_model(self, cohort):
        make(cohort, "cohort/pet.nii")
        rows = "id,scan,age,dose,pet\n1,scans/a.nii.gz,61,0.5,pet.nii\n2,scans/b.nii.gz,,1e3,pet.nii\n"
        rows += '3,scans/a.nii.gz,61,"0,5",pet.nii\n4,scans/a.nii.gz,61,nan,pet.nii\n5,scans/a.nii.gz,1,2,no.nii\n'
        write(cohort / "cohort" / "t.csv", rows)
        columns = {"given": {"clinical": ["age", "dose"], "pet": "pet"}}
        cases = found(cohort, table="../cohort/t.csv", columns=columns).cases
        assert cases["1"].given["clinical"] == (61.0, 0.5)
        assert cases["1"].given["pet"].name == "pet.nii"
        assert [case.fault for case in cases.values()] == [
            None,
            "the model's input 'clinical': its cell is empty (t.csv:3)",
            "the model's input 'clinical': '61', '0,5': no number, with a point for decimals, and no file (t.csv:4)",
            "the model's input 'clinical': '61', 'nan': no number, with a point for decimals, and no file (t.csv:5)",
            "the model's input 'pet': 'no.nii': no number, with a point for decimals, and no file (t.csv:6)",
        ]

    def test_ids_that_become_the_same_are_told_apart(self, cohort):
        write(cohort / "cohort" / "t.csv", "id,scan\nP 1,scans/a.nii.gz\np-1,scans/b.nii.gz\np2,scans/b.nii.gz\n")
        cases = found(cohort, table="../cohort/t.csv")
        first, second, third = cases.cases
        assert [name[:4] for name in (first, second, third)] == ["p-1-", "p-1-", "p2"]
        assert cases.notes == (f"2 cases have ids alike, and got a hash each: {first}, {second}",)

    def test_without_an_id_column_the_scans_path_is_the_id(self, cohort):
        write(cohort / "cohort" / "t.csv", "scan\nscans/a.nii.gz\n")
        assert list(found(cohort, table="../cohort/t.csv").cases) == ["scans-a"]

    @pytest.mark.parametrize(
        ("text", "columns", "says"),
        [
            ("", {}, r"t\.csv: the table is empty"),
            ("id,scan\n", {}, "no rows but the one"),
            ("id,thing\n1,a.nii\n", {}, r"t\.csv:1: which column names the scans\?.*there are id, thing"),
            ("id,scan\n1,a\n", {"label": "lable"}, r"t\.csv:1: no column 'lable'; known: id, scan"),
            ("id,scan,label\n1,a,b\n", {"label": "lable"}, "no column 'lable'; did you mean 'label'"),
            ("id,scan,id\n1,a,2\n", {}, "2 columns are called 'id'"),
            ("id,scan\n1,a\n2,b\n1,c\n", {}, r"t\.csv:4: the id '1' is that of line 2 too \(column 'id'\)"),
            ("id,scan\n,a\n2,b\n,c\n", {}, r"t\.csv:2: the id is empty.*t\.csv:4: the id is empty"),
            ("id,scan\n1,a,b\n", {}, r"t\.csv:2: 3 cells, and 2 columns"),
            ('id,scan\n1,"a\n', {}, None),
        ],
    )
    def test_mistakes_are_told_with_the_line(self, place, text, columns, says):
        write(place / "t.csv", text)
        if says is None:
            assert "no such file" in found(place, table="../t.csv", columns=columns).cases["1"].fault
            return
        with pytest.raises(ConfigError, match=says) as error:
            found(place, table="../t.csv", columns=columns)
        assert "c.yaml: scans.table: " in str(error.value)

    def test_a_table_that_is_not_text_or_not_there(self, place):
        write(place / "t.csv", "id,scan\nMüller,a.nii\n", "latin-1")
        with pytest.raises(ConfigError, match=r"t\.csv:2: not UTF-8 text; save"):
            found(place, table="../t.csv")
        write(place / "t.csv", "id,scan\n1,a\0.nii\n")
        with pytest.raises(ConfigError, match=r"t\.csv:2: a NUL character"):
            found(place, table="../t.csv")
        with pytest.raises(ConfigError, match=r"scans\.table: no table .*gone\.csv"):
            found(place, table="../gone.csv")

    @pytest.mark.parametrize("name", ["x" * 300, "../../etc"])
    def test_names_that_no_file_can_have(self, place, name):
        write(place / "t.csv", f"id,scan\n{name},{name}.nii\n")
        (case,) = found(place, table="../t.csv").cases.values()
        assert "no such file" in case.fault
        assert "/" not in case.id
        assert len(case.id) <= 96


@given(st.text(max_size=60), st.sampled_from([",", ";", "\t"]), st.booleans())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_whatever_a_table_holds_it_is_told_or_every_row_is_a_case(place, text, delimiter, with_mask):
    head = delimiter.join(["id", "scan", *["mask"] * with_mask])
    (place / "t.csv").write_bytes(f"{head}\nfirst{delimiter}a.nii\n{text}".encode())
    cases, refusal = {}, ""
    try:
        cases = found(place, table="../t.csv").cases
    except ConfigError as error:
        refusal = str(error)
    if refusal:
        assert re.search(r"t\.csv(:\d+)?: ", refusal)
        return
    assert cases["first"].fault == "no such file: a.nii (t.csv:2)"
    assert all(re.fullmatch(r"[a-z0-9._-]{1,113}", case) and json.dumps(c.describe()) for case, c in cases.items())


class TestTablesBesideScans:
    def test_rows_are_found_by_id_file_or_folder(self, place):
        make(place, "d/p1/ct.nii.gz", "d/p2/ct.nii.gz", "d/p3/ct.nii.gz", "d/odd one.nii")
        write(place / "t.csv", "subject,label\np1,a\nP2-CT,b\nodd one.nii,c\nP9,d\n")
        cases = found(place, folder="../d", labels="../t.csv")
        assert {case.id: case.label for case in cases.cases.values()} == {
            "odd-one": "c",
            "p1-ct": "a",
            "p2-ct": "b",
            "p3-ct": None,
        }
        assert cases.notes == (
            "1 cases have no row in t.csv: p3-ct",
            "1 rows of t.csv belong to no case: p9 (line 5)",
        )

    def test_folders_above_the_scans_are_not_asked(self, place):
        make(place, "d/ct.nii.gz")
        write(place / "t.csv", "id,label\nd,wrong\n")
        assert found(place, folder="../d", labels="../t.csv").cases["ct"].label is None

    def test_masks_of_both_and_a_fault_that_stays(self, place):
        make(place, "d/p1_a.nii", "d/p1_b.nii", "d/p1_seg.nii", "d/p2_a.nii", "m/x.nii")
        write(place / "t.csv", "id,organ_mask\np1,m/x.nii\np2,m/x.nii\n")
        cases = found(place, folder="../d", labels="../t.csv", channels=["_a", "_b"], masks={"lesion": "_seg"}).cases
        assert {name: path.name for name, path in cases["p1"].masks.items()} == {
            "lesion": "p1_seg.nii",
            "organ": "x.nii",
        }
        assert "channel _b is missing" in cases["p2"].fault

    def test_a_model_of_several_inputs_needs_a_row_for_every_case(self, place):
        make(place, "d/p1.nii", "d/p2.nii")
        write(place / "t.csv", "id,age\np1,60\n")
        cases = found(place, folder="../d", labels="../t.csv", columns={"given": {"age": "age"}}).cases
        assert cases["p1"].given == {"age": (60.0,)}
        assert cases["p2"].fault == "no row of t.csv has its inputs for the model"

    def test_ids_alike_but_for_their_spelling(self, place):
        make(place, "d/p1.nii")
        write(place / "t.csv", "id,label\np1,a\nP1,b\n")
        with pytest.raises(ConfigError, match=r"scans\.labels: t\.csv:3: the id 'P1' is that of line 2 too, but"):
            found(place, folder="../d", labels="../t.csv")

    def test_a_table_without_ids(self, place):
        make(place, "d/p1.nii")
        write(place / "t.csv", "name,label\np1,a\n")
        with pytest.raises(ConfigError, match="which column names the cases"):
            found(place, folder="../d", labels="../t.csv")


class TestBids:
    @pytest.fixture
    def dataset(self, place):
        make(
            place / "ds",
            "dataset_description.json",
            "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz",
            "sub-01/ses-2/anat/sub-01_ses-2_run-1_T1w.nii.gz",
            "sub-01/ses-2/anat/sub-01_ses-2_run-2_T1w.nii.gz",
            "sub-02/anat/sub-02_acq-x_T1w.nii.gz",
            "sub-02/anat/sub-02_FLAIR.nii.gz",
            "sub-02/anat/sub-02_T1w.json",
            "sub-02/anat/notes.nii",
            "derivatives/prep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
            "derivatives/prep/sub-01/anat/sub-01_desc-brain_mask.nii.gz",
            "derivatives/prep/sub-01/anat/sub-01_label-lesion_mask.nii.gz",
            "sourcedata/sub-01/x.nii",
        )
        table = "participant_id\tsex\tage\tsite\nsub-01\tF\t60\tBern\nsub-02\tM\tn/a\tn/a\nsub-07\tF\t1\tUlm\n"
        write(place / "ds" / "participants.tsv", table)
        return place

    def test_one_suffix(self, dataset):
        cases = found(dataset, bids="../ds", channels=["T1w"])
        assert list(cases.cases) == ["sub-01_ses-1", "sub-01_ses-2_run-1", "sub-01_ses-2_run-2", "sub-02_acq-x"]
        assert set(cases.notes) == {
            "passed over: 1 scans of other suffixes than T1w",
            "passed over: 1 scans that are not named as BIDS says",
            "1 rows of participants.tsv belong to no case: sub-07 (line 4)",
        }

    def test_participants_are_joined(self, dataset):
        cases = found(dataset, bids="../ds", channels=["T1w"], columns={"label": "age"}).cases
        assert [case.label for case in cases.values()] == ["60", "60", "60", None]
        assert [dict(case.groups) for case in cases.values()] == [{"sex": "F", "site": "Bern"}] * 3 + [{"sex": "M"}]

    def test_sessions_say_more_than_participants(self, dataset):
        text = "session_id\tsite\tlabel\nses-1\tn/a\tstable\nses-2\tUlm\tgrown\n"
        write(dataset / "ds" / "sub-01" / "sub-01_sessions.tsv", text)
        cases = found(dataset, bids="../ds", channels=["T1w"]).cases
        assert [case.label for case in cases.values()] == ["stable", "grown", "grown", None]
        assert [case.groups.get("site") for case in cases.values()] == ["Bern", "Ulm", "Ulm", None]
        assert cases["sub-01_ses-2_run-1"].groups["sex"] == "F"

    def test_a_subjects_sessions_are_one_patients(self, dataset):
        write(dataset / "ds" / "sub-01" / "sub-01_sessions.tsv", "session_id\tsite\nses-1\tBern\nses-2\tUlm\n")
        for sections in ({}, {"labels": "../t.csv"}):
            write(dataset / "t.csv", "participant_id,label\nsub-01_ses-1,c\n")
            cases = found(dataset, bids="../ds", channels=["T1w"], **sections).cases
            assert [case.patient for case in cases.values()] == ["sub-01", "sub-01", "sub-01", "sub-02"]
        cases = found(dataset, bids="../ds", channels=["T1w"], columns={"patient": "site"}).cases
        assert cases["sub-01_ses-2_run-1"].patient == "Ulm"

    def test_several_suffixes_are_channels(self, dataset):
        cases = found(dataset, bids="../ds", channels=["T1w", "FLAIR"]).cases
        assert [path.name for path in cases["sub-02"].paths] == ["sub-02_acq-x_T1w.nii.gz", "sub-02_FLAIR.nii.gz"]
        assert cases["sub-02"].fault is None
        assert {case.id for case in cases.values() if case.fault} == set(cases) - {"sub-02"}

    def test_a_derivative_has_its_dataset_s_participants_and_its_masks(self, dataset):
        options = {"channels": ["desc-preproc_T1w"], "masks": {"lesion": "label-lesion_mask"}}
        (case,) = found(dataset, bids="../ds/derivatives/prep", **options).cases.values()
        assert case.id == "sub-01"
        assert case.groups == {"sex": "F", "site": "Bern"}
        assert case.masks["lesion"].name == "sub-01_label-lesion_mask.nii.gz"

    def test_a_suffix_is_chosen_where_there_is_a_choice(self, dataset):
        with pytest.raises(ConfigError, match=r"scans\.bids: .* holds FLAIR \(1\), T1w \(4\); say which"):
            found(dataset, bids="../ds")
        assert list(found(dataset, bids="../ds/derivatives/prep").cases) == ["sub-01_desc-preproc"]

    def test_labels_in_place_of_participants(self, dataset):
        write(dataset / "t.csv", "id,label\n01,a\nsub-02,b\nsub-01_ses-1,c\n")
        cases = found(dataset, bids="../ds", channels=["T1w"], labels="../t.csv").cases
        assert [case.label for case in cases.values()] == ["c", "a", "a", "b"]
        assert not any(case.groups for case in cases.values())

    def test_a_pattern(self, dataset):
        assert list(found(dataset, bids="../ds", channels=["T1w"], pattern="sub-01/ses-1/*").cases) == ["sub-01_ses-1"]

    def test_a_folder_that_is_no_dataset(self, dataset):
        with pytest.raises(ConfigError, match=r"has no folders called sub-"):
            found(dataset, bids="../ds/derivatives")
        with pytest.raises(ConfigError, match=r"scans\.bids: no folder .*nowhere"):
            found(dataset, bids="../nowhere")
        with pytest.raises(ConfigError, match=r"scans\.bids: .*participants\.tsv is not a folder"):
            found(dataset, bids="../ds/participants.tsv")


@pytest.mark.parametrize(
    ("scans", "says"),
    [
        ({}, "one of folder, files, bids and table; got none"),
        ({"folder": "a", "bids": "b"}, "got folder, bids"),
        ({"table": "a", "labels": "b"}, "labels cannot go with"),
        ({"table": "a", "channels": ["x"]}, "channels cannot go with"),
        ({"files": "a", "pattern": "b"}, "'files' are patterns themselves"),
        ({"folder": "a", "columns": {"label": "x"}}, "'columns' are those of a table"),
        ({"folder": "a", "labels": "b", "columns": {"scan": "x"}}, r"columns\.scan names the scans of a 'table'"),
        ({"table": "a", "columns": {"lable": "x"}}, r"scans\.columns\.lable: unknown key; did you mean 'label'"),
        ({"folder": "a", "masks": {"m": "_t1"}, "channels": ["_t1"]}, "channels and masks are name endings"),
        ({"folder": "a", "identifiers": "none"}, r"scans\.identifiers"),
    ],
)
def test_sections_that_make_no_sense(place, scans, says):
    with pytest.raises(ConfigError, match=says):
        found(place, **scans)


def test_ten_thousand_rows(place):
    rows = [f"p{n},scans/{n}.nii,site {n % 7}" for n in range(10_000)]
    write(place / "t.csv", "\n".join(["id,scan,site", *rows]))
    cases = found(place, table="../t.csv").cases
    assert len(cases) == 10_000
    assert cases["p9999"].fault == "no such file: scans/9999.nii (t.csv:10001)"
    assert cases["p9999"].paths == (place / "project" / Path("../scans/9999.nii"),)
