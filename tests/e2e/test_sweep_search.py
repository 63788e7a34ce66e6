"""Searches of real runs: killed and continued, below Ray, and proposed by W&B's agent."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardwright.launchers.ranks.child import descendants
from shardwright.launchers.sweep import directory, objectives, space
from shardwright.launchers.sweep.study import LEFT_OUT, Study
from shardwright.train.run_directory import pruned
from tests.e2e import cli, sweeps

RATE = "trainer.learning_rate"
GOOD = (1e-3,)
BAD = (0.1, 0.2)
SHORT, LONG = 16, 600
JUDGED_AT = 4
SEED = 20260130


def words(tiny: Callable[[str], tuple[str, ...]], *more: str) -> list[str]:
    """Return what all points have in common: runs whose steps take little."""
    dropped = ("run_dir=", "trainer.max_steps=", "trainer.global_batch", "trainer.eval_max")
    return [
        *cli.on_one_rank(word for word in tiny("clm") if not word.startswith(dropped)),
        *("precision=fp32", "trainer.global_batch_size=4", "trainer.eval_max_samples=4"),
        *("trainer.eval_every_steps=4", "trainer.save_every_steps=4", "checkpoint.keep_last=1"),
        "trainer.lr_scheduler=constant",
        *more,
    ]


def searched(cwd: Path, good: Sequence[float], bad: Sequence[float], seed: int) -> list[str]:
    """Return a search whose bad points would take long: they are pruned well before their end."""
    definition = {
        "grid": {RATE: [*good, *bad], "trainer.max_steps": [SHORT, LONG]},
        "exclude": [
            {RATE: list(good), "trainer.max_steps": LONG},
            {RATE: list(bad), "trainer.max_steps": SHORT},
        ],
        "search": {
            **{"kind": "grid", "seed": seed, "pruner": "asha", "pruner_reduction_factor": 2},
            "pruner_min_steps": JUDGED_AT,
        },
    }
    (cwd / "conf/sweep").mkdir(parents=True)
    (cwd / "conf/sweep/rates.yaml").write_text(yaml.safe_dump(definition))
    return ["--config-dir", "conf", "sweep=rates"]


def trials(sweep_dir: Path) -> list[Any]:
    """Return the trials of a search that nobody runs."""
    sweep = directory.read(sweep_dir)
    found = space.space(sweep.definition.grid, {})
    study = Study(sweep_dir / directory.JOURNAL, sweep.definition, found)
    return [trial for trial in study.trials if LEFT_OUT not in trial.user_attrs]


def values(sweep_dir: Path, number: int) -> list[tuple[int, float]]:
    """Return the held-out losses of a point."""
    lines = sweeps.logged(sweep_dir / str(number))
    known = {*objectives.OF_EVALUATIONS, *objectives.OF_TRAINING, *objectives.NOT_COMPARED}
    for line in lines:  # a metric by which points can be compared is known as one
        unknown = {key for key in line if key.partition("/")[0] not in known}
        assert unknown <= {"stopped_early"}
    return [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]


def has_evaluations(sweep_dir: Path, number: int, count: int) -> bool:
    return len(values(sweep_dir, number)) >= count


@pytest.mark.wide
def test_a_search_that_is_killed_keeps_its_study_and_a_pruned_run_says_so(
    tiny: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    named = [*searched(tmp_path, GOOD, BAD[:1], seed=4), *words(tiny), "sweep_dir=a"]
    sweep_dir = tmp_path / "a"
    sweeps.cut(named, tmp_path, (sweep_dir / "1" / "metrics.jsonl").exists)
    before = trials(sweep_dir)
    assert before[0].state.name == "COMPLETE"
    assert [trial.params[RATE] for trial in before] == [GOOD[0], BAD[0]]

    ended = cli.shardwright("sweep", *named, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    after = trials(sweep_dir)
    assert [trial.state.name for trial in after] == ["COMPLETE", "PRUNED"]
    assert after[0] == before[0]
    assert (after[1].number, after[1].params) == (before[1].number, before[1].params)
    assert (SHORT, after[0].value) == values(sweep_dir, 0)[-1]
    note = pruned.read(sweep_dir / "1")
    assert note is not None
    assert note.step == JUDGED_AT
    assert after[1].value == note.value == dict(values(sweep_dir, 1))[JUDGED_AT]
    assert values(sweep_dir, 1)[-1][0] < LONG
    said = cli.shardwright("status", "a", cwd=tmp_path)
    assert f"pruned at step {JUDGED_AT}" in said.stdout

    again = cli.shardwright("sweep", *named, cwd=tmp_path)
    assert again.returncode == 0
    assert "nothing is left to run" in again.stdout
    assert trials(sweep_dir) == after


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_twice_at_random_a_search_ends_as_one_that_was_left_alone(
    tiny: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    # The good one comes first, so that neither of the others is promoted before it.
    named = [*searched(tmp_path, GOOD, BAD, seed=1), *words(tiny)]
    alone = cli.shardwright("sweep", *named, "sweep_dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stdout + alone.stderr

    sweep_dir, draws = tmp_path / "killed", random.Random(SEED)
    for point in (0, 1):
        enough = draws.randint(1, 2)
        has_enough = partial(has_evaluations, sweep_dir, point, enough)
        sweeps.cut([*named, "sweep_dir=killed"], tmp_path, has_enough)
    ended = cli.shardwright("sweep", *named, "sweep_dir=killed", cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr

    first, second = trials(tmp_path / "alone"), trials(sweep_dir)
    for told in ("number", "params", "state", "values"):
        assert [getattr(t, told) for t in first] == [getattr(t, told) for t in second]
    assert [t.state.name for t in first].count("PRUNED") == 2
    for number in range(3):
        both = zip(values(tmp_path / "alone", number), values(sweep_dir, number), strict=False)
        assert all(a == b for a, b in both)
        steps = [step for step, _ in values(sweep_dir, number)]
        assert steps == sorted(set(steps))  # each evaluation once


# --- Ray ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_below_ray_a_killed_worker_costs_no_point(
    tiny: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    named = [*words(tiny, "trainer.max_steps=60"), f"{RATE}=1e-4,1e-3,1e-2"]
    named += ["sweep.devices_per_point=1"]
    alone = cli.shardwright("sweep", *named, "sweep_dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stdout + alone.stderr

    sweep_dir = tmp_path / "ray"
    process = cli.start("sweep", *named, "sweep.backend=ray", "sweep_dir=ray", cwd=tmp_path)
    cli.wait_until(lambda: len(values(sweep_dir, 0)) >= 2 or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    launched = next(
        pid
        for pid in descendants(process.pid)
        if b"run_dir=" + str(sweep_dir / "0").encode()
        in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"'", b"")
    )
    worker = cli.parent_of(launched)
    assert worker is not None
    assert b"ray::" in Path(f"/proc/{worker}/cmdline").read_bytes()
    os.kill(worker, signal.SIGKILL)
    ended = cli.finish(process)
    assert ended.returncode == 0, ended.stdout + ended.stderr

    states = directory.states(directory.read(sweep_dir))
    assert [(s.state, s.attempts, s.failures) for s in states] == [
        *(("done", 2, 0), ("done", 1, 0), ("done", 1, 0))
    ]
    for number in range(3):
        wanted = dict(values(tmp_path / "alone", number))
        assert dict(values(sweep_dir, number)) == pytest.approx(wanted)
        steps = [step for step, _ in values(sweep_dir, number)]
        assert steps == sorted(set(steps))
    assert "Ray has lost it" in ended.stdout


# --- W&B ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_trials_of_wandbs_agent_are_runs_of_the_sweep_and_of_wandb(
    tiny: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    asked = [{RATE: 1e-3}, {RATE: 2e-3}]
    (tmp_path / "trials.json").write_text(json.dumps(asked))
    process = cli.start_python(
        *("-m", "tests.e2e.played_wandb", "trials.json", "sweep"),
        *words(tiny, "trainer.max_steps=8", "tracking=wandb", "tracking.mode=offline"),
        f"{RATE}=tag(log,interval(1e-5,1e-1))",
        *("sweep.search.kind=random", "sweep.search.trials=2", "sweep.backend=wandb"),
        "sweep_dir=a",
        cwd=tmp_path,
    )
    ended = cli.finish(process)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    sweep = directory.read(tmp_path / "a")
    assert [dict(point.settings) for point in sweep.points] == asked
    assert [s.state for s in directory.states(sweep)] == ["done", "done"]
    for number in range(2):
        run_id = (tmp_path / f"a/{number}/wandb/shardwright-run-id").read_text().strip()
        assert run_id == f"trial{number}"  # the run of W&B's is that of its trial
        assert list((tmp_path / "a/wandb").glob(f"offline-run-*-trial{number}"))
    assert (tmp_path / "a/sweep.yaml").is_file()
    assert json.loads((tmp_path / "a/wandb.json").read_text())["id"] == "played"
    secret = cli.SECRETS["WANDB_API_KEY"].encode()
    files = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert not [path for path in files if secret in path.read_bytes()]
