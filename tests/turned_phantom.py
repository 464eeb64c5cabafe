"""One asymmetric volume with a blob at a known place, and the 48 ways to store it."""

from itertools import permutations, product

import numpy as np

from volsal.grid import Grid

# Right, anterior and superior of the middle (11, 10.5, 31), by a different distance each.
BLOB_MM = np.array([29.0, 22.0, 51.0])
SPACING, SHAPE = np.array([2.0, 3.0, 4.0]), (32, 28, 24)
# The 48 ways to store one volume.
ORIENTATIONS = ["".join(ends) for order in permutations(("RL", "AP", "SI")) for ends in product(*order)]


def phantom():
    """A Gaussian at a known place on a faint gradient that differs along every axis, stored RAS."""
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = (-20.0, -30.0, -15.0)
    grid = Grid(SHAPE, affine)
    at = grid.world(np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1))
    gaussian = np.exp(-((at - BLOB_MM) ** 2).sum(-1) / (2 * 6.0**2))
    return (gaussian + at @ [1e-4, 2e-4, 3e-4] + 0.02).astype(np.float32), grid


def stored_as(values, grid, codes):
    """The same voxels at the same places, stored along axes that point to ``codes``."""
    order = [next(axis for axis in range(3) if code in ("RL", "AP", "SI")[axis]) for code in codes]
    to_old = np.zeros((4, 4))
    to_old[3, 3] = 1
    flips = []
    for new, (axis, code) in enumerate(zip(order, codes, strict=True)):
        flip = code in "LPI"
        to_old[axis, new] = -1 if flip else 1
        to_old[axis, 3] = grid.shape[axis] - 1 if flip else 0
        flips.append(slice(None, None, -1) if flip else slice(None))
    turned = values.transpose(order)[tuple(flips)]
    return np.ascontiguousarray(turned), Grid(turned.shape, grid.affine @ to_old)


def tilted(grid, degrees):
    """The grid turned about the patient's left-right axis, as a head is pitched."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[1, 0, 0, 0], [0, cos, -sin, 0], [0, sin, cos, 0], [0, 0, 0, 1]])
    return Grid(grid.shape, turn @ grid.affine)
