"""`make html`: README, its pages and every notebook as HTML that a phone shows, linked together.

`build/html/index.html` is README. Charts stand in the pages as they stand in the notebooks; other
files that a page links to are copied beside it, so that the folder can be read anywhere.
"""

import os
import re
import shutil
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

from helpers import results
from helpers.series import stamps

PLACE = results.ROOT / "build" / "html"
TEXTS = ("README.md", "RESULTS.md", "GPU.md", "PLANNER.md")
LINK = re.compile(r'(\]\(|(?:src|srcset|href)=")([\w+./-]+)(?=[)"#])')  # a file's, no address


def sources() -> list[Path]:
    """What becomes a page: the texts, the series, the deeper notebooks."""
    texts = [results.ROOT / name for name in TEXTS]
    return texts + stamps.notebooks() + stamps.notebooks(deeper=True)


def page_name(path: str) -> str:
    """A page's name for a source's; other files keep theirs."""
    return re.sub(r"README\.html$", "index.html", re.sub(r"\.(ipynb|md)$", ".html", path))


def build(paths: list[Path], folder: Path, root: Path = results.ROOT) -> list[Path]:
    """Write a page for each of these files below `root`, and what they link to, into `folder`.

    Returns the pages. Raises OSError where a page links to a file that is not there.
    """
    exporter = HTMLExporter(
        template_name="page",
        extra_template_basedirs=[str(results.ROOT / "helpers" / "data")],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    return [_write(path, folder, root, exporter) for path in paths]


def _write(path: Path, folder: Path, root: Path, exporter: HTMLExporter) -> Path:
    """One page, with links to pages in place of those to their sources."""
    page = folder / page_name(path.relative_to(root).as_posix())
    page.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".md":
        text = nbformat.v4.new_markdown_cell(path.read_text(encoding="utf-8"))
        notebook = nbformat.v4.new_notebook(cells=[text])
    else:
        notebook = nbformat.read(path, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    for cell in cells:
        for _, target in LINK.findall(cell.source):
            if page_name(target) == target:
                copy = page.parent / target
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path.parent / target, copy)
        cell.source = LINK.sub(lambda match: match[1] + page_name(match[2]), cell.source)
    index = folder / "index.html"
    settings = {
        "metadata": {"name": path.stem},
        "home": "" if page == index else Path(os.path.relpath(index, page.parent)).as_posix(),
        "text": "".join(cell.source for cell in cells),
    }
    html, _ = exporter.from_notebook_node(notebook, settings)
    results.write_atomically(page, html)
    return page


def main() -> None:
    """Build them all anew."""
    shutil.rmtree(PLACE, ignore_errors=True)
    pages = build(sources(), PLACE)
    print(f"{len(pages)} pages: {PLACE / 'index.html'}")


if __name__ == "__main__":
    main()
