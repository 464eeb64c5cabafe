"""What a notebook shows of an explanation."""

import base64
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from made_runs import BLOB_MM, grid_of, maps_of, write_scan
from PIL import Image

from volsal.explanation import Explanation, Prediction
from volsal.report.animation import save_gif
from volsal.report.figures import Row, montage
from volsal.scans import read_scan

NASTY = "<script>alert(1)</script>\"'>&$\\nosuch$\u202e"


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture
def explanation(tmp_path):
    grid = grid_of("PSL", 20)
    scan = read_scan(write_scan(tmp_path / "scan.nii.gz", grid))
    said = Prediction((0.5, 1.25), 1, "lesion")
    return Explanation("case", scan, said, tuple(maps_of(grid)), ("one note",), {})


def picture(attributes):
    head, _, content = attributes["src"].partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(BytesIO(base64.b64decode(content))).convert("RGB")).astype(int)


def coloured(image):
    """Pixels that are neither grey nor of the colour bar at the right, nor of the bluish crosshair."""
    panels = image[:, : int(0.85 * image.shape[1])]
    return int(((panels[..., 0] - panels[..., 2]) > 60).sum())


def test_shows_the_prediction_and_every_map_with_its_peak(explanation):
    elements = Elements(explanation._repr_html_())
    words = " ".join(" ".join(elements.texts).split())
    assert "case : class 1 (lesion), logits 0.5, 1.25" in words
    assert len(elements.all("img")) == 3
    assert [("open" in details) for details in elements.all("details")] == [True, False, False]
    peak = explanation.maps[0].peak_mm
    assert np.abs(np.array(peak) - BLOB_MM).max() < 2
    assert f"at ({peak[0]:.1f}, {peak[1]:.1f}, {peak[2]:.1f}) mm" in words
    assert "one note" in words
    for attributes in elements.all("img"):
        assert attributes["alt"].startswith("axial, coronal and sagittal plane: logit of class 1")
        assert picture(attributes).shape[1] > 600


def test_an_empty_map_looks_empty_and_is_called_so(explanation):
    html = explanation._repr_html_()
    full, _, empty = (picture(attributes) for attributes in Elements(html).all("img"))
    assert coloured(full) > 200
    assert coloured(empty) < 0.3 * coloured(full)  # the verdict's own yellow words
    assert "block3: no positive evidence" in html


def test_whatever_the_names_hold_is_shown_as_text(explanation):
    maps = tuple(
        replace(one, target_text=NASTY, unit=NASTY, layer=NASTY, method_name=NASTY) for one in explanation.maps
    )
    nasty = replace(explanation, prediction=Prediction((1.0, 2.0), 1, NASTY), maps=maps, notes=(NASTY,))
    html = nasty._repr_html_()
    elements = Elements(html)
    assert {tag for tag, _ in elements.found} == {"div", "p", "b", "bdi", "details", "summary", "img", "ul", "li"}
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    assert "\u202e" not in html
    assert "alert(1)" in " ".join(elements.texts)


def test_the_piece_asks_for_nothing_outside_of_it(explanation):
    text = re.sub(r"base64,[^\"]*", "", explanation._repr_html_())
    assert not re.search(r"https?:|src=\"(?!data:)|href|url\(", text)


def test_of_many_maps_the_first_are_pictures_and_all_are_told(explanation):
    many = replace(explanation, maps=explanation.maps[2:] * 9)
    elements = Elements(many._repr_html_())
    assert len(elements.all("img")) == 6
    assert len(elements.all("summary")) == 9


def test_dollar_signs_in_names_are_no_formulas(explanation, tmp_path):
    scan, blob = explanation.scan, explanation.maps[0]
    montage([Row("a $\\no$", scan, [("$\\no$", blob.values, blob.window)], note="$\\no$")], tmp_path / "montage.png")
    save_gif(tmp_path / "parts.gif", scan.array, [blob.values], ["$\\no$"], "$\\no$", (5, 5, 5), grid=scan.grid)
    for name in ("montage.png", "parts.gif"):
        assert (tmp_path / name).stat().st_size > 1000


def test_matplotlib_is_imported_when_something_is_drawn_and_not_before():
    code = "import volsal.explanation, sys; print('matplotlib' in sys.modules, 'jinja2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
