"""What a model is made of, from its configuration alone: tensors by kind, parameters, and bytes in
every format.

The model is built on the meta device: shapes without weights. Sizes are bytes. The planner builds
on it.
"""

import copy
import difflib
import functools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from helpers import limits, memory, models

CONFIGS = Path(__file__).parent.parent / "data" / "configs"
# what llama.cpp's mixes give more bits in half of the layers: attn_v and ffn_down
FAVOURED = re.compile(r"\b(v_proj|down_proj)\b")


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
    chunk: float = math.inf  # prompt tokens that go through the model at once, all sequences
    share: float = 1.0  # of a card's memory that it takes, whatever the model needs
    repeats_heads: bool = False  # keys and values on every GPU where there are fewer heads
    words: int = 1  # the vocabulary is filled up to a multiple of these, before it is cut
    by_layers: bool = False  # several GPUs hold whole layers, unless one asks for more
    eager: bool = False  # a kernel launch for each operation, from Python
    kv_bytes: tuple[tuple[int, float], ...] = ()  # bits of a quantized cache: bytes a number
    casts_each_step: bool = False  # autocast is entered for each token: no copy is kept


ENGINES = {
    "transformers": Engine(expands_cache="falcon", eager=True),
    # its defaults (0.32): 92 % of the card, 8,192 tokens a step (16,384 or 2,048 on some cards);
    # FP8 is a byte, NVFP4 4 bits and a byte for each 16 numbers. CUDA graphs are not counted: it
    # measures what they take when it starts (`profile_cudagraph_memory`), and has no formula.
    "vllm": Engine(
        transient_copies=0,
        chunk=8192,
        share=0.92,
        repeats_heads=True,
        words=64,  # `DEFAULT_VOCAB_PADDING_SIZE`
        kv_bytes=((8, 1), (4, 9 / 16)),
    ),
    # LitGPT quantizes from fp16: in prefill the head is an fp16 copy and its bf16 cast; loading
    # int8 costs as much.
    "litgpt": Engine(
        unties=True,
        quantizes_head=True,
        expands_cache="*",
        shards_vocabulary=False,
        sequential_cache_item=4,
        transient_copies=2,
        eager=True,
        casts_each_step=True,  # as the article's loop does it
    ),
    "lit-llama": Engine(unties=True, quantizes_head=True, loads_in_16_bit=True, eager=True),
    "gpt-fast": Engine(quantizes_head=True, transient_copies=0),
    # n_ubatch 512; its cache types q8_0 and q4_0 are blocks of 32
    "llama.cpp": Engine(
        quantizes_head=True,
        transient_copies=0,
        rounds=False,
        by_layers=True,
        chunk=512,
        kv_bytes=((8, 34 / 32), (4, 18 / 32)),
    ),
}


class Technique(NamedTuple):
    """How weights are stored: for each tensor kept, its blocks' (values, bytes); values 0 is a
    whole row.

    item: bytes of a value that is not quantized, cached or passed between layers; engine: the one
    meant; better: the blocks of the tensors that llama.cpp's mixes favour, where they do;
    only_experts: a model with experts keeps the rest as it is.
    """

    parts: tuple[tuple[int, int], ...]
    item: int = 2
    engine: str = "transformers"
    better: tuple[tuple[int, int], ...] = ()
    only_experts: bool = False

    @property
    def quantized(self) -> bool:
        return self.parts[0] not in ((1, 4), (1, 2))


FP32, BITS16 = ((1, 4),), ((1, 2),)
Q8_0, Q6_K = ((32, 34),), ((256, 210),)
Q5_K, Q4_K = ((256, 176),), ((256, 144),)
# K-quants need rows of 256; where they are not, llama.cpp takes the next larger type of 32
INSTEAD = {Q6_K: Q8_0, Q5_K: ((32, 24),), Q4_K: ((32, 22),)}
GROUPS_OF_128 = ((2, 1), (128, 2), (256, 1))  # 4 bits; a 16-bit scale and a 4-bit zero a group
AUTOCAST = (*FP32, *BITS16)  # float32 weights and the 16-bit copies that autocast caches
BLOCKS_OF_64, DOUBLE = (
    ((2, 1), (64, 4)),
    ((2, 1), (64, 1), (64 * 256, 4)),
)  # bitsandbytes' 4 bits and their scales
NOT_IN_VLLM = ("fp16-autocast", "bf16-autocast", "int4-g32")
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
    "fp8": Technique(((1, 1), (0, 4)), engine="vllm"),
    "awq-g128": Technique(GROUPS_OF_128, engine="vllm"),
    "gptq-g128": Technique(GROUPS_OF_128, engine="vllm"),
    "mxfp4": Technique(((2, 1), (32, 1)), engine="vllm", only_experts=True),
    "nvfp4": Technique(((2, 1), (16, 1)), engine="vllm"),
    "int4-g32": Technique(((32, 20),), engine="gpt-fast"),
    "q8_0": Technique(Q8_0, engine="llama.cpp"),
    "q6_K": Technique(Q6_K, engine="llama.cpp"),
    "q5_K_M": Technique(Q5_K, engine="llama.cpp", better=Q6_K),
    "q4_K_M": Technique(Q4_K, engine="llama.cpp", better=Q6_K),
    "q5_1": Technique(((32, 24),), engine="llama.cpp"),
    "q5_0": Technique(((32, 22),), engine="llama.cpp"),
    "q4_1": Technique(((32, 20),), engine="llama.cpp"),
    "q4_0": Technique(((32, 18),), engine="llama.cpp"),
}


class Tensors(NamedTuple):
    """Tensors alike. kind: embedding, head, linear, experts, table (looked up: positions), or other
    (norms, biases, …). favoured: those of values and of the MLP's way back, which quantization
    hurts most.
    """

    kind: str
    rows: int
    columns: int
    favoured: bool
    count: int


class CacheLayer(NamedTuple):
    """What a layer's cache keeps of a sequence, in numbers.

    heads : key/value heads, 0 where it has none. position : of each position, all heads together.
    window : positions kept at most. state, float32_state : whatever the length, in the model's
    type and in float32 (convolutions, linear attention).
    """

    heads: int
    position: int
    window: float
    state: int
    float32_state: int

    def nbytes(
        self, tokens: int, bytes_per_number: int, bytes_per_position: float | None = None
    ) -> float:
        """bytes_per_position : of a number that the sequence lengthens (None: as of any)."""
        if bytes_per_position is None:
            bytes_per_position = bytes_per_number
        positions = self.position * min(tokens, self.window) * bytes_per_position
        return positions + self.state * bytes_per_number + self.float32_state * 4


class Model(NamedTuple):
    """What a configuration says of a model.

    experts_used : the fraction of the experts that one token reads. cache : None where it is not
    known. context : positions that it was made for, None where it does not say. own : the
    technique that its checkpoint is stored in, "" for plain floats. notes : what is not counted.
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
    cache: tuple[CacheLayer, ...] | None
    context: int | None = None
    own: str = ""
    notes: tuple[str, ...] = ()

    @property
    def attends(self) -> bool:
        """Has any layer a cache that grows? Where it is not known, it is taken to."""
        return self.cache is None or any(layer.position for layer in self.cache)


def nearest(name: str, known) -> str:
    """The three of `known` spelled most alike, for a sentence."""
    return ", ".join(difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0))


def choose(technique: str, engine: str | None) -> tuple[Technique, Engine]:
    """A technique and the engine that runs it (None: the one meant), by name. Raises ValueError in
    one sentence.
    """
    technique, usual = spelled(technique), usual_engine(technique, engine)
    if usual not in ENGINES:
        raise ValueError(
            f"{usual!r} is not known to the planner; the nearest are {nearest(usual, ENGINES)}."
        )
    meant = TECHNIQUES[technique].engine
    foreign = usual != meant and "llama.cpp" in (usual, meant)
    if foreign or (usual == "vllm" and technique in NOT_IN_VLLM):
        raise ValueError(f"{usual} does not run {technique}; its engine is {meant}.")
    return TECHNIQUES[technique], ENGINES[usual]


def spelled(technique: str) -> str:
    """The planner's name of a technique, given in any case. Raises ValueError in one sentence."""
    names = {name.lower(): name for name in TECHNIQUES}
    if technique.lower() not in names:
        raise ValueError(
            f"{technique!r} is not known to the planner; the nearest are "
            f"{nearest(technique, TECHNIQUES)}."
        )
    return names[technique.lower()]


def usual_engine(technique: str, engine: str | None) -> str:
    """The engine named, or the one meant for the technique."""
    return engine or TECHNIQUES[spelled(technique)].engine


def kv_bytes(engine: str, bits: int, item: int) -> float:
    """Bytes of a cached number. Raises ValueError (one sentence) for bits that the engine has
    not.
    """
    if bits == 16:
        return item
    known = dict(ENGINES[engine].kv_bytes)
    if bits not in known:
        with_them = [name for name, habits in ENGINES.items() if bits in dict(habits.kv_bytes)]
        others = " or ".join(with_them) or "16 bits"
        raise ValueError(f"{engine} has no KV cache of {bits} bits here: take {others}.")
    return known[bits]


def _read_config(name: str):
    """The configuration of a name: one written in the project, of a folder, or of the hub."""
    written = {path.stem: path for path in CONFIGS.glob("*.json")}
    if name.lower() in written:
        return AutoConfig.for_model(**json.loads(written[name.lower()].read_text()))
    try:
        return AutoConfig.from_pretrained(models.resolve(name, quantized=True))
    except Exception as error:  # what a configuration must not say raises many things
        reason = " ".join(str(error).replace("MODEL=", "").split())
        raise ValueError(
            f"{reason} Of those written in the project the nearest are {nearest(name, written)}."
        ) from error


def own_technique(config) -> str:
    """The technique that a checkpoint's `quantization_config` says it is stored in.

    "" for plain floats. Raises ValueError in one sentence for one that the planner does not know.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return ""
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(stored.get("quant_method"))
    bits, group = stored.get("bits"), stored.get("group_size")
    if method == "compressed-tensors":  # one scheme for all is the usual case
        weights = next(iter(stored.get("config_groups", {}).values()), {}).get("weights") or {}
        bits, group = weights.get("num_bits"), weights.get("group_size")
        method = "fp8" if (weights.get("type"), bits) == ("float", 8) else "gptq"
    if method in ("fp8", "fbgemm_fp8"):
        return "fp8"
    if method == "mxfp4":
        return "mxfp4"
    if method == "bitsandbytes" and stored.get("load_in_8bit"):
        return "int8"
    if method == "bitsandbytes":
        doubled = "-dq" if stored.get("bnb_4bit_use_double_quant") else ""
        return stored.get("bnb_4bit_quant_type", "fp4") + doubled
    if method in ("gptq", "awq") and (bits, group) == (4, 128):
        return f"{method}-g128"
    raise ValueError(
        f"Its checkpoint is quantized by {method} ({bits} bits, groups of {group}), which the "
        "planner does not know: it is planned as plain floats."
    )


def _first(config, *names: str, default):
    return next(
        (value for name in names if (value := getattr(config, name, None)) is not None), default
    )


def meta_model(config):
    """The model of a configuration on the meta device: shapes without weights, in bfloat16."""
    config = copy.deepcopy(config.get_text_config())
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="eager"
        ).eval()


def cache_layers(net) -> list[CacheLayer]:
    """What transformers' cache keeps, layer by layer: a model of `meta_model` is given two tokens.

    Raises ValueError in one sentence where that is not known.
    """
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            output = net(tokens, use_cache=True)
        cache = output.get("past_key_values", output.get("cache_params"))
        return [_cache_layer(layer) for layer in cache.layers]
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        kind = net.config.model_type
        raise ValueError(f"What a {kind} model caches for a sequence is not known.") from error


def _cache_layer(layer) -> CacheLayer:
    if type(layer).__module__ != "transformers.cache_utils":
        raise TypeError(f"{type(layer).__name__} is a cache of the model's own")
    keys = getattr(layer, "keys", None)
    grows = [keys, getattr(layer, "values", None), getattr(layer, "indexer_keys", None)]
    states = [
        *getattr(layer, "conv_states", {}).values(),
        *getattr(layer, "recurrent_states", {}).values(),
    ]
    state = 0
    wide = 0
    for tensor in filter(torch.is_tensor, states):
        if tensor.dtype == torch.float32:
            wide += tensor.numel()
        else:
            state += tensor.numel()
    return CacheLayer(
        heads=0 if keys is None else keys.shape[1],
        position=sum(tensor.numel() // 2 for tensor in filter(torch.is_tensor, grows)),
        # the newest token is not kept, but attended to beside what is
        window=getattr(layer, "sliding_window", math.inf) - 1,
        state=state,
        float32_state=wide,
    )


def kv_cache_bytes(
    config, tokens: int, batch_size: int = 1, bytes_per_number: int | None = None
) -> int:
    """Bytes that the cache holds: keys and values, or what linear and latent attention keep.

    Parameters
    ----------
    tokens : positions of every sequence; a sliding window keeps fewer.
    bytes_per_number : 4 for float32, 2 for 16 bit; by default that of the config's dtype.

    Raises ValueError in one sentence where the cache is not known.
    """
    if bytes_per_number is None:
        bytes_per_number = (config.get_text_config().dtype or torch.float32).itemsize
    layers = cache_layers(meta_model(config))
    return batch_size * sum(layer.nbytes(tokens, bytes_per_number) for layer in layers)


@functools.cache
def describe(name: str) -> Model:
    """Read a model from its configuration: one of `data/configs`, "auto", a local folder, or a name
    on the hub.

    Its tensors are counted by kind and shape, tied ones once. Raises ValueError (one sentence) when
    not found.
    """
    whole = _read_config(name)
    try:
        return _described(name, whole)
    except Exception as error:  # transformers checks few of the numbers that it multiplies
        raise ValueError(
            f"{name!r} ({whole.model_type}) is no causal language model that the planner can "
            f"build: {str(error).partition(chr(10))[0]}"
        ) from error


def _described(name: str, whole) -> Model:
    if whole.get_text_config().num_hidden_layers > 1000:  # each would be built
        raise ValueError("no model has so many layers.")
    net = meta_model(whole)
    config, shares = net.config, limits.read_shares(net)
    experts_used = min(filter(None, shares.values()), default=1)
    if not 0 < experts_used <= 1:
        raise ValueError("it uses none or more of its experts than there are.")
    embedding, head = net.get_input_embeddings().weight, net.get_output_embeddings().weight
    linear = {id(m.weight) for m in net.modules() if isinstance(m, (torch.nn.Linear, Conv1D))}

    def kind(parameter: torch.nn.Parameter) -> str:
        if parameter is embedding:
            return "embedding"
        if parameter is head:
            return "head"
        if parameter in shares:
            return "experts" if shares[parameter] else "table"
        return "linear" if id(parameter) in linear else "other"

    alike = Counter(
        (kind(p), p.numel() // p.shape[-1], p.shape[-1], bool(FAVOURED.search(where)))
        for where, p in net.named_parameters()
    )
    hidden, heads = config.hidden_size, _first(config, "num_attention_heads", default=1)
    try:
        cache = tuple(cache_layers(net))
    except ValueError:
        cache = None
    notes = _towers(whole)
    try:
        own = own_technique(whole)
    except ValueError as error:
        own, notes = "", [*notes, str(error)]
    return Model(
        Path(name).name,
        config.model_type,
        tuple(Tensors(*key, count) for key, count in alike.items()),
        head is embedding,
        config.num_hidden_layers,
        hidden,
        heads,
        memory.kv_heads(config) if heads > 1 else 1,
        _first(config, "head_dim", default=hidden // heads),
        _first(
            config, "intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", default=4 * hidden
        ),
        config.vocab_size,
        experts_used,
        cache,
        getattr(config, "max_position_embeddings", None),
        own,
        tuple(notes),
    )


def _towers(config) -> list[str]:
    """A sentence for each part of a model of several media that is not counted."""
    media = [name for name in ("vision", "audio") if hasattr(config, f"{name}_config")]
    return [f"Only the text model is counted: its {name} tower is not." for name in media]


def parameters(model: Model, untied: bool = False) -> dict[str, int]:
    """Parameter counts: embedding, head (0 if tied, unless `untied`), linear, experts, table,
    other, layer, total, read, prompt.

    linear and experts are the decoder's, layer their share in one layer; table: positions; other:
    norms, biases. read, prompt: those that a decode step reads, and that each prompt token goes
    through (`limits.read_shares`, `limits.prefill_limit`).
    """
    kinds = ("embedding", "head", "linear", "experts", "table", "other")
    found = Counter(dict.fromkeys(kinds, 0))
    for t in model.tensors:
        found[t.kind] += t.rows * t.columns * t.count
    tied = model.tied and not untied
    if untied and model.tied:
        found["head"] += found["embedding"]
    total = found.total()
    read = total - found["table"] - round((1 - model.experts_used) * found["experts"])
    if not tied:
        read -= found["embedding"]
    return {
        **found,
        "layer": (found["linear"] + found["experts"]) // model.layers,
        "total": total,
        "read": read,
        "prompt": read - found["embedding" if tied else "head"],
    }


def _parts(
    kind: str, columns: int, tied: bool, technique: Technique, engine: Engine
) -> tuple[tuple[int, int], ...]:
    """The blocks a tensor of this kind is stored in."""
    is_head = kind == "head" or (kind == "embedding" and tied)
    if technique.engine == "llama.cpp":
        if kind in ("table", "other"):  # norms stay in 32 bits
            return FP32
        parts = technique.parts
        if is_head and parts != Q8_0:  # the head has 6 bits or more
            parts = Q6_K
        return INSTEAD.get(parts, parts) if columns % 256 else parts
    if kind in ("linear", "experts") or (kind == "head" and engine.quantizes_head):
        return technique.parts
    return AUTOCAST if is_head and technique.parts == AUTOCAST else ((1, technique.item),)


def favoured_layers(layers: int) -> int:
    """Layers whose favoured tensors llama.cpp's M mixes store in the better type.

    The first and the last eighth, and every third between them (`use_more_bits` in its source).
    """
    first = layers // 8
    last = 7 * layers // 8
    return sum(i < first or i >= last or (i - first) % 3 == 2 for i in range(layers))


def allocated(nbytes: int) -> int:
    """What PyTorch's caching allocator gives: from 10 MiB on it asks for whole 2 MiB, and splits
    off over 1 MiB.
    """
    spare = -nbytes % 2**21
    return nbytes + (spare if nbytes >= 10 * 2**20 and spare <= 2**20 else -nbytes % 512)


def padded(words: int, engine: Engine) -> int:
    """A vocabulary as large as the engine stores it."""
    return -(-words // engine.words) * engine.words


def share(model: Model, gpus: int) -> float:
    """Fraction of the layers on the fullest of `gpus` that hold whole layers one after another."""
    return -(-model.layers // gpus) / model.layers


class Stored(NamedTuple):
    """Tensors alike as an engine keeps them: values in one, bytes of each part, how many."""

    kind: str
    values: int
    parts: tuple[int, ...]
    count: float


@functools.cache
def stored(
    model: Model, technique: Technique, engine: Engine, gpus: int = 1, split: str = "tensor"
) -> tuple[Stored, ...]:
    """The tensors that the fullest GPU holds; `split` as in `planner.memory`."""
    tensors, tied = list(model.tensors), model.tied and not engine.unties
    if model.tied and engine.unties:
        tensors += [t._replace(kind="head") for t in tensors if t.kind == "embedding"]
    if engine.repeats_heads and split == "tensor" and gpus > model.kv_heads:
        rows = 2 * (gpus - model.kv_heads) * model.head_dim  # a head of each on every GPU
        layers = sum(layer.heads > 0 for layer in model.cache or ())
        tensors.append(Tensors("linear", rows, model.hidden, False, layers))
    has_experts = any(t.kind == "experts" for t in tensors)
    better_share = favoured_layers(model.layers) / model.layers
    held = []
    for kind, rows, columns, favoured, count in tensors:
        vocabulary = kind in ("embedding", "head")
        is_cut = kind not in ("table", "other")
        if vocabulary:
            is_cut = engine.shards_vocabulary
            rows = padded(rows, engine)
        if split == "fsdp" or (split == "tensor" and is_cut):
            rows = -(-rows // gpus)
        if split == "sequential" and not vocabulary:
            count *= share(model, gpus)
        parts = _parts(kind, columns, tied, technique, engine)
        if technique.only_experts and has_experts and kind != "experts":
            parts = ((1, technique.item),)
        if favoured and technique.better and columns % 256 == 0:
            better = _sizes(rows * columns, columns, technique.better)
            held.append(Stored(kind, rows * columns, better, count * better_share))
            count *= 1 - better_share
        held.append(Stored(kind, rows * columns, _sizes(rows * columns, columns, parts), count))
    return tuple(held)


def _sizes(values: int, columns: int, parts: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """Bytes of each part of a tensor; a block of 0 values is a whole row."""
    return tuple(-(-values // (block or columns)) * nbytes for block, nbytes in parts)
