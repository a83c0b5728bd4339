"""Lesson 07's launches, all under `processes.run`: torchrun for ranks of transformers, a script for
vLLM, which starts its own. What they loaded stays loaded, asleep, until the lesson asks.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from helpers import machine, memory, quality, results, timing
from helpers.series import processes

WORKERS = Path(__file__).parent.parent / "workers"
WHOLE = WORKERS / "ranks_07.py"  # a rank with the whole model
OFFLOAD = WORKERS / "offload_07.py"  # a rank with every second layer on disk
IDLE_S = 1.2  # after which vLLM's workers sleep: until 1 s after a step they spin on their cores
DEADLINE_S = 3600.0  # of a launch that its ranks' own limits and the lesson's end have not ended
RANKS = {
    "PYTHONPATH": str(results.ROOT),
    "GLOO_SOCKET_IFNAME": "lo",
    "MASTER_ADDR": "127.0.0.1",
    "PYTHONWARNINGS": "ignore",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bars too
    "HF_HUB_OFFLINE": "1",
}
ENGINES = {
    **RANKS,
    "VLLM_HOST_IP": "127.0.0.1",
    # FlashInfer's sampler is compiled at the start, with a CUDA toolkit; greedy needs none of it
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # the scheduler lives in the script itself, where each of its steps is stamped
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # to ask its workers how many bytes of weights they hold
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def place(device: str, ranks: int) -> str:
    """ "cuda" where there is a GPU for each of so many ranks, else "cpu", for the baseline too.

    Raises ValueError where GPUs were asked for by name and are not there.
    """
    chosen = machine.pick_device(device).split(":")[0]
    if chosen == "cpu":
        return "cpu"
    there = torch.cuda.device_count()
    if there >= ranks:
        return "cuda"
    if device != "auto":
        raise ValueError(f"DEVICE={device!r}: {ranks} GPUs are needed, {there} are here.")
    print(f"{ranks} ranks need as many GPUs, {there} are here: all ranks are CPU processes.")
    return "cpu"


def best_dtype(device: str) -> str:
    """The type that a device computes in natively: on a CPU float32."""
    if device == "cpu":
        return "float32"
    return "bfloat16" if machine.native_dtypes(device)["bfloat16"] else "float16"


def scripts_folder() -> Path:
    """Where the lesson's cells write their scripts, relative to the working folder, so that what
    `%%writefile` prints names no folder of this machine. Not tracked by git.
    """
    base = results.ROOT if results.in_checkout() else Path.cwd()
    folder = base / "runs" / "scripts-07"
    folder.mkdir(parents=True, exist_ok=True)
    return Path(os.path.relpath(folder))


def threads_of(ranks: int) -> int:
    """Threads of each rank: all together have as many as torch takes in one process here."""
    return max(1, torch.get_num_threads() // ranks)


def environment(base: dict[str, str], device: str, threads: int) -> dict[str, str]:
    """What a launch sees: its share of the threads, and no GPU where its ranks are CPU processes,
    since transformers and vLLM take one that they see.
    """
    variables = base | {"OMP_NUM_THREADS": str(threads)}
    if device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def torchrun(script: str | Path, arguments: list, ranks: int) -> list[str]:
    """The command that starts a script on so many ranks of this machine; printed as it is typed."""
    words = ["--standalone", "--local-addr", processes.HOST]  # this machine's name may not resolve
    words += ["--nproc-per-node", str(ranks), "--tee", "3"]
    words += [str(Path(script).resolve())]
    words += map(str, arguments)
    print("torchrun", *(Path(word).name for word in words))
    return [sys.executable, "-m", "torch.distributed.run", *words]


def show(command: list[str], device: str, threads: int, limit_s: float) -> None:
    """Run a command to its end and print its ranks' lines, or why it failed."""
    try:
        lines = processes.run(
            command,
            timeout_s=limit_s,
            env=environment(RANKS, device, threads),
            on_line=lambda line: None,
        )
    except processes.ServingError as error:
        print(reason(error))
        return
    for line in lines:
        if line.startswith("[rank"):
            print(line)


class Ranks:
    """The processes of one launch, asleep until they are asked.

    Parameters
    ----------
    commands : each is given the job's file as its last word.
    answering : how many processes answer: every rank of torchrun, the one script of vLLM.
    job : what a worker has to know.
    limit_s : seconds that loading, and each answer, may take.

    Attributes
    ----------
    ready : what each process said when it had loaded its part, in the order of the ranks.

    Making it, or asking, raises what ended the launch: MemoryError, NotImplementedError, or
    ServingError with the failing rank's last lines. Nothing is left running then.
    """

    def __init__(self, commands: list[list], answering: int, job: dict, env: dict, limit_s: float):
        self.limit_s = limit_s
        self.error: Exception | None = None
        self.lines = {}
        self.ready = []
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")
        path = Path(self.folder.name, "job.json")
        key = secrets.token_urlsafe(24)
        with socket.create_server((processes.HOST, 0)) as door:
            path.write_text(json.dumps(job | {"address": door.getsockname(), "key": key}))
            commands = [[*command, str(path)] for command in commands]
            self.launch = threading.Thread(target=self._run, args=(commands, env), daemon=True)
            self.launch.start()
            self._wait_for(door, answering, key)
        self.ready = [self.ready[n] for n in np.argsort([said["rank"] for said in self.ready])]

    def _run(self, commands: list[list], env: dict) -> None:
        try:
            processes.run(*commands, timeout_s=DEADLINE_S, env=env, on_line=lambda line: None)
        except processes.ServingError as error:
            self.error = cause(error)

    def _wait_for(self, door: socket.socket, answering: int, key: str) -> None:
        """Until every process has called and shown the key."""
        door.settimeout(0.5)
        deadline = time.monotonic() + self.limit_s
        while len(self.lines) < answering:
            if not self.launch.is_alive() or time.monotonic() > deadline:
                self.close()
                raise self.error or processes.ServingError(
                    f"the ranks were not ready within {self.limit_s:g} s"
                )
            with contextlib.suppress(TimeoutError):
                connection, _ = door.accept()
                connection.settimeout(self.limit_s)
                lines = connection.makefile("rw")
                connection.close()  # for good once `lines` is closed
                said = json.loads(lines.readline() or "{}")
                if secrets.compare_digest(said.pop("key", ""), key):
                    self.lines[said["rank"]] = lines
                    self.ready.append(said)

    def ask(self, **question) -> list[dict]:
        """The same question to every process; their answers in the order of the ranks."""
        lines = [self.lines[rank] for rank in sorted(self.lines)]
        try:
            for one in lines:
                print(json.dumps(question), file=one, flush=True)
            return [json.loads(one.readline()) for one in lines]
        except (OSError, ValueError) as error:  # a rank is gone, or silent for too long
            self.close()
            raise self.error or processes.ServingError("a rank did not answer") from error

    def generate(self) -> timing.Generation:
        """One generation by all ranks together, as the first one timed it."""
        return timing.Generation(**self.ask(do="run")[0])

    def close(self) -> None:
        """Let all end, and wait for it; again is harmless."""
        for lines in self.lines.values():
            with contextlib.suppress(OSError):
                lines.close()
        self.lines = {}
        self.launch.join(60)
        self.folder.cleanup()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_) -> None:
        self.close()


@dataclasses.dataclass
class Facts:
    """What the ranks of a row said of themselves.

    Attributes
    ----------
    ready : of each rank (of vLLM, of all ranks together): device, own_bytes, threads, and for ranks
        of transformers peak, wire_bytes, disk_bytes, messages, share. Bytes and messages are those
        of one generation.
    score : of the first rank: nll of each window, best token at each position. None for vLLM.
    """

    ready: list[dict]
    score: dict | None = None

    @property
    def above_bytes(self) -> list[int]:
        """Peak of each rank above its start; none for vLLM, which reserves."""
        peaks = [rank["peak"] for rank in self.ready if "peak" in rank]
        return [peak["peak_bytes"] - peak["resident_before_bytes"] for peak in peaks]

    def traffic(self, new_tokens: int) -> dict[str, float | None]:
        """Per new token: MB on loopback (None where NCCL carried it) and from disk, messages; and
        the share of the time in which one was under way, the mean of the ranks.
        """
        first = self.ready[0]
        on_loopback = None
        if first["device"] == "cpu":
            on_loopback = first["wire_bytes"] / new_tokens / 1e6
        return {
            "on loopback": on_loopback,
            "from disk": first["disk_bytes"] / new_tokens / 1e6,
            "messages": first["messages"] / new_tokens,
            "share of time": float(np.mean([rank["share"] for rank in self.ready])),
        }

    def fields(self, new_tokens: int) -> dict:
        """What a record tells of it: a rank's memory is the fullest one's, the group's the sum."""
        first = self.ready[0]
        held = max(rank["own_bytes"] for rank in self.ready)
        device = torch.device(first["device"]).type
        details = {"ranks_on": "cpu" if device == "cpu" else "gpu", "rank_weight_bytes": held}
        fields = {"device": device, "threads": first["threads"], "weight_bytes": held}
        if self.score is None:
            details["all_ranks_peak_bytes"] = first["group_bytes"]
            return fields | {"details": details}
        above = self.above_bytes
        fullest = self.ready[above.index(max(above))]["peak"]
        traffic = self.traffic(new_tokens)
        details |= {"rank_peak_bytes": max(above), "all_ranks_peak_bytes": sum(above)}
        details["disk_bytes_per_token"] = 1e6 * traffic["from disk"]
        if len(self.ready) > 1:
            details["messages_per_token"] = traffic["messages"]
            details["communication_share"] = traffic["share of time"]
        if len(self.ready) > 1 and device == "cpu":
            details["wire_bytes_per_token"] = 1e6 * traffic["on loopback"]
        return fields | {"peak": memory.Peak(**fullest), "details": details}


@dataclasses.dataclass
class Jobs:
    """What all launches of a lesson share, and what is up.

    Attributes
    ----------
    path : the model's folder. dtype : "float32", say. device : "cpu" or "cuda".
    prompt, windows : token ids to go on from, and to score.
    rank_bytes : memory that each rank may take; 0 for what there is.
    wait_s : seconds that a rank waits for another. limit_s : as in `Ranks`.
    vllm_python : the Python that has vLLM.
    facts : by row, of what has been up. ranks : how many each row has.
    """

    path: str
    dtype: str
    device: str
    prompt: list[int]
    windows: list[list[int]]
    new_tokens: int
    rank_bytes: float = 0
    wait_s: float = 60
    limit_s: float = 300
    vllm_python: str = sys.executable
    facts: dict[str, Facts] = dataclasses.field(default_factory=dict)
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    up: dict[str, Ranks] = dataclasses.field(default_factory=dict)

    def _job(self, **more) -> dict:
        names = ("path", "dtype", "device", "prompt", "windows", "new_tokens", "rank_bytes")
        return {name: getattr(self, name) for name in names} | {"wait_s": self.wait_s} | more

    def room(self, ranks: int = 1) -> float:
        """Bytes that each of so many ranks may take: ranks on a CPU share its memory."""
        free = memory.available_bytes(self.device)
        if self.device == "cpu":
            free /= ranks
        return min(free, self.rank_bytes) if self.rank_bytes else free

    def variant(
        self, name: str, script: str | Path, ranks: int, need: float = 0, nodes: tuple = ()
    ) -> timing.Variant:
        """A row whose ranks run a script; `nodes`: under an agent for each, with so many ranks.

        need : bytes of a rank, predicted: where there is less room its `load` raises MemoryError,
        before anything starts; NotImplementedError where there are fewer GPUs than ranks.
        """
        self.ranks[name] = ranks

        def start() -> Ranks:
            if self.device == "cuda" and ranks > torch.cuda.device_count():
                raise NotImplementedError(
                    f"{ranks} GPUs are needed, {torch.cuda.device_count()} are here"
                )
            room = self.room(ranks)
            if need > room:
                raise MemoryError(
                    f"a rank needs {need / 1e9:.2f} GB, {room / 1e9:.2f} GB are there"
                )
            group = self.agents(script, nodes) if nodes else self.torchrun(script, ranks)
            if name not in self.facts:
                self.facts[name] = Facts(group.ready, group.ask(do="score")[0])
            return group

        return timing.Variant(functools.partial(self._started, name, start), Ranks.generate)

    def vllm_variant(
        self, name: str, ranks: int, missing: str | None = None, **how
    ) -> timing.Variant:
        """A row of vLLM; `missing` says why it is not tried, `how` is as in `vllm`."""
        self.ranks[name] = ranks

        def start() -> Ranks:
            if missing:
                raise NotImplementedError(missing)
            group = self.vllm(ranks, **how)
            self.facts[name] = Facts(group.ready)
            return group

        def run(group: Ranks) -> timing.Generation:
            time.sleep(IDLE_S)  # the other rows' workers, too, are asleep then
            return group.generate()

        return timing.Variant(functools.partial(self._started, name, start), run)

    def _started(self, name: str, start: Callable[[], Ranks]) -> Ranks:
        if name not in self.up:
            self.up[name] = start()
        return self.up[name]

    def release(self) -> None:
        """End all that is up."""
        for group in self.up.values():
            group.close()
        self.up = {}

    def scores(self, seq_len: int) -> dict[str, quality.Quality]:
        """Of each row that has them, against the first."""
        rows = {name: facts.score for name, facts in self.facts.items() if facts.score}
        first = next(iter(rows), None)
        return {
            name: scored(score, None if name == first else rows[first], seq_len)
            for name, score in rows.items()
        }

    def torchrun(self, script: str | Path, ranks: int, **more) -> Ranks:
        """The ranks of a script, each with its part of the model."""
        threads = threads_of(ranks)
        job = self._job() | {"threads": threads, **more}
        command = torchrun(script, [], ranks)
        return Ranks([command], ranks, job, environment(RANKS, self.device, threads), self.limit_s)

    def agents(self, script: str | Path, nodes: tuple[int, ...]) -> Ranks:
        """The ranks of a script under several agents that meet at one address, as on several
        machines; each agent sees GPUs of its own, since each numbers its ranks from 0.
        """
        threads = threads_of(sum(nodes))
        meeting = f"{processes.HOST}:{processes.free_port()}"
        words = ["--nnodes", str(len(nodes)), "--rdzv-backend", "c10d"]
        words += ["--rdzv-endpoint", meeting, "--local-addr", processes.HOST]
        commands = []
        first = 0
        for count in nodes:
            cards = ""
            if self.device == "cuda":
                cards = ",".join(map(str, range(first, first + count)))
            own = [*words, "--nproc-per-node", str(count), "--tee", "3"]
            own += [str(Path(script).resolve())]
            print("torchrun", *(Path(word).name for word in own))
            agent = [sys.executable, "-m", "torch.distributed.run", *own]
            commands.append(["env", f"CUDA_VISIBLE_DEVICES={cards}", *agent])
            first += count
        env = environment(RANKS, self.device, threads)
        return Ranks(commands, sum(nodes), self._job(threads=threads), env, self.limit_s)

    @contextlib.contextmanager
    def replicas(self, count: int):
        """Ray Serve LLM with so many copies of the model, up: a `processes.Server`. Raises as
        `Ranks` does, of its client too.
        """
        with tempfile.TemporaryDirectory(prefix="replicas-") as folder:
            # of Ray's CPUs a replica takes one for itself and one for its engine, the ingress one
            job = self._job(replicas=count, cores=2 * count + 1)
            path = Path(folder, "job.json")
            path.write_text(json.dumps(job))
            env = environment(ENGINES, self.device, threads_of(count)) | {
                "PYTHONPATH": helpers_alone(),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
                # few cores start all of it at once: Ray's own 5 s may not be enough
                "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": f"{self.limit_s:g}",
                "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "helpers.workers.ray_07.middlewares",
            }
            command = [self.vllm_python, WORKERS / "ray_07.py", path, "{port}"]
            try:
                with processes.server(
                    command, env=env, ready="/v1/models", ready_s=self.limit_s
                ) as server:
                    yield server
            except processes.ServingError as error:
                raise cause(error) from error

    def fault(self, how: str, wait_s: float) -> None:
        """Two CPU ranks without a model, of which one "dies" or "hangs". Raises ServingError."""
        job = self._job() | {"device": "cpu", "fault": how, "wait_s": wait_s}
        command = torchrun(WORKERS / "ranks_07.py", [], 2)
        Ranks([command], 2, job | {"threads": 1}, environment(RANKS, "cpu", 1), self.limit_s)

    def vllm(self, ranks: int, executor: str = "mp", stages: int = 1) -> Ranks:
        """vLLM over so many ranks, each bound to as many cores as it gets threads; one process
        answers for all. stages : of a pipeline, each of ranks ÷ stages.
        """
        threads = threads_of(ranks)
        cores = itertools.cycle(sorted(os.sched_getaffinity(0)))
        shares = [itertools.islice(cores, threads) for _ in range(ranks)]
        job = self._job() | {"ranks": ranks, "executor": executor, "stages": stages}
        env = environment(ENGINES, self.device, threads) | {
            "PYTHONPATH": helpers_alone(),
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, share)) for share in shares),
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        command = [self.vllm_python, str(WORKERS / "vllm_07.py")]
        return Ranks([command], 1, job, env, self.limit_s)


def helpers_alone() -> str:
    """A folder with this package and nothing else, for another environment's PYTHONPATH: where the
    package is installed, the folder that it lies in holds this environment's torch too.
    """
    folder = Path(_alone.name)
    if not (folder / "helpers").exists():
        (folder / "helpers").symlink_to(WORKERS.parent)
    return str(folder)


_alone = tempfile.TemporaryDirectory(prefix="helpers-alone-")


def cause(error: processes.ServingError) -> Exception:
    """What ended a launch, as the exception that one process would have raised."""
    text, said = str(error), reason(error)
    if re.search(r"MemoryError|(can't|[Cc]annot) allocate memory|out of memory", text):
        return MemoryError(f"out of memory: {said}")
    missing = re.search(r"NotImplementedError|ImportError|ModuleNotFoundError", text)
    if missing or "not support" in said:  # vLLM's refusals are ValueErrors
        return NotImplementedError(said)
    return processes.ServingError(said)


def reason(error: Exception) -> str:
    """The first error that a failed launch named, or that a rank was silent, and which rank,
    without paths; else how the launch ended. A message of one word (a key that is missing, say)
    comes with its error's name.
    """
    outcome, _, lines = str(error).partition("\n")
    sentence = outcome.removesuffix("; its last lines:")
    rank = re.match(r"rank \d+", outcome)
    named = re.search(r"\w*(?:Error|Exception): ([^\n]+)", lines)
    silent = re.search("this rank did not answer its peers", lines)  # see `ranks_07.show_where`
    said = silent[0] if silent else None
    if named:
        said = named[1] if " " in named[1] else named[0]
    if said:
        sentence = f"{rank[0]}: {said}" if rank else said
    return re.sub(r"/\S+/", "", sentence).strip().rstrip(".")


def scored(mine: dict, whole: dict | None, seq_len: int) -> quality.Quality:
    """What a rank scored; against one process, unless it is that: paired by window, Student's t as
    in `quality`.
    """
    scores = quality.Quality(np.array(mine["nll"]), len(mine["best"]), seq_len)
    if whole is not None:
        differences = np.subtract(mine["nll"], whole["nll"])
        scores.nll_delta = float(differences.mean())
        scores.nll_delta_ci95 = quality.interval(differences)
        scores.agreement = float(np.mean(np.equal(mine["best"], whole["best"])))
    return scores
