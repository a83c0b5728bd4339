"""Requests of lesson 06, and ways through them: one workload for every engine, each answer with its
times. What comes of the answers is in `helpers.series.serving`.

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

import numpy as np
import torch
import transformers

from helpers import timing

SETTLE_S = 0.3  # time for other engines' threads to fall asleep, before a run and not in it
LEAST, MOST = 6, 16  # tokens of a prompt


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

    @property
    def between_s(self) -> list[float]:
        """Mean seconds between two tokens of each answer whose tokens came one by one."""
        stamps = [answer.stamps_s for answer in self.answers.values()]
        return [(s[-1] - s[0]) / (len(s) - 1) for s in stamps if len(s) > 1]


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
