"""Lesson 05: masks, cuts and records of pruning."""

import math

import numpy as np
import pytest
import torch

from helpers import models

LESSON = "05_pruning"
HEADLINE = [
    "dense",
    "magnitude-50",
    "wanda-50",
    "wanda-2:4",
    "structured-20",
    "layers-20",
    "layers-20-lora",
    "dense-lora",
]


@pytest.fixture(scope="module")
def lesson(definitions):
    return definitions(LESSON)


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


def test_magnitude_is_a_threshold_a_layer(lesson, folder):
    before = {name: w.detach().clone() for name, w in weights(lesson, models.load(folder)).items()}
    for name, weight in weights(lesson, lesson["magnitude"](models.load(folder), 0.5)).items():
        size = np.abs(before[name].numpy())
        threshold = np.sort(size, axis=None)[int(size.size * 0.5)]
        assert np.array_equal((weight == 0).numpy(), size <= threshold)


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
    with torch.no_grad():
        hidden, kwargs = lesson["first_inputs"](net, ids)
        block = lesson["blocks"](net)[1]
        norms = lesson["input_norms"](
            block, lesson["through"](lesson["blocks"](net)[0], hidden, kwargs), kwargs
        )
        dense = lesson["mask_of"](block.mlp.down_proj.weight.abs() * norms["mlp.down_proj"], 0.5)
    pruned = lesson["wanda"](models.load(tiny_llama), ids, 0.5)
    assert not torch.equal(lesson["blocks"](pruned)[1].mlp.down_proj.weight == 0, dense)


def test_importance_is_the_sum_of_weight_times_gradient(lesson, folder, ids):
    net = models.load(folder)
    found = lesson["importances"](net, ids)
    for score, block in zip(found, lesson["blocks"](net), strict=True):
        for kind, (parts, units) in lesson["coupled"](block, net.config).items():
            assert score[kind].shape == (units,) and (score[kind] > 0).all()
            whole = sum((layer.weight * layer.weight.grad).abs().sum().item() for layer, _ in parts)
            assert float(score[kind].sum()) == pytest.approx(whole, rel=1e-4)
    parts, units = lesson["coupled"](lesson["blocks"](net)[0], net.config)["channels"]
    taylor = [(layer.weight * layer.weight.grad).abs().detach() for layer, _ in parts]
    third = sum(
        float(t[3].sum() if dim == 0 else t[:, 3].sum())
        for t, (_, dim) in zip(taylor, parts, strict=True)
    )
    assert float(found[0]["channels"][3]) == pytest.approx(third, rel=1e-4)


@pytest.mark.parametrize("portion", [0.1, 0.2, 0.3])
def test_a_cut_model_is_the_model_without_those_units(lesson, folder, ids, portion):
    """Removing a unit gives what zeroing the columns that it feeds gives; config and shapes agree
    after reload.
    """
    whole, cut = models.load(folder), models.load(folder)
    before = sum(p.numel() for p in lesson["blocks"](cut).parameters())
    scores = lesson["importances"](models.load(folder), ids)
    kept = lesson["plan"](cut, scores, portion)
    with torch.no_grad():
        for score, block in zip(scores, lesson["blocks"](whole), strict=True):
            for kind, (parts, units) in lesson["coupled"](block, whole.config).items():
                gone = score[kind].topk(units - kept[kind], largest=False).indices
                parts[-1][0].weight.view(len(parts[-1][0].weight), units, -1)[:, gone] = 0
    lesson["narrow"](cut, scores, portion)
    with torch.no_grad():
        torch.testing.assert_close(cut(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-5)
    removed = 1 - sum(p.numel() for p in lesson["blocks"](cut).parameters()) / before
    assert portion <= removed < portion + 0.07


def test_cut_models_are_ordinary_checkpoints(lesson, folder, ids, tmp_path):
    scores = lesson["importances"](models.load(folder), ids)
    alike = lesson["similarity"](models.load(folder), ids)
    small = {
        "width": lesson["narrow"](models.load(folder), scores, 0.3),
        "depth": lesson["shorten"](models.load(folder), alike, 0.3),
    }
    for name, model in small.items():
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            torch.testing.assert_close(
                models.load(str(tmp_path / name))(ids).logits, model(ids).logits
            )


def test_multi_query_attention_has_no_group_to_spare(lesson, tiny_falcon, tiny_llama):
    net = models.load(tiny_falcon)
    assert set(lesson["coupled"](lesson["blocks"](net)[0], net.config)) == {"channels"}
    net = models.load(tiny_llama)
    assert set(lesson["coupled"](lesson["blocks"](net)[0], net.config)) == {"channels", "groups"}


def test_similarity_is_the_cosine_of_what_the_model_itself_reports(lesson, tiny_llama, ids):
    net = models.load(tiny_llama)
    with torch.no_grad():
        states = net(ids, output_hidden_states=True).hidden_states
    expected = torch.nn.functional.cosine_similarity(states[0], states[1], dim=-1).mean()
    assert lesson["similarity"](net, ids)[0] == pytest.approx(float(expected), abs=1e-5)


def test_the_most_similar_layers_go_and_the_order_stays(lesson, folder):
    net = models.load(folder)
    _, second = lesson["blocks"](net)
    short = lesson["shorten"](net, [0.9, 0.1], 0.5)
    assert list(lesson["blocks"](short)) == [second] and short.config.num_hidden_layers == 1
    assert lesson["dropped"]([0.5, 0.9, 0.1, 0.8, 0.2], 0.4) == [3, 1]


def test_tuning_learns_and_leaves_an_ordinary_model(lesson, folder, ids):
    net = models.load(folder)
    embedding = net.get_input_embeddings().weight.detach().clone()
    names = {name for name, _ in net.named_parameters()}
    tuned, losses = lesson["tune"](net, [ids] * 8, 1e-2, 4)
    assert losses[-1] < losses[0] - 0.05
    assert {name for name, _ in tuned.named_parameters()} == names
    assert torch.equal(tuned.get_input_embeddings().weight, embedding)


def test_stored_forms_multiply_alike_and_take_what_they_say(lesson):
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    w = w.masked_fill(lesson["mask_of"](w.abs(), 0.5), 0)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    expected = {
        "as_dense": w.nbytes,
        "as_csr": 33 * 4 + 1024 * (4 + 4),
        "as_bitmask": 1024 * 4 + w.numel() // 8,
    }
    for name, size in expected.items():
        parts, multiply = lesson[name](w)
        torch.testing.assert_close(multiply(x), x @ w.T, rtol=1e-5, atol=1e-5)
        assert sum(part.nbytes for part in parts) == size, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without the kernel says")
def test_no_two_four_kernel_is_said(lesson):
    with pytest.raises(NotImplementedError, match="compute capability"):
        lesson["as_two_four"](torch.ones(32, 64))


def test_recovery_is_counted_against_the_tuned_dense_model(lesson):
    found = lesson["recovered"](0.8, 0.3, -0.1)
    assert found["recovered_share"] == pytest.approx(5 / 9)
    assert found["recovered_beyond_domain_share"] == pytest.approx(0.5)
    both_gained_alike = lesson["recovered"](0.8, 0.8 - 0.1, -0.1)
    assert both_gained_alike["recovered_beyond_domain_share"] == pytest.approx(0.0)


@pytest.mark.parametrize("which", ["auto", pytest.param("tiny_falcon", marks=pytest.mark.slow)])
def test_the_lesson_finds(run_lesson, request, which):
    found = run_lesson(LESSON, MODEL=which if which == "auto" else request.getfixturevalue(which))
    by_id = {r.id: r for r in found.records}
    headline = [r for r in found.records if r.sweep is None]
    assert [r.variant for r in headline] == HEADLINE
    assert all(
        r.status == "ok" and r.perplexity and r.peak_bytes and r.tokens_per_s for r in headline
    )
    assert {r.sweep for r in found.records} == {None, "sparsity", "share", "storage"}
    dense = by_id["dense"].weight_bytes
    for name in ("magnitude-50", "wanda-50", "wanda-2:4", "dense-lora"):
        assert by_id[name].weight_bytes == dense
    assert by_id["layers-20"].weight_bytes == by_id["layers-20-lora"].weight_bytes < dense
    assert by_id["structured-20"].weight_bytes < dense
    assert by_id["wanda-2:4"].details["zero_share"] == pytest.approx(0.5, abs=2e-3)
    for name in ("structured-20", "layers-20"):
        assert by_id[name].details["reload_same"] is True
    half = by_id["csr-50-storage-1"].weight_bytes / by_id["dense-storage-1"].weight_bytes
    assert half == pytest.approx(1.0, abs=0.08)
    if by_id["dense"].device == "cpu":
        assert by_id["2:4-storage-1"].status == "unsupported" and by_id["2:4-storage-1"].reason


def test_a_matrix_kernel_has_seconds_and_no_tokens(run_lesson):
    rows = [r for r in run_lesson(LESSON, MODEL="auto").records if r.sweep == "storage"]
    assert len(rows) == 12
    for r in rows:
        assert r.tokens_per_s is None and r.prefill_tokens_per_s is None and r.new_tokens is None
        assert (r.status == "ok") == bool(r.latency_s and r.weight_bytes)
        assert r.baseline == (None if r.variant == "dense" else f"dense-storage-{input_rows(r)}")
        assert r.status != "ok" or r.baseline is None or r.speedup


def input_rows(record) -> int:
    return record.details["input_rows"]


def test_every_share_is_paired_with_the_dense_model_of_its_own_race(run_lesson):
    by_id = {r.id: r for r in run_lesson(LESSON, MODEL="auto").records}
    dense = by_id["dense-share"]
    for r in by_id.values():
        if r.sweep == "share" and r is not dense:
            assert r.baseline == "dense-share"
            assert [pair.baseline_s for pair in r.pairs] == dense.latency_s
            assert r.eval_tokens == dense.eval_tokens


def test_on_a_real_model_wanda_beats_magnitude(run_lesson):
    by_id = {r.id: r for r in run_lesson(LESSON, MODEL="auto").records}
    assert by_id["wanda-50"].perplexity < by_id["magnitude-50"].perplexity
    assert by_id["dense"].perplexity < by_id["wanda-50"].perplexity
    removed = [
        by_id[f"{name}-share"].details["removed_share"]
        for name in ("layers-10", "layers-20", "layers-30")
    ]
    assert removed == pytest.approx([0.1, 0.2, 0.3], abs=0.01)
