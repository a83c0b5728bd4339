"""results and schema: round trips, refusals, nothing lost."""

import json
import os
import stat

import jsonschema
import pytest
from pydantic import ValidationError

from helpers import results, schema, timing

ALL = results.null("not measured", *schema.NULLABLE)


def a_record(**fields) -> schema.Record:
    return schema.Record(
        **{
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
        | fields
    )


def run(seconds: float) -> timing.Generation:
    return timing.Generation(seconds, [seconds / 2, seconds], prompt_tokens=7)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    kept = [
        a_record(),
        a_record(
            id="bf16", baseline="fp32", speedup=1.5, speedup_ci95=(1.4, 1.6), latency_s=[1, 2]
        ),
    ]
    path = results.save("02_bfloat16", kept, {"REPEATS": 3}, str(tmp_path))
    found = results.load(path)
    assert found.records == kept and found.run.parameters == {"REPEATS": 3}
    assert path.parent.name == found.machine.slug and not list(path.parent.glob(".*"))
    assert json.loads(path.read_text())["schema"] == 1


def test_a_record_is_put_together_from_what_was_measured():
    base = timing.Series(runs=[run(2.0), run(2.2)], warmup=[run(3.0)])
    fast = timing.Series(runs=[run(1.0), run(1.1)])
    record = results.record(
        "bfloat16",
        "bf16",
        "auto",
        series=fast,
        baseline="fp32",
        baseline_series=base,
        weight_bytes=100,
        kv_cache_bytes=0,
        bandwidth=1000.0,
        dtype="bfloat16",
        device="cpu",
        reasons=results.null("not measured", *schema.QUALITY),
    )
    assert record.speedup == pytest.approx(2.0) and [p.baseline_s for p in record.pairs] == [
        2.0,
        2.2,
    ]
    assert record.limit_tokens_per_s == 10 and record.tokens_per_s == pytest.approx(
        2 / 1.05, rel=0.01
    )
    assert record.reasons["perplexity"] == "not measured" and "speedup" not in record.reasons


def test_a_null_without_a_reason_is_refused():
    with pytest.raises(ValidationError, match="null without a reason: speedup"):
        a_record(reasons={k: v for k, v in ALL.items() if k != "speedup"})


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


def test_ids_and_baselines_must_fit(tmp_path):
    with pytest.raises(ValidationError, match="not unique"):
        results.save("x", [a_record(), a_record()], {}, str(tmp_path))
    with pytest.raises(ValidationError, match="no record here: fp16"):
        results.save("x", [a_record(baseline="fp16")], {}, str(tmp_path))
    assert not list(tmp_path.rglob("*.json"))


def broken(text: str, **changes) -> str:
    content = json.loads(text)
    content.update(changes)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "EOF"),
        (lambda text: broken(text, schema=7), "schema"),
        (lambda text: broken(text, colour="blue"), "colour"),
        (lambda text: "", "EOF"),
    ],
)
def test_a_damaged_file_is_named_kept_aside_and_the_others_go_on(tmp_path, capsys, damage, said):
    good = results.save(
        "01_mixed_precision", [a_record(technique="mixed_precision")], {}, str(tmp_path)
    )
    bad = results.save("02_bfloat16", [a_record()], {}, str(tmp_path))
    bad.write_text(damage(bad.read_text()))
    text = bad.read_text()
    with pytest.raises(ValueError, match=r"02_bfloat16\.json is refused") as error:
        results.load(bad)
    assert said in str(error.value) and "\n" not in str(error.value)
    found, problems = results.load_all(str(tmp_path))
    assert list(found) == [good.stem] and len(problems) == 1
    results.save("02_bfloat16", [a_record()], {}, str(tmp_path))
    assert bad.with_name("02_bfloat16.json.refused-1").read_text() == text
    assert "kept as 02_bfloat16.json.refused-1" in capsys.readouterr().out
    assert results.load(bad).records == [a_record()]


def test_an_interrupted_write_leaves_the_earlier_results(tmp_path, monkeypatch):
    path = results.save("02_bfloat16", [a_record()], {}, str(tmp_path))
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        results.save("02_bfloat16", [a_record(seed=1)], {}, str(tmp_path))
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"RESULTS_DIR='.*file/results' cannot be written to"):
        results.check(str(tmp_path / "file" / "results"))
    if os.geteuid():  # root may write anywhere
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(ValueError, match="cannot be written to"):
            results.check(str(tmp_path))


@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True])
def test_counts_must_be_positive_whole_numbers(tmp_path, value):
    with pytest.raises(ValueError, match=r"NEW_TOKENS=.* must be a whole number of at least 1"):
        results.check(str(tmp_path), NEW_TOKENS=value)


def test_the_exported_schema_is_the_code_s_and_accepts_what_is_saved(tmp_path):
    exported = (results.ROOT / "helpers" / "data" / "results.schema.json").read_text()
    assert exported == schema.json_schema(), "python -c 'from helpers import schema; ...' anew"
    path = results.save("02_bfloat16", [a_record()], {}, str(tmp_path))
    content = json.loads(path.read_text())
    jsonschema.validate(content, json.loads(exported))
    content["records"][0]["colour"] = "blue"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, json.loads(exported))


def test_a_frame_tells_headline_rows_and_engines():
    rows = [
        a_record(),
        a_record(id="bf16", baseline="fp32", engine="vllm"),
        a_record(id="s", sweep="batch_size"),
        a_record(id="r", world_size=2),
        a_record(id="g", world_size=2, device="cuda"),
    ]
    frame = results.frame(rows)
    assert frame["headline"].tolist() == [True, True, False, False, True]
    assert frame["same_engine"].tolist() == [True, False, True, True, True]
