"""How the chosen map is shown: threshold, opacity, and its colours with their values beside them."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
from napari.layers import Image
from napari.viewer import Viewer
from qtpy.QtCore import QRectF, Qt
from qtpy.QtGui import QColor, QImage, QPainter
from qtpy.QtWidgets import QFormLayout, QHBoxLayout, QLabel, QSizePolicy, QSlider, QWidget

from volsal.display import verdict
from volsal.viewer.layers import colormap

_STEPS = 1000


class MapLook(QWidget):
    """Sliders for the map that is selected in the layer list, or else for the visible one on top.

    The sliders keep their places when another map is shown, so that cases of a run can be compared.
    """

    def __init__(self, viewer: Viewer, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._viewer = viewer
        self._layer: Image | None = None
        self.name, self.value, self.bar = QLabel(), QLabel(), ColourBar()
        self.threshold, self.opacity = _slider(0), _slider(_STEPS)
        self.name.setWordWrap(True)
        form = QFormLayout(self)
        form.setContentsMargins(0, 0, 0, 0)
        form.addRow(self.name)
        form.addRow(self.bar)
        form.addRow("Hide below", self.threshold)
        form.addRow("", self.value)
        form.addRow("Opacity", self.opacity)
        self.threshold.valueChanged.connect(self.apply)
        self.opacity.valueChanged.connect(self.apply)
        layers = viewer.layers
        for event in (layers.events.inserted, layers.events.removed, layers.selection.events.active):
            event.connect(self._choose)
        self._choose()

    @property
    def layer(self) -> Image | None:
        """The map that the sliders are for."""
        return self._layer

    def _choose(self, event: Any = None) -> None:
        maps = [layer for layer in self._viewer.layers if layer.metadata.get("kind") == "map"]
        active = self._viewer.layers.selection.active
        shown = [layer for layer in maps if layer.visible]
        chosen = active if active in maps else next(iter(shown[::-1] or maps[::-1]), None)
        if chosen is not self._layer:
            if self._layer is not None:
                self._layer.events.contrast_limits.disconnect(self.apply)
            self._layer = chosen
            if chosen is not None:
                chosen.events.contrast_limits.connect(self.apply)
        self.apply()

    def apply(self, event: Any = None) -> None:
        """Show the chosen map as the sliders say."""
        layer = self._layer
        self.setEnabled(layer is not None)
        if layer is None:
            self.name.setText("no map is open")
            self.value.setText("")
            self.bar.show_nothing()
            return
        unit, signed = layer.metadata["unit"], layer.metadata["signed"]
        window = tuple(layer.contrast_limits)
        share = self.threshold.value() / _STEPS
        least = share * window[1] if signed else window[0] + share * (window[1] - window[0])
        look = colormap(window, signed, least if share else 0.0)
        layer.colormap = look
        layer.opacity = self.opacity.value() / _STEPS
        said = verdict(layer.data)
        self.name.setText(
            ", ".join(filter(None, [f"<b>{escape(layer.name)}</b>", unit and f"in {escape(unit)}", said]))
        )
        what = "magnitudes" if signed else "values"
        self.value.setText(f"{what} below {least:.3g} are clear" if share else "nothing is hidden")
        self.bar.show_colours(look, window)


def _slider(value: int) -> QSlider:
    slider = QSlider(Qt.Orientation.Horizontal)
    slider.setRange(0, _STEPS)
    slider.setValue(value)
    return slider


class ColourBar(QWidget):
    """The colours of a map over the grey of a scan, with the values at the ends and in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self._strip: QImage | None = None
        self._words: list[str] = []
        self.setMinimumHeight(2 * self.fontMetrics().height() + 4)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)

    def show_nothing(self) -> None:
        """Be empty."""
        self._strip, self._words = None, []
        self.update()

    def show_colours(self, look: dict[str, Any], window: tuple[float, float]) -> None:
        """``look`` as :func:`volsal.viewer.layers.colormap` makes it, over ``window``."""
        at, points = np.linspace(0, 1, 512), np.array(look["colors"])
        colours = np.stack([np.interp(at, look["controls"], column) for column in points.T], axis=1)
        seen = colours[:, :3] * colours[:, 3:] + 0.35 * (1 - colours[:, 3:])
        pixels = (255 * np.column_stack([seen, np.ones(len(at))])).astype(np.uint8)
        self._strip = QImage(pixels.tobytes(), len(at), 1, QImage.Format.Format_RGBA8888).copy()
        middle = (window[0] + window[1]) / 2
        self._words = [f"{value:.3g}" for value in (window[0], middle, window[1])]
        self.setAccessibleName(f"colours from {self._words[0]} to {self._words[2]}")
        self.update()

    def paintEvent(self, event: Any) -> None:
        """Draw the strip with the words under it."""
        if self._strip is None:
            return
        painter = QPainter(self)
        half = self.height() / 2
        painter.drawImage(QRectF(0, 0, self.width(), half - 2), self._strip, QRectF(0, 0, self._strip.width(), 1))
        painter.setPen(QColor(self.palette().windowText().color()))
        below = QRectF(0, half, self.width(), half)
        sides = (Qt.AlignmentFlag.AlignLeft, Qt.AlignmentFlag.AlignHCenter, Qt.AlignmentFlag.AlignRight)
        for words, side in zip(self._words, sides, strict=True):
            painter.drawText(below, side | Qt.AlignmentFlag.AlignVCenter, words)
        painter.end()


def beside(*widgets: QWidget) -> QWidget:
    """The widgets in one row, without a margin."""
    row = QWidget()
    box = QHBoxLayout(row)
    box.setContentsMargins(0, 0, 0, 0)
    for widget in widgets:
        box.addWidget(widget)
    return row
