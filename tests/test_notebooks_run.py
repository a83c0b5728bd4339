"""The notebooks run through papermill, and what they found is plausible. (Each lesson's own
properties: test_NN_*.)
"""

import os
import shutil

import pytest

from helpers import results
from helpers.series import report, run

LESSONS = sorted(p.stem for p in run.NOTEBOOKS.glob("*.ipynb"))[:-1]


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_leaves_plausible_records(name, run_lesson):
    found = run_lesson(name)
    assert any(r.status == "ok" and r.sweep is None for r in found.records)
    assert any(r.baseline for r in found.records)
    assert found.run.profile == "smoke"
    for record in found.records:
        if record.status != "ok":
            continue
        if record.latency_s and record.inter_token_s:
            assert sum(record.ttft_s) + sum(record.inter_token_s) <= sum(record.latency_s) * 1.001
        if record.perplexity:
            assert 1 < record.perplexity < 1e6 and record.eval_tokens > 0 and record.eval_text
        if record.speedup_ci95 and record.speedup:
            assert record.speedup_ci95[0] <= record.speedup <= record.speedup_ci95[1]
        if record.kl_divergence is not None:
            assert record.kl_divergence > -1e-6


def test_the_comparison_draws_what_the_lessons_left(tmp_path, run_lesson):
    folder = tmp_path / "results"
    for name in LESSONS:
        run_lesson(name)
        shutil.copytree(run_lesson(name).__dict__["folder"] / "results", folder, dirs_exist_ok=True)
    damaged = next(folder.glob(f"*/{LESSONS[-1]}.json"))
    damaged.write_text(
        damaged.read_text()[:200]
    )  # one file is cut short: the others are drawn all the same
    out = tmp_path / "08.ipynb"
    run.execute(
        run.NOTEBOOKS / "08_comparison.ipynb",
        out,
        {"RESULTS_DIR": str(folder), "FIGURES_DIR": str(tmp_path / "figures")},
    )
    assert f"{damaged.name} is refused as results" in out.read_text()
    slug = damaged.parent.name
    drawn = {p.name for p in (tmp_path / "figures" / slug).iterdir()}
    for chart in ("speedup", "memory", "quality_speed", "limit"):
        assert {f"{chart}{ending}" for ending in (".svg", ".pdf", ".png", ".csv", ".txt")} <= drawn
    caption = (tmp_path / "figures" / slug / "speedup.txt").read_text()
    assert slug in caption and "SmolLM2" in caption and "new ones" in caption


def test_the_comparison_without_results_says_so(tmp_path):
    with pytest.raises(Exception, match=r"No results for .*: run the lessons first"):
        run.execute(
            run.NOTEBOOKS / "08_comparison.ipynb",
            tmp_path / "08.ipynb",
            {"RESULTS_DIR": str(tmp_path), "FIGURES_DIR": str(tmp_path / "figures")},
        )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"NEW_TOKENS": 0}, "NEW_TOKENS=0 must be a whole number"),
        ({"DEVICE": "toaster"}, "DEVICE='toaster' is no device"),
        ({"MODEL": "./nowhere"}, "MODEL='./nowhere' is no folder"),
    ],
)
def test_bad_parameters_stop_a_lesson_in_one_sentence(tmp_path, given, said):
    with pytest.raises(Exception, match=said):
        run.execute(
            run.NOTEBOOKS / "02_bfloat16.ipynb",
            tmp_path / "out.ipynb",
            {"RESULTS_DIR": str(tmp_path / "r")} | given,
        )
    assert not list(tmp_path.rglob("*.json"))


def test_a_lossless_format_says_the_same_text(run_lesson):
    by_variant = {r.variant: r for r in run_lesson("01_mixed_precision").records}
    assert by_variant["fp16"].agreement > 0.98 and abs(by_variant["fp16"].nll_delta) < 0.01
    assert by_variant["fp32"].weight_bytes == 2 * by_variant["fp16"].weight_bytes == 538_060_032
    peak = {
        n: r.peak_bytes - r.resident_before_bytes for n, r in by_variant.items() if r.peak_bytes
    }
    assert 0.4 < peak["fp16"] / peak["fp32"] < 0.6
    assert peak["fp16-autocast"] > 1.2 * peak["fp32"]


def test_bfloat16_moves_more_than_float16(run_lesson):
    by_variant = {r.variant: r for r in run_lesson("02_bfloat16").records}
    assert by_variant["bf16"].kl_divergence > by_variant["fp16"].kl_divergence > 0
    assert {r.sweep for r in by_variant.values()} == {None, "prompt_tokens"}
    assert (
        report.claims(list(by_variant.values()), "bfloat16").loc[
            "bfloat16 weights take half the memory", "direction"
        ]
        == "confirmed"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "99"], "no notebook begins so"),
        (["--only", "01", "-p", "NEW_TOKEN=8"], "unknown parameter NEW_TOKEN"),
        (["--only", "01", "-p", "NEW_TOKENS"], "write it as NAME=value"),
        (["--reference", "-p", "SEED=1"], "--reference runs the notebooks as they stand"),
    ],
)
def test_bad_commands_get_one_sentence(arguments, said, capsys):
    assert run.main(arguments) == 2
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_failed_notebook_fails_the_run_after_the_others(tmp_path, capsys, monkeypatch):
    import nbformat

    def small(name, source):
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nb = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
        nb.cells = [
            nbformat.v4.new_code_cell("SEED = 0", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(source),
        ]
        nbformat.write(nb, tmp_path / name)

    small("01_bad.ipynb", "raise ValueError('the thing that failed')")
    small("02_good.ipynb", "print(SEED)")
    monkeypatch.setattr(run, "NOTEBOOKS", tmp_path)
    assert run.main(["--out", str(tmp_path / "out"), "-p", "SEED=7"]) == 1
    said = capsys.readouterr().out
    assert "the thing that failed" in " ".join(said.split()) and "ok" in said
    assert "7" in (tmp_path / "out" / "02_good.ipynb").read_text()


def test_stamping_keeps_the_code_and_refuses_another(tmp_path):
    import nbformat

    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    done = nbformat.from_dict(nb)
    nbformat.write(nb, tmp_path / "a.ipynb")
    done.cells[0].outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="noise"),
        nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=1),
    ]
    done.cells[0].execution_count = 1
    nbformat.write(done, tmp_path / "ran.ipynb")
    run.stamp(tmp_path / "a.ipynb", tmp_path / "ran.ipynb")
    stamped = nbformat.read(tmp_path / "a.ipynb", 4)
    assert (
        stamped.metadata.stamp.code == run.code_hash(stamped) and len(stamped.cells[0].outputs) == 1
    )
    nb.cells[0].source = "2 + 2"
    nbformat.write(nb, tmp_path / "a.ipynb")
    with pytest.raises(ValueError, match="is not what was executed"):
        run.stamp(tmp_path / "a.ipynb", tmp_path / "ran.ipynb")


def test_papermill_alone_runs_a_lesson_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert os.getcwd() == str(tmp_path)
    import papermill

    papermill.execute_notebook(
        str(run.NOTEBOOKS / "08_comparison.ipynb"),
        "out.ipynb",
        progress_bar=False,
        parameters={
            "RESULTS_DIR": str(results.ROOT / "notebooks" / "results"),
            "FIGURES_DIR": "figures",
        },
    )
    assert (tmp_path / "figures" / results.reference_slug() / "speedup.svg").exists()
