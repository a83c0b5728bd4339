"""The notebooks run through papermill, and what they found is plausible. (Each lesson's own
properties: test_NN_*.)
"""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import papermill
import psutil
import pytest
from papermill.exceptions import PapermillExecutionError
from PIL import Image

from helpers import machine, results
from helpers.series import claims, parameters, report, run, stamps

LESSONS = [path.stem for path in run.notebooks()[:-1]]
COMPARISON = run.notebooks()[-1]
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


@pytest.mark.notebook
@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_leaves_plausible_records(name, run_lesson):
    lesson = run_lesson(name)
    assert any(record.status == "ok" and record.sweep is None for record in lesson.records)
    assert any(record.baseline for record in lesson.records)
    assert lesson.run.profile == "smoke" and lesson.run.finished
    failed = [(record.id, record.reason) for record in lesson.records if record.status == "failed"]
    assert not failed
    for record in lesson.records:
        if record.latency_s and record.inter_token_s:
            stamped_s = sum(record.ttft_s) + sum(record.inter_token_s)
            assert stamped_s <= sum(record.latency_s) * 1.001
        if record.perplexity:
            assert 1 < record.perplexity < 1e6 and record.eval_tokens > 0
            assert record.eval_text and record.scored_with
        if record.speedup_ci95 and record.speedup:
            assert record.speedup_ci95[0] <= record.speedup <= record.speedup_ci95[1]
        if record.kl_divergence is not None:
            assert record.kl_divergence > -1e-6
        if record.moved_bytes_per_s:
            assert record.step_bytes and record.decode_tokens_per_s


@pytest.mark.slow
def test_a_reader_s_own_settings_change_no_chart(tmp_path, monkeypatch):
    """A backend for scripts would show none; a matplotlibrc of LaTeX and small pictures, another
    look; and without HOME the folders are those of the user's entry in the system.
    """
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.dpi: 20\nfont.size: 30\n")
    monkeypatch.setenv("MATPLOTLIBRC", str(tmp_path / "matplotlibrc"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("SEVEN_PROFILE", "smoke")
    lesson = run.notebooks(["01"])[0]
    given = run.smoke_parameters(lesson) | {"RESULTS_DIR": str(tmp_path / "results")}
    run.execute(lesson, tmp_path / lesson.name, given)
    sizes = []
    for notebook in (lesson, tmp_path / lesson.name):
        outputs = [o for c in nbformat.read(notebook, 4).cells for o in c.get("outputs", [])]
        shown = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
        pictures = [Image.open(io.BytesIO(base64.b64decode(text))) for text in shown]
        sizes.append([picture.width for picture in pictures])
    committed, ran = sizes
    assert committed and ran == pytest.approx(committed, rel=0.2)


@pytest.mark.notebook
def test_the_comparison_draws_what_the_lessons_left(tmp_path, run_lesson, monkeypatch):
    monkeypatch.setenv("SEVEN_PROFILE", "smoke")
    folder = tmp_path / "results"
    for name in LESSONS:
        shutil.copytree(run_lesson(name).folder / "results", folder, dirs_exist_ok=True)
        monkeypatch.setenv("SEVEN_PROFILE", "smoke")
    damaged = next(folder.glob(f"*/*/smoke/{LESSONS[-1]}.json"))
    damaged.write_text(damaged.read_text()[:200])  # the others are drawn all the same
    out = tmp_path / "08.ipynb"
    places = {"RESULTS_DIR": str(folder), "FIGURES_DIR": str(tmp_path / "figures")}
    run.execute(COMPARISON, out, places)
    assert f"{damaged.name} cannot be read as results" in out.read_text()
    slug = damaged.parent.parent.parent.name
    figures = tmp_path / "figures" / slug / "SmolLM2-135M-Instruct"
    drawn = {path.name for path in figures.iterdir()}
    for chart in ("speedup", "memory", "quality_speed", "limit"):
        assert {f"{chart}{ending}" for ending in (".svg", ".pdf", ".png", ".csv", ".txt")} <= drawn
    factors = pd.read_csv(figures / "factors.csv").set_index("variant")
    assert factors.factor["llamacpp-f32 / fp32"] == "engine, at the same bits"
    assert factors.factor["llamacpp-q4 / llamacpp-f32"] == "bits, in one engine"
    caption = (figures / "speedup.txt").read_text()
    assert slug in caption and "SmolLM2" in caption and "new ones" in caption


@pytest.mark.notebook
def test_the_comparison_without_results_says_so(tmp_path):
    places = {"RESULTS_DIR": str(tmp_path), "FIGURES_DIR": str(tmp_path / "figures")}
    with pytest.raises(Exception, match=r"No results for .*: run the lessons first"):
        run.execute(COMPARISON, tmp_path / "08.ipynb", places)


EIGHTH = {
    "parameters": """
MODEL = "auto"
REPEATS = 2
RESULTS_DIR = ""
FIGURES_DIR = ""
""",
    "measure": """
import torch
from helpers import memory, models, plots, results, timing
from helpers.timing import Variant, generate

lesson = results.open("09_half_precision", MODEL, {"REPEATS": REPEATS}, device="cpu", seed=0,
                      results_dir=RESULTS_DIR)
prompt = models.prompt_ids(models.tokenizer(MODEL), "A technique that nobody has heard of")


def variant(dtype):
    return Variant(lambda: models.load(MODEL, dtype), lambda model: generate(model, prompt, 3))


variants = {"whole": variant(torch.float32), "half": variant(torch.float16)}
timing.measure(variants, "whole", REPEATS, 0, keep=lesson)
for name in variants:
    lesson.add(name, peak=memory.peak_of(variants[name]), weight_bytes=1000, dtype=name)
lesson.finish()
""",
    "show": "plots.speedup(lesson.frame(), 'An eighth technique')\nlesson.table()",
}


@pytest.mark.notebook
def test_an_eighth_technique_is_one_notebook(tmp_path, tiny_llama, monkeypatch):
    """From a notebook that the project has never seen to the charts of the comparison."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = KERNEL
    for name, source in EIGHTH.items():
        tags = ["parameters"] if name == "parameters" else []
        notebook.cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": tags}))
    nbformat.write(notebook, tmp_path / "09_half_precision.ipynb")
    places = {"RESULTS_DIR": str(tmp_path / "results"), "FIGURES_DIR": str(tmp_path / "figures")}
    given = places | {"MODEL": tiny_llama}
    run.execute(tmp_path / "09_half_precision.ipynb", tmp_path / "out.ipynb", given)
    (path,) = (tmp_path / "results").glob("*/*/09_half_precision.json")
    assert {record.technique for record in results.read(path).records} == {"half_precision"}
    run.execute(COMPARISON, tmp_path / "08.ipynb", places)
    (rows,) = (tmp_path / "figures").glob("*/*/speedup.csv")
    assert "half_precision" in rows.read_text() and rows.with_suffix(".svg").exists()


@pytest.mark.notebook
def test_a_bad_parameter_stops_a_lesson_in_one_sentence(tmp_path):
    with pytest.raises(Exception, match="NEW_TOKENS=0 must be a whole number"):
        run.execute(
            run.NOTEBOOKS / "02_bfloat16.ipynb",
            tmp_path / "out.ipynb",
            {"RESULTS_DIR": str(tmp_path / "r"), "NEW_TOKENS": 0},
        )
    assert not list(tmp_path.rglob("*.json"))


def test_a_lossless_format_says_the_same_text(run_lesson):
    by_variant = {r.variant: r for r in run_lesson("01_mixed_precision").records}
    assert by_variant["fp16"].agreement > 0.98 and abs(by_variant["fp16"].nll_delta) < 0.01
    assert by_variant["fp32"].weight_bytes == 2 * by_variant["fp16"].weight_bytes == 538_060_032
    peak = {
        n: r.peak_bytes - r.resident_before_bytes for n, r in by_variant.items() if r.peak_bytes
    }
    # half, less what the process held free from before, up to some 60 MB
    assert 0.35 < peak["fp16"] / peak["fp32"] < 0.6
    assert peak["fp16-autocast"] > 1.2 * peak["fp32"]


def test_bfloat16_moves_more_than_float16(run_lesson):
    by_variant = {record.variant: record for record in run_lesson("02_bfloat16").records}
    assert by_variant["bf16"].kl_divergence > by_variant["fp16"].kl_divergence > 0
    assert {record.sweep for record in by_variant.values()} == {None, "prompt_tokens"}
    judged = claims.claims(list(by_variant.values()), "bfloat16")
    assert judged.loc["bfloat16 weights take half the memory", "verdict"] == "holds here"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "99"], "no notebook begins so"),
        (["--only", "01", "-p", "NEW_TOKEN=8"], "unknown parameter NEW_TOKEN"),
        (["--only", "01", "-p", "NEW_TOKENS"], "write it as NAME=value"),
        (["--only", "01", "-p", "[/INST]"], "-p '[/INST]': write it as NAME=value"),
        (["--only", "01", "-p", "MODEL=" + "a" * 300], "is neither a folder here nor a model"),
        (["--reference", "-p", "SEED=1"], "--reference runs the notebooks as they stand"),
    ],
)
def test_bad_commands_get_one_sentence(arguments, said, capsys):
    assert run.main(arguments) == 2
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_folder_without_a_tokenizer_is_refused_before_a_lesson_begins(
    tiny_llama, tmp_path, capsys
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    parameters.check_tokenizer(str(folder))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert run.main(["--only", "01", "-p", f"MODEL={folder}", "-p", f"RESULTS_DIR={tmp_path}"]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "has no tokenizer that loads" in said and "Traceback" not in said
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="has no tokenizer that loads without code of its own"):
        parameters.check_parameters({"In": [], "MODEL": str(folder)})
    assert list(tmp_path.glob("*")) == [folder]


def small(folder, name: str, source: str) -> None:
    """A notebook of a parameter and one cell."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = KERNEL
    notebook.metadata["smoke"] = {"SEED": 5}
    notebook.cells = [
        nbformat.v4.new_code_cell("SEED = 0", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(source),
    ]
    nbformat.write(notebook, folder / name)


SLOW = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path("started").write_text(str(child.pid))
if not pathlib.Path("quick").exists():
    time.sleep(600)
child.kill()
"""
RUN = """
import pathlib, sys
from helpers.series import run
run.NOTEBOOKS = pathlib.Path(sys.argv[1])
sys.exit(run.main(["--out", sys.argv[2], *sys.argv[3:]]))
"""


def outcomes(folder, *options) -> subprocess.Popen:
    """A run of the notebooks in `folder`, in a process of its own."""
    command = [sys.executable, "-c", RUN, str(folder), str(folder / "out"), *options]
    environment = os.environ | {"PYTHONPATH": str(results.ROOT), "COLUMNS": "120"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,  # a group of its own, which Ctrl-C reaches as a whole
    )


@pytest.mark.notebook
def test_ctrl_c_leaves_nothing_running_and_the_next_run_goes_on_from_there(tmp_path):
    small(tmp_path, "01_done.ipynb", "print(SEED)")
    small(tmp_path, "02_stopped.ipynb", SLOW)
    small(tmp_path, "03_comparison.ipynb", "print(SEED)")
    running = outcomes(tmp_path)
    started = tmp_path / "started"
    while not (started.exists() and started.read_text()):
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.1)
    below = psutil.Process(running.pid).children(recursive=True)
    assert int(started.read_text()) in {process.pid for process in below}
    os.killpg(running.pid, signal.SIGINT)
    said, _ = running.communicate(timeout=10)  # as is promised
    assert running.returncode == 1
    assert not [process for process in below if process.is_running()]
    assert re.search(r"01_done .* ok", said) and re.search(rf"02_stopped .* {run.STOPPED}", said)
    assert "03_comparison" not in said

    (tmp_path / "quick").touch()
    said, _ = outcomes(tmp_path).communicate(timeout=300)
    assert re.search(rf"01_done .* {run.BEFORE}", said)
    assert re.search(r"02_stopped .* ok", said) and re.search(r"03_comparison .* ok", said)
    said, _ = outcomes(tmp_path, "-p", "SEED=3").communicate(timeout=300)
    assert run.BEFORE not in said  # other parameters
    small(tmp_path, "01_done.ipynb", "print(SEED + 1)")
    said, _ = outcomes(tmp_path, "-p", "SEED=3").communicate(timeout=300)
    assert re.search(r"01_done .* ok", said)  # other code
    assert re.search(rf"02_stopped .* {run.BEFORE}", said)
    assert re.search(r"03_comparison .* ok", said)  # it reads what the others leave
    said, _ = outcomes(tmp_path, "-p", "SEED=3", "--again").communicate(timeout=300)
    assert run.BEFORE not in said


def test_a_failed_notebook_fails_the_run_after_the_others(tmp_path, capsys, monkeypatch):
    why = "the thing that failed, " + "and a reason wider than any console, " * 4
    small(tmp_path, "01_bad.ipynb", f"raise ValueError({why!r})")
    small(tmp_path, "02_good.ipynb", "print('seed', SEED)")
    monkeypatch.setattr(run, "NOTEBOOKS", tmp_path)
    monkeypatch.setenv("SEVEN_PROFILE", "full")  # `main` sets it: it is put back afterwards
    out = tmp_path / "out"
    assert run.main(["--out", str(out), "-p", "SEED=7"]) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"01_bad: ValueError: {why}".strip()
    printed = " ".join(printed.split())
    assert "the thing that failed" in printed and "ok" in printed
    assert "seed 7" in (out / "02_good.ipynb").read_text()
    assert run.main(["--out", str(out), "--profile", "smoke", "--only", "02"]) == 0
    assert "seed 5" in (out / "02_good.ipynb").read_text()


DEFAULTS = {
    "MODEL": "auto",
    "PROMPT": "a b",
    "COUNT": 3,
    "RATE": 0.1,
    "ON": True,
    "SIZES": [1, 2],
    "NAMES": [],
    "RESULTS_DIR": "",
    "FIGURES_DIR": "",
}


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("COUNT=8", 8),
        ("RATE=1e-3", 0.001),
        ("RATE=2", 2.0),
        ("SIZES=[1, 2.5]", [1, 2.5]),
        ("SIZES=[1e-1]", [0.1]),
        ("NAMES=[a, b]", ["a", "b"]),
        ("ON=false", False),
        ("PROMPT=42", "42"),
        ("PROMPT=yes", "yes"),
        ("PROMPT=Answer: 42", "Answer: 42"),
        ("PROMPT=[INST] Hello [/INST]", "[INST] Hello [/INST]"),
        ("PROMPT=`ls`", "`ls`"),
        ("MODEL=", ""),
    ],
)
def test_the_default_decides_what_a_value_is(pair, value):
    (given,) = run.parse_parameters([pair], DEFAULTS).values()
    assert given == value and type(given) is type(value)


@pytest.mark.parametrize(
    ("value", "default", "sentence"),
    [
        ("many", 3, "X='many' must be a whole number, not below zero."),
        (2.5, 3, "X=2.5 must be a whole number, not below zero."),
        (True, 3, "X=True must be a whole number, not below zero."),
        (None, 3, "X=None must be a whole number, not below zero."),
        (-1, 3, "X=-1 must be a whole number, not below zero."),
        ("nan", 0.1, "X='nan' must be a number, not below zero."),
        ("perhaps", True, "X='perhaps' must be True or False."),
        (4, [1, 2], "X=4 must be a list, like [1, 2]."),
        ("[1, a]", [1, 2], "X='[1, a]' must be a list, like [1, 2]."),
        ("[1, ", [1, 2], "X='[1, ' must be a list, like [1, 2]."),
        (42, "auto", "X=42 must be text."),
        ({"Answer": 42}, "auto", "X={'Answer': 42} must be text."),
        (None, "auto", "X=None must be text."),
    ],
)
def test_a_value_of_another_kind_is_refused_in_one_sentence(value, default, sentence):
    with pytest.raises(ValueError) as refusal:
        parameters.typed("X", value, default)
    assert str(refusal.value) == sentence


CHECKED = """
from helpers.series.parameters import check_parameters
check_parameters(globals())
print([RATE, COUNT, SIZES, ON, PROMPT])
"""


@pytest.mark.notebook
def test_what_papermill_leaves_text_becomes_what_it_means(tmp_path):
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = KERNEL
    lines = "\n".join(f"{name} = {default!r}" for name, default in DEFAULTS.items())
    notebook.cells = [
        nbformat.v4.new_code_cell(lines, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(CHECKED),
    ]
    path, out = tmp_path / "values.ipynb", tmp_path / "out.ipynb"
    nbformat.write(notebook, path)
    text = {"RATE": "1e-3", "COUNT": "64", "SIZES": "[30, 50]", "ON": "false", "PROMPT": "1e-3"}
    run.execute(path, out, text)
    (shown,) = [cell for cell in nbformat.read(out, 4).cells if cell.get("outputs")]
    assert "[0.001, 64, [30, 50], False, '1e-3']" in shown.outputs[0].text
    with pytest.raises(PapermillExecutionError, match="COUNT='many' must be a whole number"):
        run.execute(path, out, {"COUNT": "many"})


@pytest.mark.parametrize("name", LESSONS + [f"deeper/{p.stem}" for p in run.notebooks(deeper=True)])
def test_parameters_are_checked_before_they_are_used(name):
    """Nothing is loaded, opened or decided between the parameters and their check."""
    cells = nbformat.read(run.NOTEBOOKS / f"{name}.ipynb", 4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    checked = code.index("\ncheck_parameters(globals())\n")
    uses = ["results.check(", "results.open("]
    if "HF_HUB_OFFLINE" not in code:  # set by the device, before transformers is imported
        uses.append("pick_device(")
    for use in uses:
        assert use not in code[:checked]
    for use in ("models.tokenizer(", "models.resolve(", "from_pretrained("):
        assert use not in code[:checked]


def test_folders_belong_to_the_caller(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    pairs = ["RESULTS_DIR=mine", "FIGURES_DIR=~/x", "MODEL=tiny"]
    assert run.parse_parameters(pairs, DEFAULTS) == {
        "RESULTS_DIR": str(tmp_path / "mine"),
        "FIGURES_DIR": str(tmp_path / "home" / "x"),
        "MODEL": str(tmp_path / "tiny"),
    }
    hub = {"MODEL": "Qwen/Qwen2.5-3B"}
    assert run.parse_parameters(["MODEL=Qwen/Qwen2.5-3B"], DEFAULTS) == hub


def executed(notebook) -> nbformat.NotebookNode:
    """A copy with outputs, as papermill would leave it."""
    done = nbformat.from_dict(notebook)
    done.cells[-1].outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="noise"),
        nbformat.v4.new_output("execute_result", {"text/plain": "PosixPath('/home/x')"}),
        nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=1),
    ]
    done.cells[-1].execution_count = 1
    return done


def test_stamping_keeps_the_code_and_refuses_another(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    path, ran = tmp_path / "01_a.ipynb", tmp_path / "ran.ipynb"
    nbformat.write(notebook, path)
    nbformat.write(executed(notebook), ran)
    assert not stamps.is_stale(path)
    stamps.stamp(path, ran)
    stamped = nbformat.read(path, 4)
    assert len(stamped.cells[0].outputs) == 1 and not stamps.is_stale(path)
    stamped.cells[0].source = "2 + 2"
    nbformat.write(stamped, path)
    assert stamps.is_stale(path)
    with pytest.raises(ValueError, match="is not what was executed"):
        stamps.stamp(path, ran)


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ("x = 1\n\ndef f():\n    return x  # a comment\n", False),
        ('x = 1\n\ndef f():\n    """A docstring."""\n    return x\n', False),
        ("from typing import Any\n\nx: Any = 1\n\ndef f() -> Any:\n    return x\n", False),
        ("x = 1\n\ndef f():\n    return x + 1\n", True),
        ("x: int = 2\n\ndef f():\n    return x\n", True),
    ],
)
@pytest.mark.parametrize("worker", ["workers/engines_03.py", "series/launches_03.py"])
def test_a_stamp_is_of_what_measures(tmp_path, monkeypatch, worker, change, stale):
    """Comments, docstrings, annotations, bootstrap and parameters do not count; a worker of the lesson does,
    and what starts it.
    """
    helpers = tmp_path / "helpers"
    helpers.mkdir()
    for module in stamps.MEASURING:
        (helpers / f"{module}.py").write_text("x = 1\n")
    (helpers / worker).parent.mkdir()
    (helpers / worker).write_text("x = 1\n\ndef f():\n    return x\n")
    monkeypatch.setattr(stamps, "HELPERS", helpers)
    cells = [
        nbformat.v4.new_code_cell("SEED = 0", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("1 + 1"),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    for name in ("03_a.ipynb", "04_b.ipynb"):
        nbformat.write(notebook, tmp_path / name)
        nbformat.write(executed(notebook), tmp_path / "ran.ipynb")
        stamps.stamp(tmp_path / name, tmp_path / "ran.ipynb")
        stamped = nbformat.read(tmp_path / name, 4)
        stamped.cells[0].source = "SEED = 1"
        nbformat.write(stamped, tmp_path / name)
    (helpers / worker).write_text(change)
    assert stamps.is_stale(tmp_path / "03_a.ipynb") == stale
    assert not stamps.is_stale(tmp_path / "04_b.ipynb")  # another lesson's worker
    (helpers / "timing.py").write_text("x = 2\n")
    assert stamps.is_stale(tmp_path / "04_b.ipynb")


@pytest.mark.notebook
def test_papermill_alone_runs_a_lesson_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    papermill.execute_notebook(
        str(COMPARISON),
        "out.ipynb",
        progress_bar=False,
        parameters={"RESULTS_DIR": str(report.REFERENCE), "FIGURES_DIR": "figures"},
    )
    place = report.committed()
    assert (tmp_path / "figures" / place.machine / place.model / "speedup.svg").exists()


@pytest.mark.slow
def test_a_run_and_then_the_tests_leave_a_checkout_clean(tmp_path):
    """README's two commands in their order, with small numbers, in a clone of this checkout."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", results.ROOT, clone], check=True)
    environment = os.environ | {"PYTHONPATH": str(clone), "HOME": str(tmp_path)}
    environment["XDG_CACHE_HOME"] = os.path.expanduser("~/.cache")
    small_run = ["-m", "helpers.series.run", "--profile", "smoke", "--only", "02", "08"]
    tests = [
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "tests/test_report.py",
        "tests/test_results.py",
    ]
    for command in (small_run, tests):
        done = subprocess.run(
            [sys.executable, *command], cwd=clone, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    status = ["git", "-C", clone, "status", "--porcelain"]
    assert subprocess.run(status, capture_output=True, text=True, check=True).stdout == ""
    left = {path.name for path in (clone / "runs").glob("*/*/smoke/*")}
    assert {"02_bfloat16.json", "02_bfloat16.ipynb", "08_comparison.ipynb", "figures"} <= left
    records = json.loads(next((clone / "runs").glob("*/*/smoke/02*.json")).read_text())
    assert records["machine"]["slug"] == machine.slug()
