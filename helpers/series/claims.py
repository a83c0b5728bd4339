"""The article's claims held against records. What it says stands in `data/claims.csv`; no verdict
does.

A claim compares one quantity of two records (ids, `*` for a number of ranks): speed (paired 95 %
interval, one engine), throughput (useful tokens/s, engines may differ), memory (peak above what was
resident before), weights (bytes), perplexity (interval of the paired log-likelihood), or a/b: a
field or detail of one over a field or detail of the other, or over a number. Three kinds need no
pair: `compromise` counts over all records, `degrees` reads a model's configuration, `fits` holds
bytes that a lesson planned for another model (`details`) against a card. A row that
`needs` something which no lesson has (a model of 7 billion parameters) is not testable here. What
several CPU processes did in place of GPUs is no evidence on speed.
"""

import fnmatch
import functools
import math
import statistics
from pathlib import Path

import pandas as pd

from helpers import timing
from helpers.results import Record, interval, shares_a_cpu
from helpers.series import planner

DATA = Path(__file__).parent.parent / "data"
ALIKE = 0.05  # two things are alike, or a size is met, within this share
HOLDS = "holds here"
FAILS = "does not hold here"
OPEN = "undecided"
UNTESTED = "not testable here"
VERDICTS = [HOLDS, FAILS, OPEN, UNTESTED]


def claims(records: list[Record], technique: str | None = None) -> pd.DataFrame:
    """The article's claims beside what these records say, a row each, by the claim.

    verdict : holds here, does not hold here, undecided (the interval spans the bound), or not
        testable here. Likeness holds where the whole interval lies within 5 % of one, a bound
        ("at most") where all of it lies below.
    effect : as claimed where the article's figure lies in the interval widened by 5 %, else larger
        or smaller; "–" where the article gives none.
    decided on : the two rows, the model and the device; where nothing is decided, why.
    """
    facts = pd.read_csv(DATA / "claims.csv")
    if technique:
        facts = facts[facts["technique"] == technique]
    rows = [judge(fact, records) for fact in facts.to_dict("records")]
    return pd.DataFrame(rows).set_index("claim").rename_axis(None)


def counts(judged: pd.DataFrame) -> str:
    """How many claims hold, do not, are undecided or not testable, in one sentence."""
    found = judged["verdict"].value_counts()
    hold, fail, undecided, untested = (int(found.get(verdict, 0)) for verdict in VERDICTS)
    return (
        f"Of {len(judged)} claims {hold} hold here, {fail} do not, {undecided} are undecided, "
        f"{untested} are not testable here."
    )


def judge(fact: dict, records: list[Record]) -> dict:
    """The verdict on one row of `data/claims.csv`: a row of `claims`."""
    said = None if pd.isna(fact["article_value"]) else fact["article_value"]
    row = {
        "claim": fact["claim"],
        "article": f"{said:.2f}× ({fact['article_figures']})" if said else fact["article_figures"],
    }
    if not pd.isna(fact["needs"]):
        return row | _untested(f"needs {fact['needs']}")
    if fact["quantity"] in WHOLE:
        return row | WHOLE[fact["quantity"]](fact, records)
    gain, decided_on = compare(records, fact)
    if gain is None:
        return row | _untested(decided_on)
    return row | _verdict(gain, fact["direction"], said) | {"decided on": decided_on}


def compare(records: list[Record], asked: dict) -> tuple[timing.Ratio | None, str]:
    """The ratio of two records in one quantity, and what it rests on; or None, and why.

    asked : technique, variant, compared_with, quantity, as in `data/claims.csv`.
    """
    quantity = asked["quantity"]
    one = _find(records, asked["technique"], asked["variant"])
    other = _find(records, asked["technique"], asked["compared_with"])
    for record, name in ((one, asked["variant"]), (other, asked["compared_with"])):
        if record is None:
            return None, f"no measured row {name}"
    if quantity in ("speed", "throughput") and (shares_a_cpu(one) or shares_a_cpu(other)):
        return None, "ranks share one CPU"
    of_kind = RATIOS.get(quantity) or functools.partial(_share, quantity)
    gain = of_kind(one, other)
    if gain is None:
        return None, f"{one.id} and {other.id} were not measured alike"
    return gain, _evidence(one, other)


def shown(gain: timing.Ratio) -> str:
    """The ratio with its interval, if it has one."""
    return interval(gain.value, gain[1:] if gain.low else None, unit="×")


def _untested(why: str) -> dict:
    return {"here": "–", "verdict": UNTESTED, "effect": "–", "decided on": why}


def _evidence(one: Record, other: Record) -> str:
    """The rows compared, the model and the device."""
    rows = one.id if one.id == other.id else f"{one.id} / {other.id}"
    return f"{rows}; {Path(one.model).name}, {one.device}"


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
        return OPEN
    if least <= low and high <= most:
        return HOLDS
    if high < least or low > most:
        return FAILS
    return OPEN


def _effect(low: float, high: float, direction: str, article: float | None) -> str:
    """Is the effect as large as in the article, within 5 %? A smaller ratio may be the larger."""
    if article is None:
        return "–"
    above = low / (1 + ALIKE) > article
    below = high * (1 + ALIKE) < article
    if not above and not below:
        return "as claimed"
    return "larger" if above != (direction == "down") else "smaller"


def _verdict(gain: timing.Ratio, direction: str, article: float | None) -> dict:
    low, high = gain.low or gain.value, gain.high or gain.value
    return {
        "here": shown(gain),
        "verdict": _direction(low, high, direction),
        "effect": _effect(low, high, direction, article),
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
    faster = {}
    for record in records:
        if record.sweep or not record.speedup_ci95 or not record.nll_delta_ci95:
            continue
        one_engine = engine[record.technique, record.baseline] == record.engine
        if record.speedup_ci95[0] > 1 and one_engine and not shares_a_cpu(record):
            faster.setdefault(record.id, record)  # fp16 stands in several lessons
    if not faster:
        return _untested("no faster variant with a score")
    worse = [record for record in faster.values() if record.nll_delta_ci95[0] > 0]
    return {
        "here": f"{len(worse)} of {len(faster)} faster variants lose quality",
        "verdict": HOLDS if worse else FAILS,
        "effect": "–",
        "decided on": f"all scored rows; {Path(records[0].model).name}, {records[0].device}",
    }


def _fits(fact: dict, records: list[Record]) -> dict:
    """Do the bytes that were planned, and not measured, fit on a card?"""
    name, card = fact["variant"], fact["compared_with"]
    planned = [r.details[name] for r in records if name in r.details]
    if not planned:
        return _untested(f"no plan of {name}")
    share = planned[0] / planner.gpu(card).memory_bytes
    return {
        "here": f"{share:.2f}×",
        "verdict": HOLDS if share <= 1 else FAILS,
        "effect": "–",
        "decided on": f"the planner's bytes and a {card}; nothing was run",
    }


def _degrees(fact: dict, records: list[Record]) -> dict:
    model = planner.describe(fact["variant"])
    return {
        "here": f"{model.heads} heads, {model.kv_heads} for keys",
        "verdict": HOLDS if planner.degrees(model) == [1] else FAILS,
        "effect": "–",
        "decided on": f"the configuration of {fact['variant']}",
    }


RATIOS = {
    "speed": _speed,
    "throughput": _throughput,
    "memory": _memory,
    "perplexity": _perplexity,
    "weights": lambda one, other: _over(one.weight_bytes, other.weight_bytes),
}
WHOLE = {"compromise": _compromise, "degrees": _degrees, "fits": _fits}
