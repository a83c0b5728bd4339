"""memory: true peaks, weight bytes by tensor, KV-cache bytes against the cache itself."""

import os
import subprocess
import sys

import pytest
import torch

from helpers import memory, models

MEGABYTE = 10**6


def test_the_peak_sees_what_is_gone_by_the_end():
    memory.reset_peak()
    start = memory.peak_bytes()
    block = torch.ones(300 * MEGABYTE // 4)
    del block
    models.free()
    assert memory.peak_bytes() - start == pytest.approx(300 * MEGABYTE, rel=0.05)
    memory.reset_peak()
    assert memory.peak_bytes() - start < 100 * MEGABYTE


def test_a_pass_reports_load_and_run_apart():
    held = []

    def factory():
        scratch = torch.ones(400 * MEGABYTE // 4)
        del scratch
        held.append(torch.ones(100 * MEGABYTE // 4))
        return lambda: torch.ones(200 * MEGABYTE // 4).sum()

    peak = memory.peak_of(factory, release=held.clear)
    assert peak.kind == "process VmHWM"
    assert peak.peak_bytes - peak.resident_before_bytes == pytest.approx(300 * MEGABYTE, rel=0.05)
    assert peak.details["load_peak_bytes"] - peak.resident_before_bytes == pytest.approx(
        400 * MEGABYTE, rel=0.05
    )
    assert not held


def test_weights_of_small_blocks_go_back_to_the_system():
    def factory():
        held.extend(torch.ones(250_000) for _ in range(200))  # 200 MB in blocks of 1 MB
        return lambda: None

    held, peaks = [], []
    for _ in range(2):
        peaks.append(memory.peak_of(factory, release=held.clear))
    assert all(
        p.peak_bytes - p.resident_before_bytes == pytest.approx(200 * MEGABYTE, rel=0.05)
        for p in peaks
    )


def test_tied_weights_count_once(tiny_llama):
    net = models.load(tiny_llama)
    c = net.config
    kv = c.num_key_value_heads * c.head_dim
    layer = (
        2 * c.hidden_size * (c.hidden_size + kv)
        + 3 * c.hidden_size * c.intermediate_size
        + 2 * c.hidden_size
    )
    expected = 4 * (c.vocab_size * c.hidden_size + c.num_hidden_layers * layer + c.hidden_size)
    assert memory.weight_bytes(net) == expected
    assert memory.weight_bytes(models.load(tiny_llama, torch.bfloat16)) == expected / 2


@pytest.mark.parametrize("which", ["tiny_llama", "tiny_falcon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kv_cache_bytes_are_those_of_the_cache(which, dtype, request):
    net = models.load(request.getfixturevalue(which), dtype)
    with torch.no_grad():
        cache = net(torch.arange(12).view(2, 6), use_cache=True).past_key_values
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert (
        memory.kv_cache_bytes(net.config, tokens=6, batch_size=2, bytes_per_number=dtype.itemsize)
        == held
    )


def test_proportional_memory_covers_the_whole_tree():
    child = (
        "import time; block = bytearray(200_000_000); print('ready', flush=True); time.sleep(60)"
    )
    parent = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); p.wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            found = memory.tree_pss(process.pid)
        finally:
            os.killpg(process.pid, 9)
    assert 200 * MEGABYTE < found["anonymous_bytes"] < 260 * MEGABYTE
    assert found["anonymous_bytes"] + found["file_bytes"] <= found["pss_bytes"] * 1.01
