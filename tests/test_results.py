"""results: rows on disk as they are measured, round trips, refusals, nothing lost."""

import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys

import jsonschema
import pytest
from pydantic import ValidationError

from helpers import memory, quality, results, timing
from tests import declared

ALL = results.null("not measured", *results.NULLABLE)


def a_record(**fields) -> results.Record:
    values = {
        "technique": "bfloat16",
        "id": "fp32",
        "variant": "fp32",
        "threads": 2,
        "affinity": [0, 1],
        "model": "m",
        "dtype": "float32",
        "device": "cpu",
        "reasons": ALL,
    }
    return results.Record(**values | fields)


def run(seconds: float) -> timing.Generation:
    return timing.Generation(seconds, [seconds / 2, seconds], prompt_tokens=7)


def paired() -> dict[str, timing.Series]:
    """Two runs of fp32 and of bf16, which is twice as fast."""
    return {
        "fp32": timing.Series(runs=[run(2.0), run(2.2)], warmup=[run(3.0)]),
        "bf16": timing.Series(runs=[run(1.0), run(1.1)], baseline="fp32"),
    }


@pytest.fixture
def lesson(tmp_path):
    return results.open(
        "02_bfloat16", "auto", {"REPEATS": 2}, device="cpu", seed=0, results_dir=str(tmp_path)
    )


def test_what_is_measured_is_on_disk_at_once(lesson):
    lesson(paired(), dtype="float32")
    on_disk = results.read(lesson.partial)
    assert [record.id for record in on_disk.records] == ["fp32", "bf16"]
    assert not on_disk.run.finished and not lesson.path.exists()
    lesson.add("bf16", peak=memory.Peak(10, 30, 40, "process VmHWM"))
    assert results.read(lesson.partial).records[1].peak_bytes == 30
    assert lesson.finish() == lesson.path and not lesson.partial.exists()
    whole = results.read(lesson.path)
    assert whole.records == lesson.records and whole.run.finished
    assert whole.run.parameters == {"REPEATS": 2}


def test_a_row_is_put_together_from_what_was_measured(lesson):
    lesson(paired())
    lesson.add("bf16", weight_bytes=100, kv_cache_bytes=50, dtype="bfloat16")
    row = lesson.record("bf16")
    assert row.speedup == pytest.approx(2.0) and row.technique == "bfloat16"
    assert [pair.baseline_s for pair in row.pairs] == [2.0, 2.2]
    step_s = 1 / row.decode_tokens_per_s
    assert row.moved_bytes_per_s == pytest.approx(150 / step_s)
    assert row.reasons["perplexity"] == "not measured" and "speedup" not in row.reasons
    assert lesson.record("fp32").reasons["speedup"] == "this is the baseline"


def test_a_failed_variant_keeps_its_row_and_its_reason(lesson):
    series = paired() | {"fp16": timing.Series(status="oom", reason="28.9 GB are not there")}
    lesson(series)
    row = results.read(lesson.partial).records[2]
    assert (row.status, row.reason) == ("oom", "28.9 GB are not there")


def test_scores_that_are_no_numbers_are_null_with_the_reason(lesson):
    lesson.add("fp16", quality=quality.Quality([float("nan"), 2.0], 10, 6, nll_delta=float("nan")))
    row = results.read(lesson.partial).records[0]
    assert row.perplexity is None and "nan" in row.reasons["perplexity"]
    assert row.agreement is None and row.reasons["nll_delta"] == row.reasons["perplexity"]


def test_a_field_that_no_record_has_is_refused(lesson):
    with pytest.raises(ValueError, match="colour"):
        lesson.add("fp32", colour="blue")


def test_an_unfinished_run_does_not_replace_a_whole_one(lesson, tmp_path):
    lesson(paired())
    lesson.finish()
    before = lesson.path.read_bytes()
    again = results.open("02_bfloat16", "auto", {}, device="cpu", seed=1, results_dir=str(tmp_path))
    again.add("other", dtype="float32")
    assert lesson.path.read_bytes() == before
    found, sentences = results.read_all(lesson.folder)
    assert [record.id for record in found["02_bfloat16"].records] == ["fp32", "bf16"]
    assert "an unfinished run lies beside the finished one" in sentences[0]


def test_an_unfinished_run_alone_is_read_and_said(lesson):
    lesson(paired())
    found, sentences = results.read_all(lesson.folder)
    assert len(found["02_bfloat16"].records) == 2
    assert sentences == ["02_bfloat16 broke off: 2 rows of an unfinished run are shown."]


KILLED = """
import os, sys, time
from helpers import results, timing
from helpers.timing import Generation, Variant

def run(model):
    time.sleep(0.01)
    if model == "slow" and os.path.exists(sys.argv[2]):
        print("measuring", flush=True)
        time.sleep(60)
    return Generation(1.0, [0.5, 1.0], 7)

lesson = results.open("01_mixed_precision", "auto", {}, device="cpu", seed=0, results_dir=sys.argv[1])
timing.measure({"fp32": Variant(lambda: "fast", run)}, "fp32", 3, 0, keep=lesson)
open(sys.argv[2], "w").close()
timing.measure({"fp16": Variant(lambda: "slow", run)}, "fp16", 3, 0, keep=lesson)
"""


def test_a_process_killed_between_two_measurements_leaves_all_rows(tmp_path):
    command = [sys.executable, "-c", KILLED, tmp_path / "results", tmp_path / "flag"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"measuring\n"
        process.send_signal(signal.SIGKILL)
    (path,) = (tmp_path / "results").glob("*/*/01_mixed_precision.partial.json")
    (row,) = results.read(path).records
    assert row.id == "fp32" and len(row.latency_s) == 3


HOLDING = """
import sys
from helpers import results
results.open("02_bfloat16", "auto", {}, device="cpu", seed=0, results_dir=sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""


def test_two_runs_at_once_are_noticed(tmp_path):
    command = [sys.executable, "-c", HOLDING, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"open\n"
        arguments = {"device": "cpu", "seed": 0, "results_dir": str(tmp_path)}
        with pytest.raises(ValueError, match="Another run of 02_bfloat16 writes into this folder"):
            results.open("02_bfloat16", "auto", {}, **arguments)
        process.communicate()
    assert results.open("02_bfloat16", "auto", {}, **arguments).rows == {}


def test_a_quick_run_and_another_model_have_folders_of_their_own(tmp_path, tiny_llama, monkeypatch):
    full = results.model_folder("auto", results_dir=str(tmp_path))
    assert full.name == "SmolLM2-135M-Instruct"
    assert results.model_folder(tiny_llama, results_dir=str(tmp_path)).parent == full.parent
    assert results.model_folder(tiny_llama, results_dir=str(tmp_path)) != full
    monkeypatch.setenv("SEVEN_PROFILE", "smoke")
    assert results.model_folder("auto", results_dir=str(tmp_path)) == full / "smoke"


def test_outside_of_the_checkout_results_go_to_the_working_folder(tmp_path, monkeypatch):
    assert results.base_folder() == results.ROOT / "runs"
    monkeypatch.chdir(tmp_path)
    assert results.base_folder() == tmp_path / "runs"
    assert results.base_folder("mine") == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert results.base_folder("~/mine") == tmp_path / "mine"


def test_a_null_without_a_reason_is_refused():
    with pytest.raises(ValidationError, match="null without a reason: speedup"):
        a_record(reasons={field: why for field, why in ALL.items() if field != "speedup"})


def test_a_failure_needs_its_reason():
    with pytest.raises(ValidationError, match="status oom without a reason"):
        a_record(status="oom", reasons={})
    assert a_record(status="oom", reason="24 GB are not enough", reasons={}).status == "oom"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_nan_and_no_infinity(value):
    with pytest.raises(ValidationError):
        a_record(perplexity=value)
    with pytest.raises(ValidationError):
        a_record(details={"x": value})


def test_baselines_must_be_there(lesson):
    with pytest.raises(ValueError, match="no record here: fp32"):
        lesson({"bf16": paired()["bf16"]})


def broken(text: str, **changes) -> str:
    return json.dumps(json.loads(text) | changes)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read as results"),
        (lambda text: broken(text, schema=7), "schema"),
        (lambda text: broken(text, schema=1), "of the first edition"),
        (lambda text: broken(text, colour="blue"), "colour"),
        (lambda text: "", "cannot be read as results"),
        (lambda text: "[]", "refused as results"),
        (lambda text: "[" * 100_000, "cannot be read as results"),
    ],
)
def test_a_damaged_file_is_named_and_kept_aside(lesson, capsys, damage, sentence):
    lesson(paired())
    path = lesson.finish()
    damaged = damage(path.read_text())
    path.write_text(damaged)
    with pytest.raises(ValueError, match=r"^02_bfloat16\.json") as error:
        results.read(path)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    found, sentences = results.read_all(lesson.folder)
    assert not found and len(sentences) == 1
    lesson.finish()
    assert path.with_name("02_bfloat16.json.refused-1").read_text() == damaged
    assert "kept as 02_bfloat16.json.refused-1" in capsys.readouterr().out
    assert results.read(path).records == lesson.records


def test_an_interrupted_write_leaves_the_earlier_results(lesson, monkeypatch):
    lesson(paired())
    path = lesson.finish()
    before = path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lesson.finish()
    assert path.read_bytes() == before and not list(path.parent.glob("*.part"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"RESULTS_DIR='.*file/results' cannot be written to"):
        results.check(str(tmp_path / "file" / "results"))


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_parameters_are_whole_numbers_of_at_least_one(tmp_path, value):
    with pytest.raises(ValueError, match=r"NEW_TOKENS=.* must be a whole number"):
        results.check(str(tmp_path), NEW_TOKENS=value)


def test_files_can_be_read_by_others(lesson):
    lesson.add("fp32", dtype="float32")
    assert stat.S_IMODE(lesson.finish().stat().st_mode) == 0o644


def test_the_exported_schema_is_that_of_the_code():
    path = results.ROOT / "helpers" / "data" / "results.schema.json"
    assert path.read_text() == results.json_schema(), "make schema"
    jsonschema.Draft202012Validator.check_schema(json.loads(path.read_text()))


# ---- what the machine can do


def test_the_best_stable_bandwidth_is_kept_and_only_rises(tmp_path):
    def keep(*samples):
        return results.keep_limits({"bandwidth_samples": list(samples)}, "cpu", tmp_path)

    assert keep(50e9) is None  # one reading: nothing confirms it
    assert keep(40e9, 39e9, 70e9).bandwidth_bytes_per_s == 40e9  # 70 is a freak
    assert keep(30e9, 30e9).bandwidth_bytes_per_s == 40e9
    assert keep(44e9, 43e9).bandwidth_bytes_per_s == 44e9
    kept = results.keep_limits({"flops_per_s": {"float32": 1e11}}, "cpu", tmp_path)
    assert kept.flops_per_s == {"float32": 1e11} and kept.bandwidth_bytes_per_s == 44e9
    assert results.read_limits(tmp_path).devices["cpu"] == kept


def test_limits_are_begun_anew_when_torch_changes(tmp_path):
    results.keep_limits({"bandwidth_samples": [40e9, 40e9]}, "cpu", tmp_path)
    path = tmp_path / "machine.json"
    path.write_text(broken(path.read_text(), torch="0.1"))
    kept = results.keep_limits({"bandwidth_samples": [30e9, 30e9]}, "cpu", tmp_path)
    assert kept.bandwidth_bytes_per_s == 30e9


def limits_of(kind: str, **ceilings) -> results.MachineLimits:
    limits = results.MachineLimits(hardware="h", torch="t")
    limits.devices[kind] = results.Ceilings(
        bandwidth_bytes_per_s=100.0, bandwidth_spread=0.0, bandwidth_readings=2, **ceilings
    )
    return limits


def test_of_limit_is_the_same_for_the_same_bytes_per_second():
    rows = [
        a_record(id="a", step_bytes=10, decode_tokens_per_s=5.0),
        a_record(id="b", step_bytes=40, decode_tokens_per_s=10.0, batch_size=8),
        a_record(id="c", device="cuda", step_bytes=10, decode_tokens_per_s=5.0),
    ]
    frame = results.frame(rows, limits_of("cpu"))
    assert frame["limit_share"].tolist()[:2] == [0.5, 0.5] and frame["limit_share"].isna()[2]
    assert frame["limit_tokens_per_s"].tolist()[:2] == [10.0, 20.0]


def test_launches_are_the_limit_where_they_take_longer_than_the_bytes():
    step = {"device": "cuda:0", "step_bytes": 10, "decode_tokens_per_s": 2.0}
    rows = [
        a_record(id="eager", launches=500, **step),
        a_record(id="graph", launches=1, **step),
        a_record(id="unknown", **step),
    ]
    frame = results.frame(rows, limits_of("cuda", launch_s=5e-4))
    assert frame["limit_tokens_per_s"].tolist() == [4.0, 10.0, 10.0]
    assert frame["limit_share"].tolist() == [0.5, 0.2, 0.2]


def test_no_committed_row_is_above_its_ceiling():
    folders = list((results.ROOT / "notebooks" / "results").glob("*/*/"))
    assert folders
    for folder in folders:
        limits = results.read_limits(folder.parent)
        lessons, sentences = results.read_all(folder)
        assert lessons and not sentences
        for lesson in lessons.values():
            shares = results.frame(lesson.records, limits)["limit_share"].dropna()
            spread = limits.devices["cpu"].bandwidth_spread
            assert (shares <= 1 + spread).all()


def test_a_table_shows_failures_and_memory_above_the_start():
    rows = [
        a_record(peak_bytes=5 * 10**9, resident_before_bytes=10**9, load_peak_bytes=7 * 10**9),
        a_record(id="x", variant="x", status="oom", reason="no room", reasons={}),
    ]
    table = results.table(rows)
    assert table.loc["fp32", "running GB"] == "4.00" and table.loc["fp32", "loading GB"] == "6.00"
    assert table.loc["x", "note"] == "oom: no room"


def test_each_detail_is_declared_with_its_type():
    for path in sorted((results.ROOT / "notebooks" / "results").glob("*/*/[0-9]*.json")):
        assert declared.undeclared_details(results.read(path).records) == []


@pytest.mark.parametrize(
    ("technique", "details", "problem"),
    [
        ("bfloat16", {"nativ": True}, "bfloat16: nativ is not declared"),
        ("bfloat16", {"native": 1.0}, "bfloat16: native is 1.0, not bool"),
        ("bfloat16", {"compute_flops_per_s": True}, "is True, not float"),
        ("adapters", {"train_s": [1, "2"]}, "is [1, '2'], not float"),
        ("adapters", {"nll_against_lora": 0.1, "merge_s": [1.0]}, None),
        ("bfloat16", {"nll_against_lora": 0.1}, "nll_against_lora is not declared"),
        ("an_eighth", {"anything": "goes"}, None),
    ],
)
def test_details_that_no_table_knows_are_found(technique, details, problem):
    problems = declared.undeclared_details([a_record(technique=technique, details=details)])
    if problem is None:
        assert problems == []
    else:
        assert problem in problems[0]


def test_a_variant_that_does_not_fit_is_a_row_with_both_numbers(lesson):
    def too_large():
        raise MemoryError("needs 28.5 GB, 22.1 GB are there")

    assert not lesson.add_peak("fp32", timing.Variant(too_large, len))
    row = results.read(lesson.partial).records[0]
    assert (row.status, row.reason) == ("oom", "needs 28.5 GB, 22.1 GB are there")
    assert lesson.add_peak("small", timing.Variant(list, len))
    assert results.read(lesson.partial).records[1].peak_bytes > 0


def test_the_highest_bandwidth_is_that_of_the_machine(lesson):
    assert math.isnan(lesson.bandwidth())
    lesson.keep_limits(bandwidth_samples=[40e9, 39.5e9, 10e9])
    assert lesson.bandwidth() == 40e9
    lesson.common["device"] = "cuda"  # of which this machine has no stable reading yet
    assert math.isnan(lesson.bandwidth())


def test_a_step_does_not_read_what_is_only_looked_up(lesson):
    lesson.unread_bytes = 300
    lesson.add("fp32", weight_bytes=1000, kv_cache_bytes=50)
    lesson.add("half", weight_bytes=500, kv_cache_bytes=50, unread_bytes=150)
    assert [record.step_bytes for record in lesson.records] == [750, 400]


# ---- names that would be obeyed


@pytest.mark.parametrize(
    "name",
    [
        "=cmd|' /C calc'!A0",
        "@SUM(A1)",
        "<script>alert(1)</script>",
        "../../x",
        "a\nb",
        "a|b",
        "\\input x",
    ],
)
@pytest.mark.parametrize(
    "field", ["technique", "id", "variant", "engine", "model", "dtype", "slug"]
)
def test_a_file_with_a_name_that_would_be_obeyed_is_refused(lesson, field, name):
    lesson.add("fp32", dtype="float32")
    content = json.loads(lesson.finish().read_text())
    holder = content["machine"] if field == "slug" else content["records"][0]
    holder[field] = name
    lesson.path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is refused as results") as refusal:
        results.read(lesson.path)
    assert f"{field}: String should match pattern" in str(refusal.value)


@pytest.mark.parametrize("field", ["weight_bytes", "peak_bytes", "world_size", "batch_size"])
def test_a_count_that_no_machine_can_hold_is_refused(lesson, field):
    """Tables hold counts in 64 bits."""
    lesson.add("fp32", dtype="float32")
    content = json.loads(lesson.finish().read_text())
    content["records"][0][field] = 10**400
    lesson.path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"is refused as results.*{field}"):
        results.read(lesson.path)


def test_what_others_say_is_plain_in_a_table():
    """An error's words may hold anything; a row is kept for it all the same."""
    words = "<script>alert(1)</script> | `x` \\input{y}\nend"
    row = a_record(id="a", variant="a", status="failed", reason=words, warnings=["<b> | c"])
    note = results.table([row]).iloc[0]["note"]
    assert "failed: ‹script›alert(1)‹/script› ¦ 'x' /input{y} end; ‹b› ¦ c" == note
    (line,) = results.table([row])[["note"]].to_markdown().splitlines()[2:]
    assert line.count("|") == 3


def test_a_model_s_folder_may_have_any_name(tiny_llama, tmp_path):
    folder = tmp_path / "=a <b>|é"
    shutil.copytree(tiny_llama, folder)
    lesson = results.open(
        "02_bfloat16", str(folder), {}, device="cpu", seed=0, results_dir=str(tmp_path)
    )
    lesson.add("fp32", dtype="float32")
    (record,) = results.read(lesson.finish()).records
    assert record.model == "a ‹b›¦é"
