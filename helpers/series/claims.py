"""The article's claims held against records. What it says stands in `data/claims.csv`; no verdict
does.

A claim compares one quantity of two records (ids, `*` for a number of ranks): speed (paired 95 %
interval, one engine), throughput (useful tokens/s, engines may differ), memory (peak above what was
resident before), weights (bytes), perplexity (interval of the paired log-likelihood), or a/b: a
field or detail of one over a field or detail of the other, or over a number. Three kinds need no
pair: `compromise` counts over all records, `degrees` reads a model's configuration, `untestable`
names what a test of it would need (in place of the two records). What several
CPU processes did in place of GPUs is no evidence on speed.
"""

import fnmatch
import math
import statistics
from pathlib import Path

import pandas as pd

from helpers import timing
from helpers.results import Record, interval, shares_a_cpu
from helpers.series import planner

DATA = Path(__file__).parent.parent / "data"
ALIKE = 0.05  # two things are alike, or a size is met, within this share
UNKNOWN = {"here": "–", "direction": "not measured", "size": "–"}


def claims(records: list[Record], technique: str | None = None) -> pd.DataFrame:
    """The article's claims beside what these records say: direction and size judged apart.

    Direction: confirmed, refuted or within noise; likeness is confirmed when the whole interval
    lies within 5 % of one, a bound ("at most") when all of it lies below. Size: met when the
    article's figure lies in the interval widened by 5 %, else the effect is larger or smaller; "–"
    where the article gives none. A claim without its records is "not measured".
    """
    facts = pd.read_csv(DATA / "claims.csv")
    if technique:
        facts = facts[facts["technique"] == technique]
    rows = [_judged(fact, records) for fact in facts.to_dict("records")]
    return pd.DataFrame(rows).set_index("claim").rename_axis(None)


def _judged(fact: dict, records: list[Record]) -> dict:
    said = None if pd.isna(fact["article_value"]) else fact["article_value"]
    row = {
        "claim": fact["claim"],
        "article": f"{said:.2f}× ({fact['article_figures']})" if said else fact["article_figures"],
    }
    if fact["quantity"] in WHOLE:
        return row | WHOLE[fact["quantity"]](fact, records)
    one, other = (
        _find(records, fact["technique"], fact[name]) for name in ("variant", "compared_with")
    )
    if not one or not other:
        return row | UNKNOWN
    of_speed = fact["quantity"] in ("speed", "throughput")
    if of_speed and (shares_a_cpu(one) or shares_a_cpu(other)):
        return row | UNKNOWN | {"here": "ranks on one CPU"}
    gain = (
        RATIOS[fact["quantity"]](one, other)
        if fact["quantity"] in RATIOS
        else _share(fact["quantity"], one, other)
    )
    return row | (_verdict(gain, fact["direction"], said) if gain else UNKNOWN)


def _direction(low: float, high: float, direction: str) -> str:
    """Does the whole interval say what the article says, the opposite, or neither?"""
    least, most = {
        "up": (1.0, math.inf),
        "down": (0.0, 1.0),
        "alike": (1 - ALIKE, 1 + ALIKE),
    }.get(direction, (0.0, math.inf))
    if direction.startswith("at most "):
        most = float(direction.removeprefix("at most "))
    if direction in ("up", "down") and low <= 1 <= high:
        return "within noise"
    if least <= low and high <= most:
        return "confirmed"
    if high < least or low > most:
        return "refuted"
    return "within noise"


def _size(low: float, high: float, direction: str, article: float | None) -> str:
    """Is the effect as large as in the article, within 5 %? A smaller ratio may be the larger."""
    if article is None:
        return "–"
    above = low / (1 + ALIKE) > article
    below = high * (1 + ALIKE) < article
    if not above and not below:
        return "met"
    return "larger" if above != (direction == "down") else "smaller"


def _verdict(gain: timing.Ratio, direction: str, article: float | None) -> dict:
    low, high = gain.low or gain.value, gain.high or gain.value
    ends = gain[1:] if gain.low else None
    return {
        "here": interval(gain.value, ends, unit="×"),
        "direction": _direction(low, high, direction),
        "size": _size(low, high, direction, article),
    }


def _find(records: list[Record], technique: str, pattern: str) -> Record | None:
    """The first record that a claim names; of several ids apart by |, the fastest."""
    patterns = pattern.split("|")
    candidates = [r for r in records if r.technique == technique and r.status == "ok"]
    named = [r for r in candidates if any(fnmatch.fnmatchcase(r.id, p) for p in patterns)]
    if len(patterns) > 1:
        return max(named, key=lambda r: r.tokens_per_s or 0.0, default=None)
    return next(iter(named), None)


def _speed(one: Record, other: Record) -> timing.Ratio | None:
    """From their own pairs, or through the baseline they share; never across engines."""
    if one.engine != other.engine:
        return None
    if one.baseline == other.id:
        return timing.ratio([p.baseline_s for p in one.pairs], [p.variant_s for p in one.pairs])
    if one.baseline == other.baseline and len(one.latency_s) == len(other.latency_s):
        return timing.ratio(other.latency_s, one.latency_s)
    return None


def _throughput(one: Record, other: Record) -> timing.Ratio | None:
    """Useful tokens/s, with an interval where both ran equally often."""
    runs, speeds = {len(r.latency_s) for r in (one, other)}, (one.tokens_per_s, other.tokens_per_s)
    if 0 in runs or len(runs) > 1 or None in speeds:
        return _over(one.tokens_per_s, other.tokens_per_s)
    done = [
        r.tokens_per_s * statistics.median(r.latency_s) for r in (one, other)
    ]  # one may have run a part only
    gain = timing.ratio(other.latency_s, one.latency_s)
    return timing.Ratio(*(end and end * done[0] / done[1] for end in gain))


def _memory(one: Record, other: Record) -> timing.Ratio | None:
    if None in (one.peak_bytes, other.peak_bytes) or one.peak_kind != other.peak_kind:
        return None
    return _over(*(r.peak_bytes - r.resident_before_bytes for r in (one, other)))


def _perplexity(one: Record, other: Record) -> timing.Ratio | None:
    """exp of the paired difference where one was scored against the other, else the bare ratio."""
    against = f"nll_against_{other.id}"
    if one.baseline == other.id and one.nll_delta is not None:
        ends = one.nll_delta_ci95 or (one.nll_delta,) * 2
        return timing.Ratio(*(math.exp(x) for x in (one.nll_delta, *ends)))
    mean, ends = one.details.get(against), one.details.get(f"{against}_ci95")
    if mean is not None and ends:
        return timing.Ratio(*(math.exp(x) for x in (mean, *ends)))
    if len({(r.eval_text, r.eval_tokens, r.eval_seq_len) for r in (one, other)}) > 1:
        return None
    return _over(one.perplexity, other.perplexity)


def _share(quantity: str, one: Record, other: Record) -> timing.Ratio | None:
    """One detail over another or over a number; with the detail's interval where it has one."""

    def value(record: Record, name: str):
        return record.details.get(name, getattr(record, name, None))

    above, below = quantity.split("/")
    if below[0].isalpha():
        return _over(value(one, above), value(other, below))
    share = _over(value(one, above), float(below))
    ends = one.details.get(f"{above}_ci95")
    if share and ends and None not in ends:
        return timing.Ratio(share.value, *(end / float(below) for end in ends))
    return share


def _over(above, below) -> timing.Ratio | None:
    return timing.Ratio(above / below, None, None) if above is not None and below else None


def _compromise(fact: dict, records: list[Record]) -> dict:
    """How many of the variants that are faster in their engine are measurably worse in quality."""
    engine = {(r.technique, r.id): r.engine for r in records}
    faster = [
        r
        for r in records
        if r.sweep is None
        and r.speedup_ci95
        and r.speedup_ci95[0] > 1
        and r.nll_delta_ci95
        and engine[r.technique, r.baseline] == r.engine
        and not shares_a_cpu(r)
    ]
    worse = [r for r in faster if r.nll_delta_ci95[0] > 0]
    return (
        {
            "here": f"{len(worse)} of {len(faster)} faster variants lose quality",
            "size": "–",
            "direction": "confirmed" if worse else "refuted",
        }
        if faster
        else UNKNOWN
    )


def _degrees(fact: dict, records: list[Record]) -> dict:
    model = planner.describe(fact["variant"])
    return {
        "here": f"{model.heads} heads, {model.kv_heads} for keys",
        "size": "–",
        "direction": "confirmed" if planner.degrees(model) == [1] else "refuted",
    }


def _untestable(fact: dict, records: list[Record]) -> dict:
    needed = f"needs {fact['variant']}, {fact['compared_with']}"
    return {"here": needed, "size": "–", "direction": "not testable here"}


RATIOS = {
    "speed": _speed,
    "throughput": _throughput,
    "memory": _memory,
    "perplexity": _perplexity,
    "weights": lambda one, other: _over(one.weight_bytes, other.weight_bytes),
}
WHOLE = {"compromise": _compromise, "degrees": _degrees, "untestable": _untestable}
