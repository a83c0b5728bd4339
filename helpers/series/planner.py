"""Will it fit, and how fast can it be? A model's memory and best speed on GPUs, before anything is
loaded.

Nothing is fitted to measurements: each term is what a format or an engine's source says (LitGPT,
bitsandbytes, llama.cpp, PyTorch's allocator and FSDP), so the published figures are a test, and the
worst distance from them is the error shown beside every answer. Sizes are bytes; GB is 1e9 of them.
"""

import argparse
import functools
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Column, Table

from helpers.series import anatomy
from helpers.series.anatomy import (
    ENGINES,
    TECHNIQUES,
    Engine,
    Model,
    Stored,
    Technique,
    describe,
    nearest,
    parameters,
)

DATA = Path(__file__).parent.parent / "data"
CUBLAS_BYTES = (
    8_519_680  # PyTorch's default cuBLAS workspace, :4096:2:16:8 in KiB (32 MiB on Hopper)
)
CONTEXT_BYTES = 500_000_000  # about what CUDA's context and kernels take beside PyTorch's allocator
SPLITS = ("tensor", "sequential", "fsdp")
CAPTION = (
    "error: worst distance from published peaks of the technique, or of any where none is published"
)
# how the published figures were taken: source, model, engine, tokens of the prompt, tokens in all
RUNS = (
    ("article.txt", "falcon", "litgpt", 7, 57),
    ("article.txt", "llama-7b", "lit-llama", 7, 57),
    ("litgpt", "", "litgpt", 8, 264),
    ("LLM-Pruner", "", "transformers", 64, 64),
    ("gpt-fast", "", "gpt-fast", 1, 1),
    ("bitsandbytes", "", "transformers", 1, 1),  # lengths not stated; speed only
)


@functools.cache
def gpus() -> pd.DataFrame:
    """The table of GPUs by name, each row with its source: bytes, bytes/s, dense FLOP/s, compute
    capability.

    memory_bytes is what PyTorch sees: a card's nominal "GB" are GiB, and the driver keeps some of
    them.
    """
    return pd.read_csv(DATA / "gpus.csv", index_col="name", dtype={"compute_capability": str})


def gpu(name: str) -> pd.Series:
    """One GPU by name or alias, spelled in any case. Raises ValueError that names the nearest."""
    key, table = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), gpus()
    for known, aliases in table["aliases"].items():
        if key in (known, *aliases.split(";")):
            return table.loc[known]
    raise ValueError(f"No GPU {name!r} in the table; the nearest are {nearest(key, table.index)}.")


def kv_cache(
    model: Model,
    batch: int = 1,
    length: int = 2048,
    item: int = 2,
    engine: Engine = ENGINES["gpt-fast"],
    gpus: int = 1,
) -> int:
    """Bytes that a GPU caches for `length` tokens of every sequence: keys and values, of a window
    or latent where the model's are, and the states of layers that have none.

    Tensor parallelism over `gpus` cuts heads, never states. Raises ValueError in one sentence where
    it is not known what the model caches.
    """
    if model.cache is None:
        raise ValueError(f"What {model.name} caches for a sequence is not known to the planner.")
    total = 0
    for layer in model.cache:
        position = layer.position
        if layer.heads:
            position = position // layer.heads * _cached_heads(layer.heads, model, engine, gpus)
        total += layer._replace(position=position).nbytes(length, item)
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
) -> dict[str, int]:
    """Peak bytes on the fullest GPU, term by term, and their total.

    Parameters
    ----------
    length, prompt : tokens cached for each sequence, and tokens prefilled at once (None: all of
        them).
    split : "tensor" (layers cut), "sequential" (whole layers), "fsdp" (all cut; the root and two
        layers gathered).

    The terms: weights; what the allocator rounds up; keys and values; working memory (cuBLAS, two
    hidden states and three MLP states of the prompt, the last logits twice in float32); what
    quantizing holds for a moment; what FSDP gathers. Raises ValueError for anything else.
    """
    t, e = anatomy.choose(technique, engine)
    if min(batch, length, gpus) < 1 or split not in SPLITS:
        raise ValueError(
            f"batch, length and gpus start at 1, and split is one of {', '.join(SPLITS)}."
        )
    tensors, sequential = anatomy.stored(model, t, e, gpus, split), split == "sequential"
    weights = sum(sum(x.parts) * x.count for x in tensors)
    rounding = (
        sum(sum(map(anatomy.allocated, x.parts)) * x.count for x in tensors) - weights
        if e.rounds
        else 0
    )
    cache = kv_cache(
        model,
        batch,
        length,
        e.sequential_cache_item if sequential else t.item,
        e,
        gpus if split == "tensor" else 1,
    )
    activations = (
        batch * min(prompt or length, length) * t.item * (2 * model.hidden + 3 * model.mlp)
    )
    count = parameters(model, e.unties)
    gathered = t.item * (count["embedding"] + count["head"] + 2 * count["layer"])
    terms = {
        "weight_bytes": weights,
        "rounding_bytes": rounding,
        "kv_cache_bytes": cache * anatomy.share(model, gpus) if sequential else cache,
        "working_bytes": CUBLAS_BYTES + activations + batch * 8 * model.vocabulary,
        "transient_bytes": _transient(tensors, t, e, weights + rounding),
        "gathered_bytes": gathered if split == "fsdp" else 0,
    }
    return {
        name: round(value) for name, value in {**terms, "total_bytes": sum(terms.values())}.items()
    }


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
) -> float:
    """Best possible tokens/s of decoding: the bytes of a step over the bandwidth, or its FLOPs over
    the FLOP/s.

    A step reads what `limits.decode_bytes` counts and all that is cached. Only tensor parallelism
    adds up bandwidths: otherwise one GPU works after another, or on all that was gathered.
    """
    t, e = anatomy.choose(technique, engine)
    use = {
        "embedding": model.tied and not e.unties,
        "table": 0,
        "experts": model.experts_used,
    }
    tensors = [(x, x.count * use.get(x.kind, 1)) for x in anatomy.stored(model, t, e)]
    read = sum(
        (x.parts[-1] if technique.endswith("autocast") else sum(x.parts)) * n for x, n in tensors
    )
    read += kv_cache(model, batch, length, t.item)
    flops = sum(2 * x.values * n for x, n in tensors) * batch
    peak = (
        gpu.fp32_flop_per_s
        if technique == "fp32"
        else gpu.fp16_flop_per_s * (2 if technique == "int8" else 1)
    )
    return (
        batch
        * (gpus if split == "tensor" else 1)
        / max(read / gpu.bandwidth_bytes_per_s, flops / peak)
    )


def refusal(model: Model, degree: int) -> str | None:
    """Why tensor parallelism over `degree` GPUs cannot be, in a sentence; None where it can."""
    sizes = {
        "attention heads": model.heads,
        "key/value heads": model.kv_heads,
        "MLP channels": model.mlp,
        "words of vocabulary": model.vocabulary,
    }
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


def degrees(model: Model, most: int = 16) -> list[int]:
    """Numbers of GPUs that divide heads, key/value heads, MLP channels and vocabulary (some engines
    pad the last).
    """
    return [n for n in range(1, most + 1) if refusal(model, n) is None]


def fewest(
    model: Model, technique: str, gpu: pd.Series, most: int = 64, **workload
) -> tuple[int, str] | None:
    """Smallest number of GPUs that hold the model, and the split; None where `most` do not.
    `workload` as in memory.
    """
    for n in range(1, most + 1):
        for split in ("tensor", "sequential"):
            possible = refusal(model, n) is None if split == "tensor" else n <= model.layers
            if possible and (
                memory(model, technique, gpus=n, split=split, **workload)["total_bytes"]
                + CONTEXT_BYTES
                <= gpu.memory_bytes
            ):
                return n, split
    return None


def setting(row) -> dict | None:
    """How a published row was taken, as keywords of `memory`; None where that is not known."""
    run = next(
        (run for run in RUNS if row.source.startswith(run[0]) and row.model.startswith(run[1])),
        None,
    )
    cut = re.fullmatch(r"(tp|sequential|fsdp)\d*", row.variant)
    technique = (
        "bf16"
        if cut or row.variant == "dense"
        else max(
            (name for name in TECHNIQUES if row.variant.startswith(name)), key=len, default=None
        )
    )
    if run is None or technique is None or not (anatomy.CONFIGS / f"{row.model}.json").is_file():
        return None
    devices = re.match(r"(\d+)x ", str(row.hardware))
    return {
        "technique": technique,
        "engine": run[2],
        "prompt": run[3],
        "length": run[4],
        "gpus": int(devices[1]) if devices else 1,
        "split": cut[1] if cut and cut[1] in SPLITS else "tensor",
    }


@functools.cache
def checked() -> pd.DataFrame:
    """Every published peak beside its prediction (bytes), and the relative error, which is never
    fitted.
    """
    rows, found = pd.read_csv(DATA / "published.csv"), []
    for row in rows[rows["metric"].str.startswith("peak_memory")].itertuples():
        if how := setting(row):
            measured = row.value * {"GB": 1e9, "MiB": 2**20}[row.unit]
            predicted = memory(describe(row.model), **how)["total_bytes"]
            found.append(
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
    return pd.DataFrame(found)


def prediction_error(technique: str, without: str | None = None) -> float:
    """Worst relative error against published peaks of the technique (of any, where none is
    published).

    `without` leaves one source out, so that the error can be stated to it beforehand.
    """
    rows = checked()[lambda rows: rows["source"] != without]
    same = rows[rows["technique"] == technique]
    return float((rows if same.empty else same)["error"].abs().max())


def plan(
    names: Sequence[str],
    techniques: Sequence[str] = (),
    gpu_names: Sequence[str] = (),
    *,
    engine: str | None = None,
    batch: int = 1,
    length: int = 2048,
) -> pd.DataFrame:
    """The whole answer: a row for each model, technique and GPU (all that are known, where none are
    named).

    Bytes are those of one GPU that holds it all; `limit_tokens_per_s` is for the `fewest_gpus` that
    hold it.
    """
    techniques, rows = (
        techniques
        or [
            name
            for name, t in TECHNIQUES.items()
            if engine is None or (engine == "llama.cpp") == (t.engine == "llama.cpp")
        ],
        [],
    )
    for model in map(describe, names):
        for technique in techniques:
            workload = {"engine": engine, "batch": batch, "length": length}
            need = memory(model, technique, **workload)
            for device in map(gpu, gpu_names or gpus().index):
                n, split = fewest(model, technique, device, **workload) or (None, None)
                best = (
                    limit(model, technique, device, **workload, gpus=n, split=split) if n else None
                )
                rows.append(
                    {
                        "model": model.name,
                        "technique": technique,
                        "gpu": device.name,
                        **workload,
                        "engine": engine or TECHNIQUES[technique].engine,
                        **need,
                        "gpu_memory_bytes": device.memory_bytes,
                        "fits": n == 1,
                        "fewest_gpus": n,
                        "split": split,
                        "limit_tokens_per_s": best,
                        "error": prediction_error(technique),
                    }
                )
    return pd.DataFrame(rows).astype({"fewest_gpus": "Int64"})


def _table(model: Model, frame: pd.DataFrame) -> Table:
    head, cut = ("tied" if model.tied else "untied"), ", ".join(map(str, degrees(model)))
    title = (
        f"{model.name}: {parameters(model)['total'] / 1e9:.3f} G parameters, head {head}; "
        f"{kv_cache(model, length=1) / 1e3:.1f} KB of keys and values a token; "
        f"tensor parallel over {cut}"
    )
    numbers = ("weights GB", "KV cache GB", "peak GB", "error", "GPUs", "best tokens/s")
    table = Table(
        "technique",
        "engine",
        "GPU",
        *(Column(name, justify="right") for name in numbers),
        title=title,
        caption="\n".join(filter(None, (CAPTION, refusal(model, 2)))),
    )
    for row in frame.itertuples():
        sizes = (
            f"{size / 1e9:.2f}" for size in (row.weight_bytes, row.kv_cache_bytes, row.total_bytes)
        )
        answer = (
            ("too many", "–")
            if pd.isna(row.fewest_gpus)
            else (
                f"{row.fewest_gpus} {row.split}" if row.fewest_gpus > 1 else "1",
                f"{row.limit_tokens_per_s:.0f}",
            )
        )
        table.add_row(row.technique, row.engine, row.gpu, *sizes, f"±{row.error:.2%}", *answer)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m helpers.series.planner MODEL --gpu a100-40gb`: a table; one sentence and status 2
    for bad input.
    """
    parser = argparse.ArgumentParser(
        prog="python -m helpers.series.planner", description=main.__doc__
    )
    parser.add_argument(
        "model", help="a configuration written in the project, a folder, or a name on the hub"
    )
    for name, known in (
        ("--gpu", gpus().index),
        ("--technique", TECHNIQUES),
        ("--engine", ENGINES),
    ):
        parser.add_argument(name, nargs=None if name == "--engine" else "+", help=", ".join(known))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048, help="tokens cached for each sequence")
    asked = parser.parse_args(arguments)
    try:
        frame = plan(
            [asked.model],
            asked.technique or (),
            asked.gpu or (),
            engine=asked.engine,
            batch=asked.batch,
            length=asked.length,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else 120).print(_table(describe(asked.model), frame))
    return 0


if __name__ == "__main__":
    sys.exit(main())
