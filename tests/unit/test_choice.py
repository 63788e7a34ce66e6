"""Where memory runs out for what a plan chose: its figures beside the real ones, and less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardwright.launchers import messages
from shardwright.train.__main__ import _beside_the_plan
from shardwright.train.config import from_tree
from shardwright.train.process.exhausted import Taken, beside_the_plan
from shardwright.train.run_directory import choice
from shardwright.train.run_directory.choice import Choice
from tests.unit.trees import TREE

GIB = 2**30
CONFIG = from_tree(TREE)
CHOICE = Choice(
    words=("strategy=ddp", "trainer.micro_batch_size=8"),
    device_bytes=60 * GIB,
    host_bytes=GIB,
    smaller=("strategy=ddp", "trainer.micro_batch_size=4"),
    smaller_device_bytes=40 * GIB,
    smaller_host_bytes=GIB,
)


def test_it_is_of_the_run_as_it_was_chosen(tmp_path: Path) -> None:
    assert choice.read(tmp_path, CONFIG) is None
    choice.note(tmp_path, CONFIG, CHOICE)
    assert choice.read(tmp_path, CONFIG) == CHOICE
    other = from_tree({**TREE, "trainer": {**TREE["trainer"], "micro_batch_size": 4}})
    assert choice.read(tmp_path, other) is None, "it has been resumed with something else"
    (tmp_path / "choice.json").write_text("{")
    assert choice.read(tmp_path, CONFIG) is None


def test_on_a_gpu_tensors_are_compared() -> None:
    taken = Taken(resident=5 * GIB, allocated=79 * GIB, reserved=80 * GIB)
    assert beside_the_plan(CHOICE, taken, "shardwright resume /r", on_gpu=True) == (
        "the plan that chose strategy=ddp trainer.micro_batch_size=8 expected 60.0 GiB in tensors "
        "of a GPU; it had 79.0 GiB, 80.0 GiB with what is reserved\n"
        "the next smaller choice, 40.0 GiB in tensors of a GPU:\n"
        "  shardwright resume /r strategy=ddp trainer.micro_batch_size=4"
    )
    of_host = beside_the_plan(CHOICE, taken, "resume", on_gpu=False)
    assert "expected 1.0 GiB in tensors of a rank in host memory; the rank had 5.0 GiB" in of_host


def test_on_a_cpu_all_tensors_are_the_hosts() -> None:
    text = beside_the_plan(CHOICE, Taken(resident=70 * GIB), "resume", on_gpu=False)
    assert "expected 61.0 GiB in tensors of a rank in host memory" in text
    assert "the rank had 70.0 GiB with its libraries" in text
    alone = Choice(("trainer.micro_batch_size=1",), 2**20, 0)
    text = beside_the_plan(alone, Taken(None), "resume", on_gpu=False)
    assert text.endswith("expected 1 MiB in tensors of a rank in host memory; what a rank had is "
                         "not known")  # fmt: skip


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("out")])
def test_a_rank_says_it_where_memory_has_run_out(tmp_path: Path, error: Exception) -> None:
    assert _beside_the_plan(error, tmp_path, CONFIG) is None
    choice.note(tmp_path, CONFIG, CHOICE)
    assert _beside_the_plan(ValueError("something else"), tmp_path, CONFIG) is None
    text = _beside_the_plan(error, tmp_path, CONFIG)
    assert text is not None
    assert "the plan that chose strategy=ddp trainer.micro_batch_size=8 expected 61.0 GiB" in text
    assert "the rank had " in text
    assert text.endswith(f"resume {tmp_path} strategy=ddp trainer.micro_batch_size=4")


def test_what_started_the_ranks_says_it_of_one_that_the_kernel_killed(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"run_dir": str(tmp_path)})
    (tmp_path / "logs").mkdir()
    choice.note(tmp_path, config, CHOICE)
    text = messages.failure(-9, [], tmp_path, None, config=config)
    assert "less is needed with" in text
    assert "the plan that chose strategy=ddp trainer.micro_batch_size=8 expected 61.0 GiB" in text
    assert "strategy=ddp trainer.micro_batch_size=4\n" in text
