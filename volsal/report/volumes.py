"""Volumes as a web page can hold them: one byte a voxel with a table of what each byte means, upright, compressed."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from volsal.display import PLANES, Upright, colours, in_words, letters, limits, mirrored
from volsal.grid import Grid

if TYPE_CHECKING:
    from PIL.Image import Image

# More than this is more than a page should carry; on a screen the planes of a larger scan are shrunk anyway.
MOST_VOXELS = 6_000_000
_LEVELS, _BINS = 256, 4096


@dataclass(frozen=True, eq=False)
class Coded:
    """A volume in bytes.

    Attributes
    ----------
    codes : (I, J, K) uint8
    levels : the value that each code stands for, float32, rising
    exact : whether the volume has no more values than there are codes, so that none was changed
    """

    codes: NDArray[np.uint8]
    levels: NDArray[np.float32]
    exact: bool

    def packed(self) -> str:
        """The codes with the first axis fastest, gzipped, in base64."""
        return base64.b64encode(gzip.compress(self.codes.tobytes(order="F"), 6, mtime=0)).decode()

    def table(self) -> list[float]:
        """The levels as JSON can hold them, to float32's own digits."""
        return [float(np.format_float_scientific(level)) for level in self.levels]


def coded(values: NDArray) -> Coded:
    """``values`` (I, J, K) in 256 levels at most.

    Half of the levels are spread evenly, so that no value is far from one; half lie where values are many.  So the
    narrow window of a brain on CT keeps its greys although bone and air span 4000 units, and a gradient's few outliers
    do not take the levels of all the rest.  The smallest and largest value and zero are levels of their own.
    """
    values = np.asarray(values, dtype=np.float32)
    few = values.ravel(order="K")[:: max(1, values.size >> 14)]
    distinct = np.unique(few)
    if len(distinct) <= _LEVELS:
        distinct = np.unique(values)
    exact = len(distinct) <= _LEVELS
    levels = distinct if exact else _levels(values)
    middles = (levels[1:].astype(np.float64) + levels[:-1]) / 2
    return Coded(np.searchsorted(middles, values).astype(np.uint8), levels, exact)


def _levels(values: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = float(values.min()), float(values.max())
    # Background has a level of its own.
    count, edges = np.histogram(values[values != 0], bins=_BINS, range=(low, high))
    # Between evenly (power 0) and equally many values a level (power 1): with 1, rare values run together.
    weight = count ** (2 / 3)
    weight += weight.mean()
    share = np.concatenate([[0.0], np.cumsum(weight) / weight.sum()])
    levels = np.interp(np.linspace(0, 1, _LEVELS), share, edges)
    levels[0], levels[-1] = low, high
    if low <= 0 <= high:
        levels[np.abs(levels).argmin()] = 0
    return np.unique(levels.astype(np.float32))


class Shown:
    """What of a scan's voxels a page shows: upright, and every n-th along each axis where there are too many.

    Attributes
    ----------
    upright : the scan's grid as it is displayed
    step : (3,) every how many voxels along its axes
    grid : of the voxels that are shown
    """

    def __init__(self, grid: Grid, most: int = MOST_VOXELS) -> None:
        self.upright = Upright(grid)
        shape, spacing = np.array(self.upright.canonical.shape), self.upright.spacing
        self.step = np.ones(3, dtype=int)
        while np.prod(-(-shape // self.step)) > most:
            self.step[int(np.argmin(np.where(shape > self.step, spacing * self.step, np.inf)))] += 1
        affine = self.upright.canonical.affine @ np.diag([*self.step, 1.0])
        self.grid = Grid((-(-shape // self.step)).tolist(), affine)

    def array(self, values: NDArray) -> NDArray:
        """The shown ones of ``values`` (I, J, K), on the axes of :attr:`grid`.  A view."""
        i, j, k = (slice(None, None, int(step)) for step in self.step)
        return self.upright.array(values)[i, j, k]

    @cached_property
    def strided(self) -> bool:
        """Whether voxels are left out."""
        return bool((self.step > 1).any())

    def nearest(self, xyz: ArrayLike) -> list[int]:
        """The shown voxel nearest to a scanner position, mm."""
        at = np.floor(self.grid.voxel(xyz) + 0.5 + 1e-6)
        return np.clip(at, 0, np.array(self.grid.shape) - 1).astype(int).tolist()

    def geometry(self) -> dict[str, Any]:
        """All that the viewer needs to draw planes to scale and to name positions and voxels of the file."""
        to_file = np.rint(self.grid.to(self.upright.grid)).astype(int)
        return {
            "shape": list(self.grid.shape),
            "spacing": self.grid.spacing.tolist(),
            "affine": self.grid.affine[:3].tolist(),
            "toFile": to_file[:3].tolist(),
            "planes": [{"name": name, **vars(plane)} for name, plane in PLANES.items()],
            "conventions": {
                name: {
                    "words": in_words(name),
                    "mirrored": mirrored(name),
                    "letters": {plane: letters(plane, name) for plane in PLANES},
                }
                for name in ("radiological", "neurological")
            },
        }


def thumbnail(
    upright: Upright,
    scan: NDArray | None,
    grey: tuple[float, float],
    values: NDArray,
    window: Sequence[float],
    signed: bool,
    at_mm: ArrayLike,
    height: int = 116,
) -> bytes:
    """Three planes through a scanner position at one scale, as PNG: ``scan`` in grey under ``values``, both (I, J, K).

    Patient's right is on the left of the picture, and the letters say so.
    """
    from PIL import Image

    spans = {plane: _span(upright, plane) for plane in PLANES}
    scale = min(
        height / max(up for _, up in spans.values()), 3.1 * height / sum(across for across, _ in spans.values())
    )
    pictures = []
    for plane in PLANES:
        index = upright.index(plane, at_mm)
        across, up = (max(1, round(scale * mm)) for mm in spans[plane])
        place = _sampled(upright.picture(values, plane, index), across, up)
        under = np.zeros_like(place) if scan is None else _sampled(upright.picture(scan, plane, index), across, up)
        picture = Image.fromarray(_blend(under, grey, place, window, signed))
        _letters(picture, letters(plane, "radiological"))
        pictures.append(picture)
    gap = 3
    whole = Image.new("RGB", (sum(p.width for p in pictures) + 2 * gap, max(p.height for p in pictures)))
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, (whole.height - picture.height) // 2))
        left += picture.width + gap
    file = BytesIO()
    whole.quantize(128, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def _span(upright: Upright, plane: Any) -> tuple[float, float]:
    left, right, bottom, top = upright.extent(plane)
    return right - left, top - bottom


def _sampled(picture: NDArray, across: int, up: int) -> NDArray:
    """``picture``, whose rows run upwards, in so many pixels: rows run down, and columns to the patient's left."""
    rows = ((np.arange(up) + 0.5) * picture.shape[0] / up).astype(int)[::-1]
    columns = ((np.arange(across) + 0.5) * picture.shape[1] / across).astype(int)[::-1]
    return picture[np.ix_(rows, columns)]


def _blend(
    scan: NDArray, grey: tuple[float, float], values: NDArray, window: Sequence[float], signed: bool
) -> NDArray[np.uint8]:
    base = np.clip((scan - grey[0]) / (grey[1] - grey[0]), 0, 1)[..., None]
    low, high = limits(window, signed)
    points = colours(signed)
    place = np.clip((values - low) / (high - low), 0, 1)
    at = np.linspace(0, 1, len(points))
    colour = np.stack([np.interp(place, at, points[:, channel]) for channel in range(4)], axis=-1)
    mixed = base * (1 - colour[..., 3:]) + colour[..., :3] * colour[..., 3:]
    return np.rint(255 * mixed).astype(np.uint8)


def _letters(picture: Image, edges: dict[str, str]) -> None:
    from PIL import ImageDraw

    draw = ImageDraw.Draw(picture)
    for side, x, anchor in (("left", 2, "lm"), ("right", picture.width - 2, "rm")):
        draw.text(
            (x, picture.height // 2), edges[side], fill="white", anchor=anchor, stroke_width=1, stroke_fill="black"
        )
