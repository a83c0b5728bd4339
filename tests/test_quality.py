"""quality: windows, perplexity, divergences against slow references, and the wide accumulation."""

import math

import pytest
import torch
from transformers import AutoConfig, BloomConfig, GPT2Config, GPT2LMHeadModel

from helpers import models, quality


@pytest.fixture(scope="module")
def scored(tiny_llama):
    net, half = models.load(tiny_llama), models.load(tiny_llama, torch.bfloat16)
    ids = quality.windows(models.tokenizer(), models.text("evaluation").content, 32, 150)
    found = quality.compare(
        {
            "base": quality.Forward(net),
            "half": quality.Forward(half),
            "same": quality.Forward(net),
        },
        "base",
        ids,
    )
    return net, half, ids, found


def test_windows_do_not_overlap_and_give_enough_predictions():
    tokenizer, text = models.tokenizer(), models.text("evaluation").content
    ids = quality.windows(tokenizer, text, 64, 300)
    assert ids.shape == (5, 64) and 5 * 63 >= 300
    assert (
        ids.flatten().tolist() == tokenizer(text).input_ids[:320]
    )  # this tokenizer puts no BOS: none is added


def test_a_text_too_short_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="lower EVAL_TOKENS"):
        quality.windows(models.tokenizer(), "a few words", 64, 300)


@pytest.mark.parametrize(
    ("tokens", "longest", "length"),
    [(8000, 512, 512), (300, 512, 300), (1, 512, 2), (8000, 128, 128), (8000, 2000, 512)],
)
def test_a_window_fits_the_question_and_the_model(tiny_llama, tokens, longest, length):
    """The tiny model was made for 512 tokens."""
    config = AutoConfig.from_pretrained(tiny_llama)
    assert quality.window_length(config, tokens, longest) == length


def test_a_context_shorter_than_the_usual_window(tmp_path):
    """GPT-2 has a row for each position and no more: longer windows cannot be scored at all."""
    torch.manual_seed(0)
    net = GPT2LMHeadModel(GPT2Config(n_positions=40, n_embd=32, n_layer=1, n_head=2)).eval()
    length = quality.window_length(net.config, 100)
    ids = quality.windows(models.tokenizer(), models.text("evaluation").content, length, 100)
    found = quality.compare({"base": quality.Forward(net)}, "base", ids)["base"]
    assert found.seq_len == 40 and found.tokens >= 100


def test_a_model_without_a_longest_text_has_the_usual_window():
    assert quality.window_length(BloomConfig(), 8000) == 512


def test_one_token_is_scored_and_has_no_interval(tiny_llama):
    net = models.load(tiny_llama)
    length = quality.window_length(net.config, 1)
    ids = quality.windows(models.tokenizer(), models.text("evaluation").content, length, 1)
    forwards = {name: quality.Forward(net) for name in ("base", "same")}
    found = quality.compare(forwards, "base", ids)
    assert found["base"].tokens == 1 and found["same"].nll_delta_ci95 is None


def test_perplexity_is_that_of_the_textbook(scored):
    net, _, ids, found = scored
    with torch.no_grad():
        losses = [net(w[None], labels=w[None]).loss.item() for w in ids]
    assert found["base"].perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found["base"].tokens == ids.shape[0] * 31


def test_differences_are_those_of_a_slow_reference(scored):
    net, half, ids, found = scored
    with torch.no_grad():
        p = torch.cat([net(w[None]).logits[0, :-1].double().log_softmax(-1) for w in ids])
        forward = quality.Forward(half)
        q = torch.cat([forward(w[None])[0, :-1].double().log_softmax(-1) for w in ids])
    target = ids[:, 1:].flatten()[:, None]
    assert found["half"].nll_delta == pytest.approx(
        float((p - q).gather(-1, target).mean()), abs=1e-6
    )
    assert found["half"].kl_divergence == pytest.approx(
        float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-6
    )
    assert found["half"].agreement == pytest.approx(
        float((p.argmax(-1) == q.argmax(-1)).double().mean())
    )
    assert len(found["half"].changed) == round((1 - found["half"].agreement) * len(target))
    low, high = found["half"].nll_delta_ci95
    assert low < found["half"].nll_delta < high


def test_a_model_agrees_with_itself(scored):
    same = scored[3]["same"]
    assert (same.nll_delta, same.agreement, same.changed) == (0.0, 1.0, [])
    assert same.kl_divergence == pytest.approx(0, abs=1e-12)
    assert scored[3]["base"].kl_divergence is None


def test_the_gap_is_the_distance_of_the_two_best_logits(scored):
    net, _, ids, found = scored
    for changed in found["half"].changed[:3]:
        with torch.no_grad():
            best = net(ids[changed["window"]][None]).logits[0, changed["position"]].topk(2)
        assert changed["baseline"] == best.indices[0] and changed["variant"] != best.indices[0]
        assert changed["gap"] == pytest.approx(float(best.values[0] - best.values[1]), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_wide_accumulation_rounds_once_as_hardware_does(dtype, autocast):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 64), torch.randn(32, 64), torch.randn(32)
    kept = torch.float32 if autocast else dtype
    with torch.autocast("cpu", dtype, enabled=autocast), quality.WideAccumulation():
        got = torch.nn.functional.linear(x.to(kept), weight.to(kept), bias.to(kept))
    exact = torch.nn.functional.linear(
        x.to(dtype).double(), weight.to(dtype).double(), bias.to(dtype).double()
    )
    assert got.dtype == dtype
    assert (got.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_wide_accumulation_leaves_32_bits_alone():
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    with quality.WideAccumulation():
        assert torch.equal(torch.nn.functional.linear(x, weight), x @ weight.T)


def test_wide_accumulation_scores_as_the_machine_itself_does(tiny_llama):
    net = models.load(tiny_llama, torch.bfloat16)
    exact = models.load(tiny_llama)
    ids = quality.windows(models.tokenizer(), models.text("evaluation").content, 32, 100)
    with torch.no_grad():
        native = quality.compare(
            {"base": quality.Forward(exact), "half": lambda w: net(w).logits}, "base", ids
        )
    wide = quality.compare(
        {"base": quality.Forward(exact), "half": quality.Forward(net)}, "base", ids
    )
    native, wide = native["half"], wide["half"]
    assert wide.perplexity == pytest.approx(native.perplexity, rel=2e-3)
