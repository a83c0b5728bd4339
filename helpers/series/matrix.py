"""Batches: models × parameters × lessons, each cell in a process and a folder of its own.

`python -m helpers.series.run --matrix FILE` runs them one after the other on this machine; with
`--ray [ADDRESS]` on a Ray cluster, several at once. A cell that is finished is not run again; one
that failed is, on the next call.
"""

import dataclasses
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError
from rich.console import Console

from helpers import machine, results
from helpers.series import processes, run

OUTCOME = "outcome.json"  # in the folder of a cell that has ended
RETRIES = 3  # of a cell whose node died
NOT_SENT = ["/.venv", "/.git", "/runs", "/figures", "/notebooks/results"]  # to the nodes of Ray


@dataclasses.dataclass(frozen=True)
class Cell:
    """One lesson with one model and one set of parameters.

    Attributes
    ----------
    parameters : ("NAME=value", ...), MODEL among them.
    limit_s : seconds after which it is ended.
    """

    lesson: str
    parameters: tuple[str, ...]
    profile: str
    limit_s: float

    @property
    def name(self) -> str:
        """The name of its folder."""
        name = "_".join((self.lesson, *self.parameters))
        return re.sub(r"[^A-Za-z0-9._=-]+", "-", name)[:255]  # characters at most


class Description(results.Strict):
    """What a file may say; see `read`."""

    models: Annotated[list[str], Field(min_length=1)]
    lessons: Annotated[list[str], Field(min_length=1)]
    parameters: dict[str, Annotated[list, Field(min_length=1)]] = Field({})
    profile: Literal["full", "smoke"] = "full"
    minutes: results.Positive = 120
    cpus: results.Positive = machine.cores()
    gpus: results.Seconds = 0


@dataclasses.dataclass(frozen=True)
class Matrix:
    """cpus, gpus : what a cell takes of a node of a Ray cluster; a fraction of a GPU is a share."""

    cells: list[Cell]
    cpus: float
    gpus: float


def read(path: Path) -> Matrix:
    """The cells that a file describes, in the order models, parameters, lessons.

    Its keys: models and lessons (lists), parameters (a list of values by name, all combinations
    are run), profile ("full" or "smoke"), minutes (limit of a cell, 120), cpus (as many as this
    machine has, so that cells on one node do not disturb each other) and gpus (0).

    Raises ValueError in one sentence for what no notebook would take.
    """
    content = _content(path)
    notebooks = run.notebooks(content.lessons)
    varied = {"MODEL": content.models} | content.parameters
    cells = []
    for values in itertools.product(*varied.values()):
        named = zip(varied, values, strict=True)
        pairs = tuple(f"{name}={value}" for name, value in named)
        for notebook in notebooks:
            run.parse_parameters(list(pairs), run.known_parameters(notebook))
            cells.append(Cell(notebook.stem, pairs, content.profile, 60 * content.minutes))
    folders = {cell.name for cell in cells}
    if len(folders) != len(cells):
        raise ValueError(f"{path.name}: two cells would have the same folder.")
    return Matrix(cells, content.cpus, content.gpus)


def _content(path: Path) -> Description:
    """What is in the file. Raises ValueError in one sentence."""
    try:
        return Description.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise ValueError(f"{path.name}: {results.first_fault(error)}") from error
    except Exception as error:  # of the file, of YAML, of a value that YAML cannot make
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error


def run_cell(cell: Cell, folder: Path) -> dict:
    """Run a cell in a process of its own, which leaves all in `folder`: records, figures, the
    executed notebook, what it printed. Returns how it ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "helpers.series.run", "--only", cell.lesson]
    command += ["--profile", cell.profile, "--out", folder]
    command += ["-p", f"RESULTS_DIR={folder / 'results'}"]
    command += ["-p", f"FIGURES_DIR={folder / 'figures'}"]
    for pair in cell.parameters:
        command += ["-p", pair]
    begun = time.monotonic()
    reason = ""
    with (folder / "run.log").open("w", encoding="utf-8") as log:
        try:
            processes.run(
                command,
                timeout_s=cell.limit_s,
                env={"PYTHONPATH": str(results.ROOT)},
                on_line=lambda line: print(line, file=log, flush=True),
            )
        except processes.ServingError as error:
            reason = str(error)
    return {"reason": reason, "seconds": round(time.monotonic() - begun, 1)}


def run_on_ray(
    matrix: Matrix, cells: list[Cell], out: Path, address: str
) -> Iterator[tuple[Cell, dict]]:
    """Run cells on a Ray cluster; each with how it ended, as they end.

    The project's code goes to each node with the cells; its Python must have the project's
    packages. What a cell leaves comes back to `out`. A cell whose node dies runs again on another.

    address : of a cluster, as `ray.init` takes it; "local" begins one on this machine.

    Raises ValueError in one sentence where no node has what a cell takes.
    """
    import ray

    code = {"working_dir": str(results.ROOT), "excludes": NOT_SENT}
    ray.init(address=address, runtime_env=code, log_to_driver=False)
    try:
        _check_nodes(matrix, ray.nodes())
        remote = ray.remote(_run_away).options(
            num_cpus=matrix.cpus, num_gpus=matrix.gpus, max_retries=RETRIES
        )
        running = {remote.remote(cell): cell for cell in cells}
        while running:
            (ended,), _ = ray.wait(list(running), num_returns=1)
            cell = running.pop(ended)
            try:
                outcome, files = ray.get(ended)
            except ray.exceptions.RayError as error:
                outcome = {"reason": str(error), "seconds": 0.0}
                files = {}
            for name, content in files.items():
                path = out / cell.name / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            yield cell, outcome
    finally:
        ray.shutdown()


def _check_nodes(matrix: Matrix, nodes: list[dict]) -> None:
    """Raises ValueError where a cell would wait for ever."""
    for node in nodes:
        there = node["Resources"]
        if there.get("CPU", 0) >= matrix.cpus and there.get("GPU", 0) >= matrix.gpus:
            return
    asked = f"{matrix.cpus:g} CPUs and {matrix.gpus:g} GPUs"
    raise ValueError(f"A cell takes {asked}: no node of the cluster has them.")


def _run_away(cell: Cell) -> tuple[dict, dict[str, bytes]]:
    """On a node: run a cell in a folder that is gone afterwards, and return what it left."""
    import ray

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        outcome = run_cell(cell, folder)
        outcome["node"] = ray.get_runtime_context().get_node_id()
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return outcome, {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def finished(cell: Cell, out: Path) -> bool:
    """Has this cell, as it stands, ended well before?"""
    try:
        kept = json.loads((out / cell.name / OUTCOME).read_text(encoding="utf-8"))
        return kept["reason"] == "" and kept["profile"] == cell.profile
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not what was written
        return False


def run_matrix(path: Path, out: Path, console: Console, ray_address: str | None = None) -> int:
    """Run what is not finished yet, and list what failed. Returns the number of failed cells.

    Raises ValueError in one sentence for a file that does not describe a matrix.
    """
    matrix = read(path)
    to_run = [cell for cell in matrix.cells if not finished(cell, out)]
    console.print(f"{len(matrix.cells)} cells, {len(matrix.cells) - len(to_run)} finished before")
    ending = ((cell, run_cell(cell, out / cell.name)) for cell in to_run)  # one after the other
    if ray_address is not None and to_run:
        ending = run_on_ray(matrix, to_run, out, ray_address)
    failed = []
    begun = time.monotonic()
    for number, (cell, outcome) in enumerate(ending, 1):
        kept = dataclasses.asdict(cell) | outcome
        results.write_atomically(out / cell.name / OUTCOME, json.dumps(kept, indent=1) + "\n")
        word = "ok"
        if outcome["reason"]:
            word = "failed"
            how, *lines = outcome["reason"].splitlines()
            failed.append(f"failed: {cell.name}: {' '.join([how, *lines[-1:]])}")
        left_s = (time.monotonic() - begun) / number * (len(to_run) - number)
        console.print(
            f"{number} of {len(to_run)}, {cell.name}: {word} after {outcome['seconds']:.0f} s; "
            f"about {left_s / 60:.0f} min left"
        )
    for line in failed:
        console.print(line, style="red")
    console.print(f"records, figures and executed notebooks in {out}")
    return len(failed)
