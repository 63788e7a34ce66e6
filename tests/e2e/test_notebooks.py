"""The notebooks of docs/, and the code of the chapter on Python, run as their readers run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

from shardwright.train.program import package_environment
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
