"""What metrics.jsonl says of speed and memory, against a clock and a kernel of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from shardwright.train.loop.callbacks import metrics
from shardwright.train.loop.callbacks.metrics import Metrics


class Run:
    """Stands for a trainer whose steps take what a test says, of 100 tokens each."""

    def __init__(
        self,
        run_dir: Path,
        monkeypatch: pytest.MonkeyPatch,
        step: int = 0,
        sent_bytes: float = 0.0,
    ) -> None:
        self.now, self.profiled = 1000.0, set[int]()
        monkeypatch.setattr(metrics.time, "monotonic", lambda: self.now)
        self.trainer: Any = SimpleNamespace(
            tokens_seen=100 * step,
            samples_seen=0,
            run_dir=run_dir,
            _globalstep_last_logged=step,
            auxiliary_loss=None,
            masking_rate=None,
            noise_scale=None,
            profiler=SimpleNamespace(disturbs=lambda step: step in self.profiled),
            args=SimpleNamespace(device=torch.device("cpu")),
            accelerator=SimpleNamespace(gather=lambda tensor: tensor),
            step_times=SimpleNamespace(of_ranks=None),
            resumed=SimpleNamespace(step=step) if step else None,
            state=SimpleNamespace(global_step=step, is_world_process_zero=True),
        )
        self.metrics = Metrics(cast(Any, self.trainer), sent_bytes=sent_bytes)
        self.tell("on_train_begin")

    def tell(self, event: str, **kwargs: Any) -> None:
        getattr(self.metrics, event)(self.trainer.args, self.trainer.state, None, **kwargs)

    def step(self, seconds: float) -> None:
        self.trainer.tokens_seen += 100
        self.now += seconds
        self.trainer.state.global_step += 1
        self.tell("on_step_end")

    def evaluate(self, seconds: float) -> None:
        self.now += seconds
        self.tell("on_evaluate")

    def log(self) -> dict[str, Any]:
        self.tell("on_log", logs={"loss": 1.0})
        path = self.trainer.run_dir / "metrics.jsonl"
        return dict(json.loads(path.read_text().splitlines()[-1]))


@pytest.mark.parametrize("step", [0, 7])
def test_the_first_step_of_a_start_and_interruptions_count_for_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run = Run(tmp_path, monkeypatch, step)
    run.now += 500  # trackers, and whatever else begins
    run.step(300)  # which compiles
    assert "tokens_per_second" not in run.log()
    run.step(1)
    run.evaluate(50)
    run.step(3)
    assert run.log()["tokens_per_second"] == pytest.approx(200 / 4)
    run.step(2)
    assert run.log()["tokens_per_second"] == pytest.approx(100 / 2)
    run.step(4)
    assert run.metrics.summary() == "trained 5 steps in 14 min, 40 tokens/s while training"


def test_the_first_line_of_a_start_leaves_its_first_step_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch)
    run.step(300)
    run.step(2)
    run.step(2)
    assert run.log()["tokens_per_second"] == pytest.approx(200 / 4)


def test_steps_that_are_profiled_count_for_no_speed_and_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch)
    run.profiled = {3, 4}
    for seconds in (300, 2, 90, 40, 2):
        run.step(seconds)
    logged = run.log()
    assert logged["tokens_per_second"] == pytest.approx(200 / 4)
    assert logged["profiled_steps"] == 2
    run.step(2)
    assert "profiled_steps" not in run.log()
    run.profiled = {7}
    run.step(60)
    assert "tokens_per_second" not in run.log()
    assert run.metrics.summary() == "trained 7 steps in 8 min, 50 tokens/s while training"


def test_what_a_step_sends_over_the_time_of_the_steps_that_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch, sent_bytes=6e6)
    run.profiled = {4}
    run.step(300)
    assert "sent_bytes_per_second" not in run.log()
    run.step(1)
    run.evaluate(50)
    run.step(3)
    run.step(90)
    assert run.log()["sent_bytes_per_second"] == pytest.approx(2 * 6e6 / 4)
    run.step(2)
    assert run.log()["sent_bytes_per_second"] == pytest.approx(6e6 / 2)


def test_one_rank_sends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch)
    run.step(300)
    run.step(2)
    assert "sent_bytes_per_second" not in run.log()


def test_no_step_has_no_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch, 7)
    assert run.metrics.summary() is None


def test_peak_memory_is_this_processs_and_not_its_parents() -> None:
    """getrusage's goes through exec: a rank's would be that of whatever has started it."""
    told = "from shardwright.train.process.memory import peak_resident_bytes as peak; print(peak())"
    program = (
        "import os, sys\n"
        "held = bytearray(3 * 2**29)\n"
        "held[::4096] = b'x' * len(held[::4096])\n"
        f"os.execv(sys.executable, [sys.executable, '-c', {told!r}])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert 2**22 < int(ended.stdout) < 3 * 2**29
