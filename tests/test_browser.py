"""Every page of `make html` in a real browser, headless and as narrow as a phone.

The browser is Chromium inside Qt: `pip install PySide6-WebEngine` (250 MB) brings it, nothing that
the project installs by itself does. Without it this is skipped.
"""

import json
import os
import subprocess
import sys

import pytest

from helpers.series import pages

SCRIPT = """
import json, sys
from PySide6.QtCore import QEventLoop, QTimer, QUrl
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

ASK = '''JSON.stringify({
  title: document.title,
  images: document.images.length,
  drawn: [...document.images].filter(image => image.naturalWidth > 0).length,
  widest: Math.max(0, ...[...document.images].map(image => image.getBoundingClientRect().right)),
  wide: document.documentElement.scrollWidth,
  errors: document.querySelectorAll(".output_error").length,
})'''
app = QApplication(sys.argv)
view = QWebEngineView()
view.resize(390, 844)
view.show()
loop = QEventLoop()
QTimer.singleShot(400_000, lambda: sys.exit("no answer"))
for page in sys.argv[1:]:
    view.loadFinished.connect(loop.exit)
    view.load(QUrl.fromLocalFile(page))
    loop.exec()
    view.loadFinished.disconnect(loop.exit)
    answers = []
    view.page().runJavaScript(ASK, 0, lambda answer: (answers.append(answer), loop.exit()))
    loop.exec()
    print("PAGE", answers[0])
"""


@pytest.mark.slow
def test_every_page_is_shown_whole_on_a_phone(tmp_path):
    pytest.importorskip("PySide6.QtWebEngineCore", exc_type=ImportError)
    made = pages.build(pages.sources(), tmp_path / "html")
    flags = "--no-sandbox --disable-gpu --host-resolver-rules='MAP * ~NOTFOUND'"  # as if offline
    software = {"QT_QPA_PLATFORM": "offscreen", "QT_QUICK_BACKEND": "software"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, made)],
        env=os.environ | software | {"QTWEBENGINE_CHROMIUM_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=500,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("PAGE ")]
    seen = [json.loads(line.removeprefix("PAGE ")) for line in lines]
    assert [page["title"] for page in seen] == [source.stem for source in pages.sources()], done
    for page in seen:
        assert page["drawn"] == page["images"], page
        assert page["widest"] <= 390 and page["wide"] <= 390, page
        assert page["errors"] == 0, page
    assert sum(page["images"] for page in seen) > 10
