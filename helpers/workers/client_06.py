"""The lesson's own client of OpenAI-compatible servers, and vLLM's load generator under a
supervisor, for lesson 06.
"""

import http.client
import itertools
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from helpers.series import processes

FIELDS = {
    "temperature": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": True,
    "logprobs": None,
    "stream_options": {"include_usage": True},
}  # what vLLM's load generator sends
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs no proxy


def ask(url: str, headers: dict, timeout_s: float, body: dict | None = None):
    """The open answer to a GET, or to a POST of `body` as JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    return DIRECT.open(request, timeout=timeout_s)


def stream(
    url: str, headers: dict, body: dict, timeout_s: float = 60.0, on_line=lambda line: None
) -> Iterator[tuple]:
    """Yields (seconds since the request was sent, text) for every piece of a completion."""
    start = time.perf_counter()
    with ask(f"{url}/v1/completions", headers, timeout_s, body | {"stream": True}) as answer:
        for line in answer:
            on_line(line)
            if line.startswith(b"data: {") and (choices := json.loads(line[6:]).get("choices")):
                yield time.perf_counter() - start, choices[0]["text"]


def refusal(url: str, headers: dict, model: str, timeout_s: float = 30.0) -> tuple[str, str | None]:
    """The model's name there ("": the first that is listed), and why this server cannot be measured
    (None: it can).
    """
    try:
        if not model:
            with ask(f"{url}/v1/models", headers, timeout_s) as answer:
                model = json.load(answer)["data"][0]["id"]
        pieces = list(
            stream(
                url,
                headers,
                {"model": model, "prompt": "Well,", "max_tokens": 2, **FIELDS},
                timeout_s,
            )
        )
        return (
            model,
            None
            if pieces
            else f"{url} answers with something that is no completion (not one token).",
        )
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return model, f"{url} wants another key than OPENAI_API_KEY (HTTP {error.code})."
        said = " ".join(error.read(300).decode("utf-8", "replace").split())
        return (
            model,
            f"{url} refuses the fields that the load generator sends (HTTP {error.code}: {said}).",
        )
    except (LookupError, TypeError, AttributeError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, ValueError) and "url" in str(error):
            return model, f"{url} is no address of a server: write it as http://HOST:PORT."
        return (
            model,
            f"{url} answers with something that is no completion ({type(error).__name__}).",
        )
    except OSError as error:
        why = getattr(error, "reason", error)
        late = isinstance(why, TimeoutError)
        return (
            model,
            f"{url} did not answer within {timeout_s:g} s."
            if late
            else f"{url} cannot be reached ({why}).",
        )


class LoadRun(NamedTuple):
    """One run of the generator: `rate` in requests a second, or infinity for all at once."""

    name: str
    rate: float
    count: int
    seed: int


def load(
    url: str,
    key: str,
    model: str,
    python: str,
    requests: dict,
    runs: list[LoadRun],
    place: Path,
    limit_s: float,
) -> dict[str, dict]:
    """What vLLM's load generator found in each run, by name.

    requests : tokenizer (a folder), texts, lengths; they are sent in their order, over and over.

    Raises processes.ServingError when it fails or takes too long; nothing is left running then.
    """
    pairs = itertools.cycle(zip(requests["texts"], requests["lengths"], strict=True))
    rows = []
    for text, length in itertools.islice(pairs, max(run.count for run in runs)):
        rows.append(json.dumps({"prompt": text, "output_tokens": length}))
    (place / "requests.jsonl").write_text("\n".join(rows) + "\n")
    job = {
        "url": url,
        "model": model,
        "tokenizer": requests["tokenizer"],
        "requests": str(place / "requests.jsonl"),
        "folder": str(place),
        "runs": [run._asdict() for run in runs],
    }
    (place / "load.json").write_text(json.dumps(job))
    processes.run(
        [python, Path(__file__).with_name("load_06.py"), place / "load.json"],
        timeout_s=limit_s,
        on_line=lambda line: None,
        env={"OPENAI_API_KEY": key, "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    return {run.name: json.loads((place / f"{run.name}.json").read_text()) for run in runs}
