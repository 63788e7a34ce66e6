"""A run without what Linux alone has, as on a Mac: a stand-in takes it away from Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e import cli

pytestmark = pytest.mark.slow

TAKEN_AWAY = """
import os, signal
for module, names in (
    (os, ("memfd_create", "posix_fadvise", "sched_getaffinity", "sched_setaffinity", "pidfd_open")),
    (signal, ("sigwaitinfo", "sigtimedwait", "SIGRTMIN", "SIGRTMAX")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
open(os.environ["TAKEN_AWAY"], "a").write(f"{os.getpid()}\\n")
"""


def test_a_run_is_trained_resumed_and_recovered_there(
    tiny: Callable[[str], tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / "stand_in"
    stand_in.mkdir()
    (stand_in / "sitecustomize.py").write_text(TAKEN_AWAY)
    monkeypatch.setenv("TAKEN_AWAY", str(tmp_path / "pids"))

    def shardwright(*arguments: str) -> str:
        command = ("-m", "shardwright", *arguments)
        ended = cli.finish(cli.start_python(*command, cwd=tmp_path, packages=[stand_in]))
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    settings = cli.on_one_rank((*tiny("clm"), "trainer.save_every_steps=3", "run_dir=run"))
    shardwright("train", *settings)
    shardwright("resume", "run", "--step", "3")
    shardwright("recover", "run", "recovered")
    shardwright("doctor", "--directory", ".")
    assert (tmp_path / "recovered" / "model.safetensors").exists()
    pids = set((tmp_path / "pids").read_text().split())
    assert len(pids) >= 6, "the commands and their ranks"
