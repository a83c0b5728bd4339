"""The house's look: colours, marks, light and dark, a panel for each machine, files for write-ups."""

import functools
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from PIL import Image

from helpers.schema import TECHNIQUES

COLOURS = dict(
    zip(
        TECHNIQUES,
        ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#808080"],
        strict=True,
    )
)
MARKERS = dict(zip(TECHNIQUES, "osD^vPX", strict=True))
FACTOR = FuncFormatter(lambda value, _: f"{value:g}×")
GIGABYTES = FuncFormatter(lambda value, _: f"{value / 1e9:g}")
PERCENT = FuncFormatter(lambda value, _: f"{value:.0%}")
STYLE = Path(__file__).with_name("house.mplstyle")
PAPER, INK = "#0d1117", "#e6edf3"  # in the dark
DARK = {
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#30363d",
}
SMALL = {"fontsize": 6}
RAW = (
    "warmup_s",
    "latency_s",
    "ttft_s",
    "inter_token_s",
    "pairs",
    "reasons",
    "details",
    "affinity",
)
PUBLISHED = Path(__file__).parent / "data" / "published.csv"


class Nothing(ValueError):
    """No record has what a chart shows."""


def use_style() -> None:
    """Switch the house style on."""
    plt.style.use(STYLE)


def ink(share: float = 1.0) -> tuple:
    """The colour of text, mixed with the paper's: a grey that is right in light and in dark."""
    text, paper = (
        np.array(to_rgb(plt.rcParams[name])) for name in ("text.color", "figure.facecolor")
    )
    return tuple(paper + share * (text - paper))


def title_of(technique: str) -> str:
    return technique.replace("_", " ").replace("gpus", "GPUs")


def says(ax, text: str, x, y, right: float = 4, **look) -> None:
    """A small label beside a point of the data."""
    ax.annotate(
        text, (x, y), (right, 0), textcoords="offset points", **{"va": "center"} | SMALL | look
    )


def legend(fig, ax, columns: int = 3, **look) -> None:
    fig.legend(
        *ax.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=columns,
        handlelength=1.4,
        **look,
    )


def headline(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that belong in a headline chart (see `results.frame`)."""
    return frame[frame["headline"]]


def with_bits(frame: pd.DataFrame) -> pd.DataFrame:
    """Names that say so where an engine reads 4-bit weights beside others that do not."""
    four = frame["dtype"].fillna("").str.startswith("Q4")
    return frame.assign(variant=frame["variant"].where(~four, frame["variant"] + " · 4-bit"))


def with_any(*columns: str):
    """Selects the headline rows of techniques of which one row at least has one of these values."""

    def select(frame: pd.DataFrame) -> pd.DataFrame:
        known = headline(frame)[lambda rows: rows[list(columns)].notna().any(axis=1)]
        return headline(frame)[lambda rows: rows["technique"].isin(known["technique"])]

    return select


def of(technique: str, *sweeps: str):
    """Selects the rows of a technique's sweeps; without sweeps its headline rows, CPU ranks and
    failures among them.
    """
    return lambda frame: frame[
        (frame["technique"] == technique)
        & (
            frame["sweep"].isin(sweeps) & (frame["status"] == "ok")
            if sweeps
            else frame["sweep"].isna()
        )
    ]


def detail(frame: pd.DataFrame, name: str) -> pd.Series:
    """One of the details that only a technique has; null where a row has none."""
    return frame["details"].map(lambda details: details.get(name))


def tall(frame: pd.DataFrame, by: str = "technique") -> float:
    """Inches that `rows` takes."""
    groups = frame[by].nunique()
    return 0.75 + 0.19 * (len(frame) + 0.4 * groups + groups * (groups > 1))


def rows(ax, frame: pd.DataFrame, by: str = "technique") -> np.ndarray:
    """One row a record, top to bottom, groups set apart by a heading; returns where each row
    stands.
    """
    y, at = [], 0.0
    for name, group in frame.groupby(by, sort=False):
        if frame[by].nunique() > 1:
            ax.annotate(
                title_of(name),
                (0, at),
                (4, 0),
                xycoords=("axes fraction", "data"),
                va="center",
                textcoords="offset points",
                weight="bold",
                bbox={"fc": ax.get_facecolor(), "ec": "none", "pad": 0.5},
            )
            at += 1
        y += list(at + np.arange(len(group)))
        at += len(group) + 0.4
    ax.set_yticks(y, frame["variant"])
    ax.set_ylim(at - 0.6, -0.7)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    return np.array(y)


def failures(ax, frame: pd.DataFrame, y: np.ndarray, value: pd.Series, side: str = "left") -> None:
    """What has no value is said in its row, at one side of it, never left out."""
    for place, v, row in zip(y, value, frame.to_dict("records"), strict=True):
        if pd.isna(v):
            why = (
                row["status"]
                if row["status"] != "ok"
                else row["reasons"].get(value.name, "not measured")
            )
            why = why if len(why) <= 16 else "not measured"
            ax.annotate(
                why,
                (side == "right", place),
                (-2 if side == "right" else 4, 0),
                ha=side,
                va="center",
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                style="italic",
                color=ink(0.65),
                **SMALL,
            )


def bars(
    ax,
    frame: pd.DataFrame,
    column: str,
    form: Callable[[float], str] | None,
    label: str,
    side: str = "left",
) -> np.ndarray:
    """A bar for each record, its value beside it (form None: none); returns where each row stands."""
    y, value = rows(ax, frame), frame[column].astype(float)
    ax.barh(y, value.fillna(0), height=0.62, color=[COLOURS[t] for t in frame["technique"]])
    for place, v in zip(y, value, strict=True):
        if form and not pd.isna(v):
            says(ax, form(v), v, place)
    failures(ax, frame, y, value, side)
    ax.set(xlim=(0, np.nanmax([value.max(), 1e-9]) * 1.18), xlabel=label)
    return y


def ratio_axis(ax, least: float, most: float, label: str, narrow: bool = False) -> None:
    """A log axis of ratios with few, round ticks; fewer where it is narrow."""
    span = most / least
    fine, round_ = (0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.5, 2), (0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
    steps = fine if span < 2 else (0.5, 0.7, 1, 1.5, 2, 3) if span < 4 else round_
    if narrow:
        steps = (0.5, 1, 2) if span < 8 else (0.1, 1, 10)
    ax.set(xscale="log", xlim=(least / 1.15, most * 1.8), xlabel=label)
    ax.set_xticks(
        [
            s
            for s in (steps if span < 50 else (0.01, 0.1, 1, 10, 100))
            if least / 1.15 <= s <= most * 1.6
        ]
    )
    ax.xaxis.set_major_formatter(FACTOR)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.axvline(1, color=ink(0.8), lw=0.8, zorder=1)


def plain_log(axis, ticks: list[float]) -> None:
    """A log axis with these ticks, written in full."""
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def chart(
    title: str,
    select: Callable[[pd.DataFrame], pd.DataFrame],
    height: Callable[[pd.DataFrame], float],
):
    """Turn draw(fig, rows) into chart(frame, title) -> Figure, one column wide.

    select : the rows that belong in it; `Nothing`, in one sentence, where there are none.
    height : inches that these rows take. Where a column `machine` names several, each has a panel
        of its own.
    """

    def decorate(draw):
        @functools.wraps(draw)
        def whole(frame: pd.DataFrame, title: str = title) -> Figure:
            chosen = select(frame)
            if chosen.empty:
                raise Nothing(f"{title}: no record to draw.")
            parts = (
                list(chosen.groupby("machine", sort=False))
                if "machine" in chosen
                else [("", chosen)]
            )
            inches = [height(part) for _, part in parts]
            fig = plt.figure(figsize=(3.5, sum(inches)))
            fig.suptitle(title, x=0.01, ha="left", fontsize=8, weight="bold")
            panels = [fig] if len(parts) == 1 else fig.subfigures(len(parts), height_ratios=inches)
            for panel, (machine, part) in zip(panels, parts, strict=True):
                draw(panel, part)
                if len(parts) > 1:
                    panel.suptitle(machine, x=0.01, ha="left", style="italic", **SMALL)
            return fig

        whole.rows = select
        return whole

    return decorate


def flat(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows for a CSV file: raw runs left out, details as columns, columns without any value
    dropped.
    """
    rows = rows.reset_index(drop=True)
    if "details" in rows:
        details = pd.DataFrame(
            [found if isinstance(found, dict) else {} for found in rows["details"]]
        )
        rows = rows.drop(columns=[*RAW, *details.columns], errors="ignore").join(details)
    return rows.dropna(axis=1, how="all")


def _few_colours(image: Image.Image, most: int) -> Image.Image:
    """With a palette; the method is one that keeps rare colours."""
    return image.quantize(most, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def save(
    draw, frame: pd.DataFrame, folder: Path, caption: str, name: str = "", **title: str
) -> Path:
    """Draw a chart in light and in dark, and write all that a write-up needs; returns the path of
    the light .png.

    `name` (the chart's own, where none is given).svg, .pdf and .png (300 dpi), `name`_dark.svg and
    .png, the rows that were drawn as .csv, the caption as .txt.
    """
    folder, name = Path(folder), name or draw.__name__
    folder.mkdir(parents=True, exist_ok=True)
    for dark, endings in ((True, ("svg", "png")), (False, ("svg", "pdf", "png"))):
        with plt.style.context([STYLE, DARK] if dark else STYLE), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            fig = draw(frame, **title)
            for ending in endings:
                path = folder / f"{name}{'_dark' * dark}.{ending}"
                fig.savefig(
                    path,
                    metadata={"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(ending),
                )
            plt.close(fig)
        _few_colours(Image.open(path).convert("RGB"), 128).save(path, optimize=True, dpi=(300, 300))
    flat(draw.rows(frame)).to_csv(folder / f"{name}.csv", index=False)
    (folder / f"{name}.txt").write_text(caption.strip() + "\n", encoding="utf-8")
    return path


def preview(path: Path) -> bytes:
    """A saved picture as small as a notebook of many wants it: 120 dots an inch, 32 colours."""
    image, kept = Image.open(path).convert("RGB"), io.BytesIO()
    small = image.resize((420, round(420 * image.height / image.width)), Image.Resampling.LANCZOS)
    _few_colours(small, 32).save(kept, "png", optimize=True)
    return kept.getvalue()
