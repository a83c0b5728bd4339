"""Tables and sentences computed from records: a lesson's table and verdicts, the claims put to the
test, README's generated parts. `python -m helpers.series.report` writes README; with `--check` it
only says whether README is stale.
"""

import argparse
import re
import sys
from pathlib import Path

import pandas as pd

from helpers import results, timing
from helpers.schema import Record, Results
from helpers.series.answers import answers
from helpers.series.claims import DATA, claims, interval, shares_a_cpu

__all__ = ["DATA", "answers", "claims"]
ROOT = Path(__file__).resolve().parent.parent.parent
GB = 1e9


def _number(value, form: str = ".2f") -> str:
    return "–" if value is None or pd.isna(value) else format(value, form)


def _note(record: Record) -> str:
    return "; ".join(
        ([f"{record.status}: {record.reason}"] if record.status != "ok" else []) + record.warnings
    )


def table(records: list[Record]) -> pd.DataFrame:
    """One row a record, as text for reading: GB = 1e9 bytes, intervals at 95 %, failures and
    warnings in words.
    """
    named = {(r.technique, r.baseline) for r in records if r.baseline}
    baselines = [
        r.baseline is None and (not named or (r.technique, r.id) in named) for r in records
    ]
    rows = [
        {
            "variant": r.variant,
            "tokens/s": _number(r.tokens_per_s, ".1f"),
            "speed-up": "baseline" if first else interval(r.speedup, r.speedup_ci95, unit="×"),
            "weights GB": _number(r.weight_bytes and r.weight_bytes / GB),
            "peak GB": _number(r.peak_bytes and r.peak_bytes / GB),
            "of limit": _number(
                r.decode_tokens_per_s
                and r.limit_tokens_per_s
                and r.decode_tokens_per_s / r.limit_tokens_per_s,
                ".0%",
            ),
            "perplexity": _number(r.perplexity),
            "Δ nll (nats)": interval(r.nll_delta, r.nll_delta_ci95, "+.4f"),
            "same token": _number(r.agreement, ".1%"),
            "note": _note(r),
        }
        for r, first in zip(records, baselines, strict=True)
    ]
    return pd.DataFrame(rows).set_index("variant").rename_axis(None)


def verdict(record: Record) -> str:
    """One sentence on a variant's speed, memory and quality against its baseline, computed from its
    record.
    """
    if record.status != "ok":
        return f"{record.variant}: {record.status} here ({record.reason})."
    if record.baseline is None or record.speedup is None:
        return f"{record.variant}: no speed to compare."
    gain = timing.Ratio(record.speedup, *(record.speedup_ci95 or (None, None)))
    said = f"{record.variant} against {record.baseline}: {gain.verdict}, "
    said += f"{interval(gain.value, gain[1:])} times the speed"
    if record.nll_delta is not None:
        low, high = record.nll_delta_ci95 or (None, None)
        change = (
            "no measurable loss of quality"
            if low is None or low <= 0 <= high
            else ("measurably worse" if low > 0 else "measurably better")
        )
        said += (
            f"; {change} ({interval(record.nll_delta, record.nll_delta_ci95, '+.4f')} nats a token)"
        )
    return said + "."


def load(
    slugs: list[str], results_dir: str = ""
) -> tuple[dict[str, dict[str, Results]], list[str]]:
    """Results by machine and lesson (none named: this machine's, else the only one's); sentences on
    what is missing.

    Raises ValueError, in one sentence, for a machine without results.
    """
    found, said = {}, []
    for slug in slugs or [results.reference_slug(results_dir)]:
        found[slug], refused = results.load_all(results_dir, slug)
        if not found[slug]:
            folder = Path(results_dir) if results_dir else ROOT / "notebooks" / "results"
            known = ", ".join(sorted({p.parent.name for p in folder.glob("*/*.json")})) or "none"
            raise ValueError(
                " ".join(
                    [
                        *refused,
                        f"No results for {slug}: run the lessons first (make run), or name "
                        f"one of MACHINES that has some ({known}).",
                    ]
                )
            )
        said += [
            *refused,
            f"{slug}: {len(found[slug])} lessons with results; none yet of "
            f"{', '.join(missing(found[slug])) or 'no lesson'}",
        ]
    return found, said


def frame(found: dict[str, dict[str, Results]]) -> pd.DataFrame:
    """Every record of every machine, a row each, its machine in a column (see `results.frame`)."""
    return pd.concat(
        [
            results.frame(all_records(lessons)).assign(machine=slug)
            for slug, lessons in found.items()
        ],
        ignore_index=True,
    )


def all_records(found: dict[str, Results]) -> list[Record]:
    """The records of all lessons in order."""
    return [r for lesson in found.values() for r in lesson.records]


def headline_records(found: dict[str, Results]) -> list[Record]:
    """The records of all lessons in order, sweeps left out."""
    return [r for r in all_records(found) if r.sweep is None]


def lessons(found: dict[str, Results]) -> str:
    """The notebooks that are there, with their titles, and whether their results are (Markdown
    list).
    """
    import nbformat  # a second to import, and no lesson needs it

    rows = []
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        heading = nbformat.read(path, 4).cells[0].source.splitlines()[0]
        title = heading.partition("·")[2].strip()
        last = path.name.startswith("08")
        state = (
            "reads all of them"
            if last
            else "with results"
            if path.stem in found
            else "no results committed yet"
        )
        rows.append(f"- [{path.stem}](notebooks/{path.name}): {title} *({state})*")
    return "\n".join(rows)


def _measured(files: list) -> str:
    """The first and the last day on which these results were measured."""
    return " to ".join(f"{end(f.run.date for f in files)[:10]}" for end in (min, max))


def readme_parts(found: dict[str, Results], slug: str) -> dict[str, str]:
    """README's generated parts in Markdown: "lessons", "chart", "results" and "claims"."""
    records, parts = headline_records(found), {"lessons": lessons(found)}
    if not records:
        return parts | dict.fromkeys(("chart", "results", "claims"), "*No results yet.*")
    full = table(records)
    full["speed-up"] = full["speed-up"].where(
        [r.status == "ok" for r in records], [r.status for r in records]
    )
    engine = {(r.technique, r.id): r.engine for r in records}
    other = [
        r.speedup is not None and engine.get((r.technique, r.baseline)) != r.engine for r in records
    ]
    full["speed-up"] += pd.Series([" (engine)" * across for across in other], index=full.index)
    full.insert(
        0, "technique", [r.technique.replace("_", " ").replace("gpus", "GPUs") for r in records]
    )
    full.index = [
        f"{r.variant} (ranks on one CPU)" if shares_a_cpu(r) else r.variant for r in records
    ]
    full = (
        full.reset_index(names="variant")
        .set_index("technique")
        .drop(columns=["note", "Δ nll (nats)"])
    )
    first = next(iter(found.values()))
    run = (
        f"{records[0].model}, {first.machine.cpu}, {first.machine.cores} cores (`{slug}`), "
        f"{_measured(list(found.values()))}. Intervals: 95 %. GB = 1e9 bytes."
    )
    chart = (
        f'<picture>\n<source media="(prefers-color-scheme: dark)" srcset="figures/{slug}/speedup_dark.png">\n'
        f'<img alt="Speed of every variant against the baseline of the same run" width="525" '
        f'src="figures/{slug}/speedup.png">\n</picture>'
    )
    judged = (
        claims(all_records(found)).reset_index(names="the article's claim").to_markdown(index=False)
    )
    return parts | {"results": f"{run}\n\n{full.to_markdown()}", "claims": judged, "chart": chart}


def render_readme(text: str, parts: dict[str, str]) -> str:
    """README with each `<!-- NAME -->` … `<!-- end NAME -->` filled anew."""
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.S)
        if not pattern.search(text):
            raise ValueError(f"README.md has no part <!-- {name} --> … <!-- end {name} -->.")
        text = pattern.sub(lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text)
    return text


def caption(machines: dict[str, dict[str, Results]], what: str) -> str:
    """A caption for write-ups: what is shown, and of each machine model, hardware, versions, date
    and conditions.
    """
    return " ".join(
        [
            what,
            *map(_conditions, machines.values()),
            "Greedy, each variant in pairs with its baseline; intervals 95 %. GB = 1e9 bytes.",
        ]
    )


def _conditions(found: dict[str, Results]) -> str:
    records, files = headline_records(found), list(found.values())
    place, versions = files[0].machine, files[0].machine.versions
    models = sorted(
        {f"{r.model} ({r.model_revision})" if r.model_revision else r.model for r in records}
    )
    hardware = ", ".join(g.name for g in place.gpus) or f"{place.cpu}, {place.cores} cores"
    engines = sorted({f"{r.engine} {r.engine_version}" for r in records if r.engine_version})
    numbers = {
        name: ", ".join(map(str, sorted({getattr(r, name) for r in records} - {None})))
        for name in ("prompt_tokens", "new_tokens", "threads")
    }
    baselines = [r.tokens_per_s for r in records if r.id == "fp32" and r.tokens_per_s]
    drift = (
        f" The fp32 baseline gave {min(baselines):.1f} to {max(baselines):.1f} tokens/s in different lessons: "
        "compare within a lesson."
        if len(baselines) > 1
        else ""
    )
    return (
        f"Model: {', '.join(models)}. Machine: {hardware}, {place.memory_bytes / GB:.0f} GB memory ({place.slug}), "
        f"threads: {numbers['threads']}. torch {versions.get('torch', 'unknown')}, {', '.join(engines)}. Measured "
        f"{_measured(files)}; prompts of {numbers['prompt_tokens']} tokens, {numbers['new_tokens']} new ones."
        f"{drift}"
    )


def write_table(frame: pd.DataFrame, folder: Path, name: str) -> None:
    """A table for write-ups: `name`.csv, .md and .tex (booktabs)."""
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / f"{name}.csv")
    (folder / f"{name}.md").write_text(frame.to_markdown() + "\n", encoding="utf-8")
    signs = {"×": r"$\times$", "Δ": r"$\Delta$", "–": "--", "→": r"$\to$", "≤": r"$\le$"}
    text = frame.to_latex(escape=True).translate(str.maketrans(signs))
    (folder / f"{name}.tex").write_text(text, encoding="utf-8")


def missing(found: dict[str, Results]) -> list[str]:
    """Lessons that measure and have no results here, in order (the last notebook only reads)."""
    lessons = sorted(p.stem for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    return [name for name in lessons[:-1] if name not in found]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.series.report", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when README is stale"
    )
    arguments = parser.parse_args()
    readme, slug = ROOT / "README.md", results.reference_slug()
    found, problems = results.load_all(slug=slug)
    print(*problems, sep="\n", end="\n" * bool(problems))
    fresh = render_readme(readme.read_text(encoding="utf-8"), readme_parts(found, slug))
    stale = fresh != readme.read_text(encoding="utf-8")
    if arguments.check:
        print("README is stale: python -m helpers.series.report" if stale else "README is fresh")
        return int(stale)
    results.write_atomically(readme, fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
