"""A run is pushed to a hub while it trains, by the real client, to a stand-in for the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load, load_file

from tests.e2e.cli import ROOT, TIMEOUT_SECONDS, TINY
from tests.unit.launchers.hub import TOKEN, Hub, running

pytestmark = pytest.mark.distributed


def train(cwd: Path, hub: Hub, *overrides: str, **environment: str) -> Any:
    """Run four steps with a save each second one; return the finished command."""
    corpus = cwd / "corpus.txt"
    corpus.write_text("Thoughts without content are empty, intuitions are blind.\n" * 400)
    settings = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(cwd / "hf"),
        "HF_TOKEN": TOKEN,
        **environment,
    }
    return subprocess.run(
        [
            *(sys.executable, "-m", "shardwright", "train", "model=gpt2_tiny", "data=text", *TINY),
            *("strategy=single", "launcher=local", "run_dir=run", "data.sequence_length=32"),
            *(f"data.paths=['{corpus}']", f"data.cache_dir='{cwd / 'cache'}'"),
            *("data.eval_fraction=0", "trainer.max_steps=4", "trainer.save_every_steps=2"),
            *("trainer.global_batch_size=4", "checkpoint.push_to=small", *overrides),
        ],
        cwd=cwd,
        env=settings,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def pushes(cwd: Path) -> list[dict[str, Any]]:
    lines = (cwd / "run" / "pushes.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.wide
def test_saves_and_the_end_of_a_run_reach_the_hub(tmp_path: Path) -> None:
    with running() as hub:
        ended = train(
            *(tmp_path, hub, "checkpoint.push_every=save", "checkpoint.push_revision=step"),
        )
    assert ended.returncode == 0, ended.stderr
    repository = hub.repositories["ada/small"]
    assert repository.private
    run_dir = tmp_path / "run"
    made = repository.branches["main"]
    assert (
        load(made["model.safetensors"]).keys()
        == load_file(run_dir / "final" / "model.safetensors").keys()
    )
    assert made["model.safetensors"] == (run_dir / "final" / "model.safetensors").read_bytes()
    assert b'model="ada/small"' in made["README.md"]
    assert repository.messages[-1] == "run: final"
    # A save that is written while another is pushed takes its place, as may the end: how many
    # there were is chance. tests/unit/test_publisher.py has each of them pushed.
    (*steps, last) = [entry["what"] for entry in pushes(tmp_path)]
    assert last == "final"
    for what in steps:
        branch = repository.branches[what.replace("checkpoint-", "step-")]
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(branch)
    assert not (run_dir / ".publishing").exists()
    assert TOKEN not in (run_dir / "config.yaml").read_text()
    assert "pushed final to" in ended.stdout + ended.stderr


@pytest.mark.slow
def test_a_hub_that_fails_stops_nothing_and_is_told(tmp_path: Path) -> None:
    with running() as hub:
        hub.refused["whoami"] = 503
        ended = train(tmp_path, hub, "checkpoint.push_every=save")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert all("fails (503: refused by the test)" in entry["error"] for entry in pushes(tmp_path))
    told = " ".join((ended.stdout + ended.stderr).split())
    assert "warning: final/ is not pushed; later: " in told
    assert f"push {tmp_path / 'run'} small" in told
