"""models: the embedded model and texts, bad names in one sentence, a cache that two processes may
fill at once.
"""

import concurrent.futures
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from helpers import models


def test_the_default_model_speaks():
    net, tokenizer = models.load(), models.tokenizer()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)
    assert "Paris" in tokenizer.decode(out[0])
    assert sum(p.numel() for p in net.parameters()) == 134_515_008


def test_the_converted_weights_are_those_of_the_file():
    import gguf

    tensors = {t.name: t for t in gguf.GGUFReader(models.default_gguf()).tensors}
    up = tensors["blk.3.ffn_up.weight"]
    expected = torch.from_numpy(gguf.dequantize(up.data, up.tensor_type))
    with safe_open(f"{models.default_folder()}/model.safetensors", "pt") as kept:
        assert torch.equal(kept.get_tensor("model.layers.3.mlp.up_proj.weight"), expected)


CONVERT = """
import pathlib, sys
from helpers import models

def quick(gguf, folder):  # the real conversion takes half a minute and is tested on its result
    import time
    folder.mkdir()
    pathlib.Path(sys.argv[1]).open("a").write("made\\n")
    time.sleep(0.5)
    (folder / "model.safetensors").write_text("weights")

models._convert = quick
models.default_gguf = lambda: pathlib.Path("unused")
folder = models.default_folder()
assert (folder / "model.safetensors").read_text() == "weights"
"""


def fill(cache, log) -> int:
    return subprocess.run(
        [sys.executable, "-c", CONVERT, str(log)],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        check=False,
    ).returncode


def test_two_processes_convert_once_and_damage_is_mended(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda _: fill(cache, log), range(2))) == [0, 0]
    assert log.read_text() == "made\n"
    weights = next(cache.rglob("model.safetensors"))
    weights.write_text("wrong!!")
    assert (
        fill(cache, log) == 0
        and log.read_text() == "made\nmade\n"
        and weights.read_text() == "weights"
    )
    weights.unlink()
    assert fill(cache, log) == 0 and weights.read_text() == "weights"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_come_in_the_dtype_asked_for(tiny_llama, dtype):
    assert {p.dtype for p in models.load(tiny_llama, dtype).parameters()} == {dtype}


def test_a_weight_in_another_dtype_is_an_error(tiny_llama, monkeypatch):
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *a, **k: real(*a, **k | {"dtype": torch.float16}),
    )
    with pytest.raises(RuntimeError, match=r"asked for torch\.float32 weights"):
        models.load(tiny_llama)


def test_bad_models_get_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"is no folder with a config\.json in it"):
        models.resolve(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ValueError, match="neither a folder here nor a model that can be reached"
    ) as error:
        models.resolve("nobody/nothing-at-all")
    assert "\n" not in str(error.value)


def test_texts_are_disjoint_long_enough_and_named_by_hash():
    texts = {
        name: models.text(name)
        for name in ("training", "calibration", "evaluation", "out-of-domain")
    }
    paragraphs = {n: {p for p in t.content.split("\n\n") if len(p) > 200} for n, t in texts.items()}
    names = list(texts)
    assert all(
        not paragraphs[a] & paragraphs[b] for i, a in enumerate(names) for b in names[i + 1 :]
    )
    assert len({t.sha256 for t in texts.values()}) == 4
    for name in ("evaluation", "out-of-domain"):
        assert len(models.tokenizer()(texts[name].content).input_ids) > 8200
    with pytest.raises(ValueError, match="no text named 'poetry'"):
        models.text("poetry")


def test_the_manifest_lists_every_file():
    folder = models.default_folder()
    assert set(json.loads((folder / "manifest.json").read_text())) == {
        p.name for p in folder.iterdir()
    } - {"manifest.json"}
