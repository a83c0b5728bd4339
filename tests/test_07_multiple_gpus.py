"""Lesson 07: cuts, degrees, the ledger, and ranks that find the same text and leave nothing behind."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig

import nbformat
import numpy as np
import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import memory, models, results, timing
from helpers.series import planner, processes

LESSON = "07_multiple_gpus"
WORKERS = results.ROOT / "helpers" / "workers"
PROMPT, NEW, WAIT_S = [5, 60, 700, 8000], 6, 8
LOOPBACK = {
    "PYTHONPATH": str(results.ROOT),
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def lesson(definitions):
    return definitions(LESSON)


def commands(job, nodes):
    place = [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{processes.free_port()}",
        "--local-addr",
        "127.0.0.1",
        "--nnodes",
        str(len(nodes)),
    ]
    return [
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *place,
            "--nproc-per-node",
            str(count),
            "--tee",
            "3",
            WORKERS / "ranks_07.py",
            job,
        ]
        for count in nodes
    ]


def job_file(folder, model, strategy, repeats=1):
    ids = torch.randint(3, 40_000, (2, 24), generator=torch.Generator().manual_seed(1))
    job = {
        "name": "job",
        "strategy": strategy,
        "model": model,
        "prompt": PROMPT,
        "new_tokens": NEW,
        "warmup": 0,
        "repeats": repeats,
        "windows": ids.tolist(),
        "place": "cpu",
        "threads": 1,
        "wait_s": WAIT_S,
        "folder": str(folder),
    }
    (folder / "job.json").write_text(json.dumps(job))
    return folder / "job.json"


@pytest.fixture(scope="module")
def launched(tmp_path_factory, tiny_llama):
    """launched("tp", (1, 1)) -> what each rank found, with the tiny LLaMA; each launch once a
    module.
    """
    done = {}

    def launch(strategy, nodes):
        if (strategy, nodes) not in done:
            folder = tmp_path_factory.mktemp(strategy)
            processes.run(
                *commands(job_file(folder, tiny_llama, strategy), nodes),
                timeout_s=200,
                env=LOOPBACK,
            )
            done[strategy, nodes] = [
                json.loads((folder / f"job-{n}.json").read_text()) for n in range(sum(nodes))
            ]
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
    for name, asked, said in (
        ("falcon-7b", 0, "71 attention heads"),
        ("auto", 2, "9 attention heads"),
        ("auto", 1, "TP_RANKS=1"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            lesson["tensor_degree"](planner.describe(name), asked)
        assert "\n" not in str(caught.value)


def test_prediction_adds_work_messages_and_bytes(lesson):
    known = {"messages": 10, "sent": 4e6, "message_s": 1e-3, "link_bytes_per_s": 1e9}
    assert lesson["predicted_s"]("tp", 0.4, 2, shared=False, **known) == pytest.approx(
        0.2 + 0.01 + 0.002
    )
    assert lesson["predicted_s"]("fsdp", 0.4, 2, shared=True, **known) == pytest.approx(
        0.8 + 0.01 + 0.002
    )


CUTS = [("fsdp", (2,)), ("tp", (1, 1)), ("offload", (1,))]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "nodes"), CUTS, ids=["fsdp", "tp on two nodes", "offload"])
def test_every_strategy_finds_what_one_process_finds(launched, strategy, nodes):
    (whole,) = launched("single", (1,))
    for rank in launched(strategy, nodes):
        assert rank["runs"][0]["ids"] == whole["runs"][0]["ids"]
        assert rank["best"] == whole["best"]
        assert np.allclose(rank["nll"], whole["nll"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "nodes"), CUTS[:2], ids=["fsdp", "tp on two nodes"])
def test_bytes_are_split_and_the_ledger_holds(launched, lesson, tiny_llama, strategy, nodes):
    found, weights = launched(strategy, nodes), memory.weight_bytes(models.load(tiny_llama))
    assert sum(rank["own_bytes"] for rank in found) == pytest.approx(weights, rel=0.01)
    assert max(rank["own_bytes"] for rank in found) < 0.51 * weights
    shape = planner.describe(tiny_llama)
    predicted = lesson["predicted_sent"](strategy, shape, weights, 2, len(PROMPT), NEW)
    assert sum(rank["sent"] for rank in found) / NEW == pytest.approx(predicted, rel=0.01)
    assert all(0 < rank["share"] <= 1 for rank in found)


@pytest.fixture
def marked(tmp_path, monkeypatch):
    """marked() -> the living processes that this test's launches started; marked(RANK="1"): those
    of one rank.
    """
    mark = f"mark-{tmp_path.name}-{os.getpid()}"
    monkeypatch.setenv("TEST_MARK", mark)

    def living(**more):
        found = []
        for process in psutil.process_iter():
            try:
                known = process.environ()
                if (
                    known.items() >= {"TEST_MARK": mark, **more}.items()
                    and process.status() != "zombie"
                ):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    return living


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blow", "said"),
    [
        (signal.SIGKILL, "rank 1 was ended by SIGKILL"),
        (signal.SIGSTOP, "rank 1 ended with exit code 1"),
    ],
    ids=["killed", "hanging"],
)
def test_a_lost_rank_ends_all_and_is_named(tmp_path, tiny_llama, marked, blow, said):
    """Ended by what the ranks find out of each other, long before the deadline would end them."""
    struck = []

    def strike(line):  # once the model is loaded and both ranks generate
        if line.startswith("[rank1]: ") and "MB of weights here" in line and not struck:
            marked(RANK="1")[0].send_signal(blow)
            struck.append(line)

    with pytest.raises(processes.ServingError, match=said) as caught:
        processes.run(
            *commands(job_file(tmp_path, tiny_llama, "tp", 100_000), (2,)),
            timeout_s=400,
            env=LOOPBACK,
            on_line=strike,
        )
    assert struck and "was not done within" not in str(caught.value)
    assert not marked()
    if blow == signal.SIGSTOP:
        assert "did not answer its peers" in str(caught.value) and '  File "' in str(caught.value)


def test_lesson_finds_the_same_text_and_the_ledger(run_lesson):
    run = run_lesson(LESSON)
    found = {r.variant: r for r in run.records}
    assert {
        "single",
        "fsdp-2",
        "tp-3",
        "multi-node-tp-3",
        "device-map-offload",
        "device-map",
        "vllm-single",
        "vllm-tp-3",
        "vllm-ray-tp-3",
        "ray-serve",
    } == set(found)
    whole = found["single"]
    for name in ("fsdp-2", "tp-3", "multi-node-tp-3"):
        row, said = found[name], found[name].details
        assert said["same_text"] and row.agreement > 0.999 and abs(row.nll_delta) < 1e-4
        assert said["sent_bytes_per_token"] == pytest.approx(
            said["predicted_sent_bytes_per_token"], rel=0.02
        )
        assert said["wire_bytes_per_token"] > 0.9 * said["sent_bytes_per_token"]
        assert (
            said["rank_weight_bytes"]
            == row.weight_bytes
            < 1.1 * whole.weight_bytes / row.world_size
        )
        assert 0 < said["communication_share"] <= 1 and said["all_ranks_peak_bytes"] < 8e9
    assert (
        found["fsdp-2"].details["sent_bytes_per_token"]
        > 100 * found["tp-3"].details["sent_bytes_per_token"]
    )
    offload = found["device-map-offload"]
    assert (
        offload.weight_bytes < 0.8 * whole.weight_bytes
        and offload.details["same_text"]
        and offload.nll_delta == 0
    )
    assert (
        offload.details["read_bytes_per_token"]
        == offload.details["predicted_read_bytes_per_token"]
        > 0
    )
    assert {found[n].status for n in ("vllm-tp-3", "vllm-ray-tp-3", "ray-serve")} == {"unsupported"}
    table = results.frame(run.records).set_index("variant")
    on_cpu = [r.variant for r in run.records if r.world_size > 1 and r.device == "cpu"]
    assert not table.loc[on_cpu, "headline"].any() and table.loc["single", "headline"]


def test_lesson_shows_the_failing_rank_and_what_it_ran(run_lesson):
    cells = nbformat.read(run_lesson(LESSON).folder / f"{LESSON}.ipynb", 4).cells
    said = "".join(o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs)
    assert "A rank dies" in said and "ValueError: this rank came upon" in said
    assert "A rank hangs" in said and "did not answer its peers" in said
    assert (
        "torchrun --nnodes 2 --rdzv-backend c10d" in said
        and "[rank2]: 179 MB of weights here" in said
    )


@pytest.mark.slow
def test_indivisible_degree_is_refused_before_anything_starts(run_lesson):
    with pytest.raises(
        Exception, match="9 attention heads and 3 key/value heads cannot be divided by 2"
    ):
        run_lesson(LESSON, TP_RANKS=2)


def test_vllm_s_ranks_share_the_threads_that_torch_takes(lesson, tmp_path, monkeypatch):
    """On eight cores of which torch takes four, as with two hardware threads a core."""
    asked = []
    jobs = lesson["launch_07"].Jobs("", "", PROMPT, [], NEW, 0, 1, "cpu", 1, 1, str(tmp_path))
    monkeypatch.setattr(processes, "run", lambda *_, env, **__: asked.append(env))
    monkeypatch.setattr(type(jobs), "read", lambda *_: [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for ranks in (1, 2, 3):
        jobs.vllm("job", ranks, "mp")
    binds = [env["VLLM_CPU_OMP_THREADS_BIND"] for env in asked]
    assert binds == ["0,1,2,3", "0,1|2,3", "0|1|2"]
    assert [env["OMP_NUM_THREADS"] for env in asked] == ["4", "2", "1"]


@pytest.fixture
def other_python(tmp_path):
    """Another environment's Python: it borrows the packages of this one, but not the project, which
    is installed here by a file that a borrowed folder does not bring.
    """
    folder = tmp_path / "other"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return str(folder / "bin" / "python")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_over_two_ranks_of_another_environment_finds_the_same_text(
    lesson, tmp_path, other_python
):
    torch.manual_seed(0)
    whole = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            max_position_embeddings=512,
        )
    ).eval()
    folder = tmp_path / "model"  # heads of 32 numbers, the fewest that vLLM takes on a CPU
    whole.save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    jobs = lesson["launch_07"].Jobs(
        str(folder), "", PROMPT, [], NEW, 0, 1, "cpu", WAIT_S, 200, str(tmp_path), other_python
    )
    (found,) = jobs.vllm("two", 2, "mp")
    assert (
        found["runs"][0]["ids"]
        == timing.generate(models.load(str(folder)), torch.tensor([PROMPT]), NEW).ids
    )
    assert len(found["runs"][0]["stamps_s"]) == NEW
    assert found["threads"] == max(1, torch.get_num_threads() // 2)
    assert sum(found["own_bytes"]) == pytest.approx(memory.weight_bytes(whole), rel=0.01)
    assert max(found["own_bytes"]) < 0.51 * memory.weight_bytes(whole)
