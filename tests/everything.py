"""Imports all that a run imports, once, for the processes that are forked from this one."""

from shardwright.train.strategy.zero import lean

lean.import_deepspeed()

import datasets  # noqa: E402
import deepspeed  # noqa: E402
import pytest  # noqa: E402
import tokenizers  # noqa: E402
import torch.distributed.checkpoint  # noqa: E402
import torch.distributed.fsdp  # noqa: E402
import transformers.integrations.deepspeed  # noqa: E402
import transformers.models.gpt2.modeling_gpt2  # noqa: E402

import shardwright.train.__main__  # noqa: E402
import shardwright.train.run  # noqa: E402
from tests import forked  # noqa: E402

__all__ = ["datasets", "deepspeed", "pytest", "shardwright", "tokenizers", "torch", "transformers"]

forked.look_away_from_what_stays()
