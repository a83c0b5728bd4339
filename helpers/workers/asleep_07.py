"""The far end of `launches_07.Ranks`: a process says that it is ready, then answers line by line.

Of the standard library alone, since vLLM's worker may run in another environment.
"""

import json
import socket
from collections.abc import Callable


def answer(job: dict, rank: int, ready: dict, answers: dict[str, Callable]) -> None:
    """Say `ready`, then answer each question until the lesson closes the connection.

    Parameters
    ----------
    job : holds the `address` to call and the `key` to show.
    answers : what to do, by the `do` of a question; the question's other fields are its arguments.
    """
    with socket.create_connection(tuple(job["address"])) as connection:
        lines = connection.makefile("rw")
        print(json.dumps(ready | {"rank": rank, "key": job["key"]}), file=lines, flush=True)
        for line in lines:
            question = json.loads(line)
            reply = answers[question.pop("do")](**question)
            print(json.dumps(reply), file=lines, flush=True)
