"""All sections of a run together, before it is known that they agree."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shardwright.train.config.adapter import AdapterConfig, NoAdapter
from shardwright.train.config.checkpoint import CheckpointConfig
from shardwright.train.config.data import DataConfig
from shardwright.train.config.launcher import LauncherConfig
from shardwright.train.config.model import ModelConfig
from shardwright.train.config.objective import ObjectiveConfig
from shardwright.train.config.precision import PrecisionConfig
from shardwright.train.config.section import Section
from shardwright.train.config.strategy import StrategyConfig
from shardwright.train.config.tokenizer import TokenizerConfig
from shardwright.train.config.tracking import TrackingConfig
from shardwright.train.config.trainer import TrainerConfig


class Sections(Section):
    """Every setting of a run; `RunConfig` is one whose sections agree."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Names the run directory and the run in the tracker."""
    run_dir: str | None = None
    """Directory to create for the run; null is runs/<name>-<time>."""
    sweep_dir: str | None = None
    """With -m: the directory that holds one run directory for each job."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Fixes initial weights, data order, masking and dropout."""

    model: ModelConfig
    adapter: AdapterConfig = Field(default_factory=NoAdapter)
    objective: ObjectiveConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    strategy: StrategyConfig
    precision: PrecisionConfig
    trainer: TrainerConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    tracking: TrackingConfig
    launcher: LauncherConfig

    @property
    def tokens_per_sample(self) -> int:
        """Tokens that training counts of a sample: data.sequence_length, and of an encoder-decoder
        what it predicts as well."""
        return self.objective.positions(self.data.tokens_per_sample)

    @property
    def left_to_the_plan(self) -> tuple[str, ...]:
        """The settings that say auto where a plan has to choose, as they are typed."""
        values = {
            "strategy": self.strategy.kind,
            "trainer.micro_batch_size": self.trainer.micro_batch_size,
            "trainer.checkpoint_activations_every_blocks": (
                self.trainer.checkpoint_activations_every_blocks
            ),
        }
        return tuple(name for name, value in values.items() if value == "auto")
