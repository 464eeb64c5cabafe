import csv
import gc
import json
import shutil
import weakref

import numpy as np
import pytest
from made_runs import add_case, begin, grid_of, write_scan
from qtpy.QtCore import Qt

from volsal.plugin.audit_browser import AuditBrowser
from volsal.plugin.review import Review, Reviews
from volsal.viewer.layers import as_stored, true_world

pytestmark = pytest.mark.filterwarnings("ignore")  # napari's own deprecations, and those of the libraries under it


@pytest.fixture
def browser(viewer, qtbot):
    made = AuditBrowser(viewer)
    viewer.window.add_dock_widget(made, name="Audit browser", area="bottom")
    return made


def idle(browser, qtbot):
    qtbot.waitUntil(lambda: browser.job is None, timeout=240000)


def listed(browser):
    column = [browser.chosen.index(number, 0) for number in range(browser.chosen.rowCount())]
    return [browser.chosen.data(index) for index in column]


def open_run(browser, qtbot, run):
    browser.folder.setText(str(run.path))
    browser.folder.returnPressed.emit()
    idle(browser, qtbot)


def test_the_most_suspicious_case_is_shown_first_with_its_reason(browser, qtbot, run, viewer):
    (run / "audit.json").write_text(json.dumps({"suspicious": [{"case": "bb", "reason": "the corner", "weight": 1.5}]}))
    open_run(browser, qtbot, run)
    assert listed(browser) == ["bb", "aa", "cc", "dd"]
    assert "bb lesion (wrong)" in browser.message.text()
    assert "the corner" in browser.message.text()
    assert [layer.name for layer in viewer.layers] == ["scan", "grad-cam · class-1"]
    grid = grid_of("LPS")
    values = as_stored(viewer.layers[-1].data, grid)
    at = true_world(viewer.layers[-1].metadata, viewer.dims.point)  # it opens at the peak
    assert np.linalg.norm(at - grid.world(np.unravel_index(values.argmax(), values.shape))) < 3.0
    assert tuple(map(str, viewer.scene.camera.orientation)) == ("away", "up", "left")


def test_cases_are_sorted_and_filtered(browser, qtbot, run):
    (run / "audit.json").write_text(
        json.dumps({"suspicious": [{"case": c, "reason": "r", "weight": w} for c, w in (("aa", 2.0), ("bb", 10.0))]})
    )
    open_run(browser, qtbot, run)
    headings = [column.heading for column in browser.cases.shown]
    at = headings.index("suspicion")
    browser.view.sortByColumn(at, Qt.SortOrder.AscendingOrder)
    assert listed(browser)[-2:] == ["aa", "bb"]  # by number: as text 10 would come first
    browser.view.sortByColumn(at, Qt.SortOrder.DescendingOrder)
    assert listed(browser)[:2] == ["bb", "aa"]
    browser.words.setText("BERN les")
    assert listed(browser) == ["bb"]
    browser.words.clear()
    browser.column.setCurrentText("answer")
    browser.value.setCurrentText("right")
    assert listed(browser) == ["aa"]
    browser.column.setCurrentText("any")
    assert len(listed(browser)) == 4
    idle(browser, qtbot)


def test_keys_lead_from_case_to_case_and_what_is_missing_is_told(browser, qtbot, run, viewer):
    open_run(browser, qtbot, run)
    told = [browser.message.text()]
    for _ in range(4):  # once more than there are cases
        qtbot.keyClick(browser.view, Qt.Key.Key_PageDown)
        idle(browser, qtbot)
        told.append(browser.message.text())
    assert browser.current.id == "dd"
    assert [words.split()[0] for words in told] == ["aa", "bb", "cc:", "dd", "dd"]
    assert "refused" in told[2]
    assert "the file is empty" in told[2]
    assert "moved.nii.gz is not there any more" in told[3]
    assert [layer.name for layer in viewer.layers] == ["grad-cam · class-1"]  # the map alone
    qtbot.keyClick(browser.view, Qt.Key.Key_PageUp)
    idle(browser, qtbot)
    assert browser.current.id == "cc"
    assert not viewer.layers


def test_a_map_is_chosen_and_all_cases_get_one_scale(browser, qtbot, run, viewer):
    open_run(browser, qtbot, run)
    own = viewer.layers[-1].contrast_limits[1]
    browser.one_scale.click()
    idle(browser, qtbot)
    assert viewer.layers[-1].contrast_limits[1] == pytest.approx(3 * own, rel=1e-3)  # made 1, 3 and 5 times as strong
    browser.look.threshold.setValue(500)
    browser.map.setCurrentText("input-gradient · class-1")
    idle(browser, qtbot)
    assert [layer.name for layer in viewer.layers] == ["scan", "input-gradient · class-1"]
    low, high = viewer.layers[-1].contrast_limits
    assert low == -high
    assert "magnitudes below" in browser.look.value.text()  # the slider stayed where it was


def test_verdict_and_comment_are_saved_and_there_again(browser, qtbot, run, viewer):
    Reviews(run / "review.csv").write("gone", Review("plausible", "of an earlier run"))
    open_run(browser, qtbot, run)
    browser.verdict.setCurrentText("doubtful")
    qtbot.keyClicks(browser.comment, "=beside the lesion")
    browser.next.click()  # without leaving the field first
    idle(browser, qtbot)
    assert (browser.verdict.currentText(), browser.comment.text()) == ("", "")
    with (run / "review.csv").open(newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert rows["aa"]["comment"] == "'=beside the lesion"
    assert rows["gone"]["comment"] == "of an earlier run"
    again = AuditBrowser(viewer)
    viewer.window.add_dock_widget(again, name="again", area="bottom")
    open_run(again, qtbot, run)
    assert (again.current.id, again.verdict.currentText(), again.comment.text()) == (
        "aa", "doubtful", "=beside the lesion",
    )  # fmt: skip
    again.verdict.setCurrentText("")
    assert Reviews(run / "review.csv").read()["aa"] == Review("", "=beside the lesion")


def test_a_review_that_cannot_be_saved_is_said_and_not_forgotten(browser, qtbot, run):
    open_run(browser, qtbot, run)
    (run / "review.csv").write_text("someone's own table\n")
    browser.verdict.setCurrentText("doubtful")
    assert "NOT SAVED" in browser.message.text()
    assert browser.verdict.currentText() == "doubtful"
    assert (run / "review.csv").read_text() == "someone's own table\n"


def test_what_the_disk_refused_is_kept_said_and_saved_once_it_can_be(browser, qtbot, run):
    open_run(browser, qtbot, run)
    (run / "review.csv").write_text("someone's own table\n")
    browser.verdict.setCurrentText("doubtful")
    qtbot.keyClicks(browser.comment, "near the rim")
    browser.next.click()
    idle(browser, qtbot)
    assert browser.current.id == "bb"
    assert "NOT SAVED yet: aa" in browser.message.text()
    browser.previous.click()
    idle(browser, qtbot)
    assert (browser.verdict.currentText(), browser.comment.text()) == ("doubtful", "near the rim")
    (run / "review.csv").unlink()
    browser.next.click()
    idle(browser, qtbot)
    assert "NOT SAVED" not in browser.message.text()
    assert Reviews(run / "review.csv").read() == {"aa": Review("doubtful", "near the rim")}


def test_what_another_window_says_meanwhile_is_shown_and_stays(browser, qtbot, run):
    open_run(browser, qtbot, run)
    Reviews(run / "review.csv").write("bb", Review("implausible"))
    browser.next.click()
    idle(browser, qtbot)
    assert browser.verdict.currentText() == "implausible"
    browser.comment.setText("near the rim")
    browser.previous.click()
    idle(browser, qtbot)
    assert Reviews(run / "review.csv").read() == {"bb": Review("implausible", "near the rim")}


def test_no_picture_of_one_case_is_seen_beside_the_name_of_another(browser, qtbot, run, viewer, tmp_path):
    open_run(browser, qtbot, run)
    assert any(layer.visible for layer in viewer.layers)
    browser.next.click()
    assert browser.current.id == "bb"
    assert not any(layer.visible for layer in viewer.layers)
    assert browser.message.text() == "bb: reading ..."
    begin(tmp_path / "empty", {})
    browser.open(tmp_path / "empty")  # while bb is being read
    idle(browser, qtbot)
    assert not viewer.layers


def test_a_folder_that_is_no_run_is_told(browser, tmp_path):
    browser.open(tmp_path)
    assert "not a run folder" in browser.message.text()
    assert browser.table is None


def test_masks_are_contours(browser, qtbot, tmp_path, viewer):
    import nibabel as nib

    grid = grid_of("PSR")
    mask = np.zeros(grid.shape, np.uint8)
    mask[3:9, 4:9, 5:9] = 1
    nib.save(nib.Nifti1Image(mask, grid.affine), tmp_path / "mask.nii.gz")
    made = begin(tmp_path / "run", {"aa": {"masks": {"lesion": str(tmp_path / "mask.nii.gz"), "gone": "/none.nii"}}})
    add_case(made.path, "aa", write_scan(tmp_path / "scan.nii.gz", grid))
    open_run(browser, qtbot, made)
    assert viewer.layers["lesion"].contour == 1
    np.testing.assert_array_equal(as_stored(viewer.layers["lesion"].data, grid), mask)
    assert "/none.nii: no such file" in browser.message.text()


@pytest.fixture
def cohort(tmp_path):
    """A run of 200 cases, which are one and the same under other names."""
    add_case(tmp_path / "run", "case-000", write_scan(tmp_path / "scan.nii.gz", grid_of("LPS")))
    cases = [f"case-{number:03d}" for number in range(200)]
    for case in cases[1:]:
        shutil.copytree(tmp_path / "run" / "case-000", tmp_path / "run" / case)
    return begin(tmp_path / "run", {case: {"label": "lesion", "groups": {"site": case[-1]}} for case in cases})


@pytest.mark.slow
def test_two_hundred_cases_are_browsed_with_one_in_memory(browser, qtbot, cohort, viewer):
    open_run(browser, qtbot, cohort)
    assert browser.chosen.rowCount() == 200
    seen, arrays = [], []
    for _ in range(20):
        idle(browser, qtbot)
        assert [layer.name for layer in viewer.layers] == ["scan", "grad-cam · class-1"]
        arrays.append(weakref.ref(viewer.layers[-1].data.base))
        for _ in range(10):  # each is chosen, and every tenth is waited for
            seen.append(browser.current.id)
            browser.step(1)
    assert seen == [f"case-{number:03d}" for number in range(200)]
    idle(browser, qtbot)
    gc.collect()
    assert sum(array() is not None for array in arrays) <= 2


def test_who_leafs_fast_sees_the_last_case_and_none_in_between(browser, qtbot, cohort, viewer):
    open_run(browser, qtbot, cohort)
    for _ in range(60):
        browser.step(1)
    idle(browser, qtbot)
    assert browser.current.id == "case-060"
    assert browser.message.text().startswith("case-060")
    assert len(viewer.layers) == 2
