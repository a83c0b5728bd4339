"""A rank of lesson 07 that leaves every second layer in its file until it runs."""

import sys
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import models
from helpers.workers import ranks_07


def device_map(path: str, device: str) -> dict[str, str]:
    """Which module lies where: every second layer on disk, all else on the device."""
    with init_empty_weights():
        net = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    name, layers = next(
        (name, module)
        for name, module in net.named_modules()
        if isinstance(module, torch.nn.ModuleList)
    )
    leaves = [name for name, module in net.named_modules() if name and not list(module.children())]
    places = {leaf: device for leaf in leaves if not leaf.startswith(f"{name}.")}
    for number in range(len(layers)):
        places[f"{name}.{number}"] = "disk" if number % 2 else device
    return places


def load(path: str, dtype: torch.dtype, device: str):
    """The model; weights that have to be converted go to a folder beside the job's file."""
    spare = Path(sys.argv[1]).with_name("offload")
    return models.load(path, dtype, device_map=device_map(path, device), offload_folder=str(spare))


if __name__ == "__main__":
    ranks_07.main(load)
