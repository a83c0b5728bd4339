"""Are the details of records those that `helpers/data/details.csv` declares?"""

import csv
import fnmatch

from helpers import results

DETAILS = results.ROOT / "helpers" / "data" / "details.csv"


def undeclared_details(records: list[results.Record]) -> list[str]:
    """A sentence for each detail that `helpers/data/details.csv` does not know, or of another type.

    A technique that the table does not have at all declares none: the series can grow.
    """
    with DETAILS.open(encoding="utf-8", newline="") as file:
        declared = list(csv.DictReader(file))
    techniques = {row["technique"] for row in declared}
    problems = {}
    for record in records:
        known = [row for row in declared if row["technique"] in ("*", record.technique)]
        for name, value in record.details.items():
            types = {row["type"] for row in known if fnmatch.fnmatchcase(name, row["name"])}
            if not types and record.technique in techniques:
                problems[name] = f"{record.technique}: {name} is not declared"
            elif types and not any(_is_of(value, kind) for kind in types):
                problems[name] = f"{record.technique}: {name} is {value!r}, not {min(types)}"
    return list(problems.values())


def _is_of(value, kind: str) -> bool:
    """Is a detail, or each value of its list, of this type? A whole number is a float too."""
    accepted = {"float": (float, int), "int": int, "bool": bool, "str": str}[kind]
    values = value if isinstance(value, list) else [value]
    numbers_only = kind in ("float", "int")
    for one in values:
        if numbers_only and isinstance(one, bool):
            return False
        if one is not None and not isinstance(one, accepted):
            return False
    return True
