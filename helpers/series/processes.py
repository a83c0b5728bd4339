"""Start a server, torchrun or Ray under a supervisor, wait for it, end all it started.

The supervisor is this file, run as a process of its own. It reads a pipe whose other end only its
owner holds: however the owner ends, SIGKILL included, the pipe closes, and the supervisor ends the
command and all that came of it. Linux hands it every orphan, those in sessions of their own too.
"""

import contextlib
import ctypes
import http.client
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.request import getproxies_environment

import psutil

HOST = "127.0.0.1"
ENVIRONMENT = {
    "VLLM_HOST_IP": HOST,
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONUNBUFFERED": "1",
    "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank${rank}]: ",
}  # of everything started here
POLL_S, GRACE_S = 0.1, 5.0  # from one look to the next; from SIGTERM to SIGKILL
# a supervisor's exit code when it was told to end; else its command's, or 128 + the signal's number
ENDED = 180
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
Command = Sequence[str | Path]


class ServingError(RuntimeError):
    """What a server or a launcher did wrong: one sentence, then its last lines."""


class Server:
    """A server that runs until `stop()`, the end of its `with` block, or its owner's. Requests must
    carry `headers`.
    """

    def __init__(self, command: Command, port: int, env: dict[str, str], key_variable: str):
        self.name, self.port, self.api_key = (
            _name(command),
            free_port(port),
            secrets.token_urlsafe(24),
        )
        self.url, self.headers = (
            f"http://{HOST}:{self.port}",
            {"Authorization": f"Bearer {self.api_key}"},
        )
        self.log = Path(tempfile.mkdtemp(prefix="run-")) / "server.log"
        words = [str(word).replace("{port}", str(self.port)) for word in command]
        with self.log.open("wb") as output:
            self.supervisor = _start(
                [words], {**env, key_variable: self.api_key}, self.log.parent, output
            )

    @property
    def pid(self) -> int:
        """Process id of the command itself, the root of the server's processes."""
        return min(
            psutil.Process(self.supervisor.pid).children(), key=lambda child: child.create_time()
        ).pid

    def log_tail(self, lines: int = 20) -> str:
        """The server's last lines, after its first error if that is not among them; "(none)" once
        it is stopped.
        """
        text = self.log.read_text("utf-8", "replace") if self.log.exists() else ""
        return _tail(text.replace(self.api_key, "<api key>").splitlines(), lines)

    def stop(self) -> None:
        """End the server and every process it started, and remove its log; again is harmless."""
        self.supervisor.stdin.close()
        self.supervisor.wait()
        shutil.rmtree(self.log.parent, ignore_errors=True)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind, error, trace) -> None:
        tail = self.log_tail()
        self.stop()
        if error is not None and (code := self.supervisor.returncode) != ENDED:
            error.add_note(f"{self.name} {_outcome(code)} meanwhile; its last lines:\n{tail}")


def server(
    command: Command,
    *,
    port: int = 0,
    env: dict[str, str] | None = None,
    key_variable: str = "VLLM_API_KEY",
    ready: str = "/health",
    ready_s: float = 300.0,
) -> Server:
    """Start a server that binds 127.0.0.1; return once it is ready. Use it with `with`, or call its
    `stop()`.

    In `command`, `{port}` becomes the port (0: a free one). `env` is added to this process's
    environment; `key_variable` names the variable that gives the server an API key made for this
    run. It is ready when GET `ready`, asked with the key, answers 200, for which it has `ready_s`
    seconds.

    Raises ServingError, with the log's last lines, when the port is in use, the server ends or is
    not ready in time, or listens beyond loopback. Nothing is left running then, nor after an
    interrupt.
    """
    started = Server(command, port, env or {}, key_variable)
    try:
        _wait_ready(started, ready, ready_s)
    except BaseException:
        started.stop()
        raise
    return started


def run(
    *commands: Command,
    timeout_s: float,
    env: dict[str, str] | None = None,
    on_line: Callable[[str], object] = print,
) -> list[str]:
    """Run a launcher such as torchrun to its end; return its lines of output (stdout and stderr
    together).

    Several commands run together, and the first to fail ends all. `timeout_s` is a deadline in
    seconds. `on_line` gets each line as it comes, in the calling thread; torchrun's `--tee 3` marks
    each with its rank.

    Raises ServingError, with the failing rank's last lines, when a command fails or the deadline
    passes. Nothing is left running then, nor after an interrupt.
    """
    lines, name = [], _name(commands[0])
    with tempfile.TemporaryDirectory(prefix="run-", ignore_cleanup_errors=True) as scratch:
        supervisor = _start(commands, env or {}, scratch, subprocess.PIPE)
        timer = threading.Timer(timeout_s, supervisor.stdin.close)
        try:
            timer.start()
            for line in supervisor.stdout:
                lines.append(line.rstrip())
                on_line(lines[-1])
        finally:
            timer.cancel()
            supervisor.stdin.close()
            supervisor.wait()  # not long: it has limits of its own
    if code := supervisor.returncode:
        late = name, f"was not done within {timeout_s:g} s", lines
        who, what, own = (
            late if code == ENDED else _failing_rank(lines) or (name, _outcome(code), lines)
        )
        raise ServingError(f"{who} {what}; its last lines:\n{_tail(own)}")
    return lines


def free_port(port: int = 0) -> int:
    """The port, if it can be bound on loopback (else ServingError); 0 finds a free one."""
    try:
        with socket.create_server((HOST, port)) as probe:
            return probe.getsockname()[1]
    except OSError as error:
        raise ServingError(
            f"Port {port} cannot be used ({os.strerror(error.errno)}): name another, or 0."
        ) from None


def _wait_ready(server: Server, ready: str, ready_s: float) -> None:
    print(f"Starting {server.name} on port {server.port} ", end="", flush=True)
    begun, rounds, fault = time.monotonic(), 0, ""
    while not fault and (status := _status(server, ready)) != 200:
        if (code := server.supervisor.poll()) is not None:
            fault = f"{_outcome(code)} before it was ready"
        elif time.monotonic() - begun > ready_s:
            fault = f"was not ready within {ready_s:g} s (GET {ready}: {status or 'no answer'})"
        elif (rounds := rounds + 1) % 50 == 0:
            print(".", end="", flush=True)
        time.sleep(POLL_S)
    bound = [found.laddr for found in psutil.net_connections("tcp") if found.status == "LISTEN"]
    if wide := {ip for ip, port in bound if port == server.port} - {HOST, "::1"}:
        fault = f"listens on {min(wide)}, not on {HOST} alone"
    print("" if fault else f" ready after {time.monotonic() - begun:.0f} s", flush=True)
    if fault:
        raise ServingError(f"{server.name} {fault}; its last lines:\n{server.log_tail()}")


def _status(server: Server, path: str) -> int | None:
    with (
        contextlib.suppress(OSError, http.client.HTTPException),
        contextlib.closing(http.client.HTTPConnection(HOST, server.port, timeout=2)) as connection,
    ):
        connection.request("GET", path, headers=server.headers)
        return connection.getresponse().status


def _name(command: Command) -> str:
    """The module or script that Python runs, else the program."""
    names = [Path(word).name for word in command]
    words = (
        [name for name in names[1:] if not name.startswith("-")]
        if names[0].startswith("python")
        else []
    )
    return (words or names)[0]


def _outcome(code: int) -> str:
    number = -code if code < 0 else code - 128
    if not 0 < number < 32:
        return f"ended with exit code {code}"
    guess = " (out of memory?)" if number == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(number).name}{guess}"


def _tail(lines: Sequence[str], count: int = 20) -> str:
    """The last lines, after the first error if that is not among them; an error without a message
    is given the line of code that raised it.
    """
    said = []
    for line in lines:
        bare = re.fullmatch(r"(.*\] )?[\w.]*(Error|Exception)", line)
        if bare and said:
            line += f": {said[-1].removeprefix(bare[1] or '').strip()}"
        if not re.fullmatch(r"(.*\] )?[\s^~]*", line):  # a traceback's underlining
            said.append(line)
    first = [
        line for line in said[:-count] if re.search(r"(^|\] )[\w.]*(Error|Exception): ", line)
    ][:1]  # the cause
    return "\n".join(first + said[-count:]) or "(none)"


def _failing_rank(lines: Sequence[str]) -> tuple[str, str, list[str]] | None:
    """By torchrun's summary: who failed first, how, and its lines (all ranks' where they bear no
    mark).
    """
    found = re.search(
        r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", "\n".join(lines), re.DOTALL
    )
    if found:
        mark = f"[rank{found[1]}]: "
        own = [line.replace(mark, "") for line in lines if line.startswith(mark)]
        start = next(
            (i for i, line in enumerate(lines) if "torch/distributed/elastic" in line), len(lines)
        )
        return f"rank {found[1]}", _outcome(int(found[2])), own or lines[:start]


def _start(
    commands: Sequence[Command], env: dict[str, str], scratch: str | Path, output
) -> subprocess.Popen:
    """A supervisor with its commands, whose temporary files go to the folder `scratch`."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    return subprocess.Popen(
        [sys.executable, "-P", __file__, str(scratch), words],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        env={**os.environ, **ENVIRONMENT, **_unproxied(), "TMPDIR": str(scratch), **env},
    )


def _unproxied() -> dict[str, str]:
    """So that no proxy sees what goes over loopback, a run's key in it; the user's own exceptions
    stay.
    """
    excepted = [getproxies_environment().get("no", ""), HOST, "localhost"]
    value = ",".join(excepted).lstrip(",")
    return {"NO_PROXY": value, "no_proxy": value}


def _supervise(scratch: str, commands: list[list[str]]) -> int:
    """Run the commands until one fails, all are done, or an end is asked for; then end all that is
    left.
    """
    owner, prctl = os.getppid(), ctypes.CDLL(None).prctl
    told, running, code = [], {}, None
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        for command in commands:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
            )
            running[child.pid] = child
        while code is None:
            gone = told or select.select([0], [], [], 0)[0] or os.getppid() != owner
            time.sleep(POLL_S)  # so that a command whose death the owner saw first is seen dead
            failed = [ended for pid, ended in _reap().items() if running.pop(pid, None) and ended]
            if failed:
                code = failed[0]
            elif not running:
                code = 0
            elif gone:
                code = ENDED
    except OSError as error:
        print(f"{error.filename}: {error.strerror}")
        code = 127
    _end_descendants()
    if code == ENDED:
        shutil.rmtree(scratch, ignore_errors=True)
    return code if code >= 0 else 128 - code


def _reap() -> dict[int, int]:
    """Exit codes, by process id, of the children that have ended; minus the signal's number for a
    killed one.
    """
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = os.waitstatus_to_exitcode(found[1])
    return ended


def _end_descendants() -> None:
    begun, asked = time.monotonic(), set()
    while (
        left := psutil.Process().children(recursive=True)
    ) and time.monotonic() - begun < 3 * GRACE_S:
        for process in left:
            with contextlib.suppress(psutil.Error):
                if time.monotonic() - begun > GRACE_S:
                    process.kill()
                elif process not in asked:
                    asked.add(process)
                    process.terminate()
        time.sleep(0.02)
        _reap()


if __name__ == "__main__":
    sys.exit(_supervise(sys.argv[1], json.loads(sys.argv[2])))
