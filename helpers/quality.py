"""Is it still the same model? Perplexity, agreement with the baseline, KL divergence."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from helpers import machine

CHUNK = 128  # positions whose log-probabilities over the vocabulary are worked on at once
TOGETHER = 4  # windows in one forward pass: each weight is read once for all of them


@dataclasses.dataclass
class Quality:
    """What one model scored on the evaluation windows, in nats a token.

    Attributes
    ----------
    nll_windows : (windows,) mean negative log-likelihood over each window.
    tokens, seq_len : predictions in all, and token ids of a window.
    scored_with : the arithmetic, as `Forward` says it.
    nll_delta, nll_delta_ci95, agreement, kl_divergence : against the baseline; None for the
        baseline itself.
    changed : one dict a position where the most likely token is another than the baseline's:
        "window", "position", "baseline" and "variant" (token ids), "gap" (the baseline's best
        minus its second-best logit, nats).
    """

    nll_windows: np.ndarray
    tokens: int
    seq_len: int
    scored_with: str = "as timed"
    nll_delta: float | None = None
    nll_delta_ci95: tuple[float, float] | None = None
    agreement: float | None = None
    kl_divergence: float | None = None
    changed: list[dict[str, float]] = dataclasses.field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood (Jelinek et al. 1977); only comparable at one
        `seq_len`. NaN where the model gave NaN, infinity where it is beyond a float.
        """
        mean = float(np.mean(self.nll_windows))
        return math.exp(mean) if mean < 700 else mean * math.inf


def window_length(config: Any, tokens: int, longest: int = 512) -> int:
    """Token ids of an evaluation window: `longest`, or fewer where fewer `tokens` are predicted in
    all, or where the model of this configuration was made for shorter texts; two at least.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or longest
    return max(2, min(longest, tokens, context))


def windows(tokenizer: Any, text: str, seq_len: int, tokens: int) -> torch.Tensor:
    """Cut a text into non-overlapping windows, (windows, seq_len) token ids, with at least `tokens`
    predictions.

    BOS rule: each window starts with BOS if and only if the tokenizer itself would put one there.
    An EOS that the tokenizer appends is dropped. A window of n ids gives n - 1 predictions.

    Raises ValueError when the text is too short, or a window could predict nothing.
    """
    if seq_len < 2:
        raise ValueError(f"a window of {seq_len} token predicts nothing: it takes two or more.")
    ids = tokenizer(text).input_ids
    starts_with_bos = ids[0] == tokenizer.bos_token_id
    bos = ids[:1] if starts_with_bos else []
    body = ids[len(bos) :]
    if body[-1] == tokenizer.eos_token_id:
        body = body[:-1]
    step = seq_len - len(bos)
    count = math.ceil(tokens / (seq_len - 1))
    if count * step > len(body):
        raise ValueError(
            f"the text gives {len(body)} tokens, EVAL_TOKENS={tokens} in windows of {seq_len} "
            f"need {count * step}: lower EVAL_TOKENS."
        )
    rows = [bos + body[start : start + step] for start in range(0, count * step, step)]
    return torch.tensor(rows)


class WideAccumulation(TorchFunctionMode):
    """Within it, 16-bit matrix products on the CPU are computed as native 16-bit hardware does:
    exact products of 16-bit numbers, summed in float32, rounded once at the end.

    Without native instructions PyTorch takes a reference loop for them, up to ten times slower than
    the same sum by float32 kernels. Only quality is scored within it, never speed. Autocast is
    honoured.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is not F.linear:
            return function(*args, **(kwargs or {}))
        x, weight, *bias = [*args, *(kwargs or {}).values()]
        dtype = x.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        if x.device.type != "cpu" or dtype not in (torch.float16, torch.bfloat16):
            return function(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            wide: list[Any] = [
                None if t is None else t.to(dtype).float() for t in (x, weight, *bias)
            ]
            return F.linear(*wide).to(dtype)


class Forward:
    """A function from token ids (batch, length) to logits (batch, length, vocabulary).

    Parameters
    ----------
    context : makes a context manager around the forward pass (autocast, say).

    `scored_with` tells the arithmetic: "as timed", or, for a 16-bit type that this CPU only
    emulates, "exact products summed in float32" (see `WideAccumulation`).
    """

    def __init__(
        self,
        model: Any,
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ):
        self.model = model
        self.context = context
        kind = model.device.type
        dtype = model.dtype
        with context():
            if torch.is_autocast_enabled(kind):
                dtype = torch.get_autocast_dtype(kind)
        native = machine.native_dtypes(str(model.device))
        is_native = native.get(str(dtype).removeprefix("torch."), True)
        self.wide = kind == "cpu" and not is_native
        self.scored_with = "exact products summed in float32" if self.wide else "as timed"

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        arithmetic = WideAccumulation() if self.wide else contextlib.nullcontext()
        with torch.no_grad(), self.context(), arithmetic:
            return self.model(  # type: ignore[no-any-return]
                ids.to(self.model.device), use_cache=False
            ).logits


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """(positions, vocabulary) in float32, chunk by chunk; float32 logits are overwritten."""
    log_p = logits.float()
    for chunk in log_p.split(CHUNK):
        chunk -= chunk.logsumexp(-1, keepdim=True)
    return log_p


def _divergence(log_baseline: torch.Tensor, log_p: torch.Tensor) -> float:
    """Sum over positions of KL(baseline ‖ variant); rows in float32, their sum in float64."""
    total = 0.0
    for start in range(0, len(log_p), CHUNK):
        expected = log_baseline[start : start + CHUNK].to(log_p.device)
        chunk = log_p[start : start + CHUNK]
        rows = F.kl_div(chunk, expected, reduction="none", log_target=True).sum(-1)
        total += float(rows.double().sum())
    return total


def _changes(
    window: int, log_baseline: torch.Tensor, log_p: torch.Tensor
) -> list[dict[str, float]]:
    """The positions of a window where the best token is another: see `Quality.changed`."""
    expected = log_baseline.argmax(-1).cpu()
    choice = log_p.argmax(-1).cpu()
    moved = (choice != expected).nonzero().flatten()
    best_two = log_baseline[moved.to(log_baseline.device)].topk(2, dim=-1).values.cpu()
    changes = []
    for position, (first, second) in zip(moved.tolist(), best_two.tolist(), strict=True):
        changes.append(
            {
                "window": window,
                "position": position,
                "baseline": int(expected[position]),
                "variant": int(choice[position]),
                "gap": first - second,
            }
        )
    return changes


def interval(differences: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of the mean by Student's t over the windows; None for a single window."""
    if len(differences) < 2 or not np.isfinite(differences).all():
        return None
    if np.ptp(differences) < 1e-12:  # all alike: nothing to estimate a spread from
        return float(differences[0]), float(differences[0])
    interval = scipy.stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    return float(interval.low), float(interval.high)


def compare(
    forwards: dict[str, Callable[[torch.Tensor], torch.Tensor]], baseline: str, ids: torch.Tensor
) -> dict[str, Quality]:
    """Score models window by window, all on the same tokens, each against the baseline.

    Parameters
    ----------
    forwards : name to a function from token ids (batch, length) to logits (batch, length,
        vocabulary), as `Forward` is; the baseline is one of them.
    ids : (windows, seq_len), as `windows` cuts them.

    Returns a Quality a name. The difference in mean negative log-likelihood is paired by window;
    its 95 % interval is Student's t over the windows. Agreement is teacher-forced: the share of
    positions with the same best token. KL divergence is KL(baseline ‖ variant), the mean over
    positions, in nats (Kullback and Leibler 1951).
    """
    order = [baseline, *(name for name in forwards if name != baseline)]
    predictions = ids.shape[1] - 1
    nll: dict[str, list[float]] = {name: [] for name in order}
    changed: dict[str, list[dict[str, float]]] = {name: [] for name in order}
    divergence = dict.fromkeys(order, 0.0)

    batches = torch.arange(len(ids)).split(TOGETHER)
    for batch in tqdm(batches, "windows scored", leave=False):
        log_baseline = {}
        for name in order:
            logits = forwards[name](ids[batch])
            for window, row in zip(batch.tolist(), logits, strict=True):
                log_p = _log_probabilities(row[:-1])
                targets = ids[window, 1:, None].to(log_p.device)
                picked = log_p.gather(-1, targets).double()
                nll[name].append(-float(picked.sum()) / predictions)
                if name == baseline:
                    log_baseline[window] = log_p
                else:
                    divergence[name] += _divergence(log_baseline[window], log_p)
                    changed[name] += _changes(window, log_baseline[window], log_p)
            del logits, row, log_p

    count = predictions * len(ids)
    scores: dict[str, Quality] = {}
    for name in order:
        score = Quality(np.array(nll[name]), count, ids.shape[1])
        score.scored_with = getattr(forwards[name], "scored_with", "as timed")
        if name != baseline:
            differences = score.nll_windows - scores[baseline].nll_windows
            score.nll_delta = float(differences.mean())
            score.nll_delta_ci95 = interval(differences)
            score.agreement = 1 - len(changed[name]) / count
            score.kl_divergence = divergence[name] / count
            score.changed = changed[name]
        scores[name] = score
    return scores
