"""Lesson 07: cuts, degrees, the ledger, and ranks that find the same text and leave nothing behind."""

import importlib.util
import os
import runpy
import signal
import subprocess
import sys
import sysconfig
import threading
import types
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import machine, memory, models, results, timing
from helpers.series import launches_07, planner, processes, run

LESSON = "07_multiple_gpus"
PROMPT, NEW, WAIT_S = [5, 60, 700, 8000], 6, 8
ON_CPUS = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what CPU ranks do")


@pytest.fixture(scope="module")
def lesson(definitions):
    return definitions(LESSON)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> Path:
    """The scripts that the lesson's own cells write."""
    folder = tmp_path_factory.mktemp("scripts")
    for cell in nbformat.read(run.NOTEBOOKS / f"{LESSON}.ipynb", 4).cells:
        command, _, source = cell.source.partition("\n")
        if command.startswith("%%writefile"):
            path = folder / Path(command).name
            before = path.read_text() if "-a" in command.split() else ""
            path.write_text(before + source + "\n")
    return folder


def jobs_of(model: str, new_tokens: int = NEW, **more) -> launches_07.Jobs:
    """Launches on CPUs."""
    ids = torch.randint(3, 40_000, (2, 24), generator=torch.Generator().manual_seed(1))
    jobs = launches_07.Jobs(model, "float32", "cpu", PROMPT, ids.tolist(), new_tokens, **more)
    jobs.wait_s = WAIT_S
    return jobs


@pytest.fixture(scope="module")
def launched(tiny_llama, scripts):
    """launched("tp", (1, 1)) -> what each rank found with the tiny LLaMA, under an agent for each
    number; each launch once a module.
    """
    done = {}
    programs = {
        "single": launches_07.WHOLE,
        "offload": launches_07.OFFLOAD,
        "fsdp": scripts / "fsdp.py",
        "tp": scripts / "tensor.py",
    }

    def launch(strategy, nodes):
        if (strategy, nodes) not in done:
            jobs = jobs_of(tiny_llama)
            start = jobs.torchrun if len(nodes) == 1 else jobs.agents
            with start(programs[strategy], nodes[0] if len(nodes) == 1 else nodes) as group:
                done[strategy, nodes] = types.SimpleNamespace(
                    ready=group.ready, runs=group.ask(do="run"), scores=group.ask(do="score")
                )
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


def test_vllm_repeats_the_heads_for_keys_and_values():
    degrees = {
        "falcon-7b": [1],
        "falcon-40b": [1, 2, 4, 8, 16],
        "qwen2.5-1.5b": [1, 2, 4],
        "auto": [1, 3],
    }
    for name, expected in degrees.items():
        assert planner.degrees(planner.describe(name), engine="vllm") == expected


def test_prediction_adds_work_messages_and_bytes(definitions):
    predicted_s = definitions("deeper/07_predicted_speed")["predicted_s"]
    link = {"messages": 10, "sent": 4e6, "message_s": 1e-3, "link_bytes_per_s": 1e9}
    assert predicted_s("tp", 0.4, 2, shared=False, **link) == pytest.approx(0.2 + 0.01 + 0.002)
    assert predicted_s("fsdp", 0.4, 2, shared=True, **link) == pytest.approx(0.8 + 0.01 + 0.002)


def test_gpus_asked_for_by_name_and_not_there_are_an_error(monkeypatch):
    """On one GPU; `auto` gives way to the CPU, whose ranks then see no GPU."""
    monkeypatch.setattr(machine, "pick_device", lambda device: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 GPUs are needed, 1 are here"):
        launches_07.place("cuda", 2)
    assert (launches_07.place("auto", 2), launches_07.place("cuda", 1)) == ("cpu", "cuda")
    assert launches_07.environment({}, "cpu", 1)["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in launches_07.environment({}, "cuda", 1)


def test_two_agents_never_share_a_card(monkeypatch):
    asked = []
    monkeypatch.setattr(launches_07, "Ranks", lambda commands, *_: asked.append(commands))
    jobs = jobs_of("")
    jobs.device = "cuda"
    jobs.agents("script.py", (2, 1))
    ((first, second),) = asked
    assert first[:2] == ["env", "CUDA_VISIBLE_DEVICES=0,1"]
    assert second[:2] == ["env", "CUDA_VISIBLE_DEVICES=2"]


def test_what_one_device_cannot_hold_is_not_started():
    jobs = jobs_of("", rank_bytes=1e9)
    variant = jobs.variant("single", "no-such-script.py", 1, need=2e9)
    with pytest.raises(MemoryError, match=r"a rank needs 2.00 GB, 1.00 GB are there"):
        variant.load()


@pytest.mark.parametrize(
    ("lines", "kind", "sentence"),
    [
        (
            "rank 1 ended with exit code 1; its last lines:\nValueError: this cannot be",
            processes.ServingError,
            "rank 1: this cannot be",
        ),
        (
            "rank 1 was ended by SIGKILL (out of memory?); its last lines:\n(none)",
            MemoryError,
            "out of memory: rank 1 was ended by SIGKILL (out of memory?)",
        ),
        (
            "a.py ended with exit code 1; its last lines:\nRuntimeError: Cannot allocate memory",
            MemoryError,
            "out of memory: Cannot allocate memory",
        ),
        (
            "rank 0 ended with exit code 1; its last lines:\nNotImplementedError: no plan",
            NotImplementedError,
            "rank 0: no plan",
        ),
        (
            "a.py ended with exit code 1; its last lines:\nValueError: cpu does not support ray.",
            NotImplementedError,
            "cpu does not support ray",
        ),
        (
            "a.py ended with exit code 1; its last lines:\nKeyError: 'request-1'",
            processes.ServingError,
            "KeyError: 'request-1'",
        ),
    ],
)
def test_a_launch_fails_as_one_process_would(lines, kind, sentence):
    cause = launches_07.cause(processes.ServingError(lines))
    assert type(cause) is kind and str(cause) == sentence


CUTS = [("fsdp", (2,)), ("tp", (1, 1)), ("offload", (1,))]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "nodes"), CUTS, ids=["fsdp", "tp on two nodes", "offload"])
def test_every_strategy_finds_what_one_process_finds(launched, strategy, nodes):
    whole, group = launched("single", (1,)), launched(strategy, nodes)
    for rank in group.runs:
        assert rank["ids"] == whole.runs[0]["ids"]
    for rank in group.scores:
        assert rank["best"] == whole.scores[0]["best"]
        assert np.allclose(rank["nll"], whole.scores[0]["nll"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "nodes", "least", "most"),
    [("fsdp", (2,), 0.95, 1.1), ("tp", (1, 1), 0.9, 1.7)],
    ids=["fsdp", "tp on two nodes"],
)
def test_bytes_are_split_and_the_ledger_holds(
    launched, lesson, tiny_llama, strategy, nodes, least, most
):
    """What loopback carried, against what the ledger predicts."""
    ranks, weights = launched(strategy, nodes).ready, memory.weight_bytes(models.load(tiny_llama))
    assert sum(rank["own_bytes"] for rank in ranks) == pytest.approx(weights, rel=0.01)
    assert max(rank["own_bytes"] for rank in ranks) < 0.51 * weights
    shape = planner.describe(tiny_llama)
    predicted = lesson["predicted_sent"](strategy, shape, 2, len(PROMPT), NEW, 4)
    assert least < ranks[0]["wire_bytes"] / NEW / predicted < most
    assert all(0 < rank["share"] <= 1 and rank["messages"] > 0 for rank in ranks)


def test_the_copied_script_stops_for_a_model_without_a_plan(tiny_falcon, scripts, monkeypatch):
    """Before it meets other ranks or loads anything."""
    monkeypatch.setattr(sys, "argv", ["copy_me.py", tiny_falcon, "float32", "2"])
    with pytest.raises(SystemExit, match="no plan to cut falcon"):
        runpy.run_path(str(scripts / "copy_me.py"))


@pytest.mark.slow
def test_a_model_without_a_plan_is_unsupported(tiny_falcon, scripts):
    with pytest.raises(NotImplementedError, match="no plan to cut falcon"):
        jobs_of(tiny_falcon).torchrun(scripts / "tensor.py", 2)


@pytest.fixture
def marked(tmp_path, monkeypatch):
    """marked() -> the living processes that this test's launches started; marked(RANK="1"): those
    of one rank.
    """
    mark = f"mark-{tmp_path.name}-{os.getpid()}"
    monkeypatch.setenv("TEST_MARK", mark)

    def living(**more):
        wanted = {"TEST_MARK": mark, **more}.items()
        processes_alive = []
        for process in psutil.process_iter():
            try:
                if process.environ().items() >= wanted and process.status() != "zombie":
                    processes_alive.append(process)
            except psutil.Error:
                continue
        return processes_alive

    return living


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blow", "kind", "sentence"),
    [
        (signal.SIGKILL, MemoryError, "rank 1 was ended by SIGKILL"),
        (signal.SIGSTOP, processes.ServingError, "rank 1: this rank did not answer its peers"),
    ],
    ids=["killed", "hanging"],
)
def test_a_lost_rank_ends_all_and_is_named(tiny_llama, scripts, marked, blow, kind, sentence):
    """Ended by what the ranks find out of each other, long before the deadline would end them."""
    group = jobs_of(tiny_llama, 400).torchrun(scripts / "tensor.py", 2)
    striking = threading.Timer(0.5, lambda: marked(RANK="1")[0].send_signal(blow))
    striking.start()
    with pytest.raises(kind, match=sentence):
        while True:  # a generation is under way when it comes
            group.ask(do="run")
    striking.join()
    assert not marked()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [("dies", "came upon something that it cannot do"), ("hangs", "did not answer its peers")],
)
def test_a_fault_to_see_names_its_rank(tiny_llama, marked, how, said):
    with pytest.raises(processes.ServingError) as caught:
        jobs_of(tiny_llama).fault(how, wait_s=4)
    assert launches_07.reason(caught.value) == f"rank 1: this rank {said}"
    assert not marked()


@pytest.mark.slow
@ON_CPUS
def test_memory_of_a_rank_is_limited_in_fact():
    """Of this whole model 0.54 GB of weights are made from a file of 0.27 GB."""
    path = models.resolve("random:smollm2-135m")
    with pytest.raises(MemoryError, match="allocate memory"):
        jobs_of(path, rank_bytes=2e8).torchrun(launches_07.WHOLE, 1)


@ON_CPUS
def test_lesson_finds_the_same_text_and_the_ledger(run_lesson):
    ran = run_lesson(LESSON)
    rows = {record.variant: record for record in ran.records}
    in_vllm = {"vllm-single", "vllm-tp-3"}
    assert set(rows) == {"single", "fsdp-2", "tp-3", "device-map-offload", *in_vllm}
    assert {name for name, row in rows.items() if row.status == "unsupported"} == in_vllm
    whole = rows["single"]
    for name, least, most in (("fsdp-2", 0.95, 1.1), ("tp-3", 0.9, 1.7)):
        row, details = rows[name], rows[name].details
        assert details["same_text"] and row.agreement > 0.999 and abs(row.nll_delta) < 1e-4
        sent = details["wire_bytes_per_token"] / details["predicted_sent_bytes_per_token"]
        assert least < sent < most
        assert details["rank_weight_bytes"] == row.weight_bytes
        assert row.weight_bytes < 1.1 * whole.weight_bytes / row.world_size
        assert details["rank_peak_bytes"] < whole.details["rank_peak_bytes"]
        assert 0 < details["communication_share"] <= 1 and details["all_ranks_peak_bytes"] < 8e9
    by_bytes, by_messages = rows["fsdp-2"].details, rows["tp-3"].details
    assert by_bytes["wire_bytes_per_token"] > 100 * by_messages["wire_bytes_per_token"]
    assert by_bytes["messages_per_token"] < by_messages["messages_per_token"]
    offload = rows["device-map-offload"]
    assert offload.details["same_text"] and offload.nll_delta == 0
    assert offload.weight_bytes < 0.8 * whole.weight_bytes
    table = results.frame(ran.records).set_index("variant")
    on_cpu = [record.variant for record in ran.records if record.world_size > 1]
    assert not table.loc[on_cpu, "headline"].any() and table.loc["single", "headline"]


@ON_CPUS
def test_lesson_shows_its_own_first_script(run_lesson):
    cells = nbformat.read(run_lesson(LESSON).folder / f"{LESSON}.ipynb", 4).cells
    (script,) = [cell for cell in cells if "copy_me.py" in cell.source and "show" in cell.source]
    assert "tokens/s over 3 ranks (first call, nothing warm)" in str(script.outputs)


@pytest.mark.slow
@ON_CPUS
def test_a_model_that_one_rank_cannot_hold_runs_over_several(run_lesson):
    rows = {
        record.variant: record
        for record in run_lesson(LESSON, MODEL="random:smollm2-135m", RANK_GB=0.5).records
    }
    assert rows["single"].status == "oom"
    assert rows["single"].reason == "a rank needs 0.55 GB, 0.50 GB are there"
    assert {rows[name].status for name in ("fsdp-2", "tp-3", "device-map-offload")} == {"ok"}
    assert rows["tp-3"].baseline == "fsdp-2"  # the first that runs takes the baseline's place


@pytest.mark.slow
@ON_CPUS
def test_a_degree_that_an_engine_refuses_is_one_row_in_its_words(run_lesson):
    rows = {record.variant: record for record in run_lesson(LESSON, TP_RANKS=2).records}
    assert rows["tp-2"].status in ("failed", "unsupported") and "2" in rows["tp-2"].reason
    assert {rows[name].status for name in ("single", "fsdp-2", "device-map-offload")} == {"ok"}


def test_vllm_s_ranks_share_the_threads_that_torch_takes(monkeypatch):
    """On eight cores of which torch takes four, as with two hardware threads a core."""
    asked = []
    monkeypatch.setattr(launches_07, "Ranks", lambda *arguments: asked.append(arguments[3]))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for ranks in (1, 2, 3):
        jobs_of("").vllm(ranks)
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


@ON_CPUS
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_over_two_ranks_of_another_environment_finds_the_same_text(tmp_path, other_python):
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
    with jobs_of(str(folder), vllm_python=other_python).vllm(2) as group:
        found = group.generate()
    expected = timing.generate(models.load(str(folder)), torch.tensor([PROMPT]), NEW)
    assert found.ids == expected.ids and found.new_tokens == NEW
    (ready,) = group.ready
    assert ready["threads"] == max(1, torch.get_num_threads() // 2) and ready["device"] == "cpu"
    assert ready["own_bytes"] == pytest.approx(memory.weight_bytes(whole) / 2, rel=0.02)
    assert ready["group_bytes"] > memory.weight_bytes(whole)
