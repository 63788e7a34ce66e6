"""Under every engine the last checkpoint gives the very weights that final/ had from the engine."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shardwright.train.errors import UserError
from shardwright.train.export.recover import Options, recover
from tests.distributed.jobs import whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf

pytestmark = pytest.mark.distributed

slow = pytest.mark.slow
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "zero0": {"kind": "zero", "stage": 0},
    "zero1": {"kind": "zero", "stage": 1},
    "zero2": {"kind": "zero", "stage": 2},
    "zero3": {"kind": "zero", "stage": 3, "persistence_elements": 0},
}


@pytest.mark.parametrize(
    ("strategy", "objective", "dtype", "world_size"),
    [
        ("zero0", "mlm", "bf16", 2),
        ("zero2", "clm", "bf16", 4),
        pytest.param("ddp", "mlm", "fp32", 1, marks=slow),
        pytest.param("ddp", "clm", "bf16", 4, marks=slow),
        pytest.param("fsdp", "clm", "fp32", 1, marks=slow),
        pytest.param("fsdp", "mlm", "bf16", 4, marks=slow),
        pytest.param("zero0", "clm", "fp32", 4, marks=slow),
        pytest.param("zero1", "mlm", "bf16", 4, marks=slow),
        pytest.param("zero1", "clm", "fp32", 2, marks=slow),
        pytest.param("zero2", "mlm", "fp32", 1, marks=slow),
        pytest.param("zero3", "clm", "bf16", 2, marks=slow),
        pytest.param("zero3", "mlm", "bf16", 4, marks=slow),
    ],
)
def test_the_last_checkpoint_is_final(
    strategy: str,
    objective: str,
    dtype: str,
    world_size: int,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
    tmp_path: Path,
) -> None:
    tree = tiny_tree(objective)
    # Sizes that neither 2 nor 4 divide, so that rows, parameters and partitions need padding.
    tree["model"] |= {"vocab_size": 389, "hidden_size": 34, "intermediate_size": 67}
    tree["strategy"], tree["precision"] = STRATEGIES[strategy], {"compute_dtype": dtype}
    tree["trainer"] |= {"max_steps": 2, "save_every_steps": 1, "eval_max_samples": 4}
    tree["trainer"] |= {"learning_rate": 1e-2}
    tree["launcher"]["nproc_per_node"] = world_size
    run_dir = frozen_run(tree)
    ranks(world_size)(whole_run, run_dir)
    final, out = run_dir / "final", tmp_path / "out"
    recover(Options(run_dir, out), io.StringIO(), io.StringIO())
    assert (out / "config.json").read_text() == (final / "config.json").read_text()
    found, expected = (load_file(path / "model.safetensors") for path in (out, final))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(found[name], tensor), name

    # Another step is another model, and its shards are no part of this one's.
    first, last = (run_dir / f"checkpoints/checkpoint-{step}/engine" for step in (1, 2))
    recover(Options(run_dir, tmp_path / "first", step=1), io.StringIO(), io.StringIO())
    earlier = load_file(tmp_path / "first/model.safetensors")
    assert any(not torch.equal(earlier[name], tensor) for name, tensor in expected.items())
    shard = max(path.name for path in last.glob("*") if path.suffix in (".pt", ".distcp"))
    shutil.copy(first / shard, last / shard)
    with pytest.raises(UserError, match=rf"checkpoint-2 is not whole: engine/{shard} has "):
        recover(Options(last.parent, tmp_path / "mixed"), io.StringIO(), io.StringIO())
    assert not (tmp_path / "mixed").exists()
