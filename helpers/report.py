"""Tables and sentences computed from records: a lesson's table and verdicts, the claims put to the test, README's
generated parts. `python -m helpers.report` writes README; with `--check` it only says whether README is stale."""

import argparse
import math
import re
import sys
from pathlib import Path

import nbformat
import pandas as pd

from helpers import results, timing
from helpers.schema import Record, Results

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).with_name("data")
ALIKE = 0.05  # two things are alike, or a size is met, within this share
GB = 1e9


def _number(value, form: str = ".2f") -> str:
    return "–" if value is None or pd.isna(value) else format(value, form)


def _interval(value, interval, form: str = ".2f", unit: str = "") -> str:
    if value is None or pd.isna(value):
        return "–"
    known = interval is not None and interval[0] is not None
    return format(value, form) + unit + (f" [{interval[0]:{form}}, {interval[1]:{form}}]" if known else "")


def _note(record: Record) -> str:
    return "; ".join(([f"{record.status}: {record.reason}"] if record.status != "ok" else []) + record.warnings)


def table(records: list[Record]) -> pd.DataFrame:
    """One row a record, as text for reading: GB = 1e9 bytes, intervals at 95 %, failures and warnings in words."""
    rows = [{
        "variant": r.variant,
        "tokens/s": _number(r.tokens_per_s, ".1f"),
        "speed-up": "baseline" if r.baseline is None else _interval(r.speedup, r.speedup_ci95, unit="×"),
        "weights GB": _number(r.weight_bytes and r.weight_bytes / GB),
        "peak GB": _number(r.peak_bytes and r.peak_bytes / GB),
        "of limit": _number(r.decode_tokens_per_s and r.limit_tokens_per_s
                            and r.decode_tokens_per_s / r.limit_tokens_per_s, ".0%"),
        "perplexity": _number(r.perplexity),
        "Δ nll (nats)": _interval(r.nll_delta, r.nll_delta_ci95, "+.4f"),
        "same token": _number(r.agreement, ".1%"),
        "note": _note(r),
    } for r in records]
    return pd.DataFrame(rows).set_index("variant").rename_axis(None)


def verdict(record: Record) -> str:
    """One sentence on a variant's speed, memory and quality against its baseline, computed from its record."""
    if record.status != "ok":
        return f"{record.variant}: {record.status} here ({record.reason})."
    if record.baseline is None or record.speedup is None:
        return f"{record.variant}: no speed to compare."
    gain = timing.Ratio(record.speedup, *(record.speedup_ci95 or (None, None)))
    said = f"{record.variant} against {record.baseline}: {gain.verdict}, "
    said += f"{_interval(gain.value, gain[1:])} times the speed"
    if record.nll_delta is not None:
        low, high = record.nll_delta_ci95 or (None, None)
        change = "no measurable loss of quality" if low is None or low <= 0 <= high else (
            "measurably worse" if low > 0 else "measurably better")
        said += f"; {change} ({_interval(record.nll_delta, record.nll_delta_ci95, '+.4f')} nats a token)"
    return said + "."


def claims(records: list[Record], technique: str | None = None) -> pd.DataFrame:
    """The article's claims beside what these records say: direction and size judged apart.

    Each claim compares one quantity of two records: speed (paired 95 % interval), memory (peak above what was
    resident before), weights (bytes) or perplexity (interval of the paired log-likelihood). Direction: confirmed,
    refuted or within noise; likeness is confirmed when the whole interval lies within 5 % of one. Size: met when
    the article's figure lies in the interval widened by 5 %, else larger or smaller; "–" where it gives none.
    A claim without its two records is "not measured".
    """
    facts = pd.read_csv(DATA / "claims.csv")
    if technique:
        facts = facts[facts["technique"] == technique]
    rows = [_judged(fact, records) for fact in facts.to_dict("records")]
    return pd.DataFrame(rows).set_index("claim").rename_axis(None)


def _judged(fact: dict, records: list[Record]) -> dict:
    mine = {r.id: r for r in records if r.technique == fact["technique"] and r.status == "ok"}
    one, other = mine.get(fact["variant"]), mine.get(fact["compared_with"])
    said = None if pd.isna(fact["article_value"]) else fact["article_value"]
    row = {"claim": fact["claim"],
           "article": f"{said:.2f}× ({fact['article_figures']})" if said else fact["article_figures"]}
    gain = RATIOS[fact["quantity"]](one, other) if one and other else None
    if gain is None:
        return row | {"here": "–", "direction": "not measured", "size": "–"}
    low, high = gain.low or gain.value, gain.high or gain.value
    holds, fails = {"up": (low > 1, high < 1), "down": (high < 1, low > 1),
                    "alike": (1 - ALIKE <= low and high <= 1 + ALIKE, low > 1 + ALIKE or high < 1 - ALIKE)
                    }[fact["direction"]]
    size = "–" if said is None else "larger" if low / (1 + ALIKE) > said else (
        "smaller" if high * (1 + ALIKE) < said else "met")
    return row | {"here": _interval(gain.value, gain[1:] if gain.low else None, unit="×"),
                  "direction": "confirmed" if holds else "refuted" if fails else "within noise", "size": size}


def _speed_ratio(one: Record, other: Record) -> timing.Ratio | None:
    """Speed of one over the other: from their own pairs, or through the baseline they share; never across engines."""
    if one.engine != other.engine:
        return None
    if one.baseline == other.id:
        return timing.ratio([p.baseline_s for p in one.pairs], [p.variant_s for p in one.pairs])
    if one.baseline == other.baseline and len(one.latency_s) == len(other.latency_s):
        return timing.ratio(other.latency_s, one.latency_s)
    return None


def _memory_ratio(one: Record, other: Record) -> timing.Ratio | None:
    if None in (one.peak_bytes, other.peak_bytes) or one.peak_kind != other.peak_kind:
        return None
    own = [r.peak_bytes - r.resident_before_bytes for r in (one, other)]
    return timing.Ratio(own[0] / own[1], None, None)


def _weights_ratio(one: Record, other: Record) -> timing.Ratio | None:
    if None in (one.weight_bytes, other.weight_bytes):
        return None
    return timing.Ratio(one.weight_bytes / other.weight_bytes, None, None)


def _perplexity_ratio(one: Record, other: Record) -> timing.Ratio | None:
    """exp of the paired difference where one was scored against the other, else the bare ratio."""
    if one.baseline == other.id and one.nll_delta is not None:
        return timing.Ratio(*(math.exp(x) for x in (one.nll_delta, *(one.nll_delta_ci95 or (one.nll_delta,) * 2))))
    same = (one.eval_text, one.eval_tokens, one.eval_seq_len) == (other.eval_text, other.eval_tokens,
                                                                  other.eval_seq_len)
    if None in (one.perplexity, other.perplexity) or not same:
        return None
    return timing.Ratio(one.perplexity / other.perplexity, None, None)


RATIOS = {"speed": _speed_ratio, "memory": _memory_ratio, "weights": _weights_ratio, "perplexity": _perplexity_ratio}


def all_records(found: dict[str, Results]) -> list[Record]:
    """The records of all lessons in order."""
    return [r for lesson in found.values() for r in lesson.records]


def headline_records(found: dict[str, Results]) -> list[Record]:
    """The records of all lessons in order, sweeps left out."""
    return [r for r in all_records(found) if r.sweep is None]


def lessons(found: dict[str, Results]) -> str:
    """The notebooks that are there, with their titles, and whether their results are (Markdown list)."""
    rows = []
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        heading = nbformat.read(path, 4).cells[0].source.splitlines()[0]
        title = heading.partition("·")[2].strip()
        last = path.name.startswith("08")
        state = "reads all of them" if last else "with results" if path.stem in found else "no results committed yet"
        rows.append(f"- [{path.stem}](notebooks/{path.name}): {title} *({state})*")
    return "\n".join(rows)


def readme_parts(found: dict[str, Results], slug: str) -> dict[str, str]:
    """README's generated parts in Markdown: "lessons", "results" and "claims"."""
    records, parts = headline_records(found), {"lessons": lessons(found)}
    if not records:
        return parts | {"results": "*No results yet.*", "claims": "*No results yet.*"}
    full = table(records)
    full.insert(0, "technique", [r.technique.replace("_", " ") for r in records])
    full = full.reset_index(names="variant").set_index("technique").drop(columns=["note", "Δ nll (nats)"])
    first = next(iter(found.values()))
    run = f"{records[0].model}, {first.machine.cpu}, {first.machine.cores} cores (`{slug}`), " \
          f"{min(f.run.date for f in found.values())[:10]}. Intervals: 95 %. GB = 1e9 bytes."
    judged = claims(all_records(found)).reset_index(names="the article's claim")
    return parts | {"results": f"{run}\n\n{full.to_markdown()}", "claims": judged.to_markdown(index=False)}


def render_readme(text: str, parts: dict[str, str]) -> str:
    """README with each `<!-- NAME -->` … `<!-- end NAME -->` filled anew."""
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.S)
        if not pattern.search(text):
            raise ValueError(f"README.md has no part <!-- {name} --> … <!-- end {name} -->.")
        text = pattern.sub(lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text)
    return text


def caption(found: dict[str, Results], what: str) -> str:
    """A caption for write-ups: what is shown, model, machine, versions, date and conditions."""
    records, files = headline_records(found), list(found.values())
    place, versions = files[0].machine, files[0].machine.versions
    models = sorted({f"{r.model} ({r.model_revision})" if r.model_revision else r.model for r in records})
    hardware = ", ".join(g.name for g in place.gpus) or f"{place.cpu}, {place.cores} cores"
    tokens = sorted({r.new_tokens for r in records if r.new_tokens})
    return (f"{what} Model: {', '.join(models)}. Machine: {hardware}, {place.memory_bytes / GB:.0f} GB memory "
            f"({place.slug}). {', '.join(f'{n} {versions[n]}' for n in ('torch', 'transformers') if n in versions)}. "
            f"Measured {min(f.run.date for f in files)[:10]}; greedy, {', '.join(map(str, tokens))} new tokens, "
            "each variant in pairs with its baseline; intervals 95 %. GB = 1e9 bytes.")


def missing(found: dict[str, Results]) -> list[str]:
    """Lessons that measure and have no results here, in order (the last notebook only reads)."""
    lessons = sorted(p.stem for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    return [name for name in lessons[:-1] if name not in found]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when README is stale")
    arguments = parser.parse_args()
    readme, slug = ROOT / "README.md", results.reference_slug()
    found, problems = results.load_all(slug=slug)
    print(*problems, sep="\n", end="\n" * bool(problems))
    fresh = render_readme(readme.read_text(encoding="utf-8"), readme_parts(found, slug))
    stale = fresh != readme.read_text(encoding="utf-8")
    if arguments.check:
        print("README is stale: python -m helpers.report" if stale else "README is fresh")
        return int(stale)
    results.write_atomically(readme, fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
