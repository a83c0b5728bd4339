"""Every look of every chart. Each function takes a frame of records (`results.frame`) and returns a figure."""

import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from adjustText import adjust_text
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from helpers.schema import TECHNIQUES

COLOURS = dict(zip(TECHNIQUES, ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555"],
                   strict=True))
MARKERS = dict(zip(TECHNIQUES, "osD^vPX", strict=True))
FACTOR = FuncFormatter(lambda value, _: f"{value:g}×")
GIGABYTES = FuncFormatter(lambda value, _: f"{value / 1e9:g}")
PERCENT = FuncFormatter(lambda value, _: f"{value:.0%}")


def use_style() -> None:
    """Switch the house style on."""
    plt.style.use(Path(__file__).with_name("house.mplstyle"))


def title_of(technique: str) -> str:
    return technique.replace("_", " ")


def headline(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that belong in a headline chart (see `results.frame`)."""
    return frame[frame["headline"]]


def _title(fig: Figure, title: str) -> None:
    """The title, flush with the figure's left edge, so that long row labels do not push it out."""
    fig.suptitle(title, x=0.01, ha="left", fontsize=8, weight="bold")


def _rows(frame: pd.DataFrame, width: float = 3.5):
    """A figure with one row a record, top to bottom, techniques set apart by a heading; returns (fig, ax, y)."""
    y, at, headings = [], 0.0, []
    for technique, group in frame.groupby("technique", sort=False):
        if frame["technique"].nunique() > 1:
            headings.append((at, technique))
            at += 1
        y += list(at + np.arange(len(group)))
        at += len(group) + 0.4
    fig, ax = plt.subplots(figsize=(width, 0.75 + 0.19 * at))
    ax.set_yticks(y, frame["variant"])
    ax.set_ylim(at - 0.6, -0.7)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    for place, technique in headings:
        ax.annotate(title_of(technique), (0, place), (4, 0), xycoords=("axes fraction", "data"), va="center",
                    textcoords="offset points", weight="bold", color=COLOURS[technique],
                    bbox={"fc": "white", "ec": "none", "pad": 0.5})
    return fig, ax, np.array(y)


def _failures(ax, frame: pd.DataFrame, y: np.ndarray, column: str) -> None:
    """What has no value is said in its row, never left out."""
    for place, row in zip(y, frame.to_dict("records"), strict=True):
        if pd.isna(row[column]):
            why = row["status"] if row["status"] != "ok" else row["reasons"].get(column, "not measured")
            ax.annotate(why, (1, place), (-2, 0), xycoords=("axes fraction", "data"), ha="right",
                        textcoords="offset points", va="center", style="italic", color="#666666", fontsize=6)


def speedup(frame: pd.DataFrame, title: str = "Speed against the baseline of the same run") -> Figure:
    """Speed-up of each variant with its 95 % interval, on a log axis; baselines stand at one.

    A ratio between two engines is not a technique's gain and is left to `engines`.
    """
    frame = headline(frame)
    frame = frame[frame["same_engine"]]
    fig, ax, y = _rows(frame)
    value = frame["speedup"].astype(float).mask(frame["baseline"].isna() & (frame["status"] == "ok"), 1.0)
    ends = [pair if isinstance(pair, (list, tuple)) else (v, v) for pair, v in
            zip(frame["speedup_ci95"], value, strict=True)]
    least, most = min(1.0, value.min()), max(1.0, value.max())
    for place, v, (low, high), row in zip(y, value, ends, frame.to_dict("records"), strict=True):
        if pd.isna(v):
            continue
        low, high = max(low, least / 3), min(high, most * 3)
        colour, base = COLOURS[row["technique"]], row["baseline"] is None or pd.isna(row["baseline"])
        ax.plot([low, high], [place, place], color=colour, solid_capstyle="butt", lw=2, alpha=0.55)
        ax.plot(v, place, marker=MARKERS[row["technique"]], color=colour, mfc="white" if base else colour)
        ax.annotate("baseline" if base else f"{v:.2f}×", (max(v, high), place), (5, 0), va="center",
                    textcoords="offset points", fontsize=6)
    ax.axvline(1, color="#333333", lw=0.8, zorder=1)
    ax.set_xscale("log")
    known = [1.0] + [min(max(x, least / 3), most * 3) for pair in ends for x in pair if not pd.isna(x)]
    ax.set_xlim(min(known) / 1.15, max(known) * 1.8)
    span = max(known) / min(known)
    steps = (0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.5, 2) if span < 3 else (0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
    ax.set_xticks([s for s in (steps if span < 50 else (0.01, 0.1, 1, 10, 100))
                   if min(known) / 1.15 <= s <= max(known) * 1.6])
    ax.xaxis.set_major_formatter(FACTOR)
    ax.xaxis.set_minor_locator(plt.NullLocator())
    _failures(ax, frame, y, "speedup") if value.isna().any() else None
    _title(fig, title)
    ax.set(xlabel="tokens/s over the baseline's (log; bar: 95 % interval)")
    return fig


def memory(frame: pd.DataFrame, title: str = "Memory") -> Figure:
    """Weights, KV cache at the end of the generation, and the measured peak above what was resident before."""
    frame = headline(frame)
    fig, ax, y = _rows(frame)
    weights, cache = (frame[c].astype(float).fillna(0) for c in ("weight_bytes", "kv_cache_bytes"))
    ax.barh(y, weights, height=0.62, color=[COLOURS[t] for t in frame["technique"]], label="weights")
    ax.barh(y, cache, left=weights, height=0.62, color="#BBBBBB", label="KV cache")
    peak = frame["peak_bytes"].astype(float) - frame["resident_before_bytes"].astype(float)
    ax.plot(peak, y, ls="", marker="|", ms=9, mew=1.5, color="#222222", label="peak above start")
    for place, value in zip(y, np.fmax(weights + cache, peak.fillna(0)), strict=True):
        if value:
            ax.annotate(f"{weights.iloc[list(y).index(place)] / 1e9:.2f}", (value, place), (4, 0), va="center",
                        textcoords="offset points", fontsize=6)
    _failures(ax, frame, y, "weight_bytes")
    ax.set_xlim(0, max(np.nanmax(peak.fillna(0)), (weights + cache).max()) * 1.18)
    ax.xaxis.set_major_formatter(GIGABYTES)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    _title(fig, title)
    ax.set(xlabel="GB (label: weights)")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=1.2)
    return fig


def limit(frame: pd.DataFrame, title: str = "How near the bandwidth limit") -> Figure:
    """Decode speed as a share of the best possible, given the bytes read a token and the measured bandwidth."""
    frame = headline(frame)
    fig, ax, y = _rows(frame)
    share = frame["limit_share"].astype(float)
    ax.barh(y, share.fillna(0), height=0.62, color=[COLOURS[t] for t in frame["technique"]])
    for place, v in zip(y, share, strict=True):
        if not pd.isna(v):
            ax.annotate(f"{v:.0%}", (v, place), (3, 0), textcoords="offset points", va="center", fontsize=6)
    _failures(ax, frame, y, "limit_share")
    ax.axvline(1, color="#333333", lw=0.8)
    ax.set_xlim(0, max(1.08, share.max(skipna=True) * 1.15))
    ax.xaxis.set_major_formatter(PERCENT)
    _title(fig, title)
    ax.set(xlabel="decode tokens/s over the bandwidth limit")
    return fig


def quality_speed(frame: pd.DataFrame, title: str = "Quality against speed") -> Figure:
    """Decode tokens/s (right is better), perplexity (down is better); area: weight bytes; the Pareto front is drawn."""
    frame = headline(frame).dropna(subset=["perplexity", "decode_tokens_per_s"])
    fig, ax = plt.subplots(figsize=(3.5, 2.9))
    x, y = frame["decode_tokens_per_s"].astype(float), frame["perplexity"].astype(float)
    area = 90 * frame["weight_bytes"].astype(float) / frame["weight_bytes"].astype(float).max()
    for technique, rows in frame.groupby("technique", sort=False):
        ax.scatter(x[rows.index], y[rows.index], s=area[rows.index], marker=MARKERS[technique], alpha=0.8,
                   color=COLOURS[technique], label=title_of(technique), linewidths=0)
    front = [i for i in frame.index if not ((x > x[i]) & (y <= y[i]) | (x >= x[i]) & (y < y[i])).any()]
    front.sort(key=lambda i: x[i])
    ax.plot(x[front], y[front], color="#999999", lw=0.8, zorder=0, ls="--")
    ax.margins(0.16, 0.22)
    ax.set(xlabel="decode tokens/s  (better →)", ylabel="perplexity  (← better)")
    _title(fig, title)
    if frame["technique"].nunique() > 1:
        fig.legend(loc="outside lower center", ncols=2, markerscale=0.7)
    adjust_text([ax.text(x[i], y[i], frame.loc[i, "variant"], fontsize=6) for i in frame.index], x=x.tolist(),
                y=y.tolist(), ax=ax, expand=(1.3, 1.7), arrowprops={"arrowstyle": "-", "color": "#999999", "lw": 0.5})
    return fig


def fit(plan: pd.DataFrame, title: str) -> Figure:
    """What fits where (`planner.plan` of one model): GB in each cell; blue fits on one GPU, with its best tokens/s."""
    techniques, gpus = list(dict.fromkeys(plan["technique"])), list(dict.fromkeys(plan["gpu"]))
    fig, ax = plt.subplots(figsize=(0.9 + 0.62 * len(gpus), 0.9 + 0.27 * len(techniques)))
    for row in plan.to_dict("records"):
        x, y, fits = gpus.index(row["gpu"]), techniques.index(row["technique"]), row["fits"]
        share = min(1.0, row["total_bytes"] / row["gpu_memory_bytes"])
        ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, lw=1, ec="white",
                                   fc=plt.cm.Blues(0.15 + 0.4 * share) if fits else "#EEEEEE"))
        said = f"{row['limit_tokens_per_s']:.0f} t/s" if fits else (
            "–" if pd.isna(row["fewest_gpus"]) else f"{row['fewest_gpus']} GPUs")
        ax.text(x, y, f"{row['total_bytes'] / 1e9:.1f}\n{said}", ha="center", va="center", fontsize=5.5,
                color="#000000" if fits else "#555555")
    ax.set_xticks(range(len(gpus)), gpus, rotation=35, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(techniques)), techniques)
    ax.set(xlim=(-0.5, len(gpus) - 0.5), ylim=(len(techniques) - 0.5, -0.5))
    ax.grid(visible=False)
    ax.tick_params(length=0)
    _title(fig, title)
    return fig


def save(fig: Figure, name: str, data: pd.DataFrame, folder: Path, caption: str = "") -> Path:
    """Write `name`.svg, .pdf and .png (300 dpi), the data it was drawn from as .csv, its caption as .txt."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fig.savefig(folder / f"{name}.svg", metadata={"Date": None})
        fig.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
        fig.savefig(folder / f"{name}.png")
    data.to_csv(folder / f"{name}.csv", index=False)
    (folder / f"{name}.txt").write_text(caption.strip() + "\n", encoding="utf-8")
    return folder / f"{name}.svg"
