"""Generation timed token by token; variants measured in pairs with their baseline; intervals of
their ratio.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
from transformers.generation.streamers import BaseStreamer

from helpers.progress import progress

SPREAD_LIMIT = 0.10  # interquartile range over median above which a series is called unstable


@dataclasses.dataclass(frozen=True)
class Generation:
    """One timed generation. Times in seconds since the call began.

    stamps_s : one per decoding step (new token of every sequence of the batch).
    ids : new token ids, one list a sequence (empty where an engine gives none).
    """

    latency_s: float
    stamps_s: list[float]
    prompt_tokens: int
    batch_size: int = 1
    ids: list[list[int]] = dataclasses.field(default_factory=list)

    @property
    def new_tokens(self) -> int:
        return len(self.stamps_s)

    @property
    def ttft_s(self) -> float:
        """Time to first token: prefill and the first choice."""
        return self.stamps_s[0]

    @property
    def inter_token_s(self) -> list[float]:
        return [b - a for a, b in pairwise(self.stamps_s)]

    @property
    def tokens_per_s(self) -> float:
        """New tokens of the whole batch over the whole latency, as the article counts."""
        return self.batch_size * self.new_tokens / self.latency_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """New tokens after the first over the time they took; None for a single token."""
        return (
            self.batch_size * (self.new_tokens - 1) / sum(self.inter_token_s)
            if self.new_tokens > 1
            else None
        )

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.batch_size * self.prompt_tokens / self.ttft_s


Call = Callable[[], Generation]


class _Stamps(BaseStreamer):
    """A stamp for every token; the first `put` is the prompt, before prefill, and is discarded."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.times = clock, None

    def put(self, value):
        self.times = [] if self.times is None else [*self.times, self.clock()]

    def end(self):
        pass


def synchronize(device: str | torch.device) -> None:
    """Wait until the device has done all it was given (a no-op on the CPU)."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def greedy(
    model,
    input_ids: torch.Tensor,
    new_tokens: int,
    context: Callable = contextlib.nullcontext,
    clock: Callable[[], float] = time.perf_counter,
    **options,
) -> Call:
    """A call that generates exactly `new_tokens` greedily with transformers and stamps each of
    them.

    Parameters
    ----------
    input_ids : (batch, prompt_tokens) on any device; all rows of one length.
    context : makes a context manager that is entered once around the whole generation (autocast,
        say).
    options : passed to `generate`.
    """
    ids = input_ids.to(model.device)

    def call() -> Generation:
        stamps = _Stamps(clock)
        synchronize(model.device)
        start = clock()
        with context():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                streamer=stamps,
                **options,
            )
        synchronize(model.device)
        latency = clock() - start
        new = out[:, ids.shape[1] :].tolist()
        if len(stamps.times) != new_tokens or len(new[0]) != new_tokens:
            raise RuntimeError(
                f"{len(new[0])} new tokens came, {new_tokens} were asked for: is EOS unset?"
            )
        return Generation(
            latency, [t - start for t in stamps.times], ids.shape[1], ids.shape[0], new
        )

    return call


@dataclasses.dataclass
class Series:
    """What one variant gave: full-length warm-ups apart from the runs that count, or why there are
    none.
    """

    warmup: list[Generation] = dataclasses.field(default_factory=list)
    runs: list[Generation] = dataclasses.field(default_factory=list)
    status: str = "ok"
    reason: str | None = None

    @property
    def latency_s(self) -> list[float]:
        return [run.latency_s for run in self.runs]

    def median(self, quantity: str) -> float | None:
        """Median over the runs of a quantity of `Generation` ("decode_tokens_per_s", say)."""
        values = [getattr(run, quantity) for run in self.runs]
        return None if not values or None in values else float(np.median(values))


def _guarded(series: Series, work: Callable):
    """Run `work`; what the machine cannot do becomes the series' status and reason, not a crash."""
    try:
        return work()
    except (torch.OutOfMemoryError, MemoryError) as error:
        series.status, series.reason = "oom", str(error).split(". ")[0]
    except NotImplementedError as error:
        series.status, series.reason = "unsupported", str(error).split("\n")[0]


def measure(
    factories: dict[str, Callable[[], Call]],
    baseline: str,
    pairs: int,
    warmup: int = 1,
    together: bool = True,
    release: Callable[[], None] = lambda: None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Series]:
    """Measure variants against their baseline so that a drifting machine does not decide the
    result.

    together : all variants are loaded and take turns, A B C, C B A, A B C ...: run i of a variant
        and run i of the baseline make a pair, and a linear drift cancels over two rounds.
        Otherwise, where they do not fit in memory side by side, each variant is bracketed by half
        of the baseline's runs before and half after.

    Parameters
    ----------
    factories : variant name to a function that loads it and returns its call; the baseline is one
        of them.
    pairs, warmup : runs that count, full-length runs before them.
    release : drops what the factories loaded (called between variants that are not together).
    between : called after every round (a bandwidth probe, say).

    Returns a Series a variant; status "oom" or "unsupported" with a reason where the machine cannot
    do it.
    """
    if pairs < 1 or warmup < 0:
        raise ValueError(
            f"REPEATS must be at least 1 and WARMUP at least 0, not {pairs} and {warmup}."
        )
    found = {name: Series() for name in factories}
    step = progress(len(factories) * (pairs + warmup) + warmup * (not together), "runs")
    if together:
        calls = {name: _guarded(found[name], make) for name, make in factories.items()}
        for name, series in found.items():
            for _ in range(warmup * (series.status == "ok")):
                _guarded(
                    series, lambda name=name, series=series: series.warmup.append(calls[name]())
                )
                step()
        for i in range(pairs):
            for name in list(found)[:: 1 if i % 2 == 0 else -1]:
                if found[name].status == "ok":
                    found[name].runs.append(calls[name]())
                    step()
            between()
        return found

    def some(name: str, runs: int) -> None:
        series = found[name]
        if series.status == "ok" and (call := _guarded(series, factories[name])):
            for target, times in ((series.warmup, warmup), (series.runs, runs)):
                for _ in range(times):
                    _guarded(series, lambda target=target: target.append(call()))
                    step()
        release()
        between()

    before = math.ceil(pairs / 2)
    some(baseline, before)
    for name in factories:
        if name != baseline:
            some(name, pairs)
    some(baseline, pairs - before)
    return found


class Ratio(NamedTuple):
    """A ratio with its 95 % interval; low and high are None for a single pair."""

    value: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" when the whole interval says so, else "within noise"."""
        if self.low is not None and self.low > 1:
            return "faster"
        if self.high is not None and self.high < 1:
            return "slower"
        return "within noise"


def ratio(
    baseline_s: Sequence[float], variant_s: Sequence[float], confidence: float = 0.95
) -> Ratio:
    """Speed-up of a variant over its baseline from paired times: the geometric mean of baseline ÷
    variant.

    Its interval is Student's t on the log ratios of the pairs, which are taken as independent;
    tokens within one run are not (Student 1908, Biometrika 6:1; on logs as in Fleming and Wallace
    1986, CACM 29:3).
    """
    if len(baseline_s) != len(variant_s) or not len(baseline_s):
        raise ValueError(
            f"pairs needed: {len(baseline_s)} baseline and {len(variant_s)} variant times"
        )
    logs = np.log(baseline_s) - np.log(variant_s)
    mean, n = float(np.mean(logs)), len(logs)
    if n == 1:
        return Ratio(math.exp(mean), None, None)
    half = float(
        np.std(logs, ddof=1) / math.sqrt(n) * scipy.stats.t.ppf((1 + confidence) / 2, n - 1)
    )
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def spread(values: Sequence[float]) -> float:
    """Interquartile range over median, a fraction."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return float((high - low) / middle)


def warnings(latency_s: Sequence[float], baseline_s: Sequence[float]) -> list[str]:
    """Sentences for a record when its runs, or its baseline's, moved by more than a tenth."""
    found = []
    if latency_s and spread(latency_s) > SPREAD_LIMIT:
        found.append(
            f"unstable: spread of the runs {spread(latency_s):.0%} (interquartile range over median)"
        )
    half = len(baseline_s) // 2
    if (
        half
        and (drift := abs(math.log(np.median(baseline_s[:half]) / np.median(baseline_s[-half:]))))
        > SPREAD_LIMIT
    ):
        found.append(
            f"the machine drifted: first and second half of the baseline's runs differ by {drift:.0%}"
        )
    return found
