"""What torch.compile has made of the blocks: said after the first step, and kept with the facts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TextIO

from transformers import TrainerCallback

from shardwright.train.console import progress
from shardwright.train.durable import write_text
from shardwright.train.model import compilation
from shardwright.train.model.blocks import blocks
from shardwright.train.run_directory.names import ENGINE_JSON

if TYPE_CHECKING:
    from shardwright.train.loop.trainer import Trainer


class Compilation(TrainerCallback):
    """Says on rank 0 into how many graphs, and when the compiler gives up, which it does silently.

    Not on a run that compiles nothing.
    """

    def __init__(self, trainer: Trainer, console: TextIO) -> None:
        self._trainer, self._console = trainer, console
        self._before = compilation.found()
        self._is_said = self._is_warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = compilation.found()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._is_said:
            self._is_said = True
            self._say(
                compilation.found().since(self._before).said(len(blocks(self._trainer.model)))
            )
            self._note()
        self._warn()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._warn()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_said:
            self._note()

    def _warn(self) -> None:
        if self._is_warned:
            return
        if warning := compilation.found().since(self._before).warning():
            self._is_warned = True
            self._say(warning)
            self._note()

    def _say(self, text: str) -> None:
        if self._trainer.is_world_process_zero():
            progress.write(text, self._console)

    def _note(self) -> None:
        if not self._trainer.is_world_process_zero():
            return
        path = self._trainer.run_dir / ENGINE_JSON
        facts = json.loads(path.read_text())
        facts["compilation"] = compilation.found().since(self._before).facts()
        write_text(path, json.dumps(facts, indent=2) + "\n")
