"""`make bench`, second part: is the fast engine of lesson 03 as fast as it can be here? Intervals
from one run.

1. The best GGUF file in llama.cpp over transformers' float32 (decode).
2. The lesson's clock over llama.cpp's own count of the same generations: same file, same threads.
3. llama.cpp's float32 decode over the bandwidth limit measured between the rounds.
"""

import sys
import tempfile
from pathlib import Path

import torch

from helpers import limits, machine, memory, models, timing
from helpers.series import anatomy, run
from helpers.workers import engines_03_client, gguf_03

PROMPT, NEW_TOKENS, PAIRS = "I am so fast that I can", 50, 6


def decode_s(runs: list[timing.Generation]) -> list[float]:
    """Seconds a token of each run while decoding."""
    return [sum(run.inter_token_s) / len(run.inter_token_s) for run in runs]


def measure() -> list[tuple[str, timing.Ratio, float]]:
    """What, its ratio, and the least that it should be."""
    lesson = run.definitions("03_quantization")
    net, ids = models.load(), models.tokenizer()(PROMPT, return_tensors="pt").input_ids
    bandwidth, own = limits.Bandwidth(), {}

    def through(bits: str) -> timing.Variant:
        """A file's engine, which counts its own tokens/s too."""

        def run(worker) -> timing.Generation:
            generation = worker(ids, NEW_TOKENS)
            own.setdefault(bits, []).append(1 / worker.last["own_tokens_per_s"])
            return generation

        return timing.Variant(lambda: workers[bits], run)

    with tempfile.TemporaryDirectory() as folder:
        workers = {}
        try:
            for bits in ("f32", "q8", "q4"):
                path = Path(folder) / f"{bits}.gguf"
                codes = gguf_03.pack(net, lesson["type_of"](f"llamacpp-{bits}"))
                gguf_03.write(codes, net, path, ids)
                memory.touch(path)
                workers[bits] = engines_03_client.Worker(
                    "llamacpp", path, machine.cores(), ids.shape[1] + NEW_TOKENS
                )
            variants = {bits: through(bits) for bits in workers}
            variants["fp32"] = timing.Variant(
                lambda: net, lambda model: timing.generate(model, ids, NEW_TOKENS)
            )
            found = timing.measure(variants, "fp32", PAIRS, between=bandwidth)
        finally:
            for worker in workers.values():
                worker.close()
    runs = {name: decode_s(series.runs) for name, series in found.items()}
    best = max(("q8", "q4"), key=lambda bits: timing.ratio(runs["fp32"], runs[bits]).value)
    cache = anatomy.kv_cache_bytes(net.config, ids.shape[1] + NEW_TOKENS // 2, bytes_per_number=2)
    step_bytes = limits.decode_bytes(net) + cache
    rounds = len(runs["f32"])
    limit_s = [1 / limits.decode_limit(step_bytes, b) for b in bandwidth.samples[-rounds:]]
    return [
        (
            f"llama.cpp {best} over transformers float32",
            timing.ratio(runs["fp32"], runs[best]),
            4.0,
        ),
        (
            f"lesson's clock over llama.cpp's own, {best}",
            timing.ratio(own[best][-rounds:], runs[best]),
            0.97,
        ),
        ("llama.cpp f32 over the bandwidth limit", timing.ratio(limit_s, runs["f32"]), 0.6),
    ]


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    checks = measure()
    for what, found, least in checks:
        print(
            f"{what}: {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]; aim: at least {least:g}, "
            f"{'met' if found.low >= least else 'missed'}"
        )
    sys.exit(any(found.low < least for _, found, least in checks))
