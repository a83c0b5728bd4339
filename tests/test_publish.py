"""`make publish` writes the address into all of its places and nothing else, in a copy."""

import re
import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml
from copies import ROOT, copy_of_the_working_tree, git

import helpers.series.publish

URL = "https://github.com/nobody/a-copy"


@pytest.fixture
def copy(tmp_path):
    return copy_of_the_working_tree(tmp_path / "copy")


def publish(folder, url=URL):
    """Run it in the copy, as `make publish` does."""
    command = [sys.executable, "-m", "helpers.series.publish", url]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def bootstrap(notebook):
    cells = [c for c in notebook.cells if "bootstrap" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    return cells[0].source


def test_it_stands_in_every_place_and_nothing_else_has_changed(copy):
    commit = git(copy, "rev-parse", "HEAD")
    command = ["make", "--silent", "publish", f"URL={URL}", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    project = tomllib.loads((copy / "pyproject.toml").read_text())["project"]
    assert project["urls"] == {"Repository": URL}
    assert yaml.safe_load((copy / "CITATION.cff").read_text())["repository-code"] == URL

    notebooks = sorted((copy / "notebooks").rglob("*.ipynb"))
    links = []
    for path in notebooks:
        notebook = nbformat.read(path, 4)
        nbformat.validate(notebook)
        assert f'ADDRESS = "{URL}@{commit}"' in bootstrap(notebook)
        lines = notebook.cells[0].source.splitlines()
        assert lines[0].startswith("# ") and lines[1] == "" and lines[3] == ""
        target = re.search(r"\]\((https://colab[^)]*\.ipynb)\)$", lines[2])[1]
        branch = git(copy, "branch", "--show-current")
        assert target.endswith(f"/nobody/a-copy/blob/{branch}/{path.relative_to(copy)}")
        links.append(target)
    readme = (copy / "README.md").read_text().splitlines()
    assert re.findall(r"\((https://colab[^)]*\.ipynb)\)", readme[2]) == links

    changed = git(copy, "diff", "--name-only").splitlines()
    written = ["CITATION.cff", "README.md", "pyproject.toml"]
    assert changed == sorted(written + [str(path.relative_to(copy)) for path in notebooks])
    for line in git(copy, "diff", "--unified=0").splitlines():
        if line.startswith("-") and not line.startswith("---"):
            assert 'ADDRESS = \\"\\"' in line, line
        if line.startswith("+") and not line.startswith("+++"):
            assert URL in line or "nobody/a-copy/blob" in line or line in ("+", '+    "\\n",'), line


def test_a_second_time_changes_nothing(copy):
    assert publish(copy).returncode == 0
    first = git(copy, "diff")
    again = publish(copy)
    assert again.returncode == 0 and "already" in again.stdout
    assert git(copy, "diff") == first
    git(copy, "commit", "--quiet", "--all", "--message", "published")
    assert publish(copy).returncode == 0
    assert git(copy, "status", "--porcelain") == ""


def test_a_new_commit_and_a_new_address_take_the_old_one_s_place(copy):
    publish(copy)
    git(copy, "commit", "--quiet", "--all", "--message", "published")
    (copy / "helpers" / "more.py").write_text("")
    git(copy, "add", "--all")
    git(copy, "commit", "--quiet", "--message", "more")
    other, commit = "https://example.org/elsewhere/series", git(copy, "rev-parse", "HEAD")
    done = publish(copy, other)
    assert done.returncode == 0 and "Colab opens notebooks from GitHub only" in done.stdout
    notebooks = list((copy / "notebooks").rglob("*.ipynb"))
    places = [copy / "pyproject.toml", copy / "CITATION.cff", copy / "README.md", *notebooks]
    text = "".join(path.read_text() for path in places)
    assert URL not in text and "Open in Colab" not in text
    assert text.count(f"{other}@{commit}") == len(notebooks)


def test_a_dirty_checkout_is_refused_and_left_alone(copy):
    (copy / "stray.txt").write_text("mine")
    done = publish(copy)
    assert done.returncode == 2
    assert done.stderr == "stray.txt is changed or new: commit it first, then publish.\n"
    (copy / "stray.txt").unlink()
    with (copy / "README.md").open("a") as readme:
        readme.write("mine\n")
    assert publish(copy).returncode == 2
    assert git(copy, "status", "--porcelain") == " M README.md"


@pytest.mark.parametrize(
    "url",
    ["", "nobody/a-copy", "http://example.org/a/b", "/tmp/a", "https://me:token@example.org/a/b"],
)
def test_what_readers_cannot_clone_from_is_refused(copy, url):
    done = publish(copy, url)
    assert done.returncode == 2 and "is no address that readers can clone from" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert git(copy, "status", "--porcelain") == ""


def test_all_files_are_written_or_none(tmp_path, monkeypatch):
    monkeypatch.setattr(helpers.series.publish, "ROOT", tmp_path)
    (tmp_path / "first").write_text("as it was")
    with pytest.raises(FileNotFoundError):
        helpers.series.publish.write_all({"first": "new", "second": "new"})
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    assert (tmp_path / "first").read_text() == "as it was"


def test_unpublished_no_address_is_cloned_or_installed():
    """No address stands in the checkout until `make publish` has written it everywhere."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    for path in sorted((ROOT / "notebooks").rglob("*.ipynb")):
        source = bootstrap(nbformat.read(path, 4))
        address = re.search(r'^ADDRESS = "(.*?)"', source, re.M)[1]
        assert address.partition("@")[0] == urls.get("Repository", "")
        assert "pip" not in source
