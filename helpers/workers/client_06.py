"""The lesson's own client of OpenAI-compatible servers, and vLLM's load generator under a
supervisor, for lesson 06.
"""

import heapq
import http.client
import itertools
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats

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


class Requests(NamedTuple):
    """What requests met, an array each; a request that failed is in none.

    first_s : time to first token, from sending. token_s : time per output token, (whole - first) /
    (tokens - 1), 0 for a single token. whole_s : from sending to the last token.
    """

    first_s: np.ndarray
    token_s: np.ndarray
    whole_s: np.ndarray
    gaps_s: np.ndarray  # between pieces of text, of all requests
    failed: int


def requests_of(found: dict) -> Requests:
    """The generator's figures of one run, as vLLM's own goodput takes them."""
    good = [at for at, error in enumerate(found["errors"]) if not error]
    first_s, whole_s = (np.array(found[name], float)[good] for name in ("ttfts", "latencies"))
    steps = np.array(found["output_lens"], float)[good] - 1
    token_s = np.where(steps > 0, (whole_s - first_s) / np.maximum(steps, 1), 0.0)
    gaps = itertools.chain.from_iterable(found["itls"][at] for at in good)
    return Requests(
        first_s, token_s, whole_s, np.array(list(gaps)), len(found["errors"]) - len(good)
    )


def achieved_rate(found: dict) -> float:
    """Requests a second that were really sent."""
    times = found["start_times"]
    return (len(times) - 1) / (max(times) - min(times))


def summary(runs: list[dict], first_limit_s: float, token_limit_s: float) -> dict:
    """Runs at one rate as details of a record: share of all requests in time with its 95 % interval
    (Wilson 1927), percentiles, and goodput (Zhong et al. 2024): rate × share.

    A request is in time when its first token and its time per output token keep their limits; one
    that failed is not. p99 is given from 500 requests on: of fewer it is nearly the largest.
    """
    seen = [requests_of(found) for found in runs]
    count = sum(len(found["errors"]) for found in runs)
    in_time = []
    for one in seen:
        kept = (one.first_s <= first_limit_s) & (one.token_s <= token_limit_s)
        in_time.append(int(kept.sum()))
    share = scipy.stats.binomtest(sum(in_time), count).proportion_ci(method="wilson")
    rate = float(np.mean([achieved_rate(found) for found in runs]))
    details = {
        "load_requests": count,
        "failed_requests": sum(one.failed for one in seen),
        "achieved_rate_per_s": rate,
        "in_time_share": sum(in_time) / count,
        "in_time_low": float(share.low),
        "in_time_high": float(share.high),
        "in_time_by_seed": [
            kept / len(found["errors"]) for kept, found in zip(in_time, runs, strict=True)
        ],
        "goodput_per_s": rate * sum(in_time) / count,
        "objective_ttft_s": first_limit_s,
        "objective_tpot_s": token_limit_s,
    }
    quantities = {"ttft": "first_s", "tpot": "token_s", "e2e": "whole_s", "inter_token": "gaps_s"}
    percentiles = (50, 95, 99) if count >= 500 else (50, 95)
    for name, field in quantities.items():
        values = np.concatenate([getattr(one, field) for one in seen])
        for percentile in percentiles:
            value = float(np.percentile(values, percentile)) if len(values) else None
            details[f"{name}_p{percentile}_s"] = value
    return details


def closed_loop_waits(lengths: list[int], clients: int, slots: int) -> np.ndarray:
    """Steps that clients wait for a slot, who ask again as soon as they have their answer: a
    simulation of answers of these lengths, a token a step.
    """
    asks, free = [0.0] * clients, [0.0] * slots  # when each asks next, and is free
    waits = []
    for length in lengths:
        asked = heapq.heappop(asks)
        start = max(asked, heapq.heappop(free))
        waits.append(start - asked)
        heapq.heappush(asks, start + length)
        heapq.heappush(free, start + length)
    return np.array(waits)
