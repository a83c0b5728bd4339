"""choice and defaults: which model a lesson takes where none is named, and which numbers."""

import json

import huggingface_hub
import pytest

from helpers import memory
from helpers.series import choice, parameters, planner, run

FALCON, LLAMA = "tiiuae/falcon-7b", "huggyllama/llama-7b"
QWEN_3B, QWEN_1B = "Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-1.5B"
ALL = [FALCON, LLAMA, QWEN_3B, QWEN_1B]
LESSONS = {
    "01_mixed_precision": FALCON,
    "02_bfloat16": FALCON,
    "03_quantization": LLAMA,
    "04_adapters": LLAMA,
    "05_pruning": LLAMA,
    "06_continuous_batching": LLAMA,
}


@pytest.fixture
def card(monkeypatch):
    """card(name) -> None: from here on, that GPU is free."""

    def put(name: str) -> None:
        # what is free is asked of CUDA, and the machine that tests has no card
        free = planner.gpu(name).memory_bytes - planner.CONTEXT_BYTES
        monkeypatch.setattr(memory, "available_bytes", lambda device: free)

    return put


@pytest.fixture
def hub(monkeypatch):
    """hub(sizes) -> None: from here on, the hub has these models, of so many bytes each."""

    def put(sizes: dict) -> None:
        # a test neither needs a network nor downloads gigabytes
        monkeypatch.setattr(choice, "download_bytes", sizes.get)

    return put


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_cpu_and_a_named_model_are_left_as_they_are(lesson, capsys):
    assert choice.choose_model(lesson, "auto", "cpu") == "auto"
    assert choice.choose_model(lesson, "some/model", "cuda") == "some/model"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_lessons_name_their_models_largest_first(lesson):
    names = choice.candidates(lesson)
    needed = [choice._needed_bytes(name) for name in names]
    assert names[0] == LESSONS[lesson] and needed == sorted(needed, reverse=True)
    notebook = json.loads((run.NOTEBOOKS / f"{lesson}.ipynb").read_text())
    code = "".join("".join(cell["source"]) for cell in notebook["cells"])
    trains = ", trains=True" if lesson in ("04_adapters", "05_pruning") else ""
    line = f'MODEL = choose_model("{lesson}", MODEL, device{trains})\n'
    assert code.index("device = machine.pick_device") < code.index(line)
    assert code.index(line) < code.index("results.open(")


@pytest.mark.parametrize(
    ("name", "lesson", "trains", "expected"),
    [
        ("t4", "01_mixed_precision", False, QWEN_3B),
        ("rtx-4090", "02_bfloat16", False, QWEN_3B),
        ("rtx-a6000", "01_mixed_precision", False, FALCON),
        ("h100", "03_quantization", False, LLAMA),
        ("t4", "04_adapters", True, QWEN_1B),
        ("rtx-4090", "04_adapters", True, QWEN_3B),
        ("rtx-a6000", "05_pruning", True, LLAMA),
    ],
)
def test_a_gpu_takes_the_largest_that_fits(name, lesson, trains, expected, card, hub, capsys):
    card(name)
    hub(dict.fromkeys(ALL, 6_200_000_000))
    assert choice.choose_model(lesson, "auto", "cuda", trains) == expected
    assert capsys.readouterr().out == f"MODEL='{expected}' (6.2 GB to download).\n"


def test_the_next_smaller_is_taken_where_the_hub_has_no_larger(card, hub, capsys):
    card("h100")
    hub({QWEN_3B: 0})
    assert choice.choose_model("01_mixed_precision", "auto", "cuda:1") == QWEN_3B
    assert capsys.readouterr().out == f"MODEL='{QWEN_3B}' (in the cache).\n"


def test_without_a_hub_the_shape_is_taken_and_where_one_trains_the_embedded_model(
    card, hub, capsys
):
    hub({})
    card("h100")
    assert choice.choose_model("01_mixed_precision", "auto", "cuda") == "random:falcon-7b"
    assert choice.choose_model("04_adapters", "auto", "cuda", trains=True) == "auto"
    card("t4")
    assert choice.choose_model("03_quantization", "auto", "cuda") == "random:qwen2.5-3b"
    shown = capsys.readouterr().out.splitlines()
    assert [row.split(":")[0] for row in shown] == [
        "No hub answers",
        "The embedded model is taken",
        "No hub answers",
    ]


def test_a_lesson_away_from_the_project_finds_its_models(tmp_path, monkeypatch, card, hub):
    monkeypatch.setattr(choice.results, "ROOT", tmp_path / "installed")
    monkeypatch.chdir(tmp_path)
    card("h100")
    hub(dict.fromkeys(ALL, 1))
    assert choice.choose_model("01_mixed_precision", "auto", "cuda") == "auto"
    (tmp_path / "01_mixed_precision.ipynb").write_text('{"metadata": {"models": ["x/falcon-7b"]}}')
    hub({"x/falcon-7b": 1})
    assert choice.choose_model("01_mixed_precision", "auto", "cuda") == "x/falcon-7b"


# ---- the hub


def test_offline_no_hub_answers_and_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert choice.download_bytes("nobody/no-such-model") is None


@pytest.mark.parametrize(
    ("file", "expected"), [("model.safetensors", 700), ("pytorch_model.bin", None)]
)
def test_what_a_download_takes_are_its_safetensors(file, expected, monkeypatch):
    files = [
        huggingface_hub.hf_api.RepoSibling(rfilename=file, size=700),
        huggingface_hub.hf_api.RepoSibling(rfilename="tf_model.h5", size=900),
    ]

    def answer(self, name, files_metadata, timeout):
        assert files_metadata and timeout <= 10
        return huggingface_hub.ModelInfo(id=name, siblings=list(map(vars, files)))

    # a test needs no network
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
    assert choice.download_bytes("nobody/no-such-model") == expected


def test_only_a_whole_model_counts_as_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--nobody--sharded"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "model-1.safetensors").write_text("")
    assert choice.download_bytes("nobody/sharded") is None
    (snapshot / "model-2.safetensors").write_text("")
    assert choice.download_bytes("nobody/sharded") == 0


# ---- defaults by device and size


@pytest.mark.parametrize(
    ("device", "model", "tokens", "lengths"),
    [
        ("cpu", "auto", 64, [16, 48, 128]),  # what the reference results were measured with
        ("cuda:1", "auto", 2048, [512, 1024, 2048]),
        ("cuda", "large", 512, [128, 512, 2048]),
    ],
)
def test_none_takes_the_value_of_the_table(device, model, tokens, lengths, tmp_path):
    if model == "large":
        model = str(tmp_path)
        config = (choice.checkpoints.CONFIGS / "falcon-7b.json").read_text()
        (tmp_path / "config.json").write_text(config)
    values = {"PREFILL_TOKENS": None, "PROMPT_LENGTHS": None, "SEED": None}
    parameters.fill_defaults(values, device, model)
    assert values == {"PREFILL_TOKENS": tokens, "PROMPT_LENGTHS": lengths, "SEED": None}


def test_a_given_value_stays():
    values = {"PREFILL_TOKENS": 16}
    parameters.fill_defaults(values, "cuda", "auto")
    assert values == {"PREFILL_TOKENS": 16}


def test_a_given_value_has_the_type_of_the_table_s():
    assert parameters.typed("PREFILL_TOKENS", "32", None) == 32
    assert parameters.typed("PROMPT_LENGTHS", "[16, 64]", None) == [16, 64]
    assert parameters.typed("PROMPT_LENGTHS", None, None) is None
    with pytest.raises(ValueError, match="PREFILL_TOKENS='many' must be a whole number"):
        parameters.typed("PREFILL_TOKENS", "many", None)


def test_the_table_has_a_value_for_every_size_on_every_device():
    table = parameters.defaults()
    any_size = table[table["up_to_bytes"].isna()]
    for name in table.index.unique():
        assert sorted(any_size.loc[name, "device"]) == ["cpu", "cuda"]
    assert table["why"].notna().all()
