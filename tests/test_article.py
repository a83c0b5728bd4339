"""Does the series hold all of the article? `helpers/data/article.csv` says where, row by row."""

import csv
import functools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NOTEBOOKS += sorted((ROOT / "notebooks" / "deeper").glob("*.ipynb"))
LEAST = {  # rows of each kind in the article, counted when it was read
    "technique": 28,
    "tool": 10,
    "command": 22,
    "claim": 52,
    "number": 41,
    "link": 35,
    "fact": 28,
}
IMAGE_WITHOUT_TEXT = re.compile(
    r"!\[\s*\][(\[]"  # ![](file) and ![][reference]
    r"|<img\b(?![^>]*\balt\s*=\s*(?:\"\s*[^\s\"]|'\s*[^\s']))[^>]*>",
    re.I,
)


def read_rows() -> list[dict]:
    """The rows of article.csv."""
    text = (ROOT / "helpers" / "data" / "article.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


ROWS = read_rows()


@functools.cache
def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def text_at(where: str, cell: str) -> str:
    """The source of the cell with that id, or the whole of a file that has no cells."""
    path = ROOT / where
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    (source,) = ["".join(c["source"]) for c in cells(path) if c["id"] == cell]
    return source


def name_of(row: dict) -> str:
    return f"{row['kind']}: {row['article'][:40]}"


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_what_the_article_says_stands_where_its_row_says(row):
    assert row["holds"].strip() and row["article"].strip()
    assert bool(row["cell"]) == row["where"].endswith(".ipynb")
    assert row["holds"] in text_at(row["where"], row["cell"])


def test_nothing_of_the_article_is_missing():
    counts = Counter(row["kind"] for row in ROWS)
    assert set(counts) == set(LEAST)
    assert {kind: counts[kind] for kind in LEAST if counts[kind] < LEAST[kind]} == {}
    twice = Counter((row["kind"], row["article"]) for row in ROWS).most_common(1)
    assert twice[0][1] == 1, twice


def test_each_link_has_an_address():
    links = [row for row in ROWS if row["kind"] == "link"]
    assert [row["article"] for row in links if not row["holds"].startswith("https://")] == []


@pytest.mark.parametrize("path", [*NOTEBOOKS, ROOT / "README.md"], ids=lambda path: path.stem)
def test_each_image_has_alternative_text(path):
    if path.suffix == ".ipynb":
        prose = [c for c in cells(path) if c["cell_type"] == "markdown"]
        text = "\n".join("".join(c["source"]) for c in prose)
    else:
        text = path.read_text(encoding="utf-8")
    assert IMAGE_WITHOUT_TEXT.findall(text) == []


@pytest.mark.parametrize(
    ("image", "has_text"),
    [
        ("![a chart](chart.svg)", True),
        ("![](chart.svg)", False),
        ("![ ][chart]", False),
        ('<img alt="a chart" src="chart.svg">', True),
        ('<img src="chart.svg" alt="a chart">', True),
        ('<img alt="" src="chart.svg">', False),
        ('<img src="chart.svg">', False),
    ],
)
def test_an_image_without_text_is_noticed(image, has_text):
    assert bool(IMAGE_WITHOUT_TEXT.search(image)) != has_text
