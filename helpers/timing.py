"""Generation timed token by token; variants measured in pairs with their baseline.

Needs nothing else of this project: copy it into yours.
"""

import contextlib
import dataclasses
import gc
import math
import re
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import psutil
import scipy.stats
import torch
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

SPREAD_LIMIT = 0.10  # interquartile range over median above which a series is called unstable
BUSY_LIMIT = 0.05  # share of the cores that others may take before it is said
NARROW = 0.025  # half-width of an interval, on the log scale, at which enough pairs are measured
EXTENDED = 6, 12  # from so many pairs on a measurement may be extended, to so many at most
EXTRA_S = 60.0  # seconds that the extension may take


@dataclasses.dataclass(frozen=True)
class Generation:
    """One timed generation. Times in seconds since the call began.

    Attributes
    ----------
    latency_s : from the call to the last token.
    stamps_s : one per decoding step (a new token of every sequence of the batch).
    prompt_tokens : of each sequence.
    batch_size : sequences generated together.
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
        return [after - before for before, after in pairwise(self.stamps_s)]

    @property
    def tokens_per_s(self) -> float:
        """New tokens of the whole batch over the whole latency, as the article counts."""
        return self.batch_size * self.new_tokens / self.latency_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """New tokens after the first over the time they took; None for a single token."""
        if self.new_tokens < 2:
            return None
        return self.batch_size * (self.new_tokens - 1) / sum(self.inter_token_s)

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.batch_size * self.prompt_tokens / self.ttft_s


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run a model, as `measure` and `memory.peak_of` take it.

    Attributes
    ----------
    load : makes what `run` needs, a model as a rule; it may take long and much memory.
    run : one generation with it.
    """

    load: Callable[[], Any]
    run: Callable[[Any], Generation]


class _Stamps(BaseStreamer):  # type: ignore[misc]
    """A stamp for every token. The first `put` is the prompt, before prefill: it is discarded."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.prompt_seen = False
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.times.append(self.clock())
        self.prompt_seen = True

    def end(self) -> None:
        pass


def synchronize(device: str | torch.device) -> None:
    """Wait until the device has done all that it was given (a no-op on the CPU)."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def generate(
    model: Any,
    input_ids: torch.Tensor,
    new_tokens: int,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    clock: Callable[[], float] = time.perf_counter,
    **options: Any,
) -> Generation:
    """Generate exactly `new_tokens` greedily with transformers, each of them stamped.

    Parameters
    ----------
    input_ids : (batch, prompt_tokens) token ids on any device; all rows of one length.
    context : makes a context manager that is entered once around the generation (autocast, say).
    options : passed to the model's `generate`.

    Raises RuntimeError when another number of tokens came.
    """
    ids = input_ids.to(model.device)
    mask = torch.ones_like(ids)
    stamps = _Stamps(clock)
    synchronize(model.device)
    start = clock()
    with context():
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=stamps,
            **options,
        )
    synchronize(model.device)
    latency_s = clock() - start
    new_ids = output[:, ids.shape[1] :].tolist()
    if len(stamps.times) != new_tokens or len(new_ids[0]) != new_tokens:
        raise RuntimeError(
            f"{len(new_ids[0])} new tokens came, {new_tokens} were asked for: is EOS unset?"
        )
    stamps_s = [stamp - start for stamp in stamps.times]
    return Generation(latency_s, stamps_s, ids.shape[1], ids.shape[0], new_ids)


@dataclasses.dataclass
class Series:
    """What one variant gave: full-length warm-ups apart from the runs that count.

    Attributes
    ----------
    status : "ok"; "oom" (out of memory), "unsupported" (this machine or package cannot do it) or
        "failed" (any other error). Then `reason` says why, and no run after it was tried.
    baseline : the variant that run i is paired with; None for the baseline itself.
    busy_share : of each run, the share of the cores that other processes took meanwhile.
    """

    warmup: list[Generation] = dataclasses.field(default_factory=list)
    runs: list[Generation] = dataclasses.field(default_factory=list)
    status: str = "ok"
    reason: str | None = None
    baseline: str | None = None
    busy_share: list[float] = dataclasses.field(default_factory=list)

    @property
    def latency_s(self) -> list[float]:
        return [run.latency_s for run in self.runs]

    def median(self, quantity: str) -> float | None:
        """Median over the runs of a quantity of `Generation` ("decode_tokens_per_s", say)."""
        values = [getattr(run, quantity) for run in self.runs]
        if not values or None in values:
            return None
        return float(np.median(values))


def failure(error: Exception) -> tuple[str, str]:
    """Status and reason of a row for what a machine, a package or a model could not do.

    On a CPU PyTorch raises RuntimeError when it cannot allocate, not MemoryError.
    """
    message = str(error).strip() or type(error).__name__
    first_line = re.sub(r"(?<!\S)/\S+/", "", message.splitlines()[0])  # no paths of this machine
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if out_of_memory or re.search(r"can't allocate memory|out of memory", message):
        asked = re.search(r"tried to allocate (\d+) bytes", first_line)
        if asked:
            return "oom", f"could not allocate another {int(asked[1]) / 1e9:.2f} GB"
        return "oom", first_line.split(". ")[0]
    if isinstance(error, (NotImplementedError, ImportError)):
        return "unsupported", first_line
    return "failed", f"{type(error).__name__}: {first_line}"


def _attempt(series: Series, work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `work`; None when it raised, which the series then says."""
    try:
        return work(*arguments)
    except Exception as error:
        series.status, series.reason = failure(error)
    gc.collect()  # what a failed load or run left behind
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


class _Cores:
    """How much of the cores others took: processes that are not ours, and the hypervisor."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.before = self._now()

    def _now(self) -> tuple[float, float, float]:
        """Seconds of all cores since boot: in all, not idle, and of our own processes."""
        machine = psutil.cpu_times()
        total = sum(
            machine[: machine._fields.index("guest")] if "guest" in machine._fields else machine
        )
        idle = machine.idle + getattr(machine, "iowait", 0.0)
        own = 0.0
        for process in [self.process, *self.process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                own += sum(process.cpu_times()[:2])
        return total, total - idle, own

    def others_share(self) -> float:
        """Share of all cores' time since the last call that went to others (0 to 1)."""
        now = self._now()
        total, busy, own = (after - before for after, before in zip(now, self.before, strict=True))
        self.before = now
        if total <= 0:
            return 0.0
        return min(1.0, max(0.0, busy - own) / total)


def _timed(series: Series, variant: Variant, model: Any, cores: _Cores) -> None:
    """One run that counts, with the load of others during it."""
    cores.others_share()
    run = _attempt(series, variant.run, model)
    if run is not None:
        series.runs.append(run)
        series.busy_share.append(cores.others_share())


def _warm_up(series: Series, variant: Variant, model: Any, runs: int) -> None:
    for _ in range(runs):
        if series.status == "ok":
            run = _attempt(series, variant.run, model)
            if run is not None:
                series.warmup.append(run)


def _pair_with(measured: dict[str, Series], baseline: str) -> str:
    """Name each series' baseline: the one asked for, or the first that ran where it did not."""
    if measured[baseline].status != "ok":
        baseline = next((name for name, s in measured.items() if s.status == "ok"), baseline)
    for name, series in measured.items():
        series.baseline = None if name == baseline else baseline
    return baseline


def _widest(measured: dict[str, Series]) -> float:
    """The largest half-width of the intervals, on the log scale."""
    widths = [0.0]
    for series in measured.values():
        if series.status == "ok" and series.baseline is not None:
            gain = ratio(measured[series.baseline].latency_s, series.latency_s)
            if gain.low is not None:
                widths.append(math.log(gain.high / gain.low) / 2)  # type: ignore[operator]
    return max(widths)


def _in_turns(
    variants: dict[str, Variant],
    baseline: str,
    pairs: int,
    warmup: int,
    keep: Callable[[dict[str, Series]], object],
    between: Callable[[], object],
) -> dict[str, Series]:
    """All variants loaded at once; they take turns, A B C, C B A, A B C …"""
    measured = {name: Series() for name in variants}
    loaded = {}
    for name, variant in variants.items():
        loaded[name] = _attempt(measured[name], variant.load)
    for name, variant in variants.items():
        _warm_up(measured[name], variant, loaded[name], warmup)

    cores = _Cores()
    least, most = EXTENDED
    extension_began = None
    order = list(variants)
    for round_number in tqdm(range(max(pairs, most)), "rounds", total=pairs, leave=False):
        if round_number == pairs:
            extension_began = time.monotonic()
        # looked at after every second round, in which a linear drift cancels
        if round_number >= pairs and (round_number - pairs) % 2 == 0:
            extra_s = time.monotonic() - extension_began  # type: ignore[operator]
            if pairs < least or extra_s > EXTRA_S or _widest(measured) <= NARROW:
                break
        for name in order:
            if measured[name].status == "ok":
                _timed(measured[name], variants[name], loaded[name], cores)
            if measured[name].status != "ok":
                loaded[name] = None
        order.reverse()
        between()
        _pair_with(measured, baseline)
        keep(measured)
    return measured


def _bracketed(
    variants: dict[str, Variant],
    baseline: str,
    pairs: int,
    warmup: int,
    keep: Callable[[dict[str, Series]], object],
    between: Callable[[], object],
    release: Callable[[], object],
) -> dict[str, Series]:
    """One variant loaded at a time: half of the baseline's runs, the others, the other half."""
    measured = {name: Series() for name in variants}
    cores = _Cores()
    before = math.ceil(pairs / 2)
    others = [(name, pairs) for name in variants if name != baseline]
    plan = [(baseline, before), *others, (baseline, pairs - before)]
    for name, runs in tqdm(plan, "variants", leave=False):
        if measured[name].status == "ok" and runs:
            model = _attempt(measured[name], variants[name].load)
            _warm_up(measured[name], variants[name], model, warmup)
            for _ in range(runs):
                if measured[name].status == "ok":
                    _timed(measured[name], variants[name], model, cores)
            del model
        release()
        between()
        _pair_with(measured, baseline)
        keep(measured)
    return measured


def measure(
    variants: dict[str, Variant],
    baseline: str,
    pairs: int,
    warmup: int = 1,
    *,
    together: bool = True,
    keep: Callable[[dict[str, Series]], object] = lambda measured: None,
    between: Callable[[], object] = lambda: None,
    release: Callable[[], object] = lambda: None,
) -> dict[str, Series]:
    """Measure variants against their baseline so that a drifting machine does not decide.

    Run i of a variant and run i of its baseline make a pair. Six pairs or more go on, to twelve at
    most and for a minute at most, while an interval is wider than ± 2.5 %.

    Parameters
    ----------
    variants : by name; the baseline is one of them. Where it cannot run, the first that can takes
        its place (`Series.baseline`).
    pairs, warmup : runs that count, and full-length runs before them.
    together : all variants are loaded and take turns, so that a linear drift cancels over two
        rounds. Otherwise, where they do not fit in memory side by side, each is loaded by itself,
        bracketed by half of the baseline's runs before and half after.
    keep : called with everything measured so far after every round (a `results.Lesson` writes it).
    between : called after every round (a bandwidth probe, say).
    release : drops what `load` may have cached, between variants that are not together.

    Returns a Series a variant. What a variant raises becomes its status and reason, once: it is
    not tried again.
    """
    if pairs < 1 or warmup < 0:
        raise ValueError(
            f"REPEATS must be at least 1 and WARMUP at least 0, not {pairs} and {warmup}."
        )
    if together:
        return _in_turns(variants, baseline, pairs, warmup, keep, between)
    return _bracketed(variants, baseline, pairs, warmup, keep, between, release)


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


def ratio(baseline_s: Sequence[float], variant_s: Sequence[float]) -> Ratio:
    """Speed-up of a variant over its baseline from paired times: geometric mean of the ratios.

    Its interval is Student's t on the log ratios of the pairs, which are taken as independent;
    tokens within one run are not (Student 1908, Biometrika 6:1; on logs as in Fleming and Wallace
    1986, CACM 29:3). Where one of the two has more runs, the pairs are the first ones of both.

    Raises ValueError without any pair.
    """
    pairs = min(len(baseline_s), len(variant_s))
    if not pairs:
        raise ValueError(
            f"pairs needed: {len(baseline_s)} baseline and {len(variant_s)} variant times"
        )
    logs = np.log(baseline_s[:pairs]) - np.log(variant_s[:pairs])
    value = math.exp(float(np.mean(logs)))
    if pairs == 1:
        return Ratio(value, None, None)
    if np.ptp(logs) < 1e-9:  # all alike: nothing to estimate a spread from
        return Ratio(value, value, value)
    interval = scipy.stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
    return Ratio(value, math.exp(interval.low), math.exp(interval.high))


def spread(values: Sequence[float]) -> float:
    """Interquartile range over median, a fraction."""
    low, middle, high = np.percentile(values, (25, 50, 75))
    return float((high - low) / middle)


def instabilities(series: Series, baseline: Series | None = None) -> list[str]:
    """Sentences for a row whose runs moved by more than a tenth, or whose machine did."""
    sentences: list[str] = []
    if not series.runs:
        return sentences
    if spread(series.latency_s) > SPREAD_LIMIT:
        sentences.append(
            f"unstable: spread of the runs {spread(series.latency_s):.0%} "
            "(interquartile range over median)"
        )
    reference = (baseline or series).latency_s
    half = len(reference) // 2
    if half:
        drift = abs(math.log(np.median(reference[:half]) / np.median(reference[-half:])))
        if drift > SPREAD_LIMIT:
            sentences.append(
                "the machine drifted: first and second half of the baseline's runs differ by "
                f"{drift:.0%}"
            )
    busy = float(np.median(series.busy_share)) if series.busy_share else 0.0
    if busy > BUSY_LIMIT:
        sentences.append(f"measured beside others, which took {busy:.0%} of the cores")
    return sentences
