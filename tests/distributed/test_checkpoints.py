"""What a native checkpoint holds: the weights of final/, by the engines' own readers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from shardwright.train.checkpoint.format import layout
from tests.distributed.jobs import whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

Weights = dict[str, NDArray[Any]]
CheckpointOf = Callable[[str, str, str], Path]

MAX_STEPS = 5


@pytest.fixture(scope="module")
def trained() -> dict[tuple[str, str, str], Path]:
    """Return the runs of this module, which its tests share."""
    return {}


@pytest.fixture
def checkpoint_of(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
    trained: dict[tuple[str, str, str], Path],
) -> CheckpointOf:
    """Return a function that gives the last checkpoint of five steps, saved every two."""

    def checkpoint(strategy: str, objective: str, dtype: str) -> Path:
        key = (strategy, objective, dtype)
        if key not in trained:
            tree = tiny_tree(objective)
            tree["strategy"] = STRATEGIES[strategy]
            tree["precision"] = {"compute_dtype": dtype}
            tree["trainer"] |= {"max_steps": MAX_STEPS, "save_every_steps": 2}
            world_size = 1 if strategy == "single" else 2
            tree["launcher"]["nproc_per_node"] = world_size
            run_dir = frozen_run(tree)
            ranks(world_size)(whole_run, run_dir)
            trained[key] = run_dir
        return trained[key] / "checkpoints" / f"checkpoint-{MAX_STEPS}"

    return checkpoint


def final_weights(checkpoint: Path) -> Weights:
    return load_file(checkpoint.parents[1] / "final" / "model.safetensors")


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "manifest.json").read_text())


def aliases_of(checkpoint: Path) -> dict[str, str]:
    """Return the name of the parameter that each other name is tied to."""
    parameters = manifest_of(checkpoint)["parameters"]
    return {alias: p["name"] for p in parameters for alias in p["tied"]}


def assert_same_bits(found: Weights, checkpoint: Path) -> None:
    """Compare with final/; an engine may write a tied weight under its other names too."""
    expected = final_weights(checkpoint)
    assert set(expected) <= set(found) <= {*expected, *aliases_of(checkpoint)}
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype == np.float32
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


def merge_zero_shards(checkpoint: Path) -> Weights:
    """Do as the zero_to_fp32.py that DeepSpeed leaves beside its shards."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    merged = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="engine")
    return {name: tensor.detach().numpy() for name, tensor in merged.items()}


@pytest.mark.parametrize(
    ("strategy", "objective", "dtype"),
    [
        ("zero1", "clm", "fp32"),
        ("zero2", "mlm", "fp32"),
        ("zero3", "clm", "fp32"),
        ("zero3", "mlm", "bf16"),
    ],
)
def test_zero_shards_merge_to_the_final_weights(
    strategy: str,
    objective: str,
    dtype: str,
    checkpoint_of: CheckpointOf,
    ranks: RanksOf,
) -> None:
    checkpoint = checkpoint_of(strategy, objective, dtype)
    (merged,) = ranks(1)(merge_zero_shards, checkpoint)
    assert_same_bits(merged, checkpoint)
    shards = list((checkpoint / "engine").glob("*zero_pp_rank_*_optim_states.pt"))
    assert len(shards) == 2, "each rank writes its own"


def merge_stage_1_shards_of_bf16(checkpoint: Path) -> Weights:
    """Lay the ranks' flat masters end to end and cut them by the parameters' shapes.

    Stage 1 in bf16 with fp32 accumulation is DeepSpeed's BF16_Optimizer, whose files its own
    zero_to_fp32.py refuses ("is not a zero checkpoint", deepspeed 0.19).
    """
    engine = checkpoint / "engine"
    shards = [
        torch.load(path, weights_only=False)["optimizer_state_dict"]
        for path in sorted(engine.glob("bf16_zero_pp_rank_*_optim_states.pt"))
    ]
    assert len(shards) == 2, "each rank writes its own"
    model = torch.load(engine / "mp_rank_00_model_states.pt", weights_only=False)
    merged: Weights = {}
    for group, shapes in enumerate(model["param_shapes"]):
        flat = torch.cat([shard["single_partition_of_fp32_groups"][group] for shard in shards])
        start = 0
        for name, shape in shapes.items():
            merged[name] = flat[start : start + shape.numel()].view(shape).detach().numpy()
            start += shape.numel()
    return merged


def test_stage_1_shards_of_bf16_hold_the_final_weights(
    checkpoint_of: CheckpointOf, ranks: RanksOf
) -> None:
    checkpoint = checkpoint_of("zero1", "clm", "bf16")
    (merged,) = ranks(1)(merge_stage_1_shards_of_bf16, checkpoint)
    assert_same_bits(merged, checkpoint)


def read_distributed_checkpoint(engine: Path) -> dict[str, torch.Tensor]:
    """Load every tensor whole, in this one process."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    described = dcp.FileSystemReader(engine).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(what.size, dtype=what.properties.dtype)
        for name, what in described.items()
        if isinstance(what, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=engine, no_dist=True)
    return state


@pytest.mark.parametrize(
    ("strategy", "objective", "dtype"),
    [
        ("single", "clm", "fp32"),
        ("ddp", "mlm", "bf16"),
        ("fsdp", "clm", "fp32"),
        ("fsdp", "mlm", "bf16"),
    ],
)
def test_distributed_checkpoint_holds_the_final_weights_and_both_moments(
    strategy: str, objective: str, dtype: str, checkpoint_of: CheckpointOf
) -> None:
    checkpoint = checkpoint_of(strategy, objective, dtype)
    state = read_distributed_checkpoint(checkpoint / "engine")
    weights = {
        name.removeprefix("model."): tensor.numpy()
        for name, tensor in state.items()
        if name.startswith("model.")
    }
    assert_same_bits(weights, checkpoint)
    for name, weight in final_weights(checkpoint).items():
        for moment in ("exp_avg", "exp_avg_sq"):
            found = state[f"optimizer.state.{name}.{moment}"]
            assert found.dtype == torch.float32
            assert found.shape == weight.shape
            assert found.any(), f"{moment} of {name} is zero after {MAX_STEPS} steps"
    if strategy == "fsdp":
        assert len(list((checkpoint / "engine").glob("*.distcp"))) == 2, "each rank writes its own"


@pytest.mark.parametrize(
    ("strategy", "objective", "dtype", "parameter_dtype"),
    [
        ("ddp", "mlm", "bf16", "float32"),
        ("fsdp", "clm", "fp32", "float32"),
        ("zero0", "clm", "fp32", "float32"),
        ("zero3", "mlm", "bf16", "bfloat16"),  # the masters are the optimizer's
    ],
)
def test_manifest_describes_the_model_the_position_and_the_files(
    strategy: str, objective: str, dtype: str, parameter_dtype: str, checkpoint_of: CheckpointOf
) -> None:
    checkpoint = checkpoint_of(strategy, objective, dtype)
    manifest = manifest_of(checkpoint)

    assert manifest["format_version"] == layout.FORMAT_VERSION
    assert manifest["strategy"].items() >= STRATEGIES[strategy].items()
    assert manifest["world_size"] == 2
    assert manifest["step"] == MAX_STEPS
    assert manifest["samples"] == MAX_STEPS * 16
    assert manifest["tokens"] == MAX_STEPS * 16 * 32

    auto = AutoModelForCausalLM if objective == "clm" else AutoModelForMaskedLM
    model = auto.from_pretrained(checkpoint.parents[1] / "final")
    described = {p["name"]: p for p in manifest["parameters"]}
    assert {name: p["shape"] for name, p in described.items()} == {
        name: list(parameter.shape) for name, parameter in model.named_parameters()
    }
    assert {p["dtype"] for p in described.values()} == {parameter_dtype}
    every_name = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    aliases = aliases_of(checkpoint)
    assert every_name == {*described, *aliases}
    assert ("lm_head.weight" if objective == "clm" else "lm_head.decoder.weight") in aliases
    for alias, name in aliases.items():
        assert model.get_parameter(alias) is model.get_parameter(name)

    files = {p.relative_to(checkpoint).as_posix(): p for p in layout.files_of(checkpoint)}
    assert {"rng-0.pt", "rng-1.pt", "scheduler.pt", "trainer_state.json"} <= set(files)
    assert manifest["files"] == {
        name: {
            "bytes": path.stat().st_size,
            "xxh3_128": xxhash.xxh3_128_hexdigest(path.read_bytes()),
        }
        for name, path in files.items()
    }


def test_state_beside_the_engine_is_data_and_not_code(checkpoint_of: CheckpointOf) -> None:
    checkpoint = checkpoint_of("ddp", "mlm", "bf16")
    for rank in range(2):
        state = torch.load(checkpoint / f"rng-{rank}.pt", weights_only=True)
        torch.Generator().set_state(state["torch"])
        assert json.loads(state["numpy"])["bit_generator"] == "MT19937"
        assert json.loads(state["python"])[0] == 3  # the format that random.setstate takes
    schedule = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    assert schedule["last_epoch"] == MAX_STEPS
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == MAX_STEPS


def test_the_newest_two_checkpoints_are_kept(checkpoint_of: CheckpointOf) -> None:
    checkpoints = checkpoint_of("fsdp", "clm", "fp32").parent
    assert [step for step, _ in layout.whole_checkpoints(checkpoints)] == [4, 5]
    # Nothing half-written or half-deleted stays beside them.
    assert sorted(p.name for p in checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-5"]


def test_as_many_checkpoints_are_kept_as_were_asked_for(
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
) -> None:
    tree = tiny_tree("clm")
    tree["trainer"] |= {"max_steps": 4, "save_every_steps": 1}
    tree["checkpoint"] = {"keep_last": 3}
    run_dir = frozen_run(tree)
    ranks(2)(whole_run, run_dir)
    kept = layout.whole_checkpoints(run_dir / "checkpoints")
    assert [step for step, _ in kept] == [2, 3, 4]
    assert [manifest_of(path)["step"] for _, path in kept] == [2, 3, 4]
