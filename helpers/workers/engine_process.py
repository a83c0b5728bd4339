"""A process that sleeps until it is asked: a line of JSON in, a line of JSON out. For lessons 03
and 06.
"""

import json
import os
import select
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent  # the folder that holds `helpers`
LIMIT_S = 600.0  # longest wait for an answer, loading included


class Process:
    """One of the scripts beside this file, started; its first line is kept as `ready`, and it ends
    with its input. It can import `helpers`, also where that is not installed.

    Raises NotImplementedError when it cannot start, or does not answer within LIMIT_S; it is ended
    then.
    """

    def __init__(self, script, *arguments):
        command = [sys.executable, script, *map(str, arguments)]
        import_folders = [str(ROOT)]
        if "PYTHONPATH" in os.environ:
            import_folders.append(os.environ["PYTHONPATH"])
        self.process = subprocess.Popen(
            command,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(import_folders)},
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
