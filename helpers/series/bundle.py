"""`python -m helpers.series.bundle`: one machine's records in one file, to send and to compare.

08 reads such a file where it takes a folder of results, or several with the system's sign for
paths between them: `RESULTS_DIR="mine.zip:yours.zip"`.
"""

import argparse
import re
import sys
import zipfile
import zlib
from pathlib import Path

from helpers import machine, results

NAME = r"[\w+-][\w.+-]*"
RECORDS = re.compile(rf"{NAME}/{NAME}/\d\d_{NAME}\.json")
LIMITS = re.compile(rf"{NAME}/machine\.json")
MOST_BYTES = 200_000_000  # unpacked; one machine's records take a hundredth of that


def pack(base: Path, slug: str, path: Path) -> Path:
    """Write the records of one machine in the folder `base`, of all its models, into `path`.

    Raises ValueError, in one sentence, where there are none.
    """
    files = sorted(Path(base, slug).rglob("*.json"))
    names = {file.relative_to(base).as_posix(): file for file in files}
    if not any(map(RECORDS.fullmatch, names)):
        there = ", ".join(results.machines_with_results(str(base))) or "none"
        raise ValueError(f"{base} has no records of {slug} (of: {there}): run the lessons first.")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in names.items():
            if RECORDS.fullmatch(name) or LIMITS.fullmatch(name):
                archive.write(file, name)
    return path


def unpack(path: Path, folder: Path) -> None:
    """Put a bundle's records where `report.load` finds them.

    Raises ValueError, in one sentence, for anything but a whole bundle of records of this edition,
    and for records that lie in `folder` already.
    """
    try:
        _unpack(path, folder)
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise ValueError(f"{path.name} is refused as a bundle of results: {error}") from error


def _unpack(path: Path, folder: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        for entry in entries:
            if not RECORDS.fullmatch(entry.filename) and not LIMITS.fullmatch(entry.filename):
                raise ValueError(f"it holds {entry.filename!r}, which is no record.")
        if sum(entry.file_size for entry in entries) > MOST_BYTES:
            raise ValueError(f"it holds more than {MOST_BYTES / results.GB:g} GB.")
        for entry in entries:
            file = folder / entry.filename
            if file.exists():
                raise ValueError(f"another bundle holds {entry.filename} too: show one of them.")
            results.write_atomically(file, archive.read(entry).decode())
            if RECORDS.fullmatch(entry.filename):
                results.read(file)
    if not any(RECORDS.fullmatch(entry.filename) for entry in entries):
        raise ValueError("it holds no records.")


def main(arguments: list[str] | None = None) -> int:
    """Pack what the command line names; returns the exit status, 2 where there is nothing."""
    parser = argparse.ArgumentParser(prog="python -m helpers.series.bundle", description=__doc__)
    parser.add_argument("machine", nargs="?", default=machine.slug(), help="default: this one")
    parser.add_argument("--results", default="", metavar="DIR", help="default: runs")
    parser.add_argument("--to", type=Path, metavar="FILE", help="default: MACHINE.zip")
    given = parser.parse_args(arguments)
    try:
        target = given.to or Path(f"{given.machine}.zip")
        path = pack(results.base_folder(given.results), given.machine, target)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
