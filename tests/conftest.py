"""Fixtures: a lesson run once with small numbers, a lesson's own functions, tiny random models."""

import ast
import json
import os
from pathlib import Path

import nbformat
import pytest
import torch
from transformers import AutoTokenizer, FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers import models, results, run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def run_lesson(tmp_path_factory):
    """run_lesson("NN_name", **parameters) -> Results: executed once a session, small numbers, own folder."""
    done = {}

    def run_once(name: str, **parameters):
        notebook = run.NOTEBOOKS / f"{name}.ipynb"
        given = {k: v for k, v in run.SMOKE.items() if k in run.known_parameters(notebook)} | parameters
        key = (name, json.dumps({k: v for k, v in given.items() if v != "auto"}, sort_keys=True))
        if key not in done:
            folder = tmp_path_factory.mktemp(name)
            places = {"RESULTS_DIR": str(folder / "results"), "FIGURES_DIR": str(folder / "figures")}
            os.environ["SEVEN_PROFILE"] = "smoke"
            run.execute(notebook, folder / f"{name}.ipynb", given | places)
            done[key] = results.load(next((folder / "results").glob(f"*/{name}.json")))
            done[key].__dict__["folder"] = folder
        return done[key]

    return run_once


@pytest.fixture(scope="session")
def definitions():
    """definitions("NN_name") -> dict: a notebook's imports, functions, classes and literal constants, nothing run."""

    def namespace(name: str) -> dict:
        found = {"__name__": name}
        for cell in nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells:
            if cell.cell_type != "code" or cell.source.lstrip().startswith("try:\n    import helpers"):
                continue
            source = "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line
                               for line in cell.source.splitlines())
            keep = [node for node in ast.parse(source).body if _is_definition(node)]
            exec(compile(ast.Module(keep, []), f"{name}.ipynb", "exec"), found)
        return found

    return namespace


def _is_definition(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        try:
            ast.literal_eval(node.value)
        except ValueError:
            return False
        return True
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))


def _saved(model, folder: Path) -> str:
    model.eval().save_pretrained(folder)
    AutoTokenizer.from_pretrained(models.default_folder()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> str:
    """Folder of a tiny random LLaMA (grouped-query attention, tied head) with the default tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                         max_position_embeddings=512)
    return _saved(LlamaForCausalLM(config), tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_falcon(tmp_path_factory) -> str:
    """Folder of a tiny random Falcon (multi-query attention, fused query_key_value) with the default tokenizer."""
    torch.manual_seed(0)
    config = FalconConfig(vocab_size=49152, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                          multi_query=True, parallel_attn=True, bias=False, new_decoder_architecture=False)
    return _saved(FalconForCausalLM(config), tmp_path_factory.mktemp("tiny-falcon"))
