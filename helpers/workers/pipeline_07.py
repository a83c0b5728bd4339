"""A rank of lesson 07 that holds a range of layers, by transformers' own pipeline parallelism."""

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from helpers import models
from helpers.workers import ranks_07


def load(path: str, dtype: torch.dtype, device: str):
    """This rank's layers."""
    cut = DistributedConfig(pp_size=dist.get_world_size())
    return models.load(path, dtype, device_map=None, distributed_config=cut)


if __name__ == "__main__":
    ranks_07.main(load)
