"""`python -m helpers.series.publish URL`: write the project's address wherever it stands, at once.

The places: pyproject.toml, CITATION.cff, the bootstrap cell and the "Open in Colab" badge of every
notebook, the badges of README. Standard library only: it runs without an environment.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ADDRESS = re.compile(r"(?:https|git)://[\w.-]+(?::\d+)?/[\w./~-]*\w")
PINNED = re.compile(r'^ADDRESS = "(.*?)"', re.M)
COLAB = "https://colab.research.google.com"
BADGE = "[![Open in Colab]"


def git(*words: str) -> str:
    """What a git command in the checkout prints; CalledProcessError if it fails."""
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def places(commit: str) -> list[str]:
    """The tracked files in which the address stands."""
    tracked = git("ls-tree", "-r", "--name-only", commit).splitlines()
    notebooks = [path for path in tracked if re.fullmatch(r"notebooks/.*\.ipynb", path)]
    return ["CITATION.cff", "README.md", "pyproject.toml", *notebooks]


def badge(url: str, branch: str, notebook: str) -> str:
    """A link that opens a notebook in Colab; Colab reads from GitHub only, elsewhere it is ""."""
    repository = re.fullmatch(r"https://github\.com/([^/]+/[^/]+?)(?:\.git)?", url)
    if repository is None:
        return ""
    target = f"{COLAB}/github/{repository[1]}/blob/{branch}/{notebook}"
    return f"{BADGE}({COLAB}/assets/colab-badge.svg)]({target})"


def with_badges(text: str, badges: str) -> str:
    """Markdown with a line of badges under its title, in place of the line that was there."""
    text = re.sub(rf"\n\n{re.escape(BADGE)}.*", "", text)
    if not badges:
        return text
    title, _, rest = text.partition("\n")
    return f"{title}\n\n{badges}\n{rest}"


def with_address(path: str, text: str, pinned: str, badges: dict[str, str]) -> str:
    """A file's text with the address in it.

    Parameters
    ----------
    path : in the checkout; `text` is what stands there.
    pinned : URL@commit.
    badges : by notebook.
    """
    url = pinned.partition("@")[0]
    if path == "pyproject.toml":
        heading, old = r"(\[project\.urls\].*\n)", r"(?:Repository = .*\n)?"
        return re.sub(heading + old, rf'\1Repository = "{url}"\n', text)
    if path == "CITATION.cff":
        text = re.sub(r"^repository-code: .*\n", "", text, flags=re.M)
        return re.sub(r"^(license: .*\n)", rf"\1repository-code: {url}\n", text, flags=re.M)
    if path == "README.md":
        return with_badges(text, " ".join(filter(None, badges.values())))
    notebook = json.loads(text)
    first = notebook["cells"][0]
    first["source"] = with_badges("".join(first["source"]), badges[path]).splitlines(True)
    for cell in notebook["cells"]:
        if "bootstrap" in cell["metadata"].get("tags", []):
            source = PINNED.sub(f'ADDRESS = "{pinned}"', "".join(cell["source"]))
            cell["source"] = source.splitlines(True)
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"


def published(url: str, commit: str) -> dict[str, str]:
    """The texts of all places with the address and the commit in them, made from that commit's."""
    branch = git("branch", "--show-current").strip() or "main"
    paths = places(commit)
    badges = {path: badge(url, branch, path) for path in paths if path.endswith(".ipynb")}
    texts = {path: git("show", f"{commit}:{path}") for path in paths}
    return {
        path: with_address(path, text, f"{url}@{commit}", badges) for path, text in texts.items()
    }


def commit_to_pin(url: str) -> str:
    """The current commit; or, where that did nothing but publish, the one that it published."""
    head = git("rev-parse", "HEAD").strip()
    notebook = next(path for path in places(head) if path.endswith(".ipynb"))
    earlier = re.search(rf'ADDRESS = \\"{re.escape(url)}@(\w+)\\"', git("show", f"HEAD:{notebook}"))
    if earlier:
        texts = published(url, earlier[1])
        changed = git("diff", "--name-only", earlier[1], head).splitlines()
        if all(path in texts and git("show", f"HEAD:{path}") == texts[path] for path in changed):
            return earlier[1]
    return head


def refuse_other_changes(texts: dict[str, str]) -> None:
    """RuntimeError, in one sentence, for anything uncommitted that publishing has not written."""
    status = git("status", "--porcelain=v1", "-z", "--no-renames").split("\0")
    changed = [entry[3:] for entry in status if entry]
    for path in changed:
        if path not in texts or (ROOT / path).read_text(encoding="utf-8") != texts[path]:
            raise RuntimeError(f"{path} is changed or new: commit it first, then publish.")


def write_all(texts: dict[str, str]) -> list[str]:
    """Write the files that differ, all or none: first beside them, then renamed over them."""
    ready = {}
    try:
        for path, text in texts.items():
            place = ROOT / path
            if place.read_text(encoding="utf-8") == text:
                continue
            descriptor, name = tempfile.mkstemp(dir=place.parent, prefix=".", suffix=".part")
            ready[path] = name
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, place.stat().st_mode)
        for path, name in ready.items():
            os.replace(name, ROOT / path)
    finally:
        for name in ready.values():
            Path(name).unlink(missing_ok=True)
    return list(ready)


def main(arguments: list[str]) -> int:
    """Publish at the address given; returns the exit status, 2 where something is refused."""
    url = arguments[0].rstrip("/") if len(arguments) == 1 else ""
    try:
        if not ADDRESS.fullmatch(url):
            raise RuntimeError(
                f"{url!r} is no address that readers can clone from: "
                "make publish URL=https://HOST/OWNER/NAME (no user, no token)."
            )
        commit = commit_to_pin(url)
        texts = published(url, commit)
        refuse_other_changes(texts)
        written = write_all(texts)
    except (RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(error.stderr.strip(), file=sys.stderr)
        return 2
    print(f"{url}@{commit}", *(written or ["stands everywhere already"]), sep="\n  ")
    print("Commit this, and push it and the commit above to that address.")
    if not badge(url, "main", ""):
        print("No Colab badges: Colab opens notebooks from GitHub only.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
