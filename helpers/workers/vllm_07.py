"""vLLM alone or tensor parallel, for lesson 07: `python vllm_07.py JOB.json`; every step of the
engine is stamped.
"""

import json
import os
import sys
import time
from pathlib import Path

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


def main() -> None:
    from helpers.workers.launch_07 import (
        held_bytes,
    )  # vLLM comes first, and this file is no module to its workers

    job = json.loads(Path(sys.argv[1]).read_text())
    before = memory.tree_pss(os.getpid())["pss_bytes"]
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
        "before": before,
        "tree": memory.tree_pss(os.getpid())["pss_bytes"],
    }
    Path(job["folder"], f"{job['name']}-0.json").write_text(json.dumps(found))


if __name__ == "__main__":  # vLLM imports this file again in its workers
    main()
