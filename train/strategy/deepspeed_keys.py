"""DeepSpeed 0.19's own list of keys, to check the passthrough without importing DeepSpeed.

DeepSpeed refuses unknown keys in its newer sections and ignores them, without a word, at the top
level and in older ones. A test holds this list against the installed DeepSpeed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

# What our own fields decide: the passthrough may not say it a second time.
OWNED = {
    "train_batch_size": "trainer.global_batch_size",
    "train_micro_batch_size_per_gpu": "trainer.micro_batch_size",
    "gradient_accumulation_steps": "trainer.global_batch_size",
    "gradient_clipping": "trainer.max_grad_norm",
    "optimizer": "trainer.optimizer, trainer.learning_rate and their neighbours",
    "scheduler": "trainer.lr_scheduler",
    "bf16.enabled": "precision.compute_dtype",
    "bf16.bf16_master_weights_and_grads": "precision.master_dtype",
    "bf16.bf16_optimizer_states": "precision.moments_dtype",
    "bfloat16": "precision.compute_dtype",
    "fp16.enabled": "precision.compute_dtype",
    "fp16.initial_scale_power": "precision.initial_loss_scale",
    "fp16.loss_scale": "precision.initial_loss_scale, from which the scale moves",
    "fp16.loss_scale_window": "precision.loss_scale_growth_steps",
    "amp": "precision.compute_dtype",
    "torch_autocast": "precision.compute_dtype",
    "communication_data_type": "precision.reduce_dtype",
    "data_types.grad_accum_dtype": "precision.reduce_dtype",
    "activation_checkpointing": (
        "trainer.checkpoint_activations_every_blocks and trainer.offload_activations"
    ),
    "aio": "strategy.aio",
    "checkpoint.use_node_local_storage": "strategy.node_local_checkpoints",
    "zero_allow_untested_optimizer": "the optimizer that every strategy shares",
    "zero_force_ds_cpu_optimizer": "strategy.cpu_adam",
    "steps_per_print": "trainer.log_every_steps",
    "zero_optimization.stage": "strategy.stage",
    "zero_optimization.offload_optimizer": "strategy.offload_optimizer",
    "zero_optimization.offload_param": "strategy.offload_parameters",
    "zero_optimization.reduce_bucket_size": "strategy.reduce_bucket_elements",
    "zero_optimization.allgather_bucket_size": "strategy.allgather_bucket_elements",
    "zero_optimization.overlap_comm": "strategy.overlap_communication",
    "zero_optimization.reduce_scatter": "strategy.reduce_scatter",
    "zero_optimization.contiguous_gradients": "strategy.contiguous_gradients",
    "zero_optimization.round_robin_gradients": "strategy.round_robin_gradients",
    "zero_optimization.stage3_prefetch_bucket_size": "strategy.prefetch_elements",
    "zero_optimization.stage3_param_persistence_threshold": "strategy.persistence_elements",
    "zero_optimization.stage3_max_live_parameters": "strategy.max_live_elements",
    "zero_optimization.stage3_max_reuse_distance": "strategy.max_reuse_distance_elements",
    "zero_optimization.sub_group_size": "strategy.sub_group_elements",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": (
        "strategy.gather_16bit_weights_on_save"
    ),
    "zero_optimization.zero_hpz_partition_size": "strategy.hierarchical_partition_ranks",
    "zero_optimization.zero_quantized_weights": "strategy.quantized_weights",
    "zero_optimization.zero_quantized_gradients": "strategy.quantized_gradients",
}

# What DeepSpeed reads and does, but not what a user of it here would expect.
REFUSED = {
    "zero_optimization.zenflow": (
        "takes its hyper-parameters from DeepSpeed's own optimizer section and its update interval "
        "for the accumulation steps, so neither trainer.optimizer nor trainer.global_batch_size "
        "would hold"
    ),
    "zero_optimization.save_muon_momentum_buffer_in_memory": (
        "is read by DeepSpeed's own Muon only; set trainer.optimizer=muon with strategy=fsdp, ddp "
        "or zero0"
    ),
    "zero_optimization.offload_optimizer.ratio": (
        "leaves the part that stays on the GPU without the learning rate's schedule"
    ),
    "zero_optimization.offload_optimizer.super_offload": (
        "keeps the moments in a process of its own, where no checkpoint finds them"
    ),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "is read by super_offload only",
}

# The rest of what DeepSpeed reads: a section's keys, or None where its inside is not checked.
FREE: dict[str, set[str] | None] = {
    "bf16": {"immediate_grad_update", "check_grad_overflow"},
    "fp16": {
        "auto_cast",
        "consecutive_hysteresis",
        "fp16_master_weights_and_grads",
        "hysteresis",
        "min_loss_scale",
    },
    "zero_optimization": {
        "allgather_partitions",
        "compute_grad_norm",
        "elastic_checkpoint",
        "enable_sanity_checks",
        "ignore_unused_parameters",
        "leaf_module",
        "legacy_stage1",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "memory_efficient_linear",
        "override_module_apply",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "stage3_allgather_sequential",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params",
        "use_multi_rank_bucket_allreduce",
        "zero_quantized_nontrainable_weights",
    },
    "checkpoint": {
        "checkpoint_serialization",
        "load_universal",
        "parallel_write",
        "tag_validation",
        "writer",
    },
    "data_types": {"buffer_dtype", "keep_in_fp32_modules", "param_dtype"},
    "comms_logger": {"debug", "enabled", "prof_all", "prof_ops", "verbose"},
    "flops_profiler": {
        "detailed",
        "enabled",
        "module_depth",
        "output_file",
        "profile_step",
        "recompute_fwd_factor",
        "top_modules",
    },
    "csv_monitor": None,
    "dataloader_drop_last": None,
    "disable_allgather": None,
    "disable_python_gc": None,
    "dump_state": None,
    "gradient_allreduce_op": None,
    "gradient_predivide_factor": None,
    "log_level": None,
    "memory_breakdown": None,
    "prescale_gradients": None,
    "tensorboard": None,
    "timers": None,
    "wall_clock_breakdown": None,
    "wandb": None,
}


def problems(extra: dict[str, Any]) -> Iterator[str]:
    """Yield a message for each key of a passthrough that DeepSpeed ignores or a field owns."""
    for key, value in extra.items():
        inside = FREE.get(key)
        if key in OWNED:
            yield _owned(key)
        elif key not in FREE:
            yield _unknown(key, [*FREE, *OWNED])
        elif inside is not None and not isinstance(value, dict):
            yield f"strategy.extra.{key}={value!r} must be a section: {{key: value}}"
        elif inside is not None:
            for name in value:
                path = f"{key}.{name}"
                section = value[name] if isinstance(value[name], dict) else {}
                within = [f"{path}.{inner}" for inner in section]
                if refused := [p for p in (path, *within) if p in REFUSED]:
                    for p in refused:
                        yield f"strategy.extra.{p} {REFUSED[p]}; leave it out"
                elif path in OWNED:
                    yield _owned(path)
                elif name not in inside:
                    owned = [p for p in OWNED if p.startswith(f"{key}.")]
                    yield _unknown(path, [*(f"{key}.{n}" for n in inside), *owned])


def _owned(path: str) -> str:
    return f"strategy.extra.{path} is decided by {OWNED[path]}; set that and leave this out"


def _unknown(path: str, known: list[str]) -> str:
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    if close and close[0] in OWNED:
        hint = f"{close[0]} is decided by {OWNED[close[0]]}"
    elif close:
        hint = f"did you mean {close[0]}?"
    else:
        hint = "DeepSpeed has no such key and would ignore it"
    return f"unknown key strategy.extra.{path}: {hint}"
