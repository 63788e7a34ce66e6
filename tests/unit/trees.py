"""Whole configs as trees, of which a test changes a key or two."""

from __future__ import annotations

from typing import Any

TREE: dict[str, Any] = {
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
    "data": {
        "kind": "stdlib",
        "sequence_length": 64,
        "document_attention": False,
        "unpad": False,
    },
    "tokenizer": {"kind": "byte_bpe"},
    "strategy": {"kind": "ddp"},
    "precision": {},
    "trainer": {"max_steps": 10, "global_batch_size": 64, "micro_batch_size": 8},
    "tracking": {"kind": "none"},
    "launcher": {"kind": "torchrun", "nproc_per_node": 4},
}
ZERO2 = {"kind": "zero", "stage": 2}
ZERO3 = {"kind": "zero", "stage": 3}
FSDP = {"kind": "fsdp"}
CPU3 = {**ZERO3, "offload_optimizer": "cpu"}
BF16 = {"compute_dtype": "bf16"}
PURE = {**BF16, "reduce_dtype": "bf16", "master_dtype": "bf16", "moments_dtype": "bf16"}

PACKED: dict[str, Any] = {
    **TREE,
    "model": {"kind": "pretrained", "name": "some/model", "quantization": "4bit"},
    "tokenizer": {"kind": "pretrained", "name": "some/model"},
    "adapter": {"kind": "lora"},
    "strategy": {"kind": "ddp"},
    "run_dir": "/r",
}
"""An adapter that is trained beside weights in 4 bits."""
