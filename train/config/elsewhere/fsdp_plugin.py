"""The fields of accelerate's FSDP plugin, as of `fsdp_config`, and what to write here instead."""

from __future__ import annotations

from shardwright.train.config.elsewhere.row import rows

FSDP_PLUGIN = rows(
    fields={
        "sharding_strategy": "strategy=fsdp, fsdp_grad_op, fsdp_hybrid or ddp",
        "reshard_after_forward": "strategy.reshard_after_forward",
        "backward_prefetch": "strategy.prefetch_units",
        "forward_prefetch": "strategy.prefetch_units",
        "limit_all_gathers": "strategy.prefetch_units",
        "mixed_precision_policy": "precision.compute_dtype and precision.reduce_dtype",
        "auto_wrap_policy": "strategy.wrap=transformer, size or none",
        "cpu_offload": "strategy=fsdp_offload",
        "transformer_cls_names_to_wrap": "strategy.block_class",
        "transformer_layer_cls_to_wrap": "strategy.block_class",
        "min_num_params": "strategy.wrap=size and strategy.min_unit_parameters",
        "activation_checkpointing": "trainer.checkpoint_activations_every_blocks=1",
        "activation_checkpointing_offload": "trainer.offload_activations",
    },
    commands={},
    derived={
        "fsdp_version": "it is FSDP2",
        "state_dict_type": "checkpoints are sharded, and final/ is whole",
        "state_dict_config": "checkpoints are sharded, and final/ is whole",
        "optim_state_dict_config": "checkpoints are sharded",
        "use_orig_params": "FSDP2 keeps the parameters themselves",
        "param_init_fn": "no rank holds the whole model while it is built",
        "sync_module_states": "each rank draws or reads its own part of the weights",
        "cpu_ram_efficient_loading": "each rank reads its own part of the weights",
    },
    left_out={
        "ignored_modules": "every parameter is sharded",
    },
)
