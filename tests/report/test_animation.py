import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from turned_phantom import BLOB_MM, phantom, stored_as

from volsal.display import DisplayError, colours
from volsal.grid import Grid
from volsal.report.animation import View, animate, save_gif


def frames(path):
    """(frames, height, width, 3) of whole numbers, as a viewer shows them."""
    with Image.open(path) as gif:
        shown = []
        for number in range(gif.n_frames):
            gif.seek(number)
            shown.append(np.asarray(gif.convert("RGB")).astype(int))
    return np.stack(shown)


def difference(one, other):
    return np.abs(one - other).max(axis=-1)


def halves(*values):
    """Parts whose left half has the first value of a pair, and the right half the second."""
    return np.stack([np.repeat(np.repeat([pair], 12, 0), 6, 1).astype(float) for pair in values])


def sides(frame):
    """The colours in the middle of the left and of the right half of a single view."""
    rows = slice(120, 180)  # well inside the picture
    inner = np.median(frame[rows, 40:90], axis=(0, 1)), np.median(frame[rows, 170:220], axis=(0, 1))
    return np.array(inner)


def test_has_a_frame_for_each_part_and_runs_for_ever(tmp_path):
    parts = halves((0, 1), (1, 0), (0.5, 0.5))
    animate(tmp_path / "deep" / "a.gif", [View(np.zeros((12, 12)), parts)], ["x", "y", "z"], milliseconds=250)
    with Image.open(tmp_path / "deep" / "a.gif") as gif:
        assert (gif.n_frames, gif.info["duration"], gif.info["loop"]) == (3, 250, 0)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.gif"]


def test_a_value_has_one_colour_in_all_frames_and_places(tmp_path):
    parts = halves((1, 0), (0.5, 1), (0.01, 0.5))
    animate(tmp_path / "a.gif", [View(np.zeros((12, 12)), parts)], ["x", "y", "z"], grey=(0, 1))
    (top, empty), (half, same_top), (faint, same_half) = (sides(frame) for frame in frames(tmp_path / "a.gif"))
    assert np.abs(top - same_top).max() == 0
    assert np.abs(half - same_half).max() == 0
    assert np.abs(top - half).max() > 40
    assert np.abs(empty).max() < 12  # the black background
    assert np.abs(faint - empty).max() < 12  # not stretched to its own maximum
    ramp = colours()
    expected = 255 * ramp[-1, :3] * ramp[-1, 3]  # over black
    assert np.abs(top - expected).max() < 12


def test_signs_have_their_own_colours_around_zero(tmp_path):
    animate(tmp_path / "a.gif", [View(np.zeros((12, 12)), halves((1, -1), (0, -0.5)))], ["x", "y"], grey=(0, 1))
    (warm, cold), (none, _) = (sides(frame) for frame in frames(tmp_path / "a.gif"))
    assert warm[0] > warm[2] + 40
    assert cold[2] > cold[0] + 40
    assert none.max() < 12


def test_every_frame_says_which_part_it_is(tmp_path):
    animate(tmp_path / "a.gif", [View(np.zeros((12, 12)), halves((0, 1), (0, 1)))], ["channel 7", "channel 12"])
    first, second = frames(tmp_path / "a.gif")
    rows = np.nonzero(difference(first, second).any(axis=1))[0]
    assert len(rows)
    assert rows.max() < 40  # the title, and nothing else


@pytest.mark.parametrize("codes", ["LPS", "ASR", "IRP"])
def test_three_planes_are_the_same_however_the_volume_is_stored(tmp_path, codes):
    def save(name, codes):
        values, grid = stored_as(*phantom(), codes)
        at = grid.world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1))
        blob = np.exp(-((at - BLOB_MM) ** 2).sum(-1) / (2 * 6.0**2))
        voxel = np.round(grid.voxel(BLOB_MM)).astype(int)
        save_gif(tmp_path / name, np.ones_like(values), np.stack([blob, -blob]), ["a", "b"], "logit", voxel, grid=grid)
        return frames(tmp_path / name)

    expected = save("ras.gif", "RAS")
    assert difference(save("turned.gif", codes), expected).max() <= 12
    # BLOB_MM lies right, anterior and superior of the middle: left of the axial picture's middle, and above it.
    colour = expected[0].max(axis=-1) - expected[0].min(axis=-1)
    colour[colour < 60] = 0
    axial = colour[52:308, 6:210]
    rows, columns = np.indices(axial.shape)
    assert (axial * columns).sum() / axial.sum() < axial.shape[1] / 2
    assert (axial * rows).sum() / axial.sum() < axial.shape[0] / 2


def test_without_a_grid_the_planes_go_through_the_voxel_along_the_arrays_axes(tmp_path):
    background, parts = np.zeros((9, 7, 5)), np.zeros((1, 9, 7, 5))
    parts[0, 6, 2, 1] = 1.0
    save_gif(tmp_path / "a.gif", background, parts, ["one"], "logit", (6, 2, 1))
    save_gif(tmp_path / "b.gif", background, parts, ["one"], "logit", (5, 3, 2))
    through, beside = (frames(tmp_path / name)[0] for name in ("a.gif", "b.gif"))
    left_of_the_bar = np.s_[:, : through.shape[1] - 80]
    coloured = [np.ptp(frame[left_of_the_bar], axis=-1) > 60 for frame in (through, beside)]
    groups = np.diff(coloured[0].any(axis=0).astype(int))
    assert (groups == 1).sum() == 3  # in each of the three planes
    assert not coloured[1].any()


@pytest.mark.parametrize(
    ("parts", "names", "says"),
    [
        (np.zeros((0, 4, 5, 6)), [], "0 names for 0, 0, 0 parts"),
        (np.zeros((2, 4, 5, 6)), ["one"], "1 names for 2, 2, 2 parts"),
        (np.zeros((2, 4, 6, 5)), ["one", "two"], r"a part \(4, 6, 5\) over a volume \(4, 5, 6\)"),
    ],
)
def test_refuses_what_does_not_fit(tmp_path, parts, names, says):
    for grid in (None, Grid((4, 5, 6), np.eye(4))):
        with pytest.raises(DisplayError, match=says):
            save_gif(tmp_path / "a.gif", np.zeros((4, 5, 6)), parts, names, "logit", (1, 2, 3), grid=grid)
    assert not list(tmp_path.iterdir())


def test_needs_matplotlib_only_when_drawn():
    code = "import sys, volsal.report.animation; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
