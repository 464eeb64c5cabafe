"""Pictures of the napari plugin at work, to be looked at: both panels, the linked planes, oblique scans, 3D.

    xvfb-run -a -s "-screen 0 1600x1200x24" python scripts/bench/napari_tour.py RUN CONFIG PICTURES

RUN is a run folder with an audit, CONFIG the config that made it; pictures are written to PICTURES.
"""

import argparse
import time
from pathlib import Path

import napari
from qtpy.QtWidgets import QApplication

from volsal.plugin.audit_browser import AuditBrowser
from volsal.plugin.explain_panel import ExplainPanel
from volsal.plugin.planes import LinkedPlanes
from volsal.plugin.sample import explained_head
from volsal.plugin.window import open_window

SECONDS = 120.0


class Tour:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def until(self, ready, at_most=SECONDS):
        end = time.monotonic() + at_most
        while not ready():
            QApplication.processEvents()
            time.sleep(0.01)
            if time.monotonic() > end:
                raise TimeoutError("the panel did not answer")
        self.settle()

    def settle(self, rounds=30):
        for _ in range(rounds):
            QApplication.processEvents()
            time.sleep(0.01)

    def shoot(self, viewer, name):
        self.settle()
        path = self.folder / f"{name}.png"
        viewer.screenshot(str(path), canvas_only=False, flash=False)
        print(path)


def docked(viewer, kind):
    return next(widget for widget in QApplication.allWidgets() if isinstance(widget, kind) and widget.viewer is viewer)


def browse(tour, run):
    viewer = open_window(run, block=False)
    viewer.window.resize(1500, 1100)
    browser = docked(viewer, AuditBrowser)
    tour.until(lambda: browser.job is None and len(viewer.layers) > 1)
    viewer.reset_view()
    tour.shoot(viewer, "1-audit-browser")
    browser.verdict.setCurrentText("plausible")
    browser.comment.setText("on the lesion")
    browser.look.threshold.setValue(400)
    for number in range(2, 5):
        browser.step(1)
        tour.until(lambda: browser.job is None)
        tour.shoot(viewer, f"{number}-another-case")
    browser.map.setCurrentIndex(1)
    tour.until(lambda: browser.job is None)
    browser.words.setText("Bern")
    tour.shoot(viewer, "5-signed-map-and-filter")
    planes = docked(viewer, LinkedPlanes)
    browser.map.setCurrentIndex(0)
    tour.until(lambda: browser.job is None)
    planes.solid.setChecked(True)
    tour.shoot(viewer, "6-3d")
    viewer.close()


def explain(tour, config):
    viewer = napari.Viewer()
    viewer.window.resize(1500, 1100)
    for layer in explained_head()[:1]:
        viewer.add_layer(napari.layers.Layer.create(*layer))
    panel, planes = ExplainPanel(viewer), LinkedPlanes(viewer)
    viewer.window.add_dock_widget(panel, name="Explain", area="right")
    viewer.window.add_dock_widget(planes, name="Linked planes", area="right")
    tour.shoot(viewer, "7-explain-before")
    panel.config.setText(str(config))
    panel.load()
    tour.until(lambda: panel.job is None)
    panel.list_layers()
    tour.until(lambda: panel.job is None)
    panel.start()
    tour.until(lambda: panel.job is None)
    viewer.reset_view()
    tour.shoot(viewer, "8-explained")
    panel.look.threshold.setValue(500)
    tour.shoot(viewer, "9-threshold")
    panel.config.setText("nothing.yaml")
    panel.load()
    tour.until(lambda: panel.job is None)
    tour.shoot(viewer, "10-an-error")
    viewer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("run", "config", "pictures"):
        parser.add_argument(name, type=Path)
    asked = parser.parse_args()
    the_tour = Tour(asked.pictures)
    explain(the_tour, asked.config)
    browse(the_tour, asked.run)
