"""Peak memory, weight bytes, KV-cache bytes. Bytes everywhere; GB (1e9) only when shown."""

import contextlib
import ctypes
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from helpers import models


@dataclasses.dataclass(frozen=True)
class Peak:
    """Memory of one pass, in bytes.

    kind : "cuda max_memory_allocated", or "process VmHWM" (peak resident set of this process).
    resident_before_bytes : what was taken before the variant was loaded.
    details : load_peak_bytes, the peak while loading; CUDA: reserved_bytes and process_gpu_bytes
        (NVML); CPU: anonymous_bytes and file_bytes, the resident set at the end by origin.
    """

    resident_before_bytes: int
    peak_bytes: int
    kind: str
    details: dict[str, int]


def _status(field: str, pid: int | str = "self") -> int:
    """A field of /proc/PID/status in bytes ("VmHWM": peak resident set, "VmRSS", "RssAnon",
    "RssFile").
    """
    for row in Path(f"/proc/{pid}/status").read_text().splitlines():
        if row.startswith(field + ":"):
            return int(row.split()[1]) * 1024
    raise KeyError(f"/proc/{pid}/status has no {field}")


def resident_bytes(device: str = "cpu") -> int:
    """What is taken now: the process's resident set, or CUDA memory allocated by PyTorch."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def reset_peak(device: str = "cpu") -> None:
    """Start a new peak at what is resident now (Linux: 5 to /proc/self/clear_refs resets VmHWM)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str = "cpu") -> int:
    """The peak since `reset_peak`: CUDA's max_memory_allocated, or VmHWM, which no sampling can
    miss.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _process_gpu_bytes() -> int | None:
    """This process's share of the GPUs by NVML; None where the driver does not tell (containers,
    WSL).
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        shares = [
            p.usedGpuMemory
            for i in range(pynvml.nvmlDeviceGetCount())
            for p in pynvml.nvmlDeviceGetComputeRunningProcesses(
                pynvml.nvmlDeviceGetHandleByIndex(i)
            )
            if p.pid == os.getpid()
        ]
        return sum(shares) if shares and None not in shares else None
    except pynvml.NVMLError:
        return None


@contextlib.contextmanager
def _every_block_returned():
    """Within it, glibc takes each block of 64 KiB or more from the system by itself, so that freed
    weights go back at once instead of staying in a fragmented heap. Slower: for memory passes only.
    Elsewhere nothing changes.
    """
    try:
        mallopt, threshold = ctypes.CDLL("libc.so.6").mallopt, -3  # M_MMAP_THRESHOLD
    except OSError:
        yield
        return
    mallopt(threshold, 64 * 1024)
    try:
        yield
    finally:
        mallopt(threshold, 32 * 1024 * 1024)


def _forget_mapped_weights() -> None:
    """Let go of mapped weight-file pages that only loading has touched (MADV_PAGEOUT): a checkpoint
    stays mapped as long as one of its tensors is used, and its other pages would count as resident.
    What a run needs comes back.
    """
    libc, pageout = ctypes.CDLL(None, use_errno=True), 21
    for row in Path("/proc/self/maps").read_text().splitlines():
        if row.endswith(".safetensors"):
            start, end = (int(address, 16) for address in row.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), pageout)


def peak_of(
    factory: Callable[[], Callable], device: str = "cpu", release: Callable[[], None] = lambda: None
) -> Peak:
    """Load a variant, run it once, and report the peak of the run: the memory pass, apart from all
    timing.

    factory : loads the variant and returns its call, as `timing.measure` takes them. The peak while
        loading stands apart in the details: a variant that needs more on its way in cannot be
        hosted on less. Mapped weight files count as resident once the run has touched them.
    release : drops what the factories loaded; called before and after.
    """
    release()
    models.free()
    before = resident_bytes(device)
    reset_peak(device)
    with _every_block_returned():
        call = factory()
        details = {"load_peak_bytes": peak_bytes(device)}
        models.free()
        _forget_mapped_weights()
        reset_peak(device)
        call()
        peak = peak_bytes(device)
        if torch.device(device).type == "cuda":
            details |= {"reserved_bytes": torch.cuda.max_memory_reserved(device)}
            share = _process_gpu_bytes()
            details |= {} if share is None else {"process_gpu_bytes": share}
        else:
            details |= {"anonymous_bytes": _status("RssAnon"), "file_bytes": _status("RssFile")}
        release()
    kind = "cuda max_memory_allocated" if torch.device(device).type == "cuda" else "process VmHWM"
    return Peak(before, peak, kind, details)


def tree_pss(pid: int) -> dict[str, int]:
    """Proportional set size over a process and all its descendants: shared pages are counted once.

    Returns {"pss_bytes", "anonymous_bytes", "file_bytes"} (the last two proportional as well).
    """
    root, total = psutil.Process(pid), {"pss_bytes": 0, "anonymous_bytes": 0, "file_bytes": 0}
    keys = {"Pss:": "pss_bytes", "Pss_Anon:": "anonymous_bytes", "Pss_File:": "file_bytes"}
    for process in [root, *root.children(recursive=True)]:
        try:
            rows = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
        except (OSError, psutil.Error):  # ended meanwhile
            continue
        for row in rows:
            name, value, *_ = row.split()
            if name in keys:
                total[keys[name]] += int(value) * 1024
    return total


def tensors(model) -> dict[str, torch.Tensor]:
    """Every tensor that holds weights, by name: parameters and the states that quantized ones
    carry; tied ones once.
    """
    found, seen = {}, set()
    for name, tensor in model.named_parameters():
        state = getattr(tensor, "quant_state", None)
        extra = (
            {
                f"{name}.{key}": value
                for key, value in state.as_dict(packed=False).items()
                if isinstance(value, torch.Tensor)
            }
            if state is not None
            else {}
        )
        if (
            state is not None and state.offset is not None
        ):  # the mean that double quantization takes off the scales
            extra[f"{name}.nested_offset"] = state.offset
        moved = getattr(
            model.get_submodule(name.rpartition(".")[0]), "state", None
        )  # there after a first forward
        for scales in (
            getattr(tensor, "SCB", None),
            getattr(moved, "SCB", None),
        ):  # LLM.int8's row scales
            if isinstance(scales, torch.Tensor):
                extra[f"{name}.SCB"] = scales
        for key, value in {name: tensor, **extra}.items():
            place = (value.data_ptr(), value.nbytes) if value.numel() else key
            if place not in seen:
                seen.add(place)
                found[key] = value
    return found


def weight_bytes(model) -> int:
    """Bytes of all weights, counted tensor by tensor, tied ones once, quantization scales included."""
    return sum(tensor.nbytes for tensor in tensors(model).values())


def kv_cache_bytes(
    config, tokens: int, batch_size: int = 1, bytes_per_number: int | None = None
) -> int:
    """Bytes of keys and values for `tokens` positions of every sequence: 2 · layers · kv heads ·
    head size.

    bytes_per_number : 4 for float32, 2 for 16 bit; by default that of the config's dtype.
    (Multi-query attention, Shazeer 2019, is the case of one key/value head.)
    """
    config = config.get_text_config()
    heads = config.num_attention_heads
    kv = (
        getattr(config, "num_key_value_heads", None)
        or getattr(config, "num_kv_heads", None)
        or heads
    )
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        kv = 1
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = bytes_per_number or (config.dtype or torch.float32).itemsize
    return 2 * config.num_hidden_layers * kv * size * tokens * batch_size * width


def available_bytes(device: str = "cpu") -> int:
    """Memory that can still be taken: free CUDA memory, or the system's available memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def touch(path: Path) -> None:
    """Read a file once so that its pages are in the page cache before a measurement."""
    with Path(path).open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass
