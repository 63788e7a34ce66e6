"""What engines, saves and resumes need of a live training: all that they know of the loop above."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedModel, TrainerState, TrainingArguments

    from train.config import RankLayout, RunConfig, Schedule
    from train.model.weights import Values
    from train.strategy.finite import Gate


class Training(Protocol):
    """A training whose engine is built."""

    config: RunConfig
    layout: RankLayout
    schedule: Schedule
    run_dir: Path
    args: TrainingArguments
    state: TrainerState
    accelerator: Accelerator
    model: PreTrainedModel
    model_wrapped: Any
    """The live engine: DDP's or DeepSpeed's wrapper, or the model itself."""
    lr_scheduler: Any
    gate: Gate
    initial_values: Values
    """The model's first values in fp32, until the engine is complete."""
    saved_step: int | None
    """Step of the newest whole checkpoint of this training."""
    tokens_seen: int
    """Tokens trained on by all ranks, padding left out."""
    auxiliary_loss: torch.Tensor | None
    """This rank's part of the model's auxiliary losses since the last logged step."""
    _tr_loss: Any
    _globalstep_last_logged: int

    @property
    def samples_seen(self) -> int:
        """Samples trained on by all ranks: the position in the data."""

    def torch_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer without accelerate's wrapper."""

    def innermost_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer without any wrapper."""

    def is_world_process_zero(self) -> bool:
        """Whether this is the first rank."""

    def check_finite(self, *, weights: bool = False) -> None:
        """Raise Diverged, on all ranks alike, where this step was not finite. Collective."""

    def evaluation_of_this_step(self) -> dict[str, float]:
        """Return what an evaluation has measured at this step; nothing where there was none."""
