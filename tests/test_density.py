"""Is the code as easy to read as it was? Syntax-tree nodes a code line, in all, and what a reader has to unfold.

Packing lines does not lower what is counted here. The totals are raised by
hand, in a commit that says what for; `LINE` and `PLACES` only go down.
"""

import ast
from pathlib import Path

import nbformat

from helpers.series import run

HELPERS = Path(run.__file__).parent.parent
# Nodes in all. The contract asks 10,500, 14,000 and 6,500: missed, since what
# fifteen deeper notebooks share (training, launching, serving, random checkpoints) stands here.
# Of the kit some 330 are annotations, which a type checker reads (`make lint`).
KIT, SERIES, WORKERS = 14_450, 33_980, 8_630
LINE = 7.2  # nodes a code line, the mean over helpers
PLACES = {"helpers": 0, "notebooks": 12}  # places to unfold
SILENT = (
    ast.Load,
    ast.Store,
    ast.Del,
    ast.operator,
    ast.cmpop,
    ast.boolop,
    ast.unaryop,
)


def nodes(tree: ast.AST) -> int:
    """Syntax-tree nodes, operators and contexts left out."""
    return sum(not isinstance(node, SILENT) for node in ast.walk(tree))


def code_lines(source: str, tree: ast.AST) -> int:
    """Lines of code: neither blank, nor a comment, nor of a docstring."""
    documented = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False):
                documented.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in documented
        for number, line in lines
    )


def is_truth(node: ast.AST) -> bool:
    negation = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    return negation or isinstance(node, (ast.Compare, ast.BoolOp))


def to_unfold(tree: ast.AST):
    """(line, what) of every construct that a reader has to take apart."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.IfExp):
            parts = (node.body, node.orelse, node.test)
            if any(isinstance(part, ast.IfExp) for part in parts):
                yield line, "a conditional expression inside another"
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Add)):
            if is_truth(node.left) or is_truth(node.right):
                yield line, "arithmetic with a truth value"
        if isinstance(node, ast.Lambda) and node.args.defaults:
            yield line, "a lambda with defaults"
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            conditions = sum(len(generator.ifs) for generator in node.generators)
            if len(node.generators) > 1 or conditions > 1:
                yield line, "a comprehension of several loops or conditions"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.IfExp):
            yield line, "a conditional expression as a statement"
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            if isinstance(node.targets[0], ast.Tuple) and len(node.value.elts) > 3:
                yield line, "four assignments in one"


def modules() -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in HELPERS.rglob("*.py")}


def cells(path: Path):
    """The code cells of a notebook, magics left out."""
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and not cell.source.startswith("%%"):
            lines = cell.source.splitlines()
            yield "\n".join(
                line[: len(line) - len(line.lstrip())] + "pass"
                if line.lstrip().startswith(("%", "!"))
                else line
                for line in lines
            )


def test_helpers_keep_their_size():
    totals = {"kit": 0, "series": 0, "workers": 0}
    for path, source in modules().items():
        folder = path.parent.name
        room = folder if folder in ("series", "workers") else "kit"
        totals[room] += nodes(ast.parse(source))
    assert totals["kit"] <= KIT, totals
    assert totals["series"] <= SERIES, totals
    assert totals["workers"] <= WORKERS, totals


def test_helpers_are_of_ordinary_density():
    total, lines = 0, 0
    for source in modules().values():
        tree = ast.parse(source)
        total += nodes(tree)
        lines += code_lines(source, tree)
    assert total / lines <= LINE


def test_little_has_to_be_unfolded_in_helpers():
    places = [
        f"{path.name}:{line}: {what}"
        for path, source in modules().items()
        for line, what in to_unfold(ast.parse(source))
    ]
    assert len(places) <= PLACES["helpers"], "\n".join(places)


def test_little_has_to_be_unfolded_in_notebooks():
    places = []
    for path in sorted(run.NOTEBOOKS.rglob("*.ipynb")):
        for source in cells(path):
            places += [f"{path.name}: {what}" for _, what in to_unfold(ast.parse(source))]
    assert len(places) <= PLACES["notebooks"], "\n".join(places)
