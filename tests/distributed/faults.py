"""What a rank does in a test of divergence: a step is spoilt on one rank, and what is left told."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from shardwright.train.config import load
from shardwright.train.errors import Diverged, UserError
from shardwright.train.loop.trainer import Trainer
from shardwright.train.process.rank import Rank, rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join
from tests.distributed.jobs import fp16_allowed_on_a_cpu, loss_scale, scheduled_steps


def trained_with_a_fault(
    run_dir: Path,
    fault: str,
    step: int,
    on_rank: int,
    lasting: bool = False,
    unchecked: bool = False,
) -> dict[str, Any]:
    """Train; in one step, or from it on, spoil the loss, the gradients or the update of one rank.

    Return what the training ended with, whether its weights in memory are those from before that
    step, bit for bit, its loss scale, and how many steps its schedule has counted. ``unchecked``
    saves are made without a look at the weights, as by earlier versions.
    """
    rank = rank_from_environment()
    blind = mock.patch.object(Trainer, "check_finite") if unchecked else nullcontext()
    with fp16_allowed_on_a_cpu(), blind, join(load(run_dir), rank):
        return _train(run_dir, rank, fault, step, on_rank, lasting)


def _train(
    run_dir: Path, rank: Rank, fault: str, step: int, on_rank: int, lasting: bool
) -> dict[str, Any]:
    import torch
    from transformers import TrainerCallback

    console = io.StringIO()
    trainer = assemble(run_dir, load(run_dir), rank, console)
    before: list[torch.Tensor] = []
    is_spoilt = False

    def local_weights() -> list[torch.Tensor]:
        weights = trainer.engine.local_weights(trainer)
        return [tensor.detach().clone().cpu() for tensor in weights]

    class Fault(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal is_spoilt
            number = state.global_step + 1
            if number == step:
                before.extend(local_weights())
            is_spoilt = number == step or (lasting and number > step)
            is_spoilt = is_spoilt and rank.index == on_rank
            if is_spoilt and fault == "update":
                _spoil_moments(trainer)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal is_spoilt
            is_spoilt = False

    trainer.add_callback(Fault())
    error = None

    def is_evaluation_spoilt() -> bool:
        done = trainer.state.global_step
        is_meant = fault == "held_out" and rank.index == on_rank and not trainer.model.training
        return is_meant and (done == step or (lasting and done > step))

    with _spoilt_loss(lambda: (is_spoilt and fault == "loss") or is_evaluation_spoilt()):
        _spoil_gradients(trainer, lambda: is_spoilt and fault == "gradient")
        try:
            trainer.train()
            if fault == "held_out":
                trainer.last_evaluation()
        except Diverged as diverged:
            error = str(diverged)
    after = local_weights()
    return {
        "error": error,
        "text": console.getvalue(),
        "step": trainer.state.global_step,
        "weights_are_as_before": len(after) == len(before)
        and all(torch.equal(a, b) for a, b in zip(after, before, strict=True)),
        "loss_scale": loss_scale(trainer),
        "scheduled": scheduled_steps(trainer),
    }


@contextmanager
def _spoilt_loss(is_on: Any) -> Iterator[None]:
    """Make the loss infinite, by an addition that leaves its gradients finite."""
    from shardwright.train.model import head_loss

    training, evaluating = head_loss.summed_loss, head_loss.loss_and_right

    def spoilt(loss: Any) -> Any:
        return loss + float("inf") if is_on() else loss

    def spoilt_evaluation(*arguments: Any) -> Any:
        loss, right = evaluating(*arguments)
        return spoilt(loss), right

    with (
        mock.patch.object(head_loss, "summed_loss", lambda *a: spoilt(training(*a))),
        mock.patch.object(head_loss, "loss_and_right", spoilt_evaluation),
    ):
        yield


def _spoil_gradients(trainer: Trainer, is_on: Any) -> None:
    """Make gradients NaN on their way back through the last block; the loss stays as it is."""
    from shardwright.train.model.blocks import blocks

    def watch(module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad * float("nan") if is_on() else None)

    blocks(trainer.model)[-1].register_forward_hook(watch)


def _spoil_moments(trainer: Trainer) -> None:
    """Make a part of this rank's first moments NaN, and so a finite gradient's update."""
    for state in trainer.innermost_optimizer().state.values():
        for name, moment in state.items():
            if name in ("exp_avg", "momentum_buffer"):
                local = moment.to_local() if hasattr(moment, "to_local") else moment
                local.view(-1)[:1] = float("nan")


def first_batch_is_refused(run_dir: Path) -> tuple[str, int]:
    """Train on ids that lie beyond the model's embedding; return what is said, and the steps."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return _refused(run_dir, rank)


def _refused(run_dir: Path, rank: Rank) -> tuple[str, int]:
    trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
    sound: Any = trainer._train_loader.collate_fn

    def shifted(samples: Any) -> Any:
        batch = sound(samples)
        return {**batch, "input_ids": batch["input_ids"] + 1000}

    trainer._train_loader.collate_fn = shifted
    try:
        trainer.train()
    except UserError as error:
        return str(error), trainer.state.global_step
    raise AssertionError("it has trained")
