"""What a model is made of, from its configuration alone: tensors by kind, parameters, and bytes in
every format.

The model is built on the meta device: shapes without weights. Sizes are bytes. The planner builds
on it.
"""

import difflib
import functools
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from helpers import models

CONFIGS = Path(__file__).parent.parent / "data" / "configs"


class Engine(NamedTuple):
    """An engine's habits: what it does with memory that no configuration says."""

    unties: bool = False  # keeps a head of its own where the model ties it to the embedding
    quantizes_head: bool = False
    expands_cache: str = (
        ""  # model type ("*": all) whose shared keys and values are cached once for every head
    )
    shards_vocabulary: bool = True  # tensor parallelism splits embedding and head too
    sequential_cache_item: int = (
        2  # bytes of a cached value when layers lie on GPUs one after another
    )
    transient_copies: int = 1  # 16-bit copies of the largest quantized tensor alive at once
    loads_in_16_bit: bool = False  # the whole model, before any of it is quantized
    rounds: bool = True  # allocates as PyTorch does


ENGINES = {
    "transformers": Engine(expands_cache="falcon"),
    # LitGPT quantizes from fp16: in prefill the head is an fp16 copy and its bf16 cast; loading
    # int8 costs as much.
    "litgpt": Engine(
        unties=True,
        quantizes_head=True,
        expands_cache="*",
        shards_vocabulary=False,
        sequential_cache_item=4,
        transient_copies=2,
    ),
    "lit-llama": Engine(unties=True, quantizes_head=True, loads_in_16_bit=True),
    "gpt-fast": Engine(quantizes_head=True, transient_copies=0),
    "llama.cpp": Engine(quantizes_head=True, transient_copies=0, rounds=False),
}


class Technique(NamedTuple):
    """How weights are stored: for each tensor kept, its blocks' (values, bytes); values 0 is a
    whole row.

    item: bytes of a value that is not quantized, cached or passed between layers; engine: the one
    meant.
    """

    parts: tuple[tuple[int, int], ...]
    item: int = 2
    engine: str = "transformers"

    @property
    def quantized(self) -> bool:
        return self.parts[0] not in ((1, 4), (1, 2))


FP32, BITS16 = ((1, 4),), ((1, 2),)
Q8_0, Q6_K = ((32, 34),), ((256, 210),)
AUTOCAST = (*FP32, *BITS16)  # float32 weights and the 16-bit copies that autocast caches
BLOCKS_OF_64, DOUBLE = (
    ((2, 1), (64, 4)),
    ((2, 1), (64, 1), (64 * 256, 4)),
)  # bitsandbytes' 4 bits and their scales
TECHNIQUES = {
    "fp32": Technique(FP32, 4),
    "fp16": Technique(BITS16),
    "bf16": Technique(BITS16),
    "fp16-autocast": Technique(AUTOCAST, 4),
    "bf16-autocast": Technique(AUTOCAST, 4),
    "int8": Technique(((1, 1), (0, 4))),
    "nf4": Technique(BLOCKS_OF_64),
    "nf4-dq": Technique(DOUBLE),
    "fp4": Technique(BLOCKS_OF_64),
    "fp4-dq": Technique(DOUBLE),
    "int4-g32": Technique(((32, 20),), engine="gpt-fast"),
    "q8_0": Technique(Q8_0, engine="llama.cpp"),
    "q5_1": Technique(((32, 24),), engine="llama.cpp"),
    "q5_0": Technique(((32, 22),), engine="llama.cpp"),
    "q4_1": Technique(((32, 20),), engine="llama.cpp"),
    "q4_0": Technique(((32, 18),), engine="llama.cpp"),
}


class Tensors(NamedTuple):
    """Tensors alike. kind: embedding, head, linear, experts, or other (norms, biases, …)."""

    kind: str
    rows: int
    columns: int
    count: int


class Model(NamedTuple):
    """What a configuration says of a model; `experts_used` is the fraction of the experts that one
    token reads.
    """

    name: str
    type: str
    tensors: tuple[Tensors, ...]
    tied: bool
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    experts_used: float


def nearest(name: str, known) -> str:
    """The three of `known` spelled most alike, for a sentence."""
    return ", ".join(difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0))


def choose(technique: str, engine: str | None) -> tuple[Technique, Engine]:
    """A technique and the engine that runs it (None: the one meant), by name. Raises ValueError in
    one sentence.
    """
    for name, known in ((technique, TECHNIQUES), (engine or "transformers", ENGINES)):
        if name not in known:
            raise ValueError(
                f"{name!r} is not known to the planner; the nearest are {nearest(name, known)}."
            )
    usual = TECHNIQUES[technique].engine
    if engine not in (None, usual) and "llama.cpp" in (engine, usual):
        raise ValueError(f"{engine} does not run {technique}; its engine is {usual}.")
    return TECHNIQUES[technique], ENGINES[engine or usual]


def _meta(name: str):
    """(configuration, model on the meta device) of a name."""
    written = {path.stem: path for path in CONFIGS.glob("*.json")}
    try:
        if name.lower() in written:
            config = AutoConfig.for_model(**json.loads(written[name.lower()].read_text()))
        else:
            config = AutoConfig.from_pretrained(
                models.resolve(name, quantized=True)
            ).get_text_config()
        vars(config).pop("quantization_config", None)
        with torch.device("meta"):
            return config, AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} is no causal language model in a folder here or reachable on the hub; of "
            f"those written in the project the nearest are {nearest(name, written)}."
        ) from error


def _first(config, *names: str, default):
    return next(
        (value for name in names if (value := getattr(config, name, None)) is not None), default
    )


def _kv_heads(config) -> int:
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return 1
    return _first(config, "num_kv_heads", "num_key_value_heads", default=config.num_attention_heads)


@functools.cache
def describe(name: str) -> Model:
    """Read a model from its configuration: one of `data/configs`, "auto", a local folder, or a name
    on the hub.

    Its tensors are counted by kind and shape, tied ones once. Raises ValueError (one sentence) when
    not found.
    """
    config, net = _meta(name)
    embedding, head = net.get_input_embeddings().weight, net.get_output_embeddings().weight
    linear = {id(m.weight) for m in net.modules() if isinstance(m, (torch.nn.Linear, Conv1D))}

    def kind(parameter: torch.nn.Parameter) -> str:
        if parameter is embedding:
            return "embedding"
        if parameter is head:
            return "head"
        if id(parameter) in linear:
            return "linear"
        return "experts" if parameter.ndim == 3 else "other"

    alike = Counter((kind(p), p.numel() // p.shape[-1], p.shape[-1]) for p in net.parameters())
    hidden, heads = config.hidden_size, config.num_attention_heads
    experts = _first(config, "num_local_experts", "num_experts", "n_routed_experts", default=1)
    tensors = tuple(Tensors(*key, count) for key, count in alike.items())
    return Model(
        Path(name).name,
        config.model_type,
        tensors,
        head is embedding,
        config.num_hidden_layers,
        hidden,
        heads,
        _kv_heads(config),
        _first(config, "head_dim", default=hidden // heads),
        _first(
            config, "intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", default=4 * hidden
        ),
        config.vocab_size,
        _first(config, "num_experts_per_tok", default=experts) / experts,
    )


def parameters(model: Model, untied: bool = False) -> dict[str, int]:
    """Parameter counts: embedding, head (0 if tied, unless `untied`), linear, experts, other,
    layer, total.

    linear and experts are the decoder's, layer their share in one layer; other: norms, biases,
    positions.
    """
    found = Counter(dict.fromkeys(("embedding", "head", "linear", "experts", "other"), 0))
    for t in model.tensors:
        found[t.kind] += t.rows * t.columns * t.count
    if untied and model.tied:
        found["head"] += found["embedding"]
    return {
        **found,
        "layer": (found["linear"] + found["experts"]) // model.layers,
        "total": found.total(),
    }


def _parts(
    kind: str, columns: int, tied: bool, technique: Technique, engine: Engine
) -> tuple[tuple[int, int], ...]:
    """The blocks a tensor of this kind is stored in."""
    is_head = kind == "head" or (kind == "embedding" and tied)
    if technique.engine == "llama.cpp":
        if kind == "other":  # norms stay in 32 bits
            return FP32
        if not is_head:
            return technique.parts
        # the head has 6 bits or more; a Q6_K block has 256 columns
        return Q8_0 if technique.parts == Q8_0 or columns % 256 else Q6_K
    if kind in ("linear", "experts") or (kind == "head" and engine.quantizes_head):
        return technique.parts
    return AUTOCAST if is_head and technique.parts == AUTOCAST else ((1, technique.item),)


def allocated(nbytes: int) -> int:
    """What PyTorch's caching allocator gives: from 10 MiB on it asks for whole 2 MiB, and splits
    off over 1 MiB.
    """
    spare = -nbytes % 2**21
    return nbytes + (spare if nbytes >= 10 * 2**20 and spare <= 2**20 else -nbytes % 512)


def share(model: Model, gpus: int) -> float:
    """Fraction of the layers on the fullest of `gpus` that hold whole layers one after another."""
    return -(-model.layers // gpus) / model.layers


class Stored(NamedTuple):
    """Tensors alike as an engine keeps them: values in one, bytes of each part, how many."""

    kind: str
    values: int
    parts: list[int]
    count: float


def stored(
    model: Model, technique: Technique, engine: Engine, gpus: int = 1, split: str = "tensor"
) -> list[Stored]:
    """The tensors that the fullest GPU holds; `split` as in `planner.memory`."""
    tensors, tied = list(model.tensors), model.tied and not engine.unties
    if model.tied and engine.unties:
        tensors += [t._replace(kind="head") for t in tensors if t.kind == "embedding"]
    found = []
    for kind, rows, columns, count in tensors:
        vocabulary = kind in ("embedding", "head")
        if split == "fsdp" or (
            split == "tensor" and (engine.shards_vocabulary if vocabulary else kind != "other")
        ):
            rows = -(-rows // gpus)
        if split == "sequential" and not vocabulary:
            count *= share(model, gpus)
        sizes = [
            -(-rows * columns // (values or columns)) * nbytes
            for values, nbytes in _parts(kind, columns, tied, technique, engine)
        ]
        found.append(Stored(kind, rows * columns, sizes, count))
    return found
