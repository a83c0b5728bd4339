"""A transformers model as a GGUF file, for lesson 03: header, tensors under llama.cpp's names,
their bytes before it is written, and the way back.

Which type each tensor gets is the caller's choice: that is the quantization, and it stands in the
lesson.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch

from helpers import memory
from helpers.series.anatomy import Model

ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "falcon": "FALCON",
}  # as the gguf package names them
SCORED_WITH = "weights rebuilt as floats, in transformers"


def refuse(config) -> None:
    """Raises NotImplementedError for an architecture that is not described here."""
    if (
        config.model_type not in ARCHITECTURES
        or getattr(config, "alibi", False)
        or getattr(config, "new_decoder_architecture", False)
        or config.rope_parameters["rope_type"] != "default"
    ):
        raise NotImplementedError(
            f"this lesson writes no GGUF for this kind of {config.model_type} model; "
            "llama.cpp's converter may"
        )


def write_header(writer: gguf.GGUFWriter, config, end_id: int) -> None:
    """The architecture, and token ids instead of words: tokenization stays with transformers."""
    heads, falcon = config.num_attention_heads, config.model_type == "falcon"
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_hidden_size if falcon else config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(memory.kv_heads(config))
    if falcon:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)  # of a model with heads cut out it is not width ÷ heads
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_merges(["< 0"])
    writer.add_eos_token_id(end_id)  # llama.cpp stops at it


def pair_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from halves (0 1 2 | 3 4 5) to pairs (0 3 | 1 4 | 2 5), as llama.cpp's
    rotary embedding wants LLaMA's queries and keys.
    """
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def part(name: str) -> str:
    """What `type_of` is told of a tensor: "token_embd" for embedding and head, else "blk"."""
    return "token_embd" if "embed" in name or "lm_head" in name else "blk"


def pack(model, type_of: Callable) -> dict:
    """The codes of every parameter, by name, with their type; `type_of(name, shape)` chooses it."""
    codes = {}
    for name, p in model.named_parameters():
        kind = type_of(part(name), p.shape)
        codes[name] = gguf.quantize(p.detach().float().cpu().numpy(), kind), kind
    return codes


@torch.no_grad()
def rebuild(model, type_of: Callable):
    """The model, its parameters overwritten with the floats that a file's codes stand for."""
    for name, p in model.named_parameters():
        kind = type_of(part(name), p.shape)
        codes = gguf.quantize(p.detach().float().cpu().numpy(), kind)
        p.copy_(torch.from_numpy(gguf.dequantize(codes, kind)))
    return model


def file_bytes(shape: Model, type_of: Callable, read: bool = False) -> int:
    """Bytes of a file's tensors, from a model's configuration.

    read : only those that a decode step reads, an embedding that is no head too left out.
    """
    total = 0
    for tensor in shape.tensors:
        if read and tensor.kind == "embedding" and not shape.tied:
            continue
        size = (tensor.rows, tensor.columns) if tensor.rows > 1 else (tensor.columns,)
        name = "token_embd" if tensor.kind in ("embedding", "head") else "blk"
        values, nbytes = gguf.GGML_QUANT_SIZES[type_of(name, size)]
        total += tensor.count * (tensor.rows * tensor.columns // values * nbytes)
    return total


def packed_bytes(model, type_of: Callable) -> int:
    """Bytes of all codes of a model, before they are made."""
    total = 0
    for name, p in model.named_parameters():
        values, nbytes = gguf.GGML_QUANT_SIZES[type_of(part(name), p.shape)]
        total += p.numel() // values * nbytes
    return total


def check_room(nbytes: int, folder: Path) -> None:
    """Raises MemoryError where codes of so many bytes do not fit: in memory twice, as codes here
    and in the engine, and once on the disk.
    """
    rooms = {
        "memory": (2 * nbytes, memory.available_bytes()),
        "disk": (nbytes, shutil.disk_usage(folder).free),
    }
    for room, (needed, free) in rooms.items():
        if needed > free:
            raise MemoryError(
                f"needs {needed / 1e9:.1f} GB of {room}, {free / 1e9:.1f} GB are there"
            )


def unlikely(model, prompt: torch.Tensor) -> int:
    """The token that the model is least likely to say after a prompt: a harmless end, since
    llama.cpp wants one.
    """
    with torch.no_grad():
        return int(model(prompt.to(model.device)).logits[0, -1].argmin())


def write(codes: dict, model, path: Path, prompt: torch.Tensor) -> int:
    """Write what `pack` made of a model. Returns the bytes of all tensors; what cannot be described
    is refused.

    prompt : token ids that will be continued, for the end-of-text token.
    """
    config = model.config
    refuse(config)
    architecture, total = ARCHITECTURES[config.model_type], 0
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], config.num_hidden_layers)
    heads = (
        {}
        if config.model_type == "falcon"
        else {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    )
    writer = gguf.GGUFWriter(path, architecture.lower())
    write_header(writer, config, unlikely(model, prompt))
    for name, (array, kind) in codes.items():
        reader = name.split(".")[-2]
        array = pair_rows(array, heads[reader]) if reader in heads else array
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), array, raw_dtype=kind)
        total += array.nbytes
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()
    return total
