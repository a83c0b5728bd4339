"""The other end of `engine_stamps.py`, for lesson 03: start an engine's process, ask it, read its peak, end it."""

import json
import select
import subprocess
import sys
import time
from pathlib import Path

import torch

from helpers import memory, timing

SETTLE_S = 0.2  # time for the other engine's threads to fall asleep
LIMIT_S = 600.0  # longest wait for an answer, loading included


class Worker:
    """An engine in a process of its own, asleep unless asked; called, it generates and gives the stamps.

    arguments : those of `engine_stamps.py`, the engine's name first.
    Raises NotImplementedError when the engine cannot start, or does not answer within LIMIT_S; it is ended then.
    """

    def __init__(self, *arguments):
        command = [sys.executable, Path(__file__).with_name("engine_stamps.py"), *map(str, arguments)]
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL)
        self.ready = self._answer()

    def _answer(self) -> dict:
        if not select.select([self.process.stdout], [], [], LIMIT_S)[0]:
            self.process.kill()
            self.process.wait()
            raise NotImplementedError(f"the engine did not answer within {LIMIT_S:g} s")
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise NotImplementedError(f"the engine ended with code {self.process.wait()}")

    def __call__(self, ids: torch.Tensor, new_tokens: int) -> timing.Generation:
        time.sleep(SETTLE_S)
        print(json.dumps([ids[0].tolist(), new_tokens]), file=self.process.stdin, flush=True)
        self.last = self._answer()
        came = len(self.last["stamps_s"])
        if came != new_tokens or self.last["prompt_tokens"] != ids.shape[1]:
            raise RuntimeError(f"{came} tokens came after {self.last['prompt_tokens']} prompt tokens")
        time.sleep(SETTLE_S)
        return timing.Generation(**{k: self.last[k] for k in ("latency_s", "stamps_s", "prompt_tokens", "ids")})

    def peak(self) -> memory.Peak:
        """The process's own peak, as of its last generation."""
        return memory.Peak(self.last["before"], self.last["peak"], "process VmHWM",
                           {"anonymous_bytes": self.last["anonymous"], "file_bytes": self.last["file"]})

    def close(self) -> None:
        self.process.communicate()
