"""What cannot be gone on from is said before anything is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from shardwright.train.checkpoint.format.lazy import (
    LazyTensor,
    PortableState,
    Unreadable,
    describe,
    lazy,
)
from shardwright.train.config import BEGINNING, Progress, RankLayout
from shardwright.train.errors import UserError
from shardwright.train.loop import resuming
from shardwright.train.run_directory import metrics
from shardwright.train.strategy.state.moments import check_names


def at_step(step: int) -> resuming.Resumed:
    return resuming.Resumed(
        checkpoint=Path(f"checkpoint-{step}"),
        progress=Progress(step=step, samples=step * 64),
        tokens=step * 64 * 64,
        world_size=2,
        state=PortableState({}, {}, {}),
    )


def test_rng_state_follows_the_samples() -> None:
    def taken(layout: RankLayout) -> list[str | None]:
        return [resuming.rng_file(at_step(3), layout, rank) for rank in range(layout.world_size)]

    assert taken(RankLayout(replicas=2)) == taken(RankLayout(shards=2)) == ["rng-0.pt", "rng-1.pt"]
    assert taken(RankLayout()) == [None]
    assert taken(RankLayout(replicas=2, shards=2)) == [None] * 4
    # Ranks that divide matrices have the samples of one rank, and so draw alike.
    assert taken(RankLayout(tensor=2)) == [None] * 2
    assert taken(RankLayout(shards=2, tensor=2)) == [*["rng-0.pt"] * 2, *["rng-1.pt"] * 2]


def test_an_optimizer_without_a_state_is_restored_from_none() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2))]
    nothing = PortableState({}, {}, {})
    check_names(nothing, ["a"], torch.optim.SGD(weights, momentum=0.0))
    for keeps in (torch.optim.SGD(weights, momentum=0.9), torch.optim.AdamW(weights)):
        with pytest.raises(UserError, match="the checkpoint holds no optimizer state of a; to con"):
            check_names(nothing, ["a"], keeps)


def test_quantised_state_is_named(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.optim.subclass_8bit import OptimState8bit

    path = tmp_path / "moments.pt"
    torch.save(OptimState8bit.zeros((4096,)), path)
    with pytest.raises(Unreadable, match="quantised tensor|is refused"):
        lazy(describe(path), path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_of_a_value_is_written_whatever_dtype_the_checkpoint_has(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    path, weight = tmp_path / "weights.pt", torch.arange(6.0).view(3, 2) / 8
    torch.save({"weight": weight.to(dtype)}, path)
    stored = {"weight": lazy(describe(path)["weight"], path)}
    resumed = resuming.Resumed(tmp_path, BEGINNING, 1, 1, PortableState(stored, {}, {}))
    model = torch.nn.Linear(2, 3, bias=False)
    value = resuming.values(model, resumed)["weight"]  # type: ignore[arg-type]
    out = torch.full((5,), 7.0)
    value.write(out[1:4], 2)
    assert out.tolist() == [7.0, 0.25, 0.375, 0.5, 7.0]


def test_another_model_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.ones(3, 2)}, path)
    stored = {"weight": lazy(describe(path)["weight"], path)}
    resumed = resuming.Resumed(tmp_path, BEGINNING, 1, 1, PortableState(stored, {}, {}))
    same, other = torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(2, 4)
    out = torch.empty(3, 2)
    resuming.values(same, resumed)["weight"].write(out)  # type: ignore[arg-type]
    assert torch.equal(out, torch.ones(3, 2))
    with pytest.raises(
        UserError, match=r"weight has shape \(3, 2\), not \(4, 2\); bias is missing"
    ):
        resuming.values(other, resumed)  # type: ignore[arg-type]


def test_a_gap_in_the_files_is_seen() -> None:
    with pytest.raises(Unreadable, match="0 of a tensor's 6 elements are in the files"):
        LazyTensor((3, 2), torch.float32, ())


def test_metrics_beyond_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = '{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 2, "eval_loss": 1}\n'
    path.write_text(f'{lines}{{"step": 3}}\n{{"step": 4, "lo')
    resumed = dataclasses.replace(at_step(2), checkpoint=tmp_path)
    state = tmp_path / "trainer_state.json"
    state.write_text('{"global_step": 2, "log_history": [{"step": 2, "eval_loss": 1}]}')
    metrics.trim_metrics(tmp_path, 2, is_evaluated=resuming.is_evaluated(resumed))
    assert path.read_text() == lines
    # An evaluation that came after the checkpoint comes again.
    state.write_text('{"global_step": 2, "log_history": []}')
    metrics.trim_metrics(tmp_path, 2, is_evaluated=resuming.is_evaluated(resumed))
    assert path.read_text() == "".join(lines.splitlines(keepends=True)[:2])
    metrics.trim_metrics(tmp_path)
    assert path.read_text() == ""
