"""What a run notes of its plan, against an engine and a clock of the test's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.train.loop.callbacks.metrics import Speed
from shardwright.train.plan import comparison
from shardwright.train.plan.comparison import Comparison, environment, in_a_line, of_answer
from shardwright.train.run_directory import plan
from shardwright.train.run_directory.plan import Measured, Planned, Start
from tests.unit.launchers.composed import composed

PLANNED = Planned(
    device_bytes=110 * 10**9,
    host_bytes=0,
    disk_bytes=0,
    by_category={"weights": 110 * 10**9},
    parameters_bytes=48_000,
    gradients_bytes=48_000,
    optimizer_bytes=96_000,
    step_seconds=2.0,
    tokens_per_second=50.0,
)
PARAMETERS = 10_000
"""Of a model that is one matrix."""


class Run:
    """Stands for a trainer: a real model and optimizer, steps that take what a test says."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch, step: int = 0) -> None:
        self.now, self.begun, self.said = 1000.0, 0, list[str]()
        monkeypatch.setattr(comparison.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(comparison, "begun", self._begin)
        words = ("model=gpt2_tiny", "strategy=ddp", "launcher.nproc_per_node=2")
        _, config = composed(*words)
        model = torch.nn.Linear(100, 100, bias=False)
        optimizer = torch.optim.AdamW(model.parameters())
        self.model, self.optimizer = model, optimizer
        self.process: Any = None
        self.speed = Speed(0, 0.0, 0)
        self.metrics = SimpleNamespace(
            speed=lambda: self.speed, peak_bytes=5 * 10**8, reserved_bytes=0
        )
        self.trainer = SimpleNamespace(
            config=resolve(config, Machine(cores=2), "/runs/a"),
            run_dir=run_dir,
            model=model,
            is_deepspeed_enabled=False,
            args=SimpleNamespace(device=torch.device("cpu")),
            accelerator=SimpleNamespace(gather=lambda tensor: tensor),
            innermost_optimizer=lambda: optimizer,
            torch_optimizer=lambda: optimizer,
        )
        self.state = SimpleNamespace(global_step=step, is_world_process_zero=True)
        self.comparison = Comparison(
            cast(Any, self.trainer), cast(Any, self.metrics), self.said.append
        )
        self.tell("on_train_begin")

    def _begin(self, run_dir: Path) -> Any:
        self.begun += 1
        return self.process

    def tell(self, event: str, **kwargs: Any) -> None:
        getattr(self.comparison, event)(self.trainer.args, self.state, None, **kwargs)

    def step(self, seconds: float) -> None:
        self.model(torch.ones(1, 100)).sum().backward()
        self.tell("on_substep_end")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.now += seconds
        self.speed = Speed(
            self.speed.steps + 1, self.speed.seconds + seconds, self.speed.tokens + 100
        )
        self.state.global_step += 1
        self.tell("on_step_end")
        self.tell("on_log", logs={"loss": 1.0})

    def found(self) -> Start:
        return plan.read(self.trainer.run_dir)[-1]


@pytest.fixture
def run_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    return lambda **kwargs: Run(tmp_path, monkeypatch, **kwargs)


def test_what_a_rank_holds_is_counted_in_its_second_step(run_of: Callable[..., Run]) -> None:
    run = run_of()
    run.step(1)
    assert not plan.read(run.trainer.run_dir), "the optimizer had no state yet"
    run.step(1)
    run.step(2)
    run.tell("on_train_end")
    measured = run.found().measured
    assert measured is not None
    assert measured.parameters_bytes == 4 * PARAMETERS
    assert measured.optimizer_bytes == pytest.approx(8 * PARAMETERS, abs=8)
    assert measured.gradients_bytes is not None
    assert measured.gradients_bytes >= 4 * PARAMETERS
    assert (measured.device, measured.peak_bytes, measured.resident_bytes) == (
        *("cpu", None),
        5 * 10**8,
    )
    assert (measured.steps, measured.step_seconds) == (3, pytest.approx(4 / 3))
    assert run.said == [], "nothing was planned"


def test_a_resume_adds_to_what_its_run_has_measured(run_of: Callable[..., Run]) -> None:
    for number in (1, 2):
        run = run_of(step=3 * (number - 1))
        run.step(1)
        run.step(1)
        run.tell("on_train_end")
        measured = run.found().measured
        assert measured is not None
        assert measured.steps == 2 * number
    assert len(plan.read(run.trainer.run_dir)) == 1


class Process:
    """Stands for `shardwright plan RUN_DIR --json`."""

    def __init__(self, answer: str, code: int = 0) -> None:
        self.pid, self.returncode, self._answer = 2**22 + 1, code, answer
        self.is_over = False

    def poll(self) -> int | None:
        return self.returncode if self.is_over else None

    def communicate(self) -> tuple[str, None]:
        return self._answer, None


def answer(planned: Planned | None) -> str:
    start = plan.as_json(Start({}, planned))
    return json.dumps({"run_dir": "/runs/a", "starts": [plan.as_json(Start({})), start]})


def test_the_plan_is_made_beside_a_training_that_lasts(run_of: Callable[..., Run]) -> None:
    run = run_of()
    run.process = Process(answer(PLANNED))
    run.step(1)
    run.step(comparison.BEGINS_AFTER_SECONDS / 2)
    assert run.begun == 0, "a start is left alone"
    run.step(comparison.BEGINS_AFTER_SECONDS)
    run.step(1)
    assert run.begun == 1
    assert run.found().planned is None
    run.process.is_over = True
    run.step(1)
    assert run.found().planned == PLANNED
    run.step(1)
    run.tell("on_train_end")
    run.tell("on_train_end")
    assert run.begun == 1
    assert len(run.said) == 1
    assert run.said[0].startswith("planned and measured of a rank: 192 kB and ")
    assert "of model states, 2 s and" in run.said[0]
    again = run_of(step=6)
    again.step(100)
    assert again.begun == 0, "it is there already"


@pytest.mark.parametrize(
    "process", [Process("", 1), Process("no JSON"), Process(answer(None)), None]
)
def test_no_plan_stops_a_run(run_of: Callable[..., Run], process: Process | None) -> None:
    run = run_of()
    run.process = process
    if process is not None:
        process.is_over = True
    run.step(100)
    run.step(1)
    run.step(1)
    run.tell("on_train_end")
    assert run.found().planned is None
    assert run.found().measured is not None
    assert run.begun == 1, "it is not tried again"


def test_a_plan_that_comes_too_late_is_ended(
    run_of: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of()
    run.process = Process(answer(PLANNED))
    killed: list[int] = []
    monkeypatch.setattr(comparison.os, "killpg", lambda pid, number: killed.append(pid))
    run.step(100)
    run.tell("on_train_end")
    assert killed == [run.process.pid]
    assert run.found().planned is None


def test_a_disk_that_is_full_stops_no_run(run_of: Callable[..., Run]) -> None:
    run = run_of()
    run.trainer.run_dir = run.trainer.run_dir / "gone"
    run.step(1)
    run.step(1)
    run.tell("on_train_end")


def test_a_plan_is_none_of_the_ranks() -> None:
    of_rank = {"RANK": "0", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "2", "PATH": "/bin"}
    found = environment(of_rank)
    assert found["PATH"] == "/bin"
    assert not {"RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(found)
    assert "PYTHONPATH" in found, "by which it is this very program"


def test_on_a_gpu_the_line_has_the_peak_first() -> None:
    measured = Measured("cuda", 100 * 10**9, parameters_bytes=1, steps=4, seconds=10, tokens=4)
    assert in_a_line(Start({}, PLANNED, measured)) == (
        "planned and measured of a rank: 110 GB and 100 GB (+10%), 2 s and 2.5 s (-20%) a step"
    )
    assert in_a_line(Start({}, PLANNED)) is None


def test_what_rounds_to_nothing_has_no_minus() -> None:
    planned = Planned(0, 0, 0, {}, parameters_bytes=999, gradients_bytes=0, optimizer_bytes=0)
    line = in_a_line(Start({}, planned, Measured("cpu", parameters_bytes=1000)))
    assert line is not None
    assert "(+0%) of model states" in line


def test_the_command_that_is_started_answers(tmp_path: Path) -> None:
    """A real process: of no run at all, whose answer is none."""
    process = comparison.begun(tmp_path)
    assert process is not None
    assert sys.executable in process.args  # type: ignore[operator]
    found, _ = process.communicate()
    assert process.returncode == 2
    assert of_answer(found) is None
