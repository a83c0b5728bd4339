"""Progress on long work, without residue in a notebook's outputs."""

import time
from collections.abc import Callable

from IPython import get_ipython
from IPython.display import display


def progress(total: int, what: str) -> Callable[..., None]:
    """A function to call after each step, or after several with their number; in a notebook one
    line counts them and the seconds they took.
    """
    if get_ipython() is None:
        return lambda steps=1: None
    start, done = time.perf_counter(), 0

    def line() -> dict:
        return {"text/plain": f"{done} of {total} {what}, {time.perf_counter() - start:.0f} s"}

    handle = display(line(), raw=True, display_id=True)

    def step(steps: int = 1) -> None:
        nonlocal done
        done += steps
        handle.update(line(), raw=True)

    return step
