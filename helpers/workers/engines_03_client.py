"""The other end of `engines_03.py`, for lesson 03: write its file, start an engine's process, ask
it, read its peak, end it.
"""

import dataclasses
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import torch

from helpers import machine, memory, timing
from helpers.workers import gguf_03
from helpers.workers.engine_process import Process

SETTLE_S = 0.1  # time for the other engine's threads to fall asleep: they take 0.02 s at most here


class Worker(Process):
    """An engine in a process of its own, asleep unless asked; called, it generates and gives the
    stamps.

    arguments : those of `engines_03.py`, the engine's name first.

    Raises NotImplementedError (see `Process`).
    """

    def __init__(self, *arguments):
        super().__init__(Path(__file__).with_name("engines_03.py"), *arguments)

    def __call__(self, ids: torch.Tensor, new_tokens: int) -> timing.Generation:
        time.sleep(SETTLE_S)
        self.last = self.ask([ids[0].tolist(), new_tokens])
        came = len(self.last["stamps_s"])
        if came != new_tokens or self.last["prompt_tokens"] != ids.shape[1]:
            raise RuntimeError(
                f"{came} tokens came after {self.last['prompt_tokens']} prompt tokens"
            )
        time.sleep(SETTLE_S)
        return timing.Generation(
            **{k: self.last[k] for k in ("latency_s", "stamps_s", "prompt_tokens", "ids")}
        )

    def peak(self) -> memory.Peak:
        """The process's own peaks, while it loaded and up to its last generation."""
        return memory.Peak(
            self.ready["resident_before_bytes"],
            self.last["peak_bytes"],
            self.ready["load_peak_bytes"],
            "process VmHWM",
            self.last["details"],
        )


def place(device: str) -> str:
    """Where llama.cpp computes on this machine: on `device` if its wheel was built for a GPU, else
    "cpu". Asked in a process of its own, so that none of its threads is here.
    """
    if not memory.is_cuda(device):
        return "cpu"
    question = (
        "import xllamacpp; print(any('GPU' in str(d.get('type', d)) "
        "for d in xllamacpp.get_device_info()))"
    )
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    return device if answer.stdout.strip() == "True" else "cpu"


def serve(
    model, type_of: Callable, folder: str, name: str, prompt: torch.Tensor, new_tokens: int
) -> Worker:
    """llama.cpp with the model in the types that `type_of` chooses (see `gguf_03.pack`), in a file
    `name`.gguf that is written once; the worker's `file_bytes` are those of its tensors.

    prompt : (1, tokens) ids that will be continued by `new_tokens`.

    Raises MemoryError where memory or disk is too small, NotImplementedError for an architecture
    that is not described, or where the engine cannot start.
    """
    path = Path(folder) / f"{name}.gguf"
    gguf_03.refuse(model.config)
    if not path.exists():
        gguf_03.check_room(gguf_03.packed_bytes(model, type_of), path.parent)
        gguf_03.write(gguf_03.pack(model, type_of), model, path, prompt)
    memory.touch(path)
    length = prompt.shape[1] + new_tokens
    worker = Worker("llamacpp", path, torch.get_num_threads(), length)
    worker.file_bytes = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
    return worker


def climb(
    lesson,
    names: tuple[str, ...],
    load: Callable,
    type_of: Callable,
    prompt: torch.Tensor,
    new_tokens: int,
    *,
    beside: dict[str, timing.Variant],
    pairs: int,
    warmup: int,
) -> tuple[dict[str, timing.Series], dict[str, int]]:
    """Measure llama.cpp with one model in several files, and keep each as a row of the lesson.

    The first file is paired with the variant of `beside`, in turns with which all run, if both
    compute on the same device; the others with the first.

    Parameters
    ----------
    names : of the rows, the largest file first.
    load : gives the model that the files are written from.
    type_of : from a row's name to the function that chooses a tensor's type (see `gguf_03.pack`).

    Returns the series by name, and the bytes of the tensors of each file that was served.
    """
    engine_place = place(lesson.common["device"])
    version = machine.versions().get("xllamacpp")
    workers: dict[str, Worker] = {}

    def keep(measured: dict[str, timing.Series]) -> None:
        for name in names:
            rung = measured[name]
            if name != names[0] and measured[names[0]].status == "ok":
                rung = dataclasses.replace(rung, baseline=names[0])
            lesson.add(
                name,
                series=rung,
                baseline_series=measured.get(rung.baseline),
                device=engine_place,
                engine="llama.cpp",
                engine_version=version,
            )

    def run(worker: Worker) -> timing.Generation:
        return worker(prompt, new_tokens)

    with tempfile.TemporaryDirectory() as folder:

        def start(name: str) -> Worker:
            workers[name] = serve(load(), type_of(name), folder, name, prompt, new_tokens)
            return workers[name]

        variants = dict(beside) if engine_place == lesson.common["device"] else {}
        for name in names:
            variants[name] = timing.Variant(functools.partial(start, name), run)
        series = timing.measure(variants, next(iter(variants)), pairs, warmup, keep=keep)
        for name, worker in workers.items():
            worker.close()
            if series[name].runs:
                _complete(lesson, name, series, worker)
    return series, {name: worker.file_bytes for name, worker in workers.items()}


def over(series: dict[str, timing.Series], rival: str | None, names) -> dict[str, timing.Ratio]:
    """Speed of those rows that ran over a rival's of the same rounds, run by run, by name."""
    ran = {name for name, one in series.items() if one.runs and one.status == "ok"}
    if rival not in ran:
        return {}
    ours = [name for name in names if name in ran]
    return {name: timing.ratio(series[rival].latency_s, series[name].latency_s) for name in ours}


def _complete(lesson, name: str, series: dict[str, timing.Series], worker: Worker) -> None:
    """A row's memory, where it is this process's own to tell, and whether the text is the same."""
    if lesson.rows[name]["device"] == "cpu":
        lesson.add(name, peak=worker.peak())
    first = next(iter(series.values()))
    if first.runs:
        same = series[name].runs[0].ids == first.runs[0].ids
        lesson.add(name, details={"same_text_as_fp32": same})
