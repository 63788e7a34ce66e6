"""`shardwright status` and `shardwright cancel` on a run that no SLURM has started."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e import cli


@pytest.mark.wide
def test_a_run_of_this_machine_is_seen_and_stopped_with_a_checkpoint(
    tiny: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    long = ("trainer.max_steps=100000", "trainer.lr_scheduler=constant")
    launcher = cli.start("train", *cli.on_one_rank(tiny("clm")), *long, cwd=tmp_path)
    run_dir = tmp_path / "run"
    cli.wait_for(run_dir / "metrics.jsonl", launcher)

    status = cli.shardwright("status", "run", cwd=tmp_path).stdout
    assert "  state       running, 1 rank(s) here\n" in status
    assert "/100000\n  loss " in status

    cancelled = cli.shardwright("cancel", "run", cwd=tmp_path)
    ended = cli.finish(launcher)
    assert (cancelled.returncode, ended.returncode) == (0, 75), cancelled.stderr + ended.stderr
    step = json.loads((run_dir / "stopped.json").read_text())["step"]
    assert f"stopped at step {step}; resume with: shardwright resume" in cancelled.stdout
    assert (run_dir / "checkpoints" / f"checkpoint-{step}").is_dir()
    status = cli.shardwright("status", "run", cwd=tmp_path).stdout
    by = f"shardwright cancel on {socket.gethostname()}"
    assert f"  state       stopped at step {step} by {by}\n" in status
