import json

import pytest
from made_runs import begin

from volsal.plugin.cases import CaseTable
from volsal.plugin.review import Review, Reviews
from volsal.run_folder import RunFolderError


def test_a_row_says_what_run_audit_and_reviewer_know(run):
    suspicious = [
        {"case": "bb", "reason": "something in the corner", "weight": 0.5},
        {"case": "dd", "reason": "less", "weight": 0.1},
        {"case": "dd", "reason": "more", "weight": 2.25},
    ]
    (run / "audit.json").write_text(json.dumps({"suspicious": suspicious}))
    Reviews(run / "review.csv").write("aa", Review("plausible", "yes"))
    rows = {row.id: row for row in CaseTable.of(run.path).rows}
    assert list(rows) == ["dd", "bb", "aa", "cc"]  # the most suspicious first, then as the run has them
    assert (rows["dd"].suspicion, rows["dd"].remark) == (2.25, "more")
    assert {case: (row.prediction, row.answer) for case, row in rows.items()} == {
        "aa": ("lesion", "right"),
        "bb": ("lesion", "wrong"),
        "cc": ("", ""),
        "dd": ("lesion", ""),
    }
    assert (rows["cc"].status, rows["cc"].suspicion) == ("refused", None)
    assert "the file is empty" in rows["cc"].remark
    assert rows["bb"].groups == {"site": "Bern"}
    assert rows["aa"].review == Review("plausible", "yes")


def test_one_scale_for_all_cases_is_the_median_of_their_own(run):
    table = CaseTable.of(run.path)
    assert table.maps == ["grad-cam · class-1", "input-gradient · class-1", "layer-cam · class-1"]
    low, high = table.window("grad-cam · class-1")
    tops = sorted(row.windows["grad-cam · class-1"][1] for row in table.rows if row.windows)
    assert (low, high) == (0.0, tops[1])
    assert table.window("no such map") is None


def test_a_run_without_cases_and_a_folder_that_is_none(tmp_path):
    assert CaseTable.of(begin(tmp_path / "run").path).rows == []
    with pytest.raises(RunFolderError, match="not a run folder"):
        CaseTable.of(tmp_path)
