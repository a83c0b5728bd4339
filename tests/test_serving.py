"""Servers and launchers are started, waited for, and end with everything they started, whatever
befalls their owner.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from helpers.series import processes

PYTHON = sys.executable
PATIENCE_S = 20

# A server with a child, and an orphan in a session of its own, as engines have them.
SERVER = """
import http.server, os, signal, subprocess, sys, time
port, how = int(sys.argv[1]), sys.argv[2]
key = os.environ["TEST_KEY"]
print(f"its key is {key}", flush=True)
if how == "dies":
    sys.exit("max_model_len is too long")
sleep = "import signal, time; signal.signal(signal.SIGTERM, signal.%s); time.sleep(99)"
sleep %= "SIG_IGN" if how == "stubborn" else "SIG_DFL"
subprocess.Popen([sys.executable, "-c", sleep])
subprocess.run([sys.executable, "-c", f'''
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {sleep!r}], start_new_session=True)
'''])

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/crash":
            print("a fault in the engine", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        known = self.headers["Authorization"] == f"Bearer {key}"
        self.send_response(503 if how == "never" else 200 if known else 401)
        self.end_headers()
        self.wfile.write(b"well")

    def log_message(self, *words):
        pass

http.server.ThreadingHTTPServer(("0.0.0.0" if how == "wide" else "127.0.0.1", port), Handler).serve_forever()
"""

# An owner that tells the port, and the process id of a fork of its own that holds whatever it
# holds.
OWNER = """
import os, signal, sys, time
from helpers.series import processes
# a shell's background jobs are born deaf to it
signal.signal(signal.SIGINT, signal.default_int_handler)
port = processes.free_port()
print(f"port {port}", flush=True)
with processes.server([sys.executable, sys.argv[1], "{port}", sys.argv[2]], port=port, key_variable="TEST_KEY"):
    fork = os.fork() if sys.argv[3] == "forks" else -1
    if fork:
        print(f"fork {fork}", flush=True)
    time.sleep(99)
"""

RANK = """
import datetime, os, signal, sys, torch, torch.distributed as dist
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
rank, ones = dist.get_rank(), torch.ones(2)
dist.all_reduce(ones)
print("sum", ones.tolist())
if rank == 1 and sys.argv[1] == "raises":
    raise ValueError("this shard is broken")
if rank == 1 and sys.argv[1] == "is killed":
    os.kill(os.getpid(), signal.SIGKILL)
dist.all_reduce(ones)
"""


def marked(mark: str) -> list[psutil.Process]:
    """Processes that live and bear the test's mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get("TEST_MARK") == mark
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(holds, what: str):
    """The first true value of `holds()`; fails after some seconds."""
    until = time.monotonic() + PATIENCE_S
    while not (value := holds()):
        assert time.monotonic() < until, f"still not so after {PATIENCE_S} s: {what}"
        time.sleep(0.05)
    return value


@pytest.fixture(autouse=True)
def mark(tmp_path, monkeypatch):
    """Everything a test starts bears a mark; the test must leave neither a process nor a temporary
    folder.
    """
    name, scratch = f"mark-{tmp_path.name}-{os.getpid()}", tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TEST_MARK", name)
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setenv("PYTHONPATH", str(Path(processes.__file__).parent.parent))
    yield name
    try:
        wait_until(lambda: not marked(name), "no process is left")
        wait_until(lambda: not list(scratch.iterdir()), "no temporary file is left")
    finally:
        for process in marked(name):
            process.kill()


@pytest.fixture
def script(tmp_path):
    """Writes a Python script, returns its path."""

    def write(text: str, name: str = "script.py") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.fixture
def start(script):
    """Starts the small server, which behaves as told."""

    def started(how: str = "plain", **options) -> processes.Server:
        return processes.server(
            [PYTHON, script(SERVER, "small_server.py"), "{port}", how],
            key_variable="TEST_KEY",
            **{"ready_s": PATIENCE_S, **options},
        )

    return started


def get(url: str, headers: dict | None = None) -> int:
    try:
        return urllib.request.urlopen(
            urllib.request.Request(url, headers=headers or {}), timeout=5
        ).status
    except urllib.error.HTTPError as error:
        return error.code


def test_server_answers_to_its_key_and_is_gone_after(start, mark, capsys):
    with start() as server:
        assert get(server.url, server.headers) == 200
        assert get(server.url) == 401
        assert "small_server.py" in psutil.Process(server.pid).cmdline()[1]
        assert not any(
            server.api_key in word for process in marked(mark) for word in process.cmdline()
        )
        assert server.log_tail() == "its key is <api key>"
        assert len(marked(mark)) == 4, "supervisor, server, child, orphan"
    assert not marked(mark)
    assert processes.free_port(server.port) == server.port
    server.stop()
    shown = capsys.readouterr().out
    assert re.fullmatch(
        rf"Starting small_server.py on port {server.port} \.* ready after \d+ s\n", shown
    )
    assert server.api_key not in repr(server)


def test_keys_are_of_one_run(start):
    with start() as one, start() as other:
        assert one.api_key != other.api_key and one.port != other.port
        assert get(one.url, other.headers) == 401


def test_server_that_dies_shows_its_last_lines(start, capsys):
    with pytest.raises(processes.ServingError) as caught:
        start("dies")
    said = "small_server.py ended with exit code 1 before it was ready; its last lines:\n"
    assert str(caught.value) == said + "its key is <api key>\nmax_model_len is too long"
    assert capsys.readouterr().out.endswith("\n")


def test_server_that_never_gets_ready_has_a_time_limit(start, mark):
    with pytest.raises(
        processes.ServingError,
        match=r"was not ready within 1 s \(GET /health: 503\); its last lines:",
    ):
        start("never", ready_s=1)
    assert not marked(mark)


def test_server_that_answers_nonsense_is_not_ready(script, mark):
    nonsense = """
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as server:
    while True:
        peer, _ = server.accept()
        peer.sendall(b"good day")
        peer.close()
"""
    with pytest.raises(
        processes.ServingError, match=r"was not ready within 1 s \(GET /v1/models: no answer\)"
    ):
        processes.server([PYTHON, script(nonsense), "{port}"], ready="/v1/models", ready_s=1)
    assert not marked(mark)


def test_server_open_to_other_machines_is_refused(start, mark):
    with pytest.raises(
        processes.ServingError, match=r"small_server.py listens on 0.0.0.0, not on 127.0.0.1 alone"
    ):
        start("wide")
    assert not marked(mark)


def test_port_in_use_is_one_sentence(start):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(processes.ServingError) as caught:
            start(port=port)
    assert (
        str(caught.value)
        == f"Port {port} cannot be used (Address already in use): name another, or 0."
    )


def test_unknown_program_is_named():
    with pytest.raises(processes.ServingError, match="no-such-program: No such file or directory"):
        processes.server(["no-such-program", "{port}"])


def test_exception_in_the_body_ends_the_server(start, mark):
    with pytest.raises(ZeroDivisionError) as caught, start():
        _ = 1 / 0
    assert not marked(mark)
    assert not hasattr(caught.value, "__notes__"), "the server is not to blame"


def test_server_that_dies_later_is_noted_on_the_error(start, mark):
    with pytest.raises(OSError) as caught, start() as server:
        get(server.url + "/crash")
    assert not marked(mark)
    (note,) = caught.value.__notes__
    assert note.splitlines() == [
        "small_server.py was ended by SIGKILL (out of memory?) meanwhile; its last lines:",
        "its key is <api key>",
        "a fault in the engine",
    ]


def test_killed_supervisor_takes_its_server_along(start, mark):
    with start() as server:
        command = psutil.Process(server.pid)
        server.supervisor.kill()
        wait_until(
            lambda: not command.is_running() or command.status() == psutil.STATUS_ZOMBIE,
            "the server has ended",
        )
        for process in marked(mark):  # what the server itself leaves has no supervisor any more
            process.kill()


@pytest.fixture
def owner(script):
    """A process that owns a server; gives it, the server's port, and its own fork's process id or
    -1.
    """
    owners = []

    def begin(how: str, forks: str = "does not fork"):
        words = [PYTHON, "-c", OWNER, script(SERVER, "small_server.py"), how, forks]
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        owners.append(process)
        port = int(process.stdout.readline().split()[1])
        if how == "never":  # it has started when all of its processes have
            wait_until(lambda: len(marked(os.environ["TEST_MARK"])) == 5, "the server waits")
            return process, port, -1
        return (
            process,
            port,
            int(
                re.search(r"fork (-?\d+)", process.stdout.readline() + process.stdout.readline())[1]
            ),
        )

    yield begin
    for process in owners:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("how", ["plain", "never"])
def test_interrupted_owner_leaves_nothing(owner, mark, how):
    process, port, _ = owner(how)
    process.send_signal(signal.SIGINT)
    process.wait(PATIENCE_S)
    assert not marked(mark), "all had ended before the owner did"
    assert processes.free_port(port) == port


@pytest.mark.parametrize("how", ["plain", "never", "stubborn"])
def test_killed_owner_leaves_nothing(owner, mark, how):
    process, port, _ = owner(how)
    process.kill()
    wait_until(lambda: not marked(mark), "no process is left")
    assert processes.free_port(port) == port


def test_killed_owner_whose_fork_holds_the_pipe(owner, mark):
    process, port, fork = owner("plain", "forks")
    process.kill()
    wait_until(lambda: [left.pid for left in marked(mark)] == [fork], "only the fork is left")
    assert processes.free_port(port) == port
    os.kill(fork, signal.SIGKILL)


def test_run_gives_lines_as_they_come(script, tmp_path):
    waiting = """
import os, sys, time
print("first")
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
print("last")
"""
    seen = tmp_path / "seen"
    lines = processes.run(
        [PYTHON, script(waiting), seen], timeout_s=PATIENCE_S, on_line=lambda line: seen.touch()
    )
    assert lines == ["first", "last"]


def test_run_prints_without_carriage_returns(capsys):
    processes.run([PYTHON, "-c", "print('10 %', end='\\r'); print('100 %')"], timeout_s=PATIENCE_S)
    assert capsys.readouterr().out == "10 %\n100 %\n"


def test_run_passes_its_environment_and_no_shared_folder():
    show = "import os, tempfile; print(os.environ['COLOUR'], os.environ['VLLM_HOST_IP'], tempfile.gettempdir())"
    (line,) = processes.run([PYTHON, "-c", show], timeout_s=PATIENCE_S, env={"COLOUR": "blue"})
    colour, host, folder = line.split()
    assert (colour, host) == ("blue", "127.0.0.1")
    assert not Path(folder).exists()


def test_failed_run_shows_its_last_lines(script):
    failing = script("print('loading')\nraise SystemExit('2 does not divide 9 heads')", "heads.py")
    with pytest.raises(processes.ServingError) as caught:
        processes.run([PYTHON, failing], timeout_s=PATIENCE_S)
    said = "heads.py ended with exit code 1; its last lines:\n"
    assert str(caught.value) == said + "loading\n2 does not divide 9 heads"


def test_first_command_to_fail_ends_the_others(script, mark):
    patient = [PYTHON, script("import time; time.sleep(99)", "patient.py")]
    with pytest.raises(processes.ServingError, match="was ended by SIGKILL"):
        processes.run(
            patient, [PYTHON, "-c", "import os; os.kill(os.getpid(), 9)"], timeout_s=PATIENCE_S
        )
    assert not marked(mark)


def test_all_commands_are_waited_for():
    say = "import time; time.sleep({0} / 2); print({0})"
    lines = processes.run(*([PYTHON, "-c", say.format(n)] for n in (0, 1)), timeout_s=PATIENCE_S)
    assert lines == ["0", "1"]


def test_hanging_run_is_ended_at_its_deadline(script, mark):
    hanging = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], start_new_session=True)
print("waiting for a peer")
time.sleep(99)
"""
    with pytest.raises(processes.ServingError) as caught:
        processes.run([PYTHON, script(hanging, "hanging.py")], timeout_s=1)
    assert (
        str(caught.value)
        == "hanging.py was not done within 1 s; its last lines:\nwaiting for a peer"
    )
    assert not marked(mark)


def test_daemon_left_by_a_run_is_ended(script, mark):
    leaving = (
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'], "
        "start_new_session=True)"
    )
    assert processes.run([PYTHON, script(leaving)], timeout_s=PATIENCE_S) == []
    assert not marked(mark)


def test_interrupted_run_leaves_nothing(script, mark):
    def interrupt(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        processes.run(
            [PYTHON, "-c", "import time; print('on'); time.sleep(99)"],
            timeout_s=PATIENCE_S,
            on_line=interrupt,
        )
    wait_until(lambda: not marked(mark), "no process is left")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        (
            "raises",
            "rank 1 ended with exit code 1; its last lines:\n(.*\n)*ValueError: this shard is broken",
        ),
        (
            "is killed",
            r"rank 1 was ended by SIGKILL \(out of memory\?\); its last lines:\nsum \[2.0, 2.0\]$",
        ),
    ],
    ids=["raises", "is killed"],
)
def test_rank_that_dies_ends_all_ranks(script, mark, what, said):
    shown = []
    torchrun = [
        PYTHON,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--tee",
        "3",
    ]
    with pytest.raises(processes.ServingError, match=said):
        processes.run(
            [*torchrun, script(RANK, "rank.py"), what],
            timeout_s=60,
            env={"OMP_NUM_THREADS": "1"},
            on_line=shown.append,
        )
    assert not marked(mark)
    assert {"[rank0]: sum [2.0, 2.0]", "[rank1]: sum [2.0, 2.0]"} <= set(shown)


def test_first_error_is_shown_when_the_last_lines_leave_it_out(script):
    chatty = """
print("(Worker pid=7) ERROR [executor.py:1] ValueError: 6.58 GiB of memory are less than the 900 GiB asked for")
for n in range(30):
    print("a line of a long traceback", n)
raise SystemExit("RuntimeError: See root cause above.")
"""
    with pytest.raises(processes.ServingError) as caught:
        processes.run([PYTHON, script(chatty)], timeout_s=PATIENCE_S)
    told = str(caught.value).splitlines()
    assert "900 GiB" in told[1] and told[2].endswith("11") and told[-1].startswith("RuntimeError")


def test_an_error_without_a_message_comes_with_its_line_of_code():
    mark = "(Worker pid=7) ERROR [executor.py:1] "
    code = [f"{mark}    assert buffer is not None", f"{mark}           ^^^^^^", mark]
    told = processes._tail([*code, f"{mark}AssertionError", *["a line"] * 30])
    assert told.splitlines()[0] == f"{mark}AssertionError: assert buffer is not None"


def test_rank_without_a_mark_is_shown_by_what_came_before_the_summary():
    summary = [
        "W1 torch/distributed/elastic/multiprocessing/api.py:1] Sending closing signal",
        "Root Cause (first):",
        "[0]:",
        "  rank      : 3 (local_rank: 1)",
        "  exitcode  : -15 (pid: 3) ",
    ]
    found = processes._failing_rank(["ValueError: no such shard", *summary])
    assert found == ("rank 3", "was ended by SIGTERM", ["ValueError: no such shard"])
