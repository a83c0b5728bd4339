"""Which card is meant? Names as people and `nvidia-smi` write them, several of one, any other by
its figures, and this machine itself.
"""

import difflib
import functools
import math
import re
from pathlib import Path

import pandas as pd
import torch

from helpers import machine, memory, results

GPUS = Path(__file__).parent.parent / "data" / "gpus.csv"
# what names carry beside the card: its maker, its kind of memory, its edition
AROUND = re.compile(
    r"\b(nvidia|amd|geforce|tesla|quadro|instinct|gpus?|hbm\d?e?|gddr\dx?|generation|graphics"
    r"|blackwell|workstation|edition)\b"
)
SEVERAL = re.compile(r"\s*(\d+)\s*[x×]\s*(.+)", re.IGNORECASE)
THIS_MACHINE = ("cpu", "here", "cuda")


@functools.cache
def gpus() -> pd.DataFrame:
    """The table of GPUs by name, each row with its source: bytes, bytes/s, dense FLOP/s, compute
    capability.

    memory_bytes is what PyTorch sees: a card's nominal "GB" are GiB, and the driver keeps some of
    them.
    """
    return pd.read_csv(GPUS, index_col="name", dtype={"compute_capability": str})


def gpu(name: str) -> pd.Series:
    """One GPU by name or alias, as people or `nvidia-smi` spell it.

    Raises ValueError in one sentence: that asks which, where several have the name ("A100"), or
    that names the nearest.
    """
    key = _key(name)
    for known, row in gpus().iterrows():
        if key in _names(row):
            return gpus().loc[known]
    several = [known for known in gpus().index if known.startswith(f"{key}-")]
    if several:
        raise ValueError(f"Which {name}? The table has {', '.join(several)}.")
    nearest = difflib.get_close_matches(key, list(gpus().index), n=3, cutoff=0)
    raise ValueError(
        f"No GPU {name!r} in the table; the nearest are {', '.join(nearest)}. Any other is planned "
        "with its memory and bandwidth (--memory-gb, --bandwidth)."
    )


def _names(row: pd.Series) -> list[str]:
    """A card's name and aliases, each also with its nominal memory behind it."""
    names = [row.name, *row["aliases"].split(";")]
    memory_gb = row["nominal_memory"].replace(" GB", "gb")
    return names + [f"{name}-{memory_gb}" for name in names if not name.endswith("gb")]


def _key(name: str) -> str:
    """A name without what stands around it, its words joined by dashes: "rtx-4090"."""
    plain = AROUND.sub(" ", re.sub(r"[^a-z0-9]+", " ", name.lower()))
    plain = re.sub(r"\b(rtx|gtx)(?=\d)", r"\1 ", plain)
    plain = re.sub(r"(\d+) gb\b", r"\1gb", plain)
    return "-".join(plain.split())


def several(text: str) -> tuple[int, str]:
    """How many of which card: "2x A100 80GB" is (2, "A100 80GB")."""
    match = SEVERAL.fullmatch(text)
    return (int(match[1]), match[2]) if match else (1, text)


def any_other(memory_gb: float, bandwidth: float = math.nan) -> pd.Series:
    """A card by what its driver reports.

    Parameters
    ----------
    memory_gb : 1e9 bytes.
    bandwidth : in GB/s; NaN where it is not known: then no speed is told.

    Its arithmetic is not known, so that its ceiling is by bandwidth alone. Raises ValueError.
    """
    if memory_gb <= 0 or bandwidth <= 0:
        raise ValueError("--memory-gb and --bandwidth are more than 0.")
    return _card(f"card of {memory_gb:g} GB", memory_gb * 1e9, bandwidth * 1e9)


def this_machine(device: str) -> pd.Series:
    """This machine's CPU ("cpu"), its first GPU ("cuda"), or the GPU where there is one ("here").

    Its memory is what is free now; its bandwidth that of `machine.json`, where one was measured.
    Raises ValueError in one sentence for a GPU that is not there.
    """
    if device == "here":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no GPU here that PyTorch can use.")
    bandwidth = math.nan
    for base in (results.base_folder(), results.ROOT / "notebooks" / "results"):
        measured = results.read_limits(base / machine.slug(device))
        if measured is not None and device in measured.devices:
            bandwidth = measured.devices[device].bandwidth_bytes_per_s
            break
    return _card(f"this machine's {device}", memory.available_bytes(device), bandwidth)


def _card(name: str, memory_bytes: float, bandwidth: float) -> pd.Series:
    figures = {
        "memory_bytes": round(memory_bytes),
        "bandwidth_bytes_per_s": bandwidth,
        "fp16_flop_per_s": math.inf,
        "fp32_flop_per_s": math.inf,
        "compute_capability": "",
    }
    return pd.Series(figures, name=name, dtype=object)
