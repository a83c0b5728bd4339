"""How far the headline ratios move from one reference run to the next: a machine's history.csv."""

from pathlib import Path

import pandas as pd

from helpers import results
from helpers.timing import Ratio

NAME = "history.csv"
KEY = ["model", "notebook", "variant", "baseline"]
COLUMNS = ["date", *KEY, "speedup", "low", "high"]


def _ratios(path: Path) -> list[dict]:
    """The speed-ups with an interval that one file of results holds, sweeps left out."""
    lesson = results.read(path)
    rows = []
    for record in lesson.records:
        if record.sweep is None and record.speedup_ci95:
            low, high = record.speedup_ci95
            row = {"date": lesson.run.date, "model": path.parent.name, "notebook": path.stem}
            row |= {"variant": record.id, "baseline": record.baseline}
            rows.append(row | {"speedup": record.speedup, "low": low, "high": high})
    return rows


def read(folder: Path) -> pd.DataFrame:
    """A machine's history: a row a ratio, with the date of its run and its 95 % interval."""
    path = folder / NAME
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=COLUMNS)


def append(folder: Path) -> None:
    """Add to a machine's history what its results hold and the history does not yet."""
    rows = read(folder).to_dict("records")
    for path in sorted(folder.glob("*/[0-9][0-9]_*.json")):
        if not path.name.endswith(".partial.json"):
            rows += _ratios(path)
    table = pd.DataFrame(rows, columns=COLUMNS).round(4)
    table = table.drop_duplicates(["date", *KEY])  # in the order of the runs, not of a clock
    results.write_atomically(folder / NAME, table.to_csv(index=False))


def moved(rows: pd.DataFrame) -> str:
    """How often a ratio that was measured again kept its word, in one sentence."""
    gains = rows[["speedup", "low", "high"]].to_numpy()
    rows = rows.assign(word=[Ratio(*gain).verdict for gain in gains])
    earlier = rows.groupby(KEY)[["word", "speedup"]].shift()
    again = rows[earlier["word"].notna()]
    if again.empty:
        return "No ratio has been measured in two reference runs yet."
    earlier = earlier.loc[again.index]
    same = (again["word"] == earlier["word"]).sum()
    both = again["word"] + earlier["word"]
    reversed_ = both.isin(["fasterslower", "slowerfaster"]).sum()
    change = (again["speedup"] / earlier["speedup"] - 1).abs().median()
    return (
        f"Of {len(again)} ratios that a reference run measured again on this machine, {same} kept "
        f"their word (faster, slower, within noise); reversed: {reversed_}. Half of them "
        f"moved by at most {change:.1%}. The code changed between these runs too."
    )
