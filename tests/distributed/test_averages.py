"""The average of the weights: the same under every engine, resumed, resharded, and exported."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

from shardwright.train.checkpoint.read import portable
from shardwright.train.config import load
from shardwright.train.export import recover
from shardwright.train.loop.trainer import Trainer
from shardwright.train.process.rank import rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join
from tests.distributed.curves import curve
from tests.distributed.interrupted import SAVED, STEPS, interrupted
from tests.distributed.jobs import trained_in_fp16_on_a_cpu, whole_run
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

DECAY = 0.8
LOSS = "eval_average_loss"
DEFAULT = ("zero3", "fsdp")
"""Of which the default suite takes all that is told apart below."""


def tree_of(tree: dict[str, Any], strategy: str, **trainer: Any) -> dict[str, Any]:
    # Odd sizes, so that partitions need padding.
    tree["model"] |= {"vocab_size": 389, "intermediate_size": 67}
    tree["strategy"] = STRATEGIES[strategy]
    tree["launcher"]["nproc_per_node"] = 1 if strategy == "single" else 2
    tree["checkpoint"] = {"export": "average", "keep_last": 9}
    tree["trainer"] |= {"max_steps": STEPS, "save_every_steps": SAVED, "average_weights": "ema"}
    tree["trainer"] |= {"average_decay": DECAY, "average_start_step": 2, **trainer}
    return tree


class ByHand(TrainerCallback):
    """The average of one rank's model, by torch's own class."""

    def __init__(self, trainer: Trainer) -> None:
        self.model = AveragedModel(trainer.model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= 2:
            self.model.update_parameters(kwargs["model"])


def average_by_hand(run_dir: Path) -> dict[str, Any]:
    """Train on one rank, beside an average by hand; return that."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
        by_hand = ByHand(trainer)
        trainer.add_callback(by_hand)
        trainer.train()
        found = dict(by_hand.model.module.named_parameters())
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                parameter.copy_(found[name])
        loss = trainer.evaluate()["eval_loss"]
        return {name: p.detach().numpy() for name, p in found.items()} | {LOSS: loss}


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    return {}


@pytest.fixture
def expected(
    tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf, known: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Return the average of one rank's weights, by hand."""
    if not known:
        run_dir = frozen_run(tree_of(tiny_tree("clm"), "single"))
        known |= ranks(1)(average_by_hand, run_dir)[0]
    return {name: torch.from_numpy(v) for name, v in known.items() if name != LOSS}


def ema_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.whole() for name, tensor in portable.read(checkpoint).ema.items()}


CASES = [
    pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow)
    for name in STRATEGIES
    if name not in ("zero3_hierarchical", "fsdp_hybrid")
]


@pytest.mark.parametrize("strategy", CASES)
def test_the_average_is_that_of_one_rank_and_survives_a_resume_bit_for_bit(
    strategy: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
    expected: dict[str, torch.Tensor],
    known: dict[str, Any],
    tmp_path: Path,
) -> None:
    is_async = strategy == "zero3"
    tree = tree_of(tiny_tree("clm"), strategy)
    tree["checkpoint"]["async"] = is_async
    tree["trainer"] |= {"average_evaluated": True, "eval_every_steps": 2}
    count = tree["launcher"]["nproc_per_node"]
    run_dir = frozen_run(tree)
    said = ranks(count)(whole_run, run_dir)
    in_words = f"an exponential moving average of the weights of {STEPS - 1} steps"
    assert f"final/ gets {in_words}" in said[0]
    assert f"These weights are {in_words}." in (run_dir / "final/README.md").read_text()

    last = run_dir / "checkpoints" / f"checkpoint-{STEPS}"
    final = load_file(run_dir / "final/model.safetensors")
    ema = ema_of(last)
    weights = {name: tensor.whole() for name, tensor in portable.read(last).weights.items()}
    assert ema.keys() == expected.keys()
    for name, average in ema.items():
        assert torch.equal(final[name], average), name
    torch.testing.assert_close(ema, expected, rtol=0, atol=1e-5)
    assert max((weights[n] - ema[n]).abs().max() for n in ema) > 1e-4, "it is no average"

    of_average = curve(run_dir, LOSS)
    assert of_average[-1] == pytest.approx(known[LOSS], abs=1e-5)
    assert of_average[-1] != pytest.approx(curve(run_dir, "eval_loss")[-1], abs=1e-4)
    assert len(of_average) == STEPS // 2
    # To the same bits, of steps after none of which the average was evaluated.
    resumed = interrupted(run_dir, tmp_path / "resumed", trainer__average_evaluated=False)
    ranks(count)(whole_run, resumed)
    again = load_file(resumed / "final/model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in final.items())
    manifest = json.loads((last / "manifest.json").read_text())
    described = {"kind": "ema", "taken": STEPS - 1, "replaces_weights": False}
    assert manifest["average"] == described

    options = recover.Options(last, tmp_path / "recovered", ema=True)
    recover.recover(options, io.StringIO(), io.StringIO())
    recovered = load_file(tmp_path / "recovered/model.safetensors")
    assert all(torch.equal(recovered[name], tensor) for name, tensor in final.items())


@pytest.mark.parametrize(
    ("before", "after", "world_size"),
    [
        pytest.param("fsdp", "zero2", 1, marks=pytest.mark.slow),
        pytest.param("zero3", "fsdp", 2, marks=pytest.mark.slow),
        pytest.param("zero2", "ddp", 2, marks=pytest.mark.slow),
        pytest.param("ddp", "zero3", 1, marks=pytest.mark.slow),
    ],
)
def test_an_average_goes_on_under_another_engine_and_world_size(
    before: str,
    after: str,
    world_size: int,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
    expected: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    source = frozen_run(tree_of(tiny_tree("clm"), before))
    ranks(2)(whole_run, source)
    resumed = interrupted(
        source,
        tmp_path / "resumed",
        strategy=STRATEGIES[after],
        launcher__nproc_per_node=world_size,
    )
    ranks(world_size)(whole_run, resumed)
    final = load_file(resumed / "final/model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(final[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero0", "zero1", "zero2_offload", "zero3", "fsdp"])
def test_bf16_averages_its_fp32_masters(
    strategy: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
    expected: dict[str, torch.Tensor],
) -> None:
    tree = tree_of(tiny_tree("clm"), strategy)
    tree["precision"] = {"compute_dtype": "bf16"}
    run_dir = frozen_run(tree)
    ranks(2)(whole_run, run_dir)
    ema = ema_of(run_dir / "checkpoints" / f"checkpoint-{STEPS}")
    torch.testing.assert_close(ema, expected, rtol=0, atol=2e-2)
    assert any(not torch.equal(t.bfloat16().float(), t) for t in ema.values())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero0", "zero2"])
def test_fp16_averages_its_fp32_masters(
    strategy: str,
    tiny_tree: TreeOf,
    frozen_run: Freeze,
    ranks: RanksOf,
    expected: dict[str, torch.Tensor],
) -> None:
    tree = tree_of(tiny_tree("clm"), strategy)
    tree["precision"] = {"compute_dtype": "fp16", "initial_loss_scale": 1024}
    run_dir = frozen_run(tree)
    ranks(2)(trained_in_fp16_on_a_cpu, run_dir)
    ema = ema_of(run_dir / "checkpoints" / f"checkpoint-{STEPS}")
    torch.testing.assert_close(ema, expected, rtol=0, atol=2e-2)
