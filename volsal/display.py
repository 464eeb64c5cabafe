"""How volumes are shown, on screen and on paper alike: upright planes, letters, colours, windows.

Knows neither napari nor matplotlib.  Showing never resamples: axes are flipped and permuted until they point most
nearly to the patient's right, anterior and superior, so every displayed value is one that the file holds.  The planes
of an oblique scan are therefore the scan's own, and :attr:`Upright.note` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from volsal.errors import VolsalError
from volsal.grid import Grid

PlaneName = Literal["axial", "coronal", "sagittal"]
# Degrees below which a tilt is rounding in a header: 0.1 degrees move a voxel 100 mm from the centre by 0.2 mm.
OBLIQUE_FROM = 0.1


class DisplayError(VolsalError, ValueError):
    """Something is asked to be shown in a way that does not exist."""


@dataclass(frozen=True)
class Plane:
    """Which world axes (0 right, 1 anterior, 2 superior) a plane cuts, shows sideways, and shows upwards."""

    through: int
    across: int
    up: int


PLANES: dict[PlaneName, Plane] = {
    "axial": Plane(through=2, across=0, up=1),
    "coronal": Plane(through=1, across=0, up=2),
    "sagittal": Plane(through=0, across=1, up=2),
}


def mirrored(convention: str) -> bool:
    """Whether the sideways axis of every plane grows to the left of the screen, as radiologists expect.

    Raises
    ------
    DisplayError
        For a convention that is neither of the two.
    """
    if convention not in ("radiological", "neurological"):
        raise DisplayError(f"the convention is 'radiological' or 'neurological', not {convention!r}")
    return convention == "radiological"


def in_words(convention: str) -> str:
    """What the convention means for the person who looks, since its name alone is often taken the wrong way round."""
    side = "left" if mirrored(convention) else "right"
    return f"{convention}: patient's right is on the {side} of the screen"


def letters(plane: PlaneName, convention: str) -> dict[str, str]:
    """The letter at each edge of a displayed plane, under "left", "right", "bottom", "top"."""
    shown = PLANES[plane]
    edges = ["RAS"[shown.across], "LPI"[shown.across]]
    left, right = edges if mirrored(convention) else edges[::-1]
    return {"left": left, "right": right, "bottom": "LPI"[shown.up], "top": "RAS"[shown.up]}


class Upright:
    """A grid as it is displayed: its own planes, with axes pointing most nearly right, anterior and superior.

    Displayed positions are millimetres in a frame (R, A, S) without tilt, which keeps the spacing and the centre of
    the volume.  Unless the scan is oblique this frame *is* the scanner's; :meth:`true` and :meth:`shown` convert.

    Attributes
    ----------
    grid : as stored
    canonical : the same voxels with flipped and permuted axes
    spacing : (3,) mm along the axes of ``canonical``
    origin : (3,) displayed position of the first voxel of ``canonical``
    """

    def __init__(self, grid: Grid) -> None:
        codes = grid.orientation
        pairs = ("RL", "AP", "SI")
        self.grid = grid
        self._order = [next(axis for axis in range(3) if codes[axis] in pair) for pair in pairs]
        self._flipped = [codes[axis] == pair[1] for axis, pair in zip(self._order, pairs, strict=True)]
        to_stored = np.zeros((4, 4))
        to_stored[3, 3] = 1
        for new, (old, flip) in enumerate(zip(self._order, self._flipped, strict=True)):
            to_stored[old, new] = -1 if flip else 1
            to_stored[old, 3] = grid.shape[old] - 1 if flip else 0
        self.canonical = Grid([grid.shape[axis] for axis in self._order], grid.affine @ to_stored)
        self.spacing = self.canonical.spacing
        middle = (np.array(self.canonical.shape) - 1) / 2
        # Rounded, so that the 48 ways to store one volume give one origin and not 48 that differ in the last bit.
        self.origin = np.round(self.canonical.world(middle) - self.spacing * middle, 9)

    @cached_property
    def degrees(self) -> float:
        """How far the scan's own planes are tilted from the patient's axes."""
        return self.grid.obliquity

    @property
    def oblique(self) -> bool:
        """Whether the tilt is more than rounding."""
        return self.degrees > OBLIQUE_FROM

    @property
    def note(self) -> str:
        """One sentence for the screen about oblique planes; empty where the planes are the patient's."""
        return f"planes are the scan's own, tilted {self.degrees:.1f}° from the patient's axes" if self.oblique else ""

    def array(self, values: NDArray) -> NDArray:
        """``values`` (I, J, K) as stored, on the axes of ``canonical``.  A view; nothing is copied or interpolated."""
        if values.shape != self.grid.shape:
            raise ValueError(f"the values are {values.shape}, their grid {self.grid.shape}")
        flips = tuple(slice(None, None, -1) if flip else slice(None) for flip in self._flipped)
        return values.transpose(self._order)[flips]

    def true(self, point: ArrayLike) -> NDArray[np.float64]:
        """Scanner RAS+ mm of a displayed position (..., 3) in (R, A, S) order."""
        return self.canonical.world((np.asarray(point, dtype=np.float64) - self.origin) / self.spacing)

    def shown(self, xyz: ArrayLike) -> NDArray[np.float64]:
        """Displayed position, (R, A, S) mm, of scanner positions ``xyz`` (..., 3)."""
        return self.origin + self.spacing * self.canonical.voxel(xyz)

    @property
    def matrix(self) -> NDArray[np.float64]:
        """(4, 4): displayed (R, A, S) mm to scanner RAS+ mm.  The identity unless the scan is oblique."""
        to_voxel = np.diag([*(1 / self.spacing), 1.0])
        to_voxel[:3, 3] = -self.origin / self.spacing
        return self.canonical.affine @ to_voxel

    @property
    def centre(self) -> NDArray[np.float64]:
        """Scanner position of the middle of the volume, (3,) mm."""
        return self.canonical.world((np.array(self.canonical.shape) - 1) / 2)

    def index(self, plane: PlaneName, xyz: ArrayLike) -> int:
        """Which slice along the cut axis holds the scanner position ``xyz``; the outermost one if it lies outside."""
        axis = PLANES[plane].through
        # A hair above one half: a point midway between two slices belongs to the same one however the file is stored.
        at = int(np.floor(self.canonical.voxel(xyz)[axis] + 0.5 + 1e-6))
        return min(max(at, 0), self.canonical.shape[axis] - 1)

    def picture(self, values: NDArray, plane: PlaneName, index: int) -> NDArray:
        """Slice ``index`` of ``values`` (I, J, K): rows run upwards, columns to the right, anterior for sagittal."""
        view = PLANES[plane]
        cut = self.array(values).take(index, axis=view.through)
        return cut.T  # the remaining axes are in the order across, up

    def extent(self, plane: PlaneName) -> tuple[float, float, float, float]:
        """Outer edges of a plane's voxels in displayed mm: across from and to, up from and to."""
        half = self.spacing / 2
        low = self.origin - half
        high = self.origin + self.spacing * np.array(self.canonical.shape) - half
        view = PLANES[plane]
        return float(low[view.across]), float(high[view.across]), float(low[view.up]), float(high[view.up])


# Perceptually uniform: eleven points of matplotlib's inferno (CC0) between 0.15 and 0.90 of its range.  Its black end
# would vanish on a scan, its pale end would look like bone.
_SEQUENTIAL = (
    (0.170, 0.042, 0.341), (0.297, 0.047, 0.420), (0.416, 0.090, 0.433), (0.541, 0.135, 0.415), (0.658, 0.179, 0.373),
    (0.770, 0.236, 0.307), (0.865, 0.317, 0.226), (0.936, 0.424, 0.135), (0.978, 0.558, 0.035), (0.987, 0.698, 0.088),
    (0.964, 0.844, 0.273),
)  # fmt: skip
# One arm of the diverging map each, from zero outwards.  Lightness rises alike on both, hue tells the sign, and blue
# against orange survives the common colour blindnesses.
_NEGATIVE = (
    (0.060, 0.110, 0.330),
    (0.080, 0.240, 0.600),
    (0.130, 0.420, 0.840),
    (0.330, 0.630, 0.960),
    (0.640, 0.850, 1.000),
)
_POSITIVE = (
    (0.270, 0.050, 0.060),
    (0.560, 0.100, 0.090),
    (0.840, 0.270, 0.080),
    (0.950, 0.540, 0.180),
    (0.990, 0.830, 0.480),
)
_OPAQUE_FROM, _OPAQUE = 0.4, 0.85


def colours(signed: bool = False) -> NDArray[np.float64]:
    """The colour map as (n, 4) RGBA points at equal distances over the window.

    Opacity rises from 0 at the low end (at the middle for ``signed``), so where a map says nothing the scan alone is
    seen and an empty map is invisible.
    """
    if not signed:
        return _with_opacity(np.array(_SEQUENTIAL))
    negative, positive = _with_opacity(np.array(_NEGATIVE)), _with_opacity(np.array(_POSITIVE))
    return np.concatenate([negative[::-1], positive[1:]])


def _with_opacity(points: NDArray[np.float64]) -> NDArray[np.float64]:
    share = np.linspace(0, 1, len(points))
    return np.column_stack([points, _OPAQUE * np.minimum(share / _OPAQUE_FROM, 1)])


def limits(window: Sequence[float], signed: bool = False) -> tuple[float, float]:
    """``window`` as a display can use it: centred on zero where ``signed``, and never of zero width.

    A map without any spread has a window of zero width; it gets one above its value, where it is invisible.
    """
    low, high = float(window[0]), float(window[1])
    if signed:
        high = max(abs(low), abs(high))
        low = -high
    return (low, high) if high > low else (low - 1.0 if signed else low, low + 1.0)


def scan_window(array: NDArray) -> tuple[float, float]:
    """The 2nd to 98th percentile of the foreground: what a reader would window a scan to by hand, roughly."""
    # About a million voxels are plenty for a percentile.
    some = array.ravel(order="K")[:: max(1, array.size >> 20)].astype(np.float64)
    above = some - some.min()
    # Foreground is what exceeds an eighth of the mean, a rule from SPM; counted from the minimum, so that it holds
    # for CT, where air is -1000.
    front = some[above > above.mean() / 8]
    low, high = np.percentile(front if front.size else some, (2, 98))
    return limits((low, high)) if high > low else limits((some.min(), some.max()))


def verdict(values: NDArray) -> str:
    """What must be said in words because a picture cannot: that a map is empty or the same everywhere."""
    low, high = float(values.min()), float(values.max())
    if high <= 0:
        return "no positive evidence"
    return f"the map is {low:.3g} everywhere" if low == high else ""


def peak_mm(values: NDArray, grid: Grid) -> NDArray[np.float64] | None:
    """Scanner position, (3,) mm, of the largest value of a map (I, J, K); None where :func:`verdict` speaks."""
    return None if verdict(values) else grid.world(np.unravel_index(int(values.argmax()), values.shape))
