"""A rank of lesson 07: load its part of the model, measure it, leave what it found in a file.

torchrun starts it, once a rank: `torchrun --nproc-per-node 3 ranks_07.py JOB.json`.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from helpers import memory, models, timing


def shard(model, mesh):
    """FSDP2: a slice of each layer on every rank; gathered when the layer runs, dropped after."""
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "generate")
    return model


def half_on_disk(model: str, device: str) -> dict:
    """A device map: every second layer stays in its file until it runs."""
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    layers, stack = next(
        (n, m) for n, m in net.named_modules() if isinstance(m, torch.nn.ModuleList)
    )
    others = [
        n
        for n, m in net.named_modules()
        if n and not list(m.children()) and not n.startswith(layers)
    ]
    return dict.fromkeys(others, device) | {
        f"{layers}.{i}": "disk" if i % 2 else device for i in range(len(stack))
    }


def load_part(job: dict, device: str):
    """This rank's part of the model."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if job["strategy"] == "tp":
        return models.load(
            job["model"], device_map=None, distributed_config=DistributedConfig(tp_size=ranks)
        )
    if job["strategy"] == "devices":
        return models.load(job["model"], device_map="balanced")
    if job["strategy"] == "offload":
        return models.load(
            job["model"],
            device_map=half_on_disk(job["model"], device),
            offload_folder=job["folder"],
        )
    if job["strategy"] == "fsdp":
        return shard(models.load(job["model"]), init_device_mesh(job["place"], (ranks,)))
    return models.load(job["model"], device=device)


def own_bytes(model) -> int:
    """Bytes of weights in this rank's own memory, tied ones once; those on disk are on the meta
    device.
    """
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum({p.data_ptr(): p.nbytes for p in parts if p.device.type != "meta"}.values())


class Traffic(TorchDispatchMode):
    """Bytes that this rank sends in collectives, by the ring's count, and the number of
    collectives.
    """

    def __init__(self, ranks: int):
        super().__init__()
        self.ranks, self.sent, self.messages = ranks, 0.0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if "c10d" in function.namespace and ("reduce" in name or "gather" in name):
            tensors = []
            for argument in args:
                tensors += argument if isinstance(argument, list) else [argument]
            tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
            # of a gather, this rank's part: outputs come before inputs
            message = tensors[-1].nbytes
            share = 1 if "gather" in name else 2 / self.ranks
            self.sent += message * (self.ranks - 1) * share
            self.messages += 1
        return function(*args, **(kwargs or {}))


def communication_share(call) -> float:
    """Part of a generation's time in which a collective was under way on this rank."""
    with torch.profiler.profile() as profile:
        latency = call().latency_s
    spans = sorted(
        (e.time_range.start, e.time_range.end)
        for e in profile.events()
        if e.name.startswith(("gloo:", "nccl:"))
    )
    busy, reached = 0.0, 0.0
    for start, end in spans:
        busy, reached = busy + max(0.0, end - max(start, reached)), max(reached, end)
    return busy / 1e6 / latency


def link(ranks: int, device: str, large: int = 4_000_000) -> dict:
    """For each strategy's collective: seconds of a message, and bytes per second that a rank sends
    in a large one.
    """
    group = dist.new_group(range(ranks))

    def seconds(collective, numbers: int, times: int) -> float:
        x, taken = torch.ones(numbers, device=device), []
        for _ in range(times if dist.get_rank() < ranks else 0):
            timing.synchronize(device)
            start = time.perf_counter()
            collective(x)
            timing.synchronize(device)
            taken.append(time.perf_counter() - start)
        return sorted(taken or [0.0])[len(taken) // 2]

    def reduce(x):
        dist.all_reduce(x, group=group)

    def gather(x):  # into fresh memory, and out of it again, as FSDP does
        whole = x.new_empty(ranks * len(x))
        dist.all_gather_into_tensor(whole, x, group=group)
        whole.clone()

    found = {}
    for strategy, collective, part in (("tp", reduce, large), ("fsdp", gather, large // ranks)):
        small, whole = seconds(collective, 512, 41), seconds(collective, part, 7)
        sent = 4 * part * (ranks - 1) * (2 / ranks if strategy == "tp" else 1)
        found[strategy] = {"message_s": small, "link_bytes_per_s": sent / max(whole - small, 1e-9)}
    dist.barrier()
    return found


def loopback_bytes() -> int:
    """Bytes that the loopback device has carried so far."""
    return psutil.net_io_counters(pernic=True)["lo"].bytes_sent


@torch.no_grad()
def score(model, windows, device: str) -> dict:
    """Negative log-likelihood and best token at every position of a text."""
    found = {"nll": [], "best": []}
    for window in torch.tensor(windows, device=device):
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
        found["nll"].append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
        found["best"] += logits.argmax(-1).tolist()
    return found


def generate(job: dict, device: str, ranks: int) -> dict:
    """Load this rank's part; then memory (and bytes sent), speed, communication's time and quality,
    a pass for each.
    """
    prompt = torch.tensor([job["prompt"]])
    traffic = Traffic(ranks)
    loaded = []  # the model stays: every rank loads its part once
    wire_bytes = []

    def load():
        loaded.append(load_part(job, device))
        return loaded[0]

    def call(model) -> timing.Generation:
        return timing.generate(model, prompt, job["new_tokens"])

    def counted(model) -> None:
        before = loopback_bytes()
        with traffic if ranks > 1 else contextlib.nullcontext():
            call(model)
        wire_bytes.append(loopback_bytes() - before)

    peak = memory.peak_of(timing.Variant(load, counted), device)
    model = loaded[0]
    print(f"{own_bytes(model) / 1e6:.0f} MB of weights here", flush=True)
    runs = [dataclasses.asdict(call(model)) for _ in range(job["warmup"] + job["repeats"])]
    outcome = {
        "peak": dataclasses.asdict(peak),
        "runs": runs,
        "own_bytes": own_bytes(model),
        "threads": torch.get_num_threads(),
    }
    if ranks > 1:
        outcome |= {
            "sent": traffic.sent,
            "messages": traffic.messages,
            "wire_bytes": wire_bytes[0],
            "share": communication_share(lambda: call(model)),
        }
    print(f"{runs[-1]['latency_s']:.2f} s a generation", flush=True)
    return outcome | score(model, job["windows"], device)


def break_down(how: str, rank: int, ranks: int) -> dict:
    """A fault to see: the last rank raises an error, or sleeps, while the others wait for it."""
    if rank == ranks - 1:
        if how == "dies":
            raise ValueError("this rank came upon something that it cannot do")
        time.sleep(3600)
    dist.all_reduce(torch.ones(1))
    return {}


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
    known = [json.loads(store.get(f"process-{n}")) for n in silent]
    here = [
        psutil.Process(pid)
        for host, pid in known
        if host == socket.gethostname() and psutil.pid_exists(pid)
    ]
    for process in here:
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGCONT)  # it may have been stopped
    psutil.wait_procs(here, timeout=20)


def together(store, rank: int, ranks: int, wait_s: float, work) -> dict:
    """Do this rank's work; when it fails for another rank's fault, let that rank end first, so that
    it is named.
    """
    signal.signal(signal.SIGUSR1, show_where)
    store.set(f"process-{rank}", json.dumps([socket.gethostname(), os.getpid()]))
    try:
        return work()
    except RuntimeError as error:
        if "imed out" in str(error):
            call_on_silent(store, rank, ranks, wait_s)
        time.sleep(3)
        raise


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    device = f"cuda:{os.environ['LOCAL_RANK']}" if job["place"] == "cuda" else "cpu"
    if job["place"] == "cuda":
        torch.cuda.set_device(device)
    store, rank, ranks = next(
        rendezvous("env://")
    )  # where ranks meet: torchrun tells each the address and its number
    dist.init_process_group(
        "nccl" if job["place"] == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=job["wait_s"]),
    )

    def work() -> dict:
        if job["strategy"] in ("dies", "hangs"):
            return break_down(job["strategy"], rank, ranks)
        if job["strategy"] == "link":
            return {str(n): link(n, device) for n in job["sizes"]}
        return generate(job, device, ranks)

    found = together(store, rank, ranks, job["wait_s"], work)
    Path(job["folder"], f"{job['name']}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
