"""`python -m helpers.series.run`: papermill over the notebooks, progress, a summary table.

Results, charts and executed copies go to `runs/<machine>/<model>/`, which git does not track. A
reference run writes into the tracked folders instead, and stamps the notebooks.
"""

import argparse
import ast
import os
import sys
import time
from pathlib import Path

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.table import Table

from helpers import machine, models, results
from helpers.series import history, parameters, stamps

NOTEBOOKS = stamps.NOTEBOOKS
FOLDERS = ("RESULTS_DIR", "FIGURES_DIR")  # parameters that name a folder
PROFILES = ("full", "smoke")
BEFORE = "measured before; --again repeats it"
STOPPED = "stopped; the next run goes on from here"


def notebooks(only: list[str] | None = None, deeper: bool = False) -> list[Path]:
    """The lessons in order, or the optional notebooks; `only` keeps those whose file name begins
    with one of its entries.

    Raises ValueError in one sentence for an entry that fits none.
    """
    folder = NOTEBOOKS / "deeper" if deeper else NOTEBOOKS
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not only:
        return paths
    for entry in only:
        if not any(path.name.startswith(entry) for path in paths):
            names = ", ".join(path.stem for path in paths)
            raise ValueError(f"--only {entry}: no notebook begins so; there are {names}.")
    return [path for path in paths if path.name.startswith(tuple(only))]


def known_parameters(notebook: Path) -> dict:
    """The defaults in a notebook's cell tagged `parameters`, by name."""
    inspected = papermill.inspect_notebook(str(notebook))
    return {name: ast.literal_eval(shown["default"]) for name, shown in inspected.items()}


def smoke_parameters(notebook: Path) -> dict:
    """The small numbers of a quick run, as the notebook's metadata hold them."""
    return dict(nbformat.read(notebook, 4).metadata.get("smoke", {}))


def execute(notebook: Path, out: Path, parameters: dict, progress: bool = False) -> None:
    """Run one notebook in a kernel of its own, its folder as working directory, into the copy
    `out`.

    Raises papermill's PapermillExecutionError when a cell fails; the copy then holds the outputs so
    far.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        str(notebook),
        str(out),
        parameters=parameters,
        cwd=str(notebook.parent),
        progress_bar=progress,
        log_output=False,
        start_timeout=600,  # seconds; a busy machine starts a kernel late
        # else it warns that TCP on this machine is not encrypted
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )


def definitions(name: str) -> dict:
    """A notebook's imports, functions, classes and literal constants by name, nothing else run: for
    tests and benchmarks.
    """
    namespace = {"__name__": name}
    for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells:
        if cell.cell_type != "code" or "bootstrap" in cell.metadata.get("tags", []):
            continue
        if cell.source.startswith("%%"):
            continue
        lines = cell.source.splitlines()
        source = "\n".join(
            "pass" if line.lstrip().startswith(("%", "!")) else line for line in lines
        )
        body = [node for node in ast.parse(source).body if _is_definition(node)]
        exec(compile(ast.Module(body, []), f"{name}.ipynb", "exec"), namespace)
    return namespace


def _is_definition(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign) and all(isinstance(t, ast.Name) for t in node.targets):
        try:
            ast.literal_eval(node.value)
        except ValueError:
            return False
        return True
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))


def parse_parameters(pairs: list[str], defaults: dict) -> dict:
    """["NAME=value", ...] to a dict, each value in the type of its default ("1e-3" is a number
    where that is one, and text stays as it was typed).

    An unknown parameter is an error (papermill alone only logs it). Paths are taken relative to
    where the command was given, not to the notebooks' own folder.

    Raises ValueError in one sentence.
    """
    given = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"-p {pair!r}: write it as NAME=value.")
        if name not in defaults:
            known = ", ".join(sorted(defaults))
            raise ValueError(f"unknown parameter {name}; these are known: {known}.")
        given[name] = _of_the_caller(name, parameters.typed(name, text, defaults[name]))
    return given


def _of_the_caller(name: str, value):
    """A path belongs to the folder of the caller."""
    if not isinstance(value, str) or not value:
        return value
    path = Path(os.path.expanduser(value))  # unlike Path's own, it leaves an unknown user alone
    is_model = name == "MODEL" and os.path.isfile(path / "config.json")  # False if too long
    if name in FOLDERS or is_model or value.startswith(("./", "../", "~")):
        return str(path.resolve())
    return value


def run_one(
    notebook: Path, out: Path, given: dict, profile: str, reference: bool, again: bool = True
) -> str:
    """Run one notebook and stamp it in a reference run; returns "ok" or what failed, in a line.

    again : also where the same code has measured with the same parameters on this machine.
    """
    known = known_parameters(notebook)
    small = smoke_parameters(notebook) if profile == "smoke" else {}
    values = {name: value for name, value in (small | given).items() if name in known}
    code = stamps.code_hash(nbformat.read(notebook, 4))
    state = repr((code, stamps.measuring_hash(notebook.stem), machine.slug(), values))
    done = out.with_suffix(".done")
    compares = notebook == notebooks()[-1]  # whatever the others left by now
    if not (again or compares) and done.is_file() and done.read_text() == state:
        return BEFORE
    done.unlink(missing_ok=True)
    try:
        execute(notebook, out, values, progress=True)
        if reference:
            stamps.stamp(notebook, out)
        results.write_atomically(done, state)
    except KeyboardInterrupt:
        return STOPPED
    except PapermillExecutionError as error:
        return f"{error.ename}: {error.evalue}".strip().splitlines()[0]
    except Exception as error:  # a kernel that died, a full disk: the others still run
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "ok"


def run_all(
    chosen: list[Path],
    given: dict,
    profile: str,
    out: Path,
    reference: bool,
    console: Console,
    again: bool,
) -> int:
    """Run the notebooks one after the other; a failed one does not stop the others, Ctrl-C does.
    Returns the number that failed or were stopped.
    """
    table = Table("notebook", "time", "outcome")
    failed = []
    for number, notebook in enumerate(chosen, 1):
        console.print(f"{number} of {len(chosen)} {notebook.stem}", style="bold")
        start = time.perf_counter()
        outcome = run_one(notebook, out / notebook.name, given, profile, reference, again)
        seconds = time.perf_counter() - start
        style = ""
        if outcome not in ("ok", BEFORE):
            failed.append(f"{notebook.stem}: {outcome}")
            style = "red"
        table.add_row(notebook.stem, f"{seconds:.0f} s", outcome, style=style)
        if outcome == STOPPED:
            break
    console.print(table)
    console.print(f"executed copies in {os.path.relpath(out)}")
    base = results.base_folder(given.get("RESULTS_DIR", ""))
    console.print(f"results below {os.path.relpath(base)}")
    for line in failed:  # whole, as the table may not show it; a matrix quotes the last line
        console.print(line, style="red", soft_wrap=True)
    return len(failed)


def run_batch(options: argparse.Namespace, console: Console) -> int:
    """`--matrix`: the exit status, 1 where a cell failed, 2 where nothing could begin."""
    from helpers.series import matrix  # which itself uses this module

    out = options.out or results.ROOT / "runs" / "matrix" / options.matrix.stem
    if options.only or options.parameters or options.deeper or options.reference:
        console.print("--matrix: lessons and parameters stand in its file.", style="red")
        return 2
    try:
        failed = matrix.run_matrix(options.matrix, out.resolve(), console, options.ray)
    except (ValueError, ImportError, ConnectionError) as error:
        console.print(str(error), style="red", soft_wrap=True)
        return 2
    return int(bool(failed))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.series.run", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NN", help="notebooks that begin so: 01 03")
    parser.add_argument("--deeper", action="store_true", help="the optional notebooks instead")
    parser.add_argument("--profile", choices=PROFILES, default="full", help="smoke: small numbers")
    parser.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=value")
    parser.add_argument("--out", type=Path, help="folder of the executed copies")
    parser.add_argument("--reference", action="store_true", help="write into notebooks/, stamped")
    parser.add_argument("--again", action="store_true", help="also what was measured before")
    parser.add_argument("--matrix", type=Path, metavar="FILE", help="models × parameters × lessons")
    parser.add_argument(
        "--ray", nargs="?", const="local", metavar="ADDRESS", help="its cells on a Ray cluster"
    )
    options = parser.parse_args(arguments)
    console = Console(markup=False)  # what a library says may be in brackets
    if options.matrix is not None:
        return run_batch(options, console)
    try:
        chosen = notebooks(options.only, options.deeper)
        defaults = {}
        for notebook in chosen:
            defaults |= known_parameters(notebook)
        given = parse_parameters(options.parameters, defaults)
        if options.reference and (given or options.profile != "full"):
            raise ValueError("--reference runs the notebooks as they stand: no -p, no --profile.")
        os.environ["SEVEN_PROFILE"] = "reference" if options.reference else options.profile
        os.environ["TQDM_DISABLE"] = "1"  # in the kernels: a copy would keep every state of a bar
        results.check(given.get("RESULTS_DIR", ""))
        models.resolve(given.get("MODEL", "auto"))
        parameters.check_tokenizer(given.get("MODEL", "auto"))
        device = machine.pick_device(given.get("DEVICE", "auto"))
        folder = results.model_folder(given.get("MODEL", "auto"), device)
    except (ValueError, OSError) as error:
        console.print(str(error), style="red", soft_wrap=True)
        return 2
    out = options.out
    if out is None:
        below = folder.relative_to(results.base_folder())
        out = results.ROOT / "runs" / below if options.reference else folder
    again = options.again or options.reference
    failed = run_all(
        chosen, given, options.profile, out.resolve(), options.reference, console, again
    )
    if options.reference:
        history.append(results.base_folder() / machine.slug(device))
    stale = [path.stem for path in chosen if options.reference and stamps.is_stale(path)]
    if stale:
        console.print(
            f"outputs that are not of the code as it stands: {', '.join(stale)}", style="red"
        )
    return 1 if failed or stale else 0


if __name__ == "__main__":
    sys.exit(main())
