"""Where an optimizer cannot work: what it says of itself, against engine and precision."""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.train.config.optimizers import OPTIMIZERS
from shardwright.train.config.sections import Sections
from shardwright.train.config.strategy import FsdpStrategy, ZeroStrategy


def contradictions(config: Sections) -> Iterator[str]:
    """Yield a message for each thing that the optimizer does not allow. Pure."""
    name, strategy = config.trainer.optimizer, config.strategy
    facts, masters = OPTIMIZERS[name], config.precision.master_dtype
    if facts.why_fp32_masters is not None and masters != "fp32":
        yield (
            f"trainer.optimizer={name} with precision.master_dtype={masters}: "
            f"{facts.why_fp32_masters}; set precision=bf16 (fp32 masters) or "
            "trainer.optimizer=adamw"
        )
    if facts.why_not_flat and isinstance(strategy, ZeroStrategy) and strategy.stage > 0:
        others = "fsdp, ddp or zero0" if facts.takes_sharded else "ddp or zero0"
        reason = facts.why_not_deepspeeds
        own = f" (DeepSpeed's own {reason})" if reason else ""
        yield (
            f"trainer.optimizer={name} {facts.why_not_flat}{own}, but strategy.stage="
            f"{strategy.stage} flattens the parameters into one-dimensional partitions; choose "
            f"strategy={others}, or trainer.optimizer=adamw"
        )
    yield from _average_contradictions(config)
    if not isinstance(strategy, FsdpStrategy):
        return
    if not facts.takes_sharded:
        *first, last = [other for other, those in OPTIMIZERS.items() if those.takes_sharded]
        yield (
            f"trainer.optimizer={name} does not work on the sharded tensors of strategy=fsdp; "
            f"choose strategy=ddp or zero0, or trainer.optimizer={', '.join(first)} or {last}"
        )
    if facts.is_for_gpus and strategy.offload:
        yield (
            f"trainer.optimizer={name} with strategy.offload=true would do its arithmetic, "
            "which is made for GPUs, on the CPU; set strategy.offload=false, or "
            "trainer.optimizer=adamw"
        )
    if not facts.takes_sharded_bf16 and masters != "fp32":
        yield (
            f"trainer.optimizer={name} under strategy=fsdp needs precision.master_dtype=fp32, "
            f"but it is {masters}; choose precision=bf16 or strategy=ddp"
        )


def _average_contradictions(config: Sections) -> Iterator[str]:
    """Yield why an optimizer that keeps an average of its own cannot."""
    name, strategy, kind = config.trainer.optimizer, config.strategy, config.trainer.average_weights
    if not OPTIMIZERS[name].averages_itself:
        return
    if kind is not None:
        yield (
            f"trainer.optimizer={name} keeps an average of the weights itself, which is what is "
            f"evaluated and exported, but trainer.average_weights={kind}; set it to null"
        )
    if strategy.uses_nvme:
        yield (
            f"trainer.optimizer={name} has its average between weights and moments, which "
            f"strategy={strategy.kind} keeps on a disk (offload_optimizer or "
            "offload_parameters=nvme); offload to cpu, or choose trainer.optimizer=adamw"
        )
    if getattr(strategy, "node_local_checkpoints", False):
        yield (
            f"trainer.optimizer={name} writes its average divided among all ranks alike, but with "
            "strategy.node_local_checkpoints=true a node can read only what its own ranks wrote; "
            "set it to false, or choose trainer.optimizer=adamw"
        )
