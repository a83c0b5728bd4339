"""Where one decode step spends its time, for lesson 03: in the output head and in the other
matrices, by which operators there, and in the rest. And: which 16-bit type has instructions here?
"""

import functools

import pandas as pd
import torch
from torch.autograd import DeviceType
from transformers.pytorch_utils import Conv1D

from helpers import limits, machine, timing

PARTS = ("head", "matrices")


def native_16_bit(device: str) -> str:
    """ "bf16" or "fp16": the one that the device multiplies itself (bf16 where it has both), else
    the one whose product of a matrix with one token's activations takes less time.
    """
    native = machine.native_dtypes(device)
    if native["bfloat16"]:
        return "bf16"
    if native["float16"]:
        return "fp16"
    seconds = {}
    for name, dtype in {"fp16": torch.float16, "bf16": torch.bfloat16}.items():
        matrix = torch.ones(8192, 2048, dtype=dtype, device=device)
        token = torch.ones(1, 2048, dtype=dtype, device=device)
        product = functools.partial(torch.nn.functional.linear, token, matrix)
        seconds[name] = limits.best_seconds(product, device)
    return min(seconds, key=seconds.get)


class Ranges:
    """Within it, each linear layer of a model runs in a range of the profiler named as its part."""

    def __init__(self, model):
        self.model = model
        self.hooks = []
        self.range = None

    def _enter(self, part: str, module, inputs) -> None:
        self.range = torch.profiler.record_function(part)
        self.range.__enter__()

    def _leave(self, module, inputs, output) -> None:
        self.range.__exit__(None, None, None)

    def __enter__(self):
        head = self.model.get_output_embeddings()
        for module in self.model.modules():
            if isinstance(module, (torch.nn.Linear, Conv1D)):
                part = "head" if module is head else "matrices"
                before = functools.partial(self._enter, part)
                self.hooks.append(module.register_forward_pre_hook(before))
                self.hooks.append(module.register_forward_hook(self._leave))
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def _part(event) -> str:
    """The range that an event of the profiler lies in, or "rest"."""
    while event is not None:
        if event.name in PARTS:
            return event.name
        event = event.cpu_parent
    return "rest"


@torch.no_grad()
def step_parts(model, repeats: int = 3) -> tuple[dict[str, float], pd.Series]:
    """Mean seconds of a decode step of one sequence on an empty cache.

    Returns the whole step without a profiler ("whole"), and with one "head", "matrices" (all other
    linear layers, Python around them included on a CPU) and "rest"; and the operators within head
    and matrices, by part and name. On a GPU a part is the time of the kernels that its operators
    launched, each counted once, by its operator; "whole" less the parts is then time without a
    kernel.
    """
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    step = functools.partial(model, token, use_cache=False)
    gpu = model.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    parts = {"whole": limits.best_seconds(step, str(model.device))}
    parts |= dict.fromkeys((*PARTS, "rest"), 0.0)
    operators: dict[str, float] = {}
    with Ranges(model), torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            step()
        timing.synchronize(model.device)
    for event in profile.events():
        is_range = event.name in PARTS  # on a GPU its kernels are its operators'
        if event.device_type != DeviceType.CPU or (gpu and is_range):
            continue
        spent_us = event.self_device_time_total if gpu else event.self_cpu_time_total
        seconds = spent_us / 1e6 / repeats
        part = _part(event)
        parts[part] += seconds
        if part in PARTS:
            name = f"{part}: {'Python' if is_range else event.name}"
            operators[name] = operators.get(name, 0.0) + seconds
    return parts, pd.Series(operators, dtype=float)
