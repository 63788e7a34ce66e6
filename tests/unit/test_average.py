"""The average of the weights: torch's own, taken in parts, written, and read by other ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from shardwright.train.checkpoint.format.lazy import PortableState, Unreadable
from shardwright.train.checkpoint.read import average as files
from shardwright.train.checkpoint.read.plain import state as portable_state
from shardwright.train.config import RunConfig, TrainerConfig
from shardwright.train.strategy.state.average import Average, Part
from tests.unit.tensors import in_fragments


def settings(**values: Any) -> TrainerConfig:
    return TrainerConfig(max_steps=100, **values)


def parts_of(model: nn.Module, rank: int = 0, ranks: int = 1) -> list[Part]:
    """Return one rank's part of a model's weights: an even share of each flattened parameter."""
    found = []
    for name, parameter in model.named_parameters():
        flat = parameter.detach().view(-1)
        first, last = (len(flat) * n // ranks for n in (rank, rank + 1))
        found.append((name, first, flat[first:last]))
    return found


def moved(model: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("values", "by_hand"),
    [
        ({"average_weights": "ema", "average_decay": 0.8}, get_ema_multi_avg_fn(0.8)),
        ({"average_weights": "uniform"}, get_swa_multi_avg_fn()),
    ],
)
def test_an_average_is_torchs_own_of_the_steps_that_count(
    values: dict[str, Any], by_hand: Any
) -> None:
    model = nn.Linear(5, 3)
    expected = AveragedModel(model, multi_avg_fn=by_hand)
    averages = [
        Average(
            settings(**values, average_start_step=3, average_every_steps=2),
            partial(parts_of, model, rank, 2),
        )
        for rank in range(2)
    ]
    for step in range(1, 12):
        moved(model, step)
        for average in averages:
            average.step_ends(step)
        if step in (4, 6, 8, 10):
            expected.update_parameters(model)
    for name, parameter in expected.module.named_parameters():
        found = [part for average in averages for n, _, part in average.own_weights() if n == name]
        assert torch.equal(torch.cat(found).view_as(parameter), parameter)
    assert [average.taken for average in averages] == [4, 4]


def test_an_average_of_bf16_weights_keeps_what_bf16_cannot() -> None:
    model = nn.Linear(4, 4).bfloat16()
    average = Average(settings(average_weights="uniform"), lambda: parts_of(model))
    total = torch.zeros(4, 4)
    for step in range(1, 9):
        moved(model, step)
        average.step_ends(step)
        total += model.weight.detach().float()
    found = {name: part for name, _, part in average.own_weights()}["weight"].view(4, 4)
    torch.testing.assert_close(found, total / 8, rtol=1e-6, atol=1e-6)
    assert not torch.equal(found.bfloat16().float(), found)


# --- in a checkpoint ------------------------------------------------------------------------------


def saved(model: nn.Module, folder: Path, ranks: int, steps: int = 3) -> None:
    """Average a model over some steps on ranks, and write what each of them has."""
    kinds = settings(average_weights="uniform")
    averages = [Average(kinds, partial(parts_of, model, rank, ranks)) for rank in range(ranks)]
    for step in range(1, steps + 1):
        moved(model, step)
        for average in averages:
            average.step_ends(step)
    (folder / "engine").mkdir(parents=True)
    for rank, average in enumerate(averages):
        torch.save(average.state(copied=rank % 2 == 0), folder / files.file_of(rank))


def state_of(model: nn.Module, folder: Path, tmp_path: Path) -> PortableState:
    weights = {}
    for name, parameter in model.named_parameters():
        (tmp_path / name).mkdir(exist_ok=True)
        weights[name] = in_fragments(parameter.detach(), tmp_path / name, [])
    ema = files.Averages(folder / "engine", lambda name: weights[name].shape)
    return portable_state(weights, "a test", ema)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_other_ranks_read_their_parts(ranks: int, tmp_path: Path) -> None:
    model = nn.Linear(5, 3)
    saved(model, tmp_path / "checkpoint", ranks=2)
    found = state_of(model, tmp_path / "checkpoint", tmp_path)
    for rank in range(ranks):
        restored = Average(
            settings(average_weights="uniform"), partial(parts_of, model, rank, ranks)
        )
        restored.restore(found, tmp_path / "checkpoint" / files.file_of(rank), "uniform", 3)
        assert restored.taken == 3
        for name, start, part in restored.own_weights():
            whole = found.ema[name].whole().view(-1)
            assert torch.equal(part, whole[start : start + len(part)])
    assert not torch.equal(found.ema["weight"].whole(), model.weight)


def test_one_of_another_kind_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(5, 3)
    saved(model, tmp_path / "checkpoint", ranks=1)
    average = Average(settings(average_weights="ema"), lambda: parts_of(model))
    average.restore(state_of(model, tmp_path / "checkpoint", tmp_path), Path(), "uniform", 3)
    assert average.taken == 0
    assert "is uniform, and trainer.average_weights=ema: it begins anew" in caplog.text


def test_a_missing_part_is_told(tmp_path: Path) -> None:
    model = nn.Linear(5, 3)
    saved(model, tmp_path / "checkpoint", ranks=3)
    (tmp_path / "checkpoint" / files.file_of(1)).unlink()
    average = Average(settings(average_weights="uniform"), lambda: parts_of(model))
    state = state_of(model, tmp_path / "checkpoint", tmp_path)
    with pytest.raises(Unreadable, match=r"elements 5 to 10 of a tensor of 15 are in no file"):
        average.restore(state, tmp_path / "checkpoint" / files.file_of(0), "uniform", 3)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"average_weights": "uniform", "average_start_step": 99, "average_every_steps": 30},
            "average_weights=uniform takes weights from step 120 on (average_start_step=99, "
            "average_every_steps=30), behind the last one, max_steps=100",
        ),
        ({"average_weights": "ema", "average_decay": 1.0}, "less than 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="TrainerConfig") as refused:
        settings(**values)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"checkpoint": {"export": "average"}},
            "checkpoint.export=average takes the average of the weights, but "
            "trainer.average_weights=null keeps none; set trainer.average_weights=ema or uniform",
        ),
        (
            {
                "strategy": {
                    "kind": "zero",
                    "stage": 3,
                    "offload_optimizer": "nvme",
                    "nvme_path": "/tmp",
                }
            },
            "trainer.average_weights=ema reads all master weights after each step, which "
            "strategy=zero keeps on a disk (offload_optimizer or offload_parameters=nvme); set it "
            "to null, or offload to cpu",
        ),
        (
            {"data": {"eval_fraction": 0}, "trainer": {"average_evaluated": True}},
            "trainer.average_evaluated=true needs held-out documents, but data.eval_fraction=0",
        ),
        (
            {"strategy": {"kind": "zero", "stage": 1, "node_local_checkpoints": True}},
            "with strategy.node_local_checkpoints=true a node can read only what its own ranks "
            "wrote; set one of them to the other value",
        ),
    ],
)
def test_what_cannot_be_averaged_is_refused(
    changes: dict[str, Any], said: str, tiny_tree: Any
) -> None:
    tree = tiny_tree("clm")
    if "checkpoint" not in changes:
        tree["trainer"]["average_weights"] = "ema"
    for section, values in changes.items():
        tree[section] = values if section == "strategy" else tree.get(section, {}) | values
    with pytest.raises(ValueError, match="RunConfig") as refused:
        RunConfig(**tree)
    assert said in str(refused.value)
