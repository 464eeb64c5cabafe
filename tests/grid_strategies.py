"""Grids at random: any rotation, spacing, flip and origin."""

import numpy as np
from hypothesis import strategies as st

from volsal.grid import Grid


@st.composite
def grids(draw):
    turn = np.eye(3)
    for axis in range(3):
        angle = draw(st.floats(-np.pi, np.pi))
        a, b = (i for i in range(3) if i != axis)
        step = np.eye(3)
        step[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        turn = turn @ step
    affine = np.eye(4)
    affine[:3, :3] = turn * [draw(st.floats(0.4, 6)) * draw(st.sampled_from([-1, 1])) for _ in range(3)]
    affine[:3, 3] = [draw(st.floats(-300, 300)) for _ in range(3)]
    return Grid([draw(st.integers(2, 12)) for _ in range(3)], affine)
