"""Fixtures: a lesson run once with small numbers, a lesson's own functions, tiny random models."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from helpers import models, results
from helpers.series import run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def run_lesson(tmp_path_factory):
    """run_lesson("NN_name", **parameters) -> Results: executed once a session, small numbers, own
    folder.
    """
    done = {}

    def run_once(name: str, **parameters):
        notebook = run.NOTEBOOKS / f"{name}.ipynb"
        given = {
            k: v for k, v in run.SMOKE.items() if k in run.known_parameters(notebook)
        } | parameters
        key = (name, json.dumps({k: v for k, v in given.items() if v != "auto"}, sort_keys=True))
        if key not in done:
            folder = tmp_path_factory.mktemp(name)
            places = {
                "RESULTS_DIR": str(folder / "results"),
                "FIGURES_DIR": str(folder / "figures"),
            }
            os.environ["SEVEN_PROFILE"] = "smoke"
            run.execute(notebook, folder / f"{name}.ipynb", given | places)
            done[key] = results.load(next((folder / "results").glob(f"*/{name}.json")))
            done[key].__dict__["folder"] = folder
        return done[key]

    return run_once


@pytest.fixture(scope="session")
def definitions():
    """definitions("NN_name") -> dict: see `helpers.series.run.definitions`."""
    return run.definitions


def _saved(model, folder: Path) -> str:
    model.eval().save_pretrained(folder)
    AutoTokenizer.from_pretrained(models.default_folder()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> str:
    """Folder of a tiny random LLaMA (grouped-query attention, tied head) with the default
    tokenizer.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    return _saved(LlamaForCausalLM(config), tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_falcon(tmp_path_factory) -> str:
    """Folder of a tiny random Falcon (multi-query attention, fused query_key_value) with the
    default tokenizer.
    """
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=49152,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        multi_query=True,
        parallel_attn=True,
        bias=False,
        new_decoder_architecture=False,
    )
    return _saved(FalconForCausalLM(config), tmp_path_factory.mktemp("tiny-falcon"))
