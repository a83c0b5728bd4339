"""A notebook alone in an empty folder, in an environment that does not know the project.

Real all the way: a virtual environment of its own, whose kernel runs the cells; git clones; pip
installs. Only heavy packages are borrowed from the environment of the tests, by links, and pip finds
the one that is left out in a folder instead of an index.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import nbformat
import papermill
import pytest
from copies import ROOT, copy_of_the_working_tree, git
from papermill.exceptions import PapermillExecutionError

from helpers.series import bootstrap

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
LEFT_OUT = "tabulate"  # of what the lessons need: this one pip has to install
HOW_TO_GO_ON = "Clone the project and open this notebook there, or set SEVEN_SOURCE."
BESIDE = "helpers: in seven-llm-speedups, beside this notebook"
PROBE = """import json, subprocess, sys
import helpers
child = [sys.executable, "-c", "import helpers; print(helpers.__file__)"]
there = subprocess.run(child, capture_output=True, text=True).stdout.strip()
print(json.dumps({"here": helpers.__file__, "there": there}))"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A checkout with all that is uncommitted committed."""
    return copy_of_the_working_tree(tmp_path_factory.mktemp("project") / "project")


@pytest.fixture(scope="module")
def url(project) -> str:
    """Its address: a bare clone on this disk."""
    bare = project.parent / "published.git"
    git(project, "clone", "--quiet", "--bare", str(project), str(bare))
    return bare.as_uri()


@pytest.fixture(scope="module")
def wheel(project) -> Path:
    folder = project.parent / "built"
    unneeded = shutil.ignore_patterns(".git", "figures")
    shutil.copytree(project, folder / "source", symlinks=True, ignore=unneeded)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(folder / "source")], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def borrowed(tmp_path_factory) -> Path:
    """Links to all packages of this environment, but the project's own and the one left out."""
    folder = tmp_path_factory.mktemp("borrowed")
    own = re.compile(rf"helpers|seven_llm_speedups|__editable__|{LEFT_OUT}|.*\.pth$")
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for package in Path(place).iterdir():
            if not own.match(package.name):
                (folder / package.name).symlink_to(package)
    return folder


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """What pip finds: the package left out, packed into a wheel again, and from an index what this
    environment has not (torchao, on a CPU machine).
    """
    folder, package = tmp_path_factory.mktemp("packages"), metadata.distribution(LEFT_OUT)
    name = f"{LEFT_OUT}-{package.version}-py3-none-any.whl"
    with zipfile.ZipFile(folder / name, "w") as packed:
        for file in package.files:
            if not str(file).startswith("..") and file.suffix != ".pyc":
                packed.write(package.locate_file(file), str(file))
    if absent := bootstrap.missing(bootstrap.requirements_of(ROOT)):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        pinned = ["--constraint", ROOT / "constraints-colab.txt"]
        subprocess.run([*pip, "--only-binary=:all:", *pinned, *absent], check=True)
    return folder


class Environment:
    """An empty virtual environment with borrowed packages, and a Jupyter kernel in it."""

    def __init__(self, folder: Path, borrowed: Path, packages: Path):
        self.folder, self.packages = folder, packages
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        asked = [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        self.site = Path(subprocess.check_output(asked, text=True).strip())
        (self.site / "borrowed.pth").write_text(f"{borrowed}\n")

    def install(self, *words: str) -> None:
        pip = [self.python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*pip, "--no-build-isolation", *words], check=True)

    def files(self) -> set[str]:
        """Everything installed in it, compiled files left out."""
        found = {str(path.relative_to(self.site)) for path in self.site.rglob("*")}
        return {name for name in found if "__pycache__" not in name}

    def run(self, notebook: Path, parameters: dict | None = None, **variables: str):
        """Run a notebook in its own folder; returns the executed one."""
        # an index is never asked: what pip cannot find in the folder, it does not get
        known = {"PYTHONPATH": "", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.packages)}
        spec = {
            "argv": [str(self.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "alone",
            "language": "python",
            "env": {"SEVEN_SOURCE": "", **known, **variables},
        }
        place = self.folder / "share" / "jupyter" / "kernels" / "alone"
        place.mkdir(parents=True, exist_ok=True)
        (place / "kernel.json").write_text(json.dumps(spec))
        out = self.folder / "executed.ipynb"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JUPYTER_PATH", str(self.folder / "share" / "jupyter"))
            papermill.execute_notebook(
                str(notebook),
                str(out),
                parameters or {},
                kernel_name="alone",
                cwd=str(notebook.parent),
                progress_bar=False,
                start_timeout=600,  # on a busy machine
            )
        return nbformat.read(out, 4)

    def refuses(self, notebook: Path, **variables: str) -> str:
        """Run a notebook that must fail: the error's text."""
        with pytest.raises(PapermillExecutionError) as failed:
            self.run(notebook, **variables)
        assert failed.value.ename == "RuntimeError"
        return failed.value.evalue


@pytest.fixture
def new_environment(tmp_path, borrowed, packages):
    return Environment(tmp_path / "environment", borrowed, packages)


@pytest.fixture(scope="module")
def environment(tmp_path_factory, borrowed, packages):
    return Environment(tmp_path_factory.mktemp("environment"), borrowed, packages)


def alone(folder: Path, name: str = NOTEBOOKS[0], *, lesson: bool = False, before: str = ""):
    """Copy a notebook into an empty folder: its bootstrap cell, with `lesson` all cells before the
    first heading, and at the end one that looks where `helpers` is.
    """
    folder.mkdir(exist_ok=True)
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            break
        if lesson or "bootstrap" in cell.metadata.get("tags", []):
            cells.append(cell)
    first = [nbformat.v4.new_code_cell(before)] if before else []
    notebook.cells = [*first, *cells, nbformat.v4.new_code_cell(PROBE)]
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def printed(notebook, tag: str) -> str:
    """What the cells of a tag printed."""
    cells = [c for c in notebook.cells if tag in c.metadata.get("tags", [])]
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


def imported(notebook) -> set[Path]:
    """The folders from which the kernel, and a process that it starts, take `helpers`."""
    found = json.loads(notebook.cells[-1].outputs[-1].text)
    return {Path(found["here"]).parent, Path(found["there"]).parent}


def test_the_wheel_is_whole(project, wheel):
    with zipfile.ZipFile(wheel) as packed:
        inside = {name: packed.read(name) for name in packed.namelist()}
    tracked = git(project, "ls-files", "helpers").splitlines()
    assert {name for name in inside if ".dist-info/" not in name} == set(tracked)
    for name in tracked:
        assert inside[name] == (project / name).read_bytes(), name


def test_the_environment_does_not_know_the_project(tmp_path, environment):
    code = "import importlib.util, torch; print(importlib.util.find_spec('helpers'))"
    found = subprocess.check_output([environment.python, "-c", code], cwd=tmp_path, text=True)
    assert found == "None\n"
    listed = subprocess.check_output([environment.python, "-m", "pip", "list"], text=True)
    assert "torch " in listed
    assert "seven" not in listed and LEFT_OUT not in listed


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_starts_alone_from_a_git_address(name, tmp_path, environment, url, project):
    commit = git(project, "rev-parse", "HEAD")
    notebook = alone(tmp_path / "folder", name, lesson=True)
    done = environment.run(notebook, SEVEN_SOURCE=f"{url}@{commit}")
    assert imported(done) == {notebook.parent / "seven-llm-speedups" / "helpers"}
    text = printed(done, "bootstrap")
    assert text.startswith(BESIDE) and str(notebook.parent) not in text


@pytest.mark.parametrize("name", ["03_quantization", "06_continuous_batching"])
def test_it_starts_alone_from_a_wheel(name, tmp_path, environment, wheel):
    notebook = alone(tmp_path / "folder", name, lesson=True)
    done = environment.run(notebook, SEVEN_SOURCE=str(wheel))
    assert imported(done) == {notebook.parent / "seven-llm-speedups" / "helpers"}
    assert printed(done, "bootstrap").startswith(BESIDE)


def test_a_lesson_runs_to_its_end_and_leaves_its_results_beside_it(tmp_path, environment, url):
    folder = tmp_path / "folder"
    folder.mkdir()
    notebook = Path(shutil.copy(ROOT / "notebooks" / f"{NOTEBOOKS[0]}.ipynb", folder))
    small = nbformat.read(notebook, 4).metadata["smoke"]
    environment.run(alone(tmp_path / "before"), SEVEN_SOURCE=url)  # pip installs what is missing
    installed = environment.files()
    environment.run(notebook, small, SEVEN_SOURCE=url)
    clone = folder / "seven-llm-speedups"
    assert {path.name for path in folder.iterdir()} == {notebook.name, clone.name, "runs"}
    assert len(list((folder / "runs").rglob(f"{NOTEBOOKS[0]}.json"))) == 1
    assert git(clone, "status", "--porcelain") == "" and not (clone / "runs").exists()
    assert environment.files() == installed


def test_an_installed_wheel_needs_no_source(tmp_path, new_environment, wheel):
    new_environment.install(str(wheel))
    installed = new_environment.files()
    done = new_environment.run(alone(tmp_path / "folder"))
    assert imported(done) == {new_environment.site / "helpers"}
    assert printed(done, "bootstrap") == "helpers: installed in this environment\n"
    assert new_environment.files() == installed


@pytest.mark.parametrize(("card", "status"), [("L4", 0), ("RTX 3060", 1), ("A100", 2)])
def test_an_installed_wheel_brings_the_planner_s_command(
    card, status, tmp_path, new_environment, wheel
):
    new_environment.install(str(wheel))
    command = [new_environment.folder / "bin" / "seven-plan", "falcon-7b", "--gpu", card]
    offline = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True)
    said = {0: "fits one l4", 1: "does not fit one rtx-3060", 2: "Which A100?"}
    assert done.returncode == status, done.stderr
    assert said[status] in (done.stderr if status == 2 else done.stdout)
    assert "Traceback" not in done.stderr


def test_an_editable_install_needs_no_source(tmp_path, new_environment, project):
    new_environment.install("--editable", str(project))
    done = new_environment.run(alone(tmp_path / "folder"))
    assert imported(done) == {project / "helpers"}
    assert printed(done, "bootstrap") == "helpers: installed in this environment\n"


def test_in_a_checkout_it_takes_that_and_installs_nothing(new_environment, project):
    folder = project / "notebooks" / "of_a_reader"
    done = new_environment.run(alone(folder), SEVEN_SOURCE="/nowhere")
    shutil.rmtree(folder)
    assert imported(done) == {project / "helpers"}
    text = "helpers: of the checkout that this notebook is in\n"
    assert printed(done, "bootstrap") == text
    assert new_environment.files() == {"borrowed.pth"}


def test_a_folder_is_taken_as_it_is_and_what_is_missing_is_installed(
    tmp_path, new_environment, project, packages
):
    done = new_environment.run(alone(tmp_path / "folder"), SEVEN_SOURCE=str(project))
    assert imported(done) == {project / "helpers"}
    first, second = printed(done, "bootstrap").splitlines()
    assert first == "helpers: in the folder that SEVEN_SOURCE names"
    assert second.startswith("installing ") and LEFT_OUT in second.split()
    installed = {path.name.split("-")[0] for path in new_environment.site.glob("*.dist-info")}
    assert installed == {wheel.name.split("-")[0] for wheel in packages.iterdir()}


def test_what_pip_cannot_find_is_said_in_one_sentence(tmp_path, new_environment, project):
    source = {"SEVEN_SOURCE": str(project), "PIP_FIND_LINKS": str(tmp_path)}
    error = new_environment.refuses(alone(tmp_path / "folder"), **source)
    assert error.startswith("pip could not install what is missing (ERROR: ")
    assert LEFT_OUT in error and error.endswith("see to that, then run this cell again.")


def test_a_replaced_package_in_use_asks_for_a_restart(tmp_path, new_environment, project):
    """The environment has an old package of the name, and the lesson has imported it."""
    source = tmp_path / "project"
    unneeded = shutil.ignore_patterns(".git", "figures")
    shutil.copytree(project, source, symlinks=True, ignore=unneeded)
    described = (source / "pyproject.toml").read_text()
    assert f'"{LEFT_OUT}",' in described
    described = described.replace(f'"{LEFT_OUT}",', f'"{LEFT_OUT}>=0.9",')
    (source / "pyproject.toml").write_text(described)
    (new_environment.site / f"{LEFT_OUT}.py").write_text("")
    info = new_environment.site / f"{LEFT_OUT}-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {LEFT_OUT}\nVersion: 0.0.1\n")
    (info / "RECORD").write_text(f"{LEFT_OUT}.py,,\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n")
    (info / "INSTALLER").write_text("pip\n")
    before = f"import {LEFT_OUT}"
    done = new_environment.run(alone(tmp_path / "folder", before=before), SEVEN_SOURCE=str(source))
    said = f"{LEFT_OUT} was in use and has been replaced."
    assert f"Restart the kernel and begin at the top: {said}" in printed(done, "bootstrap")
    done = new_environment.run(alone(tmp_path / "folder", before=before), SEVEN_SOURCE=str(source))
    assert "installing" not in printed(done, "bootstrap")


@pytest.mark.parametrize("before", ["", "import helpers"], ids=["on the path", "imported"])
def test_a_stranger_s_file_beside_the_notebook_is_passed_over(before, tmp_path, environment, url):
    notebook = alone(tmp_path / "folder", before=before)
    (notebook.parent / "helpers.py").write_text("x = 1\n")
    done = environment.run(notebook, SEVEN_SOURCE=url)
    assert imported(done) == {notebook.parent / "seven-llm-speedups" / "helpers"}
    said = f"{BESIDE}; passed over: helpers.py beside this notebook\n"
    assert printed(done, "bootstrap").startswith(said)


def test_a_stranger_s_file_does_not_hide_an_installed_wheel(tmp_path, new_environment, wheel):
    new_environment.install(str(wheel))
    notebook = alone(tmp_path / "folder")
    (notebook.parent / "helpers.py").write_text("x = 1\n")
    done = new_environment.run(notebook)
    assert imported(done) == {new_environment.site / "helpers"}
    assert "passed over: helpers.py beside this notebook" in printed(done, "bootstrap")


def test_another_distribution_s_package_is_passed_over(tmp_path, new_environment, url):
    package = new_environment.site / "helpers"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('a stranger')\n")
    notebook = alone(tmp_path / "folder")
    done = new_environment.run(notebook, SEVEN_SOURCE=url)
    assert imported(done) == {notebook.parent / "seven-llm-speedups" / "helpers"}
    said = f"{BESIDE}; passed over: another package helpers of this environment"
    assert printed(done, "bootstrap").startswith(said)


def test_unpublished_and_without_a_source_it_says_how_to_go_on(tmp_path, environment):
    assert environment.refuses(alone(tmp_path / "folder")) == HOW_TO_GO_ON
    assert os.listdir(tmp_path / "folder") == [f"{NOTEBOOKS[0]}.ipynb"]


@pytest.mark.parametrize("source", ["file:///nowhere.git", "/nowhere/seven.whl", "/nowhere"])
def test_a_source_that_is_not_there_says_how_to_go_on(source, tmp_path, environment):
    assert environment.refuses(alone(tmp_path / "folder"), SEVEN_SOURCE=source) == HOW_TO_GO_ON


def test_published_it_clones_the_pinned_commit_and_keeps_to_it(tmp_path, environment, url, project):
    pinned = git(project, "rev-parse", "HEAD")
    git(project, "commit", "--quiet", "--allow-empty", "--message", "later")
    git(project, "push", "--quiet", url, "HEAD")
    later = git(project, "rev-parse", "HEAD")
    notebook = alone(tmp_path / "folder")
    clone = notebook.parent / "seven-llm-speedups"

    unpublished = notebook.read_text()
    notebook.write_text(
        unpublished.replace('ADDRESS = \\"\\"', f'ADDRESS = \\"{url}@{"0" * 40}\\"')
    )
    assert environment.refuses(notebook) == HOW_TO_GO_ON  # no such commit: nothing of it is run
    notebook.write_text(unpublished.replace('ADDRESS = \\"\\"', f'ADDRESS = \\"{url}@{pinned}\\"'))
    for _ in range(2):  # cloned, then found beside the notebook
        done = environment.run(notebook)
        assert imported(done) == {clone / "helpers"}
        assert git(clone, "rev-parse", "HEAD") == pinned

    error = environment.refuses(notebook, SEVEN_SOURCE=f"{url}@{later}")
    assert error == (
        "The folder seven-llm-speedups beside this notebook is of another version than "
        f"published.git@{later}: move it away and run this cell again."
    )
    assert git(clone, "rev-parse", "HEAD") == pinned


def test_a_clone_is_not_taken_for_a_wheel(tmp_path, environment, url, wheel):
    notebook = alone(tmp_path / "folder")
    environment.run(notebook, SEVEN_SOURCE=url)
    error = environment.refuses(notebook, SEVEN_SOURCE=str(wheel))
    assert "is of another version" in error and wheel.name in error
