"""Lesson 04: what its records say, and what its own functions, and those it tunes with, do on tiny
models.
"""

import math
import re

import nbformat
import numpy as np
import pandas as pd
import peft
import pytest
import torch
from test_results import a_record
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
)
from transformers.models.falcon import modeling_falcon

from helpers import machine, memory, models, quality, results
from helpers.series import checkpoints, claims, domain, parameters, planner, run, tuning

LESSON = "04_adapters"
MANY = "deeper/04_many_adapters"
VARIANTS = "deeper/04_variants"
TRAINED = ["full", "lora", "qlora", "adapter-v2"]
UNTRAINED = ["nf4-dq", "lora-merged", "merged-then-nf4"]
FOUR_BIT = ["nf4-dq", "qlora", "merged-then-nf4"]
KINDS = pytest.mark.parametrize("kind", ["tiny_llama", "tiny_falcon"])
ARTICLES_LINKS = [
    "https://lightning.ai/pages/community/article/understanding-llama-adapters/",
    "https://huggingface.co/blog/4bit-transformers-bitsandbytes",
    "https://lightning.ai/pages/community/finetuning-falcon-efficiently/",
    "https://colab.research.google.com/drive/1BiQiw31DT7-cDp1-0ySXvvhzqomTdI-o",
]


@pytest.fixture(scope="module")
def records(run_lesson):
    return {r.id: r for r in run_lesson(LESSON).records}


@pytest.fixture
def own(definitions):
    """The lesson's names, on the CPU."""
    namespace = definitions(LESSON)
    namespace |= {"device": "cpu", "dtype": torch.float32}  # in place: its functions see them
    return namespace


@pytest.fixture
def lesson(tmp_path):
    return results.open(
        LESSON, "auto", {}, device="cpu", seed=0, results_dir=str(tmp_path / "results")
    )


@pytest.fixture(scope="module")
def tiny_lfm2(tmp_path_factory) -> str:
    """Folder of a tiny random LFM2: two layers of short convolutions, one of attention."""
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        full_attn_idxs=[2],
        max_position_embeddings=512,
    )
    folder = tmp_path_factory.mktemp("tiny-lfm2")
    Lfm2ForCausalLM(config).eval().save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return str(folder)


def with_lora(model):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def trainable(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def some_ids(rows: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 1000, (rows, length), generator=torch.Generator().manual_seed(0))


# ---- the records of a run on the default model


def test_rows_are_weighed_and_scored_and_all_but_full_are_timed(records):
    assert list(records) == ["base", *TRAINED, *UNTRAINED]
    for name, record in records.items():
        assert record.status == "ok" and record.weight_bytes
        assert record.perplexity and "out_of_domain_nll_delta" in record.details
        assert record.step_bytes == record.weight_bytes + record.kv_cache_bytes
        assert record.baseline == (None if name == "base" else "base")
        assert name == "base" or (record.nll_delta_ci95 and record.agreement)
        is_timed = bool(record.speedup and record.pairs and record.peak_bytes)
        assert is_timed == (name not in ("base", "full"))
    assert records["base"].tokens_per_s and records["full"].tokens_per_s is None


def test_training_is_equal_and_its_memory_is_as_predicted_in_order(records):
    details = {name: records[name].details for name in TRAINED}
    assert len({details[name]["train_tokens"] for name in TRAINED}) == 1
    assert len({len(details[name]["train_losses"]) for name in TRAINED}) == 1
    peaks = [details[name]["train_peak_bytes"] for name in ("qlora", "lora", "full")]
    assert peaks == sorted(peaks)
    everything = details["full"]["trainable_parameters"]
    assert (
        details["full"]["train_peak_bytes"] > 16 * everything > details["lora"]["train_peak_bytes"]
    )


def test_trained_numbers_are_those_that_the_planner_counts(records):
    model = planner.describe(models.resolve("auto"))
    numbers = {name: records[name].details["trainable_parameters"] for name in TRAINED}
    assert numbers["full"] == planner.parameters(model)["total"]
    assert numbers["lora"] == numbers["qlora"] == tuning.lora_numbers(model, rank=8)
    assert numbers["adapter-v2"] == tuning.scaled_numbers(model)


def test_a_held_out_text_is_looked_at_on_the_way(records):
    for name in TRAINED:
        steps = records[name].details["heldout_steps"]
        losses = records[name].details["heldout_losses"]
        assert len(losses) == len(steps) == tuning.CHECKS + 1
        assert steps[0] == 0 and steps[-1] == len(records[name].details["train_losses"])
    start = {name: records[name].details["heldout_losses"][0] for name in TRAINED}
    assert start["lora"] == pytest.approx(start["full"], abs=1e-3)  # both begin at the old model
    assert start["adapter-v2"] == pytest.approx(start["full"], abs=1e-3)


def test_adapter_is_small_and_its_file_holds_its_numbers(records):
    for name in TRAINED:
        details = records[name].details
        numbers_bytes = 4 * details["trainable_parameters"]
        assert numbers_bytes <= details["adapter_bytes"] < 1.05 * numbers_bytes + 100_000
        is_small = details["adapter_bytes"] < 0.05 * records["base"].weight_bytes
        assert is_small == (name != "full")


def test_merged_equals_unmerged(records):
    lora, merged = records["lora"], records["lora-merged"]
    assert merged.nll_delta == pytest.approx(lora.nll_delta, abs=1e-4)
    assert merged.weight_bytes == records["base"].weight_bytes < lora.weight_bytes


def test_tuning_lowers_heldout_perplexity(records):
    assert records["full"].perplexity < records["base"].perplexity
    assert records["lora"].perplexity < records["base"].perplexity
    assert records["qlora"].perplexity < records["nf4-dq"].perplexity


def test_rows_are_compared_in_pairs(records):
    for name, other in [("lora", "full"), ("qlora", "nf4-dq"), ("merged-then-nf4", "lora")]:
        details = records[name].details
        gap = records[name].nll_delta - records[other].nll_delta
        assert details[f"nll_against_{other}"] == pytest.approx(gap, abs=1e-9)
        low, high = details[f"nll_against_{other}_ci95"]
        assert low < gap < high


def test_four_bit_weights_are_smaller_and_named_so(records):
    for name in FOUR_BIT:
        assert records[name].weight_bytes < 0.5 * records["base"].weight_bytes
        assert records[name].dtype == "nf4"
    adapter_bytes = 4 * records["qlora"].details["trainable_parameters"]
    assert records["qlora"].weight_bytes - records["nf4-dq"].weight_bytes == adapter_bytes


def test_committed_run_improves_by_a_fifth():
    """In the reference run held-out perplexity falls by a fifth, by the whole of its interval."""
    paths = sorted((results.ROOT / "notebooks" / "results").glob(f"*/*/{LESSON}.json"))
    if not paths:
        pytest.skip("no reference run is committed yet")
    for path in paths:
        lora = next(r for r in results.read(path).records if r.id == "lora")
        assert lora.nll_delta_ci95[1] <= math.log(0.8)


# ---- the article's facts have their place


def test_the_article_s_hours_command_and_links_are_there():
    published = pd.read_csv(planner.DATA / "published.csv").query("technique == 'adapters'")
    hours = published[published["metric"] == "train_time"].set_index("hardware")["value"]
    assert hours.to_dict() == {"8x A100": 0.5, "1x A100": 3.0}
    cells = nbformat.read(run.NOTEBOOKS / f"{LESSON}.ipynb", 4).cells
    text = "\n".join(cell.source for cell in cells)
    assert [link for link in ARTICLES_LINKS if link not in text] == []
    for command in ("finetune/adapter_v2.py --data_dir", "litgpt finetune_adapter_v2"):
        assert command in text


def test_colab_is_judged_by_a_plan_of_the_article_s_model(own):
    own |= {"RANK": 8}
    falcon = planner.describe("falcon-7b")
    planned = own["plan"](falcon, "bf16").bytes
    kept = tuning.checkpointed_bytes(falcon, tokens=512)
    assert planned["qlora"] + kept < planned["lora"] < planned["full"]
    t4 = planner.gpu("t4").memory_bytes
    for nbytes, said in [(t4, "holds here"), (t4 + 1, "does not hold here")]:
        row = a_record(technique="adapters", details={"colab_train_bytes": int(nbytes)})
        verdict = judged("qlora-fits", row)
        assert verdict["verdict"] == said
        assert verdict["decided on"] == "the planner's bytes and a t4; nothing was run"


def judged(identity: str, *rows: results.Record) -> pd.Series:
    facts = pd.read_csv(claims.DATA / "claims.csv").set_index("id")
    return claims.claims(list(rows), "adapters").loc[facts.loc[identity, "claim"]]


@pytest.mark.parametrize(
    ("share", "ends", "verdict"),
    [
        (0.3, [0.2, 0.4], "holds here"),
        (0.8, [0.5, 1.1], "undecided"),
        (1.4, [1.2, 1.6], "does not hold here"),
    ],
)
def test_recovery_is_judged_by_the_interval_of_the_loss_that_is_left(share, ends, verdict):
    for identity, name in [
        ("qlora-quality", "qlora"),
        ("tuned-then-nf4-quality", "merged-then-nf4"),
    ]:
        details = {"loss_left_share": share, "loss_left_share_ci95": ends}
        row = a_record(technique="adapters", id=name, variant=name, details=details)
        assert judged(identity, row)["verdict"] == verdict
        bare = a_record(technique="adapters", id=name, variant=name, nll_delta=-0.3)
        assert judged(identity, bare)["verdict"] == "not testable here"  # no recovery


# ---- recovery, beyond the domain's gain


def scores(*nll: float) -> quality.Quality:
    return quality.Quality(np.array(nll), tokens=len(nll), seq_len=2)


def test_gain_on_the_domain_is_no_recovery():
    base, hurt = scores(3.0, 2.0, 4.0), scores(3.2, 2.3, 4.25)
    for gain in (0.0, 0.3, 1.0):
        tuned = scores(*(base.nll_windows - gain))
        unrepaired = scores(*(hurt.nll_windows - gain))
        left = tuning.loss_ratio((unrepaired, tuned), (hurt, base))
        assert left.value == pytest.approx(1.0) and left.low == pytest.approx(1.0)
        half = scores(*((hurt.nll_windows + base.nll_windows) / 2 - gain))
        assert tuning.loss_ratio((half, tuned), (hurt, base)).value == pytest.approx(0.5)


def test_the_share_s_interval_is_of_the_windows():
    base, hurt = scores(3.0, 2.0, 4.0, 3.0), scores(3.2, 2.3, 4.2, 3.3)
    repaired = scores(3.1, 2.05, 4.15, 3.05)
    left = tuning.loss_ratio((repaired, base), (hurt, base))
    assert left.low < left.value < left.high and left.value == pytest.approx(0.35)
    one = tuning.loss_ratio((scores(3.1), scores(3.0)), (scores(3.2), scores(3.0)))
    assert one.value == pytest.approx(0.5) and one.low is None


def test_of_a_loss_that_cannot_be_told_from_nothing_no_share_is_said(lesson, capsys):
    names = {"tuned": "lora", "hurt": "nf4-dq", "base": "base"}
    scored = {"base": scores(3.0, 2.0, 4.0), "nf4-dq": scores(3.4, 1.7, 4.1)}
    scored |= {"lora": scores(2.0, 1.0, 3.0), "qlora": scores(2.1, 1.0, 3.1)}
    tuning.judge_recovery(lesson, scored, "qlora", **names)
    assert "nothing to win back" in capsys.readouterr().out and "qlora" not in lesson.rows
    scored["nf4-dq"] = scores(3.2, 2.2, 4.25)
    tuning.judge_recovery(lesson, scored, "qlora", **names)
    details = lesson.rows["qlora"]["details"]
    assert details["loss_left_share"] + details["recovered_beyond_domain_share"] == 1
    assert "won back beyond the domain's gain" in capsys.readouterr().out


# ---- layers, by hand


@KINDS
def test_a_layer_by_hand_begins_at_the_old_one_and_merges(own, request, kind):
    model = models.load(request.getfixturevalue(kind))
    linear = next(iter(tuning.linear_layers(model).values()))
    layer = own["LoRALinear"](linear, 4, alpha=8)
    x = torch.randn(3, linear.in_features)
    assert torch.equal(layer(x), linear(x))
    torch.nn.init.normal_(layer.B)
    update = 8 / 4 * layer.B @ layer.A
    assert torch.allclose(layer(x), linear(x) + x @ update.T, atol=1e-5)
    assert torch.allclose(layer(x), x @ layer.merged().T, atol=1e-4)


@KINDS
def test_adapter_v2_begins_at_the_model_and_trains_vectors_alone(own, request, kind, tmp_path):
    folder = request.getfixturevalue(kind)
    ids = some_ids()
    with torch.no_grad():
        before = models.load(folder)(ids).logits
        model = own["add_adapter_v2"](models.load(folder))
        assert torch.equal(model(ids).logits, before)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.ndim == 1 for p in model.parameters() if p.requires_grad)
    assert any("norm" in name for name in wanted)
    assert trainable(model) == tuning.scaled_numbers(planner.describe(folder))
    took = tuning.train(model, [ids] * 6, 0.02)
    assert took["train_losses"][-1] < took["train_losses"][0]
    tuning.save(model, tmp_path / "adapter")
    again = tuning.load_trained(own["add_adapter_v2"](models.load(folder)), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert not torch.allclose(again(ids).logits, before, atol=1e-3)


def test_what_has_no_place_in_a_model_is_not_loaded_in_silence(own, tiny_llama, tmp_path):
    model = own["add_adapter_v2"](models.load(tiny_llama))
    tuning.save(model, tmp_path / "adapter")
    with pytest.raises(RuntimeError, match=r"adapter holds .* which the model has not"):
        tuning.load_trained(models.load(tiny_llama), tmp_path / "adapter")


@KINDS
def test_layers_and_numbers_are_found_in_any_architecture(request, kind):
    folder = request.getfixturevalue(kind)
    model = models.load(folder)
    leaves = {name.rsplit(".", 1)[-1] for name in tuning.linear_layers(model)}
    falcon = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    llama = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert leaves == (falcon if kind == "tiny_falcon" else llama)
    predicted = tuning.lora_numbers(planner.describe(folder), 4)
    assert trainable(with_lora(model)) == predicted


def test_a_vision_tower_gets_no_adapter():
    """Text does not go through it: its weights would have no gradient."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    small["num_attention_heads"] = 2
    text = small | {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64}
    vision = small | {"image_size": 28, "patch_size": 14}
    tokens = {"boi_token_index": 10, "eoi_token_index": 11, "image_token_index": 12}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    model = Gemma3ForConditionalGeneration(config)
    assert any("vision" in name for name, _ in model.named_parameters())
    layers = tuning.linear_layers(model)
    assert len(layers) == 7 and not [name for name in layers if "vision" in name]


def test_a_model_without_linear_layers_is_refused_in_a_sentence():
    config = GPT2Config(vocab_size=64, n_embd=8, n_head=2, n_layer=1, n_positions=16)
    with pytest.raises(NotImplementedError, match=r"^GPT2LMHeadModel has no torch\.nn\.Linear"):
        tuning.linear_layers(GPT2LMHeadModel(config))


# ---- training


@KINDS
def test_training_moves_the_adapter_and_nothing_else(request, kind, tmp_path):
    folder = request.getfixturevalue(kind)
    ids = some_ids()
    before = {name: p.clone() for name, p in models.load(folder).named_parameters()}
    model = with_lora(models.load(folder))
    took = tuning.train(model, [ids] * 8, 0.02, check=ids)
    assert took["train_losses"][-1] < took["train_losses"][0]
    assert took["heldout_steps"] == [0, 2, 4, 6, 8]
    assert took["train_tokens"] == 8 * ids.numel()
    assert tuning.save(model, tmp_path / "adapter") > 4 * took["trainable_parameters"]
    for name, p in model.base_model.model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, before[name.replace(".base_layer", "")])
    tuned = peft.PeftModel.from_pretrained(models.load(folder), tmp_path / "adapter").eval()
    with torch.no_grad():
        apart = tuned(ids).logits
        assert not torch.allclose(apart, models.load(folder)(ids).logits, atol=1e-3)
        assert torch.allclose(apart, tuned.merge_and_unload()(ids).logits, atol=1e-4)


def test_all_weights_are_saved_as_a_checkpoint(tiny_llama, tmp_path):
    model = models.load(tiny_llama)
    tuning.train(model, [some_ids()] * 2, 1e-3)
    nbytes = tuning.save(model, tmp_path / "full")
    assert nbytes >= memory.weight_bytes(model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32)
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_a_part_can_learn_at_a_multiple_of_the_rate(tiny_llama):
    model = with_lora(models.load(tiny_llama))
    optimizer, schedule, _ = tuning._optimizer(model, 0.01, 8, {"lora_B": 10.0})
    rates = sorted(group["initial_lr"] for group in optimizer.param_groups)
    assert rates == [pytest.approx(0.01), pytest.approx(0.1)]
    factors = [schedule.lr_lambdas[0](step) for step in range(9)]
    assert factors[0] == max(factors) and factors[-1] == 0
    assert factors == sorted(factors, reverse=True)


def test_what_is_labelled_out_is_not_learnt(tiny_llama):
    model = models.load(tiny_llama)
    ids = some_ids()
    labels = torch.full_like(ids, -100)
    labels[0, -1] = ids[0, -1]  # one token is learnt
    with torch.no_grad():
        logits = model(ids).logits[0, -2]
        last = torch.nn.functional.cross_entropy(logits, ids[0, -1]).item()
        learnt = tuning.loss_of(model, ids, labels).item()
        of_all = tuning.loss_of(model, ids).item()
    assert abs(learnt - last) < 0.1 * abs(of_all - last)


def test_training_memory_is_what_training_took(tiny_llama):
    """All weights need gradients and two means more than an adapter; mapped pages do not count."""
    starts = {
        "full": lambda: models.load(tiny_llama),
        "lora": lambda: with_lora(models.load(tiny_llama)),
    }
    batches = [some_ids(1, 16)] * 2
    peaks = {}
    for name, start in starts.items():
        for _ in range(2):  # the first one fills the libraries' workspaces
            _, took = tuning.learn(start, batches, 1e-3, batches[0], 0, "cpu")
        peaks[name] = took["train_peak_bytes"]
    numbers = took["trainable_parameters"]
    everything = planner.parameters(planner.describe(tiny_llama))["total"]
    assert peaks["full"] - peaks["lora"] > 0.5 * 12 * (everything - numbers)


def test_what_does_not_fit_is_not_begun():
    def start():
        raise AssertionError("it was loaded")

    with pytest.raises(MemoryError, match=r"^needs 1000000000\.0 GB, [\d.]+ GB are there$"):
        tuning.learn(start, [], 0.1, None, 10**18, "cpu")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError("needs 9 GB, 1 GB are there"), "oom"),
        (AttributeError("'Lfm2Config' object has no attribute 'conv_dim'"), "failed"),
        (NotImplementedError("no kernel"), "unsupported"),
    ],
)
def test_what_cannot_be_trained_is_a_row(lesson, error, status, capsys):
    with tuning.or_a_row(lesson, "lora"):
        raise error
    record = lesson.record("lora")
    assert record.status == status and str(error) in record.reason
    assert str(error) in capsys.readouterr().out


# ---- types and rates


@pytest.mark.parametrize(
    ("native", "dtype"),
    [
        ({"bfloat16": True, "float16": True}, torch.bfloat16),
        ({"bfloat16": False, "float16": True}, torch.float16),  # a T4
        ({"bfloat16": False, "float16": False}, torch.float32),
    ],
)
def test_the_16_bit_type_is_one_that_the_device_has(monkeypatch, native, dtype):
    monkeypatch.setattr(machine, "native_dtypes", lambda device: native)
    tuning.native_type.cache_clear()
    assert tuning.native_type("cuda") == dtype
    tuning.native_type.cache_clear()


@pytest.mark.parametrize(
    ("model", "rate"), [("auto", 0.004), ("falcon-7b", 0.0002), ("llama-30b", 0.0001)]
)
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_rate_follows_the_size(model, rate, device, tmp_path):
    if model != "auto":
        config = (checkpoints.CONFIGS / f"{model}.json").read_text()
        (tmp_path / "config.json").write_text(config)
        model = str(tmp_path)
    values = {"LEARNING_RATE": None}
    parameters.fill_defaults(values, device, model)
    assert values["LEARNING_RATE"] == rate
    given = {"LEARNING_RATE": 0.01}
    parameters.fill_defaults(given, device, model)
    assert given["LEARNING_RATE"] == 0.01


# ---- texts


@pytest.mark.parametrize("content", ["", "Too short."])
def test_too_little_text_is_refused_in_a_sentence(content):
    text = models.Text("small", content, "")
    with pytest.raises(
        ValueError, match=r"the text small has \d+ tokens.*TRAIN_LENGTH=64.*DATASET"
    ):
        domain.sequences(text, models.tokenizer(), 64, 2)


def test_a_sequence_of_one_token_is_refused():
    with pytest.raises(ValueError, match="TRAIN_LENGTH=1 must be at least 2"):
        domain.sequences(models.text("training"), models.tokenizer(), 1, 2)


def test_sequences_are_seeded_and_begin_again():
    text, tokenizer = models.text("training"), models.tokenizer()
    rows = domain.sequences(text, tokenizer, 16, 8, seed=1)
    assert rows.shape == (8, 16)
    assert torch.equal(rows, domain.sequences(text, tokenizer, 16, 8, seed=1))
    assert not torch.equal(rows, domain.sequences(text, tokenizer, 16, 8, seed=2))
    few = domain.sequences(models.Text("few", " word" * 40, ""), tokenizer, 16, 5)
    assert few.shape == (5, 16)


def test_a_text_file_is_split_into_disjoint_rows(tmp_path):
    file = tmp_path / "domain.txt"
    file.write_text("\n\n".join(f"paragraph {i}" for i in range(10)), encoding="utf-8")
    texts = domain.texts(str(file), "auto", "cpu", end="")
    training, heldout = (text.content.split("\n\n") for text in texts)
    assert heldout == ["paragraph 0", "paragraph 5"]
    assert len(training) == 8 and not set(training) & set(heldout)


def test_rows_lose_their_template_and_end_where_they_end(tmp_path, monkeypatch):
    """Alpaca's column `text` repeats the others in a template; a model must learn to stop."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows").mkdir()
    rows = "".join(f"question {i},,answer {i},Below is an instruction {i}\n" for i in range(10))
    header = "instruction,input,output,text\n"
    (tmp_path / "rows" / "train.csv").write_text(header + rows, encoding="utf-8")
    training, heldout = domain.texts(str(tmp_path / "rows"), "auto", "cpu", end="<end>")
    assert heldout.content == "question 0\nanswer 0\n\nquestion 5\nanswer 5"
    assert training.content.count("answer") == training.content.count("<end>") == 8
    assert "Below" not in training.content and training.name == "rows/training"


def test_a_data_set_that_is_not_there(tmp_path, capsys, monkeypatch):
    nowhere = str(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(
        ValueError, match=r"^DATASET='.*' is no file or folder here and no data set .* hub\.$"
    ):
        domain.texts(nowhere, "auto", "cpu", end="")
    monkeypatch.setattr(domain, "ALPACA", nowhere)  # as it is where no hub answers
    assert domain.choose("auto", "some/model", "cuda") == nowhere
    assert domain.texts("auto", "some/model", "cuda", end="")[0] == models.text("training")
    assert "the embedded text is used" in capsys.readouterr().out
    assert domain.choose("auto", "auto", "cuda") == domain.EMBEDDED


def test_plain_prose_is_no_text_of_the_domain():
    """No eight words in a row of it stand in what is trained on."""

    def runs(text: str) -> set:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[place : place + 8]) for place in range(len(words) - 7)}

    prose = domain.prose()
    assert prose.content.startswith("\n") and "free software" in prose.content
    assert len(models.tokenizer()(prose.content).input_ids) > 3000
    assert not runs(prose.content) & runs(models.text("training").content)


# ---- deeper: many adapters


def test_break_even(definitions):
    break_even = definitions(MANY)["break_even"]
    pays = break_even(change_s=1.0, extra_s=0.01, each_s=2.0, mixed_s=3.0)
    assert list(pays.values()) == [100, 3]
    never = break_even(change_s=1.0, extra_s=-0.01, each_s=-1.0, mixed_s=3.0)
    assert list(never.values()) == [math.inf, math.inf]


@pytest.mark.slow
def test_three_adapters_weigh_less_than_three_models(run_lesson):
    rows = {r.id: r for r in run_lesson(MANY).records}
    one, three = rows["three-adapters"], rows["three-models"]
    base_bytes = three.weight_bytes / three.details["adapters"]
    assert one.weight_bytes - base_bytes == pytest.approx(
        one.details["adapters"] * one.details["adapter_bytes"], rel=0.05
    )
    above = [row.peak_bytes - row.resident_before_bytes for row in (one, three)]
    assert above[0] < 0.6 * above[1]
    assert len(one.details["set_adapter_s"]) == one.details["adapters"]


@pytest.mark.slow
def test_server_gives_each_adapter_what_peft_gives(run_lesson):
    rows = {r.id: r for r in run_lesson(MANY).records}
    mixed = rows["serve-mixed"]
    assert mixed.engine == "vllm" and mixed.speedup
    assert mixed.details["distinct_texts"] > 2  # else the wrong adapter would not be seen
    assert mixed.details["same_tokens_as_peft"] == [1.0] * mixed.details["adapters"]
    assert mixed.batch_size == mixed.details["requests"] == rows["serve-base"].batch_size
    assert mixed.details["hot_load_s"] > 0


@pytest.mark.slow
def test_an_engine_that_cannot_start_is_rows(run_lesson, tiny_lfm2):
    """vLLM reads a convolution's width that Lfm2's configuration has not: any exception will do."""
    rows = {r.id: r for r in run_lesson(MANY, MODEL=tiny_lfm2).records}
    assert rows["three-adapters"].status == "ok"
    for name in ("serve-base", "serve-mixed", "serve-in-turns"):
        assert rows[name].status != "ok" and rows[name].reason


# ---- deeper: variants


def test_answers_only_labels_the_answers(definitions):
    own = definitions(VARIANTS)
    own["tokenizer"] = models.tokenizer()
    rows = domain.sequences(models.text("training"), own["tokenizer"], 64, 4)
    ids, labels = own["turns"](rows)
    assert ids.shape == labels.shape == rows.shape
    learnt = labels != -100
    assert torch.equal(ids[learnt], labels[learnt]) and 0 < learnt.sum() < ids.numel()
    for row, mask, source in zip(ids, learnt, rows, strict=True):
        answer = source[len(source) // 4 :][: int(mask.sum())]
        assert torch.equal(row[mask], answer)


@KINDS
def test_loftq_s_start_is_nearer_than_qlora_s(definitions, request, kind, monkeypatch):
    monkeypatch.setattr(modeling_falcon, "FalconLinear", torch.nn.Linear)  # as the notebook does
    own = definitions(VARIANTS)
    own |= {"MODEL": request.getfixturevalue(kind), "RANK": 4, "device": "cpu"}
    own |= {"dtype": torch.float32, "half": torch.bfloat16}
    own["nf4"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    own["lora"] = lambda: peft.LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules="all-linear"
    )
    ids = some_ids()
    with torch.no_grad():
        exact = own["dense"]()(ids).logits
        errors = [torch.dist(own[s]()(ids).logits, exact) for s in ("start_qlora", "start_loftq")]
    assert errors[1] < 0.98 * errors[0]


@pytest.mark.slow
def test_variants_train_as_much_and_are_scored(run_lesson):
    rows = {r.id: r for r in run_lesson(VARIANTS).records}
    trained = [r for r in rows.values() if "train_tokens" in r.details]
    assert len(trained) == 7 and len({r.details["train_tokens"] for r in trained}) == 1
    assert all(r.status == "ok" and r.perplexity for r in rows.values())
    begins = {r.id: r.details["heldout_losses"][0] for r in trained}
    assert begins["loftq"] < begins["qlora-plain"]
    assert {"qlora-into-4-bits", "qlora-into-full"} <= rows.keys()


@pytest.mark.slow
def test_the_lesson_runs_on_falcon(run_lesson, tiny_falcon):
    small = {"EVAL_TOKENS": 64, "REPEATS": 1, "WARMUP": 0, "TRAIN_STEPS": 3, "TRAIN_LENGTH": 32}
    rows = {r.id: r for r in run_lesson(LESSON, MODEL=tiny_falcon, **small).records}
    for name in FOUR_BIT:  # never 4-bit in name only
        assert rows[name].weight_bytes < rows["base"].weight_bytes
    assert rows["adapter-v2"].status == "ok"
    predicted = tuning.scaled_numbers(planner.describe(tiny_falcon))
    assert rows["adapter-v2"].details["trainable_parameters"] == predicted


@pytest.mark.slow
def test_the_lesson_runs_on_a_hybrid_model(run_lesson, tiny_lfm2):
    rows = {r.id: r for r in run_lesson(LESSON, MODEL=tiny_lfm2).records}
    assert rows["base"].status == rows["lora"].status == "ok"
