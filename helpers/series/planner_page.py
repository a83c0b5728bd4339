"""PLANNER.md: what the planner says of every shape in the project, to be checked by hand from a
configuration, and how far it is from what others published.

`python -m helpers.series.planner_page` writes it again, and what the planner keeps of published
rows (`data/planned_*.csv`); tests hold both to what the planner says.
"""

import math
import re
from collections import Counter

import pandas as pd

from helpers import results
from helpers.series import anatomy, planner
from helpers.series.anatomy import Model

PAGE = results.ROOT / "PLANNER.md"
SAME_SHAPE = {"llama-3-8b": "llama-3.1-8b"}  # published under one name, written under the other
LONG = 32_768  # tokens, for a cache that may have windows
HEAD = """# The planner, checked

`seven-plan MODEL --gpu "RTX 4090"` says whether a model fits a card, what would fit instead, and
how fast it can be, from its configuration alone: no weights, and no network for the shapes
below. Its exit status is 0 where it fits, 1 where it does not, 2 for bad input. This page is
written by `python -m helpers.series.planner_page`; a test fails where it is not what the planner
says.
"""
SHAPES = """## Shapes: to be checked by hand

A matrix of rows × columns counts once for each layer; a tied head counts once. The cache is
what transformers keeps for one sequence, in numbers of 2 bytes: layers × numbers of a position,
in a window only the last positions, in a latent its width. *Read* is what one token reads:
without an untied embedding, and of the experts those that the router picks. *As stored* is the
format of the published checkpoint.
"""
PEAKS = """## Memory: against published peaks

No term is fitted to these, except that LitGPT's prefill holds two copies of the head, which was
found here. All are of batch 1. One figure of Qwen2.5's page is left out: 1.5B in AWQ, 1.51 GiB
after 1 token and 1.63 after 6,144, most likely a peak of its loading.
"""
SIZES = """## Formats: against published sizes

Files of llama.cpp (its M mixes as its source gives them for a LLaMA; other architectures may
differ a little), and checkpoints in MXFP4, whose other tensors are in 16 bits.
"""
SPEEDS = """## Speed: against published rows

The limit is the bytes of a step over the bandwidth of the card, or its operations over the
card's. *Beyond it* is what a published step took more, for each layer. What to expect of another
model or card is its limit and that much a layer.
"""
UNKNOWN = """## What is not known

- The towers of models of several media are not counted; the answer says so.
- What a model caches that transformers' own cache classes do not hold is refused in one sentence.
- vLLM: its CUDA graphs are not counted, and its peaks are published nowhere that was found;
16,384 or 2,048 tokens a step on some cards instead of 8,192. Of latent attention it keeps the
first projections whole on every GPU and a copy of the last in 16 bits: by its source 1.5 % of an
eighth of DeepSeek-V3, not counted either.
- No speed of FP8, MXFP4, NVFP4 and of llama.cpp on a GPU is among the published rows: only the
limit is told.
- Caches in 8 and 4 bits are sums of bytes, met by no published peak.
- A batch of a model with experts is taken to pick them at random.
- Loading (the peak before the first token), several GPUs' buffers of messages, and fragmentation
are not counted.
"""


def cache_in_words(model: Model) -> str:
    """What is cached for a position, alike layers together: "32 × 2,048"."""
    if model.cache is None:
        return "not known"
    parts = []
    for layer, count in Counter(model.cache).items():
        part = f"{count} × {layer.position:,}"
        if layer.window < math.inf:
            part += f" (at most {layer.window:,.0f} positions)"
        if not layer.position:  # whatever the length
            part = f"{count} states of {layer.state + layer.float32_state:,}"
        parts.append(part)
    return " + ".join(parts)


def shapes() -> pd.DataFrame:
    """A row for each configuration written in the project."""
    rows = []
    for path in sorted(anatomy.CONFIGS.glob("*.json")):
        if path.stem.startswith("tiny-"):
            continue
        model = planner.describe(path.stem)
        count = planner.parameters(model)
        stored = model.own or "bf16"
        weights = planner.memory(model, stored, length=1)["weight_bytes"]
        rows.append(
            {
                "model": model.name,
                "parameters": f"{count['total']:,}",
                "read": f"{count['read']:,}",
                "as stored": stored,
                "GB": f"{weights / 1e9:.2f}",
                "cached numbers of a position": cache_in_words(model),
                "bytes of the first": f"{planner.kv_cache(model, length=1):,}",
                f"GB of {LONG:,}": f"{planner.kv_cache(model, length=LONG) / 1e9:.3f}",
            }
        )
    return pd.DataFrame(rows)


def peaks() -> pd.DataFrame:
    """A row for each published peak."""
    rows = planner.checked()
    return pd.DataFrame(
        {
            "source": rows["source"].map(short),
            "model": rows["model"],
            "variant": rows["variant"],
            "engine": rows["engine"],
            "tokens": rows["length"].map("{:,}".format),
            "published GB": (rows["measured_bytes"] / 1e9).map("{:.2f}".format),
            "planned GB": (rows["predicted_bytes"] / 1e9).map("{:.2f}".format),
            "off": rows["error"].map("{:+.2%}".format),
        }
    )


def published_sizes() -> pd.DataFrame:
    """Published sizes of weights (GiB) beside the planner's: files of llama.cpp, checkpoints."""
    published = pd.read_csv(planner.DATA / "published.csv")
    rows = []
    for row in published.itertuples():
        if row.metric == "checkpoint_size":
            size = row.value
        elif row.metric == "bits_per_weight" and row.variant in planner.TECHNIQUES:
            size = float(re.search(r"file of ([\d.]+) GiB", row.note)[1])
        else:
            continue
        model = planner.describe(SAME_SHAPE.get(row.model, row.model))
        weights = planner.memory(model, row.variant, length=1)["weight_bytes"] / 2**30
        rows.append(
            {
                "source": row.source,
                "model": model.name,
                "format": row.variant,
                "published": size,
                "planned": weights,
            }
        )
    return pd.DataFrame(rows)


def sizes() -> pd.DataFrame:
    """`published_sizes` as a table to read."""
    rows = published_sizes()
    return pd.DataFrame(
        {
            "source": rows["source"].str.split(" \\(").str[0],
            "model": rows["model"],
            "format": rows["format"],
            "published GiB": rows["published"].map("{:.2f}".format),
            "planned GiB": rows["planned"].map("{:.2f}".format),
            "off": (rows["planned"] / rows["published"] - 1).map("{:+.2%}".format),
        }
    )


def speeds() -> pd.DataFrame:
    """A row for each engine, technique, and number of GPUs of the published speeds."""
    rows = []
    alike = planner.runs().groupby(["engine", "technique", "cut"])
    for (engine, technique, cut), same in alike:
        rows.append(
            {
                "engine": engine,
                "technique": technique,
                "GPUs": cut,
                "rows": len(same),
                "batches": ", ".join(map(str, sorted(set(same["batch"])))),
                "of limit": span(100 * same["share"], ".0f", " %"),
                "beyond it, ms a layer": span(1e3 * same["layer_s"], ".2f", ""),
                "sources": ", ".join(sorted(set(same["source"].map(short)))),
            }
        )
    return pd.DataFrame(rows)


def span(values: pd.Series, form: str, unit: str) -> str:
    """The least and the greatest, or the one."""
    ends = dict.fromkeys(f"{value:{form}}" for value in (values.min(), values.max()))
    return " to ".join(ends) + unit


def short(source: str) -> str:
    """The first word of a source."""
    return source.split()[0].rstrip(":")


def left_out() -> str:
    """How near are expected speeds to published ones that were left out? One sentence."""
    ratios = planner.speed_errors()
    factors = ratios.where(ratios > 1, 1 / ratios)
    return (
        f"Of {len(planner.runs())} published speeds {len(ratios)} have others to be expected from. "
        f"Each left out in turn, half of them are met within a factor of {factors.median():.2f}, "
        f"nine of ten within {factors.quantile(0.9):.2f}, the worst within {factors.max():.2f}."
    )


def page() -> str:
    """The whole page."""

    def table(frame: pd.DataFrame) -> str:
        return frame.to_markdown(index=False, disable_numparse=True) + "\n"

    parts = [HEAD, SHAPES, table(shapes()), PEAKS, table(peaks()), SIZES, table(sizes())]
    parts += [SPEEDS, left_out() + "\n", table(speeds()), UNKNOWN]
    return "\n".join(parts)


def keep() -> None:
    """Write what `planner.kept` reads."""
    for name in ("checked", "runs"):
        rows = getattr(planner, name)()
        rows.to_csv(planner.DATA / f"planned_{name}.csv", float_format="%.9g")


def main() -> None:
    keep()
    results.write_atomically(PAGE, page())
    print(PAGE.name)


if __name__ == "__main__":
    main()
