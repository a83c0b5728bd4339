"""Lesson 03: int8 and NF4 by hand, bytes as predicted, the twin's function, where a step's time
goes, GGUF read back; rounding rules of its deeper notebooks.
"""

import copy
import os

import gguf
import psutil
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import helpers
from helpers import limits, machine, memory, models, timing
from helpers.series import planner
from helpers.workers import engine_process, engines_03_client, gguf_03, profile_03, twin_03

LESSON = "03_quantization"
TORCH = ["fp32", "fp16", "bf16", "int8", "int8-threshold-0", "nf4", "fp4"]
LADDER = ["llamacpp-f32", "llamacpp-f16", "llamacpp-q8", "llamacpp-q4"]


@pytest.fixture(scope="module")
def lesson(definitions):
    return definitions(LESSON)


@pytest.fixture(scope="module")
def schemes(definitions):
    return definitions("deeper/03_schemes")


def by_variant(found):
    return {record.variant: record for record in found.records}


def random_matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- by hand


def test_int8_by_hand_is_exact_on_its_grid(lesson):
    grid = torch.tensor([[-127.0, -3, 0, 64, 127], [127, 1, 2, 3, 4]])
    size = torch.tensor([[0.5], [0.25]])
    codes, scale = lesson["by_row"](grid * size)
    assert torch.equal(codes, grid) and torch.equal(scale, size)


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_llm_int8_by_hand_is_what_bitsandbytes_does(lesson, threshold):
    x, weight = random_matrix(5, 64), random_matrix(48, 64, seed=1)
    x[:, [3, 40]] *= 30
    functional = lesson["bitsandbytes"].functional
    codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
    x_codes, x_scale, outliers = functional.int8_vectorwise_quant(x.half(), threshold)
    theirs, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
        x, x_codes, codes, x_scale, scale, outliers, None
    )
    ours = lesson["llm_int8"](x.half().float(), weight.half().float(), threshold)
    assert torch.allclose(ours, theirs, atol=2e-3 * float(theirs.abs().max()))
    exact = x @ weight.T
    other = lesson["llm_int8"](x, weight, 6.0 - threshold)
    # the two thresholds differ by more than the tolerance above
    assert (other - ours).abs().max() > 5e-3 * float(exact.abs().max())


def test_nf4_by_hand_is_what_bitsandbytes_does(lesson):
    functional = lesson["bitsandbytes"].functional
    levels = functional.get_4bit_type("nf4", device="cpu")
    assert torch.allclose(lesson["nf4_levels"](), levels, atol=1e-6)
    weight = random_matrix(64, 128)
    packed = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = lesson["nf4_by_hand"](weight, 64)
    assert torch.allclose(ours, functional.dequantize_4bit(*packed), atol=1e-6)
    assert torch.allclose(lesson["nf4_by_hand"](ours, 64), ours, atol=1e-6)  # on the grid already
    fp4 = functional.quantize_4bit(weight, blocksize=64, quant_type="fp4")
    of_fp4 = (functional.dequantize_4bit(*fp4) - weight).square().mean()
    assert (ours - weight).square().mean() < 0.8 * of_fp4  # normal weights: NF4 is made for them


def test_small_blocks_contain_an_outlier(lesson):
    weight = random_matrix(1, 512)
    weight[0, 7] = 60
    errors = []
    for block in (32, 512):
        errors.append((lesson["nf4_by_hand"](weight, block) - weight).square().mean())
    assert errors[0] < errors[1] / 2


# ---- bytes, the twin


EIGHT = {"load_in_8bit": True}
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (EIGHT, "int8"),
        (EIGHT | {"llm_int8_threshold": 0.0}, "int8-threshold-0"),
        (FOUR, "nf4"),
        (FOUR | {"bnb_4bit_use_double_quant": True}, "nf4-dq"),
        (FOUR | {"bnb_4bit_quant_type": "fp4"}, "fp4"),
    ],
)
def test_predicted_bytes_are_held(lesson, tiny_llama, options, name):
    expected = lesson["predicted_bytes"](planner.describe(tiny_llama), name)
    config = lesson["BitsAndBytesConfig"](**options)
    model = models.load(tiny_llama, torch.bfloat16, quantization_config=config)
    assert memory.weight_bytes(model) == expected


def test_four_bits_are_counted_and_profiled_after_a_run(lesson, tiny_llama):
    """Whether bitsandbytes has repacked its codes at the first forward or not."""
    config = lesson["BitsAndBytesConfig"](**FOUR, bnb_4bit_compute_dtype=torch.bfloat16)
    model = models.load(tiny_llama, torch.bfloat16, quantization_config=config)
    before = memory.weight_bytes(model)
    timing.generate(model, torch.tensor([[5, 6, 7]]), 2)
    after = memory.weight_bytes(model)
    embedding = model.get_input_embeddings().weight
    assert embedding.nbytes < after <= before
    assert limits.decode_bytes(model) == after  # the tied head is read whole
    codes = sum(p.numel() for p in model.parameters()) - embedding.numel()
    assert after - embedding.nbytes > codes / 2 * 0.9
    parts, operators = profile_03.step_parts(model)
    assert min(parts["head"], parts["matrices"], parts["rest"]) > 0
    assert operators.sum() == pytest.approx(parts["head"] + parts["matrices"])


def test_the_twin_computes_the_same_off_the_grid(tiny_llama):
    model = models.load(tiny_llama)
    with torch.no_grad():
        for p in model.parameters():  # on a grid, with norms that are not trivial
            on_grid = (p * 4096).round() / 4096
            p.copy_(on_grid + 0.25 if p.ndim == 1 else on_grid)
    twin = twin_03.off_grid_twin(model, seed=1, scale=0.3)
    ids = torch.randint(0, 1000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        here, there = model(ids).logits, twin(ids).logits
    assert torch.allclose(here, there, atol=1e-4 * float(here.abs().max()))
    for name, p in twin.model.layers.named_parameters():
        if p.ndim == 2:
            assert ((p * 4096).round() != p * 4096).float().mean() > 0.9, name
    original = model.model.layers[0].mlp.up_proj.weight
    assert (original * 4096 % 1 == 0).all()  # it is left alone


def test_other_architectures_have_no_twin(tiny_falcon):
    with pytest.raises(NotImplementedError, match="falcon"):
        twin_03.off_grid_twin(models.load(tiny_falcon))


# ---- where a step's time goes


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=128, n_positions=64)
    return GPT2LMHeadModel(config).eval()


def opt() -> OPTForCausalLM:
    config = OPTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=2,
        vocab_size=128,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    )
    return OPTForCausalLM(config).eval()


@pytest.mark.parametrize("make", [gpt2, opt])
def test_a_step_is_taken_apart(make):
    """Convolutions of one dimension, as GPT-2 has them, are matrices too."""
    parts, operators = profile_03.step_parts(make())
    assert set(parts) == {"whole", "head", "matrices", "rest"} and min(parts.values()) > 0
    for part in ("head", "matrices"):
        spent = operators[operators.index.str.startswith(part)]
        assert spent.sum() == pytest.approx(parts[part])
        assert spent.index.str.contains("mm|linear").any()


def test_a_large_head_is_seen_in_its_part():
    """Ten thousand words on two narrow layers: nearly all products are the head's."""
    config = GPT2Config(n_embd=256, n_layer=1, n_head=2, vocab_size=60_000, n_positions=64)
    parts, _ = profile_03.step_parts(GPT2LMHeadModel(config).eval())
    assert parts["head"] > parts["matrices"]


def test_hooks_are_gone_after_the_profile():
    model = gpt2()
    profile_03.step_parts(model)
    left = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert left == []


def test_the_16_bits_of_a_scheme_are_native_or_measured(monkeypatch):
    def native(float16: bool, bfloat16: bool):
        return lambda device: {"float16": float16, "bfloat16": bfloat16}

    monkeypatch.setattr(machine, "native_dtypes", native(True, True))
    assert profile_03.native_16_bit("cpu") == "bf16"
    monkeypatch.setattr(machine, "native_dtypes", native(True, False))
    assert profile_03.native_16_bit("cpu") == "fp16"
    monkeypatch.setattr(machine, "native_dtypes", native(False, False))
    seconds = iter([2.0, 1.0])  # of fp16, then of bf16
    monkeypatch.setattr(limits, "best_seconds", lambda work, device: next(seconds))
    assert profile_03.native_16_bit("cpu") == "bf16"


# ---- GGUF and llama.cpp


def written(lesson, model, path, bits, prompt) -> int:
    type_of = lesson["type_of"](f"llamacpp-{bits}")
    return gguf_03.write(gguf_03.pack(model, type_of), model, path, prompt)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_falcon"])
def test_llamacpp_reads_the_file_back(lesson, request, tmp_path, model):
    net = models.load(request.getfixturevalue(model))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():  # stronger layers: else a tiny random model repeats one token
            p.mul_(6 if p.ndim == 2 else 1)
    prompt = torch.tensor([[11, 222, 3333, 44, 5]])
    expected = timing.generate(net, prompt, 12).ids
    path = tmp_path / "f32.gguf"
    written(lesson, net, path, "f32", prompt)
    worker = engines_03_client.Worker("llamacpp", path, machine.cores(), 20, 32)  # an exact cache
    generation = worker(prompt, 12)
    peak = worker.peak()
    worker.close()
    assert peak.peak_bytes > peak.resident_before_bytes > 0
    assert peak.load_peak_bytes > peak.resident_before_bytes
    assert worker.process.returncode == 0
    assert generation.ids == expected and len(set(expected[0])) > 3
    assert generation.stamps_s == sorted(generation.stamps_s) and generation.prompt_tokens == 5


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_an_engine_gets_the_threads_that_torch_takes(lesson, tiny_llama, tmp_path, one_thread):
    """Whatever this machine's cores are: llama.cpp's process then computes with so many."""
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    model, type_of = models.load(tiny_llama), lesson["type_of"]("llamacpp-f32")
    worker = engines_03_client.serve(model, type_of, str(tmp_path), "f32", prompt, 4)
    worker.close()
    engine, _, threads, tokens = worker.process.args[2:]
    assert (engine, threads, tokens) == ("llamacpp", "1", "9")
    assert worker.file_bytes == memory.weight_bytes(model)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_cache_of_few_bits_still_generates(lesson, tmp_path, bits):
    """Blocks of 32: no head may be smaller."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    path = tmp_path / "q8.gguf"
    written(lesson, LlamaForCausalLM(config).eval(), path, "q8", prompt)
    worker = engines_03_client.Worker("llamacpp", path, 1, 20, bits)
    generation = worker(prompt, 6)
    worker.close()
    assert generation.new_tokens == 6


def test_rows_are_held_against_a_rival_of_their_rounds():
    def runs(*latency_s: float) -> timing.Series:
        return timing.Series(runs=[timing.Generation(s, [s], 1, 1, [[1]]) for s in latency_s])

    series = {"f16": runs(2, 4), "q8": runs(1, 2), "q4": runs(), "q2": runs(4, 8)}
    over = engines_03_client.over(series, "f16", ["q8", "q4", "q1"])
    assert {name: gain.value for name, gain in over.items()} == {"q8": pytest.approx(2)}
    assert over["q8"].verdict == "faster"
    assert engines_03_client.over(series, "q4", ["q8"]) == {}
    assert engines_03_client.over(series, None, ["q8"]) == {}


def test_a_further_rung_is_one_entry(lesson, tiny_llama, tmp_path, monkeypatch):
    """As exercise 1 asks for it."""
    monkeypatch.setitem(lesson["LADDER"], "llamacpp-q5", "Q5_0")
    net = models.load(tiny_llama)
    nbytes = written(lesson, net, tmp_path / "q5.gguf", "q5", torch.tensor([[11, 222]]))
    assert nbytes == lesson["predicted_bytes"](planner.describe(tiny_llama), "llamacpp-q5")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "q5.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == kinds["token_embd.weight"] == "Q5_0"


def test_llamacpp_computes_on_the_cpu_where_the_lesson_does():
    assert engines_03_client.place("cpu") == "cpu"


def test_an_engine_that_does_not_answer_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(engine_process, "LIMIT_S", 0.01)  # shorter than any start
    with pytest.raises(NotImplementedError, match=r"did not answer within 0\.01 s"):
        engines_03_client.Worker("llamacpp", tmp_path / "none.gguf", 1, 20)
    children = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    assert not [command for command in children if "engines_03.py" in command]


def test_an_engine_imports_the_helpers_that_started_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "of-the-reader")
    script = tmp_path / "engine.py"
    script.write_text("import json, os; print(json.dumps(os.environ['PYTHONPATH']), flush=True)")
    process = engine_process.Process(script)
    process.close()
    above_helpers = os.path.dirname(os.path.dirname(os.path.realpath(helpers.__file__)))
    assert process.ready.split(os.pathsep) == [above_helpers, "of-the-reader"]


@pytest.mark.parametrize("bits", ["f32", "f16", "q8", "q4"])
def test_files_are_as_large_as_predicted(lesson, tiny_llama, tmp_path, bits):
    net = models.load(tiny_llama)
    path = tmp_path / "x.gguf"
    nbytes = written(lesson, net, path, bits, torch.tensor([[11, 222]]))
    tensors = gguf.GGUFReader(path).tensors
    name = f"llamacpp-{bits}"
    assert nbytes == sum(int(tensor.n_bytes) for tensor in tensors)
    assert nbytes == lesson["predicted_bytes"](planner.describe(tiny_llama), name)
    assert nbytes == gguf_03.packed_bytes(net, lesson["type_of"](name))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    matrix = {"f32": "F32", "f16": "F16", "q8": "Q8_0", "q4": "Q4_1"}
    assert kinds["blk.0.ffn_down.weight"] == matrix[bits]
    assert kinds["token_embd.weight"] == (matrix | {"q4": "Q8_0"})[bits]


def test_an_untied_embedding_is_in_the_file_and_not_read(lesson):
    shape, type_of = planner.describe("llama-2-7b"), lesson["type_of"]("llamacpp-q8")
    whole, read = (gguf_03.file_bytes(shape, type_of, read=read) for read in (False, True))
    assert whole - read == 32_000 * 4096 // 32 * 34


def test_a_file_without_room_is_refused_before_it_is_made(tmp_path):
    with pytest.raises(MemoryError, match="GB of memory"):
        gguf_03.check_room(10**15, tmp_path)


def test_rows_are_paired_within_each_head():
    weight = torch.arange(12).reshape(12, 1).numpy()
    paired = gguf_03.pair_rows(weight, 2).flatten().tolist()
    assert paired == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def change(one, other) -> float:
    """Largest difference of a parameter."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def test_the_original_grid_flatters_one_scheme(lesson, tiny_llama):
    type_of = lesson["type_of"]("llamacpp-q4")
    model = models.load(tiny_llama)
    once = gguf_03.rebuild(copy.deepcopy(model), type_of)
    twice = gguf_03.rebuild(copy.deepcopy(once), type_of)
    assert change(once, twice) < change(model, once) / 20


# ---- deeper: which schemes survive


def test_straight_through_passes_the_gradient(schemes):
    w = torch.tensor([[0.2, -1.4]], requires_grad=True)
    schemes["on_grid"](w, torch.tensor([[1.0]])).sum().backward()
    assert w.grad.tolist() == [[1, 1]]


def test_rounding_is_exact_on_its_grid(schemes):
    w = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(0)) * 0.125 - 1
    w[:, ::32], w[:, 1::32] = -1, 0.875  # each group spans the grid
    assert torch.equal(schemes["nearest"](w, 4, 32), w)


def correlated(size: int) -> torch.Tensor:
    """The second moment of inputs that vary in fewer directions than they have channels."""
    directions = random_matrix(size // 4, size, seed=1)
    return directions.T @ directions / size + 0.01 * torch.eye(size)


def test_knowing_the_inputs_errs_less(schemes):
    w, moment = random_matrix(32, 96), correlated(96)

    def error(rounded: torch.Tensor) -> float:
        return schemes["output_error"](rounded - w, moment)

    nearest = error(schemes["nearest"](w, 3, 48))
    assert error(schemes["gptq"](w, moment, 3, 48)) < 0.7 * nearest
    assert error(schemes["awq"](w, moment, 3, 48)) <= nearest


def test_without_correlation_gptq_rounds_to_nearest(schemes):
    w = random_matrix(16, 96)
    moment = torch.diag(torch.linspace(0.5, 2, 96))
    nearest = schemes["nearest"](w, 3, 48)
    assert torch.allclose(schemes["gptq"](w, moment, 3, 48), nearest, atol=1e-5)


def test_kept_weights_stay_and_do_not_widen_the_grid(schemes):
    w = random_matrix(8, 96)
    w[2, 5] = 50
    moment = torch.eye(96)
    plain = schemes["gptq"](w, moment, 3, 96)
    kept = schemes["gptq"](w, moment, 3, 96, apart=0.01)
    assert kept[2, 5] == 50
    rest = torch.arange(96) != 5
    of_plain, of_kept = ((rounded - w)[2, rest].square().mean() for rounded in (plain, kept))
    assert of_kept < of_plain / 2


def test_a_group_kept_whole_has_a_grid_of_nothing(schemes):
    low, step = schemes["grid"](torch.ones(2, 4), 3, torch.ones(2, 4, dtype=torch.bool))
    assert torch.isfinite(low).all() and torch.isfinite(step).all()


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_falcon"])
def test_smoothing_alone_changes_no_output(schemes, request, model):
    """What is divided out of the inputs comes back: on very fine steps the outputs are the same."""
    net = models.load(request.getfixturevalue(model))
    ids = torch.randint(0, 1000, (1, 32), generator=torch.Generator().manual_seed(0))
    largest, moment = schemes["observe"](net, ids)
    layers = schemes["body_linears"](net)
    assert set(largest) == set(moment) == set(layers)
    for name, m in moment.items():
        assert m.shape == (len(largest[name]),) * 2, name
    schemes["largest"] = largest
    smooth = schemes["w8a8"](copy.deepcopy(net), 0.5)
    naive = schemes["w8a8"](copy.deepcopy(net), None)
    with torch.no_grad():
        exact = net(ids).logits
        of_smooth, of_naive = ((m(ids).logits - exact).norm() for m in (smooth, naive))
    assert 0 < of_smooth < 0.1 * exact.norm() and 0 < of_naive < 0.1 * exact.norm()


# ---- deeper: the cache


def test_a_rounded_cache_has_so_many_steps(definitions):
    on_steps = definitions("deeper/03_cache_bits")["on_steps"]
    x = random_matrix(2, 3, 64)
    for bits in (8, 4):
        rounded = on_steps(x, bits)
        codes = rounded.unflatten(-1, (-1, 32))
        steps = codes / codes.abs().amax(-1, keepdim=True) * (2 ** (bits - 1) - 1)
        assert torch.allclose(steps, steps.round(), atol=1e-3)
        assert (rounded - x).abs().max() > 0


# ---- the whole lesson


def check_records(found, twin: bool):
    kept = by_variant(found)
    assert {*TORCH, *LADDER, "nf4-dq"} <= set(kept)
    for name in TORCH + LADDER:
        assert kept[name].status == "ok", kept[name].reason
        assert kept[name].weight_bytes == kept[name].details["predicted_weight_bytes"], name
    if kept["nf4-dq"].status != "ok":
        assert kept["nf4-dq"].status == "unsupported" and "undoes" in kept["nf4-dq"].reason
    assert {kept[name].baseline for name in LADDER[1:]} == {"llamacpp-f32"}
    for name in LADDER[1:]:
        assert {pair.baseline for pair in kept[name].pairs} == {"llamacpp-f32"}, name
        theirs = [pair.baseline_s for pair in kept[name].pairs]
        assert theirs == kept["llamacpp-f32"].latency_s, name
    assert kept["llamacpp-f32"].baseline == "fp32"
    assert [pair.baseline_s for pair in kept["nf4"].pairs] == kept["fp32"].latency_s
    assert "rebuilt" in kept["llamacpp-q4"].scored_with
    assert kept["llamacpp-f32"].details["same_text_as_fp32"]
    assert kept["nf4"].weight_bytes < kept["int8"].weight_bytes < kept["bf16"].weight_bytes
    assert {kept[name].engine for name in LADDER} == {"llama.cpp"}
    assert kept["nf4"].details["scored_on"] == ("off-grid twin" if twin else "the model itself")
    assert kept["nf4"].details["rival"] in ("fp16", "bf16")
    assert kept["llamacpp-f32"].peak_bytes >= kept["llamacpp-f32"].weight_bytes
    for name in ("fp32", "int8", "nf4"):
        assert kept[name].details["step_matrices_s"] > 0, name
    assert all(record.reason for record in found.records if record.status != "ok")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_falcon"])
def test_lesson_runs_on_other_architectures(run_lesson, request, model):
    found = run_lesson(LESSON, MODEL=request.getfixturevalue(model))
    check_records(found, twin=False)


SIZES = {"vocab_size": 49152, "max_position_embeddings": 512, "hidden_size": 64}
DEEP = {"num_hidden_layers": 2, "num_attention_heads": 4}
LAYERS = {
    "qwen2": {"intermediate_size": 128, "num_key_value_heads": 2},
    "gemma": {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16},
    "phi3": {"intermediate_size": 128, "num_key_value_heads": 2},
    "gpt2": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_each_architecture_has_its_rows(run_lesson, tmp_path, kind):
    """As far as a scheme goes; where it does not, a row with its reason."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **DEEP, **LAYERS[kind])
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(models.default_folder()).save_pretrained(tmp_path)
    found = run_lesson(LESSON, MODEL=str(tmp_path))
    rows = by_variant(found)
    assert {*TORCH, *LADDER} <= set(rows)
    assert [r.reason for r in found.records if r.status == "failed"] == []
    for name in TORCH:
        assert rows[name].status == "ok", rows[name].reason
    for name in ("int8", "int8-threshold-0", "nf4", "fp4"):  # a 16-bit row, where it is left alone
        assert rows[name].nll_delta is not None
    for name in LADDER:
        assert rows[name].status == "unsupported" and "GGUF" in rows[name].reason


def test_lesson_on_the_default_model(run_lesson):
    found = run_lesson(LESSON)
    check_records(found, twin=True)
    kept = by_variant(found)
    # the old grid: lossless on the model's own file, not on its twin
    q4 = kept["llamacpp-q4"]
    assert abs(q4.details["original_nll_delta"]) < 1e-3 < q4.nll_delta
    assert kept["llamacpp-q8"].nll_delta < min(kept["nf4"].nll_delta, kept["fp4"].nll_delta)
    assert kept["nf4"].weight_bytes < kept["fp32"].weight_bytes / 3
