"""Checkpoints that are made here: ordinary folders, made once, in the cache. And: does one fit?

A shape with random weights (`random:falcon-7b`) has the speed and the memory of the real model, and
nothing to say: quality is not asked of it.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from helpers import memory, quality

CONFIGS = Path(__file__).parent.parent / "data" / "configs"
RANDOM = "random:"
MARK = "random.json"  # in a folder of random weights; holds its name
FORMAT = 1  # raise it when what a folder of random weights holds changes
SHARD_BYTES = 1_000_000_000  # written at once, so that little memory is needed
WORDS = 8192  # of the tokenizer, or fewer
ENLARGED = 6, 20.0  # channels of every normalization, and by how much
TO_RUN = 1.03  # beside the weights: activations, the cache of a short text, rounding


def made_once(
    folder: Path, make: Callable[[Path], object], notice: str, digest: Callable[[Path], object]
) -> Path:
    """The folder that `make` writes; made again if it is damaged.

    Safe when two processes start at once: a lock is held, and the finished folder is moved into
    place whole.

    Parameters
    ----------
    notice : printed before it is made.
    digest : of one file; the manifest holds those of all files, and they are compared.

    Raises OSError in one sentence where it cannot be written whole; nothing of it is left then.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not _is_whole(folder, digest):
            print(notice)
            shutil.rmtree(folder, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                made = Path(scratch) / "model"
                try:
                    make(made)
                    (made / "manifest.json").write_text(json.dumps(_digests(made, digest)))
                    made.rename(folder)
                except (OSError, SafetensorError) as error:  # a full disk, say
                    raise OSError(f"{folder.name} cannot be made in the cache: {error}") from error
    return folder


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size(path: Path) -> int:
    """What tells damage in a file of gigabytes: reading all of it would take longer than a load."""
    return path.stat().st_size


def _digests(folder: Path, digest: Callable[[Path], object]) -> dict:
    paths = [path for path in sorted(folder.iterdir()) if path.name != "manifest.json"]
    return {path.name: digest(path) for path in paths}


def _is_whole(folder: Path, digest: Callable[[Path], object]) -> bool:
    try:
        return json.loads((folder / "manifest.json").read_text()) == _digests(folder, digest)
    except (OSError, ValueError):
        return False


# ---- random weights


def random_name(model: str) -> str | None:
    """ "random:falcon-7b" for that name, and for the folder that was made of it; else None."""
    if model.startswith(RANDOM):
        return RANDOM + Path(model.removeprefix(RANDOM)).expanduser().name
    try:
        return json.loads((Path(model).expanduser() / MARK).read_text())["name"]
    except (OSError, ValueError):
        return None


def random_folder(model: str, cache: Path, text: str) -> Path:
    """Folder of a checkpoint with seeded random weights in bfloat16, made once.

    Parameters
    ----------
    model : "random:NAME" of a configuration in `data/configs`, or "random:FOLDER" of a folder with
        a config.json.
    cache : where it is made.
    text : what its tokenizer is trained on.

    Raises ValueError in one sentence for an unknown name, and for a disk or a memory that is too
    small for it.
    """
    name = random_name(model)
    source = _config_path(model.removeprefix(RANDOM)).read_text()
    digest = hashlib.sha256(f"{FORMAT} {source} {text}".encode()).hexdigest()[:8]
    folder = cache / f"{name.replace(':', '-')}-{digest}"
    config = AutoConfig.for_model(**json.loads(source))
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    nbytes = 2 * sum(parameter.numel() for parameter in net.parameters())
    if not (folder / "manifest.json").is_file():
        _check_room(name, net, nbytes, cache)

    def make(made: Path) -> None:
        made.mkdir()
        _save_tokenizer(made, config, text)
        _save_weights(made, net)
        config.architectures = [type(net).__name__]
        config.dtype = torch.bfloat16
        config.save_pretrained(made)
        GenerationConfig.from_model_config(config).save_pretrained(made)
        (made / MARK).write_text(json.dumps({"name": name, "seed": 0}))

    notice = f"Making {name} once, {nbytes / 1e9:.1f} GB, into the cache (14 GB take a minute) ..."
    return made_once(folder, make, notice, size)


def _config_path(name: str) -> Path:
    """The configuration of this name, or the one in a folder of this name."""
    written = {path.stem: path for path in CONFIGS.glob("*.json")}
    if name.lower() in written:
        return written[name.lower()]
    path = Path(name).expanduser() / "config.json"
    if not path.is_file():
        names = ", ".join(sorted(written))
        raise ValueError(
            f"MODEL='{RANDOM}{name}' is neither a known shape ({names}) nor a folder with a "
            "config.json in it."
        )
    return path


def _check_room(name: str, net: torch.nn.Module, nbytes: int, cache: Path) -> None:
    """Raises ValueError where the disk or the memory is too small to make it."""
    cache.mkdir(parents=True, exist_ok=True)
    largest = max(2 * parameter.numel() for parameter in net.parameters())
    rooms = {
        "disk": (nbytes, shutil.disk_usage(cache).free),
        "memory": (2 * (largest + SHARD_BYTES), memory.available_bytes()),
    }
    for room, (needed, free) in rooms.items():
        if needed > free:
            raise ValueError(
                f"MODEL={name!r} cannot be made: it needs {needed / 1e9:.1f} GB of {room}, "
                f"{free / 1e9:.1f} GB are free."
            )


def _save_tokenizer(folder: Path, config: PreTrainedConfig, text: str) -> None:
    """Byte-pair encoding trained on the text, with ids below the model's vocabulary; the
    configuration gets its special ids.
    """
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(WORDS, config.vocab_size),
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # no text is without its tokens
        show_progress=False,
    )
    words.train_from_iterator(text.split("\n\n"), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id


def _random_tensors(net: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Seeded weights in bfloat16, one after the other, by name; tied ones once.

    Matrices are normal with the configuration's initializer_range, biases zero, normalizations one,
    but for a few channels far above the rest: trained models have such, and LLM.int8 computes them
    apart (Dettmers et al. 2022).
    """
    generator = torch.Generator().manual_seed(0)
    spread = getattr(net.config, "initializer_range", 0.02)
    channels, factor = ENLARGED
    for name, parameter in net.named_parameters():
        tensor = torch.zeros(parameter.shape, dtype=torch.bfloat16)
        if tensor.ndim > 1:
            tensor.normal_(0.0, spread, generator=generator)
        elif not name.endswith("bias"):
            tensor += 1.0
            tensor[:channels] *= factor
        yield name, tensor


def _shards(net: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """The weights by name, about SHARD_BYTES at a time."""
    shard: dict[str, torch.Tensor] = {}
    for name, tensor in _random_tensors(net):
        filled = sum(held.nbytes for held in shard.values())
        if shard and filled + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _save_weights(folder: Path, net: torch.nn.Module) -> None:
    """Safetensors files, and the index that says which holds what."""
    places = {}
    for number, shard in enumerate(_shards(net)):
        path = folder / f"model-{number:05}.safetensors"
        save_file(shard, path, {"format": "pt"})
        places |= dict.fromkeys(shard, path.name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# ---- does it fit?


def _technique(dtype: torch.dtype, quantization) -> str | None:
    """The planner's name for weights loaded so; None for a scheme that it does not know."""
    if quantization is None:
        return "fp32" if dtype.itemsize == 4 else "bf16"
    if getattr(quantization, "load_in_8bit", False):
        return "int8"
    if getattr(quantization, "load_in_4bit", False):
        doubled = "-dq" if quantization.bnb_4bit_use_double_quant else ""
        return quantization.bnb_4bit_quant_type + doubled
    return None


def check_fits(folder: str, dtype: torch.dtype, device: str, quantization=None) -> None:
    """Raises MemoryError, with both numbers, where the weights do not fit in what is free now.

    Parameters
    ----------
    folder : of the checkpoint, or its name on the hub.
    quantization : a quantization_config; one of bitsandbytes is known, others are let through.
    """
    from helpers.series import planner  # which itself resolves names by `helpers.models`

    technique = _technique(dtype, quantization)
    if technique is None:
        return
    weights = planner.memory(planner.describe(folder), technique, length=1)["weight_bytes"]
    needed = TO_RUN * weights
    free = memory.available_bytes(device)
    if needed > free:
        raise MemoryError(f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are there")


class OnDemand:
    """A function from token ids to logits for `quality.compare`, whose model is asked for at each
    call: models that do not fit side by side can make room for one another (`memory.cache`).

    Parameters
    ----------
    load : gives the model.
    context : as in `quality.Forward`.
    """

    def __init__(self, load: Callable, context: Callable = contextlib.nullcontext):
        self.load = load
        self.context = context
        self.scored_with = "as timed"

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        forward = quality.Forward(self.load(), self.context)
        self.scored_with = forward.scored_with
        return forward(ids)
