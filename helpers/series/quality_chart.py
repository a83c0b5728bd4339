"""Quality against speed and size, the chart of the comparison."""

import logging

import numpy as np
from adjustText import adjust_text
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from pandas import DataFrame

from helpers import plots

logging.getLogger("adjustText").setLevel("ERROR")  # it warns of what panels of a figure lack


def pareto(rows: DataFrame) -> list[bool]:
    """True where no other row is as good in speed, perplexity and bytes, and better in one."""
    costs = rows[["decode_tokens_per_s", "perplexity", "weight_bytes"]] * [-1, 1, 1]
    on_front = []
    for mine in costs.to_numpy():
        dominates = (costs <= mine).all(axis=1) & (costs < mine).any(axis=1)
        on_front.append(not dominates.any())
    return on_front


def quality_speed(rated: DataFrame) -> Figure:
    """Perplexity over decode speed, both on log axes; area: weights; filled: on the Pareto front.

    rated : rows of `results.frame` with a column `panel`: rows of one panel can be compared.
    """
    figure, parts = plots.panels(rated, "Quality against speed and size", lambda _: 4.4)
    if len(parts):
        figure.set_figwidth(figure.get_figwidth() * min(2, rated.panel.nunique()))
    for part, rows in parts:
        groups = []
        for _, group in rows.groupby("panel", sort=False):
            groups.append(group.assign(front=pareto(group)))
        widths = [len(group) ** 0.5 for group in groups]  # names take room
        axes = part.subplots(1, len(groups), squeeze=False, width_ratios=widths)[0]
        for axis, group in zip(axes, groups, strict=True):
            _draw_points(axis, group)
        for row in rows.drop_duplicates("technique").itertuples():
            name = plots.title_of(row.technique)
            axes[0].scatter([], [], color=row.colour, marker=row.marker, label=name)
        part.legend(loc="outside lower center", ncols=3 * len(groups))
        figure.draw_without_rendering()  # names come last, on axes of their final size
        for axis, group in zip(axes, groups, strict=True):
            _name_points(axis, group)
    return figure


def _draw_points(axis, rows: DataFrame) -> None:
    for row in rows.itertuples():
        size = 10 + 60 * row.weight_bytes / rows.weight_bytes.max()
        look = {"fc": "none", "ec": row.colour}
        if row.front:
            look = {"fc": row.colour, "ec": "black"}
        axis.scatter(row.decode_tokens_per_s, row.perplexity, size, marker=row.marker, **look)
    axis.set(xlabel="decode tokens/s  (better →)", ylabel="perplexity  (better ↓)")
    axis.set(xscale="log", yscale="log")
    axis.set_title(rows.panel.iloc[0], weight="normal", fontsize=6)
    for values, ticks in ((rows.decode_tokens_per_s, axis.xaxis), (rows.perplexity, axis.yaxis)):
        plots.plain_ticks(ticks)
        narrow = values.max() < 3 * values.min()
        ticks.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=(1, 2, 5)))
    axis.margins(0.14, 0.12)


def _name_points(axis, rows: DataFrame) -> None:
    """Each variant's name once, and one baseline's, moved until none covers another."""
    names = rows.variant.mask(rows.baseline.isna(), "baseline")
    rows = rows.assign(name=names, ink=np.where(rows.front, "black", plots.GREY))
    named = rows.sort_values("front", ascending=False, kind="stable").drop_duplicates("name")
    drawn = []
    for explode in ((0.3, 1.0), (0.5, 1.5), (1.0, 2.0), (0.1, 0.5)):
        for old in drawn:
            old.remove()
        texts = []
        for row in named.itertuples():
            texts.append(
                axis.text(row.decode_tokens_per_s, row.perplexity, row.variant, c=row.ink, size=6)
            )
        texts, lines = adjust_text(
            texts,
            rows.decode_tokens_per_s,
            rows.perplexity,
            ax=axis,
            iter_lim=1200,
            expand=(1.15, 1.7),
            force_text=(0.5, 1.6),
            force_static=(0.2, 0.4),
            force_explode=explode,
            arrowprops={"arrowstyle": "-", "color": "0.5", "lw": 0.4},
        )
        drawn = [*texts, *lines]
        boxes = [text.get_window_extent() for text in texts]
        if all(box.count_overlaps(boxes) == 1 for box in boxes):
            break
