"""Runs of the real command line that several tests look at."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e import ssh
from tests.e2e.cli import SAME, TINY, losses, shardwright

PROMPTS = {"clm": "def f(", "mlm": "import <mask>"}
TRACKERS = {"clm": ("tracking=tensorboard",), "mlm": ("tracking=wandb", "tracking.mode=offline")}
# Under FSDP in bf16 and under ZeRO-3 in fp32, where final/ is the hardest to come by.
MODELS = {
    "clm": ("model=gpt2_tiny", "objective=clm", "strategy=fsdp", "precision=bf16"),
    "mlm": ("model=roberta_tiny", "objective=mlm", "strategy=zero3"),
}


@pytest.fixture(scope="session")
def tiny(corpus: Path, cache_dir: Path) -> Callable[[str], tuple[str, ...]]:
    """Return a function from an objective to the overrides of a run that trains in seconds."""

    def overrides(objective: str) -> tuple[str, ...]:
        return (
            *MODELS[objective],
            *TINY,
            "launcher.nproc_per_node=2",
            "data=text",
            f"data.paths=['{corpus}']",
            f"data.cache_dir='{cache_dir}'",
            "data.sequence_length=32",
            "data.eval_fraction=0.1",
            "trainer.max_steps=4",
            "trainer.global_batch_size=16",
            "trainer.micro_batch_size=4",
            "trainer.log_every_steps=1",
            "trainer.eval_max_samples=16",
            "run_dir=run",
        )

    return overrides


@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    objective: str
    overrides: tuple[str, ...]
    directory: Path
    ended: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def ended_runs() -> dict[str, Run]:
    return {}


@pytest.fixture(params=["clm", pytest.param("mlm", marks=pytest.mark.wide)])
def run(
    request: pytest.FixtureRequest,
    tiny: Callable[[str], tuple[str, ...]],
    tmp_path_factory: pytest.TempPathFactory,
    ended_runs: dict[str, Run],
) -> Run:
    """Return a run of two gloo ranks started by torchrun; the same one to each test."""
    objective = request.param
    if objective not in ended_runs:
        cwd = tmp_path_factory.mktemp(objective)
        overrides = (
            *tiny(objective),
            *TRACKERS[objective],
            "trainer.dataloader_workers=1",
            "trainer.eval_every_steps=2",
            "trainer.save_every_steps=3",
            f"objective.prompts=['{PROMPTS[objective]}']",
            f"name=tiny_{objective}",
        )
        ended = shardwright("train", *overrides, cwd=cwd)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        ended_runs[objective] = Run(objective, overrides, cwd / "run", ended)
    return ended_runs[objective]


@pytest.fixture(scope="session")
def expected(
    tiny: Callable[[str], tuple[str, ...]], tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """Return the losses of two ranks of torchrun."""
    cwd = tmp_path_factory.mktemp("torchrun")
    ended = shardwright("train", *tiny("clm"), *SAME, "launcher=torchrun", cwd=cwd)
    assert ended.returncode == 0, ended.stderr
    return losses(cwd / "run")


@pytest.fixture(scope="session")
def ssh_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with ssh.served(tmp_path_factory.mktemp("ssh")) as port:
        yield port
