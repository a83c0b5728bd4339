"""vLLM's own load generator, one run after another, for lesson 06: `python load_06.py JOB.json`.

The API key, if any, comes from OPENAI_API_KEY. What each run gave is left in `NAME.json` in the
job's folder.
"""

import json
import sys
from pathlib import Path

from vllm.benchmarks import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser


def words(job: dict, run: dict) -> list[str]:
    """The generator's command line; a rate of infinity sends all requests at once."""
    options = {
        "backend": "openai",
        "base-url": job["url"],
        "endpoint": "/v1/completions",
        "model": job["model"],
        "tokenizer": job["tokenizer"],
        "dataset-name": "custom",
        "dataset-path": job["requests"],
        "custom-output-len": -1,
        "num-prompts": run["count"],
        "request-rate": run["rate"],
        "temperature": 0,
        "seed": run["seed"],
        "ready-check-timeout-sec": 0,
        "result-dir": job["folder"],
        "result-filename": f"{run['name']}.json",
    }
    flags = (
        "ignore-eos",
        "skip-chat-template",
        "disable-shuffle",
        "disable-tqdm",
        "save-result",
        "save-detailed",
    )
    return [f"--{name}={value}" for name, value in options.items()] + [
        f"--{name}" for name in flags
    ]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    for run in job["runs"]:
        serve.main(parser.parse_args(words(job, run)))


if __name__ == "__main__":
    main()
