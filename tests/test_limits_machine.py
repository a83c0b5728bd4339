"""limits and machine: arithmetic of the limits, plausible measurements, what the machine says of
itself.
"""

import re

import pytest
import torch

from helpers import limits, machine


def test_decode_limit_counts_weights_once_and_every_cache():
    assert limits.decode_limit(100, 0, bandwidth=1000) == 10
    assert limits.decode_limit(100, 300, bandwidth=1000, batch_size=4) == 10


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


def test_slug_names_kind_and_size():
    assert re.fullmatch(r"[a-z0-9_]+(-[a-z0-9]+)+", machine.slug())
    if not machine.gpus():
        assert f"{machine.cores()}core" in machine.slug() and machine.slug().endswith("gb")


def test_the_slug_of_gpus_is_their_names(monkeypatch):
    card = {"name": "NVIDIA A100-SXM4-40GB", "memory_bytes": 1, "compute_capability": "8.0"}
    monkeypatch.setattr(machine, "gpus", lambda: [card, card])
    assert machine.slug() == "2x-nvidia-a100-sxm4-40gb"


def test_native_dtypes_follow_the_instruction_sets(monkeypatch):
    for flags, expected in (
        ({"avx2"}, (False, False)),
        ({"avx512_bf16"}, (False, True)),
        ({"avx512_fp16", "amx_bf16"}, (True, True)),
    ):
        monkeypatch.setattr(
            machine, "cpu", lambda flags=flags: {"model": "x", "flags": sorted(flags)}
        )
        assert machine.native_dtypes("cpu") == dict(
            zip(("float16", "bfloat16"), expected, strict=True)
        )


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device to pick")
def test_a_cuda_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=f"DEVICE='{device}' was asked for"):
        machine.pick_device(device)


def test_devices():
    assert machine.pick_device("cpu") == "cpu"
    assert machine.pick_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="'toaster' is no device"):
        machine.pick_device("toaster")


def test_description_holds_versions_and_no_path():
    found = machine.describe()
    assert found["versions"]["torch"] == torch.__version__ and found["memory_bytes"] > 1e9
    assert "/" not in machine.line().replace("tokens/s", "")
