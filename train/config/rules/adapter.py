"""Where an adapter cannot be trained: what it needs of the model, the engine and the trainer."""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.train.config.optimizers import OPTIMIZERS
from shardwright.train.config.sections import Sections


def contradictions(config: Sections) -> Iterator[str]:
    """Yield a message for each thing that an adapter does not allow. Pure."""
    adapter, trainer, strategy = config.adapter, config.trainer, config.strategy
    if adapter.trains_all:
        return
    yield from adapter.contradictions()
    what = f"adapter={adapter.kind}"
    if config.model.kind != "pretrained":
        yield (
            f"{what} is trained beside weights that stay as they are, but model.kind="
            f"{config.model.kind} begins from random ones; choose model=pretrained model.name=..., "
            "or adapter=none"
        )
    if trainer.average_weights is not None:
        yield (
            f"{what} with trainer.average_weights={trainer.average_weights} would average the "
            "weights that stay as they are, too; set it to null"
        )
    facts = OPTIMIZERS[trainer.optimizer]
    if facts.averages_itself or facts.works_on_whole_matrices:
        yield (
            f"{what} with trainer.optimizer={trainer.optimizer}, which is made for all weights of "
            "a model; choose trainer.optimizer=adamw"
        )
    yield from _gathered_contradictions(config)
    if config.precision.fp8_recipe is not None:
        yield (
            f"{what} with precision.fp8_recipe={config.precision.fp8_recipe}, which converts "
            "linear layers that peft then does not know; choose precision=bf16"
        )
    if getattr(strategy, "node_local_checkpoints", False):
        yield (
            f"{what} has final/ made of a whole checkpoint, but "
            "strategy.node_local_checkpoints=true leaves it on several nodes' disks; set it to "
            "false"
        )


def _gathered_contradictions(config: Sections) -> Iterator[str]:
    """Yield where a layer's weight is gathered for its own forward pass alone.

    DoRA reads it once more beside that (peft 0.21, tuners/lora/dora.py, DoraLinearLayer.forward).
    ZeRO-3 gathers what is read anywhere (deepspeed 0.19, parameter_offload.py, ZeROOrderedDict).
    """
    strategy = config.strategy
    if config.adapter.kind == "dora" and getattr(strategy, "wrap", None) == "size":
        yield (
            "adapter=dora reads each layer's weight beside the layer, which strategy.wrap=size may "
            "gather for itself alone; set strategy.wrap=transformer, or choose adapter=lora"
        )
