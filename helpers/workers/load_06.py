"""vLLM's own load generator at one rate of requests after another, for lesson 06: `python
load_06.py JOB.json`.

The API key, if any, comes from OPENAI_API_KEY. What each rate gave is left in `RATE.json` in the
job's folder.
"""

import json
import sys
from pathlib import Path

from vllm.benchmarks import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser


def words(job: dict, rate: float) -> list[str]:
    """The generator's command line at a rate of requests a second."""
    told = {
        "backend": "openai",
        "base-url": job["url"],
        "endpoint": "/v1/completions",
        "model": job["model"],
        "tokenizer": job["tokenizer"],
        "dataset-name": "custom",
        "dataset-path": job["requests"],
        "custom-output-len": -1,
        "num-prompts": job["count"],
        "request-rate": rate,
        "temperature": 0,
        "seed": job["seed"],
        "num-warmups": 1,
        "ready-check-timeout-sec": 0,
        "result-dir": job["folder"],
        "result-filename": f"{rate:g}.json",
    }
    flags = (
        "ignore-eos",
        "skip-chat-template",
        "disable-shuffle",
        "disable-tqdm",
        "save-result",
        "save-detailed",
    )
    return [f"--{name}={value}" for name, value in told.items()] + [f"--{name}" for name in flags]


def main() -> None:
    job, parser = json.loads(Path(sys.argv[1]).read_text()), FlexibleArgumentParser()
    serve.add_cli_args(parser)
    for rate in job["rates"]:
        serve.main(parser.parse_args(words(job, rate)))


if __name__ == "__main__":
    main()
