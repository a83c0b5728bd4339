"""The planner's answer in words: does it fit, what else would, how fast, and how sure is that?

`seven-plan MODEL --gpu "RTX 4090"` prints it; its exit status is 0 where the model fits, 1 where it
does not, 2 for bad input, so that a script can ask before it downloads.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence

if __name__ == "__main__":
    from helpers.series import command  # before anything large

    sys.exit(command.main())

import pandas as pd
from rich.console import Console
from rich.table import Column, Table
from transformers.utils import logging

from helpers.series import anatomy, cards, planner
from helpers.series.anatomy import ENGINES, TECHNIQUES, Model

# the formats that people run today, one a row; the others by --technique or --all
COMMON = ("bf16", "fp8", "int8", "nf4", "awq-g128", "q8_0", "q6_K", "q5_K_M", "q4_K_M")
CAPTION = (
    "error: worst of published peaks, – for none; GPUs: the fewest that hold it; "
    "tokens/s: expected from published speeds, – for none"
)
ROWS = 10  # of the table, unless all are asked for
CHUNK = 8192  # tokens of a piece, where the prompts do not fit at once
# least compute capability of these formats in vLLM 0.32 (its `get_min_capability`)
NEEDS = {"fp8": 7.5, "awq-g128": 7.5, "nvfp4": 7.5, "mxfp4": 8.0}
SHORTEST = 64  # a shorter length is no advice
TERMS = {
    "weight_bytes": "weights",
    "rounding_bytes": "rounding",
    "kv_cache_bytes": "KV cache",
    "working_bytes": "working memory",
    "transient_bytes": "while quantizing",
    "gathered_bytes": "gathered",
}


def first_technique(model: Model, card: pd.Series | None, engine: str | None) -> str:
    """What a model is run in unless one says otherwise: as its checkpoint is stored, else in 16
    bits that the card has.
    """
    if engine == "llama.cpp":
        return "q8_0"
    if model.own:
        return model.own
    return "bf16" if card is None or has_bf16(card) else "fp16"


def has_bf16(card: pd.Series) -> bool:
    """Has the card bfloat16 of its own? NVIDIA's have from compute capability 8.0 on."""
    return not card.compute_capability.startswith(("6.", "7."))


def techniques(
    model: Model, first: str, engine: str | None, card: pd.Series | None = None
) -> list[str]:
    """The rows of a table: the first, and what is usual beside it in the engine (None: in any) and
    on the card.
    """
    names = [first]
    possible = planner.runnable(engine)
    for name in (model.own, *COMMON):
        if name not in possible or (name == "bf16" and first == "fp16"):
            continue
        if card is None or runs_on(name, card):
            names.append(name)
    return list(dict.fromkeys(names))


def runs_on(technique: str, card: pd.Series) -> bool:
    """Has the card what the technique's kernels need? Other makers' are not looked at."""
    needed, capability = NEEDS.get(technique), card.compute_capability
    if needed is None or not capability.replace(".", "").isdigit():
        return True
    return float(capability) >= needed


def size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f}"


def counted(count: int, what: str) -> str:
    return f"one {what}" if count == 1 else f"{count} {what}s"


def cards_of(count: int, name: str) -> str:
    if name.startswith("this"):
        return name
    return f"one {name}" if count == 1 else f"{count} × {name}"


def verdict(row: pd.Series) -> str:
    """Does it fit? One sentence, with both numbers."""
    device = cards_of(row["gpus"], row["gpu"])
    each = "" if row["gpus"] == 1 else " each"
    need, room = row["total_bytes"], row["room_bytes"]
    fits, spare = "does not fit", ""
    if row["fits"]:
        fits, spare = "fits", f", {size(room - need)} to spare"
    return (
        f"{row['model']} in {row['technique']} {fits} {device}: {size(need)} of {size(room)} GB"
        f"{each}{spare} ({row['batch']} × {row['length']:,} tokens in {row['engine']})."
    )


def speed(row: pd.Series) -> str:
    """How fast? What published rows make likely, and what is possible at best."""
    if pd.isna(row["limit_tokens_per_s"]):
        return "Its speed cannot be told: the bandwidth is not known, or too many cards are needed."
    best = f"at most {row['limit_tokens_per_s']:,.0f} tokens/s"
    if not row["fits"]:
        best += f", on {row['fewest_gpus']} of them"
    if not row["expected_rows"]:
        return f"It makes {best}; no speed of it in {row['engine']} is published."
    spread = f"{row['expected_low']:,.0f} to {row['expected_high']:,.0f}"
    likely = f"{row['expected_tokens_per_s']:,.0f}"
    if spread != f"{likely} to {likely}":
        likely += f" ({spread})"
    rows = counted(row["expected_rows"], "published row")
    text = (
        f"Expect {likely} tokens/s, by {rows} of {row['expected_engines']} "
        f"({row['expected_from']}); {best}."
    )
    if row["expected_tokens_per_s"] < row["limit_tokens_per_s"] / 2:
        text += " Launches and kernels take most of a step, not its bytes."
    return text


def certainty(technique: str) -> str:
    """How far from published peaks, and where that was looked at? One sentence."""
    peaks = planner.kept("checked")
    same = peaks[peaks["technique"] == technique]
    rows = peaks if same.empty else same
    what = f"of {technique}" if len(same) else f"(none is of {technique})"
    where = f"batch 1, up to {rows['length'].max():,} tokens"
    number = counted(len(rows), "published peak")
    worst = rows["error"].abs().max()
    return f"Memory: {worst:.1%} off at worst in {number} {what}, {where}; not checked beyond that."


def next_steps(model: Model, row: pd.Series, card: pd.Series, split: str, work: dict) -> list[str]:
    """What would fit instead, the smallest change first; nothing where it fits.

    split : of the cards asked for. work : batch, length, prompt, chunk, kv_bits and engine.
    """
    if row["fits"]:
        return []
    technique, count = row["technique"], row["gpus"]
    asked = {"gpus": count, "split": split, **work}
    steps = []

    def fits(name: str, **change) -> bool:
        return planner.fits(model, name, card, **(asked | change))

    prompt = work["prompt"] or work["length"]
    whole = ENGINES[row["engine"]].chunk == math.inf and not work["chunk"]
    if whole and work["batch"] * prompt > CHUNK and fits(technique, chunk=CHUNK):
        steps.append(f"with its prompts in pieces (--chunk {CHUNK}: generate's prefill_chunk_size)")
    smaller = {}
    for name in techniques(model, technique, work["engine"], card):
        need = planner.memory(model, name, **asked)
        if name != technique and need["weight_bytes"] < row["weight_bytes"] and fits(name):
            smaller[name] = need
    if smaller:
        name = max(smaller, key=lambda name: smaller[name]["weight_bytes"])
        engine = anatomy.usual_engine(name, work["engine"])
        spare = planner.room(card, engine) - smaller[name]["total_bytes"]
        steps.append(f"in {name} ({engine}) with {size(spare)} GB to spare")
    length = planner.longest(model, technique, card, **asked)
    if SHORTEST <= length < work["length"]:
        steps.append(f"with --length {length}")
    batch = planner.most_requests(model, technique, card, **asked)
    if 0 < batch < work["batch"]:
        steps.append(f"with --batch {batch}")
    if not pd.isna(row["fewest_gpus"]) and not card.name.startswith("this"):
        steps.append(f"on {row['fewest_gpus']} × {card.name} ({row['split']})")
    return steps


def notes(model: Model, row: pd.Series, card: pd.Series, engines: set[str]) -> list[str]:
    """What a reader should know of this answer, a sentence each. engines : of all rows."""
    length = row["length"]
    found = list(model.notes)
    if "source" in card:
        found.append(f"{card.name} is that of {card.source.partition('; memory:')[0]}.")
    if not model.attends:
        found.append(
            f"{model.name} has no attention: what it keeps of a sequence does not grow with its "
            "length, and no published peak or speed is of such a model."
        )
    if model.context and length > model.context:
        found.append(f"{model.name} was made for {model.context:,} positions, not {length:,}.")
    if uncut := planner.refusal(model, row["gpus"], row["engine"]):
        found.append(uncut)
    if "vllm" in engines:
        found.append(
            f"vLLM takes {ENGINES['vllm'].share:.0%} of the card, whatever is needed; its CUDA "
            "graphs are not counted."
        )
    return found


def answer(model_name: str, asked: argparse.Namespace) -> dict:
    """Everything that is printed: the verdict on the first technique and card, what would fit
    instead, its speed, certainty, notes; verdicts on the others asked for; rows; does any fit.

    Raises ValueError in one sentence for what is not known.
    """
    model = planner.describe(model_name)
    devices = _devices(asked)
    count, card = devices[0] if devices else (1, None)
    wanted = [anatomy.spelled(name) for name in asked.technique or []]
    for name in wanted:
        if card is not None and not runs_on(name, card):
            raise ValueError(
                f"{name} needs compute capability {NEEDS[name]}, and {card.name} has "
                f"{card.compute_capability}."
            )
    wanted = wanted or [first_technique(model, card, asked.engine)]
    first = wanted[0]
    names = wanted if asked.technique else techniques(model, first, asked.engine, card)
    work = {
        "batch": asked.batch,
        "length": asked.length,
        "prompt": asked.prompt,
        "chunk": asked.chunk,
        "kv_bits": asked.kv,
    }
    where = []
    if not devices:
        card = _smallest(model, first, asked.engine, work)
        devices = [(1, card)]
        where = [
            "No --gpu is given: this is the smallest of the table that holds it, or the largest."
        ]
    engine = anatomy.usual_engine(first, asked.engine)
    if asked.split == "tensor" and (impossible := planner.refusal(model, count, engine)):
        raise ValueError(impossible)
    how = work | {"engine": asked.engine, "split": asked.split}
    frames = [
        planner.plan([model_name], names, [device], gpus=each, **how) for each, device in devices
    ]
    rows = pd.concat(frames, ignore_index=True)
    row = rows.iloc[0]
    subjects = rows[rows["technique"].isin(wanted)]
    split = asked.split or planner.usual_split(model, count, engine)
    told = {
        "verdict": verdict(row),
        "others": [verdict(other) for _, other in subjects.iloc[1:ROWS].iterrows()],
        "next": next_steps(model, row, card, split, work | {"engine": asked.engine}),
        "speed": speed(row),
        "certainty": certainty(row["technique"]),
        "notes": where + notes(model, row, card, set(rows["engine"])),
        "fits": bool(subjects["fits"].any()),
        "rows": rows,
        "model": model,
    }
    if row["fits"]:
        told["requests"] = planner.most_requests(
            model, row["technique"], card, engine=asked.engine, gpus=count, split=split, **work
        )
    return told


def _devices(asked: argparse.Namespace) -> list[tuple[int, pd.Series]]:
    """The cards asked for, and how many of each. Raises ValueError in one sentence."""
    if asked.memory_gb is not None:
        return [(asked.gpus, cards.any_other(asked.memory_gb, asked.bandwidth))]
    if not math.isnan(asked.bandwidth):
        raise ValueError("--bandwidth belongs to --memory-gb.")
    devices = []
    for name in asked.gpu or []:
        several, name = cards.several(name)
        known = name.lower() in cards.THIS_MACHINE
        card = cards.this_machine(name.lower()) if known else cards.gpu(name)
        devices.append((several if several > 1 else asked.gpus, card))
    return devices


def _smallest(model: Model, technique: str, engine: str | None, work: dict) -> pd.Series:
    """The card of least memory, and then of least bandwidth, that holds the model in a technique
    that it has; the largest where none does.
    """
    table = cards.gpus().sort_values(["memory_bytes", "bandwidth_bytes_per_s"])
    for _, card in table.iterrows():
        native = runs_on(technique, card) and (technique != "bf16" or has_bf16(card))
        if native and planner.fits(model, technique, card, engine=engine, **work):
            return card
    return table.iloc[-1]


def as_text(told: dict, everything: bool, breakdown: bool) -> None:
    """Print the answer: words, then a table."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    rows = told["rows"]
    print(told["verdict"])
    if told["next"]:
        print(f"It fits {'; or '.join(told['next'])}.")
    elif not rows.iloc[0]["fits"]:
        print("Nothing smaller was found that fits.")
    if "requests" in told:
        print(f"Sequences of that length that fit at once: {told['requests']:,}.")
    for line in (told["speed"], told["certainty"], *told["notes"], *told["others"]):
        print(line)
    shown = rows if everything else rows.head(ROWS)
    console.print(_table(told["model"], shown))
    if len(shown) < len(rows):
        print(f"{len(rows) - len(shown)} more rows: --all")
    if breakdown:
        console.print(_breakdown(shown))


def _table(model: Model, rows: pd.DataFrame) -> Table:
    count = planner.parameters(model)
    head = "tied" if model.tied else "untied"
    title = f"{model.name}: {count['total'] / 1e9:.3f} G parameters, head {head}"
    if model.cache is not None:
        title += f"; {planner.kv_cache(model, length=1) / 1e3:.1f} KB cached for a first token"
    engine = rows.iloc[0]["engine"]
    ranks = ", ".join(map(str, planner.degrees(model, engine=engine)))
    title += f"; tensor parallel over {ranks} ({engine})"
    published = set(planner.kept("checked")["technique"])
    numbers = ("needs GB", "of GB", "error", "GPUs", "tokens/s")
    table = Table(
        "technique",
        "engine",
        "GPU",
        *(Column(name, justify="right") for name in numbers),
        Column("at most", justify="right", style="dim"),
        title=title,
        caption=CAPTION,
    )
    for row in rows.itertuples():
        fewest = "too many" if pd.isna(row.fewest_gpus) else f"{row.fewest_gpus}"
        if fewest not in ("1", "too many"):
            fewest += f" {row.split}"
        likely = f"{row.expected_tokens_per_s:,.0f}" if row.expected_rows else "–"
        best = "–" if pd.isna(row.limit_tokens_per_s) else f"{row.limit_tokens_per_s:,.0f}"
        table.add_row(
            row.technique,
            row.engine,
            cards_of(row.gpus, row.gpu).removeprefix("one "),
            f"{row.total_bytes / 1e9:.2f}",
            size(row.room_bytes),
            f"±{row.error:.2%}" if row.technique in published else "–",
            fewest,
            likely,
            best,
        )
    return table


def _breakdown(rows: pd.DataFrame) -> Table:
    """The terms of each row's bytes, in GB."""
    numbers = [Column(name, justify="right") for name in (*TERMS.values(), "in all")]
    table = Table("technique", "GPU", *numbers, title="GB on the fullest GPU")
    for _, row in rows.iterrows():
        parts = [f"{row[term] / 1e9:.2f}" for term in (*TERMS, "total_bytes")]
        table.add_row(row["technique"], row["gpu"], *parts)
    return table


def as_json(told: dict) -> str:
    """The answer as JSON: the words, and every row of the plan; what is not known is null."""
    told = {key: value for key, value in told.items() if key != "model"}
    rows = json.loads(told.pop("rows").to_json(orient="records"))
    return json.dumps(told | {"rows": rows}, indent=1, ensure_ascii=False)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="seven-plan", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    shapes = ", ".join(sorted(path.stem for path in anatomy.CONFIGS.glob("*.json")))
    options.add_argument("model", help=f"a folder, a name on the hub, or without a hub:\n{shapes}")
    names = ", ".join(cards.gpus().index)
    options.add_argument(
        "--gpu",
        nargs="+",
        help='"2x A100 80GB", as nvidia-smi says it, "here" (this machine), or of:\n' + names,
    )
    options.add_argument("--gpus", type=int, default=1, help="how many there are of each")
    options.add_argument("--split", choices=planner.SPLITS, help="how several share the model")
    options.add_argument("--memory-gb", type=float, help="any other card: what its driver reports")
    options.add_argument(
        "--bandwidth", type=float, default=math.nan, help="and GB/s, if its speed is asked"
    )
    options.add_argument("--technique", nargs="+", help=", ".join(TECHNIQUES))
    options.add_argument("--engine", help=", ".join(ENGINES))
    options.add_argument("--batch", type=int, default=1, help="sequences at once")
    options.add_argument("--length", type=int, default=2048, help="tokens cached for each")
    options.add_argument("--prompt", type=int, help="tokens of its prompt (all of them)")
    options.add_argument("--chunk", type=int, help="tokens prefilled at once (the engine's habit)")
    options.add_argument("--kv", type=int, default=16, help="bits of a cached number: 16, 8, 4")
    options.add_argument("--all", action="store_true", help="every row")
    options.add_argument("--breakdown", action="store_true", help="what the bytes are")
    options.add_argument("--json", action="store_true", help="the answer for a program")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """`seven-plan`: 0 where the model fits, 1 where it does not, 2 and a sentence for bad input."""
    asked = parser().parse_args(arguments)
    logging.set_verbosity_error()  # which kernels are missing here is no part of the answer
    try:
        told = answer(asked.model, asked)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if asked.json:
        print(as_json(told))
    else:
        as_text(told, asked.all, asked.breakdown)
    return 0 if told["fits"] else 1
