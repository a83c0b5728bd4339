"""Lesson 07: cuts, degrees, the ledger, and ranks that find the same text and leave nothing behind."""

import importlib.util
import json
import os
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch

from helpers import memory, models, planner, results, serving, timing

LESSON = "07_multiple_gpus"
WORKERS = results.ROOT / "notebooks" / "workers"
SMOKE = {"RUN_VLLM": False, "RUN_RAY": False}
PROMPT, NEW = [5, 60, 700, 8000], 6
LOOPBACK = {"PYTHONPATH": str(results.ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def lesson(definitions):
    return definitions(LESSON)


def commands(job, nodes):
    place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{serving.free_port()}",
             "--local-addr", "127.0.0.1", "--nnodes", str(len(nodes))]
    return [[sys.executable, "-m", "torch.distributed.run", *place, "--nproc-per-node", str(count), "--tee", "3",
             WORKERS / "parallel.py", job] for count in nodes]


def job_file(folder, model, strategy, repeats=1):
    ids = torch.randint(3, 40_000, (2, 24), generator=torch.Generator().manual_seed(1))
    job = {"name": "job", "strategy": strategy, "model": model, "prompt": PROMPT, "new_tokens": NEW, "warmup": 0,
           "repeats": repeats, "windows": ids.tolist(), "place": "cpu", "threads": 1, "folder": str(folder)}
    (folder / "job.json").write_text(json.dumps(job))
    return folder / "job.json"


@pytest.fixture(scope="module")
def launched(tmp_path_factory, tiny_llama):
    """launched("tp", (1, 1)) -> what each rank found, with the tiny LLaMA; each launch once a module."""
    done = {}

    def launch(strategy, nodes):
        if (strategy, nodes) not in done:
            folder = tmp_path_factory.mktemp(strategy)
            serving.run(*commands(job_file(folder, tiny_llama, strategy), nodes), timeout_s=200, env=LOOPBACK)
            done[strategy, nodes] = [json.loads((folder / f"job-{n}.json").read_text()) for n in range(sum(nodes))]
        return done[strategy, nodes]

    return launch


@pytest.mark.parametrize("ranks", [2, 3])
def test_cut_products_join_to_the_whole(lesson, ranks):
    x, up, down = torch.randn(2, 5), torch.randn(6, 5), torch.randn(4, 6)
    parts = lesson["column_parallel"](x, up, ranks)
    assert len(parts) == ranks and torch.allclose(torch.cat(parts, 1), x @ up.T, atol=1e-5)
    sums = lesson["row_parallel"](parts, down)
    assert torch.allclose(sum(sums), x @ up.T @ down.T, atol=1e-5)
    assert not torch.allclose(sums[0], sum(sums), atol=1e-3), "one rank alone has a partial sum"


def test_degree_is_the_fewest_that_divide_or_a_sentence(lesson):
    assert lesson["tensor_degree"](planner.describe("auto"), 0) == 3
    assert lesson["tensor_degree"](planner.describe("llama-2-70b"), 4) == 4
    for name, asked, said in (("falcon-7b", 0, "71 attention heads"), ("auto", 2, "9 attention heads"),
                              ("auto", 1, "TP_RANKS=1")):
        with pytest.raises(ValueError, match=said) as caught:
            lesson["tensor_degree"](planner.describe(name), asked)
        assert "\n" not in str(caught.value)


def test_prediction_adds_work_messages_and_bytes(lesson):
    known = {"messages": 10, "sent": 4e6, "message_s": 1e-3, "link_bytes_per_s": 1e9}
    assert lesson["predicted_s"]("tp", 0.4, 2, shared=False, **known) == pytest.approx(0.2 + 0.01 + 0.002)
    assert lesson["predicted_s"]("fsdp", 0.4, 2, shared=True, **known) == pytest.approx(0.8 + 0.01 + 0.002)


CUTS = [("fsdp", (2,)), ("tp", (2,)), ("tp", (1, 1)), ("offload", (1,))]


@pytest.mark.parametrize(("strategy", "nodes"), CUTS, ids=["fsdp", "tp", "tp on two nodes", "offload"])
def test_every_strategy_finds_what_one_process_finds(launched, strategy, nodes):
    (whole,) = launched("single", (1,))
    for rank in launched(strategy, nodes):
        assert rank["runs"][0]["ids"] == whole["runs"][0]["ids"]
        assert rank["best"] == whole["best"]
        assert np.allclose(rank["nll"], whole["nll"], atol=1e-4)


@pytest.mark.parametrize(("strategy", "nodes"), CUTS[:3], ids=["fsdp", "tp", "tp on two nodes"])
def test_bytes_are_split_and_the_ledger_holds(launched, lesson, tiny_llama, strategy, nodes):
    found, weights = launched(strategy, nodes), memory.weight_bytes(models.load(tiny_llama))
    assert sum(rank["own_bytes"] for rank in found) == pytest.approx(weights, rel=0.01)
    assert max(rank["own_bytes"] for rank in found) < 0.51 * weights
    shape = planner.describe(tiny_llama)
    predicted = lesson["predicted_sent"](strategy, shape, weights, 2, len(PROMPT), NEW)
    assert sum(rank["sent"] for rank in found) / NEW == pytest.approx(predicted, rel=0.01)
    assert all(0 < rank["share"] <= 1 for rank in found)


def test_killed_rank_ends_all_and_leaves_nothing(tmp_path, tiny_llama, monkeypatch):
    mark = f"mark-{tmp_path.name}-{os.getpid()}"
    monkeypatch.setenv("TEST_MARK", mark)

    def marked(**more):
        found = []
        for process in psutil.process_iter():
            try:
                known = process.environ()
                if known.items() >= {"TEST_MARK": mark, **more}.items() and process.status() != "zombie":
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill():
        until = time.monotonic() + 60
        while not (victims := marked(RANK="1")) and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(1)
        victims[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(serving.ServingError, match="SIGKILL"):
        serving.run(*commands(job_file(tmp_path, tiny_llama, "tp", 1000), (2,)), timeout_s=120, env=LOOPBACK)
    killer.join()
    assert not marked()


def test_lesson_finds_the_same_text_and_the_ledger(run_lesson):
    found = {r.variant: r for r in run_lesson(LESSON, **SMOKE).records}
    assert {"single", "fsdp-2", "tp-3", "multi-node-tp-3", "device-map-offload", "vllm-single", "vllm-tp-3",
            "ray-serve"} == set(found)
    for name in ("fsdp-2", "tp-3", "multi-node-tp-3"):
        row, said = found[name], found[name].details
        assert said["same_text"] and row.agreement > 0.999
        assert said["sent_bytes_per_token"] == pytest.approx(said["predicted_sent_bytes_per_token"], rel=0.02)
        assert said["rank_weight_bytes"] < 1.1 * found["single"].weight_bytes / row.world_size
    assert found["fsdp-2"].details["sent_bytes_per_token"] > 100 * found["tp-3"].details["sent_bytes_per_token"]
    assert found["device-map-offload"].weight_bytes < 0.8 * found["single"].weight_bytes
    assert found["vllm-tp-3"].status == found["ray-serve"].status == "unsupported"


def test_indivisible_degree_is_refused_before_anything_starts(run_lesson):
    with pytest.raises(Exception, match="9 attention heads and 3 key/value heads cannot be divided by 2"):
        run_lesson(LESSON, TP_RANKS=2, **SMOKE)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_over_three_ranks_finds_the_same_text(tmp_path):
    folder, cores = models.resolve("auto"), sorted(os.sched_getaffinity(0))
    job = {"name": "job", "model": folder, "prompt": PROMPT, "new_tokens": NEW, "warmup": 0, "repeats": 1, "ranks": 3,
           "place": "cpu", "folder": str(tmp_path)}
    (tmp_path / "job.json").write_text(json.dumps(job))
    bind = "|".join(str(cores[n % len(cores)]) for n in range(3))
    serving.run([sys.executable, WORKERS / "engine.py", tmp_path / "job.json"], timeout_s=300, env={
        **LOOPBACK, "VLLM_CPU_OMP_THREADS_BIND": bind, "VLLM_CPU_KVCACHE_SPACE": "1"})
    found = json.loads((tmp_path / "job-0.json").read_text())
    assert found["runs"][0]["ids"] == timing.greedy(models.load(), torch.tensor([PROMPT]), NEW)().ids
    assert len(found["runs"][0]["stamps_s"]) == NEW
