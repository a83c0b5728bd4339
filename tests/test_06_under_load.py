"""Lesson 06 under load: what a load gave as figures, a generator under a supervisor, servers good
and bad.
"""

import contextlib
import http.server
import importlib.util
import math
import re
import socket
import sys
import threading
import time
import types

import psutil
import pytest

from helpers import models, results
from helpers.series import load_figures, processes, run
from helpers.workers import client_06
from tests import declared

NOTEBOOK = run.NOTEBOOKS / "deeper" / "06_under_load.ipynb"
DEAD_PROXY = "http://127.0.0.1:9"  # nobody listens there
ASKED = {"texts": ["The capital of France is", "I am so fast that I can"], "lengths": [4, 6]}
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)

# ---- figures


GENERATED = {  # of four requests: in time, late at first, slow after that, refused
    "ttfts": [0.1, 2.0, 0.2, 0.0],
    "latencies": [0.5, 2.2, 1.2, 0.0],
    "output_lens": [3, 2, 3, 0],
    "itls": [[0.4, 0.0], [0.2], [0.5, 0.5], []],
    "errors": ["", "", "", "refused"],
    "start_times": [10.0, 10.5, 11.0, 11.5],
}


def test_in_time_is_both_limits_and_no_failure():
    """The first has a gap of 0.4 s, but 0.2 s a token in the mean, which is what is bounded."""
    details = load_figures.summary([GENERATED], 1.0, 0.25)
    assert details["in_time_share"] == 0.25 and details["failed_requests"] == 1
    assert details["achieved_rate_per_s"] == pytest.approx(2.0)
    assert details["goodput_per_s"] == pytest.approx(0.5)
    assert details["ttft_p50_s"] == pytest.approx(0.2)
    assert details["tpot_p50_s"] == pytest.approx(0.2)
    assert details["inter_token_p50_s"] == pytest.approx(0.4)
    assert load_figures.summary([GENERATED], 3.0, 0.6)["in_time_share"] == 0.75


def test_the_interval_is_of_all_seeds_together_and_narrows_with_them():
    """Wilson's interval of one in four, by hand."""
    z, n, share = 1.959964, 4, 0.25
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    one = load_figures.summary([GENERATED], 1.0, 0.25)
    assert one["in_time_low"] == pytest.approx(middle - half, abs=1e-6)
    assert one["in_time_high"] == pytest.approx(middle + half, abs=1e-6)
    three = load_figures.summary([GENERATED] * 3, 1.0, 0.25)
    assert three["load_requests"] == 12 and three["in_time_by_seed"] == [0.25] * 3
    assert one["in_time_low"] < three["in_time_low"] < three["in_time_high"] < one["in_time_high"]


def test_p99_only_where_n_carries_it():
    assert "ttft_p99_s" not in load_figures.summary([GENERATED], 1.0, 0.25)
    assert "ttft_p99_s" in load_figures.summary([GENERATED] * 125, 1.0, 0.25)


def test_nobody_answered():
    details = load_figures.summary([GENERATED | {"errors": ["x"] * 4}], 1.0, 0.2)
    assert details["failed_requests"] == 4 and details["goodput_per_s"] == 0
    assert details["in_time_share"] == 0 and details["ttft_p50_s"] is None


def test_a_closed_loop_hides_who_would_have_waited():
    """As many clients as slots never wait; one more waits for the slot that is free next."""
    waits = run.definitions("deeper/06_under_load")["closed_loop_waits"]
    assert waits([3, 1, 2, 2], 2, 2).tolist() == [0, 0, 0, 0]
    assert waits([3, 1, 2, 2], 3, 2).tolist() == [0, 0, 1, 2]


def test_every_figure_of_a_load_is_declared():
    details = load_figures.summary([GENERATED] * 125, 1.0, 0.25)
    row = types.SimpleNamespace(technique="continuous_batching", details=details)
    assert declared.undeclared_details([row]) == []


# ---- servers


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
    ("how", "sentence"),
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
def test_a_server_that_cannot_be_measured_gets_one_sentence(how, sentence, model):
    with bad_server(how) as url:
        _, why = client_06.refusal(url, {}, model, timeout_s=1)
    assert why.startswith(url) and "\n" not in why
    assert re.search(sentence, why), why


@needs_vllm
def test_a_load_that_fails_says_so_and_leaves_nothing(tmp_path):
    asked = ASKED | {"tokenizer": models.resolve()}
    runs = [client_06.LoadRun("one", 20.0, 3, 0)]
    with (
        bad_server("hangs") as url,
        pytest.raises(processes.ServingError, match=r"load_06\.py") as caught,
    ):
        client_06.load(url, "", "base", sys.executable, asked, runs, tmp_path, 30)
    assert str(caught.value).splitlines()[0].startswith("load_06.py")
    own = psutil.Process().children(recursive=True)
    assert not [process for process in own if "load_06.py" in " ".join(process.cmdline())]


@pytest.mark.slow
def test_an_address_where_nobody_listens_stops_the_notebook_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    given = {"SERVER_URL": f"http://127.0.0.1:{port}", "RESULTS_DIR": str(tmp_path / "r")}
    with pytest.raises(Exception, match=rf"SERVER_URL: http://127.0.0.1:{port} cannot be reached"):
        run.execute(NOTEBOOK, tmp_path / "out.ipynb", given)
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
    """At a rate, and all at once; of a server that is not vLLM it counts the text, tokenized anew."""
    monkeypatch.setenv("http_proxy", DEAD_PROXY)
    asked = ASKED | {"tokenizer": models.resolve()}
    model, _ = client_06.refusal(llamacpp.url, llamacpp.headers, "")
    runs = [client_06.LoadRun("all", math.inf, 3, 0), client_06.LoadRun("rate", 20.0, 4, 1)]
    generated = client_06.load(
        llamacpp.url, llamacpp.api_key, model, sys.executable, asked, runs, tmp_path, 120
    )
    assert generated["all"]["completed"] == 3 and generated["all"]["duration"] > 0
    details = load_figures.summary([generated["rate"]], 10.0, 10.0)
    assert details["failed_requests"] == 0 and details["in_time_share"] == 1.0
    assert details["load_requests"] == 4 and details["achieved_rate_per_s"] > 0
    assert 18 <= generated["rate"]["total_output_tokens"] <= 20


@needs_vllm
@pytest.mark.slow
def test_another_server_is_measured_and_the_lessons_rows_are_not_touched(
    llamacpp, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", llamacpp.api_key)
    given = run.smoke_parameters(NOTEBOOK) | {
        "SERVER_URL": llamacpp.url,
        "RESULTS_DIR": str(tmp_path),
        "FIGURES_DIR": str(tmp_path / "figures"),
    }
    run.execute(NOTEBOOK, tmp_path / "out.ipynb", given)
    (path,) = tmp_path.rglob("06_*.json")
    assert path.stem == "06_another_server"
    records = results.read(path).records
    assert {record.engine for record in records} == {"another server"}
    assert {record.sweep for record in records} == {"request_rate"}
    for record in records:
        assert record.status == "ok" and record.tokens_per_s > 0
        # a busy machine's server may drop one: it is counted, and counts as late
        served = record.details["load_requests"] - record.details["failed_requests"]
        assert 0 < served
        assert 0 <= record.details["in_time_low"] <= record.details["in_time_share"]
        assert record.details["capacity_per_s"] > 0
