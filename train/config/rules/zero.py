"""What DeepSpeed ZeRO cannot honour."""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.train.config.rank_layout import RankLayout
from shardwright.train.config.rules import deepspeed_keys
from shardwright.train.config.sections import Sections
from shardwright.train.config.strategy import ZeroStrategy

OPTIMIZER_BUFFERS = "nvme_optimizer_buffer_count"


def contradictions(config: Sections, layout: RankLayout | None) -> Iterator[str]:
    """Yield a message for each value that ZeRO cannot honour. Pure.

    ``layout`` is None where it is not known yet.
    """
    strategy = config.strategy
    assert isinstance(strategy, ZeroStrategy)
    yield from _offload(strategy)
    yield from _fields_of_other_stages(strategy)
    yield from _ranks_and_kernels(config, strategy, layout)
    yield from _masters_in_bf16(config, strategy)
    yield from _cpu_adam(config, strategy)
    yield from _fp8(config, strategy)
    yield from _saves_in_the_background(config, strategy)
    yield from deepspeed_keys.problems(strategy.extra)


def _offload(strategy: ZeroStrategy) -> Iterator[str]:
    """Yield why what is to leave the GPU cannot lie where it is to."""
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
    if strategy.nvme_fast_init and {adam, parameters} != {"nvme"}:
        yield (
            "strategy.nvme_fast_init=true brings weights from a disk to a disk, but "
            f"strategy.offload_optimizer={adam} and strategy.offload_parameters={parameters}; set "
            "both to nvme, or nvme_fast_init=false"
        )
    buffers = strategy.nvme_optimizer_buffer_count
    if adam != "nvme" and buffers != ZeroStrategy.model_fields[OPTIMIZER_BUFFERS].default:
        yield (
            f"strategy.{OPTIMIZER_BUFFERS}={buffers} is read under "
            f"strategy.offload_optimizer=nvme only, but it is {adam}; leave it out"
        )


def _fields_of_other_stages(strategy: ZeroStrategy) -> Iterator[str]:
    """Yield which fields are set that the stage does not read."""
    stage = strategy.stage
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


def _ranks_and_kernels(
    config: Sections, strategy: ZeroStrategy, layout: RankLayout | None
) -> Iterator[str]:
    """Yield which ways to communicate this number of ranks, or their device, does not have."""
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


def _masters_in_bf16(config: Sections, strategy: ZeroStrategy) -> Iterator[str]:
    """Yield why the masters cannot be in bf16, where they are to be."""
    stage, adam = strategy.stage, strategy.offload_optimizer
    if config.precision.master_dtype != "bf16":
        return
    if stage == 0:
        yield (
            "precision.master_dtype=bf16 under ZeRO needs strategy.stage=1, 2 or 3, but it is 0; "
            "choose another stage or precision=bf16"
        )
    if adam != "none" and strategy.cpu_adam == "torch":
        yield (
            f"precision.master_dtype=bf16 with strategy.offload_optimizer={adam} needs DeepSpeed's "
            "own Adam; set strategy.cpu_adam=deepspeed, or precision=bf16"
        )


def _cpu_adam(config: Sections, strategy: ZeroStrategy) -> Iterator[str]:
    """Yield why DeepSpeed's Adam on the CPU is not what is to step."""
    optimizer = config.trainer.optimizer
    if strategy.cpu_adam == "deepspeed" and strategy.offload_optimizer == "none":
        yield (
            "strategy.cpu_adam=deepspeed needs an optimizer in host memory, but "
            "strategy.offload_optimizer=none; choose strategy=zero2_offload or zero3_offload, or "
            "strategy.cpu_adam=torch"
        )
    if strategy.cpu_adam == "deepspeed" and optimizer != "adamw":
        yield (
            "strategy.cpu_adam=deepspeed is an AdamW, but trainer.optimizer="
            f"{optimizer}; set strategy.cpu_adam=torch or trainer.optimizer=adamw"
        )


def _fp8(config: Sections, strategy: ZeroStrategy) -> Iterator[str]:
    recipe = config.precision.fp8_recipe
    if recipe is not None and strategy.stage == 3:
        yield (
            f"precision.fp8_recipe={recipe} under strategy.stage=3 would keep every "
            "gathered weight until the backward pass; choose strategy=fsdp or zero2, or "
            "precision=bf16"
        )


def _saves_in_the_background(config: Sections, strategy: ZeroStrategy) -> Iterator[str]:
    if config.checkpoint.asynchronous and strategy.offload_optimizer == "nvme":
        yield (
            "checkpoint.async=true copies the state to host memory before it is written, but "
            "strategy.offload_optimizer=nvme keeps it on a disk because there is no room for it "
            "in host memory; set checkpoint.async=false"
        )
