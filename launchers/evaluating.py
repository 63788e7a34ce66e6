"""Evaluate by itself: what is measured, in a directory of its own; the run's is read alone."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwright.launchers import launch, messages
from shardwright.launchers.diagnosing.replay import UNITS, launcher_here
from shardwright.launchers.machine import names
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.ranks import child
from shardwright.launchers.ranks.command import rank_command
from shardwright.launchers.ranks.environment import rank_environment
from shardwright.launchers.registry import launcher_of
from shardwright.train.checkpoint.format import layout
from shardwright.train.config import RunConfig, TorchrunLauncher, to_yaml
from shardwright.train.config.checkpoint import without_pushes
from shardwright.train.console import progress
from shardwright.train.durable import write_text
from shardwright.train.errors import BAD_INPUT, FAILED, RESUMABLE, UserError
from shardwright.train.run_directory import evaluations
from shardwright.train.run_directory.evaluations import Evaluated
from shardwright.train.run_directory.failures import rank_failures
from shardwright.train.run_directory.names import (
    DATA_JSON,
    FINAL,
    FINAL_EARLIER,
    LOGS,
    RUN_CONFIG,
    TOKENIZER_FOLDER,
    TORCHRUN_LOG,
)

TRAINS_NOTHING: dict[str, Any] = {
    **{"max_steps": 1, "max_epochs": None, "max_tokens": None},
    **{"warmup_steps": 0, "warmup_fraction": 0.0},
    **{"batch_warmup_from": None, "batch_warmup_samples": 0},
    **{"early_stopping_patience": None, "early_stopping_threshold": 0.0},
    **{"on_spike": "ignore", "debug": {}, "profile": {}, "callbacks": []},
    **{f"{kind}_every_{unit}": None for kind in ("eval", "save") for unit in UNITS},
}
"""Of the section "trainer", where no step is made."""


READ = {
    *("global_batch_size", "micro_batch_size", "eval_micro_batch_size", "eval_max_samples"),
    *("compile", "compile_backend", "compile_mode", "fused_loss", "deterministic"),
    *("dataloader_workers", "hang_timeout_seconds"),
}
"""Of the section "trainer", what an evaluation reads."""


def not_read(overrides: Iterable[str]) -> list[str]:
    """Return the overrides that an evaluation takes and does not read. Pure.

    They are not refused: by one of them the run's optimizer may fit another strategy.
    """
    found = []
    for word in overrides:
        group, _, name = word.partition("=")[0].partition(".")
        if group in ("checkpoint", "tracking") or (
            group == "trainer" and name.partition(".")[0] not in READ
        ):
            found.append(word)
    return found


@dataclass(frozen=True)
class Target:
    """What is to be evaluated."""

    weights: Path
    """A checkpoint, or a model directory."""
    run_dir: Path | None
    """The run that it belongs to."""
    step: int
    """0 where it is not known."""


def target(place: Path, step: int | str | None) -> Target:
    """Return what a path means: a run's final/ or newest checkpoint, a checkpoint, a model.

    Raises UserError where it is none of them.
    """
    if not place.is_dir():
        raise UserError(
            f"{place} is not a directory; give a run, one of its checkpoints, or a model directory"
        )
    weights = Path(names.model(str(place), step))
    if why := names.unusable_checkpoint(str(weights)):
        raise UserError(why.removeprefix("model.name="))
    if (weights / layout.MANIFEST).is_file():
        return Target(weights, names.run_of(weights), layout.read_manifest(weights).step)
    if not (weights / "config.json").is_file():
        raise UserError(
            f"{place} holds no run, no checkpoint of one and no model: there is neither a "
            f"{RUN_CONFIG} nor a {layout.MANIFEST} nor a config.json"
        )
    run_dir = weights.parent if weights.name in (FINAL, FINAL_EARLIER) else None
    if run_dir is not None and not (run_dir / RUN_CONFIG).is_file():
        run_dir = None
    return Target(weights, run_dir, 0)


def config_of_run(
    config: RunConfig, weights: Path, directory: Path, *, as_job: bool = False
) -> dict[str, Any]:
    """Return the tree by which a run's weights are evaluated: its own, but that it trains nothing.

    Its ranks start here, or ``as_job``. Pure. Raises UserError where they cannot all be here, and
    where nothing is held out.
    """
    if not config.data.is_evaluated:
        raise UserError(
            "the run holds out no documents (data.eval_fraction=0); give some to evaluate on with "
            "data.eval_paths='{NAME: PATH}'"
        )
    tree: dict[str, Any] = config.model_dump(mode="json", by_alias=True)
    tree |= {"run_dir": str(directory), "sweep_dir": None, "tracking": {"kind": "none"}}
    before = config.model
    # Its config.json says what was overridden, and how it tells positions apart.
    tree["model"] = {
        "kind": "pretrained",
        "name": str(weights),
        "attention": before.attention,
        "fused_gelu": getattr(before, "fused_gelu", False),
        "trust_remote_code": before.trusts_code,
        "import": list(before.imports),
    }
    tree["adapter"] = {"kind": "none"}  # it is in the weights
    if tree["tokenizer"].get("vocab_size", 0) is None:  # it is there, and not trained again
        tree["tokenizer"]["vocab_size"] = before.vocabulary
    tree["objective"]["prompts"] = []
    tree["data"]["stages"] = []
    tree["trainer"] |= TRAINS_NOTHING
    tree["checkpoint"] |= {"keep_every_steps": None, "keep_best": 0, "export": "last"}
    tree["checkpoint"] |= without_pushes()
    tree["checkpoint"]["best_metric"] = "eval_loss"
    if as_job:
        tree["launcher"] |= {"requeue": False, "wait": True}  # there is nothing to resume
    else:
        tree["launcher"] = launcher_here(config, "an evaluation", _REMEDY) or tree["launcher"]
    return tree


_REMEDY = (
    "give launcher=torchrun launcher.nproc_per_node=N, and a strategy that fits so many, or "
    "launcher=slurm, which submits a job"
)


def check_starts_here(config: RunConfig, keys: Iterable[str]) -> None:
    """Raise UserError where settings of a job are given to ranks that start here. Pure.

    ``keys`` are those that the command line sets.
    """
    of_jobs = {f"launcher.{name}" for name in type(config.launcher).model_fields}
    of_jobs -= {f"launcher.{name}" for name in TorchrunLauncher.model_fields}
    if config.launcher.is_job and (found := [key for key in keys if key in of_jobs]):
        raise UserError(
            f"{found[0]} is a setting of a job, and this evaluation starts on this machine; add "
            "launcher=slurm, which submits it as a job, or leave it out"
        )


def lay_out(directory: Path, config: RunConfig, of: Target, *, has_own_data: bool) -> None:
    """Write what the ranks read; ``has_own_data`` says that the run's tokens are those wanted."""
    write_text(directory / RUN_CONFIG, to_yaml(config))
    (directory / LOGS).mkdir()
    if of.run_dir is not None:
        shutil.copytree(of.run_dir / TOKENIZER_FOLDER, directory / TOKENIZER_FOLDER)
        if has_own_data and (of.run_dir / DATA_JSON).exists():
            shutil.copy2(of.run_dir / DATA_JSON, directory / DATA_JSON)
    evaluations.request(directory, of.step)


@contextmanager
def directory_of(of: Target, *, as_job: bool = False) -> Iterator[Path]:
    """Give a directory for the ranks of an evaluation; it stays where they have failed in it.

    That of a job, whose nodes are to see it, lies beside the run or the model.
    """
    home = of.run_dir or of.weights
    prefix, parent = f"{home.name}-evaluate-", home.parent if as_job else None
    try:
        directory = Path(tempfile.mkdtemp(prefix=f".{prefix}" if as_job else prefix, dir=parent))
    except OSError as error:
        raise UserError(
            f"{parent or tempfile.gettempdir()} cannot hold a directory for the evaluation "
            f"({error.strerror}); "
            + (f"evaluate a copy of {home} that lies where you may write" if as_job else "free it")
        ) from None
    try:
        yield directory
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def run(directory: Path, config: RunConfig, here: Machine) -> Evaluated | int:
    """Prepare what is not prepared, start the ranks and wait; return what they have measured.

    Or an exit code, where they have not: it is told why. Raises UserError where they refuse.
    """
    queue = launcher_of(config).queue
    with _stdout_for_the_result():
        if queue is not None:
            ended = child.Ended(queue.waited(config), None)
        elif not (directory / DATA_JSON).exists() and (code := launch.prepare(config, None)):
            return code
        else:
            ended = _run_here(directory, config, here)
    if (found := evaluations.outcome(directory)) is not None:
        return found
    failures = rank_failures(directory)
    code = messages.exit_code(ended.code, failures, ended.stopped_by)
    if code == BAD_INPUT and failures:
        raise UserError(failures[0].message)
    if ended.stopped_by is not None or (queue is None and code in (0, RESUMABLE)):
        return 128 + (ended.stopped_by or 2)
    if queue is not None and not failures:
        print(
            f"the job has ended before it had measured anything; its logs are in "
            f"{directory / LOGS}. Where its time was up, give it more with launcher.time_limit=",
            file=sys.stderr,
        )
        return code or FAILED
    print(messages.failure(ended.code, failures, directory, None), file=sys.stderr)
    return code


def _run_here(directory: Path, config: RunConfig, here: Machine) -> child.Ended:
    """Start the ranks on this machine, and wait."""
    environment = {
        **rank_environment(config, here, os.environ),
        progress.BEGAN: f"{time.time()}",
    }
    launcher = launcher_of(config)
    for name, text in launcher.files(environment, here).items():
        write_text(directory / name, text)
    return child.run(
        rank_command(config, directory, machine=here),
        environment,
        stderr_file=directory / LOGS / TORCHRUN_LOG if launcher.has_pages else None,
        grace_seconds=0,  # they have nothing to save
        run_dir=directory,
    )


@contextmanager
def _stdout_for_the_result() -> Iterator[None]:
    """Have what ranks print, or is said of them here, go to stderr: stdout is for the result."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
