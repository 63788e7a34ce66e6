"""`shardwright recover` on runs of the real command line: what it writes is what final/ is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.cli import shardwright
from tests.e2e.conftest import PROMPTS, Run

# As on a machine with neither this project nor deepspeed: -I leaves the working directory and
# PYTHONPATH out, and what may be installed is not found.
ELSEWHERE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        missing = name.partition(".")[0] in ("train", "launchers", "deepspeed")
        return None if missing else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
for name in ("train", "launchers", "deepspeed"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} is here")
task, model, prompt = sys.argv[1:]
from transformers import pipeline
answer = pipeline(task, model=model)(prompt)[0]
print(answer["generated_text"] if task == "text-generation" else answer["sequence"])
"""


def test_the_last_checkpoint_is_final_bit_for_bit_and_loads_anywhere(
    run: Run, tmp_path: Path
) -> None:
    ended = shardwright("recover", str(run.directory), "out", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert "checkpoints/checkpoint-4\n" in ended.stdout
    assert "out: " in ended.stdout.splitlines()[-1]

    final, out = run.directory / "final", tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {path.name for path in final.iterdir()}
    generation = ["generation_config.json"] if run.objective == "clm" else []
    for name in ("model.safetensors", "config.json", "tokenizer.json", *generation):
        assert (out / name).read_bytes() == (final / name).read_bytes(), name

    prompt = PROMPTS[run.objective]
    task = "text-generation" if run.objective == "clm" else "fill-mask"
    spoken = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, task, str(out), prompt],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert spoken.returncode == 0, spoken.stderr
    assert spoken.stdout.startswith(prompt.removesuffix(" <mask>"))
    assert "<mask>" not in spoken.stdout
    assert len(spoken.stdout) > len(prompt.removesuffix("<mask>"))


@pytest.mark.parametrize("run", ["mlm"], indirect=True)
def test_another_step_in_another_dtype(run: Run, tmp_path: Path) -> None:
    arguments = ("recover", str(run.directory), "out", "--step", "3", "--dtype", "bf16")
    ended = shardwright(*arguments, "--max-shard-size", "20kB", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "checkpoint-3\n" in ended.stdout
    assert len(list((tmp_path / "out").glob("model-0000?-of-0000?.safetensors"))) > 1
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
