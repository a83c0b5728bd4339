"""The off-grid twin of lesson 03: the same function, its weights on no old quantization grid.

The embedded model's weights were 4-bit once, so that a scheme on that grid looks lossless. In the
twin every input channel of the matrices has another size, which what comes before takes back.
"""

import copy

import torch

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")  # norms that multiply by their weight


def from_norm(norm, readers: list, factors: torch.Tensor) -> None:
    """Multiply the input channels of all readers of a norm; the norm takes it back."""
    norm.weight /= factors
    for reader in readers:
        reader.weight *= factors


def from_rows(writer, reader, factors: torch.Tensor, head_size: int) -> None:
    """Multiply the reader's input channels; the writer's rows take it back.

    Query heads that share a key/value head read the same rows of v: they share its factors.
    """
    writer.weight /= factors[:, None]
    if writer.bias is not None:
        writer.bias /= factors
    heads_in_group = reader.in_features // writer.out_features
    shared = factors.view(-1, head_size).repeat_interleave(heads_in_group, 0)
    reader.weight *= shared.flatten()


@torch.no_grad()
def off_grid_twin(model, seed: int = 0, scale: float = 0.1):
    """A copy of a LLaMA-like model: the same function up to rounding, each input channel of q, k,
    v, o, gate, up and down times exp(scale · normal). Embedding and head stay as they are.

    Raises NotImplementedError for other architectures.
    """
    kind = model.config.model_type
    if kind not in LLAMA_LIKE:
        raise NotImplementedError(
            f"no off-grid twin for the architecture {kind!r}: it is written for LLaMA-like models."
        )
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)

    def factors(like: torch.Tensor) -> torch.Tensor:
        return torch.exp(scale * torch.randn(len(like), generator=generator)).to(like)

    for layer in twin.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        norm = layer.input_layernorm
        readers = [attention.q_proj, attention.k_proj, attention.v_proj]
        from_norm(norm, readers, factors(norm.weight))
        norm = layer.post_attention_layernorm
        from_norm(norm, [mlp.gate_proj, mlp.up_proj], factors(norm.weight))
        v, o = attention.v_proj, attention.o_proj
        from_rows(v, o, factors(v.weight), attention.head_dim)
        up, down = mlp.up_proj, mlp.down_proj
        from_rows(up, down, factors(up.weight), up.out_features)
    return twin
