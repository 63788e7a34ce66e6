"""A run's tracker, in a process of its own: `python -m shardwright.train.tracker RUN_DIR`.

It hands every line of metrics.jsonl on, as it is, so that TensorBoard and W&B show the numbers of
the run at the run's steps; a line that a resume has dropped is not handed on again. Whatever it
waits for or fails at holds up nothing but this process.

Its stdin is open as long as the run lasts, and a word there says how that ended. It writes a line
of JSON to stdout for each thing that a person is to be told.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
import select
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from shardwright.train import config as run_config
from shardwright.train import program
from shardwright.train.config import RunConfig
from shardwright.train.config.tracking import (
    TensorboardTracking,
    WandbTracking,
    most_cautious_mode,
    wandb_mode,
    wandb_name,
    wandb_project,
)
from shardwright.train.durable import write_text
from shardwright.train.errors import FAILED
from shardwright.train.process import signals
from shardwright.train.process.arguments import decoded
from shardwright.train.run_directory.names import METRICS, TENSORBOARD_FOLDER, WANDB_FOLDER

POLL_SECONDS = 0.5
INIT_SECONDS = 60.0
"""How long W&B's server may take to answer before the run is written offline."""
FINISH_SECONDS = 20.0
"""How long W&B may take to send what is left at the end."""
RETRY_SECONDS = (10.0, 300.0)
"""The first wait before a tracker that failed is tried again, and the longest."""
RUN_ID = "shardwright-run-id"
"""In RUN_DIR/wandb: which run of W&B's this is, over all resumes."""
SUFFIX = ".shardwright"
"""Ends the name of an event file that this module has written."""

Line = Mapping[str, Any]
Say = Callable[..., None]


class Target(Protocol):
    """Where lines go. Its methods raise whatever its library raises."""

    first_step: int
    """Lines of earlier steps are there already."""

    def write(self, line: Line) -> None: ...

    def caught_up(self) -> None:
        """Make what was written visible."""

    def finish(self, outcome: str) -> None: ...


# --- TensorBoard ----------------------------------------------------------------------------------


class Tensorboard:
    """One event file, written anew at each start: it replaces those of earlier starts."""

    first_step = 0

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = event_pb2.Event
        directory = run_dir / TENSORBOARD_FOLDER
        directory.mkdir(exist_ok=True)
        self._earlier = sorted(directory.glob(f"events.out.tfevents.*{SUFFIX}"))
        unique = f"{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = directory / f"events.out.tfevents.{unique}{SUFFIX}"
        self._writer = RecordWriter(self._path.open("xb"))
        self._put(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        # A TensorBoard that is open, and files of other writers, know of steps that come again.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._put(self._event(wall_time=time.time(), step=0, session_log=start))
        self._put(self._config_text(run_config.to_yaml(config)))

    def _config_text(self, text: str) -> Any:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.plugins.text import metadata

        shown = "\n".join(f"    {line}" for line in text.splitlines())  # Markdown's code
        tensor = TensorProto(
            dtype="DT_STRING",
            string_val=[shown.encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        about = metadata.create_summary_metadata("config", "")
        value = Summary.Value(tag="config", tensor=tensor, metadata=about)
        return self._event(wall_time=time.time(), summary=Summary(value=[value]))

    def _put(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())

    def write(self, line: Line) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # A scalar is an fp32 there, which holds no time; each event has one of its own.
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in _numbers(line).items()
            if name != "time"
        ]
        summary = Summary(value=values)
        self._put(self._event(wall_time=line["time"], step=line["step"], summary=summary))

    def caught_up(self) -> None:
        self._writer.flush()
        while self._earlier:
            self._earlier.pop().unlink(missing_ok=True)

    def finish(self, outcome: str) -> None:
        self._writer.close()

    def discard(self) -> None:
        """Remove a file that could not be written; the next one has all that it has."""
        with suppress(OSError):
            self._writer.close()
        with suppress(OSError):
            self._path.unlink()


# --- W&B ------------------------------------------------------------------------------------------


class Wandb:
    """The run of W&B's that belongs to this directory; offline, all of it at each start."""

    def __init__(self, config: RunConfig, run_dir: Path, mode: str) -> None:
        import wandb

        tracking = config.tracking
        assert isinstance(tracking, WandbTracking)
        self.mode = mode
        settings = wandb.Settings(
            console="off",  # this process prints nothing of the run
            init_timeout=INIT_SECONDS,
            login_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
            x_stats_pid=os.getppid(),  # the rank,
        )
        self._run = wandb.init(
            mode=mode,  # type: ignore[arg-type]
            id=_run_id(run_dir),
            resume="allow",
            project=wandb_project(tracking, os.environ),
            entity=tracking.entity,
            name=wandb_name(config.name, os.environ),
            tags=tracking.tags or None,
            dir=os.environ.get("WANDB_DIR") or str(run_dir),
            config=config.model_dump(mode="json", by_alias=True),
            settings=settings,
        )
        self.first_step = self._run.starting_step
        self._directory = Path(self._run.dir).parent

    @property
    def where(self) -> str:
        if self.mode == "online":
            return f"wandb online: {self._run.url}"
        return f"wandb offline; later: {self.later}"

    @property
    def later(self) -> str:
        return f"wandb sync {shlex.quote(str(self._directory))}"

    def write(self, line: Line) -> None:
        values = _numbers(line)
        self._run.log({**values, "_timestamp": line["time"]}, step=line["step"])

    def caught_up(self) -> None:
        pass

    def finish(self, outcome: str) -> None:
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if outcome == "done" else 1)


def _run_id(run_dir: Path) -> str:
    """Return the run's id, which its first start chooses; WANDB_RUN_ID counts then."""
    path = run_dir / WANDB_FOLDER / RUN_ID
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        pass
    path.parent.mkdir(exist_ok=True)
    found = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    write_text(path, f"{found}\n")
    return found


def _numbers(line: Line) -> dict[str, float]:
    """Return a line's values, those left out that were not finite. Pure."""
    return {
        name: float(value) if isinstance(value, bool) else value
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


# --- what is handed on ----------------------------------------------------------------------------


class Tail:
    """The lines of metrics.jsonl, as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def rewind(self) -> None:
        self._position = 0

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the whole lines that have come; what a full disk has cut short is left out."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            for text in file:
                if not text.endswith(b"\n"):
                    break
                self._position += len(text)
                with suppress(ValueError, TypeError, KeyError):
                    line = json.loads(text)
                    line["step"], line["time"] = int(line["step"]), float(line["time"])
                    yield line


class Handover:
    """Hands lines on to a target, and opens it anew where it fails."""

    def __init__(self, open_target: Callable[[], Target], tail: Tail, say: Say, what: str) -> None:
        self._open, self._tail, self._say, self._what = open_target, tail, say, what
        self._target: Target | None = None
        self._retry_at = 0.0
        self._wait_seconds = RETRY_SECONDS[0]
        self.problem: str | None = None
        """Why the target lacks lines at present."""
        self._is_told = False

    def hand_over(self, *, at_last: bool = False) -> None:
        """Hand on what has come; ``at_last`` tries a target that fails once more in any case."""
        if self._target is None and time.monotonic() < self._retry_at and not at_last:
            return
        try:
            if self._target is None:
                self._tail.rewind()
                self._target = self._open()
            for line in self._tail.lines():
                if line["step"] >= self._target.first_step:
                    self._target.write(line)
            self._target.caught_up()
        except Exception as error:  # whatever tracker libraries raise
            self._failed(error)
        else:
            self.problem, self._wait_seconds = None, RETRY_SECONDS[0]

    def finish(self, outcome: str) -> None:
        """Hand on the rest and close the target."""
        self.hand_over(at_last=True)
        if self._target is None:
            return
        try:
            self._target.finish(outcome)
        except Exception as error:
            self.problem = _in_a_line(error)

    def _failed(self, error: Exception) -> None:
        self.problem = _in_a_line(error)
        print(f"{self._what} fails: {error!r}", file=sys.stderr, flush=True)
        if not self._is_told:
            self._is_told = True
            self._say(
                f"warning: {self._what} fails ({self.problem}); training continues, and what is "
                "missing there is written once that is possible again"
            )
        if isinstance(self._target, Tensorboard):
            self._target.discard()
        self._target = None
        self._retry_at = time.monotonic() + self._wait_seconds
        self._wait_seconds = min(2 * self._wait_seconds, RETRY_SECONDS[1])


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).partition("\nConsider")[0].split())
    return text or type(error).__name__


class OpenWandb:
    """Opens W&B; from the first failure on offline, which waits for no server."""

    def __init__(
        self, config: RunConfig, run_dir: Path, mode: str, say: Say, *, why: str = ""
    ) -> None:
        """``why`` it is offline where the config has it online; told before where it lies."""
        self._config, self._run_dir, self._mode, self._say = config, run_dir, mode, say
        self._why = why
        self.opened: Wandb | None = None

    def __call__(self) -> Wandb:
        import wandb

        mode, self._mode = self._mode, "offline"
        failed, self._why = self._why, ""
        if self.opened is not None:
            wandb.teardown()
        if mode == "online":
            try:
                self.opened = self._in(mode)
            except Exception as error:  # its own, those of its service and of the network
                print(f"W&B fails: {error!r}", file=sys.stderr, flush=True)
                failed = f"W&B cannot be reached ({_in_a_line(error)}); "
                mode = "offline"
        if mode == "offline":
            self.opened = self._in(mode)
        assert self.opened is not None
        self._say(failed + self.opened.where, later=self.opened.later)
        return self.opened

    def _in(self, mode: str) -> Wandb:
        return Wandb(self._config, self._run_dir, mode)


# --- the process ----------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Hand metrics on until the run has ended; return 0, even where a tracker has failed.

    With --once alone, as a person asks, the exit code tells of that.
    """
    for number in signals.SIGNALS:  # its stdin says when to end
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(
        prog="python -m shardwright.train.tracker", description=__doc__
    )
    parser.add_argument("run_dir", type=decoded, help="the run's directory")
    parser.add_argument("--once", action="store_true", help="send what is there, and end")
    parser.add_argument("--offline", action="store_true", help="contact no server")
    options = parser.parse_args(argv)
    run_dir = Path(options.run_dir)
    # Libraries print freely, and stdout is for what this module says.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(text: str, later: str | None = None) -> None:
        with suppress(OSError):  # the rank is gone
            print(json.dumps({"text": text, "later": later}), file=out)

    config = run_config.load(run_dir)
    if isinstance(config.tracking, TensorboardTracking):
        return _track(lambda: Tensorboard(config, run_dir), run_dir, "TensorBoard", say, options)
    assert isinstance(config.tracking, WandbTracking), "the rank starts no other"
    mode = most_cautious_mode(config.tracking.mode, wandb_mode(os.environ))
    if mode == "disabled":
        say("wandb disabled, by WANDB_MODE or WANDB_DISABLED")
        return 0
    why = ""
    if options.offline and mode == "online":
        mode, why = "offline", "W&B's server has not answered so far; "
    opener = OpenWandb(config, run_dir, mode, say, why=why)
    return _track(opener, run_dir, "W&B", say, options)


def _track(
    opener: Callable[[], Target], run_dir: Path, what: str, say: Say, options: argparse.Namespace
) -> int:
    handover = Handover(opener, Tail(run_dir / METRICS), say, what)
    said = b"done\n" if options.once else b""
    is_open = not options.once
    handover.hand_over()
    while is_open and not said.endswith(b"\n"):
        if select.select([0], [], [], POLL_SECONDS)[0]:
            heard = os.read(0, 64)
            said += heard
            is_open = bool(heard)
        handover.hand_over()
    handover.finish(said.decode().strip() or "failed")
    if handover.problem is not None:
        opened = getattr(opener, "opened", None)
        later = opened.later if opened is not None else program.command("sync", str(run_dir))
        say(f"warning: {what} lacks a part of this run ({handover.problem}); later: {later}")
        if options.once and not options.offline:  # a person has asked for it
            return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
