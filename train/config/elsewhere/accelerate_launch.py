"""The flags of `accelerate launch`, and of its config files, and what to write here instead."""

from __future__ import annotations

from shardwright.train.config.elsewhere.row import Row, rows

_WRAPPED = "strategy.block_class, under strategy=fsdp; without it a model's blocks are found"
EACH_ELSE = {
    "megatron_lm_": Row("left out", "ranks divide data and states, and Megatron-LM is no engine"),
    "parallelism_config_": Row("left out", "ranks divide data and states, not layers or samples"),
    "fp8_": Row(
        "left out", "precision=fp8 is torchao's, and precision.fp8_recipe chooses among it"
    ),
    "aws_": Row("left out", "jobs are started by torchrun, deepspeed or SLURM, not by SageMaker"),
    "tpu": Row("left out", "ranks are on GPUs or CPUs"),
    "dynamo_": Row("left out", "blocks are compiled by inductor; trainer.compile says whether"),
}
"""Of all names that begin so and have no row of their own."""

ACCELERATE_LAUNCH = rows(
    fields={
        "cpu": "launcher.device=cpu",
        "mixed_precision": "precision=bf16, fp16 or fp8",
        "num_processes": "launcher.nproc_per_node, for each node",
        "num_machines": "launcher.nodes",
        "gpu_ids": "launcher.gpu_ids, a list; all is null",
        "main_process_ip": "launcher.head_address",
        "main_process_port": "launcher.head_port",
        "rdzv_backend": "launcher.rendezvous, under launcher=torchrun",
        "rdzv_conf": "launcher.rendezvous, under launcher=torchrun",
        "max_restarts": "launcher.max_restarts, under launcher=torchrun",
        "use_deepspeed": "strategy=zero0, zero1, zero2 or zero3",
        "zero_stage": "strategy=zero0, zero1, zero2 or zero3",
        "offload_optimizer_device": "strategy.offload_optimizer=cpu or nvme",
        "offload_param_device": "strategy.offload_parameters=cpu or nvme, at stage 3",
        "offload_optimizer_nvme_path": "strategy.nvme_path",
        "offload_param_nvme_path": "strategy.nvme_path",
        "gradient_accumulation_steps": (
            "trainer.global_batch_size: the accumulation steps follow from it"
        ),
        "gradient_clipping": "trainer.max_grad_norm",
        "zero3_save_16bit_model": "strategy.gather_16bit_weights_on_save; final/ needs none of it",
        "deepspeed_config_file": "strategy=zero0 to zero3 and its keys, others in strategy.extra",
        "deepspeed_hostfile": "launcher.hostfile, under launcher=deepspeed",
        "deepspeed_exclusion_filter": "launcher.exclude, under launcher=deepspeed",
        "deepspeed_inclusion_filter": "launcher.include, under launcher=deepspeed",
        "deepspeed_multinode_launcher": "launcher.backend, under launcher=deepspeed",
        "use_fsdp": "strategy=fsdp",
        "fsdp_offload_params": "strategy=fsdp_offload",
        "fsdp_min_num_params": "strategy.wrap=size and strategy.min_unit_parameters",
        "fsdp_sharding_strategy": "strategy=fsdp, fsdp_grad_op, fsdp_hybrid or ddp",
        "fsdp_reshard_after_forward": "strategy.reshard_after_forward",
        "fsdp_auto_wrap_policy": "strategy.wrap=transformer, size or none",
        "fsdp_transformer_layer_cls_to_wrap": _WRAPPED,
        "fsdp_backward_prefetch": "strategy.prefetch_units, under strategy=fsdp",
        "fsdp_forward_prefetch": "strategy.prefetch_units, under strategy=fsdp",
        "fsdp_activation_checkpointing": "trainer.checkpoint_activations_every_blocks=1",
        "fsdp_activation_checkpointing_offload": "trainer.offload_activations",
        "fp8_backend": "precision=fp8, which is torchao's",
        "fp8_enable_fsdp_float8_all_gather": "precision=fp8 and precision.fp8_recipe",
        "dynamo_backend": "trainer.compile and trainer.compile_backend",
        "dynamo_mode": "trainer.compile_mode",
        "dynamo_use_regional_compilation": "trainer.compile, which compiles each block",
        "num_cpu_threads_per_process": "OMP_NUM_THREADS in the environment",
        "enable_cpu_affinity": "launcher.bind, under launcher=torchrun",
        "mpirun_hostfile": "launcher.hostfile, under launcher=deepspeed",
    },
    commands={
        "config_file": "`shardwright translate FILE`, which prints the words to train with",
        "machine_rank": "`shardwright join RUN_DIR` on each other node",
        "tee": "`shardwright logs RUN_DIR --rank N`",
        "log_dir": "`shardwright logs RUN_DIR --rank N`",
        "debug": "`shardwright logs RUN_DIR --rank N`",
        "training_script": "`shardwright train`",
        "training_script_args": "`shardwright train` and its words",
    },
    derived={
        "help": "`shardwright train --help`",
        "quiet": "what ranks print is in logs/, and their errors are told in a few lines",
        "multi_gpu": "a GPU is taken for each rank",
        "same_network": "nodes meet at launcher.head_address",
        "role": "ranks of a run have one role",
        "monitor_interval": "a rank that ends is noticed at once",
        "module": "the program is Shardwright's own",
        "no_python": "the program is Shardwright's own",
        "main_training_function": "the program is Shardwright's own",
        "zero3_init_flag": "no rank holds the whole model, at any stage",
        "fsdp_version": "it is FSDP2",
        "fsdp_state_dict_type": "checkpoints are sharded, and final/ is whole",
        "fsdp_use_orig_params": "FSDP2 keeps the parameters themselves",
        "fsdp_cpu_ram_efficient_loading": "each rank reads its own part of the weights",
        "fsdp_sync_module_states": "each rank draws or reads its own part of the weights",
    },
    left_out={
        "use_parallelism_config": "ranks divide data and states, not layers or samples",
        "use_megatron_lm": "ranks divide data and states, and Megatron-LM is no engine",
        "deepspeed_moe_layer_cls_names": "mixtures of experts are sharded as any block is",
        "vm": "ranks are on GPUs or CPUs, not on TPUs",
        "env": "ranks are on GPUs or CPUs, not on TPUs",
        "downcast_bf16": "ranks are on GPUs or CPUs, not on TPUs",
    },
)


def row(name: str) -> Row | None:
    """Return the answer to one of accelerate's names; None to what is none of them. Pure."""
    if (own := ACCELERATE_LAUNCH.get(name)) is not None:
        return own
    return next((each for start, each in EACH_ELSE.items() if name.startswith(start)), None)
