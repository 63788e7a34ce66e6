"""Resume from a checkpoint: choose it, and bring optimizer, schedule and RNG state to its step."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shardwright.train.checkpoint import discovery, retention
from shardwright.train.checkpoint.format import layout
from shardwright.train.checkpoint.format.layout import LOSS_SCALE, TRAINER_STATE
from shardwright.train.checkpoint.format.lazy import PortableState, Unreadable, why_refused
from shardwright.train.checkpoint.read import portable
from shardwright.train.checkpoint.read.average import file_of
from shardwright.train.config import Progress, RankLayout, RunConfig
from shardwright.train.config.cadence import Cadence
from shardwright.train.console import progress
from shardwright.train.errors import UserError
from shardwright.train.loop import random_numbers
from shardwright.train.model import adapter_base, quantised, saved
from shardwright.train.model.saved import Saved
from shardwright.train.model.weights import InitialValue, InitialValues
from shardwright.train.process.agreement import from_all, from_all_patiently
from shardwright.train.process.rank import Rank
from shardwright.train.run_directory import rollbacks
from shardwright.train.run_directory.history import asked_step
from shardwright.train.run_directory.history import read as history_of
from shardwright.train.run_directory.names import CHECKPOINTS
from shardwright.train.strategy.loss_scale import restore_loss_scale

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from shardwright.train.strategy.training import Training


@dataclass(frozen=True)
class Resumed:
    """Where a run is resumed."""

    checkpoint: Path
    progress: Progress
    tokens: int
    world_size: int
    """Ranks that wrote it."""
    state: PortableState
    parameters: frozenset[str] = frozenset()
    """The first name of each, as its manifest says."""
    average: layout.AverageEntry | None = None
    """The average of the weights that it holds beside them."""
    base: layout.BaseEntry | None = None
    """The model whose weights it leaves out."""

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def samples(self) -> int:
        """Samples consumed so far: the position in the data."""
        return self.progress.samples

    @property
    def data_parallel_size(self) -> int:
        """Parts into which its batches were divided: each of its ranks had samples of its own."""
        return self.world_size


def newest(run_dir: Path, rank: Rank, say: Callable[[str], None]) -> Resumed | None:
    """Return the newest checkpoint of a run whose every hash is right, or None. Collective.

    The ranks share the hashing, and all of them take the same one; on the first, ``say`` hears of
    what was skipped, and why. Raises UserError where there are checkpoints and none is whole, and
    where the one that its user has chosen is not.
    """
    directory = run_dir / CHECKPOINTS
    if rank.index == 0:
        retention.remove_leftovers(directory)
    with progress.phase("checking the checkpoint's hashes", unit="B", comes_again=True) as shown:
        path, passed_over = discovery.newest_whole(
            directory,
            gather=from_all_patiently,
            share=(rank.index, rank.world_size),
            advance=shown.advance,
        )
    # Read by one rank: on a network's file system others may still see an older file.
    notes = (rollbacks.read(run_dir), history_of(run_dir)) if rank.index == 0 else None
    gone_back, entries = from_all(notes)[0]
    if problem := _chosen_is_not_whole(run_dir, asked_step(entries), passed_over):
        raise UserError(problem)
    if rank.index == 0:
        for skipped in passed_over:
            names = layout.to_remove(skipped.problems)
            say(f"{skipped}; skipped" + (f" (remove {names} to use it)" if names else ""))
    if path is not None:
        found = _opened(path)
        return replace(found, progress=rollbacks.behind(found.progress, gone_back))
    if passed_over:
        raise UserError(discovery.none_whole(run_dir, passed_over))
    return None


def _chosen_is_not_whole(
    run_dir: Path, asked: int | None, passed_over: Sequence[discovery.PassedOver]
) -> str | None:
    """Say that a resume was to begin from a checkpoint that cannot be used, or return None. Pure.

    What was written since may be skipped as ever.
    """
    if asked is None or not passed_over or passed_over[0].step != asked:
        return None
    remedy = discovery.remedy(passed_over[:1])
    return f"{run_dir}: {passed_over[0]}, and --step={asked} chose it; {remedy}, or choose another"


def _opened(path: Path) -> Resumed:
    manifest = layout.read_manifest(path)
    with _refusing(path):
        _check_trainer_state(path / TRAINER_STATE, manifest.step)
        scheduled_steps = _scheduled_steps(path / "scheduler.pt")
        state = portable.read(path)
    return Resumed(
        checkpoint=path,
        progress=manifest.progress(scheduled_steps),
        tokens=manifest.tokens,
        world_size=manifest.world_size,
        state=state,
        parameters=frozenset(parameter.name for parameter in manifest.parameters),
        average=manifest.average,
        base=manifest.base,
    )


_CANNOT_BE_RESUMED = (
    "cannot be resumed: {error}. Start a run from the weights of an earlier final/ with "
    "model=pretrained, or remove it to use an older one"
)


def _refusing(checkpoint: Path) -> AbstractContextManager[None]:
    """Raise UserError where a checkpoint is opened or read in the block and cannot be."""
    return saved.refusing(checkpoint, _CANNOT_BE_RESUMED)


def _scheduled_steps(path: Path) -> int:
    """Return how many steps the schedule has counted.

    Those of the run, but for one of an earlier version in fp16, under ZeRO: there a step that
    overflowed did not count. Raises Unreadable.
    """
    try:
        return int(torch.load(path, weights_only=True)["last_epoch"])
    except Exception as error:
        raise Unreadable(f"{path.name} is refused: {why_refused(error)}") from None


def _check_trainer_state(path: Path, step: int) -> None:
    """Raise Unreadable where it is not what the trainer left at that step."""
    try:
        found = json.loads(path.read_bytes())
        is_sound = found["global_step"] == step and isinstance(found["log_history"], list)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Unreadable(f"{path.name} is refused: {type(error).__name__}: {error}") from None
    if not is_sound:
        raise Unreadable(f"{path.name} is not the checkpoint of step {step}")


# --- weights ------------------------------------------------------------------------------------


def untie(model: PreTrainedModel, resumed: Resumed) -> None:
    """Untie what a run that began with pretrained weights had untied, as they were unequal."""
    saved.untie(model, resumed.parameters)


def values(
    model: PreTrainedModel,
    resumed: Resumed,
    of_source: Mapping[str, InitialValue] = saved.NOTHING,
) -> InitialValues:
    """Return each parameter's master weight as its first value; set the persistent buffers.

    Where the checkpoint leaves its base out, that has the values ``of_source``, which the run began
    with. Raises UserError where the checkpoint holds another model.
    """
    of = Saved(resumed.checkpoint, resumed.state, resumed.parameters, _CANNOT_BE_RESUMED)
    return saved.first_values(model, of, of_source if resumed.base is not None else saved.NOTHING)


def check_base(model: PreTrainedModel, resumed: Resumed) -> None:
    """Raise UserError where what a model was quantised from is not what it was before."""
    digest = quantised.digest_of(model)
    if resumed.base is not None and digest is not None:
        adapter_base.check(digest, resumed.base, resumed.checkpoint)


# --- everything else, once the engine is built --------------------------------------------------


def restore(trainer: Training, resumed: Resumed) -> None:
    """Bring optimizer, schedule and random numbers of a live engine to the checkpoint's step.

    Where the batch is divided into as many parts as it was, each rank continues with the RNG state
    of whoever had its samples and with the losses since the last logged step; else the numbers are
    drawn anew, from the seed, the step and the part, and the next logged loss is the mean since
    this step. Collective. Once all have read what is theirs, the older checkpoints that a killed
    run had yet to delete are deleted.
    """
    with _refusing(resumed.checkpoint):
        trainer.engine.restore_optimizer(trainer, resumed.state)
        if trainer.average is not None and (kept := resumed.average) is not None:
            own_file = resumed.checkpoint / file_of(trainer.args.process_index)
            trainer.average.restore(resumed.state, own_file, kept.kind, kept.taken)
    _restore_schedule(trainer, resumed.progress.scheduled_steps)
    scale = resumed.checkpoint / LOSS_SCALE
    restore_loss_scale(trainer, json.loads(scale.read_text()) if scale.exists() else {})
    rank = trainer.args.process_index
    if (name := rng_file(resumed, trainer.layout, rank)) is not None:
        unlogged = _restore_rng(resumed.checkpoint / name)
        if unlogged is not None:
            trainer._tr_loss += unlogged["unlogged_loss"]
            trainer._globalstep_last_logged = int(unlogged["logged_step"])
            if trainer.auxiliary_loss is not None:
                trainer.auxiliary_loss += unlogged.get("unlogged_auxiliary_loss", 0.0)
    else:
        part = trainer.layout.data_parallel_rank(rank)
        random_numbers.begin(trainer.config.seed, resumed.step, part)
    # Where a rank has been refused something, an older checkpoint may be all that is left.
    from_all_patiently(None)
    if rank == 0:
        retention.retain(resumed.checkpoint.parent, trainer.config.checkpoint, newest=resumed.step)


def rng_file(resumed: Resumed, layout: RankLayout, rank: int) -> str | None:
    """Return which RNG state of a checkpoint a rank continues with; None: with a new one. Pure."""
    if resumed.data_parallel_size != layout.data_parallel_size:
        return None
    return f"rng-{layout.data_parallel_rank(rank)}.pt"


def _restore_schedule(trainer: Training, step: int) -> None:
    """Put the learning rates where the schedule had come to; it may be a longer one now."""
    scheduler: Any = trainer.lr_scheduler
    scheduler.last_epoch = step
    scheduler._step_count = step + 1
    scheduler._last_lr = scheduler.get_lr()
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _restore_rng(path: Path) -> dict[str, float] | None:
    """Set this rank's random numbers; return its losses since the last logged step, and that step.

    None where the checkpoint is an older one.
    """
    try:
        state = torch.load(path, weights_only=True)
        _set_rng(state)
        if "unlogged_loss" not in state:
            return None
        names = ("unlogged_loss", "logged_step", "unlogged_auxiliary_loss")
        return {name: float(state[name]) for name in names if name in state}
    except Exception as error:
        raise UserError(
            f"{path} is refused: {type(error).__name__}: {why_refused(error)}; remove "
            f"{path.parent.name} to use an older one"
        ) from None


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    version, internal, gauss = json.loads(state["python"])
    random.setstate((version, tuple(internal), gauss))
    legacy = json.loads(state["numpy"])
    legacy["state"]["key"] = np.array(legacy["state"]["key"], dtype=np.uint32)
    np.random.set_state(legacy)


def history(resumed: Resumed) -> list[dict[str, Any]]:
    """Return what the run had logged by then, evaluations included."""
    return json.loads((resumed.checkpoint / TRAINER_STATE).read_text())["log_history"]


def lacks_evaluation(
    resumed: Resumed, config: RunConfig, cadence: Cadence, total_steps: int
) -> bool:
    """Return whether the evaluation at a checkpoint's step was cut short by a stop.

    Where any step is evaluated, the last one is too.
    """
    if not cadence or not config.data.is_evaluated:
        return False
    began = resumed.samples - round(resumed.progress.batch_size or 0)
    if resumed.step != total_steps and not cadence.is_due(resumed.step, began, resumed.samples):
        return False
    return not is_evaluated(resumed)


def is_evaluated(resumed: Resumed) -> bool:
    """Return whether the checkpoint knows the evaluation of its own step."""
    return any("eval_loss" in e and e["step"] == resumed.step for e in history(resumed))
