"""Scans and maps as napari layer-data tuples, made without napari.

napari's world axes are (S, A, R) in mm: the scanner's, reversed.  Nothing is negated; which way is up and which side
is left is a setting of the camera (:mod:`volsal.viewer.show`).  The layer transform is a scale and a translation only,
because napari 0.9 aborts on affines that permute axes and draws the wrong slice for oblique ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from volsal.display import Upright, colours, limits, scan_window
from volsal.grid import Grid
from volsal.scans import Scan

LayerData = tuple[NDArray, dict[str, Any], str]


def scan_layer(scan: Scan, name: str = "scan") -> LayerData:
    """The scan in grey, windowed to its foreground.

    Returns
    -------
    (data, arguments, "image") : data (S, A, R), a view of the scan's array
    """
    data, placed = _place(scan.array, scan.grid)
    return data, placed | {"name": name, "colormap": "gray", "contrast_limits": scan_window(scan.array)}, "image"


def map_layer(
    values: NDArray, grid: Grid, name: str, window: tuple[float, float], unit: str = "", signed: bool = False
) -> LayerData:
    """A map in colours that fade out towards the low end of its window, so that an empty map is invisible.

    Parameters
    ----------
    values : (I, J, K) on ``grid``
    window : the values at the two ends of the colour map
    unit : of the values; kept in the metadata
    signed : blue for negative, orange for positive, and a window centred on zero

    Returns
    -------
    (data, arguments, "image") : data (S, A, R), a view of ``values``
    """
    data, placed = _place(values, grid)
    placed["metadata"] |= {"unit": unit, "window": tuple(map(float, window)), "signed": signed}
    points = colours(signed)
    colormap = {
        "name": "volsal signed" if signed else "volsal",
        "colors": points.tolist(),
        "controls": np.linspace(0, 1, len(points)).tolist(),
    }
    # Without depth: with it, napari hides the scan behind a transparent map in 3D.
    drawn = {"colormap": colormap, "contrast_limits": limits(window, signed), "blending": "translucent_no_depth"}
    return data, placed | drawn | {"name": name}, "image"


def _place(values: NDArray, grid: Grid) -> tuple[NDArray, dict[str, Any]]:
    """``values`` (I, J, K) on (S, A, R), and the layer arguments that place them."""
    upright = Upright(grid)
    reverse = np.eye(4)[[2, 1, 0, 3]]
    return upright.array(values).transpose(2, 1, 0), {
        "scale": tuple(upright.spacing[::-1].tolist()),
        "translate": tuple(upright.origin[::-1].tolist()),
        "units": ("mm",) * 3,
        "axis_labels": ("S", "A", "R"),
        "metadata": {
            "affine": np.array(grid.affine),
            "axis_codes": grid.orientation,
            "obliquity_degrees": upright.degrees,
            "planes": "native" if upright.oblique else "anatomical",
            "display_to_scanner": upright.matrix @ reverse,
        },
    }


def true_world(metadata: Mapping[str, Any], point: ArrayLike) -> NDArray[np.float64]:
    """Scanner RAS+ mm (..., 3) of a position (..., 3) in napari's world (S, A, R), from a layer's metadata.

    For an oblique scan napari's world is the scan's own upright frame, not the scanner's.
    """
    matrix = np.asarray(metadata["display_to_scanner"])
    return np.asarray(point, dtype=np.float64) @ matrix[:3, :3].T + matrix[:3, 3]


def napari_world(grid: Grid, xyz: Sequence[float] | NDArray) -> NDArray[np.float64]:
    """Where a scanner position ``xyz``, RAS+ mm (..., 3), lies in napari's world (S, A, R) for layers on ``grid``."""
    return Upright(grid).shown(xyz)[..., ::-1]
