"""`make html`: the pages lead to each other, fit a phone and show what the notebooks hold."""

import re
from html.parser import HTMLParser

import nbformat
import pytest

from helpers import results
from helpers.series import pages, stamps

ROOT = results.ROOT


class Seen(HTMLParser):
    """The links, pictures and meta names of a page."""

    def __init__(self, page):
        super().__init__()
        self.links, self.pictures, self.meta = [], [], {}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        if tag == "img":
            self.pictures.append(attributes)
        if tag == "meta" and "name" in attributes:
            self.meta[attributes["name"]] = attributes["content"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Every page, from the committed notebooks and texts."""
    folder = tmp_path_factory.mktemp("html")
    return folder, pages.build(pages.sources(), folder)


def test_the_index_leads_to_every_notebook(built):
    folder, made = built
    links = {(folder / link).resolve() for link in Seen(folder / "index.html").links}
    names = {page.resolve() for page in made}
    assert (
        len(names)
        == len(made)
        == len(pages.TEXTS) + len(list(ROOT.glob("notebooks/**/[0-9]*.ipynb")))
    )
    assert names - links <= {(folder / "index.html").resolve()}


def test_links_and_pictures_of_each_page_are_there(built):
    for page in built[1]:
        seen = Seen(page)
        for target in [*seen.links, *(picture["src"] for picture in seen.pictures)]:
            if not re.match(r"https?:|data:image/png;base64,\w|#", target):
                assert (page.parent / target.partition("#")[0]).is_file(), (page.name, target)
        assert not re.search(r'href="[^":]*\.(ipynb|md)[#"]', page.read_text())


def test_a_page_fits_a_phone_and_shows_every_chart(built):
    folder, _ = built
    for path in stamps.notebooks() + stamps.notebooks(deeper=True):
        page = folder / pages.page_name(path.relative_to(ROOT).as_posix())
        seen = Seen(page)
        assert "width=device-width" in seen.meta["viewport"]
        assert re.search(r"img \{[^}]*max-width: 100%", page.read_text())
        outputs = [o for c in nbformat.read(path, 4).cells for o in c.get("outputs", [])]
        charts = sum("image/png" in output.get("data", {}) for output in outputs)
        assert len(seen.pictures) == charts


def test_two_notebooks_elsewhere_are_linked_to_each_other(tmp_path):
    source = tmp_path / "source" / "notebooks"
    source.mkdir(parents=True)
    (source / "kit.py").write_text("x = 1\n")
    for name, text in (("01_a", "[b](02_b.ipynb#end) [kit](kit.py)"), ("02_b", "[a](01_a.ipynb)")):
        cells = [nbformat.v4.new_markdown_cell(text)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), source / f"{name}.ipynb")
    made = pages.build(sorted(source.glob("*.ipynb")), tmp_path / "html", source.parent)
    assert Seen(made[0]).links == ["../index.html", "02_b.html#end", "kit.py"]
    assert Seen(made[1]).links == ["../index.html", "01_a.html"]
    assert (made[0].parent / "kit.py").read_text() == "x = 1\n"
    (source / "kit.py").unlink()
    with pytest.raises(FileNotFoundError):
        pages.build(sorted(source.glob("*.ipynb")), tmp_path / "again", source.parent)
