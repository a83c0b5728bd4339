"""Are weaknesses known of what is pinned? pip-audit's answer, in an environment of its own.

``make audit``. A package that its data do not name is said to be unaudited, never to be sound.
"""

import json
import subprocess
import sys
import venv

from helpers import results

FOLDER = results.ROOT / "build" / "audit"


def report(constraints: str) -> list[dict]:
    """One entry a pinned package: its name and its `vulns`, or the `skip_reason`; [] without any
    answer.
    """
    options = ["--no-deps", "--disable-pip", "--format", "json", "--requirement", constraints]
    done = subprocess.run([FOLDER / "bin" / "pip-audit", *options], capture_output=True, text=True)
    return json.loads(done.stdout)["dependencies"] if done.stdout.strip() else []


def sentence(packages: list[dict]) -> str:
    """What the report of these packages says."""
    audited = [package for package in packages if "vulns" in package]
    if not audited:
        return "pip-audit could not reach its data: nothing was audited."
    weak = [package for package in audited if package["vulns"]]
    lines = [f"{len(audited)} of {len(packages)} packages audited, weaknesses known of {len(weak)}"]
    for package in weak:
        names = ", ".join(weakness["id"] for weakness in package["vulns"])
        lines.append(f"{package['name']} {package['version']}: {names}")
    return "\n".join(lines)


def main() -> None:
    if not (FOLDER / "bin" / "pip-audit").exists():
        venv.create(FOLDER, with_pip=True, clear=True)
        command = [FOLDER / "bin" / "python", "-m", "pip", "install", "--quiet", "pip-audit"]
        if subprocess.run(command).returncode:
            sys.exit("pip-audit could not be installed: nothing was audited.")
    for path in sorted(results.ROOT.glob("constraints-*.txt")):
        print(f"{path.name}: {sentence(report(str(path)))}")


if __name__ == "__main__":
    main()
