"""A rank of lesson 07 that holds its part of every matrix: tensor parallelism by transformers."""

import torch
import torch.distributed as dist
from transformers import AutoConfig
from transformers.distributed import DistributedConfig

from helpers import models
from helpers.workers import ranks_07


def load(path: str, dtype: torch.dtype, device: str):
    """This rank's part. Raises NotImplementedError where transformers has no plan for the model: it
    would load the whole one on every rank.
    """
    config = AutoConfig.from_pretrained(path).get_text_config()
    if not config.base_model_tp_plan:
        raise NotImplementedError(f"transformers has no plan to cut {config.model_type}")
    cut = DistributedConfig(tp_size=dist.get_world_size())
    return models.load(path, dtype, device_map=None, distributed_config=cut)


if __name__ == "__main__":
    ranks_07.main(load)
