"""`shardwright sweep` by the real command line: killed, stopped, failing, grown, on one cache."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from shardwright.launchers.sweep import directory
from tests.e2e import cli, sweeps


@pytest.mark.wide
def test_a_sweep_that_was_killed_trains_each_point_once_and_as_one_left_alone(
    tiny: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    own = f"data.cache_dir='{tmp_path}/cache'"
    words = [*sweeps.words(tiny("clm"), own), "seed=1,2,3", "sweep.max_parallel=2"]
    alone = cli.shardwright("sweep", *words, "sweep_dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert re.findall(r"^point (\d) .*: started on core", alone.stdout, re.MULTILINE) == [*"012"]

    sweep_dir = tmp_path / "killed"
    named = [*words, f"sweep_dir={sweep_dir}"]
    sweeps.cut(named, tmp_path, lambda: sweeps.progress(sweep_dir) >= 5)
    assert not directory.is_alive(sweep_dir)
    ended = cli.shardwright("sweep", *named, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "resumed on core" in ended.stdout

    assert sweeps.losses(sweep_dir) == sweeps.losses(tmp_path / "alone")
    states = directory.states(directory.read(sweep_dir))
    assert [state.state for state in states] == ["done"] * 3
    assert [state.failures for state in states] == [0] * 3
    # Two were cut, and begun twice.
    assert sorted(state.attempts for state in states) == [1, 2, 2]
    for number in range(3):
        assert sweeps.steps(sweep_dir / str(number)) == list(range(1, sweeps.STEPS + 1))
        assert "sweep_dir: null\n" in (sweep_dir / str(number) / "config.yaml").read_text()

    # The tokenizer and the tokens were made by one of the six runs; the others waited for it.
    logs = [path.read_text().splitlines() for path in tmp_path.glob("*/?/logs/run.log")]
    assert len(logs) == 6
    for made in ("training the tokenizer", "tokenising"):
        assert sum(log.count(made) for log in logs) == 1

    again = cli.shardwright("sweep", str(sweep_dir), cwd=tmp_path)
    assert again.returncode == 0
    assert "nothing is left to run" in again.stdout
    assert [s.attempts for s in directory.states(directory.read(sweep_dir))] == [
        state.attempts for state in states
    ]


@pytest.mark.wide
def test_a_sweep_that_is_told_to_stop_saves_and_says_how_to_continue(
    tiny: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    long = ("trainer.max_steps=100000", "trainer.lr_scheduler=constant")
    words = [*sweeps.words(tiny("clm")), *long, "seed=1,2", "sweep.name=long"]
    process = cli.start("sweep", *words, cwd=tmp_path)
    cli.wait_until(lambda: any(tmp_path.glob("sweeps/*/0/metrics.jsonl")))
    (sweep_dir,) = tmp_path.glob("sweeps/long-*")

    second = cli.shardwright("sweep", *words, cwd=tmp_path)
    assert second.returncode == 2
    assert f"{sweep_dir} belongs to a sweep that is alive (process {process.pid}" in second.stderr

    process.send_signal(signal.SIGTERM)
    ended = cli.finish(process)
    assert ended.returncode == 75, ended.stdout + ended.stderr
    assert "SIGTERM: 1 point(s) save and end, and no other is started" in ended.stdout
    assert re.search(r"continue with: \S*shardwright sweep " + str(sweep_dir), ended.stdout)
    first, other = directory.states(directory.read(sweep_dir))
    assert (first.state, first.code, other.state, other.attempts) == ("stopped", 75, "waiting", 0)
    step = json.loads((sweep_dir / "0" / "stopped.json").read_text())["step"]
    assert (sweep_dir / "0" / "checkpoints" / f"checkpoint-{step}").is_dir()


@pytest.mark.wide
def test_a_point_that_fails_stops_no_other_and_is_tried_again_up_to_a_limit(
    tiny: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    # That a corpus is too small for a sample is found when it is prepared.
    (tmp_path / "small.txt").write_text("not much")
    common = sweeps.words(tiny("clm"))
    (given,) = (word.partition("=")[2] for word in common if word.startswith("data.paths="))
    words = [
        *(word for word in common if not word.startswith("data.paths=")),
        f"data.paths=[small.txt],{given}",
        "sweep_dir=mixed",
    ]
    ended = cli.shardwright("sweep", *words, cwd=tmp_path)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "mixed: 1 done, 1 failed" in ended.stdout
    assert "point 0 failed  data.paths=[small.txt]\n    " in ended.stdout
    why = directory.state_of(tmp_path / "mixed", 0).why
    assert why is not None
    assert "too small for one batch: 1 training documents" in why
    assert f"    {why.splitlines()[0]}\n" in ended.stdout
    assert f"  log: {tmp_path}/mixed/points/0.log" in ended.stdout
    failed, done = directory.states(directory.read(tmp_path / "mixed"))
    assert (failed.state, failed.failures, failed.code, done.state) == ("failed", 1, 2, "done")
    assert not (tmp_path / "mixed" / "0").exists()

    again = cli.shardwright("sweep", "mixed", cwd=tmp_path)
    assert again.returncode == 1
    failed, done = directory.states(directory.read(tmp_path / "mixed"))
    assert (failed.failures, done.attempts) == (2, 1)
    spent = cli.shardwright("sweep", "mixed", cwd=tmp_path)
    assert spent.returncode == 1
    assert "nothing is left to run" in spent.stdout
    assert "--retry-failed" in spent.stdout
    assert directory.state_of(tmp_path / "mixed", 0).attempts == 2
