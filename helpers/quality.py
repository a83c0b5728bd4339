"""Is it still the same model? Perplexity, agreement with the baseline, KL divergence."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from helpers import machine
from helpers.progress import progress

CHUNK = 128  # positions whose log-probabilities over the vocabulary are worked on at once
# windows in one forward pass: each weight is read, and where need be widened, once for all of them
TOGETHER = 4


@dataclasses.dataclass
class Quality:
    """What one model scored on the evaluation windows. nll: negative log-likelihood in nats a
    token.

    nll_windows : (windows,) mean over each window.
    changed : one dict a position where the most likely token is another than the baseline's:
        "window", "position", "baseline" and "variant" (token ids), "gap" (baseline's best minus
        second-best logit, nats).
    nll_delta, nll_delta_ci95, agreement, kl_divergence : against the baseline; None for the
        baseline itself.
    """

    nll_windows: np.ndarray
    tokens: int
    seq_len: int
    nll_delta: float | None = None
    nll_delta_ci95: tuple[float, float] | None = None
    agreement: float | None = None
    kl_divergence: float | None = None
    changed: list[dict] = dataclasses.field(default_factory=list)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood (Jelinek et al. 1977); only comparable at one
        `seq_len`.
        """
        return math.exp(float(np.mean(self.nll_windows)))


def windows(tokenizer, text: str, seq_len: int, tokens: int) -> torch.Tensor:
    """Cut a text into non-overlapping windows, (windows, seq_len) token ids, with at least `tokens`
    predictions.

    BOS rule: each window starts with BOS if and only if the tokenizer itself would put one there. A
    window of n ids gives n - 1 predictions. Raises ValueError when the text is too short.
    """
    ids = tokenizer(text).input_ids
    bos = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    body, step = ids[len(bos) :], seq_len - len(bos)
    count = math.ceil(tokens / (seq_len - 1))
    if count * step > len(body):
        raise ValueError(
            f"the text gives {len(body)} tokens, EVAL_TOKENS={tokens} in windows of {seq_len} "
            f"need {count * step}: lower EVAL_TOKENS."
        )
    return torch.tensor([bos + body[i * step : (i + 1) * step] for i in range(count)])


class WideAccumulation(TorchFunctionMode):
    """Within it, 16-bit matrix products on the CPU are computed as native 16-bit hardware does:
    exact products of 16-bit numbers, summed in float32, rounded once at the end.

    Without native instructions PyTorch takes a reference loop for them, up to ten times slower than
    the same sum by float32 kernels. Only quality is scored within it, never speed. Autocast is
    honoured.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        x, weight, *bias = [*args, *(kwargs or {}).values()]
        cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if x.device.type != "cpu" or cast not in (torch.float16, torch.bfloat16):
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            wide = [None if t is None else t.to(cast).float() for t in (x, weight, *bias)]
            return F.linear(*wide).to(cast)


def logits_of(model, context: Callable | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from token ids (batch, length) to logits (batch, length, vocabulary), for
    `compare`.

    context : makes a context manager around the forward pass (autocast, say).
    """
    wide = model.device.type == "cpu" and not all(machine.native_dtypes("cpu").values())

    def forward(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), (context or torch.no_grad)():
            if not wide:
                return model(ids.to(model.device), use_cache=False).logits
            with WideAccumulation():
                return model(ids, use_cache=False).logits

    return forward


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """(positions, vocabulary) in float32, chunk by chunk; float32 logits are overwritten."""
    log_p = logits.float()
    for chunk in log_p.split(CHUNK):
        chunk -= chunk.logsumexp(-1, keepdim=True)
    return log_p


def _divergence(log_b: torch.Tensor, log_p: torch.Tensor) -> float:
    """Sum over positions of KL(baseline ‖ variant); rows in float32, their sum in float64."""
    rows = [
        F.kl_div(
            log_p[at : at + CHUNK],
            log_b[at : at + CHUNK].to(log_p.device),
            reduction="none",
            log_target=True,
        ).sum(-1)
        for at in range(0, len(log_p), CHUNK)
    ]
    return float(torch.cat(rows).double().sum())


def compare(forwards: dict[str, Callable], baseline: str, ids: torch.Tensor) -> dict[str, Quality]:
    """Score models window by window, all on the same tokens, each against the baseline.

    Parameters
    ----------
    forwards : name to a function as `logits_of` makes; the baseline is one of them.
    ids : (windows, seq_len), as `windows` cuts them.

    Returns a Quality a name. The difference in mean negative log-likelihood is paired by window;
    its 95 % interval is Student's t over the windows. Agreement is teacher-forced: the share of
    positions with the same best token. KL divergence is KL(baseline ‖ variant), the mean over
    positions, in nats (Kullback and Leibler 1951).
    """
    order = [baseline, *(name for name in forwards if name != baseline)]
    predictions = ids.shape[1] - 1
    nll = {name: [] for name in order}
    kl, changed = dict.fromkeys(order, 0.0), {name: [] for name in order}
    step = progress(len(ids), "windows scored")
    for batch in torch.arange(len(ids)).split(TOGETHER):
        base = {}
        for name in order:
            logits = forwards[name](ids[batch])
            for w, row in zip(batch.tolist(), logits, strict=True):
                log_p = _log_probabilities(row[:-1])
                picked = log_p.gather(-1, ids[w, 1:, None].to(log_p.device))
                nll[name].append(-float(picked.double().sum()) / predictions)
                base.setdefault(w, log_p)  # the baseline comes first
                if name != baseline:
                    kl[name] += _divergence(base[w], log_p)
                    changed[name] += _changes(w, base[w], log_p)
            del logits, row, log_p
        step(len(batch))
    count = predictions * len(ids)
    return {
        name: Quality(
            np.array(nll[name]),
            count,
            ids.shape[1],
            *(
                (None,) * 4
                if name == baseline
                else (
                    *_paired(nll[name], nll[baseline]),
                    1 - len(changed[name]) / count,
                    kl[name] / count,
                )
            ),
            changed=changed[name],
        )
        for name in order
    }


def _changes(window: int, base: torch.Tensor, log_p: torch.Tensor) -> list[dict]:
    """The positions of a window where the best token is another, as `Quality.changed` lists them."""
    expected, choice = base.argmax(-1).cpu(), log_p.argmax(-1).cpu()
    moved = (choice != expected).nonzero().flatten()
    best = base[moved.to(base.device)].topk(2, dim=-1).values.cpu()
    return [
        {
            "window": window,
            "position": int(at),
            "baseline": int(expected[at]),
            "variant": int(choice[at]),
            "gap": float(first - second),
        }
        for at, (first, second) in zip(moved, best, strict=True)
    ]


def _paired(variant: list[float], base: list[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean paired difference and its 95 % interval by Student's t (None for a single window)."""
    difference = np.subtract(variant, base)
    mean, n = float(difference.mean()), len(difference)
    if n == 1:
        return mean, None
    half = float(difference.std(ddof=1) / math.sqrt(n) * scipy.stats.t.ppf(0.975, n - 1))
    return mean, (mean - half, mean + half)
