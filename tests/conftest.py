"""Fixtures: a lesson run once with small numbers, a lesson's own functions, tiny random models."""

import dataclasses
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
from tests import declared

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    """What runs a notebook is marked so: CI's quick job leaves it out."""
    for item in items:
        if "run_lesson" in item.fixturenames:
            item.add_marker(pytest.mark.notebook)


@dataclasses.dataclass(frozen=True)
class Ran:
    """A lesson that was executed: its records, how it ran, and the folder with all that it left."""

    records: list[results.Record]
    run: results.Run
    folder: Path


@pytest.fixture(scope="session")
def run_lesson(tmp_path_factory):
    """run_lesson("NN_name" or "deeper/NN_name", **parameters) -> Ran: executed once a session, small
    numbers, own folder.
    """
    done = {}

    def run_once(name: str, **parameters) -> Ran:
        notebook = run.NOTEBOOKS / f"{name}.ipynb"
        given = run.smoke_parameters(notebook) | parameters
        key = (name, json.dumps(parameters, sort_keys=True))
        if key not in done:
            folder = tmp_path_factory.mktemp(notebook.stem)
            given["RESULTS_DIR"] = str(folder / "results")
            given["FIGURES_DIR"] = str(folder / "figures")
            os.environ["SEVEN_PROFILE"] = "smoke"
            try:
                run.execute(notebook, folder / notebook.name, given)
            finally:
                del os.environ["SEVEN_PROFILE"]
            file = results.read(next((folder / "results").glob(f"*/*/smoke/{notebook.stem}.json")))
            assert declared.undeclared_details(file.records) == []
            done[key] = Ran(file.records, file.run, folder)
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
