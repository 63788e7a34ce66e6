"""One line in the same words for every engine, whatever facts it has."""

from __future__ import annotations

from typing import Any

import pytest

from shardwright.train.loop.callbacks.engine import precision_line

FP32 = {"compute": "fp32", "reduction": "fp32", "master": "fp32", "moments": "fp32"}
FACTS: dict[str, Any] = {
    "engine": "FSDP2",
    "world_size": 8,
    "precision": {**FP32, "compute": "bf16"},
    "tf32": False,
    "fp8_recipe": None,
    "attention": "sdpa",
    "fp8_layers": 0,
    "fused_loss": True,
    "initial_loss_scale": None,
}


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({}, "fsdp on 8 ranks: bf16 compute, fp32 reduction, fp32 master weights, fp32 moments"),
        (
            {"attention": "eager"},
            "fsdp on 8 ranks: bf16 compute, fp32 reduction, fp32 master weights, fp32 moments, "
            "eager attention",
        ),
        (
            {"fused_loss": False},
            "fsdp on 8 ranks: bf16 compute, fp32 reduction, fp32 master weights, fp32 moments, "
            "loss of all logits at once",
        ),
        (
            {"engine": "DeepSpeedEngine", "stage": 3, "world_size": 2},
            "zero3 on 2 ranks: bf16 compute, fp32 reduction, fp32 master weights, fp32 moments",
        ),
        (
            {"engine": "none", "world_size": 1, "precision": {**FP32, "reduction": "none"}},
            "single on 1 rank: fp32 compute, fp32 master weights, fp32 moments",
        ),
        (
            {"engine": "DistributedDataParallel", "precision": FP32, "tf32": True},
            "ddp on 8 ranks: fp32 compute with TF32 products, fp32 reduction, "
            "fp32 master weights, fp32 moments",
        ),
        (
            {"fp8_recipe": "rowwise", "fp8_layers": 24, "fp8_layers_left_out": 2},
            "fsdp on 8 ranks: bf16 compute with rowwise fp8 products in 24 linear layers "
            "(2 left out), fp32 reduction, fp32 master weights, fp32 moments",
        ),
        (
            {"precision": {**FP32, "compute": "fp16"}, "initial_loss_scale": 65536.0},
            "fsdp on 8 ranks: fp16 compute, fp32 reduction, fp32 master weights, fp32 moments, "
            "loss scale 65536",
        ),
    ],
)
def test_the_line(facts: dict[str, Any], line: str) -> None:
    assert precision_line({**FACTS, **facts}) == line
