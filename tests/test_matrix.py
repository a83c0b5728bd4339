"""matrix: what a file describes, cells finished and failed, a cluster that loses a node."""

import json
import os
import re
import subprocess
import sys
import time

import psutil
import pytest
from rich.console import Console

from helpers import machine, results
from helpers.series import matrix, run

TWO_BY_TWO = """
models: [auto, "random:tiny-llama"]
lessons: ["01", "02"]
parameters:
  SEED: [0, 1]
  EVAL_TOKENS: [48]
profile: smoke
minutes: 5
"""


def written(folder, text):
    path = folder / "matrix.yaml"
    path.write_text(text)
    return path


def test_a_file_becomes_cells(tmp_path):
    described = matrix.read(written(tmp_path, TWO_BY_TWO))
    names = [cell.name for cell in described.cells]
    assert len(names) == 2 * 2 * 2
    assert names[0] == "01_mixed_precision_MODEL=auto_SEED=0_EVAL_TOKENS=48"
    assert names[-1] == "02_bfloat16_MODEL=random-tiny-llama_SEED=1_EVAL_TOKENS=48"
    cell = described.cells[-1]
    assert cell.parameters == ("MODEL=random:tiny-llama", "SEED=1", "EVAL_TOKENS=48")
    assert (cell.profile, cell.limit_s) == ("smoke", 300)
    assert (described.cpus, described.gpus) == (machine.cores(), 0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("models: [auto]", "matrix.yaml: lessons: Field required."),
        ("[1, 2]", "matrix.yaml: the file: Input should be a valid dictionary"),
        ("models: [auto]\nlessons: ['01']\ncolour: red", "colour: Extra inputs are not permitted."),
        ("models: [auto\n", "cannot be read"),
        ("models: auto\nlessons: ['01']", "models: Input should be a valid list."),
        (
            "models: [auto]\nlessons: ['01']\nparameters: {SEED: 3}",
            "parameters.SEED: Input should be a valid list.",
        ),
        ("models: [auto]\nlessons: ['99']", "no notebook begins so"),
        ("models: [auto]\nlessons: ['01']\nparameters: {SPEED: [3]}", "unknown parameter SPEED"),
        ("models: [auto]\nlessons: ['01']\nparameters: {SEED: [a]}", "SEED='a' must be a whole"),
        (
            "models: [auto]\nlessons: ['01']\nprofile: quick",
            "profile: Input should be 'full' or 'smoke'.",
        ),
        ("models: [a/b, a-b]\nlessons: ['01']", "two cells would have the same folder"),
        (
            "models: [auto]\nlessons: ['01']\nminutes: ten",
            "minutes: Input should be a valid number",
        ),
        ("models: [auto]\nlessons: ['01']\ncpus: .inf", "cpus: Input should be a finite number"),
        (f"models: [{'a' * 300}b, {'a' * 300}c]\nlessons: ['01']", "have the same folder"),
    ],
)
def test_what_no_notebook_would_take_is_refused_before_anything_runs(tmp_path, text, sentence):
    with pytest.raises(ValueError) as refusal:
        matrix.read(written(tmp_path, text))
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_missing_file_and_mixed_options_end_with_2(tmp_path, capsys):
    assert run.main(["--matrix", str(tmp_path / "none.yaml")]) == 2
    path = written(tmp_path, TWO_BY_TWO)
    assert run.main(["--matrix", str(path), "-p", "SEED=3"]) == 2
    assert "stand in its file" in capsys.readouterr().out


def test_a_cell_that_no_node_can_hold_does_not_wait_for_ever():
    described = matrix.Matrix([], cpus=1, gpus=1)
    with_gpu = {"Resources": {"CPU": 1.0, "GPU": 1.0}}
    matrix._check_nodes(described, [{"Resources": {"CPU": 8.0}}, with_gpu])
    with pytest.raises(ValueError, match="1 CPUs and 1 GPUs: no node"):
        matrix._check_nodes(described, [{"Resources": {"CPU": 8.0}}])


def outcomes(out) -> dict:
    """How each cell ended, by the name of its folder."""
    return {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/outcome.json")}


@pytest.mark.notebook
def test_finished_cells_are_skipped_and_failed_ones_run_again(tmp_path, capsys):
    text = "models: ['random:tiny-llama', ./nowhere]\nlessons: ['01']\nprofile: smoke\n"
    path, out = written(tmp_path, text), tmp_path / "out"
    command = ["--matrix", str(path), "--out", str(out)]
    assert run.main(command) == 1
    printed = capsys.readouterr().out
    assert "2 cells, 0 finished before" in printed
    assert "1 of 2" in printed and "min left" in printed
    said = " ".join(printed.split())  # a console breaks its lines
    assert re.search(r"failed: 01_mixed_precision_MODEL=.-nowhere: .* no folder with a", said)
    before = outcomes(out)
    whole = out / "01_mixed_precision_MODEL=random-tiny-llama"
    assert before[whole.name]["reason"] == ""
    assert "exit code 2" in before["01_mixed_precision_MODEL=.-nowhere"]["reason"]
    (records,) = whole.glob("results/*/*/smoke/01_mixed_precision.json")
    assert results.read(records).run.finished
    assert (whole / "01_mixed_precision.ipynb").is_file()
    assert (
        "no folder with a config.json"
        in (out / "01_mixed_precision_MODEL=.-nowhere" / "run.log").read_text()
    )

    assert run.main(command) == 1
    assert "2 cells, 1 finished before" in capsys.readouterr().out
    after = outcomes(out)
    assert after[whole.name] == before[whole.name]
    full = matrix.Cell("01_mixed_precision", ("MODEL=random:tiny-llama",), "full", 60)
    assert not matrix.finished(full, out)  # another profile is another run


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"reason": ""', b"\xff", b"1"])
def test_a_cell_whose_outcome_is_lost_or_damaged_runs_again(tmp_path, content):
    cell = matrix.Cell("01_mixed_precision", ("MODEL=auto",), "smoke", 60)
    outcome = tmp_path / cell.name / "outcome.json"
    outcome.parent.mkdir()
    outcome.write_text('{"reason": "", "profile": "smoke"}')
    assert matrix.finished(cell, tmp_path)
    outcome.unlink() if content is None else outcome.write_bytes(content)
    assert not matrix.finished(cell, tmp_path)


@pytest.mark.notebook
def test_a_cell_that_takes_too_long_is_ended(tmp_path):
    cell = matrix.Cell("01_mixed_precision", ("MODEL=random:tiny-llama",), "smoke", 1)
    outcome = matrix.run_cell(cell, tmp_path / "cell")
    assert "was not done within 1 s" in outcome["reason"]
    for process in psutil.Process().children(recursive=True):
        assert str(tmp_path) not in " ".join(process.cmdline())


def running_below(pid: int) -> bool:
    """Is a cell running among the descendants of this process?"""
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "helpers.series.run" in process.cmdline():
                return True
        except psutil.Error:
            continue
    return False


@pytest.mark.slow
def test_a_killed_node_loses_no_cell(tmp_path):
    """A cluster of two nodes on this machine; one of them is killed in the middle of a cell."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    text = "models: ['random:tiny-llama']\nlessons: ['01']\nparameters: {SEED: [0, 1, 2]}\n"
    path, out = written(tmp_path, text + "profile: smoke\ncpus: 1\n"), tmp_path / "out"
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        lost = cluster.add_node(num_cpus=1)
        raylet = lost.all_processes["raylet"][0].process
        command = [sys.executable, "-m", "helpers.series.run", "--matrix", path, "--out", out]
        command += ["--ray", cluster.address]
        environment = os.environ | {"PYTHONPATH": str(results.ROOT)}
        with subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        ) as driver:
            while driver.poll() is None and not running_below(raylet.pid):
                time.sleep(0.2)
            assert driver.poll() is None, driver.stdout.read()
            raylet.kill()
            killed_id = lost.node_id
            printed = driver.communicate()[0]
        assert driver.returncode == 0, printed
    finally:
        cluster.shutdown()
    ended = outcomes(out)
    assert len(ended) == 3, printed
    for name, outcome in ended.items():
        assert outcome["reason"] == "" and outcome["node"] != killed_id, outcome
        (records,) = (out / name).glob("results/*/*/smoke/01_mixed_precision.json")
        assert results.read(records).run.finished
    console = Console(file=open(os.devnull, "w"))
    assert matrix.run_matrix(path, out, console) == 0  # nothing is left to run
    assert outcomes(out) == ended
