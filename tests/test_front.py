"""The first page: which rows stand for a technique, what they are said to gain."""

import pandas as pd
import pytest
from test_report import variant
from test_results import a_record

from helpers import plots, results
from helpers.series import claims, front, report

BASE = {
    "resident_before_bytes": 100,
    "peak_bytes": 1100,
    "peak_kind": "process VmHWM",
    "latency_s": [2.0, 2.02, 1.98],
}
FAST = {"speedup": 1.5, "speedup_ci95": (1.4, 1.6)}
LOSS = {"nll_delta": 0.2, "nll_delta_ci95": (0.1, 0.3)}
NO_LOSS = {"nll_delta": 0.001, "nll_delta_ci95": (-0.01, 0.01)}


def lesson_of(records: list[results.Record]) -> results.Results:
    """Rows of one notebook."""
    return results.Results.model_construct(records=records)


def rows_of(**fields) -> pd.DataFrame:
    records = [
        a_record(**BASE, technique="mixed_precision"),
        variant([1.3] * 3, 600, **fields),
    ]
    return front.picks([lesson_of(records)])


def test_a_pick_has_its_speed_memory_and_quality():
    (row,) = rows_of(**FAST, **LOSS).itertuples()
    assert row.label == "16-bit floats (float16)"
    assert (row.speedup, row.low, row.high) == (1.5, 1.4, 1.6)
    assert row.memory_share == pytest.approx(0.5)
    assert row.quality == "+22%" and row.is_worse
    (row,) = rows_of(**FAST, **NO_LOSS).itertuples()
    assert row.quality == "unchanged" and not row.is_worse
    (row,) = rows_of(**FAST, **LOSS, details={"train_tokens": 9}).itertuples()
    assert row.quality == "tuned" and not row.is_worse


def test_a_baseline_is_one_of_the_row_s_own_notebook():
    """Another notebook of the technique has a row of the same name, with other bytes."""
    mine = [a_record(**BASE, technique="mixed_precision"), variant([1.3] * 3, 600, **FAST)]
    other = a_record(**BASE | {"peak_bytes": 5100}, technique="mixed_precision")
    for lessons in ([mine, [other]], [[other], mine]):
        (row,) = front.picks(list(map(lesson_of, lessons))).itertuples()
        assert row.memory_share == pytest.approx(0.5) and not row.foreign


def test_a_failure_keeps_its_row():
    (row,) = rows_of(status="oom", reason="needs 9 GB").itertuples()
    assert row.status == "oom" and row.quality == "oom"


def test_ranks_on_a_cpu_show_no_speed():
    ranks = variant([1.0] * 3, 600, technique="multiple_gpus", id="tp-2", variant="tp-2")
    ranks = ranks.model_copy(update={"world_size": 2, "speedup": 3.0, "speedup_ci95": (2.0, 4.0)})
    base = a_record(**BASE, technique="multiple_gpus")
    (row,) = front.picks([lesson_of([base, ranks])]).itertuples()
    assert pd.isna(row.speedup) and row.memory_share == pytest.approx(0.5)


def test_the_sentence_counts_what_gains_and_what_loses_nothing():
    worse = front.sentence(rows_of(**FAST, **LOSS), "here")
    assert worse.startswith("On here: 1 of the 1 variants whose speed is shown")
    assert "no measurable loss" not in worse
    assert "1 of them with no measurable loss" in front.sentence(rows_of(**FAST, **NO_LOSS), "x")
    assert "no measurable loss" not in front.sentence(rows_of(**FAST), "x")  # not scored
    slow = {"speedup": 1.1, "speedup_ci95": (0.9, 1.3)}
    assert "0 of the 1 variants" in front.sentence(rows_of(**slow, **NO_LOSS), "x")


def test_the_chart_fits_a_column_and_names_foreign_baselines():
    place = report.committed()
    rows = front.picks(place.lessons.values())
    assert len(rows) == len(pd.read_csv(claims.DATA / "front.csv"))
    plots.use_style()
    figure = front.chart(rows, "somewhere")
    width, height = figure.get_size_inches()
    assert width == plots.COLUMN and height <= 3.6
    note = figure.texts[-1].get_text()
    assert all(name in note for name in rows.baseline[rows.foreign])
    figure.draw_without_rendering()
    page = figure.bbox
    for axis in figure.axes:
        for text in [*axis.texts, *axis.get_yticklabels(), axis.title]:
            box = text.get_window_extent()
            assert page.x0 <= box.x0 and box.x1 <= page.x1, text.get_text()
        for tick in axis.get_xticklabels():
            assert not tick.get_window_extent().overlaps(figure.texts[-1].get_window_extent())


def test_each_surprise_is_a_figure_of_two_records():
    lines = front.surprises(report.committed().records)
    assert len(lines) >= 5
    assert all("×" in line for line in lines)
