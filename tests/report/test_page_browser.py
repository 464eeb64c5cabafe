"""The report in a real Chromium, from the disk: what a person sees and reads there against what the files hold."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from made_runs import BLOB_MM, add_case, begin, fault, grid_of, write_scan

from volsal.report.page import write_report

BROWSER = Path(__file__).parents[2] / "scripts" / "bench" / "browser.py"
HOSTILE = "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">\u202e'ñ漢"


@pytest.fixture(scope="module", autouse=True)
def chromium():
    done = subprocess.run([sys.executable, "-c", "import PyQt6.QtWebEngineCore"], capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2]
        pytest.skip(f"needs Qt's Chromium, PyQt6-WebEngine of the dependency group 'test', and its libraries: {why}")


def browse(page, *steps, size=(1200, 900)):
    """The answers of the steps; fails where the browser complains, or asks for anything that is not on the disk."""
    script = {"page": page.as_uri(), "size": size, "steps": steps}
    environment = {**os.environ, "QT_QPA_PLATFORM": "offscreen"}
    done = subprocess.run(
        [sys.executable, str(BROWSER)], input=json.dumps(script), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert [line for line in told["console"] if "willReadFrequently" not in line] == []  # advice to whoever tests
    assert [address for address in told["requests"] if not address.startswith(("file:///", "data:"))] == []
    return told["answers"]


CASES = {
    "permuted": grid_of("PSL"),
    "tilted": grid_of("LAS", 20),
    "thick": grid_of("RPI", 0, (44, 36, 9), (1.0, 1.2, 4.0)),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp("home <b> & ü '")
    inputs = {case: {"label": None, "groups": {"site": "AB"[n % 2]}, "masks": {}} for n, case in enumerate(CASES)}
    made = begin(home / "run", inputs | {"lost": {}, "hostile": {"label": HOSTILE, "groups": {}, "masks": {}}})
    for number, (case, grid) in enumerate(CASES.items()):
        add_case(home / "run", case, write_scan(home / "scans" / f"{case}.nii.gz", grid, number), scale=3 - number)
    scan = write_scan(home / "scans" / "hostile.nii.gz", grid_of())
    add_case(home / "run", "hostile", scan, class_name=HOSTILE, notes=[HOSTILE], target_text=HOSTILE)
    fault(made, "lost", reason=HOSTILE)
    write_report(home / "run")
    write_report(home / "run", single=True)
    return home / "run"


def page_of(run, case):
    return next((run / "report" / "cases").glob(f"*-{case}.html"))


# The viewer has drawn, and said, all that it was asked for.
READY = {"until": "document.querySelector('.viewer').dataset.ready"}
READ = {
    "do": "window.before = document.querySelector('.readout .world').textContent;"
    "return ['voxel', 'world', 'value', 'scan'].map(n => document.querySelector(`.readout .${n}`).textContent)"
}
LISTED = {"until": "document.querySelector('.listing')?.dataset.ready"}
MOVED = {"until": "document.querySelector('.readout .world').textContent !== window.before"}


def field(name, value, event="input"):
    return {"do": f"const f = document.querySelector('.viewer [name={name}]'); f.value = {json.dumps(value)};"
                  f"f.dispatchEvent(new Event('{event}', {{bubbles: true}})); return f.value"}  # fmt: skip


def tick(name, on):
    return {
        "do": f"const f = document.querySelector('.viewer [name={name}]');if (f.checked !== {json.dumps(on)}) f.click()"
    }


def choose_map(number):
    return {
        "do": f"const s = document.querySelector('.viewer [name=map]'); s.selectedIndex = {number};"
        "s.dispatchEvent(new Event('change'))"
    }


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e[-+]?\d+)?", text.replace("−", "-"))]


def click_in(plane, across, up):
    """A press at a share of the width and height (from the lower left) of a plane."""
    return {
        "do": f"""const c = document.querySelectorAll('.planes canvas')[{plane}], b = c.getBoundingClientRect();
        c.setPointerCapture = () => 0;
        c.dispatchEvent(new PointerEvent('pointerdown', {{clientX: b.left + {across} * b.width,
            clientY: b.top + (1 - {up}) * b.height, bubbles: true, buttons: 1}}))"""
    }


@pytest.mark.parametrize("case", CASES)
def test_the_crosshair_reads_the_files_values_at_the_voxel_and_position_it_names(run, case):
    moves = [click_in(0, 0.4, 0.6), click_in(1, 0.55, 0.45), click_in(2, 0.3, 0.5)]
    steps = [READY, READ]
    for method in range(2):
        steps += [choose_map(method), READY]
        for move in moves:
            steps += [move, READY, READ]
    answers = browse(page_of(run, case), *steps)
    scan = nib.load(run.parent / "scans" / f"{case}.nii.gz")
    seen = set()
    readings = [answers[1], *[answer for answer in answers[2:] if isinstance(answer, list)]]
    assert len(readings) == 7
    for number, (voxel, world, value, grey) in enumerate(readings):
        method = "input-gradient" if number > 3 else "grad-cam"
        ijk = tuple(int(n) for n in numbers(voxel))
        seen.add((method, ijk))
        assert np.abs(np.array(numbers(world)) - nib.affines.apply_affine(scan.affine, ijk)).max() <= 0.051
        for text, image in ((value, nib.load(run / case / f"{case}_{method}_class-1.nii.gz")), (grey, scan)):
            shown, off = [*numbers(text), 0.0][:2] if "±" in text else (numbers(text)[0], 1e-6)
            assert abs(shown - image.get_fdata()[ijk]) <= off
            assert off <= 0.006 * np.ptp(image.get_fdata())
    assert len(seen) >= 6
    # Each plane is as wide as its canvas, and the patient's right, or front, is on the left.
    shape, spacing = (np.array(part) for part in (CASES[case].shape, CASES[case].spacing))
    axis = ["RL".find(code) >= 0 for code in CASES[case].orientation].index(True)
    for reading, share in ((1, 0.4), (2, 0.55)):
        expected = (0.5 - share) * shape[axis] * spacing[axis]
        assert numbers(readings[reading][1])[0] == pytest.approx(expected, abs=spacing[axis])


@pytest.mark.parametrize(
    ("case", "convention"), [("permuted", "radiological"), ("tilted", "neurological"), ("thick", "radiological")]
)
def test_the_threshold_hides_what_it_should_on_the_side_where_it_lies(run, case, convention):
    grid = CASES[case]
    image = nib.as_closest_canonical(nib.load(run / case / f"{case}_grad-cam_class-1.nii.gz"))
    values = image.get_fdata()
    peak = np.rint(nib.affines.apply_affine(np.linalg.inv(image.affine), BLOB_MM)).astype(int)
    axial = values[:, :, peak[2]].T
    axial = axial[::-1, ::-1] if convention == "radiological" else axial[::-1]
    rows, columns = axial.shape
    # How far the pixels at the voxels' centres are from grey.  The plane is as wide as its canvas, and to scale.
    spacing = nib.affines.voxel_sizes(image.affine)
    tall = rows * spacing[1] / (columns * spacing[0])
    read = {
        "do": f"""const c = document.querySelector('.planes canvas'), x = c.getContext('2d'), w = c.width;
        const top = (c.height - {tall} * w) / 2;
        return Array.from({{length: {rows}}}, (_, row) => Array.from({{length: {columns}}}, (_, column) => {{
            const at = [(column + .5) / {columns} * w, top + (row + .5) / {rows} * {tall} * w];
            const [r, g, b] = x.getImageData(...at, 1, 1).data;
            return Math.max(r, g, b) - Math.min(r, g, b); }}))"""
    }
    steps = [READY, tick("cross", False), tick("smooth", False), field("convention", convention, "input")]
    for threshold in ("0", "0.5", "0.9"):
        steps += [field("threshold", threshold), READY, read]
    answers = browse(page_of(run, case), *steps, size=(1200, 1400))
    tables = [np.array(answer) for answer in answers if isinstance(answer, list)]
    window = values.max()
    away = np.ones_like(axial, dtype=bool)  # from the letters and the scale bar on the rim
    away[:2], away[-4:], away[:, :2], away[:, -2:] = False, False, False, False
    for threshold, table in zip((0.0, 0.5, 0.9), tables, strict=True):
        # A faint value has little opacity, so only clear ones must be seen.
        clear = away & (axial >= max(threshold, 0.2) * window * 1.02)
        hidden = away & (axial < threshold * window * 0.98) | away & (axial == 0)
        assert clear.any()
        assert (table[clear] > 12).all()
        assert (table[hidden] <= 2).all()
    across = np.argwhere(tables[1] > 12)[:, 1].mean() / columns
    assert (across < 0.5) == (convention == "radiological")  # the blob is on the patient's right
    assert grid.world((np.array(grid.shape) - 1) / 2)[0] < BLOB_MM[0]


def test_keys_and_wheel_move_through_the_scan(run):
    focus = {"do": "document.querySelector('.planes canvas').focus()"}
    middle = {
        "do": """const b = document.querySelector('.planes canvas').getBoundingClientRect();
        return [Math.round(b.left + b.width / 2), Math.round(b.top + b.height / 2)]"""
    }
    x, y = browse(page_of(run, "permuted"), READY, middle)[-1]
    keys = ["PageUp", "Up", "Left", "Home"]
    presses = [step for key in keys for step in ({"press": key}, MOVED, READY, READ)]
    answers = browse(page_of(run, "permuted"), READY, focus, READ, *presses, {"wheel": [x, y, 1]}, MOVED, READY, READ)
    positions = [numbers(answer[1]) for answer in answers if isinstance(answer, list)]
    moves = np.diff(positions, axis=0)
    assert moves[0] == pytest.approx([0, 0, 3], abs=0.11)  # axial: towards the head
    assert moves[1] == pytest.approx([0, 1.5, 0], abs=0.11)
    assert moves[2] == pytest.approx([2, 0, 0], abs=0.11)  # left on the screen is the patient's right
    assert positions[4] == positions[0]
    assert moves[4] == pytest.approx([0, 0, 3], abs=0.11)


def test_an_empty_map_looks_empty_and_is_called_so(run):
    colours = {
        "do": """const c = document.querySelector('.planes canvas');
        const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let most = 0;
        for (let n = 0; n < d.length; n += 4)
            most = Math.max(most, Math.abs(d[n] - d[n + 1]), Math.abs(d[n] - d[n + 2]));
        return most"""
    }
    says = {
        "do": "return [document.querySelector('.verdict').textContent, document.querySelector('[name=peak]').disabled]"
    }
    answers = browse(
        page_of(run, "tilted"), READY, tick("cross", False), READY, colours, choose_map(2), READY, colours, says
    )
    assert answers[3] > 60
    assert answers[6:] == [0, ["no positive evidence", True]]


def test_the_tilt_is_said_and_the_other_convention_too(run):
    words = {"do": "return document.querySelector('.viewer .hint').textContent"}
    told = browse(page_of(run, "tilted"), READY, words, field("convention", "neurological"), READY, words)
    assert "tilted 20.0° from the patient's axes" in told[1]
    assert "patient's right is on the left of the screen" in told[1]
    assert "patient's right is on the right of the screen" in told[-1]


def test_the_list_is_filtered_and_ordered_as_asked(run):
    cases = {"do": "return [...document.querySelectorAll('.cases tbody th')].map(e => e.textContent)"}
    cards = {"do": "return [...document.querySelectorAll('.gallery b')].map(e => e.textContent)"}

    card = {
        "do": "return [document.querySelector('.gallery li').innerText, document.querySelector('.gallery img').src]"
    }

    def choose(label, value):
        return {
            "do": f"""const labels = [...document.querySelectorAll('.tools label')];
            const l = labels.find(e => e.textContent.startsWith('{label}'));
            const s = l.querySelector('select, input'); s.value = '{value}'; s.dispatchEvent(new Event('change'));
            s.dispatchEvent(new Event('input'))"""
        }

    heading = {
        "do": "[...document.querySelectorAll('.cases th button')].find(b => b.textContent.startsWith('max')).click()"
    }
    sorted_by = {"do": "return document.querySelector('[aria-sort=descending], [aria-sort=ascending]').textContent"}
    loaded = {"do": "return [...document.images].every(i => i.complete && i.naturalWidth > 100)"}
    answers = browse(
        run / "report" / "index.html",
        {"until": "document.querySelector('.listing').dataset.ready"}, cases, loaded,
        heading, cases, cards, sorted_by, heading, cases,
        choose("site", "B"), cases, choose("site", ""), choose("search", "refused"), cases,
        choose("search", "PERM done"), cases,
        choose("map", "layer-cam class-1"), card,
    )  # fmt: skip
    found = [answer for answer in answers if isinstance(answer, list)]
    everything = ["hostile", "lost", "permuted", "thick", "tilted"]
    assert found[0] == everything
    assert answers[2] is True
    top = {c: nib.load(run / c / f"{c}_grad-cam_class-1.nii.gz").get_fdata().max() for c in everything if c != "lost"}
    assert found[1] == [*sorted(top, key=top.get, reverse=True), "lost"]
    assert found[2] == found[1][:4]
    assert "maximum" in next(answer for answer in answers if isinstance(answer, str) and answer.startswith("max"))
    assert found[3] == [*sorted(top, key=top.get), "lost"]
    assert found[4:-1] == [["tilted"], ["lost"], ["permuted"]]
    assert "no positive evidence" in found[-1][0]
    assert found[-1][1].endswith("-permuted-3-same.png")


def test_the_pictures_have_one_scale_for_all_cases_unless_each_is_given_its_own(run):
    def choose(scale):
        return {"do": f"const s = document.querySelector('.tools [name=scale]'); s.value = '{scale}';"
                      "s.dispatchEvent(new Event('change'))"}  # fmt: skip

    loaded = {"until": "[...document.images].every(i => i.complete && i.naturalWidth > 100)"}
    shown = {
        "do": """const cards = [...document.querySelectorAll('.gallery li')];
        const read = card => [card.querySelector('b').textContent, card.querySelector('.scale').innerText,
            card.querySelector('img').src.split('-').pop()];
        return {words: document.querySelector('.scale-words').innerText, cards: cards.map(read),
            ramps: document.querySelectorAll('.ramp').length}"""
    }
    index = run / "report" / "index.html"
    answers = browse(index, LISTED, loaded, shown, choose("own"), loaded, shown, choose("same"), loaded, shown)
    same, own, again = (answer for answer in answers if isinstance(answer, dict))
    # The four blobs reach 1, 3, 2 and 1; the scale, the largest.
    tops = {"hostile": 1, "permuted": 3, "thick": 1, "tilted": 2}
    measured = {c: nib.load(run / c / f"{c}_grad-cam_class-1.nii.gz").get_fdata().max() for c in tops}
    assert "the same colour is the same value" in same["words"]
    assert numbers(same["words"])[-1] == pytest.approx(max(measured.values()), rel=0.05)
    assert same["ramps"] == 1
    assert [(name, file) for name, _, file in same["cards"]] == [(name, "same.png") for name in tops]
    for name, words, _ in same["cards"]:
        assert words.startswith("up to ")
        assert numbers(words)[0] == pytest.approx(measured[name], rel=0.05)
        assert "beyond" not in words
    assert "as strong as any other" in own["words"]
    assert own["ramps"] == 4
    assert {file for _, _, file in own["cards"]} == {"own.png"}
    assert again == same


def test_names_from_files_do_nothing_in_a_browser(run):
    look = {"do": "return [document.title, document.querySelectorAll('script').length, document.images.length,"
                  "document.body.textContent.includes(\"<script>document.title='pwned'</script>\")]"}  # fmt: skip
    case = browse(page_of(run, "hostile"), READY, look)[-1]
    first = browse(run / "report" / "index.html", LISTED, look)[-1]
    assert case == ["hostile", 1 + 1 + 4, 0, True]  # the page's own, the geometry, the scan and three maps
    assert first == ["Saliency report: run", 2, 4, True]


def test_one_file_turns_from_the_list_to_a_case_and_back(run):
    seen = {"do": "return [...document.querySelectorAll('article, main')].filter(e => e.offsetParent).map(e => e.id)"}
    link = {"do": "document.querySelector('.gallery a').click()"}
    back = {
        "do": "const links = [...document.querySelectorAll('nav a')].filter(a => a.offsetParent);"
        "links.find(a => a.textContent === 'all cases').click()"
    }
    ready = {"until": "document.querySelector('article:target .viewer')?.dataset.ready"}
    listed = {"until": "!document.querySelector('article:target')"}
    answers = browse(run / "report.html", LISTED, seen, link, ready, seen, back, listed, seen)
    assert [answer for answer in answers if isinstance(answer, list)] == [["first"], ["case-0001"], ["first"]]


def test_it_prints(run, tmp_path):
    files = [tmp_path / "case.pdf", tmp_path / "first.pdf"]
    index = {"open": (run / "report" / "index.html").as_uri()}
    browse(page_of(run, "permuted"), READY, {"print": str(files[0])}, index, LISTED, {"print": str(files[1])})
    for file in files:
        content = file.read_bytes()
        assert content.startswith(b"%PDF")
        assert b"/Image" in content
