"""models: the embedded model and texts, bad names in one sentence, a cache that two processes may
fill at once.
"""

import concurrent.futures
import json
import os
import pickle
import shutil
import subprocess
import sys
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import models, timing


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


# ---- what a checkpoint may bring along


def copy_of(folder: str, target) -> str:
    shutil.copytree(folder, target)
    return str(target)


def change(path, **values) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def by_argmax(net, ids: torch.Tensor, count: int) -> list[int]:
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, net(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, -count:].tolist()


@pytest.mark.parametrize(
    "shipped",
    [
        {"repetition_penalty": 1.6, "do_sample": True, "temperature": 0.7, "top_k": 20},
        {"num_beams": 3},
        {"min_new_tokens": 2, "eos_token_id": [0, 1]},
        {"no_repeat_ngram_size": 2, "suppress_tokens": [5, 6]},
        {"max_time": 0.0, "stop_strings": "a"},
    ],
)
def test_greedy_means_one_thing_whatever_a_checkpoint_ships(tiny_llama, tmp_path, shipped):
    folder = copy_of(tiny_llama, tmp_path / "model")
    change(tmp_path / "model" / "generation_config.json", **shipped)
    net = models.load(folder)
    ids = torch.tensor([[5, 60, 700, 5, 60]])
    assert timing.generate(net, ids, 12).ids == [by_argmax(net, ids, 12)]


def test_a_checkpoint_that_was_tuned_without_a_cache_gets_one(tiny_llama, tmp_path):
    folder = copy_of(tiny_llama, tmp_path / "model")
    change(tmp_path / "model" / "config.json", use_cache=False)
    change(tmp_path / "model" / "generation_config.json", use_cache=False)
    net = models.load(folder)
    lengths = []
    net.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    timing.generate(net, torch.tensor([[5, 60, 700]]), 4)
    assert lengths == [3, 1, 1, 1]


def test_an_eos_that_the_tokenizer_appends_is_dropped():
    class Appends:
        eos_token_id = 2

        def __call__(self, text, return_tensors=None):
            ids = [7, 8, 2]
            return types.SimpleNamespace(input_ids=torch.tensor([ids]) if return_tensors else ids)

    assert models.prompt_ids(Appends(), "a b").tolist() == [[7, 8]]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_renamed_weights_are_refused(tiny_llama, tmp_path, prefix):
    folder = copy_of(tiny_llama, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    save_file({prefix + name: value for name, value in weights.items()}, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks \d+ weights of the model, the first of them"
    ) as error:
        models.load(folder)
    assert "random" in str(error.value) and "\n" not in str(error.value)


def test_a_lost_head_is_refused_before_anything_is_loaded(tiny_llama, tmp_path):
    folder = copy_of(tiny_llama, tmp_path / "model")
    change(tmp_path / "model" / "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lacks 1 weights .*lm_head\.weight"):
        models.resolve(folder)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_a_damaged_file_of_weights_is_refused_in_one_sentence(tiny_llama, tmp_path, content):
    folder = copy_of(tiny_llama, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=r"MODEL=.*model' cannot be read: ") as refusal:
        models.resolve(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"model_type": 3}', '{"model_type": "llama", "vocab_size": "many"}']
)
def test_a_damaged_configuration_is_refused_in_one_sentence(tiny_llama, tmp_path, content):
    folder = copy_of(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"MODEL=.*model' cannot be read: ") as refusal:
        models.resolve(folder)
    assert "\n" not in str(refusal.value)


def test_a_name_longer_than_a_file_may_have_is_refused():
    with pytest.raises(ValueError, match="is neither a folder here nor a model"):
        models.resolve("a" * 300)


def test_a_gguf_file_is_refused_in_one_sentence(tmp_path):
    file = tmp_path / "model-q4.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"is no folder with a config\.json in it") as refusal:
        models.resolve(str(file))
    assert "\n" not in str(refusal.value)


def test_a_missing_layer_is_refused(tiny_llama, tmp_path):
    folder = copy_of(tiny_llama, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if "layers.1.mlp" not in name}
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 3 weights .*model\.layers\.1\.mlp"):
        models.load(folder)


def test_a_quantized_checkpoint_is_refused(tiny_llama, tmp_path):
    folder = copy_of(tiny_llama, tmp_path / "model")
    change(
        tmp_path / "model" / "config.json",
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
    )
    with pytest.raises(ValueError, match="is quantized already: name the original"):
        models.resolve(folder)


def test_an_adapter_is_refused(tmp_path):
    change(tmp_path / "adapter_config.json", peft_type="LORA")
    with pytest.raises(ValueError, match="is an adapter"):
        models.resolve(str(tmp_path))


def test_a_home_folder_and_spaces_are_understood(tiny_llama, tmp_path, monkeypatch):
    copy_of(tiny_llama, tmp_path / "my models é")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.resolve("~/my models é") == str(tmp_path / "my models é")
    assert models.identity("~/my models é") == ("my models é", None)


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_as_checkpoint_is_refused_and_never_opened(tiny_llama, tmp_path, name):
    folder = copy_of(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    victim = tmp_path / "victim"
    (tmp_path / "model" / name).write_bytes(pickle.dumps({"w": Evil(str(victim))}))
    with pytest.raises(ValueError, match=r"cannot be read: .*(safetensors|header)"):
        models.load(folder)
    assert not victim.exists()


def test_a_checkpoint_with_code_of_its_own_is_not_run(tiny_llama, tmp_path, capfd):
    folder = copy_of(tiny_llama, tmp_path / "model")
    victim = tmp_path / "victim"
    (tmp_path / "model" / "own.py").write_text(f"open({str(victim)!r}, 'w')\n")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change(tmp_path / "model" / "config.json", model_type="of-its-own", auto_map=own)
    with pytest.raises(ValueError, match=r"MODEL=.* cannot be read: .*custom code"):
        models.load(folder)
    assert not victim.exists() and "y/N" not in capfd.readouterr().out


def test_a_tokenizer_with_code_of_its_own_is_not_run(tiny_llama, tmp_path, capfd):
    folder = copy_of(tiny_llama, tmp_path / "model")
    victim = tmp_path / "victim"
    (tmp_path / "model" / "own.py").write_text(f"open({str(victim)!r}, 'w')\n")
    own = {"AutoTokenizer": ["own.Tokenizer", None]}
    settings = tmp_path / "model" / "tokenizer_config.json"
    change(settings, tokenizer_class="OwnTokenizer", auto_map=own)
    with pytest.raises(ValueError, match="custom code"):
        models.tokenizer(folder)
    assert not victim.exists() and "y/N" not in capfd.readouterr().out
