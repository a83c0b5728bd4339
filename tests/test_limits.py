"""limits: arithmetic of the limits, what a step reads, plausible measurements."""

import pytest
import torch
import transformers

from helpers import limits, memory

SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
EXPERT = 3 * 64 * 32  # parameters of an expert: gate, up and down
TABLE = 1000 * 64
# of models with 2 layers: the configuration, parameters that a step need not read, and those that
# a prompt token does not go through
READ = {
    "tied": (transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True), 0, TABLE),
    "untied": (transformers.GPTNeoXConfig(**SHAPE), TABLE, 2 * TABLE),
    "positions": (
        transformers.GPT2Config(
            vocab_size=1000, n_embd=64, n_layer=2, n_head=4, n_positions=128, eos_token_id=2
        ),
        128 * 64,
        TABLE + 128 * 64,
    ),
    "1 of 8 experts": (
        transformers.MixtralConfig(
            **SHAPE | {"intermediate_size": 32},
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=1,
            tie_word_embeddings=True,
        ),
        2 * 7 * EXPERT,
        2 * 7 * EXPERT + TABLE,
    ),
    "2 of 6 experts, a shared one": (
        transformers.Qwen2MoeConfig(
            **SHAPE,
            num_key_value_heads=4,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=128,
            tie_word_embeddings=True,
        ),
        2 * 4 * EXPERT,
        2 * 4 * EXPERT + TABLE,
    ),
    "a dense layer before 3 of 8 experts": (
        transformers.DeepseekV3Config(
            **SHAPE,
            num_key_value_heads=4,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
            tie_word_embeddings=False,
        ),
        5 * EXPERT + TABLE,
        5 * EXPERT + 2 * TABLE,
    ),
    "2 of 8 experts by another name": (
        transformers.AriaTextConfig(
            **SHAPE | {"intermediate_size": 32},
            num_key_value_heads=4,
            moe_num_experts=8,
            moe_topk=2,
            moe_num_shared_experts=1,
            pad_token_id=2,
            tie_word_embeddings=True,
        ),
        2 * 6 * EXPERT,
        2 * 6 * EXPERT + TABLE,
    ),
}


def made(config):
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("case", READ)
def test_a_step_reads_what_is_in_use(case):
    config, unread, not_gone_through = READ[case]
    net = made(config)
    total = sum(parameter.numel() for parameter in net.parameters())
    assert limits.decode_bytes(net) == 4 * (total - unread)
    assert limits.prefill_parameters(net) == total - not_gone_through
    assert limits.decode_bytes(net.bfloat16()) == 2 * (total - unread)


@pytest.mark.parametrize("case", [case for case in READ if "experts" in case])
def test_the_router_picks_as_many_experts_as_are_counted(case):
    net = made(READ[case][0])
    shares = limits.read_shares(net)
    picked = []
    for module in net.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(
                lambda experts, given: picked.append(
                    (given[1].unique().numel(), next(experts.parameters()))
                )
            )
    with torch.no_grad():
        net(torch.tensor([[5]]))
    assert picked
    for count, experts in picked:
        assert shares[experts] * len(experts) == pytest.approx(count)


def test_launches_are_found_among_a_profile():
    calls = {
        "cudaLaunchKernel": 100,
        "cudaLaunchKernelExC": 20,
        "cuLaunchKernel": 3,
        "cuLaunchKernelEx": 4,
        "cudaGraphLaunch": 1,
        "cudaMemcpyAsync": 1000,
        "cudaStreamSynchronize": 1000,
        "aten::linear": 1000,
        "void cudaLaunchKernel_test<float>": 1000,
    }
    assert limits.launches_among(calls) == 128


def test_a_cpu_has_no_launches_to_count():
    assert limits.launches(made(READ["tied"][0])) is None


def test_decode_limit_counts_weights_once_and_every_cache():
    assert limits.decode_limit(100, bandwidth=1000) == 10
    assert limits.decode_limit(100 + 300, bandwidth=1000, batch_size=4) == 10


def test_prefill_limit_is_two_operations_a_parameter():
    assert limits.prefill_limit(50, flops=1000) == 10


def test_roofline_bends_where_the_ceilings_meet():
    intensity = torch.tensor([1.0, 5.0, 10.0, 100.0])
    assert limits.roofline(intensity, bandwidth=10, flops=100).tolist() == [10, 50, 100, 100]


def test_bandwidth_keeps_its_samples_and_its_best():
    probe = limits.Bandwidth(nbytes=64_000_000)
    probe(), probe()
    assert len(probe.samples) == 2 and probe.best == max(probe.samples)
    assert 1e8 < probe.best < 1e13


def test_compute_is_plausible():
    assert 1e8 < limits.compute_flops(size=256) < 1e16


def test_the_probe_lets_go_of_its_array():
    memory.free()
    before = memory.resident_bytes()
    limits.Bandwidth(nbytes=400_000_000)()
    memory.free()
    assert memory.resident_bytes() - before < 100_000_000


def test_a_cpu_launches_nothing():
    assert limits.launch_s("cpu") is None
