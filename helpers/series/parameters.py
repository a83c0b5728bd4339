"""A notebook's parameters have the types of its own defaults, whoever passes them.

Papermill takes values as YAML or as words of a command line, and leaves `1e-3` or `[30, 50]` text.
"""

import ast
import functools
import math
import os
from pathlib import Path

import pandas as pd
import yaml
from transformers import AutoTokenizer

from helpers.series import planner

DATA = Path(__file__).parent.parent / "data"
KINDS = {
    bool: "True or False",
    int: "a whole number, not below zero",
    float: "a number, not below zero",
    list: "a list, like [1, 2]",
    str: "text",
}
INJECTED = "# Parameters"  # how papermill begins the cell with the values that it was given


def typed(name: str, value, default):
    """A parameter's value in the type of its default; in a list of numbers, its items too.

    Where the default is None, a value has the type of those in the table of defaults.

    Raises ValueError in one sentence for a value of another kind.
    """
    if default is None:
        if value in (None, "None"):
            return None
        default = ast.literal_eval(defaults().loc[name, "value"].iloc[0])
    kind = type(default)
    numbers = kind is list and default and not isinstance(default[0], str)
    original = value
    try:
        if isinstance(value, str) and kind in (int, float):
            value = kind(value)
        elif isinstance(value, str) and kind in (bool, list):
            value = yaml.safe_load(value)
        elif kind is float and type(value) is int:
            value = float(value)
        if numbers and isinstance(value, list):
            value = [float(item) if isinstance(item, str) else item for item in value]
    except Exception:  # what YAML finds in a text can be made wrongly in many ways
        value = original
    fits = type(value) is kind
    if fits and (numbers or kind in (int, float)):
        counted = value if numbers else [value]
        fits = all(type(one) in (int, float) and 0 <= one < math.inf for one in counted)
    if not fits:
        raise ValueError(f"{name}={original!r} must be {KINDS[kind]}.")
    return value


def literals(source: str) -> dict:
    """What a cell sets, by name, if it does nothing but set names to literals; else nothing."""
    values = {}
    try:
        for statement in ast.parse(source).body:
            values[statement.targets[0].id] = ast.literal_eval(statement.value)
    except (SyntaxError, ValueError, AttributeError):
        return {}
    return values


def check_parameters(notebook: dict) -> None:
    """Give the parameters of a running notebook their types: call it with `globals()` after the
    cell of parameters, before anything is loaded.

    The defaults are read from the kernel's own history, where that cell is the last one that sets
    RESULTS_DIR and that papermill has not put in.

    Raises ValueError in one sentence, for a model without a tokenizer too.
    """
    defaults = {}
    for source in notebook["In"]:
        values = literals(source)
        if "RESULTS_DIR" in values and not source.startswith(INJECTED):
            defaults = values
    for name, default in defaults.items():
        notebook[name] = typed(name, notebook[name], default)
    check_tokenizer(notebook.get("MODEL", "auto"))


def check_tokenizer(model: str) -> None:
    """Raises ValueError in one sentence for a model's folder without a tokenizer. What is no folder
    of a model is left to `models.resolve`.
    """
    folder = Path(model).expanduser()
    if not os.path.isfile(folder / "config.json"):  # False for a name that is too long for a file
        return
    try:
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer fails in its own way
        raise ValueError(
            f"MODEL={model!r} has no tokenizer that loads without code of its own: save it there "
            "with tokenizer.save_pretrained."
        ) from error


@functools.cache
def defaults() -> pd.DataFrame:
    """The table of defaults by parameter: device kind, bytes of the model in 16 bits up to which a
    row holds (none: any), value, why.
    """
    return pd.read_csv(DATA / "defaults.csv", index_col="parameter")


def fill_defaults(notebook: dict, device: str, model: str) -> None:
    """Give the parameters of a running notebook that are None their value in the table of defaults:
    call it with `globals()` once device and model are chosen.
    """
    missing = [name for name in defaults().index.unique() if notebook.get(name, "") is None]
    if missing:
        size = 2 * planner.parameters(planner.describe(model))["total"]
    for name in missing:
        rows = defaults().loc[[name]]
        rows = rows[rows["device"] == device.split(":")[0]].sort_values("up_to_bytes")
        holds = rows["up_to_bytes"].isna() | (rows["up_to_bytes"] >= size)
        notebook[name] = ast.literal_eval(rows.loc[holds, "value"].iloc[0])
