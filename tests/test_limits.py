"""limits: arithmetic of the limits, plausible measurements."""

import torch

from helpers import limits, memory


def test_decode_limit_counts_weights_once_and_every_cache():
    assert limits.decode_limit(100, bandwidth=1000) == 10
    assert limits.decode_limit(100 + 300, bandwidth=1000, batch_size=4) == 10


def test_prefill_limit_is_two_operations_a_parameter():
    assert limits.prefill_limit(50, flops=1000) == 10


def test_roofline_bends_where_the_ceilings_meet():
    intensity = torch.tensor([1.0, 5.0, 10.0, 100.0])
    assert limits.roofline(intensity, bandwidth=10, flops=100).tolist() == [10, 50, 100, 100]


def test_bandwidth_keeps_its_samples_and_its_best():
    probe = limits.Bandwidth(nbytes=64_000_000)
    probe(), probe()
    assert len(probe.samples) == 2 and probe.best == max(probe.samples)
    assert 1e8 < probe.best < 1e13


def test_compute_is_plausible():
    assert 1e8 < limits.compute_flops(size=256) < 1e16


def test_the_probe_lets_go_of_its_array():
    memory.free()
    before = memory.resident_bytes()
    limits.Bandwidth(nbytes=400_000_000)()
    memory.free()
    assert memory.resident_bytes() - before < 100_000_000


def test_a_cpu_launches_nothing():
    assert limits.launch_s("cpu") is None
