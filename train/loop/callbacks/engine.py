"""Stop a run whose live engine is not what the config asks for; say in which precision it runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TextIO

from transformers import TrainerCallback

from shardwright.train.console import progress
from shardwright.train.durable import write_text
from shardwright.train.loop import isolation, random_numbers
from shardwright.train.loop.resuming import restore
from shardwright.train.run_directory import final
from shardwright.train.run_directory.names import ENGINE_JSON
from shardwright.train.strategy import verify

if TYPE_CHECKING:
    from shardwright.train.loop.trainer import Trainer


class EngineReady(TrainerCallback):
    """Completes the engine once it is built, restores it or begins, reads it back, says its dtypes.

    Only here does a rank's stream of random numbers begin: the Trainer gives all the same seed.
    """

    def __init__(self, trainer: Trainer, console: TextIO) -> None:
        self.trainer = trainer
        self._console = console

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.engine.complete(trainer)
        if trainer.config.trainer.on_spike == "skip_update":
            trainer.engine.skip_by_gate(trainer)
        trainer.initial_values = {}  # they may hold the whole model
        if trainer.resumed is not None:
            restore(trainer, trainer.resumed)
        else:
            part = trainer.layout.data_parallel_rank(args.process_index)
            random_numbers.begin(trainer.config.seed, 0, part)
        trainer.watch.attach(trainer.model)
        facts = verify.verify(trainer.engine, trainer)
        facts |= isolation.check(trainer)
        if state.is_world_process_zero:
            path = trainer.run_dir / ENGINE_JSON
            write_text(path, json.dumps(facts, indent=2) + "\n")
            if state.global_step < state.max_steps:
                final.set_aside(trainer.run_dir)
            progress.write(precision_line(facts), self._console)


def precision_line(facts: dict[str, Any]) -> str:
    """Return in one line which number is in which dtype, in the same words for every engine.

    ``facts`` are those of `strategy.verify.verify`. Pure.
    """
    name = _NAMES.get(facts["engine"], facts["engine"])
    if name == "zero":
        name += str(facts["stage"])
    ranks = "1 rank" if facts["world_size"] == 1 else f"{facts['world_size']} ranks"
    precision = facts["precision"]
    compute = f"{precision['compute']} compute"
    if facts["fp8_recipe"] is not None:
        layers = f"{facts['fp8_layers']} linear layers"
        if facts["fp8_layers_left_out"]:
            layers += f" ({facts['fp8_layers_left_out']} left out)"
        compute += f" with {facts['fp8_recipe']} fp8 products in {layers}"
    elif facts["tf32"]:
        compute += " with TF32 products"
    parts = [
        compute,
        *([f"{precision['reduction']} reduction"] if precision["reduction"] != "none" else []),
        f"{precision['master']} master weights",
        f"{precision['moments']} moments",
    ]
    if facts["attention"] != "sdpa":  # which almost all architectures have
        parts.append(f"{facts['attention']} attention")
    if not facts["fused_loss"]:  # which almost all architectures allow
        parts.append("loss of all logits at once")
    if facts["initial_loss_scale"] is not None:
        parts.append(f"loss scale {facts['initial_loss_scale']:g}")
    return f"{name} on {ranks}: {', '.join(parts)}"


_NAMES = {
    "none": "single",
    "DistributedDataParallel": "ddp",
    "DeepSpeedEngine": "zero",
    "FSDP2": "fsdp",
}
