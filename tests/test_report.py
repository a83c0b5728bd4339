"""report, claims and answers: verdicts from records, README's parts, tables for write-ups."""

import re

import matplotlib
import pandas as pd
import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from test_results import a_record

from helpers import results
from helpers.series import answers, claims, report, run

BASE = {
    "technique": "mixed_precision",
    "latency_s": [2.0, 2.02, 1.98],
    "resident_before_bytes": 100,
    "peak_bytes": 1100,
    "peak_kind": "process VmHWM",
}


def variant(latency: list[float], peak: int, **fields):
    pairs = [
        results.Pair(baseline="fp32", baseline_s=b, variant_s=v)
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
        ([1.61, 1.63, 1.60], 600, "holds here", "as claimed", "holds here"),
        ([1.0, 1.01, 0.99], 600, "holds here", "larger", "holds here"),
        ([1.9, 1.915, 1.88], 1900, "holds here", "smaller", "does not hold here"),
        ([4.0, 4.04, 3.97], 600, "does not hold here", "smaller", "holds here"),
        ([2.4, 1.7, 2.0], 600, "undecided", "as claimed", "holds here"),
    ],
)
def test_claims_follow_the_records(latency, peak, direction, size, memory):
    found = claims.claims([a_record(**BASE), variant(latency, peak)], "mixed_precision")
    speed = found.loc["16-bit weights generate faster than 32-bit ones"]
    assert (speed["verdict"], speed["effect"]) == (direction, size)
    assert found.loc["16-bit weights take half the memory", "verdict"] == memory
    assert (
        found.loc["mixed precision (autocast) is slower than plain float32", "verdict"]
        == "not testable here"
    )


@pytest.mark.parametrize(("peak", "size"), [(350, "larger"), (600, "as claimed"), (900, "smaller")])
def test_the_size_of_a_saving_is_larger_where_less_is_left(peak, size):
    found = claims.claims([a_record(**BASE), variant([1.6, 1.6, 1.6], peak)], "mixed_precision")
    assert found.loc["16-bit weights take half the memory", "effect"] == size


def test_a_claim_of_likeness_needs_a_narrow_interval():
    def alike(latency):
        rows = [
            a_record(**BASE | {"technique": "bfloat16"}),
            variant([1.5, 1.52, 1.49], 600, technique="bfloat16"),
            variant(latency, 600, technique="bfloat16", id="bf16", variant="bf16"),
        ]
        return claims.claims(rows, "bfloat16").loc["bfloat16 is as fast as float16", "verdict"]

    assert alike([1.5, 1.515, 1.495]) == "holds here"
    assert alike([1.0, 1.01, 1.0]) == "does not hold here"
    assert alike([1.2, 1.9, 1.5]) == "undecided"


def verdict_of(identity: str, records) -> pd.Series:
    facts = pd.read_csv(claims.DATA / "claims.csv").set_index("id")
    return claims.claims(
        records,
        facts.loc[identity, "technique"] if facts.loc[identity, "technique"] != "all" else None,
    ).loc[facts.loc[identity, "claim"]]


FACT = {
    "claim": "half the weights lose nothing",
    "technique": "pruning",
    "quantity": "perplexity",
    "variant": "wanda-50",
    "compared_with": "dense",
    "direction": "at most 1.25",
    "article_value": float("nan"),
    "article_figures": "no figure",
    "needs": float("nan"),
}


def pruned(delta: float, ends: tuple) -> list[results.Record]:
    shared = {"technique": "pruning", "model": "own/tiny"}
    half = {"id": "wanda-50", "variant": "wanda-50", "baseline": "dense"}
    return [
        a_record(**shared, id="dense", variant="dense"),
        a_record(**shared, **half, nll_delta=delta, nll_delta_ci95=ends),
    ]


@pytest.mark.parametrize(
    ("delta", "ends", "said"),
    [
        (0.1, (0.09, 0.11), "holds here"),
        (0.7, (0.6, 0.8), "does not hold here"),
        (0.2, (0.1, 0.4), "undecided"),
    ],
)
def test_a_bound_is_kept_by_the_whole_interval(delta, ends, said):
    row = claims.judge(FACT, pruned(delta, ends))
    assert row["verdict"] == said
    assert row["decided on"] == "wanda-50 / dense; tiny, cpu"


def test_a_verdict_turns_where_its_bound_does():
    rows = pruned(0.2, (0.19, 0.21))
    said = [claims.judge(FACT | {"direction": f"at most {x}"}, rows)["verdict"] for x in (1.1, 1.3)]
    assert said == ["does not hold here", "holds here"]


def test_what_cannot_be_decided_says_why():
    row = claims.judge(FACT, pruned(0.1, (0.0, 0.2))[:1])
    assert (row["verdict"], row["decided on"]) == ("not testable here", "no measured row wanda-50")
    row = claims.judge(FACT | {"needs": "a model of 7 billion"}, pruned(0.1, (0.0, 0.2)))
    assert (row["verdict"], row["decided on"]) == (
        "not testable here",
        "needs a model of 7 billion",
    )


def test_claims_are_counted_in_one_sentence():
    rows = pruned(0.1, (0.09, 0.11))
    facts = [FACT, FACT | {"direction": "down"}, FACT | {"variant": "none"}]
    judged = pd.DataFrame([claims.judge(fact, rows) for fact in facts])
    assert claims.counts(judged) == (
        "Of 3 claims 1 hold here, 1 do not, 0 are undecided, 1 are not testable here."
    )


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
                weight_bytes=538_000_000 // n,
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
                        results.Pair(baseline="single", baseline_s=2, variant_s=s)
                        for s in ((9, 9.1, 9) if name == "fsdp-2" else (1, 1.01, 0.99))
                    ]
                }
            )
            for name, n in (("fsdp-2", 2), ("tp-3", 3))
        ),
    ]


def test_claims_about_gpus_need_gpus():
    identities = ("fsdp-speed", "tp-speed", "tp-over-fsdp")
    for identity in identities:
        assert verdict_of(identity, ranks_on("gpu"))["verdict"] == "holds here"
        assert verdict_of(identity, ranks_on("cpu"))["verdict"] == "not testable here"
    for identity in ("fsdp-part", "fsdp-fits"):  # memory is what it is on any device
        assert verdict_of(identity, ranks_on("cpu"))["verdict"] == "holds here"
    assert verdict_of("falcon-degrees", [])["verdict"] == "holds here"  # its configuration says it


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
    assert (found["here"], found["verdict"], found["effect"]) == ("4.00×", "holds here", "smaller")
    assert verdict_of("continuous-throughput", rows)["here"] == "2.00×"
    assert claims.RATIOS["speed"](rows[3], rows[1]) is None


def test_of_several_rivals_the_fastest_counts():
    def quantized(name: str, latency: list[float]):
        speed = 10 / latency[0]
        return variant(
            latency, 600, technique="quantization", id=name, variant=name, tokens_per_s=speed
        )

    nf4 = quantized("nf4", [1.5, 1.515, 1.485])
    slow, fast = quantized("fp16", [1.8, 1.82, 1.79]), quantized("bf16", [1.2, 1.21, 1.19])
    assert verdict_of("nf4-speed", [slow, nf4])["verdict"] == "holds here"
    assert verdict_of("nf4-speed", [slow, fast, nf4])["verdict"] == "does not hold here"


@pytest.mark.parametrize(("peak", "said"), [(560, "holds here"), (720, "does not hold here")])
def test_half_the_memory_is_half_and_not_only_less(peak, said):
    of = {"technique": "quantization"}
    rows = [a_record(**BASE | of), variant([1.5] * 3, peak, **of, id="int8", variant="int8")]
    assert verdict_of("int8-memory", rows)["verdict"] == said


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
    fact = FACT | {"technique": "adapters", "variant": "qlora", "compared_with": "nf4"}
    fact |= {"direction": "down"}
    shared = {"technique": "adapters", "eval_text": "t", "eval_tokens": 9, "eval_seq_len": 4}
    nf4 = a_record(**shared, id="nf4", variant="nf4", perplexity=20)
    qlora = a_record(**shared, id="qlora", variant="qlora", perplexity=10)
    assert claims.judge(fact, [nf4, qlora])["here"] == "0.50×"
    details = {"nll_against_nf4": -0.1, "nll_against_nf4_ci95": (-0.4, 0.2)}
    paired = qlora.model_copy(update={"details": details})
    assert claims.judge(fact, [nf4, paired])["verdict"] == "undecided"
    other = qlora.model_copy(update={"eval_text": "another"})
    assert claims.judge(fact, [nf4, other])["verdict"] == "not testable here"


def test_compromise_is_counted_over_all_records():
    gain = {"speedup": 1.5, "speedup_ci95": (1.4, 1.6)}
    free = variant([1.4] * 3, 600, nll_delta=0.0, nll_delta_ci95=(-0.01, 0.01), **gain)
    paid = variant(
        [1.4] * 3, 600, id="nf4", variant="nf4", nll_delta=0.3, nll_delta_ci95=(0.2, 0.4), **gain
    )
    rows = [a_record(**BASE), free]
    assert verdict_of("compromise", rows)["verdict"] == "does not hold here"
    assert verdict_of("compromise", [*rows, paid])["here"] == "1 of 2 faster variants lose quality"
    assert verdict_of("compromise", rows[:1])["verdict"] == "not testable here"


def test_every_claim_names_its_records_and_source():
    facts = pd.read_csv(claims.DATA / "claims.csv")
    assert facts["id"].is_unique and facts["claim"].is_unique
    assert not facts.drop(columns=["article_value", "needs"]).isna().any().any()
    ratio = facts["quantity"].str.fullmatch(r"[a-z_]+/([a-z_]+|[\d.e]+)")
    assert (facts["quantity"].isin([*claims.RATIOS, *claims.WHOLE]) | ratio).all()
    assert facts["direction"].str.fullmatch(r"up|down|alike|at most [\d.]+").all()
    assert set(facts["technique"]) == {*{path.stem[3:] for path in run.notebooks()[:-1]}, "all"}


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


def test_failures_stay_in_the_table_and_the_verdicts():
    failed = a_record(
        id="fp16", variant="fp16", baseline="fp32", status="oom", reason="24 GB are not enough"
    )
    assert "oom: 24 GB are not enough" in results.table([a_record(), failed]).loc["fp16", "note"]
    assert results.verdict(failed) == "fp16: oom here (24 GB are not enough)."


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
    assert "faster, 1.50 [1.40, 1.60] times" in results.verdict(
        fast
    ) and "measurably worse" in results.verdict(fast)
    noisy = fast.model_copy(update={"speedup_ci95": (0.9, 2.5), "nll_delta_ci95": (-0.1, 0.5)})
    assert "within noise" in results.verdict(noisy) and "no measurable loss" in results.verdict(
        noisy
    )


def test_readme_and_results_are_what_the_committed_records_say():
    text = (results.ROOT / "README.md").read_text()
    place = report.committed()
    assert text == report.render_readme(text, report.readme_parts(place)), "make readme"
    page = (results.ROOT / "RESULTS.md").read_text()
    assert page == report.results_page(place), "make readme"


def test_a_readme_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="no part <!-- results -->"):
        report.render_readme("nothing here", {"results": "x"})


def write(folder, name, *records) -> None:
    """A lesson's results as another machine would have them."""
    file = results.Results(
        machine=results.machine.describe(),
        run=results.Run(date="2026-01-02T00:00:00Z", profile="full", commit=None, parameters={}),
        records=list(records),
    )
    results.write_atomically(folder / f"{name}.json", file.model_dump_json(by_alias=True))


def test_results_are_found_by_machine_and_model(tmp_path):
    write(tmp_path / "gpu" / "falcon-7b", "02_bfloat16", a_record())
    write(tmp_path / "gpu" / "falcon-7b", "01_mixed_precision", a_record())
    write(tmp_path / "gpu" / "tiny", "02_bfloat16", a_record())
    write(tmp_path / "gpu" / "tiny" / "smoke", "03_quantization", a_record())
    found, sentences = report.load([], [], str(tmp_path))
    (place,) = found.values()
    assert (place.machine, place.model) == ("gpu", "falcon-7b") and len(place.records) == 2
    assert "2 lessons with results; none yet of 03_quantization" in sentences[0]
    assert sentences[1] == "gpu has results of tiny too: name them in MODELS"
    found, _ = report.load(["gpu"], ["tiny", "falcon-7b"], str(tmp_path))
    assert list(found) == ["gpu · tiny", "gpu · falcon-7b"]
    assert report.frame(found)["machine"].unique().tolist() == list(found)


def test_a_row_is_known_by_its_notebook_and_its_name():
    """A deeper notebook has a baseline of its own, which bears the same name."""
    found, _ = report.load([], [], str(report.REFERENCE))
    rows = report.frame(found)
    assert not rows.duplicated(["machine", "notebook", "id"]).any()
    assert rows.duplicated(["machine", "technique", "id"]).any()


def test_a_quick_run_never_stands_among_whole_ones(tmp_path):
    write(tmp_path / "gpu" / "tiny" / "smoke", "03_quantization", a_record())
    with pytest.raises(ValueError, match="run the lessons first"):
        report.load([], [], str(tmp_path))


def test_a_machine_without_results_is_one_sentence(tmp_path):
    write(tmp_path / "gpu" / "tiny", "02_bfloat16", a_record())
    damaged = tmp_path / "broken" / "tiny" / "02_bfloat16.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text('{"schema": 0, "records": []}')
    with pytest.raises(ValueError, match=r"02_bfloat16.json is refused.*No results of tiny on"):
        report.load(["broken"], [], str(tmp_path))
    with pytest.raises(ValueError, match="No results for nowhere: run the lessons first"):
        report.load(["nowhere"], [], str(tmp_path))
    with pytest.raises(ValueError, match=r"name one of MACHINES that has some \(broken, gpu\)"):
        report.load([], [], str(tmp_path))


def test_tables_are_written_for_write_ups(tmp_path):
    rows = [a_record(**BASE), variant([1.6] * 3, 600, speedup=1.24, speedup_ci95=(1.2, 1.3))]
    report.write_table(results.table(rows), tmp_path, "table")
    assert pd.read_csv(tmp_path / "table.csv").iloc[1, 0] == "fp16"
    assert "| fp16" in (tmp_path / "table.md").read_text()
    text = (tmp_path / "table.tex").read_text()
    assert r"\toprule" in text and r"1.24$\times$" in text and "×" not in text
    rows = pd.DataFrame({"variant": ["50% & a_b #1 {x} $y^2~"]})
    report.write_table(rows, tmp_path, "special")
    escaped = r"50\% \& a\_b \#1 \{x\} \$y\textasciicircum 2\textasciitilde"
    assert escaped in (tmp_path / "special.tex").read_text()


def measured_rows():
    """A baseline, 16 bits that lose 1 % of perplexity, and a curve of batches."""
    base = a_record(**BASE, tokens_per_s=10, perplexity=9, eval_text="t", eval_seq_len=4)
    half = variant(
        [1.6] * 3,
        600,
        tokens_per_s=12,
        perplexity=9.1,
        nll_delta=0.011,
        nll_delta_ci95=(0.01, 0.012),
    )
    batches = [
        a_record(
            technique="continuous_batching",
            id=f"batch-{size}",
            variant=f"batch-{size}",
            sweep="batch_size",
            batch_size=size,
            tokens_per_s=10 * size,
        )
        for size in (1, 16)
    ]
    load = a_record(
        technique="continuous_batching",
        id="load-1",
        variant="load-1",
        sweep="request_rate",
        tokens_per_s=200,
        details={"tpot_p95_s": 0.15, "failed_requests": 0},
    )
    return [base, half, *batches, load]


def test_the_short_answer_is_computed():
    found = answers.answers(measured_rows(), "falcon-7b", "a100-40gb", 0.05, 0.1)
    least, single, most = found.iloc[:, 0]
    assert least.startswith("fp16") and "+1.1% perplexity" in least and single.startswith("fp16")
    assert most.startswith("batch-16")
    planned = found.iloc[:, 1]
    assert planned.iloc[0].startswith("q4_K_M: 4.6 GB")  # a published loss, no small model's
    assert planned.iloc[1].startswith("fp16: 14.") and "batches of" in planned.iloc[2]
    nothing = answers.answers([], "falcon-7b", "a100-40gb", 0.05, 0.1)
    assert nothing.iloc[:, 0].tolist() == ["not measured"] * 3
    strict = answers.answers(measured_rows(), "falcon-7b", "a100-40gb", 0.001, 1e-6)
    assert strict.iloc[0, 0].startswith("fp32") and strict.iloc[2, 1] == "nothing is as fast"
    slow = answers.answers(measured_rows(), "falcon-7b", "a100-40gb", 0.05, 0.2)
    assert slow.iloc[2, 0].startswith("load-1") and "200 tokens/s at 150 ms" in slow.iloc[2, 0]
    with pytest.raises(ValueError, match="nearest are a100"):
        answers.answers([], "falcon-7b", "a100-48gb", 0.05, 0.1)


def test_the_fastest_is_by_speeds_that_were_published():
    fp16 = measured_rows()[1]
    int8 = fp16.model_copy(update={"id": "int8", "variant": "int8"})
    rows = [*measured_rows(), int8]  # by its bytes int8 would be twice as fast as 16 bits
    found = answers.answers(rows, "falcon-7b", "a100-40gb", 0.05, 0.1)
    assert found.iloc[1, 1].startswith("fp16")


def test_a_caption_tells_the_conditions_of_the_rows_drawn():
    place = report.committed()
    rows = results.frame(place.records, place.limits)
    fp16 = rows[(rows.technique == "mixed_precision") & (rows.id == "fp16")]
    text = report.caption({"here": place}, "Shown.", fp16)
    assert text.startswith("Shown. Model: ") and "transformers" in text
    assert "pairs with the baseline" in text
    assert "llama.cpp" not in text and "vllm" not in text
    under_load = rows[rows.details.map(lambda details: "load_requests" in details)]
    text = report.caption({"here": place}, "Shown.", under_load)
    assert "requests a rate in 3 runs, 8 slots; in time: first token within 1 s" in text
    assert "Prompts of" not in text
    elsewhere = report.caption({"here": place}, "Shown.", fp16.assign(machine="there"))
    assert elsewhere == "Shown."
    predicted = pd.DataFrame({"technique": ["fp16"], "total_bytes": [1]})
    assert report.caption({"here": place}, "Predicted.", predicted) == "Predicted."
    published = predicted.assign(source="a paper")
    assert report.caption({"here": place}, "P.", published).endswith("not measured here: a paper.")


def test_double_quantization_without_a_row_is_taken_to_lose_what_nf4_does():
    nf4 = a_record(
        technique="quantization", id="nf4", variant="nf4", baseline="fp32", nll_delta=0.01
    )
    found = answers.answers([*measured_rows(), nf4], "falcon-7b", "a100-40gb", 0.05, 0.1)
    assert found.iloc[0, 1].startswith("nf4-dq")


def test_every_variant_stands_in_plain_columns():
    place = report.committed()
    rows = report.variants({"here": place}).set_index(["technique", "variant"])
    assert len(rows) == len(place.headline)
    fp16 = next(r for r in place.headline if (r.technique, r.id) == ("mixed_precision", "fp16"))
    row = rows.loc["mixed_precision", "fp16"]
    assert (row.speedup, row.low, row.high) == (fp16.speedup, *fp16.speedup_ci95)
    assert (row.nll_delta_low, row.nll_delta_high) == fp16.nll_delta_ci95
    assert row.baseline == "fp32" and 0.4 < row.memory_share < 0.6
    assert rows.loc["multiple_gpus", "tp-3"].isna().speedup  # ranks that share one CPU


def natural_inches(block: str) -> float:
    """The width of a table set in Computer Modern at 10 points, before it is scaled."""
    form = re.search(r"tabular\}\{(.*)\}\n", block)[1]
    rows = [row.split(" & ") for row in re.findall(r"^(.*) \\\\$", block, re.M)]
    font = FontProperties(fname=f"{matplotlib.get_data_path()}/fonts/ttf/cmr10.ttf")
    total = 0.0
    for number, wrapped in enumerate(re.findall(r"l|p\{([\d.]+)in\}", form)):
        texts = [re.sub(r"\$\\(\w+)\$", "M", row[number]).replace("\\", "") for row in rows]
        shapes = [TextPath((0, 0), text, size=10, prop=font) for text in texts if text.strip()]
        natural = max(shape.get_extents().width for shape in shapes) / 72
        total += (float(wrapped) if wrapped else natural) + 6 / 72
    return total


def test_tables_of_the_records_fit_a_page(tmp_path):
    place = report.committed()
    tables = {name: results.table(lesson.records) for name, lesson in place.lessons.items()}
    tables["claims"] = claims.claims(place.records)
    for name, rows in tables.items():
        report.write_table(rows, tmp_path, name)
        blocks = (tmp_path / f"{name}.tex").read_text().split("\n\n")
        assert sum(block.count(r"\\") for block in blocks) == len(rows) + len(blocks)
        for block in blocks:
            inches = natural_inches(block)
            assert r"\resizebox{\textwidth}" in block or inches <= 6.9, name
            assert 10 * 6.9 / inches > 6.5, name  # points of the scaled text
            assert block.count(r"\\") < 40


def test_every_picture_of_the_texts_is_told_in_words():
    for name in ("README.md", "RESULTS.md", "GPU.md", "PLANNER.md"):
        for tag in re.findall(r"<img[^>]*>", (results.ROOT / name).read_text()):
            assert re.search(r'alt="[^"]{40,}"', tag), tag
