"""The first page: one row for each technique in plain words, one chart of them, one sentence.

Which row stands for a technique, and what a reader calls it, is said by `data/front.csv`; which
questions README answers in a figure, by `data/surprises.csv`. Everything else comes from records.
"""

import fnmatch
import math
import textwrap
from collections.abc import Collection

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.ticker import NullLocator

from helpers import plots, results
from helpers.results import Record, Results
from helpers.series import claims

FASTER, SLOWER, NEITHER = "#0072b2", "#d55e00", "0.45"
LOST = "#cf3a4c"  # seen on white paper and on dark
GROUND = {"fc": "white", "ec": "none", "pad": 0.3}  # of a number: no line runs through it
MARKS = "*†‡§¶"
GAINS = ["label", "technique", "id", "model", "baseline", "foreign", "speedup", "low", "high"]
GAINS += ["memory_share", "status", "quality", "is_worse"]
UNCHANGED, SAME_TEXT = "unchanged", "same text"


def picks(lessons: Collection[Results]) -> pd.DataFrame:
    """One row for each line of `data/front.csv` that has a record in a lesson, in its order.

    label, technique, id, model : which. baseline : the record's, "" for none.
    foreign : the baseline is not the first row of its lesson, so that it has to be named.
    speedup, low, high : over the baseline in pairs; NaN where ranks share one CPU.
    memory_share : peak above the start over the baseline's. quality : of the predictions, in words;
    is_worse : measurably. status : the record's.
    """
    rows = []
    for pick in pd.read_csv(claims.DATA / "front.csv").to_dict("records"):
        for lesson in lessons:
            headline = [record for record in lesson.records if record.sweep is None]
            named = [record for record in headline if _is_picked(record, pick)]
            if named:
                rows.append({"label": pick["label"]} | gain_of(named[0], headline))
                break
    return pd.DataFrame(rows, columns=GAINS).astype({"foreign": bool, "is_worse": bool})


def _is_picked(record: Record, pick: dict) -> bool:
    """Is it the row that `pick`, a line of `data/front.csv`, names?"""
    named = fnmatch.fnmatchcase(record.id, pick["variant"])
    return named and record.technique == pick["technique"]


def gain_of(record: Record, lesson: list[Record]) -> dict:
    """What one record gained over its baseline, of the same lesson: a row of `picks`, without its
    label.
    """
    by_id = {other.id: other for other in lesson}
    baseline = by_id.get(record.baseline)
    speed = (math.nan, math.nan, math.nan)
    if record.speedup and not results.shares_a_cpu(record):
        speed = (record.speedup, *(record.speedup_ci95 or speed[1:]))
    quality, is_worse = _quality(record)
    return {
        "technique": record.technique,
        "id": record.id,
        "model": record.model,
        "baseline": record.baseline or "",
        "foreign": baseline is not None and baseline is not lesson[0],
        **dict(zip(("speedup", "low", "high"), speed, strict=True)),
        "memory_share": _memory_share(record, baseline),
        "status": record.status,
        "quality": quality,
        "is_worse": is_worse,
    }


def _memory_share(record: Record, baseline: Record | None) -> float:
    """Peak above the start over that of the baseline; of several ranks, the fullest one's."""
    shares = baseline and claims.RATIOS["memory"](record, baseline)
    return shares.value if shares else math.nan


def _quality(record: Record) -> tuple[str, bool]:
    """The predictions beside the baseline's in words, and whether they are measurably worse."""
    if record.status != "ok":
        return record.status, False
    if "train_tokens" in record.details:
        return "tuned", False
    if record.nll_delta is None:
        same = record.details.get("same_text_share")
        if same is None:
            return "–", False
        return (SAME_TEXT if same == 1 else f"{same:.0%} {SAME_TEXT}"), False
    low, high = record.nll_delta_ci95 or (-math.inf, math.inf)
    if low <= 0 <= high:
        return UNCHANGED, False
    change = math.expm1(record.nll_delta)
    decimals = 0 if abs(change) >= 0.1 else 1
    return f"{change:+.{decimals}%}".replace("-", "−"), low > 0


def conditions(record: Record, machine: results.Machine) -> str:
    """The model and the machine, for a line under a title."""
    hardware = ", ".join(gpu.name for gpu in machine.gpus)
    name = record.model.rpartition("/")[-1]
    return f"{name}, {hardware or f'{machine.cores} CPU cores'}"


def chart(rows: pd.DataFrame, where: str) -> Figure:
    """Speed, memory and quality of the picked rows, one column of a paper wide.

    where : model and machine, for the line under the title.
    """
    note = _footnote(rows)
    below = 0.27 + 0.09 * len(note.splitlines())  # inches: tick labels and the note
    height = 0.5 + below + 0.215 * len(rows)
    figure = plt.figure(figsize=(plots.COLUMN, height))
    figure.set_layout_engine(PlaceHolderLayoutEngine(True, True))  # every part has its place below
    figure.suptitle(
        "What each technique gains, and what it costs", x=0.01, y=0.99, ha="left", weight="bold"
    )
    figure.text(0.01, 1 - 0.24 / height, where, color=plots.GREY, fontsize=6, va="center")
    bottom, top = below / height, 1 - 0.48 / height
    spans = [(0.345, 0.29), (0.655, 0.15), (0.83, 0.16)]
    boxes = [(left, bottom, width, top - bottom) for left, width in spans]
    speed, memory, quality = [figure.add_axes(box) for box in boxes]
    y = np.arange(len(rows))
    names = _marked(rows)
    for axis, heading in ((speed, "speed"), (memory, "memory"), (quality, "perplexity")):
        axis.set_title(heading, loc="left", fontsize=7, weight="bold", pad=3)
        axis.set(ylim=(len(rows) - 0.4, -0.6), yticks=[])
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    speed.set_yticks(y, names, fontsize=6.5)
    _draw_speed(speed, rows, y)
    _draw_memory(memory, rows, y)
    quality.set(xlim=(0, 1), xticks=[])
    for at, row in zip(y, rows.itertuples(), strict=True):
        quality.text(0, at, row.quality, color=LOST if row.is_worse else "black", fontsize=6)
    for text in quality.texts:
        text.set_va("center")
    figure.text(0.01, 0.02, note, fontsize=5.2, color=plots.GREY, va="bottom")
    return figure


def _marked(rows: pd.DataFrame) -> list[str]:
    """The labels, with a mark where the baseline is another than the lesson's first row."""
    marks = iter(MARKS)
    return [row.label + (next(marks) if row.foreign else "") for row in rows.itertuples()]


def _footnote(rows: pd.DataFrame) -> str:
    foreign = rows[rows.foreign]
    named = [f"{mark}against {name}" for mark, name in zip(MARKS, foreign.baseline, strict=False)]
    against = ", ".join(["Each against the first row of its lesson", *named])
    text = (
        f"{against}. Speed: tokens/s with 95 % interval, log axis. Memory: peak while running, "
        "above the start. Perplexity: change; unchanged: none measurable; red: measurably worse."
    )
    return textwrap.fill(text, 92)


def _colour(low: float, high: float) -> str:
    """By direction; neither where all of the interval lies within what is alike."""
    if low > 1 and high > 1 + claims.ALIKE:
        return FASTER
    if high < 1 and low < 1 - claims.ALIKE:
        return SLOWER
    return NEITHER


def _draw_speed(axis, rows: pd.DataFrame, y: np.ndarray) -> None:
    axis.axvline(1, color="black", lw=0.8)
    for at, row in zip(y, rows.itertuples(), strict=True):
        if math.isnan(row.speedup):
            why = "on GPUs only" if row.status == "ok" else row.status
            plots.label(axis, why, 1, at, style="italic", color=plots.GREY)
            continue
        colour = _colour(row.low, row.high)
        axis.hlines(at, row.low, row.high, color=colour, lw=2, alpha=0.6)
        axis.plot(row.speedup, at, "o", color=colour, ms=4)
        right = max(row.speedup, row.high)
        plots.label(axis, f"{row.speedup:.2f}×", right, at, (4, 0), bbox=GROUND)
    least = np.nanmin([0.9, *rows.low])
    most = np.nanmax([1.1, *rows.high])
    axis.set(xscale="log", xlim=(least / 1.25, most * 2.1))
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8) if least / 1.2 < tick < most * 1.3]
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks], fontsize=6)
    axis.xaxis.set_minor_locator(NullLocator())


def _draw_memory(axis, rows: pd.DataFrame, y: np.ndarray) -> None:
    shares = rows.memory_share
    colours = [NEITHER if math.isnan(s) else _colour(1 / s, 1 / s) for s in shares]
    pale = [to_rgba(colour, 0.45) for colour in colours]  # a number is read on it, the edge seen
    axis.barh(y, shares, height=0.55, color=pale, edgecolor=colours, lw=0.8)
    axis.axvline(1, color="black", lw=0.8)
    for at, share in zip(y, shares, strict=True):
        text, end = ("–", 0) if math.isnan(share) else (f"{share:.2f}×", share)
        plots.label(axis, text, end, at, (2, 0), bbox=GROUND)
    axis.set(xlim=(0, np.nanmax([1.1, *shares]) * 1.9))
    axis.set_xticks([1], ["1×"], fontsize=6)


def lesson_rows(rows: pd.DataFrame, titles: dict[str, str]) -> pd.DataFrame:
    """README's table: each technique's first pick beside its lesson.

    titles : of the lessons, as Markdown links, by technique.
    """
    table = []
    first = rows.drop_duplicates("technique").set_index("technique")
    for technique, title in titles.items():
        line = {"lesson": title, "its row": "–", "speed": "–", "memory": "–", "perplexity": "–"}
        if technique in first.index:
            row = first.loc[technique]
            line["its row"] = row.label
            line["perplexity"] = row.quality
            if not math.isnan(row.speedup):
                line["speed"] = results.interval(row.speedup, (row.low, row.high), unit="×")
            if not math.isnan(row.memory_share):
                line["memory"] = f"{row.memory_share:.2f}×"
        table.append(line)
    return pd.DataFrame(table)


def sentence(rows: pd.DataFrame, where: str) -> str:
    """What the picked rows say, counted: how many gain, how many of them lose nothing."""
    faster = rows[(rows.low > 1) & (rows.high > 1 + claims.ALIKE)]  # else it is as fast
    free = faster[faster.quality.isin([UNCHANGED, SAME_TEXT])]  # what was not scored is not free
    smaller = rows[rows.memory_share < 0.95]
    compared = int(rows.speedup.notna().sum())
    text = (
        f"On {where}: {len(faster)} of the {compared} variants whose speed is shown generate "
        "measurably faster than their baseline"
    )
    if len(free):
        best = free.loc[free.speedup.idxmax()]
        text += (
            f", {len(free)} of them with no measurable loss of quality; the fastest of these is "
            f"*{best.label}*, {best.speedup:.1f} times"
        )
    if len(smaller):
        share = smaller.memory_share.min()
        least = smaller[smaller.memory_share <= share * (1 + claims.ALIKE)]
        names = ", ".join(f"*{label}*" for label in least.label)
        text += f". {len(smaller)} take less memory; the least, {share:.2f} of their baselines': "
        text += names
    return text + "."


def surprises(records: list[Record]) -> list[str]:
    """A question and its figure, for each line of `data/surprises.csv` that has both records."""
    lines = []
    for ask in pd.read_csv(claims.DATA / "surprises.csv").to_dict("records"):
        gain, decided_on = claims.compare(records, ask)
        if gain:
            lines.append(f"- {ask['question']} **{claims.shown(gain)}** ({decided_on})")
    return lines
