"""The Audit browser: the cases of a run in a table, one of them on the screen, and a reviewer's word on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from napari.layers import Layer
from napari.viewer import Viewer
from qtpy.QtCore import QAbstractTableModel, QEvent, QModelIndex, QSize, QSortFilterProxyModel, Qt
from qtpy.QtGui import QKeySequence
from qtpy.QtWidgets import (
    QAbstractItemView,
    QCheckBox,
    QComboBox,
    QFileDialog,
    QFormLayout,
    QGridLayout,
    QHeaderView,
    QLabel,
    QLineEdit,
    QPushButton,
    QScrollArea,
    QShortcut,
    QSplitter,
    QTableView,
    QVBoxLayout,
    QWidget,
)

from volsal.errors import VolsalError
from volsal.plugin.cases import CaseRow, CaseTable
from volsal.plugin.job import Job
from volsal.plugin.map_look import MapLook, beside
from volsal.plugin.review import Review, Reviews
from volsal.viewer.layers import LayerData, napari_world
from volsal.viewer.opening import Opened, open_folder
from volsal.viewer.show import face, faced, orient

_VERDICTS = ("", "plausible", "doubtful", "implausible")
_SORTED_BY = Qt.ItemDataRole.UserRole
_ANY = "any"
_WAYS = {Qt.Key.Key_PageDown: 1, Qt.Key.Key_PageUp: -1}
# Width by height from which the two halves lie side by side.
_WIDE = 1.2


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading, and what it shows of a case."""

    heading: str
    value: Callable[[CaseRow], str | float | None]


def columns_of(table: CaseTable) -> list[Column]:
    """The columns of a run; those that would be empty for every case are left out, but for the reviewer's own."""

    def of_group(name: str) -> Column:
        return Column(name, lambda row: row.groups.get(name, ""))

    about = [
        Column("suspicion", lambda row: row.suspicion),
        Column("prediction", lambda row: row.prediction),
        Column("label", lambda row: row.label),
        Column("answer", lambda row: row.answer),
        *map(of_group, table.groups),
    ]
    told = [column for column in about if any(column.value(row) not in ("", None) for row in table.rows)]
    return [
        Column("case", lambda row: row.id),
        Column("status", lambda row: row.status),
        *told,
        Column("verdict", lambda row: row.review.verdict),
        Column("comment", lambda row: row.review.comment),
    ]


class Cases(QAbstractTableModel):
    """The table as Qt asks for it."""

    def __init__(self, table: CaseTable, parent: QWidget) -> None:
        super().__init__(parent)
        self.table = table
        self.shown = columns_of(table)

    def rowCount(self, parent: QModelIndex | None = None) -> int:  # noqa: D102 - Qt's
        return 0 if parent is not None and parent.isValid() else len(self.table.rows)

    def columnCount(self, parent: QModelIndex | None = None) -> int:  # noqa: D102 - Qt's
        return 0 if parent is not None and parent.isValid() else len(self.shown)

    def data(self, index: QModelIndex, role: int = Qt.ItemDataRole.DisplayRole) -> Any:  # noqa: D102 - Qt's
        row = self.table.rows[index.row()]
        value = self.shown[index.column()].value(row)
        if role == Qt.ItemDataRole.DisplayRole:
            return "" if value is None else f"{value:.2f}" if isinstance(value, float) else value
        if role == Qt.ItemDataRole.ToolTipRole:
            return row.remark or None
        if role == _SORTED_BY:
            return -1.0 if value is None else value
        return None

    def headerData(self, section: int, orientation: Any, role: int = Qt.ItemDataRole.DisplayRole) -> Any:  # noqa: D102 - Qt's
        if role != Qt.ItemDataRole.DisplayRole or orientation != Qt.Orientation.Horizontal:
            return None
        return self.shown[section].heading

    def reviewed(self, row: CaseRow) -> None:
        """Tell Qt that a case's review has changed."""
        number = self.table.rows.index(row)
        self.dataChanged.emit(self.index(number, 0), self.index(number, len(self.shown) - 1))


class Chosen(QSortFilterProxyModel):
    """The cases that pass the filters, as they are sorted."""

    def __init__(self, parent: QWidget) -> None:
        super().__init__(parent)
        self.setSortRole(_SORTED_BY)
        self.setSortCaseSensitivity(Qt.CaseSensitivity.CaseInsensitive)
        self._cases: Cases | None = None
        self._words: list[str] = []
        self._column, self._value = "", ""

    def take(self, cases: Cases) -> None:
        """Show these cases."""
        self._cases = cases
        self.setSourceModel(cases)

    def choose(self, words: str, column: str, value: str) -> None:
        """Show the cases in which each of ``words`` occurs, and whose ``column`` is ``value`` where one is given."""
        self._words, self._column, self._value = words.casefold().split(), column, value
        self.invalidate()

    def filterAcceptsRow(self, number: int, parent: QModelIndex) -> bool:  # noqa: D102 - Qt's
        if self._cases is None:
            return False
        row = self._cases.table.rows[number]
        values = {column.heading: column.value(row) for column in self._cases.shown}
        if self._column and values.get(self._column) != self._value:
            return False
        text = " ".join(str(value) for value in [*values.values(), row.remark] if value is not None).casefold()
        return all(word in text for word in self._words)


class AuditBrowser(QWidget):
    """Go through a run.  Page Down and Page Up lead to the next and the previous case of the table as it is shown.

    One case's layers are in memory at a time; they are read in the background, and only of the map that is chosen.
    """

    def __init__(self, napari_viewer: Viewer) -> None:
        super().__init__()
        self.viewer = napari_viewer
        self.table: CaseTable | None = None
        self.cases: Cases | None = None
        self.current: CaseRow | None = None
        self.job: Job | None = None
        self._layers: list[Layer] = []
        # By run and case what the disk refused, with what was there before.
        self._unsaved: dict[tuple[Path, str], tuple[Reviews, Review, Review]] = {}
        self._make_widgets()
        self._lay_out()
        self._connect()
        self.say("choose the folder of a run")

    # ---- the panel

    def _make_widgets(self) -> None:
        self.folder, self.browse = QLineEdit(), QPushButton("Choose ...")
        self.folder.setPlaceholderText("run folder")
        self.words, self.column, self.value = QLineEdit(), QComboBox(), QComboBox()
        self.words.setPlaceholderText("filter by words")
        self.words.setClearButtonEnabled(True)
        self.view, self.chosen = QTableView(), Chosen(self)
        self.view.setModel(self.chosen)
        self.view.setSortingEnabled(True)
        self.view.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.view.setSelectionMode(QAbstractItemView.SelectionMode.SingleSelection)
        self.view.setVerticalHeader(numbers := QHeaderView(Qt.Orientation.Vertical))
        numbers.hide()
        self.view.setMinimumHeight(140)
        self.map, self.one_scale = QComboBox(), QCheckBox("one scale for all cases")
        self.one_scale.setToolTip("colours up to the median of the cases' own maxima, so that cases can be compared")
        self.previous, self.next = QPushButton("Previous"), QPushButton("Next")
        self.verdict, self.comment = QComboBox(), QLineEdit()
        self.verdict.setEditable(True)
        self.verdict.addItems(_VERDICTS)
        self.message = QLabel()
        self.message.setWordWrap(True)
        self.message.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        self.look = MapLook(self.viewer)

    def _lay_out(self) -> None:
        grid = QGridLayout()
        for number, row in enumerate(((self.folder, self.browse), (self.words,), (self.column, self.value))):
            for place, widget in enumerate(row):
                grid.addWidget(widget, number, place, 1, 2 // len(row))
        left, right = QWidget(), QWidget()
        cases = QVBoxLayout(left)
        cases.addLayout(grid)
        cases.addWidget(self.view, stretch=1)
        form = QFormLayout()
        form.addRow(beside(self.previous, self.next))
        form.addRow("Verdict", self.verdict)
        form.addRow("Comment", self.comment)
        form.addRow("Map", self.map)
        form.addRow("", self.one_scale)
        case = QVBoxLayout(right)
        case.addLayout(form)
        case.addWidget(self.message)
        case.addWidget(self.look)
        case.addStretch()
        for layout in (cases, case):
            layout.setContentsMargins(2, 2, 2, 2)
        self._halves = QSplitter(Qt.Orientation.Vertical)
        self._halves.addWidget(left)
        self._halves.addWidget(_scrolled(right))
        box = QVBoxLayout(self)
        box.setContentsMargins(0, 0, 0, 0)
        box.addWidget(self._halves)
        self.setMinimumWidth(320)

    def sizeHint(self) -> QSize:
        """Leave most of the window to the pictures."""
        return QSize(360, 330)

    def resizeEvent(self, event: Any) -> None:
        """Put the table above the case at the side of the window, and beside it at the bottom."""
        super().resizeEvent(event)
        wide = self.width() > _WIDE * self.height()
        self._halves.setOrientation(Qt.Orientation.Horizontal if wide else Qt.Orientation.Vertical)

    def _connect(self) -> None:
        self.browse.clicked.connect(self._choose_folder)
        self.folder.returnPressed.connect(lambda: self.open(Path(self.folder.text()).expanduser()))
        self.words.textChanged.connect(self._filter)
        self.column.currentTextChanged.connect(self._list_values)
        self.value.currentTextChanged.connect(self._filter)
        selection: Any = self.view.selectionModel()
        selection.currentRowChanged.connect(self._selected)
        self.next.clicked.connect(lambda: self.step(1))
        self.previous.clicked.connect(lambda: self.step(-1))
        self.view.installEventFilter(self)
        for key, way in _WAYS.items():
            shortcut = QShortcut(QKeySequence(key), self, context=Qt.ShortcutContext.WindowShortcut)
            shortcut.activated.connect(lambda way=way: self.step(way))
        self.map.currentTextChanged.connect(self._load)
        self.one_scale.toggled.connect(self._load)
        self.verdict.currentTextChanged.connect(self._review)
        self.comment.editingFinished.connect(self._review)

    def eventFilter(self, watched: Any, event: Any) -> bool:
        """Take the keys that lead from case to case before the table does, which would go a whole page."""
        way = _WAYS.get(event.key()) if event.type() == QEvent.Type.KeyPress else None
        if way is None:
            return super().eventFilter(watched, event)
        self.step(way)
        return True

    def say(self, *words: str) -> None:
        """Put lines under the buttons; what is not saved is said again until it is."""
        lost = ", ".join(case for _, case in self._unsaved)
        self.message.setText("\n".join(filter(None, [lost and f"NOT SAVED yet: {lost}", *words])))

    # ---- the run

    def _choose_folder(self) -> None:
        folder = QFileDialog.getExistingDirectory(self, "Run folder", self.folder.text())
        if folder:
            self.open(Path(folder))

    def open(self, path: Path) -> None:
        """Show the run in ``path``, and its most suspicious case."""
        try:
            table = CaseTable.of(path)
        except (VolsalError, OSError) as error:
            self.say(str(error))
            return
        self._review()
        if self.job is not None:
            self.job.cancel()
        self._clear()
        self.folder.setText(str(path))
        self.table, self.current = table, None
        self.cases = Cases(table, self)
        self.chosen.take(self.cases)
        self.view.sortByColumn(-1, Qt.SortOrder.AscendingOrder)
        self.view.resizeColumnsToContents()
        _refill(self.map, table.maps)
        headings = [column.heading for column in self.cases.shown if column.heading not in ("case", "comment")]
        _refill(self.column, [_ANY, *headings])
        self._list_values(_ANY)
        orient(self.viewer)
        if faced(self.viewer) is None:
            face(self.viewer, "radiological")
        self.say(f"{len(table.rows)} cases")
        self.step(1)

    def _list_values(self, heading: str) -> None:
        column = next((one for one in (self.cases.shown if self.cases else []) if one.heading == heading), None)
        rows = self.table.rows if self.table else []
        values = {str(value) for row in rows if column and isinstance(value := column.value(row), str)}
        _refill(self.value, [_ANY, *sorted(values)])
        self.value.setEnabled(bool(values))
        self._filter()

    def _filter(self) -> None:
        value = self.value.currentText()
        self.chosen.choose(self.words.text(), "" if value in ("", _ANY) else self.column.currentText(), value)

    # ---- the case

    def step(self, way: int) -> None:
        """Go to the next case of the table, or with -1 to the previous one."""
        self.view.setFocus()
        at = self.view.currentIndex().row()
        to = min(max(at + way, 0), self.chosen.rowCount() - 1)
        if to >= 0:
            self.view.selectRow(to)
            self.view.setCurrentIndex(self.chosen.index(to, 0))

    def _selected(self, index: QModelIndex, before: QModelIndex) -> None:
        if self.table is None or not index.isValid():
            return
        row = self.table.rows[self.chosen.mapToSource(index).row()]
        if row is self.current:
            return
        self._review()
        self.current = row
        self._reread(row)
        for layer in self._layers:  # or the last case is seen beside this one's name until this one is read
            layer.visible = False
        self.say(f"{row.id}: reading ...")
        self.verdict.blockSignals(True)
        self.verdict.setCurrentText(row.review.verdict)
        self.verdict.blockSignals(False)
        self.comment.setText(row.review.comment)
        self._load()

    def _load(self) -> None:
        """Read the case that is chosen now; one that is still being read is not wanted any more."""
        row, table = self.current, self.table
        if row is None or table is None:
            return
        if self.job is not None:
            self.job.cancel()
            return  # which has this called again
        if row.status != "done":
            self._clear()
            self.say(f"{row.id}: {row.status}: {row.remark}")
            return
        name, folder = self.map.currentText(), table.run / row.id
        window = table.window(name) if self.one_scale.isChecked() else None
        self.job = Job(self, lambda progress: (row, _opened(folder, name, window)))
        self.job.succeeded.connect(self._show)
        self.job.failed.connect(self._fail)
        self.job.cancelled.connect(self._again)
        self.job.start()

    def _over(self) -> None:
        if self.job is not None:
            self.job.deleteLater()
        self.job = None

    def _again(self) -> None:
        self._over()
        self._load()

    def _fail(self, words: str) -> None:
        self._over()
        self._clear()
        self.say(words)

    def _clear(self) -> None:
        """Take the last case's layers away."""
        for layer in self._layers:
            if layer in self.viewer.layers:
                self.viewer.layers.remove(layer)
        self._layers = []

    def _show(self, found: tuple[CaseRow, Opened]) -> None:
        self._over()
        row, opened = found
        first = not self._layers
        self._clear()
        self._layers = [self._add(layer) for layer in opened.layers()]
        self.viewer.layers.selection.active = next((one for one in self._layers if one.metadata["kind"] == "map"), None)
        if first:
            self.viewer.reset_view()
        if opened.peak_mm is not None:
            self.viewer.dims.point = tuple(napari_world(opened.scan.grid, opened.peak_mm))
        said = " ".join(filter(None, [row.id, row.prediction, f"({row.answer})" if row.answer else ""]))
        self.say(said, row.remark, *map(str, opened.faults), *opened.notes)

    def _add(self, layer: LayerData) -> Layer:
        data, arguments, kind = layer
        added = self.viewer.add_layer(Layer.create(data, arguments, kind))
        if kind == "labels":
            added.contour = 1
        return added

    # ---- the reviewer

    def _review(self) -> None:
        """Save what is written beside the case, if it is new."""
        row, table = self.current, self.table
        if row is None or table is None or self.cases is None:
            return
        review = Review(self.verdict.currentText().strip(), self.comment.text().strip())
        if review != row.review:
            key = table.run.path, row.id
            before = self._unsaved[key][2] if key in self._unsaved else row.review
            self._unsaved[key] = table.reviews, review, before
            row.review = review
            self.cases.reviewed(row)
        self._save()

    def _save(self) -> None:
        """Write what is not written yet; what the disk refuses is kept."""
        for key, (reviews, review, before) in list(self._unsaved.items()):
            try:
                reviews.write(key[1], review, before)
            except (VolsalError, OSError) as error:
                self.say(str(error))
            else:
                del self._unsaved[key]

    def _reread(self, row: CaseRow) -> None:
        """Take over what was said of the case in another window meanwhile."""
        if self.table is None or self.cases is None or (self.table.run.path, row.id) in self._unsaved:
            return
        try:
            row.review = self.table.reviews.read().get(row.id, row.review)
        except (VolsalError, OSError):
            return  # what is written next says so
        self.cases.reviewed(row)


def _opened(folder: Path, name: str, window: tuple[float, float] | None) -> Opened:
    opened = open_folder(folder, [name])
    maps = tuple(replace(one, window=window or one.window) for one in opened.maps)
    return replace(opened, maps=maps)


def _refill(box: QComboBox, words: list[str]) -> None:
    """Put other words into a box, without telling anyone until they are in."""
    box.blockSignals(True)
    box.clear()
    box.addItems(words)
    box.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
    box.setMinimumContentsLength(10)
    box.blockSignals(False)


def _scrolled(widget: QWidget) -> QScrollArea:
    area = QScrollArea()
    area.setWidgetResizable(True)
    area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
    area.setFrameShape(QScrollArea.Shape.NoFrame)
    area.setWidget(widget)
    return area
