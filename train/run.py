"""The story of one rank, from the frozen config to final/."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, TextIO

from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.trainer_utils import align_special_tokens

from shardwright.train import data
from shardwright.train.checkpoint.format import layout
from shardwright.train.checkpoint.format.damage import in_one_line
from shardwright.train.checkpoint.format.layout import read_manifest
from shardwright.train.config import (
    BEGINNING,
    NamedModel,
    RunConfig,
    Schedule,
    TrainerConfig,
    packages,
    samples_wanted,
    schedule_of,
    total_steps,
    why_too_short,
)
from shardwright.train.config import rhythm as rhythm_of
from shardwright.train.console import progress
from shardwright.train.data.batches.loader import eval_loader, train_loader
from shardwright.train.data.tokens import tokenizer
from shardwright.train.data.tokens.cache import cache_root
from shardwright.train.errors import UserError
from shardwright.train.export.card import model_card
from shardwright.train.export.final import best_checkpoint, export, exports_average, of_average
from shardwright.train.loop import resuming, stopping
from shardwright.train.loop.arguments import training_arguments
from shardwright.train.loop.callbacks import early_stopping
from shardwright.train.loop.callbacks.compilation import Compilation
from shardwright.train.loop.callbacks.engine import EngineReady
from shardwright.train.loop.callbacks.full_batch import FullBatch
from shardwright.train.loop.callbacks.held_out import HeldOut
from shardwright.train.loop.callbacks.metrics import Metrics
from shardwright.train.loop.callbacks.progress import Progress
from shardwright.train.loop.callbacks.publishing import Publishing
from shardwright.train.loop.callbacks.statistics import Statistics
from shardwright.train.loop.callbacks.tracking import STOP_SECONDS, Tracking
from shardwright.train.loop.resuming import Resumed
from shardwright.train.loop.spikes.rollback import RolledBack
from shardwright.train.loop.trainer import Trainer
from shardwright.train.model import (
    adapter,
    adapter_base,
    compilation,
    document_attention,
    flops,
    generation,
    origin,
    saved,
)
from shardwright.train.model import build as models
from shardwright.train.model.blocks import check_blocks_are_not_skipped, parameter_count
from shardwright.train.model.directory import rehearse
from shardwright.train.model.user_modules import import_all
from shardwright.train.model.weights import InitialValues, drawn
from shardwright.train.plan.comparison import Comparison
from shardwright.train.plan.model import facts_of
from shardwright.train.plan.traffic import traffic
from shardwright.train.process import heartbeat, signals
from shardwright.train.process.agreement import check, from_all_patiently, together
from shardwright.train.process.heartbeat import Phase
from shardwright.train.process.leave import forget_training
from shardwright.train.process.provenance import write_provenance
from shardwright.train.process.rank import Rank
from shardwright.train.run_directory import final, history, own_code, replays
from shardwright.train.run_directory import metrics as run_directory_metrics
from shardwright.train.run_directory.names import TOKENIZER_FOLDER
from shardwright.train.sampling import sample
from shardwright.train.strategy import engine_of


def run(run_dir: Path, config: RunConfig, rank: Rank, console: TextIO) -> Path | None:
    """Train what the config of ``run_dir`` says as one of the ranks.

    Returns final/, or None where a rank was told to stop and stopped.json says what came of it. A
    run that goes back from a spike begins again at its checkpoint, as one that is resumed.
    """
    has_gone_back = False
    while True:
        try:
            return _train_once(run_dir, config, rank, console, has_gone_back=has_gone_back)
        except RolledBack as spike:
            if rank.index == 0:
                progress.write(str(spike), console)
            forget_training(spike)
        engine_of(config, rank.world_size).adopt_process_group()
        has_gone_back = True


def _train_once(
    run_dir: Path, config: RunConfig, rank: Rank, console: TextIO, *, has_gone_back: bool
) -> Path | None:
    trainer = None
    try:
        trainer = assemble(run_dir, config, rank, console, is_a_start=not has_gone_back)
        trainer.train()
        check()
        trainer.save_if_not_saved()
        heartbeat.now(Phase.ENDING)
        model_dir = finish(trainer, rank, console)
        trainer.end_companions("done")
        return model_dir
    except signals.Stop:
        heartbeat.now(Phase.ENDING)  # ends here, as the trainer must outlive no traceback
    except RolledBack:
        heartbeat.now(Phase.STARTING)
        if trainer is not None:
            trainer.end_companions("stopped", seconds=STOP_SECONDS)
            trainer.engine.clean_up()
        raise
    except BaseException:
        heartbeat.now(Phase.ENDING)
        if trainer is not None:
            trainer.end_companions("failed")
        raise
    stopping.end(run_dir, rank, trainer, console)
    return None


def finish(trainer: Trainer, rank: Rank, console: TextIO) -> Path:
    """Turn what has been trained, and saved, into final/."""
    best = best_checkpoint(trainer, console)
    manifest = read_manifest(best) if best else None
    evaluation = manifest.metrics if manifest else trainer.last_evaluation()
    averaged = None
    if exports_average(trainer):
        averaged = of_average(trainer)
        if trainer.average is not None and not trainer.average.replaces_weights:
            evaluation = trainer.average_evaluation_of_this_step()
    model_dir = export(
        trainer,
        lambda: model_card(trainer, evaluation, manifest, averaged=averaged),
        best,
        say=lambda text: progress.write(text, console),
    )
    trainer.engine.clean_up()
    if rank.index == 0:
        final.forget_earlier(trainer.run_dir)
        tokenizer.remove_leftovers(trainer.run_dir / TOKENIZER_FOLDER)
    if rank.index == 0 and trainer.config.objective.prompts and not signals.asked():
        with progress.phase("continuing the prompts", comes_again=True):
            completions = sample.sample(
                model_dir,
                trainer.config.objective.prompts,
                trust_remote_code=trainer.config.model.trusts_code,
            )
        sample.print_completions(trainer.config.objective.prompts, completions, console)
    return model_dir


def assemble(
    run_dir: Path,
    config: RunConfig,
    rank: Rank,
    console: TextIO,
    *,
    is_a_start: bool = True,
    trains: bool = True,
) -> Trainer:
    """Build data, model, engine settings and callbacks into a trainer that is ready to train.

    ``is_a_start`` is false where these ranks have begun already, and have gone back. One that never
    ``trains`` has nothing but its weights, and is ready to evaluate.
    """
    import_all(config.model.imports)
    prepared = _open_data(config, run_dir, rank)
    resumed = resuming.newest(run_dir, rank, lambda text: progress.write(text, console))
    # The model comes before the arguments: while those live, transformers builds whatever it builds
    # into ZeRO-3 shards of its own. They set up the device, on which the engine shards.
    progress.now("building the model")
    model, values = _build(config, run_dir, prepared.tokenizer, resumed, rank, console)
    config = _compiling(config, model, rank, console)
    # Its settings are made of what only the weights know, too.
    engine = engine_of(models.fitted(config, model), rank.world_size)
    config, layout = engine.config, engine.layout
    sent_bytes = _sent_bytes(model, config, rank)
    check()
    steps, schedule = _length(config, prepared, resumed)
    steps = replays.last_step(run_dir, steps)
    if resumed is not None:
        resuming.untie(model, resumed)
        values = resuming.values(model, resumed, values)
        if early_stopping.is_due(config, resuming.history(resumed)):
            steps = resumed.step  # killed between the stop and the end: what is left is final/
    rhythm = rhythm_of(config, prepared.samples_per_epoch)
    args = training_arguments(engine, run_dir, total_steps=steps, schedule=schedule, rhythm=rhythm)
    args.eval_on_start = resumed is not None and resuming.lacks_evaluation(
        resumed, config, rhythm.evaluate, steps
    )
    progress.now("dividing the model" if rank.world_size > 1 else "filling the model")
    model = engine.shard(model, values) if trains else engine.place(model, values)
    if resumed is not None:
        resuming.check_base(model, resumed)
    bounds = document_attention.bounds_of(model, config)
    of_rank: Any = {"rank": rank.index, "layout": layout, "bounds": bounds}
    trainer = Trainer(
        engine,
        args,
        model,
        prepared.tokenizer,
        train_loader(
            prepared,
            config,
            **of_rank,
            start_sample=resumed.samples if resumed else 0,
            total_steps=steps - (resumed.step if resumed else 0),
            schedule=schedule,
        ),
        eval_loader(prepared, config, **of_rank) if prepared.is_evaluated else None,
        values,
        schedule,
        rhythm,
        resumed,
    )
    if not trains:
        trainer.forward_only()
        return trainer
    _add_callbacks(trainer, rank, console, sent_bytes)
    _begin(trainer, rank, console, is_a_start=is_a_start)
    return trainer


def _begin(trainer: Trainer, rank: Rank, console: TextIO, *, is_a_start: bool) -> None:
    """Note what begins here, and try out what its end will take. Collective."""
    # The most that any node's agent counts: that of a node which has come back begins at 0. Ranks
    # come here from reading weights, each as fast as its disk is.
    restarts = max(from_all_patiently(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))))
    if rank.index > 0:
        return
    run_dir = trainer.run_dir
    if restarts and is_a_start:
        _note_restart(run_dir, restarts, trainer.resumed, rank.world_size)
    changed = _note_provenance(trainer, rank) if is_a_start else []
    _note_start(trainer, trainer.args.max_steps, console)
    _tell_of_changed_code(trainer, changed, console)
    _rehearse_card(trainer)


def _compiling(config: RunConfig, model: PreTrainedModel, rank: Rank, console: TextIO) -> RunConfig:
    """Have the blocks compiled, or not; return the config with trainer.compile true or false.

    What is compiled is kept for later runs.
    """
    config, said = compilation.settled(config, model)
    if config.trainer.compile:
        compilation.keep(cache_root(config.data) / "compiled")
        compilation.compile_blocks(
            model, config.trainer.compile_backend, config.trainer.compile_mode
        )
    if said and rank.index == 0:
        progress.write(said, console)
    return config


def _open_data(config: RunConfig, run_dir: Path, rank: Rank) -> data.Prepared:
    """Return the data of a run. Collective.

    Raises UserError where this machine lacks what the engine needs, before anything is opened, and
    where the prompts do not suit the tokenizer.
    """
    # The launcher has looked at its own node only.
    if problems := list(engine_of(config, rank.world_size).machine_problems()):
        raise UserError("\n".join(problems))
    progress.now("opening the data")
    with together():
        prepared = data.prepare(config, run_dir)
    # Not only when the model is trained and is to answer them.
    sample.check_prompts(config.objective.prompts, prepared.tokenizer, config.objective.kind)
    return prepared


def _length(
    config: RunConfig, prepared: data.Prepared, resumed: Resumed | None
) -> tuple[int, Schedule]:
    """Return a run's steps in all and its schedule. Pure.

    Raises UserError where it is to end before what it is resumed from.
    """
    wanted = samples_wanted(config, prepared.samples_per_epoch, prepared.samples_of_max_tokens)
    at = resumed.progress if resumed is not None else BEGINNING
    steps = total_steps(config.trainer, wanted, at)
    schedule = schedule_of(config.trainer, wanted, at)
    if resumed is not None and (
        problem := why_too_short(config.trainer, wanted, at, resumed.checkpoint.name)
    ):
        raise UserError(problem)
    return steps, schedule


def _sent_bytes(model: PreTrainedModel, config: RunConfig, rank: Rank) -> float:
    """Return what a rank sends in the collectives of a step, of a model that is not divided yet."""
    if rank.world_size == 1:
        return 0.0
    return traffic(config, facts_of(model, config), rank.world_size).sent_bytes


def _add_callbacks(trainer: Trainer, rank: Rank, console: TextIO, sent_bytes: float) -> None:
    """Have a trainer told, measured, evaluated, stopped and tracked as its config asks for."""
    config = trainer.config
    trainer.saver.console = console if rank.index == 0 else None
    trainer.profiler.say = lambda text: progress.write(text, console)
    if rank.index == 0:
        trainer.tracking = Tracking(config, trainer.run_dir, console)
        if config.checkpoint.push_to is not None:
            trainer.publishing = Publishing(config.checkpoint, trainer.run_dir, console)
    device_name = flops.device_name(trainer.args.device)
    cost = flops.cost(trainer.model, config, device_name, rank.world_size)
    metrics = Metrics(trainer, cost, console, sent_bytes=sent_bytes)
    statistics_every = config.trainer.debug.statistics_every_steps
    for callback in [
        EngineReady(trainer, console),
        *([Statistics(trainer, metrics, statistics_every)] if statistics_every else []),
        metrics,
        Progress(
            console,
            compiles=bool(config.trainer.compile),
            summary=metrics.summary,
            samples_at=trainer.samples_at,
        ),
        Comparison(trainer, metrics, lambda text: progress.write(text, console)),
        *([FullBatch(trainer)] if config.trainer.batch_warmup_samples else []),
        *([Compilation(trainer, console)] if config.trainer.compile else []),
        HeldOut(trainer, console),
        early_stopping.EarlyStopping(trainer, console),
        *([trainer.tracking] if trainer.tracking is not None else []),
        *([trainer.publishing] if trainer.publishing is not None else []),
    ]:
        trainer.add_callback(callback)
    trainer.add_own_callbacks()


def _note_provenance(trainer: Trainer, rank: Rank) -> list[str]:
    """Leave what starts here; return what of the user's own code is not what it was before."""
    own = own_code.of(trainer.config)
    changed = list(own_code.changes(own_code.noted(trainer.run_dir), own))
    write_provenance(
        trainer.run_dir,
        world_size=rank.world_size,
        parameters=parameter_count(trainer.model),
        own=own,
        packages=packages.needed(trainer.config).values(),
    )
    return changed


def _tell_of_changed_code(trainer: Trainer, changed: list[str], console: TextIO) -> None:
    """Say it of a run that is resumed, and leave a line in its metrics."""
    if trainer.resumed is None:
        return
    for text in changed:
        progress.write(f"warning: {text}", console)
        run_directory_metrics.note_changed_code(trainer.run_dir, trainer.resumed.step, text)


def _note_start(trainer: Trainer, steps: int, console: TextIO) -> None:
    """Say, and leave in the metrics of the run, what starts here and from where."""
    run_dir, resumed = trainer.run_dir, trainer.resumed
    parameters, trained = parameter_count(trainer.model), adapter.trained_count(trainer.model)
    of_them = "" if trainer.config.adapter.trains_all else f", of which {trained:,} are trained"
    progress.write(f"{parameters:,} parameters{of_them}, {steps:,} steps", console)
    if resumed is None:
        run_directory_metrics.trim_metrics(run_dir)
        return
    progress.write(f"resuming from {resumed.checkpoint.name}", console)
    if (said := nothing_left(trainer.config.trainer, resumed.step, steps)) is not None:
        progress.write(said, console)
    evaluated = resuming.is_evaluated(resumed)
    run_directory_metrics.trim_metrics(run_dir, resumed.step, is_evaluated=evaluated)


def nothing_left(trainer: TrainerConfig, step: int, steps: int) -> str | None:
    """Say that a resume makes no step, by which nothing that it was given could tell. Pure."""
    if step < steps:
        return None
    units = ("max_steps", "max_epochs", "max_tokens")
    limit = next(name for name in units if getattr(trainer, name) is not None)
    return f"all {steps:,} steps are trained already; raise trainer.{limit} to train further"


def _rehearse_card(trainer: Trainer) -> None:
    """Raise UserError where the run's files would not make a model card at its end either."""
    try:
        model_card(trainer, {}, draws=False)
    except Exception as error:
        raise UserError(
            f"{trainer.run_dir}: the model card of final/ cannot be made ({in_one_line(error)}); "
            "find the file of the run that it cannot be made of"
        ) from error


def _build(
    config: RunConfig,
    run_dir: Path,
    words: PreTrainedTokenizerFast,
    resumed: Resumed | None,
    rank: Rank,
    console: TextIO,
) -> tuple[PreTrainedModel, InitialValues]:
    """Return the model and its first values, once final/ is known to hold all that it needs.

    What one by name is made of is kept in the run's directory, whose copy is read.
    """
    kept = None
    if isinstance(config.model, NamedModel):
        checkpoint = resumed.checkpoint if resumed else None
        kept = origin.keep(config.model, config.objective.kind, run_dir, checkpoint)
        if resumed is None and saved.is_checkpoint(config.model.name):
            _check_source(Path(config.model.name), rank)
    directory = kept.directory if kept else None
    # A checkpoint may leave its base out, which is read again as it was.
    left_out = None if resumed is None else resumed.base
    reads_weights = resumed is None or left_out is not None
    began_with = adapter_base.as_it_was(config, left_out)
    model, values = models.build(began_with, words, directory, reads_weights=reads_weights)
    if config.data.has_bounds:
        document_attention.enable(model, config)
    check_blocks_are_not_skipped(model, rank.world_size)
    if config.objective.is_encoder_decoder:
        models.check_decoder_start(model, words)
    # As the Trainer does before its first step (transformers 5.23), when it is too late to look
    # whether the settings can still be saved.
    align_special_tokens(model, words)
    if rank.index == 0:
        rehearse(
            adapter.bare(model),
            words,
            origin.code_in(directory) if directory else {},
            config.objective.kind,
            run_dir / ".rehearsal",
            trusts_code=config.model.trusts_code,
        )
        if kept is not None and resumed is None and config.model.kind == "pretrained":
            _tell_of_origin(kept, drawn(values), console)
    return model, values


def _check_source(checkpoint: Path, rank: Rank) -> None:
    """Raise UserError where a checkpoint of another run is not as it was written. Collective."""
    with progress.phase("checking the checkpoint's hashes", unit="B", comes_again=True) as shown:
        share = rank.index, rank.world_size
        found = from_all_patiently(layout.verify(checkpoint, share=share, advance=shown.advance))
    if problems := list(dict.fromkeys(problem for part in found for problem in part)):
        raise UserError(
            f"model.name={checkpoint} is not whole: {problems[0]}; {layout.remedy(problems)}, or "
            "start from another checkpoint of that run"
        )


def _tell_of_origin(kept: origin.Origin, drawn_anew: list[str], console: TextIO) -> None:
    """Say, and note for the card, what of the pretrained model is not as it was."""
    if kept.refused:
        progress.write(generation.left_out(kept.refused, kept.name), console)
    if drawn_anew:
        progress.write(
            f"warning: {kept.name} has no weights of the head ({', '.join(drawn_anew)}): they "
            "start from random values",
            console,
        )
    origin.note(kept.directory, drawn_anew=drawn_anew)


def _note_restart(run_dir: Path, number: int, resumed: Resumed | None, world_size: int) -> None:
    entry = {
        "time": time.time(),
        "by": history.BY_TORCHRUN,
        "restart": number,
        "checkpoint": resumed.checkpoint.name if resumed else None,
        "world_size": world_size,
    }
    history.append(run_dir, entry)
