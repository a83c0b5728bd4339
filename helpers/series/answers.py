"""The short answer: which technique for least memory, for one fast stream, for most tokens/s under
a latency limit.

Measured here, and worked out by the planner for another model on another GPU: its speeds are those
that published ones make likely, its losses published ones where there are any; nothing is typed.
"""

import math
from typing import NamedTuple

import pandas as pd

from helpers.results import Record, shares_a_cpu
from helpers.series import planner

GB = 1e9
MEASURED = {
    "fp16": "fp16",
    "bf16": "bf16",
    "int8": "int8",
    "nf4": "nf4",
    "nf4-dq": "nf4-dq",
    "fp4": "fp4",
    "q8_0": "llamacpp-q8",
    "q4_1": "llamacpp-q4",
}  # the planner's techniques: the record that tells their loss


def loss(record: Record) -> float | None:
    """Share of perplexity lost against the baseline it was scored against; 0 for a baseline."""
    if record.nll_delta is not None:
        return math.expm1(record.nll_delta)
    return 0.0 if record.baseline is None and record.perplexity else None


def answers(
    records: list[Record],
    model: str,
    gpu: str,
    max_loss: float,
    max_token_s: float,
    length: int = 2048,
) -> pd.DataFrame:
    """The short answer to three questions: here (measured), and for a model on a GPU (what the
    planner expects).

    max_loss : share of perplexity that may be lost. max_token_s : longest time a token may take.
        Of the planner's techniques the losses are those published for an 8B model, where there are
        any, else those measured here: a larger model usually loses less. Raises ValueError for an
        unknown model or GPU.
    """
    asked = (
        f"least memory, at most {max_loss:.0%} of perplexity lost",
        "fastest single stream, with the same loss",
        f"most tokens/s, at most {max_token_s * 1e3:.0f} ms a token",
    )
    own = [r for r in records if r.status == "ok" and not shares_a_cpu(r)]
    good = [
        r for r in own if r.sweep is None and (lost := loss(r)) is not None and lost <= max_loss
    ]
    here = [_least(good), _fastest(good), _most(own, max_token_s)]
    there = _planned(own, model, gpu, max_loss, max_token_s, length)
    return pd.DataFrame({"measured here": here, f"{model} on {gpu}, expected": there}, index=asked)


def _said(record: Record, amount: str) -> str:
    return f"{record.variant} ({record.engine}): {amount}, {loss(record):+.1%} perplexity"


def _least(good: list[Record]) -> str:
    need = {
        r.id: (r.peak_bytes - r.resident_before_bytes, r)
        for r in good
        if r.peak_bytes and r.world_size == 1
    }
    if not need:
        return "not measured"
    size, best = min(need.values(), key=lambda found: found[0])
    return _said(best, f"{size / GB:.2f} GB above start")


def _fastest(good: list[Record]) -> str:
    single = [r for r in good if r.tokens_per_s and r.batch_size == 1]
    best = max(single, key=lambda r: r.tokens_per_s, default=None)
    return _said(best, f"{best.tokens_per_s:.0f} tokens/s") if best else "not measured"


def _most(own: list[Record], max_token_s: float) -> str:
    batches = [
        (r.tokens_per_s, r.batch_size / r.tokens_per_s, r)
        for r in own
        if r.sweep == "batch_size" and r.technique == "continuous_batching" and r.tokens_per_s
    ]
    batches += [
        (r.tokens_per_s, r.details["tpot_p95_s"], r)
        for r in own
        if r.sweep == "request_rate"
        and r.tokens_per_s
        and r.details.get("tpot_p95_s")
        and not r.details.get("failed_requests")
    ]
    fitting = [found for found in batches if found[1] <= max_token_s]
    if not fitting:
        return "nothing measured is as fast" if batches else "not measured"
    speed, each, best = max(fitting, key=lambda found: found[0])
    return f"{best.variant} ({best.engine}): {speed:.0f} tokens/s at {each * 1e3:.0f} ms a token"


def published_losses() -> dict[str, float]:
    """Share of perplexity that llama.cpp's formats lose on Llama-3-8B, by the planner's names."""
    rows = pd.read_csv(planner.DATA / "published.csv")
    rows = rows[(rows["model"] == "llama-3-8b") & (rows["metric"] == "perplexity")]
    perplexity = rows.set_index("variant")["value"]
    lost = perplexity / perplexity["f16"] - 1
    return {name: share for name, share in lost.items() if name in planner.TECHNIQUES}


class Candidate(NamedTuple):
    """A technique with a batch that fits. tokens_per_s : expected; None where none is published."""

    technique: str
    batch: int
    nbytes: int
    tokens_per_s: float | None

    def __str__(self) -> str:
        error = planner.prediction_error(self.technique)
        text = f"{self.technique}: {self.nbytes / GB:.1f} GB ± {error:.1%}"
        if self.batch > 1:
            text = text.replace(":", f" and batches of {self.batch}:", 1)
        if self.tokens_per_s is not None:
            text += f", {self.tokens_per_s:,.0f} tokens/s"
        return text


def _planned(
    own: list[Record], model: str, gpu: str, max_loss: float, max_token_s: float, length: int
) -> list[str]:
    """The planner's side: techniques whose loss is known, batches in powers of two, on one GPU."""
    by_id = {record.id: record for record in own}
    measured = {name: loss(by_id[row]) for name, row in MEASURED.items() if row in by_id}
    # only the scales are stored otherwise; where bitsandbytes undoes it, it has no row of its own
    measured.setdefault("nf4-dq", measured.get("nf4"))
    lost = {"fp32": 0.0} | measured | published_losses()
    kept = [name for name, share in lost.items() if share is not None and share <= max_loss]
    device, shape = planner.gpu(gpu), planner.describe(model)
    candidates = []
    for technique in kept:
        for batch in (2**n for n in range(11)):
            work = {"batch": batch, "length": length}
            if planner.fits(shape, technique, device, **work):
                need = planner.memory(shape, technique, **work)["total_bytes"]
                likely = planner.expected(shape, technique, device, **work)
                speed = None if likely is None else likely.tokens_per_s
                candidates.append(Candidate(technique, batch, need, speed))
    if not candidates:
        return [f"nothing fits one {device.name}: see the planner"] * 3
    with_speed = [one for one in candidates if one.tokens_per_s is not None]
    single = [one for one in with_speed if one.batch == 1]
    in_time = [one for one in with_speed if one.batch / one.tokens_per_s <= max_token_s]
    fastest = max(single, key=lambda one: one.tokens_per_s, default="no speed is published")
    most = max(in_time, key=lambda one: one.tokens_per_s, default="nothing is as fast")
    return [str(min(candidates, key=lambda one: one.nbytes)), str(fastest), str(most)]
