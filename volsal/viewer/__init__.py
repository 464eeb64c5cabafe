"""Scans and maps in napari, anatomically upright and with true positions in mm."""

# `show` itself is not lifted here: the name would hide the module it lives in.
from volsal.viewer.opening import ShownMap, ViewerError
from volsal.viewer.show import open_case, screenshot

__all__ = ["ShownMap", "ViewerError", "open_case", "screenshot"]
