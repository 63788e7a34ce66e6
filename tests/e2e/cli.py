"""The real command line in a process of its own, and what is left of it afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from shardwright.launchers.ranks.child import descendants

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 280

# Every process of a run inherits these. No file of the run may show their values.
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_averysecrettokenaverysecrettoken",
    "SOME_VARIABLE": "nobody-asked-for-this-value",
}
_MARK = "SHARDWRIGHT_TEST"

TINY = (
    "model.vocab_size=384",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=64",
    "launcher.device=cpu",
)

# What gives the same losses under every launcher.
SAME = (
    "strategy=zero2",
    "precision=fp32",
    "launcher.device=cpu",
    "data.eval_fraction=0",
    "trainer.eval_max_samples=null",
    "trainer.max_steps=6",
    "trainer.lr_scheduler=constant",
)


def on_one_rank(overrides: Iterable[str]) -> list[str]:
    """Return the overrides of the same run in one process, without torchrun or a group."""
    kept = (o for o in overrides if not o.startswith(("strategy=", "launcher.nproc_per_node=")))
    return [*kept, "strategy=single", "launcher=local"]


def start(*arguments: str, cwd: Path, packages: Sequence[Path] = ()) -> subprocess.Popen[str]:
    """Start `shardwright ...` in a directory; `processes` finds all that descends from it."""
    return start_python("-m", "shardwright", *arguments, cwd=cwd, packages=packages)


def start_python(
    *arguments: str, cwd: Path, packages: Sequence[Path] = ()
) -> subprocess.Popen[str]:
    """Start Python, which finds modules in ``packages`` besides."""
    path = os.pathsep.join(map(str, [ROOT, *packages]))
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", _MARK: str(cwd)} | SECRETS,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a started command; kill it where it takes longer than any should."""
    try:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def shardwright(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return finish(start(*arguments, cwd=cwd))


def processes(cwd: Path, **environment: str) -> Iterator[int]:
    """Yield each process that descends from what was started in ``cwd``, told by its environment.

    Only those that have the given variables too.
    """
    wanted = {f"{k}={v}".encode() for k, v in {_MARK: str(cwd), **environment}.items()}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is another user's
            if wanted <= set(path.read_bytes().split(b"\0")):
                yield int(path.parent.name)


def rank_process(cwd: Path, rank: int) -> int:
    """Return a rank's pid; the programs that it calls have its environment."""
    found = set(processes(cwd, RANK=str(rank)))
    (pid,) = {pid for pid in found if parent_of(pid) not in {*found, None}}
    return pid


def parent_of(pid: int) -> int | None:
    """Return a process' parent; None where it has ended meanwhile."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def crash(node: subprocess.Popen[str]) -> None:
    """Kill all of a node's processes, none of which hears of the others' end before."""
    processes = [node.pid, *descendants(node.pid)]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in processes:
            os.kill(pid, number)
    node.wait()


def wait_until(condition: Callable[[], bool], timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for(what: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a file or directory exists."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not what.exists():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.02)
