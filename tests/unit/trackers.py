"""What a tracker holds, and what it should."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

InitialValues = dict[str, dict[int, float]]


def expected(lines: Sequence[dict[str, Any]], *without: str) -> InitialValues:
    values: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for entry in lines:
        for name, value in entry.items():
            if name not in ("step", *without) and value is not None:
                values[name][entry["step"]] = float(value)
    return dict(values)


def of_tensorboard(directory: Path) -> InitialValues:
    """Return what TensorBoard shows; fails where it shows a step twice."""
    events = EventAccumulator(str(directory))
    events.Reload()
    values = {}
    for tag in events.Tags()["scalars"]:
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        # Two lines of one step, with a loss and with an evaluation, have its counts alike.
        assert len(set(shown)) == len({step for step, _ in shown}), f"{tag} has a step twice"
        values[tag] = dict(shown)
    return values


def of_wandb(directory: Path) -> tuple[InitialValues, dict[str, Any], str]:
    """Return the history, the config and the id in a run's file."""
    from wandb.proto import wandb_internal_pb2

    record_type: Any = wandb_internal_pb2.Record  # type: ignore[attr-defined]

    (path,) = directory.glob("run-*.wandb")
    history: defaultdict[str, dict[int, float]] = defaultdict(dict)
    config: dict[str, Any] = {}
    run_id = ""
    for data in records(path.read_bytes()):
        record = record_type.FromString(data)
        for update in [*record.run.config.update, *record.config.update]:
            if update.key:
                config[update.key] = json.loads(update.value_json)
        run_id = record.run.run_id or run_id
        if record.HasField("history"):
            row = {
                (item.key or ".".join(item.nested_key)): json.loads(item.value_json)
                for item in record.history.item
            }
            step = record.history.step.num
            for name, value in row.items():
                if not name.startswith("_"):
                    assert step not in history[name], f"{name} has step {step} twice"
                    history[name][step] = value
    return dict(history), config, run_id


def records(content: bytes) -> Iterator[bytes]:
    """Yield the records of LevelDB's log format: blocks of 32 KiB, each record in parts."""
    whole, at = b"", 7  # behind the file's own header
    while at + 7 <= len(content):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""
