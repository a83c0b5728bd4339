"""`make soak`: the lessons that start processes, again and again with small numbers; nothing may
pile up.

After each round the machine is compared with before the first: processes, listening TCP ports,
shared memory, temporary files, available memory. `python -m tests.bench.soak ROUNDS LESSON ...`
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from helpers.series import run

ROUNDS, LESSONS, SETTLE_S = 3, ("03", "07"), 10


def left() -> dict[str, set]:
    """What a round could leave behind."""
    places = {"shared memory": Path("/dev/shm"), "temporary files": Path(tempfile.gettempdir())}
    return {
        "processes": {
            (p.pid, p.name()) for p in psutil.process_iter() if p.uids().real == os.getuid()
        },
        "ports": {c.laddr.port for c in psutil.net_connections("tcp") if c.status == "LISTEN"},
        **{name: {path.name for path in folder.iterdir()} for name, folder in places.items()},
    }


def one_round(lessons: list[Path], folder: Path) -> list[str]:
    """Run the lessons once; the names of those that failed."""
    failed = []
    for lesson in lessons:
        given = run.smoke_parameters(lesson) | {"RESULTS_DIR": str(folder / "results")}
        try:
            run.execute(lesson, folder / lesson.name, given)
        except Exception as error:
            failed.append(f"{lesson.stem}: {type(error).__name__}")
    return failed


def main(rounds: int, only: list[str]) -> int:
    os.environ["SEVEN_PROFILE"] = "smoke"
    before, faults = left(), 0
    table = Table("round", "seconds", "memory available, GB", "failed", *before)
    for number in range(1, rounds + 1):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            failed = one_round(run.notebooks(only), Path(folder))
        seconds = time.perf_counter() - start
        time.sleep(SETTLE_S)
        more = {name: now - before[name] for name, now in left().items()}
        faults += len(failed) + sum(map(len, more.values()))
        table.add_row(
            str(number),
            f"{seconds:.0f}",
            f"{psutil.virtual_memory().available / 1e9:.1f}",
            ", ".join(failed) or "–",
            *(", ".join(map(str, sorted(m))) or "–" for m in more.values()),
        )
    Console().print(table)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main(int((sys.argv[1:] or [ROUNDS])[0]), sys.argv[2:] or list(LESSONS)))
