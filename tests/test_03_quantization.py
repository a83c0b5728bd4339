"""Lesson 03: bytes as predicted, the twin's function, GGUF read back, SmoothQuant's equivalence,
round trips.
"""

import copy
import functools
import os
import types
from pathlib import Path

import gguf
import psutil
import pytest
import torch

import helpers
from helpers import machine, memory, models, timing
from helpers.workers import engine_process

LESSON = "03_quantization"
TORCH = ["fp32", "int8", "int8-threshold-0", "nf4", "nf4-dq", "fp4"]
LADDER = ["llamacpp-f32", "llamacpp-f16", "llamacpp-q8", "llamacpp-q4"]


@pytest.fixture(scope="module")
def lesson(definitions):
    return definitions(LESSON)


def written(lesson, model, path, bits, prompt):
    file, type_of = lesson["gguf_03"], functools.partial(lesson["gguf_type"], bits=bits)
    return file.write(file.pack(model, type_of), model, path, prompt)


def by_variant(found):
    return {r.variant: r for r in found.records}


# ---- by hand


def test_int8_by_hand_is_exact_on_its_grid(lesson):
    codes = torch.tensor([-127, -3, 0, 64, 127])
    q, scale = lesson["absmax_int8"](codes * 0.5)
    assert q.tolist() == codes.tolist() and scale == 0.5
    x = torch.arange(256) * 0.25 + 8.0  # all values of an asymmetric grid
    q, scale, zero = lesson["zero_point_int8"](x)
    assert torch.equal((q - zero) * scale, x) and len(set(q.tolist())) == 256


def test_the_zero_point_pays_on_one_side_of_zero(lesson):
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 1
    q, scale = lesson["absmax_int8"](x)
    z, step, zero = lesson["zero_point_int8"](x)
    assert ((z - zero) * step - x).abs().max() < (q * scale - x).abs().max() / 2


def test_small_blocks_contain_an_outlier(lesson):
    x = torch.randn(512, generator=torch.Generator().manual_seed(0))
    x[7] = 60
    assert lesson["relative_error"](x, 32) < lesson["relative_error"](x, 512) / 2


def test_nf4_by_hand_is_what_bitsandbytes_does(lesson):
    functional = lesson["bitsandbytes"].functional
    assert torch.allclose(
        lesson["nf4_levels"](), functional.get_4bit_type("nf4", device="cpu"), atol=1e-6
    )
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    ours = lesson["nf4_by_hand"](w, 64)
    assert torch.allclose(ours, functional.dequantize_4bit(codes, state), atol=1e-6)
    assert torch.allclose(lesson["nf4_by_hand"](ours, 64), ours, atol=1e-6)  # on the grid already
    fp4 = functional.dequantize_4bit(*functional.quantize_4bit(w, blocksize=64, quant_type="fp4"))
    assert (ours - w).square().mean() < 0.8 * (
        fp4 - w
    ).square().mean()  # normal weights are what it is made for


# ---- bytes, the twin, GGUF


@pytest.mark.parametrize(
    "options, scheme",
    [
        ({"load_in_8bit": True}, "int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            "nf4-dq",
        ),
    ],
)
def test_predicted_bytes_are_held(lesson, tiny_llama, options, scheme):
    expected = lesson["predicted_bytes"](models.load(tiny_llama), scheme)
    net = models.load(tiny_llama, quantization_config=lesson["BitsAndBytesConfig"](**options))
    assert memory.weight_bytes(net) == expected


def test_the_twin_computes_the_same_off_the_grid(lesson, tiny_llama):
    net = models.load(tiny_llama)
    with torch.no_grad():
        for p in net.parameters():  # stand on a grid, with norms and biases that are not trivial
            p.copy_((p * 4096).round() / 4096 + (p.ndim == 1) * 0.25)
    twin = lesson["off_grid_twin"](net, seed=1, scale=0.3)
    ids = torch.randint(0, 1000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        here, there = net(ids).logits, twin(ids).logits
    assert torch.allclose(here, there, atol=1e-4 * float(here.abs().max()))
    for name, p in twin.model.layers.named_parameters():
        if p.ndim == 2:
            assert ((p * 4096).round() != p * 4096).float().mean() > 0.9, name
    assert (
        net.model.layers[0].mlp.up_proj.weight * 4096 % 1 == 0
    ).all()  # the original is left alone


def test_other_architectures_have_no_twin(lesson, tiny_falcon):
    with pytest.raises(NotImplementedError, match="falcon"):
        lesson["off_grid_twin"](models.load(tiny_falcon))


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_falcon"])
def test_llamacpp_reads_the_file_back(lesson, request, tmp_path, model):
    folder = request.getfixturevalue(model)
    net = models.load(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():  # stronger layers: else a tiny random model repeats one token
            p.mul_(6 if p.ndim == 2 else 1)
    prompt = torch.tensor([[11, 222, 3333, 44, 5]])
    expected = timing.generate(net, prompt, 12).ids
    path = tmp_path / "f32.gguf"
    written(lesson, net, path, "f32", prompt)
    worker = lesson["Worker"]("llamacpp", path, machine.cores(), 20, 32)  # an exact cache
    found = worker(prompt, 12)
    peak = worker.peak()
    worker.close()
    assert peak.peak_bytes > peak.resident_before_bytes > 0
    assert peak.load_peak_bytes > peak.resident_before_bytes
    assert worker.process.returncode == 0
    assert found.ids == expected and len(set(expected[0])) > 3
    assert found.stamps_s == sorted(found.stamps_s) and found.prompt_tokens == 5


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_an_engine_gets_the_threads_that_torch_takes(lesson, tiny_llama, tmp_path, one_thread):
    """Whatever this machine's cores are: llama.cpp's process then computes with so many."""
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    written(lesson, models.load(tiny_llama), tmp_path / "f32.gguf", "f32", prompt)
    here = {"scratch": types.SimpleNamespace(name=tmp_path), "workers": {}, "prompt": prompt}
    started = []

    def start(*arguments):
        started.append(lesson["Worker"](*arguments))
        return started[0]

    make = types.FunctionType(lesson["llamacpp"].__code__, lesson | here | {"Worker": start})
    make("f32").close()
    engine, _, threads, _ = started[0].process.args[2:]
    assert (engine, threads) == ("llamacpp", "1")


def test_an_engine_that_does_not_answer_is_ended(lesson, monkeypatch, tmp_path):
    monkeypatch.setattr(engine_process, "LIMIT_S", 0.01)  # shorter than any start
    with pytest.raises(NotImplementedError, match=r"did not answer within 0\.01 s"):
        lesson["Worker"]("llamacpp", tmp_path / "none.gguf", 1, 20)
    assert not [
        child
        for child in psutil.Process().children()
        if "engines_03.py" in " ".join(child.cmdline())
    ]


def test_an_engine_imports_the_helpers_that_started_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "of-the-reader")
    script = tmp_path / "engine.py"
    script.write_text("import json, os; print(json.dumps(os.environ['PYTHONPATH']), flush=True)")
    process = engine_process.Process(script)
    process.close()
    above_helpers = Path(helpers.__file__).resolve().parent.parent
    assert process.ready.split(os.pathsep) == [str(above_helpers), "of-the-reader"]


@pytest.mark.parametrize("bits", ["f32", "f16", "q8", "q4"])
def test_files_are_as_large_as_predicted(lesson, tiny_llama, tmp_path, bits):
    net = models.load(tiny_llama)
    path = tmp_path / "x.gguf"
    told = written(lesson, net, path, bits, torch.tensor([[11, 222]]))
    found = gguf.GGUFReader(path).tensors
    assert told == sum(int(t.n_bytes) for t in found) == lesson["predicted_bytes"](net, bits)
    kinds = {t.name: t.tensor_type.name for t in found}
    assert kinds["token_embd.weight"] == {"f32": "F32", "f16": "F16"}.get(bits, "Q8_0")
    assert (
        kinds["blk.0.ffn_down.weight"]
        == {"f32": "F32", "f16": "F16", "q8": "Q8_0", "q4": "Q4_1"}[bits]
    )


def test_rows_are_paired_within_each_head(lesson):
    weight = torch.arange(12).reshape(12, 1).numpy()
    assert lesson["gguf_03"].pair_rows(weight, 2).flatten().tolist() == [
        0,
        3,
        1,
        4,
        2,
        5,
        6,
        9,
        7,
        10,
        8,
        11,
    ]


def test_the_original_grid_flatters_one_scheme(lesson, tiny_llama):
    def there_and_back(model):
        codes = lesson["gguf_03"].pack(model, functools.partial(lesson["gguf_type"], bits="q4"))
        return lesson["gguf_03"].unpack(codes, copy.deepcopy(model))

    net = models.load(tiny_llama)
    once = there_and_back(net)
    twice = there_and_back(once)
    change = [
        float((a - b).detach().abs().max())
        for a, b in zip(once.parameters(), twice.parameters(), strict=True)
    ]
    first = max(
        float((a - b).detach().abs().max())
        for a, b in zip(net.parameters(), once.parameters(), strict=True)
    )
    assert max(change) < first / 20


# ---- going deeper


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_falcon"])
def test_smoothing_changes_no_output(lesson, request, model):
    net = models.load(request.getfixturevalue(model))
    ids = torch.randint(0, 1000, (1, 32), generator=torch.Generator().manual_seed(0))
    largest, moment = lesson["observe"](net, ids, moments=True)
    assert lesson["observe"](net, ids)[1] == {} and moment
    smooth = lesson["smoothed"](net, largest, 0.5)
    with torch.no_grad():
        assert torch.allclose(smooth(ids).logits, net(ids).logits, atol=1e-4)
    readers = {name for _, group in lesson["after_norms"](net) for name in group}
    moved = dict(smooth.named_modules())
    assert all(
        not torch.equal(moved[n].weight, m.weight) for n, m in net.named_modules() if n in readers
    )
    for name, m in moment.items():
        assert m.shape == (len(largest[name]),) * 2, name


def test_kept_weights_stay_and_do_not_widen_the_grid(lesson):
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    w[2, 5] = 50
    keep = lesson["most"](w.abs(), 0.01)
    plain, kept = (lesson["round_to_nearest"](w, 3, 32, k) for k in (None, keep))
    assert keep.sum() == 5 and torch.equal(kept[keep], w[keep])
    rest = ~keep
    assert (kept - w)[rest].square().mean() < (plain - w)[rest].square().mean() / 2


def test_rounding_is_exact_on_its_grid(lesson):
    w = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(0)) * 0.125 - 1
    w[:, ::32], w[:, 1::32] = -1, 0.875  # each group spans the grid
    assert torch.equal(lesson["round_to_nearest"](w, 4, 32), w)


def test_straight_through_passes_the_gradient(lesson):
    w = torch.tensor([[0.2, -1.4]], requires_grad=True)
    lesson["on_grid"](w, torch.tensor([[1.0]])).sum().backward()
    assert w.grad.tolist() == [[1, 1]]


# ---- the whole lesson


def check_records(found, twin: bool):
    kept = by_variant(found)
    assert {*TORCH, *LADDER, "openvino-4bit", "torchao-int8"} <= set(kept)
    for name in TORCH + LADDER:
        assert kept[name].status == "ok", kept[name].reason
        assert kept[name].weight_bytes == kept[name].details["predicted_weight_bytes"], name
    assert {kept[n].baseline for n in LADDER[1:]} == {"llamacpp-f32"}
    for name in LADDER[1:]:
        assert {pair.baseline for pair in kept[name].pairs} == {"llamacpp-f32"}, name
        theirs = [pair.baseline_s for pair in kept[name].pairs]
        assert theirs == kept["llamacpp-f32"].latency_s, name
    assert [pair.baseline_s for pair in kept["nf4"].pairs] == kept["fp32"].latency_s
    assert "rebuilt" in kept["llamacpp-q4"].scored_with
    assert kept["llamacpp-f32"].details["same_text_as_fp32"]
    assert kept["nf4-dq"].weight_bytes != kept["nf4"].weight_bytes < kept["int8"].weight_bytes
    assert {r.engine for n, r in kept.items() if n in LADDER} == {"llama.cpp"}
    assert kept["nf4"].details["scored_on"] == ("off-grid twin" if twin else "the model itself")
    assert kept["llamacpp-f32"].peak_bytes >= kept["llamacpp-f32"].weight_bytes
    steps = [r for r in found.records if r.sweep == "batch_size"]
    assert {r.batch_size for r in steps} == set(found.run.parameters["BATCH_SIZES"])
    assert all(
        r.details["dequantize_s"] + r.details["fused_s"] > 0
        for r in steps
        if r.variant.startswith("nf4") and r.device == "cpu"
    )
    assert kept["deep-fp32"].details["smoothing_logit_change"] < 1e-2
    assert all(r.reason for r in found.records if r.status != "ok")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_falcon"])
def test_lesson_runs_on_other_architectures(run_lesson, request, model):
    found = run_lesson(LESSON, MODEL=request.getfixturevalue(model))
    check_records(found, twin=model == "tiny_llama")
    assert by_variant(found)["openvino-4bit"].status == "unsupported"


def test_lesson_on_the_default_model(run_lesson):
    found = run_lesson(LESSON)
    check_records(found, twin=True)
    kept = by_variant(found)
    quality = functools.partial(lambda name: kept[name].nll_delta)
    assert (
        abs(kept["llamacpp-q4"].details["original_nll_delta"]) < 1e-3 < quality("llamacpp-q4")
    )  # the old grid
    assert quality("llamacpp-q8") < min(quality("nf4"), quality("fp4"))
    assert quality("rtn4-g32") < quality("rtn3-g32") and quality("rtn3-g32-sensitive") < quality(
        "rtn3-g32"
    )
    assert kept["nf4"].weight_bytes < kept["fp32"].weight_bytes / 3
