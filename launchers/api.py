"""What a program of the user's own calls in place of commands: `import shardwright`."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwright.launchers import resuming, runs, starting
from shardwright.launchers.composition import compose as composition
from shardwright.launchers.machine import facts as machine
from shardwright.train import config as run_config
from shardwright.train.checkpoint.format import layout
from shardwright.train.config import RunConfig
from shardwright.train.errors import BAD_INPUT, RESUMABLE, UserError
from shardwright.train.paths import absolute
from shardwright.train.run_directory import final, metrics
from shardwright.train.run_directory.names import CHECKPOINTS, METRICS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RunFailed(RuntimeError):
    """A run has not come to its end; what went wrong it has printed, and its logs say."""

    def __init__(self, run_dir: Path | None, exit_code: int) -> None:
        self.run_dir, self.exit_code = run_dir, exit_code
        where = "the run" if run_dir is None else str(run_dir)
        super().__init__(
            f"{where} has ended with exit code {exit_code}; what went wrong stands above, and in "
            "its logs/"
        )


@dataclass(frozen=True)
class Run:
    """A run by its directory, which is read anew at each question."""

    run_dir: Path

    @property
    def config(self) -> RunConfig:
        """What it trains by now: after a resume, that of the resume."""
        return run_config.load(self.run_dir)

    @property
    def status(self) -> runs.Status:
        """What it is doing, how far it is, and whether it can be resumed."""
        return runs.of(self.run_dir)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of its metrics.jsonl."""
        return read_metrics(self.run_dir)

    @property
    def checkpoints(self) -> list[Path]:
        """Its whole checkpoints, the newest last."""
        return [path for _, path in layout.whole_checkpoints(self.run_dir / CHECKPOINTS)]

    @property
    def final(self) -> Path | None:
        """The model directory that it has made; None where it is not done."""
        return final.of(self.run_dir)

    def model(self) -> PreTrainedModel:
        """Return the trained model, in fp32. Raises UserError where there is none yet."""
        if (place := self.final) is None:
            raise UserError(
                f"{self.run_dir} has no final/ yet ({self.status.state}); resume it, or recover "
                "one of its checkpoints"
            )
        import transformers

        from shardwright.train.model.remote_code import AUTO_CLASSES
        from shardwright.train.sampling.sample import objective_of

        found: Any = getattr(transformers, AUTO_CLASSES[objective_of(place)])
        loaded: PreTrainedModel = found.from_pretrained(place)
        return loaded


def compose(*overrides: str, config_dir: str | Path | None = None) -> RunConfig:
    """Return the config of the run that overrides ask for, valid and with nothing left open.

    ``overrides`` are those of the command line, such as ``"strategy=zero2"``; ``config_dir`` is a
    folder with options of your own. Nothing is started or written. Raises UserError.
    """
    return _one(overrides, config_dir).configs[0]


def train(
    *what: str | RunConfig, config_dir: str | Path | None = None, check_only: bool = False
) -> Run:
    """Train a run to its end, as `shardwright train` does, and return it.

    ``what`` are overrides, or one config that `compose` gave. Where a queue takes it, it is on its
    way when this returns. With ``check_only`` all is checked that can be before a start, and
    nothing is started. Raises UserError on bad input, RunFailed where it fails, and on a signal to
    stop returns a run that can be resumed.
    """
    _check_thread()
    here = machine.detect(os.environ)
    if what and isinstance(what[0], RunConfig):
        if len(what) > 1:
            raise UserError("a config is whole: give it alone, or compose it with the overrides")
        asked = starting.Runs.of_configs([what[0]])
    else:
        asked = _one([str(each) for each in what], config_dir)
    starting.check(asked.configs, here)
    made = [Path(str(asked.configs[0].run_dir))]
    if check_only:
        return Run(made[0])
    for line in asked.reasons:
        print(line)
    code = starting.start(asked, here, created=made.append)
    return _ended(made[-1], code)


def resume(
    run_dir: str | Path,
    *overrides: str,
    step: int | None = None,
    config_dir: str | Path | None = None,
) -> Run:
    """Resume a run, as `shardwright resume` does, and return it once it has ended.

    ``run_dir`` is its directory or one of its checkpoints. ``step`` chooses another checkpoint
    than the newest whole one. Raises UserError and RunFailed, as `train` does.
    """
    _check_thread()
    folder = None if config_dir is None else str(config_dir)
    place = Path(absolute(run_dir))
    code = resuming.resume(resuming.Asked(place, overrides, step, folder))
    return _ended(resuming.asked(place, step)[0], code)


def recover(
    source: str | Path, out: str | Path, *, step: int | str | None = None, **options: Any
) -> Path:
    """Write whole weights out of any checkpoint, as `shardwright recover` does; return ``out``.

    ``source`` is a checkpoint or a run, of which ``step`` chooses one: a number, "latest" or
    "best". ``options`` are those of the command: dtype="bf16", ema=True, section=..., and so on.
    Raises UserError.
    """
    from shardwright.train.export import recover as recovery

    known = set(recovery.Options.__dataclass_fields__) - {"source", "out", "step"}
    if unknown := sorted(set(options) - known):
        raise UserError(f"recover has no option {unknown[0]}; there are {', '.join(sorted(known))}")
    given: dict[str, Any] = {
        name: Path(absolute(value)) if name in ("base", "config", "tokenizer") and value else value
        for name, value in options.items()
    }
    place = Path(absolute(out))
    given["step"] = step
    asked = recovery.Options(Path(absolute(source)), place, **given)
    recovery.recover(asked, sys.stdout, sys.stderr)
    return place


def load_run(run_dir: str | Path) -> Run:
    """Return a run that there is. Raises UserError where a directory holds none."""
    found = Run(Path(absolute(run_dir)))
    run_config.load(found.run_dir)
    return found


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, in order; none where nothing is logged yet.

    A line that is being written is left out.
    """
    return metrics.lines(Path(absolute(run_dir)) / METRICS)


def _one(overrides: Sequence[str], config_dir: str | Path | None) -> starting.Runs:
    flags = [] if config_dir is None else ["--config-dir", str(config_dir)]
    jobs = composition.compose([*flags, *overrides])
    if len(jobs) != 1 or jobs[0].number is not None:
        raise UserError(
            "train and compose take one run; call them for each, or use `shardwright sweep`"
        )
    return starting.Runs.of(jobs, machine.detect(os.environ))


def _check_thread() -> None:
    """Raise UserError where no signal can be watched for, with which a run is stopped."""
    if threading.current_thread() is not threading.main_thread():
        raise UserError(
            "a run is started from the main thread alone, which gets the signals that stop it; "
            "call it there, or start `shardwright train` as a process"
        )


def _ended(run_dir: Path, code: int) -> Run:
    if code == BAD_INPUT:
        raise UserError(f"{run_dir}: a rank has refused its config; what is wrong stands above")
    if code not in (0, RESUMABLE):
        raise RunFailed(run_dir, code)
    return Run(run_dir)
