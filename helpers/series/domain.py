"""Text of a domain to tune on: the embedded one, a text file, or a data set; and plain prose that
none of them resembles.
"""

import hashlib
import importlib.metadata
from pathlib import Path

import torch

from helpers import memory, models
from helpers.models import Text

EMBEDDED = "embedded"
ALPACA = "tatsu-lab/alpaca"  # the article's data set
HELD_OUT = 5  # every fifth row is never trained on
ROWS = 5000  # of a data set


def choose(dataset: str, model: str, device: str) -> str:
    """What DATASET="auto" means: Alpaca on a GPU, the embedded text on a CPU and for the embedded
    model.
    """
    if dataset != "auto":
        return dataset
    if model == "auto" or not memory.is_cuda(device):
        return EMBEDDED
    return ALPACA


def texts(dataset: str, model: str, device: str, end: str) -> tuple[Text, Text]:
    """Training and held-out text of a domain; none of the second is in the first.

    Parameters
    ----------
    dataset : "auto" (see `choose`), "embedded", a text file (its paragraphs are the rows), a name
        on the hub or a folder of a data set.
    end : ends each row of a data set that is trained on: a model has to learn where to stop.

    Where the hub does not answer for "auto", the embedded text is taken, which is said.

    Raises ValueError in one sentence for a data set that was asked for and cannot be had.
    """
    source = choose(dataset, model, device)
    if source == EMBEDDED:
        return models.text("training"), models.text("evaluation")
    try:
        rows = _rows(source)
    except (OSError, ImportError) as error:
        if dataset != "auto":
            raise ValueError(
                f"DATASET={dataset!r} is no file or folder here and no data set that can be "
                "reached on the hub."
            ) from error
        print(f"{source} cannot be had ({type(error).__name__}): the embedded text is used.")
        return models.text("training"), models.text("evaluation")
    training = [row + end for number, row in enumerate(rows) if number % HELD_OUT]
    name = Path(source).name
    heldout = "\n\n".join(rows[::HELD_OUT])
    return _text(f"{name}/training", "\n\n".join(training)), _text(f"{name}/evaluation", heldout)


def _rows(source: str) -> list[str]:
    """Paragraphs of a text file; or the rows of a data set, their columns one below the other.

    A column `text` beside others repeats them in a template (Alpaca's does): it is left out.
    """
    if Path(source).is_file():
        return Path(source).read_text(encoding="utf-8").split("\n\n")
    from datasets import load_dataset

    table = load_dataset(source, split=f"train[:{ROWS}]")
    columns = [name for name in table.column_names if name != "text"] or ["text"]
    return ["\n".join(str(row[name]) for name in columns if row[name]) for row in table]


def _text(name: str, content: str) -> Text:
    return Text(name, content, hashlib.sha256(content.encode()).hexdigest())


def sequences(text: Text, tokenizer, length: int, count: int, seed: int = 0) -> torch.Tensor:
    """(count, length) token ids in a seeded order, from the beginning again when the text is used
    up.

    Raises ValueError in one sentence for a length below 2, and for a text shorter than one.
    """
    if length < 2:
        raise ValueError(
            f"TRAIN_LENGTH={length} must be at least 2: the first token predicts, the last is "
            "predicted."
        )
    ids = tokenizer(text.content).input_ids
    if len(ids) < length:
        raise ValueError(
            f"the text {text.name} has {len(ids)} tokens, a sequence takes TRAIN_LENGTH={length}: "
            "lower it or name another DATASET."
        )
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order.repeat(-(-count // len(rows)))[:count]]


def prose() -> Text:
    """English of another kind, a licence's: the GNU General Public License, which numpy's wheels
    carry for a library in them.

    Raises FileNotFoundError where this numpy has no such file.
    """
    licence = "GNU GENERAL PUBLIC LICENSE"
    for file in importlib.metadata.files("numpy") or []:
        if file.name == "LICENSE.txt":
            content = file.read_text(encoding="utf-8")
            if licence in content:
                terms = content.partition(licence)[2].partition("END OF TERMS")[0]
                return _text("numpy-licence/gpl-3", terms)
    raise FileNotFoundError("numpy's licence file, the plain prose of lesson 04, is not here.")
