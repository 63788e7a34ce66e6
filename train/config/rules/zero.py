"""What DeepSpeed ZeRO cannot honour."""

from __future__ import annotations

from collections.abc import Iterator

from train.config.rank_layout import RankLayout
from train.config.rules import deepspeed_keys
from train.config.sections import Sections
from train.config.strategy import ZeroStrategy


def contradictions(config: Sections, layout: RankLayout | None) -> Iterator[str]:
    """Yield a message for each value that ZeRO cannot honour. Pure.

    ``layout`` is None where it is not known yet.
    """
    strategy, precision = config.strategy, config.precision
    assert isinstance(strategy, ZeroStrategy)
    stage, adam, parameters = (
        strategy.stage,
        strategy.offload_optimizer,
        strategy.offload_parameters,
    )

    if stage == 0 and adam != "none":
        yield (
            f"strategy.offload_optimizer={adam} needs a stage that shards the optimizer, but "
            "strategy.stage=0; choose strategy=zero2_offload, or strategy.offload_optimizer=none"
        )
    for name, device in (("offload_optimizer", adam), ("offload_parameters", parameters)):
        if device == "nvme" and stage != 3:
            yield (
                f"strategy.{name}=nvme needs strategy.stage=3, but it is {stage}; "
                f"choose strategy=zero3_nvme, or strategy.{name}=cpu"
            )
    if parameters == "cpu" and stage != 3:
        yield (
            f"strategy.offload_parameters=cpu needs strategy.stage=3, but it is {stage}; "
            "choose strategy=zero3_offload, or strategy.offload_parameters=none"
        )
    if parameters != "none" and adam == "none":
        yield (
            f"strategy.offload_parameters={parameters} without strategy.offload_optimizer keeps "
            "the larger part on the GPU; offload the optimizer too (cpu or nvme)"
        )
    if strategy.uses_nvme and strategy.nvme_path is None:
        yield "strategy.nvme_path is not set, but nvme is requested; give a folder on a fast disk"
    if strategy.nvme_path is not None and not strategy.uses_nvme:
        yield (
            f"strategy.nvme_path={strategy.nvme_path} is given, but nothing is offloaded to nvme; "
            "choose strategy=zero3_nvme, or set it to null"
        )
    for name, wanted in (
        ("hierarchical_partition_ranks", strategy.hierarchical_partition_ranks > 1),
        ("quantized_weights", strategy.quantized_weights),
        ("quantized_gradients", strategy.quantized_gradients),
        ("gather_16bit_weights_on_save", strategy.gather_16bit_weights_on_save),
    ):
        if wanted and stage != 3:
            yield (
                f"strategy.{name}={getattr(strategy, name)} needs strategy.stage=3, but it is "
                f"{stage}; choose strategy=zero3 or leave it out"
            )
    if strategy.round_robin_gradients and stage not in (1, 2):
        yield (
            f"strategy.round_robin_gradients=true needs strategy.stage=1 or 2, but it is {stage}; "
            "set it to false"
        )
    ranks = strategy.hierarchical_partition_ranks
    if layout is not None and layout.data_parallel_size % ranks:
        yield (
            f"strategy.hierarchical_partition_ranks={ranks} does not divide the "
            f"{layout.data_parallel_size} rank(s); choose a divisor"
        )
    for name in ("quantized_weights", "quantized_gradients"):
        if getattr(strategy, name) and config.launcher.device == "cpu":
            yield (
                f"strategy.{name}=true needs DeepSpeed's GPU kernels, but launcher.device=cpu; "
                "set it to false"
            )
    if precision.master_dtype == "bf16" and stage == 0:
        yield (
            "precision.master_dtype=bf16 under ZeRO needs strategy.stage=1, 2 or 3, but it is 0; "
            "choose another stage or precision=bf16"
        )
    if precision.master_dtype == "bf16" and adam != "none" and strategy.cpu_adam == "torch":
        yield (
            f"precision.master_dtype=bf16 with strategy.offload_optimizer={adam} needs DeepSpeed's "
            "own Adam; set strategy.cpu_adam=deepspeed, or precision=bf16"
        )
    if strategy.cpu_adam == "deepspeed" and adam == "none":
        yield (
            "strategy.cpu_adam=deepspeed needs an optimizer in host memory, but "
            "strategy.offload_optimizer=none; choose strategy=zero2_offload or zero3_offload, or "
            "strategy.cpu_adam=torch"
        )
    if strategy.cpu_adam == "deepspeed" and config.trainer.optimizer != "adamw":
        yield (
            "strategy.cpu_adam=deepspeed is an AdamW, but trainer.optimizer="
            f"{config.trainer.optimizer}; set strategy.cpu_adam=torch or trainer.optimizer=adamw"
        )
    if precision.fp8_recipe is not None and stage == 3:
        yield (
            f"precision.fp8_recipe={precision.fp8_recipe} under strategy.stage=3 would keep every "
            "gathered weight until the backward pass; choose strategy=fsdp or zero2, or "
            "precision=bf16"
        )
    if config.checkpoint.asynchronous and adam == "nvme":
        yield (
            "checkpoint.async=true copies the state to host memory before it is written, but "
            "strategy.offload_optimizer=nvme keeps it on a disk because there is no room for it "
            "in host memory; set checkpoint.async=false"
        )
    yield from deepspeed_keys.problems(strategy.extra)
