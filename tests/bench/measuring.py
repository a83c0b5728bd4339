"""`make bench`: is the measuring itself right? Ratios within one run, each with its interval and
its aim.

1. The harness's latency over that of a bare `perf_counter` around the same generation (one clock
against another).
2. A generation with the harness's token stamps over one without, in pairs (what stamping costs).
3. The peak that `memory.peak_of` reports over what the kernel reports for the same process at its
end (`wait4`).
4. Bandwidth and matrix products as `limits` measures them over what `torch.utils.benchmark` finds
for the same work, turn and turn about.
"""

import json
import os
import sys
import time

import torch
import torch.utils.benchmark
from rich.console import Console
from rich.table import Table

from helpers import limits, models, timing

PROMPT, NEW_TOKENS, PAIRS = "I am so fast that I can", 50, 12
# what stamping costs is less than a machine's drift: many pairs, close together
SHORT_TOKENS, SHORT_PAIRS = 10, 100
READINGS = 12  # of bandwidth, and of a matrix product

CHILD = """
import json, os, torch
from helpers import memory, models, timing
ids = models.tokenizer()({prompt!r}, return_tensors="pt").input_ids
kept = []
def load():
    kept.append(models.load("auto", torch.float32))
    return kept[0]
peak = memory.peak_of(timing.Variant(load, lambda model: timing.generate(model, ids, {tokens})))
print(json.dumps(peak.peak_bytes), flush=True)
os._exit(0)
"""


def same_generations() -> timing.Ratio:
    """Bare over harness latency of the same calls: one clock inside the call, one around it."""
    ids = models.tokenizer()(PROMPT, return_tensors="pt").input_ids
    net = models.load()

    def call() -> timing.Generation:
        return timing.generate(net, ids, NEW_TOKENS)

    call()
    inside, around = [], []
    for _ in range(PAIRS):
        start = time.perf_counter()
        run = call()
        around.append(time.perf_counter() - start)
        inside.append(run.latency_s)
    return timing.ratio(inside, around)


def with_and_without_stamps() -> timing.Ratio:
    """Latency with the harness over a plain `generate` under a bare clock, in pairs, turn and turn
    about.
    """
    net = models.load()
    ids = models.tokenizer()(PROMPT, return_tensors="pt").input_ids

    def bare() -> timing.Generation:
        start = time.perf_counter()
        net.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=SHORT_TOKENS, do_sample=False
        )
        seconds = time.perf_counter() - start
        return timing.Generation(seconds, [seconds] * SHORT_TOKENS, ids.shape[1])

    def harness(model) -> timing.Generation:
        return timing.generate(model, ids, SHORT_TOKENS)

    variants = {
        "harness": timing.Variant(lambda: net, harness),
        "bare": timing.Variant(lambda: net, lambda model: bare()),
    }
    found = timing.measure(variants, "harness", SHORT_PAIRS)
    return timing.ratio(found["harness"].latency_s, found["bare"].latency_s)


def reported_and_kernel_peak() -> timing.Ratio:
    """The harness's peak over the kernel's `ru_maxrss` of the same process, three processes.

    A new process inherits the resident size of the one that spawned it as the floor of its
    `ru_maxrss`, so this runs before anything large is loaded here.
    """
    ours, kernels = [], []
    for _ in range(3):
        out, into = os.pipe()
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", CHILD.format(prompt=PROMPT, tokens=NEW_TOKENS)],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, into, 1)],
        )
        os.close(into)
        with os.fdopen(out) as said:
            ours.append(json.loads(said.read().strip().splitlines()[-1]))
        _, status, usage = os.wait4(pid, 0)
        if status:
            raise RuntimeError(f"the measured process ended with status {status}")
        kernels.append(usage.ru_maxrss * 1024)
    return timing.ratio(ours, kernels)


def fastest_s(statement: str, **names: object) -> float:
    """Seconds a call in the fastest of the blocks of torch.utils.benchmark, 0.1 s in all."""
    threads = torch.get_num_threads()  # a Timer takes one by default
    timer = torch.utils.benchmark.Timer(statement, globals=names, num_threads=threads)
    return min(timer.blocked_autorange(min_run_time=0.1).times)


def bandwidth_by_both() -> timing.Ratio:
    """Bytes per second by `limits.Bandwidth` over those of the fastest of its three ways to read,
    timed by torch.utils.benchmark.
    """
    ours, others = [], []
    for _ in range(READINGS):
        probe = limits.Bandwidth()
        ours.append(1 / probe())
        matrix = torch.ones(probe.shape)
        first, second = matrix.view(-1).chunk(2)
        ways = ("matrix.sum()", "torch.dot(first, second)", "matrix @ matrix[0]")
        names = {"matrix": matrix, "first": first, "second": second}
        others.append(min(fastest_s(way, **names) for way in ways) / matrix.nbytes)
    return timing.ratio(others, ours)


def products_by_both() -> timing.Ratio:
    """Operations per second of a float32 linear layer, `limits.compute_flops` over
    torch.utils.benchmark.
    """
    size = 2048
    x, weight = torch.randn(size, size), torch.randn(size, size)
    ours, others = [], []
    for _ in range(READINGS):
        ours.append(2 * size**3 / limits.compute_flops(size=size))
        others.append(fastest_s("torch.nn.functional.linear(x, weight)", x=x, weight=weight))
    return timing.ratio(others, ours)


def main() -> int:
    checks = [
        # first: see its docstring
        ("reported peak ÷ kernel's peak", reported_and_kernel_peak, 0.03),
        ("harness clock ÷ bare clock, same generations", same_generations, 0.02),
        ("with stamps ÷ without, in pairs", with_and_without_stamps, 0.02),
        # the best of three readings against the best of many: a little below one
        ("bandwidth ÷ torch.utils.benchmark's", bandwidth_by_both, 0.1),
        ("products ÷ torch.utils.benchmark's", products_by_both, 0.05),
    ]
    table, missed = Table("what", "ratio [95 %]", "aim", "met"), 0
    for name, check, aim in checks:
        found = check()
        met = found.low >= 1 - aim and found.high <= 1 + aim
        missed += not met
        table.add_row(
            name,
            f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]",
            f"1 ± {aim}",
            "yes" if met else "no",
        )
    Console().print(table)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
