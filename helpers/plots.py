"""Every chart. Each takes a frame of records (`results.frame`) and a title, and returns a figure,
one column wide; where a column `machine` names several, each has a panel of its own
(`looks.chart`).
"""

import numpy as np
import pandas as pd
from adjustText import adjust_text
from matplotlib.ticker import MaxNLocator

from helpers import looks
from helpers.curves import batching, fit, ranks, throughput_latency
from helpers.looks import (
    COLOURS,
    FACTOR,
    MARKERS,
    PERCENT,
    Nothing,
    chart,
    headline,
    preview,
    save,
    use_style,
)

__all__ = [
    "COLOURS",
    "FACTOR",
    "MARKERS",
    "PERCENT",
    "Nothing",
    "batching",
    "fit",
    "headline",
    "preview",
    "ranks",
    "save",
    "throughput_latency",
    "use_style",
]
FACTORS = [
    "bits, in one engine",
    "engine, at the same bits",
    "scheduler, in one engine",
    "engine × scheduler",
]
BASES = ("fp32", "dense")  # what published ratios are taken against
SAME = {"block-20": "structured-20"}  # another name for as much removed in the same way
METRICS = {
    "tokens_per_s": ("speed", 1),
    "latency": ("speed", -1),
    "peak_memory": ("memory", 1),
    "perplexity": ("perplexity", 1),
}  # of published rows: what they are drawn as, and the exponent


def _compared(frame: pd.DataFrame) -> pd.DataFrame:
    """Headline rows compared within one engine, and the baselines that they name."""
    frame = frame[frame["headline"] & frame["same_engine"]]
    named = set(zip(frame["technique"], frame["baseline"], strict=True))
    used = np.array(
        [pair in named for pair in zip(frame["technique"], frame["id"], strict=True)], dtype=bool
    )
    return frame[frame["baseline"].notna() | used]


def _clear(ax) -> dict:
    """A label's own ground, so that no line runs through it."""
    return {"bbox": {"fc": ax.get_facecolor(), "ec": "none", "pad": 0.3}}


@chart("Speed against the baseline of the same run", _compared, looks.tall)
def speedup(fig, frame):
    """Speed-up of each variant with its 95 % interval, on a log axis; baselines stand at one.

    A ratio between two engines is not a technique's gain and is left to `factors`; what CPU
    processes that stand in for GPUs gain is left to `ranks`.
    """
    ax, base = fig.subplots(), frame["baseline"].isna()
    y = looks.rows(ax, frame)
    value = frame["speedup"].astype(float).mask(base & (frame["status"] == "ok"), 1.0)
    least, most = min(1.0, value.min()), max(1.0, value.max())
    ends = np.array(
        [
            pair if isinstance(pair, (list, tuple)) else (v, v)
            for pair, v in zip(frame["speedup_ci95"], value, strict=True)
        ],
        dtype=float,
    ).clip(least / 3, most * 3)
    for place, v, (low, high), first, technique in zip(
        y, value, ends, base, frame["technique"], strict=True
    ):
        if not pd.isna(v):
            colour = COLOURS[technique]
            ax.plot(
                [low, high], [place, place], color=colour, solid_capstyle="butt", lw=2, alpha=0.55
            )
            ax.plot(
                v,
                place,
                marker=MARKERS[technique],
                color=colour,
                mfc=ax.get_facecolor() if first else colour,
            )
            looks.says(
                ax, "baseline" if first else f"{v:.2f}×", max(v, high), place, 5, **_clear(ax)
            )
    known = np.append(ends[~np.isnan(ends)], 1)
    looks.ratio_axis(
        ax, known.min(), known.max(), "tokens/s over the baseline's (log)\nbar: 95 % interval"
    )
    looks.failures(ax, frame, y, value, "right")


@chart(
    "Memory", looks.with_any("weight_bytes", "peak_bytes"), lambda frame: looks.tall(frame) + 0.15
)
def memory(fig, frame):
    """Weights, KV cache at the end of the generation, and the measured peak above what was resident
    before.
    """
    ax = fig.subplots()
    y = looks.bars(ax, frame, "weight_bytes", None, "GB (label: weights)", "right")
    weights, cache = (frame[c].astype(float).fillna(0) for c in ("weight_bytes", "kv_cache_bytes"))
    peak = frame["peak_bytes"].astype(float) - frame["resident_before_bytes"].astype(float)
    ax.containers[0].set_label("weights")
    ax.barh(y, cache, left=weights, height=0.62, color=looks.ink(0.35), label="KV cache")
    ax.plot(peak, y, ls="", marker="|", ms=9, mew=1.5, color=looks.ink(), label="peak above start")
    for place, w, end in zip(y, weights, np.fmax(weights + cache, peak.fillna(0)), strict=True):
        looks.says(ax, f"{w / 1e9:.2f}" if w else "", end, place)
    ax.set_xlim(0, np.nanmax([peak.max(), (weights + cache).max()]) * 1.18)
    ax.xaxis.set(major_formatter=looks.GIGABYTES, major_locator=MaxNLocator(5))
    looks.legend(fig, ax)


@chart("How near the bandwidth limit", looks.with_any("limit_share"), looks.tall)
def limit(fig, frame):
    """Decode speed as a share of the best possible, given the bytes read a token and the measured
    bandwidth.
    """
    ax = fig.subplots()
    looks.bars(
        ax, frame, "limit_share", "{:.0%}".format, "decode tokens/s over the bandwidth limit"
    )
    ax.axvline(1, color=looks.ink(0.8), lw=0.8)
    ax.set_xlim(0, max(1.08, ax.get_xlim()[1]))
    ax.xaxis.set_major_formatter(PERCENT)


@chart("Cost of a million tokens", headline, looks.tall)
def cost(fig, frame):
    """Price of a million new tokens, from a column `cost_per_million_tokens`; lower is better."""
    looks.bars(
        fig.subplots(),
        frame,
        "cost_per_million_tokens",
        "{:.2f}".format,
        "per million tokens (← better)",
    )


def _rated(frame: pd.DataFrame) -> pd.DataFrame:
    return headline(frame).dropna(subset=["perplexity", "decode_tokens_per_s", "weight_bytes"])


def pareto(rows: pd.DataFrame) -> pd.Series:
    """True where no other row is as good in decode speed, perplexity and weight bytes, and better
    in one.
    """
    cost = rows[["decode_tokens_per_s", "perplexity", "weight_bytes"]].astype(float) * [-1, 1, 1]
    return cost.apply(
        lambda mine: not ((cost <= mine).all(axis=1) & (cost < mine).any(axis=1)).any(), axis=1
    )


def _over(rows: pd.DataFrame) -> pd.Series:
    """True where perplexity is more than three times the median: off the scale."""
    return rows["perplexity"].astype(float) > 3 * rows["perplexity"].astype(float).median()


def _seen(rows: pd.DataFrame) -> pd.Series:
    """Perplexity as drawn: what is off the scale stands at the upper edge, one above the other in
    order.
    """
    true, over = rows["perplexity"].astype(float), _over(rows)
    return true.mask(over, 3 * true.median() * 1.12 ** (true.where(over).rank() - 1))


def _scatter(ax, rows: pd.DataFrame) -> None:
    """One text's rows: marks, ringed where on the front, and scales."""
    x, size, y = (
        rows["decode_tokens_per_s"].astype(float),
        rows["weight_bytes"].astype(float),
        _seen(rows),
    )
    for i, best in pareto(rows).items():
        technique = rows.loc[i, "technique"]
        ax.scatter(
            x[i],
            y[i],
            10 + 60 * size[i] / size.max(),
            marker=MARKERS[technique],
            linewidths=0.9,
            zorder=3,
            color=COLOURS[technique],
            alpha=0.9 if best else 0.45,
            ec=looks.ink() if best else "none",
            label=looks.title_of(technique),
        )
    ax.set(
        xlabel="decode tokens/s  (better →)",
        ylabel="perplexity  (← better; ↑: off the scale)",
        xscale="log",
        yscale="log",
    )
    ax.set_title(rows["eval_text"].iloc[0].partition(" (")[0], weight="normal", **looks.SMALL)
    for axis in (ax.xaxis, ax.yaxis):
        looks.plain_log(
            axis, [step * ten for ten in (1, 10, 100, 1000) for step in (1, 1.5, 2, 3, 5, 7)]
        )
    ax.margins(0.14, 0.12)


def _label(ax, rows: pd.DataFrame) -> None:
    """Each variant's name once, and one baseline's, moved apart; on the front in full colour."""
    x, y, best = rows["decode_tokens_per_s"].astype(float), _seen(rows), pareto(rows)
    above = " ↑" + rows["perplexity"].map("{:.0f}".format)
    said = rows["variant"] + above.where(_over(rows), "")
    named = rows.assign(best=best, name=rows["variant"].mask(rows["baseline"].isna(), "baseline"))
    named = named.sort_values("best", ascending=False, kind="stable").drop_duplicates("name").index
    drawn = []
    for explode in (
        (0.3, 1.0),
        (0.5, 1.5),
        (1.0, 2.0),
        (0.1, 0.5),
    ):  # until no label covers another
        for old in drawn:
            old.remove()
        texts, lines = adjust_text(
            [
                ax.text(x[i], y[i], said[i], color=looks.ink(1 if best[i] else 0.65), **looks.SMALL)
                for i in named
            ],
            x=x.tolist(),
            y=y.tolist(),
            ax=ax,
            expand=(1.15, 1.7),
            force_text=(0.5, 1.6),
            force_static=(0.2, 0.4),
            force_explode=explode,
            iter_lim=1200,
            arrowprops={"arrowstyle": "-", "color": looks.ink(0.5), "lw": 0.4},
        )
        drawn, boxes = [*texts, *lines], [text.get_window_extent() for text in texts]
        if all(box.count_overlaps(boxes) == 1 for box in boxes):
            break


@chart(
    "Quality against speed and size", _rated, lambda frame: 0.5 + 5.2 * frame["eval_text"].nunique()
)
def quality_speed(fig, frame):
    """Perplexity (down is better) over decode tokens/s (right is better); area: weight bytes.
    Ringed: the Pareto front in speed, quality and bytes. Texts of different perplexity have a panel
    each.
    """
    texts = [rows for _, rows in frame.groupby("eval_text", sort=False)]
    axes = np.atleast_1d(fig.subplots(len(texts)))
    for ax, rows in zip(axes, texts, strict=True):
        _scatter(ax, rows)
    handles = {
        label: mark
        for ax in axes
        for mark, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=3, markerscale=0.6)
    fig.get_figure(
        root=True
    ).draw_without_rendering()  # labels are moved on axes of their final size
    for ax, rows in zip(axes, texts, strict=True):
        _label(ax, rows)


def _place(frame: pd.DataFrame) -> list[str]:
    """What an id is unique within."""
    return ["machine", "technique"] if "machine" in frame else ["technique"]


def _factors(frame: pd.DataFrame) -> pd.DataFrame:
    """Ratios of speed kept apart: bits in one engine, engine at the same bits, scheduler in one
    engine.
    """
    base = frame.set_index([*_place(frame), "id"])[["engine", "dtype", "variant"]].add_prefix(
        "base_"
    )
    rows = frame[frame["headline"] & (frame["status"] == "ok")].join(
        base, on=[*_place(frame), "baseline"]
    )
    bits = rows[
        (rows["technique"] == "quantization")
        & rows["baseline"].notna()
        & (rows["same_engine"] | (rows["dtype"] == rows["base_dtype"]))
    ]
    made = [
        bits.assign(
            factor=bits["same_engine"].map({True: FACTORS[0], False: FACTORS[1]}),
            value=bits["speedup"],
            variant=bits["variant"] + " / " + bits["base_variant"],
        )
    ]
    batched = looks.with_bits(rows[rows["technique"] == "continuous_batching"])
    for name, factor in zip(
        ("engine_factor", "scheduler_factor", "total_factor"), FACTORS[1:], strict=True
    ):
        known = batched.assign(factor=factor, value=looks.detail(batched, name), speedup_ci95=None)
        made.append(known[known["value"].notna()].drop_duplicates("value"))
    claimed = (
        pd.read_csv(looks.PUBLISHED)
        .query("metric == 'throughput_vs_transformers'")
        .assign(
            factor=FACTORS[3], variant=lambda rows: rows["variant"] + ", claimed: " + rows["note"]
        )
    )
    machines = batched["machine"].unique() if "machine" in frame else [None] * (len(batched) > 0)
    made += [claimed.assign(**{"machine": machine} if machine else {}) for machine in machines]
    made = pd.concat(
        [rows.astype({"value": float}) for rows in made if len(rows)] or [bits.assign(factor="")],
        ignore_index=True,
    )
    return made.sort_values("factor", key=lambda names: names.map(FACTORS.index), kind="stable")


@chart(
    "What gave the speed: bits, engine or scheduler",
    _factors,
    lambda frame: looks.tall(frame, "factor"),
)
def factors(fig, frame):
    """Each ratio compares two rows that differ in one thing only; no technique's gain is read
    across engines.
    """
    ax, seen = fig.subplots(), [1.0]
    for place, row in zip(looks.rows(ax, frame, "factor"), frame.itertuples(), strict=True):
        colour = COLOURS[row.technique]
        ends = row.speedup_ci95 if isinstance(row.speedup_ci95, tuple) else (row.value, row.value)
        ax.plot(ends, (place, place), color=colour, lw=2, alpha=0.55)
        ax.plot(
            row.value,
            place,
            marker=MARKERS[row.technique],
            color=colour,
            mfc=colour if isinstance(row.id, str) else "none",
        )
        looks.says(ax, f"{row.value:.2f}×", ends[1], place, 6, **_clear(ax))
        seen += [*ends]
    claimed = "; hollow: claimed" if (frame["factor"] == FACTORS[3]).any() else ""
    looks.ratio_axis(ax, min(seen), max(seen), f"ratio of tokens/s (log{claimed})")


def published_ratios() -> pd.DataFrame:
    """Published figures over the same source's own baseline: variant, kind (speed, memory,
    perplexity), ratio.
    """
    rows = pd.read_csv(looks.PUBLISHED, keep_default_na=False).query("metric in @METRICS")
    rows = rows.assign(value=rows["value"].astype(float), variant=rows["variant"].replace(SAME))
    place = ["source", "model", "hardware", "batch_size", "metric"]
    base = rows[rows["variant"].isin(BASES)].set_index(place)["value"]
    rows = rows[~rows["variant"].isin(BASES)].join(base.rename("base"), on=place, how="inner")
    kinds = rows["metric"].map(METRICS)
    return rows.assign(
        kind=kinds.str[0], ratio=(rows["value"] / rows["base"]) ** kinds.str[1].astype(int)
    )


def _own_ratios(frame: pd.DataFrame) -> pd.DataFrame:
    """Headline rows that a published row has the name of, with ratios to their baseline."""
    need = frame.assign(
        need=frame["peak_bytes"].astype(float) - frame["resident_before_bytes"].astype(float)
    )
    base = need.set_index([*_place(need), "id"])[["need", "perplexity", "variant"]].add_prefix(
        "base_"
    )
    mine = need[need["headline"]].join(base, on=[*_place(need), "baseline"], how="inner")
    mine = mine[
        mine["base_variant"].isin(BASES) & mine["variant"].isin(published_ratios()["variant"])
    ]
    mine = mine.drop_duplicates(["machine", "variant"] if "machine" in frame else "variant")
    return mine.assign(
        group="",
        speed=mine["speedup"],
        memory=mine["need"] / mine["base_need"],
        perplexity=mine["perplexity"].astype(float) / mine["base_perplexity"].astype(float),
    )


@chart("Beside published figures", _own_ratios, lambda frame: looks.tall(frame, "group") + 0.15)
def beside(fig, frame):
    """This machine's ratios to its baselines (filled) beside published ones to theirs (hollow):
    never joined.
    """
    others, axes = published_ratios(), fig.subplots(1, 3, sharey=True)
    for ax, kind in zip(axes, ("speed", "memory", "perplexity"), strict=True):
        y, seen = looks.rows(ax, frame, "group"), [1.0]
        for place, row in zip(y, frame.itertuples(), strict=True):
            value, theirs = (
                getattr(row, kind),
                others.query("variant == @row.variant and kind == @kind")["ratio"],
            )
            ax.plot(
                theirs,
                [place] * len(theirs),
                "o",
                mfc="none",
                mec=looks.ink(0.8),
                ls="",
                label="published",
            )
            ax.plot(value, place, "o", color=COLOURS[row.technique], label="this machine", ms=3)
            seen += [v for v in (value, *theirs) if not pd.isna(v)]
        looks.ratio_axis(ax, min(seen), max(seen) / 1.4, kind, narrow=True)
        ax.tick_params(labelleft=ax is axes[0])
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=2)
