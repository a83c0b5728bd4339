"""What the records of many lessons say together: README and RESULTS.md, captions, tables.

`python -m helpers.series.report` writes both from the committed evidence; with `--check` it only
says whether one of them is stale.
"""

import argparse
import dataclasses
import math
import os
import sys
import tempfile
from itertools import chain
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd

from helpers import machine, results
from helpers.results import Record, Results
from helpers.series import bundle, front, history, stamps
from helpers.series.claims import claims, counts

ROOT = results.ROOT
REFERENCE = ROOT / "notebooks" / "results"
GB = results.GB
PAGE = 6.9  # inches of text across a page of LaTeX's
PAGE_LINES = 55  # of a table, down a page
LETTER = 0.07  # inches, a letter at 10 points
WRAPPED = 20  # letters, the longest line of a cell


@dataclasses.dataclass(frozen=True)
class Found:
    """The results of one model on one machine, by lesson, and what that machine can do."""

    machine: str
    model: str
    lessons: dict[str, Results]
    limits: results.MachineLimits | None
    folder: Path

    @property
    def records(self) -> list[Record]:
        """The records of all lessons in order."""
        return list(chain.from_iterable(lesson.records for lesson in self.lessons.values()))

    @property
    def headline(self) -> list[Record]:
        """The records of all lessons in order, sweeps left out."""
        return [record for record in self.records if record.sweep is None]


def _base(results_dir: str) -> Path:
    """Where to read from: as given, else this machine's own runs, else the committed evidence."""
    if results_dir:
        return results.base_folder(results_dir)
    own = results.base_folder()
    return own if (own / machine.slug()).is_dir() else REFERENCE


def _most_lessons(base: Path, slug: str, models: list[str]) -> str:
    """The model of a machine that most lessons have been run with."""

    def lessons(model: str) -> int:
        return len(list(results.profile_folder(base / slug / model).glob("[0-9]*.json")))

    return max(models, key=lessons)


def load(
    machines: list[str], models: list[str], results_dir: str = ""
) -> tuple[dict[str, Found], list[str]]:
    """Results by title (machine and model), and a sentence on each thing that is missing.

    Parameters
    ----------
    machines : folder names; none: this machine, else the only one that has results; of bundles all.
    models : folder names; none: of each machine the one that most lessons have been run with.
    results_dir : a folder of results, or bundles of them (`helpers.series.bundle`).

    Raises ValueError, in one sentence, where there are no results, or a bundle is refused.
    """
    places = results_dir.split(os.pathsep)
    if not any(Path(place).expanduser().is_file() for place in places):
        return _load(machines, models, _base(results_dir))
    with tempfile.TemporaryDirectory() as folder:
        for place in places:
            bundle.unpack(Path(place).expanduser(), Path(folder))
        machines = machines or list(results.machines_with_results(folder))
        return _load(machines, models, Path(folder))


def _load(machines: list[str], models: list[str], base: Path) -> tuple[dict[str, Found], list[str]]:
    there = results.machines_with_results(str(base))
    known = ", ".join(there) or "none"
    slugs = machines or ([machine.slug()] if machine.slug() in there else list(there))
    unknown = [slug for slug in slugs if slug not in there]
    if unknown or not slugs or (not machines and len(slugs) > 1):
        absent = ", ".join(unknown) or machine.slug()
        raise ValueError(
            f"No results for {absent}: run the lessons first (make run), or name one of MACHINES "
            f"that has some ({known})."
        )
    found, sentences = {}, []
    for slug in slugs:
        chosen = models or [_most_lessons(base, slug, there[slug])]
        for model in chosen:
            folder = results.profile_folder(base / slug / model)
            lessons, refused = results.read_all(folder)
            sentences += refused
            if not lessons:
                none = f"No results of {model} on {slug}: run the lessons first (make run), or name"
                none += f" one of MODELS ({', '.join(there[slug])})."
                raise ValueError(" ".join([*refused, none]))
            limits = results.read_limits(base / slug)
            found[f"{slug} · {model}"] = Found(slug, model, lessons, limits, folder)
            sentences.append(f"{slug}, {model}: {len(lessons)} lessons with results")
            if absent := missing(lessons):
                sentences[-1] += f"; none yet of {', '.join(absent)}"
        others = sorted(set(there[slug]) - set(chosen))
        if others and not models:
            sentences.append(f"{slug} has results of {', '.join(others)} too: name them in MODELS")
    return found, sentences


def frame(found: dict[str, Found]) -> pd.DataFrame:
    """Every record, a row each, with the columns `machine` (where it was measured, and what) and
    `notebook`: a row's baseline is one of its own notebook's.
    """
    frames = []
    for title, place in found.items():
        for name, lesson in place.lessons.items():
            if lesson.records:
                rows = results.frame(lesson.records, place.limits)
                frames.append(rows.assign(machine=title, notebook=name))
    return pd.concat(frames, ignore_index=True)


def figures_folder(found: dict[str, Found], figures_dir: str = "") -> Path:
    """Where 08 writes: below `figures_dir`, a reference run's `figures`, or beside the results; of
    a bundle, where this machine's own would lie.
    """
    places = list(found.values())
    name = Path("+".join(p.machine for p in places)) / "+".join(
        dict.fromkeys(p.model for p in places)
    )
    if figures_dir:
        return Path(figures_dir).expanduser().resolve() / name
    if results.is_reference():
        return ROOT / "figures" / name
    own = places[0].folder
    if len(places) > 1 or own.is_relative_to(REFERENCE) or not own.is_dir():
        return results.base_folder() / name / "figures"
    return own / "figures"


def missing(lessons: dict[str, Results]) -> list[str]:
    """Lessons that measure and have no results here, in order (the last notebook only reads)."""
    return [path.stem for path in stamps.notebooks()[:-1] if path.stem not in lessons]


def measured_on(lessons: list[Results]) -> str:
    """The first and the last day on which these results were measured."""
    days = sorted({lesson.run.date[:10] for lesson in lessons})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def caption(found: dict[str, Found], what: str, rows: pd.DataFrame) -> str:
    """A caption for write-ups: what is shown, and the conditions of the rows that are drawn.

    rows : what is drawn, with `technique` and `id` where it is a record; a column `machine` says
        of which title in `found`. Rows with a `source` are others' and are named by it.
    """
    sentences = [what.replace("*", "")]  # a caption is no Markdown
    for title, place in found.items():
        of_place = rows[rows.machine == title] if "machine" in rows else rows
        drawn = set(zip(of_place.technique, of_place.id, strict=True)) if "id" in rows else set()
        records = [r for r in place.records if (r.technique, r.id) in drawn and r.status == "ok"]
        if records:
            sentences.append(_conditions(place, records))
    if "source" in rows and rows.source.notna().any():
        sources = sorted(set(rows.source.dropna()))
        sentences.append(f"Published, not measured here: {'; '.join(sources)}.")
    return " ".join(sentences)


def _distinct(records: list[Record], field: str) -> str:
    values = {getattr(record, field) for record in records} - {None}
    return " or ".join(map(str, sorted(values)))


def _conditions(place: Found, records: list[Record]) -> str:
    """Model, hardware, versions, date, settings and warnings of these records, in sentences."""
    named = {(record.technique, record.id) for record in records}
    lessons = []
    for lesson in place.lessons.values():
        if not named.isdisjoint((record.technique, record.id) for record in lesson.records):
            lessons.append(lesson)
    where = lessons[0].machine
    revision = records[0].model_revision
    model = f"{place.model} ({revision})" if revision else place.model
    hardware = ", ".join(gpu.name for gpu in where.gpus) or f"{where.cpu}, {where.cores} cores"
    engines = sorted({f"{r.engine} {r.engine_version}" for r in records if r.engine_version})
    sentences = [
        f"Model: {model}.",
        f"Machine: {hardware}, {where.memory_bytes / GB:.0f} GB memory ({where.slug}).",
        f"torch {where.versions.get('torch', 'unknown')}, {', '.join(engines)}.",
        f"Measured {measured_on(lessons)}, greedy.",
    ]
    requests = sorted({r.details["requests"] for r in records if "requests" in r.details})
    if requests:
        sentences.append(f"Workloads of {', '.join(map(str, requests))} requests.")
    loads = [record.details for record in records if "load_requests" in record.details]
    if loads:
        counts = [load["load_requests"] for load in loads]
        sentences.append(
            f"Load: {min(counts)} to {max(counts)} requests a rate in "
            f"{len(loads[0]['in_time_by_seed'])} runs, {loads[0]['slots']} slots; in time: first "
            f"token within {loads[0]['objective_ttft_s']:g} s, "
            f"{loads[0]['objective_tpot_s']:g} s for each further one."
        )
    served = {"requests", "load_requests"}
    single = [record for record in records if served.isdisjoint(record.details)]
    prompts, new = _distinct(single, "prompt_tokens"), _distinct(single, "new_tokens")
    if new:
        sentences.append(f"Prompts of {prompts or 'unknown'} tokens, {new} new ones.")
    pairs = sorted({len(record.pairs) for record in records if record.pairs})
    if pairs:
        ends = dict.fromkeys((pairs[0], pairs[-1]))
        count = " to ".join(map(str, ends))
        sentences.append(f"Speed in {count} pairs with the baseline, 95 % intervals.")
    warned = sorted({record.variant for record in records if record.warnings})
    if warned:
        sentences.append(f"With warnings in RESULTS.md: {', '.join(warned)}.")
    return " ".join(sentences)


def variants(found: dict[str, Found]) -> pd.DataFrame:
    """Every headline row in plain columns: ratios to its baseline with their 95 % ends."""
    rows = []
    columns = ["technique", "id", "baseline", "speedup", "low", "high", "memory_share"]
    columns += ["perplexity", "nll_delta", "nll_delta_low", "nll_delta_high"]
    columns += ["engine", "model", "machine", "status"]
    for place in found.values():
        for lesson in place.lessons.values():
            headline = [record for record in lesson.records if record.sweep is None]
            for record in headline:
                low, high = record.nll_delta_ci95 or (None, None)
                quality = {"perplexity": record.perplexity, "nll_delta": record.nll_delta}
                quality |= {"nll_delta_low": low, "nll_delta_high": high}
                where = {"engine": record.engine, "machine": place.machine}
                rows.append(front.gain_of(record, headline) | quality | where)
    return pd.DataFrame(rows, columns=columns).rename(columns={"id": "variant"})


def write_table(rows: pd.DataFrame, folder: Path, name: str) -> None:
    """A table for write-ups: `name`.csv, .md and .tex (booktabs, graphicx)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_csv(folder / f"{name}.csv")
    (folder / f"{name}.md").write_text(rows.to_markdown() + "\n", encoding="utf-8")
    signs = {"×": r"$\times$", "Δ": r"$\Delta$", "–": "--", "→": r"$\to$", "≤": r"$\le$"}
    text = _latex(rows).translate(str.maketrans(signs))
    (folder / f"{name}.tex").write_text(text, encoding="utf-8")


def _latex(rows: pd.DataFrame) -> str:
    """Rows as tables that each fit a page: long texts wrapped, what is still too wide scaled."""
    lengths = rows.reset_index().astype(str).map(len)
    headings = lengths.columns.astype(str)
    words = [max(map(len, heading.split())) for heading in headings]
    widths = np.maximum(lengths.max(), words).clip(upper=WRAPPED)
    wraps = np.maximum(lengths.max(), headings.str.len()) > widths
    wrapped = (LETTER * widths).map("p{{{:.2f}in}}".format)
    form = wrapped.where(wraps, "l")
    inches = LETTER * widths.sum() + 0.083 * len(widths)
    lines = (lengths / widths).max(axis=1).map(math.ceil)
    blocks = []
    for _, block in rows.groupby((lines.cumsum() // PAGE_LINES).to_numpy()):
        text = block.to_latex(escape=True, column_format="".join(form))
        if inches > PAGE:
            text = f"\\resizebox{{\\textwidth}}{{!}}{{%\n{text}}}\n"
        blocks.append(f"{{\\setlength{{\\tabcolsep}}{{3pt}}%\n{text}}}\n")
    return "\n".join(blocks)


# ---- README


def _entry(path: Path) -> str:
    """A notebook in Markdown: its name, where it is, its title."""
    heading = nbformat.read(path, 4).cells[0].source.splitlines()[0]
    title = heading.split("·")[-1].strip()
    return f"[{path.stem}]({path.relative_to(ROOT).as_posix()}): {title}"


def _lesson_table(rows: pd.DataFrame) -> str:
    """The seven lessons, each with the row that stands for it, and the comparison (Markdown)."""
    *lessons, comparison = stamps.notebooks()
    titles = {path.stem[3:]: _entry(path) for path in lessons}
    table = front.lesson_rows(rows, titles).to_markdown(index=False)
    return f"{table}\n\n{_entry(comparison)}. It reads what the seven left."


def _stamp_sentence() -> str:
    """How many notebooks show outputs of an earlier state of their code."""
    paths = stamps.notebooks() + stamps.notebooks(deeper=True)
    stale = [path.stem for path in paths if stamps.is_stale(path)]
    if not stale:
        return "The outputs in all notebooks are those of the code as it stands."
    names = ", ".join(stale)
    return (
        f"The outputs in {len(stale)} of {len(paths)} notebooks are those of an earlier state of "
        f"their code or of the measuring: {names}."
    )


def _result_rows(place: Found) -> str:
    """Every headline row of every lesson as one Markdown table."""
    records = place.headline
    rows = results.table(records, place.limits)
    engines = {(record.technique, record.id): record.engine for record in records}
    for at, record in enumerate(records):
        column = rows.columns.get_loc("speed-up")
        if record.status != "ok":
            rows.iat[at, column] = record.status
        elif engines.get((record.technique, record.baseline), record.engine) != record.engine:
            rows.iat[at, column] += " (engine)"
    names = []
    for record in records:
        shared = " (ranks on one CPU)" if results.shares_a_cpu(record) else ""
        names.append(record.variant + shared)
    titles = [record.technique.replace("_", " ").replace("gpus", "GPUs") for record in records]
    rows.insert(0, "technique", titles)
    rows.insert(1, "variant", names)
    return rows.to_markdown(index=False)


def _conditions_line(place: Found) -> str:
    """Model, machine and day, for the tables of README and RESULTS.md."""
    files = list(place.lessons.values())
    where = files[0].machine
    return (
        f"{place.model}, {where.cpu}, {where.cores} cores (`{place.machine}`), "
        f"{measured_on(files)}. Intervals: 95 %. GB = 1e9 bytes, memory above the start."
    )


def _picture(place: Found, text: str) -> str:
    """The first chart in both themes, with its text for those who cannot see it."""
    folder = f"figures/{place.machine}/{place.model}"
    dark = f'media="(prefers-color-scheme: dark)" srcset="{folder}/overview_dark.png"'
    return (
        f"<picture>\n<source {dark}>\n"
        f'<img alt="{text.replace("*", "")}" width="525" src="{folder}/overview.png">\n</picture>'
    )


def readme_parts(place: Found | None) -> dict[str, str]:
    """README's generated parts, in Markdown, by the name of their marks."""
    rows = front.picks(place.lessons.values() if place else [])
    deeper = []
    for path in stamps.notebooks(deeper=True):
        state = "" if stamps.is_stamped(path) else " *(no reference run yet)*"
        deeper.append(f"- {_entry(path)}{state}")
    parts = {"lessons": _lesson_table(rows), "deeper": "\n".join(deeper)}
    parts["stamps"] = _stamp_sentence()
    if place is None:
        missing_parts = ("sentence", "chart", "conditions", "surprises", "claims", "history")
        return parts | dict.fromkeys(missing_parts, "*No results yet.*")
    where = front.conditions(place.records[0], next(iter(place.lessons.values())).machine)
    parts["sentence"] = front.sentence(rows, where)
    parts["chart"] = _picture(place, parts["sentence"])
    parts["conditions"] = _conditions_line(place)
    parts["history"] = history.moved(history.read(REFERENCE / place.machine))
    parts["surprises"] = "\n".join(front.surprises(place.records))
    judged = claims(place.records)
    table = judged.reset_index(names="the article's claim").to_markdown(index=False)
    fold = f"<details>\n<summary>Each claim, and what decided it</summary>\n\n{table}\n\n</details>"
    parts["claims"] = f"{counts(judged)}\n\n{fold}"
    return parts


def results_page(place: Found | None) -> str:
    """RESULTS.md: every row of every lesson with its warnings."""
    if place is None:
        return "# Results\n\nNone yet.\n"
    return (
        "# Results: every row\n\nMade by `make readme` from the committed records; README tells "
        "what the columns mean.\n\n"
        f"{_conditions_line(place)}\n\n{_result_rows(place)}\n"
    )


def render_readme(text: str, parts: dict[str, str]) -> str:
    """README with each `<!-- NAME -->` … `<!-- end NAME -->` filled anew."""
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise ValueError(f"README.md has no part {begin.strip()} … {end}.")
        text = f"{before}{begin}{part}\n{end}{after}"
    return text


def committed() -> Found | None:
    """The committed evidence that README tells: of the first machine there, its first model."""
    there = results.machines_with_results(str(REFERENCE))
    for slug, models in there.items():
        found, _ = load([slug], [_most_lessons(REFERENCE, slug, models)], str(REFERENCE))
        return next(iter(found.values()))
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.series.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when stale")
    arguments = parser.parse_args()
    place = committed()
    readme = ROOT / "README.md"
    pages = {
        readme: render_readme(readme.read_text(encoding="utf-8"), readme_parts(place)),
        ROOT / "RESULTS.md": results_page(place),
    }
    stale = []
    for path, fresh in pages.items():
        if not path.exists() or path.read_text(encoding="utf-8") != fresh:
            stale.append(path.name)
            if not arguments.check:
                results.write_atomically(path, fresh)
    if arguments.check:
        print(f"stale: {', '.join(stale)} (make readme)" if stale else "README and RESULTS fresh")
        return int(bool(stale))
    return 0


if __name__ == "__main__":
    sys.exit(main())
