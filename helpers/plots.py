"""Charts in the house style, and their files for write-ups.

A chart is drawn from a frame of records (`results.frame`), one column of a paper wide. Colours and
markers come from a palette in the order in which techniques appear (`styled`). Where a column
`machine` names several machines or models, each has a panel of its own (`panels`): two of them
never share an axis. Charts are drawn for light paper; `save` makes the dark pictures from them.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from pandas import DataFrame
from PIL import Image

STYLE = Path(__file__).with_name("house.mplstyle")
PALETTE = rc_params_from_file(STYLE, use_default_template=False)["axes.prop_cycle"].by_key()[
    "color"
]
MARKERS = "osD^vPX<>ph"
COLUMN = 3.5  # inches: one of a paper's two columns
TALL = 6  # inches: a longer list of rows stands in two columns
PAGE = 9  # inches: panels that would be taller together stand beside each other
DARK_PAPER, DARK_INK = to_rgba_array(["#0d1117", "#e6edf3"])
SMALL: dict[str, Any] = {"fontsize": 6}
GREY = "0.35"
FACTOR = FuncFormatter(lambda value, _: f"{value:g}×")
GIGABYTES = FuncFormatter(lambda value, _: f"{value / 1e9:g}")
PERCENT = FuncFormatter(lambda value, _: f"{value:.0%}")
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
NUMBERS = ["tokens_per_s", "decode_tokens_per_s", "speedup", "perplexity", "weight_bytes"]
NUMBERS += ["kv_cache_bytes"]
RAW = ["warmup_s", "latency_s", "ttft_s", "inter_token_s", "busy_share", "pairs", "affinity"]

Panels = list[tuple[Figure | SubFigure, DataFrame]]  # each with the rows drawn in it


class NoData(ValueError):
    """No record has what a chart shows."""


def use_style() -> None:
    """Switch the house style on, whatever a matplotlibrc says."""
    plt.style.use(["default", STYLE])


# ---- rows


def styled(frame: DataFrame) -> DataFrame:
    """The frame with columns `colour` and `marker`, by the order in which techniques appear."""
    if "colour" in frame:
        return frame
    numbers, _ = pd.factorize(frame.technique)
    colours = [PALETTE[number % len(PALETTE)] for number in numbers]
    markers = [MARKERS[number % len(MARKERS)] for number in numbers]
    floats = frame.astype(dict.fromkeys(NUMBERS, float))  # None alone is no number to pandas
    return floats.assign(colour=colours, marker=markers)


def headline(frame: DataFrame) -> DataFrame:
    """The rows that belong in a headline chart (see `results.frame`)."""
    return frame[frame.headline]


def having(frame: DataFrame, *columns: str) -> DataFrame:
    """Headline rows that have one of these values."""
    rows = headline(frame)
    return rows[rows[list(columns)].notna().any(axis=1)]


def compared(frame: DataFrame) -> DataFrame:
    """Headline rows compared within one engine, those that failed at it, and the baselines that
    they name.
    """
    rows = frame[frame.headline]
    tried = rows.speedup.notna() | ~rows.status.isin(["ok", "unsupported"])
    paired = rows.same_engine & rows.baseline.notna() & tried
    baselines = pd.MultiIndex.from_frame(rows.loc[paired, ["technique", "baseline"]])
    names = pd.MultiIndex.from_frame(rows[["technique", "id"]])
    return rows[paired | names.isin(baselines)]


def detail(frame: DataFrame, name: str) -> pd.Series:
    """One of the numbers that only a technique has; NaN where a row has none."""
    values = [details.get(name) for details in frame.details]
    return pd.Series(values, frame.index, dtype=float)


def with_bits(frame: DataFrame) -> DataFrame:
    """Names that say so where an engine reads 4-bit weights beside others that do not."""
    four = frame["dtype"].fillna("").str.startswith("Q4")
    return frame.assign(variant=frame.variant.mask(four, frame.variant + " · 4-bit"))


# ---- parts of a chart


def height(rows: DataFrame, by: str = "technique") -> float:
    """Inches that rows take, one below the other, each group under a heading."""
    return 0.75 + 0.19 * len(rows) + 0.27 * float(rows[by].nunique())


def columns(rows: DataFrame) -> list[DataFrame]:
    """The rows as one column; as two, whole techniques each, where one would be too tall."""
    if height(rows) <= TALL or rows.technique.nunique() == 1:
        return [rows]
    sizes = rows.groupby("technique", sort=False).size() + 1.4  # with their headings
    is_left = rows.technique.map(sizes.cumsum() - sizes / 2 < sizes.sum() / 2)
    return [rows[is_left], rows[~is_left]]


def panels(
    drawn: DataFrame, title: str, inches: Callable[[DataFrame], float] = height
) -> tuple[Figure, Panels]:
    """A figure with a panel for each machine in `drawn`.

    inches : of a panel, from its rows.

    Returns the figure and (panel, rows) for each; of no rows, a figure that says so and no panel.
    """
    if drawn.empty:
        figure = plt.figure(figsize=(COLUMN, 0.5))
        figure.suptitle(f"{title}: no record to draw", x=0.01, ha="left")
        return figure, []
    parts = {"": drawn}
    if "machine" in drawn:
        parts = dict(list(drawn.groupby("machine", sort=False)))
    heights = list(map(inches, parts.values()))
    for beside in range(1, len(parts) + 1):
        lines = range(0, len(parts), beside)
        tall = [max(heights[first : first + beside]) for first in lines]
        if sum(tall) <= PAGE:
            break
    figure = plt.figure(figsize=(beside * COLUMN, sum(tall)))
    figure.suptitle(title, x=0.01, ha="left", fontsize=8, weight="bold")
    if len(parts) == 1:
        return figure, [(figure, drawn)]
    grid = figure.subfigures(len(tall), beside, squeeze=False, height_ratios=tall)
    subfigures = grid.flat[: len(parts)]
    for panel, machine in zip(subfigures, parts, strict=True):
        panel.suptitle(machine, x=0.01, ha="left", style="italic", **SMALL)
    return figure, list(zip(subfigures, parts.values(), strict=True))


def rows_chart(drawn: DataFrame, title: str, draw: Callable[[Axes, DataFrame], None]) -> Figure:
    """Rows one below the other, a panel for each machine, drawn by `draw(axis, rows)`; what is too
    tall stands in two columns of one scale, as wide as a paper's two.
    """
    figure, parts = panels(drawn, title, lambda rows: max(map(height, columns(rows))))
    width = figure.get_figwidth()
    for panel, rows in parts:
        groups = columns(rows)
        if len(groups) > 1:
            figure.set_figwidth(2 * width)
        axes = panel.subplots(1, len(groups), squeeze=False)[0]
        for axis, group in zip(axes, groups, strict=True):
            draw(axis, group)
        left, right = np.transpose([axis.get_xlim() for axis in axes])
        bottom, top = np.transpose([axis.get_ylim() for axis in axes])
        plt.setp(axes, xlim=(left.min(), right.max()), ylim=(bottom.max(), top.min()))
    return figure


def label(
    axis: Axes, text: str, x: float, y: float, offset: tuple[float, float] = (4, 0), **look: Any
) -> None:
    """A small text beside a point of the data, `offset` points from it."""
    look = {"va": "center"} | SMALL | look
    axis.annotate(text, (x, y), offset, textcoords="offset points", **look)


def title_of(technique: str) -> str:
    return technique.replace("_", " ").replace("gpus", "GPUs")


def name_rows(axis: Axes, rows: DataFrame, by: str = "technique") -> np.ndarray:
    """Name the rows from top to bottom, groups under a heading; returns where each row stands."""
    look: dict[str, Any] = {
        "weight": "bold",
        "bbox": {"fc": "white", "ec": "none", "pad": 0.5},
        "fontsize": 7,
    }
    y, at = [], 0.0
    for name, group in rows.groupby(by, sort=False):
        if rows[by].nunique() > 1:
            label(axis, title_of(name), 0, at, xycoords=("axes fraction", "data"), **look)
            at += 1
        y += list(at + np.arange(len(group)))
        at += len(group) + 0.4
    axis.set_yticks(y, rows.variant)
    axis.set_ylim(at - 0.6, -0.7)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    return np.array(y)


def name_failures(axis: Axes, rows: DataFrame, y: np.ndarray, column: str, side: str) -> None:
    """What has no value is said in its row, "left" or "right" in it, never left out."""
    place, offset = {"left": (0, (4, 0)), "right": (1, (-2, 0))}[side]
    look = {"xycoords": ("axes fraction", "data"), "ha": side, "style": "italic", "color": GREY}
    for at, value, status in zip(y, rows[column], rows.status, strict=True):
        if pd.isna(value):
            why = "not measured" if status == "ok" else status
            label(axis, why, place, at, offset, **look)


def bars(
    axis: Axes, rows: DataFrame, column: str, form: str, xlabel: str, side: str = "left"
) -> np.ndarray:
    """A bar for each row with its value beside it; returns where each row stands.

    form : of the value ("{:.2f}"); "" for none. side : where a row without a value says so.
    """
    y = name_rows(axis, rows)
    axis.barh(y, rows[column], height=0.62, color=rows.colour)
    for at, value in zip(y, rows[column], strict=True):
        if not pd.isna(value):
            label(axis, form.format(value), value, at)
    name_failures(axis, rows, y, column, side)
    axis.set(xlim=(0, np.fmax(rows[column].max(), 1e-9) * 1.18), xlabel=xlabel)
    return y


def plain_ticks(axis: Axis, form: FuncFormatter = PLAIN) -> None:
    """Few ticks on a log scale (`axes.xaxis` or `.yaxis`), written in full."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(form)
    axis.set_minor_locator(NullLocator())


def ratio_axis(axis: Axes, least: float, most: float, xlabel: str) -> None:
    """A log axis of ratios from `least` to `most`, a line at one."""
    axis.set(xscale="log", xlim=(least / 1.15, most * 1.8), xlabel=xlabel)
    plain_ticks(axis.xaxis, FACTOR)
    if most / least < 4:
        axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.axvline(1, color="0.2", lw=0.8, zorder=1)


def ratios(axis: Axes, rows: DataFrame, xlabel: str, by: str = "technique") -> None:
    """A mark for each row's `ratio` with its interval `ratio_ci95` and its text `note`, on a log
    axis; hollow where `hollow`.
    """
    y = name_rows(axis, rows, by)
    least = np.fmin(1, rows.ratio.min()) / 3  # no interval is drawn further
    most = np.fmax(1, rows.ratio.max()) * 3
    ground = {"fc": "white", "ec": "none", "pad": 0.3}  # no line runs through a note
    ends = [1]
    for at, row in zip(y, rows.itertuples(), strict=True):
        if pd.isna(row.ratio):
            continue
        ends_of_row = row.ratio_ci95 if isinstance(row.ratio_ci95, (list, tuple)) else [row.ratio]
        interval = np.clip(ends_of_row, least, most)
        axis.hlines(at, interval[0], interval[-1], color=row.colour, lw=2, alpha=0.55)
        fill = "white" if row.hollow else row.colour
        axis.plot(row.ratio, at, row.marker, color=row.colour, mfc=fill)
        label(axis, row.note, interval[-1], at, (5, 0), bbox=ground)
        ends += [*interval]
    ratio_axis(axis, min(ends), max(ends), xlabel)
    name_failures(axis, rows, y, "ratio", "right")


def curve(
    axis: Axes, rows: DataFrame, x: str, y: str, name: str, numbers: str = "", **look: Any
) -> None:
    """A line through the rows in their order, named at its end; below each point its value of the
    column `numbers`.
    """
    rows = rows.dropna(subset=[x, y])
    if rows.empty:
        return
    last = rows.iloc[-1]
    axis.plot(rows[x], rows[y], **{"marker": last.marker, "color": last.colour} | look)
    label(axis, name, last[x], last[y], (5, 0))
    if numbers:
        for number, at, value in zip(rows[numbers], rows[x], rows[y], strict=True):
            label(axis, f"{number:g}", at, value, (0, -6), ha="center", va="top")


# ---- charts that a lesson and the comparison draw


def speedup(frame: DataFrame, title: str = "Speed against the baseline of the same run") -> Figure:
    """Speed-up of each variant with its 95 % interval, on a log axis; baselines stand at one.

    A ratio between two engines is not a technique's gain, and CPU processes that stand in for GPUs
    show none: both are left out (`compared`).
    """
    rows = compared(styled(frame))
    base = rows.baseline.isna() | ~rows.same_engine
    ratio = rows.speedup.mask(base & (rows.status == "ok"), 1.0)
    rows = rows.assign(
        ratio=ratio,
        ratio_ci95=rows.speedup_ci95.mask(base),
        hollow=base,
        note=ratio.map("{:.2f}×".format).mask(base, "baseline"),
    )
    xlabel = "tokens/s over the baseline's (log)\nbar: 95 % interval"
    return rows_chart(rows, title, lambda axis, group: ratios(axis, group, xlabel))


def memory(frame: DataFrame, title: str = "Memory") -> Figure:
    """Weights, the KV cache at the end of the generation, and the measured peak while running above
    what was taken before.
    """
    rows = having(styled(frame), "weight_bytes", "peak_above_bytes")
    figure = rows_chart(rows, title, _draw_memory)
    if figure.axes:
        parts = figure.axes[0].get_legend_handles_labels()
        figure.legend(*parts, loc="outside lower center", ncols=3, handlelength=1.4)
    return figure


def _draw_memory(axis: Axes, rows: DataFrame) -> None:
    y = bars(
        axis, rows, "weight_bytes", "", "GB (bar: weights; number: peak, else weights)", "right"
    )
    weights, cache = rows.weight_bytes.fillna(0), rows.kv_cache_bytes.fillna(0)
    ends = np.fmax(weights + cache, rows.peak_above_bytes)
    axis.containers[0].set_label("_weights")  # in the colours of the techniques
    axis.barh(y, cache, 0.62, weights, color="0.2", label="KV cache")
    axis.plot(rows.peak_above_bytes, y, "|k", ms=9, mew=1.5, label="peak above start")
    numbers = rows.peak_above_bytes.fillna(rows.weight_bytes)
    for at, number, end in zip(y, numbers, ends, strict=True):
        label(axis, "" if pd.isna(number) else f"{number / 1e9:.2f}", end, at)
    axis.set_xlim(0, ends.max() * 1.18)
    axis.xaxis.set(major_formatter=GIGABYTES, major_locator=MaxNLocator(5))


# ---- files


def save(
    figure: Figure, drawn: DataFrame, folder: Path | str, name: str, caption: str = ""
) -> Path:
    """Write all that a write-up needs of a chart and close it; returns the path of the light .png.

    `name`.svg, .pdf and .png (300 dpi), `name`_dark.svg and .png; the rows that were drawn as .csv;
    the caption as .txt.

    Raises NoData, in one sentence, where no row was drawn.
    """
    plt.close(figure)
    if drawn.empty:
        raise NoData(f"{name}: no record to draw.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with plt.style.context(STYLE):
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
        path = _save_pictures(figure, folder / name)
        _darken(figure)
        _save_pictures(figure, folder / f"{name}_dark")
    _without_raw_runs(drawn).to_csv(folder / f"{name}.csv", index=False)
    (folder / f"{name}.txt").write_text(caption.strip() + "\n", encoding="utf-8")
    return path


def _save_pictures(figure: Figure, path: Path) -> Path:
    title = figure.get_suptitle() or path.name  # for those who hear the picture
    figure.savefig(f"{path}.svg", metadata={"Date": None, "Title": title})
    figure.savefig(f"{path}.png")
    picture = few_colours(Image.open(f"{path}.png"), 128)
    picture.save(f"{path}.png", optimize=True, dpi=(300, 300))
    return Path(f"{path}.png")


def _without_raw_runs(rows: DataFrame) -> DataFrame:
    """Rows for a CSV file: details as columns, no raw runs, no column without a value."""
    rows = rows.reset_index(drop=True)
    if "details" in rows:
        details = DataFrame([row if isinstance(row, dict) else {} for row in rows.details])
        rows = rows.drop(columns=list(details), errors="ignore").join(details)
    dropped = [*RAW, "reasons", "details", "colour", "marker"]
    return rows.drop(columns=dropped, errors="ignore").dropna(axis=1, how="all")


def _darken(figure: Figure) -> None:
    """Turn black, white and greys into those of dark paper, in place; colours stay as they are."""
    artists: list[Any] = figure.findobj()
    for text in figure.findobj(Text):  # these two are no children of theirs
        artists += [text.get_bbox_patch(), getattr(text, "arrow_patch", None)]
    for artist in artists:
        for part in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            if hasattr(artist, f"get_{part}") and hasattr(artist, f"set_{part}"):
                colour = getattr(artist, f"get_{part}")()
                getattr(artist, f"set_{part}")(_in_the_dark(colour))


def _in_the_dark(colour: Any) -> Any:
    """One colour, or an (n, 4) array of them, the neutral ones on a scale from ink to paper."""
    rgba = to_rgba_array(colour)
    if not rgba[:, 3].any():
        return "none"
    neutral = np.ptp(rgba[:, :3], axis=1) < 0.01
    mixed = DARK_INK + rgba[:, :1] * (DARK_PAPER - DARK_INK)
    rgba[neutral, :3] = mixed[neutral, :3]
    return rgba if np.ndim(colour) == 2 else tuple(rgba[0])


def few_colours(image: Image.Image, most: int) -> Image.Image:
    """With a palette; the method is one that keeps rare colours."""
    method, dither = Image.Quantize.FASTOCTREE, Image.Dither.NONE
    return image.convert("RGB").quantize(most, method=method, dither=dither)


def preview(path: Path) -> bytes:
    """A saved picture as small as a notebook of many wants it: 120 dots an inch, 32 colours."""
    picture, content = Image.open(path).convert("RGB"), io.BytesIO()
    picture.thumbnail((picture.width * 2 // 5, picture.height), Image.Resampling.LANCZOS)
    few_colours(picture, 32).save(content, "png", optimize=True)
    return content.getvalue()
