"""Charts of batches, of ranks and of what fits where; `plots` offers them beside its own."""

import re

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from helpers import looks
from helpers.looks import COLOURS, GIGABYTES, PUBLISHED, SMALL, chart, detail, ink, of, says, tall

BATCHED = [
    "one-by-one",
    "static-transformers",
    "static-vllm",
    "continuous-vllm",
]  # the three-way comparison
LATENCIES = {"ttft": "first token (s)", "inter_token": "next token (s)"}
ROUND = [step * 10.0**power for power in range(-3, 6) for step in (1, 2, 5)]  # ticks of log axes
QUANTILES = {"p50": "-", "p95": "--", "p99": ":"}
NAMED = {
    "p50": "center",
    "p95": "top",
    "p99": "bottom",
}  # where a line's name stands, so that none covers another


@chart("Throughput of a mixed workload", of("continuous_batching"), lambda frame: tall(frame) + 0.1)
def batching(fig, frame):
    """Useful tokens/s: one by one, static batches, continuous; what engine and scheduler gave drawn
    apart.
    """
    order = {name: at for at, name in enumerate(BATCHED)}
    frame = frame.sort_values(
        "id", key=lambda ids: ids.map(order).fillna(len(order)), kind="stable"
    )
    frame = looks.with_bits(frame)
    ax = fig.subplots()
    y = dict(
        zip(
            frame["id"],
            looks.bars(ax, frame, "tokens_per_s", "{:.0f}".format, "useful tokens/s"),
            strict=True,
        )
    )
    found, edge = frame.set_index("id"), ax.get_xlim()[1]
    steps = {
        ("one-by-one", "static-transformers"): (
            "batching",
            found["speedup"].get("static-transformers"),
        ),
        ("static-transformers", "static-vllm"): (
            "engine",
            detail(found, "engine_factor").get("static-vllm"),
        ),
        ("static-vllm", "continuous-vllm"): (
            "scheduler",
            detail(found, "scheduler_factor").get("continuous-vllm"),
        ),
    }
    for (one, other), (name, factor) in steps.items():
        if one in y and other in y and not pd.isna(factor):
            ax.annotate(
                "",
                (edge, y[other]),
                (edge, y[one]),
                arrowprops={"arrowstyle": "->", "lw": 0.8, "color": ink(0.8)},
            )
            says(ax, f"{name}\n{factor:.1f}×", edge, (y[one] + y[other]) / 2)
    ax.set_xlim(0, edge * 1.35)
    if len(y) > len(order & y.keys()) > 0:
        ax.axhline(max(y[name] for name in order if name in y) + 0.5, color=ink(0.4), lw=0.6)


def _curve(
    ax, rows: pd.DataFrame, x: str, y: str, label: str, va: str = "center", along: str = "", **look
) -> None:
    """A line through rows in the order of `along` (x), named at its end."""
    rows = rows.dropna(subset=[x, y]).sort_values(along or x)
    if len(rows):
        ax.plot(rows[x], rows[y], **{"marker": "v", "color": COLOURS["continuous_batching"]} | look)
        says(ax, label, rows[x].iloc[-1], rows[y].iloc[-1], 5, va=va)


def _panels(frame: pd.DataFrame) -> list[str]:
    return [name for name in ("batch_size", "request_rate") if (frame["sweep"] == name).any()]


@chart(
    "Throughput against latency",
    of("continuous_batching", "batch_size", "request_rate"),
    lambda frame: (
        0.4 + 1.5 * sum({"batch_size": 1, "request_rate": 3}[name] for name in _panels(frame))
    ),
)
def throughput_latency(fig, frame):
    """What batches cost each user: tokens/s against time per token by batch size. A server under
    load: its tokens/s against latencies, with the objectives they are held against; goodput by the
    rate of requests.
    """
    sweeps, both = _panels(frame), "batch_size" in _panels(frame)
    axes = np.atleast_1d(fig.subplots(both + 3 * ("request_rate" in sweeps)))
    if both:
        rows = frame[frame["sweep"] == "batch_size"].assign(
            ms=lambda r: 1e3 * r["batch_size"] / r["tokens_per_s"]
        )
        best = rows.assign(ms=1e3 * rows["batch_size"] / rows["limit_tokens_per_s"].astype(float))
        other = rows.assign(
            tokens_per_s=pd.to_numeric(detail(rows, "transformers_tokens_per_s"), errors="coerce")
        )
        other = other[other["engine"] != "transformers"].assign(
            ms=lambda r: 1e3 * r["batch_size"] / r["tokens_per_s"]
        )
        _curve(
            axes[0],
            other,
            "tokens_per_s",
            "ms",
            "transformers",
            marker="o",
            mfc=axes[0].get_facecolor(),
        )
        for engine, group in rows.groupby("engine"):
            _curve(axes[0], group, "tokens_per_s", "ms", engine)
            for row in group.itertuples():
                axes[0].annotate(
                    row.batch_size,
                    (row.tokens_per_s, row.ms),
                    (0, -5),
                    ha="center",
                    va="top",
                    textcoords="offset points",
                    **SMALL,
                )
        _curve(
            axes[0], best, "limit_tokens_per_s", "ms", "limit", ls="--", marker="", color=ink(0.5)
        )
        axes[0].set(
            xlabel="tokens/s of the whole batch (number: batch size)",
            ylabel="ms a token",
            xscale="log",
            yscale="log",
        )
        axes[0].margins(x=0.15, y=0.2)
        for axis in (axes[0].xaxis, axes[0].yaxis):
            looks.plain_log(axis, ROUND)
    if "request_rate" in sweeps:
        _rates(axes[both:], frame[frame["sweep"] == "request_rate"])


def _rates(axes, rows: pd.DataFrame) -> None:
    """Three panels: time to first token and between tokens over tokens/s; requests in time over
    those sent.
    """
    names = list(dict.fromkeys(key for details in rows["details"] for key in details))
    names += [
        "failed_requests",
        "goodput_per_s",
        *(f"{what}_{q}_s" for what in LATENCIES for q in QUANTILES),
    ]
    rows = rows.assign(
        **{name: pd.to_numeric(detail(rows, name), errors="coerce") for name in names}
    )
    for ax, (what, label) in zip(axes, LATENCIES.items(), strict=False):
        for quantile, line in QUANTILES.items():
            _curve(
                ax,
                rows,
                "tokens_per_s",
                f"{what}_{quantile}_s",
                quantile,
                NAMED[quantile],
                "request_rate_per_s",
                ls=line,
            )
        for row in rows.itertuples():
            ax.annotate(
                f"{row.request_rate_per_s:g}",
                (row.tokens_per_s, getattr(row, f"{what}_p50_s")),
                (0, -5),
                ha="center",
                va="top",
                textcoords="offset points",
                **SMALL,
            )
        for objective in set(rows.get(f"objective_{what}_s", pd.Series(dtype=float)).dropna()):
            ax.axhline(objective, color=ink(0.6), lw=0.8)
            says(
                ax,
                "objective",
                0,
                objective,
                2,
                va="bottom",
                color=ink(0.7),
                xycoords=ax.get_yaxis_transform(),
            )
        ax.set(
            ylabel=label, yscale="log", xlabel="tokens/s of the server (number: requests/s sent)"
        )
        ax.margins(x=0.18, y=0.25)
        looks.plain_log(ax.yaxis, ROUND)
    ideal = rows.assign(goodput_per_s=rows["request_rate_per_s"])
    _curve(
        axes[-1],
        ideal,
        "request_rate_per_s",
        "goodput_per_s",
        "all",
        marker="",
        color=ink(0.5),
        ls="--",
    )
    _curve(axes[-1], rows, "request_rate_per_s", "goodput_per_s", "in time")
    for row in rows[rows["failed_requests"] > 0].itertuples():
        says(
            axes[-1],
            f"{row.failed_requests:.0f} failed",
            row.request_rate_per_s,
            row.goodput_per_s,
            -5,
            va="top",
            ha="right",
        )
    axes[-1].set(xlabel="requests/s sent", ylabel="requests/s in time", ylim=(0, None))
    axes[-1].margins(x=0.18)


@chart("Several ranks", of("multiple_gpus"), lambda frame: 3.2 + 0.19 * len(frame))
def ranks(fig, frame):
    """Weights a rank and tokens/s by number of ranks; below, in a panel of their own, what others
    published.
    """
    frame = frame.sort_values("world_size", kind="stable")
    frame = frame.assign(
        rank_weight_bytes=detail(frame, "rank_weight_bytes").fillna(frame["weight_bytes"]),
        variant=frame["variant"] + " · " + frame["world_size"].astype(str),
    )
    above, below = fig.subfigures(2, height_ratios=[0.9 + 0.19 * len(frame), 1.9])
    left, right = above.subplots(1, 2, sharey=True)
    looks.bars(
        left,
        frame,
        "rank_weight_bytes",
        lambda v: f"{v / 1e9:.2f}",
        "GB of weights a rank\n(row: name · ranks)",
    )
    looks.bars(right, frame, "tokens_per_s", "{:.1f}".format, "tokens/s" + cpu_ranks(frame))
    left.xaxis.set(major_formatter=GIGABYTES, major_locator=MaxNLocator(3))
    right.tick_params(labelleft=False)
    _published_ranks(below.subplots())


def cpu_ranks(frame: pd.DataFrame) -> str:
    """A warning under an axis of speeds where ranks are processes that share one CPU."""
    on = detail(frame, "ranks_on").fillna(frame["device"].str[:3].map({"cpu": "cpu"}))
    return "\n(ranks share one CPU)" if ((on == "cpu") & (frame["world_size"] > 1)).any() else ""


def _published_ranks(ax) -> None:
    """Published tokens/s against the number of GPUs: hollow, a line for each source, model and way
    to cut.
    """
    rows = pd.read_csv(PUBLISHED).query("technique == 'multiple_gpus' and metric == 'tokens_per_s'")
    rows = rows.assign(
        gpus=rows["hardware"].str.extract(r"^(\d+)x", expand=False).astype(float),
        way=rows["variant"].str.replace(r"\d+$", "", regex=True),
    )
    for at, ((source, model, way), group) in enumerate(
        rows.groupby(["source", "model", "way"], sort=False)
    ):
        source = re.split(r"[ :.]", source)[0]
        _curve(
            ax,
            group,
            "gpus",
            "value",
            f"{model} {way}, {source}",
            "bottom" if way == "tp" else "top",
            lw=0.7,
            marker="osD^vP"[at % 6],
            mfc="none",
            color=ink(0.7),
        )
    ax.set(
        xscale="log",
        yscale="log",
        xlim=(0.9, 40),
        ylim=(0.3, 600),
        ylabel="tokens/s",
        xlabel="GPUs (published by others, on their hardware)",
    )
    looks.plain_log(ax.xaxis, [1, 2, 4, 8])
    looks.plain_log(ax.yaxis, [1, 10, 100])


@chart("What fits where", lambda plan: plan, lambda plan: 0.9 + 0.27 * plan["technique"].nunique())
def fit(fig, plan):
    """What fits where (`planner.plan` of one model): GB in each cell; blue fits on one GPU, with
    its best tokens/s.
    """
    techniques, gpus, ax = (
        list(plan["technique"].unique()),
        list(plan["gpu"].unique()),
        fig.subplots(),
    )
    fig.set_figwidth(max(3.5, 0.9 + 0.43 * len(gpus)))
    for row in plan.to_dict("records"):
        x, y, fits = gpus.index(row["gpu"]), techniques.index(row["technique"]), row["fits"]
        share = min(1.0, row["total_bytes"] / row["gpu_memory_bytes"])
        ax.add_patch(
            Rectangle(
                (x - 0.5, y - 0.5),
                1,
                1,
                lw=1,
                ec=ax.get_facecolor(),
                fc=colormaps["Blues"](0.15 + 0.4 * share) if fits else ink(0.1),
            )
        )
        said = (
            f"{row['limit_tokens_per_s']:.0f} t/s"
            if fits
            else ("–" if pd.isna(row["fewest_gpus"]) else f"{row['fewest_gpus']} GPUs")
        )
        ax.text(
            x,
            y,
            f"{row['total_bytes'] / 1e9:.1f}\n{said}",
            ha="center",
            va="center",
            fontsize=5.5,
            color="#000000" if fits else ink(0.75),
        )
    ax.set_xticks(range(len(gpus)), gpus, rotation=35, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(techniques)), techniques)
    ax.set(xlim=(-0.5, len(gpus) - 0.5), ylim=(len(techniques) - 0.5, -0.5))
    ax.grid(visible=False)
    ax.tick_params(length=0)
