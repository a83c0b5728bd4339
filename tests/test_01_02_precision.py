"""Lessons 01 and 02: what they say of one thing agrees, and no figure is above its ceiling."""

import nbformat
import pytest
from pandas import read_csv

from helpers import limits, results
from helpers.series import planner, run
from helpers.series.claims import DATA

REFERENCE = results.ROOT / "notebooks" / "results"
BOTH = ("fp32", "fp16", "bf16")  # variants that both lessons measure


def committed(lesson: str) -> list[results.Results]:
    """A lesson's records of each reference machine, with the folder's ceilings."""
    paths = sorted(REFERENCE.glob(f"*/*/{lesson}.json"))
    assert paths
    return [(results.read(path), results.read_limits(path.parent.parent)) for path in paths]


def by_name(file: results.Results) -> dict[str, results.Record]:
    return {record.id: record for record in file.records}


def pairs() -> list[tuple[dict, dict]]:
    first, second = committed("01_mixed_precision"), committed("02_bfloat16")
    return [(by_name(a), by_name(b)) for (a, _), (b, _) in zip(first, second, strict=True)]


@pytest.mark.parametrize("lesson", ["01_mixed_precision", "02_bfloat16"])
def test_a_lesson_asks_for_the_kind_of_a_device(lesson):
    """`DEVICE="cuda:1"` is a card as well: only `torch.device(device).type` is "cuda"."""
    notebook = nbformat.read(run.NOTEBOOKS / f"{lesson}.ipynb", 4)
    assert not [cell.id for cell in notebook.cells if 'device == "cuda"' in cell.source]


@pytest.mark.parametrize("name", BOTH)
def test_same_name_means_same_settings(name):
    fields = ("dtype", "prompt_tokens", "new_tokens", "batch_size", "threads", "step_bytes")
    for first, second in pairs():
        for field in fields:
            assert getattr(first[name], field) == getattr(second[name], field), field


@pytest.mark.parametrize("name", BOTH[1:])
def test_the_same_variant_gains_alike_in_both(name):
    """An interval is of one run: between two the machine may drift, as kernels of 16 bits do."""
    for first, second in pairs():
        assert abs(first[name].speedup / second[name].speedup - 1) < 0.10


def test_no_prefill_is_above_its_ceiling():
    for lesson in ("01_mixed_precision", "02_bfloat16"):
        for file, ceilings in committed(lesson):
            flops = ceilings.devices["cpu"].flops_per_s
            swept = [record for record in file.records if record.sweep == "prompt_tokens"]
            assert swept
            for record in swept:
                if "autocast" in record.id:  # its products are of another dtype than its weights
                    continue
                parameters = planner.parameters(planner.describe("smollm2-135m"))["prompt"]
                best = limits.prefill_limit(parameters, flops[record.dtype])
                assert record.prefill_tokens_per_s <= best, record.id


def test_the_articles_loop_is_in_the_table_that_its_claim_is_judged_by():
    claims = read_csv(DATA / "claims.csv").query("technique == 'mixed_precision'")
    for file, _ in committed("01_mixed_precision"):
        headline = {record.id for record in file.records if record.sweep is None}
        assert set(claims.variant) | set(claims.compared_with) <= headline
