"""Commands of napari's menus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volsal.viewer.show import face, orient

if TYPE_CHECKING:
    import napari.viewer


# napari reads these annotations as text, and finds the viewer to give by them.
def radiological(viewer: napari.viewer.Viewer) -> None:
    """Show the patient's right on the left of the screen."""
    orient(viewer)
    face(viewer, "radiological")


def neurological(viewer: napari.viewer.Viewer) -> None:
    """Show the patient's right on the right of the screen."""
    orient(viewer)
    face(viewer, "neurological")
