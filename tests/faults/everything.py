"""Imports all that a run imports, once, for the processes that are forked from this one."""

import datasets
import deepspeed
import tokenizers
import torch.distributed.checkpoint
import torch.distributed.fsdp
import transformers.integrations.deepspeed
import transformers.models.gpt2.modeling_gpt2

import shardwright.train.__main__
import shardwright.train.run

__all__ = ["datasets", "deepspeed", "shardwright", "tokenizers", "torch", "transformers"]
