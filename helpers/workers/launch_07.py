"""Lesson 07's launches, all under `processes.run`: a job in a file, a command that is given it,
what each rank found.
"""

import ast
import dataclasses
import itertools
import json
import os
import re
import secrets
import sys
from pathlib import Path

import numpy as np
import torch

from helpers import machine, quality, results, timing
from helpers.series import processes

WORKERS = Path(__file__).parent
RANKS = {
    "PYTHONPATH": str(results.ROOT),
    "GLOO_SOCKET_IFNAME": "lo",
    "MASTER_ADDR": "127.0.0.1",
    "PYTHONWARNINGS": "ignore",
    "HF_HUB_OFFLINE": "1",
}
ENGINES = {
    **RANKS,
    "VLLM_HOST_IP": "127.0.0.1",
    # FlashInfer's sampler is compiled at the start, with a CUDA toolkit; greedy needs none of it
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # to ask its workers how many bytes of weights they hold
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def threads_of(ranks: int) -> int:
    """Threads of each rank: all together have as many as torch takes in one process here."""
    return max(1, torch.get_num_threads() // ranks)


@dataclasses.dataclass
class Jobs:
    """What all launches of a lesson share. `model` is a folder or a name, `place` "cpu" or "cuda",
    `vllm_python` the Python that has vLLM.
    """

    model: str
    text: str
    prompt: list[int]
    windows: list[list[int]]
    new_tokens: int
    warmup: int
    repeats: int
    place: str
    wait_s: float
    limit_s: float
    folder: str
    vllm_python: str = sys.executable

    def write(self, name: str, **more) -> Path:
        """The job's file: everything that a worker has to know."""
        path = Path(self.folder, f"{name}.json")
        path.write_text(json.dumps({**dataclasses.asdict(self), "name": name, **more}))
        return path

    def read(self, name: str, ranks: int = 1) -> list[dict]:
        """What each rank found."""
        return [
            json.loads(Path(self.folder, f"{name}-{rank}.json").read_text())
            for rank in range(ranks)
        ]

    def torchrun(
        self, name: str, strategy: str, nodes: tuple, shown: bool = True, **more
    ) -> list[dict]:
        """Run one job on so many ranks on each node; several nodes have an agent each, which meet
        at one address.
        """
        ranks, place = sum(nodes), f"127.0.0.1:{processes.free_port()}"
        threads = threads_of(ranks)
        meeting = (
            [
                "--nnodes",
                str(len(nodes)),
                "--rdzv-backend",
                "c10d",
                "--rdzv-endpoint",
                place,
                "--local-addr",
                "127.0.0.1",
            ]
            if len(nodes) > 1
            else ["--standalone"]
        )
        script = [
            WORKERS / "ranks_07.py",
            self.write(name, strategy=strategy, ranks=ranks, threads=threads, **more),
        ]
        commands = [
            [*meeting, "--nproc-per-node", str(count), "--tee", "3", *script] for count in nodes
        ]
        for command in commands if shown else []:
            print("torchrun", *(word.name if isinstance(word, Path) else word for word in command))
        processes.run(
            *([sys.executable, "-m", "torch.distributed.run", *command] for command in commands),
            timeout_s=self.limit_s,
            env={**RANKS, "OMP_NUM_THREADS": str(threads)},
            on_line=lambda line: (
                print(line) if shown and re.match(r"\[rank\d+\]: [\d.]+ ", line) else None
            ),
        )
        return self.read(name, ranks)

    def helpers_alone(self) -> str:
        """A folder with this package and nothing else, for another environment's PYTHONPATH: where
        the package is installed, the folder that it lies in holds this environment's torch too.
        """
        folder = Path(self.folder, "helpers-alone")
        if not folder.exists():
            folder.mkdir()
            (folder / "helpers").symlink_to(WORKERS.parent)
        return str(folder)

    def vllm(self, name: str, ranks: int, executor: str, **more) -> list[dict]:
        """Run vLLM on so many ranks, its scheduler in the script itself; each rank is bound to as
        many cores as it gets threads.
        """
        threads = threads_of(ranks)
        cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
        shares = [itertools.islice(cores, threads) for _ in range(ranks)]
        job = self.write(name, ranks=ranks, executor=executor, **more)
        processes.run(
            [self.vllm_python, WORKERS / "vllm_07.py", job],
            timeout_s=self.limit_s,
            env={
                **ENGINES,
                "PYTHONPATH": self.helpers_alone(),
                "OMP_NUM_THREADS": str(threads),
                "VLLM_CPU_OMP_THREADS_BIND": "|".join(
                    ",".join(map(str, share)) for share in shares
                ),
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
            },
            on_line=lambda line: print(f"{name} {line}") if line.startswith("[rank") else None,
        )
        return self.read(name)

    def ray_serve(self, name: str) -> dict:
        """Start a Ray cluster of this machine with a served model, ask it, end it."""
        job = self.write(name, port=processes.free_port(), cores=max(4, machine.cores()))
        processes.run(
            [self.vllm_python, WORKERS / "ray_07.py", job],
            timeout_s=self.limit_s,
            on_line=lambda line: None,
            env={
                **ENGINES,
                "PYTHONPATH": self.helpers_alone(),
                "OMP_NUM_THREADS": str(threads_of(1)),  # Ray would set one a replica
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
            },
        )
        return self.read(name)[0]


def reason(error: processes.ServingError) -> str:
    """The first error that a failed launch named, without paths; else how the launch ended."""
    cause = re.search(r"\w*(?:Error|Exception): ([^\n]+)", str(error))
    return (
        re.sub(r"/\S+/", "", cause[1] if cause else str(error).splitlines()[0]).strip().rstrip(".")
    )


def series(runs: list[dict], warmup: int) -> timing.Series:
    """A worker's runs as `timing.measure` would give them."""
    made = [timing.Generation(**run) for run in runs]
    return timing.Series(made[:warmup], made[warmup:])


def scored(mine: dict, whole: dict, seq_len: int) -> quality.Quality:
    """What a rank scored; against one process, unless it is that: paired by window, Student's t as
    in `quality`.
    """
    scores = quality.Quality(np.array(mine["nll"]), len(mine["best"]), seq_len)
    if mine is not whole:
        differences = np.subtract(mine["nll"], whole["nll"])
        scores.nll_delta = float(differences.mean())
        scores.nll_delta_ci95 = quality.interval(differences)
        scores.agreement = float(np.mean(np.equal(mine["best"], whole["best"])))
    return scores


def source(script: str, function: str) -> str:
    """A function of a worker script as it is written, without importing what the script imports."""
    text = (WORKERS / script).read_text()
    found = next(
        n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == function
    )
    return ast.get_source_segment(text, found) + "\n"
