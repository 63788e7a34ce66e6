"""A run that leaves its choices to the plan trains with what it chose, and resumes with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shardwright.train.config import load
from shardwright.train.run_directory import choice
from tests.e2e.cli import losses, shardwright

Tiny = Callable[[str], tuple[str, ...]]


@pytest.mark.wide
def test_what_the_plan_chose_is_trained_and_kept(tiny: Tiny, tmp_path: Path) -> None:
    given = [word for word in tiny("clm") if not word.startswith(("strategy=", "precision="))]
    ended = shardwright(
        *("train", *given, "strategy=auto", "trainer.micro_batch_size=auto"),
        *("precision=fp32", "trainer.save_every_steps=2", "hardware=cpu"),
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    run_dir = tmp_path / "run"
    config = load(run_dir)
    assert config.left_to_the_plan == ()
    # Nothing is gained by dividing so small a model, nor by smaller passes over so few tokens.
    assert config.strategy.kind == "ddp"
    assert config.trainer.micro_batch_size == 8
    chosen = "auto: strategy=ddp trainer.micro_batch_size=8\n"
    assert chosen in ended.stdout
    assert "16 samples = 8 x 1 x 2 rank(s)" in ended.stdout
    assert len(losses(run_dir)) == 4
    noted = choice.read(run_dir, config)
    assert noted is not None
    assert noted.words == ("strategy=ddp", "trainer.micro_batch_size=8")
    assert "trainer.micro_batch_size=4" in noted.smaller
    assert 0 < noted.smaller_device_bytes < noted.device_bytes

    resumed = shardwright("resume", "run", "trainer.max_steps=6", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "auto:" not in resumed.stdout
    assert load(run_dir).trainer.micro_batch_size == 8
    assert len(losses(run_dir)) == 6
