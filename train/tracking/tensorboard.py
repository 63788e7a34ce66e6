"""`tracking=tensorboard`: event files under the run directory."""

from __future__ import annotations

import os
import shlex
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from shardwright.train import config as run_config
from shardwright.train.config import RunConfig
from shardwright.train.config.tracking import TensorboardTracking
from shardwright.train.run_directory.names import TENSORBOARD_FOLDER
from shardwright.train.tracking.lines import Line, Missing
from shardwright.train.tracking.tracker import Target, Tracker

SUFFIX = ".shardwright"
"""Ends the name of an event file that this module has written."""


class Tensorboard(Tracker[TensorboardTracking]):
    name = "TensorBoard"

    def open(self) -> Target:
        directory = self.run_dir / TENSORBOARD_FOLDER
        self.say(f"tensorboard --logdir {shlex.quote(str(directory))}")
        return _EventFile(self.config, directory)


class _EventFile:
    """One event file, written anew at each start: it replaces those of earlier starts."""

    def __init__(self, config: RunConfig, directory: Path) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = event_pb2.Event
        self._missing = Missing()
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
            for name, value in self._missing.of(line).items()
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
