"""What a reader sees, in a real browser and headless: every page of `make html`, as narrow as a
phone, and every notebook in JupyterLab.

The browser is Chromium inside Qt: `pip install PySide6-WebEngine` (250 MB) brings it, nothing that
the project installs by itself does. Without it both tests are skipped.
"""

import json
import os
import shutil
import subprocess
import sys

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from helpers import results
from helpers.series import pages, processes, run

BROWSER = """
import sys
from PySide6.QtCore import QEventLoop, QTimer, QUrl
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

width, height, ask, *pages = sys.argv[1:]
app = QApplication(sys.argv)
view = QWebEngineView()
view.resize(int(width), int(height))
view.show()
loop = QEventLoop()
QTimer.singleShot(400_000, lambda: sys.exit("no answer"))
for page in pages:
    view.loadFinished.connect(loop.exit)
    view.load(QUrl(page))
    loop.exec()
    view.loadFinished.disconnect(loop.exit)
    answer = ""
    while not answer:  # a page that works for its answer has none at first
        QTimer.singleShot(300, loop.exit)
        loop.exec()
        answers = []
        view.page().runJavaScript(ask, 0, lambda answer: (answers.append(answer), loop.exit()))
        loop.exec()
        answer = answers[0]
    print("PAGE", answer)
"""
PAGE = """JSON.stringify({
  title: document.title,
  images: document.images.length,
  drawn: [...document.images].filter(image => image.naturalWidth > 0).length,
  widest: Math.max(0, ...[...document.images].map(image => image.getBoundingClientRect().right)),
  wide: document.documentElement.scrollWidth,
  errors: document.querySelectorAll(".output_error").length,
})"""
# Opens each of PATHS, runs all of its cells where it is RUN, and looks once all is rendered.
LAB = """
async function look(path, isRun) {
  const {commands} = window.jupyterapp;
  const kernelPreference = {shouldStart: isRun};
  const panel = await commands.execute("docmanager:open", {path, kernelPreference});
  await panel.revealed;
  if (isRun) {
    await panel.sessionContext.ready;
    await commands.execute("notebook:run-all-cells");
  }
  const cells = panel.content.widgets;
  await Promise.all(cells.map(cell => cell.ready));
  const count = selector => panel.node.querySelectorAll(selector).length;
  const texts = cells.filter(cell => cell.model.type === "markdown").length;
  while (count(".jp-MarkdownCell .jp-MarkdownOutput") < texts)
    await new Promise(soon => setTimeout(soon, 100));
  const images = [...panel.node.querySelectorAll("img")];
  await Promise.allSettled(images.map(image => image.decode()));
  const outputs = cells.flatMap(cell => cell.outputArea ? cell.outputArea.model.toJSON() : []);
  const seen = {
    path,
    images: images.length,
    drawn: images.filter(image => image.naturalWidth > 0).length,
    texts: count(".jp-MarkdownCell .jp-MarkdownOutput"),
    answered: cells.filter(cell => cell.node.querySelector(".jp-OutputArea-output")).length,
    ran: cells.filter(cell => cell.model.executionCount > 0).length,
    errors: outputs.filter(output => output.output_type === "error").length,
  };
  panel.dispose();
  return seen;
}
async function lookAtAll() {
  while (!window.jupyterapp) await new Promise(soon => setTimeout(soon, 100));
  await window.jupyterapp.restored;
  const seen = [];
  for (const path of PATHS) seen.push(await look(path, path === RUN));
  return seen;
}
if (window.answer === undefined) {
  window.answer = "";
  lookAtAll().catch(error => [String(error)]).then(seen => window.answer = JSON.stringify(seen));
}
window.answer
"""


def browse(urls: list[str], ask: str, width: int, height: int) -> list:
    """What each page answers to the JavaScript `ask`, a JSON text; no host but this is found."""
    pytest.importorskip("PySide6.QtWebEngineCore", exc_type=ImportError)
    flags = "--no-sandbox --disable-gpu"
    flags += " --host-resolver-rules='MAP * ~NOTFOUND, EXCLUDE 127.0.0.1'"
    software = {"QT_QPA_PLATFORM": "offscreen", "QT_QUICK_BACKEND": "software"}
    done = subprocess.run(
        [sys.executable, "-c", BROWSER, str(width), str(height), ask, *urls],
        env=os.environ | software | {"QTWEBENGINE_CHROMIUM_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=500,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("PAGE ")]
    assert len(lines) == len(urls), done
    return [json.loads(line.removeprefix("PAGE ")) for line in lines]


@pytest.mark.slow
def test_every_page_is_shown_whole_on_a_phone(tmp_path):
    made = pages.build(pages.sources(), tmp_path / "html")
    seen = browse([page.as_uri() for page in made], PAGE, 390, 844)
    assert [page["title"] for page in seen] == [source.stem for source in pages.sources()]
    for page in seen:
        assert page["drawn"] == page["images"], page
        assert page["widest"] <= 390 and page["wide"] <= 390, page
        assert page["errors"] == 0, page
    assert sum(page["images"] for page in seen) > 10


def expected(notebook: nbformat.NotebookNode) -> dict:
    """What JupyterLab is to show of a notebook."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    return {
        "texts": len(notebook.cells) - len(code),
        "answered": sum(bool(cell.outputs) for cell in code),
        "images": sum("image/png" in output.get("data", {}) for output in outputs),
    }


@pytest.mark.slow
def test_every_notebook_is_shown_in_jupyterlab_and_the_first_one_runs(tmp_path):
    pytest.importorskip("PySide6.QtWebEngineCore", exc_type=ImportError)
    folder = tmp_path / "notebooks"
    shutil.copytree(run.NOTEBOOKS, folder, ignore=shutil.ignore_patterns("results"))
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.ipynb"))
    notebooks = {path: nbformat.read(folder / path, 4) for path in paths}
    small = run.smoke_parameters(folder / paths[0])
    small |= {name: str(tmp_path / name) for name in ("RESULTS_DIR", "FIGURES_DIR")}
    first = parameterize_notebook(load_notebook_node(str(folder / paths[0])), small)
    nbformat.write(first, folder / "small.ipynb")
    settings = tmp_path / "settings" / "@jupyterlab"
    for name, setting in (
        ("notebook-extension/tracker", {"windowingMode": "none"}),
        ("apputils-extension/notification", {"fetchNews": "false"}),  # it would ask, else
    ):
        file = settings / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(setting))
    environment = {"SEVEN_PROFILE": "smoke", "SEVEN_SOURCE": str(results.ROOT)}
    environment["JUPYTERLAB_SETTINGS_DIR"] = str(settings.parent)
    for name in ("JUPYTERLAB_WORKSPACES_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        environment[name] = str(tmp_path / name)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--expose-app-in-browser"]
    command += ["--allow-root", "--port={port}", f"--ServerApp.root_dir={folder}"]
    with processes.server(
        command, env=environment, key_variable="JUPYTER_TOKEN", ready="/api/status"
    ) as server:
        ask = LAB.replace("PATHS", json.dumps([*paths, "small.ipynb"]))
        url = f"{server.url}/lab?token={server.api_key}"
        (seen,) = browse([url], ask.replace("RUN", '"small.ipynb"'), 1280, 900)
    *read, ran = seen
    assert isinstance(ran, dict), ran  # else what the browser said
    assert [page["path"] for page in read] == paths
    for page in read:
        assert expected(notebooks[page["path"]]).items() <= page.items(), page
        assert page["drawn"] == page["images"] and page["errors"] == 0, page
    assert ran["ran"] == sum(cell.cell_type == "code" for cell in first.cells)
    assert ran["errors"] == 0 and ran["drawn"] == ran["images"] > 0
    records = next((tmp_path / "RESULTS_DIR").rglob("01_*.json"))
    assert results.read(records).run.finished
