"""What engines, saves and resumes need of a live training: all that they know of the loop above.

And what saves and resumes need of its engine, whose methods take the training: so both stand here.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel, TrainerState, TrainingArguments

    from shardwright.train.checkpoint.format.hashed import HashedFolder
    from shardwright.train.checkpoint.format.lazy import PortableState
    from shardwright.train.config import RankLayout, RunConfig, Schedule
    from shardwright.train.model.weights import InitialValues
    from shardwright.train.strategy.finite import Gate
    from shardwright.train.strategy.state.average import Average, Learned
    from shardwright.train.strategy.state.host_memory import HostMemory


class EngineState(Protocol):
    """What an engine has to write of model and optimizer; neither method is collective."""

    def write(self, folder: HashedFolder) -> Any:
        """Write this rank's files and return what `finish` wants to know. Raises OSError."""

    def finish(self, folder: HashedFolder, written: list[Any]) -> None:
        """On the first rank of a disk, add what is known only now. Raises OSError.

        ``written`` is what `write` has returned on each rank of that disk, in their order.
        """


class Stateful(Protocol):
    """An engine, as saves and resumes see it."""

    @abstractmethod
    def save_state(
        self, trainer: Training, *, is_first: bool, into: HostMemory | None
    ) -> EngineState:
        """Return what this rank writes of model and optimizer: the engine's own sharded files.

        Collective, and touches no disk. With ``is_first`` also what its disk needs once. Copied
        ``into`` host memory it lets training continue before it is written.
        """

    @abstractmethod
    def restore_optimizer(self, trainer: Training, state: PortableState) -> None:
        """Give the live optimizer the moments of a checkpoint: each rank reads its own part.

        Raises UserError where the checkpoint's optimizer is another one.
        """


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
    optimizer: Any
    """The wrapper of accelerate or DeepSpeed."""
    lr_scheduler: Any
    gate: Gate
    initial_values: InitialValues
    """The model's first values in fp32, until the engine is complete."""
    saved_step: int | None
    """Step of the newest whole checkpoint of this training."""
    tokens_seen: int
    """Tokens trained on by all ranks, padding left out."""
    see_local_gradients: Callable[[torch.Tensor], object] | None
    """Called with what a rank hands to be averaged, where the engine shows that."""
    average: Average | Learned | None
    """The average of the weights, where one is kept."""
    auxiliary_loss: torch.Tensor | None
    """This rank's part of the model's auxiliary losses since the last logged step."""
    before_clipping: Callable[[], object] | None
    """Called in each step once its gradients are reduced, where the engine leaves that to us."""
    _tr_loss: Any
    _globalstep_last_logged: int

    @property
    def engine(self) -> Stateful:
        """The engine that the config asks for, from before it is built."""

    @property
    def samples_seen(self) -> int:
        """Samples trained on by all ranks: the position in the data."""

    @property
    def batch_size(self) -> int:
        """Samples of the last step, over all ranks."""

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of this rank's batches."""

    def torch_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer without accelerate's wrapper."""

    def innermost_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer without any wrapper."""

    def own_files(self) -> dict[str, str]:
        """Return what a checkpoint holds of the loop itself, by names of files; alike on ranks."""

    def is_world_process_zero(self) -> bool:
        """Whether this is the first rank."""

    def check_finite(self, *, weights: bool = False) -> None:
        """Raise Diverged, on all ranks alike, where this step was not finite. Collective."""

    def evaluation_of_this_step(self) -> dict[str, float]:
        """Return what an evaluation has measured at this step; nothing where there was none."""
