"""A rank that fails is named, the exit code says how, and no process is left behind."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from shardwright.train.checkpoint.format import layout
from tests.e2e.cli import (
    finish,
    on_one_rank,
    rank_process,
    shardwright,
    start,
    start_python,
    wait_for,
)
from tests.e2e.endings import assert_all_gone
from tests.fixtures import Freeze, TreeOf

pytestmark = pytest.mark.distributed

Tiny = Callable[[str], tuple[str, ...]]


@pytest.mark.wide
def test_a_run_that_diverges_fails_in_one_line_and_keeps_what_is_finite(
    tiny: Tiny, tmp_path: Path
) -> None:
    # The first step is taken at a rate of 0. None is logged, where the ranks would see a loss.
    rate = ("trainer.learning_rate=1e30", "trainer.lr_scheduler=constant", "trainer.warmup_steps=1")
    saves = ("trainer.save_every_steps=1", "checkpoint.keep_last=1", "trainer.log_every_steps=1000")
    ended = shardwright("train", *tiny("clm"), *rate, *saves, cwd=tmp_path)

    assert ended.returncode == 1
    run_dir = tmp_path / "run"
    checkpoint = run_dir / "checkpoints" / "checkpoint-1"
    assert layout.whole_checkpoints(run_dir / "checkpoints") == [(1, checkpoint)]
    summary = (
        "training has diverged at step 2: its update on every rank left weights that are NaN, "
        "infinite or too large to compute with"
    )
    assert "diverged" not in ended.stdout, "it is said once"
    assert (
        f"\nerror: {summary}. checkpoint-1 is the newest checkpoint, and its weights are finite; "
        "lower trainer.learning_rate (it is 1e+30) or trainer.max_grad_norm, or warm up for "
        f"longer, and resume with: shardwright resume {run_dir} trainer.learning_rate=1e+29\n"
    ) in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert layout.read_manifest(checkpoint).finite
    assert not (run_dir / "final").exists()
    assert_all_gone(tmp_path)


def test_rank_that_cannot_open_its_log_is_shown_all_the_same(tiny: Tiny, tmp_path: Path) -> None:
    process = start("train", *tiny("clm"), cwd=tmp_path)
    wait_for(tmp_path / "run" / "logs", process)
    (tmp_path / "run" / "logs" / "rank-1.log").mkdir()
    ended = finish(process)

    assert ended.returncode == 1
    assert re.search(r"^rank 1 on .+ failed first:$", ended.stderr, re.MULTILINE)
    assert "IsADirectoryError" in ended.stderr
    waiting = "told to stop, and another rank has failed: not waiting for it"
    assert waiting in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert_all_gone(tmp_path)


def test_bad_input_that_only_a_rank_can_see_ends_with_code_2(tiny: Tiny, tmp_path: Path) -> None:
    one_rank = on_one_rank(tiny("mlm"))
    ended = shardwright("train", *one_rank, "objective.prompts=['no mask']", cwd=tmp_path)

    assert ended.returncode == 2
    message = "error: prompt 'no mask' has 0 masks; this model fills exactly one <mask>\n"
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert_all_gone(tmp_path)


def test_other_number_of_ranks_than_the_config_is_refused(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    tmp_path: Path,
) -> None:
    run_dir = frozen_run(tiny_tree("mlm"))
    ended = finish(start_python("-m", "shardwright.train", str(run_dir), cwd=tmp_path))
    assert ended.returncode == 2
    assert "the config requires 2 rank(s) (launcher=torchrun) but 1 were started" in ended.stdout


def test_killed_rank_is_named_and_takes_the_others_along(tiny: Tiny, tmp_path: Path) -> None:
    process = start("train", *tiny("clm"), "trainer.max_steps=100000", cwd=tmp_path)
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    os.kill(rank_process(tmp_path, 1), signal.SIGKILL)
    ended = finish(process)

    assert ended.returncode == 1
    assert "rank 1 was killed by SIGKILL without a report" in ended.stderr
    assert_all_gone(tmp_path)


@pytest.mark.wide
def test_sigterm_to_the_launcher_before_the_first_step_ends_every_rank(
    tiny: Tiny, tmp_path: Path
) -> None:
    process = start("train", *tiny("clm"), cwd=tmp_path)
    for rank in range(2):
        wait_for(tmp_path / "run" / "logs" / f"rank-{rank}.log", process)
    assert rank_process(tmp_path, 0) != rank_process(tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    ended = finish(process)

    assert ended.returncode == 75
    assert "stopped at step 0 by SIGTERM; resume with: shardwright resume" in ended.stderr
    assert not (tmp_path / "run" / "final").exists()
    assert_all_gone(tmp_path)
