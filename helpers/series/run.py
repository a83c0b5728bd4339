"""`python -m helpers.series.run`: papermill over all notebooks, progress, a summary table, the
stamps of a reference run.
"""

import argparse
import ast
import datetime
import hashlib
import os
import sys
import time
from pathlib import Path

import nbformat
import papermill
import yaml
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.table import Table

from helpers import machine, results

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = ROOT / "notebooks"
MEASURING = ("timing.py", "memory.py", "quality.py")
SMOKE = {  # small numbers for a quick run; each notebook takes those that are among its parameters
    "NEW_TOKENS": 3,
    "REPEATS": 2,
    "WARMUP": 0,
    "EVAL_TOKENS": 48,
    "PREFILL_TOKENS": 16,
    "SWEEP_REPEATS": 1,
    "SWEEP_TOKENS": 60,
    "PROMPT_LENGTHS": [16, 64],
    "ORIGINAL_TOKENS": 40,
    "DEEP_TOKENS": 40,
    "CALIBRATION_TOKENS": 48,
    "MIGRATION": [0.5],
    "GROUP_SIZES": [32],
    "BATCH_SIZES": [1, 4],
    "TRAIN_STEPS": 8,
    "TRAIN_BATCH": 1,
    "TRAIN_LENGTH": 96,
    "TASK_STEPS": 3,
    "FORGET_TOKENS": 40,
    "SERVE_TOKENS": 8,
    "SERVE_REQUESTS": 1,
    "SPARSITY_PERCENT": [30, 50],
    "TRY_VLLM": False,
    "TRY_RAY": False,
    "REQUESTS": 6,
    "SLOTS": 2,
    "MEAN_TOKENS": 6,
    "CAP_TOKENS": 12,
    "SHARED_TOKENS": 160,
    "RATES": [2, 8],
    "LOAD_REQUESTS": 4,
}
PROFILES = {"full": {}, "smoke": SMOKE}


def notebooks(only: list[str] | None = None) -> list[Path]:
    """The lessons in order; `only` keeps those whose file name begins with one of its entries.

    Raises ValueError in one sentence for an entry that fits none.
    """
    found = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    for entry in only or []:
        if not any(path.name.startswith(entry) for path in found):
            raise ValueError(
                f"--only {entry}: no notebook begins so; there are {', '.join(p.stem for p in found)}."
            )
    return [p for p in found if not only or any(p.name.startswith(entry) for entry in only)]


def known_parameters(notebook: Path) -> set[str]:
    """Names in a notebook's cell tagged `parameters`."""
    return set(papermill.inspect_notebook(str(notebook)))


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
    )


def definitions(name: str) -> dict:
    """A notebook's imports, functions, classes and literal constants by name, nothing else run: for
    tests and bench.
    """
    found = {"__name__": name}
    for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells:
        if cell.cell_type != "code" or cell.source.lstrip().startswith("try:\n    import helpers"):
            continue
        source = "\n".join(
            "pass" if line.lstrip().startswith(("%", "!")) else line
            for line in cell.source.splitlines()
        )
        keep = [node for node in ast.parse(source).body if _is_definition(node)]
        exec(compile(ast.Module(keep, []), f"{name}.ipynb", "exec"), found)
    return found


def _is_definition(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        try:
            ast.literal_eval(node.value)
        except ValueError:
            return False
        return True
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 over the code cells' sources, in order."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def measuring_hash() -> str:
    """SHA-256 over the measuring helpers (timing, memory, quality)."""
    return hashlib.sha256(
        b"\0".join((ROOT / "helpers" / n).read_bytes() for n in MEASURING)
    ).hexdigest()


def stamp(notebook: Path, executed: Path) -> None:
    """Put the outputs of an executed copy into the notebook itself, with a stamp that says what
    produced them.
    """
    ours, ran = nbformat.read(notebook, 4), nbformat.read(executed, 4)
    if [c.source for c in ours.cells] != [c.source for c in ran.cells]:
        raise ValueError(f"{notebook.name} is not what was executed: run it again.")
    for cell, done in zip(ours.cells, ran.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs = [_without_ids(o) for o in done.outputs if not _is_noise(o)]
            cell.execution_count = done.execution_count
    ours.metadata["stamp"] = {
        "code": code_hash(ours),
        "measuring": measuring_hash(),
        "machine": machine.slug(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }
    results.write_atomically(notebook, nbformat.writes(ours) + "\n")


def _is_noise(output) -> bool:
    return output.output_type == "stream" and output.name == "stderr"


def _without_ids(output):
    for mime in [m for m in output.get("data", {}) if "widget" in m]:
        del output.data[mime]
    return output


def parse_parameters(pairs: list[str]) -> dict:
    """["NAME=value", ...] to a dict, values read as YAML ("8" is a number). Raises ValueError in
    one sentence.
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"-p {pair}: write it as NAME=value.")
        found[name] = yaml.safe_load(value)
    return found


def check_parameters(chosen: list[Path], given: dict) -> None:
    """An unknown parameter is an error (papermill alone only logs it): some chosen notebook must
    know it.
    """
    known = set().union(*(known_parameters(path) for path in chosen))
    if unknown := sorted(set(given) - known):
        raise ValueError(
            f"unknown parameter {', '.join(unknown)}; these are known: {', '.join(sorted(known))}."
        )


def run_all(
    chosen: list[Path], given: dict, profile: str, out: Path, reference: bool, console: Console
) -> int:
    """Run the notebooks one after the other; a failed one does not stop the others. Returns the
    number that failed.
    """
    rows, failed = [], 0
    for at, notebook in enumerate(chosen, 1):
        known = known_parameters(notebook)
        parameters = {k: v for k, v in (PROFILES[profile] | given).items() if k in known}
        console.print(f"[bold]{at} of {len(chosen)}[/bold] {notebook.stem}")
        start, said = time.perf_counter(), "ok"
        try:
            execute(notebook, out / notebook.name, parameters, progress=True)
            if reference:
                stamp(notebook, out / notebook.name)
        except PapermillExecutionError as error:
            said, failed = f"{error.ename}: {error.evalue}".strip().splitlines()[0], failed + 1
        except Exception as error:  # a kernel that died, a full disk: the others still run
            said, failed = f"{type(error).__name__}: {error}".splitlines()[0], failed + 1
        rows.append((notebook.stem, f"{time.perf_counter() - start:.0f} s", said))
    table = Table("notebook", "time", "outcome")
    for row in rows:
        table.add_row(*row, style="red" if row[2] != "ok" else "")
    console.print(table, f"executed copies in {os.path.relpath(out)}")
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m helpers.series.run", description="Run the notebooks on this machine."
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NN", help="notebooks whose name begins so: --only 01 03"
    )
    parser.add_argument(
        "--profile", choices=PROFILES, default="full", help="smoke: small numbers, minutes in all"
    )
    parser.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=value")
    parser.add_argument("--out", type=Path, help="folder of the executed copies (runs/<machine>)")
    parser.add_argument(
        "--reference", action="store_true", help="write the outputs into notebooks/ and stamp them"
    )
    asked = parser.parse_args(arguments)
    console = Console()
    try:
        given = parse_parameters(asked.parameters)
        if asked.reference and (given or asked.profile != "full"):
            raise ValueError("--reference runs the notebooks as they stand: no -p, no --profile.")
        chosen = notebooks(asked.only)
        check_parameters(chosen, given)
        results.check(given.get("RESULTS_DIR", ""))
    except ValueError as error:
        console.print(f"[red]{error}[/red]")
        return 2
    os.environ["SEVEN_PROFILE"] = asked.profile
    out = asked.out or ROOT / "runs" / machine.slug()
    return (
        1 if run_all(chosen, given, asked.profile, out.resolve(), asked.reference, console) else 0
    )


if __name__ == "__main__":
    sys.exit(main())
