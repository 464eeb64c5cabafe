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

_MASK_COLOUR = "#40ff60"
# Of the window: napari's table of colours has 1024 entries.
_STEP = 1e-4


def scan_layer(scan: Scan, name: str = "scan") -> LayerData:
    """The scan in grey, windowed to its foreground.

    Returns
    -------
    (data, arguments, "image") : data (S, A, R), a view of the scan's array
    """
    data, placed = _place(scan.array, scan.grid)
    placed["metadata"] |= {"kind": "scan", "scan": scan}
    # In 3D a plain maximum of a head is its skin.
    drawn = {"colormap": "gray", "contrast_limits": scan_window(scan.array), "rendering": "attenuated_mip"}
    return data, placed | drawn | {"name": name}, "image"


def map_layer(
    values: NDArray,
    grid: Grid,
    name: str,
    window: tuple[float, float],
    unit: str = "",
    signed: bool = False,
    scan: Scan | None = None,
) -> LayerData:
    """A map in colours that fade out towards the low end of its window, so that an empty map is invisible.

    Parameters
    ----------
    values : (I, J, K) on ``grid``
    window : the values at the two ends of the colour map
    unit : of the values; kept in the metadata
    signed : blue for negative, orange for positive, and a window centred on zero
    scan : on whose voxels the map lies; kept in the metadata without its own, for whoever writes the map to a file

    Returns
    -------
    (data, arguments, "image") : data (S, A, R), a view of ``values``
    """
    data, placed = _place(values, grid)
    placed["metadata"] |= {"kind": "map", "unit": unit, "window": tuple(map(float, window)), "signed": signed}
    placed["metadata"] |= {"scan": scan.without_voxels() if scan else None}
    shown = limits(window, signed)
    drawn = {
        "colormap": colormap(shown, signed),
        "contrast_limits": shown,
        # Without depth: with it, napari hides the scan behind a transparent map in 3D.
        "blending": "translucent_no_depth",
    }
    return data, placed | drawn | {"name": name}, "image"


def mask_layer(labels: NDArray[np.integer], grid: Grid, name: str) -> LayerData:
    """A mask or label map (I, J, K) on ``grid`` in one green, which neither kind of map has; 0 is clear.

    Whoever adds the layer sets its ``contour``: napari takes none with the data.

    Returns
    -------
    (data, arguments, "labels") : data (S, A, R), a view of ``labels``
    """
    data, placed = _place(labels, grid)
    placed["metadata"] |= {"kind": "mask"}
    green = {"colormap": {0: "transparent", None: _MASK_COLOUR}, "opacity": 0.9, "blending": "translucent_no_depth"}
    return data, placed | green | {"name": name}, "labels"


def colormap(window: tuple[float, float], signed: bool = False, threshold: float = 0.0) -> dict[str, Any]:
    """The colours of a map as napari takes them, without those of values below ``threshold``.

    Parameters
    ----------
    window : the values at the two ends
    signed : whether ``threshold`` is of magnitudes, on both sides of zero
    threshold : in the map's own unit; what is below is clear
    """
    points = colours(signed)
    at = np.linspace(0, 1, len(points))
    low, high = window
    edges = np.clip((np.array([-threshold if signed else low, threshold]) - low) / (high - low), 0, 1)
    below = np.clip(edges + np.array([_STEP, -_STEP]), 0, 1)  # just inside what is to be clear
    if threshold > 0 and below[0] < below[1]:
        at = np.unique(np.concatenate([at, edges, below]))
        points = np.stack([np.interp(at, np.linspace(0, 1, len(points)), column) for column in points.T], axis=1)
        points[(at >= below[0]) & (at <= below[1]), 3] = 0
        if not signed:
            points[at <= below[1], 3] = 0
    return {"name": "volsal signed" if signed else "volsal", "colors": points.tolist(), "controls": at.tolist()}


def value_at(data: NDArray, arguments: Mapping[str, Any], point: ArrayLike) -> float | None:
    """The value of the voxel of a layer that holds a position in napari's world (S, A, R); None outside of them.

    ``arguments`` has the layer's ``scale`` and ``translate``.
    """
    at = (np.asarray(point, dtype=np.float64) - arguments["translate"]) / arguments["scale"]
    voxel = np.floor(at + 0.5).astype(int)
    if (voxel < 0).any() or (voxel >= data.shape).any():
        return None
    return float(data[tuple(voxel)])


def as_stored(data: NDArray, grid: Grid) -> NDArray:
    """A layer's data (S, A, R) in the order of ``grid``, (I, J, K): the way back from :func:`map_layer`.

    Raises
    ------
    ValueError
        Where the data are not of the grid's shape.
    """
    stored = np.empty(grid.shape, dtype=data.dtype)
    upright = Upright(grid).array(stored)
    if data.shape[::-1] != upright.shape:
        raise ValueError(f"the layer has shape {data.shape[::-1]}, its scan {upright.shape}")
    upright[...] = data.transpose(2, 1, 0)
    return stored


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
            "note": upright.note,
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
