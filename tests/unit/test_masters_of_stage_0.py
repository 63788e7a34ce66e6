"""Masters that name no parameter are told by order and value, or not used at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shardwright.train.checkpoint.format.lazy import Unreadable
from shardwright.train.checkpoint.read import portable

STEP = 2.0**-12
"""Too little for bf16 to tell from 1."""


def masters() -> dict[str, torch.Tensor]:
    """Return weights of a model of which three round to the same bf16 values."""
    torch.manual_seed(0)
    return {
        "wte.weight": torch.randn(5, 3),
        "a.norm.weight": torch.ones(3),
        "a.linear.weight": torch.randn(3, 3),
        "b.norm.weight": torch.ones(3) + STEP,
        "b.linear.weight": torch.randn(3, 3),
        "norm.weight": torch.ones(3) - STEP / 2,
    }


def save(
    directory: Path,
    whole: dict[str, torch.Tensor],
    groups: list[list[str]],
    *,
    fused: bool,
    aliases: dict[str, str] | None = None,
) -> None:
    """Write what DeepSpeed's optimizers of bf16 and fp16 at stage 0 do."""
    module = {name: tensor.bfloat16() for name, tensor in whole.items()}
    module |= {alias: module[name] for alias, name in (aliases or {}).items()}
    ordered = [[whole[name] for name in group] for group in groups]
    flat = [torch.cat([t.flatten() for t in group]) for group in ordered]
    kept: Any = {"fp32_groups_flat": flat} if fused else {"fp32_groups": ordered}
    state = {
        "module": {**module, "scale": torch.tensor([0.5])},
        "buffer_names": ["scale"],
        "optimizer": {"optimizer_state_dict": {"state": {}}, **kept},
        "param_shapes": None,
        "global_steps": 3,
        "dp_world_size": 2,
    }
    torch.save(state, directory / "mp_rank_00_model_states.pt")


def holds(directory: Path, whole: dict[str, torch.Tensor]) -> None:
    state = portable.read(directory)
    assert state.weights.keys() == whole.keys()
    for name, tensor in whole.items():
        assert state.weights[name].dtype == tensor.dtype, name
        assert torch.equal(state.weights[name].whole(), tensor), name
    assert state.buffers.keys() == {"scale"}


@pytest.mark.parametrize("fused", [True, False])
def test_one_group_in_the_order_of_the_model(fused: bool, tmp_path: Path) -> None:
    whole = masters()
    save(tmp_path, whole, [list(whole)], fused=fused, aliases={"head.weight": "wte.weight"})
    holds(tmp_path, {**whole, "head.weight": whole["wte.weight"]})
    tied = portable.read(tmp_path).weights
    assert tied["head.weight"] == tied["wte.weight"]


@pytest.mark.parametrize("fused", [True, False])
def test_matrices_in_one_group_and_the_rest_in_another(fused: bool, tmp_path: Path) -> None:
    whole = masters()
    vectors = [name for name, tensor in whole.items() if tensor.ndim < 2]
    save(tmp_path, whole, [[n for n in whole if n not in vectors], vectors], fused=fused)
    holds(tmp_path, whole)


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_frozen_stays_as_the_model_has_it(fused: bool, tmp_path: Path) -> None:
    whole = masters()
    frozen = {"wte.weight", "b.linear.weight"}
    save(tmp_path, whole, [[n for n in whole if n not in frozen]], fused=fused)
    holds(tmp_path, {n: t.bfloat16() if n in frozen else t for n, t in whole.items()})


def refusal(directory: Path) -> str:
    with pytest.raises(Unreadable) as error:
        portable.read(directory)
    return str(error.value)


@pytest.mark.parametrize("fused", [True, False])
def test_two_that_could_be_each_others_are_refused(fused: bool, tmp_path: Path) -> None:
    whole = masters()
    first, second, third = norms = [name for name in whole if "norm" in name]
    matrices = [name for name in whole if name not in norms]
    # One of the three is frozen, and each of them could be the one.
    save(tmp_path, whole, [matrices, [second, third]], fused=fused)
    assert "more than one way to assign them" in refusal(tmp_path)
    # The one in a group of its own could be any of them.
    save(tmp_path, whole, [matrices, [first, third], [second]], fused=fused)
    assert "more than one way to assign them" in refusal(tmp_path)


@pytest.mark.parametrize("fused", [True, False])
def test_masters_of_other_weights_are_refused(fused: bool, tmp_path: Path) -> None:
    whole = masters()
    save(tmp_path, whole, [list(reversed(whole))], fused=fused)
    assert "no order of the model's 6 makes each of them round to its 16-bit" in refusal(tmp_path)
    path = tmp_path / "mp_rank_00_model_states.pt"
    save(tmp_path, whole, [list(whole)], fused=fused)
    state = torch.load(path)
    state["module"]["norm.weight"] *= 2
    torch.save(state, path)
    assert "no order of the model's 6 makes each of them round to its 16-bit" in refusal(tmp_path)


def test_an_order_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    whole = masters()
    save(tmp_path, whole, [list(whole)], fused=False)
    order = tmp_path / "parameter_order.json"
    order.write_text('["wte.weight", "a.linear.weight"]')
    assert "parameter_order.json does not fit the optimizer's weights: a.linear" in refusal(
        tmp_path
    )
    order.write_text('{"wte.weight": 0}')
    assert "parameter_order.json is not a list of names" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("mp_rank_01_model_states.pt", "a rank of model parallelism"),
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "a rank of model parallelism"),
        ("layer_03-model_00-model_states.pt", "a stage of a pipeline"),
        (
            "layer_3_expert_1_mp_rank_00_model_states.pt",
            "experts that are distributed over the ranks",
        ),
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "the other of stage 3; remove those of the"),
    ],
)
def test_ranks_of_other_kinds_are_refused_by_name(file: str, reason: str, tmp_path: Path) -> None:
    whole = masters()
    save(tmp_path, whole, [list(whole)], fused=False)
    (tmp_path / file).touch()
    text = refusal(tmp_path)
    assert file in text
    assert reason in text
