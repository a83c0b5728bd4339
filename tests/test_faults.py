"""Faults of a machine, each with a real process: a killed kernel, a full disk, too little memory, a
clock that is set back, a host name that does not resolve, a user without a name. What was measured
stays whole, nothing keeps running, the next run works.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from helpers import results
from helpers.series import history

END_S = 10  # seconds after which nothing may run any more
START_S = 240  # a kernel and what it starts, on a busy machine
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}

BEGIN = """
import os, pathlib, sys, time
from helpers import models, results, timing
from helpers.series import launches_07, processes
from helpers.workers import vllm_06
import torch

lesson = results.open("01_killed", MODEL, {}, device="cpu", seed=0, results_dir=RESULTS_DIR)
prompt = models.prompt_ids(models.tokenizer(MODEL), "Well,")
whole = timing.Variant(lambda: models.load(MODEL, torch.float32),
                       lambda model: timing.generate(model, prompt, 3))
timing.measure({"first": whole}, "first", 2, 0, keep=lesson)
again = pathlib.Path("again").exists()

def under_way():
    pathlib.Path("kernel").write_text(str(os.getpid()))
"""
# what the kernel does when it is killed; in the next run it comes to its end
DOES = {
    "measures": """
def run(model):
    if not again:
        under_way()
    return timing.generate(model, prompt, 3 if again else 400)

timing.measure({"second": timing.Variant(whole.load, run)}, "second", 2, 0, keep=lesson)
""",
    "saves": """
lesson.finish()
lesson.add("second", dtype="float32")
if not again:  # a slow disk: the content is written, its name is not yet
    os.fsync = lambda file: (under_way(), time.sleep(600))
lesson.add("second", details={"numbers": [1, 2, 3]})
""",
    "serves": """
command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", "{port}"]
command += ["--host", processes.HOST, "--model", models.resolve(MODEL), "--dtype", "float32"]
command += ["--enforce-eager", "--max-model-len", "64"]
env = vllm_06.server_environment() | {"VLLM_CPU_KVCACHE_SPACE": "1"}
with processes.server(command, env=env):
    while not again:
        under_way()
        time.sleep(1)
lesson.add("second", dtype="float32")
""",
    "runs ranks": """
jobs = launches_07.Jobs(models.resolve(MODEL), "float32", "cpu", prompt[0].tolist(),
                        [prompt[0].tolist()], 3)
with jobs.torchrun(launches_07.WORKERS / "pipeline_07.py", 2) as group:
    while not again:
        group.ask(do="run")
        under_way()
    group.ask(do="run")
lesson.add("second", dtype="float32")
""",
}
RUN = """
import pathlib, sys
from helpers.series import run
run.NOTEBOOKS = pathlib.Path(sys.argv[1])
sys.exit(run.main(["--out", sys.argv[2], *sys.argv[3:]]))
"""


def with_mark(mark: str) -> list[psutil.Process]:
    """Living processes that bear the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            is_marked = process.environ().get("TEST_MARK") == mark
            if is_marked and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def all_end(mark: str) -> bool:
    """Does all that bears the mark end in time? What does not is killed."""
    until = time.monotonic() + END_S
    while (left := with_mark(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    for process in left:
        process.kill()
    return not left


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("does", DOES)
def test_a_killed_kernel_leaves_whole_results_and_nothing_running(tmp_path, tiny_llama, does):
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = KERNEL
    given = 'MODEL = "auto"\nRESULTS_DIR = ""\nFIGURES_DIR = ""'
    notebook.cells = [
        nbformat.v4.new_code_cell(given, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(BEGIN),
        nbformat.v4.new_code_cell(DOES[does]),
        nbformat.v4.new_code_cell("lesson.finish()"),
    ]
    nbformat.write(notebook, tmp_path / "01_killed.ipynb")
    nbformat.write(nbformat.v4.new_notebook(metadata=notebook.metadata), tmp_path / "02_last.ipynb")
    mark = f"mark-{tmp_path.name}-{os.getpid()}"
    environment = os.environ | {"PYTHONPATH": str(results.ROOT), "TEST_MARK": mark}
    command = [sys.executable, "-c", RUN, tmp_path, tmp_path / "out", "--only", "01"]
    command += ["-p", f"MODEL={tiny_llama}", "-p", f"RESULTS_DIR={tmp_path / 'results'}"]

    def begun() -> subprocess.Popen:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )

    running, kernel = begun(), tmp_path / "kernel"
    until = time.monotonic() + START_S
    while not (kernel.exists() and kernel.read_text()):
        assert running.poll() is None, running.stdout.read()
        assert time.monotonic() < until, f"it {does} only after {START_S} s"
        time.sleep(0.1)
    os.kill(int(kernel.read_text()), signal.SIGKILL)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 1 and "DeadKernelError" in said
    assert all_end(mark)
    (partial,) = (tmp_path / "results").glob("*/*/01_killed.partial.json")
    rows = {record.id: record for record in results.read(partial).records}
    assert len(rows["first"].latency_s) == 2
    if does == "saves":  # the whole file of before is still there
        finished = results.read(partial.with_name("01_killed.json"))
        assert [record.id for record in finished.records] == ["first"] and finished.run.finished

    (tmp_path / "again").touch()
    running = begun()
    said, _ = running.communicate(timeout=START_S)
    assert running.returncode == 0, said
    after = results.read(partial.with_name("01_killed.json"))
    assert [record.id for record in after.records] == ["first", "second"]
    assert not partial.exists() and all_end(mark)


MEMORY = """
import resource, sys
import torch
from helpers import models, results, timing

MODEL = "random:smollm2-135m"
prompt = models.prompt_ids(models.tokenizer(MODEL), "Well,")

def variant(dtype):
    return timing.Variant(lambda: models.load(MODEL, dtype),
                          lambda model: timing.generate(model, prompt, 2))

variants = {"small": variant(torch.bfloat16), "large": variant(torch.float32)}
lesson = results.open("01_limited", MODEL, {}, device="cpu", seed=0, results_dir=sys.argv[1])
timing.measure({"small": variants["small"]}, "small", 1, 0, keep=lesson)  # imports what it needs
with open("/proc/self/statm") as file:
    taken = int(file.read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (taken + 650_000_000, resource.RLIM_INFINITY))
timing.measure(variants, "small", 1, 0, together=False, keep=lesson)
print(lesson.finish())
"""


def test_a_limit_on_memory_is_a_row_and_the_others_run(tmp_path):
    """A file of 0.27 GB and what is made of it, 0.27 or 0.54 GB, where 0.65 GB may be taken."""
    command = [sys.executable, "-c", MEMORY, tmp_path]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    small, large = results.read(Path(answer.stdout.splitlines()[-1])).records
    assert (small.status, large.status) == ("ok", "oom") and small.tokens_per_s
    assert "allocate" in large.reason


CLOCK = """
import sys, time
from pathlib import Path
import datetime as real
from helpers import models, results, timing
from helpers.series import history
import torch

now = [2e9]

def set_back():  # by an hour at each look
    now[0] -= 3600
    return now[0]

class Datetime(real.datetime):
    @classmethod
    def now(cls, zone=None):
        return cls.fromtimestamp(time.time(), zone)

time.time = set_back
real.datetime = Datetime
prompt = models.prompt_ids(models.tokenizer(sys.argv[2]), "Well,")
variants = {
    name: timing.Variant(lambda: models.load(sys.argv[2], torch.float32),
                         lambda model: timing.generate(model, prompt, 3))
    for name in ("one", "other")
}
for seed in (0, 1):
    lesson = results.open("01_clock", sys.argv[2], {}, device="cpu", seed=seed, results_dir=sys.argv[1])
    timing.measure(variants, "one", 3, 0, keep=lesson)
    path = lesson.finish()
    history.append(path.parent.parent)
print(path)
"""


def test_a_clock_that_is_set_back_changes_no_duration_and_no_order(tmp_path, tiny_llama):
    command = [sys.executable, "-c", CLOCK, tmp_path, tiny_llama]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    path = Path(answer.stdout.splitlines()[-1])
    later = results.read(path)
    for record in later.records:
        assert record.seed == 1 and 0 < min(record.inter_token_s)
        assert max(record.latency_s) < 3600 and max(record.busy_share) <= 1
    rows = history.read(path.parent.parent)
    assert rows["date"].tolist() == sorted(rows["date"], reverse=True)
    assert len(rows) == 2 and rows["date"].iloc[-1] == later.run.date
    assert rows["speedup"].iloc[-1] == pytest.approx(later.records[1].speedup, abs=1e-4)
    turned = rows.assign(speedup=[2.0, 1.0], low=[1.9, 0.9], high=[2.1, 1.1])
    assert "moved by at most 50.0%" in history.moved(turned)  # from the run before, not from later


def small_disk(folder: Path, megabytes: float) -> list[str]:
    """Words before a command that let it see `folder` as a file system of so many MB."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    mounted = 'mount -t tmpfs -o size="$0" none "$1" && shift && exec "$@"'
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", mounted]
    words = [*inside, f"{int(1e6 * megabytes)}", str(folder)]
    folder.mkdir()
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system of its own")
    return words


SAVING = """
import json, sys
from helpers import results

lesson = results.open("01_full", "auto", {}, device="cpu", seed=0, results_dir=sys.argv[1])
lesson.add("first", dtype="float32")
lesson.finish()
rows, said = 0, ""
while not said:  # each longer than the one before
    try:
        lesson.add(f"row-{rows}", details={"numbers": list(range(20_000))})
        rows += 1
    except OSError as error:
        said = str(error)
kept = len(results.read(lesson.partial).records)
hidden = [path.name for path in lesson.folder.glob("*.part")]
finished = len(results.read(lesson.path).records)
lesson.rows = {"next": {"id": "next", "variant": "next"}}
after = len(results.read(lesson.finish()).records)
print(json.dumps([said, rows, kept, hidden, finished, after]))
"""


def test_a_full_disk_while_saving_loses_no_row_of_before(tmp_path):
    disk = small_disk(tmp_path / "disk", 1)
    command = [*disk, sys.executable, "-c", SAVING, str(tmp_path / "disk")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    said, rows, kept, hidden, finished, after = json.loads(answer.stdout)
    assert said == "[Errno 28] No space left on device"
    assert rows > 0 and kept == rows + 1 and not hidden
    assert finished == 1 and after == 1


@pytest.mark.parametrize(
    ("model", "megabytes"),
    [("random:tiny-llama", 2.94), pytest.param("auto", 1, marks=pytest.mark.slow)],
)
def test_a_full_disk_while_a_model_is_made_is_one_sentence(tmp_path, model, megabytes):
    """There is room for the weights, and none for the tokenizer beside them; and for neither."""
    disk = small_disk(tmp_path / "disk", megabytes)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "disk"), "COLUMNS": "999"}
    command = [*disk, sys.executable, "-m", "helpers.series.run", "--only", "01"]
    command += ["--profile", "smoke", "-p", f"MODEL={model}", "-p", f"RESULTS_DIR={tmp_path}"]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    (said,) = answer.stdout.splitlines()[1:]  # the first line says what is being made
    assert "cannot be made in the cache" in said and "No space left on device" in said
    assert answer.returncode == 2 and "Traceback" not in answer.stderr


@pytest.mark.slow
@pytest.mark.parametrize("does", ["serves", "runs ranks"])
def test_a_host_name_that_does_not_resolve_changes_nothing(tmp_path, tiny_llama, does):
    renamed = ["unshare", "--map-root-user", "--uts", "sh", "-c"]
    renamed += ['hostname nohost.invalid && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*renamed, "true"]).returncode:
        pytest.skip("this user may not rename a machine of its own")
    (tmp_path / "again").touch()
    given = f"MODEL, RESULTS_DIR = {tiny_llama!r}, {str(tmp_path)!r}\n"
    name = "\nimport socket\nprint(socket.gethostname())\n"
    source = given + BEGIN + DOES[does] + name
    answer = subprocess.run(
        [*renamed, sys.executable, "-c", source],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(results.ROOT)},
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == "nohost.invalid"
    (path,) = tmp_path.rglob("01_killed.partial.json")
    assert [record.variant for record in results.read(path).records] == ["first", "second"]


def test_a_cache_that_may_not_be_written_is_one_sentence(tmp_path):
    disk = small_disk(tmp_path / "disk", 1)
    frozen = ["sh", "-c", 'mount -o remount,ro "$0" && exec "$@"', str(tmp_path / "disk")]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "disk"), "COLUMNS": "999"}
    command = [*disk, *frozen, sys.executable, "-m", "helpers.series.run", "--only", "01"]
    command += ["-p", "MODEL=random:tiny-llama", "-p", f"RESULTS_DIR={tmp_path}"]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    (said,) = answer.stdout.splitlines()
    assert "Read-only file system" in said and "disk" in said
    assert answer.returncode == 2 and "Traceback" not in answer.stderr


@pytest.mark.slow
@pytest.mark.notebook
def test_a_user_without_a_name_and_with_a_home_that_is_read_only_runs_a_lesson(tmp_path):
    """As in a container that was given a number: no entry among the users, no folder of its own."""
    nobody = ["unshare", "--map-user=12345", "--map-group=12345"]
    if shutil.which("unshare") is None or subprocess.run([*nobody, "true"]).returncode:
        pytest.skip("this user may not become another")
    environment = os.environ | {"HOME": "/proc", "XDG_CACHE_HOME": str(tmp_path)}
    command = [*nobody, sys.executable, "-m", "helpers.series.run", "--only", "01"]
    command += ["--profile", "smoke", "--out", str(tmp_path), "-p", f"RESULTS_DIR={tmp_path}"]
    command += ["-p", "MODEL=random:tiny-llama"]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (path,) = tmp_path.rglob("01_mixed_precision.json")
    assert {record.status for record in results.read(path).records} == {"ok"}
    (notebook,) = tmp_path.rglob("01_mixed_precision.ipynb")
    outputs = [out for cell in nbformat.read(notebook, 4).cells for out in cell.get("outputs", [])]
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 2
