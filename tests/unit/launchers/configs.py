"""Configs for each launcher."""

from __future__ import annotations

from typing import Any

from launchers.machine.facts import Machine, resolve
from train.config import RunConfig, from_tree


def slurm_run(run_dir: str = "/runs/a", **settings: Any) -> RunConfig:
    return resolve(config(launcher={"kind": "slurm", **settings}), Machine(), run_dir)


TREE = {
    "model": {
        "kind": "gpt2",
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": 128,
    },
    "objective": {"kind": "clm"},
    "data": {"kind": "stdlib", "sequence_length": 64},
    "tokenizer": {"kind": "byte_bpe"},
    "strategy": {"kind": "ddp"},
    "precision": {},
    "trainer": {"max_steps": 10, "global_batch_size": 64, "micro_batch_size": 8},
    "tracking": {"kind": "none"},
    "launcher": {"kind": "torchrun"},
}


def config(**sections: object) -> RunConfig:
    return from_tree({**TREE, **sections})


def resolved(launcher: str, machine: Machine | None = None, **settings: object) -> RunConfig:
    wanted = config(launcher={"kind": launcher, **settings})
    return resolve(wanted, machine or Machine(), "/runs/a")
