"""Shards of ZeRO that are not of one save are refused, with the file and both figures named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shardwright.train.checkpoint.format.lazy import Unreadable
from shardwright.train.checkpoint.read import portable

SHAPES = {"a": torch.Size([3, 2]), "b": torch.Size([4])}


def save(directory: Path, stage: int, ranks: int = 2, **of_rank_1: Any) -> None:
    """Write what stage 2 or 3 does of ten elements; ``of_rank_1`` changes the second rank's."""
    model = {
        "module": {},
        "buffer_names": [],
        "param_shapes": [SHAPES],
        "shared_params": {"c": "a"},
        "dp_world_size": ranks,
        "global_steps": 7,
    }
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    torch.save(model, directory / f"{prefix}mp_rank_00_model_states.pt")
    for rank in range(ranks):
        values = {"elements": 10 // ranks, "step": 7, "partition_count": ranks}
        values |= of_rank_1 if rank == 1 else {}
        flat = torch.arange(values["elements"]) + 100.0 * rank
        entries = {"exp_avg": flat + 0.5, "step": torch.tensor(float(values["step"]))}
        groups = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        moments = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
        state = {
            groups: [flat],
            moments: {"state": {0: entries}},
            "zero_stage": stage,
            "partition_count": values["partition_count"],
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, directory / name)


def refusal(directory: Path) -> str:
    with pytest.raises(Unreadable) as error:
        portable.read(directory)
    return str(error.value)


def test_sound_shards_are_read(tmp_path: Path) -> None:
    for stage, expected in ((2, [0, 1, 2, 3, 4, 100]), (3, [0, 1, 2, 100, 101, 102])):
        directory = tmp_path / f"{stage}"
        directory.mkdir()
        save(directory, stage)
        state = portable.read(directory)
        assert state.weights["a"].read().tolist() == expected
        assert state.moments["a"]["exp_avg"].read().tolist() == [v + 0.5 for v in expected]
        assert state.weights["c"] == state.weights["a"]
        assert (state.origin, state.step) == (f"DeepSpeed ZeRO stage {stage}, 2 ranks", 7)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_shard_that_is_missing_or_too_many_is_named(stage: int, tmp_path: Path) -> None:
    save(tmp_path, stage)
    second = tmp_path / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    third = second.with_name(second.name.replace("rank_1", "rank_2"))
    third.write_bytes(second.read_bytes())
    assert "holds the optimizer states of rank(s) 2 too, of a checkpoint of" in refusal(tmp_path)
    third.rename(third.with_name(f"bf16_{second.name}"))
    assert f"holds bf16_{second.name} and {second.name}, of two checkpoints" in refusal(tmp_path)
    second.unlink()
    portable.read(tmp_path)
    third.with_name(f"bf16_{second.name}").unlink()
    assert "the optimizer states of rank(s) 1 are missing" in refusal(tmp_path)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": 6}, "is of the optimizer's step 6.0, and zero_pp_rank_0_mp_rank_00_optim_s"),
        ({"partition_count": 4}, "is cut for 4 ranks, and the model's file was written by 2"),
        ({"partition_count": [2, 4]}, "is cut for 4 ranks, and the model's file was written by 2"),
        ({"elements": 9}, " elements of "),
        ({"elements": 1}, " elements of "),
    ],
)
def test_a_shard_of_another_save_is_refused(
    change: dict[str, Any], reason: str, stage: int, tmp_path: Path
) -> None:
    save(tmp_path, stage, **change)
    assert reason in refusal(tmp_path)


def test_shards_of_another_model_are_refused_with_both_counts(tmp_path: Path) -> None:
    save(tmp_path, 2, elements=9)
    assert "holds 14 elements of group 0, whose parameters have 10" in refusal(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    save(tmp_path, 3, elements=9)
    assert "holds 9 elements of master weights, where a rank's part" in refusal(tmp_path)


@pytest.mark.parametrize("elements", [0, 4])
def test_masters_on_nvme_are_refused(tmp_path: Path, elements: int) -> None:
    save(tmp_path, 3, elements=elements)
    (tmp_path / "offloaded_tensors").mkdir()
    assert f"holds {elements} of " in refusal(tmp_path)
    assert "elements of master weights: the others were offloaded to NVMe" in refusal(tmp_path)


def test_a_shard_cut_short_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 2)
    path = tmp_path / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path.name} is refused: " in refusal(tmp_path)
