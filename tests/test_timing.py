"""timing: stamps, pairs, intervals, with a fake clock and a tiny random model."""

import math
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from helpers import models, timing


class FakeClock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def fake_run(clock: FakeClock, seconds: float, tokens: int = 4) -> timing.Generation:
    start, stamps = clock(), []
    for _ in range(tokens):
        clock.now += seconds / tokens
        stamps.append(clock() - start)
    return timing.Generation(clock() - start, stamps, prompt_tokens=7, batch_size=2)


def fake_variant(clock: FakeClock, seconds: float) -> timing.Variant:
    return timing.Variant(load=lambda: None, run=lambda model: fake_run(clock, seconds))


def test_a_generation_counts_as_the_contract_says():
    run = fake_run(FakeClock(), 2.0)
    assert run.ttft_s == pytest.approx(0.5)
    assert run.inter_token_s == pytest.approx([0.5, 0.5, 0.5])
    assert run.tokens_per_s == pytest.approx(2 * 4 / 2.0)  # new tokens x batch / whole latency
    assert run.decode_tokens_per_s == pytest.approx(2 * 3 / 1.5)
    assert run.prefill_tokens_per_s == pytest.approx(2 * 7 / 0.5)


def test_a_single_token_has_no_decode_speed():
    assert fake_run(FakeClock(), 1.0, tokens=1).decode_tokens_per_s is None


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_stamps_every_new_token_and_not_the_prompt(tiny_llama, batch):
    net = models.load(tiny_llama)
    ids = torch.arange(5).repeat(batch, 1) + 3
    run = timing.generate(net, ids, 6)
    assert run.new_tokens == 6 and run.batch_size == batch and run.prompt_tokens == 5
    assert run.stamps_s[0] > 0 and run.stamps_s[-1] <= run.latency_s
    assert all(gap > 0 for gap in run.inter_token_s)
    with torch.no_grad():  # the same tokens as choosing the best logit by hand, without a cache
        for _ in range(6):
            ids = torch.cat([ids, net(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert run.ids == ids[:, 5:].tolist()


def test_end_of_sequence_does_not_stop_a_generation(tiny_llama):
    net = models.load(tiny_llama)
    first = timing.generate(net, torch.tensor([[5, 6, 7]]), 4).ids[0]
    net.config.eos_token_id = first[0]  # as a checkpoint would have it
    assert timing.generate(net, torch.tensor([[5, 6, 7]]), 4).ids[0] == first


def test_stamps_come_with_each_step_and_not_one_late(tiny_llama):
    """The clock counts forward passes: token k is stamped before pass k + 1 begins."""
    net = models.load(tiny_llama)
    passes = []
    net.register_forward_pre_hook(lambda *_: passes.append(1))
    run = timing.generate(net, torch.tensor([[5, 6, 7]]), 12, clock=lambda: len(passes))
    assert run.stamps_s == list(range(1, 13))


def named(name: str, clock: FakeClock, order: list, seconds: float = 1.0) -> timing.Variant:
    """A variant that notes when it is loaded and when it runs."""

    def load():
        order.append(f"load {name}")

    def run(model):
        order.append(name)
        return fake_run(clock, seconds)

    return timing.Variant(load, run)


def test_variants_take_turns_forth_and_back():
    order, probes, kept, clock = [], [], [], FakeClock()
    measured = timing.measure(
        {name: named(name, clock, order) for name in "AB"},
        "A",
        4,
        1,
        between=lambda: probes.append(1),
        keep=lambda series: kept.append(len(series["B"].runs)),
    )
    assert order[:2] == ["load A", "load B"]
    assert "".join(order[2:]) == "AB" + "AB" + "BA" + "AB" + "BA"
    assert len(measured["A"].warmup) == 1 and len(measured["B"].runs) == 4 and len(probes) == 4
    assert kept == [1, 2, 3, 4]  # each round is kept as it ends
    assert measured["B"].baseline == "A" and measured["A"].baseline is None
    assert len(measured["B"].busy_share) == 4


def test_what_does_not_fit_together_is_bracketed_and_released():
    order, clock = [], FakeClock()
    measured = timing.measure(
        {name: named(name, clock, order) for name in "AB"},
        "A",
        4,
        0,
        together=False,
        release=lambda: order.append("release"),
    )
    bracket = ["load A", "A", "A", "release"]
    assert order == [*bracket, "load B", *"BBBB", "release", *bracket]
    assert [len(measured[name].runs) for name in "AB"] == [4, 4]


REFUSALS = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), "oom"),
    (MemoryError("no more"), "oom"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), "oom"),
    (NotImplementedError("no such kernel here"), "unsupported"),
    (ImportError("mslk is not installed"), "unsupported"),
    (KeyError("a bug"), "failed"),
]


@pytest.mark.parametrize(("error", "status"), REFUSALS)
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("where", ["load", "warm-up", "run"])
def test_what_cannot_be_done_is_a_row_and_is_tried_once(error, status, together, where):
    tries, clock = [], FakeClock()

    def load():
        if where == "load":
            tries.append(1)
            raise error

    def run(model):
        if where == "warm-up" or clock.now > 101:
            tries.append(1)
            raise error
        return fake_run(clock, 1.0)

    variants = {"A": fake_variant(clock, 1.0), "B": timing.Variant(load, run)}
    measured = timing.measure(variants, "A", 4, 1, together=together)
    assert measured["B"].status == status and len(tries) == 1
    assert str(error.args[0])[:10] in measured["B"].reason
    assert measured["A"].status == "ok" and len(measured["A"].runs) == 4


def test_the_first_that_runs_takes_the_place_of_a_baseline_that_does_not():
    def impossible():
        raise MemoryError("28.9 GB")

    clock = FakeClock()
    variants = {
        "fp32": timing.Variant(impossible, None),
        "fp16": fake_variant(clock, 2.0),
        "bf16": fake_variant(clock, 1.0),
    }
    measured = timing.measure(variants, "fp32", 2, 0)
    assert [measured[name].baseline for name in variants] == ["fp16", None, "fp16"]


def test_no_path_of_this_machine_is_in_a_reason():
    status, reason = timing.failure(OSError("no file /home/someone/models/config.json here"))
    assert (status, reason) == ("failed", "OSError: no file config.json here")


def test_what_a_cpu_cannot_allocate_is_told_in_gigabytes():
    with pytest.raises(RuntimeError) as refusal:
        torch.empty(10**15)
    assert timing.failure(refusal.value) == ("oom", "could not allocate another 4000000.00 GB")


@pytest.mark.parametrize(("pairs", "warmup"), [(0, 1), (3, -1)])
def test_pairs_and_warmup_are_checked(pairs, warmup):
    with pytest.raises(ValueError, match="REPEATS must be at least 1"):
        timing.measure({"A": fake_variant(FakeClock(), 1.0)}, "A", pairs, warmup)


def drifting_series(rng, ratio: float, pairs: int):
    """Baseline and variant times on a machine that drifts by a third over the hour and is noisy in
    each run.
    """
    clock, drift, noise = FakeClock(), rng.uniform(-1 / 3, 1 / 3) / 3600, rng.uniform(0.01, 0.08)
    walk = np.cumsum(rng.normal(0, 0.003, size=40))
    runs = iter(range(len(walk)))

    def variant(seconds):
        def run(model):
            speed = math.exp(drift * clock.now + walk[next(runs)] + rng.normal(0, noise))
            return fake_run(clock, seconds * speed)

        return timing.Variant(lambda: None, run)

    variants = {"base": variant(3.0), "variant": variant(3.0 / ratio)}
    measured = timing.measure(variants, "base", pairs, warmup=0)
    return measured["base"].latency_s, measured["variant"].latency_s


def test_intervals_cover_the_truth_on_two_thousand_drifting_machines(monkeypatch):
    """With the rule that goes on to twelve pairs while the interval is wide."""
    monkeypatch.setattr(timing, "_Cores", Idle)
    monkeypatch.setattr(timing, "tqdm", lambda rounds, *_, **__: rounds)
    rng, ratio = np.random.default_rng(1), 1.25
    series = [drifting_series(rng, ratio, pairs=6) for _ in range(2000)]
    lengths = [len(baseline) for baseline, _ in series]
    assert min(lengths) == 6 and max(lengths) == 12
    intervals = [timing.ratio(*pair) for pair in series]
    covered = np.mean([interval.low <= ratio <= interval.high for interval in intervals])
    assert 0.93 <= covered <= 0.97
    assert np.mean([interval.value for interval in intervals]) == pytest.approx(ratio, rel=0.01)


class Idle:
    """A machine with nobody else on it."""

    def others_share(self) -> float:
        return 0.0


def test_narrow_intervals_end_a_measurement_at_six_pairs():
    clock = FakeClock()
    variants = {"A": fake_variant(clock, 1.0), "B": fake_variant(clock, 0.5)}
    assert len(timing.measure(variants, "A", 6, 0)["A"].runs) == 6


def test_a_busy_machine_is_noticed():
    """A process of its own, not one of ours, burns a core meanwhile."""
    burn = (
        "import os, time; end = time.time() + 4\nif os.fork() == 0:\n while time.time() < end: pass"
    )
    subprocess.run([sys.executable, "-c", burn], check=True)  # its child is orphaned

    def run(model):
        time.sleep(0.5)
        return timing.Generation(0.5, [0.5], 1)

    measured = timing.measure({"A": timing.Variant(lambda: None, run)}, "A", 3, 0)
    assert np.median(measured["A"].busy_share) > 0.25 / psutil.cpu_count()
    assert any("measured beside others" in s for s in timing.instabilities(measured["A"]))


def test_ratio_and_verdict():
    assert timing.ratio([2, 2.02, 1.98], [1, 1.01, 1.0]).verdict == "faster"
    assert timing.ratio([1, 1.01, 1.0], [2, 2.02, 1.98]).verdict == "slower"
    assert timing.ratio([1, 1.1, 0.9], [1.02, 0.95, 1.0]).verdict == "within noise"
    assert timing.ratio([2.0], [1.0]) == timing.Ratio(2.0, None, None)
    assert timing.ratio([2.0, 2.0, 9.0], [1.0, 1.0]) == timing.Ratio(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="pairs needed"):
        timing.ratio([1.0, 2.0], [])


def series_of(*seconds: float) -> timing.Series:
    return timing.Series(runs=[timing.Generation(s, [s], 1) for s in seconds])


def test_what_moved_is_said():
    steady = series_of(1, 1, 1, 1)
    assert timing.instabilities(series_of(1, 1.01, 0.99, 1), steady) == []
    assert timing.instabilities(timing.Series(), series_of(1, 1, 1.2, 1.2)) == []
    assert "unstable" in timing.instabilities(series_of(1, 1.5, 0.7, 1), steady)[0]
    assert "drifted" in timing.instabilities(steady, series_of(1, 1, 1.2, 1.2))[0]
