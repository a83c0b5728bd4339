"""Copies of the checkout for tests that need one of their own."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def git(folder: Path, *words: str) -> str:
    """What a git command in the folder prints; CalledProcessError if it fails."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    command = ["git", *identity, "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.rstrip()


def copy_of_the_working_tree(folder: Path) -> Path:
    """Clone the checkout into `folder`, with what is uncommitted in one more commit."""
    git(ROOT, "clone", "--quiet", str(ROOT), str(folder))
    git(folder, f"--git-dir={folder / '.git'}", f"--work-tree={ROOT}", "add", "--all", ".")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "the working tree")
    git(folder, "reset", "--quiet", "--hard")
    git(folder, "clean", "--quiet", "-d", "--force")
    return folder
