"""What is said where memory or a disk has run out: what, and what would need less."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
import torch

from shardwright.train.config import from_tree
from shardwright.train.loop.saving.peers import SaveFailed
from shardwright.train.process.exhausted import explained
from tests.unit.trees import TREE

CONFIG = from_tree(TREE)


def raised_from(cause: BaseException) -> BaseException:
    """Return another error that this one has led to."""
    try:
        try:
            raise cause
        except type(cause):
            raise ValueError("a consequence")  # noqa: B904 - as libraries do
    except ValueError as error:
        return error


def test_what_has_nothing_to_do_with_it_is_not_explained() -> None:
    for error in (RuntimeError("boom"), FileNotFoundError(errno.ENOENT, "no such file", "a")):
        assert explained(error, CONFIG) is None
        assert explained(raised_from(error), CONFIG) is None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/metrics.jsonl"),
            "the disk is full where /run/metrics.jsonl is to be written; free some space, keep "
            "fewer checkpoints (checkpoint.keep_last, trainer.save_every_steps), and resume the "
            "run",
        ),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/a"), "the disk quota is used up where"),
        # Of libraries in Rust and C++.
        (
            Exception("Error: No space left on device (os error 28)"),
            "the disk is full (Error: No space left on device (os error 28)); free some space",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."),
            "the GPU's memory has run out: CUDA out of memory. Tried to allocate 2.00 GiB.\nless "
            "is needed with trainer.micro_batch_size=",
        ),
        (MemoryError(), "host memory has run out\nless is needed with trainer.micro_batch_size="),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "host memory has run out: [enforce fail] DefaultCPUAllocator: can't allocate memory",
        ),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "host memory has run out: [Errno 12]"),
        (
            SaveFailed("checkpoint-4 could not be written: the disk", is_of_disk=True),
            "checkpoint-4 could not be written: the disk",
        ),
    ],
)
def test_what_has_run_out_is_said_with_what_needs_less(error: Exception, said: str) -> None:
    for found in (error, raised_from(error)):
        text = explained(found, CONFIG)
        if isinstance(error, SaveFailed) and found is not error:
            continue
        assert text is not None
        assert text.startswith(said)


def test_torchs_allocator_of_host_memory_is_understood() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    text = explained(error.value, CONFIG)
    assert text is not None
    assert text.startswith("host memory has run out: ")


def remedies(device: str, **sections: Any) -> str:
    tree = {**TREE, **{name: {**TREE[name], **values} for name, values in sections.items()}}
    error = torch.OutOfMemoryError("out") if device == "cuda" else MemoryError()
    text = explained(error, from_tree(tree))
    assert text is not None
    return text


def test_only_what_is_not_chosen_yet_is_proposed() -> None:
    text = remedies("cuda", trainer={"micro_batch_size": 8})
    assert "trainer.micro_batch_size=4 instead of 8, for the same batch" in text
    assert "trainer.checkpoint_activations_every_blocks=1, or " in text
    text = remedies(
        "cuda", trainer={"micro_batch_size": 1, "checkpoint_activations_every_blocks": 1}
    )
    assert "micro_batch_size" not in text
    assert "checkpoint_activations" not in text
    assert "recompute" not in text
    cheap = {"checkpoint_activations_every_blocks": 1, "recompute": "selective"}
    assert "trainer.recompute=full, or " in remedies("cuda", trainer=cheap)
    assert "workers" not in text
    text = remedies("cpu", trainer={"dataloader_workers": 3})
    assert "fewer trainer.dataloader_workers (now 3), or " in text
    assert "offload" not in text
