"""Do the outputs in a notebook belong to its code as it stands? A stamp says what produced them.

A stamp hashes the code cells (bootstrap and parameters apart) and the syntax trees of what
measured: the kit's measuring modules, the lesson's workers and what starts them. Comments,
docstrings and formatting are not part of it.
"""

import ast
import base64
import datetime
import hashlib
import io
import re
from pathlib import Path

import nbformat
from PIL import Image

from helpers import machine, plots, results

NOTEBOOKS = results.ROOT / "notebooks"
HELPERS = Path(__file__).resolve().parent.parent
MEASURING = ("timing", "memory", "quality", "limits", "models", "machine")
UNCOUNTED = {"bootstrap", "parameters", "injected-parameters"}  # tags of cells left out


def notebooks(deeper: bool = False) -> list[Path]:
    """The notebooks of the series in order, the last one compares the others; or the optional
    ones.
    """
    folder = NOTEBOOKS / "deeper" if deeper else NOTEBOOKS
    return sorted(folder.glob("[0-9][0-9]_*.ipynb"))


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 over the code cells that measure, in order."""
    sources = []
    for cell in notebook.cells:
        tags = set(cell.metadata.get("tags", []))
        if cell.cell_type == "code" and not tags & UNCOUNTED:
            sources.append(cell.source)
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


class _Measuring(ast.NodeTransformer):
    """Drops what a module's syntax tree says of types and to readers, which changes no figure."""

    TYPES = ("typing", "collections.abc")

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
        for name in {"annotation", "returns"} & set(node._fields):
            setattr(node, name, None)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return self.generic_visit(node)
        return self.generic_visit(ast.Assign([node.target], node.value))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        return None if node.module in self.TYPES else node


def _syntax(path: Path) -> str:
    """A module's syntax tree as text, without docstrings and annotations."""
    return ast.dump(_Measuring().visit(ast.parse(path.read_text(encoding="utf-8"))))


def measuring_hash(name: str) -> str:
    """SHA-256 over what measures in the notebook `name`: the kit, and the workers, and what starts
    them, that bear the number of its lesson.
    """
    number = re.match(r"\d+", name)[0]
    paths = [HELPERS / f"{module}.py" for module in MEASURING]
    paths += sorted(HELPERS.glob(f"*/*_{number}*.py"))
    trees = [_syntax(path) for path in paths]
    return hashlib.sha256("\0".join(trees).encode()).hexdigest()


def is_stamped(path: Path) -> bool:
    """Does this notebook show the outputs of a reference run?"""
    return "stamp" in nbformat.read(path, 4).metadata


def is_stale(path: Path) -> bool:
    """Does this notebook show outputs of another state of its code, or of what measures?"""
    notebook = nbformat.read(path, 4)
    stamp = notebook.metadata.get("stamp")
    if stamp is None:
        return any(cell.get("outputs") for cell in notebook.cells)
    return (stamp["code"], stamp["measuring"]) != (code_hash(notebook), measuring_hash(path.stem))


def stamp(path: Path, executed: Path) -> None:
    """Put the outputs of an executed copy into the notebook itself, with a stamp.

    Raises ValueError when the notebook is no longer what was executed.
    """
    ours, ran = nbformat.read(path, 4), nbformat.read(executed, 4)
    if [cell.source for cell in ours.cells] != [cell.source for cell in ran.cells]:
        raise ValueError(f"{path.name} is not what was executed: run it again.")
    for cell, done in zip(ours.cells, ran.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs = [_clean(output) for output in done.outputs if not _is_noise(output)]
            cell.execution_count = done.execution_count
    ours.metadata["stamp"] = {
        "code": code_hash(ours),
        "measuring": measuring_hash(path.stem),
        "machine": machine.slug(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    results.write_atomically(path, nbformat.writes(ours) + "\n")


def _is_noise(output) -> bool:
    """What libraries and progress bars wrote to the standard error, and a path of this machine that
    was a cell's last value.
    """
    value = output.get("data", {}).get("text/plain", "")
    return output.get("name") == "stderr" or value.startswith("PosixPath(")


def _clean(output):
    """An output without widgets, which a file does not show, and with small pictures."""
    for mime in [mime for mime in output.get("data", {}) if "widget" in mime]:
        del output.data[mime]
    if "image/png" in output.get("data", {}):
        output.data["image/png"] = _smaller(output.data["image/png"])
    return output


def _smaller(picture: str) -> str:
    """A PNG file in base64 with at most 128 colours, if that makes it smaller."""
    content = io.BytesIO()
    colours = plots.few_colours(Image.open(io.BytesIO(base64.b64decode(picture))), 128)
    colours.save(content, "png", optimize=True)
    return min(base64.b64encode(content.getvalue()).decode(), picture, key=len)
