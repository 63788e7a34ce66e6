"""A tracker's process over a run directory, what it leaves, and what it should."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shardwright.train.config import RunConfig, load


def line(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "samples": 4 * step, "tokens": 256 * step, "time": 1e9 + step, **values}


FIRST = [line(1, loss=7.25), line(2, loss=7.0), line(2, eval_loss=7.125), line(4, loss=6.5)]
# The run was killed at step 4 and resumed at step 2: another evaluation of it, another step 4.
RESUMED = [
    line(1, loss=7.25),
    line(2, loss=7.0),
    line(2, eval_loss=7.0625),
    line(4, loss=6.75),
    line(6, loss=None, stopped_early=True),
]


def freeze(run_dir: Path, tree: dict[str, Any], **tracking_values: Any) -> RunConfig:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump({**tree, "tracking": tracking_values}))
    return load(run_dir)


def write(run_dir: Path, lines: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(entry) + "\n" for entry in lines)
    (run_dir / "metrics.jsonl").write_text(text)


def track(run_dir: Path, *flags: str, **options: Any) -> list[str]:
    """Run the process over what is there; return what it says."""
    ended = subprocess.run(
        [sys.executable, "-m", "shardwright.train.tracking", str(run_dir), "--once", *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **options,
    )
    said = [json.loads(text)["text"] for text in ended.stdout.splitlines()]
    lacks = any("lacks a part of this run" in text for text in said)
    assert ended.returncode == (1 if lacks else 0), ended.stderr
    return said


def make_run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where a run directory is to be, in an environment that says nothing of trackers."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "a run"


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
        assert len(shown) == len({step for step, _ in shown}), f"{tag} has a step twice"
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


def of_mlflow(uri: str, experiment: str = "shardwright") -> list[MlflowRun]:
    """Return the runs of an experiment; fails where one shows a step twice."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    runs = []
    for run in client.search_runs([found.experiment_id]):
        values = {}
        times = set()
        for name in run.data.metrics:
            points = client.get_metric_history(run.info.run_id, name)
            values[name] = {point.step: point.value for point in points}
            assert len(values[name]) == len(points), f"{name} has a step twice"
            times |= {point.timestamp for point in points}
        runs.append(
            MlflowRun(
                run.info.run_id, run.info.status, values, times, run.data.params, run.data.tags
            )
        )
    return runs


@dataclass(frozen=True)
class MlflowRun:
    run_id: str
    status: str
    values: InitialValues
    times: set[int]
    """Milliseconds since 1970."""
    params: dict[str, str]
    tags: dict[str, str]


def of_trackio(directory: Path, project: str = "shardwright") -> list[TrackioRun]:
    """Return the runs of a project; fails where one shows a step twice."""
    # It knows one directory a process, the one that stands there as it is imported.
    ended = subprocess.run(
        [sys.executable, "-c", _READ_TRACKIO, project],
        env={**os.environ, "TRACKIO_DIR": str(directory), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    runs = []
    for run_id, name, config, rows in json.loads(ended.stdout.splitlines()[-1]):
        values: defaultdict[str, dict[int, float]] = defaultdict(dict)
        times = set()
        for row in rows:
            step = row.pop("step")
            times.add(row.pop("timestamp"))
            for key, value in row.items():
                assert step not in values[key], f"{key} has step {step} twice"
                values[key][step] = value
        runs.append(TrackioRun(run_id, name, dict(values), times, config))
    return runs


@dataclass(frozen=True)
class TrackioRun:
    run_id: str
    name: str
    values: InitialValues
    times: set[str]
    config: dict[str, Any]


_READ_TRACKIO = """
import json, sys
import trackio
project = sys.argv[1]
storage = trackio.SQLiteStorage
print(json.dumps([
    (run.id, run.name, run.config, storage.get_logs(project, run_id=run.id))
    for run in trackio.Api().runs(project)
]))
"""
