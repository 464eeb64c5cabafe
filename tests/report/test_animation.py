import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from turned_phantom import BLOB_MM, phantom, stored_as

from volsal.display import PLANES, DisplayError, Upright, colours
from volsal.grid import Grid
from volsal.report.animation import View, animate, fly_through, save_gif
from volsal.scans.write import WriteError


def frames(path):
    """(frames, height, width, 3) of whole numbers, as a viewer shows them."""
    with Image.open(path) as gif:
        shown = []
        for number in range(gif.n_frames):
            gif.seek(number)
            shown.append(np.asarray(gif.convert("RGB")).astype(int))
    return np.stack(shown)


def film(path):
    """The same of an MP4, and its frames per second."""
    program = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    about = subprocess.run([program, "-i", path], capture_output=True, text=True, check=False).stderr
    wide, tall, per_second = map(float, re.search(r" (\d+)x(\d+), .*? ([\d.]+) fps", about).groups())
    raw = [program, "-loglevel", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    content = subprocess.run(raw, capture_output=True, check=True).stdout
    return np.frombuffer(content, np.uint8).reshape(-1, int(tall), int(wide), 3).astype(int), per_second


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


# MP4


def test_an_mp4_has_the_frames_and_colours_of_the_gif(tmp_path):
    parts = halves((1, 0), (0.5, 1), (0.01, 0.5))
    for name in ("a.gif", "a.mp4"):
        animate(tmp_path / name, [View(np.zeros((12, 12)), parts)], ["x", "y", "z"], grey=(0, 1), milliseconds=250)
    still = frames(tmp_path / "a.gif")
    moving, per_second = film(tmp_path / "a.mp4")
    assert (len(moving), per_second) == (3, 4)
    assert all(0 <= more <= 1 for more in np.subtract(moving.shape[1:3], still.shape[1:3]))  # even sides
    for one, other in zip(still, moving, strict=True):
        assert np.abs(sides(one) - sides(other)).max() < 12
    top = 255 * colours()[-1, :3] * colours()[-1, 3]
    assert np.abs(sides(moving[0])[0] - top).max() < 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "a.mp4"]


def test_says_what_an_mp4_needs_and_which_endings_there_are(tmp_path, monkeypatch):
    view = View(np.zeros((12, 12)), halves((0, 1)))
    with pytest.raises(DisplayError, match=r"a\.avi: a moving picture is a \.gif or an \.mp4"):
        animate(tmp_path / "a.avi", [view], ["x"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DisplayError, match=r'MP4 needs imageio-ffmpeg: pip install "volsal\[video\]"'):
        animate(tmp_path / "a.mp4", [view], ["x"])
    assert not list(tmp_path.iterdir())


def test_where_ffmpeg_fails_nothing_is_left_and_the_reason_told(tmp_path, monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setattr("volsal.report.animation._MP4_COLOURS", "no-such-filter")
    parts = np.zeros((3, 12, 12))
    with pytest.raises(WriteError, match=r"a\.mp4: ffmpeg could not write it"):
        animate(tmp_path / "a.mp4", [View(np.zeros((12, 12)), parts)], ["x", "y", "z"])
    assert not list(tmp_path.iterdir())


# Through the slices of a scan


def every_other(codes):
    """Every other voxel of the phantom, a ball at BLOB_MM, their grid and where its voxels lie."""
    values, grid = stored_as(*phantom(), codes)
    values = values[::2, ::2, ::2]
    grid = Grid(values.shape, grid.affine @ np.diag([2, 2, 2, 1]))
    at = grid.world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1))
    return values, (np.linalg.norm(at - BLOB_MM, axis=-1) < 15).astype(np.float32), grid, at


@pytest.mark.parametrize(("plane", "axis"), [("axial", 2), ("coronal", 1), ("sagittal", 0)])
def test_flies_through_every_slice_and_colours_what_the_map_has_there(tmp_path, plane, axis):
    values, ball, grid, at = every_other("LPS")
    fly_through(tmp_path / "a.gif", values, ball, grid, (0, 1), plane=plane)
    shown = frames(tmp_path / "a.gif")
    positions = np.sort(np.unique(np.round(at[..., axis], 6)))
    assert len(shown) == len(positions)
    picture = shown[:, 110:-60, 20:-160]  # without the title, the foot and the bar
    coloured = (np.ptp(picture, axis=-1) > 100).sum(axis=(1, 2))
    expected = np.array([ball[np.isclose(at[..., axis], mm)].sum() for mm in positions])
    assert (expected > 0).sum() > 2
    assert ((coloured > 0) == (expected > 0)).all()
    biggest = coloured.max() / expected.max()
    assert np.abs(coloured - biggest * expected).max() < 0.1 * coloured.max()


def test_a_flight_shows_the_patients_right_on_the_side_it_says(tmp_path):
    values, ball, grid, _ = every_other("PSR")
    means = {}
    for convention in ("radiological", "neurological"):
        fly_through(tmp_path / "a.gif", np.zeros_like(values), ball, grid, (0, 1), convention=convention)
        coloured = (np.ptp(frames(tmp_path / "a.gif")[:, 110:-60, 20:-160], axis=-1) > 100).sum(axis=0)
        means[convention] = (coloured.sum(axis=0) * np.arange(coloured.shape[1])).sum() / coloured.sum()
    assert means["radiological"] < means["neurological"] - 30  # BLOB_MM lies to the patient's right


def test_three_planes_have_a_bar_of_so_many_millimetres(tmp_path):
    values, grid = stored_as(*phantom(), "RAS")
    save_gif(tmp_path / "a.gif", np.zeros_like(values), np.zeros((1, *values.shape)), ["one"], "", (5, 5, 5), grid=grid)
    save_gif(tmp_path / "b.gif", np.zeros_like(values), np.zeros((1, *values.shape)), ["one"], "", (5, 5, 5))
    with_bar, without = (frames(tmp_path / name)[0] for name in ("a.gif", "b.gif"))

    def longest(frame):
        """The longest white line on dark ground; above it stand the millimetres."""
        white, dark = frame.min(axis=-1) > 200, frame.max(axis=-1) < 60
        lines = white[28:-6] & dark[34:] & dark[:-34]
        return max(len(run) for row in lines for run in "".join("x" if v else " " for v in row).split(" "))

    assert longest(without) < 10
    highest = max(Upright(grid).extent(plane)[3] - Upright(grid).extent(plane)[2] for plane in PLANES)
    lengths = np.array([1, 2, 5, 10, 20, 50, 100]) * 3.2 * 80 / highest  # 3.2 inches of 80 pixels
    assert longest(with_bar) > 20
    assert np.abs(lengths - longest(with_bar)).min() <= 4


# The command


def test_the_command_flies_through_a_case(tmp_path):
    from made_runs import add_case, grid_of, write_scan
    from typer.testing import CliRunner

    from volsal.cli import app

    add_case(tmp_path / "run", "one", write_scan(tmp_path / "one.nii.gz", grid_of("LPS", shape=(8, 9, 5))))
    case = str(tmp_path / "run" / "one")
    answer = CliRunner().invoke(app, ["movie", case, "--map", "input-gradient"])
    assert (answer.exit_code, answer.output.strip()) == (0, f"written to {case}/movie.gif")
    assert len(frames(tmp_path / "run/one/movie.gif")) == 5
    other = CliRunner().invoke(app, ["movie", case, "--map", "score", "-o", str(tmp_path / "b.gif")])
    assert other.exit_code == 2
    assert "no map 'score'; there are grad-cam" in other.output
    (tmp_path / "one.nii.gz").unlink()
    gone = CliRunner().invoke(app, ["movie", case, "-o", str(tmp_path / "b.gif")])
    assert gone.exit_code != 0
    assert not (tmp_path / "b.gif").exists()
