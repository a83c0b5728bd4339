"""Which model does a lesson take, where none is named? On a CPU the embedded one, on a GPU the
article's.
"""

import json
from pathlib import Path

import huggingface_hub

from helpers import memory, results
from helpers.series import checkpoints, planner

CONTEXT = 2048  # tokens of the text that must fit beside the weights
TO_TRAIN = 1.5  # of the memory that float32 takes, where a lesson trains: an estimate
ANSWER_S = 5.0  # seconds that the hub has


def choose_model(lesson: str, model: str, device: str, trains: bool = False) -> str:
    """The model that a lesson takes: `model` itself, unless it is "auto" and the device a GPU.

    Then it is the largest of those in the notebook's metadata that fits in float32 and can be had,
    its download announced; where none can, the largest shape that fits, with random weights.

    Parameters
    ----------
    lesson : its name, "01_mixed_precision".
    trains : random weights will not do, and training needs room.
    """
    if model != "auto" or not memory.is_cuda(device):
        return model
    factor = TO_TRAIN if trains else 1.0
    free = memory.available_bytes(device)
    fitting = [name for name in candidates(lesson) if factor * _needed_bytes(name) <= free]
    for name in fitting:
        nbytes = download_bytes(name)
        if nbytes is not None:
            source = f"{nbytes / 1e9:.1f} GB to download" if nbytes else "in the cache"
            print(f"MODEL={name!r} ({source}).")
            return name
    if fitting and not trains:
        name = checkpoints.RANDOM + _shape(fitting[0])
        print(f"No hub answers: MODEL={name!r}, random weights, which have speed but no quality.")
        return name
    print("The embedded model is taken: on a GPU launches bound it, so its ratios say little.")
    return model


def candidates(lesson: str) -> list[str]:
    """The models of a lesson, largest first, from the metadata of its notebook; none where there
    is no such notebook in the project or in the working folder.
    """
    for folder in (results.ROOT / "notebooks", Path.cwd()):
        path = folder / f"{lesson}.ipynb"
        if path.is_file():
            notebook = json.loads(path.read_text(encoding="utf-8"))
            return notebook["metadata"].get("models", [])
    return []


def _shape(name: str) -> str:
    """The name of a hub model in `data/configs`."""
    return Path(name).name.lower()


def _needed_bytes(name: str) -> int:
    """What the model takes in float32, as the lessons' baselines are."""
    return planner.memory(planner.describe(_shape(name)), "fp32", length=CONTEXT)["total_bytes"]


def download_bytes(name: str) -> int | None:
    """Bytes of a model on the hub that are to be downloaded: 0 where it is in the cache, None where
    no hub answers.
    """
    if _is_cached(name):
        return 0
    try:
        api = huggingface_hub.HfApi()
        files = api.model_info(name, files_metadata=True, timeout=ANSWER_S).siblings
    except Exception:  # no network, offline by wish, a proxy's page, a name that is gone
        return None
    weights = [file.size for file in files if file.rfilename.endswith(".safetensors")]
    return sum(weights) or None


def _is_cached(name: str) -> bool:
    files = ["config.json", "model.safetensors"]
    index = huggingface_hub.try_to_load_from_cache(name, "model.safetensors.index.json")
    if isinstance(index, str):
        files = ["config.json", *json.loads(Path(index).read_text())["weight_map"].values()]
    paths = [huggingface_hub.try_to_load_from_cache(name, file) for file in set(files)]
    return all(isinstance(path, str) for path in paths)
