"""The other end of `engines_03.py`, for lesson 03: start an engine's process, ask it, read its
peak, end it.
"""

import time
from pathlib import Path

import torch

from helpers import memory, timing
from helpers.workers.engine_process import Process

SETTLE_S = 0.1  # time for the other engine's threads to fall asleep: they take 0.02 s at most here


class Worker(Process):
    """An engine in a process of its own, asleep unless asked; called, it generates and gives the
    stamps.

    arguments : those of `engines_03.py`, the engine's name first.

    Raises NotImplementedError (see `Process`).
    """

    def __init__(self, *arguments):
        super().__init__(Path(__file__).with_name("engines_03.py"), *arguments)

    def __call__(self, ids: torch.Tensor, new_tokens: int) -> timing.Generation:
        time.sleep(SETTLE_S)
        self.last = self.ask([ids[0].tolist(), new_tokens])
        came = len(self.last["stamps_s"])
        if came != new_tokens or self.last["prompt_tokens"] != ids.shape[1]:
            raise RuntimeError(
                f"{came} tokens came after {self.last['prompt_tokens']} prompt tokens"
            )
        time.sleep(SETTLE_S)
        return timing.Generation(
            **{k: self.last[k] for k in ("latency_s", "stamps_s", "prompt_tokens", "ids")}
        )

    def peak(self) -> memory.Peak:
        """The process's own peaks, while it loaded and up to its last generation."""
        return memory.Peak(
            self.ready["resident_before_bytes"],
            self.last["peak_bytes"],
            self.ready["load_peak_bytes"],
            "process VmHWM",
            self.last["details"],
        )
