"""`make gpu-check`: are clocks, peaks, limits and rows right on this machine's card?

Eight checks, then the lessons, shortened, each with a verdict and its seconds; what the time given
would not hold is skipped, and said to be. It needs no network and no hub: the models are published
shapes with random weights. One folder holds the report, the records and the executed notebooks.

Without a card the same code runs on the CPU with a tiny model: a rehearsal, which judges only what
does not depend on a card.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import rich.markup
import torch
from rich.console import Console
from rich.table import Table
from transformers import BitsAndBytesConfig
from transformers.models.falcon import modeling_falcon

from helpers import limits, machine, memory, models, results, timing
from helpers.series import planner, processes
from helpers.timing import Variant
from helpers.workers import profile_03

PROMPT = "I am so fast that I can"  # the article's
OK = "ok"
FAILED = "failed"
NOT_HERE = "not testable here"
REHEARSED = "rehearsed"
ARTICLE_GB = {"fp32": 28.95, "bf16": 14.50}  # peaks of falcon-7b on an A100, article.txt
ON_A_CARD, ON_A_CPU = "random:falcon-7b", "random:tiny-falcon"  # where no model is named
# the shape that a lesson takes instead: one that lesson 03 writes no files of for llama.cpp, which
# takes minutes, and that transformers cuts in ranks
QWEN = {ON_A_CARD: "random:qwen2.5-3b", ON_A_CPU: "random:tiny-llama"}
# sparsegpt goes column by column
SMALL = {ON_A_CARD: "random:smollm2-135m", ON_A_CPU: "random:tiny-llama"}
# a lesson's sizes on a card; a rehearsal has those of the lesson's quick run
WHOLE = {"NEW_TOKENS": 50, "REPEATS": 4, "EVAL_TOKENS": 1000}
SHORT = {"NEW_TOKENS": 16, "REPEATS": 2, "EVAL_TOKENS": 1000}
TRAINED = SHORT | {"TRAIN_STEPS": 8, "FORGET_TOKENS": 500}
SERVED = SHORT | {"REQUESTS": 64, "SLOTS": 16, "BATCH_SIZES": [1, 16, 64]}
ROOM_BYTES = 1_000_000_000  # left on the card where its memory is filled
IMPOSSIBLE_BYTES = 2**50  # more than any machine has


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was compared.

    Attributes
    ----------
    seen : what was measured, beside what was expected.
    verdict : "ok", "failed", "not testable here", or "rehearsed": computed, but without a card
        there is nothing to judge.
    """

    what: str
    seen: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class Setting:
    """What every part is given. ends_at : the time (`time.time`) at which all must be done."""

    device: str
    model: str
    out: Path
    ends_at: float

    @property
    def on_card(self) -> bool:
        return memory.is_cuda(self.device)

    @property
    def new_tokens(self) -> int:
        """Tokens of each generation."""
        return 50 if self.on_card else 8

    def judge(self, what: str, seen: str, passed: bool, needs_card: bool = True) -> Finding:
        """A finding; where a card is needed to judge it and there is none, a rehearsed one."""
        if needs_card and not self.on_card:
            return Finding(what, seen, REHEARSED)
        return Finding(what, seen, OK if passed else FAILED)

    def between(self, what: str, value: float, low: float, high: float) -> Finding:
        """A ratio that only a card can judge, and its bounds."""
        seen = f"{value:.3f}, expected {low:g} to {high:g}"
        return self.judge(what, seen, low <= value <= high)

    def load(self, technique: str):
        """The model with its weights in fp32, bf16, int8 or nf4 (the rest of them in bf16)."""
        if technique == "fp32":
            return models.load(self.model, torch.float32, self.device)
        options = {}
        if technique == "int8":
            options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        if technique == "nf4":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        with plain_linear_layers():
            return models.load(self.model, torch.bfloat16, self.device, **options)

    def prompt(self) -> torch.Tensor:
        return models.prompt_ids(models.tokenizer(self.model), PROMPT)


@contextlib.contextmanager
def plain_linear_layers() -> Iterator[None]:
    """Within it Falcon is built of torch.nn.Linear: bitsandbytes replaces no subclass of it."""
    own = modeling_falcon.FalconLinear
    modeling_falcon.FalconLinear = torch.nn.Linear
    try:
        yield
    finally:
        modeling_falcon.FalconLinear = own


class HostEvent:
    """Takes the place of torch.cuda.Event on a CPU, so that the same code runs there."""

    def record(self) -> None:
        self.time_s = time.perf_counter()

    def elapsed_time(self, later: "HostEvent") -> float:
        return 1e3 * (later.time_s - self.time_s)


def mark(device: str):
    """An event that is recorded now, behind all that the device was given."""
    if not memory.is_cuda(device):
        event = HostEvent()
        event.record()
        return event
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def card_data(name: str):
    """The row of the planner's table for a card as its driver names it; None where there is none.

    Of the names and aliases whose every word is in the driver's name, the longest decides. A MIG
    slice has a share of its card's figures, which the table does not hold.
    """
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    fitting = {}
    for row_name, row in planner.gpus().iterrows():
        for alias in (row_name, *row["aliases"].split(";")):
            parts = set(alias.split("-"))
            if parts <= words:
                fitting[len(parts)] = row
    if not fitting or "mig" in words:
        return None
    return fitting[max(fitting)]


# ---- the eight checks


def copy_bandwidth(device: str, nbytes: int) -> float:
    """Bytes per second that a copy on the device reads and writes."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    seconds = limits.best_seconds(functools.partial(target.copy_, source), device)
    return 2 * nbytes / seconds


def device_limits(setting: Setting) -> list[Finding]:
    """Bandwidth, matrix products and launches, against a device copy and the card's data."""
    copied = copy_bandwidth(setting.device, 2_000_000_000 if setting.on_card else 64_000_000)
    measured = limits.measure(setting.device)
    folder = setting.out / "records" / machine.slug(setting.device)
    results.keep_limits(measured, setting.device, folder)
    read = max(measured["bandwidth_samples"])
    product = measured["flops_per_s"]["bfloat16"]
    launch_s = measured["launch_s"] or 0.0
    launch = f"{launch_s * 1e6:.1f} µs, expected 0.5 to 20"
    findings = [
        setting.between("read bandwidth ÷ device copy", read / copied, 0.9, 1.15),
        setting.judge("one launch", launch, 0.5e-6 <= launch_s <= 20e-6),
    ]
    name = torch.cuda.get_device_name(setting.device) if setting.on_card else "no card"
    card = card_data(name)
    if card is None:
        figures = f"{read / 1e9:.1f} GB/s, bf16 {product / 1e12:.2f} TFLOP/s"
        return [*findings, Finding(f"data of {name}: not in the table", figures, NOT_HERE)]
    reached = read / card.bandwidth_bytes_per_s
    findings.append(setting.between(f"bandwidth ÷ data of {card.name}", reached, 0.7, 1.02))
    if machine.native_dtypes(setting.device)["bfloat16"]:
        reached = product / card.fp16_flop_per_s
        findings.append(setting.between(f"bf16 product ÷ data of {card.name}", reached, 0.5, 1.05))
    return findings


def stamps(setting: Setting) -> list[Finding]:
    """Every token is stamped as its forward pass ends, by the clock of the device."""
    net = setting.load("bf16")
    ids = setting.prompt()
    timing.generate(net, ids, 3)  # what is loaded or tuned at first use
    passes, ends = [], []
    counting = net.register_forward_pre_hook(lambda *_: passes.append(1))
    by_passes = timing.generate(net, ids, setting.new_tokens, clock=lambda: len(passes))
    counting.remove()
    net.register_forward_hook(lambda *_: ends.append(mark(setting.device)))
    first = mark(setting.device)
    run = timing.generate(net, ids, setting.new_tokens)
    last = mark(setting.device)
    timing.synchronize(setting.device)
    latency_s = first.elapsed_time(last) / 1e3
    ends_s = [first.elapsed_time(end) / 1e3 for end in ends]
    # by a little early: the events begin before the prompt is copied to the card
    late = np.subtract(run.stamps_s, ends_s) / np.median(run.inter_token_s)
    each = by_passes.stamps_s == list(range(1, setting.new_tokens + 1))
    lateness = f"{late.min():+.2f} to {late.max():+.2f} steps after it, expected −0.3 to +0.6"
    return [
        setting.judge("a stamp for every pass, none a pass late", f"{each}", each, False),
        setting.between("latency by events ÷ by the clock", latency_s / run.latency_s, 0.98, 1.02),
        setting.judge(
            "stamps against the end of their pass on the device",
            lateness,
            late.min() >= -0.3 and late.max() <= 0.6,
        ),
    ]


def peaks(setting: Setting) -> list[Finding]:
    """Peak memory of four formats, against the planner and against the article."""
    ids = setting.prompt()
    shape = planner.describe(models.resolve(setting.model))
    findings = []
    for technique in ("fp32", "bf16", "int8", "nf4"):
        variant = one_run(setting, technique, ids)
        try:
            peak = memory.peak_of(variant, setting.device)
        except Exception as error:
            findings.append(cannot(f"peak of {technique}", error))
            continue
        used = peak.peak_bytes - peak.resident_before_bytes
        workload = {"length": ids.shape[1] + setting.new_tokens, "prompt": ids.shape[1]}
        predicted = planner.memory(shape, technique, engine="transformers", **workload)
        ratio = used / predicted["total_bytes"]
        what = f"{technique}: peak ÷ planned, {used / 1e9:.2f} GB"
        findings.append(setting.between(what, ratio, 0.97, 1.03))
        if setting.model == ON_A_CARD and technique in ARTICLE_GB:
            ratio = used / 1e9 / ARTICLE_GB[technique]
            # the article's engine holds the head apart from the embedding: 0.3 G parameters more
            findings.append(setting.between(f"{technique}: peak ÷ article's", ratio, 0.92, 1.02))
    return findings


def one_run(setting: Setting, technique: str, ids: torch.Tensor, **options) -> Variant:
    return Variant(
        lambda: setting.load(technique),
        lambda net: timing.generate(net, ids, setting.new_tokens, **options),
    )


def cannot(what: str, error: Exception) -> Finding:
    """What a machine lacks the memory or a package for is no failure of the check."""
    status, reason = timing.failure(error)
    verdict = FAILED if status == "failed" else NOT_HERE
    return Finding(what, f"{status}: {reason}", verdict)


def launches(setting: Setting) -> list[Finding]:
    """Hundreds of launches a step, or one graph: eager against a static cache, in two formats."""
    ids = setting.prompt()
    load = memory.cache(setting.load)
    probe = limits.Bandwidth(setting.device)
    findings = []
    for technique in ("fp32", "bf16"):
        variants = {}
        for name, options in {"eager": {}, "static": {"cache_implementation": "static"}}.items():
            run = one_run(setting, technique, ids, **options).run
            variants[name] = Variant(functools.partial(load, technique), run)
        # a static cache is compiled, recorded and then replayed
        runs = 3 if setting.on_card else 1
        series = timing.measure(variants, "eager", runs, runs, between=probe)
        failed = [name for name in series if series[name].status != "ok"]
        for name in failed:
            reason = f"{series[name].status}: {series[name].reason}"
            verdict = NOT_HERE if series[name].status == "oom" else FAILED
            findings.append(Finding(f"{technique}, {name}", reason, verdict))
        if not failed:
            findings += compared(setting, technique, series, load(technique), probe.best)
        load.cache_clear()
        memory.free()
    return findings


def compared(setting, technique, series, net, bandwidth) -> list[Finding]:
    """Eager and static: speeds, the share of the limit by bandwidth, launches."""
    ceiling = limits.decode_limit(limits.decode_bytes(net), bandwidth)
    speeds = {name: series[name].median("decode_tokens_per_s") for name in series}
    count = limits.launches(net)
    shares = ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items())
    gain = timing.ratio(series["eager"].latency_s, series["static"].latency_s)
    highest = max(speeds.values()) / ceiling
    return [
        setting.judge(
            f"{technique}: launches of an eager step",
            f"{count}; tokens/s: {shares}; static over eager {gain.value:.2f}×",
            bool(count),
        ),
        setting.between(f"{technique}: static over eager", gain.value, 0.95, 100),
        setting.between(f"{technique}: fastest ÷ limit by bandwidth", highest, 0.0, 1.03),
    ]


def step_profile(setting: Setting) -> list[Finding]:
    """The parts of lesson 03's step profile, against the profiler's own sum and events."""
    net = setting.load("bf16")
    parts, _ = profile_03.step_parts(net)
    total_s = sum(parts.values()) - parts["whole"]
    token = torch.ones(1, 1, dtype=torch.long, device=net.device)
    with torch.no_grad(), torch.profiler.profile() as profile:
        net(token, use_cache=False)
        timing.synchronize(setting.device)
    kind = torch.autograd.DeviceType.CUDA if setting.on_card else torch.autograd.DeviceType.CPU
    field = "self_device_time_total" if setting.on_card else "self_cpu_time_total"
    own_us = 0.0
    for event in profile.events():
        if event.device_type == kind and not event.is_user_annotation:
            own_us += getattr(event, field)
    return [
        setting.between("parts ÷ the profiler's kernels", total_s / (own_us / 1e6), 0.9, 1.1),
        setting.between("parts ÷ the step by events", total_s / parts["whole"], 0.0, 1.05),
    ]


def available(setting: Setting) -> list[Finding]:
    """A memory pass gives back what it took."""
    memory.free()
    before = memory.available_bytes(setting.device)
    memory.peak_of(one_run(setting, "bf16", setting.prompt()), setting.device)
    lost = before - memory.available_bytes(setting.device)
    what = "memory available before a pass less after it"
    return [setting.judge(what, f"{lost / 1e9:.2f} GB, expected below 0.5", lost < 0.5e9)]


def held_bytes(setting: Setting) -> list[Finding]:
    """Bytes that quantized models hold, counted by tensor."""
    shape = planner.describe(models.resolve(setting.model))
    findings = []
    try:
        nf4 = memory.weight_bytes(setting.load("nf4"))
        predicted = planner.memory(shape, "nf4", engine="transformers")["weight_bytes"]
        seen = f"{nf4 / predicted:.4f} of the planned {predicted / 1e9:.3f} GB, expected 1 ± 0.005"
        passed = abs(nf4 / predicted - 1) < 0.005
        findings.append(setting.judge("nf4: bytes held", seen, passed, False))
        int8 = setting.load("int8")
        before = memory.weight_bytes(int8)
        timing.generate(int8, setting.prompt(), 2)
        after = memory.weight_bytes(int8)
        seen = f"{before} before, {after} after"
        # its scales move from the weight to the layer
        findings.append(
            setting.judge("int8: a forward keeps the count", seen, before == after, False)
        )
    except Exception as error:
        findings.append(cannot("bytes held", error))
    return findings


def out_of_memory(setting: Setting) -> list[Finding]:
    """A full card: each way to run out of memory is a row `oom`, and the next row is whole."""
    tiny = dataclasses.replace(setting, model="random:tiny-falcon")
    small = one_run(tiny, "bf16", tiny.prompt())
    too_much = IMPOSSIBLE_BYTES
    filling = None
    if setting.on_card:
        too_much = 2 * ROOM_BYTES
        memory.free()
        rest = memory.available_bytes(setting.device) - ROOM_BYTES
        filling = torch.empty(rest, dtype=torch.uint8, device=setting.device)

    def fail(model=None):
        return torch.ones(too_much, dtype=torch.uint8, device=setting.device)

    variants = {
        "the baseline loads": Variant(fail, small.run),
        "a run": Variant(small.load, fail),
        "the next row": small,
    }
    series = timing.measure(variants, "the baseline loads", 2, 0)
    expected = dict(zip(variants, ("oom", "oom", "ok"), strict=True))
    findings = []
    for name, row in series.items():
        seen = f"{row.status}: {row.reason or f'{len(row.runs)} runs'}, expected {expected[name]}"
        passed = row.status == expected[name]
        findings.append(setting.judge(f"no memory: {name}", seen, passed, False))
    del filling
    memory.free()
    return findings


# ---- lessons


def lesson(
    name: str, shapes: dict[str, str], sizes: dict, deeper: bool = False, **parameters
) -> Callable[[Setting], list[Finding]]:
    """A part that runs this notebook in processes of its own, ended when the time is over.

    shapes : the model that takes the place of the setting's. sizes : parameters on a card.
    """

    def run(setting: Setting) -> list[Finding]:
        records = setting.out / "records"
        given = {"MODEL": shapes.get(setting.model, setting.model), "DEVICE": setting.device}
        given |= parameters | (sizes if setting.on_card else {})
        command = [sys.executable, "-m", "helpers.series.run", "--only", name]
        command += ["--out", setting.out / "notebooks", "-p", f"RESULTS_DIR={records}"]
        command += ["--deeper"] if deeper else []
        command += [] if setting.on_card else ["--profile", "smoke"]
        for key, value in given.items():
            command += ["-p", f"{key}={value}"]
        left_s = max(1.0, setting.ends_at - time.time())
        try:
            processes.run(command, timeout_s=left_s, on_line=lambda line: None)
        except processes.ServingError as error:
            out_of_time = time.time() >= setting.ends_at
            return [Finding("the run", str(error), NOT_HERE if out_of_time else FAILED)]
        paths = records.glob(f"*/*/**/{name}.json")
        return rows_of(setting, max(paths, key=lambda path: path.stat().st_mtime))

    return run


def rows_of(setting: Setting, path: Path) -> list[Finding]:
    """The rows of a lesson: what ran, how fast, and none above its ceiling."""
    records = results.read(path).records
    ceilings = results.read_limits(setting.out / "records" / machine.slug(setting.device))
    ran = [record for record in records if record.status == "ok"]
    # without a card there may be none: torchao's all need one
    seen = f"{len(ran)} of {len(records)}"
    findings = [setting.judge("rows that ran", seen, bool(ran), needs_card=not ran)]
    for record, row in zip(records, results.frame(records, ceilings).itertuples(), strict=True):
        if record.status != "ok":
            verdict = FAILED if record.status == "failed" else NOT_HERE
            findings.append(Finding(record.id, f"{record.status}: {record.reason}", verdict))
            continue
        seen = []
        if record.tokens_per_s:
            seen.append(f"{record.tokens_per_s:.1f} tokens/s")
        if record.speedup:
            seen.append(results.interval(record.speedup, record.speedup_ci95, unit="×"))
        if row.limit_share > 0:  # unknown where no step was counted
            seen.append(f"{row.limit_share:.0%} of limit")
        below = not row.limit_share > 1.03
        findings.append(setting.judge(record.id, ", ".join(seen) or "scored", below))
    return findings


# ---- the whole


@dataclasses.dataclass(frozen=True)
class Part:
    """A check or a lesson.

    card_s, rehearsal_s : seconds that it needs, with falcon-7b on a card and with a tiny model on
        a CPU. Those for a card are estimates: no card has run it yet.
    """

    run: Callable[[Setting], list[Finding]]
    card_s: float
    rehearsal_s: float


PARTS = {
    "limits": Part(device_limits, 10, 10),
    "stamps": Part(stamps, 25, 5),
    "peaks": Part(peaks, 60, 10),
    "launches": Part(launches, 100, 10),
    "profile": Part(step_profile, 20, 5),
    "available": Part(available, 20, 5),
    "held": Part(held_bytes, 30, 5),
    "memory": Part(out_of_memory, 10, 5),
    "01": Part(lesson("01_mixed_precision", {}, WHOLE), 120, 60),
    "02": Part(lesson("02_bfloat16", {}, WHOLE), 100, 60),
    "03": Part(lesson("03_quantization", QWEN, SHORT), 180, 60),
    "03-torchao": Part(lesson("03_engines", QWEN, SHORT, deeper=True), 180, 60),
    "04": Part(lesson("04_adapters", QWEN, TRAINED, DATASET="embedded"), 150, 60),
    "05": Part(lesson("05_pruning", QWEN, SHORT), 120, 60),
    "05-kernels": Part(
        lesson("05_sparsity", SMALL, SHORT, deeper=True, SPARSITY_PERCENT=[50]), 90, 60
    ),
    "06": Part(lesson("06_continuous_batching", QWEN, SERVED, RUN_VLLM=False), 120, 60),
    "07": Part(
        lesson("07_multiple_gpus", QWEN, SHORT, FSDP_RANKS=1, TP_RANKS=1, TRY_VLLM=False), 90, 60
    ),
}


def make_model(setting: Setting) -> list[Finding]:
    """The checkpoint with random weights, made once; every part reads it."""
    folder = Path(models.resolve(setting.model))
    nbytes = sum(path.stat().st_size for path in folder.iterdir())
    return [Finding("folder of the model", f"{nbytes / 1e9:.3f} GB", OK)]


def run_part(name: str, part: Part, setting: Setting) -> dict:
    """Run one part if the time left holds it; as the report keeps it."""
    given_s = part.card_s if setting.on_card else part.rehearsal_s
    left_s = max(0.0, setting.ends_at - time.time())
    if given_s > left_s:
        seen = f"needs {given_s:.0f} s, {left_s:.0f} are left"
        return {"part": name, "verdict": "skipped", "seconds": 0.0, "findings": [], "why": seen}
    start = time.perf_counter()
    try:
        findings = part.run(setting)
    except Exception as error:
        findings = [Finding("broke off", "; ".join(timing.failure(error)), FAILED)]
    memory.free()
    return {
        "part": name,
        "verdict": verdict([finding.verdict for finding in findings]),
        "seconds": time.perf_counter() - start,
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "why": "",
    }


def verdict(verdicts: list[str]) -> str:
    """That of a part: failed where one of its findings is; ok where one is and none failed."""
    for one in (FAILED, OK, REHEARSED):
        if one in verdicts:
            return one
    return NOT_HERE


def show(parts: list[dict], title: str, console: Console) -> None:
    """One table of all findings."""
    table = Table("part", "verdict", "what", "seen", title=title)
    for part in parts:
        table.add_section()
        seconds = f"{part['seconds']:.0f} s" if part["findings"] else part["why"]
        table.add_row(f"[bold]{part['part']}[/bold]", f"[bold]{part['verdict']}[/bold]", seconds)
        for finding in part["findings"]:
            seen = rich.markup.escape(finding["seen"])
            table.add_row("", finding["verdict"], finding["what"], seen)
    console.print(table)


def keep(parts: list[dict], setting: Setting, title: str) -> None:
    """The report so far: as data, and as the table that is shown."""
    report = {
        "title": title,
        "machine": machine.describe(setting.device),
        "model": setting.model,
        "device": setting.device,
        "parts": parts,
    }
    results.write_atomically(setting.out / "report.json", json.dumps(report, indent=1) + "\n")
    with (setting.out / "report.txt").open("w", encoding="utf-8") as file:
        show(parts, title, Console(file=file, width=160))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=480, help="time for all of it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", help="for all parts; by default each has its own")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--out", type=Path, help="folder of the report, records and notebooks")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        device = machine.pick_device(options.device)
    except ValueError as error:
        console.print(f"[red]{error}[/red]")
        return 2
    on_card = memory.is_cuda(device)
    model = options.model or (ON_A_CARD if on_card else ON_A_CPU)
    out = options.out or results.ROOT / "runs" / "gpu-check" / machine.slug(device)
    begun = psutil.Process().create_time()  # the imports count
    setting = Setting(device, model, out.resolve(), begun + options.seconds)
    setting.out.mkdir(parents=True, exist_ok=True)
    title = f"{machine.line(device)}; {model}"
    if not on_card:
        title = f"Rehearsal on a CPU, which says nothing about a card. {title}"
    console.print(title)
    done = []
    chosen = {"model": Part(make_model, 0, 0)}  # whatever the time: all others need it
    chosen |= {name: part for name, part in PARTS.items() if name in options.parts}
    for name, part in chosen.items():
        done.append(run_part(name, part, setting))
        console.print(f"{name}: {done[-1]['verdict']} {done[-1]['why']}")
        keep(done, setting, title)
    show(done, title, console)
    console.print(f"report, records and notebooks in {setting.out}")
    return int(any(part["verdict"] == FAILED for part in done))


if __name__ == "__main__":
    sys.exit(main())
