"""The only place that knows the engines: config -> settings, live engine -> facts and weights.

Each module is one engine and gives the functions of `Engine`. Nothing outside this folder and
train/checkpoint/ asks which strategy it is. Importing it needs no torch, so that a dry run can
print the settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from train.config import RunConfig
from train.strategy import fsdp, loop, replicated, zero

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel

    from train.checkpoint.lazy import PortableState
    from train.checkpoint.save import EngineState
    from train.trainer import Trainer
    from train.weights import Values


class Engine(Protocol):
    """What each engine's module gives."""

    def contradictions(self, config: RunConfig, world_size: int | None) -> Iterator[str]:
        """Yield a message for each value that the engine cannot honour. Pure.

        ``world_size`` is None where it is not known yet.
        """

    def machine_problems(self, config: RunConfig) -> Iterator[str]:
        """Yield a message for each thing that the engine needs and this machine lacks."""

    def settings(self, config: RunConfig, world_size: int) -> dict[str, Any]:
        """Return the engine's own settings, every derived field written out. Pure."""

    def training_arguments(self, config: RunConfig, world_size: int) -> dict[str, Any]:
        """Return what `transformers.TrainingArguments` must be told. Pure."""

    def shard(self, model: PreTrainedModel, values: Values, config: RunConfig) -> PreTrainedModel:
        """Give a model on the meta device its values, and return it as the Trainer is to get it.

        Collective. Beside what this rank is to hold of the model, no more than one whole parameter
        is in memory at a time.
        """

    def serve(self, model: PreTrainedModel, values: Values, config: RunConfig) -> PreTrainedModel:
        """Give a model its values as `shard` does, and return it ready for inference alone.

        Its forward passes are collective.
        """

    def adopt_process_group(self) -> None:
        """Make the engine take torch's process group as its own, before anything is built."""

    def complete(self, trainer: Trainer) -> None:
        """Add to the live engine what the other engines have and this one lacks.

        Among that is to leave the weights alone in a step whose gradient norm is not finite, by
        `Trainer.gate`, unless the engine does so by itself.
        """

    def expected(self, config: RunConfig, world_size: int) -> dict[str, Any]:
        """Return the facts that `read_back` must find. Pure."""

    def read_back(self, trainer: Trainer) -> dict[str, Any]:
        """Return facts read off the live engine, after it is built.

        Among them are ``precision`` and the loss scaling, in the words of `loop.expected`.
        """

    def restore_optimizer(self, trainer: Trainer, state: PortableState) -> None:
        """Give the live optimizer the moments of a checkpoint: each rank reads its own part.

        Raises UserError where the checkpoint's optimizer is another one.
        """

    def after_evaluation(self, trainer: Trainer) -> None:
        """Bring back the state between two steps, after forward passes without a backward."""

    def full_parameters(self, trainer: Trainer) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Yield each parameter's name and whole fp32 master weight, one at a time.

        Collective: every rank iterates in step. Rank 0 gets the tensor on the CPU, others None.
        Tied parameters come once.
        """

    def local_weights(self, trainer: Trainer) -> Iterator[torch.Tensor]:
        """Yield what this rank holds of the master weights, to be read only."""

    def release(self) -> None:
        """Undo what keeps models from being loaded the usual way in this process."""

    def clean_up(self, config: RunConfig) -> None:
        """Remove what the engine left outside of the run directory, once the run has ended."""

    def save_state(self, trainer: Trainer, *, is_first: bool, copy: bool) -> EngineState:
        """Return what this rank writes of model and optimizer: the engine's own sharded files.

        Collective, and touches no disk. With ``is_first`` also what its disk needs once. With
        ``copy`` it lies in host memory, so that training can go on before it is written.
        """


def engine_of(config: RunConfig) -> Engine:
    """Return the module of the engine that the config asks for."""
    engines: dict[str, Engine] = {
        "single": replicated,
        "ddp": replicated,
        "zero": zero,
        "fsdp": fsdp,
    }
    return engines[config.strategy.kind]


def engine_settings(config: RunConfig) -> dict[str, Any]:
    """Return the engine settings that result from a resolved config. Pure."""
    return engine_of(config).settings(config, config.launcher.world_size)


def verify(trainer: Trainer, config: RunConfig, world_size: int) -> dict[str, Any]:
    """Compare the live engine with the config and return what was read back.

    Raises EngineMismatch naming every fact that differs, with both values.
    """
    engine = engine_of(config)
    expected = {
        **engine.expected(config, world_size),
        **loop.expected(config, world_size, trainer.schedule),
    }
    if trainer.state.global_step > 0:
        # A resumed run goes on with the loss scale that it had come to.
        del expected["initial_loss_scale"]
    live = {**engine.read_back(trainer), **loop.read_back(trainer)}
    differences = [
        f"{fact}: the config asks for {value!r}, the live engine has {live.get(fact)!r}"
        for fact, value in expected.items()
        if live.get(fact) != value
    ]
    if differences:
        raise EngineMismatch(
            f"strategy={config.strategy.kind} is not what runs; nothing was trained\n"
            + "\n".join(differences)
        )
    return live


class EngineMismatch(RuntimeError):
    """The live engine is not the one that was asked for."""
