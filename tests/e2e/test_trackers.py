"""What trackers show of a run that was killed, resumed, stopped and resumed again: one curve."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.cli import crash, finish, on_one_rank, shardwright, start, wait_until
from tests.unit.trackers import (
    InitialValues,
    expected,
    of_mlflow,
    of_tensorboard,
    of_trackio,
    of_wandb,
)

SAVE_EVERY_STEPS = 100
ONE_CURVE = "one run over all starts"


def steps(run_dir: Path) -> list[int]:
    """Return the steps of which metrics.jsonl has a loss."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry["step"] for entry in entries if "loss" in entry]


def newest(run_dir: Path) -> int:
    """Return the step of the newest whole checkpoint, 0 where there is none."""
    found = (run_dir / "checkpoints").glob("checkpoint-*/manifest.json")
    return max((int(path.parent.name.rpartition("-")[2]) for path in found), default=0)


def shown(kind: str, run_dir: Path) -> int:
    """Return the last step that a tracker shows so far, 0 where that is none."""
    if kind == "tensorboard":
        return max(of_tensorboard(run_dir / kind).get("loss", {0: 0.0}), default=0)
    if kind == "wandb":
        directories = sorted((run_dir / kind).glob("offline-run-*"))
        return max(of_wandb(directories[-1])[0].get("loss", {0: 0.0})) if directories else 0
    (path,) = (run_dir / kind).glob("*.db")
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return database.execute("SELECT max(step) FROM metrics").fetchone()[0] or 0


def is_beyond_the_newest_checkpoint(kind: str, run_dir: Path) -> bool:
    try:
        return 0 < newest(run_dir) < shown(kind, run_dir)
    except (OSError, ValueError, sqlite3.Error):  # it is only being made
        return False


def read_back(kind: str, run_dir: Path) -> InitialValues:
    """Return what a tracker shows in the end; fails where a step stands there twice."""
    if kind == "tensorboard":
        return of_tensorboard(run_dir / kind)
    if kind == "wandb":
        starts = [of_wandb(path) for path in sorted((run_dir / kind).glob("offline-run-*"))]
        assert len({run_id for _, _, run_id in starts}) == 1, ONE_CURVE
        values = starts[-1][0]
        values.pop("time")
        return values
    if kind == "mlflow":
        (run,) = of_mlflow(f"sqlite:///{run_dir / kind / 'mlflow.db'}")
        assert run.status == "FINISHED"
        return run.values
    (row,) = of_trackio(run_dir / kind)
    return row.values


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_killed_and_a_stopped_run_are_one_curve(
    kind: str, tmp_path: Path, tiny: Callable[[str], tuple[str, ...]]
) -> None:
    pytest.importorskip(kind)
    run_dir = tmp_path / "run"
    overrides = [
        *on_one_rank(tiny("clm")),
        f"tracking={kind}",
        *(["tracking.mode=offline"] if kind == "wandb" else []),
        "precision=fp32",
        "trainer.max_steps=1000000",
        "trainer.lr_scheduler=constant",
        "trainer.global_batch_size=4",
        f"trainer.save_every_steps={SAVE_EVERY_STEPS}",
        f"trainer.eval_every_steps={SAVE_EVERY_STEPS // 2}",
    ]
    process = start("train", *overrides, cwd=tmp_path)
    for _ in range(3):
        wait_until(lambda: is_beyond_the_newest_checkpoint(kind, run_dir))
        crash(process)
        process.communicate()
        killed_at, saved = steps(run_dir)[-1], newest(run_dir)
        shown_at = shown(kind, run_dir)
        process = start("resume", "run", cwd=tmp_path)
        if shown_at > saved:  # the kill was quicker than the next checkpoint
            break
    assert shown_at > saved, "what is trained again had been shown"

    wait_until(lambda: steps(run_dir)[-1] > killed_at)
    process.send_signal(signal.SIGTERM)
    stopped = finish(process)
    assert stopped.returncode == 75, stopped
    last = newest(run_dir) + 10
    ended = shardwright("resume", "run", f"trainer.max_steps={last}", cwd=tmp_path)
    assert ended.returncode == 0, ended
    assert "warning: tracking" not in ended.stdout + ended.stderr
    assert "lacks a part" not in ended.stdout + ended.stderr

    assert steps(run_dir) == list(range(1, last + 1)), "metrics.jsonl itself has no gap"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    values = expected(lines, "time")
    assert len(values["eval_loss"]) > 2
    tolerance = 1e-6 if kind == "tensorboard" else 0.0  # it holds fp32
    assert read_back(kind, run_dir) == {
        name: pytest.approx(curve, rel=tolerance, abs=0.0) for name, curve in values.items()
    }
