"""Axial, coronal and sagittal planes through one crosshair, linked with napari's own canvas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from napari.components import ViewerModel
from napari.layers import Image, Labels, Layer, Vectors
from napari.qt import QtViewer
from napari.viewer import Viewer
from qtpy.QtCore import QSize, Qt, QTimer
from qtpy.QtWidgets import QLabel, QPushButton, QSplitter, QVBoxLayout, QWidget

from volsal.display import PLANES, PlaneName
from volsal.viewer.show import face, faced, letter_edges, orient, words_at

# What a plane's copy of a layer takes over from it when it changes.
_FOLLOWED = ("data", "visible", "opacity", "blending", "colormap", "contrast_limits", "gamma", "contour")
_ZOOM = 1.1
_CROSS_PIXELS = 1.5
_SETTLED_MS = 50
_GREEN = (0.25, 1.0, 0.4, 0.7)


class LinkedPlanes(QWidget):
    """Three planes through one position, which a click or drag in any of them moves; the wheel goes through slices.

    Below them: the position, mm in the scanner's world, and the value of each visible layer there.
    """

    def __init__(self, napari_viewer: Viewer) -> None:
        super().__init__()
        self.viewer = napari_viewer
        self.panes = {name: Pane(napari_viewer, name) for name in PLANES}
        self.readout = QLabel()
        self.readout.setWordWrap(True)
        self.readout.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        self.solid = QPushButton("3D in the main window")
        self.solid.setCheckable(True)
        self.sides = QPushButton("Swap left and right")
        splitter = QSplitter(Qt.Orientation.Vertical)
        for pane in self.panes.values():
            splitter.addWidget(pane.canvas)
        box = QVBoxLayout(self)
        box.setContentsMargins(2, 2, 2, 2)
        box.addWidget(splitter, stretch=1)
        for widget in (self.readout, self.solid, self.sides):
            box.addWidget(widget)
        self.setMinimumWidth(300)
        self._soon = QTimer(self)
        self._soon.setSingleShot(True)
        self._soon.timeout.connect(self.rebuild)
        self._connect()
        if faced(napari_viewer) is None:
            face(napari_viewer, "radiological")
        orient(napari_viewer)
        self.rebuild()

    def sizeHint(self) -> QSize:
        """Leave most of the window to napari's own canvas."""
        return QSize(340, 700)

    def _connect(self) -> None:
        viewer = self.viewer
        for event in (viewer.layers.events.inserted, viewer.layers.events.removed, viewer.layers.events.reordered):
            event.connect(self._later)
        viewer.dims.events.point.connect(self._move)
        viewer.scene.camera.events.orientation.connect(self._turn)
        viewer.dims.events.ndisplay.connect(self._tell_3d)
        viewer.mouse_drag_callbacks.append(self._click)
        self.solid.toggled.connect(self.show_3d)
        self.sides.clicked.connect(self.swap_sides)

    def _later(self, event: Any = None) -> None:
        """Several layers that come or go together are taken over at once."""
        self._soon.start()

    def rebuild(self) -> None:
        """Take the main window's layers over anew."""
        for pane in self.panes.values():
            pane.take(self.viewer)
        self._move()

    def _move(self, event: Any = None) -> None:
        for pane in self.panes.values():
            pane.go(self.viewer.dims.point)
        tilts = [layer.metadata.get("note", "") for layer in self.viewer.layers if layer.visible]
        words = [*words_at(self.viewer, self.viewer.dims.point), *dict.fromkeys(filter(None, tilts))]
        self.readout.setText("\n".join(words) or "no scan or map is open")

    def _turn(self, event: Any = None) -> None:
        for pane in self.panes.values():
            pane.model.scene.camera.orientation = self.viewer.scene.camera.orientation

    def swap_sides(self) -> None:
        """From radiological to neurological, or back."""
        face(self.viewer, "neurological" if faced(self.viewer) == "radiological" else "radiological")

    def show_3d(self, on: bool) -> None:
        """Show the main window's layers as volumes, seen from the patient's front; or as slices again."""
        self.viewer.dims.ndisplay = 3 if on else 2
        self.viewer.reset_view()
        if on:
            self.viewer.scene.camera.set_view_direction((0.0, -1.0, 0.0), (1.0, 0.0, 0.0))

    def _tell_3d(self, event: Any = None) -> None:
        self.solid.setChecked(self.viewer.dims.ndisplay == 3)

    def _click(self, viewer: Viewer, event: Any) -> Iterator[None]:
        """A click in the main window moves the crosshair; a drag moves the picture, as napari does."""
        dragged = False
        yield
        while event.type == "mouse_move":
            dragged = True
            yield
        if not dragged and viewer.dims.ndisplay == 2 and viewer.dims.ndim == 3:
            viewer.dims.point = tuple(event.position)

    def closeEvent(self, event: Any) -> None:
        """Let go of the viewer."""
        if self._click in self.viewer.mouse_drag_callbacks:
            self.viewer.mouse_drag_callbacks.remove(self._click)
        for pane in self.panes.values():
            pane.canvas.close()
        super().closeEvent(event)


class Canvas(QtViewer):  # type: ignore[misc]  # napari does not tell its type
    """A canvas in which the whole plane is seen again whenever its size has changed."""

    def __init__(self, model: ViewerModel) -> None:
        super().__init__(model)
        self._fit = QTimer(self)
        self._fit.setSingleShot(True)
        self._fit.timeout.connect(model.reset_view)

    def resizeEvent(self, event: Any) -> None:
        """Wait until the drawing itself has the new size."""
        super().resizeEvent(event)
        self._fit.start(_SETTLED_MS)


class Pane:
    """One plane: a canvas of its own, on copies of the layers that share their data."""

    def __init__(self, viewer: Viewer, name: PlaneName) -> None:
        view = PLANES[name]
        self._viewer = viewer
        self._through, self._shown = 2 - view.through, (2 - view.up, 2 - view.across)
        self._copies: dict[Layer, Layer] = {}
        self._cross: dict[int, Vectors] = {}
        self._reach = np.zeros((3, 2))
        self.model = ViewerModel(ndisplay=2)
        self.model.mouse_drag_callbacks.append(self._drag)
        self.model.mouse_wheel_callbacks[:] = [self._wheel]
        self.model.scene.camera.events.zoom.connect(self._thin)
        self.canvas = Canvas(self.model)
        self.canvas.dims.hide()
        self.canvas.setAcceptDrops(False)
        self.canvas.setMinimumHeight(100)
        self.canvas.setToolTip(f"{name}: click or drag to move the crosshair, wheel for slices, Ctrl+wheel to zoom")
        letter_edges(self.model, font_size=8)

    def take(self, viewer: Viewer) -> None:
        """Copy the layers of ``viewer``, and follow them."""
        for layer in self._copies:
            for name in _FOLLOWED:
                if hasattr(layer.events, name):
                    getattr(layer.events, name).disconnect(self._follow)
        self.model.layers.clear()
        self._copies, self._cross = {}, {}
        volumes = [layer for layer in viewer.layers if isinstance(layer, (Image, Labels)) and layer.ndim == 3]
        for layer in volumes:
            data, state, kind = layer.as_layer_data_tuple()
            copy = self.model.add_layer(Layer.create(data, state, kind))
            self._copies[layer] = copy
            for name in _FOLLOWED:
                if hasattr(layer.events, name):
                    getattr(layer.events, name).connect(self._follow)
            if isinstance(layer, Labels):
                copy.contour = layer.contour
        if volumes:
            self._reach = np.array([(low, high) for low, high, _ in self.model.dims.range])
            self._draw_cross(volumes[0])
            self.model.dims.order = (self._through, *self._shown)
        self.model.layers.selection.clear()
        camera = self.model.scene.camera
        camera.orientation = viewer.scene.camera.orientation
        camera.mouse_pan = camera.mouse_zoom = False
        self.model.reset_view()
        self._thin()

    def _draw_cross(self, layer: Layer) -> None:
        """A line along each shown axis, in voxels of ``layer``, so that napari rounds positions as it does there."""
        self._cross = {
            axis: self.model.add_vectors(
                np.zeros((1, 2, 3)),
                name=f"crosshair {'SAR'[axis]}",
                edge_color=[_GREEN],
                vector_style="line",
                blending="translucent_no_depth",
                scale=layer.scale,
                translate=layer.translate,
                units=layer.units,
                axis_labels=layer.axis_labels,
            )
            for axis in self._shown
        }
        self._aim_cross(self._viewer.dims.point)

    def _aim_cross(self, point: Any) -> None:
        for axis, line in self._cross.items():
            ends = np.array([point, point])
            ends[:, axis] = self._reach[axis]
            start, end = (ends - line.translate) / line.scale
            line.data = np.array([[start, end - start]])

    def _thin(self, event: Any = None) -> None:
        """Draw the crosshair as thin as it can be seen, however large a voxel is."""
        for axis, line in self._cross.items():
            across = next(other for other in self._shown if other != axis)
            line.edge_width = _CROSS_PIXELS / self.model.scene.camera.zoom / line.scale[across]

    def _follow(self, event: Any) -> None:
        source, name = event.source, event.type
        setattr(self._copies[source], name, getattr(source, name))

    def go(self, point: Any) -> None:
        """Show the slice through ``point`` (S, A, R), and the crosshair there."""
        if not self._cross or len(point) != 3:
            return
        self.model.dims.point = point
        self._aim_cross(point)

    def _drag(self, model: ViewerModel, event: Any) -> Iterator[None]:
        self._aim(event)
        yield
        while event.type == "mouse_move":
            self._aim(event)
            yield

    def _aim(self, event: Any) -> None:
        if self._cross:
            self._viewer.dims.point = tuple(np.clip(event.position, *self._reach.T).tolist())

    def _wheel(self, model: ViewerModel, event: Any) -> None:
        if "Control" in [str(key) for key in event.modifiers]:
            model.scene.camera.zoom *= _ZOOM ** event.delta[1]
        elif self._cross:
            point = list(self._viewer.dims.point)
            moved = point[self._through] + self._step() * np.sign(event.delta[1])
            point[self._through] = float(np.clip(moved, *self._reach[self._through]))
            self._viewer.dims.point = tuple(point)

    def _step(self) -> float:
        """From one slice to the next, mm."""
        return float(min(layer.scale[self._through] for layer in self._copies))
