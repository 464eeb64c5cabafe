import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.patches import Circle
from turned_phantom import BLOB_MM, ORIENTATIONS, phantom, stored_as, tilted

from volsal.display import PLANES, Upright
from volsal.report import Row, montage, save, three_planes
from volsal.scans import Scan


def case_of(codes="RAS", degrees=0.0):
    values, grid = phantom()
    values, grid = stored_as(values, tilted(grid, degrees), codes)
    at = grid.world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1))
    blob = np.exp(-((at - BLOB_MM) ** 2).sum(-1) / (2 * 6.0**2)).astype(np.float32)
    return Scan(np.ones_like(values), grid), blob


def pixels(figure):
    """(height, width, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def words(figure):
    texts = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        texts += [text.get_text() for text in axes.texts]
        texts += [axes.get_title(), axes.get_title(loc="left"), *(tick.get_text() for tick in axes.get_yticklabels())]
    return texts


def panels(figure):
    return dict(zip(PLANES, figure.axes, strict=False))


def pixel_of(axes, plane, upright, point):
    view = PLANES[plane]
    return axes.transData.transform(upright.shown(point)[[view.across, view.up]])


def coloured_at(picture, axes):
    """Where, in pixels from the lower left of the figure, the colour in ``axes`` is."""
    box = axes.get_window_extent()
    x0, x1, y0, y1 = (round(edge) for edge in (box.x0, box.x1, box.y0, box.y1))
    inner = picture[::-1][y0:y1, x0:x1].astype(float)
    weight = inner.max(axis=-1) - inner.min(axis=-1)
    weight[weight < 60] = 0
    rows, columns = np.indices(weight.shape)
    return np.array([x0 + (weight * columns).sum() / weight.sum(), y0 + (weight * rows).sum() / weight.sum()])


@pytest.mark.parametrize("convention", ["radiological", "neurological"])
@pytest.mark.parametrize("degrees", [0.0, 16.5])
def test_the_blob_is_drawn_at_its_millimetres_in_all_three_planes(degrees, convention):
    scan, blob = case_of("LAS", degrees)
    # Half its height and more, or the transparent rim would weigh in; no crosshair colour either, it is at the middle.
    figure = three_planes(scan, blob, at_mm=BLOB_MM, convention=convention, window=(0.3, 1))
    for axes in panels(figure).values():
        for line in list(axes.lines):
            line.remove()
    picture = pixels(figure)
    upright = Upright(scan.grid)
    for plane, axes in panels(figure).items():
        found, expected = coloured_at(picture, axes), pixel_of(axes, plane, upright, BLOB_MM)
        per_mm = np.abs(axes.transData.transform((1, 1)) - axes.transData.transform((0, 0)))
        assert (np.abs(found - expected) / per_mm < 1.0).all(), plane  # mm
        middle = axes.transAxes.transform((0.5, 0.5))
        right_is_left = convention == "radiological"
        assert (found[0] < middle[0]) == right_is_left, plane
        assert found[1] > middle[1], plane


@pytest.mark.parametrize("codes", ORIENTATIONS[::3])
def test_the_figure_is_the_same_however_the_scan_is_stored(codes):
    expected = pixels(three_planes(*case_of("RAS"), at_mm=BLOB_MM))
    np.testing.assert_allclose(pixels(three_planes(*case_of(codes), at_mm=BLOB_MM)).astype(int), expected, atol=1)


def test_a_millimetre_is_a_millimetre_in_every_panel_and_direction():
    figure = three_planes(*case_of())
    scales = [
        np.abs(axes.transData.transform((1, 1)) - axes.transData.transform((0, 0))) for axes in panels(figure).values()
    ]
    np.testing.assert_allclose(scales, scales[0][0], rtol=1e-6)
    assert [axes.get_aspect() for axes in panels(figure).values()] == ["auto"] * 3


def test_the_scale_bar_is_as_long_as_it_says():
    figure = three_planes(*case_of())
    axes = panels(figure)["axial"]
    (text,) = [text for text in axes.texts if text.get_text().endswith(" mm")]
    said = float(text.get_text().split()[0])
    bar = axes.lines[-1]
    ends = bar.get_transform().transform(bar.get_xydata())
    per_mm = abs(axes.transData.transform((1, 0))[0] - axes.transData.transform((0, 0))[0])
    assert np.ptp(ends[:, 0]) / per_mm == pytest.approx(said)


@pytest.mark.parametrize(("convention", "left"), [("radiological", "R"), ("neurological", "L")])
def test_letters_stand_on_the_sides_they_name(convention, left):
    figure = three_planes(*case_of("PSR"), convention=convention)
    for plane, view in PLANES.items():
        axes = panels(figure)[plane]
        for text in axes.texts:
            name, (x, y) = text.get_text(), text.get_position()
            if name not in tuple("RLAPSI"):
                continue
            axis = next(axis for axis, pair in enumerate(("RL", "AP", "SI")) if name in pair)
            grows = name in "RAS"
            if axis == view.across:
                # Data coordinates are displayed mm, which grow to the right, anterior and superior.
                low, high = axes.get_xlim()
                assert (x > 0.5) == ((high > low) == grows), (plane, name)
            else:
                assert axis == view.up
                assert (y > 0.5) == grows, (plane, name)
    nearest_left = min(panels(figure)["axial"].texts, key=lambda text: abs(text.get_position()[0] - 0.02))
    assert nearest_left.get_text() == left


def test_words_tell_convention_position_tilt_unit_and_window():
    scan, blob = case_of("LAS", 16.5)
    figure = three_planes(scan, blob, window=(0.1, 0.9), unit="probability", title="case 7", marks_mm=[BLOB_MM])
    said = " ".join(" ".join(words(figure)).split())
    for expected in ("patient's right is on the left", "tilted 16.5°", "scanner RAS+", "ring: marked", "case 7"):
        assert expected in said
    for expected in ("0.1", "0.5", "0.9", "probability"):
        assert expected in words(figure)


def test_an_empty_map_looks_empty_and_says_so():
    scan, blob = case_of()
    for window in ((0.0, 0.0), (0.0, 1.0)):
        figure = three_planes(scan, blob * 0, window=window, at_mm=BLOB_MM)
        assert "no positive evidence" in words(figure)
        drawn = three_planes(scan, None, at_mm=BLOB_MM)
        box = panels(figure)["coronal"].get_window_extent().frozen()
        inside = np.s_[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)]
        np.testing.assert_array_equal(pixels(figure)[::-1][inside], pixels(drawn)[::-1][inside])


def test_a_signed_map_shows_both_signs_around_zero():
    scan, blob = case_of()
    figure = three_planes(scan, -blob, window=(-1, 0.5), signed=True, at_mm=BLOB_MM)
    x, y = pixel_of(panels(figure)["axial"], "axial", Upright(scan.grid), BLOB_MM)
    red, _, blue = pixels(figure)[::-1][round(y), round(x)].astype(int)
    assert blue > red
    assert {"-1", "0", "1"} <= set(words(figure))


def test_without_a_position_the_cut_goes_through_the_peak():
    scan, blob = case_of("SPL")
    peak = scan.grid.world(np.unravel_index(blob.argmax(), blob.shape))
    assert "cut at ({:.1f}, {:.1f}, {:.1f}) mm".format(*peak) in " ".join(
        " ".join(words(three_planes(scan, blob))).split()
    )


def test_a_mark_off_the_plane_is_dashed():
    scan, blob = case_of()
    figure = three_planes(scan, blob, at_mm=BLOB_MM, marks_mm=[BLOB_MM, BLOB_MM - (0, 0, 20)])
    styles = {
        plane: [patch.get_linestyle() for patch in axes.patches if isinstance(patch, Circle)]
        for plane, axes in panels(figure).items()
    }
    assert styles["axial"][0] == "solid" != styles["axial"][1]
    assert styles["coronal"] == ["solid", "solid"]


def rows():
    scan, blob = case_of("LPS")
    oblique, other = case_of("PSR", 16.5)
    return [
        Row("found", scan, [("lrp", blob, (0, 1)), ("cam", blob * 2, (0, 2))], BLOB_MM, note="4.1 mm"),
        Row("oblique", oblique, [("cam", other * 0, (0, 0)), ("signed", 0.2 - other, (-1, 1))]),
        Row("failed", scan, []),
    ]


def test_a_montage_has_a_column_for_each_method_and_says_what_is_missing(tmp_path):
    figure = montage(rows(), tmp_path / "deep" / "montage.png")
    said = words(figure)
    assert [title for title in said if title in ("scan", "lrp", "cam", "signed")] == ["scan", "lrp", "cam", "signed"]
    for expected in (
        "found",
        "oblique",
        "failed",
        "4.1 mm",
        "16.5° oblique",
        "no positive evidence",
        "0 … 2",
        "-1 … 1",
    ):
        assert expected in said
    assert said.count("no map") == 5
    picture = imread(tmp_path / "deep" / "montage.png")
    assert picture.shape[0] > 300
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["montage.png"]


def test_every_cell_of_a_montage_row_shows_the_plane_of_the_mark():
    scan, blob = case_of("ILA")
    figure = montage([Row("a", scan, [("lrp", blob, (0.3, 1))], BLOB_MM)])
    cell = figure.axes[1]
    for patch in list(cell.patches):
        patch.remove()
    found = coloured_at(pixels(figure), cell)
    expected = pixel_of(cell, "axial", Upright(scan.grid), BLOB_MM)
    per_mm = np.abs(cell.transData.transform((1, 1)) - cell.transData.transform((0, 0)))
    assert (np.abs(found - expected) / per_mm < 1.0).all()
    np.testing.assert_allclose(per_mm[0], per_mm[1])


def test_one_window_for_all_stands_once_at_the_colour_bar():
    scan, blob = case_of()
    said = words(montage([Row("a", scan, [("lrp", blob, (0, 0.7)), ("cam", blob, (0, 0.7))])]))
    assert {"0", "0.7"} <= set(said)
    assert not any("…" in text for text in said)


def test_a_figure_is_saved_whole(tmp_path):
    save(three_planes(*case_of()), tmp_path / "figure.png")
    assert imread(tmp_path / "figure.png").shape[2] in (3, 4)
    assert len(list(tmp_path.iterdir())) == 1


def test_figures_need_no_pyplot_and_matplotlib_only_when_drawn():
    code = "import sys, volsal.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys, numpy as np; from volsal.scans import Scan; from volsal.report import three_planes;"
        "three_planes(Scan.from_array(np.ones((4, 5, 6)), np.eye(4))).savefig('/dev/null', format='png');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
