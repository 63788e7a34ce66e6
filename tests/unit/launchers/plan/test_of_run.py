"""`shardwright plan RUN_DIR`: what is shown of a run, and what is made where it lacks a plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardwright.launchers.commands.plan_of_run import asked_for, lines
from shardwright.launchers.machine.facts import Machine, resolve
from shardwright.launchers.plan import child, of_run
from shardwright.train.config import RunConfig
from shardwright.train.errors import UserError
from shardwright.train.plan.facts import ModelFacts, Parameter, Traced
from shardwright.train.run_directory import owner, plan
from shardwright.train.run_directory.plan import Measured, settings_of
from tests.unit.launchers.composed import composed
from tests.unit.launchers.fakes import Shardwright, make_shardwright

shardwright = pytest.fixture(make_shardwright)

MODEL = ModelFacts((Parameter("matrix", (1000, 1000), decays=True),), 10**6, (10**6,))
TRACED = Traced(kept=10**6, forward=2 * 10**6, backward=10**6, backward_growing=10**6, flops=10**9)
MEASURED = Measured(
    "cpu",
    resident_bytes=7 * 10**8,
    parameters_bytes=4 * 10**6,
    optimizer_bytes=10**7,
    steps=4,
    seconds=2.0,
    tokens=400,
)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Have the child answer at once, and note what it is asked."""
    configs: list[RunConfig] = []

    def looked_at(config: RunConfig, autocasts: Sequence[bool]) -> Any:
        configs.append(config)
        return MODEL, [TRACED for _ in autocasts]

    monkeypatch.setattr(child, "looked_at", looked_at)
    return configs


def a_run(tmp_path: Path, *overrides: str) -> tuple[Path, RunConfig]:
    _, config = composed("model=gpt2_tiny", "strategy=ddp", "launcher.nproc_per_node=2", *overrides)
    config = resolve(config, Machine(cores=2), str(tmp_path / "run"))
    run_dir = tmp_path / "run"
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return run_dir, config


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["runs/a"], "runs/a"),
        (["runs/a", "--json"], "runs/a"),
        (["model=gpt2_tiny"], None),
        (["~trainer.seed", "hardware=h200"], None),
        (["--states-only"], None),
        (["--config-dir", "mine", "--states-only"], None),
        ([], None),
    ],
)
def test_what_is_no_setting_is_a_run(words: list[str], found: str | None) -> None:
    assert asked_for(words) == found


def test_a_plan_that_a_run_lacks_is_made_once_and_kept(
    tmp_path: Path, shardwright: Shardwright, asked: list[RunConfig]
) -> None:
    run_dir, config = a_run(tmp_path)
    plan.note(run_dir, settings_of(config), measured=MEASURED)
    outcome = shardwright("plan", str(run_dir), "--json")
    assert (outcome.code, outcome.err) == (0, "")
    (start,) = json.loads(outcome.out)["starts"]
    planned = start["planned"]
    # fp32 under DDP: weights, gradients and a bucket for them, two moments.
    assert planned["parameters_bytes"] == planned["gradients_bytes"] == 4 * 10**6
    assert planned["optimizer_bytes"] == 8 * 10**6
    assert planned["device_bytes"] == sum(planned["by_category"].values())
    assert planned["step_seconds"] is None, "of a CPU no figures are known"
    assert plan.read(run_dir)[0].planned is not None
    shown = shardwright("plan", str(run_dir))
    assert len(asked) == 1, "it is kept"
    assert "ddp on 2 ranks, " in shown.out
    rows = [" ".join(line.split()) for line in shown.out.splitlines()]
    assert "optimizer 8.0 MB 10.0 MB -20.0%" in rows
    assert "a step - 0.5 s -" in rows


def test_of_a_run_that_lives_the_first_rank_writes(
    tmp_path: Path, shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, _ = a_run(tmp_path)
    monkeypatch.setattr(owner, "look", lambda run_dir: (None, True))
    assert json.loads(shardwright("plan", str(run_dir), "--json").out)["starts"][0]["planned"]
    assert not (run_dir / "plan.json").exists()


def test_the_gpu_that_a_run_has_had_gives_it_a_time(tmp_path: Path) -> None:
    run_dir, config = a_run(tmp_path)
    facts = {"hardware": {"gpus": ["NVIDIA H200", "NVIDIA H200"]}}
    (run_dir / "provenance.json").write_text(json.dumps(facts))
    assert of_run.device_of(run_dir, config) is None, "it trains on CPUs"
    tree = config.model_dump(mode="json")
    tree["launcher"]["device"] = "cuda"
    on_gpus = RunConfig.model_validate(tree)
    device = of_run.device_of(run_dir, on_gpus)
    assert device is not None
    assert device.ranks == 2
    planned = of_run.of_config(on_gpus, device)
    assert planned.hardware == "1 x 2 x H200"
    assert planned.step_seconds is not None
    tokens = on_gpus.trainer.global_batch_size * on_gpus.data.tokens_per_sample
    assert planned.tokens_per_second == pytest.approx(tokens / planned.step_seconds)
    (run_dir / "provenance.json").write_text('{"hardware": {"gpus": ["Voodoo"]}}')
    assert of_run.device_of(run_dir, on_gpus) is None


def test_what_cannot_be_planned_is_shown_as_it_was_measured(
    tmp_path: Path, shardwright: Shardwright, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, config = a_run(tmp_path)
    plan.note(run_dir, settings_of(config), measured=MEASURED)

    def fails(*_: Any) -> Any:
        raise UserError("model.name=no/such is not here")

    monkeypatch.setattr(child, "looked_at", fails)
    outcome = shardwright("plan", str(run_dir))
    assert outcome.code == 0
    assert "no plan of it: model.name=no/such is not here" in outcome.err
    assert "parameters" in outcome.out
    told = json.loads(shardwright("plan", str(run_dir), "--json").out)
    assert told["problem"] == "model.name=no/such is not here"
    assert told["starts"][0]["measured"]["step_seconds"] == 0.5


def test_each_settings_have_a_table(tmp_path: Path) -> None:
    run_dir, config = a_run(tmp_path)
    plan.note(run_dir, settings_of(config), measured=MEASURED)
    _, later = a_run(tmp_path, "trainer.micro_batch_size=2")
    plan.note(run_dir, settings_of(later), measured=MEASURED)
    starts, problem = of_run.starts(run_dir)
    assert problem is None
    assert [start.planned is None for start in starts] == [True, False]
    shown = list(lines(starts, 80))
    assert len([line for line in shown if line.startswith("ddp on 2 ranks, ")]) == 2
    assert max(map(len, shown)) < 80


def test_what_is_no_run_is_said(tmp_path: Path, shardwright: Shardwright) -> None:
    outcome = shardwright("plan", str(tmp_path / "none"))
    assert (outcome.code, outcome.out) == (2, "")
    assert "config.yaml" in outcome.err
