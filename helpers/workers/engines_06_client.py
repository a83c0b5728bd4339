"""The other end of `engines_06.py`, for lesson 06: start an engine's process, hand it requests, end
it.
"""

from pathlib import Path

from helpers.workers.engine_process import Process

SETTLE_S = 0.3  # time for other engines' threads to fall asleep, before a run and not in it


class Worker(Process):
    """An engine in a process of its own; called, it gives each request's tokens, start, first and
    last token.

    Raises NotImplementedError (see `Process`).
    """

    def __init__(self, *arguments):
        super().__init__(Path(__file__).with_name("engines_06.py"), *arguments)
        self.precision = self.ready

    def __call__(self, prompts: list[list[int]], lengths: list[int]) -> list[list]:
        return self.ask([prompts, lengths])
