"""plots, and the charts of 08: what is drawn, what is left out and said, files written whole."""

import io
import math
import re

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from PIL import Image
from test_results import a_record

from helpers import plots, results
from helpers.series import front, quality_chart, report, run, serving_charts

STEPS = [
    ("one-by-one", "static-transformers", "batching"),
    ("static-transformers", "static-vllm", "engine"),
    ("static-vllm", "continuous-vllm", "scheduler"),
    ("continuous-vllm", "continuous-vllm-paged", "pages"),
]
SCORED = {"eval_text": "t", "eval_seq_len": 4, "decode_tokens_per_s": 11.0}


@pytest.fixture(autouse=True)
def house_style():
    with plt.rc_context():
        plots.use_style()
        yield
    plt.close("all")


def speeds() -> list[results.Record]:
    """fp32 and a faster fp16, a failure, and a row of another engine than its baseline's."""
    shared = {"technique": "mixed_precision", "resident_before_bytes": 100, **SCORED}
    base = {"tokens_per_s": 10, "weight_bytes": 4000, "perplexity": 9, "peak_bytes": 1100}
    base["moved_bytes_per_s"] = 5e5
    fast = {"speedup": 1.24, "speedup_ci95": (1.2, 1.3), "tokens_per_s": 12, "weight_bytes": 2000}
    fast |= {"peak_bytes": 600, "perplexity": 9.1, "nll_delta": math.log(9.1 / 9)}
    other = {"technique": "quantization", "engine": "vllm", "speedup": 2.0}
    failed = {"baseline": "fp32", "status": "oom", "reason": "too large"}
    return [
        a_record(**shared, **base, kv_cache_bytes=100, step_bytes=4100),
        a_record(**shared, **fast, id="fp16", variant="fp16", baseline="fp32", kv_cache_bytes=50),
        a_record(technique="mixed_precision", id="nf4", variant="nf4", **failed),
        a_record(technique="quantization", tokens_per_s=10),
        a_record(**other, id="other", variant="other-engine", baseline="fp32"),
    ]


def batches() -> list[results.Record]:
    """A workload served in several ways, and sweeps over batch sizes and rates."""
    kind = {"technique": "continuous_batching", "engine": "vllm"}
    rows = [
        a_record(
            technique=kind["technique"], id="one-by-one", variant="one-by-one", tokens_per_s=10
        )
    ]
    for name, tokens_per_s, fields in (
        ("continuous-llamacpp", 60, {"dtype": "Q4_1", "details": {"total_factor": 3.0}}),
        ("static-vllm", 40, {"details": {"engine_factor": 2.0}}),
        ("static-transformers", 20, {"baseline": "one-by-one", "speedup": 2.0}),
        ("continuous-vllm", 80, {"baseline": "static-vllm", "speedup": 2.5}),
        ("continuous-vllm-paged", 88, {"baseline": "continuous-vllm", "speedup": 1.1}),
    ):
        rows.append(a_record(**kind, id=name, variant=name, tokens_per_s=tokens_per_s, **fields))
    missing = {"status": "unsupported", "reason": "not installed"}
    rows.append(a_record(**kind, id="openvino", variant="openvino", **missing))
    for n in (1, 4, 16):
        fields = {"sweep": "batch_size", "batch_size": n, "tokens_per_s": 20 * n**0.8}
        rows.append(a_record(**kind, id=f"batch-{n}", variant=f"batch-{n}", **fields))
    for rate in (1, 2, 4):
        share = min(1.0, 2 / rate)
        details = {"achieved_rate_per_s": 0.99 * rate, "capacity_per_s": 2.5}
        details |= {"failed_requests": rate // 4}
        details |= {"objective_ttft_s": 1.0, "objective_tpot_s": 0.2}
        details |= {"in_time_share": share, "in_time_low": share - 0.1, "in_time_high": share}
        for number, quantile in enumerate(("p50", "p95"), 1):
            details[f"ttft_{quantile}_s"] = 0.1 * rate * number
            details[f"tpot_{quantile}_s"] = 0.01 * rate * number
        fields = {"sweep": "request_rate", "tokens_per_s": 30 * rate, "details": details}
        rows.append(a_record(**kind, id=f"rate-{rate}", variant=f"rate-{rate}", **fields))
    return rows


def ranks_on(device: str) -> list[results.Record]:
    kind = {"technique": "multiple_gpus", "device": device, "weight_bytes": 538_000_000}
    fields = {"baseline": "single", "world_size": 3, "speedup": 4.0, "tokens_per_s": 27}
    fields["details"] = {"rank_weight_bytes": 179_000_000}
    return [
        a_record(**kind, id="single", variant="single", tokens_per_s=12),
        a_record(**kind, **fields, id="tp-3", variant="tp-3"),
    ]


def frame(*records: results.Record, machine: str = "here") -> pd.DataFrame:
    ceilings = results.Ceilings(
        bandwidth_bytes_per_s=1e6, bandwidth_spread=0.01, bandwidth_readings=5
    )
    limits = results.MachineLimits(hardware="h", torch="t", devices={"cpu": ceilings})
    rows = results.frame(list(records), limits)
    return rows.assign(machine=machine, notebook=rows["technique"])


def two_machines(rows: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([rows, rows.assign(machine="there")], ignore_index=True)


def texts(figure) -> set[str]:
    labels = set()
    for axis in figure.findobj(plt.Axes):
        labels |= {text.get_text() for text in [*axis.texts, *axis.get_yticklabels()]}
    return labels


@pytest.fixture
def comparison():
    """comparison(frame) -> {name: (figure, rows)}: the chart cells of 08 run on a frame."""

    def draw(table: pd.DataFrame) -> dict:
        drawn, found = {}, {}
        space = run.definitions("08_comparison")
        space |= {"table": plots.styled(table), "found": found, "PRICE_PER_HOUR": 1.0}
        space["show"] = lambda figure, rows, name, text: drawn.update({name: (figure, rows)})
        cells = nbformat.read(run.NOTEBOOKS / "08_comparison.ipynb", 4).cells
        sources = [cell.source for cell in cells if cell.cell_type == "code"]
        first = next(i for i, source in enumerate(sources) if "plots.speedup" in source)
        last = next(i for i, source in enumerate(sources) if "judged = report.claims" in source)
        for source in sources[first:last]:
            exec(source, space)
        return drawn

    return draw


def test_charts_show_failures_and_no_ratio_of_two_engines(comparison):
    table = frame(*speeds())
    labels = texts(plots.speedup(table))
    assert {"1.24×", "oom", "baseline"} <= labels
    assert not {"2.00×", "other-engine"} & labels
    apart = texts(comparison(table)["factors"][0])
    assert {"2.00×", "other-engine / fp32"} <= apart


def test_cpu_ranks_stay_out_of_the_chart_of_speeds(comparison):
    on_cpu = frame(*ranks_on("cpu"), *speeds())
    assert not {"tp-3", "4.00×"} & texts(plots.speedup(on_cpu))
    ranks = comparison(on_cpu)["ranks"][0]
    assert {"tp-3 · 3", "0.18"} <= texts(ranks)
    labels = [axis.get_xlabel() for axis in ranks.findobj(plt.Axes)]
    assert any("share one CPU" in label for label in labels)
    on_gpu = frame(*ranks_on("cuda"), *speeds())
    assert "4.00×" in texts(plots.speedup(on_gpu))
    ranks = comparison(on_gpu)["ranks"][0]
    assert not any("share one CPU" in axis.get_xlabel() for axis in ranks.findobj(plt.Axes))


def test_batching_draws_steps_in_order_and_the_rest_below():
    figure = serving_charts.batching(frame(*batches()), steps=STEPS)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[:3] == ["one-by-one", "static-transformers", "static-vllm"]
    assert names[3:5] == ["continuous-vllm", "continuous-vllm-paged"]
    assert names[5:] == ["continuous-llamacpp · 4-bit", "openvino"]
    assert {
        "batching\n2.0×",
        "engine\n2.0×",
        "scheduler\n2.5×",
        "pages\n1.1×",
        "unsupported",
    } <= texts(figure)
    assert not any("engine" in text for text in texts(serving_charts.batching(frame(*batches()))))


def test_a_server_is_drawn_by_batch_size_and_by_rate():
    figure = serving_charts.throughput_latency(frame(*batches()))
    assert len(figure.axes) == 4
    assert {"16", "p95", "objective", "capacity", "1 failed"} <= texts(figure)
    labels = [axis.get_ylabel() for axis in figure.axes]
    share = "share in time, 95 %\n(dashes: single runs)"
    assert labels[1:] == ["first token (s)", "s per output token", share]
    only = [row for row in batches() if row.sweep == "batch_size"]
    assert len(serving_charts.throughput_latency(frame(*only)).axes) == 1


def test_a_load_without_its_share_in_time_is_not_drawn():
    """Records of the first edition: bursts, from which no share in time follows."""
    kind = {"technique": "continuous_batching", "engine": "vllm", "sweep": "request_rate"}
    fields = {"tokens_per_s": 30, "details": {"goodput_per_s": 1.0}}
    burst = a_record(**kind, **fields, id="burst", variant="burst")
    drawn = serving_charts.swept(frame(*batches(), burst))
    assert "rate-1" in set(drawn.id) and "burst" not in set(drawn.id)


def test_memory_is_what_was_taken_above_the_start():
    axis = plots.memory(frame(*speeds())).axes[0]
    ticks = next(line for line in axis.lines if line.get_label() == "peak above start")
    assert ticks.get_xdata().tolist()[:2] == [1000, 500]


def test_published_marks_are_hollow(comparison):
    drawn = comparison(frame(*speeds(), *ranks_on("cpu")))
    panel = drawn["ranks"][0].findobj(plt.Axes)[-1]
    assert panel.lines
    assert all(line.get_markerfacecolor() == "none" for line in panel.lines)
    figure, rows = drawn["beside"]
    hollow = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "none"]
    assert any(np.isclose(line.get_xdata(), 42.03 / 33.92).any() for line in hollow)
    assert rows["source"].notna().any()  # the published ones are in the file of rows


def test_the_front_is_what_nothing_beats():
    rows = pd.DataFrame(
        {
            "decode_tokens_per_s": [10, 20, 20, 5],
            "perplexity": [9, 9, 12, 8.9],
            "weight_bytes": [4, 4, 1, 9],
        }
    )
    assert quality_chart.pareto(rows) == [False, True, True, True]


def test_names_on_the_quality_chart_do_not_cover_each_other(comparison):
    near = np.random.default_rng(1).lognormal(0, 0.3, (30, 2))  # one placement leaves two covered
    rows = [a_record()]
    for number, (x, y) in enumerate(near):
        name = f"a-variant-{number}"
        scores = {"decode_tokens_per_s": 20 * x, "perplexity": 13 * y, "weight_bytes": 2000}
        rows.append(a_record(id=name, variant=name, baseline="fp32", **{**SCORED, **scores}))
    axis = comparison(frame(*rows))["quality_speed"][0].axes[0]
    boxes = [text.get_window_extent() for text in axis.texts]
    assert len(boxes) == 30
    assert all(box.count_overlaps(boxes) == 1 for box in boxes)


def test_machines_and_models_are_never_on_one_axis(comparison):
    parts = [frame(*speeds(), *batches(), *ranks_on("cpu"), machine=name) for name in ("a", "b")]
    both, one = (comparison(pd.concat(p, ignore_index=True)) for p in (parts, parts[:1]))
    assert set(both) == set(one)
    for name, (figure, _) in both.items():
        axes = len(figure.findobj(plt.Axes))
        assert axes == 2 * len(one[name][0].findobj(plt.Axes)), name


def test_an_eighth_technique_gets_a_look_and_a_title_of_its_own():
    names = [f"technique_{number}" for number in range(12)]
    rows = []
    for name in names:
        rows.append(a_record(technique=name, weight_bytes=5))
        gain = {"speedup": 2.0, "baseline": "fp32", "weight_bytes": 5}
        rows.append(a_record(technique=name, id="x", variant="x", **gain))
    styled = plots.styled(frame(*rows))
    looks = styled.drop_duplicates("technique")[["technique", "colour", "marker"]]
    assert not looks[["colour", "marker"]].duplicated().any()
    assert looks["colour"].iloc[:8].is_unique
    first_seven = plots.styled(frame(*rows[:14])).drop_duplicates("technique")
    assert first_seven["colour"].tolist() == looks["colour"].tolist()[:7]
    assert "technique 7" in texts(plots.speedup(styled))
    assert "technique 11" in texts(plots.memory(styled))
    part = styled[styled["technique"] == names[3]]
    colour = plots.memory(part).axes[0].patches[0].get_facecolor()
    assert to_hex(colour) == looks["colour"].iloc[3].lower()


def test_every_chart_is_saved_with_its_rows_and_caption(comparison, tmp_path):
    drawn = comparison(frame(*speeds(), *batches(), *ranks_on("cpu")))
    assert len(drawn) == 10
    endings = [".svg", ".pdf", ".png", ".csv", ".txt", "_dark.svg", "_dark.png"]
    for name, (figure, rows) in drawn.items():
        path = plots.save(figure, rows, tmp_path / name, name, "What it shows.")
        files = {file.name for file in path.parent.iterdir()}
        assert files == {name + ending for ending in endings}
        dark = Image.open(path.with_name(f"{name}_dark.png")).convert("L")
        light = Image.open(path).convert("L")
        assert light.width == pytest.approx(3.5 * 300, abs=2)
        assert np.mean(light) > 200 > 60 > np.mean(dark)
        table = pd.read_csv(path.with_suffix(".csv"))
        assert len(table) == len(rows)
        assert not {"latency_s", "reasons", "colour"} & set(table)
        assert path.with_suffix(".txt").read_text() == "What it shows.\n"
    ranks = pd.read_csv(tmp_path / "ranks" / "ranks.csv").set_index("id")
    assert ranks.loc["tp-3", "rank_weight_bytes"] == 179_000_000  # a detail, in its own row


def test_a_chart_is_drawn_anew_to_the_byte(tmp_path):
    for folder in ("one", "two"):
        rows = plots.compared(frame(*speeds()))
        plots.save(plots.speedup(rows), rows, tmp_path / folder, "speedup")
    one, two = (sorted((tmp_path / folder).iterdir()) for folder in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_colours_are_the_same_in_the_dark_and_no_ink_is_lost(tmp_path):
    rows = plots.compared(frame(*speeds()))
    path = plots.save(plots.speedup(rows), rows, tmp_path, "speedup")
    light = path.with_suffix(".svg").read_text()
    dark = path.with_name("speedup_dark.svg").read_text()
    assert plots.PALETTE[0].lower() in light.lower()
    assert plots.PALETTE[0].lower() in dark.lower()
    assert "#000000" not in dark and "#ffffff" not in dark


def test_a_chart_without_records_says_so(tmp_path):
    rows = serving_charts.swept(frame(*speeds()))
    figure = serving_charts.throughput_latency(rows)
    assert "no record to draw" in figure.get_suptitle()
    with pytest.raises(plots.NoData, match=r"^throughput_latency: no record to draw\.$"):
        plots.save(figure, rows, tmp_path, "throughput_latency")
    assert not list(tmp_path.iterdir())


def test_no_chart_of_the_comparison_stops_for_missing_rows(comparison, tmp_path):
    for name, (figure, rows) in comparison(frame(a_record(technique="unheard_of"))).items():
        if rows.empty:
            with pytest.raises(plots.NoData):
                plots.save(figure, rows, tmp_path, name)


def test_the_comparison_runs_on_the_committed_evidence(tmp_path):
    machine = next(path.name for path in report.REFERENCE.iterdir() if path.is_dir())
    out = tmp_path / "08_comparison.ipynb"
    places = {"RESULTS_DIR": str(report.REFERENCE), "FIGURES_DIR": str(tmp_path / "figures")}
    run.execute(run.NOTEBOOKS / out.name, out, places | {"MACHINES": [machine]})
    folder = next((tmp_path / "figures").glob("*/*"))
    charts = {path.stem for path in folder.glob("*.pdf")}
    assert len(charts) == 11 and {"overview", "fit_falcon-7b"} <= charts
    table = pd.read_csv(folder / "speedup.csv")
    assert set(table["technique"]) == {
        record.technique for record in report.committed().records if record.speedup
    }
    assert "SmolLM2-135M-Instruct" in (folder / "memory.txt").read_text()
    cells = nbformat.read(out, 4).cells
    streams = [o for c in cells for o in c.get("outputs", []) if o.get("name") == "stderr"]
    assert not streams, streams


def luminance(colour) -> float:
    """Relative luminance as the Web's guidelines define it, 0 to 1."""
    parts = np.array(to_rgb(colour))
    parts = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(parts @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("paper", ["white", tuple(plots.DARK_PAPER[:3])])
def test_colours_are_seen_on_both_papers(paper):
    for colour in [*plots.PALETTE, front.FASTER, front.SLOWER, front.LOST]:
        lighter, darker = sorted([luminance(colour), luminance(paper)], reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 3, colour


def many(techniques: int) -> list[results.Record]:
    rows = []
    for number in range(techniques):
        kind = {"technique": f"technique_{number}", "weight_bytes": 10**9 * (1 + number)}
        rows.append(a_record(**kind))
        for variant in range(6):
            gain = {"baseline": "fp32", "speedup": 1.0 + number + variant / 9}
            rows.append(a_record(**kind, id=f"v{variant}", variant=f"v{variant}", **gain))
    return rows


@pytest.mark.parametrize("draw", [plots.speedup, plots.memory])
def test_a_long_list_stands_in_two_columns_of_one_scale(draw):
    short = draw(frame(*many(2)))
    assert short.get_figwidth() == plots.COLUMN and len(short.axes) == 1
    figure = draw(frame(*many(6)))
    assert figure.get_figwidth() == 2 * plots.COLUMN and figure.get_figheight() <= 9
    left, right = figure.axes
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
    names = [[label.get_text() for label in axis.get_yticklabels()] for axis in figure.axes]
    assert list(map(len, names)) == [21, 21] and names[0][0] == "fp32" == names[1][0]
    assert {"technique 0", "technique 5"} <= texts(figure)


def test_machines_stand_beside_each_other_where_they_would_be_taller_than_a_page():
    short = plots.speedup(two_machines(frame(*many(2))))
    assert short.get_figwidth() == plots.COLUMN
    long = plots.speedup(two_machines(frame(*many(4))))
    assert long.get_figheight() <= plots.PAGE and long.get_figwidth() > plots.COLUMN


@pytest.mark.parametrize("draw", [plots.speedup, plots.memory])
def test_what_was_not_run_is_in_no_chart(draw):
    """It has no figure; README's table and RESULTS.md name it, and why."""
    missing = {"status": "unsupported", "reason": "needs a GPU", "baseline": "fp32"}
    rows = [*speeds(), a_record(technique="mixed_precision", id="w4", variant="w4", **missing)]
    assert not any("w4" in text for text in texts(draw(frame(*rows))))


def test_an_svg_has_a_title_and_letters_that_other_machines_have(tmp_path):
    rows = plots.compared(frame(*speeds()))
    path = plots.save(plots.speedup(rows), rows, tmp_path, "speedup")
    for name in ("speedup.svg", "speedup_dark.svg"):
        text = path.with_name(name).read_text()
        assert "<title>Speed against the baseline of the same run</title>" in text
        families = set(re.findall(r"font-family: ([^;\"]+)", text))
        assert families and all(family.endswith(", sans-serif") for family in families)


def test_a_preview_has_120_dots_an_inch_whatever_its_width(tmp_path):
    for count, width in ((2, 420), (6, 840)):
        rows = plots.compared(frame(*many(count)))
        path = plots.save(plots.speedup(rows), rows, tmp_path, "speedup")
        picture = Image.open(io.BytesIO(plots.preview(path)))
        assert picture.width == pytest.approx(width, abs=2)
