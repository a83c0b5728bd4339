"""Lesson 06: the simulator, the same text from every scheduler, what is kept of a workload, and
nothing left running.
"""

import http.server
import importlib.util
import itertools
import json
import os
import re
import socket
import sys
import tempfile
import threading
import types

import nbformat
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import machine, memory, models, results, timing
from helpers.series import run, serving
from helpers.workers import engines_06_client, requests_06, vllm_06
from helpers.workers.requests_06 import Answer, Workload

LESSON = "06_continuous_batching"
HEADLINE = [
    "one-by-one",
    "static-transformers",
    "continuous-transformers",
    "static-vllm",
    "continuous-vllm",
    "continuous-vllm-paged",
]
OWN = run.definitions(LESSON)
simulate = OWN["simulate"]
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)
LENGTHS, SLOTS = st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 9)
DEAD_PROXY = "http://127.0.0.1:9"  # nobody listens there


@pytest.fixture(scope="module")
def ran(run_lesson):
    """The lesson, run where a proxy is set that would swallow every request."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("http_proxy", DEAD_PROXY)
        return run_lesson(LESSON)


@pytest.fixture(scope="module")
def records(ran):
    return {r.id: r for r in ran.records}


# ---- the simulator


def makespan(spans):
    return max(end for *_, end in spans)


def test_simulator_by_hand():
    assert simulate([3, 1, 2], 2, False) == [(0, 0, 3), (1, 0, 1), (0, 3, 5)]
    assert simulate([3, 1, 2], 2, True) == [(0, 0, 3), (1, 0, 1), (1, 1, 3)]
    assert simulate([2], 4, True, lambda running: 10.0 * running, admit_s=1.0) == [(0, 0.0, 21.0)]


def test_arrivals_by_hand():
    """The second comes while the first runs, the third when nobody is there."""
    arrivals = [0.0, 1.0, 9.0]
    assert simulate([4, 2, 1], 2, True, arrivals=arrivals) == [(0, 0, 4), (1, 1, 3), (0, 9, 10)]
    assert simulate([4, 2, 1], 2, False, arrivals=arrivals) == [(0, 0, 4), (0, 4, 6), (0, 9, 10)]


@settings(deadline=None, max_examples=60)
@given(LENGTHS, SLOTS, st.booleans(), st.integers(0, 60))
def test_simulator_serves_everyone_in_slots_that_do_not_overlap(lengths, slots, continuous, over):
    arrivals = np.random.default_rng(over).uniform(0, over, len(lengths)).tolist()
    spans = simulate(lengths, slots, continuous, arrivals=arrivals)
    assert [end - start for _, start, end in spans] == pytest.approx(lengths)
    assert all(start >= came for (_, start, _), came in zip(spans, arrivals, strict=True))
    assert max(slot for slot, *_ in spans) < slots
    for slot in range(slots):
        own = sorted((start, end) for s, start, end in spans if s == slot)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(own))


@settings(deadline=None, max_examples=60)
@given(LENGTHS, SLOTS)
def test_continuous_is_never_slower_and_never_better_than_full_slots(lengths, slots):
    static, continuous = (makespan(simulate(lengths, slots, way)) for way in (False, True))
    assert max(max(lengths), sum(lengths) / slots) <= continuous <= static
    assert static == sum(max(lengths[at : at + slots]) for at in range(0, len(lengths), slots))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), SLOTS, st.integers(1, 5))
def test_equal_lengths_gain_nothing(length, slots, batches):
    equal = [length] * (slots * batches)
    assert makespan(simulate(equal, slots, True)) == makespan(simulate(equal, slots, False))


# ---- requests, and what comes of them


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 40), st.integers(0, 5))
def test_a_workload_keeps_its_bounds(count, mean, cap, seed):
    book = list(range(200))
    workload = requests_06.draw(book, count, mean, cap, seed)
    assert workload == requests_06.draw(book, count, mean, cap, seed)
    assert len(workload.prompts) == len(workload.lengths) == count
    assert 1 <= min(workload.lengths) and max(workload.lengths) <= cap
    for prompt in workload.prompts:
        assert requests_06.LEAST <= len(prompt) <= requests_06.MOST
        assert prompt == book[prompt[0] : prompt[0] + len(prompt)]
    part = requests_06.every_nth(workload.lengths)
    assert part == sorted(set(part)) and 0 <= part[0] and part[-1] < count


def test_a_run_takes_groups_in_turn_and_counts_tokens():
    """Two groups: what the second waits for the first is in its times."""
    workload = Workload([[1]] * 3, [2, 1, 3])

    def serve(prompts, lengths):
        return [Answer(0.0, [7] * n, [0.5 * i for i in range(1, n + 1)]) for n in lengths]

    one = requests_06.run_workload(serve, workload, [[0, 1], [2]])
    assert [len(ids) for ids in one.ids] == workload.lengths
    assert one.useful == 6 and one.tokens_per_s == pytest.approx(6 / one.latency_s)
    assert one.answers[2].start_s > one.answers[0].start_s
    part = requests_06.run_workload(serve, workload, [[0]])
    assert part.tokens_per_s == pytest.approx(6 / part.latency_s) and list(part.answers) == [0]
    with pytest.raises(RuntimeError, match="is EOS unset"):
        requests_06.run_workload(lambda p, n: [Answer(0.0, [7], [0.5])], workload, [[0]])


def test_a_part_s_time_is_scaled_by_tokens(monkeypatch):
    """A clock that is moved by hand: one second for a third of the tokens."""
    now = [0.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda seconds: None)
    monkeypatch.setattr(requests_06, "time", clock)

    def serve(prompts, lengths):
        now[0] += 1.0
        return [Answer(0.0, [7] * n, [1.0] * n) for n in lengths]

    one = requests_06.run_workload(serve, Workload([[1]] * 3, [2, 1, 3]), [[0]])
    assert one.latency_s == pytest.approx(3.0)


def test_rows_of_the_timeline_do_not_overlap():
    spans = [(0, 3), (0, 1), (1, 3), (3, 5)]
    answers = [Answer(start, [1], [end]) for start, end in spans]
    assert serving.rows_of(answers) == [0, 1, 1, 0]


def series_of(*runs: requests_06.Run) -> timing.Series:
    return timing.Series(runs=list(runs))


def a_run(answers: list[Answer], useful: int) -> requests_06.Run:
    ids = [answer.ids for answer in answers]
    return requests_06.Run(2.0, [2.0], 0, ids=ids, answers=dict(enumerate(answers)), useful=useful)


def test_waits_are_of_whole_workloads_only():
    answers = [Answer(0.0, [1, 1], [0.5, 1.0]), Answer(0.0, [1], [1.5])]
    rounds = {
        "whole": series_of(a_run(answers, 3)),
        "part": series_of(a_run(answers[:1], 3)),
        "none": timing.Series(status="unsupported", reason="no"),
    }
    table = serving.waits(rounds)
    assert list(table.index) == ["whole"]
    assert table.loc["whole"].tolist() == [1.0, 1.5, 1.25, 0.5]


@pytest.fixture(scope="module")
def tiny(tiny_llama):
    """The tiny model, two prompts and its own greedy answers to them."""
    net = models.load(tiny_llama, torch.float32, "cpu")
    workload = Workload([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16, 17]], [5, 4])
    answers = requests_06.static_batch(net, *workload)
    return net, workload, answers


def test_a_padded_batch_answers_as_each_alone():
    """Weights so large that every token of a context counts; a tied head would repeat itself."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.5}
    net = LlamaForCausalLM(LlamaConfig(**sizes, **layers)).eval()
    net.generation_config = models.greedy_config(net)
    workload = Workload([[5, 6, 7], list(range(10, 22))], [8, 5])
    answers = requests_06.static_batch(net, *workload)
    for prompt, length, answer in zip(*workload, answers, strict=True):
        alone = timing.generate(net, torch.tensor([prompt]), length)
        assert answer.ids == alone.ids[0] and len(answer.stamps_s) == 1


def test_a_text_that_parts_is_seen_with_its_gap(tiny):
    net, workload, answers = tiny
    other = Answer(0.0, [*answers[0].ids[:2], 99, *answers[0].ids[3:]], [1.0])
    rounds = {
        "same": series_of(a_run(answers, 9)),
        "parted": series_of(a_run([other, answers[1]], 9)),
        "one-read": series_of(a_run(answers, 9)),
    }
    table = serving.read_texts(net, workload, rounds, 100)
    assert table["same text"].tolist() == [2, 1, 2]
    assert table["largest gap (nats)"].tolist()[::2] == [0.0, 0.0]
    assert table.loc["parted", "largest gap (nats)"] > 0
    assert serving.read_texts(net, workload, rounds, 1)["of"].tolist() == [1, 1, 1]


def test_lengths_that_cannot_work_are_refused_in_one_sentence(tiny_llama):
    shape = serving.shape_of(tiny_llama, "cpu")
    with pytest.raises(ValueError, match=r"MAX_LENGTH=99999 must hold .* and fit the model"):
        serving.check_lengths(shape, 16, 96, 99999)
    with pytest.raises(ValueError, match=r"MAX_LENGTH=64 must hold the longest text \(112 tokens"):
        serving.check_lengths(shape, 16, 96, 64)
    with pytest.raises(ValueError, match="NEW_TOKENS=1 must be at least 2: a step"):
        serving.check_lengths(shape, 1, 96, 512)
    serving.check_lengths(shape, 16, 96, 512)


def test_a_model_s_bytes_are_those_of_its_weights(tiny_llama, tiny):
    net, _, _ = tiny
    shape = serving.shape_of(tiny_llama, "cpu")
    assert shape.weight_bytes == memory.weight_bytes(net) and shape.dtype == torch.float32
    cache = net(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert shape.step_bytes(1, 3) - shape.step_bytes(1, 0) == held


def test_the_articles_seconds_stand_beside_this_machines():
    server = types.SimpleNamespace(details={"ready_s": 9.0, "request_s": 1.5, "request_50_s": 2.5})
    table = serving.beside_published(server)
    assert table.loc["beam search, n=4"].tolist() == ["llama-7b", 0.277, 1.5]
    assert table.loc["50 new tokens"].tolist() == ["falcon-40b", 3.148, 2.5]
    nothing = serving.beside_published(types.SimpleNamespace(details={}))
    assert len(nothing) == 2 and nothing["here (s)"].isna().all()


# ---- vLLM in this process, without vLLM


class StandInEngine:
    """Steps as vLLM's engine with asynchronous scheduling does: the first gives nothing yet. Each
    later step gives every request its next token; each request is put back once.
    """

    def __init__(self):
        self.steps, self.asked = 0, {}
        manager = types.SimpleNamespace(usage=0.25)
        scheduler = types.SimpleNamespace(max_num_running_reqs=9, kv_cache_manager=manager)
        scheduler.requests = {}
        self.llm_engine = self
        self.engine_core = types.SimpleNamespace(engine_core=self)
        self.scheduler = scheduler

    def add_request(self, name, prompt, wanted):
        self.asked[name] = wanted.max_tokens
        preempted = types.SimpleNamespace(request_id=name, num_preemptions=1)
        self.scheduler.requests[name] = preempted

    def has_unfinished_requests(self):
        return self.steps <= max(self.asked.values())

    def step(self):
        self.steps += 1
        given = self.steps - 1
        return [self.output(name, given) for name, n in self.asked.items() if 0 < given <= n]

    def output(self, name, given):
        answer = types.SimpleNamespace(token_ids=list(range(given)))
        return types.SimpleNamespace(request_id=name, outputs=[answer])


@pytest.fixture
def stand_in(monkeypatch):
    """An engine that is stepped as vLLM's; `SamplingParams` is vLLM's too, and not needed here."""
    stub = types.SimpleNamespace(SamplingParams=types.SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", stub)
    return StandInEngine()


def test_a_step_that_gives_no_token_is_no_stamp(stand_in):
    steps = vllm_06.step_through(stand_in, [[1], [1, 2]], [3, 5], slots=4)
    assert [len(answer.ids) for answer in steps.answers] == [3, 5]
    assert [len(answer.stamps_s) for answer in steps.answers] == [3, 5]
    assert len(steps.ends_s) == len(steps.cache_share) == 5
    assert steps.ends_s == sorted(steps.ends_s)
    assert [answer.stamps_s[-1] for answer in steps.answers] == [steps.ends_s[2], steps.ends_s[4]]
    assert steps.preemptions == 2 and stand_in.scheduler.max_num_active_reqs == 4


def test_what_was_taken_of_a_cache_is_the_most_and_the_mean():
    steps = vllm_06.Steps([], [1.0, 2.0], [0.25, 0.75])
    said = vllm_06.cache_use(steps, 1000)
    assert list(said.values()) == [1000, 750, 500]


def test_an_engine_that_cannot_start_says_so_once():
    tries = []

    def start():
        tries.append(1)
        raise ValueError("no room\nmore lines")

    host = vllm_06.Host(start, "cpu")
    for _ in range(2):
        with pytest.raises(NotImplementedError, match=r"vLLM could not start here: .*no room$"):
            host()
    assert tries == [1]
    with pytest.raises(NotImplementedError, match="RUN_VLLM is off"):
        vllm_06.Host(start, "cpu", wanted=False)()


def test_one_engine_at_a_time_and_room_is_made_before(capsys):
    events = []

    def start(**settings):
        core = types.SimpleNamespace(shutdown=lambda: events.append("closed"))
        events.append(f"started {settings}")
        return types.SimpleNamespace(llm_engine=types.SimpleNamespace(engine_core=core))

    host = vllm_06.Host(start, "cpu")
    host.make_room = lambda: events.append("room")
    first = host(size=1)
    assert host(size=1) is first and host(size=2) is not first
    host.close()
    host.close()
    one, other = "started {'size': 1}", "started {'size': 2}"
    assert events == ["room", one, "closed", "room", other, "closed"]
    assert capsys.readouterr().out.count("came back") == 2


def test_a_card_gets_what_was_asked_for_and_not_nine_tenths(monkeypatch, tiny_llama):
    card = types.SimpleNamespace(total_memory=24_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert vllm_06.share_of_card(3_000_000_000, "cuda") == pytest.approx(5.8 / 24)
    assert vllm_06.share_of_card(90_000_000_000, "cuda") == 0.9
    shape = serving.shape_of(tiny_llama, "cpu")
    settings = vllm_06.fitted(shape, "cuda", 4096, 512, 8)
    assert settings["gpu_memory_utilization"] < 0.2 and not settings["enforce_eager"]
    assert next(iter(settings)) == "max_model_len"  # what follows it is the comparison's own
    assert settings["kv_cache_memory_bytes"] == (4096 + 16) * shape.token_bytes


def test_settings_as_options_of_vllm_serve():
    words = vllm_06.as_options({"max_model_len": 9, "enforce_eager": True, "enable_x": False})
    assert words == ["--max-model-len=9", "--enforce-eager", "--no-enable-x"]


def test_a_long_folder_for_temporary_files_leaves_room_for_sockets(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 100)
    assert vllm_06.server_environment()["VLLM_RPC_BASE_PATH"] == "/tmp"
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert "VLLM_RPC_BASE_PATH" not in vllm_06.server_environment()


def test_curl_passes_its_key_by_no_proxy_and_no_list_of_processes(monkeypatch):
    seen = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            seen["key"] = self.headers["Authorization"]
            seen["body"] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            own = psutil.Process().children(recursive=True)
            seen["words"] = " ".join(" ".join(child.cmdline()) for child in own)
            body = json.dumps({"choices": [{"text": "well"}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, DEAD_PROXY)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        place = types.SimpleNamespace(
            url=f"http://127.0.0.1:{server.server_port}", api_key="a-secret-of-this-run"
        )
        seconds, texts = vllm_06.curl(place, {"prompt": "x"})
    finally:
        server.shutdown()
        server.server_close()
    assert texts == ["well"] and seen["body"] == {"prompt": "x"} and seconds > 0
    assert seen["key"] == "Bearer a-secret-of-this-run"
    assert "curl" in seen["words"] and "a-secret" not in seen["words"]


# ---- which model


def cell_with(text: str) -> str:
    cells = nbformat.read(run.NOTEBOOKS / f"{LESSON}.ipynb", 4).cells
    return next(cell.source for cell in cells if cell.cell_type == "code" and text in cell.source)


@pytest.mark.parametrize(
    ("device", "model", "offline"),
    [("cpu", "auto", True), ("cuda", "auto", False), ("cpu", "Qwen/Qwen2.5-1.5B", False)],
)
def test_the_hub_is_left_out_only_where_it_is_not_needed(monkeypatch, device, model, offline):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(machine, "pick_device", lambda wanted: device)
    exec(cell_with("HF_HUB_OFFLINE"), {"DEVICE": "auto", "MODEL": model})
    assert ("HF_HUB_OFFLINE" in os.environ) == offline


# ---- the lesson, run


def test_every_section_left_its_records(records):
    assert {*HEADLINE, "batch-1", "batch-4", "server"} <= set(records)
    assert {r.sweep for r in records.values()} == {None, "batch_size", "server"}
    for name, base in (
        ("static-transformers", "one-by-one"),
        ("continuous-transformers", "static-transformers"),
    ):
        assert records[name].baseline == base and records[name].pairs and records[name].speedup > 0
    for name in HEADLINE:
        if records[name].status == "ok":
            details = records[name].details
            assert details["useful_tokens"] == records["one-by-one"].details["useful_tokens"]
            assert details["precision"] == "float32" and records[name].weight_bytes > 0
            slowest, fastest = max(records[name].latency_s), min(records[name].latency_s)
            useful = details["useful_tokens"]
            speed = records[name].tokens_per_s
            assert 0.999 * useful / slowest <= speed <= 1.001 * useful / fastest


@needs_vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="in 16 bits a tie may break another way")
def test_schedulers_change_no_word(records):
    for name in HEADLINE:
        assert records[name].status == "ok", records[name].reason
        assert records[name].details["same_text_share"] == 1.0, name


@needs_vllm
def test_factors_multiply(records):
    details = records["continuous-vllm"].details
    engine = records["static-vllm"].details["engine_factor"]
    assert engine * details["scheduler_factor"] == pytest.approx(details["total_factor"], rel=1e-6)
    assert details["scheduler_factor"] == pytest.approx(records["continuous-vllm"].speedup)
    assert details["simulated_scheduler_factor"] > 0 and details["simulated_step_factor"] >= 1
    paged = records["continuous-vllm-paged"]
    assert paged.baseline == "continuous-vllm"
    assert paged.details["paging_factor"] == pytest.approx(paged.speedup)


def test_the_committed_figures_are_as_good_as_the_article_s_idea_asks():
    """Of the reference run: the scheduler reaches what is simulated, and vLLM beats static batching
    in transformers by far.
    """
    (folder,) = (run.NOTEBOOKS / "results").glob(f"*/{models.DEFAULT}")
    committed = {r.id: r for r in results.read(folder / f"{LESSON}.json").records}
    details = committed["continuous-vllm"].details
    assert details["scheduler_factor"] >= 0.9 * details["simulated_scheduler_factor"]
    assert details["total_factor"] >= 2.5


@needs_vllm
def test_pages_hold_more_requests_in_the_same_memory(records):
    slots, pages = records["continuous-vllm"].details, records["continuous-vllm-paged"].details
    assert slots["kv_reserved_bytes"] == pages["kv_reserved_bytes"]
    assert slots["slots"] < pages["slots"]
    for details in (slots, pages):
        mean, most = details["kv_used_mean_bytes"], details["kv_used_peak_bytes"]
        assert 0 < mean <= most <= details["kv_reserved_bytes"]
    assert slots["kv_used_peak_bytes"] < pages["kv_used_peak_bytes"]


@needs_vllm
def test_batches_were_measured_in_vllm(records):
    for name in ("batch-1", "batch-4"):
        assert records[name].engine == "vllm" and records[name].tokens_per_s > 0
        assert records[name].moved_bytes_per_s > 0


@needs_vllm
def test_the_server_was_asked_what_the_article_asks(records):
    server = records["server"]
    assert server.status == "ok", server.reason
    assert all(server.details[name] > 0 for name in ("ready_s", "request_s", "request_50_s"))


def printed_by(notebook) -> str:
    """All that an executed copy printed."""
    outputs = [out for cell in nbformat.read(notebook, 4).cells for out in cell.get("outputs", [])]
    return "".join(out.get("text", "") for out in outputs)


def test_nothing_of_it_is_left_running(ran):
    """Orphans too, so all processes are asked, and the port that the server had."""
    printed = printed_by(ran.folder / f"{LESSON}.ipynb")
    if importlib.util.find_spec("vllm"):
        port = int(re.search(r"api_server on port (\d+)", printed).group(1))
        words = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
        assert not [line for line in words if "api_server" in line and str(port) in line]
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


def run_with(folder, **parameters) -> dict[str, results.Record]:
    notebook = run.NOTEBOOKS / f"{LESSON}.ipynb"
    given = run.smoke_parameters(notebook) | parameters | {"RESULTS_DIR": str(folder)}
    given["FIGURES_DIR"] = str(folder / "figures")
    run.execute(notebook, folder / "out.ipynb", given)
    return {r.id: r for r in results.read(next(folder.rglob(f"{LESSON}.json"))).records}


@pytest.mark.slow
def test_without_vllm_the_scheduler_is_measured_in_transformers(tmp_path):
    records = run_with(tmp_path, RUN_VLLM=False)
    for name in ("static-vllm", "continuous-vllm", "continuous-vllm-paged", "server"):
        assert (records[name].status, records[name].reason) == ("unsupported", "RUN_VLLM is off")
    assert records["batch-4"].engine == "transformers"
    scheduled = records["continuous-transformers"]
    assert scheduled.status == "ok" and scheduled.baseline == "static-transformers"
    assert scheduled.details["scheduler_factor"] == pytest.approx(scheduled.speedup)
    assert scheduled.details["simulated_scheduler_factor"] > 0
    assert "scheduler_factor" not in records["continuous-vllm"].details
    printed = printed_by(tmp_path / "out.ipynb")
    assert re.search(r"^scheduler_factor: .*\(continuous-transformers\)$", printed, re.MULTILINE)


@needs_vllm
@pytest.mark.slow
def test_a_shape_without_weights_is_served_too(tmp_path):
    records = run_with(tmp_path, MODEL="random:tiny-llama")
    for name in HEADLINE:
        assert records[name].status == "ok", records[name].reason
    assert records["continuous-vllm"].model == "random:tiny-llama"


# ---- engines that have a process of their own (deeper/06_engines)


def test_worker_that_cannot_start_is_said(tmp_path):
    with pytest.raises(NotImplementedError, match="the engine ended with code"):
        engines_06_client.Worker("llamacpp", tmp_path / "nothing.gguf", 1, 2, 64)


@pytest.mark.parametrize(
    ("engine", "package"), [("openvino", "openvino_genai"), ("llamacpp", "xllamacpp")]
)
def test_worker_gives_every_request_its_own_length(engine, package):
    pytest.importorskip(package)
    worker = engines_06_client.Worker(
        engine, models.default_gguf(), len(os.sched_getaffinity(0)), 2, 256
    )
    try:
        prompts = models.tokenizer()(
            ["The capital of France is", "One, two, three,", "I am so"]
        ).input_ids
        found = worker(prompts, [4, 9, 2])
    finally:
        worker.close()
    assert [len(ids) for ids, *_ in found] == [4, 9, 2]
    assert all(0 <= start <= first <= end for _, start, first, end in found)
    assert worker.process.returncode is not None and json.dumps(found)
