"""From config to engine settings: derived, explicit, and the same values in both engines."""

from __future__ import annotations

from typing import Any

import pytest

from shardwright.train.strategy import engine_settings
from tests.unit.strategy.configs import config
from tests.unit.trees import CPU3, PURE, TREE, ZERO2, ZERO3


def test_zero_writes_out_every_derived_field() -> None:
    values = engine_settings(config(strategy=ZERO2, precision={"compute_dtype": "bf16"}))
    assert values["train_batch_size"] == 64
    assert values["train_micro_batch_size_per_gpu"] == 8
    assert values["gradient_accumulation_steps"] == 2
    assert values["gradient_clipping"] == 1.0
    assert values["bf16"]["enabled"] is True
    assert values["fp16"]["enabled"] is False
    assert values["communication_data_type"] == "fp32"
    assert values["data_types"] == {"grad_accum_dtype": "fp32"}
    assert values["zero_optimization"]["overlap_comm"] is False


def test_auto_sizes_are_deepspeeds_or_the_models_if_that_is_smaller() -> None:
    def section(hidden_size: int) -> dict[str, Any]:
        model = {**TREE["model"], "hidden_size": hidden_size, "num_attention_heads": 2}
        found: dict[str, Any] = engine_settings(config(strategy=ZERO3, model=model))
        return dict(found["zero_optimization"])

    wide, usual, small = section(12_288), section(4096), section(64)
    assert wide["reduce_bucket_size"] == wide["allgather_bucket_size"] == 12_288**2
    assert wide["stage3_prefetch_bucket_size"] == int(0.9 * 12_288**2)
    assert usual["reduce_bucket_size"] == 10**8
    assert usual["stage3_prefetch_bucket_size"] == 5 * 10**7
    assert usual["stage3_param_persistence_threshold"] == 10 * 4096
    parameters = config(model={**TREE["model"], "hidden_size": 512}).model.parameters
    assert parameters is not None
    assert 2**20 < parameters < 10**8, "else it says nothing"
    assert section(512)["reduce_bucket_size"] == parameters
    assert section(512)["stage3_prefetch_bucket_size"] == parameters
    assert small["reduce_bucket_size"] == small["stage3_prefetch_bucket_size"] == 2**20


@pytest.mark.parametrize(("stage", "overlaps"), [(1, False), (2, False), (3, True)])
def test_communication_overlaps_at_stage_3_unless_told_otherwise(
    stage: int, overlaps: bool
) -> None:
    """As DeepSpeed's own default; there false would gather on the stream that computes."""

    def asked(**strategy: Any) -> Any:
        values = engine_settings(config(strategy={"kind": "zero", "stage": stage, **strategy}))
        return values["zero_optimization"]["overlap_comm"]

    assert asked() is overlaps
    assert asked(overlap_communication=True) is True
    assert asked(overlap_communication=False) is False


def test_nvme_gets_its_path_and_aio_settings() -> None:
    strategy = {
        **ZERO3,
        "offload_optimizer": "nvme",
        "offload_parameters": "nvme",
        "nvme_path": "/disk",
        "aio": {"queue_depth": 32, "threads": 4},
    }
    values = engine_settings(config(strategy=strategy))
    path = values["zero_optimization"]["offload_param"]["nvme_path"]
    assert path.startswith("/disk/run-")
    assert values["zero_optimization"]["offload_optimizer"]["nvme_path"] == path
    other = engine_settings(config(strategy=strategy, run_dir="/runs/other"))
    assert other["zero_optimization"]["offload_param"]["nvme_path"] != path
    assert values["aio"]["queue_depth"] == 32
    assert values["aio"]["intra_op_parallelism"] == 4
    assert "aio" not in engine_settings(config(strategy=CPU3))


def test_the_passthrough_is_merged_into_its_section() -> None:
    extra = {"zero_optimization": {"ignore_unused_parameters": False}, "log_level": "info"}
    values = engine_settings(config(strategy={**ZERO2, "extra": extra}))
    assert values["zero_optimization"]["ignore_unused_parameters"] is False
    assert values["zero_optimization"]["stage"] == 2
    assert values["log_level"] == "info"


def test_zero_plus_plus_is_fields_of_stage_3() -> None:
    plus = {**ZERO3, "hierarchical_partition_ranks": 2, "quantized_weights": True}
    section = engine_settings(config(strategy=plus))["zero_optimization"]
    assert section["zero_hpz_partition_size"] == 2
    assert section["zero_quantized_weights"] is True
    assert section["zero_quantized_gradients"] is False


def test_hybrid_fsdp_is_a_mesh_of_replicas_and_shards() -> None:
    values = engine_settings(config(strategy={"kind": "fsdp", "replicas": 2}))
    assert values["mesh"] == {"shape": [2, 2], "names": ["replicate", "shard"]}


def test_pure_bf16_says_so_to_both_engines() -> None:
    zero = engine_settings(config(strategy=ZERO2, precision=PURE))
    assert zero["bf16"] == {
        "enabled": True,
        "bf16_master_weights_and_grads": True,
        "bf16_optimizer_states": True,
        "check_grad_overflow": True,
    }
    fsdp = engine_settings(config(strategy={"kind": "fsdp"}, precision=PURE))
    assert fsdp["mixed_precision"]["reduce_dtype"] == "bfloat16"


def test_memory_is_pinned_only_where_there_is_a_gpu() -> None:
    strategy = {"kind": "fsdp", "offload": True}
    for device, pinned in (("cpu", False), ("cuda", True)):
        launcher = {**TREE["launcher"], "device": device}
        values = engine_settings(config(strategy=strategy, launcher=launcher))
        assert values["offload"] == {"cpu": True, "pin_memory": pinned}
