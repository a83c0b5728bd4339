"""report, claims, answers and plots: verdicts from records, README's parts, charts written whole."""

import math

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_results import a_record

from helpers import plots, results, schema
from helpers.series import claims, planner, report

BASE = {
    "technique": "mixed_precision",
    "latency_s": [2.0, 2.02, 1.98],
    "resident_before_bytes": 100,
    "peak_bytes": 1100,
    "peak_kind": "process VmHWM",
}


def variant(latency: list[float], peak: int, **fields):
    pairs = [
        schema.Pair(baseline="fp32", baseline_s=b, variant_s=v)
        for b, v in zip(BASE["latency_s"], latency, strict=True)
    ]
    return a_record(
        **BASE
        | {
            "id": "fp16",
            "variant": "fp16",
            "baseline": "fp32",
            "latency_s": latency,
            "pairs": pairs,
            "peak_bytes": peak,
        }
        | fields
    )


@pytest.mark.parametrize(
    ("latency", "peak", "direction", "size", "memory"),
    [
        ([1.61, 1.63, 1.60], 600, "confirmed", "met", "confirmed"),
        ([1.0, 1.01, 0.99], 600, "confirmed", "larger", "confirmed"),
        ([1.9, 1.915, 1.88], 1900, "confirmed", "smaller", "refuted"),
        ([4.0, 4.04, 3.97], 600, "refuted", "smaller", "confirmed"),
        ([2.4, 1.7, 2.0], 600, "within noise", "met", "confirmed"),
    ],
)
def test_claims_follow_the_records(latency, peak, direction, size, memory):
    found = report.claims([a_record(**BASE), variant(latency, peak)], "mixed_precision")
    speed = found.loc["16-bit weights generate faster than 32-bit ones"]
    assert (speed["direction"], speed["size"]) == (direction, size)
    assert found.loc["16-bit weights take half the memory", "direction"] == memory
    assert (
        found.loc["mixed precision (autocast) is slower than plain float32", "direction"]
        == "not measured"
    )


@pytest.mark.parametrize(("peak", "size"), [(350, "larger"), (600, "met"), (900, "smaller")])
def test_the_size_of_a_saving_is_larger_where_less_is_left(peak, size):
    found = report.claims([a_record(**BASE), variant([1.6, 1.6, 1.6], peak)], "mixed_precision")
    assert found.loc["16-bit weights take half the memory", "size"] == size


def test_a_claim_of_likeness_needs_a_narrow_interval():
    def alike(latency):
        rows = [
            a_record(**BASE | {"technique": "bfloat16"}),
            variant([1.5, 1.52, 1.49], 600, technique="bfloat16"),
            variant(latency, 600, technique="bfloat16", id="bf16", variant="bf16"),
        ]
        return report.claims(rows, "bfloat16").loc["bfloat16 is as fast as float16", "direction"]

    assert alike([1.5, 1.515, 1.495]) == "confirmed"
    assert alike([1.0, 1.01, 1.0]) == "refuted"
    assert alike([1.2, 1.9, 1.5]) == "within noise"


def verdict_of(identity: str, records) -> pd.Series:
    facts = pd.read_csv(claims.DATA / "claims.csv").set_index("id")
    return report.claims(
        records,
        facts.loc[identity, "technique"] if facts.loc[identity, "technique"] != "all" else None,
    ).loc[facts.loc[identity, "claim"]]


@pytest.mark.parametrize(
    ("delta", "ends", "said"),
    [
        (0.1, (0.09, 0.11), "confirmed"),
        (0.7, (0.6, 0.8), "refuted"),
        (0.2, (0.1, 0.4), "within noise"),
    ],
)
def test_a_bound_is_kept_by_the_whole_interval(delta, ends, said):
    rows = [
        a_record(technique="pruning", id="dense", variant="dense"),
        a_record(
            technique="pruning",
            id="wanda-50",
            variant="wanda-50",
            baseline="dense",
            nll_delta=delta,
            nll_delta_ci95=ends,
            details={"zero_share": 0.5},
        ),
    ]
    assert verdict_of("wanda-50-quality", rows)["direction"] == said
    assert verdict_of("wanda-50-sparsity", rows)["direction"] == "confirmed"


def ranks_on(place: str, **fields):
    device = {"cpu": "cpu", "gpu": "cuda"}[place]
    base = BASE | {"technique": "multiple_gpus", "device": device}
    return [
        a_record(
            **base
            | {"id": "single", "variant": "single", "tokens_per_s": 12, "weight_bytes": 538_000_000}
        ),
        *(
            variant(
                [1.0, 1.01, 0.99] if name != "fsdp-2" else [9.0, 9.1, 9.0],
                600,
                technique="multiple_gpus",
                id=name,
                variant=name,
                baseline="single",
                device=device,
                world_size=n,
                speedup=1.0 + n,
                speedup_ci95=(0.9 + n, 1.1 + n),
                tokens_per_s=9 * n,
                details={
                    "ranks_on": place,
                    "rank_weight_bytes": 538_000_000 // n,
                    "rank_peak_bytes": 700,
                },
            ).model_copy(
                update={
                    "pairs": [
                        schema.Pair(baseline="single", baseline_s=2, variant_s=s)
                        for s in ((9, 9.1, 9) if name == "fsdp-2" else (1, 1.01, 0.99))
                    ]
                }
            )
            for name, n in (("fsdp-2", 2), ("tp-3", 3))
        ),
    ]


def test_claims_about_gpus_need_gpus():
    identities = ("fsdp-fits", "fsdp-speed", "tp-speed", "tp-over-fsdp")
    for identity in identities:
        assert verdict_of(identity, ranks_on("gpu"))["direction"] == "confirmed"
        assert verdict_of(identity, ranks_on("cpu"))["direction"] == "not measured"
    assert verdict_of("falcon-degrees", [])["direction"] == "confirmed"  # its configuration says it


def test_throughput_may_compare_engines_and_speed_may_not():
    rows = [
        a_record(
            technique="continuous_batching",
            id=name,
            variant=name,
            engine=engine,
            tokens_per_s=speed,
        )
        for name, engine, speed in (
            ("one-by-one", "transformers", 10),
            ("static-transformers", "transformers", 20),
            ("static-vllm", "vllm", 40),
            ("continuous-vllm", "vllm", 80),
        )
    ]
    found = verdict_of("vllm-throughput", rows)
    assert (found["here"], found["direction"], found["size"]) == ("4.00×", "confirmed", "smaller")
    assert verdict_of("continuous-throughput", rows)["here"] == "2.00×"
    assert claims.RATIOS["speed"](rows[3], rows[1]) is None


def test_throughput_counts_work_not_runs():
    one = a_record(
        technique="continuous_batching", tokens_per_s=10, latency_s=[1.0, 1.0, 1.0]
    )  # a part of the work
    all_ = a_record(
        technique="continuous_batching", id="b", tokens_per_s=40, latency_s=[2.0, 2.02, 1.98]
    )
    gain = claims.RATIOS["throughput"](all_, one)
    assert gain.value == pytest.approx(4, rel=0.01) and gain.low < 4 < gain.high


def test_quality_between_two_variants_is_paired_where_that_was_measured():
    shared = {"technique": "adapters", "eval_text": "t", "eval_tokens": 9, "eval_seq_len": 4}
    nf4 = a_record(**shared, id="nf4", variant="nf4", perplexity=20)
    qlora = a_record(**shared, id="qlora", variant="qlora", perplexity=10)
    assert verdict_of("qlora-quality", [nf4, qlora])["here"] == "0.50×"
    paired = qlora.model_copy(
        update={"details": {"nll_against_nf4": -0.1, "nll_against_nf4_half_ci95": 0.3}}
    )
    assert verdict_of("qlora-quality", [nf4, paired])["direction"] == "within noise"
    other = qlora.model_copy(update={"eval_text": "another"})
    assert verdict_of("qlora-quality", [nf4, other])["direction"] == "not measured"


def test_compromise_is_counted_over_all_records():
    gain = {"speedup": 1.5, "speedup_ci95": (1.4, 1.6)}
    free = variant([1.4] * 3, 600, nll_delta=0.0, nll_delta_ci95=(-0.01, 0.01), **gain)
    paid = variant(
        [1.4] * 3, 600, id="nf4", variant="nf4", nll_delta=0.3, nll_delta_ci95=(0.2, 0.4), **gain
    )
    rows = [a_record(**BASE), free]
    assert verdict_of("compromise", rows)["direction"] == "refuted"
    assert verdict_of("compromise", [*rows, paid])["here"] == "1 of 2 faster variants lose quality"
    assert verdict_of("compromise", rows[:1])["direction"] == "not measured"


def test_every_claim_names_its_records_and_source():
    facts = pd.read_csv(claims.DATA / "claims.csv")
    assert facts["id"].is_unique and facts["claim"].is_unique
    assert not facts.drop(columns="article_value").isna().any().any()
    ratio = facts["quantity"].str.fullmatch(r"[a-z_]+/([a-z_]+|[\d.e]+)")
    assert (facts["quantity"].isin([*claims.RATIOS, *claims.WHOLE]) | ratio).all()
    assert facts["direction"].str.fullmatch(r"up|down|alike|at most [\d.]+").all()
    assert set(facts["technique"]) == {*schema.TECHNIQUES, "all"}


def test_published_figures_keep_where_they_come_from():
    rows = pd.read_csv(claims.DATA / "published.csv")
    assert (
        not rows[["source", "date", "kind", "technique", "variant", "metric", "value"]]
        .isna()
        .any()
        .any()
    )
    assert (
        set(rows["kind"]) == {"measured", "claim"}
        and rows.loc[rows["unit"] == "tokens/s", "hardware"].notna().all()
    )
    ratios = plots.published_ratios().query("kind == 'speed' and variant == 'fp16'")
    assert ratios["ratio"].iloc[0] == pytest.approx(
        42.03 / 33.92
    )  # of one source, to its own baseline


def test_failures_stay_in_the_table_and_the_verdicts():
    failed = a_record(
        id="fp16", variant="fp16", baseline="fp32", status="oom", reason="24 GB are not enough"
    )
    assert "oom: 24 GB are not enough" in report.table([a_record(), failed]).loc["fp16", "note"]
    assert report.verdict(failed) == "fp16: oom here (24 GB are not enough)."


def test_verdicts_are_computed():
    fast = a_record(
        id="fp16",
        variant="fp16",
        baseline="fp32",
        speedup=1.5,
        speedup_ci95=(1.4, 1.6),
        nll_delta=0.2,
        nll_delta_ci95=(0.1, 0.3),
    )
    assert "faster, 1.50 [1.40, 1.60] times" in report.verdict(
        fast
    ) and "measurably worse" in report.verdict(fast)
    noisy = fast.model_copy(update={"speedup_ci95": (0.9, 2.5), "nll_delta_ci95": (-0.1, 0.5)})
    assert "within noise" in report.verdict(noisy) and "no measurable loss" in report.verdict(noisy)


def test_readme_is_what_the_results_say():
    text = (report.ROOT / "README.md").read_text()
    slug = results.reference_slug()
    found, problems = results.load_all(slug=slug)
    assert not problems
    assert text == report.render_readme(text, report.readme_parts(found, slug)), (
        "stale: python -m helpers.series.report"
    )


def test_a_readme_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="no part <!-- results -->"):
        report.render_readme("nothing here", {"results": "x"})


def test_a_machine_without_results_is_one_sentence(tmp_path):
    results.save("02_bfloat16", [a_record()], {}, str(tmp_path))
    damaged = tmp_path / "broken" / "02_bfloat16.json"
    damaged.parent.mkdir()
    damaged.write_text('{"schema": 0, "records": []}')
    found, said = report.load([results.machine.slug()], str(tmp_path))
    assert list(found) == [results.machine.slug()] and "1 lessons with results" in said[0]
    with pytest.raises(
        ValueError,
        match=r"02_bfloat16.json is refused as results: schema.*No results for broken: run",
    ):
        report.load(["broken"], str(tmp_path))
    with pytest.raises(ValueError, match="No results for nowhere: run the lessons first"):
        report.load(["nowhere"], str(tmp_path))


def some_records():
    rows = [
        a_record(
            **BASE,
            tokens_per_s=10,
            decode_tokens_per_s=11,
            limit_tokens_per_s=20,
            weight_bytes=4000,
            kv_cache_bytes=100,
            perplexity=9,
            eval_text="t",
            eval_seq_len=4,
        )
    ]
    rows.append(
        variant(
            [1.61, 1.63, 1.60],
            600,
            speedup=1.24,
            speedup_ci95=(1.2, 1.3),
            tokens_per_s=12,
            decode_tokens_per_s=13,
            limit_tokens_per_s=40,
            weight_bytes=2000,
            kv_cache_bytes=50,
            perplexity=9.1,
            eval_text="t",
            eval_seq_len=4,
            nll_delta=math.log(9.1 / 9),
        )
    )
    rows.append(
        a_record(
            id="nf4",
            variant="nf4",
            technique="mixed_precision",
            baseline="fp32",
            status="oom",
            reason="too large",
        )
    )
    rows.append(
        variant(
            [1, 1, 1],
            600,
            id="other",
            variant="other-engine",
            engine="vllm",
            speedup=2.0,
            technique="quantization",
            speedup_ci95=(1.9, 2.1),
        )
    )
    rows.append(a_record(**BASE | {"technique": "quantization"}, tokens_per_s=10))
    return rows


def batches():
    made = {"technique": "continuous_batching", "engine": "vllm"}
    rows = [
        a_record(
            **made | {"engine": "transformers"}, id=name, variant=name, tokens_per_s=speed, **paired
        )
        for name, speed, paired in (
            ("one-by-one", 10, {}),
            (
                "static-transformers",
                20,
                {
                    "baseline": "one-by-one",
                    "speedup": 2.0,
                    "speedup_ci95": (1.9, 2.1),
                    "latency_s": [1, 2],
                },
            ),
        )
    ]
    rows.append(
        a_record(
            **made,
            id="static-vllm",
            variant="static-vllm",
            tokens_per_s=40,
            details={"engine_factor": 2.0},
        )
    )
    rows.append(
        a_record(
            **made,
            id="continuous-vllm",
            variant="continuous-vllm",
            tokens_per_s=80,
            details={"engine_factor": 2.0, "scheduler_factor": 2.5, "total_factor": 5.0},
        )
    )
    rows.append(
        a_record(
            **made,
            id="continuous-openvino",
            variant="continuous-openvino",
            status="unsupported",
            reason="not installed",
        )
    )
    rows.append(
        a_record(
            **made | {"engine": "llama.cpp"},
            id="continuous-llamacpp",
            variant="continuous-llamacpp",
            tokens_per_s=60,
            dtype="Q4_1 weights",
            details={"total_factor": 3.0},
        )
    )
    rows += [
        a_record(
            **made,
            id=f"batch-{n}",
            variant=f"batch-{n}",
            sweep="batch_size",
            batch_size=n,
            tokens_per_s=20 * n**0.8,
            limit_tokens_per_s=50 * n,
        )
        for n in (1, 4, 16)
    ]
    rows += [
        a_record(
            **made,
            id=f"rate-{rate}",
            variant=f"rate-{rate}",
            sweep="request_rate",
            tokens_per_s=30 * rate,
            details={
                "request_rate_per_s": rate,
                "goodput_per_s": min(rate, 2),
                "failed_requests": rate // 4,
                "objective_ttft_s": 1.0,
                "objective_inter_token_s": 0.2,
                **{
                    f"{what}_{q}_s": 0.1 * rate * i
                    for what in ("ttft", "inter_token")
                    for i, q in enumerate(("p50", "p95", "p99"), 1)
                },
            },
        )
        for rate in (1, 2, 4)
    ]
    return rows


def texts(fig) -> list[str]:
    return [t.get_text() for ax in fig.axes for t in [*ax.texts, *ax.get_yticklabels()]]


def test_charts_show_failures_and_no_ratio_of_two_engines():
    said = texts(plots.speedup(results.frame(some_records())))
    assert "1.24×" in said and "oom" in said and "2.00×" not in said and "other-engine" not in said
    apart = texts(plots.factors(results.frame(some_records())))
    assert "2.00×" in apart and "engine, at the same bits" not in said


def test_cpu_ranks_stay_out_of_the_chart_of_speeds():
    frame = results.frame(ranks_on("cpu") + some_records()[:2])
    assert not {"tp-3", "fsdp-2", "4.00×"} & {*texts(plots.speedup(frame))}
    shown = plots.ranks(frame)
    assert {"tp-3 · 3", "0.18"} <= {*texts(shown)} and "share one CPU" in shown.axes[1].get_xlabel()
    assert "4.00×" in texts(plots.speedup(results.frame(ranks_on("gpu"))))
    assert "share one CPU" not in plots.ranks(results.frame(ranks_on("gpu"))).axes[1].get_xlabel()


def test_batching_draws_engine_and_scheduler_apart():
    frame = results.frame(batches())
    said = texts(plots.batching(frame))
    assert {"batching\n2.0×", "engine\n2.0×", "scheduler\n2.5×", "unsupported"} <= {*said}
    assert {"2.50×", "5.00×", "3.00×", "continuous-llamacpp · 4-bit"} <= {
        *texts(plots.factors(frame))
    }
    latency = plots.throughput_latency(frame)
    assert len(latency.axes) == 4 and {"16", "p99", "objective", "1 failed"} <= {*texts(latency)}
    assert "continuous-llamacpp · 4-bit" in said


def test_only_what_others_are_held_against_is_called_a_baseline():
    said = report.table([r for r in batches() if r.sweep is None])["speed-up"]
    assert said["one-by-one"] == "baseline" and said["continuous-llamacpp"] == "–"
    assert said["static-transformers"].startswith("2.00×")
    assert report.table([a_record()])["speed-up"].tolist() == ["baseline"]


def test_published_marks_are_hollow_and_in_a_panel_of_their_own():
    panel = plots.ranks(results.frame(ranks_on("cpu"))).axes[2]
    assert panel.lines and all(line.get_markerfacecolor() == "none" for line in panel.lines)
    own = plots.beside(results.frame(some_records())).axes[0]
    hollow = [line for line in own.lines if line.get_markerfacecolor() == "none"]
    assert any(np.isclose(line.get_xdata(), 42.03 / 33.92).any() for line in hollow)


def test_the_front_is_what_nothing_beats():
    frame = pd.DataFrame(
        {
            "decode_tokens_per_s": [10, 20, 20, 5],
            "perplexity": [9, 9, 12, 8.9],
            "weight_bytes": [4, 4, 1, 9],
        }
    )
    assert plots.pareto(frame).tolist() == [False, True, True, True]


def test_names_on_the_quality_chart_do_not_cover_each_other():
    near = np.random.default_rng(1).lognormal(
        0, 0.3, (30, 2)
    )  # one placement alone leaves two on each other
    rows = [
        a_record(
            id=f"a-variant-{i}",
            variant=f"a-variant-{i}",
            baseline="fp32",
            decode_tokens_per_s=20 * x,
            perplexity=13 * y,
            weight_bytes=2000,
            eval_text="t",
            eval_seq_len=4,
        )
        for i, (x, y) in enumerate(near)
    ]
    fig = plots.quality_speed(results.frame(rows))
    boxes = [t.get_window_extent() for t in fig.axes[0].texts]
    assert len(boxes) == 30 and all(box.count_overlaps(boxes) == 1 for box in boxes)


def test_machines_are_never_on_one_axis():
    two = pd.concat(
        [results.frame(some_records()).assign(machine=name) for name in ("a", "b")],
        ignore_index=True,
    )
    assert (
        len(plots.speedup(two).axes) == 2
        and len(plots.speedup(two[two["machine"] == "a"]).axes) == 1
    )


@pytest.mark.parametrize(
    "chart",
    [
        plots.speedup,
        plots.memory,
        plots.limit,
        plots.quality_speed,
        plots.factors,
        plots.beside,
        plots.cost,
        plots.batching,
        plots.throughput_latency,
        plots.ranks,
    ],
)
def test_every_chart_is_saved_with_data_and_caption(chart, tmp_path):
    frame = results.frame(some_records() + batches() + ranks_on("cpu"))
    frame["cost_per_million_tokens"] = 1 / frame["tokens_per_s"].astype(float)
    path = plots.save(chart, frame, tmp_path, "What it shows.", "name")
    assert {p.name for p in tmp_path.iterdir()} == {
        f"name{end}" for end in (".svg", ".pdf", ".png", ".csv", ".txt", "_dark.svg", "_dark.png")
    }
    light, dark = (
        np.asarray(Image.open(p).convert("L")) for p in (path, tmp_path / "name_dark.png")
    )
    assert (
        light.shape[1] == pytest.approx(3.5 * 300, abs=2) and light.mean() > 200 > 60 > dark.mean()
    )
    assert len(pd.read_csv(tmp_path / "name.csv")) == len(chart.rows(frame))
    first = (tmp_path / "name.svg").read_bytes()
    plots.save(chart, frame, tmp_path, "", "name")
    assert (tmp_path / "name.svg").read_bytes() == first  # drawn anew, the same to the byte


def test_a_chart_without_records_says_so():
    with pytest.raises(plots.Nothing, match="Several ranks: no record to draw"):
        plots.ranks(results.frame(batches()))


def test_tables_are_written_for_write_ups(tmp_path):
    report.write_table(report.table(some_records()[:2]), tmp_path, "table")
    assert pd.read_csv(tmp_path / "table.csv").iloc[1, 0] == "fp16"
    assert "| fp16" in (tmp_path / "table.md").read_text()
    text = (tmp_path / "table.tex").read_text()
    assert r"\toprule" in text and r"1.24$\times$" in text and "×" not in text


def test_the_short_answer_is_computed():
    found = report.answers(some_records() + batches(), "falcon-7b", "a100-40gb", 0.05, 0.1)
    least, single, most = found.iloc[:, 0]
    assert least.startswith("fp16") and "+1.1% perplexity" in least and single.startswith("fp16")
    assert most.startswith("batch-16") or most.startswith("rate-")
    planned = found.iloc[:, 1]
    assert planned.iloc[0].startswith("fp16: 14.") and "batches of" in planned.iloc[2]
    assert (
        report.answers([], "falcon-7b", "a100-40gb", 0.05, 0.1).iloc[:, 0].tolist()
        == ["not measured"] * 3
    )
    strict = report.answers(some_records(), "falcon-7b", "a100-40gb", 0.001, 1e-6)
    assert strict.iloc[0, 0].startswith("fp32") and strict.iloc[2, 1] == "nothing is as fast"
    with pytest.raises(ValueError, match="nearest are a100"):
        report.answers([], "falcon-7b", "a100-48gb", 0.05, 0.1)


def test_what_fits_is_drawn():
    plan = planner.plan(["falcon-7b"], ["fp32", "nf4"], ["t4", "a100-40gb"])
    said = texts(plots.fit(plan, "Falcon"))
    assert any(text.startswith("4.") and text.endswith("t/s") for text in said) and any(
        "GPUs" in text for text in said
    )
