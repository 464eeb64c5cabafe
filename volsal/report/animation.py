"""Moving pictures of a map's parts, such as each feature map's own: one frame a part, one scale for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from volsal.display import PLANES, DisplayError, Upright, in_words, letters, limits, mirrored, scan_window
from volsal.grid import Grid
from volsal.report.figures import _INK, _QUIET, _colormap, _colour_bar, _figure, _outlined, _panel
from volsal.scans.write import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from PIL.Image import Image

_DPI = 80
# Inches: the pictures together at most, and what stands around them.
_WIDTH, _HEIGHT, _HEAD, _FOOT, _GAP, _BAR = 9.0, 3.2, 0.65, 0.3, 0.08, 0.95


@dataclass(frozen=True, eq=False)
class View:
    """One picture that stands beside others in every frame, the way it is to be shown: rows run upwards.

    Attributes
    ----------
    background : (rows, columns), shown in grey
    parts : (P, rows, columns), shown over it in turn
    caption : above the picture
    pixel : height and width of a pixel, in any unit that all views share
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
        rows, columns = self.background.shape
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
    """The parts of a map over ``background`` (I, J, K), in three planes, as an animated GIF.

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
        Where there is no part, or names or shapes do not fit.
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
) -> None:
    """An animated GIF in which the parts of ``views`` take turns, under one colour scale, each under its name.

    Parameters
    ----------
    window : the values at the two ends of the colour bar; None: the smallest (or 0) and the largest of all parts
    grey : the backgrounds' values that are black and white; None: chosen as for scans
    note : small print

    Raises
    ------
    DisplayError, WriteError
        As for :func:`save_gif`.
    """
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
    first, *others = _with_one_palette(list(_frames(views, names, unit, shown, signed, grey, note)))
    with replacing(Path(path)) as temporary:
        first.save(
            temporary, format="GIF", save_all=True, append_images=others, duration=milliseconds, loop=0, optimize=False
        )


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
) -> Iterator[Image]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure, maps = _stage(views, unit, window, signed, grey, note)
    canvas = FigureCanvasAgg(figure)
    title = figure.text(0.1 / figure.get_figwidth(), 1 - 0.08 / figure.get_figheight(), "", fontsize=11, va="top")
    for number, name in enumerate(names):
        for drawn, view in zip(maps, views, strict=True):
            drawn.set_data(view.parts[number])
        title.set_text(f"{name}   ({number + 1} of {len(names)})")
        canvas.draw()
        yield Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _stage(
    views: Sequence[View],
    unit: str,
    window: tuple[float, float],
    signed: bool,
    grey: tuple[float, float],
    note: str,
) -> tuple[Figure, list[AxesImage]]:
    """All that stands still, and the pictures that change."""
    high, across = max(view.size[0] for view in views), sum(view.size[1] for view in views)
    scale = min(_HEIGHT / high, _WIDTH / across)  # inches for a unit
    # At least so much that the colour bar and the small print have room, whatever the pictures' shape.
    room = max(1.6, scale * high)
    wide, tall = _GAP + max(2.4, scale * across + len(views) * _GAP) + _BAR, _HEAD + room + _FOOT
    figure = _figure(wide, tall)
    figure.set_dpi(_DPI)
    maps, left = [], _GAP
    for view in views:
        height, width = (scale * side for side in view.size)
        axes = _panel(figure, (left / wide, (_FOOT + room - height) / tall, width / wide, height / tall))
        place: dict[str, Any] = {"origin": "lower", "aspect": "auto"}
        axes.imshow(view.background, cmap="gray", vmin=grey[0], vmax=grey[1], interpolation="nearest", **place)
        colours: dict[str, Any] = {"cmap": _colormap(signed), "vmin": window[0], "vmax": window[1]}
        maps.append(axes.imshow(view.parts[0], interpolation="nearest", **colours, **place))
        axes.set_title(view.caption, fontsize=9, color=_QUIET, pad=4)
        for edge, (x, y, ha, va) in _EDGES.items():
            if edge in view.edges:
                _outlined(axes, x, y, view.edges[edge], 10, "white", ha=ha, va=va, weight="bold")
        left += width + _GAP
    bar = (wide - _BAR + 0.06) / wide, (_FOOT + 0.1) / tall, 0.15 / wide, 0.75 * room / tall
    _colour_bar(_panel(figure, bar), window, signed, unit)
    small = "one scale for all frames" + (f"   ·   {note}" if note else "")
    figure.text(_GAP / wide, 0.07 / tall, small, fontsize=8, color=_INK, va="bottom")
    return figure, maps


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
    kinds = np.unique(seen >> 3, axis=0) << 3 | 4
    palette = Image.fromarray(kinds[None]).quantize(256)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
