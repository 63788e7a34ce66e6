"""A run whose terminal is closed, gone or poor goes on, and its log shows what was to be seen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.cli import ROOT, losses, on_one_rank, shardwright
from tests.e2e.ssh import needs_ssh
from tests.unit.environments import OF_A_RANK, OF_AN_ENGINE

pytestmark = pytest.mark.distributed

Tiny = Callable[[str], tuple[str, ...]]
NAME = "läuft"


@pytest.mark.wide
def test_a_run_goes_on_when_its_terminal_is_closed(tiny: Tiny, tmp_path: Path) -> None:
    """Under nohup or disown: what it prints then fails, on each rank and in the launcher."""
    outside, inside = os.openpty()
    steps = 6
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "shardwright", "train", *tiny("clm")),
            *(f'run_dir="{NAME}"', f"trainer.max_steps={steps}", "objective.prompts=['def ä(']"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        stdin=inside,
        stdout=inside,
        stderr=inside,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    os.close(inside)
    shown = b""
    while b"parameters" not in shown:
        shown += os.read(outside, 1024)
    os.close(outside)
    assert process.wait(280) == 0

    assert b"l\\xe4uft" in shown
    run_dir = tmp_path / NAME
    assert len(losses(run_dir)) == steps
    seen = (run_dir / "logs" / "run.log").read_text()
    order = (f"run dir   {run_dir}", "training: ", "parameters", "def ä(", "\ndone\n")
    assert [seen.count(text) for text in order] == [1] * len(order), seen
    assert sorted(order, key=seen.index) == list(order)
    assert "Warning" not in seen
    marked = (run_dir / "logs" / "rank-0.log").read_text()
    for step, loss in enumerate(losses(run_dir), 1):
        line = f"step {step}/{steps}  loss {loss:.4f}"
        assert line in seen, "a bar has no lines, its log does"
        assert f"[rank 0] INFO shardwright.train.console.terminal: {line}" in marked
    assert shardwright("logs", NAME, cwd=tmp_path).stdout == seen


@pytest.mark.wide
def test_a_run_without_any_output_in_a_rank_of_something_else_ends_well(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Neither the closed output nor what the shell is part of changes it."""
    ended = subprocess.run(
        [sys.executable, "-m", "shardwright", "train", *on_one_rank(tiny("clm"))],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | OF_A_RANK | OF_AN_ENGINE,
        preexec_fn=lambda: os.closerange(0, 3),
        timeout=280,
    )
    assert ended.returncode == 0
    run_dir = tmp_path / "run"
    seen = (run_dir / "logs" / "run.log").read_text()
    assert "\ndone\n" in seen
    assert "  ignored   ACCELERATE_DYNAMO_BACKEND, ACCELERATE_MIXED_PRECISION, " in seen
    assert (run_dir / "owner.json").exists(), "this is the first rank"
    engine = json.loads((run_dir / "engine.json").read_text())
    assert (engine["compile"], engine["compiled_otherwise"]) == (False, [])
    assert (tmp_path / "run" / "data.json").read_text().startswith("{"), "nothing was printed there"


@needs_ssh
@pytest.mark.slow
def test_what_carries_other_nodes_output_outlives_its_reader(
    tiny: Tiny, tmp_path: Path, ssh_port: int
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("127.0.0.1 slots=2\n")
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "shardwright", "train", *tiny("clm"), "launcher=deepspeed"),
            *(f"launcher.hostfile={hostfile}", f"launcher.ssh_port={ssh_port}"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=writer,
    )
    os.close(writer)
    with os.fdopen(reader) as output:
        assert any("parameters" in line for line in output)
    assert process.wait(280) == 0
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
