"""What the hardware allows: bandwidth, compute and launch cost measured, ceilings computed.

`python -m helpers.limits` measures this machine and prints what it found.
"""

import argparse
import re
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from helpers import machine, memory, results, timing

PROBE_BYTES = 512_000_000
LAUNCHES = 1_000  # kernels in the chain whose cost is measured
# calls of CUDA that start a kernel or a whole graph, as the profiler names them
LAUNCH = re.compile(r"(cuda|cu)(LaunchKernel(Ex|ExC)?|LaunchCooperativeKernel|GraphLaunch)")
# what configurations call the number of experts that a router picks for a token
PICKED = ("num_experts_per_tok", "moe_topk", "top_k_experts")


class Bandwidth:
    """Read bandwidth of the device in bytes per second, measured again each time it is called.

    Three ways to read one float32 array of 512 MB: its sum, a dot product of its halves, a
    matrix-vector product (the shape of a decode step). The best of them is the machine's, since a
    limit must not be too low. Call it in between the runs of a measurement, so that both see the
    same machine (the idea of STREAM, McCalpin 1995). The array is made for each call and dropped
    after it: no memory pass counts it.
    """

    def __init__(self, device: str = "cpu", nbytes: int = PROBE_BYTES):
        self.device = device
        self.shape = nbytes // 4096 // 4, 4096
        self.samples: list[float] = []

    def __call__(self) -> float:
        matrix = torch.ones(self.shape, device=self.device)
        flat = matrix.view(-1)
        first, second = flat.chunk(2)
        ways = (
            flat.sum,
            lambda: torch.dot(first[: len(second)], second),
            lambda: matrix @ matrix[0],
        )
        seconds = min(best_seconds(way, self.device) for way in ways)
        self.samples.append(flat.nbytes / seconds)
        return self.samples[-1]

    @property
    def best(self) -> float:
        """The highest so far; measured now where there is none."""
        return max(self.samples) if self.samples else self()


def best_seconds(work: Callable[[], object], device: str, repeats: int = 3) -> float:
    """The shortest of `repeats` timings of `work` on the device, after one that warms up.

    CUDA: by events, so that neither the launch nor waiting for the device is counted.
    """
    work()
    timing.synchronize(device)
    if torch.device(device).type != "cuda":
        seconds: list[float] = []
        for _ in range(repeats):
            start: Any = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        return min(seconds)
    stream = torch.cuda.current_stream(device)  # without it an event is the current card's
    milliseconds: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        work()
        end.record(stream)
        timing.synchronize(device)
        milliseconds.append(start.elapsed_time(end))
    return min(milliseconds) / 1e3


def compute_flops(
    device: str = "cpu", dtype: torch.dtype = torch.float32, size: int | None = None
) -> float:
    """Floating-point operations per second of a linear layer in `dtype`, at its best.

    size : inputs, outputs and tokens; by default 8192 on CUDA, 2048 on the CPU (1024 in 16 bit,
        which may be emulated).
    """
    if size is None and torch.device(device).type == "cuda":
        size = 8192
    elif size is None:
        size = 2048 if dtype == torch.float32 else 1024
    x, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: F.linear(x, weight), device)


def launch_s(device: str) -> float | None:
    """Seconds that one kernel launch takes when nothing is to be done; None on a CPU.

    A decode step of a small model on a large GPU takes its launches' time, not its bytes'.
    """
    if torch.device(device).type != "cuda":
        return None
    tiny = torch.zeros(1, device=device)

    def chain() -> None:
        for _ in range(LAUNCHES):
            tiny.add_(1)

    return best_seconds(chain, device) / LAUNCHES


def launches(net: Any) -> int | None:
    """Kernel launches of one decode step without its sampling; None on a CPU. Count them once a
    model: they do not depend on the prompt.
    """
    if net.device.type != "cuda":
        return None
    token = torch.zeros(1, 1, dtype=torch.long, device=net.device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.no_grad():
        cache = net(token, use_cache=True).past_key_values
        net(token, past_key_values=cache)  # what is compiled or tuned at first use
        with torch.profiler.profile(activities=activities) as profile:
            net(token, past_key_values=cache)
            timing.synchronize(net.device)
    return launches_among({event.key: event.count for event in profile.key_averages()})


def launches_among(calls: dict[str, int]) -> int:
    """How many of these calls, by name, start a kernel or a CUDA graph, which counts once."""
    return sum(count for name, count in calls.items() if LAUNCH.fullmatch(name))


def read_shares(net: Any) -> dict[torch.nn.Parameter, float]:
    """The share of a parameter that one token must read, of those that it need not read whole.

    Tables that are looked up (an input embedding that is no head too, positions): 0. Routed
    experts, which transformers keeps in one tensor, experts first: those that the router picks,
    or one where the configuration does not name their number: a ceiling may be too high, never
    too low. Shared experts are read whole.
    """
    config = net.config.get_text_config()
    picked = next((getattr(config, name) for name in PICKED if getattr(config, name, None)), 1)
    head = getattr(net.get_output_embeddings(), "weight", None)
    shares: dict[torch.nn.Parameter, float] = {}
    for module in net.modules():
        kind = type(module).__name__
        for parameter in module.parameters(recurse=False):
            if isinstance(module, torch.nn.Embedding) and parameter is not head:
                shares[parameter] = 0
            elif kind.endswith("Experts") and not kind.endswith("SharedExperts"):
                shares[parameter] = picked / len(parameter)
    return shares


def decode_bytes(net: Any) -> int:
    """Bytes of weights that one decode step must read, whatever the batch: see `read_shares`.

    A batch whose sequences pick different experts reads more.
    """
    unread = sum((1 - share) * weight.nbytes for weight, share in read_shares(net).items())
    return memory.weight_bytes(net) - round(unread)


def prefill_parameters(net: Any) -> int:
    """Parameters that every prompt token goes through, as `prefill_limit` takes them.

    The head, which runs once a prompt, is left out; the rest as in `read_shares`. For a model that
    is not quantized: codes are packed.
    """
    shares = read_shares(net) | {net.get_output_embeddings().weight: 0}
    return round(  # type: ignore[no-any-return]
        sum(weight.numel() * shares.get(weight, 1) for weight in net.parameters())
    )


def decode_limit(step_bytes: float, bandwidth: float, batch_size: int = 1) -> float:
    """Best possible decode speed in tokens/s by bandwidth.

    step_bytes : what a step must read: `decode_bytes` once, and the KV cache of every sequence at
        the mean length of the generation.

    (The memory term of the roofline model, Williams et al. 2009, CACM 52:4; for decoding, Pope et
    al. 2023, arXiv:2211.05102.)
    """
    return batch_size * bandwidth / step_bytes


def prefill_limit(parameters: float, flops: float) -> float:
    """Best possible prefill speed in tokens/s: 2 operations per parameter and token (Kaplan et al.
    2020, §2.1).

    parameters : those that every prompt token goes through (`prefill_parameters`).
    """
    return flops / (2 * parameters)


def roofline(intensity: Any, bandwidth: float, flops: float) -> Any:
    """Attainable operations per second at an arithmetic intensity in operations per byte (scalar
    or array).
    """
    return torch.minimum(torch.as_tensor(intensity) * bandwidth, torch.tensor(flops)).numpy()


def measure(device: str) -> dict[str, Any]:
    """This device's readings, as `results.keep_limits` takes them (bytes/s, operations/s, s)."""
    probe = Bandwidth(device)
    samples = [probe() for _ in range(5)]
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    flops = {str(dtype).removeprefix("torch."): compute_flops(device, dtype) for dtype in dtypes}
    return {
        "bandwidth_samples": samples,
        "flops_per_s": flops,
        "launch_s": launch_s(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m helpers.limits", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    device = machine.pick_device(parser.parse_args().device)
    ceilings: Any = results.keep_limits(measure(device), device)
    print(machine.line())
    print(f"read bandwidth: {ceilings.bandwidth_bytes_per_s / 1e9:.1f} GB/s", end=" ")
    print(f"(spread of {ceilings.bandwidth_readings} readings {ceilings.bandwidth_spread:.0%})")
    for dtype, flops in ceilings.flops_per_s.items():
        print(f"{dtype} products: {flops / 1e9:.0f} GFLOP/s")
    if ceilings.launch_s is not None:
        print(f"one kernel launch: {ceilings.launch_s * 1e6:.1f} µs")


if __name__ == "__main__":
    main()
