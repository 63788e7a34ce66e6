"""The README's commands as people give them: no traceback, no silence, no line twice.

In terminals of two sizes and behind a pipe, from another directory than the project's, in an empty
environment and in one full of other launchers' variables, and with Ctrl-C in every phase.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.cli import TINY
from tests.e2e.terminal import Seen, see

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]

SHARDWRIGHT = str(Path(sys.executable).with_name("shardwright"))
MOST_SILENT_SECONDS = 10.0
"""As docs/commands.md says: between two signs of life of a command that is at work."""

PLAIN = {"HOME": os.environ.get("HOME", "/"), "PATH": os.environ["PATH"], "TERM": "xterm"}
# What a shell inside of somebody else's job has.
CROWDED = {
    **PLAIN,
    **{"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"},
    **{"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1", "GROUP_RANK": "1", "ROLE_RANK": "3"},
    **{"PET_NNODES": "2", "PET_NPROC_PER_NODE": "7", "PET_RDZV_ENDPOINT": "192.0.2.1:1"},
    **{"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "3"},
    **{"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3", "SLURM_NNODES": "2"},
    **{"PMI_RANK": "3", "PMI_SIZE": "8", "PMIX_RANK": "3"},
    **{"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "3"},
    **{"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "fp16"},
    **{"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_USE_FSDP": "true"},
    **{"ACCELERATE_USE_MEGATRON_LM": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
    **{"WANDB_MODE": "online", "WANDB_PROJECT": "somebody-elses"},
}


def overrides(corpus: Path, tmp_path: Path, *more: str) -> list[str]:
    return [
        "model=gpt2_tiny",
        *TINY,
        "strategy=zero2",
        "launcher=torchrun",
        "launcher.nproc_per_node=2",
        "data=text",
        f"data.paths=['{corpus}']",
        f"data.cache_dir='{tmp_path / 'cache'}'",
        "data.sequence_length=32",
        "data.eval_fraction=0.1",
        "trainer.max_steps=30",
        "trainer.global_batch_size=8",
        "trainer.micro_batch_size=4",
        "trainer.eval_every_steps=10",
        "trainer.save_every_steps=10",
        "objective.prompts=['def f(']",
        "run_dir=run",
        *more,
    ]


def assert_pleasant(seen: Seen, code: int = 0, *, is_file: bool = False) -> None:
    """``is_file`` where a config, a log or a card is shown, whose lines may be alike."""
    assert seen.code == code, seen.text
    assert "Traceback" not in seen.text
    # A command without a bar is at work where the next thing comes.
    assert seen.silences[0][0] < MOST_SILENT_SECONDS, (seen.silences[:3], seen.text)
    if is_file:
        return
    twice = [
        line
        for line, count in Counter(line for line in seen.lines if len(line.strip()) > 8).items()
        if count > 1
    ]
    assert not twice, (twice, seen.text)
    # A bar's clock ends its line, or a comma or its own note follows.
    assert not [line for line in seen.lines if re.search(r"\d\d:\d\d\](?!$|, )", line)], seen.text


@pytest.mark.parametrize(
    ("size", "environment"),
    [((80, 24), PLAIN), ((160, 50), CROWDED), (None, PLAIN), (None, CROWDED)],
    ids=["80x24", "160x50-crowded", "piped", "piped-crowded"],
)
def test_every_command_of_a_run(
    size: tuple[int, int] | None, environment: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    def shown(*arguments: str, code: int = 0, is_file: bool = False) -> Seen:
        seen = see([SHARDWRIGHT, *arguments], cwd=tmp_path, environment=environment, size=size)
        assert_pleasant(seen, code, is_file=is_file)
        if size and not is_file:
            bars = re.compile(r"\d+%\|")
            too_long = [x for x in seen.lines if len(x) > size[0] and not bars.search(x)]
            # Paths and commands to copy must not be broken.
            assert not [x for x in too_long if str(tmp_path) not in x and "=" not in x], too_long
        return seen

    shown("train", "--dry-run", *overrides(corpus, tmp_path), is_file=True)
    trained = shown("train", *overrides(corpus, tmp_path))
    assert "held-out loss" in trained.text
    run_dir = str(tmp_path / "run")
    assert "done" in shown("status", run_dir).text
    assert "checkpoint" in shown("checkpoints", run_dir, "--verify").text
    assert "held-out loss" in shown("logs", run_dir, is_file=True).text
    shown("resume", run_dir, "trainer.max_steps=40")
    steps = [json.loads(x)["step"] for x in (tmp_path / "run/metrics.jsonl").open()]
    assert max(steps) == 40
    assert len(set(steps)) >= 2
    shown("recover", run_dir, str(tmp_path / "out"))
    assert "def f(" in shown("sample", run_dir, "--prompt", "def f(").text
    shown("push", run_dir, "me/it", "--dry-run", is_file=True)
    shown("train", "--help", is_file=True)
    shown("train", *overrides(corpus, tmp_path, "trainer.learning_rat=1"), code=2)
    facts = json.loads((tmp_path / "run/engine.json").read_text())
    assert facts["world_size"] == 2


# Each phase, told by what is shown at its beginning.
PHASES = {
    "composing": r"",
    "tokenizer": r"(?i)tokenizer",
    "tokens": r"(?i)token(s|is)",
    "start": r"(?i)parameters",
    "training": r"step 1/|\b1/30\b",
    "evaluation": r"held-out",
    "checkpoint": r"step 10/|\b10/30\b",
    "end": r"\b30/30\b",
}


@pytest.mark.parametrize("size", [(80, 24), None], ids=["terminal", "piped"])
@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_in_every_phase_leaves_a_run_that_can_be_resumed(
    phase: str, size: tuple[int, int] | None, corpus: Path, tmp_path: Path
) -> None:
    pattern = PHASES[phase] or "."
    seen = see(
        [SHARDWRIGHT, "train", *overrides(corpus, tmp_path, "trainer.log_every_steps=1")],
        cwd=tmp_path,
        environment=PLAIN,
        size=size,
        interrupt_at=pattern,
    )
    assert seen.interrupted_at is not None, seen.text
    assert "Traceback" not in seen.text, seen.text
    assert "SIGUSR1" not in seen.text, seen.text
    run_dir = tmp_path / "run"
    if seen.code == 0:  # it came when all was done
        assert (run_dir / "final").is_dir()
        return
    if not run_dir.exists():
        assert seen.code == 130, seen.text
        return
    # 75: there is a checkpoint, or a resume begins the run.
    assert seen.code == 75, (seen.code, seen.text)
    assert "Ctrl-C" in seen.text, seen.text
    assert "shardwright resume" in seen.text, seen.text
    resumed = see([SHARDWRIGHT, "resume", str(run_dir)], cwd=tmp_path, environment=PLAIN, size=size)
    assert_pleasant(resumed)
    assert (run_dir / "final").is_dir()
