"""vLLM alone or tensor parallel, for lesson 07: `python vllm_07.py JOB.json`; every step of the
engine is stamped.

It may run in an environment of vLLM's own (VLLM_PYTHON), so of `helpers` it imports only what needs
nothing beyond vLLM's own requirements.
"""

import json
import os
import sys
import time
from pathlib import Path

import psutil
import torch
from vllm import LLM, SamplingParams

from helpers import memory
from helpers.workers import asleep_07


def engine(job: dict) -> LLM:
    """vLLM, its model cut for `ranks` workers; executor: "mp" (processes of one machine) or "ray"
    (of a cluster).
    """
    return LLM(
        job["path"],
        tensor_parallel_size=job["ranks"] // job["stages"],
        pipeline_parallel_size=job["stages"],
        distributed_executor_backend=job["executor"],
        dtype=job["dtype"],
        max_model_len=256,
        enforce_eager=job["device"] == "cpu",
        enable_prefix_caching=False,
        disable_log_stats=True,
    )


def held_bytes(model) -> int:
    """Bytes of weights that a vLLM worker holds; on a CPU a packed matrix is out of sight, its
    sizes are not.
    """
    packed = [
        m
        for m in model.modules()
        if hasattr(m, "input_size_per_partition") and not m.weight.numel()
    ]
    sizes = (
        m.input_size_per_partition * m.output_size_per_partition * m.weight.itemsize for m in packed
    )
    return memory.weight_bytes(model) + sum(sizes)


def threads_used(model) -> int:
    """Threads that a worker computes with."""
    return torch.get_num_threads()


def gpu_bytes() -> int | None:
    """What the driver counts for this process and all that it started; None where it does not
    tell.
    """
    from vllm.third_party import pynvml

    root = psutil.Process()
    family = {root.pid, *(child.pid for child in root.children(recursive=True))}
    total = 0
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid in family:
                    total += process.usedGpuMemory or 0
    except pynvml.NVMLError:
        return None
    return total or None


def main() -> None:
    # vLLM's workers import what they are asked for by its name, and this file's is __main__ here
    from vllm.platforms import current_platform

    from helpers.workers.vllm_07 import held_bytes, threads_used

    job = json.loads(Path(sys.argv[1]).read_text())
    before = memory.tree_pss(os.getpid())
    llm = engine(job)
    # a later stage of a pipeline makes its input buffer in a dummy step, which an uncompiled engine
    # on a CPU leaves out
    llm.collective_rpc("execute_dummy_batch")
    weights = llm.apply_model(held_bytes)  # asked of each worker
    wanted = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True)

    def run() -> dict:
        start = time.perf_counter()
        stamps, ids = [], []
        llm.llm_engine.add_request(str(start), {"prompt_token_ids": job["prompt"]}, wanted)
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                ids = list(output.outputs[0].token_ids)
                stamps += [time.perf_counter() - start] * (len(ids) - len(stamps))
        return {
            "latency_s": time.perf_counter() - start,
            "stamps_s": stamps,
            "prompt_tokens": len(job["prompt"]),
            "batch_size": 1,
            "ids": [ids],
        }

    run()
    group_bytes = memory.tree_pss(os.getpid()) - before
    if job["device"] == "cuda":
        group_bytes = gpu_bytes()
    ready = {
        "device": current_platform.device_type,
        "own_bytes": max(weights),
        "threads": min(llm.apply_model(threads_used)),
        "group_bytes": group_bytes,
    }
    asleep_07.answer(job, 0, ready, {"run": run})


if __name__ == "__main__":  # vLLM imports this file again in its workers
    main()
