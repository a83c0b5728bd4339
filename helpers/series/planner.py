"""Will it fit, and how fast can it be? A model's memory and speed on GPUs, before anything is
loaded. `helpers.series.advice` says it in words.

No term of memory is fitted to measurements: each is what a format or an engine's source says
(LitGPT, bitsandbytes, llama.cpp, PyTorch's allocator and FSDP; that LitGPT's prefill holds two
copies of the head was found from a fit), so that published peaks are a test, and the worst distance
from them is the error shown beside every answer. Limits of speed follow from bytes and operations;
what to expect below them comes from published speeds. Sizes are bytes; GB is 1e9 of them.
"""

import functools
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    from helpers.series import command  # before anything large

    sys.exit(command.main())

import pandas as pd

from helpers.series import anatomy, cards
from helpers.series.anatomy import (
    ENGINES,
    TECHNIQUES,
    Engine,
    Model,
    Stored,
    Technique,
    describe,
    parameters,
)
from helpers.series.cards import any_other, gpu, gpus

__all__ = ["Model", "any_other", "describe", "gpu", "gpus", "parameters"]  # and what stands below

DATA = Path(__file__).parent.parent / "data"
CUBLAS_BYTES = (
    8_519_680  # PyTorch's default cuBLAS workspace, :4096:2:16:8 in KiB (32 MiB on Hopper)
)
CONTEXT_BYTES = 500_000_000  # about what CUDA's context and kernels take beside PyTorch's allocator
SPLITS = ("tensor", "sequential", "fsdp")
FLOATS = ("fp32", "fp16", "bf16")
TWICE_AS_FAST = ("int8", "fp8")  # products of 8 bits, where a card has them: the ceiling allows it
# how the published figures were taken: source, model, engine, tokens of the prompt, tokens in all
RUNS = (
    ("article.txt", "falcon", "litgpt", 7, 57),
    ("article.txt", "llama-7b", "lit-llama", 7, 57),
    ("litgpt", "", "litgpt", 8, 264),
    ("LLM-Pruner", "", "transformers", 64, 64),
    ("gpt-fast", "", "gpt-fast", 1, 1),
    ("bitsandbytes", "", "transformers", 1, 1),  # lengths not stated; speed only
    ("Qwen2.5", "", "transformers", 1, 2049),
)
UNITS = {"GB": 1e9, "MiB": 2**20, "GiB": 2**30}
MOST_REQUESTS = 4096  # more at once are not looked for


def kv_cache(
    model: Model,
    batch: int = 1,
    length: int = 2048,
    item: int = 2,
    engine: Engine = ENGINES["gpt-fast"],
    gpus: int = 1,
    position_bytes: float | None = None,
) -> float:
    """Bytes that a GPU caches for `length` tokens of every sequence: keys and values, of a window
    or latent where the model's are, and the states of layers that have none.

    Tensor parallelism over `gpus` cuts heads, never states. position_bytes : of a number that the
    sequence lengthens, where the cache is quantized. Raises ValueError in one sentence where it is
    not known what the model caches.
    """
    if model.cache is None:
        raise ValueError(f"What {model.name} caches for a sequence is not known to the planner.")
    total = 0
    for layer in model.cache:
        position = layer.position
        if layer.heads:
            position = position // layer.heads * _cached_heads(layer.heads, model, engine, gpus)
        total += layer._replace(position=position).nbytes(length, item, position_bytes)
    return batch * total


def _cached_heads(heads: int, model: Model, engine: Engine, gpus: int) -> int:
    """Key/value heads that a GPU caches, of a layer that has `heads` in transformers' cache."""
    if model.type == ENGINES["transformers"].expands_cache:
        heads = model.kv_heads
    cut = max(1, heads // gpus)
    return model.heads // gpus if cut > 1 and engine.expands_cache in ("*", model.type) else cut


def memory(
    model: Model,
    technique: str,
    *,
    engine: str | None = None,
    batch: int = 1,
    length: int = 2048,
    prompt: int | None = None,
    gpus: int = 1,
    split: str = "tensor",
    chunk: int | None = None,
    kv_bits: int = 16,
) -> dict[str, int]:
    """Peak bytes on the fullest GPU, term by term, and their total.

    Parameters
    ----------
    length, prompt : tokens cached for each sequence, and tokens of its prompt (None: all of them).
    split : "tensor" (layers cut), "sequential" (whole layers), "fsdp" (all cut; the root and two
        layers gathered).
    chunk : tokens that are prefilled at once, all sequences together (None: the engine's habit;
        transformers takes all of them unless `generate` is given `prefill_chunk_size`).
    kv_bits : 16 (a cached number is stored as weights that are not quantized), 8 or 4.

    The terms: weights; what the allocator rounds up; keys and values; working memory (cuBLAS, two
    hidden states and three MLP states of the tokens prefilled at once, the MLP's cut under tensor
    parallelism; the last logits twice in float32); what quantizing holds for a moment; what FSDP
    gathers. Raises ValueError for anything else.
    """
    t, e = anatomy.choose(technique, engine)
    smallest = min(batch, length, gpus, chunk or 1, prompt or 1)
    if smallest < 1 or split not in SPLITS:
        raise ValueError(
            f"batch, length and gpus start at 1, and split is one of {', '.join(SPLITS)}."
        )
    tensors = anatomy.stored(model, t, e, gpus, split)
    weights = sum(sum(x.parts) * x.count for x in tensors)
    allocated = sum(sum(map(anatomy.allocated, x.parts)) * x.count for x in tensors)
    sequential = split == "sequential"
    ranks = gpus if split == "tensor" else 1
    item = e.sequential_cache_item if sequential else t.item
    name = anatomy.usual_engine(technique, engine)
    position_bytes = anatomy.kv_bytes(name, kv_bits, item)
    cache = kv_cache(model, batch, length, item, e, ranks, position_bytes)
    at_once = min(batch * min(prompt or length, length), chunk or e.chunk)
    states = 2 * model.hidden + 3 * -(-model.mlp // ranks)
    count = parameters(model, e.unties)
    gathered = t.item * (count["embedding"] + count["head"] + 2 * count["layer"])
    terms = {
        "weight_bytes": weights,
        "rounding_bytes": allocated - weights if e.rounds else 0,
        "kv_cache_bytes": cache * anatomy.share(model, gpus) if sequential else cache,
        "working_bytes": CUBLAS_BYTES + at_once * t.item * states + batch * 8 * model.vocabulary,
        "transient_bytes": _transient(tensors, t, e, allocated if e.rounds else weights),
        "gathered_bytes": gathered if split == "fsdp" else 0,
    }
    return {
        name: round(value) for name, value in {**terms, "total_bytes": sum(terms.values())}.items()
    }


def room(gpu: pd.Series, engine: str) -> float:
    """Bytes of a card that a model may take: CUDA's context, and what the engine leaves, apart."""
    return ENGINES[engine].share * gpu.memory_bytes - CONTEXT_BYTES


def _transient(tensors: list[Stored], technique: Technique, engine: Engine, held: float) -> float:
    """Bytes beside the quantized weights for a moment: copies of the largest in 16 bits, or all of
    them.
    """
    if not technique.quantized:
        return 0
    if engine.loads_in_16_bit:
        return sum(2 * x.values * x.count for x in tensors) - held
    largest = max(x.values for x in tensors if sum(x.parts) < 2 * x.values)
    return engine.transient_copies * anatomy.allocated(2 * largest)


def limit(
    model: Model,
    technique: str,
    gpu: pd.Series,
    *,
    engine: str | None = None,
    batch: int = 1,
    length: int = 1,
    gpus: int = 1,
    split: str = "tensor",
    kv_bits: int = 16,
) -> float:
    """Best possible tokens/s of decoding: the bytes of a step over the bandwidth, or its FLOPs over
    the FLOP/s.

    A step reads what `limits.decode_bytes` counts and all that is cached; of experts those that a
    batch picks when every token picks at random: 1 − (1 − k/E)^batch of them. Its operations are
    those of each token's own experts. Only tensor parallelism adds up bandwidths: otherwise one GPU
    works after another, or on all that was gathered. NaN where the bandwidth is not known.
    """
    t, e = anatomy.choose(technique, engine)
    position_bytes = anatomy.kv_bytes(anatomy.usual_engine(technique, engine), kv_bits, t.item)
    tables = {"embedding": model.tied and not e.unties, "table": 0}
    picked = 1 - (1 - model.experts_used) ** batch
    reads, works = tables | {"experts": picked}, tables | {"experts": model.experts_used}
    read = kv_cache(model, batch, length, t.item, position_bytes=position_bytes)
    flops = 0
    for tensor in anatomy.stored(model, t, e):
        stored_bytes = sum(tensor.parts)
        if technique.endswith("autocast") and len(tensor.parts) > 1:
            if e.casts_each_step:  # float32 is read, the copies in 16 bits written and read
                stored_bytes += tensor.parts[-1]
            else:  # the copies are kept, and read alone
                stored_bytes = tensor.parts[-1]
        read += stored_bytes * tensor.count * reads.get(tensor.kind, 1)
        flops += 2 * batch * tensor.values * tensor.count * works.get(tensor.kind, 1)
    peak = gpu.fp32_flop_per_s if technique == "fp32" else gpu.fp16_flop_per_s
    if technique in TWICE_AS_FAST:
        peak *= 2
    together = gpus if split == "tensor" else 1
    return batch * together / max(read / gpu.bandwidth_bytes_per_s, flops / peak)


def refusal(model: Model, degree: int, engine: str = "transformers") -> str | None:
    """Why tensor parallelism over `degree` GPUs cannot be, in a sentence; None where it can.

    vLLM pads the vocabulary, and repeats key/value heads where there are fewer than GPUs.
    """
    if degree > 1 and not model.attends:
        return f"How {model.name} is cut for {degree} GPUs is not known: it has no attention heads."
    sizes = {
        "attention heads": model.heads,
        "key/value heads": model.kv_heads,
        "MLP channels": model.mlp,
        "words of vocabulary": anatomy.padded(model.vocabulary, ENGINES[engine]),
    }
    if ENGINES[engine].repeats_heads and degree % model.kv_heads == 0:
        del sizes["key/value heads"]
    odd = [
        f"{size} {name if size > 1 else name.rstrip('s')}"
        for name, size in sizes.items()
        if size % degree
    ]
    if odd:
        parts = " and ".join(odd)
        return (
            f"{model.name} cannot be cut for {degree} GPUs: its {parts} cannot be divided by "
            f"{degree}."
        )
    return None


def usual_split(model: Model, gpus: int, engine: str) -> str:
    """How several GPUs share a model unless one says: by tensors where that can be."""
    by_layers = ENGINES[engine].by_layers and gpus > 1
    return "sequential" if by_layers or refusal(model, gpus, engine) else "tensor"


def degrees(model: Model, most: int = 16, engine: str = "transformers") -> list[int]:
    """Numbers of GPUs that the engine can cut the model for: see `refusal`."""
    return [n for n in range(1, most + 1) if refusal(model, n, engine) is None]


def fits(model: Model, technique: str, gpu: pd.Series, **workload) -> bool:
    """Does it fit? `workload` as in memory."""
    engine = anatomy.usual_engine(technique, workload.get("engine"))
    return memory(model, technique, **workload)["total_bytes"] <= room(gpu, engine)


def fewest(
    model: Model, technique: str, gpu: pd.Series, most: int = 64, **workload
) -> tuple[int, str] | None:
    """Smallest number of GPUs that hold the model, and the split; None where `most` do not.
    `workload` as in memory.
    """
    engine = anatomy.usual_engine(technique, workload.get("engine"))
    for n in range(1, most + 1):
        for split in dict.fromkeys((usual_split(model, n, engine), "sequential")):
            if split == "sequential" and n > model.layers:
                continue
            if fits(model, technique, gpu, gpus=n, split=split, **workload):
                return n, split
    return None


def largest(possible: Callable[[int], bool], most: int) -> int:
    """The largest whole number up to `most` for which it is possible, by halving; 0 for none."""
    low = 0
    high = most
    while low < high:
        middle = (low + high + 1) // 2
        if possible(middle):
            low = middle
        else:
            high = middle - 1
    return low


def most_requests(model: Model, technique: str, gpu: pd.Series, **workload) -> int:
    """Sequences of `length` tokens that fit at once, whatever `batch` says; `workload` as in
    memory.
    """
    return largest(
        lambda batch: fits(model, technique, gpu, **(workload | {"batch": batch})), MOST_REQUESTS
    )


def longest(model: Model, technique: str, gpu: pd.Series, **workload) -> int:
    """Tokens of each sequence that fit, up to the model's context, whatever `length` says;
    `workload` as in memory.
    """
    return largest(
        lambda length: fits(model, technique, gpu, **(workload | {"length": length})),
        model.context or 2**20,
    )


def setting(row) -> dict | None:
    """How a published row was taken, as keywords of `memory`; None where that is not known."""
    run = next(
        (run for run in RUNS if row.source.startswith(run[0]) and row.model.startswith(run[1])),
        None,
    )
    variant = row.variant.removeprefix("vllm-")
    cut = re.fullmatch(r"(tp|sequential|fsdp)\d*", variant)
    known = [name for name in TECHNIQUES if variant.startswith(name)]
    technique = max(known, key=len, default=None)
    if cut or variant == "dense":
        technique = "bf16"
    if run is None or technique is None or not (anatomy.CONFIGS / f"{row.model}.json").is_file():
        return None
    devices = re.match(r"(\d+)x ", str(row.hardware))
    return {
        "technique": technique,
        "engine": run[2] if variant == row.variant else "vllm",
        "prompt": run[3],
        "length": run[4],
        "gpus": int(devices[1]) if devices else 1,
        "split": cut[1] if cut and cut[1] in SPLITS else "tensor",
    }


def _published(metric: str) -> Iterator[tuple]:
    """Every published row of a metric whose setting is known, and that."""
    rows = pd.read_csv(DATA / "published.csv")
    for row in rows[rows["metric"].str.startswith(metric)].itertuples():
        how = setting(row)
        if how is not None:
            yield row, how


def checked() -> pd.DataFrame:
    """Every published peak beside its prediction (bytes), and the relative error, which is never
    fitted.
    """
    rows = []
    for row, how in _published("peak_memory"):
        measured = row.value * UNITS[row.unit]
        predicted = memory(describe(row.model), **how)["total_bytes"]
        rows.append(
            {
                "source": row.source,
                "model": row.model,
                "variant": row.variant,
                **how,
                "measured_bytes": measured,
                "predicted_bytes": predicted,
                "error": predicted / measured - 1,
            }
        )
    return pd.DataFrame(rows)


@functools.cache
def kept(name: str) -> pd.DataFrame:
    """`checked` or `runs` as `planner_page` wrote them: no published model has to be described."""
    return pd.read_csv(DATA / f"planned_{name}.csv", index_col=0)


def prediction_error(technique: str) -> float:
    """Worst relative error against published peaks of the technique (of any, where none is
    published).
    """
    rows = kept("checked")
    same = rows[rows["technique"] == technique]
    return float((rows if same.empty else same)["error"].abs().max())


def runs() -> pd.DataFrame:
    """Every published speed of one model in one engine, how it was taken, and its limit.

    layer_s : seconds a layer that a step took beyond its limit: launches, kernels that do not reach
        the bandwidth, messages between GPUs.
    """
    rows = []
    for row, how in _published("tokens_per_s"):
        batch = row.batch_size
        model, card = describe(row.model), gpu(row.hardware.split("x ", 1)[1])
        how = {key: how[key] for key in ("technique", "engine", "gpus", "split")}
        best = limit(model, gpu=card, batch=batch, **how)
        rows.append(
            {
                "source": row.source,
                "model": row.model,
                "variant": row.variant,
                "gpu": card.name,
                "batch": int(batch),
                **how,
                "cut": _cut(how["gpus"], how["split"]),
                "tokens_per_s": row.value,
                "limit_tokens_per_s": best,
                "share": row.value / best,
                "layer_s": batch * (1 / row.value - 1 / best) / model.layers,
            }
        )
    return pd.DataFrame(rows)


def _cut(gpus: int, split: str) -> str:
    return split if gpus > 1 else "one GPU"


class Expected(NamedTuple):
    """Tokens/s that published rows make likely, and those of the slowest and fastest of them.

    rows, engines, sources : how many they are, in which engines, and whose.
    """

    tokens_per_s: float
    low: float
    high: float
    rows: int
    engines: str
    sources: str


def expected(
    model: Model,
    technique: str,
    gpu: pd.Series,
    *,
    engine: str | None = None,
    batch: int = 1,
    gpus: int = 1,
    split: str = "tensor",
    without: int | None = None,
    **workload,
) -> Expected | None:
    """Tokens/s to expect; None where no speed of the technique in the engine is published.

    A step takes the time of its limit, and what published steps of that technique and engine took
    beyond theirs, for each layer (the median; those of the same card, where there are any). So a
    small model on a large card is bound by its launches, and a large one comes near its limit.
    Batches are those published nearest, at most four times as large or small. Floats of 16 and 32
    bits count as one technique, and engines that call kernels from Python as one engine: their
    launches are as many.

    Parameters
    ----------
    without : index of a row of `runs` to leave out.
    workload : length and kv_bits, as in `limit`.
    """
    name = anatomy.usual_engine(technique, engine)
    rows = kept("runs").drop(index=[] if without is None else [without])
    rows = rows[rows["technique"].isin(FLOATS if technique in FLOATS else [technique])]
    rows = rows[rows["cut"] == _cut(gpus, split)]
    rows = rows[~rows["variant"].str.endswith("-threshold-0")]  # not how int8 is loaded by default
    engines = [name]
    if ENGINES[name].eager:
        engines = [other for other, habits in ENGINES.items() if habits.eager]
    rows = rows[rows["engine"].isin(engines)]
    ratio = (rows["batch"] / batch).where(rows["batch"] > batch, batch / rows["batch"])
    rows = rows[(ratio == ratio.min()) & (ratio <= 4)]
    on_same_card = rows[rows["gpu"] == gpu.name]
    rows = on_same_card if len(on_same_card) else rows
    best = limit(
        model, technique, gpu, engine=engine, batch=batch, gpus=gpus, split=split, **workload
    )
    if rows.empty or math.isnan(best):
        return None

    def speed(layer_s: float) -> float:
        return batch / (batch / best + layer_s * model.layers)

    theirs = ", ".join(sorted(set(rows["engine"])))
    sources = ", ".join(sorted({source.split()[0].rstrip(":") for source in rows["source"]}))
    slowest, fastest = rows["layer_s"].max(), rows["layer_s"].min()
    return Expected(
        speed(rows["layer_s"].median()), speed(slowest), speed(fastest), len(rows), theirs, sources
    )


@functools.cache
def speed_errors() -> pd.Series:
    """Expected ÷ published tokens/s of each published row, left out while it is expected."""
    ratios = {}
    for row in kept("runs").itertuples():
        how = {key: getattr(row, key) for key in ("technique", "engine", "gpus", "split", "batch")}
        guess = expected(describe(row.model), gpu=gpu(row.gpu), without=row.Index, **how)
        if guess is not None:
            ratios[row.Index] = guess.tokens_per_s / row.tokens_per_s
    return pd.Series(ratios)


def plan(
    names: Sequence[str],
    techniques: Sequence[str] = (),
    gpu_names: Sequence[str | pd.Series] = (),
    *,
    engine: str | None = None,
    gpus: int = 1,
    split: str | None = None,
    **workload,
) -> pd.DataFrame:
    """The whole answer: a row for each model, technique and GPU (all that are known, where none are
    named).

    Parameters
    ----------
    gpu_names : or cards as `gpu` gives them; "2x L4" is two of them, whatever `gpus` says.
    gpus, split : how many of each there are (tensor parallel where that can be, else sequential).
    workload : batch, length, prompt, chunk, kv_bits, as in `memory`.

    Bytes are those of the fullest GPU; speeds are of the GPUs asked for where they hold the model,
    else of the `fewest_gpus` that do.
    """
    workload = {"batch": 1, "length": 2048} | workload
    techniques = [anatomy.spelled(name) for name in techniques] or runnable(engine)
    devices = list(gpu_names) or list(cards.gpus().index)
    rows = []
    for model in map(describe, names):
        for technique in techniques:
            for device in devices:
                rows.append(_planned(model, technique, device, engine, gpus, split, workload))
    return pd.DataFrame(rows).astype({"fewest_gpus": "Int64"})


def runnable(engine: str | None) -> list[str]:
    """The techniques that an engine runs (None: all). Raises ValueError for an unknown engine."""
    names = []
    for technique in TECHNIQUES:
        try:
            anatomy.choose(technique, engine)
        except ValueError:
            if engine not in (None, *ENGINES):
                raise
            continue
        names.append(technique)
    return names


def _planned(
    model: Model,
    technique: str,
    device: str | pd.Series,
    engine: str | None,
    count: int,
    split: str | None,
    workload: dict,
) -> dict:
    """A row of `plan`."""
    if isinstance(device, str):
        several, name = cards.several(device)
        device, count = gpu(name), several if several > 1 else count
    name = anatomy.usual_engine(technique, engine)
    split = split or usual_split(model, count, name)
    asked = {"engine": engine, "gpus": count, "split": split, **workload}
    need = memory(model, technique, **asked)
    holds = need["total_bytes"] <= room(device, name)
    n, cut = fewest(model, technique, device, engine=engine, **workload) or (None, None)
    of_speed = {key: workload[key] for key in ("batch", "length", "kv_bits") if key in workload}
    at, how = (count, split) if holds else (n, cut)
    best = guess = None
    if at is not None:
        of_speed |= {"engine": engine, "gpus": at, "split": how}
        best = limit(model, technique, device, **of_speed)
        guess = expected(model, technique, device, **of_speed)
    likely = guess or Expected(math.nan, math.nan, math.nan, 0, "", "")
    return {
        "model": model.name,
        "technique": technique,
        "gpu": device.name,
        **workload,
        "engine": name,
        "gpus": count,
        **need,
        "gpu_memory_bytes": device.memory_bytes,
        "room_bytes": room(device, name),
        "fits": holds,
        "fewest_gpus": n,
        "split": cut,
        "limit_tokens_per_s": best,
        "expected_tokens_per_s": likely.tokens_per_s,
        "expected_low": likely.low,
        "expected_high": likely.high,
        "expected_rows": likely.rows,
        "expected_from": likely.sources,
        "expected_engines": likely.engines,
        "error": prediction_error(technique),
    }
