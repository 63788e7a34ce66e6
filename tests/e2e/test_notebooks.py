"""The notebooks of docs/, and the code of the chapter on Python, run as their readers run them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

from shardwright.train.program import package_environment
from tests.e2e.cli import wait_until
from tests.unit.constants import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

NOTEBOOKS = ROOT / "docs/notebooks"


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what each code cell of a notebook has shown, run in an empty folder."""
    for variable, value in package_environment(os.environ).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("IPYTHONDIR", str(folder / ".ipython"))
    # A kernel that a notebook names need not be installed here: this interpreter is one.
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    work = folder / "work"
    work.mkdir()
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    )
    client.execute()
    return [shown(cell) for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: Any) -> str:
    """Return the texts of a cell's outputs, and its last HTML."""
    texts = []
    for output in cell.outputs:
        data = output.get("data", {})
        texts.append(output.get("text", "") or data.get("text/html") or data.get("text/plain", ""))
    return "".join(texts)


def test_a_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, composed, trained, left, sampled, _, resumed = run("first_run.ipynb", tmp_path, monkeypatch)
    assert "zero 2 " in composed
    assert "trainer.learning_rat: " in composed or "did you mean learning_rate" in composed
    assert "<svg" in trained
    assert "100%" in trained or "done" in trained
    assert "'done'" in trained
    losses = [float(text) for text in re.findall(r"\d\.\d+", left.splitlines()[0])]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert "checkpoint-10" in left
    assert "__init__" in sampled
    assert resumed.startswith("done 24 ")
    assert "model.safetensors" in resumed


def test_parts_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = run("own_parts.ipynb", tmp_path, monkeypatch)
    _, _, refused, trained, measured, _, resumed = cells
    assert "keeps 1 tensors of each parameter (mean), but trainer.custom_moments=2" in refused
    assert "<svg" in trained
    assert "'done'" in trained
    assert "eval_own_loss" in measured
    assert "my_parts.py:Best" in measured
    before, after = (
        float(re.findall(r"'loss': ([\d.]+)", text)[-1]) for text in (measured, resumed)
    )
    assert after <= before
    assert resumed.startswith("16 my_parts.py:Best")


def test_the_chapters_code_runs(tmp_path: Path) -> None:
    chapter = (ROOT / "docs/python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", chapter, re.DOTALL)
    called = [block for block in blocks if "shardwright." in block and "notebook" not in block]
    assert len(called) == 5
    (tmp_path / "parts.py").write_text("\n".join(b for b in blocks if b not in called[:5]))
    (tmp_path / "called.py").write_text("\n".join(called))
    environment = {**os.environ, **package_environment(os.environ)}
    ended = subprocess.run(
        [sys.executable, "called.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "\n20 " in f"\n{ended.stdout}"
    assert "\ndone 6\n" in ended.stdout
    assert "\ngpt2 checkpoint-6 " in ended.stdout
    assert (tmp_path / "recovered/model.safetensors").is_file()
    assert (tmp_path / "runs/first/checkpoints/checkpoint-8").is_dir()


# --- a cell that is interrupted -------------------------------------------------------------------


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """Start a kernel in the test's folder; return its manager and its client."""
    for variable, value in package_environment(os.environ).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    try:
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def printed(client: Any, code: str) -> str:
    """Run a cell and return what it has printed, or the error that it has raised."""
    texts: list[str] = []

    def take(message: dict[str, Any]) -> None:
        content = message["content"]
        texts.append(content.get("text", "") or content.get("evalue", ""))

    client.execute_interactive(code, timeout=600, output_hook=take, allow_stdin=False)
    return "".join(texts)


def processes_of(run_dir: Path) -> list[str]:
    """Return the processes that have a run's directory in their command line."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            words = (place / "cmdline").read_bytes() if place.name.isdecimal() else b""
        except OSError:
            continue
        found += [place.name] if str(run_dir).encode() in words else []
    return found


def test_an_interrupted_cell_saves_and_the_next_one_works(
    kernel: tuple[Any, Any], tiny: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    manager, client = kernel
    assert printed(client, "import shardwright") == ""
    words = [word for word in tiny("clm") if not word.startswith("launcher.nproc_per_node")]
    endless = [*words, "trainer.max_steps=100000", "trainer.eval_max_samples=4"]
    cell = client.execute(f"run = shardwright.notebook_launch(*{endless!r}, ranks=2)")
    run_dir = tmp_path / "run"
    metrics = run_dir / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and '"loss"' in metrics.read_text(), 600)
    assert len(processes_of(run_dir)) >= 3, "a launcher and two ranks"

    manager.interrupt_kernel()
    while (reply := client.get_shell_msg(timeout=600))["parent_header"].get("msg_id") != cell:
        pass
    assert reply["content"]["status"] == "ok", "the cell returns the run"
    assert processes_of(run_dir) == []
    logged = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    assert checkpoint.name == f"checkpoint-{logged[-1]}", "nothing that was trained is lost"

    told = printed(client, "print(run.status.can_resume, [p.name for p in run.checkpoints])")
    assert told == f"True ['{checkpoint.name}']\n"
    more = f"run = shardwright.resume(run.run_dir, 'trainer.max_steps={logged[-1] + 2}')"
    printed(client, more)
    assert printed(client, "print(run.status.state, run.final.name)") == "done final\n"
