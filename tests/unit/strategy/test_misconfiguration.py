"""Sixty and more ways to ask for what cannot be, each refused with the field, values and remedy."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from shardwright.train.config import from_tree
from shardwright.train.errors import UserError
from tests.unit.trees import BF16, CPU3, FSDP, PURE, TREE, ZERO2, ZERO3

ZERO0 = {"kind": "zero", "stage": 0}
ZERO1 = {"kind": "zero", "stage": 1}
MUON = {"optimizer": "muon"}
OWN_ADAM = {"offload_optimizer": "cpu", "cpu_adam": "deepspeed"}
FP8 = {**BF16, "fp8_recipe": "tensorwise"}
LLAMA = {**TREE["model"], "kind": "llama", "num_key_value_heads": 2}


def zero_extra(**extra: Any) -> dict[str, Any]:
    return {"strategy": {**ZERO2, "extra": extra}}


def trainer(**fields: Any) -> dict[str, Any]:
    return {"trainer": {**TREE["trainer"], **fields}}


BAD: list[tuple[dict[str, Any], str]] = [
    # keys that an engine would ignore, at each level
    ({"strategy": {**ZERO2, "stge": 2}}, "unknown key strategy.stge: did you mean strategy.stage"),
    ({"strategy": {**ZERO2, "overlap_comm": True}}, "unknown key strategy.overlap_comm"),
    ({"strategy": {**ZERO3, "aio": {"queue_dept": 8}}}, "strategy.aio.queue_dep"),
    ({"strategy": {**FSDP, "replica": 2}}, "did you mean strategy.replicas"),
    ({"strategy": {**FSDP, "stage": 2}}, "strategy.stage is not a setting of strategy.kind=fsdp"),
    ({"strategy": {"kind": "ddp", "replicas": 2}}, "strategy.replicas is not a setting"),
    ({"precision": {"compute_dtyp": "bf16"}}, "did you mean precision.compute_dtype"),
    (zero_extra(gradient_cliping=1.0), "gradient_clipping is decided by trainer.max_grad_norm"),
    (zero_extra(train_batch_size=64), "is decided by trainer.global_batch_size"),
    (zero_extra(train_micro_batch_size_per_gpu=8), "is decided by trainer.micro_batch_size"),
    (zero_extra(gradient_accumulation_steps=2), "is decided by trainer.global_batch_size"),
    (zero_extra(optimizer={"type": "Adam"}), "is decided by trainer.optimizer"),
    (zero_extra(scheduler={"type": "WarmupLR"}), "is decided by trainer.lr_scheduler"),
    (zero_extra(amp={"enabled": True}), "is decided by precision.compute_dtype"),
    (zero_extra(torch_autocast={"enabled": True}), "is decided by precision.compute_dtype"),
    (zero_extra(communication_data_type="fp16"), "is decided by precision.reduce_dtype"),
    (zero_extra(aio={"queue_depth": 4}), "strategy.extra.aio is decided by strategy.aio"),
    (zero_extra(wall_clock_brakdown=True), "did you mean wall_clock_breakdown"),
    (zero_extra(nonsense_key=1), "DeepSpeed has no such key and would ignore it"),
    (
        zero_extra(data_efficiency={"enabled": True}),
        "strategy.extra.data_efficiency: leave it out, it is not included: data are prepared",
    ),
    (
        zero_extra(zero_optimization={"cpu_offload": True}),
        "strategy.extra.zero_optimization.cpu_offload: use strategy.offload_optimizer=cpu",
    ),
    (zero_extra(bf16={"enabled": True}), "bf16.enabled is decided by precision.compute_dtype"),
    (zero_extra(bf16={"imediate_grad_update": True}), "did you mean bf16.immediate_grad_update"),
    (zero_extra(fp16={"enabled": True}), "fp16.enabled is decided by precision.compute_dtype"),
    (zero_extra(fp16={"histeresis": 2}), "did you mean fp16.hysteresis"),
    (zero_extra(fp16=True), "strategy.extra.fp16=true: must be a section"),
    (zero_extra(zero_optimization={"stage": 3}), "zero_optimization.stage is decided by"),
    (zero_extra(zero_optimization={"overlap_com": True}), "overlap_comm is decided by strategy."),
    (
        zero_extra(zero_optimization={"leaf_modul": {}}),
        "did you mean zero_optimization.leaf_module",
    ),
    (zero_extra(checkpoint={"use_node_local_storage": True}), "strategy.node_local_checkpoints"),
    (zero_extra(checkpoint={"tag_validatio": "Fail"}), "did you mean checkpoint.tag_validation"),
    (zero_extra(flops_profiler={"enable": True}), "did you mean flops_profiler.enabled"),
    (zero_extra(comms_logger={"verbos": True}), "did you mean comms_logger.verbose"),
    (zero_extra(data_types={"grad_accum_dtype": "bf16"}), "is decided by precision.reduce_dtype"),
    # offload without its stage or its place
    (
        {"strategy": {**ZERO0, "offload_optimizer": "cpu"}},
        "needs a stage that shards the optimizer",
    ),
    ({"strategy": {**ZERO2, "offload_optimizer": "nvme"}}, "offload_optimizer=nvme needs strategy"),
    ({"strategy": {**ZERO2, "offload_parameters": "cpu"}}, "offload_parameters=cpu needs strategy"),
    ({"strategy": {**ZERO1, "offload_parameters": "nvme"}}, "choose strategy=zero3_nvme"),
    ({"strategy": {**ZERO3, "offload_parameters": "cpu"}}, "offload the optimizer too"),
    ({"strategy": {**CPU3, "offload_parameters": "nvme"}}, "strategy.nvme_path is not set"),
    ({"strategy": {**CPU3, "nvme_path": "/disk"}}, "nothing is offloaded to nvme"),
    (
        {"strategy": {**CPU3, "nvme_fast_init": True}},
        "strategy.nvme_fast_init=true brings weights from a disk to a disk, but "
        "strategy.offload_optimizer=cpu and strategy.offload_parameters=none; set both to nvme, or "
        "nvme_fast_init=false",
    ),
    (
        {"strategy": {**CPU3, "nvme_optimizer_buffer_count": 6}},
        "strategy.nvme_optimizer_buffer_count=6 is read under strategy.offload_optimizer=nvme "
        "only, but it is cpu; leave it out",
    ),
    (
        {"strategy": {**ZERO2, "offload_optimizer": "gpu"}},
        "offload_optimizer=gpu: must be none, cpu or nvme",
    ),
    # stage 3's own settings at another stage, and groups that do not divide
    ({"strategy": {**ZERO2, "hierarchical_partition_ranks": 2}}, "needs strategy.stage=3"),
    ({"strategy": {**ZERO2, "quantized_weights": True}}, "quantized_weights=True needs strategy"),
    ({"strategy": {**ZERO1, "quantized_gradients": True}}, "quantized_gradients=True needs strat"),
    ({"strategy": {**ZERO2, "gather_16bit_weights_on_save": True}}, "needs strategy.stage=3"),
    ({"strategy": {**ZERO3, "round_robin_gradients": True}}, "needs strategy.stage=1 or 2"),
    ({"strategy": {**ZERO3, "hierarchical_partition_ranks": 3}}, "does not divide the 4 rank"),
    ({"strategy": {**ZERO3, "stage": 4}}, "strategy.stage=4"),
    ({"strategy": {**ZERO2, "reduce_bucket_elements": "big"}}, "strategy.reduce_bucket_elements"),
    ({"strategy": {**ZERO2, "reduce_bucket_elements": 0}}, "strategy.reduce_bucket_elements=0"),
    (
        {
            "strategy": {**ZERO3, "quantized_weights": True},
            "launcher": {"kind": "torchrun", "nproc_per_node": 4, "device": "cpu"},
        },
        "quantized_weights=true needs DeepSpeed's GPU kernels",
    ),
    # FSDP
    ({"strategy": {**FSDP, "replicas": 3}}, "replicas=3 does not divide the 4 rank"),
    ({"strategy": {**FSDP, "replicas": 4}}, "replicas=4 on 4 rank.s. shards nothing"),
    ({"strategy": {**FSDP, "replicas": 0}}, "strategy.replicas=0"),
    (
        {"strategy": {**FSDP, "wrap": "blocks"}},
        "strategy.wrap=blocks: must be transformer, size or none",
    ),
    (
        {"strategy": {**FSDP, "wrap": "size", "block_class": ["GPT2Block", "GPT2MLP"]}},
        "strategy.block_class=GPT2Block,GPT2MLP is read under strategy.wrap=transformer only, but "
        "it is size; set strategy.wrap=transformer or block_class=null",
    ),
    (
        {"strategy": {**FSDP, "reshard_ranks": 2, "reshard_after_forward": False}},
        "strategy.reshard_ranks=2 says among how many ranks parameters are divided between forward "
        "and backward, where strategy.reshard_after_forward=false keeps them whole on each; set "
        "strategy.reshard_ranks=null or change the other",
    ),
    (
        {"strategy": {**FSDP, "reshard_ranks": 2, "wrap": "none"}},
        "where strategy.wrap=none keeps them whole on each",
    ),
    (
        {"strategy": {**FSDP, "reshard_ranks": 1}},
        "strategy.reshard_ranks=1 would keep all parameters on each rank between forward and "
        "backward; say so with strategy.reshard_after_forward=false",
    ),
    (
        {"strategy": {**FSDP, "reshard_ranks": 3}},
        "strategy.reshard_ranks=3 does not divide the 4 shard.s. of the model into several equal "
        "groups; choose a smaller divisor, such as the ranks of a node, or null",
    ),
    (
        {"strategy": {**FSDP, "wrap": "none", "reshard_after_forward": False}},
        "strategy.wrap=none makes the model one unit",
    ),
    # precision
    ({"precision": {"master_dtype": "bf16"}}, "master_dtype=bf16 cannot serve compute_dtype=fp32"),
    ({"precision": {**BF16, "moments_dtype": "bf16"}}, "differs from master_dtype=fp32"),
    ({"precision": {**PURE, "reduce_dtype": "fp32"}}, "reduce_dtype=fp32 with master_dtype=bf16"),
    ({"precision": {"reduce_dtype": "bf16"}}, "would round the gradients of compute_dtype=fp32"),
    (
        {"precision": {"compute_dtype": "fp16", "reduce_dtype": "bf16"}},
        "would round the gradients of compute_dtype=fp16",
    ),
    ({"precision": {"initial_loss_scale": 1000.0}}, "is not a power of two; set it to 1024"),
    (
        {"precision": {"compute_dtype": "float16"}},
        "compute_dtype=float16: must be fp32, bf16 or fp16",
    ),
    ({"precision": PURE, "strategy": ZERO0}, "needs strategy.stage=1, 2 or 3, but it is 0"),
    (
        {"precision": PURE, "strategy": CPU3},
        "master_dtype=bf16 with strategy.offload_optimizer=cpu.*set strategy.cpu_adam=deepspeed",
    ),
    (
        {
            "precision": {**BF16, "reduce_dtype": "bf16"},
            "launcher": {"kind": "torchrun", "nproc_per_node": 4, "device": "cpu"},
        },
        "reduce_dtype=bf16 under strategy=ddp needs NCCL",
    ),
    # optimizers
    ({"trainer": {**TREE["trainer"], "optimizer": "adam"}}, "did you mean adamw"),
    ({"trainer": {**TREE["trainer"], "optim": "muon"}}, "use trainer.optimizer"),
    ({"trainer": {**TREE["trainer"], **MUON, "muon_momentum": 1.0}}, "muon_momentum=1.0: must be"),
    (
        trainer(optimizer="sgd", sgd_momentum=0.0, sgd_nesterov=True),
        "sgd_nesterov=true looks ahead along a momentum, but sgd_momentum=0; raise it or leave",
    ),
    *(
        (
            {"trainer": {**TREE["trainer"], "optimizer": name}, "strategy": strategy},
            f"trainer.optimizer={name} .* strategy.stage={strategy['stage']} flattens the "
            f"parameters into one-dimensional partitions; choose strategy={remedy}, or trainer.opt",
        )
        for name, remedy in (
            ("muon", "fsdp, ddp or zero0"),
            ("adafactor", "ddp or zero0"),
            ("adamw_8bit", "fsdp, ddp or zero0"),
        )
        for strategy in (ZERO1, ZERO2, ZERO3)
    ),
    (
        {"trainer": {**TREE["trainer"], "optimizer": "adafactor"}, "strategy": FSDP},
        "adafactor does not work on the sharded tensors of strategy=fsdp; choose strategy=ddp",
    ),
    (
        {"trainer": {**TREE["trainer"], "optimizer": "adafactor"}, "precision": PURE},
        "trainer.optimizer=adafactor with precision.master_dtype=bf16",
    ),
    *(
        (
            {
                "trainer": {**TREE["trainer"], "optimizer": name},
                "strategy": {**FSDP, "offload": True},
            },
            f"trainer.optimizer={name} with strategy.offload=true",
        )
        for name in ("muon", "adamw_8bit")
    ),
    (
        {
            "trainer": {**TREE["trainer"], "optimizer": "adamw_8bit"},
            "strategy": FSDP,
            "precision": PURE,
        },
        "trainer.optimizer=adamw_8bit under strategy=fsdp needs precision.master_dtype=fp32, but",
    ),
    (
        {"strategy": {**ZERO2, "cpu_adam": "deepspeed"}},
        "cpu_adam=deepspeed needs an optimizer in host memory, but strategy.offload_optimizer=none",
    ),
    (
        {
            "strategy": {"kind": "zero", "stage": 1, **OWN_ADAM},
            "trainer": {**TREE["trainer"], **MUON},
        },
        "cpu_adam=deepspeed is an AdamW, but trainer.optimizer=muon",
    ),
    ({"strategy": {**ZERO2, "cpu_adam": "fused"}}, "cpu_adam=fused: must be torch or deepspeed"),
    (
        zero_extra(zero_optimization={"zenflow": {"topk_ratio": 0.1}}),
        "zenflow takes its hyper-parameters from DeepSpeed's own optimizer section",
    ),
    (
        zero_extra(zero_optimization={"offload_optimizer": {"device": "cpu", "ratio": 0.5}}),
        "offload_optimizer.ratio leaves the part that stays on the GPU without",
    ),
    (
        zero_extra(zero_optimization={"offload_optimizer": {"super_offload": True}}),
        "offload_optimizer.super_offload keeps the moments in a process of its own",
    ),
    (
        zero_extra(zero_optimization={"save_muon_momentum_buffer_in_memory": True}),
        "is read by DeepSpeed's own Muon only; set trainer.optimizer=muon",
    ),
    (
        {"model": {**TREE["model"], "attention": "flash_attention_2"}},
        "attention=flash_attention_2 computes in 16 bits only, but precision.compute_dtype=fp32",
    ),
    (zero_extra(fp16={"loss_scale": 128}), "is decided by precision.initial_loss_scale"),
    ({"precision": {"fp8_recipe": "tensorwise"}}, "but compute_dtype=fp32; set compute_dtype=bf16"),
    ({"precision": {**BF16, "fp8_recipe": "blockwise"}}, "must be tensorwise, rowwise"),
    ({"precision": {**BF16, "fp8": True}}, "unknown key precision.fp8: use precision=fp8"),
    ({"precision": FP8}, "fp8_recipe=tensorwise converts linear layers, but the blocks of model"),
    ({"precision": FP8, "model": LLAMA, "strategy": ZERO3}, "keep every gathered weight"),
    (
        {
            "precision": FP8,
            "model": LLAMA,
            "data": {"kind": "stdlib", "sequence_length": 63},
        },
        "micro_batch_size=8 x data.sequence_length=63 = 504; change one of them",
    ),
    (
        {"precision": FP8, "model": LLAMA, **trainer(deterministic=True)},
        "fp8_recipe=tensorwise with trainer.deterministic=true: nothing says that products in fp8",
    ),
    (trainer(full_determinism=True), "use trainer.deterministic"),
    # activation checkpointing
    (trainer(gradient_checkpointing=True), "use trainer.checkpoint_activations_every_blocks"),
    (trainer(activation_checkpointing=True), "use trainer.checkpoint_activations_every_blocks"),
    (trainer(cpu_checkpointing=True), "use trainer.offload_activations"),
    (trainer(checkpoint_activations_every_blocks=0), "every_blocks=0: must be at least 1"),
    (trainer(checkpoint_activations_every_blocks=3), "=3 is more than model.num_hidden_layers=2"),
    (trainer(offload_activations=True), "every_blocks=null recomputes none"),
    (trainer(recompute="selective"), "recompute=selective says what .*=null recomputes none"),
    (
        trainer(checkpoint_activations_every_blocks=1, recompute="selective", compile=True)
        | {"strategy": {"kind": "zero", "stage": 3}},
        "needs whole blocks, but the hooks of strategy.stage=3",
    ),
    (
        trainer(checkpoint_activations_every_blocks=1, offload_activations=True, compile=True),
        "which trainer.compile=true cannot trace",
    ),
    (
        zero_extra(activation_checkpointing={"cpu_checkpointing": True}),
        "activation_checkpointing is decided by trainer.checkpoint_activations_every_blocks",
    ),
    # strategy and ranks
    (
        {"strategy": {"kind": "single"}},
        "strategy=single runs one rank, but launcher.nproc_per_node",
    ),
    ({"strategy": {"kind": "deepspeed"}}, "strategy"),
]


def test_the_table_is_as_long_as_it_claims() -> None:
    assert len(BAD) >= 60
    assert len({str(change) for change, _ in BAD}) == len(BAD)


def test_the_tree_that_the_table_breaks_is_sound() -> None:
    from_tree(TREE)
    for strategy in (ZERO0, ZERO1, ZERO2, ZERO3, CPU3, FSDP):
        from_tree({**TREE, "strategy": strategy})
    from_tree({**TREE, "precision": PURE})
    from_tree({**TREE, "precision": PURE, "strategy": {**ZERO2, **OWN_ADAM}})
    for name in ("muon", "adafactor", "adamw_8bit"):
        from_tree({**TREE, "trainer": {**TREE["trainer"], "optimizer": name}})
    from_tree({**TREE, "precision": FP8, "model": LLAMA})


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_it_is_refused_with_a_remedy(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_tree({**copy.deepcopy(TREE), **change})
