"""Lesson 05: masks, cuts and records of pruning."""

import functools
import math
import types

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PersimmonConfig,
    PersimmonForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from helpers import models

LESSON = "05_pruning"
PLAIN = ["dense", "dense-nf4"]
PRUNED = ["magnitude-50", "structured-20", "wanda-50"]


@pytest.fixture(scope="module")
def lesson(definitions):
    return definitions(LESSON)


@pytest.fixture(scope="module")
def recovery(definitions, lesson):
    """The lesson's functions stand under `pruning` there."""
    namespace = definitions("deeper/05_recovery")
    namespace["pruning"] = types.SimpleNamespace(**lesson)
    return namespace


@pytest.fixture(scope="module")
def sparsity(definitions, lesson):
    namespace = definitions("deeper/05_sparsity")
    namespace["pruning"] = types.SimpleNamespace(**lesson)
    return namespace


@pytest.fixture(params=["tiny_llama", "tiny_falcon"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 40_000, (3, 24), generator=torch.Generator().manual_seed(1))


def weights(lesson, model):
    return {
        f"{at}.{name}": layer.weight
        for at, block in enumerate(lesson["blocks"](model))
        for name, layer in lesson["linears"](block).items()
    }


def test_mask_drops_the_floor_and_the_earlier_of_equals(lesson):
    mask = lesson["mask_of"](
        torch.tensor([[1.0, 1.0, 1.0, 0.5, 2.0], [5.0, 4.0, 3.0, 2.0, 1.0]]), 0.5
    )
    assert mask.tolist() == [[True, False, False, True, False], [False, False, False, True, True]]


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.7])
def test_wanda_zeroes_exactly_the_floor_of_every_row(lesson, folder, ids, sparsity):
    pruned = lesson["wanda"](models.load(folder), ids, sparsity)
    for weight in weights(lesson, pruned).values():
        assert set((weight == 0).sum(1).tolist()) == {int(weight.shape[1] * sparsity)}


@pytest.mark.parametrize(("zeros", "group"), [(2, 4), (4, 8)])
def test_patterns_hold_in_every_group(lesson, folder, ids, zeros, group):
    pruned = lesson["wanda"](models.load(folder), ids, 0.5, group)
    for weight in weights(lesson, pruned).values():
        assert ((weight == 0).reshape(-1, group).sum(1) == zeros).all()


def test_magnitude_zeroes_the_smallest_half_of_each_layer_and_no_more(lesson, folder):
    """Ties included, as those of weights that were once on a grid."""
    whole, pruned = models.load(folder), models.load(folder)
    for model in (whole, pruned):
        for weight in weights(lesson, model).values():
            weight.data = (256 * weight.data).round() / 256
    lesson["magnitude"](pruned, 0.5)
    before = weights(lesson, whole)
    for name, weight in weights(lesson, pruned).items():
        size, gone = before[name].abs(), weight == 0
        assert gone.sum() == weight.numel() // 2
        assert size[gone].max() <= size[~gone].min()


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_everything_but_the_linear_layers_is_untouched(lesson, folder, ids, method):
    before, pruned = models.load(folder), models.load(folder)
    lesson["wanda"](pruned, ids, 0.5) if method == "wanda" else lesson["magnitude"](pruned, 0.5)
    touched = {id(w) for w in weights(lesson, pruned).values()}
    others = [name for name, p in pruned.named_parameters() if id(p) not in touched]
    assert any("embed" in name for name in others) and any(
        "norm" in name or "ln" in name for name in others
    )
    for name in others:
        assert torch.equal(pruned.get_parameter(name), before.get_parameter(name)), name
    for name, weight in weights(lesson, pruned).items():
        kept = weight != 0
        assert torch.equal(weight[kept], weights(lesson, before)[name][kept]), name


def slow_wanda_masks(model, layers, ids, sparsity):
    """Wanda once more, from the paper: whole forward passes, one sequence at a time, sums in
    float64, row by row.
    """
    masks = {}
    for at, names in enumerate(layers):
        squares, hooks = {name: 0.0 for name in names}, []
        for name, layer in names.items():

            def add(_, args, __, name=name, squares=squares):
                x = args[0].detach().double().reshape(-1, args[0].shape[-1])
                squares[name] = squares[name] + (x**2).sum(0).numpy()

            hooks.append(layer.register_forward_hook(add))
        with torch.no_grad():
            for sequence in ids:
                model(sequence[None])
        for hook in hooks:
            hook.remove()
        for name, layer in names.items():
            values = layer.weight.detach().numpy()
            mask = np.zeros(values.shape, bool)
            for row in range(len(values)):
                scores = np.abs(values[row].astype(np.float64)) * np.sqrt(squares[name])
                ranked = sorted(
                    range(len(scores)), key=lambda column, scores=scores: scores[column]
                )
                mask[row, ranked[: math.floor(len(scores) * sparsity)]] = True
            masks[f"{at}.{name}"] = mask
        for name, layer in names.items():
            layer.weight.data[torch.from_numpy(masks[f"{at}.{name}"])] = 0.0
    return masks


def test_wanda_equals_a_slow_reference(lesson, folder, ids):
    net = models.load(folder)
    layers = [
        {name: m for name, m in block.named_modules() if type(m).__name__.endswith("Linear")}
        for block in (net.model.layers if hasattr(net, "model") else net.transformer.h)
    ]
    expected = slow_wanda_masks(net, layers, ids, 0.5)
    found = weights(lesson, lesson["wanda"](models.load(folder), ids, 0.5))
    assert found.keys() == expected.keys()
    for name, mask in expected.items():
        assert np.array_equal((found[name] == 0).numpy(), mask), name


def test_wanda_looks_at_pruned_blocks(lesson, tiny_llama, ids):
    """The second block's masks differ from those that the dense model's inputs would give."""
    net = models.load(tiny_llama)
    norms = []
    down = lesson["blocks"](net)[1].mlp.down_proj
    down.register_forward_pre_hook(lambda _, args: norms.append(args[0].flatten(0, -2).norm(dim=0)))
    with torch.no_grad():
        net(ids)
        dense = lesson["mask_of"](down.weight.abs() * norms[0], 0.5)
    pruned = lesson["wanda"](models.load(tiny_llama), ids, 0.5)
    assert not torch.equal(lesson["blocks"](pruned)[1].mlp.down_proj.weight == 0, dense)


def test_importance_is_the_sum_of_weight_times_gradient(lesson, folder, ids):
    """And no gradient is left in memory."""
    net, whole = models.load(folder), models.load(folder)
    worth = lesson["importances"](net, ids)
    assert all(weight.grad is None for weight in net.parameters())
    whole.requires_grad_()
    whole(ids, labels=ids).loss.backward()
    for scores, block in zip(worth, lesson["blocks"](whole), strict=True):
        for kind, count in lesson["units"](whole).items():
            expected = torch.zeros(count)
            for layer, dim in lesson["coupled"](block, kind):
                taylor = (layer.weight * layer.weight.grad).abs().detach().movedim(dim, 0)
                expected += taylor.reshape(count, -1).sum(1)
            assert (scores[kind] > 0).all()
            torch.testing.assert_close(scores[kind], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("portion", [0.1, 0.2, 0.5])
def test_a_cut_model_is_the_model_without_those_units(lesson, folder, ids, portion):
    """Removing a unit gives what zeroing the columns that it feeds gives."""
    whole, cut = models.load(folder), models.load(folder)
    before = sum(p.numel() for p in lesson["blocks"](cut).parameters())
    worth = lesson["importances"](models.load(folder), ids)
    kept = lesson["plan"](cut, portion, 8)
    assert portion < 0.5 or kept.get("groups", 1) == 1  # of two: heads go as well
    with torch.no_grad():
        for scores, block in zip(worth, lesson["blocks"](whole), strict=True):
            for kind, score in scores.items():
                gone = score.topk(len(score) - kept[kind], largest=False).indices
                last, _ = lesson["coupled"](block, kind)[-1]
                last.weight.view(len(last.weight), len(score), -1)[:, gone] = 0
    lesson["narrow"](lesson["blocks"](cut), worth, kept)
    with torch.no_grad():
        torch.testing.assert_close(cut(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in lesson["blocks"](cut).parameters()) < before


def test_a_cut_keeps_the_type_of_the_weights(lesson, folder, ids):
    """A GPU's dense model is in 16 bits, and a new layer in 32 by itself."""
    net = models.load(folder, torch.bfloat16)
    lesson["narrow"](
        lesson["blocks"](net), lesson["importances"](net, ids), {"channels": 64, "groups": 1}
    )
    assert {weight.dtype for weight in net.parameters()} == {torch.bfloat16}
    assert torch.isfinite(net(ids).logits).all()


def test_a_plan_takes_its_share_of_the_block_in_whole_groups(lesson, tiny_llama, capsys):
    """Attention has 12,288 weights here and the MLP 24,576: a fifth of both is 7,373."""
    net = models.load(tiny_llama)
    assert lesson["plan"](net, 0.2, 8) == {"channels": 88, "groups": 2}  # 0.7 of 128
    assert "20.8% of a block's matrices goes" in capsys.readouterr().out
    assert lesson["plan"](net, 0.9, 8) == {"channels": 8, "groups": 1}  # a multiple stays
    assert "79.2% of a block's matrices goes" in capsys.readouterr().out
    net.config.hidden_size, net.config.num_key_value_heads = 576, 3
    net.config.num_attention_heads = 9
    assert lesson["plan"](net, 0.2, 64) == {"channels": 64, "groups": 3}  # one would be a third
    assert lesson["plan"](net, 0.4, 8) == {"channels": 72, "groups": 2}


@pytest.fixture
def narrow_plan(lesson, recovery, monkeypatch):
    """The tiny models have fewer channels than the multiple that a real one keeps."""
    plan = functools.partial(lesson["plan"], multiple=8)
    monkeypatch.setitem(lesson, "plan", plan)
    monkeypatch.setattr(recovery["pruning"], "plan", plan)


def test_cut_models_are_ordinary_checkpoints(lesson, recovery, folder, ids, tmp_path, narrow_plan):
    cosines = recovery["similarity"](models.load(folder), ids)
    small = {
        "width": lesson["llm_pruner"](models.load(folder), ids, 0.5),
        "depth": recovery["shorten"](models.load(folder), cosines, 0.5),
    }
    for name, model in small.items():
        model.save_pretrained(tmp_path / name)
        again = models.load(str(tmp_path / name))
        assert again.num_parameters() == model.num_parameters()
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_multi_query_attention_has_no_group_to_spare(lesson, tiny_falcon, tiny_llama):
    assert lesson["units"](models.load(tiny_falcon)) == {"channels": 256}
    assert lesson["units"](models.load(tiny_llama)) == {"channels": 128, "groups": 2}


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FOREIGN = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_head=4, n_layer=2, n_positions=64)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        )
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_model_whose_layers_are_not_known_is_refused(lesson, name):
    """Nothing is pruned in part: weights outside of linear layers (gpt2, experts), other places."""
    few = torch.arange(16).view(2, 8)
    for change in (
        lambda model: lesson["magnitude"](model, 0.5),
        lambda model: lesson["wanda"](model, few, 0.5),
        lambda model: lesson["llm_pruner"](model, few, 0.2),
    ):
        with pytest.raises(NotImplementedError):
            change(FOREIGN[name]())


def test_a_fused_attention_keeps_its_groups(lesson):
    """Its output matrix would be cut, and the fused ones that feed it would not."""
    few = {name: count for name, count in SMALL.items() if name != "num_key_value_heads"}
    net = PersimmonForCausalLM(PersimmonConfig(**few, pad_token_id=0))
    assert lesson["units"](net) == {"channels": 64}
    phi = Phi3ForCausalLM(Phi3Config(**SMALL, pad_token_id=0))
    assert lesson["coupled"](lesson["blocks"](phi)[0], "groups") == []


UNCUT = {
    "Lfm2": lambda: Lfm2ForCausalLM(Lfm2Config(**SMALL | {"hidden_size": 64}, full_attn_idxs=[1])),
    "Phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL, pad_token_id=0)),  # gate and up are fused
}


@pytest.mark.parametrize("name", UNCUT)
def test_an_mlp_that_the_cut_does_not_know_is_named(lesson, name):
    """Its zeros are possible all the same."""
    few = torch.arange(16).view(2, 8)
    with pytest.raises(NotImplementedError, match=f"{name}DecoderLayer has no MLP that this cut"):
        lesson["llm_pruner"](UNCUT[name](), few, 0.2)
    pruned = lesson["wanda"](UNCUT[name](), few, 0.5)
    for weight in weights(lesson, pruned).values():
        assert set((weight == 0).sum(1).tolist()) == {weight.shape[1] // 2}


def test_similarity_is_the_cosine_of_what_the_model_itself_reports(recovery, tiny_llama, ids):
    net = models.load(tiny_llama)
    with torch.no_grad():
        states = net(ids, output_hidden_states=True).hidden_states
    expected = torch.nn.functional.cosine_similarity(states[0], states[1], dim=-1).mean()
    assert recovery["similarity"](net, ids)[0] == pytest.approx(float(expected), abs=1e-5)


def test_the_most_similar_layers_go_and_the_order_stays(lesson, recovery, folder):
    net = models.load(folder)
    _, second = lesson["blocks"](net)
    short = recovery["shorten"](net, [0.9, 0.1], 0.5)
    assert list(lesson["blocks"](short)) == [second] and short.config.num_hidden_layers == 1


def test_spared_ends_keep_their_width_and_the_middle_gives_it(
    lesson, recovery, tiny_llama, ids, narrow_plan
):
    net = recovery["spare_the_ends"](models.load(tiny_llama), ids, 0.2, 1, 0)
    first, second = lesson["blocks"](net)
    assert first.mlp.down_proj.in_features == 128
    assert second.mlp.down_proj.in_features == 48  # two fifths of the block: 51, in eights


def test_stored_forms_multiply_alike_and_take_what_they_say(lesson, sparsity):
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    w = w.masked_fill(lesson["mask_of"](w.abs(), 0.5), 0)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    expected = {
        "as_dense": w.nbytes,
        "as_csr": 33 * 4 + 1024 * (4 + 4),
        "as_bitmask": 1024 * 4 + w.numel() // 8,
    }
    for name, size in expected.items():
        parts, multiply = sparsity[name](w)
        torch.testing.assert_close(multiply(x), x @ w.T, rtol=1e-5, atol=1e-5)
        assert sum(part.nbytes for part in parts) == size, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without the kernel says")
def test_no_two_four_kernel_is_said(sparsity):
    with pytest.raises(NotImplementedError, match="compute capability"):
        sparsity["as_two_four"](torch.ones(32, 64))


def dependent_inputs(columns: int) -> torch.Tensor:
    """(400, columns) inputs that resemble one another, as those of a layer do."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(400, columns, generator=generator) @ (torch.eye(columns) + mixed)


def test_sparsegpt_makes_up_for_its_zeros(sparsity, lesson):
    """Exactly the floor of each 128 columns goes, and the outputs are nearer than without the
    update of the others.
    """
    x = dependent_inputs(192)
    w = torch.randn(24, 192, generator=torch.Generator().manual_seed(1))
    pruned = sparsity["update"](w, x.T @ x, 0.5)
    zeros = pruned == 0
    assert zeros[:, :128].sum() == 24 * 128 // 2 and zeros[:, 128:].sum() == 24 * 64 // 2
    plain = w.masked_fill(zeros, 0)
    assert (x @ (pruned - w).T).norm() < 0.9 * (x @ (plain - w).T).norm()


def test_sparsegpts_update_is_the_least_squares_of_what_comes_after(sparsity):
    """One weight of a row goes: those to its right move as a solver would move them."""
    x = dependent_inputs(16)
    hessian = x.T @ x
    w = torch.ones(1, 16)
    w[0, 5] = 1e-3
    pruned = sparsity["update"](w, hessian, 1 / 16)
    assert (pruned == 0).nonzero().tolist() == [[0, 5]]
    damped = hessian.clone()
    damped.diagonal().add_(0.01 * hessian.diagonal().mean())
    right = slice(6, None)
    moved = torch.linalg.solve(damped[right, right], damped[right, 5] * w[0, 5])
    torch.testing.assert_close(pruned[0, right] - w[0, right], moved, rtol=1e-3, atol=1e-7)
    assert torch.equal(pruned[0, :5], w[0, :5])


@pytest.fixture(
    params=["auto", pytest.param("tiny_falcon", marks=pytest.mark.slow)], scope="module"
)
def records(request, run_lesson):
    """Of the lesson, by id; the tiny Falcon has channels to cut, and no heads."""
    if request.param == "auto":
        found = run_lesson(LESSON)
    else:
        found = run_lesson(LESSON, MODEL=request.getfixturevalue(request.param), WIDTH_MULTIPLE=8)
    return {record.id: record for record in found.records}


def test_the_lesson_finds(records):
    in_16 = ["dense-fp16", "structured-20-fp16"] if "dense-fp16" in records else []
    assert list(records) == [*PLAIN, *PRUNED, *in_16]
    for record in records.values():
        assert record.sweep is None and record.status == "ok"
        assert record.perplexity and record.peak_bytes and record.tokens_per_s
    dense = records["dense"].weight_bytes
    for name in ("magnitude-50", "wanda-50"):
        assert records[name].weight_bytes == dense
        assert records[name].details["removed_share"] == 0
    cut = records["structured-20"].weight_bytes
    assert cut < dense
    assert records["structured-20"].details["removed_share"] == pytest.approx(1 - cut / dense)
    if "dense-fp16" in records:
        assert records["dense-fp16"].weight_bytes == dense / 2
        assert records["structured-20-fp16"].weight_bytes == cut / 2
    assert records["dense-nf4"].weight_bytes < dense / 2


def test_wanda_is_held_against_magnitude_in_pairs(records):
    """Beside the dense model, so that the claim of its better choice has an interval."""
    details = records["wanda-50"].details
    assert "nll_against_magnitude-50" in details
    assert "nll_against_magnitude-50_ci95" in details


def test_on_a_real_model_wanda_beats_magnitude(run_lesson):
    by_id = {record.id: record for record in run_lesson(LESSON).records}
    assert by_id["wanda-50"].perplexity < by_id["magnitude-50"].perplexity
    assert by_id["dense"].perplexity < by_id["wanda-50"].perplexity


@pytest.mark.slow
def test_what_is_cut_and_healed_has_its_rows(run_lesson):
    by_id = {record.id: record for record in run_lesson("deeper/05_recovery").records}
    assert {record.technique for record in by_id.values()} == {"pruning"}
    assert not [record.id for record in by_id.values() if record.status == "failed"]
    spared = by_id["structured-20-ends-spared"]
    assert spared.sweep == "ends" and spared.perplexity and spared.tokens_per_s is None
    dense = by_id["dense"].weight_bytes
    for base in ("structured-20", "layers-20"):
        healed = by_id[f"{base}-lora"]
        assert healed.weight_bytes == by_id[base].weight_bytes < dense  # the adapters are merged in
        assert healed.details["train_tokens"] == by_id["dense-lora"].details["train_tokens"]
        in_engine = by_id[f"llamacpp-{base}"]
        assert in_engine.engine == "llama.cpp" and in_engine.baseline == "llamacpp-dense"
        assert in_engine.weight_bytes < by_id["llamacpp-dense"].weight_bytes


@pytest.mark.slow
def test_a_matrix_kernel_has_seconds_and_no_tokens(run_lesson, tiny_llama):
    found = run_lesson("deeper/05_sparsity", MODEL=tiny_llama)
    rows = {record.id: record for record in found.records}
    kernels = [record for record in rows.values() if record.sweep == "storage"]
    assert len(kernels) == 12
    for record in kernels:
        assert record.tokens_per_s is None and record.new_tokens is None
        assert (record.status == "ok") == bool(record.latency_s and record.weight_bytes)
        dense = f"dense-storage-{record.details['input_rows']}"
        assert record.baseline == (None if record.variant == dense else dense)
    half = rows["csr-50-storage-1"].weight_bytes / rows["dense-storage-1"].weight_bytes
    assert half == pytest.approx(1.0, abs=0.08)
    if rows["dense"].device == "cpu":
        assert rows["2:4-storage-1"].status == "unsupported" and rows["2:4-storage-1"].reason


@pytest.mark.slow
def test_wanda_zeroes_the_same_places_on_the_twin_and_magnitude_does_not(run_lesson, tiny_llama):
    found = run_lesson("deeper/05_sparsity", MODEL=tiny_llama)
    rows = {record.id: record for record in found.records}
    assert rows["wanda-50-twin"].details["same_places_share"] > 0.99
    assert rows["magnitude-50-twin"].details["same_places_share"] < 0.98
    for name in ("wanda-50", "sparsegpt-50", "wanda-2:4", "wanda-50-other-text"):
        assert rows[name].sweep == "sparsity" and rows[name].perplexity
        assert rows[name].details["zero_share"] == pytest.approx(0.5, abs=2e-3)
