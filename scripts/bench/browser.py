"""Drives a page in Qt's Chromium, in a process of its own: ``python browser.py < script.json``.

A script is ``{"page": URL, "size": [width, height], "steps": [...]}``.  A step is one of::

    {"do": JavaScript}         run it; its value, plain data, is the step's answer
    {"until": JavaScript}      ask again until it is true, for half a minute at most
    {"open": URL}              load another page in the same window
    {"press": KEY}             a real key event where the focus is, by Qt's name of the key
    {"click": [x, y]}          a real mouse click, in pixels of the window
    {"wheel": [x, y, steps]}   a real turn of the wheel there
    {"settle": MILLISECONDS}   let it draw
    {"shot": PATH}             write what the window shows as PNG
    {"print": PATH}            write the page as an A4 PDF

Prints ``{"answers": [...], "requests": [...], "console": [...]}``: every address that was asked for, and all that the
browser complained of.  A process of its own, since WebEngine wants to be loaded before any other Qt application is.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("QT_QUICK_BACKEND", "software")
# Chromium's own sandbox does not work for root, who runs the tests in a container.
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--disable-gpu --no-sandbox"

from PyQt6.QtCore import QEventLoop, QPoint, QPointF, Qt, QTimer, QUrl
from PyQt6.QtGui import QWheelEvent
from PyQt6.QtTest import QTest
from PyQt6.QtWebEngineCore import QWebEnginePage, QWebEngineUrlRequestInterceptor
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

PATIENCE_S = 30


class Requests(QWebEngineUrlRequestInterceptor):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def interceptRequest(self, info: Any) -> None:
        self.addresses.append(info.requestUrl().toString()[:200])


class Page(QWebEnginePage):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
        self.said.append(message)


class Browser:
    def __init__(self, width: int, height: int) -> None:
        self.page, self.requests = Page(), Requests()
        self.page.setUrlRequestInterceptor(self.requests)
        self.view = QWebEngineView()
        self.view.setPage(self.page)
        self.view.resize(width, height)
        self.view.show()

    def wait(self, start: Any) -> Any:
        """Call ``start`` with a function to call with the answer; return that answer."""
        loop, answers = QEventLoop(), []
        start(lambda *answer: (answers.append(answer), loop.quit()))
        QTimer.singleShot(PATIENCE_S * 1000, loop.quit)
        if not answers:
            loop.exec()
        if not answers:
            raise TimeoutError("the browser did not answer")
        return answers[0][0] if answers[0] else None

    def open(self, url: str) -> bool:
        def start(done: Any) -> None:
            self.page.loadFinished.connect(done)
            self.page.load(QUrl(url))

        return self.wait(start)

    def do(self, code: str) -> Any:
        answer = self.wait(lambda done: self.page.runJavaScript(f"JSON.stringify((()=>{{{code}}})())", done))
        return json.loads(answer) if answer else None

    def until(self, condition: str) -> float:
        start = time.monotonic()
        while not self.do(f"return !!({condition})"):
            if time.monotonic() - start > PATIENCE_S:
                raise TimeoutError(f"never became true: {condition}; the console says {self.page.said}")
            self.settle(30)
        return time.monotonic() - start

    def settle(self, ms: int) -> None:
        QTest.qWait(ms)

    @property
    def _target(self) -> Any:
        return self.view.focusProxy() or self.view

    def press(self, key: str) -> None:
        QTest.keyClick(self._target, getattr(Qt.Key, f"Key_{key}"))
        self.settle(80)

    def click(self, at: list[int]) -> None:
        QTest.mouseClick(self._target, Qt.MouseButton.LeftButton, pos=QPoint(*at))
        self.settle(80)

    def wheel(self, turn: list[int]) -> None:
        at = QPointF(turn[0], turn[1])
        phase = Qt.ScrollPhase.NoScrollPhase
        nothing = Qt.KeyboardModifier.NoModifier
        event = QWheelEvent(at, at, QPoint(), QPoint(0, 120 * turn[2]), Qt.MouseButton.NoButton, nothing, phase, False)
        QApplication.sendEvent(self._target, event)
        self.settle(150)

    def shot(self, path: str) -> None:
        self.settle(700)  # a frame may be on its way
        self.view.grab().save(path)

    def print(self, path: str) -> None:
        def start(done: Any) -> None:
            self.page.pdfPrintingFinished.connect(done)
            self.page.printToPdf(path)

        self.wait(start)


def main() -> None:
    script = json.load(sys.stdin)
    application = QApplication([sys.argv[0]])
    browser = Browser(*script.get("size", (1280, 900)))
    browser.open(script["page"])
    answers = [getattr(browser, name)(value) for step in script["steps"] for name, value in step.items()]
    print(json.dumps({"answers": answers, "requests": browser.requests.addresses, "console": browser.page.said}))
    sys.stdout.flush()
    del application
    os._exit(0)  # Qt takes pages, profiles and views down in an order of its own, and warns of it


if __name__ == "__main__":
    main()
