"""Stop a run whose live engine is not what the config asks for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from train import strategy

if TYPE_CHECKING:
    from train.trainer import Trainer


class EngineReady(TrainerCallback):
    """Completes the engine once it is built, reads it back and writes engine.json."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        strategy.engine_of(trainer.config).complete(trainer)
        facts = strategy.verify(trainer, trainer.config, args.world_size)
        if state.is_world_process_zero:
            path = trainer.run_dir / "engine.json"
            path.write_text(json.dumps(facts, indent=2) + "\n")
