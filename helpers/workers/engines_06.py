"""Engines that batch continuously, each in a process of its own, for lesson 06: asleep until asked.

    python engines_06.py openvino FILE.gguf THREADS SLOTS TOKENS
    python engines_06.py llamacpp FILE.gguf THREADS SLOTS TOKENS

A request is a line on its input, [prompts, lengths]; the answer is a line of JSON. It ends with its
input. `engines_06_client.py` is the other end.
"""

import http.client
import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def openvino(path: str, threads: int, slots: int, tokens: int) -> tuple[Callable, str]:
    """OpenVINO GenAI with its scheduler, stepped by hand; and the precision that it chose."""
    import numpy
    import openvino
    import openvino_genai as engine

    scheduler = engine.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.enable_prefix_caching, scheduler.cache_size = slots, False, 1
    pipe = engine.ContinuousBatchingPipeline(
        path, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
    )

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list]:
        start = time.perf_counter()
        handles = [
            pipe.add_request(
                i,
                openvino.Tensor(numpy.array([prompt])),
                engine.GenerationConfig(
                    max_new_tokens=length,
                    ignore_eos=True,
                    do_sample=False,
                    apply_chat_template=False,
                ),
            )
            for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        found = [[[], 0.0, 0.0, 0.0] for _ in handles]
        while pipe.has_non_finished_requests():
            begun = time.perf_counter() - start
            pipe.step()
            now = time.perf_counter() - start
            for answer, handle in zip(found, handles, strict=True):
                while handle.can_read():
                    if not answer[0]:
                        answer[1:3] = begun, now
                    for part in handle.read().values():
                        answer[0] += part.generated_ids
                    answer[3] = now
        return found

    number, cache = (
        openvino.Core().get_property("CPU", f"{name}_PRECISION{hint}").get_type_name()
        for name, hint in (("INFERENCE", "_HINT"), ("KV_CACHE", ""))
    )
    return generate, f"Q4_1 weights, {number}, KV cache {cache}"


def llamacpp(path: str, threads: int, slots: int, tokens: int) -> tuple[Callable, str]:
    """llama.cpp's server with as many slots, asked over loopback, all requests at once; and its
    precision.
    """
    import xllamacpp as engine

    key, params = secrets.token_urlsafe(24), engine.CommonParams()
    params.model.path, params.fit_params, params.verbosity = path, False, -1
    params.n_parallel, params.n_ctx = slots, slots * 256 * (tokens // 256 + 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.hostnames, params.api_keys = ["127.0.0.1"], [key]
    server = engine.Server(params)

    def one(prompt: list[int], length: int, start: float) -> list:
        body = {
            "prompt": prompt,
            "n_predict": length,
            "temperature": 0,
            "cache_prompt": False,
            "ignore_eos": True,
            "return_tokens": True,
        }
        connection = http.client.HTTPConnection(
            server.listening_address.split("//")[-1].rstrip("/"), timeout=600
        )
        connection.request(
            "POST",
            "/completion",
            json.dumps(body),
            {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        )
        said = json.loads(connection.getresponse().read())
        end, own = time.perf_counter() - start, said["timings"]
        first = end - own["predicted_ms"] / 1e3
        return [said["tokens"], max(0.0, first - own["prompt_ms"] / 1e3), max(0.0, first), end]

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[list]:
        start = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as askers:
            return list(askers.map(one, prompts, lengths, [start] * len(prompts)))

    return generate, "Q4_1 weights, activations q8_1, KV cache f16"  # its defaults on a CPU


def main(engine: str, *words: str) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engine's own lines go elsewhere
    generate, precision = {"openvino": openvino, "llamacpp": llamacpp}[engine](
        words[0], *map(int, words[1:])
    )
    print(json.dumps(precision), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(generate(*json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
