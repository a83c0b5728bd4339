"""timing: stamps, pairs, intervals, with a fake clock and a tiny random model."""

import math

import numpy as np
import pytest
import torch

from helpers import models, timing


class FakeClock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def fake_call(clock: FakeClock, seconds: float, tokens: int = 4):
    def call() -> timing.Generation:
        start, stamps = clock(), []
        for _ in range(tokens):
            clock.now += seconds / tokens
            stamps.append(clock() - start)
        return timing.Generation(clock() - start, stamps, prompt_tokens=7, batch_size=2)

    return call


def test_a_generation_counts_as_the_contract_says():
    run = fake_call(FakeClock(), 2.0)()
    assert run.ttft_s == pytest.approx(0.5)
    assert run.inter_token_s == pytest.approx([0.5, 0.5, 0.5])
    assert run.tokens_per_s == pytest.approx(2 * 4 / 2.0)  # new tokens x batch / whole latency
    assert run.decode_tokens_per_s == pytest.approx(2 * 3 / 1.5)
    assert run.prefill_tokens_per_s == pytest.approx(2 * 7 / 0.5)


def test_a_single_token_has_no_decode_speed():
    assert fake_call(FakeClock(), 1.0, tokens=1)().decode_tokens_per_s is None


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_stamps_every_new_token_and_not_the_prompt(tiny_llama, batch):
    net = models.load(tiny_llama)
    ids = torch.arange(5).repeat(batch, 1) + 3
    run = timing.greedy(net, ids, 6)()
    assert run.new_tokens == 6 and run.batch_size == batch and run.prompt_tokens == 5
    assert (
        0 < run.stamps_s[0]
        and all(t > 0 for t in run.inter_token_s)
        and run.stamps_s[-1] <= run.latency_s
    )
    with torch.no_grad():  # the same tokens as choosing the best logit by hand, without a cache
        for _ in range(6):
            ids = torch.cat([ids, net(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert run.ids == ids[:, 5:].tolist()


def test_end_of_sequence_does_not_stop_a_generation(tiny_llama):
    net = models.load(tiny_llama)
    first = timing.greedy(net, torch.tensor([[5, 6, 7]]), 4)().ids[0]
    net.config.eos_token_id = first[0]  # as a checkpoint would have it
    assert timing.greedy(net, torch.tensor([[5, 6, 7]]), 4)().ids[0] == first


def test_variants_take_turns_forth_and_back():
    order, clock = [], FakeClock()

    def factory(name):
        call = fake_call(clock, 1.0)
        return lambda: lambda: (order.append(name), call())[1]

    probes = []
    found = timing.measure(
        {n: factory(n) for n in "AB"}, "A", pairs=4, warmup=1, between=lambda: probes.append(1)
    )
    assert "".join(order) == "AB" + "AB" + "BA" + "AB" + "BA"
    assert len(found["A"].warmup) == 1 and len(found["B"].runs) == 4 and len(probes) == 4


def test_what_does_not_fit_together_is_bracketed_and_released():
    order, clock = [], FakeClock()

    def factory(name):
        def load():
            order.append(f"load {name}")
            return fake_call(clock, 1.0)

        return load

    found = timing.measure(
        {n: factory(n) for n in "AB"},
        "A",
        4,
        0,
        together=False,
        release=lambda: order.append("release"),
    )
    assert order == ["load A", "release", "load B", "release", "load A", "release"]
    assert [len(found[n].runs) for n in "AB"] == [4, 4]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "oom"),
        (NotImplementedError("no such kernel here"), "unsupported"),
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_what_the_machine_cannot_do_is_a_result(error, status, together):
    def impossible():
        raise error

    clock = FakeClock()
    found = timing.measure(
        {"A": lambda: fake_call(clock, 1.0), "B": impossible}, "A", 2, 1, together
    )
    assert found["B"].status == status and found["B"].reason in str(error) and not found["B"].runs
    assert found["A"].status == "ok" and len(found["A"].runs) == 2


def test_a_fault_is_no_result():
    def faulty():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        timing.measure({"A": faulty}, "A", 1)


@pytest.mark.parametrize(("pairs", "warmup"), [(0, 1), (3, -1)])
def test_pairs_and_warmup_are_checked(pairs, warmup):
    with pytest.raises(ValueError, match="REPEATS must be at least 1"):
        timing.measure({"A": lambda: fake_call(FakeClock(), 1.0)}, "A", pairs, warmup)


def drifting_series(rng, ratio: float, pairs: int):
    """Baseline and variant times on a machine that drifts by a third over the hour and is noisy in
    each run.
    """
    clock, drift, noise = FakeClock(), rng.uniform(-1 / 3, 1 / 3) / 3600, rng.uniform(0.01, 0.08)
    walk = np.cumsum(rng.normal(0, 0.003, size=4 * pairs + 8))
    runs = iter(range(len(walk)))

    def factory(seconds):
        def call():
            speed = math.exp(drift * clock.now + walk[next(runs)] + rng.normal(0, noise))
            return fake_call(clock, seconds * speed)()

        return lambda: call

    found = timing.measure(
        {"base": factory(3.0), "variant": factory(3.0 / ratio)}, "base", pairs, warmup=0
    )
    return found["base"].latency_s, found["variant"].latency_s


def test_intervals_cover_the_truth_on_a_thousand_drifting_machines():
    rng, ratio = np.random.default_rng(1), 1.25
    found = [timing.ratio(*drifting_series(rng, ratio, pairs=6)) for _ in range(1000)]
    covered = np.mean([r.low <= ratio <= r.high for r in found])
    assert 0.93 <= covered <= 0.97
    assert np.mean([r.value for r in found]) == pytest.approx(ratio, rel=0.01)


def test_ratio_and_verdict():
    assert timing.ratio([2, 2.02, 1.98], [1, 1.01, 1.0]).verdict == "faster"
    assert timing.ratio([1, 1.01, 1.0], [2, 2.02, 1.98]).verdict == "slower"
    assert timing.ratio([1, 1.1, 0.9], [1.02, 0.95, 1.0]).verdict == "within noise"
    assert timing.ratio([2.0], [1.0]) == timing.Ratio(2.0, None, None)
    with pytest.raises(ValueError, match="pairs needed"):
        timing.ratio([1.0, 2.0], [1.0])


def test_warnings_say_what_moved():
    assert timing.warnings([1, 1.01, 0.99, 1], [1, 1, 1, 1]) == []
    assert "unstable" in timing.warnings([1, 1.5, 0.7, 1], [1, 1, 1, 1])[0]
    assert "drifted" in timing.warnings([1, 1, 1, 1], [1, 1, 1.2, 1.2])[0]
