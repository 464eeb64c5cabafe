"""The Explain panel: a model, a scan and a question in; the map over the scan out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from napari.viewer import Viewer
from qtpy.QtWidgets import (
    QAbstractItemView,
    QComboBox,
    QFileDialog,
    QFormLayout,
    QLabel,
    QLineEdit,
    QListWidget,
    QProgressBar,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from volsal.errors import VolsalError
from volsal.explanation import Explanation
from volsal.plugin.explanations import Desk
from volsal.plugin.job import Job
from volsal.plugin.map_look import MapLook, beside
from volsal.scans import Scan
from volsal.viewer.layers import map_layer, napari_world, scan_layer
from volsal.viewer.show import face, faced, orient

_FILES = "a file ..."
Source = Scan | Sequence[Path]


class ExplainPanel(QWidget):
    """Choose, press Explain, look.  The work is done in the background, one piece at a time, and can be cancelled."""

    def __init__(self, napari_viewer: Viewer) -> None:
        super().__init__()
        self.viewer = napari_viewer
        self.desk: Desk | None = None
        self.job: Job | None = None
        self.explanation: Explanation | None = None
        self._files: list[Path] = []
        self._make_widgets()
        self._lay_out()
        self._connect()
        self._list_scans()
        self._show_state()

    # ---- the panel

    def _make_widgets(self) -> None:
        self.config, self.browse = QLineEdit(), QPushButton("Choose ...")
        self.config.setPlaceholderText("model config, .yaml")
        self.scan, self.method, self.target = QComboBox(), QComboBox(), QComboBox()
        self.target.setEditable(True)
        self.layers, self.find_layers = QListWidget(), QPushButton("Find layers")
        self.layers.setSelectionMode(QAbstractItemView.SelectionMode.ExtendedSelection)
        self.layers.setMaximumHeight(96)
        self.layers.setToolTip("none: the method's own choice; several: a map for each")
        self.explain, self.cancel, self.save = QPushButton("Explain"), QPushButton("Cancel"), QPushButton("Save ...")
        self.save.setToolTip("write the maps and their record into a case folder")
        self.bar, self.message = QProgressBar(), QLabel()
        self.message.setWordWrap(True)
        self.look = MapLook(self.viewer)
        for box in (self.scan, self.method, self.target):
            box.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
            box.setMinimumContentsLength(14)

    def _lay_out(self) -> None:
        form = QFormLayout()
        form.addRow("Model", beside(self.config, self.browse))
        form.addRow("Scan", self.scan)
        form.addRow("Method", self.method)
        form.addRow("Target", self.target)
        form.addRow("Layers", self.layers)
        form.addRow("", self.find_layers)
        box = QVBoxLayout(self)
        box.addLayout(form)
        box.addWidget(beside(self.explain, self.cancel, self.save))
        box.addWidget(self.bar)
        box.addWidget(self.message)
        box.addWidget(self.look)
        box.addStretch()
        self.setMinimumWidth(300)

    def _connect(self) -> None:
        self.browse.clicked.connect(self._choose_config)
        self.config.editingFinished.connect(self.load)
        self.scan.activated.connect(self._choose_scan)
        self.find_layers.clicked.connect(self.list_layers)
        self.explain.clicked.connect(self.start)
        self.cancel.clicked.connect(self.stop)
        self.save.clicked.connect(self._choose_folder)
        self.viewer.layers.events.inserted.connect(self._list_scans)
        self.viewer.layers.events.removed.connect(self._list_scans)

    def _show_state(self) -> None:
        busy = self.job is not None
        asking: list[QWidget] = [self.scan, self.method, self.target, self.layers, self.find_layers, self.explain]
        for widget in (*asking, self.config, self.browse):
            widget.setEnabled(not busy and (self.desk is not None or widget not in asking))
        self.cancel.setEnabled(busy)
        self.save.setEnabled(not busy and self.explanation is not None)
        self.bar.setVisible(busy)

    def say(self, words: str) -> None:
        """Put one line under the buttons."""
        self.message.setText(words)
        self.message.setToolTip(words)

    # ---- work

    def _begin(self, job: Job, then: Any) -> None:
        """Start the work that ``job`` is; ``then`` is given its result."""
        self.job = job
        job.progressed.connect(self._progressed)
        job.succeeded.connect(self._ended)
        job.succeeded.connect(then)
        job.failed.connect(self._ended)
        job.failed.connect(self.say)
        job.cancelled.connect(self._ended)
        job.cancelled.connect(lambda: self.say("cancelled"))
        self.bar.setRange(0, 0)
        self._show_state()
        job.start()

    def _ended(self, result: Any = None) -> None:
        if self.job is not None:
            self.job.deleteLater()
        self.job = None
        self._show_state()

    def _progressed(self, what: str, done: int, of: int) -> None:
        self.say(f"{what} ..." if not of else f"{what}: {done} of {of}")
        self.bar.setRange(0, of)
        self.bar.setValue(done)

    def stop(self) -> None:
        """End the work at its next step."""
        if self.job is not None:
            self.job.cancel()
            self.say("cancelling: the present step is finished first")

    # ---- the model

    def _choose_config(self) -> None:
        path, _ = QFileDialog.getOpenFileName(self, "Model config", self.config.text(), "Configs (*.yaml *.yml)")
        if path:
            self.config.setText(path)
            self.load()

    def load(self) -> None:
        """Load the model that the config names."""
        path = Path(self.config.text().strip()).expanduser()
        known = self.desk is not None and self.desk.config.path == path
        if self.job is not None or known or not self.config.text().strip():
            return
        self.desk, self.explanation = None, None
        self.say("loading the model ...")
        self._begin(Job(self, lambda progress: Desk.of(path)), self._loaded)

    def _loaded(self, desk: Desk) -> None:
        self.desk = desk
        for box, words in ((self.method, desk.methods), (self.target, desk.targets)):
            box.clear()
            box.addItems(words)
        self.layers.clear()
        self.say(f"{type(desk.explainer.model).__name__} is ready")
        self._show_state()

    # ---- the scan

    def _list_scans(self, event: Any = None) -> None:
        chosen = self.scan.currentData()
        self.scan.clear()
        for layer in self.viewer.layers:
            if layer.metadata.get("kind") == "scan":
                self.scan.addItem(layer.name, layer.metadata["scan"])
        if self._files:
            self.scan.addItem(", ".join(path.name for path in self._files), list(self._files))
        self.scan.addItem(_FILES, None)
        known = [self.scan.itemData(number) for number in range(self.scan.count())]
        held = next((n for n, one in enumerate(known) if chosen is not None and one == chosen), 0)
        self.scan.setCurrentIndex(held)

    def _choose_scan(self, index: int) -> None:
        if self.scan.itemData(index) is not None:
            return
        files, _ = QFileDialog.getOpenFileNames(self, "Scan; several files are the channels of one case")
        if files:
            self.use_files([Path(file) for file in files])

    def use_files(self, files: Sequence[Path]) -> None:
        """Take these files, the channels of one case, for the scan."""
        self._files = list(files)
        self._list_scans()
        self.scan.setCurrentIndex(self.scan.count() - 2)

    def _source(self) -> Source | None:
        source = self.scan.currentData()
        if source is None:
            self.say("no scan: open one in napari, or choose a file")
        return source

    # ---- the layers

    def list_layers(self) -> None:
        """Find the layers of the model at which a map of the chosen scan can be taken."""
        desk, source = self.desk, self._source()
        if self.job is not None or desk is None or source is None:
            return
        self.say("looking for layers ...")
        self._begin(Job(self, lambda progress: desk.layers(source)), self._layers_found)

    def _layers_found(self, layers: list[str]) -> None:
        self.layers.clear()
        self.layers.addItems(layers)
        self.say(f"{len(layers)} layers, the last one first; choose some, or none for the method's own choice")

    # ---- the map

    def start(self) -> None:
        """Explain the chosen scan."""
        desk, source = self.desk, self._source()
        if self.job is not None or desk is None or source is None:
            return
        method, target = self.method.currentText(), self.target.currentText().strip()
        layers = [item.text() for item in self.layers.selectedItems()]
        self._begin(Job(self, lambda progress: desk.explain(source, method, layers, target, progress)), self._explained)

    def _explained(self, explanation: Explanation) -> None:
        self.explanation = explanation
        scan = explanation.scan
        if not any(_is_of(layer.metadata.get("scan"), scan) for layer in self.viewer.layers):
            name = scan.path.name if scan.path else "scan"
            self._add(scan_layer(scan, name))
            self.viewer.reset_view()
        for layer in self.viewer.layers:
            if layer.metadata.get("kind") == "map":
                layer.visible = False
            if layer.metadata.get("kind") == "scan":  # another one's picture would lie under this one's map
                layer.visible = _is_of(layer.metadata["scan"], scan)
        for shown in reversed(explanation.maps):
            layer = map_layer(shown.values, scan.grid, shown.name, shown.window, shown.unit, shown.signed, scan)
            self._add(layer)
        orient(self.viewer)
        if faced(self.viewer) is None:
            face(self.viewer, "radiological")
        first = explanation.maps[0]
        if first.peak_mm:
            self.viewer.dims.point = tuple(napari_world(scan.grid, first.peak_mm))
        self.say(_told(explanation))
        self._show_state()

    def _add(self, layer: Any) -> None:
        data, arguments, _ = layer
        self.viewer.add_image(data, **arguments)

    # ---- the record

    def _choose_folder(self) -> None:
        folder = QFileDialog.getExistingDirectory(self, "Folder for the result")
        if folder:
            self.save_to(Path(folder))

    def save_to(self, folder: Path) -> None:
        """Write the last result into ``folder``."""
        if self.explanation is None or self.desk is None:
            return
        try:
            self.say(f"written to {self.desk.save(self.explanation, folder)}")
        except VolsalError as error:
            self.say(str(error))


def _is_of(shown: Scan | None, scan: Scan) -> bool:
    """Whether a layer is of that very scan, and not of another volume in its file."""
    if shown is None or shown is scan:
        return shown is scan
    ours, theirs = ((one.sha256, one.volume, one.series, one.slices) for one in (scan, shown))
    return scan.sha256 is not None and ours == theirs


def _told(explanation: Explanation) -> str:
    lines = [str(explanation.prediction)]
    for shown in explanation.maps:
        where = "peak at {:.0f}, {:.0f}, {:.0f} mm".format(*shown.peak_mm) if shown.peak_mm else f"{shown.status} map"
        lines.append(f"{shown.name}: {where}")
    return "; ".join([*lines, *explanation.notes])
