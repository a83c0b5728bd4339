"""What requests met at each rate of a load, as figures: for lesson 06's load test."""

import itertools
from typing import NamedTuple

import numpy as np
import scipy.stats


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


def requests_of(run: dict) -> Requests:
    """The generator's figures of one run, as vLLM's own goodput takes them."""
    good = [at for at, error in enumerate(run["errors"]) if not error]
    first_s, whole_s = (np.array(run[name], float)[good] for name in ("ttfts", "latencies"))
    steps = np.array(run["output_lens"], float)[good] - 1
    token_s = np.where(steps > 0, (whole_s - first_s) / np.maximum(steps, 1), 0.0)
    gaps = itertools.chain.from_iterable(run["itls"][at] for at in good)
    return Requests(first_s, token_s, whole_s, np.array(list(gaps)), len(run["errors"]) - len(good))


def achieved_rate(run: dict) -> float:
    """Requests a second that were really sent."""
    times = run["start_times"]
    return (len(times) - 1) / (max(times) - min(times))


def summary(runs: list[dict], first_limit_s: float, token_limit_s: float) -> dict:
    """Runs at one rate as details of a record: share of all requests in time with its 95 % interval
    (Wilson 1927), percentiles, and goodput (Zhong et al. 2024): rate × share.

    A request is in time when its first token and its time per output token keep their limits; one
    that failed is not. p99 is given from 500 requests on: of fewer it is nearly the largest.
    """
    requests = [requests_of(run) for run in runs]
    count = sum(len(run["errors"]) for run in runs)
    in_time = []
    for one in requests:
        both_kept = (one.first_s <= first_limit_s) & (one.token_s <= token_limit_s)
        in_time.append(int(both_kept.sum()))
    share = scipy.stats.binomtest(sum(in_time), count).proportion_ci(method="wilson")
    rate = float(np.mean([achieved_rate(run) for run in runs]))
    details = {
        "load_requests": count,
        "failed_requests": sum(one.failed for one in requests),
        "achieved_rate_per_s": rate,
        "in_time_share": sum(in_time) / count,
        "in_time_low": float(share.low),
        "in_time_high": float(share.high),
        "in_time_by_seed": [
            number / len(run["errors"]) for number, run in zip(in_time, runs, strict=True)
        ],
        "goodput_per_s": rate * sum(in_time) / count,
        "objective_ttft_s": first_limit_s,
        "objective_tpot_s": token_limit_s,
    }
    quantities = {"ttft": "first_s", "tpot": "token_s", "e2e": "whole_s", "inter_token": "gaps_s"}
    percentiles = (50, 95, 99) if count >= 500 else (50, 95)
    for name, field in quantities.items():
        values = np.concatenate([getattr(one, field) for one in requests])
        for percentile in percentiles:
            value = float(np.percentile(values, percentile)) if len(values) else None
            details[f"{name}_p{percentile}_s"] = value
    return details
