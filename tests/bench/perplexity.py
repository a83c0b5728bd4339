"""`make bench`, fourth part: is the perplexity right? The same windows by lm-evaluation-harness.

The harness is installed into a folder of its own (`build/lm-eval`), on top of this environment's
packages: its other requirements never come into ours. It is given the windows as token ids, so that
both score the same predictions; model, arithmetic of the scores and batches are its own.
"""

import json
import math
import subprocess
import sys
import sysconfig
import venv

import torch
from rich.console import Console

from helpers import models, quality, results

HARNESS = "lm-eval==0.4.13"
FOLDER = results.ROOT / "build" / "lm-eval"
SEQ_LEN, TOKENS = 512, 4096
AIM = 1e-4  # of the perplexity
CHILD = """
import json, os, sys
import torch
from lm_eval.models.huggingface import HFLM
path, windows = json.load(sys.stdin)
lm = HFLM(pretrained=path, dtype="float32", device="cpu", batch_size=4, backend="causal")
asked = [(("", ""), window[:1], window[1:]) for window in windows]
scores = [score for score, _ in lm._loglikelihood_tokens(asked, disable_tqdm=True)]
with open(sys.argv[1], "w") as file:
    json.dump(scores, file)
"""


def environment() -> str:
    """The Python of an environment with the harness in it, made on the first call."""
    python = FOLDER / "bin" / "python"
    if not (FOLDER / "ready").exists():
        venv.create(FOLDER, with_pip=True, clear=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        borrowed = FOLDER / "lib" / version / "site-packages" / "borrowed.pth"
        borrowed.write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", HARNESS], check=True)
        (FOLDER / "ready").touch()
    return str(python)


def main() -> int:
    python = environment()
    path = models.resolve()
    text = models.text("evaluation").content
    windows = quality.windows(models.tokenizer(), text, SEQ_LEN, TOKENS)
    forward = quality.Forward(models.load(dtype=torch.float32))
    ours = quality.compare({"fp32": forward}, "fp32", windows)["fp32"]
    answer = FOLDER / "scores.json"
    asked = json.dumps([path, windows.tolist()])
    command = [python, "-c", CHILD, str(answer)]
    subprocess.run(command, input=asked, text=True, check=True, stdout=subprocess.DEVNULL)
    theirs = math.exp(-sum(json.loads(answer.read_text())) / windows[:, 1:].numel())
    apart = ours.perplexity / theirs - 1
    met = abs(apart) <= AIM
    Console().print(
        f"perplexity of {windows[:, 1:].numel()} tokens: {ours.perplexity:.6f} here, {theirs:.6f} "
        f"by {HARNESS}: {apart:+.6%} apart (aim: within {AIM:.2%}, {'met' if met else 'missed'})"
    )
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
