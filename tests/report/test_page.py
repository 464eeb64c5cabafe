import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from io import BytesIO

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from made_runs import BLOB_MM, add_case, begin, distance, fault, geometry_of, grid_of, write_scan

from volsal.audit import check_verdicts, trust, verdicts
from volsal.display import Upright
from volsal.report.markup import data_block, readable, render
from volsal.report.page import ReportError, write_report
from volsal.report.sections import _QUIET, Case, scales_of
from volsal.report.volumes import Shown, coded, thumbnail
from volsal.run_folder import RunFolderError

NASTY = "<script>document.title='pwned'</script>&\"'><img src=x onerror=alert(1)>\u202egpj.exe ñ漢字"


class Elements(HTMLParser):
    """Every element with its attributes, and the text within each kind."""

    def __init__(self, text):
        super().__init__()
        self.found, self.inside, self.open = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.open = tag

    def handle_data(self, data):
        self.inside.setdefault(self.open, []).append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of every kind of case, and its report."""
    home = tmp_path_factory.mktemp("made")
    inputs = {
        case: {"label": label, "groups": {"site": site}, "masks": {}}
        for case, label, site in [
            ("permuted", "lesion", "A"),
            ("tilted", "healthy", "B"),
            ("nasty", NASTY, NASTY),
            ("refused", None, "A"),
            ("broken", None, "B"),
        ]
    }
    grids = {"permuted": grid_of("PSL"), "tilted": grid_of("LAS", 20), "nasty": grid_of("RAS")}
    for number, (case, grid) in enumerate(grids.items()):
        write_scan(home / "scans" / f"{case}.nii.gz", grid, number)
    mask = nib.Nifti1Image((distance(grids["permuted"])[1] < 8).astype(np.uint8), grids["permuted"].affine)
    nib.save(mask, home / "mask.nii.gz")
    inputs["permuted"]["masks"] = {"lesion": str(home / "mask.nii.gz")}
    run = begin(home / "run", inputs)
    for number, case in enumerate(grids):
        words = {"class_name": NASTY, "notes": [NASTY], "target_text": NASTY} if case == "nasty" else {}
        add_case(home / "run", case, home / "scans" / f"{case}.nii.gz", scale=1 + number, **words)
    fault(run, "refused")
    fault(run, "broken", "failed", f"it broke over {NASTY}", "error")
    write_report(home / "run")
    return home


def pages(home):
    return sorted((home / "run" / "report" / "cases").glob("*.html"))


# Volumes


@given(
    arrays(
        np.float32,
        (3, 4, 60),
        elements=st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, 1.0, 5.0]),
    )
)
@settings(max_examples=60, deadline=None)
def test_a_coded_value_is_off_by_less_than_half_the_way_to_the_next_level(values):
    volume = coded(values)
    levels = volume.levels.astype(float)
    assert len(levels) <= 256
    assert (np.diff(levels) > 0).all()
    off = np.abs(levels[volume.codes] - values)
    gaps = np.abs(np.diff(levels)) / 2 if len(levels) > 1 else np.zeros(1)
    doubt = np.maximum(np.concatenate([[0], gaps]), np.concatenate([gaps, [0]]))[volume.codes]
    assert (off <= doubt * (1 + 1e-5) + 1e-30).all()
    for exact in (values.min(), values.max(), 0.0):
        assert (levels[volume.codes[values == exact]] == exact).all()
    if volume.exact:
        assert (off == 0).all()


def test_few_values_are_kept_exactly_and_many_are_not_called_exact():
    rng = np.random.default_rng(1)
    few = rng.integers(-100, 100, (40, 40, 40)).astype(np.float32)
    assert coded(few).exact
    assert np.array_equal(coded(few).levels[coded(few).codes], few)
    assert not coded(rng.normal(size=(40, 40, 40))).exact


def test_a_narrow_window_of_a_ct_keeps_its_greys():
    rng = np.random.default_rng(2)
    parts = [rng.normal(-1000, 5, 200_000), rng.normal(35, 12, 150_000), rng.uniform(-1000, 2500, 40_000)]
    ct = np.rint(np.concatenate(parts)).reshape(300, 130, 10)
    volume = coded(ct)
    brain = (ct > 0) & (ct < 80)
    off = np.abs(volume.levels[volume.codes] - ct)[brain]
    assert np.percentile(off, 95) < 1.5  # with evenly spread levels it would be 6.5


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSL", "IRP"])
@pytest.mark.parametrize(("degrees", "most"), [(0, 10**6), (25, 700)])
def test_shown_voxels_are_the_files_own_at_their_own_place(codes, degrees, most):
    grid = grid_of(codes, degrees)
    values = np.arange(np.prod(grid.shape)).reshape(grid.shape)
    shown = Shown(grid, most)
    geometry = shown.geometry()
    assert np.prod(shown.grid.shape) <= most
    assert shown.strided == (most == 700)
    points = np.array(list(np.ndindex(*shown.grid.shape)))
    in_file = points @ np.array(geometry["toFile"])[:, :3].T + np.array(geometry["toFile"])[:, 3]
    assert np.array_equal(shown.array(values)[tuple(points.T)], values[tuple(in_file.T)])
    world = points @ np.array(geometry["affine"])[:, :3].T + np.array(geometry["affine"])[:, 3]
    assert np.allclose(world, grid.world(in_file), atol=1e-9)


def test_the_finest_axis_is_thinned_out_first():
    assert Shown(grid_of(shape=(64, 64, 10), spacing=(0.5, 0.5, 5.0)), 64 * 64 * 10 // 4).step.tolist() == [2, 2, 1]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR"])
def test_the_small_picture_shows_the_patients_right_on_the_left(codes):
    from PIL import Image

    grid = grid_of(codes)
    _, far = distance(grid)
    blob = np.exp(-((far / 5) ** 2))
    content = thumbnail(Upright(grid), np.ones(grid.shape), (0, 1), blob, (0, 1), False, BLOB_MM)
    picture = np.asarray(Image.open(BytesIO(content)).convert("RGB")).astype(float)
    axial = picture[:, : round(picture.shape[1] * 40 / (40 + 40 + 36))]  # widths of the planes in mm
    colour = np.ptp(axial, axis=-1) * (axial[..., 0] > 100)
    centre = (colour.sum(0) * np.arange(axial.shape[1])).sum() / colour.sum()
    assert centre / axial.shape[1] == pytest.approx(0.5 - BLOB_MM[0] / 40, abs=0.05)


# Words and markup


def test_invisible_characters_are_written_out():
    assert readable("a\u202eb\x07\ud800\u200f") == "a⟨U+202E⟩b⟨U+0007⟩⟨U+D800⟩⟨U+200F⟩"
    assert readable("plain ñ漢字\nline") == "plain ñ漢字\nline"


def test_data_cannot_end_the_element_it_stands_in():
    block = str(data_block({"name": "</script><!-- \u2028 &amp;", "n": [1.5, None]}))
    assert not set("<>&\u2028") & set(block)
    import json

    assert json.loads(block) == {"name": "</script><!-- ⟨U+2028⟩ &amp;", "n": [1.5, None]}


def test_a_template_without_its_value_is_an_error():
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError):
        render("faults.html")


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("/data/Jane Roe/x.nii: the file is empty", "…/x.nii: the file is empty"),
        ("cannot read '/a/b/c.nii.gz'", "cannot read '…/c.nii.gz'"),
        ("/data/O'Brien Pat/x.nii: 'tis bad", "…/x.nii: 'tis bad"),
        ("neither '/a/b/' nor '/c/d'", "neither '…/' nor '…/d'"),
        (r"C:\Users\Jane\x.nii: bad", "…/x.nii: bad"),
        ("the matrix 1 0 0 / 0 1 0 / 0 0 1", "the matrix 1 0 0 / 0 1 0 / 0 0 1"),
        ("logit/cell and and/or", "logit/cell and and/or"),
    ],
)
def test_paths_lose_their_folders_and_nothing_else(text, short):
    assert readable(text) == short


# Pages


def test_no_page_has_a_script_of_anyone_elses(made):
    report = made / "run" / "report"
    for page in [*pages(made), report / "index.html"]:
        text = page.read_text(encoding="utf-8")
        found = Elements(text).found
        scripts = [attributes for tag, attributes in found if tag == "script"]
        assert {attributes.get("type") for attributes in scripts} <= {None, "application/json", "text/plain"}
        assert sum("type" not in attributes for attributes in scripts) == 1
        assert not [a for _, attributes in found for a in attributes if a.startswith("on") or a == "style"]
        assert {tag for tag, _ in found}.isdisjoint({"iframe", "object", "embed", "base", "link"})
        assert "\u202e" not in text
        assert "http:" not in text
        assert "https:" not in text


def test_the_policy_lets_in_exactly_the_script_and_style_of_the_page(made):
    for page in pages(made)[:1]:
        text = page.read_text(encoding="utf-8")
        policy = next(a["content"] for t, a in Elements(text).found if a.get("http-equiv") == "Content-Security-Policy")
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy
        for kind, body in (
            ("script", text.rpartition("<script>")[2].partition("</script>")[0]),
            ("style", text.partition("<style>")[2].partition("</style>")[0]),
        ):
            digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
            assert f"{kind}-src 'sha256-{digest}'" in policy


def test_names_from_files_are_shown_as_text(made):
    page = next(page for page in pages(made) if "nasty" in page.name)
    elements = Elements(page.read_text(encoding="utf-8"))
    shown = readable(NASTY)
    assert any(shown in text for text in elements.inside["bdi"])
    assert "img" not in {tag for tag, _ in elements.found}


def test_the_first_page_says_in_words_what_became_of_the_cases(made):
    text = (made / "run" / "report" / "index.html").read_text(encoding="utf-8")
    plain = " ".join(re.sub(r"<[^>]+>", " ", text.partition('<section id="listing"')[0]).split())
    assert "3 of 5 scans were explained; 1 refused, 1 failed." in plain
    assert "not about the patient" in plain
    assert "For research. Not a medical device" in plain
    faults = text.partition('<section id="faults"')[2]
    assert "…/x.nii: the file is empty" in faults
    assert "Jane Roe" not in text
    assert "/secret/place" not in text


def test_a_page_holds_every_shown_voxel_of_its_own_cases_files(made):
    for page in pages(made):
        case = page.stem.partition("-")[2]
        about, volumes = geometry_of(page)
        to_file = np.array(about["toFile"])
        points = np.array(list(np.ndindex(*about["shape"])))
        in_file = tuple((points @ to_file[:, :3].T + to_file[:, 3]).T)
        files = {
            "scan": made / "scans" / f"{case}.nii.gz",
            **{f"{m} class-1": made / "run" / case / f"{case}_{m}_class-1.nii.gz"
               for m in ("grad-cam", "input-gradient", "layer-cam")},
        }  # fmt: skip
        seen = 0
        for layer, codes in zip(about["layers"], volumes, strict=True):
            if layer["kind"] == "mask":
                continue
            values = nib.load(files[layer["name"]]).get_fdata()[in_file]
            levels = np.array(layer["levels"])
            off = np.abs(levels[codes[tuple(points.T)]] - values)
            assert off.max() <= (0 if layer["exact"] else np.diff(levels).max() / 2 * 1.0001)
            assert off.max() <= 0.006 * np.ptp(values)
            seen += 1
        assert seen == 4


def reach(picture):
    """How far the brightest colour of a small picture is from grey."""
    from PIL import Image

    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    return np.ptp(pixels, axis=-1).max()


def test_on_the_same_scale_a_weak_map_looks_weak_and_on_its_own_as_strong_as_any(tmp_path):
    begin(tmp_path / "run")
    for case, scale in (("strong", 1.0), ("weak", 0.3)):
        scan = write_scan(tmp_path / "scans" / f"{case}.nii.gz", grid_of())
        add_case(tmp_path / "run", case, scan, scale=scale)
    write_report(tmp_path / "run")
    pictures = tmp_path / "run" / "report" / "pictures"
    for number in (1, 2):  # unsigned and signed
        own = [reach(pictures / f"000{n}-{case}-{number}-own.png") for n, case in ((1, "strong"), (2, "weak"))]
        same = [reach(pictures / f"000{n}-{case}-{number}-same.png") for n, case in ((1, "strong"), (2, "weak"))]
        assert own[1] == pytest.approx(own[0], abs=12)
        assert same[0] == pytest.approx(own[0], abs=12)
        assert same[1] < 0.75 * same[0]


def entry(top, status="ok", signed=False):
    return {"name": "m", "target": "t", "status": status, "signed": signed, "window": [0.0, top]}


@pytest.mark.parametrize(
    ("entries", "limits"),
    [
        ([entry(1.0), entry(3.0), entry(2.0)], (0, 3)),
        ([entry(float(n)) for n in range(1, 21)] + [entry(1000.0)], (0, 19)),  # two of 21 reach further
        ([entry(1.0), entry(9.0, "empty"), entry(8.0, "constant")], (0, 1)),
        ([entry(2.0, signed=True), entry(1.0, signed=True)], (-2, 2)),
        ([entry(5.0, "empty")], (0, 1)),
    ],
)
def test_the_scale_for_all_cases_holds_nine_tenths_of_them(entries, limits):
    cases = [Case(str(n), "done", {}, {"maps": [one]}) for n, one in enumerate(entries)]
    assert scales_of([*cases, Case("x", "failed", {})]) == {"m t": limits}


def test_a_mask_of_the_run_is_on_the_page_of_its_case(made):
    page = next(page for page in pages(made) if "permuted" in page.name)
    about, volumes = geometry_of(page)
    place = next(n for n, layer in enumerate(about["layers"]) if layer["kind"] == "mask")
    mask = np.array(about["layers"][place]["levels"])[volumes[place]]
    points = np.argwhere(mask > 0)
    centre = (points @ np.array(about["affine"])[:, :3].T + np.array(about["affine"])[:, 3]).mean(0)
    assert np.abs(centre - BLOB_MM).max() < 1
    assert 'name="masks"' in page.read_text()


def test_an_oblique_scan_is_said_to_be_shown_along_its_own_axes(made):
    tilts = {page.name.partition("-")[2]: geometry_of(page)[0]["tilt"] for page in pages(made)}
    assert "20.0°" in tilts["tilted.html"]
    assert tilts["permuted.html"] == ""


def small_run(home, cases=("one",)):
    begin(home / "run")
    for case in cases:
        scan = write_scan(home / "scans" / f"{case}.nii.gz", grid_of())
        add_case(home / "run", case, scan)
    return home / "run"


def notes_of(page):
    return " ".join(re.findall(r"<li><bdi>(.*?)</bdi>", page.read_text(encoding="utf-8")))


def kinds_of(page):
    return [layer["kind"] for layer in geometry_of(page)[0]["layers"]]


def test_a_scan_that_is_gone_or_another_is_not_shown_and_the_page_says_so(tmp_path):
    run = small_run(tmp_path)
    page = run / "report" / "cases" / "0001-one.html"
    write_scan(tmp_path / "scans" / "one.nii.gz", grid_of(), seed=9)
    write_report(run)
    assert kinds_of(page) == ["map"] * 3
    assert "its file has changed since the run" in notes_of(page)
    (tmp_path / "scans" / "one.nii.gz").unlink()
    write_report(run)
    assert kinds_of(page) == ["map"] * 3
    assert "no longer lies where the run found it" in notes_of(page)


def test_scans_that_were_moved_are_found_where_they_are_said_to_be(tmp_path):
    run = small_run(tmp_path)
    (tmp_path / "scans").rename(tmp_path / "elsewhere")
    write_report(run, scans=tmp_path / "elsewhere")
    assert "scan" in kinds_of(run / "report" / "cases" / "0001-one.html")


def test_a_map_that_is_not_the_one_written_is_not_shown(tmp_path):
    run = small_run(tmp_path)
    (run / "one" / "one_grad-cam_class-1.nii.gz").write_bytes(b"something else")
    write_report(run)
    page = run / "report" / "cases" / "0001-one.html"
    assert kinds_of(page) == ["scan", "map", "map"]
    assert "grad-cam class-1: not shown" in notes_of(page)


def test_a_report_replaces_an_earlier_one_and_nothing_else(tmp_path):
    run = small_run(tmp_path, ("one", "two"))
    write_report(run, tmp_path / "out")
    (run / "two" / "case.json").unlink()
    write_report(run, tmp_path / "out")
    assert [page.name for page in (tmp_path / "out" / "cases").iterdir()] == ["0001-one.html"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for output, single in ((tmp_path / "mine", False), (tmp_path / "mine" / "notes.txt", True), (run, False)):
        with pytest.raises(ReportError, match="something else than a report"):
            write_report(run, output, single=single)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_a_report_that_was_cut_short_says_so_and_is_written_anew(tmp_path, monkeypatch):
    run = small_run(tmp_path, ("one", "two"))

    def stop(*step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_report(run, progress=stop)
    assert "cut short" in (run / "report" / "index.html").read_text(encoding="utf-8")
    assert "cut short" not in write_report(run).read_text(encoding="utf-8")


def test_a_scan_of_more_voxels_than_a_page_holds_is_thinned_out_and_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("volsal.report.volumes.Shown.__init__.__defaults__", (2000,))
    run = small_run(tmp_path)
    write_report(run)
    page = run / "report" / "cases" / "0001-one.html"
    assert geometry_of(page)[1][0].size <= 2000
    assert "one voxel in 2, 2, 1 along the axes" in page.read_text(encoding="utf-8")


def test_what_is_no_run_or_an_empty_one_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match=r"no run\.json"):
        write_report(tmp_path)
    begin(tmp_path / "run")
    with pytest.raises(ReportError, match="no case in it yet"):
        write_report(tmp_path / "run")


def test_one_file_holds_every_case_and_needs_no_other(tmp_path):
    run = small_run(tmp_path, ("one", "two"))
    told = []
    page = write_report(run, single=True, progress=lambda *step: told.append(step))
    assert page == run / "report.html"
    found = Elements(page.read_text(encoding="utf-8")).found
    assert [a["id"] for tag, a in found if tag == "article"] == ["case-0001", "case-0002"]
    assert not (run / "report").exists()
    assert told == [("one", 1, 2), ("two", 2, 2)]


def test_one_file_that_no_browser_would_open_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("volsal.report.page._MOST_IN_ONE_FILE", 1000)
    with pytest.raises(ReportError, match="leave --single out"):
        write_report(small_run(tmp_path), single=True)


def test_a_record_of_another_version_costs_no_other_case_its_page(tmp_path):
    run = small_run(tmp_path, ("one", "two"))
    record = run / "one" / "case.json"
    record.write_text(record.read_text().replace('"target_text"', '"target_words"'))
    text = write_report(run).read_text(encoding="utf-8")
    assert [page.name for page in (run / "report" / "cases").iterdir()] == ["0001-two.html"]
    assert "1 of 2 scans was explained; 0 refused, 1 failed." in " ".join(text.split())
    assert "its case.json is none of this version" in text


def test_an_audit_is_told_with_its_rules_and_suspicious_scans_first(tmp_path):
    folder = small_run(tmp_path / "run", ("one", "two"))
    assert "No audit of these maps" in (write_report(folder).read_text())
    figure = {"value": 0.9, "low": None, "high": 1.0, "n": 2, "patients": 2, "undefined": 1, "reasons": {}}
    found = {
        "verdicts": [
            {"name": "trust", "verdict": "can be trusted", "rule": "a < b", "words": "<b>yes</b>", "figures": {}}
        ],
        "metrics": {"grad-cam": {"pointing game": figure}},
        "suspicious": [{"case": "two", "reason": "evidence in the air", "weight": 2.5}],
        "cases": ["one", "two"],
        "skipped": {},
        "map": "grad-cam",
    }
    (folder / "audit.json").write_text(json.dumps(found))
    page = write_report(folder).read_text()
    assert "No audit of these maps" not in page
    assert "2 scans were put to the audit" in page
    assert "&lt;b&gt;yes&lt;/b&gt;" in page
    assert "a &lt; b" in page
    assert "evidence in the air" in page
    assert '"suspicion"' in page
    headings = {"CLAIM": "Methods", "FUTURE-AI": "Explainability"}
    second = {**found, "target": "class-1", "suspicious": []}
    found |= {"target": "class-0", "parts": [{"id": "trust", "title": "Can it be believed?", "headings": headings}]}
    found["verdicts"][0] |= {"part": "trust", "figures": {"pairs": []}}
    found["metrics"]["grad-cam"]["pointing game"]["nulls"] = {"permuted": {**figure, "value": 0.125}}
    found |= {"limits": ["what it does not tell"], "further": [second]}
    maps = {"site": {"a": {"scans": 5, "files": ["cohort/mean.nii.gz"]}}}
    found["cohort"] = {"groups": maps, "left_out": {"two": "no grid"}}
    (folder / "audit.json").write_text(json.dumps(found))
    page = write_report(folder).read_text()
    for words in ("Of the target class-0", "Of the target class-1", "Can it be believed?", "CLAIM (Methods)",
                  "permuted 0.125", "what it does not tell", "cohort/mean.nii.gz",
                  "1 scan left out: no grid"):  # fmt: skip
        assert words in page


def test_the_report_begins_with_the_audits_verdicts_in_short_and_the_most_suspicious_case(tmp_path):
    folder = small_run(tmp_path / "run", ("one", "two"))
    told = [("recommended map", "grad-cam", "trust"), ("trust: grad-cam", "can be trusted", "trust"),
            ("trust: cam", "can be trusted", "trust"), ("random weights: cam", "failed", "trust"),
            ("random weights: grad-cam", "passed", "trust"), ("agreement", "cannot be told", "trust"),
            ("in padding", "not found", "shortcuts"), ("in a corner", "not found", "shortcuts"),
            ("<i>outside</i>", "flagged", "shortcuts")]  # fmt: skip
    verdicts = [{"name": n, "verdict": v, "part": p, "rule": "", "words": "", "figures": {}} for n, v, p in told]
    found = {
        "verdicts": verdicts, "metrics": {}, "cases": ["one", "two"], "skipped": {}, "map": "grad-cam",
        "suspicious": [{"case": "two", "reason": "evidence in the air", "weight": 2.5}],
        "parts": [{"id": "trust", "title": "Believed?", "headings": {}},
                  {"id": "shortcuts", "title": "Shortcuts?", "headings": {}}],
    }  # fmt: skip
    (folder / "audit.json").write_text(json.dumps(found))
    page = " ".join(re.sub(r"</?(b|td|tr|th)[^>]*>", " ", write_report(folder).read_text()).split())
    assert (
        "Believed? grad-cam : recommended map; can be trusted : grad-cam, cam; failed : random weights: cam; "
        "passed : 1 rule; cannot be told : 1 rule. "
        "Shortcuts? flagged : &lt;i&gt;outside&lt;/i&gt;; not found : 2 rules."
    ) in page
    content = json.loads(re.search(r'class="content"[^>]*>(.*?)</script>', page).group(1))
    assert content["columns"][content["order"]]["label"] == "suspicion"
    found["suspicious"] = []
    (folder / "audit.json").write_text(json.dumps(found))
    content = json.loads(re.search(r'class="content"[^>]*>(.*?)</script>', write_report(folder).read_text()).group(1))
    assert content["order"] == 0


def test_what_is_counted_at_a_glance_are_the_audits_own_words_for_nothing_amiss():
    assert {check_verdicts.PASSED, verdicts.CLEAR, trust.UNDECIDED} == _QUIET


def test_a_report_without_a_sensible_audit_says_that_there_is_none(tmp_path):
    folder = small_run(tmp_path / "run", ("one", "two"))
    (folder / "audit.json").write_text("[]")
    assert "No audit of these maps" in write_report(folder).read_text()
