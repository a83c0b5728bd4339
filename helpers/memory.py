"""Peak memory, weight bytes, KV-cache bytes. Bytes everywhere; GB (1e9) only when shown.

Needs nothing else of this project: copy it into yours.
"""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

M_MMAP_THRESHOLD = -3  # <malloc.h>
MADV_PAGEOUT = 21  # <linux/mman.h>


@dataclasses.dataclass(frozen=True)
class Peak:
    """Memory of one pass, in bytes.

    Attributes
    ----------
    resident_before_bytes : what was taken before the variant was loaded.
    peak_bytes : the highest while it ran.
    load_peak_bytes : the highest while it was loaded. What needs more on its way in cannot be
        hosted on less.
    kind : "cuda max_memory_allocated" (all devices summed), or "process VmHWM" (peak resident set
        of this process).
    details : CUDA: reserved_bytes, and process_gpu_bytes by NVML; CPU: anonymous_bytes and
        file_bytes, the resident set at the end by origin.
    """

    resident_before_bytes: int
    peak_bytes: int
    load_peak_bytes: int | None
    kind: str
    details: dict[str, int] = dataclasses.field(default_factory=dict)


def is_cuda(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def status_bytes(field: str, pid: int | str = "self") -> int:
    """A field of /proc/PID/status in bytes ("VmHWM": peak resident set, "VmRSS", "RssAnon")."""
    for row in Path(f"/proc/{pid}/status").read_text().splitlines():
        if row.startswith(field + ":"):
            return int(row.split()[1]) * 1024
    raise KeyError(f"/proc/{pid}/status has no {field}")


def resident_bytes(device: str = "cpu") -> int:
    """What is taken now: this process's resident set, or what PyTorch allocated on all GPUs."""
    if is_cuda(device):
        return sum(map(torch.cuda.memory_allocated, range(torch.cuda.device_count())))
    return status_bytes("VmRSS")


def reset_peak(device: str = "cpu") -> None:
    """Start a new peak at what is taken now (Linux: 5 to /proc/self/clear_refs resets VmHWM)."""
    if is_cuda(device):
        torch.cuda.init()
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str = "cpu") -> int:
    """The peak since `reset_peak`: max_memory_allocated of all GPUs summed, or VmHWM, which no
    sampling can miss.
    """
    if is_cuda(device):
        return sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    return status_bytes("VmHWM")


def available_bytes(device: str = "cpu") -> int:
    """Memory that can still be taken.

    CUDA: free memory, and what PyTorch's allocator holds unused. CPU: the system's available
    memory, or what a container's limit leaves where that is less (cgroup v2, then v1).
    """
    if is_cuda(device):
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available = psutil.virtual_memory().available
    left_in_container = _container_bytes_left()
    return (  # type: ignore[no-any-return]
        available if left_in_container is None else min(available, left_in_container)
    )


def _container_bytes_left() -> int | None:
    """What the memory limit of this process's control group leaves; None where there is none.

    Pages of files that were read count as used, and go when room is needed: they are left too.
    """
    folder = Path("/sys/fs/cgroup")
    for limit, usage in (
        (folder / "memory.max", folder / "memory.current"),
        (folder / "memory/memory.limit_in_bytes", folder / "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max": no limit
            used = int(usage.read_text()) - _file_bytes(limit.parent / "memory.stat")
            return max(0, int(limit.read_text()) - used)
    return None


def _file_bytes(stat: Path) -> int:
    """Bytes of cached files in a control group, by its memory.stat."""
    total = 0
    if stat.is_file():
        for row in stat.read_text().splitlines():
            name, value = row.split()
            if name in ("active_file", "inactive_file"):
                total += int(value)
    return total


def cache(load: Callable[..., Any]) -> Callable[..., Any]:
    """`functools.cache` for a function that loads a model: where there is no room for another one,
    those that it holds are given up first.
    """
    cached = functools.cache(load)

    @functools.wraps(load)
    def loaded(*arguments: Any) -> Any:
        try:
            return cached(*arguments)
        except (MemoryError, torch.OutOfMemoryError):
            if not cached.cache_info().currsize:
                raise
        cached.cache_clear()
        free()
        return cached(*arguments)

    loaded.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return loaded


def free() -> None:
    """Collect what is unreachable and give its memory back (`del` your own names first)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError):  # not glibc: the allocator keeps what it has
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def preloaded_allocator() -> str | None:
    """The name of an allocator that replaces glibc's (tcmalloc, jemalloc); None for glibc's own.

    It keeps freed memory by rules of its own, so that a peak in this process is an upper bound.
    """
    for library in os.environ.get("LD_PRELOAD", "").replace(":", " ").split():
        if "malloc" in Path(library).name:
            return Path(library).name
    return None


def _process_gpu_bytes() -> int | None:
    """This process's share of the GPUs by NVML; None where the driver does not tell it
    (containers, WSL).
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        total = 0
        seen = False
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == os.getpid() and process.usedGpuMemory is not None:
                    total += process.usedGpuMemory
                    seen = True
    except pynvml.NVMLError:
        return None
    return total if seen else None


@contextlib.contextmanager
def _every_block_returned() -> Iterator[None]:
    """Within it, glibc takes each block of 64 KiB or more from the system by itself, so that freed
    weights go back at once instead of staying in a fragmented heap. Slower: for memory passes only.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except OSError:  # another C library: nothing changes
        yield
        return
    mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, 32 * 1024 * 1024)


def _forget_mapped_files() -> None:
    """Let go of mapped pages of large files that only loading has touched.

    A checkpoint stays mapped as long as one of its tensors is used, and its other pages would
    count as resident. What a run needs comes back. Weight files are known by their size and by
    not being code, not by their name: in a hub's cache they are called `blobs/<hash>`.
    """
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    for row in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, _, _, inode, *path = row.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        is_data = inode != "0" and path and "x" not in permissions
        if is_data and ".so" not in Path(path[0]).name and end - start > 1_000_000:
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_PAGEOUT)


def peak_of(
    variant: Any,
    device: str = "cpu",
    release: Callable[[], object] = lambda: None,
    warm: bool = False,
) -> Peak:
    """Load a variant, run it once, and report its memory: a pass of its own, apart from timing.

    Parameters
    ----------
    variant : what `timing.measure` takes: `load()` makes what `run(...)` needs. Pages of mapped
        weight files count as soon as the run has touched them.
    release : drops what `load` may have cached; called before and after.
    warm : run it once before, where an earlier model has left workspaces in the libraries: they
        would stand in the start and go during the run.

    Raises what loading or running raises.
    """
    release()
    if warm:
        with _every_block_returned():
            variant.run(variant.load())
            release()
    free()
    if not is_cuda(device):
        _forget_mapped_files()
    before = resident_bytes(device)
    reset_peak(device)
    try:
        with _every_block_returned():
            model = variant.load()
            load_peak = peak_bytes(device)
            free()
            if not is_cuda(device):
                _forget_mapped_files()
            reset_peak(device)
            variant.run(model)
            peak = peak_bytes(device)
            details = _by_origin(device)
            del model
    finally:
        release()
        free()
    kind = "cuda max_memory_allocated" if is_cuda(device) else "process VmHWM"
    return Peak(before, peak, load_peak, kind, details)


def _by_origin(device: str) -> dict[str, int]:
    """What `Peak.details` holds."""
    if not is_cuda(device):
        return {
            "anonymous_bytes": status_bytes("RssAnon"),
            "file_bytes": status_bytes("RssFile"),
        }
    reserved = sum(map(torch.cuda.max_memory_reserved, range(torch.cuda.device_count())))
    share = _process_gpu_bytes()
    if share is None:
        return {"reserved_bytes": reserved}
    return {"reserved_bytes": reserved, "process_gpu_bytes": share}


def tree_pss(pid: int) -> int:
    """Bytes of a process and all its descendants, shared pages counted once (proportional set)."""
    root = psutil.Process(pid)
    total = 0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # ended meanwhile
            total += process.memory_full_info().pss
    return total


def _states(module: torch.nn.Module, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors that a quantized parameter carries beside its codes, by name."""
    states = {}
    four_bit = getattr(parameter, "quant_state", None)
    if four_bit is not None:
        for key, value in four_bit.as_dict(packed=False).items():
            states[f"{name}.{key}"] = value
        # the mean that double quantization takes off the scales
        states[f"{name}.nested_offset"] = four_bit.offset
    # LLM.int8's row scales move from the parameter to its layer at the first forward
    moved = getattr(module, "state", None)
    states[f"{name}.SCB"] = getattr(parameter, "SCB", None)
    if states[f"{name}.SCB"] is None:
        states[f"{name}.SCB"] = getattr(moved, "SCB", None)
    return {key: value for key, value in states.items() if isinstance(value, torch.Tensor)}


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that holds weights, by name: parameters, and the states that quantized ones
    carry; tied ones once.
    """
    unique, seen = {}, set()
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        for key, tensor in {name: parameter, **_states(module, name, parameter)}.items():
            place = (tensor.data_ptr(), tensor.nbytes) if tensor.numel() else key
            if place not in seen:
                seen.add(place)
                unique[key] = tensor
    return unique


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights, counted tensor by tensor, tied ones once, quantization scales too."""
    return sum(tensor.nbytes for tensor in tensors(model).values())


def kv_heads(config: Any) -> int:
    """Key/value heads of each layer; one for multi-query attention (Shazeer 2019)."""
    config = config.get_text_config()
    old_falcon = not getattr(config, "new_decoder_architecture", False)
    if getattr(config, "multi_query", False) and old_falcon:
        return 1
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None):
            return getattr(config, name)  # type: ignore[no-any-return]
    return config.num_attention_heads  # type: ignore[no-any-return]


def touch(path: Path) -> None:
    """Read a file once, so that its pages are in the page cache before a measurement."""
    with Path(path).open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass
