"""`make bench`, third part: do the lesson's client and vLLM's own load generator see the same?
Intervals from one run.

vLLM's generator sends its requests through a relay. The relay asks the real server with the client
of lesson 06, which stamps every piece that comes, and hands each line on. So both clocks see the
very same requests: time to first token, the whole latency, and the tokens counted, request by
request.
"""

import http.server
import json
import sys
import tempfile
import threading
from pathlib import Path

from helpers import models, timing
from helpers.series import processes
from helpers.workers import client_06, vllm_06

REQUESTS, RATE, NEW_TOKENS, ALIKE = 24, 2.0, 24, 0.05


def relay_to(url: str, headers: dict, seen: dict) -> http.server.ThreadingHTTPServer:
    """A server on loopback that passes completions through the lesson's client; `seen`: its stamps,
    by text sent.
    """

    class Relay(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()

            def hand_on(line: bytes) -> None:
                self.wfile.write(line)
                self.wfile.flush()

            seen[body["prompt"]] = [
                at for at, _ in client_06.stream(url, headers, body, on_line=hand_on)
            ]

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer((processes.HOST, 0), Relay)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def settings() -> dict:
    """Prompts that all differ, of one length."""
    ids, tokenizer = (
        models.tokenizer()(models.text("calibration").content).input_ids,
        models.tokenizer(),
    )
    texts = [f"{n}. {tokenizer.decode(ids[40 * n : 40 * n + 8])}" for n in range(REQUESTS)]
    return {
        "tokenizer": models.resolve(),
        "texts": texts,
        "lengths": [NEW_TOKENS] * REQUESTS,
    }


def measure() -> list[tuple[str, timing.Ratio]]:
    """What, and the generator's figure over the client's."""
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--host",
        processes.HOST,
        "--port",
        "{port}",
        "--model",
        models.resolve(),
        "--served-model-name",
        "base",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "256",
        "--max-num-seqs",
        "8",
        "--no-enable-prefix-caching",
    ]
    env = vllm_06.server_environment() | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    asked, seen = settings(), {}
    with tempfile.TemporaryDirectory() as folder, processes.server(command, env=env) as server:
        relay = relay_to(server.url, server.headers, seen)
        try:
            place = f"http://{processes.HOST}:{relay.server_port}"
            runs = [client_06.LoadRun("bench", RATE, REQUESTS, 0)]
            found = client_06.load(
                place, "", "base", sys.executable, asked, runs, Path(folder), 200
            )["bench"]
        finally:
            relay.shutdown()
            relay.server_close()
    if any(found["errors"]):
        raise RuntimeError(f"{sum(map(bool, found['errors']))} requests failed")
    ours = [seen[text] for text in asked["texts"]]
    theirs = [
        (first, first + sum(gaps))
        for first, gaps in zip(found["ttfts"], found["itls"], strict=True)
    ]
    return [
        (
            "time to first token",
            timing.ratio([t[0] for t in theirs], [stamps[0] for stamps in ours]),
        ),
        (
            "time to last token",
            timing.ratio([t[1] for t in theirs], [stamps[-1] for stamps in ours]),
        ),
        (
            "pieces of text",
            timing.ratio([1 + len(gaps) for gaps in found["itls"]], [len(s) for s in ours]),
        ),
    ]


if __name__ == "__main__":
    checks = measure()
    for what, found in checks:
        good = 1 - ALIKE <= found.low and found.high <= 1 + ALIKE
        print(
            f"{what}, vLLM's generator over the lesson's client: {found.value:.3f} [{found.low:.3f}, "
            f"{found.high:.3f}]; aim: within {ALIKE:.0%}, {'met' if good else 'missed'}"
        )
    sys.exit(any(not (1 - ALIKE <= found.low and found.high <= 1 + ALIKE) for _, found in checks))
