"""checkpoints: shapes with random weights, made once; and what does not fit is said before it is
loaded.
"""

import concurrent.futures
import json

import nbformat
import papermill
import pytest
import torch
from transformers import AutoTokenizer, BitsAndBytesConfig

from helpers import memory, models, quality, results, timing
from helpers.series import checkpoints, planner, run

TINY = ("random:tiny-llama", "random:tiny-falcon")
ENLARGED = 6


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Every test makes its models in a folder of the session's."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    models._random_folder.cache_clear()
    yield folder
    models._random_folder.cache_clear()


@pytest.mark.parametrize("name", TINY)
def test_a_shape_is_an_ordinary_checkpoint(name):
    folder = models.resolve(name)
    net = models.load(name)
    assert sum(p.numel() for p in net.parameters()) < 2_000_000
    assert net.config.max_position_embeddings == 2048
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def fast(x): return 2 * x  # wörld 日本"
    ids = models.prompt_ids(tokenizer, text)
    assert tokenizer.decode(ids[0]) == text
    ids = tokenizer(models.text("evaluation").content, return_tensors="pt").input_ids[:, :40]
    assert len(tokenizer) <= net.config.vocab_size and ids.max() < net.config.vocab_size
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (net.config.bos_token_id, net.config.eos_token_id, net.config.pad_token_id)
    assert timing.generate(net, ids, 4).new_tokens == 4
    assert 0.1 < net(ids).logits.std() < 10
    assert models.identity(name) == models.identity(folder) == (name, "seed 0")
    assert results.model_folder(name).name == name.replace(":", "-")


@pytest.mark.parametrize("name", TINY)
def test_a_few_channels_are_above_the_threshold_of_llm_int8(name):
    net, over = models.load(name), {}

    def watch(module, inputs):
        rows = inputs[0].abs().flatten(0, -2)
        over[id(module)] = int((rows > 6.0).any(0).sum())

    layers = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
    for layer in layers:
        layer.register_forward_pre_hook(watch)
    net(torch.arange(100, 140)[None])
    assert sum(count >= ENLARGED for count in over.values()) >= len(layers) / 2


def test_weights_come_from_the_seed_and_in_shards(monkeypatch, tmp_path):
    whole = models.load("random:tiny-llama", torch.bfloat16)
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 700_000)
    text = models.text("calibration").content
    folder = checkpoints.random_folder("random:tiny-llama", tmp_path, text)
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) > 2 and all(path.stat().st_size < 800_000 for path in shards)
    again = models.load(str(folder), torch.bfloat16)
    assert all(map(torch.equal, whole.parameters(), again.parameters()))


def test_a_folder_s_own_configuration_is_taken(tmp_path):
    config = json.loads((checkpoints.CONFIGS / "tiny-llama.json").read_text())
    (tmp_path / "my shape").mkdir()
    path = tmp_path / "my shape" / "config.json"
    path.write_text(json.dumps(config | {"num_hidden_layers": 1}))
    name = f"random:{tmp_path / 'my shape'}"
    assert models.load(name).config.num_hidden_layers == 1
    assert models.identity(name) == ("random:my shape", "seed 0")


def test_two_at_once_make_one_folder_and_a_cut_file_is_made_again(tmp_path, capsys):
    text = models.text("calibration").content

    def make(_):
        return checkpoints.random_folder("random:tiny-llama", tmp_path, text)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        (folder,) = set(pool.map(make, range(4)))
    assert capsys.readouterr().out.count("Making random:tiny-llama once, 0.0 GB") == 1
    weights = next(folder.glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    make(0)
    assert "Making" in capsys.readouterr().out and weights.read_bytes() == content


def test_an_unknown_shape_gets_one_sentence_with_the_known_ones():
    with pytest.raises(ValueError, match=r"neither a known shape .*falcon-7b.* nor a folder") as e:
        models.resolve("random:nothing")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("room", ["disk", "memory"])
def test_what_there_is_no_room_for_is_not_made(room, monkeypatch, tmp_path):
    # whatever disk and memory the machine that tests has free
    free = {"disk": 10**12, "memory": 10**12} | {room: {"disk": 13, "memory": 3}[room] * 10**9}
    usage = checkpoints.shutil.disk_usage("/")._replace(free=free["disk"])
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(memory, "available_bytes", lambda: free["memory"])
    needed = {"disk": "13.8", "memory": "3.2"}[room]
    with pytest.raises(ValueError, match=f"falcon-7b' cannot be made: it needs {needed} GB of"):
        checkpoints.random_folder("random:falcon-7b", tmp_path, "a text")
    assert not list(tmp_path.rglob("*.safetensors"))


# ---- does it fit?


@pytest.mark.parametrize(
    "quantization",
    [
        None,
        BitsAndBytesConfig(load_in_8bit=True),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    ],
)
def test_what_is_asked_before_loading_is_what_loading_takes(quantization):
    options = {"quantization_config": quantization} if quantization else {}
    net = models.load("random:tiny-llama", torch.bfloat16, **options)
    technique = checkpoints._technique(torch.bfloat16, quantization)
    shape = planner.describe(models.resolve("random:tiny-llama"))
    predicted = planner.memory(shape, technique, length=1)["weight_bytes"]
    assert memory.weight_bytes(net) == pytest.approx(predicted, rel=0.02)


def test_a_variant_that_does_not_fit_is_oom_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 4_000_000)
    monkeypatch.setattr(checkpoints, "TO_RUN", 1e3)  # in GB, of which a tiny model has none
    with pytest.raises(MemoryError) as error:
        models.load("random:tiny-llama")
    assert timing.failure(error.value) == ("oom", "needs 5.8 GB, 0.0 GB are there")
    monkeypatch.setattr(checkpoints, "TO_RUN", 1.0)
    models.load("random:tiny-llama", torch.bfloat16)


def test_falcon_is_not_called_quantized_where_nothing_was():
    eight = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(NotImplementedError, match="no layer of FalconForCausalLM"):
        models.load("random:tiny-falcon", torch.bfloat16, quantization_config=eight)


def test_a_model_scored_on_demand_is_the_model():
    net = models.load("random:tiny-llama", torch.float16)
    ids = torch.arange(60).view(2, 30)
    forward, asked = checkpoints.OnDemand(lambda: net), quality.Forward(net)
    assert torch.equal(forward(ids), asked(ids)) and forward.scored_with == asked.scored_with


# ---- a lesson where float32 does not fit

SMALL = """
import gc
from transformers import PreTrainedModel

def left(device="cpu"):  # the memory of the machine that tests is as large as it is
    held = [net for net in gc.get_objects() if isinstance(net, PreTrainedModel)]
    return 4_000_000 - sum(memory.weight_bytes(net) for net in held if hasattr(net, "lm_head"))

memory.available_bytes = left
"""


@pytest.mark.notebook
@pytest.mark.parametrize(
    "name", [pytest.param("01_mixed_precision", marks=pytest.mark.slow), "02_bfloat16"]
)
def test_a_lesson_goes_on_where_float32_does_not_fit(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SEVEN_PROFILE", "smoke")
    models.resolve("random:tiny-llama")  # made before the memory is small
    notebook = nbformat.read(run.NOTEBOOKS / f"{name}.ipynb", 4)
    at = next(i for i, cell in enumerate(notebook.cells) if "plots.use_style()" in cell.source)
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(SMALL))
    nbformat.write(notebook, tmp_path / "small.ipynb")
    given = notebook.metadata["smoke"] | {"MODEL": "random:tiny-llama"}
    given |= {"NEW_TOKENS": 1, "EVAL_TOKENS": 1}
    given |= {"RESULTS_DIR": str(tmp_path / "results"), "FIGURES_DIR": str(tmp_path / "figures")}
    papermill.execute_notebook(
        str(tmp_path / "small.ipynb"),
        str(tmp_path / "out.ipynb"),
        given,
        cwd=str(run.NOTEBOOKS),
        progress_bar=False,
    )
    found = results.read(next((tmp_path / "results").rglob(f"{name}.json")))
    assert found.run.finished
    rows = {record.id: record for record in found.records}
    assert rows["fp32"].status == "oom" and rows["fp32"].reason.startswith("needs ")
    assert rows["fp16"].status == "ok" and rows["fp16"].baseline is None
    for record in found.records:
        assert record.baseline in (None, "fp16") or record.sweep
        assert record.perplexity is None
        if record.status == "ok":
            assert record.reasons["perplexity"] == "random weights"
    if name == "02_bfloat16":
        assert rows["bf16"].baseline == "fp16" and rows["bf16"].speedup > 0
