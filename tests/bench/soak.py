"""`make soak`: does anything pile up, and do the words hold?

free    Load the model, measure a few tokens, free it, thirty times in one process: growth < 3 %.
server  vLLM's server under 500 requests, eight at a time, by the lessons' client: none fails, and
        the memory of all its processes grows < 3 %.
twice   Lessons 01 to 03 run twice: verdicts that changed are counted, and each reversal is shown
        with its intervals and with what its rows say of the machine. None is reversed.

Growth: the last tenth of the readings over the third tenth, medians; the first two fill caches.
"""

import argparse
import os
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from helpers import memory, models, results, timing
from helpers.series import processes, run
from helpers.workers import client_06, vllm_06

NEW_TOKENS, AT_ONCE, LENGTH, GROWTH = 4, 8, 64, 0.03
SPEED = ("faster", "slower", "within noise")
QUALITY = ("measurably better", "measurably worse", "no measurable loss")
REVERSED = ({"faster", "slower"}, {"measurably better", "measurably worse"})


def flat(name: str, bytes_taken: list[int]) -> bool:
    """Print how far memory grew from the third tenth of the readings to the last one."""
    tenth = max(1, len(bytes_taken) // 10)
    early = statistics.median(bytes_taken[2 * tenth : 3 * tenth])
    late = statistics.median(bytes_taken[-tenth:])
    growth = late / early - 1
    met = "met" if growth < GROWTH else "missed"
    print(f"{name}: {early / 1e6:.0f} MB, then {late / 1e6:.0f} MB, {growth:+.1%}", end="; ")
    print(f"{len(bytes_taken)} readings, aim: below {GROWTH:+.0%}, {met}")
    return growth < GROWTH


def load_measure_free(options: argparse.Namespace) -> bool:
    prompt = models.prompt_ids(models.tokenizer(options.model), "Again and again")
    variant = timing.Variant(
        load=lambda: models.load(options.model, torch.float32),
        run=lambda model: timing.generate(model, prompt, NEW_TOKENS),
    )
    taken = []
    for _ in range(options.rounds):
        (series,) = timing.measure({"fp32": variant}, "fp32", 1, 0).values()
        if series.status != "ok":
            raise RuntimeError(series.reason)
        memory.free()
        taken.append(memory.resident_bytes())
    return flat("this process after freeing", taken)


def serve(options: argparse.Namespace) -> bool:
    settings = {"max_model_len": LENGTH, "max_num_seqs": AT_ONCE, "dtype": "float32"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", "{port}"]
    command += ["--host", processes.HOST, "--model", models.resolve(options.model)]
    command += ["--served-model-name", "base", *vllm_06.as_options(settings)]
    command += ["--enforce-eager", "--no-enable-prefix-caching"]
    env = vllm_06.server_environment() | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with processes.server(command, env=env) as server:

        def answered(number: int) -> bool:
            body = {"model": "base", "prompt": f"Question {number}:", "max_tokens": NEW_TOKENS}
            try:
                pieces = client_06.stream(server.url, server.headers, body | client_06.FIELDS)
                return any(text for _, text in pieces)
            except OSError as error:
                print(f"request {number}: {error}")
                return False

        taken, good = [], 0
        with ThreadPoolExecutor(AT_ONCE) as clients:
            for ok in tqdm(clients.map(answered, range(options.requests)), "requests"):
                good += ok
                taken.append(memory.tree_pss(server.pid))
    print(f"{options.requests} requests, {options.requests - good} failed")
    return flat("the server's processes", taken) and good == options.requests


def words(record: results.Record) -> set[str]:
    """What the project says of a row: its status, and its words on speed and on quality."""
    sentence = results.verdict(record)
    return {record.status} | {word for word in SPEED + QUALITY if word in sentence}


def shown(record: results.Record) -> str:
    busy = max(record.busy_share, default=0.0)
    said = "; ".join(record.warnings) or "no warning"
    return f"    {results.verdict(record)} Others took up to {busy:.0%} of the cores; {said}."


def compare(first: Path, second: Path) -> tuple[int, int, int]:
    """Rows, rows whose words changed, and rows that were reversed; these are printed."""
    earlier, later = (
        {record.id: record for record in results.read(path).records} for path in (first, second)
    )
    if earlier.keys() != later.keys():
        raise RuntimeError(f"{first.stem}: rows {earlier.keys() ^ later.keys()} of one run alone")
    changed, turned = 0, 0
    for name, record in later.items():
        moved = words(record) ^ words(earlier[name])
        changed += bool(moved)
        if any(pair <= moved for pair in REVERSED):
            turned += 1
            print(
                f"  {first.stem}, {name}: reversed", shown(earlier[name]), shown(record), sep="\n"
            )
    return len(later), changed, turned


def lessons_twice(options: argparse.Namespace) -> bool:
    os.environ["SEVEN_PROFILE"] = "smoke" if options.smoke else "full"
    reversed_rows = 0
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder, number) for number in ("first", "second")]
        for place in runs:
            for lesson in run.notebooks(options.lessons):
                given = run.smoke_parameters(lesson) if options.smoke else {}
                given |= {"RESULTS_DIR": str(place), "FIGURES_DIR": str(place / "figures")}
                run.execute(lesson, place / lesson.name, given, progress=True)
        for first in sorted(runs[0].glob("*/*/**/[0-9][0-9]_*.json")):
            second = runs[1] / first.relative_to(runs[0])
            rows, changed, turned = compare(first, second)
            reversed_rows += turned
            print(f"{first.stem}: of {rows} rows {changed} changed a word, {turned} reversed")
    return reversed_rows == 0


PARTS = {"free": load_measure_free, "server": serve, "twice": lessons_twice}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default="auto", help="of the first two parts")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--lessons", nargs="+", metavar="NN", default=["01", "02", "03"])
    parser.add_argument("--smoke", action="store_true", help="lessons with small numbers")
    options = parser.parse_args(arguments)
    return int(not all([PARTS[name](options) for name in options.parts]))


if __name__ == "__main__":
    sys.exit(main())
