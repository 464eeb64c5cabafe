"""The window of `volsal view`: a run with its Audit browser, or a case or scan; the linked planes beside either."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from volsal.errors import VolsalError
from volsal.run_folder import RUN_FILE
from volsal.viewer.opening import ViewerError
from volsal.viewer.show import face, napari_module, open_case, settle


def open_window(path: Path, maps: Sequence[Path] = (), *, convention: str = "radiological", block: bool = True) -> Any:
    """Open napari on a run folder, a case folder, or a scan with maps over it.

    Parameters
    ----------
    block : return only when the window is closed

    Returns
    -------
    The napari viewer.

    Raises
    ------
    VolsalError
        As for :func:`volsal.viewer.open_case`.
    """
    if (path / RUN_FILE).is_file():
        if maps:
            raise ViewerError(f"{path}: a run has its own maps; with map files name one of its cases, or a scan")
        viewer = _open_run(path, convention)
    else:
        viewer = open_case(path, maps, convention=convention, block=False)
    from volsal.plugin.planes import LinkedPlanes

    viewer.window.add_dock_widget(LinkedPlanes(viewer), name="Linked planes", area="right")
    settle(viewer)
    if block:
        napari_module().run()
    return viewer


def _open_run(path: Path, convention: str) -> Any:
    from volsal.plugin.cases import CaseTable

    CaseTable.of(path)  # what is wrong with it is said before a window opens
    viewer = napari_module().Viewer(title=f"volsal: {path}")
    try:
        face(viewer, convention)
        from volsal.plugin.audit_browser import AuditBrowser

        browser = AuditBrowser(viewer)
        viewer.window.add_dock_widget(browser, name="Audit browser", area="bottom")
        browser.open(path)
    except VolsalError:
        viewer.close()
        raise
    return viewer
