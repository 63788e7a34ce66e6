"""The launcher's command line, run in this process, or on ranks that do as they are told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from shardwright.launchers.__main__ import main

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Outcome:
    code: int
    out: str
    err: str


Shardwright = Callable[..., Outcome]


def make_shardwright(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Shardwright:
    """`shardwright ...` in this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))

    def run(*arguments: str) -> Outcome:
        capfd.readouterr()
        try:
            code = main(arguments)
        except SystemExit as end:  # argparse's
            code = int(end.code or 0)
        return Outcome(code, *capfd.readouterr())

    return run


FAKE_RANK = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

run_dir, rank = Path(sys.argv[1]), int(os.environ.get("RANK", "0"))
behaviours = os.environ.get("FAKE_RANK", "succeed").split(",")
behaviour = behaviours[rank % len(behaviours)]
(run_dir / "logs" / f"rank-{rank}.log").write_text("all of it")

def note(kind, message, traceback="", when=None):
    text = dict(time=when or time.time(), rank=rank, host="node-7", kind=kind,
                message=message, traceback=traceback)
    (run_dir / "logs" / f"rank-{rank}.error.json").write_text(json.dumps(text))

if behaviour == "fail-first":
    note("RuntimeError", "boom", "Traceback:\\n" + "\\n".join(f"line {n}" for n in range(20)), 1.0)
    sys.exit(1)
if behaviour == "fail-later":
    note("RuntimeError", "the other rank is gone", "Traceback:\\nconsequence", 2.0)
    time.sleep(60)
if behaviour == "bad-input":
    note("UserError", "data.paths: nothing in there")
    sys.exit(2)
if behaviour == "resumable":
    stopped = dict(step=7, samples=56, reason="SIGUSR1 on rank 1", time=time.time(),
                   checkpoint=str(run_dir / "checkpoints" / "checkpoint-7"), progress_steps=7)
    (run_dir / "stopped.json").write_text(json.dumps(stopped))
    sys.exit(75)
if behaviour == "crash-early":
    import no_such_module
if behaviour == "killed":
    # Not before whoever hangs does so: its launcher would end it at its start.
    until = time.monotonic() + 60
    while len(list(run_dir.glob("pids-*"))) < behaviours.count("hang"):
        assert time.monotonic() < until, "nobody hangs"
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "hang":
    # Ranks of the real thing do so once they listen.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
    # With a child in a session of its own, as a data loader or a debugger may have.
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"],
                             start_new_session=True)
    (run_dir / f"pids-{rank}").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(300)
if made := os.environ.get("FAKE_MAKES"):
    Path(made).mkdir(exist_ok=True)
(run_dir / "final").mkdir(exist_ok=True)
"""

FAKE_PREPARATION = """
import os, signal, sys
if os.environ.get("FAKE_PREPARATION") == "bad-input":
    print("error: too small for one batch", file=sys.stderr)
    sys.exit(2)
if os.environ.get("FAKE_PREPARATION") == "crash":
    sys.exit(1)
if os.environ.get("FAKE_PREPARATION") == "deaf":  # to all but the signal itself
    signal.signal(signal.SIGUSR1, lambda number, frame: os._exit(75))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
    open("preparing", "w").close()
    signal.pause()
"""


@dataclass
class Checkout:
    """A copy of the project whose ranks are a few lines that do what FAKE_RANK says."""

    root: Path
    cwd: Path

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "shardwright", "train", *arguments],
            cwd=self.cwd,
            env={**os.environ, "PYTHONPATH": str(self.root), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def train(self, *arguments: str, **environment: str) -> Outcome:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=120)
        return Outcome(process.returncode, out, err)


def make_checkout(tmp_path: Path) -> Checkout:
    root, cwd = tmp_path / "checkout", tmp_path / "work"
    shutil.copytree(ROOT / "shardwright", root / "shardwright", symlinks=True)
    shutil.copytree(ROOT / "launchers", root / "launchers")
    shutil.copytree(ROOT / "conf", root / "conf")
    shutil.copytree(ROOT / "train", root / "train")
    (root / "train" / "__main__.py").write_text(FAKE_RANK)
    (root / "train" / "data" / "__main__.py").write_text(FAKE_PREPARATION)
    cwd.mkdir()
    return Checkout(root, cwd)
