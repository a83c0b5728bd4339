"""A rank of lesson 07: load its part of the model, measure it, answer until the lesson ends.

torchrun starts a script of the lesson, once a rank, and the script hands its `load` to `main`. Run
as a script, this file loads the whole model: `torchrun --nproc-per-node 1 ranks_07.py JOB.json`.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from helpers import memory, models, timing
from helpers.workers import asleep_07

# how the profiler calls a collective: gloo's ranges on the CPU, NCCL's kernels on the device (its
# ranges on the CPU are only the enqueueing)
COLLECTIVES = ("gloo:", "ncclDevKernel")


def own_bytes(model) -> int:
    """Bytes of weights in this rank's own memory, tied ones once; those on disk are on the meta
    device.
    """
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum({p.data_ptr(): p.nbytes for p in parts if p.device.type != "meta"}.values())


@contextlib.contextmanager
def limited(nbytes: float, path: str, device: str):
    """Within it this rank takes no more than a device of `nbytes` has, beyond what it holds now; 0:
    what there is.

    On a CPU the limit is on address space, and twice the size of the checkpoint's files comes on
    top, since libraries map them more than once. It ends with the block: in timed runs the
    allocator keeps what was freed, and a profiler what it saw.
    """
    if nbytes and device.startswith("cuda"):
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), device)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    if nbytes and device == "cpu":
        files = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
        limit = memory.status_bytes("VmData") + 2 * files + round(nbytes)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def communication(call: Callable[[], timing.Generation]) -> dict:
    """Collectives of a generation on this rank: how many, and the share of the time under way."""
    with torch.profiler.profile() as profile:
        latency = call().latency_s
    spans = []
    for event in profile.events():
        if event.name.startswith(COLLECTIVES):
            spans.append((event.time_range.start, event.time_range.end))
    busy_us, reached = 0.0, 0.0
    for start, end in sorted(spans):
        busy_us += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return {"messages": len(spans), "share": min(1.0, busy_us / 1e6 / latency)}


def link(strategy: str, device: str, large: int = 4_000_000) -> dict:
    """The strategy's own collective: seconds of a message, and bytes per second that a rank sends
    in a large one.
    """
    ranks = dist.get_world_size()

    def reduce(x):
        dist.all_reduce(x)

    def gather(x):  # into fresh memory, and out of it again, as FSDP does
        whole = x.new_empty(ranks * len(x))
        dist.all_gather_into_tensor(whole, x)
        whole.clone()

    def seconds(collective, numbers: int, times: int) -> float:
        x = torch.ones(numbers, device=device)
        taken = []
        for _ in range(times):
            timing.synchronize(device)
            start = time.perf_counter()
            collective(x)
            timing.synchronize(device)
            taken.append(time.perf_counter() - start)
        return sorted(taken)[len(taken) // 2]

    collective, numbers = gather, large // ranks
    sent = 4 * numbers * (ranks - 1)
    if strategy == "tp":
        collective, numbers = reduce, large
        sent = 4 * numbers * (ranks - 1) * 2 / ranks
    small = seconds(collective, 512, 41)
    whole = seconds(collective, numbers, 7)
    return {"message_s": small, "link_bytes_per_s": sent / max(whole - small, 1e-9)}


def loopback_bytes() -> int:
    """Bytes that the loopback device has carried so far: counted by the system, not by a rule."""
    return psutil.net_io_counters(pernic=True)["lo"].bytes_sent


def disk_bytes() -> int:
    """Bytes that this process made the system fetch from storage; pages in its cache cost none."""
    rows = Path("/proc/self/io").read_text().splitlines()
    return int(dict(row.split(": ") for row in rows)["read_bytes"])


@torch.no_grad()
def score(model, windows: list[list[int]], device: str) -> dict:
    """Negative log-likelihood and best token at every position of a text."""
    scores = {"nll": [], "best": []}
    for window in torch.tensor(windows, device=device):
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
        scores["nll"].append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
        scores["best"] += logits.argmax(-1).tolist()
    return scores


def serve(job: dict, rank: int, device: str, load: Callable) -> None:
    """Load this rank's part and measure its memory and traffic, a pass for each; then answer."""
    prompt = torch.tensor([job["prompt"]])
    loaded = []  # the model stays: every rank loads its part once

    def load_once():
        loaded.append(load(job["path"], getattr(torch, job["dtype"]), device))
        return loaded[0]

    def call(model) -> timing.Generation:
        return timing.generate(model, prompt, job["new_tokens"])

    with limited(job["rank_bytes"], job["path"], device):
        peak = memory.peak_of(timing.Variant(load_once, call), device)
    model = loaded[0]
    print(f"{own_bytes(model) / 1e6:.0f} MB of weights here", flush=True)
    before = loopback_bytes(), disk_bytes()
    traffic = communication(lambda: call(model))
    after = loopback_bytes(), disk_bytes()
    ready = {
        "device": torch.device(device).type,
        "own_bytes": own_bytes(model),
        "threads": torch.get_num_threads(),
        "peak": dataclasses.asdict(peak),
        "wire_bytes": after[0] - before[0],
        "disk_bytes": after[1] - before[1],
        **traffic,
    }
    answers = {
        "run": lambda: dataclasses.asdict(call(model)),
        "score": lambda: score(model, job["windows"], device),
        "link": lambda strategy: link(strategy, device),
    }
    asleep_07.answer(job, rank, ready, answers)


def break_down(how: str, rank: int, ranks: int) -> None:
    """A fault to see: the last rank raises an error, or sleeps, while the others wait for it."""
    if rank == ranks - 1:
        if how == "dies":
            raise ValueError("this rank came upon something that it cannot do")
        time.sleep(3600)
    dist.all_reduce(torch.ones(1))


def show_where(number: int, frame) -> None:
    """Signal handler of a rank that does not answer: say where it is, and end."""
    traceback.print_stack(frame)
    print(
        "this rank did not answer its peers: the stack above is where it was",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def call_on_silent(store, rank: int, ranks: int, wait_s: float) -> None:
    """A collective timed out: the ranks that do not even wait are the ones that hang. Here, they
    are made to end, and waited for: who ends first is named.
    """
    store.set(f"waits-{rank}", "")
    time.sleep(wait_s / 4)  # the others' collective times out now too
    silent = [n for n in range(ranks) if not store.check([f"waits-{n}"])]
    print(f"no answer from rank {silent} within {wait_s:g} s", file=sys.stderr, flush=True)
    places = [json.loads(store.get(f"process-{n}")) for n in silent]
    here = [
        psutil.Process(pid)
        for host, pid in places
        if host == socket.gethostname() and psutil.pid_exists(pid)
    ]
    for process in here:
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGCONT)  # it may have been stopped
    psutil.wait_procs(here, timeout=20)


def together(store, rank: int, ranks: int, wait_s: float, work: Callable[[], object]) -> None:
    """Do this rank's work; when it fails for another rank's fault, let that rank end first, so that
    it is named.

    With gloo a collective that is not answered raises here. With NCCL it does not: its watchdog
    ends the process that waits, and the launcher names that one.
    """
    signal.signal(signal.SIGUSR1, show_where)
    store.set(f"process-{rank}", json.dumps([socket.gethostname(), os.getpid()]))
    try:
        work()
    except RuntimeError as error:
        if "imed out" in str(error):
            call_on_silent(store, rank, ranks, wait_s)
        time.sleep(3)
        raise


@record  # torchrun then names the rank that failed first, with its error
def main(load: Callable = models.load) -> None:
    """Meet the other ranks, then `serve`. `load(path, dtype, device)` gives this rank's model."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    device, backend = "cpu", "gloo"
    if job["device"] == "cuda":
        device, backend = f"cuda:{os.environ['LOCAL_RANK']}", "nccl"
        torch.cuda.set_device(device)
    # where ranks meet: torchrun tells each the address and its number
    store, rank, ranks = next(rendezvous("env://"))
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=job["wait_s"]),
    )

    def work() -> None:
        if job.get("fault"):
            break_down(job["fault"], rank, ranks)
        else:
            serve(job, rank, device, load)

    together(store, rank, ranks, job["wait_s"], work)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
