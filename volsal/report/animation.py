"""Moving pictures, as GIF or MP4, under one scale for all frames: through a scan's slices, or through a map's parts."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from volsal.display import PLANES, DisplayError, PlaneName, Upright, in_words, letters, limits, mirrored, scan_window
from volsal.grid import Grid
from volsal.report.figures import (
    _AS_IT_STANDS,
    _INK,
    _QUIET,
    _colormap,
    _colour_bar,
    _figure,
    _outlined,
    _panel,
    _scale_bar,
)
from volsal.scans.write import WriteError, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from PIL.Image import Image

_DPI = 80
_MP4_COLOURS = (
    "scale=out_color_matrix=bt709:out_range=tv,"
    "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
)
# Inches: the pictures together at most, and what stands around them.
_WIDTH, _HEIGHT, _HEAD, _FOOT, _GAP, _BAR = 9.0, 3.2, 0.65, 0.3, 0.08, 0.95


@dataclass(frozen=True, eq=False)
class View:
    """One picture that stands beside others in every frame, the way it is to be shown: rows run upwards.

    Attributes
    ----------
    background : (rows, columns), shown in grey; or (P, rows, columns), one for each part
    parts : (P, rows, columns), shown over it in turn
    caption : above the picture
    pixel : height and width of a pixel, in any unit that all views share; in mm where there are ``edges``
    edges : a letter for each edge, under "left", "right", "bottom", "top"
    """

    background: NDArray
    parts: NDArray
    caption: str = ""
    pixel: tuple[float, float] = (1.0, 1.0)
    edges: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> tuple[float, float]:
        """Height and width, in the unit of :attr:`pixel`."""
        rows, columns = self.background.shape[-2:]
        return rows * self.pixel[0], columns * self.pixel[1]


def save_gif(
    path: Path,
    background: NDArray,
    parts: Iterable[NDArray],
    names: Sequence[str],
    unit: str,
    at: Sequence[int] | NDArray,
    milliseconds: int = 400,
    grid: Grid | None = None,
) -> None:
    """The parts of a map over ``background`` (I, J, K), in three planes, as an animated GIF, or MP4 by its ending.

    Parameters
    ----------
    parts : P volumes (I, J, K), or an array of them, (P, I, J, K); each is let go when the next one is taken
    names : what each part is, for its frame
    unit : of the parts' values
    at : the voxel (3,) that the planes go through
    milliseconds : for which each frame stands
    grid : where the voxels lie; the planes are then axial, coronal and sagittal, to scale and with sides.  None: the
        planes of the array's own axes, with voxels as wide as high, and no side named

    Raises
    ------
    DisplayError
        Where there is no part, or names or shapes do not fit, or an MP4 is asked for without imageio-ffmpeg.
    WriteError
        Where the disk refuses.
    """
    if len(at) != 3:
        raise DisplayError(f"the planes go through one voxel of three indices, not {at}")
    cut, look = _along_axes(at) if grid is None else _along_planes(at, grid)
    pictures, low, high = [], 0.0, 0.0
    for part in parts:
        if part.shape != background.shape:
            raise DisplayError(f"a part {part.shape} over a volume {background.shape}; expected one shape")
        pictures.append(cut(part))
        low, high = min(low, float(part.min())), max(high, float(part.max()))
    views = [
        View(behind, np.array([over[plane] for over in pictures]).reshape(-1, *behind.shape), **look[plane])
        for plane, behind in enumerate(cut(background))
    ]
    note = "planes of the array's own axes" if grid is None else "; ".join(filter(None, _conventions(grid)))
    window = low, high
    animate(path, views, names, unit, milliseconds, window=window, grey=scan_window(background), note=note)


def fly_through(
    path: Path,
    background: NDArray,
    values: NDArray,
    grid: Grid,
    window: tuple[float, float],
    unit: str = "",
    *,
    plane: PlaneName = "axial",
    title: str = "",
    signed: bool = False,
    convention: str = "radiological",
    milliseconds: int = 100,
) -> None:
    """A scan's slices with a map over them, one a frame, from the feet, back or left on: GIF, or MP4 by its ending.

    Parameters
    ----------
    background, values : the scan and the map, (I, J, K) on ``grid``
    window : the values at the two ends of the colour bar, in ``unit``
    plane : whose slices
    signed : colours centred on zero

    Raises
    ------
    DisplayError, WriteError
        As for :func:`save_gif`.
    """
    upright, shown = Upright(grid), PLANES[plane]
    turn = slice(None, None, -1 if mirrored(convention) else 1)

    def slices(volume: NDArray) -> NDArray:
        upwards = upright.array(volume).transpose(shown.through, shown.up, shown.across)
        return upwards[:, :, turn]

    at = upright.origin[shown.through] + upright.spacing[shown.through] * np.arange(
        upright.canonical.shape[shown.through]
    )
    view = View(
        slices(background),
        slices(values),
        plane,
        (float(upright.spacing[shown.up]), float(upright.spacing[shown.across])),
        letters(plane, convention),
    )
    axis = "xyz"[shown.through]
    names = [
        f"{title}   {plane}, scan's own" if upright.oblique else f"{title}   {axis}\xa0=\xa0{mm:.1f}\xa0mm" for mm in at
    ]
    note = "; ".join(filter(None, (in_words(convention), upright.note)))
    animate(
        path, [view], [name.strip() for name in names], unit, milliseconds,
        window=limits(window, signed), grey=scan_window(background), note=note, dpi=2 * _DPI,
    )  # fmt: skip


def animate(
    path: Path,
    views: Sequence[View],
    names: Sequence[str],
    unit: str = "",
    milliseconds: int = 400,
    *,
    window: tuple[float, float] | None = None,
    grey: tuple[float, float] | None = None,
    note: str = "",
    dpi: int = _DPI,
) -> None:
    """A GIF, or MP4, in which the parts of ``views`` take turns, under one colour scale, each under its name.

    Parameters
    ----------
    window : the values at the two ends of the colour bar; None: the smallest (or 0) and the largest of all parts
    grey : the backgrounds' values that are black and white; None: chosen as for scans
    note : small print
    dpi : pixels per inch; all pictures together are 9 inches wide or 3.2 high

    Raises
    ------
    DisplayError, WriteError
        As for :func:`save_gif`.
    """
    path = Path(path)
    write = _writer(path)
    if not names or any(len(view.parts) != len(names) for view in views):
        found = ", ".join(str(len(view.parts)) for view in views)
        raise DisplayError(
            f"{len(names)} names for {found or 'no'} parts; each part has one, and there is at least one"
        )
    if window is None:
        window = min(0.0, *(float(v.parts.min()) for v in views)), max(0.0, *(float(v.parts.max()) for v in views))
    signed = window[0] < 0
    shown = limits(window, signed)
    grey = grey or scan_window(np.concatenate([view.background.ravel() for view in views]))
    with replacing(path) as temporary:
        write(temporary, _frames(views, names, unit, shown, signed, grey, note, dpi), milliseconds)


_Writer = Callable[[Path, "Iterator[Image]", int], None]


def _writer(path: Path) -> _Writer:
    """What writes a file of that ending."""
    writers = {".gif": _write_gif, ".mp4": _write_mp4}
    write = writers.get(path.suffix.lower())
    if write is None:
        raise DisplayError(f"{path}: a moving picture is a .gif or an .mp4")
    if write is _write_mp4 and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise DisplayError(f'{path}: MP4 needs imageio-ffmpeg: pip install "volsal[video]"; or write a .gif')
    return write


def _write_gif(path: Path, frames: Iterator[Image], milliseconds: int) -> None:
    first, *others = _with_one_palette(list(frames))
    first.save(path, format="GIF", save_all=True, append_images=others, duration=milliseconds, loop=0, optimize=False)


def _write_mp4(path: Path, frames: Iterator[Image], milliseconds: int) -> None:
    """H.264, which every browser and slide program plays: even sides, and colours told to be BT.709's, as they are."""
    import imageio_ffmpeg
    from PIL import Image

    first = next(frames)
    size = first.width + first.width % 2, first.height + first.height % 2
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", "-f", "rawvideo",
        "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r", f"{1000 / milliseconds:g}", "-i", "-",
        "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "16", "-vf", _MP4_COLOURS, "-movflags", "+faststart",
        "-f", "mp4", str(path),
    ]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as ffmpeg:
        assert ffmpeg.stdin is not None
        # Where ffmpeg has given up it reads no more, and says why when asked.
        with suppress(BrokenPipeError):
            for frame in chain([first], frames):
                padded = Image.new("RGB", size, "white")
                padded.paste(frame)
                ffmpeg.stdin.write(padded.tobytes())
        said = ffmpeg.communicate()[1].decode("utf-8", "replace").strip().splitlines()
    if ffmpeg.returncode:
        raise WriteError(f"{path}: ffmpeg could not write it: {said[-1] if said else f'status {ffmpeg.returncode}'}")


_Cut = Callable[[NDArray], list[NDArray]]


def _along_axes(at: Sequence[int] | NDArray) -> tuple[_Cut, list[dict[str, Any]]]:
    """What takes the three pictures out of a volume, and how each of them is shown."""

    def cut(volume: NDArray) -> list[NDArray]:
        return [volume.take(int(at[axis]), axis=axis).T.copy() for axis in range(3)]

    return cut, [{"caption": f"{letter} = {int(n)}"} for letter, n in zip("ijk", at, strict=True)]


def _along_planes(at: Sequence[int] | NDArray, grid: Grid) -> tuple[_Cut, list[dict[str, Any]]]:
    """The same for the anatomical planes."""
    upright = Upright(grid)
    point = grid.world(np.asarray(at, dtype=np.float64))
    turn = slice(None, None, -1 if mirrored("radiological") else 1)

    def cut(volume: NDArray) -> list[NDArray]:
        return [upright.picture(volume, name, upright.index(name, point))[:, turn].copy() for name in PLANES]

    looks = [
        {
            "caption": name,
            "pixel": (float(upright.spacing[plane.up]), float(upright.spacing[plane.across])),
            "edges": letters(name, "radiological"),
        }
        for name, plane in PLANES.items()
    ]
    return cut, looks


def _conventions(grid: Grid) -> tuple[str, str]:
    return in_words("radiological"), Upright(grid).note


def _frames(
    views: Sequence[View],
    names: Sequence[str],
    unit: str,
    window: tuple[float, float],
    signed: bool,
    grey: tuple[float, float],
    note: str,
    dpi: int,
) -> Iterator[Image]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure, pictures = _stage(views, unit, window, signed, grey, note, dpi)
    canvas = FigureCanvasAgg(figure)
    top = 1 - 0.08 / figure.get_figheight()
    title = figure.text(0.1 / figure.get_figwidth(), top, "", fontsize=11, va="top", **_AS_IT_STANDS)
    for number, name in enumerate(names):
        for (behind, over), view in zip(pictures, views, strict=True):
            over.set_data(view.parts[number])
            if view.background.ndim == 3:
                behind.set_data(view.background[number])
        count = f"({number + 1}\xa0of\xa0{len(names)})"
        title.set_text(_wrapped(f"{name}   {count}", 10.5 * figure.get_figwidth(), lines=2))
        canvas.draw()
        yield Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _stage(
    views: Sequence[View],
    unit: str,
    window: tuple[float, float],
    signed: bool,
    grey: tuple[float, float],
    note: str,
    dpi: int,
) -> tuple[Figure, list[tuple[AxesImage, AxesImage]]]:
    """All that stands still, and of each view the scan and the map, which change."""
    high, across = max(view.size[0] for view in views), sum(view.size[1] for view in views)
    scale = min(_HEIGHT / high, _WIDTH / across)  # inches for a unit
    # At least so much that the colour bar and the small print have room, whatever the pictures' shape.
    room = max(1.6, scale * high)
    wide = _GAP + max(2.4, scale * across + len(views) * _GAP) + _BAR
    small = _wrapped("one scale for all frames" + (f"   ·   {note}" if note else ""), 14.5 * wide, lines=3)
    foot = _FOOT + 0.13 * small.count("\n")
    tall = _HEAD + room + foot
    figure = _figure(wide, tall)
    figure.set_dpi(dpi)
    pictures, left = [], _GAP
    for view in views:
        height, width = (scale * side for side in view.size)
        axes = _panel(figure, (left / wide, (foot + room - height) / tall, width / wide, height / tall))
        extent = (0.0, view.size[1], 0.0, view.size[0])
        place: dict[str, Any] = {"origin": "lower", "aspect": "auto", "extent": extent, "interpolation": "nearest"}
        first = view.background if view.background.ndim == 2 else view.background[0]
        behind = axes.imshow(first, cmap="gray", vmin=grey[0], vmax=grey[1], **place)
        colours: dict[str, Any] = {"cmap": _colormap(signed), "vmin": window[0], "vmax": window[1]}
        pictures.append((behind, axes.imshow(view.parts[0], **colours, **place)))
        axes.set_title(view.caption, fontsize=9, color=_QUIET, pad=4)
        for edge, (x, y, ha, va) in _EDGES.items():
            if edge in view.edges:
                _outlined(axes, x, y, view.edges[edge], 10, "white", ha=ha, va=va, weight="bold")
        if view.edges and view is views[0]:
            _scale_bar(axes)
        left += width + _GAP
    bar = (wide - _BAR + 0.06) / wide, (foot + 0.1) / tall, 0.15 / wide, 0.75 * room / tall
    _colour_bar(_panel(figure, bar), window, signed, unit)
    figure.text(_GAP / wide, 0.07 / tall, small, fontsize=8, color=_INK, va="bottom", **_AS_IT_STANDS)
    return figure, pictures


def _wrapped(text: str, characters: float, lines: int) -> str:
    """``text`` in at most so many lines of that length, cut where it is longer."""
    return "\n".join(wrap(text, max(8, int(characters)), max_lines=lines, placeholder=" …", drop_whitespace=True))


_EDGES = {
    "left": (0.02, 0.5, "left", "center"),
    "right": (0.98, 0.5, "right", "center"),
    "top": (0.5, 0.985, "center", "top"),
    "bottom": (0.5, 0.015, "center", "bottom"),
}


def _with_one_palette(frames: Sequence[Image]) -> list[Image]:
    """A GIF has 256 colours; chosen once for all frames, a value has the same colour in each of them."""
    from PIL import Image

    # Colours count by how many kinds of them there are, to 1 in 32, not by their area, or greys would take most of the
    # palette; every third pixel is plenty to see which there are.
    seen = np.concatenate([np.asarray(frame)[::3, ::3].reshape(-1, 3) for frame in frames])
    red, green, blue = (seen.T >> 3).astype(np.intp)
    present = np.flatnonzero(np.bincount(red << 10 | green << 5 | blue, minlength=1 << 15))
    kinds = (np.stack([present >> 10, present >> 5 & 31, present & 31], axis=1) << 3 | 4).astype(np.uint8)
    palette = Image.fromarray(kinds[None]).quantize(256)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
