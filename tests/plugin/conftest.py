import os
import sys
import warnings
from importlib.util import find_spec

import pytest
from made_runs import add_case, begin, fault, grid_of, write_scan

if all(map(find_spec, ("napari", "pytestqt", "qtpy"))):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # napari's own, on import
        import napari.layers
        import napari.viewer
else:
    collect_ignore = ["test_planes.py", "test_explain_panel.py", "test_audit_browser.py", "test_files.py"]


@pytest.fixture(scope="session")
def qapp():
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        pytest.skip("no display; run under: xvfb-run -a -s '-screen 0 1600x1200x24'")
    from napari.qt import get_qapp

    return get_qapp()


@pytest.fixture
def qtbot(qapp, request):
    """pytest-qt's, without its plugin (see pyproject.toml); what Qt's own calls of Python raise fails the test."""
    from pytestqt import exceptions
    from pytestqt.qt_compat import qt_api

    if not getattr(qt_api, "pytest_qt_api", None):
        qt_api.set_qt_api("pyqt6")
    from pytestqt.qtbot import QtBot

    bot = QtBot(request)
    with exceptions.capture_exceptions() as raised:
        yield bot
        qapp.processEvents()
    assert not raised, exceptions.format_captured_exceptions(raised)


@pytest.fixture(scope="session")
def window(qapp):
    """One napari window for all tests: each takes seconds to open."""
    viewer = napari.Viewer()
    viewer.window.resize(1300, 1000)
    yield viewer
    viewer.close()


@pytest.fixture
def viewer(window, qtbot):
    """The window, empty, as napari first shows it."""
    kept = set(window.window.dock_widgets)
    window.dims.ndisplay = 2
    window.scene.camera.orientation = ("towards", "down", "right")
    yield window
    window.layers.clear()
    for name, widget in dict(window.window.dock_widgets).items():
        if name not in kept:
            window.window.remove_dock_widget(widget)
            widget.close()
    qtbot.wait(20)


@pytest.fixture
def run(tmp_path):
    """A run of four cases: right, wrong, refused, and one whose scan has been moved away."""
    scan = write_scan(tmp_path / "scan.nii.gz", grid_of("LPS"))
    inputs = {
        "aa": {"label": "lesion", "groups": {"site": "Ulm"}},
        "bb": {"label": "healthy", "groups": {"site": "Bern"}},
        "cc": {"label": "healthy", "groups": {"site": "Bern"}},
        "dd": {"label": None, "groups": {}},
    }
    made = begin(tmp_path / "run", inputs)
    moved = write_scan(tmp_path / "moved.nii.gz", grid_of("RAS", 12.0))
    for case, path, scale in (("aa", scan, 1.0), ("bb", scan, 3.0), ("dd", moved, 5.0)):
        add_case(made.path, case, path, scale)
    fault(made, "cc")
    moved.unlink()
    return made
