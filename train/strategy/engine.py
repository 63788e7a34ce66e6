"""What every engine is: what each must say of itself, and what most of them need not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from shardwright.train.config import RankLayout, RunConfig
from shardwright.train.strategy.training import Stateful

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from transformers import PreTrainedModel

    from shardwright.train.model.weights import InitialValues
    from shardwright.train.strategy.training import Training


class Engine(Stateful, ABC):
    """One way to lay out and train a model over ranks; it holds no part of that model itself."""

    places_model: ClassVar[bool] = False
    """Whether `shard` leaves every part of the model where it stays, for nobody to move."""

    def __init__(self, config: RunConfig, layout: RankLayout) -> None:
        self.config = config
        self.layout = layout

    # --- from the config alone: pure, and without torch ---------------------------------------

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the engine's own settings, every derived field written out. Pure."""

    @abstractmethod
    def training_arguments(self) -> dict[str, Any]:
        """Return what `transformers.TrainingArguments` must be told. Pure."""

    @abstractmethod
    def expected(self) -> dict[str, Any]:
        """Return the facts that `read_back` must find. Pure."""

    # --- the life of a rank, in its order -----------------------------------------------------

    def machine_problems(self) -> Iterator[str]:
        """Yield a message for each thing that the engine needs and this machine lacks."""
        yield from ()

    @staticmethod
    def adopt_process_group() -> None:
        """Make the engine take torch's process group as its own, before anything is built."""

    @abstractmethod
    def shard(self, model: PreTrainedModel, values: InitialValues) -> PreTrainedModel:
        """Give a model on the meta device its values, and return it as the Trainer is to get it.

        Collective. Beside what this rank is to hold of the model, no more than two whole parameters
        are in memory at a time; what can be read in parts is read so, and what cannot, by one rank
        for all. Values may be
        left to `complete` where the engine takes them with its master weights.
        """

    def place(self, model: PreTrainedModel, values: InitialValues) -> PreTrainedModel:
        """Give a model its values as `shard` does, for forward passes alone.

        What only a training needs is not there: no master weights beside those that forward passes
        take, nothing for gradients or an optimizer. Collective.
        """
        return self.shard(model, values).eval()

    def forward_only(self, model: PreTrainedModel) -> Any:
        """Return what makes forward passes of a model that `place` has placed: it or a wrapper.

        They are collective, and the very same that a training's are of the same weights, but for
        autocast, which is the caller's. Collective.
        """
        return model

    def serve(self, model: PreTrainedModel, values: InitialValues) -> PreTrainedModel:
        """Return a model ready to be called by itself, as `place` and `forward_only` make it."""
        model = self.place(model, values)
        self.forward_only(model)
        return model

    @abstractmethod
    def expected_forward_only(self) -> dict[str, Any]:
        """Return the facts that `read_back_forward_only` must find. Pure."""

    @abstractmethod
    def read_back_forward_only(self, trainer: Training) -> dict[str, Any]:
        """Return facts read off what `forward_only` has returned."""

    def adamw(
        self, groups: list[dict[str, Any]], settings: dict[str, Any]
    ) -> torch.optim.Optimizer:
        """Return the AdamW of parameter groups, by torch's names of its settings.

        Raises UserError where it has to be compiled and cannot be.
        """
        import torch

        return torch.optim.AdamW(groups, fused=True, **settings)

    def complete(self, trainer: Training) -> None:
        """Add to the live engine what the other engines have and this one lacks.

        Among that are first values that `shard` has left to it, and to leave the weights alone in
        a step whose gradient norm is not finite, by `Trainer.gate`, unless the engine does so by
        itself: torch's GradScaler does where losses are scaled.
        """
        if trainer.accelerator.scaler is None:
            trainer.gate.guard(trainer.innermost_optimizer())

    def skip_by_gate(self, trainer: Training) -> None:
        """Have each update be left out where `Trainer.gate` is closed, of a finite step too.

        After `complete`, which sees to that where nothing else skips steps.
        """
        if (scaler := trainer.accelerator.scaler) is not None:
            trainer.gate.guard_scaled(trainer.optimizer, scaler)

    @abstractmethod
    def read_back(self, trainer: Training) -> dict[str, Any]:
        """Return facts read off the live engine, after it is built.

        Among them are ``precision`` and the loss scaling, in the words of `loop_facts.expected`.
        """

    def after_evaluation(self, trainer: Training) -> None:
        """Bring back the state between two steps, after forward passes without a backward."""

    def show(self, trainer: Training, parts: Sequence[tuple[str, int, torch.Tensor]]) -> None:
        """Have forward passes take other values of the weights: ``parts`` of them on each rank.

        Collective. They are cut as `own_weights` cuts the weights, a copy of which brings back what
        is trained, to the same bits. Master weights beside those of forward passes are left alone.
        """
        from shardwright.train.strategy.shown import show_whole

        show_whole(dict(trainer.model.named_parameters()), parts)

    @abstractmethod
    def own_weights(self, trainer: Training) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Yield what this rank is to write of the master weights, to be read only.

        That is a parameter's name, the place of the first element in the flattened parameter, and
        consecutive elements as they lie, on any device. Over all ranks each element of each
        parameter comes once, but for quantised layers, which are none of the training's; tied ones
        come under their first name. There is no communication.
        """

    @abstractmethod
    def own_moments(
        self, trainer: Training, moment: str
    ) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Yield one of the optimizer's tensors as `own_weights` does the weights.

        Those of parameters alone that it has stepped.
        """

    @abstractmethod
    def own_gradients(self, trainer: Training) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Yield the reduced gradients as `own_weights` does the weights, where there are any.

        To be called within `before_update` only. Where losses are scaled, they are too.
        """

    def before_update(self, trainer: Training, act: Callable[[], object]) -> None:
        """Have ``act`` called in each step, once gradients are reduced and before they are clipped.

        To be called once the engine is complete.
        """
        trainer.before_clipping = act

    @abstractmethod
    def local_weights(self, trainer: Training) -> Iterator[torch.Tensor]:
        """Yield what this rank holds of the master weights, to be read only."""

    @staticmethod
    def release() -> None:
        """Undo what keeps models from being loaded the usual way in this process."""

    def clean_up(self) -> None:
        """Remove what the engine left outside of the run directory, once the run has ended."""


def divided(
    held: Sequence[tuple[str, int, torch.Tensor]], index: int, count: int
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield one rank's part of what ``count`` ranks hold alike, as `Engine.own_weights` does."""
    from shardwright.train.checkpoint.format.outputs import share

    for number, first, last in share((values.numel() for _, _, values in held), index, count):
        name, start, values = held[number]
        yield name, start + first, values.detach().view(-1)[first:last]
