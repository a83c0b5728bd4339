"""Where one decoding step spends its time, for lesson 03: rebuilding weights, multiplying with
them, or both.
"""

import torch


@torch.no_grad()
def step_seconds(model, batch: int, repeats: int = 2) -> dict[str, float]:
    """Mean seconds of one forward over `batch` sequences of one token.

    Returns "dequantize" (rebuilding weights), "multiply" (with floats), "fused" (bitsandbytes' CPU
    kernel), "all".
    """
    tokens = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    gpu = model.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [
        torch.profiler.ProfilerActivity.CUDA
    ] * gpu
    model(tokens, use_cache=False)
    with torch.profiler.profile(activities=activities) as run:
        for _ in range(repeats):
            model(tokens, use_cache=False)
    spent = {
        e.key: (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1e6 / repeats
        for e in run.key_averages()
    }
    return {
        "dequantize": sum(t for k, t in spent.items() if "dequant" in k),
        "multiply": sum(
            t
            for k, t in spent.items()
            if k in ("aten::mm", "aten::addmm") or (gpu and "gem" in k.lower())
        ),
        "fused": sum(t for k, t in spent.items() if "gemv_4bit" in k and not gpu),
        "all": sum(spent.values()),
    }
