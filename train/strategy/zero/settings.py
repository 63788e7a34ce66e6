"""From config to DeepSpeed's JSON."""

from __future__ import annotations

import math
from typing import Any

from shardwright.train.config import RankLayout, RunConfig, ZeroStrategy, accumulation_steps
from shardwright.train.strategy.zero import nvme

BUCKET_ELEMENTS = 100_000_000
"""Of what is reduced or gathered at once: 200 MB in bf16, far beyond where the time of a collective
is that of its start. Wider models than 10,000 take their width squared: a matrix in one piece."""
MIN_BUCKET_ELEMENTS = 2**20
"""Below this a collective costs more for its start than for its bytes."""
# DeepSpeed's own (0.19.8, runtime/zero/config.py). The first is enough for several matrices of a
# block at a time, where 0.9 times the width squared, as transformers' HfDeepSpeedConfig (5.23) has
# it, is less than one.
PREFETCH_ELEMENTS = 50_000_000
PERSISTENCE_ELEMENTS = 100_000
"""Of a model of unknown width; else it follows the width as in HfDeepSpeedConfig."""


def settings(config: RunConfig, layout: RankLayout) -> dict[str, Any]:
    """Return the DeepSpeed JSON, every derived field written out, explicit false included."""
    strategy = config.strategy
    assert isinstance(strategy, ZeroStrategy)
    trainer, precision = config.trainer, config.precision
    bf16, fp16 = precision.compute_dtype == "bf16", precision.compute_dtype == "fp16"
    values: dict[str, Any] = {
        "train_batch_size": trainer.global_batch_size,
        "train_micro_batch_size_per_gpu": trainer.samples_per_pass,
        "gradient_accumulation_steps": accumulation_steps(trainer, layout),
        "gradient_clipping": trainer.max_grad_norm,
        "zero_optimization": _zero_section(config, strategy),
        "bf16": {
            "enabled": bf16,
            "bf16_master_weights_and_grads": precision.master_dtype == "bf16",
            "bf16_optimizer_states": precision.moments_dtype == "bf16",
            "check_grad_overflow": True,
        },
        "fp16": {
            "enabled": fp16,
            "loss_scale": 0,
            "initial_scale_power": round(math.log2(precision.initial_loss_scale)),
            "loss_scale_window": precision.loss_scale_growth_steps,
            "hysteresis": 1,
        },
        "communication_data_type": precision.reduce_dtype,
        # Accumulate in the dtype in which it is reduced; stage 0 knows only that of its parameters.
        "data_types": {
            "grad_accum_dtype": precision.reduce_dtype
            if strategy.stage > 0
            else precision.compute_dtype
        },
        "checkpoint": {"use_node_local_storage": strategy.node_local_checkpoints},
        # The optimizer is ours, the same as under every other strategy.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        # Its own progress lines would repeat ours.
        "steps_per_print": 2**31 - 1,
    }
    if strategy.uses_nvme:
        aio = strategy.aio
        values["aio"] = {
            "block_size": aio.block_size_bytes,
            "queue_depth": aio.queue_depth,
            "intra_op_parallelism": aio.threads,
            "single_submit": aio.single_submit,
            "overlap_events": aio.overlap_events,
        }
    return _merged(values, strategy.extra)


def _zero_section(config: RunConfig, strategy: ZeroStrategy) -> dict[str, Any]:
    hidden = _hidden_size(config)
    swap_directory = str(nvme.directory(config))
    bucket = _of_the_model(config, max(BUCKET_ELEMENTS, (hidden or 0) ** 2))

    def auto(value: int | str, derived: int) -> int:
        return derived if isinstance(value, str) else value

    section: dict[str, Any] = {
        "stage": strategy.stage,
        "reduce_bucket_size": auto(strategy.reduce_bucket_elements, bucket),
        "allgather_bucket_size": auto(strategy.allgather_bucket_elements, bucket),
        "overlap_comm": strategy.overlaps_communication,
        "reduce_scatter": strategy.reduce_scatter,
        "contiguous_gradients": strategy.contiguous_gradients,
        "round_robin_gradients": strategy.round_robin_gradients,
        "sub_group_size": strategy.sub_group_elements,
        "offload_optimizer": {"device": strategy.offload_optimizer},
    }
    if strategy.offload_optimizer != "none":
        section["offload_optimizer"]["pin_memory"] = strategy.pin_memory
        if strategy.offload_optimizer == "nvme":
            section["offload_optimizer"] |= {
                "nvme_path": swap_directory,
                "buffer_count": strategy.nvme_optimizer_buffer_count,
                "fast_init": strategy.nvme_fast_init,
            }
    if strategy.stage == 3:
        section |= {
            "stage3_prefetch_bucket_size": auto(
                strategy.prefetch_elements,
                _of_the_model(config, max(PREFETCH_ELEMENTS, int(0.9 * (hidden or 0) ** 2))),
            ),
            "stage3_param_persistence_threshold": auto(
                strategy.persistence_elements,
                10 * hidden if hidden else PERSISTENCE_ELEMENTS,
            ),
            "stage3_max_live_parameters": strategy.max_live_elements,
            "stage3_max_reuse_distance": strategy.max_reuse_distance_elements,
            "stage3_gather_16bit_weights_on_model_save": strategy.gather_16bit_weights_on_save,
            "zero_hpz_partition_size": strategy.hierarchical_partition_ranks,
            "zero_quantized_weights": strategy.quantized_weights,
            "zero_quantized_gradients": strategy.quantized_gradients,
            "offload_param": {"device": strategy.offload_parameters},
        }
        if strategy.offload_parameters != "none":
            section["offload_param"] |= {
                "pin_memory": strategy.pin_memory,
                "max_in_cpu": strategy.max_elements_in_cpu,
            }
        if strategy.offload_parameters == "nvme":
            section["offload_param"] |= {
                "nvme_path": swap_directory,
                "buffer_count": strategy.nvme_buffer_count,
                "buffer_size": strategy.nvme_buffer_elements,
            }
    return section


def _of_the_model(config: RunConfig, elements: int) -> int:
    """Return how many elements there are of so many: memory for more would hold nothing. Pure."""
    whole = config.model.parameters
    return elements if whole is None else max(MIN_BUCKET_ELEMENTS, min(elements, whole))


def _hidden_size(config: RunConfig) -> int | None:
    # Pretrained weights bring theirs along: unknown in a dry run where they are not here yet.
    return getattr(config.model, "hidden_size", None)


def _merged(values: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    return merged
