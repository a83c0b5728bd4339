"""memory: true peaks, weight bytes by tensor, KV-cache bytes against the cache itself."""

import mmap
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from helpers import memory, models
from helpers.timing import Variant

MEGABYTE = 10**6


def test_the_peak_sees_what_is_gone_by_the_end():
    memory.reset_peak()
    start = memory.peak_bytes()
    block = torch.ones(300 * MEGABYTE // 4)
    del block
    memory.free()
    assert memory.peak_bytes() - start == pytest.approx(300 * MEGABYTE, rel=0.05)
    memory.reset_peak()
    assert memory.peak_bytes() - start < 100 * MEGABYTE


def test_a_pass_reports_load_and_run_apart():
    held = []

    def load():
        scratch = torch.ones(400 * MEGABYTE // 4)
        del scratch
        held.append(torch.ones(100 * MEGABYTE // 4))

    def run(model):
        return torch.ones(200 * MEGABYTE // 4).sum()

    peak = memory.peak_of(Variant(load, run), release=held.clear)
    before = peak.resident_before_bytes
    assert peak.kind == "process VmHWM"
    assert peak.peak_bytes - before == pytest.approx(300 * MEGABYTE, rel=0.05)
    assert peak.load_peak_bytes - before == pytest.approx(400 * MEGABYTE, rel=0.05)
    assert not held


def test_weights_of_small_blocks_go_back_to_the_system():
    held, peaks = [], []

    def load():
        held.extend(torch.ones(250_000) for _ in range(200))  # 200 MB in blocks of 1 MB

    for _ in range(2):
        peaks.append(memory.peak_of(Variant(load, lambda model: None), release=held.clear))
    for peak in peaks:
        above = peak.peak_bytes - peak.resident_before_bytes
        assert above == pytest.approx(200 * MEGABYTE, rel=0.05)


@pytest.mark.parametrize("name", ["model.safetensors", "blobs/0123abcd"])
def test_mapped_pages_that_only_loading_touched_are_let_go(tmp_path, name):
    """A hub's cache keeps weights under a hash: the file's name says nothing."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(120 * MEGABYTE))

    def load():
        mapped = mmap.mmap(os.open(path, os.O_RDONLY), 0, prot=mmap.PROT_READ)
        sum(mapped[::4096])  # touches every page
        return mapped

    peak = memory.peak_of(Variant(load, lambda mapped: mapped[: 20 * MEGABYTE : 4096]))
    before = peak.resident_before_bytes
    assert peak.load_peak_bytes - before > 115 * MEGABYTE
    assert peak.peak_bytes - before < 60 * MEGABYTE


def test_a_failed_pass_lets_go_of_what_it_loaded():
    def run(model):
        raise MemoryError("no more")

    released = []
    with pytest.raises(MemoryError):
        memory.peak_of(Variant(lambda: 1, run), release=lambda: released.append(1))
    assert len(released) == 2


def test_a_container_s_limit_is_seen(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("3000000000\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path if "cgroup" in path else Path(path))
    assert memory.available_bytes() == 2_000_000_000
    cached = "anon 300\nactive_file 200000000\ninactive_file 300000000\n"
    (tmp_path / "memory.stat").write_text(cached)  # files that were read go when room is needed
    assert memory.available_bytes() == 2_500_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container_bytes_left() is None


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_models_make_room_for_one_another(error):
    held, alive = [], weakref.WeakSet()

    class Loaded:
        def __init__(self, name):
            if len(alive) == 2:  # as many as fit
                raise error("no room")
            self.name = name
            alive.add(self)

    load = memory.cache(Loaded)
    assert load("a") is load("a") and load("b") is load("b")
    assert load("c").name == "c" and [one.name for one in alive] == ["c"]
    held += [Loaded("d")]  # of somebody else: nothing of ours is left to give up
    load.cache_clear()
    held += [Loaded("e")]
    with pytest.raises(error):
        load("f")


def test_an_allocator_that_was_preloaded_is_named(monkeypatch):
    assert memory.preloaded_allocator() is None
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libfoo.so:/usr/lib/libtcmalloc_minimal.so.4")
    assert memory.preloaded_allocator() == "libtcmalloc_minimal.so.4"


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
    assert 200 * MEGABYTE < found < 300 * MEGABYTE
