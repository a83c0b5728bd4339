"""Tuning a model on little text: the memory that it should take, the loop, what it took, and what
it won back. For lessons that tune (adapters, pruning).
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import bitsandbytes
import numpy as np
import peft
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from helpers import machine, memory, models, quality, results, timing
from helpers.series import planner
from helpers.timing import Ratio, Variant

TRAINED = "trained.safetensors"  # of a model that no library saves: what was trained of it

CHECKS = 4  # looks at the held-out loss on the way, the last one apart
CLIP = 1.0  # norm of the gradient, at most
LOGIT_COPIES = 3  # in float32, of one step: the logits, their log-softmax, their gradient


@functools.cache
def native_type(device: str) -> torch.dtype:
    """The 16-bit type that the device multiplies itself, bfloat16 where it has both; float32 where
    it has neither.
    """
    native = machine.native_dtypes(device)
    if native["bfloat16"]:
        return torch.bfloat16
    return torch.float16 if native["float16"] else torch.float32


def linear_layers(model) -> dict[str, torch.nn.Linear]:
    """Every linear layer by name, the output head left out.

    Raises NotImplementedError for a model without any (GPT-2 has layers of its own).
    """
    head = model.get_output_embeddings()
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            layers[name] = module
    if not layers:
        raise NotImplementedError(
            f"{type(model).__name__} has no torch.nn.Linear beside its head: adapters made by hand "
            "need one."
        )
    return layers


# ---- memory, before anything is loaded


def lora_numbers(model: planner.Model, rank: int) -> int:
    """Numbers of LoRA matrices beside every linear layer but the head."""
    linear = [tensors for tensors in model.tensors if tensors.kind == "linear"]
    return sum(rank * (each.rows + each.columns) * each.count for each in linear)


def scaled_numbers(model: planner.Model) -> int:
    """Numbers of a bias and a scale for each output of every linear layer but the head, and those
    of the vectors that are there (norms, biases).
    """
    linear = [tensors for tensors in model.tensors if tensors.kind == "linear"]
    vectors = planner.parameters(model)["other"]
    return vectors + sum(2 * each.rows * each.count for each in linear)


def training_bytes(model: planner.Model, scheme: str, trained: int, beside: bool = True) -> int:
    """Weights, and in 32 bits the gradients and Adam's two running means of what is trained;
    activations come on top.

    Parameters
    ----------
    scheme : of the weights, as the planner names it ("fp32", "bf16", "nf4-dq").
    trained : numbers that are trained.
    beside : they are beside the weights (an adapter), not the weights themselves.
    """
    weights = planner.memory(model, scheme, length=1)["weight_bytes"]
    numbers = 4 if beside else 3
    return weights + 4 * numbers * trained


def checkpointed_bytes(model: planner.Model, tokens: int) -> int:
    """What a step of so many tokens keeps with gradient checkpointing: each layer's input in 16
    bits, the logits in float32 (LOGIT_COPIES); and the embedding, which peft widens to float32.
    """
    inputs = 2 * model.layers * tokens * model.hidden
    logits = 4 * LOGIT_COPIES * tokens * model.vocabulary
    return inputs + logits + 2 * planner.parameters(model)["embedding"]


# ---- training


def loss_of(model, ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Mean loss of the next token, nats; under autocast where a 16-bit type is native.

    labels : the ids, with -100 where nothing is to be learnt; by default all of them.
    """
    ids = ids.to(model.device)
    labels = ids if labels is None else labels.to(model.device)
    half = native_type(str(model.device))
    if half == torch.float32:
        return model(input_ids=ids, labels=labels, use_cache=False).loss
    with torch.autocast(model.device.type, half):
        return model(input_ids=ids, labels=labels, use_cache=False).loss


def _optimizer(model, rate: float, steps: int, faster: dict[str, float]):
    """AdamW over what wants a gradient (paged for a 4-bit model on a GPU), its schedule, and the
    scaler of the loss that float16 needs.
    """
    by_factor: dict[float, list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            factor = next((faster[part] for part in faster if part in name), 1.0)
            by_factor.setdefault(factor, []).append(parameter)
    groups = [{"params": group, "lr": factor * rate} for factor, group in by_factor.items()]
    kind = model.device.type
    paged = kind == "cuda" and getattr(model, "is_loaded_in_4bit", False)
    adamw = bitsandbytes.optim.PagedAdamW32bit if paged else torch.optim.AdamW
    optimizer = adamw(groups, lr=rate, weight_decay=0.0)
    rise = max(1, steps // 8)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, 1 - step / steps)
    )
    scales = native_type(str(model.device)) == torch.float16
    return optimizer, schedule, torch.amp.GradScaler(kind, enabled=scales)


def train(
    model, batches: Sequence[torch.Tensor], rate: float, check=None, labels=None, faster=None
) -> dict:
    """One pass over the batches of token ids. The rate rises over the first eighth of the steps
    and falls to zero; what is trained, and its gradient, is in 32 bits.

    Parameters
    ----------
    check : (windows, length) token ids whose loss is looked at on the way, and at the end.
    labels : of each batch, as `loss_of` takes them.
    faster : multiples of the rate by a part of the parameter's name.

    Returns train_losses (of each step, before it, nats), heldout_losses and the steps before them
    (heldout_steps), train_s (seconds without those looks), train_tokens, trainable_parameters.
    """
    optimizer, schedule, scaler = _optimizer(model, rate, len(batches), faster or {})
    every = max(1, len(batches) // CHECKS)
    train_losses = []
    heldout_losses = []
    heldout_steps = []
    train_s = 0.0
    model.train()
    for step, batch in enumerate(tqdm(batches, "training", leave=False)):
        if check is not None and step % every == 0:
            heldout_steps.append(step)
            heldout_losses.append(_check(model, check))
        start = time.perf_counter()
        loss = loss_of(model, batch, labels[step] if labels else None)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
        train_losses.append(loss.item())
        train_s += time.perf_counter() - start
    if check is not None:
        heldout_steps.append(len(batches))
        heldout_losses.append(_check(model, check))
    model.eval()
    return {
        "train_losses": train_losses,
        "heldout_losses": heldout_losses,
        "heldout_steps": heldout_steps,
        "train_s": train_s,
        "train_tokens": sum(batch.numel() for batch in batches),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


@torch.no_grad()
def _check(model, ids: torch.Tensor) -> float:
    """In training mode, as it is: bitsandbytes repacks a layer's weights when it is used in
    evaluation mode on a CPU, and could not train it after that.
    """
    return loss_of(model, ids).item()


def learn(
    start: Callable,
    batches: Sequence[torch.Tensor],
    rate: float,
    check: torch.Tensor,
    needed: int,
    device: str,
    seed: int = 0,
):
    """Train what `start` gives, and take its memory in a pass of its own, two steps long.

    needed : bytes that are known to be needed; where they are not free, nothing is begun.
    seed : set before the model of the training is made. Others as in `train`.

    Returns the model, and what `train` returns with train_peak_bytes, above the start.
    Raises MemoryError, and what loading and training raise.
    """
    free = memory.available_bytes(device)
    if needed > free:
        raise MemoryError(f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are there")
    two_steps = Variant(start, functools.partial(train, batches=batches[:2], rate=rate))
    peak = memory.peak_of(two_steps, device)
    torch.manual_seed(seed)
    model = start()
    took = train(model, batches, rate, check)
    took["train_peak_bytes"] = peak.peak_bytes - peak.resident_before_bytes
    return model, took


@contextlib.contextmanager
def or_a_row(lesson: results.Lesson, name: str) -> Iterator[None]:
    """What fails within becomes status and reason of the row `name`, which is said."""
    try:
        yield
    except Exception as error:
        status, reason = timing.failure(error)
        lesson.add(name, status=status, reason=reason)
        print(f"{name}: {reason}")
    memory.free()


def save(model, folder: Path) -> int:
    """Write what was trained of a model: all of it, peft's adapter, or, where the modules are the
    caller's own, the tensors that want a gradient. Returns the bytes of its safetensors files.
    """
    trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    is_whole = len(trained) == len(list(model.parameters()))
    if is_whole or isinstance(model, peft.PeftModel):
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        save_file(trained, folder / TRAINED)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def load_trained(model, folder: Path):
    """The model with the tensors that `save` wrote put into it.

    Raises RuntimeError where one of them has no place in it.
    """
    unexpected = model.load_state_dict(load_file(folder / TRAINED), strict=False).unexpected_keys
    if unexpected:
        raise RuntimeError(f"{folder.name} holds {unexpected[0]}, which the model has not")
    return model.eval()


def answer(model, tokenizer, question: str, tokens: int) -> str:
    """What a model answers, greedily, to a question in the form of its chat, if it has one; up to
    its end of sequence.
    """
    text = question
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = timing.generate(model, models.prompt_ids(tokenizer, text), tokens).ids[0]
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tokenizer.decode(ids).strip()


# ---- what it won


def compare_pairs(lesson: results.Lesson, scored: dict, pairs: Sequence[tuple[str, str]]) -> None:
    """The mean difference of two rows' log-likelihoods, nats a token, with its 95 % interval paired
    by window: into the first's record, and said. Pairs that were not scored are passed over.
    """
    for name, other in pairs:
        if {name, other} <= scored.keys():
            gaps = scored[name].nll_windows - scored[other].nll_windows
            mean, ends = float(np.mean(gaps)), quality.interval(gaps)
            against = f"nll_against_{other}"
            interval = None if ends is None else list(ends)
            lesson.add(name, details={against: mean, f"{against}_ci95": interval})
            print(f"{name:15} − {other:8} {results.interval(mean, ends, '+.3f')} nats a token")


def judge_recovery(
    lesson: results.Lesson, scored: dict, name: str, tuned: str, hurt: str, base: str
) -> None:
    """How much of what quantization or pruning lost did tuning win back, beyond what it gains on
    the domain anyway? Into the record of `name`, and said.

    Parameters
    ----------
    name, tuned : hurt and tuned, and tuned alone. hurt, base : the same before tuning.
    """
    if not {name, tuned, hurt, base} <= scored.keys():
        return
    left = loss_ratio((scored[name], scored[tuned]), (scored[hurt], scored[base]))
    if math.isnan(left.value):
        print(f"{name}: {hurt} lost nothing that these texts can tell, nothing to win back")
        return
    details = {"loss_left_share": left.value, "recovered_beyond_domain_share": 1 - left.value}
    lesson.add(name, details=details | {"loss_left_share_ci95": list(left[1:])})
    print(f"{name}: {results.interval(left.value, left[1:])} of the loss is left;", end=" ")
    print(f"{1 - left.value:.0%} won back beyond the domain's gain")


def loss_ratio(after: Sequence[quality.Quality], before: Sequence[quality.Quality]) -> Ratio:
    """What a change costs after tuning over what it costs before, each as (changed, unchanged).

    Counting against the unchanged, untuned model would book the domain's gain as recovery. The
    interval is Student's t on the windows' residuals (of a ratio, linearized). NaN where the
    interval of what the change cost before reaches down to zero: a share of it would mean nothing.
    """
    cost_after = after[0].nll_windows - after[1].nll_windows
    cost_before = before[0].nll_windows - before[1].nll_windows
    mean = float(cost_before.mean())
    least, _ = quality.interval(cost_before) or (mean, mean)
    if least <= 0:
        return Ratio(math.nan, None, None)
    value = float(cost_after.mean()) / mean
    ends = quality.interval(cost_after - value * cost_before)
    if ends is None:
        return Ratio(value, None, None)
    return Ratio(value, value + ends[0] / mean, value + ends[1] / mean)
