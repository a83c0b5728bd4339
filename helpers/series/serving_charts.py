"""Charts of serving, which lesson 06 and the comparison draw from the same records."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pandas import DataFrame

from helpers import plots

AXES = {"batch_size": 1, "request_rate": 3}  # of `throughput_latency`: how many each sweep takes


def swept(frame: DataFrame) -> DataFrame:
    """What `throughput_latency` draws: sweeps over batch sizes and over rates of requests, these
    with the share in time.
    """
    rows = frame[frame.sweep.isin(AXES) & (frame.status == "ok")]
    has_share = plots.detail(rows, "in_time_share").notna()
    return rows[(rows.sweep == "batch_size") | has_share]


def batching(frame: DataFrame, title: str = "Throughput of a mixed workload", steps=()) -> Figure:
    """Useful tokens/s of each way to serve one workload.

    steps : (id, id of the next, what changes between them), in order: these rows stand on top, with
        an arrow and the factor for each step; other rows stand below a line.
    """
    drawn = plots.with_bits(plots.styled(frame[frame.sweep.isna()]))
    ladder = [before for before, _, _ in steps] + [after for _, after, _ in steps[-1:]]
    on_ladder = drawn.id.isin(ladder)
    first = drawn[on_ladder].sort_values("id", key=lambda ids: ids.map(ladder.index))
    figure, parts = plots.panels(pd.concat([first, drawn[~on_ladder]]), title)
    for panel, rows in parts:
        axis = panel.subplots()
        y = plots.bars(axis, rows, "tokens_per_s", "{:.0f}", "useful tokens/s")
        edge = axis.get_xlim()[1] * 1.08  # right of the numbers
        axis.set_xlim(0, edge * 1.3)
        rows = rows.assign(y=y).set_index("id")
        for before, after, change in steps:
            if before in rows.index and after in rows.index:
                _step(axis, rows.loc[before], rows.loc[after], change, edge)
        if 0 < rows.index.isin(ladder).sum() < len(rows):
            axis.axhline(rows.index.isin(ladder).sum() - 0.5, color="0.6", lw=0.6)
    return figure


def _step(axis, before: pd.Series, after: pd.Series, change: str, x: float) -> None:
    """An arrow from a row to the next, with the factor between them: paired where it was."""
    factor = after.details.get(f"{change}_factor", after.tokens_per_s / before.tokens_per_s)
    if after.baseline == before.name:
        factor = after.speedup
    if not pd.isna(factor):
        arrow = {"arrowstyle": "->", "lw": 0.8, "color": "0.2"}
        axis.annotate("", (x, after.y), (x, before.y), arrowprops=arrow)
        plots.label(axis, f"{change}\n{factor:.1f}×", x, (before.y + after.y) / 2)


def _axes_of(rows: DataFrame) -> int:
    return sum(AXES[sweep] for sweep in rows.sweep.unique())


def throughput_latency(frame: DataFrame, title: str = "Throughput against latency") -> Figure:
    """What batches cost each user: time per token over tokens/s, by batch size. A server under
    load: latencies over the rate sent, with the objectives that bound them; the share in time.
    """
    drawn = swept(plots.styled(frame))
    figure, parts = plots.panels(drawn, title, lambda rows: 0.4 + 1.5 * _axes_of(rows))
    for panel, rows in parts:
        axes = list(np.atleast_1d(panel.subplots(_axes_of(rows))))
        by_batch = rows[rows.sweep == "batch_size"]
        if len(by_batch):
            _draw_batch_sizes(axes.pop(0), by_batch.sort_values("batch_size"))
        if axes:
            _draw_rates(*axes, rows[rows.sweep == "request_rate"])
    return figure


def _draw_batch_sizes(axis, rows: DataFrame) -> None:
    """Milliseconds a token over tokens/s of the whole batch; the same at the bandwidth limit."""
    for speed in ("tokens_per_s", "limit_tokens_per_s"):
        rows = rows.assign(**{f"{speed}_ms": 1e3 * rows.batch_size / rows[speed]})
    dashed = {"ls": "--", "marker": "", "color": plots.GREY}
    plots.curve(axis, rows, "limit_tokens_per_s", "limit_tokens_per_s_ms", "limit", **dashed)
    for engine, group in rows.groupby("engine"):
        plots.curve(axis, group, "tokens_per_s", "tokens_per_s_ms", engine, "batch_size")
    axis.set(xlabel="tokens/s of the whole batch (number: batch size)", ylabel="ms a token")
    axis.set(xscale="log", yscale="log")
    plots.plain_ticks(axis.xaxis)
    plots.plain_ticks(axis.yaxis)
    axis.margins(x=0.15, y=0.2)


def _draw_rates(first_token, next_tokens, in_time, rows: DataFrame) -> None:
    """Over the rate that was sent, on three axes: time to first token and time per output token,
    each with the objective that bounds it, and the share of requests in time with its interval and
    in each run.
    """
    details = DataFrame(list(rows.details), index=rows.index).apply(pd.to_numeric, errors="coerce")
    rows = rows.assign(**details).sort_values("achieved_rate_per_s")
    rate = "achieved_rate_per_s"
    for axis, latency in ((first_token, "ttft"), (next_tokens, "tpot")):
        plots.curve(axis, rows, rate, f"{latency}_p95_s", "p95", ls="--")
        plots.curve(axis, rows, rate, f"{latency}_p50_s", "p50")
        for objective in rows[f"objective_{latency}_s"].dropna().unique():
            axis.axhline(objective, color=plots.GREY, lw=0.8)
            at = axis.get_yaxis_transform()
            plots.label(axis, "objective", 0, objective, (2, 4), color=plots.GREY, xycoords=at)
        axis.set(yscale="log", xlabel="requests/s sent")
        plots.plain_ticks(axis.yaxis)
        axis.margins(x=0.18, y=0.25)
    first_token.set_ylabel("first token (s)")
    next_tokens.set_ylabel("s per output token")
    plots.curve(in_time, rows, rate, "in_time_share", "")
    in_time.vlines(rows[rate], rows.in_time_low, rows.in_time_high, color=rows.colour, lw=2)
    # the interval takes requests for independent, which they are not in a queue: so each run, too
    for sent, found in zip(rows[rate], rows.details, strict=True):
        shares = found.get("in_time_by_seed", [])
        in_time.plot([sent] * len(shares), shares, "_", color=plots.GREY, ms=5, mew=0.8)
    for capacity in rows.capacity_per_s.dropna().unique():
        in_time.axvline(capacity, color=plots.GREY, lw=0.8, ls=":")
        at = in_time.get_xaxis_transform()
        plots.label(in_time, "capacity", capacity, 0, (3, 6), color=plots.GREY, xycoords=at)
    for row in rows[rows.failed_requests > 0].itertuples():
        text = f"{row.failed_requests:.0f} failed"
        plots.label(in_time, text, row.achieved_rate_per_s, row.in_time_share, (-5, -4), ha="right")
    in_time.set(
        xlabel="requests/s sent",
        ylabel="share in time, 95 %\n(dashes: single runs)",
        ylim=(0, 1.05),
    )
    in_time.margins(x=0.18)
