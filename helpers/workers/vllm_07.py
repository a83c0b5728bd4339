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

import torch
from vllm import LLM, SamplingParams

from helpers import memory


def engine(job: dict) -> LLM:
    """vLLM, its model cut for `ranks` workers; executor: "mp" (processes of one machine) or "ray"
    (of a cluster).
    """
    extra = {"gpu_memory_utilization": 0.5} if job["place"] == "cuda" else {}
    return LLM(
        job["model"],
        tensor_parallel_size=job["ranks"],
        distributed_executor_backend=job["executor"],
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **extra,
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


def main() -> None:
    # vLLM's workers import what they are asked for by its name, and this file's is __main__ here
    from helpers.workers.vllm_07 import held_bytes, threads_used

    job = json.loads(Path(sys.argv[1]).read_text())
    before = memory.tree_pss(os.getpid())
    llm = engine(job)
    weights = llm.apply_model(held_bytes)  # asked of each worker
    print(
        *(f"[rank{n}]: {size / 1e6:.0f} MB of weights here" for n, size in enumerate(weights)),
        sep="\n",
        flush=True,
    )
    wanted = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True)

    def call(number: int) -> dict:
        start, stamps, ids = time.perf_counter(), [], []
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": job["prompt"]}, wanted)
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

    runs = [call(n) for n in range(job["warmup"] + job["repeats"])]
    found = {
        "runs": runs,
        "own_bytes": weights,
        "threads": min(llm.apply_model(threads_used)),
        "before": before,
        "tree": memory.tree_pss(os.getpid()),
    }
    Path(job["folder"], f"{job['name']}-0.json").write_text(json.dumps(found))


if __name__ == "__main__":  # vLLM imports this file again in its workers
    main()
