"""Where one decoding step spends its time, for lesson 03: rebuilding weights, multiplying with
them, or both.
"""

import torch
from torch.autograd import DeviceType


@torch.no_grad()
def step_seconds(model, batch: int, repeats: int = 2) -> dict[str, float]:
    """Mean seconds of one forward over `batch` sequences of one token.

    Returns "dequantize" (rebuilding weights), "multiply" (with floats), "fused" (bitsandbytes'
    kernel for 4 bits), "all". On a GPU the profiler tells each kernel's time twice, as its own and
    as that of the operator that launched it; "all" sums the kernels' own.
    """
    tokens = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    gpu = model.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    model(tokens, use_cache=False)
    with torch.profiler.profile(activities=activities) as run:
        for _ in range(repeats):
            model(tokens, use_cache=False)
    operators, kernels = {}, {}
    for event in run.key_averages():
        if event.device_type == DeviceType.CPU:
            spent_us = event.self_device_time_total if gpu else event.self_cpu_time_total
            operators[event.key] = spent_us / 1e6 / repeats
        else:
            kernels[event.key] = event.self_device_time_total / 1e6 / repeats
    work = kernels if gpu else operators
    fused_kernel = "gemm_4bit" if gpu else "gemv_4bit"
    return {
        "dequantize": sum(s for name, s in work.items() if "dequant" in name.lower()),
        "multiply": operators.get("aten::mm", 0.0) + operators.get("aten::addmm", 0.0),
        "fused": sum(s for name, s in work.items() if fused_kernel in name),
        "all": sum(work.values()),
    }
