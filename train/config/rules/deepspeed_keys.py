"""DeepSpeed 0.19's own keys and their types, to check the passthrough without importing DeepSpeed.

DeepSpeed refuses unknown keys in its newer sections and ignores them, without a word, at the top
level and in older ones. A test holds this list against the installed DeepSpeed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from shardwright.train.config.elsewhere.deepspeed_json import DEEPSPEED_JSON
from shardwright.train.config.messages import expectation
from shardwright.train.config.section import shown

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
    "bf16.check_grad_overflow": (
        "would let gradients that are not finite reach the weights, or changes nothing"
    ),
    "zero_optimization.compute_grad_norm": (
        "would let gradients that are not finite reach the weights, or changes nothing"
    ),
    "zero_optimization.zenflow": (
        "takes its hyper-parameters from DeepSpeed's own optimizer section and its update "
        "interval for the accumulation steps, so neither trainer.optimizer nor "
        "trainer.global_batch_size would apply"
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

_Size = Annotated[int, Field(ge=0)]
_Dtype = Literal["fp32", "bf16", "fp16"]

# The rest of what DeepSpeed reads: the type of a value, or the keys of a section.
FREE: dict[str, Any] = {
    "bf16": {"immediate_grad_update": bool},
    "fp16": {
        "auto_cast": bool,
        "consecutive_hysteresis": bool,
        "fp16_master_weights_and_grads": bool,
        "hysteresis": int,
        "min_loss_scale": int,
    },
    "zero_optimization": {
        "allgather_partitions": bool,
        "elastic_checkpoint": bool,
        "enable_sanity_checks": bool,
        "ignore_unused_parameters": bool,
        "leaf_module": {"classes": list[str], "name_suffixes": list[str], "names": list[str]},
        "legacy_stage1": bool,
        "load_from_fp32_weights": bool,
        "log_trace_cache_warnings": bool,
        "memory_efficient_linear": bool,
        "override_module_apply": bool,
        "parameter_alignment": bool,
        "pipeline_loading_checkpoint": bool,
        "stage3_allgather_sequential": bool,
        "stage3_model_persistence_threshold": _Size,
        "stage3_module_granularity_threshold": int,
        "stage3_use_all_reduce_for_fetch_params": bool,
        "use_multi_rank_bucket_allreduce": bool,
        "zero_quantized_nontrainable_weights": bool,
    },
    "checkpoint": {
        "checkpoint_serialization": bool,
        "load_universal": bool,
        "parallel_write": {"pipeline_stage": bool},
        "tag_validation": Literal["Ignore", "Warn", "Fail"],
        "writer": {
            "data_parallel": Literal["replica", "socket", "machine"],
            "decoupled": bool,
            "io_buffer_double": bool,
            "io_buffer_size": _Size,
            "io_multiplier": int,
            "show_statistics": bool,
            "type": Literal["mock", "python", "fast"],
        },
    },
    "data_types": {
        "buffer_dtype": _Dtype,
        "keep_in_fp32_modules": Literal["auto"] | list[str],
        "param_dtype": _Dtype,
    },
    "comms_logger": {
        "debug": bool,
        "enabled": bool,
        "prof_all": bool,
        "prof_ops": list[str],
        "verbose": bool,
    },
    "flops_profiler": {
        "detailed": bool,
        "enabled": bool,
        "module_depth": int,
        "output_file": str,
        "profile_step": int,
        "recompute_fwd_factor": float,
        "top_modules": int,
    },
    "csv_monitor": {"enabled": bool, "job_name": str, "output_path": str},
    "dataloader_drop_last": bool,
    "disable_allgather": bool,
    "disable_python_gc": bool,
    "dump_state": bool,
    "gradient_allreduce_op": Literal["mean", "sum"],
    "gradient_predivide_factor": float,
    "log_level": Literal["debug", "info", "warning", "error", "critical"],
    "memory_breakdown": bool,
    "prescale_gradients": bool,
    "tensorboard": {"enabled": bool, "job_name": str, "output_path": str},
    "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    "wall_clock_breakdown": bool,
    "wandb": {"enabled": bool, "group": str | None, "project": str, "team": str | None},
}


def problems(extra: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each key that DeepSpeed ignores or a field owns, and each wrong value."""
    yield from _problems(extra, FREE, "")


def _problems(section: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in section.items():
        path = f"{prefix}{key}"
        within = [f"{path}.{inner}" for inner in value] if isinstance(value, dict) else []
        kind = known.get(key)
        if refused := [p for p in (path, *within) if p in REFUSED]:
            yield from (f"strategy.extra.{p} {REFUSED[p]}; leave it out" for p in refused)
        elif path in OWNED:
            yield _owned(path)
        elif kind is None:
            owned = [p for p in OWNED if p.startswith(prefix)]
            yield _unknown(path, [*(f"{prefix}{name}" for name in known), *owned])
        elif isinstance(kind, dict):
            if isinstance(value, dict):
                yield from _problems(value, kind, f"{path}.")
            else:
                yield f"strategy.extra.{path}={shown(value)}: must be a section: {{key: value}}"
        else:
            try:
                TypeAdapter(kind).validate_python(value, strict=True)
            except ValidationError as error:
                yield f"strategy.extra.{path}={shown(value)}: must be {expectation(error.errors())}"


def _owned(path: str) -> str:
    return f"strategy.extra.{path} is decided by {OWNED[path]}; set that and leave this out"


def _unknown(path: str, known: list[str]) -> str:
    if (row := DEEPSPEED_JSON.get(path)) is not None:
        return f"strategy.extra.{path}: {row.advice}"
    # By the last part alone: what is before it is the same, and makes all of them alike.
    by_leaf = {name.rpartition(".")[2]: name for name in known}
    leaf = path.rpartition(".")[2]
    close = [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.6)]
    if close and close[0] in OWNED:
        hint = f"{close[0]} is decided by {OWNED[close[0]]}"
    elif close:
        hint = f"did you mean {close[0]}?"
    else:
        hint = "DeepSpeed has no such key and would ignore it"
    return f"unknown key strategy.extra.{path}: {hint}"
