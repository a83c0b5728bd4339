"""Lesson 06: the simulator, the same text from every scheduler, servers good and bad, and nothing
left running.
"""

import contextlib
import http.server
import importlib.util
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import types

import nbformat
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import models, results
from helpers.series import processes, run
from helpers.workers import client_06, engines_06_client

LESSON = "06_continuous_batching"

HEADLINE = [
    "one-by-one",
    "static-transformers",
    "static-vllm",
    "continuous-vllm",
    "continuous-transformers",
    "continuous-openvino",
    "continuous-llamacpp",
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


def makespan(spans):
    return max(end for *_, end in spans)


def test_simulator_by_hand():
    assert simulate([3, 1, 2], 2, False) == [(0, 0, 3), (1, 0, 1), (0, 3, 5)]
    assert simulate([3, 1, 2], 2, True) == [(0, 0, 3), (1, 0, 1), (1, 1, 3)]
    assert simulate([2], 4, True, lambda running: 10.0 * running, admit_s=1.0) == [(0, 0.0, 21.0)]


@settings(deadline=None, max_examples=60)
@given(LENGTHS, SLOTS, st.booleans())
def test_simulator_serves_everyone_in_slots_that_do_not_overlap(lengths, slots, continuous):
    spans = simulate(lengths, slots, continuous)
    assert [end - start for _, start, end in spans] == lengths
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


def test_rows_of_the_timeline_do_not_overlap():
    assert OWN["in_rows"]([(0, 1, 3), (0, 1, 1), (1, 2, 3), (3, 4, 5)]) == [0, 1, 1, 0]


class StandInEngine:
    """Steps as vLLM's engine with asynchronous scheduling does: the first gives nothing yet. Each
    later step gives every request its next token.
    """

    def __init__(self):
        self.llm_engine = self
        self.steps, self.asked = 0, {}

    def add_request(self, name, prompt, wanted):
        self.asked[name] = wanted.max_tokens

    def has_unfinished_requests(self):
        return self.steps <= max(self.asked.values())

    def step(self):
        self.steps += 1
        given = self.steps - 1
        return [self.output(name, given) for name, n in self.asked.items() if 0 < given <= n]

    def output(self, name, given):
        answer = types.SimpleNamespace(token_ids=list(range(given)))
        return types.SimpleNamespace(request_id=name, outputs=[answer])


def test_a_step_that_gives_no_token_is_no_stamp():
    """`SamplingParams` and the numbers of requests are made where the lesson runs: stand-ins here."""
    stepped = OWN["stepped"]
    stepped.__globals__.update(SamplingParams=types.SimpleNamespace, serial=itertools.count())
    answers, ends = stepped(StandInEngine(), [[1], [1, 2]], [3, 5])
    assert [len(ids) for ids, *_ in answers] == [3, 5]
    assert len(ends) == 5 and ends == sorted(ends)
    assert [last for *_, last in answers] == [ends[2], ends[4]]


def test_every_section_left_its_records(records):
    assert set(HEADLINE) <= set(records)
    assert {
        "batch-1",
        "batch-4",
        "prefix-cache-off",
        "prefix-cache-on",
        "threads-all",
        "threads-default",
        "rate-2",
        "rate-8",
    } <= set(records)
    assert {r.sweep for r in records.values()} == {
        None,
        "batch_size",
        "prefix_cache",
        "threads",
        "request_rate",
    }
    for name, base in (
        ("static-transformers", "one-by-one"),
        ("continuous-transformers", "static-transformers"),
    ):
        assert records[name].baseline == base and records[name].pairs and records[name].speedup > 0
    for name in HEADLINE:
        if records[name].status == "ok":
            said = records[name].details
            assert (
                said["useful_tokens"] == records["one-by-one"].details["useful_tokens"]
                and said["precision"]
            )
            low, high = (said["useful_tokens"] / end(records[name].latency_s) for end in (max, min))
            assert 0.999 * low <= records[name].tokens_per_s <= 1.001 * high


@needs_vllm
def test_schedulers_change_no_word(records):
    for name in (
        "one-by-one",
        "static-transformers",
        "static-vllm",
        "continuous-vllm",
        "continuous-transformers",
    ):
        assert records[name].status == "ok", records[name].reason
        assert records[name].details["same_text_share"] == 1.0, name
    for name in (
        "continuous-openvino",
        "continuous-llamacpp",
    ):  # 4-bit weights, activations in 8 bits; short answers
        if records[name].status == "ok":
            assert records[name].details["same_text_share"] > 0.1, name


@needs_vllm
def test_factors_multiply_and_paging_reserves_less(records):
    said = records["continuous-vllm"].details
    engine = records["static-vllm"].details["engine_factor"]
    assert engine * said["scheduler_factor"] == pytest.approx(said["total_factor"], rel=1e-6)
    assert said["scheduler_factor"] == pytest.approx(records["continuous-vllm"].speedup)
    assert said["simulated_scheduler_factor"] > 0 and said["simulated_step_factor"] >= 1
    assert said["kv_bytes_per_token"] == said["engine_kv_bytes_per_token"] == 46_080
    assert 0 < said["reserved_paged_bytes"] < said["reserved_contiguous_bytes"]


@needs_vllm
def test_batches_and_prefixes_were_measured_in_vllm(records):
    for name in ("batch-1", "batch-4", "prefix-cache-off", "prefix-cache-on"):
        assert records[name].engine == "vllm" and records[name].tokens_per_s > 0
    for name in ("batch-1", "batch-4"):
        assert records[name].moved_bytes_per_s > 0
        assert records[name].details["transformers_tokens_per_s"] > 0


@needs_vllm
def test_load_was_measured_without_a_failure(records):
    for name in ("rate-2", "rate-8"):
        row, said = records[name], records[name].details
        assert row.status == "ok", row.reason
        assert row.tokens_per_s > 0 and said["failed_requests"] == 0
        assert 0 < said["ttft_p50_s"] <= said["ttft_p95_s"] <= said["ttft_p99_s"]
        assert 0 <= said["goodput_per_s"] <= 8.5


def printed_by(notebook) -> str:
    """All that an executed copy printed."""
    outputs = [out for cell in nbformat.read(notebook, 4).cells for out in cell.get("outputs", [])]
    return "".join(out.get("text", "") for out in outputs)


def test_nothing_of_it_is_left_running(ran):
    """Orphans too, so all processes are asked, and the port that the server had."""
    said = printed_by(ran.folder / f"{LESSON}.ipynb")
    words = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    assert not [w for w in words if "helpers/workers" in w or "tuned=" in w]
    if importlib.util.find_spec("vllm"):
        port = int(re.search(r"api_server on port (\d+)", said).group(1))
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_goodput_and_failures_by_hand():
    found = {
        "ttfts": [0.1, 2.0, 0.2, 0.0],
        "itls": [[0.1, 0.1], [0.1], [0.5], []],
        "errors": ["", "", "", "refused"],
        "duration": 2.0,
    }
    said = client_06.summary(found, 1.0, 0.2)
    assert said["failed_requests"] == 1 and said["goodput_per_s"] == 0.5
    assert said["ttft_p50_s"] == 0.2 and said["inter_token_p99_s"] <= 0.5
    nobody = client_06.summary(found | {"errors": ["x"] * 4}, 1.0, 0.2)
    assert (
        nobody["failed_requests"] == 4
        and nobody["goodput_per_s"] == 0
        and nobody["ttft_p50_s"] is None
    )


@contextlib.contextmanager
def bad_server(how: str):
    """A server that refuses fields, wants another key, talks nonsense, or never answers; its
    address.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            if how == "hangs":
                time.sleep(3)
                return
            code, body = {
                "refuses": (422, b"Unexpected keys in the request: ignore_eos"),
                "key": (401, b"{}"),
                "nonsense": (200, b"good day"),
                "not json": (200, b"data: {good day}\n\n"),
            }[how]
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            "refuses",
            r"refuses the fields that the load generator sends \(HTTP 422: Unexpected keys.*ignore_eos\)",
        ),
        ("key", "wants another key than OPENAI_API_KEY"),
        ("nonsense", "is no completion"),
        ("not json", "is no completion"),
        ("hangs", "did not answer within 1 s"),
    ],
)
@pytest.mark.parametrize("model", ["base", ""])
def test_a_server_that_cannot_be_measured_gets_one_sentence(how, said, model):
    with bad_server(how) as url:
        _, why = client_06.refusal(url, {}, model, timeout_s=1)
    assert why.startswith(url) and "\n" not in why
    assert re.search(said, why), why


@pytest.mark.slow
def test_an_address_where_nobody_listens_stops_the_lesson_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(Exception, match=rf"SERVER_URL: http://127.0.0.1:{port} cannot be reached"):
        run.execute(
            run.NOTEBOOKS / f"{LESSON}.ipynb",
            tmp_path / "out.ipynb",
            {"SERVER_URL": f"http://127.0.0.1:{port}", "RESULTS_DIR": str(tmp_path / "r")},
        )
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"MAX_LENGTH": 99999}, "MAX_LENGTH=99999 must hold the longest text .* and fit the model"),
        ({"NEW_TOKENS": 1}, "NEW_TOKENS=1 must be at least 2: a step"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(tmp_path, given, sentence):
    with pytest.raises(Exception, match=sentence):
        run.execute(
            run.NOTEBOOKS / f"{LESSON}.ipynb",
            tmp_path / "out.ipynb",
            given | {"RESULTS_DIR": str(tmp_path / "r")},
        )
    assert not list(tmp_path.rglob("*.json"))


LLAMACPP = """
import os, sys, time
import xllamacpp as engine
params = engine.CommonParams()
params.model.path, params.fit_params, params.verbosity = sys.argv[1], False, -1
params.n_parallel, params.n_ctx, params.hostnames, params.port = 2, 1024, ["127.0.0.1"], int(sys.argv[2])
params.api_keys = [os.environ["LLAMA_KEY"]]
server = engine.Server(params)
while True:
    time.sleep(1)
"""


@pytest.fixture(scope="module")
def llamacpp():
    """A second real server: llama.cpp's."""
    pytest.importorskip("xllamacpp")
    with processes.server(
        [sys.executable, "-c", LLAMACPP, models.default_gguf(), "{port}"],
        key_variable="LLAMA_KEY",
        ready_s=60,
    ) as server:
        yield server


@pytest.mark.slow
def test_streaming_client_on_llamacpp(llamacpp):
    model, why = client_06.refusal(llamacpp.url, llamacpp.headers, "")
    assert model and why is None
    body = {
        "model": model,
        "prompt": "The capital of France is",
        "max_tokens": 6,
        **client_06.FIELDS,
    }
    pieces = list(client_06.stream(llamacpp.url, llamacpp.headers, body))
    stamps = [at for at, _ in pieces]
    assert stamps == sorted(stamps) and "Paris" in "".join(text for _, text in pieces)
    assert "another key" in client_06.refusal(llamacpp.url, {}, model)[1]


@needs_vllm
@pytest.mark.slow
def test_load_generator_on_llamacpp(llamacpp, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", DEAD_PROXY)
    asked = {
        "tokenizer": models.resolve(),
        "texts": ["The capital of France is", "I am so fast that I can"] * 2,
        "lengths": [4, 6, 5, 7],
        "rates": [20],
        "count": 4,
        "seed": 0,
    }
    model, _ = client_06.refusal(llamacpp.url, llamacpp.headers, "")
    found = client_06.load(
        llamacpp.url, llamacpp.api_key, model, sys.executable, asked, tmp_path, 120
    )[20]
    assert client_06.summary(found, 10.0, 10.0)["failed_requests"] == 0
    assert len(found["ttfts"]) == 4
    assert (
        20 <= found["total_output_tokens"] <= 22
    )  # of a server that is not vLLM it counts the text, tokenized anew


@needs_vllm
@pytest.mark.slow
def test_lesson_measures_another_server_and_says_what_it_left_out(llamacpp, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", llamacpp.api_key)
    notebook = run.NOTEBOOKS / f"{LESSON}.ipynb"
    run.execute(
        notebook,
        tmp_path / "out.ipynb",
        run.smoke_parameters(notebook)
        | {
            "RUN_VLLM": False,
            "SERVER_URL": llamacpp.url,
            "RATES": [8],
            "RESULTS_DIR": str(tmp_path),
        },
    )
    records = {r.id: r for r in results.read(next(tmp_path.rglob(f"{LESSON}.json"))).records}
    assert records["rate-8"].engine == "another server" and records["rate-8"].tokens_per_s > 0
    assert records["rate-8"].details["failed_requests"] == 0
    for name in ("static-vllm", "continuous-vllm", "prefix-cache-on", "threads-all"):
        assert (records[name].status, records[name].reason) == ("unsupported", "RUN_VLLM is off")
    assert records["batch-4"].engine == "transformers"
    scheduled = records["continuous-transformers"]
    assert scheduled.status == "ok" and scheduled.baseline == "static-transformers"
    assert scheduled.details["scheduler_factor"] == pytest.approx(scheduled.speedup)
    assert scheduled.details["simulated_scheduler_factor"] > 0
    assert "scheduler_factor" not in records["continuous-vllm"].details
    printed = printed_by(tmp_path / "out.ipynb")
    assert re.search(r"^scheduler .*\(in transformers\)$", printed, re.MULTILINE)
    assert "the scheduler, in transformers: " in printed


@needs_vllm
def test_a_load_that_fails_says_so_and_leaves_nothing(tmp_path):
    asked = {
        "tokenizer": models.resolve(),
        "texts": ["Well,"] * 3,
        "lengths": [4] * 3,
        "rates": [20],
        "count": 3,
        "seed": 0,
    }
    with (
        bad_server("hangs") as url,
        pytest.raises(processes.ServingError, match=r"load_06\.py") as caught,
    ):
        client_06.load(url, "", "base", sys.executable, asked, tmp_path, 30)
    assert str(caught.value).splitlines()[0].startswith("load_06.py")
    assert not [
        p
        for p in psutil.Process().children(recursive=True)
        if "load_06.py" in " ".join(p.cmdline())
    ]


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
