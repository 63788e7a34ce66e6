"""A rank reads of the weights in files what it is to hold, once, and no more."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from shardwright.train.checkpoint.format import lazy
from shardwright.train.config import load
from shardwright.train.loop.callbacks import engine as engine_callback
from shardwright.train.model import streaming
from shardwright.train.model.blocks import parameter_count
from shardwright.train.process.rank import Rank, rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join
from tests.distributed.jobs import whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

FP32_BYTES = 4


class Counter:
    """How many bytes were read so far."""

    def __init__(self) -> None:
        self.bytes = 0

    def add(self, found: Any) -> Any:
        self.bytes += found.nbytes
        return found


streaming_open = streaming.safe_open


class CountedFile:
    """An open safetensors file that counts what is taken out of it.

    Its tensors are mapped: no more than that is read, though it may be less.
    """

    def __init__(self, counter: Counter, *arguments: Any, **options: Any) -> None:
        self._counter = counter
        self._manager = streaming_open(*arguments, **options)

    def __enter__(self) -> CountedFile:
        self._file = self._manager.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._manager.__exit__(*error)

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def get_tensor(self, name: str) -> Any:
        return self._counter.add(self._file.get_tensor(name))

    def get_slice(self, name: str) -> CountedSlice:
        return CountedSlice(self._counter, self._file.get_slice(name))


class CountedSlice:
    def __init__(self, counter: Counter, part: Any) -> None:
        self._counter, self._part = counter, part
        self.get_shape, self.get_dtype = part.get_shape, part.get_dtype

    def __getitem__(self, index: Any) -> Any:
        return self._counter.add(self._part[index])


def bytes_read(run_dir: Path) -> dict[str, int]:
    """Start a run to its end; return the bytes of weights that this rank read, and holds."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return _counted(run_dir, rank)


def _counted(run_dir: Path, rank: Rank) -> dict[str, int]:
    counter = Counter()
    read_into, restore = lazy._read_into, engine_callback.restore
    of_weights: list[int] = []

    def counted_read(buffer: memoryview, *rest: Any) -> None:
        counter.bytes += buffer.nbytes
        read_into(buffer, *rest)

    def restore_after_the_weights(*arguments: Any) -> None:
        of_weights.append(counter.bytes)
        restore(*arguments)

    with (
        mock.patch.object(lazy, "_read_into", counted_read),
        mock.patch.object(streaming, "safe_open", lambda *a, **o: CountedFile(counter, *a, **o)),
        mock.patch.object(engine_callback, "restore", restore_after_the_weights),
    ):
        trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
        trainer.train()
    held = sum(part.numel() for part in trainer.engine.local_weights(trainer))
    read = of_weights[0] if of_weights else counter.bytes
    return {
        "weights": read,
        "moments": counter.bytes - read,
        "part": FP32_BYTES * held,
        "whole": FP32_BYTES * parameter_count(trainer.model),
    }


REPLICATED = ("ddp", "zero0", "zero2")


def check(strategy: str, seen: list[dict[str, int]]) -> None:
    for rank, found in enumerate(seen):
        print(f"{strategy}, rank {rank}: {found}")
        needed = found["whole"] if strategy in REPLICATED else found["part"]
        assert found["weights"] <= 1.1 * needed
        assert found["moments"] <= 1.1 * 2 * found["part"]
    assert sum(found["weights"] for found in seen) >= seen[0]["whole"], "nothing was counted"


@pytest.fixture(scope="module")
def saved() -> list[Path]:
    """Return the run of this module that its tests resume, once one has trained it."""
    return []


@pytest.mark.parametrize(
    "strategy", ["fsdp", "fsdp_one_unit", "zero3", "zero3_many_groups", *REPLICATED]
)
def test_a_resume_reads_what_a_rank_holds(
    strategy: str,
    saved: list[Path],
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree("clm")
    tree["model"]["vocab_size"] = 385  # rows that two ranks do not divide
    tree["precision"] = {"compute_dtype": "bf16"}
    tree["trainer"] |= {"max_steps": 1, "save_every_steps": 1}
    if not saved:
        saved.append(frozen_run(tree | {"strategy": STRATEGIES["fsdp"]}))
        ranks(2)(whole_run, saved[0])
    run_dir = frozen_run(tree | {"strategy": STRATEGIES[strategy]})
    for name in ("checkpoints", "tokenizer", "data.json", "metrics.jsonl"):
        (run_dir / name).symlink_to(saved[0] / name)
    check(strategy, ranks(2)(bytes_read, run_dir))


SMALL: dict[str, Any] = {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 2}
PRETRAINED: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**SMALL, n_positions=66, n_embd=32, n_layer=2, n_head=2)
    ),
    # Whose files hold each expert by itself, and whose memory all of a layer in one tensor.
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(
            **SMALL,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=3,  # which two ranks do not divide
        )
    ),
}


@pytest.mark.parametrize("kind", PRETRAINED)
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_of_pretrained_weights_a_rank_reads_what_it_holds(
    kind: str,
    strategy: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
    tmp_path: Path,
) -> None:
    PRETRAINED[kind]().save_pretrained(tmp_path / "model")
    tree = tiny_tree("clm")
    tree["model"] = {"kind": "pretrained", "name": str(tmp_path / "model")}
    tree["tokenizer"]["vocab_size"] = 384
    tree["strategy"], tree["precision"] = STRATEGIES[strategy], {"compute_dtype": "bf16"}
    tree["trainer"]["max_steps"] = 1
    check(strategy, ranks(2)(bytes_read, frozen_run(tree)))
