"""An engine in a process of its own, for lesson 03: asleep until asked, it generates and stamps
every token.

    python engines_03.py llamacpp FILE.gguf THREADS TOKENS [CACHE_BITS]
    python engines_03.py openvino FILE.gguf THREADS

A request is a line on its input, [prompt ids, new tokens]; the answer is a line of JSON. It ends
with its input.
"""

import json
import os
import sys
import time
from collections.abc import Callable

CACHE_TYPES = {32: "GGML_TYPE_F32", 8: "GGML_TYPE_Q8_0", 4: "GGML_TYPE_Q4_0"}  # else 16 bits


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    with open("/proc/self/status") as rows:
        return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(field + ":"))


def llamacpp(path: str, threads: int, tokens: int, cache_bits: int = 16) -> tuple[Callable, dict]:
    """A function that generates with llama.cpp, greedily and without its prompt cache; and facts
    about it.

    tokens : the longest text, prompt included.
    cache_bits : of keys and values: 16, as llama.cpp has them; 8 or 4, Q8_0 or Q4_0; 32 is exact,
        and slow, since its attention on CPUs is made for 16.
    """
    import xllamacpp as engine

    before = status("VmRSS")
    params = engine.CommonParams()
    params.model.path, params.fit_params, params.verbosity = path, False, -1
    params.n_ctx = 256 * (tokens // 256 + 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    if cache_bits in CACHE_TYPES:
        kind = getattr(engine.ggml_type, CACHE_TYPES[cache_bits])
        params.cache_type_k = params.cache_type_v = kind
    params.api_keys = [os.urandom(16).hex()]  # it listens on 127.0.0.1 too: to nobody
    server = engine.Server(params)

    def generate(prompt: list[int], new_tokens: int) -> dict:
        request = {
            "prompt": prompt,
            "n_predict": new_tokens,
            "temperature": 0,
            "cache_prompt": False,
            "stream": True,
        }
        chunks, start = [], time.perf_counter()
        server.handle_completions(
            request, lambda chunk: chunks.append((time.perf_counter() - start, chunk))
        )
        latency = time.perf_counter() - start
        words = [(t, c["choices"][0]["text"]) for t, c in chunks if c["choices"][0]["text"]]
        ids = [
            int(i) for i in "".join(text for _, text in words)[1:-1].split("><")
        ]  # a word is "<id>"
        own = chunks[-1][1]["timings"]
        return {
            "latency_s": latency,
            "stamps_s": [t for t, _ in words],
            "ids": [ids],
            "prompt_tokens": own["prompt_n"],
            "own_tokens_per_s": own["predicted_per_second"],
        }

    return generate, {
        "resident_before_bytes": before,
        "gpus": sum("GPU" in str(d.get("type", d)) for d in engine.get_device_info()),
    }


def openvino(path: str, threads: int) -> tuple[Callable, dict]:
    """A function that generates greedily with OpenVINO GenAI; and facts about it."""
    import numpy
    import openvino
    import openvino_genai as engine

    before = status("VmRSS")
    pipe = engine.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)

    class Stamps(engine.StreamerBase):
        def __init__(self):
            super().__init__()
            self.times, self.start = [], time.perf_counter()

        def write(self, tokens):
            count = len(tokens) if hasattr(tokens, "__len__") else 1
            self.times += [time.perf_counter() - self.start] * count
            return engine.StreamingStatus.RUNNING

        def end(self):
            pass

    def generate(prompt: list[int], new_tokens: int) -> dict:
        config = engine.GenerationConfig(
            max_new_tokens=new_tokens, ignore_eos=True, do_sample=False, apply_chat_template=False
        )
        stamps = Stamps()
        output = pipe.generate(openvino.Tensor(numpy.array([prompt])), config, stamps)
        return {
            "latency_s": time.perf_counter() - stamps.start,
            "stamps_s": stamps.times,
            "ids": [list(output.tokens[0])],
            "prompt_tokens": len(prompt),
        }

    return generate, {"resident_before_bytes": before, "gpus": 0}


def main(engine: str, path: str, *numbers: str) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engine's own lines go elsewhere
    generate, facts = {"llamacpp": llamacpp, "openvino": openvino}[engine](path, *map(int, numbers))
    facts["load_peak_bytes"] = status("VmHWM")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # from here on the peak is that of generating
    print(json.dumps(facts), file=out, flush=True)
    for line in sys.stdin:
        answer = generate(*json.loads(line))
        answer["peak_bytes"] = status("VmHWM")
        answer["details"] = {
            "anonymous_bytes": status("RssAnon"),
            "file_bytes": status("RssFile"),
        }
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
