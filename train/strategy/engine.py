"""What each engine gives, and what it has to write of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from train.config import RankLayout, RunConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel

    from train.checkpoint.format.hashed import HashedFolder
    from train.checkpoint.format.lazy import PortableState
    from train.model.weights import Values
    from train.strategy.training import Training


class EngineState(Protocol):
    """What an engine has to write of model and optimizer; neither method is collective."""

    def write(self, folder: HashedFolder) -> Any:
        """Write this rank's files and return what `finish` wants to know. Raises OSError."""

    def finish(self, folder: HashedFolder, written: list[Any]) -> None:
        """On the first rank, add what is known only now. Raises OSError."""


class Engine(Protocol):
    """What each engine's module gives."""

    def machine_problems(self, config: RunConfig) -> Iterator[str]:
        """Yield a message for each thing that the engine needs and this machine lacks."""

    def settings(self, config: RunConfig, layout: RankLayout) -> dict[str, Any]:
        """Return the engine's own settings, every derived field written out. Pure."""

    def training_arguments(self, config: RunConfig, layout: RankLayout) -> dict[str, Any]:
        """Return what `transformers.TrainingArguments` must be told. Pure."""

    def shard(self, model: PreTrainedModel, values: Values, config: RunConfig) -> PreTrainedModel:
        """Give a model on the meta device its values, and return it as the Trainer is to get it.

        Collective. Beside what this rank is to hold of the model, no more than one whole parameter
        is in memory at a time; and of what can be read in parts, no more is read. Values may be
        left to `complete` where the engine takes them with its master weights.
        """

    def serve(self, model: PreTrainedModel, values: Values, config: RunConfig) -> PreTrainedModel:
        """Give a model its values as `shard` does, and return it ready for inference alone.

        Its forward passes are collective.
        """

    def adopt_process_group(self) -> None:
        """Make the engine take torch's process group as its own, before anything is built."""

    def complete(self, trainer: Training) -> None:
        """Add to the live engine what the other engines have and this one lacks.

        Among that are first values that `shard` has left to it, and to leave the weights alone in
        a step whose gradient norm is not finite, by `Trainer.gate`, unless the engine does so by
        itself.
        """

    def adamw(
        self, config: RunConfig, groups: list[dict[str, Any]], settings: dict[str, Any]
    ) -> torch.optim.Optimizer:
        """Return the AdamW of parameter groups, by torch's names of its settings.

        Raises UserError where it has to be compiled and cannot be.
        """

    def expected(self, config: RunConfig, layout: RankLayout) -> dict[str, Any]:
        """Return the facts that `read_back` must find. Pure."""

    def read_back(self, trainer: Training) -> dict[str, Any]:
        """Return facts read off the live engine, after it is built.

        Among them are ``precision`` and the loss scaling, in the words of `loop_facts.expected`.
        """

    def restore_optimizer(self, trainer: Training, state: PortableState) -> None:
        """Give the live optimizer the moments of a checkpoint: each rank reads its own part.

        Raises UserError where the checkpoint's optimizer is another one.
        """

    def after_evaluation(self, trainer: Training) -> None:
        """Bring back the state between two steps, after forward passes without a backward."""

    def full_parameters(self, trainer: Training) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yield each parameter's name and whole fp32 master weight, one at a time.

        Collective: every rank iterates in step. Rank 0 gets the tensor on the CPU, others None.
        Tied parameters come once.
        """

    def local_weights(self, trainer: Training) -> Iterator[torch.Tensor]:
        """Yield what this rank holds of the master weights, to be read only."""

    def release(self) -> None:
        """Undo what keeps models from being loaded the usual way in this process."""

    def clean_up(self, config: RunConfig) -> None:
        """Remove what the engine left outside of the run directory, once the run has ended."""

    def save_state(self, trainer: Training, *, is_first: bool, copy: bool) -> EngineState:
        """Return what this rank writes of model and optimizer: the engine's own sharded files.

        Collective, and touches no disk. With ``is_first`` also what its disk needs once. With
        ``copy`` it lies in host memory, so that training can go on before it is written.
        """
