"""report and plots: claims judged from records, README's parts, charts written whole."""

import pandas as pd
import pytest
from test_results import a_record

from helpers import plots, report, results, schema

BASE = {"technique": "mixed_precision", "latency_s": [2.0, 2.02, 1.98], "resident_before_bytes": 100,
        "peak_bytes": 1100, "peak_kind": "process VmHWM"}


def variant(latency: list[float], peak: int, **fields):
    pairs = [schema.Pair(baseline="fp32", baseline_s=b, variant_s=v)
             for b, v in zip(BASE["latency_s"], latency, strict=True)]
    return a_record(**BASE | {"id": "fp16", "variant": "fp16", "baseline": "fp32", "latency_s": latency,
                              "pairs": pairs, "peak_bytes": peak} | fields)


@pytest.mark.parametrize(("latency", "peak", "direction", "size", "memory"), [
    ([1.61, 1.63, 1.60], 600, "confirmed", "met", "confirmed"),
    ([1.0, 1.01, 0.99], 600, "confirmed", "larger", "confirmed"),
    ([1.9, 1.915, 1.88], 1900, "confirmed", "smaller", "refuted"),
    ([4.0, 4.04, 3.97], 600, "refuted", "smaller", "confirmed"),
    ([2.4, 1.7, 2.0], 600, "within noise", "met", "confirmed"),
])
def test_claims_follow_the_records(latency, peak, direction, size, memory):
    found = report.claims([a_record(**BASE), variant(latency, peak)], "mixed_precision")
    speed = found.loc["16-bit weights generate faster than 32-bit ones"]
    assert (speed["direction"], speed["size"]) == (direction, size)
    assert found.loc["16-bit weights take half the memory", "direction"] == memory
    assert found.loc["mixed precision (autocast) is slower than plain float32", "direction"] == "not measured"


def test_a_claim_of_likeness_needs_a_narrow_interval():
    def alike(latency):
        rows = [a_record(**BASE | {"technique": "bfloat16"}),
                variant([1.5, 1.52, 1.49], 600, technique="bfloat16"),
                variant(latency, 600, technique="bfloat16", id="bf16", variant="bf16")]
        return report.claims(rows, "bfloat16").loc["bfloat16 is as fast as float16", "direction"]

    assert alike([1.5, 1.515, 1.495]) == "confirmed"
    assert alike([1.0, 1.01, 1.0]) == "refuted"
    assert alike([1.2, 1.9, 1.5]) == "within noise"


def test_every_claim_names_its_records_and_source():
    facts = pd.read_csv(report.DATA / "claims.csv")
    assert facts["id"].is_unique and not facts.drop(columns="article_value").isna().any().any()
    assert set(facts["quantity"]) <= set(report.RATIOS) and set(facts["direction"]) <= {"up", "down", "alike"}
    assert set(facts["technique"]) <= set(schema.TECHNIQUES)


def test_failures_stay_in_the_table_and_the_verdicts():
    failed = a_record(id="fp16", variant="fp16", baseline="fp32", status="oom", reason="24 GB are not enough")
    assert "oom: 24 GB are not enough" in report.table([a_record(), failed]).loc["fp16", "note"]
    assert report.verdict(failed) == "fp16: oom here (24 GB are not enough)."


def test_verdicts_are_computed():
    fast = a_record(id="fp16", variant="fp16", baseline="fp32", speedup=1.5, speedup_ci95=(1.4, 1.6), nll_delta=0.2,
                    nll_delta_ci95=(0.1, 0.3))
    assert "faster, 1.50 [1.40, 1.60] times" in report.verdict(fast) and "measurably worse" in report.verdict(fast)
    noisy = fast.model_copy(update={"speedup_ci95": (0.9, 2.5), "nll_delta_ci95": (-0.1, 0.5)})
    assert "within noise" in report.verdict(noisy) and "no measurable loss" in report.verdict(noisy)


def test_readme_is_what_the_results_say():
    text = (report.ROOT / "README.md").read_text()
    slug = results.reference_slug()
    found, problems = results.load_all(slug=slug)
    assert not problems
    assert text == report.render_readme(text, report.readme_parts(found, slug)), "stale: python -m helpers.report"


def test_a_readme_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="no part <!-- results -->"):
        report.render_readme("nothing here", {"results": "x"})


def some_records():
    rows = [a_record(**BASE, tokens_per_s=10, decode_tokens_per_s=11, limit_tokens_per_s=20, weight_bytes=4000,
                     kv_cache_bytes=100, perplexity=9)]
    rows.append(variant([1.61, 1.63, 1.60], 600, speedup=1.24, speedup_ci95=(1.2, 1.3), tokens_per_s=12,
                        decode_tokens_per_s=13, limit_tokens_per_s=40, weight_bytes=2000, kv_cache_bytes=50,
                        perplexity=9.1))
    rows.append(a_record(id="nf4", variant="nf4", technique="mixed_precision", baseline="fp32", status="oom",
                         reason="too large"))
    rows.append(variant([1, 1, 1], 600, id="other", variant="other-engine", engine="vllm", speedup=2.0,
                        speedup_ci95=(1.9, 2.1)))
    return rows


def test_charts_show_failures_and_no_ratio_of_two_engines():
    fig = plots.speedup(results.frame(some_records()))
    texts = [t.get_text() for t in fig.axes[0].texts]
    assert "1.24×" in texts and "oom" in texts and "2.00×" not in texts
    assert "other-engine" not in [t.get_text() for t in fig.axes[0].get_yticklabels()]


@pytest.mark.parametrize("chart", [plots.speedup, plots.memory, plots.limit, plots.quality_speed])
def test_every_chart_is_saved_with_data_and_caption(chart, tmp_path):
    plots.use_style()
    frame = results.frame(some_records())
    plots.save(chart(frame), "name", frame[["variant", "tokens_per_s"]], tmp_path, "What it shows.")
    assert {p.suffix for p in tmp_path.iterdir()} == {".svg", ".pdf", ".png", ".csv", ".txt"}
    assert pd.read_csv(tmp_path / "name.csv")["variant"].tolist() == frame["variant"].tolist()
    first = (tmp_path / "name.svg").read_bytes()
    plots.save(chart(frame), "name", frame[["variant"]], tmp_path)
    assert (tmp_path / "name.svg").read_bytes() == first  # drawn anew, the same to the byte
