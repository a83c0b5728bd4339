"""A machine's history of ratios: nothing twice, and what moved is counted."""

import pandas as pd
import pytest

from helpers import results
from helpers.series import history

MACHINE = results.ROOT / "notebooks" / "results" / "x86_64-2core-avx512-bf16-24gb"
RUN = {"model": "m", "notebook": "01_mixed_precision", "baseline": "fp32"}


def test_the_committed_history_holds_the_committed_results():
    committed = history.read(MACHINE)
    ours = MACHINE.glob("*/[0-9][0-9]_*.json")
    rows = pd.DataFrame([row for path in ours for row in history._ratios(path)])
    both = rows.merge(committed, on=["date", *history.KEY])
    assert len(both) == len(rows) > 30
    assert both["speedup_x"].tolist() == pytest.approx(both["speedup_y"].tolist(), abs=1e-4)


def test_a_run_is_added_once(tmp_path):
    model = tmp_path / "SmolLM2-135M-Instruct"
    model.mkdir()
    committed = (MACHINE / model.name / "02_bfloat16.json").read_text(encoding="utf-8")
    (model / "02_bfloat16.json").write_text(committed, encoding="utf-8")
    (model / "03_quantization.partial.json").write_text("{}", encoding="utf-8")
    history.append(tmp_path)
    once = history.read(tmp_path)
    history.append(tmp_path)
    assert len(once) == 2 and history.read(tmp_path).equals(once)


def test_what_kept_its_word_and_what_was_reversed_is_counted():
    ratios = {
        "fp16": [(2.0, 1.9, 2.1), (2.2, 2.1, 2.3)],
        "bf16": [(1.2, 1.1, 1.3), (0.9, 0.8, 0.95)],
    }
    rows = []
    for variant, runs in ratios.items():
        for day, (speedup, low, high) in enumerate(runs):
            row = {"date": f"2026-11-2{day}", "variant": variant, "speedup": speedup}
            rows.append(RUN | row | {"low": low, "high": high})
    sentence = history.moved(pd.DataFrame(rows))
    assert sentence.startswith(
        "Of 2 ratios that a reference run measured again on this machine, 1 kept"
    )
    assert "reversed: 1. Half of them moved by at most 17.5%" in sentence


def test_one_run_says_nothing_of_how_far_it_moves():
    assert "two reference runs" in history.moved(history.read(MACHINE / "nowhere"))
    assert "two reference runs" in history.moved(history.read(MACHINE).head(1))
