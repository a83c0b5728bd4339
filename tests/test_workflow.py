"""The workflows fit the project: what they name is there, and nothing in them is taken on trust.
(They run on GitHub alone; here they are read, and their own shell lines are run where that is
possible.)
"""

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from helpers import models
from helpers.series import run
from tests.bench import audit

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINNED = re.compile(r"uses: [\w-]+/[\w/-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+")


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


def steps(workflow: dict) -> list[dict]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def targets(text: str) -> set[str]:
    """What `make` is asked for in a text."""
    return set(re.findall(r"\bmake ([\w./-]+)", text))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_and_ends_what_is_superseded(path):
    workflow = read(path.stem)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90 and "permissions" not in job
    for step in steps(workflow):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_action_is_pinned_by_its_commit(path):
    lines = [line.strip() for line in path.read_text().splitlines() if "uses:" in line]
    assert lines
    for line in lines:
        assert PINNED.fullmatch(line.removeprefix("- ")), line


def test_one_action_is_one_commit_everywhere():
    used = {step["uses"] for path in WORKFLOWS for step in steps(read(path.stem)) if "uses" in step}
    names = [action.split("@")[0] for action in used]
    assert len(names) == len(set(names)), sorted(used)


def test_each_notebook_has_its_job(tmp_path):
    jobs = read("test")["jobs"]
    lister = jobs["list"]["steps"][-1]
    output = tmp_path / "output"
    environment = os.environ | {"GITHUB_OUTPUT": str(output)}
    subprocess.run(["bash", "-e", "-c", lister["run"]], cwd=ROOT, env=environment, check=True)
    name, _, value = output.read_text().partition("=")
    assert json.loads(value) == [path.name for path in run.notebooks()]

    assert jobs["list"]["outputs"] == {name: f"${{{{ steps.{lister['id']}.outputs.{name} }}}}"}
    matrix = jobs["notebook"]["strategy"]["matrix"]
    assert matrix == {"notebook": f"${{{{ fromJSON(needs.list.outputs.{name}) }}}}"}
    step = next(step for step in jobs["notebook"]["steps"] if "series.run" in step.get("run", ""))
    assert step["env"] == {"NOTEBOOK": "${{ matrix.notebook }}"}
    assert step["run"].endswith('--only "$NOTEBOOK" --profile smoke')
    for path in run.notebooks():
        assert run.notebooks([path.name]) == [path]


def test_the_quick_job_runs_on_two_pythons_that_the_project_takes():
    pythons = read("test")["jobs"]["quick"]["strategy"]["matrix"]["python"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = project["requires-python"].removeprefix(">=").split(",")[0]
    assert pythons == [lowest, f"3.{int(lowest.split('.')[1]) + 1}"]


def test_the_markers_that_are_left_out_are_there():
    """An unknown marker would leave out nothing, and the quick job would run for an hour."""
    pytest_options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
    registered = {row.split(":")[0] for row in pytest_options["ini_options"].get("markers", [])}
    commands = " ".join(step.get("run", "") for step in steps(read("test")))
    assert set(re.findall(r"not (\w+)", commands)) == {"slow", "notebook"} <= registered


def test_caches_lie_where_the_project_keeps_them_and_follow_the_constraints(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    caches, pips = [], []
    for path in WORKFLOWS:
        for step in steps(read(path.stem)):
            action = step.get("uses", "")
            if action.startswith("actions/cache@"):
                caches.append(step["with"])
            if action.startswith("actions/setup-python@") and "cache" in step["with"]:
                pips.append(step["with"])
    assert caches and pips
    for cache in caches:
        assert Path(cache["path"]).expanduser() == models.cache_folder()
        files = re.findall(r"'([^']+)'", cache["key"])
        assert files and all((ROOT / file).is_file() for file in files)
    for pip in pips:
        assert pip["cache"] == "pip" and list(ROOT.glob(pip["cache-dependency-path"]))


def test_the_weekly_job_of_newest_versions_says_so_and_has_no_pins(tmp_path):
    job = read("weekly")["jobs"]["newest"]
    assert job["env"] == {"SEVEN_NEWEST": "1"}
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands[1] == "make test"
    for path in ROOT.glob("constraints-*.txt"):
        shutil.copy(path, tmp_path)
    copies = sorted(tmp_path.iterdir())
    assert copies and "==" in copies[0].read_text()
    subprocess.run(["bash", "-e", "-c", commands[0]], cwd=tmp_path, check=True)
    assert sorted(tmp_path.iterdir()) == copies
    for copy in copies:
        assert all(line.startswith("#") for line in copy.read_text().splitlines())


def test_the_tests_of_pins_know_the_job_of_newest_versions():
    others = [path for path in (ROOT / "tests").glob("*.py") if path != Path(__file__)]
    assert any("SEVEN_NEWEST" in path.read_text() for path in others)


def test_make_knows_every_target_that_is_named():
    commands = "\n".join(
        step.get("run", "") for path in WORKFLOWS for step in steps(read(path.stem))
    )
    assert targets(commands) == {".venv/ready-cpu", "lint", "test", "test-slow"}
    code = re.findall(r"`([^`]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    for target in sorted(targets(commands) | targets("\n".join(code))):
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_an_audit_says_what_it_did_not_see():
    unseen = {"name": "torch", "skip_reason": "not found"}
    weak = {"name": "pillow", "version": "1.0", "vulns": [{"id": "GHSA-1"}]}
    sound = {"name": "tqdm", "version": "4.0", "vulns": []}
    assert audit.sentence([unseen]) == audit.sentence([])
    assert "nothing was audited" in audit.sentence([unseen])
    said = audit.sentence([unseen, weak, sound])
    assert said.startswith("2 of 3 packages audited, weaknesses known of 1\npillow 1.0: GHSA-1")
