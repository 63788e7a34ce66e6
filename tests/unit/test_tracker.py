"""The trackers' process: it shows what metrics.jsonl says, and holds nothing up."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shardwright.train import program
from shardwright.train.config.tracking import (
    MlflowTracking,
    TensorboardTracking,
    TrackingSection,
    TrackioTracking,
    WandbTracking,
    most_cautious_mode,
    wandb_mode,
    wandb_name,
    wandb_problems,
    wandb_project,
    wandb_unused,
)
from shardwright.train.loop.callbacks import tracking
from shardwright.train.tracking.lines import Tail
from tests.unit.trackers import (
    FIRST,
    RESUMED,
    expected,
    freeze,
    line,
    make_run_dir,
    of_tensorboard,
    of_wandb,
    track,
    write,
)

run_dir = pytest.fixture(make_run_dir)

KEY = "0123456789abcdef0123456789abcdef01234567"


def test_tensorboard_shows_metrics_over_a_resume(run_dir: Path, tiny_tree: Any) -> None:
    freeze(run_dir, tiny_tree("clm"), kind="tensorboard")
    write(run_dir, FIRST)
    assert track(run_dir) == [f"tensorboard --logdir '{run_dir / 'tensorboard'}'"]
    assert of_tensorboard(run_dir / "tensorboard") == expected(FIRST, "time")
    write(run_dir, RESUMED)
    track(run_dir)
    assert of_tensorboard(run_dir / "tensorboard") == expected(RESUMED, "time")
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert {event.wall_time for event in events.Scalars("loss")} == {1e9 + 1, 1e9 + 2, 1e9 + 4}
    (text,) = events.Tensors("config")
    assert b"learning_rate: 0.001" in text.tensor_proto.string_val[0]


def test_wandb_keeps_one_run_over_a_resume(run_dir: Path, tiny_tree: Any) -> None:
    tree = tiny_tree("clm")
    config = freeze(run_dir, tree, kind="wandb", mode="offline", tags=["a"])
    write(run_dir, FIRST)
    (first,) = track(run_dir)
    (directory,) = (run_dir / "wandb").glob("offline-run-*")
    assert first == f"wandb offline; later: wandb sync '{directory}'"
    history, found, run_id = of_wandb(directory)
    assert history == expected(FIRST)
    found.pop("_wandb")
    assert found == config.model_dump(mode="json", by_alias=True)

    write(run_dir, RESUMED)
    time.sleep(1.0 - time.time() % 1.0)  # its directories' names have a second's resolution
    (resumed,) = track(run_dir)
    (newest,) = set((run_dir / "wandb").glob("offline-run-*")) - {directory}
    assert resumed.endswith(f"wandb sync '{newest}'")
    assert of_wandb(newest)[::2] == (expected(RESUMED), run_id)


def test_a_server_that_does_not_answer_holds_up_nothing(
    run_dir: Path, tiny_tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for no longer than the bound, and the run is on the disk, whole."""
    config = freeze(run_dir, tiny_tree("clm"), kind="wandb", mode="online")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(tracking, "OFFLINE_SECONDS", 100.0)  # of a loaded machine
    console = io.StringIO()
    tracked = tracking.Tracking(config, run_dir, console)
    tracked.start()
    assert console.getvalue() == "", "it waits for nothing"
    write(run_dir, FIRST)
    tracked.close("done", seconds=0.5)
    (directory,) = (run_dir / "wandb").glob("offline-run-*")
    why = "W&B's server has not answered so far"
    assert console.getvalue() == f"{why}; wandb offline; later: wandb sync '{directory}'\n"
    assert of_wandb(directory)[0] == expected(FIRST)


def test_a_full_disk_is_told_once_and_what_lacks_comes_later(
    run_dir: Path, tmp_path: Path, tiny_tree: Any
) -> None:
    freeze(run_dir, tiny_tree("clm"), kind="tensorboard")
    lines = [line(step, loss=1 / step) for step in range(1, 200)]
    write(run_dir, lines)

    def small_files() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    where, first, last = track(run_dir, preexec_fn=small_files)
    assert where.startswith("tensorboard --logdir ")
    assert first.startswith(
        "warning: TensorBoard fails ([Errno 27] File too large); training continues"
    )
    command = "later: " + program.command("sync", str(run_dir))
    assert last.startswith("warning: TensorBoard lacks a part of this run (")
    assert last.endswith(command)
    # As a person runs what was printed, who has modules of our names.
    for name in ("train", "launchers"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the user has run {name}.py')\n")
    line_to_run = last.partition("; later: ")[2]
    ended = subprocess.run(
        ["bash", "-c", line_to_run], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, ""), line_to_run
    assert ended.stdout == f"{where}\n"
    assert len(of_tensorboard(run_dir / "tensorboard")["loss"]) == 199


def test_a_tracker_that_cannot_start_or_is_killed_is_told(
    run_dir: Path, tiny_tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = freeze(run_dir, tiny_tree("clm"), kind="tensorboard")
    write(run_dir, FIRST)
    console = io.StringIO()
    tracked = tracking.Tracking(config, run_dir, console)
    tracked.start()
    assert tracked._companion is not None
    os.kill(tracked._companion.process.pid, signal.SIGKILL)
    tracked.close("done")
    command = "later: " + program.command("sync", str(run_dir)) + "\n"
    assert console.getvalue().endswith(command)
    assert "warning: tracking=tensorboard was killed by SIGKILL" in console.getvalue()

    monkeypatch.setattr(sys, "executable", str(run_dir / "nothing"))
    console = io.StringIO()
    tracked = tracking.Tracking(config, run_dir, console)
    tracked.start()
    tracked.close("done")
    assert console.getvalue().startswith("warning: tracking=tensorboard cannot be started (")
    assert console.getvalue().endswith(command)


def test_lines_come_as_they_are_written_and_broken_ones_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert list(tail.lines()) == []
    path.write_text(json.dumps(line(1)) + '\n{"step": 2, "ti')
    assert list(tail.lines()) == [line(1)]
    with path.open("a") as file:
        file.write(json.dumps(line(3)) + "\n" + json.dumps(line(4)) + "\n")
    assert list(tail.lines()) == [line(4)], "a full disk has cut step 2 short, and 3 with it"
    tail.rewind()
    assert list(tail.lines()) == [line(1), line(4)]
    assert list(Tail(Path("/dev/full")).lines()) == []


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, None),
        ({"WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "ONLINE"}, "online"),
        ({"WANDB_MODE": "online", "WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_DISABLED": "false"}, None),
    ],
)
def test_the_environment_has_its_say(environment: dict[str, str], mode: str | None) -> None:
    assert wandb_mode(environment) == mode


def test_a_rank_takes_the_more_cautious_mode() -> None:
    assert most_cautious_mode("online", None) == "online"
    assert most_cautious_mode("online", "offline") == "offline"
    assert most_cautious_mode("offline", "online") == "offline"
    assert most_cautious_mode("offline", "disabled") == "disabled"


def test_names_come_from_the_config_or_else_from_the_environment() -> None:
    said = {"WANDB_PROJECT": "theirs", "WANDB_NAME": "their run", "WANDB_ENTITY": "them"}
    nothing = WandbTracking(kind="wandb")
    ours = WandbTracking(kind="wandb", project="ours", tags=("a", "b"))
    assert wandb_project(nothing, said) == "theirs"
    assert wandb_project(nothing, {}) == "shardwright"
    assert wandb_project(ours, said) == "ours"
    assert (wandb_name("run", said), wandb_name("mine", said)) == ("their run", "mine")
    assert wandb_unused("run", nothing, said) == []
    unused = wandb_unused("mine", ours, {**said, "WANDB_TAGS": "a,b"})
    assert unused == ["WANDB_PROJECT=theirs", "WANDB_NAME=their run"]


def test_what_contradicts_the_config_is_an_error() -> None:
    online = WandbTracking(kind="wandb", mode="online")
    assert wandb_problems(online, {"WANDB_MODE": "offline"}) == [
        "tracking.mode=online, but WANDB_MODE=offline requests offline; unset WANDB_MODE, or set "
        "tracking.mode=offline"
    ]
    assert wandb_problems(online, {"WANDB_MODE": "run"}) == []
    assert wandb_problems(WandbTracking(kind="wandb"), {"WANDB_MODE": "offline"}) == []
    assert wandb_problems(online, {"WANDB_MODE": "of"}) == [
        "WANDB_MODE=of is not known; use online, offline or disabled, or unset it"
    ]


def test_what_a_runs_header_says_of_its_tracker() -> None:
    def said(section: TrackingSection, **environment: str) -> str:
        return section.in_words("run", environment, None, has_key=False)

    here = MlflowTracking(kind="mlflow")
    assert said(here) == "mlflow (in the run directory)"
    by_environment = said(here, MLFLOW_TRACKING_URI="postgresql://me:secret@host/db")
    assert by_environment == "mlflow (postgresql://***@host/db, by MLFLOW_TRACKING_URI)"
    there = MlflowTracking(kind="mlflow", uri="http://host:5000")
    assert said(there, MLFLOW_TRACKING_URI="http://other") == "mlflow (http://host:5000)"
    assert said(TrackioTracking(kind="trackio"), TRACKIO_DIR="/shared") == "trackio (/shared)"
    assert said(TrackioTracking(kind="trackio"), TRACKIO_SPACE_ID="me/space") == (
        "trackio (in the run directory); TRACKIO_SPACE_ID is not used: later by `trackio sync`"
    )
    assert said(TensorboardTracking(kind="tensorboard")) == "tensorboard"


def test_paths_of_trackers_mean_the_same_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mlflow = MlflowTracking(kind="mlflow", uri="sqlite:///a/b.db").settled(None, has_key=False)
    trackio = TrackioTracking(kind="trackio", directory="a").settled(None, has_key=False)
    assert mlflow.uri == f"sqlite:///{tmp_path}/a/b.db"
    assert trackio.directory == f"{tmp_path}/a"
    assert MlflowTracking(kind="mlflow").settled(None, has_key=False).uri is None
