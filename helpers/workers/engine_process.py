"""A process that sleeps until it is asked: a line of JSON in, a line of JSON out. For lessons 03
and 06.
"""

import json
import select
import subprocess
import sys

LIMIT_S = 600.0  # longest wait for an answer, loading included


class Process:
    """One of the scripts beside this file, started; its first line is kept as `ready`, and it ends
    with its input.

    Raises NotImplementedError when it cannot start, or does not answer within LIMIT_S; it is ended
    then.
    """

    def __init__(self, script, *arguments):
        command = [sys.executable, script, *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.ready = self._answer()

    def _answer(self):
        if not select.select([self.process.stdout], [], [], LIMIT_S)[0]:
            self.process.kill()
            self.process.wait()
            raise NotImplementedError(f"the engine did not answer within {LIMIT_S:g} s")
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise NotImplementedError(f"the engine ended with code {self.process.wait()}")

    def ask(self, question):
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self.process.communicate()
