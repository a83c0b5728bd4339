"""vLLM in the caller's own process, for lesson 06: started when it is asked for, stepped by hand,
let go. And its server, asked with curl.

In the caller's process no child can be orphaned, and there is one pool of threads, torch's, for it
and for transformers.
"""

import collections
import dataclasses
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable

import torch
from IPython.utils.capture import capture_output

from helpers import memory, timing
from helpers.series import processes
from helpers.series.serving import Shape
from helpers.workers.requests_06 import Answer, Run

# set before vLLM is imported
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # all cores; by default it keeps one back
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # on a GPU it would be compiled first, with nvcc
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
SOCKET_NAME = 60  # characters of a folder that leave room for a socket's name, of 107 in all
OVERHEAD_BYTES = 2_500_000_000  # beside weights and cache on a GPU: activations, graphs, libraries
_numbers = itertools.count()


def server_environment() -> dict[str, str]:
    """What vLLM's server wants: processes of its own, and a short folder for their sockets."""
    changes = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    if len(tempfile.gettempdir()) > SOCKET_NAME:
        changes["VLLM_RPC_BASE_PATH"] = "/tmp"
    return ENVIRONMENT | changes


def share_of_card(nbytes: int, device: str) -> float:
    """vLLM's `gpu_memory_utilization` for weights and cache of so many bytes: what it asks for at
    its start, and must find free. On a CPU, where an explicit cache is not checked, any share.
    """
    if not memory.is_cuda(device):
        return 0.3
    total = torch.cuda.get_device_properties(device).total_memory
    return min(0.9, (1.1 * nbytes + OVERHEAD_BYTES) / total)


def block_tokens(device: str) -> int:
    """Tokens of a block of the KV cache: the smallest that vLLM's attention takes there."""
    return 16 if memory.is_cuda(device) else 32


def fitted(shape: Shape, device: str, kv_tokens: int, max_length: int, sequences: int) -> dict:
    """Settings for an engine that takes no more memory than it needs: a KV cache of `kv_tokens`
    tokens, texts of `max_length`, at most so many `sequences` at once.
    """
    block = block_tokens(device)
    kv_bytes = (kv_tokens + block) * shape.token_bytes  # one block is vLLM's own
    return {
        "max_model_len": max_length,  # first: of these a reader types it
        "dtype": shape.dtype_name,
        "max_num_seqs": sequences,
        "block_size": block,
        "kv_cache_memory_bytes": kv_bytes,
        "gpu_memory_utilization": share_of_card(shape.weight_bytes + kv_bytes, device),
        "enable_prefix_caching": False,
        "enforce_eager": not memory.is_cuda(device),
    }


def as_options(settings: dict) -> list[str]:
    """The same settings as words of `vllm serve`."""
    words = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if value is True:
            words.append(f"--{option}")
        elif value is False:
            words.append(f"--no-{option}")
        else:
            words.append(f"--{option}={value}")
    return words


def curl(server, request: dict) -> tuple[float, list[str]]:
    """Seconds that `curl` takes for a completion, and its texts.

    The key goes in by standard input, where no list of processes shows it, and no proxy that the
    environment names gets to see it.
    """
    command = ["curl", "-s", "--noproxy", "*", f"{server.url}/v1/completions", "-H", "@-"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(request)]
    key = f"Authorization: Bearer {server.api_key}\n"
    start = time.perf_counter()
    answer = subprocess.run(command, input=key, capture_output=True, text=True, timeout=300)
    seconds = time.perf_counter() - start
    choices = json.loads(answer.stdout or "{}").get("choices", [])
    return seconds, [choice["text"] for choice in choices]


def ask_a_server(
    command: list, requests: dict[str, dict], wanted: bool, limit_s: float
) -> dict[str, float]:
    """Start vLLM's server, ask it the article's prompt, and stop it; prints the texts.

    requests : of each, what it wants beside the prompt. Each is asked twice, the second counts.

    Returns seconds: `ready_s`, and of each request. Raises processes.ServingError where it does
    not start, or is not wanted.
    """
    if not wanted:
        raise processes.ServingError("RUN_VLLM is off")
    prompt = {"model": "base", "prompt": "I am so fast that I can", "temperature": 0}
    start = time.perf_counter()
    with processes.server(command, env=server_environment(), ready_s=limit_s) as server:
        seconds = {"ready_s": time.perf_counter() - start}
        for name, request in requests.items():
            for _ in range(2):
                seconds[name], texts = curl(server, prompt | request)
            print(*texts, sep="\n")
    return seconds


class Host:
    """One engine at a time, started when it is first asked for.

    Parameters
    ----------
    start : makes the engine; what it raises is said in one sentence, and it is not tried again.
    wanted : False: it is never started.
    """

    def __init__(self, start: Callable, device: str, wanted: bool = True):
        self.start = start
        self.device = device
        self.wanted = wanted
        self.make_room: Callable[[], object] = lambda: None  # called before a start
        self.engine = None
        self.settings: dict = {}
        self.reasons: dict[str, str] = {}

    def __call__(self, **settings):
        """The engine with these settings, beside those of `start`; another one is closed first.

        Raises NotImplementedError with the reason where it cannot be.
        """
        if not self.wanted:
            raise NotImplementedError("RUN_VLLM is off")
        if self.engine is not None and settings == self.settings:
            return self.engine
        key = repr(settings)
        if key not in self.reasons:
            self.close()
            self.make_room()
            memory.free()
            try:
                with capture_output():  # what an engine says while it starts
                    self.engine = self.start(**settings)
            except Exception as error:
                _, sentence = timing.failure(error)
                missing = isinstance(error, ModuleNotFoundError) and error.name == "vllm"
                self.reasons[key] = f"vLLM could not start here: {sentence[:200]}"
                if missing:
                    self.reasons[key] = "vllm is not installed in this kernel"
        if key in self.reasons:
            memory.free()
            raise NotImplementedError(self.reasons[key])
        self.settings = settings
        return self.engine

    def starts(self, **settings) -> bool:
        """Start it; prints why where it cannot."""
        try:
            self(**settings)
        except NotImplementedError as error:
            print(error)
            return False
        return True

    def close(self) -> None:
        """Let the engine go, and say how much memory came back."""
        if self.engine is None:
            return
        before = memory.resident_bytes(self.device)
        self.engine.llm_engine.engine_core.shutdown()
        self.engine = None
        memory.free()
        given_back = before - memory.resident_bytes(self.device)
        print(f"vLLM's engine is closed: {given_back / 1e9:.1f} GB came back")


@dataclasses.dataclass
class Steps:
    """What stepping an engine gave.

    Attributes
    ----------
    answers : of the requests, in their order.
    ends_s : the end of every step that gave a token.
    cache_share : after each of these, the share of the KV cache's blocks that were taken.
    preemptions : how often a running request was put back, for want of blocks.
    """

    answers: list[Answer]
    ends_s: list[float] = dataclasses.field(default_factory=list)
    cache_share: list[float] = dataclasses.field(default_factory=list)
    preemptions: int = 0


def step_through(
    llm,
    prompts: list[list[int]],
    lengths: list[int],
    slots: int | None = None,
    arrivals_s: list[float] | None = None,
) -> Steps:
    """Requests through vLLM's engine, stepped and stamped by one clock; greedy, of exact lengths.

    Parameters
    ----------
    slots : sequences that may run at once; by default as many as the engine was made for.
    arrivals_s : seconds after which each request comes; by default all are there at once.

    A step that gives no token, as the first one with asynchronous scheduling, is no stamp.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    # what LLM(max_num_active_seqs=…) sets
    scheduler.max_num_active_reqs = slots or scheduler.max_num_running_reqs
    arrivals_s = arrivals_s or [0.0] * len(prompts)
    waiting = collections.deque(sorted(range(len(prompts)), key=arrivals_s.__getitem__))
    steps = Steps([Answer(0.0) for _ in prompts])
    preempted: dict[str, int] = {}
    run = next(_numbers)
    start = time.perf_counter()
    while waiting or engine.has_unfinished_requests():
        begun = time.perf_counter() - start
        while waiting and arrivals_s[waiting[0]] <= begun:
            at = waiting.popleft()
            wanted = SamplingParams(
                temperature=0, max_tokens=lengths[at], ignore_eos=True, detokenize=False
            )
            engine.add_request(f"{run}-{at}", {"prompt_token_ids": prompts[at]}, wanted)
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            answer = steps.answers[int(output.request_id.split("-")[1])]
            ids = list(output.outputs[0].token_ids)
            if not answer.ids:
                answer.start_s = begun
            answer.stamps_s += [now] * (len(ids) - len(answer.ids))
            answer.ids = ids
        for request in scheduler.requests.values():
            preempted[request.request_id] = request.num_preemptions
        if outputs:
            steps.ends_s.append(now)
            steps.cache_share.append(scheduler.kv_cache_manager.usage)
    steps.preemptions = sum(preempted.values())
    return steps


def serve(llm, prompts: list[list[int]], lengths: list[int], slots: int) -> list[Answer]:
    """The answers of `step_through`, as `requests_06.through` wants them."""
    return step_through(llm, prompts, lengths, slots).answers


def as_run(steps: Steps) -> Run:
    """All requests of `step_through` as one run; its time is that of the last token."""
    ids = [answer.ids for answer in steps.answers]
    end_s = steps.ends_s[-1]
    useful = sum(map(len, ids))
    return Run(end_s, [end_s], 0, ids=ids, answers=dict(enumerate(steps.answers)), useful=useful)


def equal_batch(llm, prompts: list[list[int]], new_tokens: int) -> timing.Generation:
    """Prompts of one length, and as many tokens for each, timed as `timing.generate` does."""
    steps = step_through(llm, prompts, [new_tokens] * len(prompts))
    ids = [answer.ids for answer in steps.answers]
    return timing.Generation(steps.ends_s[-1], steps.ends_s, len(prompts[0]), len(prompts), ids)


def cache_use(steps: Steps, nbytes: int) -> dict[str, int]:
    """Bytes of a KV cache of `nbytes`: reserved, and taken at most and in the mean of the steps."""
    return {
        "kv_reserved_bytes": nbytes,
        "kv_used_peak_bytes": round(max(steps.cache_share) * nbytes),
        "kv_used_mean_bytes": round(sum(steps.cache_share) / len(steps.cache_share) * nbytes),
    }
