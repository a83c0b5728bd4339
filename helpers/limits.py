"""What the hardware allows: measured bandwidth and compute, best possible tokens/s."""

import time
from collections.abc import Callable

import torch

from helpers import timing

PROBE_BYTES = 512_000_000


class Bandwidth:
    """Read bandwidth of the device, measured again each time it is called; `best` keeps the
    highest.

    Three ways to read one float32 array of 512 MB: its sum, a dot product of its halves, a
    matrix-vector product (the shape of a decode step). The best of them is the machine's, since a
    limit must not be too low. Call it in between the runs of a measurement, so that both see the
    same machine (the idea of STREAM, McCalpin 1995).
    """

    def __init__(self, device: str = "cpu", nbytes: int = PROBE_BYTES):
        self.device = device
        self.matrix = torch.ones(nbytes // 4096 // 4, 4096, device=device)
        self.samples: list[float] = []

    def __call__(self) -> float:
        """Bytes per second, best of the three ways now."""
        flat, vector = self.matrix.view(-1), self.matrix[0]
        first, second = flat[: len(flat) // 2], flat[len(flat) // 2 :][: len(flat) // 2]
        ways = (lambda: flat.sum(), lambda: torch.dot(first, second), lambda: self.matrix @ vector)
        seconds = min(_seconds(way, self.device) for way in ways for _ in range(2))
        self.samples.append(flat.nbytes / seconds)
        return self.samples[-1]

    @property
    def best(self) -> float:
        return max(self.samples) if self.samples else self()


def _seconds(work: Callable, device: str) -> float:
    timing.synchronize(device)
    start = time.perf_counter()
    work()
    timing.synchronize(device)
    return time.perf_counter() - start


def compute_flops(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    size: int | None = None,
    repeats: int = 3,
) -> float:
    """Floating-point operations per second of a linear layer in `dtype`, at its best: the compute
    ceiling.

    size : inputs, outputs and tokens; by default 8192 on CUDA, 2048 on the CPU (1024 in 16 bit,
        which may be emulated).
    """
    if size is None:
        size = (
            8192
            if torch.device(device).type == "cuda"
            else 2048
            if dtype == torch.float32
            else 1024
        )
    x, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    _seconds(lambda: torch.nn.functional.linear(x, weight), device)
    return (
        2
        * size**3
        / min(
            _seconds(lambda: torch.nn.functional.linear(x, weight), device) for _ in range(repeats)
        )
    )


def decode_limit(
    weight_bytes: float, kv_cache_bytes: float, bandwidth: float, batch_size: int = 1
) -> float:
    """Best possible decode speed in tokens/s: a step reads all weights once and the KV cache of
    every sequence.

    kv_cache_bytes : of the whole batch, at the mean length of the generation. (The memory term of
        the roofline model, Williams et al. 2009, CACM 52:4; for decoding, Pope et al. 2023,
        arXiv:2211.05102.)
    """
    return batch_size * bandwidth / (weight_bytes + kv_cache_bytes)


def prefill_limit(parameters: float, flops: float) -> float:
    """Best possible prefill speed in tokens/s: 2 operations per parameter and token (Kaplan et al.
    2020, §2.1).
    """
    return flops / (2 * parameters)


def roofline(intensity, bandwidth: float, flops: float):
    """Attainable operations per second at an arithmetic intensity in operations per byte (scalar or
    array).
    """
    return torch.minimum(torch.as_tensor(intensity) * bandwidth, torch.tensor(flops)).numpy()
